//! Renewals in a cluster: each node is asked at once for all that it has, by one call for each slot, in one write.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use redis::RedisWrite;
use tokio::task::JoinSet;

use super::super::reply;
use super::super::script::{self, By};
use super::super::{BATCH, RedisStore, Renewable, checked_ttl};
use super::map::{Endpoint, Redirect, unsettled};
use super::{ClusterStore, LEAST_PAUSE, MOST_PAUSE, named};
use crate::clock;
use crate::error::{Error, ErrorKind, Result};
use crate::types::{Held, Name, Renewal};

/// One that is to be sent to a node: its number, and whether to ask there for a slot on its way.
#[derive(Debug)]
struct Turn {
    number: usize,
    at: Option<Endpoint>,
}

impl ClusterStore {
    pub(super) async fn renew_routed(&self, held: &[Held]) -> Vec<Result<Renewal>> {
        let mut answers: Vec<Option<Result<Renewal>>> = vec![None; held.len()];
        let longest = held.iter().filter_map(|held| held.extend).max();
        let deadline = self.deadline(longest);
        let mut turns: Vec<Turn> = (0..held.len()).map(|number| Turn { number, at: None }).collect();
        let mut pause = LEAST_PAUSE;
        let mut is_first = true;
        while !turns.is_empty() {
            let (mut next, mut must_wait) = (Vec::new(), false);
            for (number, asked, answer) in self.renew_once(held, turns, !is_first).await {
                let redirect = match (&answer, &asked) {
                    (Err(error), Some(asked)) => Redirect::of(error, asked),
                    _ => None,
                };
                if matches!(&answer, Err(error) if error.is_transient()) {
                    self.nodes.hub().stale.notify_one();
                }
                let is_over = clock::now().plus(pause) >= deadline;
                match redirect {
                    None => answers[number] = Some(answer),
                    Some(Redirect::Moved(slot, to)) if !is_over => {
                        self.nodes.moved(slot, &to);
                        next.push(Turn { number, at: None });
                    }
                    Some(Redirect::Ask(to)) if !is_over => next.push(Turn { number, at: Some(to) }),
                    Some(Redirect::Again) if !is_over => {
                        must_wait = true;
                        next.push(Turn { number, at: None });
                    }
                    Some(_) => {
                        self.nodes.hub().stale.notify_one();
                        answers[number] = Some(answer.map_err(unsettled));
                    }
                }
            }
            if must_wait || (!is_first && !next.is_empty()) {
                clock::sleep(pause).await;
                pause = (pause * 2).min(MOST_PAUSE);
            }
            (turns, is_first) = (next, false);
        }
        let missing = || Err(Error::new(ErrorKind::Unknown, "no answer for this lock"));
        answers.into_iter().map(|answer| answer.unwrap_or_else(missing)).collect()
    }

    /// Asks every node at once for what it has; `singly`: one call for each lock, as some of a slot's are elsewhere. Answers
    /// with which node it was that answered.
    async fn renew_once(
        &self,
        held: &[Held],
        turns: Vec<Turn>,
        singly: bool,
    ) -> Vec<(usize, Option<Endpoint>, Result<Renewal>)> {
        let mut done = Vec::with_capacity(turns.len());
        let mut by_node: HashMap<(Endpoint, bool), Vec<usize>> = HashMap::new();
        for Turn { number, at } in turns {
            let asking = at.is_some();
            let slot = self.slot(&held[number].name);
            match slot.and_then(|slot| at.map_or_else(|| Ok(self.nodes.owner(slot)?.endpoint), Ok)) {
                Ok(endpoint) => by_node.entry((endpoint, asking)).or_default().push(number),
                Err(error) => done.push((number, None, Err(error))),
            }
        }
        let mut calls = JoinSet::new();
        for ((endpoint, asking), numbers) in by_node {
            let node = self.nodes.at(&endpoint);
            let batch: Vec<_> = numbers.iter().map(|number| held[*number].clone()).collect();
            let call = async move {
                let answers = node.store.renew_slots(&batch, singly, asking).await;
                let told = answers.into_iter().zip(&batch);
                let told = told.map(|(answer, held)| answer.map_err(|error| named(error, &node, &held.name)));
                (endpoint, numbers, told.collect::<Vec<_>>())
            };
            calls.spawn_on(call, self.nodes.runtime());
        }
        let firsts: HashMap<_, _> =
            self.nodes.masters().into_iter().map(|(node, first)| (node.endpoint, first)).collect();
        // A call whose task has ended without an answer is one that nobody knows of.
        while let Some(call) = calls.join_next().await {
            let Ok((endpoint, numbers, answers)) = call else { continue };
            let left = |answer: &Result<Renewal>| match answer {
                Ok(Renewal::Renewed(left)) => Some(*left),
                _ => None,
            };
            let renewed = numbers.iter().zip(&answers);
            let renewed: Vec<_> = renewed
                .filter_map(|(number, answer)| Some((left(answer)?, held[*number].name.clone())))
                .collect();
            if let (Some(first), false) = (firsts.get(&endpoint), renewed.is_empty()) {
                let (store, first) = (self.nodes.at(&endpoint).store, *first);
                drop(self.nodes.runtime().spawn(async move { store.note(first, &renewed).await }));
            }
            let told = numbers.into_iter().zip(answers);
            done.extend(told.map(|(number, answer)| (number, Some(endpoint.clone()), answer)));
        }
        done
    }
}

