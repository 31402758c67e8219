//! The bounds of one check, and the ways to break the protocol on purpose.

/// One rule of the protocol left out, to see whether anything rests on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mutation {
    /// Clients do not subtract the drift from a lease.
    NoDrift,
    /// A lease counts from when the answer came, not from before the request was sent.
    CountedFromTheAnswer,
    /// A claim that a node has already counts as granted for its whole TTL, not for what is left.
    WholeTtlEachTime,
    /// No second round: the largest token that was answered is the token.
    LargestAnswerWins,
    /// A node takes a ballot that equals its fence.
    EqualBallotTaken,
    /// A hold needs a majority of the nodes that are still held, not of all.
    MajorityOfHeld,
    /// Half of the nodes count as a majority.
    HalfIsEnough,
    /// A holder whose lease ended does not notice, tops up what it lost and trusts the answers.
    TopUpAfterTheEnd,
    /// As `TopUpAfterTheEnd`, but a top-up is begun only while the lease is valid: its answer may come after the end.
    EndNotFinal,
    /// A renewal of a lease that ended, or was released, makes it anew.
    RenewalCreates,
    /// A renewal compares the claim only, not the node's token.
    RenewalWithoutToken,
    /// A claim that a node has already keeps its token, whatever ballot it is presented with again.
    NoRaise,
    /// Released claims leave no tombstone.
    NoTombstones,
    /// After a defeat only the nodes that granted are released.
    ReleaseOnlyGranted,
    /// A claim that was defeated is presented again under the same id, while its release may still be under way.
    ClaimUsedAgain,
    /// No node remembers its last token beyond the hold.
    NoFence,
}

/// How many of what, and what may go wrong. Times are in ticks, tokens are small numbers.
#[derive(Clone, Debug)]
pub struct Setting<const CLIENTS: usize, const NODES: usize> {
    /// For how long a node grants.
    pub ttl: u8,
    /// By how much clocks may run apart within one lease: a node may end a lease so much early.
    pub drift: u8,
    /// How many claims each client makes, one after the other.
    pub claims: [u8; CLIENTS],
    /// How often a claim is presented anew with a higher ballot.
    pub second_rounds: u8,
    /// How often a claim is renewed.
    pub renewals: u8,
    /// How many single nodes a claim is presented to again while held.
    pub top_ups: u8,
    /// Whether those presentations may also be made while trying: the grants so far are kept, the missing ones asked for again.
    pub ask_again: bool,
    /// How many times in all a node restarts without its data.
    pub restarts: u8,
    /// For how long a restarted node does not serve.
    pub restart_delay: u8,
    /// The least ballot of each client: its wall clock.
    pub wall: [u8; CLIENTS],
    /// The least token that each node makes by itself: its TIME.
    pub time: [u8; NODES],
    /// How far all clocks, of clients and nodes, advance with each tick, in tokens: 0 for clocks that stand still.
    pub tokens_per_tick: u8,
    /// How many ticks there are in all; `None`: no end. Needed where clocks advance.
    pub horizon: Option<u8>,
    /// How far a ballot may be ahead of a node's TIME.
    pub ahead: u8,
    /// How old a presentation may get before it is surely gone; `None`: it may arrive at any time.
    pub message_life: Option<u8>,
    /// Checks that a claim that was given up is held nowhere after so many ticks; `None` leaves this out.
    pub free_within: Option<u8>,
    /// Tells clients and nodes apart that could change places: more states, and a counterexample that can be read.
    pub named: bool,
    /// Which rule is left out.
    pub mutation: Option<Mutation>,
}

impl<const CLIENTS: usize, const NODES: usize> Setting<CLIENTS, NODES> {
    /// One claim for each client, without renewals, top-ups and restarts: a TTL of three ticks and a drift of one.
    pub fn new() -> Self {
        Self {
            ttl: 3,
            drift: 1,
            claims: [1; CLIENTS],
            second_rounds: 1,
            renewals: 0,
            top_ups: 0,
            ask_again: false,
            restarts: 0,
            restart_delay: 0,
            wall: [0; CLIENTS],
            time: [0; NODES],
            tokens_per_tick: 0,
            horizon: None,
            ahead: u8::MAX,
            message_life: None,
            free_within: None,
            named: false,
            mutation: None,
        }
    }

    /// The same with one rule left out.
    #[must_use]
    pub fn without(mut self, mutation: Mutation) -> Self {
        self.mutation = Some(mutation);
        self
    }

    /// Whether that rule is left out.
    pub fn lacks(&self, mutation: Mutation) -> bool {
        self.mutation == Some(mutation)
    }

    /// How many nodes are a majority: N/2 + 1 of all of them.
    pub fn majority(&self) -> usize {
        if self.lacks(Mutation::HalfIsEnough) { NODES.div_ceil(2) } else { NODES / 2 + 1 }
    }

    /// How much of a lease a client does not trust.
    pub fn distrusted(&self) -> u8 {
        if self.lacks(Mutation::NoDrift) { 0 } else { self.drift }
    }

    /// The age from which a presentation does not get older.
    pub fn oldest(&self) -> u8 {
        self.message_life.map_or(self.ttl, |life| self.ttl.max(life + 1))
    }
}

impl<const CLIENTS: usize, const NODES: usize> Default for Setting<CLIENTS, NODES> {
    fn default() -> Self {
        Self::new()
    }
}
