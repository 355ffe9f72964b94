//! A directory becomes a disk: a sparse file with an ext4 in it.
//!
//! Same files, same bytes, as far as mke2fs lets us: times of its own are fixed, and the times of access and change, which say
//! only when the tree was unpacked, are set to a constant afterwards.

use std::fmt::Write as _;
use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

use vmkit::{Error, ErrorKind, Result};

use super::fakeroot;
use crate::progress::Phase;
use crate::run::{Tool, Work};

/// The first second of 2024: the time of everything that has none of its own.
pub(super) const EPOCH: i64 = 1_704_067_200;
/// Disks are told apart by the machine they are in, so all may have one identity; it makes builds repeatable.
const UUID: &str = "76d6b69f-696d-4167-8500-000000000001";

/// What the agent and every user land mount something on, with modes. A root file system that lacks one gets it: containers'
/// exports often do.
const MOUNT_POINTS: &[(&str, u32)] =
    &[("proc", 0o555), ("sys", 0o555), ("dev", 0o755), ("run", 0o755), ("tmp", 0o1777)];

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
const DEFAULT_SIZE: u64 = 4 * GIB;
const SMALLEST: u64 = 64 * MIB;
/// Far below the 16 TiB at which ext4, as a disk's host and as its content, ends.
const LARGEST: u64 = 4 << 40;

/// Whose the files are.
pub(super) enum Owners<'a> {
    /// As the file system says.
    AsFound,
    /// Root's, all of them.
    Root,
    /// As fakeroot wrote them into this file when the tree was unpacked.
    Remembered(&'a Path),
}

/// Makes the disk.
pub(super) fn make(work: &Work<'_>, tree: &Path, owners: Owners<'_>, size: Option<u64>, disk: &Path) -> Result<()> {
    work.report(Phase::Disk, "measuring");
    let mut content = Content::default();
    content.measure(work, tree)?;
    let size = content.disk_size(size)?;

    work.report(Phase::Disk, &format!("writing {} files, {} MiB", content.entries, content.bytes / MIB));
    // A journal: a machine that is cut off must find its disk whole. A small one: it is part of every machine's own disk. Inode
    // tables are zeroed now (and dug out again afterwards), or else each guest would write them for itself in the background.
    let journal = if size < GIB { 4 } else { 16 };
    let inodes = (size / 16384).max(content.entries + content.entries / 2);
    let extended = format!("hash_seed={UUID},lazy_itable_init=0,lazy_journal_init=0,nodiscard");
    let tool = Tool::new("mke2fs", "e2fsprogs");
    let tool = tool.args(&["-q", "-F", "-t", "ext4", "-b", "4096", "-I", "256", "-m", "0", "-L", "vmkit", "-U", UUID]);
    let tool = tool.arg("-J").arg(format!("size={journal}")).arg("-N").arg(inodes.to_string());
    let tool = tool.arg("-E").arg(extended).arg("-d").arg(tree).arg(disk).arg(format!("{}k", size / 1024));
    let tool = match &owners {
        Owners::AsFound => tool,
        Owners::Root => fakeroot().arg("--").then(tool),
        Owners::Remembered(file) => fakeroot().arg("-i").arg(file).arg("--").then(tool),
    };
    work.run(&fixed_time(tool)).map_err(|error| match error.details() {
        // The estimate was too low: extended attributes, very many links.
        Some(log) if log.contains("Could not allocate") => too_small(size, size + size / 2).with_details(log),
        _ => error,
    })?;
    let root = Root::of(tree, &owners)?;
    // A link that leads nowhere is somebody's decision.
    let is_missing = |name: &str| tree.join(name).symlink_metadata().is_err();
    let missing: Vec<_> = MOUNT_POINTS.iter().filter(|(name, _)| is_missing(name)).collect();
    settle(work, disk, &root, &missing)
}

/// What the disk's root directory is to be like.
struct Root {
    mode: u32,
    owner: (u32, u32),
    time: i64,
}

impl Root {
    fn of(tree: &Path, owners: &Owners<'_>) -> Result<Root> {
        let failed = |error| Error::io(format!("{} cannot be read", tree.display()), error);
        let meta = tree.metadata().map_err(failed)?;
        let mut root = Root { mode: meta.mode(), owner: (0, 0), time: meta.mtime().max(0) };
        match owners {
            Owners::Root => {}
            Owners::AsFound => root.owner = (meta.uid(), meta.gid()),
            Owners::Remembered(file) => {
                let text = fs::read_to_string(file).map_err(failed)?;
                if let Some((mode, owner)) = text.lines().find_map(|line| remembered(line, meta.ino())) {
                    (root.mode, root.owner) = (mode, owner);
                }
            }
        }
        root.mode = 0o040_000 | root.mode & 0o7777;
        Ok(root)
    }
}

/// Mode and owner in a line that fakeroot wrote, when it is about this inode. All of the tree is on one device.
fn remembered(line: &str, inode: u64) -> Option<(u32, (u32, u32))> {
    let field = |name: &str| line.split(',').find_map(|field| field.strip_prefix(name)?.strip_prefix('='));
    if field("ino")?.parse() != Ok(inode) {
        return None;
    }
    let mode = u32::from_str_radix(field("mode")?, 8).ok()?;
    Some((mode, (field("uid")?.parse().ok()?, field("gid")?.parse().ok()?)))
}

fn fixed_time(tool: Tool) -> Tool {
    let epoch = EPOCH.to_string();
    tool.env("E2FSPROGS_FAKE_TIME", &epoch).env("SOURCE_DATE_EPOCH", &epoch)
}

