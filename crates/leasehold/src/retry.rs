//! How a waiter spaces its tries where the store cannot wake it.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use backon::{BackoffBuilder, ConstantBuilder, ExponentialBuilder};

/// The waits of one acquisition, in order; its end ends the acquisition.
pub type Waits = Box<dyn Iterator<Item = Duration> + Send>;

/// How long to wait between two tries for a busy lock, and how often.
///
/// Every acquisition starts the policy anew. A wait is cut short where the holder's lease is known to end sooner.
/// A store that wakes its waiters uses the policy only if it cannot. A wait of zero is taken as one millisecond, so that
/// no policy can turn into a busy loop.
///
/// # Default
/// Exponential from 4 ms to 256 ms with full jitter, without end: `lock` waits until it is granted.
#[derive(Clone)]
pub struct Retry {
    make: Arc<dyn Fn() -> Waits + Send + Sync>,
    /// Whether it is known to have no end.
    endless: bool,
}

impl Retry {
    /// Any iterator of waits, made anew for each acquisition.
    ///
    /// ```
    /// # use leasehold::Retry; use std::time::Duration;
    /// let fibonacci = Retry::from_fn(|| {
    ///     let mut pair = (10, 10);
    ///     std::iter::from_fn(move || {
    ///         pair = (pair.1, pair.0 + pair.1);
    ///         Some(Duration::from_millis(pair.0))
    ///     })
    ///     .take(12)
    /// });
    /// ```
    pub fn from_fn<I>(make: impl Fn() -> I + Send + Sync + 'static) -> Self
    where
        I: IntoIterator<Item = Duration>,
        I::IntoIter: Send + 'static,
    {
        Self { make: Arc::new(move || Box::new(make().into_iter())), endless: false }
    }

    fn endless(self) -> Self {
        Self { endless: true, ..self }
    }

    /// Whether it is known to have no end, so that nobody need ask it when that is.
    pub(crate) fn is_endless(&self) -> bool {
        self.endless
    }

    /// The same wait each time, without end.
    pub fn constant(wait: Duration) -> Self {
        Self::from_fn(move || ConstantBuilder::default().with_delay(wait).without_max_times().build())
            .endless()
    }

    /// `step`, twice `step`, three times `step`, and so on up to `most`, without end.
    pub fn linear(step: Duration, most: Duration) -> Self {
        Self::from_fn(move || (1_u32..).map(move |n| step.saturating_mul(n).min(most))).endless()
    }

    /// From `least`, doubling up to `most`, without end.
    pub fn exponential(least: Duration, most: Duration) -> Self {
        Self::from_fn(move || {
            ExponentialBuilder::default()
                .with_min_delay(least)
                .with_max_delay(most)
                .with_factor(2.0)
                .without_max_times()
                .build()
        })
        .endless()
    }

    /// The same policy with each wait drawn at random between nothing and its length ("full jitter"), which keeps
    /// waiters that began together from coming back together.
    #[must_use]
    pub fn with_jitter(self) -> Self {
        let endless = self.endless;
        Self { endless, ..Self::from_fn(move || self.waits().map(crate::clock::jitter)) }
    }

    /// The same policy, ended after so many waits: one more try than that is made.
    #[must_use]
    pub fn at_most(self, waits: usize) -> Self {
        Self::from_fn(move || self.waits().take(waits))
    }

    /// No second try: a busy lock ends the acquisition.
    pub fn never() -> Self {
        Self::from_fn(std::iter::empty)
    }

    /// The waits of one acquisition.
    pub fn waits(&self) -> Waits {
        (self.make)()
    }
}

impl Default for Retry {
    fn default() -> Self {
        Self::exponential(Duration::from_millis(4), Duration::from_millis(256)).with_jitter()
    }
}

impl fmt::Debug for Retry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Retry")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn millis(retry: &Retry) -> Vec<u128> {
        retry.waits().take(5).map(|wait| wait.as_millis()).collect()
    }

    #[test]
    fn the_ready_made_policies() {
        let ms = Duration::from_millis;
        assert_eq!(millis(&Retry::constant(ms(7))), [7; 5]);
        assert_eq!(millis(&Retry::linear(ms(10), ms(35))), [10, 20, 30, 35, 35]);
        assert_eq!(millis(&Retry::exponential(ms(4), ms(20))), [4, 8, 16, 20, 20]);
        assert_eq!(millis(&Retry::constant(ms(7)).at_most(2)), [7, 7]);
        assert_eq!(millis(&Retry::never()), [0; 0]);
        assert!(Retry::default().is_endless() && Retry::constant(ms(1)).is_endless());
        assert!(!Retry::default().at_most(9).with_jitter().is_endless() && !Retry::never().is_endless());
        let long = Retry::default().waits().take(2_000).collect::<Vec<_>>();
        assert!(long.len() == 2_000 && long.iter().all(|wait| *wait <= ms(256)));
        assert!(long.iter().collect::<std::collections::HashSet<_>>().len() > 100, "jitter is at work");
    }
}
