//! A guest's command and this process's standard streams.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, sleep_until, timeout};
use vmkit::{Child, Command, Error, ErrorKind, ExitStatus, GuestReader, GuestWriter, Instance, Result};

use crate::args::CommandArgs;
use crate::output::{Failure, Output};
use crate::signals::{self, Signals};

/// How long a background process that the command left may be silent on its output before nobody waits for more.
const SILENCE: Duration = Duration::from_millis(500);
/// How long in all nobody waits for such a process's output, however often it says something.
const LINGERS: Duration = Duration::from_secs(2);
/// More than every buffer on the way holds. What comes beyond it after the command has ended is a background process's.
const HELD: u64 = 4 << 20;
/// How long a command may take to end once it was told to.
const ENDS: Duration = Duration::from_secs(10);
/// How long a guest may take to be told of a signal, and to have killed what it was told to kill. One that takes longer hangs.
const ANSWERS: Duration = Duration::from_secs(3);
/// How long our reader may take nothing after the command's time has passed.
const TAKES: Duration = Duration::from_secs(2);
const CHUNK: usize = 64 << 10;

/// How it ended.
#[derive(Debug)]
pub enum Ended {
    Status(ExitStatus),
    TimedOut,
    /// This process was asked to end, and so was the command.
    Asked(i32),
}

impl Ended {
    /// The code to end with.
    pub fn code(&self) -> u8 {
        match self {
            Ended::Status(status) => u8::try_from(status.shell_code() & 0xFF).unwrap_or(255),
            Ended::TimedOut => 124,
            Ended::Asked(signal) => signals::exit_code(*signal),
        }
    }
}

/// The command as it was asked for.
pub fn command(instance: &Instance, args: &CommandArgs) -> Command {
    let (program, rest) = args.command.split_first().map_or((String::new(), &[][..]), |(p, rest)| (p.clone(), rest));
    let mut command =
        instance.command(program).args(rest).stdin(args.interactive).stdout(true).stderr(true).whole(true);
    for (key, value) in &args.env {
        command = command.env(key, value);
    }
    if let Some(dir) = &args.workdir {
        command = command.current_dir(dir);
    }
    if let Some(user) = &args.user {
        command = command.user(user);
    }
    if let Some(limit) = args.timeout {
        command = command.timeout(limit);
    }
    command
}

/// The failure of a command that could not be started, with the code a shell would give.
fn not_started(error: Error) -> Failure {
    let code = match error.kind() {
        ErrorKind::NotFound => 127,
        ErrorKind::PermissionDenied => 126,
        _ => 125,
    };
    Failure { error, code }
}

/// A command that was sent to the guest, and when its time is over.
pub struct Started {
    child: Child,
    deadline: Option<Instant>,
}

/// Starts it. Its timeout counts from now: of a short command nothing may be said until then, and a guest that hangs does not even
/// start it; that is `None`.
pub async fn start(command: Command, limit: Option<Duration>, output: &Output) -> Result<Option<Started>, Failure> {
    let deadline = limit.and_then(|limit| Instant::now().checked_add(limit));
    match command.spawn().await {
        Ok(child) => Ok(Some(Started { child, deadline })),
        Err(error) if error.kind() == ErrorKind::TimedOut => {
            output.warn("the command's time was over before the guest said anything of it: it takes longer, or the guest's agent does not answer");
            Ok(None)
        }
        Err(error) => Err(not_started(error)),
    }
}

