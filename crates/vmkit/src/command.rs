//! Executing commands in a guest, shaped like `tokio::process::Command`.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::io::AsyncReadExt;
use tokio::time::Instant;

use crate::error::{Error, ErrorKind, Result};
use crate::guest::{CommandSpec, ExitStatus, GuestProcess, GuestReader, GuestWriter, ProcessControl};
use crate::instance::{Gone, Instance};

/// How long a machine that has just gone away may take to be known as gone.
const SETTLES: Duration = Duration::from_secs(2);
/// How long a guest may take to be told that a command is to be killed. One that hangs never is: dropping the command is all
/// that can be done then.
const TOLD: Duration = Duration::from_secs(3);

/// A command to be executed in a guest.
///
/// Standard streams are thrown away unless asked for; [`output`](Command::output) asks for both outputs.
#[derive(Clone)]
#[must_use]
pub struct Command {
    instance: Instance,
    spec: CommandSpec,
    timeout: Option<Duration>,
    mark: Option<Arc<AtomicBool>>,
}

/// What a command printed, and how it ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Output {
    /// How it ended.
    pub status: ExitStatus,
    /// Everything it wrote to standard output.
    pub stdout: Vec<u8>,
    /// Everything it wrote to standard error.
    pub stderr: Vec<u8>,
}

impl Command {
    pub(crate) fn new(instance: Instance, program: String) -> Command {
        Command { instance, spec: CommandSpec { program, ..CommandSpec::default() }, timeout: None, mark: None }
    }

    /// Sets a flag when it ends without success.
    pub(crate) fn marks(mut self, mark: Arc<AtomicBool>) -> Command {
        self.mark = Some(mark);
        self
    }

    /// Adds an argument.
    pub fn arg(mut self, arg: impl Into<String>) -> Command {
        self.spec.args.push(arg.into());
        self
    }

    /// Adds arguments.
    pub fn args(mut self, args: impl IntoIterator<Item = impl Into<String>>) -> Command {
        self.spec.args.extend(args.into_iter().map(Into::into));
        self
    }

    /// Sets a variable of its environment.
    pub fn env(mut self, key: impl Into<String>, value: impl Into<String>) -> Command {
        self.spec.env.push((key.into(), value.into()));
        self
    }

    /// Starts from an empty environment instead of the guest's.
    pub fn env_clear(mut self) -> Command {
        self.spec.env_clear = true;
        self
    }

    /// Sets its working directory.
    pub fn current_dir(mut self, dir: impl Into<PathBuf>) -> Command {
        self.spec.cwd = Some(dir.into());
        self
    }

    /// Sets whom it runs as: a name or number, with an optional group, `app` or `1000:1000`.
    pub fn user(mut self, user: impl Into<String>) -> Command {
        self.spec.user = Some(user.into());
        self
    }

    /// Connects its standard input.
    pub fn stdin(mut self, connect: bool) -> Command {
        self.spec.stdin = connect;
        self
    }

    /// Connects its standard output.
    pub fn stdout(mut self, connect: bool) -> Command {
        self.spec.stdout = connect;
        self
    }

    /// Connects its standard error.
    pub fn stderr(mut self, connect: bool) -> Command {
        self.spec.stderr = connect;
        self
    }

    /// Lets it live on when this process is gone.
    pub fn detached(mut self, detached: bool) -> Command {
        self.spec.detached = detached;
        self
    }

    /// Says that nothing is to be done with it between its start and its end, as [`output`](Command::output) and
    /// [`status`](Command::status) do: when the end comes within milliseconds, the two may be told of at once.
    pub fn whole(mut self, whole: bool) -> Command {
        self.spec.whole = whole;
        self
    }

    /// Kills it, with its children, when it takes longer. Counts from the moment it is sent to the guest, so that one that
    /// hangs keeps nobody waiting.
    pub fn timeout(mut self, limit: Duration) -> Command {
        self.timeout = Some(limit);
        self
    }

