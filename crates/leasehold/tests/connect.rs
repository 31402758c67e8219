//! Connecting, given up at every await: no thread, no connection, no task is left.

#![allow(clippy::unwrap_used)]

use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Wake, Waker};

use leasehold_chaos::eventually;
use leasehold_chaos::servers::RedisServer;

/// The names of this process's threads that begin with `leasehold-keep`.
fn keepers() -> usize {
    std::fs::read_dir("/proc/self/task")
        .unwrap()
        .filter_map(|task| std::fs::read_to_string(task.unwrap().path().join("comm")).ok())
        .filter(|name| name.starts_with("leasehold-keep"))
        .count()
}

fn connections(server: &RedisServer) -> usize {
    server.cli(&["CLIENT", "LIST"]).matches("id=").count()
}

struct Called(AtomicBool);

impl Wake for Called {
    fn wake(self: Arc<Self>) {
        self.0.store(true, Ordering::SeqCst);
    }
}

/// Polls so often, each time when it was asked for, and drops. True if it was ready before.
fn drop_after(polls: usize, work: impl Future) -> bool {
    let called = Arc::new(Called(AtomicBool::new(true)));
    let waker = Waker::from(called.clone());
    let mut work = pin!(work);
    for _ in 0..polls {
        eventually("the future asks to be polled", || called.0.swap(false, Ordering::SeqCst));
        if let Poll::Ready(_done) = work.as_mut().poll(&mut Context::from_waker(&waker)) {
            return true;
        }
    }
    false
}

#[test]
fn connecting_given_up_or_failed_leaves_no_thread_and_no_connection() {
    let server = RedisServer::start();
    let (threads, before) = (keepers(), connections(&server));
    let url = server.url();
    let mut ended = false;
    for polls in 0..30 {
        if drop_after(polls, leasehold::connect(&url)) {
            ended = true;
            break;
        }
    }
    assert!(ended, "never polled to the end");
    // Nor does one that fails. (In one test: both count the threads of this process.)
    let nobody = format!("redis://127.0.0.1:{}", leasehold_chaos::servers::free_port());
    for _ in 0..20 {
        assert!(pollster::block_on(leasehold::connect(&nobody)).is_err());
    }
    eventually("the threads end", || keepers() == threads);
    eventually("the connections are closed", || connections(&server) == before);
}
