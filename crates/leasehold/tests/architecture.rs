//! Holds what ARCHITECTURE.md says: imports go one way, `cfg` has few homes, and files stay short.
#![allow(clippy::unwrap_used, reason = "a test")]

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// What each room may import. `root` is the face that `lib.rs` puts together.
const MAY_IMPORT: &[(&str, &[&str])] = &[
    ("types", &[]),
    ("clock", &["types"]),
    ("error", &["types"]),
    ("store", &["types", "error", "clock"]),
    ("fence", &["types", "error"]),
    ("retry", &["types", "error", "clock"]),
    ("stores", &["types", "error", "store", "clock", "fence"]),
    ("lease", &["types", "error", "store", "clock"]),
    ("conformance", &["types", "error", "store", "clock", "lease"]),
    ("cell", &["types", "error", "store", "clock", "lease"]),
    ("keeper", &["types", "error", "store", "clock", "lease", "cell"]),
    ("deadlock", &["types", "error", "store", "clock"]),
    ("wait", &["types", "error", "store", "clock", "retry", "lease", "cell", "keeper", "deadlock"]),
    ("local", &["types", "error", "store", "clock", "retry", "lease", "cell", "keeper", "wait"]),
    ("guard", &["types", "error", "store", "clock", "retry", "lease", "cell", "keeper", "local"]),
    (
        "mutex",
        &["types", "error", "store", "clock", "retry", "lease", "cell", "keeper", "wait", "local", "guard"],
    ),
    (
        "set",
        &[
            "types", "error", "store", "clock", "retry", "lease", "cell", "keeper", "wait", "local", "guard",
            "mutex",
        ],
    ),
    ("striped", &["types", "error", "mutex", "set"]),
    (
        "locks",
        &[
            "types", "error", "store", "clock", "retry", "lease", "cell", "keeper", "wait", "local", "guard",
            "mutex", "set", "striped",
        ],
    ),
    (
        "url",
        &[
            "types", "error", "store", "clock", "retry", "lease", "keeper", "wait", "guard", "mutex",
            "locks", "stores",
        ],
    ),
    (
        "blocking",
        &[
            "types", "error", "clock", "retry", "lease", "guard", "mutex", "set", "striped", "locks", "url",
            "root",
        ],
    ),
];

/// Where conditions on features and platforms may stand.
const CFG_HOMES: &[&str] = &[
    "leasehold/src/lib.rs",
    "leasehold/src/stores/mod.rs",
    "leasehold/src/url.rs",
    "leasehold/src/clock.rs",
    "leasehold-cli/src/child.rs",
    "leasehold-cli/src/child/",
];

const MOST_LINES: usize = 700;

fn crates() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

/// All Rust files below `folder`, as (path from `folder`, text).
fn sources(folder: &Path) -> Vec<(String, String)> {
    let mut found = Vec::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(next) = folders.pop() {
        for entry in fs::read_dir(&next).unwrap_or_else(|error| panic!("{}: {error}", next.display())) {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let name = path.strip_prefix(folder).unwrap().to_string_lossy().replace('\\', "/");
                found.push((name, fs::read_to_string(&path).unwrap()));
            }
        }
    }
    found.sort();
    found
}

/// The code without comments and without the unit tests at its end, which may use what they like.
fn production(text: &str) -> String {
    let code = text.split("#[cfg(test)]\nmod tests").next().unwrap_or_default();
    code.lines().map(|line| line.split("//").next().unwrap_or_default()).collect::<Vec<_>>().join("\n")
}

fn first_word(text: &str) -> &str {
    let text = text.trim_start();
    let end = text.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(text.len());
    &text[..end]
}

/// The first words of what stands in a `{...}` group, or the one word of a path without a group.
fn heads(path: &str) -> Vec<&str> {
    let path = path.trim_start();
    let Some(group) = path.strip_prefix('{') else { return vec![first_word(path)] };
    let (mut depth, mut start, mut heads) = (0, 0, Vec::new());
    for (at, c) in group.char_indices() {
        match c {
            '{' => depth += 1,
            ',' if depth == 0 => {
                heads.push(first_word(&group[start..at]));
                start = at + 1;
            }
            '}' if depth == 0 => {
                heads.push(first_word(&group[start..at]));
                break;
            }
            '}' => depth -= 1,
            _ => {}
        }
    }
    heads.retain(|head| !head.is_empty());
    heads
}

/// The rooms that the code of a file names by a path from the root of the crate. `depth` is how many `super`s lead there.
fn imports(code: &str, depth: usize) -> BTreeSet<String> {
    let is_room = |word: &str| MAY_IMPORT.iter().any(|(room, _)| *room == word);
    let mut found = BTreeSet::new();
    for (at, _) in code.match_indices("crate::") {
        if code[..at].ends_with(|c: char| c.is_alphanumeric() || c == '_') {
            continue;
        }
        for head in heads(&code[at + "crate::".len()..]) {
            found.insert(if is_room(head) { head.to_owned() } else { "root".to_owned() });
        }
    }
    let to_root = "super::".repeat(depth);
    for (at, _) in code.match_indices(&to_root) {
        // A module inside the file reaches the file's own items this way: only rooms count here.
        let heads = heads(&code[at + to_root.len()..]);
        found.extend(heads.into_iter().filter(|head| is_room(head)).map(str::to_owned));
    }
    found
}

