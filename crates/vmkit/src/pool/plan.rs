//! What is to be done next, from counts alone. Pure: no clock, no lock, no machine.

use tokio::time::Instant;

/// How ready a machine is kept. Ordered from the hottest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize)]
pub enum Tier {
    /// Up: handed over after a health check.
    Running,
    /// Its execution is saved: resumed at acquire.
    Suspended,
    /// Cloned and off: started at acquire.
    Stopped,
}

impl Tier {
    /// Every tier, the hottest first.
    pub const ALL: [Tier; 3] = [Tier::Running, Tier::Suspended, Tier::Stopped];

    /// The name, as it is printed and parsed.
    pub const fn name(self) -> &'static str {
        match self {
            Tier::Running => "running",
            Tier::Suspended => "suspended",
            Tier::Stopped => "stopped",
        }
    }
}

/// A number of machines in each tier.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Tiers {
    /// Running.
    pub running: usize,
    /// Suspended.
    pub suspended: usize,
    /// Stopped.
    pub stopped: usize,
}

impl Tiers {
    /// All of them in one tier.
    pub fn only(tier: Tier, count: usize) -> Tiers {
        let mut tiers = Tiers::default();
        *tiers.of_mut(tier) = count;
        tiers
    }

    /// How many in a tier.
    pub fn of(&self, tier: Tier) -> usize {
        match tier {
            Tier::Running => self.running,
            Tier::Suspended => self.suspended,
            Tier::Stopped => self.stopped,
        }
    }

    /// How many in a tier, to be changed.
    pub fn of_mut(&mut self, tier: Tier) -> &mut usize {
        match tier {
            Tier::Running => &mut self.running,
            Tier::Suspended => &mut self.suspended,
            Tier::Stopped => &mut self.stopped,
        }
    }

    /// How many in all.
    pub fn sum(&self) -> usize {
        self.running + self.suspended + self.stopped
    }

    /// The same preference for another number of machines: the hotter tiers keep theirs, the coldest one that is used
    /// gives and takes.
    pub fn split(&self, total: usize) -> Tiers {
        let coldest = Tier::ALL.into_iter().rev().find(|&tier| self.of(tier) > 0).unwrap_or(Tier::Running);
        let mut rest = total;
        let mut split = Tiers::default();
        for tier in Tier::ALL {
            let part = if tier == coldest { rest } else { self.of(tier).min(rest) };
            *split.of_mut(tier) = part;
            rest -= part;
        }
        split
    }
}

/// The machines of a pool by what happens to them, and who waits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Counts {
    /// Being made, or made again, by the tier they are made for.
    pub creating: Tiers,
    /// Ready to be acquired.
    pub ready: Tiers,
    /// Of the ready ones, those that are older, or have idled longer, than they should.
    pub expired: Tiers,
    /// Being started or resumed.
    pub promoting: usize,
    /// Being suspended or stopped, because nobody wanted them after all; by the tier they go to.
    pub demoting: Tiers,
    /// On their way to a waiter, or held and not released.
    pub unreleased: usize,
    /// Released, and held still: their holder collects what is left on the disk.
    pub stopped: usize,
    /// Failed leases kept for debugging.
    pub kept: usize,
    /// Being deleted.
    pub deleting: usize,
    /// Half made by an attempt that failed or hung, until they are gone.
    pub hung: usize,
    /// Could not be deleted; tried again.
    pub leaked: usize,
    /// Callers in the queue.
    pub waiting: usize,
}

impl Counts {
    /// Those that hang or could not be deleted: what the allowance is for.
    pub fn stuck(&self) -> usize {
        self.hung + self.leaked
    }

    /// Creating, ready, on their way between tiers, and unreleased: what the size limits.
    pub fn counted(&self) -> usize {
        self.creating.sum() + self.settled()
    }

    fn settled(&self) -> usize {
        self.ready.sum() + self.promoting + self.demoting.sum() + self.unreleased
    }

    /// Every machine that there may be.
    pub fn all(&self) -> usize {
        self.counted() + self.stopped + self.kept + self.deleting + self.stuck()
    }
}

/// How many machines there should be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// The size, and which tiers it is made of.
    pub tiers: Tiers,
    /// When there is one, the pool grows and shrinks so that this many are ready.
    pub min_ready: Option<usize>,
    /// The most there may be: the size, unless more was allowed.
    pub max: usize,
    /// How many more there may be for attempts that hang, deletions that fail and the exchange of old machines.
    pub allowance: usize,
    /// Creations at once.
    pub concurrency: usize,
}

/// How large a pool should be. Replace it to follow demand, a schedule, a price; it must be pure.
pub trait Sizing: Send + Sync + 'static {
    /// How many machines there should be in all, ready, being made and unreleased. What is beyond [`Limits::max`] is
    /// cut off.
    fn total(&self, counts: &Counts, limits: &Limits) -> usize;
}

/// The sizing that a pool has by default: its size, or with a minimum kept ready, as many more as are in use and waited
/// for.
#[derive(Clone, Copy, Debug, Default)]
pub struct DefaultSizing;

impl Sizing for DefaultSizing {
    fn total(&self, counts: &Counts, limits: &Limits) -> usize {
        match limits.min_ready {
            None => limits.tiers.sum(),
            Some(ready) => counts.unreleased + counts.waiting + ready,
        }
    }
}

/// When something may be tried again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Gate {
    /// Failures in a row; while there are any, one attempt at a time.
    pub failures: u32,
    /// Not before this.
    pub opens: Option<Instant>,
}

impl Gate {
    fn open(&self, now: Instant) -> bool {
        self.opens.is_none_or(|at| at <= now)
    }

    /// How many may be under way.
    fn room(&self, limit: usize, under_way: usize) -> usize {
        let limit = if self.failures > 0 { 1 } else { limit };
        limit.saturating_sub(under_way)
    }
}

