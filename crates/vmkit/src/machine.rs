//! One task per machine: it owns the driver, is the only code that calls it, and the only writer of its state.
//!
//! ```text
//!  Instance ──requests──▶ mailbox ─┐
//!  Instance ──kill───────────────▶ │ Machine (one task) ──▶ Driver ──▶ hypervisor
//!                                  │   plan → publish → run → inspect → settle → publish → reply
//!  Instance ◀──status, guest────── ┘
//! ```
//!
//! Deliberately absent: a lock across a backend call, a second writer of the state, trust in what a driver returns.

mod work;

use std::future::{Future, pending};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::timeout;
use tracing::{debug, info, warn};

use crate::console::ConsoleSinks;
use crate::driver::{Driver, Exit, Spent};
use crate::error::{Error, ErrorKind, Result};
use crate::guest::Guest;
use crate::instance::StopReport;
use crate::publish::{Cause, Publisher};
use crate::snapshot::Snapshot;
use crate::spec::{Id, Timeouts};
use crate::state::{Action, Edge, Fact, State, Verdict, found, observe, plan, retrace, settle};

use work::{Ended, Noticed, exited, flat, held_elsewhere, notice, split_kill, unless_spent, work};

/// How long a forced stop waits for another process that operates on the machine.
const KILL_WAITS: Duration = Duration::from_millis(300);

/// How long it then waits for that process to let go of a machine that is off.
const LETS_GO: Duration = Duration::from_secs(2);

/// What callers ask of the task.
pub(crate) enum Request {
    Clone(oneshot::Sender<Result<()>>),
    Start(ConsoleSinks, oneshot::Sender<Result<()>>),
    Stop(Duration, oneshot::Sender<StopReport>),
    Suspend(oneshot::Sender<Result<()>>),
    Delete(oneshot::Sender<Result<()>>),
    Prespawn(oneshot::Sender<Result<()>>),
    /// To know what others did with it.
    Refresh(oneshot::Sender<Result<State>>),
    /// To be told when all that was asked before is done.
    Pass(oneshot::Sender<()>),
    Snapshot(oneshot::Sender<Result<Snapshot>>),
}

/// A forced stop: it passes the queue.
pub(crate) struct Kill(pub oneshot::Sender<StopReport>);

/// Told when a machine comes to exist and when nothing of it is left.
pub(crate) type Registrar = Box<dyn Fn(bool) + Send + Sync>;

pub(crate) struct Machine<D: Driver> {
    pub id: Id,
    pub driver: D,
    pub timeouts: Timeouts,
    pub status: Publisher,
    pub guest: watch::Sender<Option<Guest>>,
    pub requests: mpsc::UnboundedReceiver<Request>,
    pub kills: mpsc::UnboundedReceiver<Kill>,
    /// How it ended when nobody had asked, until a Stop reports it.
    pub crash: Arc<Mutex<Option<Exit>>>,
    pub exists: Registrar,
}

impl<D: Driver> Machine<D> {
    pub(crate) async fn run(mut self) {
        loop {
            let state = self.state();
            // Biased: a forced stop first, then the fact that the machine is gone, then what callers want of it.
            tokio::select! {
                biased;
                Some(kill) = self.kills.recv() => self.on_kill(kill).await,
                noticed = notice(&self.id, &mut self.driver, state) => match noticed {
                    Noticed::Exit(exit) => self.on_exit(exit).await,
                    Noticed::Free(seen) => self.on_free(seen).await,
                },
                request = self.requests.recv() => match request {
                    Some(request) => self.on_request(request).await,
                    // Every handle is gone. The machine itself goes on: whoever wants it adopts it.
                    None => break,
                },
            }
        }
    }

    fn state(&self) -> State {
        self.status.now().state
    }

    fn publish(&self, state: State, cause: Cause) {
        debug!(id = %self.id, %state, ?cause, "state");
        // The way in closes before anybody hears that it is closed, and opens before anybody hears that it is open.
        match state {
            State::Running => drop(self.guest.send_replace(self.driver.guest())),
            // What runs in the guest is to survive: cutting its callers off now would end it before it is saved.
            State::Suspending => {}
            State::Initial | State::Cloning | State::Starting | State::Stopping | State::Stopped => self.shut(),
            State::Suspended | State::Deleting | State::Deleted | State::ErrorUnknown => self.shut(),
        }
        match state {
            State::Deleted | State::Initial => (self.exists)(false),
            _ => (self.exists)(true),
        }
        self.status.publish(state, cause);
    }

