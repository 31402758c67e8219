//! One named lock, not yet taken.

use std::collections::BTreeMap;
use std::pin::pin;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use crate::cell::lock;
use crate::clock::{self, Instant};
use crate::error::{Error, ErrorKind, Result};
use crate::guard::Guard;
use crate::keeper::Keeper;
use crate::lease::{DEFAULT_TTL, Status};
use crate::local::{Entered, Holding, Line, Lines, Terms, Turn};
use crate::retry::Retry;
use crate::store::{HAND_OFF_TTL, check_ttl};
use crate::types::{
    Claim, Fairness, Holder, InvalidName, MAX_RECORD_BYTES, Name, Owner, Record, Released, Replication,
    Ticket,
};
use crate::wait::{self, Ended, Patience, Watcher};

/// How long a waiter with an owner waits before it looks for a deadlock.
const DEFAULT_DEADLOCK_AFTER: Duration = Duration::from_secs(1);
/// How long a waiter that rides out an outage waits before it looks again.
const OUTAGE_STEP: Duration = Duration::from_millis(50);
/// The most passes of one claim, which takes one token more.
const MAX_PASSES: u32 = 999_999;

/// A handle on one named lock. Cheap: making, cloning and dropping it does no I/O.
///
/// Each acquisition is a claim of its own: two tasks that lock one `Mutex` exclude each other like two machines.
#[derive(Clone, Debug)]
pub struct Mutex {
    keeper: Arc<Keeper>,
    name: std::result::Result<Name, InvalidName>,
    settings: Settings,
    /// The encoded record, made once from the settings.
    record: Arc<OnceLock<Result<Arc<str>>>>,
    lines: Arc<Lines>,
    /// The line of this process, once it is known.
    line: OnceLock<Arc<Line>>,
}

#[derive(Clone, Debug)]
struct Settings {
    ttl: Duration,
    renew: bool,
    max_hold: Option<Duration>,
    label: Option<String>,
    metadata: BTreeMap<String, String>,
    retry: Retry,
    max_wait: Option<Duration>,
    max_queue: Option<u32>,
    watcher: Option<Watcher>,
    owner: Option<Owner>,
    deadlock_after: Duration,
    fairness: Fairness,
    /// And whether they are required.
    replicas: Option<(Replication, bool)>,
}

impl Settings {
    fn wait_for(&mut self, count: u32, timeout: Duration, is_required: bool) {
        let on_disk = self.replicas.is_some_and(|(wish, _)| wish.on_disk);
        self.replicas = Some((Replication::new(count, timeout).on_disk(on_disk), is_required));
    }
}

impl Mutex {
    pub(crate) fn new(
        keeper: Arc<Keeper>,
        lines: Arc<Lines>,
        name: std::result::Result<Name, InvalidName>,
    ) -> Self {
        let settings = Settings {
            ttl: DEFAULT_TTL,
            renew: true,
            max_hold: None,
            label: None,
            metadata: BTreeMap::new(),
            retry: Retry::default(),
            max_wait: None,
            max_queue: None,
            watcher: None,
            owner: None,
            deadlock_after: DEFAULT_DEADLOCK_AFTER,
            fairness: Fairness::Fifo,
            replicas: None,
        };
        Self { keeper, name, settings, record: Arc::default(), lines, line: OnceLock::new() }
    }

    /// The same options for another name.
    pub(crate) fn named(&self, name: std::result::Result<Name, InvalidName>) -> Self {
        Self { name, line: OnceLock::new(), ..self.clone() }
    }

    /// How it tries again.
    pub(crate) fn policy(&self) -> &Retry {
        &self.settings.retry
    }

    /// The longest time to wait for it, if that is limited.
    pub(crate) fn longest_wait(&self) -> Option<Duration> {
        self.settings.max_wait
    }

    /// Where it is kept.
    pub(crate) fn location(&self) -> Arc<str> {
        self.keeper.store().location()
    }

    fn with(mut self, change: impl FnOnce(&mut Settings)) -> Self {
        change(&mut self.settings);
        self.record = Arc::default();
        self.line = OnceLock::new();
        self
    }

    /// Sets how long the lock outlives the last renewal: what a crash of the holder costs the others, at most.
    ///
    /// # Default
    /// 30 s, renewed every 3 s: ten renewals may fail before the lock is lost. Each store has a least and a most
    /// ([`Guarantees`](crate::Guarantees)); a TTL outside of them is an error when locking, before any I/O.
    #[must_use]
    pub fn ttl(self, ttl: Duration) -> Self {
        self.with(|settings| settings.ttl = ttl)
    }

