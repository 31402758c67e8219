//! Other libraries' locks and ours exclude each other on one key, both ways and under contention: the real libraries, each in
//! a small program of its own under `peers/`, against a real server.

#![allow(clippy::unwrap_used)]

use std::fs::{self, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use leasehold::{Locks, clock};
use leasehold_chaos::eventually;
use leasehold_chaos::servers::RedisServer;

/// They contend until one side has followed the other so often, and until they were inside so often in all.
const CHANGES: usize = 10;
const TURNS: usize = 100;

fn here(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/peers").join(path)
}

/// Something that `scripts/install-test-tools` makes.
fn tool(path: &str) -> PathBuf {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/test-tools").join(path);
    assert!(path.exists(), "{} is missing: run scripts/install-test-tools", path.display());
    path
}

fn python(program: &str) -> Command {
    let mut command = Command::new(tool("python/bin/python"));
    command.arg("-B").arg(here("python").join(program));
    command
}

fn node(program: &str) -> Command {
    let modules = tool("node/node_modules");
    let mut command = Command::new("node");
    command.env("NODE_PATH", modules).arg(here("node").join(program));
    command
}

/// Runs a peer that looks at the lock once, and keeps it if it gets it.
fn takes(mut peer: Command, server: &RedisServer, name: &str) -> bool {
    let out = peer.args(["try", &server.port().to_string(), name]).output().unwrap();
    assert!(out.status.success(), "{peer:?}: {}", String::from_utf8_lossy(&out.stderr));
    let answer = String::from_utf8(out.stdout).unwrap();
    answer.trim().parse().unwrap_or_else(|_| panic!("{peer:?} said {answer:?}"))
}

/// A peer that contends for the lock.
struct Contender {
    process: Child,
    lines: std::io::Lines<BufReader<std::process::ChildStdout>>,
}

impl Contender {
    /// Starts it so that it ends with this thread, the test's: some libraries try for ever once their server is gone.
    fn start(peer: &Command, server: &RedisServer, folder: &Path) -> Self {
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "--"]).arg(peer.get_program()).args(peer.get_args());
        command.envs(peer.get_envs().filter_map(|(name, value)| Some((name, value?))));
        command.args(["contend", &server.port().to_string(), "shared"]).arg(folder).stdout(Stdio::piped());
        let mut process = command.spawn().unwrap_or_else(|error| panic!("{peer:?}: {error}"));
        let lines = BufReader::new(process.stdout.take().unwrap()).lines();
        let mut contender = Self { process, lines };
        assert_eq!(contender.line(), "ready");
        contender
    }

    fn line(&mut self) -> String {
        self.lines.next().expect("the peer says something; why not, it printed above").unwrap()
    }

    /// How often it was inside.
    fn end(mut self) -> u64 {
        let count = self.line().parse().unwrap();
        assert!(self.process.wait().unwrap().success());
        count
    }
}

/// Counts up as the peers do: a count is lost unless the holder is alone.
async fn inside(folder: &Path) {
    let counter = folder.join("counter");
    let before: u64 = fs::read_to_string(&counter).unwrap().parse().unwrap();
    clock::sleep(Duration::from_millis(1)).await;
    fs::write(&counter, (before + 1).to_string()).unwrap();
    OpenOptions::new().append(true).open(folder.join("turns")).unwrap().write_all(b"o").unwrap();
}

/// Contends for the lock as the peers do, with a pause after each turn, and tells how often it was inside.
async fn contend(locks: Locks, folder: PathBuf, pause: Duration) -> u64 {
    let mutex = locks.mutex("shared");
    let mut count = 0;
    while !folder.join("stop").exists() {
        let guard = mutex.lock().await.unwrap();
        inside(&folder).await;
        guard.unlock().await.unwrap();
        count += 1;
        clock::sleep(pause).await;
    }
    count
}

/// Each finds the lock of the other busy, and ours says of theirs that it is another library's.
async fn each_finds_the_others(peer: &dyn Fn() -> Command, prefix: &str) {
    let server = RedisServer::start();
    let locks = leasehold::connect(&format!("{}?prefix={prefix}", server.url())).await.unwrap();
    let guard = locks.mutex("shared").lock().await.unwrap();
    assert!(!takes(peer(), &server, "shared"), "it took a lock that Leasehold has");
    assert!(!guard.ttl().await.unwrap().is_zero(), "and left it alone");
    guard.unlock().await.unwrap();

    assert!(takes(peer(), &server, "shared"), "it takes what Leasehold gave back");
    assert!(locks.mutex("shared").try_lock().await.unwrap().is_none(), "Leasehold took a lock that it has");
    let holder = locks.show("shared").await.unwrap().holder.unwrap();
    assert!(holder.foreign.is_some() && holder.id.is_none(), "{holder:?}");
    assert!(holder.remaining.is_some_and(|left| left > Duration::from_secs(20)), "{holder:?}");
    assert!(!takes(peer(), &server, "shared"), "what was there a moment before is there still");
}

