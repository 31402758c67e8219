//! Edges of the line on Redis: states that a crowd, a short outage or a dead process leaves behind.
#![allow(clippy::unwrap_used, reason = "a test")]

mod bad_days;

use std::sync::mpsc::channel;

use bad_days::{
    Waiter, acquires, assert_no_line, connect, in_line, linked_to, lock, lock_soon, ms, subscribes,
};
use leasehold::store::Store;
use leasehold::stores::redis::{RedisConfig, RedisStore};
use leasehold::{Claim, Held, Locks, Name, Released, clock};
use leasehold_chaos::eventually;
use leasehold_chaos::proxy::Fault;
use leasehold_chaos::servers::RedisServer;
use pollster::block_on;

const QUEUE: &str = "leasehold:{a}:queue:a";
const ALIVE: &str = "leasehold:{a}:alive:a";
const FENCE: &str = "leasehold:{a}:fence:a";
const STRANGER: &str = "leasehold:push:stranger";
const STRANGERS_CLAIM: &str = "0123456789abcdef0123456789abcdef";

/// Puts a waiter of another process in the line of `a`.
fn stranger_joins(server: &RedisServer, is_heard: bool) {
    let entry = format!("1 {STRANGERS_CLAIM} {STRANGER} 30000 1 1700000000000000 {{}}");
    server.cli(&["RPUSH", QUEUE, &entry]);
    if is_heard {
        let time = server.cli(&["TIME"]);
        let (seconds, micros) = time.split_once(char::is_whitespace).unwrap();
        server.cli(&[
            "HSET",
            ALIVE,
            &format!("p{STRANGER}"),
            &format!("{seconds}{:0>6} 60000 1", micros.trim()),
        ]);
    }
    let fence = server.cli(&["GET", FENCE]);
    server.cli(&["SET", FENCE, &format!("{}!", if fence.is_empty() { "5" } else { &fence })]);
    if server.cli(&["EXISTS", "a"]) == "1" {
        server.cli(&["SETRANGE", "a", "36", "!"]);
    }
}

/// A process that waits already, so that its next claims join a line by their first presentation.
fn one_who_waits_elsewhere(server: &RedisServer) -> (Locks, leasehold::Guard, Waiter) {
    let locks = connect(&server.url());
    let elsewhere = lock(&connect(&server.url()).mutex("elsewhere"));
    let waiter = Waiter::start(&locks.mutex("elsewhere"));
    (locks, elsewhere, waiter)
}

/// Whom the lock's value names.
fn holder(server: &RedisServer) -> String {
    server.cli(&["GET", "a"]).chars().skip(4).take(32).collect()
}

#[test]
fn a_short_ttl_that_joins_costs_the_others_of_its_process_no_place() {
    let server = RedisServer::start();
    let held = lock(&connect(&server.url()).mutex("a"));
    let locks = connect(&server.url());
    let first = Waiter::start(&locks.mutex("a"));
    let _short = Waiter::start(&locks.mutex("a").ttl(ms(300)));
    let other = Waiter::start(&connect(&server.url()).mutex("a"));
    let joined = clock::now();
    eventually("longer than the short one counts as alive", || clock::now().since(joined) > ms(600));
    assert_eq!(block_on(held.unlock()).unwrap(), Released::Released);
    eventually("one of them has it", || first.has_ended() || other.has_ended());
    assert!(first.has_ended() && !other.has_ended(), "the first in line was passed over");
}

#[test]
fn a_claim_that_joins_while_the_free_lock_goes_to_the_first_stands_in_line_once() {
    let server = RedisServer::start();
    let (locks, _elsewhere, _waiter) = one_who_waits_elsewhere(&server);
    let mut ears = redis::Client::open(server.url()).unwrap().get_connection().unwrap();
    let mut ears = ears.as_pubsub();
    ears.subscribe(STRANGER).unwrap();
    stranger_joins(&server, true);
    let _late = Waiter::start(&locks.mutex("a"));
    assert_eq!(holder(&server), STRANGERS_CLAIM);
    assert_eq!(in_line(&server, "a"), 1, "{}", server.cli(&["LRANGE", QUEUE, "0", "-1"]));
}

