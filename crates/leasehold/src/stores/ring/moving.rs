//! Names whose place changes: while nodes are added or removed they are taken where they were and where they will be.
//!
//! The old place comes first. So those who know the old places only, and those who know both, exclude each other at the
//! old one; those who know both, and those who know the new places only, at the new one. A claim that has the old place
//! and finds the new one taken waits in line there, and renews the old one meanwhile.
//!
//! The token is the same at both: each place is proposed the other's until they agree, and stores it as its last one. So it is
//! larger than all that either gave before, and whoever is granted the lock next, knowing one place only, gets a larger one.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::clock::{self, Instant};
use crate::error::{Error, ErrorKind, Result};
use crate::store::{Store, Woken, heard_every};
use crate::types::{
    Acquired, Claim, ClaimId, FencingToken, Grant, Held, Holder, LockView, Name, Page, Query, Released,
    Renewal, Ticket,
};

use super::merge;

/// How often both places are asked so that they agree on a token: once if the old one's is larger than the new one's last,
/// else twice; once more for a lease that ended and was granted anew meanwhile.
const ROUNDS: u32 = 3;
/// From a renewal of the old place that failed to the next.
const TRY_AGAIN: Duration = Duration::from_millis(200);
/// For how long after its lease a lock is remembered that was neither released nor lost.
const REMEMBERED: Duration = Duration::from_secs(60);

/// The places of a name that moves.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pair<'a> {
    pub(super) old: &'a dyn Store,
    pub(super) new: &'a dyn Store,
}

