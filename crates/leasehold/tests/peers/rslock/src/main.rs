//! rslock; `../python/contend.py` tells what every peer does.

use std::fs::{self, OpenOptions};
use std::io::Write as _;
use std::path::Path;
use std::time::Duration;

use rslock::{Lock, LockError, LockManager};

async fn take(manager: &LockManager, name: &str, ttl: Duration) -> Option<Lock> {
    match manager.lock(name.as_bytes(), ttl).await {
        Ok(lock) => Some(lock),
        Err(LockError::Unavailable) => None,
        Err(error) => panic!("{error}"),
    }
}

async fn inside(folder: &Path) {
    let counter = folder.join("counter");
    let before: u64 = fs::read_to_string(&counter).unwrap().parse().unwrap();
    tokio::time::sleep(Duration::from_millis(1)).await;
    fs::write(&counter, (before + 1).to_string()).unwrap();
    let turns = OpenOptions::new().append(true).create(true).open(folder.join("turns"));
    turns.unwrap().write_all(b"t").unwrap();
}

#[tokio::main(flavor = "current_thread")]
async fn main() {
    let words: Vec<_> = std::env::args().skip(1).collect();
    let [mode, port, name, rest @ ..] = words.as_slice() else { panic!("MODE PORT NAME") };
    let mut manager = LockManager::new(vec![format!("redis://127.0.0.1:{port}")]);
    // One look, without waiting.
    manager.set_retry(1, Duration::from_millis(1));
    if mode == "try" {
        let lock = take(&manager, name, Duration::from_secs(30)).await;
        println!("{}", lock.is_some());
        return;
    }
    let [folder] = rest else { panic!("contend PORT NAME FOLDER") };
    let folder = Path::new(folder);
    println!("ready");
    let mut count = 0;
    while !folder.join("stop").exists() {
        let Some(lock) = take(&manager, name, Duration::from_secs(10)).await else {
            tokio::time::sleep(Duration::from_millis(1)).await;
            continue;
        };
        inside(folder).await;
        count += 1;
        manager.unlock(&lock).await;
        tokio::time::sleep(Duration::from_micros(fastrand::u64(..10_000))).await;
    }
    println!("{count}");
}
