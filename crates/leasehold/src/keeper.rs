//! The keeper: one thread for each `Locks`, with a runtime of its own, that renews what is held in batches, releases what
//! was dropped, and notices what was lost.
//!
//! It is the only one that renews, and all connection drivers live on its runtime, so that a user's blocked executor,
//! dropped runtime or panic costs no lock.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use tokio::runtime::{Builder, Handle, Runtime};
use tokio::sync::{Notify, oneshot};

use crate::cell::{Cell, Phase, Turn, lock};
use crate::clock::{self, Instant, Now};
use crate::error::{Error, ErrorKind, Result};
use crate::lease::{Lease, Loss, Next, drift};
use crate::store::Store;
use crate::types::{Claim, ClaimId, Grant, Held, Released, Renewal};

/// How long the last handle waits, unless set, for releases still under way.
pub(crate) const DEFAULT_CLOSE_TIMEOUT: Duration = Duration::from_millis(500);
/// Between two times at which all that is held is confirmed because the store was disturbed: at first, and at most where it is
/// disturbed again and again, as by a connection that breaks as soon as it is made.
const CALM_LEAST: Duration = Duration::from_millis(100);
const CALM_MOST: Duration = Duration::from_secs(1);
/// The most claims in one call of the store's `renew`.
const BATCH: usize = 1_000;

/// The runtime of a keeper before it has a store: connections are dialled on it.
#[derive(Debug)]
pub(crate) struct Bench {
    runtime: Handle,
    store: oneshot::Sender<Arc<Shared>>,
}

impl Bench {
    /// Starts the thread. Dropping the bench ends it.
    ///
    /// # Errors
    /// `Unavailable` if the operating system gives no thread.
    pub(crate) fn start() -> Result<Self> {
        let unable =
            |e| Error::new(ErrorKind::Unavailable, "could not start the keeper's thread").caused_by(e);
        let runtime: Runtime = Builder::new_current_thread().enable_all().build().map_err(unable)?;
        let handle = runtime.handle().clone();
        let (store, ready) = oneshot::channel::<Arc<Shared>>();
        std::thread::Builder::new()
            .name("leasehold-keeper".into())
            .spawn(move || {
                runtime.block_on(async {
                    if let Ok(shared) = ready.await {
                        shared.serve().await;
                    }
                });
                // A store's blocked worker must not hold up the end of the thread.
                runtime.shutdown_background();
            })
            .map_err(unable)?;
        Ok(Self { runtime: handle, store })
    }

    /// Where connection drivers are to live.
    pub(crate) fn runtime(&self) -> &Handle {
        &self.runtime
    }

    /// Takes up the keeper's work for `store`.
    pub(crate) fn keep(self, store: Arc<dyn Store>, close_timeout: Duration) -> Arc<Keeper> {
        let shared = Arc::new(Shared {
            store,
            table: Mutex::new(Table {
                due: BTreeMap::new(),
                releases: Vec::new(),
                outstanding: 0,
                planned: Instant::FAR,
                closing: false,
            }),
            bell: Notify::new(),
            idle: Condvar::new(),
            idle_bell: Notify::new(),
            disturbed: Notify::new(),
            phase: clock::jitter(Duration::from_secs(3600)),
        });
        // The thread waits for exactly this; it can only be gone if it panicked, and then nothing is ever renewed.
        let _ = self.store.send(shared.clone());
        Arc::new(Keeper { shared, close_timeout })
    }
}

/// The handle that `Locks`, mutexes and guards share. The last one dropped waits, bounded, for releases under way.
pub(crate) struct Keeper {
    shared: Arc<Shared>,
    close_timeout: Duration,
}

#[derive(Debug)]
struct Shared {
    store: Arc<dyn Store>,
    table: Mutex<Table>,
    bell: Notify,
    idle: Condvar,
    idle_bell: Notify,
    /// Rung for releases that wait to be tried again.
    disturbed: Notify,
    /// Where the renewal grid of this process lies, so that processes do not renew in step.
    phase: Duration,
}

#[derive(Debug)]
struct Table {
    /// What is to be looked at, by time.
    due: BTreeMap<(Instant, ClaimId), Arc<Cell>>,
    /// Posted by drops, to be begun.
    releases: Vec<(Held, Instant)>,
    /// Releases posted and not finished.
    outstanding: usize,
    /// Until when the thread sleeps.
    planned: Instant,
    closing: bool,
}

impl fmt::Debug for Keeper {
    // Not what it keeps: that may be ten thousand locks.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Keeper").field(&self.shared.store.location()).finish()
    }
}

