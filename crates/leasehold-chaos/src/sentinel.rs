//! A master, its replicas and the sentinels that watch over them, as real processes.

use std::fs;
use std::time::{Duration, Instant};

use crate::servers::{Builder, RedisServer};
use crate::{eventually, within};

/// The name by which the sentinels of these tests know the master.
pub const MASTER: &str = "mymaster";

/// How long sentinels may take to put all in order: when the machine stood still for two seconds they mistrust their clock
/// and do nothing for half a minute ("tilt").
const SETTLES_WITHIN: Duration = Duration::from_secs(150);

/// How such a deployment is to be started.
#[derive(Clone, Debug)]
pub struct Layout {
    replicas: usize,
    sentinels: usize,
    down_after_ms: u32,
    args: Vec<String>,
    sentinel_password: Option<String>,
    own_clocks: bool,
    sentinel_user: Option<String>,
}

impl Default for Layout {
    /// Two replicas, three sentinels of which two must agree, and a second and a half of silence to call a master down. (Less
    /// makes sentinels mistrust each new master: they wait a second before they connect to it.)
    fn default() -> Self {
        Self {
            replicas: 2,
            sentinels: 3,
            down_after_ms: 1_500,
            args: Vec::new(),
            sentinel_password: None,
            own_clocks: false,
            sentinel_user: None,
        }
    }
}

impl Layout {
    /// Adds arguments for the master and its replicas, as on the command line of the server.
    #[must_use]
    pub fn args<A: Into<String>>(mut self, args: impl IntoIterator<Item = A>) -> Self {
        self.args.extend(args.into_iter().map(Into::into));
        self
    }

    /// Asks the clients of the sentinels for this password.
    #[must_use]
    pub fn sentinel_password(mut self, password: &str) -> Self {
        self.sentinel_password = Some(password.into());
        self
    }

    /// Adds a user of the sentinels by its rule, as in `ACL SETUSER`.
    #[must_use]
    pub fn sentinel_user(mut self, rule: &str) -> Self {
        self.sentinel_user = Some(rule.into());
        self
    }

    /// Gives each server a wall clock of its own, moved by [`RedisServer::set_clock_offset`]; needs `cc`.
    #[must_use]
    pub fn own_clocks(mut self) -> Self {
        self.own_clocks = true;
        self
    }

    /// Has so many sentinels watch.
    #[must_use]
    pub fn sentinels(mut self, count: usize) -> Self {
        self.sentinels = count;
        self
    }

    /// Starts one sentinel alone, that takes the server on this port of the loopback for the master.
    ///
    /// # Panics
    /// If it does not come up.
    #[track_caller]
    #[must_use]
    pub fn watching(&self, master: u16) -> RedisServer {
        self.start_sentinel(master)
    }

    fn server(&self) -> Builder {
        // Replicas that come back or change their master shall not wait for each other.
        let server = RedisServer::builder().args(["--repl-ping-replica-period", "1"]).args(self.args.clone());
        if self.own_clocks { server.own_clock() } else { server }
    }

    /// Starts it, and returns when every sentinel knows every server and every other sentinel.
    ///
    /// # Panics
    /// If a program is missing or does not come up.
    #[track_caller]
    #[must_use]
    pub fn start(self) -> Deployment {
        let master = self.server().start();
        let mut servers: Vec<_> =
            (0..self.replicas).map(|_| self.server().replica_of(master.port()).start()).collect();
        servers.insert(0, master);
        let sentinels: Vec<_> = (0..self.sentinels).map(|_| self.start_sentinel(servers[0].port())).collect();
        let deployment = Deployment { servers, sentinels };
        deployment.settle();
        deployment
    }

    fn start_sentinel(&self, master: u16) -> RedisServer {
        let mut conf = format!(
            "sentinel monitor {MASTER} 127.0.0.1 {master} {}\n\
             sentinel down-after-milliseconds {MASTER} {}\n\
             sentinel failover-timeout {MASTER} 3000\n\
             sentinel parallel-syncs {MASTER} 5\n",
            self.sentinels / 2 + 1,
            self.down_after_ms
        );
        if let Some(password) = &self.sentinel_password {
            conf.push_str("requirepass ");
            conf.push_str(password);
            conf.push('\n');
        }
        if let Some(rule) = &self.sentinel_user {
            conf.push_str("user ");
            conf.push_str(rule);
            conf.push('\n');
        }
        let mut builder = RedisServer::builder().sentinel(conf);
        if let Some(password) = &self.sentinel_password {
            builder = builder.password_is(password);
        }
        builder.start()
    }
}

/// A master with replicas, and its sentinels.
#[derive(Debug)]
pub struct Deployment {
    /// All that hold data; any of them may be the master. Killed with this.
    pub servers: Vec<RedisServer>,
    /// All that watch.
    pub sentinels: Vec<RedisServer>,
}

impl Deployment {
    /// Starts one as [`Layout::default`] says.
    #[track_caller]
    #[must_use]
    pub fn start() -> Self {
        Layout::default().start()
    }

    /// The URL of the master by way of all sentinels.
    pub fn url(&self) -> String {
        let ports: Vec<_> = self.sentinels.iter().map(RedisServer::port).collect();
        url_by(&ports)
    }

