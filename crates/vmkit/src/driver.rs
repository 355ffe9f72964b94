//! What the author of a backend writes: verbs, and what is really there.
//!
//! A driver knows no [`State`](crate::State) and never checks the order of calls: the machine does, on one task, one
//! call at a time. A driver says what it did (`Ok` is a claim) and what it finds when asked (`inspect` is the fact).
//! Neither trait has default bodies: a wrapper must not forget a method.

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use serde::Serialize;

use crate::console::ConsoleSinks;
use crate::error::{Error, ErrorKind, Result};
use crate::guest::Guest;
use crate::properties::Properties;
use crate::snapshot::Snapshot;
use crate::spec::{Id, Spec};
use crate::state::{Action, Fact, State};

/// Whether a resume has passed the point from which there is no way back to Suspended.
#[derive(Debug, Default)]
pub struct Spent(AtomicBool);

impl Spent {
    /// There is a way back.
    pub fn new() -> Spent {
        Spent::default()
    }

    /// There is none from now on. To be called right before the saved execution is given up, with nothing awaited in between.
    pub fn set(&self) {
        self.0.store(true, Ordering::Release);
    }

    /// Whether there is none.
    pub fn is_set(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }
}

/// One machine, as its hypervisor sees it.
///
/// Every future may be dropped at any await point: by a deadline, a cancelled caller or a forced stop. Afterwards
/// `kill`, `destroy` and `inspect` must work.
pub trait Driver: Send + 'static {
    /// Takes the machine for one operation, against other processes that may operate on it, and clears up what a
    /// holder that died left half done.
    ///
    /// `Some` is what is there now, under the lock, where others may have changed it; `None` when nobody else can have
    /// touched it. Waits while another holds it. Cancel-safe.
    fn begin(&mut self, action: Action) -> impl Future<Output = Result<Option<Fact>>> + Send;

    /// Gives the machine free again. Called once after each `begin` that succeeded; dropping the driver does it too.
    fn end(&mut self);

    /// Makes the machine's disk and directory. Something of that name that is not ours is
    /// [`ErrorKind::AlreadyExists`] and stays untouched. Undone by `destroy` when it fails or is dropped.
    fn clone_source(&mut self) -> impl Future<Output = Result<()>> + Send;

    /// Boots. Returns when the guest's agent has answered, or at once when the machine's process ends, with the end of
    /// its output in the error.
    fn boot(&mut self, console: ConsoleSinks) -> impl Future<Output = Result<()>> + Send;

    /// Goes on from the saved execution. Returns when the guest's agent has answered. Says when that execution is spent: from
    /// then on no caller who goes away ends this, because what runs is nowhere else any more.
    fn resume(&mut self, console: ConsoleSinks, spent: &Spent) -> impl Future<Output = Result<()>> + Send;

    /// Saves the execution and ends the machine's process. Committed in one step: a suspend that was interrupted left
    /// no saved execution.
    fn suspend(&mut self) -> impl Future<Output = Result<()>> + Send;

    /// Starts the hypervisor's process of a machine that is off, ahead of time: it waits for the state that the next `boot` or
    /// `resume` goes on from, and executes nothing before. The machine is found as it was. `kill` and `destroy` end that process;
    /// a start for which it does not fit, or which finds it gone, does without.
    fn prespawn(&mut self) -> impl Future<Output = Result<()>> + Send;

    /// Saves what the machine is now, memory, processes and disk, for copies of it to go on from, while it runs on: it stands still
    /// for moments. What failed or was dropped half way is undone by the next `begin`, and the machine runs on.
    fn snapshot(&mut self) -> impl Future<Output = Result<Snapshot>> + Send;

    /// Asks the guest to shut down, and returns when it has been asked: `exited` tells when it is off.
    fn shutdown(&mut self) -> impl Future<Output = Result<()>> + Send;

    /// Ends the machine's whole process group now and returns when it is gone. Idempotent, works after any dropped
    /// future, and never touches a process that is not this machine's. Keeps a complete saved execution.
    fn kill(&mut self) -> impl Future<Output = Result<()>> + Send;

    /// Removes everything the machine owns: saved execution first, then its disk, then its records. Idempotent: what is
    /// missing is done. What is not ours stays.
    fn destroy(&mut self) -> impl Future<Output = Result<()>> + Send;

    /// What is really there, looked at now.
    fn inspect(&mut self) -> impl Future<Output = Result<Fact>> + Send;

    /// What it is in now, whoever operates on it: transitional while another process does. Called without the machine being taken,
    /// and waits for nobody.
    fn state(&mut self) -> impl Future<Output = Result<State>> + Send;

    /// Resolves when the machine's process has ended; at once when there is none. Cancel-safe.
    fn exited(&mut self) -> impl Future<Output = Exit> + Send;

    /// The way into the guest, while it runs.
    fn guest(&self) -> Option<Guest>;

    /// What can be read of the machine while an operation has the driver.
    fn probe(&self) -> Arc<dyn Probe>;

    /// Whether `suspend` can work for this machine. Constant.
    fn suspendable(&self) -> bool;
}