    /// Sets whether the keeper renews the lock in the background while the guard lives.
    ///
    /// # Default
    /// True, since work that takes longer than expected is the common accident. Without it the lock ends after one TTL.
    #[must_use]
    pub fn renew(self, renew: bool) -> Self {
        self.with(|settings| settings.renew = renew)
    }

    /// Sets the longest time that one hold may last, however often it is renewed: the guard is then lost
    /// ([`Loss::MaxHold`](crate::Loss::MaxHold)) and the store frees the lock. Where a lock is passed on within the process
    /// ([`Fairness::LocalFirst`]), each holder has this time.
    ///
    /// # Default
    /// None: a stuck holder that still runs keeps its lock.
    #[must_use]
    pub fn max_hold(self, limit: Duration) -> Self {
        self.with(|settings| settings.max_hold = Some(limit))
    }

    /// Says why the lock is taken, for whoever looks at it.
    ///
    /// # Default
    /// None.
    #[must_use]
    pub fn label(self, label: impl Into<String>) -> Self {
        self.with(|settings| settings.label = Some(label.into()))
    }

    /// Adds something else to be shown with the lock. All of it together is limited to 4 KiB.
    ///
    /// # Default
    /// None.
    #[must_use]
    pub fn metadata(self, key: impl Into<String>, value: impl Into<String>) -> Self {
        self.with(|settings| drop(settings.metadata.insert(key.into(), value.into())))
    }

    /// Sets how a waiter spaces its tries where the store cannot wake it, and when it gives up. Where it stands in line
    /// it needs no tries; a policy that ends then ends the wait when its last try would have been due.
    ///
    /// # Default
    /// [`Retry::default`]: 4 ms to 256 ms, exponential with full jitter, without end.
    #[must_use]
    pub fn retry(self, retry: Retry) -> Self {
        self.with(|settings| settings.retry = retry)
    }

    /// Sets the longest time to wait for the lock: [`lock`](Self::lock) then fails with `Busy`, and
    /// [`lock_for`](Self::lock_for) gives `None`.
    ///
    /// # Default
    /// None: it waits as long as the retry policy goes.
    #[must_use]
    pub fn max_wait(self, limit: Duration) -> Self {
        self.with(|settings| settings.max_wait = Some(limit))
    }

    /// Sets how many may wait in line: one more is refused with [`ErrorKind::QueueFull`]. On stores without a line
    /// ([`Guarantees::fifo`](crate::Guarantees)) it has no effect.
    ///
    /// # Default
    /// None: the line is as long as it gets.
    #[must_use]
    pub fn max_queue(self, limit: u32) -> Self {
        self.with(|settings| settings.max_queue = Some(limit))
    }

    /// Sets whom to tell where a waiter stands: once when it has joined the line, and when the store says so again
    /// (every few seconds at most). It is called in the waiter's task: let it be quick.
    ///
    /// # Default
    /// Nobody.
    ///
    /// ```
    /// # use leasehold::{Locks, stores::memory::MemoryStore};
    /// # let locks = Locks::over(std::sync::Arc::new(MemoryStore::new()))?;
    /// let mutex = locks.mutex("report").on_wait(|ticket| {
    ///     eprintln!("waiting for {}, {:?} ahead", ticket.name, ticket.ahead());
    /// });
    /// # Ok::<(), leasehold::Error>(())
    /// ```
    #[must_use]
    pub fn on_wait(self, tell: impl Fn(&Ticket) + Send + Sync + 'static) -> Self {
        self.with(|settings| settings.watcher = Some(Watcher(Arc::new(tell))))
    }

