//! What waiting costs, counted at a link that all processes share.
#![allow(clippy::unwrap_used, reason = "a test")]

mod bad_days;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use bad_days::other::{self, Other};
use bad_days::{
    Waiter, about, acquires, assert_no_line, connect, in_line, linked, lock, ms, refreshes, releases,
};
use leasehold::stores::redis::{RedisConfig, RedisStore};
use leasehold::{Locks, Released, clock};
use leasehold_chaos::eventually;
use leasehold_chaos::proxy::{Command, Proxy};
use leasehold_chaos::servers::RedisServer;
use pollster::block_on;

/// The other process of these tests; no test of its own.
#[test]
fn other() {
    other::serve();
}

/// A server, a link to it, and ten processes that go by that link, with so many waiters each for lock `a`.
fn ten_wait(server: &RedisServer, each: usize) -> (Proxy, Vec<Other>) {
    let proxy = Proxy::start(server.port());
    let mut others: Vec<_> = (0..10).map(|_| Other::waiting(&proxy.url())).collect();
    for other in &mut others {
        other.wait_in_line("a", 30_000, each, "pass");
    }
    assert_eq!(in_line(server, "a"), 10 * each);
    proxy.forget();
    (proxy, others)
}

#[test]
fn a_lock_that_had_a_line_costs_two_commands_again() {
    let (server, proxy, locks) = linked();
    let holder = lock(&locks.mutex("a"));
    let waiter = Waiter::start(&locks.mutex("a"));
    assert_eq!(block_on(holder.unlock()).unwrap(), Released::Released);
    assert_eq!(block_on(waiter.guard().unlock()).unwrap(), Released::Released);
    assert_no_line(&server, "a");
    proxy.forget();
    for round in 1..=20 {
        assert_eq!(block_on(lock(&locks.mutex("a")).unlock()).unwrap(), Released::Released);
        assert_eq!((proxy.count(about("a")), proxy.count(acquires("a"))), (2 * round, round));
    }
}

#[test]
fn a_hand_over_is_one_command_and_wakes_one_waiter() {
    let server = RedisServer::start();
    let holder = lock(&connect(&server.url()).mutex("a"));
    let (proxy, mut others) = ten_wait(&server, 10);
    let released = clock::now();
    assert_eq!(block_on(holder.unlock()).unwrap(), Released::Released);
    for other in &mut others {
        for _ in 0..10 {
            other.hear_hold();
        }
    }
    let took = clock::now().since(released);
    proxy.wait_for(100, releases("a"));
    assert_no_line(&server, "a");
    let (all, told) = (proxy.count(about("a")), proxy.messages().len());
    println!("100 hand-overs in {took:?}: {all} commands, {told} messages");
    assert_eq!(told, 100, "as many woken as granted");
    assert_eq!((proxy.count(releases("a")), proxy.count(acquires("a"))), (100, 0));
    assert!(all <= 200, "{all} commands for 100 hand-overs");
    assert!(took < ms(10_000), "by messages, not by refreshes: {took:?}");
}

#[test]
fn a_thousand_waiters_behind_a_holder_that_renews_cost_less_than_a_command_a_second_and_process() {
    let server = RedisServer::start();
    // Renewed every 200 ms: no look may be planned by how much of its lease is left.
    let holder = lock(&connect(&server.url()).mutex("a").ttl(ms(2_000)));
    let (proxy, _others) = ten_wait(&server, 100);
    let seconds = std::env::var("LEASEHOLD_TEST_WAIT_SECONDS").ok().map_or(10, |text| text.parse().unwrap());
    block_on(clock::sleep(ms(seconds * 1_000)));
    let (all, told) = (proxy.commands().len(), proxy.messages().len());
    println!("1,000 waiters in 10 processes, {seconds} s: {all} commands, {told} messages");
    assert!(all as u64 >= seconds, "they are kept in line: {all}");
    assert!((all as u64) < 10 * seconds, "{all} commands in {seconds} s of 10 processes");
    assert_eq!((proxy.count(refreshes("a")), told), (all, 0), "and nothing else");
    assert_eq!(in_line(&server, "a"), 1_000);
    drop(holder);
}

#[test]
fn a_holder_killed_before_a_thousand_waiters_is_followed_at_the_expiry() {
    let server = RedisServer::start();
    let mut holder = Other::waiting(&server.url());
    holder.hold("a", 3_000);
    let (proxy, mut others) = ten_wait(&server, 100);
    holder.kill9();
    let left: u64 = server.cli(&["PTTL", "a"]).parse().unwrap();
    let expiry = clock::now().plus(ms(left));
    // From a little before the expiry on, so that nothing of the time after it is left out.
    block_on(clock::sleep_until(clock::now().plus(ms(left - 10))));
    proxy.forget();
    let (_, since) = others[0].hear_hold();
    let commands = proxy.commands();
    let granted = clock::Instant::since_boot(std::time::Duration::from_nanos(since));
    let late = granted.since(expiry);
    // The first holder's own release follows its grant.
    let until = commands.iter().position(releases("a")).unwrap_or(commands.len());
    println!("held {late:?} after the expiry, {until} commands");
    assert!(late < ms(500), "{late:?}");
    assert!(
        until <= 5,
        "{until} commands: {:?}",
        commands[..until].iter().map(Command::name).collect::<Vec<_>>()
    );
    for (index, other) in others.iter_mut().enumerate() {
        for _ in usize::from(index == 0)..100 {
            other.hear_hold();
        }
    }
    assert_no_line(&server, "a");
}

#[test]
fn a_thousand_waits_given_up_at_once_leave_nothing() {
    const WAITERS: usize = 1_000;
    let server = RedisServer::start();
    let proxy = Proxy::start(server.port());
    let driver = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let config = RedisConfig::from_url(&proxy.url()).unwrap();
    let store = block_on(RedisStore::connect(config, driver.handle().clone())).unwrap();
    let locks = Locks::over(store.clone()).unwrap();
    let holder = lock(&connect(&server.url()).mutex("a"));
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let joined = Arc::new(AtomicUsize::new(0));
    let counted = joined.clone();
    let mutex = Arc::new(locks.mutex("a").on_wait(move |_| {
        counted.fetch_add(1, Ordering::SeqCst);
    }));
    let tasks: Vec<_> = (0..WAITERS)
        .map(|_| {
            let mutex = mutex.clone();
            runtime.spawn(async move { mutex.lock().await.map(drop) })
        })
        .collect();
    eventually("all know that they are in line", || joined.load(Ordering::SeqCst) >= WAITERS);
    assert_eq!(in_line(&server, "a"), WAITERS);
    assert!(store.remembered() >= WAITERS);
    assert_eq!(server.cli(&["PUBSUB", "CHANNELS"]).lines().count(), 1);
    proxy.forget();
    tasks.iter().for_each(tokio::task::JoinHandle::abort);
    eventually("nobody is in line", || in_line(&server, "a") == 0);
    drop((mutex, tasks));
    eventually("nothing of them is remembered here", || store.remembered() == 0);
    eventually("nor subscribed", || server.cli(&["PUBSUB", "CHANNELS"]).is_empty());
    let all = proxy.commands().len();
    println!("{WAITERS} waits given up: {all} commands");
    assert!(all <= 150, "{all} commands");
    assert_eq!(block_on(holder.unlock()).unwrap(), Released::Released);
    assert_no_line(&server, "a");
    let gone = server.cli(&["KEYS", "*:gone:*"]).lines().count();
    assert_eq!(gone, 0, "no tombstones: every answer had come");
}
