//! vmkit's own figures: the library's, as a program has them that uses it.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::io::AsyncWriteExt;
use tokio::runtime::{Builder, Runtime};
use vmkit::pool::{Pool, PoolBuilder, Staging};
use vmkit::{
    BootImage, ConsoleSinks, Error as VmkitError, ErrorKind, Host, Id, Instance, Source, Spec, State, cleanup,
};
use vmkit_backends::qemu::{Accelerator, Qemu, QemuConfig};

use crate::error::{Error, Result};
use crate::samples::{Samples, ms};
use crate::session::Tell;
use crate::stop::Stop;

/// Short measurements are made this often in each round.
pub(crate) const REPEATS: usize = 3;
/// How many answers make a guest warm.
pub(crate) const WARM: usize = 5;
/// The same process as the floor's.
pub(crate) const PROCESS: (&[&str], &str) = (&["/bin/busybox", "uname"], "Linux");
/// How often it is looked whether a pool is full.
pub(crate) const FILLS: Duration = Duration::from_millis(20);
/// How often, when what is measured begins as soon as it is.
const AT_ONCE: Duration = Duration::from_millis(1);
/// The machines of a pool whose machines run.
const RUNNING: usize = 2;
/// How long removing a machine may take.
pub(crate) const CLEANUP: Duration = Duration::from_secs(60);

/// The measurements, and the machines they are made on. All machines are removed when it is dropped.
pub struct Ours {
    pub(crate) runtime: Runtime,
    pub(crate) stop: Stop,
    pub(crate) tell: Arc<dyn Tell>,
    /// Its fresh machines are forks of templates.
    pub(crate) forks: Host<Qemu>,
    /// Suspends by writing files, as the floor does.
    host: Host<Qemu>,
    /// Suspends by writing through to the disk, as `vmkit` does.
    durable: Host<Qemu>,
    pub(crate) spec: Spec,
    pub(crate) made: u32,
    /// The machine of this round, suspended: it costs no processor time while the floor has its turn.
    parked: Option<Id>,
}

impl Ours {
    /// What [`boot`](Ours::boot) measures.
    pub const BOOT: &[&str] = &["clone", "cold_boot", "out_mib_s", "in_mib_s"];
    /// What [`warm`](Ours::warm) is for.
    pub const WARM: &[&str] = &["exec_warm", "process_warm"];
    /// What [`suspend`](Ours::suspend) measures.
    pub const SUSPEND: &[&str] = &["suspend", "suspend_fsync", "resume", "resume_process", "delete"];

    /// What [`running`](Ours::running) measures.
    pub const RUNNING: &[&str] = &["acquire_running", "acquire_running_rested"];
    /// What [`off`](Ours::off) measures.
    pub const OFF: &[&str] = &[
        "acquire_suspended",
        "acquire_suspended_prespawned",
        "acquire_stopped",
        "acquire_stopped_prespawned",
        "waiting_mib",
    ];

    /// Machines in `dir`, made from `image`, and forks of templates in `templates`.
    ///
    /// # Errors
    /// When `dir` cannot be used, or QEMU is missing.
    pub fn new(
        dir: &Path,
        templates: &Path,
        image: BootImage,
        memory_mib: u64,
        accelerator: Accelerator,
        stop: Stop,
        tell: Arc<dyn Tell>,
    ) -> Result<Ours> {
        // As the command has it.
        let runtime = Builder::new_current_thread().enable_all().build();
        let runtime = runtime.map_err(|error| VmkitError::io("the runtime cannot be started", error))?;
        let config = QemuConfig { accelerator, durable: false, ..QemuConfig::new(dir) };
        let durable = QemuConfig { durable: true, ..config.clone() };
        let forks = QemuConfig { templates: Some(templates.to_owned()), ..config.clone() };
        let [host, durable, forks] = [config, durable, forks].map(|config| Qemu::new(config).map(Host::new));
        let spec = Spec::new(Source::Boot(image)).memory_mib(memory_mib);
        Ok(Ours { runtime, stop, tell, forks: forks?, host: host?, durable: durable?, spec, made: 0, parked: None })
    }

