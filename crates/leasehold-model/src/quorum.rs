//! The whole as a model: which steps are possible, what each leads to, and what must be true of every state.

use stateright::{Model, Property};

use crate::setting::{Mutation, Setting};
use crate::state::{Claim, MOST_CLAIMS, Message, Phase, Side, State};
use crate::{client, node};

/// One thing that happens. Clients and nodes go by their places in the state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// A client makes a new claim and presents it to all nodes.
    Begin(usize),
    /// A client presents its claim again with a higher ballot.
    SecondRound(usize),
    /// A client renews what it holds.
    Renew(usize),
    /// A client presents its claim again to a node (the second) that has not granted it, or whose grant has ended.
    TopUp(usize, usize),
    /// A client gives up, unlocks, or is cancelled.
    End(usize),
    /// A message (the second, of this node's) arrives.
    Arrive(usize, usize),
    /// A node's clock runs ahead, and a lease ends early.
    Expire(usize),
    /// A node restarts without its data.
    Restart(usize),
    /// Time passes, for all.
    Tick,
}

/// The quorum protocol within the bounds of a [`Setting`].
#[derive(Clone, Debug)]
pub struct Quorum<const CLIENTS: usize, const NODES: usize> {
    setting: Setting<CLIENTS, NODES>,
    /// The ways in which clients can change places.
    orders: Vec<[u8; CLIENTS]>,
    nodes_alike: bool,
}

impl<const CLIENTS: usize, const NODES: usize> Quorum<CLIENTS, NODES> {
    /// The model of that setting.
    ///
    /// # Panics
    /// If a client is to make more claims than the model has room for.
    pub fn new(setting: Setting<CLIENTS, NODES>) -> Self {
        assert!(setting.claims.iter().all(|&claims| usize::from(claims) <= MOST_CLAIMS), "too many claims");
        let alike =
            |a: usize, b: usize| setting.claims[a] == setting.claims[b] && setting.wall[a] == setting.wall[b];
        let mut orders = Vec::new();
        all_orders(std::array::from_fn(|place| u8::try_from(place).unwrap_or(u8::MAX)), 0, &mut orders);
        orders.retain(|order| {
            let moved = order.iter().enumerate().filter(|&(place, &from)| place != usize::from(from));
            moved.clone().all(|(place, &from)| !setting.named && alike(place, usize::from(from)))
        });
        let nodes_alike = !setting.named && setting.time.iter().all(|time| *time == setting.time[0]);
        Self { setting, orders, nodes_alike }
    }

    /// Until when each client believes to hold, in ticks from now: 0 for not at all.
    pub fn beliefs(&self, state: &State<CLIENTS, NODES>) -> [u8; CLIENTS] {
        std::array::from_fn(|client| client::validity(&self.setting, state, client))
    }

    /// Takes the step; false if it changes nothing that matters.
    fn step(&self, state: &mut State<CLIENTS, NODES>, step: Step) -> bool {
        let setting = &self.setting;
        match step {
            Step::Begin(client) => client::begin(setting, state, client),
            Step::SecondRound(client) => client::second_round(state, client),
            Step::Renew(client) => client::renew(state, client),
            Step::TopUp(client, side) => client::top_up(state, client, side),
            Step::End(client) => client::end(setting, state, client),
            Step::Arrive(side, place) => return self.arrive(state, side, place),
            Step::Expire(side) => node::expire(setting, &mut state.sides[side].node),
            Step::Restart(side) => {
                state.restarts -= 1;
                node::restart_empty(setting, &mut state.sides[side].node);
            }
            Step::Tick => self.tick(state),
        }
        true
    }

