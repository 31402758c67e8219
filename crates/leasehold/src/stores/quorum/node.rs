//! One node of a quorum: a store that may not be open yet, and may be set aside.

use std::collections::VecDeque;
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::sync::Notify;

use crate::clock::{self, Instant};
use crate::error::{Error, ErrorKind, Result};
use crate::store::Store;
use crate::types::{Acquired, Claim, Held, Name, Query, Released, Renewal};

/// How often a node that was set aside is looked at.
const PROBE_EVERY: Duration = Duration::from_secs(1);
/// How long such a look may take: opening a store takes some round trips.
const PROBE_FOR: Duration = Duration::from_secs(5);
/// The most releases that are kept for a node until it is back; what is beyond ends by its TTL.
const BACKLOG: usize = 100_000;

/// What opens a node's store.
pub type Opening = Pin<Box<dyn Future<Output = Result<Arc<dyn Store>>> + Send>>;

/// Where a node is, and how its store is opened: at once, or when it can be reached again.
pub struct NodeSource {
    pub(super) location: Arc<str>,
    pub(super) open: Box<dyn Fn() -> Opening + Send + Sync>,
}

impl NodeSource {
    /// A node at `location` (a URL without secrets), opened by `open`: called again, about once a second, until it gives a store.
    pub fn new(location: impl Into<Arc<str>>, open: impl Fn() -> Opening + Send + Sync + 'static) -> Self {
        Self { location: location.into(), open: Box::new(open) }
    }

    /// A node whose store is open.
    pub fn over(location: impl Into<Arc<str>>, store: Arc<dyn Store>) -> Self {
        Self::new(location, move || {
            let store = store.clone();
            Box::pin(async move { Ok(store) })
        })
    }
}

impl fmt::Debug for NodeSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("NodeSource").field(&self.location).finish()
    }
}

/// A node.
#[derive(Debug)]
pub(super) struct Node {
    /// Its place in the quorum's list.
    pub(super) index: usize,
    source: NodeSource,
    runtime: Handle,
    store: OnceLock<Arc<dyn Store>>,
    /// Why it can never be a node.
    refused: OnceLock<Error>,
    opening: tokio::sync::Mutex<()>,
    in_service: AtomicBool,
    state: Mutex<State>,
    /// Rings when it is set aside or is back.
    pub(super) changed: Notify,
    /// The quorum's: rings when what is held should be confirmed.
    disturbed: Arc<Notify>,
}

#[derive(Debug, Default)]
struct State {
    /// Why it is set aside.
    why: String,
    probing: bool,
    /// Releases that it is to be told of when it is back, and until when they matter.
    backlog: VecDeque<(Held, Instant)>,
}

