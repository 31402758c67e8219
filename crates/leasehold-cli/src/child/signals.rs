//! Signals that arrive here and are meant for the command.

use std::future::poll_fn;
use std::io;
use std::os::fd::OwnedFd;
use std::str::FromStr;
use std::task::Poll;

use tokio::signal::unix::{Signal, SignalKind, signal};

use super::wire::{Line, Message};

/// The signals that are passed on. The others end this process, and the guardian then stops the command.
pub(crate) const PASSED_ON: [nix::sys::signal::Signal; 8] = {
    use nix::sys::signal::{SIGCONT, SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGTSTP, SIGUSR1, SIGUSR2};
    [SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2, SIGTSTP, SIGCONT]
};

/// Whether a signal asks the process that gets it to end.
pub(crate) fn asks_to_end(number: i32) -> bool {
    use nix::sys::signal::{SIGHUP, SIGINT, SIGQUIT, SIGTERM};
    [SIGHUP, SIGINT, SIGQUIT, SIGTERM].iter().any(|&signal| signal as i32 == number)
}

/// What happened outside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outside {
    /// A signal came, from the terminal or from somebody.
    Signal(i32, bool),
    /// The process in front, which the user sees, is gone.
    FrontGone,
}

/// All signals to be passed on, also those that the process in front passes on.
#[derive(Debug)]
pub(crate) struct Signals {
    streams: Vec<(i32, Signal)>,
    front: Option<Line>,
}

impl Signals {
    /// Begins to listen. A signal that the user's environment ignores (nohup, a job of a script) stays ignored, for the
    /// command too.
    pub(crate) fn listen(front: Option<OwnedFd>) -> io::Result<Self> {
        let ignored = ignored();
        let mut streams = Vec::new();
        let wanted = PASSED_ON.into_iter().map(|signal| signal as i32);
        for number in wanted.filter(|number| ignored >> (number - 1) & 1 == 0) {
            streams.push((number, signal(SignalKind::from_raw(number))?));
        }
        let front = front.map(Line::new).transpose()?;
        Ok(Self { streams, front })
    }

    /// The next one. Nothing is lost if it is dropped.
    pub(crate) async fn next(&mut self) -> Outside {
        poll_fn(|context| {
            for (number, stream) in &mut self.streams {
                if let Poll::Ready(Some(())) = stream.poll_recv(context) {
                    return Poll::Ready(Outside::Signal(*number, false));
                }
            }
            let Some(front) = &self.front else { return Poll::Pending };
            while let Poll::Ready(said) = front.poll(context) {
                match said {
                    Some(Message::Signal(number, from_terminal)) => {
                        return Poll::Ready(Outside::Signal(number, from_terminal));
                    }
                    Some(_) => {}
                    None => {
                        self.front = None;
                        return Poll::Ready(Outside::FrontGone);
                    }
                }
            }
            Poll::Pending
        })
        .await
    }
}

/// The signals that this process was started to ignore, as the kernel's bit set.
fn ignored() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    line.and_then(|digits| u64::from_str_radix(digits.trim(), 16).ok()).unwrap_or(0)
}

/// The number of a signal given by name, with or without SIG, or by number.
pub(crate) fn number(text: &str) -> Option<i32> {
    use nix::sys::signal::Signal;
    let upper = text.to_ascii_uppercase();
    let named = Signal::from_str(&upper).or_else(|_| Signal::from_str(&format!("SIG{upper}")));
    let signal = match (named, text.parse::<i32>()) {
        (Ok(signal), _) => signal,
        (_, Ok(number)) => Signal::try_from(number).ok()?,
        _ => return None,
    };
    Some(signal as i32)
}
