//! The ring over real servers: what lives where, what a dead node costs, and how a node is added while locks are held.

#![allow(clippy::disallowed_methods, clippy::unwrap_used)]

use std::sync::Arc;
use std::time::Duration;

use leasehold::store::Store;
use leasehold::stores::memory::{Fault, MemoryStore, Verb};
use leasehold::stores::ring::{Node, RingStore};
use leasehold::{
    Acquired, Claim, ClaimId, ErrorKind, FencingToken, Held, Locks, Loss, Mutex, Name, Owner, Query,
    Released, Retry, Status, clock, connect,
};
use leasehold_chaos::servers::RedisServer;

mod ring_nodes;
mod yielding;
use ring_nodes::{moving_names, names_at, url};
use yielding::{Yielding, drop_after};

fn ms(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

async fn is_held(locks: &Locks, name: &str) -> bool {
    locks.show(name).await.unwrap().holder.is_some()
}

/// Waits for a condition that sends no event, for twenty seconds at most.
async fn until<F: Future<Output = bool>>(what: &str, mut holds: impl FnMut() -> F) {
    let latest = clock::now().plus(ms(20_000));
    while !holds().await {
        assert!(clock::now() < latest, "did not come about: {what}");
        clock::sleep(ms(5)).await;
    }
}

/// Three servers, and the locks of those that know the first two, of those that add the third, and of those that know all.
struct Change {
    servers: [RedisServer; 3],
    phases: [Locks; 3],
    /// Names that move to the third.
    names: Vec<String>,
}

impl Change {
    async fn start() -> Self {
        Self::over([RedisServer::start(), RedisServer::start(), RedisServer::start()]).await
    }

    async fn over(servers: [RedisServer; 3]) -> Self {
        let [a, b, c] = [0, 1, 2].map(|at: usize| servers[at].url());
        let urls = ring_nodes::phases(&a, &b, &c);
        let names = moving_names(&[&a, &b], &[&a, &b, &c], 5);
        let mut phases = Vec::new();
        for url in &urls {
            phases.push(connect(url).await.unwrap());
        }
        Self { servers, phases: phases.try_into().unwrap(), names }
    }

    fn mutex(&self, phase: usize) -> Mutex {
        self.phases[phase].mutex(&self.names[0])
    }

    /// The node that the first name comes from.
    fn old(&self) -> &RedisServer {
        self.home(&self.names[0])
    }

    /// The node that a name comes from.
    fn home(&self, name: &String) -> &RedisServer {
        let [a, b] = [self.servers[0].url(), self.servers[1].url()];
        let at_a = names_at(&[&a, &b], &a, 50).contains(name);
        &self.servers[usize::from(!at_a)]
    }
}

#[tokio::test]
async fn a_name_lives_on_one_node_and_a_listing_shows_all_of_them() {
    let servers = [RedisServer::start(), RedisServer::start(), RedisServer::start()];
    let urls: Vec<_> = servers.iter().map(RedisServer::url).collect();
    let locks = connect(&url(&urls)).await.unwrap();
    let again = connect(&url(&urls.iter().rev().cloned().collect::<Vec<_>>())).await.unwrap();
    let mut guards = Vec::new();
    for n in 0..40 {
        guards.push(locks.mutex(format!("n{n:02}")).ttl(ms(5000)).lock().await.unwrap());
        assert!(
            again.mutex(format!("n{n:02}")).try_lock().await.unwrap().is_none(),
            "another order of nodes"
        );
    }
    // A listing on Redis shows what was renewed once.
    for changed in guards.iter().map(leasehold::Guard::changed) {
        changed.await;
    }
    let (mut seen, mut after) = (Vec::new(), None);
    loop {
        let page = locks.inspect(&prefix("n", after, 7)).await.unwrap();
        assert!(page.items.len() <= 7);
        seen.extend(page.items.iter().map(|view| view.name.to_string()));
        after = page.next;
        if after.is_none() {
            break;
        }
    }
    assert_eq!(seen, (0..40).map(|n| format!("n{n:02}")).collect::<Vec<_>>());
    let share = |server: &RedisServer| server.cli(&["KEYS", "n??"]).lines().count();
    let shares: Vec<_> = servers.iter().map(share).collect();
    assert_eq!(shares.iter().sum::<usize>(), 40, "{shares:?}");
    assert!(shares.iter().all(|share| (3..30).contains(share)), "{shares:?}");
    for guard in guards {
        assert_eq!(guard.unlock().await.unwrap(), Released::Released);
    }
    let findings = locks.diagnose().await;
    for url in &urls {
        assert!(findings.iter().any(|finding| finding.check.contains(url.as_str())), "{url} is looked over");
    }
}

fn prefix(prefix: &str, after: Option<Name>, limit: usize) -> Query {
    Query::Prefix { prefix: prefix.into(), after, limit }
}

#[tokio::test]
async fn a_dead_node_makes_its_own_names_unavailable_and_no_others() {
    let mut servers = [RedisServer::start(), RedisServer::start()];
    let urls: Vec<_> = servers.iter().map(RedisServer::url).collect();
    let locks = connect(&url(&urls)).await.unwrap();
    let [ours, theirs] = [0, 1].map(|at: usize| names_at(&[&urls[0], &urls[1]], &urls[at], 2));
    let held = locks.mutex(&ours[0]).lock().await.unwrap();
    servers[1].kill9();
    let error = locks.mutex(&theirs[0]).lock().await.unwrap_err();
    assert!(error.is_transient(), "{error:?}");
    assert!(error.to_string().contains(&urls[1]), "it says which node: {error}");
    let other = locks.mutex(&ours[1]).lock().await.unwrap();
    assert_eq!((other.status(), held.status()), (Status::Held, Status::Held));
    assert_eq!(
        locks.inspect(&prefix("", None, 9)).await.unwrap_err().kind(),
        ErrorKind::Unavailable,
        "no half listing"
    );
    // Who connects now is told, and told which.
    let error = connect(&url(&urls)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    assert!(
        error.to_string().contains(&urls[1]) && error.to_string().contains("all of its nodes"),
        "{error}"
    );
    servers[1].restart();
    let back = locks.mutex(&theirs[0]).lock().await.unwrap();
    assert_eq!(back.unlock().await.unwrap(), Released::Released);
}

#[tokio::test]
async fn a_node_that_answers_no_renewal_delays_those_of_no_other() {
    let (good, bad) = (Arc::new(MemoryStore::new()), Arc::new(ring_nodes::Silent::default()));
    let ring =
        RingStore::new(vec![Node::new(good.clone()).named("a"), Node::new(bad.clone()).named("b")]).unwrap();
    let [ours, theirs] = ["a", "b"].map(|node| names_at(&["a", "b"], node, 1).remove(0));
    let locks = Locks::over(Arc::new(ring)).unwrap();
    let [good_guard, bad_guard] = [&ours, &theirs].map(|name| locks.mutex(name).ttl(ms(1000)));
    let (good_guard, bad_guard) = (good_guard.lock().await.unwrap(), bad_guard.lock().await.unwrap());
    assert_eq!(bad_guard.lost().await, Loss::Expired);
    let renewals = good.calls(Verb::Renew);
    assert!(renewals > 0, "renewed while the other node was silent");
    assert_eq!(good_guard.status(), Status::Held);
    clock::sleep(ms(1200)).await;
    assert_ne!(good_guard.status(), Status::Lost);
    assert!(good.calls(Verb::Renew) > renewals);
}

#[tokio::test]
async fn a_deadlock_over_two_nodes_is_found() {
    let servers = [RedisServer::start(), RedisServer::start()];
    let urls: Vec<_> = servers.iter().map(RedisServer::url).collect();
    let [one, other] = [0, 1].map(|at: usize| names_at(&[&urls[0], &urls[1]], &urls[at], 1).remove(0));
    let both_hold = Arc::new(tokio::sync::Barrier::new(2));
    let unit = |label: &'static str, first: String, second: String| {
        let (url, both_hold) = (url(&urls), both_hold.clone());
        async move {
            let locks = connect(&url).await.unwrap();
            let owner = Owner::new(label);
            let mutex = |name| locks.mutex(name).owner(&owner).deadlock_after(ms(50));
            let held = mutex(first).lock().await.unwrap();
            both_hold.wait().await;
            (mutex(second).lock().await.map(drop), held)
        }
    };
    let (one, other) = tokio::join!(async { unit("left", one.clone(), other.clone()).await.0 }, async {
        unit("right", other.clone(), one.clone()).await.0
    });
    let failed: Vec<_> = [&one, &other].into_iter().filter_map(|end| end.as_ref().err()).collect();
    assert_eq!(failed.len(), 1, "one gives way and the other goes on: {failed:?}");
    assert_eq!(failed[0].kind(), ErrorKind::Deadlock);
}

#[tokio::test]
async fn each_setting_and_the_next_exclude_each_other_and_tokens_grow() {
    let change = Change::start().await;
    let mut last = FencingToken::new(0);
    for (first, second) in [(0, 1), (1, 0), (1, 1), (1, 2), (2, 1)] {
        for _ in 0..3 {
            let guard = change.mutex(first).lock().await.unwrap();
            assert!(change.mutex(second).try_lock().await.unwrap().is_none(), "{first} excludes {second}");
            let next = change.mutex(second);
            let waiter = tokio::spawn(async move { next.lock().await.unwrap() });
            assert!(guard.fencing_token() > last, "{} after {last}", guard.fencing_token());
            last = guard.fencing_token();
            assert_eq!(guard.unlock().await.unwrap(), Released::Released);
            let guard = waiter.await.unwrap();
            assert!(
                guard.fencing_token() > last,
                "{first} to {second}: {} after {last}",
                guard.fencing_token()
            );
            last = guard.fencing_token();
            assert_eq!(guard.unlock().await.unwrap(), Released::Released);
        }
    }
    // What the setting between is for: without it there are two holders.
    let _old = change.mutex(0).lock().await.unwrap();
    assert!(change.mutex(2).try_lock().await.unwrap().is_some());
}

#[tokio::test]
async fn who_waits_at_the_new_place_keeps_the_old_one() {
    let change = Change::start().await;
    let holder = change.mutex(2).lock().await.unwrap();
    let waiting = change.mutex(1).ttl(ms(400));
    let waiter = tokio::spawn(async move { waiting.lock().await.unwrap() });
    let name = &change.names[0];
    until("it has the old place", || async { is_held(&change.phases[0], name).await }).await;
    // For longer than its lease: it is renewed.
    let until = clock::now().plus(ms(1500));
    while clock::now() < until {
        assert!(
            change.mutex(0).try_lock().await.unwrap().is_none(),
            "it went to one who cannot see the new holder"
        );
        clock::sleep(ms(20)).await;
    }
    let view = change.phases[1].show(name).await.unwrap();
    assert_eq!(view.waiters, 1);
    assert_eq!(holder.unlock().await.unwrap(), Released::Released);
    let guard = waiter.await.unwrap();
    assert_eq!(guard.status(), Status::Held);
    assert_eq!(change.phases[1].show(name).await.unwrap().holder.unwrap().token, Some(guard.fencing_token()));
    assert_eq!(guard.unlock().await.unwrap(), Released::Released);
    for phase in 0..3 {
        let view = change.phases[phase].show(name).await.unwrap();
        assert!(view.holder.is_none() && view.waiters == 0, "{view:?}");
    }
}

#[tokio::test]
async fn a_wait_given_up_at_the_new_place_leaves_neither() {
    let change = Change::start().await;
    let holder = change.mutex(2).lock().await.unwrap();
    assert!(change.mutex(1).try_lock().await.unwrap().is_none());
    assert!(change.mutex(1).lock_for(ms(300)).await.unwrap().is_none());
    let name = &change.names[0];
    let view = change.phases[1].show(name).await.unwrap();
    assert_eq!(
        (view.waiters, view.holder.and_then(|holder| holder.token)),
        (0, Some(holder.fencing_token()))
    );
    let old = change.mutex(0).try_lock().await.unwrap();
    assert!(old.is_some(), "nothing is left at the old place");
}

#[tokio::test]
async fn a_lock_lost_at_one_of_its_places_is_lost_and_leaves_the_other() {
    for at_the_new in [true, false] {
        let change = Change::start().await;
        let guard = change.mutex(1).ttl(ms(6000)).lock().await.unwrap();
        let server = if at_the_new { &change.servers[2] } else { change.old() };
        server.cli(&["FLUSHALL"]);
        let loss = clock::timeout_at(clock::now().plus(ms(20_000)), guard.lost()).await;
        assert_eq!(loss, Some(Loss::Removed), "at the new place: {at_the_new}");
        // Long before its lease would end.
        let next =
            change.mutex(1).ttl(ms(6000)).lock_for(ms(3000)).await.unwrap().expect("free at both places");
        assert!(next.fencing_token() > guard.fencing_token());
        assert_eq!(guard.unlock().await.unwrap(), Released::HeldByOther);
        assert_eq!(next.status(), Status::Held);
        assert_eq!(next.unlock().await.unwrap(), Released::Released);
    }
}

#[tokio::test]
async fn a_place_that_is_dead_leaves_nothing_at_the_other() {
    let mut change = Change::start().await;
    let name = change.names[0].clone();
    let guard = change.mutex(1).ttl(ms(1500)).lock().await.unwrap();
    change.servers[2].kill9();
    assert_eq!(guard.lost().await, Loss::Expired);
    drop(guard);
    let error = change.mutex(1).lock().await.unwrap_err();
    assert!(error.is_transient() && error.to_string().contains(&change.servers[2].url()), "{error}");
    until("the old place is free", || async { !is_held(&change.phases[0], &name).await }).await;
    let old = change.mutex(0).lock().await.unwrap();
    assert_eq!(old.unlock().await.unwrap(), Released::Released);
}

#[tokio::test]
async fn tokens_grow_through_the_change_though_the_clocks_of_the_nodes_are_apart() {
    let clocked = || RedisServer::builder().own_clock().start();
    let change = Change::over([clocked(), clocked(), clocked()]).await;
    for (old, new) in [(400_000, 0), (0, 400_000)] {
        for server in &change.servers[..2] {
            server.set_clock_offset(old);
        }
        change.servers[2].set_clock_offset(new);
        // One that no earlier token stands in the way of.
        let name = &change.names[usize::from(old == 0) + 1];
        let mut last = FencingToken::new(0);
        for phase in [0, 1, 0, 1, 1, 2, 1, 2] {
            let guard = change.phases[phase].mutex(name).lock().await.unwrap();
            let token = guard.fencing_token();
            assert!(token > last, "setting {phase}, clocks {old} and {new} us off: {token} after {last}");
            last = token;
            assert_eq!(guard.unlock().await.unwrap(), Released::Released);
        }
    }
}

#[tokio::test]
async fn tokens_grow_through_the_change_though_last_ones_are_ahead_of_the_clocks() {
    let change = Change::start().await;
    let fence = |name: &str| format!("leasehold:{{{name}}}:fence:{name}");
    let now = u64::try_from(clock::wall().as_micros()).unwrap();
    // Waiting for either clock would not help: it is its last token that each goes by.
    for (at, (old, new)) in [(13, 12), (12, 13), (13, 0), (0, 13), (1800, 1200)].into_iter().enumerate() {
        let name = &change.names[at];
        let home = change.home(name);
        for (server, ahead) in [(home, old), (&change.servers[2], new)] {
            server.cli(&["SET", &fence(name), &(now + ahead * 1_000_000).to_string()]);
        }
        let mut last = FencingToken::new(0);
        for phase in [1, 2, 1, 1, 0, 1, 2] {
            let guard = change.phases[phase].mutex(name).lock().await.unwrap();
            let token = guard.fencing_token();
            assert!(token > last, "setting {phase}, {old} and {new} s ahead: {token} after {last}");
            last = token;
            if phase == 1 {
                let both = [home, &change.servers[2]].map(|server| server.cli(&["GET", &fence(name)]));
                assert_eq!(both, [token.to_string(), token.to_string()], "each place has this very token");
            }
            assert_eq!(guard.unlock().await.unwrap(), Released::Released);
        }
    }
}

#[tokio::test]
async fn a_block_of_tokens_is_the_same_at_both_places() {
    let stores: [Arc<MemoryStore>; 2] = Default::default();
    let claim = |id: u8| Claim::new(Name::new("a").unwrap(), ClaimId::from_bytes([id; 16]), ms(5000));
    let granted = |answer: Result<Acquired, _>| match answer {
        Ok(Acquired::Granted(grant)) => grant.token.get(),
        other => panic!("{other:?}"),
    };
    // The last tokens lie within each other's blocks, a minute ahead of the clock.
    let ahead = u64::try_from(clock::wall().as_micros()).unwrap() + 60_000_000;
    for (store, last) in stores.iter().zip([ahead, ahead + 5]) {
        let one = claim(1).with_ballot(FencingToken::new(last));
        assert_eq!(granted(store.acquire(&one).await), last);
        store.release(&Held::unanswered(&one)).await.unwrap();
    }
    let [old, new] = [0, 1].map(|at: usize| Node::new(stores[at].clone()).named(["old", "new"][at]));
    let ring = RingStore::new(vec![old.removing(), new.adding()]).unwrap();
    let block = claim(2).with_tokens(10);
    let first = granted(ring.acquire(&block).await);
    assert!(first > ahead + 5);
    assert_eq!(granted(ring.acquire(&block).await), first, "the same when presented again");
    ring.release(&Held::unanswered(&block)).await.unwrap();
    for store in &stores {
        assert!(
            granted(store.acquire(&claim(3)).await) >= first + 10,
            "a token of the block was given again"
        );
    }
}

#[tokio::test]
async fn a_place_that_cannot_be_asked_again_leaves_nothing_at_either() {
    for fails_at in [0, 1] {
        let stores: [Arc<MemoryStore>; 2] = Default::default();
        let [old, new] = [0, 1]
            .map(|at: usize| Node::new(Arc::new(Yielding(stores[at].clone()))).named(["old", "new"][at]));
        let ring = RingStore::new(vec![old.removing(), new.adding()]).unwrap();
        let claim = |id: u8| Claim::new(Name::new("a").unwrap(), ClaimId::from_bytes([id; 16]), ms(60_000));
        // A last token that is ahead of the old place's clock: a second round is needed.
        let ahead = u64::try_from(clock::wall().as_micros()).unwrap() + 600_000_000;
        let earlier = claim(1).with_ballot(FencingToken::new(ahead));
        assert!(matches!(stores[1].acquire(&earlier).await, Ok(Acquired::Granted(_))));
        stores[1].release(&Held::unanswered(&earlier)).await.unwrap();

        let mine = claim(2);
        let (answer, ()) = tokio::join!(ring.acquire(&mine), async {
            // The first round is over at the new place; at the old one the second, where it is the new one that fails.
            let (place, calls) = if fails_at == 0 { (1, 2) } else { (0, 2) };
            while stores[place].calls(Verb::Acquire) < calls {
                tokio::task::yield_now().await;
            }
            stores[fails_at].inject(Verb::Acquire, [Fault::Refuse]);
        });
        assert_eq!(answer.unwrap_err().kind(), ErrorKind::Unavailable);
        for store in &stores {
            let next = store.acquire(&claim(3)).await;
            assert!(matches!(next, Ok(Acquired::Granted(_))), "place {fails_at} failed: {next:?}");
        }
    }
}

#[tokio::test]
async fn clocks_too_far_apart_are_an_error_and_leave_nothing() {
    let clocked = || RedisServer::builder().own_clock().start();
    let change = Change::over([clocked(), clocked(), clocked()]).await;
    for (at, old, new) in [(0, 0, 7_200_000_000), (1, 7_200_000_000, 0)] {
        change.servers[0].set_clock_offset(old);
        change.servers[1].set_clock_offset(old);
        change.servers[2].set_clock_offset(new);
        let name = &change.names[at];
        let mutex = change.phases[1].mutex(name);
        let refused = clock::timeout_at(clock::now().plus(ms(20_000)), mutex.lock()).await;
        let error = refused.expect("it does not wait for the clock").unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Rejected, "{error}");
        assert!(
            error.to_string().contains(&change.servers[2].url()) && error.to_string().contains("clocks"),
            "{error}"
        );
        for phase in [0, 2] {
            let free = change.phases[phase].mutex(name).try_lock().await.unwrap();
            assert!(free.is_some(), "free for setting {phase}");
        }
    }
}

