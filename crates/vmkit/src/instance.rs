//! What callers hold of a machine.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use futures::future::BoxFuture;
use tokio::sync::{mpsc, oneshot, watch};

use crate::command::Command;
use crate::console::ConsoleSinks;
use crate::driver::{Driver, Probe};
use crate::error::{Error, ErrorKind, Result};
use crate::guest::{Binding, Guest};
use crate::machine::{Kill, Machine, Registrar, Request};
use crate::properties::{CloneInfo, Properties};
use crate::publish::{Hook, Publisher, Status, Subscription};
use crate::snapshot::Snapshot;
use crate::spec::{Id, Source, Spec};
use crate::state::{Action, State};

/// A handle on one virtual machine. Cheap to clone; no handle, task or future is what keeps the machine alive.
///
/// Operations that change the machine queue in order of arrival, and each is judged against the state that the one
/// before it left. Reading ([`state`](Instance::state), [`properties`](Instance::properties)) and executing never wait
/// for them.
///
/// # Cancel safety
/// Dropping the future of an operation that still waits cancels it: it never runs. Once it runs, a dropped
/// [`clone_source`](Instance::clone_source) or [`start`](Instance::start) is rolled back, and a dropped stop, suspend or
/// delete is carried to its end; both on the machine's own task, so that no transitional state stays behind. So is the start of
/// a suspended machine from when there is no way back to what was saved.
#[derive(Clone)]
pub struct Instance(Arc<Inner>);

struct Inner {
    gate: Mutex<Gate>,
    id: Id,
    spec: Spec,
    suspendable: bool,
    requests: mpsc::UnboundedSender<Request>,
    kills: mpsc::UnboundedSender<Kill>,
    status: Publisher,
    guest: watch::Receiver<Option<Guest>>,
    probe: Arc<dyn Probe>,
    home: Arc<dyn Home>,
}

/// Whether it may be made again. A clone is asked for while this is held: whoever closes it has every clone before him in the queue.
#[derive(Debug, Default)]
struct Gate {
    retired: bool,
    cleanups: u64,
}

/// When a reset began, by the cleanups before it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Mark(u64);

/// Where a machine is: its host, as far as others like it are made there.
pub(crate) trait Home: Send + Sync {
    /// A new machine beside it.
    fn create(&self, id: Id, spec: Spec) -> BoxFuture<'_, Result<Instance>>;

    /// Whether there is a machine of that name, whoever made it.
    fn is_known<'a>(&'a self, id: &'a Id) -> BoxFuture<'a, Result<bool>>;
}

/// How a stop went. The two are apart: a machine that crashed was stopped all the same.
#[derive(Debug)]
#[must_use]
pub struct StopReport {
    /// How the machine's main process ended: an error for a crash or a signal that was not ours.
    pub run: Result<()>,
    /// Whether it could be stopped.
    pub stop: Result<()>,
    /// Whether it had to be forced.
    pub forced: bool,
}

impl StopReport {
    /// The stop error, forgetting how the machine ran.
    ///
    /// # Errors
    /// When the machine could not be stopped.
    pub fn stopped(self) -> Result<()> {
        self.stop
    }
}

impl Instance {
    /// Starts the machine's task. Must be called in a tokio runtime.
    pub(crate) fn spawn<D: Driver>(
        id: Id,
        spec: Spec,
        driver: D,
        state: State,
        exists: Registrar,
        home: Arc<dyn Home>,
    ) -> Instance {
        let (requests, requests_in) = mpsc::unbounded_channel();
        let (kills, kills_in) = mpsc::unbounded_channel();
        let status = Publisher::new(state);
        let way_in = if state == State::Running { driver.guest() } else { None };
        let (guest_out, guest) = watch::channel(way_in);
        let (probe, suspendable) = (driver.probe(), driver.suspendable());
        let machine = Machine {
            id: id.clone(),
            driver,
            timeouts: spec.timeouts,
            status: status.clone(),
            guest: guest_out,
            requests: requests_in,
            kills: kills_in,
            crash: Arc::new(Mutex::new(None)),
            exists,
        };
        tokio::spawn(machine.run());
        let gate = Mutex::default();
        Instance(Arc::new(Inner { gate, id, spec, suspendable, requests, kills, status, guest, probe, home }))
    }

    /// Its name: stable, unique on its host, never empty.
    pub fn id(&self) -> &Id {
        &self.0.id
    }

    /// What it was made from.
    pub fn spec(&self) -> &Spec {
        &self.0.spec
    }

