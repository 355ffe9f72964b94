//! What a machine is on disk, and what can be told from it.
//!
//! ```text
//! DIR/NAME/            the machine; complete or not there
//!   vm.json            what it was made from
//!   disk.qcow2         its overlay on the image's disk, or on layer.qcow2
//!   layer.qcow2        the disk of the template that it was forked from
//!   fresh              it has never run
//!   birth.json         how it came to be: what from, what was renewed, where the time went
//!   memory             its memory while it runs or is suspended; a fork that shares its template's has none
//!   state              its saved execution, complete: renamed into place, renamed away before the guest goes on
//!   state.apart memory.apart
//!                      the same of a fork that had no memory of its own: they become `state` and `memory` when it goes on
//!   state.full         the same, with the memory in it
//!   run.json           its process: pid, start time, boot; whether its guest was ready; what it waits for, started ahead of time
//!   serial.log qemu.log qmp.sock qmp2.sock agent.N.sock agent.N.lock
//! DIR/.staging/NAME    being cloned
//! DIR/.trash/NAME      being deleted
//! DIR/.locks/NAME      who operates on it
//! DIR/.pools/NAME      which process has the pool of that name
//! ```

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use vmkit::{Birth, Error, ErrorKind, Fact, Id, Result, Spec};

use super::prespawn::Goal;
use super::qmp::Memory;
use crate::process::{Identity, working_in};

pub(crate) const DISK: &str = "disk.qcow2";
pub(crate) const MEMORY: &str = "memory";
pub(crate) const STATE: &str = "state";
/// A saved execution with the memory in it.
pub(crate) const STATE_FULL: &str = "state.full";
/// A saved execution of a guest that had no memory file, and the memory file that it has from now on. Not called that yet: what runs
/// and has none is known by that.
pub(crate) const STATE_APART: &str = "state.apart";
pub(crate) const MEMORY_APART: &str = "memory.apart";
pub(crate) const STATE_PARTIAL: &str = "state.tmp";
pub(crate) const STATE_SPENT: &str = "state.spent";
/// What there may be of saved executions, but for the memory, which a guest may be running in.
pub(crate) const SAVED: [&str; 6] = [STATE, STATE_APART, STATE_FULL, STATE_PARTIAL, STATE_SPENT, MEMORY_APART];
pub(crate) const SERIAL: &str = "serial.log";
pub(crate) const OUTPUT: &str = "qemu.log";
pub(crate) const QMP: &str = "qmp.sock";
/// A second way in, for whoever looks from outside.
pub(crate) const QMP_PROBE: &str = "qmp2.sock";
pub(crate) const LAYER: &str = "layer.qcow2";
pub(crate) const FRESH: &str = "fresh";
const BIRTH: &str = "birth.json";
/// Why it was ended, when nobody asked for that. Until it is started again.
pub(crate) const ENDED: &str = "ended";
const RECORD: &str = "vm.json";
const RUN: &str = "run.json";
/// Rises when `vm.json` changes in a way that an older vmkit would misread.
const VERSION: u32 = 1;

/// Where the machines of one directory are.
#[derive(Clone, Debug)]
pub(crate) struct Layout {
    pub dir: PathBuf,
}

impl Layout {
    pub fn machine(&self, id: &Id) -> PathBuf {
        self.dir.join(id.as_str())
    }

    pub fn staging(&self, id: &Id) -> PathBuf {
        self.dir.join(".staging").join(id.as_str())
    }

    pub fn trash(&self, id: &Id) -> PathBuf {
        self.dir.join(".trash").join(id.as_str())
    }

    pub fn lock(&self, id: &Id) -> PathBuf {
        self.dir.join(".locks").join(id.as_str())
    }

    pub fn pool(&self, name: &Id) -> PathBuf {
        self.dir.join(".pools").join(name.as_str())
    }

    /// The names that there are locks of.
    pub fn locks(&self) -> Result<Vec<Id>> {
        let dir = self.dir.join(".locks");
        let failed = |error| Error::io(format!("{} cannot be read", dir.display()), error);
        let mut ids = Vec::new();
        for entry in fs::read_dir(&dir).map_err(failed)? {
            ids.extend(entry.map_err(failed)?.file_name().to_str().and_then(|name| Id::new(name).ok()));
        }
        Ok(ids)
    }

