//! The open database of one store: its connection, the gate before it, and one transaction per verb.

use std::collections::HashSet;
use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use rusqlite::{Connection, ErrorCode, OptionalExtension};

use super::boot::{Boot, micros};
use super::files::Identity;
use super::lifeline::{LifelineId, Lifelines};
use super::line::Handed;
use super::room::Room;
use super::rounds::Rounds;
use crate::clock;
use crate::error::{Error, ErrorKind, Result};
use crate::types::Name;

/// How long a name's last token is kept after its grant. Older ones are overtaken by the wall clock anyway.
const TOKEN_RETENTION: Duration = Duration::from_secs(24 * 3600);
/// How many transactions pass between two steps of cleaning up, and how many rows one step looks at.
const TIDY_EVERY: u32 = 256;
const TIDY_STEP: i64 = 128;
/// The most steps that an opening does to clear the dead away: a millisecond or two.
const SWEEP_STEPS: usize = 32;

/// What a worker thread works with.
#[derive(Debug)]
pub(super) struct Database {
    pub(super) connection: Connection,
    pub(super) path: PathBuf,
    pub(super) location: Arc<str>,
    pub(super) boot: Boot,
    pub(super) lifelines: Lifelines,
    gate: File,
    identity: Identity,
    entered: bool,
    transactions: u32,
    /// Where the last step of cleaning up stopped.
    tidied_to: Vec<u8>,
    /// Processes whose holds this round of cleaning up clears, and then their files.
    doomed: Vec<LifelineId>,
    /// Locks bound to our own lifeline, as far as we know: while there are none its file can go.
    pub(super) bound: HashSet<Name>,
    /// Handed on by the transaction under way.
    handed: Vec<Handed>,
    /// Those who wait through this store, and what is done for them.
    pub(super) room: Arc<Room>,
    pub(super) rounds: Rounds,
}

/// What a verb sees inside its transaction.
#[derive(Debug)]
pub(super) struct Transaction<'a> {
    pub(super) connection: &'a Connection,
    pub(super) boot: &'a Boot,
    pub(super) lifelines: &'a Lifelines,
    /// Microseconds of the boot-time clock when it began.
    pub(super) now: i64,
    /// Locks bound to our own lifeline.
    pub(super) bound: &'a mut HashSet<Name>,
    /// Those who wait through our own store.
    pub(super) room: &'a Room,
    /// What was handed on, to be told after the commit.
    pub(super) handed: &'a mut Vec<Handed>,
}

impl Database {
    /// Puts the parts together; `gate` is open and not locked.
    pub(super) fn new(
        connection: Connection,
        path: PathBuf,
        location: Arc<str>,
        boot: Boot,
        lifelines: Lifelines,
        gate: File,
    ) -> Self {
        let identity = Identity::note(&path);
        Self {
            connection,
            path,
            location,
            boot,
            lifelines,
            gate,
            identity,
            entered: false,
            transactions: 0,
            tidied_to: Vec::new(),
            doomed: Vec::new(),
            bound: HashSet::new(),
            handed: Vec::new(),
            room: Arc::default(),
            rounds: Rounds::default(),
        }
    }

    /// Fails if the files are no longer those that were opened.
    pub(super) fn verify(&self) -> Result<()> {
        self.identity.verify().map_err(|e| e.on_store(&self.location))
    }

    /// Takes this process's turn at the gate, unless it has it.
    ///
    /// SQLite's own lock is a race of sleepers that one of eight processes can lose for seconds; the kernel hands a file
    /// lock on to who waits.
    pub(super) fn enter(&mut self) -> Result<()> {
        if self.entered {
            return Ok(());
        }
        while let Err(error) = self.gate.lock() {
            // A signal handler of the program may interrupt the wait.
            if error.kind() != std::io::ErrorKind::Interrupted {
                return Err(Error::new(
                    ErrorKind::Unavailable,
                    "the gate of the lock database cannot be passed",
                )
                .caused_by(error)
                .on_store(&self.location));
            }
        }
        self.entered = true;
        Ok(())
    }

