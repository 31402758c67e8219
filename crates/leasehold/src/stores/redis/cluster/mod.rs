//! The store over a Redis or Valkey cluster: each lock at the node that has its slot.
//!
//! A thin router over one [`RedisStore`](super::RedisStore) for each node: its connection, its waiters, its scripts. What a node answers when a
//! slot is elsewhere is followed here, and nothing is ever sent twice of which nobody knows whether it was run. `docs/cluster.md` tells the
//! rest.

mod config;
mod diagnose;
mod listing;
mod map;
mod nodes;
mod renewal;

use std::collections::HashSet;
use std::fs::File;
use std::future::Future;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use tokio::runtime::Handle;
use tokio::task::JoinSet;

pub use config::ClusterConfig;

use super::keys::{self, Keyspace};
use super::{How, look};
use crate::clock::{self, Instant};
use crate::error::{Error, ErrorKind, Result};
use crate::store::{Store, Woken};
use crate::types::{
    Acquired, Claim, ClaimId, Finding, Guarantees, Held, LockView, Name, Page, Persistence, Query, Released,
    Renewal, Replication, Ticket,
};
use map::{Redirect, unsettled};
use nodes::{Node, Nodes};

/// How often one request is sent on.
const MOST_HOPS: usize = 5;
/// Between two tries while a slot is on its way.
const LEAST_PAUSE: Duration = Duration::from_millis(2);
const MOST_PAUSE: Duration = Duration::from_millis(50);

/// Locks on a Redis or Valkey cluster.
#[derive(Debug)]
pub struct ClusterStore {
    nodes: Arc<Nodes>,
    keyspace: Keyspace,
    /// Claims that may stand in line, at whichever node: there they are looked for first.
    lined: Mutex<HashSet<ClaimId>>,
    location: Arc<str>,
    timeout: Duration,
    guarantees: Guarantees,
}

impl ClusterStore {
    /// Connects to the first node given that answers, reads which node has which slot, and looks at each master to see what
    /// the cluster can promise: the least of what any of them can. Connections live on `runtime`, which must have I/O enabled; the
    /// store's own methods work under any executor.
    ///
    /// # Errors
    /// `Unavailable` if no node can be reached, `Rejected` if one refuses the login or is no node of a cluster, `Invalid` if a
    /// file that the URL names cannot be read.
    ///
    /// # Round trips
    /// The dial of the first node and one, then the dial of each other master and four, all masters at once.
    pub async fn connect(config: ClusterConfig, runtime: Handle) -> Result<Arc<Self>> {
        let (location, timeout) = (config.location(), config.timeout());
        let keyspace = Keyspace::new(config.prefix(), true);
        let nodes = Arc::new(Nodes::new(config, runtime));
        nodes.refresh().await?;
        let guarantees = guarantees(&nodes).await?;
        nodes::attend(&nodes);
        Ok(Arc::new(Self { nodes, keyspace, lined: Mutex::default(), location, timeout, guarantees }))
    }

    /// How many things it remembers of claims that wait or waited: a test's look for leaks.
    #[doc(hidden)]
    pub fn remembered(&self) -> usize {
        self.lined().len() + self.nodes.all().iter().map(|store| store.remembered()).sum::<usize>()
    }

    fn lined(&self) -> MutexGuard<'_, HashSet<ClaimId>> {
        self.lined.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn deadline(&self, ttl: Option<Duration>) -> Instant {
        clock::now().plus(ttl.map_or(self.timeout, |ttl| self.timeout.min(ttl / 3)))
    }

    fn slot(&self, name: &Name) -> Result<u16> {
        Ok(self.keyspace.slot_of(&self.keyspace.keys(name)?))
    }

