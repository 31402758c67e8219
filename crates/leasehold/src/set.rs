//! Several locks at once, all or nothing.
//!
//! All names are presented at once. If some are busy, those before the first busy one, in the order of their bytes, are
//! kept; the others are given back, the busy one is waited for, and then all later ones are presented at once again.
//! So whoever waits holds smaller names only, and sets cannot wait for each other in a circle, in whatever order they were
//! asked for. Each wait adds a name to those that are kept: a set of so many names waits in so many lines at most.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::future::Future;
use std::time::Duration;

use futures_util::future::{join, join_all};
use futures_util::stream::{FuturesUnordered, StreamExt as _};

use crate::clock::{self, Instant};
use crate::error::{Error, ErrorKind, Result};
use crate::guard::Guard;
use crate::lease::{Loss, Status};
use crate::mutex::{Mutex, unless_lost};
use crate::retry::Retry;
use crate::types::{FencingToken, Holder, InvalidName, Name, Owner, Released, Ticket};

/// How long it is waited to hear that what cannot be kept was given back; it goes on in the background.
const GIVING_BACK: Duration = Duration::from_millis(100);

/// A handle on several locks, to be taken together: all or nothing. Made by [`Locks::all`](crate::Locks::all); no I/O.
///
/// It has the options of a [`Mutex`], which hold for each of the locks, except [`fairness`](Mutex::fairness): a set asks
/// the store for each lock, and is passed none within the process.
///
/// **No deadlock among sets**, in whatever order their names were given: a set that waits holds only names that are smaller,
/// byte for byte, than the one that it waits for. Who holds a lock already and then takes a set breaks that rule and may
/// wait in a circle; give it an [`Owner`], and it is found, though not on a quorum, which has no line to see it by. What a
/// set keeps while it waits is renewed; what is lost meanwhile is taken anew.
#[derive(Clone, Debug)]
#[must_use]
pub struct MutexSet {
    template: Mutex,
    /// Each once, in the order asked.
    names: std::result::Result<Vec<Name>, InvalidName>,
}

impl MutexSet {
    pub(crate) fn new<N: AsRef<[u8]>>(template: Mutex, names: impl IntoIterator<Item = N>) -> Self {
        Self::of(template, names.into_iter().map(Name::new).collect())
    }

    /// Of these, each once.
    pub(crate) fn of(template: Mutex, names: std::result::Result<Vec<Name>, InvalidName>) -> Self {
        let names = names.map(|mut names| {
            let mut seen = HashSet::with_capacity(names.len());
            names.retain(|name| seen.insert(name.clone()));
            names
        });
        Self { template, names }
    }

    fn with(self, change: impl FnOnce(Mutex) -> Mutex) -> Self {
        Self { template: change(self.template), ..self }
    }

    /// As [`Mutex::ttl`].
    pub fn ttl(self, ttl: Duration) -> Self {
        self.with(|each| each.ttl(ttl))
    }

    /// As [`Mutex::renew`]. A set that waits for longer than a TTL then takes what it held before anew.
    pub fn renew(self, renew: bool) -> Self {
        self.with(|each| each.renew(renew))
    }

    /// As [`Mutex::max_hold`], for each lock from its own grant on: a set that waits for longer takes what it held before
    /// anew.
    pub fn max_hold(self, limit: Duration) -> Self {
        self.with(|each| each.max_hold(limit))
    }

    /// As [`Mutex::label`].
    pub fn label(self, label: impl Into<String>) -> Self {
        self.with(|each| each.label(label))
    }

    /// As [`Mutex::metadata`].
    pub fn metadata(self, key: impl Into<String>, value: impl Into<String>) -> Self {
        self.with(|each| each.metadata(key, value))
    }

    /// As [`Mutex::retry`]. The policy begins anew for each lock that is waited for.
    pub fn retry(self, retry: Retry) -> Self {
        self.with(|each| each.retry(retry))
    }

    /// As [`Mutex::max_wait`], for all of them together.
    pub fn max_wait(self, limit: Duration) -> Self {
        self.with(|each| each.max_wait(limit))
    }

    /// As [`Mutex::max_queue`], for each line.
    pub fn max_queue(self, limit: u32) -> Self {
        self.with(|each| each.max_queue(limit))
    }

    /// As [`Mutex::on_wait`]; the ticket says which lock is waited for.
    pub fn on_wait(self, tell: impl Fn(&Ticket) + Send + Sync + 'static) -> Self {
        self.with(|each| each.on_wait(tell))
    }

