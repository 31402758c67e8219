//! The Redis store against real servers: the clauses of the contract.
#![allow(clippy::disallowed_methods, clippy::unwrap_used, reason = "a test may panic")]

mod common;

use std::sync::Arc;
use std::time::Duration;

use common::{Server, store};
use leasehold::ErrorKind;
use leasehold::clock;
use leasehold::store::Store;
use leasehold::stores::redis::{RedisStore, key_names};
use leasehold::{
    Acquired, Claim, ClaimId, Fencing, FencingToken, Grant, Held, Holder, Name, Page, Persistence, Query,
    Record, Released, Renewal,
};
use pollster::block_on;

const TTL: Duration = Duration::from_secs(30);

fn claim(name: impl AsRef<[u8]>) -> Claim {
    Claim::new(Name::new(name).unwrap(), clock::claim_id(), TTL)
}

async fn granted(store: &RedisStore, claim: &Claim) -> Grant {
    match store.acquire(claim).await.unwrap() {
        Acquired::Granted(grant) => grant,
        other => panic!("not granted: {other:?}"),
    }
}

async fn busy(store: &RedisStore, claim: &Claim) -> Holder {
    match store.acquire(claim).await.unwrap() {
        Acquired::Busy(holder) => holder,
        other => panic!("not busy: {other:?}"),
    }
}

async fn hold(store: &RedisStore, claim: &Claim) -> Held {
    Held::new(claim, &granted(store, claim).await)
}

/// A store on a fresh server.
fn fresh() -> (Server, Arc<RedisStore>) {
    let server = Server::start(&[]);
    let store = block_on(store(&server.url())).unwrap();
    (server, store)
}

fn cmd<T: redis::FromRedisValue>(raw: &mut redis::Connection, words: &[&[u8]]) -> T {
    let mut cmd = redis::cmd(std::str::from_utf8(words[0]).unwrap());
    cmd.arg(&words[1..]);
    cmd.query(raw).unwrap()
}

#[test]
fn one_holder_and_the_same_claim_again_is_the_same_grant() {
    let (_server, store) = fresh();
    block_on(async {
        let record = Record { host: "h".into(), pid: 7, label: Some("why".into()), ..Record::default() };
        let first = claim("a").with_record(record.encode().into());
        let grant = granted(&store, &first).await;
        assert_eq!((grant.ttl, grant.session), (TTL, 1));
        let again = granted(&store, &first).await;
        assert_eq!(again.token, grant.token);
        assert!(again.ttl <= TTL && again.ttl > TTL / 2);
        let holder = busy(&store, &claim("a")).await;
        assert_eq!((holder.id, holder.token), (Some(first.id), Some(grant.token)));
        assert_eq!(holder.record, Some(record));
        assert!(holder.remaining.unwrap() <= TTL);
        granted(&store, &claim("b")).await;
    });
}

#[test]
fn release_says_which_case_it_was_and_touches_nobody_elses() {
    let (_server, store) = fresh();
    block_on(async {
        let mine = hold(&store, &claim("a")).await;
        let other = Held::new(&claim("a"), &granted(&store, &claim("b")).await);
        assert_eq!(store.release(&other).await.unwrap(), Released::HeldByOther);
        assert_eq!(store.renew(std::slice::from_ref(&mine)).await[0].clone().unwrap(), Renewal::Renewed(TTL));
        assert_eq!(store.release(&mine).await.unwrap(), Released::Released);
        assert_eq!(store.release(&mine).await.unwrap(), Released::NotHeld);
        assert_eq!(store.renew(std::slice::from_ref(&mine)).await[0].clone().unwrap(), Renewal::Lost);
    });
}

