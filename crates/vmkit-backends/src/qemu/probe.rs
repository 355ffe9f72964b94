//! A machine's properties, read from its directory and from `/proc`.

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use vmkit::{Probe, Properties};

use super::layout::{self, Run};
use crate::process;

/// Reads one machine.
pub(crate) struct QemuProbe(pub PathBuf);

impl Probe for QemuProbe {
    fn properties(&self) -> Properties {
        properties(&self.0)
    }
}

pub(crate) fn properties(dir: &Path) -> Properties {
    let run = layout::read_run(dir);
    let alive = layout::live_run(dir);
    let used = alive.as_ref().and_then(|run| process::usage(run.process.pid));
    Properties {
        backend: "qemu".into(),
        accelerator: run.as_ref().map(|run| run.accelerator.clone()),
        pid: alive.as_ref().map(|run| run.process.pid),
        memory_used: used.and_then(|used| used.private),
        cpu_time: used.map(|used| used.cpu),
        // One that waits has not begun.
        uptime: alive.as_ref().filter(|run| run.waits.is_none()).map(uptime),
        disk_used: layout::occupied(dir),
        birth: layout::read_birth(dir),
        ..Properties::default()
    }
}

fn uptime(run: &Run) -> Duration {
    now().saturating_sub(Duration::from_millis(run.started))
}

/// Now, as a record has it.
pub(crate) fn started_now() -> u64 {
    u64::try_from(now().as_millis()).unwrap_or(u64::MAX)
}

/// Since 1970.
pub(crate) fn now() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}
