//! The command's parent: a process of one thread that knows nothing but a deadline and outlives its runner.
//!
//! It is started by the runner, starts the command, and ends when the whole family of the command is reaped. It never
//! touches the store: no address, no password, no connection. It never writes to a terminal or a pipe of the user
//! either, because a reader that does not read would stop it.

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::time::Duration;

use leasehold::clock;
use nix::sys::signal::{SigSet, SigmaskHow};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::{FdFlags, fcntl_setfd};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Pid, Signal, WaitStatus, kill_process_group};
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime,
};

use super::family::{Family, NoneLeft};
use super::start;
use super::watch::{Act, Watch};
use super::wire::{self, Ended, Heard, Message, Report};
use crate::plan::{Leash, OnLost};

/// The variable that names the descriptor which becomes readable when the lock is lost.
const LOST_FD: &str = "LEASEHOLD_LOST_FD";

/// What the guardian is told on its command line. Nothing of it is secret.
#[derive(Debug, PartialEq)]
pub(crate) struct Orders {
    pub(crate) leash: Leash,
    /// Until when the lock can be trusted as yet.
    pub(crate) deadline: clock::Instant,
    /// The process group that the command joins; `None`: one of its own.
    pub(crate) group: Option<i32>,
    /// The program and its arguments.
    pub(crate) command: Vec<OsString>,
}

const NUMBERS: usize = 6;

impl Orders {
    /// As arguments of the guardian.
    pub(crate) fn arguments(&self) -> Vec<OsString> {
        let on_lost = match self.leash.on_lost {
            OnLost::Ignore => "ignore".into(),
            OnLost::Kill => "kill".into(),
            OnLost::Signal(number) => number.to_string(),
        };
        let numbers: [String; NUMBERS] = [
            on_lost,
            self.leash.kill_after.as_nanos().to_string(),
            self.leash.margin.as_nanos().to_string(),
            self.leash.linger.as_nanos().to_string(),
            wire::nanos(self.deadline).to_string(),
            self.group.unwrap_or(0).to_string(),
        ];
        numbers.into_iter().map(OsString::from).chain(self.command.iter().cloned()).collect()
    }

    fn parse(arguments: &[OsString]) -> Option<Self> {
        let (numbers, command) = arguments.split_at_checked(NUMBERS)?;
        let on_lost = match numbers[0].to_str()? {
            "ignore" => OnLost::Ignore,
            "kill" => OnLost::Kill,
            number => OnLost::Signal(number.parse().ok()?),
        };
        let number = |at: usize| numbers[at].to_str()?.parse::<u64>().ok();
        let span = |at: usize| number(at).map(Duration::from_nanos);
        let leash = Leash { on_lost, kill_after: span(1)?, margin: span(2)?, linger: span(3)? };
        let group = i32::try_from(number(5)?).ok().filter(|&group| group != 0);
        let orders = Self { leash, deadline: wire::instant(number(4)?), group, command: command.to_vec() };
        (!orders.command.is_empty()).then_some(orders)
    }
}

/// The whole life of a guardian.
pub(crate) fn main(arguments: &[OsString]) -> io::Result<()> {
    let orders = Orders::parse(arguments).ok_or_else(|| io::Error::other("started by hand?"))?;
    let control = io::stdin().as_fd().try_clone_to_owned()?;
    let stdin = wire::take_over(&control)?.pop().ok_or_else(|| io::Error::other("no standard input came"))?;
    let mut guardian = match Guardian::start(&orders, control.try_clone()?, stdin) {
        Ok(guardian) => guardian,
        Err(error) => {
            wire::tell(&control, Message::Failed(error.raw_os_error().unwrap_or(0)));
            return Ok(());
        }
    };
    drop(control);
    // The command's readers and writers see the end of file when the command ends it, not when the guardian does.
    let nowhere = std::fs::File::options().read(true).write(true).open("/dev/null")?;
    rustix::stdio::dup2_stdin(&nowhere)?;
    rustix::stdio::dup2_stdout(&nowhere)?;
    guardian.serve()
}

