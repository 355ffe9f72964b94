//! What is done with machines: each on a task of its own, that ends with exactly one message to the supervisor.

use std::any::Any;
use std::future::Future;
use std::panic::AssertUnwindSafe;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use futures::FutureExt;
use futures::future::BoxFuture;
use tokio::io::AsyncRead;
use tokio::sync::oneshot;
use tokio::time::{Instant, timeout};
use tracing::{Instrument, debug_span, warn};

use super::backoff::after;
use super::message::{Made, Prepared};
use super::plan::Tier;
use crate::cleanup::cleanup;
use crate::console::ConsoleSinks;
use crate::driver::{Found, Provider};
use crate::error::{Error, ErrorKind, Result};
use crate::host::Host;
use crate::instance::Instance;
use crate::properties::Properties;
use crate::reset::prove_new;
use crate::spec::{Id, Spec};
use crate::state::State;

/// The label that says which pool a machine belongs to.
pub(super) const LABEL: &str = "vmkit.pool";

/// A host without its provider's type, so that pools and leases have none either.
pub(super) trait Backend: Send + Sync + 'static {
    fn suspendable(&self) -> bool;
    fn claim<'a>(&'a self, name: &'a Id) -> BoxFuture<'a, Result<Box<dyn Any + Send + Sync>>>;
    fn list(&self) -> BoxFuture<'_, Result<Vec<Found>>>;
    fn create(&self, id: Id, spec: Spec) -> BoxFuture<'_, Result<Instance>>;
    fn adopt<'a>(&'a self, id: &'a Id) -> BoxFuture<'a, Result<Instance>>;
}

impl<P: Provider> Backend for Host<P> {
    fn suspendable(&self) -> bool {
        self.capabilities().suspend
    }

    fn claim<'a>(&'a self, name: &'a Id) -> BoxFuture<'a, Result<Box<dyn Any + Send + Sync>>> {
        async move { Ok(Box::new(self.provider().claim(name).await?) as Box<dyn Any + Send + Sync>) }.boxed()
    }

    fn list(&self) -> BoxFuture<'_, Result<Vec<Found>>> {
        Host::list(self).boxed()
    }

    fn create(&self, id: Id, spec: Spec) -> BoxFuture<'_, Result<Instance>> {
        Host::create(self, id, spec).boxed()
    }

    fn adopt<'a>(&'a self, id: &'a Id) -> BoxFuture<'a, Result<Instance>> {
        Host::adopt(self, id).boxed()
    }
}

/// Takes the pool's name, and looks at what is there.
pub(super) async fn prepare(backend: Arc<dyn Backend>, name: Id) -> Result<Prepared> {
    let work = async {
        let claim = backend.claim(&name).await?;
        // Only now: while somebody else has the name, what is there may be in use.
        let found = backend.list().await?;
        Ok(Prepared { claim, found })
    };
    guarded(work).await
}

/// What is executed in a machine that has booted, and how often.
#[derive(Clone)]
pub(super) struct Ready {
    pub words: Vec<String>,
    pub runs: usize,
}

/// How one machine is to be made.
pub(super) struct Order {
    pub id: Id,
    pub spec: Spec,
    pub tier: Tier,
    pub console: ConsoleSinks,
    pub ready: Ready,
    /// Whether a process is to wait for one that is off.
    pub prespawn: bool,
    pub limit: Duration,
    /// The machine that had its name and was used: this one must not be it.
    pub old: Option<Box<Properties>>,
}

/// One attempt to make a machine. Whatever it says in the end, the machine is what was left, if anything was.
pub(super) async fn create(backend: Arc<dyn Backend>, order: Order, cancel: oneshot::Receiver<()>) -> Made {
    let began = Instant::now();
    let made: OnceLock<Instance> = OnceLock::new();
    let span = debug_span!("create", vm = order.id.as_str(), tier = order.tier.name());
    let work = async {
        // What is about to be suspended is not to be copied for that.
        let own_memory = order.spec.own_memory || order.tier == Tier::Suspended;
        let spec = order.spec.own_memory(own_memory);
        let instance = backend.create(order.id, spec).await?;
        let instance = made.get_or_init(|| instance);
        let tier = match order.tier {
            Tier::Suspended if !instance.suspendable() => Tier::Stopped,
            tier => tier,
        };
        instance.clone_source().instrument(debug_span!("clone")).await?;
        if tier != Tier::Stopped {
            instance.start(order.console).instrument(debug_span!("start")).await?;
            if let Some(old) = &order.old {
                prove_new(old, instance)?;
            }
            make_ready(instance, &order.ready).await?;
        }
        if tier == Tier::Suspended {
            instance.suspend().instrument(debug_span!("suspend")).await?;
        }
        if order.prespawn && tier != Tier::Running {
            have_one_wait(instance).instrument(debug_span!("prespawn")).await?;
        }
        Ok(tier)
    };
    let result = bounded(work.instrument(span), order.limit, "making a machine", cancel).await;
    // What is dropped half way is rolled back by the machine's own task, which this handle keeps.
    Made { result, instance: made.into_inner(), took: began.elapsed() }
}

/// Has a process wait for a machine, which is as good without: only what can never be is an error.
async fn have_one_wait(instance: &Instance) -> Result<()> {
    match instance.prespawn().await {
        Err(error) if error.kind() != ErrorKind::Unsupported => {
            warn!(id = %instance.id(), %error, "no process waits for a machine of a pool: its acquire will take longer");
            Ok(())
        }
        done => done,
    }
}

