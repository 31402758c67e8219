//! The stores. Each imports only `types`, `error`, `store` and `clock`.

pub mod memory;
pub mod quorum;
#[cfg(feature = "redis")]
pub mod redis;
#[cfg(feature = "sqlite")]
pub mod sqlite;
