//! The files of the embedded store: modes, paths, and every bad file.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::time::Duration;

use leasehold::clock;
use leasehold::store::Store;
use leasehold::stores::sqlite::{Options, SqliteStore, default_path};
use leasehold::{Acquired, Binding, Claim, Held, Name, Query, Released, Renewal, Severity};
use leasehold::{Error, ErrorKind};
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

fn refusal(path: &Path) -> Error {
    let error = SqliteStore::open(path, &Options::default()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Rejected, "{error}");
    assert!(error.advice().is_some(), "{error}");
    error
}

fn claim(text: &str) -> Claim {
    Claim::new(Name::new(text).unwrap(), clock::claim_id(), LONG)
}

#[track_caller]
fn take(store: &SqliteStore, claim: &Claim) -> Held {
    match block_on(store.acquire(claim)).unwrap() {
        Acquired::Granted(grant) => Held::new(claim, &grant),
        other => panic!("not granted: {other:?}"),
    }
}

fn is_busy(store: &SqliteStore, name: &str) -> bool {
    matches!(block_on(store.acquire(&claim(name))).unwrap(), Acquired::Busy(_))
}

fn change(path: &Path, sql: &str) {
    rusqlite::Connection::open(path).unwrap().execute_batch(sql).unwrap();
}

fn mode(path: impl AsRef<Path>) -> u32 {
    fs::metadata(path).unwrap().mode() & 0o7777
}

fn beside(path: &Path, suffix: &str) -> PathBuf {
    PathBuf::from(format!("{}{suffix}", path.display()))
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

#[test]
fn every_file_is_private() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("deep/er/locks.db");
    let store = open(&path);
    let _held = take(&store, &claim("a"));
    let live = beside(&path, "-live");
    for private in [path.parent().unwrap(), &folder.path().join("deep"), &live] {
        assert_eq!(mode(private), 0o700, "{}", private.display());
    }
    for suffix in ["", "-wal", "-shm", "-gate"] {
        assert_eq!(mode(beside(&path, suffix)), 0o600, "{suffix}");
    }
    let lifelines: Vec<_> = fs::read_dir(&live).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert_eq!(lifelines.len(), 1);
    assert_eq!(mode(&lifelines[0]), 0o600);
    assert_eq!(&*store.location(), format!("sqlite:{}", fs::canonicalize(&path).unwrap().display()));
    assert!(default_path().unwrap().ends_with(".local/state/leasehold/locks.db"));
}

/// The owner of a database could otherwise have root, working on it, open and give away any file.
#[test]
fn a_link_in_place_of_a_file_beside_the_database_is_refused() {
    for (suffix, target) in [("-gate", "file"), ("-live", "folder")] {
        let (folder, path) = place();
        drop(open(&path));
        let target = folder.path().join(target);
        fs::write(folder.path().join("file"), "").unwrap();
        fs::create_dir(folder.path().join("folder")).unwrap();
        let aside = beside(&path, suffix);
        until(|| fs::remove_file(&aside).is_ok() || fs::remove_dir(&aside).is_ok());
        symlink(&target, &aside).unwrap();
        // Only root can give away; everybody is refused.
        let _ = std::os::unix::fs::chown(&path, Some(12_345), Some(12_345));
        let owner = fs::metadata(&target).unwrap().uid();
        let error = refusal(&path);
        assert!(error.to_string().contains(suffix), "{error}");
        assert_eq!(fs::metadata(&target).unwrap().uid(), owner);
    }
}

#[test]
fn a_store_that_ends_leaves_nothing_but_the_database_and_the_gate() {
    let (folder, path) = place();
    let store = open(&path);
    let held = take(&store, &claim("a"));
    assert_eq!(block_on(store.release(&held)).unwrap(), Released::Released);
    drop(store);
    // The drop waits for a while only, and a slow machine may take longer.
    let left = || {
        let mut names: Vec<_> = fs::read_dir(folder.path())
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        (names, fs::read_dir(beside(&path, "-live")).unwrap().count())
    };
    until(|| left() == (["locks.db", "locks.db-gate", "locks.db-live"].map(String::from).to_vec(), 0));
}

