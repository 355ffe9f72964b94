//! QEMU: a machine is a directory, its process is found again by it.
//!
//! ```text
//!  Qemu (Provider) ── open / adopt ──▶ QemuDriver ── spawn, kill ───────▶ qemu-system-*
//!     │ list                             │  │  └──── QMP (suspend, resume) ──▶ qmp.sock
//!     ▼                                  │  └─────── sessions ───────────────▶ agent.N.sock ─▶ agent
//!  DIR/NAME/… (layout) ◀── lock, look ───┘
//! ```
//!
//! Machines boot by their kernel. Booting needs no control session: the agent's first answer is what counts. Guest memory is
//! a shared file, so that suspending writes only the devices' state; that file's rename is the commit.
//!
//! Deliberately absent: a monitor that stays connected (the process table tells when QEMU ends), guest networks, displays.

mod arch;
mod args;
mod claim;
mod console;
mod driver;
mod exit;
mod fork;
#[cfg(feature = "fuzzing")]
#[doc(hidden)]
pub mod fuzzing;
mod host;
mod image;
mod layout;
mod line;
mod lock;
mod prespawn;
mod probe;
mod qcow2;
mod qmp;
mod recover;
mod session;
mod snapshot;
mod socket;
mod split;
mod suspend;
mod template;
mod through;
mod turns;
mod watch;

use std::path::{Path, PathBuf};
use std::str::FromStr;

use tracing::debug;
use vmkit::{
    Action, Adopted, Capabilities, Error, ErrorKind, Fact, Found, Id, Provider, Result, Source, Spec, State, found,
};

pub use claim::PoolClaim;
pub use driver::QemuDriver;
pub use host::HostFacts;
pub use template::{CopyOf, TemplateInfo};

use driver::TemplateUse;
use layout::Layout;
use lock::{Holder, Lock, holder};
use template::Templates;

/// A disk with less room is as good as full, bytes.
const FULL: u64 = 8 << 20;

/// Where what copies go on from is kept, in the directory of the machines.
const SNAPSHOTS: &str = ".snapshots";

/// How guests execute.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Accelerator {
    /// KVM where a guest really runs with it, else TCG. What was chosen is shown in the properties.
    #[default]
    Auto,
    /// KVM, or an error.
    Kvm,
    /// QEMU's own translator. Works everywhere.
    Tcg,
}

impl FromStr for Accelerator {
    type Err = Error;

    /// Parses a name without regard to case.
    fn from_str(word: &str) -> Result<Accelerator> {
        match word.to_ascii_lowercase().as_str() {
            "auto" => Ok(Accelerator::Auto),
            "kvm" => Ok(Accelerator::Kvm),
            "tcg" => Ok(Accelerator::Tcg),
            _ => Err(Error::new(ErrorKind::InvalidArgument, format!("unknown accelerator {word:?}"))
                .hint("use auto, kvm or tcg")),
        }
    }
}

/// Where machines are, and how they run.
#[derive(Clone, Debug)]
pub struct QemuConfig {
    /// The directory that holds the machines; nothing else should use it.
    pub dir: PathBuf,
    /// How guests execute.
    pub accelerator: Accelerator,
    /// QEMU's program; the one for this architecture in `PATH` when absent.
    pub program: Option<PathBuf>,
    /// Whether a suspend is written through to the disk before it counts: it then survives a power cut, and takes as long as
    /// writing the guest's memory does. Killing processes never needs it.
    pub durable: bool,
    /// Where templates are kept: then the first start of a clone is a fork of its image's template, which takes as long as the
    /// saved devices take to load, and the template is made when there is none of that shape. Without it every start boots.
    pub templates: Option<PathBuf>,
}

impl QemuConfig {
    /// The defaults: accelerator `auto`, QEMU from `PATH`, durable, no templates.
    pub fn new(dir: impl Into<PathBuf>) -> QemuConfig {
        QemuConfig { dir: dir.into(), accelerator: Accelerator::Auto, program: None, durable: true, templates: None }
    }
}

/// Machines under QEMU on this host. Any number of processes may use one directory at once.
#[derive(Clone, Debug)]
pub struct Qemu {
    config: QemuConfig,
    layout: Layout,
    templates: TemplateUse,
}

impl Qemu {
    /// Opens a directory of machines, which is made when it is not there.
    ///
    /// # Errors
    /// When the directory cannot be made or written to.
    pub fn new(config: QemuConfig) -> Result<Qemu> {
        layout::make_dir(&config.dir)?;
        let dir = config
            .dir
            .canonicalize()
            .map_err(|error| Error::io(format!("{} cannot be read", config.dir.display()), error))?;
        for part in [".staging", ".trash", ".locks", ".pools"] {
            layout::make_dir(&dir.join(part))?;
        }
        rustix::fs::access(&dir, rustix::fs::Access::WRITE_OK)
            .map_err(|error| Error::io(format!("{} cannot be written to", dir.display()), error.into()))?;
        let templates = match &config.templates {
            Some(dir) => TemplateUse::Fork(Templates::open(dir)?),
            None => TemplateUse::None,
        };
        Ok(Qemu { config, layout: Layout { dir }, templates })
    }

