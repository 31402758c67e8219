//! Where the master is: asked of sentinels at every dial, and listened for while there is a connection.

mod address;
mod findings;
mod opinion;
mod survey;

use std::collections::{HashMap, HashSet};
use std::fmt::Write as _;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};
use std::time::Duration;

use redis::aio::MultiplexedConnection;
use redis::{
    AsyncConnectionConfig, ProtocolVersion, PushInfo, PushKind, RedisConnectionInfo, RedisError, Value,
};
use tokio::sync::mpsc;
use tokio::task::JoinSet;

pub(super) use address::{Host, SENTINEL_FORM, Sentinels};
pub use address::{SENTINEL_PASSWORD_VARIABLE, SENTINEL_USERNAME_VARIABLE};
pub(super) use findings::look_over;
pub(super) use opinion::{Named, Opinion};

use super::config::{Address, RedisConfig};
use super::connection::{Connector, Link};
use super::reply::{self, Refusal};
use crate::clock::{self, Instant};
use crate::error::{Error, ErrorKind, Result};
use crate::types::Escaped;

/// While a dial goes on, how long after one question the sentinels are asked again: the master may be frozen, and another
/// server take its place meanwhile.
const ASK_AGAIN: Duration = Duration::from_millis(250);
/// How often the sentinel that is listened to is asked, too: it may be cut off, or have overslept its own message.
const CHECK_EVERY: Duration = Duration::from_secs(2);
/// Between a sentinel that does not answer and the next, at first and at most.
const NEXT_LEAST: Duration = Duration::from_millis(100);
const NEXT_MOST: Duration = Duration::from_secs(3);
/// What sentinels say when another server is the master, and, a little earlier, when one of them has made it so.
const CHANNELS: [&str; 2] = ["+switch-master", "+promoted-slave"];

impl Sentinels {
    /// The server at that host.
    pub(super) fn address_of(&self, host: &Host) -> Address {
        Address::Tcp { host: host.name.clone(), port: host.port, tls: self.tls }
    }
}

/// What came out of a part of a dial.
enum Step {
    /// What a sentinel, by its number, said.
    Heard(usize, Result<Named>),
    Reached(Host, Result<Arc<Link>>),
}

/// A dial under way.
struct Dial<'a> {
    connector: &'a Arc<Connector>,
    sentinels: &'a Sentinels,
    steps: JoinSet<Step>,
    /// Sentinels whose answer is due.
    asked: HashSet<usize>,
    said: HashMap<usize, Result<Named>>,
    /// The latest epoch that was heard of.
    epoch: u64,
    /// Servers that were dialled, each with the epoch in which it was named, and why it did not serve, once that is known.
    servers: HashMap<Host, (u64, Option<Error>)>,
    last: Instant,
}

/// Dials the master: asks all sentinels at once, dials whatever they name, and takes the first that says of itself that it
/// is a master, unless a later one was heard of. A sentinel or a server that does not answer keeps nobody waiting who does.
pub(super) async fn dial(connector: &Arc<Connector>, sentinels: &Sentinels) -> Result<Arc<Link>> {
    let mut dial = Dial {
        connector,
        sentinels,
        steps: JoinSet::new(),
        asked: HashSet::new(),
        said: HashMap::new(),
        epoch: 0,
        servers: HashMap::new(),
        // Before the dial's own time is up, so that there is time to say what went wrong.
        last: clock::now().plus(connector.timeout() * 7 / 8),
    };
    // Others may hear of a failover later than the one that is listened to.
    if let Some(named) = connector.named() {
        dial.try_server(&named);
    }
    let mut ask_at = clock::now();
    loop {
        if clock::now() >= ask_at {
            dial.ask_all();
            ask_at = clock::now().plus(ASK_AGAIN);
        }
        match clock::timeout_at(ask_at.min(dial.last), dial.steps.join_next()).await {
            // All have said what they have to say.
            Some(None) => break,
            Some(Some(Ok(step))) => {
                if let Some(link) = dial.take(step) {
                    return Ok(link);
                }
            }
            None if clock::now() >= dial.last => break,
            Some(Some(Err(_))) | None => {}
        }
    }
    Err(verdict(sentinels, &dial.said, &dial.servers))
}

