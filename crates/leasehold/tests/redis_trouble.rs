//! The Redis store on bad days: rights, memory, roles, restarts, silence.
#![allow(clippy::disallowed_methods, clippy::unwrap_used, reason = "a test may panic")]

mod common;

use std::sync::Arc;
use std::time::Duration;

use common::{Server, openssl, store};
use leasehold::clock;
use leasehold::store::{Store, Woken};
use leasehold::stores::redis::{FENCED_SET, RedisConfig, RedisStore};
use leasehold::{
    Acquired, Claim, FencingToken, Finding, Grant, Held, Name, Query, Released, Renewal, Severity,
};
use leasehold::{Error, ErrorKind};
use pollster::block_on;

const TTL: Duration = Duration::from_secs(30);

fn claim(name: &str) -> Claim {
    Claim::new(Name::new(name).unwrap(), clock::claim_id(), TTL)
}

async fn granted(store: &RedisStore, claim: &Claim) -> Grant {
    match store.acquire(claim).await.unwrap() {
        Acquired::Granted(grant) => grant,
        other => panic!("not granted: {other:?}"),
    }
}

async fn refused(store: &RedisStore, name: &str, kind: ErrorKind, part: &str) -> Error {
    let error = store.acquire(&claim(name)).await.unwrap_err();
    assert_eq!(error.kind(), kind, "{error}");
    assert!(error.to_string().contains(part), "{error}");
    error
}

fn cmd<T: redis::FromRedisValue>(raw: &mut redis::Connection, words: &str) -> T {
    let mut words = words.split(' ');
    let mut cmd = redis::cmd(words.next().unwrap());
    for word in words {
        cmd.arg(word);
    }
    cmd.query(raw).unwrap()
}

fn worst(findings: &[Finding]) -> Severity {
    findings.iter().map(|finding| finding.severity).max().unwrap()
}

fn found<'a>(findings: &'a [Finding], check: &str) -> &'a Finding {
    findings.iter().find(|finding| finding.check == check).unwrap()
}

#[test]
fn a_healthy_server_has_nothing_to_complain_of_and_keeps_no_trace() {
    let server = Server::start(&["--appendonly", "yes"]);
    block_on(async {
        let store = store(&server.url()).await.unwrap();
        let findings = store.diagnose().await;
        for check in [
            "reach",
            "login",
            "version",
            "role",
            "persistence",
            "eviction policy",
            "memory",
            "clock",
            "round trip",
            "rights",
        ] {
            found(&findings, check);
        }
        assert!(worst(&findings) <= Severity::Note, "{findings:#?}");
        assert_eq!(cmd::<i64>(&mut server.raw(), "DBSIZE"), 0);
    });
}

#[test]
fn a_server_that_is_not_there_is_told_at_once() {
    let mut server = Server::start(&[]);
    block_on(async {
        let store = store(&server.url()).await.unwrap();
        let held = Held::new(&claim("a"), &granted(&store, &claim("a")).await);
        server.kill();
        // The connection is seen to be dead, or breaks under the first call; after that nothing is sent.
        let first = store.acquire(&claim("b")).await.unwrap_err();
        assert!(first.is_transient(), "{first}");
        refused(&store, "b", ErrorKind::Unavailable, "connect").await;
        assert_eq!(store.release(&held).await.unwrap_err().kind(), ErrorKind::Unavailable);
        assert_eq!(store.renew(&[held]).await[0].clone().unwrap_err().kind(), ErrorKind::Unavailable);
        let findings = store.diagnose().await;
        assert_eq!(found(&findings, "reach").severity, Severity::Failure);
        let error = RedisStore::connect(RedisConfig::from_url(&server.url()).unwrap(), common::runtime())
            .await
            .unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unavailable);
    });
}

