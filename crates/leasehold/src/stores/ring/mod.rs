//! The store over several independent ones, for load: each name lives on one of them, always the same.
//!
//! Which one is decided by rendezvous hashing of the node's location and the name, so every process that is given the same
//! nodes, in whatever order, decides alike, and another node takes over names without any moving between the others.
//! `docs/ring.md` has the promises, and how nodes are added and removed while locks are held.

mod merge;
mod moving;

use std::fmt::Write as _;
use std::fs::File;
use std::sync::Arc;

use async_trait::async_trait;
use futures_util::future::{join, join_all, select_all};

use crate::error::{Error, ErrorKind, Result};
use crate::store::{Store, Woken};
use crate::types::{
    Acquired, Claim, Finding, Guarantees, Held, LockView, Name, Page, Query, Released, Renewal, Replication,
    Severity, Ticket, stable_hash,
};
use moving::{Legs, Moving, Pair};

/// A node of a ring.
#[derive(Clone, Debug)]
pub struct Node {
    store: Arc<dyn Store>,
    /// What its share of the names goes by.
    identity: Arc<str>,
    stay: Stay,
}

/// Whether a node belongs to the ring as it was, as it is to be, or to both.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stay {
    Stays,
    Comes,
    Goes,
}

impl Node {
    /// A node that was in the ring and stays there. Its share of the names goes by the store's location.
    pub fn new(store: Arc<dyn Store>) -> Self {
        Self { identity: store.location(), store, stay: Stay::Stays }
    }

    /// The same node, its share of the names going by this text instead. Each process must give the same.
    #[must_use]
    pub fn named(mut self, identity: impl Into<Arc<str>>) -> Self {
        self.identity = identity.into();
        self
    }

    /// The same node, being added: locks whose place it will be are taken there and where they have been so far.
    #[must_use]
    pub fn adding(mut self) -> Self {
        self.stay = Stay::Comes;
        self
    }

    /// The same node, being removed: locks whose place it has been are taken there and where they will be.
    #[must_use]
    pub fn removing(mut self) -> Self {
        self.stay = Stay::Goes;
        self
    }
}

/// Locks shared out over several stores. See the [module](self).
#[derive(Debug)]
pub struct RingStore {
    nodes: Vec<Node>,
    location: Arc<str>,
    server: Arc<str>,
    moving: Moving,
}

/// Where a name lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    At(usize),
    /// Where it was, and where it will be.
    Moving(usize, usize),
}

impl RingStore {
    /// A ring of these nodes, in any order.
    ///
    /// # Errors
    /// `Invalid` if the ring has no node before or after the change that it is in, or two of one identity; `Unsupported`
    /// for a node whose locks end with the process ([`Store::lifeline`]): a ring could pass on one lifeline only.
    pub fn new(nodes: Vec<Node>) -> Result<Self> {
        if [Stay::Comes, Stay::Goes].iter().any(|other| nodes.iter().all(|node| node.stay == *other)) {
            return Err(Error::invalid("a ring needs a node that is in it before and after the change")
                .advise("name one at least as node="));
        }
        for (at, node) in nodes.iter().enumerate() {
            if nodes[..at].iter().any(|other| other.identity == node.identity) {
                return Err(Error::invalid("a node stands in the ring twice").on_store(&node.identity));
            }
            if node.store.lifeline().is_some() {
                return Err(Error::new(
                    ErrorKind::Unsupported,
                    "a store that goes by the life of the process cannot be a node of a ring",
                )
                .on_store(&node.identity));
            }
        }
        let location = location(&nodes).into();
        let servers: Vec<_> = nodes.iter().map(|node| node.store.guarantees().server.to_string()).collect();
        let server = format!("ring of {}: {}", nodes.len(), servers.join(", ")).into();
        Ok(Self { nodes, location, server, moving: Moving::default() })
    }

    /// The identity of the node that `name` lives on; of a name whose place changes the one where it will be.
    pub fn node_of(&self, name: &Name) -> &str {
        let (Place::At(node) | Place::Moving(_, node)) = self.place(name);
        &self.nodes[node].identity
    }

