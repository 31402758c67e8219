//! Which keys a lock uses, and the hash slots that keep them together in a cluster.

use std::borrow::Cow;
use std::io::Write;
use std::sync::OnceLock;

use crate::error::{Error, Result};
use crate::types::{ClaimId, Escaped, Name, RESERVED_PREFIX};

/// `lh1:<32 hexadecimal digits>:`, the beginning of a lock's value that says whose it is.
pub(super) const OWNER_BYTES: usize = 37;
/// Hash slots of a cluster.
pub(super) const SLOTS: u16 = 16384;

/// Where a store's locks are: everything before the name.
#[derive(Debug)]
pub(super) struct Keyspace {
    prefix: Vec<u8>,
    index: Vec<u8>,
    is_cluster: bool,
}

impl Keyspace {
    pub(super) fn new(prefix: &[u8], is_cluster: bool) -> Self {
        Self { prefix: prefix.into(), index: [b"leasehold:index:", prefix].concat(), is_cluster }
    }

    /// The slot that a lock's commands may have keys of; the same for all where there is no cluster.
    pub(super) fn slot_of(&self, keys: &Keys<'_>) -> u16 {
        if self.is_cluster { slot(&keys.lock()) } else { 0 }
    }

    /// The index in a slot of a cluster: of the names held at the node whose first slot it is.
    pub(super) fn index_in(&self, slot: u16) -> Vec<u8> {
        [b"leasehold:index:{", text_of_slot(slot).as_bytes(), b"}:", &*self.prefix].concat()
    }

    pub(super) fn prefix(&self) -> &[u8] {
        &self.prefix
    }

    /// The sorted set of names held for longer than a moment, where one holds them all: not in a cluster.
    pub(super) fn index(&self) -> Option<&[u8]> {
        (!self.is_cluster).then_some(&*self.index)
    }

    /// The hash of the names that an owner waits for.
    pub(super) fn owner(&self, owner: &str) -> Vec<u8> {
        [b"leasehold:owner:", &*self.prefix, b":", owner.as_bytes()].concat()
    }

    /// The keys of one lock.
    pub(super) fn keys<'a>(&'a self, name: &'a Name) -> Result<Keys<'a>> {
        let keys = Keys { prefix: &self.prefix, name: name.as_bytes(), tag: Tag::Whole };
        if self.prefix.len() < RESERVED_PREFIX.len() && keys.lock_starts_with(RESERVED_PREFIX) {
            return Err(Error::invalid(format!(
                "the prefix {} and the name together begin with leasehold:, which is kept for Leasehold's own keys",
                Escaped(&self.prefix)
            ))
            .for_name(name));
        }
        let tag =
            if is_braced(keys.prefix) || is_braced(keys.name) { tag_of(&keys.lock()) } else { Tag::Whole };
        Ok(Keys { tag, ..keys })
    }
}

fn is_braced(bytes: &[u8]) -> bool {
    bytes.iter().any(|byte| matches!(byte, b'{' | b'}'))
}

/// What stands between the braces of a lock's side keys, so that they share the lock's slot.
#[derive(Debug)]
enum Tag<'a> {
    /// The lock's whole key.
    Whole,
    /// This text.
    Text(Cow<'a, [u8]>),
}

fn tag_of(lock: &[u8]) -> Tag<'static> {
    let tag = match effective_tag(lock) {
        Some(tag) => tag.to_vec(),
        // The key's own braces would cut a side key's tag short: another text of the same slot stands in.
        None => text_of_slot(slot(lock)).into_bytes(),
    };
    Tag::Text(Cow::Owned(tag))
}

/// What a cluster hashes instead of the whole key, if anything.
fn effective_tag(key: &[u8]) -> Option<&[u8]> {
    let open = key.iter().position(|byte| *byte == b'{')? + 1;
    let length = key[open..].iter().position(|byte| *byte == b'}')?;
    (length > 0).then(|| &key[open..open + length])
}

/// The hash slot of a key, as every Redis Cluster computes it.
pub(super) fn slot(key: &[u8]) -> u16 {
    crc16(effective_tag(key).unwrap_or(key)) % SLOTS
}

