//! Exit codes. Those of the command pass through; these are Leasehold's own.

/// The lock was lost while the command ran, or cannot be shown to have been held.
pub(crate) const LOST: u8 = 123;
/// The lock was not acquired in time; nothing was run.
pub(crate) const BUSY: u8 = 124;
/// Leasehold itself failed; the command was not started.
pub(crate) const FAILURE: u8 = 125;
/// The command was found and cannot be executed.
pub(crate) const CANNOT_RUN: u8 = 126;
/// The command was not found.
pub(crate) const NOT_FOUND: u8 = 127;
/// The arguments are wrong.
pub(crate) const USAGE: u8 = 64;
/// `doctor` found something that keeps locks from working.
pub(crate) const UNHEALTHY: u8 = 1;

/// The code of a process that a signal ended, as shells count it.
pub(crate) fn signalled(number: i32) -> u8 {
    u8::try_from(number).map_or(u8::MAX, |number| number.saturating_add(128))
}
