//! `ls`, `show`, `doctor`, and what is generated from the flags.
#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

mod common;

use std::fs;
use std::process::Command;

use common::{LEASEHOLD, Place, text};
use rustix::process::Signal;

#[test]
fn ls_and_show_say_who_holds_what() {
    let place = Place::new();
    assert_eq!(text(&place.run(["ls"]).stdout), "no locks are held\n");
    assert_eq!(text(&place.run(["ls", "--json"]).stdout), "");
    let flags = &["--label", "nightly\x1b[31m", "--meta", "ticket=42", "--ttl", "100s"];
    let running = place.start(flags, "echo $LEASEHOLD_TOKEN $LEASEHOLD_OWNER; exec sleep 100");
    let first = running.first.clone();
    let (token, owner) = first.split_once(' ').unwrap();

    let list = place.run(["ls"]);
    let lines: Vec<&str> = text(&list.stdout).lines().collect();
    let [heading, line] = lines[..] else { panic!("{lines:?}") };
    assert_eq!(heading.split_whitespace().next(), Some("NAME"));
    assert_eq!(heading.find("TOKEN"), line.find(token), "{lines:?}");
    assert_eq!(heading.find("LABEL"), line.find("nightly\\u{1b}[31m"), "{lines:?}");
    assert!(line.contains(&format!(":{}", running.pid())), "{line}");

    let json: serde_json::Value = serde_json::from_slice(&place.run(["ls", "--json", "x"]).stdout).unwrap();
    assert_eq!((&json["name"], &json["held"]), (&"x".into(), &true.into()));
    assert_eq!(json["holder"]["token"].to_string(), token);
    assert_eq!(json["holder"]["pid"], running.pid());
    assert_eq!(text(&place.run(["ls", "--json", "other"]).stdout), "");

    let show = place.run(["show", "x"]);
    for part in ["held", token, owner, "nightly\\u{1b}[31m", "ticket=42"] {
        assert!(text(&show.stdout).contains(part), "{part}: {}", text(&show.stdout));
    }
    assert!(!text(&show.stdout).contains('\x1b'));
    running.signal(Signal::TERM);
    running.end();
    let free = text(&place.run(["show", "x"]).stdout).to_owned();
    assert!(free.contains("free") && free.contains(token), "{free}");
    assert_eq!(place.run(["show", ""]).status.code(), Some(64));
}

#[test]
fn the_owner_of_a_run_is_shown_and_the_command_still_finds_its_claim() {
    let place = Place::new();
    let running = place.start(&["--owner", "nightly 17"], "echo $LEASEHOLD_OWNER; exec sleep 100");
    let holder = &place.show()["holder"];
    assert_eq!((&holder["owner"], &holder["claim"]), (&"nightly 17".into(), &running.first.clone().into()));
    let show = place.run(["show", "x", "y"]);
    let process = format!("holder      nightly 17\nprocess     {}:", holder["host"].as_str().unwrap());
    assert!(text(&show.stdout).contains(&process), "{}", text(&show.stdout));
    assert!(text(&show.stdout).contains("\n\nname        y\nstate       free\n"), "{}", text(&show.stdout));
    for names in [&[][..], &["x"]] {
        let graph = place.run([&["show", "--graph"], names].concat());
        assert_eq!(text(&graph.stdout), "nobody waits\n");
        let graph = place.run([&["show", "--graph", "--json"], names].concat());
        assert_eq!(text(&graph.stdout), "{\"edges\":[],\"nodes\":[]}\n");
    }
    running.signal(Signal::TERM);
    running.end();
    for wrong in [
        &["show"][..],
        &["run", "--owner", "", "x", "--", "true"],
        &["run", "--owner", "a\nb", "x", "--", "true"],
    ] {
        assert_eq!(place.run(wrong).status.code(), Some(64), "{wrong:?}");
    }
}

#[test]
fn a_home_that_is_not_absolute_is_no_place_for_a_database() {
    let place = Place::new();
    let mut command = place.leasehold(["ls"]);
    let output = command.env_remove("LEASEHOLD_STORE").env("HOME", "here").output().unwrap();
    assert_eq!(output.status.code(), Some(125), "{output:?}");
    assert!(text(&output.stderr).contains("HOME"), "{output:?}");
    assert!(!place.path("here").exists());
}

