//! Bad days of a waiter's link: the connection cut, messages lost or late, a whole host gone silent, a wait given up in
//! the moment of the hand-over.
#![allow(clippy::unwrap_used, reason = "a test")]

mod bad_days;

use bad_days::other::{self, Other};
use bad_days::{
    Waiter, acquires, assert_no_line, connect, in_line, linked, lock, lock_soon, ms, refreshes, subscribes,
};
use leasehold::{Released, Status, clock};
use leasehold_chaos::checker::boot_nanos;
use leasehold_chaos::eventually;
use leasehold_chaos::proxy::{Proxy, PushFault};
use leasehold_chaos::servers::RedisServer;
use pollster::block_on;

/// The other process of these tests; no test of its own.
#[test]
fn other() {
    other::serve();
}

#[test]
fn a_connection_cut_while_waiting_is_made_anew_and_the_order_stays() {
    let (server, proxy, locks) = linked();
    let (direct, second_process) = (connect(&server.url()), connect(&server.url()));
    let holder = lock(&direct.mutex("a"));
    let waiters =
        [&locks, &second_process, &locks].map(|locks| Waiter::start(&locks.mutex("a").ttl(ms(30_000))));
    assert_eq!(in_line(&server, "a"), 3);
    proxy.forget();
    let cut = clock::now();
    proxy.cut_all();
    proxy.wait_for(1, subscribes);
    proxy.wait_for(1, refreshes("a"));
    let anew = clock::now().since(cut);
    assert!(anew < ms(1_500), "at once, not when it is next heard of: {anew:?}");
    eventually("both processes can be called", || server.cli(&["PUBSUB", "CHANNELS"]).lines().count() == 2);
    assert_eq!((in_line(&server, "a"), proxy.count(acquires("a"))), (3, 0), "nobody had to join again");
    let mut last = holder.fencing_token();
    assert_eq!(block_on(holder.unlock()).unwrap(), Released::Released);
    for waiter in waiters {
        let guard = waiter.guard();
        assert!(guard.fencing_token() > last, "in order");
        last = guard.fencing_token();
        assert_eq!(block_on(guard.unlock()).unwrap(), Released::Released);
    }
    assert_no_line(&server, "a");
}

#[test]
fn a_lost_message_is_found_by_the_next_refresh() {
    let (server, proxy, locks) = linked();
    let holder = lock(&connect(&server.url()).mutex("a"));
    let waiter = Waiter::start(&locks.mutex("a").ttl(ms(6_000)));
    let lost = proxy.inject_push(PushFault::Drop, |_| true);
    let token = holder.fencing_token();
    assert_eq!(block_on(holder.unlock()).unwrap(), Released::Released);
    let released = clock::now();
    lost.wait();
    assert!(block_on(connect(&server.url()).mutex("a").try_lock()).unwrap().is_none(), "it is the waiter's");
    let guard = waiter.guard();
    let waited = clock::now().since(released);
    assert!(waited < ms(3_500), "within a third of its TTL of 6 s, and not by expiry: {waited:?}");
    assert!(guard.fencing_token() > token);
    assert_eq!((guard.status(), proxy.messages().len()), (Status::Held, 1));
    assert_eq!(block_on(guard.unlock()).unwrap(), Released::Released);
    assert_no_line(&server, "a");
}

#[test]
fn a_late_message_takes_no_lock_from_whom_a_refresh_told_before() {
    let (server, proxy, locks) = linked();
    let holder = lock(&connect(&server.url()).mutex("a"));
    let waiter = Waiter::start(&locks.mutex("a").ttl(ms(1_500)));
    let late = proxy.inject_push(PushFault::Hold, |_| true);
    assert_eq!(block_on(holder.unlock()).unwrap(), Released::Released);
    late.wait();
    let guard = waiter.guard();
    assert_eq!(guard.status(), Status::Held);
    // Longer than the lease that was handed over: the keeper has renewed it meanwhile.
    let until = guard.valid_until();
    eventually("renewed", || clock::now() > until && guard.status() == Status::Held);
    late.release();
    // An answer to something that is sent after the message came shows what the message did.
    assert!(block_on(guard.extend(ms(1_500))).is_ok(), "{:?}", guard.status());
    assert!(block_on(locks.mutex("b").try_lock()).unwrap().is_some());
    assert!(block_on(guard.ttl()).unwrap() > ms(0), "the late message let the lock go");
    assert_eq!(block_on(guard.unlock()).unwrap(), Released::Released);
}

