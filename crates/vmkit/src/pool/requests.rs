//! What callers and leases ask of a pool.

use std::sync::Arc;

use tokio::sync::oneshot;
use tokio::time::Instant;

use super::acquire::{Grant, Place};
use super::backoff::after;
use super::config::{LARGEST, OnFailure};
use super::events::{Details, EventKind};
use super::lease::Hold;
use super::message::Waiter;
use super::plan::Tier;
use super::slots::{Phase, SlotNo};
use super::supervisor::Supervisor;
use crate::error::{Error, ErrorKind, Result};
use crate::state::State;

impl Supervisor {
    pub(super) fn on_acquire(&mut self, mut waiter: Box<Waiter>, now: Instant) {
        if !self.is_open() {
            let holder = waiter.who.holder.clone();
            self.event(
                EventKind::AttemptToUseClosedPool,
                None,
                Details { holder: holder.as_ref(), ..Details::default() },
            );
            return self.refuse(*waiter, self.shared.closed());
        }
        // Ready, and nobody before it: no place in the queue is needed. It has its turn all the same, should what it is given
        // turn out dead.
        if self.queue.len() == 0 && self.slots.newest_ready(Tier::Running).is_some() {
            waiter.who.turn = Some(self.queue.pass(self.weight(&waiter.who.key)));
            match self.grant(waiter, now) {
                None => return,
                Some(back) => waiter = back,
            }
        }
        if self.queue.len() >= self.shared.config.max_waiting {
            let message = format!("{} callers wait for the pool {} already", self.queue.len(), self.shared.name);
            let error = Error::new(ErrorKind::Exhausted, message).during("Acquire");
            return self.refuse(*waiter, error.hint("try again later, or make the pool larger"));
        }
        self.event(
            EventKind::AcquireWaiting,
            None,
            Details { holder: waiter.who.holder.as_ref(), ..Details::default() },
        );
        self.enqueue(waiter);
    }

    fn enqueue(&mut self, waiter: Box<Waiter>) {
        let (ticket, key) = (waiter.who.ticket, waiter.who.key.clone());
        match waiter.who.turn {
            Some(turn) => self.queue.put_back(ticket, key, turn, waiter),
            None => {
                let weight = self.weight(&key);
                self.queue.push(ticket, key, weight, waiter);
            }
        }
    }

    fn weight(&self, key: &str) -> u32 {
        self.shared.config.weights.get(key).copied().unwrap_or(1)
    }

    /// Hands the next running machine to a waiter; gives the waiter back when there is none.
    pub(super) fn grant(&mut self, waiter: Box<Waiter>, now: Instant) -> Option<Box<Waiter>> {
        if waiter.who.deadline < now {
            // It has not looked since: a machine would wait for it in vain.
            let error = Error::new(ErrorKind::TimedOut, "no machine within its time").during("Acquire");
            self.refuse(*waiter, error.hint("wait longer, or make the pool larger"));
            return None;
        }
        loop {
            let Some(no) = self.slots.newest_ready(Tier::Running) else { return Some(waiter) };
            let Some(instance) = self.instance(no) else { return Some(waiter) };
            if instance.state() != State::Running {
                // It has died this instant; what says so is on its way.
                self.unfit(no, "it was found dead", now);
                continue;
            }
            let hold = Arc::new(Hold::default());
            let number = self.slots.get(no).and_then(|slot| match slot.phase {
                Phase::Ready { number, .. } => Some(number),
                _ => None,
            });
            let answered = self.slots.get(no).map_or(now, |slot| slot.answered);
            self.slots.enter(no, Phase::Granted { hold: hold.clone(), number: number.unwrap_or_default() }, now);
            self.slots.update(no, |slot| {
                slot.holder = waiter.who.holder.clone();
                slot.labels = waiter.who.labels.clone();
            });
            self.metrics.queued.record(now.duration_since(waiter.who.since).as_secs_f64());
            self.event(EventKind::VmDequeued, Some(no), Details::default());
            let Waiter { who: claimant, reply } = *waiter;
            let lasts = (claimant.limit, claimant.since);
            self.slots.update(no, |slot| slot.limit = lasts);
            self.slots.alarm(no, Some(Grant::expires(&claimant)));
            let grant = Grant::new(no, instance, hold, self.mailbox.clone(), answered, claimant);
            // Nobody there any more: the grant comes back as it was, by itself.
            let _ = reply.send(Ok(grant));
            return None;
        }
    }

