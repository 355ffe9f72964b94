//! Where a run has its machines, and what becomes of them when it is killed.
//!
//! ```text
//!  STATE/bench/lock       held for a moment: by who makes a place, and by who sweeps
//!  STATE/bench/run-…/     a run's place; its lock is held by the run, for as long as that lives
//!      vms/ run/ images   a state directory of its own: nobody's machines are touched
//!      floor/qemu-…/      bare machines, each working in its directory
//! ```
//!
//! A place that nobody holds is a dead run's. Its processes are those that work in it and are QEMU or vmkit: one that was started
//! and not yet recorded is found as well. Each is held by its descriptor, and looked at again, before it is killed.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};
use tokio::runtime::{Builder, Runtime};
use vmkit::Error;
use vmkit_backends::process::Identity;

/// A run's own directory, removed when dropped.
#[derive(Debug)]
pub(crate) struct Place {
    dir: tempfile::TempDir,
    lock: File,
}

impl Place {
    /// Makes one.
    ///
    /// # Errors
    /// When the state directory cannot be written to.
    pub(crate) fn make(state: &Path) -> vmkit::Result<Place> {
        let root = root(state);
        let failed = |error| Error::io(format!("{} cannot be written to", root.display()), error);
        fs::create_dir_all(&root).map_err(failed)?;
        let root = root.canonicalize().map_err(failed)?;
        // From its making to its lock, it would be taken for a dead run's.
        let _turn = turn(&root).map_err(failed)?;
        let dir = tempfile::Builder::new().prefix("run-").tempdir_in(&root).map_err(failed)?;
        let lock = File::open(dir.path()).map_err(failed)?;
        flock(&lock, FlockOperation::NonBlockingLockExclusive).map_err(|error| failed(error.into()))?;
        Ok(Place { dir, lock })
    }

    pub(crate) fn path(&self) -> &Path {
        self.dir.path()
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        // In this order: what is not held is somebody else's to remove.
        let _ = fs::remove_dir_all(self.dir.path());
        // Closing is not enough: a child that is being made has a copy of every descriptor until its `exec`.
        let _ = flock(&self.lock, FlockOperation::Unlock);
    }
}

/// Ends and removes everything that benchmarks left that were killed. Blocks; not to be called in a runtime.
///
/// # Errors
/// When a process cannot be killed, or a directory cannot be removed.
pub fn sweep(state: &Path) -> vmkit::Result<()> {
    let Ok(root) = root(state).canonicalize() else { return Ok(()) };
    let failed = |error| Error::io(format!("what is left in {} cannot be removed", root.display()), error);
    let _turn = turn(&root).map_err(failed)?;
    for path in fs::read_dir(&root).map_err(failed)?.flatten().map(|entry| entry.path()).filter(|path| path.is_dir()) {
        // One that is gone by now was removed by its run.
        let Ok(place) = File::open(&path) else { continue };
        if flock(&place, FlockOperation::NonBlockingLockExclusive).is_ok() && path.exists() {
            end_all(&path).and_then(|()| fs::remove_dir_all(&path)).map_err(failed)?;
        }
    }
    Ok(())
}

fn root(state: &Path) -> PathBuf {
    state.join("bench")
}

/// Waits until nobody else makes or sweeps a place.
fn turn(root: &Path) -> io::Result<File> {
    let file = File::options().write(true).create(true).truncate(false).open(root.join("lock"))?;
    flock(&file, FlockOperation::LockExclusive)?;
    Ok(file)
}

/// Kills what works in a directory, until there is nothing more: a command that is killed may just have started a machine.
fn end_all(dir: &Path) -> io::Result<()> {
    let runtime = Builder::new_current_thread().enable_all().build()?;
    loop {
        let found = programs_in(dir);
        if found.is_empty() {
            return Ok(());
        }
        for pid in found {
            end(&runtime, pid, dir)?;
        }
    }
}

fn end(runtime: &Runtime, pid: u32, dir: &Path) -> io::Result<()> {
    let Some(identity) = Identity::of(pid)? else { return Ok(()) };
    runtime.block_on(async {
        if let Some(held) = identity.hold()?
            && is_program_in(pid, dir)
        {
            held.kill()?;
            held.exited().await;
        }
        Ok(())
    })
}

fn programs_in(dir: &Path) -> Vec<u32> {
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    let pids = entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    pids.filter(|pid| is_program_in(*pid, dir)).collect()
}

/// Whether it is a machine or a command of a run: somebody's shell may stand there too.
fn is_program_in(pid: u32, dir: &Path) -> bool {
    let link = |name: &str| fs::read_link(format!("/proc/{pid}/{name}")).unwrap_or_default();
    let program = link("exe");
    let name = program.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    // One that was replaced meanwhile is called `vmkit (deleted)`.
    let ours = name.starts_with("qemu-system") || name.split(' ').next() == Some("vmkit");
    ours && link("cwd").starts_with(dir)
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::CommandExt;
    use std::process::{Child, Command};

    use super::*;

    /// A process that is called so, in this directory.
    fn program(name: &str, bin: &Path, dir: &Path) -> Child {
        let path = bin.join(name);
        // Not by this process: while another test starts one of its own, that would hold it open for writing.
        assert!(Command::new("cp").arg("/bin/sleep").arg(&path).status().unwrap().success());
        fs::create_dir_all(dir).unwrap();
        Command::new(path).arg0("sleep").arg("600").current_dir(dir).spawn().unwrap()
    }

    #[test]
    fn what_a_dead_run_left_goes_and_nothing_else_does() {
        let (state, bin) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        sweep(state.path()).unwrap();
        assert!(!state.path().join("bench").exists(), "there was nothing to sweep");
        let living = Place::make(state.path()).unwrap();
        // A dead one's: nobody holds its lock.
        let dead = state.path().canonicalize().unwrap().join("bench/run-dead");
        let mut machine = program("qemu-system-x86_64", bin.path(), &dead.join("floor/qemu-0"));
        let mut command = program("vmkit", bin.path(), &dead);
        let mut shell = program("sh", bin.path(), &dead);
        let mut other = program("qemu-system-i386", bin.path(), &living.path().join("vms/one"));
        sweep(state.path()).unwrap();
        assert!(!dead.exists());
        assert!(machine.try_wait().unwrap().is_some() && command.try_wait().unwrap().is_some());
        assert!(shell.try_wait().unwrap().is_none(), "somebody stands there, and is no machine");
        assert!(other.try_wait().unwrap().is_none() && living.path().exists(), "that run lives");
        let place = living.path().to_owned();
        other.kill().unwrap();
        shell.kill().unwrap();
        other.wait().unwrap();
        shell.wait().unwrap();
        drop(living);
        assert!(!place.exists());
    }
}
