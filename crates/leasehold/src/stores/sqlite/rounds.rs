//! The rounds that a store makes for those who wait through it: keeps their places alive, finds what was handed to them,
//! and hands on a lock whose holder died or let it expire.
//!
//! They are made on the store's own thread, when the bell rings, when an alarm of the clock is due, and never while nobody
//! waits. All waiters together cost one write in three seconds, and ten times a second a look at whether a few processes
//! before them still live, which touches no database.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::future::Future;
use std::pin::Pin;
use std::sync::mpsc::Sender;
use std::sync::{Arc, Weak};
use std::task::{Context, Poll, Wake, Waker};
use std::time::Duration;

use rusqlite::OptionalExtension;

use super::bell::{self, Bell};
use super::database::{Database, execute, failure};
use super::lifeline::{Life, LifelineId};
use super::line::Handed;
use super::room::{Lane, Waiting};
use super::verbs::{Hold, LOCK_COLUMNS, Lock};
use super::worker::Job;
use crate::clock::{self, Instant, Now, Sleep};
use crate::error::Result;
use crate::store::{HAND_OFF_TTL, heard_every};
use crate::types::{Acquired, Claim, ClaimId, Grant, Held, Name, Released, Ticket};

/// How long after a claim joined a line its surroundings are looked at; most waits are over by then.
const SETTLE: Duration = Duration::from_millis(50);
/// How often the processes before ours are looked at.
const WATCH: Duration = Duration::from_millis(100);
/// How many places from the head others are watched: were the first ones to be dead or stopped, these step in.
const WATCHERS: usize = 8;
/// By how much later each place looks whether the lease before it has ended.
const STAGGER: Duration = Duration::from_millis(20);
/// The bell hangs on for so long when nobody waits any more.
const LINGER: Duration = Duration::from_secs(1);
/// Rounds are never closer together than this, and after one that failed.
const LEAST_GAP: Duration = Duration::from_millis(2);
const FAILURE_GAP: Duration = Duration::from_secs(1);

/// What the rounds of one store are about.
#[derive(Debug)]
pub(super) struct Rounds {
    caller: Weak<Sender<Job>>,
    bell: Option<Bell>,
    /// Whether a bell was tried to be hung since somebody last waited.
    bell_tried: bool,
    alarm: Option<(Instant, Sleep)>,
    next: Instant,
    refresh_at: Instant,
    watch_at: Instant,
    idle_since: Option<Instant>,
    /// Whether there may be rows of ours in the tables of waiters.
    has_waited: bool,
    /// Handed to our own, to be told when the gate is free again.
    local: Vec<Handed>,
}

impl Default for Rounds {
    fn default() -> Self {
        Self {
            caller: Weak::new(),
            bell: None,
            bell_tried: false,
            alarm: None,
            next: Instant::FAR,
            refresh_at: Instant::FAR,
            watch_at: Instant::FAR,
            idle_since: None,
            has_waited: false,
            local: Vec::new(),
        }
    }
}

impl Rounds {
    /// By `caller` the thread is called to its rounds.
    pub(super) fn call_by(&mut self, caller: Weak<Sender<Job>>) {
        self.caller = caller;
    }

    /// Nobody waits any more: no bell, no alarm.
    fn rest(&mut self) {
        self.bell = None;
        self.bell_tried = false;
        self.alarm = None;
        (self.next, self.refresh_at, self.watch_at) = (Instant::FAR, Instant::FAR, Instant::FAR);
        self.idle_since = None;
    }

    /// Sets the alarm, unless it goes off early enough.
    fn arm(&mut self) {
        if self.next == Instant::FAR || self.alarm.as_ref().is_some_and(|(at, _)| *at <= self.next) {
            return;
        }
        let call = Arc::new(Call(self.caller.clone()));
        let waker = Waker::from(call.clone());
        let mut sleep = clock::sleep_until(self.next);
        match Pin::new(&mut sleep).poll(&mut Context::from_waker(&waker)) {
            Poll::Ready(()) => call.wake(),
            Poll::Pending => {}
        }
        self.alarm = Some((self.next, sleep));
    }
}

