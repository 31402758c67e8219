//! One connection to the server, redialled when it is broken, and never waited for when the server is down. Where the
//! server is, sentinels may say.

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use redis::aio::MultiplexedConnection;
use redis::io::tcp::{TcpSettings, socket2::TcpKeepalive};
use redis::{
    AsyncConnectionConfig, Client, Cmd, ConnectionAddr, IntoConnectionInfo, ProtocolVersion, PushInfo,
    PushKind, RedisConnectionInfo, RedisError, TlsCertificates, Value,
};
use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;
use tokio::runtime::Handle;
use tokio::sync::{Notify, watch};

use super::combine::{Counter, Job, Patience, Unanswered, command, only};
use super::config::{Address, RedisConfig};
use super::hub::Hub;
use super::reply::{self, Refusal};
use super::script::By;
use super::sentinel::{self, Host, Named, Opinion, Sentinels};
use super::waiting::Waiting;
use crate::clock::{self, Instant};
use crate::error::{Error, ErrorKind, Result};

/// Commands that may wait for the driver before callers wait for it in turn.
const QUEUE: usize = 1024;

/// A live connection, or one that was alive a moment ago.
pub(super) struct Link {
    connection: MultiplexedConnection,
    counter: Counter,
    /// Which connection of the store this is, counted from 1.
    pub(super) generation: u64,
    /// Set when it broke, by whoever noticed first.
    closed: Arc<AtomicBool>,
    probing: AtomicBool,
    /// Whether the server speaks the protocol that messages need.
    can_push: bool,
    /// Whether it refused to send them.
    refuses: AtomicBool,
    subscribed: AtomicBool,
    /// Held while the subscription changes.
    subscribing: tokio::sync::Mutex<()>,
    /// Where it leads, and the epoch in which sentinels named that.
    pub(super) address: Address,
    pub(super) epoch: AtomicU64,
    /// Rung when it is given up though it may not have broken, where sentinels may say so.
    given_up: Option<Notify>,
}

impl Link {
    pub(super) fn is_open(&self) -> bool {
        !self.closed.load(Ordering::Acquire)
    }

    /// What `work` on this connection gives; `None` if the connection was given up before. Where nobody can say so it costs
    /// nothing.
    async fn unless_given_up<T>(&self, work: impl Future<Output = T>) -> Option<T> {
        let Some(given_up) = &self.given_up else { return Some(work.await) };
        // Boxed, for the room of the two together.
        Box::pin(async {
            let given_up = given_up.notified();
            tokio::pin!(given_up, work);
            given_up.as_mut().enable();
            if !self.is_open() {
                return None;
            }
            tokio::select! {
                biased;
                out = &mut work => Some(out),
                () = &mut given_up => None,
            }
        })
        .await
    }

    /// How sentinels named the server it leads to.
    fn named(&self) -> Option<Named> {
        let Address::Tcp { host, port, .. } = &self.address else { return None };
        let host = Host { name: host.clone(), port: *port };
        Some(Named { epoch: self.epoch.load(Ordering::Relaxed), host })
    }

    /// Whether the server speaks the protocol that messages need.
    pub(super) fn can_push(&self) -> bool {
        self.can_push
    }

    /// Whether the server's messages come over this connection.
    pub(super) fn is_subscribed(&self) -> bool {
        self.subscribed.load(Ordering::Acquire)
    }
}

impl fmt::Debug for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Link")
            .field("generation", &self.generation)
            .field("open", &self.is_open())
            .finish_non_exhaustive()
    }
}

/// What became of a dial; `None` while it goes on.
type Dialled = Option<Result<Arc<Link>>>;

#[derive(Debug)]
enum Slot {
    Down,
    Dialling(watch::Receiver<Dialled>),
    Up(Arc<Link>),
}

/// Makes connections on a runtime of its own, whatever executor the callers are on.
#[derive(Debug)]
pub(super) struct Connector {
    config: RedisConfig,
    pub(super) location: Arc<str>,
    runtime: Handle,
    slot: Mutex<Slot>,
    /// Whether there was a connection before.
    was_up: AtomicBool,
    /// Who is told of messages, and of a connection that broke.
    waiting: Arc<Waiting>,
    /// Where the newest connection leads.
    master: watch::Sender<Option<Address>>,
    /// What was made of all that sentinels said.
    opinion: Mutex<Opinion>,
    pub(super) hub: Arc<Hub>,
}

