//! A QEMU that is started ahead of time: it has its arguments, files and devices, and waits for the state that its machine is to go on
//! from. Starting a process is half of what a fork and a resume take.
//!
//! ```text
//!  prespawn: files ─▶ QEMU ─▶ it answers ─▶ run.json: waits      the machine: Stopped or Suspended, as before
//!  start:    run.json: no longer waits ─▶ state ─▶ guest         or, where none waits for this: files ─▶ QEMU ─▶ …
//! ```

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use serde::{Deserialize, Serialize};
use tracing::debug;
use vmkit::{Error, ErrorKind, Result};

use super::args::Begin;
use super::driver::{DISCARD, QemuDriver};
use super::fork::{Laps, copy_sparse};
use super::layout::{self, FRESH, MEMORY, Run, SERIAL};
use super::probe::started_now;
use super::qmp::{Memory, Qmp};
use super::template::Template;

/// What a QEMU goes on from: the memory file that was there when it was started, whatever has its name later.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Goal {
    /// Device and number. `None` when the memory is in the saved state.
    memory: Option<(u64, u64)>,
    /// When a template's was written, seconds and nanoseconds: a number may come again.
    written: Option<(i64, i64)>,
}

impl Goal {
    /// A template, which nobody writes to.
    fn template(memory: &Path) -> Result<Goal> {
        let meta = look_at(memory)?;
        Ok(Goal { memory: Some((meta.dev(), meta.ino())), written: Some((meta.mtime(), meta.mtime_nsec())) })
    }

    /// A machine's own, which is open for as long as it is waited for: nothing else has its number.
    fn own(memory: &Path) -> Result<Goal> {
        let meta = look_at(memory)?;
        Ok(Goal { memory: Some((meta.dev(), meta.ino())), written: None })
    }
}

fn look_at(memory: &Path) -> Result<fs::Metadata> {
    fs::metadata(memory).map_err(|error| Error::io(format!("{} cannot be looked at", memory.display()), error))
}

impl QemuDriver {
    /// Starts the QEMU that the machine, which is off, is to go on in. It waits.
    pub(super) async fn begin_waiting(&mut self) -> Result<()> {
        let facts = self.facts().await?;
        // Kept until QEMU has opened it.
        let mut template = None;
        let goal = match layout::saved(&self.dir) {
            Some(_) => {
                let accelerator = self.saved_accelerator(&facts)?;
                self.spawn_to_resume(&accelerator, &facts.program).await?.0
            }
            None if self.file(FRESH).exists() => {
                let accelerator = facts.accelerator(self.config.accelerator)?;
                let template = template.insert(self.template(&facts, accelerator).await?.ok_or_else(boots)?);
                self.spawn_to_fork(template, &facts.program, &mut Laps::new()).await?
            }
            None => return Err(boots()),
        };
        let (dir, from) = (self.dir.clone(), self.said());
        self.until(from, async { Qmp::when_up(&dir).await.map(drop) }).await?;
        drop(template);
        let run = layout::live_run(&self.dir)
            .ok_or_else(|| Error::new(ErrorKind::Exited, "QEMU has ended before there was anything for it to do"))?;
        layout::write_run(&self.dir, &Run { waits: Some(goal), ..run })
    }

    /// The QEMU of a fork: the one that waits for that, or another.
    pub(super) async fn spawn_to_fork(&mut self, template: &Template, program: &Path, laps: &mut Laps) -> Result<Goal> {
        let (memory, accelerator) = (template.memory(), template.info.accelerator.clone());
        let goal = Goal::template(&memory)?;
        if self.takes_up(&accelerator, &goal).await? {
            return Ok(goal);
        }
        // What an attempt that failed left.
        layout::remove(&self.file(MEMORY))?;
        self.take_layer(template)?;
        laps.lap("disk");
        let begin = match self.spec.own_memory {
            true => {
                self.check_space()?;
                let (from, to) = (memory.clone(), self.file(MEMORY));
                let copied = tokio::task::spawn_blocking(move || copy_sparse(&from, &to)).await;
                copied
                    .map_err(|error| Error::new(ErrorKind::Io, "copying the memory failed").caused_by(error))?
                    .map_err(|error| Error::io("the template's memory cannot be copied", error))?;
                laps.lap("memory");
                Begin::Resume
            }
            false => Begin::Fork(&memory),
        };
        self.clear_way().await?;
        layout::remove(&self.file(SERIAL))?;
        // What its console said is what it remembers. What it says itself begins on a line of its own.
        let mut said = fs::read(template.console()).unwrap_or_default();
        if said.last().is_some_and(|end| *end != b'\n') {
            said.extend(b"\r\n");
        }
        let _ = fs::write(self.file(SERIAL), said);
        self.spawn(begin, &accelerator, program)?;
        Ok(goal)
    }

    /// The QEMU of a machine that goes on from its saved execution: the one that waits for that, or another. And where that execution
    /// is, and its memory.
    pub(super) async fn spawn_to_resume(
        &mut self,
        accelerator: &str,
        program: &Path,
    ) -> Result<(Goal, &'static str, Memory)> {
        if let Some((_, Memory::Apart)) = layout::saved(&self.dir) {
            layout::put_in_place(&self.dir)?;
        }
        let Some((state, memory)) = layout::saved(&self.dir) else {
            return Err(Error::new(ErrorKind::Corrupt, "the saved execution has vanished").hint(DISCARD));
        };
        let goal = match memory {
            Memory::Within => Goal { memory: None, written: None },
            Memory::Elsewhere | Memory::Apart => Goal::own(&self.file(MEMORY))?,
        };
        if self.takes_up(accelerator, &goal).await? {
            return Ok((goal, state, memory));
        }
        if memory == Memory::Within {
            // It comes from the saved state, into a file of the machine's own: what an attempt that failed left is none.
            layout::remove(&self.file(MEMORY))?;
            self.check_space()?;
        }
        self.clear_way().await?;
        self.spawn(Begin::Resume, accelerator, program)?;
        Ok((goal, state, memory))
    }

    /// Whether a QEMU waits for this very thing: from here on it is this start's. One that waits for something else is ended.
    async fn takes_up(&mut self, accelerator: &str, goal: &Goal) -> Result<bool> {
        let Some(run) = layout::live_run(&self.dir).filter(|run| run.waits.is_some()) else { return Ok(false) };
        if run.accelerator == accelerator && run.waits.as_ref() == Some(goal) {
            layout::write_run(&self.dir, &Run { waits: None, started: started_now(), ..run })?;
            return Ok(true);
        }
        debug!(id = %self.id, "the QEMU that waits was started for something else");
        self.end_process().await?;
        Ok(false)
    }

    /// How much the console has said, bytes.
    pub(super) fn said(&self) -> u64 {
        fs::metadata(self.file(SERIAL)).map_or(0, |meta| meta.len())
    }
}

fn boots() -> Error {
    Error::new(ErrorKind::Unsupported, "it boots from its disk: there is no state that a process could wait for")
        .hint("start it as it is; what goes on from a template or a saved execution can be waited for")
}
