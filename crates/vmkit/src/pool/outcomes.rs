//! What became of what was started, and what time brings.

use std::time::Duration;

use tokio::time::Instant;

use super::backoff::{after, pause};
use super::events::{Details, EventKind};
use super::lease::Claim;
use super::message::{Made, Message, Prepared};
use super::plan::Tier;
use super::slots::{Phase, SlotNo};
use super::supervisor::Supervisor;
use super::tasks::{self, LABEL};
use crate::error::{Error, ErrorKind, Result};
use crate::properties::Properties;
use crate::publish::Status;
use crate::state::State;

/// Idle machines asked at once.
const CHECKS: usize = 64;
/// When one is asked that had to wait for the others.
const LATER: Duration = Duration::from_millis(100);
/// The first and the longest pause before a failed deletion is tried again.
const RETRY: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));

impl Supervisor {
    pub(super) fn on_prepared(&mut self, prepared: Prepared, now: Instant) {
        self.claim = Some(Claim::new(prepared.claim));
        self.prepared = Some(true);
        self.opened();
        let pool = self.pool_id().as_str().to_owned();
        let mut known = std::collections::BTreeSet::new();
        for found in prepared.found {
            let label = found.spec.as_ref().and_then(|spec| spec.labels.get(LABEL));
            // Exactly this label: names tell nothing. A provider may list one twice.
            if label == Some(&pool) && known.insert(found.id.clone()) {
                let no = self.slots.insert(found.id, Phase::Leaked, 0, now);
                self.slots.update(no, |slot| slot.orphan = true);
                self.delete(no, false, now);
            }
        }
    }

    pub(super) fn on_created(&mut self, no: SlotNo, made: Made, now: Instant) {
        let attempt = self.slots.update(no, |slot| {
            slot.instance = made.instance;
            slot.attempt
        });
        let Some(attempt) = attempt else { return };
        let duration = Some(made.took);
        match made.result {
            Ok(tier) => {
                self.metrics.create[tier as usize].record(made.took.as_secs_f64());
                self.pace.created(made.took);
                self.create.succeed();
                self.note_trouble(None);
                self.event(EventKind::VmCreated, Some(no), Details { duration, ..Details::default() });
                self.ready(no, tier, now);
            }
            Err(error) => {
                self.totals.failed += 1;
                self.metrics.create_failed.increment(1);
                let details = || Details { duration, error: Some(&error), ..Details::default() };
                self.event(EventKind::VmCreateFailed, Some(no), details());
                if self.is_open() {
                    self.create.fail(now, &mut self.random);
                    self.note_trouble(Some(&error));
                    if self.filled {
                        self.event(EventKind::ReplenishFailed, Some(no), details());
                    }
                }
                self.slots.update(no, |slot| slot.problem = Some(format!("attempt {attempt}: {error}")));
                match self.instance(no) {
                    Some(_) => self.delete(no, true, now),
                    // It was never opened: nothing of it exists.
                    None => drop(self.slots.remove(no)),
                }
            }
        }
    }

    pub(super) fn on_promoted(&mut self, no: SlotNo, result: Result<()>, took: Duration, now: Instant) {
        if !self.slots.get(no).is_some_and(|slot| matches!(slot.phase, Phase::Promoting { .. })) {
            return;
        }
        self.metrics.start.record(took.as_secs_f64());
        match result {
            Ok(()) => {
                self.start.succeed();
                self.note_trouble(None);
                self.ready(no, Tier::Running, now);
            }
            Err(error) => {
                if self.is_open() {
                    self.event(
                        EventKind::AcquireFailed,
                        Some(no),
                        Details { error: Some(&error), ..Details::default() },
                    );
                    self.start.fail(now, &mut self.random);
                    self.note_trouble(Some(&error));
                }
                self.unfit(no, &error.to_string(), now);
            }
        }
    }

    pub(super) fn on_demoted(&mut self, no: SlotNo, result: Result<()>, now: Instant) {
        let Some(slot) = self.slots.get(no) else { return };
        let Phase::Demoting { tier, .. } = &slot.phase else { return };
        let tier = *tier;
        match result {
            Ok(()) => self.ready(no, tier, now),
            Err(error) => self.unfit(no, &error.to_string(), now),
        }
    }

