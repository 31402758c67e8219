//! Plain data: names, claims, grants, tokens and what the stores say about them.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

mod fairness;
mod guarantees;
mod hash;
mod owner;
mod replication;

pub use fairness::Fairness;
pub use guarantees::{Fencing, Finding, Guarantees, Persistence, Severity};
pub(crate) use hash::stable_hash;
pub use owner::{InvalidOwner, MAX_OWNER_BYTES, Owner};
pub use replication::Replication;

/// The largest name, in bytes.
pub const MAX_NAME_BYTES: usize = 512;
/// The largest encoded [`Record`], in bytes.
pub const MAX_RECORD_BYTES: usize = 4096;
/// Names with this beginning belong to Leasehold's own keys and are refused.
pub const RESERVED_PREFIX: &[u8] = b"leasehold:";

/// The name of a lock: 1 to 512 bytes, compared byte for byte.
///
/// Nothing is folded or normalised: `a`, `A`, `а` (Cyrillic) and `a ` are four locks. Any bytes will do, valid UTF-8
/// or not, except names that begin with `leasehold:`, which Leasehold keeps for its own keys.
///
/// `Display` shows valid UTF-8 as it is and escapes the rest and every control character, so that a name is safe to print.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Name(Arc<[u8]>);

impl Name {
    /// Checks and takes a name.
    ///
    /// # Errors
    /// [`InvalidName`] if it is empty, longer than 512 bytes or begins with `leasehold:`.
    pub fn new(name: impl AsRef<[u8]>) -> Result<Self, InvalidName> {
        let bytes = name.as_ref();
        if bytes.is_empty() {
            return Err(InvalidName("a lock's name is empty".into()));
        }
        if bytes.len() > MAX_NAME_BYTES {
            return Err(InvalidName(format!(
                "a lock's name has {} bytes, at most {MAX_NAME_BYTES} are allowed (it begins {}): name it by a digest instead",
                bytes.len(),
                Escaped(&bytes[..24])
            )));
        }
        if bytes.starts_with(RESERVED_PREFIX) {
            return Err(InvalidName(format!(
                "the name {} begins with leasehold:, which is kept for Leasehold's own keys",
                Escaped(&bytes[..bytes.len().min(48)])
            )));
        }
        Ok(Self(bytes.into()))
    }

    /// The bytes of the name.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        Escaped(&self.0).fmt(f)
    }
}

impl fmt::Debug for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Name({self})")
    }
}

/// Why a name was refused, before anything was sent anywhere.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct InvalidName(String);

impl InvalidName {
    pub(crate) fn new(why: String) -> Self {
        Self(why)
    }
}

/// Bytes of a stranger, safe to print: valid UTF-8 stays, control characters and all else are escaped.
#[derive(Clone, Copy, Debug)]
pub struct Escaped<'a>(pub &'a [u8]);

impl fmt::Display for Escaped<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        use fmt::Write as _;
        for chunk in self.0.utf8_chunks() {
            for c in chunk.valid().chars() {
                if is_deceptive(c) { write!(f, "{}", c.escape_unicode())? } else { f.write_char(c)? }
            }
            write!(f, "{}", chunk.invalid().escape_ascii())?;
        }
        Ok(())
    }
}

/// Control characters, and those that reorder or hide text on a terminal.
fn is_deceptive(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{61c}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}')
}

/// The identity of one claim: 128 random bits. Whoever presents it is the claim's owner.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ClaimId([u8; 16]);

impl ClaimId {
    /// Makes an id of 16 bytes, which must be random.
    pub const fn from_bytes(bytes: [u8; 16]) -> Self {
        Self(bytes)
    }

    /// Reads the 32 hexadecimal digits that `Display` writes; `None` for anything else.
    pub fn parse(text: &str) -> Option<Self> {
        (text.len() == 32 && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')))
            .then(|| u128::from_str_radix(text, 16).ok().map(|n| Self(n.to_be_bytes())))
            .flatten()
    }

    /// The 16 bytes.
    pub const fn as_bytes(&self) -> &[u8; 16] {
        &self.0
    }
}

impl fmt::Display for ClaimId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", u128::from_be_bytes(self.0))
    }
}

