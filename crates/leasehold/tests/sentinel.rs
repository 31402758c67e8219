//! Bad days of a master with sentinels: killed, frozen, behind, come back, or not to be found.
#![allow(clippy::unwrap_used, reason = "a test")]

mod bad_days;

use std::time::{Duration, Instant};

use bad_days::{Waiter, assert_no_line, connect, lock, lock_soon, ms};
use leasehold::{Error, ErrorKind, Guard, Locks, Loss, Released, Severity, Status, clock};
use leasehold_chaos::eventually;
use leasehold_chaos::sentinel::{Deployment, Layout, MASTER, url_by};
use leasehold_chaos::servers::{RedisServer, free_port};
use pollster::block_on;

/// How soon after the promotion a holder knows how it stands.
const TOLD_WITHIN: Duration = Duration::from_secs(2);
/// How soon after the promotion a lock can be had.
const SERVES_WITHIN: Duration = Duration::from_secs(1);

fn now() -> Instant {
    #[expect(clippy::disallowed_methods, reason = "compared with moments that the deployment tells")]
    Instant::now()
}

fn failed(url: &str) -> Error {
    block_on(leasehold::connect(url)).expect_err("nothing can be locked there")
}

/// Waits until every replica has what was written for the lock.
fn replicated(deployment: &Deployment, name: &str) {
    eventually("the replicas have the lock", || {
        deployment.servers.iter().all(|server| server.cli(&["EXISTS", name]) == "1")
    });
}

/// Makes every replica one that has not heard of the last writes about a lock.
fn fall_behind(deployment: &Deployment, name: &str) {
    let master = deployment.master();
    for (number, server) in deployment.servers.iter().enumerate() {
        if number != master {
            server.cli(&["CONFIG", "SET", "replica-read-only", "no"]);
            let side = |kind: &str| format!("leasehold:{{{name}}}:{kind}:{name}");
            server.cli(&["DEL", name, &side("fence"), &side("queue"), &side("alive")]);
            server.cli(&["CONFIG", "SET", "replica-read-only", "yes"]);
        }
    }
}

/// Returns when the guard has been confirmed since it was valid until `before`, which was after the old master's last word; and
/// says how long after `since` that was seen.
fn confirmed(guard: &Guard, before: clock::Instant, since: Instant) -> Duration {
    eventually("the lock is confirmed by the new master", || {
        guard.valid_until() > before && guard.status() == Status::Held
    });
    now() - since
}

/// Takes and gives back a lock, trying again while it cannot; returns its token, and when that was.
fn cycle(locks: &Locks, name: &str) -> (u64, Instant) {
    let latest = now() + leasehold_chaos::PATIENCE;
    loop {
        match block_on(locks.mutex(name).lock_for(ms(5_000))) {
            Ok(Some(guard)) => {
                let (token, when) = (guard.fencing_token().get(), now());
                let _ = block_on(guard.unlock());
                return (token, when);
            }
            Ok(None) => {}
            Err(error) => assert!(error.is_transient(), "{error}"),
        }
        assert!(now() < latest, "no lock can be had");
        block_on(clock::sleep(ms(5)));
    }
}

#[test]
fn a_held_lock_that_the_replica_had_survives_the_masters_death() {
    let mut deployment = Deployment::start();
    let (locks, others) = (connect(&deployment.url()), connect(&deployment.url()));
    assert!(locks.guarantees().lost_at_failover);
    let guard = lock(&locks.mutex("a").ttl(ms(20_000)));
    replicated(&deployment, "a");
    let old = deployment.master();
    deployment.servers[old].kill9();
    let before = guard.valid_until();
    let (new, promoted) = deployment.promoted(old);
    let waited = confirmed(&guard, before, promoted);
    println!("confirmed {waited:?} after the promotion");
    assert!(waited < TOLD_WITHIN, "{waited:?}");
    assert!(block_on(others.mutex("a").try_lock()).unwrap().is_none());
    assert_eq!(deployment.servers[new].cli(&["EXISTS", "a"]), "1");
    // The old master comes back, at first as a master, with nothing: nobody goes there.
    deployment.revive(old);
    let token = guard.fencing_token().get();
    assert_eq!(block_on(guard.unlock()).unwrap(), Released::Released);
    assert!(cycle(&others, "a").0 > token);
    eventually("the old master is a replica", || deployment.is_replica(old));
    assert!(cycle(&locks, "a").0 > token);
    let commands = deployment.servers[old].cli(&["INFO", "commandstats"]);
    assert!(!commands.contains("cmdstat_eval"), "it was asked: {commands}");
}

