//! What an operator wants to know about a machine.

use std::net::IpAddr;
use std::time::Duration;

use serde::Serialize;

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
    /// Memory its process holds for itself now, bytes.
    pub memory_used: Option<u64>,
    /// Disk space it occupies beyond its base, bytes.
    pub disk_used: Option<u64>,
    /// Since it was started or resumed.
    pub uptime: Option<Duration>,
    /// Processor time its process used.
    pub cpu_time: Option<Duration>,
}

/// What a machine was cloned from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct CloneInfo {
    /// The image's name.
    pub image: String,
    /// The image's digest, where images have one.
    pub digest: Option<String>,
}