    /// Every machine that is there; what was not made by us is none.
    pub fn machines(&self) -> Result<Vec<Id>> {
        let failed = |error| Error::io(format!("{} cannot be read", self.dir.display()), error);
        let mut ids = Vec::new();
        for part in ["", ".staging", ".trash"] {
            for entry in fs::read_dir(self.dir.join(part)).map_err(failed)? {
                let name = entry.map_err(failed)?.file_name();
                let Some(id) = name.to_str().and_then(|name| Id::new(name).ok()) else { continue };
                if !part.is_empty() || is_ours(&self.machine(&id)) {
                    ids.push(id);
                }
            }
        }
        ids.sort();
        ids.dedup();
        Ok(ids)
    }
}

/// What a machine was made from.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Record {
    version: u32,
    pub spec: Spec,
}

/// A machine's process.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Run {
    pub process: Identity,
    pub accelerator: String,
    /// Milliseconds since 1970.
    pub started: u64,
    /// Whether its guest's agent has answered.
    pub ready: bool,
    /// What it waits for: then the machine is off.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub waits: Option<Goal>,
}

pub(crate) fn make_dir(path: &Path) -> Result<()> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .map_err(|error| Error::io(format!("the directory {} cannot be made", path.display()), error))
}

/// Whether we made what is there; also when it is damaged.
pub(crate) fn is_ours(dir: &Path) -> bool {
    dir.join(RECORD).symlink_metadata().is_ok()
}

pub(crate) fn write_record(dir: &Path, spec: &Spec) -> Result<()> {
    let path = dir.join(RECORD);
    let failed = |error| Error::io(format!("{} cannot be written", path.display()), error);
    let record = Record { version: VERSION, spec: spec.clone() };
    let text = serde_json::to_vec_pretty(&record).map_err(|error| failed(error.into()))?;
    fs::write(&path, text).map_err(failed)?;
    sync(&path)
}

/// # Errors
/// [`ErrorKind::Corrupt`] for a record that cannot be read as one.
pub(crate) fn read_record(dir: &Path) -> Result<Record> {
    let path = dir.join(RECORD);
    let corrupt = |why: String| {
        Error::new(ErrorKind::Corrupt, format!("the machine's record {} is damaged: {why}", path.display()))
            .hint("delete the machine and make it again; nothing else of it is lost until then")
    };
    let text = match fs::read(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(corrupt("it is missing".into())),
        Err(error) => return Err(Error::io(format!("{} cannot be read", path.display()), error)),
    };
    let record: Record = serde_json::from_slice(&text).map_err(|error| corrupt(error.to_string()))?;
    match record.version {
        VERSION => Ok(record),
        other => Err(corrupt(format!("it is of version {other}, and this vmkit knows {VERSION}"))),
    }
}

/// Replaces the process's record in one step. It need not survive a power cut: the process does not.
pub(crate) fn write_run(dir: &Path, run: &Run) -> Result<()> {
    let (path, aside) = (dir.join(RUN), dir.join("run.json.tmp"));
    let failed = |error| Error::io(format!("{} cannot be written", path.display()), error);
    let text = serde_json::to_vec(run).map_err(|error| failed(error.into()))?;
    fs::write(&aside, text).map_err(failed)?;
    fs::rename(&aside, &path).map_err(failed)
}

/// The guest is up: from here on the machine is Running for everybody.
pub(crate) fn mark_ready(dir: &Path) -> Result<()> {
    match read_run(dir) {
        Some(run) => write_run(dir, &Run { ready: true, ..run }),
        None => Err(Error::new(ErrorKind::Corrupt, "the record of the machine's process has vanished")),
    }
}

/// The process of this machine: it runs it, or waits to. The record alone proves nothing: it may be a copy of another machine's.
pub(crate) fn live_run(dir: &Path) -> Option<Run> {
    read_run(dir).filter(|run| run.process.is_alive() && run.process.works_in(dir))
}

/// The same of a machine that is on: a process that waits executes nothing.
pub(crate) fn running(dir: &Path) -> Option<Run> {
    live_run(dir).filter(|run| run.waits.is_none())
}