#[test]
fn a_lock_ends_with_its_ttl_and_the_next_token_is_larger() {
    let (_server, store) = fresh();
    block_on(async {
        let mut short = claim("a");
        short.ttl = Duration::from_millis(50);
        let first = hold(&store, &short).await;
        let second = claim("a");
        let token = loop {
            match store.acquire(&second).await.unwrap() {
                Acquired::Granted(grant) => break grant.token,
                Acquired::Busy(holder) => {
                    clock::sleep(holder.remaining.unwrap() + Duration::from_millis(1)).await;
                }
                other @ Acquired::Queued(_) => panic!("{other:?}"),
            }
        };
        assert!(token > first.token.unwrap());
        assert_eq!(store.release(&first).await.unwrap(), Released::HeldByOther);
        // Only confirming: an extension by 50 ms would have to be answered within a third of that.
        let mut confirm = first;
        confirm.extend = None;
        assert_eq!(store.renew(&[confirm]).await[0].clone().unwrap(), Renewal::Lost);
    });
}

#[test]
fn renewing_never_shortens_and_never_creates() {
    let (server, store) = fresh();
    block_on(async {
        let mut held = hold(&store, &claim("a")).await;
        held.extend = Some(Duration::from_secs(1));
        let Renewal::Renewed(left) = store.renew(std::slice::from_ref(&held)).await[0].clone().unwrap()
        else {
            panic!()
        };
        assert!(left > TTL / 2, "{left:?}");
        held.extend = None;
        let Renewal::Renewed(left) = store.renew(std::slice::from_ref(&held)).await[0].clone().unwrap()
        else {
            panic!()
        };
        assert!(left > TTL / 2 && left <= TTL, "{left:?}");
        held.extend = Some(TTL * 2);
        assert_eq!(
            store.renew(std::slice::from_ref(&held)).await[0].clone().unwrap(),
            Renewal::Renewed(TTL * 2)
        );
        let mut raw = server.raw();
        // Without an expiry it is ours still, and confirming must not end it.
        cmd::<i64>(&mut raw, &[b"PERSIST", b"a"]);
        held.extend = None;
        assert!(matches!(store.renew(std::slice::from_ref(&held)).await[0], Ok(Renewal::Renewed(_))));
        assert_eq!(cmd::<i64>(&mut raw, &[b"PTTL", b"a"]), -1);
        held.extend = Some(TTL);
        assert_eq!(store.renew(std::slice::from_ref(&held)).await[0].clone().unwrap(), Renewal::Renewed(TTL));
        cmd::<i64>(&mut raw, &[b"DEL", b"a"]);
        assert_eq!(store.renew(std::slice::from_ref(&held)).await[0].clone().unwrap(), Renewal::Lost);
        assert_eq!(cmd::<i64>(&mut raw, &[b"EXISTS", b"a"]), 0);
    });
}

#[test]
fn a_mixed_batch_of_250_gets_each_its_own_answer() {
    let (server, store) = fresh();
    block_on(async {
        let mut batch = Vec::new();
        for number in 0..250 {
            batch.push(hold(&store, &claim(format!("n{number}"))).await);
        }
        let mut raw = server.raw();
        let mut expected = vec!["renewed"; 250];
        for number in (0..250).step_by(10) {
            let name = format!("n{number}");
            cmd::<i64>(&mut raw, &[b"DEL", name.as_bytes()]);
            expected[number] = "lost";
            match number / 10 % 4 {
                1 => drop(cmd::<i64>(&mut raw, &[b"RPUSH", name.as_bytes(), b"x"])),
                2 => cmd::<()>(&mut raw, &[b"SET", name.as_bytes(), b"foreign"]),
                3 => {
                    batch[number].extend = Some(Duration::from_millis(1));
                    expected[number] = "invalid";
                }
                _ => {}
            }
        }
        let before = calls(&mut raw, "evalsha") + calls(&mut raw, "eval");
        let answers = store.renew(&batch).await;
        let told: Vec<_> = answers
            .iter()
            .map(|answer| match answer {
                Ok(Renewal::Renewed(TTL)) => "renewed",
                Ok(Renewal::Lost) => "lost",
                Err(error) if error.kind() == ErrorKind::Invalid => "invalid",
                other => panic!("{other:?}"),
            })
            .collect();
        assert_eq!(told, expected);
        // One command for each hundred, and as many again the first time, when the server did not know the script.
        assert_eq!(calls(&mut raw, "evalsha") + calls(&mut raw, "eval") - before, 6);
        store.renew(&batch).await;
        assert_eq!(calls(&mut raw, "evalsha") + calls(&mut raw, "eval") - before, 9);
        assert!(store.renew(&[]).await.is_empty());
    });
}

