//! A link between clients and a Redis server that counts, holds, cuts and delays what goes through it.
//!
//! It reads the framing of both directions, so that a fault hits exactly the command that the test names, and the test
//! learns by an event, not by a sleep, that it was hit.

mod pushes;

use std::collections::{HashMap, VecDeque};
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::PATIENCE;
use crate::resp::{parse_command, parse_reply};
pub use pushes::PushFault;
use pushes::{PushRule, Writer};

/// A command as a client sent it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Command {
    /// Which connection of the proxy it came on, counted from 1.
    pub connection: u64,
    /// Its words: the first is the command's name.
    pub args: Vec<Vec<u8>>,
}

impl Command {
    /// The name in upper case.
    pub fn name(&self) -> String {
        self.args.first().map(|name| String::from_utf8_lossy(name).to_uppercase()).unwrap_or_default()
    }

    /// Whether it runs a script.
    pub fn is_script(&self) -> bool {
        matches!(self.name().as_str(), "EVAL" | "EVALSHA" | "FCALL")
    }

    /// Whether one of its arguments is exactly this.
    pub fn mentions(&self, arg: impl AsRef<[u8]>) -> bool {
        self.args.iter().skip(1).any(|found| found == arg.as_ref())
    }
}

/// What happens to a command that was named.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The server runs it; its reply is thrown away and the connection cut.
    CutBeforeReply,
    /// The connection is cut and the server never sees it.
    CutBeforeRequest,
    /// The server runs it; its reply, and all that follow on the connection, wait for [`Injected::release`].
    HoldReply,
    /// It, and all that follow on the connection, wait for [`Injected::release`]; then the server runs it, even if the
    /// client's connection is gone by then.
    HoldRequest,
}

struct Rule {
    id: u64,
    matches: Box<dyn Fn(&Command) -> bool + Send>,
    /// How many more that match go by before the one that is hit.
    skip: usize,
    fault: Fault,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Progress {
    /// The command was hit: for a fault of the reply, the reply has come.
    hit: bool,
    connection: u64,
    released: bool,
    /// For a held request: the server has run it; for a held reply: it was written to the client.
    passed: bool,
}

struct Connection {
    client: TcpStream,
    /// Commands under way, in order: each with the rule that hit it.
    pending: VecDeque<Option<(u64, Fault)>>,
}

#[derive(Default)]
struct State {
    upstream: u16,
    closed: bool,
    refusing: bool,
    frozen: bool,
    delay: Duration,
    log: Vec<Command>,
    round_trips: u64,
    accepted: u64,
    next_id: u64,
    connections: HashMap<u64, Connection>,
    rules: Vec<Rule>,
    messages: Vec<Vec<u8>>,
    push_rules: Vec<PushRule>,
    progress: HashMap<u64, Progress>,
}

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the state and tells all who wait for a change.
    fn change<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let out = change(&mut self.state());
        self.changed.notify_all();
        out
    }

    /// Blocks a thread of the proxy for as long as `while_true` says; no limit, as the test says when.
    fn block_while(&self, mut while_true: impl FnMut(&State) -> bool) {
        let state = self.state();
        drop(
            self.changed
                .wait_while(state, |state| !state.closed && while_true(state))
                .unwrap_or_else(PoisonError::into_inner),
        );
    }

    /// Blocks the test until `done`, for as long as its patience lasts.
    #[track_caller]
    fn wait_until(&self, what: &str, mut done: impl FnMut(&State) -> bool) {
        let state = self.state();
        let (state, timeout) = self
            .changed
            .wait_timeout_while(state, PATIENCE, |state| !done(state))
            .unwrap_or_else(PoisonError::into_inner);
        if timeout.timed_out() {
            let last: Vec<_> = state.log.iter().rev().take(10).map(Command::name).collect();
            panic!(
                "the proxy waited {PATIENCE:?} for {what}; of {} commands the last were {last:?}",
                state.log.len()
            );
        }
    }
}

/// A link to a server. Faults are injected from the test's own thread; dropping it cuts all its connections.
pub struct Proxy {
    port: u16,
    shared: Arc<Shared>,
}

impl std::fmt::Debug for Proxy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Proxy").field("port", &self.port).finish_non_exhaustive()
    }
}