impl fmt::Debug for ClaimId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ClaimId({self})")
    }
}

/// The number that comes with every grant of a name and is larger than that of every earlier grant of it.
///
/// Give it to the resource with each write; a resource that refuses numbers smaller than the largest it has seen turns
/// away a holder that lost its lock without noticing. Below 2^53, so that every language reads it without loss.
/// (The idea: Burrows, "The Chubby lock service", 2006, as sequencers; the name: Kleppmann, 2016.)
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct FencingToken(u64);

impl FencingToken {
    /// The largest token: 2^53 - 1.
    pub const MAX: u64 = (1 << 53) - 1;

    /// Takes a number for a token, as read back from a resource.
    pub const fn new(number: u64) -> Self {
        Self(number)
    }

    /// The number.
    pub const fn get(self) -> u64 {
        self.0
    }
}

impl fmt::Display for FencingToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// How a lock is taken. Only exclusive locks exist so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Mode {
    /// One holder at a time.
    #[default]
    Exclusive,
}

/// What a claim is bound to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Binding {
    /// To the process: a store that can tell that a process is dead (SQLite) passes its locks on at once.
    #[default]
    Process,
    /// To nothing: it ends at release or expiry only.
    Expiry,
}

/// What people are told about a holder. Shown by `inspect`, never used for a decision.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// The unit of work that owns the claim, if the user named one: the text of an [`Owner`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub owner: Option<String>,
    /// Host name.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub host: String,
    /// Process id on that host (in its own pid namespace).
    #[serde(default, skip_serializing_if = "is_zero")]
    pub pid: u32,
    /// Why the lock is taken.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub label: Option<String>,
    /// Whatever else the user wants shown.
    #[serde(default, rename = "meta", skip_serializing_if = "BTreeMap::is_empty")]
    pub metadata: BTreeMap<String, String>,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "the signature that serde asks for")]
fn is_zero(n: &u32) -> bool {
    *n == 0
}

impl Record {
    /// The record as the text that stores keep: one line of JSON.
    pub fn encode(&self) -> String {
        serde_json::to_string(self).unwrap_or_else(|_| "{}".into())
    }

    /// Reads a record; `None` if the text is no record.
    pub fn decode(text: &[u8]) -> Option<Self> {
        serde_json::from_slice(text).ok()
    }
}

/// A request for a lock. Presenting the same claim again asks where it stands; it never makes a second one.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Claim {
    /// The lock.
    pub name: Name,
    /// Who asks.
    pub id: ClaimId,
    /// How long the grant is to last unless renewed.
    pub ttl: Duration,
    /// How the lock is taken.
    pub mode: Mode,
    /// Whether to wait in line if it is busy; stores without a queue answer `Busy` all the same.
    pub queue: bool,
    /// How many may stand in line before it: a longer line is refused with `QueueFull`.
    pub queue_limit: Option<u32>,
    /// How many fencing tokens the grant takes: its own and the ones after it, for holders that pass the lock on among
    /// themselves. At least one.
    pub tokens: u32,
    /// The token that the claim proposes, where one lock is kept by several stores that are to agree on it: taken if it is
    /// larger than the last one ([`ballot_over`]), else the store's own rule goes. A store that holds for this claim already raises the
    /// grant's token to it, under the same condition.
    pub ballot: Option<FencingToken>,
    /// What the claim is bound to.
    pub binding: Binding,
    /// The encoded [`Record`].
    pub record: Arc<str>,
}

impl Claim {
    /// A claim of `name` by `id` for `ttl`: exclusive, not queued, bound to the process, with an empty record.
    pub fn new(name: Name, id: ClaimId, ttl: Duration) -> Self {
        Self {
            name,
            id,
            ttl,
            mode: Mode::Exclusive,
            queue: false,
            queue_limit: None,
            tokens: 1,
            ballot: None,
            binding: Binding::Process,
            record: Arc::from("{}"),
        }
    }

