//! The arguments.

use std::path::PathBuf;

use clap::builder::PossibleValuesParser;
use clap::{Parser, Subcommand};
use vmkit_backends::qemu::Accelerator;

use crate::figures;

/// What bare QEMU costs on this machine, and what vmkit costs beside it.
///
/// Both are measured in turns in the same run, and medians are shown: absolute times say little on another machine, or an hour
/// later; the ratios are the figures to quote. Milliseconds, unless the name says otherwise.
#[derive(Parser, Debug)]
#[command(name = "vmkit-bench", version, max_term_width = 100)]
pub struct Args {
    #[command(subcommand)]
    pub command: Option<Command>,
    /// How many rounds are measured
    #[arg(long, global = true, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000), value_name = "N")]
    pub runs: u32,
    /// Print JSON
    #[arg(long, global = true)]
    pub json: bool,
    /// Measure only this figure, and what it is held against; may be given several times
    #[arg(long, global = true, value_parser = PossibleValuesParser::new(figures::names()), value_name = "NAME")]
    pub only: Vec<String>,
    /// Measure bare QEMU alone
    #[arg(long, global = true)]
    pub floor_only: bool,
    /// Draw the figures that somebody waits for, as SVG
    #[arg(long, global = true, value_name = "FILE")]
    pub svg: Option<PathBuf>,
    /// End with 1 when a ratio is over its target
    #[arg(long, global = true)]
    pub check: bool,
    /// How guests execute, ours and the floor's
    #[arg(long, global = true, env = "VMKIT_ACCEL", value_name = "auto|kvm|tcg", default_value = "tcg", value_parser = accelerator)]
    pub accel: Accelerator,
    /// Where images are kept; base is made when it is not there [default: as `vmkit`]
    #[arg(long, global = true, env = "VMKIT_STATE_DIR", value_name = "DIR")]
    pub state_dir: Option<PathBuf>,
}

#[derive(Subcommand, Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// Measure bare QEMU alone
    Floor,
    /// Have many machines ready at once, use every one of them, and show what each costs
    Density {
        /// How many; ten are measured before, to compare with
        #[arg(long, default_value_t = 500, value_parser = clap::value_parser!(u32).range(1..=100_000), value_name = "N")]
        machines: u32,
    },
}

fn accelerator(word: &str) -> Result<Accelerator, String> {
    word.parse().map_err(|_| "use auto, kvm or tcg".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_arguments_are_consistent() {
        Args::command().debug_assert();
    }

    #[test]
    fn a_figure_that_does_not_exist_is_refused() {
        assert!(Args::try_parse_from(["vmkit-bench", "--only", "cold_boot", "--only", "forks_per_s"]).is_ok());
        assert!(Args::try_parse_from(["vmkit-bench", "--only", "warm_boot"]).is_err());
        assert!(Args::try_parse_from(["vmkit-bench", "--runs", "0"]).is_err());
    }
}