    /// A machine is as it should be: ready, unless the pool has closed meanwhile.
    fn ready(&mut self, no: SlotNo, tier: Tier, now: Instant) {
        if !self.is_open() {
            return self.delete(no, false, now);
        }
        let Some(instance) = self.instance(no) else { return };
        let wanted = match tier {
            Tier::Running => State::Running,
            Tier::Suspended => State::Suspended,
            Tier::Stopped => State::Stopped,
        };
        self.watch(no);
        // Watched first, looked at then: what happens in between is seen by one of both.
        if instance.state() != wanted {
            return self.unfit(no, "it died as soon as it was ready", now);
        }
        if tier == Tier::Stopped && self.suspendable && !instance.suspendable() {
            // Said only now: from here on the pool plans without suspended ones.
            self.suspendable = false;
        }
        let number = self.slots.ready_number();
        self.slots.enter(no, Phase::Ready { tier, number }, now);
        self.slots.update(no, |slot| {
            slot.ready = now;
            slot.answered = now;
            slot.checking = false;
        });
        self.set_alarm(no, now);
        if let Some(starter) = self.starter.take() {
            let _ = starter.send(Ok(()));
        }
    }

    pub(super) fn on_checked(&mut self, no: SlotNo, result: Result<()>, now: Instant) {
        self.checks -= 1;
        let ready = self.slots.update(no, |slot| {
            slot.checking = false;
            matches!(slot.phase, Phase::Ready { tier: Tier::Running, .. })
        });
        // Somebody has it by now: its own check has told.
        if ready != Some(true) {
            return;
        }
        match result {
            Ok(()) => {
                self.slots.update(no, |slot| slot.answered = now);
                self.set_alarm(no, now);
            }
            Err(error) => self.unfit(no, &error.to_string(), now),
        }
    }

    /// A machine changed, and nobody here had asked for it.
    pub(super) fn on_changed(&mut self, no: SlotNo, status: Status, now: Instant) {
        let Some(slot) = self.slots.get(no) else { return };
        let wanted = match slot.phase {
            Phase::Ready { tier: Tier::Running, .. } => State::Running,
            Phase::Ready { tier: Tier::Suspended, .. } => State::Suspended,
            Phase::Ready { tier: Tier::Stopped, .. } => State::Stopped,
            // Whoever has it, or works on it, finds out.
            Phase::Creating { .. }
            | Phase::Promoting { .. }
            | Phase::Demoting { .. }
            | Phase::Granted { .. }
            | Phase::Held { .. }
            | Phase::Keeping { .. }
            | Phase::Kept
            | Phase::Deleting { .. }
            | Phase::Leaked => return,
        };
        if status.state != wanted {
            self.unfit(no, &format!("it was ready, and is {}", status.state), now);
        }
    }

    pub(super) fn on_removed(&mut self, no: SlotNo, result: Result<()>, old: Option<Box<Properties>>, now: Instant) {
        let Some(slot) = self.slots.get(no) else { return };
        let Phase::Deleting { again, .. } = slot.phase else { return };
        let (used, orphan, since) = (slot.used, slot.orphan, slot.since);
        let waiting = self.slots.update(no, |slot| std::mem::take(&mut slot.deleted)).unwrap_or_default();
        match result {
            Ok(()) => {
                self.totals.deleted += 1;
                self.metrics.deleted.increment(1);
                let details = || Details { duration: Some(now.duration_since(since)), ..Details::default() };
                if used {
                    self.event(EventKind::Released, Some(no), details());
                }
                if orphan {
                    self.event(EventKind::OrphanedVmDeleted, Some(no), details());
                }
                let gone = self.slots.remove(no);
                if let Some(closing) = &mut self.closing {
                    closing.deleted += 1;
                }
                waiting.into_iter().for_each(|reply| drop(reply.send(Ok(()))));
                // Much may have changed meanwhile.
                if let (Some(_), Some(gone), true) = (again, gone, self.is_open())
                    && let Some(tier) = self.short(now)
                {
                    self.create(gone.id, tier, old, now);
                }
            }
            Err(error) => {
                tracing::warn!(pool = %self.pool_id(), vm = error.instance(), %error, "a machine could not be deleted");
                self.totals.delete_failures += 1;
                let failures = self.slots.update(no, |slot| {
                    slot.problem = Some(error.to_string());
                    slot.failures += 1;
                    slot.failures - 1
                });
                // Its record stays: it is listed as leaked, and tried again.
                self.slots.enter(no, Phase::Leaked, now);
                let wait = pause(RETRY.0, RETRY.1, failures.unwrap_or(0), &mut self.random);
                self.slots.alarm(no, Some(after(now, wait)));
                waiting.into_iter().for_each(|reply| drop(reply.send(Err(error.duplicate()))));
            }
        }
    }