/// Calls the store's thread to its rounds.
struct Call(Weak<Sender<Job>>);

impl Wake for Call {
    fn wake(self: Arc<Self>) {
        call(&self.0, Database::make_rounds);
    }
}

fn call(caller: &Weak<Sender<Job>>, work: impl FnOnce(&mut Database) + Send + 'static) {
    let job: Job = Box::new(move |database| {
        work(database);
        None
    });
    // A store that has ended has nobody who waits.
    let _ = caller.upgrade().map(|jobs| jobs.send(job));
}

/// What a look at one lock found.
struct Sight {
    hold: Option<Hold>,
    /// The line: whose claim, and of which process.
    line: Vec<(ClaimId, LifelineId)>,
    /// Whether it is to be handed on.
    is_free: bool,
}

impl Database {
    /// Presents a claim that was sent at `sent`, and gives it a seat if it has to wait.
    pub(super) fn acquire(&mut self, claim: &Claim, sent: Now) -> Result<Acquired> {
        let answer = self.transaction(|transaction| transaction.acquire(claim))?;
        match &answer {
            Acquired::Queued(ticket) => self.seat(claim, ticket, sent),
            _ if claim.queue => self.room.leave(&claim.name, claim.id),
            _ => {}
        }
        Ok(answer)
    }

    /// Gives a lock back, or a place in line.
    pub(super) fn release(&mut self, held: &Held) -> Result<Released> {
        let answer = self.transaction(|transaction| transaction.release(held))?;
        if held.waiting {
            self.room.leave(&held.name, held.id);
        }
        Ok(answer)
    }

    fn seat(&mut self, claim: &Claim, ticket: &Ticket, sent: Now) {
        let now = clock::now();
        // What it was handed earlier in this turn has ended, or it would not stand in line: told now, it would count anew.
        self.rounds.local.retain(|handed| handed.claim != claim.id);
        let look_at = now.plus(SETTLE.min(heard_every(claim.ttl)));
        self.room.seat(claim, ticket, sent, look_at);
        let rounds = &mut self.rounds;
        rounds.has_waited = true;
        rounds.idle_since = None;
        rounds.refresh_at = rounds.refresh_at.min(now.plus(heard_every(claim.ttl)));
        rounds.next = rounds.next.min(look_at);
        if !rounds.bell_tried {
            self.hang_bell();
        }
    }

    fn hang_bell(&mut self) {
        let caller = self.rounds.caller.clone();
        let rung = move |claims: Vec<ClaimId>| call(&caller, move |database| database.hear(&claims));
        let path = self.lifelines.bell(self.lifelines.id());
        // The old one goes first: it has the same place.
        self.rounds.bell = None;
        self.rounds.bell_tried = true;
        match fs::metadata(&self.path).and_then(|found| Bell::hang(path, &found, rung)) {
            Ok(bell) => self.rounds.bell = Some(bell),
            Err(error) => tracing::debug!(%error, "no bell can be hung: waiters look from time to time"),
        }
    }

    /// Tells those whom a transaction handed a lock, after its commit.
    pub(super) fn ring(&mut self, handed: Vec<Handed>) {
        let own = self.lifelines.id();
        for handed in handed {
            if handed.lifeline == own {
                self.rounds.local.push(handed);
            } else if let Err(error) = bell::ring(&self.lifelines.bell(handed.lifeline), handed.claim) {
                tracing::debug!(lock = %handed.name, %error, "the next in line will find out by itself");
            }
        }
    }

    /// What is left to do when the gate is free again.
    pub(super) fn settle(&mut self) {
        for Handed { name, claim, token, ttl, .. } in std::mem::take(&mut self.rounds.local) {
            if let Some(waiting) = self.room.find(&name, claim) {
                waiting.grant(Grant { token, ttl, session: 0 });
            }
        }
        self.rounds.arm();
    }

