//! What the server's answers mean.

use std::time::Duration;

use redis::{RedisError, Value};

use super::keys::{OWNER_BYTES, owner};
use crate::error::{Error, ErrorKind, Result};
use crate::types::{ClaimId, Escaped, FencingToken, Holder, Record};

/// How much of a stranger's value is shown.
const SHOWN_BYTES: usize = 64;

/// An error that the server answered with.
#[derive(Clone, Debug)]
pub(super) struct Refusal {
    pub(super) code: String,
    pub(super) detail: String,
}

impl Refusal {
    pub(super) fn of(error: &redis::ServerError) -> Self {
        let (code, detail) = (error.code(), error.details().unwrap_or_default());
        // Before version 7 the server wraps a script's error: "Error running script (..): @user_script:3: -OOM ...".
        if code == "ERR"
            && let Some((_, inner)) = detail.split_once(": -")
        {
            let (code, detail) = inner.split_once(' ').unwrap_or((inner, ""));
            return Self { code: code.into(), detail: detail.into() };
        }
        Self { code: code.into(), detail: detail.into() }
    }

    pub(super) fn is_unknown_script(&self) -> bool {
        self.code == "NOSCRIPT"
    }

    /// Whether only a server says so that is no master.
    pub(super) fn is_of_no_master(&self) -> bool {
        matches!(self.code.as_str(), "READONLY" | "MASTERDOWN")
    }

    /// Whether it will pass with the failover that it is a part of.
    pub(super) fn ends_with_failover(&self) -> bool {
        self.is_of_no_master() || matches!(self.code.as_str(), "LOADING" | "NOREPLICAS")
    }

    /// Whether a right is lacking: `NOPERM`, or how version 7 says it of a command in a script.
    pub(super) fn is_lacking_right(&self) -> bool {
        self.code == "NOPERM"
            || self.detail.contains("ACL failure in script")
            || self.detail.contains("no permissions to")
            || self.detail.contains("can't run this command or subcommand")
    }

    /// Whether the server has no such command: it is another kind of server, or the command was renamed or switched off.
    pub(super) fn is_unknown_command(&self) -> bool {
        self.code == "ERR" && self.detail.starts_with("unknown command")
    }

    /// The error for a caller.
    pub(super) fn into_error(self, user: Option<&str>) -> Error {
        let rejected = |what: &'static str| Error::new(ErrorKind::Rejected, what);
        let unavailable = |what: &'static str| Error::new(ErrorKind::Unavailable, what);
        let error = match self.code.as_str() {
            "WITHDRAWN" => return rejected("this claim was withdrawn"),
            "QUEUEFULL" => {
                return Error::new(
                    ErrorKind::QueueFull,
                    format!(
                        "{} wait in line already, as many as this mutex allows",
                        Escaped(self.detail.as_bytes())
                    ),
                );
            }
            "BADQUEUE" => {
                return rejected("a key of the lock's line of waiters holds something else")
                    .advise("delete leasehold:{..}:queue:.. and leasehold:{..}:alive:.. of this lock if they are a mistake");
            }
            "BADFENCE" => {
                return rejected("the key of the lock's last token holds something else")
                    .advise("look at it with `leasehold show`, and delete it if it is a mistake: tokens go on from the server's time");
            }
            _ if self.is_lacking_right() => rejected("the server's user has not the right that a lock needs")
                .advise(format!(
                    "user {}: grant what docs/redis.md lists with ACL SETUSER",
                    shown_user(user)
                )),
            _ if self.is_unknown_command() => rejected("the server lacks a command that a lock needs").advise(
                "`leasehold doctor` tries each; EVALSHA and EVAL run the scripts: is one renamed or switched off there?",
            ),
            "NOAUTH" => rejected("the server wants a login").advise(format!(
                "give a password in the URL, by password_file or in {}",
                super::config::PASSWORD_VARIABLE
            )),
            "WRONGPASS" => rejected("the server refused the login")
                .advise(format!("check the password of user {}", shown_user(user))),
            "LOADING" => unavailable("the server is still loading its data"),
            "MASTERDOWN" => unavailable("the server is a replica that has lost its master"),
            "CLUSTERDOWN" => unavailable("the cluster is down"),
            "TRYAGAIN" => unavailable("the cluster is moving the lock's slot"),
            "BUSY" => unavailable("the server is busy with somebody's slow script"),
            "READONLY" => rejected("the server is a read-only replica").advise("connect to the master"),
            "OOM" => rejected("the server's memory is full").advise("raise maxmemory, or free some"),
            "MISCONF" => rejected("the server cannot save to its disk, and refuses writes until it can")
                .advise("look at its log"),
            "NOREPLICAS" => rejected("the server has not the replicas that it demands for writes"),
            "MOVED" | "ASK" | "CROSSSLOT" => rejected("the server is a node of a cluster")
                .advise("connect to the cluster: redis+cluster://"),
            "WRONGTYPE" => return rejected("the lock's key holds another type of value").advise(
                "Redisson keeps its locks as a hash under the same key: it and Leasehold cannot share a name",
            ),
            _ if self.detail.contains("max number of clients") => {
                return unavailable("the server has as many clients as it allows")
                    .advise("raise maxclients, or close idle clients");
            }
            _ => rejected("the server refused the command"),
        };
        error.caused_by(self)
    }
}

