//! The host's side.

mod exec;
mod readers;

use std::any::Any;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use futures::FutureExt;
use futures::future::BoxFuture;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::sync::{oneshot, watch};
use tokio::task::JoinHandle;
use yamux::Mode;

use exec::{Progress, Reading};
use readers::{Arrivals, Busy, Waiting, follow};

use crate::link::{Handshake, Kind, Link, VERSION};
use crate::mux::{Opener, session};
use crate::protocol::{self, Answer, Failure, Renew, Reply, Request, Which};

pub use crate::protocol::{Bind, ExecRequest, Exit, Fork, Prepare};
pub use exec::{Exec, ExecControl, ExecReader, ExecStdin};

/// How wrong a guest's clock may be when it goes on, nanoseconds: the time that its answer takes looks like it.
const CLOCK: u64 = 20_000_000;

/// The longest request that is made without a session, bytes: what is said to it fits into its answer.
const MAX_SHORT: usize = 8 * 1024;

/// What went wrong between host and agent. Never contains arguments or environment of a command.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AgentError {
    /// The agent is older or newer than this vmkit.
    #[error("the guest's agent speaks protocol version {guest}, and this vmkit speaks {host}")]
    Version {
        /// Ours.
        host: u16,
        /// The agent's.
        guest: u16,
    },
    /// The line ended before the agent answered.
    #[error("the line to the guest's agent closed before it answered")]
    Handshake,
    /// The connection is gone: the machine stopped, or the agent did.
    #[error("the connection to the guest's agent is closed")]
    Closed,
    /// Another agent is there: the guest rebooted, and what ran in it is gone.
    #[error("the guest rebooted meanwhile")]
    Rebooted,
    /// What arrived is not what it should be.
    #[error("the guest's agent sent something unexpected: {0}")]
    Protocol(String),
    /// There is no such program.
    #[error("{0}")]
    NotFound(String),
    /// It cannot be executed.
    #[error("{0}")]
    NotExecutable(String),
    /// There is no such working directory.
    #[error("{0}")]
    NoSuchDirectory(String),
    /// There is no such user or group.
    #[error("{0}")]
    NoSuchUser(String),
    /// Too many commands at once.
    #[error("{0}")]
    Limit(String),
    /// The request makes no sense.
    #[error("{0}")]
    Invalid(String),
    /// The guest could not start it.
    #[error("{0}")]
    Guest(String),
    /// Reading or writing failed.
    #[error("talking to the guest's agent: {0}")]
    Io(#[from] io::Error),
}

/// A session with an agent. Cheap to clone; when the last clone and the last of its commands are dropped, the session ends,
/// and with it what was not started detached.
#[derive(Clone)]
pub struct Client(Arc<Inner>);

struct Inner {
    opener: Opener,
    next_id: AtomicU64,
    waiting: Waiting,
    /// Ends the session at once, also while streams are still held.
    driver: JoinHandle<()>,
    bye: Mutex<Option<Farewell>>,
    /// Whether the session ended because another agent began.
    rebooted: Box<dyn Fn() -> bool + Send + Sync>,
}

/// Ends the session on both sides, and returns the line.
type Farewell = Box<dyn FnOnce() -> BoxFuture<'static, io::Result<Left>> + Send>;

/// A line without a session, which stays connected until this is dropped.
pub struct Left(#[expect(dead_code, reason = "it is what keeps the line")] Box<dyn Any + Send + Sync>);

impl std::fmt::Debug for Left {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Left")
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.driver.abort();
    }
}

