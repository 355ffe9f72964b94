//! A machine as it is while it runs, saved for copies of it to go on from.
//!
//! ```text
//!  guest runs ──────────────────────▶ stands still ─▶ runs on
//!    memory → a memory file (again what it wrote meanwhile)
//!                                     the last of it, the devices, the disk
//!                                                    ╰▶ a QEMU of its own makes a template of it
//! ```
//!
//! What is saved is a suspended machine among those that become templates, whose disk may lie on the layer of the template that
//! the original was forked from. Loaded once, with the layer taken into the disk, and saved again, it is a template as any other,
//! but for its name, and that it goes when nobody makes copies of it any more.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, Instant};

use tokio::time::timeout;
use tracing::{debug, warn};
use vmkit::{Action, Driver, Error, ErrorKind, Id, Result, Snapshot, Spec};
use vmkit_agent::client::{Client, Prepare};

use super::args::{BASE, Begin, OVERLAY};
use super::driver::QemuDriver;
use super::fork::{copy_sparse, link};
use super::image;
use super::layout::{self, DISK, LAYER, MEMORY, SERIAL, STATE, STATE_APART};
use super::line::translate;
use super::lock::Lock;
use super::qmp::{Memory, Qmp};
use super::suspend::not_begun;
use super::template::{self, CopyOf, TemplateInfo, Templates};
use super::{Qemu, QemuConfig, SNAPSHOTS, split};

/// How the names of such templates begin.
const PREFIX: &str = "fork-";

/// How long a guest may write faster than it can be saved before it stands still for the rest.
const CHASES: Duration = Duration::from_secs(10);

/// How many times its memory what is saved of it may take, because it writes meanwhile.
const WRITES: u64 = 2;

/// How much of a console's log copies have, bytes.
const LOG: u64 = 64 << 10;

