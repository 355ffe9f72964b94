//! The floor: what bare QEMU costs on this machine, with nothing of vmkit in between.
//!
//! ```text
//!  boot ──▶ template: memory file + devices' state ──┬─ fork      memory copy on write, a builtin's answer
//!                                                    ├─ process   the same, a process's answer; then warm
//!                                                    ├─ disk      a memory file of its own: suspend, resume
//!                                                    └─ crowd     many at once: throughput, memory
//! ```
//!
//! Blocking code on the standard library, and no more around QEMU than a measurement needs: a control session, a guest whose
//! init is a shell on a port, and files. The guest is not vmkit's: no agent, no root disk, no tuned command line. What vmkit's
//! own figures have more than these, or less, is vmkit's.
//!
//! Every process is killed, and its directory removed, when its handle is dropped.

mod burst;
mod cpio;
mod guest;
mod qemu;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Instant;

pub use guest::Guest;
use qemu::{Begin, Memory, Qemu};

use crate::samples::{Samples, median, ms};

/// A command that the guest's shell executes itself.
const BUILTIN: &str = "true";
/// A command that is a process of its own, and what it prints.
const PROCESS: (&str, &str) = ("/bin/busybox uname", "Linux");
/// Short measurements are made this often in each round.
const REPEATS: usize = 3;
/// How many answers make a guest warm.
const WARM: usize = 5;
/// How often a warm guest is paused.
const PAUSES: usize = 20;
/// Throw-away machines in all, and at a time.
const CHURN: (usize, usize) = (16, 2);
/// Machines that are paused at once.
const PAUSED: usize = 5;

/// What went wrong with the floor.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Somebody asked to end.
    #[error("interrupted")]
    Interrupted,
    /// This program is not installed.
    #[error("{0} is not installed")]
    Missing(String),
    /// Something that is needed is not what it should be.
    #[error("{0}")]
    Setup(String),
    /// QEMU, or the guest in it, does not do what it should; with what they said.
    #[error("the floor: {0}")]
    Qemu(String),
    /// A file or a program cannot be used.
    #[error("{0}")]
    Io(String, #[source] std::io::Error),
}

impl Error {
    /// For `map_err`.
    fn io(what: impl Into<String>) -> impl FnOnce(std::io::Error) -> Error {
        let what = what.into();
        |error| Error::Io(what, error)
    }

    /// For `map_err` of a program's start.
    fn start(program: &str) -> impl FnOnce(std::io::Error) -> Error {
        move |error| match error.kind() {
            std::io::ErrorKind::NotFound => Error::Missing(program.into()),
            _ => Error::Io(format!("{program} cannot be started"), error),
        }
    }
}

/// `Result` with the floor's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

/// How the floor's machines are started.
#[derive(Debug)]
pub struct Config {
    /// QEMU.
    pub program: PathBuf,
    /// Whether guests execute with KVM, instead of with QEMU's translator.
    pub kvm: bool,
    /// The guest's memory.
    pub memory_mib: u64,
    /// What is booted.
    pub guest: Guest,
    /// A directory that is the floor's alone.
    pub dir: PathBuf,
    /// Once it is true, whatever waits gives up.
    pub interrupted: Arc<AtomicBool>,
    /// Numbers the machines.
    pub made: AtomicUsize,
}

impl Config {
    fn is_interrupted(&self) -> bool {
        self.interrupted.load(Ordering::Relaxed)
    }

    fn new_dir(&self) -> Result<PathBuf> {
        let dir = self.dir.join(format!("qemu-{}", self.made.fetch_add(1, Ordering::Relaxed)));
        fs::create_dir(&dir).map_err(Error::io(format!("{} cannot be made", dir.display())))?;
        Ok(dir)
    }
}

/// The measurements. Each is one turn of a round; those after [`boot`](Floor::boot) need what it leaves.
#[derive(Debug)]
pub struct Floor {
    config: Config,
    memory: PathBuf,
    state: PathBuf,
    /// Whether there is a template.
    booted: bool,
}

