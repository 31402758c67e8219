//! The arithmetic of a lease: pure, so that every case is tested without a clock or a store.
//!
//! The rules: a lease counts from the moment *before* the request was sent; only a known answer extends it; a loss,
//! once told, is final. (Counting from the send time and warning before the end: the DynamoDB lock client, 2017;
//! the drift allowance: the Redlock description, 2014.)

use std::time::Duration;

use crate::clock::{Instant, Now};
pub(crate) use crate::store::drift;
use crate::types::Renewal;

/// How often a lease is renewed within its TTL.
pub const RENEWALS_PER_TTL: u32 = 10;
/// Locks become visible to `ls` on stores with an index by their first renewal: it comes this soon at the latest.
pub(crate) const FIRST_RENEWAL: Duration = Duration::from_secs(1);
/// The TTL of a mutex unless set: long enough that ten renewals ride out a failover, short enough to wait for a crash.
pub const DEFAULT_TTL: Duration = Duration::from_secs(30);

/// A lock is passed on within the process while more than this part of its TTL is left: a third.
const LEAST_PART_PASSED: u32 = 3;

// Fewer would leave no room to retry a renewal inside the lease.
const _: () = assert!(RENEWALS_PER_TTL >= 3);

/// Until when a lease can be trusted that was answered with `ttl` to a request sent at `sent_at`.
pub(crate) fn valid_until(sent_at: Instant, ttl: Duration) -> Instant {
    sent_at.plus(ttl.saturating_sub(drift(ttl)))
}

/// Until when a hold that begins at `from` may last at most.
fn max_until(from: Instant, max_hold: Option<Duration>) -> Instant {
    max_hold.map_or(Instant::FAR, |hold| from.plus(hold.saturating_sub(drift(hold))))
}

/// How sure a holder can be of its lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// Held: the store confirmed it, and the time it confirmed is not over.
    Held,
    /// Still within the confirmed time, but the last renewal was not answered, or the machine seems to have been paused.
    Unsure,
    /// Lost, for good.
    Lost,
}

/// Why a lock was lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Loss {
    /// Its time ran out before a renewal was confirmed (or it was not to be renewed).
    Expired,
    /// The store says that this claim does not hold it any more: it was removed, taken, or the data is gone.
    Removed,
    /// The maximum hold was reached.
    MaxHold,
}

impl std::fmt::Display for Loss {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Expired => "its lease ended before a renewal was confirmed",
            Self::Removed => "the store no longer has it under this claim",
            Self::MaxHold => "its maximum hold was reached",
        })
    }
}

/// What the answer to a renewal was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// The store answered.
    Answered(Renewal),
    /// No answer, or an error: nothing is known and nothing is extended.
    Failed,
}

/// What a keeper does next about a lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Next {
    /// Renew at this moment.
    At(Instant),
    /// Nothing any more but to notice its end.
    Stop,
}

/// One held lock's time.
#[derive(Clone, Debug)]
pub(crate) struct Lease {
    /// What each renewal asks for.
    ttl: Duration,
    /// What the renewals are spaced by: the TTL, or what the store grants instead if that is less.
    paced_by: Duration,
    renewing: bool,
    valid_until: Instant,
    /// What may never be passed, whatever the store grants.
    max_until: Instant,
    /// How far the wall clock was ahead of the boot-time clock when the last confirmed request was sent.
    wall_ahead: Duration,
    doubt: bool,
    failures: u32,
    lost: Option<Loss>,
}

impl Lease {
    /// The lease of a grant of `granted` in answer to a request sent at `sent`; renewals ask for `ttl`.
    pub(crate) fn new(
        sent: Now,
        ttl: Duration,
        granted: Duration,
        renewing: bool,
        max_hold: Option<Duration>,
    ) -> Self {
        let max_until = max_until(sent.boot, max_hold);
        Self {
            ttl,
            paced_by: ttl.min(granted),
            renewing,
            valid_until: valid_until(sent.boot, granted).min(max_until),
            max_until,
            wall_ahead: sent.wall.saturating_sub(sent.boot.after_boot()),
            doubt: false,
            failures: 0,
            lost: None,
        }
    }

    /// Until when the lock can be trusted, as far as is known.
    pub(crate) fn valid_until(&self) -> Instant {
        self.valid_until
    }

