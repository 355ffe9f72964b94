//! One run: everything is set up, rounds are measured, everything is removed.

use std::os::unix::fs::symlink;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::thread;
use std::time::Duration;

use vmkit::Error as VmkitError;
use vmkit::pool::Staging;
use vmkit_backends::qemu::Accelerator;
use vmkit_image::{Agent, Hold, Store};

use crate::commands::Commands;
use crate::density::{Crowds, FEW};
use crate::error::{Error, Result};
use crate::figures::Wanted;
use crate::floor::{Config, Floor, Guest};
use crate::ours::Ours;
use crate::place::Place;
use crate::report::Report;
use crate::stop::Stop;

/// The memory of every guest, ours and the floor's.
const MEMORY_MIB: u64 = 256;
/// How often warm machines answer in a round.
const WARM: usize = 25;
/// How often the floor's answers before each acquire: the first time its memory is not in the processor's caches, as that of a
/// machine that waits in a pool never is.
const BESIDE: usize = 5;
/// How often the floor's machine answers after a rest.
const RESTED: usize = 10;
/// How long it rests. One that was asked a moment ago answers sooner than one that waits in a pool.
const RESTS: Duration = Duration::from_millis(250);
/// What pools of machines that do not run are like, and whether processes wait for those.
const OFF: [(Staging, bool); 4] =
    [(Staging::Suspended, false), (Staging::Suspended, true), (Staging::Stopped, false), (Staging::Stopped, true)];

/// What is to be done in a run.
#[derive(Clone)]
pub struct Plan {
    /// How many rounds.
    pub runs: u32,
    /// Which figures.
    pub wanted: Wanted,
    /// How guests execute.
    pub accelerator: Accelerator,
    /// The state directory: images are kept there, and while it lasts a directory of the run's own.
    pub state_dir: PathBuf,
    /// Who hears how far it is.
    pub tell: Arc<dyn Tell>,
}

/// Who hears how far a run is.
pub trait Tell {
    /// A remark.
    fn note(&self, text: &str);
    /// Something that went wrong and does not end the run.
    fn warn(&self, text: &str);
}

/// What is measured, and what it needs. The order is that in which it ends: processes before the directory they are in.
struct Session {
    floor: Floor,
    ours: Ours,
    commands: Option<Commands>,
    accelerator: &'static str,
    /// No image is removed meanwhile.
    _hold: Hold,
    _place: Place,
}

/// Carries out a plan.
///
/// # Errors
/// When something is missing, QEMU or vmkit fail, or on an interruption. Nothing is left then either.
pub fn measure(plan: &Plan, stop: &Stop) -> Result<Report> {
    let mut session = Session::prepare(plan, stop)?;
    let mut report = Report { accelerator: session.accelerator, wanted: plan.wanted.clone(), ..Report::default() };
    for round in 1..=plan.runs {
        plan.tell.note(&format!("round {round} of {}", plan.runs));
        session.round(&plan.wanted, round == 1, stop, &mut report)?;
    }
    Ok(report)
}

/// Few machines and then many, all of them ready at once and each of them used.
///
/// # Errors
/// As [`measure`].
pub fn density(plan: &Plan, stop: &Stop, machines: usize) -> Result<Crowds> {
    let plan =
        Plan { wanted: Wanted::new(Ours::BURST.iter().map(ToString::to_string).collect(), true), ..plan.clone() };
    let session = Session::prepare(&plan, stop)?;
    let crowds = [FEW, machines].into_iter().map(|size| session.ours.density(size)).collect::<Result<_>>()?;
    Ok(Crowds::new(crowds))
}

impl Session {
    fn prepare(plan: &Plan, stop: &Stop) -> Result<Session> {
        let agent = Agent::find(format!("protocol {}", vmkit_agent::link::VERSION))?;
        let images = plan.state_dir.join("images");
        let store = Store::open(&images)?;
        let hold = store.hold()?;
        let image = store.ensure("base", &agent, &stop.image, &|progress| {
            plan.tell.note(&format!("image base, {}: {}", progress.phase, progress.detail));
        });
        let image = image.map_err(|error| if stop.is_raised() { Error::Interrupted } else { error.into() })?;

        // A state directory of our own, so that nobody's machines are touched; only the images are those of always.
        let place = Place::make(&plan.state_dir)?;
        let dir = place.path();
        let made = symlink(store.path(), dir.join("images")).and_then(|()| std::fs::create_dir(dir.join("floor")));
        made.map_err(|error| VmkitError::io(format!("{} cannot be written to", dir.display()), error))?;

        let guest = Guest::make(&dir.join("floor"), &image.kernel, &image.initramfs)?;
        let (vms, templates) = (dir.join("vms"), images.join("templates"));
        let tell = plan.tell.clone();
        let ours = Ours::new(&vms, &templates, image, MEMORY_MIB, plan.accelerator, stop.clone(), tell)?;
        // Looked up here, so that no measurement includes finding out whether KVM works.
        let (program, kvm) = ours.qemu(plan.accelerator)?;
        let accelerator = if kvm { "kvm" } else { "tcg" };
        if [Ours::FORK, Ours::CHURN, Ours::BURST, Ours::RUNNING, Ours::OFF, Commands::RUN]
            .iter()
            .any(|names| plan.wanted.ours(names))
        {
            ours.template()?;
        }
        let floor = Floor::new(Config {
            program,
            kvm,
            memory_mib: MEMORY_MIB,
            guest,
            dir: dir.join("floor"),
            interrupted: stop.flag.clone(),
            made: AtomicUsize::new(0),
        });
        let environment = vec![
            ("VMKIT_STATE_DIR", dir.as_os_str().to_owned()),
            ("VMKIT_AGENT", agent.path().as_os_str().to_owned()),
            ("VMKIT_ACCEL", accelerator.into()),
        ];
        let needed = plan.wanted.ours(Commands::RUN) || plan.wanted.ours(Commands::STATES);
        let commands = needed.then(|| Commands::new(dir.to_owned(), environment, stop.clone())).transpose()?;
        Ok(Session { floor, ours, commands, accelerator, _hold: hold, _place: place })
    }

