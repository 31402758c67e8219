//! What `run` tells: messages for people on standard error, events for programs.

use std::fs::File;
use std::io::Write as _;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use leasehold::Holder;
use serde_json::{Value, json};

use crate::view;

/// A thread that writes events: whoever asked for them and does not read them must not stop the command.
#[derive(Debug)]
struct Events {
    lines: Sender<String>,
    /// Ends when all is written.
    written: Receiver<()>,
}

impl Events {
    /// How long the end of a run waits for a reader of its last events.
    const PATIENCE: Duration = Duration::from_secs(1);

    fn to(mut file: File) -> Self {
        let (lines, to_write) = channel::<String>();
        let (at_the_end, written) = channel();
        std::thread::spawn(move || {
            for line in to_write {
                let _ = file.write_all(line.as_bytes());
            }
            drop(at_the_end);
        });
        Self { lines, written }
    }

    fn finish(self) {
        drop(self.lines);
        let _ = self.written.recv_timeout(Self::PATIENCE);
    }
}

impl Drop for Reporter {
    fn drop(&mut self) {
        if let Some(events) = self.events.take() {
            events.finish();
        }
    }
}

/// Where messages and events go.
#[derive(Debug)]
pub(crate) struct Reporter {
    names: Vec<String>,
    events: Option<Events>,
    json: bool,
    quiet_if_busy: bool,
}

impl Reporter {
    /// For the locks `names`; events go to `events`, and to standard error instead of messages if `json`. On standard error
    /// nothing is said of other holders if `quiet_if_busy`.
    pub(crate) fn new(
        names: &[leasehold::Name],
        events: Option<File>,
        json: bool,
        quiet_if_busy: bool,
    ) -> Self {
        let names = names.iter().map(ToString::to_string).collect();
        Self { names, events: events.map(Events::to), json, quiet_if_busy }
    }

    /// Tells an event, and what a person is told of it, if anything.
    pub(crate) fn tell(&self, event: &str, details: Value, message: Option<String>) {
        self.write(event, details, message, true);
    }

    fn write(&self, event: &str, details: Value, message: Option<String>, aloud: bool) {
        let mut object = json!({
            "event": event,
            "unix_ms": u64::try_from(leasehold::clock::wall().as_millis()).unwrap_or(u64::MAX),
        });
        if let (Some(object), Value::Object(details)) = (object.as_object_mut(), details) {
            match &self.names[..] {
                [name] => object.insert("name".into(), json!(name)),
                names => object.insert("names".into(), json!(names)),
            };
            object.extend(details);
        }
        let line = view::json_line(&object);
        if let Some(events) = &self.events {
            let _ = events.lines.send(line.clone());
        }
        if !aloud {
            return;
        }
        if self.json {
            let _ = std::io::stderr().write_all(line.as_bytes());
        } else if let Some(message) = message {
            say(&message);
        }
    }

    /// Tells that somebody else holds the lock.
    pub(crate) fn held_by(&self, event: &str, holder: Option<&Holder>, message: impl FnOnce(&str) -> String) {
        let who = holder.map_or_else(|| "somebody else".to_owned(), ToString::to_string);
        let details = json!({ "holder": holder.map(view::holder_json) });
        self.write(event, details, Some(message(&who)), !self.quiet_if_busy);
    }

    /// Tells something worth knowing that changes nothing.
    pub(crate) fn note(&self, message: &str) {
        self.tell("note", json!({ "message": message }), Some(message.to_owned()));
    }

    /// Tells that Leasehold failed; returns `code`.
    pub(crate) fn failed(&self, why: &str, code: u8) -> u8 {
        self.tell("failed", json!({ "error": why, "code": code }), Some(why.to_owned()));
        code
    }
}

/// Writes one line of ours to standard error.
pub(crate) fn say(message: &str) {
    // In one piece, so that lines of several processes do not mix.
    let _ = std::io::stderr().write_all(format!("leasehold: {message}\n").as_bytes());
}
