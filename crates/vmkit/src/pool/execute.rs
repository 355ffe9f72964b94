//! Carrying out the plan.

use tokio::sync::oneshot;
use tokio::time::Instant;

use super::events::{Details, EventKind};
use super::message::Message;
use super::plan::{Limits, Tier, Tiers, plan};
use super::slots::{Cancel, Phase};
use super::supervisor::Supervisor;
use super::tasks::{self, Order, Ready};
use crate::properties::Properties;
use crate::spec::Id;

impl Supervisor {
    /// Plans, and does what the plan says. Nothing of it waits.
    pub(super) fn execute(&mut self, now: Instant) {
        self.metrics.show(&self.counts());
        self.wake = None;
        if self.prepared != Some(true) || !self.is_open() {
            return;
        }
        let counts = self.counts();
        let limits = self.limits_now();
        let target = self.target(&counts);
        let steps = plan(now, &counts, &limits, target, &self.start.gate(), &self.create_gate());
        self.wake = steps.wake;
        for _ in 0..steps.hand_over {
            let Some((turn, mut waiter)) = self.queue.pop() else { break };
            waiter.who.turn = Some(turn);
            if let Some(back) = self.grant(waiter, now) {
                // The last one was dead: it keeps its turn.
                let (ticket, key) = (back.who.ticket, back.who.key.clone());
                self.queue.put_back(ticket, key, turn, back);
                break;
            }
            self.pace.served(now, self.queue.len() > 0);
        }
        for (tier, count) in [(Tier::Suspended, steps.resume), (Tier::Stopped, steps.boot)] {
            (0..count).for_each(|_| self.promote(tier, now));
        }
        for tier in Tier::ALL {
            (0..steps.demote.of(tier)).for_each(|_| self.demote(tier, now));
            (0..steps.trim.of(tier)).for_each(|_| self.trim(tier, now));
        }
        if let Some(no) = steps.recycle.and_then(|tier| self.slots.first_expired(tier)) {
            self.totals.recycled += 1;
            self.delete(no, false, now);
        }
        self.make(&steps.create, now);
        if steps.stranded {
            self.strand();
        }
        self.note_fullness();
    }

    /// The limits, with what cannot be suspended kept stopped instead.
    fn limits_now(&self) -> Limits {
        let mut limits = self.limits;
        if !self.suspendable {
            limits.tiers.stopped += std::mem::take(&mut limits.tiers.suspended);
        }
        limits
    }

    fn make(&mut self, wanted: &Tiers, now: Instant) {
        let paced = !self.shared.config.create_interval.is_zero();
        for tier in Tier::ALL {
            for _ in 0..wanted.of(tier) {
                let id = self.new_id();
                self.create(id, tier, None, now);
                if paced {
                    // One at a time; the gate is closed now, and says when it opens.
                    self.wake = self.create_gate().opens;
                    return;
                }
            }
        }
    }

    /// For which tier a machine would be made now, if one would.
    pub(super) fn short(&self, now: Instant) -> Option<Tier> {
        let counts = self.counts();
        let (limits, target) = (self.limits_now(), self.target(&counts));
        let steps = plan(now, &counts, &limits, target, &self.start.gate(), &self.create_gate());
        Tier::ALL.into_iter().find(|&tier| steps.create.of(tier) > 0)
    }

    fn new_id(&mut self) -> Id {
        self.made += 1;
        let name = format!("{}-{}-{}", self.pool_id(), self.word, self.made);
        Id::new(name).expect("a pool's name is short enough for its machines' names")
    }

    /// `old`: what the machine of that name was, which the new one must not be.
    pub(super) fn create(&mut self, id: Id, tier: Tier, old: Option<Box<Properties>>, now: Instant) {
        self.totals.attempts += 1;
        self.last_attempt = Some(now);
        let (cancel, cancelled) = oneshot::channel();
        // In its slot before anything is asked of the backend: whatever happens next, it is known.
        let no = self.slots.insert(id.clone(), Phase::Creating { tier, _cancel: cancel }, self.totals.attempts, now);
        self.event(EventKind::VmCreateStarted, Some(no), Details::default());
        let order = Order {
            console: self.console(&id),
            spec: self.parts.spec.clone(),
            ready: self.ready_work(),
            limit: self.shared.config.create_timeout,
            prespawn: self.shared.config.prespawn,
            id,
            tier,
            old,
        };
        let backend = self.parts.backend.clone();
        self.task(async move { Message::Created(no, Box::new(tasks::create(backend, order, cancelled).await)) });
    }

    fn ready_work(&self) -> Ready {
        let config = &self.shared.config;
        Ready { words: config.ready_command.clone(), runs: config.ready_runs }
    }

    fn promote(&mut self, tier: Tier, now: Instant) {
        let Some(no) = self.slots.newest_ready(tier) else { return };
        let Some(instance) = self.instance(no) else { return };
        let (cancel, cancelled) = cancel();
        self.slots.enter(no, Phase::Promoting { _cancel: cancel }, now);
        let (console, limit) = (self.console(instance.id()), self.shared.config.create_timeout);
        let ready = self.ready_work();
        self.task(async move {
            let result = tasks::promote(instance, console, ready, limit, cancelled).await;
            Message::Promoted(no, result, now.elapsed())
        });
    }

    fn demote(&mut self, tier: Tier, now: Instant) {
        let Some(no) = self.slots.oldest_ready(Tier::Running) else { return };
        let Some(instance) = self.instance(no) else { return };
        let (cancel, cancelled) = cancel();
        self.slots.enter(no, Phase::Demoting { tier, _cancel: cancel }, now);
        let config = &self.shared.config;
        let (grace, limit, prespawn) = (config.stop_timeout, config.create_timeout, config.prespawn);
        self.task(async move {
            Message::Demoted(no, tasks::demote(instance, tier, prespawn, grace, limit, cancelled).await)
        });
    }

    fn trim(&mut self, tier: Tier, now: Instant) {
        if let Some(no) = self.slots.oldest_ready(tier) {
            self.totals.recycled += 1;
            self.delete(no, false, now);
        }
    }

    fn note_fullness(&mut self) {
        let counts = self.counts();
        let target = self.target(&counts);
        let full = counts.ready.sum() + counts.unreleased >= target && target > 0;
        if full && !self.full {
            let kind = if self.filled { EventKind::Replenished } else { EventKind::StartPoolFull };
            self.event(kind, None, Details::default());
            self.filled = true;
        }
        self.full = full;
    }
}

fn cancel() -> (Cancel, oneshot::Receiver<()>) {
    oneshot::channel()
}
