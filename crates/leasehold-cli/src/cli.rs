//! From arguments to an exit code.

use std::ffi::OsString;
use std::io::Write as _;

use clap::Parser as _;

use crate::args::{Cli, Command, RunArgs};
use crate::child::{self, Role, Surroundings};
use crate::plan::RunPlan;
use crate::status::say;
use crate::{doctor, exit, generate, ls, run, show};

/// The embedded file of this user.
const DEFAULT_STORE: &str = "sqlite:";

/// Does what the arguments say; returns the exit code.
pub(crate) fn main(arguments: Vec<OsString>) -> u8 {
    let (typed, behind) = match child::role(arguments) {
        Role::Over(code) => return code,
        Role::Typed(typed) => (typed, None),
        Role::Runner(typed, surroundings) => (typed, Some(surroundings)),
    };
    let cli = match Cli::try_parse_from(&typed) {
        Ok(cli) => cli,
        Err(error) => {
            let _ = error.print();
            return if error.use_stderr() { exit::USAGE } else { 0 };
        }
    };
    let store = match store(cli.store) {
        Ok(store) => store,
        Err(wrong) => {
            say(wrong);
            return exit::USAGE;
        }
    };
    match cli.command {
        Command::Run(args) => run_command(*args, &store, &typed, behind),
        Command::Ls(args) => answer(ls::run(&store, &args)),
        Command::Show(args) => answer(show::run(&store, &args)),
        Command::Doctor(args) => answer(doctor::run(&store, &args)),
        Command::Completions { shell } => output(generate::completions(shell)),
        Command::Man { folder } => output(generate::man(folder.as_deref())),
    }
}

/// Where the locks are. A variable that is set and names nothing is refused: falling back to the embedded file would
/// let two machines in together.
fn store(flag: Option<String>) -> Result<String, &'static str> {
    match (flag, std::env::var_os("LEASEHOLD_STORE").map(OsString::into_string)) {
        (Some(url), _) => Ok(url),
        (None, None) => Ok(DEFAULT_STORE.into()),
        (None, Some(Ok(url))) if !url.is_empty() => Ok(url),
        (None, Some(Ok(_))) => Err("LEASEHOLD_STORE is empty: unset it to use the embedded file"),
        (None, Some(Err(_))) => Err("LEASEHOLD_STORE is not valid UTF-8"),
    }
}

fn run_command(args: RunArgs, store: &str, typed: &[OsString], behind: Option<Surroundings>) -> u8 {
    let plan = match RunPlan::check(args) {
        Ok(plan) => plan,
        Err(wrong) => {
            say(&wrong);
            return exit::USAGE;
        }
    };
    if let Err((code, why)) = child::find_program(&plan.command[0]) {
        say(&why);
        return code;
    }
    let done = match behind {
        None if child::has_terminal() => child::as_front(typed, &plan),
        None => Surroundings::bare().and_then(|bare| on_runtime(run::run(store, &plan, bare))),
        Some(surroundings) => on_runtime(run::run(store, &plan, surroundings)),
    };
    done.unwrap_or_else(|error| {
        say(&error.to_string());
        exit::FAILURE
    })
}

/// Runs to the end on this thread.
fn on_runtime<T>(work: impl Future<Output = T>) -> std::io::Result<T> {
    Ok(tokio::runtime::Builder::new_current_thread().enable_io().build()?.block_on(work))
}

/// The exit code of a command that asks the store and prints an answer.
fn answer(work: impl Future<Output = leasehold::Result<(String, u8)>>) -> u8 {
    match on_runtime(work) {
        Ok(Ok((text, code))) => output(print(&text).map(|()| code)),
        Ok(Err(error)) => {
            say(&error.to_string());
            if error.kind() == leasehold::ErrorKind::Invalid { exit::USAGE } else { exit::FAILURE }
        }
        Err(error) => output(Err(error)),
    }
}

fn print(text: &str) -> std::io::Result<()> {
    let mut out = anstream::stdout();
    out.write_all(text.as_bytes())?;
    out.flush()
}

fn output(written: std::io::Result<u8>) -> u8 {
    match written {
        Ok(code) => code,
        // `| head` has seen enough.
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => 0,
        Err(error) => {
            say(&error.to_string());
            exit::FAILURE
        }
    }
}
