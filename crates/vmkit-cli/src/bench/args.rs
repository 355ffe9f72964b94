//! The arguments of `vmkit bench`.

use std::path::PathBuf;
use std::time::Duration;

use clap::builder::{PossibleValuesParser, TypedValueParser};
use clap::{Args as ClapArgs, Subcommand, ValueEnum};
use vmkit::Id;
use vmkit::pool::{PoolConfig, Staging};
use vmkit_bench::{DensityArgs, FloorArgs, TableArgs};

use crate::args::{ShapeArgs, duration, id};

#[derive(ClapArgs, Debug)]
#[command(args_conflicts_with_subcommands = true, after_help = FIGURES)]
pub struct BenchArgs {
    #[command(subcommand)]
    pub command: Option<BenchCommand>,
    #[command(flatten)]
    pub table: TableArgs,
}

const FIGURES: &str = "\
Both are measured in turns in the same run, and medians are shown: absolute times say little on another machine, or
an hour later; the ratios are the figures to quote. Milliseconds, unless the name says otherwise.";

#[derive(Subcommand, Debug)]
pub enum BenchCommand {
    /// Measure bare QEMU alone
    Floor(FloorArgs),
    /// Have many machines ready at once, use every one of them, and show what each costs
    Density(DensityArgs),
    /// Measure a warm pool: from wanting a machine to the answer of its first command
    #[command(after_help = AFTER)]
    Pool(Box<PoolArgs>),
}

const AFTER: &str = "\
A request acquires a machine, has it execute `uname` (`true` when simulated), checks the answer, and gives the
machine back to be deleted. The requests are made in three patterns, each on a full pool:
  sequential  one after the other, each when the machine of the one before is replaced
  staggered   one every half of the sequential median, whatever the others do: they overlap
  burst       all at once
Where there are more requests than machines, the rest waits for replacements.

Percentiles are nearest ranks: of n latencies in order, p95 is number 0.95 n, rounded up, so one that was measured;
the median is p50. Failed requests have no latency, and count in the success rate.";

#[derive(ClapArgs, Debug)]
pub struct PoolArgs {
    /// What the machines are: real ones, or simulated hardware that takes no time, so that what is left is vmkit's own
    #[arg(long, value_enum, default_value = "qemu")]
    pub backend: Backend,
    /// How many machines the pool has
    #[arg(long, default_value_t = 4, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub size: u32,
    /// How they are kept ready
    #[arg(long, default_value = "running", value_name = "STAGING", value_parser = staging())]
    pub staging: Staging,
    /// Keep the processes of suspended or stopped machines started ahead of time, waiting for what they go on from
    #[arg(long)]
    pub prespawn: bool,
    /// How many requests each pattern has
    #[arg(long, default_value_t = 24, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub requests: u32,
    /// The pool's name: a second one of it at the same time is refused, a later one deletes what one that died left
    #[arg(long, default_value = "bench", value_name = "NAME", value_parser = id)]
    pub name: Id,
    #[command(flatten)]
    pub shape: ShapeArgs,
    /// How long a request may take, and how long the pool may be without a new machine while it fills
    #[arg(long, default_value = "5m", value_name = "TIME", value_parser = duration)]
    pub timeout: Duration,
    /// Only one pattern; staggered makes the sequential one too, which its interval follows
    #[arg(long, value_enum, value_name = "PATTERN")]
    pub only: Option<Pattern>,
    /// Print each request as well
    #[arg(long, conflicts_with = "json")]
    pub each: bool,
    /// Draw the latencies' distribution
    #[arg(long, value_name = "FILE")]
    pub svg: Option<PathBuf>,
}

#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backend {
    Qemu,
    Sim,
}

/// How requests follow each other.
#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pattern {
    Sequential,
    Staggered,
    Burst,
}

impl Pattern {
    pub const ALL: [Pattern; 3] = [Pattern::Sequential, Pattern::Staggered, Pattern::Burst];

    pub const fn name(self) -> &'static str {
        match self {
            Pattern::Sequential => "sequential",
            Pattern::Staggered => "staggered",
            Pattern::Burst => "burst",
        }
    }
}

impl PoolArgs {
    /// What is to be measured, in order.
    pub fn patterns(&self) -> Vec<Pattern> {
        let first = |pattern| pattern == Pattern::Sequential && self.only == Some(Pattern::Staggered);
        let wanted = |pattern: &Pattern| self.only.is_none_or(|only| only == *pattern || first(*pattern));
        Pattern::ALL.into_iter().filter(wanted).collect()
    }

    /// The pool that is measured: as it is by default, but for what was asked for.
    pub fn config(&self) -> PoolConfig {
        PoolConfig {
            name: self.name.to_string(),
            size: Some(self.size as usize),
            staging: self.staging,
            prespawn: self.prespawn,
            acquire_timeout: self.timeout,
            max_waiting: self.requests as usize,
            ..PoolConfig::default()
        }
    }
}

fn staging() -> impl TypedValueParser<Value = Staging> {
    PossibleValuesParser::new(["running", "suspended", "stopped"]).try_map(|word| word.parse::<Staging>())
}