    /// Where what copies go on from is kept: beside the machines, whether there are templates or not.
    fn snapshots(&self) -> Result<Templates> {
        Templates::open(&self.layout.dir.join(SNAPSHOTS))
    }

    /// The same, for machines that become templates.
    fn for_templates(self) -> Qemu {
        Qemu { templates: TemplateUse::Make, ..self }
    }

    /// What this machine can run guests with. Blocks; takes up to three seconds the first time.
    ///
    /// # Errors
    /// [`ErrorKind::MissingDependency`] when there is no QEMU, or one that is too old.
    pub fn host_facts(&self) -> Result<HostFacts> {
        HostFacts::find(&self.layout.dir, self.config.program.as_deref())
    }

    /// Whether a machine has never been started: its next start is a fork of a template, where they are kept.
    pub fn is_fresh(&self, id: &Id) -> bool {
        self.layout.machine(id).join(layout::FRESH).exists()
    }

    /// The directory of a machine, whether it is there or not.
    pub fn machine_dir(&self, id: &Id) -> PathBuf {
        self.layout.machine(id)
    }

    /// The file that a machine's console is written to.
    pub fn console_log(&self, id: &Id) -> PathBuf {
        self.layout.machine(id).join(layout::SERIAL)
    }

    /// Whether the disk that holds the machines has no room left: what a guest writes to its memory or its disk then kills it.
    pub fn is_full(&self) -> bool {
        rustix::fs::statvfs(&self.layout.dir).is_ok_and(|stat| stat.f_bavail.saturating_mul(stat.f_frsize) < FULL)
    }

    /// The digests of the images that machines were made from: those that must be kept.
    ///
    /// # Errors
    /// When the directory cannot be read. A machine whose record is damaged is an error too: nobody knows what it needs.
    pub fn images_in_use(&self) -> Result<Vec<String>> {
        let mut digests = Vec::new();
        for id in self.layout.machines()? {
            for dir in [self.layout.machine(&id), self.layout.staging(&id)] {
                if layout::is_ours(&dir)
                    && let Source::Boot(image) =
                        layout::read_record(&dir).map_err(|error| error.on(id.as_str()))?.spec.source
                {
                    digests.push(image.digest);
                }
            }
        }
        digests.sort();
        digests.dedup();
        Ok(digests)
    }

    fn driver(&self, id: &Id, spec: Spec) -> QemuDriver {
        QemuDriver::new(id.clone(), spec, self)
    }

    /// What a machine is in now, whoever operates on it; Deleted when there is none. Clears up what a process that died left of
    /// an operation.
    ///
    /// # Errors
    /// When what is there cannot be looked at, or cannot be cleared up.
    pub async fn state(&self, id: &Id) -> Result<State> {
        let path = self.layout.lock(id);
        match holder(&path) {
            Holder::Busy(action) => return Ok(under_way(action)),
            Holder::Died(_) => {
                // Nobody may hold it by now, or somebody who is quicker: then there is nothing to clear up.
                let Some(taken) = Lock::try_take(&path, Action::None)? else { return Box::pin(self.state(id)).await };
                if let Some(left) = taken.left {
                    recover::recover(&self.layout, id, left).await?;
                }
                taken.lock.release(self.layout.machine(id).symlink_metadata().is_err());
            }
            Holder::Free => self.sweep_memory(id),
        }
        Ok(found(self.look(id)))
    }

    /// Gives up a machine's saved execution: what ran in it is lost, its disk stays, and it is Stopped. For one that cannot go on.
    /// Whether there was any.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] when there is no such machine; when its files cannot be removed.
    pub async fn discard_saved(&self, id: &Id) -> Result<bool> {
        let dir = self.layout.machine(id);
        if !layout::is_ours(&dir) {
            return Err(Error::new(ErrorKind::NotFound, "there is no such machine")
                .on(id.as_str())
                .hint("`vmkit ls` lists the machines there are"));
        }
        let taken = Lock::take(&self.layout.lock(id), Action::Stop).await?;
        if let Some(left) = taken.left {
            recover::recover(&self.layout, id, left).await?;
        }
        let saved = layout::saved(&dir).is_some() && layout::running(&dir).is_none();
        if saved {
            // One may wait for it.
            recover::kill_all(&dir).await?;
        }
        let discarded = match saved {
            true => layout::SAVED.iter().chain([&layout::MEMORY]).try_for_each(|file| layout::remove(&dir.join(file))),
            false => Ok(()),
        };
        taken.lock.release(!layout::is_ours(&dir));
        discarded.map(|()| saved)
    }

    /// Whether a machine cannot go on because the memory of its saved execution is gone, and could be booted from its disk once that
    /// is given up: [`discard_saved`](Qemu::discard_saved).
    pub fn has_lost_memory(&self, id: &Id) -> bool {
        layout::lost_memory(&self.layout.machine(id))
    }