    fn shut(&self) {
        self.guest.send_replace(None);
    }

    async fn on_exit(&mut self, exit: Exit) {
        // Another process may be stopping or suspending it right now: it is judged when that is done.
        let (limit, kills) = (self.timeouts.lock, Some(&mut self.kills));
        let begun = match work(self.driver.begin(Action::None), limit, "waiting", pending(), kills).await {
            Ended::Done(Ok(fact)) => fact,
            Ended::Done(Err(error)) => {
                warn!(id = %self.id, %error, "taking a machine that exited");
                None
            }
            Ended::Killed(kill) => return self.on_kill(kill).await,
            Ended::Panicked | Ended::CallerGone => None,
        };
        let seen = match begun {
            Some(fact) => Some(fact),
            None => self.inspect().await,
        };
        self.driver.end();
        if let Some(fact @ (Fact::Suspended | Fact::Absent)) = begun {
            return self.catch_up(fact);
        }
        if let Some(state) = observe(self.state(), seen) {
            info!(id = %self.id, code = exit.code, signal = exit.signal, "the machine exited");
            *self.crash.lock().unwrap_or_else(PoisonError::into_inner) = Some(exit);
            self.publish(state, Cause::Exited);
        } else {
            // It says it has ended and is found running: do not spin on a driver that contradicts itself.
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    /// It was found in the middle of another process's operation, and that is over.
    async fn on_free(&mut self, begun: Option<Result<Option<Fact>>>) {
        let seen = match begun {
            Some(Ok(Some(fact))) => Some(fact),
            Some(Ok(None)) => self.inspect().await,
            Some(Err(error)) => {
                warn!(id = %self.id, %error, "taking a machine that another process has operated on");
                // Not spinning on a driver that cannot tell; a request may do better meanwhile.
                return tokio::time::sleep(Duration::from_millis(100)).await;
            }
            None => None,
        };
        self.driver.end();
        self.catch_up(seen.unwrap_or(Fact::Broken));
    }

    async fn on_request(&mut self, request: Request) {
        match request {
            // A waiter that was cancelled never runs.
            Request::Clone(reply) if reply.is_closed() => {}
            Request::Start(_, reply) if reply.is_closed() => {}
            Request::Stop(_, reply) if reply.is_closed() => {}
            Request::Suspend(reply) if reply.is_closed() => {}
            Request::Delete(reply) if reply.is_closed() => {}
            Request::Prespawn(reply) if reply.is_closed() => {}
            Request::Refresh(reply) if reply.is_closed() => {}
            Request::Snapshot(reply) if reply.is_closed() => {}
            Request::Prespawn(reply) => self.prespawn(reply).await,
            Request::Refresh(reply) => self.refresh(reply).await,
            Request::Pass(reply) => drop(reply.send(())),
            Request::Snapshot(reply) => self.snapshot(reply).await,
            Request::Clone(reply) => self.clone_source(reply).await,
            Request::Start(console, reply) => self.start(console, reply).await,
            Request::Stop(grace, mut reply) => {
                let report = self.stop(grace, reply.closed()).await;
                let _ = reply.send(report);
            }
            Request::Suspend(reply) => self.suspend(reply).await,
            Request::Delete(mut reply) => {
                let result = self.delete(reply.closed()).await;
                let _ = reply.send(result);
            }
        }
    }

    /// Takes the machine for one operation and judges the request against what is there now.
    async fn admit(&mut self, action: Action, caller_gone: impl Future<Output = ()>) -> Result<Admitted> {
        let limit = self.timeouts.lock;
        let kills = Some(&mut self.kills);
        let seen = match work(self.driver.begin(action), limit, "waiting", caller_gone, kills).await {
            Ended::Done(Ok(seen)) => seen,
            Ended::Killed(Kill(done)) => {
                // It waits for another process's operation: that is what hangs, and what the kill is for.
                let stop = match self.is_nothing() {
                    true => Err(self.error(
                        ErrorKind::Busy,
                        Action::Stop,
                        "a machine of that name that is another's is operated on",
                    )),
                    false => self.force().await,
                };
                let _ = done.send(StopReport { run: Ok(()), stop, forced: true });
                return Err(self.error(ErrorKind::Cancelled, action, "a forced stop ended it"));
            }
            Ended::Done(Err(error)) if error.kind() == ErrorKind::TimedOut => {
                return Err(busy(limit).on(self.id.as_str()).during(action.name()));
            }
            ended => {
                return Err(flat(ended).err().map_or_else(
                    || self.error(ErrorKind::Cancelled, action, "cancelled"),
                    |error| error.on(self.id.as_str()).during(action.name()),
                ));
            }
        };
        if let Some(fact) = seen {
            self.catch_up(fact);
        }
        match plan(self.state(), action) {
            Verdict::Run(edge) => {
                self.publish(edge.via, Cause::Requested);
                Ok(Admitted::Run(edge))
            }
            Verdict::Already => {
                self.driver.end();
                Ok(Admitted::Already)
            }
            Verdict::Refuse => {
                self.driver.end();
                Err(Error::illegal(self.id.as_str(), self.state(), action))
            }
        }
    }

    /// Whether nothing of ours exists: what is there under that name is somebody else's.
    fn is_nothing(&self) -> bool {
        matches!(self.state(), State::Initial | State::Deleted)
    }

    /// Publishes what another process did meanwhile, as the steps that lead there.
    fn catch_up(&mut self, fact: Fact) {
        let from = self.state();
        let now = match (from, fact) {
            // Nothing of ours exists: what is there under that name is somebody else's, and cloning will say so.
            (State::Initial | State::Deleted, _) => from,
            // Only Delete leads out, whatever is found: also when nothing is, for then Delete has succeeded.
            (State::ErrorUnknown, _) => from,
            _ => found(fact),
        };
        for state in retrace(from, now) {
            self.publish(state, Cause::Elsewhere);
        }
    }

    /// Ends an operation: looks at what is there, publishes it, gives the machine free.
    async fn finish(&mut self, edge: &Edge, panicked: bool) -> State {
        let seen = if panicked { None } else { self.inspect().await };
        let state = settle(edge, seen);
        self.driver.end();
        self.publish(state, Cause::Settled);
        state
    }

    async fn clone_source(&mut self, mut reply: oneshot::Sender<Result<()>>) {
        let edge = match self.admit(Action::Clone, reply.closed()).await {
            Ok(Admitted::Run(edge)) => edge,
            Ok(Admitted::Already) => return drop(reply.send(Ok(()))),
            Err(error) => return drop(reply.send(Err(error))),
        };
        let limit = self.timeouts.clone;
        let ended = work(self.driver.clone_source(), limit, "cloning", reply.closed(), None).await;
        let failure = self.failure(ended, Action::Clone);
        let foreign = failure.as_ref().is_some_and(|(error, _)| error.kind() == ErrorKind::AlreadyExists);
        let Some((error, panicked)) = failure else {
            let state = self.finish(&edge, false).await;
            return drop(reply.send(self.verified(&edge, state)));
        };
        if foreign {
            // What is there is somebody else's: neither destroyed nor judged.
            self.driver.end();
            self.publish(State::Initial, Cause::Settled);
        } else {
            if !panicked {
                self.destroy().await.unwrap_or_else(|e| warn!(id = %self.id, error = %e, "rolling back a clone"));
            }
            self.finish(&edge, panicked).await;
        }
        let _ = reply.send(Err(error));
    }

    async fn start(&mut self, console: ConsoleSinks, mut reply: oneshot::Sender<Result<()>>) {
        let edge = match self.admit(Action::Start, reply.closed()).await {
            Ok(Admitted::Run(edge)) => edge,
            Ok(Admitted::Already) => return drop(reply.send(Ok(()))),
            Err(error) => return drop(reply.send(Err(error))),
        };
        self.forget_crash();
        let limit = self.timeouts.start;
        let kills = Some(&mut self.kills);
        let ended = if edge.from == State::Suspended {
            let spent = Spent::new();
            let gone = unless_spent(&spent, reply.closed());
            work(self.driver.resume(console, &spent), limit, "resuming", gone, kills).await
        } else {
            work(self.driver.boot(console), limit, "starting", reply.closed(), kills).await
        };
        let (ended, kill) = split_kill(ended);
        let Some((error, panicked)) = self.failure(ended, Action::Start) else {
            let state = self.finish(&edge, false).await;
            if state == edge.ok {
                return drop(reply.send(Ok(())));
            }
            return drop(reply.send(self.verified(&edge, state)));
        };
        // Recovery is its own: it does not run under the deadline, or for the caller, that has just ended.
        let killed = if panicked { Ok(()) } else { self.force().await };
        let state = self.finish(&edge, panicked).await;
        let _ = reply.send(Err(error));
        if let Some(Kill(done)) = kill {
            let stop = if state == State::Stopped || state == State::Suspended { Ok(()) } else { killed };
            let _ = done.send(StopReport { run: Ok(()), stop, forced: true });
        }
    }

    async fn stop(&mut self, grace: Duration, caller_gone: impl Future<Output = ()>) -> StopReport {
        let edge = match self.admit(Action::Stop, caller_gone).await {
            Ok(Admitted::Run(edge)) => edge,
            Ok(Admitted::Already) => return StopReport { run: self.take_crash(), stop: Ok(()), forced: false },
            Err(error) => return StopReport { run: Ok(()), stop: Err(error), forced: false },
        };
        let mut kill = None;
        let mut exit = None;
        let mut panicked = false;
        if !grace.is_zero() {
            let (id, driver) = (&self.id, &mut self.driver);
            let graceful = async {
                // A guest that cannot be asked is forced without waiting for an answer that cannot come.
                driver.shutdown().await?;
                Ok(exited(id, driver).await)
            };
            match work(graceful, grace, "shutting down", pending(), Some(&mut self.kills)).await {
                Ended::Done(Ok(ended)) => exit = Some(ended),
                Ended::Done(Err(error)) => debug!(id = %self.id, %error, "forcing"),
                Ended::Panicked => panicked = true,
                Ended::Killed(request) => kill = Some(request),
                Ended::CallerGone => {}
            }
        }
        // Also after a graceful end: the whole process group goes, and kill is idempotent.
        let killed = self.force().await;
        let forced = exit.is_none();
        if forced && killed.is_ok() {
            exit = timeout(self.timeouts.inspect, exited(&self.id, &mut self.driver)).await.ok();
        }
        let state = self.finish(&edge, panicked).await;
        // The signal that we sent is not how the machine ended of itself.
        let ours = forced && exit.as_ref().is_some_and(|exit| exit.signal == Some(9));
        let run = match exit.and_then(|exit| exit.run_error(&self.id)) {
            Some(error) if !ours => Err(error),
            _ => Ok(()),
        };
        let stop = if panicked {
            Err(self.error(ErrorKind::Panicked, Action::Stop, "the backend panicked while stopping"))
        } else if state == State::Stopped {
            Ok(())
        } else {
            Err(killed.err().unwrap_or_else(|| {
                self.error(ErrorKind::Inconsistent, Action::Stop, "it could not be verified that the machine is off")
                    .hint("delete it, or look at its directory")
            }))
        };
        if let Some(Kill(done)) = kill {
            let _ =
                done.send(StopReport { run: Ok(()), stop: stop.as_ref().copied().map_err(Error::duplicate), forced });
        }
        StopReport { run, stop, forced }
    }

    async fn suspend(&mut self, mut reply: oneshot::Sender<Result<()>>) {
        if !self.driver.suspendable() && self.state() == State::Running {
            let error = self.error(ErrorKind::Unsupported, Action::Suspend, "this machine cannot be suspended");
            return drop(reply.send(Err(error.hint("stop it instead"))));
        }
        let edge = match self.admit(Action::Suspend, reply.closed()).await {
            Ok(Admitted::Run(edge)) => edge,
            Ok(Admitted::Already) => return drop(reply.send(Ok(()))),
            Err(error) => return drop(reply.send(Err(error))),
        };
        let limit = self.timeouts.suspend;
        let ended = work(self.driver.suspend(), limit, "suspending", pending(), Some(&mut self.kills)).await;
        let (ended, kill) = split_kill(ended);
        let failure = self.failure(ended, Action::Suspend);
        let mut killed = Ok(());
        // A suspend that was cut off half way leaves a machine that may be paused: it is ended, not guessed about.
        let cut_off =
            failure.as_ref().is_some_and(|(e, _)| matches!(e.kind(), ErrorKind::TimedOut | ErrorKind::Cancelled));
        if cut_off {
            killed = self.force().await;
        }
        let panicked = failure.as_ref().is_some_and(|(_, panicked)| *panicked);
        let state = self.finish(&edge, panicked).await;
        let _ = reply.send(match failure {
            None => self.verified(&edge, state),
            Some((error, _)) => Err(error),
        });
        if let Some(Kill(done)) = kill {
            let stop = if state == State::Stopped || state == State::Suspended { Ok(()) } else { killed };
            let _ = done.send(StopReport { run: Ok(()), stop, forced: true });
        }
    }

    async fn delete(&mut self, caller_gone: impl Future<Output = ()>) -> Result<()> {
        let edge = match self.admit(Action::Delete, caller_gone).await? {
            Admitted::Run(edge) => edge,
            Admitted::Already => return Ok(()),
        };
        let mut result = Ok(());
        let mut panicked = false;
        if edge.from == State::ErrorUnknown {
            // Nobody knows what is there: a process may be.
            result = self.force().await;
            panicked = result.as_ref().is_err_and(|e| e.kind() == ErrorKind::Panicked);
        }
        if result.is_ok() {
            result = self.destroy().await;
            panicked = result.as_ref().is_err_and(|e| e.kind() == ErrorKind::Panicked);
        }
        let state = self.finish(&edge, panicked).await;
        match result {
            Ok(()) => self.verified(&edge, state),
            // Reported as failed and found gone: what was asked for is true, unless it should have been there.
            Err(error) if state == State::Deleted && error.kind() != ErrorKind::NotFound => Ok(()),
            Err(error) => Err(error.on(self.id.as_str()).during(Action::Delete.name())),
        }
    }

    /// Takes the machine for what is no request of the table, which leaves its state as it is. `None` when `reply` has heard why not.
    async fn take<T>(
        &mut self,
        action: Action,
        doing: &'static str,
        mut reply: oneshot::Sender<Result<T>>,
    ) -> Option<oneshot::Sender<Result<T>>> {
        let limit = self.timeouts.lock;
        let begun = work(self.driver.begin(action), limit, "waiting", reply.closed(), Some(&mut self.kills)).await;
        let (error, kill) = match begun {
            Ended::Done(Ok(seen)) => {
                seen.into_iter().for_each(|fact| self.catch_up(fact));
                return Some(reply);
            }
            Ended::Killed(kill) => (forced(), Some(kill)),
            ended => match flat(ended).err() {
                Some(error) if error.kind() == ErrorKind::TimedOut => (busy(limit), None),
                error => (error.unwrap_or_else(|| Error::new(ErrorKind::Cancelled, "cancelled")), None),
            },
        };
        let _ = reply.send(Err(error.on(self.id.as_str()).during(doing)));
        if let Some(kill) = kill {
            self.on_kill(kill).await;
        }
        None
    }

    /// Looks at a machine that is off: nothing else tells what others do with it. All others are watched.
    async fn refresh(&mut self, mut reply: oneshot::Sender<Result<State>>) {
        let known = self.state();
        if matches!(known, State::Stopped | State::Suspended) {
            let (limit, kills) = (self.timeouts.lock, Some(&mut self.kills));
            let looked = work(self.driver.state(), limit, "looking at the machine", reply.closed(), kills).await;
            let looked = match looked {
                Ended::Killed(kill) => {
                    let _ = reply.send(Err(forced().on(self.id.as_str())));
                    return self.on_kill(kill).await;
                }
                looked => looked,
            };
            let done = match flat(looked) {
                Ok(seen) if seen == known => Ok(()),
                // What ends in another state is seen when it has.
                Ok(seen) if seen.is_transitional() => {
                    if Action::ALL.into_iter().any(|action| known.transition(action) == Some(seen)) {
                        self.publish(seen, Cause::Elsewhere);
                    }
                    Ok(())
                }
                // Seen without the lock, it may be a moment of somebody's operation.
                Ok(_) => self.look_again(reply.closed()).await,
                Err(error) => Err(error),
            };
            if let Err(error) = done {
                return drop(reply.send(Err(error.on(self.id.as_str()))));
            }
        }
        let _ = reply.send(Ok(self.state()));
    }

    async fn look_again(&mut self, caller_gone: impl Future<Output = ()>) -> Result<()> {
        let begun = work(self.driver.begin(Action::None), self.timeouts.lock, "waiting", caller_gone, None).await;
        if let Some(fact) = flat(begun)? {
            self.catch_up(fact);
        }
        self.driver.end();
        Ok(())
    }

    /// No request of the table: the machine is off before, meanwhile and afterwards.
    async fn prespawn(&mut self, reply: oneshot::Sender<Result<()>>) {
        const DOING: &str = "Prespawn";
        // For others it is being started: what a holder who dies leaves is what one leaves who dies in a start.
        let Some(mut reply) = self.take(Action::Start, DOING, reply).await else { return };
        let state = self.state();
        if !matches!(state, State::Stopped | State::Suspended) {
            self.driver.end();
            let error = Error::new(ErrorKind::IllegalRequest, "a process can wait only for a machine that is off")
                .while_in(state)
                .hint("stop or suspend it first");
            return drop(reply.send(Err(error.on(self.id.as_str()).during(DOING))));
        }
        let limit = self.timeouts.start;
        let kills = Some(&mut self.kills);
        let ended = work(self.driver.prespawn(), limit, "starting its process", reply.closed(), kills).await;
        let (ended, kill) = split_kill(ended);
        let mut result = flat(ended);
        if result.is_err() {
            // Half a process is none.
            if let Err(error) = self.force().await {
                warn!(id = %self.id, %error, "ending a process that was to wait");
            }
        }
        match self.inspect().await {
            Some(fact) if found(fact) == state => {}
            seen => {
                let now = seen.map_or(State::ErrorUnknown, found);
                let message = format!("a process was started for it ahead of time, and the machine was found {now}");
                result = result.and(Err(Error::new(ErrorKind::Inconsistent, message).while_in(now)));
                self.catch_up(seen.unwrap_or(Fact::Broken));
            }
        }
        self.driver.end();
        let _ = reply.send(result.map_err(|error| error.on(self.id.as_str()).during(DOING)));
        if let Some(kill) = kill {
            self.on_kill(kill).await;
        }
    }

    /// No request of the table: the machine is Running before, meanwhile and afterwards.
    async fn snapshot(&mut self, reply: oneshot::Sender<Result<Snapshot>>) {
        let failed = |id: &Id, error: Error| Err(error.on(id.as_str()).during("Fork"));
        let Some(reply) = self.take(Action::None, "Fork", reply).await else { return };
        let state = self.state();
        if state != State::Running {
            self.driver.end();
            let error = Error::new(ErrorKind::IllegalRequest, "only a machine that is Running can be forked");
            return drop(reply.send(failed(&self.id, error.while_in(state).hint("start it first"))));
        }
        let limit = self.timeouts.suspend;
        let ended = work(self.driver.snapshot(), limit, "forking", pending(), Some(&mut self.kills)).await;
        self.driver.end();
        let error = match ended {
            // Where nobody wants it any more, it goes as it is dropped.
            Ended::Done(Ok(snapshot)) => return drop(reply.send(Ok(snapshot))),
            Ended::Killed(kill) => {
                let _ = reply.send(failed(&self.id, forced()));
                return self.on_kill(kill).await;
            }
            Ended::Done(Err(error)) => error,
            Ended::Panicked => Error::new(ErrorKind::Panicked, "the backend panicked"),
            Ended::CallerGone => Error::new(ErrorKind::Cancelled, "cancelled"),
        };
        // What it left half done is undone at once, and not when somebody wants something of the machine. If it has ended, that is
        // noticed as ever.
        let begun = work(self.driver.begin(Action::None), self.timeouts.lock, "waiting", pending(), None).await;
        if let Ended::Done(Ok(_)) = begun {
            self.driver.end();
        }
        let _ = reply.send(failed(&self.id, error));
    }

    async fn on_kill(&mut self, kill: Kill) {
        // It passes other processes' operations too: one that hangs in Starting holds the machine for minutes.
        let mut killed = Ok(());
        if self.is_nothing() {
            let stop = match plan(self.state(), Action::Stop) {
                Verdict::Already => Ok(()),
                Verdict::Run(_) | Verdict::Refuse => Err(Error::illegal(self.id.as_str(), self.state(), Action::Stop)),
            };
            return drop(kill.0.send(StopReport { run: Ok(()), stop, forced: true }));
        }
        for patience in [KILL_WAITS, LETS_GO] {
            let taken = work(self.driver.begin(Action::Stop), patience, "waiting", pending(), None).await;
            if !held_elsewhere(&taken) {
                self.driver.end();
                let report = self.stop(Duration::ZERO, pending()).await;
                return drop(kill.0.send(report));
            }
            // Mostly its holder's operation fails now, and it lets go. One that stands still keeps nobody waiting.
            killed = self.force().await;
        }
        let seen = self.inspect().await;
        let off = matches!(seen, Some(Fact::Stopped | Fact::Suspended | Fact::Absent));
        if let Some(fact) = seen.filter(|_| off) {
            self.catch_up(fact);
        }
        let stop = match killed {
            Ok(()) if off => Ok(()),
            Ok(()) => Err(self
                .error(ErrorKind::Busy, Action::Stop, "another process holds the machine, and has started it again")
                .hint("end that process, and try again")),
            Err(error) => Err(error.on(self.id.as_str()).during(Action::Stop.name())),
        };
        let _ = kill.0.send(StopReport { run: Ok(()), stop, forced: true });
    }

    async fn force(&mut self) -> Result<()> {
        flat(work(self.driver.kill(), self.timeouts.kill, "killing the machine", pending(), None).await)
    }

    async fn destroy(&mut self) -> Result<()> {
        flat(work(self.driver.destroy(), self.timeouts.delete, "removing the machine", pending(), None).await)
    }

    async fn inspect(&mut self) -> Option<Fact> {
        match flat(work(self.driver.inspect(), self.timeouts.inspect, "looking at the machine", pending(), None).await)
        {
            Ok(fact) => Some(fact),
            Err(error) => {
                warn!(id = %self.id, %error, "inspection failed");
                None
            }
        }
    }

    /// The error of an operation that did not do its work, and whether the backend panicked.
    fn failure(&self, ended: Ended<()>, action: Action) -> Option<(Error, bool)> {
        let error = match ended {
            Ended::Done(Ok(())) => return None,
            Ended::Done(Err(error)) => error.on(self.id.as_str()).during(action.name()),
            Ended::Panicked => {
                let error = self.error(ErrorKind::Panicked, action, "the backend panicked");
                return Some((error.hint("delete the machine; its state is not known"), true));
            }
            Ended::CallerGone => self.error(ErrorKind::Cancelled, action, "the caller is gone"),
            Ended::Killed(_) => self.error(ErrorKind::Cancelled, action, "a forced stop ended it"),
        };
        Some((error, false))
    }

    /// A driver said it did it; this is what was found.
    fn verified(&self, edge: &Edge, state: State) -> Result<()> {
        if state == edge.ok {
            return Ok(());
        }
        let message = format!("the backend reported success, and the machine was found {state}");
        Err(self.error(ErrorKind::Inconsistent, edge.action, message).while_in(state))
    }

    fn take_crash(&self) -> Result<()> {
        let exit = self.crash.lock().unwrap_or_else(PoisonError::into_inner).take();
        exit.and_then(|exit| exit.run_error(&self.id)).map_or(Ok(()), Err)
    }

    fn forget_crash(&self) {
        *self.crash.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    fn error(&self, kind: ErrorKind, action: Action, message: impl Into<String>) -> Error {
        Error::new(kind, message).on(self.id.as_str()).during(action.name())
    }
}

impl<D: Driver> Drop for Machine<D> {
    fn drop(&mut self) {
        // Also when the runtime ends that it ran on: whoever waits for a change is not to wait for ever.
        self.status.close();
    }
}

fn forced() -> Error {
    Error::new(ErrorKind::Cancelled, "a forced stop ended it")
}

fn busy(limit: Duration) -> Error {
    Error::new(ErrorKind::Busy, format!("another process has held the machine for {limit:?}"))
        .hint("try again when it is done")
}

enum Admitted {
    Run(Edge),
    Already,
}
