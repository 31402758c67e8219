//! Several locks at once, all or nothing; and stripes.

#![allow(clippy::disallowed_methods, clippy::unwrap_used)]

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use leasehold::store::Store;
use leasehold::store::Woken;
use leasehold::stores::memory::{Fault, MemoryStore, Verb};
use leasehold::{
    Acquired, Claim, ErrorKind, Fairness, Finding, Guarantees, Guard, Held, LockView, Locks, Loss,
    MAX_STRIPES, Name, Owner, Page, Query, Released, Renewal, Retry, Status, Ticket, clock, connect,
};
use leasehold_chaos::servers::RedisServer;

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

/// The names that are held, and whether anybody waits for one of these.
async fn held(store: &dyn Store) -> String {
    let query = Query::Prefix { prefix: vec![], after: None, limit: 2_000 };
    let views = store.inspect(&query).await.unwrap().items;
    views.iter().map(|view| view.name.to_string()).collect::<Vec<_>>().join(" ")
}

async fn waiters(store: &dyn Store, name: &str) -> u64 {
    store.inspect(&Query::One(Name::new(name).unwrap())).await.unwrap().items[0].waiters
}

async fn until<F: Future<Output = bool>>(what: &str, mut holds: impl FnMut() -> F) {
    let latest = clock::now().plus(Duration::from_secs(20));
    while !holds().await {
        assert!(clock::now() < latest, "did not come about: {what}");
        clock::sleep(ms(2)).await;
    }
}

#[tokio::test]
async fn all_are_taken_in_the_order_asked_each_once_and_given_back_together() {
    let (store, locks) = memory();
    let set = locks.all(["c", "a", "c", "b", "a"]).label("why");
    let guards = set.lock().await.unwrap();
    let names: Vec<_> = guards.guards().iter().map(|guard| guard.name().to_string()).collect();
    assert_eq!(names, ["c", "a", "b"]);
    let tokens: Vec<_> = guards.guards().iter().map(Guard::fencing_token).collect();
    assert_eq!(guards.fencing_tokens(), tokens);
    assert_eq!(held(&*store).await, "a b c");
    assert_eq!(guards.status(), Status::Held);
    let least = guards.guards().iter().map(Guard::valid_until).min().unwrap();
    assert_eq!(guards.valid_until(), least);
    assert!(guards.remaining() > Duration::from_secs(29) && guards.remaining() < Duration::from_secs(30));
    let record = locks.show("b").await.unwrap().holder.unwrap().record.unwrap();
    assert_eq!(record.label.as_deref(), Some("why"));
    assert!(set.try_lock().await.unwrap().is_none());
    assert!(guards.extend(ms(90_000)).await.unwrap() > ms(80_000));
    let answers = guards.unlock().await;
    let names: Vec<_> = answers.iter().map(|(name, _)| name.to_string()).collect();
    assert_eq!(names, ["c", "a", "b"]);
    assert!(answers.iter().all(|(_, answer)| matches!(answer, Ok(Released::Released))), "{answers:?}");
    assert_eq!(held(&*store).await, "");
    drop(set.try_lock().await.unwrap().unwrap());
    until("dropping releases", || async { held(&*store).await.is_empty() }).await;
}

#[tokio::test]
async fn bad_sets_and_stripes_are_refused_before_any_io() {
    let (store, locks) = memory();
    let none: [&str; 0] = [];
    let error = locks.all(none).lock().await.unwrap_err();
    assert!(error.kind() == ErrorKind::Invalid && error.to_string().contains("no names"), "{error}");
    assert_eq!(locks.all(["a", ""]).try_lock().await.unwrap_err().kind(), ErrorKind::Invalid);
    assert_eq!(locks.all(["a", "b"]).ttl(ms(1)).lock().await.unwrap_err().kind(), ErrorKind::Invalid);
    for stripes in [0, MAX_STRIPES + 1, u32::MAX] {
        let error = locks.striped("a", stripes).stripe_for("key").lock().await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid);
        assert!(error.to_string().contains("stripes"), "{error}");
    }
    assert_eq!(locks.striped("", 2).stripe_for("key").lock().await.unwrap_err().kind(), ErrorKind::Invalid);
    assert_eq!(store.calls(Verb::Acquire), 0);
}

