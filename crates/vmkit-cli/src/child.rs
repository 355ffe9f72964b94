//! A guest's command and this process's standard streams.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};
use vmkit::{Child, Command, Error, ErrorKind, ExitStatus, GuestReader, GuestWriter, Instance, Result};

use crate::args::CommandArgs;
use crate::output::Failure;
use crate::signals::{self, Signals};

/// How long a background process that the command left may be silent on its output before nobody waits for more.
const SILENCE: Duration = Duration::from_millis(500);
/// More than every buffer on the way holds. What comes beyond it after the command has ended is a background process's.
const HELD: u64 = 4 << 20;
/// How long a command may take to end once it was told to.
const ENDS: Duration = Duration::from_secs(10);
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
    let mut command = instance.command(program).args(rest).stdin(args.interactive).stdout(true).stderr(true);
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

/// Starts it. Its timeout counts from now: a guest that hangs does not even start it.
pub async fn start(command: Command, limit: Option<Duration>) -> Result<Option<Child>, Failure> {
    let spawned = match limit {
        None => command.spawn().await,
        Some(limit) => match timeout(limit, command.spawn()).await {
            Ok(spawned) => spawned,
            Err(_) => return Ok(None),
        },
    };
    spawned.map(Some).map_err(not_started)
}

/// Connects the command to this process's streams until it has ended and all of its output is written.
pub async fn attend(mut child: Child, signals: &mut Signals) -> Result<Ended> {
    let pumps =
        [Pump::start(child.stdout.take(), std::io::stdout()), Pump::start(child.stderr.take(), std::io::stderr())];
    let feeder = child.stdin.take().map(|stdin| tokio::spawn(feed(stdin)));
    let mut asked = None;
    let ended = loop {
        let patience = async {
            match asked {
                Some(_) => sleep(ENDS).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            ended = child.wait() => break ended,
            signal = signals.next() => {
                // The first is passed on; whoever asks again means it.
                let number = if asked.is_none() { signal } else { 9 };
                asked.get_or_insert(signal);
                child.signal(number).await?;
            }
            () = patience => child.kill().await?,
        }
    };
    if let Some(feeder) = feeder {
        feeder.abort();
    }
    let rest = async {
        for pump in pumps.into_iter().flatten() {
            pump.finish().await?;
        }
        Ok(())
    };
    let written = tokio::select! {
        written = rest => written,
        // Its reader may never come back for the rest: there is nothing left to ask.
        signal = signals.next() => {
            asked.get_or_insert(signal);
            Ok(())
        }
    };
    match (ended, asked) {
        (Ok(_), Some(signal)) => Ok(Ended::Asked(signal)),
        (Ok(status), None) => written.map(|()| Ended::Status(status)),
        (Err(error), _) if error.kind() == ErrorKind::TimedOut => Ok(Ended::TimedOut),
        (Err(error), _) => Err(error),
    }
}

/// Standard input to the command. A command that does not read it to its end has ended, or closed it: no failure.
async fn feed(mut to: GuestWriter) {
    let mut from = tokio::io::stdin();
    let mut buffer = vec![0; CHUNK];
    loop {
        match from.read(&mut buffer).await {
            Ok(0) | Err(_) => break,
            Ok(length) => {
                if to.write_all(&buffer[..length]).await.is_err() || to.flush().await.is_err() {
                    return;
                }
            }
        }
    }
    let _ = to.shutdown().await;
}

/// One of the command's outputs on its way to one of ours.
struct Pump {
    task: JoinHandle<std::io::Result<()>>,
    /// Rises with each step; odd while it waits for the guest, even while it waits for our reader.
    steps: Arc<AtomicU64>,
    /// Bytes that have passed.
    passed: Arc<AtomicU64>,
}

impl Pump {
    fn start(from: Option<GuestReader>, to: impl AsFd) -> Option<Pump> {
        let from = from?;
        // A descriptor of our own: the library's stream would cut binary output into lines.
        let to = to.as_fd().try_clone_to_owned().ok()?;
        let (steps, passed) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
        let task = tokio::spawn(pump(from, std::fs::File::from(to), steps.clone(), passed.clone()));
        Some(Pump { task, steps, passed })
    }

    /// Waits for the rest. A background process may hold the stream open for ever: silence ends the wait, and so does more
    /// than the command itself can have left, but never what our own reader has not taken yet.
    async fn finish(mut self) -> Result<()> {
        let until = self.passed.load(Ordering::Acquire) + HELD;
        loop {
            let before = self.steps.load(Ordering::Acquire);
            match timeout(SILENCE, &mut self.task).await {
                Ok(Ok(Err(error))) if error.kind() != std::io::ErrorKind::BrokenPipe => {
                    let lost = Error::io("the command's output could not be written, and is lost", error);
                    return Err(lost.hint("make room where the output goes, and run the command again"));
                }
                Ok(_) => return Ok(()),
                Err(_) if before % 2 == 1 && before == self.steps.load(Ordering::Acquire) => break,
                Err(_) if self.passed.load(Ordering::Acquire) > until => break,
                Err(_) => {}
            }
        }
        self.task.abort();
        Ok(())
    }
}

async fn pump(
    mut from: GuestReader,
    to: std::fs::File,
    steps: Arc<AtomicU64>,
    passed: Arc<AtomicU64>,
) -> std::io::Result<()> {
    let mut to = tokio::fs::File::from_std(to);
    let mut buffer = vec![0; CHUNK];
    loop {
        steps.fetch_add(1, Ordering::AcqRel);
        // A stream that breaks is a machine that went away: waiting for the command tells.
        let length = from.read(&mut buffer).await.unwrap_or(0);
        steps.fetch_add(1, Ordering::AcqRel);
        if length == 0 {
            return Ok(());
        }
        // Dropping the stream on a failure is what tells the command that nobody reads.
        to.write_all(&buffer[..length]).await?;
        to.flush().await?;
        passed.fetch_add(length as u64, Ordering::AcqRel);
    }
}
