//! What the keeper and a guard share of one held lock: its lease, and who is told when it changes.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;

use crate::clock::{self, Instant, Now};
use crate::error::Result;
use crate::lease::{Lease, Loss, Next, Outcome, Status};
use crate::types::{FencingToken, Held, Renewal};

/// Locks a mutex whoever panicked with it.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A panic elsewhere must not cost the other locks of the process their renewal; all states here are whole at any time.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What the keeper and a guard know of one held lock.
#[derive(Debug)]
pub(crate) struct Cell {
    /// The claim: one, however often the lock is passed on within the process. Its token is that of the first holder.
    pub(crate) held: Held,
    pub(crate) state: Mutex<State>,
    pub(crate) changed: Notify,
}

/// What changes about it.
#[derive(Debug)]
pub(crate) struct State {
    pub(crate) lease: Lease,
    /// The token of who holds it now.
    token: FencingToken,
    /// Since when it is passed on to a waiter of this process who has not taken it up yet.
    offered: Option<Instant>,
    /// Its place in the keeper's table.
    pub(crate) due: Option<Instant>,
    pub(crate) phase: Phase,
    /// Whether a renewal of it is under way: there is one at most.
    pub(crate) in_flight: bool,
    /// How many replicas had it when it was granted, if that was asked.
    pub(crate) replicas: Option<u32>,
    /// Counts changes that `changed` tells.
    pub(crate) version: u64,
}

impl State {
    /// For how long a renewal that is due has to be put off: another one is under way, or nobody has taken up what was
    /// passed on. Such a lock is not kept for a waiter that may have been forgotten: it ends by its TTL.
    pub(crate) fn put_off(&self, now: Instant) -> Option<Duration> {
        if self.in_flight {
            // An extension asked for by the guard: it may yet be dropped, so look again soon.
            return Some(Duration::from_millis(50));
        }
        let interval = self.lease.interval().max(Duration::from_millis(1));
        self.offered.filter(|since| now.since(*since) > interval).map(|_| interval)
    }
}

/// Whether it is still the keeper's to renew.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    /// Kept.
    Held,
    /// Being released, or left alone: never renewed again.
    Done,
}

impl Cell {
    /// A lock held by `held` since a grant with `token`, for as long as `lease` goes.
    pub(crate) fn new(held: Held, token: FencingToken, lease: Lease) -> Self {
        let state = State {
            lease,
            token,
            offered: None,
            due: None,
            phase: Phase::Held,
            in_flight: false,
            replicas: None,
            version: 0,
        };
        Self { held, state: Mutex::new(state), changed: Notify::new() }
    }

    /// The claim as held.
    pub(crate) fn held(&self) -> &Held {
        &self.held
    }

    /// Makes it the hold of `token`, for a waiter of this process to take up, if the lease is good enough for that.
    pub(crate) fn offer(&self, token: FencingToken) -> bool {
        let now = clock::look();
        let mut state = lock(&self.state);
        if state.phase != Phase::Held || !state.lease.may_pass(now) {
            return false;
        }
        state.token = token;
        state.offered = Some(now.boot);
        true
    }

    /// Takes up what was passed on, if the lease is still good enough: from here on it may be held for `max_hold`.
    pub(crate) fn take_up(&self, max_hold: Option<Duration>) -> bool {
        let now = clock::look();
        let mut state = lock(&self.state);
        if !state.lease.may_pass(now) {
            return false;
        }
        state.offered = None;
        state.lease.begin_hold(now.boot, max_hold);
        true
    }

    /// How sure the holder can be now.
    pub(crate) fn status(&self) -> Status {
        lock(&self.state).lease.status(clock::look())
    }

    /// Time left that can be trusted.
    pub(crate) fn remaining(&self) -> Duration {
        lock(&self.state).lease.remaining(clock::now())
    }

    /// Until when it can be trusted, as far as is known.
    pub(crate) fn valid_until(&self) -> Instant {
        lock(&self.state).lease.valid_until()
    }

