//! The last step before the command: the process that becomes it.
//!
//! What a process can only ask for itself is asked for here, between fork and exec: that is where other programs
//! need unsafe code.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use leasehold::clock::{self, Instant};
use rustix::fs::{Access, access};
use rustix::process::{Signal, getpid, getppid, set_parent_process_death_signal};

use super::wire;
use crate::exit;
use crate::plan::OnLost;

/// Why a command was not started after a pause.
pub(crate) const TOO_LATE: &str = "the lock could not be trusted any more when the command was to be started";

/// The arguments for a guardian to start `command` with, if it is not later than `latest`.
pub(crate) fn arguments(on_lost: OnLost, latest: Instant, command: &[OsString]) -> Vec<OsString> {
    let guardian = getpid().as_raw_nonzero().to_string();
    // Whoever ignores losses wants the command to go on whatever happens.
    let death = if on_lost == OnLost::Ignore { "stay" } else { "follow" };
    [guardian, death.into(), wire::nanos(latest).to_string()]
        .into_iter()
        .map(OsString::from)
        .chain(command.iter().cloned())
        .collect()
}

/// Becomes the command, or says why not and with which exit code.
pub(crate) fn main(arguments: &[OsString]) -> u8 {
    let [guardian, death, latest, program, rest @ ..] = arguments else { return exit::FAILURE };
    if death == "follow" {
        let _ = set_parent_process_death_signal(Some(Signal::KILL));
    }
    // If the guardian died before that request, nobody would ever stop the command.
    if getppid().map(|pid| OsString::from(pid.as_raw_nonzero().to_string())) != Some(guardian.clone()) {
        return exit::FAILURE;
    }
    // All processes of this run may have stood still since the guardian looked.
    let latest = latest.to_str().and_then(|nanos| nanos.parse().ok()).map(wire::instant);
    if latest.is_none_or(|latest| clock::now() >= latest) {
        eprintln!("leasehold: {TOO_LATE}");
        return exit::FAILURE;
    }
    let error = Command::new(program).args(rest).exec();
    let (code, why) = explain(program, &error);
    eprintln!("leasehold: {why}");
    code
}

/// Looks whether a program can be found and executed, as `execvp` would; else the exit code and the reason.
pub(crate) fn find(program: &OsStr) -> Result<(), (u8, String)> {
    let candidates: Vec<PathBuf> = if program.as_encoded_bytes().contains(&b'/') {
        vec![program.into()]
    } else {
        let path = std::env::var_os("PATH").unwrap_or_else(|| "/bin:/usr/bin".into());
        std::env::split_paths(&path).map(|folder| folder.join(program)).collect()
    };
    let mut best = io::Error::from(io::ErrorKind::NotFound);
    for candidate in candidates.iter().filter(|_| !program.is_empty()) {
        match executable(candidate) {
            Ok(()) => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => best = error,
            Err(_) => {}
        }
    }
    Err(explain(program, &best))
}

fn executable(path: &Path) -> io::Result<()> {
    if std::fs::metadata(path)?.is_dir() {
        return Err(io::ErrorKind::PermissionDenied.into());
    }
    Ok(access(path, Access::EXEC_OK)?)
}

fn explain(program: &OsStr, error: &io::Error) -> (u8, String) {
    let program = leasehold::Escaped(program.as_encoded_bytes());
    match error.kind() {
        io::ErrorKind::NotFound => (exit::NOT_FOUND, format!("{program}: command not found")),
        io::ErrorKind::PermissionDenied => {
            (exit::CANNOT_RUN, format!("{program}: not an executable file, or no right to run it"))
        }
        _ => (exit::CANNOT_RUN, format!("{program}: cannot be run: {error}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_are_found_as_the_system_would() {
        assert_eq!(find("sh".as_ref()), Ok(()));
        assert_eq!(find("/bin/sh".as_ref()), Ok(()));
        for (program, code) in [
            ("no-such-program-here", 127),
            ("/no/such/file", 127),
            ("/", 126),
            ("/etc/passwd", 126),
            ("", 127),
        ] {
            assert_eq!(find(program.as_ref()).map_err(|(code, _)| code), Err(code), "{program}");
        }
    }
}
