//! The way into the guest: a session with its agent, made when it is needed and made again when it was lost.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use futures::FutureExt;
use futures::future::BoxFuture;
use rustix::fs::FlockOperation;
use tokio::net::UnixStream;
use tokio::sync::Mutex;
use tokio::time::Instant;
use tracing::warn;
use vmkit::{Binding, CommandSpec, Error, ErrorKind, ExitStatus, GuestOps, GuestProcess, ProcessControl, Result};
use vmkit_agent::client::{AgentError, Bind, Client, ExecControl, ExecRequest, Exit, Fork};

use super::args::{LINES, line_socket};
use super::console;
use super::lock::FileLock;
use super::qmp::Qmp;
use super::socket;
use super::turns::{Place, Want};

/// How long a ready guest's agent may take to begin a session, also on a loaded host. One that reboots may take as long as a start.
const BEGINS: Duration = Duration::from_secs(30);
/// How long to wait for a line while other processes have them all.
const LINE_WAITS: Duration = Duration::from_secs(30);

/// A machine's line to its agent, shared by everybody in this process.
#[derive(Debug)]
pub(crate) struct Line {
    dir: PathBuf,
    /// How long the agent may take to begin a session.
    begins: Duration,
    session: Mutex<Option<Session>>,
    place: Place,
}

#[derive(Clone, Debug)]
struct Session {
    client: Client,
    /// FileLock for as long as the session and its commands: the line is ours among all processes.
    port: Arc<FileLock>,
}

impl Line {
    /// `start`: how long the guest may take to boot, which it may be doing at any time.
    pub fn new(dir: PathBuf, start: Duration) -> Arc<Line> {
        Arc::new(Line { dir, begins: BEGINS.max(start), session: Mutex::new(None), place: Place::new() })
    }

    /// The session with the agent of a guest that is up.
    pub async fn client(&self) -> Result<Client> {
        self.session().await.map(|session| session.client)
    }

    async fn session(&self) -> Result<Session> {
        let mut session = self.session.lock().await;
        if let Some(session) = session.as_ref().filter(|session| !session.client.is_closed()) {
            return Ok(session.clone());
        }
        *session = None;
        let fresh = tokio::select! {
            biased;
            fresh = begin(&self.dir, LINE_WAITS) => fresh?,
            () = console::stands_panicked(&self.dir) => return Err(given_up()),
            () = tokio::time::sleep(LINE_WAITS + self.begins) => return Err(silent()),
        };
        *session = Some(fresh.clone());
        Ok(fresh)
    }

    /// A line to a guest that comes up, as soon as its QEMU listens. Takes as long as that takes: set a deadline.
    pub async fn wire(&self) -> Result<Wire> {
        *self.session.lock().await = None;
        connect(&self.dir, Duration::MAX).await
    }

    /// The first session with a guest that boots. Takes as long as that takes: set a deadline.
    pub async fn first(&self, wire: Wire) -> Result<()> {
        let mut session = self.session.lock().await;
        *session = Some(greet(wire).await?);
        Ok(())
    }

    /// The first session with a guest that goes on from a saved execution, since `now`: its clock is right again before it
    /// answers, and with `fork` it is somebody else. Returns what was renewed. Takes as long as that takes: set a deadline.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] for a guest that boots instead of going on, which `qmp` tells: what was saved is not what it was.
    pub async fn renewed(&self, qmp: &mut Qmp, wire: Wire, now: SystemTime, fork: Option<Fork>) -> Result<Vec<String>> {
        tokio::select! {
            // Told long before the agent of one that boots answers.
            biased;
            () = qmp.reset() => {
                Err(Error::new(ErrorKind::Corrupt, "its guest did not go on where it was saved: it reset itself, and booted"))
            }
            renewed = self.answered(wire, now, fork) => renewed,
        }
    }

    async fn answered(&self, wire: Wire, now: SystemTime, fork: Option<Fork>) -> Result<Vec<String>> {
        let mut session = self.session.lock().await;
        let (client, renewed) = Client::connect_renewed(wire.stream, now, fork).await.map_err(translate)?;
        *session = Some(Session { client, port: Arc::new(wire.port) });
        Ok(renewed)
    }

