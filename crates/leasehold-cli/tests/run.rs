//! `leasehold run`: exit codes, options, and what passes between user and command.
#![allow(
    clippy::unwrap_used,
    clippy::disallowed_methods,
    reason = "tests fail by panicking and measure real time"
)]

mod common;

use std::ffi::OsStr;
use std::fs;
use std::io::{Read as _, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::process::Stdio;
use std::time::{Duration, Instant};

use common::{Place, Running, events, eventually, is_alive, pid_in, state, text};
use rustix::process::Signal;

/// (arguments, exit code, what standard error says)
const CODES: &[(&[&str], i32, &str)] = &[
    (&["run", "x", "--", "true"], 0, ""),
    (&["run", "x", "--", "sh", "-c", "exit 7"], 7, ""),
    (&["run", "x", "-c", "exit 255"], 255, ""),
    (&["run", "x", "-c", "kill -TERM $$"], 143, ""),
    (&["run", "x", "-c", "kill -KILL $$"], 137, ""),
    (&["run", "x", "--", "no-such-command"], 127, "no-such-command: command not found"),
    (&["run", "x", "--", "/no/such/file"], 127, "command not found"),
    (&["run", "x", "--", "/etc/passwd"], 126, "not an executable"),
    (&["run", "x", "--", "./bad-interpreter"], 127, "not found"),
    (&["run", "x", "--", "/"], 126, "not an executable"),
    (&["run", "x"], 64, "required"),
    (&["run"], 64, "required"),
    (&[], 64, "Usage"),
    (&["run", "x", "-c", "true", "--", "true"], 64, "cannot be used with"),
    (&["run", "", "--", "true"], 64, "name is empty"),
    (&["run", "leasehold:x", "--", "true"], 64, "begins with leasehold:"),
    (&["run", "x", "", "--", "true"], 64, "name is empty"),
    (&["run", "x", "y\nz", "--", "true"], 64, "line break"),
    (&["run", "x", "true"], 64, "required"),
    (&["run", "x", "y", "x", "--", "sh", "-c", "exit 7"], 7, ""),
    (&["run", "a", "held", "z", "-n", "--", "true"], 124, "held is held by"),
    (&["run", "z", "held", "a", "-w", "50ms", "--", "true"], 124, "gave up after 50ms"),
    (&["run", "--bogus", "x", "--", "true"], 64, "--bogus"),
    (&["run", "-n", "-w", "1s", "x", "--", "true"], 64, "cannot be used with"),
    (&["run", "-k", "18s", "x", "--", "true"], 64, "17s at most"),
    (&["run", "--ttl", "0s", "x", "--", "true"], 64, "too short"),
    (&["run", "--ttl", "1ms", "x", "--", "true"], 64, "too short"),
    (&["run", "--ttl", "2years", "x", "--", "true"], 64, "is more than"),
    (&["run", "--ttl", "30", "x", "--", "true"], 64, "30s, 250ms"),
    (&["run", "--on-lost", "nonsense", "x", "--", "true"], 64, "SIGUSR1"),
    (&["run", "--meta", "novalue", "x", "--", "true"], 64, "KEY=VALUE"),
    (&["run", "--status-fd", "77", "x", "--", "true"], 64, "--status-fd 77"),
    (&["--store", "nonsense://x", "run", "x", "--", "true"], 64, "nonsense"),
    (&["--store", "sqlite:/proc/none/x.db", "run", "x", "--", "true"], 125, "/proc/none"),
    (&["run", "held", "-n", "--", "true"], 124, "held is held by"),
    (&["run", "held", "-w", "50ms", "--", "true"], 124, "gave up after 50ms"),
    (&["run", "held", "-n", "-E", "9", "--", "true"], 9, "token"),
    (&["run", "held", "-n", "--quiet-if-busy", "--", "true"], 0, ""),
    (&["run", "held", "-w", "50ms", "--quiet-if-busy", "--json", "--", "true"], 0, ""),
    (&["--help"], 0, ""),
    (&["--version"], 0, ""),
    (&["run", "--help"], 0, ""),
];

#[test]
fn every_exit_code_means_what_the_table_says() {
    let place = Place::new();
    fs::write(place.path("bad-interpreter"), "#!/no/such/shell\n").unwrap();
    fs::set_permissions(place.path("bad-interpreter"), fs::Permissions::from_mode(0o755)).unwrap();
    let mut holder = place.leasehold(["run", "held", "--", "sh", "-c", "echo ready; cat"]);
    holder.stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut holder = Running::start(holder);
    for (arguments, code, says) in CODES {
        let output = place.run(*arguments);
        let stderr = text(&output.stderr);
        assert_eq!(output.status.code(), Some(*code), "{arguments:?}: {stderr}");
        assert!(stderr.contains(says), "{arguments:?}: {stderr}");
        assert!(!says.is_empty() || stderr.is_empty(), "{arguments:?}: {stderr}");
        assert!(place.is_free(), "{arguments:?} left the lock held");
    }
    drop(holder.child.stdin.take());
    assert_eq!(holder.end().0, Some(0));
}

/// What is handed over to a waiter lasts 30 s at first.
#[test]
fn a_run_that_waited_has_the_lease_that_its_kill_after_needs() {
    let place = Place::new();
    let mut holder = place.leasehold(["run", "held", "--", "sh", "-c", "echo ready; cat"]);
    holder.stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut holder = Running::start(holder);
    std::thread::scope(|scope| {
        let waiter = scope.spawn(|| place.run(["run", "--ttl", "5m", "-k", "1m", "held", "--", "true"]));
        while !text(&place.run(["show", "--json", "held"]).stdout).contains("\"waiters\":1") {}
        drop(holder.child.stdin.take());
        let output = waiter.join().unwrap();
        assert_eq!(output.status.code(), Some(0), "{output:?}");
    });
    assert_eq!(holder.end().0, Some(0));
}

#[test]
fn runners_are_never_inside_together() {
    let place = Place::new();
    fs::write(place.path("counter"), "0").unwrap();
    let script =
        "mkdir inside || exit 1; n=$(cat counter); sleep 0.01; echo $((n + 1)) > counter; rmdir inside";
    std::thread::scope(|scope| {
        for _ in 0..6 {
            scope.spawn(|| {
                for _ in 0..4 {
                    let output = place.run(["run", "x", "-c", script]);
                    assert_eq!(output.status.code(), Some(0), "{output:?}");
                }
            });
        }
    });
    assert_eq!(fs::read_to_string(place.path("counter")).unwrap().trim(), "24");
}

#[test]
fn the_command_finds_its_lock_in_the_environment_and_tokens_grow() {
    let place = Place::new();
    let script = "echo $LEASEHOLD_NAME $LEASEHOLD_TOKEN $LEASEHOLD_OWNER $LEASEHOLD_TTL_MS $LEASEHOLD_LOST_FD \
                  $LEASEHOLD_STORE; test -p /dev/fd/$LEASEHOLD_LOST_FD";
    let mut last = 0;
    for _ in 0..3 {
        let output = place.run(["run", "--ttl", "7s", "x", "-c", script]);
        assert_eq!(output.status.code(), Some(0), "{output:?}");
        let words: Vec<&str> = text(&output.stdout).split_whitespace().collect();
        let [name, token, owner, ttl, lost, store] = words[..] else { panic!("{words:?}") };
        assert_eq!((name, ttl, store), ("x", "7000", place.url().as_str()));
        assert!(leasehold::ClaimId::parse(owner).is_some(), "{owner}");
        assert!(lost.parse::<u32>().unwrap() > 2);
        let token: u64 = token.parse().unwrap();
        assert!(token > last, "{token} after {last}");
        last = token;
    }
    for bad in [std::ffi::OsStr::new(""), std::os::unix::ffi::OsStrExt::from_bytes(b"sqlite:\xff")] {
        let mut command = place.leasehold(["run", "x", "--", "touch", "ran"]);
        let output = command.env("LEASEHOLD_STORE", bad).output().unwrap();
        assert_eq!(output.status.code(), Some(64), "{output:?}");
        assert!(text(&output.stderr).contains("LEASEHOLD_STORE is"), "{output:?}");
    }
    assert!(!place.path("ran").exists());
    let mut without =
        place.leasehold(["--store", &place.url(), "run", "x", "-c", "echo ${LEASEHOLD_STORE-unset}"]);
    assert_eq!(text(&without.env_remove("LEASEHOLD_STORE").output().unwrap().stdout), "unset\n");
}

#[test]
fn several_locks_are_taken_together_and_told_a_line_each() {
    let place = Place::new();
    let script = "echo \"$LEASEHOLD_NAMES\"; echo \"$LEASEHOLD_TOKENS\"; echo \"$LEASEHOLD_OWNERS\"; \
                  echo ${LEASEHOLD_NAME-none} ${LEASEHOLD_TOKEN-none} ${LEASEHOLD_OWNER-none}";
    let command = place.leasehold(["run", "z", "x", "z", "-c", script]);
    // Within another run, whose variables are not those of this one.
    let output = place.run(
        ["run", "outer", "--"]
            .map(OsStr::new)
            .into_iter()
            .chain([command.get_program()])
            .chain(command.get_args()),
    );
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let lines: Vec<&str> = text(&output.stdout).lines().collect();
    let [z, x, token_of_z, token_of_x, owner_of_z, owner_of_x, single] = lines[..] else {
        panic!("{lines:?}")
    };
    assert_eq!((z, x, single), ("z", "x", "none none none"));
    assert_ne!(token_of_z.parse::<u64>().unwrap(), token_of_x.parse::<u64>().unwrap());
    assert!(
        [owner_of_z, owner_of_x].iter().all(|owner| leasehold::ClaimId::parse(owner).is_some()),
        "{lines:?}"
    );
    let shown: serde_json::Value =
        serde_json::from_slice(&place.run(["show", "--json", "z"]).stdout).unwrap();
    assert_eq!((shown["held"].as_bool(), place.is_free()), (Some(false), true));
}

#[test]
fn one_lost_lock_of_several_stops_the_command() {
    let place = Place::new();
    let mut command = place.leasehold(["run", "--ttl", "3s", "--status-fd", "2", "a", "x", "z", "-c"]);
    command.arg("echo ready; exec sleep 1000").stdout(Stdio::piped()).stderr(Stdio::piped());
    let running = Running::start(command);
    place.steal();
    let (code, _, stderr) = running.end();
    assert_eq!(code, Some(123), "{stderr}");
    assert!(stderr.contains("the lock x is lost"), "{stderr}");
    let told =
        |event: &str| stderr.lines().filter(|line| line.contains(&format!("\"event\":\"{event}\""))).count();
    assert_eq!((told("acquired"), told("lost"), told("released")), (3, 1, 3), "{stderr}");
    assert!(stderr.contains("\"name\":\"x\",\"names\":[\"a\",\"x\",\"z\"]"), "{stderr}");
    for name in ["a", "z"] {
        let shown: serde_json::Value =
            serde_json::from_slice(&place.run(["show", "--json", name]).stdout).unwrap();
        assert_eq!(shown["held"], false, "{name}");
    }
}

#[test]
fn standard_input_and_output_are_the_commands_own() {
    let place = Place::new();
    let mut command = place.leasehold(["run", "x", "--", "sh", "-c", "exec cat; exit 9"]);
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(b"through").unwrap();
    assert_eq!(child.wait_with_output().unwrap().stdout, b"through");

    // A command that closes its output ends it for the reader, although it and its keepers go on.
    let mut command = place.leasehold(["run", "x", "-c", "echo said; exec >&-; cat > /dev/null"]);
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut said = String::new();
    child.stdout.take().unwrap().read_to_string(&mut said).unwrap();
    assert_eq!(said, "said\n");
    assert!(child.try_wait().unwrap().is_none());
    drop(child.stdin.take());
    assert_eq!(child.wait().unwrap().code(), Some(0));
}

#[test]
fn signals_reach_the_command() {
    let place = Place::new();
    for (name, signal) in [
        ("HUP", Signal::HUP),
        ("INT", Signal::INT),
        ("QUIT", Signal::QUIT),
        ("TERM", Signal::TERM),
        ("USR1", Signal::USR1),
        ("USR2", Signal::USR2),
    ] {
        let script =
            format!("trap 'echo got {name}; exit 5' {name}; echo ready; while :; do sleep 0.02; done");
        let running = place.start(&[], &script);
        running.signal(signal);
        let (code, out, _) = running.end();
        assert_eq!((code, out.trim()), (Some(5), format!("got {name}").as_str()));
    }
    let running = place.start(&[], "echo ready; exec sleep 100");
    running.signal(Signal::TERM);
    assert_eq!(running.end().0, Some(143));
}

#[test]
fn an_ignored_signal_stays_ignored_for_the_command_too() {
    let place = Place::new();
    let script = "trap '' HUP; exec \"$0\" run x -c 'kill -HUP $$; echo alive'";
    let mut command = std::process::Command::new("setsid");
    command.args(["sh", "-c", script, common::LEASEHOLD]).env("LEASEHOLD_STORE", place.url());
    assert_eq!(text(&command.output().unwrap().stdout), "alive\n");
}

#[test]
fn a_stopped_command_keeps_its_lease() {
    let place = Place::new();
    assert!(std::process::Command::new("mkfifo").arg(place.path("go")).status().unwrap().success());
    let running = place.start(&["--ttl", "600ms"], "echo $$; read go < go");
    let command = pid_in(&running.first);
    running.signal(Signal::TSTP);
    eventually("the command is stopped", || state(command) == Some('T'));
    let stopped = Instant::now();
    eventually("three TTLs go by", || {
        assert_eq!(place.show()["held"], true);
        assert!(is_alive(command));
        stopped.elapsed() > Duration::from_millis(1800)
    });
    assert_eq!(state(command), Some('T'));
    running.signal(Signal::CONT);
    fs::write(place.path("go"), "go\n").unwrap();
    assert_eq!(running.end().0, Some(0));
}

#[test]
fn a_signal_ends_the_wait_for_the_lock() {
    let place = Place::new();
    let holder = place.start(&[], "echo ready; exec sleep 100");
    let mut waiter = place.leasehold(["run", "x", "--", "touch", "ran"]);
    let mut waiter = waiter.stderr(Stdio::piped()).spawn().unwrap();
    let mut said = [0; 32];
    waiter.stderr.as_mut().unwrap().read_exact(&mut said).unwrap();
    assert!(text(&said).starts_with("leasehold: waiting for x, held b"), "{}", text(&said));
    common::send(i32::try_from(waiter.id()).unwrap(), Signal::INT);
    assert_eq!(waiter.wait().unwrap().code(), Some(130));
    holder.signal(Signal::TERM);
    holder.end();
    assert!(place.is_free() && !place.path("ran").exists());
}

#[test]
fn hold_at_least_keeps_others_out_after_a_fast_command() {
    let place = Place::new();
    let started = Instant::now();
    let running = place.start(&["--hold-at-least", "900ms"], "echo $$");
    let command = pid_in(&running.first);
    eventually("the command has ended", || !is_alive(command));
    assert_eq!(place.run(["run", "-n", "x", "--", "true"]).status.code(), Some(124));
    assert_eq!(running.end().0, Some(0));
    assert!(started.elapsed() >= Duration::from_millis(900));
    assert!(place.is_free());

    let running = place.start(&["--hold-at-least", "100s"], "echo $$");
    let command = pid_in(&running.first);
    eventually("the command has ended", || !is_alive(command));
    eventually("its keepers have ended", || common::children(running.pid()).is_empty());
    running.signal(Signal::TERM);
    assert_eq!(running.end().0, Some(143));
    assert!(place.is_free());
}

#[test]
fn events_that_nobody_reads_stop_nothing() {
    use std::os::fd::AsFd as _;
    let place = Place::new();
    let (_reader, writer) = std::io::pipe().unwrap();
    let flags = rustix::fs::fcntl_getfl(&writer).unwrap();
    rustix::fs::fcntl_setfl(&writer, flags | rustix::fs::OFlags::NONBLOCK).unwrap();
    while rustix::io::write(writer.as_fd(), &[b'x'; 512]).is_ok() {}
    rustix::fs::fcntl_setfl(&writer, flags).unwrap();
    let mut command = place.leasehold(["run", "--status-fd", "1", "x", "-c", "echo > ran; exit 4"]);
    let mut running = command.stdout(writer).spawn().unwrap();
    drop(command);
    eventually("it runs", || place.path("ran").exists());
    assert_eq!(running.wait().unwrap().code(), Some(4));
    assert!(place.is_free());
}

#[test]
fn events_tell_the_whole_story() {
    let place = Place::new();
    let shell = "\"$0\" run --status-fd 5 --label why --meta k=v x -c 'echo $LEASEHOLD_TOKEN' 5> events";
    let mut command = std::process::Command::new("setsid");
    command.args(["sh", "-c", shell, common::LEASEHOLD]).current_dir(place.folder.path());
    let output = command.env("LEASEHOLD_STORE", place.url()).output().unwrap();
    assert_eq!((output.status.code(), text(&output.stderr)), (Some(0), ""));
    let told = events(&place.path("events"));
    let names: Vec<_> = told.iter().map(|event| event["event"].as_str().unwrap()).collect();
    assert_eq!(names, ["acquired", "started", "exited", "released"]);
    assert_eq!(told[0]["token"].to_string(), text(&output.stdout).trim());
    assert_eq!((&told[2]["code"], &told[2]["lost"]), (&0.into(), &false.into()));
    assert_eq!(told[3]["answer"], "released");

    let holder = place.start(&["--label", "why", "--meta", "k=v"], "echo ready; exec sleep 100");
    let output = place.run(["run", "--json", "-w", "50ms", "x", "--", "true"]);
    let told: Vec<serde_json::Value> =
        text(&output.stderr).lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let names: Vec<_> = told.iter().map(|event| event["event"].as_str().unwrap()).collect();
    assert_eq!(names, ["waiting", "busy"]);
    for event in told {
        assert_eq!((&event["holder"]["label"], &event["holder"]["meta"]["k"]), (&"why".into(), &"v".into()));
        assert!(event["holder"]["token"].is_u64());
    }
    holder.signal(Signal::TERM);
    holder.end();
}

#[test]
fn secrets_stay_where_the_user_put_them() {
    let place = Place::new();
    let output = place.run(["--store", "redis://me:s3cr3t@127.0.0.1:1/", "run", "x", "--", "true"]);
    assert_eq!(output.status.code(), Some(125));
    assert!(!text(&output.stderr).contains("s3cr3t"), "{}", text(&output.stderr));

    let url = format!("sqlite:{}", place.path("s3cr3t.db").display());
    let mut command = place.leasehold(["--store", &url, "run", "x", "-c", "echo ready; exec sleep 100"]);
    command.env_remove("LEASEHOLD_STORE").stdout(Stdio::piped());
    let running = Running::start(command);
    let guardian = running.guardian();
    for pid in common::children(guardian).into_iter().chain([guardian]) {
        for list in ["cmdline", "environ"] {
            let seen = fs::read(format!("/proc/{pid}/{list}")).unwrap();
            assert!(!String::from_utf8_lossy(&seen).contains("s3cr3t"), "{list} of {pid}");
        }
    }
    running.signal(Signal::TERM);
    running.end();
}
