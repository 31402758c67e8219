//! From a URL to a store: the only room that knows every store.

#[cfg(feature = "sqlite")]
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;
use tokio::runtime::Handle;

use crate::error::{Error, ErrorKind, Result};
use crate::keeper::{Bench, DEFAULT_CLOSE_TIMEOUT};
use crate::locks::Locks;
use crate::store::Store;
use crate::stores::memory::MemoryStore;
use crate::stores::quorum::{NodeSource, Opening, QuorumStore};
#[cfg(feature = "redis")]
use crate::stores::redis::{RedisConfig, RedisStore};
use crate::stores::ring::{Node, RingStore};
#[cfg(feature = "sqlite")]
use crate::stores::sqlite::{self, SqliteStore};
use crate::types::{Fencing, Finding, Severity};

/// Connects to the store at `url`.
///
/// | URL | store |
/// |---|---|
/// | `redis://[user:password@]host[:port][/database]`, `rediss://` (TLS), `redis+unix:///path` | Redis or Valkey, one server |
/// | `sqlite:/path/to/file.db`, `sqlite:` (a file in the home directory) | embedded, for the processes of one machine |
/// | `ring:?node=URL&node=URL` | each name on one of several, for load: see `docs/ring.md` |
/// | `quorum:?node=URL&node=URL&node=URL` | one lock over three or more independent stores, of which a minority may fail |
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
#[derive(Clone)]
enum Place {
    Memory,
    Ring(Vec<(Place, Member)>),
    Quorum(Vec<Place>),
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
            "ring" => ring(rest).map(Self::Ring),
            "quorum" => nodes("quorum", rest).map(Self::Quorum),
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
                .advise(
                    "known are redis:, rediss:, valkey:, valkeys:, redis+unix:, redis+sentinel:, sqlite:, ring:, quorum: and memory:",
                )),
        }
    }

    /// Opens it, with what it needs to live on `runtime`.
    fn open(self, runtime: &Handle) -> Opening {
        let runtime = runtime.clone();
        // Boxed, since a store may be made of others.
        Box::pin(async move {
            match self {
                Self::Memory => Ok(Arc::new(MemoryStore::new()) as Arc<dyn Store>),
                Self::Ring(members) => open_ring(members, &runtime).await,
                Self::Quorum(places) => {
                    let nodes = places.into_iter().map(|place| place.into_node(&runtime)).collect();
                    Ok(QuorumStore::connect(nodes, runtime).await? as Arc<dyn Store>)
                }
                #[cfg(feature = "sqlite")]
                Self::Sqlite(path) => {
                    Ok(Arc::new(SqliteStore::open(&path, &sqlite::Options::default())?) as Arc<dyn Store>)
                }
                #[cfg(feature = "redis")]
                Self::Redis(config) => Ok(RedisStore::connect(*config, runtime).await? as Arc<dyn Store>),
            }
        })
    }

    /// Where it is, without secrets.
    fn location(&self) -> Arc<str> {
        match self {
            Self::Memory => Arc::from("memory:"),
            Self::Ring(members) => location_of("ring", members.iter().map(|(place, _)| place)),
            Self::Quorum(places) => location_of("quorum", places.iter()),
            #[cfg(feature = "sqlite")]
            Self::Sqlite(path) => format!("sqlite:{}", path.display()).into(),
            #[cfg(feature = "redis")]
            Self::Redis(config) => config.location(),
        }
    }

    /// A node of a store made of several: opened when it can be reached.
    fn into_node(self, runtime: &Handle) -> NodeSource {
        let runtime = runtime.clone();
        NodeSource::new(self.location(), move || self.clone().open(&runtime))
    }
}

/// The stores that `scheme:?node=URL&node=URL` names. A `?`, `&`, `#` or `%` within a node's URL is percent-encoded.
fn nodes(scheme: &str, rest: &str) -> Result<Vec<Place>> {
    let form = || {
        format!(
            "{scheme}:?node=redis://a:6379&node=redis://b:6379, with ? & # and % in a node's URL percent-encoded"
        )
    };
    let query = rest
        .strip_prefix('?')
        .ok_or_else(|| Error::invalid(format!("{scheme}: names its nodes in parameters")).advise(form()))?;
    let mut nodes = Vec::new();
    for (key, node) in url::form_urlencoded::parse(query.replace('+', "%2B").as_bytes()) {
        if key != "node" {
            return Err(
                Error::invalid(format!("{scheme}: has a parameter that is not a node")).advise(form())
            );
        }
        nodes.push(Place::parse(&node)?);
    }
    Ok(nodes)
}

/// What becomes of a node of a ring.
type Member = fn(Node) -> Node;

/// The nodes of `ring:?node=URL&node=URL`, and those that `adding=URL` and `removing=URL` name.
fn ring(rest: &str) -> Result<Vec<(Place, Member)>> {
    let (mut staying, mut adding, mut removing) = (Vec::new(), Vec::new(), Vec::new());
    for part in rest.strip_prefix('?').unwrap_or_default().split('&') {
        match part.split_once('=') {
            Some(("adding", url)) => adding.push(format!("node={url}")),
            Some(("removing", url)) => removing.push(format!("node={url}")),
            _ => staying.push(part.to_owned()),
        }
    }
    let mut members: Vec<(Place, Member)> = Vec::new();
    let sorts: [(Vec<String>, Member); 3] =
        [(staying, |node| node), (adding, Node::adding), (removing, Node::removing)];
    for (parts, member) in sorts {
        let rest = if rest.starts_with('?') { format!("?{}", parts.join("&")) } else { rest.to_owned() };
        members.extend(nodes("ring", &rest)?.into_iter().map(|place| (place, member)));
    }
    Ok(members)
}

/// Connects to all nodes at once; one that cannot be reached is an error.
async fn open_ring(members: Vec<(Place, Member)>, runtime: &Handle) -> Result<Arc<dyn Store>> {
    let opened = join_all(members.into_iter().map(|(place, member)| async move {
        let store = place.open(runtime).await.map_err(|error| match error.kind() {
            ErrorKind::Unavailable => {
                error.advise("a ring connects when all of its nodes answer: see docs/ring.md")
            }
            _ => error,
        });
        store.map(|store| member(Node::new(store)))
    }));
    let nodes = opened.await.into_iter().collect::<Result<Vec<_>>>()?;
    Ok(Arc::new(RingStore::new(nodes)?))
}

/// Where a store made of others is, without secrets.
fn location_of<'a>(scheme: &str, nodes: impl Iterator<Item = &'a Place>) -> Arc<str> {
    let nodes: Vec<String> = nodes.map(|place| format!("node={}", place.location())).collect();
    format!("{scheme}:?{}", nodes.join("&")).into()
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
