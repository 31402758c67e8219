//! Every state that the quorum protocol can reach within the bounds of a setting, and the same with one rule left out.
//!
//! `cargo test -p leasehold-model -- --nocapture` prints how many states each setting has. What the settings mean, and
//! what they do not show, is in `docs/quorum-model.md`.
#![allow(clippy::unwrap_used, reason = "a test")]

use std::collections::BTreeSet;

use leasehold_model::{Mutation, Quorum, Setting};
use stateright::{Checker, HasDiscoveries, Model};

/// More than the largest setting has: a model that outgrew it would take too long and too much memory.
const MOST_STATES: usize = 12_000_000;

const INVARIANTS: [&str; 4] = ["one_holder", "token_order", "token_on_majority", "no_orphan"];
const ONE_ROUND: &str = "won in one round";
const SECOND_ROUND: &str = "won by a second round";
const DEFEATED: &str = "defeated";
const SPLIT: &str = "no majority for anybody";
const LATE: &str = "granted after the claim was given up";
const LATE_KEPT: &str = "a late grant belongs to the hold";
const RENEWED: &str = "renewed while another claim has one of its nodes";
const TOPPED_UP: &str = "topped up";

type Found = BTreeSet<&'static str>;

/// Looks at all states; which properties have an example (a `sometimes`) or a counterexample (an `always`).
fn explore<const C: usize, const N: usize>(what: &str, setting: Setting<C, N>) -> Found {
    let checker = Quorum::new(setting)
        .checker()
        .threads(2)
        .finish_when(HasDiscoveries::All)
        .target_state_count(MOST_STATES)
        .spawn_bfs()
        .join();
    println!(
        "{what}: {} states, {} steps between them, {} deep",
        checker.unique_state_count(),
        checker.state_count(),
        checker.max_depth()
    );
    assert!(checker.state_count() < MOST_STATES, "{what}: not all states were looked at");
    checker.discoveries().into_keys().collect()
}

/// All states keep all invariants, and each of the situations in `reached` is among them.
fn holds<const C: usize, const N: usize>(what: &str, setting: Setting<C, N>, reached: &[&str]) {
    let found = explore(what, setting);
    let broken: Vec<_> = INVARIANTS.iter().filter(|name| found.contains(*name)).collect();
    assert!(broken.is_empty(), "{what}: there is a counterexample to {broken:?}");
    for situation in reached {
        assert!(found.contains(situation), "{what}: no state is reached in which: {situation}");
    }
}

/// Some state breaks that invariant.
fn breaks<const C: usize, const N: usize>(what: &str, setting: Setting<C, N>, invariant: &'static str) {
    assert!(INVARIANTS.contains(&invariant));
    let checker = Quorum::new(setting)
        .checker()
        .threads(2)
        .finish_when(HasDiscoveries::AnyOf(BTreeSet::from([invariant])))
        .target_state_count(MOST_STATES)
        .spawn_bfs()
        .join();
    let counterexample = checker.discovery(invariant);
    let steps = counterexample.map(|path| path.into_actions().len());
    println!("{what}: {invariant} broken in {steps:?} steps, {} states seen", checker.unique_state_count());
    assert!(steps.is_some(), "{what}: no counterexample to {invariant} was found");
}

/// Two clients with a claim each, three nodes, messages that come at any time or never.
fn plain() -> Setting<2, 3> {
    Setting::new()
}

fn renewed() -> Setting<2, 3> {
    Setting { renewals: 1, ..plain() }
}

/// One client has a second claim; messages arrive in the tick in which they were sent, or never.
fn in_sequence() -> Setting<2, 3> {
    Setting { claims: [2, 1], ttl: 2, drift: 0, message_life: Some(0), ..plain() }
}

#[test]
fn one_holder_and_growing_tokens_whatever_the_messages_do() {
    holds("two clients", plain(), &[ONE_ROUND, SECOND_ROUND, DEFEATED, LATE, LATE_KEPT]);
}