struct Guardian {
    control: OwnedFd,
    runner_is_gone: bool,
    family: Family,
    watch: Watch,
    child_died: SignalFd,
    timer: OwnedFd,
    /// Dropped to say that the lock is lost.
    lost: Option<OwnedFd>,
    main: i32,
    /// The process group that the command shares with others; `None`: it has its own.
    shared_group: Option<i32>,
    ended: Option<Ended>,
    leftovers: u32,
}

impl Guardian {
    fn start(orders: &Orders, control: OwnedFd, stdin: OwnedFd) -> io::Result<Self> {
        let mut watch = Watch::new(orders.leash, orders.deadline);
        let signals = said_before_the_start(&control, &mut watch)?;
        // First, so that it gets a number of one digit, the only ones that every shell can read from.
        let (lost_reader, lost) = pipe_with(PipeFlags::CLOEXEC)?;
        fcntl_setfd(&lost_reader, FdFlags::empty())?;
        let family = Family::found();
        let mut users_mask = SigSet::all().thread_swap_mask(SigmaskHow::SIG_SETMASK)?;
        users_mask.remove(nix::sys::signal::SIGTTOU);
        let mut died = SigSet::empty();
        died.add(nix::sys::signal::SIGCHLD);
        let child_died = SignalFd::with_flags(&died, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?;
        let timer = timerfd_create(TimerfdClockId::Boottime, TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK)?;

        let mut command = Command::new(super::SELF);
        let arguments = start::arguments(orders.leash.on_lost, watch.latest_start(), &orders.command);
        command.arg0(super::START).args(arguments);
        command.stdin(Stdio::from(stdin)).process_group(orders.group.unwrap_or(0));
        command.env(LOST_FD, lost_reader.as_raw_fd().to_string());
        users_mask.thread_set_mask()?;
        let started = command.spawn();
        SigSet::all().thread_set_mask()?;
        let pid = started?.id();
        wire::tell(&control, Message::Started(pid));
        let guardian = Self {
            control,
            runner_is_gone: false,
            family,
            watch,
            child_died,
            timer,
            lost: Some(lost),
            main: i32::try_from(pid).map_err(io::Error::other)?,
            shared_group: orders.group,
            ended: None,
            leftovers: 0,
        };
        for number in signals {
            guardian.pass_on(number, false);
        }
        Ok(guardian)
    }

    fn serve(&mut self) -> io::Result<()> {
        loop {
            // Everything that was said comes before the look at the clock: after a pause the news may be good.
            self.listen();
            if self.reap() {
                self.report();
                return Ok(());
            }
            if let Some(act) = self.watch.due(clock::now()) {
                self.act(act);
            }
            self.wait()?;
        }
    }

    fn listen(&mut self) {
        while !self.runner_is_gone {
            match wire::hear(&self.control) {
                Heard::Message(Message::Deadline(at)) => self.watch.renewed(at),
                Heard::Message(Message::Stop) => self.stop(),
                Heard::Message(Message::Signal(number, from_terminal)) => self.pass_on(number, from_terminal),
                Heard::Message(_) => {}
                Heard::Nothing => return,
                Heard::Gone => {
                    self.runner_is_gone = true;
                    self.stop();
                }
            }
        }
    }

    fn stop(&mut self) {
        self.say_lost();
        if let Some(act) = self.watch.stop(clock::now()) {
            self.act(act);
        }
    }

    fn act(&mut self, act: Act) {
        if self.watch.cut_short() {
            self.say_lost();
        } else if self.leftovers == 0 {
            self.leftovers = u32::try_from(self.family.members().len()).unwrap_or(u32::MAX);
        }
        let signal = match act {
            Act::Signal(number) => Signal::from_named_raw(number).unwrap_or(Signal::TERM),
            Act::Kill => Signal::KILL,
        };
        self.family.end(signal);
    }

    fn say_lost(&mut self) {
        if let Some(pipe) = self.lost.take() {
            let _ = rustix::io::write(&pipe, b"lost\n");
        }
    }

    fn pass_on(&self, number: i32, from_terminal: bool) {
        let Some(signal) = Signal::from_named_raw(number) else { return };
        match (self.shared_group, Pid::from_raw(self.main)) {
            // The terminal has sent it to the whole group already.
            (Some(_), _) if from_terminal => {}
            (Some(group), _) => self.family.signal(signal, Some(group)),
            // Until the command is reaped its number cannot be that of another group.
            (None, Some(main)) if self.ended.is_none() => drop(kill_process_group(main, signal)),
            (None, _) => self.family.signal(signal, Some(self.main)),
        }
    }

    /// Reaps whoever is dead; true once nobody is left.
    fn reap(&mut self) -> bool {
        while let Ok(Some(_)) = self.child_died.read_signal() {}
        loop {
            match self.family.reap() {
                Ok(Some((pid, status))) if pid == self.main => {
                    self.ended = Some(ended(status));
                    self.watch.command_ended(clock::now());
                }
                Ok(Some(_)) => {}
                Ok(None) => return false,
                Err(NoneLeft) => return true,
            }
        }
    }

    fn report(&self) {
        let report = Report {
            ended: self.ended.unwrap_or(Ended::Signal(9)),
            cut_short: self.watch.cut_short(),
            leftovers: self.leftovers,
            reaped_at: clock::now(),
        };
        wire::tell(&self.control, Message::Done(report));
    }

    fn wait(&self) -> io::Result<()> {
        set(&self.timer, self.watch.next(clock::now()))?;
        let mut fds = vec![
            PollFd::from_borrowed_fd(self.child_died.as_fd(), PollFlags::IN),
            PollFd::new(&self.timer, PollFlags::IN),
        ];
        if !self.runner_is_gone {
            fds.push(PollFd::new(&self.control, PollFlags::IN));
        }
        match poll(&mut fds, None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

/// Hears what was said while there was no command yet; returns the signals for it, which the terminal cannot have sent to
/// it. An error if it must not be started at all: it would run without a lock, however shortly.
fn said_before_the_start(control: &OwnedFd, watch: &mut Watch) -> io::Result<Vec<i32>> {
    let too_late = || io::Error::from(rustix::io::Errno::TIME);
    let mut signals = Vec::new();
    loop {
        match wire::hear(control) {
            Heard::Message(Message::Deadline(at)) => watch.renewed(at),
            Heard::Message(Message::Signal(number, _)) => signals.push(number),
            Heard::Message(Message::Stop) | Heard::Gone => return Err(too_late()),
            Heard::Message(_) => {}
            Heard::Nothing if clock::now() >= watch.latest_start() => return Err(too_late()),
            Heard::Nothing => return Ok(signals),
        }
    }
}

/// How a process ended, from what the kernel says.
pub(crate) fn ended(status: WaitStatus) -> Ended {
    match (status.exit_status(), status.terminating_signal()) {
        (Some(code), _) => Ended::Code(u8::try_from(code).unwrap_or(u8::MAX)),
        (None, Some(number)) => Ended::Signal(u8::try_from(number).unwrap_or(9)),
        (None, None) => Ended::Signal(9),
    }
}

fn set(timer: &OwnedFd, at: clock::Instant) -> io::Result<()> {
    // Zero would disarm it; what is past the kernel's range never comes.
    let at = at.after_boot().clamp(Duration::from_nanos(1), Duration::from_secs(1 << 40));
    let value = Timespec {
        tv_sec: i64::try_from(at.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: i64::from(at.subsec_nanos()),
    };
    let spec = Itimerspec { it_interval: Timespec { tv_sec: 0, tv_nsec: 0 }, it_value: value };
    timerfd_settime(timer, TimerfdTimerFlags::ABSTIME, &spec)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn orders_are_read_as_they_were_written() {
        for (on_lost, group) in
            [(OnLost::Ignore, None), (OnLost::Kill, Some(77)), (OnLost::Signal(12), Some(1 << 22))]
        {
            let leash = Leash {
                on_lost,
                kill_after: Duration::from_millis(1500),
                margin: Duration::from_nanos(1),
                linger: Duration::ZERO,
            };
            let command = ["sh", "-c", "", "--", "\u{e9}"].map(OsString::from).to_vec();
            let orders = Orders { leash, deadline: wire::instant(123_456), group, command };
            assert_eq!(Orders::parse(&orders.arguments()), Some(orders));
        }
        assert_eq!(Orders::parse(&[]), None);
        assert_eq!(Orders::parse(&["kill", "1", "1", "1", "1", "0"].map(OsString::from)), None);
    }
}
