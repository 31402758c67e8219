//! Sentinels, as a URL names them.

use std::fmt;
use std::path::PathBuf;

use url::Url;

use super::super::config::{Secret, bad, decoded, file, host_of, non_empty, shown};
use crate::error::Result;

/// Used for the sentinels where the URL names no user for them.
pub const SENTINEL_USERNAME_VARIABLE: &str = "LEASEHOLD_SENTINEL_USERNAME";
/// Used for the sentinels where the URL has no password for them.
pub const SENTINEL_PASSWORD_VARIABLE: &str = "LEASEHOLD_SENTINEL_PASSWORD";

/// What such a URL looks like.
pub(in super::super) const SENTINEL_FORM: &str = "redis+sentinel://[user[:password]@]host[:port][,host[:port]..]/master[/database][?sentinel_user=..&sentinel_password_file=FILE&prefix=..&timeout=2s&ca=FILE&password_file=FILE]";

const DEFAULT_PORT: u16 = 26379;

/// A host and a port.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(in super::super) struct Host {
    pub(in super::super) name: String,
    pub(in super::super) port: u16,
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.name.contains(':') {
            return write!(f, "[{}]:{}", self.name, self.port);
        }
        write!(f, "{}:{}", self.name, self.port)
    }
}

/// Who is asked where the master is, and for which.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in super::super) struct Sentinels {
    pub(in super::super) hosts: Vec<Host>,
    pub(in super::super) master: String,
    /// Of the sentinels and of the servers.
    pub(in super::super) tls: bool,
    pub(in super::super) username: Option<String>,
    pub(in super::super) password: Option<Secret>,
    pub(in super::super) password_file: Option<PathBuf>,
}

impl Sentinels {
    /// Takes a URL with sentinels apart: what it says of them, and the rest as the URL of one server. `None` if it has no
    /// sentinels. (The usual parser cannot take several hosts.)
    pub(in super::super) fn split(text: &str) -> Result<Option<(Self, String)>> {
        let Some((scheme, rest)) = text.split_once("://") else { return Ok(None) };
        let scheme = scheme.to_ascii_lowercase();
        let Some(plain) = scheme.strip_suffix("+sentinel") else { return Ok(None) };
        let tls = match plain {
            "redis" | "valkey" => false,
            "rediss" | "valkeys" => true,
            _ => return Err(bad(format!("unknown scheme {}", shown(&scheme)))),
        };
        let end = rest.find(['/', '?', '#']).unwrap_or(rest.len());
        let (authority, tail) = rest.split_at(end);
        let (login, hosts) =
            authority.rsplit_once('@').map_or(("", authority), |(login, hosts)| (login, hosts));
        let hosts = read_hosts(hosts)?;
        let end = tail.find(['?', '#']).unwrap_or(tail.len());
        let (path, parameters) = tail.split_at(end);
        let path = path.strip_prefix('/').unwrap_or(path);
        let (master, database) = path.split_once('/').unwrap_or((path, ""));
        let master = read_master(master)?;
        let at = if login.is_empty() { "" } else { "@" };
        let scheme = if tls { "rediss" } else { "redis" };
        let first = &hosts[0];
        let server = format!("{scheme}://{login}{at}{first}/{database}{parameters}");
        let sentinels = Self { hosts, master, tls, username: None, password: None, password_file: None };
        Ok(Some((sentinels, server)))
    }

