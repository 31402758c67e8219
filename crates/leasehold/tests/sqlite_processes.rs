//! The embedded store between processes: killed, stopped, in containers, on full and read-only disks.
//!
//! The other processes are this same test program, told by its environment to be [`another_process`]. Namespaces are made
//! with `unshare` of util-linux; where that is not allowed the tests fail and say so.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use leasehold::Error;
use leasehold::clock;
use leasehold::store::Store;
use leasehold::stores::sqlite::{Options, SqliteStore};
use leasehold::{Acquired, Claim, FencingToken, Grant, Held, Name, Query, Released};
use pollster::block_on;
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

mod processes;
use processes::{PATIENCE, Process, say};

const LONG: Duration = Duration::from_secs(3600);

fn place() -> (TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("locks.db");
    (folder, path)
}

fn open(path: &Path) -> SqliteStore {
    SqliteStore::open(path, &Options::default()).unwrap()
}

fn claim(name: &str, ttl: Duration) -> Claim {
    Claim::new(Name::new(name).unwrap(), clock::claim_id(), ttl)
}

/// Presents a new claim of `a`: the grant, or `None` if it is busy.
fn attempt(store: &SqliteStore) -> Option<Grant> {
    match block_on(store.acquire(&claim("a", LONG))).unwrap() {
        Acquired::Granted(grant) => Some(grant),
        _ => None,
    }
}

/// Waits for an event that has no signal of its own.
#[track_caller]
fn attempt_until_granted(store: &SqliteStore) -> Grant {
    let start = clock::now();
    loop {
        assert!(clock::now().since(start) < PATIENCE, "it is never granted");
        match attempt(store) {
            Some(grant) => return grant,
            None => block_on(clock::sleep(Duration::from_millis(5))),
        }
    }
}

/// What the other processes do; in the test run itself there is no task and nothing to do.
#[test]
fn another_process() {
    let Ok(task) = std::env::var("LEASEHOLD_TEST_TASK") else { return };
    let path = PathBuf::from(std::env::var("LEASEHOLD_TEST_PATH").unwrap());
    let ttl = Duration::from_millis(std::env::var("LEASEHOLD_TEST_TTL_MS").unwrap().parse().unwrap());
    match task.as_str() {
        "hold" => hold(&path, ttl, false),
        "hold with child" => hold(&path, ttl, true),
        "count" => count(&path),
        "fill" => fill(&path),
        "open" => match SqliteStore::open(&path, &Options::default()) {
            Ok(_) => say("opened"),
            Err(error) => say_error(&error),
        },
        other => panic!("{other}"),
    }
}

fn say_error(error: &Error) {
    say(&format!("{:?}: {error}", error.kind()));
}

fn hold(path: &Path, ttl: Duration, with_child: bool) {
    let store = open(path);
    match block_on(store.acquire(&claim("a", ttl))).unwrap() {
        Acquired::Granted(grant) => say(&format!("held {}", grant.token)),
        other => return say(&format!("{other:?}")),
    }
    if with_child {
        let lifeline = store.lifeline().unwrap().try_clone().unwrap();
        #[expect(clippy::zombie_processes, reason = "the test kills it after this process is dead")]
        let child = Command::new("sleep").arg("1000").stdin(lifeline).stderr(Stdio::null()).spawn().unwrap();
        say(&child.id().to_string());
    }
    let _ = std::io::stdin().read_line(&mut String::new());
}

/// Adds one to the number in a file, many times, each under the lock.
fn count(path: &Path) {
    let (store, file) = (open(path), path.with_extension("count"));
    let mut last = FencingToken::new(0);
    for _ in 0..50 {
        let claim = claim("a", LONG);
        let grant = loop {
            if let Acquired::Granted(grant) = block_on(store.acquire(&claim)).unwrap() {
                break grant;
            }
        };
        assert!(grant.token > last);
        last = grant.token;
        let number: u64 = fs::read_to_string(&file).unwrap().parse().unwrap();
        fs::write(&file, (number + 1).to_string()).unwrap();
        assert_eq!(block_on(store.release(&Held::new(&claim, &grant))).unwrap(), Released::Released);
    }
    say("counted");
}

