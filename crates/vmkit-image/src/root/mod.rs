//! Root file systems, and the disks they become.

mod base;
mod debian;
mod ext4;

use std::fs::{File, Permissions};
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use vmkit::{Error, ErrorKind, Result};

use crate::files;
use crate::progress::Phase;
use crate::recipe::RootSource;
use crate::run::{Tool, Work};
use ext4::Owners;

/// The next step, for whoever gave something that is no root file system.
const GIVE: &str = "give a directory, or a tar, plain or compressed by gzip, xz or zstd, without `..` in its names";

/// Makes the base disk.
pub(crate) fn make(work: &Work<'_>, source: &RootSource, size: Option<u64>, disk: &Path) -> Result<()> {
    match source {
        RootSource::Base => {
            work.report(Phase::Root, "a user land from BusyBox");
            let tree = work.path("root");
            base::make(&tree)?;
            ext4::make(work, &tree, Owners::Root, size, disk)
        }
        RootSource::Debian => {
            let tar = work.path("root.tar");
            debian::make(work, &tar)?;
            from_tar(work, &tar, size, disk)?;
            files::remove_tree(&tar)
        }
        RootSource::Dir(dir) => {
            let dir = absolute(dir)?;
            if !dir.is_dir() {
                return Err(
                    Error::new(ErrorKind::InvalidArgument, format!("{} is not a directory", dir.display())).hint(GIVE)
                );
            }
            work.report(Phase::Root, &dir.display().to_string());
            ext4::make(work, &dir, Owners::AsFound, size, disk)
        }
        RootSource::Tar(tar) => from_tar(work, tar, size, disk),
    }
}

/// Tools run in another directory, and a name may look like an option.
fn absolute(path: &Path) -> Result<PathBuf> {
    path.canonicalize().map_err(|error| match error.kind() {
        std::io::ErrorKind::NotFound | std::io::ErrorKind::NotADirectory => {
            Error::new(ErrorKind::InvalidArgument, format!("there is no {}", path.display())).hint(GIVE)
        }
        _ => Error::io(format!("{} cannot be read", path.display()), error),
    })
}

/// What tar will run to read an archive, and the package that has it.
fn packer(tar: &Path) -> std::io::Result<Option<(&'static str, &'static str)>> {
    let mut start = Vec::new();
    File::open(tar)?.take(6).read_to_end(&mut start)?;
    Ok(match start.as_slice() {
        [0x1f, 0x8b, ..] => Some(("gzip", "gzip")),
        [0xfd, b'7', b'z', b'X', b'Z', 0] => Some(("xz", "xz-utils")),
        [0x28, 0xb5, 0x2f, 0xfd, ..] => Some(("zstd", "zstd")),
        [b'B', b'Z', b'h', ..] => Some(("bzip2", "bzip2")),
        _ => None,
    })
}

/// It only remembers. Were it to change owners in earnest, which it tries when it is root's, a container's root would fail at
/// each owner that the container does not have.
fn fakeroot() -> Tool {
    Tool::new("fakeroot", "fakeroot").env("FAKEROOTDONTTRYCHOWN", "1")
}

/// Unpacks a tar and makes a disk of it, both under one fakeroot: it remembers the owners, modes and device nodes that the
/// file system of an ordinary user cannot hold. For root as well, who may lack the right to make device nodes in a container.
fn from_tar(work: &Work<'_>, tar: &Path, size: Option<u64>, disk: &Path) -> Result<()> {
    let tar = absolute(tar)?;
    let unreadable = |error: std::io::Error| match error.kind() {
        std::io::ErrorKind::IsADirectory => {
            Error::new(ErrorKind::InvalidArgument, format!("{} is a directory, not a tar", tar.display())).hint(GIVE)
        }
        _ => Error::io(format!("{} cannot be read", tar.display()), error),
    };
    let packer = packer(&tar).map_err(unreadable)?;
    work.report(Phase::Root, &format!("unpacking {}", tar.display()));
    let (tree, owners) = (work.path("root"), work.path("owners"));
    files::make_dir(&tree)?;
    // Until the tar says otherwise, whatever this process's umask is.
    std::fs::set_permissions(&tree, Permissions::from_mode(0o755)).map_err(unreadable)?;
    let unpack = Tool::new("tar", "tar").args(&["--extract", "--preserve-permissions", "--same-owner"]);
    let mut unpack = unpack.arg("--numeric-owner").arg("--file").arg(&tar).arg("--directory").arg(&tree);
    if let Some((program, package)) = packer {
        unpack = unpack.needs(program, package);
    }
    let unpack = fakeroot().arg("-s").arg(&owners).arg("--").then(unpack);
    // tar itself refuses names with `..` and never follows a link that it has unpacked.
    work.run(&unpack).map_err(|error| match error.kind() {
        ErrorKind::Io => {
            Error::new(ErrorKind::InvalidArgument, format!("the root file system {} cannot be unpacked", tar.display()))
                .with_details(error.details().unwrap_or_default())
                .hint(GIVE)
        }
        _ => error,
    })?;
    // The modes that count are the remembered ones; an ordinary user may not read a file that has none.
    files::make_readable(&tree)?;
    ext4::make(work, &tree, Owners::Remembered(&owners), size, disk)?;
    files::remove_tree(&tree)
}
