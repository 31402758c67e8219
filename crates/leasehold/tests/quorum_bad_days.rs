//! Bad days of a quorum: nodes that are stopped, killed, emptied, slow, silent or out of their mind; answers and releases
//! that come late or never; clients on either side of a partition. Never two holders, tokens that grow, nothing left.

#![allow(clippy::unwrap_used)]

mod nodes;

use std::io::{Read, Write};
use std::net::TcpListener;
use std::time::Duration;

use leasehold::{ErrorKind, Guard, Loss, Released, Retry, Status, clock};
use leasehold_chaos::eventually;
use leasehold_chaos::proxy::{Fault, Proxy};
use leasehold_chaos::servers::RedisServer;
use nodes::{Contest, Nodes, connect, is_acquire, is_release, ms, url_of};
use pollster::block_on;

const TTL: Duration = Duration::from_secs(3);

/// Three clients take one lock in turns while `harm` is done, and after `mend`; the servers that live have nothing at the end.
fn a_bad_day(harm: impl FnOnce(&mut Nodes), mend: impl FnOnce(&mut Nodes)) {
    let mut nodes = Nodes::start(5);
    let urls: Vec<String> = (0..3).map(|_| nodes.url()).collect();
    let contest = Contest::start(&urls, "a", TTL);
    contest.goes_on(20);
    harm(&mut nodes);
    contest.goes_on(60);
    mend(&mut nodes);
    contest.goes_on(20);
    contest.judge();
    // `no_orphan`: what one who gave up left at a node that was away has ended within one TTL of its return.
    nodes.settle("a", 0);
}

/// How the lock is lost, which must come about within some leases.
#[track_caller]
fn loss_of(guard: &Guard) -> Loss {
    block_on(clock::timeout_at(clock::now().plus(TTL * 5), guard.lost())).expect("it is lost in time")
}

#[test]
fn one_node_stopped_and_resumed() {
    a_bad_day(|nodes| nodes.servers[0].pause(), |nodes| nodes.servers[0].resume());
}

#[test]
fn two_nodes_stopped_and_resumed() {
    let both = [0, 1];
    a_bad_day(
        |nodes| both.iter().for_each(|node| nodes.servers[*node].pause()),
        |nodes| both.iter().for_each(|node| nodes.servers[*node].resume()),
    );
}

#[test]
fn two_nodes_killed_and_one_restarted_empty() {
    a_bad_day(
        |nodes| nodes.servers[1..3].iter_mut().for_each(RedisServer::kill9),
        |nodes| {
            nodes.servers[1].restart();
            // The other one stays dead for good; it is asked nothing more, so it is started for the look at what is left.
            nodes.servers[2].restart();
        },
    );
}

#[test]
fn a_node_restarted_empty_again_and_again() {
    a_bad_day(|nodes| nodes.servers[4].restart(), |nodes| nodes.servers[4].restart());
}

#[test]
fn two_nodes_slow_by_200_milliseconds() {
    let slow = |nodes: &mut Nodes, by: Duration| {
        nodes.links[..2].iter().for_each(|link| link.delay_replies(by));
    };
    a_bad_day(|nodes| slow(nodes, ms(200)), |nodes| slow(nodes, Duration::ZERO));
}

#[test]
fn two_nodes_that_take_everything_and_never_answer() {
    let hole = |nodes: &mut Nodes, on: bool| nodes.links[..2].iter().for_each(|link| link.black_hole(on));
    a_bad_day(|nodes| hole(nodes, true), |nodes| hole(nodes, false));
}

#[test]
fn a_node_that_answers_garbage() {
    // It takes connections, and answers whatever it is told with noise.
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        for client in listener.incoming().map_while(Result::ok) {
            std::thread::spawn(move || {
                let (mut client, mut buffer) = (client, [0; 4096]);
                while client.read(&mut buffer).is_ok_and(|read| read > 0) {
                    if client.write_all(b"\x00\xffHTTP/1.1 400 Bad Request\r\n\r\n:17\r\n*-7\r\n").is_err() {
                        return;
                    }
                }
            });
        }
    });
    let before = Nodes::start(5);
    // From the start, and from the middle of a day on.
    let mad = url_of(
        &[
            &["redis://127.0.0.1:".to_owned() + &port.to_string()],
            &before.links[1..].iter().map(Proxy::url).collect::<Vec<_>>()[..],
        ]
        .concat(),
    );
    let contest = Contest::start(&[before.url(), mad], "a", TTL);
    contest.goes_on(20);
    before.links[0].set_upstream(port);
    before.links[0].cut_all();
    contest.goes_on(40);
    contest.judge();
    eventually("nothing is left", || before.holders("a").iter().all(|(node, _)| *node == 0));
}

