//! Bad days of a waiter's process: killed, stopped, off its clock; and the order of arrival over many processes.
#![allow(clippy::unwrap_used, reason = "a test")]

mod bad_days;

use bad_days::other::{self, Other};
use bad_days::{Waiter, assert_no_line, connect, in_line, lock, ms};
use leasehold::{Released, Status, clock};
use leasehold_chaos::eventually;
use leasehold_chaos::servers::RedisServer;
use leasehold_chaos::wall_clock::WallClock;
use pollster::block_on;
use rustix::process::Signal;

/// The other process of these tests; no test of its own.
#[test]
fn other() {
    other::serve();
}

#[test]
fn the_first_in_line_killed_is_passed_over_at_once() {
    let server = RedisServer::start();
    let locks = connect(&server.url());
    let holder = lock(&locks.mutex("a"));
    let mut first = Other::waiting(&server.url());
    first.wait_in_line("a", 30_000, 3, "hold");
    let next = Waiter::start(&locks.mutex("a"));
    first.kill9();
    eventually("the server knows", || server.cli(&["PUBSUB", "CHANNELS"]).lines().count() == 1);
    let released = clock::now();
    assert_eq!(block_on(holder.unlock()).unwrap(), Released::Released);
    let guard = next.guard();
    let waited = clock::now().since(released);
    println!("behind three killed waiters: {waited:?}");
    assert!(waited < ms(1_000), "nobody listens there, and the server knows: {waited:?}");
    assert_eq!(block_on(guard.unlock()).unwrap(), Released::Released);
    // The dead keep their places only for as long as their process counts as alive.
    eventually("the line is gone", || {
        block_on(locks.mutex("a").try_lock()).unwrap().is_some() && in_line(&server, "a") == 0
    });
    block_on(locks.close());
    assert_no_line(&server, "a");
}

#[test]
fn the_first_in_line_killed_with_the_grant_on_its_way_costs_one_lease() {
    const TTL: u64 = 1_500;
    let server = RedisServer::start();
    let locks = connect(&server.url());
    let holder = lock(&locks.mutex("a"));
    let mut first = Other::waiting(&server.url());
    first.wait_in_line("a", TTL, 3, "hold");
    let next = Waiter::start(&locks.mutex("a").ttl(ms(TTL)));
    // Stopped, it takes nothing in any more; killed, it never will.
    first.signal(Signal::STOP);
    let released = clock::now();
    assert_eq!(block_on(holder.unlock()).unwrap(), Released::Released);
    assert_eq!(in_line(&server, "a"), 3, "the first was handed the lock");
    first.kill9();
    let guard = next.guard();
    let waited = clock::now().since(released);
    println!("behind a waiter killed with the grant, TTL {TTL} ms: {waited:?}");
    assert!((ms(TTL - 100)..ms(TTL + TTL / 3 + 200)).contains(&waited), "{waited:?}");
    assert_eq!(block_on(guard.unlock()).unwrap(), Released::Released);
    assert_no_line(&server, "a");
}

#[test]
fn a_waiter_stopped_past_its_grant_believes_nothing_old() {
    const TTL: u64 = 1_000;
    let server = RedisServer::start();
    let locks = connect(&server.url());
    let holder = lock(&locks.mutex("a"));
    let mut first = Other::waiting(&server.url());
    first.wait_in_line("a", TTL, 1, "hold");
    let next = Waiter::start(&locks.mutex("a").ttl(ms(TTL)));
    first.signal(Signal::STOP);
    assert_eq!(block_on(holder.unlock()).unwrap(), Released::Released);
    let guard = next.guard();
    // The message of its ended grant is the first thing that it sees.
    first.signal(Signal::CONT);
    eventually("it waits anew", || in_line(&server, "a") == 1);
    assert_eq!((first.heard_meanwhile(), guard.status()), (Vec::<String>::new(), Status::Held));
    let token = guard.fencing_token().get();
    assert_eq!(block_on(guard.unlock()).unwrap(), Released::Released);
    assert!(first.hear_hold().0 > token);
    first.order("unlock");
    assert_eq!(first.hear(), "Held Ok(Released)");
    assert_no_line(&server, "a");
}

