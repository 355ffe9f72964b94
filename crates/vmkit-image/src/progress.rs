//! What a build reports while it runs, and how it is ended early.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use vmkit::{Error, ErrorKind, Result};

/// The parts of a build, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Phase {
    /// Another process builds in the same store.
    Waiting,
    /// The kernel is fetched and unpacked.
    Kernel,
    /// The files of the root file system are put together.
    Root,
    /// The initramfs is written.
    Initramfs,
    /// The files become a disk.
    Disk,
    /// The image is checked, written through to disk and named.
    Finish,
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Phase::Waiting => "waiting",
            Phase::Kernel => "kernel",
            Phase::Root => "root",
            Phase::Initramfs => "initramfs",
            Phase::Disk => "disk",
            Phase::Finish => "finish",
        })
    }
}

/// One report of a build.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct Progress<'a> {
    /// The part it is in.
    pub phase: Phase,
    /// One line on what is being done.
    pub detail: &'a str,
}

/// Ends a build early. Clones share one flag; any thread may raise it.
///
/// The build's child processes are ended with it, and it fails with [`ErrorKind::Cancelled`].
#[derive(Clone, Debug, Default)]
pub struct Cancel(Arc<AtomicBool>);

impl Cancel {
    /// A flag that is not raised.
    pub fn new() -> Cancel {
        Cancel::default()
    }

    /// Raises the flag, for good.
    pub fn cancel(&self) {
        self.0.store(true, Ordering::Release);
    }

    /// Whether the flag was raised.
    pub fn is_cancelled(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }

    pub(crate) fn check(&self) -> Result<()> {
        match self.is_cancelled() {
            true => Err(Error::new(ErrorKind::Cancelled, "the build was cancelled")),
            false => Ok(()),
        }
    }
}
