//! Real servers: each on a free port of the loopback, in a folder of its own, gone with the test that started it.

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Read};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Condvar, Mutex, PoisonError};

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use crate::resp::{Client, Reply};
use crate::sentinel::write_conf;
use crate::wall_clock::WallClock;
use crate::{PATIENCE, spawn, tls};

/// The servers that `scripts/install-test-tools` unpacks beside the system's, by the names that [`Builder::program`] takes.
pub const NEWER: [&str; 3] = ["valkey-8", "redis-8", "valkey-9"];

/// The program that tests start as long as they ask for no other: what `LEASEHOLD_TEST_REDIS_SERVER` names, one of [`NEWER`]
/// or any other as [`Builder::program`] takes it; without that `redis-server`.
pub fn default_program() -> String {
    program_named(&std::env::var("LEASEHOLD_TEST_REDIS_SERVER").unwrap_or_else(|_| "redis-server".into()))
}

/// What to start for a name: of [`NEWER`] the path, else the name itself.
fn program_named(name: &str) -> String {
    if !NEWER.contains(&name) {
        return name.into();
    }
    let tools = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/test-tools/servers");
    tools.join(name).to_string_lossy().into_owned()
}

/// How to get a program that is missing.
fn how_to_get(program: &str) -> &'static str {
    if program.contains("test-tools") {
        "run scripts/install-test-tools"
    } else if program.contains("valkey") {
        "apt-get install -y valkey-server"
    } else {
        "apt-get install -y redis-server"
    }
}

/// How a server is to be started. Without options: no password, nothing saved, port only.
#[derive(Clone, Debug)]
pub struct Builder {
    program: String,
    args: Vec<String>,
    password: Option<String>,
    unix_socket: bool,
    tls: bool,
    own_clock: bool,
    /// What it is configured by, if it is a sentinel.
    sentinel: Option<String>,
}

impl Builder {
    /// Adds arguments as on the command line of the server: `["--appendonly", "yes"]`.
    #[must_use]
    pub fn args<A: Into<String>>(mut self, args: impl IntoIterator<Item = A>) -> Self {
        self.args.extend(args.into_iter().map(Into::into));
        self
    }

    /// Starts another program that takes the same arguments: one of [`NEWER`], or whatever the path or name leads to.
    #[must_use]
    pub fn program(mut self, program: &str) -> Self {
        self.program = program_named(program);
        self
    }

    /// Asks the default user for this password.
    #[must_use]
    pub fn requirepass(mut self, password: &str) -> Self {
        self.password = Some(password.into());
        self.args(["--requirepass", password])
    }

    /// Runs it as a sentinel, by this configuration. Other options are the server's, not a sentinel's.
    #[must_use]
    pub(crate) fn sentinel(mut self, conf: String) -> Self {
        self.sentinel = Some(conf);
        self
    }

    /// Logs in with this password, which the server asks for by its configuration.
    #[must_use]
    pub(crate) fn password_is(mut self, password: &str) -> Self {
        self.password = Some(password.into());
        self
    }

    /// Adds a user by its rule, as in `ACL SETUSER`: `"app on >secret ~* &* +@all"`.
    #[must_use]
    pub fn user(self, rule: &str) -> Self {
        let words = rule.split_whitespace().map(String::from).collect::<Vec<_>>();
        self.args(["--user".to_owned()]).args(words)
    }

    /// Listens on a unix socket too: [`RedisServer::socket`].
    #[must_use]
    pub fn unix_socket(mut self) -> Self {
        self.unix_socket = true;
        self
    }

    /// Listens with TLS on a port of its own too: [`RedisServer::tls_port`].
    #[must_use]
    pub fn tls(mut self) -> Self {
        self.tls = true;
        self
    }

    /// Follows the server on this port of the loopback.
    #[must_use]
    pub fn replica_of(self, port: u16) -> Self {
        self.args(["--replicaof".to_owned(), "127.0.0.1".to_owned(), port.to_string()])
    }

