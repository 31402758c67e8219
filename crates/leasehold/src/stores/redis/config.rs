//! What a Redis URL says.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use url::Url;

use super::sentinel::{SENTINEL_FORM, SENTINEL_PASSWORD_VARIABLE, SENTINEL_USERNAME_VARIABLE, Sentinels};
use crate::error::{Error, Result};
use crate::types::{Escaped, RESERVED_PREFIX};

/// How long a command may take unless the URL says otherwise.
pub const DEFAULT_TIMEOUT: Duration = Duration::from_secs(2);
/// Used where the URL names no user.
pub const USERNAME_VARIABLE: &str = "LEASEHOLD_REDIS_USERNAME";
/// Used where the URL has no password.
pub const PASSWORD_VARIABLE: &str = "LEASEHOLD_REDIS_PASSWORD";

const FORM: &str = "redis://[user[:password]@]host[:port][/database][?prefix=..&timeout=2s&ca=FILE&password_file=FILE&line=no]";

/// A text that nothing prints.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct Secret(String);

impl Secret {
    pub(super) fn new(text: String) -> Self {
        Self(text)
    }

    pub(super) fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("(secret)")
    }
}

/// Where the server listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Address {
    Tcp {
        host: String,
        port: u16,
        tls: bool,
    },
    Unix(PathBuf),
    /// Wherever these say.
    Sentinel(Box<Sentinels>),
}

impl Address {
    fn is_tls(&self) -> bool {
        match self {
            Self::Tcp { tls, .. } => *tls,
            Self::Unix(_) => false,
            Self::Sentinel(sentinels) => sentinels.tls,
        }
    }
}

/// How to reach a Redis or Valkey server: a checked URL. Neither `Debug` nor an error shows its password.
#[derive(Clone, Debug)]
pub struct RedisConfig {
    pub(super) address: Address,
    pub(super) username: Option<String>,
    pub(super) password: Option<Secret>,
    pub(super) password_file: Option<PathBuf>,
    pub(super) ca: Option<PathBuf>,
    pub(super) database: u32,
    pub(super) prefix: Vec<u8>,
    pub(super) timeout: Duration,
    /// Whether waiters stand in line.
    pub(super) line: bool,
}

impl RedisConfig {
    /// Reads a URL, without any I/O: files that it names are read when the store connects.
    ///
    /// Schemes: `redis`, `valkey` (TCP), `rediss`, `valkeys` (TLS), `redis+unix`, `valkey+unix`, `unix` (a socket's path).
    /// The default port is 6379. Parameters: `prefix`, `timeout` (default `2s`), `ca`, `password_file`,
    /// `line` (`yes`, the default, or `no`: as [`without_line`](Self::without_line)), and for a socket `db` and `user`.
    ///
    /// With `+sentinel` after the scheme it names sentinels, separated by commas (default port 26379), and in its path the
    /// master: `redis+sentinel://host,host2/master/database`. Then there are also `sentinel_user`, `sentinel_password` and
    /// `sentinel_password_file`.
    ///
    /// # Errors
    /// `Invalid`, naming the part that is wrong.
    pub fn from_url(text: &str) -> Result<Self> {
        let Some((sentinels, server)) =
            Sentinels::split(text).map_err(|error| error.advise(SENTINEL_FORM))?
        else {
            return Self::read(text, None);
        };
        Self::read(&server, Some(sentinels)).map_err(|error| error.advise(SENTINEL_FORM))
    }

