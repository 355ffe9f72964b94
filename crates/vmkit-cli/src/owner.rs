//! Whom a throw-away machine belongs to.
//!
//! Before `run` makes a machine it makes a file of that name and holds a lock on it until the machine is deleted. In the file is
//! a word that the machine carries as a label. A file that nobody holds belongs to a `run` that was killed: whoever comes next
//! deletes the machine of that name, if it carries that word, and then the file.
//!
//! The lock is one of a process, and not of a descriptor as the others are: a `run` that is killed while it starts QEMU leaves a child
//! that has every descriptor until its `exec`, and would hold it a moment longer.

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{FlockOperation, fcntl_lock};
use vmkit::{Error, ErrorKind, Id, Result, Spec, cleanup};

use crate::context::Context;
use crate::run::CLEANUP_LIMIT;

/// Marks the machines of `run`: which run made it.
const LABEL: &str = "vmkit.run";

/// What tells a run's machine from others of its name.
#[derive(Debug)]
pub struct Owner {
    word: String,
    held: Option<(File, PathBuf)>,
}

impl Owner {
    /// A run whose machine is to stay: nobody deletes it but the run itself, when it fails.
    pub fn nobody() -> Result<Owner> {
        Ok(Owner { word: random()?, held: None })
    }

    /// Claims a machine that is about to be made.
    pub fn claim(dir: &Path, id: &Id) -> Result<Owner> {
        let (word, dir) = (random()?, dir.join("run"));
        let path = dir.join(id.as_str());
        let failed = |error| Error::io(format!("{} cannot be written", path.display()), error);
        fs::create_dir_all(&dir).map_err(failed)?;
        loop {
            let file = File::options().write(true).create(true).truncate(false).open(&path).map_err(failed)?;
            if fcntl_lock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
                let error = Error::new(ErrorKind::AlreadyExists, "another run has a machine of that name");
                return Err(error.on(id.as_str()).hint("choose another name"));
            }
            // A sweep may have taken it for a dead one's before it was locked.
            let ours = file.metadata().map_err(failed)?.ino();
            if !fs::metadata(&path).is_ok_and(|there| there.ino() == ours) {
                continue;
            }
            if let Err(error) = file.set_len(0).and_then(|()| file.write_all_at(word.as_bytes(), 0)) {
                let _ = fs::remove_file(&path);
                return Err(failed(error));
            }
            return Ok(Owner { word, held: Some((file, path)) });
        }
    }

    /// Marks the machine that is to be made.
    pub fn mark(&self, spec: Spec) -> Spec {
        spec.label(LABEL, &self.word)
    }

    /// Deletes the machine of that name, if this run made it.
    pub async fn remove(&self, context: &Context, id: &Id) -> Result<()> {
        match context.host.adopt(id).await {
            Ok(instance) if instance.spec().labels.get(LABEL) == Some(&self.word) => {
                cleanup(&instance, Duration::ZERO, CLEANUP_LIMIT).await
            }
            Ok(_) => Ok(()),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// The machine is gone, or is to stay: nobody needs to look after it.
    pub fn release(self) {
        if let Some((_, path)) = &self.held {
            let _ = fs::remove_file(path);
        }
    }
}

impl Drop for Owner {
    fn drop(&mut self) {
        if let Some((file, _)) = &self.held {
            let _ = fcntl_lock(file, FlockOperation::Unlock);
        }
    }
}

/// Deletes the machines of `run`s that died, of those that were to become templates, and copies that were not finished.
pub async fn sweep(context: &Context) {
    // Nobody may have run anything yet.
    let entries = fs::read_dir(context.dir.join("run")).into_iter().flatten();
    for path in entries.flatten().map(|entry| entry.path()) {
        let Some(id) = path.file_name().and_then(|name| name.to_str()).and_then(|name| Id::new(name).ok()) else {
            continue;
        };
        let Ok(file) = File::options().read(true).write(true).open(&path) else { continue };
        if fcntl_lock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
            continue;
        }
        // Through this descriptor: closing another one of the file would let go of the lock.
        let mut word = String::new();
        let _ = (&file).read_to_string(&mut word);
        let owner = Owner { word, held: Some((file, path)) };
        match owner.remove(context, &id).await {
            Ok(()) => owner.release(),
            Err(error) => {
                context.output.warn(format!("a machine that an earlier run left could not be deleted: {error}"));
            }
        }
    }
    if let Err(error) = context.qemu().sweep_templates().await {
        context.output.warn(format!(
            "what is left of a template or of copies that were not finished could not be removed: {error}"
        ));
    }
}

/// Eight hexadecimal digits.
pub fn random() -> Result<String> {
    let mut bytes = [0; 4];
    rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())
        .map_err(|error| Error::io("no random numbers", error.into()))?;
    Ok(format!("{:08x}", u32::from_le_bytes(bytes)))
}