    /// QEMU's program, and whether guests execute with KVM.
    ///
    /// # Errors
    /// When QEMU is missing, or an accelerator that was asked for by name does not work.
    pub fn qemu(&self, accelerator: Accelerator) -> Result<(PathBuf, bool)> {
        let facts = self.host.provider().host_facts()?;
        let kvm = facts.accelerator(accelerator)? == "kvm";
        Ok((facts.program, kvm))
    }

    /// A machine's way from nothing to a process's answer, and its output; it is parked at the end.
    ///
    /// # Errors
    /// When vmkit fails, or on an interruption.
    pub fn boot(&mut self, samples: &mut Samples) -> Result<()> {
        self.discard()?;
        self.made += 1;
        let id = Id::new(format!("bench-{}", self.made))?;
        let (host, spec) = (&self.host, &self.spec);
        let measure = async {
            let clock = Instant::now();
            let vm = host.create(id.clone(), spec.clone()).await?;
            vm.clone_source().await?;
            samples.add("clone", ms(clock.elapsed()));
            vm.start(ConsoleSinks::discard()).await?;
            say(&vm, &["echo", "hello"], "hello").await?;
            samples.add("cold_boot", ms(clock.elapsed()));
            let clock = Instant::now();
            let zeros = vm.command("dd").args(["if=/dev/zero", "bs=64k", "count=1024"]).output().await?.stdout;
            samples.add("out_mib_s", zeros.len() as f64 / f64::from(1 << 20) / clock.elapsed().as_secs_f64());
            let clock = Instant::now();
            feed(&vm, &zeros).await?;
            samples.add("in_mib_s", zeros.len() as f64 / f64::from(1 << 20) / clock.elapsed().as_secs_f64());
            vm.suspend().await
        };
        run(&self.runtime, &self.stop, measure)?;
        self.parked = Some(id);
        Ok(())
    }

    /// The machine that is parked, running and warm: what it does now it does as fast as ever. Parked again by
    /// [`park`](Ours::park).
    ///
    /// # Errors
    /// As [`boot`](Ours::boot).
    pub fn warm(&mut self, samples: &mut Samples) -> Result<Instance> {
        if self.parked.is_none() {
            self.boot(samples)?;
        }
        let Some(id) = self.parked.clone() else { return Err(Error::Interrupted) };
        let start = async {
            let vm = self.host.adopt(&id).await?;
            vm.start(ConsoleSinks::discard()).await?;
            Ok(vm)
        };
        let vm = run(&self.runtime, &self.stop, start)?;
        for _ in 0..WARM {
            self.process(&vm)?;
            self.ping(&vm)?;
        }
        Ok(vm)
    }

    /// Parks the machine that [`warm`](Ours::warm) gave.
    ///
    /// # Errors
    /// As [`boot`](Ours::boot).
    pub fn park(&self, vm: Instance) -> Result<()> {
        run(&self.runtime, &self.stop, async { vm.suspend().await })
    }

    /// How long a process's answer takes, in milliseconds.
    ///
    /// # Errors
    /// As [`boot`](Ours::boot).
    pub fn process(&self, vm: &Instance) -> Result<f64> {
        let clock = Instant::now();
        run(&self.runtime, &self.stop, say(vm, PROCESS.0, PROCESS.1))?;
        Ok(ms(clock.elapsed()))
    }

    /// How long the agent's own answer takes, in milliseconds.
    ///
    /// # Errors
    /// As [`boot`](Ours::boot).
    pub fn ping(&self, vm: &Instance) -> Result<f64> {
        let clock = Instant::now();
        run(&self.runtime, &self.stop, async { vm.ping().await })?;
        Ok(ms(clock.elapsed()))
    }