#[test]
fn a_held_lock_that_the_replica_had_not_is_told_lost_after_the_promotion() {
    let mut deployment = Deployment::start();
    let (locks, others) = (connect(&deployment.url()), connect(&deployment.url()));
    // Renewed every six minutes: it hears of the loss because another server took over, and from nothing else.
    let guard = lock(&locks.mutex("a").ttl(ms(3_600_000)));
    let first_look = guard.changed();
    block_on(first_look);
    replicated(&deployment, "a");
    fall_behind(&deployment, "a");
    let old = deployment.master();
    deployment.servers[old].kill9();
    let (_, promoted) = deployment.promoted(old);
    assert_eq!(block_on(guard.lost()), Loss::Removed);
    let waited = now() - promoted;
    println!("told {waited:?} after the promotion");
    assert!(waited < TOLD_WITHIN, "{waited:?}");
    let (token, when) = cycle(&others, "a");
    println!("taken {:?} after the promotion", when - promoted);
    assert!(token > guard.fencing_token().get(), "though the counter was behind");
    let _ = block_on(guard.unlock());
}

#[test]
fn who_waits_while_the_master_dies_is_served_by_the_next() {
    for behind in [false, true] {
        let mut deployment = Deployment::start();
        let (locks, others) = (connect(&deployment.url()), connect(&deployment.url()));
        let guard = lock(&locks.mutex("a").ttl(ms(20_000)));
        let waiters: Vec<_> = (0..3).map(|_| Waiter::start(&others.mutex("a").ttl(ms(20_000)))).collect();
        replicated(&deployment, "a");
        let old = deployment.master();
        if behind {
            // The line is forgotten, and the hold too.
            fall_behind(&deployment, "a");
        }
        deployment.servers[old].kill9();
        let before = guard.valid_until();
        let (new, promoted) = deployment.promoted(old);
        if behind {
            assert_eq!(block_on(guard.lost()), Loss::Removed);
            let waited = now() - promoted;
            assert!(waited < TOLD_WITHIN, "{waited:?}");
        } else {
            let waited = confirmed(&guard, before, promoted);
            assert!(waited < TOLD_WITHIN, "{waited:?}");
            assert!(waiters.iter().all(|waiter| !waiter.has_ended()), "it is held by another");
        }
        let mut token = guard.fencing_token();
        let released = block_on(guard.unlock()).unwrap();
        assert_eq!(released == Released::Released, !behind, "{released:?}");
        let mut left = waiters;
        while !left.is_empty() {
            eventually("one of those who wait gets it", || left.iter().any(Waiter::has_ended));
            let next = left.iter().position(Waiter::has_ended).unwrap();
            let guard = left.remove(next).guard();
            assert!(guard.fencing_token() > token);
            token = guard.fencing_token();
            block_on(guard.unlock()).unwrap();
        }
        assert_no_line(&deployment.servers[new], "a");
    }
}

#[test]
fn a_frozen_master_is_left_for_the_next_and_not_believed_when_it_wakes() {
    let deployment = Deployment::start();
    let (locks, others) = (connect(&deployment.url()), connect(&deployment.url()));
    let guard = lock(&locks.mutex("a").ttl(ms(20_000)));
    replicated(&deployment, "a");
    let old = deployment.master();
    deployment.servers[old].pause();
    let before = guard.valid_until();
    let (new, promoted) = deployment.promoted(old);
    // The connection to the frozen one is open still: only the sentinels tell.
    let waited = confirmed(&guard, before, promoted);
    let (_, when) = cycle(&others, "b");
    let served = when.saturating_duration_since(promoted);
    println!("confirmed {waited:?} and serving {served:?} after the promotion");
    assert!(waited < TOLD_WITHIN && served < SERVES_WITHIN, "{waited:?} {served:?}");
    deployment.servers[old].resume();
    let token = guard.fencing_token().get();
    assert_eq!(block_on(guard.unlock()).unwrap(), Released::Released);
    assert!(cycle(&others, "a").0 > token);
    eventually("the old master is a replica of the new", || deployment.is_replica(old));
    assert_eq!(deployment.servers[new].cli(&["EXISTS", "a"]), "0");
    assert!(cycle(&locks, "a").0 > token);
}