/// Connects the command to this process's streams until it has ended and all of its output is written.
pub async fn attend(started: Started, signals: &mut Signals) -> Result<Ended> {
    let Started { mut child, deadline } = started;
    let pumps =
        [Pump::start(child.stdout.take(), std::io::stdout())?, Pump::start(child.stderr.take(), std::io::stderr())?];
    let mut feeder = child.stdin.take().map(|stdin| tokio::spawn(feed(stdin)));
    let mut asked = None;
    let ended = tokio::select! {
        biased;
        ended = until_ended(&mut child, signals, &mut asked) => ended,
        broken = broken(&mut feeder) => {
            let _ = timeout(ANSWERS, child.kill()).await;
            let error = Error::io("standard input cannot be read; the command was killed", broken.error);
            return Err(error.hint("give it something that can be read: a file, a pipe, or < /dev/null"));
        }
    };
    if let Some(feeder) = feeder {
        feeder.abort();
    }
    let steps = pumps.each_ref().map(|pump| pump.as_ref().map(|pump| pump.steps.clone()));
    let rest = async {
        for pump in pumps.into_iter().flatten() {
            pump.finish().await?;
        }
        Ok(())
    };
    let mut late = false;
    let written = tokio::select! {
        written = rest => written,
        // Its reader may never come back for the rest: there is nothing left to ask.
        signal = signals.next() => {
            asked.get_or_insert(signal);
            Ok(())
        }
        () = stuck(deadline, &steps) => {
            late = true;
            Ok(())
        }
    };
    let status = match ended {
        Ok(status) => status,
        Err(error) if error.kind() == ErrorKind::TimedOut => {
            late = true;
            None
        }
        Err(error) => return Err(error),
    };
    // Lost output is a failure however the command ended.
    written?;
    Ok(match (asked, status) {
        (Some(signal), _) => Ended::Asked(signal),
        (None, Some(status)) if !late => Ended::Status(status),
        (None, _) => Ended::TimedOut,
    })
}

/// How the command ended; `None` for one that this process was asked to end, in a guest that hangs and does not end it.
async fn until_ended(child: &mut Child, signals: &mut Signals, asked: &mut Option<i32>) -> Result<Option<ExitStatus>> {
    let mut killed = false;
    let mut patience: Option<Instant> = None;
    loop {
        let impatient = async {
            match patience {
                Some(at) => sleep_until(at).await,
                None => std::future::pending().await,
            }
        };
        let number = tokio::select! {
            ended = child.wait() => return ended.map(Some),
            signal = signals.next() => match *asked {
                None => *asked.insert(signal),
                // The first is passed on; whoever asks again means it.
                Some(_) => 9,
            },
            () = impatient => match killed {
                true => return Ok(None),
                false => 9,
            },
        };
        // Whether it arrives or not, waiting for the command tells what came of it.
        let _ = timeout(ANSWERS, child.signal(number)).await;
        if !killed {
            killed = number == 9;
            patience = Some(Instant::now() + if killed { ANSWERS } else { ENDS });
        }
    }
}

/// Returns when the command's time is over and our readers take nothing any more.
async fn stuck(deadline: Option<Instant>, steps: &[Option<Arc<AtomicU64>>]) {
    match deadline {
        Some(at) => sleep_until(at).await,
        None => std::future::pending().await,
    }
    let taken = || steps.iter().flatten().map(|steps| steps.load(Ordering::Acquire)).collect::<Vec<_>>();
    loop {
        let before = taken();
        sleep(TAKES).await;
        if taken() == before {
            return;
        }
    }
}

/// Input that cannot be read to its end.
struct BrokenInput {
    error: std::io::Error,
    /// Kept until the command is killed: dropping it would tell the command that this was all.
    _to: GuestWriter,
}

/// Returns when input cannot be read.
async fn broken(feeder: &mut Option<JoinHandle<Result<(), BrokenInput>>>) -> BrokenInput {
    if let Some(feeding) = feeder
        && let Ok(Err(broken)) = feeding.await
    {
        return broken;
    }
    // Fed, and over: it is not to be asked again.
    *feeder = None;
    std::future::pending().await
}

/// Standard input to the command. A command that does not read it to its end has ended, or closed it: no failure. Input that
/// cannot be read is one, and not its end: the command must not take the half for the whole.
async fn feed(mut to: GuestWriter) -> Result<(), BrokenInput> {
    let mut from = tokio::io::stdin();
    let mut buffer = vec![0; CHUNK];
    loop {
        match from.read(&mut buffer).await {
            Ok(0) => break,
            Ok(length) => {
                if to.write_all(&buffer[..length]).await.is_err() || to.flush().await.is_err() {
                    return Ok(());
                }
            }
            Err(error) => return Err(BrokenInput { error, _to: to }),
        }
    }
    let _ = to.shutdown().await;
    Ok(())
}