    /// A message arrives. One that the node turns away (busy, an old token) need not be looked at: whatever can happen
    /// after it is gone can also happen while it is still on its way, where it may stay for ever.
    fn arrive(&self, state: &mut State<CLIENTS, NODES>, at: usize, place: usize) -> bool {
        let message = state.sides[at].network.remove(place);
        let current = state.is_current(message.claim());
        let side = &mut state.sides[at];
        let before = side.node.clone();
        let answer = match message {
            Message::Present { claim, ballot, age } => {
                let presented = (claim, ballot, age);
                let time = self.setting.time[at] + state.now * self.setting.tokens_per_tick;
                node::present(&self.setting, &mut side.node, presented, time, current)
            }
            Message::Renew { claim, token, age } => {
                node::renew(&self.setting, &mut side.node, (claim, token, age))
            }
            Message::Release { claim } => {
                node::release(&mut side.node, claim);
                None
            }
            Message::Granted { claim, token, left } => {
                if current {
                    client::answered(&self.setting, state, (claim.client.into(), at), (token, left));
                }
                return current;
            }
        };
        side.network.extend(answer);
        answer.is_some() || side.node != before
    }

    /// A tick of the time that all share; clocks that run apart are in [`Step::Expire`].
    fn tick(&self, state: &mut State<CLIENTS, NODES>) {
        let oldest = self.setting.oldest();
        state.now += u8::from(self.setting.horizon.is_some());
        for side in &mut state.sides {
            side.node.down = side.node.down.saturating_sub(1);
            if let Some(hold) = &mut side.node.holder {
                hold.left -= 1;
                if hold.left == 0 {
                    node::expire(&self.setting, &mut side.node);
                }
            }
            for message in &mut side.network {
                match message {
                    Message::Present { age, .. } | Message::Renew { age, .. } => {
                        *age = (*age + 1).min(oldest);
                    }
                    Message::Granted { left, .. } if !self.setting.lacks(Mutation::CountedFromTheAnswer) => {
                        *left = left.saturating_sub(1);
                    }
                    Message::Granted { .. } | Message::Release { .. } => {}
                }
            }
            for record in side.records.iter_mut().flatten() {
                record.left = record.left.saturating_sub(1);
            }
        }
        self.grow_older(state);
        self.notice_ends(state);
    }

    /// The end of a lease is final: who sees it has lost the lock, releases, and takes in no answer any more. A client that
    /// stops sees it before it does anything else, since it looks at its clock.
    fn notice_ends(&self, state: &mut State<CLIENTS, NODES>) {
        if self.setting.lacks(Mutation::TopUpAfterTheEnd) || self.setting.lacks(Mutation::EndNotFinal) {
            return;
        }
        for client in 0..CLIENTS {
            if state.clients[client].phase == Phase::Holding
                && client::validity(&self.setting, state, client) == 0
            {
                client::end(&self.setting, state, client);
            }
        }
    }

    fn grow_older(&self, state: &mut State<CLIENTS, NODES>) {
        let Some(bound) = self.setting.free_within else { return };
        for client in 0..CLIENTS {
            for number in 1..=state.clients[client].number {
                let mut claim = client::claim(state, client);
                claim.number = number;
                if !state.is_current(claim) {
                    let age = &mut state.clients[client].given_up[usize::from(number) - 1];
                    *age = (*age + 1).min(bound);
                }
            }
        }
    }

    fn client_steps(&self, state: &State<CLIENTS, NODES>, at: usize, steps: &mut Vec<Step>) {
        let (setting, me) = (&self.setting, &state.clients[at]);
        match me.phase {
            Phase::Idle | Phase::Defeated if me.begun < setting.claims[at] => steps.push(Step::Begin(at)),
            Phase::Idle | Phase::Defeated => {}
            Phase::Trying => {
                steps.push(Step::End(at));
                if client::may_go_on(setting, state, at) {
                    steps.push(Step::SecondRound(at));
                }
                if setting.ask_again {
                    self.top_ups(state, at, steps);
                }
            }
            Phase::Holding => {
                steps.push(Step::End(at));
                let valid = client::validity(setting, state, at) > 0;
                if !valid && !setting.lacks(Mutation::TopUpAfterTheEnd) {
                    return;
                }
                if me.renewals < setting.renewals {
                    steps.push(Step::Renew(at));
                }
                self.top_ups(state, at, steps);
            }
        }
    }

