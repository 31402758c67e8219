//! Leasehold: a distributed mutex that tells the truth.
pub mod clock;
pub mod error;
pub mod fence;
pub mod store;
pub mod stores;
pub mod types;
