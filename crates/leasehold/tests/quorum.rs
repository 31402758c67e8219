//! The quorum over real servers: what it costs, what it says, and how its waiters wait.

#![allow(clippy::unwrap_used)]

mod nodes;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use leasehold::store::Store;
use leasehold::stores::memory::MemoryStore;
use leasehold::stores::quorum::{NodeSource, QuorumStore};
use leasehold::stores::sqlite::{Options, SqliteStore};
use leasehold::{ErrorKind, Fencing, Query, Released, Severity, Status, clock};
use leasehold_chaos::eventually;
use leasehold_chaos::servers::RedisServer;
use nodes::{Contest, Nodes, connect, is_release, ms, runtime, url_of};
use pollster::block_on;

#[test]
fn a_lock_of_five_nodes_is_one_round_trip_and_its_unlock_another() {
    let nodes = Nodes::start(5);
    let (store, locks) = nodes.store();
    nodes.warm_up(&locks);
    let rounds = store.second_rounds();
    let mut last = 0;
    for _ in 0..10 {
        let guard = block_on(locks.mutex("a").lock()).unwrap();
        nodes.settle("a", 5);
        let token = guard.fencing_token().get();
        assert!(token > last);
        last = token;
        // `token_on_majority`: here all of them.
        assert_eq!(nodes.tokens("a"), [token; 5]);
        assert_eq!(block_on(guard.unlock()).unwrap(), Released::Released);
        nodes.settle("a", 0);
    }
    assert_eq!(store.second_rounds(), rounds, "the token that was proposed was taken");
    assert_eq!(nodes.presentations("a"), [10; 5]);
    for link in &nodes.links {
        assert_eq!(link.count(|command| is_release(command, "a")), 10);
        assert_eq!(link.commands().len(), 20, "nothing else was sent");
    }
}

#[test]
fn a_last_token_ahead_of_the_clock_costs_a_second_round() {
    let nodes = Nodes::start(5);
    let (store, locks) = nodes.store();
    nodes.warm_up(&locks);
    let ahead = u64::try_from(clock::wall().as_micros()).unwrap() + 600_000_000;
    // Each has another last token, none of them ours.
    for (server, more) in nodes.servers.iter().zip(0_u64..) {
        assert_eq!(server.cli(&["SET", "leasehold:{a}:fence:a", &(ahead + more).to_string()]), "OK");
    }
    let rounds = store.second_rounds();
    let guard = block_on(locks.mutex("a").lock()).unwrap();
    let token = guard.fencing_token().get();
    assert!(token > ahead + 2, "larger than that of a majority: {token}");
    assert_eq!(store.second_rounds(), rounds + 1);
    eventually("a majority has exactly the token", || {
        nodes.tokens("a").iter().filter(|other| **other == token).count() >= 3
    });
    assert!(nodes.presentations("a").iter().filter(|count| **count == 2).count() >= 3);
    block_on(guard.unlock()).unwrap();
    // What was seen is known now: the next one is a single round again.
    let next = block_on(locks.mutex("a").lock()).unwrap();
    assert!(next.fencing_token().get() > token);
    assert_eq!(store.second_rounds(), rounds + 1);
}

#[test]
fn tokens_grow_over_quorums_that_share_one_node_only() {
    let mut nodes = Nodes::start(3);
    let mut last = 0;
    // Their last tokens are minutes apart, so that none of them can go by its own.
    for (server, minutes) in nodes.servers.iter().zip([1, 2, 3]) {
        let ahead = u64::try_from(clock::wall().as_micros()).unwrap() + minutes * 60_000_000;
        assert_eq!(server.cli(&["SET", "leasehold:{a}:fence:a", &ahead.to_string()]), "OK");
    }
    // Each time another one is away, and the clients have nothing in common but the servers.
    for round in 0..6 {
        let away = round % 3;
        nodes.servers[away].pause();
        let guard = block_on(nodes.connect().mutex("a").ttl(ms(5_000)).lock()).unwrap();
        assert!(guard.fencing_token().get() > last, "token_order");
        last = guard.fencing_token().get();
        assert_eq!(block_on(guard.unlock()).unwrap(), Released::Released);
        nodes.servers[away].resume();
    }
    nodes.servers.iter_mut().for_each(RedisServer::kill9);
}

