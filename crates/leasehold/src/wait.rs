//! Acquiring: present the claim, wait for a hint or the timer, present it again.

use std::time::Duration;

use crate::clock::{self, Instant, Now};
use crate::error::{Error, ErrorKind, Result};
use crate::keeper::Keeper;
use crate::lease::valid_until;
use crate::retry::{Retry, Waits};
use crate::types::{Acquired, Claim, Grant, Held, Holder, Ticket};

/// How often one look at a lock is presented when its answers are lost, or come too late to be believed.
const PRESENTATIONS: u32 = 3;
/// A wait is never shorter, whatever the policy says.
const LEAST_WAIT: Duration = Duration::from_millis(1);

/// A grant, with what its holder must know of how it came about.
#[derive(Debug)]
pub(crate) struct Won {
    pub(crate) grant: Grant,
    pub(crate) sent: Now,
    /// Whether another presentation of the claim may still be under way.
    pub(crate) suspect: bool,
}

/// How an acquisition ended without an error.
#[derive(Debug)]
pub(crate) enum Ended {
    Won(Won),
    /// The time or the policy ended first.
    Busy(Option<Holder>),
}

/// Presents `claim` until it is granted, `deadline` has come, or `retry` ends (`None`: one look, no waiting).
///
/// Dropped at any await it leaves nothing behind: the keeper releases what may have been granted.
pub(crate) async fn acquire(
    keeper: &Keeper,
    claim: &Claim,
    retry: Option<&Retry>,
    deadline: Instant,
) -> Result<Ended> {
    let mut armed = Armed { keeper, claim, suspect: false, in_flight: false };
    let mut waits: Option<Waits> = None;
    let mut outage: Option<Instant> = None;
    loop {
        let look = clock::timeout_at(deadline, armed.look()).await;
        let (ticket, holder) = match look {
            None if waits.is_none() => return Err(armed.unheard()),
            None => return Ok(Ended::Busy(None)),
            Some(Ok(Looked::Won(won))) => {
                armed.disarm();
                return Ok(Ended::Won(won));
            }
            Some(Ok(Looked::Busy(holder))) => {
                outage = None;
                (None, Some(holder))
            }
            Some(Ok(Looked::Queued(ticket))) => {
                outage = None;
                let holder = ticket.holder.clone();
                (Some(ticket), holder)
            }
            // Fails fast at the first look; a waiter rides out an outage as long as a lease.
            Some(Err(error)) => {
                let since = *outage.get_or_insert_with(clock::now);
                if waits.is_none() || !error.is_transient() || clock::now().since(since) > claim.ttl {
                    return Err(error);
                }
                (None, None)
            }
        };
        let Some(retry) = retry else { return Ok(Ended::Busy(holder)) };
        let Some(wait) = waits.get_or_insert_with(|| retry.waits()).next() else {
            return Ok(Ended::Busy(holder));
        };
        if let Some(ticket) = ticket {
            armed.in_flight = true;
            let _ = clock::timeout_at(deadline, keeper.store().woken(&ticket)).await;
        } else {
            // The holder's lease ends then at the latest, renewed or not worth waiting for longer.
            let remaining = holder.as_ref().and_then(|holder| holder.remaining);
            let until_end = remaining.map_or(Duration::MAX, |left| left.saturating_add(LEAST_WAIT));
            let again = clock::now().plus(wait.min(until_end).max(LEAST_WAIT));
            clock::sleep_until(again.min(deadline)).await;
        }
        if clock::now() >= deadline {
            return Ok(Ended::Busy(holder));
        }
    }
}

enum Looked {
    Won(Won),
    Busy(Holder),
    Queued(Ticket),
}

/// A claim that may be at the store: dropped, it is released there.
struct Armed<'a> {
    keeper: &'a Keeper,
    claim: &'a Claim,
    /// Whether a presentation went unanswered.
    suspect: bool,
    /// Whether an answer is due, or the claim waits in line.
    in_flight: bool,
}

impl Armed<'_> {
    /// Presents the claim until it has one known answer.
    async fn look(&mut self) -> Result<Looked> {
        let mut tries = 0;
        loop {
            tries += 1;
            let sent = clock::look();
            self.in_flight = true;
            let answer = self.keeper.store().acquire(self.claim).await;
            match answer {
                Ok(Acquired::Granted(grant)) => {
                    if valid_until(sent.boot, grant.ttl) > clock::now() {
                        return Ok(Looked::Won(Won { grant, sent, suspect: self.suspect }));
                    }
                    // Granted, but the answer took the whole lease: ask how it stands now.
                    self.suspect = true;
                    if tries >= PRESENTATIONS {
                        return Err(self.too_slow());
                    }
                }
                Ok(Acquired::Busy(holder)) => {
                    self.in_flight = false;
                    return Ok(Looked::Busy(holder));
                }
                Ok(Acquired::Queued(ticket)) => return Ok(Looked::Queued(ticket)),
                Err(error) if error.kind() == ErrorKind::Unknown => {
                    self.suspect = true;
                    if tries >= PRESENTATIONS {
                        return Err(error.for_name(&self.claim.name));
                    }
                }
                Err(error) => {
                    self.in_flight = false;
                    return Err(self.told(error));
                }
            }
        }
    }

    /// An error that nothing was done is not true any more if an earlier presentation went unanswered.
    fn told(&self, error: Error) -> Error {
        if self.suspect && error.kind() == ErrorKind::Unavailable {
            return Error::new(ErrorKind::Unknown, "the store went away before it answered the claim")
                .for_name(&self.claim.name)
                .caused_by(error)
                .advise("the lock, if it was granted, is being released in the background");
        }
        error.for_name(&self.claim.name)
    }

    /// The time was up before anybody said that the lock is busy.
    fn unheard(&self) -> Error {
        Error::new(ErrorKind::Unknown, "the store did not answer before the time was up")
            .for_name(&self.claim.name)
            .on_store(&self.keeper.store().location())
            .advise("the lock, if it was granted, is being released in the background")
    }

    fn too_slow(&self) -> Error {
        let ttl = self.claim.ttl;
        Error::new(
            ErrorKind::Unavailable,
            format!("the store's answers take longer than the TTL of {ttl:?} allows"),
        )
        .for_name(&self.claim.name)
        .advise("use a longer TTL")
    }

    fn disarm(&mut self) {
        self.suspect = false;
        self.in_flight = false;
    }
}

impl Drop for Armed<'_> {
    fn drop(&mut self) {
        if self.suspect || self.in_flight {
            let until = clock::now().plus(self.claim.ttl).plus(Duration::from_secs(1));
            self.keeper.post_release(Held::unanswered(self.claim), until);
        }
    }
}
