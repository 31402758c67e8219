//! Passing a lock on within the process: those that wait for it here line up here, and only the first of them has a claim
//! at the store.
//!
//! What is passed on is one [`Cell`]: the keeper goes on renewing the same claim whoever holds it, so there is no moment in
//! which nobody watches the lease, and a renewal that is under way meanwhile is settled as always.
//!
//! Whatever travels to a waiter (a [`Turn`], a [`Holding`]) takes care of itself when it is dropped. So a waiter may go at
//! any moment, also between the sending and the taking up: the next one gets it, or the lock is released.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use tokio::sync::oneshot;

use crate::cell::{Cell, lock};
use crate::clock::{self, Instant};
use crate::error::{Error, Result};
use crate::keeper::Keeper;
use crate::retry::Retry;
use crate::types::{FencingToken, Name, Released, Replication};
use crate::wait::{POLICY_STEP, policy_until};

/// How often a claim can be passed on, if so often is allowed, before it is known how often that is wanted.
const USUAL_PASSES: u32 = 16;

/// What those must agree in who pass a lock on among themselves: all that others see of it, and what its lease goes by.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Terms {
    pub(crate) name: Name,
    pub(crate) record: Arc<str>,
    pub(crate) ttl: Duration,
    pub(crate) max_hold: Option<Duration>,
    /// The replicas that are waited for, and whether they are required.
    pub(crate) replicas: Option<(Replication, bool)>,
    /// How often it is passed on, at most.
    pub(crate) passes: u32,
}

/// The lines of one `Locks`: those that somebody has a handle on.
#[derive(Debug, Default)]
pub(crate) struct Lines(Mutex<HashMap<Terms, Weak<Line>>>);

impl Lines {
    /// The line of those who agree in `terms`.
    pub(crate) fn line(self: &Arc<Self>, terms: Terms) -> Arc<Line> {
        let mut table = lock(&self.0);
        if let Some(line) = table.get(&terms).and_then(Weak::upgrade) {
            return line;
        }
        let line = Arc::new(Line { terms: terms.clone(), lines: self.clone(), queue: Mutex::default() });
        table.insert(terms, Arc::downgrade(&line));
        line
    }
}

/// Those of this process who want one lock.
#[derive(Debug)]
pub(crate) struct Line {
    terms: Terms,
    lines: Arc<Lines>,
    queue: Mutex<Queue>,
}

#[derive(Debug, Default)]
struct Queue {
    /// Whether somebody has the turn.
    taken: bool,
    /// How many passes the last claim gives reason to expect of the next. Tokens that are taken and never used let a
    /// lock's tokens run ahead of the store's time, which is what makes up for tokens that a store lost.
    expected: u32,
    next: u64,
    /// In order of arrival, and of their numbers.
    waiting: VecDeque<(u64, oneshot::Sender<Baton>)>,
}

/// What a waiter is sent.
#[derive(Debug)]
enum Baton {
    Turn(Turn),
    Holding(Holding),
    Failed(Error),
}

/// How waiting in a line ended.
#[derive(Debug)]
pub(crate) enum Entered {
    /// The lock was passed on to it.
    Passed(Holding),
    /// It is to claim the lock at the store.
    Turn(Turn),
    /// The time or the policy ended first.
    Over,
}

impl Line {
    /// Waits for the turn to claim the lock, or to be passed it.
    ///
    /// # Errors
    /// That of the one before, if the store did not answer it.
    pub(crate) async fn enter(self: &Arc<Self>, retry: &Retry, deadline: Instant) -> Result<Entered> {
        let mut place = match self.join() {
            Ok(turn) => return Ok(Entered::Turn(turn)),
            Err(place) => place,
        };
        let mut waits = None;
        loop {
            let until = if retry.is_endless() {
                Instant::FAR
            } else {
                match policy_until(waits.get_or_insert_with(|| retry.waits()), POLICY_STEP) {
                    Some(until) => until,
                    None => return Ok(Entered::Over),
                }
            };
            match clock::timeout_at(until.min(deadline), &mut place.baton).await {
                Some(Ok(Baton::Turn(turn))) => return Ok(Entered::Turn(turn)),
                Some(Ok(Baton::Holding(holding))) => return Ok(holding.taken_up()),
                Some(Ok(Baton::Failed(error))) => return Err(error),
                // Forgotten by whoever had the turn, which only a panic can bring about.
                Some(Err(_)) => match self.join() {
                    Ok(turn) => return Ok(Entered::Turn(turn)),
                    Err(again) => place = again,
                },
                None if clock::now() >= deadline => return Ok(Entered::Over),
                None => {}
            }
        }
    }

