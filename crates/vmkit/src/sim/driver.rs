//! One simulated machine, as its hypervisor sees it.

use std::sync::Arc;
use std::time::Duration;

use super::fault::{Broken, Fault, Verb};
use super::guest::{Memory, SimGuest};
use super::hardware::{Disk, Hardware, Phase, killed};
use super::probe::SimProbe;
use super::world::World;
use crate::console::ConsoleSinks;
use crate::driver::{Driver, Exit, Probe, Spent};
use crate::error::{Error, ErrorKind, Result};
use crate::guest::Guest;
use crate::snapshot::Snapshot;
use crate::spec::{Id, Spec};
use crate::state::{Action, Fact, State};

/// The one image that is not there.
const MISSING: &str = "missing";

/// A driver of one machine in a [`World`].
pub struct SimDriver {
    world: World,
    id: Id,
    spec: Spec,
    suspendable: bool,
    /// Whose lock is whose.
    token: u64,
}

impl SimDriver {
    pub(super) fn new(world: World, id: Id, spec: Spec, suspendable: bool) -> SimDriver {
        let token = world.change(|hw| hw.number());
        SimDriver { world, id, spec, suspendable, token }
    }

    /// Logs the call, judges it, waits at its gate, and says what is to go wrong with it.
    async fn enter(&self, verb: Verb) -> Result<(Fault, Busy)> {
        // No call is instantaneous: others get between any two.
        self.world.pause(Duration::ZERO).await;
        let (fault, possible) = self.world.change(|hw| {
            hw.log(verb, &self.id);
            let possible = hw.judge(&self.id, verb, self.token);
            let unit = hw.unit(&self.id);
            // A kill that passes another's operation does not shut that one out.
            let passes = verb == Verb::Kill && unit.holder.is_none_or(|(holder, _)| holder != self.token);
            if verb.is_mutating() && possible && !passes {
                unit.busy = Some(verb);
            }
            (hw.pick(&self.id, verb), possible)
        });
        if !possible {
            return Err(Error::new(ErrorKind::Backend, "sim: the hardware cannot do that"));
        }
        let busy = Busy { world: self.world.clone(), id: self.id.clone(), verb };
        self.world.gate(&self.id, verb).await;
        if let Fault::Slow(delay) = fault {
            self.world.pause(delay).await;
        }
        Ok((fault, busy))
    }

    /// One call in its two halves: a future that is dropped, fails or hangs leaves the first half done.
    async fn perform(
        &mut self,
        verb: Verb,
        first: impl FnOnce(&mut Hardware, &Id) -> Result<()>,
        second: impl FnOnce(&mut Hardware, &Id) -> Result<()>,
    ) -> Result<()> {
        self.perform_spending(verb, None, first, second).await
    }

