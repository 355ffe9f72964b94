//! The name by which programs know a machine: 32 hexadecimal digits in `/etc/machine-id`.

use std::fs;
use std::io;
use std::path::Path;

use rustix::rand::{GetRandomFlags, getrandom};

const FILE: &str = "etc/machine-id";
/// Where older programs look; mostly a link to the other.
const OLDER: &str = "var/lib/dbus/machine-id";

/// Gives a system one that has none yet. Images say so by an empty file, or by the word `uninitialized`.
pub(super) fn first(root: &Path) -> io::Result<()> {
    let known = fs::read_to_string(root.join(FILE)).unwrap_or_default();
    match known.trim() {
        "" | "uninitialized" => write(root, true),
        _ => Ok(()),
    }
}

/// Gives a system another, if it has one at all.
pub(super) fn renew(root: &Path) -> io::Result<bool> {
    let there = root.join(FILE).exists();
    if there {
        write(root, false)?;
    }
    Ok(there)
}

fn write(root: &Path, early: bool) -> io::Result<()> {
    let mut bytes = [0; 16];
    // Early in a boot, a kernel may have none to give: then the next boot sees to it.
    let flags = if early { GetRandomFlags::NONBLOCK } else { GetRandomFlags::empty() };
    getrandom(&mut bytes[..], flags)?;
    let text: String = bytes.iter().map(|byte| format!("{byte:02x}")).chain(["\n".to_owned()]).collect();
    fs::write(root.join(FILE), &text)?;
    let older = root.join(OLDER);
    if older.symlink_metadata().is_ok_and(|meta| meta.is_file()) {
        fs::write(older, text)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_system_has_one_from_its_first_boot_on_and_another_when_it_is_another() {
        let root = tempfile::tempdir().unwrap();
        let id = || fs::read_to_string(root.path().join(FILE)).unwrap();
        assert!(!renew(root.path()).unwrap());
        fs::create_dir_all(root.path().join("etc")).unwrap();
        fs::create_dir_all(root.path().join("var/lib/dbus")).unwrap();
        first(root.path()).unwrap();
        let given = id();
        assert_eq!(given.len(), 33);
        assert!(given.trim().chars().all(|c| c.is_ascii_hexdigit()));
        first(root.path()).unwrap();
        assert_eq!(id(), given);
        fs::write(root.path().join(OLDER), &given).unwrap();
        assert!(renew(root.path()).unwrap());
        assert_ne!(id(), given);
        assert_eq!(fs::read_to_string(root.path().join(OLDER)).unwrap(), id());
        fs::write(root.path().join(FILE), "uninitialized\n").unwrap();
        first(root.path()).unwrap();
        assert_eq!(id().len(), 33);
    }
}
