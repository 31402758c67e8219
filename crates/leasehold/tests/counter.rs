//! Many processes and a counter that is not atomic: nothing is lost, nobody is ever inside together, and every token is
//! larger than the one before; also while a holder is killed with -9 every second.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use leasehold::{Retry, clock};
use leasehold_chaos::checker::{Hold, boot_nanos, first_overlap, first_token_step_back};
use leasehold_chaos::servers::RedisServer;

const PROCESSES: usize = 8;
const TASKS: usize = 16;
/// Set for the processes that these tests start: the store, the folder of the counter, when to stop.
const WORKER: &str = "LEASEHOLD_TEST_COUNTER";

/// What a worker process does; no test of its own.
#[test]
fn worker() {
    let Ok(task) = std::env::var(WORKER) else { return };
    let [url, folder, millis] = task.split('|').collect::<Vec<_>>().try_into().unwrap();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(work(url, Path::new(folder), Duration::from_millis(millis.parse().unwrap())));
}

async fn work(url: &str, folder: &Path, span: Duration) {
    let locks = leasehold::connect(url).await.unwrap();
    let end = clock::now().plus(span);
    let tasks: Vec<_> = (0..TASKS)
        .map(|task| {
            let retry = Retry::exponential(Duration::from_millis(1), Duration::from_millis(64)).with_jitter();
            let mutex = locks.mutex("counter").ttl(Duration::from_secs(1)).retry(retry);
            let folder = folder.to_owned();
            tokio::spawn(async move {
                let path = folder.join(format!("history-{}-{task}", std::process::id()));
                let mut history = fs::OpenOptions::new().create(true).append(true).open(path).unwrap();
                while clock::now() < end {
                    let Some(guard) = mutex.lock_for(Duration::from_secs(20)).await.unwrap() else {
                        continue;
                    };
                    let start = boot_nanos();
                    let counter = folder.join("counter");
                    let before: u64 = fs::read_to_string(&counter).unwrap().trim().parse().unwrap();
                    // Time for another to read the same number, were it inside too.
                    tokio::task::yield_now().await;
                    clock::sleep(clock::jitter(Duration::from_millis(1))).await;
                    write_whole(&counter, before + 1);
                    let line = format!("{},{start},{},{}\n", before + 1, boot_nanos(), guard.fencing_token());
                    history.write_all(line.as_bytes()).unwrap();
                    guard.unlock().await.unwrap();
                }
            })
        })
        .collect();
    for task in tasks {
        task.await.unwrap();
    }
}

/// A killed writer leaves the old number or the new one, never half of it.
fn write_whole(path: &Path, number: u64) {
    let aside = path.with_extension(std::process::id().to_string());
    fs::write(&aside, number.to_string()).unwrap();
    fs::rename(aside, path).unwrap();
}

struct Workers(Vec<Child>);

impl Drop for Workers {
    fn drop(&mut self) {
        for child in &mut self.0 {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn start(url: &str, folder: &Path, span: Duration) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "worker", "--nocapture"])
        .env(WORKER, format!("{url}|{}|{}", folder.display(), span.as_millis()))
        .stdout(Stdio::null())
        .spawn()
        .unwrap()
}

/// Runs the workers for `span`, killing the holder so many times, and judges what they wrote down.
fn count(url: &str, span: Duration, kills: usize) {
    let folder = tempfile::tempdir().unwrap();
    write_whole(&folder.path().join("counter"), 0);
    let mut workers = Workers((0..PROCESSES).map(|_| start(url, folder.path(), span)).collect());
    let locks = leasehold::blocking::connect(url).unwrap();
    let mut killed = BTreeSet::new();
    for _ in 0..kills {
        pollster::block_on(clock::sleep(Duration::from_secs(1)));
        // The holder of this moment, stopped in whatever it does.
        let victim = loop {
            let holder = locks.show("counter").unwrap().holder;
            if let Some(record) = holder.and_then(|holder| holder.record) {
                break record.pid;
            }
        };
        let child = workers.0.iter_mut().find(|child| child.id() == victim).unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        killed.insert(victim);
        *child = start(url, folder.path(), span);
    }
    for child in &mut workers.0 {
        assert!(child.wait().unwrap().success(), "a worker failed");
    }
    judge(folder.path(), kills as u64);
    assert_eq!(killed.len(), kills);
}

fn judge(folder: &Path, kills: u64) {
    let mut values = BTreeSet::new();
    let mut holds = Vec::new();
    let histories: Vec<PathBuf> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.file_name().unwrap().to_str().unwrap().starts_with("history-"))
        .collect();
    for path in histories {
        let text = fs::read_to_string(path).unwrap();
        for line in text.split_inclusive('\n').filter_map(|line| line.strip_suffix('\n')) {
            let [value, start, end, token] =
                line.split(',').map(|field| field.parse().unwrap()).collect::<Vec<u64>>().try_into().unwrap();
            assert!(values.insert(value), "two holders counted {value}: an increment was lost");
            holds.push(Hold { start, end, token });
        }
    }
    let total: u64 = fs::read_to_string(folder.join("counter")).unwrap().parse().unwrap();
    let written = values.len() as u64;
    // A process killed between its write and its note leaves a number that nobody claims.
    assert!(written <= total && total <= written + kills, "{written} written down, {total} counted");
    assert!(written > 100, "only {written} increments: nothing was tried");
    assert_eq!(first_overlap(&mut holds), None);
    assert_eq!(first_token_step_back(&mut holds), None);
    println!("{written} increments, {kills} holders killed");
}

fn sqlite() -> (tempfile::TempDir, String) {
    let folder = tempfile::tempdir().unwrap();
    let url = format!("sqlite:{}", folder.path().join("locks.db").display());
    (folder, url)
}

#[test]
fn nothing_is_lost_on_sqlite() {
    let (_folder, url) = sqlite();
    count(&url, Duration::from_secs(4), 0);
}

#[test]
fn nothing_is_lost_on_redis() {
    let server = RedisServer::start();
    count(&server.url(), Duration::from_secs(4), 0);
}

#[test]
fn nothing_is_lost_on_sqlite_with_a_holder_killed_every_second() {
    let (_folder, url) = sqlite();
    count(&url, Duration::from_secs(7), 5);
}

#[test]
fn nothing_is_lost_on_redis_with_a_holder_killed_every_second() {
    let server = RedisServer::start();
    count(&server.url(), Duration::from_secs(7), 5);
}
