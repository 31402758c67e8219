//! The waiters of this process: where each stands, what was sent for them and when, and the grants that were pushed.
//!
//! Pure bookkeeping; [`refresh`](super::refresh) sends what is due. A process counts as one voice: one command for each
//! lock keeps all its waiters in line.

use std::collections::{HashMap, HashSet, VecDeque};
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;

use crate::clock::{self, Instant, Now};
use crate::store::{Woken, alive_for, heard_every};
use crate::types::{Claim, ClaimId, FencingToken, Grant, Holder, Name, Ticket};

/// How long an attempt goes on.
const ATTEMPT_GRAIN: Duration = Duration::from_millis(1);
/// Presentations whose send time is remembered, for each lock.
const REMEMBERED: usize = 64;
/// Between the first in line and the last, how much later each place looks when the holder's time is up.
const PER_PLACE: Duration = Duration::from_millis(100);
/// What the server may take to let a key end, after its time.
const EXPIRY_GRAIN: Duration = Duration::from_millis(1);
/// How the first in line looks after a lock that ends without a message: another library's, or one that nobody has.
const FOREIGN_LEAST: Duration = Duration::from_millis(10);
const FOREIGN_MOST: Duration = Duration::from_millis(500);
/// How long it is remembered that an answer told of a grant before its message did. On one connection the message is
/// right behind: newer servers send those of a script after the script's answer.
const OVERTAKEN: Duration = Duration::from_secs(60);

/// All waiters of one store.
#[derive(Debug)]
pub(super) struct Waiting {
    /// The channel on which this process is called, and its name in every line.
    pub(super) channel: String,
    table: Mutex<Table>,
    /// Rung when something is due sooner than planned.
    pub(super) bell: Notify,
    /// Starts the task that serves.
    pub(super) starter: Starter,
}

/// What starts the task that serves the waiters; set once there is a store.
#[derive(Default)]
pub(super) struct Starter(OnceLock<Box<dyn Fn() + Send + Sync>>);

impl Starter {
    pub(super) fn set(&self, start: impl Fn() + Send + Sync + 'static) {
        let _ = self.0.set(Box::new(start));
    }

    fn get(&self) -> Option<&(dyn Fn() + Send + Sync)> {
        self.0.get().map(|start| &**start)
    }
}

impl fmt::Debug for Starter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Starter")
    }
}

#[derive(Debug, Default)]
struct Table {
    queues: HashMap<Name, Queue>,
    places: HashMap<ClaimId, Place>,
    /// Grants that came for claims which nobody waits for, until they are passed on.
    orphans: HashMap<ClaimId, Name>,
    /// Those of them that are still to be begun with.
    found: Vec<ClaimId>,
    /// Claims that an answer told of their grant, and when: the message of it, should it come yet, is no news.
    told: HashMap<ClaimId, Instant>,
    /// The newest connection: what comes late over an older one is only a hint.
    session: u64,
    /// Until when the task that serves sleeps; `None` if none runs.
    planned: Option<Instant>,
    /// The latest attempt, and a moment before anything of it was sent.
    attempt: Option<(u64, Now)>,
}

/// The waiters for one lock.
#[derive(Debug)]
struct Queue {
    claims: HashSet<ClaimId>,
    /// The shortest TTL among them.
    ttl: Duration,
    sent: VecDeque<(u64, Now)>,
    /// The latest attempt that was answered.
    answered: u64,
    due: Instant,
    in_flight: bool,
    foreign_wait: Duration,
}

/// One waiter.
#[derive(Debug)]
struct Place {
    ticket: Ticket,
    ttl: Duration,
    bell: Arc<Notify>,
    listeners: u32,
    /// When it was last presented by its own caller.
    heard: Instant,
    news: Option<News>,
    /// What stands in the line for it, if that is known.
    entry: Option<String>,
    /// Whether it was presented to wait more than once.
    again: bool,
    /// Whether nobody seems to wait for it any more. It is only remembered that it may stand in line: should its caller come
    /// back after all, it must not join a second time.
    dormant: bool,
}

