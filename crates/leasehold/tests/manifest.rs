//! The minimum supported version of Rust: stated once by the manifest, said the same everywhere else, and kept by
//! everything that is depended on.
#![allow(clippy::unwrap_used, reason = "a test")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2).unwrap().to_owned()
}

fn read(file: &str) -> String {
    let path = workspace().join(file);
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// `1.89` as (1, 89), also from the beginning of a longer text such as `1.89.0`.
fn version(text: &str) -> Option<(u32, u32)> {
    let mut numbers = text.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

fn stated() -> (u32, u32) {
    version(env!("CARGO_PKG_RUST_VERSION")).expect("the manifest states rust-version")
}

/// Every version of Rust that a text names: `Rust 1.89`, `rust-1.89` as in a badge, `msrv = "1.89"`.
fn named(text: &str) -> Vec<(u32, u32)> {
    let text = text.to_lowercase().replace("%20", " ");
    let mentions = ["rust 1.", "rust-1.", "msrv = \"1."];
    let found = mentions.iter().flat_map(|mention| {
        text.match_indices(mention).map(|(at, mention)| version(&text[at + mention.len() - "1.".len()..]))
    });
    found.flatten().collect()
}

#[test]
fn the_minimum_version_of_rust_is_the_same_wherever_it_is_named() {
    for file in ["README.md", "CONTRIBUTING.md"] {
        let named = named(&read(file));
        assert!(!named.is_empty(), "{file} does not say which Rust is needed, as in: Rust 1.89 or later");
        assert!(
            named.iter().all(|version| *version == stated()),
            "{file} names {named:?}, the manifest {:?}",
            stated()
        );
    }
    // Clippy takes it from the manifest unless its own file says otherwise.
    assert!(named(&read("clippy.toml")).iter().all(|version| *version == stated()));
}

#[test]
fn everything_that_is_depended_on_builds_with_that_rust() {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version", "1", "--locked", "--all-features"])
        .current_dir(workspace())
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metadata: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let packages = metadata["packages"].as_array().unwrap();
    assert!(packages.len() > 20);
    for package in packages {
        let (name, needs) = (&package["name"], package["rust_version"].as_str().and_then(version));
        assert!(needs <= Some(stated()), "{name} needs Rust {needs:?}, the manifest states {:?}", stated());
        let ours = package["source"].is_null();
        assert!(!ours || needs == Some(stated()), "{name} states {needs:?} and not that of the workspace");
    }
}

#[test]
fn versions_are_found_in_texts() {
    let mut found = named("needs Rust 1.89 or later; badge/rust-1.88%2B; msrv = \"1.7\"");
    found.sort_unstable();
    assert_eq!(found, [(1, 7), (1, 88), (1, 89)]);
    assert_eq!(named("nothing of rust"), []);
    assert_eq!(version("1.89.0"), Some((1, 89)));
}