#[test]
fn a_restart_is_a_new_session_and_an_old_snapshot_costs_no_token_order() {
    let mut server = Server::start(&[]);
    block_on(async {
        let store = store(&server.url()).await.unwrap();
        let mut last = FencingToken::new(0);
        for round in 0..5 {
            let mine = claim("a");
            let grant = granted(&store, &mine).await;
            assert!(grant.token > last);
            last = grant.token;
            assert_eq!(store.release(&Held::new(&mine, &grant)).await.unwrap(), Released::Released);
            if round == 1 {
                cmd::<()>(&mut server.raw(), "SAVE");
            }
        }
        let held = claim("held");
        let grant = granted(&store, &held).await;
        server.restart(&[]);
        let again = loop {
            match store.acquire(&claim("a")).await {
                Ok(Acquired::Granted(grant)) => break grant,
                Ok(other) => panic!("{other:?}"),
                Err(error) => assert!(error.is_transient(), "{error}"),
            }
        };
        assert!(again.token > last);
        assert!(again.session > grant.session);
        let held = Held::new(&held, &grant);
        assert_eq!(store.renew(std::slice::from_ref(&held)).await[0].clone().unwrap(), Renewal::Lost);
        assert_eq!(store.release(&held).await.unwrap(), Released::NotHeld);
    });
}

#[test]
fn calls_of_many_threads_share_one_redial() {
    let server = Server::start(&[]);
    block_on(async {
        let store = store(&server.url()).await.unwrap();
        let mut raw = server.raw();
        let received = |raw: &mut redis::Connection| {
            let info: String = cmd(raw, "INFO stats");
            let line = info
                .lines()
                .find_map(|line| line.strip_prefix("total_connections_received:"))
                .unwrap()
                .to_owned();
            line.parse::<u64>().unwrap()
        };
        let before = received(&mut raw);
        cmd::<i64>(&mut raw, "CLIENT KILL TYPE normal SKIPME yes");
        let tokens: Vec<Grant> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..20)
                .map(|number| {
                    let store = &store;
                    scope.spawn(move || {
                        block_on(async {
                            let mine = claim(&format!("n{number}"));
                            loop {
                                match store.acquire(&mine).await {
                                    Ok(Acquired::Granted(grant)) => return grant,
                                    Ok(other) => panic!("{other:?}"),
                                    Err(error) => assert!(error.is_transient(), "{error}"),
                                }
                            }
                        })
                    })
                })
                .collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        assert!(tokens.iter().all(|grant| grant.session == 2), "{tokens:?}");
        assert_eq!(received(&mut raw) - before, 1);
    });
}

/// How late an answer may be that a timer gives, on a busy machine.
const SLACK: Duration = Duration::from_millis(250);

#[test]
fn in_a_crowd_before_a_silent_server_each_is_told_at_its_own_time() {
    let server = Server::start(&[]);
    let timeout = Duration::from_millis(800);
    let url = format!("{}?timeout={}ms", server.url(), timeout.as_millis());
    let crowd = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    crowd.block_on(async {
        let store = store(&url).await.unwrap();
        granted(&store, &claim("first")).await;
        server.freeze(true);
        // More than go out at once, spread over half of the time: most of them wait in the queue. Each third has little
        // patience, a third of its TTL, behind others that have more.
        let mut waiting = Vec::new();
        for number in 0..100 {
            let (store, mut claim) = (store.clone(), claim(&format!("crowd-{number}")));
            if number % 3 == 0 {
                claim.ttl = Duration::from_millis(300);
            }
            let patience = timeout.min(claim.ttl / 3);
            waiting.push(tokio::spawn(async move {
                let began = clock::now();
                let error = store.acquire(&claim).await.unwrap_err();
                (error, clock::now().since(began), patience)
            }));
            clock::sleep(timeout / 200).await;
        }
        for one in waiting {
            let (error, took, patience) = one.await.unwrap();
            assert_eq!(error.kind(), ErrorKind::Unknown, "{error}");
            assert!(error.to_string().contains("no answer came in time"), "{error}");
            assert!(took >= patience && took < patience + SLACK, "{took:?} instead of {patience:?}");
        }
        server.freeze(false);
    });
}

#[test]
fn a_silent_server_costs_one_timeout_and_its_connection_is_given_up() {
    let server = Server::start(&[]);
    block_on(async {
        let store = store(&format!("{}?timeout=200ms", server.url())).await.unwrap();
        let mine = claim("a");
        server.freeze(true);
        let error = store.acquire(&mine).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unknown, "{error}");
        let mut short = claim("b");
        short.ttl = Duration::from_millis(30);
        let start = clock::now();
        assert!(store.acquire(&short).await.unwrap_err().is_transient());
        assert!(clock::now().since(start) < Duration::from_millis(150), "a third of the TTL is 10 ms");
        // In time the connection is given up, and nothing more is sent into it.
        while store.acquire(&claim("c")).await.unwrap_err().kind() != ErrorKind::Unavailable {
            assert!(clock::now().since(start) < Duration::from_secs(20), "the connection is never given up");
        }
        server.freeze(false);
        let released = loop {
            match store.release(&Held::unanswered(&mine)).await {
                Ok(released) => break released,
                Err(error) => assert!(error.is_transient(), "{error}"),
            }
        };
        // The server ran the late claim before the release, or will refuse it.
        assert_ne!(released, Released::HeldByOther);
        assert_eq!(store.acquire(&mine).await.unwrap_err().kind(), ErrorKind::Rejected);
        assert!(granted(&store, &claim("a")).await.session > 1);
    });
}