    /// Reads the URL of one server; it is the master that these sentinels name, if there are any.
    fn read(text: &str, sentinels: Option<Sentinels>) -> Result<Self> {
        // The parser's own words never repeat the text, which may hold a password.
        let url = Url::parse(text).map_err(|error| bad(format!("the URL of the Redis server: {error}")))?;
        let address = match sentinels {
            Some(sentinels) => Address::Sentinel(Box::new(sentinels)),
            None => address(&url)?,
        };
        let mut config = Self {
            address,
            username: non_empty(decoded(url.username(), "user")?),
            password: url
                .password()
                .map(|text| decoded(text, "password"))
                .transpose()?
                .and_then(non_empty)
                .map(Secret),
            password_file: None,
            ca: None,
            database: 0,
            prefix: Vec::new(),
            timeout: DEFAULT_TIMEOUT,
            line: true,
        };
        if !matches!(config.address, Address::Unix(_)) {
            config.database = database(url.path().trim_start_matches('/'))?;
        }
        let mut seen = Vec::new();
        for pair in url.query().unwrap_or_default().split('&').filter(|pair| !pair.is_empty()) {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            if seen.contains(&key) {
                return Err(bad(format!("the parameter {} stands twice", shown(key))));
            }
            seen.push(key);
            config.take_parameter(key, value)?;
        }
        if url.fragment().is_some() {
            return Err(bad("a # ends the URL's text: write it as %23"));
        }
        config.check()
    }

    fn take_parameter(&mut self, key: &str, value: &str) -> Result<()> {
        if let Address::Sentinel(sentinels) = &mut self.address
            && sentinels.take_parameter(key, value)?
        {
            return Ok(());
        }
        let is_socket = matches!(self.address, Address::Unix(_));
        match key {
            "prefix" => self.prefix = percent_decoded(value),
            "timeout" => self.timeout = duration(value)?,
            "line" => self.line = yes_or_no(value)?,
            "ca" => self.ca = Some(file(value, "ca")?),
            "password_file" => self.password_file = Some(file(value, "password_file")?),
            "db" if is_socket => self.database = database(value)?,
            "user" if is_socket => self.username = non_empty(decoded(value, "user")?),
            _ => {
                return Err(bad(format!(
                    "unknown parameter {} (known: prefix, timeout, ca, password_file, line; for a socket also db and user)",
                    shown(key)
                )));
            }
        }
        Ok(())
    }

    fn check(self) -> Result<Self> {
        if self.prefix.starts_with(RESERVED_PREFIX) {
            return Err(bad("the prefix begins with leasehold:, which is kept for Leasehold's own keys"));
        }
        if self.prefix.len() > 512 {
            return Err(bad(format!("the prefix has {} bytes, at most 512 are allowed", self.prefix.len())));
        }
        if self.password.is_some() && self.password_file.is_some() {
            return Err(bad("the URL has both a password and a password_file"));
        }
        if let Address::Sentinel(sentinels) = &self.address
            && sentinels.password.is_some()
            && sentinels.password_file.is_some()
        {
            return Err(bad("the URL has both a sentinel_password and a sentinel_password_file"));
        }
        if self.ca.is_some() && !self.address.is_tls() {
            return Err(bad("ca is for TLS: use rediss:// or valkeys://"));
        }
        Ok(self)
    }

    /// Where the server is, as a URL without user and password.
    pub fn location(&self) -> Arc<str> {
        let database = self.database;
        match &self.address {
            Address::Tcp { host, port, tls } => {
                let scheme = if *tls { "rediss" } else { "redis" };
                let host = if host.contains(':') { format!("[{host}]") } else { host.clone() };
                let database = if database == 0 { String::new() } else { format!("/{database}") };
                format!("{scheme}://{host}:{port}{database}").into()
            }
            Address::Unix(path) => {
                let database = if database == 0 { String::new() } else { format!("?db={database}") };
                format!("redis+unix://{}{database}", path.display()).into()
            }
            Address::Sentinel(sentinels) => {
                let database = if database == 0 { String::new() } else { format!("/{database}") };
                format!("{}{database}", sentinels.location()).into()
            }
        }
    }

    /// The same server, with all locks under this prefix.
    ///
    /// # Errors
    /// `Invalid` if it begins with `leasehold:` or has more than 512 bytes.
    pub fn with_prefix(mut self, prefix: impl AsRef<[u8]>) -> Result<Self> {
        self.prefix = prefix.as_ref().into();
        self.check()
    }

    /// The same server, with this time for a command to be answered in. Default 2 s.
    ///
    /// # Errors
    /// `Invalid` if it is under a millisecond or over ten minutes.
    pub fn with_timeout(mut self, timeout: Duration) -> Result<Self> {
        self.timeout = checked_timeout(timeout)?;
        Ok(self)
    }