/// The room of a file, and how many `super`s lead from it to the root of the crate.
fn room(file: &str) -> (&str, usize) {
    let module = file.strip_suffix(".rs").unwrap_or(file);
    let module = module.strip_suffix("/mod").unwrap_or(module);
    (module.split('/').next().unwrap_or(module), module.split('/').count())
}

/// What is wrong with the imports of one file, if anything.
fn back_edges(file: &str, text: &str) -> Vec<String> {
    let (room, depth) = room(file);
    if room == "lib" {
        return Vec::new();
    }
    let Some((_, allowed)) = MAY_IMPORT.iter().find(|(known, _)| *known == room) else {
        return vec![format!(
            "{file}: the room {room} has no place in MAY_IMPORT and in ARCHITECTURE.md yet"
        )];
    };
    let imported = imports(&production(text), depth);
    let wrong = imported.iter().filter(|name| *name != room && !allowed.contains(&name.as_str()));
    wrong.map(|name| format!("{file}: {room} may not import {name}")).collect()
}

/// A store that names another one, such as sqlite naming redis.
fn crossing_stores(file: &str, text: &str) -> Vec<String> {
    let Some(own) = file.strip_prefix("stores/").filter(|file| *file != "mod.rs") else { return Vec::new() };
    let own = first_word(own);
    let code = production(text);
    let named = code.match_indices("crate::stores::").flat_map(|(at, path)| heads(&code[at + path.len()..]));
    named
        .filter(|name| *name != own)
        .map(|name| format!("{file}: {own} may not import the store {name}"))
        .collect()
}

/// Lines with a condition on features or platforms, except for tests.
fn stray_cfgs(file: &str, text: &str) -> Vec<String> {
    if CFG_HOMES.iter().any(|home| file == *home || home.ends_with('/') && file.starts_with(home)) {
        return Vec::new();
    }
    let code = production(text).replace("cfg(test)", "");
    let lines =
        code.lines().filter(|line| ["cfg(", "cfg!(", "cfg_attr("].iter().any(|cfg| line.contains(cfg)));
    lines.map(|line| format!("{file}: {} belongs into one of {CFG_HOMES:?}", line.trim())).collect()
}

#[test]
fn imports_go_one_way() {
    let sources = sources(&crates().join("leasehold/src"));
    assert!(sources.len() > 5, "found the sources");
    let wrong: Vec<_> = sources
        .iter()
        .flat_map(|(file, text)| back_edges(file, text).into_iter().chain(crossing_stores(file, text)))
        .collect();
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn the_table_of_imports_has_no_cycle() {
    // Take away what needs nothing that is left, again and again: only a cycle stays.
    let mut left: Vec<_> = MAY_IMPORT.iter().collect();
    while !left.is_empty() {
        let names: Vec<_> = left.iter().map(|(room, _)| *room).collect();
        left.retain(|(_, allowed)| allowed.iter().any(|name| names.contains(name)));
        assert!(left.len() < names.len(), "a cycle among {names:?}");
    }
}

#[test]
fn conditions_on_features_and_platforms_stand_in_few_files() {
    let all = sources(&crates());
    let sources = all.iter().filter(|(file, _)| file.contains("/src/"));
    let wrong: Vec<_> = sources.flat_map(|(file, text)| stray_cfgs(file, text)).collect();
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn no_file_is_too_long() {
    let long: Vec<_> = sources(&crates())
        .into_iter()
        .map(|(file, text)| (file, text.lines().count()))
        .filter(|(_, lines)| *lines > MOST_LINES)
        .collect();
    assert!(long.is_empty(), "more than {MOST_LINES} lines: {long:?}");
}

#[test]
fn planted_violations_are_found() {
    let bad = "use crate::{types::Name, keeper::{self, Keeper}, error};\n// crate::locks in a comment\nuse crate::Locks;\n";
    let found = ["lease.rs: lease may not import keeper", "lease.rs: lease may not import root"];
    assert_eq!(back_edges("lease.rs", bad), found);
    assert_eq!(back_edges("stores/sqlite/mod.rs", "fn f() { crate::lease::drift() }").len(), 1);
    assert_eq!(
        back_edges("stores/redis/look.rs", "use super::super::super::{types, guard::Guard};").len(),
        1
    );
    assert_eq!(back_edges("error.rs", "use super::store::Store;"), ["error.rs: error may not import store"]);
    assert_eq!(back_edges("novelty.rs", "").len(), 1);
    assert_eq!(
        crossing_stores("stores/sqlite/mod.rs", "use crate::stores::{redis::RedisStore, sqlite};").len(),
        1
    );
    let cfgs = "#[cfg(feature = \"redis\")]\nif cfg!(unix) {}\n#[cfg_attr(x, y)]\n";
    assert_eq!(stray_cfgs("leasehold/src/keeper.rs", cfgs).len(), 3);
}

#[test]
fn what_is_allowed_is_not_reported() {
    let good = "use crate::clock::{self, Instant};\nuse super::Instant as Own;\n\
                #[cfg(test)]\nmod tests {\n use crate::keeper;\n}\n";
    assert_eq!(back_edges("lease.rs", good), [""; 0]);
    assert_eq!(stray_cfgs("leasehold/src/lease.rs", good), [""; 0]);
    assert_eq!(stray_cfgs("leasehold/src/url.rs", "#[cfg(feature = \"redis\")]"), [""; 0]);
    assert_eq!(crossing_stores("stores/redis/look.rs", "use crate::stores::redis::RedisStore;"), [""; 0]);
}