#[test]
fn one_who_waits_stands_in_line_at_one_node_and_asks_nobody_again() {
    let nodes = Nodes::start(5);
    let (holder, waiter) = (nodes.connect(), nodes.connect());
    nodes.warm_up(&holder);
    nodes.warm_up(&waiter);
    let guard = block_on(holder.mutex("a").lock()).unwrap();
    nodes.settle("a", 5);
    let mutex = waiter.mutex("a");
    let waiting = std::thread::spawn(move || block_on(mutex.lock()).unwrap());
    let lines = || -> Vec<String> {
        nodes.servers.iter().map(|server| server.cli(&["LLEN", "leasehold:{a}:queue:a"])).collect()
    };
    eventually("it stands in line", || lines().iter().any(|line| line == "1"));
    nodes.links.iter().for_each(leasehold_chaos::proxy::Proxy::forget);
    // What polling would send meanwhile, every 4 to 256 ms, is presentations; a place in line takes none.
    block_on(clock::sleep(ms(2_000)));
    assert_eq!(nodes.presentations("a"), [0; 5], "waiting polls");
    assert_eq!(lines().iter().filter(|line| **line == "1").count(), 1, "{:?}", lines());
    let before = guard.fencing_token();
    block_on(guard.unlock()).unwrap();
    let next = waiting.join().unwrap();
    assert!(next.fencing_token() > before);
    assert_eq!(next.status(), Status::Held);
    eventually("nobody stands in line", || lines().iter().all(|line| line == "0"));
    nodes.settle("a", 5);
    block_on(next.unlock()).unwrap();
    nodes.settle("a", 0);
}

#[test]
fn waiters_that_are_dropped_or_give_up_leave_nothing() {
    let nodes = Nodes::start(5);
    let (store, locks) = nodes.store();
    nodes.warm_up(&locks);
    let guard = block_on(locks.mutex("a").lock()).unwrap();
    for wait in [1, 5, 20, 60] {
        for _ in 0..5 {
            // Given up with a word, and dropped without one.
            let waited = block_on(locks.mutex("a").lock_for(ms(wait)));
            assert!(
                waited.as_ref().map_or_else(|error| error.kind() == ErrorKind::Unknown, Option::is_none),
                "{waited:?}"
            );
            let dropped = clock::now().plus(ms(wait));
            assert!(block_on(clock::timeout_at(dropped, locks.mutex("a").lock())).is_none());
            assert!(block_on(locks.mutex("a").try_lock()).unwrap().is_none());
        }
    }
    block_on(guard.unlock()).unwrap();
    nodes.settle("a", 0);
    for server in &nodes.servers {
        assert_eq!(server.cli(&["EXISTS", "leasehold:{a}:queue:a"]), "0", "somebody still stands in line");
    }
    drop(block_on(locks.mutex("a").lock()).unwrap());
    nodes.settle("a", 0);
    // Those that were forbidden somewhere are remembered for a minute, so that they are not presented under the same id.
    eventually("claims are forgotten", || store.remembered() <= 60);
}

#[test]
fn what_was_released_is_forgotten() {
    let nodes = Nodes::start(3);
    let (store, locks) = nodes.store();
    for round in 0..300 {
        let guard = block_on(locks.mutex(format!("a{}", round % 7)).lock()).unwrap();
        assert!(store.remembered() >= 1);
        block_on(guard.unlock()).unwrap();
    }
    eventually("every claim is forgotten", || store.remembered() == 0);
}

#[test]
fn sixteen_clients_are_never_inside_together_and_all_get_in() {
    let nodes = Nodes::start(5);
    let urls: Vec<String> = (0..16).map(|_| nodes.url()).collect();
    let contest = Contest::start(&urls, "a", ms(10_000));
    contest.goes_on(100);
    assert!(contest.judge() >= 100);
    nodes.settle("a", 0);
}

#[test]
fn a_split_vote_of_an_even_number_is_resolved() {
    let nodes = Nodes::start(4);
    let urls: Vec<String> = (0..4).map(|_| nodes.url()).collect();
    let contest = Contest::start(&urls, "a", ms(10_000));
    contest.goes_on(100);
    contest.judge();
    nodes.settle("a", 0);
    // Two halves that each belong to another claim: nobody has it, and it is told so.
    let locks = nodes.connect();
    let id = |digit: &str| digit.repeat(32);
    for (server, digit) in nodes.servers.iter().zip(["a", "a", "b", "b"]) {
        server.cli(&["SET", "split", &format!("lh1:{}:1:{{}}", id(digit)), "PX", "300"]);
    }
    assert!(block_on(locks.mutex("split").try_lock()).unwrap().is_none());
    assert_eq!(block_on(locks.show("split")).unwrap().holder, None, "half of the nodes are no majority");
    let guard = block_on(locks.mutex("split").lock()).unwrap();
    assert_eq!(guard.status(), Status::Held);
}