/// Two of theirs and some of ours take turns at one lock, and no count is lost.
async fn nobody_is_ever_inside_together(
    peer: &dyn Fn() -> Command,
    parameters: &str,
    tasks: usize,
    pause: Duration,
) {
    let server = RedisServer::start();
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("counter"), "0").unwrap();
    fs::write(folder.path().join("turns"), "").unwrap();
    let locks = leasehold::connect(&format!("{}?{parameters}", server.url())).await.unwrap();
    let peers: Vec<_> = (0..2).map(|_| Contender::start(&peer(), &server, folder.path())).collect();
    let tasks: Vec<_> =
        (0..tasks).map(|_| tokio::spawn(contend(locks.clone(), folder.path().to_owned(), pause))).collect();
    let path = folder.path().to_owned();
    let both_had_turns = move || {
        let turns = fs::read(path.join("turns")).unwrap();
        turns.len() >= TURNS && turns.windows(2).filter(|pair| pair[0] != pair[1]).count() >= CHANGES
    };
    let watch =
        move || eventually("both sides have their turns while the other wants it too", both_had_turns);
    tokio::task::spawn_blocking(watch).await.unwrap();
    fs::write(folder.path().join("stop"), "").unwrap();
    let mut ours = 0;
    for task in tasks {
        ours += task.await.unwrap();
    }
    let theirs: u64 = peers.into_iter().map(Contender::end).sum();
    let turns = fs::read(folder.path().join("turns")).unwrap().len();
    println!("ours {ours}, theirs {theirs}");
    assert_eq!(fs::read_to_string(folder.path().join("counter")).unwrap(), (ours + theirs).to_string());
    assert_eq!(turns as u64, ours + theirs);
}

/// The two tests of one library.
macro_rules! peer {
    ($library:ident, $prefix:literal, $command:expr) => {
        mod $library {
            use super::*;

            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn each_finds_the_lock_of_the_other_busy() {
                each_finds_the_others(&|| $command, $prefix).await;
            }

            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn under_contention_no_count_is_lost() {
                let prefix = concat!("prefix=", $prefix);
                // As long as somebody of ours is in line the lock goes from one of ours to the next.
                let pause = Duration::from_millis(6);
                nobody_is_ever_inside_together(&|| $command, prefix, 2, pause).await;
            }
        }
    };
}

peer!(redis_py, "", python("redis_py.py"));
peer!(python_redis_lock, "lock:", python("python_redis_lock.py"));
peer!(node_redlock, "", node("node_redlock.js"));
peer!(redis_semaphore, "mutex:", node("redis_semaphore.js"));
peer!(redislock, "", Command::new(tool("peers/redislock")));
peer!(redsync, "", Command::new(tool("peers/redsync")));
peer!(rslock, "", Command::new(tool("rslock/debug/leasehold-peer-rslock")));

/// A crowd of ours that always wants the lock, and would keep it among itself if it stood in line.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_line_others_get_their_turns_beside_a_busy_crowd() {
    let peer = || python("redis_py.py");
    nobody_is_ever_inside_together(&peer, "line=no", 6, Duration::ZERO).await;
}

/// A release by redis-py with the value of somebody else leaves ours alone.
#[tokio::test]
async fn a_release_that_is_not_the_holders_frees_nothing() {
    let server = RedisServer::start();
    let locks = leasehold::connect(&server.url()).await.unwrap();
    let guard = locks.mutex("shared").lock().await.unwrap();
    let code = "
import sys, redis
from redis.lock import Lock
from redis.exceptions import LockNotOwnedError
lock = Lock(redis.Redis(port=int(sys.argv[1])), 'shared', timeout=30)
lock.local.token = b'0123456789abcdef0123456789abcdef'
try:
    lock.release()
except LockNotOwnedError:
    print('not owned')";
    let out = Command::new(tool("python/bin/python")).args(["-c", code, &server.port().to_string()]).output();
    assert_eq!(String::from_utf8_lossy(&out.unwrap().stdout).trim(), "not owned");
    assert!(!guard.ttl().await.unwrap().is_zero());
}
