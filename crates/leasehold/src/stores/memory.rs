//! The reference store: one process, and the strictest. On demand it does the worst that the contract allows.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::fs::File;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::Notify;

use crate::clock::{self, Instant, Now};
use crate::error::{Error, ErrorKind, Result};
use crate::store::{HAND_OFF_TTL, Store, Woken, alive_for, check_ttl};
use crate::types::{
    Acquired, Claim, ClaimId, Fencing, FencingToken, Finding, Grant, Guarantees, Held, Holder, LockView,
    Name, Page, Persistence, Query, Record, Released, Renewal, Severity, Ticket, Waiter, ballot_over,
};

/// A verb of the store, to aim a fault at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[expect(missing_docs, reason = "the verbs of `Store`, by name")]
pub enum Verb {
    Acquire,
    Renew,
    Release,
}

/// What goes wrong with one call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The request gets lost: nothing is done, and the caller hears nothing.
    LoseRequest,
    /// The request is done, and the answer gets lost.
    LoseReply,
    /// The caller hears nothing; the request is done when [`MemoryStore::deliver_late`] is called.
    Late,
    /// The store says at once that it cannot be reached.
    Refuse,
}

/// Locks in the memory of this process, for tests and as the reference of the contract.
///
/// Each `MemoryStore` is a store of its own; share it in an `Arc`. Tokens grow within its life only.
#[derive(Debug)]
pub struct MemoryStore {
    state: Mutex<State>,
    location: Arc<str>,
}

#[derive(Debug, Default)]
struct State {
    locks: BTreeMap<Name, Entry>,
    gone: HashMap<ClaimId, Instant>,
    faults: HashMap<Verb, VecDeque<Fault>>,
    late: Vec<Late>,
    grant_at_most: Option<Duration>,
    calls: HashMap<Verb, u64>,
}

#[derive(Debug)]
enum Late {
    Acquire(Claim),
    Renew(Held),
    Release(Held),
}

#[derive(Debug, Default)]
struct Entry {
    last_token: u64,
    hold: Option<Hold>,
    line: VecDeque<Place>,
}

#[derive(Debug)]
struct Hold {
    id: ClaimId,
    token: FencingToken,
    until: Instant,
    since: Duration,
    record: Arc<str>,
    /// What was granted, and when the claim had last been presented by then.
    ttl: Duration,
    sent: Now,
}

/// A place in line.
#[derive(Debug)]
struct Place {
    claim: Claim,
    since: Duration,
    /// When the claim was last presented.
    heard: Now,
    /// Waits for this claim, as long as somebody does.
    bell: Arc<Notify>,
}

impl Place {
    /// Whether anybody may still be there to take the lock.
    fn is_alive(&self, now: Instant) -> bool {
        Arc::strong_count(&self.bell) > 1 || self.heard.boot.plus(alive_for(self.claim.ttl)) > now
    }
}

impl Default for MemoryStore {
    fn default() -> Self {
        Self::new()
    }
}

impl MemoryStore {
    /// An empty store.
    pub fn new() -> Self {
        Self { state: Mutex::default(), location: Arc::from("memory:") }
    }

    /// Makes the next calls of `verb` go wrong, one fault each, in order.
    pub fn inject(&self, verb: Verb, faults: impl IntoIterator<Item = Fault>) {
        self.state().faults.entry(verb).or_default().extend(faults);
    }

    /// Does what [`Fault::Late`] held back, in the order it was sent.
    pub fn deliver_late(&self) {
        let mut state = self.state();
        for late in std::mem::take(&mut state.late) {
            match late {
                Late::Acquire(claim) => drop(state.acquire(&claim)),
                Late::Renew(held) => drop(state.renew(&held)),
                Late::Release(held) => drop(state.release(&held)),
            }
        }
    }

    /// Grants and renews for no longer than this, whatever is asked.
    pub fn grant_at_most(&self, ttl: Duration) {
        self.state().grant_at_most = Some(ttl);
    }

    /// Forgets every lock and token, as a server does that lost its data.
    pub fn forget_everything(&self) {
        self.state().locks.clear();
    }