#[derive(Debug)]
enum News {
    Granted(Grant, Now),
    Moved,
    Look,
}

impl Place {
    fn tell(&mut self, news: News) {
        // A grant is not to be forgotten over a change of place.
        if !matches!((&self.news, &news), (Some(News::Granted(..)), News::Moved | News::Look)) {
            self.news = Some(news);
        }
        self.bell.notify_one();
    }

    fn is_wanted(&self, now: Instant) -> bool {
        self.listeners > 0 || self.heard.plus(alive_for(self.ttl)) > now
    }
}

/// How one attempt is presented.
#[derive(Debug)]
pub(super) struct Attempt {
    pub(super) number: u64,
    /// For how long the process counts as alive by it.
    pub(super) window: Duration,
    /// Whether the claim may stand in line already.
    pub(super) again: bool,
}

/// What is due for one lock: a presentation of all its waiters.
#[derive(Debug)]
pub(super) struct Due {
    pub(super) name: Name,
    pub(super) attempt: Attempt,
    pub(super) sent: Now,
    pub(super) claims: Vec<ClaimId>,
    pub(super) ttl: Duration,
}

/// What a lock looked like when a presentation was answered.
#[derive(Debug)]
pub(super) struct Seen {
    pub(super) holder: Option<Holder>,
    pub(super) left: Option<Duration>,
    pub(super) session: u64,
}

/// What there is to do.
#[derive(Debug)]
pub(super) struct Work {
    pub(super) due: Vec<Due>,
    pub(super) orphans: Vec<(Name, ClaimId)>,
    /// When to look again.
    pub(super) next: Instant,
    pub(super) is_idle: bool,
}

