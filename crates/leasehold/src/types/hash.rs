//! The hash by which names are shared out: part of what processes agree on, and so never to change.

use xxhash_rust::xxh3::{xxh3_64, xxh3_64_with_seed};

/// A number for `key` within `family`, the same in every process, on every machine and in every version: XXH3 (64 bits) of
/// the key, seeded with that of the family.
pub(crate) fn stable_hash(family: &[u8], key: &[u8]) -> u64 {
    xxh3_64_with_seed(key, xxh3_64(family))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hash_is_the_one_that_its_specification_gives() {
        // The empty input, as the specification of XXH3 has it; the others were found with python-xxhash too.
        assert_eq!(xxh3_64(b""), 0x2d06_8005_38d3_94c2);
        let golden = [
            ("", "", 0x412f_1275_e100_17f3),
            ("a", "b", 0xe8b9_79c9_572d_c50c),
            ("redis://a:6379", "tenant:123:report", 0xd01d_9d75_88a3_4335),
        ];
        for (family, key, number) in golden {
            assert_eq!(stable_hash(family.as_bytes(), key.as_bytes()), number, "{family} {key}");
        }
    }
}