impl Connector {
    pub(super) fn new(
        config: RedisConfig,
        runtime: Handle,
        waiting: Arc<Waiting>,
        hub: Arc<Hub>,
    ) -> Arc<Self> {
        let location = config.location();
        Arc::new(Self {
            config,
            location,
            runtime,
            slot: Mutex::new(Slot::Down),
            was_up: AtomicBool::new(false),
            waiting,
            master: watch::Sender::new(None),
            opinion: Mutex::default(),
            hub,
        })
    }

    /// Where connections live.
    pub(super) fn runtime(&self) -> &Handle {
        &self.runtime
    }

    pub(super) fn timeout(&self) -> Duration {
        self.config.timeout
    }

    /// Whether waiters stand in line, as far as the user wants it.
    pub(super) fn has_line(&self) -> bool {
        self.config.line
    }

    /// Tells when a new connection leads elsewhere than the one before.
    pub(super) fn masters(&self) -> watch::Receiver<Option<Address>> {
        self.master.subscribe()
    }

    /// Which connection there is, if nobody found it broken.
    pub(super) fn generation(&self) -> Option<u64> {
        self.current().map(|link| link.generation)
    }

    /// Whether there is a connection that nobody found broken.
    pub(super) fn is_up(&self) -> bool {
        self.current().is_some()
    }

    fn current(&self) -> Option<Arc<Link>> {
        match &*self.slot() {
            Slot::Up(link) if link.is_open() => Some(link.clone()),
            Slot::Up(_) | Slot::Dialling(_) | Slot::Down => None,
        }
    }

    /// The sentinels that are asked where the server is, if there are any.
    pub(super) fn sentinels(&self) -> Option<&Sentinels> {
        match &self.config.address {
            Address::Sentinel(sentinels) => Some(sentinels),
            Address::Tcp { .. } | Address::Unix(_) => None,
        }
    }

    fn slot(&self) -> MutexGuard<'_, Slot> {
        self.slot.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The connection: the one there is, else what one attempt to dial gives. Calls that come meanwhile share the attempt.
    pub(super) async fn link(self: &Arc<Self>, deadline: Instant) -> Result<Arc<Link>> {
        let dialling = {
            let mut slot = self.slot();
            match &*slot {
                Slot::Up(link) if link.is_open() => return Ok(link.clone()),
                Slot::Dialling(dialling) => dialling.clone(),
                Slot::Up(_) | Slot::Down => {
                    let dialling = self.start_dialling();
                    *slot = Slot::Dialling(dialling.clone());
                    dialling
                }
            }
        };
        Box::pin(self.joined(dialling, deadline)).await
    }

    async fn joined(&self, mut dialling: watch::Receiver<Dialled>, deadline: Instant) -> Result<Arc<Link>> {
        let outcome = async { dialling.wait_for(Option::is_some).await.map(|outcome| outcome.clone()) };
        match clock::timeout_at(deadline, outcome).await {
            Some(Ok(Some(outcome))) => outcome,
            Some(Ok(None) | Err(_)) => {
                *self.slot() = Slot::Down;
                Err(self.unavailable("the runtime that kept the connection has ended"))
            }
            None => Err(self
                .unavailable("could not connect in time")
                .advise("is the server running and reachable?")),
        }
    }

    fn unavailable(&self, what: &'static str) -> Error {
        Error::new(ErrorKind::Unavailable, what).on_store(&self.location)
    }

    fn start_dialling(self: &Arc<Self>) -> watch::Receiver<Dialled> {
        let (sender, receiver) = watch::channel(None);
        let this = self.clone();
        self.runtime.spawn(async move {
            let deadline = clock::now().plus(this.timeout());
            let outcome = match clock::timeout_at(deadline, this.dial()).await {
                Some(outcome) => outcome,
                None => Err(this.unavailable("could not connect in time").advise(
                    "is the server reachable, and does TLS (rediss:) or its absence (redis:) fit this port?",
                )),
            };
            if let Ok(link) = &outcome {
                this.waiting.connected(link.generation);
                if this.was_up.swap(true, Ordering::AcqRel) {
                    this.hub.disturb();
                }
            }
            *this.slot() = match &outcome {
                Ok(link) => Slot::Up(link.clone()),
                Err(_) => Slot::Down,
            };
            if let Ok(link) = &outcome {
                this.master.send_if_modified(|master| {
                    let is_other = master.as_ref() != Some(&link.address);
                    *master = Some(link.address.clone());
                    is_other
                });
            }
            sender.send_replace(Some(outcome));
        });
        receiver
    }