    /// Removes the locks that there are beside those of machines: whoever was to make those was killed before there was anything.
    async fn sweep_locks(&self, machines: &[Id]) -> Result<()> {
        for id in self.layout.locks()?.into_iter().filter(|id| !machines.contains(id)) {
            let Some(taken) = Lock::try_take(&self.layout.lock(&id), Action::None)? else { continue };
            if let Some(left) = taken.left {
                recover::recover(&self.layout, &id, left).await?;
            }
            taken.lock.release(self.layout.machine(&id).symlink_metadata().is_err());
        }
        Ok(())
    }

    /// Removes the memory of a machine that ended by itself while nobody looked.
    fn sweep_memory(&self, id: &Id) {
        let dir = self.layout.machine(id);
        if !layout::has_memory_of_nobody(&dir) {
            return;
        }
        // Whoever has it by now sees to it when he is done, and so does whoever clears up after one who died.
        if let Ok(Some(taken)) = Lock::try_take(&self.layout.lock(id), Action::None) {
            match taken.left {
                Some(left) => drop(taken.lock.note(Some(left))),
                None => {
                    layout::sweep_memory(&dir);
                    taken.lock.release(!layout::is_ours(&dir));
                }
            }
        }
    }

    fn look(&self, id: &Id) -> Fact {
        let dir = self.layout.machine(id);
        // What is there and is not ours is nobody's machine.
        if layout::is_ours(&dir) { layout::look(&dir) } else { Fact::Absent }
    }
}

/// The state that an operation publishes while it is under way.
fn under_way(action: Action) -> State {
    match action {
        Action::Clone => State::Cloning,
        Action::Start => State::Starting,
        Action::Suspend => State::Suspending,
        Action::Delete => State::Deleting,
        Action::Stop | Action::None => State::Stopping,
    }
}

impl Provider for Qemu {
    type Driver = QemuDriver;
    type Claim = PoolClaim;

    fn capabilities(&self) -> Capabilities {
        Capabilities { suspend: true, exec: true, fork: true, adopt: true, network: false }
    }

    async fn open(&self, id: &Id, spec: &Spec) -> Result<QemuDriver> {
        // A machine that could never start is not worth making.
        let (qemu, wanted) = (self.clone(), self.config.accelerator);
        let facts = tokio::task::spawn_blocking(move || qemu.host_facts()?.accelerator(wanted).map(drop));
        facts.await.map_err(|error| Error::new(ErrorKind::Backend, "looking for QEMU failed").caused_by(error))??;
        Ok(self.driver(id, spec.clone()))
    }

    async fn list(&self) -> Result<Vec<Found>> {
        let mut machines = Vec::new();
        let ids = self.layout.machines()?;
        if let Err(error) = self.sweep_locks(&ids).await {
            debug!(%error, "locks of machines that are not there stay");
        }
        // Whoever begins anew looks at what there is: machines that were to become templates or copies are not among that.
        if let Err(error) = self.sweep_templates().await {
            debug!(%error, "what was to become a template stays");
        }
        for id in ids {
            let (state, mut problem) = match self.state(&id).await {
                Ok(State::Deleted) => continue,
                Ok(state) => (state, None),
                Err(error) => (State::ErrorUnknown, Some(error.to_string())),
            };
            let dir = self.layout.machine(&id);
            problem = problem.or_else(|| match state {
                State::ErrorUnknown => layout::problem(&dir),
                State::Stopped => layout::read_ended(&dir),
                _ => None,
            });
            let spec = layout::read_record(&dir).ok().map(|record| record.spec);
            machines.push(Found { state, problem, properties: properties(&dir, spec.as_ref()), spec, id });
        }
        Ok(machines)
    }

    async fn adopt(&self, id: &Id) -> Result<Adopted<QemuDriver>> {
        let state = self.state(id).await?;
        let dir = self.layout.machine(id);
        let record = layout::read_record(&dir);
        if state == State::Deleted || (record.is_err() && !layout::is_ours(&dir)) {
            let error = Error::new(ErrorKind::NotFound, "there is no such machine").on(id.as_str());
            return Err(match dir.symlink_metadata() {
                Ok(_) => error.hint(format!("{} is there and was not made by vmkit", dir.display())),
                Err(_) => error.hint("`vmkit ls` lists the machines there are"),
            });
        }
        let spec = match record {
            Ok(record) => record.spec,
            // It can still be deleted, and needs no more than its name for that.
            Err(_) => Spec::new(Source::Alias("unknown".into())),
        };
        let mut driver = self.driver(id, spec.clone());
        driver.refresh();
        Ok(Adopted { driver, spec, state })
    }

    async fn claim(&self, name: &Id) -> Result<PoolClaim> {
        PoolClaim::take(&self.layout.pool(name), name)
    }
}

fn properties(dir: &Path, spec: Option<&Spec>) -> vmkit::Properties {
    let mut properties = probe::properties(dir);
    if let Some(spec) = spec {
        properties.cpus = spec.cpus;
        properties.memory_mib = spec.memory_mib;
        properties.cloned_from = Some(vmkit::CloneInfo {
            image: spec.source.name().to_owned(),
            digest: match &spec.source {
                Source::Boot(image) => Some(image.digest.clone()),
                Source::Alias(_) => None,
            },
        });
    }
    properties
}
