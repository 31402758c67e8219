//! One lock over several independent stores: held by who has it at a majority of them (Redlock), with one fencing token.
//!
//! `docs/quorum.md` tells the protocol and argues for it. Inside: `node` is one of the stores, which may be down; `race`
//! asks several at once; `tally` weighs what they said; `acquire` presents claims, `hold` renews and gives back; `attempt`
//! knows what each node has of a claim; `look` is for people.

mod acquire;
mod attempt;
mod hold;
mod look;
mod node;
mod race;
mod tally;

use std::fs::File;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use tokio::runtime::Handle;
use tokio::sync::Notify;

pub use node::{NodeSource, Opening};

use crate::clock::{self, Instant};
use crate::error::{Error, ErrorKind, Result};
use crate::store::{Store, Woken};
use crate::types::{
    Acquired, BALLOT_AHEAD, Claim, FencingToken, Finding, Guarantees, Held, LockView, Name, Page, Query,
    Released, Renewal, Ticket, stable_hash,
};
use attempt::Table;
use node::Node;
use race::{Call, Race};

/// How long a node's answer is waited for: beyond it the node is set aside, and looked at about once a second.
pub const NODE_TIMEOUT: Duration = Duration::from_millis(250);
/// How long it is waited for where no majority has answered without it.
pub const NEEDED_NODE_TIMEOUT: Duration = Duration::from_secs(1);
/// The fewest nodes: of two, each would have to answer.
pub const LEAST_NODES: usize = 3;
/// How long connecting takes at most.
const CONNECT: Duration = Duration::from_secs(5);
/// How often who stands in line looks by itself: a release may have failed to reach the node of the line.
const LOOK_EVERY: Duration = Duration::from_secs(10);

/// A lock over several independent stores.
#[derive(Debug)]
pub struct QuorumStore(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    nodes: Vec<Arc<Node>>,
    majority: usize,
    runtime: Handle,
    timeout: Duration,
    table: Table,
    ballots: Ballots,
    location: Arc<str>,
    /// As of so many nodes whose stores were open.
    guarantees: Mutex<(usize, Guarantees)>,
    disturbed: Arc<Notify>,
    raises: AtomicU64,
}

/// Where the tokens that are proposed come from: each is larger than any seen here, and at least the wall clock.
#[derive(Debug, Default)]
struct Ballots(AtomicU64);

impl Ballots {
    fn next(&self) -> FencingToken {
        let wall = u64::try_from(clock::wall().as_micros()).unwrap_or(0);
        let larger = |seen: u64| (seen + 1).max(wall).min(FencingToken::MAX);
        let seen = self.0.fetch_update(Ordering::AcqRel, Ordering::Acquire, |seen| Some(larger(seen)));
        FencingToken::new(seen.map_or(wall, larger))
    }

    /// Takes note of a token; one from the far future would make the nodes refuse whatever is proposed after it.
    fn saw(&self, token: FencingToken) {
        let latest = clock::wall().saturating_add(BALLOT_AHEAD / 2).as_micros();
        if u128::from(token.get()) <= latest {
            self.0.fetch_max(token.get(), Ordering::AcqRel);
        }
    }
}