impl Node {
    pub(super) fn new(
        index: usize,
        source: NodeSource,
        runtime: Handle,
        disturbed: Arc<Notify>,
    ) -> Arc<Self> {
        Arc::new(Self {
            index,
            source,
            runtime,
            store: OnceLock::new(),
            refused: OnceLock::new(),
            opening: tokio::sync::Mutex::new(()),
            in_service: AtomicBool::new(true),
            state: Mutex::default(),
            changed: Notify::new(),
            disturbed,
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn location(&self) -> &Arc<str> {
        &self.source.location
    }

    /// Its store, if it is open.
    pub(super) fn opened(&self) -> Option<&Arc<dyn Store>> {
        self.store.get()
    }

    /// Whether requests wait for it.
    pub(super) fn is_in_service(&self) -> bool {
        self.in_service.load(Ordering::Acquire)
    }

    /// Why it is set aside.
    pub(super) fn why(&self) -> String {
        self.state().why.clone()
    }

    /// How many releases wait for it.
    pub(super) fn backlog(&self) -> usize {
        self.state().backlog.len()
    }

    /// Why it can never be a node, once that is known.
    pub(super) fn refused(&self) -> Option<&Error> {
        self.refused.get()
    }

    /// Its store, opened if need be. Calls that come meanwhile share the attempt. A store that goes by the life of the process
    /// is refused for good: a killed runner would free its majority before its command is dead.
    pub(super) async fn store(self: &Arc<Self>) -> Result<Arc<dyn Store>> {
        if let Some(store) = self.store.get() {
            return Ok(store.clone());
        }
        let _turn = self.opening.lock().await;
        if let Some(store) = self.store.get() {
            return Ok(store.clone());
        }
        if let Some(error) = self.refused() {
            return Err(error.clone());
        }
        let store = (self.source.open)().await?;
        if store.lifeline().is_some() {
            let what = "a store that goes by the life of the process cannot be a node of a quorum";
            let error = Error::new(ErrorKind::Unsupported, what)
                .on_store(self.location())
                .advise("use independent servers, or sqlite: without quorum:");
            return Err(self.refused.get_or_init(|| error).clone());
        }
        let _ = self.store.set(store.clone());
        self.listen(&store);
        Ok(store)
    }

    /// Passes on what the store says of its connection, for as long as both live.
    fn listen(self: &Arc<Self>, store: &Arc<dyn Store>) {
        let (store, disturbed) = (Arc::downgrade(store), Arc::downgrade(&self.disturbed));
        self.runtime.spawn(async move {
            loop {
                let Some(there) = store.upgrade() else { return };
                // Not for ever: a store must not live on because somebody listens to it.
                let heard = clock::timeout_at(clock::now().plus(PROBE_EVERY), there.disturbed()).await;
                drop(there);
                let Some(disturbed) = disturbed.upgrade() else { return };
                if heard.is_some() {
                    disturbed.notify_one();
                }
            }
        });
    }

    pub(super) async fn acquire(self: &Arc<Self>, claim: &Claim) -> Result<Acquired> {
        let answer = match self.store().await {
            Ok(store) => store.acquire(claim).await,
            Err(error) => Err(error),
        };
        self.heard(answer.as_ref().err());
        answer
    }

    pub(super) async fn release(self: &Arc<Self>, held: &Held) -> Result<Released> {
        let answer = match self.store().await {
            Ok(store) => store.release(held).await,
            Err(error) => Err(error),
        };
        self.heard(answer.as_ref().err());
        answer
    }

    pub(super) async fn renew(self: &Arc<Self>, held: &[Held]) -> Vec<Result<Renewal>> {
        let answers = match self.store().await {
            Ok(store) => store.renew(held).await,
            Err(error) => vec![Err(error); held.len()],
        };
        let failed = answers.iter().all(|answer| matches!(answer, Err(error) if error.is_transient()));
        self.heard(answers.first().filter(|_| failed).and_then(|answer| answer.as_ref().err()));
        answers
    }

    /// Takes note of how a call ended: one that got no answer sets the node aside, any answer takes it back.
    pub(super) fn heard(self: &Arc<Self>, error: Option<&Error>) {
        match error {
            Some(error) if error.is_transient() || self.opened().is_none() => {
                self.set_aside(&error.to_string());
            }
            _ if !self.is_in_service() => self.back(),
            _ => {}
        }
    }

    /// From now on nothing waits for it, until a look finds it well.
    pub(super) fn set_aside(self: &Arc<Self>, why: &str) {
        let was = self.in_service.swap(false, Ordering::AcqRel);
        why.clone_into(&mut self.state().why);
        if was {
            tracing::warn!(node = %self.location(), why, "set aside");
            self.changed.notify_waiters();
        }
        self.look_after();
    }

    fn look_after(self: &Arc<Self>) {
        if !std::mem::replace(&mut self.state().probing, true) {
            self.runtime.spawn(probe_until_back(Arc::downgrade(self)));
        }
    }

    fn back(self: &Arc<Self>) {
        if !self.in_service.swap(true, Ordering::AcqRel) {
            tracing::info!(node = %self.location(), "back in service");
            self.changed.notify_waiters();
        }
    }

    /// Remembers a release that could not be told, until it does not matter any more.
    pub(super) fn tell_later(self: &Arc<Self>, held: Held, until: Instant) {
        {
            let mut state = self.state();
            if state.backlog.len() < BACKLOG {
                state.backlog.push_back((held, until));
            }
        }
        self.look_after();
    }

    /// One look; whether it is well.
    async fn probe(self: &Arc<Self>) -> bool {
        let work = async {
            let name = Name::new("quorum probe")?;
            self.store().await?.inspect(&Query::One(name)).await
        };
        match clock::timeout_at(clock::now().plus(PROBE_FOR), work).await {
            Some(Ok(_)) => true,
            // It answers: whatever ails it is not silence.
            Some(Err(error)) => {
                self.state().why = error.to_string();
                !error.is_transient() && self.opened().is_some()
            }
            None => false,
        }
    }

    /// Tells it of the releases that it missed; false if it went away again.
    async fn catch_up(self: &Arc<Self>) -> bool {
        loop {
            let now = clock::now();
            let next = {
                let mut state = self.state();
                state.backlog.retain(|(_, until)| *until > now);
                state.backlog.pop_front()
            };
            let Some((held, until)) = next else { return true };
            let Ok(store) = self.store().await else { return false };
            let told = clock::timeout_at(clock::now().plus(PROBE_FOR), store.release(&held)).await;
            let lost = match told {
                None => Some(Error::new(ErrorKind::Unknown, "no answer")),
                Some(answer) => answer.err().filter(Error::is_transient),
            };
            if lost.is_some() {
                self.tell_later(held, until);
                return false;
            }
        }
    }
}

/// Looks at a node about once a second until it is back, and first tells it of the releases that it missed.
async fn probe_until_back(node: Weak<Node>) {
    loop {
        clock::sleep(PROBE_EVERY * 3 / 4 + clock::jitter(PROBE_EVERY / 2)).await;
        let Some(node) = node.upgrade() else { return };
        let well = node.is_in_service() || node.probe().await;
        if !(well && node.catch_up().await) {
            continue;
        }
        let mut state = node.state();
        // A release that came in between is told too; whoever sets it aside from now on starts another look.
        if !state.backlog.is_empty() {
            continue;
        }
        state.probing = false;
        drop(state);
        node.back();
        return;
    }
}
