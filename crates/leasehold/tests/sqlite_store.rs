//! The embedded store within one process: the verbs, and what is kept of them.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::future::Future;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::task::{Context, Waker};
use std::time::Duration;

use leasehold::ErrorKind;
use leasehold::clock;
use leasehold::store::Store;
use leasehold::stores::sqlite::{Options, SqliteStore};
use leasehold::{
    Acquired, Binding, Claim, Fencing, FencingToken, Grant, Held, Holder, LockView, Name, Query, Record,
    Released, Renewal,
};
use pollster::block_on;
use tempfile::TempDir;

const LONG: Duration = Duration::from_secs(3600);
/// Far more than a slow machine needs, so that what never happens fails and does not hang.
const PATIENCE: Duration = Duration::from_secs(60);

fn place() -> (TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("locks.db");
    (folder, path)
}

fn open(path: &Path) -> SqliteStore {
    SqliteStore::open(path, &Options::default()).unwrap()
}

fn claim(text: impl AsRef<[u8]>, ttl: Duration) -> Claim {
    Claim::new(Name::new(text).unwrap(), clock::claim_id(), ttl)
}

#[track_caller]
fn granted(store: &SqliteStore, claim: &Claim) -> Grant {
    match block_on(store.acquire(claim)).unwrap() {
        Acquired::Granted(grant) => grant,
        other => panic!("not granted: {other:?}"),
    }
}

#[track_caller]
fn busy(store: &SqliteStore, claim: &Claim) -> Holder {
    match block_on(store.acquire(claim)).unwrap() {
        Acquired::Busy(holder) => holder,
        other => panic!("not busy: {other:?}"),
    }
}

fn renew(store: &SqliteStore, held: &Held) -> Renewal {
    block_on(store.renew(std::slice::from_ref(held))).pop().unwrap().unwrap()
}

fn release(store: &SqliteStore, held: &Held) -> Released {
    block_on(store.release(held)).unwrap()
}

fn show(store: &SqliteStore, text: &str) -> LockView {
    block_on(store.inspect(&Query::One(Name::new(text).unwrap()))).unwrap().items.remove(0)
}

/// Waits for an event that has no signal of its own.
#[track_caller]
fn until(mut done: impl FnMut() -> bool) {
    let start = clock::now();
    while !done() {
        assert!(clock::now().since(start) < PATIENCE, "it does not happen");
        block_on(clock::sleep(Duration::from_millis(5)));
    }
}

fn change(path: &Path, sql: &str) {
    rusqlite::Connection::open(path).unwrap().execute_batch(sql).unwrap();
}

#[test]
fn a_claim_is_granted_once_and_others_are_told_who_holds_it() {
    let (_folder, path) = place();
    let store = open(&path);
    let record = Record { host: "here".into(), pid: 7, label: Some("why".into()), ..Record::default() };
    let first = claim("a", LONG).with_record(record.encode().into());
    let grant = granted(&store, &first);
    let again = granted(&store, &first);
    assert_eq!(again.token, grant.token);
    assert!(again.ttl <= LONG && again.ttl > LONG / 2);
    let holder = busy(&store, &claim("a", LONG));
    assert_eq!((holder.id, holder.token, holder.record), (Some(first.id), Some(grant.token), Some(record)));
    assert!(holder.remaining.unwrap() <= LONG && holder.since_unix_micros.is_some());

    assert_eq!(release(&store, &Held::new(&claim("a", LONG), &grant)), Released::HeldByOther);
    assert_eq!(release(&store, &Held::new(&first, &grant)), Released::Released);
    assert_eq!(release(&store, &Held::new(&first, &grant)), Released::NotHeld);
    assert_eq!(release(&store, &Held::new(&claim("never", LONG), &grant)), Released::NotHeld);
    assert!(granted(&store, &claim("a", LONG)).token > grant.token);
}

