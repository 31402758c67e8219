//! How a claim is presented to the nodes, agrees with them on a token, gives up, or stands in line at one of them.

use std::sync::Arc;
use std::time::Duration;

use super::attempt::{Attempt, Way};
use super::hold::STRAGGLERS;
use super::race::{Call, Race};
use super::tally::{Outcome, Tally};
use super::{NEEDED_NODE_TIMEOUT, Shared, preference};
use crate::clock::{self, Instant};
use crate::error::{Error, ErrorKind, Result};
use crate::store::{check_ttl, drift};
use crate::types::{Acquired, Claim, FencingToken, Grant, Released, Ticket};

/// How often the nodes are asked to agree on a token, after the first time.
const RAISES: usize = 3;
/// For how long one who was handed the lock by a node goes on asking the others, beyond two times what one round took.
const PERSISTENCE: Duration = Duration::from_millis(50);
/// How many nodes are tried by one who is to stand in line.
const LINES_TRIED: usize = 3;

/// One presentation of a claim.
pub(super) struct Run<'a> {
    shared: &'a Arc<Shared>,
    claim: &'a Claim,
    attempt: Arc<Attempt>,
    tally: Tally,
    /// When the presentation began: what the lease is counted from.
    started: Instant,
}

impl Shared {
    /// Presents a claim; see [`Store::acquire`](crate::store::Store::acquire).
    pub(super) async fn acquire(self: &Arc<Self>, claim: &Claim) -> Result<Acquired> {
        check_ttl(&self.guarantees(), claim.ttl)?;
        let started = clock::now();
        let begun = self.table.begin(claim, self.nodes.len(), started);
        if let Some(replaced) = &begun.replaced {
            self.give_up(claim, replaced);
        }
        let mut run =
            Run { shared: self, claim, attempt: begun.attempt, tally: Tally::new(self.unasked()), started };
        let ballot = claim.ballot.or(begun.token).unwrap_or_else(|| self.ballots.next());
        let keep = begun.line.filter(|_| begun.was_handed);
        let line = begun.line.filter(|_| !begun.was_handed);
        match run.first_round(ballot, line).await {
            Some(answer) => answer,
            // Boxed, for what is rare must not make the common case carry its room.
            None => Box::pin(run.not_at_once(ballot, keep, line)).await,
        }
    }

    /// What each node has to say before it was asked.
    fn unasked(&self) -> Vec<Outcome> {
        self.nodes.iter().map(|_| Outcome::Late).collect()
    }

    /// Has an attempt that is over given back in the background.
    pub(super) fn give_up(self: &Arc<Self>, claim: &Claim, attempt: &Arc<Attempt>) {
        drop(self.giving_up(claim, attempt));
    }

    /// The same, to be waited for as long as one likes: dropped, it goes on in the background.
    fn giving_up(self: &Arc<Self>, claim: &Claim, attempt: &Arc<Attempt>) -> Race<Result<Released>> {
        self.table.over(claim.id, attempt);
        let until = clock::now().plus(claim.ttl).plus(Duration::from_secs(1));
        let calls = self.give_back_calls(claim.id, attempt, &attempt.involved(), until);
        if calls.is_empty() {
            self.table.forget(claim.id, attempt);
        }
        Race::new(calls, &self.runtime, self.aside_at())
    }
}