    /// Ends this process's turn, if it has it.
    pub(super) fn leave(&mut self) {
        if !self.entered {
            return;
        }
        if self.transactions >= TIDY_EVERY {
            self.transactions = 0;
            // Cleaning up is nobody's request: if it cannot be done now, it is done another time.
            let _ = self.tidy();
        }
        self.entered = false;
        // Cannot fail for an open file; were it to, closing the file at the end frees the gate.
        let _ = self.gate.unlock();
    }

    /// Runs `work` in a transaction of its own: all of it is done, or nothing.
    pub(super) fn transaction<T>(
        &mut self,
        work: impl FnOnce(&mut Transaction<'_>) -> Result<T>,
    ) -> Result<T> {
        self.enter()?;
        self.verify()?;
        self.transactions += 1;
        execute(&self.connection, "BEGIN IMMEDIATE").map_err(|e| e.on_store(&self.location))?;
        let mut transaction = Transaction {
            connection: &self.connection,
            boot: &self.boot,
            lifelines: &self.lifelines,
            now: self.boot.now(),
            bound: &mut self.bound,
            room: &self.room,
            handed: &mut self.handed,
        };
        let done = work(&mut transaction);
        let done = done.and_then(|out| execute(&self.connection, "COMMIT").map(|()| out));
        if done.is_err() && !self.connection.is_autocommit() {
            // If this fails too the next BEGIN says so.
            let _ = execute(&self.connection, "ROLLBACK");
        }
        let handed = std::mem::take(&mut self.handed);
        if done.is_ok() && !handed.is_empty() {
            self.ring(handed);
        }
        done.map_err(|e| e.on_store(&self.location))
    }

    /// One step of a round through all names: forgets old tokens and tombstones, and clears the dead away.
    ///
    /// The dead are looked for at the beginning of a round only, so that at its end no row of theirs is left.
    fn tidy(&mut self) -> Result<()> {
        let after = std::mem::take(&mut self.tidied_to);
        if after.is_empty() {
            self.doomed = self.lifelines.dead();
        }
        let doomed = std::mem::take(&mut self.doomed);
        let oldest = micros(clock::wall().saturating_sub(TOKEN_RETENTION));
        // If it fails, the round ends here and buries nobody.
        self.tidied_to = self.transaction(|transaction| transaction.tidy(&after, oldest, &doomed))?;
        if self.tidied_to.is_empty() {
            for id in doomed {
                self.lifelines.bury(id);
            }
        } else {
            self.doomed = doomed;
        }
        Ok(())
    }

    /// Clears the dead away, as far as some steps go; the rest is done between requests. For the opening.
    pub(super) fn sweep(&mut self) {
        if self.enter().is_err() {
            // The first request meets the same error and reports it.
            return;
        }
        for _ in 0..SWEEP_STEPS {
            if self.tidy().is_err() || self.doomed.is_empty() {
                break;
            }
        }
        self.leave();
    }

    /// Leaves nothing behind that can be cleared away: called at the end of the store.
    pub(super) fn retire(&mut self) {
        if !self.stop_waiting() {
            return;
        }
        // What is bound to it may be kept by a child; whoever finds all of them dead clears it away.
        if self.bound.is_empty() {
            self.lifelines.bury(self.lifelines.id());
        }
    }
}

impl Transaction<'_> {
    /// One step of cleaning up, from the name `after` on; says where the next one begins.
    ///
    /// A token is at least the wall clock of its grant in microseconds, so it tells its own age, and a token made anew
    /// after it was forgotten is larger.
    fn tidy(&mut self, after: &[u8], oldest: i64, doomed: &[LifelineId]) -> Result<Vec<u8>> {
        if after.is_empty() {
            for id in doomed {
                self.forget_waiters(*id)?;
            }
        }
        let (last, waited_for) =
            self.tidy_locks(after, oldest, doomed).map_err(|e| failure("clean up", e))?;
        for name in waited_for.iter().filter_map(|name| Name::new(name).ok()) {
            self.hand_on(&name)?;
        }
        Ok(last)
    }

