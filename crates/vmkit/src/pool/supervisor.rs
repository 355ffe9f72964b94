//! The one task that owns a pool's counts: it is told, plans, and has things done.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use futures::FutureExt;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep_until};
use tracing::{debug, warn};

use super::backoff::{Backoff, Random, after};
use super::closing::Closing;
use super::config::Reuse;
use super::events::{Details, EventKind, Events, Journal};
use super::lease::Claim;
use super::message::{Mailbox, Message, Waiter};
use super::metrics::Metrics;
use super::pace::Pace;
use super::plan::{Counts, Gate, Limits, Tier};
use super::queue::Queue;
use super::slots::{Phase, Slot, SlotNo, Slots};
use super::status::{PoolStatus, Totals, Trouble};
use super::{CLOSED, NEW, OPEN, Parts, Rest, STARTING, Shared, tasks};
use crate::console::ConsoleSinks;
use crate::error::{Error, Result};
use crate::instance::Instance;
use crate::spec::Id;

/// Messages handled before the next look at the plan: enough to make one plan serve many, few enough to keep callers from
/// waiting.
const BATCH: usize = 64;
/// Where the loop waits when nothing is to come.
const FAR: Duration = Duration::from_secs(30 * 24 * 3600);
/// How long the deletion of a machine may take that is then to be made again.
const RESETS: Duration = Duration::from_secs(5);

/// Starts a pool. `reply` is told when one machine is ready.
pub(super) fn spawn(
    shared: Arc<Shared>,
    parts: Parts,
    inbox: mpsc::UnboundedReceiver<Message>,
    reply: oneshot::Sender<Result<()>>,
) {
    let config = &shared.config;
    let seed = parts.seed.unwrap_or_else(random_seed);
    let mut random = Random::new(seed);
    let word = format!("{:08x}", random.next() >> 32);
    let backoff = || Backoff::new(config.create_backoff, config.create_backoff_cap);
    let (backend, name, mailbox) = (parts.backend.clone(), shared.name.clone(), shared.mailbox.clone());
    let preparing = tokio::spawn(async move {
        let prepared = tasks::prepare(backend, name).await;
        let _ = mailbox.send(Message::Prepared(prepared));
    });
    let supervisor = Supervisor {
        journal: Journal::new(shared.name.as_str().into(), config.event_buffer),
        limits: config.limits(),
        metrics: shared.metrics().clone(),
        mailbox: shared.mailbox.clone(),
        suspendable: parts.backend.suspendable(),
        parts,
        slots: Slots::default(),
        queue: Queue::new(),
        totals: Totals::default(),
        random,
        word,
        made: 0,
        create: backoff(),
        start: backoff(),
        health: backoff(),
        last_error: None,
        last_attempt: None,
        starter: Some(reply),
        claim: None,
        preparing,
        prepared: None,
        closing: None,
        handles: true,
        checks: 0,
        full: false,
        filled: false,
        wake: None,
        pace: Pace::default(),
        shared,
    };
    tokio::spawn(supervisor.run(inbox));
}

pub(super) struct Supervisor {
    pub shared: Arc<Shared>,
    pub parts: Parts,
    pub mailbox: Mailbox,
    pub limits: Limits,
    pub suspendable: bool,
    pub slots: Slots,
    pub queue: Queue<Box<Waiter>>,
    pub journal: Journal,
    pub totals: Totals,
    pub metrics: Metrics,
    pub random: Random,
    /// What tells this run's machines from another's.
    pub word: String,
    pub made: u64,
    pub create: Backoff,
    pub start: Backoff,
    pub health: Backoff,
    pub last_error: Option<Error>,
    pub last_attempt: Option<Instant>,
    pub starter: Option<oneshot::Sender<Result<()>>>,
    pub claim: Option<Claim>,
    preparing: JoinHandle<()>,
    /// `None` until the name was taken and what an earlier process left is known.
    pub prepared: Option<bool>,
    pub closing: Option<Closing>,
    pub handles: bool,
    pub checks: usize,
    pub full: bool,
    pub filled: bool,
    pub wake: Option<Instant>,
    pub pace: Pace,
}

