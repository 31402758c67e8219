//! What people are told: who holds what by a majority, what the whole promises, and how each node is.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use super::race::{Call, Race};
use super::{LEAST_NODES, Shared};
use crate::clock;
use crate::error::{Error, ErrorKind, Result};
use crate::store::drift;
use crate::types::{
    Fencing, FencingToken, Finding, Guarantees, Holder, LockView, Name, Page, Persistence, Query, Severity,
    Waiter,
};

/// How long each node may take to be looked over.
const DIAGNOSE: Duration = Duration::from_secs(5);
/// The TTL by whose drift the slack is told: the usual one.
const USUAL_TTL: Duration = Duration::from_secs(30);
/// The least TTL: what is shorter ends before several nodes have answered.
const LEAST_TTL: Duration = Duration::from_millis(200);

/// What a quorum of stores with these guarantees promises.
pub(super) fn weakest(nodes: &[Guarantees]) -> Guarantees {
    let mut all = Guarantees::strict(describe(nodes));
    all.fencing = nodes.iter().map(|node| node.fencing).min().unwrap_or(Fencing::Process);
    all.persistence = nodes
        .iter()
        .map(|node| node.persistence)
        .min_by_key(|kept| rank(*kept))
        .unwrap_or(Persistence::Unknown);
    all.fifo = false;
    all.frees_at_process_death = !nodes.is_empty() && nodes.iter().all(|node| node.frees_at_process_death);
    all.slack = nodes.iter().map(|node| node.slack).max().unwrap_or_default() + drift(USUAL_TTL);
    all.least_ttl = nodes.iter().map(|node| node.least_ttl).max().unwrap_or_default().max(LEAST_TTL);
    all.most_ttl = nodes.iter().map(|node| node.most_ttl).min().unwrap_or(all.most_ttl);
    all.may_evict = nodes.iter().any(|node| node.may_evict);
    all.lost_at_failover = nodes.iter().any(|node| node.lost_at_failover);
    all
}

const fn rank(persistence: Persistence) -> u8 {
    match persistence {
        Persistence::Unknown => 0,
        Persistence::None => 1,
        Persistence::Snapshot => 2,
        Persistence::Log => 3,
        Persistence::Durable => 4,
    }
}

fn describe(nodes: &[Guarantees]) -> String {
    let mut kinds: BTreeMap<&str, usize> = BTreeMap::new();
    for node in nodes {
        *kinds.entry(&*node.server).or_default() += 1;
    }
    let kinds: Vec<String> = kinds.iter().map(|(server, count)| format!("{count} of {server}")).collect();
    format!("quorum over {}", kinds.join(", "))
}

/// One lock as several nodes see it.
fn merge(name: Name, views: &[LockView], majority: usize) -> LockView {
    let mut merged = LockView::free(name);
    merged.last_token = views.iter().filter_map(|view| view.last_token).max();
    for view in views {
        let new = |waiter: &&Waiter| !merged.queue.iter().any(|other| other.id == waiter.id);
        let more: Vec<Waiter> = view.queue.iter().filter(new).cloned().collect();
        merged.queue.extend(more);
    }
    // They stand at several nodes at most for a moment.
    merged.waiters = views.iter().map(|view| view.waiters).sum();
    let holders: Vec<&Holder> = views.iter().filter_map(|view| view.holder.as_ref()).collect();
    merged.holder = holders.iter().find_map(|holder| {
        let same: Vec<&&Holder> =
            holders.iter().filter(|other| other.id == holder.id && other.foreign == holder.foreign).collect();
        (same.len() >= majority).then(|| by_majority(&same, majority))
    });
    merged
}

