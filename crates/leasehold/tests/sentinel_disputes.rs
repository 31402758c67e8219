//! Sentinels that do not agree who is the master, or may not tell by which epoch they go.
#![allow(clippy::unwrap_used, reason = "a test")]

mod bad_days;

use std::time::Duration;

use bad_days::{connect, lock, ms};
use leasehold::{Error, ErrorKind, Guard, Locks, Status, clock};
use leasehold_chaos::sentinel::{Deployment, Layout, url_by};
use leasehold_chaos::servers::RedisServer;
use leasehold_chaos::{eventually, within};
use pollster::block_on;

/// Longer than a majority must last to be right, with what it takes to ask.
const SETTLED_WITHIN: Duration = Duration::from_secs(30);

fn has(server: &RedisServer, name: &str) -> bool {
    server.cli(&["EXISTS", name]) == "1"
}

/// Whether a lock taken now is taken at this server.
fn locks_at(locks: &Locks, server: &RedisServer) -> bool {
    let mutex = locks.mutex("probe").ttl(ms(2_000));
    match block_on(mutex.try_lock()) {
        Ok(Some(guard)) => {
            let there = has(server, "probe");
            let _ = block_on(guard.unlock());
            there
        }
        Ok(None) => false,
        Err(error) => {
            assert!(error.is_transient() || error.kind() == ErrorKind::Unknown, "{error}");
            false
        }
    }
}

/// A lock that hears of a new master from nothing but the sentinels: it is renewed every six minutes.
fn long_hold(locks: &Locks, name: &str) -> Guard {
    let guard = lock(&locks.mutex(name).ttl(ms(3_600_000)));
    block_on(guard.changed());
    guard
}

#[test]
fn sentinels_that_may_not_tell_their_epochs_have_a_frozen_master_left_all_the_same() {
    let rule = "watch on >hunter3 allchannels -@all +ping +subscribe +sentinel|get-master-addr-by-name";
    let deployment = Layout::default().sentinel_user(rule).start();
    let locks = connect(&format!("{}?sentinel_user=watch&sentinel_password=hunter3", deployment.url()));
    let guard = long_hold(&locks, "a");
    eventually("the replicas have the lock", || deployment.servers.iter().all(|server| has(server, "a")));
    let (old, before) = (deployment.master(), guard.valid_until());
    deployment.servers[old].pause();
    let (new, _) = deployment.promoted(old);
    let began = clock::now();
    eventually("it is confirmed by the new master", || {
        guard.valid_until() > before && guard.status() == Status::Held
    });
    let took = clock::now().since(began);
    println!("confirmed after {took:?}");
    assert!(took < ms(8_000), "by what one sentinel says, and not by the majority alone: {took:?}");
    assert!(locks_at(&locks, &deployment.servers[new]));
    deployment.servers[old].resume();
    block_on(guard.unlock()).unwrap();
}

#[test]
fn a_sentinel_with_a_left_over_epoch_does_not_win_against_the_others_for_good() {
    let (current, former) = (Deployment::start(), Deployment::start());
    // What it was before `SENTINEL REMOVE` and `MONITOR`: in a later epoch than the others know of.
    former.fail_over();
    eventually("the first sentinel has heard of it", || former.master() != 0);
    let mut ports = vec![former.sentinels[0].port()];
    ports.extend(current.sentinels.iter().map(RedisServer::port));
    let locks = connect(&url_by(&ports));
    let guard = lock(&locks.mutex("a"));
    assert!(has(&former.servers[former.master()], "a"), "of two masters the later one is right, at first");
    let master = &current.servers[current.master()];
    within(SETTLED_WITHIN, "the majority is followed", || locks_at(&locks, master));
    // Nor does it win when the connection breaks.
    for _ in 0..5 {
        master.cli(&["CLIENT", "KILL", "TYPE", "normal"]);
        eventually("a lock can be had again, there", || {
            let outcome: Result<_, Error> = block_on(locks.mutex("b").ttl(ms(60_000)).try_lock());
            outcome.is_ok_and(|guard| {
                let guard = guard.expect("nobody else has it");
                assert!(has(master, "b"), "it is taken there");
                block_on(guard.unlock()).is_ok()
            })
        });
    }
    drop(guard);
}

#[test]
fn a_sentinel_on_the_smaller_side_does_not_keep_its_clients_there() {
    let (larger, smaller) = (Deployment::start(), RedisServer::start());
    let lone = Layout::default().sentinels(1).watching(smaller.port());
    larger.fail_over();
    larger.settle();
    let mut ports = vec![lone.port()];
    ports.extend(larger.sentinels.iter().map(RedisServer::port));
    // It listens to the first, which is the only one that answers yet.
    larger.sentinels.iter().for_each(RedisServer::pause);
    let locks = connect(&url_by(&ports));
    let guard = long_hold(&locks, "a");
    assert!(has(&smaller, "a"));
    larger.sentinels.iter().for_each(RedisServer::resume);
    let began = clock::now();
    eventually("its holder is told", || guard.status() == Status::Lost);
    let took = clock::now().since(began);
    println!("told after {took:?}");
    assert!(took < ms(8_000), "by a later epoch, and not by the majority alone: {took:?}");
    eventually("locks are taken on the larger side", || locks_at(&locks, &larger.servers[larger.master()]));
}

#[test]
fn who_holds_a_lock_is_told_when_another_hears_that_the_master_is_none_any_more() {
    let (master, other) = (RedisServer::start(), RedisServer::start());
    // Alone, and with no replica to promote: it does nothing about it.
    let lone = Layout::default().sentinels(1).watching(master.port());
    let locks = connect(&url_by(&[lone.port()]));
    let guard = long_hold(&locks, "a");
    assert_eq!(master.cli(&["REPLICAOF", "127.0.0.1", &other.port().to_string()]), "OK");
    assert_eq!(guard.status(), Status::Held, "nothing was sent on the connection since");
    let error = block_on(locks.mutex("b").try_lock()).expect_err("it takes no writes");
    assert!(error.is_transient(), "{error}");
    within(Duration::from_secs(10), "the holder is told", || guard.status() != Status::Held);
}