#[test]
fn a_master_that_steps_down_is_left_at_once() {
    let deployment = Deployment::start();
    // Some ask sentinels that have not heard of it yet, and which name the old one for a moment.
    let all = [(); 6].map(|()| connect(&deployment.url()));
    let locks = &all[0];
    let guard = lock(&locks.mutex("a").ttl(ms(20_000)));
    replicated(&deployment, "a");
    let old = deployment.master();
    // Both run on, and for a moment both call themselves master.
    let new = deployment.fail_over();
    let promoted = now();
    for locks in &all {
        eventually("new locks go to the new master", || match block_on(locks.mutex("b").lock()) {
            Ok(held) => {
                let there = deployment.servers[new].cli(&["EXISTS", "b"]) == "1";
                let _ = block_on(held.unlock());
                there
            }
            Err(error) => {
                assert!(error.is_transient(), "{error}");
                false
            }
        });
    }
    let moved = now() - promoted;
    println!("moved {moved:?} after the promotion");
    assert!(moved < SERVES_WITHIN, "{moved:?}");
    let before = guard.valid_until();
    confirmed(&guard, before, promoted);
    assert_ne!(old, new);
    assert_eq!(block_on(guard.unlock()).unwrap(), Released::Released);
    assert_eq!(deployment.servers[new].cli(&["EXISTS", "a"]), "0", "it was given back there");
}

#[test]
fn without_any_sentinel_held_locks_go_on_and_connecting_says_what_each_said() {
    let mut deployment = Deployment::start();
    let url = deployment.url();
    let locks = connect(&url);
    let guard = lock(&locks.mutex("a").ttl(ms(3_000)));
    deployment.sentinels.iter_mut().for_each(RedisServer::kill9);
    let before = guard.valid_until();
    eventually("renewed on the old connection, for longer than its TTL", || {
        guard.valid_until() > before.plus(ms(4_000)) && guard.status() == Status::Held
    });
    assert_eq!(block_on(lock(&locks.mutex("b")).unlock()).unwrap(), Released::Released);
    let began = now();
    let error = failed(&url);
    assert!(now() - began < ms(1_500), "it failed fast: {:?}", now() - began);
    assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
    for sentinel in &deployment.sentinels {
        assert!(error.to_string().contains(&format!("127.0.0.1:{}", sentinel.port())), "{error}");
    }
    assert_eq!(block_on(guard.unlock()).unwrap(), Released::Released);
}

#[test]
fn a_sentinel_that_does_not_answer_costs_nobody_anything() {
    let mut deployment = Deployment::start();
    let ports: Vec<_> = deployment.sentinels.iter().map(RedisServer::port).collect();
    // The first is frozen and the second is nobody: the third is heard.
    deployment.sentinels[0].pause();
    let url = url_by(&[ports[0], free_port(), ports[2]]);
    let began = now();
    let locks = connect(&url);
    let took = now() - began;
    println!("connected in {took:?}");
    assert!(took < ms(1_000), "{took:?}");
    let guard = lock(&locks.mutex("a").ttl(ms(20_000)));
    replicated(&deployment, "a");
    let old = deployment.master_by(2);
    deployment.servers[old].kill9();
    let before = guard.valid_until();
    let promoted = {
        eventually("a sentinel names another master", || deployment.master_by(2) != old);
        now()
    };
    let waited = confirmed(&guard, before, promoted);
    println!("confirmed {waited:?} after the promotion");
    assert!(waited < TOLD_WITHIN, "{waited:?}");
    deployment.sentinels[0].resume();
    assert_eq!(block_on(guard.unlock()).unwrap(), Released::Released);
}