    fn place(&self, name: &Name) -> Place {
        let (mut was, mut will) = (None, None);
        for (at, node) in self.nodes.iter().enumerate() {
            let rank = (stable_hash(node.identity.as_bytes(), name.as_bytes()), &*node.identity);
            if node.stay != Stay::Comes && was.is_none_or(|(best, _)| best < rank) {
                was = Some((rank, at));
            }
            if node.stay != Stay::Goes && will.is_none_or(|(best, _)| best < rank) {
                will = Some((rank, at));
            }
        }
        match (was, will) {
            (Some((_, was)), Some((_, will))) if was != will => Place::Moving(was, will),
            (Some((_, at)), _) | (None, Some((_, at))) => Place::At(at),
            // `new` takes no empty ring.
            (None, None) => Place::At(0),
        }
    }

    fn pair(&self, was: usize, will: usize) -> Pair<'_> {
        Pair { old: &*self.nodes[was].store, new: &*self.nodes[will].store }
    }

    fn lives_at(&self, name: &Name, node: usize) -> bool {
        match self.place(name) {
            Place::At(at) => at == node,
            Place::Moving(was, will) => was == node || will == node,
        }
    }

    fn is_changing(&self) -> bool {
        self.nodes.iter().any(|node| node.stay != Stay::Stays)
    }

    /// Takes what was not renewed at one of its places back from the other.
    async fn give_up(&self, lost: Vec<Held>) {
        let releases = lost.iter().filter_map(|held| match self.place(&held.name) {
            Place::Moving(was, will) => Some(self.moving.release(self.pair(was, will), held)),
            Place::At(_) => None,
        });
        for answer in join_all(releases).await {
            if let Err(error) = answer {
                tracing::debug!(%error, "what is left of a lost lock ends by its TTL");
            }
        }
    }

    /// The answers of all nodes to one question.
    async fn ask_all(&self, query: &Query) -> Vec<Result<Page<LockView>>> {
        join_all(self.nodes.iter().map(|node| node.store.inspect(query))).await
    }

    async fn listing(&self, query: &Query, limit: usize) -> Result<Page<LockView>> {
        let mut pages = Vec::with_capacity(self.nodes.len());
        for (at, page) in self.ask_all(query).await.into_iter().enumerate() {
            let mut page = page?;
            page.items.retain(|view| self.lives_at(&view.name, at));
            pages.push(page);
        }
        Ok(merge::pages(pages, limit))
    }

    async fn waits(&self, query: &Query) -> Result<Page<LockView>> {
        let (mut items, mut failed) = (Vec::new(), None);
        for (at, page) in self.ask_all(query).await.into_iter().enumerate() {
            match page {
                Ok(page) => items.extend(page.items.into_iter().filter(|view| self.lives_at(&view.name, at))),
                Err(error) => failed = Some(error),
            }
        }
        // Nobody waits at a node that cannot be reached; circles over the others are to be found all the same.
        match failed {
            Some(error) if items.is_empty() => Err(error),
            _ => {
                items.sort_by(|one, other| one.name.cmp(&other.name));
                let mut items = merge::one_each(items);
                for view in &mut items {
                    if let (Place::Moving(was, will), Some(holder)) =
                        (self.place(&view.name), &mut view.holder)
                    {
                        // Seen where the waiter stands only, and so perhaps with the token of that place.
                        let pair = self.pair(was, will);
                        moving::correct(&[pair.old, pair.new], &view.name, holder).await;
                    }
                }
                Ok(Page { items, next: None })
            }
        }
    }
}

/// `ring:?node=URL&node=URL`, as a URL names it.
fn location(nodes: &[Node]) -> String {
    let mut url = String::from("ring:");
    for (at, node) in nodes.iter().enumerate() {
        let key = match node.stay {
            Stay::Stays => "node",
            Stay::Comes => "adding",
            Stay::Goes => "removing",
        };
        url.push(if at == 0 { '?' } else { '&' });
        let _ = write!(url, "{key}=");
        for c in node.identity.chars() {
            match c {
                '%' | '&' | '#' | '?' => drop(write!(url, "%{:02X}", u32::from(c))),
                c => url.push(c),
            }
        }
    }
    url
}

#[async_trait]
impl Store for RingStore {
    async fn acquire(&self, claim: &Claim) -> Result<Acquired> {
        match self.place(&claim.name) {
            Place::At(node) => self.nodes[node].store.acquire(claim).await,
            Place::Moving(was, will) => self.moving.acquire(self.pair(was, will), claim).await,
        }
    }

    async fn woken(&self, ticket: &Ticket) -> Woken {
        match self.place(&ticket.name) {
            Place::At(node) => self.nodes[node].store.woken(ticket).await,
            Place::Moving(was, will) => self.moving.woken(self.pair(was, will), ticket).await,
        }
    }