    /// How often `verb` was called.
    pub fn calls(&self, verb: Verb) -> u64 {
        self.state().calls.get(&verb).copied().unwrap_or(0)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn unknown(&self, name: &Name) -> Error {
        Error::new(ErrorKind::Unknown, "the answer got lost").on_store(&self.location).for_name(name)
    }

    /// One call of `verb`: `work` is what it does, `late` how to do it later.
    fn call<T>(
        &self,
        verb: Verb,
        name: &Name,
        late: impl FnOnce() -> Late,
        work: impl FnOnce(&mut State) -> Result<T>,
    ) -> Result<T> {
        let mut state = self.state();
        *state.calls.entry(verb).or_default() += 1;
        match state.faults.get_mut(&verb).and_then(VecDeque::pop_front) {
            None => work(&mut state),
            Some(Fault::LoseRequest) => Err(self.unknown(name)),
            Some(Fault::LoseReply) => {
                let _lost = work(&mut state);
                Err(self.unknown(name))
            }
            Some(Fault::Late) => {
                state.late.push(late());
                Err(self.unknown(name))
            }
            Some(Fault::Refuse) => Err(Error::new(ErrorKind::Unavailable, "the store cannot be reached")
                .on_store(&self.location)
                .for_name(name)),
        }
    }
}

impl State {
    fn granted(&self, asked: Duration) -> Duration {
        self.grant_at_most.map_or(asked, |most| asked.min(most))
    }

    /// The hold of `name`, if it has not ended.
    fn live(&mut self, name: &Name) -> Option<&mut Hold> {
        let now = clock::now();
        self.locks.get_mut(name)?.hold.as_mut().filter(|hold| hold.until > now)
    }

    fn acquire(&mut self, claim: &Claim) -> Result<Acquired> {
        let now = clock::look();
        self.gone.retain(|_, until| *until > now.boot);
        self.advance(&claim.name, Some(claim), now);
        let last = self.locks.get(&claim.name).map_or(0, |entry| entry.last_token);
        if self.live(&claim.name).is_some_and(|hold| hold.id == claim.id)
            && let Some(ballot) = ballot_over(claim, last, now.wall)
        {
            self.raise(claim, ballot);
        }
        if let Some(hold) = self.live(&claim.name) {
            if hold.id == claim.id {
                let ttl = hold.until.since(now.boot);
                return Ok(Acquired::Granted(Grant { token: hold.token, ttl, session: 0 }));
            }
            let holder = hold.view(now.boot);
            return if claim.queue { self.line_up(claim, holder, now) } else { Ok(Acquired::Busy(holder)) };
        }
        self.refuse_the_gone(claim)?;
        Ok(Acquired::Granted(self.grant(claim, claim.ttl, now)))
    }

    /// Makes what the claim proposes the token of its hold.
    fn raise(&mut self, claim: &Claim, ballot: FencingToken) {
        let Some(entry) = self.locks.get_mut(&claim.name) else { return };
        entry.last_token = ballot.get() + u64::from(claim.tokens.max(1)) - 1;
        if let Some(hold) = &mut entry.hold {
            hold.token = ballot;
        }
    }

    fn refuse_the_gone(&self, claim: &Claim) -> Result<()> {
        if !self.gone.contains_key(&claim.id) {
            return Ok(());
        }
        let what = "this claim was withdrawn before its request arrived";
        Err(Error::new(ErrorKind::Rejected, what).for_name(&claim.name))
    }

    fn grant(&mut self, claim: &Claim, ttl: Duration, sent: Now) -> Grant {
        let ttl = self.granted(ttl);
        let entry = self.locks.entry(claim.name.clone()).or_default();
        let micros = u64::try_from(clock::wall().as_micros()).unwrap_or(FencingToken::MAX);
        let usual = (entry.last_token + 1).max(micros).min(FencingToken::MAX);
        let first = ballot_over(claim, entry.last_token, clock::wall()).map_or(usual, FencingToken::get);
        entry.last_token = (first + u64::from(claim.tokens.max(1)) - 1).min(FencingToken::MAX);
        let token = FencingToken::new(first);
        let (until, since) = (clock::now().plus(ttl), clock::wall());
        entry.hold =
            Some(Hold { id: claim.id, token, until, since, record: claim.record.clone(), ttl, sent });
        Grant { token, ttl, session: 0 }
    }

