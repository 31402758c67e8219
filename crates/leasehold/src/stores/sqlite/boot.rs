//! The clock that all processes of this machine share: the boot-time clock, and which boot it counts.

use std::fs;
use std::time::Duration;

use crate::clock;
use crate::error::{Error, ErrorKind, Result};

const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";
const TIME_OFFSETS: &str = "/proc/self/timens_offsets";

/// This boot of this machine, and how far this process's boot-time clock is off the machine's.
#[derive(Clone, Debug)]
pub(super) struct Boot {
    id: [u8; 16],
    /// Microseconds that a time namespace (a container's) adds to the clock.
    offset: i64,
}

impl Boot {
    /// Reads it from the kernel.
    pub(super) fn read() -> Result<Self> {
        let unreadable = || {
            Error::new(ErrorKind::Unsupported, format!("the id of this boot cannot be read from {BOOT_ID}"))
                .advise("the embedded store needs Linux with /proc mounted")
        };
        let text = fs::read_to_string(BOOT_ID).map_err(|e| unreadable().caused_by(e))?;
        let id = parse_boot_id(&text).ok_or_else(unreadable)?;
        // Kernels without time namespaces have no such file: their clocks are never off.
        let offset = fs::read_to_string(TIME_OFFSETS).map_or(0, |text| parse_boot_offset(&text));
        Ok(Self { id, offset })
    }

    /// The id as rows keep it.
    pub(super) fn id(&self) -> &[u8; 16] {
        &self.id
    }

    /// Microseconds since the machine booted, the same number for every process in whatever container.
    pub(super) fn now(&self) -> i64 {
        micros(clock::now().after_boot()).saturating_sub(self.offset)
    }
}

/// A duration in whole microseconds.
pub(super) fn micros(span: Duration) -> i64 {
    i64::try_from(span.as_micros()).unwrap_or(i64::MAX)
}

fn parse_boot_id(text: &str) -> Option<[u8; 16]> {
    let digits: String = text.trim().chars().filter(|c| *c != '-').collect();
    (digits.len() == 32).then(|| u128::from_str_radix(&digits, 16).ok().map(u128::to_be_bytes)).flatten()
}

/// The line `boottime <seconds> <nanoseconds>`, in microseconds.
fn parse_boot_offset(text: &str) -> i64 {
    text.lines()
        .map(str::split_whitespace)
        .find_map(|mut words| {
            (words.next() == Some("boottime")).then_some(())?;
            let seconds: i64 = words.next()?.parse().ok()?;
            let nanoseconds: i64 = words.next()?.parse().ok()?;
            Some(seconds.saturating_mul(1_000_000).saturating_add(nanoseconds / 1000))
        })
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_boot_id_is_read() {
        let id = parse_boot_id("00112233-4455-6677-8899-aabbccddeeff\n").unwrap();
        assert_eq!((id[0], id[15]), (0x00, 0xff));
        for bad in ["", "0011", "g0112233-4455-6677-8899-aabbccddeeff"] {
            assert_eq!(parse_boot_id(bad), None);
        }
    }

    #[test]
    fn the_offset_of_a_time_namespace_is_read() {
        assert_eq!(
            parse_boot_offset("monotonic           0         0\nboottime            0         0\n"),
            0
        );
        assert_eq!(parse_boot_offset("monotonic 7 0\nboottime  86400 5000\n"), 86_400_000_005);
        assert_eq!(parse_boot_offset("boottime -3 250000000\n"), -2_750_000);
        assert_eq!(parse_boot_offset("nonsense"), 0);
    }
}
