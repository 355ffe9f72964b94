//! The hardware's public side: a test looks at it, breaks it, and steps through it.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::watch;

use super::fault::{Broken, Fault, Latency, Odds, Verb};
use super::guest::Memory;
use super::hardware::{Disk, Hardware, Phase, Planned, Process, Unit};
use crate::console::ConsoleSinks;
use crate::driver::Exit;
use crate::spec::Id;

/// Simulated hardware: machines that outlive every provider. Cheap to clone.
#[derive(Clone)]
pub struct World(Arc<Shared>);

struct Shared {
    hardware: Mutex<Hardware>,
    /// Rises when gates open or close, or faults end. What changes of a machine is told by its own: with one channel for
    /// everything, each change would wake every machine's task.
    gates: watch::Sender<u64>,
}

/// A call that the hardware received.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Call {
    /// What for.
    pub verb: Verb,
    /// On which machine.
    pub id: Id,
}

/// A call that waits at its gate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Parked {
    /// What for.
    pub verb: Verb,
    /// On which machine.
    pub id: Id,
}

impl World {
    /// An empty world, where nothing fails unless asked to.
    pub fn new() -> World {
        World::seeded(0)
    }

    /// An empty world whose [random faults](World::random_faults) follow from `seed`.
    pub fn seeded(seed: u64) -> World {
        World(Arc::new(Shared { hardware: Mutex::new(Hardware::new(seed)), gates: watch::Sender::new(0) }))
    }

    /// Breaks one promise of every backend on it.
    #[must_use]
    pub fn broken(self, how: Broken) -> World {
        self.change(|hw| hw.broken.insert(how));
        self
    }

    /// Panics at a violation, in the call that commits it, besides listing it.
    pub fn strict(&self, strict: bool) {
        self.change(|hw| hw.strict = strict);
    }

    /// Sets how long things take.
    pub fn latency(&self, latency: Latency) {
        self.change(|hw| hw.latency = latency);
    }

    /// Sets what the next call of `verb` does, on `id` or on any machine. Faults queue in order.
    pub fn fault(&self, id: Option<&Id>, verb: Verb, fault: Fault) {
        self.change(|hw| hw.planned.push(Planned { id: id.cloned(), verb, fault }));
    }

    /// Makes every call fail with these probabilities, where no [`fault`](World::fault) is set for it.
    pub fn random_faults(&self, odds: Odds) {
        self.change(|hw| hw.odds = odds);
    }

    /// Ends all faults, those that wait for their call and those that hang included.
    pub fn heal(&self) {
        self.turn(|hw| {
            hw.planned.clear();
            hw.odds = Odds::default();
            hw.healed += 1;
        });
    }

    /// Parks every call that changes a machine at a gate until it is [released](World::release); `false` opens the gates.
    pub fn stepping(&self, on: bool) {
        self.step_at(if on { &Verb::MUTATING } else { &[] });
    }

    /// Parks calls of these verbs only.
    pub fn step_at(&self, verbs: &[Verb]) {
        self.turn(|hw| {
            hw.steps = verbs.iter().copied().collect();
            let steps = hw.steps.clone();
            hw.parked.retain(|(_, parked)| steps.contains(&parked.verb));
        });
    }

    /// The calls that wait at their gates, oldest first.
    pub fn parked(&self) -> Vec<Parked> {
        self.look(|hw| hw.parked.iter().map(|(_, parked)| parked.clone()).collect())
    }

    /// Waits until a call of `verb` on `id` is parked.
    pub async fn wait_parked(&self, id: &Id, verb: Verb) {
        self.until_turned(|hw| {
            hw.parked.iter().any(|(_, parked)| parked.verb == verb && parked.id == *id).then_some(())
        })
        .await;
    }

    /// Lets the call go on that is parked on `id`; whether there was one.
    pub fn release(&self, id: &Id) -> bool {
        self.turn(|hw| {
            let at = hw.parked.iter().position(|(_, parked)| parked.id == *id);
            at.map(|at| hw.parked.remove(at)).is_some()
        })
    }