    /// Which of the servers a sentinel calls the master.
    ///
    /// # Panics
    /// If the sentinel does not answer, or names a stranger.
    #[track_caller]
    pub fn master_by(&self, sentinel: usize) -> usize {
        let answer = self.sentinels[sentinel].cli(&["SENTINEL", "GET-MASTER-ADDR-BY-NAME", MASTER]);
        let port = answer.lines().nth(1).unwrap_or_default().to_owned();
        let known = self.servers.iter().position(|server| server.port().to_string() == port);
        known.unwrap_or_else(|| panic!("sentinel {sentinel} names {answer}"))
    }

    /// Which of the servers is the master, by the first sentinel.
    #[track_caller]
    pub fn master(&self) -> usize {
        self.master_by(0)
    }

    /// Waits until every sentinel knows of all others and of all replicas, which are linked to the master.
    ///
    /// # Panics
    /// If that does not come about.
    #[track_caller]
    pub fn settle(&self) {
        for (number, sentinel) in self.sentinels.iter().enumerate() {
            within(SETTLES_WITHIN, "every sentinel knows the others, the master and its replicas", || {
                let facts = fields(&sentinel.cli(&["SENTINEL", "MASTER", MASTER]));
                let has =
                    |key: &str, value: usize| facts.iter().any(|(k, v)| k == key && *v == value.to_string());
                facts.iter().any(|(key, value)| key == "flags" && value == "master")
                    && has("num-other-sentinels", self.sentinels.len() - 1)
                    && has("num-slaves", self.servers.len() - 1)
                    && self.master_by(number) == self.master()
            });
        }
        let count = format!("connected_slaves:{}", self.servers.len() - 1);
        within(SETTLES_WITHIN, "the master has its replicas", || {
            let info = self.servers[self.master()].ask(&["INFO", "replication"]);
            info.contains("role:master")
                && info.contains(&count)
                && info.matches("state=online").count() == self.servers.len() - 1
        });
    }

    /// Waits until a sentinel names another master than `old`, which then is one; returns which, and when that was seen. (The
    /// server itself was made a master up to a second before: sentinels look at it once a second.)
    ///
    /// # Panics
    /// If that does not come about.
    #[track_caller]
    pub fn promoted(&self, old: usize) -> (usize, Instant) {
        let mut new = None;
        let running: Vec<_> =
            (0..self.sentinels.len()).filter(|number| self.sentinels[*number].is_running()).collect();
        eventually("a sentinel names another master", || {
            new = running.iter().map(|number| self.master_by(*number)).find(|master| *master != old);
            new.is_some()
        });
        (new.expect("one was found"), Instant::now())
    }

    /// Has the sentinels make another server the master, with both running; returns which.
    ///
    /// # Panics
    /// If they refuse, or it does not come about.
    #[track_caller]
    pub fn fail_over(&self) -> usize {
        let old = self.master();
        eventually("the sentinels begin a failover", || {
            self.sentinels[0].cli(&["SENTINEL", "FAILOVER", MASTER]) == "OK"
        });
        self.promoted(old).0
    }

    /// Whether a server calls itself a replica just now.
    pub fn is_replica(&self, number: usize) -> bool {
        self.servers[number].ask(&["ROLE"]).starts_with("slave")
    }

    /// Starts a killed server again, on its port, as an operator would: with the settings it had at first.
    #[track_caller]
    pub fn revive(&mut self, number: usize) {
        self.servers[number].restart();
    }
}

impl Drop for Deployment {
    fn drop(&mut self) {
        // Without their own words nobody can tell what went wrong in a test.
        if std::thread::panicking() {
            for (number, server) in self.servers.iter().enumerate() {
                println!("server {number}, port {}:\n{}", server.port(), server.printed());
            }
            for (number, sentinel) in self.sentinels.iter().enumerate() {
                println!("sentinel {number}:\n{}", sentinel.printed());
            }
        }
    }
}

/// The URL of the master by way of sentinels on these ports of the loopback.
pub fn url_by(ports: &[u16]) -> String {
    let hosts: Vec<_> = ports.iter().map(|port| format!("127.0.0.1:{port}")).collect();
    format!("redis+sentinel://{}/{MASTER}", hosts.join(","))
}

/// The pairs of an answer that lists names and values in turn.
fn fields(text: &str) -> Vec<(String, String)> {
    let lines: Vec<_> = text.lines().collect();
    lines.chunks(2).filter(|pair| pair.len() == 2).map(|pair| (pair[0].into(), pair[1].into())).collect()
}

/// Writes what a sentinel is configured by into its folder, where it also keeps what it learns.
pub(crate) fn write_conf(folder: &std::path::Path, conf: &str) -> std::path::PathBuf {
    let path = folder.join("sentinel.conf");
    if !path.exists() {
        fs::write(&path, conf).expect("a file in a folder of ours");
    }
    path
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_killed_master_is_replaced_and_comes_back_as_a_replica() {
        let mut deployment = Deployment::start();
        let old = deployment.master();
        deployment.servers[old].kill9();
        let (new, _) = deployment.promoted(old);
        assert!(deployment.servers[new].cli(&["ROLE"]).starts_with("master"));
        deployment.revive(old);
        eventually("the old master is a replica", || deployment.is_replica(old));
        eventually("the first sentinel has heard of it", || deployment.master() == new);
    }
}