    /// As [`Mutex::owner`].
    pub fn owner(self, owner: &Owner) -> Self {
        self.with(|each| each.owner(owner))
    }

    /// As [`Mutex::deadlock_after`].
    pub fn deadlock_after(self, wait: Duration) -> Self {
        self.with(|each| each.deadlock_after(wait))
    }

    /// As [`Mutex::replicas`], for each lock.
    pub fn replicas(self, count: u32, timeout: Duration) -> Self {
        self.with(|each| each.replicas(count, timeout))
    }

    /// As [`Mutex::require_replicas`], for each lock.
    pub fn require_replicas(self, count: u32, timeout: Duration) -> Self {
        self.with(|each| each.require_replicas(count, timeout))
    }

    /// As [`Mutex::replicas_on_disk`].
    pub fn replicas_on_disk(self, on_disk: bool) -> Self {
        self.with(|each| each.replicas_on_disk(on_disk))
    }

    /// The names, each once, in the order asked.
    ///
    /// # Errors
    /// [`InvalidName`] if [`Locks::all`](crate::Locks::all) was given a bad one.
    pub fn names(&self) -> std::result::Result<&[Name], InvalidName> {
        self.names.as_deref().map_err(Clone::clone)
    }

    /// Waits until all of them are held.
    ///
    /// # Errors
    /// As [`Mutex::lock`], and `Invalid` for a set without names; whichever lock it is about, none is held after it.
    ///
    /// # Cancel safety
    /// Safe: dropped at any moment, it leaves neither a hold nor a place in a queue; releases go on in the background.
    ///
    /// # Round trips
    /// As many as for one lock, if all are free: the store is asked for all of them at once. Else up to two more for each
    /// lock that is waited for.
    pub async fn lock(&self) -> Result<GuardSet> {
        match self.take(Some(self.template.policy()), Instant::FAR).await? {
            Ok(guards) => Ok(guards),
            Err(holder) => {
                let who = holder.map_or_else(String::new, |holder| format!(": one is held by {holder}"));
                Err(self.error(
                    ErrorKind::Busy,
                    format!("the maximum wait or the retry policy ended before all locks were free{who}"),
                ))
            }
        }
    }

    /// Takes them if all are free now; `None` if somebody else has one. Neither waits nor queues. What was granted of them
    /// is given back by then, for which one more round trip is waited, 100 ms at most.
    ///
    /// # Errors
    /// As [`lock`](Self::lock), but never `Busy`.
    ///
    /// # Cancel safety
    /// As [`lock`](Self::lock).
    ///
    /// # Round trips
    /// As many as for one lock; one more if one is busy.
    pub async fn try_lock(&self) -> Result<Option<GuardSet>> {
        Ok(self.take(None, Instant::FAR).await?.ok())
    }

    /// Waits for all of them for `patience` at most; `None` if the time was up before. At least one look is taken at each.
    ///
    /// # Errors
    /// As [`lock`](Self::lock), but never `Busy`; `Unknown` if the store had not answered once when the time was up.
    ///
    /// # Cancel safety
    /// As [`lock`](Self::lock).
    ///
    /// # Round trips
    /// As [`lock`](Self::lock).
    pub async fn lock_for(&self, patience: Duration) -> Result<Option<GuardSet>> {
        if patience.is_zero() {
            return self.try_lock().await;
        }
        let deadline = clock::now().plus(patience);
        Ok(self.take(Some(self.template.policy()), deadline).await?.ok())
    }

    /// Waits for all of them, runs `work` under them, and releases them after the work has ended; should one be lost, the
    /// work is dropped at its next await, before that lease can end.
    ///
    /// # Errors
    /// As [`lock`](Self::lock); [`ErrorKind::Lost`] if one was lost before the work was done.
    ///
    /// # Cancel safety
    /// Safe: dropped, the work is dropped first, then the locks released.
    ///
    /// # Round trips
    /// Two if all are free.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> leasehold::Result<()> {
    /// let locks = leasehold::connect("memory:").await?;
    /// let both = locks.all(["account:3", "account:17"]);
    /// let count = both.run(async |held| held.fencing_tokens().len()).await?;
    /// assert_eq!(count, 2);
    /// # Ok(()) }
    /// ```
    pub async fn run<T>(&self, work: impl AsyncFnOnce(&GuardSet) -> T) -> Result<T> {
        let guards = self.lock().await?;
        let outcome = unless_lost(guards.lost(), work(&guards)).await;
        let in_time = guards.status() != Status::Lost;
        let answers = guards.unlock().await;
        let gone = answers
            .into_iter()
            .find(|(_, answer)| matches!(answer, Ok(Released::NotHeld | Released::HeldByOther)));
        let lost = |what: String| self.error(ErrorKind::Lost, what);
        match (outcome, gone) {
            (Err((name, loss)), _) => {
                Err(lost(format!("the work was stopped, a lock was lost: {loss}")).for_name(&name))
            }
            (Ok(_), Some((name, _))) => {
                Err(lost("the work ended, but a lock had been lost before".into()).for_name(&name))
            }
            (Ok(_), None) if !in_time => Err(lost("the work ended, but a lock had been lost before".into())),
            // An unanswered release takes nothing from work that was done in time; the keeper releases on.
            (Ok(out), None) => Ok(out),
        }
    }

