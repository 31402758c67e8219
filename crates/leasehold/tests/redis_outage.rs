//! Bad days of the server: killed, restarted, emptied, frozen, out of memory, off its clock; with the whole library.
#![allow(clippy::unwrap_used, reason = "a test")]

mod bad_days;

use std::thread;

use bad_days::{acquires, connect, linked, linked_to, lock, lock_soon, ms, renews, warm_up};
use leasehold::{ErrorKind, FencingToken, Locks, Loss, Name, Released, Retry, Status, clock};
use leasehold_chaos::eventually;
use leasehold_chaos::proxy::Fault;
use leasehold_chaos::servers::RedisServer;
use pollster::block_on;

fn lasting() -> RedisServer {
    RedisServer::builder().args(["--appendonly", "yes", "--appendfsync", "always"]).start()
}

#[test]
fn a_server_that_forgets_and_restarts_while_a_lock_is_held_makes_it_lost_and_tokens_grow() {
    let mut server = RedisServer::start();
    let locks = connect(&server.url());
    let guard = lock(&locks.mutex("a"));
    server.restart();
    assert_eq!(block_on(guard.lost()), Loss::Removed);
    let next = lock_soon(&locks.mutex("a"));
    assert!(next.fencing_token() > guard.fencing_token(), "though the counter is gone");
    assert_eq!(block_on(guard.unlock()).unwrap(), Released::HeldByOther);
    assert_eq!(next.status(), Status::Held);
}

#[test]
fn a_connection_that_was_replaced_has_every_lock_confirmed_at_once() {
    let (mut server, proxy, locks) = linked();
    // Renewed every six minutes, after the first look.
    let guard = lock(&locks.mutex("a").ttl(ms(3_600_000)));
    proxy.wait_for(1, renews("a"));
    let began = clock::now();
    server.restart();
    assert_eq!(block_on(guard.lost()), Loss::Removed);
    let waited = clock::now().since(began);
    assert!(waited < ms(5_000), "it took {waited:?}");
}

#[test]
fn a_server_that_remembers_and_restarts_while_a_lock_is_held_costs_nothing() {
    let mut server = lasting();
    let locks = connect(&server.url());
    let guard = lock(&locks.mutex("a").ttl(ms(20_000)));
    server.restart();
    assert_eq!(server.cli(&["EXISTS", "a"]), "1");
    let before = guard.valid_until();
    eventually("renewed on the new server", || {
        guard.valid_until() > before && guard.status() == Status::Held
    });
    assert!(block_on(locks.mutex("a").try_lock()).unwrap().is_none());
    assert_eq!(block_on(guard.unlock()).unwrap(), Released::Released);
}

#[test]
fn a_server_killed_while_waiting_and_started_again_grants_in_the_end() {
    let (mut server, proxy, locks) = linked_to(lasting(), "");
    let holder = lock(&connect(&server.url()).mutex("a"));
    let mutex = locks.mutex("a").retry(Retry::constant(ms(20)));
    let waiter = thread::spawn(move || lock(&mutex));
    proxy.wait_for(2, acquires("a"));
    server.kill9();
    let token = holder.fencing_token();
    server.restart();
    // The holder's own connection is dialled anew for the release.
    assert_eq!(block_on(holder.unlock()).unwrap(), Released::Released);
    let guard = waiter.join().unwrap();
    assert!(guard.fencing_token() > token);
}

#[test]
fn a_server_killed_with_the_acquire_in_its_hands_is_unknown_and_then_free() {
    let (mut server, proxy, locks) = linked_to(lasting(), "?timeout=300ms");
    let held = proxy.inject(Fault::HoldReply, acquires("a"));
    let mutex = locks.mutex("a");
    let acquiring = thread::spawn(move || block_on(mutex.lock()));
    held.wait();
    proxy.refuse(true);
    server.kill9();
    proxy.cut_all();
    let error = acquiring.join().unwrap().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unknown, "{error}");
    server.restart();
    assert_eq!(server.cli(&["EXISTS", "a"]), "1", "the grant was written down before the kill");
    proxy.refuse(false);
    eventually("the keeper frees it", || server.cli(&["EXISTS", "a"]) == "0");
}