impl Floor {
    /// What [`boot`](Floor::boot) measures.
    pub const BOOT: &[&str] = &["qmp_ready", "cold_boot", "template_save", "out_mib_s"];
    /// What [`fork`](Floor::fork) measures.
    pub const FORK: &[&str] = &["fork_total", "fork_load"];
    /// What [`process`](Floor::process) measures.
    pub const PROCESS: &[&str] = &["fork_process", "resume_paused"];
    /// What [`warm`](Floor::warm) is for.
    pub const WARM: &[&str] = &["exec_warm", "process_warm"];
    /// What [`disk`](Floor::disk) measures.
    pub const DISK: &[&str] = &["suspend", "resume_disk", "resume_process"];
    /// What [`crowd`](Floor::crowd) measures.
    pub const CROWD: &[&str] = &["forks_per_s", "paused_unique_mib"];

    /// Nothing is started yet.
    pub fn new(config: Config) -> Floor {
        let (memory, state) = (config.dir.join("template.memory"), config.dir.join("template.state"));
        Floor { config, memory, state, booted: false }
    }

    /// A cold boot, the answers and the output of the guest it leads to; saved, it is the template of what follows.
    ///
    /// # Errors
    /// When QEMU or its guest fail, or on an interruption.
    pub fn boot(&mut self, samples: &mut Samples) -> Result<()> {
        self.booted = false;
        let _ = fs::remove_file(&self.memory);
        let mut vm = Qemu::start(&self.config, Memory { file: &self.memory, shared: true }, Begin::Boot)?;
        vm.wait_for_shell()?;
        samples.add("cold_boot", ms(vm.started.elapsed()));
        samples.add("qmp_ready", ms(vm.ready));
        vm.shell("KEPT=template")?;
        for _ in 0..REPEATS {
            let clock = Instant::now();
            let zeros = vm.shell("dd if=/dev/zero bs=64k count=1024 2>/dev/null")?;
            samples.add("out_mib_s", zeros.len() as f64 / f64::from(1 << 20) / clock.elapsed().as_secs_f64());
        }
        samples.add("template_save", ms(vm.save(&self.state)?));
        vm.quit()?;
        self.booted = true;
        Ok(())
    }

    /// Forks of the template, to the answer of a command that is no process.
    ///
    /// # Errors
    /// As [`boot`](Floor::boot).
    pub fn fork(&mut self, samples: &mut Samples) -> Result<()> {
        self.need_template(samples)?;
        for _ in 0..REPEATS {
            let mut vm = self.forked()?;
            vm.expect("echo $KEPT", "template")?;
            samples.add("fork_total", ms(vm.started.elapsed()));
            samples.add("fork_load", ms(vm.loading));
            vm.quit()?;
        }
        Ok(())
    }

    /// Forks of the template, to the answer of a process; then pauses of one that is warm.
    ///
    /// # Errors
    /// As [`boot`](Floor::boot).
    pub fn process(&mut self, samples: &mut Samples) -> Result<()> {
        self.need_template(samples)?;
        for repeat in 0..REPEATS {
            let mut vm = self.forked()?;
            vm.expect(PROCESS.0, PROCESS.1)?;
            samples.add("fork_process", ms(vm.started.elapsed()));
            if repeat + 1 == REPEATS {
                for _ in 0..WARM {
                    vm.shell(BUILTIN)?;
                }
                let mut resumed = Vec::new();
                for _ in 0..PAUSES {
                    vm.pause()?;
                    let clock = Instant::now();
                    vm.cont()?;
                    vm.shell(BUILTIN)?;
                    resumed.push(ms(clock.elapsed()));
                }
                samples.add("resume_paused", median(&resumed));
            }
            vm.quit()?;
        }
        Ok(())
    }

