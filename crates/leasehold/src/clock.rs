//! The only room that reads time or randomness.
//!
//! Leases are counted by the boot-time clock (`CLOCK_BOOTTIME`), which goes on while the machine is suspended, and
//! deadlines wait on a timer of that clock: the timers of ordinary runtimes stop with the machine and would let a
//! guard look alive for as long as the suspend lasted. One thread serves every sleeper of the process, so a sleep
//! needs no runtime and works under any executor.

use std::collections::BTreeMap;
use std::future::Future;
use std::pin::{Pin, pin};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::types::ClaimId;

/// A moment of the boot-time clock. Arithmetic saturates: nothing that has ended can look long.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Instant(Duration);

impl Instant {
    /// Later than any other.
    pub const FAR: Self = Self(Duration::MAX);

    /// The moment so long after the machine booted.
    pub const fn since_boot(elapsed: Duration) -> Self {
        Self(elapsed)
    }

    /// How long after the machine booted.
    pub const fn after_boot(self) -> Duration {
        self.0
    }

    /// How long after `earlier`; zero if it is not after it.
    #[must_use]
    pub const fn since(self, earlier: Self) -> Duration {
        self.0.saturating_sub(earlier.0)
    }

    /// This moment, later by `span`.
    #[must_use]
    pub const fn plus(self, span: Duration) -> Self {
        Self(self.0.saturating_add(span))
    }

    /// This moment, earlier by `span`.
    #[must_use]
    pub const fn minus(self, span: Duration) -> Self {
        Self(self.0.saturating_sub(span))
    }
}

/// One look at both clocks of this machine.
#[derive(Clone, Copy, Debug)]
pub struct Now {
    /// The boot-time clock.
    pub boot: Instant,
    /// The wall clock since the Unix epoch. It is compared only with itself, never with a server's.
    pub wall: Duration,
}

/// The time now by the boot-time clock.
pub fn now() -> Instant {
    system::boot_time()
}

/// The time now by both clocks.
pub fn look() -> Now {
    Now { boot: now(), wall: wall() }
}

/// The wall clock since the Unix epoch, for display and for finding that it was moved.
#[expect(clippy::disallowed_methods, reason = "this is the seam")]
pub fn wall() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

/// A claim id that nobody can guess or make again: 128 bits from the operating system.
#[expect(clippy::disallowed_methods, reason = "this is the seam")]
pub fn claim_id() -> ClaimId {
    // Asking the kernel for a few hundred ids at once keeps reading from it out of every lock.
    thread_local! {
        static POOL: std::cell::RefCell<([u8; 4096], usize, u32)> = const { std::cell::RefCell::new(([0; 4096], 4096, 0)) };
    }
    let mut id = [0; 16];
    POOL.with_borrow_mut(|(pool, used, owner)| {
        // A forked process has a copy of what is left: the same id made by both would be one claim with two holders.
        let process = std::process::id();
        if *used == pool.len() || *owner != process {
            getrandom::fill(pool).expect("the operating system gives random bytes");
            (*used, *owner) = (0, process);
        }
        id.copy_from_slice(&pool[*used..*used + 16]);
        pool[*used..*used + 16].fill(0);
        *used += 16;
    });
    ClaimId::from_bytes(id)
}

/// A random duration in `0..limit`, for spreading load; not for secrets.
pub fn jitter(limit: Duration) -> Duration {
    limit.mul_f64(fastrand::f64())
}

/// Waits until `deadline` by the boot-time clock. Dropping it forgets the timer.
pub fn sleep_until(deadline: Instant) -> Sleep {
    Sleep { deadline, registered: None }
}

/// Waits for `span` by the boot-time clock.
pub fn sleep(span: Duration) -> Sleep {
    sleep_until(now().plus(span))
}

/// What `work` gives, or `None` if `deadline` comes first; the work is then dropped.
pub async fn timeout_at<T>(deadline: Instant, work: impl Future<Output = T>) -> Option<T> {
    let mut work = pin!(work);
    let mut sleep = sleep_until(deadline);
    std::future::poll_fn(|cx| {
        if let Poll::Ready(out) = work.as_mut().poll(cx) {
            return Poll::Ready(Some(out));
        }
        Pin::new(&mut sleep).poll(cx).map(|()| None)
    })
    .await
}

