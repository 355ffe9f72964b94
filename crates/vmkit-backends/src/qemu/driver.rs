//! One machine: the verbs.

use std::error::Error as StdError;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rustix::fs::{CWD, RenameFlags, renameat_with};
use tokio::process::{Child, Command};
use tokio::task::AbortHandle;
use tokio::time::timeout;
use tracing::{debug, warn};
use vmkit::{
    Action, Birth, BootImage, ConsoleSinks, Driver, Error, ErrorKind, Exit, Fact, Guest, Id, Origin, Probe, Result,
    Snapshot, Spec, Spent, State,
};
use vmkit_agent::client::Client;

use super::args::{Begin, LINES, args, line_socket};
use super::fork::Laps;
use super::host::HostFacts;
use super::layout::{
    self, DISK, ENDED, FRESH, LAYER, Layout, MEMORY, OUTPUT, QMP, QMP_PROBE, Run, SAVED, SERIAL, STATE, STATE_APART,
    STATE_FULL, STATE_SPENT,
};
use super::line::{Line, translate};
use super::lock::Lock;
use super::probe::{QemuProbe, started_now};
use super::qcow2::{self, Base};
use super::qmp::Qmp;
use super::template::{Shape, Template, Templates};
use super::watch::ENDS;
use super::{Accelerator, Qemu, QemuConfig, console, exit, image, recover};
use crate::process::{Held, Identity};

/// How much of a log goes into an error, bytes.
pub(super) const TAIL: u64 = 2048;
/// How long the agent may take to answer a request of ours.
pub(super) const AGENT_ANSWERS: Duration = Duration::from_secs(10);

/// What is left for a machine that cannot go on.
pub(super) const DISCARD: &str = "`vmkit start --discard` boots it from its disk instead; what ran in it is lost";

/// What is left for one that had gone on.
const SPENT: &str =
    "it had gone on from its saved execution, which is spent: start it again, and it boots from its disk";

/// The driver of one QEMU machine.
pub struct QemuDriver {
    pub(super) id: Id,
    pub(super) spec: Spec,
    pub(super) config: QemuConfig,
    pub(super) templates: TemplateUse,
    layout: Layout,
    pub(super) dir: PathBuf,
    lock: Option<Lock>,
    /// Being copied while it runs: whoever takes it next lets its guest go on.
    forking: bool,
    pub(super) process: Option<Process>,
    pub(super) line: Arc<Line>,
    /// What is being told of a suspend that was called off.
    pub(super) thawing: Option<AbortHandle>,
}

/// What a driver has to do with templates.
#[derive(Clone, Debug)]
pub(super) enum TemplateUse {
    /// Nothing: every clone boots.
    None,
    /// Fresh clones are forks, and what there is no template for makes one.
    Fork(Templates),
    /// Its machines become templates: what they wrote is on their disks when they are saved.
    Make,
}

pub(super) enum Process {
    /// Our child: its exit status is ours to read.
    Ours { child: Child, identity: Identity },
    /// Started by another process, found by its record.
    Found(Held),
}

impl Process {
    fn identity(&self) -> &Identity {
        match self {
            Process::Ours { identity, .. } => identity,
            Process::Found(held) => held.identity(),
        }
    }
}

impl QemuDriver {
    pub(super) fn new(id: Id, spec: Spec, qemu: &Qemu) -> QemuDriver {
        let Qemu { config, layout, templates } = qemu.clone();
        let dir = layout.machine(&id);
        let line = Line::new(dir.clone(), spec.timeouts.start);
        QemuDriver {
            id,
            spec,
            config,
            templates,
            layout,
            dir,
            lock: None,
            forking: false,
            process: None,
            line,
            thawing: None,
        }
    }

    pub(super) fn qemu(&self) -> Qemu {
        Qemu { config: self.config.clone(), layout: self.layout.clone(), templates: self.templates.clone() }
    }

    /// Holds the process that the records name, if it is not held already.
    pub(super) fn refresh(&mut self) {
        let recorded = layout::read_run(&self.dir).map(|run| run.process);
        if self.process.as_ref().map(Process::identity) != recorded.as_ref() {
            let live = layout::live_run(&self.dir).map(|run| run.process);
            let held = live.and_then(|identity| identity.hold().ok().flatten());
            self.process = held.map(Process::Found);
        }
    }

