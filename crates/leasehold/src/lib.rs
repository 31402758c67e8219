//! A distributed mutex that tells the truth.
//!
//! ```
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> leasehold::Result<()> {
//! # async fn write_report(_: leasehold::FencingToken) {}
//! use std::time::Duration;
//!
//! let locks = leasehold::connect("memory:").await?; // or redis://127.0.0.1:6379, sqlite:/var/lib/app/locks.db
//! let report = locks.mutex("tenant:123:report"); // cheap handle, no I/O
//!
//! let guard = report.lock().await?; // waits its turn; renewed in the background
//! write_report(guard.fencing_token()).await; // the resource refuses older tokens
//! guard.unlock().await?; // tells whether it was still ours; dropping also releases
//!
//! if let Some(guard) = report.try_lock().await? {
//!     drop(guard); // busy is an answer, not an error
//! }
//! let _guard = report.lock_for(Duration::from_secs(5)).await?; // None when time is up
//! # Ok(()) }
//! ```
//!
//! # Which store?
//!
//! | you have | take | what it promises |
//! |---|---|---|
//! | one machine, no server | `sqlite:` | exclusion between all processes of the machine; a killed holder's locks pass on at once |
//! | Redis or Valkey | `redis://` | exclusion as long as that server keeps its data; tokens that grow even if it does not |
//! | several of these, for load | `ring:?node=URL&node=URL` | each name lives on one of them |
//! | three or more independent servers | `quorum:` | exclusion while a majority lives and keeps its data; one token that grows |
//! | a Redis or Valkey cluster | `redis+cluster://` | the same at the node of each lock; slots may move meanwhile |
//! | ... with Sentinel | `redis+sentinel://` | the same through failovers, which can lose the last grants: holders are told at once |
//! | a test | `memory:` | one process |
//!
//! [`Locks::guarantees`] tells what holds on your very server, and `docs/guarantees.md` in the repository compares them.
//!
//! # What a lock cannot promise
//!
//! While a process does not run at all (a stopped process, a suspended virtual machine, a long garbage collection in
//! another language) it cannot notice that its lease has ended. When it wakes, its very next write may be too late. A
//! guard says so at the first look ([`Guard::status`]), but no client can look between every two instructions. The
//! resource can: give it [`Guard::fencing_token`] with each write and let it refuse older ones ([`fence`]).
//!
//! # Runtimes
//!
//! Futures of this crate need no runtime of yours: connections and renewals live on a thread of Leasehold's own, and
//! timers are served by another. [`blocking`] has the same names without async.

/// The examples of the README are tests too.
#[cfg(doctest)]
#[doc = include_str!("../../../README.md")]
struct ReadmeExamples;

pub mod blocking;
mod cell;
pub mod clock;
#[cfg(feature = "conformance")]
pub mod conformance;
mod deadlock;
mod error;
pub mod fence;
mod guard;
mod keeper;
mod lease;
mod local;
mod locks;
mod mutex;
mod retry;
mod set;
pub mod store;
pub mod stores;
mod striped;
mod types;
mod url;
mod wait;

pub use error::{Error, ErrorKind, Result};
pub use guard::Guard;
pub use lease::{DEFAULT_TTL, Loss, RENEWALS_PER_TTL, Status};
pub use locks::Locks;
pub use mutex::Mutex;
pub use retry::{Retry, Waits};
pub use set::{GuardSet, MutexSet};
pub use store::Woken;
pub use striped::{MAX_STRIPES, Striped};
pub use types::*;
pub use url::{Connector, connect, diagnose};