impl QuorumStore {
    /// Opens the nodes in parallel. It works as soon as a majority is open; the others are tried again about once a second, in
    /// the background, on `runtime`.
    ///
    /// # Errors
    /// `Invalid` for fewer than three nodes, or the same location twice; `Unavailable` if no majority could be opened, saying
    /// what became of each; `Unsupported` for a node whose locks end with the process ([`Store::lifeline`]). One that is found to
    /// be such a store only later, when it can be opened, is set aside for good and counts for nothing.
    pub async fn connect(nodes: Vec<NodeSource>, runtime: Handle) -> Result<Arc<Self>> {
        if nodes.len() < LEAST_NODES {
            let what = format!("a quorum of {} nodes outlives the failure of none", nodes.len());
            return Err(
                Error::invalid(what).advise("use three or five independent servers, or one without quorum:")
            );
        }
        for (at, node) in nodes.iter().enumerate() {
            if nodes[..at].iter().any(|other| other.location == node.location) {
                let what = format!("{} is a node twice, and would count for two", node.location);
                return Err(Error::invalid(what).advise("name independent servers"));
            }
        }
        let locations: Vec<String> = nodes.iter().map(|node| format!("node={}", node.location)).collect();
        let disturbed = Arc::new(Notify::new());
        let nodes: Vec<Arc<Node>> = nodes
            .into_iter()
            .enumerate()
            .map(|(index, source)| Node::new(index, source, runtime.clone(), disturbed.clone()))
            .collect();
        let shared = Arc::new(Shared {
            majority: nodes.len() / 2 + 1,
            runtime,
            timeout: NODE_TIMEOUT,
            table: Table::default(),
            ballots: Ballots::default(),
            location: format!("quorum:?{}", locations.join("&")).into(),
            guarantees: Mutex::new((0, look::weakest(&[]))),
            disturbed,
            raises: AtomicU64::new(0),
            nodes,
        });
        shared.open_nodes().await?;
        Ok(Arc::new(Self(shared)))
    }

    /// How many claims and unsent releases it remembers: a test's look for leaks.
    #[doc(hidden)]
    pub fn remembered(&self) -> usize {
        self.0.table.len() + self.0.nodes.iter().map(|node| node.backlog()).sum::<usize>()
    }

    /// How often the nodes had to be asked again to agree on a token: the rounds beyond the first.
    pub fn second_rounds(&self) -> u64 {
        self.0.raises.load(Ordering::Relaxed)
    }

    /// The locations of the nodes that are set aside at the moment.
    pub fn set_aside(&self) -> Vec<Arc<str>> {
        let aside = self.0.nodes.iter().filter(|node| !node.is_in_service());
        aside.map(|node| node.location().clone()).collect()
    }
}

impl Shared {
    /// Opens the nodes' stores: a majority at least, and those that come soon after it.
    async fn open_nodes(self: &Arc<Self>) -> Result<()> {
        let open = |node: &Arc<Node>| {
            let there = node.clone();
            Call::new(node, async move {
                let opened = there.store().await.map(drop);
                there.heard(opened.as_ref().err());
                opened
            })
        };
        let calls = self.nodes.iter().map(open).collect();
        let mut deadline = clock::now().plus(CONNECT);
        let mut race = Race::new(calls, &self.runtime, clock::now().plus(self.timeout));
        let mut failures = vec!["no answer in time".to_owned(); self.nodes.len()];
        let mut open = 0;
        while let Some((index, opened)) = race.next_before(deadline).await {
            match opened {
                Ok(()) => {
                    failures[index] = "open".into();
                    open += 1;
                }
                Err(error) => {
                    if self.nodes[index].refused().is_some() {
                        return Err(error);
                    }
                    failures[index] = error.to_string();
                }
            }
            if open >= self.majority {
                deadline = deadline.min(clock::now().plus(self.timeout));
            }
        }
        drop(race);
        if open < self.majority {
            let told: Vec<String> = self
                .nodes
                .iter()
                .zip(failures)
                .map(|(node, told)| format!("{}: {told}", node.location()))
                .collect();
            let what = format!("no majority of the nodes can be reached: {}", told.join("; "));
            return Err(Error::new(ErrorKind::Unavailable, what).on_store(&self.location));
        }
        for node in self.nodes.iter().filter(|node| node.opened().is_none()) {
            node.set_aside(&failures[node.index]);
        }
        Ok(())
    }

    fn locations(&self) -> Vec<Arc<str>> {
        self.nodes.iter().map(|node| node.location().clone()).collect()
    }

    /// The nodes to ask: those in service; all of them if that is no majority.
    fn to_be_asked(&self) -> Vec<usize> {
        let well: Vec<usize> =
            self.nodes.iter().filter(|node| node.is_in_service()).map(|node| node.index).collect();
        if well.len() >= self.majority { well } else { (0..self.nodes.len()).collect() }
    }