    /// Has a request done at the node that has its slot, which `work` is told with whether to ask there for a slot that is
    /// only on its way. Every answer that sends it on says that it was not run.
    async fn routed<T, W>(
        &self,
        slot: u16,
        deadline: Instant,
        work: impl Fn(Node, bool) -> W + Send + Sync,
    ) -> Result<T>
    where
        T: Send,
        W: Future<Output = Result<T>> + Send,
    {
        let (mut node, mut asking) = (self.nodes.owner(slot)?, false);
        let (mut hops, mut pause) = (0, LEAST_PAUSE);
        loop {
            let error = match work(node.clone(), asking).await {
                Ok(done) => return Ok(done),
                Err(error) => error,
            };
            let Some(redirect) = Redirect::of(&error, &node.endpoint) else {
                if error.is_transient() {
                    // Perhaps another is master by now.
                    self.nodes.hub().stale.notify_one();
                }
                return Err(error);
            };
            match redirect {
                Redirect::Moved(moved, to) if hops < MOST_HOPS => {
                    hops += 1;
                    self.nodes.moved(moved, &to);
                    (node, asking) = (self.nodes.at(&to), false);
                }
                Redirect::Ask(to) if hops < MOST_HOPS => {
                    hops += 1;
                    (node, asking) = (self.nodes.at(&to), true);
                }
                Redirect::Again if clock::now().plus(pause) < deadline => {
                    clock::sleep(pause / 2 + clock::jitter(pause / 2)).await;
                    (node, asking) = (self.nodes.owner(slot)?, false);
                    (pause, hops) = ((pause * 2).min(MOST_PAUSE), 0);
                }
                _ => {
                    self.nodes.hub().stale.notify_one();
                    return Err(unsettled(error));
                }
            }
            if clock::now() >= deadline {
                return Err(unsettled(error));
            }
        }
    }

    async fn acquire_routed(&self, claim: &Claim) -> Result<Acquired> {
        let slot = self.slot(&claim.name)?;
        let again = claim.queue && !self.lined().insert(claim.id);
        let present = |node: Node, asking| async move {
            if again {
                self.nodes.forget_elsewhere(claim.id, Some(&node.store));
            }
            node.store
                .acquire_once(claim, How { asking, again })
                .await
                .map_err(|error| named(error, &node, &claim.name))
        };
        let answer = self.routed(slot, self.deadline(Some(claim.ttl)), present).await;
        let may_stand_in_line = match &answer {
            Ok(Acquired::Queued(_)) => true,
            Ok(_) => false,
            Err(error) => error.is_transient() && (again || error.kind() == ErrorKind::Unknown),
        };
        if claim.queue && !may_stand_in_line {
            self.lined().remove(&claim.id);
        }
        answer
    }

    async fn release_routed(&self, held: &Held) -> Result<Released> {
        let give_back = |node: Node, asking| async move {
            node.store.release_once(held, asking).await.map_err(|error| named(error, &node, &held.name))
        };
        let answer = self.routed(self.slot(&held.name)?, self.deadline(None), give_back).await;
        if held.waiting {
            self.nodes.forget_elsewhere(held.id, None);
            self.lined().remove(&held.id);
        }
        answer
    }

    /// The error, naming lock and cluster where it names none.
    fn tell(&self, error: Error, name: &Name) -> Error {
        let error = if error.name().is_none() { error.for_name(name) } else { error };
        self.place(error)
    }

    fn place(&self, error: Error) -> Error {
        if error.store().is_none() { error.on_store(&self.location) } else { error }
    }
}

/// The error, naming the lock and the node.
fn named(error: Error, node: &Node, name: &Name) -> Error {
    error.for_name(name).on_store(&node.store.connector.location)
}

