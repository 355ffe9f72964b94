//! `vmkit run` and `vmkit exec`.

use std::time::{Duration, Instant};

use serde::Serialize;
use vmkit::{ConsoleSinks, Error, ErrorKind, Id, Instance, Result, Source, Spec, State};

use crate::args::{Args, ExecArgs, RunArgs, ShapeArgs};
use crate::child::{self, Ended};
use crate::context::{Busy, Context};
use crate::output::{Failure, Output, say_json};
use crate::owner::{self, Owner};
use crate::signals::{self, Signals};

/// How much of the console goes into an error, bytes: a kernel's last words are long.
const CONSOLE: usize = 8 << 10;
/// How long deleting a machine may take.
pub const CLEANUP_LIMIT: Duration = Duration::from_secs(90);

/// Where the time went, milliseconds.
#[derive(Default, Serialize)]
struct Timings {
    image: f64,
    clone: f64,
    start: f64,
    command: f64,
    delete: f64,
    total: f64,
}

impl Timings {
    fn text(&self) -> String {
        let Timings { image, clone, start, command, delete, total } = self;
        format!(
            "image {image:.1} ms, clone {clone:.1} ms, start {start:.1} ms, command {command:.1} ms, \
             delete {delete:.1} ms; {total:.1} ms in all"
        )
    }
}

fn lap(since: &mut Instant) -> f64 {
    let elapsed = since.elapsed();
    *since = Instant::now();
    elapsed.as_secs_f64() * 1000.0
}

pub async fn exec(args: &Args, exec: &ExecArgs, output: &Output) -> Result<u8, Failure> {
    let context = Context::open(args, output).await.map_err(Failure::of_run)?;
    let instance = context.machine(&exec.name).await.map_err(Failure::of_run)?;
    let mut signals = Signals::new();
    let ran = instance.state() == State::Running;
    let command = child::command(&instance, &exec.command);
    let child = tokio::select! {
        child = child::start(command, exec.command.timeout, output) => child,
        signal = signals.next() => return Ok(signals::exit_code(signal)),
    };
    let child = match child {
        // A short command is told of once it is over: it may have been what ended it.
        Err(failure) if ran && failure.error.kind() == ErrorKind::NotRunning => {
            return Err(ended_under(&context, &instance).await);
        }
        child => child?,
    };
    let Some(child) = child else { return Ok(Ended::TimedOut.code()) };
    match child::attend(child, &mut signals).await {
        Ok(ended) => Ok(ended.code()),
        // It was started: that is not the same as one that never was.
        Err(error) if error.kind() == ErrorKind::NotRunning => Err(ended_under(&context, &instance).await),
        Err(error) => Err(Failure::of_run(error)),
    }
}

pub async fn run(args: &Args, run: &RunArgs, output: &Output) -> Result<u8, Failure> {
    let start = Instant::now();
    let mut timings = Timings::default();
    // From here on a signal ends the command and deletes the machine, wherever they are.
    let mut signals = Signals::new();
    let context = tokio::select! {
        context = Context::open(args, output) => context.map_err(Failure::of_run)?,
        // What a dead run left may be busy elsewhere: the next command tries again.
        signal = signals.next() => return Ok(signals::exit_code(signal)),
    };
    let id = match &run.name {
        Some(id) => id.clone(),
        None => new_name().map_err(Failure::of_run)?,
    };
    let owner = match run.keep {
        true => Owner::nobody(),
        false => Owner::claim(&context.dir, &id),
    };
    let owner = owner.map_err(Failure::of_run)?;
    let made = tokio::select! {
        made = make(&context, run, &id, &owner, &mut timings) => made,
        signal = signals.next() => {
            // The machine's own task takes back what is half made; this waits for it.
            remove(&context, &id, owner).await?;
            return Ok(signals::exit_code(signal));
        }
    };
    let instance = match made {
        Ok(instance) => instance,
        Err(error) => {
            // What the machine left explains nothing that the error does not: it goes.
            remove(&context, &id, owner).await?;
            return Err(Failure::of_make(error));
        }
    };
    let mut clock = Instant::now();
    let ended = match execute(&instance, run, &mut signals, output).await {
        Err(failure) if failure.error.kind() == ErrorKind::NotRunning => Err(ended_under(&context, &instance).await),
        ended => ended,
    };
    timings.command = lap(&mut clock);
    if run.keep {
        match output.json {
            true => say_json(&serde_json::json!({ "kept": id })),
            false => output.note(format!("kept: {id} (vmkit exec {id} -- CMD; vmkit cleanup {id})")),
        }
    } else {
        remove(&context, &id, owner).await?;
        timings.delete = lap(&mut clock);
    }
    timings.total = start.elapsed().as_secs_f64() * 1000.0;
    if run.timings {
        match output.json {
            true => say_json(&serde_json::json!({ "timings_ms": timings })),
            false => output.note(timings.text()),
        }
    }
    ended.map(|ended| ended.code())
}

