//! Failed leases that are kept for debugging.

use std::sync::Arc;

use tokio::sync::oneshot;
use tokio::time::Instant;

use super::backoff::after;
use super::lease::{Hold, Lease};
use super::message::Message;
use super::plan::Tier;
use super::slots::{Phase, SlotNo};
use super::supervisor::Supervisor;
use super::tasks;
use crate::error::{Error, ErrorKind, Result};
use crate::spec::Id;
use crate::state::State;

impl Supervisor {
    /// Whether a lease that was dropped is kept; then that has begun.
    pub(super) fn keeps(&mut self, no: SlotNo, failed: bool, now: Instant) -> bool {
        let Some(policy) = self.shared.config.keep_failed.filter(|_| self.is_open()) else { return false };
        let Some(slot) = self.slots.get(no) else { return false };
        let Some(instance) = slot.instance.clone() else { return false };
        let until = match slot.capsule {
            // Somebody has looked at it: it goes on being kept, as long as was promised.
            Some(until) => until,
            // A lease that its holder has stopped was finished with.
            None if failed && !slot.released && self.slots.counts().kept < policy.quota => after(now, policy.period),
            None => return false,
        };
        let tier = if instance.suspendable() { Tier::Suspended } else { Tier::Stopped };
        self.release(no, None, now);
        self.slots.update(no, |slot| {
            slot.capsule = Some(until);
            slot.problem.get_or_insert_with(|| "its lease failed".to_owned());
        });
        match instance.state() {
            State::Running => {
                let (cancel, cancelled) = oneshot::channel();
                self.slots.enter(no, Phase::Keeping { _cancel: cancel }, now);
                let (grace, limit) = (self.shared.config.stop_timeout, self.shared.config.create_timeout);
                self.task(async move {
                    // It is for looking at: nobody is to have it soon.
                    Message::Kept(no, tasks::demote(instance, tier, false, grace, limit, cancelled).await)
                });
            }
            // Off, or broken: what is there is kept as it is.
            _ => self.keep(no, now),
        }
        true
    }

    fn keep(&mut self, no: SlotNo, now: Instant) {
        let until = self.slots.get(no).and_then(|slot| slot.capsule);
        self.slots.enter(no, Phase::Kept, now);
        self.slots.alarm(no, until);
    }

    pub(super) fn on_kept(&mut self, no: SlotNo, result: Result<()>, now: Instant) {
        if !self.slots.get(no).is_some_and(|slot| matches!(slot.phase, Phase::Keeping { .. })) {
            return;
        }
        match result {
            Ok(()) if self.is_open() => self.keep(no, now),
            Ok(()) => self.delete(no, false, now),
            Err(error) => {
                self.slots.update(no, |slot| slot.problem = Some(format!("it could not be kept: {error}")));
                self.delete(no, false, now);
            }
        }
    }

    pub(super) fn take_kept(&mut self, id: &Id, now: Instant) -> Result<Lease> {
        let kept = self.slots.by_id(id).and_then(|no| {
            let slot = self.slots.get(no)?;
            let capsule = slot.capsule?;
            matches!(slot.phase, Phase::Kept).then(|| slot.instance.clone().map(|instance| (no, capsule, instance)))?
        });
        let Some((no, until, instance)) = kept else { return Err(not_kept(id)) };
        let hold = Arc::new(Hold::default());
        hold.take();
        self.slots.enter(no, Phase::Held { hold: hold.clone() }, now);
        self.slots.alarm(no, Some(until));
        // Nobody reads the answer any more: the lease is dropped, and it is kept again.
        Ok(Lease::new(instance, no, hold, self.shared.clone()))
    }

    pub(super) fn discard_kept(&mut self, id: &Id, reply: oneshot::Sender<Result<()>>, now: Instant) {
        let kept = self.slots.by_id(id).filter(|no| {
            self.slots.get(*no).is_some_and(|slot| slot.capsule.is_some() && matches!(slot.phase, Phase::Kept))
        });
        match kept {
            Some(no) => self.on_delete(no, reply, now),
            None => drop(reply.send(Err(not_kept(id)))),
        }
    }
}

fn not_kept(id: &Id) -> Error {
    Error::new(ErrorKind::NotFound, "no failed lease of that name is kept, or somebody has it")
        .on(id.as_str())
        .hint("the pool's status lists those that are kept")
}