/// Adds missing mount points, sets the root directory's mode and owner, which not every mke2fs takes from the tree, and the
/// times of every file in use. The tree itself may be somebody's directory, so nothing is ever added to that.
fn settle(work: &Work<'_>, disk: &Path, root: &Root, missing: &[&(&str, u32)]) -> Result<()> {
    let failed = |error| Error::io(format!("{} cannot be read", disk.display()), error);
    let mut superblock = [0; 20];
    File::open(disk).and_then(|file| file.read_exact_at(&mut superblock, 1024)).map_err(failed)?;
    let word = |at: usize| superblock[at..at + 4].iter().rev().fold(0, |sum, byte| sum << 8 | u64::from(*byte));
    // mke2fs and debugfs hand out inodes in order, the first of ours is 2 (the root), then 11 onwards.
    let used = word(0) - word(16) + missing.len() as u64;
    let mut script = String::new();
    for (name, mode) in missing {
        let _ = writeln!(script, "mkdir /{name}\nsif /{name} mode 0{:o}", 0o040_000 | mode);
        let _ = writeln!(script, "sif /{name} mtime @{EPOCH}\nsif /{name} crtime @{EPOCH}");
        let _ = writeln!(script, "sif /{name} mtime_extra 0\nsif /{name} crtime_extra 0");
    }
    let Root { mode, owner: (uid, gid), time } = root;
    let _ = writeln!(script, "sif <2> mode 0{mode:o}\nsif <2> uid {uid}\nsif <2> gid {gid}\nsif <2> mtime @{time}");
    for inode in std::iter::once(2).chain(11..=used) {
        let _ = writeln!(script, "sif <{inode}> atime @{EPOCH}\nsif <{inode}> ctime @{EPOCH}");
        let _ = writeln!(script, "sif <{inode}> atime_extra 0\nsif <{inode}> ctime_extra 0");
    }
    let file = work.path("times");
    fs::write(&file, script).map_err(|error| Error::io(format!("{} cannot be written", file.display()), error))?;
    let tool = Tool::new("debugfs", "e2fsprogs").arg("-w").arg("-f").arg(&file).arg(disk);
    // It ends with success whatever happens, and greets with its version.
    work.run_silent(&fixed_time(tool), "debugfs ")
}

fn too_small(size: u64, enough: u64) -> Error {
    Error::new(
        ErrorKind::InvalidArgument,
        format!("a disk of {} MiB is too small for this root file system", size / MIB),
    )
    .hint(format!("give at least {} MiB", enough / MIB))
}

#[derive(Default)]
struct Content {
    entries: u64,
    bytes: u64,
}

impl Content {
    fn measure(&mut self, work: &Work<'_>, dir: &Path) -> Result<()> {
        work.check()?;
        let unreadable = |path: &Path, error: std::io::Error| {
            let denied = error.kind() == std::io::ErrorKind::PermissionDenied;
            let error = Error::io(format!("{} cannot be read", path.display()), error);
            match denied {
                true => error.hint("run this as root, or pack the directory as root and give the tar"),
                false => error,
            }
        };
        for entry in fs::read_dir(dir).map_err(|error| unreadable(dir, error))? {
            let path = entry.map_err(|error| unreadable(dir, error))?.path();
            let meta = path.symlink_metadata().map_err(|error| unreadable(&path, error))?;
            self.entries += 1;
            // A sparse file becomes a sparse file; the factor is for file systems that compress.
            self.bytes += meta.size().next_multiple_of(4096).min((meta.blocks() * 512).next_multiple_of(4096) * 4);
            if meta.is_dir() {
                self.measure(work, &path)?;
            } else if meta.is_file() {
                rustix::fs::access(&path, rustix::fs::Access::READ_OK)
                    .map_err(|error| unreadable(&path, error.into()))?;
            }
        }
        Ok(())
    }

    fn disk_size(&self, wanted: Option<u64>) -> Result<u64> {
        let needed = (self.bytes + self.bytes / 8 + self.entries * 384 + 48 * MIB).next_multiple_of(MIB);
        match wanted {
            None => Ok(DEFAULT_SIZE.max((2 * needed + GIB).next_multiple_of(GIB))),
            Some(size) if size > LARGEST => {
                Err(Error::new(ErrorKind::InvalidArgument, format!("a disk of {} MiB is too large", size / MIB))
                    .hint(format!("give at most {} MiB", LARGEST / MIB)))
            }
            Some(size) if size >= needed.max(SMALLEST) => Ok(size / MIB * MIB),
            Some(size) => Err(too_small(size, needed.max(SMALLEST))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_fakeroot_is_read() {
        let line = "dev=fe00,ino=10027201,mode=40755,uid=5,gid=6,nlink=2,rdev=0";
        assert_eq!(remembered(line, 10_027_201), Some((0o040_755, (5, 6))));
        assert_eq!(remembered(line, 1), None);
        assert_eq!(remembered("something else", 1), None);
    }

    #[test]
    fn sizes_leave_room_and_too_small_is_refused() {
        let content = Content { entries: 1000, bytes: 200 * MIB };
        assert_eq!(content.disk_size(None).unwrap(), 4 * GIB);
        let large = Content { entries: 1000, bytes: 10 * GIB };
        assert!(large.disk_size(None).unwrap() >= 20 * GIB);
        assert_eq!(content.disk_size(Some(512 * MIB + 5)).unwrap(), 512 * MIB);
        let error = content.disk_size(Some(210 * MIB)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidArgument);
        assert!(error.next_step().unwrap().contains("MiB"));
        let error = content.disk_size(Some(LARGEST + 1)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidArgument);
        assert!(error.next_step().unwrap().contains("at most"));
    }
}
