//! Which node has which slot, as the nodes say, and what an answer says about a node that has it no more.

use std::collections::BTreeMap;
use std::fmt;

use redis::Value;

use super::super::config::Address;
use super::super::keys::SLOTS;
use super::super::reply::{self, Refusal};
use crate::error::{Error, ErrorKind};

/// Where a node listens.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Endpoint {
    pub(super) host: String,
    pub(super) port: u16,
}

impl Endpoint {
    pub(super) fn of(address: &Address) -> Option<Self> {
        match address {
            Address::Tcp { host, port, .. } => Some(Self { host: host.clone(), port: *port }),
            Address::Unix(_) | Address::Sentinel(_) => None,
        }
    }

    /// As a node says it: a node that does not know its own host leaves it out.
    fn told(text: &str, asked: &Self) -> Option<Self> {
        let (host, port) = text.rsplit_once(':')?;
        let host = host.trim_start_matches('[').trim_end_matches(']');
        Some(Self { host: Self::host(Some(host), asked), port: port.parse().ok()? })
    }

    fn host(told: Option<&str>, asked: &Self) -> String {
        told.filter(|host| !host.is_empty() && *host != "?").unwrap_or(&asked.host).to_owned()
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host.contains(':') {
            write!(f, "[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{}:{}", self.host, self.port)
        }
    }
}

/// A slot that nobody has.
const NOBODY: u16 = u16::MAX;

/// Which node has which slot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct SlotMap {
    /// For each slot the number of its master.
    owners: Box<[u16]>,
    masters: Vec<Endpoint>,
    replicas: Vec<Endpoint>,
}

impl Default for SlotMap {
    fn default() -> Self {
        let owners = vec![NOBODY; usize::from(SLOTS)].into();
        Self { owners, masters: Vec::new(), replicas: Vec::new() }
    }
}

impl SlotMap {
    /// Reads the answer to `CLUSTER SLOTS` of the node at `asked`.
    pub(super) fn read(answer: &Value, asked: &Endpoint) -> Option<Self> {
        let Value::Array(ranges) = answer else { return None };
        let mut map = Self::default();
        for range in ranges {
            let Value::Array(parts) = range else { return None };
            let [Value::Int(first), Value::Int(last), nodes @ ..] = parts.as_slice() else { return None };
            let (first, last) = (usize::try_from(*first).ok()?, usize::try_from(*last).ok()?);
            let mut nodes = nodes.iter().map(|node| read_node(node, asked));
            let owner = map.number(nodes.next()??)?;
            map.owners.get_mut(first..=last)?.fill(owner);
            map.replicas.extend(nodes.flatten());
        }
        map.replicas.sort_unstable();
        map.replicas.dedup();
        Some(map)
    }

    fn number(&mut self, endpoint: Endpoint) -> Option<u16> {
        let known = self.masters.iter().position(|master| *master == endpoint);
        let number = known.unwrap_or_else(|| {
            self.masters.push(endpoint);
            self.masters.len() - 1
        });
        u16::try_from(number).ok().filter(|number| *number != NOBODY)
    }

    /// The master of a slot.
    pub(super) fn owner(&self, slot: u16) -> Option<&Endpoint> {
        self.masters.get(usize::from(*self.owners.get(usize::from(slot))?))
    }

    /// Takes in where a slot is, as an answer said.
    pub(super) fn assign(&mut self, slot: u16, endpoint: Endpoint) {
        if let Some(number) = self.number(endpoint)
            && let Some(owner) = self.owners.get_mut(usize::from(slot))
        {
            *owner = number;
        }
    }

    /// Those that have slots, each with its first.
    pub(super) fn masters(&self) -> BTreeMap<Endpoint, u16> {
        let mut found = BTreeMap::new();
        for (slot, owner) in (0_u16..).zip(&self.owners) {
            if let Some(master) = self.masters.get(usize::from(*owner))
                && !found.contains_key(master)
            {
                found.insert(master.clone(), slot);
            }
        }
        found
    }

    pub(super) fn replicas(&self) -> &[Endpoint] {
        &self.replicas
    }

    /// How many slots have a master.
    pub(super) fn covered(&self) -> usize {
        self.owners.iter().filter(|owner| **owner != NOBODY).count()
    }

    /// Whether both say the same of every slot.
    pub(super) fn agrees(&self, other: &Self) -> bool {
        (0..SLOTS).all(|slot| self.owner(slot) == other.owner(slot))
    }
}

fn read_node(node: &Value, asked: &Endpoint) -> Option<Endpoint> {
    let Value::Array(parts) = node else { return None };
    let [host, Value::Int(port), ..] = parts.as_slice() else { return None };
    let host = Endpoint::host(reply::text(host).as_deref(), asked);
    Some(Endpoint { host, port: u16::try_from(*port).ok()? })
}