impl Proxy {
    /// Listens on a free port of the loopback and forwards to `upstream`, a port of the loopback.
    ///
    /// # Panics
    /// If no port is free.
    #[must_use]
    pub fn start(upstream: u16) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let port = listener.local_addr().expect("a bound socket has an address").port();
        let state = State { upstream, ..State::default() };
        let shared = Arc::new(Shared { state: Mutex::new(state), changed: Condvar::new() });
        let accepting = Arc::clone(&shared);
        std::thread::spawn(move || {
            for client in listener.incoming().map_while(Result::ok) {
                if accepting.state().closed {
                    return;
                }
                accept(&accepting, client);
            }
        });
        Self { port, shared }
    }

    /// The port it listens on.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The URL of the server by way of this link.
    pub fn url(&self) -> String {
        format!("redis://127.0.0.1:{}", self.port)
    }

    /// All commands received from clients, in the order of their arrival, since the last [`forget`](Self::forget).
    pub fn commands(&self) -> Vec<Command> {
        self.shared.state().log.clone()
    }

    /// How many of the commands received from clients are like this.
    pub fn count(&self, mut like: impl FnMut(&Command) -> bool) -> usize {
        self.shared.state().log.iter().filter(|command| like(command)).count()
    }

    /// How often clients sent something while nothing of theirs was under way: what they had to wait for.
    pub fn round_trips(&self) -> u64 {
        self.shared.state().round_trips
    }

    /// How many connections were accepted so far.
    pub fn accepted(&self) -> u64 {
        self.shared.state().accepted
    }

    /// How many connections are open.
    pub fn open_connections(&self) -> usize {
        self.shared.state().connections.len()
    }

    /// Forgets the commands, round trips and messages counted so far.
    pub fn forget(&self) {
        let mut state = self.shared.state();
        state.log.clear();
        state.messages.clear();
        state.round_trips = 0;
    }

    /// Waits until so many commands like this were received since the last [`forget`](Self::forget).
    ///
    /// # Panics
    /// After [`PATIENCE`].
    #[track_caller]
    pub fn wait_for(&self, count: usize, mut like: impl FnMut(&Command) -> bool) {
        self.shared.wait_until(&format!("{count} commands"), |state| {
            state.log.iter().filter(|command| like(command)).count() >= count
        });
    }

    /// Lets `fault` happen to the first command from now on that is like this, once.
    pub fn inject(&self, fault: Fault, like: impl Fn(&Command) -> bool + Send + 'static) -> Injected {
        self.inject_nth(1, fault, like)
    }

    /// Lets `fault` happen to the `nth` command from now on that is like this, counted from 1, once.
    pub fn inject_nth(
        &self,
        nth: usize,
        fault: Fault,
        like: impl Fn(&Command) -> bool + Send + 'static,
    ) -> Injected {
        let id = self.shared.change(|state| {
            state.next_id += 1;
            let id = state.next_id;
            state.rules.push(Rule { id, matches: Box::new(like), skip: nth.saturating_sub(1), fault });
            state.progress.insert(id, Progress::default());
            id
        });
        Injected { id, shared: Arc::clone(&self.shared) }
    }

    /// Lets every reply of the server wait for so long before it is passed on.
    pub fn delay_replies(&self, delay: Duration) {
        self.shared.change(|state| state.delay = delay);
    }

    /// A black hole, or not: connections are accepted and kept, and nothing goes through in either direction. What was
    /// sent meanwhile goes through when it ends, as on a network that heals.
    pub fn black_hole(&self, on: bool) {
        self.shared.change(|state| state.frozen = on);
    }

    /// Closes new connections at once, or not. Those that are open are left alone.
    pub fn refuse(&self, on: bool) {
        self.shared.change(|state| state.refusing = on);
    }

    /// Forwards new connections to another port of the loopback.
    pub fn set_upstream(&self, port: u16) {
        self.shared.change(|state| state.upstream = port);
    }

    /// Cuts every open connection on the client's side; the server learns of it when all sent before has arrived.
    pub fn cut_all(&self) {
        for connection in self.shared.state().connections.values() {
            let _ = connection.client.shutdown(Shutdown::Both);
        }
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.shared.change(|state| state.closed = true);
        self.cut_all();
        // Wakes the thread that accepts, which then ends.
        let _ = TcpStream::connect(("127.0.0.1", self.port));
    }
}

/// A fault that waits for its command, or has hit it.
#[derive(Clone)]
#[must_use = "a test that does not look at its fault cannot know that it happened"]
pub struct Injected {
    id: u64,
    shared: Arc<Shared>,
}

impl std::fmt::Debug for Injected {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Injected")
            .field("id", &self.id)
            .field("progress", &self.progress())
            .finish_non_exhaustive()
    }
}