    pub(super) fn image(&self) -> Result<&BootImage> {
        image::of(&self.spec)
    }

    pub(super) fn file(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// Makes sure that nobody but the QEMU that is to be started answers, or has the disk: the last one may have been killed a
    /// moment ago.
    pub(super) async fn clear_way(&self) -> Result<()> {
        if let Some(last) = layout::read_run(&self.dir) {
            let gone = timeout(ENDS, last.process.let_go()).await;
            gone.unwrap_or(Ok(())).map_err(|error| Error::io("the last process cannot be looked at", error))?;
        }
        let of_the_last = [QMP, QMP_PROBE, ENDED].map(str::to_owned).into_iter().chain((0..LINES).map(line_socket));
        of_the_last.map(|name| self.file(&name)).try_for_each(|file| layout::remove(&file))
    }

    /// Starts QEMU. From here on `kill` finds it, whatever happens.
    pub(super) fn spawn(&mut self, begin: Begin<'_>, accelerator: &str, program: &Path) -> Result<()> {
        let image = self.image()?.clone();
        image::check(&image)?;
        let output = File::create(self.file(OUTPUT))
            .map_err(|error| Error::io(format!("{} cannot be written", self.file(OUTPUT).display()), error))?;
        let errors = output.try_clone().map_err(|error| Error::io("a descriptor cannot be copied", error))?;
        let child = Command::new(program)
            .args(args(&self.id, &self.spec, &image, accelerator, begin, self.file(LAYER).exists()))
            .current_dir(&self.dir)
            .stdin(Stdio::null())
            .stdout(output)
            .stderr(errors)
            // Out of the terminal's reach: Ctrl-C is for whoever started us.
            .process_group(0)
            .kill_on_drop(false)
            .spawn()
            .map_err(|error| Error::io(format!("{} cannot be started", program.display()), error))?;
        let pid = child.id().unwrap_or_default();
        let identity = Identity::of(pid).map_err(|error| Error::io("the new process cannot be looked at", error))?;
        let Some(identity) = identity else {
            // It has ended already: the record is of nobody, and waiting for it tells how.
            let identity = Identity { pid, start_time: 0, boot_id: String::new() };
            self.process = Some(Process::Ours { child, identity });
            return Ok(());
        };
        self.process = Some(Process::Ours { child, identity: identity.clone() });
        let (accelerator, started) = (accelerator.to_owned(), started_now());
        layout::write_run(&self.dir, &Run { process: identity, accelerator, started, ready: false, waits: None })
    }

    pub(super) fn follow(&self, from: u64, console: ConsoleSinks) {
        if let Some(process) = &self.process {
            console::follow(&self.dir, process.identity().clone(), from, console);
        }
    }

    /// Ends the process now.
    pub(super) async fn end_process(&mut self) -> Result<()> {
        let failed = |error| Error::io("the machine's process cannot be killed", error);
        match &mut self.process {
            Some(Process::Ours { child, .. }) => {
                // Killing one that has ended is an error of the library, and none of ours.
                let _ = child.start_kill();
                child.wait().await.map_err(failed)?;
            }
            Some(Process::Found(held)) => {
                held.kill().map_err(failed)?;
                held.exited().await;
            }
            None => {}
        }
        self.process = None;
        Ok(())
    }

    pub(super) fn check_space(&self) -> Result<()> {
        self.check_space_for(self.spec.memory_mib)
    }

    pub(super) fn check_space_for(&self, needed: u64) -> Result<()> {
        let stat = rustix::fs::statvfs(&self.dir)
            .map_err(|error| Error::io(format!("{} cannot be looked at", self.dir.display()), error.into()))?;
        let free = stat.f_bavail.saturating_mul(stat.f_frsize) >> 20;
        // Its memory is a file. A guest whose memory the disk cannot hold is killed in the middle of its work.
        if free < needed {
            let message = format!("{free} MiB are free, and the machine's memory needs {needed} MiB");
            return Err(Error::new(ErrorKind::ResourceExhausted, message).hint(
                "free some space, give it less memory, or use another disk with --state-dir or VMKIT_STATE_DIR",
            ));
        }
        Ok(())
    }

    /// The template that this machine is to be forked from, if it is to be; made when there is none.
    pub(super) async fn template(&self, facts: &HostFacts, accelerator: &str) -> Result<Option<Template>> {
        if let Some(key) = &self.spec.snapshot {
            return self.qemu().snapshots()?.read(key).map(Some).ok_or_else(|| {
                Error::new(ErrorKind::NotFound, "what it was to be a copy of is not kept any more")
                    .hint("delete it, and fork the original again: `vmkit fork`")
            });
        }
        let TemplateUse::Fork(templates) = &self.templates else { return Ok(None) };
        let shape = Shape { image: self.image()?, spec: &self.spec, facts, accelerator };
        templates.ensure(shape, self.config.program.as_deref(), &[], false).await.map(Some)
    }

    pub(super) async fn facts(&self) -> Result<HostFacts> {
        let (dir, program) = (self.layout.dir.clone(), self.config.program.clone());
        let found = tokio::task::spawn_blocking(move || HostFacts::find(&dir, program.as_deref()));
        found.await.map_err(|error| Error::new(ErrorKind::Backend, "looking for QEMU failed").caused_by(error))?
    }

    /// The saved execution's accelerator: it fits no other.
    pub(super) fn saved_accelerator(&self, facts: &HostFacts) -> Result<String> {
        let Some(run) = layout::read_run(&self.dir) else {
            let error = Error::new(ErrorKind::Corrupt, "the record of the suspended machine's process is damaged");
            return Err(error.hint(DISCARD));
        };
        let wanted = match self.config.accelerator {
            Accelerator::Auto if run.accelerator == "kvm" => facts.accelerator(Accelerator::Kvm)?,
            Accelerator::Auto => "tcg",
            named => facts.accelerator(named)?,
        };
        if wanted != run.accelerator {
            let message = format!("it was suspended under {} and cannot go on under {wanted}", run.accelerator);
            return Err(Error::new(ErrorKind::Unsupported, message).hint("resume it with the accelerator `auto`"));
        }
        Ok(run.accelerator)
    }

    pub(super) async fn ask_agent<T>(
        &self,
        call: impl AsyncFnOnce(Client) -> Result<T, vmkit_agent::client::AgentError>,
    ) -> Result<T> {
        let asked = async { call(self.line.client().await?).await.map_err(translate) };
        match timeout(AGENT_ANSWERS, asked).await {
            Ok(answer) => answer,
            Err(_) => {
                Err(Error::new(ErrorKind::Agent, format!("the guest's agent did not answer within {AGENT_ANSWERS:?}")))
            }
        }
    }

    pub(super) fn note_fork(&mut self) -> Result<()> {
        let Some(lock) = &self.lock else {
            return Err(Error::new(ErrorKind::Backend, "the machine's lock is not held"));
        };
        lock.note_fork().map_err(|error| Error::io("the machine's lock cannot be written", error))?;
        self.forking = true;
        Ok(())
    }

    pub(super) fn note_forked(&mut self) -> Result<()> {
        self.forking = false;
        let noted = self.lock.as_ref().map_or(Ok(()), |lock| lock.note(None));
        noted.map_err(|error| Error::io("the machine's lock cannot be written", error))
    }

    fn sweep_memory(&self) {
        layout::sweep_memory(&self.dir);
    }
}

impl Driver for QemuDriver {
    async fn begin(&mut self, action: Action) -> Result<Option<Fact>> {
        let taken = Lock::take(&self.layout.lock(&self.id), action).await?;
        if let Some(left) = taken.left {
            debug!(id = %self.id, %left, "clearing up after a process that died");
            recover::recover(&self.layout, &self.id, left).await?;
        }
        taken.lock.note(Some(action)).map_err(|error| Error::io("the machine's lock cannot be written", error))?;
        self.lock = Some(taken.lock);
        self.refresh();
        Ok(Some(layout::look(&self.dir)))
    }

