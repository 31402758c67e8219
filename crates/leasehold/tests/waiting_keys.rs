//! Bad days of the keys behind a line of waiters: deleted, flushed, of another type or version, another library's; and of
//! the server that keeps them: restarted, out of memory.
#![allow(clippy::unwrap_used, reason = "a test")]

mod bad_days;

use bad_days::{Waiter, about, assert_no_line, connect, in_line, linked, linked_to, lock, ms, refreshes};
use leasehold::{ErrorKind, Guard, Locks, Loss, Released, Status, clock};
use leasehold_chaos::eventually;
use leasehold_chaos::servers::RedisServer;
use pollster::block_on;

const QUEUE: &str = "leasehold:{a}:queue:a";
const ALIVE: &str = "leasehold:{a}:alive:a";
const FENCE: &str = "leasehold:{a}:fence:a";

/// A holder, and one waiter of each of two other processes, in this order, each with a TTL of 3 s.
fn two_wait(server: &RedisServer) -> (Guard, Waiter, Waiter) {
    let holder = lock(&connect(&server.url()).mutex("a").ttl(ms(3_000)));
    let waiter = || Waiter::start(&connect(&server.url()).mutex("a").ttl(ms(3_000)));
    (holder, waiter(), waiter())
}

/// Both get the lock, the first one first; returns after how long the first had it.
#[track_caller]
fn both_in_turn(first: Waiter, second: Waiter) -> std::time::Duration {
    let asked = clock::now();
    let guard = first.guard();
    let waited = clock::now().since(asked);
    let token = guard.fencing_token();
    assert!(!second.has_ended());
    assert_eq!(block_on(guard.unlock()).unwrap(), Released::Released);
    let guard = second.guard();
    assert!(guard.fencing_token() > token);
    assert_eq!(block_on(guard.unlock()).unwrap(), Released::Released);
    waited
}

#[test]
fn a_lock_deleted_by_hand_goes_to_the_first_in_line() {
    let server = RedisServer::start();
    let (holder, first, second) = two_wait(&server);
    server.cli(&["DEL", "a"]);
    let waited = both_in_turn(first, second);
    assert!(waited < ms(1_500), "a third of the TTL of 3 s: {waited:?}");
    assert_eq!(block_on(holder.lost()), Loss::Removed);
    assert_eq!(block_on(holder.unlock()).unwrap(), Released::NotHeld);
    assert_no_line(&server, "a");
}

#[test]
fn a_lock_released_by_another_librarys_script_goes_to_the_first_in_line() {
    let server = RedisServer::start();
    let (_holder, first, second) = two_wait(&server);
    let value = server.cli(&["GET", "a"]);
    let compare_and_delete =
        "if redis.call('get', KEYS[1]) == ARGV[1] then return redis.call('del', KEYS[1]) end return 0";
    assert_eq!(server.cli(&["EVAL", compare_and_delete, "1", "a", &value]), "1");
    let waited = both_in_turn(first, second);
    assert!(waited < ms(1_500), "{waited:?}");
    assert_no_line(&server, "a");
}

#[test]
fn waiters_whose_data_was_flushed_join_again_by_themselves() {
    let server = RedisServer::start();
    let (holder, first, second) = two_wait(&server);
    let token = holder.fencing_token();
    server.cli(&["FLUSHALL"]);
    let flushed = clock::now();
    assert_eq!(block_on(holder.lost()), Loss::Removed);
    // In which order they come back is up to them.
    let mut waiters = [Some(first), Some(second)];
    let mut last = token;
    for _ in 0..2 {
        let next = || waiters.iter().position(|waiter| waiter.as_ref().is_some_and(Waiter::has_ended));
        eventually("one of them has it", || next().is_some());
        let next = next().unwrap();
        let guard = waiters[next].take().unwrap().guard();
        assert!(guard.fencing_token() > last);
        assert!(waiters.iter().flatten().all(|other| !other.has_ended()), "only one of them");
        last = guard.fencing_token();
        assert_eq!(block_on(guard.unlock()).unwrap(), Released::Released);
    }
    let waited = clock::now().since(flushed);
    assert!(waited < ms(3_000), "without waiting for any lease to end: {waited:?}");
    assert_no_line(&server, "a");
}

