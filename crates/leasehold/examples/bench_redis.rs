//! Measures the Redis store beside the same two round trips sent raw by the same client crate, in one run.
//!
//! `cargo run --release -p leasehold --example bench_redis [SECONDS]` starts a redis-server of its own. Only the ratios
//! mean anything: absolute times depend on where the scheduler puts client and server.
#![allow(
    clippy::disallowed_methods,
    clippy::unwrap_used,
    reason = "a measuring program reads the clock and may panic"
)]

use std::io::{BufRead, BufReader};
use std::net::TcpListener;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use leasehold::clock;
use leasehold::store::Store;
use leasehold::stores::redis::{RedisConfig, RedisStore};
use leasehold::{Acquired, Claim, Held, Name, Record, Released};
use redis::aio::MultiplexedConnection;

const ROUNDS: usize = 3;
const TASKS: [usize; 3] = [1, 64, 512];
const COMPARE_DELETE: &str =
    "if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) else return 0 end";

struct Server(Child, u16);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn server() -> Server {
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let mut child = Command::new("redis-server")
        .args(["--port", &port.to_string(), "--bind", "127.0.0.1", "--save", "", "--dir"])
        .arg(std::env::temp_dir())
        .stdout(Stdio::piped())
        .spawn()
        .expect("redis-server is needed: apt-get install redis-server");
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines().map_while(Result::ok);
    assert!(lines.any(|line| line.contains("eady to accept")), "redis-server did not start");
    std::thread::spawn(move || lines.for_each(drop));
    Server(child, port)
}

/// A runtime on a thread of its own, for a connection's driver.
fn driver() -> tokio::runtime::Handle {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let handle = runtime.handle().clone();
    std::thread::spawn(move || runtime.block_on(std::future::pending::<()>()));
    handle
}

#[derive(Clone)]
enum Contestant {
    Raw(MultiplexedConnection, Arc<str>),
    Store(Arc<RedisStore>, Arc<str>),
}

impl Contestant {
    async fn cycle(&mut self, name: &Name) {
        match self {
            Self::Raw(connection, digest) => {
                let id = clock::claim_id().to_string();
                let mut set = redis::cmd("SET");
                set.arg(name.as_bytes()).arg(&id).arg("NX").arg("PX").arg(30_000);
                connection.send_packed_command(&set).await.unwrap();
                let mut delete = redis::cmd("EVALSHA");
                delete.arg(&**digest).arg(1).arg(name.as_bytes()).arg(&id);
                assert_eq!(connection.send_packed_command(&delete).await.unwrap(), redis::Value::Int(1));
            }
            Self::Store(store, record) => {
                let claim = Claim::new(name.clone(), clock::claim_id(), Duration::from_secs(30))
                    .with_record(record.clone());
                let Acquired::Granted(grant) = store.acquire(&claim).await.unwrap() else {
                    panic!("not granted")
                };
                assert_eq!(store.release(&Held::new(&claim, &grant)).await.unwrap(), Released::Released);
            }
        }
    }
}

/// Cycles a second.
fn measure(contestant: &Contestant, tasks: usize, span: Duration, threads: usize) -> f64 {
    let mut builder = match threads {
        1 => tokio::runtime::Builder::new_current_thread(),
        _ => tokio::runtime::Builder::new_multi_thread(),
    };
    if threads > 1 {
        builder.worker_threads(threads);
    }
    let runtime = builder.enable_all().build().unwrap();
    runtime.block_on(async {
        let start = Instant::now();
        let workers: Vec<_> = (0..tasks)
            .map(|number| {
                let mut contestant = contestant.clone();
                tokio::spawn(async move {
                    let mut cycles = 0_u64;
                    let name = Name::new(format!("lock-{number}")).unwrap();
                    while start.elapsed() < span {
                        contestant.cycle(&name).await;
                        cycles += 1;
                    }
                    cycles
                })
            })
            .collect();
        let mut cycles = 0;
        for worker in workers {
            cycles += worker.await.unwrap();
        }
        #[expect(clippy::cast_precision_loss, reason = "a rate")]
        let rate = cycles as f64 / start.elapsed().as_secs_f64();
        rate
    })
}

/// Commands that clients sent: scripts, as the store sends nothing else here.
fn commands(stats: &mut redis::Connection) -> f64 {
    let text: String = redis::cmd("INFO").arg("commandstats").query(stats).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix("cmdstat_evalsha:calls=")).unwrap_or("0");
    line.split(',').next().unwrap().parse().unwrap()
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn main() {
    let seconds = std::env::args().nth(1).map_or(2.0, |text| text.parse().expect("a number of seconds"));
    let span = Duration::from_secs_f64(seconds);
    let server = server();
    let url = format!("redis://127.0.0.1:{}", server.1);
    let handle = driver();
    let tcp = redis::io::tcp::TcpSettings::default().set_nodelay(true);
    let info: redis::ConnectionInfo = url.parse().unwrap();
    let client = redis::Client::open(info.set_tcp_settings(tcp)).unwrap();
    let options = redis::AsyncConnectionConfig::new().set_response_timeout(None);
    let dialled =
        handle.spawn(async move { client.get_multiplexed_async_connection_with_config(&options).await });
    let (connection, digest, store) = pollster::block_on(async {
        let mut connection = dialled.await.unwrap().unwrap();
        let mut load = redis::cmd("SCRIPT");
        load.arg("LOAD").arg(COMPARE_DELETE);
        let digest: String = load.query_async(&mut connection).await.unwrap();
        let store = RedisStore::connect(RedisConfig::from_url(&url).unwrap(), driver()).await.unwrap();
        (connection, digest, store)
    });
    let record =
        Record { host: "worker-17".into(), pid: 4821, label: Some("nightly".into()), ..Record::default() };
    let raw = Contestant::Raw(connection, digest.into());
    let ours = Contestant::Store(store, record.encode().into());
    let mut stats = redis::Client::open(url.as_str()).unwrap().get_connection().unwrap();
    // `bench_redis SECONDS TASKS` runs the store alone with so many tasks, for a profiler.
    if let Some(tasks) = std::env::args().nth(2) {
        println!("{:.0}/s", measure(&ours, tasks.parse().expect("a number of tasks"), span, 1));
        return;
    }
    for threads in [1, 2] {
        for tasks in TASKS {
            let (mut raws, mut stores, mut sent) = (Vec::new(), Vec::new(), Vec::new());
            for _ in 0..ROUNDS {
                raws.push(measure(&raw, tasks, span, threads));
                let before = commands(&mut stats);
                stores.push(measure(&ours, tasks, span, threads));
                sent.push((commands(&mut stats) - before) / (stores[stores.len() - 1] * seconds));
            }
            let (raw, ours) = (median(&mut raws), median(&mut stores));
            println!(
                "{threads} caller threads, {tasks:>3} tasks: raw {raw:>9.0}/s, store {ours:>9.0}/s, throughput {:.2} of raw, wall time {:.2} of raw, {:.2} commands a cycle",
                ours / raw,
                raw / ours,
                median(&mut sent)
            );
        }
    }
}
