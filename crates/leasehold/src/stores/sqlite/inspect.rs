//! Looking: who holds what, for people and tools. Passes no gate and holds nobody up.

use std::collections::HashMap;

use rusqlite::{OptionalExtension, Params, Row};

use super::database::{Database, failure};
use super::lifeline::{Life, LifelineId};
use super::line::{PLACES, Place, WAITS};
use super::verbs::{LOCK_COLUMNS, Lock};
use crate::error::Result;
use crate::types::{Holder, LockView, Name, Page, Query, Waiter};

/// Rows read at a time; most of them may be of locks that are free by now.
const CHUNK: usize = 256;

/// Answers a query about the locks of `database`.
pub(super) fn inspect(database: &Database, query: &Query) -> Result<Page<LockView>> {
    database.verify()?;
    let mut look = Look { database, seen: HashMap::new() };
    match query {
        Query::One(name) => Ok(Page { items: vec![look.one(name)?], next: None }),
        Query::Waits { owner } => look.waits(owner),
        Query::Prefix { prefix, after, limit } => look.list(prefix, after.as_ref(), *limit),
    }
    .map_err(|e: crate::error::Error| e.on_store(&database.location))
}

struct Look<'a> {
    database: &'a Database,
    /// Lifelines looked at already: a process with a thousand locks is asked once.
    seen: HashMap<LifelineId, Life>,
}