#[tokio::test]
async fn a_busy_set_leaves_nothing_behind() {
    let (store, locks) = memory();
    let _busy = locks.mutex("m").lock().await.unwrap();
    let set = locks.all(["z", "a", "m"]);
    assert!(set.try_lock().await.unwrap().is_none());
    assert_eq!(held(&*store).await, "m", "given back by the time it says so");
    assert!(set.lock_for(ms(50)).await.unwrap().is_none());
    assert_eq!((held(&*store).await.as_str(), waiters(&*store, "m").await), ("m", 0));
    for set in [set.clone().retry(Retry::never()), set.clone().max_wait(ms(50))] {
        let error = set.lock().await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Busy);
        assert_eq!((held(&*store).await.as_str(), waiters(&*store, "m").await), ("m", 0));
    }
}

#[tokio::test]
async fn who_waits_holds_smaller_names_only() {
    let (store, locks) = memory();
    let busy = locks.all(["c", "e"]).lock().await.unwrap().into_guards();
    let set = locks.all(["f", "e", "d", "c", "b", "a"]);
    let waiter = tokio::spawn(async move { set.lock().await.unwrap() });
    let mut busy = busy.into_iter();
    for (next, kept) in [("c", "a b c e"), ("e", "a b c d e")] {
        until(next, || async { waiters(&*store, next).await == 1 && held(&*store).await == kept }).await;
        assert!(locks.mutex("f").try_lock().await.unwrap().is_some(), "what comes later is left to others");
        until("f is free", || async { !held(&*store).await.contains('f') }).await;
        assert_eq!(busy.next().unwrap().unlock().await.unwrap(), Released::Released);
    }
    let guards = waiter.await.unwrap();
    assert_eq!((guards.guards().len(), guards.status()), (6, Status::Held));
    assert_eq!(guards.guards()[0].name().to_string(), "f");
}

#[tokio::test]
async fn what_is_lost_while_another_is_waited_for_is_taken_anew() {
    let (store, locks) = memory();
    let busy = locks.mutex("b").lock().await.unwrap();
    let set = locks.all(["a", "b", "c"]).ttl(ms(300)).renew(false);
    let waiter = tokio::spawn(async move { set.lock().await.unwrap() });
    until("it holds a and waits", || async { waiters(&*store, "b").await == 1 }).await;
    let first = locks.show("a").await.unwrap().holder.unwrap().token.unwrap();
    until("its lease is over", || async { held(&*store).await == "b" }).await;
    assert_eq!(busy.unlock().await.unwrap(), Released::Released);
    let guards = waiter.await.unwrap();
    assert_eq!(guards.status(), Status::Held);
    assert!(guards.fencing_tokens()[0] > first);
}

/// Answers for c, once it was asked for before, only when nobody has a.
#[derive(Debug)]
struct SlowAtC(Arc<MemoryStore>, AtomicUsize);

#[async_trait::async_trait]
impl Store for SlowAtC {
    async fn acquire(&self, claim: &Claim) -> leasehold::Result<Acquired> {
        if claim.name.as_bytes() == b"c" && self.1.fetch_add(1, Ordering::AcqRel) == 1 {
            until("a is over", || async { !held(&*self.0).await.contains('a') }).await;
        }
        self.0.acquire(claim).await
    }
    async fn woken(&self, ticket: &Ticket) -> Woken {
        self.0.woken(ticket).await
    }
    async fn renew(&self, held: &[Held]) -> Vec<leasehold::Result<Renewal>> {
        self.0.renew(held).await
    }
    async fn release(&self, held: &Held) -> leasehold::Result<Released> {
        self.0.release(held).await
    }
    async fn inspect(&self, query: &Query) -> leasehold::Result<Page<LockView>> {
        self.0.inspect(query).await
    }
    fn guarantees(&self) -> Guarantees {
        self.0.guarantees()
    }
    fn location(&self) -> Arc<str> {
        self.0.location()
    }
    async fn diagnose(&self) -> Vec<Finding> {
        self.0.diagnose().await
    }
    fn lifeline(&self) -> Option<Arc<std::fs::File>> {
        None
    }
}

