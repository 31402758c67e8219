//! Opening: recognises a database of ours, makes a new one, and refuses everything else without touching it.

use std::fs;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rusqlite::{Connection, OpenFlags};

use super::boot::Boot;
use super::database::{Database, failure};
use super::lifeline::Lifelines;
use super::{Options, files};
use crate::error::{Error, ErrorKind, Result};

/// `LsHd` in the header says that the file is ours.
const APPLICATION_ID: i32 = i32::from_be_bytes(*b"LsHd");
/// The version of the schema below, both parts together.
const SCHEMA_VERSION: i32 = 2;
/// The first version: without a line of waiters. It is brought up to date in place when it is opened.
const FIRST_VERSION: i32 = 1;

/// The first part of the schema. One row a name: who holds it, and the last token, which stays after the hold.
///
/// `expires` is in microseconds of the boot-time clock and means something in the boot `boot` only; `granted` is the
/// wall clock in microseconds, for display. A hold that is bound to no process has no `lifeline`. There is no index but
/// the names: one on `lifeline`, to find what a dead process held, more than halved the throughput.
const SCHEMA: &str = "
    CREATE TABLE locks (
        name BLOB NOT NULL PRIMARY KEY,
        token INTEGER NOT NULL,
        claim BLOB,
        boot BLOB,
        expires INTEGER,
        lifeline BLOB,
        granted INTEGER,
        record TEXT
    ) STRICT, WITHOUT ROWID;
    CREATE TABLE withdrawn (
        claim BLOB NOT NULL PRIMARY KEY,
        boot BLOB NOT NULL,
        until INTEGER NOT NULL
    ) STRICT, WITHOUT ROWID;
";

/// The second part of the schema: the waiters.
///
/// `locks.line` says whether somebody may stand in line, so that a lock for which nobody waits costs no look at the line;
/// `locks.spare` is how many tokens of the last grant come after its first. The order of `seq` is the order of arrival;
/// `queue.lifeline` is the process that waits, `bound` whether the grant is to be bound to it. `waiting` says when a process
/// was last heard of, by the boot-time clock: one row for all its waiters.
///
/// A program that knows the first part only goes on working with the file: it looks at no line, and so may come before its
/// turn, but excludes and is excluded.
const LINE: &str = "
    ALTER TABLE locks ADD COLUMN line INTEGER NOT NULL DEFAULT 0;
    ALTER TABLE locks ADD COLUMN spare INTEGER NOT NULL DEFAULT 0;
    CREATE TABLE queue (
        seq INTEGER PRIMARY KEY,
        name BLOB NOT NULL,
        claim BLOB NOT NULL,
        lifeline BLOB NOT NULL,
        bound INTEGER NOT NULL,
        ttl INTEGER NOT NULL,
        tokens INTEGER NOT NULL,
        since INTEGER NOT NULL,
        record TEXT NOT NULL
    ) STRICT;
    CREATE UNIQUE INDEX queue_claim ON queue (name, claim);
    CREATE INDEX queue_order ON queue (name, seq);
    CREATE INDEX queue_lifeline ON queue (lifeline);
    CREATE TABLE waiting (
        lifeline BLOB NOT NULL PRIMARY KEY,
        boot BLOB NOT NULL,
        heard INTEGER NOT NULL
    ) STRICT, WITHOUT ROWID;
";

/// How long a verb waits for a program that locks the database without passing the gate (the `sqlite3` shell).
const BUSY_TIMEOUT: Duration = Duration::from_secs(2);
/// Databases up to this many pages (1 MiB) are read through at opening: it takes about a millisecond.
const CHECKED_PAGES: i64 = 256;
/// What a log that a burst made long is cut back to, in bytes.
const LOG_LIMIT: i64 = 8 << 20;

/// Opens the database, blocking. One at a time in a process.
pub(super) fn open(path: &Path, options: &Options) -> Result<Database> {
    static OPENING: Mutex<()> = Mutex::new(());
    let _one_at_a_time = OPENING.lock().unwrap_or_else(PoisonError::into_inner);

    let boot = Boot::read()?;
    let path = files::resolve(path, options.create)?;
    let location: Arc<str> = format!("sqlite:{}", path.display()).into();
    let located = |e: Error| e.on_store(&location);

    let connection = connect(&path).map_err(located)?;
    recognise_at_once(&connection).map_err(located)?;
    let found = fs::metadata(&path).map_err(|e| located(lost(e)))?;
    let gate = files::open_private(&files::beside(&path, "-gate"), &found)?;
    gate.lock().map_err(|e| located(lost(e)))?;
    prepare(&connection).map_err(located)?;
    let lifelines = Lifelines::create(&path, &found)?;
    gate.unlock().map_err(|e| located(lost(e)))?;

    let mut database = Database::new(connection, path, location.clone(), boot, lifelines, gate);
    database.sweep();
    Ok(database)
}

fn lost(source: std::io::Error) -> Error {
    Error::new(ErrorKind::Rejected, "a file of the lock database cannot be used").caused_by(source)
}