impl Client {
    /// Begins a session on a line. Returns when the agent has answered, however long that takes: set a deadline.
    ///
    /// # Errors
    /// [`AgentError::Version`] when the agent speaks another version, [`AgentError::Handshake`] when the line ends.
    ///
    /// # Cancel safety
    /// Dropping the future closes the line.
    pub async fn connect<S>(line: S) -> Result<Client, AgentError>
    where
        S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let link = Link::new(line);
        greet(&link, Kind::Hello, Vec::new()).await?;
        Ok(Client::begin(link))
    }

    /// The same with a guest that goes on from a saved execution, since `now`: its clock is set to this host's, and its kernel has
    /// fresh random numbers, before it answers; with `fork`, it is somebody else from then on. Also returns what was renewed.
    ///
    /// # Errors
    /// Also says which of it could not be done.
    ///
    /// # Cancel safety
    /// As [`connect`](Client::connect).
    pub async fn connect_renewed<S>(
        line: S,
        now: SystemTime,
        fork: Option<Fork>,
    ) -> Result<(Client, Vec<String>), AgentError>
    where
        S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let mut seed = [0; 32];
        for part in seed.chunks_mut(16) {
            part.copy_from_slice(&nonce());
        }
        let link = Link::new(line);
        let answer = greet(&link, Kind::Hello, protocol::payload(&Renew { now: nanos(now), seed, fork })).await?;
        let answered = nanos(SystemTime::now());
        match protocol::decode(&answer).map_err(|error| AgentError::Protocol(error.to_string()))? {
            Reply::Renewed(renewed) => {
                let client = Client::begin(link);
                if answered.abs_diff(renewed.clock) > CLOCK {
                    // A loaded host: more time than the guest knows of went by before it was saved. It answers soon by now.
                    client.done(&Request::Clock(nanos(SystemTime::now()))).await?;
                }
                Ok((client, renewed.what))
            }
            Reply::Failed(failure, message) => Err(failed(failure, message)),
            other => Err(AgentError::Protocol(format!("{other:?} to a renewal"))),
        }
    }

    fn begin<S>(link: Link<S>) -> Client
    where
        S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let waiting = Waiting::default();
        let arrivals = Arrivals(waiting.clone());
        let (drive, opener) = session(link.clone(), Mode::Client, |_| move |stream| arrivals.hand_over(stream));
        let driver = tokio::spawn(drive);
        let same = link.clone();
        // Every answer to a greeting was read before this session: whoever begins now is another.
        let rebooted = Box::new(move || same.began_anew());
        let bye: Farewell = Box::new(|| {
            async move {
                match shake(&link, Kind::Bye, Vec::new(), false).await? {
                    Some(_) => Ok(Left(Box::new(link))),
                    None => Err(io::ErrorKind::UnexpectedEof.into()),
                }
            }
            .boxed()
        });
        let (next_id, bye) = (AtomicU64::new(1), Mutex::new(Some(bye)));
        Client(Arc::new(Inner { opener, next_id, waiting, driver, bye, rebooted }))
    }

    /// Tells the agent that the machine is about to be saved: what runs survives the loss of its session, what it prints then is
    /// thrown away, and this session ends. The line stays connected. Called off by [`freeze`](Client::freeze), in
    /// another session.
    ///
    /// # Errors
    /// [`AgentError::Closed`] when the session has ended otherwise.
    pub async fn leave(&self) -> Result<Left, AgentError> {
        let Some(bye) = lock(&self.0.bye).take() else { return Err(AgentError::Closed) };
        self.0.opener.settle().await;
        tokio::task::yield_now().await;
        self.0.driver.abort();
        // Until it has stopped, it may still write.
        self.closed().await;
        Ok(bye().await?)
    }

    /// [`leave`](Client::leave), on a line on which there is no session.
    ///
    /// # Errors
    /// As [`connect`](Client::connect).
    pub async fn leave_from<S>(line: S) -> Result<Left, AgentError>
    where
        S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let link = Link::new(line);
        greet(&link, Kind::Bye, Vec::new()).await?;
        Ok(Left(Box::new(link)))
    }

    /// Returns once the agent has answered this very call.
    ///
    /// # Errors
    /// [`AgentError::Closed`] when the connection is gone.
    pub async fn ping(&self) -> Result<(), AgentError> {
        let number = self.0.next_id.fetch_add(1, Ordering::Relaxed);
        match self.ask(&Request::Ping(number)).await? {
            Reply::Pong(same) if same == number => Ok(()),
            other => Err(AgentError::Protocol(format!("{other:?} to a ping"))),
        }
    }

    /// Asks the guest to shut down. Returns when it has begun to.
    ///
    /// # Errors
    /// [`AgentError::Closed`] when the connection is gone.
    pub async fn shutdown(&self) -> Result<(), AgentError> {
        self.done(&Request::Shutdown).await
    }

    /// Gets the guest ready to be saved as what others go on from: its disks are up to date, and what each of them has to do first
    /// takes little time.
    ///
    /// # Errors
    /// [`AgentError::Closed`] when the connection is gone.
    pub async fn prepare(&self, guest: Prepare) -> Result<(), AgentError> {
        self.done(&Request::Prepare(guest)).await
    }

    /// Tells the agent that the machine is about to be suspended, or that this was called off: commands that run survive the
    /// loss of their sessions, and what they print then is thrown away.
    ///
    /// # Errors
    /// [`AgentError::Closed`] when the connection is gone.
    pub async fn freeze(&self, on: bool) -> Result<(), AgentError> {
        self.done(&Request::Freeze(on)).await
    }

    /// Gives the guest what it was not started with, in one question and one answer.
    ///
    /// # Errors
    /// Says which part could not be applied, without values and contents.
    pub async fn bind(&self, binding: Bind) -> Result<(), AgentError> {
        match self.ask(&Request::Bind(binding)).await? {
            Reply::Done => Ok(()),
            Reply::Failed(failure, message) => Err(failed(failure, message)),
            other => Err(AgentError::Protocol(format!("{other:?} to a request"))),
        }
    }

    /// Returns when the connection is gone.
    pub async fn closed(&self) {
        self.0.opener.closed().await;
    }

    /// Whether the connection is gone.
    pub fn is_closed(&self) -> bool {
        self.0.opener.is_closed()
    }

    /// Why the connection is gone, where that was all that was known.
    fn explain(&self, error: AgentError) -> AgentError {
        match error {
            AgentError::Closed if (self.0.rebooted)() => AgentError::Rebooted,
            other => other,
        }
    }

    /// Starts a command. The request's `id` is chosen here.
    ///
    /// # Errors
    /// Says which of program, permission, directory or user was wrong, without arguments.
    ///
    /// # Cancel safety
    /// Dropping the future kills what was started.
    pub async fn exec(&self, request: ExecRequest) -> Result<Exec, AgentError> {
        self.begin_exec(request).await.map_err(|error| self.explain(error))
    }

    async fn begin_exec(&self, mut request: ExecRequest) -> Result<Exec, AgentError> {
        let id = self.0.next_id.fetch_add(1, Ordering::Relaxed);
        request.id = id;
        let (stdin, detached) = (request.stdin, request.detached);
        let outputs = [(Which::Stdout, request.stdout), (Which::Stderr, request.stderr)];
        // Before the request: the agent may open a stream before it answers.
        let [stdout, stderr] = outputs.map(|(which, wanted)| wanted.then(|| self.expect(id, which)));
        // From here on: what has arrived is handed over also when the line ends right after it.
        let busy = Busy::new(&self.0.waiting);
        let request = Request::Exec(request);
        if let Some(answer) = self.before(&request).await? {
            return self.begun(id, answer, busy, stdout, stderr).await;
        }
        let stream = self.0.opener.open().await.ok_or(AgentError::Closed)?;
        let (mut from, mut to) = tokio::io::split(stream);
        send(&mut to, &request).await?;
        let pid = match receive(&mut from).await? {
            Reply::Started(pid) => pid,
            Reply::Failed(failure, message) => return Err(failed(failure, message)),
            other => return Err(AgentError::Protocol(format!("{other:?} to a command"))),
        };
        let (ended, exit) = watch::channel(Progress::Running);
        let reader = Some(tokio::spawn(follow(from, id, busy, ended)));
        let control = ExecControl { to: Some(to), exit, reader, detached, session: self.clone() };
        let stdin = match stdin {
            true => {
                let mut stream = self.0.opener.open().await.ok_or(AgentError::Closed)?;
                stream.write_all(&protocol::encode(&Request::Stdin(id))?).await.map_err(|_| AgentError::Closed)?;
                Some(ExecStdin(stream))
            }
            false => None,
        };
        Ok(Exec { pid, stdin, stdout, stderr, control })
    }

    /// Asks without a session; nothing when that cannot be done or is not possible any more.
    async fn before(&self, request: &Request) -> Result<Option<Answer>, AgentError> {
        let payload = if request.is_short() { protocol::payload(request) } else { Vec::new() };
        if payload.is_empty() || payload.len() > MAX_SHORT {
            return Ok(None);
        }
        self.0.opener.ask(payload).await.ok_or(AgentError::Closed)
    }

    /// A command that was begun without a session, as far as that went.
    async fn begun(
        &self,
        id: u64,
        answer: Answer,
        busy: Busy,
        stdout: Option<ExecReader>,
        stderr: Option<ExecReader>,
    ) -> Result<Exec, AgentError> {
        let mut replies = answer.replies.into_iter();
        let pid = match replies.next() {
            Some(Reply::Started(pid)) => pid,
            Some(Reply::Failed(failure, message)) => return Err(failed(failure, message)),
            other => return Err(AgentError::Protocol(format!("{other:?} to a command"))),
        };
        let (ended, exit) = watch::channel(Progress::Running);
        let (to, reader) = if answer.goes_on {
            // Adopted also for who is not there any more: what the stream's end is to end.
            let session = self.clone();
            let adopted = tokio::spawn(async move {
                let mut stream = session.0.opener.open().await?;
                send(&mut stream, &Request::Adopt(id)).await.ok()?;
                Some(stream)
            });
            let stream = adopted.await.ok().flatten().ok_or(AgentError::Closed)?;
            let (from, to) = tokio::io::split(stream);
            (Some(to), Some(tokio::spawn(follow(from, id, busy, ended))))
        } else {
            for reply in replies {
                busy.take(id, reply, &ended);
            }
            (None, None)
        };
        let control = ExecControl { to, exit, reader, detached: false, session: self.clone() };
        Ok(Exec { pid, stdin: None, stdout, stderr, control })
    }

    fn expect(&self, id: u64, which: Which) -> ExecReader {
        let (arrives, stream) = oneshot::channel();
        lock(&self.0.waiting).all.insert((id, which), arrives);
        let key = (id, which);
        ExecReader { state: Reading::Waiting(stream), session: self.clone(), key }
    }

    async fn done(&self, request: &Request) -> Result<(), AgentError> {
        match self.ask(request).await? {
            Reply::Done => Ok(()),
            Reply::Failed(failure, message) => Err(failed(failure, message)),
            other => Err(AgentError::Protocol(format!("{other:?} to a request"))),
        }
    }

    async fn ask(&self, request: &Request) -> Result<Reply, AgentError> {
        let answer = async {
            if let Some(answer) = self.before(request).await? {
                let mut replies = answer.replies.into_iter();
                return replies.next().ok_or_else(|| AgentError::Protocol("an answer that says nothing".into()));
            }
            let mut stream = self.0.opener.open().await.ok_or(AgentError::Closed)?;
            send(&mut stream, request).await?;
            receive(&mut stream).await
        };
        answer.await.map_err(|error| self.explain(error))
    }
}

