//! A machine that somebody has, until it is released, deleted or dropped.

use std::any::Any;
use std::ops::Deref;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use tokio::sync::oneshot;

use super::Shared;
use super::message::Message;
use super::slots::SlotNo;
use crate::cleanup::cleanup;
use crate::command::Command;
use crate::error::{Error, ErrorKind, Result};
use crate::instance::{Instance, StopReport};
use crate::state::State;

/// A machine of a pool, held by nobody else, ever: whatever way it is given back, it is deleted and a new one takes its place,
/// which may have its name ([`Reuse`](super::Reuse)) and nothing else of it.
///
/// Everything an [`Instance`] can do, it can do. Dropped, its machine is deleted in the background. Deleted, stopped and dropped
/// in any order, twice or at once: that is one deletion and one replacement.
///
/// A copy of its machine ([`fork`](Instance::fork)) is not the pool's: whoever makes it deletes it, and neither the pool's close nor
/// its next start does.
#[must_use = "a lease that is dropped gives its machine back at once"]
pub struct Lease {
    instance: Instance,
    slot: SlotNo,
    hold: Arc<Hold>,
    shared: Arc<Shared>,
}

impl Lease {
    pub(super) fn new(instance: Instance, slot: SlotNo, hold: Arc<Hold>, shared: Arc<Shared>) -> Lease {
        Lease { instance, slot, hold, shared }
    }

    /// A command to be executed in the guest. One that does not end with success, whether it fails, cannot
    /// be started, takes too long or is lost with its machine, marks the lease as [failed](Lease::mark_failed).
    pub fn command(&self, program: impl Into<String>) -> Command {
        self.instance.command(program).marks(self.hold.failed.clone())
    }

    /// Stops it and gives it back; its disk and its records stay until the lease is deleted or dropped, so that there is time
    /// to collect them. The replacement is made meanwhile: it is requested by the first stop that succeeds.
    ///
    /// # Cancel safety
    /// A dropped call is carried to its end.
    pub async fn stop_and_release(&self, grace: Duration) -> StopReport {
        if self.instance.state() == State::Deleted {
            // Given back already: there is nothing to stop.
            return StopReport { run: Ok(()), stop: Ok(()), forced: false };
        }
        let (instance, shared, slot) = (self.instance.clone(), self.shared.clone(), self.slot);
        let task = tokio::spawn(async move {
            let report = instance.stop(grace).await;
            // Judged by the machine: how it ran, and who else stopped it, does not matter.
            if report.stop.is_ok() {
                let _ = shared.mailbox.send(Message::Stopped(slot));
            }
            report
        });
        task.await.unwrap_or_else(|lost| {
            let error = Error::new(ErrorKind::Cancelled, "the runtime that stops it has shut down").caused_by(lost);
            StopReport { run: Ok(()), stop: Err(error.on(self.instance.id().as_str())), forced: false }
        })
    }

    /// Stops it with the pool's stop timeout as grace, then deletes it. The report is of the stop.
    ///
    /// # Errors
    /// When it could not be deleted: the pool tries again.
    pub async fn release(self) -> Result<StopReport> {
        let report = self.stop_and_release(self.shared.config.stop_timeout).await;
        self.delete().await?;
        Ok(report)
    }

    /// Deletes it, whatever it is in, and returns when it is gone. Requests the replacement at once, unless that was done.
    ///
    /// # Errors
    /// When it could not be deleted: the pool keeps it, lists it as leaked, and tries again.
    ///
    /// # Cancel safety
    /// A dropped call is carried to its end.
    pub async fn delete(&self) -> Result<()> {
        let (reply, answer) = oneshot::channel();
        let limit = self.shared.config.cleanup_timeout;
        if !self.hold.retained()
            && self.shared.mailbox.send(Message::Delete(self.slot, reply)).is_ok()
            && let Ok(result) = answer.await
        {
            return result;
        }
        // The pool has closed. It left nothing but what it retained, and that is its holder's.
        cleanup(&self.instance, Duration::ZERO, limit).await
    }

    /// Marks it as failed: if the pool keeps failed leases, it is suspended and kept for a while when it is dropped, unless it
    /// was stopped or deleted.
    pub fn mark_failed(&self) {
        self.hold.failed.store(true, Ordering::Relaxed);
    }

    /// Takes the mark back: what its commands ended with was as it should be.
    pub fn mark_well(&self) {
        self.hold.failed.store(false, Ordering::Relaxed);
    }

    /// Whether it is marked as failed.
    pub fn is_failed(&self) -> bool {
        self.hold.failed.load(Ordering::Relaxed)
    }

    /// Whether the pool took it back: its time limit has passed, or the pool has closed.
    pub fn is_ended(&self) -> bool {
        self.hold.state() == REVOKED
    }

    /// Whether the pool has closed and left it: it lives until it is deleted.
    pub fn is_retained(&self) -> bool {
        self.hold.retained()
    }
}

impl Deref for Lease {
    type Target = Instance;

    fn deref(&self) -> &Instance {
        &self.instance
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        let failed = self.is_failed();
        let _ = self.shared.mailbox.send(Message::Dropped { slot: self.slot, failed });
    }
}

impl std::fmt::Debug for Lease {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let state: State = self.instance.state();
        f.debug_struct("Lease").field("id", &self.instance.id().as_str()).field("state", &state).finish_non_exhaustive()
    }
}

const GRANTED: u8 = 0;
const TAKEN: u8 = 1;
const REVOKED: u8 = 2;
const RETAINED: u8 = 3;

/// Who has a machine: decided once, atomically, between its caller and a pool that wants it back.
#[derive(Debug, Default)]
pub(super) struct Hold {
    state: AtomicU8,
    failed: Arc<AtomicBool>,
    /// The pool's name, for as long as a machine of it is left to its holder.
    name: OnceLock<Claim>,
}

/// The claim on a pool's name, shared by what must be gone before somebody else may have it.
#[derive(Clone)]
pub(super) struct Claim(#[expect(dead_code, reason = "it is what keeps the name")] Arc<dyn Any + Send + Sync>);

impl Claim {
    pub(super) fn new(claim: Box<dyn Any + Send + Sync>) -> Claim {
        Claim(claim.into())
    }
}

impl std::fmt::Debug for Claim {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Claim")
    }
}

impl Hold {
    /// A caller takes it; false when it was revoked before.
    pub(super) fn take(&self) -> bool {
        self.state.compare_exchange(GRANTED, TAKEN, Ordering::AcqRel, Ordering::Acquire).is_ok()
    }

    /// The pool takes it back before a caller has it; false when one has.
    pub(super) fn revoke(&self) -> bool {
        self.state.compare_exchange(GRANTED, REVOKED, Ordering::AcqRel, Ordering::Acquire).is_ok()
    }

    /// The pool ends a lease.
    pub(super) fn end(&self) {
        self.state.store(REVOKED, Ordering::Release);
    }

    /// The pool leaves it to its holder.
    pub(super) fn retain(&self, name: Option<Claim>) {
        if let Some(name) = name {
            let _ = self.name.set(name);
        }
        self.state.store(RETAINED, Ordering::Release);
    }

    fn retained(&self) -> bool {
        self.state() == RETAINED
    }

    fn state(&self) -> u8 {
        self.state.load(Ordering::Acquire)
    }
}