impl Injected {
    fn progress(&self) -> Progress {
        self.shared.state().progress.get(&self.id).copied().unwrap_or_default()
    }

    /// Whether it has happened.
    pub fn happened(&self) -> bool {
        self.progress().hit
    }

    /// Waits until it has happened: for a fault of the reply, the server has run the command by then.
    ///
    /// # Panics
    /// After [`PATIENCE`].
    #[track_caller]
    pub fn wait(&self) {
        self.shared
            .wait_until("the command that a fault was injected for", |state| state.progress[&self.id].hit);
    }

    /// Lets go what is held, and waits until it was passed on: a request was run by the server, a reply was written to
    /// the client.
    ///
    /// # Panics
    /// After [`PATIENCE`], as when nothing was held.
    #[track_caller]
    pub fn release(&self) {
        self.shared.change(|state| {
            if let Some(progress) = state.progress.get_mut(&self.id) {
                progress.released = true;
            }
        });
        self.shared.wait_until("what was held to be passed on", |state| state.progress[&self.id].passed);
    }

    /// Cuts the client's side of the connection that was hit; what is held stays held.
    pub fn cut_client(&self) {
        let connection = self.progress().connection;
        if let Some(connection) = self.shared.state().connections.get(&connection) {
            let _ = connection.client.shutdown(Shutdown::Both);
        }
    }
}

fn accept(shared: &Arc<Shared>, client: TcpStream) {
    let (refusing, upstream) = {
        let state = shared.state();
        (state.refusing, state.upstream)
    };
    if refusing {
        return;
    }
    // A server that is down refuses the client too, by closing the connection.
    let Ok(server) = TcpStream::connect(("127.0.0.1", upstream)) else { return };
    let halves = (client.try_clone(), server.try_clone(), client.try_clone(), client.try_clone());
    let (Ok(client_reader), Ok(server_writer), Ok(client_writer), Ok(client_closer)) = halves else { return };
    let _ = (client.set_nodelay(true), server.set_nodelay(true));
    let id = shared.change(|state| {
        state.accepted += 1;
        state.connections.insert(state.accepted, Connection { client, pending: VecDeque::new() });
        state.accepted
    });
    let requests = Arc::clone(shared);
    std::thread::spawn(move || {
        forward_requests(&requests, id, client_reader, &server_writer);
        let _ = server_writer.shutdown(Shutdown::Write);
    });
    let replies = Arc::clone(shared);
    std::thread::spawn(move || {
        let writer = Writer(Arc::new(Mutex::new(client_writer)));
        forward_replies(&replies, id, &server, &writer);
        let _ = (client_closer.shutdown(Shutdown::Both), server.shutdown(Shutdown::Both));
        replies.change(|state| state.connections.remove(&id));
    });
}

fn forward_requests(shared: &Shared, id: u64, mut client: TcpStream, server: &TcpStream) {
    let (mut buffer, mut chunk) = (Vec::new(), vec![0; 64 * 1024]);
    loop {
        match client.read(&mut chunk) {
            Ok(0) | Err(_) => return,
            Ok(read) => buffer.extend_from_slice(&chunk[..read]),
        }
        let mut first_of_chunk = true;
        while let Some((args, length)) = parse_command(&buffer) {
            let request: Vec<u8> = buffer.drain(..length).collect();
            match note_request(shared, id, args, std::mem::take(&mut first_of_chunk)) {
                Meets::TheEnd => return,
                Meets::Fault(_, Fault::CutBeforeRequest) => {
                    let _ = client.shutdown(Shutdown::Both);
                    return;
                }
                Meets::Fault(rule, Fault::HoldRequest) => {
                    shared.block_while(|state| !state.progress[&rule].released);
                }
                _ => {}
            }
            shared.block_while(|state| state.frozen);
            if { server }.write_all(&request).is_err() {
                return;
            }
        }
    }
}

/// What is to become of a command.
enum Meets {
    Nothing,
    Fault(u64, Fault),
    /// Its connection was cut before it was read.
    TheEnd,
}