    /// Tells the agent that its machine is about to be saved, which ends the session, and keeps the line connected, so that the guest
    /// need not be told of that when it goes on. What it returns is to be kept until the guest was saved.
    ///
    /// # Errors
    /// Also when the agent is silent for `patience`.
    pub async fn leave(&self, patience: Duration) -> Result<impl Send + use<>> {
        let left = async {
            if let Some(Session { client, port }) = self.session.lock().await.take()
                && let Ok(left) = client.leave().await
            {
                return Ok((left, port));
            }
            let Wire { stream, port } = connect(&self.dir, LINE_WAITS).await?;
            Ok((Client::leave_from(stream).await.map_err(translate)?, Arc::new(port)))
        };
        tokio::select! {
            biased;
            left = left => left,
            () = console::stands_panicked(&self.dir) => Err(given_up()),
            () = tokio::time::sleep(patience) => Err(silent()),
        }
    }

    /// Tells the agent that its machine is not saved after all. It runs: one that is too busy to hear that within `patience` is no
    /// reason to lose it.
    pub async fn thaw(&self, patience: Duration) {
        let told = async { self.client().await?.freeze(false).await.map_err(translate) };
        match tokio::time::timeout(patience, told).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => {
                warn!(dir = %self.dir.display(), %error, "telling a guest that it is not suspended after all")
            }
            Err(_) => {
                warn!(dir = %self.dir.display(), "a guest was not told in time that it is not suspended after all")
            }
        }
    }

    /// Lets go of the session: its machine is off.
    pub fn forget(&self) {
        // Somebody who is making a session just now finds nobody at its other end.
        if let Ok(mut session) = self.session.try_lock() {
            *session = None;
        }
    }
}

fn silent() -> Error {
    Error::new(ErrorKind::Agent, "the guest's agent did not begin a session")
        .hint("look at the console: `vmkit console NAME`; a guest that hangs is ended by `vmkit stop --force NAME`")
}

/// A kernel that gave up before it could say so to QEMU.
fn given_up() -> Error {
    Error::new(ErrorKind::Agent, "the guest's kernel panicked while it booted again")
        .hint("its console says why: `vmkit console NAME`; `vmkit stop --force NAME` ends it")
}

/// A line that QEMU listens on and that is ours; nothing was said on it.
pub(crate) struct Wire {
    stream: UnixStream,
    port: FileLock,
}

async fn begin(dir: &Path, patience: Duration) -> Result<Session> {
    greet(connect(dir, patience).await?).await
}

async fn greet(wire: Wire) -> Result<Session> {
    let client = Client::connect(wire.stream).await.map_err(translate)?;
    Ok(Session { client, port: Arc::new(wire.port) })
}

