//! Bad days of the link: replies and requests that are lost, late or cut, with the whole library over a real server.
#![allow(clippy::unwrap_used, reason = "a test")]

mod bad_days;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

use bad_days::{abandon, about, acquires, connect, linked, linked_to, lock, lock_soon, ms, releases, renews};
use leasehold::{ErrorKind, Loss, Released, Retry, Status, clock};
use leasehold_chaos::proxy::Fault;
use leasehold_chaos::{eventually, servers::RedisServer};
use pollster::block_on;

#[test]
fn a_lock_and_its_unlock_are_two_commands_and_two_round_trips() {
    let (_server, proxy, locks) = linked();
    for round in 1..=20 {
        let guard = lock(&locks.mutex("a"));
        assert_eq!(block_on(guard.unlock()).unwrap(), Released::Released);
        assert_eq!((proxy.commands().len(), proxy.round_trips()), (2 * round, 2 * round as u64));
    }
    assert_eq!(proxy.accepted(), 1, "all on one connection");
    // Dropping instead of unlocking, and finding it busy, cost no more.
    proxy.forget();
    let guard = lock(&locks.mutex("a"));
    assert!(block_on(locks.mutex("a").try_lock()).unwrap().is_none());
    drop(guard);
    block_on(locks.close());
    assert_eq!((proxy.count(acquires("a")), proxy.count(releases("a")), proxy.commands().len()), (2, 1, 3));
}

#[test]
fn an_acquire_whose_reply_was_cut_off_is_granted_by_presenting_it_again() {
    let (server, proxy, locks) = linked();
    let cut = proxy.inject(Fault::CutBeforeReply, acquires("a"));
    let guard = lock(&locks.mutex("a"));
    cut.wait();
    assert_eq!(proxy.count(acquires("a")), 2);
    assert_eq!(guard.status(), Status::Held);
    // One grant, not two: the token is the one that the unanswered presentation wrote.
    assert_eq!(server.cli(&["GET", "leasehold:{a}:fence:a"]), guard.fencing_token().to_string());
    assert_eq!(block_on(guard.unlock()).unwrap(), Released::Released);
    assert_eq!(server.cli(&["EXISTS", "a"]), "0");
}

#[test]
fn an_acquire_that_never_gets_an_answer_is_unknown_and_is_freed() {
    let (server, proxy, locks) = linked();
    let cuts: Vec<_> = (0..3).map(|_| proxy.inject(Fault::CutBeforeReply, acquires("a"))).collect();
    let error = block_on(locks.mutex("a").lock()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unknown, "{error}");
    assert!(error.to_string().contains("lock a"), "it names the lock: {error}");
    assert!(cuts.iter().all(leasehold_chaos::proxy::Injected::happened));
    eventually("the lock is freed in the background", || server.cli(&["EXISTS", "a"]) == "0");
    assert_eq!(block_on(lock(&locks.mutex("a")).unlock()).unwrap(), Released::Released);
}

#[test]
fn a_connection_cut_before_the_server_saw_the_acquire_costs_nothing() {
    let (_server, proxy, locks) = linked();
    let cut = proxy.inject(Fault::CutBeforeRequest, acquires("a"));
    assert_eq!(block_on(lock(&locks.mutex("a")).unlock()).unwrap(), Released::Released);
    assert!(cut.happened());
}

#[test]
fn a_release_whose_reply_was_cut_off_frees_the_lock_and_is_asked_again() {
    let (server, proxy, locks) = linked();
    let guard = lock(&locks.mutex("a"));
    let cut = proxy.inject(Fault::CutBeforeReply, releases("a"));
    // The second answer is that nobody holds it: whether the first request freed it nobody can say.
    match block_on(guard.unlock()) {
        Err(error) => assert_eq!(error.kind(), ErrorKind::Unknown, "{error}"),
        Ok(answer) => panic!("{answer:?} claims to know what nobody can know"),
    }
    assert!(cut.happened());
    assert_eq!(server.cli(&["EXISTS", "a"]), "0");
}

#[test]
fn a_release_that_was_never_sent_is_sent_again_on_a_new_connection() {
    let (server, proxy, locks) = linked();
    let guard = lock(&locks.mutex("a"));
    let cut = proxy.inject(Fault::CutBeforeRequest, releases("a"));
    assert_eq!(block_on(guard.unlock()).unwrap(), Released::Released);
    assert!(cut.happened());
    assert_eq!(server.cli(&["EXISTS", "a"]), "0");
}

