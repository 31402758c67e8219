//! What one server promises, by looking at it.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use redis::Value;

use super::connection::Connector;
use super::{LEAST_TTL, MOST_TTL, reply};
use crate::clock;
use crate::error::Result;
use crate::types::{Fencing, Guarantees, Persistence};

/// Settings that say how much a server can be trusted to keep.
const SETTINGS: [&str; 5] = ["maxmemory-policy", "maxmemory", "appendonly", "appendfsync", "save"];

/// What a server says about itself; what it would not say is absent.
#[derive(Debug, Default)]
pub(super) struct Facts {
    info: HashMap<String, String>,
    settings: HashMap<String, String>,
    /// How the server refused to tell its settings.
    pub(super) settings_refused: Option<String>,
}

impl Facts {
    /// Asks in one round trip.
    pub(super) async fn ask(connector: &Arc<Connector>) -> Result<Self> {
        let deadline = clock::now().plus(connector.timeout());
        let link = connector.link(deadline).await?;
        let mut questions = redis::Pipeline::new();
        questions.cmd("INFO");
        for setting in SETTINGS {
            questions.cmd("CONFIG").arg("GET").arg(setting);
        }
        let mut answers = connector.send_all(&link, &questions, deadline).await?.into_iter();
        let mut facts = Self::default();
        if let Some(text) = answers.next().as_ref().and_then(reply::text) {
            let lines = text.lines().filter_map(|line| line.split_once(':'));
            facts.info = lines.map(|(key, value)| (key.to_owned(), value.trim().to_owned())).collect();
        }
        for (setting, answer) in SETTINGS.into_iter().zip(answers) {
            match answer {
                Value::ServerError(error) => facts.settings_refused = Some(error.to_string()),
                Value::Map(pairs) => {
                    facts.settings.extend(
                        pairs
                            .first()
                            .and_then(|(_, value)| reply::text(value))
                            .map(|value| (setting.to_owned(), value)),
                    );
                }
                Value::Array(parts) => {
                    facts
                        .settings
                        .extend(parts.get(1).and_then(reply::text).map(|value| (setting.to_owned(), value)));
                }
                _ => {}
            }
        }
        Ok(facts)
    }

    pub(super) fn info(&self, key: &str) -> Option<&str> {
        self.info.get(key).map(String::as_str)
    }

    pub(super) fn number(&self, key: &str) -> Option<u64> {
        self.info(key)?.parse().ok()
    }

    pub(super) fn setting(&self, key: &str) -> Option<&str> {
        self.settings.get(key).map(String::as_str)
    }

    pub(super) fn server(&self) -> String {
        match (self.info("valkey_version"), self.info("redis_version")) {
            (Some(version), _) => format!("Valkey {version}"),
            (None, Some(version)) => format!("Redis {version}"),
            (None, None) => "Redis, version unknown".into(),
        }
    }

    pub(super) fn persistence(&self) -> Persistence {
        let log = self.info("aof_enabled").or(self.setting("appendonly"));
        match (log, self.setting("appendfsync"), self.setting("save")) {
            (Some("1" | "yes"), Some("always"), _) => Persistence::Durable,
            (Some("1" | "yes"), Some("everysec"), _) => Persistence::Log,
            // Left to the operating system, which may take half a minute; or unknown, when the worse is assumed.
            (Some("1" | "yes"), _, _) => Persistence::Snapshot,
            (Some(_), _, Some("")) => Persistence::None,
            (Some(_), _, Some(_)) => Persistence::Snapshot,
            _ => Persistence::Unknown,
        }
    }

    /// Whether keys with a TTL are evicted when memory is full. What is not known counts as yes.
    pub(super) fn may_evict(&self) -> bool {
        let limited = self.number("maxmemory").or_else(|| self.setting("maxmemory")?.parse().ok()) != Some(0);
        let policy = self.info("maxmemory_policy").or(self.setting("maxmemory-policy"));
        limited && policy != Some("noeviction")
    }

    pub(super) fn is_replica(&self) -> bool {
        self.info("role").is_some_and(|role| role != "master")
    }

    pub(super) fn replicas(&self) -> Option<u64> {
        self.number("connected_slaves")
    }
}

/// What the server promises.
pub(super) async fn guarantees(connector: &Arc<Connector>) -> Result<Guarantees> {
    let facts = Facts::ask(connector).await?;
    let mut guarantees = Guarantees::strict(facts.server());
    guarantees.fencing = Fencing::TimeFloor;
    guarantees.persistence = facts.persistence();
    // Redis frees a key at the first look after its time; a look at its own clock is a millisecond coarse.
    guarantees.slack = Duration::from_millis(50);
    guarantees.least_ttl = LEAST_TTL;
    guarantees.most_ttl = MOST_TTL;
    guarantees.may_evict = facts.may_evict();
    guarantees.lost_at_failover =
        connector.sentinels().is_some() || facts.is_replica() || facts.replicas() != Some(0);
    // Only a trial tells whether this user may be called on this server.
    let deadline = clock::now().plus(connector.timeout());
    guarantees.fifo = connector.subscribe(&connector.link(deadline).await?, deadline).await?;
    connector.unsubscribe().await;
    Ok(guarantees)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn facts(info: &[(&str, &str)], settings: &[(&str, &str)]) -> Facts {
        let owned = |pairs: &[(&str, &str)]| pairs.iter().map(|(k, v)| ((*k).into(), (*v).into())).collect();
        Facts { info: owned(info), settings: owned(settings), settings_refused: None }
    }

    #[test]
    fn what_is_not_known_is_not_promised() {
        let nothing = facts(&[], &[]);
        assert_eq!(nothing.persistence(), Persistence::Unknown);
        assert!(nothing.may_evict());
        let log = |fsync: &str| facts(&[("aof_enabled", "1")], &[("appendfsync", fsync)]).persistence();
        assert_eq!(
            [log("always"), log("everysec"), log("no")],
            [Persistence::Durable, Persistence::Log, Persistence::Snapshot]
        );
        let plain = |save: &str| facts(&[("aof_enabled", "0")], &[("save", save)]).persistence();
        assert_eq!([plain(""), plain("3600 1")], [Persistence::None, Persistence::Snapshot]);
        assert_eq!(facts(&[("aof_enabled", "0")], &[]).persistence(), Persistence::Unknown);
        let evicts =
            |limit: &str, policy: &str| facts(&[("maxmemory", limit), ("maxmemory_policy", policy)], &[]);
        assert!(!evicts("0", "allkeys-lru").may_evict());
        assert!(!evicts("1000", "noeviction").may_evict());
        assert!(evicts("1000", "volatile-ttl").may_evict());
    }
}