impl Supervisor {
    async fn run(mut self, mut inbox: mpsc::UnboundedReceiver<Message>) {
        let mut batch = Vec::with_capacity(BATCH);
        let timer = sleep_until(Instant::now() + FAR);
        tokio::pin!(timer);
        loop {
            let due = self.due();
            if timer.deadline() != due {
                timer.as_mut().reset(due);
            }
            // Biased: what has happened comes before what time alone brings.
            tokio::select! {
                biased;
                _ = inbox.recv_many(&mut batch, BATCH) => {}
                () = &mut timer => {}
            }
            let now = Instant::now();
            for message in batch.drain(..) {
                self.handle(message, now);
            }
            self.alarms(now);
            self.execute(now);
            self.close_on_time(now);
            if self.prepared == Some(false) {
                return self.not_started(inbox);
            }
            if self.is_over() {
                return self.end(inbox).await;
            }
        }
    }

    fn handle(&mut self, message: Message, now: Instant) {
        match message {
            Message::Acquire(waiter) => self.on_acquire(waiter, now),
            Message::Cancel(ticket) => drop(self.queue.remove(ticket)),
            Message::Place(ticket, reply) => drop(reply.send(self.place(ticket))),
            Message::Status(reply) => drop(reply.send(Arc::new(self.status(now)))),
            Message::Subscribe(reply) => {
                let events = Events { status: Arc::new(self.status(now)), receiver: Some(self.journal.subscribe()) };
                let _ = reply.send(events);
            }
            Message::Resize(size, reply) => drop(reply.send(self.resize(size))),
            Message::Take(id, reply) => drop(reply.send(self.take_kept(&id, now))),
            Message::Discard(id, reply) => self.discard_kept(&id, reply, now),
            Message::Close(deadline, reply) => self.on_close(deadline, reply, now),
            Message::Abandoned => self.on_abandoned(now),
            Message::Delivered(slot) => self.on_delivered(slot, now),
            Message::Back { slot, touched } => self.on_back(slot, touched, now),
            Message::Rejected { slot, error, answered, waiter } => {
                self.on_rejected(slot, &error, answered, waiter, now);
            }
            Message::Stopped(slot) => self.on_stopped(slot, now),
            Message::Dropped { slot, failed } => self.on_dropped(slot, failed, now),
            Message::Delete(slot, reply) => self.on_delete(slot, reply, now),
            Message::Prepared(Ok(prepared)) => self.on_prepared(prepared, now),
            Message::Prepared(Err(error)) => {
                self.prepared = Some(false);
                if let Some(starter) = self.starter.take() {
                    let _ = starter.send(Err(error));
                }
            }
            Message::Created(slot, made) => self.on_created(slot, *made, now),
            Message::Promoted(slot, result, took) => self.on_promoted(slot, result, took, now),
            Message::Demoted(slot, result) => self.on_demoted(slot, result, now),
            Message::Kept(slot, result) => self.on_kept(slot, result, now),
            Message::Checked(slot, result) => self.on_checked(slot, result, now),
            Message::Removed(slot, result, old) => self.on_removed(slot, result, old, now),
            Message::Changed(slot, status) => self.on_changed(slot, status, now),
        }
    }

    /// A message that arrived when all was over already.
    fn handle_late(&mut self, message: Message) {
        let now = Instant::now();
        match message {
            Message::Acquire(_) | Message::Status(_) | Message::Subscribe(_) | Message::Close(..) => {
                self.handle(message, now)
            }
            Message::Delete(_, reply) => drop(reply.send(Ok(()))),
            // Their senders see that nobody answers, and what they carry is dropped.
            other => drop(other),
        }
    }

    fn due(&self) -> Instant {
        let closing = self.closing.as_ref().and_then(Closing::deadline);
        let next = [self.slots.next_alarm(), self.wake, closing].into_iter().flatten().min();
        next.unwrap_or_else(|| Instant::now() + FAR)
    }

    /// Whether new machines are made and handed over.
    pub(super) fn is_open(&self) -> bool {
        self.closing.is_none()
    }

    pub(super) fn counts(&self) -> Counts {
        Counts { waiting: self.queue.len(), ..*self.slots.counts() }
    }