    /// The bell was rung for these claims: tells those that hold their lock by now. It needs no turn at the gate.
    fn hear(&mut self, claims: &[ClaimId]) {
        let rung: Vec<(Name, Arc<Waiting>)> = {
            let lanes = self.room.lanes();
            let lanes: Vec<(&Name, &Lane)> = lanes.iter().collect();
            let find = |claim| lanes.iter().find_map(|(name, lane)| Some((*name, lane.waiting.get(claim)?)));
            claims.iter().filter_map(find).map(|(name, waiting)| (name.clone(), waiting.clone())).collect()
        };
        for (name, waiting) in rung {
            match self.hold(&name, &mut HashMap::new()) {
                Ok(Some(hold)) if hold.claim == waiting.claim.id => self.take_over(&name, &hold, &waiting),
                Ok(_) => {}
                Err(error) => tracing::debug!(%error, "a ring of the bell could not be looked into"),
            }
        }
    }

    /// One of ours was handed a lock.
    fn take_over(&mut self, name: &Name, hold: &Hold, waiting: &Waiting) {
        if hold.lifeline == Some(self.lifelines.id()) {
            self.bound.insert(name.clone());
        }
        let ttl = waiting.claim.ttl.min(HAND_OFF_TTL);
        waiting.grant(Grant { token: hold.token, ttl, session: 0 });
    }

    /// One round: does what is due, and plans the next.
    fn make_rounds(&mut self) {
        let now = clock::now();
        self.rounds.alarm = None;
        if self.room.lanes().is_empty() {
            let until = self.rounds.idle_since.get_or_insert(now).plus(LINGER);
            self.rounds.next = until;
            if now >= until {
                self.rounds.rest();
            }
            return;
        }
        self.rounds.idle_since = None;
        let done = self.look_after(now);
        if let Err(error) = &done {
            tracing::debug!(%error, "the places in line could not be kept");
            self.room.tell_all_to_look();
        }
        let rounds = &mut self.rounds;
        let looks = self.room.lanes().values().map(|lane| lane.look_at).min().unwrap_or(Instant::FAR);
        let gap = if done.is_ok() { LEAST_GAP } else { FAILURE_GAP };
        rounds.next = looks.min(rounds.refresh_at).min(rounds.watch_at).max(clock::now().plus(gap));
    }

    fn look_after(&mut self, now: Instant) -> Result<()> {
        let is_refresh = now >= self.rounds.refresh_at;
        if is_refresh {
            self.refresh(now)?;
        }
        if now >= self.rounds.watch_at {
            self.watch(now);
        }
        let due = |lane: &Lane| lane.look_at <= now;
        let due: Vec<Name> = {
            let lanes = self.room.lanes();
            lanes.iter().filter(|(_, lane)| due(lane)).map(|(name, _)| name.clone()).collect()
        };
        if due.is_empty() { Ok(()) } else { self.survey(&due, is_refresh) }
    }

    /// Tells the others that this process lives, and gives up the places that nobody waits at. Everything is looked at then.
    fn refresh(&mut self, now: Instant) -> Result<()> {
        let (mut every, mut abandoned) = (Duration::MAX, Vec::new());
        for lane in self.room.lanes().values_mut() {
            lane.look_at = now;
            for waiting in lane.waiting.values() {
                every = every.min(heard_every(waiting.claim.ttl));
                if waiting.is_abandoned(now) {
                    abandoned.push(waiting.claim.clone());
                }
            }
        }
        self.rounds.refresh_at = now.plus(every);
        if !self.rounds.bell.as_ref().is_some_and(Bell::in_place) {
            self.hang_bell();
        }
        self.give_up(&abandoned, true)
    }

    /// Gives up places and what was handed to them, and says, if asked to, that this process lives.
    fn give_up(&mut self, claims: &[Claim], and_mark: bool) -> Result<()> {
        self.transaction(|transaction| {
            if and_mark {
                transaction.mark_heard()?;
            }
            transaction.give_up(claims)
        })?;
        for claim in claims {
            self.room.leave(&claim.name, claim.id);
        }
        Ok(())
    }

