//! The proof of holding a lock.

use std::fmt;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use crate::cell::{Cell, lock};
use crate::clock::Instant;
use crate::error::Result;
use crate::keeper::Keeper;
use crate::lease::{Loss, Status};
use crate::local::Holding;
use crate::store::check_ttl;
use crate::types::{Binding, ClaimId, FencingToken, Name, Query, Released};

/// A lock held, renewed in the background until it is unlocked or dropped.
///
/// Dropping it releases the lock soon after, without telling how that went; [`unlock`](Self::unlock) waits and tells. A
/// guard may be dropped anywhere, also outside any runtime. Forgetting it (`std::mem::forget`) keeps the lock renewed for
/// as long as the process lives.
///
/// A guard is a belief, and this one knows its limits: [`status`](Self::status) and [`remaining`](Self::remaining) go by
/// the clock, counted from before the request was sent, and [`lost`](Self::lost) resolves before the store can give the
/// lock to somebody else. While the process itself does not run, nothing in it can notice anything: only a resource that
/// checks [`fencing_token`](Self::fencing_token) is safe from a holder that was paused and wakes too late.
#[must_use = "the lock is released when the guard is dropped"]
pub struct Guard {
    holding: Holding,
}

impl Guard {
    pub(crate) fn new(holding: Holding) -> Self {
        Self { holding }
    }

    fn cell(&self) -> &Arc<Cell> {
        self.holding.cell()
    }

    fn keeper(&self) -> &Keeper {
        self.holding.keeper()
    }

    /// The name of the lock.
    pub fn name(&self) -> &Name {
        &self.cell().held().name
    }

    /// The identity of this claim, as it stands in the store. Guards to which the lock is passed on within a process
    /// ([`Fairness::LocalFirst`](crate::Fairness)) share one claim.
    pub fn claim_id(&self) -> ClaimId {
        self.cell().held().id
    }

    /// The number to give to the resource with every write; see [`FencingToken`] and [`fence`](crate::fence).
    pub fn fencing_token(&self) -> FencingToken {
        self.holding.token()
    }

    /// How many replicas of the store had acknowledged the lock when it was granted, as far as was heard in time; `None` if
    /// that was not asked for ([`Mutex::replicas`](crate::Mutex::replicas)). No I/O.
    pub fn replicas(&self) -> Option<u32> {
        lock(&self.cell().state).replicas
    }

    /// How sure the holder can be now. Reads the clock; no I/O.
    pub fn status(&self) -> Status {
        self.cell().status()
    }

    /// Time left in which nobody else can be granted the lock, as far as is confirmed. Zero once lost. No I/O.
    pub fn remaining(&self) -> Duration {
        self.cell().remaining()
    }

    /// The moment at which the lock can no longer be trusted, unless it is renewed before. No I/O.
    pub fn valid_until(&self) -> Instant {
        self.cell().valid_until()
    }

    /// Resolves when the lock is lost, before the store can grant it anew; with the reason. It does not borrow the guard,
    /// and it tells nothing any more once the guard was unlocked or dropped: then it resolves when the lease would have
    /// ended.
    ///
    /// # Cancel safety
    /// Safe: it only watches.
    pub fn lost(&self) -> impl Future<Output = Loss> + Send + 'static + use<> {
        self.cell().clone().lost(self.fencing_token())
    }

    /// Resolves at the next change of [`valid_until`](Self::valid_until) or [`status`](Self::status) after this call.
    ///
    /// # Cancel safety
    /// Safe: it only watches.
    pub fn changed(&self) -> impl Future<Output = ()> + Send + 'static + use<> {
        self.cell().clone().next_change()
    }

    /// Makes the lease last at least `ttl` from now and returns the trustworthy time left. It never shortens a lease and
    /// never passes the maximum hold. Background renewals go on with the TTL of the mutex.
    ///
    /// # Errors
    /// [`ErrorKind::Lost`](crate::ErrorKind::Lost) if the lock is lost, `Invalid` for a TTL the store does not take, else the store's; after
    /// `Unknown` nothing is assumed to be extended.
    ///
    /// # Cancel safety
    /// Safe: dropped, the lease was extended or not, and the guard counts on it not being so.
    ///
    /// # Round trips
    /// One.
    pub async fn extend(&self, ttl: Duration) -> Result<Duration> {
        let store = self.keeper().store();
        check_ttl(&store.guarantees(), ttl).map_err(|error| error.on_store(&store.location()))?;
        self.keeper().renew_now(self.cell(), |held| held.extend = Some(ttl)).await
    }

    /// Asks the store how long the lock would last if nothing renewed it. Zero if this claim does not hold it any more.
    ///
    /// # Errors
    /// The store's.
    ///
    /// # Cancel safety
    /// Safe: it only reads.
    ///
    /// # Round trips
    /// One.
    pub async fn ttl(&self) -> Result<Duration> {
        let page = self.keeper().store().inspect(&Query::One(self.name().clone())).await?;
        let holder = page.items.into_iter().next().and_then(|view| view.holder);
        let mine = holder.filter(|holder| holder.id == Some(self.claim_id()));
        Ok(mine.and_then(|holder| holder.remaining).unwrap_or_default())
    }

    /// Gives the lock back and tells how it stood: [`Released::Released`] if it was this claim's until now,
    /// `NotHeld` or `HeldByOther` if it had been lost before. After a known answer nothing is ever sent for this claim.
    ///
    /// A lock that is passed on within the process ([`Fairness::LocalFirst`](crate::Fairness)) is `Released` too, without
    /// asking the store: it was [`Held`](Status::Held) in that moment.
    ///
    /// # Errors
    /// The store's. After `Unknown` or `Unavailable` the keeper goes on releasing in the background until the lease has
    /// ended, and never renews.
    ///
    /// # Cancel safety
    /// Safe: dropped, the release goes on in the background.
    ///
    /// # Round trips
    /// One; none if it is passed on.
    pub async fn unlock(self) -> Result<Released> {
        self.holding.unlock().await
    }

    /// Leaves the lock held, renewed once more to its full TTL and then by nobody: it ends by itself, whether or not this
    /// process lives.
    ///
    /// # Errors
    /// As [`extend`](Self::extend); the lock is then released.
    ///
    /// # Cancel safety
    /// Dropped before it is ready, the lock is released.
    ///
    /// # Round trips
    /// One.
    pub async fn leak(mut self) -> Result<FencingToken> {
        // First, so that no renewal in the background follows, which would bind it to this process again.
        self.keeper().leave(self.cell());
        self.keeper().renew_now(self.cell(), |held| held.binding = Binding::Expiry).await?;
        self.holding.leave();
        Ok(self.fencing_token())
    }
}

impl fmt::Debug for Guard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Guard")
            .field("name", self.name())
            .field("token", &self.fencing_token())
            .field("status", &self.status())
            .field("remaining", &self.remaining())
            .finish_non_exhaustive()
    }
}
