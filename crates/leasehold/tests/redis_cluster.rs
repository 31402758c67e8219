//! A real cluster and its bad days: slots that move under held locks and waiters, masters that die, a map that is stale.
#![allow(clippy::unwrap_used, reason = "a test")]

mod bad_days;

use std::sync::Arc;
use std::time::Duration;

use bad_days::{Waiter, acquires, connect, lock, lock_soon, ms};
use leasehold::store::Store;
use leasehold::stores::redis::{ClusterConfig, ClusterStore};
use leasehold::{
    Acquired, Claim, ErrorKind, Held, Locks, Loss, Name, Persistence, Query, Released, Renewal, Severity,
    Status, clock,
};
use leasehold_chaos::cluster::Cluster;
use leasehold_chaos::eventually;
use leasehold_chaos::proxy::{Command, Fault};
use leasehold_chaos::servers::RedisServer;
use pollster::block_on;

const TTL: Duration = Duration::from_secs(30);

fn side(name: &str, kind: &str) -> String {
    format!("leasehold:{{{name}}}:{kind}:{name}")
}

fn in_line(node: &RedisServer, name: &str) -> usize {
    node.cli(&["LLEN", &side(name, "queue")]).parse().unwrap()
}

/// The scripts of the common way are known everywhere, and each node is dialled.
fn warm_up(locks: &Locks, cluster: &Cluster) {
    for master in 0..3 {
        let guard = lock(&locks.mutex(cluster.name_at(master, "warm-up-")));
        block_on(guard.extend(ms(60_000))).unwrap();
        block_on(guard.unlock()).unwrap();
    }
}

fn is_script(command: &Command) -> bool {
    command.is_script()
}

/// No process listens to anything any more, at any node.
#[track_caller]
fn assert_nobody_listens(cluster: &Cluster) {
    eventually("nobody listens any more", || {
        cluster.nodes.iter().filter(|node| node.is_running()).all(|node| {
            node.cli(&["PUBSUB", "CHANNELS"]).is_empty() && node.cli(&["PUBSUB", "SHARDCHANNELS"]).is_empty()
        })
    });
}

async fn store(cluster: &Cluster) -> Arc<ClusterStore> {
    let config = ClusterConfig::from_url(&cluster.url()).unwrap().with_timeout(ms(1_000)).unwrap();
    ClusterStore::connect(config, tokio::runtime::Handle::current()).await.unwrap()
}

fn claim(name: &str) -> Claim {
    Claim::new(Name::new(name).unwrap(), clock::claim_id(), TTL)
}

async fn granted(store: &ClusterStore, claim: &Claim) -> Held {
    match store.acquire(claim).await {
        Ok(Acquired::Granted(grant)) => Held::new(claim, &grant),
        other => panic!("{other:?}"),
    }
}

