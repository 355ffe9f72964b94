//! What a pool is to be, in code and in config files.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use super::plan::{Limits, Tier, Tiers};
use crate::error::{Error, ErrorKind, Result};
use crate::spec::Id;

/// The longest name of a pool: its machines' names have to begin with it.
const LONGEST_NAME: usize = 40;
/// More machines than any host has, and more events than anybody is behind: a mistake, not a wish.
pub(super) const LARGEST: usize = 1_000_000;

/// How machines are prepared.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Staging {
    /// Cloned, started and left running; handed over as they are, after a health check.
    #[default]
    Running,
    /// Cloned, started and suspended; resumed at acquire. Where machines cannot be suspended: [`Staging::Stopped`].
    Suspended,
    /// Cloned; started at acquire.
    Stopped,
}

/// What callers are told when nothing can be made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnFailure {
    /// They wait until their deadline; its error says why, and when it is tried next.
    #[default]
    Wait,
    /// The last attempt's error at once, and the first error of their own machine.
    FailFast,
}

/// What becomes of a machine that was used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Reuse {
    /// It is deleted, and another one is made.
    #[default]
    Never,
    /// It is reset: everything it had is deleted, and it is made again under its name; one that is started for that is proven
    /// new by its [`Birth`](crate::Birth). Where fresh machines are forks of a template, that takes as long as a fork. One that
    /// the pool has no room for, or whose deletion takes long, is only deleted, and another is made when one is missing.
    Reset,
}

/// A word of a closed set, read without regard to case.
trait Word: Copy + 'static {
    const WHAT: &'static str;
    const ALL: &'static [(&'static str, Self)];

    fn parse(word: &str) -> Result<Self> {
        let found = Self::ALL.iter().find(|(name, _)| name.eq_ignore_ascii_case(word));
        found.map(|(_, value)| *value).ok_or_else(|| {
            let names: Vec<&str> = Self::ALL.iter().map(|(name, _)| *name).collect();
            let message = format!("unknown {} {word:?}; valid are {}", Self::WHAT, names.join(", "));
            Error::new(ErrorKind::InvalidArgument, message).hint(format!("use one of {}", names.join(", ")))
        })
    }
}

impl Word for Staging {
    const WHAT: &'static str = "staging";
    const ALL: &'static [(&'static str, Staging)] =
        &[("running", Staging::Running), ("suspended", Staging::Suspended), ("stopped", Staging::Stopped)];
}

impl Word for OnFailure {
    const WHAT: &'static str = "on_failure";
    const ALL: &'static [(&'static str, OnFailure)] = &[("wait", OnFailure::Wait), ("fail_fast", OnFailure::FailFast)];
}

impl Word for Reuse {
    const WHAT: &'static str = "reuse";
    const ALL: &'static [(&'static str, Reuse)] = &[("never", Reuse::Never), ("reset", Reuse::Reset)];
}

macro_rules! word {
    ($type:ident) => {
        impl FromStr for $type {
            type Err = Error;

            /// Parses a name without regard to case; an unknown one is an error that lists those that are valid.
            fn from_str(word: &str) -> Result<$type> {
                <$type as Word>::parse(word)
            }
        }

        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                let name = <$type as Word>::ALL.iter().find(|(_, value)| value == self).map_or("", |(name, _)| name);
                f.pad(name)
            }
        }

        impl<'de> Deserialize<'de> for $type {
            fn deserialize<D: Deserializer<'de>>(from: D) -> Result<$type, D::Error> {
                let word = String::deserialize(from)?;
                word.parse().map_err(|error: Error| de::Error::custom(error.message()))
            }
        }

        impl Serialize for $type {
            fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
                to.collect_str(self)
            }
        }
    };
}

word!(Staging);
word!(OnFailure);
word!(Reuse);

impl Staging {
    /// The tier it fills.
    pub fn tier(self) -> Tier {
        match self {
            Staging::Running => Tier::Running,
            Staging::Suspended => Tier::Suspended,
            Staging::Stopped => Tier::Stopped,
        }
    }
}

/// Failed leases that are kept for debugging.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KeepFailed {
    /// How many at once; what fails beyond that is deleted.
    pub quota: usize,
    /// How long each.
    #[serde(with = "span")]
    pub period: Duration,
}