    /// Ends a machine's process with an exit code, as a crash does; whether there was one.
    pub fn crash(&self, id: &Id, code: i32) -> bool {
        let output = "sim: the machine crashed\n".to_owned();
        self.end(id, Exit { code: Some(code), signal: None, output })
    }

    /// Ends a machine's process by a signal, as somebody outside may; whether there was one.
    pub fn signal(&self, id: &Id, signal: i32) -> bool {
        self.end(id, Exit { code: None, signal: Some(signal), output: String::new() })
    }

    /// Puts a machine there that is not ours, with a disk and a process.
    pub fn plant_foreign(&self, id: &Id) {
        self.change(|hw| {
            let unit = hw.unit(id);
            (unit.foreign, unit.disk) = (true, Disk::Whole);
            hw.power_on(id, Arc::new(Memory::new()), ConsoleSinks::discard());
            hw.set_phase(id, Phase::Up);
        });
    }

    /// Whether a planted machine is there, disk and process, as it was.
    pub fn foreign_intact(&self, id: &Id) -> bool {
        self.look(|hw| {
            let whole = |unit: &Unit| unit.foreign && unit.disk == Disk::Whole && unit.process.is_some();
            hw.units.get(id).is_some_and(|unit| whole(unit))
        })
    }

    /// How many processes of a machine are alive.
    pub fn processes(&self, id: &Id) -> usize {
        let of = |unit: &Unit| usize::from(unit.process.is_some()) + usize::from(unit.waits.is_some()) + unit.strays;
        self.look(|hw| hw.units.get(id).map_or(0, |unit| of(unit)))
    }

    /// Whether a machine's processors run: it has a process, and that is not paused.
    pub fn executes(&self, id: &Id) -> bool {
        self.look(|hw| {
            let process = hw.units.get(id).and_then(|unit| unit.process.as_ref());
            process.is_some_and(|process| process.phase != Phase::Paused)
        })
    }

    /// Whether a machine has a disk, whole or half made.
    pub fn has_disk(&self, id: &Id) -> bool {
        self.look(|hw| hw.units.get(id).is_some_and(|unit| unit.disk != Disk::None))
    }

    /// Whether a machine's execution is saved.
    pub fn has_saved_execution(&self, id: &Id) -> bool {
        self.look(|hw| hw.units.get(id).is_some_and(|unit| unit.saved.is_some()))
    }

    /// All that is left of machines that are ours, one line each; empty when the world is as it was at first.
    pub fn residue(&self) -> Vec<String> {
        self.look(|hw| {
            let mut left = Vec::new();
            for id in hw.names() {
                let Some(unit) = hw.units.get(&id).filter(|unit| !unit.foreign) else { continue };
                if unit.process.is_some() || unit.waits.is_some() || unit.strays > 0 {
                    left.push(format!("{id}: a process"));
                }
                if unit.saved.is_some() {
                    left.push(format!("{id}: a saved execution"));
                }
                if unit.disk != Disk::None {
                    left.push(format!("{id}: a disk"));
                }
                if let Some((_, action)) = unit.holder {
                    left.push(format!("{id}: locked for {action}"));
                }
            }
            left
        })
    }

    /// Sets whether calls are written down, for worlds that live long: true at first.
    pub fn log_calls(&self, on: bool) {
        self.change(|hw| hw.logs = on);
    }

    /// Every call so far.
    pub fn calls(&self) -> Vec<Call> {
        self.look(|hw| hw.calls.clone())
    }

    /// How many calls of `verb` a machine has received.
    pub fn count(&self, id: &Id, verb: Verb) -> usize {
        self.look(|hw| hw.calls.iter().filter(|call| call.verb == verb && call.id == *id).count())
    }

    /// Every call so far that no hardware could carry out or that the lifecycle forbids.
    pub fn violations(&self) -> Vec<String> {
        self.look(|hw| hw.violations.clone())
    }

    fn end(&self, id: &Id, exit: Exit) -> bool {
        self.change(|hw| {
            let unit = hw.unit(id);
            let alive = unit.process.is_some() || unit.waits.take().is_some();
            hw.end_process(id, exit);
            alive
        })
    }