    fn end(&mut self) {
        if let Some(lock) = self.lock.take() {
            if std::mem::take(&mut self.forking) {
                // Cut off half way: what the lock says stays.
                return;
            }
            self.sweep_memory();
            // What is there and is not ours needs no lock of ours.
            lock.release(!layout::is_ours(&self.dir));
        }
    }

    async fn clone_source(&mut self) -> Result<()> {
        let image = self.image()?.clone();
        image::check(&image)?;
        let (staging, dir) = (self.layout.staging(&self.id), self.dir.clone());
        let foreign = || {
            Error::new(ErrorKind::AlreadyExists, format!("{} exists", dir.display()))
                .hint("choose another name, or delete what is there")
        };
        if dir.symlink_metadata().is_ok() {
            return Err(foreign());
        }
        layout::remove_tree(&staging)?;
        layout::make_dir(&staging)?;
        if let Some(base) = &image.disk {
            let size = fs::metadata(base)
                .map_err(|error| Error::io(format!("{} cannot be read", base.display()), error))?
                .len();
            let disk = staging.join(DISK);
            let written = File::create(&disk).and_then(|file| {
                qcow2::write_overlay(&file, Base::Raw(base), size)?;
                file.sync_all()
            });
            written.map_err(|error| Error::io(format!("{} cannot be written", disk.display()), error))?;
        }
        let fresh = staging.join(FRESH);
        File::create(&fresh).map_err(|error| Error::io(format!("{} cannot be written", fresh.display()), error))?;
        layout::write_record(&staging, &self.spec)?;
        layout::sync(&staging)?;
        match renameat_with(CWD, &staging, CWD, &dir, RenameFlags::NOREPLACE) {
            Ok(()) => layout::sync(&self.layout.dir),
            Err(rustix::io::Errno::EXIST) => {
                layout::remove_tree(&staging)?;
                Err(foreign())
            }
            Err(error) => Err(Error::io(format!("{} cannot be made", dir.display()), error.into())),
        }
    }

