//! What a held lock costs its client in memory. Alone in its process, so that nothing else is counted.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::time::Duration;

use leasehold_chaos::servers::RedisServer;

const LOCKS: usize = 10_000;

/// Memory of this process that is in use, in bytes.
fn resident() -> usize {
    let pages: usize =
        fs::read_to_string("/proc/self/statm").unwrap().split(' ').nth(1).unwrap().parse().unwrap();
    pages * rustix::param::page_size()
}

async fn take(locks: &leasehold::Locks, count: usize) -> Vec<leasehold::Guard> {
    let mut guards = Vec::with_capacity(count);
    for n in 0..count {
        let name = format!("tenant:{n}:a-name-of-usual-length");
        guards.push(locks.mutex(name).ttl(Duration::from_secs(60)).lock().await.unwrap());
    }
    guards
}

#[tokio::test]
async fn ten_thousand_held_locks_take_less_than_2_kib_each() {
    let server = RedisServer::start();
    let locks = leasehold::connect(&server.url()).await.unwrap();
    // Buffers and pools that are there once, however many locks there are.
    drop(take(&locks, 200).await);
    let before = resident();
    let guards = take(&locks, LOCKS).await;
    let each = resident().saturating_sub(before) / LOCKS;
    println!("{each} bytes a lock");
    assert!(guards.len() == LOCKS && each > 100, "the measure is at work: {each}");
    assert!(each < 2048, "{each} bytes a lock");
}