impl std::fmt::Display for Refusal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {}", Escaped(self.code.as_bytes()), Escaped(self.detail.as_bytes()))
    }
}

impl std::error::Error for Refusal {}

fn shown_user(user: Option<&str>) -> String {
    Escaped(user.unwrap_or("default").as_bytes()).to_string()
}

/// Whether the answer says that the server does not know a script by its digest.
pub(super) fn is_unknown_script(answer: &Value) -> bool {
    matches!(answer, Value::ServerError(error) if Refusal::of(error).is_unknown_script())
}

/// Whether the server does not know the newer protocol's greeting.
pub(super) fn is_unknown_hello(error: &RedisError) -> bool {
    let detail = error.detail().unwrap_or_default();
    error.kind() == redis::ErrorKind::RESP3NotSupported
        || error.code() == Some("NOPROTO")
        || (detail.starts_with("unknown command") && detail.contains("HELLO"))
}

/// The error of a dial that failed: nothing was sent on it. `farewell` is what the server said as it closed.
pub(super) fn not_connected(error: &RedisError, farewell: Option<String>, user: Option<&str>) -> Error {
    let mut refusal = Refusal {
        code: error.code().unwrap_or_default().into(),
        detail: error.detail().unwrap_or_default().into(),
    };
    if let Some(words) = farewell {
        let (code, detail) = words.split_once(' ').unwrap_or((&words, ""));
        refusal = Refusal { code: code.into(), detail: detail.into() };
    }
    match error.kind() {
        redis::ErrorKind::AuthenticationFailed => {
            Refusal { code: "WRONGPASS".into(), ..refusal }.into_error(user)
        }
        redis::ErrorKind::InvalidClientConfig => {
            Error::new(ErrorKind::Invalid, "the server's address or certificates are wrong")
                .caused_by(error.clone())
        }
        _ if refusal.code.is_empty() => Error::new(ErrorKind::Unavailable, "could not connect")
            .caused_by(error.clone())
            .advise("is the server running, and is the address right?"),
        _ => refusal.into_error(user),
    }
}

/// An answer that no version of the scripts gives.
pub(super) fn unexpected(value: &Value) -> Error {
    let shown: String = format!("{value:?}").chars().take(200).collect();
    Error::new(
        ErrorKind::Rejected,
        format!("the server gave an answer that makes no sense: {}", Escaped(shown.as_bytes())),
    )
    .advise("is it a Redis or Valkey server?")
}

/// What stands at a lock's key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Occupant {
    /// A claim of Leasehold's.
    Claim { id: ClaimId, token: FencingToken, record: Option<Record> },
    /// A claim by a protocol that this version does not know.
    Newer(String),
    /// Another library's value.
    Foreign(String),
}

impl Occupant {
    pub(super) fn read(value: &[u8]) -> Self {
        let foreign = || {
            let shown = Escaped(&value[..value.len().min(SHOWN_BYTES)]).to_string();
            if is_another_version(value) { Self::Newer(shown) } else { Self::Foreign(shown) }
        };
        Self::read_claim(value).unwrap_or_else(foreign)
    }

    fn read_claim(value: &[u8]) -> Option<Self> {
        let (head, rest) = value.split_at_checked(OWNER_BYTES)?;
        let id = ClaimId::parse(std::str::from_utf8(&head[4..OWNER_BYTES - 1]).ok()?)?;
        // The last byte only says whether others wait.
        let expected = owner(id);
        if head[..OWNER_BYTES - 1] != expected[..OWNER_BYTES - 1]
            || !matches!(head[OWNER_BYTES - 1], b':' | b'!')
        {
            return None;
        }
        let end = rest.iter().position(|byte| *byte == b':')?;
        let token = read_token(&rest[..end])?;
        Some(Self::Claim { id, token, record: Record::decode(&rest[end + 1..]) })
    }

