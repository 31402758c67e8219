//! A real Redis Cluster: masters and replicas on free ports of the loopback, gone with the test that started them.

use crate::eventually;
use crate::proxy::Proxy;
use crate::resp::Reply;
use crate::servers::{RedisServer, free_port};

/// Hash slots of a cluster.
pub const SLOTS: u16 = 16384;
const MASTERS: u16 = 3;

/// Three masters that share the slots evenly, then their replicas, in the same order.
#[derive(Debug)]
pub struct Cluster {
    /// The servers: masters as started first.
    pub nodes: Vec<RedisServer>,
    /// What clients are told to dial, where the cluster is behind links: one for each node.
    pub links: Vec<Proxy>,
    ids: Vec<String>,
    replicas: bool,
    /// Who has the certificates, where there are some.
    authority: Option<RedisServer>,
}

impl Cluster {
    /// Three masters with a replica each. A dead master is replaced after about a second.
    ///
    /// # Panics
    /// If a server is missing, with the line that gets it, or the cluster does not come up.
    #[must_use]
    #[track_caller]
    pub fn start() -> Self {
        Self::build(true, false, &[], None, false)
    }

    /// Three masters without replicas, each started with these arguments too.
    ///
    /// # Panics
    /// As [`start`](Self::start).
    #[must_use]
    #[track_caller]
    pub fn without_replicas(arguments: &[&str]) -> Self {
        Self::build(false, false, arguments, None, false)
    }

    /// Three masters without replicas, whose clients all come by [`links`](Self::links).
    ///
    /// # Panics
    /// As [`start`](Self::start).
    #[must_use]
    #[track_caller]
    pub fn behind_links() -> Self {
        Self::build(false, true, &[], None, false)
    }

    /// Three masters without replicas that speak TLS to clients, by [`tls_url`](Self::tls_url), and among themselves.
    ///
    /// # Panics
    /// As [`start`](Self::start).
    #[must_use]
    #[track_caller]
    pub fn with_tls() -> Self {
        // One that only makes the certificates, which all share.
        let authority = RedisServer::builder().tls().start();
        let file = |name: &str| authority.folder().join(name).to_string_lossy().into_owned();
        let (certificate, key, ca) = (file("server.crt"), file("server.key"), file("ca.crt"));
        let shared = ["--tls-cert-file", &certificate, "--tls-key-file", &key, "--tls-ca-cert-file", &ca];
        let arguments = [&["--tls-cluster", "yes"], &shared[..]].concat();
        let mut cluster = Self::build(false, false, &arguments, None, true);
        cluster.authority = Some(authority);
        cluster
    }

    /// The URL for TLS, with the authority's certificate.
    pub fn tls_url(&self) -> String {
        let hosts: Vec<_> = self.nodes.iter().map(|node| format!("127.0.0.1:{}", node.tls_port())).collect();
        let ca = self.authority.as_ref().map(RedisServer::ca_certificate).unwrap_or_default();
        format!("rediss+cluster://{}?ca={}", hosts.join(","), ca.display())
    }

    /// Three masters without replicas that ask the default user for this password.
    ///
    /// # Panics
    /// As [`start`](Self::start).
    #[must_use]
    #[track_caller]
    pub fn with_password(password: &str) -> Self {
        Self::build(false, false, &[], Some(password), false)
    }

