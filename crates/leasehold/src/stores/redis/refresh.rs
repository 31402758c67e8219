//! Keeps this process's waiters in line, and finds what a lost message would have told.
//!
//! One task serves all of them. It starts with the first waiter and ends a moment after the last, and with it the
//! subscription.

use std::sync::{Arc, Weak};
use std::time::Duration;

use redis::{RedisWrite, Value};

use super::reply::{self, Occupant};
use super::script::REFRESH;
use super::waiting::{Due, Seen, Waiting, Work};
use super::{MOST_TTL, RedisStore, wrote};
use crate::clock;
use crate::error::{Error, ErrorKind, Result};
use crate::types::{Claim, ClaimId, Grant, Held, Name};

/// How long the subscription outlives the last waiter: the next one often comes at once.
const LINGER: Duration = Duration::from_secs(1);
/// Claims in one command, which is what a script can take in.
const MOST_CLAIMS: usize = 2_000;

/// Has the waiters of `store` served from now on, whenever there are any.
pub(super) fn attend(store: &Arc<RedisStore>) {
    let (runtime, weak) = (store.connector.runtime().clone(), Arc::downgrade(store));
    // Weak, or the two would keep each other.
    let waiting = Arc::downgrade(&store.waiting);
    store.waiting.starter.set(move || {
        if let Some(waiting) = waiting.upgrade() {
            drop(runtime.spawn(serve(weak.clone(), waiting)));
        }
    });
}

async fn serve(store: Weak<RedisStore>, waiting: Arc<Waiting>) {
    loop {
        let Some(alive) = store.upgrade() else { return };
        let Work { due, orphans, next, is_idle } = waiting.collect();
        for due in due {
            tokio::spawn(present(alive.clone(), due));
        }
        for (name, id) in orphans {
            tokio::spawn(pass_on(alive.clone(), name, id));
        }
        drop(alive);
        if !is_idle {
            let _ = clock::timeout_at(next, waiting.bell.notified()).await;
            continue;
        }
        let ends = clock::now().plus(LINGER);
        if clock::timeout_at(ends, waiting.bell.notified()).await.is_none() {
            let Some(alive) = store.upgrade() else { return };
            if alive.connector.unsubscribe().await {
                return;
            }
        }
    }
}

/// Presents the waiters of one lock.
async fn present(store: Arc<RedisStore>, due: Due) {
    match store.refresh(&due).await {
        Ok((ranks, holding, seen)) => store.waiting.answered(&due, &ranks, holding, &seen),
        Err(error) => {
            tracing::debug!(lock = %due.name, %error, "waiters could not be kept in line, trying again");
            store.waiting.failed(&due);
        }
    }
}

/// Gives back what was handed to a claim that nobody waits for any more.
async fn pass_on(store: Arc<RedisStore>, name: Name, id: ClaimId) {
    let held = Held::queued(&Claim::new(name, id, super::LEAST_TTL), 0);
    for _ in 0..3 {
        // It is not forbidden: should its caller come back after all, it stands in line anew.
        match store.give_back(&held, false, false).await {
            Err(error) if error.is_transient() => clock::sleep(Duration::from_millis(20)).await,
            _ => break,
        }
    }
    store.waiting.passed_on(id);
}

type Standing = (Vec<i64>, Option<(ClaimId, Grant)>, Seen);

impl RedisStore {
    async fn refresh(&self, due: &Due) -> Result<Standing> {
        let deadline = self.deadline(Some(due.ttl));
        let link = self.connector.link(deadline).await?;
        if !self.connector.subscribe(&link, deadline).await? {
            return Err(Error::new(ErrorKind::Unavailable, "this connection can receive no messages"));
        }
        let keys = self.keyspace.keys(&due.name)?;
        let mut ranks = Vec::with_capacity(due.claims.len());
        let mut lock = None;
        for claims in due.claims.chunks(MOST_CLAIMS) {
            let call = |by| {
                let bytes = 2 * keys.bound() + 34 * claims.len() + 128;
                let mut call = REFRESH.call(by, 2, 3 + claims.len(), bytes);
                wrote(keys.write_lock(&mut call.writer_for_next_arg()))?;
                wrote(keys.write_fence(&mut call.writer_for_next_arg()))?;
                call.write_arg(self.waiting.channel.as_bytes());
                call.write_arg_fmt(due.attempt.window.as_millis());
                call.write_arg_fmt(due.attempt.number);
                for id in claims {
                    call.write_arg_fmt(id);
                }
                Ok(call)
            };
            let answer = self.run(&link, deadline, call).await?;
            lock = Some(read_standing(&answer, &mut ranks).ok_or_else(|| reply::unexpected(&answer))?);
        }
        let (occupant, left) = lock.unwrap_or((None, -2));
        let holding = match &occupant {
            Some(Occupant::Claim { id, token, .. }) => {
                let ttl = reply::remaining(left).unwrap_or(MOST_TTL);
                Some((*id, Grant { token: *token, ttl, session: link.generation }))
            }
            _ => None,
        };
        let holder = occupant.map(|occupant| occupant.into_holder(left));
        Ok((ranks, holding, Seen { holder, left: reply::remaining(left), session: link.generation }))
    }
}

/// Adds where each claim stands, and gives what stands at the lock and for how long.
fn read_standing(answer: &Value, ranks: &mut Vec<i64>) -> Option<(Option<Occupant>, i64)> {
    let Value::Array(parts) = answer else { return None };
    let [Value::BulkString(value), Value::Int(left), standing @ ..] = parts.as_slice() else { return None };
    for rank in standing {
        let Value::Int(rank) = rank else { return None };
        ranks.push(*rank);
    }
    Some(((*left != -2).then(|| Occupant::read(value)), *left))
}