/// How often the server was sent that command.
fn calls(raw: &mut redis::Connection, command: &str) -> u64 {
    let stats: String = cmd(raw, &[b"INFO", b"commandstats"]);
    let line = stats
        .lines()
        .find_map(|line| line.strip_prefix(&format!("cmdstat_{command}:calls=")).map(str::to_owned));
    line.map_or(0, |rest| rest.split(',').next().unwrap().parse().unwrap())
}

#[test]
fn a_lock_and_its_release_are_one_command_each() {
    let (server, store) = fresh();
    block_on(async {
        let warm = hold(&store, &claim("warm")).await;
        let _ = store.release(&warm).await.unwrap();
        let mut raw = server.raw();
        let before = (calls(&mut raw, "evalsha"), calls(&mut raw, "eval"));
        let held = hold(&store, &claim("a")).await;
        let _ = store.release(&held).await.unwrap();
        assert_eq!((calls(&mut raw, "evalsha"), calls(&mut raw, "eval")), (before.0 + 2, before.1));
    });
}

#[test]
fn a_withdrawn_claim_is_never_granted_however_late_it_comes() {
    let (server, store) = fresh();
    block_on(async {
        let mut late = claim("a");
        late.ttl = Duration::from_secs(10);
        assert_eq!(store.release(&Held::unanswered(&late)).await.unwrap(), Released::NotHeld);
        let error = store.acquire(&late).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Rejected);
        assert!(error.to_string().contains("withdrawn"), "{error}");
        granted(&store, &claim("a")).await;

        // A grant of another connection leaves one as well, a clean release does not.
        let mut mine = hold(&store, &claim("b")).await;
        mine.session += 1;
        assert_eq!(store.release(&mine).await.unwrap(), Released::Released);
        let clean = hold(&store, &claim("c")).await;
        let _ = store.release(&clean).await.unwrap();
        let mut raw = server.raw();
        let gone = |held: &Held| key_names(b"", &held.name, held.id).unwrap().gone;
        let left: i64 = cmd(&mut raw, &[b"PTTL", &gone(&mine)]);
        assert!(left > 3_500_000 && left <= 3_600_000);
        assert_eq!(cmd::<i64>(&mut raw, &[b"EXISTS", &gone(&clean)]), 0);

        let waiting = claim("d").with_queue(true);
        assert_eq!(store.release(&Held::unanswered(&waiting)).await.unwrap(), Released::NotHeld);
        assert_eq!(store.acquire(&waiting).await.unwrap_err().kind(), ErrorKind::Rejected);
    });
}

#[test]
fn other_libraries_and_leasehold_exclude_each_other() {
    let (server, store) = fresh();
    block_on(async {
        let mut raw = server.raw();
        let theirs = b"0123456789abcdef0123456789abcdef";
        cmd::<()>(&mut raw, &[b"SET", b"a", theirs, b"NX", b"PX", b"20000"]);
        let mine = claim("a");
        let holder = busy(&store, &mine).await;
        assert_eq!(holder.foreign.as_deref(), Some("0123456789abcdef0123456789abcdef"));
        assert!(holder.remaining.unwrap() <= Duration::from_secs(20));
        let held = Held::new(&mine, &granted(&store, &claim("b")).await);
        assert_eq!(store.release(&held).await.unwrap(), Released::HeldByOther);
        cmd::<()>(&mut raw, &[b"SET", b"a", &vec![0xff; 100_000]]);
        let holder = busy(&store, &mine).await;
        assert_eq!((holder.foreign.unwrap(), holder.remaining), ("\\xff".repeat(64), None));
        cmd::<i64>(&mut raw, &[b"DEL", b"a"]);
        granted(&store, &mine).await;
        let taken: Option<String> = cmd(&mut raw, &[b"SET", b"a", theirs, b"NX", b"PX", b"20000"]);
        assert_eq!(taken, None);

        cmd::<()>(&mut raw, &[b"SET", b"new", b"lh2:whatever"]);
        let error = store.acquire(&claim("new")).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Rejected);
        assert!(error.to_string().contains("protocol"), "{error}");
    });
}

