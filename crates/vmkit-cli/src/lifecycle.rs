//! The operations on machines, across separate invocations.

use std::pin::Pin;
use std::time::Duration;

use serde::Serialize;
use tokio::time::Instant;
use vmkit::{
    Cause, ConsoleSinks, Error, ErrorKind, Id, Instance, Observed, Result, Source, State, Subscription, wait_for_state,
};
use vmkit_backends::qemu::Qemu;

use crate::args::{Args, CloneArgs, Command};
use crate::context::{Busy, Context};
use crate::output::{Failure, Output};
use crate::run::{CLEANUP_LIMIT, spec};
use crate::signals::{self, Signals};

/// How long a start that took too long may take to be taken back, before that is left to the next command.
const TAKEN_BACK: Duration = Duration::from_secs(1);
/// How often a machine that another process operates on is looked at.
const POLL: Duration = Duration::from_millis(50);

/// What a command did to one machine.
#[derive(Serialize)]
struct Outcome {
    id: Id,
    state: State,
    #[serde(skip_serializing_if = "Option::is_none")]
    forced: Option<bool>,
    /// How its process had ended by itself, when it had.
    #[serde(skip_serializing_if = "Option::is_none")]
    run_error: Option<String>,
}

impl Outcome {
    fn of(instance: &Instance) -> Outcome {
        Outcome { id: instance.id().clone(), state: instance.state(), forced: None, run_error: None }
    }
}

pub async fn clone(args: &Args, clone: &CloneArgs, output: &Output) -> Result<u8, Failure> {
    let context = Context::open(args, output).await?;
    let work = async {
        let (image, _hold) = context.image(&clone.shape.image).await?;
        let spec = spec(&clone.shape, Source::Boot(image)).own_memory(clone.own_memory);
        let instance = context.host.create(clone.name.clone(), spec).await?;
        instance.clone_source().await?;
        Ok::<Instance, Error>(instance)
    };
    let mut signals = Signals::new();
    let instance = tokio::select! {
        made = work => made?,
        signal = signals.next() => {
            settle(&context, &clone.name).await;
            return Ok(signals::exit_code(signal));
        }
    };
    output.result(&Outcome::of(&instance), || format!("{}\n", instance.id()))?;
    Ok(0)
}

pub async fn start(
    args: &Args,
    names: &[Id],
    timeout: Option<Duration>,
    discard: bool,
    output: &Output,
) -> Result<u8, Failure> {
    if discard {
        // Before they are looked at: one whose saved execution is damaged is in no state that leads to Running.
        let context = Context::open(args, output).await?;
        for name in names {
            context.qemu().discard_saved(name).await.map_err(|error| error.on(name.as_str()).during("Start"))?;
        }
    }
    let context = Context::open_without_sweep(args, output)?;
    each(args, names, "starting", output, async |instance: &Instance| {
        let saved = instance.state() == State::Suspended;
        let started = async {
            context.template(instance.id(), instance.spec()).await;
            let started = instance.start(ConsoleSinks::discard()).await;
            started.map_err(|error| match error.state() {
                Some(State::ErrorUnknown) if context.qemu().has_lost_memory(instance.id()) => error.hint(
                    "the memory that was saved of it is gone: give that up and boot it from its disk, `vmkit start --discard NAME`",
                ),
                _ => error,
            })
        };
        match timeout {
            None => started.await?,
            Some(limit) => match tokio::time::timeout(limit, started).await {
                Ok(started) => started?,
                Err(_) => {
                    let taken_back = async {
                        settled(instance).await;
                        context.half_made().await;
                    };
                    let _ = tokio::time::timeout(TAKEN_BACK, taken_back).await;
                    return Err(too_late(instance, saved, limit));
                }
            },
        }
        Ok(Outcome::of(instance))
    })
    .await
}

fn too_late(instance: &Instance, saved: bool, limit: Duration) -> Error {
    let next = match instance.state() {
        State::Running | State::Starting if saved => {
            "what was saved of it was spent by then, so it goes on: `vmkit wait NAME Running`"
        }
        _ => "allow more time with --timeout",
    };
    let error = Error::new(ErrorKind::TimedOut, format!("it was not up after {limit:?}"));
    error.on(instance.id().as_str()).during("Start").hint(next)
}

pub async fn suspend(args: &Args, names: &[Id], output: &Output) -> Result<u8, Failure> {
    each(args, names, "suspending", output, async |instance: &Instance| {
        instance.suspend().await?;
        Ok(Outcome::of(instance))
    })
    .await
}

