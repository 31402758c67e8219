//! What `leasehold run` promises when processes die, stop, or refuse to go: the command is dead before the lock passes on.
#![allow(
    clippy::unwrap_used,
    clippy::disallowed_methods,
    reason = "tests fail by panicking and measure real time"
)]

mod common;

use std::fs;
use std::process::Stdio;

use common::{Place, Running, children, events, eventually, is_alive, pid_in, send, text};
use rustix::process::Signal;

/// Scripts that print their own number, write that of another process to the file `other`, and do not want to go.
const STUBBORN: &[(&str, &str)] = &[
    ("plain", "sleep 100 & echo $! > other; echo $$; wait"),
    (
        "ignores TERM",
        "trap '' TERM INT HUP; sleep 100 & echo $! > other; echo $$; while :; do wait; sleep 1; done",
    ),
    (
        "leaves its group",
        "setsid sh -c 'trap \"\" TERM; echo $$ > other; while :; do sleep 1; done' & echo $$; wait",
    ),
    (
        "a daemon, its parent gone",
        "(setsid sh -c 'trap \"\" TERM HUP; echo $$ > other; while :; do sleep 1; done' &) ; echo $$; exec sleep 100",
    ),
    ("is stopped", "sleep 100 & echo $! > other; echo $$; kill -STOP $$"),
];

/// The two processes of a stubborn script.
fn both(place: &Place, running: &Running) -> [i32; 2] {
    [pid_in(&running.first), pid_in(&place.await_file("other"))]
}

/// A waiter, started now, that fails if one of these processes lives once it is inside.
fn successor(place: &Place, pids: [i32; 2]) -> std::process::Child {
    let script =
        pids.map(|pid| format!("! grep -q '^State:.[^Z]' /proc/{pid}/status 2> /dev/null")).join(" && ");
    place.leasehold(["run", "-w", "25s", "x", "-c", &script]).stderr(Stdio::null()).spawn().unwrap()
}

#[test]
fn a_killed_runner_takes_the_command_with_it_before_the_next_gets_in() {
    for (name, script) in STUBBORN {
        let place = Place::new();
        let mut running = place.start(&["--ttl", "10m", "-k", "200ms"], script);
        let pids = both(&place, &running);
        let mut next = successor(&place, pids);
        running.signal(Signal::KILL);
        assert_eq!(next.wait().unwrap().code(), Some(0), "{name}");
        running.child.wait().unwrap();
        assert!(pids.iter().all(|&pid| !is_alive(pid)), "{name}");
    }
}

#[test]
fn a_runner_that_was_stopped_past_its_ttl_finds_its_command_dead() {
    for (name, script) in STUBBORN {
        let place = Place::new();
        let running = place.start(&["--ttl", "1s"], script);
        let pids = both(&place, &running);
        let mut next = successor(&place, pids);
        running.signal(Signal::STOP);
        assert_eq!(next.wait().unwrap().code(), Some(0), "{name}");
        running.signal(Signal::CONT);
        let (code, _, err) = running.end();
        assert_eq!(code, Some(123), "{name}: {err}");
        assert!(err.contains("the lock x was not renewed in time"), "{name}: {err}");
    }
}

#[test]
fn on_a_server_too_the_command_is_dead_before_the_lock_passes_on() {
    let server = leasehold_chaos::servers::RedisServer::builder().start();
    for (name, script) in STUBBORN {
        for signal in [Signal::KILL, Signal::STOP] {
            let place = Place { folder: tempfile::tempdir().unwrap(), store: Some(server.url()) };
            let mut running = place.start(&["--ttl", "1s"], script);
            let pids = both(&place, &running);
            let mut next = successor(&place, pids);
            running.signal(signal);
            assert_eq!(next.wait().unwrap().code(), Some(0), "{name}, {signal:?}");
            running.child.kill().unwrap();
            running.child.wait().unwrap();
            assert!(place.is_free(), "{name}");
        }
    }
}