/// A pool's configuration. In a config file whatever is absent has its default, and a key that does not exist is an error
/// that lists those that do. Durations are written like `500ms` or `1m 30s`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PoolConfig {
    /// The name: machines carry it as the label `vmkit.pool`, and one living process at a time has it. `pool`.
    pub name: String,
    /// How many machines. 2, or the sum of `tiers`.
    pub size: Option<usize>,
    /// How they are prepared, unless there are `tiers`. `running`.
    pub staging: Staging,
    /// For machines that are kept suspended, and for stopped ones that are forks: keeps the hypervisor's process of each started,
    /// where it waits for the state to go on from ([`Instance::prespawn`](crate::Instance::prespawn)). An acquire is shorter by the
    /// start of a process, and each of them costs the memory of one that executes nothing. False.
    pub prespawn: bool,
    /// Several ways at once: so many running, so many suspended, so many stopped.
    pub tiers: Option<Tiers>,
    /// Keeps this many ready beyond those in use, instead of a fixed size.
    pub min_ready: Option<usize>,
    /// The most in all, and the most that [`Pool::resize`](super::Pool::resize) takes. When absent, the size, or `min_ready` if that is
    /// more, and a resize takes up to a million.
    pub max: Option<usize>,
    /// How many more there may be for attempts that hang, deletions that fail, and old machines being exchanged. 2; at
    /// least 1.
    pub allowance: usize,
    /// The overall bound of one deletion. 1 min.
    #[serde(with = "span")]
    pub cleanup_timeout: Duration,
    /// The grace of [`Lease::release`](super::Lease::release). 1 min.
    #[serde(with = "span")]
    pub stop_timeout: Duration,
    /// The limit of one attempt to make a machine. 5 min.
    #[serde(with = "span")]
    pub create_timeout: Duration,
    /// The pause after a failed attempt; it doubles, with jitter. 500 ms.
    #[serde(with = "span")]
    pub create_backoff: Duration,
    /// The longest pause. 30 s.
    #[serde(with = "span")]
    pub create_backoff_cap: Duration,
    /// Attempts at once. 4.
    pub create_concurrency: usize,
    /// The shortest time between the beginnings of two attempts. 0.
    #[serde(with = "span")]
    pub create_interval: Duration,
    /// A program and its arguments, executed in each machine after it has booted; one in which it fails is not ready. What it
    /// loads, a first command need not load. None.
    pub ready_command: Vec<String>,
    /// How often it is executed. Where guests are translated, what a machine did three times it does as fast as it ever
    /// will. 1.
    pub ready_runs: usize,
    /// How long an acquire waits, unless it says otherwise; `start` as well. 5 min.
    #[serde(with = "span")]
    pub acquire_timeout: Duration,
    /// How many callers may wait. 4096.
    pub max_waiting: usize,
    /// What they are told when nothing can be made. `wait`.
    pub on_failure: OnFailure,
    /// What becomes of machines that were used. `never`: they are deleted and replaced by others.
    pub reuse: Reuse,
    /// The weights of caller keys; 1 for those that are not named.
    pub weights: BTreeMap<String, u32>,
    /// How often an idle running machine is asked whether it is well. 30 s; 0 for never.
    #[serde(with = "span")]
    pub health_interval: Duration,
    /// How long it may take to answer. 5 s.
    #[serde(with = "span")]
    pub health_timeout: Duration,
    /// A machine that answered so recently, and has not been seen leaving Running, is not asked again when it is handed
    /// over. 0: each is asked.
    #[serde(with = "span")]
    pub health_fresh: Duration,
    /// Machines older than this are exchanged, one at a time.
    #[serde(with = "span::optional")]
    pub max_age: Option<Duration>,
    /// Machines that were ready and unused for longer are exchanged, one at a time.
    #[serde(with = "span::optional")]
    pub max_idle: Option<Duration>,
    /// Keep failed leases instead of deleting them.
    pub keep_failed: Option<KeepFailed>,
    /// Whether closing deletes machines that are still held. True. One that is left to its holder keeps the pool's name until
    /// its lease is dropped: a pool of that name would delete it.
    pub delete_acquired_on_close: bool,
    /// How many events a reader may be behind before it loses some. 1024.
    pub event_buffer: usize,
}

impl Default for PoolConfig {
    fn default() -> PoolConfig {
        let second = Duration::from_secs(1);
        PoolConfig {
            name: "pool".to_owned(),
            size: None,
            staging: Staging::Running,
            prespawn: false,
            tiers: None,
            min_ready: None,
            max: None,
            allowance: 2,
            cleanup_timeout: 60 * second,
            stop_timeout: 60 * second,
            create_timeout: 300 * second,
            create_backoff: second / 2,
            create_backoff_cap: 30 * second,
            create_concurrency: 4,
            create_interval: Duration::ZERO,
            ready_command: Vec::new(),
            ready_runs: 1,
            acquire_timeout: 300 * second,
            max_waiting: 4096,
            on_failure: OnFailure::Wait,
            reuse: Reuse::Never,
            weights: BTreeMap::new(),
            health_interval: 30 * second,
            health_timeout: 5 * second,
            health_fresh: Duration::ZERO,
            max_age: None,
            max_idle: None,
            keep_failed: None,
            delete_acquired_on_close: true,
            event_buffer: 1024,
        }
    }
}