impl RedisStore {
    /// Renews what this node has.
    async fn renew_slots(
        self: &Arc<Self>,
        held: &[Held],
        singly: bool,
        asking: bool,
    ) -> Vec<Result<Renewal>> {
        let mut answers: Vec<Option<Result<Renewal>>> = vec![None; held.len()];
        let mut items = Vec::with_capacity(held.len());
        for (number, held) in held.iter().enumerate() {
            let item = held.extend.map_or(Ok(0), checked_ttl).and_then(|ttl| {
                let keys = self.keyspace.keys(&held.name)?;
                Ok((self.keyspace.slot_of(&keys), number, Renewable { held, keys, ttl }))
            });
            match item {
                Ok(item) => items.push(item),
                Err(error) => answers[number] = Some(Err(error)),
            }
        }
        items.sort_by_key(|(slot, ..)| *slot);
        let places: Vec<_> = items.iter().map(|(slot, number, _)| (*slot, *number)).collect();
        let items: Vec<_> = items.into_iter().map(|(.., item)| item).collect();
        let (mut batches, mut rest) = (Vec::new(), &items[..]);
        for same in places.chunk_by(|(one, _), (other, _)| one == other) {
            let (batch, others) = rest.split_at(same.len());
            batches.extend(batch.chunks(if singly { 1 } else { BATCH }));
            rest = others;
        }
        if !batches.is_empty() {
            let renewed = self.renew_all(&batches, asking).await;
            let renewed = renewed.unwrap_or_else(|error| vec![Err(error); places.len()]);
            for ((_, number), answer) in places.into_iter().zip(renewed) {
                answers[number] = Some(answer);
            }
        }
        let missing = || Err(Error::new(ErrorKind::Unknown, "no answer for this lock"));
        answers.into_iter().map(|answer| answer.unwrap_or_else(missing)).collect()
    }

    /// Writes the index of what was renewed here, for people who look: no trouble with it may cost a lock.
    async fn note(&self, first: u16, renewed: &[(Duration, Name)]) {
        let index = self.keyspace.index_in(first);
        for renewed in renewed.chunks(BATCH) {
            let bytes =
                renewed.iter().map(|(_, name)| name.as_bytes().len() + 24).sum::<usize>() + index.len();
            let call = |by: By| {
                let mut call = script::INDEX.call(by, 1, 2 * renewed.len(), bytes);
                call.write_arg(&index);
                for (left, name) in renewed {
                    call.write_arg_fmt(left.as_millis());
                    call.write_arg(name.as_bytes());
                }
                Ok(call)
            };
            let deadline = self.deadline(None);
            let noted = match self.connector.link(deadline).await {
                Ok(link) => self.run(&link, deadline, call).await,
                Err(error) => Err(error),
            };
            match noted {
                Ok(answer) => debug_assert!(!reply::is_unknown_script(&answer)),
                Err(error) => {
                    // The next renewal writes it anew, where its slot is then.
                    self.connector.hub.stale.notify_one();
                    return tracing::debug!(%error, "what is held could not be noted for `ls`");
                }
            }
        }
    }
}
