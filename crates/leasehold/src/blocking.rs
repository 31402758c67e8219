//! The same locks for code without async: every name as in the async face, every call blocking its thread.
//!
//! ```
//! let locks = leasehold::blocking::connect("memory:")?;
//! let guard = locks.mutex("report").lock()?;
//! assert!(locks.mutex("report").try_lock()?.is_none());
//! guard.unlock()?;
//! # Ok::<(), leasehold::Error>(())
//! ```

use std::time::Duration;

use pollster::block_on;

use crate::clock::Instant;
use crate::error::{Error, ErrorKind, Result};
use crate::lease::{Loss, Status};
use crate::retry::Retry;
use crate::types::{
    ClaimId, Fairness, FencingToken, Finding, Guarantees, LockView, Name, Owner, Page, Query, Released,
    Ticket,
};

/// Connects to the store at `url`; see [`leasehold::connect`](crate::connect).
///
/// # Errors
/// As there.
pub fn connect(url: &str) -> Result<Locks> {
    block_on(crate::connect(url)).map(Locks)
}

/// The locks of one store; see [`leasehold::Locks`](crate::Locks).
#[derive(Clone, Debug)]
pub struct Locks(crate::Locks);

impl From<crate::Locks> for Locks {
    fn from(locks: crate::Locks) -> Self {
        Self(locks)
    }
}

impl Locks {
    /// A handle on the lock `name`.
    pub fn mutex(&self, name: impl AsRef<[u8]>) -> Mutex {
        Mutex(self.0.mutex(name))
    }

    /// A handle on several locks, to be taken together; see [`Locks::all`](crate::Locks::all).
    pub fn all<N: AsRef<[u8]>>(&self, names: impl IntoIterator<Item = N>) -> MutexSet {
        MutexSet(self.0.all(names))
    }

    /// So many locks for any number of keys; see [`Locks::striped`](crate::Locks::striped).
    pub fn striped(&self, name: impl AsRef<[u8]>, stripes: u32) -> Striped {
        Striped(self.0.striped(name, stripes))
    }

    /// Looks at one lock.
    ///
    /// # Errors
    /// As [`Locks::show`](crate::Locks::show).
    pub fn show(&self, name: impl AsRef<[u8]>) -> Result<LockView> {
        block_on(self.0.show(name))
    }

    /// Looks at locks, a page at a time.
    ///
    /// # Errors
    /// As [`Locks::inspect`](crate::Locks::inspect).
    pub fn inspect(&self, query: &Query) -> Result<Page<LockView>> {
        block_on(self.0.inspect(query))
    }

    /// What this very server promises.
    pub fn guarantees(&self) -> Guarantees {
        self.0.guarantees()
    }

    /// Looks the store over for an operator.
    pub fn diagnose(&self) -> Vec<Finding> {
        block_on(self.0.diagnose())
    }

    /// Waits until every release still under way has ended.
    pub fn close(self) {
        block_on(self.0.close());
    }
}

/// A handle on one named lock; see [`leasehold::Mutex`](crate::Mutex).
#[derive(Clone, Debug)]
pub struct Mutex(crate::Mutex);

impl Mutex {
    /// As [`Mutex::ttl`](crate::Mutex::ttl).
    #[must_use]
    pub fn ttl(self, ttl: Duration) -> Self {
        Self(self.0.ttl(ttl))
    }

    /// As [`Mutex::renew`](crate::Mutex::renew).
    #[must_use]
    pub fn renew(self, renew: bool) -> Self {
        Self(self.0.renew(renew))
    }

    /// As [`Mutex::max_hold`](crate::Mutex::max_hold).
    #[must_use]
    pub fn max_hold(self, limit: Duration) -> Self {
        Self(self.0.max_hold(limit))
    }

    /// As [`Mutex::label`](crate::Mutex::label).
    #[must_use]
    pub fn label(self, label: impl Into<String>) -> Self {
        Self(self.0.label(label))
    }

    /// As [`Mutex::metadata`](crate::Mutex::metadata).
    #[must_use]
    pub fn metadata(self, key: impl Into<String>, value: impl Into<String>) -> Self {
        Self(self.0.metadata(key, value))
    }

    /// As [`Mutex::retry`](crate::Mutex::retry).
    #[must_use]
    pub fn retry(self, retry: Retry) -> Self {
        Self(self.0.retry(retry))
    }