    /// How many machines there should be now.
    pub(super) fn target(&self, counts: &Counts) -> usize {
        if !self.is_open() {
            return 0;
        }
        // Somebody else's code: a mistake there does not end the pool.
        let total = catch_unwind(AssertUnwindSafe(|| self.parts.sizing.total(counts, &self.limits)));
        total.unwrap_or_else(|_| self.limits.tiers.sum()).min(self.limits.max)
    }

    /// Where a machine's output goes.
    pub(super) fn console(&self, id: &Id) -> ConsoleSinks {
        // The same: then its output goes nowhere.
        catch_unwind(AssertUnwindSafe(|| (self.parts.console)(id))).unwrap_or_default()
    }

    /// When a machine may be made: failures to make and to hand over count together, and the rate is limited.
    pub(super) fn create_gate(&self) -> Gate {
        let (create, health) = (self.create.gate(), self.health.gate());
        let interval = self.shared.config.create_interval;
        let paced = self.last_attempt.filter(|_| !interval.is_zero()).map(|last| after(last, interval));
        Gate {
            failures: create.failures.max(health.failures),
            opens: [create.opens, health.opens, paced].into_iter().flatten().max(),
        }
    }

    /// Notes why machines cannot be made; `None` when they can again.
    pub(super) fn note_trouble(&mut self, error: Option<&Error>) {
        if let Some(error) = error {
            warn!(pool = %self.shared.name, %error, "a machine could not be made ready");
            self.last_error = Some(error.duplicate());
        }
        let gates = [self.create.gate(), self.start.gate(), self.health.gate()];
        let next = gates.into_iter().filter(|gate| gate.failures > 0).filter_map(|gate| gate.opens).max();
        match (next, &self.last_error) {
            (Some(next), Some(error)) => self.shared.set_trouble(Some((error.duplicate(), next))),
            _ => {
                if self.last_error.take().is_some() {
                    self.shared.set_trouble(None);
                }
            }
        }
    }

    pub(super) fn event(&mut self, kind: EventKind, slot: Option<SlotNo>, details: Details<'_>) {
        let slot = slot.and_then(|no| self.slots.get(no));
        let own = Details {
            vm: details.vm.or(slot.map(|slot| &slot.id)),
            attempt: details.attempt.or(slot.map(|slot| slot.attempt).filter(|attempt| *attempt > 0)),
            holder: details.holder.or(slot.and_then(|slot| slot.holder.as_ref())),
            ..details
        };
        self.journal.write(kind, own);
    }

    /// Begins to delete a machine. Everything that ends a machine comes through here, and only from a phase in which nobody else
    /// does: that is the claim.
    pub(super) fn delete(&mut self, no: SlotNo, hung: bool, now: Instant) {
        self.delete_for(no, hung, None, now);
    }

    /// A machine that was given back: made again, where that is wanted and the pool would make one now, or only deleted.
    pub(super) fn take_back(&mut self, no: SlotNo, now: Instant) {
        // As if it were gone: what the pool would make then.
        self.slots.enter(no, Phase::Deleting { hung: false, again: None }, now);
        let again = match self.shared.config.reuse {
            Reuse::Reset if self.is_open() => self.short(now),
            Reuse::Reset | Reuse::Never => None,
        };
        self.delete_for(no, false, again, now);
    }

    fn delete_for(&mut self, no: SlotNo, hung: bool, again: Option<Tier>, now: Instant) {
        let Some(slot) = self.slots.get(no) else { return };
        let (id, instance) = (slot.id.clone(), slot.instance.clone());
        // What could not be deleted before counts until it is gone, also while it is tried again.
        let hung = hung || slot.failures > 0;
        let again = again.filter(|_| !hung);
        self.slots.enter(no, Phase::Deleting { hung, again }, now);
        self.slots.alarm(no, again.map(|_| after(now, RESETS)));
        let (backend, pool) = (self.parts.backend.clone(), self.shared.name.clone());
        let limit = self.shared.config.cleanup_timeout;
        self.task(async move {
            let old = again.and_then(|_| instance.as_ref().map(|instance| Box::new(instance.properties())));
            Message::Removed(no, tasks::remove(backend, pool, id, instance, limit).await, old)
        });
    }

