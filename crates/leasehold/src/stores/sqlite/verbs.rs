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
    ballot_over,
};

/// How long a withdrawn claim is remembered, so that a request still under way creates nothing.
const TOMBSTONE: Duration = Duration::from_secs(3600);

/// The columns that [`Lock::read`] reads, in its order.
pub(super) const LOCK_COLUMNS: &str =
    "name, token, claim, boot, expires, lifeline, granted, record, line, spare";

/// A row of the table of locks.
#[derive(Debug)]
pub(super) struct Lock {
    pub(super) name: Vec<u8>,
    /// The last token of the last grant.
    pub(super) token: FencingToken,
    /// Whether somebody may stand in line.
    pub(super) line: bool,
    hold: Option<Hold>,
}

/// The part of the row that says who has it.
#[derive(Debug)]
pub(super) struct Hold {
    pub(super) claim: ClaimId,
    /// The first token of the grant.
    pub(super) token: FencingToken,
    boot: Vec<u8>,
    pub(super) expires: i64,
    pub(super) lifeline: Option<LifelineId>,
    granted: i64,
    record: String,
}

/// What a grant gives, and to whom.
#[derive(Debug)]
pub(super) struct Award<'a> {
    pub(super) claim: ClaimId,
    pub(super) ttl: Duration,
    /// The process that it is bound to.
    pub(super) lifeline: Option<LifelineId>,
    pub(super) tokens: u32,
    /// The token that the claim proposes, if it is to be taken.
    pub(super) ballot: Option<FencingToken>,
    pub(super) record: &'a str,
    /// Whether somebody may stand in line still.
    pub(super) line: bool,
}

impl Lock {
    pub(super) fn read(row: &Row<'_>) -> rusqlite::Result<Self> {
        let claim: Option<[u8; 16]> = row.get(2)?;
        let token = row.get::<_, i64>(1)?.cast_unsigned();
        let hold = match claim {
            None => None,
            Some(claim) => Some(Hold {
                claim: ClaimId::from_bytes(claim),
                token: FencingToken::new(token.saturating_sub(row.get::<_, i64>(9)?.cast_unsigned())),
                boot: row.get(3)?,
                expires: row.get(4)?,
                lifeline: row.get::<_, Option<Vec<u8>>>(5)?.as_deref().and_then(LifelineId::from_bytes),
                granted: row.get(6)?,
                record: row.get(7)?,
            }),
        };
        Ok(Self { name: row.get(0)?, token: FencingToken::new(token), line: row.get(8)?, hold })
    }

    /// The hold if it still counts: of this boot, not expired, its process not known to be dead.
    ///
    /// A process that lives is of this boot, whatever it was told: systemd-nspawn gives each container a boot id of its
    /// own. The clock is the kernel's, and so the same for both.
    pub(super) fn live(&self, boot: &Boot, now: i64, life: impl FnOnce(LifelineId) -> Life) -> Option<&Hold> {
        self.hold.as_ref().filter(|hold| hold.counts(boot, now, life))
    }

    /// The same hold, for keeps.
    pub(super) fn into_live(
        self,
        boot: &Boot,
        now: i64,
        life: impl FnOnce(LifelineId) -> Life,
    ) -> Option<Hold> {
        self.hold.filter(|hold| hold.counts(boot, now, life))
    }
}

impl Hold {
    fn counts(&self, boot: &Boot, now: i64, life: impl FnOnce(LifelineId) -> Life) -> bool {
        if self.expires <= now {
            return false;
        }
        let life = self.lifeline.map_or(Life::Unknown, life);
        if self.boot == boot.id() { life != Life::Dead } else { life == Life::Alive }
    }

    pub(super) fn remaining(&self, now: i64) -> Duration {
        Duration::from_micros(u64::try_from(self.expires.saturating_sub(now)).unwrap_or(0))
    }

    /// The hold as onlookers see it.
    pub(super) fn show(&self, now: i64) -> Holder {
        Holder {
            id: Some(self.claim),
            token: Some(self.token),
            remaining: Some(self.remaining(now)),
            since_unix_micros: u64::try_from(self.granted).ok(),
            record: Record::decode(self.record.as_bytes()),
            foreign: None,
        }
    }
}

