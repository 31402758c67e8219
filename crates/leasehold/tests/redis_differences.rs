//! What servers differ in is found by trying or asking for it, never by their version.

#![allow(clippy::unwrap_used)]

use std::time::Duration;

use leasehold::{ErrorKind, Locks, Severity};
use leasehold_chaos::eventually;
use leasehold_chaos::servers::{Builder, RedisServer};

async fn connect(server: &RedisServer, user: &str) -> Locks {
    leasehold::connect(&server.url().replace("//", &format!("//{user}"))).await.unwrap()
}

/// A server with a user `app` that has all rights but these, and the start of a URL that logs in as that user.
fn without(rights: &str) -> (RedisServer, &'static str) {
    let server = RedisServer::builder().user(&format!("app on >secret ~* &* +@all {rights}")).start();
    (server, "app:secret@")
}

fn renamed(command: &str) -> (RedisServer, &'static str) {
    (RedisServer::builder().args(["--rename-command", command, ""]).start(), "")
}

fn calls(server: &RedisServer, command: &str) -> u64 {
    let stats = server.cli(&["INFO", "commandstats"]);
    let line = stats.lines().find_map(|line| line.strip_prefix(&format!("cmdstat_{command}:calls=")));
    line.map_or(0, |line| line.split(',').next().unwrap().parse().unwrap())
}

#[tokio::test]
async fn a_server_that_forbids_scripts_says_which_right_or_command_is_lacking() {
    let cases = [
        ("evalsha", without("-evalsha"), "has not the right"),
        ("eval", without("-eval"), "has not the right"),
        ("evalsha", without("-@scripting"), "has not the right"),
        ("evalsha", renamed("EVALSHA"), "lacks a command"),
        ("eval", renamed("EVAL"), "lacks a command"),
    ];
    for (command, (server, user), what) in cases {
        let locks = connect(&server, user).await;
        let error = locks.mutex("a").try_lock().await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Rejected, "{error}");
        let text = error.to_string();
        assert!(text.contains(what) && text.to_lowercase().contains(&format!("'{command}'")), "{text}");
        assert_eq!((text.contains("app"), text.contains("secret")), (!user.is_empty(), false), "{text}");
        let findings = locks.diagnose().await;
        let named = findings.iter().any(|finding| {
            finding.severity == Severity::Failure && finding.found.ends_with(&command.to_uppercase())
        });
        assert!(named, "{command}: {findings:#?}");
    }
}

#[tokio::test]
async fn where_waiters_cannot_be_called_they_ask_again_and_nobody_stands_in_line() {
    let cases = [
        ("RESP3", renamed("HELLO")),
        ("SUBSCRIBE", renamed("SUBSCRIBE")),
        ("SUBSCRIBE", without("-subscribe")),
        ("SUBSCRIBE", without("resetchannels")),
    ];
    for (lacking, (server, user)) in cases {
        let (holders, waiters) = (connect(&server, user).await, connect(&server, user).await);
        assert!(!waiters.guarantees().fifo, "{lacking}");
        let guard = holders.mutex("a").lock().await.unwrap();
        let before = calls(&server, "evalsha");
        let waiter = tokio::spawn(async move { waiters.mutex("a").lock_for(Duration::from_secs(60)).await });
        let server = std::sync::Arc::new(server);
        let asked = server.clone();
        let asks = move || eventually("the waiter asked again", || calls(&asked, "evalsha") >= before + 3);
        tokio::task::spawn_blocking(asks).await.unwrap();
        assert_eq!(server.cli(&["KEYS", "leasehold:*queue*"]), "", "{lacking}");
        guard.unlock().await.unwrap();
        assert!(waiter.await.unwrap().unwrap().is_some(), "{lacking}");
        let findings = holders.diagnose().await;
        assert!(findings.iter().any(|finding| finding.found.contains(lacking)), "{lacking}: {findings:#?}");
    }
}

#[tokio::test]
async fn who_wants_no_line_has_none_and_is_told_so() {
    let server = RedisServer::start();
    let locks = leasehold::connect(&format!("{}?line=no", server.url())).await.unwrap();
    assert!(!locks.guarantees().fifo);
    let findings = locks.diagnose().await;
    assert!(findings.iter().any(|finding| finding.found.contains("line=no")), "{findings:#?}");
    assert!(findings.iter().all(|finding| finding.severity < Severity::Failure), "{findings:#?}");
    assert!(leasehold::connect(&format!("{}?line=yes", server.url())).await.unwrap().guarantees().fifo);
    let error = leasehold::connect(&format!("{}?line=maybe", server.url())).await.unwrap_err();
    assert!(error.kind() == ErrorKind::Invalid && error.to_string().contains("yes or no"), "{error}");
}

#[tokio::test]
async fn the_newer_protocol_cannot_be_forbidden_to_a_user() {
    let (server, user) = without("-hello");
    assert!(connect(&server, user).await.guarantees().fifo, "HELLO is asked for no right");
}

#[tokio::test]
async fn the_doctor_tells_which_extras_a_server_has_by_asking_for_them() {
    let extras = async |builder: Builder, user: &str| {
        let server = builder.start();
        let findings = connect(&server, user).await.diagnose().await;
        findings.into_iter().find(|finding| finding.check == "extras").unwrap().found
    };
    let push = "messages on the command connection (RESP3)";
    // It calls itself Redis 7.2.4 where it is asked for its version.
    let newest = RedisServer::builder().program("valkey-9");
    assert_eq!(extras(newest, "").await, format!("{push}, WAIT, WAITAOF, DELIFEQ"));
    let newer = RedisServer::builder().program("redis-8");
    assert_eq!(extras(newer, "").await, format!("{push}, WAIT, WAITAOF"));
    let shut = RedisServer::builder().args(["--rename-command", "HELLO", "", "--rename-command", "WAIT", ""]);
    assert!(!extras(shut, "").await.split(", ").any(|extra| extra == "WAIT" || extra == push));
    let silent = RedisServer::builder().user("app on >secret ~* &* +@all -command");
    assert_eq!(extras(silent, "app:secret@").await, "the server would not tell");
}
