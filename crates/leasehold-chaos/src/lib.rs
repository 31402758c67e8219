//! Real servers, proxies and faults for the tests of Leasehold.
//!
//! - [`servers`]: a real `redis-server` on a free port, stopped with the test that started it.
//! - [`sentinel`]: a master, its replicas and the sentinels that watch over them.
//! - [`cluster`]: a Redis Cluster of them.
//! - [`proxy`]: a link to it that counts, holds, cuts and delays what goes through.
//! - [`checker`]: the judge of what many processes wrote down; it knows only their histories.
//! - [`wall_clock`]: a wall clock for one process, that can be stepped.
//! - [`resp`]: the little of the Redis protocol that these need.
#![allow(
    clippy::disallowed_methods,
    reason = "the seam for time belongs to the library under test; this crate stands outside of it"
)]

pub mod checker;
pub mod cluster;
pub mod proxy;
pub mod resp;
pub mod sentinel;
pub mod servers;
mod spawn;
mod tls;
pub mod wall_clock;

use std::time::{Duration, Instant};

/// How long any wait of this crate goes on before it panics: long, because it is only ever reached by a failure.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// Asks `done` again and again until it says yes; for facts that send no event, such as a counter of a server.
///
/// # Panics
/// After [`PATIENCE`], saying `what` did not come true.
#[track_caller]
pub fn eventually(what: &str, done: impl FnMut() -> bool) {
    within(PATIENCE, what, done);
}

/// As [`eventually`], with a patience of its own.
///
/// # Panics
/// After `patience`, saying `what` did not come true.
#[track_caller]
pub fn within(patience: Duration, what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + patience;
    while !done() {
        assert!(Instant::now() < deadline, "did not come true within {patience:?}: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}