    /// Gives the server a wall clock of its own, moved by [`RedisServer::set_clock_offset`]; needs `cc`.
    #[must_use]
    pub fn own_clock(mut self) -> Self {
        self.own_clock = true;
        self
    }

    /// Starts it and waits until it serves.
    ///
    /// # Panics
    /// If the program is missing, with the line that gets it, or does not come up, with what it printed.
    #[track_caller]
    pub fn start(self) -> RedisServer {
        RedisServer::start_with(self)
    }
}

/// A running server, killed when dropped.
#[derive(Debug)]
pub struct RedisServer {
    builder: Builder,
    folder: TempDir,
    wall_clock: Option<WallClock>,
    port: u16,
    tls_port: u16,
    process: Option<(Child, Arc<Output>)>,
}

/// What a server printed.
#[derive(Debug, Default)]
struct Output {
    state: Mutex<Printed>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Printed {
    last_lines: VecDeque<String>,
    ready: bool,
    ended: bool,
}

impl Output {
    fn follow(self: Arc<Self>, printed: impl Read + Send + 'static) {
        std::thread::spawn(move || {
            for line in BufReader::new(printed).lines().map_while(Result::ok) {
                let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
                // A sentinel says its id instead, when it serves.
                state.ready |=
                    line.contains("Ready to accept connections") || line.contains("Sentinel ID is");
                state.last_lines.push_back(line);
                if state.last_lines.len() > 40 {
                    state.last_lines.pop_front();
                }
                self.changed.notify_all();
            }
            self.state.lock().unwrap_or_else(PoisonError::into_inner).ended = true;
            self.changed.notify_all();
        });
    }

    /// Whether it came up; if not, what it printed.
    fn wait_until_ready(&self) -> Result<(), String> {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let (state, timeout) = self
            .changed
            .wait_timeout_while(state, PATIENCE, |state| !state.ready && !state.ended)
            .unwrap_or_else(PoisonError::into_inner);
        if state.ready && !state.ended && !timeout.timed_out() {
            return Ok(());
        }
        Err(state.last_lines.iter().fold(String::new(), |all, line| all + line + "\n"))
    }
}

impl RedisServer {
    /// Options for a server; its program is [`default_program`].
    #[must_use]
    pub fn builder() -> Builder {
        Builder {
            program: default_program(),
            args: ["--save", "", "--bind", "127.0.0.1", "--repl-diskless-sync-delay", "0"]
                .map(String::from)
                .into(),
            password: None,
            unix_socket: false,
            tls: false,
            own_clock: false,
            sentinel: None,
        }
    }

    /// Starts a server without options.
    #[must_use]
    #[track_caller]
    pub fn start() -> Self {
        Self::builder().start()
    }

    #[track_caller]
    fn start_with(builder: Builder) -> Self {
        let program = builder.program.as_str();
        for (program, help) in [(program, how_to_get(program)), ("setpriv", "apt-get install -y util-linux")]
        {
            assert!(spawn::is_installed(program), "{program} is not installed: {help}");
        }
        let folder =
            tempfile::Builder::new().prefix("leasehold-redis-").tempdir().expect("a temporary folder");
        if builder.tls {
            tls::make_certificates(folder.path());
        }
        let wall_clock = builder.own_clock.then(|| WallClock::new(folder.path()));
        let mut server = Self { builder, folder, wall_clock, port: 0, tls_port: 0, process: None };
        // Between finding a free port and taking it somebody else may: then another port is found.
        let mut last = String::new();
        for _ in 0..20 {
            (server.port, server.tls_port) = (free_port(), free_port());
            match server.launch() {
                Ok(()) => return server,
                Err(printed) if printed.contains("Address already in use") => last = printed,
                Err(printed) => panic!("{} did not come up:\n{printed}", server.builder.program),
            }
        }
        panic!("no port stayed free for {}:\n{last}", server.builder.program);
    }