    /// The same claim with this encoded record.
    #[must_use]
    pub fn with_record(mut self, record: Arc<str>) -> Self {
        self.record = record;
        self
    }

    /// The same claim, waiting in line or not.
    #[must_use]
    pub fn with_queue(mut self, queue: bool) -> Self {
        self.queue = queue;
        self
    }

    /// The same claim, refused if so many stand in line already.
    #[must_use]
    pub fn with_queue_limit(mut self, limit: u32) -> Self {
        self.queue_limit = Some(limit);
        self
    }

    /// The same claim, taking so many tokens (one at least).
    #[must_use]
    pub fn with_tokens(mut self, tokens: u32) -> Self {
        self.tokens = tokens.max(1);
        self
    }

    /// The same claim, proposing this token.
    #[must_use]
    pub fn with_ballot(mut self, ballot: FencingToken) -> Self {
        self.ballot = Some(ballot);
        self
    }

    /// The same claim, bound otherwise.
    #[must_use]
    pub fn with_binding(mut self, binding: Binding) -> Self {
        self.binding = binding;
        self
    }
}

/// How far ahead of a store's own wall clock a proposed token may be: else a client whose clock is wrong could use all
/// tokens up. And how far behind it, where the last token is forgotten: else such a client could repeat old ones.
pub const BALLOT_AHEAD: Duration = Duration::from_secs(3600);

/// The token that a claim proposes, if a store whose last token is `last` and whose wall clock shows `wall` takes it: it is
/// larger than the last one (if none is known, which is 0, not more than an hour behind the clock), not more than an hour
/// ahead, and leaves room for the tokens that the claim takes.
pub fn ballot_over(claim: &Claim, last: u64, wall: Duration) -> Option<FencingToken> {
    let ballot = claim.ballot?;
    let micros = |time: Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
    let latest = micros(wall.saturating_add(BALLOT_AHEAD));
    let last = if last == 0 { micros(wall.saturating_sub(BALLOT_AHEAD)) } else { last };
    let spare = u64::from(claim.tokens.max(1)) - 1;
    let fits = ballot.get() <= latest && ballot.get().saturating_add(spare) <= FencingToken::MAX;
    (ballot.get() > last && fits).then_some(ballot)
}

/// A lock as granted by a store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grant {
    /// The fencing token of this grant.
    pub token: FencingToken,
    /// How long the store keeps it from the moment it answered; may differ from what was asked.
    pub ttl: Duration,
    /// Which of the store's connections the claim was presented on; 0 where that means nothing.
    pub session: u64,
}

/// A claim as its holder knows it: what a store needs to renew or release it.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Held {
    /// The lock.
    pub name: Name,
    /// Whose claim.
    pub id: ClaimId,
    /// The token of the grant; `None` if the answer to the claim never came.
    pub token: Option<FencingToken>,
    /// For a renewal: how long from now it is to last at least. `None`: only confirm that it is still held.
    pub extend: Option<Duration>,
    /// For a renewal: what it is bound to from now on.
    pub binding: Binding,
    /// The session of the grant.
    pub session: u64,
    /// Whether a presentation of the claim may still be under way, so that release must forbid it for good.
    pub suspect: bool,
    /// Whether the claim may stand in line, so that release must take it out of there too.
    pub waiting: bool,
}

impl Held {
    /// What `claim` holds by `grant`; a renewal extends it by the claim's TTL.
    pub fn new(claim: &Claim, grant: &Grant) -> Self {
        Self {
            name: claim.name.clone(),
            id: claim.id,
            token: Some(grant.token),
            extend: Some(claim.ttl),
            binding: claim.binding,
            session: grant.session,
            suspect: false,
            waiting: false,
        }
    }

    /// What `claim` may hold, no answer having come: suspect, and in line if it was to queue.
    pub fn unanswered(claim: &Claim) -> Self {
        Self {
            name: claim.name.clone(),
            id: claim.id,
            token: None,
            extend: Some(claim.ttl),
            binding: claim.binding,
            session: 0,
            suspect: true,
            waiting: claim.queue,
        }
    }

