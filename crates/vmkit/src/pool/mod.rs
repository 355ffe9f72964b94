//! A warm pool: machines made ready ahead of time, so that acquiring one is fast.
//!
//! ```text
//!  Pool ── acquire ──▶ queue ─┐                         ┌─▶ tasks: create, start, check, delete ─▶ Instance
//!   ▲                         ▼                         │          │ each ends with one message
//!   │                     supervisor (one task) ── plan (pure) ◀───┘
//!   │                         │ owns slots, counts, timers, events
//!  Lease ◀── Grant (check, bind, hand-over in the caller's own future) ◀──┘
//! ```
//!
//! One task, the supervisor, owns everything that is counted, and is told of everything by messages: there is no lock, so
//! none is held across a backend call. What to do next follows from the counts ([`plan`]). A machine that was used is never
//! handed out again: it is deleted, and a new one made, under its name where that is wanted ([`Reuse`]).
//!
//! Callers are served in the order in which they came, but for their weights; the machine that became ready last is handed over
//! first: it has rested least, and answers fastest. When there are too many, the one that has been ready longest goes.
//!
//! # What belongs to a pool
//!
//! Its machines carry its name as the label `vmkit.pool`, from before they exist, and one living process at a time may use
//! that name ([`Provider::claim`]). So whatever carries exactly that label when a pool starts was left by a process that
//! died, and is deleted; adopting it instead could hand out a machine that somebody had used. Nothing else is touched.
//!
//! # Example
//!
//! ```
//! # #[cfg(feature = "sim")]
//! # fn main() -> vmkit::Result<()> {
//! # tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap().block_on(async {
//! use std::time::Duration;
//! use vmkit::pool::Pool;
//! use vmkit::sim::{SimProvider, World};
//! use vmkit::{Host, Source, Spec};
//!
//! let host = Host::new(SimProvider::new(World::new()));
//! let pool = Pool::builder(host, Spec::new(Source::Alias("base".into()))).name("ci").size(2).build()?;
//! pool.start().await?;
//!
//! let lease = pool.acquire().env("JOB", "17").timeout(Duration::from_secs(30)).await?;
//! assert_eq!(lease.command("env").arg("JOB").output().await?.stdout, b"17\n");
//! lease.delete().await?;
//!
//! assert!(pool.close(Duration::from_secs(60)).await.is_clean());
//! # Ok(()) }) }
//! # #[cfg(not(feature = "sim"))]
//! # fn main() {}
//! ```

mod acquire;
mod backoff;
mod builder;
mod close;
mod closing;
mod config;
mod events;
mod execute;
mod kept;
mod lease;
mod message;
pub mod metrics;
mod outcomes;
mod pace;
pub mod plan;
mod queue;
mod requests;
mod slots;
mod status;
mod supervisor;
mod tasks;

use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;

use crate::driver::Provider;
use crate::error::{Error, ErrorKind, Result};
use crate::host::Host;
use crate::spec::{Id, Spec};

pub use acquire::{Acquire, Pending, Place};
pub use builder::PoolBuilder;
pub use close::{CloseReport, Left};
pub use config::{KeepFailed, OnFailure, PoolConfig, Reuse, Staging};
pub use events::{Event, EventKind, Events, Next};
pub use lease::Lease;
pub use plan::{Counts, Limits, Sizing, Tier, Tiers};
pub use status::{PoolPhase, PoolStatus, Totals, Trouble, VmPhase, VmStatus};

use message::{Mailbox, Message};
use metrics::Metrics;

/// A pool of machines. Cheap to clone; when the last handle is dropped without a [`close`](Pool::close), it deletes what nobody
/// holds, and the rest when it is given back.
#[derive(Clone)]
pub struct Pool {
    shared: Arc<Shared>,
    _handle: Arc<Handle>,
}

/// What only a supervisor needs.
struct Parts {
    backend: Arc<dyn tasks::Backend>,
    spec: Spec,
    sizing: Arc<dyn Sizing>,
    console: builder::Console,
    seed: Option<u64>,
}

/// What handles, leases and waiters share with the supervisor.
struct Shared {
    name: Id,
    config: PoolConfig,
    mailbox: Mailbox,
    phase: AtomicU8,
    tickets: AtomicU64,
    metrics: OnceLock<Metrics>,
    /// The last error, and when it is tried next; read when an acquire is late. Held for a copy only.
    trouble: Mutex<Option<(Error, Instant)>>,
    /// What a supervisor that has ended leaves, or one that has not begun needs.
    rest: Mutex<Rest>,
}