#[test]
fn a_key_of_another_type_is_an_error_and_stays_as_it_is() {
    let (server, store) = fresh();
    block_on(async {
        let mut raw = server.raw();
        cmd::<i64>(&mut raw, &[b"HSET", b"a", b"uuid:1", b"1"]);
        let mine = claim("a");
        let error = store.acquire(&mine).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Rejected);
        assert!(error.to_string().contains("Redisson"), "{error}");
        let held = Held::new(&mine, &granted(&store, &claim("b")).await);
        assert_eq!(store.release(&held).await.unwrap(), Released::HeldByOther);
        let Page { items, .. } = store.inspect(&Query::One(mine.name.clone())).await.unwrap();
        assert_eq!(items[0].holder.as_ref().unwrap().foreign.as_deref(), Some("a key of type hash"));

        let keys = key_names(b"", &claim("f").name, ClaimId::from_bytes([0; 16])).unwrap();
        for wrong in [&[b"RPUSH", &keys.fence[..], b"x"], &[b"SET", &keys.fence[..], b"abc"]] {
            cmd::<redis::Value>(&mut raw, wrong);
            let error = store.acquire(&claim("f")).await.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Rejected);
            assert!(error.to_string().contains("last token"), "{error}");
            assert_eq!(cmd::<i64>(&mut raw, &[b"EXISTS", b"f"]), 0);
            cmd::<i64>(&mut raw, &[b"DEL", &keys.fence]);
        }
        granted(&store, &claim("f")).await;
    });
}

#[test]
fn tokens_grow_over_every_loss_and_over_a_clock_that_steps_back() {
    let (server, store) = fresh();
    block_on(async {
        let mut raw = server.raw();
        let mut last = FencingToken::new(0);
        let fence = key_names(b"", &claim("a").name, ClaimId::from_bytes([0; 16])).unwrap().fence;
        for round in 0..5 {
            let held = hold(&store, &claim("a")).await;
            assert!(held.token.unwrap() > last);
            last = held.token.unwrap();
            match round {
                0 => cmd::<()>(&mut raw, &[b"FLUSHALL"]),
                1 => cmd::<()>(&mut raw, &[b"SCRIPT", b"FLUSH"]),
                2 => cmd::<()>(&mut raw, &[b"SET", &fence, b"17"]),
                _ => {}
            }
            if round == 0 {
                assert_eq!(store.renew(std::slice::from_ref(&held)).await[0].clone().unwrap(), Renewal::Lost);
            }
            let _ = store.release(&held).await.unwrap();
        }
        // As if the clock had stood a year ahead: the next is one more, exactly.
        let ahead = last.get() + 365 * 86_400 * 1_000_000;
        cmd::<()>(&mut raw, &[b"SET", &fence, ahead.to_string().as_bytes()]);
        for more in 1..4 {
            let held = hold(&store, &claim("a")).await;
            assert_eq!(held.token.unwrap().get(), ahead + more);
            let _ = store.release(&held).await.unwrap();
        }
        assert_eq!(cmd::<u64>(&mut raw, &[b"GET", &fence]), ahead + 3);
        let kept: i64 = cmd(&mut raw, &[b"PTTL", &fence]);
        // Until the clock has caught up, and the usual time after that.
        let year = 365 * 86_400_000;
        assert!(kept > year + 86_400_000 && kept <= year + 90_000_000, "{kept}");
        let usual = claim("c");
        granted(&store, &usual).await;
        let fence_of_c = key_names(b"", &usual.name, usual.id).unwrap().fence;
        let kept: i64 = cmd(&mut raw, &[b"PTTL", &fence_of_c]);
        assert!(kept > 86_400_000 && kept <= 90_000_000, "{kept}");
        let mut year = claim("b");
        year.ttl = Duration::from_secs(366 * 86_400);
        granted(&store, &year).await;
        let fence_of_b = key_names(b"", &year.name, year.id).unwrap().fence;
        let kept: i64 = cmd(&mut raw, &[b"PTTL", &fence_of_b]);
        assert!(kept > 2 * 365 * 86_400_000, "{kept}");
        cmd::<()>(&mut raw, &[b"SET", &fence, FencingToken::MAX.to_string().as_bytes()]);
        assert_eq!(store.acquire(&claim("a")).await.unwrap_err().kind(), ErrorKind::Rejected);
    });
}

