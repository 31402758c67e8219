//! Futures dropped at every await, and a store that has some.
#![allow(unreachable_pub, reason = "each test program uses its part")]

use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use leasehold::store::Store;
use leasehold::stores::memory::MemoryStore;
use leasehold::{Claim, Query, Released};

/// A store that yields before and after each call, so that there are awaits to be dropped at.
#[derive(Debug)]
pub struct Yielding(pub Arc<MemoryStore>);

#[async_trait::async_trait]
impl Store for Yielding {
    async fn acquire(&self, claim: &Claim) -> leasehold::Result<leasehold::Acquired> {
        tokio::task::yield_now().await;
        let answer = self.0.acquire(claim).await;
        tokio::task::yield_now().await;
        answer
    }
    async fn woken(&self, ticket: &leasehold::Ticket) -> leasehold::Woken {
        self.0.woken(ticket).await
    }
    async fn renew(&self, held: &[leasehold::Held]) -> Vec<leasehold::Result<leasehold::Renewal>> {
        tokio::task::yield_now().await;
        let answer = self.0.renew(held).await;
        tokio::task::yield_now().await;
        answer
    }
    async fn release(&self, held: &leasehold::Held) -> leasehold::Result<Released> {
        tokio::task::yield_now().await;
        let answer = self.0.release(held).await;
        tokio::task::yield_now().await;
        answer
    }
    async fn inspect(&self, query: &Query) -> leasehold::Result<leasehold::Page<leasehold::LockView>> {
        self.0.inspect(query).await
    }
    fn guarantees(&self) -> leasehold::Guarantees {
        self.0.guarantees()
    }
    fn location(&self) -> Arc<str> {
        self.0.location()
    }
    async fn diagnose(&self) -> Vec<leasehold::Finding> {
        self.0.diagnose().await
    }
    fn lifeline(&self) -> Option<Arc<std::fs::File>> {
        None
    }
}

/// Polls a future so often and drops it. True if it was ready before.
pub async fn drop_after(polls: usize, work: impl Future<Output = ()>) -> bool {
    let mut work = pin!(work);
    let mut left = polls;
    std::future::poll_fn(|cx: &mut Context<'_>| {
        if left == 0 {
            return Poll::Ready(false);
        }
        left -= 1;
        cx.waker().wake_by_ref();
        work.as_mut().poll(cx).map(|()| true)
    })
    .await
}
