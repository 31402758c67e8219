//! What the nodes said to one claim, and what follows from it: no I/O.

use std::fmt::Write as _;
use std::sync::Arc;

use crate::clock::Instant;
use crate::error::{Error, ErrorKind, Result};
use crate::types::{Acquired, FencingToken, Holder, Ticket};

/// How one node answered.
#[derive(Clone, Debug)]
pub(super) enum Outcome {
    /// It was not asked, being set aside for this reason.
    Aside(String),
    /// No answer yet.
    Asked,
    /// Granted with this token; the lease may be counted on until then, the drift of clocks not yet taken off.
    Granted(FencingToken, Instant),
    /// Somebody else holds it there.
    Busy(Box<Holder>),
    /// The same, and the claim stands in line.
    Queued(Box<Ticket>),
    /// It failed.
    Failed(Error),
    /// No answer in the time that the quorum waits.
    Late,
    /// It was decided before its answer came.
    Unheard,
}

/// The answers of all nodes.
#[derive(Clone, Debug)]
pub(super) struct Tally {
    pub(super) outcomes: Vec<Outcome>,
    majority: usize,
}

impl Tally {
    pub(super) fn new(outcomes: Vec<Outcome>) -> Self {
        let majority = outcomes.len() / 2 + 1;
        Self { outcomes, majority }
    }

    /// Takes note of an answer to a request sent at `sent`.
    pub(super) fn note(&mut self, index: usize, answer: Result<Acquired>, sent: Instant) {
        self.outcomes[index] = match answer {
            Ok(Acquired::Granted(grant)) => Outcome::Granted(grant.token, sent.plus(grant.ttl)),
            Ok(Acquired::Busy(holder)) => Outcome::Busy(Box::new(holder)),
            Ok(Acquired::Queued(ticket)) => Outcome::Queued(Box::new(ticket)),
            Err(error) => Outcome::Failed(error),
        };
    }

    /// Those who were to answer have had their time, or are not needed.
    pub(super) fn close(&mut self, in_time: bool) {
        for outcome in &mut self.outcomes {
            if matches!(outcome, Outcome::Asked) {
                *outcome = if in_time { Outcome::Unheard } else { Outcome::Late };
            }
        }
    }

    /// A node that was not waited for would not have answered.
    pub(super) fn silence(&mut self, index: usize) {
        if matches!(self.outcomes[index], Outcome::Unheard) {
            self.outcomes[index] = Outcome::Late;
        }
    }

    fn count(&self, is: impl Fn(&Outcome) -> bool) -> usize {
        self.outcomes.iter().filter(|outcome| is(outcome)).count()
    }

    /// How many hold for the claim, as far as is known.
    pub(super) fn granted(&self) -> usize {
        self.count(|outcome| matches!(outcome, Outcome::Granted(..)))
    }

    fn asked(&self) -> usize {
        self.count(|outcome| matches!(outcome, Outcome::Asked))
    }

    /// The nodes that hold for the claim, and those that may, since they were not waited for.
    pub(super) fn grantors(&self) -> Vec<usize> {
        self.such(|outcome| matches!(outcome, Outcome::Granted(..) | Outcome::Unheard))
    }

    fn such(&self, is: impl Fn(&Outcome) -> bool) -> Vec<usize> {
        self.outcomes.iter().enumerate().filter(|(_, outcome)| is(outcome)).map(|(index, _)| index).collect()
    }

    pub(super) fn has_granted(&self, index: usize) -> bool {
        matches!(self.outcomes[index], Outcome::Granted(..))
    }

    /// Whether that node has it for another, or may have.
    pub(super) fn is_to_be_asked_again(&self, index: usize) -> bool {
        self.is_busy(index) || matches!(self.outcomes[index], Outcome::Unheard)
    }

    /// Whether somebody else has it at that node.
    pub(super) fn is_busy(&self, index: usize) -> bool {
        matches!(self.outcomes[index], Outcome::Busy(_) | Outcome::Queued(_))
    }

    pub(super) fn has_majority(&self) -> bool {
        self.granted() >= self.majority
    }

    /// Whether a majority has granted, or none can any more.
    pub(super) fn is_decided(&self) -> bool {
        self.has_majority() || self.granted() + self.asked() < self.majority
    }

    /// Whether a majority has this very token, or all have answered.
    pub(super) fn is_agreed_or_split(&self, token: FencingToken) -> bool {
        let exact = self.count(|outcome| matches!(outcome, Outcome::Granted(other, _) if *other == token));
        exact >= self.majority || self.asked() == 0
    }

    /// The token that a majority stored exactly, and until when a majority with it has its lease.
    pub(super) fn agreed(&self) -> Option<(FencingToken, Instant)> {
        self.outcomes.iter().find_map(|outcome| {
            let Outcome::Granted(token, _) = outcome else { return None };
            let mut until: Vec<Instant> = self
                .outcomes
                .iter()
                .filter_map(|other| match other {
                    Outcome::Granted(other, until) if other == token => Some(*until),
                    _ => None,
                })
                .collect();
            until.sort_unstable_by(|a, b| b.cmp(a));
            until.get(self.majority - 1).map(|until| (*token, *until))
        })
    }