    async fn announce(&self, ticket: &Ticket, owner: &str) -> Result<()> {
        let store = match self.place(&ticket.name) {
            Place::At(node) => &*self.nodes[node].store,
            Place::Moving(was, will) => self.moving.waits_at(self.pair(was, will), ticket.id),
        };
        store.announce(ticket, owner).await
    }

    fn company(&self, name: &Name) -> u64 {
        match self.place(name) {
            Place::At(node) => node as u64,
            Place::Moving(was, will) => (was as u64 + 1) << 32 | will as u64,
        }
    }

    async fn renew(&self, held: &[Held]) -> Vec<Result<Renewal>> {
        let mut asked: Vec<Vec<(usize, Held)>> = vec![Vec::new(); self.nodes.len()];
        let mut answers: Vec<Vec<Result<Renewal>>> = vec![Vec::new(); held.len()];
        for (at, item) in held.iter().enumerate() {
            match self.place(&item.name) {
                Place::At(node) => asked[node].push((at, item.clone())),
                Place::Moving(was, will) => match self.moving.legs(item) {
                    Legs::Gone => answers[at].push(Ok(Renewal::Lost)),
                    Legs::Both(old, new) => {
                        asked[was].push((at, old));
                        asked[will].push((at, new));
                    }
                },
            }
        }
        let calls = asked.into_iter().zip(&self.nodes).filter(|(items, _)| !items.is_empty());
        let calls = calls.map(|(items, node)| async move {
            let (places, items): (Vec<usize>, Vec<Held>) = items.into_iter().unzip();
            (places, node.store.renew(&items).await)
        });
        for (places, renewals) in join_all(calls).await {
            for (at, renewal) in places.into_iter().zip(renewals) {
                answers[at].push(renewal);
            }
        }
        let (mut all, mut lost) = (Vec::with_capacity(held.len()), Vec::new());
        for (item, answers) in held.iter().zip(answers) {
            let answer = moving::weaker(answers);
            if matches!(self.place(&item.name), Place::Moving(..)) && self.moving.renewed(item, &answer) {
                lost.push(item.clone());
            }
            all.push(answer);
        }
        if !lost.is_empty() {
            self.give_up(lost).await;
        }
        all
    }

    async fn replicate(&self, held: &Held, wish: &Replication) -> Result<u32> {
        match self.place(&held.name) {
            Place::At(node) => self.nodes[node].store.replicate(held, wish).await,
            Place::Moving(was, will) => match self.moving.legs(held) {
                Legs::Gone => Err(Error::new(ErrorKind::Lost, "the lock was lost").for_name(&held.name)),
                Legs::Both(old, new) => {
                    let pair = self.pair(was, will);
                    let (old, new) =
                        join(pair.old.replicate(&old, wish), pair.new.replicate(&new, wish)).await;
                    Ok(old?.min(new?))
                }
            },
        }
    }

    async fn release(&self, held: &Held) -> Result<Released> {
        match self.place(&held.name) {
            Place::At(node) => self.nodes[node].store.release(held).await,
            Place::Moving(was, will) => self.moving.release(self.pair(was, will), held).await,
        }
    }

    async fn inspect(&self, query: &Query) -> Result<Page<LockView>> {
        match query {
            Query::One(name) => match self.place(name) {
                Place::At(node) => self.nodes[node].store.inspect(query).await,
                Place::Moving(was, will) => moving::view(self.pair(was, will), query).await,
            },
            Query::Prefix { limit, .. } => self.listing(query, (*limit).max(1)).await,
            Query::Waits { .. } => self.waits(query).await,
        }
    }

    async fn disturbed(&self) {
        select_all(self.nodes.iter().map(|node| node.store.disturbed())).await;
    }

    fn guarantees(&self) -> Guarantees {
        merge::weakest(self.server.clone(), self.nodes.iter().map(|node| node.store.guarantees()))
    }

    fn location(&self) -> Arc<str> {
        self.location.clone()
    }

    async fn diagnose(&self) -> Vec<Finding> {
        let mut all = Vec::new();
        if self.is_changing() {
            all.push(Finding::new(
                "ring",
                Severity::Note,
                format!("nodes are being added or removed: {}", self.location),
                "locks whose place changes are taken at both places, which takes twice as long: go on to the new \
                 setting when every process has this one",
            ));
        }
        let found = join_all(self.nodes.iter().map(|node| node.store.diagnose())).await;
        for (node, findings) in self.nodes.iter().zip(found) {
            all.extend(findings.into_iter().map(|mut finding| {
                finding.check = format!("{} at {}", finding.check, node.identity);
                finding
            }));
        }
        all
    }

