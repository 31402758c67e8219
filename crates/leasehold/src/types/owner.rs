//! Whose hold and whose wait: the unit of work that deadlock detection goes by.

use std::fmt::{self, Write as _};
use std::sync::Arc;

use super::{ClaimId, Escaped};

/// The longest text of an [`Owner`], in bytes.
pub const MAX_OWNER_BYTES: usize = 128;

/// A unit of work that takes several locks: one request, one job, one order being checked out.
///
/// Give it to every [`Mutex`](crate::Mutex::owner) that the unit locks, and a circle of units that wait for each other is
/// found, over any number of processes: one of them gets [`ErrorKind::Deadlock`](crate::ErrorKind::Deadlock) and the others
/// go on. Locks without an owner take no part.
///
/// **One unit of work does one thing at a time**: while it waits for a lock it does nothing else, and above all releases
/// nothing. That is what makes a circle of waits a deadlock. Two tasks that go on independently of each other are two
/// units: give each its own.
///
/// Cheap to clone. `Display` gives the text; [`existing`](Self::existing) reads it back, in another process for instance.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Owner(Arc<str>);

impl Owner {
    /// The unit of work that has this text already: what `Display` of an owner wrote elsewhere, or an identity of your
    /// own. It must be unique: two units with one text are one, and the locks of one would look like the other's.
    ///
    /// ```
    /// use leasehold::Owner;
    /// let here = Owner::new("checkout 17");
    /// let there = Owner::existing(&here.to_string())?; // sent along with the job
    /// assert_eq!(here, there);
    /// # Ok::<(), leasehold::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`InvalidOwner`] if it is empty, longer than 128 bytes, or has characters that are not safe to print.
    pub fn existing(text: &str) -> Result<Self, InvalidOwner> {
        if text.is_empty() {
            return Err(InvalidOwner("an owner's text is empty".into()));
        }
        if text.len() > MAX_OWNER_BYTES {
            let length = text.len();
            return Err(InvalidOwner(format!(
                "an owner's text has {length} bytes, at most {MAX_OWNER_BYTES} are allowed"
            )));
        }
        let shown = Escaped(text.as_bytes()).to_string();
        if shown != text {
            return Err(InvalidOwner(format!(
                "an owner's text has characters that are not safe to print: {shown}"
            )));
        }
        Ok(Self(text.into()))
    }

    /// `label`, made safe to print and cut to what fits, and 64 of the bits of `unique`.
    pub(crate) fn labelled(label: &str, unique: ClaimId) -> Self {
        let unique = format!("#{:.16}", unique.to_string());
        let mut text = String::new();
        for c in label.chars() {
            let before = text.len();
            let _ = write!(text, "{}", Escaped(c.encode_utf8(&mut [0; 4]).as_bytes()));
            if text.len() + unique.len() > MAX_OWNER_BYTES {
                text.truncate(before);
                break;
            }
        }
        Self((text + &unique).into())
    }

    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

impl fmt::Debug for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Owner({self})")
    }
}

/// Why a text was refused as an [`Owner`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct InvalidOwner(String);

#[cfg(test)]
mod tests {
    use super::*;

    fn unique(first: u8) -> ClaimId {
        ClaimId::from_bytes([first; 16])
    }

    #[test]
    fn one_label_makes_two_owners() {
        let (one, other) = (Owner::labelled("job", unique(1)), Owner::labelled("job", unique(2)));
        assert_eq!(one.to_string(), "job#0101010101010101");
        assert_ne!(one, other);
        assert_eq!(Owner::labelled("", unique(1)).as_str(), "#0101010101010101");
    }

    #[test]
    fn whatever_the_label_an_owner_can_be_printed_carried_and_read_back() {
        for label in ["a\n\x1b[2J\u{202e}", &"é".repeat(500), &"\n".repeat(100), "caf\u{e9}", "\\u{a}"] {
            let owner = Owner::labelled(label, unique(255));
            assert!(owner.as_str().len() <= MAX_OWNER_BYTES, "{owner}");
            assert!(owner.as_str().ends_with("#ffffffffffffffff"), "{owner}");
            assert!(!owner.as_str().contains(['\n', '\x1b', '\u{202e}']), "{owner}");
            assert_eq!(Owner::existing(owner.as_str()), Ok(owner));
        }
    }

    #[test]
    fn a_text_that_is_empty_long_or_unsafe_is_refused() {
        for bad in ["", "a\nb", "\u{202e}", &"x".repeat(129)] {
            let refusal = Owner::existing(bad).unwrap_err().to_string();
            assert!(!refusal.contains('\n') && refusal.len() < 200, "{refusal}");
        }
        assert!(Owner::existing(&"x".repeat(128)).is_ok());
    }
}
