//! What the store writes about its images.
//!
//! `images/sha256-…/manifest.json` describes an image and never changes; `names/NAME.json` says which image a name means.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::time::SystemTime;

use serde::{Deserialize, Serialize};
use vmkit::{Error, ErrorKind, Result};

use crate::agent::Agent;
use crate::digest;

/// The kernel's file in an image's directory.
pub(crate) const KERNEL: &str = "kernel";
/// The file with which an image's kernel is started, where that is another.
pub(crate) const LOADER: &str = "loader";
/// The initramfs's file in an image's directory.
pub(crate) const INITRAMFS: &str = "initramfs";
/// The disk's file in an image's directory.
pub(crate) const DISK: &str = "disk";

/// Rises when an image that older code made is no longer what this code would make.
pub(crate) const FORMAT: u32 = 2;

/// An image, as its directory describes it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Manifest {
    pub format: u32,
    pub digest: String,
    pub created: u64,
    pub kernel_version: String,
    pub agent_digest: String,
    pub agent_version: String,
    pub cmdline: String,
    /// Whether its machines may boot again by themselves: what they give up at, the host hears of.
    #[serde(default)]
    pub reboots: bool,
    pub files: BTreeMap<String, FileEntry>,
}

/// One file of an image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct FileEntry {
    pub digest: String,
    pub size: u64,
}

/// What a name means.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Name {
    pub image: String,
    pub built: u64,
    /// The built-in recipe it was made by; none for a root file system that somebody gave us.
    pub recipe: Option<String>,
    /// What the root file system was made from, for people.
    pub source: String,
}

impl Manifest {
    /// Whether making it again with this agent would change anything but the root file system.
    pub(crate) fn is_current(&self, agent: &Agent) -> bool {
        self.format == FORMAT && self.agent_digest == agent.digest() && self.agent_version == agent.version()
    }

    /// The digest of everything that decides how the image behaves. When it was made is not part of it.
    pub(crate) fn seal(mut self) -> Manifest {
        let mut text = format!("vmkit image {}\n{}\n{}\n", self.format, self.agent_version, self.cmdline);
        text += &format!("{}\n{}\n", self.kernel_version, self.agent_digest);
        if self.reboots {
            text += "reboots\n";
        }
        for (name, file) in &self.files {
            text += &format!("{name} {} {}\n", file.size, file.digest);
        }
        self.digest = digest::of_bytes(text.as_bytes());
        self
    }
}

/// Reads JSON that the store wrote.
pub(crate) fn read<T: for<'a> Deserialize<'a>>(path: &Path) -> Result<T> {
    let text = fs::read(path).map_err(|error| Error::io(format!("{} cannot be read", path.display()), error))?;
    serde_json::from_slice(&text).map_err(|error| {
        Error::new(ErrorKind::Corrupt, format!("{} is damaged, or from another version of vmkit", path.display()))
            .caused_by(error)
    })
}

/// The JSON of what the store writes.
pub(crate) fn text(value: &impl Serialize) -> Vec<u8> {
    let mut text = serde_json::to_vec_pretty(value).expect("maps with string keys are always JSON");
    text.push(b'\n');
    text
}

/// Seconds since 1970.
pub(crate) fn now() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// An image in a listing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct ImageInfo {
    /// Its name.
    pub name: String,
    /// Its content's digest; empty when that cannot be read.
    pub digest: String,
    /// The space it occupies, in bytes.
    pub size: u64,
    /// How large its disk looks from inside a machine, in bytes.
    pub virtual_size: u64,
    /// When it was made, in seconds since 1970. A newer agent does not change it.
    pub created: u64,
    /// What its root file system was made from: `base`, `debian`, or the path of a directory or tar.
    pub source: String,
    /// Its kernel's version.
    pub kernel_version: String,
    /// The version of the agent in it.
    pub agent_version: String,
    /// What is wrong with it, as far as can be seen without reading its files; empty is good.
    pub problems: Vec<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_manifest_of_the_first_form_is_still_whole() {
        let text = r#"{
  "format": 1,
  "digest": "sha256:df935ab0c5b0b9061a1f5c5f2f3a710cfdaff78df4d9b86bab4667a431075fe4",
  "created": 1795699408,
  "kernel_version": "6.1.0-56-cloud-amd64",
  "agent_digest": "sha256:847bc803546a9e96fcb336a02462770eeb54a19131c1522797d94b89c5bb0bf3",
  "agent_version": "protocol 6",
  "cmdline": "vmkit.root=/dev/vda vmkit.rootfstype=ext4 lsm=landlock,lockdown,yama,integrity,apparmor,bpf",
  "files": {
    "disk": {
      "digest": "sha256:0303129f5d6f45869a9f4f373d42ead687f22e0dd69d228ff72498c756ded7e6",
      "size": 4294967296
    },
    "initramfs": {
      "digest": "sha256:a8fad72dcad1721ecc8f0b605687c0bc1a748787a7e90cdd3a2a51c28069f3c4",
      "size": 2413568
    },
    "kernel": {
      "digest": "sha256:744e6f9e0e2ba9c9d7141e880e861db2cba3c6aa469a59db9189e47870cb0c8f",
      "size": 14186432
    }
  }
}"#;
        let manifest: Manifest = serde_json::from_str(text).unwrap();
        assert!(manifest.format == 1 && !manifest.reboots);
        assert_eq!(manifest.clone().seal().digest, manifest.digest);
        let reboots = Manifest { reboots: true, ..manifest.clone() };
        assert_ne!(reboots.seal().digest, manifest.digest);
    }
}