#[test]
fn nobody_gets_in_without_a_majority_and_all_do_when_it_is_back() {
    let mut nodes = Nodes::start(5);
    let locks = nodes.connect();
    nodes.warm_up(&locks);
    nodes.servers[..3].iter_mut().for_each(RedisServer::kill9);
    for _ in 0..3 {
        let error = block_on(locks.mutex("a").ttl(TTL).try_lock()).unwrap_err();
        assert!(matches!(error.kind(), ErrorKind::Unknown | ErrorKind::Unavailable), "{error}");
    }
    nodes.servers[0].restart();
    let mutex = locks.mutex("a").ttl(TTL);
    eventually("it is taken in again", || {
        block_on(mutex.try_lock())
            .is_ok_and(|guard| guard.is_some_and(|guard| guard.status() == Status::Held))
    });
}

#[test]
fn a_stalled_node_is_not_waited_for() {
    let nodes = Nodes::start(5);
    let (store, locks) = nodes.store();
    nodes.warm_up(&locks);
    nodes.servers[2].pause();
    // Also before it is noticed: the answer comes with the majority's. If each waited for the time-out it took ten seconds.
    let began = clock::now();
    for _ in 0..40 {
        block_on(block_on(locks.mutex("a").lock()).unwrap().unlock()).unwrap();
    }
    assert!(clock::now().since(began) < ms(5_000), "{:?}", clock::now().since(began));
    eventually("it is set aside", || store.set_aside().len() == 1);
    nodes.links[2].forget();
    block_on(block_on(locks.mutex("b").lock()).unwrap().unlock()).unwrap();
    assert_eq!(nodes.presentations("b")[2], 0, "nothing is sent to a node that is set aside");
    nodes.servers[2].resume();
    eventually("it is back", || store.set_aside().is_empty());
    // What it did of what was sent to it while it stood still is given back.
    nodes.settle("a", 0);
}

#[test]
fn a_grant_that_comes_after_the_defeat_is_given_back() {
    let nodes = Nodes::start(5);
    let locks = nodes.connect();
    nodes.warm_up(&locks);
    // Somebody else has three of five: a defeat as soon as these have answered.
    for server in &nodes.servers[..3] {
        server.cli(&["SET", "a", "another library's", "PX", "60000"]);
    }
    let held = nodes.links[3].inject(Fault::HoldReply, |command| is_acquire(command, "a"));
    assert!(block_on(locks.mutex("a").ttl(TTL).try_lock()).unwrap().is_none());
    held.wait();
    assert!(!nodes.servers[3].cli(&["GET", "a"]).is_empty(), "it was granted there");
    held.release();
    // Long before its TTL of three seconds has run out, and without a word from the caller.
    nodes.links[3].wait_for(1, |command| is_release(command, "a"));
    eventually("it is given back", || nodes.servers[3].cli(&["GET", "a"]).is_empty());
    eventually("so is the other", || nodes.servers[4].cli(&["GET", "a"]).is_empty());
}

#[test]
fn a_request_that_arrives_after_the_defeat_creates_nothing_that_stays() {
    let nodes = Nodes::start(5);
    let locks = nodes.connect();
    nodes.warm_up(&locks);
    for server in &nodes.servers[..3] {
        server.cli(&["SET", "a", "another library's", "PX", "60000"]);
    }
    let held = nodes.links[3].inject(Fault::HoldRequest, |command| is_acquire(command, "a"));
    assert!(block_on(locks.mutex("a").ttl(ms(60_000)).try_lock()).unwrap().is_none());
    held.wait();
    // The connection dies; its request arrives all the same, later.
    held.cut_client();
    eventually("the claim is forbidden there", || {
        !nodes.servers[3].cli(&["KEYS", "leasehold:{a}:gone:*"]).is_empty()
    });
    held.release();
    eventually("the request was refused", || held.happened());
    block_on(clock::sleep(ms(50)));
    assert_eq!(nodes.servers[3].cli(&["GET", "a"]), "", "`no_orphan`");
}