#[test]
fn a_store_whose_runtime_is_gone_says_so() {
    let server = Server::start(&[]);
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let config = RedisConfig::from_url(&server.url()).unwrap();
    let store = block_on(RedisStore::connect(config, runtime.handle().clone())).unwrap();
    drop(runtime);
    block_on(async {
        assert!(store.acquire(&claim("a")).await.unwrap_err().is_transient());
        refused(&store, "a", ErrorKind::Unavailable, "runtime").await;
    });
}

/// What docs/redis.md tells people to grant.
fn documented_rights() -> String {
    let page = include_str!("../../../docs/redis.md");
    let line = page.lines().find(|line| line.starts_with("ACL SETUSER ")).expect("the page has the line");
    line.to_owned()
}

/// Each of them is needed for a lock or for waiting.
const RIGHTS: [&str; 28] = [
    "evalsha",
    "eval",
    "set",
    "mget",
    "exists",
    "time",
    "get",
    "del",
    "pttl",
    "pexpire",
    "type",
    "zadd",
    "zrangebyscore",
    "zrem",
    "setrange",
    "rpush",
    "rpop",
    "lpush",
    "lpop",
    "llen",
    "lrange",
    "lrem",
    "hset",
    "hget",
    "hkeys",
    "publish",
    "subscribe",
    "unsubscribe",
];

/// One claim gives up its place in line, another is handed the lock and gives it back.
async fn waits_and_is_handed(store: &RedisStore, held: &Held) {
    let joined = async || {
        let mut mine = claim("a");
        mine.queue = true;
        match store.acquire(&mine).await.unwrap() {
            Acquired::Queued(ticket) => (mine, ticket),
            other => panic!("not in line: {other:?}"),
        }
    };
    let (gone, ticket) = joined().await;
    let (mine, my_ticket) = joined().await;
    assert_eq!(my_ticket.ahead(), Some(1));
    let place = Held::queued(&gone, ticket.session);
    assert_eq!(store.release(&place).await.unwrap(), Released::HeldByOther);
    assert_eq!(store.release(held).await.unwrap(), Released::Released);
    let Woken::Granted { grant, .. } = store.woken(&my_ticket).await else { panic!("not handed over") };
    assert_eq!(store.release(&Held::new(&mine, &grant)).await.unwrap(), Released::Released);
}