    /// Runs something on a task of its own, which ends with one message, also when it panics.
    pub(super) fn task(&self, work: impl Future<Output = Message> + Send + 'static) {
        let mailbox = self.mailbox.clone();
        tokio::spawn(work.map(move |message| {
            let _ = mailbox.send(message);
        }));
    }

    /// Has the pool told when a machine changes by itself.
    pub(super) fn watch(&mut self, no: SlotNo) {
        let mailbox = self.mailbox.clone();
        self.slots.update(no, |slot| {
            if let Some(instance) = slot.instance.as_ref().filter(|_| !slot.watched) {
                // Only what nobody here has asked for: everything else is known from its result.
                let hook = move |status: crate::publish::Status| match status.cause {
                    crate::publish::Cause::Exited | crate::publish::Cause::Elsewhere => {
                        mailbox.send(Message::Changed(no, status)).is_ok()
                    }
                    _ => true,
                };
                instance.hook(Box::new(hook));
                slot.watched = true;
            }
        });
    }

    pub(super) fn status(&self, now: Instant) -> PoolStatus {
        let counts = self.counts();
        let gate = self.create_gate();
        PoolStatus {
            name: self.shared.name.as_str().to_owned(),
            phase: self.shared.phase(),
            target: self.target(&counts),
            counts,
            totals: self.totals,
            sequence: self.journal.sequence(),
            vms: self.slots.status(now),
            trouble: self.last_error.as_ref().map(|error| Trouble {
                error: error.to_string(),
                failures: gate.failures.max(self.start.gate().failures),
                next_attempt: gate.opens.map_or(Duration::ZERO, |at| at.saturating_duration_since(now)),
            }),
        }
    }

    /// Nothing was started: whoever is in the queue already is told, and another start may do better.
    fn not_started(self, mut inbox: mpsc::UnboundedReceiver<Message>) {
        while let Ok(message) = inbox.try_recv() {
            drop(message);
        }
        *self.shared.rest() = Rest { parts: Some((self.parts, inbox)), last: None };
        let closed = self.closing.is_some() || !self.handles;
        self.shared.phase.store(if closed { CLOSED } else { NEW }, Ordering::Release);
        if let Some(closing) = self.closing {
            closing.finish(Vec::new());
        }
    }

    /// Whether the pool has closed and nothing of it is left, neither a machine nor a task.
    fn is_over(&self) -> bool {
        self.closing.is_some() && self.slots.is_empty() && self.checks == 0
    }

    async fn end(mut self, mut inbox: mpsc::UnboundedReceiver<Message>) {
        debug!(pool = %self.shared.name, "closed");
        self.preparing.abort();
        let _ = (&mut self.preparing).await;
        // Whoever asks from now on is told by what is left here; whoever has asked is answered.
        inbox.close();
        while let Ok(message) = inbox.try_recv() {
            self.handle_late(message);
        }
        // The name first: whoever hears that it is closed may open it again, unless machines of it were left to their holders.
        self.claim = None;
        self.shared.phase.store(CLOSED, Ordering::Release);
        self.shared.rest().last = Some(Arc::new(self.status(Instant::now())));
        self.shared.set_trouble(None);
        if let Some(starter) = self.starter.take() {
            let _ = starter.send(Err(self.shared.closed()));
        }
        if let Some(closing) = self.closing.take() {
            closing.finish(Vec::new());
        }
    }

    pub(super) fn opened(&self) {
        let _ = self.shared.phase.compare_exchange(STARTING, OPEN, Ordering::AcqRel, Ordering::Acquire);
    }

    pub(super) fn pool_id(&self) -> &Id {
        &self.shared.name
    }

    pub(super) fn instance(&self, no: SlotNo) -> Option<Instance> {
        self.slots.get(no).and_then(|slot: &Slot| slot.instance.clone())
    }
}

/// The standard library's hasher has random keys: no dependency is needed for that.
fn random_seed() -> u64 {
    use std::hash::{BuildHasher, Hasher};
    std::collections::hash_map::RandomState::new().build_hasher().finish()
}
