//! Processes, and the only file of the command that asks which system it is built for.
//!
//! One `leasehold run` is up to four processes:
//!
//! - the **runner** holds the lock and renews it;
//! - the **guardian**, its child, starts the command and stops it in time if the runner dies or falls silent;
//! - the **command**;
//! - on a terminal, the **front**: what the shell has started and what ^Z stops. It shares its process group with the
//!   command, so that the terminal treats the command as if the shell had started it, while the runner goes on renewing.

#[cfg(target_os = "linux")]
mod family;
#[cfg(target_os = "linux")]
mod front;
#[cfg(target_os = "linux")]
mod guarded;
#[cfg(target_os = "linux")]
mod guardian;
#[cfg(target_os = "linux")]
mod signals;
#[cfg(target_os = "linux")]
mod start;
#[cfg(target_os = "linux")]
mod watch;
#[cfg(target_os = "linux")]
mod wire;

#[cfg(target_os = "linux")]
pub(crate) use self::{
    front::{Input, Surroundings, as_front, has_terminal, os_string},
    guarded::{Guarded, not_started, open_descriptor},
    guardian::Orders,
    signals::{Outside, Signals, asks_to_end, number as signal_number},
    start::find as find_program,
    wire::{Ended, Message, Report},
};

#[cfg(not(target_os = "linux"))]
mod elsewhere;
#[cfg(not(target_os = "linux"))]
pub(crate) use self::elsewhere::*;

use std::ffi::OsString;

/// This program, also after its file was replaced by an upgrade.
const SELF: &str = "/proc/self/exe";
/// What the processes of one run call themselves.
const GUARDIAN: &str = "leasehold-guardian";
const START: &str = "leasehold-start";
const RUNNER: &str = "leasehold-runner";

/// What this process was started as.
#[derive(Debug)]
pub(crate) enum Role {
    /// The command that the user typed, with these arguments.
    Typed(Vec<OsString>),
    /// The runner behind a front, with the arguments that the user typed.
    #[cfg_attr(not(target_os = "linux"), expect(dead_code, reason = "only Linux has fronts"))]
    Runner(Vec<OsString>, Surroundings),
    /// A helper, which has done its work.
    Over(u8),
}

/// Finds out, and does the work of a helper.
pub(crate) fn role(arguments: Vec<OsString>) -> Role {
    match arguments.first().and_then(|name| name.to_str()) {
        Some(GUARDIAN | START | RUNNER) => helper(&arguments),
        _ => Role::Typed(arguments),
    }
}

#[cfg(target_os = "linux")]
fn helper(arguments: &[OsString]) -> Role {
    let (name, rest) = (&arguments[0], &arguments[1..]);
    if name == START {
        return Role::Over(start::main(rest));
    }
    let failure = |error: std::io::Error| {
        eprintln!("{}: {error}", name.display());
        Role::Over(crate::exit::FAILURE)
    };
    if name == GUARDIAN {
        return guardian::main(rest).map_or_else(failure, |()| Role::Over(0));
    }
    front::behind(rest).map_or_else(failure, |(typed, surroundings)| Role::Runner(typed, surroundings))
}