    pub(super) fn refuse(&mut self, waiter: Waiter, error: Error) {
        let details = Details {
            holder: waiter.who.holder.as_ref(),
            duration: Some(waiter.who.since.elapsed()),
            error: Some(&error),
            ..Details::default()
        };
        self.event(EventKind::AcquireFailed, None, details);
        let _ = waiter.reply.send(Err(error));
    }

    /// Refuses everybody in the queue.
    pub(super) fn refuse_all(&mut self, error: &Error) {
        while let Some((_, waiter)) = self.queue.pop() {
            self.refuse(*waiter, error.duplicate());
        }
    }

    /// Nothing is ready and nothing can be made now: by policy, whoever waits is told.
    pub(super) fn strand(&mut self) {
        if self.shared.config.on_failure != OnFailure::FailFast {
            return;
        }
        let Some(error) = self.last_error.as_ref().map(Error::duplicate) else { return };
        self.refuse_all(&error);
        if let Some(starter) = self.starter.take() {
            let _ = starter.send(Err(error));
        }
    }

    pub(super) fn place(&self, ticket: u64) -> Option<Place> {
        let ahead = self.queue.ahead(ticket)?;
        Some(Place { ahead, estimate: self.pace.estimate(ahead, self.limits.concurrency) })
    }

    pub(super) fn resize(&mut self, size: usize) -> Result<()> {
        if !self.is_open() {
            return Err(self.shared.closed());
        }
        let max = self.shared.config.max.unwrap_or(LARGEST);
        if size > max {
            let message = format!("a size of {size} is more than the maximum of {max}");
            return Err(Error::new(ErrorKind::InvalidArgument, message).hint("choose a smaller one"));
        }
        // A maximum that nobody set follows the size.
        if self.shared.config.max.is_none() {
            self.limits.max = size.max(self.limits.min_ready.unwrap_or(0));
        }
        // From what was configured: a pool that was emptied still knows its tiers.
        let limits = self.shared.config.limits();
        self.limits.tiers = limits.tiers.split(size);
        self.full = false;
        Ok(())
    }

    pub(super) fn on_delivered(&mut self, no: SlotNo, now: Instant) {
        let Some(slot) = self.slots.get(no) else { return };
        let Phase::Granted { hold, .. } = &slot.phase else { return };
        let (hold, (limit, since)) = (hold.clone(), slot.limit);
        self.slots.enter(no, Phase::Held { hold }, now);
        self.slots.update(no, |slot| slot.used = true);
        self.slots.alarm(no, limit.map(|limit| after(now, limit)));
        self.totals.acquired += 1;
        if self.health.gate().failures > 0 {
            self.health.succeed();
            self.note_trouble(None);
        }
        let waited = now.duration_since(since);
        self.metrics.handed_over.record(waited.as_secs_f64());
        self.event(EventKind::Acquired, Some(no), Details { duration: Some(waited), ..Details::default() });
        if !self.is_open() {
            self.close_held(no, now);
        }
    }

    /// A machine that did not reach its caller.
    pub(super) fn on_back(&mut self, no: SlotNo, touched: bool, now: Instant) {
        let Some(slot) = self.slots.get(no) else { return };
        let Phase::Granted { number, .. } = &slot.phase else { return };
        let number = *number;
        let running = slot.instance.as_ref().is_some_and(|instance| instance.state() == State::Running);
        if !self.is_open() {
            return self.delete(no, false, now);
        }
        if touched || !running {
            return self.unfit(no, "its caller went away while it was being bound", now);
        }
        // Nobody had it: it takes its old place among the ready ones.
        self.slots.update(no, |slot| slot.holder = None);
        self.slots.enter(no, Phase::Ready { tier: Tier::Running, number }, now);
        self.set_alarm(no, now);
    }