/// Takes a line that nobody has.
async fn connect(dir: &Path, patience: Duration) -> Result<Wire> {
    let start = Instant::now();
    let mut pause = Duration::from_micros(500);
    loop {
        let mut taken = 0;
        for line in 0..LINES {
            let Some(port) = claim(dir, line)? else {
                taken += 1;
                continue;
            };
            // Not there yet, while QEMU is coming up: the same line is tried again.
            let Ok(stream) = socket::connect(dir, &line_socket(line)).await else { break };
            return Ok(Wire { stream, port });
        }
        if taken == LINES && start.elapsed() > patience {
            return Err(Error::new(
                ErrorKind::Busy,
                format!("{LINES} other processes execute commands in the machine"),
            )
            .hint("wait for one of them, or execute through one process"));
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(Duration::from_millis(if taken == LINES { 50 } else { 2 }));
    }
}

/// A line that no other process has.
fn claim(dir: &Path, line: usize) -> Result<Option<FileLock>> {
    let path = dir.join(format!("agent.{line}.lock"));
    let failed = |error: std::io::Error| match error.kind() {
        // Not to be taken for a program that is not there.
        std::io::ErrorKind::NotFound => Error::new(ErrorKind::NotRunning, "the machine was deleted meanwhile"),
        _ => Error::io(format!("the line {} cannot be taken", path.display()), error),
    };
    let file = File::options().write(true).create(true).truncate(false).open(&path).map_err(failed)?;
    FileLock::try_take(file, FlockOperation::NonBlockingLockExclusive).map_err(failed)
}

/// An error of the agent's client as one of ours.
pub(crate) fn translate(error: AgentError) -> Error {
    let message = error.to_string();
    let (kind, hint) = match error {
        AgentError::NotFound(_) => (ErrorKind::NotFound, "give its path in the guest, or an image that has it"),
        AgentError::NotExecutable(_) => {
            (ErrorKind::PermissionDenied, "make it executable, or give the program that runs it")
        }
        AgentError::NoSuchDirectory(_) => (ErrorKind::InvalidArgument, "make it first, or choose another directory"),
        AgentError::NoSuchUser(_) => (
            ErrorKind::InvalidArgument,
            "use a name of the guest's /etc/passwd and /etc/group, or a number below 4294967295",
        ),
        AgentError::Invalid(_) => (ErrorKind::InvalidArgument, "change what was asked for, and try again"),
        AgentError::Limit(_) => (ErrorKind::ResourceExhausted, "wait until some of them have ended"),
        AgentError::Version { .. } => {
            (ErrorKind::Agent, "make a new machine: the image is brought up to date when it is cloned")
        }
        AgentError::Rebooted => {
            (ErrorKind::Agent, "what ran in it is gone; try again: commands are executed as soon as it is up")
        }
        AgentError::Guest(_) => (ErrorKind::Backend, "look at the guest's console: `vmkit console NAME`"),
        _ => (ErrorKind::Agent, "try again; if it goes on, look at the guest's console: `vmkit console NAME`"),
    };
    Error::new(kind, message).hint(hint)
}

/// Whether it says that the guest has rebooted meanwhile.
pub(crate) fn is_reboot(error: &Error) -> bool {
    error.kind() == ErrorKind::Agent && error.message() == AgentError::Rebooted.to_string()
}

impl GuestOps for Line {
    fn spawn(&self, command: CommandSpec) -> BoxFuture<'_, Result<GuestProcess>> {
        async move {
            let Session { client, port } = self.session().await?;
            let exec = self.place.take(Want::Command, client.exec(request(command)?)).await.map_err(translate)?;
            Ok(GuestProcess {
                pid: exec.pid,
                stdin: exec.stdin.map(|stdin| Box::new(stdin) as _),
                stdout: exec.stdout.map(|stdout| Box::new(stdout) as _),
                stderr: exec.stderr.map(|stderr| Box::new(stderr) as _),
                control: Box::new(Control { exec: exec.control, _port: port }),
            })
        }
        .boxed()
    }

    fn bind(&self, binding: Binding) -> BoxFuture<'_, Result<()>> {
        async move {
            let files = binding.files.into_iter().map(|file| (file.path, file.mode, file.content)).collect();
            let request = Bind { hostname: binding.hostname, env: binding.env, files };
            let client = self.client().await?;
            self.place.take(Want::Question, client.bind(request)).await.map_err(translate)
        }
        .boxed()
    }

    fn ping(&self) -> BoxFuture<'_, Result<()>> {
        async move {
            let client = self.client().await?;
            self.place.take(Want::Question, client.ping()).await.map_err(translate)
        }
        .boxed()
    }
}

fn request(command: CommandSpec) -> Result<ExecRequest> {
    let cwd = match command.cwd.map(PathBuf::into_os_string).map(std::ffi::OsString::into_string).transpose() {
        Ok(cwd) => cwd,
        Err(_) => return Err(Error::new(ErrorKind::InvalidArgument, "the working directory is not valid UTF-8")),
    };
    Ok(ExecRequest {
        id: 0,
        program: command.program,
        args: command.args,
        env: command.env,
        env_clear: command.env_clear,
        cwd,
        user: command.user,
        stdin: command.stdin,
        stdout: command.stdout,
        stderr: command.stderr,
        detached: command.detached,
        whole: command.whole,
    })
}

struct Control {
    exec: ExecControl,
    _port: Arc<FileLock>,
}

impl ProcessControl for Control {
    fn wait(&mut self) -> BoxFuture<'_, Result<ExitStatus>> {
        async move {
            match self.exec.wait().await.map_err(translate)? {
                Exit::Code(code) => Ok(ExitStatus::Code(code)),
                Exit::Signal(signal) => Ok(ExitStatus::Signal(signal)),
            }
        }
        .boxed()
    }

    fn signal(&mut self, signal: i32) -> BoxFuture<'_, Result<()>> {
        async move { self.exec.signal(signal).await.map_err(translate) }.boxed()
    }
}
