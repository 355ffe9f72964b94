//! Publication of state changes: the newest for everybody, and every single one for subscribers.

use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::mpsc;

use crate::state::State;

/// A published state. Its generation rises by exactly one with every change.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Status {
    /// The state.
    pub state: State,
    /// How many changes came before it.
    pub generation: u64,
    /// Why it changed.
    pub cause: Cause,
}

/// Why a state changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Cause {
    /// It was created or found so.
    Known,
    /// Somebody requested it here.
    Requested,
    /// An operation ended.
    Settled,
    /// The machine exited by itself.
    Exited,
    /// Another process did it.
    Elsewhere,
}

/// Every state change since the subscription, in order; none is missed, however short it was.
///
/// A subscriber that does not read costs memory in proportion to the changes it did not read, and slows nobody.
#[derive(Debug)]
pub struct Subscription {
    first: Option<Status>,
    rest: mpsc::UnboundedReceiver<Status>,
}

impl Subscription {
    /// The next status: at first the one at the moment of subscription. `None` once the machine's task has ended.
    ///
    /// # Cancel safety
    /// A dropped call loses nothing.
    pub async fn next(&mut self) -> Option<Status> {
        match self.first.take() {
            Some(status) => Some(status),
            None => self.rest.recv().await,
        }
    }

    /// The next status if there is one already.
    pub fn try_next(&mut self) -> Option<Status> {
        self.first.take().or_else(|| self.rest.try_recv().ok())
    }
}

/// The publisher's side, shared with every handle. Only the machine's task publishes.
#[derive(Clone, Debug)]
pub(crate) struct Publisher(Arc<Mutex<Inner>>);

struct Inner {
    now: Status,
    subscribers: Vec<mpsc::UnboundedSender<Status>>,
    hooks: Vec<Hook>,
    closed: bool,
}

/// Told of every change, under the publisher's lock: it must not wait. False when it is not wanted any more.
pub(crate) type Hook = Box<dyn Fn(Status) -> bool + Send>;

impl std::fmt::Debug for Inner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Publisher").field("now", &self.now).finish_non_exhaustive()
    }
}

impl Publisher {
    pub(crate) fn new(state: State) -> Publisher {
        let now = Status { state, generation: 0, cause: Cause::Known };
        Publisher(Arc::new(Mutex::new(Inner { now, subscribers: Vec::new(), hooks: Vec::new(), closed: false })))
    }

    pub(crate) fn now(&self) -> Status {
        self.lock().now
    }

    pub(crate) fn publish(&self, state: State, cause: Cause) {
        let mut inner = self.lock();
        inner.now = Status { state, generation: inner.now.generation + 1, cause };
        let now = inner.now;
        inner.subscribers.retain(|subscriber| subscriber.send(now).is_ok());
        inner.hooks.retain(|hook| hook(now));
    }

    /// Has every later change told to `hook`, and returns the status now. One channel may so serve many machines.
    pub(crate) fn hook(&self, hook: Hook) -> Status {
        let mut inner = self.lock();
        inner.hooks.push(hook);
        inner.now
    }

    /// The snapshot and the subscription are one: nothing fits between them.
    pub(crate) fn subscribe(&self) -> Subscription {
        let (send, rest) = mpsc::unbounded_channel();
        let mut inner = self.lock();
        if !inner.closed {
            inner.subscribers.push(send);
        }
        Subscription { first: Some(inner.now), rest }
    }

    /// Ends every subscription.
    pub(crate) fn close(&self) {
        let mut inner = self.lock();
        inner.closed = true;
        inner.subscribers.clear();
        inner.hooks.clear();
    }

    // The lock is held for a few moves and never across an await; a panic cannot leave it half done.
    fn lock(&self) -> std::sync::MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
