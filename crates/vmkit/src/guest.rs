//! The way into a running guest: what a backend provides so that commands can be executed in it.

use std::path::PathBuf;
use std::sync::Arc;

use futures::future::BoxFuture;
use tokio::io::{AsyncRead, AsyncWrite};

use crate::error::{Error, ErrorKind, Result};

/// The most that a binding may be in all, bytes.
const MOST: usize = 4 << 20;
/// The longest argument or variable that Linux passes to a process (`MAX_ARG_STRLEN`), with its name and its end.
const LONGEST: usize = 128 << 10;

/// A running guest. Cheap to clone; valid until the machine leaves Running.
pub type Guest = Arc<dyn GuestOps>;

/// What a running guest can do. Backends implement it, normally over the guest agent.
pub trait GuestOps: Send + Sync + 'static {
    /// Starts a process in the guest.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`](crate::ErrorKind::NotFound) when there is no such program,
    /// [`ErrorKind::PermissionDenied`](crate::ErrorKind::PermissionDenied) when it cannot be executed; no error contains
    /// its arguments.
    ///
    /// # Cancel safety
    /// Dropping the future kills what was started.
    fn spawn(&self, command: CommandSpec) -> BoxFuture<'_, Result<GuestProcess>>;

    /// Returns once the guest has answered this very question.
    fn ping(&self) -> BoxFuture<'_, Result<()>>;

    /// Gives a guest that is up what it was not started with, in one question and one answer.
    ///
    /// # Errors
    /// When a part of it cannot be applied; what came before that part stays. No error contains values or contents.
    fn bind(&self, binding: Binding) -> BoxFuture<'_, Result<()>>;
}

/// What a guest that is up already is given: late, because it was made before anybody knew.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Binding {
    /// Its host name.
    pub hostname: Option<String>,
    /// Added to the environment of every command from now on; a command's own variables come after.
    pub env: Vec<(String, String)>,
    /// Files to be written; together with the rest at most 4 MiB.
    pub files: Vec<GuestFile>,
}

impl Binding {
    /// Whether there is nothing to do.
    pub fn is_empty(&self) -> bool {
        self.hostname.is_none() && self.env.is_empty() && self.files.is_empty()
    }

    /// Whether a guest can be given this, as far as that can be known without one.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`], which says what is wrong, without values and contents.
    pub fn check(&self) -> Result<()> {
        let bad = |message: String, hint: &str| Err(Error::new(ErrorKind::InvalidArgument, message).hint(hint));
        if let Some(name) = &self.hostname {
            let plain = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '.';
            let edges = name.starts_with(['-', '.']) || name.ends_with(['-', '.']);
            if name.is_empty() || name.len() > 64 || edges || !name.chars().all(plain) {
                return bad(format!("{name:?} is no host name"), "use 1 to 64 letters, digits, dots and hyphens");
            }
        }
        check_env(&self.env)?;
        for file in &self.files {
            let name = file.path.rsplit('/').next().unwrap_or_default();
            let place = file.path.starts_with('/') && !file.path.contains('\0') && !["", ".", ".."].contains(&name);
            if !place {
                return bad(
                    format!("{:?} is no place for a file", file.path),
                    "use an absolute path that names a file",
                );
            }
            if file.mode > 0o7777 {
                return bad(
                    format!("{:o} are no permissions of {:?}", file.mode, file.path),
                    "use at most 7777, octal",
                );
            }
        }
        let env: usize = self.env.iter().map(|(key, value)| key.len() + value.len()).sum();
        let files: usize = self.files.iter().map(|file| file.path.len() + file.content.len()).sum();
        if env + files > MOST {
            let hint = "make it part of the image, or pass it to a command's standard input";
            return bad(format!("files and variables are {} bytes in all: more than 4 MiB", env + files), hint);
        }
        Ok(())
    }
}

/// Whether a process can be given these variables. Names may be told, values never: nor what somebody took for part of a name.
fn check_env(env: &[(String, String)]) -> Result<()> {
    let bad = |message: String, hint: &str| Err(Error::new(ErrorKind::InvalidArgument, message).hint(hint));
    for (key, value) in env {
        let name: String = key.chars().take_while(|&c| c != '=').take(64).collect();
        if key.is_empty() || key.contains(['=', '\0']) || value.contains('\0') {
            let hint = "a name is not empty and has no `=`; neither name nor value has a zero byte";
            return bad(format!("the variable {name:?} cannot be set"), hint);
        }
        if key.len() + value.len() + 2 > LONGEST {
            return bad(format!("the variable {name:?} is longer than 128 KiB"), "pass it in a file");
        }
    }
    Ok(())
}

/// A file to be written in a guest: in one step, its directories made when they are missing.
#[derive(Clone, PartialEq, Eq)]
pub struct GuestFile {
    /// Where, absolute.
    pub path: String,
    /// What is in it.
    pub content: Vec<u8>,
    /// Its permissions, such as `0o600`. It belongs to root.
    pub mode: u32,
}