impl Dial<'_> {
    fn ask_all(&mut self) {
        for number in 0..self.sentinels.hosts.len() {
            if self.asked.insert(number) {
                let connector = self.connector.clone();
                self.steps.spawn(async move { Step::Heard(number, ask(&connector, number).await) });
            }
        }
    }

    fn try_server(&mut self, named: &Named) {
        if !self.connector.opinion().allows(named) {
            let outvoted = Error::new(ErrorKind::Unavailable, "most sentinels name another");
            self.servers.entry(named.host.clone()).or_insert((named.epoch, Some(outvoted)));
            return;
        }
        self.epoch = self.epoch.max(named.epoch);
        let is_under_way = matches!(self.servers.get(&named.host), Some((_, None)));
        if named.epoch < self.epoch || is_under_way {
            return;
        }
        self.servers.insert(named.host.clone(), (named.epoch, None));
        let (connector, host, last) = (self.connector.clone(), named.host.clone(), self.last);
        let address = self.sentinels.address_of(&host);
        self.steps.spawn(async move { Step::Reached(host, reach(&connector, &address, last).await) });
    }

    /// The connection, if this was the last step to it.
    fn take(&mut self, step: Step) -> Option<Arc<Link>> {
        match step {
            Step::Heard(number, answer) => {
                self.asked.remove(&number);
                if let Ok(named) = &answer {
                    self.try_server(named);
                }
                self.said.insert(number, answer);
            }
            Step::Reached(host, outcome) => {
                // What was heard meanwhile counts.
                if let Some(named) = self.connector.named() {
                    self.try_server(&named);
                }
                let epoch = self.servers.get(&host).map_or(0, |(epoch, _)| *epoch);
                match outcome {
                    Ok(link) if epoch >= self.epoch => {
                        link.epoch.store(epoch, Ordering::Relaxed);
                        return Some(link);
                    }
                    Ok(_) => {
                        let later = Error::new(ErrorKind::Unavailable, "another one was named later");
                        self.servers.insert(host, (epoch, Some(later)));
                    }
                    Err(error) => drop(self.servers.insert(host, (epoch, Some(error)))),
                }
            }
        }
        None
    }
}

/// Why there is no master, with what each sentinel said.
fn verdict(
    sentinels: &Sentinels,
    said: &HashMap<usize, Result<Named>>,
    servers: &HashMap<Host, (u64, Option<Error>)>,
) -> Error {
    let mut words = format!("no master {} was found:", sentinels.master);
    let mut refusals = 0;
    for (number, sentinel) in sentinels.hosts.iter().enumerate() {
        let mark = if number == 0 { "" } else { ";" };
        let _ = write!(words, "{mark} sentinel {sentinel} ");
        let _ = match said.get(&number) {
            None => write!(words, "did not answer in time"),
            Some(Err(error)) => {
                refusals += usize::from(!error.is_transient());
                write!(words, "says nothing: {error}")
            }
            Some(Ok(Named { host, .. })) => match servers.get(host) {
                Some((_, Some(error))) => write!(words, "names {host}, and that did not serve: {error}"),
                _ => write!(words, "names {host}, and that did not answer in time"),
            },
        };
    }
    // A server that refuses the login is mended by nobody's waiting; one that is being replaced is.
    let hard = servers
        .values()
        .any(|(_, error)| error.as_ref().is_some_and(|error| error.kind() == ErrorKind::Rejected));
    let kind =
        if refusals == sentinels.hosts.len() || hard { ErrorKind::Rejected } else { ErrorKind::Unavailable };
    Error::new(kind, words)
}

/// Dials a server, and makes sure that it is a master.
async fn reach(connector: &Arc<Connector>, address: &Address, last: Instant) -> Result<Arc<Link>> {
    let late = || Error::new(ErrorKind::Unavailable, "no answer came in time");
    let link = clock::timeout_at(last, connector.dial_to(address)).await.ok_or_else(late)??;
    let answer = connector.send(&link, &redis::cmd("ROLE"), last).await?;
    let role = match &answer {
        Value::Array(parts) => parts.first().and_then(reply::text),
        Value::ServerError(error) if Refusal::of(error).is_of_no_master() => Some(error.code().to_owned()),
        Value::ServerError(error) => return Err(Refusal::of(error).into_error(None)),
        _ => None,
    };
    match role.as_deref() {
        Some("master") => Ok(link),
        role => {
            let role = Escaped(role.unwrap_or("something else").as_bytes()).to_string();
            let what = format!("it is no master but says {role}");
            Err(Error::new(ErrorKind::Unavailable, what))
        }
    }
}

/// Asks one sentinel, on a connection of its own.
async fn ask(connector: &Arc<Connector>, number: usize) -> Result<Named> {
    let deadline = clock::now().plus(connector.timeout() / 2);
    let mut connection = open(connector, number, ProtocolVersion::RESP2, None, deadline)
        .await?
        .map_err(|error| refused(&error))?;
    master(connector, &mut connection, deadline).await
}