    fn line_up(&mut self, claim: &Claim, holder: Holder, now: Now) -> Result<Acquired> {
        self.refuse_the_gone(claim)?;
        let line = &mut self.locks.entry(claim.name.clone()).or_default().line;
        let ahead = match line.iter_mut().position(|place| place.claim.id == claim.id) {
            Some(ahead) => {
                line[ahead].heard = now;
                ahead
            }
            None if claim.queue_limit.is_some_and(|limit| line.len() >= limit as usize) => {
                return Err(Error::new(
                    ErrorKind::QueueFull,
                    format!("{} wait in line already, as many as this mutex allows", line.len()),
                )
                .for_name(&claim.name));
            }
            None => {
                let (claim, bell) = (claim.clone(), Arc::default());
                line.push_back(Place { claim, since: now.wall, heard: now, bell });
                line.len() - 1
            }
        };
        Ok(Acquired::Queued(Ticket::new(claim).with_ahead(ahead as u64).with_holder(Some(holder))))
    }

    /// Hands the lock, if it is free, to the first in line who lives. `asking` lives for certain.
    fn advance(&mut self, name: &Name, asking: Option<&Claim>, now: Now) {
        if self.live(name).is_some() {
            return;
        }
        let Some(entry) = self.locks.get_mut(name) else { return };
        entry.hold = None;
        while let Some(place) = entry.line.pop_front() {
            if asking.is_none_or(|asking| asking.id != place.claim.id) && !place.is_alive(now.boot) {
                continue;
            }
            self.grant(&place.claim, place.claim.ttl.min(HAND_OFF_TTL), place.heard);
            place.bell.notify_one();
            return;
        }
    }

    fn renew(&mut self, held: &Held) -> Renewal {
        let now = clock::now();
        let extension = held.extend.map(|ttl| self.granted(ttl));
        let Some(hold) = self
            .live(&held.name)
            .filter(|hold| hold.id == held.id && held.token.is_none_or(|token| token == hold.token))
        else {
            return Renewal::Lost;
        };
        if let Some(ttl) = extension {
            hold.until = hold.until.max(now.plus(ttl));
        }
        Renewal::Renewed(hold.until.since(now))
    }

    fn release(&mut self, held: &Held) -> Released {
        let now = clock::look();
        if held.suspect {
            self.gone.insert(held.id, now.boot.plus(Duration::from_secs(3600)));
        }
        if held.waiting
            && let Some(entry) = self.locks.get_mut(&held.name)
        {
            entry.line.retain(|place| place.claim.id != held.id);
        }
        match self.live(&held.name) {
            None => Released::NotHeld,
            Some(hold) if hold.id != held.id => Released::HeldByOther,
            Some(_) => {
                if let Some(entry) = self.locks.get_mut(&held.name) {
                    entry.hold = None;
                }
                self.advance(&held.name, None, now);
                Released::Released
            }
        }
    }
}

impl Hold {
    fn view(&self, now: Instant) -> Holder {
        Holder {
            id: Some(self.id),
            token: Some(self.token),
            remaining: Some(self.until.since(now)),
            since_unix_micros: u64::try_from(self.since.as_micros()).ok(),
            record: Record::decode(self.record.as_bytes()),
            foreign: None,
        }
    }
}

impl Entry {
    fn view(&self, name: &Name, now: Instant) -> LockView {
        LockView {
            name: name.clone(),
            holder: self.hold.as_ref().filter(|hold| hold.until > now).map(|hold| hold.view(now)),
            last_token: Some(FencingToken::new(self.last_token)),
            waiters: self.line.len() as u64,
            queue: self.line.iter().map(Place::view).collect(),
        }
    }
}

impl Place {
    fn view(&self) -> Waiter {
        let since = u64::try_from(self.since.as_micros()).ok();
        Waiter::new(self.claim.id, since, Record::decode(self.claim.record.as_bytes()))
    }

