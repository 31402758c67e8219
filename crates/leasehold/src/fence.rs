//! The guard at the resource: turns away a holder that lost its lock without noticing.
//!
//! A process can stand still (a pause, a swapped-out page, a suspended machine) between its last look at the lock and
//! its write, and no lock can help there. The resource can: it keeps the largest fencing token it has seen and refuses
//! a smaller one. [`Fence`] is that for a resource inside this process, [`SqlFence`] for a row of any SQL database.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::error::{Error, ErrorKind, Result};
use crate::types::FencingToken;

/// A write was refused because a later holder has been there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("fencing token {presented} is stale: the resource has seen {newest}")]
pub struct StaleToken {
    /// The token that came with the write.
    pub presented: FencingToken,
    /// The largest token that the resource has seen.
    pub newest: FencingToken,
}

impl From<StaleToken> for Error {
    fn from(stale: StaleToken) -> Self {
        Self::new(ErrorKind::Lost, "a write came from a holder that had lost its lock")
            .caused_by(stale)
            .advise("nothing was written; take the lock again and begin anew")
    }
}

/// The largest token that a resource inside this process has seen.
///
/// ```
/// use leasehold::fence::Fence;
/// use leasehold::FencingToken;
///
/// let fence = Fence::new();
/// fence.admit(FencingToken::new(34)).unwrap();
/// fence.admit(FencingToken::new(34)).unwrap(); // the same holder writes again
/// assert!(fence.admit(FencingToken::new(33)).is_err());
/// ```
#[derive(Debug, Default)]
pub struct Fence(AtomicU64);

impl Fence {
    /// A fence that has seen no token.
    pub const fn new() -> Self {
        Self(AtomicU64::new(0))
    }

    /// A fence that has seen `newest`, as read back from where the resource keeps it.
    pub const fn that_has_seen(newest: FencingToken) -> Self {
        Self(AtomicU64::new(newest.get()))
    }

    /// Admits a write that comes with `token`, and from then on refuses all with a smaller one. Equal tokens are
    /// the same holder's and are admitted.
    ///
    /// Admission and the write itself are two steps: where two writers can overlap, do both under the resource's own
    /// lock, or the older write may come after the newer.
    ///
    /// # Errors
    /// [`StaleToken`] if a larger token has been seen.
    pub fn admit(&self, token: FencingToken) -> Result<(), StaleToken> {
        let newest = self.0.fetch_max(token.get(), Ordering::AcqRel);
        if newest > token.get() {
            return Err(StaleToken { presented: token, newest: FencingToken::new(newest) });
        }
        Ok(())
    }

    /// The largest token seen; 0 if none was.
    pub fn newest(&self) -> FencingToken {
        FencingToken::new(self.0.load(Ordering::Acquire))
    }
}

/// Why a fenced update changed no row.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// A later holder has written the row.
    #[error(transparent)]
    Stale(#[from] StaleToken),
    /// The condition matched no row, or only rows whose token column is NULL. (MySQL also counts no row when an update
    /// leaves every value as it was, unless the connection asks for found rows.)
    #[error("the fenced update matched no row")]
    Unmatched,
}

/// A fence in a column of an SQL table: makes the text of updates that only a current holder can do.
///
/// The table needs one more column, `BIGINT NOT NULL DEFAULT 0`, which keeps the largest token that wrote the row. Check
/// and write are one statement, so nothing can come between, in any SQL database and at any isolation level.
///
/// ```
/// use leasehold::fence::SqlFence;
///
/// let fence = SqlFence::new("reports", "lock_token")?;
/// // Bind: the body, the token, the id, the token again.
/// assert_eq!(
///     fence.update("body = ?", "id = ?")?,
///     "UPDATE reports SET body = ?, lock_token = ? WHERE (id = ?) AND lock_token <= ?"
/// );
/// // PostgreSQL numbers its parameters, so the token is bound once.
/// assert_eq!(
///     fence.with_token_parameter("$3")?.update("body = $1", "id = $2")?,
///     "UPDATE reports SET body = $1, lock_token = $3 WHERE (id = $2) AND lock_token <= $3"
/// );
/// # Ok::<(), leasehold::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SqlFence {
    table: String,
    column: String,
    parameter: String,
}

impl SqlFence {
    /// A fence in `token_column` of `table` (`reports`, or `accounting.reports`), with `?` for parameters.
    ///
    /// # Errors
    /// `Invalid` unless both are plain identifiers: letters, digits and `_`, at most 63 of them. They become part of the
    /// statement's text, so they must never come from a stranger.
    pub fn new(table: &str, token_column: &str) -> Result<Self> {
        let parts: Vec<&str> = table.split('.').collect();
        if parts.len() > 3 || !parts.iter().all(|part| is_identifier(part)) {
            return Err(Error::invalid(format!("{table:?} is no plain name of an SQL table")));
        }
        if !is_identifier(token_column) {
            return Err(Error::invalid(format!("{token_column:?} is no plain name of an SQL column")));
        }
        Ok(Self { table: table.into(), column: token_column.into(), parameter: "?".into() })
    }

    /// The same fence with another parameter for the token: `$3` (PostgreSQL), `:token`, `@token`, `?3`.
    ///
    /// # Errors
    /// `Invalid` if it is no parameter.
    pub fn with_token_parameter(mut self, parameter: &str) -> Result<Self> {
        let rest = parameter.strip_prefix(['?', '$', ':', '@']);
        let plain =
            |rest: &str| rest.len() <= 63 && rest.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_');
        if !rest.is_some_and(|rest| plain(rest) && (!rest.is_empty() || parameter == "?")) {
            return Err(Error::invalid(format!("{parameter:?} is no parameter of an SQL statement")));
        }
        self.parameter = parameter.into();
        Ok(self)
    }

