//! `vmkit-bench`: what bare QEMU costs on this machine, and what vmkit costs beside it.
//!
//! ```text
//!  session ──┬─ floor      bare QEMU: no vmkit in between
//!  (rounds)  ├─ ours       the library
//!            └─ commands   `vmkit run`, `vmkit states`, as processes
//!                 │ samples
//!                 ▼
//!               report     medians, ratios, targets
//! ```
//!
//! The project carries its own floor because an absolute time says nothing without one: machines differ, and the same machine
//! differs from hour to hour. So both are measured in turns, and nothing here asserts a time.

#![forbid(unsafe_code)]

mod args;
mod commands;
mod density;
mod error;
mod figures;
mod floor;
mod forks;
mod ours;
mod plot;
mod report;
mod samples;
mod session;
mod stop;

use std::error::Error as _;
use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::process::ExitCode;

use clap::Parser;
use vmkit::ErrorKind;

use args::{Args, Command};
use error::{Error, Result as BenchResult};
use figures::Wanted;
use session::Plan;
use stop::Stop;

fn main() -> ExitCode {
    let args = Args::parse();
    match carry_out(args) {
        Ok(code) => code,
        Err(Error::Interrupted) => {
            eprintln!("vmkit-bench: interrupted; everything is removed");
            ExitCode::from(130)
        }
        Err(error) => {
            print_error(&error);
            ExitCode::FAILURE
        }
    }
}

fn carry_out(args: Args) -> BenchResult<ExitCode> {
    let stop = Stop::listen().map_err(|error| vmkit::Error::io("signals cannot be listened to", error))?;
    let floor_only = args.floor_only || args.command == Some(Command::Floor);
    let plan = Plan {
        runs: args.runs,
        wanted: Wanted::new(args.only, !floor_only),
        accelerator: args.accel,
        state_dir: args.state_dir,
    };
    if let Some(Command::Density { machines }) = args.command {
        let crowds = session::density(&plan, &stop, machines as usize)?;
        let text = if args.json { format!("{:#}\n", density::json(&crowds)) } else { density::table(&crowds) };
        let _ = std::io::stdout().write_all(text.as_bytes());
        return Ok(ExitCode::SUCCESS);
    }
    // Before the work: nobody waits minutes for what cannot be written.
    let svg = args.svg.as_ref().map(|path| Ok::<_, vmkit::Error>((path, open(path)?))).transpose()?;
    let report = session::measure(&plan, &stop)?;
    if let Some((path, mut file)) = svg {
        let title = format!("What vmkit takes beside bare QEMU ({}), medians", plan.accelerator_name());
        let drawing = plot::draw(&report.bars(), &title).map_err(|why| vmkit::Error::new(ErrorKind::Io, why))?;
        let written = file.set_len(0).and_then(|()| file.write_all(drawing.as_bytes()));
        written.map_err(|error| unwritable(path, error))?;
    }
    let text = if args.json { format!("{:#}\n", report.json()) } else { report.text() };
    // A reader that went away, as `head` does, is no failure.
    let _ = std::io::stdout().write_all(text.as_bytes());
    let over = report.over();
    if args.check && !over.is_empty() {
        eprintln!("vmkit-bench: over the target: {}", over.join(", "));
        return Ok(ExitCode::FAILURE);
    }
    Ok(ExitCode::SUCCESS)
}

fn open(path: &Path) -> Result<File, vmkit::Error> {
    File::options().write(true).create(true).truncate(false).open(path).map_err(|error| unwritable(path, error))
}

fn unwritable(path: &Path, error: std::io::Error) -> vmkit::Error {
    vmkit::Error::io(format!("{} cannot be written", path.display()), error).hint("choose another file with --svg")
}

fn print_error(error: &Error) {
    eprintln!("error: {error}");
    let mut source = error.source();
    while let Some(cause) = source {
        eprintln!("  because: {cause}");
        source = cause.source();
    }
    if let Error::Vmkit(error) = error {
        for line in error.details().unwrap_or_default().trim_end().lines() {
            eprintln!("  | {line}");
        }
        if let Some(hint) = error.next_step() {
            eprintln!("  next: {hint}");
        }
    }
}
