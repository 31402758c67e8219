//! Other processes for the tests of the embedded store: this same test program, told by its environment to be
//! `another_process`.
#![allow(
    dead_code,
    unreachable_pub,
    missing_debug_implementations,
    reason = "each test program uses its part"
)]

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStderr, Command, Stdio};
use std::time::Duration;

use leasehold::FencingToken;
use rustix::process::{Pid, Signal, kill_process};

/// Far more than a slow machine needs, so that what never happens fails and does not hang.
pub const PATIENCE: Duration = Duration::from_secs(60);
const MARK: &str = "@@ ";

/// Another process, which says what it does line by line. Dropping it kills it.
pub struct Process {
    pub child: Child,
    lines: BufReader<ChildStderr>,
}

impl Process {
    pub fn start(task: &str, path: &Path, ttl: Duration) -> Self {
        Self::start_by(&mut Command::new(std::env::current_exe().unwrap()), task, path, ttl)
    }

    /// Starts it by another program's command line, which ends before the program to run.
    pub fn start_in(wrapper: &[&str], task: &str, path: &Path, ttl: Duration) -> Self {
        let mut command = Command::new(wrapper[0]);
        command.args(&wrapper[1..]).arg(std::env::current_exe().unwrap());
        Self::start_by(&mut command, task, path, ttl)
    }

    pub fn start_by(command: &mut Command, task: &str, path: &Path, ttl: Duration) -> Self {
        let mut child = command
            .args(["--exact", "another_process", "--nocapture", "--test-threads=1"])
            .env("LEASEHOLD_TEST_TASK", task)
            .env("LEASEHOLD_TEST_PATH", path)
            .env("LEASEHOLD_TEST_TTL_MS", ttl.as_millis().to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap_or_else(|e| panic!("{command:?} cannot be run: {e} (unshare comes with util-linux)"));
        let lines = BufReader::new(child.stderr.take().unwrap());
        Self { child, lines }
    }

    pub fn line(&mut self) -> String {
        let mut seen = String::new();
        loop {
            let mut line = String::new();
            let read = self.lines.read_line(&mut line).unwrap();
            assert!(
                read > 0,
                "it ended early: {seen} (is unshare of util-linux there, and are user namespaces allowed?)"
            );
            if let Some(said) = line.strip_prefix(MARK) {
                return said.trim_end().to_owned();
            }
            seen += &line;
        }
    }

    /// Writes a line to its input.
    pub fn tell(&mut self, what: &str) {
        let input = self.child.stdin.as_mut().unwrap();
        input.write_all(format!("{what}\n").as_bytes()).unwrap();
    }

    pub fn token(&mut self) -> FencingToken {
        let line = self.line();
        FencingToken::new(line.strip_prefix("held ").unwrap_or_else(|| panic!("{line}")).parse().unwrap())
    }

    pub fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    pub fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Says a line to the process that started this one.
pub fn say(text: &str) {
    // In one write, so that nothing gets between.
    std::io::stderr().write_all(format!("{MARK}{text}\n").as_bytes()).unwrap();
}