impl<'a> Pair<'a> {
    fn at(self, side: Side) -> &'a dyn Store {
        match side {
            Side::Old => self.old,
            Side::New => self.new,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Side {
    Old,
    New,
}

/// The claims of this process on names that move.
#[derive(Debug, Default)]
pub(super) struct Moving(Mutex<Table>);

#[derive(Debug, Default)]
struct Table {
    claims: HashMap<ClaimId, Entry>,
    /// At so many it is looked for what can be forgotten.
    tidy_at: usize,
}

#[derive(Debug)]
struct Entry {
    claim: Claim,
    old: Leg,
    new: Leg,
    waits: Side,
    /// When the old place is to be renewed, for a claim that waits at the new one.
    renew_at: Instant,
    /// What it was granted with.
    token: Option<FencingToken>,
    /// Until when it is remembered, unless released before; `None` while it waits.
    until: Option<Instant>,
}

/// A claim at one of the places.
#[derive(Clone, Debug, Default)]
struct Leg {
    session: u64,
    /// The token there.
    granted: Option<FencingToken>,
    is_waiting: bool,
    /// Whether it was ever presented there.
    is_sent: bool,
    /// Whether an answer is due, or never came.
    is_unanswered: bool,
    released: Option<Released>,
}

impl Leg {
    fn take_in(&mut self, answer: &Result<Acquired>) {
        match answer {
            Ok(Acquired::Granted(grant)) => {
                self.session = grant.session;
                (self.granted, self.is_waiting) = (Some(grant.token), false);
            }
            Ok(Acquired::Queued(ticket)) => {
                self.session = ticket.session;
                (self.granted, self.is_waiting) = (None, true);
            }
            Ok(Acquired::Busy(_)) => (self.granted, self.is_waiting) = (None, false),
            Err(_) => {}
        }
    }

    fn is_clean(&self) -> bool {
        self.granted.is_none() && !self.is_waiting && !self.is_unanswered
    }

    /// The claim as this place knows it, `held` being how the caller does.
    fn held(&self, held: &Held, queues: bool) -> Held {
        let suspect = held.suspect || self.is_unanswered;
        Held {
            token: self.granted,
            session: self.session,
            suspect,
            waiting: held.waiting || self.is_waiting || suspect && queues,
            ..held.clone()
        }
    }
}

impl Entry {
    fn leg(&mut self, side: Side) -> &mut Leg {
        match side {
            Side::Old => &mut self.old,
            Side::New => &mut self.new,
        }
    }
}

/// What of a held lock is to be renewed.
#[derive(Debug)]
pub(super) enum Legs {
    /// Not what it was granted.
    Gone,
    Both(Held, Held),
}

/// What holds of a lock by the answers of its places: held only if it is at each, for the shorter time.
pub(super) fn weaker(answers: Vec<Result<Renewal>>) -> Result<Renewal> {
    let mut held = None;
    let mut failed = None;
    for answer in answers {
        match answer {
            Ok(Renewal::Lost) => return Ok(Renewal::Lost),
            Ok(Renewal::Renewed(left)) => held = Some(held.map_or(left, |least: Duration| least.min(left))),
            Err(error) => failed = Some(error),
        }
    }
    match (failed, held) {
        (Some(error), _) => Err(error),
        (None, Some(left)) => Ok(Renewal::Renewed(left)),
        (None, None) => Err(Error::new(ErrorKind::Unknown, "no answer for this lock")),
    }
}

/// Held by another is told before not held, and that before released: it was this claim's only if it was so at each place.
fn worse(one: Released, other: Released) -> Released {
    match (one, other) {
        (Released::HeldByOther, _) | (_, Released::HeldByOther) => Released::HeldByOther,
        (Released::NotHeld, _) | (_, Released::NotHeld) => Released::NotHeld,
        _ => Released::Released,
    }
}

/// How a lock that moves looks.
pub(super) async fn view(pair: Pair<'_>, query: &Query) -> Result<Page<LockView>> {
    let mut page = pair.old.inspect(query).await?;
    for other in pair.new.inspect(query).await?.items {
        match page.items.iter_mut().find(|view| view.name == other.name) {
            Some(view) => merge::add(view, other),
            None => page.items.push(other),
        }
    }
    Ok(page)
}

impl Moving {
    fn table(&self) -> MutexGuard<'_, Table> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is remembered of a claim.
    fn with<T>(&self, id: ClaimId, work: impl FnOnce(&mut Entry) -> T) -> Option<T> {
        self.table().claims.get_mut(&id).map(work)
    }

    fn note(&self, claim: &Claim) {
        let mut table = self.table();
        if table.claims.len() >= table.tidy_at {
            let now = clock::now();
            table.claims.retain(|_, entry| entry.until.is_none_or(|until| until > now));
            table.tidy_at = (table.claims.len() * 2).max(64);
        }
        table.claims.entry(claim.id).or_insert_with(|| Entry {
            claim: claim.clone(),
            old: Leg::default(),
            new: Leg::default(),
            waits: Side::Old,
            renew_at: Instant::FAR,
            token: None,
            until: None,
        });
    }

    fn forget(&self, id: ClaimId) {
        self.table().claims.remove(&id);
    }

    fn forget_if_clean(&self, id: ClaimId) {
        let mut table = self.table();
        if table.claims.get(&id).is_some_and(|entry| entry.old.is_clean() && entry.new.is_clean()) {
            table.claims.remove(&id);
        }
    }

    /// Presents a claim at both places, the old one first, until both have it with the same token.
    pub(super) async fn acquire(&self, pair: Pair<'_>, claim: &Claim) -> Result<Acquired> {
        self.note(claim);
        let mut proposal = claim.clone();
        let mut tokens = (FencingToken::new(0), FencingToken::new(0));
        for round in 0..ROUNDS {
            let first = match self.present(pair, Side::Old, &proposal).await {
                Ok(Acquired::Granted(grant)) => grant,
                Err(error) if round > 0 => return Err(self.withdraw(pair, claim, error).await?),
                other => return self.not_there(pair, claim, other).await,
            };
            let was_in_line = self.with(claim.id, |entry| entry.new.is_waiting).unwrap_or_default();
            let agreeing = claim.clone().with_ballot(first.token);
            let second = match self.present(pair, Side::New, &agreeing).await {
                Ok(Acquired::Granted(grant)) => grant,
                Err(error) if round > 0 => return Err(self.withdraw(pair, claim, error).await?),
                other => return self.not_yet(pair, claim, other, was_in_line).await,
            };
            if first.token == second.token {
                return Ok(self.hand_out(claim, first, second));
            }
            tokens = (first.token, second.token);
            // Beyond all that either has given this claim.
            let next = first.token.max(second.token).get().saturating_add(u64::from(claim.tokens.max(1)));
            proposal = claim.clone().with_ballot(FencingToken::new(next));
        }
        Err(self.withdraw(pair, claim, too_far_apart(pair, claim, tokens)).await?)
    }

    /// The old place is held, and the new one was not granted.
    async fn not_yet(
        &self,
        pair: Pair<'_>,
        claim: &Claim,
        answer: Result<Acquired>,
        was_in_line: bool,
    ) -> Result<Acquired> {
        match answer {
            Ok(Acquired::Queued(ticket)) => {
                self.with(claim.id, |entry| {
                    entry.waits = Side::New;
                    entry.renew_at = entry.renew_at.min(clock::now().plus(heard_every(claim.ttl)));
                });
                Ok(Acquired::Queued(ticket))
            }
            // The caller presents it again, or releases it at both.
            Err(error) if error.kind() == ErrorKind::Unknown || was_in_line => Err(error),
            other => {
                self.back_out(pair, Side::Old, claim).await?;
                other
            }
        }
    }

    /// What both places granted is given back for this reason, unless it is the caller who is to present again or release.
    async fn withdraw(&self, pair: Pair<'_>, claim: &Claim, why: Error) -> Result<Error> {
        if why.kind() != ErrorKind::Unknown {
            self.back_out(pair, Side::New, claim).await?;
            self.back_out(pair, Side::Old, claim).await?;
        }
        Ok(why)
    }

    async fn present(&self, pair: Pair<'_>, side: Side, claim: &Claim) -> Result<Acquired> {
        let owed = self.with(claim.id, |entry| {
            let leg = entry.leg(side);
            (leg.is_sent, leg.released) = (true, None);
            std::mem::replace(&mut leg.is_unanswered, true)
        });
        let answer = pair.at(side).acquire(claim).await;
        let unknown = match &answer {
            Err(error) => error.kind() == ErrorKind::Unknown,
            Ok(Acquired::Queued(ticket)) => ticket.ahead().is_none(),
            Ok(_) => false,
        };
        self.with(claim.id, |entry| {
            let leg = entry.leg(side);
            leg.take_in(&answer);
            leg.is_unanswered = unknown || owed.unwrap_or_default();
        });
        answer
    }

    /// The old place was not granted, whatever the new one is by now: that is given up.
    async fn not_there(&self, pair: Pair<'_>, claim: &Claim, answer: Result<Acquired>) -> Result<Acquired> {
        if matches!(answer, Ok(Acquired::Queued(_) | Acquired::Busy(_))) {
            let is_clean = self.with(claim.id, |entry| {
                (entry.waits, entry.renew_at) = (Side::Old, Instant::FAR);
                entry.new.is_clean()
            });
            if is_clean == Some(false) {
                self.back_out(pair, Side::New, claim).await?;
            }
        }
        self.forget_if_clean(claim.id);
        match answer {
            Ok(Acquired::Busy(mut holder)) => {
                correct(&[pair.new], &claim.name, &mut holder).await;
                Ok(Acquired::Busy(holder))
            }
            other => other,
        }
    }

    /// Gives a claim up at one place, where it may hold the lock or wait for it.
    async fn back_out(&self, pair: Pair<'_>, side: Side, claim: &Claim) -> Result<()> {
        let base = Held { suspect: false, ..Held::unanswered(claim) };
        let Some(held) = self.with(claim.id, |entry| entry.leg(side).held(&base, claim.queue)) else {
            return Ok(());
        };
        pair.at(side).release(&held).await.map_err(|error| {
            Error::new(ErrorKind::Unknown, "the lock could not be given back at one of its two places")
                .for_name(&claim.name)
                .caused_by(error)
        })?;
        self.with(claim.id, |entry| *entry.leg(side) = Leg::default());
        self.forget_if_clean(claim.id);
        Ok(())
    }

    /// The lock is held at both places with one token: one grant.
    fn hand_out(&self, claim: &Claim, first: Grant, second: Grant) -> Acquired {
        let until = clock::now().plus(claim.ttl).plus(REMEMBERED);
        self.with(claim.id, |entry| (entry.token, entry.until) = (Some(first.token), Some(until)));
        Acquired::Granted(Grant { token: first.token, ttl: first.ttl.min(second.ttl), session: 0 })
    }

    /// Waits where the claim stands in line.
    pub(super) async fn woken(&self, pair: Pair<'_>, ticket: &Ticket) -> Woken {
        loop {
            let waits = self.with(ticket.id, |entry| (entry.waits, entry.renew_at));
            let Some((side, renew_at)) = waits else { return Woken::Look };
            match clock::timeout_at(renew_at, pair.at(side).woken(ticket)).await {
                // There is another place to be looked at, and this one's grant is told again.
                Some(Woken::Granted { .. }) => return Woken::Look,
                Some(other) => return other,
                None if self.hold_on(pair, ticket.id).await => {}
                None => return Woken::Look,
            }
        }
    }

    /// Renews the old place of a claim that waits at the new one. False if it is lost.
    async fn hold_on(&self, pair: Pair<'_>, id: ClaimId) -> bool {
        let held = self.with(id, |entry| {
            let base = Held { suspect: false, waiting: false, ..Held::unanswered(&entry.claim) };
            (entry.old.held(&base, false), heard_every(entry.claim.ttl))
        });
        let Some((held, interval)) = held else { return false };
        let answer = weaker(pair.old.renew(std::slice::from_ref(&held)).await);
        let next = match answer {
            Ok(Renewal::Renewed(_)) => interval,
            Ok(Renewal::Lost) => return false,
            Err(_) => TRY_AGAIN.min(interval),
        };
        self.with(id, |entry| entry.renew_at = clock::now().plus(next));
        true
    }

    /// Where a claim stands in line.
    pub(super) fn waits_at<'a>(&self, pair: Pair<'a>, id: ClaimId) -> &'a dyn Store {
        pair.at(self.with(id, |entry| entry.waits).unwrap_or(Side::Old))
    }

