//! Keeper, guard and mutex over the strict memory store: the bad days that need no server.

#![allow(clippy::unwrap_used)]

use std::collections::HashSet;
use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::task::{Context, Waker};
use std::time::Duration;

use leasehold::store::Store;
use leasehold::stores::memory::{Fault, MemoryStore, Verb};
use leasehold::{Claim, ErrorKind, FencingToken, Locks, Loss, Query, Released, Retry, Status, clock};

mod yielding;
use yielding::{Yielding, drop_after};

fn ms(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

fn memory() -> (Arc<MemoryStore>, Locks) {
    let store = Arc::new(MemoryStore::new());
    let locks = Locks::over(store.clone()).unwrap();
    (store, locks)
}

async fn holder_of(store: &MemoryStore, name: &str) -> Option<leasehold::ClaimId> {
    let query = Query::One(leasehold::Name::new(name).unwrap());
    store.inspect(&query).await.unwrap().items.remove(0).holder.and_then(|holder| holder.id)
}

/// Waits for a condition that the keeper brings about, by looking, for ten seconds at most.
async fn until<F: Future<Output = bool>>(what: &str, mut holds: impl FnMut() -> F) {
    let latest = clock::now().plus(Duration::from_secs(10));
    while !holds().await {
        assert!(clock::now() < latest, "did not come about: {what}");
        clock::sleep(ms(2)).await;
    }
}

#[tokio::test]
async fn lock_try_lock_lock_for_unlock() {
    let (_store, locks) = memory();
    let mutex = locks.mutex("a").label("why").metadata("k", "v");
    let guard = mutex.lock().await.unwrap();
    assert_eq!(guard.status(), Status::Held);
    assert!(guard.remaining() > Duration::from_secs(29) && guard.remaining() < Duration::from_secs(30));
    assert!(mutex.try_lock().await.unwrap().is_none());
    assert!(mutex.lock_for(ms(30)).await.unwrap().is_none());
    assert_eq!(locks.show("a").await.unwrap().waiters, 0, "it has left the line before it says so");
    let busy = mutex.clone().retry(Retry::constant(ms(1)).at_most(3)).lock().await.unwrap_err();
    assert_eq!(busy.kind(), ErrorKind::Busy);
    assert!(busy.to_string().contains("\"why\""), "it says who: {busy}");
    let first = guard.fencing_token();
    assert_eq!(guard.unlock().await.unwrap(), Released::Released);
    // Those who gave up just now have left the line: the lock is handed to none of them.
    let guard = mutex.try_lock().await.unwrap().unwrap();
    assert!(guard.fencing_token() > first);
    let view = locks.show("a").await.unwrap();
    let record = view.holder.unwrap().record.unwrap();
    assert_eq!((record.label.as_deref(), record.metadata["k"].as_str()), (Some("why"), "v"));
    assert_eq!(record.pid, std::process::id());
}

#[tokio::test]
async fn bad_input_is_refused_before_any_io() {
    let (store, locks) = memory();
    for name in [String::new(), "leasehold:x".into(), "x".repeat(10 << 20)] {
        let error = locks.mutex(&name).lock().await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid);
        assert!(error.to_string().len() < 300);
        assert_eq!(locks.show(&name).await.unwrap_err().kind(), ErrorKind::Invalid);
    }
    for ttl in [Duration::ZERO, ms(1), Duration::MAX] {
        let error = locks.mutex("a").ttl(ttl).try_lock().await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid);
    }
    let error = locks.mutex("a").metadata("k", "v".repeat(5000)).lock().await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid);
    assert_eq!(store.calls(Verb::Acquire), 0);
    let year = locks.mutex("a").ttl(Duration::from_secs(365 * 24 * 3600)).lock().await.unwrap();
    assert!(year.remaining() > Duration::from_secs(300 * 24 * 3600));
    let bytes = locks.mutex(b"\xff\xfe\x00").lock().await.unwrap();
    assert_eq!(bytes.name().as_bytes(), b"\xff\xfe\x00");
    assert_eq!(bytes.extend(Duration::MAX).await.unwrap_err().kind(), ErrorKind::Invalid);
}

