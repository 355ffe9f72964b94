//! What the agent does a while later, when nobody waits for it.

use std::sync::Mutex;
use std::time::{Duration, Instant};

use tokio::sync::Notify;
use tokio::time::sleep_until;

use super::{Inner, lock, renew};

/// How long after a command the agent makes a spare: whoever asks next is answered first, and where many machines were asked at once,
/// those that have answered do not keep the others from it.
const REST: Duration = Duration::from_secs(1);
/// How long after a guest became another it writes that down, should nothing make it do so before: most are gone by then, and a pool
/// that is being filled is not kept from it by those that are ready. One that is killed before boots as somebody new.
const SETTLES: Duration = Duration::from_secs(60);

/// When each of them is due.
#[derive(Default)]
pub(super) struct Chores {
    due: Mutex<Due>,
    changed: Notify,
}

#[derive(Clone, Copy, Default)]
struct Due {
    spare: Option<Instant>,
    settle: Option<Instant>,
}

impl Due {
    fn next(self) -> Option<Instant> {
        [self.spare, self.settle].into_iter().flatten().min()
    }
}

impl Inner {
    /// A spare is to be made in a moment, unless there is one.
    pub fn spare_soon(&self) {
        if self.spares.is_missing() {
            self.later(|due| due.spare = due.spare.or_else(|| Some(Instant::now() + REST)));
        }
    }

    /// Who this guest is, is to be written down in a while.
    pub fn settle_later(&self) {
        self.later(|due| due.settle = Some(Instant::now() + SETTLES));
    }

    /// Who this guest is, is not to be written down.
    pub fn settle_not(&self) {
        self.later(|due| due.settle = None);
    }

    fn later(&self, change: impl FnOnce(&mut Due)) {
        change(&mut lock(&self.chores.due));
        if !self.quiet.is_kept() {
            self.chores.tell();
        }
    }
}

impl Chores {
    /// When the next is due.
    pub fn next(&self) -> Option<Instant> {
        lock(&self.due).next()
    }

    /// Tells who does them in the runtime that there may be others now.
    pub fn tell(&self) {
        self.changed.notify_one();
    }

    /// Does what is due.
    pub fn run(&self, agent: &Inner) {
        let now = Instant::now();
        let is_due = |at: &mut Option<Instant>| at.take_if(|at| *at <= now).is_some();
        let (spare, settle) = {
            let mut due = lock(&self.due);
            (is_due(&mut due.spare), is_due(&mut due.settle))
        };
        if spare {
            agent.spares.make();
        }
        if settle {
            renew::settle(agent);
        }
    }

    /// Does them in the runtime, as long as that runs.
    pub async fn keep_doing(agent: std::sync::Arc<Inner>) {
        let chores = &agent.chores;
        loop {
            let next = chores.next();
            tokio::select! {
                () = chores.changed.notified() => {}
                () = async { sleep_until(next.unwrap_or_else(Instant::now).into()).await }, if next.is_some() => {}
            }
            chores.run(&agent);
        }
    }
}
