//! Who waits for whom: the graph behind `leasehold show --graph`, and how it is drawn.
//!
//! A node is an owner with all its claims, or, where none was named, a single claim: such a claim cannot wait and hold at
//! once, so only owners come to stand in a circle.

use std::collections::{HashMap, HashSet};
use std::fmt::Write as _;

use leasehold::{FencingToken, Holder, LockView, Name, Record, Waiter};
use serde_json::{Value, json};

use crate::view::{self, BAD, DIM, WARN, styled};

/// Deeper trees are cut: nobody reads them, and a stranger could make one.
const MOST_DEPTH: usize = 100;

/// Who waits for whom.
#[derive(Debug, Default)]
pub(crate) struct Graph {
    nodes: Vec<Node>,
    locks: Vec<Lock>,
}

#[derive(Debug)]
struct Node {
    /// The same for the same owner, or claim.
    id: String,
    who: String,
    record: Record,
    /// Locks that it holds and somebody waits for.
    holds: Vec<usize>,
    /// Locks that it waits for.
    waits: Vec<usize>,
    in_circle: bool,
}

#[derive(Debug)]
struct Lock {
    name: Name,
    holder: usize,
    /// What the holder says of itself.
    record: Record,
    token: Option<FencingToken>,
    line: Vec<Place>,
}

#[derive(Debug)]
struct Place {
    node: usize,
    waiter: Waiter,
    in_circle: bool,
}

impl Graph {
    /// The graph of the locks that somebody waits for.
    pub(crate) fn of(views: &[LockView]) -> Self {
        let mut graph = Self::default();
        let mut known = HashMap::new();
        for view in views.iter().filter(|view| !view.queue.is_empty()) {
            let (id, who, record) = holder_node(view);
            let holder = graph.node(&mut known, id, who, record.clone());
            let line = view.queue.iter().map(|waiter| {
                let record = waiter.record.clone().unwrap_or_default();
                let id = node_id(&record, || format!("claim:{}", waiter.id));
                Place {
                    node: graph.node(&mut known, id, view::waiter(waiter), record),
                    waiter: waiter.clone(),
                    in_circle: false,
                }
            });
            let line: Vec<_> = line.collect();
            let at = graph.locks.len();
            for place in &line {
                graph.nodes[place.node].waits.push(at);
            }
            graph.nodes[holder].holds.push(at);
            let token = view.holder.as_ref().and_then(|holder| holder.token);
            graph.locks.push(Lock { name: view.name.clone(), holder, record, token, line });
        }
        graph.mark_circles();
        graph
    }

    fn node(&mut self, known: &mut HashMap<String, usize>, id: String, who: String, record: Record) -> usize {
        *known.entry(id.clone()).or_insert_with(|| {
            self.nodes.push(Node { id, who, record, holds: Vec::new(), waits: Vec::new(), in_circle: false });
            self.nodes.len() - 1
        })
    }

    /// A wait is part of a circle if its lock's holder waits, over however many others, for the waiter.
    fn mark_circles(&mut self) {
        for lock in 0..self.locks.len() {
            let reached = self.waited_for_by(self.locks[lock].holder);
            for place in 0..self.locks[lock].line.len() {
                let node = self.locks[lock].line[place].node;
                if reached.contains(&node) {
                    self.locks[lock].line[place].in_circle = true;
                    self.nodes[node].in_circle = true;
                }
            }
        }
    }

    /// Whom `node` waits for, directly or not, and itself.
    fn waited_for_by(&self, node: usize) -> HashSet<usize> {
        let mut reached = HashSet::from([node]);
        let mut open = vec![node];
        while let Some(at) = open.pop() {
            let next = self.nodes[at].waits.iter().map(|lock| self.locks[*lock].holder);
            open.extend(next.filter(|node| reached.insert(*node)));
        }
        reached
    }

    /// As one JSON object.
    pub(crate) fn json(&self) -> Value {
        let nodes: Vec<_> = self
            .nodes
            .iter()
            .map(|node| {
                let Record { owner, host, pid, label, .. } = &node.record;
                json!({ "id": node.id, "owner": owner, "host": host, "pid": pid, "label": label, "in_circle": node.in_circle })
            })
            .collect();
        let edges =
            self.locks.iter().flat_map(|lock| lock.line.iter().zip(1..).map(move |place| (lock, place)));
        let edges: Vec<_> = edges
            .map(|(lock, (place, position))| {
                let mut edge = view::named_json(&lock.name, "lock");
                edge["waiter"] = self.nodes[place.node].id.clone().into();
                edge["holder"] = self.nodes[lock.holder].id.clone().into();
                edge["position"] = json!(position);
                edge["token"] = json!(lock.token);
                edge["since_unix_ms"] = json!(place.waiter.since_unix_micros.map(|micros| micros / 1000));
                edge["in_circle"] = place.in_circle.into();
                edge
            })
            .collect();
        json!({ "nodes": nodes, "edges": edges })
    }

