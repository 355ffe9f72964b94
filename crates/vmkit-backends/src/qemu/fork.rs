//! The first start of a clone, when it goes on from a template instead of booting.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Instant, SystemTime};

use rustix::fs::{SeekFrom, ioctl_ficlone, seek};
use tracing::debug;
use vmkit::{Birth, ConsoleSinks, Error, ErrorKind, Origin, Phase, Result};
use vmkit_agent::client::Fork;

use super::driver::QemuDriver;
use super::exit;
use super::layout::{self, DISK, FRESH, LAYER};
use super::probe::now;
use super::qcow2::{self, Base};
use super::qmp::{Memory, Qmp};
use super::template::Template;

const NOT_RENEWED: &str =
    "the details are the end of its console, with what a hook said; one that boots needs no renewal: --no-template";

const COPY_DAMAGED: &str = "what it was to be a copy of is damaged, or from another QEMU: fork the original again";

const NO_COPY: &str =
    "the details are the end of its console, with what a hook said: mend that in the original, and fork it again";

/// Where a start's time went.
pub(super) struct Laps {
    since: Instant,
    phases: Vec<Phase>,
}

impl Laps {
    pub(super) fn new() -> Laps {
        Laps { since: Instant::now(), phases: Vec::new() }
    }

    pub(super) fn lap(&mut self, name: &str) {
        let ms = self.since.elapsed().as_secs_f64() * 1000.0;
        self.since = Instant::now();
        debug!(phase = name, ms, "where the time of a start goes");
        self.phases.push(phase(name, ms));
    }

    pub(super) fn birth(self, how: Origin, template: Option<&Template>) -> Birth {
        let copy_of = template.and_then(|template| template.info.copy_of.as_ref());
        let mut phases = self.phases;
        // Not its own, and the first of it all.
        let paused = copy_of.map(|original| original.stood_still.as_secs_f64() * 1000.0);
        phases.splice(0..0, paused.map(|ms| phase("original paused", ms)));
        Birth {
            how,
            template: template.map(|template| template.info.key.clone()),
            copy_of: copy_of.map(|original| original.id.clone()),
            note: None,
            at: u64::try_from(now().as_millis()).unwrap_or(u64::MAX),
            unused: copy_of.is_none(),
            renewed: Vec::new(),
            phases,
        }
    }
}

fn phase(name: &str, ms: f64) -> Phase {
    Phase { name: name.to_owned(), ms: (ms * 100.0).round() / 100.0 }
}

impl QemuDriver {
    /// Goes on from a template, as another than it.
    pub(super) async fn fork(
        &mut self,
        template: &Template,
        program: &Path,
        mut laps: Laps,
        console: ConsoleSinks,
    ) -> Result<()> {
        self.spawn_to_fork(template, program, &mut laps).await?;
        let from = self.said();
        self.follow(0, console);
        laps.lap("process");
        let (dir, line, state) = (self.dir.clone(), self.line.clone(), template.state());
        let load = async {
            let mut qmp = Qmp::when_up(&dir).await?;
            let wire = line.wire().await?;
            laps.lap("control");
            qmp.load(&state, Memory::Elsewhere).await?;
            laps.lap("load");
            Ok((qmp, wire))
        };
        let damaged = || match template.info.copy_of {
            Some(_) => COPY_DAMAGED.to_owned(),
            None => {
                let key = &template.info.key;
                format!("its template is damaged, or from another QEMU: `vmkit template rm {key}` and try again")
            }
        };
        let (mut qmp, wire) = self.until(from, load).await.map_err(|error| match error.kind() {
            ErrorKind::TimedOut => error,
            _ if exit::is_killed(&error) => error,
            _ => error.hint(damaged()),
        })?;
        // From here on its disk is its own: the next start boots from it. One that is a copy is tried anew as a copy, or not at all.
        if template.info.copy_of.is_none() {
            layout::remove(&self.file(FRESH))?;
        }
        let who = Fork {
            hostname: self.id.to_string(),
            machine_id: vmkit_agent::client::nonce(),
            boot_id: vmkit_agent::client::nonce(),
        };
        let line = self.line.clone();
        let goes_on = async {
            let since = SystemTime::now();
            qmp.cont().await?;
            // Nobody gets at it before it is somebody of its own.
            line.renewed(&mut qmp, wire, since, Some(who)).await
        };
        let renewed = self.until(from, goes_on).await.map_err(|error| match error.kind() {
            ErrorKind::Corrupt => error.hint(damaged()),
            ErrorKind::Backend if template.info.copy_of.is_some() => error.hint(NO_COPY),
            ErrorKind::Backend => error.hint(NOT_RENEWED),
            _ => error,
        })?;
        laps.lap("identity");
        layout::write_birth(&self.dir, &Birth { renewed, ..laps.birth(Origin::Fork, Some(template)) });
        layout::mark_ready(&self.dir)?;
        // Last: a copy that is not Running and not fresh is no copy.
        layout::remove(&self.file(FRESH))
    }

