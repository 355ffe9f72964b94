//! Which process has a pool's name: a lock that the kernel gives back when that process ends, however it ends.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use rustix::fs::FlockOperation;
use vmkit::{Error, ErrorKind, Id, Result};

use super::lock::FileLock;

/// A pool's name, held by this process until it is dropped. Child processes do not inherit it: the standard library opens
/// files so that `exec` closes them.
#[derive(Debug)]
pub struct PoolClaim(#[cfg_attr(not(test), expect(dead_code, reason = "its lock is what counts"))] FileLock);

impl PoolClaim {
    /// # Errors
    /// [`ErrorKind::Busy`] when another has it.
    pub(crate) fn take(path: &Path, name: &Id) -> Result<PoolClaim> {
        let failed = |error: io::Error| Error::io(format!("the lock {} cannot be taken", path.display()), error);
        // The file stays: one that is removed while another waits for it would be two locks of one name.
        let file = File::options().read(true).write(true).create(true).truncate(false).open(path).map_err(failed)?;
        let Some(file) = FileLock::try_take(file, FlockOperation::NonBlockingLockExclusive).map_err(failed)? else {
            let holder = fs::read_to_string(path).unwrap_or_default();
            let holder = match holder.trim() {
                "" => "another process".to_owned(),
                pid => format!("process {pid}"),
            };
            return Err(Error::new(ErrorKind::Busy, format!("the pool {name} is in use by {holder}"))
                .hint("close that pool first, or choose another name"));
        };
        // For people only, so a full disk is no reason not to have a pool.
        let _ = file.set_len(0).and_then(|()| file.write_all_at(std::process::id().to_string().as_bytes(), 0));
        Ok(PoolClaim(file))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_has_one_holder_and_no_child_inherits_it() {
        let dir = tempfile::tempdir().unwrap();
        let (path, name) = (dir.path().join("ci"), Id::new("ci").unwrap());
        let first = PoolClaim::take(&path, &name).unwrap();
        let error = PoolClaim::take(&path, &name).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Busy);
        assert!(error.to_string().contains(&std::process::id().to_string()), "{error}");
        // A child that lives on keeps nothing.
        let mut child = std::process::Command::new("sleep").arg("600").spawn().unwrap();
        // One that is being made has copies of our descriptors, for a moment.
        let copy = first.0.try_clone().unwrap();
        drop(first);
        let again = PoolClaim::take(&path, &name);
        child.kill().unwrap();
        child.wait().unwrap();
        drop(copy);
        assert!(again.is_ok(), "{again:?}");
    }
}