    /// Looks whether the processes before ours still live. The database is not touched.
    fn watch(&mut self, now: Instant) {
        let mut seen: HashMap<LifelineId, bool> = HashMap::new();
        let mut watched = false;
        for lane in self.room.lanes().values_mut() {
            for id in &lane.watched {
                watched = true;
                if *seen.entry(*id).or_insert_with(|| self.lifelines.is_dead(*id)) {
                    lane.look_at = now;
                }
            }
        }
        self.rounds.watch_at = if watched { now.plus(WATCH) } else { Instant::FAR };
    }

    /// Looks at these locks, tells our waiters what was found (a place in line only if `tell` says so), and hands on what is
    /// free. Passes no gate unless something is to be done.
    fn survey(&mut self, names: &[Name], tell: bool) -> Result<()> {
        self.verify()?;
        let before = clock::look();
        let sights = self.sights(names)?;
        let mut lost = Vec::new();
        for (name, sight) in names.iter().zip(&sights) {
            self.report(name, sight, before, tell, &mut lost);
        }
        let free: Vec<&Name> =
            names.iter().zip(&sights).filter(|(_, sight)| sight.is_free).map(|(name, _)| name).collect();
        if !free.is_empty() {
            self.transaction(|transaction| free.iter().try_for_each(|name| transaction.hand_on(name)))?;
        }
        if lost.is_empty() { Ok(()) } else { self.give_up(&lost, false) }
    }

    /// What is seen of these locks at one moment.
    fn sights(&self, names: &[Name]) -> Result<Vec<Sight>> {
        let mut lives = HashMap::new();
        execute(&self.connection, "BEGIN")?;
        let sights = names.iter().map(|name| self.sight(name, &mut lives)).collect();
        execute(&self.connection, "COMMIT")?;
        sights
    }

    fn sight(&self, name: &Name, lives: &mut HashMap<LifelineId, Life>) -> Result<Sight> {
        let hold = self.hold(name, lives)?;
        let read = || {
            let mut line = Vec::new();
            let mut statement = self
                .connection
                .prepare_cached("SELECT claim, lifeline FROM queue WHERE name = ?1 ORDER BY seq")?;
            let mut rows = statement.query([name.as_bytes()])?;
            while let Some(row) = rows.next()? {
                let Some(process) = LifelineId::from_bytes(row.get_ref(1)?.as_blob()?) else { continue };
                line.push((ClaimId::from_bytes(row.get(0)?), process));
            }
            Ok(line)
        };
        let line: Vec<_> = read().map_err(|e| failure("read a line", e))?;
        let is_free = hold.is_none() && !line.is_empty();
        Ok(Sight { hold, line, is_free })
    }

    /// Who holds a lock now.
    fn hold(&self, name: &Name, lives: &mut HashMap<LifelineId, Life>) -> Result<Option<Hold>> {
        let find = format!("SELECT {LOCK_COLUMNS} FROM locks WHERE name = ?1");
        let lock = self
            .connection
            .prepare_cached(&find)
            .and_then(|mut statement| statement.query_row([name.as_bytes()], Lock::read).optional())
            .map_err(|e| failure("look a lock up", e))?;
        let life = |id| *lives.entry(id).or_insert_with(|| self.lifelines.life(id));
        Ok(lock.and_then(|lock| lock.into_live(&self.boot, self.boot.now(), life)))
    }

    /// Tells our waiters for one lock what was seen; adds those to `lost` whom nobody waits for any more.
    fn report(&mut self, name: &Name, sight: &Sight, before: Now, tell: bool, lost: &mut Vec<Claim>) {
        let now = self.boot.now();
        let places: HashMap<ClaimId, usize> =
            sight.line.iter().enumerate().map(|(place, (claim, _))| (*claim, place)).collect();
        let mut first = usize::MAX;
        for waiting in self.room.waiting_for(name) {
            let id = waiting.claim.id;
            if let Some(hold) = sight.hold.as_ref().filter(|hold| hold.claim == id) {
                self.take_over(name, hold, &waiting);
                if waiting.is_abandoned(before.boot) {
                    lost.push(waiting.claim.clone());
                }
            } else if let Some(place) = places.get(&id) {
                first = first.min(*place);
                let holder = sight.hold.as_ref().map(|hold| hold.show(now));
                let ticket = Ticket::new(&waiting.claim).with_ahead(*place as u64).with_holder(holder);
                waiting.place(ticket, before, tell);
            } else {
                waiting.tell_to_look();
            }
        }
        let room = self.room.clone();
        if let Some(lane) = room.lanes().get_mut(name) {
            self.plan(lane, sight, first);
        }
    }