    fn top_ups(&self, state: &State<CLIENTS, NODES>, at: usize, steps: &mut Vec<Step>) {
        if state.clients[at].top_ups < self.setting.top_ups {
            let missed = |side: &Side<CLIENTS>| side.records[at].is_none_or(|record| record.left == 0);
            let missing = (0..NODES).filter(|&side| missed(&state.sides[side]));
            steps.extend(missing.map(|side| Step::TopUp(at, side)));
        }
    }

    fn node_steps(&self, state: &State<CLIENTS, NODES>, at: usize, steps: &mut Vec<Step>) {
        let side = &state.sides[at];
        for (place, message) in side.network.iter().enumerate() {
            let twin = place > 0 && side.network[place - 1] == *message;
            let served = side.node.down == 0 || matches!(message, Message::Granted { .. });
            if served && !twin {
                steps.push(Step::Arrive(at, place));
            }
        }
        if side.node.holder.is_some_and(|hold| hold.left <= self.setting.drift) {
            steps.push(Step::Expire(at));
        }
        if state.restarts > 0 {
            steps.push(Step::Restart(at));
        }
    }

    /// Drops what can have no effect any more, and gives states that differ only in names one form.
    fn tidy(&self, mut state: State<CLIENTS, NODES>) -> State<CLIENTS, NODES> {
        for at in 0..NODES {
            self.drop_spent(&mut state, at);
        }
        self.forget_ages(&mut state);
        let best = self.orders.iter().map(|order| in_order(&state.clients, order)).min();
        let ties = self.orders.iter().filter(|order| Some(in_order(&state.clients, order)) == best);
        ties.map(|order| self.renamed(&state, order)).min().unwrap_or(state)
    }

    fn drop_spent(&self, state: &mut State<CLIENTS, NODES>, at: usize) {
        let setting = &self.setting;
        let tombstones = !setting.lacks(Mutation::NoTombstones) && !setting.lacks(Mutation::ClaimUsedAgain);
        let mut network = std::mem::take(&mut state.sides[at].network);
        self.forget_worthless(state, at);
        let side = &state.sides[at];
        network.retain(|message| match *message {
            Message::Granted { claim, left, .. } => {
                state.is_current(claim) && (left > 0 || self.may_renew(state, claim.client.into()))
            }
            Message::Present { claim, age, .. } => {
                !(tombstones && side.node.released.contains(&claim))
                    && setting.message_life.is_none_or(|life| age <= life)
            }
            Message::Renew { .. } | Message::Release { .. } => true,
        });
        let held = |claim| side.node.holder.is_some_and(|hold| hold.claim == claim);
        let presented = |network: &[Message], claim: Claim| {
            network
                .iter()
                .any(|message| matches!(message, Message::Present { .. }) && message.claim() == claim)
        };
        let creates = setting.lacks(Mutation::RenewalCreates);
        let before = network.clone();
        network.retain(|message| match *message {
            Message::Renew { claim, .. } => creates || held(claim) || presented(&before, claim),
            _ => true,
        });
        let requested =
            |claim| network.iter().any(|message| is_request(*message) && message.claim() == claim);
        let again = setting.lacks(Mutation::ClaimUsedAgain);
        let matters = |claim| again || held(claim) || requested(claim);
        let mut released = side.node.released.clone();
        released.retain(|claim| matters(*claim));
        let mut kept = network.clone();
        kept.retain(|message| !matches!(message, Message::Release { claim } if !matters(*claim)));
        state.sides[at].node.released = released;
        state.sides[at].network = kept;
    }

    /// What a client knows of a node and trusts no more is of use to a holder that renews, and to nobody else.
    fn forget_worthless(&self, state: &mut State<CLIENTS, NODES>, at: usize) {
        for client in 0..CLIENTS {
            let worthless = state.sides[at].records[client].is_some_and(|record| record.left == 0);
            if worthless && !self.may_renew(state, client) {
                state.sides[at].records[client] = None;
            }
            let me = &mut state.clients[client];
            if me.begun == self.setting.claims[client] {
                // It makes no further ballot of what it has seen.
                me.seen = 0;
            }
        }
    }

