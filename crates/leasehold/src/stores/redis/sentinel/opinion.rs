//! Which master is right, of several that sentinels name.

use std::time::Duration;

use super::Host;
use crate::clock::Instant;

/// How long a majority of the sentinels must name a master before that counts for more than a later epoch. The news of a
/// failover reaches all sentinels that are in touch with each other within two or three seconds.
const SETTLES_AFTER: Duration = Duration::from_secs(10);

/// A master, and the epoch of the failover that made it so: of two answers that differ, that of the later one is right. The
/// epoch is 0 before the first failover, and where the sentinel does not tell it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in super::super) struct Named {
    pub(in super::super) epoch: u64,
    pub(in super::super) host: Host,
}

/// What was made of all that the sentinels said until now.
#[derive(Debug, Default)]
pub(in super::super) struct Opinion {
    /// The latest master that was named.
    named: Option<Named>,
    /// Whom a majority names against another's epoch, and since when.
    contender: Option<(Host, Instant)>,
    /// Whom a majority has named for long enough, and the epoch up to which others count for nothing.
    settled: Option<(Host, u64)>,
}

impl Opinion {
    pub(in super::super) fn named(&self) -> Option<&Named> {
        self.named.as_ref()
    }

    /// Whether a server may be the master, for all that a majority said.
    pub(in super::super) fn allows(&self, named: &Named) -> bool {
        self.settled.as_ref().is_none_or(|(host, forgotten)| named.epoch > *forgotten || named.host == *host)
    }

    /// Takes in what one sentinel says. Whether that is another master than before; `None` if it is out of date.
    pub(in super::super) fn hear(&mut self, named: &Named) -> Option<bool> {
        let is_old = self.named.as_ref().is_some_and(|before| named.epoch < before.epoch);
        if is_old || !self.allows(named) {
            return None;
        }
        Some(self.named.replace(named.clone()).is_some_and(|before| before != *named))
    }

