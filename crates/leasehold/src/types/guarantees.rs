//! What a store promises, and what an operator's look at it found.

use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;

/// How far tokens can be trusted to grow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Fencing {
    /// Within the life of one process only.
    Process,
    /// Whatever is lost of the store's data, as long as its clock does not also go back past the last grant: each token
    /// is at least the store's time in microseconds.
    TimeFloor,
    /// As long as the store keeps what it acknowledged; no clock is involved.
    Strict,
}

/// What survives a restart of the store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Persistence {
    /// Nothing.
    None,
    /// The state of some minutes ago.
    Snapshot,
    /// All but about the last second.
    Log,
    /// Every acknowledged write.
    Durable,
    /// The store would not say.
    Unknown,
}

/// What a store promises, as data, found by looking at this very server.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
#[expect(clippy::struct_excessive_bools, reason = "a list of independent yes-or-no facts")]
pub struct Guarantees {
    /// How far tokens can be trusted to grow.
    pub fencing: Fencing,
    /// What survives a restart of the store.
    pub persistence: Persistence,
    /// Whether waiters are served in the order of arrival.
    pub fifo: bool,
    /// Whether a killed process's locks pass on before their TTL has run out.
    pub frees_at_process_death: bool,
    /// How much later than its TTL an unrenewed lock may become free.
    pub slack: Duration,
    /// The least TTL it takes.
    pub least_ttl: Duration,
    /// The largest TTL it takes.
    pub most_ttl: Duration,
    /// Whether a lock that is held can vanish because memory is full (an eviction policy that takes keys with a TTL).
    pub may_evict: bool,
    /// Whether an acknowledged grant can be lost by a failover to a replica.
    pub lost_at_failover: bool,
    /// The server and its version, for people.
    pub server: Arc<str>,
}

impl Guarantees {
    /// The strictest promise of a store of that name; a store lowers what it cannot keep.
    pub fn strict(server: impl Into<Arc<str>>) -> Self {
        Self {
            fencing: Fencing::Strict,
            persistence: Persistence::Durable,
            fifo: false,
            frees_at_process_death: false,
            slack: Duration::ZERO,
            least_ttl: Duration::from_millis(10),
            most_ttl: Duration::from_secs(366 * 24 * 3600),
            may_evict: false,
            lost_at_failover: false,
            server: server.into(),
        }
    }
}

/// How a finding of [`diagnose`](crate::Locks::diagnose) bears on a lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// As it should be.
    Good,
    /// Good to know.
    Note,
    /// Locks work, with less safety than they could have.
    Warning,
    /// Locks do not work.
    Failure,
}

/// One thing that was found out about a store, and what it means for a lock.
#[derive(Clone, Debug, Serialize)]
pub struct Finding {
    /// What was looked at, in a word or two: `login`, `eviction policy`.
    pub check: String,
    /// How it bears on a lock.
    pub severity: Severity,
    /// What was found.
    pub found: String,
    /// What that means for a lock, and what to do about it.
    pub meaning: String,
}

impl Finding {
    /// A finding.
    pub fn new(
        check: impl Into<String>,
        severity: Severity,
        found: impl Into<String>,
        meaning: impl Into<String>,
    ) -> Self {
        Self { check: check.into(), severity, found: found.into(), meaning: meaning.into() }
    }
}