#[test]
fn a_lease_that_begins_as_a_hand_over_is_lengthened_where_nobody_renews_it() {
    let server = RedisServer::start();
    let (locks, _elsewhere, _waiter) = one_who_waits_elsewhere(&server);
    // One who is not heard of any more: the claim that finds it is handed the lock by its own presentation.
    stranger_joins(&server, false);
    let guard = lock_soon(&locks.mutex("a").ttl(ms(60_000)).renew(false));
    assert!(guard.remaining() > ms(50_000), "{:?}", guard.remaining());
}

#[test]
fn releases_of_one_claim_that_go_together_hand_over_once() {
    const AT_ONCE: usize = 60;
    let server = RedisServer::start();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let store = runtime
        .block_on(RedisStore::connect(
            RedisConfig::from_url(&server.url()).unwrap(),
            runtime.handle().clone(),
        ))
        .unwrap();
    let claim = Claim::new(Name::new("a").unwrap(), clock::claim_id(), ms(30_000));
    let leasehold::Acquired::Granted(grant) = runtime.block_on(store.acquire(&claim)).unwrap() else {
        panic!()
    };
    let processes = [(); 4].map(|()| connect(&server.url()));
    let waiters = processes.each_ref().map(|locks| Waiter::start(&locks.mutex("a")));
    let released = runtime.block_on(async {
        // Two go alone; what comes while they are under way goes together.
        let others: Vec<_> = (0..2)
            .map(|_| {
                let store = store.clone();
                let other = Claim::new(Name::new("other").unwrap(), clock::claim_id(), ms(30_000));
                tokio::spawn(async move { store.release(&Held::new(&other, &grant)).await.unwrap() })
            })
            .collect();
        let tasks: Vec<_> = (0..AT_ONCE)
            .map(|_| {
                let (store, held) = (store.clone(), Held::new(&claim, &grant));
                tokio::spawn(async move { store.release(&held).await.unwrap() })
            })
            .collect();
        for other in others {
            assert_eq!(other.await.unwrap(), Released::NotHeld);
        }
        let mut released = 0;
        for task in tasks {
            released += usize::from(task.await.unwrap() == Released::Released);
        }
        released
    });
    assert_eq!((released, in_line(&server, "a")), (1, 3), "more than one was handed the lock");
    let mut last = grant.token;
    for waiter in waiters {
        let guard = waiter.guard();
        assert!(guard.fencing_token() > last);
        last = guard.fencing_token();
        assert_eq!(block_on(guard.unlock()).unwrap(), Released::Released);
    }
}

#[test]
fn a_late_claim_to_join_creates_nothing_after_the_lock_was_had_and_unlocked() {
    let (server, proxy, locks) = linked_to(RedisServer::start(), "?timeout=300ms");
    let held = lock(&connect(&server.url()).mutex("a"));
    // The first presentation finds it busy; the second is to join the line.
    let late = proxy.inject_nth(2, Fault::HoldRequest, acquires("a"));
    let mutex = locks.mutex("a");
    let waiter = std::thread::spawn(move || lock(&mutex));
    late.wait();
    late.cut_client();
    eventually("it waits by a new connection", || in_line(&server, "a") == 1);
    assert_eq!(block_on(held.unlock()).unwrap(), Released::Released);
    let guard = waiter.join().unwrap();
    assert_eq!(block_on(guard.unlock()).unwrap(), Released::Released);
    let calls = || {
        let stats = server.cli(&["INFO", "commandstats"]);
        stats.lines().find(|line| line.starts_with("cmdstat_evalsha:")).map(ToOwned::to_owned)
    };
    let before = calls();
    late.release();
    eventually("the server has run the late request", || calls() != before);
    assert_eq!(server.cli(&["EXISTS", "a"]), "0", "the late request took the lock for nobody");
    assert_no_line(&server, "a");
}

