//! The one public error.

use std::error::Error as StdError;
use std::fmt;

use crate::state::{Action, State};

/// What went wrong, for callers that decide by it. Codes are stable: scripts match on them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// No such machine, image or thing.
    NotFound,
    /// A command was to be executed and the machine is not Running, or left Running meanwhile.
    NotRunning,
    /// The request is illegal in the machine's state; nothing was called.
    IllegalRequest,
    /// An argument is out of range; nothing was called.
    InvalidArgument,
    /// The name is taken, by us or by somebody else; what is there was not touched.
    AlreadyExists,
    /// The deadline passed.
    TimedOut,
    /// The caller, or a forced stop, ended it.
    Cancelled,
    /// The machine's process ended by itself.
    Exited,
    /// The state seen is not one of those that were to be tolerated.
    UnexpectedState,
    /// This backend or machine cannot do that.
    Unsupported,
    /// The guest's agent speaks another protocol version, or not at all.
    Agent,
    /// The hypervisor reported a failure.
    Backend,
    /// A backend said one thing and inspection found another.
    Inconsistent,
    /// A backend panicked.
    Panicked,
    /// Somebody else holds what is needed.
    Busy,
    /// Files that belong to a machine or an image are damaged.
    Corrupt,
    /// A program or a package that is needed is not installed.
    MissingDependency,
    /// No space, memory or other resource left.
    ResourceExhausted,
    /// A queue has no place left; nobody was put into it.
    Exhausted,
    /// The pool is closed, or closing.
    Closed,
    /// The operating system refused access.
    PermissionDenied,
    /// Reading or writing failed.
    Io,
}

impl ErrorKind {
    /// The stable code, as `--json` prints it.
    pub const fn code(self) -> &'static str {
        match self {
            ErrorKind::NotFound => "not-found",
            ErrorKind::NotRunning => "not-running",
            ErrorKind::IllegalRequest => "illegal-request",
            ErrorKind::InvalidArgument => "invalid-argument",
            ErrorKind::AlreadyExists => "already-exists",
            ErrorKind::TimedOut => "timed-out",
            ErrorKind::Cancelled => "cancelled",
            ErrorKind::Exited => "exited",
            ErrorKind::UnexpectedState => "unexpected-state",
            ErrorKind::Unsupported => "unsupported",
            ErrorKind::Agent => "agent",
            ErrorKind::Backend => "backend",
            ErrorKind::Inconsistent => "inconsistent",
            ErrorKind::Panicked => "panicked",
            ErrorKind::Busy => "busy",
            ErrorKind::Corrupt => "corrupt",
            ErrorKind::MissingDependency => "missing-dependency",
            ErrorKind::ResourceExhausted => "resource-exhausted",
            ErrorKind::Exhausted => "exhausted",
            ErrorKind::Closed => "closed",
            ErrorKind::PermissionDenied => "permission-denied",
            ErrorKind::Io => "io",
        }
    }

    /// Whether the same call may succeed later with nothing changed by the caller.
    pub const fn is_retryable(self) -> bool {
        matches!(
            self,
            ErrorKind::TimedOut
                | ErrorKind::Cancelled
                | ErrorKind::Exited
                | ErrorKind::Agent
                | ErrorKind::Backend
                | ErrorKind::Busy
                | ErrorKind::ResourceExhausted
                | ErrorKind::Exhausted
        )
    }
}

/// `Result` with vmkit's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong, to which machine, in which operation and state, and what to do next.
///
/// `Display` is one line without its sources (walk [`source`](StdError::source) for them). Arguments and environment of
/// commands are never part of an error: people pass secrets that way.
pub struct Error(Box<Inner>);

struct Inner {
    kind: ErrorKind,
    message: String,
    operation: Option<&'static str>,
    instance: Option<String>,
    state: Option<State>,
    hint: Option<String>,
    details: Option<String>,
    source: Option<Box<dyn StdError + Send + Sync>>,
}