impl Transaction<'_> {
    pub(super) fn find(&self, name: &Name) -> Result<Option<Lock>> {
        const FIND: &str = "SELECT name, token, claim, boot, expires, lifeline, granted, record, line, spare \
             FROM locks WHERE name = ?1";
        self.connection
            .prepare_cached(FIND)
            .and_then(|mut statement| statement.query_row([name.as_bytes()], Lock::read).optional())
            .map_err(|e| failure("look a lock up", e))
    }

    pub(super) fn live<'l>(&self, lock: &'l Lock) -> Option<&'l Hold> {
        lock.live(self.boot, self.now, |id| self.lifelines.life(id))
    }

    /// Remembers whether the hold of `name` is bound to our own lifeline.
    fn note(&mut self, name: &Name, hold: Option<&Hold>) {
        let own = self.lifelines.id();
        self.note_bound(name, hold.is_some_and(|hold| hold.lifeline == Some(own)));
    }

    pub(super) fn note_bound(&mut self, name: &Name, bound: bool) {
        if bound {
            self.bound.insert(name.clone());
        } else {
            self.bound.remove(name);
        }
    }

    pub(super) fn run(&self, doing: &str, sql: &str, values: impl rusqlite::Params) -> Result<usize> {
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

    /// Presents a claim. A lock whose hold has ended goes to the first in line, whoever asks.
    pub(super) fn acquire(&mut self, claim: &Claim) -> Result<Acquired> {
        if self.is_withdrawn(claim.id)? {
            return Err(Error::new(ErrorKind::Rejected, "this claim was withdrawn")
                .for_name(&claim.name)
                .advise("claim the lock anew"));
        }
        let lock = loop {
            let lock = self.find(&claim.name)?;
            let Some(row) = &lock else { break None };
            if let Some(hold) = self.live(row) {
                if hold.claim == claim.id {
                    let ttl = hold.remaining(self.now);
                    let token = self.raised(claim, row.token)?.unwrap_or(hold.token);
                    return Ok(Acquired::Granted(Grant { token, ttl, session: 0 }));
                }
                let holder = hold.show(self.now);
                return if claim.queue {
                    self.line_up(claim, row, holder)
                } else {
                    Ok(Acquired::Busy(holder))
                };
            }
            // Nobody comes before those who wait.
            if !row.line || !self.advance(&claim.name, Some(row.token), Some(claim))? {
                break lock;
            }
        };
        let award = Award {
            claim: claim.id,
            ttl: claim.ttl,
            lifeline: self.bound_to(claim.binding),
            tokens: claim.tokens,
            ballot: ballot_over(claim, lock.as_ref().map_or(0, |lock| lock.token.get()), clock::wall()),
            record: &claim.record,
            line: false,
        };
        let token = self.grant(&claim.name, lock.map(|lock| lock.token), &award)?;
        Ok(Acquired::Granted(Grant { token, ttl: claim.ttl, session: 0 }))
    }

    /// Makes what the claim proposes the token of its hold, if it is larger than `last`.
    fn raised(&self, claim: &Claim, last: FencingToken) -> Result<Option<FencingToken>> {
        let Some(ballot) = ballot_over(claim, last.get(), clock::wall()) else { return Ok(None) };
        let spare = u64::from(claim.tokens.max(1)) - 1;
        let sql = "UPDATE locks SET token = ?2, spare = ?3 WHERE name = ?1";
        let values = (claim.name.as_bytes(), (ballot.get() + spare).cast_signed(), spare.cast_signed());
        self.run("raise a lock's token", sql, values)?;
        Ok(Some(ballot))
    }

    /// Writes a hold, whatever stood there; gives its first token.
    pub(super) fn grant(
        &mut self,
        name: &Name,
        last: Option<FencingToken>,
        award: &Award<'_>,
    ) -> Result<FencingToken> {
        let wall = u64::try_from(clock::wall().as_micros()).unwrap_or(u64::MAX);
        let spare = u64::from(award.tokens.max(1)) - 1;
        let token = award.ballot.or_else(|| next_token(last, wall, spare)).ok_or_else(|| {
            Error::new(ErrorKind::Rejected, "the fencing tokens of this lock are used up")
                .advise("the machine's clock is centuries ahead: set it right, and use another name")
                .for_name(name)
        })?;
        self.run(
            "grant a lock",
            "INSERT INTO locks (name, token, claim, boot, expires, lifeline, granted, record, line, spare) \
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10) \
             ON CONFLICT (name) DO UPDATE SET token = ?2, claim = ?3, boot = ?4, expires = ?5, lifeline = ?6, \
             granted = ?7, record = ?8, line = ?9, spare = ?10",
            (
                name.as_bytes(),
                (token.get() + spare).cast_signed(),
                award.claim.as_bytes(),
                self.boot.id(),
                self.now.saturating_add(micros(award.ttl)),
                award.lifeline.as_ref().map(LifelineId::as_bytes),
                wall.cast_signed(),
                award.record,
                award.line,
                spare.cast_signed(),
            ),
        )?;
        self.note_bound(name, award.lifeline == Some(self.lifelines.id()));
        Ok(token)
    }

    /// Extends, or only confirms, one hold.
    pub(super) fn renew(&mut self, held: &Held) -> Result<Renewal> {
        let lock = self.find(&held.name)?;
        let live = lock.as_ref().and_then(|lock| self.live(lock));
        let is_this_grant =
            |row: &&Hold| row.claim == held.id && held.token.is_none_or(|token| token == row.token);
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
        if held.waiting {
            self.leave_line(&held.name, held.id)?;
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
        if lock.line {
            if !self.advance(&held.name, Some(lock.token), None)? {
                self.clear(&held.name)?;
            }
            return Ok(answer);
        }
        self.run(
            "release a lock",
            "UPDATE locks SET claim = NULL, lifeline = NULL, record = NULL WHERE name = ?1 AND claim = ?2",
            (held.name.as_bytes(), held.id.as_bytes()),
        )?;
        Ok(answer)
    }

    /// Writes down that nobody holds a lock and nobody stands in line.
    pub(super) fn clear(&self, name: &Name) -> Result<()> {
        let sql = "UPDATE locks SET claim = NULL, lifeline = NULL, record = NULL, line = 0 WHERE name = ?1";
        self.run("free a lock", sql, [name.as_bytes()])?;
        Ok(())
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

/// The first token after `last`, so that `spare` more fit after it: larger, and at least the wall clock in microseconds. So a
/// counter that was lost or set back (a power cut, an old backup) is overtaken, and a clock that went back lowers nothing.
/// `None` past 2^53.
fn next_token(last: Option<FencingToken>, wall_micros: u64, spare: u64) -> Option<FencingToken> {
    let after_last = last.map_or(1, |last| last.get().saturating_add(1));
    let token = after_last.max(wall_micros);
    (token.saturating_add(spare) <= FencingToken::MAX).then(|| FencingToken::new(token))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_larger_than_the_last_and_not_before_the_clock() {
        let token =
            |last: Option<u64>, wall| next_token(last.map(FencingToken::new), wall, 0).map(FencingToken::get);
        assert_eq!(token(None, 1_000), Some(1_000));
        assert_eq!(token(Some(5), 1_000), Some(1_000));
        assert_eq!(token(Some(1_000), 1_000), Some(1_001));
        assert_eq!(token(Some(9_000), 1_000), Some(9_001), "the clock went back");
        assert_eq!(token(None, 0), Some(1));
        assert_eq!(token(Some(FencingToken::MAX - 1), 0), Some(FencingToken::MAX));
        assert_eq!(token(Some(FencingToken::MAX), 0), None);
        assert_eq!(token(None, u64::MAX), None);
        let last = Some(FencingToken::new(FencingToken::MAX - 3));
        assert_eq!(next_token(last, 0, 2).map(FencingToken::get), Some(FencingToken::MAX - 2));
        assert_eq!(next_token(last, 0, 3), None, "a block that does not fit");
    }
}
