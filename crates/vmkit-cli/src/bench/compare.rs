//! `vmkit bench`: ours beside bare QEMU's, or one of them alone.

use std::sync::Arc;

use vmkit_bench::{Error as BenchError, Plan, Stop, TableArgs, Tell, Wanted, density, measure, sweep};

use super::args::BenchCommand;
use super::plot::Target;
use crate::args::Args;
use crate::context::{Context, state_dir};
use crate::output::{Failure, Output};
use crate::signals;

impl Tell for Output {
    fn note(&self, text: &str) {
        Output::note(self, text);
    }

    fn warn(&self, text: &str) {
        Output::warn(self, text);
    }
}

/// Measures. Not to be called in a runtime.
pub fn compare(args: &Args, command: Option<&BenchCommand>, table: &TableArgs, output: &Output) -> Result<u8, Failure> {
    let stop = Stop::listen().map_err(|error| vmkit::Error::io("signals cannot be listened to", error))?;
    let plan = |runs: u32, wanted: Wanted| -> Result<Plan, Failure> {
        let state_dir = state_dir(args)?;
        clear_up(args, output)?;
        Ok(Plan { runs, wanted, accelerator: args.accel, state_dir, tell: Arc::new(*output) })
    };
    let result = match command {
        Some(BenchCommand::Floor(floor)) => {
            let plan = plan(floor.runs, Wanted::new(floor.only.clone(), false))?;
            measure(&plan, &stop).map(|report| output.result(&report.json(), || report.text()).map(|()| 0))
        }
        Some(BenchCommand::Density(asked)) => {
            let plan = plan(1, Wanted::new(Vec::new(), true))?;
            let crowds = density(&plan, &stop, asked.machines as usize);
            crowds.map(|crowds| output.result(&crowds, || crowds.text()).map(|()| 0))
        }
        Some(BenchCommand::Pool(_)) => unreachable!("carried out in a runtime"),
        None => {
            // Before the work: nobody waits minutes for what cannot be written.
            let svg = table.svg.as_deref().map(Target::open).transpose()?;
            let plan = plan(table.runs, Wanted::new(table.only.clone(), true))?;
            measure(&plan, &stop).map(|report| {
                output.result(&report.json(), || report.text())?;
                // Last: what was measured is not lost to a full disk.
                if let Some(target) = svg {
                    target.write(&report.plot()?)?;
                }
                let over = report.over();
                if !table.check || over.is_empty() {
                    return Ok(0);
                }
                output.warn(format!("over the limit: {}", over.join(", ")));
                Ok(1)
            })
        }
    };
    match (result, stop.signal()) {
        (Ok(done), _) => done,
        (Err(BenchError::Interrupted), Some(signal)) => {
            output.note("asked to end: everything is removed");
            Ok(signals::exit_code(signal))
        }
        (Err(error), _) => Err(error.into_vmkit().into()),
    }
}

/// Ends what benchmarks and `run`s left that were killed.
fn clear_up(args: &Args, output: &Output) -> Result<(), Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|error| vmkit::Error::io("the runtime cannot be started", error))?;
    let context = runtime.block_on(Context::open(args, output))?;
    Ok(sweep(&context.dir)?)
}
