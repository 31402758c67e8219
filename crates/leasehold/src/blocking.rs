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
