//! What a guardian does if the world stood still, or a key was pressed, before its command was there: it is started by
//! hand here, because no test can stop a process in the right microsecond.
#![allow(
    clippy::unwrap_used,
    clippy::disallowed_methods,
    reason = "tests fail by panicking and measure real time"
)]

mod common;

use std::fs::File;
use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt as _;
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};

use common::{LEASEHOLD, Place};
use rustix::net::{
    AddressFamily, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags, SocketType,
    recv, send, sendmsg, socketpair,
};
use rustix::process::Signal;

const DEADLINE: u64 = 1;
const SIGNAL: u64 = 3;
const STARTED: u64 = 4;
const FAILED: u64 = 5;
const DONE: u64 = 6;

/// A guardian that waits for the standard input of its command.
struct ByHand {
    guardian: Child,
    control: OwnedFd,
}

impl ByHand {
    fn new(place: &Place, on_lost: &str, deadline: u64, command: &[&str]) -> Self {
        let (control, there) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
        let mut guardian = Command::new(LEASEHOLD);
        guardian.arg0("leasehold-guardian").arg(on_lost).args(["200000000", "20000000", "200000000"]);
        guardian.arg(deadline.to_string()).arg("0").args(command).current_dir(place.folder.path());
        let guardian = guardian.stdin(Stdio::from(there)).spawn().unwrap();
        Self { guardian, control }
    }

    fn stop(&self) -> i32 {
        let pid = i32::try_from(self.guardian.id()).unwrap();
        common::send(pid, Signal::STOP);
        common::eventually("it is stopped", || common::state(pid) == Some('T'));
        pid
    }

    fn say(&self, words: [u64; 5]) {
        send(&self.control, &words.map(u64::to_le_bytes).concat(), SendFlags::NOSIGNAL).unwrap();
    }

    /// Comes before everything else that is said.
    fn hand_over_stdin(&self) {
        let nothing = File::open("/dev/null").unwrap();
        let files = [nothing.as_fd()];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        assert!(control.push(SendAncillaryMessage::ScmRights(&files)));
        sendmsg(&self.control, &[IoSlice::new(b"f")], &mut control, SendFlags::NOSIGNAL).unwrap();
    }

    fn hear(&self) -> [u64; 5] {
        let mut bytes = [0_u8; 40];
        assert_eq!(recv(&self.control, &mut bytes, RecvFlags::empty()).unwrap().0, 40, "it is dead");
        let mut words = bytes.chunks_exact(8).map(|word| u64::from_le_bytes(word.try_into().unwrap()));
        std::array::from_fn(|_| words.next().unwrap())
    }
}

impl Drop for ByHand {
    fn drop(&mut self) {
        let _ = self.guardian.kill();
        let _ = self.guardian.wait();
    }
}

/// A queue of messages must be there before the guardian looks: it is stopped while they are written.
/// The tests of this file run one by one: a process that is being started elsewhere has a copy of every descriptor for a
/// moment, and so of a pipe's end that is meant to be closed.
fn alone() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

fn said_at_once(guardian: &ByHand, messages: &[[u64; 5]]) {
    let pid = guardian.stop();
    guardian.hand_over_stdin();
    for message in messages {
        guardian.say(*message);
    }
    common::send(pid, Signal::CONT);
}

#[test]
fn a_command_is_not_started_once_the_lock_cannot_be_trusted() {
    let _alone = alone();
    for on_lost in ["15", "kill", "ignore"] {
        let place = Place::new();
        let mut late = ByHand::new(&place, on_lost, 1, &["touch", "ran"]);
        late.hand_over_stdin();
        assert_eq!(late.hear()[0], FAILED, "{on_lost}");
        assert!(late.guardian.wait().unwrap().success());
        assert!(!place.path("ran").exists(), "{on_lost}");
    }
}

#[test]
fn a_command_is_not_started_for_a_runner_that_is_gone() {
    let _alone = alone();
    let place = Place::new();
    // Nobody would stop it.
    let mut orphan = ByHand::new(&place, "ignore", u64::MAX, &["touch", "ran"]);
    let pid = orphan.stop();
    orphan.hand_over_stdin();
    orphan.control = File::open("/dev/null").unwrap().into();
    common::send(pid, Signal::CONT);
    orphan.guardian.wait().unwrap();
    assert!(!place.path("ran").exists());
}

#[test]
fn a_renewal_that_came_meanwhile_counts() {
    let _alone = alone();
    let place = Place::new();
    let mut renewed = ByHand::new(&place, "15", 1, &["touch", "ran"]);
    said_at_once(&renewed, &[[DEADLINE, u64::MAX, 0, 0, 0]]);
    assert_eq!(renewed.hear()[0], STARTED);
    assert_eq!(renewed.hear()[..3], [DONE, 0, 0]);
    assert!(renewed.guardian.wait().unwrap().success());
    assert!(place.path("ran").exists());
}

#[test]
fn an_interrupt_from_the_terminal_before_the_start_reaches_the_command() {
    let _alone = alone();
    let place = Place::new();
    let interrupted = ByHand::new(&place, "15", u64::MAX, &["sleep", "100"]);
    said_at_once(&interrupted, &[[SIGNAL, 2, 1, 0, 0]]);
    assert_eq!(interrupted.hear()[0], STARTED);
    assert_eq!(interrupted.hear()[..2], [DONE, 256 + 2]);
}

#[test]
fn the_process_that_becomes_the_command_looks_at_the_time_itself() {
    let _alone = alone();
    let place = Place::new();
    let mut late = Command::new(LEASEHOLD);
    late.arg0("leasehold-start").arg(std::process::id().to_string());
    late.args(["stay", "1", "touch", "ran"]).current_dir(place.folder.path());
    assert_eq!(late.output().unwrap().status.code(), Some(125));
    assert!(!place.path("ran").exists());
}