    /// The turn, if nobody has it; else a place in line.
    fn join(self: &Arc<Self>) -> std::result::Result<Turn, Place> {
        let mut queue = lock(&self.queue);
        if !queue.taken {
            queue.taken = true;
            let passes = self.passes(&queue);
            return Ok(Turn { line: self.clone(), passes, awaited: false, armed: true });
        }
        let (sender, baton) = oneshot::channel();
        queue.next += 1;
        let number = queue.next;
        queue.waiting.push_back((number, sender));
        Err(Place { line: self.clone(), number, baton })
    }

    fn passes(&self, queue: &Queue) -> u32 {
        queue.expected.max(USUAL_PASSES).min(self.terms.passes)
    }

    /// Whether somebody waits to whom a claim may be passed on that was passed on `used` times and can be `left` times.
    fn is_awaited(&self, used: u32, left: u32) -> bool {
        let mut queue = lock(&self.queue);
        let awaited = !queue.waiting.is_empty();
        queue.expected = if awaited { used.saturating_mul(2) } else { used };
        awaited && left > 0
    }

    fn next(&self) -> Option<oneshot::Sender<Baton>> {
        lock(&self.queue).waiting.pop_front().map(|(_, sender)| sender)
    }

    /// As [`next`](Self::next), with how often its claim can be passed on; if there is none, the turn is anybody's.
    fn next_or_free(&self) -> Option<(oneshot::Sender<Baton>, u32)> {
        let mut queue = lock(&self.queue);
        let next = queue.waiting.pop_front();
        queue.taken = next.is_some();
        next.map(|(_, sender)| (sender, self.passes(&queue)))
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        let mut table = lock(&self.lines.0);
        // Another one of the same terms may have been made since the last handle on this one went.
        if table.get(&self.terms).is_some_and(|line| line.strong_count() == 0) {
            table.remove(&self.terms);
        }
    }
}

/// A place in line, left when dropped. What was sent to it by then is dropped too, and so goes to the next.
#[derive(Debug)]
struct Place {
    line: Arc<Line>,
    number: u64,
    baton: oneshot::Receiver<Baton>,
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut queue = lock(&self.line.queue);
        let gone = match queue.waiting.binary_search_by_key(&self.number, |(number, _)| *number) {
            Ok(at) => queue.waiting.remove(at),
            Err(_) => None,
        };
        drop(queue);
        drop(gone);
    }
}

/// The right of one in the line to claim the lock and to hold it. Dropped, it goes to the next.
#[derive(Debug)]
pub(crate) struct Turn {
    line: Arc<Line>,
    /// How often what is claimed in it can be passed on.
    passes: u32,
    awaited: bool,
    armed: bool,
}

impl Turn {
    /// How many tokens a claim needs.
    pub(crate) fn tokens(&self) -> u32 {
        self.passes.saturating_add(1)
    }

    /// Whether it was waited for.
    pub(crate) fn was_awaited(&self) -> bool {
        self.awaited
    }

    /// Tells all that wait now of an error that each of them would find too.
    pub(crate) fn fail(self, error: &Error) {
        let waiting = std::mem::take(&mut lock(&self.line.queue).waiting);
        for (_, sender) in waiting {
            let _ = sender.send(Baton::Failed(error.clone()));
        }
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        if !self.armed {
            return;
        }
        while let Some((sender, passes)) = self.line.next_or_free() {
            let turn = Self { line: self.line.clone(), passes, awaited: true, armed: true };
            match sender.send(Baton::Turn(turn)) {
                Err(Baton::Turn(mut back)) => back.armed = false,
                _ => return,
            }
        }
    }
}

/// A lock held. Dropped, it is passed on or released.
#[derive(Debug)]
pub(crate) struct Holding {
    keeper: Arc<Keeper>,
    cell: Arc<Cell>,
    token: FencingToken,
    share: Option<Share>,
    armed: bool,
}

/// What a holder needs to pass it on.
#[derive(Debug)]
struct Share {
    turn: Turn,
    /// How often it may still be passed on.
    left: u32,
}

impl Share {
    fn is_awaited(&self) -> bool {
        self.turn.line.is_awaited(self.turn.passes - self.left, self.left)
    }
}

