//! Lock and unlock over five nodes, beside one server and beside five of which one stands still; and how often the nodes
//! have to be asked a second time for a token. Prints medians of interleaved rounds and their ratios; asserts nothing.
//!
//! All servers share the machine with the client, which then does five times the work: that is measured as it is, and once
//! more with answers that take a millisecond, as over a network.
//!
//! `cargo run --release -p leasehold-bench --bin quorum`
#![allow(clippy::disallowed_methods, reason = "a benchmark measures with the monotonic clock")]
#![expect(clippy::unwrap_used, reason = "a benchmark has nobody to report to")]

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use leasehold::Locks;
use leasehold::store::Store;
use leasehold::stores::quorum::{NodeSource, QuorumStore};
use leasehold::stores::redis::{RedisConfig, RedisStore};
use leasehold_chaos::proxy::Proxy;
use leasehold_chaos::servers::RedisServer;
use tokio::runtime::{Builder, Handle, Runtime};

const ROUNDS: usize = 7;
const CYCLES: usize = 400;

fn main() {
    let nodes: Vec<RedisServer> = (0..5).map(|_| RedisServer::start()).collect();
    let lame: Vec<RedisServer> = (0..5).map(|_| RedisServer::start()).collect();
    let single = RedisServer::start();
    let direct = |servers: &[RedisServer]| -> Vec<String> { servers.iter().map(RedisServer::url).collect() };
    beside_each_other("on the loopback", &single.url(), &direct(&nodes), &direct(&lame), &lame[0]);
    let links = |servers: &[RedisServer]| -> Vec<Proxy> {
        let links: Vec<Proxy> = servers.iter().map(|server| Proxy::start(server.port())).collect();
        for link in &links {
            link.delay_replies(Duration::from_millis(1));
        }
        links
    };
    let (one, five, others) = (links(std::slice::from_ref(&single)), links(&nodes), links(&lame));
    let urls = |links: &[Proxy]| -> Vec<String> { links.iter().map(Proxy::url).collect() };
    beside_each_other("answers take 1 ms", &one[0].url(), &urls(&five), &urls(&others), &lame[0]);
    println!("\nshare of locks that took more than one round, five nodes");
    for clients in [1, 16] {
        let (locks, rounds) = second_rounds(&direct(&nodes), clients);
        #[expect(clippy::cast_precision_loss, reason = "far below 2^52")]
        let share = rounds as f64 / locks as f64 * 100.0;
        println!("{clients:>4} clients on one lock: {share:>6.2} %  ({rounds} of {locks})");
    }
}

fn beside_each_other(what: &str, single: &str, five: &[String], others: &[String], lame: &RedisServer) {
    let runtime = Builder::new_current_thread().enable_all().build().unwrap();
    let connect = |url: &str| runtime.block_on(leasehold::connect(url)).unwrap();
    let stores = [connect(single), connect(&quorum_url(five)), connect(&quorum_url(others))];
    let mut times: [Vec<Duration>; 3] = Default::default();
    let mut medians: [Vec<Duration>; 3] = Default::default();
    for locks in &stores {
        cycles(&runtime, locks, 50);
    }
    lame.pause();
    // Until it is noticed, which the first locks do.
    cycles(&runtime, &stores[2], 5);
    std::thread::sleep(Duration::from_millis(600));
    for _ in 0..ROUNDS {
        for (number, locks) in stores.iter().enumerate() {
            let mut round = cycles(&runtime, locks, CYCLES);
            times[number].extend_from_slice(&round);
            medians[number].push(percentile(&mut round, 50));
        }
    }
    lame.resume();
    println!("\nlock + unlock, one client, {what}: medians of {ROUNDS} interleaved rounds of {CYCLES}");
    println!("{:>28} {:>10} {:>10} {:>10}", "", "median", "p99", "ratio");
    let single = percentile(&mut medians[0], 50);
    let healthy = percentile(&mut medians[1], 50);
    let rows = [("one server", single), ("five nodes", single), ("five, one standing still", healthy)];
    let p99_healthy = percentile(&mut times[1].clone(), 99);
    for (number, (row, beside)) in rows.into_iter().enumerate() {
        let (median, p99) = (percentile(&mut medians[number], 50), percentile(&mut times[number], 99));
        let ratio = median.as_secs_f64() / beside.as_secs_f64();
        println!("{row:>28} {median:>10.0?} {p99:>10.0?} {ratio:>10.2}");
        if number == 2 {
            println!(
                "{:>28} {:>32.2}",
                "its p99 beside five's",
                p99.as_secs_f64() / p99_healthy.as_secs_f64()
            );
        }
    }
}

fn percentile(times: &mut [Duration], percent: usize) -> Duration {
    times.sort_unstable();
    times[(times.len() - 1) * percent / 100]
}

fn cycles(runtime: &Runtime, locks: &Locks, count: usize) -> Vec<Duration> {
    let mutex = locks.mutex("bench");
    let cycle = |_| {
        let began = Instant::now();
        runtime.block_on(async {
            let guard = mutex.lock().await.unwrap();
            let _ = guard.unlock().await.unwrap();
        });
        began.elapsed()
    };
    (0..count).map(cycle).collect()
}

fn quorum_url(nodes: &[String]) -> String {
    let nodes: Vec<String> = nodes.iter().map(|url| format!("node={url}")).collect();
    format!("quorum:?{}", nodes.join("&"))
}

/// How many locks that many clients had in two seconds, and the rounds beyond the first.
fn second_rounds(urls: &[String], clients: usize) -> (u64, u64) {
    let connections = Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let runtime = Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let stores: Vec<Arc<QuorumStore>> = (0..clients)
        .map(|_| {
            let sources = urls.iter().map(|url| source(url, connections.handle())).collect();
            runtime.block_on(QuorumStore::connect(sources, connections.handle().clone())).unwrap()
        })
        .collect();
    let count = Arc::new(AtomicU64::new(0));
    let end = Instant::now() + Duration::from_secs(2);
    let tasks: Vec<_> = stores
        .iter()
        .map(|store| {
            let (locks, count) = (Locks::over(store.clone()).unwrap(), count.clone());
            runtime.spawn(async move {
                while Instant::now() < end {
                    if let Some(guard) =
                        locks.mutex("contended").lock_for(Duration::from_millis(500)).await.unwrap()
                    {
                        count.fetch_add(1, Ordering::Relaxed);
                        let _ = guard.unlock().await.unwrap();
                    }
                }
            })
        })
        .collect();
    runtime.block_on(async {
        for task in tasks {
            task.await.unwrap();
        }
    });
    (count.load(Ordering::Relaxed), stores.iter().map(|store| store.second_rounds()).sum())
}

fn source(url: &str, runtime: &Handle) -> NodeSource {
    let (url, runtime) = (url.to_owned(), runtime.clone());
    NodeSource::new(url.clone(), move || {
        let (config, runtime) = (RedisConfig::from_url(&url), runtime.clone());
        Box::pin(async move { Ok(RedisStore::connect(config?, runtime).await? as Arc<dyn Store>) })
    })
}
