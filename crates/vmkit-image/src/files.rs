//! Files that are complete or not there.

use std::fs::{self, File, Metadata, Permissions};
use std::io::ErrorKind as Io;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::time::{Duration, Instant};

use vmkit::{Error, Result};

/// Makes a directory and its parents.
pub(crate) fn make_dir(path: &Path) -> Result<()> {
    fs::create_dir_all(path).map_err(|error| Error::io(format!("{} cannot be made", path.display()), error))
}

/// Closes a directory to everybody else.
pub(crate) fn make_private(path: &Path) -> Result<()> {
    fs::set_permissions(path, Permissions::from_mode(0o700))
        .map_err(|error| Error::io(format!("{} cannot be written", path.display()), error))
}

/// Writes a file in another place of the same file system, through to disk, and moves it to its own.
pub(crate) fn replace(path: &Path, aside: &Path, content: &[u8]) -> Result<()> {
    let failed = |error| Error::io(format!("{} cannot be written", path.display()), error);
    fs::write(aside, content).map_err(failed)?;
    File::open(aside).and_then(|file| file.sync_all()).map_err(failed)?;
    fs::rename(aside, path).map_err(failed)?;
    sync_dir(path.parent().unwrap_or(Path::new("/")))
}

/// Writes a directory's entries through to disk.
pub(crate) fn sync_dir(path: &Path) -> Result<()> {
    File::open(path)
        .and_then(|dir| dir.sync_all())
        .map_err(|error| Error::io(format!("{} cannot be written through to disk", path.display()), error))
}

/// Makes a finished directory read-only and writes it through to disk, files first.
pub(crate) fn seal(dir: &Path) -> Result<()> {
    let failed = |error| Error::io(format!("{} cannot be written through to disk", dir.display()), error);
    for entry in fs::read_dir(dir).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        if path.is_dir() {
            seal(&path)?;
            continue;
        }
        let file = File::open(&path).map_err(failed)?;
        file.set_permissions(Permissions::from_mode(0o444)).map_err(failed)?;
        file.sync_all().map_err(failed)?;
    }
    sync_dir(dir)
}

/// Removes a tree; none is fine. Waits for the tools of a killed build, which may still be ending.
pub(crate) fn remove_tree(path: &Path) -> Result<()> {
    let patience = Instant::now() + Duration::from_secs(10);
    loop {
        let error = match fs::remove_dir_all(path) {
            Ok(()) => return Ok(()),
            Err(error) => error,
        };
        match error.kind() {
            Io::NotFound if !path.exists() => return Ok(()),
            Io::NotADirectory => {
                return fs::remove_file(path)
                    .map_err(|error| Error::io(format!("{} cannot be removed", path.display()), error));
            }
            Io::PermissionDenied => open_up(path),
            _ => {}
        }
        if Instant::now() > patience {
            return Err(Error::io(format!("{} cannot be removed", path.display()), error));
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Gives us back the directories of a tree that closed themselves to their owner.
fn open_up(path: &Path) {
    let _ = fs::set_permissions(path, Permissions::from_mode(0o700));
    for entry in fs::read_dir(path).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            open_up(&entry.path());
        }
    }
}

/// Lets us read what is ours in a tree, whatever modes it has.
pub(crate) fn make_readable(dir: &Path) -> Result<()> {
    let failed = |error| Error::io(format!("{} cannot be read", dir.display()), error);
    let allow = |path: &Path, meta: &Metadata, bits: u32| match meta.mode() & bits == bits {
        true => Ok(()),
        false => fs::set_permissions(path, Permissions::from_mode(meta.mode() & 0o7777 | bits)),
    };
    allow(dir, &dir.symlink_metadata().map_err(failed)?, 0o700).map_err(failed)?;
    for entry in fs::read_dir(dir).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let meta = entry.metadata().map_err(failed)?;
        if meta.is_dir() {
            make_readable(&entry.path())?;
        } else if meta.is_file() {
            allow(&entry.path(), &meta, 0o400).map_err(failed)?;
        }
    }
    Ok(())
}

/// The space that a directory's files occupy, in bytes.
pub(crate) fn occupied(dir: &Path) -> u64 {
    space(dir, |_| true)
}

/// What of that would be free without the directory: the files that have no other name.
pub(crate) fn own(dir: &Path) -> u64 {
    space(dir, |meta| meta.nlink() == 1)
}

fn space(dir: &Path, counts: impl Fn(&Metadata) -> bool) -> u64 {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let files = entries.filter_map(|entry| entry.metadata().ok()).filter(|meta| counts(meta));
    files.map(|meta| meta.blocks() * 512).sum()
}