    #[track_caller]
    fn build(replicas: bool, linked: bool, arguments: &[&str], password: Option<&str>, tls: bool) -> Self {
        let count = if replicas { 2 * MASTERS } else { MASTERS };
        let nodes: Vec<_> = (0..count)
            .map(|_| {
                // Patience with a busy machine, and a failover within a second or two.
                let bus = free_port().to_string();
                let own =
                    ["--cluster-enabled", "yes", "--cluster-node-timeout", "1000", "--cluster-port", &bus];
                let more = ["--cluster-replica-validity-factor", "0", "--repl-ping-replica-period", "1"];
                let builder = RedisServer::builder().args(own).args(more);
                let builder = builder.args(arguments.iter().copied());
                let builder = match password {
                    Some(password) => builder.requirepass(password),
                    None => builder,
                };
                ((if tls { builder.tls() } else { builder }).start(), bus)
            })
            .collect();
        let links: Vec<_> =
            nodes.iter().filter(|_| linked).map(|(node, _)| Proxy::start(node.port())).collect();
        for ((node, _), link) in nodes.iter().zip(&links) {
            ok(node, &["CONFIG", "SET", "cluster-announce-port", &link.port().to_string()]);
        }
        for (number, (node, _)) in (0_u16..).zip(&nodes) {
            ok(node, &["CLUSTER", "SET-CONFIG-EPOCH", &(number + 1).to_string()]);
            if number < MASTERS {
                let (first, last) = share(number);
                ok(node, &["CLUSTER", "ADDSLOTSRANGE", &first.to_string(), &last.to_string()]);
            }
        }
        let (nodes, buses): (Vec<_>, Vec<_>) = nodes.into_iter().unzip();
        let ids = nodes.iter().map(|node| node.cli(&["CLUSTER", "MYID"])).collect();
        let cluster = Self { nodes, links, ids, replicas, authority: None };
        cluster.settle(&buses);
        cluster
    }

    /// Gives each master its replica, and waits until all agree that all is well.
    fn settle(&self, buses: &[String]) {
        let all = format!("cluster_known_nodes:{}", self.nodes.len());
        let mut looks = 0_u32;
        eventually("the nodes know each other", || {
            // A handshake that takes longer than a second, on a busy machine, is given up: it is begun anew.
            if looks.is_multiple_of(200) {
                for (node, bus) in self.nodes.iter().zip(buses).skip(1) {
                    ok(&self.nodes[0], &["CLUSTER", "MEET", "127.0.0.1", &node.port().to_string(), bus]);
                }
            }
            looks += 1;
            self.nodes.iter().all(|node| {
                // One in handshake has no slots and no master yet.
                node.cli(&["CLUSTER", "INFO"]).contains(&all)
                    && !node.cli(&["CLUSTER", "NODES"]).contains("handshake")
            })
        });
        if self.replicas {
            let masters = usize::from(MASTERS);
            for (replica, master) in self.nodes[masters..].iter().zip(&self.ids) {
                eventually("a replica takes its master", || {
                    replica.cli(&["CLUSTER", "REPLICATE", master]) == "OK"
                });
            }
            eventually("the replicas are in step", || {
                let is_up =
                    |node: &RedisServer| node.cli(&["INFO", "replication"]).contains("master_link_status:up");
                self.nodes[masters..].iter().all(is_up)
            });
        }
        self.wait_until_ok();
        let shares = usize::from(MASTERS);
        eventually("everybody knows who has which slots", || {
            let lists = |node: &RedisServer| node.cli(&["CLUSTER", "NODES"]);
            let known = |list: &str| {
                list.lines()
                    .filter(|line| {
                        line.contains("master") && line.contains('-') && line.split(' ').count() > 8
                    })
                    .count()
                    == shares
                    && (!self.replicas
                        || list.lines().filter(|line| line.contains("slave")).count() == shares)
            };
            self.nodes.iter().all(|node| known(&lists(node)))
        });
    }

    /// Waits until every node that runs says that the cluster is whole.
    pub fn wait_until_ok(&self) {
        eventually("the cluster is whole", || {
            let is_ok = |node: &RedisServer| node.cli(&["CLUSTER", "INFO"]).contains("cluster_state:ok");
            self.nodes.iter().filter(|node| node.is_running()).all(is_ok)
        });
    }

    /// Its URL: the masters as started, without any password.
    pub fn url(&self) -> String {
        let ports = self.nodes[..usize::from(MASTERS)]
            .iter()
            .enumerate()
            .map(|(number, node)| self.links.get(number).map_or(node.port(), Proxy::port));
        let hosts: Vec<_> = ports.map(|port| format!("127.0.0.1:{port}")).collect();
        format!("redis+cluster://{}", hosts.join(","))
    }

