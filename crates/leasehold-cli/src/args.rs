//! The flags, as text. What they mean together is checked in `plan`.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use clap::{ArgGroup, Args, Parser, Subcommand};
use clap_complete::Shell;
use leasehold::Owner;

use crate::plan::OnLost;

/// Runs commands under a distributed lock, and shows who holds what.
///
/// A lock is taken in a store: a Redis or Valkey server, or, with no server at all, a file on this machine.
/// It is a lease that is renewed while it is held, and each holder gets a number (the fencing token) that is larger
/// than that of every holder before it.
#[derive(Debug, Parser)]
#[command(name = "leasehold", version, after_help = EXAMPLES, max_term_width = 100)]
pub(crate) struct Cli {
    /// Where the locks are: redis://host:6379, rediss://, unix socket, sqlite:/path/to/file
    ///
    /// Without it the environment variable LEASEHOLD_STORE, and without that the embedded file of this user. A password
    /// is better kept in LEASEHOLD_STORE than on a command line, which everybody on the machine can read.
    #[arg(long, global = true, value_name = "URL")]
    pub(crate) store: Option<String>,

    #[command(subcommand)]
    pub(crate) command: Command,
}

const EXAMPLES: &str = "\
Examples:
  leasehold run nightly-backup -- ./backup.sh       one at a time on this machine; wait for the turn
  leasehold run -n nightly-backup -- ./backup.sh    give up at once if it runs already (exit code 124)
  leasehold --store redis://db:6379 run deploy -- make deploy
  leasehold ls                                      who holds what
  leasehold doctor                                  is the store fit for locks?";

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Runs a command while holding a lock
    Run(Box<RunArgs>),
    /// Lists the locks that are held
    Ls(LsArgs),
    /// Shows one lock: who holds it, since when, with which token, and who waits; or who waits for whom
    Show(ShowArgs),
    /// Looks whether the store is fit for locks, and says what each finding means
    Doctor(DoctorArgs),
    /// Prints the completions for a shell
    #[command(after_help = "Example:\n  leasehold completions bash > /etc/bash_completion.d/leasehold")]
    Completions {
        /// The shell
        shell: Shell,
    },
    /// Prints the manual page, or writes one page for each command into a folder
    #[command(after_help = "Examples:\n  leasehold man | man -l -\n  leasehold man /usr/share/man/man1")]
    Man {
        /// The folder; without it the main page goes to standard output
        folder: Option<PathBuf>,
    },
}

#[derive(Args, Debug)]
#[command(
    after_help = RUN_HELP,
    override_usage = "leasehold run [OPTIONS] NAME... -- COMMAND...\n       leasehold run [OPTIONS] NAME... -c TEXT",
    group = ArgGroup::new("what").required(true).args(["shell_command", "command"])
)]
pub(crate) struct RunArgs {
    /// The lock: 1 to 512 bytes, compared byte for byte; or several, which are taken together, all or none
    #[arg(required = true, value_name = "NAME")]
    pub(crate) names: Vec<OsString>,

    /// Give up at once if somebody else holds the lock
    #[arg(short, long, conflicts_with = "wait")]
    pub(crate) nonblock: bool,

    /// Give up after waiting so long for the lock; without it, wait for ever
    #[arg(short, long, value_name = "DURATION", value_parser = duration)]
    pub(crate) wait: Option<Duration>,

    /// Exit code when the lock was not acquired in time
    #[arg(short = 'E', long, value_name = "CODE", default_value_t = crate::exit::BUSY)]
    pub(crate) conflict_exit_code: u8,

    /// Exit 0 without a word when the lock was not acquired in time
    #[arg(long, conflicts_with = "conflict_exit_code")]
    pub(crate) quiet_if_busy: bool,

    /// How long the lock lasts if nobody renews it: the longest that others wait after a crash. It is renewed every
    /// tenth of this time
    #[arg(long, value_name = "DURATION", default_value = "30s", value_parser = duration)]
    pub(crate) ttl: Duration,

    /// How long a command that was asked to stop has before it is killed [default: 5s, or a sixth of the TTL if that
    /// is shorter]
    #[arg(short, long, value_name = "DURATION", value_parser = duration)]
    pub(crate) kill_after: Option<Duration>,

    /// Keep the lock at least so long, also if the command ends sooner
    #[arg(long, value_name = "DURATION", value_parser = duration)]
    pub(crate) hold_at_least: Option<Duration>,

    /// What to do to the command when the lock is being lost: term, kill, ignore, or the name or number of a signal.
    /// Exit code 123 in any case
    #[arg(long, value_name = "ACTION", default_value = "term", value_parser = on_lost)]
    pub(crate) on_lost: OnLost,

    /// Why the lock is taken, shown to others
    #[arg(long, value_name = "TEXT")]
    pub(crate) label: Option<String>,

    /// The unit of work that takes the lock, for deadlock detection: give the same text to every lock that it takes,
    /// and to no other unit of work
    #[arg(long, value_name = "TEXT", value_parser = owner)]
    pub(crate) owner: Option<Owner>,

