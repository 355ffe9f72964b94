//! What can be read of a simulated machine while an operation has its driver.

use std::time::{SystemTime, UNIX_EPOCH};

use super::hardware::{Phase, Process};
use super::world::World;
use crate::driver::Probe;
use crate::properties::{Birth, Origin, Properties};
use crate::spec::Id;

/// Reads a simulated machine without waiting.
pub(super) struct SimProbe {
    pub world: World,
    pub id: Id,
}

impl Probe for SimProbe {
    fn properties(&self) -> Properties {
        self.world.look(|hw| {
            let unit = hw.units.get(&self.id);
            let process = unit.and_then(|unit| unit.process.as_ref());
            let up = process.filter(|process| process.phase == Phase::Up);
            let octet = |process: &Process| (process.pid % 250) as u8 + 2;
            Properties {
                ip: up.map(|process| std::net::Ipv4Addr::new(10, 0, 2, octet(process)).into()),
                backend: "sim".to_owned(),
                accelerator: Some("sim".to_owned()),
                pid: process.map(|process| process.pid).or(unit.and_then(|unit| unit.waits)),
                disk_used: unit.map(|unit| unit.files.values().map(|file| file.len() as u64).sum()),
                uptime: up.map(|process| process.since.elapsed()),
                birth: unit.and_then(|unit| unit.born).map(birth),
                ..Properties::default()
            }
        })
    }
}

/// Simulated machines boot, and nobody has used them then.
fn birth(at: SystemTime) -> Birth {
    let at = at.duration_since(UNIX_EPOCH).map_or(0, |since| u64::try_from(since.as_millis()).unwrap_or(u64::MAX));
    let (template, note, renewed, phases) = (None, None, Vec::new(), Vec::new());
    Birth { how: Origin::Boot, template, copy_of: None, note, at, unused: true, renewed, phases }
}
