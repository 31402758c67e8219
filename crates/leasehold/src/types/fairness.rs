//! Who is next when several wait.

/// Who is next when several wait for a lock; see [`Mutex::fairness`](crate::Mutex::fairness).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Fairness {
    /// In order of arrival, across all processes, where the store keeps a line ([`Guarantees::fifo`](crate::Guarantees)).
    #[default]
    Fifo,
    /// The next waiter of the same process first, `max` times in a row at most: the lock is passed on to it without asking
    /// the store. Then it goes back there, whether others wait or not, so that they get their turn; the next of this
    /// process lines up behind them. For a lock that many tasks of one process want again and again, for a moment each.
    ///
    /// - A process claims the lock once for all its waiters, and takes a block of fencing tokens with the claim: each
    ///   holder has its own guard and its own token, larger than the one before, and smaller than those of any later claim.
    ///   The block begins with 17 tokens (or `max + 1`), and grows and shrinks with what was used of the last one.
    /// - The lease is renewed and checked as ever. It is passed on only while the guard is [`Held`](crate::Status::Held),
    ///   not `Unsure`, and more than a third of its TTL is left; else it is given back to the store, and so it is if nobody
    ///   of this process waits. A loss concerns the guard that has it then.
    /// - Passed on between handles of one `Locks` (and its clones) that agree in name, TTL, maximum hold, label, metadata
    ///   and `max`. Where they differ they exclude each other by the store. Calls of
    ///   [`try_lock`](crate::Mutex::try_lock) ask the store, and are passed nothing.
    /// - The store, and so everybody else, sees one holder with the first token, and of the waiters the first only: the
    ///   others are not counted by [`max_queue`](crate::Mutex::max_queue) and are not told their place
    ///   ([`on_wait`](crate::Mutex::on_wait)) before they come to stand in the store's line.
    /// - A waiter whose future is not polled any more, yet not dropped either, holds up those of its process behind it.
    ///   Other processes get the lock after a TTL.
    ///
    /// A `max` of 0, a mutex that is not [renewed](crate::Mutex::renew), or a store without a line make it
    /// [`Fifo`](Self::Fifo). More than 999,999 count as that many.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> leasehold::Result<()> {
    /// use leasehold::Fairness;
    ///
    /// let locks = leasehold::connect("memory:").await?;
    /// let counter = locks.mutex("counter").fairness(Fairness::LocalFirst { max: 100 });
    /// let guard = counter.lock().await?;
    /// let token = guard.fencing_token();
    /// let next = tokio::spawn(async move { counter.lock().await });
    /// tokio::task::yield_now().await; // it waits now
    /// guard.unlock().await?; // no round trip: passed on
    /// assert_eq!(next.await.expect("no panic")?.fencing_token().get(), token.get() + 1);
    /// # Ok(()) }
    /// ```
    LocalFirst {
        /// How often the lock is passed on before it goes back to the store.
        max: u32,
    },
}
