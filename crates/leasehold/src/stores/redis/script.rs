//! Scripts: called by their digest, and sent whole where the server does not know it.

use std::sync::LazyLock;

use redis::{Cmd, RedisWrite};

/// A script and its digest.
#[derive(Debug)]
pub(super) struct Script {
    body: &'static str,
    digest: LazyLock<String, fn() -> String>,
}

macro_rules! script {
    ($name:ident, $($file:literal),+) => {
        pub(super) static $name: Script = Script {
            body: concat!($(include_str!($file)),+),
            digest: LazyLock::new(|| redis::Script::new(concat!($(include_str!($file)),+)).get_hash().to_owned()),
        };
    };
}

script!(ACQUIRE, "line.lua", "acquire.lua");
script!(RENEW, "renew.lua");
script!(INDEX, "index.lua");
script!(RELEASE, "release_plain.lua", "line.lua", "release.lua");
script!(REFRESH, "line.lua", "refresh.lua");
script!(INSPECT, "inspect.lua");
script!(LIST, "list.lua");
script!(REPLICATE, "replicate.lua");
script!(FENCED_SET, "fenced_set.lua");

/// How a script is named in a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum By {
    /// By its digest.
    Digest,
    /// By its text: the server learns it.
    Text,
}

impl Script {
    /// A call with room for so many more arguments and bytes.
    pub(super) fn call(&self, by: By, keys: usize, arguments: usize, bytes: usize) -> Cmd {
        let (verb, script): (&[u8], &str) = match by {
            By::Digest => (b"EVALSHA", &self.digest),
            By::Text => (b"EVAL", self.body),
        };
        let mut call = Cmd::with_capacity(3 + keys + arguments, script.len() + bytes + 16);
        call.write_arg(verb);
        call.write_arg(script.as_bytes());
        call.write_arg_fmt(keys);
        call
    }
}
