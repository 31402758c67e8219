//! The face of one store: where mutexes come from.

use std::fs::File;
use std::sync::Arc;
use std::time::Duration;

use crate::error::{Error, ErrorKind, Result};
use crate::keeper::{Bench, DEFAULT_CLOSE_TIMEOUT, Keeper};
use crate::local::Lines;
use crate::mutex::Mutex;
use crate::set::MutexSet;
use crate::store::Store;
use crate::striped::Striped;
use crate::types::{Fencing, Finding, Guarantees, LockView, Name, Page, Query};

/// The locks of one store, with the one connection and the one keeper thread that serve them all.
///
/// Clones share both. Make one for each store and process. When the last handle (`Locks`, [`Mutex`] or
/// [`Guard`](crate::Guard)) is dropped, the drop waits for releases still under way, 500 ms at most unless set.
#[derive(Clone, Debug)]
pub struct Locks {
    keeper: Arc<Keeper>,
    lines: Arc<Lines>,
}

impl Locks {
    /// The locks of any store: one of your own, or the memory store in tests.
    ///
    /// ```
    /// use std::sync::Arc;
    /// use leasehold::{Locks, stores::memory::MemoryStore};
    /// let locks = Locks::over(Arc::new(MemoryStore::new()))?;
    /// # Ok::<(), leasehold::Error>(())
    /// ```
    ///
    /// # Errors
    /// `Unavailable` if the operating system gives no thread for the keeper.
    pub fn over(store: Arc<dyn Store>) -> Result<Self> {
        Ok(Self::kept(Bench::start()?, store, DEFAULT_CLOSE_TIMEOUT))
    }

    pub(crate) fn kept(bench: Bench, store: Arc<dyn Store>, close_timeout: Duration) -> Self {
        Self { keeper: bench.keep(store, close_timeout), lines: Arc::default() }
    }

    /// A handle on the lock `name`: any bytes, 1 to 512 of them, not beginning with `leasehold:`. No I/O; a bad name is
    /// told by the first use.
    pub fn mutex(&self, name: impl AsRef<[u8]>) -> Mutex {
        Mutex::new(self.keeper.clone(), self.lines.clone(), Name::new(name))
    }

    /// A handle on several locks, to be taken together, all or nothing: see [`MutexSet`]. A name that is given twice counts
    /// once. No I/O; a bad name, or none at all, is told by the first use.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> leasehold::Result<()> {
    /// let locks = leasehold::connect("memory:").await?;
    /// let guards = locks.all(["account:17", "account:3"]).lock().await?; // in any order: no deadlock
    /// let [from, to] = guards.fencing_tokens()[..] else { unreachable!("one for each name, in the order asked") };
    /// # let _ = (from, to);
    /// for (name, released) in guards.unlock().await {
    ///     println!("{name}: {:?}", released?);
    /// }
    /// # Ok(()) }
    /// ```
    pub fn all<N: AsRef<[u8]>>(&self, names: impl IntoIterator<Item = N>) -> MutexSet {
        MutexSet::new(self.template(), names)
    }

    /// So many locks for any number of keys: see [`Striped`]. No I/O; 0 or more than 65,536 stripes, or a bad name, are told
    /// by the first use.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> leasehold::Result<()> {
    /// let locks = leasehold::connect("memory:").await?;
    /// let coupons = locks.striped("coupon", 16);
    /// let _guard = coupons.stripe_for("SPRING-2026").lock().await?; // one of coupon:0 to coupon:15
    /// # Ok(()) }
    /// ```
    pub fn striped(&self, name: impl AsRef<[u8]>, stripes: u32) -> Striped {
        Striped::new(self.template(), name.as_ref(), stripes)
    }

    /// What gets its name later.
    fn template(&self) -> Mutex {
        Mutex::new(self.keeper.clone(), self.lines.clone(), Name::new(""))
    }

    /// Looks at one lock: who holds it, since when, with what token.
    ///
    /// # Errors
    /// `Invalid` for a bad name, else the store's.
    ///
    /// # Cancel safety
    /// Safe: it only reads.
    ///
    /// # Round trips
    /// One.
    pub async fn show(&self, name: impl AsRef<[u8]>) -> Result<LockView> {
        let name = Name::new(name)?;
        let page = self.inspect(&Query::One(name.clone())).await?;
        Ok(page.items.into_iter().next().unwrap_or_else(|| LockView::free(name)))
    }

    /// Looks at locks, a page at a time.
    ///
    /// # Errors
    /// The store's.
    ///
    /// # Cancel safety
    /// Safe: it only reads.
    pub async fn inspect(&self, query: &Query) -> Result<Page<LockView>> {
        self.keeper.store().inspect(query).await
    }

    /// What this very server promises, as found when it was connected.
    pub fn guarantees(&self) -> Guarantees {
        self.keeper.store().guarantees()
    }

    /// Refuses a store whose tokens cannot be trusted as far as `least`.
    ///
    /// # Errors
    /// `Unsupported`, saying what the store promises instead.
    pub fn require(&self, least: Fencing) -> Result<()> {
        let has = self.guarantees().fencing;
        if has >= least {
            return Ok(());
        }
        Err(Error::new(
            ErrorKind::Unsupported,
            format!("fencing {least:?} is required and this store gives {has:?}"),
        )
        .on_store(&self.location())
        .advise("etcd and Consul give Strict; see docs/guarantees.md"))
    }

    /// Where the store is, without secrets.
    pub fn location(&self) -> Arc<str> {
        self.keeper.store().location()
    }

    /// Looks the store over for an operator; see [`diagnose`](crate::diagnose) for one that cannot even be connected.
    pub async fn diagnose(&self) -> Vec<Finding> {
        self.keeper.store().diagnose().await
    }

    /// The file whose kernel lock says that this process lives, where the store has one (SQLite): a child that inherits
    /// the descriptor keeps this process's locks from passing on before it is dead too.
    pub fn lifeline(&self) -> Option<Arc<File>> {
        self.keeper.store().lifeline()
    }

    /// Waits until every release still under way has ended, however long that takes (a TTL at most).
    ///
    /// # Cancel safety
    /// Safe: dropped, the releases go on.
    pub async fn close(self) {
        self.keeper.settled().await;
    }
}