    fn belongs_to(&self, owner: &str) -> bool {
        Record::decode(self.claim.record.as_bytes()).and_then(|record| record.owner).as_deref() == Some(owner)
    }
}

#[async_trait]
impl Store for MemoryStore {
    async fn acquire(&self, claim: &Claim) -> Result<Acquired> {
        check_ttl(&self.guarantees(), claim.ttl).map_err(|error| error.on_store(&self.location))?;
        self.call(Verb::Acquire, &claim.name, || Late::Acquire(claim.clone()), |state| state.acquire(claim))
    }

    async fn woken(&self, ticket: &Ticket) -> Woken {
        let bell = {
            let mut state = self.state();
            let line = state.locks.get_mut(&ticket.name).map(|entry| &mut entry.line);
            line.and_then(|line| line.iter().find(|place| place.claim.id == ticket.id))
                .map(|place| place.bell.clone())
        };
        if let Some(bell) = bell {
            // As early as the contract allows: at any time.
            let early = clock::now().plus(clock::jitter(Duration::from_millis(20)));
            let _ = clock::timeout_at(early, bell.notified()).await;
        }
        match self.state().live(&ticket.name).filter(|hold| hold.id == ticket.id) {
            Some(hold) => {
                let grant = Grant { token: hold.token, ttl: hold.ttl, session: 0 };
                Woken::Granted { grant, sent: hold.sent }
            }
            None => Woken::Look,
        }
    }

    async fn renew(&self, held: &[Held]) -> Vec<Result<Renewal>> {
        held.iter()
            .map(|held| {
                self.call(
                    Verb::Renew,
                    &held.name,
                    || Late::Renew(held.clone()),
                    |state| Ok(state.renew(held)),
                )
            })
            .collect()
    }

    async fn release(&self, held: &Held) -> Result<Released> {
        self.call(Verb::Release, &held.name, || Late::Release(held.clone()), |state| Ok(state.release(held)))
    }

    async fn inspect(&self, query: &Query) -> Result<Page<LockView>> {
        let state = self.state();
        let now = clock::now();
        let (prefix, after, limit) = match query {
            Query::One(name) => {
                let view = state.locks.get(name).map(|entry| entry.view(name, now));
                return Ok(Page {
                    items: vec![view.unwrap_or_else(|| LockView::free(name.clone()))],
                    next: None,
                });
            }
            Query::Waits { owner } => {
                let own = |entry: &Entry| {
                    entry.line.iter().filter(|place| place.belongs_to(owner)).map(Place::view).collect()
                };
                let views = state
                    .locks
                    .iter()
                    .map(|(name, entry)| LockView { queue: own(entry), ..entry.view(name, now) });
                let items = views.filter(|view| !view.queue.is_empty()).collect();
                return Ok(Page { items, next: None });
            }
            Query::Prefix { prefix, after, limit } => (prefix, after, (*limit).max(1)),
        };
        let mut items: Vec<LockView> = state
            .locks
            .iter()
            .filter(|(name, _)| {
                name.as_bytes().starts_with(prefix) && after.as_ref().is_none_or(|after| *name > after)
            })
            .map(|(name, entry)| LockView { queue: Vec::new(), ..entry.view(name, now) })
            .filter(|view| view.holder.is_some())
            .take(limit.saturating_add(1))
            .collect();
        let more = items.len() > limit;
        items.truncate(limit);
        let next = items.last().filter(|_| more).map(|view| view.name.clone());
        Ok(Page { items, next })
    }

    fn guarantees(&self) -> Guarantees {
        let mut guarantees = Guarantees::strict("memory");
        guarantees.fencing = Fencing::Process;
        guarantees.persistence = Persistence::None;
        guarantees.fifo = true;
        guarantees
    }

    fn location(&self) -> Arc<str> {
        self.location.clone()
    }

    async fn diagnose(&self) -> Vec<Finding> {
        vec![Finding::new(
            "store",
            Severity::Warning,
            "locks in the memory of this process",
            "nobody outside of this process is excluded: for tests only",
        )]
    }

    fn lifeline(&self) -> Option<Arc<File>> {
        None
    }
}