#[test]
fn names_of_every_kind_never_collide_under_every_prefix() {
    let (server, _) = fresh();
    let names: Vec<&[u8]> = vec![
        b"a",
        b"A",
        b"a ",
        b"{a}",
        b"a{}",
        b"{}a",
        b"{",
        b"}",
        b"}{",
        b"a\n",
        b"a\r\nb",
        b"\0",
        b"\xff\xfe",
        b"a:b",
        b"{x}a",
        b"{x}b",
        "\u{202e}a".as_bytes(),
        b"fence:a",
        b"*",
    ];
    block_on(async {
        for prefix in ["", "app:", "%7Bt%7D:", "%0A%FF", "%7B"] {
            let store = store(&format!("{}?prefix={prefix}", server.url())).await.unwrap();
            let mut tokens = Vec::new();
            for name in &names {
                tokens.push(hold(&store, &claim(name)).await);
            }
            let answers = store.renew(&tokens).await;
            assert!(answers.iter().all(|answer| matches!(answer, Ok(Renewal::Renewed(_)))));
            let query = Query::Prefix { prefix: Vec::new(), after: None, limit: 500 };
            let page = store.inspect(&query).await.unwrap();
            let mut sorted = names.clone();
            sorted.sort_unstable();
            assert_eq!(page.items.iter().map(|view| view.name.as_bytes()).collect::<Vec<_>>(), sorted);
            for held in &tokens {
                assert_eq!(store.release(held).await.unwrap(), Released::Released);
            }
        }
        assert_eq!(
            store(&format!("{}?prefix=lease", server.url()))
                .await
                .unwrap()
                .acquire(&claim("hold:x"))
                .await
                .unwrap_err()
                .kind(),
            ErrorKind::Invalid
        );
    });
}

#[test]
fn a_ttl_out_of_range_is_refused_before_anything_is_sent() {
    let (server, store) = fresh();
    block_on(async {
        for ttl in
            [Duration::ZERO, Duration::from_millis(9), Duration::from_secs(367 * 86_400), Duration::MAX]
        {
            let mut odd = claim("a");
            odd.ttl = ttl;
            assert_eq!(store.acquire(&odd).await.unwrap_err().kind(), ErrorKind::Invalid, "{ttl:?}");
        }
        let mut year = claim("a");
        year.ttl = Duration::from_secs(366 * 86_400);
        granted(&store, &year).await;
        let fat = claim("b").with_record("x".repeat(5000).into());
        assert_eq!(store.acquire(&fat).await.unwrap_err().kind(), ErrorKind::Invalid);
        assert_eq!(cmd::<i64>(&mut server.raw(), &[b"EXISTS", b"b"]), 0);
    });
}