    /// Takes all of them: the guards, or who had one of them when the patience ended.
    async fn take(
        &self,
        retry: Option<&Retry>,
        deadline: Instant,
    ) -> Result<std::result::Result<GuardSet, Option<Holder>>> {
        let mutexes = self.sorted()?;
        let deadline = match self.template.longest_wait() {
            Some(limit) if retry.is_some() => deadline.min(clock::now().plus(limit)),
            _ => deadline,
        };
        // Of the smallest names, in their order.
        let mut held: Vec<Guard> = Vec::with_capacity(mutexes.len());
        let mut waited = false;
        let ended = loop {
            let looked = look(&mutexes[held.len()..], deadline).await;
            held.extend(looked.granted);
            let holder = match (looked.failed, looked.busy) {
                // What was kept may have been lost while the store looked at the rest.
                (None, None) if waited && give_back_lost(&mut held).await => continue,
                (None, None) => return Ok(Ok(self.in_order(held))),
                (None, Some(Busy(holder))) => holder,
                (Some(error), _) => {
                    held.extend(looked.surplus);
                    break Err(error);
                }
            };
            let Some(retry) = retry else {
                held.extend(looked.surplus);
                break Ok(holder);
            };
            // The next look must not find what is being given back.
            let next = mutexes[held.len()].acquire(Some(retry), deadline);
            let (answer, ()) = join(next, give_back(looked.surplus)).await;
            waited = true;
            match answer {
                Ok(Ok(guard)) => held.push(guard),
                Ok(Err(holder)) => break Ok(holder),
                Err(error) => break Err(error),
            }
            give_back_lost(&mut held).await;
        };
        give_back(held).await;
        match ended {
            // Busy before, and the time was up in the middle of a look.
            Err(error) if waited && error.kind() == ErrorKind::Unknown && clock::now() >= deadline => {
                Ok(Err(None))
            }
            ended => ended.map(Err),
        }
    }

    /// One handle for each name, in the order of their bytes.
    fn sorted(&self) -> Result<Vec<Mutex>> {
        let mut names = self.names()?.to_vec();
        if names.is_empty() {
            return Err(Error::invalid("a set of locks has no names"));
        }
        names.sort_unstable();
        Ok(names.into_iter().map(|name| self.template.named(Ok(name))).collect())
    }

    /// The guards, given in the order of their names, in the order asked.
    fn in_order(&self, mut held: Vec<Guard>) -> GuardSet {
        let asked: HashMap<&Name, usize> =
            self.names.iter().flatten().enumerate().map(|(at, name)| (name, at)).collect();
        held.sort_by_cached_key(|guard| asked.get(guard.name()).copied());
        GuardSet { guards: held }
    }

    fn error(&self, kind: ErrorKind, what: String) -> Error {
        Error::new(kind, what).on_store(&self.template.location())
    }
}

/// Somebody else has it; who, the store may not say.
struct Busy(Option<Holder>);

/// What one look at several locks gave.
#[derive(Default)]
struct Looked {
    /// Of those before the first busy one.
    granted: Vec<Guard>,
    /// Of those after it.
    surplus: Vec<Guard>,
    busy: Option<Busy>,
    failed: Option<Error>,
}

/// Presents all at once; none waits.
async fn look(mutexes: &[Mutex], deadline: Instant) -> Looked {
    let mut looked = Looked::default();
    for answer in join_all(mutexes.iter().map(|mutex| mutex.acquire(None, deadline))).await {
        match answer {
            Ok(Ok(guard)) if looked.busy.is_none() => looked.granted.push(guard),
            Ok(Ok(guard)) => looked.surplus.push(guard),
            Ok(Err(holder)) => {
                looked.busy.get_or_insert(Busy(holder));
            }
            Err(error) => {
                looked.failed.get_or_insert(error);
            }
        }
    }
    looked
}