    /// A fork that is warm: what it does now it does as fast as ever.
    ///
    /// # Errors
    /// As [`boot`](Floor::boot).
    pub fn warm(&mut self, samples: &mut Samples) -> Result<Warm<'_>> {
        self.need_template(samples)?;
        let mut warm = Warm(self.forked()?);
        for _ in 0..WARM {
            warm.process()?;
            warm.builtin()?;
        }
        Ok(warm)
    }

    /// Suspends and resumes of a machine whose memory file is its own.
    ///
    /// # Errors
    /// As [`boot`](Floor::boot).
    pub fn disk(&mut self, samples: &mut Samples) -> Result<()> {
        self.need_template(samples)?;
        let (own, saved) = (self.config.dir.join("own.memory"), self.config.dir.join("own.state"));
        for repeat in 0..REPEATS {
            copy(&self.memory, &own)?;
            let memory = Memory { file: &own, shared: true };
            let kept = format!("kept{repeat}");
            let mut vm = Qemu::start(&self.config, memory, Begin::Load(&self.state))?;
            vm.shell(&format!("KEPT={kept}"))?;
            samples.add("suspend", ms(vm.save(&saved)?));
            vm.quit()?;
            let mut vm = Qemu::start(&self.config, memory, Begin::Load(&saved))?;
            vm.expect("echo $KEPT", &kept)?;
            samples.add("resume_disk", ms(vm.started.elapsed()));
            // Again, from memory that has seen a resume: this one is to answer with a process.
            vm.save(&saved)?;
            vm.quit()?;
            let mut vm = Qemu::start(&self.config, memory, Begin::Load(&saved))?;
            vm.expect(PROCESS.0, PROCESS.1)?;
            samples.add("resume_process", ms(vm.started.elapsed()));
            vm.quit()?;
        }
        Ok(())
    }

    /// How many throw-away machines a second, and the memory of many that wait.
    ///
    /// # Errors
    /// As [`boot`](Floor::boot).
    pub fn crowd(&mut self, samples: &mut Samples) -> Result<()> {
        self.need_template(samples)?;
        let clock = Instant::now();
        burst::at_a_time(CHURN.1, vec![(); CHURN.0], |()| {
            let mut vm = self.forked()?;
            vm.expect(PROCESS.0, PROCESS.1)?;
            vm.quit()
        })?;
        samples.add("forks_per_s", CHURN.0 as f64 / clock.elapsed().as_secs_f64());

        let mut crowd = Vec::new();
        for _ in 0..PAUSED {
            let mut vm = self.forked()?;
            vm.expect("echo $KEPT", "template")?;
            vm.pause()?;
            crowd.push(vm);
        }
        let own = crowd.iter().map(Qemu::own_memory_mib).collect::<Result<Vec<_>>>()?;
        samples.add("paused_unique_mib", median(&own));
        Ok(())
    }

    fn forked(&self) -> Result<Qemu<'_>> {
        Qemu::start(&self.config, Memory { file: &self.memory, shared: false }, Begin::Load(&self.state))
    }

    fn need_template(&mut self, samples: &mut Samples) -> Result<()> {
        if self.booted { Ok(()) } else { self.boot(samples) }
    }
}

/// A warm machine; ended when dropped.
#[derive(Debug)]
pub struct Warm<'a>(Qemu<'a>);

impl Warm<'_> {
    /// How long a process's answer takes, in milliseconds.
    ///
    /// # Errors
    /// As [`Floor::boot`].
    pub fn process(&mut self) -> Result<f64> {
        let clock = Instant::now();
        self.0.expect(PROCESS.0, PROCESS.1)?;
        Ok(ms(clock.elapsed()))
    }

    /// How long the shell's own answer takes, in milliseconds.
    ///
    /// # Errors
    /// As [`Floor::boot`].
    pub fn builtin(&mut self) -> Result<f64> {
        let clock = Instant::now();
        self.0.shell(BUILTIN)?;
        Ok(ms(clock.elapsed()))
    }
}

/// A copy of a memory file, shared with it where the file system can do that.
fn copy(from: &Path, to: &Path) -> Result<()> {
    let _ = fs::remove_file(to);
    let status = Command::new("cp").args(["--sparse=always", "--reflink=auto"]).arg(from).arg(to).status();
    match status.map_err(Error::start("cp"))?.success() {
        true => Ok(()),
        false => Err(Error::Setup(format!("{} cannot be copied", from.display()))),
    }
}