    /// What each renewal asks for.
    pub(crate) fn ttl(&self) -> Duration {
        self.ttl
    }

    /// Whether it is lost, and why. Once it is, it stays so: the first look after the end settles it.
    pub(crate) fn loss(&mut self, now: Instant) -> Option<Loss> {
        if self.lost.is_none() && now >= self.valid_until {
            let capped = self.valid_until.plus(drift(self.ttl) * 2) >= self.max_until;
            self.lost = Some(if capped { Loss::MaxHold } else { Loss::Expired });
        }
        self.lost
    }

    /// How sure the holder can be at `now`.
    pub(crate) fn status(&mut self, now: Now) -> Status {
        if self.loss(now.boot).is_some() {
            Status::Lost
        } else if self.doubt || self.was_paused(now) {
            Status::Unsure
        } else {
            Status::Held
        }
    }

    /// Whether the wall clock ran ahead of the boot-time clock since the last confirmation: a paused or migrated
    /// virtual machine, whose boot-time clock stood still meanwhile.
    pub(crate) fn was_paused(&self, now: Now) -> bool {
        let ahead = now.wall.saturating_sub(now.boot.after_boot());
        ahead.saturating_sub(self.wall_ahead) > drift(self.ttl)
    }

    /// Whether another holder can have it from now on: surely held, renewed, and with enough left for him to begin with.
    pub(crate) fn may_pass(&mut self, now: Now) -> bool {
        self.renewing
            && self.status(now) == Status::Held
            && self.remaining(now.boot) > self.paced_by / LEAST_PART_PASSED
    }

    /// Counts the maximum hold from now on.
    pub(crate) fn begin_hold(&mut self, now: Instant, max_hold: Option<Duration>) {
        self.max_until = max_until(now, max_hold);
    }

    /// How long from one renewal to the next.
    pub(crate) fn interval(&self) -> Duration {
        self.paced_by / RENEWALS_PER_TTL
    }

    /// Time left that can be trusted.
    pub(crate) fn remaining(&mut self, now: Instant) -> Duration {
        if self.loss(now).is_some() { Duration::ZERO } else { self.valid_until.since(now) }
    }

    /// What a renewal sent now should ask for: the TTL, but never past the maximum hold. `None`: only confirm.
    pub(crate) fn extension(&self, now: Instant) -> Option<Duration> {
        self.bounded(now, self.renewing.then_some(self.ttl)?)
    }

    /// `wanted`, but never past the maximum hold; `None` if that has no room left.
    pub(crate) fn bounded(&self, now: Instant, wanted: Duration) -> Option<Duration> {
        if self.max_until == Instant::FAR {
            return Some(wanted);
        }
        Some(wanted.min(self.max_until.since(now))).filter(|extension| *extension > drift(*extension))
    }

    /// When to look after a new lease first: at the next slot of its grid, or within [`FIRST_RENEWAL`].
    pub(crate) fn first(&self, now: Instant, phase: Duration) -> Next {
        let interval = self.interval();
        if interval > FIRST_RENEWAL {
            // Rounded to a quarter of a second, so that the locks of one moment come in one batch.
            let grain = Duration::from_millis(250);
            Next::At(slot_after(now.plus(FIRST_RENEWAL.saturating_sub(grain)), grain, phase))
        } else if self.renewing {
            Next::At(next_slot(now, interval, phase))
        } else {
            Next::Stop
        }
    }

    /// Takes in the answer to a renewal sent at `sent` and says what to do next.
    pub(crate) fn after_renewal(&mut self, sent: Now, outcome: Outcome, now: Now, phase: Duration) -> Next {
        if self.loss(now.boot).is_some() {
            return Next::Stop;
        }
        if let (Outcome::Answered(Renewal::Renewed(ttl)), Instant::FAR) = (outcome, self.max_until) {
            self.paced_by = self.ttl.min(ttl);
        }
        let interval = self.interval();
        match outcome {
            Outcome::Answered(Renewal::Lost) => {
                self.lost = Some(Loss::Removed);
                Next::Stop
            }
            Outcome::Answered(Renewal::Renewed(ttl)) => {
                // The latest word of the store counts, also if it is less than hoped for.
                self.valid_until = valid_until(sent.boot, ttl).min(self.max_until);
                self.wall_ahead = sent.wall.saturating_sub(sent.boot.after_boot());
                self.doubt = false;
                self.failures = 0;
                if self.loss(now.boot).is_some() || self.extension(now.boot).is_none() {
                    return Next::Stop;
                }
                Next::At(next_slot(now.boot, interval, phase))
            }
            Outcome::Failed => {
                self.doubt = true;
                let back_off = (interval / 8).max(Duration::from_millis(5)) * 2_u32.pow(self.failures.min(3));
                self.failures = self.failures.saturating_add(1);
                Next::At(now.boot.plus(back_off.min(Duration::from_secs(1))))
            }
        }
    }
}

