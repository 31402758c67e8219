//! What is known of a claim at each node, and the table of all claims.
//!
//! After a defeat some of a claim's requests and releases may still be under way. So that they can do no harm to what comes
//! later, each further attempt goes to the nodes under an id of its own, made from the claim's and the attempt's number.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;

use super::node::Node;
use crate::clock::{self, Instant};
use crate::error::{Error, ErrorKind, Result};
use crate::types::{Acquired, Claim, ClaimId, FencingToken, Grant, Held, Released, Ticket};

/// How long a claim that may be presented again, or released, is remembered after its lease.
const REMEMBERED: Duration = Duration::from_secs(60);
/// How long one that stands in line is remembered, if nobody asks how it stands.
const IN_LINE: Duration = Duration::from_secs(3600);
/// From so many claims on those that have ended are looked for.
const SWEEP_FROM: usize = 256;

/// The id under which an attempt of a claim goes to the nodes: the claim's own for the first, number 0.
pub(super) fn node_id(id: ClaimId, number: u64) -> ClaimId {
    let mut bytes = *id.as_bytes();
    for (byte, change) in bytes[8..].iter_mut().zip(number.to_be_bytes()) {
        *byte ^= change;
    }
    ClaimId::from_bytes(bytes)
}

/// What a node has of an attempt, as far as is known.
#[derive(Clone, Copy, Debug, Default)]
struct Place {
    /// The token and session of its grant.
    hold: Option<(FencingToken, u64)>,
    /// Presentations under way.
    asked: u32,
    /// Presentations begun: an answer to one that is not the last says nothing of what is there now, but that it was granted.
    begun: u32,
    /// Whether a presentation went unanswered.
    suspect: bool,
    /// The session on which it was put in line.
    line: Option<u64>,
    /// Whether somebody else had it there when the node last said.
    by_other: bool,
}

impl Place {
    fn is_clear(&self) -> bool {
        self.hold.is_none() && self.asked == 0 && !self.suspect && self.line.is_none()
    }
}

/// How an attempt is presented to a node.
#[derive(Clone, Copy, Debug)]
pub(super) enum Way {
    /// To be granted with this token, or not at all.
    Proposing(FencingToken),
    /// To stand in line if somebody has it, where no more than so many do.
    InLine(Option<u32>),
}

/// One attempt to get a lock, and the hold that may come of it.
#[derive(Debug)]
pub(super) struct Attempt {
    /// The claim as the nodes see it.
    claim: Claim,
    pub(super) number: u64,
    places: Mutex<Vec<Place>>,
    settled: Notify,
    /// Whether it was forbidden for good somewhere, so that it cannot be presented again.
    forbidden: AtomicBool,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Attempt {
    fn new(claim: &Claim, number: u64, nodes: usize) -> Arc<Self> {
        let mut claim = claim.clone().with_queue(false);
        claim.id = node_id(claim.id, number);
        claim.ballot = None;
        let places = Mutex::new(vec![Place::default(); nodes]);
        Arc::new(Self { claim, number, places, settled: Notify::new(), forbidden: AtomicBool::new(false) })
    }

    fn places(&self) -> MutexGuard<'_, Vec<Place>> {
        lock(&self.places)
    }

    pub(super) fn ttl(&self) -> Duration {
        self.claim.ttl
    }

    /// The nodes at which something of it may be, or come to be.
    pub(super) fn involved(&self) -> Vec<usize> {
        self.such(|place| !place.is_clear())
    }

    /// At how many nodes somebody else had the lock, `involved` left out: these say themselves how it stands.
    pub(super) fn elsewhere(&self, involved: &[usize]) -> usize {
        self.such(|place| place.by_other).iter().filter(|index| !involved.contains(index)).count()
    }

    /// The nodes that have nothing of it.
    pub(super) fn lacking(&self) -> Vec<usize> {
        self.such(Place::is_clear)
    }

    /// The nodes at which it can be presented anew, since they do not hold for it as far as is known.
    pub(super) fn to_top_up(&self) -> Vec<usize> {
        self.such(|place| place.hold.is_none() && place.asked == 0 && place.line.is_none())
    }

    fn such(&self, is: impl Fn(&Place) -> bool) -> Vec<usize> {
        self.places().iter().enumerate().filter(|(_, place)| is(place)).map(|(index, _)| index).collect()
    }

    /// What to renew at a node, if it holds there.
    pub(super) fn renewable(&self, index: usize, held: &Held) -> Option<Held> {
        let (token, session) = self.places()[index].hold?;
        Some(Held { id: self.claim.id, token: Some(token), session, ..held.clone() })
    }