#[test]
fn a_server_that_is_gone_fails_fast_and_the_guard_is_lost_in_time() {
    let mut server = RedisServer::start();
    let locks = connect(&server.url());
    let guard = lock(&locks.mutex("a").ttl(ms(1_000)));
    server.kill9();
    // The first may be sent before the broken connection was noticed: then nobody can know what became of it.
    assert!(block_on(locks.mutex("b").lock()).unwrap_err().is_transient());
    let error = block_on(locks.mutex("b").lock()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
    let until = guard.valid_until();
    assert_eq!(block_on(guard.lost()), Loss::Expired);
    assert!(
        clock::now() >= until && guard.valid_until() == until,
        "not before its time, and no failure extended it"
    );
    assert_eq!(block_on(guard.unlock()).unwrap_err().kind(), ErrorKind::Unavailable);
}

#[test]
fn flushing_the_scripts_costs_one_more_command() {
    let (server, proxy, locks) = linked();
    let guard = lock(&locks.mutex("a").ttl(ms(1_000)));
    server.cli(&["SCRIPT", "FLUSH"]);
    proxy.forget();
    proxy.wait_for(3, renews("a"));
    assert_eq!(guard.status(), Status::Held);
    server.cli(&["SCRIPT", "FLUSH"]);
    assert_eq!(block_on(guard.unlock()).unwrap(), Released::Released);
    server.cli(&["SCRIPT", "FLUSH"]);
    assert_eq!(block_on(lock(&locks.mutex("a")).unlock()).unwrap(), Released::Released);
}

#[test]
fn flushing_all_data_is_told_within_one_renewal_and_the_next_token_grows() {
    let (server, proxy, locks) = linked();
    let mutex = locks.mutex("a").ttl(ms(20_000));
    let guard = lock(&mutex);
    proxy.wait_for(1, renews("a"));
    eventually("renewed", || guard.remaining() > ms(19_000));
    proxy.forget();
    server.cli(&["FLUSHALL"]);
    assert_eq!(block_on(guard.lost()), Loss::Removed);
    assert_eq!(proxy.count(renews("a")), 1);
    let next = lock(&mutex);
    assert!(next.fencing_token() > guard.fencing_token());
    assert_eq!(block_on(guard.unlock()).unwrap(), Released::HeldByOther);
}

#[test]
fn a_frozen_server_makes_lost_before_it_can_grant_anew() {
    let server = RedisServer::start();
    let locks = connect(&format!("{}?timeout=300ms", server.url()));
    let others = connect(&format!("{}?timeout=300ms", server.url()));
    let guard = lock(&locks.mutex("a").ttl(ms(1_000)));
    server.pause();
    let frozen = clock::now();
    let waiter = thread::spawn(move || block_on(others.mutex("a").ttl(ms(30_000)).lock_for(ms(20_000))));
    // By its clock the key ends while it is frozen: it could grant from the very moment that it wakes.
    block_on(clock::sleep_until(frozen.plus(ms(1_000))));
    assert_eq!((guard.status(), guard.remaining()), (Status::Lost, ms(0)), "lost before that moment");
    server.resume();
    // Renewals of the old holder may be in its socket: they come too late.
    let next = match waiter.join().unwrap() {
        Ok(next) => next.expect("free in time"),
        // The first look of the other fails fast on a server that does not answer.
        Err(error) if error.is_transient() => lock_soon(&locks.mutex("a")),
        Err(error) => panic!("{error}"),
    };
    assert!(next.fencing_token() > guard.fencing_token());
    assert_eq!(block_on(guard.lost()), Loss::Expired);
    assert_eq!(block_on(guard.unlock()).unwrap(), Released::HeldByOther);
    assert_eq!(block_on(next.unlock()).unwrap(), Released::Released);
}

#[test]
fn a_server_that_cannot_save_refuses_everything_and_the_guard_is_lost_in_time() {
    let server = RedisServer::builder().args(["--enable-protected-configs", "yes"]).start();
    let locks = connect(&server.url());
    let guard = lock(&locks.mutex("a").ttl(ms(2_000)));
    let folder = server.folder().join("gone");
    std::fs::create_dir(&folder).unwrap();
    assert_eq!(server.cli(&["CONFIG", "SET", "dir", folder.to_str().unwrap(), "save", "3600 1"]), "OK");
    std::fs::remove_dir(&folder).unwrap();
    server.cli(&["BGSAVE"]);
    eventually("the snapshot failed", || {
        server.cli(&["INFO", "persistence"]).contains("rdb_last_bgsave_status:err")
    });
    let error = block_on(locks.mutex("b").lock()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Rejected, "{error}");
    assert_eq!(block_on(guard.lost()), Loss::Expired);
    assert_eq!(server.cli(&["CONFIG", "SET", "save", ""]), "OK");
    assert_eq!(block_on(lock_soon(&locks.mutex("a")).unlock()).unwrap(), Released::Released);
}

#[test]
fn an_old_snapshot_lowers_no_token() {
    let mut server = RedisServer::start();
    let locks = connect(&server.url());
    let mutex = locks.mutex("a");
    let first = lock(&mutex);
    let old = first.fencing_token();
    block_on(first.unlock()).unwrap();
    assert_eq!(server.cli(&["SAVE"]), "OK");
    let mut last = old;
    for _ in 0..20 {
        let guard = lock(&mutex);
        last = guard.fencing_token();
        block_on(guard.unlock()).unwrap();
    }
    server.restart();
    assert_eq!(
        server.cli(&["GET", "leasehold:{a}:fence:a"]),
        old.to_string(),
        "the server is back in the past"
    );
    assert!(lock_soon(&mutex).fencing_token() > last);
}

#[test]
fn a_wall_clock_of_the_server_that_steps_back_lowers_no_token() {
    let server = RedisServer::builder().own_clock().start();
    let locks = connect(&server.url());
    let mut last = FencingToken::new(0);
    for offset in [0, -3_600_000_000, 60_000_000, -86_400_000_000, -86_400_000_000] {
        server.set_clock_offset(offset);
        let guard = lock_soon(&locks.mutex("a"));
        assert!(guard.fencing_token() > last, "clock off by {offset} us");
        last = guard.fencing_token();
        assert_eq!(block_on(guard.unlock()).unwrap(), Released::Released);
    }
}

#[test]
fn a_wall_clock_of_the_server_that_steps_forward_ends_leases_and_the_guard_is_told() {
    let server = RedisServer::builder().own_clock().start();
    let locks = connect(&server.url());
    let guard = lock(&locks.mutex("a").ttl(ms(20_000)));
    server.set_clock_offset(3_600_000_000);
    assert_eq!(block_on(guard.lost()), Loss::Removed);
    assert!(lock(&locks.mutex("a")).fencing_token() > guard.fencing_token());
}

#[test]
fn a_full_server_refuses_new_locks_and_keeps_those_that_are_held() {
    let server = RedisServer::start();
    let locks = connect(&server.url());
    let guard = lock(&locks.mutex("a").ttl(ms(5_000)));
    server.cli(&["CONFIG", "SET", "maxmemory", "1"]);
    let error = block_on(locks.mutex("b").lock()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Rejected, "{error}");
    assert!(error.to_string().contains("memory"), "{error}");
    // Renewals write no new key: a held lock survives a full server.
    let before = guard.valid_until();
    eventually("renewed on a full server", || guard.valid_until() > before);
    assert_eq!(block_on(guard.unlock()).unwrap(), Released::Released);
    server.cli(&["CONFIG", "SET", "maxmemory", "0"]);
    assert_eq!(block_on(lock(&locks.mutex("b")).unlock()).unwrap(), Released::Released);
}

#[test]
fn a_server_that_became_a_replica_refuses_and_the_guard_is_lost_in_time() {
    let master = RedisServer::start();
    let server = RedisServer::start();
    let locks = connect(&server.url());
    let guard = lock(&locks.mutex("a").ttl(ms(1_500)));
    server.cli(&["REPLICAOF", "127.0.0.1", &master.port().to_string()]);
    let error = block_on(locks.mutex("b").lock()).unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::Rejected | ErrorKind::Unavailable), "{error:?}");
    assert!(error.to_string().to_lowercase().contains("replica"), "it says why: {error}");
    block_on(guard.lost());
    assert_eq!(guard.status(), Status::Lost);
}