#[test]
fn the_documented_rights_suffice_and_none_can_be_left_out() {
    let server = Server::start(&[]);
    let mut raw = server.raw();
    let line = documented_rights().replace(">PASSWORD", ">hunter2");
    cmd::<()>(&mut raw, &line);
    let name = line.split(' ').nth(2).unwrap().to_owned();
    let url = format!("redis://{name}:hunter2@127.0.0.1:{}?prefix=lock:", server.port);
    block_on(async {
        let store = store(&url).await.unwrap();
        let mine = claim("a");
        let held = Held::new(&mine, &granted(&store, &mine).await);
        assert_eq!(store.renew(std::slice::from_ref(&held)).await[0].clone().unwrap(), Renewal::Renewed(TTL));
        let all = Query::Prefix { prefix: Vec::new(), after: None, limit: 10 };
        assert_eq!(store.inspect(&all).await.unwrap().items.len(), 1);
        waits_and_is_handed(&store, &held).await;
        store.fence().set(b"lock:data", b"x", held.token.unwrap()).await.unwrap().unwrap();
        let findings = store.diagnose().await;
        assert!(worst(&findings) <= Severity::Note, "{findings:#?}");
        assert_eq!(found(&findings, "login").found, format!("user {name}"));

        // First: a user that loses its channels loses the connections that listen to them.
        cmd::<()>(&mut raw, &format!("ACL SETUSER {name} resetchannels"));
        let deaf = self::store(&url).await.unwrap();
        assert!(deaf.diagnose().await.iter().any(|finding| finding.found.contains("channels leasehold:*")));
        assert!(!deaf.guarantees().fifo, "who cannot be called does not wait in line");
        cmd::<()>(&mut raw, &format!("ACL SETUSER {name} &leasehold:*"));
        let store = self::store(&url).await.unwrap();
        for right in RIGHTS {
            cmd::<()>(&mut raw, &format!("ACL SETUSER {name} -{right}"));
            let findings = store.diagnose().await;
            let lacking: Vec<_> = findings
                .iter()
                .filter(|finding| finding.check == "rights")
                .map(|finding| &finding.found)
                .collect();
            assert!(lacking[0].to_lowercase().contains(&format!("lacking: {right}")), "{right}: {lacking:?}");
            assert_eq!(found(&findings, "rights").severity, Severity::Failure);
            if matches!(right, "evalsha" | "set" | "get" | "time") {
                let error = refused(&store, "a", ErrorKind::Rejected, &name).await;
                assert!(error.to_string().contains("right"), "{error}");
                assert!(!format!("{error:?}").contains("hunter2"));
            }
            cmd::<()>(&mut raw, &format!("ACL SETUSER {name} +{right}"));
        }
        cmd::<()>(&mut raw, &format!("ACL SETUSER {name} resetkeys ~other:*"));
        refused(&store, "a", ErrorKind::Rejected, &name).await;
        assert!(store.diagnose().await.iter().any(|finding| finding.found.contains("leasehold:*")));
    });
}

#[test]
fn a_wrong_login_is_refused_without_showing_the_password() {
    let server = Server::start(&["--requirepass", "right-secret"]);
    block_on(async {
        for (login, part) in [(":hunter2@", "login"), ("nobody:hunter2@", "nobody"), ("", "login")] {
            let url = format!("redis://{login}127.0.0.1:{}", server.port);
            let error = store(&url).await.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Rejected, "{error}");
            assert!(error.to_string().contains(part), "{error}");
            assert!(!format!("{error} {error:?} {error:#?}").contains("hunter2"), "{error:?}");
        }
        let good = store(&format!("redis://:right-secret@127.0.0.1:{}", server.port)).await.unwrap();
        granted(&good, &claim("a")).await;
        let shown = format!("{good:?} {good:#?} {} {:?}", good.location(), good.diagnose().await);
        assert!(!shown.contains("right-secret"), "{shown}");

        std::fs::write(server.path("pw"), "right-secret\n").unwrap();
        let by_file =
            format!("redis://127.0.0.1:{}?password_file={}", server.port, server.path("pw").display());
        granted(&store(&by_file).await.unwrap(), &claim("b")).await;
        std::fs::remove_file(server.path("pw")).unwrap();
        let error = store(&by_file).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid);
        assert!(error.to_string().contains("password_file"), "{error}");
    });
}

#[test]
#[expect(clippy::too_many_lines, reason = "one walk over all ways to trust, on one server")]
fn tls_trusts_the_given_authority_and_no_other() {
    let folder = Arc::new(tempfile::tempdir().unwrap());
    let path = folder.path();
    for authority in ["ca", "other"] {
        let (key, cert) = (format!("{authority}.key"), format!("{authority}.crt"));
        let arguments = [
            "req",
            "-x509",
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:prime256v1",
            "-nodes",
            "-days",
            "2",
        ];
        openssl(
            path,
            &[&arguments[..], &["-keyout", &key, "-out", &cert, "-subj", "/CN=Authority"]].concat(),
        );
    }
    openssl(
        path,
        &[
            "req",
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:prime256v1",
            "-nodes",
            "-keyout",
            "server.key",
            "-out",
            "server.csr",
            "-subj",
            "/CN=localhost",
        ],
    );
    std::fs::write(path.join("names"), "subjectAltName=DNS:localhost,IP:127.0.0.1\n").unwrap();
    openssl(
        path,
        &[
            "x509",
            "-req",
            "-in",
            "server.csr",
            "-CA",
            "ca.crt",
            "-CAkey",
            "ca.key",
            "-CAcreateserial",
            "-days",
            "2",
            "-extfile",
            "names",
            "-out",
            "server.crt",
        ],
    );
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port().to_string();
    let server = Server::start_in(
        &folder,
        &[
            "--tls-port",
            &port,
            "--tls-auth-clients",
            "no",
            "--tls-cert-file",
            "server.crt",
            "--tls-key-file",
            "server.key",
            "--tls-ca-cert-file",
            "ca.crt",
        ],
    );
    let url = |host: &str, ca: &str| format!("rediss://{host}:{port}?ca={}", path.join(ca).display());
    block_on(async {
        for host in ["127.0.0.1", "localhost"] {
            let store = store(&url(host, "ca.crt")).await.unwrap();
            granted(&store, &claim(host)).await;
        }
        let error = store(&url("127.0.0.1", "other.crt")).await.unwrap_err();
        assert!(error.to_string().to_lowercase().contains("certificate"), "{error}");
        let error = store(&format!("rediss://127.0.0.1:{port}")).await.unwrap_err();
        assert!(error.to_string().to_lowercase().contains("certificate"), "{error}");
        let error = store(&url("127.0.0.1", "none.crt")).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid);
        assert!(error.to_string().contains("none.crt"), "{error}");
        std::fs::write(path.join("empty.crt"), "nothing").unwrap();
        assert!(store(&url("127.0.0.1", "empty.crt")).await.is_err());
        // A server that speaks no TLS.
        assert!(
            store(&format!("rediss://127.0.0.1:{}?timeout=1s", server.port))
                .await
                .unwrap_err()
                .is_transient()
        );
    });
}

