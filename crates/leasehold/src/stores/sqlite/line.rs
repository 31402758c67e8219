//! The line of waiters of a lock, inside a transaction: who joins it, who leaves it, and to whom a lock is handed on.

use std::collections::HashMap;
use std::time::Duration;

use rusqlite::{OptionalExtension, Row};

use super::boot::{Boot, micros};
use super::database::{Transaction, failure};
use super::lifeline::{Life, LifelineId};
use super::verbs::{Award, Lock};
use crate::clock;
use crate::error::{Error, ErrorKind, Result};
use crate::store::{HAND_OFF_TTL, alive_for};
use crate::types::{
    Acquired, Binding, Claim, ClaimId, FencingToken, Held, Holder, Name, Record, Ticket, Waiter,
};

/// A line in order, for [`Place::read`]: each place, and when its process was last heard of.
pub(super) const PLACES: &str = "SELECT q.seq, q.claim, q.lifeline, q.bound, q.ttl, q.tokens, q.since, q.record, \
     w.boot, w.heard FROM queue q LEFT JOIN waiting w ON w.lifeline = q.lifeline WHERE q.name = ?1 ORDER BY q.seq";
/// The places of all lines in whose records a text stands, and the names of the locks.
pub(super) const WAITS: &str = "SELECT q.seq, q.claim, q.lifeline, q.bound, q.ttl, q.tokens, q.since, q.record, \
     w.boot, w.heard, q.name FROM queue q LEFT JOIN waiting w ON w.lifeline = q.lifeline \
     WHERE instr(q.record, ?1) > 0 ORDER BY q.name, q.seq";
/// Its first place.
const FIRST: &str = "SELECT q.seq, q.claim, q.lifeline, q.bound, q.ttl, q.tokens, q.since, q.record, \
     w.boot, w.heard FROM queue q LEFT JOIN waiting w ON w.lifeline = q.lifeline WHERE q.name = ?1 ORDER BY q.seq LIMIT 1";

/// A place in line.
#[derive(Debug)]
pub(super) struct Place {
    seq: i64,
    pub(super) claim: ClaimId,
    pub(super) lifeline: LifelineId,
    bound: bool,
    ttl: Duration,
    tokens: u32,
    since: i64,
    record: String,
    heard: Option<(Vec<u8>, i64)>,
}

/// A lock that was handed to a waiter.
#[derive(Debug)]
pub(super) struct Handed {
    pub(super) name: Name,
    pub(super) claim: ClaimId,
    /// Whose.
    pub(super) lifeline: LifelineId,
    pub(super) token: FencingToken,
    pub(super) ttl: Duration,
}

impl Place {
    pub(super) fn read(row: &Row<'_>) -> rusqlite::Result<Self> {
        let heard = match row.get::<_, Option<Vec<u8>>>(8)? {
            Some(boot) => Some((boot, row.get(9)?)),
            None => None,
        };
        let lifeline: Vec<u8> = row.get(2)?;
        let broken = || rusqlite::Error::InvalidColumnType(2, "lifeline".into(), rusqlite::types::Type::Blob);
        Ok(Self {
            seq: row.get(0)?,
            claim: ClaimId::from_bytes(row.get(1)?),
            lifeline: LifelineId::from_bytes(&lifeline).ok_or_else(broken)?,
            bound: row.get(3)?,
            ttl: Duration::from_micros(u64::try_from(row.get::<_, i64>(4)?).unwrap_or(0)),
            tokens: row.get(5)?,
            since: row.get(6)?,
            record: row.get(7)?,
            heard,
        })
    }

    /// Whether its process, of which `life` is known, was heard of lately: one that is stopped must not be handed the lock
    /// again and again.
    pub(super) fn lives(&self, boot: &Boot, now: i64, life: Life) -> bool {
        let Some((its_boot, heard)) = &self.heard else { return false };
        let known = if its_boot == boot.id() { life != Life::Dead } else { life == Life::Alive };
        known && heard.saturating_add(micros(alive_for(self.ttl))) > now
    }

    /// The place as onlookers see it.
    pub(super) fn show(&self) -> Waiter {
        let record = Record::decode(self.record.as_bytes());
        Waiter::new(self.claim, u64::try_from(self.since).ok(), record)
    }
}

