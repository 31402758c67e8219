//! What went wrong, where, and what the caller should do about it.

use std::borrow::Cow;
use std::error::Error as StdError;
use std::fmt;
use std::sync::Arc;

use crate::types::{InvalidName, InvalidOwner, Name};

/// `Result` with Leasehold's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What kind of thing went wrong, told apart by what the caller should do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The store could not be reached: nothing was done. Try again later.
    Unavailable,
    /// The request was sent and no answer came: it was done or not. Leasehold finds out or frees the lock by itself;
    /// the caller must act as if it does not hold it.
    Unknown,
    /// The store answered and will not do it: rights, a key of another type, memory full. Trying again will not help
    /// until somebody mends it.
    Rejected,
    /// The arguments are wrong; nothing was sent.
    Invalid,
    /// This store cannot do that.
    Unsupported,
    /// The lock was lost while work relied on it.
    Lost,
    /// Somebody else kept the lock until the retry policy or the maximum wait ended.
    Busy,
    /// As many wait in line already as the mutex allows.
    QueueFull,
    /// Units of work wait for each other in a circle, and this one is to give way: release what it holds and begin anew.
    Deadlock,
}

/// An error of Leasehold: what failed, on which store and lock, and what can be done.
///
/// It never holds a password. Cheap to clone.
#[derive(Clone)]
pub struct Error(Box<Inner>);

#[derive(Clone)]
struct Inner {
    kind: ErrorKind,
    what: Cow<'static, str>,
    store: Option<Arc<str>>,
    name: Option<Name>,
    advice: Option<Cow<'static, str>>,
    source: Option<Arc<dyn StdError + Send + Sync>>,
}

impl Error {
    /// An error of this kind; `what` says what failed.
    pub fn new(kind: ErrorKind, what: impl Into<Cow<'static, str>>) -> Self {
        Self(Box::new(Inner { kind, what: what.into(), store: None, name: None, advice: None, source: None }))
    }

    /// Bad input: nothing was sent.
    pub fn invalid(what: impl Into<Cow<'static, str>>) -> Self {
        Self::new(ErrorKind::Invalid, what)
    }

    /// The same error, naming the store (its URL without secrets).
    #[must_use]
    pub fn on_store(mut self, store: &Arc<str>) -> Self {
        self.0.store = Some(store.clone());
        self
    }

    /// The same error, naming the lock.
    #[must_use]
    pub fn for_name(mut self, name: &Name) -> Self {
        self.0.name = Some(name.clone());
        self
    }

    /// The same error, saying what the caller can do.
    #[must_use]
    pub fn advise(mut self, advice: impl Into<Cow<'static, str>>) -> Self {
        self.0.advice = Some(advice.into());
        self
    }

    /// The same error, with its cause.
    #[must_use]
    pub fn caused_by(mut self, source: impl StdError + Send + Sync + 'static) -> Self {
        self.0.source = Some(Arc::new(source));
        self
    }

    /// What the store's client or the operating system said, where that is the reason. `Display` tells it too, and so
    /// [`source`](StdError::source) begins behind it.
    pub fn cause(&self) -> Option<&(dyn StdError + 'static)> {
        match self.0.source.as_deref() {
            Some(cause) => Some(cause),
            None => None,
        }
    }

    /// What kind of thing went wrong.
    pub fn kind(&self) -> ErrorKind {
        self.0.kind
    }

    /// The lock it is about, if it is about one.
    pub fn name(&self) -> Option<&Name> {
        self.0.name.as_ref()
    }

    /// The store it happened on, without secrets.
    pub fn store(&self) -> Option<&str> {
        self.0.store.as_deref()
    }

    /// What the caller can do, if there is something.
    pub fn advice(&self) -> Option<&str> {
        self.0.advice.as_deref()
    }

    /// Whether the same call may work a little later without anybody mending anything.
    pub fn is_transient(&self) -> bool {
        matches!(self.kind(), ErrorKind::Unavailable | ErrorKind::Unknown)
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Inner { what, store, name, advice, source, .. } = &*self.0;
        f.write_str(what)?;
        if let Some(name) = name {
            write!(f, ", lock {name}")?;
        }
        if let Some(store) = store {
            write!(f, ", on {store}")?;
        }
        if let Some(source) = source {
            write!(f, ": {source}")?;
        }
        if let Some(advice) = advice {
            write!(f, " ({advice})")?;
        }
        Ok(())
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Error({:?}: {self})", self.0.kind)
    }
}

impl StdError for Error {
    // The cause is part of Display already; a reporter that walks the chain must not print it twice.
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.0.source.as_deref().and_then(StdError::source)
    }
}

impl From<InvalidName> for Error {
    fn from(bad: InvalidName) -> Self {
        Self::invalid(bad.to_string())
    }
}

impl From<InvalidOwner> for Error {
    fn from(bad: InvalidOwner) -> Self {
        Self::invalid(bad.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_says_what_where_and_what_to_do() {
        let error = Error::new(ErrorKind::Unavailable, "could not connect")
            .on_store(&Arc::from("redis://db:6379"))
            .for_name(&Name::new("a\nb").unwrap())
            .caused_by(std::io::Error::other("refused"))
            .advise("is it running?");
        assert_eq!(
            error.to_string(),
            "could not connect, lock a\\u{a}b, on redis://db:6379: refused (is it running?)"
        );
        assert!(error.is_transient());
    }
}