#[test]
fn a_unix_socket_and_a_database_number() {
    let folder = Arc::new(tempfile::tempdir().unwrap());
    let socket = folder.path().join("s.sock");
    let server = Server::start_in(&folder, &["--unixsocket", socket.to_str().unwrap()]);
    block_on(async {
        let by_socket = store(&format!("redis+unix://{}?db=3", socket.display())).await.unwrap();
        let mine = claim("a");
        granted(&by_socket, &mine).await;
        assert!(by_socket.location().ends_with("s.sock?db=3"));
        let same = store(&format!("{}/3", server.url())).await.unwrap();
        assert!(matches!(same.acquire(&claim("a")).await.unwrap(), Acquired::Busy(_)));
        granted(&store(&server.url()).await.unwrap(), &claim("a")).await;
        let error = store(&format!("{}/99", server.url())).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Rejected, "{error}");
        assert!(error.to_string().contains("database") || error.to_string().contains("DB"), "{error}");
    });
}

#[test]
fn a_server_without_hello_is_spoken_to_in_the_older_protocol() {
    let server = Server::start(&["--rename-command", "HELLO", ""]);
    block_on(async {
        let store = store(&server.url()).await.unwrap();
        let mine = claim("a");
        let held = Held::new(&mine, &granted(&store, &mine).await);
        assert_eq!(store.renew(std::slice::from_ref(&held)).await[0].clone().unwrap(), Renewal::Renewed(TTL));
        assert_eq!(store.inspect(&Query::One(mine.name.clone())).await.unwrap().items.len(), 1);
        assert_eq!(store.release(&held).await.unwrap(), Released::Released);
        assert!(worst(&store.diagnose().await) <= Severity::Note);
    });
}

#[test]
fn a_full_memory_refuses_new_locks_and_lets_go_of_old_ones() {
    let server = Server::start(&[]);
    block_on(async {
        let store = store(&server.url()).await.unwrap();
        let mine = claim("a");
        let mut held = Held::new(&mine, &granted(&store, &mine).await);
        let mut raw = server.raw();
        cmd::<()>(&mut raw, "CONFIG SET maxmemory 1");
        refused(&store, "b", ErrorKind::Rejected, "maxmemory").await;
        held.extend = Some(TTL * 2);
        assert_eq!(
            store.renew(std::slice::from_ref(&held)).await[0].clone().unwrap(),
            Renewal::Renewed(TTL * 2)
        );
        held.suspect = true;
        assert_eq!(store.release(&held).await.unwrap(), Released::Released);
        assert_eq!(cmd::<i64>(&mut raw, "EXISTS a b"), 0);
        assert_eq!(found(&store.diagnose().await, "memory").severity, Severity::Failure);
        cmd::<()>(&mut raw, "CONFIG SET maxmemory 0");
        granted(&store, &claim("b")).await;
    });
}