    async fn dial(self: &Arc<Self>) -> Result<Arc<Link>> {
        let outcome = match &self.config.address {
            Address::Sentinel(sentinels) => sentinel::dial(self, sentinels).await,
            address => self.dial_to(address).await,
        };
        outcome.map_err(|error| error.on_store(&self.location))
    }

    /// Dials the server at an address.
    pub(super) async fn dial_to(&self, address: &Address) -> Result<Arc<Link>> {
        let outcome = match self.dial_speaking(address, ProtocolVersion::RESP3).await? {
            Err(error) if reply::is_unknown_hello(&error) => {
                self.dial_speaking(address, ProtocolVersion::RESP2).await?
            }
            outcome => outcome,
        };
        match outcome {
            Ok(link) => Ok(link),
            Err(error) => {
                let is_cut = error.is_connection_dropped() && !error.is_connection_refusal();
                let farewell = if is_cut { self.farewell(address).await } else { None };
                Err(reply::not_connected(&error, farewell, self.config.username.as_deref()))
            }
        }
    }

    /// What the server says to a client that it turns away at the door. Our own first command makes the kernel throw
    /// those words away, so a second look listens only.
    async fn farewell(&self, address: &Address) -> Option<String> {
        let Address::Tcp { host, port, tls: false } = address else { return None };
        let mut words = Vec::new();
        let deadline = clock::now().plus(Duration::from_millis(200).min(self.timeout() / 4));
        let _ = clock::timeout_at(deadline, async {
            TcpStream::connect((host.as_str(), *port)).await?.take(256).read_to_end(&mut words).await
        })
        .await;
        let words = String::from_utf8_lossy(words.strip_prefix(b"-")?).trim_end().to_owned();
        (!words.is_empty()).then_some(words)
    }

    async fn dial_speaking(
        &self,
        address: &Address,
        protocol: ProtocolVersion,
    ) -> Result<Result<Arc<Link>, RedisError>> {
        let login = self.login(protocol)?;
        let client = match self.client(address, login)? {
            Ok(client) => client,
            Err(error) => return Ok(Err(error)),
        };
        let closed = Arc::new(AtomicBool::new(false));
        let generation = self.hub.generations.fetch_add(1, Ordering::Relaxed) + 1;
        // Time-outs are ours: by the boot-time clock, and under any executor.
        let mut options = AsyncConnectionConfig::new()
            .set_connection_timeout(None)
            .set_response_timeout(None)
            .set_pipeline_buffer_size(QUEUE);
        if protocol == ProtocolVersion::RESP3 {
            let (closed, waiting, prefix) =
                (closed.clone(), self.waiting.clone(), self.config.prefix.clone());
            let hub = self.hub.clone();
            options = options.set_push_sender(move |push: PushInfo| -> Result<(), redis::aio::SendError> {
                match (push.kind, push.data.as_slice()) {
                    (PushKind::Disconnection, _) => {
                        closed.store(true, Ordering::Release);
                        // Others, such as those that wait for replicas, come and go.
                        if waiting.disconnected(generation) {
                            hub.disturb();
                        }
                    }
                    (PushKind::Message, [_, Value::BulkString(message)]) => {
                        waiting.pushed(&prefix, generation, message);
                    }
                    _ => {}
                }
                Ok(())
            });
        }
        let dialled = client.get_multiplexed_async_connection_with_config(&options).await;
        Ok(dialled.map(|connection| {
            let counter = Counter::open(connection.clone(), closed.clone());
            Arc::new(Link {
                connection,
                counter,
                generation,
                closed,
                probing: AtomicBool::new(false),
                can_push: protocol == ProtocolVersion::RESP3,
                refuses: AtomicBool::new(false),
                subscribed: AtomicBool::new(false),
                subscribing: tokio::sync::Mutex::new(()),
                address: address.clone(),
                epoch: AtomicU64::new(0),
                given_up: self.sentinels().map(|_| Notify::new()),
            })
        }))
    }