impl Run<'_> {
    /// Presents it to all nodes in service, at `line` to keep its place there. The answer, if that was all.
    async fn first_round(&mut self, ballot: FencingToken, line: Option<usize>) -> Option<Result<Acquired>> {
        let asked = self.shared.to_be_asked();
        for node in &self.shared.nodes {
            if !asked.contains(&node.index) {
                self.tally.outcomes[node.index] = Outcome::Aside(node.why());
            }
        }
        self.ask(&asked, ballot, line, Tally::is_decided).await;
        if self.tally.has_majority() { self.agree().await } else { None }
    }

    /// Presents it to these nodes and waits until it is decided, or they have had their time.
    async fn ask(
        &mut self,
        asked: &[usize],
        ballot: FencingToken,
        line: Option<usize>,
        is_decided: impl Fn(&Tally) -> bool,
    ) {
        let shared = self.shared;
        let call = |index: &usize| {
            let node = &shared.nodes[*index];
            let way = if line == Some(*index) {
                Way::InLine(self.claim.queue_limit)
            } else {
                Way::Proposing(ballot)
            };
            Call::new(node, self.attempt.present(node, way))
        };
        let calls: Vec<_> = asked.iter().map(call).collect();
        for index in asked {
            self.tally.outcomes[*index] = Outcome::Asked;
        }
        let sent = clock::now();
        let mut race = Race::new(calls, &shared.runtime, sent.plus(shared.timeout));
        let usual = sent.plus(shared.timeout.min(self.claim.ttl / 3));
        let longest = sent.plus(NEEDED_NODE_TIMEOUT.min(self.claim.ttl / 3));
        while !is_decided(&self.tally) {
            let deadline = if self.tally.is_heard() { usual } else { longest };
            let Some((index, answer)) = race.next_before(deadline).await else { break };
            if let Ok(Acquired::Granted(grant)) = &answer {
                shared.ballots.saw(grant.token);
            }
            self.tally.note(index, answer, sent);
            if let Some(token) = Tally::holder(&self.tally.outcomes[index]).and_then(|holder| holder.token) {
                shared.ballots.saw(token);
            }
        }
        let in_time = is_decided(&self.tally);
        self.tally.close(in_time);
        // What is set aside was asked only because it is needed: it counts as silent, not as not waited for.
        for index in asked.iter().filter(|index| !shared.nodes[**index].is_in_service()) {
            self.tally.silence(*index);
        }
    }

    /// Granted by a majority: has the nodes agree on a token. `None` if they would not. Those whose answer was not waited for
    /// are asked too: one of the majority may be out of its mind.
    async fn agree(&mut self) -> Option<Result<Acquired>> {
        for round in 0..=RAISES {
            if let Some((token, until)) = self.tally.agreed() {
                return Some(self.won(token, until));
            }
            let asked = self.tally.grantors();
            if round == RAISES || asked.len() < self.shared.majority {
                break;
            }
            // One of them may take no token that suits the others, its clock being far off: what it says itself is not to
            // decide, where the others do without it.
            let spare =
                if round == 0 { 0 } else { self.tally.granted().saturating_sub(self.shared.majority) };
            self.shared.count_raise();
            // Beyond the last of a block, where the claim takes several.
            let beyond = self.tally.largest_but(spare) + u64::from(self.claim.tokens.max(1));
            let ballot = FencingToken::new(beyond.min(FencingToken::MAX));
            self.ask(&asked, ballot, None, |tally| tally.is_agreed_or_split(ballot)).await;
        }
        None
    }

    fn won(&mut self, token: FencingToken, until: Instant) -> Result<Acquired> {
        let ttl = until.since(self.started).min(self.claim.ttl);
        let valid = self.started.plus(ttl.saturating_sub(drift(ttl)));
        if valid <= clock::now() {
            self.shared.give_up(self.claim, &self.attempt);
            let what = format!(
                "a majority granted it, but their answers took longer than the TTL of {:?} allows",
                self.claim.ttl
            );
            return Err(Error::new(ErrorKind::Unknown, what).advise("use a longer TTL"));
        }
        if !self.shared.table.won(self.claim.id, &self.attempt, token, valid) {
            self.shared.give_up(self.claim, &self.attempt);
            return Err(Error::new(ErrorKind::Rejected, "the claim was released while it was presented"));
        }
        Ok(Acquired::Granted(Grant { token, ttl, session: self.attempt.number }))
    }

    /// What follows when the first round did not win it.
    async fn not_at_once(
        &mut self,
        ballot: FencingToken,
        keep: Option<usize>,
        line: Option<usize>,
    ) -> Result<Acquired> {
        if self.claim.queue && self.tally.is_heard() && !self.tally.has_majority() {
            let order = preference(&self.shared.nodes, &self.claim.name);
            let is_there = |index: &usize| self.tally.has_granted(*index) || self.tally.is_busy(*index);
            let first = keep.or_else(|| order.iter().copied().find(is_there));
            if first.is_some_and(|first| self.tally.has_granted(first))
                && let Some(answer) = self.persist(ballot).await
            {
                return answer;
            }
            if let Some(ticket) = line.and_then(|line| self.still_in_line(line))
                && self.keep_only_the_place(line).await
            {
                return Ok(self.queued(line.unwrap_or_default(), ticket));
            }
            if self.tally.is_heard()
                && let Some(answer) = self.line_up(ballot, &order).await
            {
                return answer;
            }
        }
        self.defeat().await
    }

    /// Gives everything back, and tells why. It waits for the nodes as long again as they took, 50 ms at most, so that a process
    /// that ends when it hears of it leaves nothing behind.
    async fn defeat(&self) -> Result<Acquired> {
        // What was granted in an earlier round is there still, also at a node that cannot be reached any more.
        let may_hold = !self.attempt.involved().is_empty();
        let mut race = self.shared.giving_up(self.claim, &self.attempt);
        let now = clock::now();
        let patience = now.since(self.started).min(PERSISTENCE) + STRAGGLERS;
        while race.next_before(now.plus(patience)).await.is_some() {}
        drop(race);
        let verdict = self.tally.verdict(&self.shared.locations(), may_hold);
        if matches!(&verdict, Err(error) if !error.is_transient()) {
            self.shared.table.refused(self.claim.id, &self.attempt);
        }
        verdict
    }

    /// It has the node that decides: whoever has others only lets go of them, and who had the lock is releasing it. So it
    /// goes on asking those that it lacks, for a little while.
    async fn persist(&mut self, ballot: FencingToken) -> Option<Result<Acquired>> {
        let patience = clock::now().since(self.started) * 2 + PERSISTENCE;
        let until = clock::now().plus(patience.min(self.claim.ttl / 4));
        let mut pause = Duration::from_millis(1);
        while !self.tally.is_held_by_other() && clock::now() < until {
            clock::sleep(pause / 4 + clock::jitter(pause)).await;
            pause = (pause * 2).min(Duration::from_millis(8));
            let missing: Vec<usize> = (0..self.shared.nodes.len())
                .filter(|index| self.tally.is_to_be_asked_again(*index))
                .collect();
            self.ask(&missing, ballot, None, Tally::is_decided).await;
            if self.tally.has_majority() {
                let agreed = self.agree().await;
                return if agreed.is_some() { agreed } else { Some(self.defeat().await) };
            }
        }
        None
    }

    fn still_in_line(&self, line: usize) -> Option<Ticket> {
        match &self.tally.outcomes[line] {
            Outcome::Queued(ticket) => Some((**ticket).clone()),
            _ => None,
        }
    }

    /// Gives back what others than the node where it stands in line granted, and waits for it, so that it may be presented
    /// there again; false if one did not answer.
    async fn keep_only_the_place(&mut self, line: Option<usize>) -> bool {
        let involved = self.attempt.involved().into_iter().filter(|index| Some(*index) != line);
        let involved: Vec<usize> = involved.collect();
        if involved.is_empty() {
            return true;
        }
        let until = clock::now().plus(self.claim.ttl);
        let calls = self.shared.give_back_calls(self.claim.id, &self.attempt, &involved, until);
        let mut race = Race::new(calls, &self.shared.runtime, self.shared.aside_at());
        let deadline = clock::now().plus(self.shared.timeout);
        let mut left = involved.len();
        while let Some((_, Ok(_))) = race.next_before(deadline).await {
            left -= 1;
        }
        left == 0
    }

    fn queued(&self, node: usize, ticket: Ticket) -> Acquired {
        let told = Ticket::new(self.claim).with_session(self.attempt.number).with_news_of(&ticket);
        if !self.shared.table.in_line(self.claim.id, &self.attempt, node, ticket) {
            self.shared.give_up(self.claim, &self.attempt);
        }
        Acquired::Queued(told)
    }

    /// Gives everything back and stands in line at one node: the first, in the order that all who want this lock share, at
    /// which somebody has it.
    async fn line_up(&mut self, ballot: FencingToken, order: &[usize]) -> Option<Result<Acquired>> {
        let busy = self.tally.clone();
        for index in order.iter().copied().filter(|index| busy.is_busy(*index)).take(LINES_TRIED) {
            self.anew();
            self.ask(&[index], ballot, Some(index), |tally| !matches!(tally.outcomes[index], Outcome::Asked))
                .await;
            match &self.tally.outcomes[index] {
                Outcome::Queued(ticket) => {
                    let ticket = (**ticket).clone();
                    return Some(Ok(self.queued(index, ticket)));
                }
                Outcome::Granted(..) => {
                    // Freed meanwhile, and so are the others.
                    let others: Vec<usize> =
                        self.shared.to_be_asked().into_iter().filter(|other| *other != index).collect();
                    self.ask(&others, ballot, None, Tally::is_decided).await;
                    if self.tally.has_majority() {
                        return self.agree().await;
                    }
                    return self.persist(ballot).await;
                }
                Outcome::Failed(error) if error.kind() == ErrorKind::QueueFull => {
                    let error = error.clone();
                    self.shared.give_up(self.claim, &self.attempt);
                    return Some(Err(error));
                }
                // No line there: all that is left is to ask again later.
                Outcome::Busy(_) => break,
                _ => {}
            }
        }
        let mine = std::mem::replace(&mut self.tally, busy);
        // What the line said does not matter to who is told that it is busy.
        drop(mine);
        None
    }

    /// Begins another attempt, with nothing of the last one's in its way.
    fn anew(&mut self) {
        if !self.attempt.involved().is_empty() {
            let next = self.shared.table.begin_again(self.claim, &self.attempt, self.shared.nodes.len());
            let old = std::mem::replace(&mut self.attempt, next);
            self.shared.give_up(self.claim, &old);
        }
        self.tally = Tally::new(self.shared.unasked());
    }
}
