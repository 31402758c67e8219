//! What the tests of bad days share: a server, a link to it that can be made to fail, and locks by way of that link.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used, reason = "each test program uses its part")]

pub mod other;

use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::task::{Context, Wake, Waker};
use std::thread::JoinHandle;
use std::time::Duration;

use leasehold::{Guard, Locks, Mutex, clock};
use leasehold_chaos::proxy::{Command, Proxy};
use leasehold_chaos::servers::RedisServer;
use leasehold_chaos::{PATIENCE, eventually};
use pollster::block_on;

pub fn ms(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

/// A server, a link to it, and locks by way of the link. The server knows all scripts already.
pub fn linked() -> (RedisServer, Proxy, Locks) {
    linked_to(RedisServer::start(), "")
}

/// As [`linked`], to this server and with these parameters of the URL.
pub fn linked_to(server: RedisServer, parameters: &str) -> (RedisServer, Proxy, Locks) {
    let proxy = Proxy::start(server.port());
    let locks = connect(&format!("{}{parameters}", proxy.url()));
    warm_up(&locks);
    proxy.forget();
    (server, proxy, locks)
}

pub fn connect(url: &str) -> Locks {
    block_on(leasehold::connect(url)).unwrap()
}

/// Lets the server learn the scripts, so that a fault hits the command that is meant and not its NOSCRIPT.
pub fn warm_up(locks: &Locks) {
    let guard = lock(&locks.mutex("warm-up"));
    block_on(guard.extend(ms(60_000))).unwrap();
    block_on(guard.unlock()).unwrap();
}

pub fn lock(mutex: &Mutex) -> Guard {
    block_on(mutex.lock()).unwrap()
}

/// What `lock` gives, or a failure after ten seconds: much longer than any TTL here.
pub fn lock_soon(mutex: &Mutex) -> Guard {
    block_on(mutex.lock_for(ms(10_000))).unwrap().expect("the lock is free within ten seconds")
}

/// A thread that waits for a lock, and is in line.
pub struct Waiter {
    thread: JoinHandle<Guard>,
    places: Receiver<Option<u64>>,
}

impl Waiter {
    /// Starts one; returns when it is in line.
    #[track_caller]
    pub fn start(mutex: &Mutex) -> Self {
        let (sender, places) = channel();
        let mutex = mutex.clone().on_wait(move |ticket| {
            let _ = sender.send(ticket.ahead());
        });
        let waiter = Self { thread: std::thread::spawn(move || lock(&mutex)), places };
        waiter.joins_line();
        waiter
    }

    /// Returns when it has been told its place once more.
    #[track_caller]
    pub fn joins_line(&self) {
        self.places.recv_timeout(PATIENCE).expect("it joins the line, in time");
    }

    pub fn has_ended(&self) -> bool {
        self.thread.is_finished()
    }

    /// The guard that it gets.
    #[track_caller]
    pub fn guard(self) -> Guard {
        eventually("the waiter gets the lock", || self.thread.is_finished());
        self.thread.join().unwrap()
    }
}

/// How many wait in line for a lock.
pub fn in_line(server: &RedisServer, name: &str) -> usize {
    server.cli(&["LLEN", &format!("leasehold:{{{name}}}:queue:{name}")]).parse().unwrap()
}

/// Nothing of a line is left at the server for that lock, which is free.
#[track_caller]
pub fn assert_no_line(server: &RedisServer, name: &str) {
    let side = |kind: &str| format!("leasehold:{{{name}}}:{kind}:{name}");
    eventually("the lock is free and its line is gone", || {
        server.cli(&["EXISTS", name, &side("queue"), &side("alive")]) == "0"
    });
}

fn has(command: &Command, part: &str) -> bool {
    command.args.iter().any(|arg| arg.windows(part.len()).any(|window| window == part.as_bytes()))
}

/// Whether it presents a claim of the lock `name`: it brings the record.
pub fn acquires(name: &'static str) -> impl Fn(&Command) -> bool + Send + Copy + 'static {
    move |command| command.is_script() && command.mentions(name) && has(command, "\"host\"")
}

/// Whether it renews the lock `name`, perhaps among others.
pub fn renews(name: &'static str) -> impl Fn(&Command) -> bool + Send + Copy + 'static {
    move |command| command.is_script() && command.mentions(name) && has(command, "leasehold:index:")
}

/// Whether it keeps waiters for the lock `name` in line.
pub fn refreshes(name: &'static str) -> impl Fn(&Command) -> bool + Send + Copy + 'static {
    move |command| {
        command.is_script()
            && command.mentions(name)
            && has(command, "leasehold:push:")
            && !acquires(name)(command)
    }
}

/// Whether it asks for messages.
pub fn subscribes(command: &Command) -> bool {
    command.name() == "SUBSCRIBE"
}

/// Whether it releases the lock `name`, or leaves its line: of the rest only these bring the beginning of a value.
pub fn releases(name: &'static str) -> impl Fn(&Command) -> bool + Send + Copy + 'static {
    move |command| {
        command.is_script()
            && command.mentions(name)
            && command.args.iter().any(|arg| arg.starts_with(b"lh1:"))
            && !acquires(name)(command)
            && !renews(name)(command)
    }
}

/// Whether it is about the lock `name` at all.
pub fn about(name: &'static str) -> impl Fn(&Command) -> bool + Send + Copy + 'static {
    move |command| has(command, name)
}

/// Polls `work` until `stop` says so, and drops it in the middle of what it does; panics if it ends before.
pub fn abandon<T>(work: impl Future<Output = T>, mut stop: impl FnMut() -> bool) {
    struct Unpark(std::thread::Thread);
    impl Wake for Unpark {
        fn wake(self: Arc<Self>) {
            self.0.unpark();
        }
    }
    let waker = Waker::from(Arc::new(Unpark(std::thread::current())));
    let mut work = pin!(work);
    let latest = clock::now().plus(leasehold_chaos::PATIENCE);
    loop {
        assert!(
            work.as_mut().poll(&mut Context::from_waker(&waker)).is_pending(),
            "it ended before it was dropped"
        );
        if stop() {
            return;
        }
        assert!(clock::now() < latest, "never came to the point where it is dropped");
        std::thread::park_timeout(ms(5));
    }
}