    /// Takes in what the sentinels say that answered, out of `sentinels`. The master that a majority has named for long
    /// enough, if somebody else has a later epoch (a sentinel, what was heard before, or the server in use), or if nobody
    /// knows of any. So it is after `SENTINEL REMOVE` and `MONITOR`, with which epochs begin anew.
    pub(in super::super) fn weigh(
        &mut self,
        answers: &[Named],
        sentinels: usize,
        used: Option<&Named>,
        now: Instant,
    ) -> Option<Named> {
        let votes = |host: &Host| answers.iter().filter(|answer| answer.host == *host).count();
        let of_majority = answers.iter().filter(|answer| 2 * votes(&answer.host) > sentinels);
        let Some(named) = of_majority.max_by_key(|answer| answer.epoch) else {
            // What was settled stays so: a sentinel may be out of reach for a while.
            self.contender = None;
            return None;
        };
        let others = answers.iter().chain(used).chain(&self.named).filter(|other| other.host != named.host);
        let Some(epoch) = others.map(|other| other.epoch).max() else {
            *self = Self { named: Some(named.clone()), ..Self::default() };
            return None;
        };
        // Of one epoch, it is the same server by another name.
        if epoch < named.epoch || (epoch == named.epoch && epoch > 0) {
            self.contender = None;
            return None;
        }
        let since = match &self.contender {
            Some((host, since)) if *host == named.host => *since,
            _ => now,
        };
        self.contender = Some((named.host.clone(), since));
        let is_forgotten =
            epoch > 0 && self.settled.as_ref().is_some_and(|(_, forgotten)| epoch <= *forgotten);
        if !is_forgotten && now.since(since) < SETTLES_AFTER {
            return None;
        }
        self.settled = Some((named.host.clone(), epoch));
        self.named = Some(named.clone());
        Some(named.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock;

    fn named(port: u16, epoch: u64) -> Named {
        Named { epoch, host: Host { name: "h".into(), port } }
    }

    fn heard(all: &[Named]) -> Opinion {
        let mut opinion = Opinion::default();
        for named in all {
            opinion.hear(named);
        }
        opinion
    }

    #[test]
    fn the_later_epoch_counts_and_an_earlier_one_is_not_remembered() {
        let mut opinion = Opinion::default();
        assert_eq!(opinion.hear(&named(1, 3)), Some(false));
        assert_eq!(opinion.hear(&named(1, 3)), Some(false));
        assert_eq!(opinion.hear(&named(2, 4)), Some(true));
        assert_eq!(opinion.hear(&named(1, 3)), None);
        assert_eq!(opinion.named(), Some(&named(2, 4)));
    }

    #[test]
    fn a_majority_that_has_not_heard_of_a_failover_counts_for_nothing_at_first() {
        let (start, old, new) = (clock::now(), named(1, 0), named(2, 1));
        let mut opinion = heard(&[old.clone(), new.clone()]);
        let answers = [old.clone(), old, new.clone()];
        for second in 0..10 {
            let now = start.plus(Duration::from_secs(second));
            assert_eq!(opinion.weigh(&answers, 3, Some(&new), now), None);
        }
        // They hear of it, and what went before is no part of a later disagreement.
        assert_eq!(opinion.weigh(&[new.clone(), new.clone()], 3, Some(&new), start), None);
        assert_eq!(opinion.named(), Some(&new));
        let later = start.plus(Duration::from_secs(60));
        assert_eq!(opinion.weigh(&answers, 3, Some(&new), later), None);
        assert!(opinion.allows(&new));
    }

    #[test]
    fn a_lasting_majority_outweighs_a_left_over_epoch_until_a_later_failover() {
        let (start, right, left_over) = (clock::now(), named(1, 0), named(2, 7));
        let after = start.plus(SETTLES_AFTER);
        let mut opinion = heard(std::slice::from_ref(&left_over));
        let answers = [left_over.clone(), right.clone(), right.clone()];
        assert_eq!(opinion.weigh(&answers, 3, Some(&left_over), start), None);
        assert_eq!(opinion.weigh(&answers, 3, Some(&left_over), after), Some(right.clone()));
        assert!(!opinion.allows(&left_over) && opinion.allows(&right));
        assert_eq!(opinion.hear(&left_over), None);
        assert_eq!(opinion.weigh(&[], 3, Some(&right), after), None);
        assert!(!opinion.allows(&left_over), "though no sentinel answers just now");
        // The next, at once: by hand, or in a later epoch.
        let moved = named(3, 0);
        let answers = [left_over.clone(), moved.clone(), moved.clone()];
        assert_eq!(opinion.weigh(&answers, 3, Some(&right), after), Some(moved));
        assert_eq!(opinion.hear(&named(4, 8)), Some(true));
    }

    #[test]
    fn without_epochs_a_lasting_majority_counts_and_half_is_none() {
        let (start, old, new) = (clock::now(), named(1, 0), named(2, 0));
        let after = start.plus(SETTLES_AFTER);
        let mut opinion = heard(std::slice::from_ref(&old));
        let halves = [old.clone(), old.clone(), new.clone(), new.clone()];
        let most = [new.clone(), old.clone(), new.clone()];
        for (now, outcome) in [(start, None), (after, Some(new.clone()))] {
            assert_eq!(opinion.weigh(&most, 3, Some(&old), now), outcome);
        }
        let mut opinion = heard(std::slice::from_ref(&old));
        for now in [start, after] {
            assert_eq!(opinion.weigh(&halves, 4, Some(&old), now), None);
        }
        // The same server by two names, after a failover.
        let (one, two) = (named(1, 5), named(2, 5));
        let mut opinion = heard(std::slice::from_ref(&one));
        for now in [start, after] {
            assert_eq!(opinion.weigh(&[two.clone(), two.clone()], 3, Some(&one), now), None);
        }
    }
}
