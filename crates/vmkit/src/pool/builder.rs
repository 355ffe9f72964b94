//! What a pool is built from.

use std::sync::Arc;
use std::time::Duration;

use super::config::{KeepFailed, OnFailure, PoolConfig, Reuse, Staging};
use super::plan::{DefaultSizing, Sizing, Tiers};
use super::tasks::{Backend, LABEL};
use super::{Parts, Pool};
use crate::console::ConsoleSinks;
use crate::driver::Provider;
use crate::error::{Error, ErrorKind, Result};
use crate::host::Host;
use crate::spec::{Id, Spec};

/// Builds a [`Pool`]. What is not set has the defaults of [`PoolConfig`].
#[must_use]
pub struct PoolBuilder {
    backend: Arc<dyn Backend>,
    spec: Spec,
    config: PoolConfig,
    sizing: Arc<dyn Sizing>,
    console: Console,
    seed: Option<u64>,
}

/// Where the output of each machine goes.
pub(super) type Console = Arc<dyn Fn(&Id) -> ConsoleSinks + Send + Sync>;

macro_rules! settings {
    ($($(#[$doc:meta])+ $name:ident: $type:ty => $field:ident = $value:expr;)+) => {
        $($(#[$doc])+
        pub fn $name(mut self, $name: $type) -> PoolBuilder {
            self.config.$field = $value;
            self
        })+
    };
}

impl PoolBuilder {
    pub(super) fn new<P: Provider>(host: Host<P>, spec: Spec) -> PoolBuilder {
        PoolBuilder {
            backend: Arc::new(host),
            spec,
            config: PoolConfig::default(),
            sizing: Arc::new(DefaultSizing),
            console: Arc::new(|_| ConsoleSinks::discard()),
            seed: None,
        }
    }

    /// Takes the whole configuration, such as one from a file.
    pub fn config(mut self, config: PoolConfig) -> PoolBuilder {
        self.config = config;
        self
    }

    settings! {
        /// Sets the name, up to 40 characters that are safe in file names.
        name: &str => name = name.to_owned();
        /// Sets how many machines there are.
        size: usize => size = Some(size);
        /// Sets how they are prepared.
        staging: Staging => staging = staging;
        /// Keeps the processes of suspended and stopped machines started ahead of time.
        prespawn: bool => prespawn = prespawn;
        /// Keeps machines in several tiers at once; their sum is the size.
        tiers: Tiers => tiers = Some(tiers);
        /// Keeps this many ready beyond those in use, instead of a fixed size.
        min_ready: usize => min_ready = Some(min_ready);
        /// Sets the most in all.
        max: usize => max = Some(max);
        /// Sets how many more there may be for attempts that hang, deletions that fail and exchanges.
        allowance: usize => allowance = allowance;
        /// Sets the overall bound of one deletion.
        cleanup_timeout: Duration => cleanup_timeout = cleanup_timeout;
        /// Sets the grace of [`Lease::release`](super::Lease::release).
        stop_timeout: Duration => stop_timeout = stop_timeout;
        /// Sets the limit of one attempt to make a machine.
        create_timeout: Duration => create_timeout = create_timeout;
        /// Sets the first pause after a failed attempt.
        create_backoff: Duration => create_backoff = create_backoff;
        /// Sets the longest pause after failed attempts.
        create_backoff_cap: Duration => create_backoff_cap = create_backoff_cap;
        /// Sets how many attempts there are at once.
        create_concurrency: usize => create_concurrency = create_concurrency;
        /// Sets the shortest time between the beginnings of two attempts.
        create_interval: Duration => create_interval = create_interval;
        /// Sets how often the ready command is executed.
        ready_runs: usize => ready_runs = ready_runs;
        /// Sets how long an acquire waits, unless it says otherwise.
        acquire_timeout: Duration => acquire_timeout = acquire_timeout;
        /// Sets how many callers may wait.
        max_waiting: usize => max_waiting = max_waiting;
        /// Sets what callers are told when nothing can be made.
        on_failure: OnFailure => on_failure = on_failure;
        /// Sets what becomes of machines that were used.
        reuse: Reuse => reuse = reuse;
        /// Sets how often an idle machine is asked whether it is well; zero for never.
        health_interval: Duration => health_interval = health_interval;
        /// Sets how long it may take to answer.
        health_timeout: Duration => health_timeout = health_timeout;
        /// Sets how recent an answer may be not to be asked for again at hand-over.
        health_fresh: Duration => health_fresh = health_fresh;
        /// Exchanges machines older than this.
        max_age: Duration => max_age = Some(max_age);
        /// Exchanges machines that were ready and unused for longer.
        max_idle: Duration => max_idle = Some(max_idle);
        /// Keeps failed leases for debugging.
        keep_failed: KeepFailed => keep_failed = Some(keep_failed);
        /// Sets whether closing deletes machines that are still held.
        delete_acquired_on_close: bool => delete_acquired_on_close = delete_acquired_on_close;
        /// Sets how many events a reader may be behind.
        event_buffer: usize => event_buffer = event_buffer;
    }

    /// Executes this in each machine after it has booted, before it counts as ready.
    pub fn ready_command(mut self, words: impl IntoIterator<Item = impl Into<String>>) -> PoolBuilder {
        self.config.ready_command = words.into_iter().map(Into::into).collect();
        self
    }

    /// Sets the weight of a caller key.
    pub fn weight(mut self, key: impl Into<String>, weight: u32) -> PoolBuilder {
        self.config.weights.insert(key.into(), weight);
        self
    }

    /// Replaces the policy that says how large the pool should be.
    pub fn sizing(mut self, sizing: impl Sizing) -> PoolBuilder {
        self.sizing = Arc::new(sizing);
        self
    }

    /// Sets where the output of each machine goes; called once for each start.
    pub fn console(mut self, console: impl Fn(&Id) -> ConsoleSinks + Send + Sync + 'static) -> PoolBuilder {
        self.console = Arc::new(console);
        self
    }

    /// Lets names and jitter follow from a seed, for tests that are to be replayed. Never in production: a second process
    /// would choose the same names.
    pub fn seed(mut self, seed: u64) -> PoolBuilder {
        self.seed = Some(seed);
        self
    }

    /// Builds it. Nothing happens before [`Pool::start`].
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`] for what is out of range.
    pub fn build(self) -> Result<Pool> {
        self.config.check()?;
        let name = self.config.id()?;
        if self.spec.labels.contains_key(LABEL) {
            let error = Error::new(ErrorKind::InvalidArgument, format!("the label {LABEL} is the pool's own"));
            return Err(error.hint("choose another label"));
        }
        if self.config.reuse == Reuse::Reset && self.spec.snapshot.is_some() {
            let error = Error::new(
                ErrorKind::InvalidArgument,
                "copies of a machine that ran have nothing that they could be reset to",
            );
            return Err(error.hint("leave reuse out"));
        }
        let spec = self.spec.label(LABEL, name.as_str());
        spec.check()?;
        let (backend, sizing, console, seed) = (self.backend, self.sizing, self.console, self.seed);
        Ok(Pool::new(name, self.config, Parts { backend, spec, sizing, console, seed }))
    }
}

impl std::fmt::Debug for PoolBuilder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PoolBuilder").field("spec", &self.spec).field("config", &self.config).finish_non_exhaustive()
    }
}