    /// When a node that is asked now is set aside.
    fn aside_at(&self) -> Instant {
        clock::now().plus(self.timeout)
    }

    fn count_raise(&self) {
        self.raises.fetch_add(1, Ordering::Relaxed);
    }

    fn guarantees(&self) -> Guarantees {
        let opened = self.nodes.iter().filter(|node| node.opened().is_some()).count();
        let mut kept = self.guarantees.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.0 != opened {
            let all: Vec<Guarantees> =
                self.nodes.iter().filter_map(|node| node.opened()).map(|store| store.guarantees()).collect();
            *kept = (opened, look::weakest(&all));
        }
        kept.1.clone()
    }

    /// Waits at the node where a claim stands in line.
    async fn woken(&self, ticket: &Ticket) -> Woken {
        let Some((attempt, index, there)) = self.table.line(ticket.id) else { return Woken::Look };
        let node = &self.nodes[index];
        let Some(store) = node.opened() else { return Woken::Look };
        let changed = node.changed.notified();
        tokio::pin!(changed);
        changed.as_mut().enable();
        if !node.is_in_service() {
            return Woken::Look;
        }
        let woken = tokio::select! {
            woken = store.woken(&there) => woken,
            () = changed => Woken::Look,
            () = clock::sleep(LOOK_EVERY + clock::jitter(LOOK_EVERY / 4)) => Woken::Look,
        };
        match woken {
            Woken::Granted { grant, .. } => {
                // One node's grant: the next presentation gets the others, which who had it is freeing in this moment.
                let _ = self.table.handed(ticket.id, &attempt, index, &grant);
                Woken::Look
            }
            Woken::Waiting(now) => {
                let told = ticket.clone().with_news_of(&now);
                if self.table.in_line(ticket.id, &attempt, index, now) {
                    Woken::Waiting(told)
                } else {
                    Woken::Look
                }
            }
            Woken::Look => Woken::Look,
        }
    }
}

/// The nodes in the order in which all who want this lock prefer them: by the hash of node and name (rendezvous hashing).
fn preference(nodes: &[Arc<Node>], name: &Name) -> Vec<usize> {
    let hash = |node: &Arc<Node>| stable_hash(node.location().as_bytes(), name.as_bytes());
    let mut order: Vec<(u64, usize)> = nodes.iter().map(|node| (hash(node), node.index)).collect();
    order.sort_unstable();
    order.into_iter().map(|(_, index)| index).collect()
}

#[async_trait]
impl Store for QuorumStore {
    async fn acquire(&self, claim: &Claim) -> Result<Acquired> {
        self.0.acquire(claim).await.map_err(|error| error.for_name(&claim.name).on_store(&self.0.location))
    }

    async fn woken(&self, ticket: &Ticket) -> Woken {
        self.0.woken(ticket).await
    }

    async fn renew(&self, held: &[Held]) -> Vec<Result<Renewal>> {
        let answers = self.0.renew(held).await.into_iter().zip(held);
        answers
            .map(|(answer, held)| {
                answer.map_err(|error| error.for_name(&held.name).on_store(&self.0.location))
            })
            .collect()
    }

    async fn release(&self, held: &Held) -> Result<Released> {
        self.0.release(held).await.map_err(|error| error.for_name(&held.name).on_store(&self.0.location))
    }

    async fn inspect(&self, query: &Query) -> Result<Page<LockView>> {
        self.0.inspect(query).await.map_err(|error| error.on_store(&self.0.location))
    }

    async fn disturbed(&self) {
        self.0.disturbed.notified().await;
    }

    fn guarantees(&self) -> Guarantees {
        self.0.guarantees()
    }

    fn location(&self) -> Arc<str> {
        self.0.location.clone()
    }

    async fn diagnose(&self) -> Vec<Finding> {
        self.0.findings().await
    }

    fn lifeline(&self) -> Option<Arc<File>> {
        None
    }
}