impl Keeper {
    /// The store.
    pub(crate) fn store(&self) -> &Arc<dyn Store> {
        &self.shared.store
    }

    /// Begins to keep what `claim` was granted in answer to a request sent at `sent`.
    pub(crate) fn keep(
        &self,
        claim: &Claim,
        grant: &Grant,
        sent: Now,
        renewing: bool,
        max_hold: Option<Duration>,
        suspect: bool,
    ) -> Arc<Cell> {
        let mut held = Held::new(claim, grant);
        held.suspect = suspect;
        // A presentation that comes late may put it in line behind its own hold.
        held.waiting = suspect && claim.queue;
        let lease = Lease::new(sent, claim.ttl, grant.ttl, renewing, max_hold);
        let first = lease.first(clock::now(), self.shared.phase);
        let cell = Arc::new(Cell::new(held, grant.token, lease));
        if let Next::At(due) = first {
            self.shared.plan(&cell, due);
        }
        cell
    }

    /// Posts the release of what `held` may hold, to be tried until `until`. Never blocks.
    pub(crate) fn post_release(&self, held: Held, until: Instant) {
        let mut table = lock(&self.shared.table);
        table.outstanding += 1;
        table.releases.push((held, until));
        drop(table);
        self.shared.bell.notify_one();
    }

    /// Waits until every release under way has ended.
    pub(crate) async fn settled(&self) {
        loop {
            let notified = self.shared.idle_bell.notified();
            tokio::pin!(notified);
            notified.as_mut().enable();
            if lock(&self.shared.table).outstanding == 0 {
                return;
            }
            notified.await;
        }
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        let mut table = lock(&self.shared.table);
        table.closing = true;
        self.shared.bell.notify_one();
        let _unfinished = self
            .shared
            .idle
            .wait_timeout_while(table, self.close_timeout, |table| table.outstanding > 0)
            .unwrap_or_else(PoisonError::into_inner);
    }
}

impl Shared {
    fn plan(&self, cell: &Arc<Cell>, due: Instant) {
        let mut table = lock(&self.table);
        let mut state = lock(&cell.state);
        if state.phase != Phase::Held {
            return;
        }
        if let Some(old) = state.due.replace(due) {
            table.due.remove(&(old, cell.held.id));
        }
        table.due.insert((due, cell.held.id), cell.clone());
        if due < table.planned {
            table.planned = due;
            self.bell.notify_one();
        }
    }

    fn unplan(&self, cell: &Cell) {
        let mut table = lock(&self.table);
        if let Some(due) = lock(&cell.state).due.take() {
            table.due.remove(&(due, cell.held.id));
        }
    }

    async fn serve(self: Arc<Self>) {
        let (mut hastened, mut calm) = (clock::now(), CALM_LEAST);
        let mut disturbed = Box::pin(self.disturbed_after(hastened));
        loop {
            let (batches, releases, next, closing) = self.collect();
            for batch in batches {
                tokio::spawn(self.clone().renew(batch));
            }
            for (held, until) in releases {
                tokio::spawn(self.clone().release(held, until));
            }
            if closing && lock(&self.table).outstanding == 0 {
                return;
            }
            tokio::select! {
                () = self.bell.notified() => {}
                () = clock::sleep_until(next) => {}
                () = &mut disturbed => {
                    let now = clock::now();
                    calm = if now.since(hastened) > CALM_MOST * 2 { CALM_LEAST } else { (calm * 2).min(CALM_MOST) };
                    hastened = now;
                    disturbed.set(self.disturbed_after(now.plus(calm)));
                    self.hasten();
                }
            }
        }
    }

    /// Resolves when the store is disturbed, but not before `calm`: what happened until then is heard of then.
    async fn disturbed_after(&self, calm: Instant) {
        clock::sleep_until(calm).await;
        self.store.disturbed().await;
    }

    /// Has everything that is kept confirmed at once, and what is to be released tried again.
    fn hasten(&self) {
        self.disturbed.notify_waiters();
        let now = clock::now();
        let mut table = lock(&self.table);
        let due = std::mem::take(&mut table.due);
        for ((at, id), cell) in due {
            // An earlier moment than planned: whatever is due already stays in its order.
            let soon = at.min(now);
            lock(&cell.state).due = Some(soon);
            table.due.insert((soon, id), cell);
        }
        table.planned = now;
    }