    fn lock(&self) -> MutexGuard<'_, Hardware> {
        let mut hw = self.0.hardware.lock().unwrap_or_else(PoisonError::into_inner);
        hw.tick();
        hw.wake(0);
        hw
    }

    pub(super) fn look<T>(&self, look: impl FnOnce(&Hardware) -> T) -> T {
        look(&self.lock())
    }

    /// Changes the hardware and wakes whoever waits for what was changed.
    pub(super) fn change<T>(&self, change: impl FnOnce(&mut Hardware) -> T) -> T {
        let (result, wrong) = {
            let mut hw = self.lock();
            let before = hw.violations.len();
            let result = change(&mut hw);
            hw.wake(0);
            let wrong = if hw.strict { hw.violations.get(before).cloned() } else { None };
            (result, wrong)
        };
        match wrong {
            Some(wrong) => panic!("{wrong}"),
            None => result,
        }
    }

    /// Changes gates or faults, and wakes whoever waits for those.
    fn turn<T>(&self, change: impl FnOnce(&mut Hardware) -> T) -> T {
        let result = self.change(change);
        self.0.gates.send_modify(|version| *version += 1);
        result
    }

    /// Waits until `ready` finds what it looks for in a machine. Cancel-safe.
    pub(super) async fn until<T>(&self, id: &Id, mut ready: impl FnMut(&mut Hardware) -> Option<T>) -> T {
        let mut changed = {
            let mut hw = self.lock();
            let mark = hw.mark();
            let changed = hw.unit(id).changed.subscribe();
            hw.unmark(mark);
            changed
        };
        loop {
            let next = {
                let mut hw = self.lock();
                let mark = hw.mark();
                match ready(&mut hw) {
                    Some(found) => {
                        // What was found may have been taken.
                        hw.wake(mark);
                        return found;
                    }
                    None => hw.unmark(mark),
                }
                changed.borrow_and_update();
                // Processes end at their time only when somebody looks: be there then.
                let ends = |process: &Process| process.ends.as_ref().map(|(at, _)| *at);
                hw.units.get(id).and_then(|unit| unit.process.as_ref().and_then(ends))
            };
            let due = async {
                match next {
                    Some(at) => tokio::time::sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                _ = changed.changed() => {}
                () = due => {}
            }
        }
    }

    /// Waits until `ready` finds what it looks for among gates and faults. Cancel-safe.
    async fn until_turned<T>(&self, mut ready: impl FnMut(&mut Hardware) -> Option<T>) -> T {
        let mut turned = self.0.gates.subscribe();
        loop {
            if let Some(found) = ready(&mut self.lock()) {
                return found;
            }
            // The sender lives as long as this world does.
            let _ = turned.changed().await;
        }
    }

    /// Waits at the gate of a call, if there is one.
    pub(super) async fn gate(&self, id: &Id, verb: Verb) {
        if !self.look(|hw| hw.steps.contains(&verb)) {
            return;
        }
        let ticket = self.turn(|hw| {
            let ticket = hw.number();
            hw.parked.push((ticket, Parked { verb, id: id.clone() }));
            ticket
        });
        let gate = Gate { world: self, ticket };
        self.until_turned(|hw| hw.parked.iter().all(|(parked, _)| *parked != ticket).then_some(())).await;
        drop(gate);
    }

    /// Never returns, until the faults end.
    pub(super) async fn hang(&self) {
        let healed = self.look(|hw| hw.healed);
        self.until_turned(|hw| (hw.healed != healed).then_some(())).await;
    }

    /// Lets that time pass, and everybody else run at least once.
    pub(super) async fn pause(&self, time: Duration) {
        match time {
            Duration::ZERO => tokio::task::yield_now().await,
            time => tokio::time::sleep(time).await,
        }
    }
}

impl Default for World {
    fn default() -> World {
        World::new()
    }
}

impl std::fmt::Debug for World {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("World").field("residue", &self.residue()).finish_non_exhaustive()
    }
}

/// A call that was dropped at its gate does not stay there.
struct Gate<'a> {
    world: &'a World,
    ticket: u64,
}

impl Drop for Gate<'_> {
    fn drop(&mut self) {
        self.world.turn(|hw| hw.parked.retain(|(ticket, _)| *ticket != self.ticket));
    }
}