impl std::fmt::Debug for Client {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Client").field("closed", &self.is_closed()).finish()
    }
}

/// Sends a handshake and waits for its answer; `None` when the line ends first, or, unless it is the `first`, the guest rebooted.
async fn shake<S>(link: &Link<S>, kind: Kind, payload: Vec<u8>, first: bool) -> io::Result<Option<Handshake>>
where
    S: AsyncRead + AsyncWrite + Send + Unpin,
{
    loop {
        let hello = Handshake { kind, version: VERSION, nonce: nonce(), payload: payload.clone() };
        link.send_handshake(&hello).await?;
        loop {
            match link.next_handshake().await? {
                // An answer to an earlier host may still be on the line, or to what we said before.
                Some(answer) if answer.kind == Kind::Ack && answer.nonce != hello.nonce => {}
                Some(answer) if answer.kind == Kind::Ack => return Ok(Some(answer)),
                // What we said may have been said to the one before it.
                Some(answer) if answer.kind == Kind::Up && first => break,
                // There is no session any more that could end.
                Some(answer) if answer.kind == Kind::Up => return Ok(None),
                Some(_) => {}
                None => return Ok(None),
            }
        }
    }
}

/// Begins with an agent of our version, and returns what it answers to `payload`.
async fn greet<S>(link: &Link<S>, kind: Kind, payload: Vec<u8>) -> Result<Vec<u8>, AgentError>
where
    S: AsyncRead + AsyncWrite + Send + Unpin,
{
    match shake(link, kind, payload, true).await? {
        Some(answer) if answer.version == VERSION => Ok(answer.payload),
        Some(answer) => Err(AgentError::Version { host: VERSION, guest: answer.version }),
        None => Err(AgentError::Handshake),
    }
}

