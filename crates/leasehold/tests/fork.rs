//! A process that forks after it took a lock: its children are processes of their own.

#![allow(clippy::unwrap_used)]

use std::collections::HashSet;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use leasehold::clock;
use pollster::block_on;

const ROLE: &str = "LEASEHOLD_TEST_FORK";

fn preload(folder: &Path) -> std::path::PathBuf {
    std::fs::write(folder.join("fork.c"), include_str!("../../leasehold-chaos/src/fork.c")).unwrap();
    let compiler = Command::new("cc")
        .args(["-shared", "-fPIC", "-fno-builtin", "-o", "fork.so", "fork.c"])
        .current_dir(folder)
        .output()
        .unwrap_or_else(|error| panic!("cc: {error}: apt-get install -y gcc libc6-dev"));
    assert!(compiler.status.success(), "cc: {}", String::from_utf8_lossy(&compiler.stderr));
    folder.join("fork.so")
}

/// Runs this test program's `test` again, with a `yield_now` that forks; gives back the lines that its processes wrote.
fn forking(test: &str) -> Vec<String> {
    let folder = tempfile::tempdir().unwrap();
    let said = folder.path().join("said");
    let status = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture", "--test-threads=1"])
        .env("LD_PRELOAD", preload(folder.path()))
        .env(ROLE, &said)
        .stdout(Stdio::null())
        .status()
        .unwrap();
    assert!(status.success());
    std::fs::read_to_string(&said).unwrap().lines().map(ToOwned::to_owned).collect()
}

/// In a forking program: a thread that is alone in calling this library, as `main` is.
fn role() -> Option<std::path::PathBuf> {
    std::env::var_os(ROLE).map(Into::into)
}

fn say(said: &Path, line: &str) {
    use std::io::Write;
    let mut file = std::fs::OpenOptions::new().append(true).create(true).open(said).unwrap();
    file.write_all(format!("{line}\n").as_bytes()).unwrap();
}

/// Waits until the other process has said its line too, without any timer of the library.
fn until_both_spoke(said: &Path) {
    // The file is gone as soon as the test has read both.
    while std::fs::read_to_string(said).is_ok_and(|said| said.lines().count() < 2) {
        #[expect(clippy::disallowed_methods, reason = "the library's own timers are what is tested")]
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_forked_process_makes_claim_ids_of_its_own() {
    if let Some(said) = role() {
        let _ = clock::claim_id();
        std::thread::yield_now();
        say(&said, &clock::claim_id().to_string());
        until_both_spoke(&said);
        std::process::exit(0);
    }
    let said = forking("a_forked_process_makes_claim_ids_of_its_own");
    assert_eq!(said.len(), 2);
    assert_eq!(said.iter().collect::<HashSet<_>>().len(), 2, "the same claim twice is two holders: {said:?}");
}

#[test]
fn a_forked_process_has_timers_of_its_own() {
    if let Some(said) = role() {
        // The clock's thread is at work before.
        block_on(clock::sleep(Duration::from_millis(1)));
        std::thread::yield_now();
        block_on(clock::sleep(Duration::from_millis(20)));
        say(&said, "woke");
        until_both_spoke(&said);
        std::process::exit(0);
    }
    assert_eq!(forking("a_forked_process_has_timers_of_its_own").len(), 2);
}
