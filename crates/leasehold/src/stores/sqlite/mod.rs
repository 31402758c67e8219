//! The embedded store: one SQLite file, for many processes on one machine, with no server.
//!
//! What it promises and what it does not stands in `docs/sqlite.md`. Inside: `worker` is the thread that does the
//! blocking work, `database` gives each verb one transaction behind the gate, `verbs` and `inspect` are what is done in
//! it, `line` is who waits and to whom a lock is handed on, `room` and `rounds` are what a process does for its own waiters,
//! `bell` is how another process wakes them, `lifeline` tells who is dead, `open` and `files` refuse what is no database of
//! ours.

mod bell;
mod boot;
mod database;
mod diagnose;
mod files;
mod inspect;
mod lifeline;
mod line;
mod open;
mod room;
mod rounds;
mod verbs;
mod worker;

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;

use crate::clock;
use crate::error::{Error, ErrorKind, Result};
use crate::store::{Store, Woken};
use crate::types::{
    Acquired, Claim, Fencing, Finding, Guarantees, Held, LockView, Page, Persistence, Query, Released,
    Renewal, Severity, Ticket,
};
use room::Room;
use worker::Worker;

/// How many locks one transaction renews; more take several, so that other processes get their turn between.
const RENEWALS_PER_TRANSACTION: usize = 64;
/// How long an operator's look waits before it says that nobody answers.
const DIAGNOSE_TIMEOUT: Duration = Duration::from_secs(5);

/// How the database is opened.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Options {
    /// Whether to make the database and its folder if they are not there. Default: yes.
    pub create: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self { create: true }
    }
}

impl Options {
    /// The same options, making what is not there or not.
    #[must_use]
    pub fn with_create(mut self, create: bool) -> Self {
        self.create = create;
        self
    }
}

/// The file that all programs of this user on this machine share unless told otherwise:
/// `~/.local/state/leasehold/locks.db`.
///
/// `XDG_STATE_HOME` is not looked at, on purpose: it is set in a desktop's shell and not in a cron job, and the two
/// must meet in one file.
///
/// # Errors
/// `Rejected` if there is no home folder, or `HOME` is not an absolute path.
pub fn default_path() -> Result<PathBuf> {
    match std::env::home_dir() {
        // A relative one would be another database in every folder.
        Some(home) if home.is_absolute() => Ok(home.join(".local/state/leasehold/locks.db")),
        _ => Err(Error::new(ErrorKind::Rejected, "this user has no home folder for the lock database")
            .advise("set HOME, or give the path: sqlite:/path/to/locks.db")),
    }
}

/// Locks in an SQLite file on this machine.
///
/// Each store has one thread, one connection and one lifeline file. Locks that were taken through it pass on at once
/// when it is dropped or its process dies, unless a child inherited [`lifeline`](Store::lifeline) or the claim is bound
/// to nothing.
#[derive(Debug)]
pub struct SqliteStore {
    worker: Worker,
    location: Arc<str>,
    guarantees: Guarantees,
    lifeline: Arc<File>,
    room: Arc<Room>,
}

impl SqliteStore {
    /// Opens the database, making it and its folder if they are not there. Blocks for some milliseconds; call it from a
    /// blocking thread if that matters.
    ///
    /// # Errors
    /// `Rejected`, with what to do, if the path leads to a folder, another program's file, a damaged one or one of a
    /// newer version, to a network file system, or nothing can be written there; what is there is left as it is.
    /// `Unsupported` without `/proc`.
    pub fn open(path: &Path, options: &Options) -> Result<Self> {
        let (worker, (location, lifeline, room)) =
            Worker::start(path.to_owned(), options.clone(), |database| {
                (database.location.clone(), database.lifelines.file(), database.room.clone())
            })?;
        Ok(Self { worker, location, guarantees: guarantees(), lifeline, room })
    }

    fn check_ttl(&self, ttl: Duration) -> Result<()> {
        let Guarantees { least_ttl, most_ttl, .. } = self.guarantees;
        if (least_ttl..=most_ttl).contains(&ttl) {
            return Ok(());
        }
        Err(Error::invalid(format!(
            "a TTL of {ttl:?} is not within the {} ms to {} days that this store takes",
            least_ttl.as_millis(),
            most_ttl.as_secs() / (24 * 3600)
        ))
        .on_store(&self.location))
    }

