//! A place with a lock file of its own, and looks at processes.
#![allow(dead_code, reason = "each test binary uses a part of it")]

use std::ffi::OsStr;
use std::fs;
use std::io::{BufRead as _, BufReader, Read as _};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Output, Stdio};

pub(crate) use leasehold_chaos::eventually;
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

/// The program under test.
pub(crate) const LEASEHOLD: &str = env!("CARGO_BIN_EXE_leasehold");

/// A folder with a store of its own.
pub(crate) struct Place {
    pub(crate) folder: TempDir,
    /// Another store than the embedded file.
    pub(crate) store: Option<String>,
}

impl Place {
    pub(crate) fn new() -> Self {
        Self { folder: TempDir::new().unwrap(), store: None }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub(crate) fn url(&self) -> String {
        self.store.clone().unwrap_or_else(|| format!("sqlite:{}", self.path("locks.db").display()))
    }

    /// `leasehold` with these arguments, in this place, without a terminal: its process is the runner.
    pub(crate) fn leasehold<A: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = A>) -> Command {
        let mut command = Command::new("setsid");
        command.arg(LEASEHOLD).args(arguments).current_dir(self.folder.path());
        command.env("LEASEHOLD_STORE", self.url()).env_remove("NO_COLOR").stdin(Stdio::null());
        command
    }

    /// Runs it to the end.
    pub(crate) fn run<A: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = A>) -> Output {
        self.leasehold(arguments).output().unwrap()
    }

    /// Starts `leasehold run FLAGS x -c SCRIPT`; the script must print a line when it is ready.
    pub(crate) fn start(&self, flags: &[&str], script: &str) -> Running {
        let arguments = [&["run"], flags, &["x", "-c", script]].concat();
        let mut command = self.leasehold(arguments);
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        Running::start(command)
    }

    /// What `show --json x` says.
    pub(crate) fn show(&self) -> serde_json::Value {
        let output = self.run(["show", "--json", "x"]);
        assert!(output.status.success(), "{output:?}");
        serde_json::from_slice(&output.stdout).unwrap()
    }

    pub(crate) fn is_free(&self) -> bool {
        self.show()["held"] == false
    }

    /// Takes the lock from whoever holds it, behind everybody's back.
    pub(crate) fn steal(&self) {
        let database = rusqlite::Connection::open(self.path("locks.db")).unwrap();
        database.busy_timeout(std::time::Duration::from_secs(10)).unwrap();
        let changed = database
            .execute("UPDATE locks SET claim = NULL, expires = NULL, lifeline = NULL WHERE name = CAST('x' AS BLOB)", [])
            .unwrap();
        assert_eq!(changed, 1, "nobody holds it");
    }

    /// Waits for a file that a script writes, and reads it.
    pub(crate) fn await_file(&self, name: &str) -> String {
        let path = self.path(name);
        eventually(&format!("the script writes {name}"), || {
            fs::read_to_string(&path).is_ok_and(|text| text.ends_with('\n'))
        });
        fs::read_to_string(path).unwrap().trim().to_owned()
    }
}

/// A runner whose command is ready.
pub(crate) struct Running {
    pub(crate) child: Child,
    pub(crate) stdout: BufReader<ChildStdout>,
    /// The line with which the command said that it is ready.
    pub(crate) first: String,
}

impl Running {
    pub(crate) fn start(mut command: Command) -> Self {
        let mut child = command.spawn().unwrap();
        let mut stdout = BufReader::new(child.stdout.take().unwrap());
        let mut first = String::new();
        stdout.read_line(&mut first).unwrap();
        assert!(!first.is_empty(), "the command did not start: {:?}", child.wait_with_output());
        Self { child, stdout, first: first.trim().to_owned() }
    }

    pub(crate) fn pid(&self) -> i32 {
        i32::try_from(self.child.id()).unwrap()
    }

    pub(crate) fn guardian(&self) -> i32 {
        let children = children(self.pid());
        assert_eq!(children.len(), 1, "{children:?}");
        children[0]
    }

    pub(crate) fn signal(&self, signal: Signal) {
        send(self.pid(), signal);
    }

    /// Exit code, the rest of standard output, and standard error.
    pub(crate) fn end(mut self) -> (Option<i32>, String, String) {
        let mut out = String::new();
        self.stdout.read_to_string(&mut out).unwrap();
        let output = self.child.wait_with_output().unwrap();
        (output.status.code(), out, String::from_utf8(output.stderr).unwrap())
    }
}

pub(crate) fn send(pid: i32, signal: Signal) {
    kill_process(Pid::from_raw(pid).unwrap(), signal).unwrap();
}

/// The state letter of a process; `None` if there is none.
pub(crate) fn state(pid: i32) -> Option<char> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit(')').next()?.trim().chars().next()
}

/// Whether it can still do anything.
pub(crate) fn is_alive(pid: i32) -> bool {
    state(pid).is_some_and(|state| state != 'Z' && state != 'X')
}

pub(crate) fn children(pid: i32) -> Vec<i32> {
    let list = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap();
    list.split_whitespace().map(|pid| pid.parse().unwrap()).collect()
}

pub(crate) fn pid_in(text: &str) -> i32 {
    text.trim().parse().unwrap_or_else(|_| panic!("no process number: {text:?}"))
}

pub(crate) fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}

pub(crate) fn events(path: &Path) -> Vec<serde_json::Value> {
    let text = fs::read_to_string(path).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}