/// The holder whom a majority names: its token is the one that most of them have, and it lasts as long as a majority does.
fn by_majority(same: &[&&Holder], majority: usize) -> Holder {
    let mut holder = (**same[0]).clone();
    let tokens: Vec<FencingToken> = same.iter().filter_map(|holder| holder.token).collect();
    let count = |token: &FencingToken| tokens.iter().filter(|other| *other == token).count();
    holder.token = tokens.iter().max_by_key(|token| (count(token), token.get())).copied();
    let mut left: Vec<Duration> =
        same.iter().map(|holder| holder.remaining.unwrap_or(Duration::MAX)).collect();
    left.sort_unstable_by(|a, b| b.cmp(a));
    holder.remaining = left.get(majority - 1).copied().filter(|left| *left < Duration::MAX);
    holder
}

impl Shared {
    /// Asks all nodes in service, and merges what they say.
    pub(super) async fn inspect(self: &Arc<Self>, query: &Query) -> Result<Page<LockView>> {
        let calls = self.to_be_asked().into_iter().map(|index| {
            let (node, query) = (self.nodes[index].clone(), query.clone());
            Call::new(&self.nodes[index], async move {
                let page = match node.store().await {
                    Ok(store) => store.inspect(&query).await,
                    Err(error) => Err(error),
                };
                node.heard(page.as_ref().err());
                page
            })
        });
        let mut race = Race::new(calls.collect(), &self.runtime, self.aside_at());
        let deadline = clock::now().plus(self.timeout * 4);
        let (mut pages, mut failures) = (Vec::new(), Vec::new());
        while let Some((index, page)) = race.next_before(deadline).await {
            match page {
                Ok(page) => pages.push(page),
                Err(error) => failures.push(format!("{}: {error}", self.nodes[index].location())),
            }
        }
        if pages.len() < self.majority {
            let what = format!(
                "{} of {} nodes answered, {} are needed to tell who holds what; {}",
                pages.len(),
                self.nodes.len(),
                self.majority,
                failures.join("; ")
            );
            return Err(Error::new(ErrorKind::Unavailable, what));
        }
        Ok(self.merge_pages(query, pages))
    }

    fn merge_pages(&self, query: &Query, pages: Vec<Page<LockView>>) -> Page<LockView> {
        // What a node did not list beyond the end of its page, it may hold all the same.
        let end = pages.iter().filter_map(|page| page.next.clone()).min();
        let mut by_name: BTreeMap<Name, Vec<LockView>> = BTreeMap::new();
        for view in pages.into_iter().flat_map(|page| page.items) {
            by_name.entry(view.name.clone()).or_default().push(view);
        }
        let views = by_name.into_iter().map(|(name, views)| merge(name, &views, self.majority));
        let limit = match query {
            Query::Prefix { limit, .. } => (*limit).max(1),
            _ => return Page { items: views.collect(), next: None },
        };
        let mut items: Vec<LockView> = views
            .filter(|view| view.holder.is_some() && end.as_ref().is_none_or(|end| view.name <= *end))
            .collect();
        let more = items.len() > limit;
        items.truncate(limit);
        let next = if more { items.last().map(|view| view.name.clone()) } else { end };
        Page { items, next }
    }

    /// How each node is, and the whole.
    pub(super) async fn findings(self: &Arc<Self>) -> Vec<Finding> {
        let calls = self.nodes.iter().map(|node| {
            let there = node.clone();
            Call::new(node, async move {
                match there.store().await {
                    Ok(store) => Ok(store.diagnose().await),
                    Err(error) => Err(error),
                }
            })
        });
        let mut race = Race::new(calls.collect(), &self.runtime, clock::now().plus(DIAGNOSE));
        let deadline = clock::now().plus(DIAGNOSE);
        let mut of_nodes: BTreeMap<usize, Result<Vec<Finding>>> = BTreeMap::new();
        while let Some((index, findings)) = race.next_before(deadline).await {
            of_nodes.insert(index, findings);
        }
        let mut findings = self.of_the_whole();
        for node in &self.nodes {
            let location = node.location();
            let (severity, found) = match of_nodes.get(&node.index) {
                _ if !node.is_in_service() => (Severity::Warning, format!("set aside: {}", node.why())),
                Some(Ok(_)) => (Severity::Good, "in service".to_owned()),
                Some(Err(error)) => (Severity::Warning, error.to_string()),
                None => (Severity::Warning, "no answer in time".to_owned()),
            };
            let meaning = if severity == Severity::Good {
                "it counts towards a majority"
            } else {
                "nothing waits for it; it is looked at about once a second and comes back by itself"
            };
            findings.push(Finding::new(format!("node {location}"), severity, found, meaning));
            for mut finding in of_nodes.remove(&node.index).and_then(Result::ok).unwrap_or_default() {
                finding.check = format!("{location}: {}", finding.check);
                findings.push(finding);
            }
        }
        findings
    }

