//! The store over one Redis or Valkey server.
//!
//! A lock is a plain string key, written with `SET .. NX PX` and removed by compare-and-delete, as many libraries do
//! it: they and Leasehold exclude each other on one name. `docs/redis.md` tells the rest.

mod cluster;
mod combine;
mod config;
mod connection;
mod diagnose;
mod fence;
mod hub;
mod keys;
mod lately;
mod listing;
mod look;
mod refresh;
mod replicas;
mod reply;
mod script;
mod sentinel;
mod waiting;

use std::fs::File;
use std::io::Write;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use redis::{Cmd, RedisWrite, Value};
use tokio::runtime::Handle;

pub use cluster::{ClusterConfig, ClusterStore};
pub use config::{DEFAULT_TIMEOUT, PASSWORD_VARIABLE, RedisConfig, USERNAME_VARIABLE};
pub use fence::{FENCED_SET, RedisFence};
#[doc(hidden)]
pub use keys::{KeyNames, key_names};
pub use sentinel::{SENTINEL_PASSWORD_VARIABLE, SENTINEL_USERNAME_VARIABLE};

use crate::clock::{self, Instant};
use crate::error::{Error, ErrorKind, Result};
use crate::store::{HAND_OFF_TTL, Store, Woken};
use crate::types::{
    Acquired, Claim, FencingToken, Finding, Grant, Guarantees, Held, LockView, MAX_RECORD_BYTES, Page, Query,
    Released, Renewal, Replication, Ticket,
};
use combine::{Job, Patience, Verb};
use connection::{Connector, Link};
use hub::Hub;
use keys::{Keys, Keyspace, owner};
use lately::Lately;
use replicas::Aside;
use reply::{Occupant, Refusal};
use script::By;
use waiting::{Attempt, Seen, Waiting};

/// The least TTL.
const LEAST_TTL: Duration = Duration::from_millis(10);
/// The largest TTL.
const MOST_TTL: Duration = Duration::from_secs(366 * 24 * 3600);
/// Locks in one renewal command.
const BATCH: usize = 100;

/// Locks on one Redis or Valkey server.
#[derive(Debug)]
pub struct RedisStore {
    connector: Arc<Connector>,
    keyspace: Keyspace,
    username: Option<String>,
    guarantees: Guarantees,
    waiting: Arc<Waiting>,
    aside: Aside,
    lately: Lately,
}

impl RedisStore {
    /// Connects, and looks at the server to see what it can promise. The connection lives on `runtime`, which must have
    /// I/O enabled; the store's own methods work under any executor.
    ///
    /// # Errors
    /// `Unavailable` if the server cannot be reached, `Rejected` if it refuses the login, `Invalid` if a file that the
    /// URL names cannot be read.
    ///
    /// # Round trips
    /// The dial and four.
    pub async fn connect(config: RedisConfig, runtime: Handle) -> Result<Arc<Self>> {
        let mut store = Self::new(config, runtime, Arc::default());
        store.guarantees = look::guarantees(&store.connector).await?;
        let store = Arc::new(store);
        refresh::attend(&store);
        if store.connector.sentinels().is_some() {
            sentinel::attend(&store.connector);
            lately::attend(&store);
        }
        Ok(store)
    }

    /// A store that has not looked at its server yet.
    fn new(config: RedisConfig, runtime: Handle, hub: Arc<Hub>) -> Self {
        let keyspace = Keyspace::new(&config.prefix, hub.is_cluster);
        let username = config.username.clone();
        let waiting = Arc::new(Waiting::new(if hub.is_cluster { "node" } else { "push" }));
        let connector = Connector::new(config, runtime, waiting.clone(), hub);
        Self {
            connector,
            keyspace,
            username,
            guarantees: Guarantees::strict(""),
            waiting,
            aside: Aside::default(),
            lately: Lately::default(),
        }
    }

    /// How many things it remembers of claims that wait or waited: a test's look for leaks.
    #[doc(hidden)]
    pub fn remembered(&self) -> usize {
        self.waiting.remembered()
    }

