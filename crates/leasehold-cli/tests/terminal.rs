//! On a terminal the command is read, interrupted and stopped as if the shell had started it.
#![allow(
    clippy::unwrap_used,
    clippy::disallowed_methods,
    reason = "tests fail by panicking and measure real time"
)]

mod common;

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::fd::OwnedFd;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use common::{LEASEHOLD, Place, children, eventually, is_alive, pid_in, state};
use rustix::fs::{Mode, OFlags};
use rustix::process::Signal;
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};

/// A shell with job control on a terminal of its own.
struct Terminal {
    keyboard: File,
    screen: Receiver<Vec<u8>>,
    seen: String,
    shell: Child,
}

impl Terminal {
    fn new(place: &Place) -> Self {
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).unwrap();
        grantpt(&master).unwrap();
        unlockpt(&master).unwrap();
        let name = ptsname(&master, Vec::new()).unwrap();
        let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
        let slave = || Stdio::from(rustix::fs::open(&name, flags, Mode::empty()).unwrap());
        let mut shell = Command::new("setsid");
        // Without line editing, so that the shell's own echo does not get between.
        shell.args(["--ctty", "bash", "--norc", "--noprofile", "--noediting", "-i"]);
        shell.env("LEASEHOLD_STORE", place.url()).env("L", LEASEHOLD).env("PS1", "$ ").env("TERM", "dumb");
        shell.stdin(slave()).stdout(slave()).stderr(slave()).current_dir(place.folder.path());
        let shell = shell.spawn().unwrap();
        let keyboard = File::from(master.try_clone().unwrap());
        let (sender, screen) = channel();
        std::thread::spawn(move || read_all(master, &sender));
        let mut terminal = Self { keyboard, screen, seen: String::new(), shell };
        terminal.types("stty -echo; echo on''line\n");
        terminal.shows("online");
        terminal
    }

    fn types(&mut self, keys: &str) {
        self.keyboard.write_all(keys.as_bytes()).unwrap();
    }

    /// Waits until this is on the screen, and forgets everything up to it; returns that.
    fn shows(&mut self, what: &str) -> String {
        let deadline = Instant::now() + leasehold_chaos::PATIENCE;
        loop {
            if let Some(at) = self.seen.find(what) {
                let rest = self.seen.split_off(at + what.len());
                return std::mem::replace(&mut self.seen, rest);
            }
            match self.screen.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(bytes) => self.seen.push_str(&String::from_utf8_lossy(&bytes)),
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {
                    panic!("the terminal does not show {what:?} but {:?}", self.seen)
                }
            }
        }
    }

    /// Types a command that prints a line `pid N`, and waits for it.
    fn pid_after(&mut self, command: &str) -> i32 {
        self.types(command);
        self.shows("pid ");
        pid_in(&self.shows("\r\n"))
    }
}

fn read_all(master: OwnedFd, screen: &std::sync::mpsc::Sender<Vec<u8>>) {
    let mut master = File::from(master);
    let mut bytes = [0; 4096];
    while let Ok(length @ 1..) = master.read(&mut bytes) {
        if screen.send(bytes[..length].to_vec()).is_err() {
            return;
        }
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        // The end of file ends the shell, and the shell its jobs.
        let _ = self.keyboard.write_all(b"\x03\x04");
        let _ = self.shell.kill();
        let _ = self.shell.wait();
    }
}

/// The runner behind the front: the grandparent of the command.
fn runner_of(command: i32) -> i32 {
    let parent = |pid: i32| -> i32 {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("PPid:")).unwrap();
        pid_in(line)
    };
    parent(parent(command))
}

#[test]
fn the_command_reads_the_terminal_alone_and_in_a_pipeline() {
    let place = Place::new();
    let mut terminal = Terminal::new(&place);
    terminal.types("$L run x -- sh -c 'echo ask; read answer; echo got $answer'; echo code $?\n");
    terminal.shows("ask");
    terminal.types("yes\n");
    terminal.shows("got yes");
    terminal.shows("code 0");
    terminal.types("$L run x -- sh -c 'echo ask; read answer < /dev/tty; echo got $answer' | tr a-z A-Z\n");
    terminal.shows("ASK");
    terminal.types("yes\n");
    terminal.shows("GOT YES");
    // A pager reads the terminal at the other end of the pipeline.
    terminal.types("$L run x -- echo text | sh -c 'cat; echo more; read key < /dev/tty; echo end $key'\n");
    terminal.shows("more");
    terminal.types("q\n");
    terminal.shows("end q");
    assert!(place.is_free());
}

#[test]
fn interrupt_goes_to_the_command_once() {
    let place = Place::new();
    let mut terminal = Terminal::new(&place);
    // Each `wait` ends at a signal: two signals would be two hits.
    let script = "trap \"echo hit\" INT; echo pid $$; sleep 0.7 & wait $!; wait $!; wait $!; exit 1";
    terminal.pid_after(&format!("$L run x -- bash -c '{script}'; echo code $?\n"));
    terminal.types("\x03");
    let until_the_end = terminal.shows("code 1");
    assert_eq!(until_the_end.matches("hit").count(), 1, "{until_the_end}");
    terminal.pid_after("$L run x -- sh -c 'echo pid $$; exec sleep 100'\n");
    terminal.types("\x03");
    terminal.types("echo code $?\n");
    terminal.shows("code 130");
    assert!(place.is_free());
}