#[tokio::test]
async fn a_guard_is_renewed_and_an_unrenewed_one_ends() {
    let (store, locks) = memory();
    let kept = locks.mutex("kept").ttl(ms(200)).lock().await.unwrap();
    let left_alone = locks.mutex("alone").ttl(ms(200)).renew(false).lock().await.unwrap();
    let loss = left_alone.lost().await;
    assert_eq!(loss, Loss::Expired);
    assert_eq!(left_alone.status(), Status::Lost);
    assert_eq!(left_alone.remaining(), Duration::ZERO);
    // Told before the store gave it away: nobody else can have it in this moment.
    until("the store frees it", || async { holder_of(&store, "alone").await.is_none() }).await;
    assert_eq!(kept.status(), Status::Held);
    assert_eq!(left_alone.unlock().await.unwrap(), Released::NotHeld);
    assert_eq!(kept.unlock().await.unwrap(), Released::Released);
}

#[tokio::test]
async fn a_loss_is_told_before_the_store_can_grant_anew() {
    let (store, locks) = memory();
    for _ in 0..5 {
        let guard = locks.mutex("a").ttl(ms(300)).lock().await.unwrap();
        // From now on the store is gone for this holder.
        store.inject(Verb::Renew, std::iter::repeat_n(Fault::LoseRequest, 1000));
        guard.lost().await;
        assert_eq!(holder_of(&store, "a").await, Some(guard.claim_id()), "told too late");
        store.inject(Verb::Renew, []);
        drop(guard);
        until("free", || async { holder_of(&store, "a").await.is_none() }).await;
    }
}

#[tokio::test]
async fn one_failed_renewal_makes_a_guard_unsure_and_the_next_answer_sure() {
    let (store, locks) = memory();
    let guard = locks.mutex("a").ttl(ms(2_000)).lock().await.unwrap();
    store.inject(Verb::Renew, [Fault::LoseReply]);
    until("unsure", || async { guard.status() == Status::Unsure }).await;
    until("held", || async { guard.status() == Status::Held }).await;
    guard.unlock().await.unwrap();
}

#[tokio::test]
async fn removed_by_somebody_means_lost_within_one_renewal() {
    let (store, locks) = memory();
    let guard = locks.mutex("a").ttl(ms(1_000)).lock().await.unwrap();
    let token = guard.fencing_token();
    store.forget_everything();
    assert_eq!(guard.lost().await, Loss::Removed);
    assert!(clock::now() < guard.valid_until(), "noticed by renewing, not by time");
    let next = locks.mutex("a").lock().await.unwrap();
    assert!(next.fencing_token() > token);
    assert_eq!(guard.unlock().await.unwrap(), Released::HeldByOther);
    assert_eq!(next.unlock().await.unwrap(), Released::Released);
}

#[tokio::test]
async fn the_maximum_hold_ends_a_hold_that_is_renewed() {
    let (store, locks) = memory();
    let guard = locks.mutex("a").ttl(ms(200)).max_hold(ms(500)).lock().await.unwrap();
    let began = clock::now();
    let loss = guard.lost().await;
    assert_eq!(loss, Loss::MaxHold, "after {:?} {guard:?}", clock::now().since(began));
    let held = clock::now().since(began);
    assert!(held >= ms(400) && held <= ms(500) + ms(1_000), "{held:?}");
    until("free", || async { holder_of(&store, "a").await.is_none() }).await;
}

#[tokio::test]
async fn extend_ttl_and_changed() {
    let (_store, locks) = memory();
    let guard = locks.mutex("a").ttl(ms(500)).renew(false).lock().await.unwrap();
    let changed = guard.changed();
    assert!(guard.ttl().await.unwrap() <= ms(500));
    let left = guard.extend(Duration::from_secs(60)).await.unwrap();
    changed.await;
    assert!(left > Duration::from_secs(58) && guard.remaining() > Duration::from_secs(58));
    assert!(guard.extend(ms(100)).await.unwrap() > Duration::from_secs(50), "never shortens");
    assert!(guard.ttl().await.unwrap() > Duration::from_secs(50));
}

