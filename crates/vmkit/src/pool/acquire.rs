//! The way to a machine: the queue, the check, the binding, the hand-over.
//!
//! A machine travels to its caller as a [`Grant`]. Wherever it is dropped on the way, in a channel that nobody reads any more or
//! in a future that is not polled again, it says so to the supervisor; unused, it is handed to the next. Handing over is one
//! atomic step, in which either the caller or a pool that closes wins.

use std::collections::BTreeMap;
use std::future::{Future, IntoFuture};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use futures::FutureExt;
use futures::future::BoxFuture;
use tokio::sync::oneshot;
use tokio::time::{Instant, timeout, timeout_at};
use tracing::{Instrument, debug_span};

use super::backoff::after;
use super::config::OnFailure;
use super::lease::{Hold, Lease};
use super::message::{Claimant, Mailbox, Message, Waiter};
use super::slots::SlotNo;
use super::{Pool, Shared, tasks};
use crate::error::{Error, ErrorKind, Result};
use crate::guest::{Binding, GuestFile};
use crate::instance::Instance;
use crate::state::State;

/// How long a caller may take to receive what it was granted after its deadline, before it is taken for gone.
const SLACK: Duration = Duration::from_secs(1);

/// What a caller wants; await it, or [`queue`](Acquire::queue) it first to see its place.
#[must_use = "an acquire does nothing until it is awaited"]
pub struct Acquire {
    pool: Pool,
    binding: Binding,
    labels: BTreeMap<String, String>,
    key: Option<String>,
    holder: Option<String>,
    limit: Option<Duration>,
    timeout: Duration,
}

impl Acquire {
    pub(super) fn new(pool: Pool) -> Acquire {
        let timeout = pool.shared.config.acquire_timeout;
        let (binding, labels) = (Binding::default(), BTreeMap::new());
        Acquire { pool, binding, labels, key: None, holder: None, limit: None, timeout }
    }

    /// Sets how long it waits at most; with zero it does not wait, and fails. At its end the error says why, and when it is
    /// tried next.
    pub fn timeout(mut self, timeout: Duration) -> Acquire {
        self.timeout = timeout;
        self
    }

    /// Adds a variable to the environment of every command in the machine.
    pub fn env(mut self, key: impl Into<String>, value: impl Into<String>) -> Acquire {
        self.binding.env.push((key.into(), value.into()));
        self
    }

    /// Writes a file in the machine before it is handed over; together with the rest at most 4 MiB.
    pub fn file(mut self, file: GuestFile) -> Acquire {
        self.binding.files.push(file);
        self
    }

    /// Sets the machine's host name.
    pub fn hostname(mut self, name: impl Into<String>) -> Acquire {
        self.binding.hostname = Some(name.into());
        self
    }

    /// Marks the lease; shown in the pool's status, never interpreted.
    pub fn label(mut self, key: impl Into<String>, value: impl Into<String>) -> Acquire {
        self.labels.insert(key.into(), value.into());
        self
    }

    /// Whom it is for, in events and in the status.
    pub fn holder(mut self, holder: impl Into<String>) -> Acquire {
        self.holder = Some(holder.into());
        self
    }

    /// On whose account: callers are served in order within a key, and by the keys' weights between them.
    pub fn key(mut self, key: impl Into<String>) -> Acquire {
        self.key = Some(key.into());
        self
    }

    /// Ends the lease when it has lasted that long: the machine is deleted under its holder, and replaced.
    pub fn time_limit(mut self, limit: Duration) -> Acquire {
        self.limit = Some(limit);
        self
    }

    /// Takes a place in the queue at once. What it returns is to be awaited; dropped, it gives its place up.
    pub fn queue(self) -> Pending {
        let shared = self.pool.shared.clone();
        let ticket = shared.ticket();
        let (reply, answer) = oneshot::channel();
        let now = Instant::now();
        let deadline = after(now, self.timeout);
        let who = Claimant {
            ticket,
            key: self.key.unwrap_or_default().into(),
            holder: self.holder.map(Into::into),
            labels: Arc::new(self.labels),
            limit: self.limit,
            since: now,
            deadline,
            turn: None,
        };
        let waiter = Box::new(Waiter { who, reply });
        let sent = match shared.usable().and_then(|()| self.binding.check()).map_err(|error| error.during("Acquire")) {
            Ok(()) => shared.mailbox.send(Message::Acquire(waiter)).map_err(|_| shared.closed()),
            Err(error) => Err(error),
        };
        let place = Ticket { shared: shared.clone(), ticket, queued: sent.is_ok() };
        let wait = Wait { ticket: place, deadline, since: now, binding: self.binding };
        let future = match sent {
            Ok(()) => wait.run(answer).boxed(),
            Err(error) => std::future::ready(Err(error)).boxed(),
        };
        Pending { future, shared, ticket }
    }
}