    /// Starts it.
    ///
    /// # Errors
    /// [`ErrorKind::NotRunning`] unless the machine is Running, and then nothing was executed; [`ErrorKind::NotFound`]
    /// when there is no such program; [`ErrorKind::PermissionDenied`] when it cannot be executed;
    /// [`ErrorKind::InvalidArgument`] for what no process can be given, such as a zero byte or an argument of 128 KiB;
    /// [`ErrorKind::TimedOut`] when its timeout passed before the guest had started it. No error contains arguments or
    /// environment.
    ///
    /// # Cancel safety
    /// Dropping the future kills what was started.
    pub async fn spawn(self) -> Result<Child> {
        let mark = self.mark.clone();
        let started = self.begin().await;
        if started.is_err() {
            failed(&mark);
        }
        started
    }

    async fn begin(self) -> Result<Child> {
        self.spec.check().map_err(|error| error.on(self.instance.id().as_str()))?;
        let (guest, mut gone) = self.instance.way_in()?;
        // A limit beyond what a clock can say is none.
        let deadline = self.timeout.and_then(|limit| Some((Instant::now().checked_add(limit)?, limit)));
        let started = tokio::select! {
            biased;
            started = guest.spawn(self.spec) => started,
            () = gone.wait() => Err(self.instance.not_running()),
            limit = passed(deadline) => Err(too_long(limit)),
        };
        let started = match started {
            // As of one that has begun: a short command is told of once it is over.
            Err(error) if error.kind() == ErrorKind::Agent => Err(cause(error, &mut gone, &self.instance).await),
            started => started,
        };
        let GuestProcess { pid, stdin, stdout, stderr, control } =
            started.map_err(|error| error.on(self.instance.id().as_str()))?;
        Ok(Child {
            stdin,
            stdout,
            stderr,
            pid,
            control,
            gone,
            instance: self.instance,
            deadline,
            exit: None,
            mark: self.mark,
        })
    }

    /// Runs it to its end and returns how it ended.
    ///
    /// # Errors
    /// Those of [`spawn`](Command::spawn) and [`Child::wait`].
    pub async fn status(mut self) -> Result<ExitStatus> {
        self.spec.whole = true;
        let mut child = self.spawn().await?;
        child.wait().await
    }

    /// Runs it to its end and collects what it prints: in memory, without bound. Read a [`Child`]'s streams for output
    /// of any size.
    ///
    /// # Errors
    /// Those of [`spawn`](Command::spawn) and [`Child::wait`].
    pub async fn output(mut self) -> Result<Output> {
        self.spec.stdout = true;
        self.spec.stderr = true;
        self.spec.whole = true;
        let mut child = self.spawn().await?;
        let (mut out, mut err) = (Vec::new(), Vec::new());
        let (out_from, err_from) = (child.stdout.take(), child.stderr.take());
        let reading = async { tokio::try_join!(read_all(out_from, &mut out), read_all(err_from, &mut err)).map(drop) };
        let (status, read) = tokio::join!(child.wait(), reading);
        // A stream that broke because the machine went away is that error, not one of its own.
        let status = status?;
        if let Err(source) = read {
            // It ended, and not all that it said has arrived: that is no success.
            failed(&child.mark);
            return Err(cause(Error::output_lost(source), &mut child.gone, &child.instance)
                .await
                .on(child.instance.id().as_str()));
        }
        Ok(Output { status, stdout: out, stderr: err })
    }
}

impl std::fmt::Debug for Command {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Command")
            .field("instance", self.instance.id())
            .field("spec", &self.spec)
            .finish_non_exhaustive()
    }
}

/// Whoever counts on a command learns that it did not end with success.
fn failed(mark: &Option<Arc<AtomicBool>>) {
    if let Some(mark) = mark {
        mark.store(true, Ordering::Relaxed);
    }
}

/// The connection breaks a moment before the machine is known to be gone: the cause, not the symptom.
async fn cause(symptom: Error, gone: &mut Gone, instance: &Instance) -> Error {
    match tokio::time::timeout(SETTLES, gone.wait()).await {
        Ok(()) => instance.not_running(),
        Err(_) => symptom,
    }
}