#[test]
fn a_late_acquire_creates_nothing_after_its_claim_was_given_up() {
    let (server, proxy, locks) = linked();
    let late = proxy.inject(Fault::HoldRequest, acquires("a"));
    let mutex = locks.mutex("a");
    abandon(mutex.lock(), || late.happened());
    // The connection dies with the request still on its way, and the claim is released on another.
    late.cut_client();
    block_on(locks.close());
    assert_eq!(proxy.count(releases("a")), 1);
    late.release();
    assert_eq!(server.cli(&["EXISTS", "a"]), "0", "the late request took the lock for nobody");
    assert_eq!(block_on(lock(&mutex).unlock()).unwrap(), Released::Released);
}

#[test]
fn a_late_acquire_creates_nothing_after_the_claim_was_granted_again_and_unlocked() {
    let (server, proxy, locks) = linked_to(RedisServer::start(), "?timeout=300ms");
    let late = proxy.inject(Fault::HoldRequest, acquires("a"));
    let mutex = locks.mutex("a");
    let waiter = thread::spawn(move || lock(&mutex));
    late.wait();
    late.cut_client();
    let guard = waiter.join().unwrap();
    assert_eq!(proxy.count(acquires("a")), 2, "presented again on a new connection");
    assert_eq!(block_on(guard.unlock()).unwrap(), Released::Released);
    late.release();
    assert_eq!(server.cli(&["EXISTS", "a"]), "0", "the late request took the lock for nobody");
}

#[test]
fn a_late_acquire_creates_nothing_after_a_guard_that_heard_of_its_loss_was_dropped() {
    let (server, proxy, locks) = linked();
    let late = proxy.inject(Fault::HoldRequest, acquires("a"));
    let mutex = locks.mutex("a").ttl(ms(2_000));
    let waiter = thread::spawn(move || lock(&mutex));
    late.wait();
    late.cut_client();
    let guard = waiter.join().unwrap();
    server.cli(&["FLUSHALL"]);
    assert_eq!(block_on(guard.lost()), Loss::Removed);
    drop(guard);
    block_on(locks.close());
    late.release();
    assert_eq!(server.cli(&["EXISTS", "a"]), "0", "the late request took the lock for nobody");
}

#[test]
fn a_late_renewal_brings_nothing_back() {
    let (server, proxy, locks) = linked();
    let guard = lock(&locks.mutex("a").ttl(ms(1_000)));
    let late = proxy.inject(Fault::HoldRequest, renews("a"));
    late.wait();
    late.cut_client();
    server.cli(&["DEL", "a"]);
    late.release();
    assert_eq!(server.cli(&["EXISTS", "a"]), "0");
    assert_eq!(block_on(guard.lost()), Loss::Removed);
    assert_eq!(block_on(guard.unlock()).unwrap(), Released::NotHeld);
}

#[test]
fn an_acquire_dropped_while_its_reply_is_on_the_way_leaves_nothing() {
    let (server, proxy, locks) = linked();
    let held = proxy.inject(Fault::HoldReply, acquires("a"));
    abandon(locks.mutex("a").lock(), || held.happened() && server.cli(&["EXISTS", "a"]) == "1");
    held.release();
    block_on(locks.close());
    assert_eq!(server.cli(&["EXISTS", "a"]), "0");
}

#[test]
fn an_unlock_dropped_while_its_reply_is_on_the_way_still_frees() {
    let (server, proxy, locks) = linked();
    let guard = lock(&locks.mutex("a"));
    let held = proxy.inject(Fault::HoldReply, releases("a"));
    abandon(guard.unlock(), || held.happened());
    held.release();
    block_on(locks.close());
    assert_eq!(server.cli(&["EXISTS", "a"]), "0");
}

#[test]
fn one_renewal_without_an_answer_makes_unsure_and_the_next_answer_sure() {
    let (_server, proxy, locks) = linked();
    let guard = lock(&locks.mutex("a").ttl(ms(3_000)));
    let cut = proxy.inject(Fault::CutBeforeReply, renews("a"));
    // The renewal after the cut one is held back, so that the state between the two can be seen.
    let next = proxy.inject_nth(1, Fault::HoldReply, move |command| renews("a")(command));
    cut.wait();
    next.wait();
    assert_eq!(guard.status(), Status::Unsure);
    let until = guard.valid_until();
    let changed = guard.changed();
    next.release();
    block_on(changed);
    eventually("sure again", || guard.status() == Status::Held);
    assert!(guard.valid_until() > until, "and renewed");
}