    /// Takes what is due now: batches to renew, each of one TTL and of names that go together, and releases to begin.
    #[expect(clippy::type_complexity, reason = "private, and each part is named at the only call")]
    fn collect(&self) -> (Vec<Vec<(Turn, Held)>>, Vec<(Held, Instant)>, Instant, bool) {
        let now = clock::now();
        let mut together: HashMap<(Duration, u64), Vec<(Turn, Held)>> = HashMap::new();
        let mut lost = Vec::new();
        let mut table = lock(&self.table);
        while let Some(entry) = table.due.first_entry() {
            if entry.key().0 > now {
                break;
            }
            let cell = entry.remove();
            let mut state = lock(&cell.state);
            state.due = None;
            if state.phase != Phase::Held {
                continue;
            }
            if let Some(loss) = state.lease.loss(now) {
                state.version += 1;
                drop(state);
                lost.push((cell, loss));
                continue;
            }
            if let Some(wait) = state.put_off(now) {
                let soon = now.plus(wait);
                state.due = Some(soon);
                drop(state);
                table.due.insert((soon, cell.held.id), cell);
                continue;
            }
            let turn = Turn::take(cell.clone(), &mut state);
            let mut held = cell.held.clone();
            held.extend = state.lease.extension(now);
            let ttl = state.lease.ttl();
            drop(state);
            let company = self.store.company(&held.name);
            together.entry((ttl, company)).or_default().push((turn, held));
        }
        let first = table.due.first_key_value().map_or(Instant::FAR, |((due, _), _)| *due);
        // What was planned stays planned, also when the lock that it was for is gone: the next lock then finds the thread
        // due early enough and need not wake it. Waking once for nothing is cheaper than once for each lock.
        let next = if table.planned > now { first.min(table.planned) } else { first };
        table.planned = next;
        let releases = std::mem::take(&mut table.releases);
        let closing = table.closing;
        drop(table);
        // Whoever is told, or listens to what is logged, may come back to the table.
        for (cell, loss) in lost {
            cell.changed.notify_waiters();
            cell.tell_loss(loss);
        }
        let mut batches = Vec::new();
        for (_, mut cells) in together {
            while !cells.is_empty() {
                let rest = cells.split_off(cells.len().min(BATCH));
                batches.push(std::mem::replace(&mut cells, rest));
            }
        }
        (batches, releases, next, closing)
    }

    async fn renew(self: Arc<Self>, batch: Vec<(Turn, Held)>) {
        let (turns, held): (Vec<_>, Vec<_>) = batch.into_iter().unzip();
        let mut renewing = Renewing { shared: self, turns, sent: clock::look() };
        let answers = renewing.shared.store.renew(&held).await;
        renewing.settle(answers);
    }

    /// Ends a turn with the answer to its renewal, and plans the next.
    fn settle(&self, turn: Turn, sent: Now, answer: &Result<Renewal>, now: Now) {
        let Some(cell) = turn.answered() else { return };
        if let Next::At(due) = cell.settle_renewal(sent, answer, now, self.phase) {
            self.plan(&cell, due);
        }
    }

    /// Releases until the store answers or the lease has ended anyway.
    async fn release(self: Arc<Self>, held: Held, until: Instant) {
        let _outstanding = Outstanding(&self);
        let mut back_off = Duration::from_millis(20);
        loop {
            match self.store.release(&held).await {
                Ok(answer) => {
                    tracing::debug!(lock = %held.name, claim = %held.id, ?answer, "released after a drop");
                    break;
                }
                Err(error) => {
                    tracing::debug!(lock = %held.name, claim = %held.id, %error, "release failed, trying again");
                }
            }
            let again = clock::now().plus(back_off);
            if again >= until {
                tracing::warn!(lock = %held.name, claim = %held.id, "could not release; it ends by its TTL");
                break;
            }
            let _ = clock::timeout_at(again, self.disturbed.notified()).await;
            back_off = (back_off * 2).min(Duration::from_secs(1));
        }
    }
}

/// A batch whose renewal is under way. Each of its claims is settled, whatever becomes of it: also if the store panics.
struct Renewing {
    shared: Arc<Shared>,
    turns: Vec<Turn>,
    sent: Now,
}

impl Renewing {
    fn settle(&mut self, answers: Vec<Result<Renewal>>) {
        let now = clock::look();
        let mut answers = answers.into_iter();
        for turn in std::mem::take(&mut self.turns) {
            let answer = answers.next().unwrap_or_else(|| Err(Error::new(ErrorKind::Unknown, "no answer")));
            self.shared.settle(turn, self.sent, &answer, now);
        }
    }
}

impl Drop for Renewing {
    fn drop(&mut self) {
        self.settle(Vec::new());
    }
}

/// A release under way in the background: counted until it has ended, however it does.
struct Outstanding<'a>(&'a Shared);