fn connect(path: &Path) -> Result<Connection> {
    // Never created here: that was done, with the right mode.
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let connection = Connection::open_with_flags(path, flags).map_err(|e| failure("open", e))?;
    connection.busy_timeout(BUSY_TIMEOUT).map_err(|e| failure("open", e))?;
    connection.set_prepared_statement_cache_capacity(64);
    Ok(connection)
}

fn pragma(connection: &Connection, name: &str) -> Result<i64> {
    connection.pragma_query_value(None, name, |row| row.get(0)).map_err(|e| failure("be read", e))
}

/// Fails unless the file is a database of ours or empty, seen at one moment: another process may be making it just now.
fn recognise_at_once(connection: &Connection) -> Result<()> {
    connection.execute_batch("BEGIN").map_err(|e| failure("be read", e))?;
    let recognised = recognise(connection);
    connection.execute_batch("ROLLBACK").map_err(|e| failure("be read", e))?;
    recognised.map(drop)
}

/// What was found in a file that may be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Found {
    Empty,
    /// Ours, of the first version.
    First,
    /// Ours, of this version.
    Ours,
}

/// Whether the file is a database of ours or an empty one. Anything else is an error. Writes nothing.
fn recognise(connection: &Connection) -> Result<Found> {
    let refused =
        |what: String, advice: &'static str| Err(Error::new(ErrorKind::Rejected, what).advise(advice));
    let application = pragma(connection, "application_id")?;
    let version = pragma(connection, "user_version")?;
    let objects: i64 = connection
        .query_row("SELECT count(*) FROM sqlite_schema", [], |row| row.get(0))
        .map_err(|e| failure("be read", e))?;
    if connection.is_readonly("main").map_err(|e| failure("be read", e))? {
        return refused(
            "the lock database cannot be written".into(),
            "give yourself rights to it, or give another path",
        );
    }
    if application == 0 && version == 0 && objects == 0 {
        return Ok(Found::Empty);
    }
    if application != i64::from(APPLICATION_ID) {
        return refused(
            "the file is an SQLite database of another program".into(),
            "it was left as it is: give the path of a file of Leasehold's own",
        );
    }
    match version.cmp(&i64::from(SCHEMA_VERSION)) {
        std::cmp::Ordering::Equal => Ok(Found::Ours),
        std::cmp::Ordering::Less if version == i64::from(FIRST_VERSION) => Ok(Found::First),
        std::cmp::Ordering::Greater => refused(
            format!("the lock database has schema version {version}, this program knows {SCHEMA_VERSION}"),
            "it was made by a newer Leasehold: update this program, or give another path",
        ),
        std::cmp::Ordering::Less => refused(
            format!("the lock database has schema version {version}, which no Leasehold ever wrote"),
            "the file is damaged: move it away and a new one is made",
        ),
    }
}

/// Makes the connection and, in an empty file, the schema ready. The gate is held.
fn prepare(connection: &Connection) -> Result<()> {
    let failed = |e| failure("be prepared", e);
    let mode: String =
        connection.pragma_update_and_check(None, "journal_mode", "WAL", |row| row.get(0)).map_err(failed)?;
    if !mode.eq_ignore_ascii_case("wal") {
        return Err(Error::new(
            ErrorKind::Rejected,
            format!("the lock database stays in journal mode {mode}"),
        )
        .advise("its file system lacks shared memory: give another path"));
    }
    connection.pragma_update(None, "synchronous", "NORMAL").map_err(failed)?;
    connection.pragma_update(None, "journal_size_limit", LOG_LIMIT).map_err(failed)?;
    connection.execute_batch("BEGIN IMMEDIATE").map_err(failed)?;
    let ready = recognise(connection).and_then(|found| match found {
        Found::Ours => check(connection),
        Found::First => check(connection).and_then(|()| update(connection)),
        Found::Empty => make(connection),
    });
    // The log and its index exist from here on, as this transaction was begun.
    connection.execute_batch(if ready.is_ok() { "COMMIT" } else { "ROLLBACK" }).map_err(failed)?;
    ready
}

fn make(connection: &Connection) -> Result<()> {
    let failed = |e| failure("be made", e);
    connection.execute_batch(SCHEMA).map_err(failed)?;
    connection.pragma_update(None, "application_id", APPLICATION_ID).map_err(failed)?;
    update(connection)
}

/// Brings the first version up to date; it all happens in the caller's transaction, or not at all.
fn update(connection: &Connection) -> Result<()> {
    let failed = |e| failure("be brought up to date", e);
    connection.execute_batch(LINE).map_err(failed)?;
    connection.pragma_update(None, "user_version", SCHEMA_VERSION).map_err(failed)
}

fn check(connection: &Connection) -> Result<()> {
    if pragma(connection, "page_count")? > CHECKED_PAGES {
        return Ok(());
    }
    match quick_check(connection)?.as_str() {
        "ok" => Ok(()),
        damage => Err(Error::new(ErrorKind::Rejected, format!("the lock database is damaged: {damage}"))
            .advise(
                "stop the programs that use it, move it away with the files beside it, and a new one is made",
            )),
    }
}

/// `ok`, or the first damage that SQLite finds.
pub(super) fn quick_check(connection: &Connection) -> Result<String> {
    connection.query_row("PRAGMA quick_check(1)", [], |row| row.get(0)).map_err(|e| failure("be checked", e))
}