impl IntoFuture for Acquire {
    type Output = Result<Lease>;
    type IntoFuture = Pending;

    fn into_future(self) -> Pending {
        self.queue()
    }
}

/// A caller in the queue.
///
/// # Errors
/// [`ErrorKind::TimedOut`] at its deadline, with why and when it is tried next; [`ErrorKind::Exhausted`] when the queue is full;
/// [`ErrorKind::Closed`] when the pool closes; [`ErrorKind::InvalidArgument`] when its binding is invalid, and what the
/// guest said when two machines in a row could not be given it; and with [`OnFailure::FailFast`] the last error of the pool.
///
/// # Cancel safety
/// Dropped at any instant, it does not delay another caller. A machine that was being given its binding at that instant is
/// deleted and replaced, because nobody else may have what it was given; otherwise it takes none with it.
#[must_use = "a place in the queue is given up when it is dropped"]
pub struct Pending {
    future: BoxFuture<'static, Result<Lease>>,
    shared: Arc<Shared>,
    ticket: u64,
}

/// Where a caller is in the queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// How many are served before it.
    pub ahead: usize,
    /// How long that will take, from what was seen so far; absent when nothing was.
    pub estimate: Option<Duration>,
}

impl Pending {
    /// Its place now; `None` when it waits no longer.
    pub async fn place(&self) -> Option<Place> {
        let (reply, answer) = oneshot::channel();
        self.shared.mailbox.send(Message::Place(self.ticket, reply)).ok()?;
        answer.await.ok().flatten()
    }
}

impl Future for Pending {
    type Output = Result<Lease>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<Lease>> {
        self.future.poll_unpin(cx)
    }
}

/// A place in the queue, given up when it is dropped.
struct Ticket {
    shared: Arc<Shared>,
    ticket: u64,
    queued: bool,
}

impl Drop for Ticket {
    fn drop(&mut self) {
        if self.queued {
            let _ = self.shared.mailbox.send(Message::Cancel(self.ticket));
        }
    }
}

struct Wait {
    ticket: Ticket,
    since: Instant,
    deadline: Instant,
    binding: Binding,
}

impl Wait {
    async fn run(mut self, mut answer: oneshot::Receiver<Result<Grant>>) -> Result<Lease> {
        let shared = self.ticket.shared.clone();
        let span = debug_span!("acquire", pool = %shared.name);
        let mut refused = false;
        async {
            loop {
                // Biased towards the answer: a machine that is there at the deadline is taken.
                let mut grant = match timeout_at(self.deadline, &mut answer).instrument(debug_span!("queued")).await {
                    Ok(Ok(granted)) => granted?,
                    Ok(Err(_)) => return Err(shared.closed()),
                    Err(_) => return Err(self.late(&shared)),
                };
                self.ticket.queued = false;
                let error = match timeout_at(self.deadline, grant.prepare(&self.binding, &shared)).await {
                    Ok(Ok(())) => match grant.deliver(&shared) {
                        Some(lease) => return Ok(lease),
                        None => return Err(shared.closed()),
                    },
                    Ok(Err(error)) => error,
                    Err(_) => {
                        grant.reject(self.late(&shared), false, None);
                        return Err(self.late(&shared));
                    }
                };
                // What two guests answer that they cannot be given, none can: it would cost every machine that there is.
                let answered = !self.binding.is_empty() && is_answer(error.kind());
                let own = error.kind() == ErrorKind::InvalidArgument || (answered && refused);
                if own || shared.config.on_failure == OnFailure::FailFast {
                    let told = error.duplicate();
                    grant.reject(error, answered, None);
                    return Err(told);
                }
                refused = answered;
                let (reply, next) = oneshot::channel();
                self.ticket.queued = true;
                grant.reject(error, answered, Some(reply));
                answer = next;
            }
        }
        .instrument(span)
        .await
    }

