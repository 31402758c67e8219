//! What is held: renewed at a majority, topped up at the nodes that lack it, given back everywhere.

use std::sync::Arc;
use std::time::Duration;

use super::attempt::{Attempt, Way, node_id};
use super::node::Node;
use super::race::{Call, Race};
use super::{NEEDED_NODE_TIMEOUT, Shared};
use crate::clock::{self, Instant};
use crate::error::{Error, ErrorKind, Result};
use crate::store::drift;
use crate::types::{ClaimId, Held, Released, Renewal};

/// How long a release waits for the last nodes, beyond the time that the majority took: a process that ends right after it
/// then leaves nothing behind.
pub(super) const STRAGGLERS: Duration = Duration::from_millis(5);
/// How long a claim whose TTL is not known is given back for.
const UNKNOWN_LEASE: Duration = Duration::from_secs(60);

/// One claim of a renewal.
struct Item {
    attempt: Option<Arc<Attempt>>,
    /// What the nodes say is left, of those that renewed.
    left: Vec<Duration>,
    /// Nodes that do not hold for it.
    without: usize,
    failures: Vec<(usize, String)>,
    answer: Option<Result<Renewal>>,
}

impl Item {
    fn note(&mut self, index: usize, answer: Result<Renewal>, majority: usize, nodes: usize) {
        match answer {
            Ok(Renewal::Renewed(left)) => self.left.push(left),
            Ok(Renewal::Lost) => self.without += 1,
            Err(error) => self.failures.push((index, error.to_string())),
        }
        self.decide(majority, nodes);
    }

    /// What to ask one node for.
    fn renewable(&self, index: usize, held: &Held) -> Option<Held> {
        match &self.attempt {
            Some(attempt) => attempt.renewable(index, held),
            // Made by another process, or before this one began: the token of the quorum is that of a majority.
            None => Some(Held { id: node_id(held.id, held.session), session: 0, ..held.clone() }),
        }
    }

    fn decide(&mut self, majority: usize, nodes: usize) {
        if self.answer.is_some() {
            return;
        }
        if self.left.len() >= majority {
            self.left.sort_unstable_by(|a, b| b.cmp(a));
            self.answer = Some(Ok(Renewal::Renewed(self.left[majority - 1])));
        } else if self.without > nodes - majority {
            self.answer = Some(Ok(Renewal::Lost));
        }
    }
}

impl Shared {
    /// Renews a batch; see [`Store::renew`](crate::store::Store::renew).
    pub(super) async fn renew(self: &Arc<Self>, held: &[Held]) -> Vec<Result<Renewal>> {
        let started = clock::now();
        let mut items: Vec<Item> = held.iter().map(|held| self.renewal(held)).collect();
        let asked = self.to_be_asked();
        let mut calls = Vec::new();
        for index in &asked {
            let part: Vec<(usize, Held)> = held
                .iter()
                .enumerate()
                .filter(|(at, _)| items[*at].answer.is_none())
                .filter_map(|(at, held)| Some((at, items[at].renewable(*index, held)?)))
                .collect();
            if !part.is_empty() {
                let attempts = part.iter().map(|(at, _)| items[*at].attempt.clone()).collect();
                calls.push(self.renew_at(*index, part, attempts));
            }
        }
        let shortest = held.iter().filter_map(|held| held.extend).min().unwrap_or(Duration::MAX);
        let deadline = started.plus(NEEDED_NODE_TIMEOUT.min(shortest / 3));
        let mut race = Race::new(calls, &self.runtime, started.plus(self.timeout));
        while items.iter().any(|item| item.answer.is_none()) {
            let Some((index, answers)) = race.next_before(deadline).await else { break };
            for (at, answer) in answers {
                items[at].note(index, answer, self.majority, self.nodes.len());
            }
        }
        drop(race);
        let answers =
            items.into_iter().zip(held).map(|(item, held)| self.settle_renewal(item, held, started));
        answers.collect()
    }