#[test]
fn other_files_are_refused_and_left_as_they_are() {
    let (folder, path) = place();
    let foreign = folder.path().join("foreign.db");
    change(
        &foreign,
        "PRAGMA journal_mode = WAL; CREATE TABLE orders (id INTEGER); INSERT INTO orders VALUES (1)",
    );
    let text = folder.path().join("text");
    fs::write(&text, "#!/bin/sh\necho no database, and longer than the header of one\n".repeat(40)).unwrap();
    let short = folder.path().join("short");
    fs::write(&short, "x").unwrap();
    for (file, reason) in
        [(&foreign, "another program"), (&text, "not a database"), (&short, "not a database")]
    {
        let before = fs::read(file).unwrap();
        let error = refusal(file);
        assert!(error.to_string().contains(reason), "{error}");
        assert_eq!(fs::read(file).unwrap(), before);
        assert!(!beside(file, "-gate").exists() && !beside(file, "-live").exists());
    }
    drop(open(&path));
    change(&path, "PRAGMA user_version = 3");
    let error = refusal(&path);
    assert!(error.to_string().contains("newer"), "{error}");
}

/// What the first version wrote, word for word.
const FIRST_SCHEMA: &str = "
    PRAGMA journal_mode = WAL;
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
    PRAGMA application_id = 0x4c734864;
    PRAGMA user_version = 1;
";

#[test]
fn a_database_of_the_first_version_is_brought_up_to_date_in_place() {
    let (_folder, path) = place();
    change(&path, FIRST_SCHEMA);
    // A hold of that version, by a claim that is bound to nothing, and a claim that was withdrawn.
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap().trim().replace('-', "");
    let far = i64::MAX / 2;
    let (old, gone) = (claim("old").with_binding(Binding::Expiry), claim("new"));
    change(
        &path,
        &format!(
            "INSERT INTO locks VALUES (CAST('old' AS BLOB), 77, x'{}', x'{boot}', {far}, NULL, 5, '{{}}');
             INSERT INTO withdrawn VALUES (x'{}', x'{boot}', {far})",
            old.id, gone.id
        ),
    );
    let stores: Vec<_> = (0..2).map(|_| open(&path)).collect();
    assert!(is_busy(&stores[1], "old"));
    let held = take(&stores[0], &old);
    assert_eq!(held.token.map(leasehold::FencingToken::get), Some(77), "the same claim has its grant");
    assert_eq!(block_on(stores[0].acquire(&gone)).unwrap_err().kind(), ErrorKind::Rejected);
    // And it has a line now.
    let next = claim("old").with_queue(true);
    let waiting = block_on(stores[1].acquire(&next)).unwrap();
    assert!(matches!(&waiting, Acquired::Queued(ticket) if ticket.ahead() == Some(0)), "{waiting:?}");
    assert_eq!(block_on(stores[0].release(&held)).unwrap(), Released::Released);
    assert!(take(&stores[1], &next).token > held.token);
}

#[test]
fn what_is_no_plain_file_is_refused() {
    let (folder, path) = place();
    assert!(refusal(folder.path()).to_string().contains("folder"));
    symlink("nowhere", folder.path().join("dangling")).unwrap();
    assert!(refusal(&folder.path().join("dangling")).to_string().contains("nowhere"));
    let pipe = folder.path().join("pipe");
    assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    assert!(refusal(&pipe).to_string().contains("regular"));
    fs::write(folder.path().join("file"), "").unwrap();
    let _ = refusal(&folder.path().join("file/below.db"));
    drop(open(&path));
    fs::hard_link(&path, folder.path().join("second")).unwrap();
    assert!(refusal(&path).to_string().contains("hard link"));
    let empty = SqliteStore::open(Path::new(""), &Options::default()).unwrap_err();
    assert_eq!(empty.kind(), ErrorKind::Invalid);
    let missing = folder.path().join("missing.db");
    let error = SqliteStore::open(&missing, &Options::default().with_create(false)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Rejected);
    assert!(!missing.exists());
}

#[test]
fn two_paths_to_one_file_are_one_database() {
    let (folder, path) = place();
    let store = open(&path);
    let _held = take(&store, &claim("a"));
    let link = folder.path().join("link.db");
    symlink(&path, &link).unwrap();
    fs::create_dir(folder.path().join("sub")).unwrap();
    let detour = folder.path().join("sub/.././locks.db");
    for other in [link, detour] {
        assert!(is_busy(&open(&other), "a"), "{}", other.display());
    }
    assert!(!beside(&folder.path().join("link.db"), "-gate").exists());
}

