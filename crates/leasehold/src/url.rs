//! From a URL to a store: the only room that knows every store.

#[cfg(feature = "sqlite")]
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::runtime::Handle;

use crate::error::{Error, ErrorKind, Result};
use crate::keeper::{Bench, DEFAULT_CLOSE_TIMEOUT};
use crate::locks::Locks;
use crate::store::Store;
use crate::stores::memory::MemoryStore;
#[cfg(feature = "redis")]
use crate::stores::redis::{RedisConfig, RedisStore};
#[cfg(feature = "sqlite")]
use crate::stores::sqlite::{self, SqliteStore};
use crate::types::{Fencing, Finding, Severity};

/// Connects to the store at `url`.
///
/// | URL | store |
/// |---|---|
/// | `redis://[user:password@]host[:port][/database]`, `rediss://` (TLS), `redis+unix:///path` | Redis or Valkey, one server |
/// | `redis+sentinel://[user:password@]host[:port],host../master[/database]`, `rediss+sentinel://` (TLS) | Redis or Valkey, the master that sentinels name |
/// | `sqlite:/path/to/file.db`, `sqlite:` (a file in the home directory) | embedded, for the processes of one machine |
/// | `memory:` | a new one in this process, for tests |
///
/// `valkey://` and `valkeys://` are the same as `redis://` and `rediss://`. Each store's page in `docs/` lists its options.
///
/// # Errors
/// `Invalid` for a URL that no store understands, before any I/O; else the store's. Passwords are in no error.
///
/// # Cancel safety
/// Safe: dropped, nothing is left.
pub async fn connect(url: &str) -> Result<Locks> {
    Connector::new(url).connect().await
}

/// Looks over the store at `url` for an operator, also one that cannot be connected: failures are findings.
pub async fn diagnose(url: &str) -> Vec<Finding> {
    match connect(url).await {
        Ok(locks) => locks.diagnose().await,
        Err(error) => {
            let meaning = match error.kind() {
                ErrorKind::Invalid => "the URL is wrong; nothing was tried",
                ErrorKind::Unavailable => "it does not answer: nobody can take a lock there now",
                _ => "it answers, but will not serve locks as it is",
            };
            vec![Finding::new("connect", Severity::Failure, error.to_string(), meaning)]
        }
    }
}

/// How to connect, for what a URL cannot say.
///
/// ```
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> leasehold::Result<()> {
/// use leasehold::{Connector, Fencing};
/// let refused = Connector::new("memory:").require(Fencing::Strict).connect().await;
/// assert!(refused.is_err());
/// # Ok(()) }
/// ```
#[derive(Clone)]
#[must_use]
pub struct Connector {
    url: String,
    close_timeout: Duration,
    require: Option<Fencing>,
}

impl Connector {
    /// For the store at `url`, as [`connect`] takes it.
    pub fn new(url: impl Into<String>) -> Self {
        Self { url: url.into(), close_timeout: DEFAULT_CLOSE_TIMEOUT, require: None }
    }

    /// Sets how long the drop of the last handle waits for releases under way; zero is allowed.
    ///
    /// # Default
    /// 500 ms.
    pub fn close_timeout(mut self, timeout: Duration) -> Self {
        self.close_timeout = timeout;
        self
    }

    /// Refuses a store whose tokens cannot be trusted as far as this.
    ///
    /// # Default
    /// Anything goes.
    pub fn require(mut self, least: Fencing) -> Self {
        self.require = Some(least);
        self
    }

    /// Connects.
    ///
    /// # Errors
    /// As [`connect`]; `Unsupported` for what was required and cannot be had.
    pub async fn connect(self) -> Result<Locks> {
        let place = Place::parse(&self.url)?;
        let bench = Bench::start()?;
        let store = place.open(bench.runtime()).await?;
        let locks = Locks::kept(bench, store, self.close_timeout);
        if let Some(least) = self.require {
            locks.require(least)?;
        }
        Ok(locks)
    }
}

impl std::fmt::Debug for Connector {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // The URL may hold a password.
        f.debug_struct("Connector").field("require", &self.require).finish_non_exhaustive()
    }
}