    /// Suspends and resumes of the machine that is parked; it is deleted at the end.
    ///
    /// # Errors
    /// As [`boot`](Ours::boot).
    pub fn suspend(&mut self, samples: &mut Samples) -> Result<()> {
        if self.parked.is_none() {
            self.boot(samples)?;
        }
        let Some(id) = self.parked.clone() else { return Ok(()) };
        let (host, durable) = (&self.host, &self.durable);
        let measure = async {
            let (vm, through) = (host.adopt(&id).await?, durable.adopt(&id).await?);
            // As the floor's: the guest has answered a question since it went on, and executed nothing.
            for _ in 0..REPEATS {
                let clock = Instant::now();
                // Which returns when the agent has answered.
                vm.start(ConsoleSinks::discard()).await?;
                samples.add("resume", ms(clock.elapsed()));
                vm.ping().await?;
                let clock = Instant::now();
                vm.suspend().await?;
                samples.add("suspend", ms(clock.elapsed()));
            }
            for _ in 0..REPEATS {
                let clock = Instant::now();
                through.start(ConsoleSinks::discard()).await?;
                say(&through, PROCESS.0, PROCESS.1).await?;
                samples.add("resume_process", ms(clock.elapsed()));
                let clock = Instant::now();
                through.suspend().await?;
                samples.add("suspend_fsync", ms(clock.elapsed()));
            }
            vm.start(ConsoleSinks::discard()).await?;
            let clock = Instant::now();
            vm.kill().await.stopped()?;
            vm.delete().await?;
            samples.add("delete", ms(clock.elapsed()));
            Ok(())
        };
        run(&self.runtime, &self.stop, measure)?;
        self.parked = None;
        Ok(())
    }

    /// Acquires from a running, warm pool, each time as soon as it is full again, and each time when all has rested for `rest` too.
    /// `beside` is called after each answer.
    ///
    /// # Errors
    /// As [`boot`](Ours::boot), and those of `beside`.
    pub fn running(&self, samples: &mut Samples, rest: Duration, mut beside: impl FnMut() -> Result<()>) -> Result<()> {
        let pool = self.pool_of("running", RUNNING).staging(Staging::Running);
        // As warm as the floor's.
        let pool = pool.ready_command(PROCESS.0.iter().copied()).ready_runs(WARM).build()?;
        let mut measured = run(&self.runtime, &self.stop, pool.start());
        for (name, rest) in [("acquire_running", None), ("acquire_running_rested", Some(rest))].repeat(2 * REPEATS) {
            if measured.is_err() {
                break;
            }
            let acquire = async {
                // A rest of its own is not measured where none is to be.
                fill(&pool, RUNNING, AT_ONCE).await;
                if let Some(rest) = rest {
                    tokio::time::sleep(rest).await;
                }
                let clock = Instant::now();
                let lease = pool.acquire().await?;
                say(&lease, PROCESS.0, PROCESS.1).await?;
                Ok((lease, ms(clock.elapsed())))
            };
            measured = run(&self.runtime, &self.stop, acquire).and_then(|(lease, took)| {
                samples.add(name, took);
                beside()?;
                Ok(self.runtime.block_on(lease.delete())?)
            });
        }
        self.runtime.block_on(pool.close(CLEANUP)).into_result()?;
        measured
    }

    /// Acquires from a full pool of machines that do not run; every machine is deleted at the end. All are held until then, so that no
    /// measurement has a replacement beside it.
    ///
    /// # Errors
    /// As [`boot`](Ours::boot).
    pub fn off(&self, staging: Staging, prespawn: bool, samples: &mut Samples) -> Result<()> {
        let (name, size) = match (staging, prespawn) {
            (Staging::Suspended, false) => ("acquire_suspended", REPEATS),
            (Staging::Suspended, true) => ("acquire_suspended_prespawned", REPEATS),
            (_, false) => ("acquire_stopped", 1),
            (_, true) => ("acquire_stopped_prespawned", 1),
        };
        let pool = self.pool_of("off", size).staging(staging).prespawn(prespawn).build()?;
        let mut held = Vec::new();
        let measure = async {
            pool.start().await?;
            fill(&pool, size, FILLS).await;
            if prespawn {
                let found = self.forks.list().await?;
                let waiting = found.iter().filter(|found| !matches!(found.state, State::Running));
                for own in waiting.filter_map(|found| found.properties.memory_used) {
                    samples.add("waiting_mib", own as f64 / f64::from(1 << 20));
                }
            }
            while held.len() < size {
                let clock = Instant::now();
                let lease = pool.acquire().await?;
                say(&lease, PROCESS.0, PROCESS.1).await?;
                samples.add(name, ms(clock.elapsed()));
                held.push(lease);
            }
            Ok(())
        };
        let measured = run(&self.runtime, &self.stop, measure);
        self.runtime.block_on(async { drop(held) });
        self.runtime.block_on(pool.close(CLEANUP)).into_result()?;
        measured
    }