    /// The largest token that was granted, `spare` larger ones left out.
    pub(super) fn largest_but(&self, spare: usize) -> u64 {
        let token = |outcome: &Outcome| match outcome {
            Outcome::Granted(token, _) => Some(token.get()),
            _ => None,
        };
        let mut tokens: Vec<u64> = self.outcomes.iter().filter_map(token).collect();
        tokens.sort_unstable_by(|a, b| b.cmp(a));
        tokens.get(spare).copied().unwrap_or(0)
    }

    /// Who else holds it at a node.
    pub(super) fn holder(outcome: &Outcome) -> Option<&Holder> {
        match outcome {
            Outcome::Busy(holder) => Some(holder),
            Outcome::Queued(ticket) => ticket.holder(),
            _ => None,
        }
    }

    /// The other holder whom most nodes name, and how many do.
    fn most_named(&self) -> Option<(&Holder, usize)> {
        let holders: Vec<&Holder> = self.outcomes.iter().filter_map(Self::holder).collect();
        let named = |holder: &&Holder| {
            let same = |other: &&&Holder| other.id == holder.id && other.foreign == holder.foreign;
            holders.iter().filter(same).count()
        };
        holders.iter().map(|holder| (*holder, named(holder))).max_by_key(|(_, count)| *count)
    }

    /// Whether one other claim has it at a majority.
    pub(super) fn is_held_by_other(&self) -> bool {
        self.most_named().is_some_and(|(_, count)| count >= self.majority)
    }

    /// Whether a majority says how it stands there, as far as they were waited for.
    pub(super) fn is_heard(&self) -> bool {
        let told = |outcome: &Outcome| {
            matches!(outcome, Outcome::Granted(..) | Outcome::Busy(_) | Outcome::Queued(_) | Outcome::Unheard)
        };
        self.count(told) >= self.majority
    }

    /// What a claim that was not granted is told; `may_hold` says whether an earlier round may have left it something.
    pub(super) fn verdict(&self, nodes: &[Arc<str>], may_hold: bool) -> Result<Acquired> {
        let failure = |outcome: &Outcome| match outcome {
            Outcome::Failed(error) if !error.is_transient() => Some(error.clone()),
            _ => None,
        };
        let refusals: Vec<Error> = self.outcomes.iter().filter_map(failure).collect();
        let is_busy = self.outcomes.iter().any(|outcome| Self::holder(outcome).is_some());
        if is_busy && self.is_heard() {
            let holder = self.most_named().map(|(holder, _)| holder.clone()).unwrap_or_default();
            return Ok(Acquired::Busy(holder));
        }
        // Those that were not waited for do not make good for the refusals.
        let unheard = self.count(|outcome| matches!(outcome, Outcome::Unheard));
        if let Some(first) = refusals.first()
            && self.outcomes.len() - refusals.len() - unheard < self.majority
        {
            let what = format!("a majority of the nodes refuses the claim: {}", self.describe(nodes));
            let error = Error::new(first.kind(), what);
            return Err(match first.advice() {
                Some(advice) => error.advise(advice.to_owned()),
                None => error,
            });
        }
        let may_be_granted = |outcome: &Outcome| match outcome {
            Outcome::Granted(..) | Outcome::Asked | Outcome::Late | Outcome::Unheard => true,
            Outcome::Failed(error) => error.kind() == ErrorKind::Unknown,
            _ => false,
        };
        let may_hold = may_hold || self.outcomes.iter().any(may_be_granted);
        let kind = if may_hold { ErrorKind::Unknown } else { ErrorKind::Unavailable };
        let what = if self.has_majority() {
            "the nodes that granted it could not agree on a token"
        } else {
            "no majority of the nodes granted it"
        };
        Err(Error::new(kind, format!("{what}: {}", self.describe(nodes)))
            .advise("what was granted is being given back; are enough nodes running and reachable?"))
    }

