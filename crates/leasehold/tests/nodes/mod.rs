//! What the tests of the quorum share: servers, a link to each that can be made to fail, and a judge of who held when.
#![allow(unreachable_pub, clippy::unwrap_used, reason = "each test program uses its part")]

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use leasehold::store::Store;
use leasehold::stores::quorum::{NodeSource, QuorumStore};
use leasehold::stores::redis::{RedisConfig, RedisStore};
use leasehold::{Locks, Status, clock};
use leasehold_chaos::checker::{Hold, boot_nanos, first_overlap, first_token_step_back};
use leasehold_chaos::eventually;
use leasehold_chaos::proxy::{Command, Proxy};
use leasehold_chaos::servers::RedisServer;
use pollster::block_on;

pub fn ms(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

/// Independent servers, each behind a link.
pub struct Nodes {
    pub servers: Vec<RedisServer>,
    pub links: Vec<Proxy>,
}

impl Nodes {
    pub fn start(count: usize) -> Self {
        let servers: Vec<RedisServer> = (0..count).map(|_| RedisServer::start()).collect();
        let links = servers.iter().map(|server| Proxy::start(server.port())).collect();
        Self { servers, links }
    }

    /// The quorum by way of the links.
    pub fn url(&self) -> String {
        url_of(&self.links.iter().map(Proxy::url).collect::<Vec<_>>())
    }

    pub fn connect(&self) -> Locks {
        connect(&self.url())
    }

    /// The store itself, and locks over it.
    pub fn store(&self) -> (Arc<QuorumStore>, Locks) {
        let sources = self.links.iter().map(|link| source(&link.url())).collect();
        let store = block_on(QuorumStore::connect(sources, runtime())).unwrap();
        (store.clone(), Locks::over(store).unwrap())
    }

    /// Lets every server learn the scripts, and every connection subscribe once, and counts from here.
    pub fn warm_up(&self, locks: &Locks) {
        let guard = block_on(locks.mutex("warm-up").lock()).unwrap();
        self.settle("warm-up", self.servers.len());
        block_on(guard.unlock()).unwrap();
        self.settle("warm-up", 0);
        self.links.iter().for_each(Proxy::forget);
    }

    /// Waits until so many servers have the lock.
    #[track_caller]
    pub fn settle(&self, name: &str, count: usize) {
        eventually(&format!("{count} servers have {name}"), || self.holders(name).len() == count);
    }

    /// What stands at the lock's key on each server that has it.
    pub fn holders(&self, name: &str) -> Vec<(usize, String)> {
        let values = self.servers.iter().map(|server| server.cli(&["GET", name]));
        values.enumerate().filter(|(_, value)| !value.is_empty()).collect()
    }

    /// The tokens of a lock on the servers that have it.
    pub fn tokens(&self, name: &str) -> Vec<u64> {
        self.holders(name).iter().map(|(_, value)| token_of(value)).collect()
    }

    /// How many commands of each link run the script that presents claims of this lock.
    pub fn presentations(&self, name: &str) -> Vec<usize> {
        self.links.iter().map(|link| link.count(|command| is_acquire(command, name))).collect()
    }
}

/// The token in a lock's value.
pub fn token_of(value: &str) -> u64 {
    value[37..].split(':').next().unwrap().parse().unwrap()
}

/// Whether a command presents a claim of this lock: of all scripts about one lock only that one is given a record.
pub fn is_acquire(command: &Command, name: &str) -> bool {
    command.is_script()
        && command.mentions(name)
        && command.args.iter().any(|arg| arg.starts_with(b"{\"host"))
}

/// Whether a command gives this lock back.
pub fn is_release(command: &Command, name: &str) -> bool {
    command.is_script() && command.args.len() <= 6 && command.mentions(name) && !is_acquire(command, name)
}

pub fn url_of(nodes: &[String]) -> String {
    let nodes: Vec<String> = nodes.iter().map(|url| format!("node={url}")).collect();
    format!("quorum:?{}", nodes.join("&"))
}

pub fn connect(url: &str) -> Locks {
    block_on(leasehold::connect(url)).unwrap()
}

pub fn source(url: &str) -> NodeSource {
    let (url, location) = (url.to_owned(), url.to_owned());
    NodeSource::new(location, move || {
        let url = url.clone();
        Box::pin(async move {
            Ok(RedisStore::connect(RedisConfig::from_url(&url)?, runtime()).await? as Arc<dyn Store>)
        })
    })
}

/// The runtime of every connection that a test makes itself.
pub fn runtime() -> tokio::runtime::Handle {
    static RUNTIME: std::sync::OnceLock<tokio::runtime::Runtime> = std::sync::OnceLock::new();
    RUNTIME
        .get_or_init(|| {
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap()
        })
        .handle()
        .clone()
}

/// Clients that take a lock in turns, each on a thread of its own with a store of its own, and write down when they had it.
pub struct Contest {
    over: Arc<AtomicBool>,
    held: Arc<Mutex<Vec<Hold>>>,
    wins: Arc<AtomicUsize>,
    clients: Vec<JoinHandle<()>>,
}

impl Contest {
    /// One client for each URL.
    pub fn start(urls: &[String], name: &'static str, ttl: Duration) -> Self {
        let contest =
            Self { over: Arc::default(), held: Arc::default(), wins: Arc::default(), clients: Vec::new() };
        let clients = urls.iter().map(|url| {
            let locks = connect(url);
            let (over, held, wins) = (contest.over.clone(), contest.held.clone(), contest.wins.clone());
            std::thread::spawn(move || {
                let mutex = locks.mutex(name).ttl(ttl);
                while !over.load(Ordering::Acquire) {
                    // An outage is an error, and the next try comes after a little.
                    let Ok(Some(guard)) = block_on(mutex.lock_for(ms(1_000))) else {
                        block_on(clock::sleep(ms(5)));
                        continue;
                    };
                    let start = boot_nanos();
                    block_on(clock::sleep(clock::jitter(ms(3))));
                    let end = boot_nanos();
                    // Read after the end: it was held at that moment, by what the holder knows.
                    if guard.status() != Status::Lost {
                        let token = guard.fencing_token().get();
                        held.lock().unwrap().push(Hold { start, end, token });
                        wins.fetch_add(1, Ordering::AcqRel);
                    }
                    let _ = block_on(guard.unlock());
                }
            })
        });
        let clients = clients.collect();
        Self { clients, ..contest }
    }

    /// Waits until the lock was had so many times more.
    #[track_caller]
    pub fn goes_on(&self, more: usize) {
        let from = self.wins.load(Ordering::Acquire);
        eventually("the lock is had again", || self.wins.load(Ordering::Acquire) >= from + more);
    }

    /// Ends it and judges: never two holders (`one_holder`), and tokens that grow (`token_order`).
    #[track_caller]
    pub fn judge(self) -> usize {
        self.over.store(true, Ordering::Release);
        self.clients.into_iter().for_each(|client| client.join().unwrap());
        let mut held = std::mem::take(&mut *self.held.lock().unwrap());
        assert_eq!(first_overlap(&mut held), None, "two holders at one time");
        assert_eq!(first_token_step_back(&mut held), None, "a token that does not grow");
        held.len()
    }
}
