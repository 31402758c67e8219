//! What there is at one moment: clients, nodes, and the messages between them.
//!
//! There is no absolute time. A lease, a message and a belief each carry how many ticks they have left or are old, so that
//! two moments that differ only in their date are one state.

use std::hash::{Hash, Hasher};

use arrayvec::ArrayVec;

/// One claim: a client's first, second, ... attempt at the lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Claim {
    /// Whose it is.
    pub client: u8,
    /// Which of its claims, from 1.
    pub number: u8,
}

/// The most claims that a client can make.
pub const MOST_CLAIMS: usize = 3;

/// What a node grants: a claim, its token, and the ticks until it ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Hold {
    /// Whose.
    pub claim: Claim,
    /// The token stored with it.
    pub token: u8,
    /// Ticks left; it may end as much earlier as clocks may drift.
    pub left: u8,
    /// Whether its client had given the claim up when the node granted it. Only looked at, never acted upon.
    pub late: bool,
}

/// What a node knows of the one name.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Node {
    /// Who has it.
    pub holder: Option<Hold>,
    /// The last token.
    pub fence: u8,
    /// The claims that were released here: tombstones, and history for `no_orphan`.
    pub released: ArrayVec<Claim, 6>,
    /// Ticks until it serves, after a restart.
    pub down: u8,
}

/// A message on its way. It may stay there for ever, which is how one gets lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Message {
    /// A presentation: `acquire(claim, ballot)`, so old by its client's clock.
    Present {
        /// Which claim.
        claim: Claim,
        /// The token it proposes.
        ballot: u8,
        /// Ticks since it was sent.
        age: u8,
    },
    /// `renew(claim, token)`.
    Renew {
        /// Which claim.
        claim: Claim,
        /// The token that this node has for it.
        token: u8,
        /// Ticks since it was sent.
        age: u8,
    },
    /// `release(claim)`.
    Release {
        /// Which claim.
        claim: Claim,
    },
    /// The answer to a presentation or a renewal. Busy and Lost have no message: a client may give up at any time.
    Granted {
        /// Which claim.
        claim: Claim,
        /// The token stored.
        token: u8,
        /// For how long the client could trust it if the answer came now: sent + ttl - drift - now.
        left: u8,
    },
}

impl Hash for Message {
    /// One word: what `derive` does, a byte at a time, takes a third of the whole check.
    fn hash<H: Hasher>(&self, hasher: &mut H) {
        let (kind, a, b) = match *self {
            Self::Present { ballot, age, .. } => (0, ballot, age),
            Self::Renew { token, age, .. } => (1, token, age),
            Self::Release { .. } => (2, 0, 0),
            Self::Granted { token, left, .. } => (3, token, left),
        };
        let Claim { client, number } = self.claim();
        hasher.write_u32(u32::from_be_bytes([kind << 6 | client << 3 | number, a, b, 0]));
    }
}

impl Message {
    /// The claim it is about.
    pub fn claim(&self) -> Claim {
        match *self {
            Self::Present { claim, .. }
            | Self::Renew { claim, .. }
            | Self::Release { claim }
            | Self::Granted { claim, .. } => claim,
        }
    }

    pub(crate) fn claim_mut(&mut self) -> &mut Claim {
        match self {
            Self::Present { claim, .. }
            | Self::Renew { claim, .. }
            | Self::Release { claim }
            | Self::Granted { claim, .. } => claim,
        }
    }
}

/// What a client knows of its present claim at one node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Record {
    /// The token that the node answered.
    pub token: u8,
    /// Ticks for which the client trusts it.
    pub left: u8,
}

/// One node and all that concerns it alone. Nodes have no names, so a state is a bag of these.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Side<const CLIENTS: usize> {
    /// The node.
    pub node: Node,
    /// What each client knows of its present claim there.
    pub records: [Option<Record>; CLIENTS],
    /// Messages to and from it, in no order.
    pub network: ArrayVec<Message, 12>,
}

/// What a client is doing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Phase {
    /// Nothing yet, or its last claim was released.
    #[default]
    Idle,
    /// Its last claim was given up before it was won.
    Defeated,
    /// Its claim was presented.
    Trying,
    /// Its claim won.
    Holding,
}

/// A client.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Client {
    /// What it is doing.
    pub phase: Phase,
    /// How many claims it has made.
    pub begun: u8,
    /// The number of its last claim.
    pub number: u8,
    /// The ballot presented last; while holding, the token.
    pub ballot: u8,
    /// How many second rounds this claim had.
    pub second_rounds: u8,
    /// How often this claim was renewed.
    pub renewals: u8,
    /// How many top-ups this claim had.
    pub top_ups: u8,
    /// The largest token or ballot it has seen or used.
    pub seen: u8,
    /// Ticks since each claim was given up, where that is checked.
    pub given_up: [u8; MOST_CLAIMS],
}

/// All there is, and what history must be remembered to judge it.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct State<const CLIENTS: usize, const NODES: usize> {
    /// The clients.
    pub clients: [Client; CLIENTS],
    /// The nodes with their messages.
    pub sides: [Side<CLIENTS>; NODES],
    /// Ticks since the beginning, where clocks advance.
    pub now: u8,
    /// How many more restarts there may be.
    pub restarts: u8,
    /// The largest token that anybody won.
    pub largest_won: u8,
    /// Somebody won with a token that was not larger than all before.
    pub order_broken: bool,
    /// Somebody won with a token that a majority did not have.
    pub majority_broken: bool,
}

impl<const CLIENTS: usize, const NODES: usize> State<CLIENTS, NODES> {
    /// Nobody has asked for anything yet.
    pub fn new(restarts: u8) -> Self {
        Self {
            clients: std::array::from_fn(|_| Client::default()),
            sides: std::array::from_fn(|_| Side {
                node: Node::default(),
                records: [None; CLIENTS],
                network: ArrayVec::new(),
            }),
            now: 0,
            restarts,
            largest_won: 0,
            order_broken: false,
            majority_broken: false,
        }
    }

    /// Whether the claim is one that its client still stands by.
    pub fn is_current(&self, claim: Claim) -> bool {
        let client = &self.clients[usize::from(claim.client)];
        matches!(client.phase, Phase::Trying | Phase::Holding) && client.number == claim.number
    }
}