    /// The same of a resume: between loading what was saved and the agent's answer, that is spent.
    async fn perform_spending(
        &mut self,
        verb: Verb,
        spent: Option<&Spent>,
        first: impl FnOnce(&mut Hardware, &Id) -> Result<()>,
        second: impl FnOnce(&mut Hardware, &Id) -> Result<()>,
    ) -> Result<()> {
        let (fault, _busy) = self.enter(verb).await?;
        let failed = || Err(Error::new(ErrorKind::Backend, format!("sim: {verb:?} was to fail")));
        match fault {
            Fault::Lie => return Ok(()),
            Fault::Err if verb.fails_clean() => return failed(),
            _ => {}
        }
        let waits = self.world.look(|hw| hw.units.get(&self.id).is_some_and(|unit| unit.waits.is_some()));
        self.world.change(|hw| first(hw, &self.id))?;
        let pid = self.world.look(|hw| hw.units.get(&self.id).and_then(|unit| unit.process.as_ref()).map(|it| it.pid));
        let latency = self.world.look(|hw| match waits && matches!(verb, Verb::Boot | Verb::Resume) {
            true => hw.latency.of(verb).saturating_sub(hw.latency.prespawn),
            false => hw.latency.of(verb),
        });
        let parts = if spent.is_some() { 2 } else { 1 };
        let working = async {
            self.world.pause(latency / parts).await;
            match fault {
                Fault::Hang => self.world.hang().await,
                Fault::Err => return failed(),
                Fault::Panic => panic!("sim: {verb:?} was to panic"),
                _ => {}
            }
            if let Some(spent) = spent {
                self.world.change(|hw| {
                    spent.set();
                    hw.spend(&self.id)
                })?;
                self.world.pause(latency / parts).await;
            }
            Ok(())
        };
        match pid {
            // A process that ends while it boots fails the boot at once, not at the deadline.
            Some(pid) if matches!(verb, Verb::Boot | Verb::Resume) => tokio::select! {
                biased;
                () = self.world.until(&self.id, |hw| hw.process(&self.id, pid).is_err().then_some(())) => {
                    return self.world.change(|hw| hw.process(&self.id, pid).map(drop));
                }
                done = working => done?,
            },
            _ => working.await?,
        }
        self.world.change(|hw| second(hw, &self.id))?;
        match fault {
            Fault::ErrButDone => failed(),
            Fault::DieLater(delay) => {
                let exit = Exit { code: Some(1), signal: None, output: "sim: it was to die\n".to_owned() };
                self.world.change(|hw| hw.end_after(&self.id, delay, exit));
                Ok(())
            }
            Fault::Ok | Fault::Err | Fault::Lie | Fault::Hang | Fault::Slow(_) | Fault::Panic => Ok(()),
        }
    }

    async fn ask(&self, verb: Verb) -> Result<Fault> {
        let (fault, _busy) = self.enter(verb).await?;
        match fault {
            Fault::Err | Fault::ErrButDone => {
                return Err(Error::new(ErrorKind::Backend, format!("sim: {verb:?} was to fail")));
            }
            Fault::Hang => self.world.hang().await,
            Fault::Panic => panic!("sim: {verb:?} was to panic"),
            Fault::Ok | Fault::Lie | Fault::Slow(_) | Fault::DieLater(_) => {}
        }
        Ok(fault)
    }

    /// Boots or resumes: power on, then the agent answers.
    async fn power_on(&mut self, verb: Verb, console: ConsoleSinks, spent: Option<&Spent>) -> Result<()> {
        if self.world.look(|hw| hw.is(Broken::Liar)) {
            return self.enter(verb).await.map(drop);
        }
        let copy_of = self.spec.snapshot.clone();
        let first = |hw: &mut Hardware, id: &Id| {
            let forgets = hw.is(Broken::ForgetsSuspend);
            let copied = match &copy_of {
                Some(_) if hw.is(Broken::CopiesBoot) || hw.unit(id).born.is_some() => None,
                Some(key) => match hw.snapshots.get(key) {
                    Some((memory, files)) => Some((memory.copy(), files.clone())),
                    None => {
                        return Err(Error::new(
                            ErrorKind::NotFound,
                            "what it was to be a copy of is not kept any more",
                        ));
                    }
                },
                None => None,
            };
            let unit = hw.unit(id);
            let memory = match (verb, &unit.saved, unit.ghost.take()) {
                (Verb::Resume, Some(saved), _) if !forgets => saved.clone(),
                (_, _, Some(ghost)) => ghost,
                (Verb::Boot, _, None) if copied.is_some() => {
                    let (memory, files) = copied.expect("it was just looked at");
                    unit.files = files;
                    Arc::new(memory)
                }
                _ => Arc::new(Memory::new()),
            };
            let console = if hw.is(Broken::SilentConsole) { ConsoleSinks::discard() } else { console };
            console.stdout.push(format!("sim: {verb:?}\r\n").as_bytes());
            console.stderr.push(b"sim: power on\n");
            hw.power_on(id, memory, console);
            Ok(())
        };
        let second = |hw: &mut Hardware, id: &Id| {
            let unit = hw.unit(id);
            let output = unit.exit.output.clone();
            let Some(process) = &mut unit.process else {
                return Err(Error::new(ErrorKind::Exited, "the machine's process has ended").with_details(output));
            };
            process.phase = Phase::Up;
            process.memory.thaw();
            process.console.stdout.push(b"sim: the agent answers\r\n");
            Ok(())
        };
        self.perform_spending(verb, spent, first, second).await
    }
}