    fn may_renew(&self, state: &State<CLIENTS, NODES>, client: usize) -> bool {
        let me = &state.clients[client];
        me.phase == Phase::Holding && self.setting.renewals > 0
    }

    /// The age of a claim that is nowhere any more does not matter.
    fn forget_ages(&self, state: &mut State<CLIENTS, NODES>) {
        if self.setting.free_within.is_none() {
            return;
        }
        for client in 0..CLIENTS {
            for number in 1..=state.clients[client].number {
                let mut claim = client::claim(state, client);
                claim.number = number;
                let there = |side: &Side<CLIENTS>| {
                    side.node.holder.is_some_and(|hold| hold.claim == claim)
                        || side.network.iter().any(|message| is_request(*message) && message.claim() == claim)
                };
                if !state.sides.iter().any(there) {
                    state.clients[client].given_up[usize::from(number) - 1] = 0;
                }
            }
        }
    }

    fn renamed(&self, state: &State<CLIENTS, NODES>, order: &[u8; CLIENTS]) -> State<CLIENTS, NODES> {
        let mut renamed = state.clone();
        let mut place_of = [0_u8; CLIENTS];
        for (place, from) in (0_u8..).zip(order) {
            place_of[usize::from(*from)] = place;
        }
        renamed.clients = in_order(&state.clients, order);
        for side in &mut renamed.sides {
            side.records = in_order(&side.records, order);
            let holder = side.node.holder.iter_mut().map(|hold| &mut hold.claim);
            let claims = holder.chain(&mut side.node.released);
            for claim in claims.chain(side.network.iter_mut().map(Message::claim_mut)) {
                claim.client = place_of[usize::from(claim.client)];
            }
            side.node.released.sort_unstable();
            side.network.sort_unstable();
        }
        if self.nodes_alike {
            renamed.sides.sort_unstable();
        }
        renamed
    }

    fn one_holder(&self, state: &State<CLIENTS, NODES>) -> bool {
        self.beliefs(state).iter().filter(|left| **left > 0).count() <= 1
    }

    /// Each win has a larger token than all before, and who believes to hold has the largest that there is.
    fn token_order(&self, state: &State<CLIENTS, NODES>) -> bool {
        let beliefs = self.beliefs(state);
        let stale = |at: usize| beliefs[at] > 0 && state.clients[at].ballot < state.largest_won;
        !state.order_broken && !(0..CLIENTS).any(stale)
    }

    /// A claim that was given up is held only where its release is still on the way.
    fn no_orphan(&self, state: &State<CLIENTS, NODES>) -> bool {
        state.sides.iter().all(|side| {
            let Some(hold) = side.node.holder.filter(|hold| !state.is_current(hold.claim)) else {
                return true;
            };
            let age =
                state.clients[usize::from(hold.claim.client)].given_up[usize::from(hold.claim.number) - 1];
            match self.setting.free_within {
                Some(bound) => age < bound,
                None => side.network.contains(&Message::Release { claim: hold.claim }),
            }
        })
    }
}

impl<const CLIENTS: usize, const NODES: usize> Model for Quorum<CLIENTS, NODES> {
    type State = State<CLIENTS, NODES>;
    type Action = Step;

    fn init_states(&self) -> Vec<Self::State> {
        vec![State::new(self.setting.restarts)]
    }

    fn actions(&self, state: &Self::State, steps: &mut Vec<Step>) {
        for client in 0..CLIENTS {
            self.client_steps(state, client, steps);
        }
        for side in 0..NODES {
            self.node_steps(state, side, steps);
        }
        if self.setting.horizon.is_none_or(|horizon| state.now < horizon) {
            steps.push(Step::Tick);
        }
    }