#[test]
fn a_waiter_stopped_with_the_lock_just_handed_over_is_lost_at_the_first_look() {
    const TTL: u64 = 1_000;
    let server = RedisServer::start();
    let locks = connect(&server.url());
    let holder = lock(&locks.mutex("a"));
    let mut first = Other::waiting(&server.url());
    first.wait_in_line("a", TTL, 1, "hold");
    let next = Waiter::start(&locks.mutex("a").ttl(ms(TTL)));
    assert_eq!(block_on(holder.unlock()).unwrap(), Released::Released);
    let (token, _) = first.hear_hold();
    first.signal(Signal::STOP);
    let guard = next.guard();
    assert!(guard.fencing_token().get() > token);
    first.order("unlock");
    first.signal(Signal::CONT);
    assert_eq!(first.hear(), "Lost Ok(HeldByOther)");
    assert_eq!(block_on(guard.unlock()).unwrap(), Released::Released);
    assert_no_line(&server, "a");
}

#[test]
fn a_waiter_with_a_wrong_wall_clock_waits_and_holds_as_any_other() {
    const HOUR: i64 = 3_600_000_000;
    let server = RedisServer::start();
    let locks = connect(&server.url());
    let folder = tempfile::tempdir().unwrap();
    let wall_clock = WallClock::new(folder.path());
    for (at_first, then) in [(-HOUR, 0), (HOUR, 0), (0, HOUR), (0, -HOUR), (HOUR, HOUR)] {
        wall_clock.set_offset(at_first);
        let holder = lock(&locks.mutex("a"));
        let mut other = Other::start("other", &server.url(), |command| wall_clock.give_to(command));
        assert_eq!(other.hear(), "ready");
        other.wait_in_line("a", 20_000, 1, "hold");
        wall_clock.set_offset(then);
        let token = holder.fencing_token().get();
        let released = clock::now();
        assert_eq!(block_on(holder.unlock()).unwrap(), Released::Released);
        assert!(other.hear_hold().0 > token);
        let waited = clock::now().since(released);
        assert!(waited < ms(3_000), "called, not found by expiry: {waited:?}");
        other.order("confirm");
        let said = other.hear();
        // A clock that ran ahead looks like a machine that was paused: unsure until confirmed.
        let expected = if then > at_first { "Unsure Held" } else { "Held Held" };
        assert!(said == expected || said == "Held Held", "{at_first} {then}: {said}");
        other.order("unlock");
        assert_eq!(other.hear(), "Held Ok(Released)");
    }
    assert_no_line(&server, "a");
}

#[test]
fn fifty_waiters_of_five_processes_are_served_in_the_order_of_arrival() {
    let server = RedisServer::start();
    let locks = connect(&server.url());
    let holder = lock(&locks.mutex("a"));
    let mut others: Vec<_> = (0..5).map(|_| Other::waiting(&server.url())).collect();
    for round in 0..10 {
        for other in 0..5 {
            // Not the same order in every round.
            others[(other * 2 + round) % 5].wait_in_line("a", 30_000, 1, "pass");
        }
    }
    assert_eq!(in_line(&server, "a"), 50);
    assert_eq!(block_on(holder.unlock()).unwrap(), Released::Released);
    let mut holds: Vec<Vec<_>> =
        others.iter_mut().map(|other| (0..10).map(|_| other.hear_hold()).collect()).collect();
    let mut last = (0, 0);
    for round in 0..10 {
        for other in 0..5 {
            // Within a process they are alike: each process's own are told in the order of its turns.
            let hold = holds[(other * 2 + round) % 5].remove(0);
            assert!(hold.0 > last.0 && hold.1 > last.1, "round {round}, place {other}");
            last = hold;
        }
    }
    assert_no_line(&server, "a");
}
