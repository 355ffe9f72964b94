//! Templates: booted guests, saved once, that fresh clones go on from.
//!
//! ```text
//! DIR/KEY/            a template; complete or not there, and never written to again
//!   template.json     what it is
//!   memory state      its saved execution
//!   serial.log        what it printed until then
//!   disk.qcow2        its disk, on the image's: the layer under its forks' disks
//! DIR/.work/          the machines that are to become templates, as machines are
//! DIR/.locks/KEY      who makes one
//! DIR/.staging/KEY    becoming one
//! ```
//!
//! A template is made of a machine that booted, answered and was suspended like any other. The key has all that a saved
//! execution depends on: what fits no template makes a new one.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use futures::FutureExt;
use futures::future::BoxFuture;
use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use tracing::{info, warn};
use vmkit::{Action, BootImage, ConsoleSinks, Error, ErrorKind, Host, Id, Result, Spec, State, Timeouts, cleanup};

use super::args::{Begin, args};
use super::driver::TemplateUse;
use super::host::HostFacts;
use super::layout::{self, DISK, MEMORY, SERIAL, STATE};
use super::lock::{FileLock, Lock};
use super::{Accelerator, Qemu, QemuConfig, image, line};
use crate::process::Identity;

const RECORD: &str = "template.json";
/// Rises when a template that older code made is not what this code would make.
pub(super) const VERSION: u32 = 4;
/// How long what a maker that died left may take to be removed.
const CLEANUP: Duration = Duration::from_secs(60);

/// What a template is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TemplateInfo {
    /// Its name: what it was made from, its shape, and a digest of all that it depends on.
    pub key: String,
    /// The image's name when it was made.
    pub image: String,
    /// The image's digest.
    pub digest: String,
    /// Virtual processors.
    pub cpus: u32,
    /// Memory, MiB.
    pub memory_mib: u64,
    /// QEMU's version.
    pub qemu: String,
    /// How its guest executes.
    pub accelerator: String,
    /// What was executed in it before it was saved: program and arguments.
    pub warm: Vec<String>,
    /// When it was made, seconds since 1970.
    pub created: u64,
    /// The machine that it is a copy of as it ran, whose copies go on from it; absent when it is a template for all clones.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub copy_of: Option<CopyOf>,
    /// The space it occupies, bytes.
    #[serde(default)]
    pub size: u64,
    pub(super) version: u32,
}

/// Which machine a template is a copy of.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CopyOf {
    /// Its name.
    pub id: String,
    /// How long it stood still for it.
    pub stood_still: Duration,
}

/// A template that may be forked; nobody removes it meanwhile.
#[derive(Debug)]
pub(crate) struct Template {
    dir: PathBuf,
    pub info: TemplateInfo,
    _hold: FileLock,
}

impl Template {
    pub fn memory(&self) -> PathBuf {
        self.dir.join(MEMORY)
    }

    pub fn state(&self) -> PathBuf {
        self.dir.join(STATE)
    }

    pub fn console(&self) -> PathBuf {
        self.dir.join(SERIAL)
    }

    pub fn disk(&self) -> PathBuf {
        self.dir.join(DISK)
    }
}

/// What a template is to fit.
pub(crate) struct Shape<'a> {
    pub image: &'a BootImage,
    pub spec: &'a Spec,
    pub facts: &'a HostFacts,
    pub accelerator: &'a str,
}

impl Shape<'_> {
    /// All that a saved execution depends on.
    fn key(&self) -> Result<Id> {
        let Shape { image, spec, facts, accelerator } = self;
        // Where files are does not matter, and who it is neither.
        let anywhere = BootImage {
            kernel: "kernel".into(),
            loader: image.loader.as_ref().map(|_| "loader".into()),
            initramfs: "initramfs".into(),
            disk: image.disk.as_ref().map(|_| "disk".into()),
            ..(*image).clone()
        };
        let id = Id::new("template")?;
        let line = args(&id, spec, &anywhere, accelerator, Begin::Resume, false);
        let mut hash = Sha256::new();
        hash.update(format!("{VERSION} {} {} {}\n", vmkit_agent::link::VERSION, image.digest, facts.version));
        for word in &line {
            hash.update(word.as_encoded_bytes());
            hash.update(b"\0");
        }
        if *accelerator == "kvm" {
            // Its guest sees this very processor.
            hash.update(processor());
        }
        let digest = hash.finalize();
        let short: String = digest.iter().take(8).map(|byte| format!("{byte:02x}")).collect();
        let image = image.digest.trim_start_matches("sha256:");
        Id::new(format!("{}-{}c-{}m-{short}", &image[..image.len().min(12)], spec.cpus, spec.memory_mib))
    }
}