#[test]
fn a_wrong_login_or_name_is_told_with_what_to_do_about_it() {
    let deployment = Layout::default().sentinel_password("hunter2").start();
    let url = deployment.url();
    for wrong in [url.clone(), format!("{url}?sentinel_password=hunter3")] {
        let error = failed(&wrong);
        assert_eq!(error.kind(), ErrorKind::Rejected, "{error}");
        let text = format!("{error} {error:?}");
        assert!(text.contains("sentinel_password") && !text.contains("hunter"), "{text}");
    }
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), "hunter2\n").unwrap();
    for right in [
        format!("{url}?sentinel_password=hunter2"),
        format!("{url}?sentinel_password_file={}", file.path().display()),
    ] {
        let locks = connect(&right);
        assert_eq!(block_on(lock(&locks.mutex("a")).unlock()).unwrap(), Released::Released);
        assert_eq!(&*locks.location(), url);
        let text = format!("{locks:?}");
        assert!(!text.contains("hunter"), "{text}");
    }
    let stranger = url.replace(MASTER, "theirmaster") + "?sentinel_password=hunter2";
    let error = failed(&stranger);
    assert_eq!(error.kind(), ErrorKind::Rejected, "{error}");
    assert!(error.to_string().contains("no master of the name theirmaster"), "{error}");
    // What listens there is no sentinel.
    let error = failed(&url_by(&[deployment.servers[0].port()]));
    assert_eq!(error.kind(), ErrorKind::Rejected, "{error}");
    assert!(error.to_string().contains("is it a sentinel?"), "{error}");
}

#[test]
fn a_replica_that_sentinels_call_the_master_is_not_believed() {
    let deployment = Deployment::start();
    let replica = (deployment.master() + 1) % 3;
    let port = deployment.servers[replica].port();
    // A sentinel that has it wrong, with nobody to correct it.
    let lone = Layout::default().sentinels(1).watching(port);
    let error = failed(&url_by(&[lone.port()]));
    assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
    assert!(error.to_string().contains("no master but says slave"), "{error}");
    // One that knows better is enough.
    let locks = connect(&url_by(&[lone.port(), deployment.sentinels[0].port()]));
    let guard = lock_soon(&locks.mutex("a"));
    assert_eq!(deployment.servers[deployment.master()].cli(&["EXISTS", "a"]), "1");
    // The connection may be given up just now, as the sentinels that meet hear of each other's epochs.
    match block_on(guard.unlock()) {
        Ok(released) => assert_eq!(released, Released::Released),
        Err(error) => assert_eq!(error.kind(), ErrorKind::Unknown, "{error}"),
    }
}

#[test]
fn the_doctor_looks_at_sentinels_replicas_and_clocks() {
    let mut deployment = Layout::default().own_clocks().start();
    let replica = (deployment.master() + 1) % 3;
    let port = deployment.servers[replica].port();
    deployment.servers[replica].set_clock_offset(-5_000_000);
    let findings = block_on(leasehold::diagnose(&deployment.url()));
    let of = |check: &str| {
        let found: Vec<_> = findings.iter().filter(|finding| finding.check.starts_with(check)).collect();
        assert!(!found.is_empty(), "{check}: {findings:#?}");
        found
    };
    let sentinels = of("sentinel ");
    assert_eq!(sentinels.len(), 3);
    for finding in sentinels {
        assert_eq!(finding.severity, Severity::Good, "{finding:?}");
        assert!(finding.found.contains("2 replicas, 2 other sentinels, quorum 2"), "{finding:?}");
    }
    assert_eq!(of("min-replicas-to-write")[0].severity, Severity::Warning);
    assert_eq!(of("clock of replica").len(), 2);
    let off = of(&format!("clock of replica 127.0.0.1:{port}"))[0];
    assert_eq!(off.severity, Severity::Warning);
    assert!(off.found.contains("behind") && off.found.starts_with(['4', '5']), "{off:?}");
    assert_eq!(of("reach")[0].severity, Severity::Good);

    // With one sentinel left of three there is no quorum.
    deployment.sentinels[1].kill9();
    deployment.sentinels[2].kill9();
    eventually("the last one has noticed", || {
        deployment.sentinels[0].cli(&["SENTINEL", "CKQUORUM", MASTER]).starts_with("NOQUORUM")
    });
    let findings = block_on(leasehold::diagnose(&deployment.url()));
    let sentinels: Vec<_> =
        findings.iter().filter(|finding| finding.check.starts_with("sentinel ")).collect();
    assert_eq!(sentinels.len(), 3);
    for finding in sentinels {
        assert_eq!(finding.severity, Severity::Warning, "{finding:?}");
    }
}

