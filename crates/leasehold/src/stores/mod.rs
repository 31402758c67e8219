//! The stores. Each imports only `types`, `error`, `store` and `clock`.

#[cfg(feature = "redis")]
pub mod redis;