    /// The state now, without waiting. Of a machine that is off, what another process does is known once somebody asks for something
    /// here, [`refresh`](Instance::refresh) at least.
    pub fn state(&self) -> State {
        self.status().state
    }

    /// The state now, with its generation and cause.
    pub fn status(&self) -> Status {
        self.0.status.now()
    }

    /// Every state change from now on; the first one read is the state at this moment.
    pub fn subscribe(&self) -> Subscription {
        self.0.status.subscribe()
    }

    /// Whether it can be suspended. Constant.
    pub fn suspendable(&self) -> bool {
        self.0.suspendable
    }

    /// What is known of it now; in every state, without waiting.
    pub fn properties(&self) -> Properties {
        let mut properties = self.0.probe.properties();
        if matches!(self.state(), State::Initial | State::Deleted) {
            // What there is under its name is another's.
            properties = Properties { backend: properties.backend, ..Properties::default() };
        }
        let spec = &self.0.spec;
        properties.cpus = spec.cpus;
        properties.memory_mib = spec.memory_mib;
        properties.cloned_from = Some(CloneInfo {
            image: spec.source.name().to_owned(),
            digest: match &spec.source {
                Source::Alias(_) => None,
                Source::Boot(image) => Some(image.digest.clone()),
            },
        });
        if self.state() != State::Running {
            properties.ip = None;
        }
        properties
    }

    /// Makes it from its source; afterwards it is Stopped. (`clone` copies the handle.)
    ///
    /// # Errors
    /// [`ErrorKind::IllegalRequest`] unless Initial or Deleted; [`ErrorKind::AlreadyExists`] when something of that name
    /// exists outside, which stays untouched. What was half made is removed.
    pub async fn clone_source(&self) -> Result<()> {
        self.clone_if(|_| true).await.unwrap_or_else(|| Err(self.task_gone(Action::Clone)))
    }

    /// The same for a reset: `None` when somebody has begun to clean up since `mark`.
    pub(crate) async fn clone_unless_given_up(&self, mark: Mark) -> Option<Result<()>> {
        self.clone_if(|gate| gate.cleanups == mark.0).await
    }

    async fn clone_if(&self, may: impl FnOnce(&Gate) -> bool) -> Option<Result<()>> {
        let asked = {
            let gate = self.gate();
            if gate.retired {
                let error = Error::new(ErrorKind::IllegalRequest, "the pool that had the machine has taken it back");
                let error = error.on(self.0.id.as_str()).during("Clone").while_in(self.state());
                return Some(Err(error.hint("acquire another")));
            }
            if !may(&gate) {
                return None;
            }
            self.send(Action::Clone, Request::Clone)
        };
        Some(match asked {
            Ok(answer) => answer.await.unwrap_or_else(|_| Err(self.task_gone(Action::Clone))),
            Err(error) => Err(error),
        })
    }

    /// From now on no reset that has begun makes it again.
    pub(crate) fn give_up(&self) {
        self.gate().cleanups += 1;
    }

    pub(crate) fn mark(&self) -> Mark {
        Mark(self.gate().cleanups)
    }

    fn gate(&self) -> MutexGuard<'_, Gate> {
        self.0.gate.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns when all that was asked before is done, or nobody does anything any more.
    pub(crate) async fn pass(&self) {
        let (reply, passed) = oneshot::channel();
        if self.0.requests.send(Request::Pass(reply)).is_ok() {
            let _ = passed.await;
        }
    }

    /// The state now, looked at. What another process does with a machine that is off is not noticed here by itself: this notices it,
    /// and publishes it. All other changes are published as they happen. Queues behind what was asked before.
    ///
    /// # Errors
    /// When it cannot be looked at.
    ///
    /// # Cancel safety
    /// A dropped call changes nothing.
    pub async fn refresh(&self) -> Result<State> {
        let (reply, answer) = oneshot::channel();
        let gone = || self.task_gone_during("Refresh");
        self.0.requests.send(Request::Refresh(reply)).map_err(|_| gone())?;
        answer.await.map_err(|_| gone())?
    }

    /// Whether the runtime has ended that drove it: this handle can do nothing any more.
    pub(crate) fn is_orphan(&self) -> bool {
        self.0.requests.is_closed()
    }

    /// Boots it, or resumes it when it is Suspended. Returns when commands can be executed.
    ///
    /// # Errors
    /// [`ErrorKind::IllegalRequest`] unless Stopped or Suspended; [`ErrorKind::Exited`] as soon as its process ends,
    /// [`ErrorKind::TimedOut`] at its own deadline, both with the end of what it printed in
    /// [`details`](Error::details).
    pub async fn start(&self, console: ConsoleSinks) -> Result<()> {
        self.ask(Action::Start, |reply| Request::Start(console, reply)).await?
    }

