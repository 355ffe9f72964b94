//! A machine as it is while it runs, saved for copies of it to go on from.
//!
//! ```text
//!  guest runs ──────────────────────▶ stands still ─▶ runs on
//!    memory → state.full (again what it wrote meanwhile)
//!                                     the last of it, the devices, the disk
//!                                                    ╰▶ a QEMU of its own makes a template of it
//! ```
//!
//! What is saved is a suspended machine among those that become templates: its memory is in its saved state, and its disk may lie
//! on the layer of the template that the original was forked from. Loaded once into a memory file, with the layer taken into the
//! disk, it is a template as any other, but for its name, and that it goes when nobody makes copies of it any more.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use tokio::time::timeout;
use tracing::{debug, warn};
use vmkit::{Action, Error, ErrorKind, Host, Id, Result, Snapshot, Spec};
use vmkit_agent::client::Client;

use super::args::{BASE, Begin, OVERLAY};
use super::driver::{QemuDriver, TemplateUse};
use super::fork::{copy_sparse, link};
use super::image;
use super::layout::{self, DISK, LAYER, MEMORY, SERIAL, STATE, STATE_FULL};
use super::line::translate;
use super::lock::Lock;
use super::qmp::{Memory, Qmp};
use super::template::{self, CopyOf, TemplateInfo, Templates};
use super::{Qemu, QemuConfig, SNAPSHOTS};
use crate::process::Identity;

/// How the names of such templates begin.
pub(super) const PREFIX: &str = "fork-";

/// How long a guest may write faster than it can be saved before it stands still for the rest.
const CHASES: Duration = Duration::from_secs(10);

/// How long the agent may take to get ready: what the guest wrote goes to its disk.
const PREPARES: Duration = Duration::from_secs(60);

/// Keeps a snapshot until its copies are made.
#[derive(Debug)]
struct Kept {
    templates: Templates,
    key: Id,
    lock: Option<Lock>,
}

impl Drop for Kept {
    fn drop(&mut self) {
        // Also what is left of one that was not finished.
        for dir in
            [self.templates.dir.join(".work").join(self.key.as_str()), self.templates.dir.join(self.key.as_str())]
        {
            if dir.symlink_metadata().is_err() {
                continue;
            }
            let left =
                layout::qemus_in(&dir).into_iter().filter_map(|pid| Identity::of(pid).ok().flatten()?.hold().ok()?);
            left.for_each(|process| drop(process.kill()));
            if let Err(error) = layout::remove_tree(&dir) {
                warn!(key = %self.key, %error, "what copies were made from is not removed yet");
            }
        }
        if let Some(lock) = self.lock.take() {
            lock.release(true);
        }
    }
}

impl QemuDriver {
    /// Saves the guest while it runs, for copies to go on from.
    pub(super) async fn take_snapshot(&mut self) -> Result<Snapshot> {
        let templates = self.qemu().snapshots()?;
        let Some(run) = layout::live_run(&self.dir) else {
            return Err(Error::new(ErrorKind::NotRunning, "the machine's process has ended"));
        };
        let number: String = vmkit_agent::client::nonce().iter().take(6).map(|byte| format!("{byte:02x}")).collect();
        let key = Id::new(format!("{PREFIX}{number}"))?;
        let lock = Lock::take(&templates.dir.join(".locks").join(key.as_str()), Action::Clone).await?.lock;
        let kept = Kept { templates: templates.clone(), key: key.clone(), lock: Some(lock) };
        let work = Qemu::new(QemuConfig { durable: false, ..QemuConfig::new(templates.dir.join(".work")) })?;
        let work = Qemu { config: QemuConfig { program: self.config.program.clone(), ..work.config }, ..work };
        let facts = self.facts().await?;
        let spec = Spec { labels: Default::default(), ..self.spec.clone() };
        let draft = work.machine_dir(&key);
        let made = async {
            self.check_space()?;
            layout::make_dir(&draft)?;
            layout::write_record(&draft, &Spec { own_memory: true, ..spec.clone() })?;
            if self.file(LAYER).exists() {
                link(&self.file(LAYER), &draft.join(LAYER))?;
            }
            let paused = self.save_beside(&draft).await?;
            let mut copy = work.driver(&key, spec.clone());
            let settled = copy.become_template(&run.accelerator, &facts.program).await;
            let ended = copy.end_process().await;
            settled.and(ended)?;
            templates.publish(
                &draft,
                TemplateInfo {
                    key: key.to_string(),
                    image: image::of(&spec)?.name.clone(),
                    digest: image::of(&spec)?.digest.clone(),
                    cpus: spec.cpus,
                    memory_mib: spec.memory_mib,
                    qemu: facts.version.clone(),
                    accelerator: run.accelerator.clone(),
                    warm: Vec::new(),
                    created: template::today(),
                    copy_of: Some(CopyOf { id: self.id.to_string(), stood_still: paused }),
                    size: 0,
                    version: template::VERSION,
                },
            )?;
            Ok(paused)
        };
        let made = made.await;
        Ok(Snapshot::new(Spec { snapshot: Some(key.to_string()), ..spec }, made?, kept))
    }