/// What was lost meanwhile is to be taken anew, and what comes after it; whether that is anything.
async fn give_back_lost(held: &mut Vec<Guard>) -> bool {
    let Some(lost) = held.iter().position(|guard| guard.status() == Status::Lost) else { return false };
    give_back(held.split_off(lost)).await;
    true
}

async fn give_back(guards: Vec<Guard>) {
    if guards.is_empty() {
        return;
    }
    let releases = join_all(guards.into_iter().map(Guard::unlock));
    // What is dropped here, and what was not answered, is released in the background.
    let _ = clock::timeout_at(clock::now().plus(GIVING_BACK), releases).await;
}

/// Several locks held together. Dropping it releases them all.
#[must_use = "the locks are released when the set is dropped"]
pub struct GuardSet {
    /// Never none.
    guards: Vec<Guard>,
}

impl GuardSet {
    /// The guards, one for each name, in the order asked.
    pub fn guards(&self) -> &[Guard] {
        &self.guards
    }

    /// The guards, each for itself from now on.
    pub fn into_guards(mut self) -> Vec<Guard> {
        std::mem::take(&mut self.guards)
    }

    /// The fencing tokens, in the order asked: each for the resource that its lock protects.
    pub fn fencing_tokens(&self) -> Vec<FencingToken> {
        self.guards.iter().map(Guard::fencing_token).collect()
    }

    /// The worst status of all. Reads the clock; no I/O.
    pub fn status(&self) -> Status {
        let rank = |status: &Status| match status {
            Status::Held => 0,
            Status::Unsure => 1,
            Status::Lost => 2,
        };
        self.guards.iter().map(Guard::status).max_by_key(rank).unwrap_or(Status::Lost)
    }

    /// The least time left in which nobody else can be granted one of them. Zero once one is lost. No I/O.
    pub fn remaining(&self) -> Duration {
        self.guards.iter().map(Guard::remaining).min().unwrap_or_default()
    }

    /// The first moment at which one of them can no longer be trusted, unless it is renewed before. No I/O.
    pub fn valid_until(&self) -> Instant {
        self.guards.iter().map(Guard::valid_until).min().unwrap_or(Instant::FAR)
    }

    /// Resolves when the first of them is lost, with its name and the reason; else as [`Guard::lost`].
    ///
    /// # Cancel safety
    /// Safe: it only watches.
    pub fn lost(&self) -> impl Future<Output = (Name, Loss)> + Send + 'static + use<> {
        let losses = self.guards.iter().map(|guard| {
            let (name, lost) = (guard.name().clone(), guard.lost());
            async move { (name, lost.await) }
        });
        first(losses.collect())
    }

    /// Resolves at the next change of one of them, as [`Guard::changed`].
    ///
    /// # Cancel safety
    /// Safe: it only watches.
    pub fn changed(&self) -> impl Future<Output = ()> + Send + 'static + use<> {
        first(self.guards.iter().map(Guard::changed).collect())
    }

    /// Makes each lease last at least `ttl` from now and returns the least trustworthy time left; see [`Guard::extend`].
    ///
    /// # Errors
    /// As [`Guard::extend`], the first in the order asked; the others may have been extended.
    ///
    /// # Cancel safety
    /// As [`Guard::extend`].
    ///
    /// # Round trips
    /// As many as for one lock.
    pub async fn extend(&self, ttl: Duration) -> Result<Duration> {
        let answers = join_all(self.guards.iter().map(|guard| guard.extend(ttl))).await;
        let left = answers.into_iter().collect::<Result<Vec<_>>>()?;
        Ok(left.into_iter().min().unwrap_or_default())
    }

    /// Gives all of them back at once and tells how each stood, in the order asked; see [`Guard::unlock`].
    ///
    /// # Cancel safety
    /// Safe: dropped, the releases go on in the background.
    ///
    /// # Round trips
    /// As many as for one lock.
    pub async fn unlock(self) -> Vec<(Name, Result<Released>)> {
        let releases = self.into_guards().into_iter().map(|guard| async {
            let name = guard.name().clone();
            (name, guard.unlock().await)
        });
        join_all(releases).await
    }
}

impl fmt::Debug for GuardSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("GuardSet").field(&self.guards).finish()
    }
}

/// What the first of them gives.
async fn first<T>(mut all: FuturesUnordered<impl Future<Output = T>>) -> T {
    match all.next().await {
        Some(first) => first,
        None => std::future::pending().await,
    }
}