impl Waiting {
    /// `kind` is `push`, or `node` where messages go to all nodes of a cluster: the scripts tell them apart by it.
    pub(super) fn new(kind: &str) -> Self {
        Self {
            channel: format!("leasehold:{kind}:{}", clock::claim_id()),
            table: Mutex::default(),
            bell: Notify::new(),
            starter: Starter::default(),
        }
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes that a claim is about to be presented, to wait in line if need be. `None` if its grant came when nobody
    /// waited for it, and is being passed on just now: that must have ended first.
    pub(super) fn present(&self, claim: &Claim, again: bool) -> Option<Attempt> {
        let sent = clock::look();
        let mut table = self.table();
        let (number, sent) = table.attempt(sent, ATTEMPT_GRAIN);
        if table.orphans.contains_key(&claim.id) {
            return None;
        }
        // What it is told from now on is news again.
        table.told.remove(&claim.id);
        let queue = table.queues.entry(claim.name.clone()).or_insert_with(|| Queue {
            claims: HashSet::new(),
            ttl: claim.ttl,
            sent: VecDeque::new(),
            answered: 0,
            due: sent.boot.plus(heard_every(claim.ttl)),
            in_flight: false,
            foreign_wait: FOREIGN_LEAST,
        });
        queue.claims.insert(claim.id);
        queue.ttl = queue.ttl.min(claim.ttl);
        // By this presentation the whole process counts as alive for a shorter time, if its TTL is shorter.
        queue.due = queue.due.min(sent.boot.plus(heard_every(queue.ttl)));
        queue.remember(number, sent);
        let window = alive_for(queue.ttl);
        let again = again || table.places.contains_key(&claim.id);
        let place = table.places.entry(claim.id).or_insert_with(|| Place {
            ticket: Ticket::new(claim),
            ttl: claim.ttl,
            bell: Arc::default(),
            listeners: 0,
            heard: sent.boot,
            news: None,
            entry: None,
            again: false,
            dormant: false,
        });
        place.dormant = false;
        place.heard = sent.boot;
        place.again = again;
        // Should the answer get lost, it may stand there by another entry.
        place.entry = None;
        if !matches!(place.news, Some(News::Granted(..))) {
            place.news = None;
        }
        Some(Attempt { number, window, again })
    }

    /// Takes in that a presented claim waits in line.
    pub(super) fn queued(
        &self,
        claim: &Claim,
        attempt: &Attempt,
        ahead: u64,
        entry: String,
        seen: &Seen,
    ) -> Ticket {
        let now = clock::now();
        let mut table = self.table();
        let ticket = Ticket::new(claim).with_session(seen.session).with_ahead(ahead);
        let ticket = ticket.with_holder(seen.holder.clone());
        if let Some(place) = table.places.get_mut(&claim.id) {
            place.ticket = ticket.clone();
            place.entry = Some(entry);
        }
        if let Some(queue) = table.queues.get_mut(&claim.name) {
            queue.answered = queue.answered.max(attempt.number);
            let looks = queue.looks_again(now, ahead, seen);
            queue.due = queue.due.min(looks);
        }
        self.plan(&mut table, &claim.name);
        ticket
    }

    /// Takes in that nobody knows whether a claim stands in line: it is to ask at once. Its presentation belongs to no
    /// connection that is still good.
    pub(super) fn unsure(&self, claim: &Claim) -> Ticket {
        if let Some(place) = self.table().places.get_mut(&claim.id) {
            place.tell(News::Look);
        }
        Ticket::new(claim)
    }

    /// What stands in the line for a claim, if that is known.
    pub(super) fn entry(&self, id: ClaimId) -> Option<String> {
        self.table().places.get_mut(&id)?.entry.take()
    }

    /// Whether a claim was presented to wait before, so that it may stand in line.
    pub(super) fn knows(&self, id: ClaimId) -> bool {
        self.table().places.contains_key(&id)
    }

    /// Starts the serving, unless it goes on already.
    fn start(&self, table: &mut Table) {
        if table.planned.is_none() {
            table.planned = Some(Instant::since_boot(Duration::ZERO));
            if let Some(start) = self.starter.get() {
                start();
            }
        }
    }

    /// Rings if a lock is due sooner than planned.
    fn plan(&self, table: &mut Table, name: &Name) {
        let Some(due) = table.queues.get(name).map(|queue| queue.due) else { return };
        self.start(table);
        if table.planned.is_some_and(|planned| due < planned) {
            table.planned = Some(due);
            self.bell.notify_one();
        }
    }

    /// Forgets a claim: it waits no more, or holds the lock.
    pub(super) fn forget(&self, id: ClaimId) {
        drop(self.table().remove(id));
    }

    /// How much is remembered of claims that wait, or waited.
    pub(super) fn remembered(&self) -> usize {
        let table = self.table();
        table.places.len() + table.queues.len() + table.orphans.len() + table.found.len() + table.told.len()
    }

    /// An answer told a claim that it has the lock: a message of that, should it come yet, is no news.
    pub(super) fn granted(&self, id: ClaimId) {
        let mut table = self.table();
        // Only one that may have stood in line before can have been sent one.
        if table.remove(id).is_some_and(|place| place.again) {
            table.told.insert(id, clock::now());
        }
    }

    /// There is a new connection: those who wait are to be called over it from now on. Of the one before perhaps nobody
    /// said that it broke.
    pub(super) fn connected(&self, session: u64) {
        let mut table = self.table();
        table.session = session;
        // Messages over the one before are only hints, and one over this is news: it may come from another server.
        table.told.clear();
        self.hasten(&mut table);
    }

    /// Takes in a message that came over this connection: a grant.
    pub(super) fn pushed(&self, prefix: &[u8], session: u64, message: &[u8]) {
        let Some(push) = Push::read(prefix, message) else {
            return tracing::debug!("a message of an unknown version came and was left alone");
        };
        let now = clock::now();
        let mut table = self.table();
        if session != table.session {
            // What became of the claim may have been told over the newer one already: it may be held, and in use.
            if let Some(queue) = table.queues.get_mut(&push.name) {
                queue.due = now;
            }
            return self.plan(&mut table, &push.name);
        }
        if table.told.remove(&push.id).is_some() {
            return;
        }
        let is_news = table.places.get(&push.id).is_some_and(|place| place.is_wanted(now));
        if !is_news {
            if let Some(place) = table.places.get_mut(&push.id) {
                place.dormant = true;
            }
            if let Some(queue) = table.queues.get_mut(&push.name) {
                queue.claims.remove(&push.id);
            }
            table.found.push(push.id);
            table.orphans.insert(push.id, push.name);
            self.bell.notify_one();
            return self.start(&mut table);
        }
        let Some(queue) = table.queues.get_mut(&push.name) else { return };
        let sent = queue.sent.iter().rev().find(|(number, _)| *number == push.attempt).map(|(_, sent)| *sent);
        // Too old to be sure, or too little of it left: asked again, which is a presentation of a known age.
        let sent = sent.filter(|sent| push.attempt >= queue.answered && now.since(sent.boot) < push.ttl / 2);
        let Some(sent) = sent else {
            queue.due = now;
            return self.plan(&mut table, &push.name);
        };
        if let Some(place) = table.places.get_mut(&push.id) {
            let grant = Grant { token: push.token, ttl: push.ttl, session: place.ticket.session };
            place.tell(News::Granted(grant, sent));
        }
    }

    /// The connection broke: messages may be lost, and everybody's place must be confirmed on the next.
    /// False if it was none that messages come over: then it concerns nobody else.
    pub(super) fn disconnected(&self, session: u64) -> bool {
        let mut table = self.table();
        let is_ours = session == table.session;
        if is_ours {
            self.hasten(&mut table);
        }
        is_ours
    }

    /// Has everybody asked for at once: slots moved.
    pub(super) fn recall(&self) {
        self.hasten(&mut self.table());
    }

    /// Has everybody asked for at once.
    fn hasten(&self, table: &mut Table) {
        let now = clock::now();
        table.queues.values_mut().for_each(|queue| queue.due = now);
        if table.planned.is_some() && !table.queues.is_empty() {
            table.planned = Some(now);
            self.bell.notify_one();
        }
    }

    /// Waits for news of a claim.
    pub(super) async fn woken(&self, ticket: &Ticket) -> Woken {
        let bell = {
            let mut table = self.table();
            let Some(place) = table.places.get_mut(&ticket.id) else { return Woken::Look };
            if place.dormant {
                return Woken::Look;
            }
            place.listeners += 1;
            place.bell.clone()
        };
        let _listening = Listening { waiting: self, id: ticket.id };
        loop {
            if let Some(woken) = self.news(ticket.id) {
                return woken;
            }
            bell.notified().await;
        }
    }

    fn news(&self, id: ClaimId) -> Option<Woken> {
        let mut table = self.table();
        let Some(place) = table.places.get_mut(&id) else { return Some(Woken::Look) };
        match place.news.take()? {
            News::Granted(grant, sent) => {
                table.remove(id);
                Some(Woken::Granted { grant, sent })
            }
            News::Moved => Some(Woken::Waiting(place.ticket.clone())),
            News::Look => Some(Woken::Look),
        }
    }

    /// What is due now. The caller serves until it is told that there is nothing at all to serve.
    pub(super) fn collect(&self) -> Work {
        let sent = clock::look();
        let now = sent.boot;
        let mut guard = self.table();
        let table = &mut *guard;
        let (number, sent) = table.attempt(sent, Duration::ZERO);
        let mut due = Vec::new();
        for (name, queue) in &mut table.queues {
            if queue.due > now || queue.in_flight {
                continue;
            }
            // Those that nobody waits for any more are not kept in line.
            let mut gone = Vec::new();
            queue.claims.retain(|id| {
                let wanted = table.places.get(id).is_some_and(|place| place.is_wanted(now));
                if !wanted {
                    gone.push(*id);
                }
                wanted
            });
            for id in gone {
                let Some(place) = table.places.get_mut(&id) else { continue };
                place.dormant = true;
                if let Some(News::Granted(..)) = place.news.take() {
                    table.found.push(id);
                    table.orphans.insert(id, name.clone());
                }
            }
            if queue.claims.is_empty() {
                continue;
            }
            queue.ttl = queue
                .claims
                .iter()
                .filter_map(|id| table.places.get(id))
                .map(|place| place.ttl)
                .min()
                .unwrap_or(queue.ttl);
            queue.due = now.plus(heard_every(queue.ttl));
            queue.in_flight = true;
            let attempt = Attempt { number, window: alive_for(queue.ttl), again: true };
            queue.remember(attempt.number, sent);
            let claims = queue.claims.iter().copied().collect();
            due.push(Due { name: name.clone(), attempt, sent, claims, ttl: queue.ttl });
        }
        table.queues.retain(|_, queue| !queue.claims.is_empty());
        table.told.retain(|_, told| now.since(*told) < OVERTAKEN);
        let orphans = std::mem::take(&mut table.found).into_iter();
        let orphans: Vec<_> = orphans.filter_map(|id| Some((table.orphans.get(&id)?.clone(), id))).collect();
        let next = table.queues.values().filter(|queue| !queue.in_flight).map(|queue| queue.due).min();
        let next = next.unwrap_or(Instant::FAR);
        let is_idle = table.is_idle();
        table.planned = Some(next);
        Work { due, orphans, next, is_idle }
    }

    /// A grant that nobody waited for was passed on, as far as that could be done.
    pub(super) fn passed_on(&self, id: ClaimId) {
        self.table().orphans.remove(&id);
        self.bell.notify_one();
    }

    /// Ends the serving, unless somebody came meanwhile.
    pub(super) fn retire(&self) -> bool {
        let mut table = self.table();
        let is_idle = table.is_idle();
        if is_idle {
            table.planned = None;
        }
        is_idle
    }

    /// Takes in the answer to what was due: where each claim stands, -1 for not in line.
    pub(super) fn answered(&self, due: &Due, ranks: &[i64], holding: Option<(ClaimId, Grant)>, seen: &Seen) {
        let now = clock::now();
        let mut guard = self.table();
        let table = &mut *guard;
        let mut first = u64::MAX;
        for (id, rank) in due.claims.iter().zip(ranks) {
            let Some(place) = table.places.get_mut(id) else { continue };
            match (u64::try_from(*rank), holding) {
                (_, Some((holder, grant))) if holder == *id => {
                    // It was handed the lock, and the message got lost; or is still under way.
                    if !matches!(place.news, Some(News::Granted(..))) {
                        table.told.insert(*id, now);
                        place.tell(News::Granted(grant, due.sent));
                    }
                }
                (Ok(ahead), _) => {
                    first = first.min(ahead);
                    if place.ticket.ahead() != Some(ahead) {
                        let ticket = place.ticket.clone().with_ahead(ahead).with_holder(seen.holder.clone());
                        place.ticket = ticket;
                        place.tell(News::Moved);
                    }
                }
                (Err(_), _) => place.tell(News::Look),
            }
        }
        if let Some(queue) = table.queues.get_mut(&due.name) {
            queue.in_flight = false;
            queue.answered = queue.answered.max(due.attempt.number);
            queue.due = queue.due.min(queue.looks_again(now, first, seen));
        }
        self.plan(table, &due.name);
    }

    /// Takes in that no answer came: everybody finds out for itself, as if it had just come.
    pub(super) fn failed(&self, due: &Due) {
        let mut guard = self.table();
        let table = &mut *guard;
        for id in &due.claims {
            if let Some(place) = table.places.get_mut(id) {
                place.tell(News::Look);
            }
        }
        if let Some(queue) = table.queues.get_mut(&due.name) {
            queue.in_flight = false;
        }
        self.plan(table, &due.name);
    }
}

impl Table {
    /// The number of an attempt sent at `sent`: the latest one's, if that began within `grain` before. What goes together
    /// then reads alike; that its leases count from a little earlier costs nothing.
    fn attempt(&mut self, sent: Now, grain: Duration) -> (u64, Now) {
        match self.attempt {
            Some((number, began)) if sent.boot.since(began.boot) < grain => (number, began),
            latest => *self.attempt.insert((latest.map_or(1, |(number, _)| number + 1), sent)),
        }
    }

