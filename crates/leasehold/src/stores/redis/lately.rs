//! What was given back lately. The next master may not have heard of it, and would keep the lock for nobody until its TTL
//! ends: so it is given back there once more.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use super::RedisStore;
use crate::clock::{self, Instant};
use crate::types::Held;

/// For how long: longer than two servers can both take writes as masters before their clients leave the old one.
const KEPT: Duration = Duration::from_secs(3);
/// And how many at most.
const MOST: usize = 4_096;
/// After how long one that got no answer is tried again.
const AGAIN: Duration = Duration::from_millis(100);

/// The claims that were released last, while anything is released at all.
#[derive(Debug, Default)]
pub(super) struct Lately(Mutex<VecDeque<(Instant, Held)>>);

impl Lately {
    pub(super) fn note(&self, held: &Held) {
        let now = clock::now();
        let mut released = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        while released.front().is_some_and(|(at, _)| now.since(*at) > KEPT) || released.len() >= MOST {
            released.pop_front();
        }
        released.push_back((now, held.clone()));
    }

    fn take(&self) -> VecDeque<(Instant, Held)> {
        std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Has the claims that `store` released lately released on each new master, from now on.
pub(super) fn attend(store: &Arc<RedisStore>) {
    let mut masters = store.connector.masters();
    masters.mark_unchanged();
    let (weak, runtime) = (Arc::downgrade(store), store.connector.runtime());
    runtime.spawn(async move {
        while masters.changed().await.is_ok() {
            let Some(store) = Weak::upgrade(&weak) else { return };
            for (_, held) in store.lately.take() {
                let store = store.clone();
                tokio::spawn(async move {
                    // Each claim has an id of its own: this can free no lock but its own.
                    let until = clock::now().plus(KEPT);
                    while let Err(error) = store.give_back(&held, false, false).await {
                        tracing::debug!(lock = %held.name, %error, "not given back again on the new master");
                        if !error.is_transient() || clock::now() >= until {
                            break;
                        }
                        clock::sleep(AGAIN).await;
                    }
                });
            }
        }
    });
}
