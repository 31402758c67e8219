//! Bad days of the holder: its process is killed, stopped, ends at once or goes by a wrong clock; its runtime is gone.
#![allow(clippy::unwrap_used, reason = "a test")]

mod bad_days;

use std::thread;
use std::time::Duration;

use bad_days::other::{Other, other_role, say, wait_to_be_told};
use bad_days::{connect, linked, lock, lock_soon, ms, releases, renews};
use leasehold::{Released, Status, clock};
use leasehold_chaos::servers::RedisServer;
use leasehold_chaos::{eventually, wall_clock::WallClock};
use pollster::block_on;
use rustix::process::Signal;

#[test]
fn a_guard_dropped_as_the_last_act_of_a_process_is_released() {
    if let Some(url) = other_role() {
        let guard = lock(&connect(&url).mutex("a"));
        say("locked");
        wait_to_be_told();
        drop(guard);
        std::process::exit(0);
    }
    let server = RedisServer::start();
    let test = "a_guard_dropped_as_the_last_act_of_a_process_is_released";
    let mut other = Other::start(test, &server.url(), |_| {});
    assert_eq!((other.hear(), server.cli(&["EXISTS", "a"])), ("locked".to_owned(), "1".to_owned()));
    other.tell();
    assert!(other.process.wait().unwrap().success());
    assert_eq!(server.cli(&["EXISTS", "a"]), "0");
}

#[test]
fn a_holder_killed_is_followed_when_its_ttl_has_run_out() {
    if let Some(url) = other_role() {
        let guard = lock(&connect(&url).mutex("a").ttl(ms(1_500)));
        say(&guard.fencing_token().to_string());
        wait_to_be_told();
        return;
    }
    let server = RedisServer::start();
    let locks = connect(&server.url());
    let mut other =
        Other::start("a_holder_killed_is_followed_when_its_ttl_has_run_out", &server.url(), |_| {});
    let token: u64 = other.hear().parse().unwrap();
    let waiter = thread::spawn(move || lock_soon(&locks.mutex("a")));
    other.signal(Signal::KILL);
    let killed = clock::now();
    let guard = waiter.join().unwrap();
    assert!(guard.fencing_token().get() > token);
    let waited = clock::now().since(killed);
    assert!(waited < ms(1_500) + Duration::from_secs(4), "it took {waited:?}");
}

#[test]
fn a_holder_stopped_past_its_ttl_sees_at_the_first_look_that_it_lost() {
    if let Some(url) = other_role() {
        let guard = lock(&connect(&url).mutex("a").ttl(ms(1_000)));
        say("locked");
        wait_to_be_told();
        let (status, remaining) = (guard.status(), guard.remaining());
        say(&format!("{status:?} {remaining:?} {:?}", block_on(guard.unlock())));
        return;
    }
    let server = RedisServer::start();
    let test = "a_holder_stopped_past_its_ttl_sees_at_the_first_look_that_it_lost";
    let mut other = Other::start(test, &server.url(), |_| {});
    assert_eq!(other.hear(), "locked");
    other.signal(Signal::STOP);
    let guard = lock_soon(&connect(&server.url()).mutex("a"));
    // Told while it is stopped: the look at its guard is the first thing that it does.
    other.tell();
    other.signal(Signal::CONT);
    assert_eq!(other.hear(), "Lost 0ns Ok(HeldByOther)");
    assert_eq!(guard.status(), Status::Held);
}

#[test]
fn a_client_with_a_wrong_wall_clock_locks_as_any_other() {
    if let Some(url) = other_role() {
        let guard = lock(&connect(&url).mutex("a").ttl(ms(20_000)));
        let true_to_it = |remaining| (ms(10_000)..ms(20_000)).contains(&remaining);
        say(&format!("{:?} {}", guard.status(), true_to_it(guard.remaining())));
        wait_to_be_told();
        say(&format!("{:?} {}", guard.status(), true_to_it(guard.remaining())));
        eventually("confirmed", || guard.status() == Status::Held);
        say(&format!("{} {:?}", true_to_it(guard.remaining()), block_on(guard.unlock())));
        return;
    }
    let server = RedisServer::start();
    let folder = tempfile::tempdir().unwrap();
    let clock = WallClock::new(folder.path());
    for (at_first, then, seen) in [
        // A clock that runs ahead looks like a machine that was paused: unsure until confirmed. One that goes back does not.
        (-3_600_000_000, 0, "Unsure true"),
        (3_600_000_000, 0, "Held true"),
    ] {
        clock.set_offset(at_first);
        let test = "a_client_with_a_wrong_wall_clock_locks_as_any_other";
        let mut other = Other::start(test, &server.url(), |command| clock.give_to(command));
        assert_eq!(other.hear(), "Held true");
        clock.set_offset(then);
        other.tell();
        assert_eq!(other.hear(), seen);
        assert_eq!(other.hear(), "true Ok(Released)");
    }
}

#[test]
fn guards_outlive_the_runtime_they_were_made_on() {
    let (server, proxy, locks) = linked();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let guards = ["a", "b"].map(|name| {
        let mutex = locks.mutex(name).ttl(ms(1_000));
        runtime.block_on(runtime.spawn(async move { mutex.lock().await })).unwrap().unwrap()
    });
    runtime.shutdown_background();
    proxy.forget();
    proxy.wait_for(5, renews("a"));
    let [a, b] = guards;
    assert_eq!((a.status(), b.status()), (Status::Held, Status::Held));
    assert_eq!(block_on(a.unlock()).unwrap(), Released::Released);
    drop((b, locks));
    assert_eq!((proxy.count(releases("b")), server.cli(&["EXISTS", "a", "b"])), (1, "0".to_owned()));
}

/// Memory of this process that is really there, in bytes.
fn resident() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<usize>().unwrap() * 1024
}

#[test]
fn ten_thousand_held_locks_take_less_than_two_kib_each() {
    const LOCKS: usize = 10_000;
    if let Some(url) = other_role() {
        let locks = connect(&url);
        let take = |from, to| -> Vec<_> {
            (from..to).map(|n| lock(&locks.mutex(format!("lock-{n}")).ttl(ms(20_000)))).collect()
        };
        let few = take(0, 100);
        // A whole round of renewals before and after, so that their buffers count too.
        let renewed = |guard: &leasehold::Guard| block_on(guard.changed());
        renewed(few.last().unwrap());
        let before = resident();
        let many = take(100, 100 + LOCKS);
        (0..3).for_each(|_| renewed(many.last().unwrap()));
        say(&(resident().saturating_sub(before) / LOCKS).to_string());
        std::process::exit(0);
    }
    let server = RedisServer::start();
    let mut other =
        Other::start("ten_thousand_held_locks_take_less_than_two_kib_each", &server.url(), |_| {});
    let bytes: usize = other.hear().parse().unwrap();
    assert!((100..2_048).contains(&bytes), "{bytes} bytes for each lock");
    println!("{bytes} bytes for each lock");
}

#[test]
fn a_blocked_executor_costs_no_lock() {
    let (_server, proxy, locks) = linked();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let guard = locks.mutex("a").ttl(ms(500)).lock().await.unwrap();
        // Blocks the only thread of this runtime for at least twenty renewals, four times the TTL.
        proxy.wait_for(20, renews("a"));
        assert_eq!(guard.status(), Status::Held);
        assert_eq!(guard.unlock().await.unwrap(), Released::Released);
    });
}