    /// What `claim` may hold that was put in line on `session`: the lock may have been handed to it meanwhile.
    pub fn queued(claim: &Claim, session: u64) -> Self {
        Self { session, suspect: false, waiting: true, ..Self::unanswered(claim) }
    }
}

/// Somebody's hold of a lock, as others see it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Holder {
    /// Whose claim; `None` for a foreign holder.
    pub id: Option<ClaimId>,
    /// The token of the grant; `None` for a foreign holder.
    pub token: Option<FencingToken>,
    /// Time until it ends unless renewed; `None` if the store does not say or it never ends by itself.
    pub remaining: Option<Duration>,
    /// When it was granted, in microseconds of the Unix epoch by the store's wall clock, if known.
    pub since_unix_micros: Option<u64>,
    /// What the holder says of itself.
    pub record: Option<Record>,
    /// For a holder that is not Leasehold's: the beginning of what stands in the store, safe to print.
    pub foreign: Option<String>,
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.record, &self.foreign) {
            (_, Some(foreign)) => write!(f, "another library's lock ({foreign})")?,
            (Some(record), _) => {
                match &record.owner {
                    Some(owner) => write!(f, "{}", Escaped(owner.as_bytes()))?,
                    None => write!(f, "{}:{}", Escaped(record.host.as_bytes()), record.pid)?,
                }
                if let Some(label) = &record.label {
                    write!(f, " \"{}\"", Escaped(label.as_bytes()))?;
                }
            }
            (None, None) => f.write_str("another claim")?,
        }
        if let Some(token) = self.token {
            write!(f, ", token {token}")?;
        }
        if let Some(remaining) = self.remaining {
            write!(f, ", {} ms left", remaining.as_millis())?;
        }
        Ok(())
    }
}

/// A place in line.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Ticket {
    /// The lock.
    pub name: Name,
    /// Who waits.
    pub id: ClaimId,
    /// Which of the store's connections the claim was presented on; 0 where that means nothing.
    pub session: u64,
    ahead: Option<u64>,
    holder: Option<Holder>,
}

impl Ticket {
    /// A place in line for `claim`.
    pub fn new(claim: &Claim) -> Self {
        Self { name: claim.name.clone(), id: claim.id, session: 0, ahead: None, holder: None }
    }

    /// The same place, presented on that connection.
    #[must_use]
    pub fn with_session(mut self, session: u64) -> Self {
        self.session = session;
        self
    }

    /// The same place, with so many before it.
    #[must_use]
    pub fn with_ahead(mut self, ahead: u64) -> Self {
        self.ahead = Some(ahead);
        self
    }

    /// The same place, behind that holder.
    #[must_use]
    pub fn with_holder(mut self, holder: Option<Holder>) -> Self {
        self.holder = holder;
        self
    }

    /// The same place, with so many before it as that one, behind that one's holder.
    #[must_use]
    pub(crate) fn with_news_of(mut self, other: &Self) -> Self {
        (self.ahead, self.holder) = (other.ahead, other.holder.clone());
        self
    }

    /// How many waiters were ahead when the store last said: 0 is the next in line. `None` if the store does not say.
    pub fn ahead(&self) -> Option<u64> {
        self.ahead
    }

    /// Who held the lock when the store last said.
    pub fn holder(&self) -> Option<&Holder> {
        self.holder.as_ref()
    }
}

/// The answer to a claim. Busy is an answer, not an error.
#[derive(Clone, Debug)]
#[must_use]
pub enum Acquired {
    /// The claim holds the lock.
    Granted(Grant),
    /// The claim waits in line.
    Queued(Ticket),
    /// Somebody else holds it and the claim left no trace.
    Busy(Holder),
}

/// The answer to a renewal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Renewal {
    /// Still held, for this long from the moment the store answered.
    Renewed(Duration),
    /// No longer held; it will not come back.
    Lost,
}

