//! What a pool looks like at one moment.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::Serialize;

use super::plan::{Counts, Tier};
use crate::spec::Id;
use crate::state::State;

/// A pool at one moment, all parts of the same one.
#[derive(Clone, Debug, Serialize)]
pub struct PoolStatus {
    /// Its name.
    pub name: String,
    /// Where it is in its life.
    pub phase: PoolPhase,
    /// How many machines it should have now.
    pub target: usize,
    /// How many it has, by what happens to them.
    pub counts: Counts,
    /// What happened so far.
    pub totals: Totals,
    /// The number of the last event.
    pub sequence: u64,
    /// Each machine.
    pub vms: Vec<VmStatus>,
    /// Why machines cannot be made, when they cannot.
    pub trouble: Option<Trouble>,
}

/// Where a pool is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum PoolPhase {
    /// Built, not started.
    New,
    /// Looking for what an earlier process left.
    Starting,
    /// In use.
    Open,
    /// Closing, or closed with something left that could not be deleted.
    Closing,
    /// Closed; nothing is left.
    Closed,
}

/// What happened so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Totals {
    /// Attempts to make a machine.
    pub attempts: u64,
    /// Of those, the ones that failed.
    pub failed: u64,
    /// Machines handed over.
    pub acquired: u64,
    /// Leases that are over.
    pub released: u64,
    /// Replacements requested.
    pub replacements: u64,
    /// Machines deleted, those of failed attempts included.
    pub deleted: u64,
    /// Deletions that failed; each is tried again.
    pub delete_failures: u64,
    /// Machines left to their holders at close.
    pub retained: u64,
    /// Machines that were found dead or unfit before anybody had them.
    pub unfit: u64,
    /// Machines exchanged for their age, or since nobody wanted them.
    pub recycled: u64,
}

/// One machine of a pool.
#[derive(Clone, Debug, Serialize)]
pub struct VmStatus {
    /// Its name.
    pub id: Id,
    /// What happens to it.
    pub phase: VmPhase,
    /// Its state; absent before its backend knows of it.
    pub state: Option<State>,
    /// How long it has been in this phase.
    pub since: Duration,
    /// How old it is.
    pub age: Duration,
    /// Which attempt made it; 0 for what an earlier process left.
    pub attempt: u64,
    /// Who holds it, as the acquire said.
    pub holder: Option<String>,
    /// What the acquire marked it with.
    pub labels: BTreeMap<String, String>,
    /// What went wrong with it last.
    pub problem: Option<String>,
}

/// What happens to a machine of a pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum VmPhase {
    /// Being made.
    Creating(Tier),
    /// Ready.
    Ready(Tier),
    /// Being started.
    Promoting,
    /// Being cooled down.
    Demoting(Tier),
    /// On its way to a caller.
    Granted,
    /// Held.
    Held,
    /// Released, and held still.
    Stopped,
    /// Being suspended, to be kept for debugging.
    Keeping,
    /// Kept for debugging.
    Kept,
    /// Given back, and being deleted, to be made again under its name.
    Resetting(Tier),
    /// Being deleted.
    Deleting,
    /// Half made by an attempt that failed, and being deleted.
    Hung,
    /// Could not be deleted; tried again.
    Leaked,
}

/// Why machines cannot be made, and when it is tried again.
#[derive(Clone, Debug, Serialize)]
pub struct Trouble {
    /// The last attempt's error.
    pub error: String,
    /// Failures in a row.
    pub failures: u32,
    /// How long until the next attempt.
    pub next_attempt: Duration,
}