impl Driver for SimDriver {
    async fn begin(&mut self, action: Action) -> Result<Option<Fact>> {
        let fault = self.ask(Verb::Begin).await?;
        let (id, token) = (self.id.clone(), self.token);
        self.world
            .until(&id, |hw| {
                let shared = hw.is(Broken::NoLock);
                let unit = hw.unit(&id);
                if !shared && unit.holder.is_some_and(|(holder, _)| holder != token) {
                    return None;
                }
                unit.holder = None;
                hw.recover(&id);
                hw.unit(&id).holder = Some((token, action));
                Some(())
            })
            .await;
        match fault {
            Fault::Lie => Ok(None),
            _ => Ok(Some(self.world.change(|hw| hw.fact(&self.id)))),
        }
    }

    fn end(&mut self) {
        self.world.change(|hw| {
            let unit = hw.unit(&self.id);
            if unit.holder.is_some_and(|(holder, _)| holder == self.token) {
                unit.holder = None;
            }
        });
    }

    async fn clone_source(&mut self) -> Result<()> {
        let spec = self.spec.clone();
        let first = |hw: &mut Hardware, id: &Id| {
            let deletes = hw.is(Broken::DeletesForeign);
            let unit = hw.unit(id);
            if unit.foreign && deletes {
                unit.foreign = false;
                unit.process = None;
                unit.disk = Disk::None;
            }
            if unit.foreign || (unit.disk != Disk::None && !unit.denied) {
                return Err(
                    Error::new(ErrorKind::AlreadyExists, "something of that name exists").hint("choose another name")
                );
            }
            unit.disk = Disk::Half;
            unit.born = None;
            unit.denied = false;
            unit.spec = Some(spec);
            Ok(())
        };
        let missing = self.spec.source.name() == MISSING;
        let second = |hw: &mut Hardware, id: &Id| {
            if missing {
                return Err(Error::new(ErrorKind::NotFound, format!("there is no image {MISSING}")));
            }
            hw.unit(id).disk = Disk::Whole;
            Ok(())
        };
        self.perform(Verb::Clone, first, second).await
    }

    async fn boot(&mut self, console: ConsoleSinks) -> Result<()> {
        self.power_on(Verb::Boot, console, None).await
    }

    async fn resume(&mut self, console: ConsoleSinks, spent: &Spent) -> Result<()> {
        self.power_on(Verb::Resume, console, Some(spent)).await
    }

    async fn suspend(&mut self) -> Result<()> {
        let off = || Error::new(ErrorKind::Exited, "the machine's process has ended");
        let first = |hw: &mut Hardware, id: &Id| {
            let process = hw.unit(id).process.as_mut().ok_or_else(off)?;
            process.phase = Phase::Paused;
            process.memory.freeze();
            Ok(())
        };
        let second = |hw: &mut Hardware, id: &Id| {
            let leaves = hw.is(Broken::SuspendLeavesProcess);
            let unit = hw.unit(id);
            let memory = unit.process.as_ref().ok_or_else(off)?.memory.clone();
            // Commands that somebody is connected to end with their connection.
            memory.disconnect();
            unit.saved = Some(memory);
            unit.strays += usize::from(leaves);
            hw.end_process(id, Exit { code: Some(0), ..Exit::default() });
            Ok(())
        };
        let result = self.perform(Verb::Suspend, first, second).await;
        if result.is_err() {
            // Failed and still there: the guest goes on.
            self.world.change(|hw| match &mut hw.unit(&self.id).process {
                Some(process) if process.phase == Phase::Paused => {
                    process.phase = Phase::Up;
                    process.memory.thaw();
                }
                _ => {}
            });
        }
        result
    }