/// Writes a command down and finds the fault that it is to meet.
fn note_request(shared: &Shared, id: u64, args: Vec<Vec<u8>>, first_of_chunk: bool) -> Meets {
    let command = Command { connection: id, args };
    shared.change(|state| {
        if !state.connections.contains_key(&id) {
            return Meets::TheEnd;
        }
        let mut hit = None;
        for (index, rule) in state.rules.iter_mut().enumerate() {
            if (rule.matches)(&command) {
                if rule.skip == 0 {
                    hit = Some(index);
                    break;
                }
                rule.skip -= 1;
            }
        }
        let hit = hit.map(|index| state.rules.remove(index)).map(|rule| (rule.id, rule.fault));
        if let Some((rule, fault)) = hit {
            let progress = state.progress.entry(rule).or_default();
            progress.connection = id;
            progress.hit = matches!(fault, Fault::CutBeforeRequest | Fault::HoldRequest);
        }
        if let Some(connection) = state.connections.get_mut(&id) {
            if first_of_chunk && connection.pending.is_empty() {
                state.round_trips += 1;
            }
            // What subscribes is answered by messages, not by a reply.
            if !command.name().contains("SUBSCRIBE") {
                connection.pending.push_back(hit);
            }
        }
        state.log.push(command);
        hit.map_or(Meets::Nothing, |(rule, fault)| Meets::Fault(rule, fault))
    })
}

fn forward_replies(shared: &Arc<Shared>, id: u64, mut server: &TcpStream, client: &Writer) {
    let (mut buffer, mut chunk) = (Vec::new(), vec![0; 64 * 1024]);
    let mut client_gone = false;
    loop {
        match server.read(&mut chunk) {
            Ok(0) | Err(_) => return,
            Ok(read) => buffer.extend_from_slice(&chunk[..read]),
        }
        while let Some((parsed, length)) = parse_reply(&buffer) {
            let reply: Vec<u8> = buffer.drain(..length).collect();
            let is_push = reply[0] == b'>';
            match if is_push { pushes::note(shared, id, &parsed) } else { None } {
                Some((_, PushFault::Drop)) => continue,
                Some((rule, PushFault::Hold)) => {
                    client.write_later(Arc::clone(shared), rule, reply);
                    continue;
                }
                None => {}
            }
            let hit = if is_push { None } else { note_reply(shared, id) };
            match hit {
                Some((_, Fault::CutBeforeReply)) => return,
                Some((rule, Fault::HoldReply)) => shared.block_while(|state| !state.progress[&rule].released),
                _ => {}
            }
            let delay = shared.state().delay;
            if !delay.is_zero() {
                std::thread::sleep(delay);
            }
            shared.block_while(|state| state.frozen);
            let written = if client_gone { Ok(()) } else { client.write(&reply) };
            if let Some((rule, Fault::HoldReply)) = hit {
                shared.change(|state| state.progress.entry(rule).or_default().passed = true);
            }
            // The server may still have to run what a fault holds back: its answers are taken in, for nobody.
            client_gone |= written.is_err();
        }
    }
}