    fn deadline(&self, ttl: Option<Duration>) -> Instant {
        let timeout = self.connector.timeout();
        // A command must not outlast the lease that it is about.
        clock::now().plus(ttl.map_or(timeout, |ttl| timeout.min(ttl / 3)))
    }

    /// Runs a script: by its digest, and with its text where the server does not know it.
    async fn run(
        &self,
        link: &Arc<Link>,
        deadline: Instant,
        call: impl Fn(By) -> Result<Cmd> + Send,
    ) -> Result<Value> {
        let answer = self.connector.send(link, &call(By::Digest)?, deadline).await?;
        let answer = match &answer {
            Value::ServerError(error) if Refusal::of(error).is_unknown_script() => {
                self.connector.send(link, &call(By::Text)?, deadline).await?
            }
            _ => answer,
        };
        self.accepted(answer)
    }

    fn accepted(&self, value: Value) -> Result<Value> {
        if self.connector.sentinels().is_some()
            && let Value::ServerError(error) = &value
            && Refusal::of(error).ends_with_failover()
        {
            return Err(Error::new(
                ErrorKind::Unavailable,
                "a failover is under way: this server takes no writes",
            )
            .on_store(&self.connector.location)
            .caused_by(Refusal::of(error))
            .advise("the sentinels are asked again where the master is"));
        }
        reply::accepted(value, self.username.as_deref())
            .map_err(|error| error.on_store(&self.connector.location))
    }

    async fn acquire_once(&self, claim: &Claim, how: How) -> Result<Acquired> {
        let ttl = checked_ttl(claim.ttl)?;
        if claim.record.len() > MAX_RECORD_BYTES {
            return Err(Error::invalid(format!(
                "the record of the claim has {} bytes, at most {MAX_RECORD_BYTES} are allowed",
                claim.record.len()
            )));
        }
        let keys = self.keyspace.keys(&claim.name)?;
        let deadline = self.deadline(Some(claim.ttl));
        let link = self.connector.link(deadline).await?;
        if !claim.queue {
            return self.present(&keys, claim, ttl, (&link, how), deadline, None).await;
        }
        // Nobody joins the line who cannot be called; until somebody waits on a connection, it asks for no calls.
        let mut busy = None;
        if !link.is_subscribed() && !how.again && !self.waiting.knows(claim.id) {
            let answer = self.present(&keys, claim, ttl, (&link, how), deadline, None).await?;
            if !matches!(answer, Acquired::Busy(_)) {
                return Ok(answer);
            }
            busy = Some(answer);
        }
        // Boxed, for what is rare must not make the common case carry its room.
        Box::pin(self.join(&keys, claim, ttl, (&link, how), deadline, busy)).await
    }

    /// Presents a claim so that it waits in line; `busy` is what was seen a moment before, if it was presented already.
    async fn join(
        &self,
        keys: &Keys<'_>,
        claim: &Claim,
        ttl: u64,
        (link, how): (&Arc<Link>, How),
        deadline: Instant,
        busy: Option<Acquired>,
    ) -> Result<Acquired> {
        let attempt = self.waiting.present(claim, how.again).ok_or_else(passing_on)?;
        // Only now, with the claim noted: the calls are not given up while anybody is.
        let answer = match (self.connector.subscribe(link, deadline).await, busy) {
            (Ok(true), busy) => {
                let answer = self.present(keys, claim, ttl, (link, how), deadline, Some(&attempt)).await;
                match answer {
                    // That somebody else has it is known; whether the claim stands in line it will learn by asking again.
                    Err(error) if busy.is_some() && error.is_transient() => {
                        Ok(Acquired::Queued(self.waiting.unsure(claim)))
                    }
                    answer => answer,
                }
            }
            // Busy is what it is, whatever became of the calls.
            (_, Some(answer)) => Ok(answer),
            (Ok(false), None) => self.present(keys, claim, ttl, (link, how), deadline, None).await,
            (Err(error), None) => Err(error),
        };
        match &answer {
            Ok(Acquired::Queued(_)) => {}
            Ok(Acquired::Granted(_)) => self.waiting.granted(claim.id),
            // It may stand in line all the same, unless it was refused in its first try.
            Err(error) if error.is_transient() && (attempt.again || error.kind() == ErrorKind::Unknown) => {}
            _ => self.waiting.forget(claim.id),
        }
        answer
    }