    /// Each node and what it said.
    pub(super) fn describe(&self, nodes: &[Arc<str>]) -> String {
        let mut text = String::new();
        for (node, outcome) in nodes.iter().zip(&self.outcomes) {
            let separator = if text.is_empty() { "" } else { "; " };
            // Writing into a string cannot fail.
            let _ = write!(text, "{separator}{node}: ");
            let _ = match outcome {
                Outcome::Aside(why) => write!(text, "set aside ({why})"),
                Outcome::Unheard => write!(text, "not waited for"),
                Outcome::Asked | Outcome::Late => write!(text, "no answer in time"),
                Outcome::Granted(token, _) => write!(text, "granted with token {token}"),
                Outcome::Busy(holder) => write!(text, "busy, held by {holder}"),
                Outcome::Queued(_) => write!(text, "busy, in line"),
                Outcome::Failed(error) => write!(text, "{error}"),
            };
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::types::{ClaimId, Grant};

    fn granted(token: u64) -> Outcome {
        Outcome::Granted(FencingToken::new(token), Instant::since_boot(Duration::from_secs(token)))
    }

    fn busy(id: u8) -> Outcome {
        let holder = Holder { id: Some(ClaimId::from_bytes([id; 16])), ..Holder::default() };
        Outcome::Busy(Box::new(holder))
    }

    fn nodes(count: usize) -> Vec<Arc<str>> {
        (0..count).map(|n| Arc::from(format!("redis://{n}"))).collect()
    }

    #[test]
    fn a_token_is_agreed_on_when_a_majority_of_all_nodes_has_it_exactly() {
        let three_of_five = vec![granted(7), Outcome::Late, granted(7), granted(7), granted(9)];
        assert_eq!(Tally::new(three_of_five).agreed().map(|(token, _)| token.get()), Some(7));
        for split in [
            vec![granted(7), granted(7), granted(9), granted(9), granted(8)],
            vec![granted(7), granted(7), Outcome::Late, Outcome::Late, Outcome::Late],
            vec![granted(7), granted(7), busy(1), busy(1)],
        ] {
            assert_eq!(Tally::new(split.clone()).agreed(), None, "{split:?}");
        }
    }

    #[test]
    fn the_lease_of_a_quorum_is_that_of_its_last_needed_node() {
        let at = |s| Instant::since_boot(Duration::from_secs(s));
        let token = FencingToken::new(1);
        let outcomes = [50, 10, 40, 30, 20].map(|s| Outcome::Granted(token, at(s))).to_vec();
        assert_eq!(Tally::new(outcomes).agreed(), Some((token, at(30))));
        let outcomes = [50, 10, 40].map(|s| Outcome::Granted(token, at(s))).to_vec();
        assert_eq!(Tally::new(outcomes).agreed(), Some((token, at(40))));
    }

    #[test]
    fn a_defeat_is_known_as_soon_as_no_majority_can_be_had() {
        let mut tally = Tally::new(vec![busy(1), busy(2), Outcome::Asked, Outcome::Asked, Outcome::Asked]);
        assert!(!tally.is_decided());
        tally.outcomes[2] = busy(1);
        assert!(tally.is_decided());
        // Of four nodes two are half, and no majority.
        assert!(!Tally::new(vec![granted(1), granted(1), busy(1), Outcome::Asked]).is_decided());
        assert!(Tally::new(vec![granted(1), granted(1), busy(1), busy(1)]).is_decided());
        assert!(!Tally::new(vec![granted(1), granted(1), busy(1), busy(1)]).has_majority());
    }

    #[test]
    fn nothing_was_done_only_if_nothing_can_have_been_granted() {
        let gone = || Outcome::Failed(Error::new(ErrorKind::Unavailable, "refused"));
        let kind = |outcomes: Vec<Outcome>| {
            let count = outcomes.len();
            Tally::new(outcomes).verdict(&nodes(count), false).map(|_| ()).map_err(|error| error.kind())
        };
        let aside = || Outcome::Aside("x".into());
        assert_eq!(kind(vec![gone(), gone(), aside()]), Err(ErrorKind::Unavailable));
        assert_eq!(kind(vec![gone(), gone(), granted(1)]), Err(ErrorKind::Unknown));
        assert_eq!(kind(vec![gone(), gone(), Outcome::Late]), Err(ErrorKind::Unknown));
        assert_eq!(kind(vec![gone(), gone(), busy(1)]), Err(ErrorKind::Unavailable));
        assert_eq!(kind(vec![busy(2), gone(), busy(1)]), Ok(()));
        let refused = || Outcome::Failed(Error::new(ErrorKind::Rejected, "no"));
        assert_eq!(kind(vec![refused(), refused(), granted(1)]), Err(ErrorKind::Rejected));
        assert_eq!(kind(vec![refused(), gone(), gone()]), Err(ErrorKind::Unavailable));
        assert_eq!(kind(vec![refused(), gone(), Outcome::Unheard]), Err(ErrorKind::Rejected));
        // Nodes that granted it and went away before they agreed on a token have it still.
        let earlier = Tally::new(vec![gone(), gone(), aside()]).verdict(&nodes(3), true);
        assert_eq!(earlier.map(|_| ()).map_err(|error| error.kind()), Err(ErrorKind::Unknown));
    }

    #[test]
    fn an_error_names_what_each_node_said() {
        let mut tally = Tally::new(vec![Outcome::Asked; 4]);
        let sent = Instant::since_boot(Duration::ZERO);
        let grant = Grant { token: FencingToken::new(5), ttl: Duration::from_secs(1), session: 0 };
        tally.note(0, Ok(Acquired::Granted(grant)), sent);
        tally.note(1, Err(Error::new(ErrorKind::Unavailable, "could not connect")), sent);
        tally.outcomes[2] = Outcome::Aside("no answer in time".into());
        tally.close(false);
        let error = tally.verdict(&nodes(4), false).unwrap_err().to_string();
        for part in [
            "redis://0: granted with token 5;",
            "redis://1: could not connect;",
            "redis://2: set aside (no answer in time);",
            "redis://3: no answer in time",
        ] {
            assert!(error.contains(part), "{error}");
        }
    }
}