/// The model and the abilities of the first processor.
fn processor() -> String {
    let text = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let first = text.split("\n\n").next().unwrap_or_default();
    let matters =
        |line: &&str| ["vendor_id", "cpu family", "model", "stepping", "flags"].iter().any(|key| line.starts_with(key));
    first.lines().filter(matters).collect::<Vec<_>>().join("\n")
}

/// The templates of one directory. Any number of processes may use it at once.
#[derive(Clone, Debug)]
pub(crate) struct Templates {
    pub(super) dir: PathBuf,
}

impl Templates {
    pub fn open(dir: &Path) -> Result<Templates> {
        for part in ["", ".locks", ".staging", ".trash"] {
            layout::make_dir(&dir.join(part))?;
        }
        let dir = dir.canonicalize().map_err(|error| Error::io(format!("{} cannot be read", dir.display()), error))?;
        Ok(Templates { dir })
    }

    /// The template of this shape, if there is one.
    pub fn find(&self, shape: &Shape<'_>) -> Result<Option<Template>> {
        Ok(self.fitting(&shape.key()?, shape))
    }

    /// One whose disk is gone is damaged, if its machines have one.
    fn fitting(&self, key: &Id, shape: &Shape<'_>) -> Option<Template> {
        self.read(key.as_str()).filter(|template| shape.image.disk.is_none() || template.disk().is_file())
    }

    pub(super) fn read(&self, key: &str) -> Option<Template> {
        let dir = self.dir.join(key);
        let hold = File::open(dir.join(RECORD)).ok()?;
        // Whoever removes it holds it alone.
        let hold = FileLock::try_take(hold, FlockOperation::NonBlockingLockShared).ok()??;
        let info: TemplateInfo = layout::read_json(&dir.join(RECORD))?;
        let whole = info.version == VERSION && [MEMORY, STATE].iter().all(|file| dir.join(file).is_file());
        whole.then_some(Template { dir, info, _hold: hold })
    }