#[tokio::test]
async fn a_leaked_lock_stays_until_its_ttl() {
    let (store, locks) = memory();
    let guard = locks.mutex("a").ttl(ms(300)).lock().await.unwrap();
    let id = guard.claim_id();
    guard.leak().await.unwrap();
    drop(locks);
    assert_eq!(holder_of(&store, "a").await, Some(id));
    let renewals = store.calls(Verb::Renew);
    until("ends by itself", || async { holder_of(&store, "a").await.is_none() }).await;
    assert_eq!(store.calls(Verb::Renew), renewals, "nobody renews it");
}

struct Work(Arc<AtomicU64>, Arc<MemoryStore>);
impl Drop for Work {
    fn drop(&mut self) {
        // Still held while the work is being stopped.
        let held = pollster::block_on(holder_of(&self.1, "a")).is_some();
        self.0.store(u64::from(held) + 1, Ordering::SeqCst);
    }
}

#[tokio::test]
async fn run_releases_after_the_work_and_stops_work_that_lost_its_lock() {
    let (store, locks) = memory();
    let mutex = locks.mutex("a").ttl(ms(300));
    assert!(mutex.run(async |held| held.fencing_token()).await.unwrap().get() > 0);
    assert_eq!(holder_of(&store, "a").await, None);

    let dropped_at = Arc::new(AtomicU64::new(0));
    store.inject(Verb::Renew, std::iter::repeat_n(Fault::LoseRequest, 1000));
    let work = Work(dropped_at.clone(), store.clone());
    let error = mutex
        .run(async move |_held| {
            let _work = work;
            std::future::pending::<()>().await;
        })
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Lost);
    assert_eq!(dropped_at.load(Ordering::SeqCst), 2, "1: dropped after the lease had ended, 0: never");
}

#[tokio::test]
async fn a_result_reached_after_the_loss_is_an_error() {
    let (store, locks) = memory();
    let error = locks.mutex("a").run(async |_held| store.forget_everything()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Lost);
}

/// Every async function of the face, dropped after every number of polls it can have, leaves nothing behind.
#[tokio::test]
async fn dropping_any_future_at_any_await_leaves_nothing() {
    type Face = fn(leasehold::Mutex) -> std::pin::Pin<Box<dyn Future<Output = ()>>>;
    let store = Arc::new(MemoryStore::new());
    let locks = Locks::over(Arc::new(Yielding(store.clone()))).unwrap();
    let mutex = locks.mutex("a").retry(Retry::constant(ms(1)));
    let faces: [(&str, Face); 8] = [
        ("lock", |m| Box::pin(async move { drop(m.lock().await.unwrap()) })),
        ("try_lock", |m| Box::pin(async move { drop(m.try_lock().await.unwrap()) })),
        ("lock_for", |m| Box::pin(async move { drop(m.lock_for(ms(500)).await.unwrap()) })),
        ("run", |m| Box::pin(async move { m.run(async |_| tokio::task::yield_now().await).await.unwrap() })),
        ("unlock", |m| {
            Box::pin(async move {
                let _ = m.lock().await.unwrap().unlock().await.unwrap();
            })
        }),
        ("extend", |m| {
            Box::pin(async move {
                let _ = m.lock().await.unwrap().extend(ms(90_000)).await.unwrap();
            })
        }),
        ("ttl", |m| {
            Box::pin(async move {
                let _ = m.lock().await.unwrap().ttl().await.unwrap();
            })
        }),
        ("lost", |m| {
            Box::pin(async move {
                let _ = m.lock().await.unwrap().lost().await;
            })
        }),
    ];
    for (name, face) in faces {
        let mut ended = false;
        for polls in 0..60 {
            ended |= drop_after(polls, face(mutex.clone())).await;
            until(name, || async { holder_of(&store, "a").await.is_none() }).await;
        }
        assert!(ended || name == "lost", "{name} was never polled to its end");
    }
    locks.close().await;
}

