//! How long a lock takes from one holder to the next, on one Redis server: beside the round trip of a PING on a connection
//! of the same kind, in the same run. Prints medians and ratios; asserts nothing.
//!
//! `cargo run --release -p leasehold-bench --bin handoff`
#![allow(clippy::disallowed_methods, reason = "a benchmark measures with the monotonic clock")]
#![expect(clippy::unwrap_used, reason = "a benchmark has nobody to report to")]

use std::io::Write;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use leasehold::{Fairness, Locks};
use leasehold_chaos::servers::RedisServer;
use redis::{AsyncConnectionConfig, IntoConnectionInfo};
use tokio::sync::Barrier;

const SPAN: Duration = Duration::from_secs(4);

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [_, "worker", url, name, passes, tasks, hold_us, span_ms] => worker(
            url,
            name,
            passes.parse().unwrap(),
            tasks.parse().unwrap(),
            Duration::from_micros(hold_us.parse().unwrap()),
            Duration::from_millis(span_ms.parse().unwrap()),
        ),
        _ => report(),
    }
}

fn report() {
    let server = RedisServer::start();
    let url = server.url();
    for round in 1..=3 {
        let ping = ping(&url);
        println!("round {round}: PING after PING {ping:.1} us (median)");
        let mut seen = run(&url, &format!("two:{round}"), 0, 2, 1, Duration::from_millis(1));
        let (median, p99) = seen.handoffs();
        let beside = quantile(&mut seen.pings, 0.5);
        println!(
            "  two processes, 1 ms hold: PING while holding {beside:.1} us (median); hand-off {median:.1} us = {:.2} of it (median), \
             {p99:.1} us = {:.2} of it (p99), {} holds",
            median / beside,
            p99 / beside,
            seen.holds.len()
        );
        let mut fifo = None;
        for (processes, tasks, passes) in [(1, 128, 0), (8, 16, 0), (1, 128, 100)] {
            let name = format!("crowd:{round}:{processes}:{passes}");
            let seen = run(&url, &name, passes, processes, tasks, Duration::ZERO);
            let rate = seen.rate();
            let fifo = *fifo.get_or_insert(rate);
            let order = match passes {
                0 => String::new(),
                _ => format!(", local first ({passes}): {:.1} x Fifo", rate / fifo),
            };
            println!(
                "  {processes} x {tasks} tasks, empty section: {rate:.0} holds/s = {:.2} per PING after PING, {:.2} per PING while holding; Jain {:.4}{order}",
                rate * ping / 1e6,
                rate * beside / 1e6,
                seen.jain()
            );
        }
    }
}

/// A connection whose driver is on another thread, as Leasehold's is.
fn connect_raw(url: &str) -> (tokio::runtime::Runtime, redis::aio::MultiplexedConnection) {
    let driver = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let info = url.into_connection_info().unwrap();
    let info = info.clone().set_tcp_settings(info.tcp_settings().clone().set_nodelay(true));
    let connection = driver
        .block_on(driver.spawn(async move {
            let config = AsyncConnectionConfig::new().set_response_timeout(None);
            redis::Client::open(info)
                .unwrap()
                .get_multiplexed_async_connection_with_config(&config)
                .await
                .unwrap()
        }))
        .unwrap();
    (driver, connection)
}

/// Median of a PING, one after the other.
fn ping(url: &str) -> f64 {
    let (driver, mut connection) = connect_raw(url);
    let caller = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let mut times = caller.block_on(async {
        let mut times = Vec::new();
        for _ in 0..4_000 {
            times.push(one_ping(&mut connection).await);
        }
        times
    });
    drop(connection);
    driver.shutdown_background();
    quantile(&mut times, 0.5)
}

async fn one_ping(connection: &mut redis::aio::MultiplexedConnection) -> f64 {
    let began = Instant::now();
    let _: String = redis::cmd("PING").query_async(connection).await.unwrap();
    began.elapsed().as_secs_f64() * 1e6
}

fn quantile(values: &mut [f64], share: f64) -> f64 {
    values.sort_by(f64::total_cmp);
    #[expect(
        clippy::cast_precision_loss,
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "an index"
    )]
    values[((values.len() - 1) as f64 * share) as usize]
}

/// One hold: its token, who had it, and when it was had and given back, in nanoseconds of the machine's monotonic clock.
#[derive(Clone, Copy)]
struct Hold {
    token: u64,
    who: usize,
    had: u64,
    gave: u64,
}

struct Seen {
    pings: Vec<f64>,
    holds: Vec<Hold>,
    workers: usize,
}