/// The answer to a release.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Released {
    /// It was held by this claim and is free now.
    Released,
    /// Nobody held it: it had expired, was removed, or was released before.
    NotHeld,
    /// Somebody else holds it: the claim had lost it before. Theirs was not touched.
    HeldByOther,
}

/// What to look at.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Query {
    /// One lock, exactly, held or not.
    One(Name),
    /// Locks held now whose names begin with `prefix`, in the order of their names, after `after`, at most `limit`.
    Prefix {
        /// The beginning of the names; empty for all.
        prefix: Vec<u8>,
        /// The last name of the page before.
        after: Option<Name>,
        /// The most to return.
        limit: usize,
    },
    /// Locks for which a claim of this owner (the `owner` of its [`Record`]) waits in line.
    Waits {
        /// The owner.
        owner: String,
    },
}

/// A part of a listing.
#[derive(Clone, Debug)]
pub struct Page<T> {
    /// The items.
    pub items: Vec<T>,
    /// Ask again after this name; `None` at the end.
    pub next: Option<Name>,
}

/// A lock as an onlooker sees it.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct LockView {
    /// The lock.
    pub name: Name,
    /// Who holds it, if anybody.
    pub holder: Option<Holder>,
    /// The last token granted, if the store still knows.
    pub last_token: Option<FencingToken>,
    /// How many wait in line.
    pub waiters: u64,
    /// Who waits, in order, the next first: all of them for a look at one lock ([`Query::One`]), those of the owner asked
    /// for in [`Query::Waits`] (a store may give the others too), none in a listing.
    pub queue: Vec<Waiter>,
}

/// Somebody's place in line, as others see it.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Waiter {
    /// Whose claim.
    pub id: ClaimId,
    /// When it joined the line, in microseconds of the Unix epoch by the store's wall clock, if known.
    pub since_unix_micros: Option<u64>,
    /// What the waiter says of itself.
    pub record: Option<Record>,
}

impl Waiter {
    /// A place in line of `id`.
    pub fn new(id: ClaimId, since_unix_micros: Option<u64>, record: Option<Record>) -> Self {
        Self { id, since_unix_micros, record }
    }
}

impl LockView {
    /// A lock seen free, never granted so far as is known.
    pub fn free(name: Name) -> Self {
        Self { name, holder: None, last_token: None, waiters: 0, queue: Vec::new() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_bounded_and_the_reserved_prefix_is_refused() {
        for bad in ["", "leasehold:", "leasehold:{x}:fence:x", &"x".repeat(513), &"x".repeat(10 << 20)] {
            assert!(Name::new(bad).is_err(), "{bad:.20}");
        }
        for good in ["x", "leasehold", "Leasehold:x", " leasehold:", &"x".repeat(512)] {
            assert!(Name::new(good).is_ok(), "{good:.20}");
        }
    }

    #[test]
    fn look_alike_names_differ() {
        let names = ["a", "A", "а", "a ", " a", "a\0", "á", "a\u{301}", "{a}", "a{}", "{}a", "a/b", "a:b"];
        let unique: std::collections::HashSet<_> = names.iter().map(|n| Name::new(n).unwrap()).collect();
        assert_eq!(unique.len(), names.len());
    }

    #[test]
    fn a_name_is_safe_to_print() {
        let name = Name::new(b"caf\xc3\xa9\n\x1b[31m\xff\xe2\x80\xae").unwrap();
        assert_eq!(name.to_string(), "café\\u{a}\\u{1b}[31m\\xff\\u{202e}");
    }

    #[test]
    fn a_claim_id_reads_what_it_writes_and_nothing_else() {
        let id = ClaimId::from_bytes(*b"0123456789abcdef");
        assert_eq!(ClaimId::parse(&id.to_string()), Some(id));
        for bad in ["", "0", &"g".repeat(32), &"A".repeat(32), &"0".repeat(33), &"+".repeat(32)] {
            assert_eq!(ClaimId::parse(bad), None);
        }
    }
}
