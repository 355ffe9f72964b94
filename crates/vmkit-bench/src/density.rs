//! Density: many ready machines on one host, whether each of them answers, and what it costs.

use std::time::{Duration, Instant};

use comfy_table::{CellAlignment, ContentArrangement, Table, presets};
use serde::Serialize;
use vmkit::pool::{Pool, Staging};
use vmkit::{Error as VmkitError, ErrorKind};

use crate::error::Result;
use crate::ours::{CLEANUP, FILLS, Ours, PROCESS, WARM, run, say};
use crate::samples::{median, ms, rank};

/// How many there are to compare with.
pub const FEW: usize = 10;
/// Memory that a ready machine of the bench needs for itself, MiB, generously.
const EACH: u64 = 40;
/// How long they are left alone before they are used, few or many: a machine that has just been made answers sooner than one that has
/// waited, whose memory is in no processor's caches any more.
const RESTS: Duration = Duration::from_secs(30);
/// How many are made at once.
const AT_ONCE: usize = 2;

/// So many ready machines at once.
#[derive(Clone, Debug, Serialize)]
pub struct Crowd {
    machines: usize,
    /// From the first to the last of them, seconds.
    ready_s: f64,
    /// Acquired one after the other, each with a process's answer.
    answered: usize,
    acquire_median_ms: f64,
    acquire_p99_ms: f64,
    /// What a machine has for itself before it is used, MiB.
    unique_mib: f64,
    /// What the host has less than before, MiB, for each.
    host_mib: f64,
}

impl Ours {
    /// Fills a pool with that many running, warm machines, and uses every one of them.
    ///
    /// # Errors
    /// When they do not fit, when vmkit fails, or on an interruption.
    pub fn density(&self, machines: usize) -> Result<Crowd> {
        let before = available()?;
        let needed = machines as u64 * EACH;
        if before < needed {
            let message = format!("{machines} machines need {needed} MiB of memory, and {before} MiB are free");
            return Err(VmkitError::new(ErrorKind::ResourceExhausted, message)
                .hint("ask for fewer: --machines")
                .into());
        }
        let pool = Pool::builder(self.forks.clone(), self.spec.clone()).name("density").size(machines);
        let pool = pool.staging(Staging::Running).ready_command(PROCESS.0.iter().copied()).ready_runs(WARM);
        let pool = pool.create_concurrency(AT_ONCE).build()?;
        let work = async {
            let clock = Instant::now();
            pool.start().await?;
            let mut shown = 0;
            loop {
                let ready = pool.status().await.counts.ready.sum();
                if ready / 100 > shown / 100 {
                    self.tell.note(&format!("{ready} machines are ready"));
                }
                shown = ready;
                if ready == machines {
                    break;
                }
                tokio::time::sleep(FILLS).await;
            }
            let ready_s = clock.elapsed().as_secs_f64();
            self.tell.note(&format!("{machines} machines rest for {} s", RESTS.as_secs()));
            tokio::time::sleep(RESTS).await;
            let host_mib = before.saturating_sub(available()?) as f64 / machines as f64;
            let (mut took, mut unique, mut held) = (Vec::new(), Vec::new(), Vec::new());
            for _ in 0..machines {
                let clock = Instant::now();
                let lease = pool.acquire().await?;
                let acquired = clock.elapsed();
                unique.extend(lease.properties().memory_used.map(|bytes| bytes as f64 / f64::from(1 << 20)));
                let clock = Instant::now();
                say(&lease, PROCESS.0, PROCESS.1).await?;
                took.push(ms(acquired + clock.elapsed()));
                // Held: nothing is made beside what is measured.
                held.push(lease);
            }
            took.sort_by(f64::total_cmp);
            Ok(Crowd {
                machines,
                ready_s,
                answered: held.len(),
                acquire_median_ms: median(&took),
                acquire_p99_ms: rank(&took, 99),
                unique_mib: median(&unique),
                host_mib,
            })
        };
        let measured = run(&self.runtime, &self.stop, work);
        self.runtime.block_on(pool.close(CLEANUP)).into_result()?;
        measured
    }
}

/// Memory that the host can still give, MiB.
fn available() -> vmkit::Result<u64> {
    let text = std::fs::read_to_string("/proc/meminfo")
        .map_err(|error| VmkitError::io("/proc/meminfo cannot be read", error))?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib = line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<u64>().ok());
    kib.map(|kib| kib / 1024).ok_or_else(|| VmkitError::new(ErrorKind::Unsupported, "this kernel has no MemAvailable"))
}

/// Few of them, and many, to compare.
#[derive(Clone, Debug, Serialize)]
pub struct Crowds {
    density: Vec<Crowd>,
}

impl Crowds {
    pub(crate) fn new(density: Vec<Crowd>) -> Crowds {
        Crowds { density }
    }

    /// For people.
    pub fn text(&self) -> String {
        table(&self.density)
    }
}

fn table(crowds: &[Crowd]) -> String {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING).set_content_arrangement(ContentArrangement::Disabled);
    table.set_header(["MACHINES", "READY IN S", "ANSWERED", "ACQUIRE MS", "P99 MS", "UNIQUE MIB", "HOST MIB"]);
    for crowd in crowds {
        table.add_row([
            crowd.machines.to_string(),
            format!("{:.1}", crowd.ready_s),
            crowd.answered.to_string(),
            format!("{:.1}", crowd.acquire_median_ms),
            format!("{:.1}", crowd.acquire_p99_ms),
            format!("{:.1}", crowd.unique_mib),
            format!("{:.1}", crowd.host_mib),
        ]);
    }
    for column in table.column_iter_mut() {
        column.set_padding((0, 2)).set_cell_alignment(CellAlignment::Right);
    }
    table.lines().map(|line| line.trim_end().to_owned() + "\n").collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn crowd(machines: usize) -> Crowd {
        let (ready_s, acquire_median_ms, acquire_p99_ms, unique_mib, host_mib) = (12.5, 20.0, 31.0, 19.5, 21.0);
        Crowd { machines, ready_s, answered: machines, acquire_median_ms, acquire_p99_ms, unique_mib, host_mib }
    }

    #[test]
    fn crowds_are_shown_side_by_side() {
        let crowds = [crowd(10), crowd(500)];
        let crowds = Crowds::new(crowds.into());
        let text = crowds.text();
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 3, "{text}");
        assert!(lines[0].contains("ACQUIRE MS") && lines[2].contains("500") && lines[2].contains("19.5"), "{text}");
        assert_eq!(serde_json::to_value(&crowds).unwrap()["density"][1]["machines"], 500);
    }

    #[test]
    fn this_host_has_memory() {
        assert!(available().unwrap() > 0);
    }
}
