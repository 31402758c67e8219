//! redis-py's Lock and ours exclude each other on one key.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use leasehold::{Retry, clock};
use leasehold_chaos::servers::RedisServer;

fn python() -> PathBuf {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/test-tools/python/bin/python");
    assert!(path.exists(), "redis-py is missing: run scripts/install-test-tools");
    path
}

fn run(code: &str, port: u16) -> String {
    let out = Command::new(python()).args(["-c", code, &port.to_string()]).output().unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8(out.stdout).unwrap().trim().to_owned()
}

const TAKE: &str = "
import sys, redis
from redis.lock import Lock
lock = Lock(redis.Redis(port=int(sys.argv[1])), 'shared', timeout=float(30))
print(lock.acquire(blocking=False))";

const RELEASE_A_STRANGERS: &str = "
import sys, redis
from redis.lock import Lock
from redis.exceptions import LockNotOwnedError
lock = Lock(redis.Redis(port=int(sys.argv[1])), 'shared', timeout=30)
lock.local.token = b'0123456789abcdef0123456789abcdef'
try:
    lock.release()
except LockNotOwnedError:
    print('not owned')";

#[tokio::test]
async fn each_finds_the_lock_of_the_other_busy() {
    let server = RedisServer::start();
    let locks = leasehold::connect(&server.url()).await.unwrap();
    let guard = locks.mutex("shared").lock().await.unwrap();
    assert_eq!(run(TAKE, server.port()), "False");
    assert_eq!(run(RELEASE_A_STRANGERS, server.port()), "not owned");
    assert!(!guard.ttl().await.unwrap().is_zero());
    guard.unlock().await.unwrap();

    assert_eq!(run(TAKE, server.port()), "True");
    assert!(locks.mutex("shared").try_lock().await.unwrap().is_none());
    let view = locks.show("shared").await.unwrap();
    let holder = view.holder.unwrap();
    assert!(holder.foreign.is_some() && holder.id.is_none(), "{holder:?}");
    assert!(holder.remaining.is_some_and(|left| left > Duration::from_secs(20)));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn under_contention_no_increment_is_lost() {
    let server = RedisServer::start();
    let folder = tempfile::tempdir().unwrap();
    let counter = folder.path().join("counter");
    fs::write(&counter, "0").unwrap();
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/redis_py.py");
    let pythons: Vec<_> = (0..3)
        .map(|_| {
            Command::new(python())
                .arg(&script)
                .args([&server.port().to_string(), "shared", folder.path().to_str().unwrap(), "4"])
                .stdout(Stdio::piped())
                .spawn()
                .unwrap()
        })
        .collect();
    let locks = leasehold::connect(&server.url()).await.unwrap();
    let end = clock::now().plus(Duration::from_secs(4));
    let retry = Retry::constant(Duration::from_millis(4)).with_jitter();
    let tasks: Vec<_> = (0..4)
        .map(|_| {
            let (mutex, counter) = (locks.mutex("shared").retry(retry.clone()), counter.clone());
            tokio::spawn(async move {
                let mut count = 0_u64;
                while clock::now() < end {
                    let Some(guard) = mutex.lock_for(Duration::from_secs(1)).await.unwrap() else { continue };
                    let before: u64 = fs::read_to_string(&counter).unwrap().parse().unwrap();
                    clock::sleep(Duration::from_millis(1)).await;
                    fs::write(&counter, (before + 1).to_string()).unwrap();
                    count += 1;
                    guard.unlock().await.unwrap();
                }
                count
            })
        })
        .collect();
    let mut ours = 0;
    for task in tasks {
        ours += task.await.unwrap();
    }
    let mut theirs = 0;
    for python in pythons {
        let out = python.wait_with_output().unwrap();
        assert!(out.status.success());
        theirs += String::from_utf8(out.stdout).unwrap().trim().parse::<u64>().unwrap();
    }
    assert!(ours > 20 && theirs > 20, "both had their turn: {ours} and {theirs}");
    assert_eq!(fs::read_to_string(&counter).unwrap(), (ours + theirs).to_string());
}