    /// As others see it.
    pub(super) fn into_holder(self, remaining_ms: i64) -> Holder {
        let mut holder = Holder { remaining: remaining(remaining_ms), ..Holder::default() };
        match self {
            Self::Claim { id, token, record } => {
                holder.id = Some(id);
                holder.token = Some(token);
                holder.record = record;
            }
            Self::Newer(shown) | Self::Foreign(shown) => holder.foreign = Some(shown),
        }
        holder
    }
}

/// `lh`, a digit and a colon, other than ours.
fn is_another_version(value: &[u8]) -> bool {
    let digits =
        value.strip_prefix(b"lh").map_or(0, |rest| rest.iter().take_while(|b| b.is_ascii_digit()).count());
    digits > 0 && value.get(2 + digits) == Some(&b':') && !value.starts_with(b"lh1:")
}

pub(super) fn read_token(text: &[u8]) -> Option<FencingToken> {
    // A fence has marks after its digits while others wait, or claims are forbidden.
    let digits = text.iter().take_while(|byte| byte.is_ascii_digit()).count();
    let (text, marks) = text.split_at(digits);
    if !matches!(marks.first(), None | Some(b'!' | b'~')) {
        return None;
    }
    let number = std::str::from_utf8(text).ok()?.parse().ok()?;
    (number > 0 && number <= FencingToken::MAX).then(|| FencingToken::new(number))
}

/// The time that PTTL answered; `None` for a key that never ends.
pub(super) fn remaining(ms: i64) -> Option<Duration> {
    u64::try_from(ms).ok().map(Duration::from_millis)
}

/// The text of an answer, in whichever form the protocol gives it.
pub(super) fn text(value: &Value) -> Option<String> {
    match value {
        Value::BulkString(bytes) => Some(String::from_utf8_lossy(bytes).into_owned()),
        Value::SimpleString(text) | Value::VerbatimString { text, .. } => Some(text.clone()),
        Value::Okay => Some("OK".into()),
        Value::Int(number) => Some(number.to_string()),
        _ => None,
    }
}

/// The value, unless it is a refusal.
pub(super) fn accepted(value: Value, user: Option<&str>) -> Result<Value> {
    match value {
        Value::ServerError(error) => Err(Refusal::of(&error).into_error(user)),
        value => Ok(value),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(code: &str, detail: &str) -> Error {
        Refusal { code: code.into(), detail: detail.into() }.into_error(Some("al\nice"))
    }

    #[test]
    fn each_refusal_says_what_the_caller_can_do() {
        for code in ["LOADING", "MASTERDOWN", "CLUSTERDOWN", "TRYAGAIN", "BUSY"] {
            assert_eq!(refusal(code, "x").kind(), ErrorKind::Unavailable, "{code}");
        }
        for code in
            ["READONLY", "OOM", "NOAUTH", "WRONGPASS", "NOPERM", "WRONGTYPE", "MISCONF", "ERR", "WITHDRAWN"]
        {
            assert_eq!(refusal(code, "x").kind(), ErrorKind::Rejected, "{code}");
        }
        assert_eq!(refusal("ERR", "max number of clients reached").kind(), ErrorKind::Unavailable);
        assert!(
            refusal("NOPERM", "no permissions to run the 'evalsha' command")
                .to_string()
                .contains("al\\u{a}ice")
        );
        assert!(
            refusal("NOPERM", "no permissions to run the 'evalsha' command").to_string().contains("evalsha")
        );
        assert!(refusal("WRONGTYPE", "").to_string().contains("Redisson"));
    }

    #[test]
    fn a_value_is_read_as_ours_newer_or_foreign() {
        let id = ClaimId::from_bytes([7; 16]);
        let ours = format!("lh1:{id}:42:{{\"host\":\"h\"}}");
        let Occupant::Claim { id: read, token, record } = Occupant::read(ours.as_bytes()) else { panic!() };
        assert_eq!((read, token.get(), record.unwrap().host.as_str()), (id, 42, "h"));
        assert!(matches!(Occupant::read(b"lh2:x"), Occupant::Newer(_)));
        assert!(matches!(Occupant::read(b"lh23:x"), Occupant::Newer(_)));
        for foreign in [&b""[..], b"lh", b"lh:", b"lhx:1", b"lh1:", b"lh1:zz", b"2d1f", b"\xff\x00"] {
            assert!(matches!(Occupant::read(foreign), Occupant::Foreign(_)), "{foreign:?}");
        }
        let broken = format!("lh1:{id}:x:{{}}");
        assert!(matches!(Occupant::read(broken.as_bytes()), Occupant::Foreign(_)));
        let Occupant::Foreign(shown) = Occupant::read(&[b'\n'; 1000]) else { panic!() };
        assert_eq!(shown, "\\u{a}".repeat(64));
    }
}