    /// When to look at a lock again of which our first waiter has the place `first`, and whose death to watch for.
    fn plan(&mut self, lane: &mut Lane, sight: &Sight, first: usize) {
        let now = clock::now();
        lane.look_at = match &sight.hold {
            Some(hold) if first != usize::MAX => {
                let later = STAGGER.saturating_mul(u32::try_from(first).unwrap_or(u32::MAX));
                now.plus(hold.remaining(self.boot.now())).plus(LEAST_GAP).plus(later)
            }
            // Somebody has it in a moment, whom we do not know yet; or none of ours stands in line any more.
            _ => now.plus(SETTLE),
        };
        lane.watched.clear();
        if first >= WATCHERS {
            return;
        }
        let own = self.lifelines.id();
        let holder = sight.hold.as_ref().and_then(|hold| hold.lifeline);
        let before_us = sight.line[..first].iter().map(|(_, process)| *process);
        let others: HashSet<LifelineId> = before_us.chain(holder).filter(|id| *id != own).collect();
        // One that is dead already, and stands in line, is met when it would be its turn.
        lane.watched.extend(others.into_iter().filter(|id| !self.lifelines.is_dead(*id)));
        if !lane.watched.is_empty() {
            self.rounds.watch_at = self.rounds.watch_at.min(now.plus(WATCH));
        }
    }

    /// Ends all waiting at the end of the store; false if something of it may be left.
    pub(super) fn stop_waiting(&mut self) -> bool {
        self.rounds.rest();
        if !self.rounds.has_waited {
            return true;
        }
        let claims: Vec<Claim> = self.room.everybody().iter().map(|waiting| waiting.claim.clone()).collect();
        let done = self.transaction(|transaction| {
            transaction.give_up(&claims)?;
            transaction.leave_all_lines()
        });
        self.leave();
        done.is_ok()
    }
}

#[cfg(test)]
mod tests {
    use std::pin::pin;

    use super::super::{Options, open};
    use super::*;

    /// A turn at the gate that takes longer than a lease: on a slow disk, or in a process that was stopped in it.
    #[test]
    fn a_lock_handed_and_lost_within_one_turn_is_not_told_to_its_claim_that_waits_again() {
        let folder = tempfile::tempdir().unwrap();
        let mut database = open::open(&folder.path().join("db"), &Options::default()).unwrap();
        let claim = || {
            let claim = Claim::new(Name::new("a").unwrap(), clock::claim_id(), Duration::from_millis(20));
            claim.with_queue(true)
        };
        let (first, late, next) = (claim(), claim(), claim());
        let Acquired::Granted(grant) = database.acquire(&first, clock::look()).unwrap() else {
            panic!("busy")
        };
        assert!(matches!(database.acquire(&late, clock::look()).unwrap(), Acquired::Queued(_)));
        assert_eq!(database.release(&Held::new(&first, &grant)).unwrap(), Released::Released);
        pollster::block_on(clock::sleep(late.ttl));
        assert!(matches!(database.acquire(&next, clock::look()).unwrap(), Acquired::Granted(_)));
        let Acquired::Queued(ticket) = database.acquire(&late, clock::look()).unwrap() else {
            panic!("two hold it")
        };
        database.settle();
        let woken = pin!(database.room.woken(&ticket)).poll(&mut Context::from_waker(Waker::noop()));
        assert!(woken.is_pending(), "{woken:?}");
    }
}