/// What an answer says about where a request belongs. In every case it was not run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Redirect {
    /// Another node has the slot, from now on.
    Moved(u16, Endpoint),
    /// The slot is on its way to another node, and these keys are there already.
    Ask(Endpoint),
    /// The slot is on its way, and its keys are partly here, partly there.
    Again,
    /// The node cannot serve the slot: the cluster is down, or the node is no master.
    Down,
}

impl Redirect {
    /// What `error`, an answer of the node at `asked`, says; nothing if it is about something else.
    pub(super) fn of(error: &Error, asked: &Endpoint) -> Option<Self> {
        let Refusal { code, detail } = error.cause()?.downcast_ref::<Refusal>()?;
        match code.as_str() {
            "MOVED" => {
                let (slot, to) = detail.split_once(' ')?;
                Some(Self::Moved(slot.parse().ok()?, Endpoint::told(to, asked)?))
            }
            "ASK" => Endpoint::told(detail.split_once(' ')?.1, asked).map(Self::Ask),
            "TRYAGAIN" => Some(Self::Again),
            "CLUSTERDOWN" | "READONLY" | "MASTERDOWN" => Some(Self::Down),
            // How a script hears of the two cases above, before it has written anything that counts.
            _ if detail.contains("attempted to access a non local key") => Some(Self::Again),
            _ if detail.contains("while the cluster is down") => Some(Self::Down),
            _ => None,
        }
    }
}

/// The error of a request that was sent on and on, and never run.
pub(super) fn unsettled(error: Error) -> Error {
    if error.kind() == ErrorKind::Unavailable {
        return error;
    }
    Error::new(ErrorKind::Unavailable, "the cluster is moving the lock's slot, or has just lost a master")
        .caused_by(error)
        .advise("it settles by itself; try again in a moment")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn endpoint(port: u16) -> Endpoint {
        Endpoint { host: "here".into(), port }
    }

    fn node(host: Value, port: i64) -> Value {
        Value::Array(vec![host, Value::Int(port), Value::BulkString(b"id".to_vec()), Value::Array(vec![])])
    }

    fn range(first: i64, last: i64, nodes: Vec<Value>) -> Value {
        Value::Array([vec![Value::Int(first), Value::Int(last)], nodes].concat())
    }

    #[test]
    fn a_map_is_read_whole_or_not_at_all() {
        let text = |text: &str| Value::BulkString(text.as_bytes().to_vec());
        let answer = Value::Array(vec![
            range(0, 99, vec![node(text("10.0.0.1"), 7000), node(text("10.0.0.2"), 7001)]),
            range(100, 16383, vec![node(Value::Nil, 7002)]),
        ]);
        let mut map = SlotMap::read(&answer, &endpoint(1)).unwrap();
        assert_eq!(map.owner(99).unwrap().to_string(), "10.0.0.1:7000");
        assert_eq!(map.owner(100), Some(&endpoint(7002)), "a node that does not know its host");
        assert_eq!((map.covered(), map.replicas().len(), map.masters().len()), (16384, 1, 2));
        let before = map.clone();
        map.assign(100, endpoint(9));
        assert_eq!((map.owner(100), map.owner(101)), (Some(&endpoint(9)), Some(&endpoint(7002))));
        assert!(before.agrees(&before) && !map.agrees(&before));
        assert_eq!(map.masters()[&endpoint(7002)], 101);
        for bad in [
            Value::Nil,
            Value::Array(vec![Value::Int(1)]),
            Value::Array(vec![range(0, 16384, vec![node(text("h"), 1)])]),
            Value::Array(vec![range(5, 1, vec![node(text("h"), 70000)])]),
            Value::Array(vec![range(0, 1, vec![])]),
        ] {
            assert_eq!(SlotMap::read(&bad, &endpoint(1)), None, "{bad:?}");
        }
    }

    #[test]
    fn answers_say_where_a_request_belongs() {
        let of = |code: &str, detail: &str| {
            let refusal = Refusal { code: code.into(), detail: detail.into() };
            Redirect::of(&refusal.into_error(None), &endpoint(1))
        };
        let at = |host: &str| Endpoint { host: host.into(), port: 7001 };
        assert_eq!(of("MOVED", "3999 10.0.0.1:7001"), Some(Redirect::Moved(3999, at("10.0.0.1"))));
        assert_eq!(of("MOVED", "3999 :7001"), Some(Redirect::Moved(3999, at("here"))));
        assert_eq!(of("ASK", "3999 ::1:7001"), Some(Redirect::Ask(at("::1"))));
        assert_eq!(of("TRYAGAIN", "Multiple keys"), Some(Redirect::Again));
        assert_eq!(
            of("ERR", "Script attempted to access a non local key in a cluster node"),
            Some(Redirect::Again)
        );
        for code in ["CLUSTERDOWN", "READONLY"] {
            assert_eq!(of(code, "x"), Some(Redirect::Down));
        }
        for (code, detail) in [("MOVED", "x"), ("MOVED", "1 h"), ("ERR", "x"), ("NOPERM", "x"), ("OOM", "x")]
        {
            assert_eq!(of(code, detail), None, "{code} {detail}");
        }
    }
}