impl Holding {
    /// What `cell` keeps, held with `token` and passed on to nobody.
    pub(crate) fn new(keeper: Arc<Keeper>, cell: Arc<Cell>, token: FencingToken) -> Self {
        Self { keeper, cell, token, share: None, armed: true }
    }

    /// The same, to be passed on in the line of `turn`.
    pub(crate) fn shared_with(mut self, turn: Turn) -> Self {
        let left = turn.passes;
        self.share = Some(Share { turn, left });
        self
    }

    pub(crate) fn cell(&self) -> &Arc<Cell> {
        &self.cell
    }

    pub(crate) fn keeper(&self) -> &Keeper {
        &self.keeper
    }

    pub(crate) fn token(&self) -> FencingToken {
        self.token
    }

    /// Leaves it to its TTL.
    pub(crate) fn leave(&mut self) {
        self.armed = false;
    }

    /// Passes it on, or releases it and says how it stood.
    ///
    /// # Errors
    /// The store's.
    pub(crate) async fn unlock(mut self) -> Result<Released> {
        if self.pass() {
            return Ok(Released::Released);
        }
        self.armed = false;
        // The next of this process claims it while this claim is being released: one round trip for both.
        drop(self.share.take());
        self.keeper.release_now(&self.cell).await
    }

    /// Whether a waiter of this process has it now.
    fn pass(&mut self) -> bool {
        let Some(mut share) = self.share.take_if(|share| share.is_awaited()) else {
            return false;
        };
        let token = FencingToken::new(self.token.get() + 1);
        if token.get() > FencingToken::MAX || !self.cell.offer(token) {
            self.share = Some(share);
            return false;
        }
        let line = share.turn.line.clone();
        share.turn.awaited = true;
        let mut next = Self {
            keeper: self.keeper.clone(),
            cell: self.cell.clone(),
            token,
            share: Some(Share { left: share.left - 1, ..share }),
            armed: true,
        };
        while let Some(sender) = line.next() {
            let Err(Baton::Holding(back)) = sender.send(Baton::Holding(next)) else {
                self.armed = false;
                return true;
            };
            next = back;
        }
        // They have all gone meanwhile.
        next.armed = false;
        self.share = next.share.take();
        false
    }

    /// For the waiter it was sent to: the lock, or, if it was left lying until too little of the lease was left, the turn
    /// to claim it anew.
    fn taken_up(mut self) -> Entered {
        let max_hold = self.share.as_ref().and_then(|share| share.turn.line.terms.max_hold);
        if self.cell.take_up(max_hold) {
            let name = &self.cell.held().name;
            tracing::debug!(lock = %name, token = %self.token, "passed on within the process");
            return Entered::Passed(self);
        }
        let turn = self.share.take().map(|share| share.turn);
        drop(self);
        turn.map_or(Entered::Over, Entered::Turn)
    }
}