/// The next slot of the grid of `interval`, at least a tenth of it away, so that a lock held for a moment is never
/// renewed. All locks of one TTL share the grid of their process and so go out in one batch.
fn next_slot(now: Instant, interval: Duration, phase: Duration) -> Instant {
    slot_after(now.plus(interval / 10), interval, phase)
}

/// The first moment not before `earliest` that is `phase` past a multiple of `interval`.
fn slot_after(earliest: Instant, interval: Duration, phase: Duration) -> Instant {
    let interval = interval.as_nanos().max(1);
    let phase = phase.as_nanos() % interval;
    let behind = (earliest.after_boot().as_nanos() + interval - phase) % interval;
    let wait = if behind == 0 { 0 } else { interval - behind };
    earliest.plus(Duration::from_nanos(u64::try_from(wait).unwrap_or(u64::MAX)))
}

#[cfg(test)]
mod tests {
    use super::*;

    const TTL: Duration = Duration::from_secs(30);

    fn at(millis: u64) -> Now {
        let boot = Instant::since_boot(Duration::from_millis(1_000_000 + millis));
        Now { boot, wall: boot.after_boot() + Duration::from_secs(1 << 30) }
    }

    fn lease() -> Lease {
        Lease::new(at(0), TTL, TTL, true, None)
    }

    #[test]
    fn a_lease_ends_before_the_store_can_give_it_away() {
        let mut lease = lease();
        assert_eq!(lease.valid_until(), at(30_000 - 302).boot);
        assert_eq!(lease.status(at(29_697)), Status::Held);
        assert_eq!(lease.status(at(29_698)), Status::Lost);
        assert_eq!(lease.remaining(at(0).boot), Duration::ZERO, "a loss is final");
    }

    #[test]
    fn an_answer_extends_from_the_send_time_and_no_answer_never_does() {
        let mut lease = lease();
        let before = lease.valid_until();
        lease.after_renewal(at(3_000), Outcome::Failed, at(4_000), Duration::ZERO);
        assert_eq!((lease.valid_until(), lease.status(at(4_000))), (before, Status::Unsure));
        let renewed = Outcome::Answered(Renewal::Renewed(TTL));
        lease.after_renewal(at(5_000), renewed, at(9_000), Duration::ZERO);
        assert_eq!(lease.valid_until(), valid_until(at(5_000).boot, TTL));
        assert_eq!(lease.status(at(9_000)), Status::Held);
    }

    #[test]
    fn a_lock_is_passed_on_while_it_is_sure_and_a_third_of_its_lease_is_left() {
        let mut lease = lease();
        assert!(lease.may_pass(at(19_697)));
        assert!(!lease.may_pass(at(19_698)));
        lease.after_renewal(at(19_000), Outcome::Failed, at(19_100), Duration::ZERO);
        assert!(!lease.may_pass(at(19_200)), "unsure");
        let renewed = Outcome::Answered(Renewal::Renewed(TTL));
        lease.after_renewal(at(19_300), renewed, at(19_400), Duration::ZERO);
        assert!(lease.may_pass(at(19_500)));
        assert!(!lease.may_pass(Now { wall: at(26_000).wall, ..at(19_500) }), "paused meanwhile");
        assert!(!Lease::new(at(0), TTL, TTL, false, None).may_pass(at(1)), "nobody renews it");
        // What counts is the TTL that the store grants, where that is less than asked.
        let mut short = Lease::new(at(0), TTL, TTL / 10, true, None);
        assert!(short.may_pass(at(1_900)) && !short.may_pass(at(2_000)));
        lease.after_renewal(at(20_000), Outcome::Answered(Renewal::Lost), at(20_100), Duration::ZERO);
        assert!(!lease.may_pass(at(20_200)), "lost");
    }