    /// Something else to show to others (may be repeated)
    #[arg(long = "meta", value_name = "KEY=VALUE", value_parser = key_value)]
    pub(crate) metadata: Vec<(String, String)>,

    /// Write what happens to this open file descriptor, one JSON object a line
    #[arg(long, value_name = "FD", value_parser = clap::value_parser!(i32).range(0..))]
    pub(crate) status_fd: Option<i32>,

    /// Write messages to standard error as JSON objects, one a line
    #[arg(long)]
    pub(crate) json: bool,

    /// Run this text with /bin/sh instead of a command
    #[arg(short = 'c', value_name = "TEXT")]
    pub(crate) shell_command: Option<OsString>,

    /// The command and its arguments
    #[arg(last = true, value_name = "COMMAND")]
    pub(crate) command: Vec<OsString>,
}

const RUN_HELP: &str = "\
Exit codes:
  the command's own, or 128+N if signal N ended it
  0     it ran, exited 0, and the lock was provably held until it and all its children were gone
  64    wrong arguments
  123   the lock was lost while it ran
  124   the lock was not acquired in time (see -E)
  125   Leasehold failed; the command was not started
  126   the command cannot be executed
  127   the command was not found

The command finds in its environment LEASEHOLD_NAME, LEASEHOLD_TOKEN (the fencing token), LEASEHOLD_OWNER,
LEASEHOLD_TTL_MS and LEASEHOLD_LOST_FD (a descriptor that becomes readable when the lock is lost). LEASEHOLD_NAMES,
LEASEHOLD_TOKENS and LEASEHOLD_OWNERS have one line for each lock; with several locks the first three are not set.
Processes that it leaves behind are stopped before the lock is released.

Examples:
  leasehold run nightly-backup -- ./backup.sh
  leasehold run -w 10s --ttl 1m deploy -- make deploy
  leasehold run account:3 account:17 -- ./transfer.sh
  leasehold run -n --quiet-if-busy report -c 'make-report > report.tmp && mv report.tmp report'";

#[derive(Args, Debug)]
#[command(
    after_help = "Examples:\n  leasehold ls\n  leasehold ls tenant:123:\n  leasehold ls --json | jq .name"
)]
pub(crate) struct LsArgs {
    /// Only locks whose names begin with this
    #[arg(default_value = "")]
    pub(crate) prefix: OsString,

    /// Print one JSON object a line
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Args, Debug)]
#[command(
    after_help = "Examples:\n  leasehold show nightly-backup\n  leasehold show --graph\n  leasehold show --json nightly-backup | jq .queue"
)]
pub(crate) struct ShowArgs {
    /// The lock, or several; with --graph those to begin with, all without one
    #[arg(required_unless_present = "graph", value_name = "NAME")]
    pub(crate) names: Vec<OsString>,

    /// Draw who waits for whom, and mark circles
    #[arg(long)]
    pub(crate) graph: bool,

    /// Print one JSON object for each lock, or one with the nodes and edges of the graph
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Args, Debug)]
#[command(
    after_help = "Exit codes:\n  0   locks work here, perhaps with warnings\n  1   they do not\n\nExample:\n  leasehold --store redis://db:6379 doctor"
)]
pub(crate) struct DoctorArgs {
    /// Print one JSON object a line
    #[arg(long)]
    pub(crate) json: bool,
}

fn duration(text: &str) -> Result<Duration, String> {
    humantime::parse_duration(text).map_err(|error| format!("{error}; write 30s, 250ms or 1m30s"))
}

fn owner(text: &str) -> Result<Owner, String> {
    Owner::existing(text).map_err(|bad| bad.to_string())
}

fn key_value(text: &str) -> Result<(String, String), String> {
    let (key, value) = text.split_once('=').ok_or("write KEY=VALUE")?;
    if key.is_empty() {
        return Err("the key is empty".into());
    }
    Ok((key.into(), value.into()))
}

fn on_lost(text: &str) -> Result<OnLost, String> {
    match text {
        "term" => Ok(OnLost::Signal(OnLost::TERM)),
        "kill" => Ok(OnLost::Kill),
        "ignore" => Ok(OnLost::Ignore),
        signal => match crate::child::signal_number(signal) {
            Some(OnLost::KILL) => Ok(OnLost::Kill),
            Some(number) => Ok(OnLost::Signal(number)),
            None => Err("write term, kill, ignore, or a signal such as INT, SIGUSR1 or 10".into()),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_flags_do_not_contradict_each_other() {
        use clap::CommandFactory as _;
        Cli::command().debug_assert();
    }

    #[test]
    fn actions_on_loss_are_words_names_or_numbers() {
        assert_eq!(on_lost("term"), Ok(OnLost::Signal(15)));
        assert_eq!(on_lost("USR1"), Ok(OnLost::Signal(10)));
        assert_eq!(on_lost("sigint"), Ok(OnLost::Signal(2)));
        assert_eq!(on_lost("9"), Ok(OnLost::Kill));
        assert_eq!(on_lost("KILL"), Ok(OnLost::Kill));
        for bad in ["", "TERMINATE", "0", "-1", "65", "1000"] {
            assert!(on_lost(bad).is_err(), "{bad}");
        }
    }
}