#[test]
fn a_quorum_of_too_few_or_of_the_same_node_twice_is_refused() {
    let kind = |url: &str| block_on(leasehold::connect(url)).map(|_| ()).unwrap_err().kind();
    let server = |port: u16| format!("redis://127.0.0.1:{port}");
    assert_eq!(kind("quorum:"), ErrorKind::Invalid);
    assert_eq!(kind(&url_of(&[server(1), server(2)])), ErrorKind::Invalid);
    assert_eq!(kind(&url_of(&[server(1), server(2), server(1)])), ErrorKind::Invalid);
    assert_eq!(kind(&url_of(&["memory:".into(), "memory:".into(), "memory:".into()])), ErrorKind::Invalid);
    let loud = [server(1), "redis://LOCALHOST:2".into(), "redis://localhost:2".into()];
    assert_eq!(kind(&url_of(&loud)), ErrorKind::Invalid, "a host is one in whatever case it is written");
    // However deep it is nested, and with a password where the scheme belongs.
    assert_eq!(kind(&"quorum:?node=".repeat(50_000)), ErrorKind::Invalid);
    let quorum_of_rings = url_of(&["ring:?node=nonsense:".into()]);
    let error = block_on(leasehold::connect(&quorum_of_rings)).unwrap_err().to_string();
    assert!(error.contains("no store has the scheme nonsense:"), "{error}");
    let error = block_on(leasehold::connect(&url_of(&["hunter2@host:6379".into()]))).unwrap_err();
    assert!(error.kind() == ErrorKind::Invalid && !error.to_string().contains("hunter2"), "{error}");
    let nobody = block_on(leasehold::connect(&url_of(&[server(1), server(2), server(3)]))).unwrap_err();
    assert_eq!(nobody.kind(), ErrorKind::Unavailable);
    for port in 1..=3 {
        assert!(nobody.to_string().contains(&format!("{}: could not connect", server(port))), "{nobody}");
    }
}

#[test]
fn a_node_that_was_dead_when_connecting_is_taken_in_later() {
    let mut nodes = Nodes::start(5);
    nodes.servers[1].kill9();
    nodes.servers[3].kill9();
    let (store, locks) = nodes.store();
    assert_eq!(store.set_aside().len(), 2);
    let guard = block_on(locks.mutex("a").ttl(ms(3_000)).lock()).unwrap();
    nodes.servers[1].restart();
    nodes.servers[3].restart();
    // They have missed the grant; the next renewal after they are back brings it to them.
    nodes.settle("a", 5);
    assert_eq!(nodes.tokens("a"), [guard.fencing_token().get(); 5]);
    assert_eq!(store.set_aside().len(), 0);
    block_on(guard.unlock()).unwrap();
    nodes.settle("a", 0);
}

#[test]
fn an_error_names_what_every_node_said() {
    let mut nodes = Nodes::start(3);
    let locks = nodes.connect();
    nodes.warm_up(&locks);
    nodes.servers[0].kill9();
    nodes.links[1].black_hole(true);
    let error = block_on(locks.mutex("a").try_lock()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unknown, "one node granted it, and one never answered: {error}");
    let said = |node: usize| {
        let text = error.to_string();
        let at =
            text.find(&nodes.links[node].url()).unwrap_or_else(|| panic!("no word of node {node}: {text}"));
        text[at..].split("; ").next().unwrap().to_owned()
    };
    assert!(said(0).contains("connect"), "{error}");
    assert!(said(2).contains("granted") || said(2).contains("busy"), "{error}");
    assert!(said(1).contains("no answer") || said(1).contains("set aside"), "{error}");
    assert!(error.to_string().contains("lock a"), "{error}");
}

