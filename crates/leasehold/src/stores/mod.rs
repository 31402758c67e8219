//! The stores. Each imports only `types`, `error`, `store` and `clock`; the ring is made of others, and knows them as `Store` only.

pub mod memory;
pub mod quorum;
#[cfg(feature = "redis")]
pub mod redis;
pub mod ring;
#[cfg(feature = "sqlite")]
pub mod sqlite;