#[test]
fn a_black_hole_is_a_loss_told_before_the_server_grants_anew() {
    let (server, proxy, locks) = linked_to(RedisServer::start(), "?timeout=200ms");
    let guard = lock(&locks.mutex("a").ttl(ms(1_000)));
    let other = connect(&server.url()).mutex("a");
    proxy.black_hole(true);
    let watcher = {
        let lost = guard.lost();
        thread::spawn(move || (block_on(lost), clock::now()))
    };
    let second = lock_soon(&other);
    let granted = clock::now();
    let (loss, told) = watcher.join().unwrap();
    assert_eq!((loss, guard.status(), guard.remaining()), (Loss::Expired, Status::Lost, ms(0)));
    assert!(
        guard.valid_until() < granted,
        "the first could be trusted only while the second was not granted"
    );
    assert!(told < granted.plus(ms(2_000)), "and the watcher was not left waiting");
    assert!(second.fencing_token() > guard.fencing_token());
    // The link heals with the old renewals in it: they change nothing for the new holder.
    proxy.black_hole(false);
    assert_eq!(block_on(guard.unlock()).unwrap(), Released::HeldByOther);
    assert_eq!(second.status(), Status::Held);
    assert_eq!(block_on(second.unlock()).unwrap(), Released::Released);
}

#[test]
fn a_short_black_hole_costs_no_lock() {
    let (_server, proxy, locks) = linked_to(RedisServer::start(), "?timeout=200ms");
    let guard = lock(&locks.mutex("a").ttl(ms(20_000)));
    // Two renewals in a row find nobody, then a new connection does.
    proxy.black_hole(true);
    proxy.wait_for(1, renews("a"));
    eventually("unsure", || guard.status() == Status::Unsure);
    let accepted = proxy.accepted();
    eventually("the silent connection is given up", || proxy.accepted() > accepted);
    proxy.black_hole(false);
    eventually("sure again", || guard.status() == Status::Held);
    assert_eq!(block_on(guard.unlock()).unwrap(), Released::Released);
}

