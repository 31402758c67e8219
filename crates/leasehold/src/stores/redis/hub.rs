//! What all connections of one store have in common.

use std::sync::atomic::AtomicU64;

use tokio::sync::Notify;

/// What the connections of one store share: those to one server, or to all nodes of a cluster.
#[derive(Debug, Default)]
pub(super) struct Hub {
    /// How many connections were made.
    pub(super) generations: AtomicU64,
    /// Rung when a connection broke, and when there is a new one in its place.
    disturbed: Notify,
    /// The same, and when a node did not answer as it should: for who keeps the map of a cluster.
    pub(super) stale: Notify,
    /// Whether the servers are nodes of a cluster: a command then has the keys of one slot only.
    pub(super) is_cluster: bool,
}

impl Hub {
    /// For the nodes of a cluster.
    pub(super) fn of_cluster() -> Self {
        Self { is_cluster: true, ..Self::default() }
    }

    /// Has everything that is held confirmed at once.
    pub(super) fn disturb(&self) {
        self.disturbed.notify_one();
        self.stale.notify_one();
    }

    /// Resolves when a connection broke, or was replaced, or slots moved.
    pub(super) async fn disturbed(&self) {
        self.disturbed.notified().await;
    }
}