#[test]
fn renewals_that_fail_are_told_and_so_is_their_recovery() {
    let server = leasehold_chaos::servers::RedisServer::start();
    let place = Place { folder: tempfile::tempdir().unwrap(), store: Some(server.url()) };
    // With its events in a file: the command runs until it is told that the lock was held again.
    let shell = "exec \"$0\" run --ttl 20s --status-fd 5 y -c 'echo ready; until grep -q held events; do sleep 0.05; done' 5> events";
    let mut command = std::process::Command::new("setsid");
    command.args(["sh", "-c", shell, common::LEASEHOLD]).current_dir(place.folder.path());
    command.env("LEASEHOLD_STORE", place.url()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let running = Running::start(command);
    leasehold_chaos::eventually("it runs", || place.await_file("events").contains("started"));
    server.pause();
    leasehold_chaos::eventually("doubt is told", || place.await_file("events").contains("unsure"));
    server.resume();
    let (code, _, err) = running.end();
    assert_eq!(code, Some(0), "{err}");
    assert!(err.contains("could not be renewed") && err.contains("renewed again"), "{err}");
    let told = events(&place.path("events"));
    let names: Vec<_> = told.iter().map(|event| event["event"].as_str().unwrap()).collect();
    assert_eq!(names, ["acquired", "started", "unsure", "held", "exited", "released"]);
}

#[test]
fn a_killed_guardian_takes_the_command_with_it() {
    for (name, script) in STUBBORN {
        let place = Place::new();
        let running = place.start(&["--ttl", "20s"], script);
        let pids = both(&place, &running);
        let mut next = successor(&place, pids);
        send(running.guardian(), Signal::KILL);
        let (code, _, err) = running.end();
        assert_eq!(code, Some(137), "{name}: {err}");
        assert!(err.contains("the guardian of the command died"), "{name}: {err}");
        assert_eq!(next.wait().unwrap().code(), Some(0), "{name}");
    }
}

#[test]
fn a_killed_guardian_and_runner_leave_no_command() {
    let place = Place::new();
    let mut running = place.start(&[], "echo $$; exec sleep 100");
    let (command, guardian) = (pid_in(&running.first), running.guardian());
    running.signal(Signal::STOP);
    send(guardian, Signal::KILL);
    eventually("the kernel kills the command", || !is_alive(command));
    running.signal(Signal::KILL);
    running.child.wait().unwrap();
}

#[test]
fn a_guardian_that_is_stopped_does_not_let_the_command_outlive_the_lock() {
    let place = Place::new();
    let running = place.start(&["--ttl", "2s"], "trap '' TERM; sleep 100 & echo $! > other; echo $$; wait");
    let pids = both(&place, &running);
    send(running.guardian(), Signal::STOP);
    place.steal();
    let (code, _, err) = running.end();
    assert_eq!(code, Some(123), "{err}");
    assert!(err.contains("the guardian did not stop the command in time"), "{err}");
    assert!(pids.iter().all(|&pid| !is_alive(pid)));
}

/// (flags, script, what it prints)
const ON_LOST: &[(&[&str], &str, &str)] = &[
    (&[], "trap 'echo asked; exit 0' TERM; echo; while :; do sleep 0.02; done", "asked"),
    (&["--on-lost", "USR1"], "trap 'echo one; exit 0' USR1; echo; while :; do sleep 0.02; done", "one"),
    (&["--on-lost", "kill"], "trap 'echo asked' TERM; echo; while :; do sleep 0.02; done", ""),
    (
        &["--on-lost", "ignore"],
        "echo; read line <&$LEASEHOLD_LOST_FD; echo told: $line; exit 0",
        "told: lost",
    ),
];

#[test]
fn a_lost_lock_is_123_whatever_the_command_makes_of_it() {
    for (flags, script, prints) in ON_LOST {
        let place = Place::new();
        let running = place.start(&[&["--ttl", "2s"], *flags].concat(), script);
        place.steal();
        let (code, out, err) = running.end();
        assert_eq!((code, out.trim()), (Some(123), *prints), "{flags:?}: {err}");
        assert!(err.contains("the lock x is lost"), "{flags:?}: {err}");
    }
}

#[test]
fn a_lock_found_lost_at_the_release_is_123() {
    let place = Place::new();
    // Stolen just before the command ends by itself: no renewal comes between.
    let mut command =
        place.leasehold(["run", "--status-fd", "1", "--ttl", "100s", "x", "-c", "echo ready; cat"]);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut running = Running::start(command);
    place.steal();
    drop(running.child.stdin.take());
    let (code, out, err) = running.end();
    assert_eq!(code, Some(123), "{err}");
    assert!(err.contains("was no longer held when it was to be released"), "{err}");
    assert!(out.contains(r#""answer":"not-held""#), "{out}");
}

#[test]
fn what_the_command_leaves_behind_is_stopped_before_the_release() {
    for (name, script) in &STUBBORN[2..4] {
        let place = Place::new();
        let script = script.replace("wait", "exit 6").replace("exec sleep 100", "exit 6");
        let running = place.start(&["-k", "300ms"], &script);
        let other = pid_in(&place.await_file("other"));
        let mut next = successor(&place, [other, other]);
        let (code, _, err) = running.end();
        assert_eq!(code, Some(6), "{name}: {err}");
        assert!(err.contains("left") && err.contains("running; stopped before the release"), "{name}: {err}");
        assert_eq!(next.wait().unwrap().code(), Some(0), "{name}");
    }
}

#[test]
fn what_ends_by_itself_soon_after_the_command_is_not_mentioned() {
    let place = Place::new();
    let output = place.run(["run", "x", "-c", "(sleep 0.2; echo late) & exit 4"]);
    assert_eq!((output.status.code(), text(&output.stdout), text(&output.stderr)), (Some(4), "late\n", ""));
}

#[test]
fn children_from_before_are_no_family() {
    let place = Place::new();
    let script = "sleep 100 > /dev/null 2>&1 & echo $! > stranger; exec \"$0\" run x -c 'exit 3'";
    let mut command = std::process::Command::new("setsid");
    command.args(["sh", "-c", script, common::LEASEHOLD]).current_dir(place.folder.path());
    let output = command.env("LEASEHOLD_STORE", place.url()).stdout(Stdio::null()).output().unwrap();
    let stranger = pid_in(&fs::read_to_string(place.path("stranger")).unwrap());
    assert_eq!((output.status.code(), is_alive(stranger)), (Some(3), true));
    send(stranger, Signal::KILL);
}

#[test]
fn a_loss_is_an_event_too() {
    let place = Place::new();
    let shell = "exec \"$0\" run --ttl 2s --status-fd 5 x -c 'echo ready; exec sleep 100' 5> events";
    let mut command = std::process::Command::new("setsid");
    command.args(["sh", "-c", shell, common::LEASEHOLD]).current_dir(place.folder.path());
    command.env("LEASEHOLD_STORE", place.url()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let running = Running::start(command);
    assert_eq!(children(running.guardian()).len(), 1);
    place.steal();
    assert_eq!(running.end().0, Some(123));
    let told = events(&place.path("events"));
    let names: Vec<_> = told.iter().map(|event| event["event"].as_str().unwrap()).collect();
    assert_eq!(names, ["acquired", "started", "lost", "exited", "released"]);
    assert_eq!((&told[3]["signal"], &told[3]["lost"]), (&15.into(), &true.into()));
}