    /// What to release at a node, if anything of it may be there.
    fn releasable(&self, index: usize) -> Option<Held> {
        let place = self.places()[index];
        if place.is_clear() {
            return None;
        }
        let mut held = Held::unanswered(&self.claim);
        held.token = place.hold.map(|(token, _)| token);
        held.session = place.hold.map(|(_, session)| session).or(place.line).unwrap_or(0);
        held.suspect = place.suspect;
        held.waiting = place.line.is_some();
        Some(held)
    }

    /// Takes note that a node lost it, or gave back what it had.
    pub(super) fn cleared(&self, index: usize, token: Option<FencingToken>) {
        let mut places = self.places();
        let place = &mut places[index];
        if token.is_none() || place.hold.map(|(token, _)| token) == token {
            place.hold = None;
        }
        if token.is_none() {
            (place.suspect, place.line) = (false, None);
        }
    }

    /// Takes note of what a node granted.
    pub(super) fn granted(&self, index: usize, grant: &Grant) {
        let mut places = self.places();
        places[index].hold = Some((grant.token, grant.session));
        places[index].line = None;
    }

    /// Waits until no presentation is under way at a node.
    async fn quiet(&self, index: usize) {
        loop {
            let settled = self.settled.notified();
            tokio::pin!(settled);
            settled.as_mut().enable();
            if self.places()[index].asked == 0 {
                return;
            }
            settled.await;
        }
    }

    /// Presents it at one node.
    pub(super) fn present(
        self: &Arc<Self>,
        node: &Arc<Node>,
        way: Way,
    ) -> impl Future<Output = Result<Acquired>> + Send + 'static + use<> {
        let (asking, node) = (Asking::begin(self, node.index), node.clone());
        let mut claim = self.claim.clone();
        match way {
            Way::Proposing(ballot) => claim.ballot = Some(ballot),
            Way::InLine(limit) => (claim.queue, claim.queue_limit) = (true, limit),
        }
        async move {
            let answer = node.acquire(&claim).await;
            asking.answered(&answer);
            answer
        }
    }

    /// Gives back what one node has of it, once no presentation is under way there. A node that cannot be told now is told
    /// when it is back, if that is before `until`.
    pub(super) fn give_back(
        self: &Arc<Self>,
        node: &Arc<Node>,
        until: Instant,
        at_once: bool,
    ) -> impl Future<Output = Result<Released>> + Send + 'static + use<> {
        let (attempt, node) = (self.clone(), node.clone());
        async move {
            attempt.quiet(node.index).await;
            let Some(mut held) = attempt.releasable(node.index) else {
                let by_other = attempt.places()[node.index].by_other;
                return Ok(if by_other { Released::HeldByOther } else { Released::NotHeld });
            };
            let answer = if at_once || node.is_in_service() {
                node.release(&held).await
            } else {
                Err(Error::new(ErrorKind::Unavailable, "set aside"))
            };
            if held.suspect || answer.is_err() {
                attempt.forbidden.store(true, Ordering::Release);
            }
            if answer.is_err() {
                held.suspect = true;
                node.tell_later(held, until);
            }
            attempt.cleared(node.index, None);
            answer
        }
    }
}

/// A presentation under way at one node. Dropped without an answer, nobody knows.
struct Asking {
    attempt: Arc<Attempt>,
    index: usize,
    /// Which presentation at that node it is.
    number: u32,
    is_answered: bool,
}

impl Asking {
    fn begin(attempt: &Arc<Attempt>, index: usize) -> Self {
        let mut places = attempt.places();
        let place = &mut places[index];
        place.asked += 1;
        place.begun += 1;
        Self { attempt: attempt.clone(), index, number: place.begun, is_answered: false }
    }

    fn answered(mut self, answer: &Result<Acquired>) {
        self.is_answered = true;
        let mut places = self.attempt.places();
        let place = &mut places[self.index];
        let is_last = place.begun == self.number;
        match answer {
            Ok(Acquired::Granted(grant)) => {
                place.hold = Some((grant.token, grant.session));
                (place.line, place.by_other) = (None, false);
            }
            Ok(Acquired::Busy(_)) if is_last => (place.hold, place.by_other) = (None, true),
            Ok(Acquired::Queued(ticket)) => {
                if is_last {
                    (place.hold, place.by_other) = (None, true);
                }
                place.line = Some(ticket.session);
                place.suspect |= ticket.ahead().is_none();
            }
            Err(error) if error.kind() == ErrorKind::Unknown => place.suspect = true,
            Ok(Acquired::Busy(_)) | Err(_) => {}
        }
    }
}

impl Drop for Asking {
    fn drop(&mut self) {
        let mut places = self.attempt.places();
        let place = &mut places[self.index];
        place.asked -= 1;
        place.suspect |= !self.is_answered;
        drop(places);
        self.attempt.settled.notify_waiters();
    }
}