    /// As [`Mutex::max_wait`](crate::Mutex::max_wait).
    #[must_use]
    pub fn max_wait(self, limit: Duration) -> Self {
        Self(self.0.max_wait(limit))
    }

    /// As [`Mutex::max_queue`](crate::Mutex::max_queue).
    #[must_use]
    pub fn max_queue(self, limit: u32) -> Self {
        Self(self.0.max_queue(limit))
    }

    /// As [`Mutex::on_wait`](crate::Mutex::on_wait).
    #[must_use]
    pub fn on_wait(self, tell: impl Fn(&Ticket) + Send + Sync + 'static) -> Self {
        Self(self.0.on_wait(tell))
    }

    /// As [`Mutex::owner`](crate::Mutex::owner).
    #[must_use]
    pub fn owner(self, owner: &Owner) -> Self {
        Self(self.0.owner(owner))
    }

    /// As [`Mutex::deadlock_after`](crate::Mutex::deadlock_after).
    #[must_use]
    pub fn deadlock_after(self, wait: Duration) -> Self {
        Self(self.0.deadlock_after(wait))
    }

    /// As [`Mutex::fairness`](crate::Mutex::fairness).
    #[must_use]
    pub fn fairness(self, fairness: Fairness) -> Self {
        Self(self.0.fairness(fairness))
    }

    /// As [`Mutex::replicas`](crate::Mutex::replicas).
    #[must_use]
    pub fn replicas(self, count: u32, timeout: Duration) -> Self {
        Self(self.0.replicas(count, timeout))
    }

    /// As [`Mutex::require_replicas`](crate::Mutex::require_replicas).
    #[must_use]
    pub fn require_replicas(self, count: u32, timeout: Duration) -> Self {
        Self(self.0.require_replicas(count, timeout))
    }

    /// As [`Mutex::replicas_on_disk`](crate::Mutex::replicas_on_disk).
    #[must_use]
    pub fn replicas_on_disk(self, on_disk: bool) -> Self {
        Self(self.0.replicas_on_disk(on_disk))
    }

    /// Waits for the lock.
    ///
    /// # Errors
    /// As [`Mutex::lock`](crate::Mutex::lock).
    pub fn lock(&self) -> Result<Guard> {
        block_on(self.0.lock()).map(Guard)
    }

    /// Takes the lock if it is free now.
    ///
    /// # Errors
    /// As [`Mutex::try_lock`](crate::Mutex::try_lock).
    pub fn try_lock(&self) -> Result<Option<Guard>> {
        Ok(block_on(self.0.try_lock())?.map(Guard))
    }

    /// Waits for the lock for `patience` at most.
    ///
    /// # Errors
    /// As [`Mutex::lock_for`](crate::Mutex::lock_for).
    pub fn lock_for(&self, patience: Duration) -> Result<Option<Guard>> {
        Ok(block_on(self.0.lock_for(patience))?.map(Guard))
    }

    /// Waits for the lock, runs `work` under it, and releases it. A thread cannot be stopped: long work looks at
    /// [`Guard::status`] between its steps.
    ///
    /// # Errors
    /// As [`Mutex::run`](crate::Mutex::run).
    pub fn run<T>(&self, work: impl FnOnce(&Guard) -> T) -> Result<T> {
        let guard = self.lock()?;
        let out = work(&guard);
        let in_time = guard.status() != Status::Lost;
        let answer = guard.unlock();
        if !in_time || matches!(answer, Ok(Released::NotHeld | Released::HeldByOther)) {
            return Err(Error::new(ErrorKind::Lost, "the work ended, but the lock had been lost before"));
        }
        Ok(out)
    }
}

/// A lock held; see [`leasehold::Guard`](crate::Guard).
#[derive(Debug)]
#[must_use = "the lock is released when the guard is dropped"]
pub struct Guard(crate::Guard);

impl Guard {
    /// The name of the lock.
    pub fn name(&self) -> &Name {
        self.0.name()
    }

    /// The identity of this claim.
    pub fn claim_id(&self) -> ClaimId {
        self.0.claim_id()
    }

    /// The number to give to the resource with every write.
    pub fn fencing_token(&self) -> FencingToken {
        self.0.fencing_token()
    }

    /// How many replicas had acknowledged the lock when it was granted; see [`Guard::replicas`](crate::Guard::replicas).
    pub fn replicas(&self) -> Option<u32> {
        self.0.replicas()
    }

