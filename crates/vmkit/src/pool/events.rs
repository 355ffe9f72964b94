//! What happened in a pool, numbered.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio::sync::broadcast;
use tokio::sync::broadcast::error::RecvError;

use super::status::PoolStatus;
use crate::error::Error;
use crate::spec::Id;

/// What happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize)]
pub enum EventKind {
    /// A caller began to wait: nothing was ready for it.
    AcquireWaiting,
    /// A machine left the ready ones for a caller.
    VmDequeued,
    /// A caller has it.
    Acquired,
    /// A caller's machine turned out unfit, or its acquire ended with an error.
    AcquireFailed,
    /// Somebody wanted a machine of a pool that is closing.
    AttemptToUseClosedPool,
    /// A lease is over; its machine will be deleted or kept.
    Release,
    /// A lease's machine is gone.
    Released,
    /// An attempt to make a machine began.
    VmCreateStarted,
    /// A machine is ready.
    VmCreated,
    /// An attempt failed.
    VmCreateFailed,
    /// A released machine's replacement was requested.
    ReplenishStarted,
    /// The pool is at its full size again.
    Replenished,
    /// A replacement failed; it is tried again.
    ReplenishFailed,
    /// The pool is at its full size for the first time.
    StartPoolFull,
    /// What an earlier process of this pool left was deleted.
    OrphanedVmDeleted,
    /// The pool closed, and left a machine to its holder.
    AcquiredVmRetained,
}

impl EventKind {
    /// Every kind.
    pub const ALL: [EventKind; 16] = [
        EventKind::AcquireWaiting,
        EventKind::VmDequeued,
        EventKind::Acquired,
        EventKind::AcquireFailed,
        EventKind::AttemptToUseClosedPool,
        EventKind::Release,
        EventKind::Released,
        EventKind::VmCreateStarted,
        EventKind::VmCreated,
        EventKind::VmCreateFailed,
        EventKind::ReplenishStarted,
        EventKind::Replenished,
        EventKind::ReplenishFailed,
        EventKind::StartPoolFull,
        EventKind::OrphanedVmDeleted,
        EventKind::AcquiredVmRetained,
    ];
}

/// One event. What does not apply is absent.
#[derive(Clone, Debug)]
pub struct Event {
    /// When.
    pub time: SystemTime,
    /// Its number: one more than the event's before.
    pub sequence: u64,
    /// What.
    pub kind: EventKind,
    /// In which pool.
    pub pool: Arc<str>,
    /// To which machine.
    pub vm: Option<Id>,
    /// In which attempt to make a machine, counted from 1.
    pub attempt: Option<u64>,
    /// For whom, as the acquire said.
    pub holder: Option<Arc<str>>,
    /// How long it took: the wait of an acquire, the making of a machine, the time it was held.
    pub duration: Option<Duration>,
    /// What went wrong.
    pub error: Option<Arc<Error>>,
}

/// The next item of a stream of events.
#[derive(Clone, Debug)]
pub enum Next {
    /// An event.
    Event(Arc<Event>),
    /// The reader was too slow: this many were dropped, the oldest first.
    Lost(u64),
}

/// The events of a pool from one moment on, with the pool's status at that very moment.
///
/// A reader that is slow slows nobody: it loses the oldest, and is told how many.
/// [`Pool::subscribe`](super::Pool::subscribe) again gives a status to go on from.
#[derive(Debug)]
pub struct Events {
    pub(super) status: Arc<PoolStatus>,
    pub(super) receiver: Option<broadcast::Receiver<Arc<Event>>>,
}

impl Events {
    /// The pool's status at the moment of subscription; the first event is the one after its
    /// [`sequence`](PoolStatus::sequence).
    pub fn status(&self) -> &PoolStatus {
        &self.status
    }

    /// The next event; `None` when the pool has closed.
    ///
    /// # Cancel safety
    /// A dropped call loses nothing.
    pub async fn next(&mut self) -> Option<Next> {
        match self.receiver.as_mut()?.recv().await {
            Ok(event) => Some(Next::Event(event)),
            Err(RecvError::Lagged(lost)) => Some(Next::Lost(lost)),
            Err(RecvError::Closed) => {
                self.receiver = None;
                None
            }
        }
    }

    /// The next event if there is one already.
    pub fn try_next(&mut self) -> Option<Next> {
        match self.receiver.as_mut()?.try_recv() {
            Ok(event) => Some(Next::Event(event)),
            Err(broadcast::error::TryRecvError::Lagged(lost)) => Some(Next::Lost(lost)),
            Err(broadcast::error::TryRecvError::Empty | broadcast::error::TryRecvError::Closed) => None,
        }
    }
}

/// The pool's end of all streams.
pub(super) struct Journal {
    pool: Arc<str>,
    sequence: u64,
    sender: broadcast::Sender<Arc<Event>>,
}

/// What an event tells beside its kind.
#[derive(Default)]
pub(super) struct Details<'a> {
    pub vm: Option<&'a Id>,
    pub attempt: Option<u64>,
    pub holder: Option<&'a Arc<str>>,
    pub duration: Option<Duration>,
    pub error: Option<&'a Error>,
}

impl Journal {
    pub(super) fn new(pool: Arc<str>, buffer: usize) -> Journal {
        Journal { pool, sequence: 0, sender: broadcast::channel(buffer).0 }
    }

    pub(super) fn sequence(&self) -> u64 {
        self.sequence
    }

    pub(super) fn subscribe(&self) -> broadcast::Receiver<Arc<Event>> {
        self.sender.subscribe()
    }

    pub(super) fn write(&mut self, kind: EventKind, details: Details<'_>) {
        self.sequence += 1;
        tracing::trace!(
            pool = %self.pool, sequence = self.sequence, ?kind, vm = details.vm.map(Id::as_str), attempt = details.attempt,
            holder = details.holder.map(|holder| &**holder), error = details.error.map(tracing::field::display), "event"
        );
        // Nobody listens, nothing to make; the number is spent all the same.
        if self.sender.receiver_count() == 0 {
            return;
        }
        let event = Event {
            time: SystemTime::now(),
            sequence: self.sequence,
            kind,
            pool: self.pool.clone(),
            vm: details.vm.cloned(),
            attempt: details.attempt,
            holder: details.holder.cloned(),
            duration: details.duration,
            error: details.error.map(|error| Arc::new(error.duplicate())),
        };
        let _ = self.sender.send(Arc::new(event));
    }
}