impl Look<'_> {
    fn one(&mut self, name: &Name) -> Result<LockView> {
        let mut view = self.view(name)?;
        if view.waiters > 0 {
            view.queue = self.line(name)?;
            view.waiters = view.queue.len() as u64;
        }
        Ok(view)
    }

    /// A lock without its line, of which only the length is told: with those who are gone.
    fn view(&mut self, name: &Name) -> Result<LockView> {
        let sql = format!(
            "SELECT {LOCK_COLUMNS}, (SELECT count(*) FROM queue WHERE queue.name = ?1) FROM locks WHERE name = ?1"
        );
        let lock = self
            .database
            .connection
            .prepare_cached(&sql)
            .and_then(|mut statement| {
                let read = |row: &Row<'_>| Ok((Lock::read(row)?, row.get::<_, i64>(10)?));
                statement.query_row([name.as_bytes()], read).optional()
            })
            .map_err(|e| failure("look a lock up", e))?;
        let mut view = LockView::free(name.clone());
        if let Some((lock, waiters)) = lock {
            view.holder = self.holder(&lock);
            view.last_token = Some(lock.token);
            view.waiters = waiters.cast_unsigned();
        }
        Ok(view)
    }

    /// Who waits for a lock, in order; not those who are known to be gone.
    fn line(&mut self, name: &Name) -> Result<Vec<Waiter>> {
        let places: Vec<Place> = self
            .database
            .connection
            .prepare_cached(PLACES)
            .and_then(|mut statement| statement.query_map([name.as_bytes()], Place::read)?.collect())
            .map_err(|e| failure("read a line", e))?;
        Ok(places.iter().filter(|place| self.lives(place)).map(Place::show).collect())
    }

    /// The locks that a claim of `owner` waits for, each with its own places in line.
    ///
    /// A thousand waiters with owners ask this a thousand times in three seconds, so no record of the others is read: the
    /// database looks for the owner's text as it stands in a record.
    fn waits(&mut self, owner: &str) -> Result<Page<LockView>> {
        let as_written = format!("\"owner\":{}", serde_json::Value::from(owner));
        let rows: Vec<(Vec<u8>, Place)> = self
            .database
            .connection
            .prepare_cached(WAITS)
            .and_then(|mut statement| {
                statement.query_map([as_written], |row| Ok((row.get(10)?, Place::read(row)?)))?.collect()
            })
            .map_err(|e| failure("read the lines", e))?;
        let is_its = |waiter: &Waiter| {
            waiter.record.as_ref().and_then(|record| record.owner.as_deref()) == Some(owner)
        };
        let mut items: Vec<LockView> = Vec::new();
        for (name, place) in rows {
            let waiter = place.show();
            let (true, true, Ok(name)) = (is_its(&waiter), self.lives(&place), Name::new(name)) else {
                continue;
            };
            if items.last().is_none_or(|view| view.name != name) {
                items.push(self.view(&name)?);
            }
            items.last_mut().into_iter().for_each(|view| view.queue.push(waiter.clone()));
        }
        Ok(Page { items, next: None })
    }

    fn lives(&mut self, place: &Place) -> bool {
        let Database { boot, lifelines, .. } = self.database;
        let life = *self.seen.entry(place.lifeline).or_insert_with(|| lifelines.life(place.lifeline));
        place.lives(boot, boot.now(), life)
    }

    fn list(&mut self, prefix: &[u8], after: Option<&Name>, limit: usize) -> Result<Page<LockView>> {
        let mut after = after.map(|name| name.as_bytes().to_vec()).unwrap_or_default();
        let limit = limit.max(1);
        let mut items: Vec<LockView> = Vec::new();
        loop {
            let rows = self.chunk(prefix, &after)?;
            let at_end = rows.len() < CHUNK;
            if let Some(last) = rows.last() {
                after.clone_from(&last.name);
            }
            for lock in rows {
                let Some(holder) = self.holder(&lock) else { continue };
                if items.len() >= limit {
                    let next = items.last().map(|view| view.name.clone());
                    return Ok(Page { items, next });
                }
                // A row with a name that is none is nobody's of ours.
                let Ok(name) = Name::new(&lock.name) else { continue };
                let mut view = LockView::free(name);
                (view.holder, view.last_token) = (Some(holder), Some(lock.token));
                if lock.line {
                    view.waiters = self.line(&view.name)?.len() as u64;
                }
                items.push(view);
            }
            if at_end {
                return Ok(Page { items, next: None });
            }
        }
    }

    /// The next rows with a hold whose names begin with `prefix` and come after `after`.
    fn chunk(&self, prefix: &[u8], after: &[u8]) -> Result<Vec<Lock>> {
        match successor(prefix) {
            Some(end) => self.read("AND name < ?3", (prefix, after, end)),
            None => self.read("", (prefix, after)),
        }
    }

    fn read(&self, bound: &str, values: impl Params) -> Result<Vec<Lock>> {
        let sql = format!(
            "SELECT {LOCK_COLUMNS} FROM locks WHERE name >= ?1 AND name > ?2 {bound} AND claim IS NOT NULL \
             ORDER BY name LIMIT {CHUNK}"
        );
        self.database
            .connection
            .prepare_cached(&sql)
            .and_then(|mut statement| statement.query_map(values, Lock::read)?.collect())
            .map_err(|e| failure("list locks", e))
    }

    fn holder(&mut self, lock: &Lock) -> Option<Holder> {
        let Database { boot, lifelines, .. } = self.database;
        let now = boot.now();
        let hold = lock.live(boot, now, |id| *self.seen.entry(id).or_insert_with(|| lifelines.life(id)));
        hold.map(|hold| hold.show(now))
    }
}

/// The first bytes after all that begin with `prefix`; `None` if nothing comes after them.
fn successor(prefix: &[u8]) -> Option<Vec<u8>> {
    let last = prefix.iter().rposition(|byte| *byte != u8::MAX)?;
    let mut end = prefix[..=last].to_vec();
    end[last] += 1;
    Some(end)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_successor_of_a_prefix_bounds_it() {
        assert_eq!(successor(b"ab"), Some(b"ac".to_vec()));
        assert_eq!(successor(b"a\xff\xff"), Some(b"b".to_vec()));
        assert_eq!(successor(b"\xff"), None);
        assert_eq!(successor(b""), None);
    }
}