#[test]
fn another_librarys_lock_is_waited_for_with_few_commands_and_passes_on_in_order() {
    let (server, proxy, locks) = linked();
    assert_eq!(server.cli(&["SET", "a", "somebody", "NX", "PX", "600000"]), "OK");
    let mutex = |locks: &Locks| locks.mutex("a").ttl(ms(30_000)).max_queue(2);
    let first = Waiter::start(&mutex(&locks));
    let second = Waiter::start(&mutex(&connect(&server.url())));
    let error = block_on(mutex(&connect(&server.url())).lock()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::QueueFull, "{error}");
    // The first looks with back-off, 10 ms at first and 500 ms in the end.
    let start = clock::now();
    proxy.wait_for(12, refreshes("a"));
    proxy.forget();
    let settled = clock::now();
    proxy.wait_for(8, refreshes("a"));
    let (eight, twelve) = (clock::now().since(settled), settled.since(start));
    println!("first 12 looks in {twelve:?}, next 8 in {eight:?}");
    assert!(eight > ms(8 * 250), "at most one look every 250 ms: {eight:?}");
    assert_eq!(proxy.count(about("a")), 8, "and nothing else");
    assert_eq!(server.cli(&["GET", "a"]), "somebody", "left as it was");
    server.cli(&["DEL", "a"]);
    let waited = both_in_turn(first, second);
    assert!(waited < ms(1_000), "{waited:?}");
    assert_no_line(&server, "a");
}

#[test]
fn another_librarys_lock_that_expires_passes_on_in_order() {
    let (server, _proxy, locks) = linked();
    assert_eq!(server.cli(&["SET", "a", "somebody", "NX", "PX", "1200"]), "OK");
    let taken = clock::now();
    let first = Waiter::start(&locks.mutex("a"));
    let second = Waiter::start(&connect(&server.url()).mutex("a"));
    both_in_turn(first, second);
    let waited = clock::now().since(taken);
    assert!((ms(1_200)..ms(2_200)).contains(&waited), "{waited:?}");
    assert_no_line(&server, "a");
}

#[test]
fn a_server_that_remembers_and_restarts_keeps_the_line() {
    let server = RedisServer::builder().args(["--appendonly", "yes", "--appendfsync", "always"]).start();
    let (mut server, proxy, locks) = linked_to(server, "");
    let direct = connect(&server.url());
    let holder = lock(&direct.mutex("a"));
    let first = Waiter::start(&locks.mutex("a"));
    let second = Waiter::start(&direct.mutex("a"));
    server.restart();
    eventually("both can be called again", || {
        server.cli(&["PUBSUB", "CHANNELS"]).lines().count() == 2 && in_line(&server, "a") == 2
    });
    assert!(proxy.count(about("a")) > 0);
    assert_ne!(holder.status(), Status::Lost);
    assert_eq!(block_on(holder.unlock()).unwrap(), Released::Released);
    both_in_turn(first, second);
    assert_no_line(&server, "a");
}

#[test]
fn a_server_that_forgets_and_restarts_is_joined_anew() {
    let mut server = RedisServer::start();
    let (holder, first, second) = two_wait(&server);
    let token = holder.fencing_token();
    server.restart();
    assert_eq!(block_on(holder.lost()), Loss::Removed);
    eventually("one of them has it", || first.has_ended() || second.has_ended());
    let (one, other) = if first.has_ended() { (first, second) } else { (second, first) };
    let guard = one.guard();
    assert!(guard.fencing_token() > token && !other.has_ended());
    assert_eq!(block_on(guard.unlock()).unwrap(), Released::Released);
    assert_eq!(block_on(other.guard().unlock()).unwrap(), Released::Released);
    assert_no_line(&server, "a");
}

#[test]
fn an_entry_of_an_unknown_version_keeps_its_place_and_holds_up_nobody() {
    let server = RedisServer::start();
    let holder = lock(&connect(&server.url()).mutex("a"));
    let stranger = "2 something new";
    server.cli(&["LPUSH", QUEUE, stranger]);
    let waiter = Waiter::start(&connect(&server.url()).mutex("a"));
    assert_eq!(block_on(holder.unlock()).unwrap(), Released::Released);
    let guard = waiter.guard();
    assert_eq!(block_on(guard.unlock()).unwrap(), Released::Released);
    assert_eq!((server.cli(&["EXISTS", "a"]), server.cli(&["LRANGE", QUEUE, "0", "-1"])), {
        ("0".to_owned(), stranger.to_owned())
    });
    // Nor does it keep anybody from the lock from now on.
    let locks = connect(&server.url());
    let guard = block_on(locks.mutex("a").try_lock()).unwrap().expect("free");
    let next = Waiter::start(&locks.mutex("a"));
    assert_eq!(block_on(guard.unlock()).unwrap(), Released::Released);
    assert_eq!(block_on(next.guard().unlock()).unwrap(), Released::Released);
    assert_eq!(server.cli(&["EXISTS", "a"]), "0");
}