    fn of_the_whole(&self) -> Vec<Finding> {
        let (count, majority) = (self.nodes.len(), self.majority);
        let well = self.nodes.iter().filter(|node| node.is_in_service()).count();
        let mut findings = vec![Finding::new(
            "majority",
            match well {
                well if well < majority => Severity::Failure,
                well if well < count => Severity::Warning,
                _ => Severity::Good,
            },
            format!("{well} of {count} nodes in service, {majority} are needed"),
            match well.checked_sub(majority) {
                None => "nobody can take a lock now".to_owned(),
                Some(spare) => format!("{spare} more may fail"),
            },
        )];
        if count % 2 == 0 {
            let (fewer, outlived) = (count - 1, count - majority);
            findings.push(Finding::new(
                "number of nodes",
                Severity::Warning,
                format!("{count}, which is even"),
                format!("it outlives {outlived}, as {} nodes would, and votes can be split in halves: use {} or {}",
                    fewer.max(LEAST_NODES), fewer.max(LEAST_NODES), count + 1),
            ));
        }
        findings.push(Finding::new(
            "restart",
            Severity::Note,
            "a node that lost its data must not serve for the longest TTL in use",
            "else a lock that is held can be granted again; delay its start, or keep its data on disk with every write",
        ));
        findings
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::ClaimId;

    #[test]
    fn the_whole_promises_what_its_weakest_node_does() {
        let strong = Guarantees::strict("a");
        let mut weak = Guarantees::strict("b");
        weak.fencing = Fencing::TimeFloor;
        weak.persistence = Persistence::None;
        (weak.fifo, weak.may_evict, weak.lost_at_failover) = (true, true, true);
        weak.slack = Duration::from_secs(1);
        (weak.least_ttl, weak.most_ttl) = (Duration::from_secs(2), Duration::from_secs(60));
        let all = weakest(&[strong.clone(), weak, strong.clone()]);
        assert_eq!((all.fencing, all.persistence), (Fencing::TimeFloor, Persistence::None));
        assert!(!all.fifo && all.may_evict && all.lost_at_failover && !all.frees_at_process_death);
        assert!(all.slack > Duration::from_secs(1));
        assert_eq!((all.least_ttl, all.most_ttl), (Duration::from_secs(2), Duration::from_secs(60)));
        assert_eq!(&*all.server, "quorum over 2 of a, 1 of b");
        assert_eq!(weakest(&[strong]).fencing, Fencing::Strict);
    }

    #[test]
    fn who_has_no_majority_is_no_holder() {
        let name = Name::new("a").unwrap();
        let view = |id: u8, token: u64, left: u64| {
            let mut view = LockView::free(name.clone());
            view.holder = Some(Holder {
                id: Some(ClaimId::from_bytes([id; 16])),
                token: Some(FencingToken::new(token)),
                remaining: Some(Duration::from_secs(left)),
                ..Holder::default()
            });
            view
        };
        let split =
            [view(1, 5, 9), view(1, 5, 9), view(2, 6, 9), view(2, 6, 9), LockView::free(name.clone())];
        assert_eq!(merge(name.clone(), &split, 3).holder, None);
        let won = [view(1, 7, 9), view(1, 7, 5), view(1, 7, 3), view(1, 8, 1), view(2, 6, 9)];
        let holder = merge(name.clone(), &won, 3).holder.unwrap();
        assert_eq!((holder.token.unwrap().get(), holder.remaining), (7, Some(Duration::from_secs(3))));
    }
}