#[expect(clippy::cast_precision_loss, reason = "far below 2^52")]
impl Seen {
    fn handoffs(&self) -> (f64, f64) {
        let pairs = self.holds.windows(2).filter(|pair| pair[0].who != pair[1].who);
        let mut times: Vec<f64> =
            pairs.map(|pair| pair[1].had.saturating_sub(pair[0].gave) as f64 / 1e3).collect();
        (quantile(&mut times, 0.5), quantile(&mut times, 0.99))
    }

    fn rate(&self) -> f64 {
        let (first, last) = (self.holds[0].had, self.holds[self.holds.len() - 1].gave);
        self.holds.len() as f64 * 1e9 / (last - first) as f64
    }

    fn jain(&self) -> f64 {
        let mut counts = vec![0.0; self.workers];
        self.holds.iter().for_each(|hold| counts[hold.who] += 1.0);
        let sum: f64 = counts.iter().sum();
        sum * sum / (counts.len() as f64 * counts.iter().map(|count| count * count).sum::<f64>())
    }
}

fn run(url: &str, name: &str, passes: u32, processes: usize, tasks: usize, hold: Duration) -> Seen {
    let program = std::env::current_exe().unwrap();
    let workers: Vec<Child> = (0..processes)
        .map(|_| {
            Command::new(&program)
                .args(["worker", url, name, &passes.to_string(), &tasks.to_string()])
                .args([hold.as_micros().to_string(), SPAN.as_millis().to_string()])
                .stdout(Stdio::piped())
                .spawn()
                .unwrap()
        })
        .collect();
    let (mut holds, mut pings) = (Vec::new(), Vec::new());
    for (process, worker) in workers.into_iter().enumerate() {
        let text = String::from_utf8(worker.wait_with_output().unwrap().stdout).unwrap();
        for line in text.lines() {
            if let Some(micros) = line.strip_prefix("ping ") {
                pings.push(micros.parse().unwrap());
                continue;
            }
            let numbers: Vec<u64> = line.split(' ').map(|number| number.parse().unwrap()).collect();
            let who = process * tasks + usize::try_from(numbers[1]).unwrap();
            holds.push(Hold { token: numbers[0], who, had: numbers[2], gave: numbers[3] });
        }
    }
    holds.sort_by_key(|hold| hold.token);
    // Without the start and the end, when not everybody is there.
    let edge = holds.len() / 10;
    Seen { pings, holds: holds[edge..holds.len() - edge].to_vec(), workers: processes * tasks }
}

fn nanos() -> u64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    u64::try_from(time.tv_sec).unwrap() * 1_000_000_000 + u64::try_from(time.tv_nsec).unwrap()
}

/// Locks and unlocks with so many tasks, passing on so often (0: never), and prints each hold at the end.
fn worker(url: &str, name: &str, passes: u32, tasks: usize, hold: Duration, span: Duration) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let (_driver, connection) = connect_raw(url);
    let holds = runtime.block_on(async {
        let locks: Locks = leasehold::connect(url).await.unwrap();
        let ready = Arc::new(Barrier::new(tasks));
        let ends = Instant::now() + span;
        let running: Vec<_> = (0..tasks)
            .map(|task| {
                let mutex = locks.mutex(name).fairness(Fairness::LocalFirst { max: passes });
                let (ready, mut connection) = (ready.clone(), connection.clone());
                tokio::spawn(async move {
                    ready.wait().await;
                    let mut holds = Vec::new();
                    while Instant::now() < ends {
                        let guard = mutex.lock().await.unwrap();
                        let had = nanos();
                        let mut ping = None;
                        if !hold.is_zero() {
                            // As rested as the waiter whose turn comes next.
                            tokio::time::sleep(hold / 2).await;
                            ping = Some(one_ping(&mut connection).await);
                            tokio::time::sleep(hold / 2).await;
                        }
                        let (token, gave) = (guard.fencing_token().get(), nanos());
                        let _ = guard.unlock().await.unwrap();
                        holds.push((token, task, had, gave, ping));
                        if !hold.is_zero() {
                            // The next holder's first moments are its own.
                            tokio::time::sleep(hold / 4).await;
                        }
                    }
                    holds
                })
            })
            .collect();
        let mut all = Vec::new();
        for task in running {
            all.extend(task.await.unwrap());
        }
        all
    });
    let mut out = std::io::BufWriter::new(std::io::stdout().lock());
    for (token, task, had, gave, ping) in holds {
        writeln!(out, "{token} {task} {had} {gave}").unwrap();
        if let Some(ping) = ping {
            writeln!(out, "ping {ping}").unwrap();
        }
    }
}