#[test]
fn a_replica_is_named_and_takes_no_locks() {
    let master = Server::start(&[]);
    let replica = Server::start(&["--replicaof", &format!("127.0.0.1 {}", master.port)]);
    block_on(async {
        let store = store(&replica.url()).await.unwrap();
        assert!(store.guarantees().lost_at_failover);
        refused(&store, "a", ErrorKind::Rejected, "replica").await;
        assert_eq!(found(&store.diagnose().await, "role").severity, Severity::Failure);
    });
}

#[test]
fn a_server_with_too_many_clients_says_what_to_do() {
    let server = Server::start(&["--maxclients", "2"]);
    let _clients = [server.raw(), server.raw()];
    let error = block_on(store(&server.url())).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
    assert!(error.to_string().contains("maxclients"), "{error}");
}

#[test]
fn a_server_that_loads_or_runs_somebodys_script_is_unavailable() {
    let folder = Arc::new(tempfile::tempdir().unwrap());
    {
        let server = Server::start_in(&folder, &["--enable-debug-command", "yes"]);
        let mut raw = server.raw();
        cmd::<()>(&mut raw, "DEBUG POPULATE 2000 k 100");
        cmd::<()>(&mut raw, "SAVE");
    }
    let slow = ["--key-load-delay", "20000", "--loading-process-events-interval-bytes", "1024"];
    let loading = Server::start_until("Loading RDB", &folder, &slow);
    block_on(async {
        let store = store(&loading.url()).await.unwrap();
        refused(&store, "a", ErrorKind::Unavailable, "loading").await;
    });

    let busy = Server::start(&["--lua-time-limit", "5"]);
    block_on(async {
        let store = store(&busy.url()).await.unwrap();
        let mut raw = busy.raw();
        let mut other = busy.raw();
        let script = std::thread::spawn(move || {
            redis::cmd("EVAL").arg("while true do end").arg(0).query::<redis::Value>(&mut other).unwrap_err()
        });
        let error = loop {
            match store.acquire(&claim("a")).await {
                Ok(_) => {}
                Err(error) => break error,
            }
        };
        assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
        assert!(error.to_string().contains("script"), "{error}");
        cmd::<()>(&mut raw, "SCRIPT KILL");
        script.join().unwrap();
        granted(&store, &claim("b")).await;
    });
}

#[test]
fn the_guard_at_a_key_turns_a_stale_holder_away() {
    let server = Server::start(&[]);
    block_on(async {
        let store = store(&server.url()).await.unwrap();
        let mut first = claim("a");
        first.ttl = Duration::from_millis(20);
        let stale = granted(&store, &first).await.token;
        let newer = loop {
            if let Acquired::Granted(grant) = store.acquire(&claim("a")).await.unwrap() {
                break grant.token;
            }
        };
        for key in [&b"data"[..], b"d{a}ta", b"d}a{ta"] {
            let fence = store.fence();
            fence.set(key, b"old", stale).await.unwrap().unwrap();
            fence.set(key, b"new", newer).await.unwrap().unwrap();
            fence.set_for(key, b"newer\0", newer, Duration::from_secs(60)).await.unwrap().unwrap();
            let error = fence.set(key, b"late", stale).await.unwrap().unwrap_err();
            assert_eq!((error.presented, error.newest), (stale, newer));
            let mut raw = server.raw();
            let kept: Vec<u8> = redis::cmd("GET").arg(key).query(&mut raw).unwrap();
            assert_eq!(kept, b"newer\0");
            let left: i64 = redis::cmd("PTTL").arg(key).query(&mut raw).unwrap();
            assert!(left > 0);
        }
        // Any client can run the script by itself.
        let mut raw = server.raw();
        let mut run = |token: &str| {
            let mut call = redis::cmd("EVAL");
            call.arg(FENCED_SET).arg(2).arg("x").arg("x:token").arg(token).arg("value");
            call.query::<redis::Value>(&mut raw)
        };
        assert_eq!(run("9007199254740991").unwrap(), redis::Value::Int(1));
        assert_eq!(run("7").unwrap(), redis::Value::BulkString(b"9007199254740991".to_vec()));
        for wrong in ["", "x", "-1", "1.5", "nan", "inf", "9007199254740992"] {
            assert!(run(wrong).is_err(), "{wrong}");
        }
        cmd::<i64>(&mut server.raw(), "RPUSH list x");
        assert_eq!(store.fence().set(b"list", b"x", newer).await.unwrap_err().kind(), ErrorKind::Rejected);
    });
}
