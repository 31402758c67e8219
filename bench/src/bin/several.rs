//! A thousand locks at once beside a thousand one after another, on one Redis server: medians of interleaved rounds and their
//! ratio; asserts nothing.
//!
//! `cargo run --release -p leasehold-bench --bin several`; a number after it is the number of names.
#![allow(clippy::disallowed_methods, reason = "a benchmark measures with the monotonic clock")]
#![expect(clippy::unwrap_used, reason = "a benchmark has nobody to report to")]

use std::time::{Duration, Instant};

use leasehold::Locks;
use leasehold_chaos::servers::RedisServer;

const ROUNDS: usize = 7;

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() {
    let count: usize = std::env::args().nth(1).map_or(1000, |count| count.parse().unwrap());
    let server = RedisServer::start();
    let locks = leasehold::connect(&server.url()).await.unwrap();
    let names: Vec<String> = (0..count).map(|n| format!("lock-{n}")).collect();
    let (mut together, mut singly) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        together.push(at_once(&locks, &names).await);
        singly.push(one_by_one(&locks, &names).await);
    }
    let (together, singly) = (median(&mut together), median(&mut singly));
    println!("lock and unlock of {count} names, medians of {ROUNDS} interleaved rounds");
    println!(
        "one after another {singly:?}, at once {together:?}: {:.1} times the speed",
        singly.as_secs_f64() / together.as_secs_f64()
    );
}

async fn at_once(locks: &Locks, names: &[String]) -> Duration {
    let start = Instant::now();
    let guards = locks.all(names).lock().await.unwrap();
    for (_, answer) in guards.unlock().await {
        answer.unwrap();
    }
    start.elapsed()
}

async fn one_by_one(locks: &Locks, names: &[String]) -> Duration {
    let start = Instant::now();
    let mut guards = Vec::with_capacity(names.len());
    for name in names {
        guards.push(locks.mutex(name).lock().await.unwrap());
    }
    for guard in guards {
        guard.unlock().await.unwrap();
    }
    start.elapsed()
}

fn median(times: &mut [Duration]) -> Duration {
    times.sort_unstable();
    times[times.len() / 2]
}