    fn is_idle(&self) -> bool {
        self.queues.is_empty() && self.orphans.is_empty() && self.places.values().all(|place| place.dormant)
    }

    fn remove(&mut self, id: ClaimId) -> Option<Place> {
        let place = self.places.remove(&id)?;
        let name = &place.ticket.name;
        if let Some(queue) = self.queues.get_mut(name) {
            queue.claims.remove(&id);
            if queue.claims.is_empty() && !queue.in_flight {
                self.queues.remove(name);
            }
        }
        Some(place)
    }
}

impl Queue {
    fn remember(&mut self, number: u64, sent: Now) {
        if self.sent.back().is_some_and(|(latest, _)| *latest == number) {
            return;
        }
        self.sent.push_back((number, sent));
        if self.sent.len() > REMEMBERED {
            self.sent.pop_front();
        }
    }

    /// When the first of ours, with so many ahead, has reason to look, apart from being heard of.
    fn looks_again(&mut self, now: Instant, ahead: u64, seen: &Seen) -> Instant {
        let is_foreign = seen.holder.as_ref().is_none_or(|holder| holder.id.is_none());
        if is_foreign && ahead == 0 {
            let wait = self.foreign_wait;
            self.foreign_wait = (wait * 2).min(FOREIGN_MOST);
            let ends = seen.left.map_or(Duration::MAX, |left| left + EXPIRY_GRAIN);
            return now.plus((wait / 2 + clock::jitter(wait / 2)).min(ends));
        }
        self.foreign_wait = FOREIGN_LEAST;
        // Whoever comes later looks later: the first one's look is the only one that a dead holder costs.
        let place = u32::try_from(ahead).unwrap_or(u32::MAX);
        seen.left
            .map_or(Instant::FAR, |left| now.plus(left + EXPIRY_GRAIN).plus(PER_PLACE.saturating_mul(place)))
    }
}

/// A task that waits for news of a claim.
struct Listening<'a> {
    waiting: &'a Waiting,
    id: ClaimId,
}

