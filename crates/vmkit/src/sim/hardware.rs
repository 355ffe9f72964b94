//! What is physically there, and which calls are physically possible.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rand::SeedableRng;
use rand::rngs::StdRng;
use tokio::sync::watch;
use tokio::time::Instant;

use super::fault::{Broken, Fault, Latency, Odds, Verb};
use super::guest::Memory;
use super::world::{Call, Parked};
use crate::console::ConsoleSinks;
use crate::driver::Exit;
use crate::error::{Error, ErrorKind, Result};
use crate::spec::{Id, Spec};
use crate::state::{Action, Fact, State};

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Disk {
    #[default]
    None,
    Half,
    Whole,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    Booting,
    /// From a saved execution that is spent, and its agent is yet to answer.
    GoingOn,
    Up,
    Paused,
    ShuttingDown,
}

pub(super) struct Process {
    pub pid: u32,
    pub phase: Phase,
    pub memory: Arc<Memory>,
    pub since: Instant,
    pub console: ConsoleSinks,
    /// When it will end by itself, and how.
    pub ends: Option<(Instant, Exit)>,
}

/// One machine's hardware. In the table for as long as anything of it is left, its lock and who waits for it included.
#[derive(Default)]
pub(super) struct Unit {
    pub spec: Option<Spec>,
    pub disk: Disk,
    pub files: BTreeMap<String, Vec<u8>>,
    /// When its first process since it was cloned began.
    pub born: Option<SystemTime>,
    pub saved: Option<Arc<Memory>>,
    pub process: Option<Process>,
    /// The pid of a process that was started ahead of time, and waits.
    pub waits: Option<u32>,
    /// Processes that a broken backend lost.
    pub strays: usize,
    /// There, and a broken backend denies it.
    pub denied: bool,
    /// Memory that a broken backend did not clear.
    pub ghost: Option<Arc<Memory>>,
    pub destroying: bool,
    pub foreign: bool,
    /// Who operates on it: a driver's token, and what for.
    pub holder: Option<(u64, Action)>,
    /// Its holder went away in the middle of an operation.
    pub abandoned: bool,
    pub busy: Option<Verb>,
    pub exit: Exit,
    /// Rises with every change, for whoever waits for one.
    pub changed: watch::Sender<u64>,
}

impl Unit {
    /// Whether it is as if it had never been, so that its place in the table can go.
    fn is_nothing(&self) -> bool {
        let there = self.disk != Disk::None || self.process.is_some() || self.saved.is_some() || self.ghost.is_some();
        let there = there || self.waits.is_some();
        let marked = self.foreign || self.denied || self.destroying || self.abandoned || self.strays > 0;
        let used = self.holder.is_some() || self.busy.is_some() || self.changed.receiver_count() > 0;
        !there && !marked && !used && self.files.is_empty()
    }
}

pub(super) struct Planned {
    pub id: Option<Id>,
    pub verb: Verb,
    pub fault: Fault,
}

pub(super) struct Hardware {
    /// Boxed, and not in order: there may be a hundred thousand of them, and each call finds its own.
    pub units: HashMap<Id, Box<Unit>>,
    pub planned: Vec<Planned>,
    pub odds: Odds,
    pub rng: StdRng,
    pub latency: Latency,
    pub steps: BTreeSet<Verb>,
    pub parked: Vec<(u64, Parked)>,
    pub broken: BTreeSet<Broken>,
    pub calls: Vec<Call>,
    pub violations: Vec<String>,
    pub strict: bool,
    pub healed: u64,
    /// Whether calls are written down.
    pub logs: bool,
    /// The names of pools that processes have.
    pub claims: BTreeMap<Id, u64>,
    /// What machines were while they ran, for copies to go on from.
    pub snapshots: BTreeMap<String, (Memory, BTreeMap<String, Vec<u8>>)>,
    /// When processes will end by themselves: found without looking at every machine.
    ends: BTreeSet<(Instant, Id)>,
    /// Machines that somebody waits for, and that may have changed since they were last woken.
    touched: Vec<Id>,
    last_number: u64,
}

impl Hardware {
    pub(super) fn new(seed: u64) -> Hardware {
        Hardware {
            units: HashMap::new(),
            planned: Vec::new(),
            odds: Odds::default(),
            rng: StdRng::seed_from_u64(seed),
            latency: Latency::default(),
            steps: BTreeSet::new(),
            parked: Vec::new(),
            broken: BTreeSet::new(),
            calls: Vec::new(),
            violations: Vec::new(),
            strict: false,
            healed: 0,
            logs: true,
            claims: BTreeMap::new(),
            snapshots: BTreeMap::new(),
            ends: BTreeSet::new(),
            touched: Vec::new(),
            last_number: 1000,
        }
    }

    /// A number that nothing else has: for process ids, lock holders and tickets.
    pub(super) fn number(&mut self) -> u64 {
        self.last_number += 1;
        self.last_number
    }