    /// Resolves at the loss, before the store can give the lock away: by the clock, whatever the keeper does. Once it
    /// was passed on, the hold of `token` has nothing to lose any more: then at the end that was last known of it.
    pub(crate) fn lost(self: Arc<Self>, token: FencingToken) -> impl Future<Output = Loss> + Send + use<> {
        let mut until = self.valid_until();
        async move {
            loop {
                let notified = self.changed.notified();
                tokio::pin!(notified);
                notified.as_mut().enable();
                {
                    let mut state = lock(&self.state);
                    if state.token == token {
                        if let Some(loss) = state.lease.loss(clock::now()) {
                            return loss;
                        }
                        until = state.lease.valid_until();
                    } else if clock::now() >= until {
                        return Loss::Expired;
                    }
                }
                let _ = clock::timeout_at(until, notified).await;
            }
        }
    }

    /// Resolves at the next change: a renewal confirmed or failed, or the loss.
    pub(crate) fn next_change(self: Arc<Self>) -> impl Future<Output = ()> + Send + use<> {
        let seen = lock(&self.state).version;
        async move {
            loop {
                let notified = self.changed.notified();
                tokio::pin!(notified);
                notified.as_mut().enable();
                let until = {
                    let mut state = lock(&self.state);
                    if state.version != seen || state.lease.loss(clock::now()).is_some() {
                        return;
                    }
                    state.lease.valid_until()
                };
                let _ = clock::timeout_at(until, notified).await;
            }
        }
    }

    /// Logs the loss. Not to be called under a lock: whoever listens may look at the guard.
    pub(crate) fn tell_loss(&self, loss: Loss) {
        let token = lock(&self.state).token;
        tracing::warn!(lock = %self.held.name, %token, %loss, "lock lost");
    }

    /// Takes in a renewal's answer and tells those who wait for a change.
    pub(crate) fn settle_renewal(
        &self,
        sent: Now,
        answer: &Result<Renewal>,
        now: Now,
        phase: Duration,
    ) -> Next {
        let mut state = lock(&self.state);
        state.in_flight = false;
        let outcome = answer.as_ref().map_or(Outcome::Failed, |answer| Outcome::Answered(*answer));
        let was_lost = state.lease.loss(now.boot).is_some();
        let next = state.lease.after_renewal(sent, outcome, now, phase);
        state.version += 1;
        let loss = state.lease.loss(now.boot);
        let is_news = state.phase == Phase::Held && !was_lost;
        let token = state.token;
        // Whoever listens to what is logged may look at the guard.
        drop(state);
        if is_news {
            if let Some(loss) = loss {
                self.tell_loss(loss);
            } else if let Err(error) = answer {
                tracing::warn!(lock = %self.held.name, %token, %error, "renewal failed, trying again");
            }
        }
        self.changed.notify_waiters();
        next
    }

    /// Waits until no renewal of it is under way.
    pub(crate) async fn idle(&self) {
        loop {
            let notified = self.changed.notified();
            tokio::pin!(notified);
            notified.as_mut().enable();
            if !lock(&self.state).in_flight {
                return;
            }
            notified.await;
        }
    }
}

/// The right to renew, given back if whatever had it is dropped before the answer.
#[derive(Debug)]
pub(crate) struct Turn(Option<Arc<Cell>>);

impl Turn {
    /// Takes the turn of `cell`, which must be free; the caller holds its state.
    pub(crate) fn take(cell: Arc<Cell>, state: &mut State) -> Self {
        debug_assert!(!state.in_flight);
        state.in_flight = true;
        Self(Some(cell))
    }

    /// Ends the turn without giving it back: its answer has come and does that.
    pub(crate) fn answered(mut self) -> Option<Arc<Cell>> {
        self.0.take()
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        let Some(cell) = self.0.take() else { return };
        let mut state = lock(&cell.state);
        state.in_flight = false;
        state.version += 1;
        drop(state);
        cell.changed.notify_waiters();
    }
}
