//! What `run` tells: messages for people on standard error, events for programs.

use std::cell::RefCell;
use std::fs::File;
use std::io::Write as _;

use leasehold::Holder;
use serde_json::{Value, json};

use crate::view;

/// Where messages and events go.
#[derive(Debug)]
pub(crate) struct Reporter {
    name: String,
    events: RefCell<Option<File>>,
    json: bool,
    quiet_if_busy: bool,
}

impl Reporter {
    /// For the lock `name`; events go to `events`, and to standard error instead of messages if `json`. On standard error
    /// nothing is said of other holders if `quiet_if_busy`.
    pub(crate) fn new(name: &leasehold::Name, events: Option<File>, json: bool, quiet_if_busy: bool) -> Self {
        Self { name: name.to_string(), events: RefCell::new(events), json, quiet_if_busy }
    }

    /// Tells an event, and what a person is told of it, if anything.
    pub(crate) fn tell(&self, event: &str, details: Value, message: Option<String>) {
        self.write(event, details, message, true);
    }

    fn write(&self, event: &str, details: Value, message: Option<String>, aloud: bool) {
        let mut object = json!({
            "event": event,
            "name": self.name,
            "unix_ms": u64::try_from(leasehold::clock::wall().as_millis()).unwrap_or(u64::MAX),
        });
        if let (Some(object), Value::Object(details)) = (object.as_object_mut(), details) {
            object.extend(details);
        }
        let line = view::json_line(&object);
        if let Some(file) = &mut *self.events.borrow_mut() {
            // Whoever asked for events and does not read them any more must not stop the command.
            let _ = file.write_all(line.as_bytes());
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