/// The process that was last started, whether it runs or not.
pub(crate) fn read_run(dir: &Path) -> Option<Run> {
    read_json(&dir.join(RUN))
}

/// For people only: a machine without it is as good. `why`: a sentence of the machine.
pub(crate) fn write_ended(dir: &Path, why: &str, error: &Error) {
    let cause = std::error::Error::source(error).map(|cause| format!(": {cause}")).unwrap_or_default();
    let text = format!(
        "it was ended, because {why}: {error}{cause}; what ran in it is lost, and a start boots it from its disk"
    );
    if let Err(error) = fs::write(dir.join(ENDED), text) {
        tracing::debug!(dir = %dir.display(), %error, "why a machine was ended is not on record");
    }
}

pub(crate) fn read_ended(dir: &Path) -> Option<String> {
    fs::read_to_string(dir.join(ENDED)).ok()
}

/// For people only: a machine without it is as good.
pub(crate) fn write_birth(dir: &Path, birth: &Birth) {
    let text = serde_json::to_vec_pretty(birth).unwrap_or_default();
    if let Err(error) = fs::write(dir.join(BIRTH), text) {
        tracing::debug!(dir = %dir.display(), %error, "how a machine came to be is not on record");
    }
}

pub(crate) fn read_birth(dir: &Path) -> Option<Birth> {
    read_json(&dir.join(BIRTH))
}

pub(crate) fn read_json<T: DeserializeOwned>(path: &Path) -> Option<T> {
    serde_json::from_slice(&fs::read(path).ok()?).ok()
}

/// What is there now.
pub(crate) fn look(dir: &Path) -> Fact {
    if dir.symlink_metadata().is_err() {
        return Fact::Absent;
    }
    if read_record(dir).is_err() || !dir.join(DISK).is_file() {
        return Fact::Broken;
    }
    match (running(dir), saved(dir)) {
        (None, _) if !strays(dir).is_empty() => Fact::Broken,
        (Some(run), None) if run.ready => Fact::Running,
        (Some(_), _) => Fact::Broken,
        (None, Some((_, memory))) if !has_memory(dir, memory) => Fact::Broken,
        (None, Some(_)) => Fact::Suspended,
        (None, None) => Fact::Stopped,
    }
}

/// The QEMUs of a machine whose record of its process is missing or damaged. Looking for them takes a look at every process.
fn strays(dir: &Path) -> Vec<u32> {
    if read_run(dir).is_some() || dir.join(FRESH).exists() {
        return Vec::new();
    }
    qemus_in(dir)
}

/// Every QEMU that works in a directory, as far as we may see. Somebody's shell may stand there too.
pub(crate) fn qemus_in(dir: &Path) -> Vec<u32> {
    let is_qemu = |pid: &u32| {
        let program = fs::read_link(format!("/proc/{pid}/exe")).unwrap_or_default();
        program.file_name().and_then(|name| name.to_str()).is_some_and(|name| name.starts_with("qemu-system"))
    };
    working_in(dir).into_iter().filter(is_qemu).collect()
}

/// The saved execution, and where its memory is.
pub(crate) fn saved(dir: &Path) -> Option<(&'static str, Memory)> {
    let kinds = [(STATE, Memory::Elsewhere), (STATE_APART, Memory::Apart), (STATE_FULL, Memory::Within)];
    kinds.into_iter().find(|(file, _)| dir.join(file).is_file())
}

/// Whether there is memory of a machine that nobody goes on from: it ended by itself, or a start of it was cut off.
pub(crate) fn has_memory_of_nobody(dir: &Path) -> bool {
    let of_nobody = || live_run(dir).is_none() && saved(dir).is_none_or(|(_, memory)| memory == Memory::Within);
    // Last, as it looks at every process: one whose record is damaged has it all the same.
    [MEMORY, MEMORY_APART].iter().any(|file| dir.join(file).exists()) && of_nobody() && qemus_in(dir).is_empty()
}

/// Removes that: gigabytes, and all that was in them. To be called under the machine's lock.
pub(crate) fn sweep_memory(dir: &Path) {
    if has_memory_of_nobody(dir) {
        let _ = [MEMORY, MEMORY_APART].iter().try_for_each(|file| remove(&dir.join(file)));
    }
}

