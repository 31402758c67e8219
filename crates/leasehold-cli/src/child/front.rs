//! The process that the shell sees when there is a terminal, and the hand-over to the runner behind it.
//!
//! A shell takes a job for stopped when the process that it started has stopped. The runner must not stop, or nobody
//! would renew the lock. So on a terminal the runner is a child of the front, in a process group of its own, out of reach
//! of the terminal; the command joins the group of the front, and ^C, ^Z, `fg` and `bg` reach it as from the shell.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Read as _, Seek as _, Write as _};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

use leasehold::clock;
use nix::sys::signal::{SIGCHLD, SIGTSTP, SIGTTOU, SigSet};
use nix::sys::signalfd::{SfdFlags, SignalFd, siginfo};
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::process::{Signal, getpgid, getpid, kill_process};

use super::family::{Family, NoneLeft};
use super::guardian::ended;
use super::signals::PASSED_ON;
use super::wire::{self, Ended, Message};
use crate::exit;
use crate::plan::RunPlan;

/// A standard input that was taken up.
pub(crate) type Input = OwnedFd;

/// Bytes as the system takes them for an argument or a variable.
pub(crate) fn os_string(bytes: &[u8]) -> OsString {
    OsStr::from_bytes(bytes).into()
}

/// Where a runner finds itself.
#[derive(Debug)]
pub(crate) struct Surroundings {
    /// The standard input meant for the command.
    pub(crate) stdin: Input,
    /// The process group that the command is to join; `None`: one of its own.
    pub(crate) group: Option<i32>,
    /// The connection to the front.
    pub(crate) front: Option<OwnedFd>,
}

impl Surroundings {
    /// Of a runner that the user started, without a terminal.
    pub(crate) fn bare() -> io::Result<Self> {
        Ok(Self { stdin: io::stdin().as_fd().try_clone_to_owned()?, group: None, front: None })
    }
}

/// Whether a shell may control this process by a terminal.
pub(crate) fn has_terminal() -> bool {
    File::open("/dev/tty").is_ok()
}

/// Starts the runner with the arguments that the user typed, and stands in for it until it ends; returns its exit code.
pub(crate) fn as_front(typed: &[OsString], plan: &RunPlan) -> io::Result<u8> {
    let (here, there) = wire::pair()?;
    let stdin = io::stdin().as_fd().try_clone_to_owned()?;
    // Over a file in memory, so that an address with a password does not stand in a second process's arguments.
    let mut arguments = File::from(memfd_create("leasehold arguments", MemfdFlags::CLOEXEC)?);
    for argument in typed {
        arguments.write_all(argument.as_bytes())?;
        arguments.write_all(b"\0")?;
    }
    arguments.rewind()?;
    wire::hand_over(&here, &[&stdin, &arguments.into()])?;
    drop(stdin);

    let family = Family::found();
    let group = getpgid(None)?.as_raw_nonzero();
    let mut command = Command::new(super::SELF);
    command.arg0(super::RUNNER).arg(group.to_string()).stdin(Stdio::from(there)).process_group(0);
    let runner = i32::try_from(command.spawn()?.id()).map_err(io::Error::other)?;
    drop(command);
    let mut mask: SigSet = PASSED_ON.into_iter().collect();
    mask.add(SIGCHLD);
    mask.thread_block()?;
    let arrivals = SignalFd::with_flags(&mask, SfdFlags::SFD_CLOEXEC)?;
    let nowhere = File::options().read(true).write(true).open("/dev/null")?;
    rustix::stdio::dup2_stdin(&nowhere)?;
    rustix::stdio::dup2_stdout(&nowhere)?;

    loop {
        if let Some(ended) = reaped(&family, runner) {
            return Ok(after(&family, ended, plan));
        }
        if let Some(arrival) = arrivals.read_signal()? {
            pass_on(&here, &arrival)?;
        }
    }
}

fn pass_on(runner: &OwnedFd, arrival: &siginfo) -> io::Result<()> {
    /// The code of a signal that the kernel made: here, the terminal.
    const SI_KERNEL: i32 = 0x80;
    let number = i32::try_from(arrival.ssi_signo).unwrap_or(0);
    if number == SIGCHLD as i32 {
        return Ok(());
    }
    wire::tell(runner, Message::Signal(number, arrival.ssi_code == SI_KERNEL));
    if number == SIGTSTP as i32 {
        // By its own default action, which the kernel leaves out where no shell would ever continue us.
        let stop: SigSet = [SIGTSTP].into_iter().collect();
        kill_process(getpid(), Signal::TSTP)?;
        stop.thread_unblock()?;
        stop.thread_block()?;
    }
    Ok(())
}

fn reaped(family: &Family, runner: i32) -> Option<Ended> {
    while let Ok(Some((pid, status))) = family.reap() {
        if pid == runner {
            return Some(ended(status));
        }
    }
    None
}

/// The runner has ended: by itself, or killed, and then the guardian is stopping the command. It is our child now.
fn after(family: &Family, runner: Ended, plan: &RunPlan) -> u8 {
    let number = match runner {
        Ended::Code(code) => return code,
        Ended::Signal(number) => number,
    };
    eprintln!(
        "leasehold: the process that held the lock {} was ended by signal {number}; stopping the command",
        crate::plan::title(&plan.names)
    );
    let patience = clock::now().plus(plan.leash.kill_after).plus(plan.leash.margin).plus(plan.leash.linger);
    while plan.leash.on_lost == crate::plan::OnLost::Ignore || clock::now() < patience {
        match family.reap() {
            Err(NoneLeft) => return exit::LOST,
            Ok(Some(_)) => {}
            Ok(None) => pollster::block_on(clock::sleep(crate::plan::Leash::KILL_AGAIN)),
        }
    }
    family.destroy(None);
    exit::LOST
}

/// Takes up the work of a runner behind a front: what the user typed, and the surroundings.
pub(crate) fn behind(arguments: &[OsString]) -> io::Result<(Vec<OsString>, Surroundings)> {
    let by_hand = || io::Error::other("started by hand?");
    let group = arguments.first().and_then(|group| group.to_str()?.parse().ok()).ok_or_else(by_hand)?;
    // Messages of ours may be written from the background, whatever the terminal is set to.
    [SIGTTOU].into_iter().collect::<SigSet>().thread_block()?;
    let front = io::stdin().as_fd().try_clone_to_owned()?;
    let [stdin, typed] = <[OwnedFd; 2]>::try_from(wire::take_over(&front)?).map_err(|_| by_hand())?;
    let mut text = Vec::new();
    File::from(typed).read_to_end(&mut text)?;
    let mut typed: Vec<OsString> =
        text.split(|&byte| byte == 0).map(|part| OsStr::from_bytes(part).into()).collect();
    typed.pop();
    Ok((typed, Surroundings { stdin, group: Some(group), front: Some(front) }))
}