/// Reads a machine's properties at any time, from any thread, without waiting.
pub trait Probe: Send + Sync + 'static {
    /// What is known now; what cannot be read is absent.
    fn properties(&self) -> Properties;
}

/// One hypervisor on one host: opens, lists and adopts machines.
pub trait Provider: Send + Sync + 'static {
    /// Its driver.
    type Driver: Driver;

    /// Holds a pool's name for as long as it lives.
    type Claim: Send + Sync + 'static;

    /// What every machine of it can do.
    fn capabilities(&self) -> Capabilities;

    /// A driver for a machine that is to be made. Makes nothing yet.
    fn open(&self, id: &Id, spec: &Spec) -> impl Future<Output = Result<Self::Driver>> + Send;

    /// Every machine of ours that is there, whoever made it, however it was left.
    fn list(&self) -> impl Future<Output = Result<Vec<Found>>> + Send;

    /// A driver for a machine that is there already; [`ErrorKind::NotFound`] when it is not.
    fn adopt(&self, id: &Id) -> impl Future<Output = Result<Adopted<Self::Driver>>> + Send;

    /// Takes the name of a pool, exclusively among all processes that see the same machines, until the claim is dropped or
    /// its process ends, however it ends. No child process may inherit it.
    ///
    /// # Errors
    /// [`ErrorKind::Busy`], which says who has it, when it is taken; it does not wait.
    fn claim(&self, name: &Id) -> impl Future<Output = Result<Self::Claim>> + Send;
}

/// A machine that was found.
#[derive(Clone, Debug, Serialize)]
pub struct Found {
    /// Its name.
    pub id: Id,
    /// What it is in now; transitional while another process operates on it.
    pub state: State,
    /// What it was made from; absent when its records cannot be read.
    pub spec: Option<Spec>,
    /// What is wrong with it, when something is.
    pub problem: Option<String>,
    /// What can be read of it without waiting.
    pub properties: Properties,
}

/// A machine that was found, with the driver for it.
pub struct Adopted<D> {
    /// Its driver.
    pub driver: D,
    /// What it was made from.
    pub spec: Spec,
    /// What it is in now; transitional while another process operates on it.
    pub state: State,
}

/// What the machines of a provider can do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capabilities {
    /// Suspend and resume.
    pub suspend: bool,
    /// Execute commands in the guest.
    pub exec: bool,
    /// Copies of a machine that runs.
    pub fork: bool,
    /// Find machines again after a restart.
    pub adopt: bool,
    /// Guests have addresses.
    pub network: bool,
}

/// How a machine's main process ended.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Exit {
    /// Its exit code; absent when a signal ended it, or when it was not our child.
    pub code: Option<i32>,
    /// The signal that ended it.
    pub signal: Option<i32>,
    /// The end of its standard error.
    pub output: String,
}

impl Exit {
    /// The run error: `None` when the process ended well, or nobody can know.
    pub fn run_error(&self, id: &Id) -> Option<Error> {
        let how = match (self.code, self.signal) {
            (_, Some(signal)) => format!("the machine's process was killed by signal {signal}"),
            (Some(0), None) => return None,
            (Some(code), None) => format!("the machine's process ended with exit code {code}"),
            (None, None) => return None,
        };
        Some(Error::new(ErrorKind::Exited, how).on(id.as_str()).with_details(self.output.clone()))
    }
}