#[test]
fn a_damaged_database_is_refused() {
    let (_folder, path) = place();
    let store = open(&path);
    for number in 0..200 {
        let _held = take(&store, &claim(&number.to_string()));
    }
    drop(store);
    until(|| !beside(&path, "-wal").exists());
    let whole = fs::read(&path).unwrap();
    let mut garbled = whole.clone();
    garbled[4096..].iter_mut().for_each(|byte| *byte = byte.wrapping_mul(31).wrapping_add(7));
    let mut header = whole.clone();
    header[..16].fill(b'?');
    for damaged in [&garbled[..], &whole[..5000], &header[..]] {
        fs::write(&path, damaged).unwrap();
        let _ = refusal(&path);
        assert!(fs::read(&path).unwrap() == damaged, "it was changed");
    }
    fs::write(&path, whole).unwrap();
    let seven = block_on(open(&path).inspect(&Query::One(Name::new("7").unwrap()))).unwrap();
    assert!(seven.items[0].last_token.is_some());
}

#[test]
fn a_database_that_vanished_is_no_second_database() {
    for suffix in ["", "-wal"] {
        let (folder, path) = place();
        let store = open(&path);
        let held = take(&store, &claim("a").with_binding(Binding::Expiry));
        let (file, aside) = (beside(&path, suffix), folder.path().join("aside"));
        fs::rename(&file, &aside).unwrap();
        let errors = || {
            [
                block_on(store.acquire(&claim("b"))).unwrap_err(),
                block_on(store.release(&held)).unwrap_err(),
                block_on(store.inspect(&Query::One(Name::new("a").unwrap()))).unwrap_err(),
            ]
        };
        for error in errors() {
            assert_eq!(error.kind(), ErrorKind::Rejected);
            assert!(error.to_string().contains("deleted"), "{error}");
        }
        let renewed = || block_on(store.renew(std::slice::from_ref(&held))).pop().unwrap().unwrap();
        assert_eq!(renewed(), Renewal::Lost, "others may have it already");
        fs::write(&file, fs::read(&aside).unwrap()).unwrap();
        for error in errors() {
            assert!(error.to_string().contains("replaced"), "{error}");
        }
        assert_eq!(renewed(), Renewal::Lost);
        let findings = block_on(store.diagnose());
        assert!(findings.iter().any(|found| found.severity == Severity::Failure && found.check == "reach"));
        fs::rename(&aside, &file).unwrap();
        let back = block_on(store.release(&held)).unwrap();
        assert_eq!(back, Released::Released, "back in its place it works on");
    }
}

#[test]
fn an_operator_is_told_what_is_found() {
    let (_folder, path) = place();
    let store = open(&path);
    let worst = || block_on(store.diagnose()).into_iter().max_by_key(|found| found.severity).unwrap();
    let checks: Vec<_> = block_on(store.diagnose()).into_iter().map(|found| found.check).collect();
    let expected = [
        "reach",
        "file system",
        "file mode",
        "journal mode",
        "integrity",
        "free space",
        "boot id",
        "liveness",
        "round trip",
    ];
    assert_eq!(checks, expected);
    assert_eq!(worst().severity, Severity::Good, "{:?}", worst());
    fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
    assert_eq!((worst().severity, &*worst().check), (Severity::Warning, "file mode"));
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
    fs::remove_dir_all(beside(&path, "-live")).unwrap();
    assert_eq!(worst().check, "liveness");
}

#[test]
fn a_gate_that_nobody_opens_is_told_and_not_waited_at_for_ever() {
    let (_folder, path) = place();
    let locks = leasehold::Locks::over(std::sync::Arc::new(open(&path))).unwrap();
    // As a process does that was stopped in the middle of a transaction.
    let gate = fs::File::open(beside(&path, "-gate")).unwrap();
    gate.lock().unwrap();
    let error = block_on(locks.mutex("a").try_lock()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unknown);
    assert!(error.to_string().contains("gate"), "{error}");
    gate.unlock().unwrap();
    assert!(block_on(locks.mutex("a").lock()).is_ok(), "and goes on when it opens");
}
