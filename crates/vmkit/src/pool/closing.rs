//! Ending a pool.

use std::sync::atomic::Ordering;

use tokio::sync::oneshot;
use tokio::time::Instant;

use super::CLOSING;
use super::close::{CloseReport, Left};
use super::events::{Details, EventKind};
use super::slots::{Phase, SlotNo};
use super::supervisor::Supervisor;
use crate::spec::Id;

/// A close under way.
pub(super) struct Closing {
    /// The earliest that a closer has set; `None` when nobody waits for it.
    deadline: Option<Instant>,
    closers: Vec<oneshot::Sender<CloseReport>>,
    /// What is done with leases: deleted, left, or waited for.
    held: Held,
    pub deleted: u64,
    retained: Vec<Id>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Held {
    Delete,
    Retain,
    /// The pool's handles are gone, and nobody has decided: they go when they are given back.
    Await,
}

impl Closing {
    pub(super) fn deadline(&self) -> Option<Instant> {
        self.deadline
    }

    /// Tells every closer.
    pub(super) fn finish(self, left: Vec<Left>) {
        let report = CloseReport { deleted: self.deleted, retained: self.retained, left };
        for closer in self.closers {
            let _ = closer.send(report.clone());
        }
    }
}

impl Supervisor {
    pub(super) fn on_close(&mut self, deadline: Instant, reply: oneshot::Sender<CloseReport>, now: Instant) {
        let held = if self.shared.config.delete_acquired_on_close { Held::Delete } else { Held::Retain };
        let again = self.closing.is_some();
        self.begin_to_close(held, now);
        if let Some(closing) = &mut self.closing {
            // What an earlier close gave up on is tried again at once.
            let retry = again && closing.closers.is_empty();
            closing.deadline = Some(closing.deadline.map_or(deadline, |earlier| earlier.min(deadline)));
            closing.closers.push(reply);
            closing.held = held;
            if retry {
                self.end_all(now);
            }
        }
    }

    /// The last handle was dropped.
    pub(super) fn on_abandoned(&mut self, now: Instant) {
        self.handles = false;
        if self.closing.is_none() {
            self.begin_to_close(Held::Await, now);
        }
    }

    fn begin_to_close(&mut self, held: Held, now: Instant) {
        if self.closing.is_some() {
            return;
        }
        self.closing = Some(Closing { deadline: None, closers: Vec::new(), held, deleted: 0, retained: Vec::new() });
        self.shared.phase.store(CLOSING, Ordering::Release);
        let closed = self.shared.closed();
        self.refuse_all(&closed);
        if let Some(starter) = self.starter.take() {
            let _ = starter.send(Err(closed));
        }
        self.end_all(now);
    }

    /// Everything at once: one after the other would take the sum of their times.
    fn end_all(&mut self, now: Instant) {
        for no in self.slots.numbers() {
            let Some(slot) = self.slots.get(no) else { continue };
            match &slot.phase {
                // Its task ends when this is dropped, says what is left, and that is deleted.
                Phase::Creating { tier, .. } => {
                    let (cancel, _) = oneshot::channel();
                    let tier = *tier;
                    self.slots.update(no, |slot| slot.phase = Phase::Creating { tier, _cancel: cancel });
                }
                Phase::Promoting { .. } => {
                    let (cancel, _) = oneshot::channel();
                    self.slots.update(no, |slot| slot.phase = Phase::Promoting { _cancel: cancel });
                }
                Phase::Demoting { tier, .. } => {
                    let (cancel, _) = oneshot::channel();
                    let tier = *tier;
                    self.slots.update(no, |slot| slot.phase = Phase::Demoting { tier, _cancel: cancel });
                }
                Phase::Keeping { .. } => {
                    let (cancel, _) = oneshot::channel();
                    self.slots.update(no, |slot| slot.phase = Phase::Keeping { _cancel: cancel });
                }
                Phase::Ready { .. } | Phase::Kept | Phase::Leaked => self.delete(no, false, now),
                Phase::Granted { hold, .. } => {
                    // Otherwise a caller has it, and what says so is on its way.
                    if hold.revoke() {
                        self.delete(no, false, now);
                    }
                }
                Phase::Held { .. } => self.close_held(no, now),
                Phase::Deleting { .. } => {}
            }
        }
    }

    /// A lease that outlives its pool.
    pub(super) fn close_held(&mut self, no: SlotNo, now: Instant) {
        let Some(held) = self.closing.as_ref().map(|closing| closing.held) else { return };
        let Some(slot) = self.slots.get(no) else { return };
        let Phase::Held { hold } = &slot.phase else { return };
        match held {
            Held::Await => {}
            Held::Delete => {
                hold.end();
                self.release(no, None, now);
                self.delete(no, false, now);
            }
            Held::Retain => {
                hold.retain(self.claim.clone());
                self.totals.retained += 1;
                self.event(EventKind::AcquiredVmRetained, Some(no), Details::default());
                let slot = self.slots.remove(no);
                if let (Some(closing), Some(slot)) = (&mut self.closing, slot) {
                    closing.retained.push(slot.id);
                }
            }
        }
    }

    /// Closers whose time has passed are told what is left. The pool goes on trying.
    pub(super) fn close_on_time(&mut self, now: Instant) {
        let late = self.closing.as_ref().and_then(Closing::deadline).is_some_and(|at| at <= now);
        if !late {
            return;
        }
        if self.slots.is_empty() {
            // All are gone, and a question to one of them ends at any moment now.
            return self.closing.iter_mut().for_each(|closing| closing.deadline = None);
        }
        let left = self.slots.status(now).into_iter();
        let left = left.map(|vm| Left { id: vm.id, phase: vm.phase, problem: vm.problem }).collect();
        if let Some(closing) = &mut self.closing {
            let rest = Closing {
                deadline: None,
                closers: Vec::new(),
                held: closing.held,
                deleted: 0,
                retained: closing.retained.clone(),
            };
            std::mem::replace(closing, rest).finish(left);
        }
    }
}
