//! What a machine is to be: its name, what it is cloned from, its shape, its time limits.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::error::{Error, ErrorKind};

/// A machine's name: stable, unique on its host, never empty, safe as a file name.
///
/// 1 to 63 characters from `a-z A-Z 0-9 . _ -`, the first a letter or a digit.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Id(String);

impl Id {
    /// Checks a name.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`] that says which rule it breaks.
    pub fn new(name: impl Into<String>) -> Result<Id, Error> {
        let name = name.into();
        let ok = (1..=63).contains(&name.len())
            && name.starts_with(|c: char| c.is_ascii_alphanumeric())
            && name.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-'));
        if ok {
            return Ok(Id(name));
        }
        Err(Error::new(ErrorKind::InvalidArgument, format!("{name:?} is not a valid name"))
            .hint("use 1 to 63 letters, digits, dots, underscores or hyphens, and begin with a letter or a digit"))
    }

    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

impl FromStr for Id {
    type Err = Error;

    fn from_str(name: &str) -> Result<Id, Error> {
        Id::new(name)
    }
}

impl TryFrom<String> for Id {
    type Error = Error;

    fn try_from(name: String) -> Result<Id, Error> {
        Id::new(name)
    }
}

impl From<Id> for String {
    fn from(id: Id) -> String {
        id.0
    }
}

/// What a machine is cloned from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Source {
    /// A name that the backend resolves itself: a simulated image, or an image that a daemon keeps.
    Alias(String),
    /// Files that a hypervisor can boot.
    Boot(BootImage),
}

impl Source {
    /// The name people know it by.
    pub fn name(&self) -> &str {
        match self {
            Source::Alias(name) => name,
            Source::Boot(image) => &image.name,
        }
    }
}

/// An image that boots by its kernel, with a disk that clones share read-only.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BootImage {
    /// The name people know it by.
    pub name: String,
    /// The content's digest, `sha256:` and 64 hexadecimal digits.
    pub digest: String,
    /// The kernel.
    pub kernel: PathBuf,
    /// What the kernel is started with, when a machine starts and whenever its guest reboots: a file that costs no memory while
    /// nobody boots, and takes the kernel from the front of the initramfs; or the kernel itself. `None`: a guest that reboots ends
    /// its machine. Where there is one, the kernel tells the host of a panic (`pvpanic`), and a panic ends the machine.
    #[serde(default)]
    pub loader: Option<PathBuf>,
    /// The initramfs: the agent and the modules that the root disk needs. With a loader of its own, the kernel is in front of them.
    pub initramfs: PathBuf,
    /// The base disk, a raw file that is never written to. `None`: the initramfs is all there is.
    pub disk: Option<PathBuf>,
    /// What the image adds to the kernel's command line; console and root are the backend's.
    pub cmdline: String,
}

/// How long each operation may take. They are the operations' own: no caller's deadline replaces them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Timeouts {
    /// Clone.
    pub clone: Duration,
    /// Start: boot or resume until commands can be executed.
    pub start: Duration,
    /// Suspend.
    pub suspend: Duration,
    /// A forced stop, from the signal to the last process gone.
    pub kill: Duration,
    /// Delete.
    pub delete: Duration,
    /// One look at what is there.
    pub inspect: Duration,
    /// Waiting for another process that operates on the same machine.
    pub lock: Duration,
}

impl Default for Timeouts {
    fn default() -> Timeouts {
        Timeouts {
            clone: Duration::from_secs(120),
            start: Duration::from_secs(120),
            suspend: Duration::from_secs(120),
            kill: Duration::from_secs(20),
            delete: Duration::from_secs(60),
            inspect: Duration::from_secs(10),
            lock: Duration::from_secs(300),
        }
    }
}

/// What a machine is to be. Constant for its life.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Spec {
    /// What it is cloned from.
    pub source: Source,
    /// Virtual processors, 1 to 64.
    pub cpus: u32,
    /// Memory in MiB, at least 96: with less, the kernels of distributions do not boot.
    pub memory_mib: u64,
    /// Whoever made it may mark it: shown, never interpreted.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    /// Whether it is to have its memory for itself from its first start on, where it could share its template's: then
    /// suspending it takes milliseconds the first time too, and starting it longer, by a copy.
    #[serde(default, skip_serializing_if = "is_false")]
    pub own_memory: bool,
    /// The [`Snapshot`](crate::Snapshot) that its first start goes on from, instead of from what the source gives. It must be there
    /// then: what is to be a copy never boots instead.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub snapshot: Option<String>,
    /// Time limits.
    #[serde(default)]
    pub timeouts: Timeouts,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "what serde calls")]
fn is_false(flag: &bool) -> bool {
    !*flag
}

impl Spec {
    /// One processor, 256 MiB, no labels, the default time limits.
    pub fn new(source: Source) -> Spec {
        Spec {
            source,
            cpus: 1,
            memory_mib: 256,
            labels: BTreeMap::new(),
            own_memory: false,
            snapshot: None,
            timeouts: Timeouts::default(),
        }
    }

    /// Sets the number of virtual processors.
    #[must_use]
    pub fn cpus(mut self, cpus: u32) -> Spec {
        self.cpus = cpus;
        self
    }

    /// Sets the memory, in MiB.
    #[must_use]
    pub fn memory_mib(mut self, memory_mib: u64) -> Spec {
        self.memory_mib = memory_mib;
        self
    }

    /// Adds a label.
    #[must_use]
    pub fn label(mut self, key: impl Into<String>, value: impl Into<String>) -> Spec {
        self.labels.insert(key.into(), value.into());
        self
    }

    /// The labels that copies of it have as well: all but vmkit's own, whose keys begin with `vmkit.`. Those say who made a machine
    /// and will delete it.
    pub fn labels_of_copies(&self) -> BTreeMap<String, String> {
        let labels = self.labels.iter().filter(|(key, _)| !key.starts_with("vmkit."));
        labels.map(|(key, value)| (key.clone(), value.clone())).collect()
    }

    /// Says whether it is to have its memory for itself.
    #[must_use]
    pub fn own_memory(mut self, own_memory: bool) -> Spec {
        self.own_memory = own_memory;
        self
    }

    /// Sets the time limits.
    #[must_use]
    pub fn timeouts(mut self, timeouts: Timeouts) -> Spec {
        self.timeouts = timeouts;
        self
    }

    /// Checks the ranges.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`] that names the field and its range.
    pub fn check(&self) -> Result<(), Error> {
        let bad = |message: String, hint: &str| Err(Error::new(ErrorKind::InvalidArgument, message).hint(hint));
        if !(1..=64).contains(&self.cpus) {
            return bad(format!("{} processors: a machine has 1 to 64", self.cpus), "give it 1 to 64 processors");
        }
        if !(96..=1 << 20).contains(&self.memory_mib) {
            let message = format!("{} MiB of memory: a machine has 96 MiB to 1 TiB", self.memory_mib);
            return bad(message, "give it 96 MiB to 1 TiB of memory");
        }
        Ok(())
    }
}