/// Values and contents are left out on purpose: people pass secrets that way.
impl std::fmt::Debug for Binding {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Binding")
            .field("hostname", &self.hostname)
            .field("env", &self.env.len())
            .field("files", &self.files)
            .finish()
    }
}

impl std::fmt::Debug for GuestFile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("GuestFile")
            .field("path", &self.path)
            .field("bytes", &self.content.len())
            .finish_non_exhaustive()
    }
}

/// What to execute in a guest.
#[derive(Clone, Default)]
pub struct CommandSpec {
    /// The program: a path, or a name looked up in the guest's `PATH`.
    pub program: String,
    /// Its arguments, without the program.
    pub args: Vec<String>,
    /// Added to the guest's environment.
    pub env: Vec<(String, String)>,
    /// Start from an empty environment.
    pub env_clear: bool,
    /// The working directory; the agent's own, normally `/`, when absent.
    pub cwd: Option<PathBuf>,
    /// A user's name or number, with an optional group: `app`, `1000:1000`. Root when absent.
    pub user: Option<String>,
    /// Connect standard input; otherwise it reads as empty.
    pub stdin: bool,
    /// Connect standard output; otherwise it is thrown away in the guest.
    pub stdout: bool,
    /// Connect standard error; otherwise it is thrown away in the guest.
    pub stderr: bool,
    /// Let it live on when the connection ends.
    pub detached: bool,
    /// Whoever starts it waits for its end: a backend need not tell of its start before, when the end comes within milliseconds.
    pub whole: bool,
}

impl CommandSpec {
    /// Whether a guest can execute this, as far as that can be known without one.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`], which says what is wrong, without arguments and values.
    pub fn check(&self) -> Result<()> {
        let bad = |message: String, hint: &str| Err(Error::new(ErrorKind::InvalidArgument, message).hint(hint));
        if self.program.contains('\0') {
            return bad("the program's name contains a zero byte".to_owned(), "leave it out");
        }
        for (at, arg) in self.args.iter().enumerate() {
            if arg.contains('\0') {
                return bad(format!("argument {} contains a zero byte", at + 1), "pass it on standard input");
            }
            if arg.len() + 1 > LONGEST {
                let hint = "pass it in a file, or on standard input";
                return bad(format!("argument {} is longer than 128 KiB", at + 1), hint);
            }
        }
        check_env(&self.env)
    }
}

/// Arguments and environment are left out on purpose: people pass secrets that way.
impl std::fmt::Debug for CommandSpec {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CommandSpec")
            .field("program", &self.program)
            .field("args", &self.args.len())
            .finish_non_exhaustive()
    }
}

/// A stream into a guest's process.
pub type GuestWriter = Box<dyn AsyncWrite + Send + Unpin>;
/// A stream from a guest's process.
pub type GuestReader = Box<dyn AsyncRead + Send + Unpin>;

/// A process in a guest. Dropped without having been waited for, it is killed with all its children, unless it was
/// started detached.
pub struct GuestProcess {
    /// Its process id in the guest.
    pub pid: u32,
    /// Its standard input, when connected; shut it down to signal the end.
    pub stdin: Option<GuestWriter>,
    /// Its standard output, when connected. Nothing is lost and nothing is buffered without bound.
    pub stdout: Option<GuestReader>,
    /// Its standard error, when connected.
    pub stderr: Option<GuestReader>,
    /// Its control.
    pub control: Box<dyn ProcessControl>,
}

/// Waiting for and signalling a guest's process.
pub trait ProcessControl: Send + 'static {
    /// How it ended. Does not wait for its streams to be read. Cancel-safe; may be called again.
    fn wait(&mut self) -> BoxFuture<'_, Result<ExitStatus>>;

    /// Sends a signal to its whole process group.
    fn signal(&mut self, signal: i32) -> BoxFuture<'_, Result<()>>;
}

/// How a guest's process ended: by itself with a code, or by a signal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ExitStatus {
    /// It ended by itself.
    Code(i32),
    /// A signal killed it.
    Signal(i32),
}

impl ExitStatus {
    /// Whether it ended by itself with 0.
    pub fn success(self) -> bool {
        self == ExitStatus::Code(0)
    }

    /// The exit code, when it ended by itself.
    pub fn code(self) -> Option<i32> {
        match self {
            ExitStatus::Code(code) => Some(code),
            ExitStatus::Signal(_) => None,
        }
    }

    /// The signal, when one killed it.
    pub fn signal(self) -> Option<i32> {
        match self {
            ExitStatus::Code(_) => None,
            ExitStatus::Signal(signal) => Some(signal),
        }
    }

    /// What a shell would report: the code, or 128 and the signal's number.
    pub fn shell_code(self) -> i32 {
        match self {
            ExitStatus::Code(code) => code,
            ExitStatus::Signal(signal) => 128 + signal,
        }
    }
}

impl std::fmt::Display for ExitStatus {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            ExitStatus::Code(code) => write!(f, "exit code {code}"),
            ExitStatus::Signal(signal) => write!(f, "signal {signal}"),
        }
    }
}
