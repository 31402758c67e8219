//! Acquiring: present the claim; wait in line to be handed the lock, or, where there is no line, for the timer; present
//! it again.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use crate::clock::{self, Instant, Now};
use crate::deadlock::Lookout;
use crate::error::{Error, ErrorKind, Result};
use crate::keeper::Keeper;
use crate::lease::valid_until;
use crate::retry::{Retry, Waits};
use crate::store::Woken;
use crate::types::{Acquired, Claim, Grant, Held, Holder, Owner, Ticket};

/// How often one look at a lock is presented when its answers are lost, or come too late to be believed.
const PRESENTATIONS: u32 = 3;
/// A wait is never shorter, whatever the policy says.
const LEAST_WAIT: Duration = Duration::from_millis(1);
/// How far ahead a retry policy is asked how long it goes on, by one who waits in line and needs no tries: at first, and
/// then twice as far each time, at most.
pub(crate) const POLICY_STEP: Duration = Duration::from_millis(50);
const POLICY_STEP_MOST: Duration = Duration::from_secs(60);

/// How long one who gives up waits to hear that it has left the line.
const LEAVING: Duration = Duration::from_millis(100);

/// Who is told where a waiter stands in line.
#[derive(Clone)]
pub(crate) struct Watcher(pub(crate) Arc<dyn Fn(&Ticket) + Send + Sync>);

impl fmt::Debug for Watcher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Watcher")
    }
}

/// How one acquisition waits.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Patience<'a> {
    /// `None`: one look, no waiting.
    pub(crate) retry: Option<&'a Retry>,
    pub(crate) deadline: Instant,
    pub(crate) watcher: Option<&'a Watcher>,
    /// The unit of work that waits, and after how long in line it looks for a deadlock.
    pub(crate) owner: Option<(&'a Owner, Duration)>,
}

/// A grant, with what its holder must know of how it came about.
#[derive(Debug)]
pub(crate) struct Won {
    pub(crate) grant: Grant,
    pub(crate) sent: Now,
    /// Whether another presentation of the claim may still be under way.
    pub(crate) suspect: bool,
    /// Whether it was handed over by who had it before, with a lease that may be shorter than asked.
    pub(crate) was_handed: bool,
}

/// How an acquisition ended without an error.
#[derive(Debug)]
pub(crate) enum Ended {
    Won(Won),
    /// The time or the policy ended first.
    Busy(Option<Holder>),
}

/// Presents `claim` until it is granted, the deadline has come, or the policy ends.
///
/// Dropped at any await it leaves nothing behind: the keeper releases what may have been granted.
pub(crate) async fn acquire(keeper: &Keeper, claim: &Claim, patience: Patience<'_>) -> Result<Ended> {
    let Patience { retry, deadline, .. } = patience;
    let mut armed = Armed {
        keeper,
        claim,
        suspect: false,
        in_flight: false,
        queued: None,
        is_told: false,
        told: None,
        lookout: None,
    };
    let mut waits: Option<Waits> = None;
    let mut outage: Option<Instant> = None;
    loop {
        let holder = match clock::timeout_at(deadline, armed.look()).await {
            None if waits.is_none() => return Err(armed.unheard()),
            None => return Ok(Ended::Busy(None)),
            Some(Ok(Looked::Won(won))) => {
                armed.disarm();
                return Ok(Ended::Won(won));
            }
            Some(Ok(Looked::Busy(holder))) => {
                outage = None;
                Some(holder)
            }
            Some(Ok(Looked::Queued(ticket))) => {
                outage = None;
                let Some(retry) = retry else { return Ok(Ended::Busy(ticket.holder().cloned())) };
                let waits = waits.get_or_insert_with(|| retry.waits());
                // Boxed, for what is rare must not make the common case carry its room.
                match Box::pin(armed.in_line(ticket, waits, patience)).await {
                    Line::Won(won) => {
                        armed.disarm();
                        return Ok(Ended::Won(won));
                    }
                    Line::Over(holder) => {
                        Box::pin(armed.leave()).await;
                        return Ok(Ended::Busy(holder));
                    }
                    Line::Look => continue,
                    Line::Failed(error) => return Err(error),
                }
            }
            // Fails fast at the first look; a waiter rides out an outage as long as a lease.
            Some(Err(error)) => {
                let since = *outage.get_or_insert_with(clock::now);
                if waits.is_none() || !error.is_transient() || clock::now().since(since) > claim.ttl {
                    return Err(error);
                }
                None
            }
        };
        let Some(retry) = retry else { return Ok(Ended::Busy(holder)) };
        let Some(wait) = waits.get_or_insert_with(|| retry.waits()).next() else {
            return Ok(Ended::Busy(holder));
        };
        // The holder's lease ends then at the latest, renewed or not worth waiting for longer.
        let remaining = holder.as_ref().and_then(|holder| holder.remaining);
        let until_end = remaining.map_or(Duration::MAX, |left| left.saturating_add(LEAST_WAIT));
        let again = clock::now().plus(wait.min(until_end).max(LEAST_WAIT));
        clock::sleep_until(again.min(deadline)).await;
        if clock::now() >= deadline {
            return Ok(Ended::Busy(holder));
        }
    }
}

