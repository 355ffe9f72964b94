//! What is counted and timed, through the `metrics` facade.
//!
//! Registered once, when the pool starts: install the recorder before. All carry the label `pool`.
//!
//! | metric | what |
//! |---|---|
//! | `vmkit_pool_queued_seconds` | from the acquire until a machine was there for it |
//! | `vmkit_pool_start_seconds` | starting or resuming a cold machine |
//! | `vmkit_pool_health_seconds`, `vmkit_pool_bind_seconds` | the check, or the late binding, at hand-over |
//! | `vmkit_pool_handed_over_seconds` | an acquire, all of it; its count is that of the machines handed over |
//! | `vmkit_pool_create_seconds{tier}` | making a machine; its count is that of the machines made |
//! | `vmkit_pool_create_failed_total`, `vmkit_pool_unfit_total` | attempts that failed, machines found dead |
//! | `vmkit_pool_released_total`, `vmkit_pool_deleted_total` | leases that ended, machines deleted |
//! | `vmkit_pool_vms{phase}` | machines now: `ready`, `creating`, `unreleased`, `leaked` |
//! | `vmkit_pool_waiting` | callers in the queue now |

use metrics::{Counter, Gauge, Histogram, counter, gauge, histogram};

use super::plan::{Counts, Tier};

/// The handles: looking one up by its name for each use would cost more than what is measured.
#[derive(Clone)]
pub(super) struct Metrics {
    pub queued: Histogram,
    pub start: Histogram,
    pub health: Histogram,
    pub bind: Histogram,
    pub handed_over: Histogram,
    pub create: [Histogram; 3],
    pub create_failed: Counter,
    pub unfit: Counter,
    pub released: Counter,
    pub deleted: Counter,
    ready: Gauge,
    creating: Gauge,
    unreleased: Gauge,
    leaked: Gauge,
    waiting: Gauge,
}

impl Metrics {
    pub(super) fn new(pool: &str) -> Metrics {
        let pool = pool.to_owned();
        let vms = |phase: &'static str| gauge!("vmkit_pool_vms", "pool" => pool.clone(), "phase" => phase);
        Metrics {
            queued: histogram!("vmkit_pool_queued_seconds", "pool" => pool.clone()),
            start: histogram!("vmkit_pool_start_seconds", "pool" => pool.clone()),
            health: histogram!("vmkit_pool_health_seconds", "pool" => pool.clone()),
            bind: histogram!("vmkit_pool_bind_seconds", "pool" => pool.clone()),
            handed_over: histogram!("vmkit_pool_handed_over_seconds", "pool" => pool.clone()),
            create: Tier::ALL
                .map(|tier| histogram!("vmkit_pool_create_seconds", "pool" => pool.clone(), "tier" => tier.name())),
            create_failed: counter!("vmkit_pool_create_failed_total", "pool" => pool.clone()),
            unfit: counter!("vmkit_pool_unfit_total", "pool" => pool.clone()),
            released: counter!("vmkit_pool_released_total", "pool" => pool.clone()),
            deleted: counter!("vmkit_pool_deleted_total", "pool" => pool.clone()),
            ready: vms("ready"),
            creating: vms("creating"),
            unreleased: vms("unreleased"),
            leaked: vms("leaked"),
            waiting: gauge!("vmkit_pool_waiting", "pool" => pool.clone()),
        }
    }

    pub(super) fn show(&self, counts: &Counts) {
        self.ready.set(counts.ready.sum() as f64);
        self.creating.set(counts.creating.sum() as f64);
        self.unreleased.set(counts.unreleased as f64);
        self.leaked.set(counts.leaked as f64);
        self.waiting.set(counts.waiting as f64);
    }
}