impl Transaction<'_> {
    /// Puts a claim in line, unless it stands there.
    pub(super) fn line_up(&mut self, claim: &Claim, lock: &Lock, holder: Holder) -> Result<Acquired> {
        let own = self.lifelines.id();
        let known: Option<(i64, Vec<u8>)> = self
            .connection
            .prepare_cached("SELECT seq, lifeline FROM queue WHERE name = ?1 AND claim = ?2")
            .and_then(|mut statement| {
                let read = |row: &Row<'_>| Ok((row.get(0)?, row.get(1)?));
                statement.query_row((claim.name.as_bytes(), claim.id.as_bytes()), read).optional()
            })
            .map_err(|e| failure("look a waiter up", e))?;
        let seq = match known {
            Some((seq, lifeline)) if lifeline == own.as_bytes() => seq,
            Some((seq, _)) => {
                let sql = "UPDATE queue SET lifeline = ?2 WHERE seq = ?1";
                self.run("keep a waiter's place", sql, (seq, own.as_bytes()))?;
                seq
            }
            None => self.join(claim)?,
        };
        self.mark_heard()?;
        if !lock.line {
            let sql = "UPDATE locks SET line = 1 WHERE name = ?1";
            self.run("begin a line", sql, [claim.name.as_bytes()])?;
        }
        let ahead = self.count(claim.name.as_bytes(), seq)?;
        Ok(Acquired::Queued(Ticket::new(claim).with_ahead(ahead).with_holder(Some(holder))))
    }

    fn join(&mut self, claim: &Claim) -> Result<i64> {
        if let Some(limit) = claim.queue_limit {
            let limit = u64::from(limit);
            if self.count(claim.name.as_bytes(), i64::MAX)? >= limit {
                self.weed(&claim.name)?;
            }
            let before = self.count(claim.name.as_bytes(), i64::MAX)?;
            if before >= limit {
                let what = format!("{before} wait in line already, as many as this mutex allows");
                return Err(Error::new(ErrorKind::QueueFull, what).for_name(&claim.name));
            }
        }
        self.run(
            "put a claim in line",
            "INSERT INTO queue (name, claim, lifeline, bound, ttl, tokens, since, record) \
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)",
            (
                claim.name.as_bytes(),
                claim.id.as_bytes(),
                self.lifelines.id().as_bytes(),
                claim.binding == Binding::Process,
                micros(claim.ttl),
                claim.tokens.max(1),
                micros(clock::wall()),
                &*claim.record,
            ),
        )?;
        Ok(self.connection.last_insert_rowid())
    }

    /// How many stand in line before `seq`.
    fn count(&self, name: &[u8], seq: i64) -> Result<u64> {
        self.connection
            .prepare_cached("SELECT count(*) FROM queue WHERE name = ?1 AND seq < ?2")
            .and_then(|mut statement| statement.query_row((name, seq), |row| row.get::<_, i64>(0)))
            .map(i64::cast_unsigned)
            .map_err(|e| failure("count waiters", e))
    }

    /// This process lives, and so all waiters of it that somebody waits for.
    pub(super) fn mark_heard(&self) -> Result<()> {
        self.run(
            "keep waiters alive",
            "INSERT INTO waiting (lifeline, boot, heard) VALUES (?1, ?2, ?3) \
             ON CONFLICT (lifeline) DO UPDATE SET boot = ?2, heard = ?3",
            (self.lifelines.id().as_bytes(), self.boot.id(), self.now),
        )?;
        Ok(())
    }

    /// Takes a claim out of line.
    pub(super) fn leave_line(&self, name: &Name, id: ClaimId) -> Result<()> {
        let sql = "DELETE FROM queue WHERE name = ?1 AND claim = ?2";
        self.run("take a claim out of line", sql, (name.as_bytes(), id.as_bytes()))?;
        Ok(())
    }

    /// Takes all waiters of this process out of every line. For its end.
    pub(super) fn leave_all_lines(&self) -> Result<()> {
        self.forget_waiters(self.lifelines.id())
    }

    /// Takes all waiters of a process out of every line.
    pub(super) fn forget_waiters(&self, id: LifelineId) -> Result<()> {
        for sql in ["DELETE FROM queue WHERE lifeline = ?1", "DELETE FROM waiting WHERE lifeline = ?1"] {
            self.run("forget a process's waiters", sql, [id.as_bytes()])?;
        }
        Ok(())
    }

    /// Takes those out of line who count as gone.
    fn weed(&mut self, name: &Name) -> Result<()> {
        let places: Vec<Place> = self
            .connection
            .prepare_cached(PLACES)
            .and_then(|mut statement| statement.query_map([name.as_bytes()], Place::read)?.collect())
            .map_err(|e| failure("read a line", e))?;
        let mut seen: HashMap<LifelineId, Life> = HashMap::new();
        for place in places {
            let life = *seen.entry(place.lifeline).or_insert_with(|| self.lifelines.life(place.lifeline));
            if !self.can_take(name, &place, life) {
                self.remove(&place)?;
            }
        }
        Ok(())
    }

    fn remove(&self, place: &Place) -> Result<()> {
        self.run("take a waiter out of line", "DELETE FROM queue WHERE seq = ?1", [place.seq])?;
        Ok(())
    }

    /// Whether somebody is there to take the lock, as far as can be known. Of our own we know it for certain.
    fn can_take(&self, name: &Name, place: &Place, life: Life) -> bool {
        if place.lifeline == self.lifelines.id() {
            self.room.is_attended(name, place.claim, clock::now())
        } else {
            place.lives(self.boot, self.now, life)
        }
    }

    /// Hands a lock that nobody holds, whose last token was `last`, to the first in line who can take it; those who cannot
    /// are taken out. `asking` presents its claim just now. False: nobody stands in line any more.
    pub(super) fn advance(
        &mut self,
        name: &Name,
        last: Option<FencingToken>,
        asking: Option<&Claim>,
    ) -> Result<bool> {
        // Those who were handed it and died in the same moment are passed over by the next look.
        while let Some(place) = self.first(name)? {
            self.remove(&place)?;
            let asks = asking.filter(|claim| claim.id == place.claim);
            if asks.is_none() && !self.can_take(name, &place, self.lifelines.life(place.lifeline)) {
                continue;
            }
            let ttl = asks.map_or_else(|| place.ttl.min(HAND_OFF_TTL), |claim| claim.ttl);
            let award = Award {
                claim: place.claim,
                ttl,
                lifeline: place.bound.then_some(place.lifeline),
                tokens: place.tokens,
                ballot: None,
                record: &place.record,
                line: true,
            };
            let token = self.grant(name, last, &award)?;
            if asks.is_none() {
                let (name, claim, lifeline) = (name.clone(), place.claim, place.lifeline);
                self.handed.push(Handed { name, claim, lifeline, token, ttl });
            }
            return Ok(true);
        }
        Ok(false)
    }

    fn first(&self, name: &Name) -> Result<Option<Place>> {
        self.connection
            .prepare_cached(FIRST)
            .and_then(|mut statement| statement.query_row([name.as_bytes()], Place::read).optional())
            .map_err(|e| failure("look the next waiter up", e))
    }

    /// Hands the lock on if its hold has ended and somebody stands in line. For the rounds and for cleaning up.
    ///
    /// It goes by the line itself, not by what the lock's row says of it: a program of schema version 1 knows nothing of
    /// lines, and forgets a row that is old and free.
    pub(super) fn hand_on(&mut self, name: &Name) -> Result<()> {
        let lock = self.find(name)?;
        if lock.as_ref().is_some_and(|lock| self.live(lock).is_some()) {
            return Ok(());
        }
        self.note_bound(name, false);
        if !self.advance(name, lock.map(|lock| lock.token), None)? {
            self.clear(name)?;
        }
        Ok(())
    }

    /// Takes claims out of line that nobody waits for, and passes on what they were handed.
    pub(super) fn give_up(&mut self, claims: &[Claim]) -> Result<()> {
        for claim in claims {
            self.release(&Held::queued(claim, 0))?;
        }
        Ok(())
    }
}
