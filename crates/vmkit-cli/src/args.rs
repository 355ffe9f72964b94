//! The arguments.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args as ClapArgs, Parser, Subcommand, ValueEnum};
use tracing_subscriber::filter::Targets;
use vmkit::{Id, State};
use vmkit_backends::qemu::Accelerator;

use crate::bench::BenchArgs;

/// Virtual machines, now: clone, start, execute, suspend, stop, delete.
#[derive(Parser, Debug)]
#[command(name = "vmkit", version, about, max_term_width = 100, after_help = AFTER)]
pub struct Args {
    #[command(subcommand)]
    pub command: Command,
    /// Where machines and images are kept [env: VMKIT_STATE_DIR] [default: vmkit in $XDG_STATE_HOME or ~/.local/state]
    #[arg(long, global = true, value_name = "DIR", value_parser = clap::value_parser!(OsString), help_heading = "Global options")]
    pub state_dir: Option<OsString>,
    /// Boot fresh machines instead of forking them from their image's template
    #[arg(long, global = true, help_heading = "Global options")]
    pub no_template: bool,
    /// How guests execute: auto takes KVM where it works
    #[arg(long, global = true, env = "VMKIT_ACCEL", value_name = "auto|kvm|tcg", default_value = "auto", value_parser = accelerator, hide_default_value = true, help_heading = "Global options")]
    pub accel: Accelerator,
    /// What to tell of what goes on inside: off, error, warn, info, debug, trace, or for parts of it (vmkit_backends=debug)
    #[arg(long, global = true, env = "VMKIT_LOG", value_name = "LEVEL", default_value = crate::log::DEFAULT, value_parser = crate::log::filter, help_heading = "Global options")]
    pub log: Targets,
    /// Print JSON, errors too
    #[arg(long, global = true, help_heading = "Global options")]
    pub json: bool,
    /// Print no progress and no remarks
    #[arg(short, long, global = true, help_heading = "Global options")]
    pub quiet: bool,
}

const AFTER: &str = "\
Exit codes:
  0 done  1 failed  2 usage  3 not found  4 not allowed in the machine's state
  5 timed out  6 something needed is not installed  128+n ended by signal n
`run` and `exec` end with the command's own code, and with
  124 its timeout passed  125 vmkit failed  126 not executable  127 not found
  128+n killed by signal n";

#[derive(Subcommand, Debug)]
pub enum Command {
    /// Run a command in a fresh machine, and delete it
    Run(RunArgs),
    /// Execute a command in a running machine
    Exec(ExecArgs),
    /// Make a machine from an image
    Clone(CloneArgs),
    /// Start machines, or resume suspended ones
    Start {
        /// The machines
        #[arg(required = true, value_name = "NAME", value_parser = id)]
        names: Vec<Id>,
        /// How long each may take, with the template that it may need
        #[arg(long, value_name = "TIME", value_parser = duration)]
        timeout: Option<Duration>,
        /// Give up what was saved when they were suspended, and boot: for a machine that cannot go on
        #[arg(long)]
        discard: bool,
    },
    /// Save machines with all that runs in them to disk, and switch them off
    Suspend {
        /// The machines
        #[arg(required = true, value_name = "NAME", value_parser = id)]
        names: Vec<Id>,
    },
    /// Make copies of a machine while it runs: memory, processes and disk as they are, each somebody of its own
    Fork {
        /// The machine, which is Running and runs on
        #[arg(value_name = "NAME", value_parser = id)]
        name: Id,
        /// The copies
        #[arg(required = true, value_name = "NEW", value_parser = id)]
        names: Vec<Id>,
    },
    /// Shut machines down
    Stop {
        /// The machines
        #[arg(required = true, value_name = "NAME", value_parser = id)]
        names: Vec<Id>,
        /// How long the guest may take before it is forced; 0 forces at once
        #[arg(long, value_name = "TIME", default_value = "10s", value_parser = duration)]
        grace: Duration,
        /// Force it off now, also while another command is busy with it
        #[arg(short, long, conflicts_with = "grace")]
        force: bool,
    },
    /// Delete machines that are off
    #[command(visible_alias = "rm")]
    Delete {
        /// The machines
        #[arg(required = true, value_name = "NAME", value_parser = id)]
        names: Vec<Id>,
    },
    /// Wait until a machine is in a state
    Wait {
        /// The machine
        #[arg(value_parser = id)]
        name: Id,
        /// Initial, Cloning, Starting, Running, Stopping, Stopped, Suspending, Suspended, Deleting, Deleted or ErrorUnknown
        #[arg(value_name = "STATE", value_parser = state)]
        state: State,
        /// How long to wait [default: for ever]
        #[arg(long, value_name = "TIME", value_parser = duration)]
        timeout: Option<Duration>,
    },
    /// Stop and delete machines, whatever they are in
    Cleanup {
        /// The machines
        #[arg(required_unless_present = "all", value_name = "NAME", value_parser = id)]
        names: Vec<Id>,
        /// Every machine
        #[arg(long, conflicts_with = "names")]
        all: bool,
        /// How long a guest may take to shut down before it is forced
        #[arg(long, value_name = "TIME", default_value = "10s", value_parser = duration)]
        grace: Duration,
    },
    /// Make used machines new: everything they have is deleted, and they are cloned and started again
    Reset {
        /// The machines
        #[arg(required = true, value_name = "NAME", value_parser = id)]
        names: Vec<Id>,
    },
    /// List machines
    #[command(visible_alias = "list")]
    Ls {
        /// Only their names
        #[arg(long)]
        names_only: bool,
    },
    /// Show everything about a machine
    Inspect {
        /// The machine
        #[arg(value_parser = id)]
        name: Id,
    },
    /// Print a machine's serial console
    Console {
        /// The machine
        #[arg(value_parser = id)]
        name: Id,
        /// Go on printing until the machine is off
        #[arg(short, long)]
        follow: bool,
        /// Only the last lines
        #[arg(short = 'n', long, value_name = "N")]
        lines: Option<usize>,
    },
    /// Make, list and remove images
    Image {
        #[command(subcommand)]
        command: ImageCommand,
    },
    /// Make, list and remove templates: booted machines that fresh ones are forks of
    Template {
        #[command(subcommand)]
        command: TemplateCommand,
    },
    /// Print the table of states: what may be asked for when
    States {
        /// How to print it
        #[arg(long, value_enum, default_value = "text")]
        format: StatesFormat,
    },
    /// Measure what vmkit takes here, beside bare QEMU in the same run
    Bench(BenchArgs),
    /// Check that everything that is needed is there, and say how to get what is not
    Doctor,
    /// Print completions for a shell
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
}

