//! What an operator wants to know about a machine.

use std::net::IpAddr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// What is known of a machine at one moment. Readable in every state; what does not apply is absent.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Properties {
    /// Its address; absent when it is not running or has no network.
    pub ip: Option<IpAddr>,
    /// What it was cloned from: an image's name and digest. There from Initial on.
    pub cloned_from: Option<CloneInfo>,
    /// The backend's name.
    pub backend: String,
    /// How guests execute: `kvm`, `tcg`, `sim`.
    pub accelerator: Option<String>,
    /// The machine's main process.
    pub pid: Option<u32>,
    /// Virtual processors.
    pub cpus: u32,
    /// Memory it was given, MiB.
    pub memory_mib: u64,
    /// Memory that its process has for itself now and that the kernel cannot take back, bytes: what another such machine costs.
    /// What it shares, as forks share their template's memory, is not in it.
    pub memory_used: Option<u64>,
    /// Disk space it occupies beyond its base, bytes.
    pub disk_used: Option<u64>,
    /// Since it was started or resumed.
    pub uptime: Option<Duration>,
    /// Processor time its process used.
    pub cpu_time: Option<Duration>,
    /// How its execution came to be: by its last start that was no resume.
    pub birth: Option<Birth>,
}

/// A machine's birth certificate.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Birth {
    /// `fork` of a template, or `boot`.
    pub how: Origin,
    /// Which template; absent for one that booted.
    pub template: Option<String>,
    /// Which machine it is a copy of, as that ran: [`Instance::fork`](crate::Instance::fork).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub copy_of: Option<String>,
    /// Why it booted although it might have been forked, when something went wrong with that.
    pub note: Option<String>,
    /// When, milliseconds since 1970.
    pub at: u64,
    /// Nobody has used it before, neither this execution nor its disk: the first start of a clone.
    pub unused: bool,
    /// What of it was made its own, which its template has too. Everything that tells machines apart, or it is not handed out.
    pub renewed: Vec<String>,
    /// Where the time went, in the order of the phases.
    pub phases: Vec<Phase>,
}

/// How a machine came to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Origin {
    /// It booted.
    Boot,
    /// It goes on from what a template saved.
    Fork,
}

/// A part of a start.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Phase {
    /// What was done.
    pub name: String,
    /// How long it took, milliseconds.
    pub ms: f64,
}

/// What a machine was cloned from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct CloneInfo {
    /// The image's name.
    pub image: String,
    /// The image's digest, where images have one.
    pub digest: Option<String>,
}