#[test]
fn an_expired_lease_is_lost_for_good() {
    let (_folder, path) = place();
    let store = open(&path);
    let first = claim("a", Duration::from_millis(20));
    let grant = granted(&store, &first);
    let held = Held::new(&first, &grant);
    until(|| show(&store, "a").holder.is_none());
    assert_eq!(renew(&store, &held), Renewal::Lost);
    assert!(show(&store, "a").holder.is_none(), "a renewal creates nothing");
    assert_eq!(show(&store, "a").last_token, Some(grant.token));
    assert_eq!(release(&store, &held), Released::NotHeld);
    let second = claim("a", LONG);
    assert!(granted(&store, &second).token > grant.token);
    assert_eq!(renew(&store, &held), Renewal::Lost);
    assert_eq!(release(&store, &held), Released::HeldByOther);
    assert_eq!(busy(&store, &claim("a", LONG)).id, Some(second.id));
}

#[test]
fn renewing_extends_and_confirms_and_never_shortens() {
    let (_folder, path) = place();
    let store = open(&path);
    let first = claim("a", LONG);
    let mut held = Held::new(&first, &granted(&store, &first));
    let mut left = |extend| {
        held.extend = extend;
        let Renewal::Renewed(left) = renew(&store, &held) else { panic!("lost") };
        left
    };
    assert!(left(Some(Duration::from_secs(1))) > LONG / 2, "it never shortens");
    assert!(left(None) > LONG / 2 && left(None) <= LONG);
    assert!(left(Some(2 * LONG)) > LONG);
    assert!(left(None) > LONG, "the extension stands");

    // More than one transaction's worth, some of them wrong.
    let mut many: Vec<Held> = (0..300)
        .map(|number| claim(format!("many-{number}"), LONG))
        .map(|claim| Held::new(&claim, &granted(&store, &claim)))
        .collect();
    many[7].id = clock::claim_id();
    many[150].extend = Some(Duration::ZERO);
    let answers = block_on(store.renew(&many));
    assert_eq!(answers.len(), 300);
    for (index, answer) in answers.into_iter().enumerate() {
        match (index, answer) {
            (7, answer) => assert_eq!(answer.unwrap(), Renewal::Lost),
            (150, answer) => assert_eq!(answer.unwrap_err().kind(), ErrorKind::Invalid),
            (_, answer) => assert!(matches!(answer.unwrap(), Renewal::Renewed(_))),
        }
    }
}

#[test]
fn a_withdrawn_claim_is_never_granted_again() {
    let (_folder, path) = place();
    let store = open(&path);
    let first = claim("a", LONG);
    let grant = granted(&store, &first);
    let mut suspect = Held::new(&first, &grant);
    suspect.suspect = true;
    assert_eq!(release(&store, &suspect), Released::Released);
    let late = claim("b", LONG);
    assert_eq!(release(&store, &Held::unanswered(&late)), Released::NotHeld);
    let waiting = claim("c", LONG).with_queue(true);
    assert_eq!(release(&store, &Held::unanswered(&waiting)), Released::NotHeld);
    // Another process learns of it too.
    let other = open(&path);
    for withdrawn in [&first, &late, &waiting] {
        let error = block_on(other.acquire(withdrawn)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Rejected);
        assert!(error.to_string().contains("withdrawn"), "{error}");
        assert!(granted(&store, &claim(withdrawn.name.as_bytes(), LONG)).token >= grant.token);
    }
    drop((store, other));
    // An hour later no request of then can be under way.
    change(&path, "UPDATE withdrawn SET until = 0; UPDATE locks SET claim = NULL, lifeline = NULL");
    let _ = granted(&open(&path), &late);
}

#[test]
fn a_request_that_nobody_waits_for_any_more_is_not_run() {
    let (folder, path) = place();
    let store = open(&path);
    let gate = fs::OpenOptions::new().write(true).open(folder.path().join("locks.db-gate")).unwrap();
    gate.lock().unwrap();
    let inode = format!(":{} ", gate.metadata().unwrap().ino());
    let is_waiting = |line: &str| line.contains("-> FLOCK") && line.contains(&inode);
    let claims: Vec<Claim> = (0..3).map(|_| claim("a", LONG)).collect();
    for gone in &claims {
        let mut asking = Box::pin(store.acquire(gone));
        assert!(asking.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending());
        // The first has come as far as the gate, the others wait behind it.
        until(|| fs::read_to_string("/proc/locks").unwrap().lines().any(is_waiting));
    }
    gate.unlock().unwrap();
    let view = show(&store, "a");
    assert!(view.holder.is_none() && view.last_token.is_none(), "{view:?}");
    let _ = granted(&store, &claim("a", LONG));
}