#[test]
fn a_defeat_whose_release_is_lost_is_told_again() {
    let nodes = Nodes::start(5);
    let locks = nodes.connect();
    nodes.warm_up(&locks);
    for server in &nodes.servers[..3] {
        server.cli(&["SET", "a", "another library's", "PX", "60000"]);
    }
    let lost = nodes.links[4].inject(Fault::CutBeforeRequest, |command| is_release(command, "a"));
    assert!(block_on(locks.mutex("a").ttl(ms(60_000)).try_lock()).unwrap().is_none());
    lost.wait();
    // The TTL of a minute would show: only another release frees it in time.
    eventually("it is given back", || nodes.servers[4].cli(&["GET", "a"]).is_empty());
}

#[test]
fn a_hold_is_lost_when_a_majority_has_lost_it_and_not_before() {
    let nodes = Nodes::start(5);
    let locks = nodes.connect();
    nodes.warm_up(&locks);
    let guard = block_on(locks.mutex("a").ttl(TTL).lock()).unwrap();
    nodes.settle("a", 5);
    for node in [0, 1] {
        nodes.servers[node].cli(&["DEL", "a"]);
    }
    // Counted over all nodes: three of five renew it, and the two are topped up. Those know that the token was used, and
    // give another one.
    block_on(guard.extend(TTL)).unwrap();
    nodes.settle("a", 5);
    let token = guard.fencing_token().get();
    assert!(nodes.tokens("a").iter().all(|other| *other >= token));
    assert_eq!(nodes.tokens("a")[2..], [token; 3]);
    for node in [0, 2, 4] {
        nodes.servers[node].cli(&["DEL", "a"]);
    }
    let lost = loss_of(&guard);
    assert_eq!(lost, Loss::Removed);
    assert_eq!(guard.status(), Status::Lost);
}

#[test]
fn a_renewal_by_a_minority_of_those_once_held_extends_nothing() {
    let nodes = Nodes::start(5);
    let locks = nodes.connect();
    nodes.warm_up(&locks);
    // Two never granted it: the others are a majority, and two of those three would be a majority of what was held.
    for server in &nodes.servers[3..] {
        server.cli(&["SET", "a", "another library's", "PX", "60000"]);
    }
    let guard = block_on(locks.mutex("a").ttl(TTL).lock()).unwrap();
    nodes.links[2].black_hole(true);
    let lost = loss_of(&guard);
    assert_eq!(lost, Loss::Expired, "two of five renewed it to the end");
    nodes.links[2].black_hole(false);
}

#[test]
fn who_missed_the_grant_is_topped_up() {
    let mut nodes = Nodes::start(5);
    let (store, locks) = nodes.store();
    nodes.warm_up(&locks);
    nodes.servers[..2].iter_mut().for_each(RedisServer::kill9);
    let guard = block_on(locks.mutex("a").ttl(TTL).lock()).unwrap();
    nodes.servers[..2].iter_mut().for_each(RedisServer::restart);
    eventually("they are back", || store.set_aside().is_empty());
    nodes.settle("a", 5);
    eventually("with the same token", || nodes.tokens("a") == [guard.fencing_token().get(); 5]);
    // So it outlives two others than those.
    nodes.links[3].black_hole(true);
    nodes.links[4].black_hole(true);
    block_on(clock::sleep(TTL));
    assert_eq!(guard.status(), Status::Held);
    assert_eq!(block_on(guard.unlock()).unwrap(), Released::Released);
}

#[test]
fn answers_that_take_longer_than_the_ttl_win_nothing() {
    let nodes = Nodes::start(5);
    let locks = nodes.connect();
    nodes.warm_up(&locks);
    nodes.links.iter().for_each(|link| link.delay_replies(ms(300)));
    let outcome = block_on(locks.mutex("a").ttl(ms(240)).renew(false).retry(Retry::never()).lock());
    let error = outcome.expect_err("granted when it had ended");
    assert_eq!(error.kind(), ErrorKind::Unknown, "{error}");
    nodes.links.iter().for_each(|link| link.delay_replies(Duration::ZERO));
}