/// How long a copy's lock may be somebody's before it is left to that one.
const LETS_GO: Duration = Duration::from_millis(100);

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
        if let Err(error) = self.templates.clear(&self.key) {
            warn!(key = %self.key, %error, "what copies were made from is not removed yet");
            return;
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
            self.check_space_to_copy()?;
            layout::make_dir(&draft)?;
            layout::write_record(&draft, &Spec { own_memory: true, ..spec.clone() })?;
            if self.file(LAYER).exists() {
                link(&self.file(LAYER), &draft.join(LAYER))?;
            }
            let paused = self.save_beside(&draft).await;
            let paused = self.or_ended(paused, "was being copied").await?;
            let mut copy = work.driver(&key, spec.clone());
            let settled = copy.become_template(&run.accelerator, &facts.program).await;
            let ended = copy.end_process().await;
            settled.and(ended)?;
            layout::remove(&draft.join(STATE_APART))?;
            if self.config.durable {
                // Copies that are suspended for good lie on it.
                let disk = draft.join(DISK);
                blocking(move || layout::sync(&disk)).await?;
            }
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
        let labels = self.spec.labels_of_copies();
        Ok(Snapshot::new(Spec { labels, snapshot: Some(key.to_string()), ..spec }, made?, kept))
    }

    /// Room for its memory and its disk.
    fn check_space_to_copy(&self) -> Result<()> {
        let disks = [DISK, LAYER].map(|file| fs::metadata(self.file(file)).map_or(0, |meta| meta.blocks() * 512));
        self.check_space_for(self.spec.memory_mib + (disks.iter().sum::<u64>() >> 20))
    }

    /// Saves memory, devices and disk to another machine's directory. Returns how long the guest stood still.
    async fn save_beside(&mut self, draft: &Path) -> Result<Duration> {
        let mut qmp = Qmp::connect(&self.dir, super::layout::QMP).await.map_err(not_begun)?;
        // From here on, whoever comes after a process that died lets the guest go on, as who it was.
        self.note_fork()?;
        let saved = self.save_to(&mut qmp, draft).await;
        let goes_on = async {
            if saved.is_err() {
                qmp.save_no_more().await?;
            }
            qmp.go_on().await
        };
        // The note stays: the next look lets it go on, or ends it.
        let went_on: Result<()> = goes_on.await;
        let still = saved.as_ref().map(Instant::elapsed).unwrap_or_default();
        if let Err(error) = went_on {
            return Err(saved.err().unwrap_or(error));
        }
        match self.ask_agent(async |agent: Client| agent.freeze(false).await).await {
            Ok(()) => self.note_forked()?,
            Err(error) => debug!(id = %self.id, %error, "a guest is yet to be told that it was copied"),
        }
        saved?;
        // What its console said is for people, and of that the end.
        let log = layout::tail(&self.file(SERIAL), LOG);
        fs::write(draft.join(SERIAL), log).map_err(|error| Error::io("the console's log cannot be copied", error))?;
        Ok(still)
    }

    /// Returns since when the guest stands still.
    async fn save_to(&self, qmp: &mut Qmp, draft: &Path) -> Result<Instant> {
        // What is renewed in copies is opened, nobody boots with its machine id, and what it wrote is on its disk.
        let ready = async { self.line.client().await?.prepare(Prepare { rests: false }).await.map_err(translate) };
        timeout(PREPARES, ready).await.map_err(|_| {
            Error::new(ErrorKind::Agent, format!("the guest did not write its data to its disk within {PREPARES:?}"))
        })??;
        // What runs lives on in the copies, where nobody is connected to it.
        self.ask_agent(async |agent: Client| agent.freeze(true).await).await?;
        let (files, size) = ((draft.join(STATE_APART), draft.join(MEMORY)), self.spec.memory_mib << 20);
        let saving = qmp.save_running(split::URI, CHASES, size * WRITES);
        let since = split::receive(&self.dir, files, size, false, saving).await?;
        // No more than it wrote, and it stands still for it.
        let (from, to) = (self.file(DISK), draft.join(DISK));
        blocking(move || {
            copy_sparse(&from, &to).map_err(|error| Error::io("the machine's disk cannot be copied", error))
        })
        .await?;
        Ok(since)
    }

    /// Loads what was saved, which shows that it can be, and makes the disk one that lies on the image's. The guest does not run.
    async fn become_template(&mut self, accelerator: &str, program: &Path) -> Result<()> {
        let layered = self.file(LAYER).exists();
        self.clear_way().await?;
        self.spawn(Begin::Resume, accelerator, program)?;
        let (dir, line) = (self.dir.clone(), self.line.clone());
        let convert = async {
            let mut qmp = Qmp::when_up(&dir).await?;
            // Connected when it was saved, when it is loaded, and when it is saved again.
            let _wire = line.wire().await?;
            qmp.load(Path::new(STATE_APART), Memory::Elsewhere).await?;
            if layered {
                qmp.flatten(OVERLAY, BASE).await?;
            }
            qmp.save(&format!("file:{STATE}"), Memory::Elsewhere).await
        };
        // What the original's console said is not about this.
        let from = fs::metadata(self.file(SERIAL)).map_or(0, |meta| meta.len());
        self.until(from, convert).await?;
        Ok(())
    }
}

impl Qemu {
    /// Removes what processes left that died while they made copies: what copies go on from, and copies that never did.
    pub(super) async fn sweep_snapshots(&self) -> Result<()> {
        // Mostly there is nothing, and that is known by one look.
        if !self.layout.dir.join(SNAPSHOTS).is_dir() {
            return Ok(());
        }
        let templates = self.snapshots()?;
        for key in templates.held()? {
            let Some(taken) = Lock::try_take(&templates.dir.join(".locks").join(key.as_str()), Action::Delete)? else {
                continue;
            };
            self.remove_copies(&key).await?;
            templates.clear(&key)?;
            taken.lock.release(true);
        }
        Ok(())
    }

    /// Removes copies that have not gone on yet. One that somebody operates on is left to it.
    async fn remove_copies(&self, key: &Id) -> Result<()> {
        for id in self.layout.machines()? {
            let Ok(record) = layout::read_record(&self.layout.machine(&id)) else { continue };
            if record.spec.snapshot.as_deref() != Some(key.as_str()) || !self.is_fresh(&id) {
                continue;
            }
            let mut copy = self.driver(&id, record.spec);
            let Ok(begun) = timeout(LETS_GO, copy.begin(Action::Delete)).await else { continue };
            begun?;
            // Under its lock: it may have gone on meanwhile.
            let removed = match self.is_fresh(&id) {
                true => copy.destroy().await,
                false => Ok(()),
            };
            copy.end();
            removed?;
        }
        Ok(())
    }
}

async fn blocking(work: impl FnOnce() -> Result<()> + Send + 'static) -> Result<()> {
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(|error| Error::new(ErrorKind::Io, "writing to disk failed").caused_by(error))?
}