    /// Says which unit of work locks it: it is shown to others, and the lock takes part in deadlock detection. Where units
    /// of work, in any number of processes, wait for each other in a circle, the one that was the last to wait gets
    /// [`ErrorKind::Deadlock`] with the whole circle spelled out; its claim is withdrawn, and the others go on as soon as it
    /// releases what it holds.
    ///
    /// It needs a store with a line ([`Guarantees::fifo`](crate::Guarantees)): a waiter that only polls cannot be seen by
    /// others. Circles over several stores are not seen either, and waits for something else than a lock are not known.
    ///
    /// # Default
    /// None: each claim is its own owner and takes no part.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> leasehold::Result<()> {
    /// use leasehold::{ErrorKind, Owner};
    ///
    /// let locks = leasehold::connect("memory:").await?;
    /// # async fn transfer(locks: &leasehold::Locks, from: &str, to: &str) -> leasehold::Result<u32> {
    /// let mut tries = 0;
    /// loop {
    ///     tries += 1;
    ///     let owner = Owner::new(format!("transfer from {from} to {to}"));
    ///     let _from = locks.mutex(from).owner(&owner).lock().await?;
    ///     match locks.mutex(to).owner(&owner).lock().await {
    ///         Ok(_to) => return Ok(tries), // both are held: do the work
    ///         // Somebody transfers the other way round. Letting go of `from` lets them go on.
    ///         Err(error) if error.kind() == ErrorKind::Deadlock => continue,
    ///         Err(error) => return Err(error),
    ///     }
    /// }
    /// # }
    /// # transfer(&locks, "a", "b").await?;
    /// # Ok(()) }
    /// ```
    #[must_use]
    pub fn owner(self, owner: &Owner) -> Self {
        self.with(|settings| settings.owner = Some(owner.clone()))
    }

    /// Sets how long a waiter with an [`owner`](Self::owner) stands in line before it looks for a deadlock; while it waits
    /// on, it looks again every three seconds. `Duration::MAX`: never; then a circle in which it was the last to wait
    /// stays.
    ///
    /// # Default
    /// 1 s: few waits are so long, and those that are shorter cost nothing. A look reads the waits of the owners that it
    /// leads to, one request each, 64 owners at most, and a circle is read twice.
    #[must_use]
    pub fn deadlock_after(self, wait: Duration) -> Self {
        self.with(|settings| settings.deadlock_after = wait)
    }

    /// Sets who is next when several wait: see [`Fairness`], with what each promises and what it costs.
    ///
    /// # Default
    /// [`Fairness::Fifo`]: nobody is overtaken.
    #[must_use]
    pub fn fairness(self, fairness: Fairness) -> Self {
        self.with(|settings| settings.fairness = fairness)
    }

    /// Waits after each grant, also one that was handed over, until `count` replicas of the store have acknowledged it, or the
    /// time is up (never more than a third of the TTL). The lock is held either way; [`Guard::replicas`] says how many it were.
    ///
    /// It makes it less likely that a failover forgets the lock, and proves nothing: the replica that is promoted may be another
    /// one, a lock can be forgotten together with its replica's memory, and later renewals are not waited for. Only a resource
    /// that checks the [`fencing token`](Guard::fencing_token) is safe.
    ///
    /// # Default
    /// None is waited for, and nothing is spent on it.
    ///
    /// # Errors
    /// Told by the first use: `Invalid` for none or no time, `Unsupported` on a store that has no replicas (all but Redis), `Lost`
    /// if the lock was gone before they were waited for. The lock is then given back.
    ///
    /// # Round trips
    /// One more for each grant, on a connection of its own, and one dial for each of those that wait at the same time.
    #[must_use]
    pub fn replicas(self, count: u32, timeout: Duration) -> Self {
        self.with(|settings| settings.wait_for(count, timeout, false))
    }

    /// As [`replicas`](Self::replicas), but refuses a lock that fewer have acknowledged in time, or of which that is not known: it
    /// is given back, and locking fails with `Unavailable` (or `Unknown`).
    ///
    /// # Default
    /// Not required.
    #[must_use]
    pub fn require_replicas(self, count: u32, timeout: Duration) -> Self {
        self.with(|settings| settings.wait_for(count, timeout, true))
    }

    /// Sets whether the replicas that are waited for must have the lock on their disks too, which takes as long as their
    /// disks do. It needs a server with `WAITAOF` (Redis 7.2, Valkey), and replicas with an append-only file. It follows
    /// [`replicas`](Self::replicas) or [`require_replicas`](Self::require_replicas); without them it has no effect.
    ///
    /// # Default
    /// False: memory will do.
    #[must_use]
    pub fn replicas_on_disk(self, on_disk: bool) -> Self {
        self.with(|settings| {
            if let Some((wish, _)) = &mut settings.replicas {
                wish.on_disk = on_disk;
            }
        })
    }

    /// The name of the lock.
    ///
    /// # Errors
    /// [`InvalidName`] if [`Locks::mutex`](crate::Locks::mutex) was given a bad one.
    pub fn name(&self) -> std::result::Result<&Name, InvalidName> {
        self.name.as_ref().map_err(Clone::clone)
    }