#[tokio::test]
async fn a_dropped_leak_is_a_release() {
    let store = Arc::new(MemoryStore::new());
    let locks = Locks::over(Arc::new(Yielding(store.clone()))).unwrap();
    let guard = locks.mutex("a").lock().await.unwrap();
    let mut leak = Box::pin(guard.leak());
    assert!(leak.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending());
    drop(leak);
    until("free", || async { holder_of(&store, "a").await.is_none() }).await;
}

#[tokio::test]
async fn a_lost_reply_is_resolved_by_presenting_again() {
    let (store, locks) = memory();
    store.inject(Verb::Acquire, [Fault::LoseReply]);
    let guard =
        locks.mutex("a").try_lock().await.unwrap().expect("granted, though the first answer was lost");
    assert_eq!(store.calls(Verb::Acquire), 2);
    assert_eq!(holder_of(&store, "a").await, Some(guard.claim_id()));
    assert_eq!(guard.unlock().await.unwrap(), Released::Released);
}

#[tokio::test]
async fn an_acquire_that_was_never_answered_is_released_in_the_background() {
    let (store, locks) = memory();
    store.inject(Verb::Acquire, [Fault::LoseReply, Fault::LoseRequest, Fault::LoseRequest]);
    let error = locks.mutex("a").try_lock().await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unknown);
    until("freed", || async { holder_of(&store, "a").await.is_none() }).await;
}

#[tokio::test]
async fn a_late_acquire_creates_nothing_after_its_claim_was_given_up() {
    let (store, locks) = memory();
    store.inject(Verb::Acquire, [Fault::Late, Fault::LoseRequest, Fault::LoseRequest]);
    assert!(locks.mutex("a").try_lock().await.is_err());
    locks.clone().close().await;
    store.deliver_late();
    assert_eq!(holder_of(&store, "a").await, None);

    // The same when the claim was granted at the second presentation and unlocked.
    store.inject(Verb::Acquire, [Fault::Late]);
    let guard = locks.mutex("a").try_lock().await.unwrap().unwrap();
    guard.unlock().await.unwrap();
    store.deliver_late();
    assert_eq!(holder_of(&store, "a").await, None);
}

#[tokio::test]
async fn an_unavailable_store_fails_fast_and_is_ridden_out_while_waiting() {
    let (store, locks) = memory();
    store.inject(Verb::Acquire, [Fault::Refuse]);
    assert_eq!(locks.mutex("a").lock().await.unwrap_err().kind(), ErrorKind::Unavailable);
    let guard = locks.mutex("a").lock().await.unwrap();
    let waiter = tokio::spawn({
        let mutex = locks.mutex("a").retry(Retry::constant(ms(1)));
        async move { mutex.lock().await }
    });
    let seen = store.calls(Verb::Acquire);
    until("it waits", || async { store.calls(Verb::Acquire) > seen + 2 }).await;
    store.inject(Verb::Acquire, [Fault::Refuse, Fault::LoseReply, Fault::LoseRequest, Fault::LoseRequest]);
    guard.unlock().await.unwrap();
    assert_eq!(waiter.await.unwrap().unwrap().unlock().await.unwrap(), Released::Released);
}