    /// The same server, where no waiter stands in line: who waits asks again as its retry policy says, in no order. For the
    /// time in which other libraries want the same locks: they get no turn while there is a line, which passes the lock on
    /// without ever leaving it free. Default: there is a line.
    #[must_use]
    pub fn without_line(mut self) -> Self {
        self.line = false;
        self
    }

    /// The user and password to log in with, from the URL, else the file, else the environment.
    ///
    /// # Errors
    /// `Invalid` if the password's file cannot be read or holds no text.
    pub(super) fn credentials(
        &self,
        environment: impl Fn(&str) -> Option<String>,
    ) -> Result<(Option<String>, Option<Secret>)> {
        let file = self.password_file.as_ref().map(|path| (path, "password_file"));
        let variables = (USERNAME_VARIABLE, PASSWORD_VARIABLE);
        credentials(self.username.as_ref(), self.password.as_ref(), file, variables, environment)
    }

    /// As [`credentials`](Self::credentials), of the sentinels.
    pub(super) fn sentinel_credentials(
        sentinels: &Sentinels,
        environment: impl Fn(&str) -> Option<String>,
    ) -> Result<(Option<String>, Option<Secret>)> {
        let file = sentinels.password_file.as_ref().map(|path| (path, "sentinel_password_file"));
        let variables = (SENTINEL_USERNAME_VARIABLE, SENTINEL_PASSWORD_VARIABLE);
        credentials(sentinels.username.as_ref(), sentinels.password.as_ref(), file, variables, environment)
    }
}

fn credentials(
    username: Option<&String>,
    password: Option<&Secret>,
    file: Option<(&PathBuf, &str)>,
    (username_variable, password_variable): (&str, &str),
    environment: impl Fn(&str) -> Option<String>,
) -> Result<(Option<String>, Option<Secret>)> {
    let username = username.cloned().or_else(|| environment(username_variable)).and_then(non_empty);
    if password.is_some() {
        return Ok((username, password.cloned()));
    }
    let Some((path, parameter)) = file else {
        return Ok((username, environment(password_variable).and_then(non_empty).map(Secret)));
    };
    let unreadable = |what: String| Error::invalid(format!("{parameter} {}: {what}", path.display()));
    let text = std::fs::read_to_string(path).map_err(|error| unreadable(error.to_string()))?;
    let password = text.trim_end_matches(['\r', '\n']);
    if password.is_empty() {
        return Err(unreadable("it is empty".into()));
    }
    Ok((username, Some(Secret(password.into()))))
}

pub(super) fn bad(what: impl Into<String>) -> Error {
    Error::invalid(what.into()).advise(FORM)
}

pub(super) fn shown(text: &str) -> String {
    if text.contains('@') {
        // An unescaped /, ? or # in a password ends the part of the URL that it stands in.
        return "(not shown, as it may be a part of a password: write / ? # and @ in it as %2F %3F %23 and %40)"
            .into();
    }
    Escaped(text.as_bytes()).to_string()
}

pub(super) fn non_empty(text: String) -> Option<String> {
    (!text.is_empty()).then_some(text)
}

fn address(url: &Url) -> Result<Address> {
    let tls = match url.scheme() {
        "redis" | "valkey" => false,
        "rediss" | "valkeys" => true,
        "redis+unix" | "valkey+unix" | "unix" => {
            let path = String::from_utf8(percent_decoded(url.path()))
                .map_err(|_| bad("the socket's path is no text"))?;
            if url.host().is_some() || path.len() < 2 {
                return Err(bad("the path of the socket is missing: redis+unix:///run/redis.sock"));
            }
            return Ok(Address::Unix(path.into()));
        }
        other => return Err(bad(format!("unknown scheme {}", shown(other)))),
    };
    let (host, port) = host_of(url, 6379)?;
    Ok(Address::Tcp { host, port, tls })
}