    /// Takes a parameter of the URL, if it is about the sentinels.
    pub(in super::super) fn take_parameter(&mut self, key: &str, value: &str) -> Result<bool> {
        match key {
            "sentinel_user" => self.username = non_empty(decoded(value, key)?),
            "sentinel_password" => self.password = non_empty(decoded(value, key)?).map(Secret::new),
            "sentinel_password_file" => self.password_file = Some(file(value, "sentinel_password_file")?),
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// The sentinels and the master as a URL, without its database.
    pub(in super::super) fn location(&self) -> String {
        let scheme = if self.tls { "rediss+sentinel" } else { "redis+sentinel" };
        let hosts: Vec<_> = self.hosts.iter().map(Host::to_string).collect();
        format!("{scheme}://{}/{}", hosts.join(","), self.master)
    }
}

fn read_hosts(text: &str) -> Result<Vec<Host>> {
    if text.is_empty() {
        return Err(bad("the host of a sentinel is missing"));
    }
    let mut hosts = Vec::new();
    for part in text.split(',') {
        if part.is_empty() {
            return Err(bad("a sentinel's host is missing before or after a comma"));
        }
        let url = Url::parse(&format!("redis://{part}"))
            .map_err(|error| bad(format!("the host of a sentinel: {error}")))?;
        let (name, port) = host_of(&url, DEFAULT_PORT)?;
        let host = Host { name, port };
        if hosts.contains(&host) {
            return Err(bad(format!("the sentinel {host} stands twice")));
        }
        hosts.push(host);
    }
    Ok(hosts)
}

fn read_master(text: &str) -> Result<String> {
    let master = decoded(text, "master's name")?;
    if master.is_empty() {
        return Err(bad("the name of the master is missing, as the sentinels know it"));
    }
    // Not shown: an unescaped / in a password makes what follows look like a name.
    if master.chars().any(|c| !(c.is_ascii_alphanumeric() || "._-:".contains(c))) {
        return Err(bad("the master's name holds something else than letters, digits and . - _ :"));
    }
    Ok(master)
}

#[cfg(test)]
mod tests {
    use super::super::super::config::{Address, RedisConfig};
    use super::*;

    fn read(url: &str) -> (Sentinels, RedisConfig) {
        let config = RedisConfig::from_url(url).unwrap_or_else(|error| panic!("{url}: {error}"));
        let Address::Sentinel(sentinels) = config.address.clone() else { panic!("{url}") };
        (*sentinels, config)
    }

    #[test]
    fn a_url_names_several_sentinels_with_logins_of_their_own() {
        let (sentinels, config) = read(
            "redis+sentinel://al%40ice:p%2Fw@one,two:7000,[::1]:1/my-master/3?prefix=app%3A&timeout=250ms&sentinel_user=watch&sentinel_password=s%26x",
        );
        let hosts: Vec<_> = sentinels.hosts.iter().map(Host::to_string).collect();
        assert_eq!(hosts, ["one:26379", "two:7000", "[::1]:1"]);
        assert_eq!((sentinels.master.as_str(), sentinels.tls), ("my-master", false));
        assert_eq!(sentinels.username.as_deref(), Some("watch"));
        assert_eq!(sentinels.password.as_ref().unwrap().expose(), "s&x");
        assert_eq!(config.username.as_deref(), Some("al@ice"));
        assert_eq!(config.password.as_ref().unwrap().expose(), "p/w");
        assert_eq!((config.database, &*config.prefix), (3, &b"app:"[..]));
        assert_eq!(&*config.location(), "redis+sentinel://one:26379,two:7000,[::1]:1/my-master/3");
        let shown = format!("{config:?} {config:#?}");
        assert!(!shown.contains("s&x") && !shown.contains("p/w"), "{shown}");

        let (sentinels, config) = read("VALKEYS+sentinel://h/m?ca=/x&sentinel_password_file=/run/s");
        assert_eq!((sentinels.tls, sentinels.password_file), (true, Some("/run/s".into())));
        assert_eq!((&*config.location(), config.username), ("rediss+sentinel://h:26379/m", None));
    }

    #[test]
    fn a_bad_url_is_refused_naming_the_part_and_never_the_password() {
        for (url, part) in [
            ("redis+sentinel://u:hunter2@h", "name of the master"),
            ("redis+sentinel://u:hunter2@h/", "name of the master"),
            ("redis+sentinel://u:hunter2@h?prefix=x", "name of the master"),
            ("redis+sentinel://u:hunter2@/m", "host"),
            ("redis+sentinel:///m", "host"),
            ("redis+sentinel://u:hunter2@a,,b/m", "comma"),
            ("redis+sentinel://u:hunter2@a,b,/m", "comma"),
            ("redis+sentinel://a,b:26379,a:26379/m", "twice"),
            ("redis+sentinel://a:x/m", "port"),
            ("redis+sentinel://a:70000/m", "port"),
            ("redis+sentinel://u:1/hunter2@h/m", "master's name"),
            ("redis+sentinel://u:hunter2@h/m/x", "database"),
            ("redis+sentinel://u:hunter2@h/m/1/2", "database"),
            ("redis+sentinel://h/m?ca=/x", "ca"),
            ("redis+sentinel://h/m?db=1", "db"),
            (
                "redis+sentinel://h/m?sentinel_password=hunter2&sentinel_password_file=/x",
                "sentinel_password_file",
            ),
            ("redis+sentinel://h/m?sentinel_password=hunter2&sentinel_password=hunter2", "twice"),
            ("redis://h?sentinel_password=hunter2", "sentinel_password"),
            ("http+sentinel://h/m", "scheme"),
        ] {
            let error = RedisConfig::from_url(url).expect_err(url);
            let text = format!("{error} {error:?}");
            assert_eq!(error.kind(), crate::error::ErrorKind::Invalid, "{url}");
            assert!(text.contains(part), "{url}: {text}");
            assert!(!text.contains("hunter2"), "{text}");
        }
    }
}