/// Whether the memory of a saved execution is there.
fn has_memory(dir: &Path, memory: Memory) -> bool {
    let there = |file| dir.join(file).is_file();
    match memory {
        Memory::Elsewhere => there(MEMORY),
        // It was on its way when somebody died.
        Memory::Apart => there(MEMORY_APART) || there(MEMORY),
        Memory::Within => true,
    }
}

/// Whether a machine is [`Fact::Broken`] by nothing but a saved execution whose memory is gone: without that it is Stopped.
pub(crate) fn lost_memory(dir: &Path) -> bool {
    let lost = saved(dir).is_some_and(|(_, memory)| !has_memory(dir, memory));
    let whole = read_record(dir).is_ok() && dir.join(DISK).is_file();
    lost && whole && running(dir).is_none() && strays(dir).is_empty()
}

/// Makes what was taken apart the machine's state and memory. Done as often as it takes.
pub(crate) fn put_in_place(dir: &Path) -> Result<()> {
    if dir.join(MEMORY_APART).is_file() {
        rename(&dir.join(MEMORY_APART), &dir.join(MEMORY))?;
    }
    rename(&dir.join(STATE_APART), &dir.join(STATE))
}

/// Why a machine is [`Fact::Broken`].
pub(crate) fn problem(dir: &Path) -> Option<String> {
    if let Err(error) = read_record(dir) {
        return Some(error.message().to_owned());
    }
    if !dir.join(DISK).is_file() {
        return Some("its disk is missing".into());
    }
    let saved = saved(dir);
    match running(dir) {
        None if !strays(dir).is_empty() => Some("its process runs, and the record of it is missing or damaged".into()),
        Some(run) if !run.ready => Some("its process runs, and its guest never answered".into()),
        Some(_) if saved.is_some() => Some("its process runs beside a saved execution".into()),
        None if saved.is_some_and(|(_, memory)| !has_memory(dir, memory)) => {
            Some("it has a saved execution and no memory".into())
        }
        _ => None,
    }
}

/// Removes a file; what is missing is done.
pub(crate) fn remove(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(Error::io(format!("{} cannot be removed", path.display()), error))
        }
        _ => Ok(()),
    }
}

/// Removes a directory with all that is in it; what is missing is done.
pub(crate) fn remove_tree(path: &Path) -> Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(Error::io(format!("{} cannot be removed", path.display()), error))
        }
        _ => Ok(()),
    }
}

pub(crate) fn rename(from: &Path, to: &Path) -> Result<()> {
    fs::rename(from, to).map_err(|error| Error::io(format!("{} cannot be renamed", from.display()), error))
}

/// Writes a file or a directory through to the disk.
pub(crate) fn sync(path: &Path) -> Result<()> {
    let synced = File::open(path).and_then(|file| file.sync_all());
    synced.map_err(|error| Error::io(format!("{} cannot be written to disk", path.display()), error))
}

/// Bytes on disk of everything in a machine's directory.
pub(crate) fn occupied(dir: &Path) -> Option<u64> {
    let entries = fs::read_dir(dir).ok()?;
    Some(entries.flatten().filter_map(|entry| entry.metadata().ok()).map(|meta| meta.blocks() * 512).sum())
}