    /// Waits for the lock, as long as the retry policy goes.
    ///
    /// # Errors
    /// `Unavailable` if the store cannot be reached at the first look (it fails fast; while waiting it rides out an
    /// outage of one TTL), `Unknown` if answers were lost, `Busy` if the retry policy ended, `QueueFull`, `Deadlock` (only
    /// with an [`owner`](Self::owner)), `Rejected`, `Invalid`.
    ///
    /// # Cancel safety
    /// Safe: dropped at any moment, it leaves neither a hold nor a place in a queue; the release, where one may be needed,
    /// goes on in the background.
    ///
    /// # Round trips
    /// One if the lock is free.
    pub async fn lock(&self) -> Result<Guard> {
        match self.acquire(Some(&self.settings.retry), Instant::FAR).await? {
            Ok(guard) => Ok(guard),
            Err(holder) => {
                let who = holder.map_or_else(String::new, |holder| format!(": held by {holder}"));
                Err(self.error(
                    ErrorKind::Busy,
                    format!("the maximum wait or the retry policy ended before the lock was free{who}"),
                ))
            }
        }
    }

    /// Takes the lock if it is free now; `None` if somebody else has it. Neither waits nor queues.
    ///
    /// # Errors
    /// As [`lock`](Self::lock), but never `Busy`.
    ///
    /// # Cancel safety
    /// As [`lock`](Self::lock).
    ///
    /// # Round trips
    /// One.
    pub async fn try_lock(&self) -> Result<Option<Guard>> {
        Ok(self.acquire(None, Instant::FAR).await?.ok())
    }

    /// Waits for the lock for `patience` at most; `None` if somebody else had it all the time. At least one look is taken.
    /// Who stood in line has left it by then, for which one more round trip is waited, 100 ms at most; should that not do, the
    /// claim is withdrawn in the background.
    ///
    /// # Errors
    /// As [`lock`](Self::lock), but never `Busy`; `Unknown` if the store had not answered once when the time was up.
    ///
    /// # Cancel safety
    /// As [`lock`](Self::lock).
    ///
    /// # Round trips
    /// One if the lock is free.
    pub async fn lock_for(&self, patience: Duration) -> Result<Option<Guard>> {
        if patience.is_zero() {
            return self.try_lock().await;
        }
        let deadline = clock::now().plus(patience);
        Ok(self.acquire(Some(&self.settings.retry), deadline).await?.ok())
    }

    /// Waits for the lock, runs `work` under it, and releases it after the work has ended.
    ///
    /// Should the lock be lost, the work is dropped at its next await, before the lease can end, and only then the lock is
    /// let go. Work that blocks its thread cannot be stopped: give it the fencing token.
    ///
    /// # Errors
    /// As [`lock`](Self::lock); [`ErrorKind::Lost`] if the lock was lost before the work was done: its result, if it got
    /// that far, is dropped too, since it was not reached under the lock.
    ///
    /// # Cancel safety
    /// Safe: dropped, the work is dropped first, then the lock released.
    ///
    /// # Round trips
    /// Two if the lock is free.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> leasehold::Result<()> {
    /// let locks = leasehold::connect("memory:").await?;
    /// let sum = locks.mutex("report").run(async |held| held.fencing_token().get() + 1).await?;
    /// assert!(sum > 1);
    /// # Ok(()) }
    /// ```
    pub async fn run<T>(&self, work: impl AsyncFnOnce(&Guard) -> T) -> Result<T> {
        let guard = self.lock().await?;
        let outcome = unless_lost(guard.lost(), work(&guard)).await;
        let in_time = guard.status() != Status::Lost;
        let answer = guard.unlock().await;
        match outcome {
            Err(loss) => {
                Err(self.error(ErrorKind::Lost, format!("the work was stopped, the lock was lost: {loss}")))
            }
            Ok(_) if !in_time || matches!(answer, Ok(Released::NotHeld | Released::HeldByOther)) => {
                Err(self
                    .error(ErrorKind::Lost, "the work ended, but the lock had been lost before".to_owned()))
            }
            // An unanswered release takes nothing from work that was done in time; the keeper releases on.
            Ok(out) => Ok(out),
        }
    }