#[test]
fn a_single_waiter_who_was_not_listening_is_not_passed_over_once_it_listens() {
    let server = RedisServer::start();
    let locks = connect(&server.url());
    let held = lock(&locks.mutex("a"));
    stranger_joins(&server, true);
    assert_eq!(block_on(held.unlock()).unwrap(), Released::Released);
    assert_eq!((server.cli(&["EXISTS", "a"]), in_line(&server, "a")), ("0".to_owned(), 1));
    let mut ears = redis::Client::open(server.url()).unwrap().get_connection().unwrap();
    let mut ears = ears.as_pubsub();
    ears.subscribe(STRANGER).unwrap();
    assert!(block_on(locks.mutex("a").try_lock()).unwrap().is_none(), "it is the turn of who waits");
    assert_eq!(holder(&server), STRANGERS_CLAIM);
}

#[test]
fn a_line_of_the_dead_does_not_end_under_who_joins_it() {
    let server = RedisServer::start();
    let locks = connect(&server.url());
    let _held = lock(&locks.mutex("a"));
    stranger_joins(&server, true);
    server.cli(&["PEXPIRE", QUEUE, "2000"]);
    server.cli(&["PEXPIRE", ALIVE, "2000"]);
    let _waiter = Waiter::start(&connect(&server.url()).mutex("a"));
    for key in [QUEUE, ALIVE] {
        let left: u64 = server.cli(&["PTTL", key]).parse().unwrap();
        assert!(left > 30_000, "{key}: {left}");
    }
}

#[test]
fn a_connection_that_was_given_up_is_made_good_for_at_once() {
    let (server, proxy, locks) = linked_to(RedisServer::start(), "?timeout=200ms");
    let held = lock(&connect(&server.url()).mutex("a"));
    let waiter = Waiter::start(&locks.mutex("a"));
    proxy.forget();
    proxy.black_hole(true);
    // Somebody else's command finds out: first that there is no answer, then that there is no life.
    let before = proxy.accepted();
    eventually("it dials anew", || {
        block_on(locks.mutex("b").try_lock()).is_err() && proxy.accepted() > before
    });
    proxy.black_hole(false);
    eventually("it is connected", || block_on(locks.mutex("b").try_lock()).is_ok());
    let connected = clock::now();
    proxy.wait_for(1, subscribes);
    let silent = clock::now().since(connected);
    assert!(silent < ms(500), "not only when it is next heard of: {silent:?}");
    assert_eq!(block_on(held.unlock()).unwrap(), Released::Released);
    assert_eq!(block_on(waiter.guard().unlock()).unwrap(), Released::Released);
}

#[test]
fn claims_that_a_busy_server_refused_are_forgotten() {
    const TRIES: usize = 20;
    let server = RedisServer::builder().args(["--lua-time-limit", "1"]).start();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let store = runtime
        .block_on(RedisStore::connect(
            RedisConfig::from_url(&server.url()).unwrap(),
            runtime.handle().clone(),
        ))
        .unwrap();
    let locks = Locks::over(store.clone()).unwrap();
    let _held = lock(&connect(&server.url()).mutex("a"));
    let (sender, joined) = channel();
    let mutex = locks.mutex("a").on_wait(move |_| {
        let _ = sender.send(());
    });
    let waits = runtime.spawn(async move { mutex.lock().await });
    joined.recv_timeout(leasehold_chaos::PATIENCE).unwrap();
    let before = store.remembered();
    let url = server.url();
    let script = std::thread::spawn(move || {
        let mut raw = redis::Client::open(url).unwrap().get_connection().unwrap();
        redis::cmd("EVAL").arg("while true do end").arg(0).query::<()>(&mut raw).unwrap_err()
    });
    eventually("the server is busy", || server.cli(&["PING"]).contains("BUSY"));
    for _ in 0..TRIES {
        let error = block_on(locks.mutex("b").lock()).unwrap_err();
        assert_eq!(error.kind(), leasehold::ErrorKind::Unavailable, "{error}");
    }
    server.cli(&["SCRIPT", "KILL"]);
    script.join().unwrap();
    // With the line of `b` they go, once nobody counts as waiting there.
    eventually("nothing is remembered of them", || store.remembered() <= before);
    waits.abort();
}