#[tokio::test]
async fn an_unlock_whose_answer_was_lost_is_asked_again_and_goes_on_in_the_background() {
    let (store, locks) = memory();
    let guard = locks.mutex("a").lock().await.unwrap();
    store.inject(Verb::Release, [Fault::LoseRequest]);
    assert_eq!(guard.unlock().await.unwrap(), Released::Released);

    let guard = locks.mutex("a").lock().await.unwrap();
    store.inject(Verb::Release, [Fault::LoseReply]);
    assert_eq!(guard.unlock().await.unwrap_err().kind(), ErrorKind::Unknown, "ours or not, nobody can say");

    let guard = locks.mutex("a").lock().await.unwrap();
    store.inject(Verb::Release, [Fault::LoseRequest, Fault::LoseRequest, Fault::LoseRequest]);
    assert!(guard.unlock().await.is_err());
    until("freed", || async { holder_of(&store, "a").await.is_none() }).await;
}

#[tokio::test]
async fn after_a_known_unlock_nothing_is_sent_for_the_claim() {
    let (store, locks) = memory();
    for _ in 0..20 {
        let guard = locks.mutex("a").ttl(ms(20)).lock().await.unwrap();
        clock::sleep(clock::jitter(ms(8))).await;
        guard.unlock().await.unwrap();
        let sent = (store.calls(Verb::Renew), store.calls(Verb::Release));
        clock::sleep(ms(10)).await;
        assert_eq!((store.calls(Verb::Renew), store.calls(Verb::Release)), sent);
    }
}

#[tokio::test]
async fn a_store_that_grants_less_than_asked_is_believed() {
    let (store, locks) = memory();
    store.grant_at_most(ms(400));
    let guard = locks.mutex("a").renew(false).lock().await.unwrap();
    assert!(guard.remaining() <= ms(400));
    assert_eq!(guard.lost().await, Loss::Expired);
}

#[test]
fn guards_outlive_the_runtime_that_made_them_and_a_blocked_one_costs_no_lock() {
    let (store, locks) = memory();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let mutex = locks.mutex("a").ttl(ms(150));
    let guard = runtime.block_on(mutex.lock()).unwrap();
    drop(runtime);
    // The only thread of the user is blocked for several TTLs.
    pollster::block_on(clock::sleep(ms(600)));
    assert_eq!(guard.status(), Status::Held);
    drop(guard);
    pollster::block_on(until("freed", || async { holder_of(&store, "a").await.is_none() }));
}

#[test]
fn dropping_the_last_handle_waits_for_the_release() {
    for guard_last in [false, true] {
        let (store, locks) = memory();
        store.inject(Verb::Release, [Fault::LoseRequest, Fault::LoseRequest]);
        let guard = pollster::block_on(locks.mutex("a").lock()).unwrap();
        if guard_last {
            drop(locks);
            drop(guard);
        } else {
            drop(guard);
            drop(locks);
        }
        assert_eq!(pollster::block_on(holder_of(&store, "a")), None, "released when the drop returned");
    }
}

#[test]
fn the_wait_of_the_last_drop_is_bounded() {
    let (store, locks) = memory();
    store.inject(Verb::Release, std::iter::repeat_n(Fault::LoseRequest, 10_000));
    drop(pollster::block_on(locks.mutex("a").lock()).unwrap());
    let began = clock::now();
    drop(locks);
    let waited = clock::now().since(began);
    assert!(waited >= ms(450) && waited < Duration::from_secs(10), "{waited:?}");
}

