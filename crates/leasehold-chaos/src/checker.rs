//! The judge of histories: it knows only what the holders wrote down, nothing of how they came to hold.
//!
//! Every process appends one line `start,end,token` for each hold to a file of its own, by the boot-time clock that all
//! processes of a machine share: `start` is read after the lock was granted, `end` before it is given back.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::Path;

/// One hold of one lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Hold {
    /// When the holder was inside for certain, in nanoseconds of the boot-time clock.
    pub start: u64,
    /// Until when it was inside for certain.
    pub end: u64,
    /// Its fencing token.
    pub token: u64,
}

/// The boot-time clock in nanoseconds.
pub fn boot_nanos() -> u64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    let (seconds, nanos) = (u64::try_from(time.tv_sec), u64::try_from(time.tv_nsec));
    seconds.unwrap_or(0) * 1_000_000_000 + nanos.unwrap_or(0)
}

/// The first two holds that were inside together, if any two were. Sorts by start.
pub fn first_overlap(holds: &mut [Hold]) -> Option<(Hold, Hold)> {
    holds.sort_unstable();
    // If no neighbours meet, each ends before the next begins, and so no two of all meet.
    holds.windows(2).find(|pair| pair[0].end > pair[1].start).map(|pair| (pair[0], pair[1]))
}

/// The first two holds in the order of time whose tokens do not grow, if there are any. Sorts by start.
pub fn first_token_step_back(holds: &mut [Hold]) -> Option<(Hold, Hold)> {
    holds.sort_unstable();
    holds.windows(2).find(|pair| pair[0].token >= pair[1].token).map(|pair| (pair[0], pair[1]))
}

/// A file to which one process appends its holds.
#[derive(Debug)]
pub struct History(File);

impl History {
    /// Opens or makes the file.
    pub fn append_to(path: &Path) -> io::Result<Self> {
        Ok(Self(OpenOptions::new().append(true).create(true).open(path)?))
    }

    /// Writes one hold down, in one write.
    pub fn record(&mut self, hold: Hold) -> io::Result<()> {
        self.0.write_all(format!("{},{},{}\n", hold.start, hold.end, hold.token).as_bytes())
    }
}

/// Reads all the histories of a folder. A last line without its end is that of a killed process, and left out.
///
/// # Panics
/// If another line is not a hold: the judge must not overlook what it cannot read.
pub fn read_histories(folder: &Path) -> io::Result<Vec<Hold>> {
    let mut holds = Vec::new();
    for entry in fs::read_dir(folder)? {
        let text = fs::read_to_string(entry?.path())?;
        holds.extend(text.split_inclusive('\n').filter_map(|line| line.strip_suffix('\n')).map(parse));
    }
    Ok(holds)
}

fn parse(line: &str) -> Hold {
    let mut fields = line.split(',').map(str::parse::<u64>);
    match (fields.next(), fields.next(), fields.next(), fields.next()) {
        (Some(Ok(start)), Some(Ok(end)), Some(Ok(token)), None) if start <= end => Hold { start, end, token },
        _ => panic!("not a hold: {line:?}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hold(start: u64, end: u64, token: u64) -> Hold {
        Hold { start, end, token }
    }

    #[test]
    fn holds_that_only_touch_do_not_overlap() {
        assert_eq!(first_overlap(&mut [hold(20, 30, 2), hold(0, 10, 1), hold(10, 20, 3)]), None);
        assert_eq!(first_overlap(&mut []), None);
        assert_eq!(first_overlap(&mut [hold(1, 5, 1)]), None);
    }

    #[test]
    fn an_overlap_is_found_wherever_it_is() {
        let long = hold(0, 100, 1);
        assert_eq!(
            first_overlap(&mut [hold(50, 60, 3), long, hold(110, 120, 4)]),
            Some((long, hold(50, 60, 3)))
        );
        assert_eq!(
            first_overlap(&mut [hold(0, 1, 1), hold(5, 9, 2), hold(8, 9, 3)]),
            Some((hold(5, 9, 2), hold(8, 9, 3)))
        );
    }

    #[test]
    fn every_overlap_of_a_small_world_is_found() {
        // All pairs and triples of intervals over 0..5, against the definition.
        let all: Vec<Hold> = (0..5).flat_map(|s| (s..5).map(move |e| hold(s, e, 0))).collect();
        let meet = |a: Hold, b: Hold| a.start.max(b.start) < a.end.min(b.end);
        for a in &all {
            for b in &all {
                for c in &all {
                    // An empty hold inside another proves nothing by the definition: leave them out.
                    if [a, b, c].iter().any(|hold| hold.start == hold.end) {
                        continue;
                    }
                    let expected = meet(*a, *b) || meet(*a, *c) || meet(*b, *c);
                    assert_eq!(first_overlap(&mut [*a, *b, *c]).is_some(), expected, "{a:?} {b:?} {c:?}");
                }
            }
        }
    }

    #[test]
    fn tokens_must_grow_with_time() {
        assert_eq!(first_token_step_back(&mut [hold(5, 6, 9), hold(0, 1, 3)]), None);
        let (early, late) = (hold(0, 1, 3), hold(5, 6, 3));
        assert_eq!(first_token_step_back(&mut [late, early]), Some((early, late)));
    }

    #[test]
    fn histories_of_many_processes_are_read_and_a_torn_last_line_is_left_out() {
        let folder = tempfile::tempdir().unwrap();
        let start = boot_nanos();
        let mut history = History::append_to(&folder.path().join("1")).unwrap();
        history.record(hold(start, start + 1, 7)).unwrap();
        history.record(hold(start + 2, start + 3, 8)).unwrap();
        fs::write(folder.path().join("2"), "1,2,3\n4,5").unwrap();
        let mut holds = read_histories(folder.path()).unwrap();
        holds.sort_unstable();
        assert_eq!(holds, [hold(1, 2, 3), hold(start, start + 1, 7), hold(start + 2, start + 3, 8)]);
    }

    #[test]
    #[should_panic(expected = "not a hold")]
    fn a_hold_that_ends_before_it_starts_is_no_hold() {
        parse("5,4,1");
    }
}
