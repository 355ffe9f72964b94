//! What ends a run early.

use vmkit::{Error as VmkitError, ErrorKind};

use crate::floor;

/// What ends a run early.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Somebody asked to end.
    #[error("interrupted")]
    Interrupted,
    /// Bare QEMU failed.
    #[error(transparent)]
    Floor(floor::Error),
    /// vmkit failed.
    #[error(transparent)]
    Vmkit(#[from] VmkitError),
    /// The command failed.
    #[error("`vmkit {command}` ended with {status}")]
    Command {
        /// Its arguments.
        command: String,
        /// How it ended.
        status: std::process::ExitStatus,
        /// What it wrote to standard error.
        said: String,
    },
    /// The command deleted not everything.
    #[error("`vmkit run` ended and left {0}")]
    Left(String),
}

/// `Result` with the bench's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

impl From<floor::Error> for Error {
    fn from(error: floor::Error) -> Error {
        match error {
            floor::Error::Interrupted => Error::Interrupted,
            error => Error::Floor(error),
        }
    }
}

impl Error {
    /// As an error of the library, which says what to do next. Not a `From`: a second one would keep every `?` on the library's
    /// errors from being inferred.
    pub fn into_vmkit(self) -> VmkitError {
        let message = self.to_string();
        match self {
            Error::Vmkit(error) => error,
            Error::Interrupted => VmkitError::new(ErrorKind::Cancelled, message).hint("start it again"),
            Error::Floor(error) => floor_error(error),
            Error::Command { command, said, .. } => VmkitError::new(ErrorKind::Backend, message)
                .with_details(said)
                .hint(format!("see whether `vmkit {command}` works by itself")),
            Error::Left(_) => {
                VmkitError::new(ErrorKind::Inconsistent, message).hint("the next `vmkit bench` removes it")
            }
        }
    }
}

fn floor_error(error: floor::Error) -> VmkitError {
    let message = error.to_string();
    match error {
        floor::Error::Missing(_) => VmkitError::new(ErrorKind::MissingDependency, message).hint(
            "run `make setup`, or install Debian's busybox-static, gzip and coreutils; `vmkit doctor` checks again",
        ),
        floor::Error::Io(_, cause) => VmkitError::io(message, cause).hint("use another directory: --state-dir DIR"),
        floor::Error::Interrupted | floor::Error::Setup(_) | floor::Error::Qemu(_) => {
            VmkitError::new(ErrorKind::Backend, message).hint("`vmkit doctor` says what this machine lacks")
        }
    }
}