#[test]
fn a_renewal_needs_a_majority_of_all_nodes_and_has_it_without_one_of_the_first() {
    holds("renewal", renewed(), &[ONE_ROUND, SECOND_ROUND, DEFEATED, LATE, LATE_KEPT, RENEWED]);
}

#[test]
fn a_node_that_missed_the_grant_is_topped_up() {
    let setting = Setting { top_ups: 1, message_life: Some(1), ..renewed() };
    holds("renewal and top-up", setting, &[SECOND_ROUND, DEFEATED, LATE, RENEWED, TOPPED_UP]);
}

#[test]
fn grants_kept_while_the_missing_ones_are_asked_for_again_are_safe() {
    let setting = Setting { top_ups: 1, ask_again: true, drift: 0, message_life: Some(0), ..plain() };
    holds("asking again", setting, &[SECOND_ROUND, DEFEATED, TOPPED_UP]);
}

#[test]
fn tokens_grow_over_several_claims() {
    holds("three claims of two clients", in_sequence(), &[ONE_ROUND, SECOND_ROUND, DEFEATED, LATE_KEPT]);
}

#[test]
fn three_clients_split_the_nodes_and_recover() {
    let setting = Setting { ttl: 2, drift: 0, message_life: Some(0), ..Setting::<3, 3>::new() };
    holds("three clients", setting, &[ONE_ROUND, SECOND_ROUND, DEFEATED, SPLIT]);
}

#[test]
fn four_nodes_split_two_and_two_and_recover() {
    let setting = Setting { ttl: 2, drift: 0, ..Setting::<2, 4>::new() };
    holds("four nodes", setting, &[ONE_ROUND, SECOND_ROUND, DEFEATED, SPLIT, LATE, LATE_KEPT]);
}

#[test]
fn clocks_far_apart_slow_tokens_but_never_repeat_them() {
    // One client's clock is ahead of two nodes by more than they take, and so is the third node's own.
    let setting = Setting { wall: [0, 3], time: [0, 0, 4], ahead: 2, message_life: Some(0), ..plain() };
    holds("clocks apart", setting, &[ONE_ROUND, SECOND_ROUND, DEFEATED]);
}

#[test]
fn a_node_that_forgets_makes_two_holders() {
    breaks("restart without data", Setting { restarts: 1, ..plain() }, "one_holder");
}

#[test]
fn a_restart_delay_shorter_than_a_lease_makes_two_holders() {
    breaks("delay too short", Setting { restarts: 1, restart_delay: 1, ..plain() }, "one_holder");
}

/// The delay is a TTL by the node's own clock, which may run fast by the drift.
fn delayed() -> Setting<2, 3> {
    Setting { restarts: 1, restart_delay: 2, ..plain() }
}

#[test]
fn a_restart_delay_of_a_lease_keeps_one_holder_but_not_the_order_of_tokens() {
    let found = explore("delay of a TTL", Setting { message_life: Some(1), ..delayed() });
    assert!(!found.contains("one_holder"), "two holders");
    assert!(found.contains("token_order"), "the order was kept: docs/quorum-model.md says it is not");
}

#[test]
fn with_clocks_that_are_right_a_restart_delay_keeps_the_order_of_tokens_too() {
    let setting = Setting { tokens_per_tick: 8, horizon: Some(6), message_life: Some(0), ..delayed() };
    let found = explore("delay of a TTL, clocks right", setting);
    assert!(!found.contains("one_holder") && !found.contains("token_order"), "{found:?}");
    assert!(
        found.contains(ONE_ROUND) && found.contains("token_on_majority"),
        "a win over a restart: {found:?}"
    );
}

#[test]
fn the_drift_is_needed() {
    breaks("no drift", plain().without(Mutation::NoDrift), "one_holder");
}

#[test]
fn a_lease_counts_from_before_the_request() {
    let setting = Setting { second_rounds: 0, wall: [0, 5], message_life: Some(1), ..plain() };
    breaks("from the answer", setting.without(Mutation::CountedFromTheAnswer), "one_holder");
}

