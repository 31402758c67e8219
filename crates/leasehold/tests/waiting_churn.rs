//! Everything at once: many processes that arrive, wait, give up, hold and die, for ten seconds, or as many as
//! `LEASEHOLD_TEST_CHURN_SECONDS` says.
#![allow(clippy::unwrap_used, reason = "a test")]

mod bad_days;

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use bad_days::ms;
use leasehold::{Guard, Locks, Mutex, clock};
use leasehold_chaos::checker::{
    History, Hold, boot_nanos, first_overlap, first_token_step_back, read_histories,
};
use leasehold_chaos::eventually;
use leasehold_chaos::servers::RedisServer;

const PROCESSES: usize = 6;
const TASKS: usize = 8;
const NAMES: usize = 2;
const TTL: u64 = 1_000;
/// Longer than any wait may last: with a killing each half second, of which each costs a lease and a bit at the most.
const LONGEST_WAIT: Duration = Duration::from_secs(20);
/// Set for the processes that this test starts: the store, the folder of the histories, when to stop.
const WORKER: &str = "LEASEHOLD_TEST_CHURN";

/// What a worker process does; no test of its own.
#[test]
fn worker() {
    let Ok(task) = std::env::var(WORKER) else { return };
    let [url, folder, until] = task.split('|').collect::<Vec<_>>().try_into().unwrap();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let until = clock::Instant::since_boot(Duration::from_nanos(until.parse().unwrap()));
    runtime.block_on(async {
        let locks = leasehold::connect(url).await.unwrap();
        let tasks: Vec<_> = (0..TASKS)
            .map(|task| tokio::spawn(churn(locks.clone(), PathBuf::from(folder), task, until)))
            .collect();
        for task in tasks {
            task.await.unwrap();
        }
        locks.close().await;
    });
}

/// A number below `limit`, by the seam's randomness.
fn random(limit: u64) -> u64 {
    u64::try_from(clock::jitter(ms(limit)).as_millis()).unwrap().min(limit - 1)
}

async fn churn(locks: Locks, folder: PathBuf, task: usize, until: clock::Instant) {
    let name = task % NAMES;
    let folder = folder.join(name.to_string());
    let path = folder.join(format!("{}-{task}", std::process::id()));
    let mut history = History::append_to(&path).unwrap();
    let mutex = locks.mutex(format!("churn-{name}")).ttl(ms(TTL));
    while clock::now() < until {
        if let Some(guard) = arrive(&mutex).await {
            let start = boot_nanos();
            clock::sleep(clock::jitter(ms(3))).await;
            // Only a lease that still stands proves anything of the time until now.
            if let Some(end) = (!guard.remaining().is_zero()).then(boot_nanos) {
                history.record(Hold { start, end, token: guard.fencing_token().get() }).unwrap();
            }
            if random(2) == 0 {
                drop(guard);
            } else {
                let _ = guard.unlock().await;
            }
        }
    }
}

/// Waits for the lock in one way or another; every way must end.
async fn arrive(mutex: &Mutex) -> Option<Guard> {
    let began = clock::now();
    let patient = clock::now().plus(LONGEST_WAIT);
    let guard = match random(4) {
        0 => mutex.lock_for(clock::jitter(ms(100))).await,
        1 => match clock::timeout_at(began.plus(clock::jitter(ms(50))), mutex.lock()).await {
            Some(guard) => guard.map(Some),
            None => Ok(None),
        },
        2 => mutex.try_lock().await,
        _ => clock::timeout_at(patient, mutex.lock()).await.expect("no wake-up is lost").map(Some),
    };
    guard.unwrap_or_else(|error| {
        assert!(error.is_transient(), "{error}");
        None
    })
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

fn start(url: &str, folder: &Path, until: u64) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "worker", "--nocapture"])
        .env(WORKER, format!("{url}|{}|{until}", folder.display()))
        .stdout(Stdio::null())
        .spawn()
        .unwrap()
}

/// Runs the workers, one of them being killed every half second; returns the holds of each lock.
fn run(url: &str, span: Duration) -> Vec<Vec<Hold>> {
    let folder = tempfile::tempdir().unwrap();
    (0..NAMES).for_each(|name| std::fs::create_dir(folder.path().join(name.to_string())).unwrap());
    let until = boot_nanos() + u64::try_from(span.as_nanos()).unwrap();
    let mut workers = Workers((0..PROCESSES).map(|_| start(url, folder.path(), until)).collect());
    let (mut killed, mut victim) = (0, 0);
    // None is killed near the end, so that all that is left behind by then was left by the living.
    while boot_nanos() + 3_000_000_000 < until {
        pollster::block_on(clock::sleep(ms(500)));
        let child = &mut workers.0[victim % PROCESSES];
        assert!(child.try_wait().unwrap().is_none(), "a worker failed");
        child.kill().unwrap();
        child.wait().unwrap();
        *child = start(url, folder.path(), until);
        (killed, victim) = (killed + 1, victim + 1);
    }
    for child in &mut workers.0 {
        assert!(child.wait().unwrap().success(), "a worker failed: a wait did not end");
    }
    println!("{killed} processes killed in {span:?}");
    (0..NAMES).map(|name| read_histories(&folder.path().join(name.to_string())).unwrap()).collect()
}

/// Zero overlap, and tokens that grow with time.
fn judge(holds: &mut [Hold], span: Duration) {
    println!("{} holds", holds.len());
    assert!(holds.len() as u64 > 5 * span.as_secs(), "only {} holds: nothing was tried", holds.len());
    assert_eq!(first_overlap(holds), None);
    assert_eq!(first_token_step_back(holds), None);
}

fn span() -> Duration {
    let seconds = std::env::var("LEASEHOLD_TEST_CHURN_SECONDS").ok().map(|text| text.parse().unwrap());
    Duration::from_secs(seconds.unwrap_or(10))
}

#[test]
fn churn_on_redis_overlaps_nowhere_loses_no_wait_and_leaves_nothing() {
    let server = RedisServer::start();
    for holds in &mut run(&server.url(), span()) {
        judge(holds, span());
    }
    // What may be left: the last tokens, tombstones (each an hour long), the index of who holds what; nothing of a line, no
    // lock, no subscription.
    eventually("locks and lines are gone", || {
        let keys = server.cli(&["KEYS", "*"]);
        keys.lines().all(|key| {
            key == "leasehold:index:" || key.contains("}:fence:churn-") || key.contains("}:gone:churn-")
        })
    });
    for key in server.cli(&["KEYS", "*"]).lines() {
        let left: i64 = server.cli(&["PTTL", key]).parse().unwrap();
        assert!(left > 0, "{key} stays for ever");
    }
    assert_eq!(server.cli(&["PUBSUB", "CHANNELS"]), "");
}
