//! What a node does: `present` (acquire with a ballot), `renew` and `release`. Each is one transaction.

use crate::setting::{Mutation, Setting};
use crate::state::{Claim, Hold, Message, Node};

/// `acquire(claim, ballot)`: granted if free, or if this very claim has it; the answer carries the token stored and what
/// is left of the lease. Held by another: no answer, the client goes by its patience.
///
/// The ballot is stored if it is larger than the fence and not far ahead of the node's own time; else a new grant gets
/// a token by the node's ordinary rule, and a claim that has the lock keeps its token.
pub fn present<const C: usize, const N: usize>(
    setting: &Setting<C, N>,
    node: &mut Node,
    (claim, ballot, age): (Claim, u8, u8),
    time: u8,
    current: bool,
) -> Option<Message> {
    if !setting.lacks(Mutation::NoTombstones)
        && !setting.lacks(Mutation::ClaimUsedAgain)
        && node.released.contains(&claim)
    {
        return None;
    }
    let larger = ballot > node.fence || (setting.lacks(Mutation::EqualBallotTaken) && ballot == node.fence);
    let taken = larger && ballot <= time.saturating_add(setting.ahead);
    match &mut node.holder {
        Some(hold) if hold.claim == claim => {
            if taken && !setting.lacks(Mutation::NoRaise) {
                hold.token = ballot;
                node.fence = ballot;
            }
            let left = if setting.lacks(Mutation::WholeTtlEachTime) { setting.ttl } else { hold.left };
            Some(granted(setting, claim, hold.token, left, age))
        }
        Some(_) => None,
        None => {
            let token = if taken { ballot } else { time.max(node.fence + 1) };
            node.holder = Some(Hold { claim, token, left: setting.ttl, late: !current });
            node.fence = token;
            Some(granted(setting, claim, token, setting.ttl, age))
        }
    }
}

/// `renew(claim, token)`: only what is held under this claim and token is extended; nothing is made anew.
pub fn renew<const C: usize, const N: usize>(
    setting: &Setting<C, N>,
    node: &mut Node,
    (claim, token, age): (Claim, u8, u8),
) -> Option<Message> {
    if node.holder.is_none() && setting.lacks(Mutation::RenewalCreates) {
        node.holder = Some(Hold { claim, token, left: setting.ttl, late: false });
        node.fence = node.fence.max(token);
    }
    let any_token = setting.lacks(Mutation::RenewalWithoutToken);
    let hold =
        node.holder.as_mut().filter(|hold| hold.claim == claim && (any_token || hold.token == token))?;
    hold.left = setting.ttl;
    Some(granted(setting, claim, hold.token, setting.ttl, age))
}

/// `release(claim)`: frees the name if this claim has it, and refuses the claim from now on.
///
/// The tombstone is only kept where a presentation may still be under way; here it always is, and is forgotten when no
/// message of the claim is left.
pub fn release(node: &mut Node, claim: Claim) {
    if node.holder.is_some_and(|hold| hold.claim == claim) {
        node.holder = None;
    }
    if let Err(place) = node.released.binary_search(&claim) {
        node.released.insert(place, claim);
    }
}

/// The end of a lease by the node's clock.
pub fn expire<const C: usize, const N: usize>(setting: &Setting<C, N>, node: &mut Node) {
    node.holder = None;
    if setting.lacks(Mutation::NoFence) {
        node.fence = 0;
    }
}

/// A restart without the data: nothing is held, no token is remembered, no tombstone is left.
pub fn restart_empty<const C: usize, const N: usize>(setting: &Setting<C, N>, node: &mut Node) {
    *node = Node { down: setting.restart_delay, ..Node::default() };
}

fn granted<const C: usize, const N: usize>(
    setting: &Setting<C, N>,
    claim: Claim,
    token: u8,
    left: u8,
    age: u8,
) -> Message {
    // Counting from the answer is this, and no loss of time on the way back: see the tick.
    let age = if setting.lacks(Mutation::CountedFromTheAnswer) { 0 } else { age };
    Message::Granted { claim, token, left: left.saturating_sub(setting.distrusted()).saturating_sub(age) }
}
