//! The store contract: what every store does, in numbered clauses.
//!
//! The clauses, each with one test of the same number in [`conformance`](crate::conformance):
//!
//! 1. One holder: between a grant and the end of its lease nobody else is granted the name.
//! 2. The same claim presented twice yields the same grant and the same token.
//! 3. Release by a claim that does not hold changes nothing and says which case it was.
//! 4. Releasing twice, or after expiry, is an answer, never an error.
//! 5. An unrenewed claim is free within its TTL and the store's slack; a waiter gets it then without any message.
//! 6. Renewing after a loss says `Lost`, also if the same claim was granted anew. It never re-creates anything, and
//!    renewing never shortens a lease.
//! 7. Each grant of a name has a larger token than every earlier one, as far as [`Guarantees::fencing`] says; one that the
//!    claim proposes ([`Claim::ballot`]) if it is larger than the last and not far ahead of the store's clock, nor far behind
//!    it where no last one is known.
//! 8. FIFO stores grant in the order of arrival; a claim that is not to queue neither waits nor joins the queue.
//! 9. A cancelled acquire leaves neither a hold nor a place in the queue.
//! 10. A lost reply is `Unknown`, not a failure: presenting again resolves it, or release frees the lock; a request that
//!     arrives after its claim was released creates nothing.
//! 11. Names never collide; an invalid one is refused before any I/O.
//! 12. The lease is counted from before the request was sent; each store has a least and a most TTL and refuses others.
//! 13. A dead waiter, or a host that vanishes with a hundred of them, delays the others by one lease at most.

use std::fmt::Debug;
use std::fs::File;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;

use crate::clock::Now;
use crate::error::{Error, ErrorKind, Result};
use crate::types::{
    Acquired, Claim, Finding, Grant, Guarantees, Held, LockView, Name, Page, Query, Released, Renewal,
    Replication, Ticket,
};

/// The longest lease that a waiter is handed: what a waiter that died costs the others. A longer TTL begins with the
/// first renewal.
pub const HAND_OFF_TTL: Duration = Duration::from_secs(30);

/// Why a waiter is woken.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Woken {
    /// The lock was handed to it.
    Granted {
        /// The grant; its TTL counts from `sent`.
        grant: Grant,
        /// A moment before the sending of a request of this claim that the store had when it granted.
        sent: Now,
    },
    /// Still in line, and this is the place now.
    Waiting(Ticket),
    /// Something may have changed: present the claim again.
    Look,
}

/// How often a waiter is to be heard of, so that it keeps its place: a third of its TTL, 3 s at most.
pub fn heard_every(ttl: Duration) -> Duration {
    (ttl / 3).clamp(Duration::from_millis(3), Duration::from_secs(3))
}

/// For how long a waiter that was heard of counts as alive: two and a half of [`heard_every`], which is less than its TTL.
pub fn alive_for(ttl: Duration) -> Duration {
    heard_every(ttl) * 5 / 2
}