#[test]
fn messages_that_make_no_sense_are_left_alone() {
    let server = RedisServer::start();
    let (holder, first, second) = two_wait(&server);
    let entry = server.cli(&["LINDEX", QUEUE, "0"]);
    let claim = entry.split(' ').nth(1).unwrap();
    for channel in server.cli(&["PUBSUB", "CHANNELS"]).lines() {
        for message in ["", "1", "garbage", "1 x y z", &format!("2 {claim} 9000000000000000 3000 1 a")] {
            assert_eq!(server.cli(&["PUBLISH", channel, message]), "1");
        }
    }
    // Of our version, but about a presentation that there never was: at most a hint.
    let forged = format!("1 {claim} 9000000000000000 3000 999999 a");
    assert_eq!(server.cli(&["PUBLISH", entry.split(' ').nth(2).unwrap(), &forged]), "1");
    assert_eq!(in_line(&server, "a"), 2);
    // The next refresh of both was answered after all that.
    let heard = server.cli(&["HVALS", ALIVE]);
    eventually("both were heard of again", || {
        let now = server.cli(&["HVALS", ALIVE]);
        heard.lines().all(|line| !now.contains(line))
    });
    assert!(!first.has_ended() && !second.has_ended() && holder.status() == Status::Held);
    assert_eq!(block_on(holder.unlock()).unwrap(), Released::Released);
    both_in_turn(first, second);
    assert_no_line(&server, "a");
}

#[test]
fn side_keys_of_another_type_are_typed_errors_and_the_lock_is_still_released() {
    for key in [QUEUE, ALIVE, FENCE] {
        let server = RedisServer::start();
        let holder = lock(&connect(&server.url()).mutex("a"));
        let waiting = connect(&server.url()).mutex("a").ttl(ms(3_000));
        let (sender, joined) = std::sync::mpsc::channel();
        let mutex = waiting.clone().on_wait(move |_| {
            let _ = sender.send(());
        });
        let waiter = std::thread::spawn(move || block_on(mutex.lock_for(ms(10_000))));
        joined.recv_timeout(leasehold_chaos::PATIENCE).unwrap();
        server.cli(&["DEL", key]);
        server.cli(&["SADD", key, "x"]);
        // Whoever comes now is told; so are, by their next refresh, those who wait.
        let error = block_on(waiting.clone().lock()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Rejected, "{key}: {error}");
        assert_eq!(block_on(holder.unlock()).unwrap(), Released::Released, "{key}");
        assert_eq!(server.cli(&["TYPE", key]), "set", "{key} is left as it is");
        match waiter.join().unwrap() {
            Err(error) => assert_eq!(error.kind(), ErrorKind::Rejected, "{key}: {error}"),
            Ok(guard) => {
                let guard = guard.unwrap_or_else(|| panic!("{key}: it waited for nothing"));
                assert_eq!(block_on(guard.unlock()).unwrap(), Released::Released, "{key}");
            }
        }
        // As the error advises: the other of the two would else stay for the minute of its retention.
        server.cli(&["DEL", key, QUEUE, ALIVE]);
        assert_eq!(block_on(lock(&waiting).unlock()).unwrap(), Released::Released, "{key}");
        assert_no_line(&server, "a");
    }
}

#[test]
fn a_full_server_hands_the_lock_over_and_tells_newcomers() {
    let (server, _proxy, locks) = linked();
    let holder = lock(&connect(&server.url()).mutex("a"));
    let waiter = Waiter::start(&locks.mutex("a").ttl(ms(3_000)));
    server.cli(&["CONFIG", "SET", "maxmemory", "1"]);
    // A hand-over makes room before it needs any.
    assert_eq!(block_on(holder.unlock()).unwrap(), Released::Released);
    let guard = waiter.guard();
    let error = block_on(locks.mutex("b").lock()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Rejected, "{error}");
    let error = block_on(connect(&server.url()).mutex("a").lock()).unwrap_err();
    assert!(error.to_string().contains("memory"), "nobody can be put in line: {error}");
    assert_eq!(block_on(guard.unlock()).unwrap(), Released::Released);
    server.cli(&["CONFIG", "SET", "maxmemory", "0"]);
    assert_eq!(block_on(lock(&locks.mutex("a")).unlock()).unwrap(), Released::Released);
    assert_no_line(&server, "a");
}
