//! The store contract, clause by clause, on every store.

use std::sync::{Arc, Mutex, PoisonError, Weak};

use leasehold::Locks;
use leasehold::conformance::CLAUSES;
use leasehold::store::Store;
use leasehold::stores::memory::MemoryStore;
use leasehold::stores::redis::{ClusterConfig, ClusterStore, RedisConfig, RedisStore};
use leasehold::stores::sqlite::{Options, SqliteStore};
use leasehold_chaos::cluster::Cluster;
use leasehold_chaos::servers::RedisServer;

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

async fn redis() -> (RedisServer, Arc<dyn Store>) {
    let server = RedisServer::start();
    let config = RedisConfig::from_url(&server.url()).expect("a URL of ours");
    let store = RedisStore::connect(config, tokio::runtime::Handle::current()).await.expect("it runs");
    (server, store)
}

#[expect(clippy::unused_async, reason = "every store is made in the same way")]
async fn sqlite() -> (tempfile::TempDir, Arc<dyn Store>) {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let store = SqliteStore::open(&folder.path().join("locks.db"), &Options::default()).expect("it opens");
    (folder, Arc::new(store))
}

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

suite!(memory, memory());
suite!(redis, redis());
suite!(redis_cluster, redis_cluster());
suite!(sqlite, sqlite());

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
