//! A store that panics, falls silent, grants little or loses answers: what that may cost, and what it may not.

#![allow(clippy::disallowed_methods, clippy::unwrap_used)]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use leasehold::store::Store;
use leasehold::stores::memory::{Fault, MemoryStore, Verb};
use leasehold::{
    Acquired, Claim, ErrorKind, Finding, Guarantees, Held, Holder, LockView, Locks, Loss, Name, Page, Query,
    Released, Renewal, Result, Status, Ticket, Woken, clock,
};

fn ms(millis: u64) -> Duration {
    Duration::from_millis(millis)
}
fn memory() -> (Arc<MemoryStore>, Locks) {
    let store = Arc::new(MemoryStore::new());
    let locks = Locks::over(store.clone()).unwrap();
    (store, locks)
}
async fn holder(store: &dyn Store, name: &str) -> Option<Holder> {
    let query = Query::One(Name::new(name).unwrap());
    store.inspect(&query).await.unwrap().items.remove(0).holder
}

/// A store that panics, never answers, or is disturbed without end, when told to.
#[derive(Debug, Default)]
struct Bad {
    inner: MemoryStore,
    panic_in_renew: AtomicBool,
    panic_in_release: AtomicBool,
    silent: AtomicBool,
    restless: AtomicBool,
    renewals: AtomicUsize,
}
#[async_trait::async_trait]
impl Store for Bad {
    async fn acquire(&self, claim: &Claim) -> Result<Acquired> {
        if self.silent.load(Ordering::SeqCst) {
            std::future::pending::<()>().await;
        }
        self.inner.acquire(claim).await
    }
    async fn woken(&self, ticket: &Ticket) -> Woken {
        self.inner.woken(ticket).await
    }
    async fn renew(&self, held: &[Held]) -> Vec<Result<Renewal>> {
        self.renewals.fetch_add(1, Ordering::SeqCst);
        assert!(!self.panic_in_renew.swap(false, Ordering::SeqCst), "a fault of the store");
        self.inner.renew(held).await
    }
    async fn release(&self, held: &Held) -> Result<Released> {
        assert!(!self.panic_in_release.swap(false, Ordering::SeqCst), "a fault of the store");
        self.inner.release(held).await
    }
    async fn disturbed(&self) {
        let pause = if self.restless.load(Ordering::SeqCst) { ms(1) } else { ms(3_600_000) };
        clock::sleep(pause).await;
    }
    async fn inspect(&self, query: &Query) -> Result<Page<LockView>> {
        self.inner.inspect(query).await
    }
    fn guarantees(&self) -> Guarantees {
        self.inner.guarantees()
    }
    fn location(&self) -> Arc<str> {
        self.inner.location()
    }
    async fn diagnose(&self) -> Vec<Finding> {
        self.inner.diagnose().await
    }
    fn lifeline(&self) -> Option<Arc<std::fs::File>> {
        None
    }
}

#[tokio::test]
async fn a_store_that_panics_while_renewing_costs_one_renewal_and_no_unlock() {
    let store = Arc::new(Bad::default());
    let locks = Locks::over(store.clone()).unwrap();
    let guard = locks.mutex("a").ttl(ms(5000)).lock().await.unwrap();
    store.panic_in_renew.store(true, Ordering::SeqCst);
    guard.changed().await;
    assert_eq!(guard.status(), Status::Unsure, "told of the renewal that failed");
    while guard.status() == Status::Unsure {
        guard.changed().await;
    }
    assert_eq!(guard.status(), Status::Held, "renewed again");
    let released =
        clock::timeout_at(clock::now().plus(ms(20_000)), guard.unlock()).await.expect("does not hang");
    assert_eq!(released.unwrap(), Released::Released);
}

#[tokio::test]
async fn a_store_that_is_disturbed_without_end_makes_no_storm_of_renewals() {
    let store = Arc::new(Bad::default());
    store.restless.store(true, Ordering::SeqCst);
    let locks = Locks::over(store.clone()).unwrap();
    let guard = locks.mutex("a").ttl(ms(600_000)).lock().await.unwrap();
    let began = clock::now();
    // Of its own it is renewed once in this time, and then after a minute.
    while store.renewals.load(Ordering::SeqCst) < 8 {
        guard.changed().await;
        assert_eq!(guard.status(), Status::Held);
    }
    let took = clock::now().since(began);
    assert!(took > ms(1_500), "renewed eight times in {took:?}");
}

#[tokio::test]
async fn a_store_that_panics_while_releasing_does_not_hang_close() {
    let store = Arc::new(Bad::default());
    let locks = Locks::over(store.clone()).unwrap();
    let guard = locks.mutex("a").ttl(ms(5000)).lock().await.unwrap();
    store.panic_in_release.store(true, Ordering::SeqCst);
    drop(guard);
    clock::timeout_at(clock::now().plus(ms(20_000)), locks.close()).await.expect("does not hang");
}

#[tokio::test]
async fn a_store_that_grants_far_less_than_asked_is_renewed_in_time() {
    let (store, locks) = memory();
    store.grant_at_most(ms(1000));
    let guard = locks.mutex("a").lock().await.unwrap();
    clock::sleep(ms(2500)).await;
    assert_ne!(guard.status(), Status::Lost);
}

#[tokio::test]
async fn the_store_frees_a_lock_whose_maximum_hold_is_shorter_than_its_ttl() {
    let (store, locks) = memory();
    let guard = locks.mutex("a").max_hold(ms(500)).lock().await.unwrap();
    assert_eq!(guard.lost().await, Loss::MaxHold);
    clock::sleep(ms(500)).await;
    assert!(holder(&*store, "a").await.is_none(), "the store frees it, though the guard is not dropped");
}

#[tokio::test]
async fn a_release_is_tried_for_as_long_as_an_unanswered_renewal_may_have_extended_the_lease() {
    let (store, locks) = memory();
    let guard = locks.mutex("a").ttl(ms(6000)).lock().await.unwrap();
    // The store extends; the holder does not hear of it until it gives up.
    store.inject(Verb::Renew, std::iter::repeat_n(Fault::LoseReply, 1000));
    assert_eq!(guard.lost().await, Loss::Expired);
    assert!(holder(&*store, "a").await.is_some());
    // The link is down for two seconds more.
    store.inject(Verb::Release, std::iter::repeat_n(Fault::Refuse, 1000));
    drop(guard);
    clock::sleep(ms(2500)).await;
    let left = holder(&*store, "a").await.unwrap().remaining.unwrap();
    assert!(left > ms(1500), "{left:?}");
    let before = store.calls(Verb::Release);
    clock::sleep(ms(1200)).await;
    assert!(store.calls(Verb::Release) > before, "nobody tries any more, {left:?} before the lease ends");
}

#[tokio::test]
async fn a_store_that_never_answered_is_not_told_as_busy() {
    let store = Arc::new(Bad::default());
    let locks = Locks::over(store.clone()).unwrap();
    store.silent.store(true, Ordering::SeqCst);
    let error = locks.mutex("a").lock_for(ms(100)).await.expect_err("nobody said that somebody has it");
    assert_eq!(error.kind(), ErrorKind::Unknown);
}

#[tokio::test]
async fn a_listing_takes_any_limit() {
    let (_store, locks) = memory();
    let _guard = locks.mutex("a").lock().await.unwrap();
    let query = Query::Prefix { prefix: vec![], after: None, limit: usize::MAX };
    assert_eq!(locks.inspect(&query).await.unwrap().items.len(), 1);
}
