//! Grants that replicas acknowledge.
#![allow(clippy::unwrap_used, reason = "a test")]

mod bad_days;

use std::sync::Arc;
use std::thread;

use bad_days::{Waiter, abandon, connect, linked, linked_to, lock, lock_soon, ms, renews};
use leasehold::stores::memory::MemoryStore;
use leasehold::{Error, ErrorKind, Locks, Mutex, Released, Status, clock};
use leasehold_chaos::eventually;
use leasehold_chaos::proxy::{Command, Fault};
use leasehold_chaos::servers::RedisServer;
use pollster::block_on;

/// A master and two replicas that are linked to it, and locks on the master.
fn followed() -> (RedisServer, [RedisServer; 2], Locks) {
    let master = RedisServer::start();
    let replicas = [(); 2].map(|()| RedisServer::builder().replica_of(master.port()).start());
    eventually("the replicas are linked", || {
        master.cli(&["INFO", "replication"]).matches("state=online").count() == 2
    });
    let locks = connect(&master.url());
    (master, replicas, locks)
}

fn has(server: &RedisServer, name: &str) -> bool {
    server.cli(&["EXISTS", name]) == "1"
}

fn refused(mutex: &Mutex) -> Error {
    block_on(mutex.lock()).expect_err("it is refused")
}

fn waits(command: &Command) -> bool {
    command.name().starts_with("WAIT")
}

#[test]
fn a_grant_says_how_many_replicas_have_it_and_they_do() {
    let (_master, replicas, locks) = followed();
    for round in 0..20 {
        let mutex = locks.mutex("a").replicas(2, ms(5_000));
        let guard = lock(&mutex);
        assert_eq!(guard.replicas(), Some(2));
        assert!(replicas.iter().all(|replica| has(replica, "a")), "round {round}");
        // So has one that was handed over.
        let waiter = Waiter::start(&mutex);
        let token = guard.fencing_token();
        assert_eq!(block_on(guard.unlock()).unwrap(), Released::Released);
        let guard = waiter.guard();
        assert_eq!(guard.replicas(), Some(2));
        for replica in &replicas {
            assert!(replica.cli(&["GET", "a"]).contains(&guard.claim_id().to_string()), "round {round}");
        }
        assert!(guard.fencing_token() > token);
        assert_eq!(block_on(guard.unlock()).unwrap(), Released::Released);
    }
    assert_eq!(lock(&locks.mutex("b")).replicas(), None, "who does not ask is not told");
    // Enough is enough: nobody waits for more than was asked for.
    replicas[0].pause();
    let began = clock::now();
    let guard = lock(&locks.mutex("c").require_replicas(1, ms(9_000)));
    assert_eq!(guard.replicas(), Some(1));
    assert!(clock::now().since(began) < ms(5_000));
}

#[test]
fn a_shortfall_is_told_or_refused_as_asked_and_holds_up_nobody_else() {
    let (master, replicas, locks) = followed();
    replicas[0].pause();
    let began = clock::now();
    let kept = lock(&locks.mutex("kept").replicas(2, ms(1_500)));
    assert_eq!(kept.replicas(), Some(1));
    assert!(clock::now().since(began) >= ms(1_500), "it waited");
    assert!(has(&master, "kept") && has(&replicas[1], "kept"));

    let error = refused(&locks.mutex("refused").require_replicas(2, ms(1_500)));
    assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
    assert!(error.to_string().contains("1 of the 2 replicas"), "{error}");
    assert!(!has(&master, "refused"), "it was given back");

    // The wait blocks the connection it runs on, and that is not the others'.
    let slow = locks.mutex("slow").replicas(2, ms(9_000));
    let slow = thread::spawn(move || lock(&slow).replicas());
    eventually("the slow one waits", || {
        has(&master, "slow") && master.cli(&["INFO", "clients"]).contains("blocked_clients:1")
    });
    let began = clock::now();
    for n in 0..50 {
        assert_eq!(block_on(lock(&locks.mutex(format!("quick-{n}"))).unlock()).unwrap(), Released::Released);
    }
    // Blocked, the first would have waited for its time-out of two seconds.
    let took = clock::now().since(began);
    assert!(!slow.is_finished() && took < ms(1_500), "all of them were quicker: {took:?}");
    replicas[0].resume();
    assert_eq!(slow.join().unwrap(), Some(2));
    assert_eq!(block_on(kept.unlock()).unwrap(), Released::Released);
}