/// CRC-16/XMODEM, as the cluster specification names it.
fn crc16(bytes: &[u8]) -> u16 {
    bytes.iter().fold(0, |crc, byte| {
        (0..8).fold(crc ^ (u16::from(*byte) << 8), |crc: u16, _| {
            if crc & 0x8000 == 0 { crc << 1 } else { (crc << 1) ^ 0x1021 }
        })
    })
}

/// The least number whose decimal digits fall in that slot.
pub(super) fn text_of_slot(slot_wanted: u16) -> String {
    static TEXTS: OnceLock<Vec<u32>> = OnceLock::new();
    let texts = TEXTS.get_or_init(|| {
        let mut texts = vec![None; usize::from(SLOTS)];
        let mut missing = texts.len();
        for number in 0_u32.. {
            let found = &mut texts[usize::from(slot(number.to_string().as_bytes()))];
            if found.is_none() {
                *found = Some(number);
                missing -= 1;
            }
            if missing == 0 {
                break;
            }
        }
        texts.into_iter().flatten().collect()
    });
    texts[usize::from(slot_wanted)].to_string()
}

/// The keys of one lock, written where they are needed without a copy in between.
#[derive(Debug)]
pub(super) struct Keys<'a> {
    prefix: &'a [u8],
    name: &'a [u8],
    tag: Tag<'a>,
}

impl Keys<'_> {
    fn lock_starts_with(&self, beginning: &[u8]) -> bool {
        self.prefix.iter().chain(self.name).zip(beginning).filter(|(a, b)| a == b).count() == beginning.len()
    }

    /// The lock itself.
    pub(super) fn lock(&self) -> Vec<u8> {
        [self.prefix, self.name].concat()
    }

    /// Whether the lock's key has no brace, so that its side keys have the whole of it between theirs.
    pub(super) fn is_plain(&self) -> bool {
        matches!(self.tag, Tag::Whole)
    }

    /// More bytes than any key of the lock has.
    pub(super) fn bound(&self) -> usize {
        2 * (self.prefix.len() + self.name.len()) + 56
    }

    pub(super) fn write_lock(&self, out: &mut impl Write) -> std::io::Result<()> {
        out.write_all(self.prefix)?;
        out.write_all(self.name)
    }

    /// The last token.
    pub(super) fn write_fence(&self, out: &mut impl Write) -> std::io::Result<()> {
        self.write_side(b"}:fence:", out)
    }

    /// The tombstone of one claim.
    pub(super) fn write_gone(&self, id: ClaimId, out: &mut impl Write) -> std::io::Result<()> {
        self.write_side(b"}:gone:", out)?;
        out.write_all(&owner(id)[3..OWNER_BYTES - 1])
    }

    /// The newest token that the guard at a resource of this key has seen.
    pub(super) fn write_guard(&self, out: &mut impl Write) -> std::io::Result<()> {
        self.write_side(b"}:guard:", out)
    }

    fn write_side(&self, kind: &[u8], out: &mut impl Write) -> std::io::Result<()> {
        out.write_all(b"leasehold:{")?;
        match &self.tag {
            Tag::Whole => self.write_lock(out)?,
            Tag::Text(text) => out.write_all(text)?,
        }
        out.write_all(kind)?;
        self.write_lock(out)
    }
}

/// The beginning of the value of a lock that `id` holds.
pub(super) fn owner(id: ClaimId) -> [u8; OWNER_BYTES] {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let mut text = *b"lh1:00000000000000000000000000000000:";
    for (pair, byte) in text[4..].chunks_exact_mut(2).zip(id.as_bytes()) {
        pair[0] = DIGITS[usize::from(byte >> 4)];
        pair[1] = DIGITS[usize::from(byte & 15)];
    }
    text
}

/// Every key of a lock in text, for tests and for the guard at a resource.
pub(super) fn guard_key(key: &[u8]) -> Vec<u8> {
    let tag = if is_braced(key) { tag_of(key) } else { Tag::Whole };
    let mut out = Vec::with_capacity(2 * key.len() + 20);
    let keys = Keys { prefix: b"", name: key, tag };
    // Writing to a Vec cannot fail.
    let _ = keys.write_guard(&mut out);
    out
}