    pub(super) fn login(&self, protocol: ProtocolVersion) -> Result<RedisConnectionInfo> {
        let (username, password) = self.config.credentials(|name| std::env::var(name).ok())?;
        let mut login = RedisConnectionInfo::default()
            .set_protocol(protocol)
            .set_db(i64::from(self.config.database))
            .set_lib_name("leasehold", env!("CARGO_PKG_VERSION"));
        if let Some(username) = username {
            login = login.set_username(username);
        }
        if let Some(password) = password {
            login = login.set_password(password.expose());
        }
        Ok(login)
    }

    /// A client of whatever listens at an address.
    pub(super) fn client(
        &self,
        address: &Address,
        login: RedisConnectionInfo,
    ) -> Result<Result<Client, RedisError>> {
        let address = match address {
            Address::Tcp { host, port, tls: false } => ConnectionAddr::Tcp(host.clone(), *port),
            Address::Tcp { host, port, tls: true } => {
                install_tls_provider();
                ConnectionAddr::TcpTls { host: host.clone(), port: *port, insecure: false, tls_params: None }
            }
            Address::Unix(path) => ConnectionAddr::Unix(path.clone()),
            Address::Sentinel(_) => {
                return Err(Error::invalid("sentinels are asked, not dialled as a server"));
            }
        };
        // Without nodelay the second of two small commands waits for the answer to the first; without the other two
        // a peer that vanished is noticed after a quarter of an hour.
        let settings = TcpSettings::default()
            .set_nodelay(true)
            .set_keepalive(
                TcpKeepalive::new().with_time(Duration::from_secs(10)).with_interval(Duration::from_secs(3)),
            )
            .set_user_timeout(self.config.timeout * 2);
        let client = address
            .into_connection_info()
            .map(|info| info.set_tcp_settings(settings).set_redis_settings(login));
        let Some(path) = &self.config.ca else { return Ok(client.and_then(Client::open)) };
        let root =
            std::fs::read(path).map_err(|error| Error::invalid(format!("ca {}: {error}", path.display())))?;
        let certificates = TlsCertificates { client_tls: None, root_cert: Some(root) };
        Ok(client.and_then(|info| Client::build_with_tls(info, certificates)))
    }

    /// Has the server's messages come over this connection; false if it cannot or will not.
    pub(super) async fn subscribe(&self, link: &Arc<Link>, deadline: Instant) -> Result<bool> {
        if link.is_subscribed() {
            return Ok(true);
        }
        let late = || self.unanswered(link, None);
        let _turn = clock::timeout_at(deadline, link.subscribing.lock()).await.ok_or_else(late)?;
        if link.is_subscribed() || !self.has_line() || !link.can_push || link.refuses.load(Ordering::Acquire)
        {
            return Ok(link.is_subscribed());
        }
        let subscribe = redis::cmd("SUBSCRIBE").arg(&self.waiting.channel).to_owned();
        match self.send(link, &subscribe, deadline).await? {
            Value::ServerError(error) => {
                tracing::warn!(store = %self.location, %error, "waiters cannot be called, and ask again instead");
                link.refuses.store(true, Ordering::Release);
            }
            _ => link.subscribed.store(true, Ordering::Release),
        }
        Ok(link.is_subscribed())
    }

    /// Ends the subscription, if nobody waits; false if somebody does.
    pub(super) async fn unsubscribe(&self) -> bool {
        let link = match &*self.slot() {
            Slot::Up(link) => Some(link.clone()),
            Slot::Down | Slot::Dialling(_) => None,
        };
        let Some(link) = link.filter(|link| link.is_subscribed()) else { return self.waiting.retire() };
        let _turn = link.subscribing.lock().await;
        // Before looking whether anybody waits: whoever comes from now on subscribes again, after us.
        link.subscribed.store(false, Ordering::Release);
        if !self.waiting.retire() {
            link.subscribed.store(true, Ordering::Release);
            return false;
        }
        let unsubscribe = redis::cmd("UNSUBSCRIBE").arg(&self.waiting.channel).to_owned();
        let deadline = clock::now().plus(self.timeout());
        let _ = self.send(&link, &unsubscribe, deadline).await;
        true
    }

