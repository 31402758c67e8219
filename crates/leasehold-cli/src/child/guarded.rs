//! The runner's side of a guardian.

use std::ffi::OsString;
use std::fs::File;
use std::future::poll_fn;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};

use rustix::process::{PidfdFlags, PidfdGetfdFlags, getpid, pidfd_getfd, pidfd_open};

use super::family::Family;
use super::guardian::{Orders, ended};
use super::wire::{self, Ended, Line, Message};

/// A command that runs under a guardian.
#[derive(Debug)]
pub(crate) struct Guarded {
    guardian: Child,
    control: Line,
    family: Family,
    main: Option<i32>,
}

impl Guarded {
    /// Starts a guardian with its orders. It and the command inherit `lifeline`.
    pub(crate) fn start(
        orders: &Orders,
        environment: &[(&str, Option<OsString>)],
        stdin: OwnedFd,
        lifeline: Option<&File>,
    ) -> io::Result<Self> {
        let family = Family::found();
        let (here, there) = wire::pair()?;
        wire::hand_over(&here, &[&stdin])?;
        drop(stdin);
        let mut command = Command::new(super::SELF);
        command.arg0(super::GUARDIAN).args(orders.arguments());
        for (name, value) in environment {
            match value {
                Some(value) => command.env(name, value),
                None => command.env_remove(name),
            };
        }
        command.stdin(Stdio::from(there)).process_group(0);
        // This copy is the one descriptor of ours that a child keeps.
        let inherited = lifeline.map(rustix::io::dup).transpose()?;
        let guardian = command.spawn()?;
        drop(inherited);
        // From here on the command alone reads and writes, and its peers see the end of file when it ends it.
        let nowhere = File::options().read(true).write(true).open("/dev/null")?;
        rustix::stdio::dup2_stdin(&nowhere)?;
        rustix::stdio::dup2_stdout(&nowhere)?;
        let control = Line::new(here)?;
        Ok(Self { guardian, control, family, main: None })
    }

    /// Says something to the guardian.
    pub(crate) fn tell(&self, message: Message) {
        self.control.tell(message);
    }

    /// What the guardian says next; `None` once it is dead. Nothing is lost if it is dropped.
    pub(crate) async fn next(&mut self) -> Option<Message> {
        let said = poll_fn(|context| self.control.poll(context)).await?;
        if let Message::Started(pid) = said {
            self.main = i32::try_from(pid).ok();
        }
        Some(said)
    }

    /// Reaps a guardian that has said its last word.
    pub(crate) fn part(mut self) {
        let _ = self.guardian.wait();
    }

    /// Kills guardian, command and descendants, whatever the state they are in, and waits until none is left. Returns how the command ended.
    pub(crate) fn destroy(mut self) -> Ended {
        let _ = self.guardian.kill();
        let status = self.family.destroy(self.main);
        status.map_or(Ended::Signal(9), ended)
    }
}

/// Why a guardian could not start the command, from the number that it sent.
pub(crate) fn not_started(errno: i32) -> String {
    if errno == rustix::io::Errno::TIME.raw_os_error() {
        super::start::TOO_LATE.into()
    } else {
        format!("cannot start a process: {}", io::Error::from_raw_os_error(errno))
    }
}

/// A second handle on a descriptor that the user opened for us, by its number.
pub(crate) fn open_descriptor(number: i32) -> io::Result<File> {
    let this = pidfd_open(getpid(), PidfdFlags::empty());
    match this.and_then(|this| pidfd_getfd(this, number, PidfdGetfdFlags::empty())) {
        Ok(copy) => Ok(copy.into()),
        Err(rustix::io::Errno::BADF) => Err(rustix::io::Errno::BADF.into()),
        // Some containers forbid that call.
        Err(_) => File::options().append(true).open(format!("/dev/fd/{number}")),
    }
}
