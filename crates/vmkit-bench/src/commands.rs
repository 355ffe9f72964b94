//! vmkit's own figures: whole commands, from the start of the process to its end.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Instant;

use rustix::process::{Pid, Signal, kill_process};
use tokio::process::Command;

use crate::error::{Error, Result};
use crate::ours::Ours;
use crate::samples::{Samples, median, ms};
use crate::stop::Stop;

/// What takes milliseconds is measured this often in each round.
const REPEATS: usize = 10;
/// And what takes tenths of a second.
const FORKS: usize = 3;

/// The command, and what it works on.
#[derive(Debug)]
pub struct Commands {
    program: PathBuf,
    dir: PathBuf,
    /// Where it finds images and machines, and how its guests execute.
    environment: Vec<(&'static str, OsString)>,
    stop: Stop,
}

impl Commands {
    /// What [`run`](Commands::run) measures.
    pub const RUN: &[&str] = &["run_process", "run_boot"];
    /// What [`states`](Commands::states) measures.
    pub const STATES: &[&str] = &["states_ms"];

    /// The command that is this program, in a directory where a sweep finds it.
    ///
    /// # Errors
    /// When this program's file cannot be told.
    pub fn new(dir: PathBuf, environment: Vec<(&'static str, OsString)>, stop: Stop) -> Result<Commands> {
        let program = std::env::current_exe()
            .map_err(|error| vmkit::Error::io("the file of this program cannot be found", error))?;
        Ok(Commands { program, dir, environment, stop })
    }

    /// A fresh machine for one process, deleted: forked, and booted.
    ///
    /// # Errors
    /// When the command fails or leaves something.
    pub fn run(&self, ours: &Ours, samples: &mut Samples) -> Result<()> {
        for _ in 0..FORKS {
            self.run_as(&["run", "--", "true"], "run_process", ours, samples)?;
        }
        self.run_as(&["--no-template", "run", "--", "true"], "run_boot", ours, samples)
    }

    fn run_as(&self, args: &[&str], figure: &'static str, ours: &Ours, samples: &mut Samples) -> Result<()> {
        let before = ours.machines()?;
        let took = ours.block_on(self.execute(args))?;
        let left: Vec<_> = ours.machines()?.into_iter().filter(|id| !before.contains(id)).collect();
        if let Some(id) = left.first() {
            return Err(Error::Left(id.to_string()));
        }
        samples.add(figure, took);
        Ok(())
    }

    /// The table of states.
    ///
    /// # Errors
    /// When the command fails.
    pub fn states(&self, ours: &Ours, samples: &mut Samples) -> Result<()> {
        let times = (0..REPEATS).map(|_| ours.block_on(self.execute(&["states"]))).collect::<Result<Vec<_>>>()?;
        samples.add("states_ms", median(&times));
        Ok(())
    }

    /// Milliseconds from the start of the process to its end.
    async fn execute(&self, args: &[&str]) -> Result<f64> {
        let mut command = Command::new(&self.program);
        command.args(args).current_dir(&self.dir).envs(self.environment.iter().map(|(name, value)| (name, value)));
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        // A Ctrl-C at the terminal is for the bench, which passes it on once.
        command.process_group(0).kill_on_drop(true);
        let clock = Instant::now();
        let child = command.spawn().map_err(|error| cannot_start(&self.program, error))?;
        let pid = child.id().and_then(|pid| Pid::from_raw(i32::try_from(pid).ok()?));
        let ended = child.wait_with_output();
        tokio::pin!(ended);
        let output = tokio::select! {
            biased;
            output = &mut ended => output,
            () = self.stop.raised() => {
                // It deletes its machine before it ends.
                if let Some(pid) = pid {
                    let _ = kill_process(pid, Signal::TERM);
                }
                let _ = ended.await;
                return Err(Error::Interrupted);
            }
        };
        let took = ms(clock.elapsed());
        let output = output.map_err(|error| cannot_start(&self.program, error))?;
        match output.status.success() {
            true => Ok(took),
            false => Err(Error::Command {
                command: args.join(" "),
                status: output.status,
                said: String::from_utf8_lossy(&output.stderr).trim().to_owned(),
            }),
        }
    }
}

fn cannot_start(program: &Path, error: std::io::Error) -> Error {
    vmkit::Error::io(format!("{} cannot be executed", program.display()), error).into()
}