    fn lifeline(&self) -> Option<Arc<File>> {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stores::memory::MemoryStore;

    fn node(identity: &str) -> Node {
        Node::new(Arc::new(MemoryStore::new())).named(identity)
    }

    fn ring(identities: &[&str]) -> RingStore {
        RingStore::new(identities.iter().map(|identity| node(identity)).collect()).unwrap()
    }

    fn name(text: impl AsRef<[u8]>) -> Name {
        Name::new(text).unwrap()
    }

    #[test]
    fn where_a_name_lives_never_changes() {
        let ring = ring(&["redis://a:6379", "redis://b:6379", "rediss://c:6380/2"]);
        // Found with another implementation of the hash too (python-xxhash), the first five.
        let names = ["a", "tenant:123:report", "nightly-backup", "é", "x", "y", "z", "m"];
        let found: String =
            names.iter().map(|text| &ring.node_of(&name(text))[..10]).collect::<Vec<_>>().join(" ");
        let golden =
            "rediss://c redis://b: redis://b: redis://b: rediss://c redis://a: redis://a: rediss://c";
        assert_eq!(found, golden, "processes of two versions would both hold a lock");
    }

    #[test]
    fn the_order_of_the_nodes_does_not_matter() {
        let (one, other) = (ring(&["a", "b", "c"]), ring(&["c", "a", "b"]));
        assert!(
            (0..1000).map(|n| name(format!("n{n}"))).all(|name| one.node_of(&name) == other.node_of(&name))
        );
    }

    #[test]
    fn another_node_takes_its_share_and_no_name_moves_between_the_others() {
        const NAMES: u32 = 20_000;
        let mut nodes: Vec<String> = (1..=3).map(|n| format!("redis://node-{n}:6379")).collect();
        while nodes.len() < 9 {
            let before = ring(&nodes.iter().map(String::as_str).collect::<Vec<_>>());
            nodes.push(format!("redis://node-{}:6379", nodes.len() + 1));
            let after = ring(&nodes.iter().map(String::as_str).collect::<Vec<_>>());
            let mut moved = 0;
            for n in 0..NAMES {
                let name = name(format!("tenant:{n}:report"));
                if before.node_of(&name) != after.node_of(&name) {
                    assert_eq!(
                        after.node_of(&name),
                        nodes[nodes.len() - 1],
                        "{name} moved between the others"
                    );
                    moved += 1;
                }
            }
            let count = u32::try_from(nodes.len()).unwrap();
            let (share, ideal) = (f64::from(moved) / f64::from(NAMES), 1.0 / f64::from(count));
            println!(
                "{} nodes: the new one took {:.2} % of the names, its share is {:.2} %",
                nodes.len(),
                share * 100.0,
                ideal * 100.0
            );
            assert!((share / ideal - 1.0).abs() < 0.1, "{share} of {ideal}");
        }
    }

    #[test]
    fn while_a_node_comes_or_goes_exactly_its_names_have_two_places() {
        let before = ring(&["a", "b"]);
        let after = ring(&["b", "c"]);
        let during = RingStore::new(vec![node("a").removing(), node("b"), node("c").adding()]).unwrap();
        for n in 0..1000 {
            let name = name(format!("n{n}"));
            let (was, will) = match during.place(&name) {
                Place::At(at) => (at, at),
                Place::Moving(was, will) => (was, will),
            };
            assert_eq!(&*during.nodes[was].identity, before.node_of(&name));
            assert_eq!(&*during.nodes[will].identity, after.node_of(&name));
        }
        assert_eq!(&*during.location(), "ring:?removing=a&node=b&adding=c");
        assert_eq!(&*ring(&["redis+unix:///s?db=2"]).location(), "ring:?node=redis+unix:///s%3Fdb=2");
    }

    #[test]
    fn a_ring_that_cannot_be_is_refused() {
        let refused = |nodes: Vec<Node>| RingStore::new(nodes).unwrap_err();
        assert!(refused(vec![]).to_string().contains("needs a node"));
        assert!(refused(vec![node("a").adding()]).to_string().contains("needs a node"));
        assert!(refused(vec![node("a").removing()]).to_string().contains("needs a node"));
        assert!(refused(vec![node("a"), node("a").adding()]).to_string().contains("twice"));
    }
}