impl Error {
    /// An error of a kind; `message` is a lowercase fragment that says what happened and why.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Error {
        Error(Box::new(Inner {
            kind,
            message: message.into(),
            operation: None,
            instance: None,
            state: None,
            hint: None,
            details: None,
            source: None,
        }))
    }

    /// A request that the table refuses.
    pub fn illegal(instance: &str, state: State, action: Action) -> Error {
        let legal: Vec<&str> = state.valid_actions().map(Action::name).collect();
        let legal = if legal.is_empty() { "nothing".to_owned() } else { legal.join(", ") };
        Error::new(ErrorKind::IllegalRequest, format!("{action} is not allowed while {state}"))
            .on(instance)
            .during(action.name())
            .while_in(state)
            .hint(format!("allowed now: {legal}"))
    }

    /// An I/O error, by what was being done; full disks and refused access get kinds of their own.
    pub fn io(doing: impl Into<String>, source: std::io::Error) -> Error {
        use std::io::ErrorKind as Io;
        let (kind, hint) = match source.kind() {
            Io::NotFound => (ErrorKind::NotFound, None),
            Io::PermissionDenied | Io::ReadOnlyFilesystem => (
                ErrorKind::PermissionDenied,
                Some("choose a directory you can write to, with --state-dir or VMKIT_STATE_DIR"),
            ),
            Io::StorageFull | Io::QuotaExceeded | Io::FileTooLarge => (
                ErrorKind::ResourceExhausted,
                Some("free some space, or use another disk with --state-dir or VMKIT_STATE_DIR"),
            ),
            _ => (ErrorKind::Io, None),
        };
        let error = Error::new(kind, doing).caused_by(source);
        match hint {
            Some(hint) => error.hint(hint),
            None => error,
        }
    }

    /// What reading a command's output has failed with: when the line broke, not all of it has arrived.
    pub fn output_lost(source: std::io::Error) -> Error {
        match source.kind() {
            std::io::ErrorKind::ConnectionAborted => {
                let lost = "the line to the guest's agent broke before all of the command's output had arrived";
                Error::new(ErrorKind::Agent, lost).hint("what has arrived may not be all of it: run the command again")
            }
            _ => Error::io("reading a command's output", source),
        }
    }

    /// Names the machine.
    #[must_use]
    pub fn on(mut self, instance: &str) -> Error {
        self.0.instance.get_or_insert_with(|| instance.to_owned());
        self
    }

    /// Names the operation; the innermost name stays.
    #[must_use]
    pub fn during(mut self, operation: &'static str) -> Error {
        self.0.operation.get_or_insert(operation);
        self
    }

    /// Says which state the machine was in.
    #[must_use]
    pub fn while_in(mut self, state: State) -> Error {
        self.0.state.get_or_insert(state);
        self
    }

    /// Says what to do next.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Error {
        self.0.hint = Some(hint.into());
        self
    }

    /// Adds output that explains it: the end of a log, a program's standard error. May be many lines.
    #[must_use]
    pub fn with_details(mut self, details: impl Into<String>) -> Error {
        let details = details.into();
        if !details.trim().is_empty() {
            self.0.details = Some(details);
        }
        self
    }

    /// Keeps the cause.
    #[must_use]
    pub fn caused_by(mut self, source: impl Into<Box<dyn StdError + Send + Sync>>) -> Error {
        self.0.source = Some(source.into());
        self
    }

    /// What went wrong.
    pub fn kind(&self) -> ErrorKind {
        self.0.kind
    }

    /// The machine it happened to, when there is one.
    pub fn instance(&self) -> Option<&str> {
        self.0.instance.as_deref()
    }

    /// The operation under way, when there was one.
    pub fn operation(&self) -> Option<&'static str> {
        self.0.operation
    }

    /// The state the machine was in, when it matters.
    pub fn state(&self) -> Option<State> {
        self.0.state
    }

    /// What to do next, when there is something to say.
    pub fn next_step(&self) -> Option<&str> {
        self.0.hint.as_deref()
    }

    /// Output that explains it; may be many lines.
    pub fn details(&self) -> Option<&str> {
        self.0.details.as_deref()
    }

    /// Just what happened, without operation and machine.
    pub fn message(&self) -> &str {
        &self.0.message
    }

    /// Whether the same call may succeed later.
    pub fn is_retryable(&self) -> bool {
        self.0.kind.is_retryable()
    }

    /// A copy for a second listener. Its source becomes text: foreign errors cannot be cloned.
    #[must_use]
    pub fn duplicate(&self) -> Error {
        Error(Box::new(Inner {
            kind: self.0.kind,
            message: self.0.message.clone(),
            operation: self.0.operation,
            instance: self.0.instance.clone(),
            state: self.0.state,
            hint: self.0.hint.clone(),
            details: self.0.details.clone(),
            source: self.0.source.as_ref().map(|source| chain(source.as_ref()).into()),
        }))
    }
}

/// An error and its sources in one line.
fn chain(error: &dyn StdError) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(source) = next {
        text.push_str(": ");
        text.push_str(&source.to_string());
        next = source.source();
    }
    text
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(operation) = self.0.operation {
            write!(f, "{}", operation.to_ascii_lowercase())?;
            if let Some(instance) = &self.0.instance {
                write!(f, " {instance}")?;
            }
            f.write_str(": ")?;
        } else if let Some(instance) = &self.0.instance {
            write!(f, "{instance}: ")?;
        }
        f.write_str(&self.0.message)
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} [{}]", chain(self), self.0.kind.code())?;
        if let Some(hint) = &self.0.hint {
            write!(f, "; next: {hint}")?;
        }
        if let Some(details) = &self.0.details {
            write!(f, "\n{details}")?;
        }
        Ok(())
    }
}

impl StdError for Error {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.0.source.as_deref().map(|source| source as &(dyn StdError + 'static))
    }
}