#[test]
fn inspection_tells_what_is_held_right_now() {
    let (server, store) = fresh();
    block_on(async {
        let mine = claim("a/1").with_record(Record { host: "h".into(), ..Record::default() }.encode().into());
        let held = hold(&store, &mine).await;
        let one = store.inspect(&Query::One(mine.name.clone())).await.unwrap();
        let view = &one.items[0];
        let holder = view.holder.as_ref().unwrap();
        assert_eq!((holder.id, holder.token, view.last_token), (Some(mine.id), held.token, held.token));
        assert_eq!(holder.record.as_ref().unwrap().host, "h");
        let since = Duration::from_micros(holder.since_unix_micros.unwrap());
        assert!(clock::wall().abs_diff(since) < Duration::from_secs(60));
        let free = store.inspect(&Query::One(Name::new("never").unwrap())).await.unwrap();
        assert_eq!((&free.items[0].holder, free.items[0].last_token), (&None, None));

        let list = async |prefix: &str, after: Option<&str>, limit| {
            let after = after.map(|name| Name::new(name).unwrap());
            let query = Query::Prefix { prefix: prefix.into(), after, limit };
            let page = store.inspect(&query).await.unwrap();
            let names: Vec<String> = page.items.iter().map(|view| view.name.to_string()).collect();
            (names, page.next.map(|name| name.to_string()))
        };
        // Listed from its first renewal on.
        assert_eq!(list("", None, 10).await.0, Vec::<String>::new());
        let mut all = vec![held];
        for name in ["a/3", "a/2", "b", "c"] {
            all.push(hold(&store, &claim(name)).await);
        }
        let _ = store.renew(&all).await;
        assert_eq!(list("", None, 10).await, (vec!["a/1", "a/2", "a/3", "b", "c"].map_into(), None));
        assert_eq!(list("a/", None, 10).await.0, ["a/1", "a/2", "a/3"]);
        assert_eq!(list("", None, 2).await, (vec!["a/1", "a/2"].map_into(), Some("a/2".into())));
        assert_eq!(list("", Some("a/2"), 3).await, (vec!["a/3", "b", "c"].map_into(), None));
        let _ = store.release(&all[1]).await.unwrap();
        let mut raw = server.raw();
        cmd::<()>(&mut raw, &[b"SET", b"c", b"foreign", b"PX", b"9000"]);
        assert_eq!(list("", None, 10).await.0, ["a/1", "a/2", "b", "c"]);
        let page = store.inspect(&Query::Prefix { prefix: "c".into(), after: None, limit: 1 }).await.unwrap();
        assert_eq!(page.items[0].holder.as_ref().unwrap().foreign.as_deref(), Some("foreign"));
        // What has ended leaves the index when somebody looks.
        cmd::<i64>(&mut raw, &[b"ZADD", b"leasehold:index:", b"1", b"old"]);
        assert_eq!(list("", None, 10).await.0.len(), 4);
        assert_eq!(cmd::<Option<f64>>(&mut raw, &[b"ZSCORE", b"leasehold:index:", b"old"]), None);
        assert!(cmd::<i64>(&mut raw, &[b"PTTL", b"leasehold:index:"]) > 0);
    });
}

trait MapInto {
    fn map_into(self) -> Vec<String>;
}

impl MapInto for Vec<&str> {
    fn map_into(self) -> Vec<String> {
        self.into_iter().map(str::to_owned).collect()
    }
}

