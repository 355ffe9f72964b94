//! What host and agent say to each other, once a session is up.
//!
//! A message is its length (4 bytes, little endian) and its postcard encoding. The host opens a stream for each request;
//! commands keep theirs as their control stream. Standard input is a stream of the host's, standard output and error are
//! streams of the agent's, opened when there is something to say; each begins with a [`Header`].

use std::io;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncRead, AsyncReadExt};

/// The longest message: arguments and environment of a command fit, a runaway length does not.
pub const MAX_MESSAGE: usize = 4 << 20;

/// The first message of a stream that the host opens. Those that need no stream for long are also made without one, while there is
/// no session yet: see [`Request::is_short`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Request {
    /// Execute; the stream becomes the command's control stream.
    Exec(ExecRequest),
    /// The stream carries the standard input of a command.
    Stdin(u64),
    /// Answer with the same number.
    Ping(u64),
    /// Shut the machine down.
    Shutdown,
    /// Others will go on from what is saved next: get ready for that what takes time, and write to the disks what was not written
    /// yet.
    Prepare(Prepare),
    /// Set the clock to this, nanoseconds since 1970.
    Clock(u64),
    /// The machine is about to be suspended (or that was called off): what runs is to survive the loss of its session.
    Freeze(bool),
    /// A machine that was made ahead of time gets what it is to be.
    Bind(Bind),
    /// The stream becomes the control stream of a command that was begun before there was a session.
    Adopt(u64),
}

impl Request {
    /// Whether it may be made before a session has begun: a guest that goes on from a saved execution does everything for the first
    /// time again, and a session is much to do for one answer.
    pub fn is_short(&self) -> bool {
        match self {
            Request::Exec(command) => command.whole && !command.stdin && !command.detached,
            Request::Ping(_) | Request::Clock(_) | Request::Freeze(_) | Request::Bind(_) => true,
            Request::Stdin(_) | Request::Shutdown | Request::Prepare(_) | Request::Adopt(_) => false,
        }
    }
}

/// What there is to say to a request that was made without a session.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answer {
    /// What its stream would have carried.
    pub replies: Vec<Reply>,
    /// That was not all: a session is to adopt it.
    pub goes_on: bool,
}

/// What a guest is like that others will go on from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Prepare {
    /// Nobody waits for it and nothing runs in it: what it would do in its first second can be waited for, so that none of those
    /// who go on from it have to do it.
    pub rests: bool,
}

/// What a guest that goes on from a saved execution cannot know. Said with the first handshake, and answered with its answer: a
/// guest that goes on does everything for the first time again, and a session is much to do.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Renew {
    /// The host's time when the guest went on, nanoseconds since 1970.
    pub now: u64,
    /// Random bytes, for the kernel's pool: a saved one may have been used before.
    pub seed: [u8; 32],
    /// Who the guest is from now on, when the saved execution is another's.
    pub fork: Option<Fork>,
}

/// What makes a guest somebody else than the one whose saved execution it goes on from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fork {
    /// Its host name.
    pub hostname: String,
    /// Its machine id.
    pub machine_id: [u8; 16],
    /// Its name of this boot: the kernel's may have been read before the execution was saved, and from then on a kernel keeps it.
    pub boot_id: [u8; 16],
}

/// A seed is a secret.
impl std::fmt::Debug for Renew {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Renew").field("now", &self.now).field("fork", &self.fork).finish_non_exhaustive()
    }
}

/// What a guest that is up already is given.
#[derive(Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bind {
    /// Its host name.
    pub hostname: Option<String>,
    /// Added to the environment of every command from now on.
    pub env: Vec<(String, String)>,
    /// Path, mode and content of files.
    pub files: Vec<(String, u32, Vec<u8>)>,
}

/// Values and contents are left out on purpose: people pass secrets that way.
impl std::fmt::Debug for Bind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Bind").field("hostname", &self.hostname).finish_non_exhaustive()
    }
}

/// What to execute.
#[derive(Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExecRequest {
    /// Chosen by the host, unique in its session.
    pub id: u64,
    /// A path, or a name to be found in `PATH`.
    pub program: String,
    /// Without the program.
    pub args: Vec<String>,
    /// Added to the agent's environment.
    pub env: Vec<(String, String)>,
    /// Start from an empty environment.
    pub env_clear: bool,
    /// The working directory; `/` when absent.
    pub cwd: Option<String>,
    /// `name`, `uid`, `name:group`, `uid:gid`; root when absent.
    pub user: Option<String>,
    /// Connect standard input.
    pub stdin: bool,
    /// Connect standard output.
    pub stdout: bool,
    /// Connect standard error.
    pub stderr: bool,
    /// Outlive the session.
    pub detached: bool,
    /// Its start need not be told before its end, when that comes within milliseconds.
    pub whole: bool,
}