#[test]
fn a_second_presentation_counts_for_what_is_left() {
    // The second client leaves a token behind, so that the first needs a second round; the third wins in one.
    let setting = Setting { wall: [0, 3, 9], message_life: Some(0), ..Setting::<3, 3>::new() };
    breaks("whole TTL each time", setting.without(Mutation::WholeTtlEachTime), "one_holder");
}

#[test]
fn without_a_second_round_tokens_are_no_majoritys_and_repeat() {
    breaks("largest answer", in_sequence().without(Mutation::LargestAnswerWins), "token_order");
    breaks("largest answer", plain().without(Mutation::LargestAnswerWins), "token_on_majority");
}

#[test]
fn a_ballot_must_be_larger_than_the_fence() {
    breaks("equal ballots", plain().without(Mutation::EqualBallotTaken), "token_order");
}

#[test]
fn the_fence_outlives_the_hold() {
    breaks("no fence", plain().without(Mutation::NoFence), "token_order");
}

#[test]
fn a_majority_of_the_nodes_still_held_is_not_enough() {
    breaks("majority of the held", renewed().without(Mutation::MajorityOfHeld), "one_holder");
}

#[test]
fn half_of_the_nodes_is_not_enough() {
    breaks("half", Setting::<2, 4>::new().without(Mutation::HalfIsEnough), "one_holder");
}

#[test]
fn topping_up_after_the_end_brings_back_an_old_token() {
    let setting = Setting { ttl: 2, drift: 0, second_rounds: 0, wall: [0, 5], top_ups: 2, ..plain() };
    let setting = Setting { message_life: Some(0), ..setting };
    breaks("top-up after the end", setting.without(Mutation::TopUpAfterTheEnd), "token_order");
}

#[test]
fn an_answer_after_the_end_must_not_bring_back_the_lock() {
    let setting = Setting { drift: 0, second_rounds: 0, wall: [0, 5], top_ups: 1, ..renewed() };
    let setting = Setting { message_life: Some(1), ..setting };
    breaks("the end not final", setting.without(Mutation::EndNotFinal), "token_order");
}

#[test]
fn tombstones_keep_late_presentations_out() {
    breaks("no tombstones", plain().without(Mutation::NoTombstones), "no_orphan");
}

#[test]
fn a_defeat_releases_also_where_no_answer_came_from() {
    breaks("release where granted", plain().without(Mutation::ReleaseOnlyGranted), "no_orphan");
}

#[test]
fn a_renewal_creates_nothing() {
    breaks("renewal creates", renewed().without(Mutation::RenewalCreates), "no_orphan");
}

#[test]
fn a_claim_id_is_not_used_again_after_a_defeat() {
    let setting = Setting { second_rounds: 0, wall: [0, 5], ..in_sequence() };
    breaks("claim used again", setting.without(Mutation::ClaimUsedAgain), "one_holder");
}

#[test]
fn after_a_lost_release_a_claim_is_free_a_ttl_after_its_last_presentation_arrived() {
    let ttl = plain().ttl;
    // The release is lost, the presentation comes a tick after the defeat: a TTL from the defeat is not enough.
    breaks("free within a TTL", Setting { free_within: Some(ttl), ..plain() }, "no_orphan");
    let setting = Setting { free_within: Some(ttl + 1), message_life: Some(1), ..plain() };
    holds("free within a TTL and a message's life", setting, &[DEFEATED, LATE]);
}

#[test]
fn without_raising_no_second_round_is_won() {
    // Safe, but useless: the same setting with it is that of `tokens_grow_over_several_claims`.
    let found = explore("no raise", in_sequence().without(Mutation::NoRaise));
    assert!(INVARIANTS.iter().all(|name| !found.contains(name)) && found.contains(ONE_ROUND), "{found:?}");
    assert!(!found.contains(SECOND_ROUND), "{found:?}");
}

#[test]
fn no_invariant_rests_on_the_token_in_a_renewal() {
    let found = explore("renewal without token", renewed().without(Mutation::RenewalWithoutToken));
    assert!(INVARIANTS.iter().all(|name| !found.contains(name)), "{found:?}");
}