    fn launch(&mut self) -> Result<(), String> {
        let output = self.launch_without_waiting()?;
        let ready = output.wait_until_ready();
        if ready.is_err() {
            self.kill9();
            return ready;
        }
        match self.command(&["PING"]) {
            Reply::Simple(pong) if pong == "PONG" => Ok(()),
            other => Err(format!("PING gave {other:?}")),
        }
    }

    fn launch_without_waiting(&mut self) -> Result<Arc<Output>, String> {
        let child = spawn::spawn(&self.builder.program, |command| self.configure(command));
        let mut child = child.map_err(|error| error.to_string())?;
        let output = Arc::new(Output::default());
        if let Some(stdout) = child.stdout.take() {
            Arc::clone(&output).follow(stdout);
        }
        self.process = Some((child, Arc::clone(&output)));
        Ok(output)
    }

    fn configure(&self, command: &mut Command) {
        let path = |file: &str| self.folder.path().join(file).to_string_lossy().into_owned();
        if let Some(conf) = &self.builder.sentinel {
            let conf = write_conf(self.folder.path(), conf);
            command.arg(conf).args(["--sentinel", "--bind", "127.0.0.1"]);
            command.args(["--port", &self.port.to_string(), "--dir", &path("")]);
            command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
            return;
        }
        command.args(["--port", &self.port.to_string(), "--dir", &path("")]);
        if self.builder.unix_socket {
            command.args(["--unixsocket", &path("redis.sock")]);
        }
        if self.builder.tls {
            command.args(["--tls-port", &self.tls_port.to_string(), "--tls-auth-clients", "no"]);
            command.args(["--tls-cert-file", &path("server.crt"), "--tls-key-file", &path("server.key")]);
            command.args(["--tls-ca-cert-file", &path("ca.crt")]);
        }
        command.args(&self.builder.args);
        if let Some(clock) = &self.wall_clock {
            clock.give_to(command);
        }
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
    }

    /// The port of the loopback it listens on.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The port it speaks TLS on, if started so; the certificate is by [`ca_certificate`](Self::ca_certificate).
    pub fn tls_port(&self) -> u16 {
        self.tls_port
    }

    /// The file with the certificate of the authority, if started with TLS.
    pub fn ca_certificate(&self) -> PathBuf {
        self.folder.path().join("ca.crt")
    }

    /// The unix socket, if started with one.
    pub fn socket(&self) -> PathBuf {
        self.folder.path().join("redis.sock")
    }

    /// The folder it runs in.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Its URL, without any password.
    pub fn url(&self) -> String {
        format!("redis://127.0.0.1:{}", self.port)
    }

    /// Its process id.
    ///
    /// # Panics
    /// If it does not run.
    pub fn pid(&self) -> u32 {
        self.process.as_ref().expect("the server runs").0.id()
    }

    /// The last lines that it printed.
    pub fn printed(&self) -> String {
        let Some((_, output)) = &self.process else { return "it does not run\n".into() };
        let state = output.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.last_lines.iter().fold(String::new(), |all, line| all + line + "\n")
    }

    /// Whether it was started and not killed since.
    pub fn is_running(&self) -> bool {
        self.process.is_some()
    }

    fn signal(&self, signal: Signal) {
        let pid = i32::try_from(self.pid()).ok().and_then(Pid::from_raw).expect("a pid");
        kill_process(pid, signal).expect("the server takes a signal");
    }

    /// Stops it as an operator would (SIGTERM: it saves, if it saves at all), and waits for its end.
    pub fn stop(&mut self) {
        self.signal(Signal::TERM);
        self.reap();
    }

    /// Kills it, and waits for its end.
    pub fn kill9(&mut self) {
        if let Some((child, _)) = &mut self.process {
            child.kill().expect("a child of ours can be killed");
        }
        self.reap();
    }

    fn reap(&mut self) {
        if let Some((mut child, _)) = self.process.take() {
            child.wait().expect("a child of ours can be waited for");
        }
    }

    /// Starts it again on the same port and in the same folder, killing it first if it runs.
    ///
    /// # Panics
    /// If it does not come up.
    #[track_caller]
    pub fn restart(&mut self) {
        self.kill9();
        if let Err(printed) = self.launch() {
            panic!("the server did not come up again:\n{printed}");
        }
    }