    /// What is to be renewed of a lock that is held.
    pub(super) fn legs(&self, held: &Held) -> Legs {
        let known = self.with(held.id, |entry| {
            if held.token.is_some() && held.token != entry.token {
                return Legs::Gone;
            }
            Legs::Both(entry.old.held(held, false), entry.new.held(held, false))
        });
        known.unwrap_or_else(|| {
            // Of another process, or forgotten: the claim's id must do.
            let held = Held { token: None, session: 0, ..held.clone() };
            Legs::Both(held.clone(), held)
        })
    }

    /// Takes in how a renewal went. True if the lock is lost, and may still be held at one of the places.
    pub(super) fn renewed(&self, held: &Held, answer: &Result<Renewal>) -> bool {
        let is_known = self.with(held.id, |entry| {
            if let (Ok(Renewal::Renewed(left)), true) = (answer, entry.until.is_some()) {
                entry.until = Some(clock::now().plus(*left).plus(REMEMBERED));
            }
            entry.token.is_some() && entry.token == held.token
        });
        is_known == Some(true) && matches!(answer, Ok(Renewal::Lost))
    }

    /// Releases a claim at both places, the new one first: whoever is handed the old one then finds the new one free.
    pub(super) async fn release(&self, pair: Pair<'_>, held: &Held) -> Result<Released> {
        let (mut told, mut failed) = (None, None);
        for side in [Side::New, Side::Old] {
            let leg = self.with(held.id, |entry| {
                let queues = entry.claim.queue;
                entry.until = Some(clock::now().plus(entry.claim.ttl).plus(REMEMBERED));
                let leg = entry.leg(side);
                (leg.is_sent, leg.released, leg.held(held, queues))
            });
            let answer = match leg {
                // Never asked, and so nothing to be taken back.
                Some((false, ..)) => continue,
                Some((_, Some(answer), _)) => Ok(answer),
                Some((.., held)) => pair.at(side).release(&held).await,
                None => pair.at(side).release(&Held { session: 0, ..held.clone() }).await,
            };
            match answer {
                Ok(answer) => {
                    self.with(held.id, |entry| entry.leg(side).released = Some(answer));
                    told = Some(told.map_or(answer, |other| worse(answer, other)));
                }
                Err(error) => failed = Some(error),
            }
        }
        if let Some(error) = failed {
            return Err(error);
        }
        self.forget(held.id);
        Ok(told.unwrap_or(Released::NotHeld))
    }
}

/// Corrects the token of a holder that was seen at one place, while the two were not agreed yet: it is given the largest.
pub(super) async fn correct(places: &[&dyn Store], name: &Name, holder: &mut Holder) {
    for place in places {
        let seen = place.inspect(&Query::One(name.clone())).await;
        let other = seen.ok().and_then(|page| page.items.into_iter().next()?.holder);
        if let Some(other) = other.filter(|other| other.id.is_some() && other.id == holder.id) {
            holder.token = holder.token.max(other.token);
        }
    }
}

fn too_far_apart(pair: Pair<'_>, claim: &Claim, tokens: (FencingToken, FencingToken)) -> Error {
    let (old, new) = (pair.old.location(), pair.new.location());
    let what = format!(
        "{old} and {new} cannot agree on a token ({} and {}), and the lock moves from one to the other",
        tokens.0, tokens.1
    );
    Error::new(ErrorKind::Rejected, what).for_name(&claim.name).advise(
        "set the clocks of the two servers alike: a store takes no token that is more than an hour ahead of its clock",
    )
}
