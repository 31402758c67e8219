//! Finds circles of owners that wait for each other, over all processes that use a store.
//!
//! An edge is a claim in line: its owner waits for a lock that another owner holds. Every waiter that has an owner walks
//! these edges from its own, and only over claims that joined their lines before its own did. So of each circle exactly
//! one member can come back to itself, the one that joined last by the store's clock (ties: the larger claim id): it is
//! the one that closed the circle, and the one to give way. The others see nothing and wait on.
//!
//! A walk reads one owner after the other, but every claim that it goes over was in line already when the walker joined
//! and has been since: an owner does one thing at a time, so all of them have been stuck together from then on, and have
//! released nothing. That is exact but for what the store has not been told yet: a wait that was given up, or a guard that
//! was dropped, its release being under way. Therefore the second look: after a pause, in which such a request arrives,
//! each edge is read again, and each must be the same claim waiting for the same hold, by claim id and token. Neither ever
//! comes back once it has ended, so all of them were there together between the two looks.
//!
//! The ends of leases do not count. From outside a holder that died looks like one that lives until its lease ends; if
//! such a circle is reported, its victim began anew a little earlier than it had to, and no lock was lost.
//!
//! An owner with several waits at once is against the definition, but not refused: each of them counts as an edge of its
//! own, and a circle over any one of them is a circle.

use std::collections::HashSet;
use std::fmt;
use std::future::Future;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use crate::clock::{self, Instant};
use crate::error::{Error, ErrorKind, Result};
use crate::store::Store;
use crate::types::{ClaimId, Escaped, FencingToken, LockView, Name, Owner, Query, Record, Ticket};

/// From one look of a waiter to its next.
const LOOK_AGAIN: Duration = Duration::from_secs(3);
/// From a circle found to the second look: at least this, and up to twice as long.
const PAUSE: Duration = Duration::from_millis(100);
/// A look that takes longer is given up.
const LOOK_TIMEOUT: Duration = Duration::from_secs(10);
/// The most owners that one walk visits.
const MOST_OWNERS: usize = 64;
/// Of a label, so much is told.
const MOST_LABEL: usize = 80;

impl Owner {
    /// A new unit of work: the label, made safe to print and cut if it is long, and a random part, so that two units with
    /// one label are two.
    ///
    /// ```
    /// # use leasehold::Owner;
    /// assert_ne!(Owner::new("checkout 17"), Owner::new("checkout 17"));
    /// ```
    pub fn new(label: impl AsRef<str>) -> Self {
        Self::labelled(label.as_ref(), clock::claim_id())
    }
}

/// A claim in line and the hold that it waits for.
#[derive(Clone, Debug)]
struct Edge {
    owner: String,
    claim: ClaimId,
    since: u64,
    waiter: Record,
    name: Name,
    /// Who holds it, by claim and token.
    hold: (ClaimId, FencingToken),
    holder: Record,
}

impl Edge {
    /// Who joined later gives way first.
    fn rank(&self) -> (u64, ClaimId) {
        (self.since, self.claim)
    }

    fn is_same(&self, other: &Self) -> bool {
        self.claim == other.claim && self.name == other.name && self.hold == other.hold
    }

    fn held_by(&self) -> &str {
        self.holder.owner.as_deref().unwrap_or_default()
    }
}

/// What `owner` waits for that another owner, or itself, holds.
async fn waits_of(store: &dyn Store, owner: &str) -> Result<Vec<Edge>> {
    let query = Query::Waits { owner: owner.to_owned() };
    let views = store.inspect(&query).await?.items;
    Ok(views.into_iter().flat_map(|view| edges(view, owner)).collect())
}

fn edges(view: LockView, owner: &str) -> Vec<Edge> {
    let LockView { name, holder, queue, .. } = view;
    let Some(holder) = holder else { return Vec::new() };
    let (Some(id), Some(token), Some(record)) = (holder.id, holder.token, holder.record) else {
        return Vec::new();
    };
    if record.owner.is_none() {
        return Vec::new();
    }
    let own = queue.into_iter().filter_map(|waiter| {
        let says = waiter.record.filter(|record| record.owner.as_deref() == Some(owner))?;
        Some(Edge {
            owner: owner.to_owned(),
            claim: waiter.id,
            since: waiter.since_unix_micros.unwrap_or_default(),
            waiter: says,
            name: name.clone(),
            hold: (id, token),
            holder: record.clone(),
        })
    });
    own.collect()
}

/// Owners that wait for each other, beginning with the one that is to give way; each waits for what the next one holds,
/// the last for what the first holds.
#[derive(Debug)]
pub(crate) struct Circle(Vec<Edge>);

impl Circle {
    /// What the waiter that is to give way is told.
    pub(crate) fn into_error(self, store: &dyn Store) -> Error {
        let first = &self.0[0];
        Error::new(ErrorKind::Deadlock, format!("deadlock: {self}"))
            .for_name(&first.name)
            .on_store(&store.location())
            .advise("release what this unit of work holds and begin it anew, or take locks in one order everywhere")
    }
}

impl fmt::Display for Circle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let before = self.0.iter().cycle().skip(self.0.len() - 1);
        for (held, edge) in before.zip(&self.0) {
            let owner = Escaped(edge.owner.as_bytes());
            let (token, at) = (held.hold.1, Whereabouts(&held.holder));
            write!(f, "{owner} holds {} (token {token}, {at}) and waits for {}", held.name, edge.name)?;
            if (&edge.waiter.host, edge.waiter.pid) != (&held.holder.host, held.holder.pid) {
                write!(f, " ({})", Whereabouts(&edge.waiter))?;
            }
            f.write_str("; ")?;
        }
        let first = Escaped(self.0[0].owner.as_bytes());
        match self.0.len() {
            1 => write!(f, "{first} waits for itself"),
            _ => write!(f, "{first} was the last to wait and is to give way"),
        }
    }
}

