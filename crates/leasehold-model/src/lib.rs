//! A model of the quorum protocol, small enough to look at every state it can reach.
//!
//! The store that locks over N independent nodes (`quorum:`) follows a protocol whose argument rests on few steps. Here
//! each step stands as plain code under the name that the protocol has for it, and [stateright](https://docs.rs/stateright)
//! tries all orders in which they can happen: messages delayed, lost, or late; clients that stop for as long as they like;
//! clocks that run apart; nodes that forget. What is checked, within which bounds and what it does not show is told in
//! `docs/quorum-model.md`.
//!
//! - [`node`]: what a node does with a message: `present`, `renew`, `release`.
//! - [`client`]: what a client does: `begin` (round 1), `second_round`, `answered`, `renew`, `top_up`, `end`.
//! - [`state`]: what there is: nodes, clients, and the messages between them.
//! - [`Quorum`]: the whole as a `stateright::Model`, with the properties `one_holder`, `token_order`,
//!   `token_on_majority` and `no_orphan`.
//! - [`Setting`]: how many of what, and which [`Mutation`] of the protocol, if any, to put to the test.

pub mod client;
pub mod node;
mod quorum;
mod setting;
pub mod state;

pub use quorum::{Quorum, Step};
pub use setting::{Mutation, Setting};
