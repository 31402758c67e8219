//! Looks the database over for an operator, and says what each finding means for a lock.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::time::Duration;

use super::database::Database;
use super::{files, lifeline, open};
use crate::types::{Finding, Severity};

/// Less free disk space than this is worth a warning.
const LITTLE_SPACE: u64 = 64 << 20;

/// All that can be found out without a request of its own.
pub(super) fn diagnose(database: &Database) -> Vec<Finding> {
    vec![
        files_in_place(database),
        file_system(database),
        file_mode(database),
        journal_mode(database),
        integrity(database),
        free_space(database),
        boot(database),
        liveness(database),
    ]
}

/// How long a request took, or that it took too long.
pub(super) fn round_trip(took: Option<Duration>) -> Finding {
    const CHECK: &str = "round trip";
    match took {
        Some(took) => Finding::new(
            CHECK,
            Severity::Good,
            format!("{:.3} ms", took.as_secs_f64() * 1000.0),
            "a lock and an unlock take about this long each",
        ),
        None => Finding::new(
            CHECK,
            Severity::Failure,
            "no answer",
            "a process that uses the file is stopped (SIGSTOP, Ctrl-Z, a debugger) in the middle of a request, or the \
             disk hangs: nobody gets a lock until it goes on or is killed",
        ),
    }
}

fn files_in_place(database: &Database) -> Finding {
    let path = database.path.display().to_string();
    match database.verify() {
        Ok(()) => Finding::new("reach", Severity::Good, path, "the database is open and can be written"),
        Err(error) => Finding::new(
            "reach",
            Severity::Failure,
            error.to_string(),
            "programs that start now would use another file than those that run: restart all of them",
        ),
    }
}

fn file_system(database: &Database) -> Finding {
    const CHECK: &str = "file system";
    match files::file_system_magic(&database.path) {
        Ok(magic) => match files::network_file_system(magic) {
            None => Finding::new(
                CHECK,
                Severity::Good,
                files::file_system_name(magic),
                "local: every process on this machine that opens this path meets in it, containers that share the \
                 folder too",
            ),
            Some(name) => Finding::new(
                CHECK,
                Severity::Failure,
                name,
                "another machine could write the same file, and kernel locks do not reach it: locks do not hold",
            ),
        },
        Err(error) => Finding::new(
            CHECK,
            Severity::Warning,
            error.to_string(),
            "whether the file is local could not be seen",
        ),
    }
}

fn file_mode(database: &Database) -> Finding {
    const CHECK: &str = "file mode";
    match fs::metadata(&database.path).map(|found| found.mode() & 0o777) {
        Ok(mode) if matches!(mode, 0o600 | 0o400) => Finding::new(
            CHECK,
            Severity::Good,
            format!("{mode:04o}"),
            "only its owner can take or read locks",
        ),
        Ok(mode) => Finding::new(
            CHECK,
            Severity::Warning,
            format!("{mode:04o}"),
            "other users can read or change who holds a lock: chmod 600",
        ),
        Err(error) => {
            Finding::new(CHECK, Severity::Failure, error.to_string(), "the file cannot be looked at")
        }
    }
}

fn journal_mode(database: &Database) -> Finding {
    const CHECK: &str = "journal mode";
    match database.connection.pragma_query_value(None, "journal_mode", |row| row.get::<_, String>(0)) {
        Ok(mode) if mode.eq_ignore_ascii_case("wal") => Finding::new(
            CHECK,
            Severity::Good,
            mode,
            "a killed process loses nothing; a power cut may lose the last moments, which end with the boot anyway, \
             and tokens go on growing by the clock",
        ),
        Ok(mode) => Finding::new(
            CHECK,
            Severity::Failure,
            mode,
            "another program changed the journal mode: stop it, and restart the programs that use the file",
        ),
        Err(error) => {
            Finding::new(CHECK, Severity::Failure, error.to_string(), "the database cannot be read")
        }
    }
}

fn integrity(database: &Database) -> Finding {
    const CHECK: &str = "integrity";
    const MEANING: &str = "locks cannot be trusted: stop the programs that use the file, move it away with the files \
                           beside it, and a new one is made";
    match open::quick_check(&database.connection) {
        Ok(found) if found == "ok" => Finding::new(CHECK, Severity::Good, found, "the file is sound"),
        Ok(found) => Finding::new(CHECK, Severity::Failure, found, MEANING),
        Err(error) => Finding::new(CHECK, Severity::Failure, error.to_string(), MEANING),
    }
}

fn free_space(database: &Database) -> Finding {
    const CHECK: &str = "free space";
    match files::free_bytes(&database.path) {
        Ok(bytes) => {
            let found = format!("{} MiB", bytes >> 20);
            if bytes < LITTLE_SPACE {
                let meaning = "on a full disk no lock is granted, renewed or released: free some space";
                Finding::new(CHECK, Severity::Warning, found, meaning)
            } else {
                Finding::new(
                    CHECK,
                    Severity::Good,
                    found,
                    "on a full disk no lock could be granted or renewed",
                )
            }
        }
        Err(error) => {
            Finding::new(CHECK, Severity::Warning, error.to_string(), "free space could not be seen")
        }
    }
}

fn boot(database: &Database) -> Finding {
    let id = database.boot.id().iter().fold(String::new(), |text, byte| text + &format!("{byte:02x}"));
    Finding::new(
        "boot id",
        Severity::Good,
        id,
        "leases are counted by this machine's boot-time clock: a restart of the machine frees all locks, a step of the \
         wall clock none",
    )
}

fn liveness(database: &Database) -> Finding {
    const CHECK: &str = "liveness";
    let stores = lifeline::count(&database.path).unwrap_or(0);
    if database.lifelines.in_place() {
        let meaning = "locks of a killed process pass on at once";
        let found = format!("{stores} stores open at most, {}", waiters(database));
        return Finding::new(CHECK, Severity::Good, found, meaning);
    }
    Finding::new(
        CHECK,
        Severity::Warning,
        "this process's file is missing",
        "somebody removed it: if this process is killed its locks pass on at the end of their TTL only",
    )
}

/// How many claims stand in line, those of the dead that nobody has met yet among them.
fn waiters(database: &Database) -> String {
    let count = database.connection.query_row("SELECT count(*) FROM queue", [], |row| row.get::<_, i64>(0));
    count.map_or_else(|_| "waiters not known".into(), |count| format!("{count} waiters in line"))
}
