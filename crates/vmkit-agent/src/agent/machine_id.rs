//! The name by which programs know a machine: 32 hexadecimal digits in `/etc/machine-id`.
//!
//! Where many are to go on from one, a file in memory lies over the one on the disk: giving each another is then no work for a
//! file system. The disk's is empty until the new one is written there, so that no machine boots with the name of what it was
//! forked from.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use rustix::mount::mount_bind;
use rustix::rand::{GetRandomFlags, getrandom};

const FILE: &str = "etc/machine-id";
/// Where older programs look; mostly a link to the other.
const OLDER: &str = "var/lib/dbus/machine-id";
/// Where it is in memory.
const SHOWN: &str = "/run/vmkit/machine-id";
/// With its line's end.
const LENGTH: usize = 33;

/// Gives a system one that has none yet. Images say so by an empty file, or by the word `uninitialized`.
pub(super) fn first(root: &Path) -> io::Result<()> {
    let known = fs::read_to_string(root.join(FILE)).unwrap_or_default();
    match known.trim() {
        "" | "uninitialized" => {
            let mut id = [0; 16];
            // Early in a boot, a kernel may have none to give: then the next boot sees to it.
            getrandom(&mut id[..], GetRandomFlags::NONBLOCK)?;
            write(root, id)
        }
        _ => Ok(()),
    }
}

/// Gives a system another, if it has one at all.
pub(super) fn renew(root: &Path, id: [u8; 16]) -> io::Result<bool> {
    let there = root.join(FILE).exists();
    if there {
        write(root, id)?;
    }
    Ok(there)
}

fn write(root: &Path, id: [u8; 16]) -> io::Result<()> {
    fs::write(root.join(FILE), text(id))?;
    let older = root.join(OLDER);
    if older.symlink_metadata().is_ok_and(|meta| meta.is_file()) {
        fs::write(older, text(id))?;
    }
    Ok(())
}

fn text(id: [u8; 16]) -> [u8; LENGTH] {
    let mut text = [b'\n'; LENGTH];
    text[..32].copy_from_slice(&digits(id));
    text
}

/// In hexadecimal.
pub(super) fn digits(id: [u8; 16]) -> [u8; 32] {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let mut text = [0; 32];
    for (digits, byte) in text.chunks_exact_mut(2).zip(id) {
        digits[0] = DIGITS[usize::from(byte >> 4)];
        digits[1] = DIGITS[usize::from(byte & 15)];
    }
    text
}

/// One that is ready to be exchanged.
#[derive(Debug)]
pub(super) struct MachineId {
    /// What programs see.
    shown: File,
    /// What the next boot sees.
    kept: Vec<File>,
}

impl MachineId {
    /// `None` for a system that has none.
    pub(super) fn prepare() -> io::Result<Option<MachineId>> {
        let root = Path::new("/");
        let Ok(now) = fs::read(root.join(FILE)) else { return Ok(None) };
        let is_file = |path: &Path| path.symlink_metadata().is_ok_and(|meta| meta.is_file());
        let open = |path: &Path| File::options().read(true).write(true).open(path);
        let places: Vec<_> = [FILE, OLDER].iter().map(|name| root.join(name)).filter(|path| is_file(path)).collect();
        let kept = places.iter().map(|path| open(path)).collect::<io::Result<Vec<_>>>()?;
        fs::create_dir_all("/run/vmkit")?;
        fs::write(SHOWN, &now)?;
        let shown = open(Path::new(SHOWN))?;
        for place in &places {
            mount_bind(SHOWN, place)?;
        }
        let id = MachineId { shown, kept };
        id.clear()?;
        Ok(Some(id))
    }

    /// Nobody boots with this one any more, until it is settled.
    pub(super) fn clear(&self) -> io::Result<()> {
        self.kept.iter().try_for_each(|file| file.set_len(0))
    }

    /// From now on it is another.
    pub(super) fn renew(&self, id: [u8; 16]) -> io::Result<bool> {
        self.shown.write_all_at(&text(id), 0)?;
        Ok(true)
    }

    /// And so it is after the next boot.
    pub(super) fn settle(&self) -> io::Result<()> {
        let mut now = vec![0; LENGTH];
        let length = self.shown.read_at(&mut now, 0)?;
        for file in &self.kept {
            file.write_all_at(&now[..length], 0)?;
            file.sync_data()?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_system_has_one_from_its_first_boot_on_and_another_when_it_is_another() {
        let root = tempfile::tempdir().unwrap();
        let id = || fs::read_to_string(root.path().join(FILE)).unwrap();
        assert!(!renew(root.path(), [1; 16]).unwrap());
        fs::create_dir_all(root.path().join("etc")).unwrap();
        fs::create_dir_all(root.path().join("var/lib/dbus")).unwrap();
        first(root.path()).unwrap();
        let given = id();
        assert_eq!(given.len(), LENGTH);
        assert!(given.trim().chars().all(|c| c.is_ascii_hexdigit()));
        first(root.path()).unwrap();
        assert_eq!(id(), given);
        fs::write(root.path().join(OLDER), &given).unwrap();
        assert!(renew(root.path(), [0xA5; 16]).unwrap());
        assert_eq!(id(), "a5".repeat(16) + "\n");
        assert_eq!(fs::read_to_string(root.path().join(OLDER)).unwrap(), id());
        fs::write(root.path().join(FILE), "uninitialized\n").unwrap();
        first(root.path()).unwrap();
        assert_eq!(id().len(), LENGTH);
    }
}