/// A wait for a moment of the boot-time clock; see [`sleep_until`].
#[derive(Debug)]
#[must_use = "a sleep does nothing unless awaited"]
pub struct Sleep {
    deadline: Instant,
    registered: Option<(&'static Timers, u64)>,
}

impl Future for Sleep {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let deadline = self.deadline;
        if deadline == Instant::FAR {
            // Never comes, so nobody need be woken for it.
            return Poll::Pending;
        }
        if now() >= deadline {
            return Poll::Ready(());
        }
        let (timers, key) = match self.registered {
            Some((timers, key)) => (timers, Some(key)),
            None => (timers(), None),
        };
        self.registered = Some((timers, timers.register(key, deadline, cx.waker())));
        Poll::Pending
    }
}

impl Drop for Sleep {
    fn drop(&mut self) {
        if let Some((timers, key)) = self.registered {
            timers.forget(self.deadline, key);
        }
    }
}

/// All sleepers of the process, by deadline, and the alarm that wakes the thread which wakes them.
struct Timers {
    process: u32,
    table: Mutex<Table>,
    alarm: system::Alarm,
    thread: OnceLock<()>,
    /// Those of a process that this one's was forked into.
    forked: OnceLock<&'static Timers>,
}

impl std::fmt::Debug for Timers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Timers").field("process", &self.process).finish_non_exhaustive()
    }
}

#[derive(Default)]
struct Table {
    sleepers: BTreeMap<(Instant, u64), Waker>,
    next_key: u64,
    /// When the alarm goes off next; never later than the first sleeper's deadline.
    armed: Option<Instant>,
}

fn timers() -> &'static Timers {
    static TIMERS: OnceLock<Timers> = OnceLock::new();
    let process = std::process::id();
    let mut timers = TIMERS.get_or_init(|| Timers::new(process));
    while timers.process != process {
        // A forked process has no copy of the thread, and must not move the alarm that it shares with its parent.
        timers = timers.forked.get_or_init(|| Box::leak(Box::new(Timers::new(process))));
    }
    timers.thread.get_or_init(|| {
        std::thread::Builder::new()
            .name("leasehold-clock".into())
            .spawn(|| timers.serve())
            .expect("a thread for the clock can be started");
    });
    timers
}

impl Timers {
    fn new(process: u32) -> Self {
        Self {
            process,
            table: Mutex::default(),
            alarm: system::Alarm::new(),
            thread: OnceLock::new(),
            forked: OnceLock::new(),
        }
    }

    fn table(&self) -> std::sync::MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn register(&self, key: Option<u64>, deadline: Instant, waker: &Waker) -> u64 {
        let mut table = self.table();
        let key = key.unwrap_or_else(|| {
            table.next_key += 1;
            table.next_key
        });
        let mut replaced = None;
        match table.sleepers.get_mut(&(deadline, key)) {
            Some(known) if known.will_wake(waker) => {}
            known => {
                let new = waker.clone();
                match known {
                    Some(known) => replaced = Some(std::mem::replace(known, new)),
                    None => drop(table.sleepers.insert((deadline, key), new)),
                }
            }
        }
        if table.armed.is_none_or(|armed| deadline < armed) {
            table.armed = Some(deadline);
            self.alarm.set(deadline);
        }
        drop(table);
        // Not under the lock: a waker may be the last owner of a task, and the task of another sleep.
        drop(replaced);
        key
    }

    fn forget(&self, deadline: Instant, key: u64) {
        // The alarm is left as it is: ringing for nobody is cheaper than setting it for every call that ended in time.
        let waker = self.table().sleepers.remove(&(deadline, key));
        drop(waker);
    }

    fn serve(&self) {
        let mut due = Vec::new();
        loop {
            self.alarm.wait();
            let mut table = self.table();
            let now = now();
            let later = table.sleepers.split_off(&(now, u64::MAX));
            due.extend(std::mem::replace(&mut table.sleepers, later).into_values());
            table.armed = table.sleepers.keys().next().map(|(deadline, _)| *deadline);
            if let Some(deadline) = table.armed {
                self.alarm.set(deadline);
            }
            drop(table);
            due.drain(..).for_each(Waker::wake);
        }
    }
}

#[cfg(target_os = "linux")]
mod system {
    use std::os::fd::OwnedFd;
    use std::time::Duration;

    use rustix::time::{
        ClockId, Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, clock_gettime,
        timerfd_create, timerfd_settime,
    };

    use super::Instant;

    pub(super) fn boot_time() -> Instant {
        let time = clock_gettime(ClockId::Boottime);
        let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
        Instant(Duration::new(seconds, u32::try_from(time.tv_nsec).unwrap_or(0)))
    }