/// Returns the limit when it has passed.
async fn passed(deadline: Option<(Instant, Duration)>) -> Duration {
    match deadline {
        Some((at, limit)) => {
            tokio::time::sleep_until(at).await;
            limit
        }
        None => std::future::pending().await,
    }
}

fn too_long(limit: Duration) -> Error {
    Error::new(ErrorKind::TimedOut, format!("the command took longer than {limit:?}"))
        .hint("give it more time, or find out in the guest what it waits for")
}

async fn read_all(from: Option<GuestReader>, into: &mut Vec<u8>) -> std::io::Result<()> {
    match from {
        Some(mut reader) => reader.read_to_end(into).await.map(drop),
        None => Ok(()),
    }
}

/// A process in a guest. Dropped before it ended, it is killed with its children, unless it was started detached.
pub struct Child {
    /// Its standard input, when connected; drop it to signal the end.
    pub stdin: Option<GuestWriter>,
    /// Its standard output, when connected. What is not read holds the process back; nothing is lost. Where the machine goes away
    /// first, what had arrived is followed by an error.
    pub stdout: Option<GuestReader>,
    /// Its standard error, when connected.
    pub stderr: Option<GuestReader>,
    pid: u32,
    control: Box<dyn ProcessControl>,
    gone: Gone,
    instance: Instance,
    deadline: Option<(Instant, Duration)>,
    exit: Option<ExitStatus>,
    mark: Option<Arc<AtomicBool>>,
}

impl Child {
    /// Its process id in the guest.
    pub fn id(&self) -> u32 {
        self.pid
    }

    /// How it ended. Closes its standard input first, as the standard library does.
    ///
    /// # Errors
    /// [`ErrorKind::NotRunning`] when the machine left Running meanwhile; [`ErrorKind::TimedOut`] when it took longer
    /// than its timeout, after it was killed.
    ///
    /// # Cancel safety
    /// May be dropped and called again.
    pub async fn wait(&mut self) -> Result<ExitStatus> {
        drop(self.stdin.take());
        if let Some(status) = self.exit {
            return Ok(status);
        }
        let ended = self.end().await;
        if !ended.as_ref().is_ok_and(|status| status.success()) {
            failed(&self.mark);
        }
        ended
    }

    async fn end(&mut self) -> Result<ExitStatus> {
        let ended = tokio::select! {
            biased;
            ended = self.control.wait() => ended,
            () = self.gone.wait() => return Err(self.instance.not_running()),
            limit = passed(self.deadline) => {
                if let Ok(killed) = tokio::time::timeout(TOLD, self.kill()).await {
                    killed?;
                }
                return Err(too_long(limit).on(self.instance.id().as_str()));
            }
        };
        match ended {
            Ok(status) => {
                self.exit = Some(status);
                Ok(status)
            }
            Err(error) => Err(cause(error, &mut self.gone, &self.instance).await.on(self.instance.id().as_str())),
        }
    }

    /// Sends a signal, 1 to 64, to its whole process group.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`] for what is no signal; [`ErrorKind::NotRunning`] when the machine is not Running any more.
    pub async fn signal(&mut self, signal: i32) -> Result<()> {
        if !(1..=64).contains(&signal) {
            let error = Error::new(ErrorKind::InvalidArgument, format!("{signal} is no signal"));
            return Err(error.on(self.instance.id().as_str()).hint("signals have numbers from 1 to 64"));
        }
        if self.exit.is_some() {
            return Ok(());
        }
        tokio::select! {
            biased;
            sent = self.control.signal(signal) => sent.map_err(|error| error.on(self.instance.id().as_str())),
            () = self.gone.wait() => Err(self.instance.not_running()),
        }
    }

    /// Kills it, with its process group.
    ///
    /// # Errors
    /// Those of [`signal`](Child::signal).
    pub async fn kill(&mut self) -> Result<()> {
        self.signal(9).await
    }
}

impl std::fmt::Debug for Child {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Child").field("pid", &self.pid).field("exit", &self.exit).finish_non_exhaustive()
    }
}