/// The least of what the masters promise.
async fn guarantees(nodes: &Arc<Nodes>) -> Result<Guarantees> {
    let masters = nodes.masters();
    let count = masters.len();
    let mut looks = JoinSet::new();
    for (node, _) in masters {
        looks.spawn_on(async move { look::guarantees(&node.store.connector).await }, nodes.runtime());
    }
    let (mut least, mut failure): (Option<Guarantees>, Option<Error>) = (None, None);
    while let Some(look) = looks.join_next().await {
        match look {
            Ok(Ok(found)) => {
                least = Some(match least {
                    Some(least) => weaker(least, &found),
                    None => found,
                });
            }
            // One that is down is replaced soon; what it promises is not known.
            Ok(Err(error)) if error.is_transient() => failure = Some(error),
            Ok(Err(error)) => return Err(error),
            Err(_) => {}
        }
    }
    let gone = || Error::new(ErrorKind::Unavailable, "no master of the cluster could be looked at");
    let Some(mut least) = least else { return Err(failure.unwrap_or_else(gone)) };
    if failure.is_some() {
        (least.persistence, least.may_evict) = (Persistence::Unknown, true);
    }
    // Somebody may add replicas at any time, and without any a dead master's slots are given away by hand.
    least.lost_at_failover = true;
    least.server = format!("{}, a cluster of {count} masters", least.server).into();
    Ok(least)
}

fn weaker(one: Guarantees, other: &Guarantees) -> Guarantees {
    let rank = |persistence| match persistence {
        Persistence::Unknown => 0,
        Persistence::None => 1,
        Persistence::Snapshot => 2,
        Persistence::Log => 3,
        Persistence::Durable => 4,
    };
    let persistence =
        if rank(one.persistence) <= rank(other.persistence) { one.persistence } else { other.persistence };
    Guarantees {
        persistence,
        fifo: one.fifo && other.fifo,
        may_evict: one.may_evict || other.may_evict,
        ..one
    }
}

#[async_trait]
impl Store for ClusterStore {
    async fn acquire(&self, claim: &Claim) -> Result<Acquired> {
        self.acquire_routed(claim).await.map_err(|error| self.tell(error, &claim.name))
    }

    async fn woken(&self, ticket: &Ticket) -> Woken {
        let Some(store) = self.nodes.with_claim(ticket.id) else { return Woken::Look };
        let woken = store.waiting.woken(ticket).await;
        if matches!(woken, Woken::Granted { .. }) {
            self.lined().remove(&ticket.id);
        }
        woken
    }

    async fn announce(&self, ticket: &Ticket, owner: &str) -> Result<()> {
        let slot = keys::slot(&self.keyspace.owner(owner));
        let announce = |node: Node, _| async move { node.store.announce_wait(&ticket.name, owner).await };
        let told = self.routed(slot, self.deadline(None), announce).await;
        told.map_err(|error| self.tell(error, &ticket.name))
    }

    async fn renew(&self, held: &[Held]) -> Vec<Result<Renewal>> {
        let answers = self.renew_routed(held).await;
        answers
            .into_iter()
            .zip(held)
            .map(|(answer, held)| answer.map_err(|error| self.tell(error, &held.name)))
            .collect()
    }

    async fn replicate(&self, held: &Held, wish: &Replication) -> Result<u32> {
        let replicate = |node: Node, _| async move {
            node.store.replicate_once(held, wish).await.map_err(|error| named(error, &node, &held.name))
        };
        let told = match self.slot(&held.name) {
            Ok(slot) => self.routed(slot, self.deadline(Some(wish.timeout)), replicate).await,
            Err(error) => Err(error),
        };
        told.map_err(|error| self.tell(error, &held.name))
    }

    async fn release(&self, held: &Held) -> Result<Released> {
        self.release_routed(held).await.map_err(|error| self.tell(error, &held.name))
    }

    async fn inspect(&self, query: &Query) -> Result<Page<LockView>> {
        self.look_at(query).await.map_err(|error| self.place(error))
    }

    async fn disturbed(&self) {
        self.nodes.hub().disturbed().await;
    }

    fn guarantees(&self) -> Guarantees {
        self.guarantees.clone()
    }

    fn location(&self) -> Arc<str> {
        self.location.clone()
    }

    async fn diagnose(&self) -> Vec<Finding> {
        self.findings().await
    }

    fn lifeline(&self) -> Option<Arc<File>> {
        None
    }
}
