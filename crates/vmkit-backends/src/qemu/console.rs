//! What a machine prints: followed for whoever listens, watched for a kernel that gives up.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::time::Duration;

use vmkit::{ConsoleSinks, Sink};

use super::layout::{self, OUTPUT, SERIAL};
use crate::process::Identity;

const INTERVAL: Duration = Duration::from_millis(100);
/// What a kernel that gives up says.
const SIGN: &[u8] = b"Kernel panic - not syncing";
/// What it says when it stands still for good.
const STANDS: &str = "end Kernel panic - not syncing";
/// How much it says in between, at most.
const LAST: u64 = 16 << 10;
/// How often somebody who waits for a guest looks whether it stands still.
const UP: Duration = Duration::from_secs(1);

/// A file that grows.
struct Follower {
    path: PathBuf,
    at: u64,
}

impl Follower {
    fn new(path: PathBuf, at: u64) -> Follower {
        Follower { path, at }
    }

    /// What came since, at most 64 KiB.
    fn more(&mut self) -> Vec<u8> {
        let read = || -> std::io::Result<Vec<u8>> {
            let mut file = File::open(&self.path)?;
            file.seek(SeekFrom::Start(self.at))?;
            let mut bytes = Vec::new();
            file.take(64 << 10).read_to_end(&mut bytes)?;
            Ok(bytes)
        };
        let bytes = read().unwrap_or_default();
        self.at += bytes.len() as u64;
        bytes
    }

    /// Hands everything that came since to the sink.
    fn drain(&mut self, sink: &Sink) {
        loop {
            let bytes = self.more();
            if bytes.is_empty() {
                return;
            }
            sink.push(&bytes);
        }
    }
}

/// Feeds the sinks until the process has ended. `from` is where its console begins.
pub(crate) fn follow(dir: &Path, process: Identity, from: u64, sinks: ConsoleSinks) {
    if sinks.stdout.is_discard() && sinks.stderr.is_discard() {
        return;
    }
    let mut console = Follower::new(dir.join(SERIAL), from);
    let mut output = Follower::new(dir.join(OUTPUT), 0);
    tokio::spawn(async move {
        loop {
            // Looked at before reading: what it wrote last is read after it has ended.
            let alive = process.is_alive();
            console.drain(&sinks.stdout);
            output.drain(&sinks.stderr);
            if !alive {
                return;
            }
            tokio::time::sleep(INTERVAL).await;
        }
    });
}

/// Returns when the guest's kernel has given up. A panic ends the machine, but a guest that only says so hangs.
pub(crate) async fn panicked(dir: &Path, from: u64) {
    let mut console = Follower::new(dir.join(SERIAL), from);
    let mut seen = Vec::new();
    loop {
        seen.extend(console.more());
        if seen.windows(SIGN.len()).any(|part| part == SIGN) {
            return;
        }
        // The sign may be cut in two.
        seen.drain(..seen.len().saturating_sub(SIGN.len()));
        tokio::time::sleep(INTERVAL).await;
    }
}

/// Returns when the guest's kernel has given up and stands still, whenever that was: then this is the last that it ever says.
pub(crate) async fn stands_panicked(dir: &Path) {
    loop {
        tokio::time::sleep(UP).await;
        if layout::tail(&dir.join(SERIAL), LAST).lines().last().is_some_and(|line| line.contains(STANDS)) {
            return;
        }
    }
}

/// Whether a panic is the last that the guest said.
pub(crate) fn ended_panicked(dir: &Path) -> bool {
    let path = dir.join(SERIAL);
    let length = std::fs::metadata(&path).map_or(0, |meta| meta.len());
    Follower::new(path, length.saturating_sub(LAST)).more().windows(SIGN.len()).any(|part| part == SIGN)
}
