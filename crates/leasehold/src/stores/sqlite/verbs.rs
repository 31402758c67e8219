//! The verbs, each inside one transaction.

use std::time::Duration;

use rusqlite::{OptionalExtension, Row};

use super::boot::{Boot, micros};
use super::database::{Transaction, failure};
use super::lifeline::{Life, LifelineId};
use crate::clock;
use crate::error::{Error, ErrorKind, Result};
use crate::types::{
    Acquired, Binding, Claim, ClaimId, FencingToken, Grant, Held, Holder, Name, Record, Released, Renewal,
};

/// How long a withdrawn claim is remembered, so that a request still under way creates nothing.
const TOMBSTONE: Duration = Duration::from_secs(3600);

/// The columns that [`Lock::read`] reads, in its order.
pub(super) const LOCK_COLUMNS: &str = "name, token, claim, boot, expires, lifeline, granted, record";

/// A row of the table of locks.
#[derive(Debug)]
pub(super) struct Lock {
    pub(super) name: Vec<u8>,
    pub(super) token: FencingToken,
    hold: Option<Hold>,
}

/// The part of the row that says who has it.
#[derive(Debug)]
pub(super) struct Hold {
    claim: ClaimId,
    boot: Vec<u8>,
    expires: i64,
    lifeline: Option<LifelineId>,
    granted: i64,
    record: String,
}

impl Lock {
    pub(super) fn read(row: &Row<'_>) -> rusqlite::Result<Self> {
        let claim: Option<[u8; 16]> = row.get(2)?;
        let hold = match claim {
            None => None,
            Some(claim) => Some(Hold {
                claim: ClaimId::from_bytes(claim),
                boot: row.get(3)?,
                expires: row.get(4)?,
                lifeline: row.get::<_, Option<Vec<u8>>>(5)?.as_deref().and_then(LifelineId::from_bytes),
                granted: row.get(6)?,
                record: row.get(7)?,
            }),
        };
        Ok(Self { name: row.get(0)?, token: FencingToken::new(row.get::<_, i64>(1)?.cast_unsigned()), hold })
    }

    /// The hold if it still counts: of this boot, not expired, its process not known to be dead.
    ///
    /// A process that lives is of this boot, whatever it was told: systemd-nspawn gives each container a boot id of its
    /// own. The clock is the kernel's, and so the same for both.
    pub(super) fn live(&self, boot: &Boot, now: i64, life: impl FnOnce(LifelineId) -> Life) -> Option<&Hold> {
        let hold = self.hold.as_ref().filter(|hold| hold.expires > now)?;
        let life = hold.lifeline.map_or(Life::Unknown, life);
        let counts = if hold.boot == boot.id() { life != Life::Dead } else { life == Life::Alive };
        counts.then_some(hold)
    }
}

impl Hold {
    fn remaining(&self, now: i64) -> Duration {
        Duration::from_micros(u64::try_from(self.expires.saturating_sub(now)).unwrap_or(0))
    }

    /// The hold as onlookers see it.
    pub(super) fn show(&self, token: FencingToken, now: i64) -> Holder {
        Holder {
            id: Some(self.claim),
            token: Some(token),
            remaining: Some(self.remaining(now)),
            since_unix_micros: u64::try_from(self.granted).ok(),
            record: Record::decode(self.record.as_bytes()),
            foreign: None,
        }
    }
}

