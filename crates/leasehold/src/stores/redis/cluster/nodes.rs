//! The nodes of a cluster, each dialled when it is first needed, and the map that leads to them.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use redis::Value;
use tokio::runtime::Handle;

use super::super::hub::Hub;
use super::super::reply;
use super::super::{RedisStore, refresh};
use super::ClusterConfig;
use super::map::{Endpoint, SlotMap};
use crate::clock;
use crate::error::{Error, ErrorKind, Result};
use crate::types::ClaimId;

/// Between two looks at a cluster that is not whole.
const LEAST_PAUSE: Duration = Duration::from_millis(50);
const MOST_PAUSE: Duration = Duration::from_secs(1);

/// A node: a store of its own, with one connection and its own waiters.
#[derive(Clone, Debug)]
pub(super) struct Node {
    pub(super) endpoint: Endpoint,
    pub(super) store: Arc<RedisStore>,
}

#[derive(Debug)]
pub(super) struct Nodes {
    config: ClusterConfig,
    runtime: Handle,
    hub: Arc<Hub>,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    map: SlotMap,
    open: HashMap<Endpoint, Arc<RedisStore>>,
}

impl Nodes {
    pub(super) fn new(config: ClusterConfig, runtime: Handle) -> Self {
        let hub = Arc::new(Hub::of_cluster());
        Self { config, runtime, hub, state: Mutex::default() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn hub(&self) -> &Arc<Hub> {
        &self.hub
    }

    pub(super) fn runtime(&self) -> &Handle {
        &self.runtime
    }

    /// The node at that address.
    pub(super) fn at(&self, endpoint: &Endpoint) -> Node {
        self.open(&mut self.state(), endpoint)
    }

    fn open(&self, state: &mut State, endpoint: &Endpoint) -> Node {
        let store = state.open.entry(endpoint.clone()).or_insert_with(|| {
            let config = self.config.node(endpoint);
            let store = Arc::new(RedisStore::new(config, self.runtime.clone(), self.hub.clone()));
            refresh::attend(&store);
            store
        });
        Node { endpoint: endpoint.clone(), store: store.clone() }
    }

    /// The node that has a slot, as far as is known.
    pub(super) fn owner(&self, slot: u16) -> Result<Node> {
        let mut state = self.state();
        let Some(endpoint) = state.map.owner(slot).cloned() else {
            drop(state);
            self.hub.stale.notify_one();
            return Err(Error::new(ErrorKind::Unavailable, "no node of the cluster has the lock's slot"));
        };
        Ok(self.open(&mut state, &endpoint))
    }

    /// Those that have slots, each with its first.
    pub(super) fn masters(&self) -> Vec<(Node, u16)> {
        let mut state = self.state();
        let masters = state.map.masters();
        masters.into_iter().map(|(endpoint, first)| (self.open(&mut state, &endpoint), first)).collect()
    }

    pub(super) fn covered(&self) -> usize {
        self.state().map.covered()
    }

    /// The nodes that were dialled.
    pub(super) fn all(&self) -> Vec<Arc<RedisStore>> {
        self.state().open.values().cloned().collect()
    }

    /// The node whose table has a claim that waits.
    pub(super) fn with_claim(&self, id: ClaimId) -> Option<Arc<RedisStore>> {
        self.state().open.values().find(|store| store.waiting.knows(id)).cloned()
    }

    /// Has all nodes but that one forget a claim.
    pub(super) fn forget_elsewhere(&self, id: ClaimId, here: Option<&Arc<RedisStore>>) {
        for store in self.state().open.values() {
            if !here.is_some_and(|here| Arc::ptr_eq(here, store)) {
                store.waiting.forget(id);
            }
        }
    }

    /// Takes in that a slot is elsewhere; what else has changed is found out in the background.
    pub(super) fn moved(&self, slot: u16, to: &Endpoint) {
        self.state().map.assign(slot, to.clone());
        self.hub.stale.notify_one();
    }

    /// Asks for the map, the nodes that are connected first, and takes it in. True if it says something new.
    pub(super) async fn refresh(&self) -> Result<bool> {
        let mut failure = None;
        let mut partial = None;
        for endpoint in self.candidates() {
            match self.ask(&self.at(&endpoint)).await {
                Ok((map, true)) => return Ok(self.install(map)),
                // A node that was cut off from the others may know less than they do.
                Ok((map, false)) => partial = partial.or(Some(map)),
                // What a seed says that can be reached is more to the point than that another cannot.
                Err(error) if failure.is_none() || !error.is_transient() => failure = Some(error),
                Err(_) => {}
            }
        }
        match partial {
            Some(map) => Ok(self.install(map)),
            None => Err(failure.unwrap_or_else(|| Error::invalid("the cluster has no node"))),
        }
    }

    /// Whom to ask: each node once, those that are connected first.
    fn candidates(&self) -> Vec<Endpoint> {
        let state = self.state();
        let is_up =
            |endpoint: &&Endpoint| state.open.get(*endpoint).is_some_and(|store| store.connector.is_up());
        let masters = state.map.masters();
        let known: Vec<_> = masters.keys().chain(state.map.replicas()).chain(&self.config.seeds).collect();
        let mut seen = BTreeSet::new();
        let up = known.iter().copied().filter(is_up);
        up.chain(known.iter().copied()).filter(|endpoint| seen.insert(*endpoint)).cloned().collect()
    }

    /// The map of one node, and whether the cluster is whole in its eyes.
    async fn ask(&self, node: &Node) -> Result<(SlotMap, bool)> {
        let connector = &node.store.connector;
        let deadline = clock::now().plus(self.config.timeout());
        let link = connector.link(deadline).await?;
        let mut questions = redis::Pipeline::with_capacity(2);
        questions.cmd("CLUSTER").arg("SLOTS").cmd("CLUSTER").arg("INFO");
        let mut answers = connector.send_all(&link, &questions, deadline).await?.into_iter();
        let slots = answers.next().unwrap_or_default();
        if let Value::ServerError(error) = &slots
            && error.details().is_some_and(|detail| detail.contains("cluster support disabled"))
        {
            return Err(Error::new(ErrorKind::Rejected, "the server is no node of a cluster")
                .on_store(&connector.location)
                .advise("use redis:// for one server"));
        }
        let slots = node.store.accepted(slots)?;
        let map = SlotMap::read(&slots, &node.endpoint).ok_or_else(|| reply::unexpected(&slots))?;
        let info = answers.next().as_ref().and_then(reply::text).unwrap_or_default();
        Ok((map, info.contains("cluster_state:ok")))
    }

    fn install(&self, map: SlotMap) -> bool {
        let mut state = self.state();
        let is_news = !state.map.agrees(&map);
        state.map = map;
        if is_news {
            let masters = state.map.masters();
            // One that has slots no more is kept for as long as somebody waits there.
            state
                .open
                .retain(|endpoint, store| masters.contains_key(endpoint) || store.waiting.remembered() > 0);
            state.open.values().for_each(|store| store.waiting.recall());
        }
        is_news
    }

    /// Refreshes the map. True if the cluster is whole, with all masters within reach.
    pub(super) async fn settle(&self) -> bool {
        match self.refresh().await {
            Ok(true) => {
                tracing::info!(store = %self.config.location(), "slots of the cluster moved");
                // Who has them now may have missed the last writes of who had them before.
                self.hub.disturb();
            }
            Ok(false) => {}
            Err(error) => {
                tracing::debug!(%error, "no node of the cluster tells which has which slot, asking again");
                return false;
            }
        }
        let mut is_whole = self.covered() == usize::from(super::super::keys::SLOTS);
        for (node, _) in self.masters() {
            let deadline = clock::now().plus(self.config.timeout());
            is_whole &= node.store.connector.link(deadline).await.is_ok();
        }
        is_whole
    }
}

/// Keeps the map of a cluster right: asks when an answer or a connection gave reason to, and until all is well.
pub(super) fn attend(nodes: &Arc<Nodes>) {
    // Weak, or the map would outlive its store.
    let (hub, weak) = (nodes.hub.clone(), Arc::downgrade(nodes));
    drop(nodes.runtime.spawn(async move {
        loop {
            hub.stale.notified().await;
            let mut pause = LEAST_PAUSE;
            while let Some(is_whole) = settled(&weak).await {
                clock::sleep(pause / 2 + clock::jitter(pause / 2)).await;
                if is_whole {
                    break;
                }
                pause = (pause * 2).min(MOST_PAUSE);
            }
            if weak.strong_count() == 0 {
                return;
            }
        }
    }));
}

/// Whether all is well; `None` if the store is gone.
async fn settled(nodes: &Weak<Nodes>) -> Option<bool> {
    Some(nodes.upgrade()?.settle().await)
}

impl Drop for Nodes {
    fn drop(&mut self) {
        // Ends the task that keeps the map.
        self.hub.stale.notify_one();
    }
}
