//! The guest agent that goes into every image.

use std::path::{Path, PathBuf};

use vmkit::{Error, ErrorKind, Result};

use crate::digest;
use crate::elf::{Elf, MACHINE};

/// The agent's executable, as it is now.
///
/// It is the initramfs's `/init`, so it must be static. Its digest is part of an image: an image with another agent is
/// outdated, and [`Store::ensure`](crate::Store::ensure) makes it again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Agent {
    path: PathBuf,
    digest: String,
    version: String,
}

impl Agent {
    /// Reads and checks an agent. `version` is shown in listings; give the version of the protocol it speaks.
    ///
    /// # Errors
    /// [`ErrorKind::MissingDependency`] when it is not there, or no guest could run it.
    pub fn new(path: impl Into<PathBuf>, version: impl Into<String>) -> Result<Agent> {
        let path = path.into();
        let bytes = std::fs::read(&path).map_err(|error| match error.kind() {
            std::io::ErrorKind::NotFound => missing(format!("there is no guest agent at {}", path.display())),
            _ => Error::io(format!("the guest agent {} cannot be read", path.display()), error),
        })?;
        let unfit = |why: &str| {
            Error::new(ErrorKind::MissingDependency, format!("the guest agent {} {why}", path.display()))
                .hint("build it with `make agent`: static, for this machine's processor")
        };
        let elf = Elf::parse(&bytes).map_err(|error| unfit("is not a Linux program").caused_by(error))?;
        if elf.machine() != MACHINE {
            return Err(unfit("is for another processor"));
        }
        if elf.is_dynamic() {
            return Err(unfit("is dynamically linked, and a guest has no libraries for it"));
        }
        Ok(Agent { digest: digest::of_bytes(&bytes), path, version: version.into() })
    }

    /// The agent that `VMKIT_AGENT` names, else `vmkit-agent` beside the running program.
    ///
    /// # Errors
    /// As [`Agent::new`].
    pub fn find(version: impl Into<String>) -> Result<Agent> {
        if let Some(path) = std::env::var_os("VMKIT_AGENT").filter(|path| !path.is_empty()) {
            return Agent::new(path, version);
        }
        let program = std::env::current_exe().map_err(|error| Error::io("this program's path is not known", error))?;
        let directory = program.parent().unwrap_or(Path::new("/"));
        // Test programs are one directory further down.
        let candidates = [directory.join("vmkit-agent"), directory.join("../vmkit-agent")];
        match candidates.iter().find(|path| path.is_file()) {
            Some(path) => Agent::new(path, version),
            None => Err(missing(format!("there is no guest agent beside {}", program.display()))),
        }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its content's digest, `sha256:` and 64 hexadecimal digits.
    pub fn digest(&self) -> &str {
        &self.digest
    }

    /// The version it was given.
    pub fn version(&self) -> &str {
        &self.version
    }
}

fn missing(message: String) -> Error {
    Error::new(ErrorKind::MissingDependency, message)
        .hint("build it with `make agent`, or name one with VMKIT_AGENT=/path/to/vmkit-agent")
}