    /// As [`restart`](Self::restart), and returns as soon as it takes connections: it may be loading its data still.
    #[track_caller]
    pub fn restart_without_waiting(&mut self) {
        self.kill9();
        if let Err(printed) = self.launch_without_waiting() {
            panic!("the server did not start again: {printed}");
        }
        crate::eventually("the server takes connections", || {
            TcpStream::connect(("127.0.0.1", self.port)).is_ok()
        });
    }

    /// Stops the process where it stands (SIGSTOP), until [`resume`](Self::resume).
    pub fn pause(&self) {
        self.signal(Signal::STOP);
    }

    /// Lets a paused process go on (SIGCONT).
    pub fn resume(&self) {
        self.signal(Signal::CONT);
    }

    /// Moves the server's wall clock by so many microseconds from the true time, at once.
    ///
    /// # Panics
    /// If it was not started with [`Builder::own_clock`].
    pub fn set_clock_offset(&self, microseconds: i64) {
        self.wall_clock.as_ref().expect("started with own_clock").set_offset(microseconds);
    }

    /// A connection to it, logged in as the default user.
    ///
    /// # Panics
    /// If it cannot be reached.
    #[track_caller]
    pub fn connect(&self) -> Client {
        let mut client = Client::connect(("127.0.0.1", self.port)).expect("the server takes connections");
        if let Some(password) = &self.builder.password {
            let reply = client.call(&["AUTH", password]).expect("the server answers");
            assert_eq!(reply, Reply::Simple("OK".into()), "AUTH");
        }
        client
    }

    /// The reply to one command, on a connection of its own.
    ///
    /// # Panics
    /// If the server cannot be reached or does not answer. An error is a reply.
    #[track_caller]
    pub fn command<A: AsRef<[u8]>>(&self, args: &[A]) -> Reply {
        self.connect().call(args).expect("the server answers")
    }

    /// As [`cli`](Self::cli), or nothing if the connection ended before the reply: sentinels end those of a server whose part they
    /// change.
    pub fn ask(&self, args: &[&str]) -> String {
        let reply = Client::connect(("127.0.0.1", self.port)).and_then(|mut client| client.call(args));
        reply.map_or_else(|_| String::new(), |reply| reply.to_string())
    }

    /// The reply to one command as text, as `redis-cli` prints it into a pipe.
    ///
    /// # Panics
    /// As [`command`](Self::command).
    #[track_caller]
    pub fn cli(&self, args: &[&str]) -> String {
        self.command(args).to_string()
    }
}

impl Drop for RedisServer {
    fn drop(&mut self) {
        self.kill9();
    }
}

/// A port of the loopback that was free a moment ago.
///
/// # Panics
/// If there is none.
pub fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    listener.local_addr().expect("a bound socket has an address").port()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_comes_up_forgets_by_default_and_keeps_its_port() {
        let mut server = RedisServer::start();
        assert_eq!(server.cli(&["SET", "a", "1"]), "OK");
        let (port, pid) = (server.port(), server.pid());
        server.stop();
        assert!(TcpStream::connect(("127.0.0.1", port)).is_err());
        server.restart();
        assert_eq!((server.port(), server.cli(&["GET", "a"])), (port, String::new()));
        assert_ne!(server.pid(), pid);
    }

    #[test]
    fn a_server_that_appends_remembers_after_kill_9() {
        let mut server =
            RedisServer::builder().args(["--appendonly", "yes", "--appendfsync", "always"]).start();
        server.cli(&["SET", "a", "1"]);
        server.restart();
        assert_eq!(server.cli(&["GET", "a"]), "1");
    }

    #[test]
    fn a_paused_server_answers_only_when_resumed() {
        let server = RedisServer::start();
        let mut client = server.connect();
        server.pause();
        client.send(&["PING"]).unwrap();
        assert!(client.receive_within(std::time::Duration::from_millis(50)).is_err());
        server.resume();
        assert_eq!(client.receive_within(PATIENCE).unwrap(), Reply::Simple("PONG".into()));
    }