pub(super) fn host_of(url: &Url, default_port: u16) -> Result<(String, u16)> {
    let host = match url.host() {
        Some(url::Host::Ipv6(address)) => address.to_string(),
        // One host however it is written: rings go by it, and a quorum must not count it for two.
        Some(host) => decoded(&host.to_string(), "host")?.to_ascii_lowercase(),
        None => return Err(bad("the host is missing")),
    };
    Ok((host, url.port().unwrap_or(default_port)))
}

fn database(text: &str) -> Result<u32> {
    if text.is_empty() {
        return Ok(0);
    }
    text.parse().map_err(|_| bad(format!("the database {} is no number", shown(text))))
}

fn yes_or_no(text: &str) -> Result<bool> {
    match text {
        "yes" => Ok(true),
        "no" => Ok(false),
        _ => Err(bad(format!("line is yes or no, not {}", shown(text)))),
    }
}

pub(super) fn file(text: &str, part: &str) -> Result<PathBuf> {
    if text.is_empty() {
        return Err(bad(format!("{part} names no file")));
    }
    decoded(text, part).map(PathBuf::from)
}

/// `250ms`, `2s`, `1m`.
fn duration(text: &str) -> Result<Duration> {
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let millis = match unit {
        "ms" => Some(1),
        "s" => Some(1000),
        "m" => Some(60_000),
        _ => None,
    };
    let span =
        millis.and_then(|unit| number.parse::<u64>().ok()?.checked_mul(unit)).map(Duration::from_millis);
    span.ok_or_else(|| bad(format!("the timeout {} is none: write 250ms, 2s or 1m", shown(text))))
        .and_then(checked_timeout)
}

fn checked_timeout(span: Duration) -> Result<Duration> {
    if (Duration::from_millis(1)..=Duration::from_secs(600)).contains(&span) {
        return Ok(span);
    }
    Err(bad(format!("the timeout {span:?} is out of range: 1 ms to 10 minutes")))
}

pub(super) fn decoded(text: &str, part: &str) -> Result<String> {
    String::from_utf8(percent_decoded(text))
        .map_err(|_| bad(format!("the {part} is no text when percent-decoded")))
}

fn percent_decoded(text: &str) -> Vec<u8> {
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, tail @ ..] = rest {
        let escaped = match tail {
            [high, low, ..] if *first == b'%' => hex(*high).zip(hex(*low)),
            _ => None,
        };
        if let Some((high, low)) = escaped {
            out.push(high << 4 | low);
            rest = &tail[2..];
        } else {
            out.push(*first);
            rest = tail;
        }
    }
    out
}

