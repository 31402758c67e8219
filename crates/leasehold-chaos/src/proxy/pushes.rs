//! Faults of what the server sends unasked: the messages of a subscription.

use std::io::Write;
use std::net::TcpStream;
use std::sync::{Arc, Mutex, PoisonError};

use super::{Injected, Progress, Proxy, Shared};
use crate::resp::Reply;

/// What happens to a message that was named.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PushFault {
    /// It is thrown away.
    Drop,
    /// It waits for [`Injected::release`], while all that comes after it on the connection goes on.
    Hold,
}

type Likeness = dyn Fn(&[u8]) -> bool + Send;

pub(super) struct PushRule {
    id: u64,
    matches: Box<Likeness>,
    fault: PushFault,
}

impl Proxy {
    /// The messages that the server sent to subscribers, in the order of their arrival here, since the last
    /// [`forget`](Self::forget); also those that met a fault.
    pub fn messages(&self) -> Vec<Vec<u8>> {
        self.shared.state().messages.clone()
    }

    /// Waits until so many messages came since the last [`forget`](Self::forget).
    ///
    /// # Panics
    /// After [`PATIENCE`](crate::PATIENCE).
    #[track_caller]
    pub fn wait_for_messages(&self, count: usize) {
        self.shared.wait_until(&format!("{count} messages"), |state| state.messages.len() >= count);
    }

    /// Lets `fault` happen to the first message from now on that is like this, once.
    pub fn inject_push(&self, fault: PushFault, like: impl Fn(&[u8]) -> bool + Send + 'static) -> Injected {
        let id = self.shared.change(|state| {
            state.next_id += 1;
            let id = state.next_id;
            state.push_rules.push(PushRule { id, matches: Box::new(like), fault });
            state.progress.insert(id, Progress::default());
            id
        });
        Injected { id, shared: Arc::clone(&self.shared) }
    }
}

/// Writes a message down, and finds the fault that it is to meet.
pub(super) fn note(shared: &Shared, connection: u64, push: &Reply) -> Option<(u64, PushFault)> {
    let Reply::Array(Some(parts)) = push else { return None };
    let [Reply::Bulk(Some(kind)), _, Reply::Bulk(Some(message))] = parts.as_slice() else { return None };
    if kind != b"message" {
        return None;
    }
    shared.change(|state| {
        let hit = state.push_rules.iter().position(|rule| (rule.matches)(message));
        let hit = hit.map(|index| state.push_rules.remove(index)).map(|rule| (rule.id, rule.fault));
        if let Some((rule, _)) = hit {
            let progress = state.progress.entry(rule).or_default();
            progress.hit = true;
            progress.connection = connection;
        }
        state.messages.push(message.clone());
        hit
    })
}

/// The side of a connection on which the client reads: held messages are written by a thread of their own.
#[derive(Clone)]
pub(super) struct Writer(pub(super) Arc<Mutex<TcpStream>>);

impl Writer {
    pub(super) fn write(&self, bytes: &[u8]) -> std::io::Result<()> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).write_all(bytes)
    }

    /// Writes it when its fault is released, whatever has become of the connection by then.
    pub(super) fn write_later(&self, shared: Arc<Shared>, rule: u64, bytes: Vec<u8>) {
        let writer = self.clone();
        std::thread::spawn(move || {
            shared.block_while(|state| !state.progress[&rule].released);
            let _ = writer.write(&bytes);
            shared.change(|state| state.progress.entry(rule).or_default().passed = true);
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::PATIENCE;
    use crate::resp::Client;
    use crate::servers::RedisServer;

    #[test]
    fn messages_are_counted_dropped_and_held_and_nothing_else_is() {
        let server = RedisServer::start();
        let proxy = Proxy::start(server.port());
        let mut client = Client::connect(("127.0.0.1", proxy.port())).unwrap();
        client.call(&["HELLO", "3"]).unwrap();
        client.call(&["SUBSCRIBE", "news"]).unwrap();
        let dropped = proxy.inject_push(PushFault::Drop, |message| message == b"one");
        let held = proxy.inject_push(PushFault::Hold, |message| message == b"two");
        for message in ["zero", "one", "two", "three"] {
            assert_eq!(server.cli(&["PUBLISH", "news", message]), "1");
        }
        let mut next = || client.receive_within(PATIENCE).unwrap().to_string();
        assert_eq!((next(), next()), ("message\nnews\nzero".into(), "message\nnews\nthree".into()));
        assert!(dropped.happened() && held.happened());
        held.release();
        assert_eq!(next(), "message\nnews\ntwo");
        assert_eq!(proxy.messages(), [&b"zero"[..], b"one", b"two", b"three"]);
        assert_eq!(client.call(&["PING"]).unwrap().to_string(), "PONG");
    }
}