    /// Puts the machine's disk, which was never used, on the template's.
    pub(super) fn take_layer(&self, template: &Template) -> Result<()> {
        let Some(base) = &self.image()?.disk else { return Ok(()) };
        let (layer, from) = (self.file(LAYER), template.disk());
        link(&from, &layer)?;
        let size =
            fs::metadata(base).map_err(|error| Error::io(format!("{} cannot be read", base.display()), error))?;
        self.write_disk(Base::Overlay(Path::new(LAYER)), size.len())
    }

    /// A machine that never ran and is to boot: nothing of a template is under its disk.
    pub(super) fn leave_layer(&self) -> Result<()> {
        if !self.file(LAYER).exists() {
            return Ok(());
        }
        if let Some(base) = &self.image()?.disk {
            let size =
                fs::metadata(base).map_err(|error| Error::io(format!("{} cannot be read", base.display()), error))?;
            self.write_disk(Base::Raw(base), size.len())?;
        }
        layout::remove(&self.file(LAYER))
    }

    /// In one step: a machine always has a disk.
    fn write_disk(&self, base: Base<'_>, size: u64) -> Result<()> {
        let aside = self.file("disk.tmp");
        let written = File::create(&aside).and_then(|file| qcow2::write_overlay(&file, base, size));
        written.map_err(|error| Error::io(format!("{} cannot be written", aside.display()), error))?;
        layout::rename(&aside, &self.file(DISK))
    }
}

/// Makes a file that nobody writes to be at another place too.
pub(super) fn link(from: &Path, to: &Path) -> Result<()> {
    layout::remove(to)?;
    match fs::hard_link(from, to) {
        // On another file system, or one without links.
        Err(error) if error.raw_os_error() != Some(rustix::io::Errno::NOENT.raw_os_error()) => {
            copy_sparse(from, to).and_then(|()| File::open(to)?.sync_all())
        }
        linked => linked,
    }
    .map_err(|error| Error::io(format!("{} cannot be made", to.display()), error))
}

/// Copies what there is of a file with holes; shares it instead where the file system can.
pub(super) fn copy_sparse(from: &Path, to: &Path) -> io::Result<()> {
    let source = File::open(from)?;
    let copy = File::options().read(true).write(true).create(true).truncate(true).open(to)?;
    if ioctl_ficlone(&copy, &source).is_ok() {
        return Ok(());
    }
    let size = source.metadata()?.len();
    copy.set_len(size)?;
    let mut chunk = vec![0; 1 << 20];
    let mut at = 0;
    while at < size {
        let data = match seek(&source, SeekFrom::Data(at)) {
            Ok(data) => data,
            // Nothing but a hole from here on.
            Err(rustix::io::Errno::NXIO) => break,
            Err(error) => return Err(error.into()),
        };
        let hole = seek(&source, SeekFrom::Hole(data))?;
        at = data;
        while at < hole {
            let wanted = usize::try_from(hole - at).unwrap_or(usize::MAX).min(chunk.len());
            source.read_exact_at(&mut chunk[..wanted], at)?;
            copy.write_all_at(&chunk[..wanted], at)?;
            at += wanted as u64;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copy_has_the_same_bytes_and_the_same_holes() {
        use std::os::unix::fs::MetadataExt;
        let dir = tempfile::tempdir().unwrap();
        let (from, to) = (dir.path().join("from"), dir.path().join("to"));
        let file = File::create(&from).unwrap();
        file.set_len(64 << 20).unwrap();
        file.write_all_at(b"begin", 0).unwrap();
        file.write_all_at(&vec![7; 3 << 20], 20 << 20).unwrap();
        copy_sparse(&from, &to).unwrap();
        assert!(fs::read(&from).unwrap() == fs::read(&to).unwrap());
        assert!(fs::metadata(&to).unwrap().blocks() * 512 < 8 << 20, "the copy has no holes");
        // An older and longer copy leaves nothing.
        fs::write(&from, "short").unwrap();
        copy_sparse(&from, &to).unwrap();
        assert_eq!(fs::read(&to).unwrap(), b"short");
    }
}