    /// Asks the guest to shut down and forces it after `grace`; a grace of zero forces at once. Stopped already is
    /// success.
    pub async fn stop(&self, grace: Duration) -> StopReport {
        let asked = self.ask(Action::Stop, |reply| Request::Stop(grace, reply)).await;
        asked.unwrap_or_else(|error| StopReport { run: Ok(()), stop: Err(error), forced: false })
    }

    /// Forces it off now. Passes the queue: it reaches a machine that hangs in Starting, Stopping or Suspending.
    pub async fn kill(&self) -> StopReport {
        let (reply, answer) = oneshot::channel();
        let sent = self.0.kills.send(Kill(reply)).is_ok();
        match answer.await {
            Ok(report) if sent => report,
            _ => StopReport { run: Ok(()), stop: Err(self.task_gone(Action::Stop)), forced: false },
        }
    }

    /// Saves its execution (memory, processes, open files) to disk and switches it off. Suspended already is success.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] when it is not [`suspendable`](Instance::suspendable), and then nothing changed;
    /// [`ErrorKind::IllegalRequest`] unless Running or Suspended.
    pub async fn suspend(&self) -> Result<()> {
        self.ask(Action::Suspend, Request::Suspend).await?
    }

    /// Removes everything it owns. Can be tried again when it failed.
    ///
    /// # Errors
    /// [`ErrorKind::IllegalRequest`] unless Stopped, Suspended or ErrorUnknown.
    pub async fn delete(&self) -> Result<()> {
        self.ask(Action::Delete, Request::Delete).await?
    }

    /// Starts the hypervisor's process of a machine that is off, ahead of time: it has everything but the state, which the next
    /// [`start`](Instance::start) gives it. That start is shorter by the time in which a process begins, and it costs the memory of a
    /// process that executes nothing. The machine stays Stopped or Suspended, and the process ends with whatever ends the machine.
    /// Again, where one waits already, is success. Where that process is gone, or does not fit any more, the start makes another.
    ///
    /// # Errors
    /// [`ErrorKind::IllegalRequest`] unless Stopped or Suspended; [`ErrorKind::Unsupported`] for one that boots from its disk, where
    /// there is no state to wait for: one that has run and was stopped, or one without a template.
    ///
    /// # Cancel safety
    /// Dropped, the process that was to wait is ended, and the machine is what it was.
    pub async fn prespawn(&self) -> Result<()> {
        let (reply, answer) = oneshot::channel();
        let gone = || self.task_gone_during("Prespawn");
        self.0.requests.send(Request::Prespawn(reply)).map_err(|_| gone())?;
        answer.await.map_err(|_| gone())?
    }

    /// What it is now, saved for copies to go on from while it runs on. [`fork`](Instance::fork) makes the copies too.
    ///
    /// # Errors
    /// [`ErrorKind::IllegalRequest`] unless Running; [`ErrorKind::Unsupported`] where the backend has no copies. It runs on.
    pub async fn snapshot(&self) -> Result<Snapshot> {
        let (reply, answer) = oneshot::channel();
        let gone = || self.task_gone_during("Fork");
        self.0.requests.send(Request::Snapshot(reply)).map_err(|_| gone())?;
        answer.await.map_err(|_| gone())?
    }

    pub(crate) async fn beside(&self, id: &Id, spec: &Spec) -> Result<Instance> {
        self.0.home.create(id.clone(), spec.clone()).await
    }

    pub(crate) async fn is_known(&self, id: &Id) -> Result<bool> {
        self.0.home.is_known(id).await
    }

    /// A command to be executed in the guest, shaped like `tokio::process::Command`.
    pub fn command(&self, program: impl Into<String>) -> Command {
        Command::new(self.clone(), program.into())
    }

    /// Returns once the guest's agent has answered this very question.
    ///
    /// # Errors
    /// [`ErrorKind::NotRunning`], or [`ErrorKind::Agent`] when it does not answer as it should.
    pub async fn ping(&self) -> Result<()> {
        let (guest, mut gone) = self.way_in()?;
        tokio::select! {
            biased;
            pong = guest.ping() => pong.map_err(|e| e.on(self.0.id.as_str())),
            () = gone.wait() => Err(self.not_running()),
        }
    }