async fn make(context: &Context, run: &RunArgs, id: &Id, owner: &Owner, timings: &mut Timings) -> Result<Instance> {
    let mut clock = Instant::now();
    let (image, hold) = context.image(&run.shape.image).await?;
    timings.image = lap(&mut clock);
    let spec = owner.mark(spec(&run.shape, Source::Boot(image)));
    let instance = context.host.create(id.clone(), spec).await?;
    instance.clone_source().await?;
    drop(hold);
    timings.clone = lap(&mut clock);
    context.template(id, instance.spec()).await;
    let busy = Busy::new(&context.output, "starting", id);
    instance.start(ConsoleSinks::discard()).await?;
    drop(busy);
    timings.start = lap(&mut clock);
    Ok(instance)
}

/// A machine's shape, as it was asked for.
pub fn spec(shape: &ShapeArgs, source: Source) -> Spec {
    let spec = Spec::new(source).cpus(shape.cpus).memory_mib(shape.memory);
    shape.label.iter().fold(spec, |spec, (key, value)| spec.label(key, value))
}

async fn execute(instance: &Instance, run: &RunArgs, signals: &mut Signals, output: &Output) -> Result<Ended, Failure> {
    let command = child::command(instance, &run.command);
    let child = tokio::select! {
        child = child::start(command, run.command.timeout, output) => child?,
        signal = signals.next() => return Ok(Ended::Asked(signal)),
    };
    match child {
        Some(child) => child::attend(child, signals).await.map_err(Failure::of_run),
        None => Ok(Ended::TimedOut),
    }
}

/// A machine that ended while its command ran: the end of its console, and how its process ended, is all that will ever be known.
async fn ended_under(context: &Context, instance: &Instance) -> Failure {
    let console = std::fs::read(context.qemu().console_log(instance.id())).unwrap_or_default();
    let console = String::from_utf8_lossy(&console[console.len().saturating_sub(CONSOLE)..]).into_owned();
    let state = instance.state();
    let how = match state {
        State::Suspended => "the machine was suspended while the command ran",
        State::Deleted | State::Deleting => "the machine was deleted while the command ran",
        _ => "the machine ended while the command ran",
    };
    let hint = match (state, context.qemu().is_full()) {
        (State::Suspended, _) => {
            "somebody suspended it; the command goes on with it when it is started, and nobody hears what it says"
        }
        (State::Deleted | State::Deleting, _) => "somebody deleted it",
        (_, true) => {
            "the disk that holds its memory and its disk is full, and its host had to kill it: make room first"
        }
        _ => "its guest powered off, rebooted or crashed, or its host killed it; what its console said last is above",
    };
    let error = Error::new(ErrorKind::NotRunning, how)
        .on(instance.id().as_str())
        .hint(hint)
        .with_details(console.chars().filter(|c| *c == '\n' || !c.is_control()).collect::<String>());
    if !matches!(instance.state(), State::Stopped) {
        return Failure::of_run(error);
    }
    Failure::of_run(match instance.stop(Duration::ZERO).await.run {
        Err(run) => error.caused_by(run),
        Ok(()) => error,
    })
}

/// Deletes the machine that this run made, if it made one, and gives up its name only when nothing is left: else the next
/// command tries again. A machine that had the name before is not ours to touch.
async fn remove(context: &Context, id: &Id, owner: Owner) -> Result<(), Failure> {
    owner.remove(context, id).await.map_err(Failure::of_run)?;
    owner.release();
    Ok(())
}

/// A name that no other machine has.
fn new_name() -> Result<Id> {
    Id::new(format!("run-{}", owner::random()?))
}