    /// The part of a step that looks at no line; gives the name where it ended, and the locks for which somebody waits.
    fn tidy_locks(
        &self,
        after: &[u8],
        oldest: i64,
        doomed: &[LifelineId],
    ) -> rusqlite::Result<(Vec<u8>, Vec<Vec<u8>>)> {
        let last: Option<Vec<u8>> = self
            .connection
            .prepare_cached(
                "SELECT name FROM (SELECT name FROM locks WHERE name > ?1 ORDER BY name LIMIT ?2) \
                 ORDER BY name DESC LIMIT 1",
            )?
            .query_row((after, TIDY_STEP), |row| row.get(0))
            .optional()?;
        let mut waited_for = Vec::new();
        if let Some(last) = &last {
            for id in doomed {
                self.connection
                    .prepare_cached(
                        "UPDATE locks SET claim = NULL, lifeline = NULL, record = NULL \
                         WHERE name > ?1 AND name <= ?2 AND lifeline = ?3 AND line = 0",
                    )?
                    .execute((after, last, id.as_bytes()))?;
            }
            waited_for = self
                .connection
                .prepare_cached("SELECT name FROM locks WHERE name > ?1 AND name <= ?2 AND line <> 0")?
                .query_map((after, last), |row| row.get(0))?
                .collect::<rusqlite::Result<_>>()?;
            self.connection
                .prepare_cached(
                    "DELETE FROM locks WHERE name > ?1 AND name <= ?2 AND token < ?3 AND line = 0 \
                     AND (claim IS NULL OR expires <= ?5 OR (boot <> ?4 AND lifeline IS NULL))",
                )?
                .execute((after, last, oldest, self.boot.id(), self.now))?;
        }
        self.connection
            .prepare_cached(
                "DELETE FROM withdrawn WHERE claim IN \
                 (SELECT claim FROM withdrawn WHERE boot <> ?1 OR until <= ?2 LIMIT ?3)",
            )?
            .execute((self.boot.id(), self.now, TIDY_STEP))?;
        Ok((last.unwrap_or_default(), waited_for))
    }
}

pub(super) fn execute(connection: &Connection, sql: &str) -> Result<()> {
    connection
        .prepare_cached(sql)
        .and_then(|mut statement| statement.execute([]))
        .map(drop)
        .map_err(|e| failure("run a transaction", e))
}

/// An error of SQLite as the caller should take it.
pub(super) fn failure(doing: &str, source: rusqlite::Error) -> Error {
    use ErrorKind::{Rejected, Unavailable, Unknown};
    let (kind, advice) = match source.sqlite_error_code() {
        Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked) => {
            (Unavailable, "another program has the lock database open and locked")
        }
        Some(ErrorCode::OutOfMemory) => (Unavailable, "the machine is out of memory"),
        Some(ErrorCode::DiskFull) => (Rejected, "the disk is full: free some space"),
        Some(ErrorCode::ReadOnly | ErrorCode::PermissionDenied | ErrorCode::CannotOpen) => {
            (Rejected, "the database, its folder and the files beside it must be writable")
        }
        Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase) => (
            Rejected,
            "the file is damaged or no database: stop the programs that use it, move it away with the files beside it, \
             and a new one is made",
        ),
        Some(ErrorCode::SystemIoFailure) => (Unknown, "the disk or file system failed: see the system's log"),
        _ => (Rejected, "this is a fault of Leasehold or of the file"),
    };
    Error::new(kind, format!("the lock database failed to {doing}")).caused_by(source).advise(advice)
}
