//! What an operator should know about a server before trusting it with locks.

use std::sync::Arc;
use std::time::Duration;

use redis::{Cmd, Pipeline, Value};

use super::RedisStore;
use super::connection::Link;
use super::look::Facts;
use super::reply::{self, Refusal};
use super::sentinel;
use crate::clock;
use crate::error::Result;
use crate::types::{Finding, Name, Persistence, Severity};

/// Round trips whose median is told.
const PINGS: usize = 20;

impl RedisStore {
    pub(super) async fn findings(&self) -> Vec<Finding> {
        let (mut findings, link) = match self.look_over().await {
            Ok((findings, link)) => (findings, Some(link)),
            Err(error) => {
                let meaning = "no lock can be taken or kept";
                (vec![Finding::new("reach", Severity::Failure, error.to_string(), meaning)], None)
            }
        };
        findings.extend(sentinel::look_over(&self.connector, link).await);
        findings
    }

    async fn look_over(&self) -> Result<(Vec<Finding>, Arc<Link>)> {
        let deadline = self.deadline(None);
        let link = self.connector.link(deadline).await?;
        let mut findings =
            vec![Finding::new("reach", Severity::Good, &*self.connector.location, "the server answers")];
        findings.push(self.login(&link).await?);
        let facts = Facts::ask(&self.connector).await?;
        findings.push(Finding::new(
            "version",
            Severity::Good,
            facts.server(),
            "locks need version 6 at least",
        ));
        findings.push(role(&facts));
        findings.push(persistence(&facts));
        findings.push(eviction(&facts));
        findings.push(memory(&facts));
        findings.push(self.clock(&link).await?);
        findings.push(self.round_trip(&link).await?);
        let id = clock::claim_id();
        let name = Name::new(format!("leasehold-probe-{id}"))?;
        let index =
            [self.keyspace.index().unwrap_or_default(), b":probe-", id.to_string().as_bytes()].concat();
        findings.extend(self.rights(&link, &name, &index).await?);
        findings.push(self.extras(&link).await?);
        Ok((findings, link))
    }

    async fn login(&self, link: &Arc<Link>) -> Result<Finding> {
        let mut question = redis::cmd("ACL");
        question.arg("WHOAMI");
        let answer = self.connector.send(link, &question, self.deadline(None)).await?;
        let user = reply::text(&answer).or_else(|| self.username.clone()).unwrap_or_else(|| "default".into());
        Ok(Finding::new("login", Severity::Good, format!("user {user}"), "the server took the login"))
    }

    /// Which commands it has that not every server has: they are asked for, for a version says little across the families.
    async fn extras(&self, link: &Arc<Link>) -> Result<Finding> {
        let mut question = redis::cmd("COMMAND");
        question.arg("INFO").arg(&EXTRAS[..]);
        let answer = self.connector.send(link, &question, self.deadline(None)).await?;
        let mut found: Vec<_> = known(&answer).into_iter().map(str::to_owned).collect();
        let (found, meaning) = match &answer {
            Value::Array(_) => {
                if link.can_push() {
                    found.insert(0, "messages on the command connection (RESP3)".into());
                }
                (
                    if found.is_empty() { "none".into() } else { found.join(", ") },
                    "no lock needs any of these commands",
                )
            }
            _ => (
                "the server would not tell".into(),
                "grant COMMAND INFO to see which; no lock needs any of these commands",
            ),
        };
        Ok(Finding::new("extras", Severity::Note, found, meaning))
    }

    async fn clock(&self, link: &Arc<Link>) -> Result<Finding> {
        let before = clock::wall();
        let answer = self.connector.send(link, &redis::cmd("TIME"), self.deadline(None)).await?;
        let after = clock::wall();
        let Some(server) = server_time(&answer) else {
            return Ok(Finding::new(
                "clock",
                Severity::Note,
                "the server would not tell its time",
                "its time was not compared with this machine's; locks do not need that",
            ));
        };
        let here = before + after.saturating_sub(before) / 2;
        let direction = if server > here { "ahead of" } else { "behind" };
        Ok(Finding::new(
            "clock",
            Severity::Note,
            format!(
                "the server's clock is {} ms {direction} this machine's",
                server.abs_diff(here).as_millis()
            ),
            "locks do not compare the two; a step of the server's own clock ends leases early or late",
        ))
    }