#[tokio::test]
async fn what_is_lost_during_the_last_look_is_taken_anew_too() {
    let store = Arc::new(MemoryStore::new());
    let locks = Locks::over(Arc::new(SlowAtC(store.clone(), AtomicUsize::new(0)))).unwrap();
    let busy = locks.mutex("b").lock().await.unwrap();
    let set = locks.all(["a", "b", "c"]).ttl(ms(3_000)).renew(false);
    let waiter = tokio::spawn(async move { set.lock().await.unwrap() });
    until("it holds a and waits", || async { waiters(&*store, "b").await == 1 }).await;
    let first = locks.show("a").await.unwrap().holder.unwrap().token.unwrap();
    // So that the lease of b ends well after that of a.
    clock::sleep(ms(1_500)).await;
    assert_eq!(busy.unlock().await.unwrap(), Released::Released);
    let guards = waiter.await.unwrap();
    assert_eq!(guards.status(), Status::Held);
    assert!(guards.fencing_tokens()[0] > first);
}

#[tokio::test]
async fn an_error_at_one_gives_all_back() {
    let (store, locks) = memory();
    store.inject(Verb::Acquire, [Fault::Refuse]);
    let error = locks.all(["a", "b", "c"]).lock().await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    assert_eq!(held(&*store).await, "");
    // Behind a wait too.
    let busy = locks.mutex("b").lock().await.unwrap();
    let set = locks.all(["a", "b", "c"]).max_queue(0);
    let error = set.lock().await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::QueueFull);
    assert_eq!(held(&*store).await, "b");
    drop(busy);
}

#[tokio::test]
async fn the_first_loss_is_told_with_its_name_and_stops_the_work() {
    let (store, locks) = memory();
    let guards = locks.all(["b", "a"]).ttl(ms(500)).lock().await.unwrap();
    let (watch, lost) = (guards.changed(), guards.lost());
    // One of them is taken away behind its holder's back.
    let taken = &guards.guards()[0];
    let claim = Claim::new(taken.name().clone(), taken.claim_id(), ms(500));
    assert_eq!(store.release(&Held::queued(&claim, 0)).await.unwrap(), Released::Released);
    watch.await;
    let (name, loss) = lost.await;
    assert_eq!((name.to_string().as_str(), loss), ("b", Loss::Removed));
    assert_eq!(guards.guards()[1].status(), Status::Held);
    assert_eq!((guards.status(), guards.remaining()), (Status::Lost, Duration::ZERO));
    let answers: Vec<_> = guards.unlock().await.into_iter().map(|(_, answer)| answer.unwrap()).collect();
    assert_eq!(answers, [Released::NotHeld, Released::Released]);

    let set = locks.all(["d", "c"]).ttl(ms(500));
    assert_eq!(set.run(async |held| held.guards().len()).await.unwrap(), 2);
    assert_eq!(held(&*store).await, "");
    let stopped = set.run(async |_| {
        store.forget_everything();
        std::future::pending::<()>().await;
    });
    let error = stopped.await.unwrap_err();
    assert!(error.kind() == ErrorKind::Lost && error.name().is_some(), "{error}");
}