/// One of the command's outputs on its way to one of ours.
struct Pump {
    task: JoinHandle<std::io::Result<()>>,
    /// Rises with each step; odd while it waits for the guest, even while it waits for our reader.
    steps: Arc<AtomicU64>,
    /// Bytes that have passed.
    passed: Arc<AtomicU64>,
    /// How long it has waited for the guest, in milliseconds.
    waited: Arc<AtomicU64>,
}

impl Pump {
    fn start(from: Option<GuestReader>, to: impl AsFd) -> Result<Option<Pump>> {
        let Some(from) = from else { return Ok(None) };
        // A descriptor of our own: the library's stream would cut binary output into lines.
        let to = to.as_fd().try_clone_to_owned().map_err(|error| Error::io("a descriptor cannot be copied", error))?;
        let [steps, passed, waited] = [(); 3].map(|()| Arc::new(AtomicU64::new(0)));
        let counts = [steps.clone(), passed.clone(), waited.clone()];
        let task = tokio::spawn(pump(from, std::fs::File::from(to), counts));
        Ok(Some(Pump { task, steps, passed, waited }))
    }

    /// Waits for the rest. A background process may hold the stream open for ever: silence ends the wait, and so does more
    /// than the command itself can have left, or what comes later than anything it left, but never what our own reader has not
    /// taken yet.
    async fn finish(mut self) -> Result<()> {
        let until = self.passed.load(Ordering::Acquire) + HELD;
        let patience = self.waited.load(Ordering::Acquire) + u64::try_from(LINGERS.as_millis()).unwrap_or(u64::MAX);
        loop {
            let before = self.steps.load(Ordering::Acquire);
            match timeout(SILENCE, &mut self.task).await {
                Ok(Ok(Err(error))) if error.kind() == std::io::ErrorKind::ConnectionAborted => {
                    return Err(Error::output_lost(error));
                }
                Ok(Ok(Err(error))) if error.kind() != std::io::ErrorKind::BrokenPipe => {
                    let lost = Error::io("the command's output could not be written, and is lost", error);
                    return Err(lost.hint("make room where the output goes, and run the command again"));
                }
                Ok(_) => return Ok(()),
                Err(_) if before % 2 == 1 && before == self.steps.load(Ordering::Acquire) => break,
                Err(_) if self.passed.load(Ordering::Acquire) > until => break,
                Err(_) if self.waited.load(Ordering::Acquire) > patience => break,
                Err(_) => {}
            }
        }
        self.task.abort();
        Ok(())
    }
}

async fn pump(from: GuestReader, to: std::fs::File, counts: [Arc<AtomicU64>; 3]) -> std::io::Result<()> {
    let ([steps, passed, waited], mut from) = (counts, from);
    let mut to = tokio::fs::File::from_std(to);
    let mut buffer = vec![0; CHUNK];
    // Short waits count too: what a background process says often is waited for often.
    let mut waits = Duration::ZERO;
    loop {
        steps.fetch_add(1, Ordering::AcqRel);
        let since = Instant::now();
        let read = from.read(&mut buffer).await;
        waits += since.elapsed();
        waited.store(u64::try_from(waits.as_millis()).unwrap_or(u64::MAX), Ordering::Release);
        steps.fetch_add(1, Ordering::AcqRel);
        // A stream that breaks is a machine that went away: waiting for the command tells, if it had not ended.
        let length = match read {
            Ok(0) => return Ok(()),
            Ok(length) => length,
            Err(_) => return Err(std::io::ErrorKind::ConnectionAborted.into()),
        };
        // Dropping the stream on a failure is what tells the command that nobody reads.
        to.write_all(&buffer[..length]).await?;
        to.flush().await?;
        passed.fetch_add(length as u64, Ordering::AcqRel);
    }
}
