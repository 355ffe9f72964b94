//! Who operates on a machine: a lock that the kernel gives back when its holder ends, however it ends.
//!
//! The file's length says which operation is under way: a length needs no space, so a full disk keeps nobody from stopping and
//! deleting. A file that says one and that nobody holds is what a holder that died left; whoever finds it first clears up.

use std::fs::{self, File};
use std::io;
use std::ops::Deref;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use vmkit::{Action, Error, Result};

/// The first wait for another holder; it doubles up to [`LONGEST`].
const SHORTEST: Duration = Duration::from_millis(1);
const LONGEST: Duration = Duration::from_millis(50);

/// A file and the `flock` on it, which is given back when this is dropped. Closing the file is not enough for that: a child that
/// is being made has a copy of every descriptor until its `exec`.
#[derive(Debug)]
pub(crate) struct FileLock(File);

impl FileLock {
    /// Locks it, unless somebody else has it: then `None`.
    pub(crate) fn try_take(file: File, operation: FlockOperation) -> io::Result<Option<FileLock>> {
        loop {
            match flock(&file, operation) {
                Ok(()) => return Ok(Some(FileLock(file))),
                Err(Errno::WOULDBLOCK) => return Ok(None),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

impl Deref for FileLock {
    type Target = File;

    fn deref(&self) -> &File {
        &self.0
    }
}

impl Drop for FileLock {
    fn drop(&mut self) {
        let _ = flock(&self.0, FlockOperation::Unlock);
    }
}

/// A machine's lock, held.
#[derive(Debug)]
pub(crate) struct Lock {
    file: FileLock,
    path: PathBuf,
}

/// What the file's length says of a machine that is being forked: it is in no other state meanwhile, and a holder who dies leaves
/// what one leaves who dies in a suspend, a guest that may stand still.
const FORKING: u64 = Action::ALL.len() as u64;

/// A lock, and the operation that a holder who died left half done.
pub(crate) struct Taken {
    pub lock: Lock,
    pub left: Option<Action>,
}

impl Lock {
    /// Waits until nobody else holds it, then holds it for `action`. Cancel-safe: a dropped call holds nothing.
    ///
    /// # Errors
    /// When the file cannot be made.
    pub(crate) async fn take(path: &Path, action: Action) -> Result<Taken> {
        let mut pause = SHORTEST;
        loop {
            // Tried again and again: a blocking lock could not be cancelled.
            if let Some(taken) = Lock::try_take(path, action)? {
                return Ok(taken);
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(LONGEST);
        }
    }

    /// Holds it unless somebody else does.
    ///
    /// # Errors
    /// When the file cannot be made.
    pub(crate) fn try_take(path: &Path, action: Action) -> Result<Option<Taken>> {
        let failed = |error: io::Error| Error::io(format!("the lock {} cannot be taken", path.display()), error);
        loop {
            let file =
                File::options().read(true).write(true).create(true).truncate(false).open(path).map_err(failed)?;
            let Some(file) = FileLock::try_take(file, FlockOperation::NonBlockingLockExclusive).map_err(failed)? else {
                return Ok(None);
            };
            // The last holder removes the file of a machine that is gone: then this is a lock on nothing.
            let held = file.metadata().map_err(failed)?;
            match fs::metadata(path) {
                Ok(there) if (there.dev(), there.ino()) == (held.dev(), held.ino()) => {}
                _ => continue,
            }
            let left = read(&file);
            let lock = Lock { file, path: path.to_owned() };
            lock.note(Some(left.unwrap_or(action))).map_err(failed)?;
            return Ok(Some(Taken { lock, left }));
        }
    }

    /// Says which operation is under way. Called again once what a dead holder left is cleared up.
    pub(crate) fn note(&self, action: Option<Action>) -> io::Result<()> {
        // Looking changes nothing: nothing of it needs clearing up, and it is action 0.
        let number = action.and_then(|action| Action::ALL.iter().position(|other| *other == action)).unwrap_or(0);
        self.file.set_len(number as u64)
    }

    /// Says that the machine is being forked, until something else is said.
    pub(crate) fn note_fork(&self) -> io::Result<()> {
        self.file.set_len(FORKING)
    }

    /// Gives it free. `gone` when nothing of the machine is left: then the file goes too.
    pub(crate) fn release(self, gone: bool) {
        let _ = self.note(None);
        if gone {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// What others see of a machine's lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Holder {
    /// Nobody.
    Free,
    /// Somebody, doing this.
    Busy(Action),
    /// Somebody who died doing this.
    Died(Action),
}

/// Looks without holding it longer than for this look.
pub(crate) fn holder(path: &Path) -> Holder {
    let Ok(file) = File::open(path) else { return Holder::Free };
    let (doing, forking) = (read(&file), is_forking(&file));
    let free = matches!(FileLock::try_take(file, FlockOperation::NonBlockingLockShared), Ok(Some(_)));
    match (doing, free) {
        (None, _) => Holder::Free,
        (Some(_), false) if forking => Holder::Free,
        (Some(action), true) => Holder::Died(action),
        (Some(action), false) => Holder::Busy(action),
    }
}

fn read(file: &File) -> Option<Action> {
    let number = file.metadata().ok()?.len();
    if number == FORKING {
        return Some(Action::Suspend);
    }
    let number = usize::try_from(number).ok()?;
    Action::ALL.get(number).copied().filter(|action| *action != Action::None)
}

fn is_forking(file: &File) -> bool {
    file.metadata().is_ok_and(|meta| meta.len() == FORKING)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_machine_that_is_being_forked_is_as_it_looks_until_who_forks_it_dies() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("web");
        let lock = Lock::take(&path, Action::None).await.unwrap().lock;
        lock.note_fork().unwrap();
        assert_eq!(holder(&path), Holder::Free);
        assert!(Lock::try_take(&path, Action::Stop).unwrap().is_none());
        drop(lock);
        assert_eq!(holder(&path), Holder::Died(Action::Suspend));
        let taken = Lock::take(&path, Action::Stop).await.unwrap();
        assert_eq!(taken.left, Some(Action::Suspend));
    }

    #[tokio::test]
    async fn one_holder_at_a_time_and_a_dead_one_is_known() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("web");
        assert_eq!(holder(&path), Holder::Free);
        let first = Lock::take(&path, Action::Start).await.unwrap();
        assert!(first.left.is_none());
        assert_eq!(holder(&path), Holder::Busy(Action::Start));
        assert!(Lock::try_take(&path, Action::Stop).unwrap().is_none());
        drop(first.lock);
        assert_eq!(holder(&path), Holder::Died(Action::Start));
        let second = Lock::take(&path, Action::Stop).await.unwrap();
        assert_eq!(second.left, Some(Action::Start));
        second.lock.note(Some(Action::Stop)).unwrap();
        let waiting = tokio::spawn({
            let path = path.clone();
            async move { Lock::take(&path, Action::Delete).await.map(|taken| taken.left) }
        });
        tokio::time::sleep(Duration::from_millis(20)).await;
        assert!(!waiting.is_finished());
        // The file goes with the machine; whoever waited for it makes a new one.
        second.lock.release(true);
        assert_eq!(waiting.await.unwrap().unwrap(), None);
        assert_eq!(holder(&path), Holder::Died(Action::Delete));
    }
}
