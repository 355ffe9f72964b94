//! The arguments of the commands that measure.

use std::path::PathBuf;

use clap::Args;
use clap::builder::PossibleValuesParser;

use crate::figures;

/// What bare QEMU costs, and what vmkit costs beside it.
#[derive(Args, Clone, Debug, PartialEq, Eq)]
pub struct TableArgs {
    /// How many rounds are measured
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000), value_name = "N")]
    pub runs: u32,
    /// Measure only this figure, and what it is held against; may be given several times
    #[arg(long, value_parser = PossibleValuesParser::new(figures::names()), hide_possible_values = true, value_name = "FIGURE")]
    pub only: Vec<String>,
    /// Draw each ratio beside its limit
    #[arg(long, value_name = "FILE")]
    pub svg: Option<PathBuf>,
    /// End with 1 when a ratio is over its limit
    #[arg(long)]
    pub check: bool,
}

/// What bare QEMU costs.
#[derive(Args, Clone, Debug, PartialEq, Eq)]
pub struct FloorArgs {
    /// How many rounds are measured
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000), value_name = "N")]
    pub runs: u32,
    /// Measure only this figure; may be given several times
    #[arg(long, value_parser = PossibleValuesParser::new(figures::FLOOR.iter().map(|(name, _)| *name)), hide_possible_values = true, value_name = "FIGURE")]
    pub only: Vec<String>,
}

/// What many machines cost.
#[derive(Args, Clone, Debug, PartialEq, Eq)]
pub struct DensityArgs {
    /// How many; ten are measured before, to compare with
    #[arg(long, default_value_t = 500, value_parser = clap::value_parser!(u32).range(1..=100_000), value_name = "N")]
    pub machines: u32,
}