    /// The template of this shape, made when there is none: that takes as long as a boot, and others who want it wait. `again`
    /// makes it anew. Boxed: making one starts a machine, and starting a machine may make one.
    pub fn ensure<'a>(
        &'a self,
        shape: Shape<'a>,
        program: Option<&'a Path>,
        warm: &'a [String],
        again: bool,
    ) -> BoxFuture<'a, Result<Template>> {
        async move {
            let key = shape.key()?;
            if let Some(template) = self.fitting(&key, &shape).filter(|_| !again) {
                return Ok(template);
            }
            let lock = Lock::take(&self.dir.join(".locks").join(key.as_str()), Action::Clone).await?.lock;
            // Whoever held the lock may have made it.
            let made = match self.fitting(&key, &shape).filter(|_| !again) {
                Some(template) => Ok(template),
                None => self.make(&key, &shape, program, warm).await,
            };
            lock.release(true);
            made
        }
        .boxed()
    }

    async fn make(&self, key: &Id, shape: &Shape<'_>, program: Option<&Path>, warm: &[String]) -> Result<Template> {
        let Shape { image, spec, facts, accelerator } = shape;
        info!(%key, "making a template");
        let config = QemuConfig {
            accelerator: if *accelerator == "kvm" { Accelerator::Kvm } else { Accelerator::Tcg },
            program: program.map(Path::to_owned),
            ..QemuConfig::new(self.dir.join(".work"))
        };
        let work = Qemu::new(config)?.for_templates();
        let host = Host::new(work.clone());
        remove(&host, key).await?;
        let plain =
            Spec { own_memory: true, labels: Default::default(), timeouts: Timeouts::default(), ..(*spec).clone() };
        let vm = host.create(key.clone(), plain).await?;
        let made = async {
            vm.clone_source().await?;
            vm.start(ConsoleSinks::discard()).await?;
            warm_up(&vm, warm).await?;
            // A guest that is told to reboot or to power off lets the command that tells it end first.
            vm.suspend().await.map_err(|error| match warm.first() {
                Some(program) => taken_away(error, program),
                None => error,
            })?;
            let info = TemplateInfo {
                key: key.to_string(),
                image: image.name.clone(),
                digest: image.digest.clone(),
                cpus: spec.cpus,
                memory_mib: spec.memory_mib,
                qemu: facts.version.clone(),
                accelerator: (*accelerator).to_owned(),
                warm: warm.to_vec(),
                created: today(),
                copy_of: None,
                size: 0,
                version: VERSION,
            };
            self.publish(&work.machine_dir(key), info)
        };
        let made = made.await;
        drop(vm);
        if let Err(error) = remove(&host, key).await {
            warn!(%key, %error, "what a template was made of is not removed yet");
        }
        made?;
        self.read(key.as_str()).ok_or_else(|| {
            Error::new(ErrorKind::NotFound, format!("the template {key} was removed as soon as it was made"))
                .hint("try again")
        })
    }

    /// Takes a suspended machine's files. Everything was written through when it was suspended.
    pub(super) fn publish(&self, machine: &Path, mut info: TemplateInfo) -> Result<()> {
        let (staging, place) = (self.dir.join(".staging").join(&info.key), self.dir.join(&info.key));
        layout::remove_tree(&staging)?;
        layout::make_dir(&staging)?;
        for file in [MEMORY, STATE, DISK, SERIAL] {
            let (from, to) = (machine.join(file), staging.join(file));
            if matches!(file, MEMORY | STATE) || from.exists() {
                layout::rename(&from, &to)?;
                let mut mode = fs::metadata(&to).map_err(|error| unusable(&to, error))?.permissions();
                mode.set_readonly(true);
                fs::set_permissions(&to, mode).map_err(|error| unusable(&to, error))?;
            }
        }
        info.size = layout::occupied(&staging).unwrap_or_default();
        let record = staging.join(RECORD);
        let text = serde_json::to_vec_pretty(&info).map_err(|error| unusable(&record, error.into()))?;
        fs::write(&record, text).map_err(|error| unusable(&record, error))?;
        layout::sync(&record)?;
        layout::sync(&staging)?;
        if place.symlink_metadata().is_ok() {
            // An older one, or a damaged one.
            self.discard(&info.key)?;
        }
        layout::rename(&staging, &place)?;
        layout::sync(&self.dir)
    }

    /// Moved out of the way before it is removed. Who has it open keeps what he has.
    fn discard(&self, key: &str) -> Result<()> {
        let trash = self.dir.join(".trash").join(key);
        layout::remove_tree(&trash)?;
        layout::rename(&self.dir.join(key), &trash)?;
        layout::remove_tree(&trash)
    }

    /// All templates, by key; what is damaged is none.
    pub fn list(&self) -> Result<Vec<TemplateInfo>> {
        let failed = |error| unusable(&self.dir, error);
        let mut found = Vec::new();
        for entry in fs::read_dir(&self.dir).map_err(failed)? {
            let name = entry.map_err(failed)?.file_name();
            if let Some(key) = name.to_str().filter(|name| !name.starts_with('.'))
                && let Some(template) = self.read(key)
            {
                found.push(template.info);
            }
        }
        found.sort_by(|a, b| (&a.image, &a.key).cmp(&(&b.image, &b.key)));
        Ok(found)
    }

    /// The names of what is there, is being made, or was when its maker died.
    pub(super) fn held(&self) -> Result<Vec<Id>> {
        let locks = self.dir.join(".locks");
        let mut found = Vec::new();
        for entry in fs::read_dir(&locks).map_err(|error| unusable(&locks, error))? {
            let name = entry.map_err(|error| unusable(&locks, error))?.file_name();
            found.extend(name.to_str().and_then(|name| Id::new(name).ok()));
        }
        Ok(found)
    }

    /// Removes all there is of one, whatever it has come to.
    pub(super) fn clear(&self, key: &Id) -> Result<()> {
        let draft = self.dir.join(".work").join(key.as_str());
        if draft.is_dir() {
            for process in layout::qemus_in(&draft).into_iter().filter_map(|pid| Identity::of(pid).ok().flatten()) {
                let failed = |error| Error::io("a process that was to make a template cannot be killed", error);
                process.hold().map_err(failed)?.map_or(Ok(()), |held| held.kill()).map_err(failed)?;
            }
        }
        [".work", ".staging", ".trash", ""]
            .iter()
            .try_for_each(|part| layout::remove_tree(&self.dir.join(part).join(key.as_str())))
    }

    /// Removes one. Machines that were forked from it keep what they need of it.
    pub async fn remove(&self, key: &str) -> Result<()> {
        let missing = || {
            Error::new(ErrorKind::NotFound, format!("there is no template {key:?}"))
                .hint("`vmkit template ls` lists the templates there are")
        };
        let id = Id::new(key).map_err(|_| missing())?;
        let dir = self.dir.join(key);
        if dir.symlink_metadata().is_err() {
            return Err(missing());
        }
        let lock = Lock::take(&self.dir.join(".locks").join(id.as_str()), Action::Delete).await?.lock;
        // Forks that begin just now hold it for milliseconds.
        if let Ok(record) = File::open(dir.join(RECORD)) {
            // The lock goes with the file, which nobody finds any more then.
            while flock(&record, FlockOperation::NonBlockingLockExclusive).is_err() {
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        }
        let removed = if dir.symlink_metadata().is_ok() { self.discard(key) } else { Ok(()) };
        lock.release(true);
        removed
    }

    /// Removes what makers that died left, their machines' processes first. One that makes a template now is left alone.
    pub async fn sweep(&self) -> Result<()> {
        // Mostly there is nothing, and that is known by one look.
        if !self.dir.join(".work").is_dir() {
            return Ok(());
        }
        let work = Qemu::new(QemuConfig::new(self.dir.join(".work")))?;
        for key in work.layout.machines()? {
            if let Some(taken) = Lock::try_take(&self.dir.join(".locks").join(key.as_str()), Action::Delete)? {
                let removed = remove(&Host::new(work.clone()), &key).await;
                taken.lock.release(true);
                removed?;
            }
        }
        Ok(())
    }

    /// Removes those of images that are not there any more. Returns how many.
    pub async fn prune(&self, is_there: impl Fn(&str) -> bool) -> Result<usize> {
        let mut removed = 0;
        for info in self.list()? {
            if !is_there(&info.digest) {
                self.remove(&info.key).await?;
                removed += 1;
            }
        }
        Ok(removed)
    }
}

