//! Who holds what.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use redis::{Pipeline, RedisWrite, Value};

use super::connection::Link;
use super::keys::Keys;
use super::reply::{self, Occupant};
use super::script::{By, INSPECT, LIST};
use super::{RedisStore, wrote};
use crate::clock::Instant;
use crate::error::Result;
use crate::types::{ClaimId, Holder, LockView, Name, Page, Query, Record, Waiter};

/// The most locks of one page.
pub(super) const PAGE: usize = 500;
/// Locks looked at by one command, so that no command holds the server up for long.
pub(super) const BATCH: usize = 100;
/// For how long it is remembered where an owner waits, unless it says so again.
const ANNOUNCED: Duration = Duration::from_secs(30);
/// The most waiters listed of one lock; all are counted.
pub(super) const MOST_WAITERS: usize = 1_000;

impl RedisStore {
    pub(super) async fn look_at(&self, query: &Query) -> Result<Page<LockView>> {
        let deadline = self.deadline(None);
        let link = self.connector.link(deadline).await?;
        match query {
            Query::One(name) => {
                let items = self.view_all(&link, std::slice::from_ref(name), MOST_WAITERS, deadline).await?;
                Ok(Page { items, next: None })
            }
            Query::Waits { owner } => {
                let names = self.announced(&link, owner, deadline).await?;
                let mut items = Vec::with_capacity(names.len());
                for names in names.chunks(PAGE) {
                    items.extend(self.view_all(&link, names, MOST_WAITERS, deadline).await?);
                }
                items.retain(|view| waits_for(view, owner));
                Ok(Page { items, next: None })
            }
            Query::Prefix { prefix, after, limit } => {
                let limit = (*limit).clamp(1, PAGE);
                let index = self.keyspace.index().unwrap_or_default();
                let names = self.indexed(&link, index, prefix, after.as_ref(), limit, deadline).await?;
                let names: Vec<_> = names.into_iter().collect();
                let next = names.get(limit - 1).filter(|_| names.len() > limit).cloned();
                let names = &names[..names.len().min(limit)];
                let mut items = self.view_all(&link, names, 0, deadline).await?;
                items.retain(|view| view.holder.is_some());
                Ok(Page { items, next })
            }
        }
    }

    /// Up to one name more than `limit`, in order.
    pub(super) async fn indexed(
        &self,
        link: &Arc<Link>,
        index: &[u8],
        prefix: &[u8],
        after: Option<&Name>,
        limit: usize,
        deadline: Instant,
    ) -> Result<BTreeSet<Name>> {
        let call = |by| {
            let mut call = LIST.call(by, 1, 0, index.len());
            call.write_arg(index);
            Ok(call)
        };
        let answer = self.run(link, deadline, call).await?;
        let Value::Array(found) = answer else { return Err(reply::unexpected(&answer)) };
        let mut names = BTreeSet::new();
        for value in found {
            let Value::BulkString(bytes) = value else { continue };
            // The index is a key like any other: what stands in it is checked as if a stranger had written it.
            let Ok(name) = Name::new(&bytes) else { continue };
            if bytes.starts_with(prefix) && after.is_none_or(|after| *after < name) {
                names.insert(name);
                if names.len() > limit + 1 {
                    names.pop_last();
                }
            }
        }
        Ok(names)
    }

    /// Makes known that `owner` waits for a lock: an owner's waits may lie in many lines, and nothing else leads there.
    pub(super) async fn announce_wait(&self, name: &Name, owner: &str) -> Result<()> {
        let deadline = self.deadline(None);
        let link = self.connector.link(deadline).await?;
        let key = self.keyspace.owner(owner);
        let mut calls = Pipeline::with_capacity(2);
        calls.cmd("HSET").arg(&key).arg(name.as_bytes()).arg(1);
        calls.cmd("PEXPIRE").arg(&key).arg(u64::try_from(ANNOUNCED.as_millis()).unwrap_or(u64::MAX));
        for answer in self.connector.send_all(&link, &calls, deadline).await? {
            self.accepted(answer)?;
        }
        Ok(())
    }

    pub(super) async fn announced(
        &self,
        link: &Arc<Link>,
        owner: &str,
        deadline: Instant,
    ) -> Result<Vec<Name>> {
        let mut call = redis::cmd("HKEYS");
        call.arg(self.keyspace.owner(owner));
        let answer = self.accepted(self.connector.send(link, &call, deadline).await?)?;
        let Value::Array(found) = answer else { return Err(reply::unexpected(&answer)) };
        let name = |value: Value| match value {
            Value::BulkString(bytes) => Name::new(bytes).ok(),
            _ => None,
        };
        Ok(found.into_iter().filter_map(name).collect())
    }