#[tokio::test]
async fn a_ring_that_cannot_be_is_refused_before_anything_is_tried() {
    for (url, part) in [
        ("ring:", "node"),
        ("ring:?", "needs a node"),
        ("ring:?node=memory:&node=memory:", "twice"),
        ("ring:?node=memory:&adding=memory:", "twice"),
        ("ring:?adding=memory:", "needs a node"),
        ("ring:?node=memory:&weight=3", "not a node"),
        ("ring:?node=nonsense:", "nonsense"),
        ("ring:?node=redis://user:hunter2@host:0x", ""),
    ] {
        let error = connect(url).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid, "{url}: {error}");
        assert!(error.to_string().contains(part), "{url}: {error}");
        assert!(!error.to_string().contains("hunter2"), "{error}");
    }
    let folder = tempfile::tempdir().unwrap();
    let error =
        connect(&format!("ring:?node=sqlite:{}", folder.path().join("l.db").display())).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
    assert!(connect("ring:?node=memory:").await.is_ok());
}

#[tokio::test]
async fn a_lock_on_the_move_dropped_at_any_await_leaves_nothing() {
    let stores: [Arc<MemoryStore>; 2] = Default::default();
    let [old, new] = &stores;
    let node =
        |store: &Arc<MemoryStore>, name: &str| Node::new(Arc::new(Yielding(store.clone()))).named(name);
    let ring = RingStore::new(vec![node(old, "old").removing(), node(new, "new").adding()]).unwrap();
    let locks = Locks::over(Arc::new(ring)).unwrap();
    // Those who know one place only.
    let others = [old, new].map(|store| Locks::over(store.clone()).unwrap());
    // From here on each place counts on from its last token.
    let ahead = u64::try_from(clock::wall().as_micros()).unwrap() + 600_000_000;
    let first = Claim::new(Name::new("a").unwrap(), ClaimId::from_bytes([1; 16]), ms(5000))
        .with_ballot(FencingToken::new(ahead));
    for store in [old, new] {
        assert!(matches!(store.acquire(&first).await, Ok(Acquired::Granted(_))));
        store.release(&Held::unanswered(&first)).await.unwrap();
    }
    for (busy, at_odds) in [(None, false), (None, true), (Some(0), false), (Some(1), false), (Some(1), true)]
    {
        let mut ended = 0;
        for polls in 0..120 {
            if at_odds {
                // The new place's last token is the larger one: a second round is needed.
                others[1].mutex("a").lock().await.unwrap().unlock().await.unwrap();
            }
            let blocker = match busy {
                Some(at) => Some(others[at].mutex("a").lock().await.unwrap()),
                None => None,
            };
            let mutex = locks.mutex("a").retry(Retry::constant(ms(1)));
            let work = async {
                let (guard, ()) = tokio::join!(mutex.lock(), async {
                    for _ in 0..polls / 2 {
                        tokio::task::yield_now().await;
                    }
                    drop(blocker);
                });
                assert_eq!(guard.unwrap().unlock().await.unwrap(), Released::Released);
            };
            ended += usize::from(drop_after(polls, work).await);
            let latest = clock::now().plus(ms(20_000));
            loop {
                let mut left = Vec::new();
                for locks in &others {
                    let view = locks.show("a").await.unwrap();
                    left.push((view.holder.is_some(), view.waiters));
                }
                if left == [(false, 0); 2] {
                    break;
                }
                assert!(clock::now() < latest, "{busy:?}, dropped after {polls} polls: {left:?}");
                clock::sleep(ms(2)).await;
            }
        }
        assert!((1..120).contains(&ended), "{ended} of 120 were polled to their end");
    }
    locks.close().await;
}

#[tokio::test]
async fn a_connection_that_breaks_has_what_is_held_on_its_node_confirmed_at_once() {
    let servers = [RedisServer::start(), RedisServer::start()];
    let urls: Vec<_> = servers.iter().map(RedisServer::url).collect();
    let locks = connect(&url(&urls)).await.unwrap();
    for (server, at) in servers.iter().zip(&urls) {
        let name = names_at(&[&urls[0], &urls[1]], at, 1).remove(0);
        // Renewed by itself soon after the grant, and then every hour.
        let guard = locks.mutex(name).ttl(ms(36_000_000)).lock().await.unwrap();
        guard.changed().await;
        let changed = guard.changed();
        server.cli(&["CLIENT", "KILL", "TYPE", "normal"]);
        let told = clock::timeout_at(clock::now().plus(ms(15_000)), changed).await;
        assert!(told.is_some(), "nobody looked after {at}");
        assert_eq!(guard.unlock().await.unwrap(), Released::Released);
    }
}