#[test]
fn a_label_with_a_control_character_of_eight_bits_does_nothing_to_the_terminal() {
    let place = Place::new();
    let running = place.start(&["--label", "a\u{9b}31m\u{202e}b"], "echo; exec sleep 100");
    for arguments in [&["ls"][..], &["ls", "--json"], &["show", "x"], &["show", "--json", "x"]] {
        let output = place.run(arguments);
        assert!(!text(&output.stdout).contains(['\u{9b}', '\u{202e}']), "{arguments:?}");
    }
    let busy = place.run(["run", "--json", "-n", "x", "--", "true"]);
    assert!(!text(&busy.stderr).contains(['\u{9b}', '\u{202e}']));
    assert_eq!(place.show()["holder"]["label"], "a\u{9b}31m\u{202e}b");
    running.signal(Signal::TERM);
    running.end();
}

#[test]
fn a_listing_of_several_pages_is_whole_and_a_strange_name_is_told_by_its_bytes() {
    use std::os::unix::ffi::OsStrExt as _;
    let place = Place::new();
    let url = place.url();
    let locks = leasehold::blocking::connect(&url).unwrap();
    let held: Vec<_> = (0..1203).map(|n| locks.mutex(format!("n{n:04}")).lock().unwrap()).collect();
    let strange = locks.mutex(b"z\xff\n").lock().unwrap();
    let list = place.run(["ls", "--json", "n"]);
    let names: Vec<String> = text(&list.stdout)
        .lines()
        .map(|line| {
            serde_json::from_str::<serde_json::Value>(line).unwrap()["name"].as_str().unwrap().to_owned()
        })
        .collect();
    assert_eq!(names, (0..1203).map(|n| format!("n{n:04}")).collect::<Vec<_>>());
    let list =
        place.run([std::ffi::OsStr::new("ls"), "--json".as_ref(), std::ffi::OsStr::from_bytes(b"z\xff")]);
    let json: serde_json::Value = serde_json::from_slice(&list.stdout).unwrap();
    assert_eq!((&json["name"], &json["name_hex"]), (&"z\\xff\\u{a}".into(), &"7aff0a".into()));
    drop((held, strange));
}

#[test]
fn doctor_says_whether_locks_work_here() {
    let place = Place::new();
    let output = place.run(["doctor"]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert!(text(&output.stdout).contains("As it should be"), "{}", text(&output.stdout));
    for line in text(&place.run(["doctor", "--json"]).stdout).lines() {
        let finding: serde_json::Value = serde_json::from_str(line).unwrap();
        assert!(
            finding["check"].is_string() && finding["severity"].is_string() && finding["meaning"].is_string()
        );
    }
    for store in ["sqlite:/proc/none/x.db", "redis://me:s3cr3t@127.0.0.1:1/", "nonsense:"] {
        let output = place.run(["--store", store, "doctor"]);
        assert_eq!(output.status.code(), Some(1), "{store}");
        assert!(text(&output.stdout).contains("Locks do not work"), "{store}");
        assert!(!text(&output.stdout).contains("s3cr3t"), "{store}");
    }
}

#[test]
fn help_completions_and_manual_know_every_option() {
    let options = [
        "--nonblock",
        "--wait",
        "--conflict-exit-code",
        "--ttl",
        "--kill-after",
        "--hold-at-least",
        "--on-lost",
        "--label",
        "--owner",
        "--meta",
        "--quiet-if-busy",
        "--status-fd",
        "--json",
        "--store",
        "-n",
        "-w",
        "-E",
        "-k",
        "-c",
    ];
    let say = |arguments: &[&str]| {
        let output = Command::new(LEASEHOLD).args(arguments).output().unwrap();
        assert_eq!(output.status.code(), Some(0), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    let help = say(&["run", "--help"]);
    for part in options.into_iter().chain(["Exit codes:", "Examples:", "LEASEHOLD_LOST_FD", "123"]) {
        assert!(help.contains(part), "{part}");
    }
    assert!(say(&["--help"]).contains("Examples:"));
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let script = say(&["completions", shell]);
        assert!(script.contains("hold-at-least") && script.contains("doctor"), "{shell}");
    }
    assert!(say(&["man"]).contains(".TH leasehold 1"));
    let folder = tempfile::tempdir().unwrap();
    say(&["man", folder.path().to_str().unwrap()]);
    let page = fs::read_to_string(folder.path().join("leasehold-run.1")).unwrap().replace('\\', "");
    for option in options {
        assert!(page.contains(option), "{option}");
    }
    for page in ["leasehold.1", "leasehold-ls.1", "leasehold-show.1", "leasehold-doctor.1"] {
        assert!(folder.path().join(page).exists(), "{page}");
    }
}