    /// Has a claim's job done, together with others that are ready. A refusal by the server is a value.
    pub(super) async fn submit(&self, link: &Arc<Link>, job: Box<Job>, patience: Patience) -> Result<Value> {
        let gone = |kind| {
            link.closed.store(true, Ordering::Release);
            Err(Error::new(kind, "the runtime that kept the connection has ended").on_store(&self.location))
        };
        if patience.asking {
            // Boxed, for what is rare must not make the common case carry its room.
            let call = |by| Ok(command(std::slice::from_ref(&job), by));
            return Box::pin(self.ask(link, patience.deadline, call)).await;
        }
        let Some(answer) = link.unless_given_up(link.counter.submit(&link.connection, job, patience)).await
        else {
            return Err(self.given_up());
        };
        match answer {
            Ok(value) => Ok(self.heard(link, value)),
            Err(Unanswered::Broken(error)) => Err(self.unanswered(link, Some(error))),
            Err(Unanswered::Late) => Err(self.unanswered(link, None)),
            Err(Unanswered::NotSent) => gone(ErrorKind::Unavailable),
            Err(Unanswered::Ended) => gone(ErrorKind::Unknown),
        }
    }

    /// Sends one command. A refusal by the server is a value.
    pub(super) async fn send(&self, link: &Arc<Link>, command: &Cmd, deadline: Instant) -> Result<Value> {
        let mut connection = link.connection.clone();
        let answer = clock::timeout_at(deadline, connection.send_packed_command(command));
        match link.unless_given_up(answer).await.ok_or_else(|| self.given_up())? {
            Some(Ok(value)) => Ok(self.heard(link, value)),
            failed => Err(self.unanswered(link, failed.and_then(Result::err))),
        }
    }

    /// Calls a script at a node that a slot is on its way to, which serves it to who says `ASKING` before.
    pub(super) async fn ask(
        &self,
        link: &Arc<Link>,
        deadline: Instant,
        call: impl Fn(By) -> Result<Cmd>,
    ) -> Result<Value> {
        let mut answer = Value::Nil;
        for by in [By::Digest, By::Text] {
            let answers = self.send_calls(link, vec![call(by)?], true, deadline).await?;
            answer = answers.into_iter().next().map(only).unwrap_or_default();
            if !reply::is_unknown_script(&answer) {
                break;
            }
        }
        Ok(answer)
    }

    /// As [`send_all`](Self::send_all), each with `ASKING` before it if `asking`.
    pub(super) async fn send_calls(
        &self,
        link: &Arc<Link>,
        calls: Vec<Cmd>,
        asking: bool,
        deadline: Instant,
    ) -> Result<Vec<Value>> {
        let mut commands = redis::Pipeline::with_capacity(2 * calls.len());
        for call in calls {
            if asking {
                commands.cmd("ASKING");
            }
            commands.add_command(call);
        }
        let answers = self.send_all(link, &commands, deadline).await?;
        Ok(if asking { answers.into_iter().skip(1).step_by(2).collect() } else { answers })
    }

    /// Sends several commands in one write: one answer each.
    pub(super) async fn send_all(
        &self,
        link: &Arc<Link>,
        commands: &redis::Pipeline,
        deadline: Instant,
    ) -> Result<Vec<Value>> {
        let mut connection = link.connection.clone();
        let answers =
            clock::timeout_at(deadline, connection.send_packed_commands(commands, 0, commands.len()));
        match link.unless_given_up(answers).await.ok_or_else(|| self.given_up())? {
            Some(Ok(values)) => Ok(values.into_iter().map(|value| self.heard(link, value)).collect()),
            failed => Err(self.unanswered(link, failed.and_then(Result::err))),
        }
    }

    /// What a server says that is no master any more has the sentinels asked anew.
    fn heard(&self, link: &Link, value: Value) -> Value {
        let is_demoted = |value: &Value| matches!(value, Value::ServerError(error) if Refusal::of(error).is_of_no_master());
        if self.sentinels().is_some() {
            let inside = match &value {
                Value::Array(answers) => answers.iter().any(is_demoted),
                _ => false,
            };
            if inside || is_demoted(&value) {
                self.give_up(link);
            }
        }
        value
    }

