//! The guard at a Redis key that a lock protects: it refuses writes with an older token.

use std::sync::Arc;
use std::time::Duration;

use redis::{RedisWrite, Value};

use super::script::{self, By};
use super::{RedisStore, keys, reply};
use crate::error::{Error, Result};
use crate::fence::StaleToken;
use crate::types::FencingToken;

/// The script that writes a key unless the token is older than the newest seen, for any client to run.
///
/// `KEYS[1]` is the data, `KEYS[2]` the key of the newest token (in the same slot of a cluster); `ARGV[1]` the token,
/// `ARGV[2]` the value, `ARGV[3]` (may be left out) the data's TTL in milliseconds. It answers 1, or the newest token as
/// text if the one that was offered is older; then nothing was written.
pub const FENCED_SET: &str = include_str!("fenced_set.lua");

/// Writes keys with the fencing token of the lock that protects them; see [`RedisStore::fence`].
#[derive(Clone, Debug)]
pub struct RedisFence {
    store: Arc<RedisStore>,
}

impl RedisStore {
    /// A guard for keys of this server. Use it where the protected data are themselves keys on it.
    pub fn fence(self: &Arc<Self>) -> RedisFence {
        RedisFence { store: self.clone() }
    }
}

impl RedisFence {
    /// Writes `value` to `key` (the whole key: the store's prefix is not added), unless a newer token wrote it before.
    /// The same token may write any number of times. One round trip.
    ///
    /// # Errors
    /// The outer one as for any command of the store: after `Unknown` the write may have been done. The inner one says
    /// that the token is stale and nothing was written.
    pub async fn set(&self, key: &[u8], value: &[u8], token: FencingToken) -> Result<Result<(), StaleToken>> {
        self.write(key, value, token, None).await
    }

    /// As [`set`](Self::set); the data end after `ttl`, the newest token stays.
    ///
    /// # Errors
    /// As [`set`](Self::set), and `Invalid` for a TTL under a millisecond.
    pub async fn set_for(
        &self,
        key: &[u8],
        value: &[u8],
        token: FencingToken,
        ttl: Duration,
    ) -> Result<Result<(), StaleToken>> {
        self.write(key, value, token, Some(ttl)).await
    }

    async fn write(
        &self,
        key: &[u8],
        value: &[u8],
        token: FencingToken,
        ttl: Option<Duration>,
    ) -> Result<Result<(), StaleToken>> {
        let ttl = ttl.map(|ttl| u64::try_from(ttl.as_millis()).unwrap_or(u64::MAX));
        if ttl.is_some_and(|ttl| !(1..=1 << 50).contains(&ttl)) {
            return Err(Error::invalid("the TTL of the data is out of range"));
        }
        if token.get() > FencingToken::MAX {
            return Err(Error::invalid("the fencing token is not below 2^53"));
        }
        let guard = keys::guard_key(key);
        let store = &*self.store;
        let deadline = store.deadline(None);
        let link = store.connector.link(deadline).await?;
        let call = |by: By| {
            let bytes = key.len() + guard.len() + value.len() + 64;
            let mut call = script::FENCED_SET.call(by, 2, 2 + usize::from(ttl.is_some()), bytes);
            call.write_arg(key);
            call.write_arg(&guard);
            call.write_arg_fmt(token);
            call.write_arg(value);
            if let Some(ttl) = ttl {
                call.write_arg_fmt(ttl);
            }
            Ok(call)
        };
        match store.run(&link, deadline, call).await? {
            Value::Int(1) => Ok(Ok(())),
            Value::BulkString(text) => match reply::read_token(&text) {
                Some(newest) => Ok(Err(StaleToken { presented: token, newest })),
                None => Err(reply::unexpected(&Value::BulkString(text)).on_store(&store.connector.location)),
            },
            other => Err(reply::unexpected(&other).on_store(&store.connector.location)),
        }
    }
}
