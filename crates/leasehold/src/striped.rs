//! A fixed number of locks for any number of keys.

use crate::mutex::Mutex;
use crate::set::MutexSet;
use crate::types::{InvalidName, Name, stable_hash};

/// The most stripes.
pub const MAX_STRIPES: u32 = 65_536;

/// A fixed number of locks that share any number of keys among themselves: for keys that are too many, or come from
/// outside, so that a lock for each would fill the store. Made by [`Locks::striped`](crate::Locks::striped); no I/O.
///
/// A key belongs to the same stripe in every process and in every version, as long as name and number of stripes are the
/// same: to change the number, stop all users first. The stripes are the locks `coupon:0`, `coupon:1` and so on, and can be
/// looked at under these names.
///
/// **Two keys may have one stripe**: work on two of them waits for each other, and who holds the lock of one key and then
/// waits for that of another may wait for itself. Take both at once: [`all_for`](Self::all_for).
#[derive(Clone, Debug)]
#[must_use]
pub struct Striped {
    template: Mutex,
    name: Vec<u8>,
    stripes: u32,
}

impl Striped {
    pub(crate) fn new(template: Mutex, name: &[u8], stripes: u32) -> Self {
        Self { template, name: name.to_vec(), stripes }
    }

    /// Sets the options that each stripe has.
    ///
    /// ```
    /// # use std::{sync::Arc, time::Duration};
    /// # use leasehold::{Locks, stores::memory::MemoryStore};
    /// # let locks = Locks::over(Arc::new(MemoryStore::new()))?;
    /// let coupons = locks.striped("coupon", 16).options(|each| each.ttl(Duration::from_secs(10)).label("redeem"));
    /// # let _ = coupons;
    /// # Ok::<(), leasehold::Error>(())
    /// ```
    pub fn options(mut self, set: impl FnOnce(Mutex) -> Mutex) -> Self {
        self.template = set(self.template);
        self
    }

    /// How many there are.
    pub fn stripes(&self) -> u32 {
        self.stripes
    }

    /// The number of the stripe that `key` belongs to: from 0 on, and less than the number of stripes.
    pub fn stripe_of(&self, key: impl AsRef<[u8]>) -> u32 {
        let hash = u128::from(stable_hash(&self.name, key.as_ref()));
        // As the hash is to all hashes, so is the stripe to all stripes.
        u32::try_from((hash * u128::from(self.stripes)) >> 64).unwrap_or_default()
    }

    /// The lock of `key`: any bytes, as many as you like. No I/O; a bad name or number of stripes is told by the first use.
    #[must_use]
    pub fn stripe_for(&self, key: impl AsRef<[u8]>) -> Mutex {
        self.template.named(self.stripe_name(self.stripe_of(key)))
    }

    /// The locks of several keys at once, all or nothing; keys of one stripe share it.
    pub fn all_for<K: AsRef<[u8]>>(&self, keys: impl IntoIterator<Item = K>) -> MutexSet {
        let names = keys.into_iter().map(|key| self.stripe_name(self.stripe_of(key)));
        MutexSet::of(self.template.clone(), names.collect())
    }

    fn stripe_name(&self, stripe: u32) -> Result<Name, InvalidName> {
        if !(1..=MAX_STRIPES).contains(&self.stripes) {
            return Err(InvalidName::new(format!(
                "a lock cannot have {} stripes: 1 to {MAX_STRIPES} are possible",
                self.stripes
            )));
        }
        // An empty one would be valid with its number.
        Name::new(&self.name)?;
        Name::new([&self.name, format!(":{stripe}").as_bytes()].concat())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::locks::Locks;
    use crate::stores::memory::MemoryStore;

    fn striped(name: &str, stripes: u32) -> Striped {
        Locks::over(Arc::new(MemoryStore::new())).unwrap().striped(name, stripes)
    }

    #[test]
    fn a_key_has_the_same_stripe_in_every_version() {
        // Found with another implementation of the hash too (python-xxhash).
        let coupons = striped("coupon", 16);
        for (key, stripe) in [("", 5), ("a", 12), ("customer 17", 11), ("é", 2)] {
            assert_eq!(coupons.stripe_of(key), stripe, "{key}: processes of two versions would both hold it");
            assert_eq!(coupons.stripe_for(key).name().unwrap().to_string(), format!("coupon:{stripe}"));
        }
    }

    #[test]
    fn keys_are_spread_evenly() {
        for stripes in [1, 2, 7, 64] {
            let (all, mut counts) = (striped("x", stripes), vec![0_u32; stripes as usize]);
            for n in 0..stripes * 1000 {
                counts[all.stripe_of(format!("customer {n}")) as usize] += 1;
            }
            assert!(counts.iter().all(|count| (800..1200).contains(count)), "{counts:?}");
        }
    }
}