impl Drop for Listening<'_> {
    fn drop(&mut self) {
        if let Some(place) = self.waiting.table().places.get_mut(&self.id) {
            place.listeners -= 1;
            place.heard = clock::now();
        }
    }
}

/// A message: `1 <claim> <token> <ttl ms> <attempt> <lock>`.
#[derive(Debug, PartialEq, Eq)]
struct Push {
    id: ClaimId,
    token: FencingToken,
    ttl: Duration,
    attempt: u64,
    name: Name,
}

impl Push {
    fn read(prefix: &[u8], message: &[u8]) -> Option<Self> {
        let mut parts = message.splitn(6, |byte| *byte == b' ');
        let mut text = || std::str::from_utf8(parts.next()?).ok();
        if text()? != "1" {
            return None;
        }
        let id = ClaimId::parse(text()?)?;
        let token = FencingToken::new(text()?.parse().ok()?);
        let ttl = Duration::from_millis(text()?.parse().ok()?);
        let attempt = text()?.parse().ok()?;
        let name = Name::new(parts.next()?.strip_prefix(prefix)?).ok()?;
        Some(Self { id, token, ttl, attempt, name })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_grant_over_a_new_connection_is_news_whatever_the_one_before_told() {
        let waiting = Waiting::new("push");
        let claim = Claim::new(Name::new("a").unwrap(), clock::claim_id(), Duration::from_secs(30));
        let grant = format!("1 {} 7 30000 1 a", claim.id);
        let told_by_an_answer = |session| {
            waiting.connected(session);
            waiting.present(&claim, false).unwrap();
            waiting.present(&claim, true).unwrap();
            waiting.granted(claim.id);
        };
        told_by_an_answer(1);
        waiting.pushed(b"", 1, grant.as_bytes());
        assert_eq!(waiting.remembered(), 0, "the answer came first, and the message is no news");
        told_by_an_answer(2);
        // Another server, which still had it in line.
        waiting.connected(3);
        waiting.pushed(b"", 3, grant.as_bytes());
        assert_eq!(waiting.collect().orphans, [(claim.name.clone(), claim.id)], "it is passed on");
    }
}
