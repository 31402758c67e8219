//! Who holds what in a cluster: each node is asked for what it has.

use std::collections::{BTreeMap, BTreeSet};

use super::super::keys;
use super::super::listing::{BATCH, MOST_WAITERS, PAGE, waits_for};
use super::map::{Endpoint, Redirect, unsettled};
use super::nodes::Node;
use super::{ClusterStore, MOST_HOPS};
use crate::error::Result;
use crate::types::{LockView, Name, Page, Query};

impl ClusterStore {
    pub(super) async fn look_at(&self, query: &Query) -> Result<Page<LockView>> {
        match query {
            Query::One(name) => Ok(Page { items: vec![self.view(name, MOST_WAITERS).await?], next: None }),
            Query::Waits { owner } => {
                let announced = |node: Node, _| async move {
                    let deadline = node.store.deadline(None);
                    let link = node.store.connector.link(deadline).await?;
                    node.store.announced(&link, owner, deadline).await
                };
                let slot = keys::slot(&self.keyspace.owner(owner));
                let names = self.routed(slot, self.deadline(None), announced).await?;
                let mut items = self.views(&names, MOST_WAITERS).await?;
                items.retain(|view| waits_for(view, owner));
                Ok(Page { items, next: None })
            }
            Query::Prefix { prefix, after, limit } => {
                let limit = (*limit).clamp(1, PAGE);
                let found = self.indexed(prefix, after.as_ref(), limit).await?;
                let names: Vec<_> = found.into_iter().collect();
                let next = names.get(limit - 1).filter(|_| names.len() > limit).cloned();
                let mut items = self.views(&names[..names.len().min(limit)], 0).await?;
                items.retain(|view| view.holder.is_some());
                Ok(Page { items, next })
            }
        }
    }

    /// Up to one name more than `limit` of each master's list, in order.
    async fn indexed(&self, prefix: &[u8], after: Option<&Name>, limit: usize) -> Result<BTreeSet<Name>> {
        let mut tries = 0;
        'anew: loop {
            tries += 1;
            let mut found = BTreeSet::new();
            for (node, first) in self.nodes.masters() {
                let deadline = node.store.deadline(None);
                let link = node.store.connector.link(deadline).await?;
                let index = self.keyspace.index_in(first);
                match node.store.indexed(&link, &index, prefix, after, limit, deadline).await {
                    Ok(names) => found.extend(names),
                    Err(error) if Redirect::of(&error, &node.endpoint).is_none() => return Err(error),
                    Err(error) if tries >= MOST_HOPS => return Err(unsettled(error)),
                    // The node's first slot is another one now.
                    Err(_) => {
                        self.nodes.refresh().await?;
                        continue 'anew;
                    }
                }
            }
            return Ok(found);
        }
    }

    async fn view(&self, name: &Name, waiters: usize) -> Result<LockView> {
        let look = |node: Node, asking| async move {
            let deadline = node.store.deadline(None);
            let link = node.store.connector.link(deadline).await?;
            let names = std::slice::from_ref(name);
            let views = node.store.views(&link, &[names], waiters, asking, deadline).await?;
            Ok(views.into_iter().next().unwrap_or_else(|| LockView::free(name.clone())))
        };
        self.routed(self.slot(name)?, self.deadline(None), look).await
    }

    /// One view for each name, in their order: a round trip for each node.
    async fn views(&self, names: &[Name], waiters: usize) -> Result<Vec<LockView>> {
        let mut by_node: BTreeMap<Endpoint, Vec<(u16, Name)>> = BTreeMap::new();
        for name in names {
            let slot = self.slot(name)?;
            by_node.entry(self.nodes.owner(slot)?.endpoint).or_default().push((slot, name.clone()));
        }
        let mut views = Vec::with_capacity(names.len());
        for (endpoint, mut at_node) in by_node {
            at_node.sort_by_key(|(slot, _)| *slot);
            let slots: Vec<_> = at_node.iter().map(|(slot, _)| *slot).collect();
            let names: Vec<_> = at_node.into_iter().map(|(_, name)| name).collect();
            let (mut batches, mut rest) = (Vec::new(), &names[..]);
            for same in slots.chunk_by(|one, other| one == other) {
                let (batch, others) = rest.split_at(same.len());
                batches.extend(batch.chunks(BATCH));
                rest = others;
            }
            let store = self.nodes.at(&endpoint).store;
            let deadline = store.deadline(None);
            let link = store.connector.link(deadline).await?;
            match store.views(&link, &batches, waiters, false, deadline).await {
                Ok(found) => views.extend(found),
                // A slot is elsewhere, or on its way: each name finds its own.
                Err(_) => {
                    for name in &names {
                        views.push(self.view(name, waiters).await?);
                    }
                }
            }
        }
        views.sort_unstable_by(|one, other| one.name.cmp(&other.name));
        Ok(views)
    }
}