    /// What is known of an item before any node was asked.
    fn renewal(&self, held: &Held) -> Item {
        let mut item =
            Item { attempt: None, left: Vec::new(), without: 0, failures: Vec::new(), answer: None };
        if let Some((attempt, token)) = self.table.held(held.id) {
            if held.token.is_some_and(|other| other != token) {
                // What it held before under that token is gone, whatever it holds now.
                item.answer = Some(Ok(Renewal::Lost));
            }
            item.without = attempt.lacking().len();
            item.attempt = Some(attempt);
            item.decide(self.majority, self.nodes.len());
        }
        item
    }

    fn renew_at(
        &self,
        index: usize,
        part: Vec<(usize, Held)>,
        attempts: Vec<Option<Arc<Attempt>>>,
    ) -> Call<Vec<(usize, Result<Renewal>)>> {
        let node = self.nodes[index].clone();
        Call::new(&self.nodes[index], async move {
            let (places, held): (Vec<usize>, Vec<Held>) = part.into_iter().unzip();
            let answers = node.renew(&held).await;
            for ((attempt, held), answer) in attempts.iter().zip(&held).zip(&answers) {
                if let (Some(attempt), Ok(Renewal::Lost)) = (attempt, answer) {
                    attempt.cleared(index, held.token);
                }
            }
            places.into_iter().zip(answers).collect()
        })
    }

    /// The answer for one claim; where it is renewed, the nodes that lack it are presented the claim again.
    fn settle_renewal(self: &Arc<Self>, item: Item, held: &Held, started: Instant) -> Result<Renewal> {
        if let (Some(Ok(Renewal::Renewed(left))), Some(attempt)) = (&item.answer, &item.attempt) {
            let valid = started.plus(left.saturating_sub(drift(*left)));
            self.table.renewed(held.id, attempt, valid, |token| {
                let lacking = attempt.to_top_up().into_iter().map(|index| &self.nodes[index]);
                let calls = lacking
                    .filter(|node| held.extend.is_some() && node.is_in_service())
                    .map(|node| Call::new(node, attempt.present(node, Way::Proposing(token))))
                    .collect();
                drop(Race::new(calls, &self.runtime, self.aside_at()));
            });
        }
        item.answer.unwrap_or_else(|| Err(self.not_renewed(&item.left, item.without, &item.failures)))
    }

    /// Neither a majority that renewed it nor one that does not have it.
    fn not_renewed(&self, left: &[Duration], without: usize, failures: &[(usize, String)]) -> Error {
        let told = |node: &Arc<Node>| {
            let failure = failures.iter().find(|(index, _)| *index == node.index);
            match failure {
                Some((_, failure)) => Some(format!("{}: {failure}", node.location())),
                None if !node.is_in_service() => {
                    Some(format!("{}: set aside ({})", node.location(), node.why()))
                }
                None => None,
            }
        };
        let told: Vec<String> = self.nodes.iter().filter_map(told).collect();
        let what = format!(
            "{} of {} nodes renewed it, {without} do not have it, {} are needed; {}",
            left.len(),
            self.nodes.len(),
            self.majority,
            told.join("; ")
        );
        Error::new(ErrorKind::Unknown, what)
    }

    /// Releases; see [`Store::release`](crate::store::Store::release).
    pub(super) async fn release(self: &Arc<Self>, held: &Held) -> Result<Released> {
        let started = clock::now();
        let nodes = self.nodes.len();
        let mut by_other = 0;
        let (calls, wait_for): (Vec<Call<Result<Released>>>, usize) =
            if let Some((attempt, involved)) = self.end(held.id) {
                let until = started.plus(attempt.ttl()).plus(Duration::from_secs(1));
                let wait_for = involved.len();
                by_other = attempt.elsewhere(&involved);
                (self.give_back_calls(held.id, &attempt, &involved, until), wait_for)
            } else {
                let until = started.plus(held.extend.unwrap_or(UNKNOWN_LEASE)).plus(Duration::from_secs(1));
                let told = Held { id: node_id(held.id, held.session), session: 0, ..held.clone() };
                (self.nodes.iter().map(|node| release_at(node, told.clone(), until)).collect(), nodes)
            };
        let mut count = Count { uninvolved: nodes - wait_for - by_other, by_other, ..Count::default() };
        let mut race = Race::new(calls, &self.runtime, started.plus(self.timeout));
        let mut deadline = started.plus(NEEDED_NODE_TIMEOUT);
        let mut missing = self.majority.min(wait_for);
        while let Some((index, answer)) = race.next_before(deadline).await {
            missing = missing.saturating_sub(usize::from(answer.is_ok()));
            count.note(index, answer);
            if missing == 0 {
                let now = clock::now();
                deadline = deadline.min(now.plus(now.since(started)).plus(STRAGGLERS));
            }
        }
        drop(race);
        count.verdict(self)
    }