#[test]
fn a_message_later_than_its_lease_is_not_believed() {
    let (server, proxy, locks) = linked();
    let direct = connect(&server.url());
    let holder = lock(&direct.mutex("a"));
    let first = Waiter::start(&locks.mutex("a").ttl(ms(1_500)));
    let second = Waiter::start(&direct.mutex("a").ttl(ms(1_500)));
    // Nothing of the first goes through any more, in either direction.
    proxy.black_hole(true);
    assert_eq!(block_on(holder.unlock()).unwrap(), Released::Released);
    let released = clock::now();
    let guard = second.guard();
    let waited = clock::now().since(released);
    assert!(waited < ms(1_500 + 700), "one lease in total: {waited:?}");
    // Now comes the message of a grant that has ended.
    proxy.black_hole(false);
    eventually("it waits anew", || in_line(&server, "a") == 1);
    assert!(!first.has_ended() && guard.status() == Status::Held);
    let token = guard.fencing_token();
    assert_eq!(block_on(guard.unlock()).unwrap(), Released::Released);
    let guard = first.guard();
    assert!(guard.fencing_token() > token);
    assert_eq!(block_on(guard.unlock()).unwrap(), Released::Released);
    assert_no_line(&server, "a");
}

#[test]
fn a_silent_host_with_a_hundred_waiters_costs_one_lease_in_total() {
    const TTL: u64 = 1_000;
    let server = RedisServer::start();
    let proxy = Proxy::start(server.port());
    let (direct, mut silent) = (connect(&server.url()), Other::waiting(&proxy.url()));
    let holder = lock(&direct.mutex("a"));
    silent.wait_in_line("a", TTL, 100, "pass");
    let waiter = Waiter::start(&direct.mutex("a").ttl(ms(TTL)));
    assert_eq!(in_line(&server, "a"), 101);
    proxy.black_hole(true);
    assert_eq!(block_on(holder.unlock()).unwrap(), Released::Released);
    let released = clock::now();
    let guard = waiter.guard();
    let waited = clock::now().since(released);
    println!("a silent host with 100 waiters, TTL {TTL} ms: the next waited {waited:?}");
    assert!(waited < ms(TTL + 500), "{waited:?}");
    let start = boot_nanos();
    proxy.black_hole(false);
    eventually("the silent ones are back in line", || in_line(&server, "a") > 0);
    let end = boot_nanos();
    assert_eq!(guard.status(), Status::Held);
    assert_eq!(block_on(guard.unlock()).unwrap(), Released::Released);
    // Each ends, and none of them believed the grant that it slept through.
    for _ in 0..100 {
        let said = silent.hear();
        if let Some(held) = said.strip_prefix("held ") {
            let since: u64 = held.split(' ').nth(1).unwrap().parse().unwrap();
            assert!(!(start..end).contains(&since), "{said}: two holders");
        } else {
            assert!(said.starts_with("failed"), "{said}");
        }
    }
    assert_no_line(&server, "a");
}

#[test]
fn a_wait_given_up_in_the_moment_of_the_hand_over_leaks_nothing() {
    const RACES: usize = 25;
    let (server, proxy, locks) = linked();
    let (holders, nexts) = (connect(&server.url()), connect(&server.url()));
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let (mut raced, mut plain, mut rounds) = (0, 0, 0);
    let latest = clock::now().plus(leasehold_chaos::PATIENCE);
    while raced < RACES || plain < RACES {
        assert!(clock::now() < latest, "{rounds} rounds, {raced} raced, {plain} did not");
        rounds += 1;
        let holder = lock(&holders.mutex("a"));
        let (sender, joined) = std::sync::mpsc::channel();
        let mutex = locks.mutex("a").on_wait(move |_| {
            let _ = sender.send(());
        });
        let waiter = runtime.spawn(async move { mutex.lock().await });
        joined.recv_timeout(leasehold_chaos::PATIENCE).unwrap();
        let next = (rounds % 2 == 0).then(|| Waiter::start(&nexts.mutex("a")));
        proxy.forget();
        let unlocking = if rounds % 3 == 0 {
            waiter.abort();
            runtime.spawn(holder.unlock())
        } else {
            let unlocking = runtime.spawn(holder.unlock());
            block_on(clock::sleep(clock::jitter(ms(1))));
            waiter.abort();
            unlocking
        };
        let given_up = match runtime.block_on(waiter) {
            Ok(guard) => {
                assert_eq!(block_on(guard.unwrap().unlock()).unwrap(), Released::Released);
                false
            }
            Err(_) => true,
        };
        assert_eq!(runtime.block_on(unlocking).unwrap().unwrap(), Released::Released);
        // The TTL is 30 s: a lock that was left with the one who gave up would be noticed.
        let asked = clock::now();
        let guard = next.map_or_else(|| lock_soon(&nexts.mutex("a")), Waiter::guard);
        assert!(clock::now().since(asked) < ms(5_000));
        assert_eq!(block_on(guard.unlock()).unwrap(), Released::Released);
        match (given_up, proxy.messages().is_empty()) {
            (true, false) => raced += 1,
            (true, true) => plain += 1,
            _ => {}
        }
    }
    println!("{rounds} rounds: {raced} given up after the hand-over, {plain} before it");
    assert_no_line(&server, "a");
}