#[derive(Default)]
struct Rest {
    parts: Option<(Parts, mpsc::UnboundedReceiver<Message>)>,
    last: Option<Arc<PoolStatus>>,
}

/// The phases of [`PoolPhase`], in its order.
const NEW: u8 = 0;
const STARTING: u8 = 1;
const OPEN: u8 = 2;
const CLOSING: u8 = 3;
const CLOSED: u8 = 4;

impl Pool {
    /// A pool of machines made from `spec`.
    pub fn builder<P: Provider>(host: Host<P>, spec: Spec) -> PoolBuilder {
        PoolBuilder::new(host, spec)
    }

    fn new(name: Id, config: PoolConfig, parts: Parts) -> Pool {
        let (mailbox, inbox) = mpsc::unbounded_channel();
        let rest = Rest { parts: Some((parts, inbox)), last: None };
        let shared = Arc::new(Shared {
            name,
            config,
            mailbox: mailbox.clone(),
            phase: AtomicU8::new(NEW),
            tickets: AtomicU64::new(0),
            metrics: OnceLock::new(),
            trouble: Mutex::new(None),
            rest: Mutex::new(rest),
        });
        Pool { shared, _handle: Arc::new(Handle(mailbox)) }
    }

    /// The pool's name.
    pub fn name(&self) -> &str {
        self.shared.name.as_str()
    }

    /// Its configuration, as it was built; [`resize`](Pool::resize) changes what is in the [`status`](Pool::status).
    pub fn config(&self) -> &PoolConfig {
        &self.shared.config
    }

    /// Takes the pool's name, deletes what an earlier process of it left, and returns when one machine is ready; the others
    /// are made in the background. Once only. Must be called in a tokio runtime.
    ///
    /// # Errors
    /// [`ErrorKind::IllegalRequest`] when it was started before, [`ErrorKind::Closed`] when it was closed;
    /// [`ErrorKind::Busy`] when another pool has the name. When the name could not be taken, or not be looked, nothing was
    /// started and it may be tried again. [`ErrorKind::TimedOut`] when no machine was ready within the acquire timeout: then
    /// the pool has started and goes on trying. With [`OnFailure::FailFast`], the first attempt's error in the same way.
    ///
    /// # Cancel safety
    /// A dropped call is carried to its end.
    pub async fn start(&self) -> Result<()> {
        let shared = &self.shared;
        let begun = shared.phase.compare_exchange(NEW, STARTING, Ordering::AcqRel, Ordering::Acquire);
        let parts = shared.rest().parts.take();
        let (Ok(_), Some((parts, inbox))) = (begun, parts) else {
            return Err(match shared.phase.load(Ordering::Acquire) {
                CLOSING | CLOSED => shared.closed(),
                _ => Error::new(ErrorKind::IllegalRequest, format!("the pool {} was started before", shared.name))
                    .hint("use it as it is: a pool is started once"),
            }
            .during("Start"));
        };
        let (reply, answer) = oneshot::channel();
        supervisor::spawn(shared.clone(), parts, inbox, reply);
        let limit = shared.config.acquire_timeout;
        match tokio::time::timeout(limit, answer).await {
            Ok(Ok(result)) => result.map_err(|error| error.during("Start")),
            Ok(Err(_)) => Err(shared.closed().during("Start")),
            Err(_) => {
                let error = Error::new(ErrorKind::TimedOut, format!("no machine was ready within {limit:?}"));
                let error = error.during("Start").hint("the pool goes on trying; its status says why it fails");
                Err(match shared.trouble() {
                    Some((cause, _)) => error.caused_by(cause),
                    None => error,
                })
            }
        }
    }

    /// A machine for the caller: await what it returns, after saying what it is to be given.
    pub fn acquire(&self) -> Acquire {
        Acquire::new(self.clone())
    }

    /// The pool now, all parts of the same moment.
    pub async fn status(&self) -> Arc<PoolStatus> {
        match self.ask(Message::Status).await {
            Some(status) => status,
            None => self.shared.last_status(),
        }
    }

    /// Every event from now on, with the status at this very moment.
    pub async fn subscribe(&self) -> Events {
        match self.ask(Message::Subscribe).await {
            Some(events) => events,
            None => Events { status: self.shared.last_status(), receiver: None },
        }
    }

    /// Changes the size while it runs. Tiers keep their preference: the coldest one gives and takes. Zero empties it, but for
    /// what is held.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`] beyond the configured [`max`](PoolConfig::max), or beyond a million where there is none;
    /// [`ErrorKind::Closed`]; [`ErrorKind::IllegalRequest`] before it was started.
    pub async fn resize(&self, size: usize) -> Result<()> {
        self.shared.usable()?;
        self.ask(|reply| Message::Resize(size, reply)).await.unwrap_or_else(|| Err(self.shared.closed()))
    }

