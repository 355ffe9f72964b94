//! The state directory and what is in it.

use std::cell::Cell;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use vmkit::{BootImage, Error, ErrorKind, Host, Id, Instance, Result, Spec};
use vmkit_backends::qemu::{Qemu, QemuConfig};
use vmkit_image::{Agent, Cancel, Hold, Progress, Store};

use crate::args::Args;
use crate::output::Output;
use crate::{owner, signals};

/// What takes no longer is not worth a word.
const MOMENT: Duration = Duration::from_millis(700);
const TICK: Duration = Duration::from_millis(100);

/// What commands work on.
pub struct Context {
    pub dir: PathBuf,
    pub host: Host<Qemu>,
    pub output: Output,
    /// Whether fresh machines are forks of templates.
    templates: bool,
}

impl Context {
    /// Opens the state directory, and clears up after `run`s that died.
    pub async fn open(args: &Args, output: &Output) -> Result<Context> {
        let context = Context::open_without_sweep(args, output)?;
        owner::sweep(&context).await;
        Ok(context)
    }

    /// For what is about templates, whether machines are to be forks of them or not.
    pub fn with_templates(args: &Args, output: &Output) -> Result<Context> {
        Context::new(args, output, true)
    }

    pub fn open_without_sweep(args: &Args, output: &Output) -> Result<Context> {
        Context::new(args, output, !args.no_template)
    }

    fn new(args: &Args, output: &Output, templates: bool) -> Result<Context> {
        let dir = state_dir(args)?;
        let mut config = QemuConfig::new(dir.join("vms"));
        config.accelerator = args.accel;
        config.templates = templates.then(|| dir.join("images/templates"));
        let host = Host::new(Qemu::new(config).map_err(unusable)?);
        Ok(Context { dir, host, output: *output, templates })
    }

    pub fn qemu(&self) -> &Qemu {
        self.host.provider()
    }

    /// The image store.
    pub fn images(&self) -> Result<Store> {
        Store::open(self.dir.join("images")).map_err(unusable)
    }

    /// A machine that is there.
    pub async fn machine(&self, id: &Id) -> Result<Instance> {
        self.host.adopt(id).await
    }

    /// The image of a name, made when it is a built-in one, and a hold on it until a machine refers to it.
    pub async fn image(&self, name: &str) -> Result<(BootImage, Hold)> {
        let (store, name) = (self.images()?, name.to_owned());
        let agent = agent()?;
        self.blocking(move |cancel, progress| {
            let hold = store.hold()?;
            store.ensure(&name, &agent, cancel, progress).map(|image| (image, hold))
        })
        .await
    }

    /// Makes the template that a machine's start is about to need, and shows that: a start that takes a boot's time once is to be
    /// told from one that always does. Where none can be made, the start says why.
    pub async fn template(&self, id: &Id, spec: &Spec) {
        if self.templates
            && self.qemu().is_fresh(id)
            && self.qemu().template_for(spec).is_ok_and(|found| found.is_none())
        {
            let what = format!("{}, {} CPUs, {} MiB; once", spec.source.name(), spec.cpus, spec.memory_mib);
            let _busy = Busy::new(&self.output, "making a template", what);
            let _ = self.qemu().build_template(spec, &[], false).await;
        }
    }

    /// Removes what there is of a template whose making was given up. What cannot be removed now, the next command removes.
    pub async fn half_made(&self) {
        let _ = self.qemu().sweep_templates().await;
    }

    /// Does what blocks, with its progress shown; Ctrl-C cancels it.
    pub async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Cancel, &dyn Fn(Progress<'_>)) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let cancel = Arc::new(Cancel::new());
        let bar = Bar::new(self.output);
        let job = tokio::task::spawn_blocking({
            let cancel = cancel.clone();
            move || {
                let outcome = work(&cancel, &|progress| bar.show(&progress));
                bar.bar.finish_and_clear();
                outcome
            }
        });
        tokio::pin!(job);
        let ended = tokio::select! {
            ended = &mut job => ended,
            _ = signals::asked_to_end() => {
                cancel.cancel();
                job.await
            }
        };
        ended.map_err(|error| Error::new(ErrorKind::Panicked, "a background task failed").caused_by(error))?
    }
}