    /// One presentation of a claim; with an attempt, it waits in line if the lock is busy.
    async fn present(
        &self,
        keys: &Keys<'_>,
        claim: &Claim,
        ttl: u64,
        (link, how): (&Arc<Link>, How),
        deadline: Instant,
        attempt: Option<&Attempt>,
    ) -> Result<Acquired> {
        let is_short = claim.ttl / 3 < self.connector.timeout();
        let patience = Patience { deadline, is_short, asking: how.asking };
        let attempt_of = attempt.map(|attempt| (&*self.waiting.channel, attempt));
        let job = wrote(acquire_job(keys, self.keyspace.slot_of(keys), claim, ttl, attempt_of))?;
        let answer = self.accepted(self.connector.submit(link, job, patience).await?)?;
        let granted = |token, ttl| Acquired::Granted(Grant { token, ttl, session: link.generation });
        let (value, left, ahead) = match &answer {
            Value::Int(token) => {
                let token = u64::try_from(*token).map_err(|_| reply::unexpected(&answer))?;
                return Ok(granted(FencingToken::new(token), Duration::from_millis(ttl)));
            }
            Value::Array(parts) => match (parts.as_slice(), attempt) {
                ([Value::BulkString(value), Value::Int(left)], _) => (value, *left, None),
                ([Value::BulkString(value), Value::Int(left), Value::Int(ahead), since], Some(attempt)) => {
                    let since = reply::text(since).unwrap_or_default();
                    (value, *left, Some((u64::try_from(*ahead).unwrap_or(0), since, attempt)))
                }
                _ => return Err(reply::unexpected(&answer)),
            },
            _ => return Err(reply::unexpected(&answer)),
        };
        match (Occupant::read(value), ahead) {
            (Occupant::Claim { id, token, .. }, _) if id == claim.id => {
                Ok(granted(token, reply::remaining(left).unwrap_or(MOST_TTL)))
            }
            (Occupant::Newer(shown), _) => Err(newer_protocol(&shown)),
            (occupant, None) => Ok(Acquired::Busy(occupant.into_holder(left))),
            (occupant, Some((ahead, since, attempt))) => {
                let holder = Some(occupant.into_holder(left));
                let seen = Seen { holder, left: reply::remaining(left), session: link.generation };
                let entry = entry(&self.waiting.channel, claim, ttl, &since);
                Ok(Acquired::Queued(self.waiting.queued(claim, attempt, ahead, entry, &seen)))
            }
        }
    }

    async fn release_once(&self, held: &Held, asking: bool) -> Result<Released> {
        let is_followed = self.connector.sentinels().is_some();
        let before = if is_followed { self.connector.generation() } else { None };
        let answer = self.give_back(held, true, asking).await;
        if is_followed && matches!(answer, Ok(Released::Released)) {
            self.lately.note(held);
            if before.is_some() && before != self.connector.generation() {
                // Answered by a master that is one no more, perhaps after the next was told what had been released.
                let _ = Box::pin(self.give_back(held, true, asking)).await;
            }
        }
        if held.waiting {
            // Only now: a grant that came meanwhile was passed on by this very release.
            self.waiting.forget(held.id);
        }
        answer
    }

    /// Releases a claim; `may_forbid`: for good, if a request of it may still be under way.
    async fn give_back(&self, held: &Held, may_forbid: bool, asking: bool) -> Result<Released> {
        let keys = self.keyspace.keys(&held.name)?;
        let deadline = self.deadline(None);
        let link = self.connector.link(deadline).await?;
        let forbid = may_forbid && (held.suspect || held.session != link.generation);
        let entry = if held.waiting { self.waiting.entry(held.id) } else { None };
        let job = wrote(release_job(&keys, self.keyspace.slot_of(&keys), held, forbid, entry.as_deref()))?;
        let patience = Patience { deadline, is_short: false, asking };
        match self.accepted(self.connector.submit(&link, job, patience).await?)? {
            Value::Int(1) => Ok(Released::Released),
            Value::Int(0) => Ok(Released::NotHeld),
            Value::Int(2) => Ok(Released::HeldByOther),
            other => Err(reply::unexpected(&other)),
        }
    }