#[derive(ClapArgs, Debug)]
pub struct ShapeArgs {
    /// The image; base and debian are made when they are not there
    #[arg(long, default_value = "base", value_name = "IMAGE")]
    pub image: String,
    /// Virtual processors
    #[arg(long, default_value_t = 1, value_name = "N")]
    pub cpus: u32,
    /// Memory, such as 512M or 2G
    #[arg(long, default_value = "256M", value_parser = memory, value_name = "SIZE")]
    pub memory: u64,
    /// Mark the machine, KEY=VALUE
    #[arg(long, value_parser = pair, value_name = "KEY=VALUE")]
    pub label: Vec<(String, String)>,
}

#[derive(Subcommand, Debug)]
pub enum TemplateCommand {
    /// List templates
    #[command(visible_alias = "list")]
    Ls,
    /// Make the template for machines of a shape, in place of the one that is there
    Build(TemplateArgs),
    /// Remove templates; what was forked from them stays
    #[command(visible_alias = "remove")]
    Rm {
        /// The templates, by their keys or how only theirs begin
        #[arg(required_unless_present = "all", value_name = "KEY")]
        keys: Vec<String>,
        /// Every template
        #[arg(long, conflicts_with = "keys")]
        all: bool,
    },
}

#[derive(ClapArgs, Debug)]
pub struct TemplateArgs {
    /// The image; base and debian are made when they are not there
    #[arg(default_value = "base", value_name = "IMAGE")]
    pub image: String,
    /// Virtual processors
    #[arg(long, default_value_t = 1, value_name = "N")]
    pub cpus: u32,
    /// Memory, such as 512M or 2G
    #[arg(long, default_value = "256M", value_parser = memory, value_name = "SIZE")]
    pub memory: u64,
    /// Execute this in its shell before it is saved: what it loads is in every fork's memory
    #[arg(long, value_name = "CMD")]
    pub warm: Option<String>,
}

#[derive(ClapArgs, Debug)]
pub struct CommandArgs {
    /// Set a variable of the command's environment
    #[arg(short, long, value_parser = pair, value_name = "KEY=VALUE")]
    pub env: Vec<(String, String)>,
    /// The command's working directory
    #[arg(short, long, value_name = "DIR")]
    pub workdir: Option<PathBuf>,
    /// Whom it runs as: a name or number, with an optional group
    #[arg(short, long, value_name = "USER[:GROUP]")]
    pub user: Option<String>,
    /// Pass standard input on to the command
    #[arg(short, long)]
    pub interactive: bool,
    /// Kill the command when it takes longer
    #[arg(long, value_name = "TIME", value_parser = duration)]
    pub timeout: Option<Duration>,
    /// The command and its arguments
    #[arg(last = true, required = true, value_name = "CMD")]
    pub command: Vec<String>,
}

#[derive(ClapArgs, Debug)]
pub struct RunArgs {
    #[command(flatten)]
    pub shape: ShapeArgs,
    #[command(flatten)]
    pub command: CommandArgs,
    /// Keep the machine, running, and say its name
    #[arg(long)]
    pub keep: bool,
    /// The machine's name [default: a new one]
    #[arg(long, value_parser = id)]
    pub name: Option<Id>,
    /// Say on standard error where the time went
    #[arg(long)]
    pub timings: bool,
}