#[test]
fn interrupt_ends_the_wait_for_a_lock() {
    let place = Place::new();
    let holder = place.start(&[], "echo ready; exec sleep 100");
    let mut terminal = Terminal::new(&place);
    terminal.types("$L run x -- touch ran\n");
    terminal.shows("waiting for x, held by");
    terminal.types("\x03");
    terminal.types("echo code $?\n");
    terminal.shows("code 130");
    holder.signal(Signal::TERM);
    holder.end();
    assert!(place.is_free() && !place.path("ran").exists());
}

#[test]
fn a_stopped_job_keeps_its_lease_and_goes_on() {
    let place = Place::new();
    let mut terminal = Terminal::new(&place);
    let command = terminal
        .pid_after("$L run --ttl 600ms x -- sh -c 'echo pid $$; read line; echo got $line; exit 4'\n");
    terminal.types("\x1a");
    terminal.shows("Stopped");
    eventually("the command is stopped", || state(command) == Some('T'));
    let stopped = Instant::now();
    eventually("three TTLs go by", || {
        assert_eq!(place.show()["held"], true);
        stopped.elapsed() > Duration::from_millis(1800)
    });
    assert_eq!(state(command), Some('T'));
    terminal.types("fg\n");
    eventually("the command goes on", || state(command) == Some('S'));
    terminal.types("on\n");
    terminal.shows("got on");
    terminal.types("echo code $?\n");
    terminal.shows("code 4");
    assert!(place.is_free());
}

#[test]
fn a_background_job_stops_when_it_reads_and_reads_in_front() {
    let place = Place::new();
    let mut terminal = Terminal::new(&place);
    let command = terminal.pid_after("$L run x -- sh -c 'echo pid $$; read line; echo got $line' &\n");
    eventually("the command is stopped", || state(command) == Some('T'));
    terminal.types("fg\n");
    eventually("the command goes on", || state(command) == Some('S'));
    terminal.types("in front\n");
    terminal.shows("got in front");
}

#[test]
fn a_signal_to_the_front_reaches_the_command() {
    let place = Place::new();
    let mut terminal = Terminal::new(&place);
    let script = "trap \"echo got; exit 5\" USR1; echo pid $$; while :; do sleep 0.02; done";
    terminal.pid_after(&format!("$L run x -- bash -c '{script}' &\n"));
    terminal.types("kill -USR1 $!; wait $!; echo code $?\n");
    terminal.shows("got");
    terminal.shows("code 5");
}

#[test]
fn killing_the_front_or_the_runner_ends_the_command() {
    let place = Place::new();
    let mut terminal = Terminal::new(&place);
    let line = "$L run -k 300ms x -- sh -c 'trap \"\" TERM; echo pid $$; while :; do sleep 0.1; done' &\n";
    let command = terminal.pid_after(line);
    terminal.types("kill -KILL $!; wait $!; echo code $?\n");
    terminal.shows("code 137");
    eventually("the command is dead", || !is_alive(command));
    eventually("the lock is released, not left to end", || place.is_free());

    let command = terminal.pid_after(line);
    let runner = runner_of(command);
    assert_eq!(children(runner).len(), 1);
    common::send(runner, Signal::KILL);
    terminal.shows("was ended by signal 9");
    eventually("the command is dead", || !is_alive(command));
    terminal.types("wait $!; echo code $?\n");
    terminal.shows("code 123");
    assert!(place.is_free());
}

#[test]
fn the_address_of_the_store_stands_in_the_arguments_that_the_user_typed_only() {
    let place = Place::new();
    let mut terminal = Terminal::new(&place);
    let command = terminal
        .pid_after("$L --store sqlite:$PWD/s3cr3t.db run x -- sh -c 'echo pid $$; exec sleep 100' &\n");
    let runner = runner_of(command);
    for pid in [runner, children(runner)[0], command] {
        let seen = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap();
        assert!(!String::from_utf8_lossy(&seen).contains("s3cr3t"), "{pid}");
    }
    terminal.types("kill $!; wait $!; echo code $?\n");
    terminal.shows("code 143");
}

#[test]
fn colours_are_for_terminals_that_want_them() {
    let place = Place::new();
    let mut terminal = Terminal::new(&place);
    terminal.types("TERM=xterm $L doctor; echo over''over\n");
    assert!(terminal.shows("overover").contains('\x1b'));
    terminal.types("TERM=xterm NO_COLOR=1 $L doctor; echo over''over\n");
    assert!(!terminal.shows("overover").contains('\x1b'));
    terminal.types("TERM=xterm $L doctor | cat; echo over''over\n");
    assert!(!terminal.shows("overover").contains('\x1b'));
}