/// Where a claim comes from, and why it was made.
struct Whereabouts<'a>(&'a Record);

impl fmt::Display for Whereabouts<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Record { host, pid, label, .. } = self.0;
        write!(f, "{}:{pid}", Escaped(host.as_bytes()))?;
        let Some(label) = label else { return Ok(()) };
        let end = label.char_indices().nth(MOST_LABEL).map_or(label.len(), |(at, _)| at);
        let dots = if end < label.len() { "..." } else { "" };
        write!(f, " \"{}{dots}\"", Escaped(&label.as_bytes()[..end]))
    }
}

/// The circle that `ticket` closes for `owner`, if there is one and this is the claim that is to give way.
///
/// # Errors
/// The store's.
pub(crate) async fn look(store: &dyn Store, ticket: &Ticket, owner: &Owner) -> Result<Option<Circle>> {
    let Some(found) = walk(store, ticket, owner.as_str()).await? else { return Ok(None) };
    clock::sleep(PAUSE + clock::jitter(PAUSE)).await;
    for edge in &found.0 {
        let now = waits_of(store, &edge.owner).await?;
        if !now.iter().any(|again| again.is_same(edge)) {
            return Ok(None);
        }
    }
    Ok(Some(found))
}

/// Breadth first over claims older than the own, each owner read once.
async fn walk(store: &dyn Store, ticket: &Ticket, owner: &str) -> Result<Option<Circle>> {
    let own = waits_of(store, owner).await?;
    let Some(first) = own.into_iter().find(|edge| edge.claim == ticket.id && edge.name == ticket.name) else {
        return Ok(None);
    };
    let rank = first.rank();
    // Each with the place of the one that led to it.
    let mut trail: Vec<(Edge, usize)> = vec![(first, 0)];
    let mut visited: HashSet<String> = HashSet::new();
    let mut at = 0;
    while at < trail.len() {
        let next = trail[at].0.held_by().to_owned();
        if next == owner {
            return Ok(Some(circle(trail, at)));
        }
        if visited.len() < MOST_OWNERS && visited.insert(next.clone()) {
            let older = waits_of(store, &next).await?.into_iter().filter(|edge| edge.rank() < rank);
            trail.extend(older.map(|edge| (edge, at)));
        }
        at += 1;
    }
    Ok(None)
}

/// The way from the first edge to the one at `last`.
fn circle(mut trail: Vec<(Edge, usize)>, last: usize) -> Circle {
    let mut at = last;
    let mut way = Vec::new();
    loop {
        way.push(at);
        if at == 0 {
            break;
        }
        at = trail[at].1;
    }
    // From the end, so that taking one out moves none that is still needed.
    let mut edges: Vec<Edge> = way.into_iter().map(|at| trail.swap_remove(at).0).collect();
    edges.reverse();
    Circle(edges)
}

/// A waiter's watch for circles, while it stands in line.
pub(crate) struct Lookout {
    store: Arc<dyn Store>,
    owner: Owner,
    next: Instant,
    /// The look that is under way: it goes on where it was when the waiter has been elsewhere.
    look: Option<Pin<Box<dyn Future<Output = Option<Circle>> + Send>>>,
}

impl Lookout {
    /// For a claim of `owner` that begins to wait; it looks for the first time `after` so long.
    pub(crate) fn new(store: &Arc<dyn Store>, owner: &Owner, after: Duration) -> Self {
        let next = clock::now().plus(after);
        Self { store: store.clone(), owner: owner.clone(), next, look: None }
    }

    /// What `work` gives, unless a circle is found before.
    ///
    /// # Errors
    /// `Deadlock`.
    pub(crate) async fn beside<T>(
        lookout: Option<&mut Self>,
        ticket: &Ticket,
        work: impl Future<Output = T>,
    ) -> Result<T> {
        let Some(lookout) = lookout else { return Ok(work.await) };
        let store = lookout.store.clone();
        let (mut work, mut alarm) = (pin!(work), pin!(lookout.alarm(ticket)));
        let first = std::future::poll_fn(|cx| {
            if let Poll::Ready(out) = work.as_mut().poll(cx) {
                return Poll::Ready(Ok(out));
            }
            alarm.as_mut().poll(cx).map(Err)
        });
        first.await.map_err(|circle| circle.into_error(&*store))
    }

    /// Looks when it is time, until there is a circle. Dropped, it goes on with the next call.
    async fn alarm(&mut self, ticket: &Ticket) -> Circle {
        loop {
            if self.look.is_none() {
                clock::sleep_until(self.next).await;
            }
            let look = self.look.get_or_insert_with(|| {
                Box::pin(announced_look(self.store.clone(), ticket.clone(), self.owner.clone()))
            });
            let found = look.as_mut().await;
            self.look = None;
            self.next = clock::now().plus(LOOK_AGAIN);
            if let Some(circle) = found {
                return circle;
            }
        }
    }
}

/// One look that the others can see too. What goes wrong is no reason not to wait on.
async fn announced_look(store: Arc<dyn Store>, ticket: Ticket, owner: Owner) -> Option<Circle> {
    let work = async {
        store.announce(&ticket, owner.as_str()).await?;
        look(&*store, &ticket, &owner).await
    };
    match clock::timeout_at(clock::now().plus(LOOK_TIMEOUT), work).await {
        Some(Ok(found)) => found,
        Some(Err(error)) => {
            tracing::debug!(lock = %ticket.name, %owner, %error, "could not look for a deadlock");
            None
        }
        None => {
            tracing::debug!(lock = %ticket.name, %owner, "a look for a deadlock took too long");
            None
        }
    }
}