/// Starts a machine that is off, or resumes it: then it was made ready before it was suspended.
pub(super) async fn promote(
    instance: Instance,
    console: ConsoleSinks,
    ready: Ready,
    limit: Duration,
    cancel: oneshot::Receiver<()>,
) -> Result<()> {
    let span = debug_span!("start", vm = instance.id().as_str());
    let boots = instance.state() != State::Suspended;
    let work = async {
        instance.start(console).await?;
        if boots { make_ready(&instance, &ready).await } else { Ok(()) }
    };
    bounded(work.instrument(span), limit, "starting a machine", cancel).await
}

/// Executes the ready command, if there is one. No error contains its arguments.
async fn make_ready(instance: &Instance, ready: &Ready) -> Result<()> {
    let Some((program, args)) = ready.words.split_first() else { return Ok(()) };
    for _ in 0..ready.runs {
        run_ready(instance, program, args).await?;
    }
    // What a hand-over begins with is to be warm too.
    instance.ping().await
}

async fn run_ready(instance: &Instance, program: &str, args: &[String]) -> Result<()> {
    let command = instance.command(program).args(args.iter().map(String::as_str));
    let ends = async {
        // Connected as those of the commands to come: it is to be the first of them, and the guest warm for the second. What it
        // prints may be much, and secrets, and is thrown away; also what is printed later by what it left in the background.
        let mut child = command.stdout(true).stderr(true).whole(true).spawn().await?;
        for stream in [child.stdout.take(), child.stderr.take()].into_iter().flatten() {
            tokio::spawn(throw_away(stream));
        }
        child.wait().await
    };
    let status = ends.instrument(debug_span!("ready_command")).await?;
    if status.success() {
        return Ok(());
    }
    Err(Error::new(ErrorKind::Backend, format!("the pool's ready command {program:?} ended with {status}"))
        .on(instance.id().as_str())
        .hint("execute it in a machine of the same image, to see what it prints"))
}

/// Reads a command's output until nobody has it any more. One that cannot be read is over.
async fn throw_away(mut stream: impl AsyncRead + Unpin) {
    let _ = tokio::io::copy(&mut stream, &mut tokio::io::sink()).await;
}

/// Cools a running machine down.
pub(super) async fn demote(
    instance: Instance,
    tier: Tier,
    prespawn: bool,
    grace: Duration,
    limit: Duration,
    cancel: oneshot::Receiver<()>,
) -> Result<()> {
    let work = async {
        match tier {
            Tier::Suspended if prespawn => {
                instance.suspend().await?;
                have_one_wait(&instance).await
            }
            Tier::Suspended => instance.suspend().await,
            // One that has run boots from its disk, and waits for nothing.
            Tier::Stopped => instance.stop(grace).await.stop,
            Tier::Running => Ok(()),
        }
    };
    bounded(work, limit, "cooling a machine down", cancel).await
}

/// Asks an idle machine whether it is well.
pub(super) async fn check(instance: Instance, limit: Duration) -> Result<()> {
    let span = debug_span!("health", vm = instance.id().as_str());
    match timeout(limit, guarded(instance.ping()).instrument(span)).await {
        Ok(result) => result,
        Err(_) => Err(silent(&instance, limit)),
    }
}

/// The error of an agent that does not answer.
pub(super) fn silent(instance: &Instance, limit: Duration) -> Error {
    Error::new(ErrorKind::TimedOut, format!("the agent has not answered within {limit:?}")).on(instance.id().as_str())
}

/// Deletes a machine, whatever it is in. Forced: nobody needs an orderly end of what is thrown away.
pub(super) async fn remove(
    backend: Arc<dyn Backend>,
    pool: Id,
    id: Id,
    instance: Option<Instance>,
    limit: Duration,
) -> Result<()> {
    let deadline = after(Instant::now(), limit);
    let span = debug_span!("delete", vm = id.as_str());
    let work = async {
        let instance = match instance {
            Some(instance) => instance,
            None => match backend.adopt(&id).await {
                Ok(instance) => instance,
                Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
                Err(error) => return Err(error),
            },
        };
        if instance.spec().labels.get(LABEL).map(String::as_str) != Some(pool.as_str()) {
            // Somebody else's by now: ours is gone.
            return Ok(());
        }
        // Whoever had it may have it still.
        instance.retire();
        cleanup(&instance, Duration::ZERO, deadline.saturating_duration_since(Instant::now())).await
    };
    // Twice the limit: the cleanup has its own and tells more when that passes.
    match timeout(limit.saturating_mul(2), guarded(work).instrument(span)).await {
        Ok(result) => result,
        Err(_) => Err(Error::new(ErrorKind::TimedOut, format!("deleting took longer than {limit:?}")).on(id.as_str())),
    }
}

/// Under a limit, until it is cancelled, and against panics.
async fn bounded<T>(
    work: impl Future<Output = Result<T>>,
    limit: Duration,
    doing: &str,
    cancel: oneshot::Receiver<()>,
) -> Result<T> {
    tokio::select! {
        biased;
        _ = cancel => Err(Error::new(ErrorKind::Cancelled, format!("{doing} was cancelled"))),
        done = timeout(limit, guarded(work)) => match done {
            Ok(result) => result,
            Err(_) => Err(Error::new(ErrorKind::TimedOut, format!("{doing} took longer than {limit:?}"))),
        },
    }
}

/// A backend that panics is one that failed.
pub(super) async fn guarded<T>(work: impl Future<Output = Result<T>>) -> Result<T> {
    match AssertUnwindSafe(work).catch_unwind().await {
        Ok(result) => result,
        Err(_) => Err(Error::new(ErrorKind::Panicked, "the backend panicked")),
    }
}