impl Drop for Outstanding<'_> {
    fn drop(&mut self) {
        let mut table = lock(&self.0.table);
        table.outstanding -= 1;
        let idle = table.outstanding == 0;
        drop(table);
        if idle {
            self.0.idle.notify_all();
            self.0.idle_bell.notify_waiters();
            self.0.bell.notify_one();
        }
    }
}

/// Operations of a guard on what it holds.
impl Keeper {
    /// Asks the store now: extends by `extension` (`None`: only confirms), bound as `binding` says from then on.
    ///
    /// # Errors
    /// `Lost` if it is lost, else the store's.
    pub(crate) async fn renew_now(&self, cell: &Arc<Cell>, adjust: impl Fn(&mut Held)) -> Result<Duration> {
        let turn = loop {
            cell.idle().await;
            let mut state = lock(&cell.state);
            if let Some(loss) = state.lease.loss(clock::now()) {
                return Err(lost_error(&cell.held, loss));
            }
            if !state.in_flight {
                break Turn::take(cell.clone(), &mut state);
            }
        };
        let sent = clock::look();
        let mut held = cell.held.clone();
        adjust(&mut held);
        held.extend = held.extend.and_then(|wanted| lock(&cell.state).lease.bounded(sent.boot, wanted));
        let answer = self.store().renew(std::slice::from_ref(&held)).await;
        let answer =
            answer.into_iter().next().unwrap_or_else(|| Err(Error::new(ErrorKind::Unknown, "no answer")));
        self.shared.settle(turn, sent, &answer, clock::look());
        let _ = answer?;
        let mut state = lock(&cell.state);
        let now = clock::now();
        match state.lease.loss(now) {
            Some(loss) => Err(lost_error(&cell.held, loss)),
            None => Ok(state.lease.remaining(now)),
        }
    }

    /// Ends the keeping: nothing of it is renewed after this. What comes next is up to the caller.
    fn stop(&self, cell: &Cell) {
        lock(&cell.state).phase = Phase::Done;
        self.shared.unplan(cell);
    }

    /// Stops keeping it and leaves it to its TTL.
    pub(crate) fn leave(&self, cell: &Cell) {
        self.stop(cell);
    }

    /// Posts its release.
    pub(crate) fn drop_lock(&self, cell: &Cell) {
        self.stop(cell);
        // Nothing of it is left to free, unless a request of it is still under way: that one must be forbidden.
        let gone = lock(&cell.state).lease.loss(clock::now()) == Some(Loss::Removed);
        if !gone || cell.held.suspect {
            self.post_release(cell.held.clone(), release_deadline(cell));
        }
    }

    /// Releases it and says how it stood. If this future is dropped, or no answer came, the keeper goes on releasing.
    ///
    /// # Errors
    /// The store's. After `Unknown` or `Unavailable` the keeper tries on until the lease has ended.
    pub(crate) async fn release_now(&self, cell: &Arc<Cell>) -> Result<Released> {
        self.stop(cell);
        let armed = Releasing { keeper: self, cell };
        let mut answer = self.store().release(&cell.held).await;
        if let Err(error) = &answer
            && error.is_transient()
        {
            // A server that restarted closes its connections: the second try, on a new one, is the answer.
            let again = self.store().release(&cell.held).await;
            if matches!(again, Ok(Released::Released)) || error.kind() == ErrorKind::Unavailable {
                answer = again;
            } else if again.is_ok() {
                // It is gone, but whether by our first request or before it nobody can say.
                std::mem::forget(armed);
                return answer;
            }
        }
        if answer.is_ok() {
            std::mem::forget(armed);
            // A renewal that was sent before is answered by now or will be soon; after this nothing more is sent.
            cell.idle().await;
        }
        answer
    }
}

fn lost_error(held: &Held, loss: Loss) -> Error {
    Error::new(ErrorKind::Lost, format!("the lock was lost: {loss}")).for_name(&held.name)
}

/// When even a release that never got through has become pointless: the store may have run a renewal just now whose
/// answer did not come.
fn release_deadline(cell: &Cell) -> Instant {
    let state = lock(&cell.state);
    let ttl = state.lease.ttl();
    state.lease.valid_until().plus(drift(ttl)).max(clock::now().plus(ttl).plus(Duration::from_secs(1)))
}

/// A release under way: dropped before its answer, it is handed to the keeper.
struct Releasing<'a> {
    keeper: &'a Keeper,
    cell: &'a Arc<Cell>,
}

impl Drop for Releasing<'_> {
    fn drop(&mut self) {
        self.keeper.post_release(self.cell.held.clone(), release_deadline(self.cell));
    }
}