/// A store that a URL names, recognised and not yet opened.
enum Place {
    Memory,
    #[cfg(feature = "sqlite")]
    Sqlite(PathBuf),
    #[cfg(feature = "redis")]
    Redis(Box<RedisConfig>),
}

impl Place {
    fn parse(url: &str) -> Result<Self> {
        let Some((scheme, rest)) = url.split_once(':') else {
            return Err(Error::invalid("a store is named by a URL, and this has no scheme")
                .advise("try redis://127.0.0.1:6379 or sqlite:/path/to/file.db"));
        };
        match scheme.to_ascii_lowercase().as_str() {
            "memory" if rest.is_empty() => Ok(Self::Memory),
            "memory" => Err(Error::invalid("memory: takes nothing after the colon")),
            #[cfg(feature = "sqlite")]
            "sqlite" => sqlite_path(rest).map(Self::Sqlite),
            #[cfg(feature = "redis")]
            "redis" | "rediss" | "valkey" | "valkeys" | "redis+unix" | "valkey+unix" | "unix"
            | "redis+sentinel" | "rediss+sentinel" | "valkey+sentinel" | "valkeys+sentinel" => {
                RedisConfig::from_url(url).map(|config| Self::Redis(Box::new(config)))
            }
            #[cfg(not(feature = "sqlite"))]
            "sqlite" => Err(not_built_in(scheme)),
            #[cfg(not(feature = "redis"))]
            "redis" | "rediss" | "valkey" | "valkeys" | "redis+unix" | "valkey+unix" | "unix"
            | "redis+sentinel" | "rediss+sentinel" | "valkey+sentinel" | "valkeys+sentinel" => {
                Err(not_built_in(scheme))
            }
            other => Err(Error::invalid(format!("no store has the scheme {}:", other.escape_debug()))
                .advise("known are redis:, rediss:, valkey:, valkeys:, redis+unix:, redis+sentinel:, sqlite: and memory:")),
        }
    }

    #[cfg_attr(
        not(feature = "redis"),
        expect(unused_variables, clippy::unused_async, reason = "Redis needs both")
    )]
    async fn open(self, runtime: &Handle) -> Result<Arc<dyn Store>> {
        match self {
            Self::Memory => Ok(Arc::new(MemoryStore::new())),
            #[cfg(feature = "sqlite")]
            Self::Sqlite(path) => Ok(Arc::new(SqliteStore::open(&path, &sqlite::Options::default())?)),
            #[cfg(feature = "redis")]
            Self::Redis(config) => Ok(RedisStore::connect(*config, runtime.clone()).await?),
        }
    }
}

#[cfg(not(all(feature = "redis", feature = "sqlite")))]
fn not_built_in(scheme: &str) -> Error {
    Error::new(ErrorKind::Unsupported, format!("this build was made without the {scheme}: store"))
}

/// The path of `sqlite:PATH`, `sqlite://PATH` (absolute) or `sqlite:` (the default).
#[cfg(feature = "sqlite")]
fn sqlite_path(rest: &str) -> Result<PathBuf> {
    let path = rest.strip_prefix("//").unwrap_or(rest);
    match path {
        "" => sqlite::default_path(),
        ":memory:" => Err(Error::invalid("sqlite::memory: would be a lock of its own for each process")
            .advise("use memory: for tests in one process, or a path")),
        path if path.contains(['?', '#']) => Err(Error::invalid("a sqlite: URL takes a path and no options")
            .advise("a path with ? or # in it cannot be used")),
        path if rest.starts_with("//") && !path.starts_with('/') => Err(Error::invalid(
            "sqlite:// is followed by an absolute path, as in sqlite:///var/lib/app/locks.db",
        )),
        path => Ok(PathBuf::from(path)),
    }
}
