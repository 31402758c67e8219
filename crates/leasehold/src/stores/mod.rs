//! The stores. Each imports only `types`, `error`, `store` and `clock`.

#[cfg(feature = "sqlite")]
pub mod sqlite;