fn note_reply(shared: &Shared, id: u64) -> Option<(u64, Fault)> {
    shared.change(|state| {
        let hit = state.connections.get_mut(&id)?.pending.pop_front().flatten();
        if let Some((_, Fault::CutBeforeReply)) = hit {
            // Commands of this connection that were read and not yet sent are lost with it.
            state.connections.remove(&id);
        }
        match hit {
            Some((rule, Fault::CutBeforeReply | Fault::HoldReply)) => {
                state.progress.entry(rule).or_default().hit = true;
            }
            Some((rule, Fault::HoldRequest)) => state.progress.entry(rule).or_default().passed = true,
            _ => {}
        }
        hit
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::resp::{Client, Reply};
    use crate::servers::RedisServer;

    fn linked() -> (RedisServer, Proxy, Client) {
        let server = RedisServer::start();
        let proxy = Proxy::start(server.port());
        let mut client = Client::connect(("127.0.0.1", proxy.port())).unwrap();
        // Connected is not yet accepted: the reply shows that it is.
        client.call(&["PING"]).unwrap();
        proxy.forget();
        (server, proxy, client)
    }

    fn ok() -> Reply {
        Reply::Simple("OK".into())
    }

    #[test]
    fn commands_and_round_trips_are_counted() {
        let (_server, proxy, mut client) = linked();
        assert_eq!(client.call(&["SET", "a", "1"]).unwrap(), ok());
        assert_eq!(client.call(&["GET", "a"]).unwrap(), Reply::Bulk(Some(b"1".to_vec())));
        let names: Vec<_> = proxy.commands().iter().map(Command::name).collect();
        assert_eq!((names, proxy.round_trips()), (vec!["SET".to_owned(), "GET".into()], 2));
        proxy.forget();
        // Five in one go are one round trip: the first is held so that the others cannot come after its reply.
        let held = proxy.inject(Fault::HoldRequest, |_| true);
        for _ in 0..5 {
            client.send(&["incr", "n"]).unwrap();
        }
        held.wait();
        held.release();
        for n in 1..=5 {
            assert_eq!(client.receive_within(PATIENCE).unwrap(), Reply::Int(n));
        }
        assert_eq!((proxy.count(|command| command.name() == "INCR"), proxy.commands().len()), (5, 5));
        assert_eq!(proxy.round_trips(), 1);
        assert_eq!((proxy.accepted(), proxy.open_connections()), (1, 1));
    }

    #[test]
    fn a_connection_cut_before_the_reply_has_run_the_command() {
        let (server, proxy, mut client) = linked();
        let cut = proxy.inject_nth(2, Fault::CutBeforeReply, |command| command.name() == "SET");
        client.call(&["SET", "a", "1"]).unwrap();
        assert!(!cut.happened());
        assert!(client.call(&["SET", "a", "2"]).is_err());
        cut.wait();
        assert_eq!(server.cli(&["GET", "a"]), "2");
    }

    #[test]
    fn a_connection_cut_before_the_request_has_not() {
        let (server, proxy, mut client) = linked();
        let cut = proxy.inject(Fault::CutBeforeRequest, |command| command.mentions("a"));
        assert!(client.call(&["SET", "a", "1"]).is_err());
        cut.wait();
        assert_eq!(server.cli(&["EXISTS", "a"]), "0");
    }

    #[test]
    fn a_held_reply_comes_when_it_is_released() {
        let (server, proxy, mut client) = linked();
        let held = proxy.inject(Fault::HoldReply, |_| true);
        client.send(&["SET", "a", "1"]).unwrap();
        held.wait();
        assert_eq!(server.cli(&["GET", "a"]), "1");
        assert!(client.receive_within(Duration::from_millis(50)).is_err());
        held.release();
        assert_eq!(client.receive_within(PATIENCE).unwrap(), ok());
    }

    #[test]
    fn a_held_request_runs_after_its_connection_died() {
        let (server, proxy, mut client) = linked();
        let late = proxy.inject(Fault::HoldRequest, |_| true);
        client.send(&["SET", "a", "late"]).unwrap();
        late.wait();
        late.cut_client();
        assert!(client.receive_within(PATIENCE).is_err());
        drop(client);
        assert_eq!(server.cli(&["SET", "a", "early"]), "OK");
        late.release();
        assert_eq!(server.cli(&["GET", "a"]), "late");
        crate::eventually("the connection is gone", || proxy.open_connections() == 0);
    }

    #[test]
    fn a_black_hole_accepts_and_passes_nothing_until_it_heals() {
        let (server, proxy, mut client) = linked();
        proxy.black_hole(true);
        let mut second = Client::connect(("127.0.0.1", proxy.port())).unwrap();
        for client in [&mut client, &mut second] {
            client.send(&["INCR", "n"]).unwrap();
            assert!(client.receive_within(Duration::from_millis(50)).is_err());
        }
        assert_eq!(server.cli(&["EXISTS", "n"]), "0");
        proxy.black_hole(false);
        for client in [&mut client, &mut second] {
            assert!(matches!(client.receive_within(PATIENCE).unwrap(), Reply::Int(_)));
        }
        assert_eq!(server.cli(&["GET", "n"]), "2");
    }

    #[test]
    fn new_connections_can_be_refused_and_sent_elsewhere() {
        let (_server, proxy, mut client) = linked();
        proxy.refuse(true);
        assert!(
            Client::connect(("127.0.0.1", proxy.port())).and_then(|mut new| new.call(&["PING"])).is_err()
        );
        assert!(client.call(&["PING"]).is_ok());
        proxy.refuse(false);
        let other = RedisServer::start();
        other.cli(&["SET", "who", "other"]);
        proxy.set_upstream(other.port());
        let mut new = Client::connect(("127.0.0.1", proxy.port())).unwrap();
        assert_eq!(new.call(&["GET", "who"]).unwrap().to_string(), "other");
        proxy.cut_all();
        assert!(client.call(&["PING"]).is_err() && new.call(&["PING"]).is_err());
    }

    #[test]
    fn replies_can_be_delayed() {
        let (_server, proxy, mut client) = linked();
        proxy.delay_replies(Duration::from_millis(30));
        let start = std::time::Instant::now();
        client.call(&["PING"]).unwrap();
        assert!(start.elapsed() >= Duration::from_millis(30));
    }
}