    async fn prespawn(&mut self) -> Result<()> {
        let first = |hw: &mut Hardware, id: &Id| {
            let pid = hw.number() as u32;
            let unit = hw.unit(id);
            if unit.saved.is_none() && unit.born.is_some() {
                let error = Error::new(ErrorKind::Unsupported, "it boots from its disk: there is no state to wait for");
                return Err(error.hint("suspend it, or start it as it is"));
            }
            unit.waits.get_or_insert(pid);
            Ok(())
        };
        let second = |hw: &mut Hardware, id: &Id| {
            if hw.is(Broken::PrespawnRuns) {
                hw.power_on(id, Arc::new(Memory::new()), ConsoleSinks::discard());
                hw.set_phase(id, Phase::Up);
            }
            Ok(())
        };
        self.perform(Verb::Prespawn, first, second).await
    }

    async fn snapshot(&mut self) -> Result<Snapshot> {
        let off = || Error::new(ErrorKind::Exited, "the machine's process has ended");
        let key = format!("copy-{}", self.world.change(|hw| hw.number()));
        let kept = Kept { world: self.world.clone(), key: key.clone() };
        let second = |hw: &mut Hardware, id: &Id| {
            let ends = hw.is(Broken::ForkEndsOriginal);
            let unit = hw.unit(id);
            let process = unit.process.as_ref().filter(|process| process.phase == Phase::Up).ok_or_else(off)?;
            let saved = (process.memory.copy(), unit.files.clone());
            if ends {
                hw.end_process(id, Exit::default());
            }
            hw.snapshots.insert(kept.key.clone(), saved);
            Ok(())
        };
        self.perform(Verb::Snapshot, |_, _| Ok(()), second).await?;
        let spec = Spec { labels: self.spec.labels_of_copies(), snapshot: Some(key), ..self.spec.clone() };
        Ok(Snapshot::new(spec, Duration::ZERO, kept))
    }

    async fn shutdown(&mut self) -> Result<()> {
        let second = |hw: &mut Hardware, id: &Id| {
            let delay = hw.latency.shutdown;
            hw.set_phase(id, Phase::ShuttingDown);
            hw.end_after(id, delay, Exit { code: Some(0), ..Exit::default() });
            Ok(())
        };
        self.perform(Verb::Shutdown, |_, _| Ok(()), second).await
    }

    async fn kill(&mut self) -> Result<()> {
        if self.world.look(|hw| hw.is(Broken::HangsOnKill)) {
            let _busy = self.enter(Verb::Kill).await?;
            return std::future::pending().await;
        }
        let second = |hw: &mut Hardware, id: &Id| {
            let (graceful, leaves) = (hw.is(Broken::KillIsGraceful), hw.is(Broken::KillLeavesChild));
            let unit = hw.unit(id);
            if unit.foreign {
                return Ok(());
            }
            unit.waits = None;
            if unit.process.is_none() {
                return Ok(());
            }
            unit.strays += usize::from(leaves);
            if graceful {
                hw.end_after(id, Duration::from_secs(30), killed());
            } else {
                hw.end_process(id, killed());
            }
            Ok(())
        };
        self.perform(Verb::Kill, |_, _| Ok(()), second).await
    }