#[derive(ClapArgs, Debug)]
pub struct ExecArgs {
    /// The machine
    #[arg(value_parser = id)]
    pub name: Id,
    #[command(flatten)]
    pub command: CommandArgs,
}

#[derive(ClapArgs, Debug)]
pub struct CloneArgs {
    /// The new machine
    #[arg(value_parser = id)]
    pub name: Id,
    #[command(flatten)]
    pub shape: ShapeArgs,
    /// Give it its memory for itself from the start, instead of sharing its template's: starting takes longer by a copy, and
    /// the first suspend as little as every other
    #[arg(long)]
    pub own_memory: bool,
}

#[derive(Subcommand, Debug)]
pub enum ImageCommand {
    /// List images
    #[command(visible_alias = "list")]
    Ls,
    /// Make an image: base, debian, or of any root file system
    Build(BuildArgs),
    /// Remove images
    Rm {
        /// The images
        #[arg(required = true, value_name = "NAME")]
        names: Vec<String>,
    },
}

#[derive(ClapArgs, Debug)]
pub struct BuildArgs {
    /// The image: base, debian, or a name of yours with --rootfs
    pub name: String,
    /// The root file system: a directory, or a tar, plain or compressed
    #[arg(long, value_name = "DIR|TAR")]
    pub rootfs: Option<PathBuf>,
    /// The disk's size, such as 8G [default: 4G, or what the files need]
    #[arg(long, value_name = "SIZE", value_parser = size)]
    pub size: Option<u64>,
    /// A kernel of yours instead of the distribution's
    #[arg(long, value_name = "FILE")]
    pub kernel: Option<PathBuf>,
    /// Its modules, such as /lib/modules/6.1.0
    #[arg(long, value_name = "DIR", requires = "kernel")]
    pub modules: Option<PathBuf>,
}

#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
pub enum StatesFormat {
    Text,
    Markdown,
    Dot,
    Json,
}

/// A name, or the rule that it breaks.
pub fn id(name: &str) -> Result<Id, String> {
    Id::new(name).map_err(|error| format!("{}; {}", error.message(), error.next_step().unwrap_or_default()))
}

fn state(word: &str) -> Result<State, String> {
    word.parse().map_err(|error: vmkit::UnknownState| error.to_string())
}

/// A variable that is empty is as good as none.
fn accelerator(word: &str) -> Result<Accelerator, String> {
    let word = if word.is_empty() { "auto" } else { word };
    word.parse().map_err(|_| "use auto, kvm or tcg".to_owned())
}

/// `30s`, `1m 30s`, `500ms`; a bare number is seconds.
pub fn duration(text: &str) -> Result<Duration, String> {
    if text.starts_with('-') {
        return Err("a time cannot be negative".into());
    }
    match text.parse::<f64>() {
        Ok(seconds) => Duration::try_from_secs_f64(seconds).map_err(|error| error.to_string()),
        Err(_) => humantime::parse_duration(text).map_err(|error| format!("{error}; use 30s, 500ms, 1m or 2h")),
    }
}

fn size(text: &str) -> Result<u64, String> {
    let sizes = parse_size::Config::new().with_binary();
    sizes.parse_size(text).map_err(|error| format!("{error}; use 512M or 2G"))
}

/// In MiB.
fn memory(text: &str) -> Result<u64, String> {
    let bytes = size(text)?;
    match bytes {
        // A number without a unit is more likely MiB than bytes: ask.
        bytes if bytes < 1 << 20 => Err("less than 1 MiB: give a unit, such as 512M or 2G".into()),
        bytes if !bytes.is_multiple_of(1 << 20) => Err("not a whole number of MiB".into()),
        bytes => Ok(bytes >> 20),
    }
}

fn pair(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
        // The value is not repeated: it may be a secret.
        _ => Err("use KEY=VALUE".into()),
    }
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
    fn times_and_sizes() {
        assert_eq!(duration("0.3").unwrap(), Duration::from_millis(300));
        assert_eq!(duration("300ms").unwrap(), Duration::from_millis(300));
        assert_eq!(duration("1m 30s").unwrap(), Duration::from_secs(90));
        assert!(duration("-1s").is_err() && duration("soon").is_err() && duration("nan").is_err());
        assert_eq!(memory("512M").unwrap(), 512);
        assert_eq!(memory("2G").unwrap(), 2048);
        assert_eq!(memory("1GiB").unwrap(), 1024);
        assert!(memory("512").is_err() && memory("much").is_err() && memory("1.0000001G").is_err());
    }

    #[test]
    fn a_bad_pair_is_not_repeated() {
        assert_eq!(pair("A=b=c").unwrap(), ("A".into(), "b=c".into()));
        assert!(!pair("SECRET").unwrap_err().contains("SECRET"));
    }
}