    /// The text of an update that writes only if no later holder has written the row.
    ///
    /// With `?`, bind in this order: what `assignments` need, the token, what `condition` needs, the token again.
    /// Without `assignments` it only marks the row, which bars older holders. `assignments` and `condition` are
    /// your own SQL text and are not looked into.
    ///
    /// # Errors
    /// `Invalid` without a condition: it would fence every row of the table.
    pub fn update(&self, assignments: &str, condition: &str) -> Result<String> {
        let Self { table, column, parameter } = self;
        let condition = given(condition)?;
        let comma = if assignments.trim().is_empty() { "" } else { ", " };
        Ok(format!(
            "UPDATE {table} SET {assignments}{comma}{column} = {parameter} WHERE ({condition}) AND {column} <= {parameter}"
        ))
    }

    /// The text that reads the largest token that wrote the row, to tell why an update changed nothing.
    ///
    /// # Errors
    /// As [`update`](Self::update).
    pub fn select(&self, condition: &str) -> Result<String> {
        let Self { table, column, .. } = self;
        Ok(format!("SELECT {column} FROM {table} WHERE ({})", given(condition)?))
    }

    /// Judges an update with `token` by the number of rows it changed. If that is 0, `newest` tells why: what
    /// [`select`](Self::select) read after it, `None` if there was no row or it was not asked.
    ///
    /// # Errors
    /// [`Refused`] if no row was changed: nothing was written.
    pub fn admitted(
        rows_changed: u64,
        token: FencingToken,
        newest: Option<FencingToken>,
    ) -> Result<(), Refused> {
        match newest {
            _ if rows_changed > 0 => Ok(()),
            Some(newest) if newest > token => Err(StaleToken { presented: token, newest }.into()),
            _ => Err(Refused::Unmatched),
        }
    }
}

fn is_identifier(text: &str) -> bool {
    text.len() <= 63
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_')
        && text.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_')
}

fn given(condition: &str) -> Result<&str> {
    if condition.trim().is_empty() {
        return Err(Error::invalid("a fenced statement needs a condition: which row is it about?"));
    }
    Ok(condition)
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn token(number: u64) -> FencingToken {
        FencingToken::new(number)
    }

    #[test]
    fn a_fence_refuses_what_is_older_than_the_newest() {
        let fence = Fence::that_has_seen(token(10));
        let stale = StaleToken { presented: token(9), newest: token(10) };
        assert_eq!(fence.admit(token(9)), Err(stale));
        assert_eq!(fence.admit(token(10)), Ok(()));
        assert_eq!(fence.admit(token(12)), Ok(()));
        assert_eq!(fence.admit(token(11)), Err(StaleToken { presented: token(11), newest: token(12) }));
        assert_eq!(fence.newest(), token(12));
        let error = Error::from(stale);
        assert_eq!(error.kind(), ErrorKind::Lost);
        assert!(error.to_string().contains("token 9 is stale: the resource has seen 10"), "{error}");
    }

    #[test]
    fn among_threads_no_token_is_admitted_after_a_larger_one() {
        let (fence, log) = (Fence::new(), std::sync::Mutex::new(Vec::new()));
        std::thread::scope(|scope| {
            for thread in 0..4_u64 {
                let (fence, log) = (&fence, &log);
                scope.spawn(move || {
                    for number in 1..500 {
                        // Admission and write under the resource's own lock, as the documentation asks.
                        let mut log = log.lock().unwrap();
                        if fence.admit(token(number * 4 + thread)).is_ok() {
                            log.push(number * 4 + thread);
                        }
                    }
                });
            }
        });
        let log = log.into_inner().unwrap();
        assert!(log.is_sorted() && log.last() == Some(&(499 * 4 + 3)));
    }

    #[test]
    fn only_plain_identifiers_become_sql() {
        for bad in ["", "a b", "a;b", "a\"b", "1a", "a.b.c.d", "a.", "täble", "a--", &"x".repeat(64)] {
            assert!(SqlFence::new(bad, "token").is_err(), "{bad}");
            assert!(SqlFence::new("t", bad).is_err(), "{bad}");
        }
        assert!(SqlFence::new("t", "a.b").is_err());
        let fence = SqlFence::new("s.t", "_token9").unwrap();
        assert_eq!(
            fence.update(" ", "id = 1").unwrap().replace("  ", " "),
            fence.update("", "id = 1").unwrap()
        );
        assert_eq!(fence.select("id = 1").unwrap(), "SELECT _token9 FROM s.t WHERE (id = 1)");
        for empty in ["", " "] {
            assert!(fence.update("a = 1", empty).is_err() && fence.select(empty).is_err());
        }
        for good in ["?", "?3", "$3", ":token", "@token"] {
            assert!(fence.clone().with_token_parameter(good).is_ok(), "{good}");
        }
        for bad in ["", "$", ":", "3", "? OR 1=1", "$1;", "??"] {
            assert!(fence.clone().with_token_parameter(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn an_update_is_judged_by_the_rows_it_changed() {
        assert_eq!(SqlFence::admitted(1, token(5), None), Ok(()));
        assert_eq!(SqlFence::admitted(0, token(5), None), Err(Refused::Unmatched));
        assert_eq!(SqlFence::admitted(0, token(5), Some(token(5))), Err(Refused::Unmatched));
        let stale = StaleToken { presented: token(5), newest: token(6) };
        assert_eq!(SqlFence::admitted(0, token(5), Some(token(6))), Err(Refused::Stale(stale)));
    }
}