    /// How sure the holder can be now.
    pub fn status(&self) -> Status {
        self.0.status()
    }

    /// Time left that can be trusted.
    pub fn remaining(&self) -> Duration {
        self.0.remaining()
    }

    /// Until when it can be trusted, unless it is renewed before.
    pub fn valid_until(&self) -> Instant {
        self.0.valid_until()
    }

    /// Waits until the lock is lost, and says why: for a thread that watches while another works.
    pub fn lost(&self) -> Loss {
        block_on(self.0.lost())
    }

    /// Makes the lease last at least `ttl` from now.
    ///
    /// # Errors
    /// As [`Guard::extend`](crate::Guard::extend).
    pub fn extend(&self, ttl: Duration) -> Result<Duration> {
        block_on(self.0.extend(ttl))
    }

    /// Asks the store how long the lock would last.
    ///
    /// # Errors
    /// As [`Guard::ttl`](crate::Guard::ttl).
    pub fn ttl(&self) -> Result<Duration> {
        block_on(self.0.ttl())
    }

    /// Gives the lock back and tells how it stood.
    ///
    /// # Errors
    /// As [`Guard::unlock`](crate::Guard::unlock).
    pub fn unlock(self) -> Result<Released> {
        block_on(self.0.unlock())
    }

    /// Leaves the lock held until it ends by itself.
    ///
    /// # Errors
    /// As [`Guard::leak`](crate::Guard::leak).
    pub fn leak(self) -> Result<FencingToken> {
        block_on(self.0.leak())
    }
}

/// A fixed number of locks for any number of keys; see [`leasehold::Striped`](crate::Striped).
#[derive(Clone, Debug)]
#[must_use]
pub struct Striped(crate::Striped);

impl Striped {
    /// As [`Striped::options`](crate::Striped::options).
    pub fn options(self, set: impl FnOnce(Mutex) -> Mutex) -> Self {
        Self(self.0.options(|each| set(Mutex(each)).0))
    }

    /// How many there are.
    pub fn stripes(&self) -> u32 {
        self.0.stripes()
    }

    /// The number of the stripe that `key` belongs to.
    pub fn stripe_of(&self, key: impl AsRef<[u8]>) -> u32 {
        self.0.stripe_of(key)
    }

    /// The lock of `key`.
    #[must_use]
    pub fn stripe_for(&self, key: impl AsRef<[u8]>) -> Mutex {
        Mutex(self.0.stripe_for(key))
    }

    /// The locks of several keys at once, all or nothing.
    pub fn all_for<K: AsRef<[u8]>>(&self, keys: impl IntoIterator<Item = K>) -> MutexSet {
        MutexSet(self.0.all_for(keys))
    }
}

/// A handle on several locks, to be taken together; see [`leasehold::MutexSet`](crate::MutexSet).
#[derive(Clone, Debug)]
#[must_use]
pub struct MutexSet(crate::MutexSet);

impl MutexSet {
    /// As [`MutexSet::ttl`](crate::MutexSet::ttl).
    pub fn ttl(self, ttl: Duration) -> Self {
        Self(self.0.ttl(ttl))
    }

    /// As [`MutexSet::renew`](crate::MutexSet::renew).
    pub fn renew(self, renew: bool) -> Self {
        Self(self.0.renew(renew))
    }

    /// As [`MutexSet::max_hold`](crate::MutexSet::max_hold).
    pub fn max_hold(self, limit: Duration) -> Self {
        Self(self.0.max_hold(limit))
    }

    /// As [`MutexSet::label`](crate::MutexSet::label).
    pub fn label(self, label: impl Into<String>) -> Self {
        Self(self.0.label(label))
    }

    /// As [`MutexSet::metadata`](crate::MutexSet::metadata).
    pub fn metadata(self, key: impl Into<String>, value: impl Into<String>) -> Self {
        Self(self.0.metadata(key, value))
    }

    /// As [`MutexSet::retry`](crate::MutexSet::retry).
    pub fn retry(self, retry: Retry) -> Self {
        Self(self.0.retry(retry))
    }

    /// As [`MutexSet::max_wait`](crate::MutexSet::max_wait).
    pub fn max_wait(self, limit: Duration) -> Self {
        Self(self.0.max_wait(limit))
    }

