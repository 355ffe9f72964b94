//! How long a caller will wait, from what was seen so far.

use std::time::Duration;

use tokio::time::Instant;

/// How fast waiters are served, from what was seen.
#[derive(Default)]
pub(super) struct Pace {
    last: Option<Instant>,
    gap: Option<Duration>,
    create: Option<Duration>,
}

impl Pace {
    /// A waiter was served; `more` when others wait.
    pub(super) fn served(&mut self, now: Instant, more: bool) {
        if let Some(last) = self.last {
            self.gap = Some(mix(self.gap, now.duration_since(last)));
        }
        self.last = more.then_some(now);
    }

    pub(super) fn created(&mut self, took: Duration) {
        self.create = Some(mix(self.create, took));
    }

    /// How long until the waiter with so many ahead is served.
    pub(super) fn estimate(&self, ahead: usize, concurrency: usize) -> Option<Duration> {
        let turns = u32::try_from(ahead + 1).unwrap_or(u32::MAX);
        let at_once = u32::try_from(concurrency.max(1)).unwrap_or(u32::MAX);
        match (self.gap, self.create) {
            (Some(gap), _) => Some(gap.saturating_mul(turns)),
            (None, Some(create)) => Some(create.saturating_mul(turns.div_ceil(at_once))),
            (None, None) => None,
        }
    }
}

/// A moving average: one fifth of the new.
fn mix(old: Option<Duration>, new: Duration) -> Duration {
    old.map_or(new, |old| old.mul_f64(0.8) + new.mul_f64(0.2))
}