impl Drop for Holding {
    fn drop(&mut self) {
        if self.armed && !self.pass() {
            self.keeper.drop_lock(&self.cell);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::task::{Context, Poll, Waker};

    use super::*;
    use crate::keeper::Bench;
    use crate::stores::memory::MemoryStore;
    use crate::types::{Claim, Grant};

    fn terms(name: &str) -> Terms {
        Terms {
            name: Name::new(name).unwrap(),
            record: Arc::from("{}"),
            ttl: Duration::from_secs(1),
            max_hold: None,
            replicas: None,
            passes: 3,
        }
    }

    fn turn(line: &Arc<Line>) -> Turn {
        line.join().expect("nobody has the turn")
    }

    #[test]
    fn a_line_is_shared_while_somebody_has_it_and_then_forgotten() {
        let lines = Arc::new(Lines::default());
        let one = lines.line(terms("a"));
        assert!(Arc::ptr_eq(&one, &lines.line(terms("a"))));
        assert!(!Arc::ptr_eq(&one, &lines.line(terms("b"))));
        assert_eq!(lock(&lines.0).len(), 1);
        let turn = turn(&one);
        drop(one);
        assert_eq!(lock(&lines.0).len(), 1);
        drop(turn);
        assert_eq!(lock(&lines.0).len(), 0);
    }

    #[test]
    fn a_place_that_was_left_takes_no_room() {
        let line = Arc::new(Lines::default()).line(terms("a"));
        let turn = turn(&line);
        let places: Vec<_> = (0..10).map(|_| line.join().unwrap_err()).collect();
        let stays = line.join().unwrap_err();
        drop(places);
        assert_eq!(lock(&line.queue).waiting.len(), 1);
        drop((turn, stays));
        assert!(!lock(&line.queue).taken);
    }

    #[test]
    fn the_turn_goes_round_in_order_and_past_those_who_went() {
        let line = Arc::new(Lines::default()).line(terms("a"));
        let first = turn(&line);
        let mut places: VecDeque<_> = (0..4).map(|_| line.join().unwrap_err()).collect();
        drop(places.remove(1));
        drop(first);
        // Sent to the first, who goes before taking it: the next has it.
        drop(places.pop_front());
        let mut next = places.pop_front().unwrap();
        assert!(matches!(next.baton.try_recv(), Ok(Baton::Turn(turn)) if turn.was_awaited()));
        let mut last = places.pop_front().unwrap();
        let got = last.baton.try_recv();
        assert!(matches!(got, Ok(Baton::Turn(_))), "{got:?}");
        assert!(line.join().is_err(), "the last one has it");
        drop(got);
        assert!(line.join().is_ok());
    }

    /// One who goes in the moment between being chosen and being sent to.
    fn gone(line: &Arc<Line>) -> Place {
        let mut place = line.join().unwrap_err();
        place.baton.close();
        place
    }

    #[test]
    fn who_goes_in_the_moment_of_being_sent_to_is_passed_by() {
        let keeper = Bench::start().unwrap().keep(Arc::new(MemoryStore::new()), Duration::from_secs(1));
        let line = Arc::new(Lines::default()).line(terms("a"));
        let held = |turn: Turn| {
            let claim = Claim::new(Name::new("a").unwrap(), clock::claim_id(), Duration::from_secs(30));
            let grant = Grant { token: FencingToken::new(7), ttl: claim.ttl, session: 0 };
            let cell = keeper.keep(&claim, &grant, clock::look(), true, None, false);
            Holding::new(keeper.clone(), cell, grant.token).shared_with(turn)
        };
        let first = turn(&line);
        let (_one, mut two) = (gone(&line), line.join().unwrap_err());
        drop(first);
        let Ok(Baton::Turn(turn)) = two.baton.try_recv() else { panic!("the second has the turn") };
        let (_one, mut two) = (gone(&line), line.join().unwrap_err());
        drop(held(turn));
        let Ok(Baton::Holding(holding)) = two.baton.try_recv() else { panic!("the second has the lock") };
        assert_eq!(holding.token.get(), 8);
        let (_one, _two) = (gone(&line), gone(&line));
        drop(holding);
        assert!(line.join().is_ok(), "nobody has it");
    }

    #[test]
    fn a_claim_takes_tokens_as_they_are_wanted() {
        let line = Arc::new(Lines::default()).line(Terms { passes: 100, ..terms("a") });
        let tokens = || turn(&line).tokens();
        assert_eq!(tokens(), 17);
        let (held, place) = (turn(&line), line.join().unwrap_err());
        assert!(line.is_awaited(15, 1));
        assert!(!line.is_awaited(16, 0));
        drop((place, held));
        assert_eq!(tokens(), 33);
        assert!(!line.is_awaited(20, 12));
        assert_eq!(tokens(), 21);
        let (held, place) = (turn(&line), line.join().unwrap_err());
        assert!(!line.is_awaited(80, 0));
        drop((place, held));
        assert_eq!(tokens(), 101, "no more than is allowed");
        assert!(!line.is_awaited(0, 100));
        assert_eq!(tokens(), 17);
        assert_eq!(turn(&Arc::new(Lines::default()).line(terms("b"))).tokens(), 4);
    }

    #[test]
    fn an_error_is_told_to_all_who_wait() {
        let line = Arc::new(Lines::default()).line(terms("a"));
        let first = turn(&line);
        let retry = Retry::default();
        let mut waiting: Vec<_> = (0..3).map(|_| Box::pin(line.enter(&retry, Instant::FAR))).collect();
        let mut cx = Context::from_waker(Waker::noop());
        assert!(waiting.iter_mut().all(|waiting| waiting.as_mut().poll(&mut cx).is_pending()));
        first.fail(&Error::invalid("on purpose"));
        for waiting in &mut waiting {
            assert!(matches!(waiting.as_mut().poll(&mut cx), Poll::Ready(Err(_))));
        }
        assert!(line.join().is_ok());
    }
}