    /// One view for each name, in one round trip.
    async fn view_all(
        &self,
        link: &Arc<Link>,
        names: &[Name],
        waiters: usize,
        deadline: Instant,
    ) -> Result<Vec<LockView>> {
        let batches: Vec<_> = names.chunks(BATCH).collect();
        self.views(link, &batches, waiters, false, deadline).await
    }

    /// One view for each name, by one command for each batch, all in one round trip.
    pub(super) async fn views(
        &self,
        link: &Arc<Link>,
        batches: &[&[Name]],
        waiters: usize,
        asking: bool,
        deadline: Instant,
    ) -> Result<Vec<LockView>> {
        if batches.is_empty() {
            return Ok(Vec::new());
        }
        let mut by = By::Digest;
        let answers = loop {
            let calls = batches.iter().map(|names| {
                let keys = names.iter().map(|name| self.keyspace.keys(name)).collect::<Result<Vec<_>>>()?;
                inspect_call(&keys, waiters, by)
            });
            let calls = calls.collect::<Result<Vec<_>>>()?;
            let answers = self.connector.send_calls(link, calls, asking, deadline).await?;
            if !answers.iter().any(reply::is_unknown_script) || by == By::Text {
                break answers;
            }
            by = By::Text;
        };
        let mut views = Vec::new();
        for (batch, answer) in batches.iter().zip(answers) {
            let answer = self.accepted(answer)?;
            views.extend(read_views(batch, &answer).ok_or_else(|| reply::unexpected(&answer))?);
        }
        Ok(views)
    }
}

/// Whether the owner waits there: what was announced may be over.
pub(super) fn waits_for(view: &LockView, owner: &str) -> bool {
    let of =
        |waiter: &Waiter| waiter.record.as_ref().is_some_and(|record| record.owner.as_deref() == Some(owner));
    view.queue.iter().any(of)
}

fn inspect_call(batch: &[Keys<'_>], waiters: usize, by: By) -> Result<redis::Cmd> {
    let mut call = INSPECT.call(by, 2 * batch.len(), 1, batch.iter().map(|keys| 2 * keys.bound()).sum());
    for keys in batch {
        wrote(keys.write_lock(&mut call.writer_for_next_arg()))?;
        wrote(keys.write_fence(&mut call.writer_for_next_arg()))?;
    }
    call.write_arg_fmt(waiters);
    Ok(call)
}

fn read_views(names: &[Name], answer: &Value) -> Option<Vec<LockView>> {
    let Value::Array(parts) = answer else { return None };
    let (Value::Int(now), rest) = parts.split_first()? else { return None };
    if rest.len() != 5 * names.len() {
        return None;
    }
    names.iter().zip(rest.chunks_exact(5)).map(|(name, parts)| read_view(name, parts, *now)).collect()
}

/// An entry of the line: `1 <claim> <process> <ttl ms> <tokens> <since us> <record>`.
fn read_waiter(entry: &Value) -> Option<Waiter> {
    let Value::BulkString(entry) = entry else { return None };
    let mut parts = entry.splitn(7, |byte| *byte == b' ');
    let mut text = |skip| std::str::from_utf8(parts.nth(skip)?).ok();
    if text(0)? != "1" {
        return None;
    }
    let (id, since) = (ClaimId::parse(text(0)?)?, text(3)?.parse().ok());
    Some(Waiter::new(id, since, parts.next().and_then(Record::decode)))
}

fn read_view(name: &Name, parts: &[Value], now: i64) -> Option<LockView> {
    let [value, Value::Int(left), fence, Value::Int(waiters), Value::Array(queue)] = parts else {
        return None;
    };
    let mut view = LockView::free(name.clone());
    if let Value::BulkString(text) = fence {
        view.last_token = reply::read_token(text);
    }
    view.waiters = u64::try_from(*waiters).unwrap_or(0);
    view.queue = queue.iter().filter_map(read_waiter).collect();
    view.holder = match value {
        Value::Nil => None,
        Value::BulkString(value) => Some(Occupant::read(value).into_holder(*left)),
        // Another type: the script answers with its name in a list.
        Value::Array(kind) => {
            let kind = kind.first().and_then(reply::text).unwrap_or_default();
            let mut holder = Holder { remaining: reply::remaining(*left), ..Holder::default() };
            holder.foreign = Some(format!("a key of type {kind}"));
            Some(holder)
        }
        _ => return None,
    };
    if let Some(holder) = &mut view.holder {
        // A token is the server's time of the grant, unless that clock had stepped back.
        holder.since_unix_micros = holder
            .token
            .map(crate::types::FencingToken::get)
            .filter(|micros| i64::try_from(*micros).is_ok_and(|at| at <= now));
    }
    Some(view)
}