/// What is to be done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Steps {
    /// Running machines to be handed to that many waiters.
    pub hand_over: usize,
    /// Suspended machines to be resumed.
    pub resume: usize,
    /// Stopped machines to be started.
    pub boot: usize,
    /// Running machines to be cooled down, by where to.
    pub demote: Tiers,
    /// Machines to be made, by what for.
    pub create: Tiers,
    /// Ready machines to be deleted, by where they are.
    pub trim: Tiers,
    /// Of those to be deleted, the ones whose time has passed.
    pub recycle: Option<Tier>,
    /// Nothing is ready, under way or to be tried now, since the last attempts failed.
    pub stranded: bool,
    /// When to look again although nothing has happened.
    pub wake: Option<Instant>,
}

/// The next steps.
///
/// Handing over comes first, then starting cold machines for those who wait, and then the background: exchange of what is
/// surplus, tiers, new machines. Nothing is made while somebody's cold machine starts, unless more wait than those will
/// serve.
pub fn plan(now: Instant, counts: &Counts, limits: &Limits, total: usize, start: &Gate, create: &Gate) -> Steps {
    let mut steps = Steps { hand_over: counts.waiting.min(counts.ready.running), ..Steps::default() };
    let mut ready = counts.ready;
    ready.running -= steps.hand_over;
    let unreleased = counts.unreleased + steps.hand_over;
    let waiting = counts.waiting - steps.hand_over;
    let total = total.min(limits.max);
    let excess = counts.stuck().saturating_sub(limits.allowance);
    let goal = limits.tiers.split(total.saturating_sub(unreleased + excess));

    let mut promote = |ready: &mut Tiers, count: usize| {
        let resume = count.min(ready.suspended);
        let boot = (count - resume).min(ready.stopped);
        ready.suspended -= resume;
        ready.stopped -= boot;
        steps.resume += resume;
        steps.boot += boot;
        resume + boot
    };
    let mut promoting = counts.promoting;
    if start.open(now) {
        let wanted = waiting.saturating_sub(promoting).min(start.room(usize::MAX, promoting));
        promoting += promote(&mut ready, wanted);
        // In the background only as far as that leaves a processor for the others.
        let short = goal.running.saturating_sub(ready.running + promoting + counts.creating.running);
        let room = start.room(limits.concurrency, promoting + counts.creating.sum());
        promoting += promote(&mut ready, short.min(room));
    }

    // What is surplus goes; what is only too hot is cooled down where a colder tier is short. What hangs keeps new machines
    // from being made, and is no reason to give up one that is ready.
    let mut surplus = (ready.sum() + promoting + counts.demoting.sum() + unreleased).saturating_sub(total);
    if surplus > 0
        && let Some(tier) = Tier::ALL.into_iter().find(|&tier| counts.expired.of(tier) > 0 && ready.of(tier) > 0)
    {
        steps.recycle = Some(tier);
        *ready.of_mut(tier) -= 1;
        surplus -= 1;
    }
    if waiting == 0 {
        for tier in Tier::ALL.into_iter().rev() {
            let here = surplus.min(ready.of(tier).saturating_sub(goal.of(tier)));
            *steps.trim.of_mut(tier) += here;
            *ready.of_mut(tier) -= here;
            surplus -= here;
        }
        for tier in [Tier::Suspended, Tier::Stopped] {
            let too_hot = ready.running.saturating_sub(goal.running);
            let have = ready.of(tier) + counts.demoting.of(tier) + counts.creating.of(tier);
            let here = too_hot.min(goal.of(tier).saturating_sub(have));
            *steps.demote.of_mut(tier) += here;
            ready.running -= here;
        }
    }

    // New machines, one more while an old one waits for its exchange and the allowance is not needed otherwise.
    let aged = Tier::ALL.into_iter().find(|&tier| counts.expired.of(tier) > 0 && ready.of(tier) > 0);
    let aged = aged.filter(|_| steps.recycle.is_none());
    let exchange = usize::from(aged.is_some() && total > 0 && counts.stuck() < limits.allowance);
    let have = ready.sum()
        + promoting
        + counts.demoting.sum()
        + steps.demote.sum()
        + counts.creating.sum()
        + unreleased
        + excess;
    let missing = (total + exchange).saturating_sub(have);
    let yields = promoting > 0 && waiting <= promoting;
    let mut room = if yields { 0 } else { create.room(limits.concurrency, counts.creating.sum()) };
    if !create.open(now) {
        if missing > 0 && room > 0 {
            steps.wake = create.opens;
        }
        room = 0;
    }
    let mut making = counts.creating;
    for _ in 0..missing.min(room) {
        let hot = ready.running + promoting;
        let short = Tier::ALL.into_iter().find(|&tier| {
            let there = match tier {
                Tier::Running => hot,
                Tier::Suspended => ready.suspended + counts.demoting.suspended + steps.demote.suspended,
                Tier::Stopped => ready.stopped + counts.demoting.stopped + steps.demote.stopped,
            };
            there + making.of(tier) < goal.of(tier)
        });
        let Some(tier) = short.or(aged) else { break };
        *making.of_mut(tier) += 1;
        *steps.create.of_mut(tier) += 1;
    }
    if !start.open(now) && ready.suspended + ready.stopped > 0 && (waiting > 0 || goal.running > ready.running) {
        steps.wake = [steps.wake, start.opens].into_iter().flatten().min();
    }
    let idle = promoting == 0 && making.sum() == 0;
    let cold = ready.suspended + ready.stopped > 0 && start.failures == 0;
    steps.stranded =
        idle && !cold && counts.ready.running == steps.hand_over && create.failures.max(start.failures) > 0;
    steps
}