    fn late(&self, shared: &Shared) -> Error {
        let waited = self.deadline.duration_since(self.since);
        let error =
            Error::new(ErrorKind::TimedOut, format!("no machine of the pool {} within {waited:?}", shared.name));
        match shared.trouble() {
            Some((cause, next)) => {
                let in_time = next.saturating_duration_since(Instant::now());
                error.caused_by(cause).hint(format!("machines cannot be made; the next attempt is in {in_time:?}"))
            }
            None => error.hint("wait longer, or make the pool larger"),
        }
        .during("Acquire")
    }
}

/// Whether a guest said this, and is well.
fn is_answer(kind: ErrorKind) -> bool {
    use ErrorKind::{Backend, InvalidArgument, NotFound, PermissionDenied, ResourceExhausted};
    matches!(kind, Backend | InvalidArgument | NotFound | PermissionDenied | ResourceExhausted)
}

/// A machine on its way to a caller.
pub(super) struct Grant {
    pub slot: SlotNo,
    pub instance: Instance,
    pub hold: Arc<Hold>,
    pub mailbox: Mailbox,
    pub answered: Instant,
    /// What is needed to queue again in the same place.
    pub claimant: Claimant,
    touched: bool,
    done: bool,
}

impl Grant {
    pub(super) fn new(
        slot: SlotNo,
        instance: Instance,
        hold: Arc<Hold>,
        mailbox: Mailbox,
        answered: Instant,
        claimant: Claimant,
    ) -> Grant {
        Grant { slot, instance, hold, mailbox, answered, claimant, touched: false, done: false }
    }

    /// When its caller is taken for gone.
    pub(super) fn expires(claimant: &Claimant) -> Instant {
        after(claimant.deadline, SLACK)
    }

    async fn prepare(&mut self, binding: &Binding, shared: &Shared) -> Result<()> {
        let (config, metrics) = (&shared.config, shared.metrics());
        let fresh = !config.health_fresh.is_zero() && self.answered.elapsed() <= config.health_fresh;
        if !binding.is_empty() {
            // The answer to it is an answer: no other question is needed.
            self.touched = true;
            let began = Instant::now();
            let span = debug_span!("bind", vm = self.instance.id().as_str());
            let bound = timeout(config.health_timeout, tasks::guarded(self.instance.bind(binding.clone())))
                .instrument(span)
                .await;
            metrics.bind.record(began.elapsed().as_secs_f64());
            return bound.unwrap_or_else(|_| Err(tasks::silent(&self.instance, config.health_timeout)));
        }
        if fresh {
            return match self.instance.state() {
                State::Running => Ok(()),
                _ => Err(self.instance.not_running()),
            };
        }
        let began = Instant::now();
        let span = debug_span!("health", vm = self.instance.id().as_str());
        let answer = timeout(config.health_timeout, tasks::guarded(self.instance.ping())).instrument(span).await;
        metrics.health.record(began.elapsed().as_secs_f64());
        answer.unwrap_or_else(|_| Err(tasks::silent(&self.instance, config.health_timeout)))
    }

    /// The hand-over: `None` when the pool was quicker and has taken it back.
    fn deliver(mut self, shared: &Arc<Shared>) -> Option<Lease> {
        self.done = true;
        if !self.hold.take() {
            return None;
        }
        // Before the lease can say anything else.
        let _ = self.mailbox.send(Message::Delivered(self.slot));
        Some(Lease::new(self.instance.clone(), self.slot, self.hold.clone(), shared.clone()))
    }

    /// `answered`: by a guest that is well, to what it was to be given.
    fn reject(mut self, error: Error, answered: bool, reply: Option<oneshot::Sender<Result<Grant>>>) {
        self.done = true;
        let waiter = reply.map(|reply| Box::new(Waiter { who: self.claimant.clone(), reply }));
        let _ = self.mailbox.send(Message::Rejected { slot: self.slot, error, answered, waiter });
    }
}

impl Drop for Grant {
    fn drop(&mut self) {
        if !self.done {
            let _ = self.mailbox.send(Message::Back { slot: self.slot, touched: self.touched });
        }
    }
}