    async fn renew_some(&self, held: Vec<Held>) -> Vec<Result<Renewal>> {
        let count = held.len();
        let done = self.worker.transact(move |database| {
            database.transaction(|transaction| held.iter().map(|held| transaction.renew(held)).collect())
        });
        let renewals: Result<Vec<Renewal>> = done.await;
        match renewals {
            Ok(renewals) => renewals.into_iter().map(Ok).collect(),
            Err(error) if error.kind() == ErrorKind::Rejected && self.is_elsewhere().await => {
                // Nobody else can see what stands in the file that we have open: another may hold the lock already.
                vec![Ok(Renewal::Lost); count]
            }
            Err(error) => vec![Err(error); count],
        }
    }

    /// Whether the path leads to another database by now, or to none.
    async fn is_elsewhere(&self) -> bool {
        self.worker.look(|database| database.verify().is_err()).await.unwrap_or(false)
    }
}

fn guarantees() -> Guarantees {
    let mut guarantees = Guarantees::strict(format!("SQLite {}", rusqlite::version()));
    guarantees.fencing = Fencing::TimeFloor;
    guarantees.fifo = true;
    // Synchronous NORMAL: a killed process loses nothing, a power cut may lose the last moments.
    guarantees.persistence = Persistence::Log;
    guarantees.frees_at_process_death = true;
    guarantees.slack = Duration::from_millis(1);
    guarantees.least_ttl = Duration::from_millis(10);
    guarantees.most_ttl = Duration::from_secs(366 * 24 * 3600);
    guarantees
}

#[async_trait]
impl Store for SqliteStore {
    async fn acquire(&self, claim: &Claim) -> Result<Acquired> {
        self.check_ttl(claim.ttl).map_err(|e| e.for_name(&claim.name))?;
        let (asked, sent) = (claim.clone(), clock::look());
        self.worker.transact(move |database| database.acquire(&asked, sent)).await
    }

    async fn woken(&self, ticket: &Ticket) -> Woken {
        self.room.woken(ticket).await
    }

    async fn renew(&self, held: &[Held]) -> Vec<Result<Renewal>> {
        let mut answers: Vec<Option<Result<Renewal>>> = held
            .iter()
            .map(|held| {
                held.extend.and_then(|ttl| self.check_ttl(ttl).err()).map(|e| Err(e.for_name(&held.name)))
            })
            .collect();
        let open: Vec<usize> = (0..held.len()).filter(|index| answers[*index].is_none()).collect();
        for indexes in open.chunks(RENEWALS_PER_TRANSACTION) {
            let some = indexes.iter().map(|index| held[*index].clone()).collect();
            for (index, answer) in indexes.iter().zip(self.renew_some(some).await) {
                answers[*index] = Some(answer);
            }
        }
        answers.into_iter().flatten().collect()
    }

    async fn release(&self, held: &Held) -> Result<Released> {
        let held = held.clone();
        self.worker.transact(move |database| database.release(&held)).await
    }

    async fn inspect(&self, query: &Query) -> Result<Page<LockView>> {
        let query = query.clone();
        self.worker.look(move |database| inspect::inspect(database, &query)).await?
    }

    fn guarantees(&self) -> Guarantees {
        self.guarantees.clone()
    }

    fn location(&self) -> Arc<str> {
        self.location.clone()
    }

    async fn diagnose(&self) -> Vec<Finding> {
        let asked = clock::now();
        let deadline = asked.plus(DIAGNOSE_TIMEOUT);
        let empty = self.worker.transact(|database| database.transaction(|_| Ok(())));
        let Some(answer) = clock::timeout_at(deadline, empty).await else {
            return vec![diagnose::round_trip(None)];
        };
        let took = clock::now().since(asked);
        let mut findings = self.worker.look(diagnose::diagnose).await.unwrap_or_default();
        findings.push(match answer {
            Ok(()) => diagnose::round_trip(Some(took)),
            Err(error) => Finding::new(
                "round trip",
                Severity::Failure,
                error.to_string(),
                "requests for locks fail like this",
            ),
        });
        findings
    }

    fn lifeline(&self) -> Option<Arc<File>> {
        Some(self.lifeline.clone())
    }
}