fn hex(digit: u8) -> Option<u8> {
    char::from(digit).to_digit(16).and_then(|digit| u8::try_from(digit).ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(url: &str) -> RedisConfig {
        RedisConfig::from_url(url).unwrap_or_else(|error| panic!("{url}: {error}"))
    }

    #[test]
    fn a_url_gives_every_part() {
        let config = read("redis://al%40ice:p%2Fw%25@db.example:7000/3?prefix=app%3A%ff&timeout=250ms");
        assert_eq!(config.address, Address::Tcp { host: "db.example".into(), port: 7000, tls: false });
        assert_eq!(config.username.as_deref(), Some("al@ice"));
        assert_eq!(config.password.as_ref().unwrap().expose(), "p/w%");
        assert_eq!((config.database, config.timeout), (3, Duration::from_millis(250)));
        assert_eq!(config.prefix, b"app:\xff");
        assert_eq!(&*config.location(), "redis://db.example:7000/3");

        let plain = read("valkey://127.0.0.1");
        assert_eq!(plain.address, Address::Tcp { host: "127.0.0.1".into(), port: 6379, tls: false });
        assert_eq!((plain.username, plain.password, plain.timeout), (None, None, DEFAULT_TIMEOUT));
        assert_eq!(&*read("valkeys://[::1]:1/").location(), "rediss://[::1]:1");
        assert_eq!(read("rediss://h?ca=/etc/ca%20x.pem&timeout=1m").ca, Some("/etc/ca x.pem".into()));
        assert_eq!(read("redis://:pw@h").username, None);

        let socket = read("redis+unix:///run/my%20redis.sock?db=2&user=bob");
        assert_eq!(socket.address, Address::Unix("/run/my redis.sock".into()));
        assert_eq!((socket.database, socket.username.as_deref()), (2, Some("bob")));
        for scheme in ["redis+unix", "valkey+unix", "unix"] {
            assert_eq!(read(&format!("{scheme}:///s")).address, Address::Unix("/s".into()));
        }
    }

    #[test]
    fn a_bad_url_is_refused_naming_the_part_and_never_the_password() {
        for (url, part) in [
            ("http://u:hunter2@h", "scheme"),
            ("redis://", "host"),
            ("redis:///0", "host"),
            ("redis://u:hunter2@", "host"),
            ("redis://u:hunter2@h:70000", "port"),
            ("redis://u:hunter2@h:x", "port"),
            ("redis://u:hunter2@h/x", "database"),
            ("redis://u:hunter2@h/-1", "database"),
            ("redis://u:hunter2@h/99999999999", "database"),
            ("redis://u:hunter2@h?prefx=a", "prefx"),
            ("redis://u:hunter2@h?prefix=a&prefix=b", "twice"),
            ("redis://u:hunter2@h?prefix=leasehold:", "prefix"),
            ("redis://u:hunter2@h?timeout=2", "timeout"),
            ("redis://u:hunter2@h?timeout=0s", "timeout"),
            ("redis://u:hunter2@h?timeout=11m", "timeout"),
            ("redis://u:hunter2@h?timeout=99999999999999999999s", "timeout"),
            ("redis://u:hunter2@h?timeout=s", "timeout"),
            ("redis://u:hunter2@h?password_file=/x", "password_file"),
            ("redis://u:hunter2@h?ca=/x", "ca"),
            ("rediss://u:hunter2@h?ca=", "ca"),
            ("redis://u:hunter2%ff@h", "password"),
            ("redis://h?db=1", "db"),
            ("redis+unix://", "socket"),
            ("unix:///", "socket"),
            ("redis://u:hunter2#@h", ""),
            ("redis://u:123/hunter2@h", "database"),
            ("redis://u:123?hunter2@h", "parameter"),
            ("redis://u:123?timeout=hunter2@h", "timeout"),
            ("not a url", "URL"),
        ] {
            let error = RedisConfig::from_url(url).expect_err(url);
            let text = format!("{error} {error:?}");
            assert_eq!(error.kind(), crate::error::ErrorKind::Invalid, "{url}");
            assert!(text.contains(part), "{url}: {text}");
            assert!(!text.contains("hunter2"), "{text}");
        }
    }

    #[test]
    fn a_password_is_never_shown() {
        let config = read("redis://user:hunter2@h/1");
        assert!(!format!("{config:?} {config:#?} {}", config.location()).contains("hunter2"));
    }

    #[test]
    fn credentials_come_from_the_url_then_the_file_then_the_environment() {
        let environment = |name: &str| match name {
            USERNAME_VARIABLE => Some("env-user".to_owned()),
            PASSWORD_VARIABLE => Some("env-password".to_owned()),
            _ => None,
        };
        let of = |url: &str| read(url).credentials(environment).map(|(u, p)| (u.unwrap(), p.unwrap().0));
        assert_eq!(of("redis://u:p@h").unwrap(), ("u".into(), "p".into()));
        assert_eq!(of("redis://h").unwrap(), ("env-user".into(), "env-password".into()));
        assert_eq!(of("redis://u@h").unwrap(), ("u".into(), "env-password".into()));

        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "file-password\r\n").unwrap();
        let url = format!("redis://u@h?password_file={}", file.path().display());
        assert_eq!(of(&url).unwrap(), ("u".into(), "file-password".into()));
        std::fs::write(file.path(), "\n").unwrap();
        assert!(of(&url).unwrap_err().to_string().contains("empty"));
        drop(file);
        assert!(of(&url).unwrap_err().to_string().contains("password_file"));
        let (user, password) = read("redis://h").credentials(|_| None).unwrap();
        assert_eq!((user, password), (None, None));
    }
}