    async fn round_trip(&self, link: &Arc<Link>) -> Result<Finding> {
        let mut times = Vec::with_capacity(PINGS);
        for _ in 0..PINGS {
            let sent = clock::now();
            self.connector.send(link, &redis::cmd("PING"), self.deadline(None)).await?;
            times.push(clock::now().since(sent));
        }
        times.sort_unstable();
        let median = times[times.len() / 2];
        let (severity, meaning) = if median > Duration::from_millis(100) {
            (Severity::Warning, "each lock and each unlock takes that long: keep TTLs far above it")
        } else {
            (Severity::Good, "each lock and each unlock takes about that long")
        };
        Ok(Finding::new(
            "round trip",
            severity,
            format!("median of {PINGS}: {} us", median.as_micros()),
            meaning,
        ))
    }

    /// Whether waiters can be called: nothing if they can.
    async fn calls(&self, link: &Arc<Link>) -> Result<Vec<Finding>> {
        if !self.connector.has_line() {
            let meaning =
                "who waits asks again, as often as its retry policy says; other libraries get their turns";
            return Ok(vec![Finding::new(
                "waiting",
                Severity::Note,
                "no line: the URL says line=no",
                meaning,
            )]);
        }
        let [subscribe, unsubscribe] = ["SUBSCRIBE", "UNSUBSCRIBE"].map(|verb| {
            let mut call = redis::cmd(verb);
            call.arg("leasehold:push:probe");
            call
        });
        let answers = if link.can_push() {
            let first = self.connector.send(link, &subscribe, self.deadline(None)).await?;
            let second = self.connector.send(link, &unsubscribe, self.deadline(None)).await?;
            [("SUBSCRIBE on the channels leasehold:*", first), ("UNSUBSCRIBE", second)]
        } else {
            let meaning = "nobody waits in line: who waits asks again, as often as its retry policy says";
            let found = "the server does not speak RESP3".to_owned();
            return Ok(vec![Finding::new("waiting", Severity::Note, found, meaning)]);
        };
        let refused = answers.into_iter().filter_map(|(right, answer)| match answer {
            Value::ServerError(_) => Some(Finding::new(
                "rights",
                Severity::Failure,
                format!("the right is lacking: {right}"),
                "nobody waits in line without it: who waits asks again, as often as its retry policy says",
            )),
            _ => None,
        });
        Ok(refused.collect())
    }

    /// Tries each right on keys that nobody uses, which end by themselves.
    pub(super) async fn rights(&self, link: &Arc<Link>, name: &Name, index: &[u8]) -> Result<Vec<Finding>> {
        let keys = self.keyspace.keys(name)?;
        let (lock, mut side) = (keys.lock(), Vec::new());
        super::wrote(keys.write_fence(&mut side))?;
        let trials = trials(&lock, &side, index);
        let mut calls = Pipeline::with_capacity(trials.len());
        for (_, call) in &trials {
            calls.add_command(call.clone());
        }
        let answers = self.connector.send_all(link, &calls, self.deadline(None)).await?;
        let mut findings = self.calls(link).await?;
        for ((right, _), answer) in trials.iter().zip(&answers) {
            let Value::ServerError(error) = answer else { continue };
            let refusal = Refusal::of(error);
            if refusal.is_lacking_right() {
                findings.push(Finding::new(
                    "rights",
                    Severity::Failure,
                    format!("the right is lacking: {right}"),
                    "a lock cannot be taken, kept or shown without it: grant what docs/redis.md lists with ACL SETUSER",
                ));
            } else if refusal.is_unknown_command() {
                findings.push(Finding::new(
                    "rights",
                    Severity::Failure,
                    format!("the server lacks the command: {right}"),
                    "a lock cannot be taken, kept or shown without it: is it renamed or switched off?",
                ));
            } else if !refusal.is_unknown_script() {
                findings.push(Finding::new(
                    "rights",
                    Severity::Warning,
                    format!("{right}: {refusal}"),
                    "whether the right is there could not be seen",
                ));
            }
        }
        if findings.is_empty() {
            let rights = trials.iter().map(|(right, _)| *right).collect::<Vec<_>>().join(", ");
            findings.push(Finding::new(
                "rights",
                Severity::Good,
                rights,
                "each was tried on keys that nobody uses",
            ));
        }
        Ok(findings)
    }
}