#[test]
fn slots_are_the_ones_of_a_real_cluster() {
    let server = Server::start(&["--cluster-enabled", "yes"]);
    let mut raw = server.raw();
    let alphabet = [b'{', b'}', b'a', b'b', b'{', b'}', b'\n', 0xff];
    for round in 0..2000_u32 {
        let random = *clock::claim_id().as_bytes();
        let name: Vec<u8> =
            random[..=round as usize % 15].iter().map(|byte| alphabet[usize::from(byte & 7)]).collect();
        let prefix: &[u8] = [&b""[..], b"p:", b"{", b"{t}"][round as usize % 4];
        let keys = key_names(prefix, &Name::new(&name).unwrap(), ClaimId::from_bytes(random)).unwrap();
        let mut slot = |key: &[u8]| cmd::<i64>(&mut raw, &[b"CLUSTER", b"KEYSLOT", key]);
        let expected = slot(&keys.lock);
        assert_eq!(slot(&keys.fence), expected, "{keys:?}");
        assert_eq!(slot(&keys.gone), expected, "{keys:?}");
    }
}

#[test]
fn the_guarantees_are_what_the_server_is_set_to() {
    let look = |arguments: &[&str]| {
        let server = Server::start(arguments);
        block_on(store(&server.url())).unwrap().guarantees()
    };
    let plain = look(&[]);
    assert_eq!((plain.fencing, plain.persistence), (Fencing::TimeFloor, Persistence::None));
    assert_eq!((plain.may_evict, plain.lost_at_failover, plain.fifo), (false, false, true));
    assert!(!look(&["--rename-command", "HELLO", ""]).fifo, "who cannot be called does not wait in line");
    assert!(plain.server.contains("Redis ") || plain.server.contains("Valkey "), "{}", plain.server);
    assert_eq!(look(&["--appendonly", "yes"]).persistence, Persistence::Log);
    assert_eq!(look(&["--appendonly", "yes", "--appendfsync", "always"]).persistence, Persistence::Durable);
    assert_eq!(look(&["--save", "60 1"]).persistence, Persistence::Snapshot);
    assert!(look(&["--maxmemory", "100mb", "--maxmemory-policy", "volatile-lru"]).may_evict);
}

#[test]
fn a_renewal_that_asks_for_little_costs_the_others_of_its_batch_no_answer() {
    let (server, store) = fresh();
    let mut raw = server.raw();
    block_on(async {
        let mut short = hold(&store, &claim("short")).await;
        let long = hold(&store, &claim("long")).await;
        short.extend = Some(Duration::from_millis(10));
        cmd::<()>(&mut raw, &[b"CLIENT", b"PAUSE", b"200"]);
        let answers = store.renew(&[short, long]).await;
        assert!(matches!(answers[1], Ok(Renewal::Renewed(_))), "{answers:?}");
    });
}

/// 215 claims; with records and TTLs of their own, which must not change places, or alike.
fn a_crowd(each_its_own: bool, gone: Claim) -> Vec<Claim> {
    let twin = claim("twin");
    let mut claims: Vec<Claim> = (0..200).map(|number| claim(format!("n{number}"))).collect();
    if each_its_own {
        for (number, claim) in (1..).zip(&mut claims) {
            claim.record = format!("{{\"pid\":{number}}}").into();
            claim.ttl = Duration::from_secs(1_000 * number);
        }
    }
    claims.extend([claim("list"), claim("foreign"), gone, twin.clone(), twin]);
    // Ten for one name: exactly one may have it.
    claims.extend((0..10).map(|_| claim("one")));
    claims
}

