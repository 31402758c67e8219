//! Passing a lock on within the process: who gets it, with what token, and what becomes of it on bad days.
#![allow(clippy::unwrap_used, reason = "a test")]

use std::future::Future;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use leasehold::store::Store;
use leasehold::stores::memory::{Fault, MemoryStore, Verb};
use leasehold::{
    Claim, ErrorKind, Fairness, FencingToken, Guard, Locks, Loss, Mutex, Query, Released, Retry, Status,
    clock,
};
use leasehold_chaos::servers::RedisServer;

fn ms(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

fn memory() -> (Arc<MemoryStore>, Locks) {
    let store = Arc::new(MemoryStore::new());
    let locks = Locks::over(store.clone()).unwrap();
    (store, locks)
}

fn local(locks: &Locks, max: u32) -> Mutex {
    locks.mutex("a").fairness(Fairness::LocalFirst { max })
}

fn calls(store: &MemoryStore) -> u64 {
    [Verb::Acquire, Verb::Renew, Verb::Release].into_iter().map(|verb| store.calls(verb)).sum()
}

async fn until<F: Future<Output = bool>>(what: &str, mut holds: impl FnMut() -> F) {
    let latest = clock::now().plus(Duration::from_secs(10));
    while !holds().await {
        assert!(clock::now() < latest, "did not come about: {what}");
        clock::sleep(ms(2)).await;
    }
}

async fn until_free(locks: &Locks) {
    until("nobody holds it or waits", || async {
        let view = locks.show("a").await.unwrap();
        view.holder.is_none() && view.waiters == 0
    })
    .await;
}

async fn until_in_line(locks: &Locks, waiters: u64) {
    until("they wait at the store", || async { locks.show("a").await.unwrap().waiters == waiters }).await;
}

type Waiting = Pin<Box<dyn Future<Output = leasehold::Result<Guard>> + Send>>;

/// A waiter that was polled once, and so has its place.
fn waiter(mutex: &Mutex) -> Waiting {
    let mutex = mutex.clone();
    let mut waiting: Waiting = Box::pin(async move { mutex.lock().await });
    assert!(waiting.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending(), "it has to wait");
    waiting
}

#[tokio::test]
async fn a_crowd_in_one_process_asks_the_store_for_one_hold_in_sixty() {
    let (store, locks) = memory();
    let last = Arc::new(AtomicU64::new(0));
    let tasks: Vec<_> = (0..128)
        .map(|_| {
            let (mutex, last) = (local(&locks, 127), last.clone());
            tokio::spawn(async move {
                for _ in 0..100 {
                    let guard = mutex.lock().await.unwrap();
                    let token = guard.fencing_token().get();
                    assert!(last.swap(token, Ordering::SeqCst) < token);
                    // The store answers without an await: the others come to wait now.
                    tokio::task::yield_now().await;
                    assert_eq!(guard.unlock().await.unwrap(), Released::Released);
                }
            })
        })
        .collect();
    for task in tasks {
        task.await.unwrap();
    }
    let calls = calls(&store);
    assert!(calls <= 128 * 100 / 60, "{calls} calls for {} holds", 128 * 100);
    until_free(&locks).await;
}

/// Two processes, as it were, of several tasks each: never two inside, and tokens that only grow.
async fn crowds(locks: [Locks; 2], fairness: [Fairness; 2], rounds: usize) {
    let inside = Arc::new(AtomicUsize::new(0));
    let last = Arc::new(AtomicU64::new(0));
    let tasks = locks.iter().zip(fairness).flat_map(|(locks, fairness)| {
        let (inside, last) = (&inside, &last);
        (0..8).map(move |_| {
            let (mutex, inside, last) = (locks.mutex("a").fairness(fairness), inside.clone(), last.clone());
            tokio::spawn(async move {
                for round in 0..rounds {
                    let guard = mutex.lock().await.unwrap();
                    assert_eq!(inside.fetch_add(1, Ordering::SeqCst), 0);
                    let before = last.swap(guard.fencing_token().get(), Ordering::SeqCst);
                    assert!(FencingToken::new(before) < guard.fencing_token());
                    tokio::task::yield_now().await;
                    assert_eq!(guard.status(), Status::Held);
                    inside.fetch_sub(1, Ordering::SeqCst);
                    if round % 2 == 0 {
                        assert_eq!(guard.unlock().await.unwrap(), Released::Released);
                    } // else: dropped
                }
            })
        })
    });
    for task in tasks.collect::<Vec<_>>() {
        task.await.unwrap();
    }
    until_free(&locks[0]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn crowds_exclude_each_other_and_tokens_grow() {
    let (store, locks) = memory();
    let other = Locks::over(store.clone()).unwrap();
    let first = Fairness::LocalFirst { max: 3 };
    crowds([locks.clone(), other.clone()], [first, first], 40).await;
    crowds([locks, other], [first, Fairness::Fifo], 40).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn crowds_over_redis_exclude_each_other_and_tokens_grow() {
    let server = RedisServer::start();
    let one = leasehold::connect(&server.url()).await.unwrap();
    let two = leasehold::connect(&server.url()).await.unwrap();
    let first = Fairness::LocalFirst { max: 5 };
    crowds([one.clone(), two.clone()], [first, first], 100).await;
    others_get_their_turn(&one, &two).await;
}

/// Five wait in one process and one in another: that one gets it after two passes, whoever came first.
async fn others_get_their_turn(here: &Locks, there: &Locks) {
    let mutex = local(here, 2);
    let guard = mutex.lock().await.unwrap();
    let order = Arc::new(std::sync::Mutex::new(Vec::new()));
    let wait = |mutex: Mutex, who: &'static str| {
        let order = order.clone();
        tokio::spawn(async move {
            let guard = mutex.lock().await.unwrap();
            order.lock().unwrap().push((who, guard.fencing_token(), guard.claim_id()));
            guard.unlock().await.unwrap();
        })
    };
    let mut tasks = vec![];
    for _ in 0..5 {
        tasks.push(wait(mutex.clone(), "here"));
    }
    tasks.push(wait(there.mutex("a"), "there"));
    until_in_line(here, 1).await;
    let (first, token) = (guard.claim_id(), guard.fencing_token().get());
    let seen = here.show("a").await.unwrap();
    assert_eq!(seen.holder.unwrap().token, Some(guard.fencing_token()));
    // Not every store says so while it is held, but none may say less.
    assert!(seen.last_token.is_none_or(|last| last.get() >= token + 2), "{:?}", seen.last_token);
    assert_eq!(guard.unlock().await.unwrap(), Released::Released);
    for task in tasks {
        task.await.unwrap();
    }
    let order = order.lock().unwrap().clone();
    let who: Vec<_> = order.iter().map(|(who, ..)| *who).collect();
    assert_eq!(who, ["here", "here", "there", "here", "here", "here"]);
    let block: Vec<_> = order[..2].iter().map(|(_, token, id)| (token.get(), *id)).collect();
    assert_eq!(block, [(token + 1, first), (token + 2, first)]);
    assert!(order.is_sorted_by(|one, next| one.1 < next.1), "{order:?}");
    assert_ne!(order[3].2, first);
    until_free(here).await;
}

#[tokio::test]
async fn others_get_their_turn_after_so_many_passes() {
    let (store, locks) = memory();
    others_get_their_turn(&locks, &Locks::over(store).unwrap()).await;
}

#[tokio::test]
async fn what_differs_in_its_terms_is_not_passed_on() {
    let (store, locks) = memory();
    let mutex = local(&locks, 9);
    let one = locks.mutex("a");
    let others: [Mutex; 6] = [
        one.clone(),
        local(&locks, 9).label("other"),
        local(&locks, 9).ttl(ms(20_000)),
        local(&locks, 9).max_hold(ms(20_000)),
        local(&locks, 8),
        local(&locks, 9).renew(false),
    ];
    for other in others {
        let guard = mutex.lock().await.unwrap();
        let id = guard.claim_id();
        let waiting = waiter(&other);
        guard.unlock().await.unwrap();
        assert_ne!(waiting.await.unwrap().claim_id(), id, "{other:?}");
    }
    // Another handle of the same terms shares.
    let guard = mutex.lock().await.unwrap();
    let (id, before) = (guard.claim_id(), calls(&store));
    let waiting = waiter(&local(&locks, 9).retry(Retry::constant(ms(5))).max_wait(ms(9_000)).max_queue(1));
    guard.unlock().await.unwrap();
    let guard = waiting.await.unwrap();
    assert_eq!((guard.claim_id(), calls(&store)), (id, before));
    // And a lock that is not renewed, or a maximum of none, is in order of arrival.
    for mutex in [local(&locks, 9).renew(false).ttl(ms(21_000)), local(&locks, 0)] {
        drop(mutex.try_lock().await.unwrap());
        let first = waiter(&mutex);
        let second = waiter(&mutex);
        until_in_line(&locks, 2).await;
        drop((first, second));
        until_in_line(&locks, 0).await;
    }
}

#[tokio::test]
async fn a_try_takes_no_part_and_a_short_patience_gets_nothing() {
    let (store, locks) = memory();
    let mutex = local(&locks, 9);
    let guard = mutex.lock().await.unwrap();
    let id = guard.claim_id();
    let waiting = waiter(&mutex);
    assert!(mutex.lock_for(ms(20)).await.unwrap().is_none());
    let few = mutex.clone().retry(Retry::constant(ms(5)).at_most(3));
    assert_eq!(few.lock().await.unwrap_err().kind(), ErrorKind::Busy);
    assert_eq!(store.calls(Verb::Acquire), 1, "they waited here");
    guard.unlock().await.unwrap();
    // It is on its way to the waiter, and nobody's to try for.
    assert!(mutex.try_lock().await.unwrap().is_none());
    let guard = waiting.await.unwrap();
    assert_eq!(guard.claim_id(), id);
    guard.unlock().await.unwrap();
    let tried = mutex.try_lock().await.unwrap().unwrap();
    let id = tried.claim_id();
    let waiting = waiter(&mutex);
    tried.unlock().await.unwrap();
    assert_ne!(waiting.await.unwrap().claim_id(), id, "what was tried for is not passed on");
}

/// Polls a future so often and drops it.
async fn drop_after(polls: usize, work: impl Future<Output = ()>) {
    let mut work = pin!(work);
    let mut left = polls;
    std::future::poll_fn(|cx: &mut Context<'_>| {
        if left == 0 {
            return Poll::Ready(());
        }
        left -= 1;
        cx.waker().wake_by_ref();
        work.as_mut().poll(cx)
    })
    .await;
}

/// A store that yields before and after each call, so that there are awaits to be dropped at. Made silent, it answers no
/// claim.
#[derive(Debug)]
struct Yielding(Arc<MemoryStore>, AtomicBool);

#[async_trait::async_trait]
impl Store for Yielding {
    async fn acquire(&self, claim: &Claim) -> leasehold::Result<leasehold::Acquired> {
        tokio::task::yield_now().await;
        if self.1.load(Ordering::SeqCst) {
            std::future::pending::<()>().await;
        }
        let answer = self.0.acquire(claim).await;
        tokio::task::yield_now().await;
        answer
    }
    async fn woken(&self, ticket: &leasehold::Ticket) -> leasehold::Woken {
        self.0.woken(ticket).await
    }
    async fn renew(&self, held: &[leasehold::Held]) -> Vec<leasehold::Result<leasehold::Renewal>> {
        tokio::task::yield_now().await;
        self.0.renew(held).await
    }
    async fn release(&self, held: &leasehold::Held) -> leasehold::Result<Released> {
        tokio::task::yield_now().await;
        let answer = self.0.release(held).await;
        tokio::task::yield_now().await;
        answer
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
async fn whoever_is_dropped_at_any_await_keeps_it_from_nobody() {
    let store = Arc::new(MemoryStore::new());
    let locks = Locks::over(Arc::new(Yielding(store.clone(), AtomicBool::new(false)))).unwrap();
    let mutex = local(&locks, 2);
    let cycle = || async {
        let guard = mutex.lock().await.unwrap();
        tokio::task::yield_now().await;
        let _ = guard.unlock().await.unwrap();
    };
    let dropping = || async {
        let guard = mutex.lock().await.unwrap();
        tokio::task::yield_now().await;
        drop(guard);
    };
    for polls in 0..24 {
        for others in 0..12 {
            // The dropped one first, and so the front, and then amid the others.
            tokio::join!(drop_after(polls, cycle()), cycle(), drop_after(others, dropping()), cycle());
            tokio::join!(dropping(), drop_after(polls, cycle()), drop_after(others, cycle()), dropping());
            tokio::join!(drop_after(polls, cycle()), drop_after(others, cycle()));
            until_free(&locks).await;
        }
    }
}

#[tokio::test]
async fn when_the_front_is_dropped_the_next_one_claims_it() {
    let (store, locks) = memory();
    let there = Locks::over(store).unwrap().mutex("a").lock().await.unwrap();
    let mutex = local(&locks, 9);
    let (front, mut next) = (waiter(&mutex), waiter(&mutex));
    let waits = || async { locks.show("a").await.unwrap().queue.first().map(|waiter| waiter.id) };
    until_in_line(&locks, 1).await;
    let first = waits().await;
    drop(front);
    assert!(next.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending());
    until("the next one waits there", || async { waits().await.is_some_and(|id| Some(id) != first) }).await;
    until_in_line(&locks, 1).await;
    there.unlock().await.unwrap();
    let guard = next.await.unwrap();
    assert_ne!(Some(guard.claim_id()), first);
}

#[tokio::test]
async fn what_was_passed_to_one_who_went_goes_on_to_the_next() {
    let (store, locks) = memory();
    let mutex = local(&locks, 9);
    let guard = mutex.lock().await.unwrap();
    let (id, before) = (guard.claim_id(), calls(&store));
    let mut waiting: Vec<_> = (0..4).map(|_| waiter(&mutex)).collect();
    drop(waiting.remove(1));
    drop(guard);
    drop(waiting.remove(0));
    let got = waiting.remove(0).await.unwrap();
    assert_eq!((got.claim_id(), calls(&store)), (id, before), "nobody asked the store");
    drop(got);
    drop(waiting);
    until_free(&locks).await;
    assert_eq!(store.calls(Verb::Release), 1);
}

#[tokio::test]
async fn a_lost_lock_is_not_passed_on() {
    let (store, locks) = memory();
    let mutex = local(&locks, 9).ttl(ms(1_000));
    for unlocked in [true, false] {
        let guard = mutex.lock().await.unwrap();
        let (id, token) = (guard.claim_id(), guard.fencing_token());
        let waiting = waiter(&mutex);
        store.forget_everything();
        assert_eq!(guard.lost().await, Loss::Removed);
        if unlocked {
            assert_eq!(guard.unlock().await.unwrap(), Released::NotHeld);
        } else {
            drop(guard);
        }
        let next = waiting.await.unwrap();
        assert!(next.claim_id() != id && next.fencing_token() > token);
        assert_eq!((next.status(), next.unlock().await.unwrap()), (Status::Held, Released::Released));
    }
}

#[tokio::test]
async fn an_unsure_lock_is_given_back_to_the_store() {
    let (store, locks) = memory();
    let mutex = local(&locks, 9).ttl(ms(2_000));
    let guard = mutex.lock().await.unwrap();
    let id = guard.claim_id();
    let waiting = waiter(&mutex);
    store.inject(Verb::Renew, std::iter::repeat_n(Fault::LoseRequest, 1000));
    until("unsure", || async { guard.status() == Status::Unsure }).await;
    assert_eq!(guard.unlock().await.unwrap(), Released::Released);
    assert_ne!(waiting.await.unwrap().claim_id(), id);
}

#[tokio::test]
async fn renewal_goes_on_over_many_passes() {
    let (store, locks) = memory();
    let mutex = local(&locks, 900_000).ttl(ms(1_000));
    let ends = clock::now().plus(ms(4_000));
    let tasks: Vec<_> = (0..4)
        .map(|_| {
            let mutex = mutex.clone();
            tokio::spawn(async move {
                let mut seen = Vec::new();
                while clock::now() < ends {
                    let guard = mutex.lock().await.unwrap();
                    // The work under the lock: with so many holds a second the block grows to be used for longer than a TTL.
                    clock::sleep(ms(5)).await;
                    assert_eq!(guard.status(), Status::Held);
                    seen.push((guard.fencing_token(), guard.claim_id(), clock::now()));
                    guard.unlock().await.unwrap();
                }
                seen
            })
        })
        .collect();
    let mut seen = Vec::new();
    for task in tasks {
        seen.extend(task.await.unwrap());
    }
    seen.sort_by_key(|(token, ..)| *token);
    let longest =
        seen.chunk_by(|one, next| one.1 == next.1).map(|claim| claim[claim.len() - 1].2.since(claim[0].2));
    let longest = longest.max().unwrap();
    assert!(
        longest > ms(1_200),
        "{longest:?} is the longest that a claim was passed on, in {} holds",
        seen.len()
    );
    assert!(store.calls(Verb::Renew) >= 10, "{} renewals", store.calls(Verb::Renew));
    // And for one who keeps what was passed to him.
    let guard = mutex.lock().await.unwrap();
    let waiting = waiter(&mutex);
    guard.unlock().await.unwrap();
    let guard = waiting.await.unwrap();
    for _ in 0..15 {
        guard.changed().await;
        assert_eq!(guard.status(), Status::Held);
    }
}

#[tokio::test]
async fn the_maximum_hold_is_that_of_each_holder() {
    let (_store, locks) = memory();
    let mutex = local(&locks, 16).ttl(ms(700)).max_hold(ms(700));
    let mut guard = mutex.lock().await.unwrap();
    let (id, began) = (guard.claim_id(), clock::now());
    for _ in 0..16 {
        let waiting = waiter(&mutex);
        guard.changed().await;
        assert_eq!(guard.status(), Status::Held);
        guard.unlock().await.unwrap();
        guard = waiting.await.unwrap();
        assert_eq!(guard.claim_id(), id);
    }
    let all = clock::now().since(began);
    assert!(all > ms(700), "no longer than one hold may last: {all:?}");
    assert_eq!(guard.lost().await, Loss::MaxHold);
}

#[tokio::test]
async fn a_loss_concerns_who_has_it_then() {
    let (store, locks) = memory();
    let mutex = local(&locks, 9).ttl(ms(1_000));
    let first = mutex.lock().await.unwrap();
    let (lost, known_end) = (first.lost(), first.valid_until());
    let waiting = waiter(&mutex);
    first.unlock().await.unwrap();
    let second = waiting.await.unwrap();
    store.forget_everything();
    let lost = tokio::spawn(async move { (lost.await, clock::now()) });
    assert_eq!(second.lost().await, Loss::Removed);
    let (loss, when) = lost.await.unwrap();
    assert_eq!(loss, Loss::Expired);
    assert!(when >= known_end, "not before its lease would have ended");
}

#[tokio::test]
async fn a_waiter_that_is_not_polled_holds_up_other_processes_for_one_lease() {
    let (store, locks) = memory();
    let mutex = local(&locks, 9).ttl(ms(300));
    let guard = mutex.lock().await.unwrap();
    let id = guard.claim_id();
    let forgotten = waiter(&mutex);
    let there = Locks::over(store.clone()).unwrap().mutex("a");
    let began = clock::now();
    guard.unlock().await.unwrap();
    let other = there.lock_for(Duration::from_secs(10)).await.unwrap().expect("got it");
    let waited = clock::now().since(began);
    assert!(waited < ms(3_000), "{waited:?}");
    other.unlock().await.unwrap();
    // It is no guard of what was lost that the forgotten one gets.
    let guard = forgotten.await.unwrap();
    assert!(guard.claim_id() != id && guard.status() == Status::Held);
}

#[tokio::test]
async fn a_leaked_lock_is_not_passed_on() {
    let store = Yielding(Arc::new(MemoryStore::new()), AtomicBool::new(false));
    let locks = Locks::over(Arc::new(store)).unwrap();
    let mutex = local(&locks, 9).ttl(ms(300));
    let guard = mutex.lock().await.unwrap();
    let id = guard.claim_id();
    let waiting = waiter(&mutex);
    guard.leak().await.unwrap();
    assert_eq!(locks.show("a").await.unwrap().holder.unwrap().id, Some(id));
    let guard = waiting.await.unwrap();
    assert_ne!(guard.claim_id(), id);
    // Nor one whose leaking was dropped midway: nobody renews it any more.
    let (id, waiting) = (guard.claim_id(), waiter(&mutex));
    let mut leak = Box::pin(guard.leak());
    assert!(leak.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending());
    drop(leak);
    assert_ne!(waiting.await.unwrap().claim_id(), id);
}

#[tokio::test]
async fn an_outage_fails_those_who_come_then_and_not_those_who_wait() {
    let store = Arc::new(MemoryStore::new());
    let locks = Locks::over(Arc::new(Yielding(store.clone(), AtomicBool::new(false)))).unwrap();
    let mutex = local(&locks, 1);
    store.inject(Verb::Acquire, [Fault::Refuse]);
    let comers: Vec<_> = (0..3).map(|_| waiter(&mutex)).collect();
    for comer in comers {
        assert_eq!(comer.await.unwrap_err().kind(), ErrorKind::Unavailable);
    }
    assert_eq!(store.calls(Verb::Acquire), 1, "the silence of the store was asked for once");
    let guard = mutex.lock().await.unwrap();
    let (one, two) = (waiter(&mutex), waiter(&mutex));
    store.inject(Verb::Acquire, [Fault::Refuse, Fault::LoseRequest, Fault::Refuse]);
    guard.unlock().await.unwrap();
    one.await.unwrap().unlock().await.unwrap();
    two.await.unwrap().unlock().await.unwrap();
    // What the store refuses for good each one is told himself.
    let bad = mutex.ttl(ms(1));
    let (one, two) = (bad.lock(), bad.lock());
    let (one, two) = tokio::join!(one, two);
    assert_eq!((one.unwrap_err().kind(), two.unwrap_err().kind()), (ErrorKind::Invalid, ErrorKind::Invalid));
}

#[tokio::test]
async fn one_who_waited_here_until_the_time_was_up_is_told_busy() {
    let store = Arc::new(Yielding(Arc::new(MemoryStore::new()), AtomicBool::new(false)));
    let locks = Locks::over(store.clone()).unwrap();
    let mutex = local(&locks, 1);
    let guard = mutex.lock().await.unwrap();
    let one = waiter(&mutex);
    let mut two = Box::pin(mutex.lock_for(ms(200)));
    assert!(two.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending());
    guard.unlock().await.unwrap();
    store.1.store(true, Ordering::SeqCst);
    one.await.unwrap().unlock().await.unwrap();
    assert!(two.await.unwrap().is_none(), "the store did not answer, but the lock was busy before");
    let unheard = mutex.lock_for(ms(50)).await.unwrap_err();
    assert_eq!(unheard.kind(), ErrorKind::Unknown);
}

#[tokio::test]
async fn work_runs_under_a_lock_that_is_passed_on() {
    let (store, locks) = memory();
    let mutex = local(&locks, 9);
    let mut tokens = Vec::new();
    let runs = (0..5).map(|_| mutex.run(async |held| held.fencing_token().get())).collect::<Vec<_>>();
    for run in runs.into_iter().map(Box::pin).collect::<Vec<_>>() {
        tokens.push(run.await.unwrap());
    }
    assert!(tokens.is_sorted_by(|one, next| one < next));
    let before = store.calls(Verb::Acquire);
    let (one, two) = tokio::join!(
        mutex.run(async |held| {
            tokio::task::yield_now().await;
            held.extend(ms(90_000)).await.unwrap();
            held.claim_id()
        }),
        mutex.run(async |held| {
            assert!(held.remaining() > ms(80_000) && held.ttl().await.unwrap() > ms(80_000));
            held.claim_id()
        })
    );
    assert_eq!((one.unwrap(), store.calls(Verb::Acquire)), (two.unwrap(), before + 1));
}

#[test]
fn threads_pass_it_on_too() {
    let (store, locks) = memory();
    let locks = leasehold::blocking::Locks::from(locks);
    let inside = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                let mutex = locks.mutex("a").fairness(Fairness::LocalFirst { max: 100 });
                for _ in 0..50 {
                    let guard = mutex.lock().unwrap();
                    assert_eq!(inside.fetch_add(1, Ordering::SeqCst), 0);
                    std::thread::yield_now();
                    inside.fetch_sub(1, Ordering::SeqCst);
                    assert_eq!(guard.unlock().unwrap(), Released::Released);
                }
            });
        }
    });
    assert!(store.calls(Verb::Release) < 400, "{} releases of 400 holds", store.calls(Verb::Release));
}