    #[test]
    fn passwords_and_users_are_asked_for() {
        let server = RedisServer::builder().requirepass("open").user("app on >secret ~app:* +get").start();
        let mut stranger = Client::connect(("127.0.0.1", server.port())).unwrap();
        assert!(stranger.call(&["GET", "a"]).unwrap().to_string().starts_with("NOAUTH"));
        assert_eq!(stranger.call(&["AUTH", "app", "secret"]).unwrap(), Reply::Simple("OK".into()));
        assert!(stranger.call(&["SET", "app:a", "1"]).unwrap().to_string().starts_with("NOPERM"));
        assert_eq!(server.cli(&["SET", "a", "1"]), "OK");
    }

    #[test]
    fn a_replica_follows() {
        let master = RedisServer::start();
        let replica = RedisServer::builder().replica_of(master.port()).start();
        master.cli(&["SET", "a", "1"]);
        crate::eventually("the replica has it", || replica.cli(&["GET", "a"]) == "1");
        assert!(replica.cli(&["SET", "a", "2"]).starts_with("READONLY"));
    }

    #[test]
    fn the_clock_of_a_server_can_be_moved_while_it_runs() {
        let server = RedisServer::builder().own_clock().start();
        let seconds = || server.cli(&["TIME"]).lines().next().unwrap().parse::<i64>().unwrap();
        server.cli(&["SET", "a", "1", "EX", "60"]);
        let before = seconds();
        server.set_clock_offset(-3600 * 1_000_000 - 1);
        assert!((-3601..-3500).contains(&(seconds() - before)));
        assert_eq!(server.cli(&["EXISTS", "a"]), "1");
        server.set_clock_offset(3600 * 1_000_000 + 1);
        assert!((3600..3700).contains(&(seconds() - before)));
        assert_eq!(server.cli(&["EXISTS", "a"]), "0", "a server expires by its wall clock");
    }

    #[test]
    fn tls_and_the_unix_socket_are_served() {
        use std::io::Write as _;
        let server = RedisServer::builder().tls().unix_socket().start();
        let mut socket = std::os::unix::net::UnixStream::connect(server.socket()).unwrap();
        socket.write_all(b"PING\r\n").unwrap();
        let mut pong = [0; 7];
        socket.read_exact(&mut pong).unwrap();
        assert_eq!(&pong, b"+PONG\r\n");
        let handshake = Command::new("openssl")
            .args(["s_client", "-brief", "-verify_return_error", "-verify_ip", "127.0.0.1", "-CAfile"])
            .arg(server.ca_certificate())
            .args(["-connect", &format!("127.0.0.1:{}", server.tls_port())])
            .stdin(Stdio::null())
            .output()
            .unwrap();
        assert!(handshake.status.success(), "{}", String::from_utf8_lossy(&handshake.stderr));
    }

    #[test]
    #[should_panic(expected = "apt-get install -y redis-server")]
    fn a_missing_program_says_how_to_get_it() {
        let _ = RedisServer::builder().program("no-such-server").start();
    }

    #[test]
    #[should_panic(expected = "run scripts/install-test-tools")]
    fn a_missing_newer_server_says_how_to_get_it() {
        let nowhere = NEWER[0].replace("valkey", "test-tools/valkey");
        let _ = RedisServer::builder().program(&nowhere).start();
    }

    #[test]
    fn the_newer_servers_are_what_they_are_called() {
        for name in NEWER {
            let server = RedisServer::builder().program(name).start();
            let info = server.cli(&["INFO", "server"]);
            let (kind, major) = name.split_once('-').unwrap();
            assert!(info.contains(&format!("{kind}_version:{major}.")), "{name}: {info}");
        }
    }

    #[test]
    fn a_dropped_server_is_gone() {
        let server = RedisServer::start();
        let port = server.port();
        drop(server);
        assert!(TcpStream::connect(("127.0.0.1", port)).is_err());
    }
}