pub async fn fork(args: &Args, name: &Id, names: &[Id], output: &Output) -> Result<u8, Failure> {
    let context = Context::open(args, output).await?;
    let mut signals = Signals::new();
    let instance = context.machine(name).await?;
    let busy = Busy::new(output, "forking", name);
    let mut work = std::pin::pin!(instance.fork_as(names));
    let (copies, signal) = tokio::select! {
        copies = &mut work => (copies?, None),
        // What is half copied is neither left paused nor left behind.
        signal = signals.next() => (work.await?, Some(signal)),
    };
    drop(busy);
    if let Some(signal) = signal {
        for copy in &copies {
            vmkit::cleanup(copy, Duration::ZERO, CLEANUP_LIMIT).await?;
        }
        return Ok(signals::exit_code(signal));
    }
    let outcomes: Vec<Outcome> = copies.iter().map(Outcome::of).collect();
    output.result(&outcomes, || outcomes.iter().map(|outcome| format!("{}\n", outcome.id)).collect())?;
    Ok(0)
}

pub async fn stop(args: &Args, names: &[Id], grace: Duration, force: bool, output: &Output) -> Result<u8, Failure> {
    each(args, names, "stopping", output, async |instance: &Instance| {
        let report = if force { instance.kill().await } else { instance.stop(grace).await };
        report.stop?;
        let run_error = report.run.err().map(|error| error.to_string());
        Ok(Outcome { forced: Some(report.forced), run_error, ..Outcome::of(instance) })
    })
    .await
}

pub async fn delete(args: &Args, names: &[Id], output: &Output) -> Result<u8, Failure> {
    each(args, names, "deleting", output, async |instance: &Instance| {
        instance.delete().await.map_err(|error| match error.state() {
            Some(State::Running) => error.hint("stop it first, or use `vmkit cleanup`, which does both"),
            _ => error,
        })?;
        Ok(Outcome::of(instance))
    })
    .await
}

pub async fn cleanup(args: &Args, names: &[Id], all: bool, grace: Duration, output: &Output) -> Result<u8, Failure> {
    let names = match all {
        true => {
            let context = Context::open(args, output).await?;
            context.host.list().await?.into_iter().map(|found| found.id).collect()
        }
        false => names.to_vec(),
    };
    each(args, &names, "cleaning up", output, async |instance: &Instance| {
        vmkit::cleanup(instance, grace, CLEANUP_LIMIT.max(grace.saturating_mul(2))).await?;
        Ok(Outcome::of(instance))
    })
    .await
}

pub async fn reset(args: &Args, names: &[Id], output: &Output) -> Result<u8, Failure> {
    let context = Context::open_without_sweep(args, output)?;
    // Between deletion and clone no machine refers to its image.
    let images = context.images()?;
    let _hold = context.blocking(move |_, _| images.hold()).await?;
    each(args, names, "resetting", output, async |instance: &Instance| {
        if matches!(instance.spec().source, Source::Alias(_)) {
            let error = Error::new(ErrorKind::Corrupt, "what it was made from is not on record any more");
            return Err(error.on(instance.id().as_str()).during("reset").hint("`vmkit cleanup` removes it"));
        }
        context.template(instance.id(), instance.spec()).await;
        let limit = CLEANUP_LIMIT + instance.spec().timeouts.start;
        vmkit::reset(instance, ConsoleSinks::discard(), limit).await?;
        Ok(Outcome::of(instance))
    })
    .await
}