    fn pool_of(&self, name: &str, size: usize) -> PoolBuilder {
        Pool::builder(self.forks.clone(), self.spec.clone()).name(name).size(size).create_concurrency(1)
    }

    /// Removes the machine that is parked, if there is one.
    ///
    /// # Errors
    /// When it cannot be removed.
    pub fn discard(&mut self) -> Result<()> {
        match self.parked.take() {
            Some(id) => Ok(self.runtime.block_on(remove(&self.host, &id))?),
            None => Ok(()),
        }
    }

    /// The machines that are there, whoever made them.
    ///
    /// # Errors
    /// When the directory cannot be read.
    pub fn machines(&self) -> Result<Vec<Id>> {
        let found = self.runtime.block_on(self.host.list())?;
        Ok(found.into_iter().map(|machine| machine.id).collect())
    }

    /// Carries out what is not the library's, on its runtime.
    ///
    /// # Errors
    /// As what is carried out.
    pub fn block_on<T>(&self, work: impl Future<Output = Result<T>>) -> Result<T> {
        self.runtime.block_on(work)
    }
}

impl Drop for Ours {
    fn drop(&mut self) {
        // Also after an error, an interruption or a panic: no machine outlives the bench. The directory is ours alone, so
        // everything in it is.
        let host = &self.host;
        let removed = self.runtime.block_on(async {
            for machine in host.list().await? {
                remove(host, &machine.id).await?;
            }
            Ok::<_, VmkitError>(())
        });
        if let Err(error) = removed {
            self.tell.warn(&format!("a machine could not be removed: {error}"));
        }
    }
}

pub(crate) async fn remove(host: &Host<Qemu>, id: &Id) -> vmkit::Result<()> {
    match host.adopt(id).await {
        Ok(vm) => cleanup(&vm, Duration::ZERO, CLEANUP).await,
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    }
}

/// Returns when so many machines are ready.
pub(crate) async fn fill(pool: &Pool, size: usize, looks: Duration) {
    while pool.status().await.counts.ready.sum() < size {
        tokio::time::sleep(looks).await;
    }
}

/// Carries out a measurement, unless somebody asks to end.
pub(crate) fn run<T>(runtime: &Runtime, stop: &Stop, measure: impl Future<Output = vmkit::Result<T>>) -> Result<T> {
    runtime.block_on(async {
        tokio::select! {
            biased;
            () = stop.raised() => Err(Error::Interrupted),
            measured = measure => Ok(measured?),
        }
    })
}

/// Bytes into a process, which has read them all when this returns.
async fn feed(vm: &Instance, bytes: &[u8]) -> vmkit::Result<()> {
    let mut child = vm.command("dd").args(["of=/dev/null", "bs=64k"]).stdin(true).spawn().await?;
    if let Some(stdin) = &mut child.stdin {
        stdin.write_all(bytes).await.map_err(|error| VmkitError::io("a process's input cannot be written", error))?;
    }
    match child.wait().await? {
        status if status.success() => Ok(()),
        status => Err(VmkitError::new(ErrorKind::Inconsistent, format!("a process that reads ended with {status}"))),
    }
}

/// A process, whose answer must be this one: else what is measured is not what it should be.
pub(crate) async fn say(vm: &Instance, words: &[&str], answer: &str) -> vmkit::Result<()> {
    let output = vm.command(words[0]).args(words[1..].iter().copied()).output().await?;
    match String::from_utf8_lossy(&output.stdout).trim() {
        said if said == answer && output.status.success() => Ok(()),
        _ => {
            let what = format!("{} did not answer as it should, and ended with {}", words[0], output.status);
            Err(VmkitError::new(ErrorKind::Inconsistent, what).on(vm.id().as_str()))
        }
    }
}
