//! A machine that was made ahead of time becomes what it is to be.

use std::fs::{self, File, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::Path;
use std::sync::Mutex;

use super::lock;
use crate::protocol::{Bind, Failure};

/// Applies all of it, files first: a host name is not worth much without them. Errors contain no values and no contents.
pub(super) fn apply(binding: Bind, env: &Mutex<Vec<(String, String)>>) -> Result<(), (Failure, String)> {
    for (path, mode, content) in &binding.files {
        if !path.starts_with('/') || path.ends_with('/') {
            return Err((Failure::Invalid, format!("the file {path:?} has no absolute path")));
        }
        write(Path::new(path), *mode, content)
            .map_err(|error| (Failure::Other, format!("the guest could not write {path:?}: {error}")))?;
    }
    if let Some((key, _)) = binding.env.iter().find(|(key, _)| key.is_empty() || key.contains(['=', '\0'])) {
        return Err((Failure::Invalid, format!("{key:?} cannot be a variable's name")));
    }
    if let Some(name) = &binding.hostname {
        let other = |error: io::Error| (Failure::Other, format!("the guest could not be named {name:?}: {error}"));
        rustix::system::sethostname(name.as_bytes()).map_err(|error| other(error.into()))?;
        // For what reads it from there; a root file system that cannot be written to keeps its own.
        let _ = fs::write("/etc/hostname", format!("{name}\n"));
    }
    lock(env).extend(binding.env);
    Ok(())
}

/// In one step: nobody sees half a file, or one that others can read for a moment.
fn write(path: &Path, mode: u32, content: &[u8]) -> io::Result<()> {
    let dir = path.parent().unwrap_or(Path::new("/"));
    fs::create_dir_all(dir)?;
    let aside = dir.join(format!(".vmkit-{}", std::process::id()));
    let written = (|| {
        let mut file = File::options().write(true).create(true).truncate(true).mode(0o600).open(&aside)?;
        file.write_all(content)?;
        file.set_permissions(Permissions::from_mode(mode & 0o7777))?;
        fs::rename(&aside, path)
    })();
    if written.is_err() {
        let _ = fs::remove_file(&aside);
    }
    written
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_and_variables() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("new/secret").to_str().unwrap().to_owned();
        let env = Mutex::default();
        let binding = Bind {
            files: vec![(path.clone(), 0o640, b"word".to_vec())],
            env: vec![("A".into(), "b".into())],
            ..Bind::default()
        };
        apply(binding, &env).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"word");
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o7777, 0o640);
        assert_eq!(*lock(&env), [("A".to_owned(), "b".to_owned())]);
        assert_eq!(fs::read_dir(dir.path().join("new")).unwrap().count(), 1, "something is left beside it");
    }

    #[test]
    fn what_makes_no_sense_is_said_without_values() {
        let env = Mutex::default();
        let file = Bind { files: vec![("here".into(), 0o600, b"hunter2".to_vec())], ..Bind::default() };
        let (failure, message) = apply(file, &env).unwrap_err();
        assert_eq!(failure, Failure::Invalid);
        assert!(!message.contains("hunter2"));
        let name = Bind { env: vec![("A=B".into(), "hunter2".into())], ..Bind::default() };
        let (failure, message) = apply(name, &env).unwrap_err();
        assert_eq!(failure, Failure::Invalid);
        assert!(!message.contains("hunter2"));
        assert!(lock(&env).is_empty());
    }
}
