//! What `run` is to do: the flags, checked. No I/O.

use std::ffi::OsString;
use std::time::Duration;

use leasehold::{Name, Owner};

use crate::args::RunArgs;

/// What happens to the command when the lock is being lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum OnLost {
    /// It gets this signal, and is killed if that did not help.
    Signal(i32),
    /// It is killed.
    Kill,
    /// Nothing: it runs on, and the exit code tells.
    Ignore,
}

impl OnLost {
    /// The number of SIGTERM.
    pub(crate) const TERM: i32 = 15;
    /// The number of SIGKILL.
    pub(crate) const KILL: i32 = 9;
}

/// How the command is held to the lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Leash {
    /// What is done when the lock is being lost.
    pub(crate) on_lost: OnLost,
    /// From the first signal to the kill.
    pub(crate) kill_after: Duration,
    /// From the kill to the end of the lease: time for the kernel to kill and for us to see it.
    pub(crate) margin: Duration,
    /// How long processes that outlive the command may take to end by themselves.
    pub(crate) linger: Duration,
}

impl Leash {
    /// How often a family that is being killed is looked at again.
    pub(crate) const KILL_AGAIN: Duration = Duration::from_millis(10);

    /// Fits the leash to the lease: of each TTL at least four tenths must be left for renewals, which come at every
    /// tenth, or a few slow answers would stop the command.
    fn fit(on_lost: OnLost, kill_after: Option<Duration>, ttl: Duration) -> Result<Self, String> {
        let margin = (ttl / 10).clamp(Duration::from_millis(20), Duration::from_secs(1));
        let most = (ttl * 6 / 10).saturating_sub(margin);
        if most.is_zero() {
            return Err(format!("--ttl {} is too short to run a command under", human(ttl)));
        }
        let kill_after = kill_after.unwrap_or_else(|| (ttl / 6).min(Duration::from_secs(5)).min(most));
        if kill_after > most {
            return Err(format!(
                "--kill-after {} does not fit into --ttl {}: the command must be dead before the lock passes on, \
                 so it can have {} at most",
                human(kill_after),
                human(ttl),
                human(most)
            ));
        }
        Ok(Self { on_lost, kill_after, margin, linger: kill_after.min(Duration::from_secs(1)) })
    }
}

/// How long to wait for the lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Patience {
    /// Not at all.
    None,
    /// So long.
    For(Duration),
    /// For ever.
    Endless,
}

/// Everything that `run` needs to know.
#[derive(Clone, Debug)]
pub(crate) struct RunPlan {
    /// One or several, each once, in the order given.
    pub(crate) names: Vec<Name>,
    pub(crate) command: Vec<OsString>,
    pub(crate) patience: Patience,
    pub(crate) busy_code: u8,
    pub(crate) quiet_if_busy: bool,
    pub(crate) ttl: Duration,
    pub(crate) leash: Leash,
    pub(crate) hold_at_least: Duration,
    pub(crate) label: Option<String>,
    pub(crate) owner: Option<Owner>,
    pub(crate) metadata: Vec<(String, String)>,
    pub(crate) status_fd: Option<i32>,
    pub(crate) json: bool,
}