#[tokio::test]
async fn dropping_a_set_at_any_await_leaves_nothing() {
    let store = Arc::new(MemoryStore::new());
    let locks = Locks::over(Arc::new(Yielding(store.clone()))).unwrap();
    // One that is free, and one that has to be waited for and comes free meanwhile.
    for busy in [None, Some("b")] {
        let mut ended = 0;
        for polls in 0..120 {
            let blocker = match busy {
                Some(name) => Some(locks.mutex(name).lock().await.unwrap()),
                None => None,
            };
            let set = locks.all(["c", "a", "b"]).retry(Retry::constant(ms(1)));
            let work = async {
                let (guards, ()) = tokio::join!(set.lock(), async {
                    for _ in 0..polls / 2 {
                        tokio::task::yield_now().await;
                    }
                    drop(blocker);
                });
                for (_, answer) in guards.unwrap().unlock().await {
                    answer.unwrap();
                }
            };
            ended += usize::from(drop_after(polls, work).await);
            until("all free", || async {
                held(&*store).await.is_empty() && waiters(&*store, "b").await == 0
            })
            .await;
        }
        assert!((1..120).contains(&ended), "{ended} of 120 were polled to their end");
    }
    locks.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn overlapping_sets_in_any_order_neither_block_each_other_nor_starve() {
    let server = RedisServer::start();
    let mut tasks = Vec::new();
    let inside: Arc<[std::sync::atomic::AtomicU32; 6]> = Arc::default();
    for worker in 0..8_u64 {
        // Two processes, as far as the store can tell.
        let locks = connect(&server.url()).await.unwrap();
        let inside = inside.clone();
        tasks.push(tokio::spawn(async move {
            for round in 0..25 {
                let mut names: Vec<usize> = (0..6).collect();
                let shift = usize::try_from(worker * 7 + round).unwrap() % 6;
                names.rotate_left(shift);
                if worker % 2 == 0 {
                    names.reverse();
                }
                names.truncate(2 + shift % 4);
                let guards = locks.all(names.iter().map(|n| format!("lock-{n}"))).lock().await.unwrap();
                for n in &names {
                    assert_eq!(
                        inside[*n].fetch_add(1, std::sync::atomic::Ordering::SeqCst),
                        0,
                        "two are inside {n}"
                    );
                }
                tokio::task::yield_now().await;
                for n in &names {
                    inside[*n].fetch_sub(1, std::sync::atomic::Ordering::SeqCst);
                }
                for (name, answer) in guards.unlock().await {
                    assert_eq!(answer.unwrap(), Released::Released, "{name}");
                }
            }
        }));
    }
    let all = async {
        for task in tasks {
            task.await.unwrap();
        }
    };
    let done = clock::timeout_at(clock::now().plus(Duration::from_secs(120)), all).await;
    assert!(done.is_some(), "somebody waits for ever: {}", server.cli(&["KEYS", "*"]));
}

#[tokio::test]
async fn a_set_beside_a_lock_that_is_held_can_wait_in_a_circle_and_is_found() {
    let (store, locks) = memory();
    let [one, other] = ["one", "other"].map(Owner::new);
    let z = locks.mutex("z").owner(&one).lock().await.unwrap();
    let set = locks.all(["a", "z"]).owner(&other);
    let waiting = tokio::spawn(async move { set.lock().await.map(drop) });
    until("it has a and waits for z", || async { waiters(&*store, "z").await == 1 }).await;
    let error = locks.all(["b", "a"]).owner(&one).deadlock_after(ms(20)).lock().await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Deadlock);
    assert_eq!(held(&*store).await, "a z", "b was not kept");
    drop(z);
    waiting.await.unwrap().unwrap();
}