#[test]
fn a_client_that_is_cut_off_from_the_majority_loses_and_the_other_side_goes_on() {
    let nodes = Nodes::start(5);
    // To the same servers, as another machine has them.
    let other_links: Vec<Proxy> = nodes.servers.iter().map(|server| Proxy::start(server.port())).collect();
    let here = nodes.connect();
    let there = connect(&url_of(&other_links.iter().map(Proxy::url).collect::<Vec<_>>()));
    nodes.warm_up(&here);
    let guard = block_on(here.mutex("a").ttl(TTL).lock()).unwrap();
    nodes.settle("a", 5);
    // From here only two nodes can be reached, from there the other three.
    nodes.links[2..].iter().for_each(|link| link.black_hole(true));
    other_links[..2].iter().for_each(|link| link.black_hole(true));
    let next = std::thread::spawn(move || {
        let guard = block_on(there.mutex("a").ttl(TTL).lock()).unwrap();
        (clock::now(), guard)
    });
    let loss = loss_of(&guard);
    let lost_at = clock::now();
    assert_eq!(loss, Loss::Expired);
    let (granted_at, next) = next.join().unwrap();
    assert!(granted_at >= lost_at.minus(ms(5)), "granted to the other side before this one knew");
    assert!(next.fencing_token() > guard.fencing_token());
    let refused = block_on(here.mutex("a").ttl(TTL).try_lock());
    assert!(!matches!(refused, Ok(Some(_))), "a minority grants nothing: {refused:?}");
    nodes.links[2..].iter().for_each(|link| link.black_hole(false));
    other_links[..2].iter().for_each(|link| link.black_hole(false));
    assert_eq!(next.status(), Status::Held);
    block_on(next.unlock()).unwrap();
}

#[test]
fn a_client_with_a_wild_clock_or_a_node_with_one_costs_nobody_the_lock() {
    // One node of five is two hours ahead: its tokens are far beyond what the others let a client propose.
    let mut nodes = Nodes::start(4);
    let wild = RedisServer::builder().own_clock().start();
    wild.set_clock_offset(2 * 3600 * 1_000_000);
    nodes.links.push(Proxy::start(wild.port()));
    nodes.servers.push(wild);
    let two_hours = u64::try_from(clock::wall().as_micros()).unwrap() + 2 * 3_600_000_000;
    nodes.servers[4].cli(&["SET", "leasehold:{a}:fence:a", &two_hours.to_string()]);
    // Its answer always comes before those of two others.
    nodes.links[..2].iter().for_each(|link| link.delay_replies(ms(5)));
    let locks = nodes.connect();
    let mut last = 0;
    for _ in 0..5 {
        let guard = block_on(locks.mutex("a").ttl(TTL).lock()).unwrap();
        let token = guard.fencing_token().get();
        assert!(token > last && token < two_hours);
        last = token;
        eventually("a majority has exactly the token", || {
            nodes.tokens("a").iter().filter(|other| **other == token).count() >= 3
        });
        block_on(guard.unlock()).unwrap();
        nodes.settle("a", 0);
    }
}

#[test]
fn a_node_with_a_wild_clock_that_answers_first_costs_nobody_the_lock() {
    // So it is one of the first majority each time, and takes no token that is proposed, or is the cause of one that
    // nobody else takes.
    for offset in [2 * 3600 * 1_000_000, -2 * 3600 * 1_000_000] {
        let wild = RedisServer::builder().own_clock().start();
        wild.set_clock_offset(offset);
        let mut nodes = Nodes::start(2);
        nodes.links.insert(0, Proxy::start(wild.port()));
        nodes.servers.insert(0, wild);
        let (store, locks) = nodes.store();
        nodes.warm_up(&locks);
        nodes.links[1..].iter().for_each(|link| link.delay_replies(ms(20)));
        let mut last = 0;
        for _ in 0..5 {
            let guard = block_on(locks.mutex("a").lock()).unwrap();
            let token = guard.fencing_token().get();
            assert!(token > last);
            last = token;
            eventually("a majority has exactly the token", || {
                nodes.tokens("a").iter().filter(|other| **other == token).count() >= 2
            });
            block_on(guard.unlock()).unwrap();
            nodes.settle("a", 0);
        }
        assert_eq!(store.set_aside().len(), 0);
    }
}
