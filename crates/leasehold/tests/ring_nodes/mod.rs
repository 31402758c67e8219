//! Rings for tests: their URLs, and names that live or come to live at a given node.
#![allow(
    dead_code,
    clippy::unwrap_used,
    unreachable_pub,
    missing_debug_implementations,
    reason = "each test program uses its part"
)]

use std::sync::Arc;

use leasehold::store::Store;
use leasehold::stores::memory::MemoryStore;
use leasehold::stores::ring::{Node, RingStore};
use leasehold::{
    Acquired, Claim, Finding, Guarantees, Held, LockView, Name, Page, Query, Released, Renewal, Result,
    Ticket, Woken,
};

/// `ring:` over these.
pub fn url(nodes: &[String]) -> String {
    format!("ring:?{}", nodes.iter().map(|node| format!("node={node}")).collect::<Vec<_>>().join("&"))
}

/// The settings before, during and after `c` is added to `a` and `b`.
pub fn phases(a: &str, b: &str, c: &str) -> [String; 3] {
    [
        format!("ring:?node={a}&node={b}"),
        format!("ring:?node={a}&node={b}&adding={c}"),
        format!("ring:?node={a}&node={b}&node={c}"),
    ]
}

/// A ring that knows where names live, and nothing else.
fn map(nodes: &[&str]) -> RingStore {
    let node = |name: &&str| Node::new(Arc::new(MemoryStore::new())).named(*name);
    RingStore::new(nodes.iter().map(node).collect()).unwrap()
}

/// Names that live at `node`.
pub fn names_at(nodes: &[&str], node: &str, count: usize) -> Vec<String> {
    let ring = map(nodes);
    let names = (0..).map(|n| format!("name-{n}"));
    names.filter(|name| ring.node_of(&Name::new(name).unwrap()) == node).take(count).collect()
}

/// Names that live elsewhere `after` than `before`.
pub fn moving_names(before: &[&str], after: &[&str], count: usize) -> Vec<String> {
    let (before, after) = (map(before), map(after));
    let names = (0..).map(|n| format!("name-{n}"));
    let moves = |text: &String| {
        let name = Name::new(text).unwrap();
        before.node_of(&name) != after.node_of(&name)
    };
    names.filter(moves).take(count).collect()
}

/// A store that never answers a renewal.
#[derive(Debug, Default)]
pub struct Silent(MemoryStore);

#[async_trait::async_trait]
impl Store for Silent {
    async fn acquire(&self, claim: &Claim) -> Result<Acquired> {
        self.0.acquire(claim).await
    }
    async fn woken(&self, ticket: &Ticket) -> Woken {
        self.0.woken(ticket).await
    }
    async fn renew(&self, _: &[Held]) -> Vec<Result<Renewal>> {
        std::future::pending().await
    }
    async fn release(&self, held: &Held) -> Result<Released> {
        self.0.release(held).await
    }
    async fn inspect(&self, query: &Query) -> Result<Page<LockView>> {
        self.0.inspect(query).await
    }
    fn guarantees(&self) -> Guarantees {
        self.0.guarantees()
    }
    fn location(&self) -> Arc<str> {
        self.0.location()
    }
    async fn diagnose(&self) -> Vec<Finding> {
        self.0.diagnose().await
    }
    fn lifeline(&self) -> Option<Arc<std::fs::File>> {
        None
    }
}