#[test]
fn a_third_of_the_ttl_is_the_longest_wait() {
    let server = RedisServer::start();
    let locks = connect(&server.url());
    let began = clock::now();
    let guard = lock(&locks.mutex("a").ttl(ms(1_500)).renew(false).replicas(1, ms(60_000)));
    let waited = clock::now().since(began);
    assert_eq!(guard.replicas(), Some(0), "it has none");
    assert!(waited >= ms(500) && waited < ms(1_400), "{waited:?}");
    assert_eq!(block_on(guard.unlock()).unwrap(), Released::Released);
}

#[test]
fn a_dial_that_hangs_does_not_outlast_the_lease() {
    let (_server, proxy, locks) = linked_to(RedisServer::start(), "?timeout=20s");
    let held = proxy.inject(Fault::HoldRequest, |command: &Command| command.name() == "HELLO");
    let began = clock::now();
    let guard = lock(&locks.mutex("a").ttl(ms(6_000)).renew(false).replicas(1, ms(100)));
    let waited = clock::now().since(began);
    assert_eq!(guard.replicas(), Some(0), "nobody was asked");
    assert!(held.happened() && waited < ms(5_000), "{waited:?}");
    assert_ne!(guard.status(), Status::Lost);
    assert_eq!(block_on(guard.unlock()).unwrap(), Released::Released);
}

#[test]
fn the_end_of_a_connection_on_which_replicas_were_waited_for_disturbs_nobody() {
    let (server, proxy, locks) = linked();
    let guard = lock(&locks.mutex("a").ttl(ms(3_600_000)));
    // The first look; the next is due in six minutes, unless something happens.
    block_on(guard.changed());
    assert_eq!(proxy.count(renews("a")), 1);
    let waited = lock(&locks.mutex("b").replicas(1, ms(20)));
    assert_eq!(block_on(waited.unlock()).unwrap(), Released::Released);
    let clients = server.cli(&["CLIENT", "LIST"]);
    let aside = clients.lines().find(|line| line.contains("cmd=wait")).expect("it is kept");
    let id = aside.split(' ').find_map(|word| word.strip_prefix("id=")).unwrap();
    assert_eq!(server.cli(&["CLIENT", "KILL", "ID", id]), "1");
    eventually("one connection only is left", || proxy.open_connections() == 1);
    for n in 0..100 {
        assert_eq!(block_on(lock(&locks.mutex(format!("n{n}"))).unlock()).unwrap(), Released::Released);
    }
    assert_eq!(proxy.count(renews("a")), 1, "its own connection is as it was");
    assert_eq!((proxy.accepted(), block_on(guard.unlock()).unwrap()), (2, Released::Released));
}

#[test]
fn a_wait_given_up_leaves_nothing() {
    let (master, replicas, locks) = followed();
    replicas.iter().for_each(RedisServer::pause);
    let mutex = locks.mutex("a").require_replicas(2, ms(9_000));
    abandon(mutex.lock(), || {
        has(&master, "a") && master.cli(&["INFO", "clients"]).contains("blocked_clients:1")
    });
    eventually("it is given back", || !has(&master, "a"));
    eventually("and waited for by nobody", || master.cli(&["INFO", "clients"]).contains("blocked_clients:0"));
    assert_eq!(block_on(lock_soon(&locks.mutex("a")).unlock()).unwrap(), Released::Released);
}