    /// A machine, to be changed: whoever waits for it is woken afterwards.
    pub(super) fn unit(&mut self, id: &Id) -> &mut Unit {
        // Not `entry`, which would copy the name each time.
        if !self.units.contains_key(id) {
            self.units.insert(id.clone(), Box::default());
        }
        let unit = self.units.get_mut(id).expect("it was inserted");
        if unit.changed.receiver_count() > 0 && self.touched.last() != Some(id) {
            self.touched.push(id.clone());
        }
        unit
    }

    /// The names of all machines, in order.
    pub(super) fn names(&self) -> Vec<Id> {
        let mut names: Vec<Id> = self.units.keys().cloned().collect();
        names.sort_unstable();
        names
    }

    /// Wakes whoever waits for a machine that was touched since `mark`.
    pub(super) fn wake(&mut self, mark: usize) {
        for id in self.touched.drain(mark..) {
            if let Some(unit) = self.units.get(&id) {
                unit.changed.send_modify(|version| *version += 1);
            }
        }
    }

    /// How much of what was touched belongs to others.
    pub(super) fn mark(&self) -> usize {
        self.touched.len()
    }

    /// Forgets what was touched since `mark`: it was looked at, not changed.
    pub(super) fn unmark(&mut self, mark: usize) {
        self.touched.truncate(mark);
    }

    /// Drops a machine from the table if nothing of it is left.
    pub(super) fn forget(&mut self, id: &Id) {
        if self.units.get(id).is_some_and(|unit| unit.is_nothing()) {
            self.units.remove(id);
        }
    }

    /// Writes a call down.
    pub(super) fn log(&mut self, verb: Verb, id: &Id) {
        if self.logs {
            self.calls.push(Call { verb, id: id.clone() });
        }
    }

    pub(super) fn is(&self, broken: Broken) -> bool {
        self.broken.contains(&broken)
    }

    /// Writes down a call that the lifecycle must never make.
    pub(super) fn violation(&mut self, id: &Id, what: &str) {
        self.violations.push(format!("{id}: {what}"));
    }

    /// Ends processes whose time has come. Lazily, at every look: no task of the simulator's own has to live for it.
    pub(super) fn tick(&mut self) {
        while let Some((at, id)) = self.ends.first().cloned() {
            if at > Instant::now() {
                return;
            }
            self.ends.pop_first();
            let ends = self.unit(&id).process.as_ref().and_then(|process| process.ends.clone());
            // Another time may have been set since.
            if let Some((_, exit)) = ends.filter(|(due, _)| *due == at) {
                self.end_process(&id, exit);
            }
        }
    }

    pub(super) fn pick(&mut self, id: &Id, verb: Verb) -> Fault {
        let fits = |plan: &Planned| plan.verb == verb && plan.id.as_ref().is_none_or(|only| only == id);
        if let Some(at) = self.planned.iter().position(fits) {
            return self.planned.remove(at).fault;
        }
        if self.odds == Odds::default() || !(verb.is_mutating() || verb == Verb::Inspect) {
            return Fault::Ok;
        }
        self.odds.pick(&mut self.rng)
    }

    /// Judges a call against the rules that no backend and no machine may break; whether it may be carried out.
    pub(super) fn judge(&mut self, id: &Id, verb: Verb, caller: u64) -> bool {
        if !verb.is_mutating() {
            return true;
        }
        let lock_free = self.is(Broken::NoLock);
        let unit = self.unit(id);
        let holds = lock_free || unit.holder.is_some_and(|(holder, _)| holder == caller);
        let mut wrong = Vec::new();
        // A kill passes another process's operation: that is what it is for.
        if verb != Verb::Kill {
            if let Some(busy) = unit.busy {
                wrong.push(format!("{verb:?} during {busy:?} (I1)"));
            }
            if !holds {
                wrong.push(format!("{verb:?} without the machine's lock (I1)"));
            }
        }
        // A clone has to find out.
        if unit.foreign && verb != Verb::Clone {
            wrong.push(format!("{verb:?} of somebody else's machine"));
        }
        if matches!(verb, Verb::Boot | Verb::Resume | Verb::Prespawn) {
            if unit.destroying {
                wrong.push(format!("{verb:?} of a machine whose destruction began (I8)"));
            }
            if unit.disk != Disk::Whole {
                wrong.push(format!("{verb:?} without a disk"));
            }
            if unit.process.is_some() {
                wrong.push(format!("{verb:?} while its process is alive"));
            }
            if verb == Verb::Resume && unit.saved.is_none() {
                wrong.push("Resume without a saved execution".to_owned());
            }
            if verb == Verb::Boot && unit.saved.is_some() {
                wrong.push("Boot over a saved execution".to_owned());
            }
        }
        for what in &wrong {
            self.violation(id, what);
        }
        wrong.is_empty()
    }

    /// What a backend finds when it looks.
    pub(super) fn fact(&self, id: &Id) -> Fact {
        let Some(unit) = self.units.get(id) else { return Fact::Absent };
        if unit.foreign || unit.denied {
            return Fact::Absent;
        }
        match (&unit.process, unit.disk) {
            (None, Disk::None) => Fact::Absent,
            _ if unit.destroying => Fact::Broken,
            (_, Disk::None | Disk::Half) => Fact::Broken,
            (None, Disk::Whole) if unit.saved.is_some() => Fact::Suspended,
            (None, Disk::Whole) => Fact::Stopped,
            (Some(process), Disk::Whole) => match process.phase {
                Phase::Up | Phase::ShuttingDown => Fact::Running,
                Phase::Booting | Phase::GoingOn | Phase::Paused => Fact::Broken,
            },
        }
    }