/// The end of a text file, in whole lines, at most `limit` bytes; control characters are left out.
pub(crate) fn tail(path: &Path, limit: u64) -> String {
    let read = || -> io::Result<Vec<u8>> {
        let mut file = File::open(path)?;
        let length = file.metadata()?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(limit)))?;
        let mut bytes = Vec::new();
        file.take(limit).read_to_end(&mut bytes)?;
        if length > limit {
            let cut = bytes.iter().position(|byte| *byte == b'\n').map_or(0, |at| at + 1);
            bytes.drain(..cut);
        }
        Ok(bytes)
    };
    let text = String::from_utf8_lossy(&read().unwrap_or_default()).into_owned();
    text.chars().filter(|c| *c == '\n' || *c == '\t' || !c.is_control()).collect::<String>().trim_end().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmkit::Source;

    fn machine() -> (tempfile::TempDir, PathBuf) {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("web");
        make_dir(&dir).unwrap();
        write_record(&dir, &Spec::new(Source::Alias("base".into()))).unwrap();
        fs::write(dir.join(DISK), "").unwrap();
        (root, dir)
    }

    fn run(process: Identity, ready: bool) -> Run {
        Run { process, accelerator: "tcg".into(), started: 0, ready, waits: None }
    }

    #[test]
    fn the_directory_tells_the_state() {
        let (root, dir) = machine();
        let mut child = std::process::Command::new("sleep").arg("600").current_dir(&dir).spawn().unwrap();
        let ours = Identity::of(child.id()).unwrap().unwrap();
        assert_eq!(look(&root.path().join("other")), Fact::Absent);
        assert_eq!(look(&dir), Fact::Stopped);
        write_run(&dir, &run(ours.clone(), false)).unwrap();
        assert_eq!(look(&dir), Fact::Broken);
        assert!(problem(&dir).unwrap().contains("never answered"));
        write_run(&dir, &run(ours.clone(), true)).unwrap();
        assert_eq!(look(&dir), Fact::Running);
        // Another name is the same directory; a copy with all that is in it is not.
        let moved = root.path().join("moved");
        fs::rename(&dir, &moved).unwrap();
        assert_eq!(look(&moved), Fact::Running);
        assert!(std::process::Command::new("cp").arg("-a").args([&moved, &dir]).status().unwrap().success());
        assert_eq!((look(&dir), look(&moved)), (Fact::Stopped, Fact::Running), "a copy has the original's process");
        fs::remove_dir_all(&dir).unwrap();
        fs::rename(&moved, &dir).unwrap();
        let recycled = Identity { start_time: ours.start_time + 1, ..ours };
        write_run(&dir, &run(recycled, true)).unwrap();
        assert_eq!(look(&dir), Fact::Stopped);
        child.kill().unwrap();
        child.wait().unwrap();
        fs::write(dir.join(STATE), "").unwrap();
        assert_eq!((look(&dir), lost_memory(&dir)), (Fact::Broken, true), "no memory");
        fs::rename(dir.join(DISK), dir.join("away")).unwrap();
        assert_eq!((look(&dir), lost_memory(&dir)), (Fact::Broken, false), "no disk either");
        fs::rename(dir.join("away"), dir.join(DISK)).unwrap();
        fs::write(dir.join(MEMORY), "").unwrap();
        assert_eq!((look(&dir), lost_memory(&dir)), (Fact::Suspended, false));
        for file in [STATE, MEMORY] {
            fs::rename(dir.join(file), dir.join(format!("{file}.apart"))).unwrap();
        }
        assert_eq!((look(&dir), saved(&dir)), (Fact::Suspended, Some((STATE_APART, Memory::Apart))));
        // Whoever put it in place died half way.
        fs::rename(dir.join(MEMORY_APART), dir.join(MEMORY)).unwrap();
        assert_eq!(look(&dir), Fact::Suspended);
        put_in_place(&dir).unwrap();
        assert_eq!((look(&dir), saved(&dir)), (Fact::Suspended, Some((STATE, Memory::Elsewhere))));
        fs::write(dir.join("vm.json"), "{").unwrap();
        assert_eq!(look(&dir), Fact::Broken);
        assert!(is_ours(&dir), "damaged, and still ours");
        assert_eq!(read_record(&dir).unwrap_err().kind(), ErrorKind::Corrupt);
    }

    #[test]
    fn only_what_we_made_is_a_machine() {
        let (root, _) = machine();
        let layout = Layout { dir: root.path().to_owned() };
        for part in [".staging/half", ".trash/old", "foreign"] {
            make_dir(&root.path().join(part)).unwrap();
        }
        fs::write(root.path().join("file"), "").unwrap();
        let ids: Vec<String> = layout.machines().unwrap().into_iter().map(String::from).collect();
        assert_eq!(ids, ["half", "old", "web"]);
    }

    #[test]
    fn a_tail_has_whole_lines_and_no_control_characters() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        fs::write(&path, "first line\nsecond \x1b[0mline\r\n").unwrap();
        assert_eq!(tail(&path, 1000), "first line\nsecond [0mline");
        assert_eq!(tail(&path, 20), "second [0mline");
        assert_eq!(tail(&dir.path().join("none"), 20), "");
    }
}