    /// Gives the guest, which is up already, a host name, variables for its commands, and files.
    ///
    /// # Errors
    /// [`ErrorKind::NotRunning`]; [`ErrorKind::InvalidArgument`] or what the guest failed with, when a part of it cannot
    /// be applied. No error contains values or contents.
    pub async fn bind(&self, binding: Binding) -> Result<()> {
        binding.check().map_err(|error| error.on(self.0.id.as_str()))?;
        let (guest, mut gone) = self.way_in()?;
        tokio::select! {
            biased;
            bound = guest.bind(binding) => bound.map_err(|e| e.on(self.0.id.as_str())),
            () = gone.wait() => Err(self.not_running()),
        }
    }

    /// From now on it is never made again: whoever still has it finds it deleted, or an error.
    pub(crate) fn retire(&self) {
        self.gate().retired = true;
    }

    /// Has every later change told to `hook`, and returns the status now.
    pub(crate) fn hook(&self, hook: Hook) -> Status {
        self.0.status.hook(hook)
    }

    pub(crate) fn downgrade(&self) -> WeakInstance {
        WeakInstance(Arc::downgrade(&self.0))
    }

    /// The guest, and a watch that tells when it is gone.
    pub(crate) fn way_in(&self) -> Result<(Guest, Gone)> {
        let gone = Gone(self.0.guest.clone());
        let guest = self.0.guest.borrow().clone();
        match guest {
            Some(guest) if self.state() == State::Running => Ok((guest, gone)),
            _ => Err(self.not_running()),
        }
    }

    pub(crate) fn not_running(&self) -> Error {
        if self.is_orphan() {
            return self.task_gone_during("Exec");
        }
        let state = self.state();
        let hint = match state {
            State::Stopped | State::Suspended => "start it first",
            State::Running => return self.just_ended(),
            State::Starting => "try again when it is running",
            State::Initial | State::Cloning | State::Deleting | State::Deleted => "clone and start it first",
            State::Stopping | State::Suspending => "start it again when that is over",
            State::ErrorUnknown => "delete it and clone it again",
        };
        Error::new(ErrorKind::NotRunning, format!("the machine is not running, it is {state}"))
            .on(self.0.id.as_str())
            .while_in(state)
            .hint(hint)
    }

    /// Its process is gone, and its state not told yet.
    fn just_ended(&self) -> Error {
        Error::new(ErrorKind::NotRunning, "the machine has ended just now")
            .on(self.0.id.as_str())
            .hint("look at its state again, and at its console")
    }

    async fn ask<T>(&self, action: Action, request: impl FnOnce(oneshot::Sender<T>) -> Request) -> Result<T> {
        self.send(action, request)?.await.map_err(|_| self.task_gone(action))
    }

    fn send<T>(
        &self,
        action: Action,
        request: impl FnOnce(oneshot::Sender<T>) -> Request,
    ) -> Result<oneshot::Receiver<T>> {
        let (reply, answer) = oneshot::channel();
        self.0.requests.send(request(reply)).map_err(|_| self.task_gone(action))?;
        Ok(answer)
    }

    /// The runtime that the machine's task ran on has ended.
    fn task_gone(&self, action: Action) -> Error {
        self.task_gone_during(action.name())
    }

    fn task_gone_during(&self, doing: &'static str) -> Error {
        Error::new(ErrorKind::Cancelled, "the runtime that drives the machine has shut down")
            .on(self.0.id.as_str())
            .during(doing)
            .hint("have a host adopt it, in a runtime that goes on")
    }
}

impl std::fmt::Debug for Instance {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Instance").field("id", &self.0.id.as_str()).field("status", &self.status()).finish()
    }
}

/// A handle that keeps nothing.
pub(crate) struct WeakInstance(Weak<Inner>);

impl WeakInstance {
    pub(crate) fn upgrade(&self) -> Option<Instance> {
        self.0.upgrade().map(Instance)
    }

    pub(crate) fn is(&self, instance: &Instance) -> bool {
        std::ptr::eq(self.0.as_ptr(), Arc::as_ptr(&instance.0))
    }

    pub(crate) fn is_same(&self, other: &WeakInstance) -> bool {
        self.0.ptr_eq(&other.0)
    }
}

/// Tells when the way into a guest has closed.
#[derive(Clone)]
pub(crate) struct Gone(watch::Receiver<Option<Guest>>);

impl Gone {
    pub(crate) async fn wait(&mut self) {
        // The sender is gone only with the machine's task: nobody executes then either.
        let _ = self.0.wait_for(Option::is_none).await;
    }
}