#[test]
fn rights_taken_away_while_held_are_told_and_the_guard_is_lost_in_time() {
    let server = RedisServer::builder().user("app on >hunter2 ~* &* +@all").start();
    let locks = connect(&format!("redis://app:hunter2@127.0.0.1:{}", server.port()));
    warm_up(&locks);
    let guard = lock(&locks.mutex("a").ttl(ms(1_500)));
    server.cli(&["ACL", "SETUSER", "app", "-eval", "-evalsha"]);
    let error = block_on(locks.mutex("b").lock()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Rejected, "{error}");
    let told = format!("{error} {error:?} {locks:?} {guard:?}");
    assert!(!told.contains("hunter2"), "{told}");
    assert_eq!(block_on(guard.lost()), Loss::Expired);
}

#[test]
fn a_lock_without_rights_costs_its_neighbours_nothing() {
    let server = RedisServer::builder().user("app on >hunter2 ~* &* +@all").start();
    let locks = connect(&format!("redis://app:hunter2@127.0.0.1:{}", server.port()));
    warm_up(&locks);
    // Renewals of these two go in one command, and so may claims that are ready together.
    let (mine, theirs) = (locks.mutex("mine").ttl(ms(1_500)), locks.mutex("theirs").ttl(ms(1_500)));
    let (kept, forbidden) = (lock(&mine), lock(&theirs));
    server.cli(&["ACL", "SETUSER", "app", "resetkeys", "~mine*", "~leasehold:*"]);
    assert_eq!(block_on(forbidden.lost()), Loss::Expired);
    let before = kept.valid_until();
    eventually("renewed after the other was lost", || kept.valid_until() > before.plus(ms(500)));
    assert_eq!(kept.status(), Status::Held);
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let claims: Vec<_> = (0..64)
        .map(|n| {
            let mutex = locks.mutex(format!("{}-{n}", if n % 8 == 0 { "theirs" } else { "mine" }));
            runtime.spawn(async move { mutex.lock().await })
        })
        .collect();
    for (n, claim) in claims.into_iter().enumerate() {
        let answer = runtime.block_on(claim).unwrap();
        assert_eq!(answer.is_ok(), n % 8 != 0, "{n}: {answer:?}");
    }
    assert_eq!(block_on(kept.unlock()).unwrap(), Released::Released);
}

