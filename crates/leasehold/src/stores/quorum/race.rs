//! Calls to several nodes at once, of which the answers are taken as they come.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::runtime::Handle;

use super::node::Node;
use crate::clock::{self, Instant};

/// How long a call that nobody waits for any more may still go on, if its store sets no limit of its own.
const LEFT_ALONE: Duration = Duration::from_secs(30);

/// A call to one node.
pub(super) struct Call<T> {
    pub(super) node: Arc<Node>,
    pub(super) work: Pin<Box<dyn Future<Output = T> + Send>>,
}

impl<T> Call<T> {
    pub(super) fn new(node: &Arc<Node>, work: impl Future<Output = T> + Send + 'static) -> Self {
        Self { node: node.clone(), work: Box::pin(work) }
    }
}

/// Calls under way. Dropped, those that are not done go on in the background, and their nodes are set aside if they take
/// too long.
pub(super) struct Race<T: Send + 'static> {
    calls: Vec<Call<T>>,
    runtime: Handle,
    aside_at: Instant,
}

impl<T: Send + 'static> Race<T> {
    /// Begins when first asked for an answer; a node that has not answered by `aside_at` is set aside.
    pub(super) fn new(calls: Vec<Call<T>>, runtime: &Handle, aside_at: Instant) -> Self {
        Self { calls, runtime: runtime.clone(), aside_at }
    }

    /// The next answer and whose it is; `None` when all have answered.
    pub(super) async fn next(&mut self) -> Option<(usize, T)> {
        std::future::poll_fn(|cx| poll_any(&mut self.calls, cx)).await
    }

    /// The next answer, unless `deadline` comes first.
    pub(super) async fn next_before(&mut self, deadline: Instant) -> Option<(usize, T)> {
        clock::timeout_at(deadline, self.next()).await.flatten()
    }
}

fn poll_any<T>(calls: &mut Vec<Call<T>>, cx: &mut Context<'_>) -> Poll<Option<(usize, T)>> {
    if calls.is_empty() {
        return Poll::Ready(None);
    }
    for at in 0..calls.len() {
        if let Poll::Ready(answer) = calls[at].work.as_mut().poll(cx) {
            let call = calls.swap_remove(at);
            return Poll::Ready(Some((call.node.index, answer)));
        }
    }
    Poll::Pending
}

async fn finish<T>(calls: &mut Vec<Call<T>>) {
    while std::future::poll_fn(|cx| poll_any(calls, cx)).await.is_some() {}
}

impl<T: Send + 'static> Drop for Race<T> {
    fn drop(&mut self) {
        if self.calls.is_empty() {
            return;
        }
        let (mut calls, aside_at) = (std::mem::take(&mut self.calls), self.aside_at);
        self.runtime.spawn(async move {
            if clock::timeout_at(aside_at, finish(&mut calls)).await.is_none() {
                for call in &calls {
                    call.node.set_aside("no answer in time");
                }
                let end = clock::now().plus(LEFT_ALONE);
                let _ = clock::timeout_at(end, finish(&mut calls)).await;
            }
        });
    }
}