    /// The slot of a key, as a node says.
    pub fn slot(&self, key: &[u8]) -> u16 {
        let running = self.nodes.iter().find(|node| node.is_running()).expect("a node runs");
        match running.command(&[b"CLUSTER", b"KEYSLOT".as_slice(), key]) {
            Reply::Int(slot) => u16::try_from(slot).expect("a slot"),
            other => panic!("CLUSTER KEYSLOT: {other:?}"),
        }
    }

    /// The master, by its number, that was started with the slot of a key.
    pub fn home(&self, key: &str) -> usize {
        let slot = self.slot(key.as_bytes());
        usize::from((0..MASTERS).find(|number| slot <= share(*number).1).expect("each slot has a home"))
    }

    /// A name that begins with `beginning` and was given to that master.
    pub fn name_at(&self, master: usize, beginning: &str) -> String {
        (0..10_000)
            .map(|number| format!("{beginning}{number}"))
            .find(|name| self.home(name) == master)
            .expect("one of three, unless a tag in braces decides")
    }

    /// Begins to move a slot: what is there stays for now, what is not is asked for at the new place.
    pub fn begin_move(&self, slot: u16, from: usize, to: usize) {
        let slot = slot.to_string();
        ok(&self.nodes[to], &["CLUSTER", "SETSLOT", &slot, "IMPORTING", &self.ids[from]]);
        ok(&self.nodes[from], &["CLUSTER", "SETSLOT", &slot, "MIGRATING", &self.ids[to]]);
    }

    /// Moves the keys of a slot that `which` picks; answers how many were moved.
    pub fn move_keys(&self, slot: u16, from: usize, to: usize, which: impl Fn(&str) -> bool) -> usize {
        let found = self.nodes[from].command(&["CLUSTER", "GETKEYSINSLOT", &slot.to_string(), "10000"]);
        let Reply::Array(Some(keys)) = found else { panic!("CLUSTER GETKEYSINSLOT: {found:?}") };
        let keys: Vec<_> = keys.iter().map(ToString::to_string).filter(|key| which(key)).collect();
        let port = self.nodes[to].port().to_string();
        for key in &keys {
            ok(&self.nodes[from], &["MIGRATE", "127.0.0.1", &port, key, "0", "5000"]);
        }
        keys.len()
    }

    /// Ends the move of a slot: everybody is told.
    pub fn end_move(&self, slot: u16, to: usize) {
        let slot = slot.to_string();
        ok(&self.nodes[to], &["CLUSTER", "SETSLOT", &slot, "NODE", &self.ids[to]]);
        for node in self.nodes[..usize::from(MASTERS)].iter().filter(|node| node.is_running()) {
            ok(node, &["CLUSTER", "SETSLOT", &slot, "NODE", &self.ids[to]]);
        }
    }

    /// Gives a slot with all its keys to another master.
    pub fn give(&self, slot: u16, from: usize, to: usize) {
        self.begin_move(slot, from, to);
        self.move_keys(slot, from, to, |_| true);
        self.end_move(slot, to);
    }

    /// How often the nodes that run answered with an error of this code.
    pub fn errors(&self, code: &str) -> u64 {
        let key = format!("errorstat_{code}:count=");
        let of = |node: &RedisServer| {
            let stats = node.cli(&["INFO", "errorstats"]);
            let count = stats.lines().find_map(|line| line.trim().strip_prefix(&key)?.parse().ok());
            count.unwrap_or(0)
        };
        self.nodes.iter().filter(|node| node.is_running()).map(of).sum()
    }
}

/// The first and the last slot of a master.
fn share(number: u16) -> (u16, u16) {
    let each = SLOTS / MASTERS;
    let last = if number + 1 == MASTERS { SLOTS - 1 } else { (number + 1) * each - 1 };
    (number * each, last)
}

#[track_caller]
fn ok(node: &RedisServer, command: &[&str]) {
    let reply = node.cli(command);
    assert_eq!(reply, "OK", "{command:?}");
}