#[test]
fn what_stands_at_the_key_is_respected_and_never_touched() {
    let server = RedisServer::start();
    let locks = connect(&server.url());
    server.cli(&["HSET", "hash", "field", "1"]);
    server.cli(&["RPUSH", "list", "1"]);
    for name in ["hash", "list"] {
        let error = block_on(locks.mutex(name).lock()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Rejected, "{error}");
        assert!(error.to_string().contains(name), "it names the type: {error}");
    }
    // Another library's lock: waited for, and shown as what it is; ours again when it goes.
    server.cli(&["SET", "foreign", "d2f3a1\u{1b}[31m", "PX", "600"]);
    let holder = block_on(locks.show("foreign")).unwrap().holder.unwrap();
    assert!(holder.foreign.unwrap().starts_with("d2f3a1\\u{1b}"));
    assert!(block_on(locks.mutex("foreign").try_lock()).unwrap().is_none());
    assert_eq!(block_on(lock_soon(&locks.mutex("foreign")).unlock()).unwrap(), Released::Released);
    // A key without any end, as some libraries write it, is never taken.
    server.cli(&["SET", "endless", "1"]);
    assert!(block_on(locks.mutex("endless").lock_for(ms(100))).unwrap().is_none());
    assert_eq!(server.cli(&["GET", "endless"]), "1");
}

#[test]
fn a_value_that_replaced_ours_is_left_alone_by_renewal_and_unlock() {
    let server = RedisServer::start();
    let locks = connect(&server.url());
    let guard = lock(&locks.mutex("a").ttl(ms(1_000)));
    server.cli(&["SET", "a", "thief"]);
    assert_eq!(block_on(guard.lost()), Loss::Removed);
    assert_eq!(block_on(guard.unlock()).unwrap(), Released::HeldByOther);
    assert_eq!((server.cli(&["GET", "a"]), server.cli(&["PTTL", "a"])), ("thief".into(), "-1".into()));
    // So too a key of another type.
    let guard = lock(&locks.mutex("b").ttl(ms(1_000)));
    server.cli(&["DEL", "b"]);
    server.cli(&["RPUSH", "b", "1"]);
    assert_eq!(block_on(guard.lost()), Loss::Removed);
    assert_eq!(block_on(guard.unlock()).unwrap(), Released::HeldByOther);
    assert_eq!(server.cli(&["TYPE", "b"]), "list");
}

