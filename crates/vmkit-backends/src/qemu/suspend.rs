//! Suspending: what runs is saved to disk with its memory, or goes on as if nothing had been.

use std::error::Error as StdError;
use std::path::PathBuf;
use std::time::Duration;

use tokio::task::AbortHandle;
use tokio::time::{sleep, timeout};
use tracing::warn;
use vmkit::{Driver, Error, ErrorKind, Result};
use vmkit_agent::client::Prepare;

use super::driver::{AGENT_ANSWERS, QemuDriver, TemplateUse};
use super::exit;
use super::layout::{self, DISK, MEMORY, MEMORY_APART, QMP, SAVED, STATE, STATE_APART, STATE_FULL, STATE_PARTIAL};
use super::line::translate;
use super::qmp::{Greeted, Memory, Qmp};
use super::split;

/// How long a busy guest may take to hear that it is not suspended after all.
const HEARS: Duration = Duration::from_secs(300);

/// How long a guest that is to become a template is left alone before it is saved.
const RESTS: Duration = Duration::from_millis(200);

const SUSPENDED: &str = "was being suspended";

impl QemuDriver {
    /// Suspends the machine: told, saved, ended.
    pub(super) async fn save_and_end(&mut self) -> Result<()> {
        // Nobody tells it otherwise from here on.
        self.thawing.take().iter().for_each(AbortHandle::abort);
        if matches!(self.templates, TemplateUse::Make) {
            // Its disk alone is to be what its memory says it is: a fork's next start boots from it.
            self.line.client().await?.prepare(Prepare { rests: true }).await.map_err(translate)?;
            // What the end of a session takes, and what its kernel does a moment later, is no work for those who go on from it.
            drop(self.line.leave(AGENT_ANSWERS).await?);
            sleep(RESTS).await;
        }
        let memory = self.saved_memory();
        // First of all: a session that has ended is not begun again for a QEMU that does not answer.
        let greeted = Greeted::connect(&self.dir, QMP).await.map_err(not_begun);
        let greeted = self.or_ended(greeted, SUSPENDED).await?;
        let begun = async {
            let mut qmp = greeted.begin().await?;
            qmp.take_memory(memory).await.map(|()| qmp)
        };
        let line = self.line.clone();
        let both = async { tokio::join!(begun, line.leave(AGENT_ANSWERS)) };
        let (qmp, left) = self.unless_ended(both, SUSPENDED).await?;
        // A guest whose agent is silent is not one to resume.
        let (mut qmp, left) = match qmp.map_err(not_begun).and_then(|qmp| left.map(|left| (qmp, left))) {
            Ok(both) => both,
            Err(error) => {
                // It may hear it yet.
                self.thaw().await?;
                return Err(error);
            }
        };
        if let Err(error) = self.save(&mut qmp, memory).await {
            // Its line is needed.
            drop(left);
            match self.call_off(&mut qmp).await {
                Ok(()) => self.thaw().await?,
                Err(second) => return Err(self.end_half_saved(error, &second).await?),
            }
            return Err(error);
        }
        drop(left);
        self.line.forget();
        // Its state is complete and its disk was flushed with it: nothing is lost by ending it so.
        self.end_process().await
    }

    /// Where the saved execution has its memory: a fork that shares its template's has its own nowhere else than in its process.
    fn saved_memory(&self) -> Memory {
        if self.file(MEMORY).exists() { Memory::Elsewhere } else { Memory::Apart }
    }

    /// Saves the guest, which stands still from then on, and commits that in one step.
    async fn save(&self, qmp: &mut Qmp, memory: Memory) -> Result<()> {
        let partial = self.file(STATE_PARTIAL);
        layout::remove(&partial)?;
        let memory = match memory {
            Memory::Apart => self.save_apart(qmp).await?,
            memory => qmp.save(&format!("file:{STATE_PARTIAL}"), memory).await.map(|()| memory)?,
        };
        let (state, own) = match memory {
            Memory::Elsewhere => (STATE, Some(MEMORY)),
            Memory::Apart => (STATE_APART, Some(MEMORY_APART)),
            Memory::Within => (STATE_FULL, None),
        };
        if self.config.durable {
            let own = own.map(|own| self.file(own));
            let files: Vec<PathBuf> = [partial.clone(), self.file(DISK)].into_iter().chain(own).collect();
            let synced = tokio::task::spawn_blocking(move || files.iter().try_for_each(|file| layout::sync(file)));
            synced.await.map_err(|error| Error::new(ErrorKind::Io, "writing to disk failed").caused_by(error))??;
        }
        layout::rename(&partial, &self.file(state))?;
        if self.config.durable {
            layout::sync(&self.dir)?;
        }
        Ok(())
    }

    /// Saves a guest without a memory file, which has one from then on. A QEMU that writes what is not known saves it as it likes,
    /// and loads that when the machine goes on.
    async fn save_apart(&self, qmp: &mut Qmp) -> Result<Memory> {
        let files = (self.file(STATE_PARTIAL), self.file(MEMORY_APART));
        let size = self.spec.memory_mib << 20;
        let saving = qmp.save(split::URI, Memory::Apart);
        let Err(error) = split::receive(&self.dir, files, size, self.config.durable, saving).await else {
            return Ok(Memory::Apart);
        };
        if error.kind() != ErrorKind::Unsupported {
            return Err(error);
        }
        let id = &self.id;
        warn!(%id, error = &error as &dyn StdError, "saving memory as QEMU does: going on will take long");
        layout::remove(&self.file(MEMORY_APART))?;
        layout::remove(&self.file(STATE_PARTIAL))?;
        qmp.save(&format!("file:{STATE_PARTIAL}"), Memory::Within).await?;
        Ok(Memory::Within)
    }

    /// Ends a guest that was not saved and does not go on, and returns why it was not.
    async fn end_half_saved(&mut self, why: Error, second: &Error) -> Result<Error> {
        let ended = self.ended().await;
        self.kill().await?;
        if let Some(exit) = ended {
            return Ok(exit::error(&exit, SUSPENDED));
        }
        warn!(id = %self.id, error = %second, "a suspend that failed could not be called off: ending the machine");
        layout::write_ended(&self.dir, "a suspend of it failed and could not be called off", second);
        Ok(why)
    }

    /// Lets a guest go on that was to be saved.
    async fn call_off(&self, qmp: &mut Qmp) -> Result<()> {
        // Memory that a guest goes on with fits nothing that was saved.
        SAVED.iter().try_for_each(|file| layout::remove(&self.file(file)))?;
        if self.config.durable {
            layout::sync(&self.dir)?;
        }
        qmp.go_on().await
    }

    /// Tells a guest that it is not suspended after all. It runs: one that is too busy to hear that now hears it later.
    async fn thaw(&mut self) -> Result<()> {
        let line = self.line.clone();
        let told = tokio::spawn(async move { line.thaw(HEARS).await });
        self.thawing = Some(told.abort_handle());
        self.unless_ended(timeout(AGENT_ANSWERS, told), SUSPENDED).await.map(drop)
    }
}

/// Not as one that is late: nothing was begun, and nothing is to be ended for it.
pub(super) fn not_begun(error: Error) -> Error {
    Error::new(ErrorKind::Backend, "QEMU does not answer; nothing was changed")
        .caused_by(error)
        .hint("look whether its process is stopped or stuck; `vmkit stop --force` ends it, and its memory is lost")
}