#[tokio::test]
async fn a_panic_under_the_lock_releases_it() {
    let (store, locks) = memory();
    let mutex = locks.mutex("a");
    let task = tokio::spawn(async move { mutex.run(async |_| panic!("on purpose")).await });
    assert!(task.await.unwrap_err().is_panic());
    until("freed", || async { holder_of(&store, "a").await.is_none() }).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_tasks_never_overlap_and_every_token_is_larger() {
    let (_store, locks) = memory();
    let inside = Arc::new(AtomicUsize::new(0));
    let last = Arc::new(AtomicU64::new(0));
    let tasks: Vec<_> = (0..16)
        .map(|_| {
            let (mutex, inside, last) =
                (locks.mutex("a").retry(Retry::constant(ms(1)).with_jitter()), inside.clone(), last.clone());
            tokio::spawn(async move {
                for _ in 0..20 {
                    let guard = mutex.lock().await.unwrap();
                    assert_eq!(inside.fetch_add(1, Ordering::SeqCst), 0);
                    let before = last.swap(guard.fencing_token().get(), Ordering::SeqCst);
                    assert!(FencingToken::new(before) < guard.fencing_token());
                    tokio::task::yield_now().await;
                    inside.fetch_sub(1, Ordering::SeqCst);
                    guard.unlock().await.unwrap();
                }
            })
        })
        .collect();
    for task in tasks {
        task.await.unwrap();
    }
}

/// Counts the calls of `renew` and what they carry.
#[derive(Debug)]
struct Counting(MemoryStore, AtomicU64, std::sync::Mutex<HashSet<leasehold::ClaimId>>);

#[async_trait::async_trait]
impl Store for Counting {
    async fn acquire(&self, claim: &Claim) -> leasehold::Result<leasehold::Acquired> {
        self.0.acquire(claim).await
    }
    async fn woken(&self, ticket: &leasehold::Ticket) -> leasehold::Woken {
        self.0.woken(ticket).await
    }
    async fn renew(&self, held: &[leasehold::Held]) -> Vec<leasehold::Result<leasehold::Renewal>> {
        self.1.fetch_add(1, Ordering::SeqCst);
        self.2.lock().unwrap().extend(held.iter().map(|held| held.id));
        self.0.renew(held).await
    }
    async fn release(&self, held: &leasehold::Held) -> leasehold::Result<Released> {
        self.0.release(held).await
    }
    async fn inspect(&self, query: &Query) -> leasehold::Result<leasehold::Page<leasehold::LockView>> {
        self.0.inspect(query).await
    }
    fn guarantees(&self) -> leasehold::Guarantees {
        self.0.guarantees()
    }
    fn location(&self) -> Arc<str> {
        self.0.location()
    }
    async fn diagnose(&self) -> Vec<leasehold::Finding> {
        self.0.diagnose().await
    }
    fn lifeline(&self) -> Option<Arc<std::fs::File>> {
        None
    }
}

#[tokio::test]
async fn locks_of_one_ttl_are_renewed_together() {
    let store = Arc::new(Counting(MemoryStore::new(), AtomicU64::new(0), std::sync::Mutex::default()));
    let locks = Locks::over(store.clone()).unwrap();
    let mut guards = Vec::new();
    for n in 0..1000 {
        guards.push(locks.mutex(format!("n{n}")).ttl(Duration::from_secs(5)).lock().await.unwrap());
    }
    until("all renewed", || async { store.2.lock().unwrap().len() == 1000 }).await;
    // Taken one after the other, over one boundary of the grid at most.
    let calls = store.1.load(Ordering::SeqCst);
    assert!(calls <= 4, "{calls} batches for 1000 locks in one interval");
}

#[tokio::test]
async fn a_policy_of_zero_waits_neither_panics_nor_spins() {
    let (store, locks) = memory();
    let guard = locks.mutex("a").lock().await.unwrap();
    let zero = locks.mutex("a").retry(Retry::constant(Duration::ZERO));
    assert!(zero.lock_for(ms(100)).await.unwrap().is_none());
    let asked = store.calls(Verb::Acquire);
    assert!((3..=102).contains(&asked), "{asked} tries in 100 ms");
    let _ = guard.unlock().await.unwrap();
}

#[tokio::test]
async fn a_waiter_is_told_its_place_once_as_long_as_nothing_changes() {
    let (_store, locks) = memory();
    let _held = locks.mutex("a").lock().await.unwrap();
    let told = Arc::new(AtomicU64::new(0));
    let count = told.clone();
    let mutex = locks.mutex("a").on_wait(move |_| {
        count.fetch_add(1, Ordering::SeqCst);
    });
    assert!(mutex.lock_for(ms(500)).await.unwrap().is_none());
    assert_eq!(told.load(Ordering::SeqCst), 1, "looks and the retry policy are no news");
}
