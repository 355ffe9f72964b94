//! The machines of a pool, each in a slot, counted as they move. No operation looks at more than one of them.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::hash::{BuildHasherDefault, Hasher};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::Instant;

use super::lease::Hold;
use super::plan::{Counts, Tier};
use super::status::{VmPhase, VmStatus};
use crate::error::Result;
use crate::instance::Instance;
use crate::spec::Id;

/// A slot's number; never used twice, so that a late message cannot mean another machine.
pub(super) type SlotNo = u64;

/// Dropped, it ends the task that works on a machine.
pub(super) type Cancel = oneshot::Sender<()>;

/// What happens to a machine. One that was given back may be deleted to be made `again` under its name, for that tier.
pub(super) enum Phase {
    Creating { tier: Tier, _cancel: Cancel },
    Ready { tier: Tier, number: u64 },
    Promoting { _cancel: Cancel },
    Demoting { tier: Tier, _cancel: Cancel },
    Granted { hold: Arc<Hold>, number: u64 },
    Held { hold: Arc<Hold> },
    Keeping { _cancel: Cancel },
    Kept,
    Deleting { hung: bool, again: Option<Tier> },
    Leaked,
}

/// One machine and what the pool knows of it.
pub(super) struct Slot {
    pub id: Id,
    pub instance: Option<Instance>,
    pub phase: Phase,
    pub since: Instant,
    pub born: Instant,
    /// When it became ready; kept when an acquire gives it back unused.
    pub ready: Instant,
    /// When its agent last answered.
    pub answered: Instant,
    pub checking: bool,
    pub expired: bool,
    pub attempt: u64,
    pub holder: Option<Arc<str>>,
    pub labels: Arc<BTreeMap<String, String>>,
    /// Its replacement was requested, or it needs none: whatever else happens to it, not again.
    pub released: bool,
    /// Somebody held it.
    pub used: bool,
    /// Kept for debugging until then, also while somebody looks at it.
    pub capsule: Option<Instant>,
    pub watched: bool,
    pub orphan: bool,
    /// Deletions that failed.
    pub failures: u32,
    pub problem: Option<String>,
    /// How long its lease may last, and since when its caller waited.
    pub limit: (Option<Duration>, Instant),
    /// Who waits for its deletion.
    pub deleted: Vec<oneshot::Sender<Result<()>>>,
    timer: Option<Instant>,
}

/// All of them.
#[derive(Default)]
pub(super) struct Slots {
    slots: HashMap<SlotNo, Box<Slot>, BuildHasherDefault<Spread>>,
    ready: [BTreeMap<u64, SlotNo>; 3],
    expired: [BTreeSet<SlotNo>; 3],
    timers: BTreeSet<(Instant, SlotNo)>,
    counts: Counts,
    last: SlotNo,
    last_number: u64,
}

impl Slots {
    pub(super) fn counts(&self) -> &Counts {
        &self.counts
    }

    pub(super) fn is_empty(&self) -> bool {
        self.slots.is_empty()
    }

    pub(super) fn insert(&mut self, id: Id, phase: Phase, attempt: u64, now: Instant) -> SlotNo {
        self.last += 1;
        let slot = Slot {
            id,
            instance: None,
            phase,
            since: now,
            born: now,
            ready: now,
            answered: now,
            checking: false,
            expired: false,
            attempt,
            holder: None,
            labels: Arc::default(),
            released: false,
            used: false,
            capsule: None,
            watched: false,
            orphan: false,
            failures: 0,
            problem: None,
            limit: (None, now),
            deleted: Vec::new(),
            timer: None,
        };
        count(&mut self.counts, &slot, 1);
        self.slots.insert(self.last, Box::new(slot));
        self.last
    }

    pub(super) fn get(&self, no: SlotNo) -> Option<&Slot> {
        self.slots.get(&no).map(|slot| &**slot)
    }

    /// Changes a machine's data, and with it what it counts as.
    pub(super) fn update<T>(&mut self, no: SlotNo, change: impl FnOnce(&mut Slot) -> T) -> Option<T> {
        let slot = self.slots.get_mut(&no)?;
        count(&mut self.counts, slot, -1);
        let before = place(slot);
        let result = change(slot);
        count(&mut self.counts, slot, 1);
        let after = place(slot);
        if before != after {
            if let Some((tier, number, expired)) = before {
                self.ready[tier as usize].remove(&number);
                if expired {
                    self.expired[tier as usize].remove(&no);
                }
            }
            if let Some((tier, number, expired)) = after {
                self.ready[tier as usize].insert(number, no);
                if expired {
                    self.expired[tier as usize].insert(no);
                }
            }
        }
        Some(result)
    }

    /// Moves a machine to its next phase.
    pub(super) fn enter(&mut self, no: SlotNo, phase: Phase, now: Instant) {
        self.update(no, |slot| {
            slot.phase = phase;
            slot.since = now;
        });
        self.alarm(no, None);
    }

    /// A number for a machine that becomes ready: the largest is handed over first.
    pub(super) fn ready_number(&mut self) -> u64 {
        self.last_number += 1;
        self.last_number
    }

    /// The machine that became ready last, and is handed over next: it has rested least, so more of it is in the processors' caches
    /// than of any other.
    pub(super) fn newest_ready(&self, tier: Tier) -> Option<SlotNo> {
        self.ready[tier as usize].last_key_value().map(|(_, no)| *no)
    }

    /// The machine that has been ready longest: what goes when there are too many.
    pub(super) fn oldest_ready(&self, tier: Tier) -> Option<SlotNo> {
        self.ready[tier as usize].first_key_value().map(|(_, no)| *no)
    }

    pub(super) fn first_expired(&self, tier: Tier) -> Option<SlotNo> {
        self.expired[tier as usize].first().copied()
    }

