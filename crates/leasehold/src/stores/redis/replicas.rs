//! Waits until replicas have a lock, on connections of their own: WAIT blocks the one it runs on.

use std::io::Write;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use redis::{Cmd, Pipeline, RedisWrite, Value};
use tokio::sync::Semaphore;

use super::connection::Link;
use super::keys::owner;
use super::reply::{self, Refusal};
use super::script::{By, REPLICATE};
use super::{RedisStore, wrote};
use crate::clock::{self, Instant};
use crate::error::{Error, ErrorKind, Result};
use crate::types::{Held, Replication};

/// Connections that are kept for the next who wait.
const MOST_IDLE: usize = 8;
/// Who wait at a time, each on a connection: servers have a limit of those, and a thousand at once would reach it.
const MOST_WAITING: usize = 16;

/// Connections on which nobody waits just now. All lead to where the store's own connection of that generation does.
#[derive(Debug)]
pub(super) struct Aside {
    idle: Mutex<(u64, Vec<Arc<Link>>)>,
    turns: Semaphore,
}

impl Default for Aside {
    fn default() -> Self {
        Self { idle: Mutex::default(), turns: Semaphore::new(MOST_WAITING) }
    }
}

impl Aside {
    fn take(&self, generation: u64) -> Option<Arc<Link>> {
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        if idle.0 != generation {
            *idle = (generation, Vec::new());
        }
        idle.1.retain(|link| link.is_open());
        idle.1.pop()
    }

    fn put(&self, generation: u64, link: Arc<Link>) {
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        if idle.0 == generation && idle.1.len() < MOST_IDLE {
            idle.1.push(link);
        }
    }
}

impl RedisStore {
    /// How many replicas have what is held, once it is as many as asked for or the time is up.
    pub(super) async fn replicate_once(&self, held: &Held, wish: &Replication) -> Result<u32> {
        if wish.replicas == 0 || wish.timeout < Duration::from_millis(1) {
            return Err(Error::invalid(
                "to wait for replicas takes one at least, and a millisecond at least",
            ));
        }
        let calls = self.replicate_calls(held, wish)?;
        // Nor may the turn before and the dials outlast the lease.
        let dialled_by = self.deadline(held.extend);
        let Some(_turn) = clock::timeout_at(dialled_by, self.aside.turns.acquire()).await else {
            let what = format!("{MOST_WAITING} others wait for replicas, and none was done in time");
            return Err(Error::new(ErrorKind::Unavailable, what));
        };
        let main = self.connector.link(dialled_by).await?;
        let link = match self.aside.take(main.generation) {
            Some(link) => link,
            None => self.dial_aside(&main, dialled_by).await?,
        };
        // The server may answer a tenth of a second after the time is up.
        let deadline = self.deadline(held.extend).plus(wish.timeout);
        let answers = self.connector.send_all(&link, &calls, deadline).await?;
        self.aside.put(main.generation, link);
        let mut answers = answers.into_iter();
        match self.accepted(answers.next().unwrap_or_default())? {
            Value::Int(-2) => {
                let lost = "the lock was lost before its replicas were waited for";
                return Err(Error::new(ErrorKind::Lost, lost));
            }
            Value::Int(_) => {}
            other => return Err(reply::unexpected(&other)),
        }
        let answer = answers.next().unwrap_or_default();
        if let Value::ServerError(error) = &answer
            && Refusal::of(error).is_unknown_command()
        {
            let command = if wish.on_disk { "WAITAOF (Redis 7.2)" } else { "WAIT" };
            return Err(Error::new(ErrorKind::Unsupported, format!("the server does not know {command}")));
        }
        read_count(&self.accepted(answer)?)
    }

    fn replicate_calls(&self, held: &Held, wish: &Replication) -> Result<Pipeline> {
        let keys = self.keyspace.keys(&held.name)?;
        // By its text, always: with an unknown digest the wait behind it would be for nothing.
        let mut write = REPLICATE.call(By::Text, 1, 2, keys.bound() + 96);
        wrote(keys.write_lock(&mut write.writer_for_next_arg()))?;
        let mut out = write.writer_for_next_arg();
        wrote(out.write_all(&owner(held.id)))?;
        if let Some(token) = held.token {
            wrote(write!(out, "{token}:"))?;
        }
        drop(out);
        write.write_arg_fmt(held.extend.unwrap_or(super::LEAST_TTL).as_millis().max(1));
        let timeout = u64::try_from(wish.timeout.as_millis()).unwrap_or(u64::MAX);
        let mut wait = Cmd::new();
        if wish.on_disk {
            wait.arg("WAITAOF").arg(0).arg(wish.replicas).arg(timeout);
        } else {
            wait.arg("WAIT").arg(wish.replicas).arg(timeout);
        }
        let mut calls = Pipeline::with_capacity(2);
        calls.add_command(write).add_command(wait);
        Ok(calls)
    }

    async fn dial_aside(&self, main: &Link, deadline: Instant) -> Result<Arc<Link>> {
        let (connector, address) = (self.connector.clone(), main.address.clone());
        // Where connections live, whatever executor the caller is on.
        let dial = self.connector.runtime().spawn(async move { connector.dial_to(&address).await });
        let failed = |what| Error::new(ErrorKind::Unavailable, what);
        match clock::timeout_at(deadline, dial).await {
            Some(Ok(link)) => link,
            Some(Err(_)) => Err(failed("the runtime that kept the connection has ended")),
            None => Err(failed("could not connect in time, to wait for replicas")),
        }
    }
}

/// What WAIT answers, or WAITAOF: the last number is of the replicas.
fn read_count(answer: &Value) -> Result<u32> {
    let count = match answer {
        Value::Int(count) => Some(count),
        Value::Array(counts) => match counts.as_slice() {
            [Value::Int(_), Value::Int(count)] => Some(count),
            _ => None,
        },
        _ => None,
    };
    count.and_then(|count| u32::try_from(*count).ok()).ok_or_else(|| reply::unexpected(answer))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_commands_answers_are_read() {
        assert_eq!(read_count(&Value::Int(2)).unwrap(), 2);
        assert_eq!(read_count(&Value::Array(vec![Value::Int(1), Value::Int(3)])).unwrap(), 3);
        for nonsense in [Value::Nil, Value::Int(-1), Value::Array(vec![Value::Int(1)])] {
            assert!(read_count(&nonsense).is_err(), "{nonsense:?}");
        }
    }
}