    /// Ends what a claim has, and tells where that may be; `None` if nothing is known of it, or nothing is left.
    fn end(&self, id: ClaimId) -> Option<(Arc<Attempt>, Vec<usize>)> {
        let attempt = self.table.end(id)?;
        let involved = attempt.involved();
        if involved.is_empty() {
            self.table.forget(id, &attempt);
            return None;
        }
        Some((attempt, involved))
    }

    /// Gives back what these nodes have of an attempt that is over.
    pub(super) fn give_back_calls(
        self: &Arc<Self>,
        id: ClaimId,
        attempt: &Arc<Attempt>,
        involved: &[usize],
        until: Instant,
    ) -> Vec<Call<Result<Released>>> {
        let all_needed = self.to_be_asked().len() == self.nodes.len();
        let call = |index: &usize| {
            let node = &self.nodes[*index];
            let (work, shared, attempt) =
                (attempt.give_back(node, until, all_needed), self.clone(), attempt.clone());
            Call::new(node, async move {
                let answer = work.await;
                shared.table.forget(id, &attempt);
                answer
            })
        };
        involved.iter().map(call).collect()
    }
}

fn release_at(node: &Arc<Node>, held: Held, until: Instant) -> Call<Result<Released>> {
    let there = node.clone();
    Call::new(node, async move {
        let answer = if there.is_in_service() {
            there.release(&held).await
        } else {
            Err(Error::new(ErrorKind::Unavailable, format!("set aside ({})", there.why())))
        };
        if matches!(&answer, Err(error) if error.is_transient()) {
            there.tell_later(Held { suspect: true, ..held }, until);
        }
        answer
    })
}

/// What the nodes said to a release.
#[derive(Debug, Default)]
struct Count {
    /// Nodes that have nothing of the claim, and were not asked.
    uninvolved: usize,
    released: usize,
    not_held: usize,
    by_other: usize,
    failed: Vec<(usize, Error)>,
}

impl Count {
    fn note(&mut self, index: usize, answer: Result<Released>) {
        match answer {
            Ok(Released::Released) => self.released += 1,
            Ok(Released::NotHeld) => self.not_held += 1,
            Ok(Released::HeldByOther) => self.by_other += 1,
            Err(error) => self.failed.push((index, error)),
        }
    }

    fn known(&self) -> usize {
        self.uninvolved + self.released + self.not_held + self.by_other
    }

    fn verdict(self, shared: &Shared) -> Result<Released> {
        let nodes = shared.nodes.len();
        let silent = nodes - self.known();
        if self.known() < shared.majority {
            let told: Vec<String> = self
                .failed
                .iter()
                .map(|(index, error)| format!("{}: {error}", shared.nodes[*index].location()))
                .collect();
            let what = format!(
                "{} of {nodes} nodes answered the release, {} are needed; {}",
                self.known(),
                shared.majority,
                told.join("; ")
            );
            return Err(Error::new(ErrorKind::Unknown, what)
                .advise("the others are told as soon as they can be reached, or it ends by its TTL"));
        }
        // Those that did not answer may have held it: a majority that could not be counted is none that was lost.
        Ok(if self.released > 0 && self.released + silent >= shared.majority {
            Released::Released
        } else if self.by_other > self.not_held {
            Released::HeldByOther
        } else {
            Released::NotHeld
        })
    }
}