    pub(super) fn remove(&mut self, no: SlotNo) -> Option<Box<Slot>> {
        self.alarm(no, None);
        let slot = self.slots.remove(&no)?;
        count(&mut self.counts, &slot, -1);
        if let Some((tier, number, expired)) = place(&slot) {
            self.ready[tier as usize].remove(&number);
            if expired {
                self.expired[tier as usize].remove(&no);
            }
        }
        Some(slot)
    }

    /// Sets when a machine is to be looked at.
    pub(super) fn alarm(&mut self, no: SlotNo, at: Option<Instant>) {
        let Some(slot) = self.slots.get_mut(&no) else { return };
        if slot.timer == at {
            return;
        }
        if let Some(before) = slot.timer {
            self.timers.remove(&(before, no));
        }
        slot.timer = at;
        if let Some(at) = at {
            self.timers.insert((at, no));
        }
    }

    pub(super) fn next_alarm(&self) -> Option<Instant> {
        self.timers.first().map(|(at, _)| *at)
    }

    /// The next machine whose time has come; its alarm is off.
    pub(super) fn due(&mut self, now: Instant) -> Option<SlotNo> {
        let (_, no) = self.timers.first().copied().filter(|(at, _)| *at <= now)?;
        self.alarm(no, None);
        Some(no)
    }

    /// All of them, in the order they were made.
    pub(super) fn numbers(&self) -> Vec<SlotNo> {
        let mut numbers: Vec<SlotNo> = self.slots.keys().copied().collect();
        numbers.sort_unstable();
        numbers
    }

    pub(super) fn by_id(&self, id: &Id) -> Option<SlotNo> {
        self.slots.iter().find(|(_, slot)| slot.id == *id).map(|(no, _)| *no)
    }

    pub(super) fn status(&self, now: Instant) -> Vec<VmStatus> {
        self.numbers().into_iter().filter_map(|no| self.slots.get(&no)).map(|slot| slot.status(now)).collect()
    }
}

impl Slot {
    pub(super) fn status(&self, now: Instant) -> VmStatus {
        VmStatus {
            id: self.id.clone(),
            phase: self.vm_phase(),
            state: self.instance.as_ref().map(Instance::state),
            since: now.duration_since(self.since),
            age: now.duration_since(self.born),
            attempt: self.attempt,
            holder: self.holder.as_deref().map(str::to_owned),
            labels: (*self.labels).clone(),
            problem: self.problem.clone(),
        }
    }

    fn vm_phase(&self) -> VmPhase {
        match &self.phase {
            Phase::Creating { tier, .. } => VmPhase::Creating(*tier),
            Phase::Ready { tier, .. } => VmPhase::Ready(*tier),
            Phase::Promoting { .. } => VmPhase::Promoting,
            Phase::Demoting { tier, .. } => VmPhase::Demoting(*tier),
            Phase::Granted { .. } => VmPhase::Granted,
            Phase::Held { .. } if self.released => VmPhase::Stopped,
            Phase::Held { .. } => VmPhase::Held,
            Phase::Keeping { .. } => VmPhase::Keeping,
            Phase::Kept => VmPhase::Kept,
            Phase::Deleting { again: Some(tier), .. } => VmPhase::Resetting(*tier),
            Phase::Deleting { hung: true, .. } => VmPhase::Hung,
            Phase::Deleting { hung: false, .. } => VmPhase::Deleting,
            Phase::Leaked => VmPhase::Leaked,
        }
    }
}

/// Slots are numbered by us, one after the other: nobody can choose them so that they collide.
#[derive(Default)]
struct Spread(u64);

impl Hasher for Spread {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|byte| self.write_u64(u64::from(*byte)));
    }

    fn write_u64(&mut self, number: u64) {
        self.0 = (self.0 ^ number).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }
}

/// Where a machine is among the ready ones.
fn place(slot: &Slot) -> Option<(Tier, u64, bool)> {
    match slot.phase {
        Phase::Ready { tier, number } => Some((tier, number, slot.expired)),
        Phase::Creating { .. }
        | Phase::Promoting { .. }
        | Phase::Demoting { .. }
        | Phase::Granted { .. }
        | Phase::Held { .. }
        | Phase::Keeping { .. }
        | Phase::Kept
        | Phase::Deleting { .. }
        | Phase::Leaked => None,
    }
}

fn count(counts: &mut Counts, slot: &Slot, by: isize) {
    let place = match slot.phase {
        Phase::Creating { tier, .. } => counts.creating.of_mut(tier),
        Phase::Ready { tier, .. } => {
            if slot.expired {
                add(counts.expired.of_mut(tier), by);
            }
            counts.ready.of_mut(tier)
        }
        Phase::Promoting { .. } => &mut counts.promoting,
        Phase::Demoting { tier, .. } => counts.demoting.of_mut(tier),
        Phase::Held { .. } if slot.capsule.is_some() => &mut counts.kept,
        Phase::Held { .. } if slot.released => &mut counts.stopped,
        Phase::Granted { .. } | Phase::Held { .. } => &mut counts.unreleased,
        Phase::Keeping { .. } | Phase::Kept => &mut counts.kept,
        Phase::Deleting { again: Some(tier), .. } => counts.creating.of_mut(tier),
        Phase::Deleting { hung: false, .. } => &mut counts.deleting,
        Phase::Deleting { hung: true, .. } => &mut counts.hung,
        Phase::Leaked => &mut counts.leaked,
    };
    add(place, by);
}

// Not saturating: a count that is wrong shall be seen, not hidden.
fn add(count: &mut usize, by: isize) {
    *count = count.checked_add_signed(by).expect("a machine is counted once");
}