    fn next_state(&self, last: &Self::State, step: Step) -> Option<Self::State> {
        let mut state = last.clone();
        if !self.step(&mut state, step) {
            return None;
        }
        let state = self.tidy(state);
        (state != *last).then_some(state)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always("one_holder", Self::one_holder),
            Property::always("token_order", Self::token_order),
            Property::always("token_on_majority", |_, state: &Self::State| !state.majority_broken),
            Property::always("no_orphan", Self::no_orphan),
            Property::sometimes("won in one round", |_, state: &Self::State| {
                any_client(state, |me| me.phase == Phase::Holding && me.second_rounds == 0)
            }),
            Property::sometimes("won by a second round", |_, state: &Self::State| {
                any_client(state, |me| me.phase == Phase::Holding && me.second_rounds > 0)
            }),
            Property::sometimes("defeated", |_, state: &Self::State| {
                any_client(state, |me| me.phase == Phase::Defeated)
            }),
            Property::sometimes("no majority for anybody", |_, state: &Self::State| {
                let held =
                    |claim| move |side: &&Side<CLIENTS>| side.node.holder.is_some_and(|h| h.claim == claim);
                (0..CLIENTS).all(|at| {
                    let claim = client::claim(state, at);
                    state.is_current(claim) && {
                        let others = state.sides.iter().filter(|side| side.node.holder.is_some());
                        others.count() - state.sides.iter().filter(held(claim)).count() >= NODES.div_ceil(2)
                    }
                })
            }),
            Property::sometimes("granted after the claim was given up", |_, state: &Self::State| {
                state.sides.iter().any(|side| side.node.holder.is_some_and(|hold| hold.late))
            }),
            Property::sometimes("a late grant belongs to the hold", |_, state: &Self::State| {
                (0..CLIENTS).any(|at| {
                    state.clients[at].phase == Phase::Holding
                        && state
                            .sides
                            .iter()
                            .all(|side| side.records[at].is_some_and(|record| record.left > 0))
                })
            }),
            Property::sometimes("renewed while another claim has one of its nodes", Self::renewed_in_company),
            Property::sometimes("topped up", |model, state: &Self::State| {
                let beliefs = model.beliefs(state);
                (0..CLIENTS).any(|at| {
                    let filled =
                        state.sides.iter().all(|side| side.records[at].is_some_and(|record| record.left > 0));
                    beliefs[at] > 0 && state.clients[at].top_ups > 0 && filled
                })
            }),
        ]
    }
}

impl<const CLIENTS: usize, const NODES: usize> Quorum<CLIENTS, NODES> {
    /// A holder that has renewed, that had a token of a node, and that node has somebody else's claim now.
    fn renewed_in_company(&self, state: &State<CLIENTS, NODES>) -> bool {
        let beliefs = self.beliefs(state);
        (0..CLIENTS).any(|at| {
            let lost = |side: &Side<CLIENTS>| {
                side.records[at].is_some()
                    && side.node.holder.is_some_and(|hold| usize::from(hold.claim.client) != at)
            };
            // The longest that a grant can be trusted is over at the node that lost it: only a renewal leads here.
            beliefs[at] > 0 && state.clients[at].renewals > 0 && state.sides.iter().any(lost)
        })
    }
}

fn is_request(message: Message) -> bool {
    matches!(message, Message::Present { .. } | Message::Renew { .. })
}

fn any_client<const C: usize, const N: usize>(
    state: &State<C, N>,
    is: impl Fn(&crate::state::Client) -> bool,
) -> bool {
    state.clients.iter().any(is)
}

fn in_order<T: Clone, const C: usize>(items: &[T; C], order: &[u8; C]) -> [T; C] {
    std::array::from_fn(|place| items[usize::from(order[place])].clone())
}

/// All orders of the places, `first` of which are settled.
fn all_orders<const C: usize>(order: [u8; C], first: usize, found: &mut Vec<[u8; C]>) {
    if first == C {
        found.push(order);
        return;
    }
    for place in first..C {
        let mut next = order;
        next.swap(first, place);
        all_orders(next, first + 1, found);
    }
}