    /// Claims it: the guard, or who had it when the patience ended. Without a policy it neither waits nor queues.
    pub(crate) async fn acquire(
        &self,
        retry: Option<&Retry>,
        deadline: Instant,
    ) -> Result<std::result::Result<Guard, Option<Holder>>> {
        let deadline = match self.settings.max_wait {
            Some(limit) if retry.is_some() => deadline.min(clock::now().plus(limit)),
            _ => deadline,
        };
        let line = if retry.is_some() { self.line()? } else { None };
        let Some((retry, line)) = retry.zip(line) else {
            return Ok(self.claim(retry, deadline, 1).await?.map(Guard::new));
        };
        // Boxed, for what is rare must not make the common case carry its room.
        Box::pin(self.enter(&line, retry, deadline)).await
    }

    /// Waits in the line of this process, and claims it at the store when its turn comes there.
    async fn enter(
        &self,
        line: &Arc<Line>,
        retry: &Retry,
        deadline: Instant,
    ) -> Result<std::result::Result<Guard, Option<Holder>>> {
        match line.enter(retry, deadline).await? {
            Entered::Passed(holding) => Ok(Ok(Guard::new(holding))),
            Entered::Over => Ok(Err(None)),
            Entered::Turn(turn) => match self.claim_in_turn(retry, deadline, &turn).await {
                Ok(claimed) => Ok(claimed.map(|holding| Guard::new(holding.shared_with(turn)))),
                Err(error) => {
                    if error.is_transient() && clock::now() < deadline {
                        turn.fail(&error);
                    }
                    Err(error)
                }
            },
        }
    }

    /// Claims it for a line. One who waited in it before rides out an outage of one TTL, as every waiter does.
    async fn claim_in_turn(
        &self,
        retry: &Retry,
        deadline: Instant,
        turn: &Turn,
    ) -> Result<std::result::Result<Holding, Option<Holder>>> {
        let until = clock::now().plus(self.settings.ttl).min(deadline);
        loop {
            match self.claim(Some(retry), deadline, turn.tokens()).await {
                Err(error) if turn.was_awaited() && error.is_transient() && clock::now() < until => {
                    clock::sleep_until(clock::now().plus(OUTAGE_STEP).min(until)).await;
                }
                // The time was up while others of this process had it, and the store could not be asked any more.
                Err(error) if turn.was_awaited() && error.is_transient() && clock::now() >= deadline => {
                    return Ok(Err(None));
                }
                ended => return ended,
            }
        }
    }

    async fn claim(
        &self,
        retry: Option<&Retry>,
        deadline: Instant,
        tokens: u32,
    ) -> Result<std::result::Result<Holding, Option<Holder>>> {
        let mut claim = Claim::new(self.name.clone()?, clock::claim_id(), self.settings.ttl)
            .with_record(self.record.get_or_init(|| self.encode_record()).clone()?)
            .with_tokens(tokens);
        claim.queue = retry.is_some();
        claim.queue_limit = self.settings.max_queue;
        if let Some((wish, _)) = self.settings.replicas
            && (wish.replicas == 0 || wish.timeout < Duration::from_millis(1))
        {
            let what = "to wait for replicas takes one at least, and a millisecond at least";
            return Err(self.error(ErrorKind::Invalid, what.to_owned()));
        }
        let guarantees = self.keeper.store().guarantees();
        check_ttl(&guarantees, claim.ttl).map_err(|bad| self.tell(bad))?;
        if let Some(limit) = self.settings.max_hold {
            // A holder that is stuck does not give the lock back: the store must free it.
            claim.ttl = claim.ttl.min(limit.max(guarantees.least_ttl));
        }
        let Settings { watcher, owner, deadlock_after, .. } = &self.settings;
        let owner = owner.as_ref().map(|owner| (owner, *deadlock_after));
        let patience = Patience { retry, deadline, watcher: watcher.as_ref(), owner };
        match wait::acquire(&self.keeper, &claim, patience).await? {
            Ended::Busy(holder) => Ok(Err(holder)),
            Ended::Won(won) => {
                let Settings { renew, max_hold, .. } = self.settings;
                let cell = self.keeper.keep(&claim, &won.grant, won.sent, renew, max_hold, won.suspect);
                tracing::debug!(lock = %claim.name, claim = %claim.id, token = %won.grant.token, "acquired");
                let holding = Holding::new(self.keeper.clone(), cell, won.grant.token);
                let is_short = won.was_handed || won.grant.ttl <= HAND_OFF_TTL;
                if !renew && won.grant.ttl < claim.ttl && is_short {
                    // What is handed over is short at first, and nobody else will lengthen it.
                    let extend = self.keeper.renew_now(holding.cell(), |held| held.extend = Some(claim.ttl));
                    let _ = Box::pin(extend).await;
                }
                if let Some((wish, is_required)) = self.settings.replicas {
                    let lease = won.grant.ttl.min(claim.ttl);
                    return Box::pin(self.replicated(holding, wish, is_required, lease)).await.map(Ok);
                }
                Ok(Ok(holding))
            }
        }
    }

