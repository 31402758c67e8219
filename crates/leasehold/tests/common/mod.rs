//! Real servers for the tests of the Redis store.
#![allow(
    dead_code,
    unreachable_pub,
    missing_debug_implementations,
    reason = "each test program uses its part"
)]

use std::io::{BufRead, BufReader};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;

use leasehold::stores::redis::{RedisConfig, RedisStore};
use leasehold_chaos::servers::default_program;
use tempfile::TempDir;

/// A server of this test's own.
pub struct Server {
    pub port: u16,
    pub folder: Arc<TempDir>,
    child: Child,
}

impl Server {
    /// Starts one that keeps nothing, with these further arguments.
    pub fn start(arguments: &[&str]) -> Self {
        Self::start_in(&Arc::new(tempfile::tempdir().unwrap()), arguments)
    }

    /// Starts one in that folder, until it accepts connections.
    pub fn start_in(folder: &Arc<TempDir>, arguments: &[&str]) -> Self {
        Self::start_until("eady to accept connections", folder, arguments)
    }

    /// Starts one in that folder, until its log says so.
    pub fn start_until(sign: &str, folder: &Arc<TempDir>, arguments: &[&str]) -> Self {
        for _ in 0..5 {
            let port = free_port();
            let mut command = Command::new(default_program());
            command.args(["--port", &port.to_string(), "--bind", "127.0.0.1", "--save", "", "--dir"]);
            command.arg(folder.path()).args(arguments);
            if let Some(child) = start(command, sign) {
                return Self { port, folder: folder.clone(), child };
            }
        }
        panic!("{} did not start: its log is above", default_program());
    }

    pub fn url(&self) -> String {
        format!("redis://127.0.0.1:{}", self.port)
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// A plain connection, to look behind the store's back.
    pub fn raw(&self) -> redis::Connection {
        redis::Client::open(self.url()).unwrap().get_connection().unwrap()
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Stops it in its tracks, or lets it go on.
    pub fn freeze(&self, frozen: bool) {
        let pid = rustix::process::Pid::from_child(&self.child);
        let signal = if frozen { rustix::process::Signal::STOP } else { rustix::process::Signal::CONT };
        rustix::process::kill_process(pid, signal).unwrap();
    }

    /// Kills it as a crash would.
    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Kills it and starts it anew on the same port and in the same folder.
    pub fn restart(&mut self, arguments: &[&str]) {
        self.kill();
        let mut command = Command::new(default_program());
        command.args(["--port", &self.port.to_string(), "--bind", "127.0.0.1", "--save", "", "--dir"]);
        command.arg(self.folder.path()).args(arguments);
        self.child =
            start(command, "eady to accept connections").expect("the server starts again on its port");
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// `None` if it ended before its log gave the sign.
fn start(mut command: Command, sign: &str) -> Option<Child> {
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .expect("a server is needed: run scripts/install-test-tools");
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines().map_while(Result::ok);
    let mut log = Vec::new();
    let is_up = lines.by_ref().any(|line| {
        let is_ready = line.contains(sign);
        log.push(line);
        is_ready
    });
    if !is_up {
        eprintln!("{}", log.join("\n"));
        let _ = child.wait();
        return None;
    }
    std::thread::spawn(move || lines.for_each(drop));
    Some(child)
}

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// A store at that URL, its connection on a runtime that ends with the test's process.
pub async fn store(url: &str) -> leasehold::Result<Arc<RedisStore>> {
    RedisStore::connect(RedisConfig::from_url(url)?, runtime()).await
}

/// The runtime of every connection.
pub fn runtime() -> tokio::runtime::Handle {
    static RUNTIME: std::sync::OnceLock<tokio::runtime::Runtime> = std::sync::OnceLock::new();
    RUNTIME
        .get_or_init(|| {
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap()
        })
        .handle()
        .clone()
}

/// Runs openssl, quietly.
pub fn openssl(folder: &Path, arguments: &[&str]) {
    let output = Command::new("openssl")
        .current_dir(folder)
        .args(arguments)
        .output()
        .expect("openssl is needed: apt-get install openssl");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}
