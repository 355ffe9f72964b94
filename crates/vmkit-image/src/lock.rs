//! Who may change the store.

use std::fs::File;
use std::path::Path;
use std::time::Duration;

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use vmkit::{Error, ErrorKind, Result};

use crate::progress::Cancel;

/// A lock on a file, which the kernel gives back when its holder ends, however it ends.
#[derive(Debug)]
pub(crate) struct Lock {
    file: File,
}

impl Lock {
    /// Waits until nobody else holds it. `waiting` is called once, when there is a wait.
    pub(crate) fn exclusive(path: &Path, cancel: &Cancel, waiting: &dyn Fn()) -> Result<Lock> {
        Lock::take(path, FlockOperation::NonBlockingLockExclusive, cancel, waiting)
    }

    /// Waits until nobody holds it exclusively.
    pub(crate) fn shared(path: &Path) -> Result<Lock> {
        Lock::take(path, FlockOperation::NonBlockingLockShared, &Cancel::new(), &|| {})
    }

    /// Takes it only when nobody holds it.
    pub(crate) fn try_exclusive(path: &Path) -> Result<Option<Lock>> {
        let cancel = Cancel::new();
        cancel.cancel();
        match Lock::exclusive(path, &cancel, &|| {}) {
            Ok(lock) => Ok(Some(lock)),
            Err(error) if error.kind() == ErrorKind::Cancelled => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn take(path: &Path, operation: FlockOperation, cancel: &Cancel, waiting: &dyn Fn()) -> Result<Lock> {
        let failed = |error| Error::io(format!("{} cannot be locked", path.display()), error);
        let file = File::options().read(true).append(true).create(true).open(path).map_err(failed)?;
        let mut told = false;
        // Asked again and again, because a blocking flock cannot be cancelled.
        loop {
            match flock(&file, operation) {
                Ok(()) => return Ok(Lock { file }),
                Err(Errno::WOULDBLOCK | Errno::INTR) => {}
                Err(error) => return Err(failed(error.into())),
            }
            if !told {
                waiting();
                told = true;
            }
            cancel.check()?;
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        // Closing is not enough: a child that is being made has a copy of every descriptor until its `exec`.
        let _ = flock(&self.file, FlockOperation::Unlock);
    }
}