/// A spinner on a terminal, a line for each phase elsewhere. Nothing for what takes no time.
struct Bar {
    bar: ProgressBar,
    output: Output,
    phase: Cell<Option<vmkit_image::Phase>>,
    since: Instant,
}

impl Bar {
    fn new(output: Output) -> Bar {
        Bar { bar: spinner(&output), output, phase: Cell::new(None), since: Instant::now() }
    }

    fn show(&self, progress: &Progress<'_>) {
        self.bar.enable_steady_tick(TICK);
        self.bar.set_prefix(progress.phase.to_string());
        self.bar.set_message(progress.detail.to_owned());
        let new = self.phase.get() != Some(progress.phase);
        if new && self.bar.is_hidden() && self.since.elapsed() > MOMENT {
            self.phase.set(Some(progress.phase));
            self.output.note(format!("image: {}: {}", progress.phase, progress.detail));
        }
    }
}

fn spinner(output: &Output) -> ProgressBar {
    if output.quiet || output.json {
        return ProgressBar::hidden();
    }
    let bar = ProgressBar::new_spinner();
    match ProgressStyle::with_template("{spinner} {prefix}: {wide_msg} {elapsed}") {
        Ok(style) => bar.with_style(style),
        Err(_) => bar,
    }
}

/// Says on a terminal what is being waited for, once that takes longer than a moment; says no more when dropped.
pub struct Busy {
    bar: ProgressBar,
    late: tokio::task::JoinHandle<()>,
}

impl Busy {
    pub fn new(output: &Output, doing: &'static str, what: impl ToString) -> Busy {
        let bar = spinner(output).with_prefix(doing).with_message(what.to_string());
        let late = tokio::spawn({
            let bar = bar.clone();
            async move {
                tokio::time::sleep(MOMENT).await;
                bar.enable_steady_tick(TICK);
            }
        });
        Busy { bar, late }
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.late.abort();
        self.bar.finish_and_clear();
    }
}

/// The agent for images: beside this program, or where `VMKIT_AGENT` says.
pub fn agent() -> Result<Agent> {
    Agent::find(format!("protocol {}", vmkit_agent::link::VERSION))
}

/// The directory for machines and images.
pub fn state_dir(args: &Args) -> Result<PathBuf> {
    if args.state_dir.as_ref().is_some_and(|dir| dir.is_empty()) {
        // Mostly a variable that is not set: the machines of another directory are not what is meant.
        return Err(Error::new(ErrorKind::InvalidArgument, "the state directory has no name")
            .hint("give --state-dir a directory, or leave it out"));
    }
    // An empty variable is as good as none.
    let variable = std::env::var_os("VMKIT_STATE_DIR").filter(|dir| !dir.is_empty());
    if let Some(dir) = args.state_dir.clone().or(variable) {
        let dir = Path::new(&dir);
        return std::path::absolute(dir).map_err(|error| Error::io(format!("{} cannot be read", dir.display()), error));
    }
    // The XDG rules: only an absolute path counts.
    let from = |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let state = from("XDG_STATE_HOME").or_else(|| from("HOME").map(|home| home.join(".local/state")));
    match state {
        Some(state) => Ok(state.join("vmkit")),
        None => Err(Error::new(ErrorKind::InvalidArgument, "neither XDG_STATE_HOME nor HOME is set")
            .hint("say where to keep machines and images: --state-dir DIR, or VMKIT_STATE_DIR")),
    }
}

fn unusable(error: Error) -> Error {
    const NEXT: &str = "use another directory: --state-dir DIR, or VMKIT_STATE_DIR";
    match (error.next_step(), error.kind()) {
        (Some(_), _) => error,
        // No machine is meant, which is what a caller would take it for.
        (None, ErrorKind::NotFound) => {
            let why = std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default();
            Error::new(ErrorKind::InvalidArgument, error.message()).caused_by(why).hint(NEXT)
        }
        (None, _) => error.hint(NEXT),
    }
}