    async fn boot(&mut self, console: ConsoleSinks) -> Result<()> {
        let facts = self.facts().await?;
        let accelerator = facts.accelerator(self.config.accelerator)?;
        image::check(self.image()?)?;
        SAVED.iter().try_for_each(|stale| layout::remove(&self.file(stale)))?;
        let mut laps = Laps::new();
        let mut note = None;
        let unused = self.file(FRESH).exists();
        if unused {
            match self.template(&facts, accelerator).await {
                Ok(Some(template)) => {
                    laps.lap("template");
                    return self.fork(&template, &facts.program, laps, console).await;
                }
                Ok(None) => {}
                Err(error) if self.spec.snapshot.is_some() => return Err(error),
                Err(error) => {
                    let id = &self.id;
                    warn!(%id, error = &error as &dyn StdError, "booting, because no template could be made");
                    note = Some(error.to_string());
                }
            }
            self.leave_layer()?;
        }
        // One that waits for a template that is no more, and memory that was a copy of it.
        self.end_process().await?;
        layout::remove(&self.file(MEMORY))?;
        self.check_space()?;
        self.clear_way().await?;
        // What its console said last time is not what it says now.
        layout::remove(&self.file(SERIAL))?;
        layout::remove(&self.file(FRESH))?;
        self.spawn(Begin::Boot, accelerator, &facts.program)?;
        laps.lap("process");
        self.follow(0, console);
        let line = self.line.clone();
        self.until(0, async { line.first(line.wire().await?).await }).await?;
        laps.lap("boot");
        layout::write_birth(&self.dir, &Birth { note, unused, ..laps.birth(Origin::Boot, None) });
        layout::mark_ready(&self.dir)
    }