#[test]
fn bad_names_and_ttls_are_refused_before_anything_is_sent() {
    let (_server, proxy, locks) = linked();
    let long = vec![b'x'; 10 << 20];
    for name in [&b""[..], b"leasehold:{a}:fence:a", &long] {
        let error = block_on(locks.mutex(name).lock()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid);
        assert!(error.to_string().len() < 1_000, "an error of {} bytes", error.to_string().len());
    }
    for ttl in [ms(0), ms(1), ms(400 * 24 * 3_600_000)] {
        assert_eq!(
            block_on(locks.mutex("a").ttl(ttl).lock()).unwrap_err().kind(),
            ErrorKind::Invalid,
            "{ttl:?}"
        );
    }
    assert_eq!(proxy.commands().len(), 0);
    let year = ms(365 * 24 * 3_600_000);
    let guard = lock(&locks.mutex("a").ttl(year));
    assert!(guard.remaining() > year.mul_f64(0.98) && guard.remaining() < year);
    assert_eq!(block_on(guard.unlock()).unwrap(), Released::Released);
}

#[test]
fn look_alike_names_are_different_locks() {
    let server = RedisServer::start();
    let locks = connect(&server.url());
    let names: &[&[u8]] = &[
        b"a",
        b"A",
        "\u{430}".as_bytes(),
        b"a ",
        b" a",
        b"a\0",
        b"\xff\xfe",
        b"\xc3\xa1",
        b"a\xcc\x81",
        b"{a}",
        b"a{}",
        b"{}a",
        b"{a",
        b"a}",
        b"a:b",
        b"a/b",
        b"fence:a",
        b"a\r\n",
        b"*1\r\n$4\r\nPING\r\n",
        b"*",
        b"?",
        b"[a]",
    ];
    let guards: Vec<_> =
        names.iter().map(|name| block_on(locks.mutex(name).try_lock()).unwrap().expect("free")).collect();
    for name in names {
        assert!(block_on(locks.mutex(name).try_lock()).unwrap().is_none(), "{}", Name::new(name).unwrap());
    }
    for guard in guards {
        assert_eq!(block_on(guard.unlock()).unwrap(), Released::Released);
    }
}

#[test]
fn urls_that_lead_nowhere_say_so() {
    let port = leasehold_chaos::servers::free_port();
    let refused = |url: &str| block_on(leasehold::connect(url)).map(|_: Locks| ()).unwrap_err();
    for (url, kind) in [
        ("no scheme", ErrorKind::Invalid),
        ("gopher://127.0.0.1", ErrorKind::Invalid),
        ("redis://", ErrorKind::Invalid),
        ("redis://:6379", ErrorKind::Invalid),
        ("redis://127.0.0.1:66000", ErrorKind::Invalid),
        (&format!("redis://user:hunter2@127.0.0.1:{port}"), ErrorKind::Unavailable),
        ("redis+unix:///no/such/socket", ErrorKind::Unavailable),
    ] {
        let error = refused(url);
        assert_eq!(error.kind(), kind, "{url}: {error}");
        assert!(!format!("{error} {error:?}").contains("hunter2"), "{error}");
    }
    let server = RedisServer::builder().requirepass("open-sesame").start();
    for url in [server.url(), format!("redis://:hunter2@127.0.0.1:{}", server.port())] {
        let error = refused(&url);
        assert_eq!(error.kind(), ErrorKind::Rejected, "{error}");
        assert!(!format!("{error} {error:?}").contains("hunter2"), "{error}");
        let findings = block_on(leasehold::diagnose(&url));
        assert!(
            findings.iter().any(|finding| finding.severity == leasehold::Severity::Failure),
            "{findings:?}"
        );
    }
}

#[test]
fn a_server_that_has_no_room_for_clients_is_ridden_out_by_a_waiter() {
    let (server, proxy, locks) = linked_to(lasting(), "?timeout=500ms");
    let holder = lock(&connect(&server.url()).mutex("a").ttl(ms(60_000)));
    let mutex = locks.mutex("a").ttl(ms(20_000)).retry(Retry::constant(ms(20)));
    let waiter = thread::spawn(move || lock_soon(&mutex));
    proxy.wait_for(2, acquires("a"));
    let mut admin = server.connect();
    admin.call(&["CONFIG", "SET", "maxclients", "1"]).unwrap();
    proxy.cut_all();
    let accepted = proxy.accepted();
    eventually("turned away a few times", || proxy.accepted() >= accepted + 3);
    admin.call(&["CONFIG", "SET", "maxclients", "1000"]).unwrap();
    assert_eq!(block_on(holder.unlock()).unwrap(), Released::Released);
    assert_eq!(block_on(waiter.join().unwrap().unlock()).unwrap(), Released::Released);
}