    /// A timer of the boot-time clock. Setting it while a thread waits moves that thread's alarm.
    pub(super) struct Alarm(OwnedFd);

    impl Alarm {
        pub(super) fn new() -> Self {
            Self(
                timerfd_create(TimerfdClockId::Boottime, TimerfdFlags::CLOEXEC)
                    .expect("the kernel gives a boot-time timer"),
            )
        }

        pub(super) fn set(&self, deadline: Instant) {
            // Zero would disarm it, and a moment past the kernel's range can wait until it is asked for again.
            let at = deadline.after_boot().clamp(Duration::from_nanos(1), Duration::from_secs(1 << 40));
            let value = Timespec {
                tv_sec: i64::try_from(at.as_secs()).unwrap_or(i64::MAX),
                tv_nsec: i64::from(at.subsec_nanos()),
            };
            let spec = Itimerspec { it_interval: Timespec { tv_sec: 0, tv_nsec: 0 }, it_value: value };
            timerfd_settime(&self.0, TimerfdTimerFlags::ABSTIME, &spec).expect("the timer can be set");
        }

        pub(super) fn wait(&self) {
            // An interrupted read is an early ring, which costs one look at the table.
            let _ = rustix::io::read(&self.0, &mut [0; 8]);
        }
    }
}

#[cfg(not(target_os = "linux"))]
#[expect(clippy::disallowed_methods, reason = "this is the seam")]
mod system {
    use std::sync::{Condvar, Mutex, OnceLock, PoisonError};
    use std::time::Duration;

    use super::Instant;

    /// The monotonic clock of the standard library: whether it counts a suspend depends on the system.
    pub(super) fn boot_time() -> Instant {
        static START: OnceLock<std::time::Instant> = OnceLock::new();
        // Off zero, so that a moment just before the first look has somewhere to be.
        Instant(START.get_or_init(std::time::Instant::now).elapsed() + Duration::from_secs(1 << 20))
    }

    pub(super) struct Alarm(Mutex<Option<Instant>>, Condvar);

    impl Alarm {
        pub(super) fn new() -> Self {
            Self(Mutex::new(None), Condvar::new())
        }

        pub(super) fn set(&self, deadline: Instant) {
            *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(deadline);
            self.1.notify_one();
        }

        pub(super) fn wait(&self) {
            let mut at = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            loop {
                let left = at.map_or(Duration::from_secs(3600), |at| at.since(boot_time()));
                if left.is_zero() {
                    *at = None;
                    return;
                }
                at = self.1.wait_timeout(at, left).unwrap_or_else(PoisonError::into_inner).0;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arithmetic_saturates() {
        let early = Instant::since_boot(Duration::from_secs(1));
        let late = Instant::since_boot(Duration::from_secs(2));
        assert_eq!(early.since(late), Duration::ZERO);
        assert_eq!(early.minus(Duration::from_secs(5)), Instant::since_boot(Duration::ZERO));
        assert_eq!(Instant::FAR.plus(Duration::from_secs(5)), Instant::FAR);
    }

    #[test]
    fn sleepers_wake_in_the_order_of_their_deadlines_and_never_early() {
        let start = now();
        let order = Mutex::new(Vec::new());
        std::thread::scope(|scope| {
            for millis in [60, 20, 40] {
                let order = &order;
                scope.spawn(move || {
                    let deadline = start.plus(Duration::from_millis(millis));
                    pollster::block_on(sleep_until(deadline));
                    assert!(now() >= deadline);
                    order.lock().unwrap().push(millis);
                });
            }
        });
        assert_eq!(*order.lock().unwrap(), [20, 40, 60]);
    }

    #[test]
    fn a_timeout_drops_the_work_and_a_dropped_sleep_leaves_no_timer() {
        let got = pollster::block_on(timeout_at(
            now().plus(Duration::from_millis(5)),
            std::future::pending::<()>(),
        ));
        assert_eq!(got, None);
        let mut sleep = Box::pin(sleep(Duration::from_secs(3600)));
        assert!(sleep.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending());
        let (deadline, key) = (sleep.deadline, sleep.registered.unwrap().1);
        assert!(timers().table().sleepers.contains_key(&(deadline, key)));
        drop(sleep);
        assert!(!timers().table().sleepers.contains_key(&(deadline, key)));
    }

    #[test]
    fn claim_ids_do_not_repeat() {
        let ids: std::collections::HashSet<_> = (0..10_000).map(|_| claim_id()).collect();
        assert_eq!(ids.len(), 10_000);
    }
}