    #[test]
    fn each_holder_has_its_maximum_hold() {
        let most = Some(Duration::from_secs(10));
        let mut lease = Lease::new(at(0), TTL, TTL, true, most);
        assert_eq!(lease.valid_until(), at(10_000 - 102).boot);
        lease.begin_hold(at(5_000).boot, most);
        assert_eq!(lease.valid_until(), at(10_000 - 102).boot, "no more than the store confirmed");
        let renewed = Outcome::Answered(Renewal::Renewed(TTL));
        lease.after_renewal(at(6_000), renewed, at(6_001), Duration::ZERO);
        assert_eq!(lease.valid_until(), at(15_000 - 102).boot);
    }

    #[test]
    fn a_renewal_answered_too_late_does_not_bring_the_lock_back() {
        let mut lease = lease();
        let renewed = Outcome::Answered(Renewal::Renewed(TTL));
        assert_eq!(lease.after_renewal(at(29_000), renewed, at(29_900), Duration::ZERO), Next::Stop);
        assert_eq!(lease.status(at(29_901)), Status::Lost);
    }

    #[test]
    fn a_shorter_answer_is_believed() {
        let mut lease = lease();
        let short = Outcome::Answered(Renewal::Renewed(Duration::from_secs(1)));
        lease.after_renewal(at(3_000), short, at(3_001), Duration::ZERO);
        assert_eq!(lease.valid_until(), valid_until(at(3_000).boot, Duration::from_secs(1)));
    }

    #[test]
    fn renewals_are_spaced_by_what_was_granted_if_that_is_less() {
        let short = Duration::from_secs(2);
        let mut lease = Lease::new(at(0), TTL, short, true, None);
        let Next::At(first) = lease.first(at(0).boot, Duration::ZERO) else { panic!("it is to be renewed") };
        assert!(first < at(500).boot, "{first:?}");
        let renewed = Outcome::Answered(Renewal::Renewed(short));
        let Next::At(next) = lease.after_renewal(at(200), renewed, at(201), Duration::ZERO) else { panic!() };
        assert!(next < at(700).boot, "{next:?}");
    }

    #[test]
    fn a_paused_machine_makes_a_guard_unsure_until_confirmed() {
        let mut lease = lease();
        let mut paused = at(1_000);
        paused.wall += Duration::from_secs(10);
        assert_eq!(lease.status(paused), Status::Unsure);
        lease.after_renewal(paused, Outcome::Answered(Renewal::Renewed(TTL)), paused, Duration::ZERO);
        assert_eq!(lease.status(paused), Status::Held);
        // A wall clock that was set back is no sign of a pause.
        assert_eq!(lease.status(at(2_000)), Status::Held);
    }

    #[test]
    fn the_maximum_hold_is_never_passed() {
        let mut lease = Lease::new(at(0), TTL, TTL, true, Some(Duration::from_secs(40)));
        let renewed = Outcome::Answered(Renewal::Renewed(TTL));
        lease.after_renewal(at(20_000), renewed, at(20_001), Duration::ZERO);
        assert!(lease.valid_until() < at(40_000).boot);
        assert!(lease.extension(at(30_000).boot).is_some_and(|ttl| ttl < Duration::from_secs(10)));
        assert_eq!(lease.loss(at(40_000).boot), Some(Loss::MaxHold));
    }

    #[test]
    fn a_tiny_ttl_is_never_trusted_and_a_huge_one_does_not_overflow() {
        let mut tiny = Lease::new(at(0), Duration::from_millis(1), Duration::from_millis(1), true, None);
        assert_eq!(tiny.status(at(0)), Status::Lost);
        let mut huge = Lease::new(at(0), Duration::MAX, Duration::MAX, true, None);
        assert_eq!(huge.status(at(1)), Status::Held);
    }

    #[test]
    fn locks_of_one_ttl_share_their_slots_and_no_lock_waits_much_longer_than_a_tenth() {
        let phase = Duration::from_millis(777);
        let interval = TTL / RENEWALS_PER_TTL;
        let mut slots = std::collections::BTreeSet::new();
        for millis in 0..10_000 {
            let slot = next_slot(at(millis).boot, interval, phase);
            let wait = slot.since(at(millis).boot);
            assert!(wait >= interval / 10 && wait <= interval + interval / 10, "{wait:?}");
            slots.insert(slot);
        }
        assert!(slots.len() <= 5, "{slots:?}");
    }
}