/// How long a policy goes on from now, as far as `step` asks; `None` if it has ended.
pub(crate) fn policy_until(waits: &mut Waits, step: Duration) -> Option<Instant> {
    let mut total = waits.next()?.max(LEAST_WAIT);
    while total < step {
        let Some(wait) = waits.next() else { break };
        total = total.saturating_add(wait.max(LEAST_WAIT));
    }
    Some(clock::now().plus(total))
}

/// How a stay in line ended.
enum Line {
    Won(Won),
    Over(Option<Holder>),
    Look,
    Failed(Error),
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
    /// Whether an answer is due.
    in_flight: bool,
    /// The session on which the claim was put in line.
    queued: Option<u64>,
    /// Whether its watcher was told a place in line, and which one last.
    is_told: bool,
    told: Option<u64>,
    /// For a claim in line that has an owner.
    lookout: Option<Lookout>,
}

impl Armed<'_> {
    /// Waits in line until the lock is handed over, there is reason to look again, or the patience is at its end.
    async fn in_line(&mut self, mut ticket: Ticket, waits: &mut Waits, patience: Patience<'_>) -> Line {
        // A policy without end need not be asked when that is, some hundred waits ahead.
        let endless = patience.retry.is_some_and(Retry::is_endless);
        let (mut until, mut step) = (if endless { Instant::FAR } else { clock::now() }, POLICY_STEP);
        // Whoever was told this place hears no more of it for looks and policies that change nothing.
        let mut news = !self.is_told || self.told != ticket.ahead();
        if let Some((owner, after)) = patience.owner {
            self.lookout.get_or_insert_with(|| Lookout::new(self.keeper.store(), owner, after));
        }
        loop {
            if let Some(Watcher(tell)) = patience.watcher
                && std::mem::take(&mut news)
            {
                (self.is_told, self.told) = (true, ticket.ahead());
                tell(&ticket);
            }
            if clock::now() >= until {
                // The policy spaces no tries here; what counts is how long it goes on.
                match policy_until(waits, step) {
                    Some(later) => (until, step) = (later, (step * 2).min(POLICY_STEP_MOST)),
                    None => return Line::Over(ticket.holder().cloned()),
                }
            }
            let woken = self.keeper.store().woken(&ticket);
            let woken = clock::timeout_at(until.min(patience.deadline), woken);
            let woken = match Lookout::beside(self.lookout.as_mut(), &ticket, woken).await {
                Ok(woken) => woken,
                Err(deadlock) => return Line::Failed(deadlock),
            };
            match woken {
                Some(Woken::Granted { grant, sent }) => {
                    if valid_until(sent.boot, grant.ttl) > clock::now() {
                        return Line::Won(Won { grant, sent, suspect: self.suspect, was_handed: true });
                    }
                    return Line::Look;
                }
                Some(Woken::Waiting(now)) => (ticket, news) = (now, true),
                Some(Woken::Look) => return Line::Look,
                None if clock::now() >= patience.deadline => return Line::Over(ticket.holder().cloned()),
                None => {}
            }
        }
    }

    /// Leaves the line before it is told that the time is up: an unlock just after must not hand the lock to it. Should that
    /// take long, or this be dropped, the keeper does it.
    async fn leave(&mut self) {
        let Some(session) = self.queued.filter(|_| !self.suspect) else { return };
        let held = Held::queued(self.claim, session);
        let left = self.keeper.store().release(&held);
        if let Some(Ok(_)) = clock::timeout_at(clock::now().plus(LEAVING), left).await {
            self.disarm();
        }
    }

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
                        return Ok(Looked::Won(Won {
                            grant,
                            sent,
                            suspect: self.suspect,
                            was_handed: self.queued.is_some(),
                        }));
                    }
                    // Granted, but the answer took the whole lease: ask how it stands now.
                    self.suspect = true;
                    if tries >= PRESENTATIONS {
                        return Err(self.too_slow());
                    }
                }
                Ok(Acquired::Busy(holder)) => {
                    self.in_flight = false;
                    self.queued = None;
                    return Ok(Looked::Busy(holder));
                }
                Ok(Acquired::Queued(ticket)) => {
                    self.in_flight = false;
                    // Without a place it is not known to be in line: the presentation that was to join it went unanswered.
                    self.suspect |= ticket.ahead().is_none();
                    self.queued = Some(ticket.session);
                    return Ok(Looked::Queued(ticket));
                }
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
        self.queued = None;
    }
}

impl Drop for Armed<'_> {
    fn drop(&mut self) {
        let held = match self.queued {
            _ if self.suspect || self.in_flight => Held::unanswered(self.claim),
            Some(session) => Held::queued(self.claim, session),
            None => return,
        };
        let until = clock::now().plus(self.claim.ttl).plus(Duration::from_secs(1));
        self.keeper.post_release(held, until);
    }
}