#[test]
fn a_dropped_store_passes_its_locks_on_but_not_those_bound_to_nothing() {
    let (_folder, path) = place();
    let (first, second) = (open(&path), open(&path));
    let names = ["bound", "detached", "unbound"];
    let claims = names.map(|name| {
        claim(name, LONG).with_binding(if name == "unbound" { Binding::Expiry } else { Binding::Process })
    });
    let helds = claims.each_ref().map(|claim| Held::new(claim, &granted(&first, claim)));
    for name in names {
        let _ = busy(&second, &claim(name, LONG));
    }
    let mut detach = helds[1].clone();
    (detach.binding, detach.extend) = (Binding::Expiry, None);
    assert!(matches!(renew(&first, &detach), Renewal::Renewed(_)));
    drop(first);
    until(|| show(&second, "bound").holder.is_none());
    let _ = granted(&second, &claim("bound", LONG));
    let _ = busy(&second, &claim("detached", LONG));
    let _ = busy(&second, &claim("unbound", LONG));
    assert_eq!(release(&second, &helds[2]), Released::Released, "whoever has the claim may release it");
    assert_eq!(release(&second, &helds[1]), Released::Released);
}

#[test]
fn a_lifeline_that_is_missing_is_no_proof_of_death() {
    let (folder, path) = place();
    let (first, second) = (open(&path), open(&path));
    let lost = claim("a", Duration::from_millis(700));
    let before = clock::now();
    let _ = granted(&first, &lost);
    for entry in fs::read_dir(folder.path().join("locks.db-live")).unwrap() {
        fs::remove_file(entry.unwrap().path()).unwrap();
    }
    drop(first);
    let mut end = None;
    until(|| {
        let answer = block_on(second.acquire(&claim("a", LONG))).unwrap();
        end = matches!(answer, Acquired::Granted(_)).then(clock::now);
        end.is_some()
    });
    assert!(end.unwrap().since(before) >= lost.ttl, "it ended before its TTL");
}

#[test]
fn names_are_any_bytes_and_are_listed_in_order() {
    let (_folder, path) = place();
    let store = open(&path);
    let mut names: Vec<Vec<u8>> =
        ["a", "A", "а", "a ", " a", "a\0", "á", "a\u{301}", "{a}", "a{}", "a/b", "%", "'"]
            .iter()
            .map(|text| text.as_bytes().to_vec())
            .chain((0..=255).map(|byte| vec![0xff, byte]))
            .chain([vec![0xff], vec![b'x'; 512], vec![0]])
            .collect();
    for name in &names {
        let _ = granted(&store, &claim(name, LONG));
    }
    let free = claim("free", LONG);
    let grant = granted(&store, &free);
    assert_eq!(release(&store, &Held::new(&free, &grant)), Released::Released);
    names.sort();
    let queries = [(vec![], 7), (vec![], 1000), (vec![0xff], 50), (b"a".to_vec(), 1), (b"none".to_vec(), 3)];
    for (prefix, limit) in queries {
        let (mut seen, mut after) = (Vec::new(), None);
        loop {
            let query = Query::Prefix { prefix: prefix.clone(), after, limit };
            let page = block_on(store.inspect(&query)).unwrap();
            assert!(page.items.len() <= limit);
            seen.extend(page.items.iter().map(|view| view.name.as_bytes().to_vec()));
            assert!(page.items.iter().all(|view| view.holder.is_some() && view.last_token.is_some()));
            after = page.next;
            if after.is_none() {
                break;
            }
        }
        let expected: Vec<_> = names.iter().filter(|name| name.starts_with(&prefix)).cloned().collect();
        assert_eq!(seen, expected);
    }
}