    /// What somebody who does not hold it sees: transitional while another operates on it.
    pub(super) fn seen(&self, id: &Id) -> State {
        let action = self.units.get(id).and_then(|unit| unit.holder).map_or(Action::None, |(_, action)| action);
        match action {
            Action::None => crate::state::found(self.fact(id)),
            Action::Clone => State::Cloning,
            Action::Start => State::Starting,
            Action::Stop => State::Stopping,
            Action::Suspend => State::Suspending,
            Action::Delete => State::Deleting,
        }
    }

    /// Clears up what a holder that died left half done.
    pub(super) fn recover(&mut self, id: &Id) {
        let unit = self.unit(id);
        if unit.foreign || unit.holder.is_some() || !std::mem::take(&mut unit.abandoned) {
            return;
        }
        unit.waits = None;
        match unit.process.as_ref().map(|process| process.phase) {
            Some(Phase::Booting) => self.end_process(id, killed()),
            Some(Phase::Paused | Phase::GoingOn) => self.set_phase(id, Phase::Up),
            Some(Phase::Up | Phase::ShuttingDown) | None => {}
        }
        let unit = self.unit(id);
        if unit.process.is_none() && (unit.destroying || unit.disk == Disk::Half) {
            self.remove_saved(id);
            self.remove_disk(id);
        }
    }

    /// The guest goes on from what was saved. Spent before that, as the lifecycle demands: nobody resumes twice from one execution.
    pub(super) fn spend(&mut self, id: &Id) -> Result<()> {
        let unit = self.unit(id);
        let Some(process) = &mut unit.process else {
            return Err(Error::new(ErrorKind::Exited, "the machine's process has ended"));
        };
        process.phase = Phase::GoingOn;
        process.memory.thaw();
        if let Some(spent) = unit.saved.take().filter(|spent| !Arc::ptr_eq(spent, &process.memory)) {
            spent.lose();
        }
        Ok(())
    }

    pub(super) fn set_phase(&mut self, id: &Id, phase: Phase) {
        if let Some(process) = &mut self.unit(id).process {
            process.phase = phase;
        }
    }

    /// Ends a machine's process; its memory is lost unless it was saved.
    pub(super) fn end_process(&mut self, id: &Id, exit: Exit) {
        let (forgets, keeps) = (self.is(Broken::ForgetsExit), self.is(Broken::StopKeepsMemory));
        let unit = self.unit(id);
        let Some(process) = unit.process.take() else { return };
        process.memory.freeze();
        if unit.saved.is_none() {
            process.memory.lose();
            unit.ghost = keeps.then_some(process.memory);
        }
        unit.exit = if forgets { Exit::default() } else { exit };
    }

    pub(super) fn end_after(&mut self, id: &Id, delay: Duration, exit: Exit) {
        let at = Instant::now() + delay;
        if let Some(process) = &mut self.unit(id).process {
            process.ends = Some((at, exit));
            self.ends.insert((at, id.clone()));
        }
    }

    pub(super) fn power_on(&mut self, id: &Id, memory: Arc<Memory>, console: ConsoleSinks) -> u32 {
        let pid = self.unit(id).waits.take();
        let pid = pid.unwrap_or_else(|| self.number() as u32);
        let process = Process { pid, phase: Phase::Booting, memory, since: Instant::now(), console, ends: None };
        let unit = self.unit(id);
        unit.denied = false;
        unit.process = Some(process);
        unit.born.get_or_insert_with(SystemTime::now);
        pid
    }

    pub(super) fn remove_saved(&mut self, id: &Id) {
        if let Some(memory) = self.unit(id).saved.take() {
            memory.lose();
        }
    }

    pub(super) fn remove_disk(&mut self, id: &Id) {
        if self.unit(id).process.is_some() || self.unit(id).waits.is_some() {
            self.violation(id, "its disk was removed while its process is alive");
        }
        if self.unit(id).saved.is_some() {
            self.violation(id, "its disk was removed before its saved execution");
        }
        let stale = self.is(Broken::StaleDisk);
        let unit = self.unit(id);
        unit.disk = Disk::None;
        unit.destroying = false;
        unit.spec = None;
        unit.ghost = None;
        if !stale {
            unit.files.clear();
        }
    }

    /// The machine's process of that number, if it is still that one.
    pub(super) fn process(&mut self, id: &Id, pid: u32) -> Result<&mut Process> {
        let unit = self.unit(id);
        let output = unit.exit.output.clone();
        match &mut unit.process {
            Some(process) if process.pid == pid => Ok(process),
            _ => Err(Error::new(ErrorKind::Exited, "the machine's process has ended").with_details(output)),
        }
    }
}

/// How a process that was killed has ended.
pub(super) fn killed() -> Exit {
    Exit { code: None, signal: Some(9), output: String::new() }
}
