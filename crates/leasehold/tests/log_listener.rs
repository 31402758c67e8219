//! A listener to the log that looks at the guard it hears of.

#![allow(clippy::disallowed_methods, clippy::unwrap_used)]

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use leasehold::stores::memory::{Fault, MemoryStore, Verb};
use leasehold::{Guard, Locks, Status, clock};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Metadata, Subscriber};

static GUARD: OnceLock<Guard> = OnceLock::new();

struct Listener;

impl Subscriber for Listener {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }
    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }
    fn record(&self, _: &Id, _: &Record<'_>) {}
    fn record_follows_from(&self, _: &Id, _: &Id) {}
    fn event(&self, _: &Event<'_>) {
        let _ = GUARD.get().map(Guard::status);
    }
    fn enter(&self, _: &Id) {}
    fn exit(&self, _: &Id) {}
}

#[tokio::test]
async fn a_listener_to_the_log_may_look_at_the_guard() {
    tracing::subscriber::set_global_default(Listener).unwrap();
    let store = Arc::new(MemoryStore::new());
    let locks = Locks::over(store.clone()).unwrap();
    let guard = GUARD
        .get_or_init(|| pollster::block_on(locks.mutex("a").ttl(Duration::from_secs(3)).lock()).unwrap());
    store.inject(Verb::Renew, [Fault::Refuse]);
    let told = async {
        guard.changed().await;
        while guard.status() != Status::Held {
            guard.changed().await;
        }
        // Nobody renews it any more: the keeper finds its loss by the clock.
        store.inject(Verb::Renew, std::iter::repeat_n(Fault::Refuse, 10_000));
        guard.lost().await;
        // The keeper still serves others.
        locks.mutex("b").lock().await.unwrap().changed().await;
    };
    let latest = clock::now().plus(Duration::from_secs(30));
    clock::timeout_at(latest, told).await.expect("nothing hangs");
}
