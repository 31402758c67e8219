//! What a client does. Each step may come at any time, or never: so a client can stop between any two.

use crate::setting::{Mutation, Setting};
use crate::state::{Claim, Message, Phase, Record, State};

/// The claim that the client stands by, or made last.
pub fn claim<const C: usize, const N: usize>(state: &State<C, N>, client: usize) -> Claim {
    #[expect(clippy::cast_possible_truncation, reason = "a handful of clients")]
    Claim { client: client as u8, number: state.clients[client].number }
}

/// For how many ticks the client believes that it holds the lock: the q-th largest of what it trusts at the nodes.
pub fn validity<const C: usize, const N: usize>(
    setting: &Setting<C, N>,
    state: &State<C, N>,
    client: usize,
) -> u8 {
    if state.clients[client].phase != Phase::Holding {
        return 0;
    }
    let mut left: Vec<u8> = trusted(state, client).map(|record| record.left).collect();
    let needed =
        if setting.lacks(Mutation::MajorityOfHeld) { left.len() / 2 + 1 } else { setting.majority() };
    left.sort_unstable();
    left.len().checked_sub(needed).map_or(0, |place| left[place])
}

fn trusted<const C: usize, const N: usize>(
    state: &State<C, N>,
    client: usize,
) -> impl Iterator<Item = Record> {
    state.sides.iter().filter_map(move |side| side.records[client]).filter(|record| record.left > 0)
}

/// Round 1: a new claim is presented to all nodes in parallel. Its ballot is larger than any token or ballot that the
/// client has seen or used, and not before its wall clock.
pub fn begin<const C: usize, const N: usize>(
    setting: &Setting<C, N>,
    state: &mut State<C, N>,
    client: usize,
) {
    let me = &mut state.clients[client];
    me.phase = Phase::Trying;
    me.begun += 1;
    if !setting.lacks(Mutation::ClaimUsedAgain) || me.number == 0 {
        me.number += 1;
    }
    me.ballot = (me.seen + 1).max(setting.wall[client] + state.now * setting.tokens_per_tick);
    me.seen = me.ballot;
    present(state, client, |_| true);
}

/// Round 2: a majority granted, but not all of it stored the ballot. The claim is presented again to the nodes that
/// granted, with a ballot larger than what they answered.
pub fn second_round<const C: usize, const N: usize>(state: &mut State<C, N>, client: usize) {
    let largest = state.sides.iter().filter_map(|side| side.records[client]).map(|record| record.token).max();
    let me = &mut state.clients[client];
    me.second_rounds += 1;
    me.ballot = largest.unwrap_or_default() + 1;
    me.seen = me.seen.max(me.ballot);
    present(state, client, |record| record.is_some());
}

/// Whether a second round is called for.
pub fn may_go_on<const C: usize, const N: usize>(
    setting: &Setting<C, N>,
    state: &State<C, N>,
    client: usize,
) -> bool {
    let me = &state.clients[client];
    me.phase == Phase::Trying
        && me.second_rounds < setting.second_rounds
        && trusted(state, client).count() >= setting.majority()
}

fn present<const C: usize, const N: usize>(
    state: &mut State<C, N>,
    client: usize,
    to: impl Fn(Option<Record>) -> bool,
) {
    let (claim, ballot) = (claim(state, client), state.clients[client].ballot);
    for side in state.sides.iter_mut().filter(|side| to(side.records[client])) {
        side.network.push(Message::Present { claim, ballot, age: 0 });
    }
}

/// An answer came. While trying, a majority that stored exactly the ballot, and is still valid, wins; while holding, it is
/// a late grant, a top-up or a renewal, and belongs to the hold.
pub fn answered<const C: usize, const N: usize>(
    setting: &Setting<C, N>,
    state: &mut State<C, N>,
    (client, side): (usize, usize),
    (token, left): (u8, u8),
) {
    let me = &mut state.clients[client];
    me.seen = me.seen.max(token);
    let trying = me.phase == Phase::Trying;
    let record = &mut state.sides[side].records[client];
    *record = Some(match *record {
        // What a second round answers counts alone; afterwards each answer tells a time that the node keeps to.
        Some(known) if trying => known.max(Record { token, left }),
        Some(known) => Record { token, left: left.max(known.left) },
        None => Record { token, left },
    });
    if trying {
        win_or_wait(setting, state, client);
    }
}

fn win_or_wait<const C: usize, const N: usize>(
    setting: &Setting<C, N>,
    state: &mut State<C, N>,
    client: usize,
) {
    let ballot = state.clients[client].ballot;
    let largest_wins = setting.lacks(Mutation::LargestAnswerWins);
    let count = trusted(state, client).filter(|record| largest_wins || record.token == ballot).count();
    if count < setting.majority() {
        return;
    }
    let largest = trusted(state, client).map(|record| record.token).max().unwrap_or(ballot);
    let token = if largest_wins { largest } else { ballot };
    let claim = claim(state, client);
    let stored = |hold: &crate::state::Hold| hold.claim == claim && hold.token == token;
    let holding = state.sides.iter().filter(|side| side.node.holder.as_ref().is_some_and(stored)).count();
    state.majority_broken |= holding < N / 2 + 1;
    state.order_broken |= token <= state.largest_won;
    state.largest_won = state.largest_won.max(token);
    state.clients[client].phase = Phase::Holding;
    state.clients[client].ballot = token;
}

/// A renewal: to all nodes where the claim has a token, in parallel. It counts where a majority of all nodes is valid.
pub fn renew<const C: usize, const N: usize>(state: &mut State<C, N>, client: usize) {
    state.clients[client].renewals += 1;
    let claim = claim(state, client);
    for side in &mut state.sides {
        if let Some(Record { token, .. }) = side.records[client] {
            side.network.push(Message::Renew { claim, token, age: 0 });
        }
    }
}

/// A top-up: a node that missed the grant, or forgot it, is presented the claim with its token.
pub fn top_up<const C: usize, const N: usize>(state: &mut State<C, N>, client: usize, side: usize) {
    state.clients[client].top_ups += 1;
    let (claim, ballot) = (claim(state, client), state.clients[client].ballot);
    state.sides[side].network.push(Message::Present { claim, ballot, age: 0 });
}

/// Unlock, loss or defeat: the claim is released on every node, also on those that never answered, and forgotten.
pub fn end<const C: usize, const N: usize>(setting: &Setting<C, N>, state: &mut State<C, N>, client: usize) {
    let claim = claim(state, client);
    let granted_only = setting.lacks(Mutation::ReleaseOnlyGranted);
    for side in &mut state.sides {
        if side.records[client].take().is_some() || !granted_only {
            side.network.push(Message::Release { claim });
        }
    }
    let me = &mut state.clients[client];
    me.phase = if me.phase == Phase::Trying { Phase::Defeated } else { Phase::Idle };
    (me.ballot, me.second_rounds, me.renewals, me.top_ups) = (0, 0, 0, 0);
}
