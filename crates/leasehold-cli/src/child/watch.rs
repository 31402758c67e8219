//! When to stop the command: pure arithmetic over (state, time), without a process or a clock.

use leasehold::clock::Instant;

use crate::plan::{Leash, OnLost};

/// What is to be done to the command's family now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Act {
    /// Send this signal to every process of it.
    Signal(i32),
    /// Kill every process of it, again and again until none is left.
    Kill,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// The command runs.
    Running,
    /// It has ended by itself; what it left behind has until then to end too.
    Lingering { until: Instant },
    /// The family was asked to stop.
    Stopping { kill_at: Instant },
    /// It is being killed.
    Killing,
}

/// The guardian's judgement.
#[derive(Debug)]
pub(crate) struct Watch {
    leash: Leash,
    deadline: Instant,
    phase: Phase,
    cut_short: bool,
}

impl Watch {
    /// A command that was just started under a lock to be trusted until `deadline`.
    pub(crate) fn new(leash: Leash, deadline: Instant) -> Self {
        Self { leash, deadline, phase: Phase::Running, cut_short: false }
    }

    /// Whether the command was stopped before it ended by itself.
    pub(crate) fn cut_short(&self) -> bool {
        self.cut_short
    }

    /// Whether the family was asked to stop or is being killed.
    pub(crate) fn is_stopping(&self) -> bool {
        matches!(self.phase, Phase::Stopping { .. } | Phase::Killing)
    }

    /// The lock was renewed. It never brings the end nearer, nor calls off a stop.
    pub(crate) fn renewed(&mut self, deadline: Instant) {
        self.deadline = self.deadline.max(deadline);
    }

    /// The lock, or the runner who keeps it, is lost.
    pub(crate) fn stop(&mut self, now: Instant) -> Option<Act> {
        if self.is_stopping() {
            return None;
        }
        let running = self.phase == Phase::Running;
        let act = match self.leash.on_lost {
            OnLost::Ignore if running => return None,
            OnLost::Ignore => Act::Signal(OnLost::TERM),
            OnLost::Kill => Act::Kill,
            OnLost::Signal(number) => Act::Signal(number),
        };
        self.cut_short |= running;
        let kill_at = now.plus(self.leash.kill_after).min(self.kill_moment());
        let too_late = act == Act::Kill || kill_at <= now;
        self.phase = if too_late { Phase::Killing } else { Phase::Stopping { kill_at } };
        Some(if too_late { Act::Kill } else { act })
    }

    /// The command itself has ended.
    pub(crate) fn command_ended(&mut self, now: Instant) {
        if self.phase == Phase::Running {
            self.phase = Phase::Lingering { until: now.plus(self.leash.linger) };
        }
    }

    /// What the time asks for.
    pub(crate) fn due(&mut self, now: Instant) -> Option<Act> {
        match self.phase {
            Phase::Running | Phase::Lingering { .. } if now >= self.stop_moment() => self.stop(now),
            Phase::Lingering { until } if now >= until => {
                let kill_at = now.plus(self.leash.kill_after).min(self.kill_moment());
                self.phase = Phase::Stopping { kill_at };
                Some(Act::Signal(OnLost::TERM))
            }
            Phase::Stopping { kill_at } if now >= kill_at => {
                self.phase = Phase::Killing;
                Some(Act::Kill)
            }
            Phase::Killing => Some(Act::Kill),
            _ => None,
        }
    }

    /// When to ask again at the latest.
    pub(crate) fn next(&self, now: Instant) -> Instant {
        match self.phase {
            Phase::Running => self.stop_moment(),
            Phase::Lingering { until } => until.min(self.stop_moment()),
            Phase::Stopping { kill_at } => kill_at,
            Phase::Killing => now.plus(Leash::KILL_AGAIN),
        }
    }

    /// From then on the command must not be started any more, whatever is done to one that runs.
    pub(crate) fn latest_start(&self) -> Instant {
        self.stop_moment().min(self.deadline.minus(self.leash.margin))
    }