    /// One round: the floor's turns and ours alternate, so that what disturbs this machine for a while disturbs both.
    fn round(&mut self, wanted: &Wanted, first: bool, stop: &Stop, report: &mut Report) -> Result<()> {
        let Session { floor, ours, commands, .. } = self;
        let go_on = || if stop.is_raised() { Err(Error::Interrupted) } else { Ok(()) };
        if wanted.floor(Floor::BOOT) {
            floor.boot(&mut report.floor)?;
        }
        if wanted.ours(Ours::BOOT) {
            ours.boot(&mut report.ours)?;
        }
        if wanted.floor(Floor::PROCESS) {
            floor.process(&mut report.floor)?;
        }
        if wanted.ours(Ours::FORK) {
            ours.fork(&mut report.ours)?;
        }
        if wanted.floor(Floor::WARM) {
            warm(floor, wanted.ours(Ours::WARM).then_some(&mut *ours), report)?;
        }
        if let Some(commands) = commands {
            if wanted.ours(Commands::RUN) {
                commands.run(ours, &mut report.ours)?;
            }
            if wanted.ours(Commands::STATES) {
                commands.states(ours, &mut report.ours)?;
            }
        }
        if wanted.floor(Floor::DISK) {
            floor.disk(&mut report.floor)?;
        }
        if wanted.ours(Ours::SUSPEND) {
            ours.suspend(&mut report.ours)?;
        }
        if wanted.ours(Ours::RUNNING) {
            running(floor, ours, report)?;
        }
        if wanted.ours(Ours::OFF) {
            for (staging, prespawn) in OFF {
                ours.off(staging, prespawn, &mut report.ours)?;
            }
        }
        if wanted.floor(Floor::FORK) {
            floor.fork(&mut report.floor)?;
        }
        ours.discard()?;
        if wanted.floor(Floor::CROWD) {
            floor.crowd(&mut report.floor)?;
        }
        if wanted.ours(Ours::CHURN) {
            ours.churn(&mut report.ours)?;
        }
        // Once: a hundred machines take their time to get ready.
        if first && wanted.floor(Floor::BURST) {
            floor.burst(&mut report.floor)?;
        }
        if first && wanted.ours(Ours::BURST) {
            ours.burst(&mut report.ours)?;
        }
        go_on()
    }
}

/// Answers of warm machines, the floor's and, when they are wanted, ours in turns: they take so little that a disturbance of a
/// second would be all that one of them shows.
fn warm(floor: &mut Floor, ours: Option<&mut Ours>, report: &mut Report) -> Result<()> {
    let ours = match ours {
        Some(ours) => Some((ours.warm(&mut report.ours)?, &*ours)),
        None => None,
    };
    let mut bare = floor.warm(&mut report.floor)?;
    for _ in 0..WARM {
        report.floor.add("process_warm", bare.process()?);
        report.floor.add("exec_warm", bare.builtin()?);
        if let Some((vm, ours)) = &ours {
            report.ours.add("process_warm", ours.process(vm)?);
            report.ours.add("exec_warm", ours.ping(vm)?);
        }
    }
    ours.map_or(Ok(()), |(vm, ours)| ours.park(vm))
}

/// Acquires from a pool that runs. After each, the floor's machine answers beside it, on the same host with the same machines idling.
fn running(floor: &mut Floor, ours: &Ours, report: &mut Report) -> Result<()> {
    let mut bare = floor.warm(&mut report.floor)?;
    let samples = &mut report.floor;
    for _ in 0..RESTED {
        thread::sleep(RESTS);
        samples.add("process_rested", bare.process()?);
    }
    ours.running(&mut report.ours, RESTS, || {
        for _ in 0..BESIDE {
            samples.add("process_beside", bare.process()?);
        }
        Ok(())
    })
}
