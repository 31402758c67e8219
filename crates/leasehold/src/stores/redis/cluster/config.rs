//! What the URL of a cluster says.

use std::sync::Arc;
use std::time::Duration;

use super::super::config::{Address, RedisConfig};
use super::map::Endpoint;
use crate::error::{Error, Result};

const FORM: &str = "redis+cluster://[user[:password]@]host[:port][,host[:port]...][?prefix=..&timeout=2s&ca=FILE&password_file=FILE]";

/// How to reach a Redis or Valkey cluster: a checked URL. Neither `Debug` nor an error shows its password.
#[derive(Clone, Debug)]
pub struct ClusterConfig {
    /// What holds for every node; the address is the first one given.
    node: RedisConfig,
    pub(super) seeds: Vec<Endpoint>,
}

impl ClusterConfig {
    /// Reads a URL, without any I/O: files that it names are read when the store connects.
    ///
    /// Schemes: `redis+cluster`, `valkey+cluster` (TCP), `rediss+cluster`, `valkeys+cluster` (TLS). One node is enough, for it
    /// tells of the others; more of them help while that one is down. The parameters are those of
    /// [`RedisConfig::from_url`], for all nodes alike; a cluster has database 0 only.
    ///
    /// # Errors
    /// `Invalid`, naming the part that is wrong.
    pub fn from_url(text: &str) -> Result<Self> {
        let bad = |what: &'static str| Error::invalid(what).advise(FORM);
        let (scheme, rest) = text.split_once("://").ok_or_else(|| bad("the host is missing"))?;
        let single = match scheme.to_ascii_lowercase().as_str() {
            "redis+cluster" | "valkey+cluster" => "redis",
            "rediss+cluster" | "valkeys+cluster" => "rediss",
            _ => return Err(bad("the scheme is none of a cluster's")),
        };
        let end = rest.find(['/', '?', '#']).unwrap_or(rest.len());
        let (authority, tail) = rest.split_at(end);
        let (login, hosts) = authority.rfind('@').map_or(("", authority), |at| authority.split_at(at + 1));
        let mut nodes = Vec::new();
        for host in hosts.split(',') {
            if host.is_empty() {
                return Err(bad("a host is missing"));
            }
            let node = RedisConfig::from_url(&format!("{single}://{login}{host}{tail}"))?;
            if node.database != 0 {
                return Err(bad("a cluster has database 0 only"));
            }
            nodes.push(node);
        }
        let seeds = nodes.iter().filter_map(|node| Endpoint::of(&node.address)).collect();
        let node = nodes.into_iter().next().ok_or_else(|| bad("the host is missing"))?;
        Ok(Self { node, seeds })
    }

    /// The same cluster, with all locks under this prefix.
    ///
    /// # Errors
    /// `Invalid` if it begins with `leasehold:` or has more than 512 bytes.
    pub fn with_prefix(mut self, prefix: impl AsRef<[u8]>) -> Result<Self> {
        self.node = self.node.with_prefix(prefix)?;
        Ok(self)
    }

    /// The same cluster, with this time for a command to be answered in. Default 2 s.
    ///
    /// # Errors
    /// `Invalid` if it is under a millisecond or over ten minutes.
    pub fn with_timeout(mut self, timeout: Duration) -> Result<Self> {
        self.node = self.node.with_timeout(timeout)?;
        Ok(self)
    }

    /// Where the cluster is, as a URL without user and password.
    pub fn location(&self) -> Arc<str> {
        let scheme = if self.is_tls() { "rediss+cluster" } else { "redis+cluster" };
        let seeds: Vec<_> = self.seeds.iter().map(ToString::to_string).collect();
        format!("{scheme}://{}", seeds.join(",")).into()
    }

    fn is_tls(&self) -> bool {
        matches!(self.node.address, Address::Tcp { tls: true, .. })
    }

    pub(super) fn timeout(&self) -> Duration {
        self.node.timeout
    }

    pub(super) fn prefix(&self) -> &[u8] {
        &self.node.prefix
    }

    /// How to reach one of its nodes.
    pub(super) fn node(&self, endpoint: &Endpoint) -> RedisConfig {
        let Endpoint { host, port } = endpoint.clone();
        RedisConfig { address: Address::Tcp { host, port, tls: self.is_tls() }, ..self.node.clone() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_url_of_a_cluster_gives_every_node_and_what_holds_for_all() {
        let url = "redis+cluster://al:p%2Cw@one:7000,two,[::1]:7002/?prefix=app:&timeout=250ms";
        let config = ClusterConfig::from_url(url).unwrap();
        assert_eq!(&*config.location(), "redis+cluster://one:7000,two:6379,[::1]:7002");
        let node = config.node(&config.seeds[2]);
        assert_eq!((&*node.location(), &*node.prefix), ("redis://[::1]:7002", &b"app:"[..]));
        assert_eq!((node.username.as_deref(), node.password.as_ref().unwrap().expose()), (Some("al"), "p,w"));
        assert_eq!(config.timeout(), Duration::from_millis(250));
        let tls = ClusterConfig::from_url("valkeys+cluster://h?ca=/x").unwrap();
        assert_eq!(&*tls.node(&tls.seeds[0]).location(), "rediss://h:6379");
        assert!(!format!("{config:?}").contains("p,w"));
    }

    #[test]
    fn a_bad_url_of_a_cluster_is_refused_without_its_password() {
        for (url, part) in [
            ("redis+cluster:h", "host"),
            ("redis+cluster://", "host"),
            ("redis+cluster://u:hunter2@h,,i", "host"),
            ("redis+cluster://u:hunter2@h,i:x", "port"),
            ("redis+cluster://u:hunter2@h/1", "database"),
            ("redis+cluster://u:hunter2@h?db=1", "db"),
            ("redis+cluster://u:123/hunter2@h", "database"),
            ("redis+ring://u:hunter2@h", "scheme"),
        ] {
            let text = format!("{:?}", ClusterConfig::from_url(url).expect_err(url));
            assert!(text.contains(part) && !text.contains("hunter2"), "{url}: {text}");
        }
    }
}