    async fn destroy(&mut self) -> Result<()> {
        let first = |hw: &mut Hardware, id: &Id| {
            let (picky, disk_first) = (hw.is(Broken::DestroyNotIdempotent), hw.is(Broken::DestroysDiskFirst));
            let (keeps_half, outlives) = (hw.is(Broken::KeepsHalfClones), hw.is(Broken::PrespawnOutlives));
            let unit = hw.unit(id);
            if unit.process.is_some() && !unit.foreign {
                return Err(Error::new(ErrorKind::Busy, "the machine's process is alive"));
            }
            if picky && unit.disk == Disk::None {
                return Err(Error::new(ErrorKind::NotFound, "there is nothing to destroy"));
            }
            if keeps_half && unit.disk == Disk::Half {
                return Err(Error::new(ErrorKind::Backend, "sim: half a disk stays"));
            }
            if unit.foreign || unit.disk == Disk::None {
                return Ok(());
            }
            unit.destroying = true;
            let waited = unit.waits.take().is_some();
            unit.strays += usize::from(waited && outlives);
            if disk_first {
                hw.remove_disk(id);
            }
            hw.remove_saved(id);
            Ok(())
        };
        let second = |hw: &mut Hardware, id: &Id| {
            let leaks = hw.is(Broken::Leaker);
            let unit = hw.unit(id);
            if unit.foreign {
                return Ok(());
            }
            if leaks {
                (unit.denied, unit.destroying) = (true, false);
            } else {
                hw.remove_disk(id);
            }
            Ok(())
        };
        self.perform(Verb::Destroy, first, second).await
    }

    async fn inspect(&mut self) -> Result<Fact> {
        match self.ask(Verb::Inspect).await? {
            Fault::Lie => Ok(Fact::Broken),
            _ => Ok(self.world.change(|hw| hw.fact(&self.id))),
        }
    }

    async fn state(&mut self) -> Result<State> {
        match self.ask(Verb::Inspect).await? {
            Fault::Lie => Ok(State::ErrorUnknown),
            _ => Ok(self.world.change(|hw| {
                // Also a look clears up after a process that died.
                hw.recover(&self.id);
                hw.seen(&self.id)
            })),
        }
    }

    async fn exited(&mut self) -> Exit {
        let fault = self.world.change(|hw| hw.pick(&self.id, Verb::Exited));
        match fault {
            Fault::Panic => panic!("sim: Exited was to panic"),
            Fault::Hang => self.world.hang().await,
            Fault::Slow(delay) => self.world.pause(delay).await,
            Fault::Ok | Fault::Err | Fault::ErrButDone | Fault::Lie | Fault::DieLater(_) => {}
        }
        self.world
            .until(&self.id, |hw| {
                let blind = hw.is(Broken::NeverNoticesDeath);
                let unit = hw.unit(&self.id);
                (unit.process.is_none() && !blind).then(|| unit.exit.clone())
            })
            .await
    }

    fn guest(&self) -> Option<Guest> {
        self.world.look(|hw| {
            let process = hw.units.get(&self.id)?.process.as_ref()?;
            let (world, id) = (self.world.clone(), self.id.clone());
            (process.phase == Phase::Up).then(|| Arc::new(SimGuest { world, id, pid: process.pid }) as Guest)
        })
    }

    fn probe(&self) -> Arc<dyn Probe> {
        Arc::new(SimProbe { world: self.world.clone(), id: self.id.clone() })
    }

    fn suspendable(&self) -> bool {
        self.suspendable
    }
}

/// Keeps a snapshot until its copies are made.
struct Kept {
    world: World,
    key: String,
}

impl Drop for Kept {
    fn drop(&mut self) {
        self.world.change(|hw| hw.snapshots.remove(&self.key));
    }
}

impl Drop for SimDriver {
    fn drop(&mut self) {
        self.world.change(|hw| {
            let unit = hw.unit(&self.id);
            if unit.holder.is_some_and(|(holder, _)| holder == self.token) {
                unit.holder = None;
                unit.abandoned = true;
            }
            hw.forget(&self.id);
        });
    }
}

impl std::fmt::Debug for SimDriver {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SimDriver").field("id", &self.id.as_str()).finish_non_exhaustive()
    }
}

/// A call under way; over when it returns and when it is dropped.
struct Busy {
    world: World,
    id: Id,
    verb: Verb,
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.world.change(|hw| {
            let unit = hw.unit(&self.id);
            if unit.busy == Some(self.verb) {
                unit.busy = None;
            }
        });
    }
}
