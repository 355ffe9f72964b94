//! What ends a run early.

use std::path::PathBuf;

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
    Vmkit(#[from] vmkit::Error),
    /// The command failed.
    #[error("`vmkit {command}` ended with {status}: {said}")]
    Command {
        /// Its arguments.
        command: String,
        /// How it ended.
        status: std::process::ExitStatus,
        /// What it wrote to standard error.
        said: String,
    },
    /// The command is not there.
    #[error("there is no vmkit at {}: build it with `make build`, or name one with VMKIT_BIN", .0.display())]
    NoCommand(PathBuf),
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