    /// As [`MutexSet::max_queue`](crate::MutexSet::max_queue).
    pub fn max_queue(self, limit: u32) -> Self {
        Self(self.0.max_queue(limit))
    }

    /// As [`MutexSet::on_wait`](crate::MutexSet::on_wait).
    pub fn on_wait(self, tell: impl Fn(&Ticket) + Send + Sync + 'static) -> Self {
        Self(self.0.on_wait(tell))
    }

    /// As [`MutexSet::owner`](crate::MutexSet::owner).
    pub fn owner(self, owner: &Owner) -> Self {
        Self(self.0.owner(owner))
    }

    /// As [`MutexSet::deadlock_after`](crate::MutexSet::deadlock_after).
    pub fn deadlock_after(self, wait: Duration) -> Self {
        Self(self.0.deadlock_after(wait))
    }

    /// Waits until all of them are held.
    ///
    /// # Errors
    /// As [`MutexSet::lock`](crate::MutexSet::lock).
    pub fn lock(&self) -> Result<GuardSet> {
        block_on(self.0.lock()).map(GuardSet)
    }

    /// Takes them if all are free now.
    ///
    /// # Errors
    /// As [`MutexSet::try_lock`](crate::MutexSet::try_lock).
    pub fn try_lock(&self) -> Result<Option<GuardSet>> {
        Ok(block_on(self.0.try_lock())?.map(GuardSet))
    }

    /// Waits for all of them for `patience` at most.
    ///
    /// # Errors
    /// As [`MutexSet::lock_for`](crate::MutexSet::lock_for).
    pub fn lock_for(&self, patience: Duration) -> Result<Option<GuardSet>> {
        Ok(block_on(self.0.lock_for(patience))?.map(GuardSet))
    }

    /// Waits for all of them, runs `work` under them, and releases them. A thread cannot be stopped: long work looks at
    /// [`GuardSet::status`] between its steps.
    ///
    /// # Errors
    /// As [`MutexSet::run`](crate::MutexSet::run).
    pub fn run<T>(&self, work: impl FnOnce(&GuardSet) -> T) -> Result<T> {
        let guards = self.lock()?;
        let out = work(&guards);
        let in_time = guards.status() != Status::Lost;
        let answers = guards.unlock();
        let is_gone =
            |answer: &Result<Released>| matches!(answer, Ok(Released::NotHeld | Released::HeldByOther));
        match answers.iter().find(|(_, answer)| is_gone(answer)) {
            Some((name, _)) => {
                Err(Error::new(ErrorKind::Lost, "the work ended, but a lock had been lost before")
                    .for_name(name))
            }
            None if !in_time => {
                Err(Error::new(ErrorKind::Lost, "the work ended, but a lock had been lost before"))
            }
            None => Ok(out),
        }
    }
}

/// Several locks held together; see [`leasehold::GuardSet`](crate::GuardSet).
#[derive(Debug)]
#[must_use = "the locks are released when the set is dropped"]
pub struct GuardSet(crate::GuardSet);

impl GuardSet {
    /// The guards, one for each name, in the order asked, each for itself from now on.
    pub fn into_guards(self) -> Vec<Guard> {
        self.0.into_guards().into_iter().map(Guard).collect()
    }

    /// The fencing tokens, in the order asked.
    pub fn fencing_tokens(&self) -> Vec<FencingToken> {
        self.0.fencing_tokens()
    }

    /// The worst status of all.
    pub fn status(&self) -> Status {
        self.0.status()
    }

    /// The least time left that can be trusted.
    pub fn remaining(&self) -> Duration {
        self.0.remaining()
    }

    /// Until when all of them can be trusted, unless they are renewed before.
    pub fn valid_until(&self) -> Instant {
        self.0.valid_until()
    }

    /// Waits until the first of them is lost, and says which and why.
    pub fn lost(&self) -> (Name, Loss) {
        block_on(self.0.lost())
    }

    /// Makes each lease last at least `ttl` from now.
    ///
    /// # Errors
    /// As [`GuardSet::extend`](crate::GuardSet::extend).
    pub fn extend(&self, ttl: Duration) -> Result<Duration> {
        block_on(self.0.extend(ttl))
    }

    /// Gives all of them back at once and tells how each stood.
    pub fn unlock(self) -> Vec<(Name, Result<Released>)> {
        block_on(self.0.unlock())
    }
}