    /// The same holding, once the replicas have it that are waited for.
    async fn replicated(
        &self,
        holding: Holding,
        wish: Replication,
        is_required: bool,
        lease: Duration,
    ) -> Result<Holding> {
        let bounded = Replication { timeout: wish.timeout.min(lease / 3), ..wish };
        let answer = self.keeper.store().replicate(holding.cell().held(), &bounded).await;
        let refused = match answer {
            Ok(count) if count >= wish.replicas || !is_required => {
                lock(&holding.cell().state).replicas = Some(count);
                return Ok(holding);
            }
            Ok(count) => self
                .error(
                    ErrorKind::Unavailable,
                    format!(
                        "{count} of the {} replicas that are required had the lock after {:?}, and it was given back",
                        wish.replicas, bounded.timeout
                    ),
                )
                .advise("are they running and linked to their master?"),
            Err(error) if error.is_transient() && !is_required => {
                tracing::warn!(lock = %holding.cell().held().name, %error, "its replicas could not be asked");
                lock(&holding.cell().state).replicas = Some(0);
                return Ok(holding);
            }
            Err(error) => self.tell(error),
        };
        // Should this not be answered, the keeper goes on releasing.
        let _ = holding.unlock().await;
        Err(refused)
    }

    /// The line of this process, where its locks may be passed on.
    fn line(&self) -> Result<Option<Arc<Line>>> {
        if let Some(line) = self.line.get() {
            return Ok(Some(line.clone()));
        }
        let passes = match self.settings.fairness {
            Fairness::LocalFirst { max } => max.min(MAX_PASSES),
            Fairness::Fifo => 0,
        };
        // Without renewals what is left of the lease gets less with every holder; without a line there is no turn of
        // others to be kept.
        if passes == 0 || !self.settings.renew || !self.keeper.store().guarantees().fifo {
            return Ok(None);
        }
        let terms = Terms {
            name: self.name.clone()?,
            record: self.record.get_or_init(|| self.encode_record()).clone()?,
            ttl: self.settings.ttl,
            max_hold: self.settings.max_hold,
            replicas: self.settings.replicas,
            passes,
        };
        let line = self.lines.line(terms);
        Ok(Some(self.line.get_or_init(|| line).clone()))
    }

    fn encode_record(&self) -> Result<Arc<str>> {
        let record = Record {
            owner: self.settings.owner.as_ref().map(Owner::to_string),
            host: host_name().to_owned(),
            pid: std::process::id(),
            label: self.settings.label.clone(),
            metadata: self.settings.metadata.clone(),
        };
        let text = record.encode();
        if text.len() > MAX_RECORD_BYTES {
            return Err(Error::invalid(format!(
                "label and metadata take {} bytes, at most {MAX_RECORD_BYTES} are kept with a lock",
                text.len()
            )));
        }
        Ok(text.into())
    }

    fn error(&self, kind: ErrorKind, what: String) -> Error {
        self.tell(Error::new(kind, what))
    }

    /// The error, naming store and lock.
    fn tell(&self, error: Error) -> Error {
        let error = error.on_store(&self.keeper.store().location());
        match &self.name {
            Ok(name) => error.for_name(name),
            Err(_) => error,
        }
    }
}

/// What `work` gives, or the loss if that comes before: the work is dropped then.
pub(crate) async fn unless_lost<T, L>(
    lost: impl Future<Output = L>,
    work: impl Future<Output = T>,
) -> std::result::Result<T, L> {
    let (mut lost, mut work) = (pin!(lost), pin!(work));
    std::future::poll_fn(|cx| {
        // The loss first: work that is ready in the same moment was not finished under the lock for sure.
        if let std::task::Poll::Ready(loss) = lost.as_mut().poll(cx) {
            return std::task::Poll::Ready(Err(loss));
        }
        work.as_mut().poll(cx).map(Ok)
    })
    .await
}

fn host_name() -> &'static str {
    static NAME: OnceLock<String> = OnceLock::new();
    NAME.get_or_init(|| rustix::system::uname().nodename().to_string_lossy().into_owned())
}