    /// The answers of items that are all in range, in their order.
    async fn renew_all(&self, batches: &[&[Renewable<'_>]], asking: bool) -> Result<Vec<Result<Renewal>>> {
        let items = || batches.iter().copied().flatten();
        // One that comes to the end of its longest hold asks for little, and must not cost the others their answer.
        let longest = items().filter(|item| item.ttl > 0).map(|item| Duration::from_millis(item.ttl)).max();
        let deadline = self.deadline(longest);
        let link = self.connector.link(deadline).await?;
        let calls = |batches: &mut dyn Iterator<Item = &[Renewable<'_>]>, by| {
            batches.map(|batch| renew_call(&self.keyspace, batch, by)).collect::<Result<Vec<_>>>()
        };
        let send = |calls| self.connector.send_calls(&link, calls, asking, deadline);
        let mut answers = send(calls(&mut batches.iter().copied(), By::Digest)?).await?;
        if answers.iter().any(reply::is_unknown_script) {
            let unknown = batches.iter().zip(&answers).filter(|(_, answer)| reply::is_unknown_script(answer));
            let again = calls(&mut unknown.map(|(batch, _)| *batch), By::Text)?;
            let mut second = send(again).await?.into_iter();
            for answer in answers.iter_mut().filter(|answer| reply::is_unknown_script(answer)) {
                *answer = second.next().unwrap_or_default();
            }
        }
        let mut renewals = Vec::with_capacity(items().count());
        for (batch, answer) in batches.iter().zip(answers) {
            let lacks_right = |answer: &Value| match answer {
                Value::ServerError(error) => Refusal::of(error).is_lacking_right(),
                _ => false,
            };
            if batch.len() > 1 && lacks_right(&answer) {
                // Refused as a whole for one key that this user may not touch: it must not cost the others their lease.
                let singly = calls(&mut batch.chunks(1), By::Digest)?;
                let answers = send(singly).await?;
                renewals.extend(answers.into_iter().flat_map(|answer| self.renewals(1, answer)));
            } else {
                renewals.extend(self.renewals(batch.len(), answer));
            }
        }
        Ok(renewals)
    }

    fn renewals(&self, count: usize, answer: Value) -> Vec<Result<Renewal>> {
        match self.accepted(answer) {
            Ok(Value::Array(answers)) if answers.len() == count => {
                answers.into_iter().map(|answer| self.renewal(answer)).collect()
            }
            Ok(other) => vec![Err(reply::unexpected(&other)); count],
            Err(error) => vec![Err(error); count],
        }
    }

    fn renewal(&self, answer: Value) -> Result<Renewal> {
        match self.accepted(answer)? {
            Value::Int(-2) => Ok(Renewal::Lost),
            // Somebody took the key's expiry away; the lease that we rely on stays bounded.
            Value::Int(-1) => Ok(Renewal::Renewed(MOST_TTL)),
            Value::Int(left) => Ok(Renewal::Renewed(reply::remaining(left).unwrap_or_default())),
            other => Err(reply::unexpected(&other)),
        }
    }
}

/// How a claim is presented at a node of a cluster; as usual at one server.
#[derive(Clone, Copy, Debug, Default)]
struct How {
    /// Whether the slot is only on its way there.
    asking: bool,
    /// Whether the claim was presented at another node, so that it may stand in line already.
    again: bool,
}

/// What one item of a renewal needs.
#[derive(Debug)]
struct Renewable<'a> {
    held: &'a Held,
    keys: Keys<'a>,
    /// Milliseconds; 0 only confirms.
    ttl: u64,
}

fn checked_ttl(ttl: Duration) -> Result<u64> {
    if !(LEAST_TTL..=MOST_TTL).contains(&ttl) {
        return Err(Error::invalid(format!("a TTL of {ttl:?} is out of range: 10 ms to 366 days on Redis")));
    }
    Ok(u64::try_from(ttl.as_millis()).unwrap_or(u64::MAX))
}

fn newer_protocol(shown: &str) -> Error {
    Error::new(
        ErrorKind::Rejected,
        format!("the lock is held by a version of Leasehold whose protocol is unknown ({shown})"),
    )
    .advise("use the same version everywhere")
}

/// Writing into a command's memory cannot fail; the type says otherwise.
fn wrote<T>(result: std::io::Result<T>) -> Result<T> {
    result.map_err(|error| Error::invalid("the command could not be written").caused_by(error))
}

fn passing_on() -> Error {
    Error::new(ErrorKind::Unavailable, "the lock came when nobody waited for it, and is being passed on")
}

/// The entry of a claim in the line, as the script makes it.
fn entry(channel: &str, claim: &Claim, ttl: u64, since: &str) -> String {
    let lease = ttl.min(u64::try_from(HAND_OFF_TTL.as_millis()).unwrap_or(u64::MAX));
    format!("1 {} {channel} {lease} {} {since} {}", claim.id, claim.tokens.max(1), claim.record)
}

fn acquire_job(
    keys: &Keys<'_>,
    slot: u16,
    claim: &Claim,
    ttl: u64,
    attempt: Option<(&str, &Attempt)>,
) -> std::io::Result<Box<Job>> {
    let mut job =
        Box::new(Job::new(Verb::Acquire, keys.is_plain(), slot, 2 * keys.bound() + claim.record.len() + 160));
    job.push(|out| keys.write_lock(out))?;
    job.push(|out| keys.write_fence(out))?;
    job.push(|out| out.write_all(&owner(claim.id)))?;
    job.push(|out| out.write_all(claim.record.as_bytes()))?;
    job.push(|out| write!(out, "{ttl}"))?;
    job.push(|out| {
        let tokens = claim.tokens.max(1);
        if tokens > 1 || attempt.is_some() || claim.ballot.is_some() {
            write!(out, "{tokens}")?;
        }
        if let Some(ballot) = claim.ballot {
            write!(out, "@{ballot}")?;
        }
        let Some((channel, Attempt { number, window, again })) = attempt else { return Ok(()) };
        write!(out, " {channel} {} {number} ", window.as_millis())?;
        match claim.queue_limit {
            Some(limit) => write!(out, "{limit}")?,
            None => out.write_all(b"-")?,
        }
        if *again { out.write_all(b" a") } else { Ok(()) }
    })?;
    Ok(job)
}

fn release_job(
    keys: &Keys<'_>,
    slot: u16,
    held: &Held,
    forbid: bool,
    entry: Option<&str>,
) -> std::io::Result<Box<Job>> {
    let mut job = Box::new(Job::new(Verb::Release, keys.is_plain(), slot, 2 * keys.bound() + 40));
    job.push(|out| keys.write_lock(out))?;
    job.push(|out| keys.write_fence(out))?;
    job.push(|out| {
        out.write_all(&owner(held.id))?;
        if held.waiting {
            out.write_all(b"w")?;
        }
        if forbid {
            out.write_all(b"+")?;
        }
        entry.map_or(Ok(()), |entry| write!(out, " {entry}"))
    })?;
    Ok(job)
}

fn renew_call(keyspace: &Keyspace, batch: &[Renewable<'_>], by: By) -> Result<Cmd> {
    let bytes = batch.iter().map(|item| item.keys.bound() + 64).sum();
    // In a cluster the index is in a slot of its own, and written by a command of its own.
    let index = keyspace.index();
    let mut call =
        script::RENEW.call(by, batch.len() + usize::from(index.is_some()), 1 + 2 * batch.len(), bytes);
    for item in batch {
        wrote(item.keys.write_lock(&mut call.writer_for_next_arg()))?;
    }
    if let Some(index) = index {
        call.write_arg(index);
    }
    call.write_arg_fmt(keyspace.prefix().len());
    for item in batch {
        // With its token: a grant that was lost is not renewed by one that the same claim was given later.
        let mut out = call.writer_for_next_arg();
        wrote(out.write_all(&owner(item.held.id)))?;
        if let Some(token) = item.held.token {
            wrote(write!(out, "{token}:"))?;
        }
        drop(out);
        call.write_arg_fmt(item.ttl);
    }
    Ok(call)
}

#[async_trait]
impl Store for RedisStore {
    async fn acquire(&self, claim: &Claim) -> Result<Acquired> {
        self.acquire_once(claim, How::default())
            .await
            .map_err(|error| error.for_name(&claim.name).on_store(&self.connector.location))
    }

    async fn woken(&self, ticket: &Ticket) -> Woken {
        self.waiting.woken(ticket).await
    }

    async fn announce(&self, ticket: &Ticket, owner: &str) -> Result<()> {
        self.announce_wait(&ticket.name, owner)
            .await
            .map_err(|error| error.for_name(&ticket.name).on_store(&self.connector.location))
    }

    async fn renew(&self, held: &[Held]) -> Vec<Result<Renewal>> {
        let mut answers = Vec::with_capacity(held.len());
        let mut items = Vec::with_capacity(held.len());
        for held in held {
            let ttl = held.extend.map_or(Ok(0), checked_ttl);
            match ttl.and_then(|ttl| Ok(Renewable { held, keys: self.keyspace.keys(&held.name)?, ttl })) {
                Ok(item) => {
                    items.push(item);
                    answers.push(None);
                }
                Err(error) => answers.push(Some(Err(error))),
            }
        }
        let mut renewed = if items.is_empty() {
            Vec::new()
        } else {
            let batches: Vec<_> = items.chunks(BATCH).collect();
            self.renew_all(&batches, false).await.unwrap_or_else(|error| vec![Err(error); items.len()])
        }
        .into_iter();
        let missing = || Err(Error::new(ErrorKind::Unknown, "no answer for this lock"));
        let answers =
            answers.into_iter().map(|answer| answer.or_else(|| renewed.next()).unwrap_or_else(missing));
        let location = &self.connector.location;
        answers
            .zip(held)
            .map(|(answer, held)| answer.map_err(|error| error.for_name(&held.name).on_store(location)))
            .collect()
    }

    async fn release(&self, held: &Held) -> Result<Released> {
        self.release_once(held, false)
            .await
            .map_err(|error| error.for_name(&held.name).on_store(&self.connector.location))
    }

    async fn replicate(&self, held: &Held, wish: &Replication) -> Result<u32> {
        self.replicate_once(held, wish)
            .await
            .map_err(|error| error.for_name(&held.name).on_store(&self.connector.location))
    }

    async fn disturbed(&self) {
        self.connector.hub.disturbed().await;
    }

    async fn inspect(&self, query: &Query) -> Result<Page<LockView>> {
        self.look_at(query).await.map_err(|error| error.on_store(&self.connector.location))
    }

    fn guarantees(&self) -> Guarantees {
        self.guarantees.clone()
    }

    fn location(&self) -> Arc<str> {
        self.connector.location.clone()
    }

    async fn diagnose(&self) -> Vec<Finding> {
        self.findings().await
    }

    fn lifeline(&self) -> Option<Arc<File>> {
        None
    }
}
#[cfg(test)]
mod tests {
    use super::*;

    fn size<'a, F: Future>(_: impl FnOnce(&'a RedisStore, &'a Claim, &'a Held) -> F) -> usize {
        std::mem::size_of::<F>()
    }

    #[test]
    fn what_each_claim_allocates_is_small() {
        // Beyond a kilobyte the usual allocator has no quick way: it took a seventh of the callers' time.
        assert!(size(|store, claim, _| store.acquire_once(claim, How::default())) <= 1024);
        assert!(size(|store, _, held| store.release_once(held, false)) <= 1024);
    }
}