#[tokio::test]
async fn sets_and_locks_passed_on_within_the_process_exclude_each_other() {
    let (store, locks) = memory();
    let local = locks.mutex("a").fairness(Fairness::LocalFirst { max: 100 });
    let first = local.lock().await.unwrap();
    let next = {
        let local = local.clone();
        tokio::spawn(async move { local.lock().await.unwrap() })
    };
    let set = {
        let set = locks.all(["a", "b"]);
        tokio::spawn(async move { set.lock().await.unwrap() })
    };
    until("the set stands in line", || async { waiters(&*store, "a").await == 1 }).await;
    let token = first.fencing_token();
    assert_eq!(first.unlock().await.unwrap(), Released::Released);
    let second = next.await.unwrap();
    assert_eq!(second.fencing_token().get(), token.get() + 1, "passed on, the set still waits");
    assert_eq!(second.unlock().await.unwrap(), Released::Released);
    let guards = set.await.unwrap();
    assert!(guards.fencing_tokens()[0] > token);
    assert!(local.try_lock().await.unwrap().is_none());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_free_names_are_a_few_commands() {
    let server = RedisServer::start();
    let locks = connect(&server.url()).await.unwrap();
    let calls = || {
        let stats = server.cli(&["INFO", "commandstats"]);
        let of = |line: &str| line.split_once("calls=")?.1.split(',').next()?.parse::<u64>().ok();
        stats.lines().filter(|line| line.starts_with("cmdstat_eval")).filter_map(of).sum::<u64>()
    };
    let before = calls();
    let guards = locks.all((0..1000).map(|n| format!("n{n}"))).ttl(ms(60_000)).lock().await.unwrap();
    let taken = calls() - before;
    assert_eq!(guards.guards().len(), 1000);
    assert!(guards.unlock().await.iter().all(|(_, answer)| matches!(answer, Ok(Released::Released))));
    let released = calls() - before - taken;
    println!("1,000 names: {taken} commands to take them, {released} to give them back");
    assert!((1..=100).contains(&taken) && (1..=100).contains(&released), "{taken} and {released}");
    assert_eq!(server.cli(&["EVAL", "return #redis.call('KEYS', 'n*')", "0"]).trim(), "0");
}

#[tokio::test]
async fn keys_of_one_stripe_exclude_each_other_and_several_are_taken_at_once() {
    let (store, locks) = memory();
    let coupons = locks.striped("coupon", 16).options(|each| each.label("redeem"));
    let others: Vec<_> = (0..1000).map(|n| format!("key {n}")).collect();
    let same = others.iter().find(|key| coupons.stripe_of(key) == coupons.stripe_of("a")).unwrap();
    let other = others.iter().find(|key| coupons.stripe_of(key) != coupons.stripe_of("a")).unwrap();
    let guard = coupons.stripe_for("a").lock().await.unwrap();
    assert_eq!(held(&*store).await, format!("coupon:{}", coupons.stripe_of("a")));
    let record = locks.show("coupon:12").await.unwrap().holder.unwrap().record.unwrap();
    assert_eq!(record.label.as_deref(), Some("redeem"));
    assert!(coupons.stripe_for(same).try_lock().await.unwrap().is_none());
    assert!(coupons.stripe_for(other).try_lock().await.unwrap().is_some());
    drop(guard);
    let guards = coupons.all_for(["a", same, other]).lock().await.unwrap();
    assert_eq!(guards.guards().len(), 2);
}

#[test]
fn the_blocking_face_has_the_same_names() {
    let locks = leasehold::blocking::connect("memory:").unwrap();
    let set = locks.all(["b", "a", "b"]).ttl(ms(10_000)).label("why");
    let guards = set.lock().unwrap();
    assert!(set.try_lock().unwrap().is_none() && set.lock_for(ms(10)).unwrap().is_none());
    assert_eq!((guards.fencing_tokens().len(), guards.status()), (2, Status::Held));
    assert!(guards.remaining() < ms(10_000));
    assert!(guards.unlock().iter().all(|(_, answer)| matches!(answer, Ok(Released::Released))));
    assert_eq!(set.run(|held| held.fencing_tokens().len()).unwrap(), 2);
    let error = set.clone().ttl(ms(50)).renew(false).run(leasehold::blocking::GuardSet::lost).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Lost);
    let striped = locks.striped("s", 2).options(|each| each.ttl(ms(10_000)));
    let guard = striped.stripe_for("key").lock().unwrap();
    assert!(guard.name().to_string().starts_with("s:") && striped.stripes() == 2);
}