/// Does the same to each machine. One that fails does not keep the others from their turn; the first failure counts.
async fn each(
    args: &Args,
    names: &[Id],
    doing: &'static str,
    output: &Output,
    act: impl AsyncFn(&Instance) -> Result<Outcome>,
) -> Result<u8, Failure> {
    let missing_is_done = matches!(args.command, Command::Cleanup { .. });
    let taken_back = matches!(args.command, Command::Start { .. });
    let context = Context::open(args, output).await?;
    let mut signals = Signals::new();
    let mut outcomes = Vec::new();
    let mut first: Option<Failure> = None;
    for name in names {
        let work = async {
            let _busy = Busy::new(output, doing, name);
            match context.machine(name).await {
                Ok(instance) => act(&instance).await.map_err(|error| match (error.kind(), error.state()) {
                    // It was there a moment ago.
                    (ErrorKind::IllegalRequest, Some(State::Deleted)) => {
                        let gone = Error::new(ErrorKind::NotFound, "somebody else has deleted it meanwhile");
                        gone.on(name.as_str()).hint("`vmkit ls` lists the machines there are")
                    }
                    _ => error,
                }),
                Err(error) if missing_is_done && error.kind() == ErrorKind::NotFound => {
                    if context.qemu().machine_dir(name).symlink_metadata().is_ok() {
                        output.warn(format!("{name}: what is there was not made by vmkit, and stays"));
                    }
                    Ok(Outcome { id: name.clone(), state: State::Deleted, forced: None, run_error: None })
                }
                Err(error) => Err(error),
            }
        };
        let mut work = Box::pin(work);
        let (done, signal) = tokio::select! {
            done = &mut work => (Some(done), None),
            signal = signals.next() => {
                // Who asks once more has no time for that: the next command clears up.
                let done = tokio::select! {
                    done = under_way(&context, name, work, taken_back) => done,
                    _ = signals.next() => None,
                };
                (done, Some(signal))
            }
        };
        match done {
            None => {}
            Some(Ok(outcome)) => {
                if let Some(error) = &outcome.run_error {
                    output.warn(error);
                }
                if !output.json {
                    output.result(&outcome, || format!("{}\n", outcome.id))?;
                }
                outcomes.push(outcome);
            }
            Some(Err(error)) => {
                let failure = Failure::from(error);
                if let Some(earlier) = first.replace(failure) {
                    output.failure(&earlier);
                    // The first one's code is the command's; the last one's text is printed at the end.
                    first = first.map(|last| Failure { code: earlier.code, ..last });
                }
            }
        }
        if let Some(signal) = signal {
            // What was done until then stays done, and said.
            report(output, &outcomes)?;
            if let Some(failure) = first {
                output.failure(&failure);
            }
            return Ok(signals::exit_code(signal));
        }
    }
    report(output, &outcomes)?;
    first.map_or(Ok(0), Err)
}

/// All of it as one document; people were told of each when it was done.
fn report(output: &Output, outcomes: &[Outcome]) -> Result<(), Failure> {
    if output.json { output.result(&outcomes, String::new) } else { Ok(()) }
}

/// What comes of what a signal has found under way: a start is taken back, unless there is no way back any more, and all else that has
/// begun is done to its end. What has not, because another process has the machine, is not waited for and never begins.
async fn under_way<T: Future<Output = Result<Outcome>>>(
    context: &Context,
    id: &Id,
    work: Pin<Box<T>>,
    taken_back: bool,
) -> Option<Result<Outcome>> {
    // All that is done to a machine here says so in its state: by nobody else's doing is the last change one of these.
    let ours = |instance: &Instance| matches!(instance.status().cause, Cause::Requested | Cause::Settled);
    let begun = context.host.get(id).filter(ours);
    if begun.is_some() && !taken_back {
        return Some(work.await);
    }
    drop(work);
    settle(context, id).await;
    begun.filter(|instance| instance.state() == State::Running).map(|instance| Ok(Outcome::of(&instance)))
}

/// After whoever wanted something has gone: the machine's own task takes it back, or does it to its end; this waits until it has.
/// What another process does to the machine is not waited for.
async fn settle(context: &Context, id: &Id) {
    if let Some(instance) = context.host.get(id) {
        settled(&instance).await;
    }
    context.half_made().await;
}

async fn settled(instance: &Instance) {
    let mut changes = instance.subscribe();
    while let Some(status) = changes.next().await {
        if !status.state.is_transitional() || status.cause != Cause::Requested {
            return;
        }
    }
}

/// A machine that other processes operate on: it is looked at again and again.
struct Watched<'a> {
    id: &'a Id,
    target: State,
    qemu: &'a Qemu,
}

impl Observed for Watched<'_> {
    fn id(&self) -> &Id {
        self.id
    }

    async fn state(&self) -> Result<State> {
        match self.qemu.state(self.id).await? {
            State::Deleted if self.target != State::Deleted => {
                let error =
                    Error::new(ErrorKind::NotFound, format!("there is no such machine to become {}", self.target));
                Err(error.on(self.id.as_str()).hint("`vmkit ls` lists the machines there are"))
            }
            state => Ok(state),
        }
    }

    fn subscribe(&self) -> Option<Subscription> {
        None
    }
}

pub async fn wait(
    args: &Args,
    id: &Id,
    target: State,
    limit: Option<Duration>,
    output: &Output,
) -> Result<u8, Failure> {
    let context = Context::open(args, output).await?;
    let watched = Watched { id, target, qemu: context.qemu() };
    let deadline = limit.and_then(|limit| Instant::now().checked_add(limit));
    wait_for_state(&watched, POLL, deadline, target, &[]).await.map_err(|error| match error.kind() {
        ErrorKind::TimedOut => {
            error.hint("allow more time with --timeout, or look at it: `vmkit inspect`, `vmkit console`")
        }
        _ => error,
    })?;
    let outcome = Outcome { id: id.clone(), state: target, forced: None, run_error: None };
    output.result(&outcome, || format!("{id} {target}\n"))?;
    Ok(0)
}
