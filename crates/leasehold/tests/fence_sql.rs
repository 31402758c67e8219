//! A stale holder really tries to write, to a row that is fenced and to a value in memory.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::time::Duration;

use leasehold::clock;
use leasehold::fence::{Fence, Refused, SqlFence};
use leasehold::store::Store;
use leasehold::stores::sqlite::{Options, SqliteStore};
use leasehold::{Acquired, Claim, FencingToken, Name};
use pollster::block_on;
use rusqlite::{Connection, OptionalExtension};

/// Takes the lock, waiting for the end of whoever has it.
fn token(store: &SqliteStore, ttl: Duration) -> FencingToken {
    let claim = Claim::new(Name::new("report").unwrap(), clock::claim_id(), ttl);
    loop {
        match block_on(store.acquire(&claim)).unwrap() {
            Acquired::Granted(grant) => return grant.token,
            _ => block_on(clock::sleep(Duration::from_millis(5))),
        }
    }
}

/// Writes the body of report 1 as the holder of `token`.
fn write(
    database: &Connection,
    fence: &SqlFence,
    id: i64,
    body: &str,
    token: FencingToken,
) -> Result<(), Refused> {
    let number = token.get().cast_signed();
    let update = fence.update("body = ?", "id = ? OR id = -1").unwrap();
    let changed = database.execute(&update, (body, number, id, number)).unwrap();
    let select = fence.select("id = ?").unwrap();
    let newest: Option<i64> = database.query_row(&select, [id], |row| row.get(0)).optional().unwrap();
    SqlFence::admitted(changed as u64, token, newest.map(|newest| FencingToken::new(newest.cast_unsigned())))
}

#[test]
fn a_stale_holder_is_turned_away() {
    let folder = tempfile::tempdir().unwrap();
    let store = SqliteStore::open(&folder.path().join("locks.db"), &Options::default()).unwrap();
    let database = Connection::open_in_memory().unwrap();
    database
        .execute_batch(
            "CREATE TABLE reports (id INTEGER, body TEXT, lock_token BIGINT NOT NULL DEFAULT 0); \
             INSERT INTO reports (id, body) VALUES (1, 'empty')",
        )
        .unwrap();
    let (fence, memory) = (SqlFence::new("reports", "lock_token").unwrap(), Fence::new());

    let stale = token(&store, Duration::from_millis(20));
    write(&database, &fence, 1, "begun by the first", stale).unwrap();
    memory.admit(stale).unwrap();
    // The first holder stands still past its lease, the second comes, and the first goes on.
    let current = token(&store, Duration::from_secs(60));
    write(&database, &fence, 1, "by the second", current).unwrap();
    memory.admit(current).unwrap();
    let refused = write(&database, &fence, 1, "ended by the first", stale).unwrap_err();
    let Refused::Stale(seen) = refused else { panic!("{refused}") };
    assert_eq!((seen.presented, seen.newest), (stale, current));
    assert_eq!(memory.admit(stale), Err(seen));

    write(&database, &fence, 1, "again by the second", current).unwrap();
    let body: String = database.query_row("SELECT body FROM reports", [], |row| row.get(0)).unwrap();
    assert_eq!(body, "again by the second");
    assert_eq!(write(&database, &fence, 2, "nowhere", current), Err(Refused::Unmatched));
}