    async fn resume(&mut self, console: ConsoleSinks, spent: &Spent) -> Result<()> {
        let mut laps = Laps::new();
        let facts = self.facts().await?;
        let accelerator = self.saved_accelerator(&facts)?;
        let (_, state, memory) = self.spawn_to_resume(&accelerator, &facts.program).await?;
        let from = self.said();
        self.follow(from, console);
        laps.lap("process");
        let (dir, line) = (self.dir.clone(), self.line.clone());
        let load = async {
            let mut qmp = Qmp::when_up(&dir).await?;
            // Connected when it was saved, connected when it is loaded: the guest is spared the news of both.
            let wire = line.wire().await?;
            laps.lap("control");
            qmp.load(Path::new(state), memory).await?;
            laps.lap("load");
            Ok((qmp, wire))
        };
        let (mut qmp, wire) = self.until(from, load).await.map_err(|error| match error.kind() {
            ErrorKind::TimedOut => error,
            _ if exit::is_killed(&error) => error,
            _ => error.hint(format!("its saved execution is damaged, or from another QEMU: {DISCARD}")),
        })?;
        // Spent before the guest goes on: memory that a guest has gone on from no longer fits it.
        spent.set();
        layout::rename(&self.file(state), &self.file(STATE_SPENT))?;
        if self.config.durable {
            layout::sync(&self.dir)?;
        }
        let line = self.line.clone();
        let goes_on = async {
            let since = SystemTime::now();
            qmp.cont().await?;
            // Its clock stood still: before anybody executes anything, it is right again.
            line.renewed(&mut qmp, wire, since, None).await
        };
        self.until(from, goes_on).await.map_err(|error| error.hint(SPENT))?;
        laps.lap("renewal");
        layout::mark_ready(&self.dir)?;
        layout::remove(&self.file(STATE_SPENT))
    }

    async fn suspend(&mut self) -> Result<()> {
        let saved = self.save_and_end().await;
        if let Err(error) = &saved
            && error.kind() == ErrorKind::Exited
        {
            self.line.forget();
            self.end_process().await?;
            // For whoever looks later, too.
            layout::write_ended(&self.dir, "a suspend of it failed", error);
        }
        saved
    }

    async fn prespawn(&mut self) -> Result<()> {
        self.begin_waiting().await
    }

    async fn snapshot(&mut self) -> Result<Snapshot> {
        self.take_snapshot().await
    }

    async fn shutdown(&mut self) -> Result<()> {
        let Err(error) = self.ask_agent(async |agent| agent.shutdown().await).await else { return Ok(()) };
        debug!(id = %self.id, %error, "the agent does not shut down: pressing the power button");
        Qmp::connect(&self.dir, QMP).await?.power_button().await
    }

    async fn kill(&mut self) -> Result<()> {
        self.line.forget();
        self.end_process().await?;
        // Also one that another process has started meanwhile.
        self.refresh();
        self.end_process().await?;
        if self.lock.is_none() || layout::read_run(&self.dir).is_none() {
            // Past a holder of the lock, who may stand still between starting a process and recording it.
            recover::kill_all(&self.dir).await?;
        }
        // Past a holder of the lock, what looks like nobody's may be his; whoever looks next sees to it.
        if self.lock.is_some() {
            self.sweep_memory();
        }
        Ok(())
    }

    async fn destroy(&mut self) -> Result<()> {
        self.line.forget();
        if self.dir.symlink_metadata().is_ok() {
            if !layout::is_ours(&self.dir) {
                return Err(Error::new(
                    ErrorKind::AlreadyExists,
                    format!("{} was not made by vmkit", self.dir.display()),
                )
                .hint("look at it and remove it by hand"));
            }
            self.refresh();
            self.end_process().await?;
            if layout::read_run(&self.dir).is_none() {
                // No record of a process does not mean that there is none.
                recover::kill_all(&self.dir).await?;
            }
            [STATE, STATE_APART, STATE_FULL].iter().try_for_each(|state| layout::remove(&self.file(state)))?;
            let trash = self.layout.trash(&self.id);
            layout::remove_tree(&trash)?;
            layout::rename(&self.dir, &trash)?;
        }
        layout::remove_tree(&self.layout.staging(&self.id))?;
        layout::remove_tree(&self.layout.trash(&self.id))
    }

    async fn inspect(&mut self) -> Result<Fact> {
        Ok(layout::look(&self.dir))
    }

    async fn state(&mut self) -> Result<State> {
        self.qemu().state(&self.id).await
    }

    async fn exited(&mut self) -> Exit {
        self.gone().await
    }

    fn guest(&self) -> Option<Guest> {
        Some(self.line.clone())
    }

    fn probe(&self) -> Arc<dyn Probe> {
        Arc::new(QemuProbe(self.dir.clone()))
    }

    fn suspendable(&self) -> bool {
        true
    }
}