    /// A failed lease that was kept for debugging. It is suspended, or off where machines cannot be suspended: start it to go on.
    /// Dropped, it is kept again until its period ends.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] when nothing of that name is kept, or somebody has it.
    pub async fn take_kept(&self, id: &Id) -> Result<Lease> {
        self.shared.usable()?;
        self.ask(|reply| Message::Take(id.clone(), reply)).await.unwrap_or_else(|| Err(self.shared.closed()))
    }

    /// Deletes a failed lease that was kept, before its period ends.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`], or what deleting it failed with.
    pub async fn discard_kept(&self, id: &Id) -> Result<()> {
        self.shared.usable()?;
        self.ask(|reply| Message::Discard(id.clone(), reply)).await.unwrap_or_else(|| Err(self.shared.closed()))
    }

    /// Closes it: callers that wait get an error, creation is cancelled, and all machines are deleted at once; those that are
    /// held as well, unless the configuration leaves them to their holders. Returns when that is done, or after `limit` with
    /// what is left: a second close tries again. Closers at the same time share one result, at the earliest of their limits.
    ///
    /// # Cancel safety
    /// A dropped call is carried to its end.
    pub async fn close(&self, limit: Duration) -> CloseReport {
        let shared = &self.shared;
        if shared.phase.compare_exchange(NEW, CLOSED, Ordering::AcqRel, Ordering::Acquire).is_ok() {
            *shared.rest() = Rest::default();
            return CloseReport::default();
        }
        let deadline = backoff::after(Instant::now(), limit);
        self.ask(|reply| Message::Close(deadline, reply)).await.unwrap_or_default()
    }

    /// `None` when there is no supervisor, before the start and after the close.
    async fn ask<T>(&self, message: impl FnOnce(oneshot::Sender<T>) -> Message) -> Option<T> {
        if self.shared.phase.load(Ordering::Acquire) == NEW {
            return None;
        }
        let (reply, answer) = oneshot::channel();
        self.shared.mailbox.send(message(reply)).ok()?;
        answer.await.ok()
    }
}

impl std::fmt::Debug for Pool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pool").field("name", &self.name()).finish_non_exhaustive()
    }
}

impl Shared {
    fn ticket(&self) -> u64 {
        self.tickets.fetch_add(1, Ordering::Relaxed)
    }

    fn metrics(&self) -> &Metrics {
        self.metrics.get_or_init(|| Metrics::new(self.name.as_str()))
    }

    fn trouble(&self) -> Option<(Error, Instant)> {
        let trouble = self.trouble.lock().unwrap_or_else(PoisonError::into_inner);
        trouble.as_ref().map(|(error, next)| (error.duplicate(), *next))
    }

    fn set_trouble(&self, trouble: Option<(Error, Instant)>) {
        *self.trouble.lock().unwrap_or_else(PoisonError::into_inner) = trouble;
    }

    fn rest(&self) -> std::sync::MutexGuard<'_, Rest> {
        self.rest.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether there is somebody to be asked.
    fn usable(&self) -> Result<()> {
        match self.phase.load(Ordering::Acquire) {
            NEW => Err(Error::new(ErrorKind::IllegalRequest, format!("the pool {} has not been started", self.name))
                .hint("call start first")),
            CLOSED => Err(self.closed()),
            // While it closes it is told, so that the attempt is an event.
            _ => Ok(()),
        }
    }

    fn closed(&self) -> Error {
        Error::new(ErrorKind::Closed, format!("the pool {} is closed", self.name)).hint("build a new one")
    }

    fn phase(&self) -> PoolPhase {
        match self.phase.load(Ordering::Acquire) {
            NEW => PoolPhase::New,
            STARTING => PoolPhase::Starting,
            OPEN => PoolPhase::Open,
            CLOSING => PoolPhase::Closing,
            _ => PoolPhase::Closed,
        }
    }

    fn last_status(&self) -> Arc<PoolStatus> {
        let last = self.rest().last.clone();
        last.unwrap_or_else(|| {
            Arc::new(PoolStatus {
                name: self.name.as_str().to_owned(),
                phase: self.phase(),
                target: 0,
                counts: Counts::default(),
                totals: Totals::default(),
                sequence: 0,
                vms: Vec::new(),
                trouble: None,
            })
        })
    }
}

/// Dropped with the last handle.
struct Handle(Mailbox);

impl Drop for Handle {
    fn drop(&mut self) {
        let _ = self.0.send(Message::Abandoned);
    }
}