#[test]
fn onlookers_are_told_who_has_a_majority_and_operators_how_each_node_is() {
    let nodes = Nodes::start(4);
    let locks = nodes.connect();
    assert!(!locks.guarantees().fifo);
    assert_eq!(locks.guarantees().fencing, Fencing::TimeFloor);
    let guard = block_on(locks.mutex("a").label("why").lock()).unwrap();
    let view = block_on(locks.show("a")).unwrap();
    let holder = view.holder.expect("a majority has it");
    assert_eq!(holder.token, Some(guard.fencing_token()));
    assert_eq!(holder.record.unwrap().label.as_deref(), Some("why"));
    // Listed by a majority, page by page.
    let many: Vec<_> = (0..5).map(|n| block_on(locks.mutex(format!("b{n}")).lock()).unwrap()).collect();
    for guard in &many {
        block_on(guard.extend(ms(30_000))).unwrap();
    }
    nodes.settle("b4", 4);
    let mut seen = Vec::new();
    let mut after = None;
    loop {
        let query = Query::Prefix { prefix: b"b".to_vec(), after, limit: 2 };
        let page = block_on(locks.inspect(&query)).unwrap();
        seen.extend(page.items.iter().map(|view| view.name.to_string()));
        after = page.next;
        if after.is_none() {
            break;
        }
    }
    assert_eq!(seen, ["b0", "b1", "b2", "b3", "b4"]);
    nodes.servers[2].pause();
    let findings = block_on(locks.diagnose());
    nodes.servers[2].resume();
    let of = |check: &str| {
        findings.iter().find(|finding| finding.check == check).unwrap_or_else(|| panic!("{check}"))
    };
    assert_eq!(of("number of nodes").severity, Severity::Warning, "an even number");
    assert_eq!(of(&format!("node {}", nodes.links[0].url())).severity, Severity::Good);
    assert_eq!(of(&format!("node {}", nodes.links[2].url())).severity, Severity::Warning);
    let of_a_node =
        |finding: &&leasehold::Finding| finding.check.starts_with(&format!("{}: ", nodes.links[0].url()));
    assert!(findings.iter().any(|finding| of_a_node(&finding)), "each node is looked over itself");
}

#[test]
fn any_stores_can_be_nodes() {
    let server = RedisServer::start();
    let locks = connect(&url_of(&[server.url(), "memory:".into(), "ring:?node=memory:".into()]));
    let guard = block_on(locks.mutex("a").lock()).unwrap();
    assert!(block_on(locks.mutex("a").try_lock()).unwrap().is_none());
    let token = guard.fencing_token();
    block_on(guard.unlock()).unwrap();
    assert!(block_on(locks.mutex("a").lock()).unwrap().fencing_token() > token);

    let memories: Vec<Arc<MemoryStore>> = (0..3).map(|_| Arc::new(MemoryStore::new())).collect();
    let node = |(number, store): (usize, &Arc<MemoryStore>)| {
        NodeSource::over(format!("memory:{number}"), store.clone() as Arc<dyn Store>)
    };
    let sources = memories.iter().enumerate().map(node).collect();
    let store = block_on(QuorumStore::connect(sources, runtime())).unwrap();
    let locks = leasehold::Locks::over(store).unwrap();
    let guard = block_on(locks.mutex("a").lock()).unwrap();
    block_on(guard.unlock()).unwrap();
}

#[test]
fn a_store_that_goes_by_the_life_of_the_process_is_no_node() {
    let folder = tempfile::tempdir().unwrap();
    let sqlite = |file: &str| format!("sqlite:{}", folder.path().join(file).display());
    let memory = |number: usize| {
        NodeSource::over(format!("memory:{number}"), Arc::new(MemoryStore::new()) as Arc<dyn Store>)
    };
    let file = folder.path().join("c.db");
    let open = move || {
        let store = SqliteStore::open(&file, &Options::default())?;
        Ok(Arc::new(store) as Arc<dyn Store>)
    };

    // Known when connecting: an error that names it, even if a majority could do without.
    let opened = open.clone();
    let now = NodeSource::new("sqlite:c", move || Box::pin(std::future::ready(opened())));
    let error = block_on(QuorumStore::connect(vec![memory(0), memory(1), now], runtime())).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
    assert!(error.to_string().contains("sqlite:c"), "{error}");
    let url = url_of(&["memory:".into(), sqlite("a.db"), sqlite("b.db")]);
    let error = block_on(async { leasehold::connect(&url).await }).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");

    // Not to be reached at first, and found to be one later: it never counts.
    let tries = Arc::new(AtomicUsize::new(0));
    let count = tries.clone();
    let later = NodeSource::new("sqlite:c", move || {
        let first = count.fetch_add(1, Ordering::SeqCst) == 0;
        let unreachable = Err(leasehold::Error::new(ErrorKind::Unavailable, "not there yet"));
        Box::pin(std::future::ready(if first { unreachable } else { open() }))
    });
    let store = block_on(QuorumStore::connect(vec![memory(0), memory(1), later], runtime())).unwrap();
    eventually("it was opened", || tries.load(Ordering::SeqCst) == 2);
    let locks = leasehold::Locks::over(store.clone()).unwrap();
    let guard = block_on(locks.mutex("a").lock()).unwrap();
    assert_eq!(store.set_aside(), [Arc::from("sqlite:c")]);
    let refused = |finding: &leasehold::Finding| format!("{finding:?}").contains("life of the process");
    eventually("doctor says why", || block_on(locks.diagnose()).iter().any(refused));
    block_on(guard.unlock()).unwrap();
    assert_eq!(tries.load(Ordering::SeqCst), 2, "it is not opened over and over");
}
