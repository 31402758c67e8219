//! The guard at the resource: it keeps the newest token it has seen and refuses older ones.

use crate::types::FencingToken;

/// A write was refused: it came with an older token than the resource has seen.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the fencing token {offered} is older than the newest that the resource has seen")]
pub struct StaleToken {
    /// The token of the write.
    pub offered: FencingToken,
    /// The newest that the resource has seen, if it tells.
    pub newest: Option<FencingToken>,
}