    /// As trees of text: below each holder its locks, below each lock its line, below each waiter what it holds itself.
    pub(crate) fn text(&self) -> String {
        if self.locks.is_empty() {
            return format!("{}\n", styled(DIM, "nobody waits"));
        }
        let mut drawing = Drawing { graph: self, text: String::new(), drawn: HashSet::new() };
        // First those who wait for nobody, then a member of each circle.
        let holders = self.locks.iter().map(|lock| lock.holder);
        let roots = holders.clone().filter(|node| self.nodes[*node].waits.is_empty());
        for node in roots.chain(holders) {
            if !drawing.drawn.contains(&node) {
                let _ = writeln!(drawing.text, "{}", self.title(node));
                drawing.below(node, "", 0);
            }
        }
        drawing.text
    }

    fn title(&self, node: usize) -> String {
        let Node { who, in_circle, .. } = &self.nodes[node];
        styled(if *in_circle { BAD } else { WARN }, who)
    }
}

/// Process and label of a claim, as far as its owner's name does not tell them.
fn detail(record: &Record) -> String {
    let process = record.owner.is_some().then(|| view::process(record));
    let label = record.label.as_ref().map(|label| format!("\"{}\"", view::escaped(label)));
    let parts: Vec<_> = process.into_iter().chain(label).collect();
    if parts.is_empty() { String::new() } else { format!(" ({})", parts.join(" ")) }
}

fn node_id(record: &Record, otherwise: impl FnOnce() -> String) -> String {
    record.owner.as_ref().map_or_else(otherwise, |owner| format!("owner:{owner}"))
}

/// Identity, name and record of whoever holds the lock.
fn holder_node(view: &LockView) -> (String, String, Record) {
    let Some(holder) = &view.holder else {
        return (format!("free:{}", view.name), "nobody".into(), Record::default());
    };
    let Holder { id, record, .. } = holder;
    let record = record.clone().unwrap_or_default();
    let otherwise = || id.map_or_else(|| format!("foreign:{}", view.name), |id| format!("claim:{id}"));
    (node_id(&record, otherwise), view::who(holder), record)
}

struct Drawing<'a> {
    graph: &'a Graph,
    text: String,
    drawn: HashSet<usize>,
}

impl Drawing<'_> {
    /// What `node` holds and who waits for it, each line beginning with `margin`.
    fn below(&mut self, node: usize, margin: &str, depth: usize) {
        self.drawn.insert(node);
        let holds = &self.graph.nodes[node].holds;
        if depth >= MOST_DEPTH && !holds.is_empty() {
            let _ = writeln!(self.text, "{margin}{}", styled(DIM, "and more"));
            return;
        }
        for (lock, left) in holds.iter().zip((0..holds.len()).rev()) {
            let (branch, inner) = branches(margin, left);
            let lock = &self.graph.locks[*lock];
            let token = lock.token.map_or_else(String::new, |token| format!(", token {token}"));
            let _ = writeln!(self.text, "{branch}holds {}{}{token}", lock.name, detail(&lock.record));
            for (place, position) in lock.line.iter().zip(1..) {
                let (branch, inner) = branches(&inner, lock.line.len() - position);
                let since = view::age(place.waiter.since_unix_micros);
                let since = since.map_or_else(String::new, |span| format!(", for {}", view::rough(span)));
                let seen = self.drawn.contains(&place.node);
                let remark = match (place.in_circle, seen) {
                    (true, true) => styled(BAD, " closes a circle"),
                    (true, false) => styled(BAD, " in a circle"),
                    (false, true) => styled(DIM, " see above"),
                    (false, false) => String::new(),
                };
                let title = self.graph.title(place.node);
                let detail = place.waiter.record.as_ref().map(detail).unwrap_or_default();
                let _ = writeln!(self.text, "{branch}{position}. {title}{detail}{since}{remark}");
                if !seen {
                    self.below(place.node, &inner, depth + 1);
                }
            }
        }
    }
}