    /// From then on the family is killed, so that it is dead before the lock can pass on.
    fn kill_moment(&self) -> Instant {
        if self.leash.on_lost == OnLost::Ignore {
            Instant::FAR
        } else {
            self.deadline.minus(self.leash.margin)
        }
    }

    /// From then on a command that needs all of its time to stop could outlive the lock.
    fn stop_moment(&self) -> Instant {
        match self.leash.on_lost {
            OnLost::Ignore => Instant::FAR,
            OnLost::Kill => self.kill_moment(),
            OnLost::Signal(_) => self.kill_moment().minus(self.leash.kill_after),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn at(seconds: u64) -> Instant {
        Instant::since_boot(Duration::from_secs(seconds))
    }

    fn watch(on_lost: OnLost) -> Watch {
        let leash = Leash {
            on_lost,
            kill_after: Duration::from_secs(5),
            margin: Duration::from_secs(1),
            linger: Duration::from_secs(2),
        };
        Watch::new(leash, at(130))
    }

    const TERM: OnLost = OnLost::Signal(OnLost::TERM);

    #[test]
    fn without_a_renewal_it_asks_then_kills_before_the_deadline() {
        let mut watch = watch(TERM);
        assert_eq!((watch.due(at(123)), watch.next(at(123))), (None, at(124)));
        assert_eq!(watch.due(at(124)), Some(Act::Signal(15)));
        assert_eq!((watch.due(at(128)), watch.next(at(128))), (None, at(129)));
        assert_eq!(watch.due(at(129)), Some(Act::Kill));
        assert!(watch.cut_short());
    }

    #[test]
    fn a_renewal_moves_the_end_and_an_old_one_does_not_bring_it_back() {
        let mut watch = watch(TERM);
        watch.renewed(at(160));
        watch.renewed(at(150));
        assert_eq!((watch.due(at(153)), watch.next(at(153))), (None, at(154)));
    }

    #[test]
    fn a_stop_is_not_called_off_and_its_kill_comes_no_later_than_promised() {
        let mut watch = watch(TERM);
        assert_eq!(watch.stop(at(100)), Some(Act::Signal(15)));
        assert_eq!(watch.stop(at(101)), None);
        watch.renewed(at(200));
        assert_eq!(watch.due(at(105)), Some(Act::Kill));
    }

    #[test]
    fn a_guardian_that_wakes_too_late_kills_at_once() {
        let mut watch = watch(TERM);
        assert_eq!(watch.due(at(140)), Some(Act::Kill));
        assert!(watch.cut_short());
    }

    #[test]
    fn a_loss_late_in_the_lease_leaves_only_the_rest_of_it() {
        let mut watch = watch(OnLost::Signal(10));
        assert_eq!(watch.stop(at(123)), Some(Act::Signal(10)));
        assert_eq!(watch.next(at(123)), at(128));
        let mut watch = self::watch(TERM);
        watch.stop(at(127));
        assert_eq!(watch.next(at(127)), at(129));
    }

    #[test]
    fn kill_waits_for_the_last_moment_and_ignore_for_ever() {
        let mut watch = watch(OnLost::Kill);
        assert_eq!((watch.due(at(128)), watch.next(at(128))), (None, at(129)));
        assert_eq!(watch.due(at(129)), Some(Act::Kill));
        let mut watch = self::watch(OnLost::Ignore);
        assert_eq!(watch.stop(at(100)), None);
        assert_eq!((watch.due(at(1000)), watch.next(at(1000))), (None, Instant::FAR));
        assert!(!watch.cut_short());
    }

    #[test]
    fn what_a_finished_command_leaves_behind_is_stopped_too_without_being_cut_short() {
        for on_lost in [TERM, OnLost::Kill, OnLost::Ignore] {
            let mut watch = watch(on_lost);
            watch.command_ended(at(100));
            assert_eq!((watch.due(at(101)), watch.next(at(101))), (None, at(102)));
            assert_eq!(watch.due(at(102)), Some(Act::Signal(15)), "{on_lost:?}");
            assert_eq!(watch.due(at(107)), Some(Act::Kill));
            assert!(!watch.cut_short());
        }
    }
}