impl Transaction<'_> {
    fn find(&self, name: &Name) -> Result<Option<Lock>> {
        const FIND: &str =
            "SELECT name, token, claim, boot, expires, lifeline, granted, record FROM locks WHERE name = ?1";
        self.connection
            .prepare_cached(FIND)
            .and_then(|mut statement| statement.query_row([name.as_bytes()], Lock::read).optional())
            .map_err(|e| failure("look a lock up", e))
    }

    fn live<'l>(&self, lock: &'l Lock) -> Option<&'l Hold> {
        lock.live(self.boot, self.now, |id| self.lifelines.life(id))
    }

    /// Remembers whether the hold of `name` is bound to our own lifeline.
    fn note(&mut self, name: &Name, hold: Option<&Hold>) {
        let own = self.lifelines.id();
        self.note_bound(name, hold.is_some_and(|hold| hold.lifeline == Some(own)));
    }

    fn note_bound(&mut self, name: &Name, bound: bool) {
        if bound {
            self.bound.insert(name.clone());
        } else {
            self.bound.remove(name);
        }
    }

    fn run(&self, doing: &str, sql: &str, values: impl rusqlite::Params) -> Result<usize> {
        self.connection
            .prepare_cached(sql)
            .and_then(|mut statement| statement.execute(values))
            .map_err(|e| failure(doing, e))
    }

    fn bound_to(&self, binding: Binding) -> Option<LifelineId> {
        match binding {
            Binding::Process => Some(self.lifelines.id()),
            Binding::Expiry => None,
        }
    }

    /// Presents a claim.
    pub(super) fn acquire(&mut self, claim: &Claim) -> Result<Acquired> {
        if self.is_withdrawn(claim.id)? {
            return Err(Error::new(ErrorKind::Rejected, "this claim was withdrawn")
                .for_name(&claim.name)
                .advise("claim the lock anew"));
        }
        let lock = self.find(&claim.name)?;
        if let Some(lock) = &lock
            && let Some(hold) = self.live(lock)
        {
            return Ok(if hold.claim == claim.id {
                let ttl = hold.remaining(self.now);
                Acquired::Granted(Grant { token: lock.token, ttl, session: 0 })
            } else {
                Acquired::Busy(hold.show(lock.token, self.now))
            });
        }
        let wall = u64::try_from(clock::wall().as_micros()).unwrap_or(u64::MAX);
        let token = next_token(lock.map(|lock| lock.token), wall)
            .ok_or_else(|| {
                Error::new(ErrorKind::Rejected, "the fencing tokens of this lock are used up")
                    .advise("the machine's clock is centuries ahead: set it right, and use another name")
            })
            .map_err(|e| e.for_name(&claim.name))?;
        self.run(
            "grant a lock",
            "INSERT INTO locks (name, token, claim, boot, expires, lifeline, granted, record) \
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8) \
             ON CONFLICT (name) DO UPDATE SET token = ?2, claim = ?3, boot = ?4, expires = ?5, lifeline = ?6, \
             granted = ?7, record = ?8",
            (
                claim.name.as_bytes(),
                token.get().cast_signed(),
                claim.id.as_bytes(),
                self.boot.id(),
                self.now.saturating_add(micros(claim.ttl)),
                self.bound_to(claim.binding).as_ref().map(LifelineId::as_bytes),
                wall.cast_signed(),
                &*claim.record,
            ),
        )?;
        self.note_bound(&claim.name, claim.binding == Binding::Process);
        Ok(Acquired::Granted(Grant { token, ttl: claim.ttl, session: 0 }))
    }

    /// Extends, or only confirms, one hold.
    pub(super) fn renew(&mut self, held: &Held) -> Result<Renewal> {
        let lock = self.find(&held.name)?;
        let live = lock.as_ref().and_then(|lock| self.live(lock));
        let granted = lock.as_ref().map(|lock| lock.token);
        let is_this_grant =
            |row: &&Hold| row.claim == held.id && (held.token.is_none() || held.token == granted);
        let Some(row) = live.filter(is_this_grant) else {
            self.note(&held.name, live);
            return Ok(Renewal::Lost);
        };
        let asked = held.extend.map_or(i64::MIN, |span| self.now.saturating_add(micros(span)));
        let expires = row.expires.max(asked);
        let lifeline = self.bound_to(held.binding);
        if expires != row.expires || lifeline != row.lifeline {
            self.run(
                "renew a lock",
                "UPDATE locks SET expires = ?2, lifeline = ?3 WHERE name = ?1",
                (held.name.as_bytes(), expires, lifeline.as_ref().map(LifelineId::as_bytes)),
            )?;
        }
        self.note_bound(&held.name, held.binding == Binding::Process);
        Ok(Renewal::Renewed(Duration::from_micros(expires.saturating_sub(self.now).unsigned_abs())))
    }

    /// Gives a lock back.
    pub(super) fn release(&mut self, held: &Held) -> Result<Released> {
        if held.suspect {
            self.run(
                "remember a withdrawn claim",
                "INSERT OR REPLACE INTO withdrawn (claim, boot, until) VALUES (?1, ?2, ?3)",
                (held.id.as_bytes(), self.boot.id(), self.now.saturating_add(micros(TOMBSTONE))),
            )?;
        }
        let Some(lock) = self.find(&held.name)? else { return Ok(Released::NotHeld) };
        let live = self.live(&lock);
        let answer = match live {
            None => Released::NotHeld,
            Some(row) if row.claim == held.id => Released::Released,
            Some(_) => {
                self.note(&held.name, live);
                return Ok(Released::HeldByOther);
            }
        };
        self.note_bound(&held.name, false);
        self.run(
            "release a lock",
            "UPDATE locks SET claim = NULL, lifeline = NULL, record = NULL WHERE name = ?1 AND claim = ?2",
            (held.name.as_bytes(), held.id.as_bytes()),
        )?;
        Ok(answer)
    }

    fn is_withdrawn(&self, id: ClaimId) -> Result<bool> {
        self.connection
            .prepare_cached(
                "SELECT EXISTS(SELECT 1 FROM withdrawn WHERE claim = ?1 AND boot = ?2 AND until > ?3)",
            )
            .and_then(|mut statement| {
                statement.query_row((id.as_bytes(), self.boot.id(), self.now), |row| row.get(0))
            })
            .map_err(|e| failure("look a claim up", e))
    }
}

/// The token after `last`: larger, and at least the wall clock in microseconds. So a counter that was lost or set back
/// (a power cut, an old backup) is overtaken, and a clock that went back lowers nothing. `None` past 2^53.
fn next_token(last: Option<FencingToken>, wall_micros: u64) -> Option<FencingToken> {
    let after_last = last.map_or(1, |last| last.get().saturating_add(1));
    let token = after_last.max(wall_micros);
    (token <= FencingToken::MAX).then(|| FencingToken::new(token))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_larger_than_the_last_and_not_before_the_clock() {
        let token =
            |last: Option<u64>, wall| next_token(last.map(FencingToken::new), wall).map(FencingToken::get);
        assert_eq!(token(None, 1_000), Some(1_000));
        assert_eq!(token(Some(5), 1_000), Some(1_000));
        assert_eq!(token(Some(1_000), 1_000), Some(1_001));
        assert_eq!(token(Some(9_000), 1_000), Some(9_001), "the clock went back");
        assert_eq!(token(None, 0), Some(1));
        assert_eq!(token(Some(FencingToken::MAX - 1), 0), Some(FencingToken::MAX));
        assert_eq!(token(Some(FencingToken::MAX), 0), None);
        assert_eq!(token(None, u64::MAX), None);
    }
}