#[test]
fn a_refused_connection_fails_fast_at_the_first_look_and_is_ridden_out_while_waiting() {
    let (server, proxy, locks) = linked();
    let holder = lock(&connect(&server.url()).mutex("a"));
    let mutex = locks.mutex("a").ttl(ms(10_000)).retry(Retry::constant(ms(20)));
    let waiter = thread::spawn({
        let mutex = mutex.clone();
        move || lock_soon(&mutex)
    });
    proxy.wait_for(2, acquires("a"));
    proxy.refuse(true);
    proxy.cut_all();
    eventually("the connection is cut", || proxy.open_connections() == 0);
    let error = block_on(mutex.try_lock()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
    block_on(holder.unlock()).unwrap();
    proxy.refuse(false);
    assert_eq!(block_on(waiter.join().unwrap().unlock()).unwrap(), Released::Released);
}

#[test]
fn after_a_known_unlock_nothing_is_sent_for_the_lock() {
    let (_server, proxy, locks) = linked();
    for forget in [false, true] {
        // An extension whose reply is on the way when the guard is unlocked is the hard case.
        let guard = lock(&locks.mutex("a").ttl(ms(500)));
        proxy.wait_for(1, renews("a"));
        if forget {
            drop(guard);
            eventually("released", || proxy.count(releases("a")) == 1);
        } else {
            assert_eq!(block_on(guard.unlock()).unwrap(), Released::Released);
        }
        proxy.forget();
        // Three renewals of another lock are the proof that time for several of this one has passed.
        let other = lock(&locks.mutex("b").ttl(ms(500)));
        proxy.wait_for(3, renews("b"));
        block_on(other.unlock()).unwrap();
        assert_eq!(proxy.count(|command| command.mentions("a")), 0);
        proxy.forget();
    }
    assert_eq!(proxy.count(about("a")), 0);
}

#[test]
fn a_storm_of_cuts_breaks_no_exclusion_and_leaves_nothing() {
    const NAMES: usize = 4;
    const TASKS: usize = 64;
    const FAULTS: usize = 60;
    let (server, proxy, locks) = linked_to(RedisServer::start(), "?timeout=400ms");
    let stop = Arc::new(AtomicBool::new(false));
    let inside: Arc<[AtomicU64; NAMES]> = Arc::default();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let tasks: Vec<_> = (0..TASKS)
        .map(|task| {
            let (stop, inside) = (stop.clone(), inside.clone());
            let mutex = locks.mutex(format!("storm-{}", task % NAMES)).ttl(ms(120_000));
            runtime.spawn(async move {
                let (mut granted, mut last) = (0, None);
                while !stop.load(Ordering::Relaxed) {
                    match mutex.lock().await {
                        Ok(guard) => {
                            assert_eq!(inside[task % NAMES].fetch_add(1, Ordering::SeqCst), 0, "two holders");
                            tokio::task::yield_now().await;
                            inside[task % NAMES].fetch_sub(1, Ordering::SeqCst);
                            assert!(Some(guard.fencing_token()) > last, "the token grew");
                            (granted, last) = (granted + 1, Some(guard.fencing_token()));
                            // One in four lets the drop do it.
                            if granted % 4 == 0 {
                                drop(guard);
                            } else if let Err(error) = guard.unlock().await {
                                assert!(error.is_transient(), "{error}");
                            }
                        }
                        Err(error) => assert!(error.is_transient(), "{error}"),
                    }
                }
                granted
            })
        })
        .collect();
    for number in 0..FAULTS {
        let fault = [Fault::CutBeforeReply, Fault::HoldRequest, Fault::CutBeforeRequest][number % 3];
        let hit = proxy.inject_nth(1 + number % 7, fault, leasehold_chaos::proxy::Command::is_script);
        hit.wait();
        if fault == Fault::HoldRequest {
            // It arrives when the client has long gone on, over another connection.
            hit.cut_client();
            let accepted = proxy.accepted();
            eventually("the client has dialled again", || proxy.accepted() > accepted);
            proxy.forget();
            proxy.wait_for(3, leasehold_chaos::proxy::Command::is_script);
            hit.release();
        }
    }
    stop.store(true, Ordering::Relaxed);
    // Far less than the TTL: a lock that was taken for nobody would hold them up.
    let deadline = clock::now().plus(leasehold_chaos::PATIENCE);
    let mut granted = 0;
    for task in tasks {
        let ended = runtime.block_on(clock::timeout_at(deadline, task));
        granted += ended.expect("no lock stays behind").unwrap();
    }
    assert!(granted > FAULTS as u64, "{granted} grants");
    block_on(locks.close());
    for name in 0..NAMES {
        assert_eq!(server.cli(&["EXISTS", &format!("storm-{name}")]), "0", "storm-{name} was left behind");
    }
}

#[test]
fn ten_thousand_held_locks_cost_one_command_per_hundred_and_interval() {
    const LOCKS: usize = 10_000;
    let (_server, proxy, locks) = linked();
    let guards: Vec<_> =
        (0..LOCKS).map(|n| lock(&locks.mutex(format!("lock-{n}")).ttl(ms(20_000)))).collect();
    let is_renewal = |command: &leasehold_chaos::proxy::Command| {
        command.is_script() && command.args.iter().any(|arg| arg.starts_with(b"leasehold:index:"))
    };
    // The first renewals bring all of them into step; then two whole intervals are looked at, by the server's own word.
    let renewed = |commands: &[leasehold_chaos::proxy::Command]| -> usize {
        let keys = |command: &leasehold_chaos::proxy::Command| -> usize {
            String::from_utf8_lossy(&command.args[2]).parse::<usize>().unwrap() - 1
        };
        commands.iter().filter(|command| is_renewal(command)).map(keys).sum()
    };
    eventually("all were renewed twice", || renewed(&proxy.commands()) >= 2 * LOCKS);
    proxy.forget();
    eventually("all were renewed once more", || renewed(&proxy.commands()) >= LOCKS);
    let commands = proxy.commands();
    let (count, keys) = (commands.iter().filter(|command| is_renewal(command)).count(), renewed(&commands));
    assert!(count * 100 <= keys + 100 * 2, "{count} commands for {keys} renewals");
    assert!(guards.iter().all(|guard| guard.status() == Status::Held));
    drop(guards);
    block_on(locks.close());
}

#[test]
fn a_lease_counts_from_before_the_request_was_sent() {
    let (_server, proxy, locks) = linked();
    let late = ms(600);
    proxy.delay_replies(late);
    let mutex = locks.mutex("a").ttl(ms(30_000));
    let before = clock::now();
    let guard = lock(&mutex.clone().renew(false));
    // The answer came so late; of the lease that much had gone by then.
    assert!(guard.valid_until() < before.plus(ms(30_000)), "{:?}", guard.remaining());
    assert!(guard.remaining() + late < ms(30_000));
    let sent = clock::now();
    let left = block_on(guard.extend(ms(60_000))).unwrap();
    assert!(left + late < ms(60_000) && guard.valid_until() < sent.plus(ms(60_000)), "{left:?}");
    proxy.delay_replies(ms(0));
    assert_eq!(block_on(guard.unlock()).unwrap(), Released::Released);

    // The same for what the keeper renews.
    let guard = lock(&locks.mutex("b").ttl(ms(6_000)));
    proxy.delay_replies(late);
    let first = guard.valid_until();
    eventually("a renewal that was answered late", || guard.valid_until() > first);
    assert!(guard.remaining() + late < ms(6_000), "{:?}", guard.remaining());
}