/// A connection to a sentinel. What it sends unasked goes to `events`.
pub(super) async fn open(
    connector: &Connector,
    number: usize,
    protocol: ProtocolVersion,
    events: Option<mpsc::UnboundedSender<PushInfo>>,
    deadline: Instant,
) -> Result<Result<MultiplexedConnection, RedisError>> {
    let Some(sentinels) = connector.sentinels() else { return Err(Error::invalid("there are no sentinels")) };
    let (username, password) = RedisConfig::sentinel_credentials(sentinels, |name| std::env::var(name).ok())?;
    let mut login = RedisConnectionInfo::default().set_protocol(protocol);
    if let Some(username) = username {
        login = login.set_username(username);
    }
    if let Some(password) = password {
        login = login.set_password(password.expose());
    }
    let client = match connector.client(&sentinels.address_of(&sentinels.hosts[number]), login)? {
        Ok(client) => client,
        Err(error) => return Ok(Err(error)),
    };
    let mut options = AsyncConnectionConfig::new().set_connection_timeout(None).set_response_timeout(None);
    if let Some(events) = events {
        options = options.set_push_sender(events);
    }
    let dialled = client.get_multiplexed_async_connection_with_config(&options);
    clock::timeout_at(deadline, dialled).await.ok_or_else(unheard)
}

fn unheard() -> Error {
    Error::new(ErrorKind::Unavailable, "no answer came in time")
}

/// Why a sentinel could not be dialled.
pub(super) fn refused(error: &RedisError) -> Error {
    let error = reply::not_connected(error, None, None);
    if error.kind() == ErrorKind::Rejected { error.advise(LOGIN_ADVICE) } else { error }
}

const LOGIN_ADVICE: &str =
    "the sentinels have a login of their own: sentinel_user, and sentinel_password or sentinel_password_file";

/// What a sentinel answers to a command.
pub(super) async fn question(
    connection: &mut MultiplexedConnection,
    words: &[&str],
    deadline: Instant,
) -> Result<Value> {
    let mut command = redis::cmd("SENTINEL");
    command.arg(words);
    match clock::timeout_at(deadline, connection.send_packed_command(&command)).await {
        None => Err(unheard()),
        Some(Err(error)) => {
            Err(Error::new(ErrorKind::Unavailable, "the connection broke before it answered")
                .caused_by(error))
        }
        Some(Ok(Value::ServerError(error))) => {
            let refusal = Refusal::of(&error);
            let advice = match refusal.code.as_str() {
                "NOAUTH" | "NOPERM" | "WRONGPASS" => Some(LOGIN_ADVICE),
                "NOQUORUM" => None,
                _ => Some("is it a sentinel?"),
            };
            let refused = Error::new(ErrorKind::Rejected, "it refused the question").caused_by(refusal);
            Err(match advice {
                Some(advice) => refused.advise(advice),
                None => refused,
            })
        }
        Some(Ok(answer)) => Ok(answer),
    }
}

/// Where a sentinel says that the master is.
async fn master(
    connector: &Connector,
    connection: &mut MultiplexedConnection,
    deadline: Instant,
) -> Result<Named> {
    let name = connector.sentinels().map_or("", |sentinels| sentinels.master.as_str());
    // First the epoch: one that is older than the name is only too modest.
    let facts = question(connection, &["MASTER", name], deadline).await;
    let epoch = facts.as_ref().ok().and_then(|facts| fields(facts).get("config-epoch")?.parse().ok());
    let answer = question(connection, &["GET-MASTER-ADDR-BY-NAME", name], deadline).await?;
    if let Value::Nil = answer {
        let unknown = Error::new(ErrorKind::Rejected, format!("it knows no master of the name {name}"));
        return Err(unknown.advise("`SENTINEL MASTERS` lists the names it knows"));
    }
    let host = read_host(&answer).ok_or_else(|| reply::unexpected(&answer))?;
    Ok(Named { epoch: epoch.unwrap_or(0), host })
}

/// The pairs of an answer that lists names and values in turn, or as pairs (RESP3).
fn fields(answer: &Value) -> HashMap<String, String> {
    let pair = |key, value| Some((reply::text(key)?, reply::text(value)?));
    match answer {
        Value::Array(parts) => parts.chunks_exact(2).filter_map(|parts| pair(&parts[0], &parts[1])).collect(),
        Value::Map(pairs) => pairs.iter().filter_map(|(key, value)| pair(key, value)).collect(),
        _ => HashMap::new(),
    }
}