    /// Saves memory, devices and disk to another machine's directory. Returns how long the guest stood still.
    async fn save_beside(&mut self, draft: &Path) -> Result<Duration> {
        let mut qmp = Qmp::connect(&self.dir, super::layout::QMP).await?;
        // What it shares with copies of it is opened, and what it wrote is on its disk.
        let ready = async { self.line.client().await?.prepare().await.map_err(translate) };
        timeout(PREPARES, ready).await.map_err(|_| {
            Error::new(ErrorKind::Agent, format!("the guest did not write its data to its disk within {PREPARES:?}"))
        })??;
        // From here on, whoever comes after a process that died lets the guest go on.
        self.note_fork()?;
        let saved = async {
            // What runs lives on in the copies, where nobody is connected to it.
            self.ask_agent(async |agent: Client| agent.freeze(true).await).await?;
            qmp.save_running(&draft.join(STATE_FULL), CHASES).await
        };
        let mut result = saved.await;
        let still = Instant::now();
        if result.is_ok() {
            // No more than it wrote, and it stands still for it.
            result = copy_sparse(&self.file(DISK), &draft.join(DISK))
                .map_err(|error| Error::io("the machine's disk cannot be copied", error));
            let _ = fs::copy(self.file(SERIAL), draft.join(SERIAL));
        }
        let goes_on = async {
            if result.is_err() {
                qmp.save_no_more().await?;
            }
            if !qmp.is_running().await? {
                qmp.cont().await?;
            }
            Ok(())
        };
        let went_on: Result<()> = goes_on.await;
        let still = still.elapsed() + qmp.stood_still().await.unwrap_or_default();
        match went_on {
            Ok(()) => {
                if let Err(error) = self.ask_agent(async |agent: Client| agent.freeze(false).await).await {
                    debug!(id = %self.id, %error, "telling a guest that it was copied");
                }
                self.note_forked()?;
            }
            // The note stays: the next look lets it go on, or ends it.
            Err(error) => return Err(result.err().unwrap_or(error)),
        }
        result.map(|()| still)
    }

    /// Loads what was saved into a memory file, and makes the disk one that lies on the image's. The guest does not run.
    async fn become_template(&mut self, accelerator: &str, program: &Path) -> Result<()> {
        let layered = self.file(LAYER).exists();
        self.clear_way().await?;
        self.spawn(Begin::Resume, accelerator, program)?;
        let (dir, line) = (self.dir.clone(), self.line.clone());
        let convert = async {
            let mut qmp = Qmp::when_up(&dir).await?;
            // Connected when it was saved, when it is loaded, and when it is saved again.
            let _wire = line.wire().await?;
            qmp.load(Path::new(STATE_FULL), Memory::Within).await?;
            if layered {
                qmp.flatten(OVERLAY, BASE).await?;
            }
            qmp.save(STATE, Memory::Elsewhere).await
        };
        self.until(0, convert).await?;
        debug_assert!(self.file(MEMORY).exists());
        Ok(())
    }
}

impl Qemu {
    /// Removes what processes left that died while they made copies: what copies go on from, and copies that never did.
    pub(super) async fn sweep_snapshots(&self) -> Result<()> {
        let beside = matches!(self.templates, TemplateUse::None);
        if beside && !self.layout.dir.join(SNAPSHOTS).is_dir() {
            return Ok(());
        }
        let templates = self.snapshots()?;
        if beside {
            templates.sweep().await?;
        }
        for key in templates.snapshots()? {
            let Some(taken) = Lock::try_take(&templates.dir.join(".locks").join(key.as_str()), Action::Delete)? else {
                continue;
            };
            // Whoever had it may have removed it meanwhile.
            let removed = match templates.dir.join(key.as_str()).is_dir() {
                true => self.remove_copies(&key).await.and_then(|()| templates.discard(key.as_str())),
                false => Ok(()),
            };
            taken.lock.release(true);
            removed?;
        }
        Ok(())
    }

    async fn remove_copies(&self, key: &Id) -> Result<()> {
        let host = Host::new(self.clone());
        for id in self.layout.machines()? {
            let dir = self.layout.machine(&id);
            let spec = layout::read_record(&dir).ok().map(|record| record.spec);
            let runs = layout::live_run(&dir).is_some_and(|run| run.ready);
            // One that has a birth has run.
            let never_ran = !runs && layout::read_birth(&dir).is_none();
            if never_ran && spec.is_some_and(|spec| spec.snapshot.as_deref() == Some(key.as_str())) {
                template::remove(&host, &id).await?;
            }
        }
        Ok(())
    }
}