/// Commands that some servers have: to wait for replicas and for their disks, and to compare and delete.
const EXTRAS: [&str; 4] = ["WAIT", "WAITAOF", "DELIFEQ", "DELEX"];

/// Those of [`EXTRAS`] that the server knows, by its answer to COMMAND INFO.
fn known(answer: &Value) -> Vec<&'static str> {
    let Value::Array(answers) = answer else { return Vec::new() };
    let there = EXTRAS
        .into_iter()
        .zip(answers)
        .filter(|(_, answer)| matches!(answer, Value::Array(about) if !about.is_empty()));
    there.map(|(command, _)| command).collect()
}

/// What a lock's scripts do, each command by itself, leaving nothing behind.
fn trials(lock: &[u8], side: &[u8], index: &[u8]) -> Vec<(&'static str, Cmd)> {
    let call = |words: &[&[u8]]| {
        let mut call = Cmd::new();
        call.arg(words);
        call
    };
    let unknown = b"0000000000000000000000000000000000000000";
    vec![
        ("EVALSHA", call(&[b"EVALSHA", unknown, b"0"])),
        ("EVAL", call(&[b"EVAL", b"return 1", b"0"])),
        ("TIME", call(&[b"TIME"])),
        ("SET on the lock's key", call(&[b"SET", lock, b"probe", b"NX", b"PX", b"5000"])),
        ("SET on the keys leasehold:*", call(&[b"SET", side, b"0", b"NX", b"PX", b"5000"])),
        ("GET", call(&[b"GET", lock])),
        ("MGET", call(&[b"MGET", lock, side])),
        ("EXISTS", call(&[b"EXISTS", lock])),
        ("TYPE", call(&[b"TYPE", lock])),
        ("PTTL", call(&[b"PTTL", lock])),
        ("PEXPIRE", call(&[b"PEXPIRE", lock, b"5000"])),
        ("DEL", call(&[b"DEL", lock])),
        ("DEL on the keys leasehold:*", call(&[b"DEL", side])),
        ("ZADD", call(&[b"ZADD", index, b"0", b"probe"])),
        ("ZRANGEBYSCORE", call(&[b"ZRANGEBYSCORE", index, b"-inf", b"+inf", b"LIMIT", b"0", b"1"])),
        ("ZREM", call(&[b"ZREM", index, b"probe"])),
        ("SETRANGE", call(&[b"SETRANGE", side, b"0", b"0"])),
        ("DEL", call(&[b"DEL", side])),
        ("HSET", call(&[b"HSET", side, b"n", b"1"])),
        ("HGET", call(&[b"HGET", side, b"n"])),
        ("HKEYS", call(&[b"HKEYS", side])),
        ("DEL", call(&[b"DEL", side])),
        ("RPUSH", call(&[b"RPUSH", side, b"0", b"1"])),
        ("LPUSH", call(&[b"LPUSH", side, b"2", b"3"])),
        ("LLEN", call(&[b"LLEN", side])),
        ("LRANGE", call(&[b"LRANGE", side, b"0", b"-1"])),
        ("LREM", call(&[b"LREM", side, b"1", b"0"])),
        ("LPOP", call(&[b"LPOP", side])),
        ("RPOP", call(&[b"RPOP", side])),
        ("DEL", call(&[b"DEL", side])),
        ("PUBLISH on the channels leasehold:*", call(&[b"PUBLISH", b"leasehold:push:probe", b"0"])),
    ]
}