/// How a claim stands.
#[derive(Clone, Debug)]
enum Phase {
    /// Being presented.
    Open,
    /// Won: the token, and until when it is valid.
    Held(FencingToken, Instant),
    /// In line at one node.
    Line(usize, Box<Ticket>),
    /// Handed over by that node, and not presented to the others since.
    Handed(usize),
    /// Given up; what is left of it is being given back, and it may be presented again.
    Over,
    /// Released by who made it: the same, and it will not be presented again.
    Released,
}

impl Phase {
    fn is_over(&self) -> bool {
        matches!(self, Self::Over | Self::Released)
    }
}

#[derive(Debug)]
struct Entry {
    attempt: Arc<Attempt>,
    phase: Phase,
    ends: Instant,
}

/// How a presentation begins.
#[derive(Debug)]
pub(super) struct Begun {
    pub(super) attempt: Arc<Attempt>,
    /// The token of the hold that it has already.
    pub(super) token: Option<FencingToken>,
    /// The node where it stands in line, or that handed the lock to it.
    pub(super) line: Option<usize>,
    pub(super) was_handed: bool,
    /// An earlier attempt, to be given back.
    pub(super) replaced: Option<Arc<Attempt>>,
}

/// All claims of this store that hold, wait or are being given back.
#[derive(Debug, Default)]
pub(super) struct Table(Mutex<Entries>);

#[derive(Debug, Default)]
struct Entries {
    by_claim: HashMap<ClaimId, Entry>,
    sweep_at: usize,
}

impl Entries {
    fn sweep(&mut self, now: Instant) {
        if self.by_claim.len() >= self.sweep_at.max(SWEEP_FROM) {
            self.by_claim.retain(|_, entry| entry.ends > now);
            self.sweep_at = self.by_claim.len() * 2;
        }
    }

    fn entry(&mut self, id: ClaimId, attempt: &Arc<Attempt>) -> Option<&mut Entry> {
        self.by_claim.get_mut(&id).filter(|entry| Arc::ptr_eq(&entry.attempt, attempt))
    }
}

impl Table {
    /// How many claims it remembers.
    pub(super) fn len(&self) -> usize {
        lock(&self.0).by_claim.len()
    }

    /// The attempt with which a claim is presented now: the one that holds or waits, or a new one.
    pub(super) fn begin(&self, claim: &Claim, nodes: usize, now: Instant) -> Begun {
        let mut entries = lock(&self.0);
        entries.sweep(now);
        let ends = now.plus(claim.ttl).plus(REMEMBERED);
        let mut begun = Begun {
            attempt: Attempt::new(claim, 0, nodes),
            token: None,
            line: None,
            was_handed: false,
            replaced: None,
        };
        if let Some(entry) = entries.by_claim.get(&claim.id) {
            let same = match &entry.phase {
                Phase::Open => true,
                Phase::Held(token, valid) => {
                    begun.token = Some(*token);
                    *valid > now
                }
                Phase::Line(node, _) => {
                    begun.line = Some(*node);
                    true
                }
                Phase::Handed(node) => {
                    (begun.line, begun.was_handed) = (Some(*node), true);
                    true
                }
                Phase::Over | Phase::Released => false,
            };
            if same {
                begun.attempt = entry.attempt.clone();
            } else {
                begun.token = None;
                begun.attempt = Attempt::new(claim, entry.attempt.number + 1, nodes);
                begun.replaced = Some(entry.attempt.clone());
            }
        }
        let entry = Entry { attempt: begun.attempt.clone(), phase: Phase::Open, ends };
        entries.by_claim.insert(claim.id, entry);
        begun
    }

    /// Another attempt of the same claim, in the place of `attempt`, which is to be given back.
    pub(super) fn begin_again(&self, claim: &Claim, attempt: &Attempt, nodes: usize) -> Arc<Attempt> {
        let next = Attempt::new(claim, attempt.number + 1, nodes);
        let ends = clock::now().plus(claim.ttl).plus(REMEMBERED);
        let entry = Entry { attempt: next.clone(), phase: Phase::Open, ends };
        lock(&self.0).by_claim.insert(claim.id, entry);
        next
    }

    /// Takes note that an attempt has won; false if it was released meanwhile.
    pub(super) fn won(
        &self,
        id: ClaimId,
        attempt: &Arc<Attempt>,
        token: FencingToken,
        valid: Instant,
    ) -> bool {
        let mut entries = lock(&self.0);
        let Some(entry) = entries.entry(id, attempt).filter(|entry| !entry.phase.is_over()) else {
            return false;
        };
        entry.phase = Phase::Held(token, valid);
        entry.ends = valid.plus(REMEMBERED);
        true
    }