#[test]
fn a_listing_passes_over_many_locks_that_ended() {
    let (_folder, path) = place();
    let store = open(&path);
    for number in 0..600 {
        let _ = granted(&store, &claim(format!("old-{number:03}"), Duration::from_millis(10)));
    }
    let last = claim("zzz", LONG);
    let _ = granted(&store, &last);
    until(|| show(&store, "old-599").holder.is_none());
    let query = Query::Prefix { prefix: vec![], after: None, limit: 2 };
    let page = block_on(store.inspect(&query)).unwrap();
    assert_eq!(page.items.iter().map(|view| &view.name).collect::<Vec<_>>(), [&last.name]);
    assert!(page.next.is_none());
}

#[test]
fn a_ttl_out_of_bounds_is_refused_before_anything_is_done() {
    let (_folder, path) = place();
    let store = open(&path);
    let promised = store.guarantees();
    assert_eq!(promised.fencing, Fencing::TimeFloor);
    assert!(promised.frees_at_process_death && promised.fifo);
    let day = Duration::from_secs(24 * 3600);
    for bad in [Duration::ZERO, Duration::from_millis(1), 367 * day, Duration::MAX] {
        let error = block_on(store.acquire(&claim("a", bad))).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid);
    }
    assert!(show(&store, "a").last_token.is_none());
    for good in [promised.least_ttl, 365 * day, promised.most_ttl] {
        assert_eq!(granted(&store, &claim(format!("{good:?}"), good)).ttl, good);
    }
}

#[test]
fn rows_of_another_boot_have_expired() {
    let (_folder, path) = place();
    let store = open(&path);
    let unbound = claim("a", LONG).with_binding(Binding::Expiry);
    let grant = granted(&store, &unbound);
    let _ = busy(&store, &claim("a", LONG));
    change(&path, "UPDATE locks SET boot = randomblob(16)");
    assert!(show(&store, "a").holder.is_none());
    assert_eq!(renew(&store, &Held::new(&unbound, &grant)), Renewal::Lost);
    assert!(granted(&store, &claim("a", LONG)).token > grant.token);
}

#[test]
fn tokens_go_on_growing_from_a_stale_copy_and_when_the_clock_went_back() {
    let (folder, path) = place();
    let copy = folder.path().join("copy");
    let take = || {
        let store = open(&path);
        let claim = claim("a", LONG);
        let grant = granted(&store, &claim);
        assert_eq!(release(&store, &Held::new(&claim, &grant)), Released::Released);
        grant.token
    };
    let _ = take();
    fs::copy(&path, &copy).unwrap();
    let last = (0..5).map(|_| take()).max().unwrap();
    fs::rename(&copy, &path).unwrap();
    let after = take();
    assert!(after > last, "the copy knew only the first");
    // As if the wall clock had been a year ahead at the last grant.
    let ahead = after.get() + 365 * 24 * 3_600_000_000;
    change(&path, &format!("UPDATE locks SET token = {ahead}"));
    assert_eq!(take(), FencingToken::new(ahead + 1));
    change(&path, &format!("UPDATE locks SET token = {}", FencingToken::MAX));
    let error = block_on(open(&path).acquire(&claim("a", LONG))).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Rejected, "{error}");
}

#[test]
fn old_tokens_and_tombstones_are_forgotten_and_held_ones_are_not() {
    let (_folder, path) = place();
    let store = open(&path);
    let held = claim("held", LONG);
    let _ = granted(&store, &held);
    for number in 0..300 {
        let claim = claim(format!("old-{number}"), LONG);
        let mut held = Held::new(&claim, &granted(&store, &claim));
        held.suspect = true;
        assert_eq!(release(&store, &held), Released::Released);
    }
    change(&path, "UPDATE locks SET token = 1; UPDATE withdrawn SET until = 0");
    let count = || -> i64 {
        let connection = rusqlite::Connection::open(&path).unwrap();
        let sql = "SELECT (SELECT count(*) FROM locks) + (SELECT count(*) FROM withdrawn)";
        connection.query_row(sql, [], |row| row.get(0)).unwrap()
    };
    let mut presented = 0;
    while count() > 1 {
        for _ in 0..256 {
            assert_eq!(granted(&store, &held).token, FencingToken::new(1), "what is held stays");
        }
        presented += 256;
        assert!(presented < 10_000, "{} rows are left", count());
    }
}