async fn send(to: &mut (impl AsyncWrite + Unpin), message: &impl serde::Serialize) -> Result<(), AgentError> {
    let bytes = protocol::encode(message).map_err(|error| AgentError::Invalid(error.to_string()))?;
    to.write_all(&bytes).await.map_err(|_| AgentError::Closed)?;
    to.flush().await.map_err(|_| AgentError::Closed)
}

async fn receive(from: &mut (impl AsyncRead + Unpin)) -> Result<Reply, AgentError> {
    match protocol::read(from).await {
        Ok(Some(reply)) => Ok(reply),
        Ok(None) => Err(AgentError::Closed),
        Err(error) if error.kind() == io::ErrorKind::InvalidData => Err(AgentError::Protocol(error.to_string())),
        Err(_) => Err(AgentError::Closed),
    }
}

fn failed(failure: Failure, message: String) -> AgentError {
    match failure {
        Failure::NotFound => AgentError::NotFound(message),
        Failure::NotExecutable => AgentError::NotExecutable(message),
        Failure::NoDirectory => AgentError::NoSuchDirectory(message),
        Failure::NoUser => AgentError::NoSuchUser(message),
        Failure::Limit => AgentError::Limit(message),
        Failure::Invalid => AgentError::Invalid(message),
        Failure::Other => AgentError::Guest(message),
    }
}

/// Since 1970.
fn nanos(time: SystemTime) -> u64 {
    let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

/// Random bytes.
pub fn nonce() -> [u8; 16] {
    let mut nonce = [0; 16];
    let mut filled = 0;
    while filled < nonce.len() {
        match rustix::rand::getrandom(&mut nonce[filled..], rustix::rand::GetRandomFlags::empty()) {
            Ok(n) => filled += n,
            Err(rustix::io::Errno::INTR) => {}
            // Without random numbers, the process and the time still tell this session from an older one's.
            Err(_) => {
                let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
                nonce[..8].copy_from_slice(&(now.as_nanos() as u64).to_le_bytes());
                nonce[8..12].copy_from_slice(&std::process::id().to_le_bytes());
                break;
            }
        }
    }
    nonce
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