impl PoolConfig {
    /// Checks the ranges, and that the parts agree.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`] that names the key.
    pub fn check(&self) -> Result<()> {
        let bad = |message: String| {
            Err(Error::new(ErrorKind::InvalidArgument, message).hint("correct the pool's configuration"))
        };
        self.id()?;
        // First: what is computed from them, or reserved for them, must not go beyond what there is.
        let Tiers { running, suspended, stopped } = self.tiers.unwrap_or_default();
        let limited = [
            ("size", self.size.unwrap_or(0)),
            ("tiers.running", running),
            ("tiers.suspended", suspended),
            ("tiers.stopped", stopped),
            ("min_ready", self.min_ready.unwrap_or(0)),
            ("max", self.max.unwrap_or(0)),
            ("event_buffer", self.event_buffer),
        ];
        if let Some((key, value)) = limited.into_iter().find(|(_, value)| *value > LARGEST) {
            return bad(format!("{key} is {value}: it may be at most {LARGEST}"));
        }
        if let (Some(size), Some(tiers)) = (self.size, self.tiers)
            && size != tiers.sum()
        {
            return bad(format!("size is {size} and tiers are {} in all: leave one out", tiers.sum()));
        }
        if self.size() == 0 {
            return bad("size is 0: a pool has at least one machine".to_owned());
        }
        if self.max.is_some_and(|max| max < self.size().max(self.min_ready.unwrap_or(0))) {
            return bad("max is less than size or min_ready".to_owned());
        }
        let positive = [
            ("allowance", self.allowance),
            ("create_concurrency", self.create_concurrency),
            ("ready_runs", self.ready_runs),
            ("event_buffer", self.event_buffer),
        ];
        if let Some((key, _)) = positive.into_iter().find(|(_, value)| *value == 0) {
            return bad(format!("{key} is 0: it has to be at least 1"));
        }
        if self.prespawn && self.limits().tiers.running == self.size() {
            return bad(
                "prespawn is for machines that are kept suspended or stopped, and all are kept running".to_owned()
            );
        }
        if self.size() > LARGEST {
            return bad(format!("tiers are {} in all: there may be at most {LARGEST}", self.size()));
        }
        if self.ready_command.first().is_some_and(String::is_empty)
            || self.ready_command.iter().any(|word| word.contains('\0'))
        {
            return bad("ready_command names no program, or has a zero byte".to_owned());
        }
        let spans = [
            ("cleanup_timeout", self.cleanup_timeout),
            ("create_timeout", self.create_timeout),
            ("create_backoff", self.create_backoff),
            ("create_backoff_cap", self.create_backoff_cap),
            ("health_timeout", self.health_timeout),
            ("max_age", self.max_age.unwrap_or(Duration::MAX)),
            ("max_idle", self.max_idle.unwrap_or(Duration::MAX)),
        ];
        if let Some((key, _)) = spans.into_iter().find(|(_, value)| value.is_zero()) {
            return bad(format!("{key} is 0: it has to be longer"));
        }
        if let Some((key, _)) = self.weights.iter().find(|(_, weight)| !(1..=1000).contains(*weight)) {
            return bad(format!("the weight of {key:?} is not from 1 to 1000"));
        }
        Ok(())
    }

    /// How many machines.
    pub fn size(&self) -> usize {
        self.size.unwrap_or_else(|| self.tiers.map_or(2, |tiers| tiers.sum()))
    }

    /// The pool's name, as one that is safe in file names.
    pub(super) fn id(&self) -> Result<Id> {
        if self.name.len() > LONGEST_NAME {
            let message = format!("the pool's name {:?} is longer than {LONGEST_NAME} characters", self.name);
            return Err(Error::new(ErrorKind::InvalidArgument, message).hint("choose a shorter one"));
        }
        Id::new(self.name.as_str())
    }

    pub(super) fn limits(&self) -> Limits {
        let tiers = self.tiers.unwrap_or_else(|| Tiers::only(self.staging.tier(), self.size()));
        let max = self.max.unwrap_or_else(|| self.size().max(self.min_ready.unwrap_or(0)));
        let (allowance, concurrency) = (self.allowance, self.create_concurrency);
        Limits { tiers, min_ready: self.min_ready, max, allowance, concurrency }
    }
}

/// Durations as people write them.
mod span {
    use std::time::Duration;

    use serde::{Deserialize, Deserializer, Serializer, de};

    pub(super) fn serialize<S: Serializer>(span: &Duration, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(&humantime::format_duration(*span))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Duration, D::Error> {
        parse(&String::deserialize(from)?)
    }

    fn parse<E: de::Error>(word: &str) -> Result<Duration, E> {
        humantime::parse_duration(word)
            .map_err(|why| E::custom(format!("{word:?} is not a duration such as \"500ms\" or \"1m 30s\": {why}")))
    }

    pub(super) mod optional {
        use super::*;

        pub(in super::super) fn serialize<S: Serializer>(span: &Option<Duration>, to: S) -> Result<S::Ok, S::Error> {
            match span {
                Some(span) => super::serialize(span, to),
                None => to.serialize_none(),
            }
        }

        pub(in super::super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Option<Duration>, D::Error> {
            Option::<String>::deserialize(from)?.map(|word| parse(&word)).transpose()
        }
    }
}
