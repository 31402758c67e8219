//! Lock and unlock on one Redis server, beside the same two round trips sent raw by the same client crate, whose driver
//! is on another thread too. Prints medians of interleaved rounds and their ratio; asserts nothing.
//!
//! `cargo run --release -p leasehold-bench --bin redis`; a number after it measures that many workers only.
#![allow(clippy::disallowed_methods, reason = "a benchmark measures with the monotonic clock")]
#![expect(clippy::unwrap_used, reason = "a benchmark has nobody to report to")]

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use leasehold::Locks;
use leasehold_chaos::servers::RedisServer;
use redis::aio::MultiplexedConnection;
use redis::{AsyncConnectionConfig, IntoConnectionInfo, Script};

const ROUNDS: usize = 5;
const SPAN: Duration = Duration::from_millis(800);
const RELEASE: &str =
    "if redis.call('GET',KEYS[1])==ARGV[1] then return redis.call('DEL',KEYS[1]) else return 0 end";

fn main() {
    let server = RedisServer::start();
    println!("lock + unlock cycles a second, medians of {ROUNDS} interleaved rounds of {SPAN:?}");
    println!("{:>8} {:>12} {:>12} {:>26}", "workers", "raw", "leasehold", "leasehold / raw");
    let asked = std::env::args().nth(1).map(|workers| vec![workers.parse().unwrap()]);
    for workers in asked.unwrap_or_else(|| vec![1, 64, 512]) {
        let mut raws = Vec::new();
        let mut ours = Vec::new();
        for _ in 0..ROUNDS {
            raws.push(raw(&server.url(), workers));
            ours.push(leasehold(&server.url(), workers));
        }
        let (raw, our) = (median(&mut raws), median(&mut ours));
        println!(
            "{workers:>8} {raw:>12.0} {our:>12.0} {:>10.2} of the speed, {:.2} of the time",
            our / raw,
            raw / our
        );
    }
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn runtime(workers: usize) -> tokio::runtime::Runtime {
    if workers == 1 {
        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
    } else {
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
    }
}

/// Cycles a second of `workers` tasks, each running `cycle` over and over for `SPAN`.
fn measure<C, F>(workers: usize, make: impl Fn(usize) -> C) -> f64
where
    C: FnMut() -> F + Send + 'static,
    F: Future<Output = ()> + Send,
{
    let runtime = runtime(workers);
    let count = Arc::new(AtomicU64::new(0));
    let began = Instant::now();
    runtime.block_on(async {
        let tasks: Vec<_> = (0..workers)
            .map(|worker| {
                let (mut cycle, count) = (make(worker), count.clone());
                tokio::spawn(async move {
                    let mut mine = 0;
                    while began.elapsed() < SPAN {
                        for _ in 0..4 {
                            cycle().await;
                        }
                        mine += 4;
                    }
                    count.fetch_add(mine, Ordering::Relaxed);
                })
            })
            .collect();
        for task in tasks {
            task.await.unwrap();
        }
    });
    #[expect(clippy::cast_precision_loss, reason = "far below 2^52")]
    let cycles = count.load(Ordering::Relaxed) as f64;
    cycles / began.elapsed().as_secs_f64()
}

fn raw(url: &str, workers: usize) -> f64 {
    // The driver on a thread of its own, as Leasehold's is.
    let driver = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let info = url.into_connection_info().unwrap();
    let info = info.clone().set_tcp_settings(info.tcp_settings().clone().set_nodelay(true));
    let connection: MultiplexedConnection = driver
        .block_on(driver.spawn(async move {
            let config = AsyncConnectionConfig::new().set_response_timeout(None);
            redis::Client::open(info)
                .unwrap()
                .get_multiplexed_async_connection_with_config(&config)
                .await
                .unwrap()
        }))
        .unwrap();
    let script = Script::new(RELEASE);
    let sha = script.get_hash().to_owned();
    {
        let mut connection = connection.clone();
        let load = async move { script.load_async(&mut connection).await.unwrap() };
        driver.block_on(load);
    }
    let unique = AtomicU64::new(0);
    let cycles = measure(workers, |worker| {
        let (connection, sha) = (connection.clone(), sha.clone());
        let name = format!("raw:{worker}");
        let value = format!("{:032x}", unique.fetch_add(1, Ordering::Relaxed));
        move || {
            let (mut acquire, mut release) = (redis::cmd("SET"), redis::cmd("EVALSHA"));
            acquire.arg(&name).arg(&value).arg("NX").arg("PX").arg(30_000);
            release.arg(&sha).arg(1).arg(&name).arg(&value);
            let mut connection = connection.clone();
            async move {
                let set: Option<String> = acquire.query_async(&mut connection).await.unwrap();
                assert!(set.is_some());
                let deleted: i64 = release.query_async(&mut connection).await.unwrap();
                assert_eq!(deleted, 1);
            }
        }
    });
    drop(connection);
    driver.shutdown_background();
    cycles
}

fn leasehold(url: &str, workers: usize) -> f64 {
    let locks = connect(url).unwrap();
    measure(workers, |worker| {
        let mutex = locks.mutex(format!("ours:{worker}"));
        move || {
            let mutex = mutex.clone();
            async move {
                let guard = mutex.try_lock().await.unwrap().unwrap();
                let _ = guard.unlock().await.unwrap();
            }
        }
    })
}

fn connect(url: &str) -> leasehold::Result<Locks> {
    runtime(1).block_on(leasehold::connect(url))
}