#[test]
fn a_master_that_has_too_few_replicas_for_a_write_makes_waiters_wait() {
    let deployment = Layout::default().args(["--min-replicas-to-write", "2"]).start();
    let locks = connect(&deployment.url());
    let master = &deployment.servers[deployment.master()];
    let guard = lock(&locks.mutex("a"));
    let waiter = Waiter::start(&locks.mutex("a"));
    let replicas: Vec<_> =
        (0..3).filter(|number| *number != deployment.master()).map(|n| &deployment.servers[n]).collect();
    assert_eq!(master.cli(&["CONFIG", "SET", "min-replicas-max-lag", "1"]), "OK");
    replicas[0].pause();
    eventually("it refuses writes", || master.cli(&["SET", "x", "1"]).starts_with("NOREPLICAS"));
    let error = block_on(locks.mutex("b").lock()).expect_err("it takes no writes");
    assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
    assert!(error.to_string().contains("NOREPLICAS"), "{error}");
    replicas[0].resume();
    eventually("it takes writes again", || master.cli(&["SET", "x", "1"]) == "OK");
    assert_eq!(block_on(guard.unlock()).unwrap(), Released::Released);
    assert_eq!(block_on(waiter.guard().unlock()).unwrap(), Released::Released);
}

#[test]
fn a_release_that_the_new_master_has_not_heard_of_is_made_good_there() {
    let mut deployment = Deployment::start();
    let locks = connect(&deployment.url());
    let guard = lock(&locks.mutex("a").ttl(ms(3_600_000)));
    replicated(&deployment, "a");
    let value = deployment.servers[deployment.master()].cli(&["GET", "a"]);
    assert_eq!(block_on(guard.unlock()).unwrap(), Released::Released);
    let old = deployment.master();
    for (number, server) in deployment.servers.iter().enumerate() {
        if number != old {
            eventually("it heard of the release", || server.cli(&["EXISTS", "a"]) == "0");
            // And now it has not.
            server.cli(&["CONFIG", "SET", "replica-read-only", "no"]);
            assert_eq!(server.cli(&["SET", "a", &value, "PX", "3600000"]), "OK");
            server.cli(&["CONFIG", "SET", "replica-read-only", "yes"]);
        }
    }
    deployment.servers[old].kill9();
    let (new, promoted) = deployment.promoted(old);
    eventually("it is free", || deployment.servers[new].cli(&["EXISTS", "a"]) == "0");
    let waited = now() - promoted;
    println!("free {waited:?} after the promotion");
    assert!(waited < SERVES_WITHIN, "{waited:?}");
}

/// The rights that a page tells people to grant, from the line that begins so.
fn rights<'a>(page: &'a str, beginning: &str) -> &'a str {
    let line = page.lines().find(|line| line.starts_with(beginning)).expect("the page has the line");
    line.strip_prefix(beginning).unwrap_or_default()
}

#[test]
fn the_rights_in_the_docs_suffice() {
    let servers = rights(include_str!("../../../docs/redis.md"), "ACL SETUSER locks on >PASSWORD ~lock:*");
    let sentinels = rights(include_str!("../../../docs/sentinel.md"), "ACL SETUSER watch on >PASSWORD");
    let user = format!("locks on >hunter2 ~lock:* {servers} +role +wait");
    let words = ["--user".to_owned()].into_iter().chain(user.split_whitespace().map(str::to_owned));
    let mut deployment =
        Layout::default().args(words).sentinel_user(&format!("watch on >hunter3 {sentinels}")).start();
    let hosts = deployment.url().replace("redis+sentinel://", "");
    let url = format!(
        "redis+sentinel://locks:hunter2@{hosts}?prefix=lock:&sentinel_user=watch&sentinel_password=hunter3"
    );
    for finding in block_on(leasehold::diagnose(&url)) {
        let is_right = !finding.found.contains("NOPERM") && finding.severity != Severity::Failure;
        assert!(is_right, "{finding:?}");
    }
    let locks = connect(&url);
    assert!(locks.guarantees().fifo);
    let guard = lock(&locks.mutex("a").ttl(ms(20_000)).replicas(2, ms(2_000)));
    assert_eq!(guard.replicas(), Some(2));
    let waiter = Waiter::start(&locks.mutex("a").ttl(ms(20_000)));
    let old = deployment.master();
    deployment.servers[old].kill9();
    let before = guard.valid_until();
    let (_, promoted) = deployment.promoted(old);
    let waited = confirmed(&guard, before, promoted);
    assert!(waited < TOLD_WITHIN, "{waited:?}");
    assert_eq!(block_on(guard.unlock()).unwrap(), Released::Released);
    assert_eq!(block_on(waiter.guard().unlock()).unwrap(), Released::Released);
}
