//! Doubling pauses with a cap and jitter, and the seeded numbers for it.

use std::time::Duration;

use tokio::time::Instant;

use super::plan::Gate;

/// The pauses after failures in a row.
#[derive(Debug)]
pub(super) struct Backoff {
    first: Duration,
    cap: Duration,
    gate: Gate,
}

impl Backoff {
    pub(super) fn new(first: Duration, cap: Duration) -> Backoff {
        Backoff { first, cap, gate: Gate::default() }
    }

    /// Notes a failure. Several at once are one: they failed of the same cause, and would otherwise double each other.
    pub(super) fn fail(&mut self, now: Instant, random: &mut Random) {
        if self.gate.opens.is_some_and(|at| at > now) {
            return;
        }
        self.gate.opens = Some(after(now, pause(self.first, self.cap, self.gate.failures, random)));
        self.gate.failures = self.gate.failures.saturating_add(1);
    }

    pub(super) fn succeed(&mut self) {
        self.gate = Gate::default();
    }

    pub(super) fn gate(&self) -> Gate {
        self.gate
    }
}

/// The pause after `failures` earlier ones: doubled each time up to the cap, and then up to a quarter less, so that many
/// pools that failed together do not try together.
pub(super) fn pause(first: Duration, cap: Duration, failures: u32, random: &mut Random) -> Duration {
    let full = first.saturating_mul(1_u32.checked_shl(failures).unwrap_or(u32::MAX)).min(cap);
    full.mul_f64(1.0 - random.fraction() / 4.0)
}

/// That much later. A time beyond what a clock can say is one that nobody lives to see.
pub(super) fn after(at: Instant, span: Duration) -> Instant {
    at.checked_add(span).unwrap_or_else(|| at + Duration::from_secs(100 * 365 * 24 * 3600))
}

/// Numbers that follow from a seed (SplitMix64): names and jitter need no better ones.
#[derive(Debug)]
pub(super) struct Random(u64);

impl Random {
    pub(super) fn new(seed: u64) -> Random {
        Random(seed)
    }

    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn fraction(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1_u64 << 53) as f64
    }
}