    /// Sets when a ready machine is looked at next: to be asked, or since its time has passed.
    pub(super) fn set_alarm(&mut self, no: SlotNo, now: Instant) {
        let config = &self.shared.config;
        let Some(slot) = self.slots.get(no) else { return };
        let Phase::Ready { tier, .. } = slot.phase else { return };
        let asked = (tier == Tier::Running && !config.health_interval.is_zero() && !slot.checking)
            .then(|| after(slot.answered, config.health_interval).max(now));
        let aged = config.max_age.filter(|_| !slot.expired).map(|age| after(slot.born, age));
        let idled = config.max_idle.filter(|_| !slot.expired).map(|idle| after(slot.ready, idle));
        self.slots.alarm(no, [asked, aged, idled].into_iter().flatten().min());
    }

    /// Looks at every machine whose time has come.
    pub(super) fn alarms(&mut self, now: Instant) {
        while let Some(no) = self.slots.due(now) {
            let Some(slot) = self.slots.get(no) else { continue };
            match &slot.phase {
                Phase::Ready { .. } => self.look_at_ready(no, now),
                Phase::Granted { hold, .. } => {
                    // Its caller neither takes it nor goes away.
                    if hold.revoke() {
                        self.unfit(no, "its caller did not take it", now);
                    }
                }
                Phase::Held { hold } => {
                    hold.end();
                    let error = Error::new(ErrorKind::TimedOut, "the lease's time limit has passed");
                    self.release(no, Some(&error), now);
                    self.take_back(no, now);
                }
                Phase::Kept | Phase::Leaked => self.delete(no, false, now),
                // What takes so long keeps no other machine from being made.
                Phase::Deleting { hung, again: Some(_) } => {
                    let hung = *hung;
                    self.slots.update(no, |slot| slot.phase = Phase::Deleting { hung, again: None });
                }
                Phase::Creating { .. }
                | Phase::Promoting { .. }
                | Phase::Demoting { .. }
                | Phase::Keeping { .. }
                | Phase::Deleting { again: None, .. } => {}
            }
        }
    }

    fn look_at_ready(&mut self, no: SlotNo, now: Instant) {
        let config = &self.shared.config;
        let (age, idle, interval) = (config.max_age, config.max_idle, config.health_interval);
        let limit = config.health_timeout;
        let passed = |since: Instant, limit: Option<Duration>| limit.is_some_and(|limit| after(since, limit) <= now);
        self.slots.update(no, |slot| {
            slot.expired = slot.expired || passed(slot.born, age) || passed(slot.ready, idle);
        });
        let Some(slot) = self.slots.get(no) else { return };
        let running = matches!(slot.phase, Phase::Ready { tier: Tier::Running, .. });
        let asks = running && !interval.is_zero() && !slot.checking && after(slot.answered, interval) <= now;
        let Some(instance) = slot.instance.clone().filter(|_| asks) else { return self.set_alarm(no, now) };
        if self.checks >= CHECKS {
            return self.slots.alarm(no, Some(now + LATER));
        }
        self.checks += 1;
        self.slots.update(no, |slot| slot.checking = true);
        self.set_alarm(no, now);
        self.task(async move { Message::Checked(no, tasks::check(instance, limit).await) });
    }
}
