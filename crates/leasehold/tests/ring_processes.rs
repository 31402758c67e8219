//! A node is added to a ring while processes go on locking, some with the setting before, some with the next one: the
//! judge of histories finds no two holders and no token that steps back.
//!
//! The other processes are this same test program, told by its environment to be `another_process`.

#![allow(clippy::disallowed_methods, clippy::unwrap_used)]

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use leasehold::{Released, Status, clock, connect};
use leasehold_chaos::checker::{
    History, Hold, boot_nanos, first_overlap, first_token_step_back, read_histories,
};
use leasehold_chaos::servers::RedisServer;
use pollster::block_on;

mod processes;
mod ring_nodes;
use processes::{Process, say};

const NAMES: usize = 3;
const ROUNDS: usize = 80;

/// Locks at random, writing each hold down, as often as each line of its input asks for. No test of its own.
#[test]
fn another_process() {
    let Ok(url) = std::env::var("LEASEHOLD_TEST_TASK") else { return };
    let folder = PathBuf::from(std::env::var("LEASEHOLD_TEST_PATH").unwrap());
    let names: Vec<_> =
        std::fs::read_to_string(folder.join("names")).unwrap().lines().map(String::from).collect();
    let locks = block_on(connect(&url)).unwrap();
    let mut histories: HashMap<&str, History> = HashMap::new();
    for name in &names {
        let path = folder.join(name).join(std::process::id().to_string());
        histories.insert(name, History::append_to(&path).unwrap());
    }
    say("ready");
    let mut order = String::new();
    while std::io::stdin().read_line(&mut order).unwrap() > 0 {
        for _ in 0..ROUNDS {
            let at =
                usize::try_from(clock::jitter(Duration::from_nanos(names.len() as u64)).as_nanos()).unwrap();
            let name = &names[at.min(names.len() - 1)];
            let guard = block_on(locks.mutex(name).lock()).unwrap();
            let start = boot_nanos();
            block_on(clock::sleep(clock::jitter(Duration::from_micros(500))));
            let hold = Hold { start, end: boot_nanos(), token: guard.fencing_token().get() };
            assert_eq!(guard.status(), Status::Held);
            histories.get_mut(name.as_str()).unwrap().record(hold).unwrap();
            assert_eq!(block_on(guard.unlock()).unwrap(), Released::Released);
        }
        say("done");
    }
}

fn start(url: &str, folder: &Path, count: usize) -> Vec<Process> {
    let one = |_| {
        Process::start_by(&mut Command::new(std::env::current_exe().unwrap()), url, folder, Duration::ZERO)
    };
    let mut all: Vec<_> = (0..count).map(one).collect();
    for process in &mut all {
        assert_eq!(process.line(), "ready");
    }
    all
}

/// All of them lock at once, and again.
fn contend(groups: &mut [&mut Vec<Process>]) {
    for process in groups.iter_mut().flat_map(|group| group.iter_mut()) {
        process.tell("go");
    }
    for process in groups.iter_mut().flat_map(|group| group.iter_mut()) {
        assert_eq!(process.line(), "done");
    }
}

#[test]
fn a_node_is_added_and_removed_under_contention_without_two_holders() {
    let servers = [RedisServer::start(), RedisServer::start(), RedisServer::start()];
    let [a, b, c] = [0, 1, 2].map(|at: usize| servers[at].url());
    let folder = tempfile::tempdir().unwrap();
    let mut names = ring_nodes::moving_names(&[&a, &b], &[&a, &b, &c], NAMES + 1);
    let kept = names.remove(NAMES);
    std::fs::write(folder.path().join("names"), names.join("\n")).unwrap();
    for name in &names {
        std::fs::create_dir(folder.path().join(name)).unwrap();
    }
    let [before, during, after] = ring_nodes::phases(&a, &b, &c);
    let leaving = format!("ring:?node={a}&node={b}&removing={c}");

    let locks = block_on(connect(&during)).unwrap();
    let kept_guard = block_on(locks.mutex(&kept).lock()).unwrap();
    let mut old = start(&before, folder.path(), 2);
    let mut between = start(&during, folder.path(), 2);
    contend(&mut [&mut old, &mut between]);
    drop(old);
    let mut new = start(&after, folder.path(), 2);
    contend(&mut [&mut between, &mut new]);
    drop(between);
    // And back: the node goes again.
    let mut between = start(&leaving, folder.path(), 2);
    contend(&mut [&mut new, &mut between]);
    drop(new);
    let mut old = start(&before, folder.path(), 2);
    contend(&mut [&mut between, &mut old]);
    assert_eq!(block_on(kept_guard.unlock()).unwrap(), Released::Released);

    let mut count = 0;
    for name in &names {
        let mut holds = read_histories(&folder.path().join(name)).unwrap();
        count += holds.len();
        assert_eq!(first_overlap(&mut holds), None, "{name}");
        assert_eq!(first_token_step_back(&mut holds), None, "{name}");
    }
    assert_eq!(count, 4 * 4 * ROUNDS);
}