#[test]
fn in_steady_state_a_lock_costs_two_commands_at_the_right_node() {
    let cluster = Cluster::behind_links();
    let locks = connect(&cluster.url());
    warm_up(&locks, &cluster);
    cluster.links.iter().for_each(leasehold_chaos::proxy::Proxy::forget);
    for number in 0..30 {
        block_on(lock(&locks.mutex(format!("steady-{number}"))).unlock()).unwrap();
    }
    let counts: Vec<_> = cluster.links.iter().map(|link| link.count(is_script)).collect();
    assert_eq!(counts.iter().sum::<usize>(), 60, "{counts:?}");
    assert!(counts.iter().all(|count| *count > 0), "every node has its part: {counts:?}");
    assert_eq!(cluster.links.iter().map(|link| link.count(|_| true)).sum::<usize>(), 60, "and nothing else");
    for code in ["MOVED", "ASK", "CROSSSLOT"] {
        assert_eq!(cluster.errors(code), 0, "{code}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn three_hundred_renewals_of_a_node_are_sent_before_the_first_is_answered() {
    let cluster = Cluster::behind_links();
    let store = store(&cluster).await;
    let mut held = Vec::new();
    for number in 0..300 {
        held.push(granted(&store, &claim(&cluster.name_at(0, &format!("many-{number}-")))).await);
    }
    let _ = store.renew(&held[..1]).await;
    let link = &cluster.links[0];
    // What writes the index has no claim in it.
    let renews =
        |command: &Command| command.is_script() && command.args.iter().any(|arg| arg.starts_with(b"lh1:"));
    link.forget();
    let first = link.inject(Fault::HoldReply, renews);
    let renewing = tokio::spawn({
        let (store, held) = (store.clone(), held.clone());
        async move { store.renew(&held).await }
    });
    let slots: std::collections::BTreeSet<_> =
        held.iter().map(|held| cluster.slot(held.name.as_bytes())).collect();
    assert!(slots.len() > 250, "{}", slots.len());
    // All of them arrive while nothing was answered yet.
    link.wait_for(slots.len(), renews);
    first.release();
    let answers = renewing.await.unwrap();
    assert!(answers.iter().all(|answer| matches!(answer, Ok(Renewal::Renewed(left)) if *left == TTL)));
    assert_eq!(link.count(renews), slots.len(), "one call for each slot");
    assert_eq!(cluster.errors("CROSSSLOT") + cluster.errors("MOVED"), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn claims_that_are_ready_together_share_a_command_only_within_a_slot() {
    let cluster = Cluster::behind_links();
    let store = store(&cluster).await;
    let of = |beginning: &str| {
        let names: Vec<_> = (0..200).map(|number| format!("{beginning}{number}")).collect();
        async {
            let mut tasks = tokio::task::JoinSet::new();
            for name in names {
                let store = store.clone();
                tasks.spawn(async move {
                    let held = granted(&store, &claim(&name)).await;
                    assert_eq!(store.release(&held).await.unwrap(), Released::Released);
                });
            }
            while let Some(done) = tasks.join_next().await {
                done.unwrap();
            }
        }
    };
    tokio::join!(of("spread"), of("{together}"));
    let is_of_one = |command: &Command| {
        command.is_script() && command.args.iter().any(|arg| arg.starts_with(b"{together}"))
    };
    let sent: usize = cluster.links.iter().map(|link| link.count(is_of_one)).sum();
    assert!(sent < 300, "400 claims and releases of one slot took {sent} commands");
    assert_eq!(cluster.errors("CROSSSLOT"), 0);
}

#[test]
fn slots_given_to_another_node_are_found_and_their_map_is_asked_for_once() {
    let cluster = Cluster::without_replicas(&[]);
    let locks = connect(&cluster.url());
    let names: Vec<_> = (0..20).map(|number| cluster.name_at(0, &format!("given-{number}-"))).collect();
    let guards: Vec<_> = names.iter().map(|name| lock(&locks.mutex(name))).collect();
    for name in &names {
        cluster.give(cluster.slot(name.as_bytes()), 0, 1);
    }
    let asked = || -> u64 {
        let of = |node: &RedisServer| {
            let stats = node.cli(&["INFO", "commandstats"]);
            let line = stats
                .lines()
                .find_map(|line| line.strip_prefix("cmdstat_cluster|slots:calls=")?.split(',').next());
            line.map_or(0, |count| count.parse().unwrap())
        };
        cluster.nodes.iter().map(of).sum()
    };
    let before = asked();
    let (mut guards, mut moved) = (guards.into_iter(), 0);
    assert_eq!(block_on(guards.next().unwrap().unlock()).unwrap(), Released::Released);
    eventually("the map is asked for", || asked() > before);
    for guard in guards {
        assert_eq!(block_on(guard.unlock()).unwrap(), Released::Released);
        moved += 1;
    }
    assert_eq!(moved, 19);
    // The first, and perhaps one more before the map was taken in, or a renewal at that moment.
    assert!((1..=10).contains(&cluster.errors("MOVED")), "{}", cluster.errors("MOVED"));
    let so_far = cluster.errors("MOVED");
    for name in &names {
        block_on(lock(&locks.mutex(name)).unlock()).unwrap();
    }
    assert_eq!(cluster.errors("MOVED"), so_far, "the map is known");
}

#[test]
fn a_lock_whose_slot_is_on_its_way_is_kept_refused_to_others_and_released() {
    let cluster = Cluster::without_replicas(&[]);
    let (locks, others) = (connect(&cluster.url()), connect(&cluster.url()));
    let name = cluster.name_at(0, "moving-");
    let slot = cluster.slot(name.as_bytes());
    let guard = lock(&locks.mutex(&name));
    cluster.begin_move(slot, 0, 2);
    // Nothing has moved yet.
    block_on(guard.extend(TTL)).unwrap();
    assert!(block_on(others.mutex(&name).try_lock()).unwrap().is_none());
    assert!(cluster.move_keys(slot, 0, 2, |_| true) >= 2);
    block_on(guard.extend(TTL)).unwrap();
    assert!(block_on(others.mutex(&name).try_lock()).unwrap().is_none());
    assert!(cluster.errors("ASK") >= 2, "it was asked for where it is");
    assert_eq!(cluster.errors("MOVED"), 0, "the map stays as it is");
    let token = guard.fencing_token();
    assert_eq!(block_on(guard.unlock()).unwrap(), Released::Released);
    cluster.end_move(slot, 2);
    let next = lock_soon(&others.mutex(&name));
    assert!(next.fencing_token() > token);
    assert_eq!(cluster.nodes[2].cli(&["EXISTS", &name]), "1");
}

#[test]
fn a_lock_whose_keys_are_partly_moved_is_waited_for_a_moment_and_then_unavailable() {
    let cluster = Cluster::without_replicas(&[]);
    let (locks, others) = (connect(&cluster.url()), connect(&format!("{}?timeout=300ms", cluster.url())));
    let name = cluster.name_at(0, "parted-");
    let slot = cluster.slot(name.as_bytes());
    let guard = lock(&locks.mutex(&name));
    cluster.begin_move(slot, 0, 1);
    let fence = side(&name, "fence");
    assert_eq!(cluster.move_keys(slot, 0, 1, |key| key == fence), 1);
    let error = block_on(others.mutex(&name).try_lock()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    assert!(error.to_string().contains("moving") && error.to_string().contains(&name), "{error}");
    let tried = cluster.errors("TRYAGAIN");
    assert!(tried >= 3, "it was tried again: {tried}");
    // One key at a time, what is held can be kept and given back.
    block_on(guard.extend(TTL)).unwrap();
    let trying = std::thread::spawn({
        let mutex = connect(&cluster.url()).mutex(&name);
        move || block_on(mutex.try_lock())
    });
    eventually("it tries", || cluster.errors("TRYAGAIN") > tried + 3);
    cluster.move_keys(slot, 0, 1, |_| true);
    cluster.end_move(slot, 1);
    assert!(trying.join().unwrap().unwrap().is_none(), "busy is an answer, once the keys are together");
    assert_eq!(block_on(guard.unlock()).unwrap(), Released::Released);
}

#[test]
fn waiters_of_a_slot_that_moves_keep_their_places_and_are_called_at_the_new_node() {
    let cluster = Cluster::without_replicas(&[]);
    let name = cluster.name_at(0, "line-");
    let slot = cluster.slot(name.as_bytes());
    let new = || connect(&cluster.url()).mutex(&name).ttl(ms(6_000));
    let holder = lock(&new());
    let waiters: Vec<_> = (0..3).map(|_| Waiter::start(&new())).collect();
    cluster.give(slot, 0, 1);
    assert_eq!(in_line(&cluster.nodes[1], &name), 3);
    // Each comes by itself, and listens at the new node only.
    eventually("they listen at the new node", || {
        let channels = cluster.nodes[1].cli(&["PUBSUB", "CHANNELS", "leasehold:node:*"]);
        channels.lines().count() == 3
    });
    eventually("the line has them as they are called now", || {
        let line = cluster.nodes[1].cli(&["LRANGE", &side(&name, "queue"), "0", "-1"]);
        let channels = cluster.nodes[1].cli(&["PUBSUB", "CHANNELS"]);
        channels.lines().all(|channel| line.contains(channel))
    });
    assert_eq!(in_line(&cluster.nodes[1], &name), 3, "nobody stands in line twice");
    let mut last = holder.fencing_token();
    let began = clock::now();
    assert_eq!(block_on(holder.unlock()).unwrap(), Released::Released);
    for waiter in waiters {
        let guard = waiter.guard();
        assert!(guard.fencing_token() > last, "in the order of arrival");
        last = guard.fencing_token();
        assert_eq!(block_on(guard.unlock()).unwrap(), Released::Released);
    }
    // Called, not found at a look two seconds later.
    assert!(clock::now().since(began) < ms(1_800), "{:?}", clock::now().since(began));
    eventually("nothing is left", || {
        cluster.nodes[1].cli(&["EXISTS", &name, &side(&name, "queue"), &side(&name, "alive")]) == "0"
    });
    assert_nobody_listens(&cluster);
}

#[test]
fn a_message_for_one_who_listens_elsewhere_is_not_sent_and_not_believed() {
    let cluster = Cluster::without_replicas(&[]);
    let name = cluster.name_at(0, "elsewhere-");
    let slot = cluster.slot(name.as_bytes());
    let holder = lock(&connect(&cluster.url()).mutex(&name).ttl(TTL));
    // It is heard of every three seconds; until then it listens at the old node only.
    let waiter = Waiter::start(&connect(&cluster.url()).mutex(&name).ttl(TTL));
    cluster.begin_move(slot, 0, 1);
    cluster.move_keys(slot, 0, 1, |_| true);
    assert_eq!(block_on(holder.unlock()).unwrap(), Released::Released);
    cluster.end_move(slot, 1);
    // It cannot be reached where the lock is now, and a message would reach it all the same, by way of the other node.
    let other = connect(&cluster.url());
    let guard = block_on(other.mutex(&name).try_lock()).unwrap().expect("nobody in line can be called yet");
    let token = guard.fencing_token();
    eventually("the waiter comes to the new node, and waits", || {
        !cluster.nodes[1].cli(&["PUBSUB", "CHANNELS"]).is_empty()
    });
    assert!(!waiter.has_ended(), "two have the lock");
    assert_eq!(block_on(guard.unlock()).unwrap(), Released::Released);
    assert!(waiter.guard().fencing_token() > token);
}

#[test]
fn waiters_get_the_lock_though_it_is_released_while_the_slot_is_on_its_way() {
    let cluster = Cluster::without_replicas(&[]);
    let name = cluster.name_at(0, "on-its-way-");
    let slot = cluster.slot(name.as_bytes());
    let new = || connect(&cluster.url()).mutex(&name).ttl(ms(3_000));
    let holder = lock(&new());
    let (first, second) = (Waiter::start(&new()), Waiter::start(&new()));
    cluster.begin_move(slot, 0, 2);
    cluster.move_keys(slot, 0, 2, |_| true);
    let token = holder.fencing_token();
    assert_eq!(block_on(holder.unlock()).unwrap(), Released::Released);
    // A lock that is free is not granted while its slot is on its way: nobody could tell where its last token is.
    let tried = cluster.errors("TRYAGAIN");
    eventually("they ask for it", || cluster.errors("TRYAGAIN") > tried + 2);
    assert!(!first.has_ended() && !second.has_ended());
    cluster.end_move(slot, 2);
    // Whoever is there first: the other cannot be called yet.
    let (mut waiters, mut last) = (vec![first, second], token);
    while !waiters.is_empty() {
        let next = || waiters.iter().position(Waiter::has_ended);
        eventually("one of them has it", || next().is_some());
        let at = next().unwrap();
        let guard = waiters.swap_remove(at).guard();
        assert!(guard.fencing_token() > last && !waiters.iter().any(Waiter::has_ended));
        last = guard.fencing_token();
        assert_eq!(block_on(guard.unlock()).unwrap(), Released::Released);
    }
    assert_nobody_listens(&cluster);
}

/// Waits until the replica of a master has that key.
fn replicated(cluster: &Cluster, master: usize) {
    let offset = |node: &RedisServer, key: &str| {
        let info = node.cli(&["INFO", "replication"]);
        info.lines().find_map(|line| line.strip_prefix(key)?.trim().parse::<u64>().ok()).unwrap_or(0)
    };
    let sent = offset(&cluster.nodes[master], "master_repl_offset:");
    eventually("the replica has it", || offset(&cluster.nodes[master + 3], "slave_repl_offset:") >= sent);
}

#[test]
fn a_lock_is_kept_over_the_death_of_its_master_and_confirmed_at_the_new_one() {
    let mut cluster = Cluster::start();
    let name = cluster.name_at(0, "kept-");
    let locks = connect(&cluster.url());
    // Renewed every six minutes, after the first look.
    let guard = lock(&locks.mutex(&name).ttl(ms(3_600_000)));
    block_on(guard.extend(ms(3_600_000))).unwrap();
    replicated(&cluster, 0);
    cluster.nodes[0].kill9();
    // Nobody asks for anything: the broken connection is enough.
    eventually("it is doubted", || guard.status() == Status::Unsure);
    eventually("it is confirmed at the new master", || guard.status() == Status::Held);
    assert!(block_on(connect(&cluster.url()).mutex(&name).try_lock()).unwrap().is_none());
    assert_eq!(block_on(guard.unlock()).unwrap(), Released::Released);
    assert_eq!(cluster.nodes[3].cli(&["EXISTS", &name]), "0");
}

#[test]
fn a_lock_that_its_replica_never_saw_is_lost_and_told_at_once() {
    let mut cluster = Cluster::start();
    let name = cluster.name_at(0, "lost-");
    let locks = connect(&cluster.url());
    // From now on the replica cannot log in, and hears nothing more.
    cluster.nodes[3].cli(&["CONFIG", "SET", "masterauth", "nonsense"]);
    cluster.nodes[0].cli(&["CLIENT", "KILL", "TYPE", "replica"]);
    eventually("the replica is behind", || {
        cluster.nodes[3].cli(&["INFO", "replication"]).contains("master_link_status:down")
    });
    let guard = lock(&locks.mutex(&name).ttl(ms(3_600_000)));
    let token = guard.fencing_token();
    cluster.nodes[0].kill9();
    assert_eq!(block_on(guard.lost()), Loss::Removed);
    let next = lock_soon(&connect(&cluster.url()).mutex(&name));
    assert!(next.fencing_token() > token, "though the counter is gone with its master");
    assert!(locks.guarantees().lost_at_failover);
}

#[test]
fn waiters_whose_master_dies_keep_their_order_at_the_new_one() {
    let mut cluster = Cluster::start();
    let name = cluster.name_at(1, "order-");
    let new = || connect(&cluster.url()).mutex(&name);
    let holder = lock(&new());
    let waiters: Vec<_> = (0..3).map(|_| Waiter::start(&new())).collect();
    replicated(&cluster, 1);
    cluster.nodes[1].kill9();
    eventually("the replica is master", || cluster.nodes[4].cli(&["ROLE"]).starts_with("master"));
    cluster.wait_until_ok();
    eventually("they listen at the new master", || {
        cluster.nodes[4].cli(&["PUBSUB", "CHANNELS", "leasehold:node:*"]).lines().count() == 3
    });
    assert_eq!(in_line(&cluster.nodes[4], &name), 3, "nobody stands in line twice");
    eventually("the holder's lock is confirmed", || holder.status() == Status::Held);
    let mut last = holder.fencing_token();
    assert_eq!(block_on(holder.unlock()).unwrap(), Released::Released);
    for waiter in waiters {
        let guard = waiter.guard();
        assert!(guard.fencing_token() > last);
        last = guard.fencing_token();
        assert_eq!(block_on(guard.unlock()).unwrap(), Released::Released);
    }
    assert_nobody_listens(&cluster);
}

#[test]
fn a_master_that_gives_way_to_its_replica_costs_neither_lock_nor_place() {
    let cluster = Cluster::start();
    let name = cluster.name_at(2, "gives-way-");
    let new = || connect(&cluster.url()).mutex(&name).ttl(ms(6_000));
    let holder = lock(&new());
    let waiters: Vec<_> = (0..2).map(|_| Waiter::start(&new())).collect();
    // All connections stay, and the old master is a replica now.
    assert_eq!(cluster.nodes[5].cli(&["CLUSTER", "FAILOVER"]), "OK");
    eventually("the replica is master", || cluster.nodes[5].cli(&["ROLE"]).starts_with("master"));
    eventually("the waiters listen there", || {
        cluster.nodes[5].cli(&["PUBSUB", "CHANNELS", "leasehold:node:*"]).lines().count() == 2
    });
    block_on(holder.extend(ms(6_000))).unwrap();
    assert_eq!(in_line(&cluster.nodes[5], &name), 2);
    let mut last = holder.fencing_token();
    assert_eq!(block_on(holder.unlock()).unwrap(), Released::Released);
    for waiter in waiters {
        let guard = waiter.guard();
        assert!(guard.fencing_token() > last);
        last = guard.fencing_token();
        assert_eq!(block_on(guard.unlock()).unwrap(), Released::Released);
    }
    assert_nobody_listens(&cluster);
}

#[test]
fn a_cluster_that_speaks_tls_is_reached_by_it_at_every_node() {
    let cluster = Cluster::with_tls();
    let locks = connect(&cluster.tls_url());
    for master in 0..3 {
        let name = cluster.name_at(master, "tls-");
        let guard = lock(&locks.mutex(&name));
        assert_eq!(cluster.nodes[master].cli(&["EXISTS", &name]), "1");
        assert_eq!(block_on(guard.unlock()).unwrap(), Released::Released);
    }
    let untrusted = cluster.tls_url().split_once('?').unwrap().0.to_owned();
    assert!(block_on(leasehold::connect(&untrusted)).is_err(), "the certificate is looked at");
}

#[test]
fn a_cluster_that_is_down_says_so_and_serves_again_when_it_is_whole() {
    let mut cluster = Cluster::without_replicas(&[]);
    let locks = connect(&format!("{}?timeout=500ms", cluster.url()));
    let (here, there) = (cluster.name_at(0, "here-"), cluster.name_at(1, "there-"));
    let guard = lock(&locks.mutex(&here));
    cluster.nodes[1].kill9();
    let error = block_on(locks.mutex(&there).try_lock()).unwrap_err();
    assert!(error.is_transient(), "{error}");
    eventually("the others give up on it", || {
        cluster.nodes[0].cli(&["CLUSTER", "INFO"]).contains("cluster_state:fail")
    });
    let error = block_on(locks.mutex(&here).try_lock()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    assert!(
        error.to_string().contains("the cluster is down") && error.to_string().contains(&here),
        "{error}"
    );
    let findings = block_on(locks.diagnose());
    let failures: Vec<_> = findings.iter().filter(|found| found.severity == Severity::Failure).collect();
    assert!(failures.iter().any(|found| found.check == "cluster state"), "{findings:?}");
    assert!(failures.iter().any(|found| found.check.starts_with("node 127.0.0.1:")), "{findings:?}");
    cluster.nodes[1].restart();
    cluster.wait_until_ok();
    block_on(lock_soon(&locks.mutex(&there)).unlock()).unwrap();
    eventually("what was held meanwhile is confirmed", || guard.status() == Status::Held);
    assert_eq!(block_on(guard.unlock()).unwrap(), Released::Released);
}

#[test]
fn one_node_of_a_url_is_enough_and_one_that_is_down_is_passed_over() {
    let cluster = Cluster::without_replicas(&[]);
    let last = cluster.url().rsplit_once(',').unwrap().1.to_owned();
    let nobody = leasehold_chaos::servers::free_port();
    let locks = connect(&format!("redis+cluster://127.0.0.1:{nobody},{last}?prefix=app:"));
    for master in 0..3 {
        let name = cluster.name_at(master, "se{}eded}-");
        block_on(lock(&locks.mutex(name)).unlock()).unwrap();
    }
    let error = block_on(leasehold::connect(&format!("redis+cluster://127.0.0.1:{nobody}"))).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
}

#[test]
fn a_wrong_password_and_a_server_that_is_no_cluster_are_refused_clearly() {
    let cluster = Cluster::with_password("s3cret");
    let hosts = cluster.url().split_once("://").unwrap().1.to_owned();
    let error = block_on(leasehold::connect(&format!("redis+cluster://:hunter2@{hosts}"))).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Rejected);
    assert!(!format!("{error} {error:?}").contains("hunter2"), "{error}");
    let locks = connect(&format!("redis+cluster://:s3cret@{hosts}"));
    block_on(lock(&locks.mutex("a")).unlock()).unwrap();
    assert!(!format!("{locks:?} {}", locks.location()).contains("s3cret"));

    let single = RedisServer::start();
    let error =
        block_on(leasehold::connect(&format!("redis+cluster://127.0.0.1:{}", single.port()))).unwrap_err();
    assert!(error.to_string().contains("use redis://"), "{error}");
    let node = Cluster::without_replicas(&[]);
    let locks = connect(&node.nodes[0].url());
    let error = block_on(locks.mutex(node.name_at(1, "x")).try_lock()).unwrap_err();
    assert!(error.to_string().contains("redis+cluster://"), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_held_is_listed_from_every_node_also_after_slots_moved() {
    let cluster = Cluster::without_replicas(&[]);
    let store = store(&cluster).await;
    let names: Vec<_> = (0..3).map(|master| cluster.name_at(master, "listed-")).collect();
    let mut held = Vec::new();
    for name in &names {
        held.push(granted(&store, &claim(name)).await);
    }
    let list = |limit, after: Option<&str>| {
        let after = after.map(|name| Name::new(name).unwrap());
        let query = Query::Prefix { prefix: b"listed-".to_vec(), after, limit };
        let store = store.clone();
        async move {
            let page = store.inspect(&query).await.unwrap();
            let names: Vec<_> = page.items.iter().map(|view| view.name.to_string()).collect();
            (names, page.next.map(|name| name.to_string()))
        }
    };
    let listed = async || {
        let latest = clock::now().plus(leasehold_chaos::PATIENCE);
        // The index is written just after the renewal was answered.
        loop {
            let _ = store.renew(&held).await;
            let (found, _) = list(10, None).await;
            if found.len() == 3 || clock::now() > latest {
                return found;
            }
        }
    };
    let mut sorted = names.clone();
    sorted.sort();
    assert_eq!(listed().await, sorted);
    let (page, next) = list(2, None).await;
    assert_eq!((&page[..], next.as_deref()), (&sorted[..2], Some(&*sorted[1])));
    assert_eq!(list(2, Some(&sorted[1])).await, (sorted[2..].to_vec(), None));
    // The first slot of the first node goes, and with it its index.
    cluster.give(0, 0, 1);
    cluster.give(cluster.slot(names[0].as_bytes()), 0, 2);
    // An answer all the same, though the map is an old one; where a node has another first slot its list begins anew.
    assert_eq!(list(10, None).await.0, names[..1]);
    assert_eq!(listed().await, sorted);
    for held in &held {
        assert_eq!(store.release(held).await.unwrap(), Released::Released);
    }
    assert_eq!(list(10, None).await.0, [""; 0]);
}

#[test]
fn the_guarantees_are_the_least_of_all_masters_and_doctor_names_each() {
    let cluster = Cluster::start();
    let locks = connect(&cluster.url());
    let plain = locks.guarantees();
    assert_eq!((plain.persistence, plain.may_evict, plain.fifo), (Persistence::None, false, true));
    assert!(plain.lost_at_failover && plain.server.contains("3 masters"), "{}", plain.server);
    let findings = block_on(locks.diagnose());
    let of = |check: &str| findings.iter().filter(|found| found.check.starts_with(check)).count();
    assert_eq!((of("cluster state"), of("slots"), of("role of 127.0.0.1:"), of("rights of")), (1, 1, 3, 3));
    assert!(findings.iter().all(|found| found.severity <= Severity::Note), "{findings:?}");

    for node in &cluster.nodes[..3] {
        node.cli(&["CONFIG", "SET", "appendonly", "yes"]);
    }
    assert_eq!(connect(&cluster.url()).guarantees().persistence, Persistence::Log);
    cluster.nodes[1].cli(&["CONFIG", "SET", "appendonly", "no"]);
    cluster.nodes[2].cli(&["CONFIG", "SET", "maxmemory", "100mb"]);
    cluster.nodes[2].cli(&["CONFIG", "SET", "maxmemory-policy", "volatile-ttl"]);
    let weakest = connect(&cluster.url()).guarantees();
    assert_eq!((weakest.persistence, weakest.may_evict), (Persistence::None, true));
    let findings = block_on(locks.diagnose());
    let warned: Vec<_> = findings.iter().filter(|found| found.severity == Severity::Warning).collect();
    let place = format!("eviction policy of 127.0.0.1:{}", cluster.nodes[2].port());
    assert!(matches!(warned[..], [found] if found.check == place), "{warned:?}");
}

#[test]
fn the_rights_that_the_page_of_the_cluster_lists_are_enough_and_each_is_missed() {
    let page = include_str!("../../../docs/cluster.md");
    let line = page.lines().find(|line| line.starts_with("ACL SETUSER ")).unwrap().replace("PASSWORD", "pw");
    let cluster = Cluster::without_replicas(&[]);
    let everywhere = |command: &str| {
        let words: Vec<_> = command.split(' ').collect();
        cluster.nodes.iter().for_each(|node| assert_eq!(node.cli(&words), "OK", "{command}"));
    };
    everywhere(&line);
    let hosts = cluster.url().split_once("://").unwrap().1.to_owned();
    let locks = connect(&format!("redis+cluster://locks:pw@{hosts}?prefix=lock:"));
    assert!(locks.guarantees().fifo);
    let holder = lock(&locks.mutex("a"));
    block_on(holder.extend(TTL)).unwrap();
    let waiter = Waiter::start(&locks.mutex("a"));
    // Also what a slot on its way needs.
    let slot = cluster.slot(b"lock:a");
    let from = cluster.home("lock:a");
    cluster.begin_move(slot, from, (from + 1) % 3);
    cluster.move_keys(slot, from, (from + 1) % 3, |_| true);
    block_on(holder.extend(TTL)).unwrap();
    cluster.end_move(slot, (from + 1) % 3);
    assert_eq!(block_on(holder.unlock()).unwrap(), Released::Released);
    assert_eq!(block_on(waiter.guard().unlock()).unwrap(), Released::Released);
    let lacking = || -> Vec<_> {
        let findings = block_on(locks.diagnose()).into_iter();
        findings.filter(|found| found.severity == Severity::Failure).map(|found| found.found).collect()
    };
    assert_eq!(lacking(), [""; 0]);
    for right in ["lset", "asking", "pubsub|numsub", "cluster|info", "publish", "hget"] {
        everywhere(&format!("ACL SETUSER locks -{right}"));
        let shown = right.replace('|', " ").to_uppercase();
        let found = lacking();
        assert!(found.len() >= 3 && found.iter().all(|found| found.contains(&shown)), "{right}: {found:?}");
        everywhere(&format!("ACL SETUSER locks +{right}"));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn waits_given_up_and_waits_that_moved_leave_nothing_remembered() {
    let cluster = Cluster::without_replicas(&[]);
    let store = store(&cluster).await;
    let name = cluster.name_at(0, "given-up-");
    let held = granted(&store, &claim(&name)).await;
    let waiters: Vec<_> = (0..20).map(|_| claim(&name).with_queue(true)).collect();
    for waiter in &waiters {
        assert!(matches!(store.acquire(waiter).await.unwrap(), Acquired::Queued(_)));
    }
    let slot = cluster.slot(name.as_bytes());
    cluster.begin_move(slot, 0, 1);
    let fence = side(&name, "fence");
    assert_eq!(cluster.move_keys(slot, 0, 1, |key| key == fence), 1);
    // Who asks meanwhile learns nothing, and still stands in line.
    let error = store.acquire(&waiters[0]).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
    cluster.move_keys(slot, 0, 1, |_| true);
    cluster.end_move(slot, 1);
    for (place, waiter) in waiters.iter().enumerate() {
        let Acquired::Queued(ticket) = store.acquire(waiter).await.unwrap() else { panic!("it waits") };
        assert_eq!(ticket.ahead(), Some(place as u64), "it keeps its place");
    }
    assert_eq!(in_line(&cluster.nodes[1], &name), 20);
    for waiter in &waiters {
        assert_eq!(store.release(&Held::queued(waiter, 0)).await.unwrap(), Released::HeldByOther);
    }
    assert_eq!(in_line(&cluster.nodes[1], &name), 0);
    assert_eq!(store.release(&held).await.unwrap(), Released::Released);
    tokio::task::block_in_place(|| {
        eventually("nothing is remembered of them", || store.remembered() == 0);
        assert_nobody_listens(&cluster);
    });
}

#[test]
fn an_acquire_whose_reply_was_cut_off_in_a_cluster_is_presented_again_and_never_granted_twice() {
    let cluster = Cluster::behind_links();
    let locks = connect(&cluster.url());
    warm_up(&locks, &cluster);
    let name: &'static str = cluster.name_at(1, "cut-").leak();
    let cut = cluster.links[1].inject(Fault::CutBeforeReply, acquires(name));
    let guard = lock(&locks.mutex(name));
    cut.wait();
    assert_eq!(cluster.links[1].count(acquires(name)), 2, "once more, by the same claim");
    assert_eq!(guard.status(), Status::Held);
    assert_eq!(block_on(guard.unlock()).unwrap(), Released::Released);
    assert_eq!(cluster.nodes[1].cli(&["EXISTS", name]), "0");
}
