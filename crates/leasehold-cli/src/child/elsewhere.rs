//! Systems without a guardian as yet: everything but `run` works.

use std::convert::Infallible;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;

use leasehold::clock::Instant;

use super::Role;
use crate::plan::{Leash, RunPlan};

fn unsupported() -> io::Error {
    io::Error::new(
        io::ErrorKind::Unsupported,
        "`run` needs Linux as yet: stopping a command in time takes its kernel",
    )
}

pub(crate) fn helper(_: &[OsString]) -> Role {
    Role::Over(crate::exit::FAILURE)
}

pub(crate) fn find_program(_: &OsStr) -> Result<(), (u8, String)> {
    Err((crate::exit::FAILURE, unsupported().to_string()))
}

pub(crate) fn has_terminal() -> bool {
    false
}

pub(crate) fn as_front(_: &[OsString], _: &RunPlan) -> io::Result<u8> {
    Err(unsupported())
}

pub(crate) fn open_descriptor(_: i32) -> io::Result<File> {
    Err(unsupported())
}

pub(crate) fn not_started(_: i32) -> String {
    unsupported().to_string()
}

pub(crate) fn signal_number(_: &str) -> Option<i32> {
    None
}

pub(crate) fn asks_to_end(_: i32) -> bool {
    true
}

pub(crate) type Input = ();

pub(crate) fn os_string(bytes: &[u8]) -> OsString {
    String::from_utf8_lossy(bytes).into_owned().into()
}

#[derive(Debug)]
pub(crate) struct Surroundings {
    pub(crate) stdin: Input,
    pub(crate) group: Option<i32>,
    pub(crate) front: Option<()>,
}

impl Surroundings {
    pub(crate) fn bare() -> io::Result<Self> {
        Err(unsupported())
    }
}

#[derive(Clone, Copy, Debug)]
pub(crate) enum Outside {
    Signal(i32, bool),
    FrontGone,
}

#[derive(Debug)]
pub(crate) struct Signals(Infallible);

impl Signals {
    pub(crate) fn listen(_: Option<()>) -> io::Result<Self> {
        Err(unsupported())
    }

    pub(crate) async fn next(&mut self) -> Outside {
        match self.0 {}
    }
}

#[derive(Clone, Copy, Debug)]
pub(crate) enum Ended {
    Code(u8),
    Signal(u8),
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Report {
    pub(crate) ended: Ended,
    pub(crate) cut_short: bool,
    pub(crate) leftovers: u32,
    pub(crate) reaped_at: Instant,
}

#[derive(Clone, Copy, Debug)]
pub(crate) enum Message {
    Deadline(Instant),
    Stop,
    Signal(i32, bool),
    Started(u32),
    Failed(i32),
    Done(Report),
}

#[derive(Debug)]
pub(crate) struct Orders {
    pub(crate) leash: Leash,
    pub(crate) deadline: Instant,
    pub(crate) group: Option<i32>,
    pub(crate) command: Vec<OsString>,
}

#[derive(Debug)]
pub(crate) struct Guarded(Infallible);

impl Guarded {
    pub(crate) fn start(
        _: &Orders,
        _: &[(&str, Option<OsString>)],
        (): (),
        _: Option<&File>,
    ) -> io::Result<Self> {
        Err(unsupported())
    }

    pub(crate) fn tell(&self, _: Message) {
        match self.0 {}
    }

    pub(crate) async fn next(&mut self) -> Option<Message> {
        match self.0 {}
    }

    pub(crate) fn part(self) {
        match self.0 {}
    }

    pub(crate) fn destroy(self) -> Ended {
        match self.0 {}
    }
}