    /// Takes note that an attempt stands in line; false if it was released meanwhile.
    pub(super) fn in_line(&self, id: ClaimId, attempt: &Arc<Attempt>, node: usize, ticket: Ticket) -> bool {
        let mut entries = lock(&self.0);
        let Some(entry) = entries.entry(id, attempt).filter(|entry| !entry.phase.is_over()) else {
            return false;
        };
        entry.phase = Phase::Line(node, Box::new(ticket));
        entry.ends = clock::now().plus(IN_LINE);
        true
    }

    /// Where a claim stands in line.
    pub(super) fn line(&self, id: ClaimId) -> Option<(Arc<Attempt>, usize, Ticket)> {
        let mut entries = lock(&self.0);
        let entry = entries.by_claim.get_mut(&id)?;
        let Phase::Line(node, ticket) = &entry.phase else { return None };
        entry.ends = clock::now().plus(IN_LINE);
        Some((entry.attempt.clone(), *node, (**ticket).clone()))
    }

    /// Takes note that the node where it stands in line handed the lock to a claim; `None` if it does not wait any more.
    pub(super) fn handed(
        &self,
        id: ClaimId,
        attempt: &Arc<Attempt>,
        node: usize,
        grant: &Grant,
    ) -> Option<()> {
        let mut entries = lock(&self.0);
        let entry = entries.entry(id, attempt)?;
        if matches!(entry.phase, Phase::Line(..)) {
            attempt.granted(node, grant);
            entry.phase = Phase::Handed(node);
        }
        Some(())
    }

    /// The attempt that holds for a claim, and its token; `None` if this store does not know the claim as a holder.
    pub(super) fn held(&self, id: ClaimId) -> Option<(Arc<Attempt>, FencingToken)> {
        match lock(&self.0).by_claim.get(&id)? {
            Entry { attempt, phase: Phase::Held(token, _), .. } => Some((attempt.clone(), *token)),
            _ => None,
        }
    }

    /// Lengthens a hold, and calls `while_valid` if it is one still: nothing can release it meanwhile.
    pub(super) fn renewed(
        &self,
        id: ClaimId,
        attempt: &Arc<Attempt>,
        until: Instant,
        while_valid: impl FnOnce(FencingToken),
    ) {
        let mut entries = lock(&self.0);
        let Some(entry) = entries.entry(id, attempt) else { return };
        if let Phase::Held(token, valid) = &mut entry.phase {
            *valid = until;
            entry.ends = until.plus(REMEMBERED);
            if until > clock::now() {
                while_valid(*token);
            }
        }
    }

    /// Ends an attempt, so that it is given back.
    pub(super) fn over(&self, id: ClaimId, attempt: &Arc<Attempt>) {
        if let Some(entry) = lock(&self.0).entry(id, attempt) {
            entry.phase = Phase::Over;
        }
    }

    /// Ends whatever a claim has, so that it is given back; `None` if nothing is known of it.
    pub(super) fn end(&self, id: ClaimId) -> Option<Arc<Attempt>> {
        let mut entries = lock(&self.0);
        let entry = entries.by_claim.get_mut(&id)?;
        entry.phase = Phase::Released;
        Some(entry.attempt.clone())
    }

    /// Forgets a claim of which nothing is left anywhere. One that may be presented again stays known for a while if it
    /// could not use the same id then.
    pub(super) fn forget(&self, id: ClaimId, attempt: &Arc<Attempt>) {
        let mut entries = lock(&self.0);
        let Some(entry) = entries.entry(id, attempt) else { return };
        let is_done = match entry.phase {
            Phase::Released => true,
            Phase::Over => attempt.number == 0 && !attempt.forbidden.load(Ordering::Acquire),
            _ => false,
        };
        if is_done && attempt.involved().is_empty() {
            entries.by_claim.remove(&id);
        }
    }

    /// Forgets a claim that the nodes refuse for good.
    pub(super) fn refused(&self, id: ClaimId, attempt: &Arc<Attempt>) {
        let mut entries = lock(&self.0);
        if attempt.number == 0 && entries.entry(id, attempt).is_some() {
            entries.by_claim.remove(&id);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::{Holder, Name};

    #[test]
    fn a_node_that_is_to_answer_the_release_is_not_counted_before_it_does() {
        let name = Name::new("a").unwrap();
        let attempt = Attempt::new(&Claim::new(name, clock::claim_id(), Duration::from_secs(1)), 0, 3);
        let asking = Asking::begin(&attempt, 1);
        let involved = attempt.involved();
        assert_eq!(involved, [1]);
        // Its answer comes after the release began: it would count as two nodes.
        asking.answered(&Ok(Acquired::Busy(Holder::default())));
        assert_eq!((attempt.elsewhere(&involved), attempt.elsewhere(&[])), (0, 1));
    }
}