impl Qemu {
    fn kept(&self) -> Result<&Templates> {
        match &self.templates {
            TemplateUse::Fork(templates) => Ok(templates),
            TemplateUse::None | TemplateUse::Make => {
                Err(Error::new(ErrorKind::Unsupported, "no templates are kept here")
                    .hint("say where to keep them: QemuConfig::templates"))
            }
        }
    }

    /// All templates, by image and key.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] where none are kept; when they cannot be read.
    pub fn templates(&self) -> Result<Vec<TemplateInfo>> {
        self.kept()?.list()
    }

    /// The template that the first start of such a machine would be a fork of, when it is there. Blocks for a moment.
    ///
    /// # Errors
    /// As [`templates`](Qemu::templates), and when there is no QEMU.
    pub fn template_for(&self, spec: &Spec) -> Result<Option<TemplateInfo>> {
        let facts = self.host_facts()?;
        let accelerator = facts.accelerator(self.config.accelerator)?;
        let shape = Shape { image: image::of(spec)?, spec, facts: &facts, accelerator };
        Ok(self.kept()?.find(&shape)?.map(|template| template.info))
    }

    /// Makes the template of such machines when it is not there, and with `again` also when it is. `warm`, a program and its
    /// arguments, is executed in it before it is saved: what that loaded is in every fork's memory. Takes as long as a boot.
    ///
    /// # Errors
    /// As [`template_for`](Qemu::template_for); when its machine does not boot; when what is executed does not end with 0.
    ///
    /// # Cancel safety
    /// Dropping the future leaves nothing but what the next call removes.
    pub async fn build_template(&self, spec: &Spec, warm: &[String], again: bool) -> Result<TemplateInfo> {
        let qemu = self.clone();
        let facts = tokio::task::spawn_blocking(move || qemu.host_facts()).await;
        let facts =
            facts.map_err(|error| Error::new(ErrorKind::Backend, "looking for QEMU failed").caused_by(error))??;
        let accelerator = facts.accelerator(self.config.accelerator)?;
        let shape = Shape { image: image::of(spec)?, spec, facts: &facts, accelerator };
        let made = self.kept()?.ensure(shape, self.config.program.as_deref(), warm, again).await?;
        Ok(made.info)
    }

