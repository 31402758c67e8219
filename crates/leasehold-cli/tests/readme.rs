//! The commands of the README, run as they stand there.

#![allow(clippy::unwrap_used)]

use std::path::Path;
use std::process::Command;

fn readme() -> String {
    std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../../README.md")).unwrap()
}

/// The lines of the README's shell blocks.
fn commands(text: &str) -> Vec<&str> {
    let mut inside = false;
    let mut lines = Vec::new();
    for line in text.lines() {
        match line {
            "```sh" => inside = true,
            "```" => inside = false,
            _ if inside => lines.push(line),
            _ => {}
        }
    }
    lines
}

#[test]
fn the_first_command_runs_the_main_job_on_the_embedded_store() {
    let readme = readme();
    let lines = commands(&readme);
    let (build, arguments) = lines[0].split_once(" -- ").unwrap();
    assert_eq!(build, "cargo run --bin leasehold");
    let home = tempfile::tempdir().unwrap();
    let mut tokens = Vec::new();
    for _ in 0..2 {
        // The shell of the reader splits the line; the program in front is the one that cargo would build and run.
        let out = Command::new("/bin/sh")
            .args(["-c", &format!("{} {arguments}", env!("CARGO_BIN_EXE_leasehold"))])
            .env_clear()
            .env("HOME", home.path())
            .env("PATH", std::env::var_os("PATH").unwrap())
            .output()
            .unwrap();
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        let text = String::from_utf8(out.stdout).unwrap();
        let token = text.trim().strip_prefix("holding nightly-backup with token ").unwrap();
        tokens.push(token.parse::<u64>().unwrap());
    }
    assert!(tokens[0] < tokens[1], "{tokens:?}");
    assert!(home.path().join(".local/state/leasehold/locks.db").exists());
}

#[test]
fn there_are_two_set_up_commands_and_the_second_is_what_ci_runs() {
    let readme = readme();
    let lines = commands(&readme);
    assert_eq!(lines[1], "scripts/test");
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    assert!(root.join("scripts/test").exists());
    assert!(std::fs::read_to_string(root.join(".ci/run")).unwrap().contains("scripts/test"));
}

#[test]
fn every_other_command_is_one_that_the_program_knows() {
    let readme = readme();
    let mut seen = 0;
    for line in commands(&readme).into_iter().filter_map(|line| line.strip_prefix("leasehold ")) {
        let command = line.split(' ').find(|word| !word.starts_with("--") && !word.contains("://")).unwrap();
        let help = Command::new(env!("CARGO_BIN_EXE_leasehold")).args([command, "--help"]).output().unwrap();
        assert!(help.status.success(), "{command}");
        seen += 1;
    }
    assert!(seen >= 5, "{seen}");
}