#[test]
fn claims_that_go_together_get_each_its_own_answer() {
    let (server, store) = fresh();
    let mut raw = server.raw();
    cmd::<i64>(&mut raw, &[b"RPUSH", b"list", b"x"]);
    cmd::<()>(&mut raw, &[b"SET", b"foreign", b"x"]);
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    for round in 0..3 {
        let before = calls(&mut raw, "evalsha");
        let outcomes = runtime.block_on(async {
            let store = &store;
            let gone = claim("gone");
            let _ = store.release(&Held::unanswered(&gone)).await.unwrap();
            let claims = a_crowd(round > 0, gone);
            let tasks: Vec<_> = claims
                .into_iter()
                .map(|claim| {
                    let store = store.clone();
                    tokio::spawn(async move { (store.acquire(&claim).await, claim) })
                })
                .collect();
            let mut outcomes = Vec::new();
            for task in tasks {
                outcomes.push(task.await.unwrap());
            }
            outcomes
        });
        assert!(calls(&mut raw, "evalsha") - before < 60, "215 claims go in few commands");
        let (mut tokens, mut ones, mut held) = (Vec::new(), 0, Vec::new());
        for (outcome, claim) in outcomes {
            match (claim.name.as_bytes(), outcome) {
                (b"list", Err(error)) => assert!(error.to_string().contains("Redisson"), "{error}"),
                (b"gone", Err(error)) => assert!(error.to_string().contains("withdrawn"), "{error}"),
                (b"foreign", Ok(Acquired::Busy(holder))) => assert_eq!(holder.foreign.as_deref(), Some("x")),
                (b"one", Ok(Acquired::Busy(holder))) => assert!(holder.id.is_some_and(|id| id != claim.id)),
                (name, Ok(Acquired::Granted(grant))) => {
                    ones += u32::from(name == b"one");
                    if name == b"twin" {
                        tokens.push(grant.token);
                    }
                    let value: String = cmd(&mut raw, &[b"GET", name]);
                    assert!(value.ends_with(&format!(":{}:{}", grant.token, claim.record)), "{value}");
                    let left: u64 = cmd(&mut raw, &[b"PTTL", name]);
                    assert!(claim.ttl.as_secs() - left / 1_000 < 30, "{left} ms");
                    held.push(Held::new(&claim, &grant));
                }
                (name, other) => panic!("{}: {other:?}", String::from_utf8_lossy(name)),
            }
        }
        assert_eq!((ones, held.len(), tokens[0]), (1, 203, tokens[1]));
        let released = runtime.block_on(async {
            let tasks: Vec<_> = held
                .into_iter()
                .map(|held| {
                    let store = store.clone();
                    tokio::spawn(async move { store.release(&held).await.unwrap() })
                })
                .collect();
            let mut released = 0;
            for task in tasks {
                released += u32::from(task.await.unwrap() == Released::Released);
            }
            released
        });
        // Of the twins, one release ended the lock and the other found it free.
        assert_eq!(released, 202, "round {round}");
    }
}

#[test]
fn a_command_refused_as_a_whole_costs_only_whom_it_concerns() {
    let server = Server::start(&[]);
    let mut raw = server.raw();
    cmd::<()>(&mut raw, &[b"ACL", b"SETUSER", b"u", b"on", b">p", b"~ok*", b"~leasehold:*", b"+@all"]);
    let store = block_on(store(&format!("redis://u:p@127.0.0.1:{}", server.port))).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    runtime.block_on(async {
        let tasks: Vec<_> = (0..60)
            .map(|number| {
                let store = store.clone();
                let mine = claim(format!("{}{number}", if number == 40 { "other" } else { "ok" }));
                tokio::spawn(async move { (number, store.acquire(&mine).await) })
            })
            .collect();
        for task in tasks {
            let (number, outcome) = task.await.unwrap();
            assert_eq!(outcome.is_err(), number == 40, "{number}: {outcome:?}");
        }
    });
}

#[test]
fn a_release_whose_tombstone_could_not_be_written_is_no_known_answer() {
    let (server, store) = fresh();
    let mut raw = server.raw();
    let mine = claim("a");
    cmd::<()>(&mut raw, &[b"CONFIG", b"SET", b"maxmemory", b"1"]);
    block_on(async {
        let error = store.release(&Held::unanswered(&mine)).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Rejected, "{error}");
        cmd::<()>(&mut raw, &[b"CONFIG", b"SET", b"maxmemory", b"0"]);
        assert_eq!(store.release(&Held::unanswered(&mine)).await.unwrap(), Released::NotHeld);
        assert_eq!(store.acquire(&mine).await.unwrap_err().kind(), ErrorKind::Rejected, "withdrawn");
    });
}
