//! The store contract, clause by clause, on every store.

use std::sync::{Arc, Mutex, PoisonError, Weak};

use leasehold::Locks;
use leasehold::conformance::CLAUSES;
use leasehold::store::Store;
use leasehold::stores::memory::MemoryStore;
use leasehold::stores::quorum::{NodeSource, QuorumStore};
use leasehold::stores::redis::{ClusterConfig, ClusterStore, RedisConfig, RedisStore};
use leasehold::stores::ring::{Node, RingStore};
use leasehold::stores::sqlite::{Options, SqliteStore};
use leasehold_chaos::cluster::Cluster;
use leasehold_chaos::sentinel::Deployment;
use leasehold_chaos::servers::{RedisServer, default_program};

/// One test for each clause; the list is compared with `CLAUSES` below.
macro_rules! suite {
    ($store:ident, $make:expr) => {
        mod $store {
            use super::*;
            suite! { @each $store, $make;
                one_holder same_claim_same_grant release_by_a_stranger_changes_nothing releasing_again_is_an_answer
                an_unrenewed_claim_becomes_free renewing_after_a_loss_says_lost tokens_grow
                the_line_is_served_in_order a_cancelled_acquire_leaves_nothing
                a_late_request_creates_nothing names_never_collide leases_are_bounded_and_counted_from_before
                a_dead_waiter_delays_nobody_for_long
            }
        }
    };
    (@each $store:ident, $make:expr; $($clause:ident)*) => {
        $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
        async fn $clause() {
            let (_server, store) = $make.await;
            leasehold::conformance::$clause(&*store).await;
        })*

        #[test]
        fn no_clause_is_forgotten() {
            let here = [$(stringify!($clause)),*];
            let all: Vec<_> = CLAUSES.iter().map(|clause| clause.name).collect();
            assert_eq!(here[..], all[..]);
        }
    };
}

#[expect(clippy::unused_async, reason = "every store is made in the same way")]
async fn memory() -> ((), Arc<dyn Store>) {
    ((), Arc::new(MemoryStore::new()))
}

async fn redis(program: &str) -> (RedisServer, Arc<dyn Store>) {
    let server = RedisServer::builder().program(program).start();
    let config = RedisConfig::from_url(&server.url()).expect("a URL of ours");
    let store = RedisStore::connect(config, tokio::runtime::Handle::current()).await.expect("it runs");
    (server, store)
}

/// One deployment for all clauses that run at the same time: it takes seconds to come up.
async fn redis_sentinel() -> (Arc<Deployment>, Arc<dyn Store>) {
    static SHARED: Mutex<Weak<Deployment>> = Mutex::new(Weak::new());
    let deployment = {
        let mut shared = SHARED.lock().unwrap_or_else(PoisonError::into_inner);
        shared.upgrade().unwrap_or_else(|| {
            let deployment = Arc::new(Deployment::start());
            *shared = Arc::downgrade(&deployment);
            deployment
        })
    };
    let config = RedisConfig::from_url(&deployment.url()).expect("a URL of ours");
    let store = RedisStore::connect(config, tokio::runtime::Handle::current()).await.expect("it runs");
    (deployment, store)
}

#[expect(clippy::unused_async, reason = "every store is made in the same way")]
async fn sqlite() -> (tempfile::TempDir, Arc<dyn Store>) {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let store = SqliteStore::open(&folder.path().join("locks.db"), &Options::default()).expect("it opens");
    (folder, Arc::new(store))
}

/// Redis servers of this test's own, and a ring over them.
async fn ring_of(members: &[fn(Node) -> Node]) -> (Vec<RedisServer>, Arc<dyn Store>) {
    let (mut servers, mut nodes) = (Vec::new(), Vec::new());
    for member in members {
        let (server, store) = redis(&default_program()).await;
        servers.push(server);
        nodes.push(member(Node::new(store)));
    }
    (servers, Arc::new(RingStore::new(nodes).expect("a ring")))
}

async fn ring() -> (Vec<RedisServer>, Arc<dyn Store>) {
    ring_of(&[|node| node, |node| node, |node| node]).await
}

/// Every name moves from one server to another.
async fn moving() -> (Vec<RedisServer>, Arc<dyn Store>) {
    ring_of(&[Node::removing, Node::adding]).await
}

/// A quorum over so many servers, of which the first `dead` are killed after it was connected.
async fn quorum(nodes: usize, dead: usize) -> (Vec<RedisServer>, Arc<dyn Store>) {
    let mut servers: Vec<RedisServer> = (0..nodes).map(|_| RedisServer::start()).collect();
    let runtime = tokio::runtime::Handle::current();
    let node = |server: &RedisServer| {
        let (url, runtime) = (server.url(), runtime.clone());
        NodeSource::new(server.url(), move || {
            let (config, runtime) = (RedisConfig::from_url(&url).expect("a URL of ours"), runtime.clone());
            Box::pin(async move { Ok(RedisStore::connect(config, runtime).await? as Arc<dyn Store>) })
        })
    };
    let store = QuorumStore::connect(servers.iter().map(node).collect(), runtime.clone()).await;
    servers[..dead].iter_mut().for_each(RedisServer::kill9);
    (servers, store.expect("they run"))
}

suite!(quorum, quorum(5, 0));
suite!(quorum_with_a_dead_node, quorum(5, 1));
suite!(quorum_of_four, quorum(4, 0));
suite!(memory, memory());
suite!(redis, redis(&default_program()));
suite!(redis_8, redis("redis-8"));
suite!(valkey_8, redis("valkey-8"));
suite!(valkey_9, redis("valkey-9"));
suite!(redis_sentinel, redis_sentinel());
/// One cluster for the clauses that run at a time; the last of them ends it.
async fn redis_cluster() -> (Arc<Cluster>, Arc<dyn Store>) {
    static SHARED: Mutex<Weak<Cluster>> = Mutex::new(Weak::new());
    let cluster = {
        let mut shared = SHARED.lock().unwrap_or_else(PoisonError::into_inner);
        shared.upgrade().unwrap_or_else(|| {
            let cluster = Arc::new(Cluster::start());
            *shared = Arc::downgrade(&cluster);
            cluster
        })
    };
    let config = ClusterConfig::from_url(&cluster.url()).expect("a URL of ours");
    let store = ClusterStore::connect(config, tokio::runtime::Handle::current()).await.expect("it runs");
    (cluster, store)
}

suite!(redis_cluster, redis_cluster());
suite!(sqlite, sqlite());
suite!(ring, ring());
suite!(ring_that_changes, moving());

#[test]
fn every_clause_of_the_contract_has_a_check() {
    let contract = include_str!("../src/store.rs");
    let written: Vec<u8> = contract
        .lines()
        .filter_map(|line| line.strip_prefix("//! ")?.split_once(". ")?.0.parse().ok())
        .collect();
    let checked: Vec<u8> = CLAUSES.iter().map(|clause| clause.number).collect();
    assert_eq!(written, checked);
    assert_eq!(checked, (1..=13).collect::<Vec<u8>>());
}

#[test]
fn no_store_is_forgotten() {
    let stores = include_str!("../src/stores/mod.rs");
    let suites = include_str!("conformance.rs");
    let mut seen = 0;
    for store in stores.lines().filter_map(|line| line.strip_prefix("pub mod ")?.strip_suffix(';')) {
        seen += 1;
        assert!(suites.contains(&format!("\nsuite!({store}, ")), "the contract is not run on {store}");
    }
    assert!(seen >= 1);
    let _: fn(Arc<dyn Store>) -> leasehold::Result<Locks> = Locks::over;
}