impl RunPlan {
    /// Checks the flags against each other.
    ///
    /// # Errors
    /// What is wrong with them, for the user.
    pub(crate) fn check(args: RunArgs) -> Result<Self, String> {
        let mut names: Vec<Name> = Vec::with_capacity(args.names.len());
        for name in &args.names {
            let name = Name::new(name.as_encoded_bytes()).map_err(|bad| bad.to_string())?;
            if !names.contains(&name) {
                names.push(name);
            }
        }
        if names.len() > 1 && names.iter().any(|name| name.as_bytes().contains(&b'\n')) {
            return Err(
                "of several locks none can have a line break in its name: the command is told one a line"
                    .into(),
            );
        }
        let most = Duration::from_secs(366 * 24 * 3600);
        if args.ttl > most {
            return Err("--ttl is more than 366 days".into());
        }
        let leash = Leash::fit(args.on_lost, args.kill_after, args.ttl)?;
        let command = match args.shell_command {
            Some(text) => vec!["/bin/sh".into(), "-c".into(), text],
            None => args.command,
        };
        let patience = match (args.nonblock, args.wait) {
            (true, _) => Patience::None,
            (false, Some(span)) if span.is_zero() => Patience::None,
            (false, Some(span)) => Patience::For(span),
            (false, None) => Patience::Endless,
        };
        Ok(Self {
            names,
            command,
            patience,
            busy_code: if args.quiet_if_busy { 0 } else { args.conflict_exit_code },
            quiet_if_busy: args.quiet_if_busy,
            ttl: args.ttl,
            leash,
            hold_at_least: args.hold_at_least.unwrap_or_default(),
            label: args.label,
            owner: args.owner,
            metadata: args.metadata,
            status_fd: args.status_fd,
            json: args.json,
        })
    }
}

/// Names for a message.
pub(crate) fn title(names: &[Name]) -> String {
    names.iter().map(Name::to_string).collect::<Vec<_>>().join(", ")
}

/// A duration as people write it, to the millisecond.
pub(crate) fn human(span: Duration) -> String {
    let millis = Duration::from_millis(u64::try_from(span.as_millis()).unwrap_or(u64::MAX));
    let rounded =
        if span >= Duration::from_secs(60) { Duration::from_secs(millis.as_secs()) } else { millis };
    humantime::format_duration(rounded).to_string()
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;
    use crate::args::{Cli, Command};

    fn plan(flags: &[&str]) -> Result<RunPlan, String> {
        let all = ["leasehold", "run", "x"].iter().chain(flags).chain(&["--", "true"]);
        match Cli::try_parse_from(all).map_err(|error| error.to_string())?.command {
            Command::Run(args) => RunPlan::check(*args),
            _ => unreachable!("it says run"),
        }
    }

    #[test]
    fn the_defaults_fit_every_ttl_that_can_be_run_under() {
        for millis in [35, 50, 100, 1000, 10_000, 30_000, 3_600_000] {
            let plan = plan(&["--ttl", &format!("{millis}ms")]).unwrap();
            let Leash { kill_after, margin, .. } = plan.leash;
            assert!(kill_after + margin <= plan.ttl * 6 / 10, "{millis} ms");
        }
        assert_eq!(plan(&[]).unwrap().leash.kill_after, Duration::from_secs(5));
        assert_eq!(plan(&["--ttl", "6s"]).unwrap().leash.kill_after, Duration::from_secs(1));
    }

    #[test]
    fn a_kill_after_that_does_not_fit_is_refused_with_what_would() {
        assert!(plan(&["-k", "17s"]).is_ok());
        let refusal = plan(&["-k", "18s"]).unwrap_err();
        assert!(refusal.contains("17s at most"), "{refusal}");
        for ttl in ["0s", "1ms", "33ms", "2years"] {
            assert!(plan(&["--ttl", ttl]).is_err(), "{ttl}");
        }
    }

    #[test]
    fn waiting_no_time_is_not_waiting() {
        assert_eq!(plan(&[]).unwrap().patience, Patience::Endless);
        assert_eq!(plan(&["-n"]).unwrap().patience, Patience::None);
        assert_eq!(plan(&["-w", "0"]).unwrap().patience, Patience::None);
        assert_eq!(plan(&["-w", "2s"]).unwrap().patience, Patience::For(Duration::from_secs(2)));
        assert!(plan(&["-n", "-w", "2s"]).is_err());
    }

    #[test]
    fn durations_are_shown_as_people_write_them() {
        assert_eq!(human(Duration::from_nanos(1_234_567_890)), "1s 234ms");
        assert_eq!(human(Duration::from_millis(61_234)), "1m 1s");
        assert_eq!(human(Duration::ZERO), "0s");
    }
}
