//! What an operator should know about sentinels and replicas.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use redis::{ProtocolVersion, Value};
use tokio::task::JoinSet;

use super::super::connection::{Connector, Link};
use super::super::diagnose::server_time;
use super::super::reply;
use super::{Host, fields, open, question, refused};
use crate::clock;
use crate::error::{Error, ErrorKind, Result};
use crate::types::{Finding, Severity};

/// How far two servers' clocks may be apart before it matters: what NTP holds with ease.
const CLOSE: Duration = Duration::from_millis(100);

/// A finding for each sentinel and each replica; `link` is to the master, if that was reached. Runs where connections live.
pub(in super::super) async fn look_over(connector: &Arc<Connector>, link: Option<Arc<Link>>) -> Vec<Finding> {
    if connector.sentinels().is_none() {
        return Vec::new();
    }
    let (this, here) = (connector.clone(), connector.runtime().clone());
    let looking = here.spawn(async move {
        let (mut findings, replicas) = sentinels(&this).await;
        if let Some(link) = link {
            findings.push(least_replicas(&this, &link).await);
            findings.extend(clocks(&this, &link, replicas).await);
        }
        findings
    });
    looking.await.unwrap_or_default()
}

/// What each sentinel says, and the replicas that one of them knows.
async fn sentinels(connector: &Arc<Connector>) -> (Vec<Finding>, Vec<HashMap<String, String>>) {
    let hosts = connector.sentinels().map_or(&[][..], |sentinels| &sentinels.hosts);
    let mut asked = JoinSet::new();
    for number in 0..hosts.len() {
        let connector = connector.clone();
        asked.spawn(async move { (number, ask(&connector, number).await) });
    }
    let mut answers = asked.join_all().await;
    answers.sort_by_key(|(number, _)| *number);
    let (mut findings, mut replicas) = (Vec::new(), Vec::new());
    for (number, answer) in answers {
        let check = format!("sentinel {}", hosts[number]);
        match answer {
            Ok(told) => {
                findings.push(judged(check, &told));
                if replicas.is_empty() {
                    replicas = told.replicas;
                }
            }
            Err(error) => findings.push(Finding::new(
                check,
                Severity::Warning,
                error.to_string(),
                "the others are asked instead; with too few of them no failover can happen",
            )),
        }
    }
    (findings, replicas)
}

struct Told {
    master: HashMap<String, String>,
    replicas: Vec<HashMap<String, String>>,
    /// Why no failover could be had now.
    obstacle: Option<Error>,
}

async fn ask(connector: &Connector, number: usize) -> Result<Told> {
    let name = connector.sentinels().map_or("", |sentinels| sentinels.master.as_str());
    let deadline = clock::now().plus(connector.timeout());
    let opened = open(connector, number, ProtocolVersion::RESP2, None, deadline).await?;
    let mut connection = opened.map_err(|error| refused(&error))?;
    let master = fields(&question(&mut connection, &["MASTER", name], deadline).await?);
    let replicas = match question(&mut connection, &["REPLICAS", name], deadline).await {
        Ok(Value::Array(replicas)) => replicas.iter().map(fields).collect(),
        _ => Vec::new(),
    };
    let obstacle = question(&mut connection, &["CKQUORUM", name], deadline).await.err();
    Ok(Told { master, replicas, obstacle })
}

fn judged(check: String, told: &Told) -> Finding {
    let of = |key: &str| told.master.get(key).map_or("?", String::as_str);
    let found = format!(
        "names {}:{} ({}); {} replicas, {} other sentinels, quorum {}, down after {} ms",
        of("ip"),
        of("port"),
        of("flags"),
        of("num-slaves"),
        of("num-other-sentinels"),
        of("quorum"),
        of("down-after-milliseconds"),
    );
    match &told.obstacle {
        Some(obstacle) => Finding::new(
            check,
            Severity::Warning,
            format!("{found}; {obstacle}"),
            "no failover can happen now: should the master die, there are no locks until somebody mends it",
        ),
        None if of("num-slaves") == "0" => Finding::new(
            check,
            Severity::Warning,
            found,
            "there is no replica to fail over to: should the master die, there are no locks until it is back",
        ),
        None => Finding::new(check, Severity::Good, found, "enough sentinels agree to fail over"),
    }
}

