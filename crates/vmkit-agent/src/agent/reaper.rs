//! Reaps every child: commands, and the orphans that fall to process 1.

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex};

use rustix::process::{Pid, WaitOptions, wait};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;

use super::lock;
use crate::protocol::Exit;

#[derive(Clone, Default)]
pub(super) struct Reaper(Arc<Mutex<HashMap<i32, oneshot::Sender<Exit>>>>);

impl Reaper {
    pub(super) fn start() -> io::Result<Reaper> {
        let reaper = Reaper::default();
        let mut children = signal(SignalKind::child())?;
        let own = reaper.clone();
        tokio::spawn(async move {
            loop {
                own.reap();
                if children.recv().await.is_none() {
                    return;
                }
            }
        });
        Ok(reaper)
    }

    /// How a child ends. To be called with nothing awaited since it was started, on the one thread that also reaps: so
    /// the child cannot be reaped in between.
    pub(super) fn watch(&self, pid: Pid) -> oneshot::Receiver<Exit> {
        let (send, exit) = oneshot::channel();
        lock(&self.0).insert(pid.as_raw_nonzero().get(), send);
        exit
    }

    /// Reaps what has ended by now.
    pub(super) fn reap(&self) {
        while let Ok(Some((pid, status))) = wait(WaitOptions::NOHANG) {
            let exit = match (status.exit_status(), status.terminating_signal()) {
                (Some(code), _) => Exit::Code(code),
                (None, Some(signal)) => Exit::Signal(signal),
                (None, None) => continue,
            };
            if let Some(watcher) = lock(&self.0).remove(&pid.as_raw_nonzero().get()) {
                let _ = watcher.send(exit);
            }
        }
    }
}
