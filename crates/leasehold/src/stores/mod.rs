//! The stores. Each imports only `types`, `error`, `store` and `clock`.

pub mod memory;