async fn least_replicas(connector: &Connector, link: &Arc<Link>) -> Finding {
    let deadline = clock::now().plus(connector.timeout());
    let mut get = redis::cmd("CONFIG");
    get.arg("GET").arg("min-replicas-to-write");
    let setting = match connector.send(link, &get, deadline).await {
        Ok(Value::Map(pairs)) => pairs.first().and_then(|(_, value)| reply::text(value)),
        Ok(Value::Array(parts)) => parts.get(1).and_then(reply::text),
        _ => None,
    };
    let check = "min-replicas-to-write";
    match setting.as_deref() {
        None => {
            Finding::new(check, Severity::Note, "the server would not tell", "grant CONFIG GET to see it")
        }
        Some("0") => Finding::new(
            check,
            Severity::Warning,
            "0",
            "a master that is cut off from its replicas goes on granting locks that its successor does not know: set it to 1, and min-replicas-max-lag to a few seconds",
        ),
        Some(count) => Finding::new(
            check,
            Severity::Good,
            count,
            "a master that is cut off from its replicas soon grants nothing more",
        ),
    }
}

/// How far each replica's clock is from the master's.
async fn clocks(
    connector: &Arc<Connector>,
    link: &Arc<Link>,
    replicas: Vec<HashMap<String, String>>,
) -> Vec<Finding> {
    let Ok(master) = ahead_by(connector, link).await else { return Vec::new() };
    let mut asked = JoinSet::new();
    for replica in replicas {
        let connector = connector.clone();
        let name = replica.get("ip").cloned().unwrap_or_default();
        let port = replica.get("port").and_then(|port| port.parse().ok()).unwrap_or_default();
        asked.spawn(async move {
            let host = Host { name, port };
            let ahead = replica_ahead_by(&connector, &host).await;
            clock_finding(&host, ahead.map(|ahead| ahead - master))
        });
    }
    let mut findings = asked.join_all().await;
    findings.sort_by(|one, other| one.check.cmp(&other.check));
    findings
}

async fn replica_ahead_by(connector: &Connector, host: &Host) -> Result<i128> {
    let late = || Error::new(ErrorKind::Unavailable, "no answer came in time");
    let Some(sentinels) = connector.sentinels() else { return Err(late()) };
    let address = sentinels.address_of(host);
    let deadline = clock::now().plus(connector.timeout());
    let link = clock::timeout_at(deadline, connector.dial_to(&address)).await.ok_or_else(late)??;
    ahead_by(connector, &link).await
}

/// By how many microseconds a server's clock is ahead of this machine's.
async fn ahead_by(connector: &Connector, link: &Arc<Link>) -> Result<i128> {
    let deadline = clock::now().plus(connector.timeout());
    let before = clock::wall();
    let answer = connector.send(link, &redis::cmd("TIME"), deadline).await?;
    let here = before + clock::wall().saturating_sub(before) / 2;
    let there = server_time(&answer).ok_or_else(|| reply::unexpected(&answer))?;
    let micros = |time: Duration| i128::try_from(time.as_micros()).unwrap_or(i128::MAX);
    Ok(micros(there) - micros(here))
}

fn clock_finding(host: &Host, ahead: Result<i128>) -> Finding {
    let check = format!("clock of replica {host}");
    let ahead = match ahead {
        Ok(ahead) => ahead,
        Err(error) => {
            let meaning = "should it be promoted, locks may go on, or not; it was not seen";
            return Finding::new(check, Severity::Warning, error.to_string(), meaning);
        }
    };
    let millis = ahead.unsigned_abs() / 1000;
    let found = format!("{millis} ms {} the master's", if ahead < 0 { "behind" } else { "ahead of" });
    let close = CLOSE.as_millis();
    match (millis <= close, ahead < 0) {
        (true, _) => Finding::new(
            check,
            Severity::Good,
            found,
            "leases and tokens go on as they were if it is promoted",
        ),
        (false, true) => Finding::new(
            check,
            Severity::Warning,
            found,
            "if it is promoted, leases last longer by that, and tokens that it had not heard of can be given again: let NTP mend it",
        ),
        (false, false) => Finding::new(
            check,
            Severity::Warning,
            found,
            "if it is promoted, leases end earlier by that, before their holders can know: let NTP mend it",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_that_is_off_is_told_with_its_direction() {
        let host = Host { name: "h".into(), port: 1 };
        let found = |ahead| clock_finding(&host, Ok(ahead));
        assert_eq!(found(-99_000).severity, Severity::Good);
        let (behind, ahead) = (found(-5_000_000), found(5_000_000));
        assert_eq!((behind.severity, ahead.severity), (Severity::Warning, Severity::Warning));
        assert!(behind.found.starts_with("5000 ms behind") && behind.meaning.contains("tokens"));
        assert!(ahead.found.starts_with("5000 ms ahead") && ahead.meaning.contains("end earlier"));
    }
}