fn read_host(answer: &Value) -> Option<Host> {
    let Value::Array(parts) = answer else { return None };
    let [name, port] = parts.as_slice() else { return None };
    Some(Host { name: reply::text(name)?, port: reply::text(port)?.parse().ok()? })
}

/// Has the sentinels listened to, and all of them asked, for as long as there is a connector.
pub(super) fn attend(connector: &Arc<Connector>) {
    connector.runtime().spawn(listen(Arc::downgrade(connector)));
    connector.runtime().spawn(survey::survey(Arc::downgrade(connector)));
}

/// Listens to one sentinel after the other, to each as long as it answers.
async fn listen(connector: Weak<Connector>) {
    let (mut number, mut pause) = (0, NEXT_LEAST);
    loop {
        {
            let Some(alive) = connector.upgrade() else { return };
            let count = alive.sentinels().map_or(1, |sentinels| sentinels.hosts.len());
            number %= count;
        }
        if follow(&connector, number).await {
            pause = NEXT_LEAST;
        }
        number += 1;
        clock::sleep(pause / 2 + clock::jitter(pause / 2)).await;
        pause = (pause * 2).min(NEXT_MOST);
    }
}

/// Listens to one sentinel until it does not answer; true if it did at first.
async fn follow(connector: &Weak<Connector>, number: usize) -> bool {
    let (sender, mut events) = mpsc::unbounded_channel();
    let mut before: Option<Host> = None;
    let Some(mut connection) = subscribe(connector, number, sender.clone()).await else { return false };
    loop {
        let Some(alive) = connector.upgrade() else { return true };
        let deadline = clock::now().plus(alive.timeout() / 2);
        let Ok(named) = master(&alive, &mut connection, deadline).await else { return before.is_some() };
        let renames = before.replace(named.host.clone()).is_some_and(|before| before != named.host);
        alive.master_is(&named, renames);
        drop(alive);
        let event = clock::timeout_at(clock::now().plus(CHECK_EVERY), next_event(&mut events)).await;
        if event == Some(Event::Ended) {
            return true;
        }
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Event {
    /// Something happened to one of its masters.
    News,
    Ended,
}

async fn next_event(events: &mut mpsc::UnboundedReceiver<PushInfo>) -> Event {
    loop {
        match events.recv().await.map(|event| event.kind) {
            Some(PushKind::Disconnection) | None => return Event::Ended,
            Some(PushKind::Message) => return Event::News,
            Some(_) => {}
        }
    }
}

/// A connection to a sentinel that tells of failovers. One that cannot (before Redis 6) is only asked.
async fn subscribe(
    connector: &Weak<Connector>,
    number: usize,
    sender: mpsc::UnboundedSender<PushInfo>,
) -> Option<MultiplexedConnection> {
    let alive = connector.upgrade()?;
    let deadline = clock::now().plus(alive.timeout() / 2);
    let opened = open(&alive, number, ProtocolVersion::RESP3, Some(sender), deadline).await;
    let mut connection = match opened {
        Ok(Ok(connection)) => connection,
        Ok(Err(error)) if reply::is_unknown_hello(&error) => {
            return open(&alive, number, ProtocolVersion::RESP2, None, deadline).await.ok()?.ok();
        }
        Ok(Err(error)) => {
            tracing::debug!(number, %error, "this sentinel cannot be listened to");
            return None;
        }
        Err(error) => {
            tracing::debug!(number, %error, "this sentinel cannot be listened to");
            return None;
        }
    };
    let mut subscribe = redis::cmd("SUBSCRIBE");
    subscribe.arg(&CHANNELS);
    match clock::timeout_at(deadline, connection.send_packed_command(&subscribe)).await {
        Some(Ok(Value::ServerError(error))) => {
            tracing::warn!(%error, "a sentinel's messages may not be read, and it is only asked");
            Some(connection)
        }
        Some(Ok(_)) => Some(connection),
        Some(Err(_)) | None => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sentinels_answer_is_a_host_and_a_port() {
        let text = |text: &str| Value::BulkString(text.into());
        let host = |answer: Value| read_host(&answer).map(|host| host.to_string());
        assert_eq!(host(Value::Array(vec![text("::1"), text("7000")])).as_deref(), Some("[::1]:7000"));
        for nonsense in
            [Value::Nil, text("h"), Value::Array(vec![text("h")]), Value::Array(vec![text("h"), text("x")])]
        {
            assert_eq!(host(nonsense), None);
        }
    }
}