pub(super) fn server_time(answer: &Value) -> Option<Duration> {
    let Value::Array(parts) = answer else { return None };
    let mut parts = parts.iter().map(|part| reply::text(part)?.parse::<u64>().ok());
    Some(Duration::from_secs(parts.next()??) + Duration::from_micros(parts.next()??))
}

fn role(facts: &Facts) -> Finding {
    let check = |severity, found: String, meaning| Finding::new("role", severity, found, meaning);
    match (facts.info("role"), facts.replicas()) {
        (Some("master"), Some(0)) => check(
            Severity::Good,
            "master without replicas".into(),
            "no failover can lose a lock; while the server is down there are no locks",
        ),
        (Some("master"), Some(replicas)) => check(
            Severity::Note,
            format!("master with {replicas} replicas"),
            "replication is asynchronous: a failover can lose the last grants; let the resource check tokens",
        ),
        (Some(role), _) if role != "master" => check(
            Severity::Failure,
            format!("a replica ({role})"),
            "a replica takes no writes, so no locks: connect to the master",
        ),
        _ => check(
            Severity::Note,
            "the server would not tell (INFO)".into(),
            "grant INFO to see whether a failover can lose a lock",
        ),
    }
}

pub(super) fn persistence(facts: &Facts) -> Finding {
    let (severity, found, meaning) = match facts.persistence() {
        Persistence::Durable => (Severity::Good, "append-only file, fsync always", "locks survive a restart"),
        Persistence::Log => (
            Severity::Good,
            "append-only file, fsync every second",
            "a crash can lose the locks of the last second",
        ),
        Persistence::Snapshot => (
            Severity::Note,
            "snapshots, or an append-only file without its own fsync",
            "after a crash locks of the last minutes are gone while their holders still work; tokens go on growing",
        ),
        Persistence::None => (
            Severity::Note,
            "none",
            "a restart forgets every lock while its holder still works; tokens go on growing from the server's time",
        ),
        Persistence::Unknown => (
            Severity::Note,
            "the server would not tell",
            "grant INFO and CONFIG GET to see what survives a restart",
        ),
    };
    let mut found = found.to_owned();
    if let Some(refused) = &facts.settings_refused {
        found = format!("{found} (CONFIG GET: {refused})");
    }
    Finding::new("persistence", severity, found, meaning)
}

pub(super) fn eviction(facts: &Facts) -> Finding {
    let policy = facts.info("maxmemory_policy").or(facts.setting("maxmemory-policy")).unwrap_or("unknown");
    if facts.may_evict() {
        Finding::new(
            "eviction policy",
            Severity::Warning,
            policy,
            "when memory is full the server may delete a lock that is held: set maxmemory-policy noeviction, or use another server",
        )
    } else {
        Finding::new("eviction policy", Severity::Good, policy, "no held lock is deleted to make room")
    }
}

pub(super) fn memory(facts: &Facts) -> Finding {
    match (facts.number("used_memory"), facts.number("maxmemory")) {
        (Some(used), Some(0)) => Finding::new(
            "memory",
            Severity::Good,
            format!("{} KiB, no limit set", used / 1024),
            "there is room for locks",
        ),
        (Some(used), Some(most)) => {
            let percent = used.saturating_mul(100) / most;
            let found = format!("{} of {} KiB ({percent} %)", used / 1024, most / 1024);
            let (severity, meaning) = match percent {
                0..90 => (Severity::Good, "there is room for locks"),
                90..100 => (Severity::Warning, "once it is full no lock can be taken: raise maxmemory"),
                _ => (Severity::Failure, "no lock can be taken: raise maxmemory, or free some"),
            };
            Finding::new("memory", severity, found, meaning)
        }
        _ => Finding::new(
            "memory",
            Severity::Note,
            "the server would not tell",
            "grant INFO to see whether it is nearly full",
        ),
    }
}
