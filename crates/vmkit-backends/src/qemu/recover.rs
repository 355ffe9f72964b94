//! Clearing up what a process left that died in the middle of an operation. Done under the machine's lock.

use std::path::Path;
use std::time::{Duration, SystemTime};

use tokio::time::{Instant, sleep, timeout_at};
use tracing::{debug, warn};
use vmkit::{Action, Error, ErrorKind, Fact, Id, Result};

use super::layout::{self, FRESH, Layout, MEMORY_APART, QMP, STATE_PARTIAL, STATE_SPENT};
use super::line::Line;
use super::qmp::{Memory, Qmp};
use super::split;
use crate::process::Identity;

/// How long a guest that was paused half way may take to go on.
const GOES_ON: Duration = Duration::from_secs(60);

const AGAIN: Duration = Duration::from_millis(50);

/// How long its agent may take to hear of it.
const TOLD: Duration = Duration::from_secs(20);

/// Brings a machine to a settled state: the one before the operation, or the one after it.
pub(super) async fn recover(layout: &Layout, id: &Id, left: Action) -> Result<()> {
    let dir = layout.machine(id);
    layout::remove_tree(&layout.staging(id))?;
    layout::remove_tree(&layout.trash(id))?;
    if !layout::is_ours(&dir) {
        return Ok(());
    }
    // One that waits is none that runs.
    let alive = layout::running(&dir).is_some();
    match left {
        Action::Suspend if alive && layout::saved(&dir).is_none() => {
            // Paused, or about to be: it goes on where it was.
            let went_on = in_time(&dir, || go_on(&dir)).await;
            or_end(&dir, went_on, "a suspend of it was cut off and could not be called off").await?;
        }
        // Committed: the process has nothing left to do.
        Action::Suspend => kill_all(&dir).await?,
        // It had gone on, and somebody may have seen that.
        Action::Start if layout::look(&dir) == Fact::Running => layout::remove(&dir.join(FRESH))?,
        // Its saved execution is spent: what ran in it is nowhere else any more. It goes on, whoever wanted that.
        Action::Start if dir.join(STATE_SPENT).is_file() => {
            let went_on = match alive {
                true => in_time(&dir, || resume(&dir)).await,
                false => Err(Error::new(ErrorKind::Exited, "its process has ended too")),
            };
            or_end(&dir, went_on, "a resume of it was cut off and could not be completed").await?;
        }
        // Running was never published: whoever wanted it is gone.
        Action::Start => kill_all(&dir).await?,
        Action::None | Action::Clone | Action::Stop | Action::Delete => {}
    }
    if layout::saved(&dir).is_none_or(|(_, memory)| memory != Memory::Apart) {
        layout::remove(&dir.join(MEMORY_APART))?;
    }
    [STATE_PARTIAL, STATE_SPENT, split::SOCKET].iter().try_for_each(|file| layout::remove(&dir.join(file)))
}

/// Tries as long as there is time: what ends one session says nothing of the next, and a machine is at stake.
async fn in_time<T: Future<Output = Result<()>>>(dir: &Path, step: impl Fn() -> T) -> Result<()> {
    let until = Instant::now() + GOES_ON;
    loop {
        match timeout_at(until, step()).await.unwrap_or_else(|_| Err(late())) {
            // A guest that has booted is not what was saved, whatever it answers next.
            Err(error) if error.kind() == ErrorKind::Corrupt => return Err(error),
            Err(error) if layout::live_run(dir).is_some() && Instant::now() < until => {
                debug!(dir = %dir.display(), %error, "trying again to have it go on");
                sleep(AGAIN).await;
            }
            done => return done,
        }
    }
}

/// Ends a machine that did not go on, and says why.
async fn or_end(dir: &Path, went_on: Result<()>, why: &str) -> Result<()> {
    let Err(error) = went_on else { return Ok(()) };
    warn!(dir = %dir.display(), %error, "ending a machine: {why}");
    kill_all(dir).await?;
    layout::write_ended(dir, why, &error);
    Ok(())
}

/// What is left of a resume whose saved execution was spent.
async fn resume(dir: &Path) -> Result<()> {
    let since = SystemTime::now();
    let mut qmp = Qmp::connect(dir, QMP).await?;
    qmp.go_on().await?;
    let line = Line::new(dir.to_owned(), Duration::ZERO);
    line.renewed(&mut qmp, line.wire().await?, since, None).await?;
    layout::mark_ready(dir)
}

async fn go_on(dir: &Path) -> Result<()> {
    let mut qmp = Qmp::connect(dir, QMP).await?;
    // Else it would end paused.
    qmp.save_no_more().await?;
    qmp.go_on().await?;
    Line::new(dir.to_owned(), Duration::ZERO).thaw(TOLD).await;
    Ok(())
}

fn late() -> Error {
    Error::new(ErrorKind::TimedOut, format!("it did not go on within {GOES_ON:?}"))
}

/// Kills the recorded process, and a QEMU in the machine's directory that was started and not yet recorded.
pub(super) async fn kill_all(dir: &Path) -> Result<()> {
    let recorded = layout::live_run(dir).map(|run| run.process);
    let found = layout::qemus_in(dir).into_iter().filter_map(|pid| Identity::of(pid).ok().flatten());
    for identity in recorded.into_iter().chain(found) {
        let failed = |error| Error::io("the machine's process cannot be killed", error);
        if let Some(held) = identity.hold().map_err(failed)? {
            held.kill().map_err(failed)?;
            held.exited().await;
        }
    }
    Ok(())
}