/// Takes locks until the disk is full, and then gives one back.
fn fill(path: &Path) {
    let store = open(path);
    let record: std::sync::Arc<str> = format!("{{\"label\":\"{}\"}}", "x".repeat(4000)).into();
    for number in 0.. {
        let claim = claim(&number.to_string(), LONG).with_record(record.clone());
        if let Err(error) = block_on(store.acquire(&claim)) {
            say_error(&error);
            break;
        }
    }
    let view = block_on(store.inspect(&Query::One(Name::new("0").unwrap()))).unwrap();
    say(if view.items[0].holder.is_some() { "still held" } else { "lost" });
}

#[test]
fn a_killed_holders_lock_passes_on_at_once() {
    let (folder, path) = place();
    let store = open(&path);
    let mut holder = Process::start("hold", &path, LONG);
    let token = holder.token();
    assert!(attempt(&store).is_none());
    holder.kill();
    assert!(attempt(&store).expect("it is dead").token > token);
    // Its file is cleared away by the next that opens.
    let live = || fs::read_dir(folder.path().join("locks.db-live")).unwrap().count();
    assert_eq!(live(), 2);
    let _third = open(&path);
    assert_eq!(live(), 2, "ours, the third's, and not that of the dead");
}

#[test]
fn a_stopped_holder_keeps_its_lock_until_its_ttl_and_not_longer() {
    let (_folder, path) = place();
    let store = open(&path);
    let (before, ttl) = (clock::now(), Duration::from_secs(2));
    let mut holder = Process::start("hold", &path, ttl);
    let token = holder.token();
    holder.signal(Signal::STOP);
    let grant = attempt_until_granted(&store);
    assert!(clock::now().since(before) >= ttl, "it passed on early");
    assert!(grant.token > token);
    holder.signal(Signal::CONT);
}

#[test]
fn a_lock_passes_on_only_when_the_whole_family_is_dead() {
    let (_folder, path) = place();
    let store = open(&path);
    let mut holder = Process::start("hold with child", &path, LONG);
    let _token = holder.token();
    let child = Pid::from_raw(holder.line().parse().unwrap()).unwrap();
    holder.kill();
    assert!(attempt(&store).is_none(), "the child lives");
    kill_process(child, Signal::KILL).unwrap();
    // It is nobody's child here, so its end has no signal for us.
    let _ = attempt_until_granted(&store);
}

/// Four processes count to 200; between the start of the first two and of the others `meanwhile` is done.
fn count_together(meanwhile: impl FnOnce(&Path)) {
    let (_folder, path) = place();
    let file = path.with_extension("count");
    fs::write(&file, "0").unwrap();
    let mut all: Vec<_> = (0..2).map(|_| Process::start("count", &path, LONG)).collect();
    meanwhile(&path);
    all.extend((0..2).map(|_| Process::start("count", &path, LONG)));
    for process in &mut all {
        assert_eq!(process.line(), "counted");
    }
    assert_eq!(fs::read_to_string(&file).unwrap(), "200");
}

#[test]
fn processes_are_never_inside_together() {
    count_together(|_| ());
}

#[test]
fn without_one_gate_they_are_not_inside_together_either() {
    count_together(|path| {
        let gate = path.with_file_name("locks.db-gate");
        let start = clock::now();
        while fs::remove_file(&gate).is_err() {
            assert!(clock::now().since(start) < PATIENCE, "no gate was made");
            block_on(clock::sleep(Duration::from_millis(1)));
        }
    });
}

#[test]
fn processes_that_make_the_database_together_make_one() {
    for _ in 0..5 {
        let (_folder, path) = place();
        let mut all: Vec<_> = (0..8).map(|_| Process::start("open", &path, LONG)).collect();
        for process in &mut all {
            assert_eq!(process.line(), "opened");
        }
    }
}

#[test]
fn containers_with_their_own_pids_exclude_each_other() {
    let container = ["unshare", "--map-root-user", "--pid", "--fork", "--kill-child", "--mount-proc"];
    let (_folder, path) = place();
    let mut first = Process::start_in(&container, "hold", &path, LONG);
    let token = first.token();
    let mut second = Process::start_in(&container, "hold", &path, LONG);
    assert!(second.line().starts_with("Busy"), "both are process 1 or 2 of their container");
    first.kill();
    // The container's process dies with `unshare`, a little after it.
    assert!(attempt_until_granted(&open(&path)).token > token);
}