/// The beginning of a line with `left` more to come at its level, and that of the lines below it.
fn branches(margin: &str, left: usize) -> (String, String) {
    if left > 0 {
        (format!("{margin}├─ "), format!("{margin}│  "))
    } else {
        (format!("{margin}└─ "), format!("{margin}   "))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use leasehold::{Guard, Locks, Owner, stores::memory::MemoryStore};

    use super::*;

    /// Takes what is free and stands in line for what is not, each `(owner, lock)` in turn; then draws.
    fn graph(claims: &[(&str, &str)]) -> Graph {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(async {
            let locks = Locks::over(Arc::new(MemoryStore::new())).unwrap();
            let (mut guards, mut waiters) = (Vec::<Guard>::new(), Vec::new());
            let mut names: Vec<&str> = Vec::new();
            for (owner, name) in claims {
                let mutex =
                    locks.mutex(name).label(format!("{name}\n")).deadlock_after(std::time::Duration::MAX);
                let mutex = match *owner {
                    "" => mutex,
                    owner => mutex.owner(&Owner::existing(owner).unwrap()),
                };
                if !names.contains(name) {
                    names.push(name);
                }
                if let Some(guard) = mutex.try_lock().await.unwrap() {
                    guards.push(guard);
                    continue;
                }
                let before = locks.show(name).await.unwrap().waiters;
                waiters.push(tokio::spawn(async move { mutex.lock().await }));
                while locks.show(name).await.unwrap().waiters == before {
                    tokio::task::yield_now().await;
                }
            }
            let mut views = Vec::new();
            for name in names {
                views.push(locks.show(name).await.unwrap());
            }
            waiters.iter().for_each(tokio::task::JoinHandle::abort);
            Graph::of(&views)
        })
    }

    /// Without colours, tokens, process ids and times.
    fn drawn(graph: &Graph) -> Vec<String> {
        let text = anstream::adapter::strip_str(&graph.text()).to_string();
        let process =
            format!("{}:{}", rustix::system::uname().nodename().to_string_lossy(), std::process::id());
        let text = text.replace(&process, "vm:1");
        let short = text.lines().map(|line| {
            let line = line.split(", token").next().unwrap();
            match line.split_once(", for ") {
                None => line.to_owned(),
                Some((before, after)) => {
                    let remark = [" in a circle", " closes a circle", " see above"]
                        .into_iter()
                        .find(|it| after.ends_with(it));
                    format!("{before}{}", remark.unwrap_or_default())
                }
            }
        });
        short.collect()
    }

    #[test]
    fn a_tree_of_waiters_hangs_below_who_waits_for_nobody() {
        let graph =
            graph(&[("one", "a"), ("two", "b"), ("two", "a"), ("", "b"), ("three", "a"), ("one", "free")]);
        let expected = [
            "one",
            r#"└─ holds a (vm:1 "a\u{a}")"#,
            r#"   ├─ 1. two (vm:1 "a\u{a}")"#,
            r#"   │  └─ holds b (vm:1 "b\u{a}")"#,
            r#"   │     └─ 1. vm:1 ("b\u{a}")"#,
            r#"   └─ 2. three (vm:1 "a\u{a}")"#,
        ];
        assert_eq!(drawn(&graph), expected);
        let json = graph.json();
        assert!(json["nodes"].as_array().unwrap().iter().all(|node| node["in_circle"] == false));
        assert_eq!(json["edges"].as_array().unwrap().len(), 3);
        assert!(json["edges"][0]["token"].is_u64() && json["edges"][0]["since_unix_ms"].is_u64(), "{json}");
        let first = (&json["edges"][1]["waiter"], &json["edges"][1]["lock"], &json["edges"][1]["holder"]);
        assert_eq!(first, (&"owner:three".into(), &"a".into(), &"owner:one".into()));
        assert_eq!(json["edges"][1]["position"], 2);
    }

    #[test]
    fn the_members_of_a_circle_are_marked_and_those_behind_it_are_not() {
        let graph = graph(&[("one", "a"), ("two", "b"), ("one", "b"), ("two", "a"), ("three", "a")]);
        let expected = [
            "one",
            r#"└─ holds a (vm:1 "a\u{a}")"#,
            r#"   ├─ 1. two (vm:1 "a\u{a}") in a circle"#,
            r#"   │  └─ holds b (vm:1 "b\u{a}")"#,
            r#"   │     └─ 1. one (vm:1 "b\u{a}") closes a circle"#,
            r#"   └─ 2. three (vm:1 "a\u{a}")"#,
        ];
        assert_eq!(drawn(&graph), expected);
        let json = graph.json();
        let marked = |list: &str, key: &str| -> Vec<(String, bool)> {
            let items = json[list].as_array().unwrap().iter();
            items.map(|it| (it[key].as_str().unwrap().to_owned(), it["in_circle"] == true)).collect()
        };
        let of = |who: &str, is: bool| (format!("owner:{who}"), is);
        assert_eq!(marked("nodes", "id"), [of("one", true), of("two", true), of("three", false)]);
        assert_eq!(marked("edges", "waiter"), [of("two", true), of("three", false), of("one", true)]);
    }

    #[test]
    fn who_waits_for_itself_is_a_circle_and_nobody_waiting_is_said() {
        let graph = graph(&[("one", "a"), ("one", "a")]);
        assert!(
            drawn(&graph)[2].ends_with("1. one (vm:1 \"a\\u{a}\") closes a circle"),
            "{:?}",
            drawn(&graph)
        );
        let none = Graph::of(&[LockView::free(Name::new("x").unwrap())]);
        assert_eq!(drawn(&none), ["nobody waits"]);
        assert_eq!(none.json(), json!({ "nodes": [], "edges": [] }));
    }
}