    /// A machine that its caller found unfit.
    pub(super) fn on_rejected(
        &mut self,
        no: SlotNo,
        error: &Error,
        answered: bool,
        waiter: Option<Box<Waiter>>,
        now: Instant,
    ) {
        let granted = self.slots.get(no).is_some_and(|slot| matches!(slot.phase, Phase::Granted { .. }));
        if granted {
            self.event(EventKind::AcquireFailed, Some(no), Details { error: Some(error), ..Details::default() });
            self.unfit(no, &error.to_string(), now);
            // What the caller asked for wrongly says nothing about the pool.
            if !answered && error.kind() != ErrorKind::InvalidArgument && self.is_open() {
                self.health.fail(now, &mut self.random);
                self.note_trouble(Some(error));
            }
        }
        match waiter {
            Some(waiter) if self.is_open() => self.enqueue(waiter),
            Some(waiter) => self.refuse(*waiter, self.shared.closed()),
            None => {}
        }
    }

    /// Stopped by its holder, who has it still: the replacement is requested now.
    pub(super) fn on_stopped(&mut self, no: SlotNo, now: Instant) {
        if self.holds(no) {
            self.release(no, None, now);
        }
    }

    pub(super) fn on_dropped(&mut self, no: SlotNo, failed: bool, now: Instant) {
        if !self.holds(no) {
            return;
        }
        if self.keeps(no, failed, now) {
            return;
        }
        self.release(no, None, now);
        self.take_back(no, now);
    }

    pub(super) fn on_delete(&mut self, no: SlotNo, reply: oneshot::Sender<Result<()>>, now: Instant) {
        let Some(slot) = self.slots.get(no) else {
            // Gone already.
            return drop(reply.send(Ok(())));
        };
        let held = matches!(slot.phase, Phase::Held { .. });
        let begin = match slot.phase {
            Phase::Held { .. } | Phase::Leaked | Phase::Kept => true,
            // It is being deleted: its result is this one's too.
            Phase::Deleting { .. } => false,
            // A capsule that was given back; whoever had it is not its holder any more.
            Phase::Keeping { .. }
            | Phase::Creating { .. }
            | Phase::Ready { .. }
            | Phase::Promoting { .. }
            | Phase::Demoting { .. }
            | Phase::Granted { .. } => return drop(reply.send(Ok(()))),
        };
        self.slots.update(no, |slot| slot.deleted.push(reply));
        if begin {
            self.release(no, None, now);
            match held {
                true => self.take_back(no, now),
                false => self.delete(no, false, now),
            }
        }
    }

    fn holds(&self, no: SlotNo) -> bool {
        self.slots.get(no).is_some_and(|slot| matches!(slot.phase, Phase::Held { .. }))
    }

    /// Ends a lease, once: whoever comes second finds it done.
    pub(super) fn release(&mut self, no: SlotNo, error: Option<&Error>, now: Instant) {
        let Some(slot) = self.slots.get(no).filter(|slot| !slot.released && slot.used) else { return };
        let held = now.duration_since(slot.since);
        self.slots.update(no, |slot| slot.released = true);
        self.totals.released += 1;
        self.metrics.released.increment(1);
        self.event(EventKind::Release, Some(no), Details { duration: Some(held), error, ..Details::default() });
        if self.is_open() {
            self.totals.replacements += 1;
            self.full = false;
            self.event(EventKind::ReplenishStarted, Some(no), Details::default());
        }
    }

    /// A machine that nobody has had and that is no good: deleted, and so replaced.
    pub(super) fn unfit(&mut self, no: SlotNo, why: &str, now: Instant) {
        self.totals.unfit += 1;
        self.metrics.unfit.increment(1);
        self.full = false;
        self.slots.update(no, |slot| slot.problem = Some(why.to_owned()));
        self.delete(no, false, now);
    }
}