    /// Gives up a connection, which may lead to a master that is none any more: what is under way on it fails, and the
    /// next use dials anew.
    fn give_up(&self, link: &Link) {
        if link.closed.swap(true, Ordering::AcqRel) {
            return;
        }
        if let Some(given_up) = &link.given_up {
            given_up.notify_waiters();
        }
        self.waiting.disconnected(link.generation);
        // Others hold locks too, and may not be due for a renewal for long.
        self.hub.disturb();
    }

    pub(super) fn opinion(&self) -> MutexGuard<'_, Opinion> {
        self.opinion.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The latest master that a sentinel named.
    pub(super) fn named(&self) -> Option<Named> {
        self.opinion().named().cloned()
    }

    /// A sentinel says that this is the master; `renames` if the same one called another so a moment ago. A connection to
    /// another server, which was named in an earlier epoch, is given up.
    pub(super) fn master_is(self: &Arc<Self>, named: &Named, renames: bool) {
        let Some(is_news) = self.opinion().hear(named) else { return };
        // Without epochs the word of that one sentinel must do. Of one epoch, it is the same server by another name.
        self.lead_to(named, is_news, |epoch| epoch < named.epoch || (epoch == 0 && renames));
    }

    /// So say all sentinels that answered, out of so many.
    pub(super) fn masters_are(self: &Arc<Self>, answers: &[Named], sentinels: usize) {
        let used = self.current().and_then(|link| link.named());
        let right = self.opinion().weigh(answers, sentinels, used.as_ref(), clock::now());
        if let Some(named) = right {
            self.lead_to(&named, false, |_| true);
        }
    }

    /// Gives up a connection to another server, if its epoch `is_stale`; then, and if it is news, the master is dialled at
    /// once, so that what is held or waited for is confirmed there.
    fn lead_to(self: &Arc<Self>, named: &Named, is_news: bool, is_stale: impl Fn(u64) -> bool) {
        let Some(address) = self.sentinels().map(|sentinels| sentinels.address_of(&named.host)) else {
            return;
        };
        let stale = self.current();
        if let Some(link) = &stale {
            if link.address == address || !is_stale(link.epoch.load(Ordering::Relaxed)) {
                return;
            }
            tracing::info!(store = %self.location, master = %named.host, "another server is the master now");
            self.give_up(link);
        }
        if stale.is_some() || is_news {
            let this = self.clone();
            self.runtime.spawn(async move {
                if let Err(error) = this.link(clock::now().plus(this.timeout())).await {
                    tracing::debug!(%error, "the new master cannot be reached yet");
                }
            });
        }
    }

    fn given_up(&self) -> Error {
        Error::new(ErrorKind::Unknown, "another server became the master before the answer came")
            .on_store(&self.location)
    }

    /// The command may have been run or not: nobody can tell from here.
    fn unanswered(&self, link: &Arc<Link>, error: Option<RedisError>) -> Error {
        let unknown = |what: &'static str| Error::new(ErrorKind::Unknown, what).on_store(&self.location);
        if let Some(error) = error {
            link.closed.store(true, Ordering::Release);
            unknown("the connection broke before the answer came").caused_by(error)
        } else {
            self.probe(link);
            unknown("no answer came in time")
        }
    }

    /// Asks a connection that left a command unanswered for a sign of life, and gives it up if none comes: a connection
    /// into a black hole stays open for ever.
    fn probe(&self, link: &Arc<Link>) {
        if link.probing.swap(true, Ordering::AcqRel) {
            return;
        }
        let (link, timeout) = (link.clone(), self.timeout());
        self.runtime.spawn(async move {
            let mut connection = link.connection.clone();
            let ping = redis::cmd("PING");
            let answer =
                clock::timeout_at(clock::now().plus(timeout), connection.send_packed_command(&ping)).await;
            if !matches!(answer, Some(Ok(_))) {
                link.closed.store(true, Ordering::Release);
            }
            link.probing.store(false, Ordering::Release);
        });
    }
}

/// Gives the process a provider of TLS, unless it has one: none makes rustls panic.
fn install_tls_provider() {
    use rustls::crypto::{CryptoProvider, aws_lc_rs};
    if CryptoProvider::get_default().is_none() {
        // Another thread may have been quicker; either will do.
        let _ = aws_lc_rs::default_provider().install_default();
    }
}
