//! What a close tells.

use std::fmt;

use super::status::VmPhase;
use crate::error::{Error, ErrorKind, Result};
use crate::spec::Id;

/// How a close went.
#[derive(Clone, Debug, Default)]
#[must_use = "it says what could not be deleted"]
pub struct CloseReport {
    /// How many machines were deleted by it.
    pub deleted: u64,
    /// Machines that were left to their holders.
    pub retained: Vec<Id>,
    /// What was still there at the deadline; the pool goes on trying, and so does another close.
    pub left: Vec<Left>,
}

/// A machine that a close could not delete in time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Left {
    /// Its name.
    pub id: Id,
    /// What happened to it at the deadline.
    pub phase: VmPhase,
    /// What went wrong with it last.
    pub problem: Option<String>,
}

impl CloseReport {
    /// Whether nothing is left.
    pub fn is_clean(&self) -> bool {
        self.left.is_empty()
    }

    /// An error if something is left, that names all of it.
    ///
    /// # Errors
    /// [`ErrorKind::TimedOut`].
    pub fn into_result(self) -> Result<()> {
        if self.is_clean() {
            return Ok(());
        }
        let left: Vec<String> = self.left.iter().map(Left::to_string).collect();
        Err(Error::new(ErrorKind::TimedOut, format!("{} machines could not be deleted in time", left.len()))
            .during("Close")
            .hint("close the pool again, or delete them by name")
            .with_details(left.join("\n")))
    }
}

impl fmt::Display for Left {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({:?})", self.id, self.phase)?;
        match &self.problem {
            Some(problem) => write!(f, ": {problem}"),
            None => Ok(()),
        }
    }
}
