//! One lock, wanted by many all the time, while its master is killed, frozen or replaced again and again: three times, or as
//! often as `LEASEHOLD_TEST_FAILOVERS` says.
#![allow(clippy::unwrap_used, reason = "a test")]

mod bad_days;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;

use bad_days::{connect, ms};
use leasehold::clock;
use leasehold_chaos::checker::{Hold, boot_nanos};
use leasehold_chaos::eventually;
use leasehold_chaos::sentinel::Deployment;
use pollster::block_on;

const WORKERS: usize = 4;
const NAME: &str = "churn";
/// How long after a promotion an old holder may not know yet that its lock is lost. (Nothing can be promised before: the lock may
/// have died with the master.)
const TOLD_WITHIN: u64 = 2_000_000_000;
/// How soon after a promotion a lock can be had.
const SERVES_WITHIN: u64 = 1_000_000_000;
/// Longer than any wait may last.
const LONGEST_WAIT: u64 = 20_000;

/// A failover: from the master's bad day until its last holders must have heard of it.
#[derive(Debug)]
struct Window {
    kind: &'static str,
    began: u64,
    promoted: u64,
}

impl Window {
    fn ends(&self) -> u64 {
        self.promoted + TOLD_WITHIN
    }

    fn holds(&self, at: u64) -> bool {
        (self.began..self.ends()).contains(&at)
    }
}

fn work(url: &str, holds: &Mutex<Vec<Hold>>, stop: &AtomicBool) {
    let locks = connect(url);
    let mutex = locks.mutex(NAME).ttl(ms(10_000));
    let mut turn = 0_u64;
    while !stop.load(Ordering::Relaxed) {
        let latest = clock::now().plus(ms(LONGEST_WAIT));
        let answer = block_on(clock::timeout_at(latest, mutex.lock()));
        let guard = match answer.expect("no wait is for ever") {
            Ok(guard) => guard,
            Err(error) => {
                assert!(error.is_transient(), "{error}");
                block_on(clock::sleep(ms(10)));
                continue;
            }
        };
        let start = boot_nanos();
        block_on(clock::sleep(clock::jitter(ms(4))));
        // Only a lease that still stands proves anything of the time until now.
        if !guard.remaining().is_zero() {
            let hold = Hold { start, end: boot_nanos(), token: guard.fencing_token().get() };
            holds.lock().unwrap().push(hold);
        }
        turn += 1;
        if turn.is_multiple_of(3) {
            drop(guard);
        } else {
            let _ = block_on(guard.unlock());
        }
    }
}

/// One failover, after which all is as it was but for who is the master.
fn fail_over(deployment: &mut Deployment, number: usize) -> Window {
    deployment.settle();
    let old = deployment.master();
    let began = boot_nanos();
    let (kind, promoted) = match number % 3 {
        0 => {
            deployment.servers[old].kill9();
            deployment.promoted(old);
            ("killed", boot_nanos())
        }
        1 => {
            deployment.servers[old].pause();
            deployment.promoted(old);
            let promoted = boot_nanos();
            deployment.servers[old].resume();
            ("frozen", promoted)
        }
        _ => {
            deployment.fail_over();
            ("stepped down", boot_nanos())
        }
    };
    block_on(clock::sleep(ms(3_000)));
    if kind == "killed" {
        deployment.revive(old);
    }
    Window { kind, began, promoted }
}

/// No two at once and no token that falls back, but for those who could not know yet.
fn judge(holds: &mut [Hold], windows: &[Window]) {
    holds.sort_by_key(|hold| hold.start);
    let (mut last_end, mut last_token, mut unsure, mut overlaps) = (0, 0, 0, 0);
    for hold in holds.iter() {
        let in_window = windows.iter().any(|window| window.holds(hold.start));
        unsure += usize::from(in_window);
        overlaps += usize::from(hold.start < last_end);
        assert!(in_window || hold.start >= last_end, "{hold:?} begins before another ends: {windows:?}");
        assert!(in_window || hold.token > last_token, "{hold:?} comes after token {last_token}: {windows:?}");
        last_end = last_end.max(hold.end);
        last_token = last_token.max(hold.token);
    }
    println!("{} holds, {unsure} of them around a failover, {overlaps} overlaps there", holds.len());
    for window in windows {
        let first = holds.iter().map(|hold| hold.start).find(|start| *start >= window.promoted);
        let waited = first.expect("somebody got it") - window.promoted;
        println!(
            "master {}: promoted after {} ms, and {} us later somebody held the lock",
            window.kind,
            (window.promoted - window.began) / 1_000_000,
            waited / 1_000
        );
        assert!(waited < SERVES_WITHIN, "{waited} ns after the promotion: {window:?}");
    }
}

#[test]
fn failover_after_failover_tokens_grow_and_nobody_waits_for_ever() {
    let rounds = std::env::var("LEASEHOLD_TEST_FAILOVERS").map_or(3, |text| text.parse().unwrap());
    let mut deployment = Deployment::start();
    let url = deployment.url();
    let (holds, stop) = (Arc::new(Mutex::new(Vec::new())), Arc::new(AtomicBool::new(false)));
    let workers: Vec<_> = (0..WORKERS)
        .map(|_| {
            let (url, holds, stop) = (url.clone(), holds.clone(), stop.clone());
            thread::spawn(move || work(&url, &holds, &stop))
        })
        .collect();
    eventually("all work", || holds.lock().unwrap().len() > 100);
    let windows: Vec<_> = (0..rounds).map(|number| fail_over(&mut deployment, number)).collect();
    stop.store(true, Ordering::Relaxed);
    for worker in workers {
        worker.join().unwrap();
    }
    judge(&mut holds.lock().unwrap(), &windows);
    // What may be left is what the new master does not know to be over, and it ends by itself.
    let master = &deployment.servers[deployment.master()];
    eventually("the lock is free", || master.cli(&["EXISTS", NAME]) == "0");
    for key in master.cli(&["KEYS", "*"]).lines() {
        let left: i64 = master.cli(&["PTTL", key]).parse().unwrap();
        assert!(left > 0, "{key} stays for ever");
    }
}
