//! What several nodes say, as one answer.

use crate::types::{Guarantees, LockView, Page, Persistence};

/// What holds on every one of them. At least one is given.
pub(super) fn weakest(server: std::sync::Arc<str>, nodes: impl Iterator<Item = Guarantees>) -> Guarantees {
    let mut all = nodes;
    let mut weakest = all.next().unwrap_or_else(|| Guarantees::strict(server.clone()));
    for node in all {
        weakest.fencing = weakest.fencing.min(node.fencing);
        if rank(node.persistence) < rank(weakest.persistence) {
            weakest.persistence = node.persistence;
        }
        weakest.fifo &= node.fifo;
        weakest.frees_at_process_death &= node.frees_at_process_death;
        weakest.slack = weakest.slack.max(node.slack);
        weakest.least_ttl = weakest.least_ttl.max(node.least_ttl);
        weakest.most_ttl = weakest.most_ttl.min(node.most_ttl);
        weakest.may_evict |= node.may_evict;
        weakest.lost_at_failover |= node.lost_at_failover;
    }
    weakest.server = server;
    weakest
}

/// What would not say may be as bad as anything but nothing at all.
fn rank(persistence: Persistence) -> u8 {
    match persistence {
        Persistence::None => 0,
        Persistence::Unknown => 1,
        Persistence::Snapshot => 2,
        Persistence::Log => 3,
        Persistence::Durable => 4,
    }
}

/// The first `limit` of several listings, each in order and each of the same part. A page that has a next one says nothing
/// of names after that: beyond the first such end nothing is told yet.
pub(super) fn pages(pages: Vec<Page<LockView>>, limit: usize) -> Page<LockView> {
    let end = pages.iter().filter_map(|page| page.next.clone()).min();
    let mut items: Vec<LockView> = pages.into_iter().flat_map(|page| page.items).collect();
    items.retain(|view| end.as_ref().is_none_or(|end| view.name <= *end));
    items.sort_by(|one, other| one.name.cmp(&other.name));
    items = one_each(items);
    let next = if items.len() > limit {
        items.truncate(limit);
        items.last().map(|view| view.name.clone())
    } else {
        end
    };
    Page { items, next }
}

/// One view of each name; equal names stand together.
pub(super) fn one_each(items: Vec<LockView>) -> Vec<LockView> {
    let mut merged: Vec<LockView> = Vec::with_capacity(items.len());
    for view in items {
        match merged.last_mut().filter(|last| last.name == view.name) {
            Some(last) => add(last, view),
            None => merged.push(view),
        }
    }
    merged
}

/// Adds how a lock looks at the place that it moves to, or from.
pub(super) fn add(view: &mut LockView, other: LockView) {
    match (&mut view.holder, other.holder) {
        (None, theirs) => view.holder = theirs,
        (Some(ours), Some(theirs)) if ours.id == theirs.id => {
            ours.token = ours.token.max(theirs.token);
            ours.remaining = ours.remaining.min(theirs.remaining);
        }
        _ => {}
    }
    view.last_token = view.last_token.max(other.last_token);
    view.waiters += other.waiters;
    view.queue.extend(other.queue);
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::types::{Fencing, Name};

    fn page(names: &[&str], next: Option<&str>) -> Page<LockView> {
        let name = |name: &str| Name::new(name).unwrap();
        Page { items: names.iter().map(|text| LockView::free(name(text))).collect(), next: next.map(name) }
    }

    fn shown(page: &Page<LockView>) -> (String, Option<String>) {
        let names: Vec<_> = page.items.iter().map(|view| view.name.to_string()).collect();
        (names.join(" "), page.next.as_ref().map(Name::to_string))
    }

    #[test]
    fn a_ring_promises_what_every_node_does() {
        let mut good = Guarantees::strict("good");
        (good.fifo, good.frees_at_process_death) = (true, true);
        let mut bad = Guarantees::strict("bad");
        (bad.fencing, bad.persistence) = (Fencing::TimeFloor, Persistence::Snapshot);
        (bad.slack, bad.least_ttl, bad.most_ttl) =
            (Duration::from_secs(1), Duration::from_secs(2), Duration::from_secs(3));
        (bad.may_evict, bad.lost_at_failover) = (true, true);
        for nodes in [[good.clone(), bad.clone()], [bad.clone(), good]] {
            let ring = weakest("ring".into(), nodes.into_iter());
            assert_eq!(ring, Guarantees { server: "ring".into(), ..bad.clone() });
        }
    }

    #[test]
    fn listings_are_merged_in_order_and_no_name_is_skipped() {
        let merged = |parts: Vec<Page<LockView>>, limit| shown(&pages(parts, limit));
        let two = || vec![page(&["a", "d"], None), page(&["b", "c"], None)];
        assert_eq!(merged(two(), 9), ("a b c d".into(), None));
        assert_eq!(merged(two(), 4), ("a b c d".into(), None));
        assert_eq!(merged(two(), 3), ("a b c".into(), Some("c".into())));
        // The first has told names up to b only: c may be another one's, and one between may be missing.
        assert_eq!(
            merged(vec![page(&["a", "b"], Some("b")), page(&["c"], None)], 9),
            ("a b".into(), Some("b".into()))
        );
        // A page may be empty and go on.
        assert_eq!(
            merged(vec![page(&[], Some("k")), page(&["z"], None)], 9),
            (String::new(), Some("k".into()))
        );
        assert_eq!(merged(vec![page(&["a"], None), page(&["a", "b"], None)], 9), ("a b".into(), None));
    }
}