/// A place that keeps locks. See the [module](self) for the clauses it must keep.
///
/// Every method may be dropped at any await: what it began is then unknown, and the caller releases or presents again.
#[async_trait]
pub trait Store: Debug + Send + Sync + 'static {
    /// Presents a claim: granted, queued or busy. Idempotent for one claim id: it keeps its grant, or its place in line.
    /// One round trip.
    ///
    /// # Errors
    /// `Unavailable` if it was not sent, `Unknown` if no answer came, `QueueFull`, `Rejected` and `Invalid` for good.
    async fn acquire(&self, claim: &Claim) -> Result<Acquired>;

    /// Waits until a queued claim is handed the lock, or should be presented again; may be early. The store keeps the
    /// place in line alive meanwhile, at no cost for each waiter. A message that got lost is made good for by
    /// `Look` after some time.
    ///
    /// # Cancel safety
    /// Dropped, the claim stays in line; a grant that comes meanwhile is told by the next call.
    async fn woken(&self, ticket: &Ticket) -> Woken;

    /// Makes known, for some 30 s, that `owner` waits here, where the line itself does not tell ([`Query::Waits`]).
    ///
    /// # Errors
    /// As [`acquire`](Self::acquire).
    async fn announce(&self, ticket: &Ticket, owner: &str) -> Result<()> {
        let _ = (ticket, owner);
        Ok(())
    }

    /// Which names are renewed together: those of one number. A store made of several servers tells them apart here, so
    /// that one that answers slowly holds up the renewals of no other.
    fn company(&self, name: &Name) -> u64 {
        let _ = name;
        0
    }

    /// Extends, or only confirms, what is held: one answer an item, in one round trip for as many as the store can.
    async fn renew(&self, held: &[Held]) -> Vec<Result<Renewal>>;

    /// Waits until so many replicas of the store have what is held, or the time is up: how many had it then.
    ///
    /// # Errors
    /// `Unsupported` for a store that has no replicas, or cannot tell; `Lost` if the claim does not hold the lock; else as
    /// [`acquire`](Self::acquire).
    async fn replicate(&self, held: &Held, wish: &Replication) -> Result<u32> {
        let _ = (held, wish);
        let unable =
            Error::new(ErrorKind::Unsupported, "this store has no replicas that could be waited for");
        Err(unable.on_store(&self.location()))
    }

    /// Gives a lock back if this claim holds it, handing it to the next in line; takes the claim out of the line if it
    /// may wait there ([`Held::waiting`]). One round trip.
    ///
    /// # Errors
    /// As [`acquire`](Self::acquire). Not holding it is an answer.
    async fn release(&self, held: &Held) -> Result<Released>;

    /// Who holds what.
    ///
    /// # Errors
    /// As [`acquire`](Self::acquire).
    async fn inspect(&self, query: &Query) -> Result<Page<LockView>>;

    /// Resolves when what is held should be confirmed at once: its connection broke or was replaced, another server took over.
    /// May be early; who calls it again hears of what happened meanwhile. Never, for a store that has nothing to tell.
    ///
    /// # Cancel safety
    /// Safe.
    async fn disturbed(&self) {
        std::future::pending::<()>().await;
    }

    /// What it promises, as found when it was connected.
    fn guarantees(&self) -> Guarantees;

    /// Where it is, as a URL without secrets.
    fn location(&self) -> Arc<str>;

    /// Looks the store over for an operator: reach, login, role, persistence, rights.
    async fn diagnose(&self) -> Vec<Finding>;

    /// The file whose kernel lock says that this process lives, where the store goes by that. A child that inherits it
    /// keeps the process's locks from passing on early.
    fn lifeline(&self) -> Option<Arc<File>>;
}

const DRIFT_PART: u32 = 100;
const DRIFT_LEAST: Duration = Duration::from_millis(2);

/// How much of a TTL is not trusted: 1 % for clocks that run at different speeds, and 2 ms for their grain.
pub(crate) fn drift(ttl: Duration) -> Duration {
    (ttl / DRIFT_PART).saturating_add(DRIFT_LEAST)
}

/// Refuses a TTL outside of what a store takes, before any I/O.
///
/// # Errors
/// `Invalid`, with the bounds.
pub fn check_ttl(guarantees: &Guarantees, ttl: Duration) -> Result<()> {
    let (least, most) = (guarantees.least_ttl, guarantees.most_ttl);
    if (least..=most).contains(&ttl) {
        return Ok(());
    }
    Err(Error::invalid(format!(
        "a TTL of {ttl:?} is outside of what this store takes, {least:?} to {most:?}"
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_waiter_that_is_silent_counts_as_gone_before_a_lease_of_its_ttl_ends() {
        // So a process that is stopped is handed a lock once at most.
        for millis in 10..20_000 {
            let ttl = Duration::from_millis(millis);
            assert!(alive_for(ttl) < ttl, "{millis} ms");
        }
    }
}