    /// Removes a template. Machines that were forked from it keep what they need.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`]; as [`templates`](Qemu::templates).
    pub async fn remove_template(&self, key: &str) -> Result<()> {
        self.kept()?.remove(key).await
    }

    /// Removes what processes left that died while they made a template, or copies of a machine.
    ///
    /// # Errors
    /// When it cannot be removed.
    pub async fn sweep_templates(&self) -> Result<()> {
        if let TemplateUse::Fork(templates) = &self.templates {
            templates.sweep().await?;
        }
        self.sweep_snapshots().await
    }

    /// Removes the templates of images of which `is_there` is false, by digest, and returns how many.
    ///
    /// # Errors
    /// As [`templates`](Qemu::templates).
    pub async fn prune_templates(&self, is_there: impl Fn(&str) -> bool) -> Result<usize> {
        self.kept()?.prune(is_there).await
    }
}

/// Removes what there is of a machine that was to become a template.
async fn remove(host: &Host<Qemu>, key: &Id) -> Result<()> {
    match host.adopt(key).await {
        Ok(left) => cleanup(&left, Duration::ZERO, CLEANUP).await,
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    }
}

async fn warm_up(vm: &vmkit::Instance, warm: &[String]) -> Result<()> {
    // What every program needs is read from the disk once, here, and is in the memory of every fork. An image without a shell has
    // its own ways.
    let _ = vm.command("sh").args(["-c", "true; /bin/true"]).output().await;
    let Some((program, words)) = warm.split_first() else { return Ok(()) };
    let output = vm.command(program).args(words.iter().cloned()).output().await;
    let output = output.map_err(|error| taken_away(error, program))?;
    if output.status.success() {
        return Ok(());
    }
    let said =
        String::from_utf8_lossy(if output.stderr.is_empty() { &output.stdout } else { &output.stderr }).into_owned();
    Err(Error::new(ErrorKind::Backend, format!("{} ended with {}", called(program), output.status))
        .hint("execute it in a machine of the same image: `vmkit run`")
        .with_details(said))
}

/// What a warm-up is called in errors. Arguments are in none.
fn called(program: &str) -> String {
    format!("the template's warm-up {program:?}")
}

/// The error for a guest that is not there any more, during its warm-up or right after: then that is why.
fn taken_away(error: Error, program: &str) -> Error {
    let (kind, how) = match (error.kind(), error.state()) {
        // Perhaps by its host's doing, and not the next time.
        (ErrorKind::NotRunning | ErrorKind::Exited, _) => (ErrorKind::Backend, "ended"),
        (ErrorKind::IllegalRequest, Some(State::Stopped)) => (ErrorKind::Backend, "ended"),
        _ if line::is_reboot(&error) => (ErrorKind::Unsupported, "rebooted"),
        _ => return error,
    };
    // Not on its machine, whose name says nothing to anybody.
    let error = Error::new(kind, format!("{} {how} its guest", called(program)));
    error.hint("a warm-up leaves the guest running: it is what forks go on from")
}

/// Seconds since 1970.
pub(super) fn today() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

fn unusable(path: &Path, error: std::io::Error) -> Error {
    Error::io(format!("{} cannot be used", path.display()), error)
}
