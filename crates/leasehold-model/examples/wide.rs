//! Settings that are too large for a test, one at a time, and the shortest way to a counterexample:
//!
//! ```sh
//! cargo run --release -p leasehold-model --example wide              # which there are
//! cargo run --release -p leasehold-model --example wide -- claims    # all states of one, with their number
//! cargo run --release -p leasehold-model --example wide -- forgets   # two holders, step by step
//! ```

use std::collections::BTreeSet;

use leasehold_model::{Quorum, Setting};
use stateright::{Checker, HasDiscoveries, Model};

/// Some 3 GiB of states: beyond this the run ends and says that it did not see all.
const MOST_STEPS: usize = 300_000_000;

fn explore<const C: usize, const N: usize>(setting: Setting<C, N>) {
    let named = setting.named;
    let until =
        if named { HasDiscoveries::AnyOf(BTreeSet::from(["one_holder"])) } else { HasDiscoveries::All };
    let checker = Quorum::new(setting)
        .checker()
        .threads(2)
        .finish_when(until)
        .target_state_count(MOST_STEPS)
        .spawn_bfs()
        .join();
    let all = checker.state_count() < MOST_STEPS;
    println!(
        "{} states, {} steps between them, {} deep{}",
        checker.unique_state_count(),
        checker.state_count(),
        checker.max_depth(),
        if all { "" } else { ": NOT ALL" }
    );
    for (name, path) in checker.discoveries() {
        println!("{} {name}", checker.discovery_classification(name));
        if named && name == "one_holder" {
            for (state, step) in path.into_vec() {
                println!("{step:?}");
                for side in &state.sides {
                    println!("    {:?} {:?} {:?}", side.node.holder, side.records, side.network);
                }
            }
        }
    }
}

fn main() {
    let late = Setting::<2, 3> { claims: [2, 1], ttl: 2, drift: 0, second_rounds: 1, ..Setting::new() };
    let claims = Setting::<2, 3> { claims: [2, 2], message_life: Some(0), ..late.clone() };
    let renewals =
        Setting::<2, 3> { claims: [2, 1], renewals: 1, top_ups: 1, message_life: Some(0), ..Setting::new() };
    let top_ups = Setting::<2, 3> { renewals: 2, top_ups: 1, ..Setting::new() };
    let restarts = Setting::<2, 3> {
        renewals: 1,
        restarts: 1,
        restart_delay: 2,
        message_life: Some(1),
        ..Setting::new()
    };
    let clients = Setting::<3, 3> { ttl: 2, drift: 0, message_life: Some(1), ..Setting::new() };
    let nodes = Setting::<2, 5> { ttl: 2, drift: 0, message_life: Some(1), ..Setting::new() };
    let rounds =
        Setting::<3, 3> { second_rounds: 2, ttl: 2, drift: 0, message_life: Some(0), ..Setting::new() };
    let forgets = Setting::<2, 3> { restarts: 1, named: true, ..Setting::new() };
    match std::env::args().nth(1).as_deref() {
        Some("late") => explore(late),
        Some("claims") => explore(claims),
        Some("renewals") => explore(renewals),
        Some("top_ups") => explore(top_ups),
        Some("restarts") => explore(restarts),
        Some("clients") => explore(clients),
        Some("nodes") => explore(nodes),
        Some("rounds") => explore(rounds),
        Some("forgets") => explore(forgets),
        _ => println!("late claims renewals top_ups restarts clients nodes rounds forgets"),
    }
}
