//! What is asked of a store's replicas.

use std::time::Duration;

/// How many replicas are to have a grant, and for how long they are waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct Replication {
    /// How many: one at least.
    pub replicas: u32,
    /// How long they are waited for: a millisecond at least.
    pub timeout: Duration,
    /// Whether they must have it on their disks too.
    pub on_disk: bool,
}

impl Replication {
    /// So many replicas, in memory, within this time.
    pub fn new(replicas: u32, timeout: Duration) -> Self {
        Self { replicas, timeout, on_disk: false }
    }

    /// The same, on their disks or not.
    #[must_use]
    pub fn on_disk(mut self, on_disk: bool) -> Self {
        self.on_disk = on_disk;
        self
    }
}