/// The keys that a lock uses, for tests that put something else there.
#[doc(hidden)]
#[derive(Debug)]
pub struct KeyNames {
    /// The lock itself.
    pub lock: Vec<u8>,
    /// The last token.
    pub fence: Vec<u8>,
    /// The tombstone of the claim.
    pub gone: Vec<u8>,
}

/// The keys of the lock `name` under `prefix`, for the claim `id`.
///
/// # Errors
/// `Invalid` if the two together begin with `leasehold:`.
#[doc(hidden)]
pub fn key_names(prefix: &[u8], name: &Name, id: ClaimId) -> Result<KeyNames> {
    let space = Keyspace::new(prefix, false);
    let keys = space.keys(name)?;
    let (mut fence, mut gone) = (Vec::new(), Vec::new());
    // Writing to a Vec cannot fail.
    let _ = keys.write_fence(&mut fence).and_then(|()| keys.write_gone(id, &mut gone));
    Ok(KeyNames { lock: keys.lock(), fence, gone })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(prefix: &str, name: &str) -> KeyNames {
        key_names(prefix.as_bytes(), &Name::new(name).unwrap(), ClaimId::from_bytes([0xab; 16])).unwrap()
    }

    #[test]
    fn the_checksum_is_the_one_of_the_cluster_specification() {
        assert_eq!(crc16(b"123456789"), 0x31c3);
        assert_eq!(slot(b"foo"), 12182);
        assert_eq!(slot(b"{user1000}.following"), slot(b"user1000"));
        assert_eq!(slot(b"foo{}{bar}"), crc16(b"foo{}{bar}") % SLOTS);
        assert_eq!(slot(b"foo{{bar}}zap"), crc16(b"{bar") % SLOTS);
    }

    #[test]
    fn side_keys_are_readable_and_share_the_slot() {
        let plain = names("app:", "report");
        assert_eq!(plain.lock, b"app:report");
        assert_eq!(plain.fence, b"leasehold:{app:report}:fence:app:report");
        assert_eq!(
            plain.gone,
            [b"leasehold:{app:report}:gone:app:report:", &*"ab".repeat(16).into_bytes()].concat()
        );
        assert_eq!(names("", "a{b}c").fence, b"leasehold:{b}:fence:a{b}c");
        assert_eq!(names("{", "b}c").fence, b"leasehold:{b}:fence:{b}c");
        for name in
            ["x", "{", "}", "{}", "}{", "a{}b", "{{}}", "{a", "a}", "a}b{c", "{}{x}", "{x}{y}", "\n{\0}"]
        {
            for prefix in ["", "p", "{", "}", "{}", "{t}"] {
                let keys = names(prefix, name);
                assert_eq!(slot(&keys.lock), slot(&keys.fence), "{prefix} {name}");
                assert_eq!(slot(&keys.lock), slot(&keys.gone), "{prefix} {name}");
            }
        }
    }

    #[test]
    fn every_slot_has_a_text() {
        for number in 0..SLOTS {
            assert_eq!(slot(text_of_slot(number).as_bytes()), number);
        }
    }

    #[test]
    fn prefix_and_name_together_stay_out_of_the_reserved_keys() {
        let refused =
            |prefix: &[u8], name: &str| Keyspace::new(prefix, false).keys(&Name::new(name).unwrap()).is_err();
        assert!(refused(b"lease", "hold:x"));
        assert!(refused(b"leasehold", ":"));
        assert!(!refused(b"lease", "hold"));
        assert!(!refused(b"", "lease"));
        assert!(!refused(b"my", "leasehold:".trim_end_matches(':')));
    }

    #[test]
    fn an_owner_reads_as_the_claim() {
        let id = ClaimId::from_bytes(*b"\x00\x01\xfe\xff0123456789ab");
        assert_eq!(owner(id).to_vec(), format!("lh1:{id}:").into_bytes());
    }
}