#[test]
fn a_lock_that_vanished_before_the_wait_is_an_error() {
    let (server, proxy, locks) = linked();
    let mutex = locks.mutex("a").replicas(1, ms(2_000));
    let held = proxy.inject(Fault::HoldRequest, |command: &Command| {
        command.is_script()
            && command.args.iter().any(|arg| arg.starts_with(b"-- KEYS: lock. ARGV: owner with"))
    });
    let locking = thread::spawn(move || block_on(mutex.lock()));
    held.wait();
    server.cli(&["DEL", "a"]);
    held.release();
    let error = locking.join().unwrap().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Lost, "{error}");
    assert!(!has(&server, "a"), "nothing was made of it anew");
}

#[test]
fn who_does_not_ask_pays_nothing() {
    let (_server, proxy, locks) = linked();
    for _ in 0..3 {
        assert_eq!(block_on(lock(&locks.mutex("a")).unlock()).unwrap(), Released::Released);
    }
    assert_eq!((proxy.count(waits), proxy.accepted()), (0, 1));
    for _ in 0..3 {
        let guard = lock(&locks.mutex("a").replicas(1, ms(20)));
        assert_eq!(block_on(guard.unlock()).unwrap(), Released::Released);
    }
    assert_eq!((proxy.count(waits), proxy.accepted()), (3, 2), "one connection more, for all of them");
}

#[test]
fn many_who_wait_at_once_share_a_few_connections() {
    let (_server, proxy, locks) = linked_to(RedisServer::start(), "?timeout=20s");
    let waiting: Vec<_> = (0..40)
        .map(|n| {
            let mutex = locks.mutex(format!("n{n}")).ttl(ms(60_000)).replicas(1, ms(200));
            thread::spawn(move || lock(&mutex))
        })
        .collect();
    for guard in waiting {
        let guard = guard.join().unwrap();
        assert_eq!((guard.replicas(), block_on(guard.unlock()).unwrap()), (Some(0), Released::Released));
    }
    assert_eq!(proxy.count(waits), 40, "each had its turn");
    let dialled = proxy.accepted() - 1;
    assert!((2..=16).contains(&dialled), "{dialled} connections");
}

#[test]
fn what_a_store_cannot_do_it_refuses_and_gives_the_lock_back() {
    let memory = Locks::over(Arc::new(MemoryStore::new())).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let sqlite = connect(&format!("sqlite:{}", folder.path().join("locks.db").display()));
    for locks in [&memory, &sqlite] {
        for mutex in [locks.mutex("a").replicas(1, ms(100)), locks.mutex("a").require_replicas(1, ms(100))] {
            let error = refused(&mutex);
            assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
        }
        assert!(block_on(locks.mutex("a").try_lock()).unwrap().is_some(), "it was given back");
        for mutex in [locks.mutex("a").replicas(0, ms(100)), locks.mutex("a").replicas(1, ms(0))] {
            assert_eq!(refused(&mutex).kind(), ErrorKind::Invalid);
        }
    }
}

#[test]
fn disks_are_waited_for_where_the_server_can() {
    let (master, replicas, locks) = followed();
    for server in [&master, &replicas[0], &replicas[1]] {
        assert_eq!(server.cli(&["CONFIG", "SET", "appendonly", "yes"]), "OK");
    }
    let mutex = locks.mutex("a").require_replicas(2, ms(9_000)).replicas_on_disk(true);
    // Known by the command, not by a version: other servers have it too.
    if master.cli(&["COMMAND", "INFO", "WAITAOF"]).to_lowercase().contains("waitaof") {
        assert_eq!(lock(&mutex).replicas(), Some(2));
    } else {
        let error = refused(&mutex);
        assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
        assert!(error.to_string().contains("WAITAOF"), "{error}");
    }
    eventually("it is given back", || !has(&master, "a"));
}