/// Arguments and environment are left out on purpose: people pass secrets that way.
impl std::fmt::Debug for ExecRequest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ExecRequest").field("id", &self.id).field("program", &self.program).finish_non_exhaustive()
    }
}

/// What the host says on a command's control stream. Its end kills what runs, unless it was started detached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Control {
    /// Send a signal to its process group.
    Signal(i32),
}

/// What the agent answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Reply {
    /// The command runs; its process id.
    Started(u32),
    /// The command could not be started.
    Failed(Failure, String),
    /// The command ended.
    Exited(Exit),
    /// All that this output ever said; no stream will be opened for it.
    Said(Which, #[serde(with = "serde_bytes")] Vec<u8>),
    /// To a ping.
    Pong(u64),
    /// Done.
    Done,
    /// The guest is who it was told to be.
    Renewed(Renewed),
}

/// What was done for a guest that goes on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Renewed {
    /// Each thing that was renewed, by name.
    pub what: Vec<String>,
    /// The guest's clock when it said so, nanoseconds since 1970.
    pub clock: u64,
}

/// Why a command could not be started.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Failure {
    /// There is no such program.
    NotFound,
    /// It cannot be executed.
    NotExecutable,
    /// There is no such working directory.
    NoDirectory,
    /// There is no such user or group.
    NoUser,
    /// Too many commands at once.
    Limit,
    /// The request makes no sense.
    Invalid,
    /// Anything else.
    Other,
}

/// How a command ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Exit {
    /// By itself.
    Code(i32),
    /// By a signal.
    Signal(i32),
}

/// One of a command's outputs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Which {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
}

/// The first message of a stream that the agent opens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Header {
    /// The command.
    pub id: u64,
    /// Which of its outputs follows.
    pub which: Which,
}

/// A message as it is sent.
///
/// # Errors
/// `InvalidInput` when it is longer than [`MAX_MESSAGE`].
pub fn encode(message: &impl Serialize) -> io::Result<Vec<u8>> {
    let mut bytes =
        postcard::to_extend(message, vec![0; 4]).map_err(|e| io::Error::new(io::ErrorKind::InvalidInput, e))?;
    let length = bytes.len() - 4;
    if length > MAX_MESSAGE {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, format!("a message of {length} bytes is too long")));
    }
    bytes[..4].copy_from_slice(&(length as u32).to_le_bytes());
    Ok(bytes)
}

/// A message without its length, as a handshake carries it; nothing for one that is too long.
pub fn payload(message: &impl Serialize) -> Vec<u8> {
    postcard::to_stdvec(message).ok().filter(|bytes| bytes.len() <= crate::link::MAX_PAYLOAD).unwrap_or_default()
}

/// A message from its bytes, without the length.
///
/// # Errors
/// `InvalidData` when it is not one.
pub fn decode<T: DeserializeOwned>(bytes: &[u8]) -> io::Result<T> {
    match postcard::take_from_bytes(bytes) {
        Ok((message, [])) => Ok(message),
        Ok((_, rest)) => {
            Err(io::Error::new(io::ErrorKind::InvalidData, format!("{} bytes too many in a message", rest.len())))
        }
        Err(error) => Err(io::Error::new(io::ErrorKind::InvalidData, error)),
    }
}

/// Reads a message; `None` at the end of the stream.
///
/// # Errors
/// `InvalidData` for what is no message, `UnexpectedEof` for half of one.
pub async fn read<T: DeserializeOwned>(from: &mut (impl AsyncRead + Unpin)) -> io::Result<Option<T>> {
    let mut length = [0; 4];
    if from.read(&mut length[..1]).await? == 0 {
        return Ok(None);
    }
    from.read_exact(&mut length[1..]).await?;
    let length = u32::from_le_bytes(length) as usize;
    if length > MAX_MESSAGE {
        return Err(io::Error::new(io::ErrorKind::InvalidData, format!("a message of {length} bytes is too long")));
    }
    // Grows as bytes arrive: a length that lies costs nothing.
    let mut bytes = Vec::with_capacity(length.min(64 << 10));
    if from.take(length as u64).read_to_end(&mut bytes).await? < length {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    decode(&bytes).map(Some)
}