#[test]
fn containers_with_their_own_clock_agree_on_the_time_left() {
    let (_folder, path) = place();
    for offset in ["1000000", "-50"] {
        let container =
            ["unshare", "--map-root-user", "--time", "--boottime", offset, "--fork", "--kill-child"];
        let mut holder = Process::start_in(&container, "hold", &path, LONG);
        let _token = holder.token();
        let store = open(&path);
        let view = block_on(store.inspect(&Query::One(Name::new("a").unwrap()))).unwrap();
        let left = view.items[0].holder.as_ref().expect("held").remaining.unwrap();
        assert!(left <= LONG && left + Duration::from_secs(60) > LONG, "{left:?}");
        holder.kill();
        let grant = attempt_until_granted(&store);
        assert!(grant.ttl == LONG);
        drop(store);
    }
}

/// Runs `task` on a small disk of its own, made by `mounts` on the folder `$0`.
fn on_a_disk(mounts: &str, task: &str) -> (TempDir, Process) {
    let folder = tempfile::tempdir().unwrap();
    let script = format!("set -e; {mounts}; exec \"$@\"");
    let at = folder.path().to_str().unwrap().to_owned();
    let wrapper = ["unshare", "--map-root-user", "--mount", "sh", "-c", &script, &at];
    let process = Process::start_in(&wrapper, task, &folder.path().join("locks.db"), LONG);
    (folder, process)
}

#[test]
fn a_full_disk_is_a_clear_error_and_takes_no_lock_away() {
    let (_folder, mut process) = on_a_disk("mount -t tmpfs -o size=2m tmpfs \"$0\"", "fill");
    let error = process.line();
    assert!(error.starts_with("Rejected") && error.contains("the disk is full"), "{error}");
    assert_eq!(process.line(), "still held");
    let (_folder, mut process) = on_a_disk("mount -t tmpfs -o size=4k tmpfs \"$0\"", "open");
    let error = process.line();
    assert!(error.starts_with("Rejected") && error.contains("full"), "{error}");
}

#[test]
fn a_read_only_disk_is_a_clear_error() {
    let empty = "mount -t tmpfs tmpfs \"$0\"; mount -o remount,bind,ro \"$0\"";
    let (_folder, mut process) = on_a_disk(empty, "open");
    let error = process.line();
    assert!(error.starts_with("Rejected") && error.contains("Read-only file system"), "{error}");

    let (source, path) = place();
    drop(open(&path));
    let copied = format!(
        "mount -t tmpfs tmpfs \"$0\"; cp {} \"$0\"; mount -o remount,bind,ro \"$0\"",
        source.path().join("locks.db").display()
    );
    let (_folder, mut process) = on_a_disk(&copied, "open");
    let error = process.line();
    assert!(error.starts_with("Rejected") && error.contains("writ"), "{error}");
}

#[test]
fn a_container_that_is_told_another_boot_respects_a_living_holder() {
    // As systemd-nspawn does it: each container sees a boot id of its own, on the one kernel.
    let (folder, path) = place();
    let boot_id = folder.path().join("boot_id");
    fs::write(&boot_id, "00112233-4455-6677-8899-aabbccddeeff\n").unwrap();
    let script = "set -e; mount --bind \"$0\" /proc/sys/kernel/random/boot_id; exec \"$@\"";
    let container = ["unshare", "--map-root-user", "--mount", "sh", "-c", script, boot_id.to_str().unwrap()];
    let mut holder = Process::start_in(&container, "hold", &path, LONG);
    let token = holder.token();
    let store = open(&path);
    assert!(attempt(&store).is_none(), "its holder lives");
    let view = block_on(store.inspect(&Query::One(Name::new("a").unwrap()))).unwrap();
    assert!(view.items[0].holder.is_some());
    holder.kill();
    assert!(attempt_until_granted(&store).token > token);
}

#[test]
fn a_database_bound_by_itself_into_another_folder_is_refused() {
    // Its log and its gate would be others than those beside the original: two holders of every lock.
    let (folder, path) = place();
    drop(open(&path));
    let elsewhere = folder.path().join("elsewhere");
    fs::create_dir(&elsewhere).unwrap();
    let bound = elsewhere.join("locks.db");
    fs::write(&bound, "").unwrap();
    let script = format!("set -e; mount --bind {} \"$0\"; exec \"$@\"", path.display());
    let container = ["unshare", "--map-root-user", "--mount", "sh", "-c", &script, bound.to_str().unwrap()];
    let mut process = Process::start_in(&container, "open", &bound, LONG);
    let error = process.line();
    assert!(error.starts_with("Rejected") && error.contains("mount"), "{error}");
}
