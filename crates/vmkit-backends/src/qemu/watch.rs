//! Waiting for a QEMU, which may end meanwhile.

use std::time::Duration;

use tokio::time::{sleep, timeout};
use vmkit::{Error, ErrorKind, Exit, Result};

use super::driver::{Process, QemuDriver, TAIL};
use super::layout::{self, OUTPUT, SERIAL};
use super::{console, exit};

/// How long a QEMU whose sockets have closed may take to be gone.
pub(super) const ENDS: Duration = Duration::from_secs(2);
/// What is left of a start's time when the start gives up by itself, to say why.
const MARGIN: Duration = Duration::from_millis(500);

const STARTING: &str = "was starting";

impl QemuDriver {
    /// Waits for `ready` while QEMU lives and its kernel has not given up.
    pub(super) async fn until<T>(&mut self, from: u64, ready: impl Future<Output = Result<T>>) -> Result<T> {
        let dir = self.dir.clone();
        let limit = self.spec.timeouts.start.saturating_sub(MARGIN);
        let outcome = tokio::select! {
            biased;
            ready = ready => ready,
            exit = self.gone() => Err(exit::error(&exit, STARTING)),
            () = console::panicked(&dir, from) => Err(Error::new(ErrorKind::Exited, exit::PANICKED)),
            () = sleep(limit) => Err(Error::new(
                ErrorKind::TimedOut,
                format!("the guest's agent did not answer within {limit:?}"),
            )
            .hint("a busy host boots slowly: allow more time; else the end of the console tells where the guest stands")),
        };
        // A line that breaks is mostly a QEMU that is ending: say the cause, not the symptom.
        self.or_ended(outcome, STARTING).await.map_err(|error| {
            let details = self.tails();
            let hint = match details.is_empty() {
                false => "the details are the end of what the machine and QEMU printed",
                true => "neither the machine nor QEMU said why: give it more memory, and see `vmkit doctor`",
            };
            match error.next_step() {
                Some(_) => error.with_details(details),
                None => error.hint(hint).with_details(details),
            }
        })
    }

    /// The end of what the machine and QEMU printed.
    fn tails(&self) -> String {
        let mut text = String::new();
        for (title, name) in [("console", SERIAL), ("QEMU", OUTPUT)] {
            let tail = layout::tail(&self.file(name), TAIL);
            if !tail.is_empty() {
                text.push_str(&format!("{title}, last lines:\n{tail}\n"));
            }
        }
        text
    }

    /// A QEMU that has ended is the cause of whatever did not work with it: `doing` says what that was.
    pub(super) async fn or_ended<T>(&mut self, outcome: Result<T>, doing: &str) -> Result<T> {
        if matches!(&outcome, Err(error) if matches!(error.kind(), ErrorKind::Agent | ErrorKind::Backend))
            && let Some(exit) = self.ended().await
        {
            return Err(exit::error(&exit, doing));
        }
        outcome
    }

    /// Waits for something that no longer comes when QEMU ends.
    pub(super) async fn unless_ended<T>(&mut self, work: impl Future<Output = T>, doing: &str) -> Result<T> {
        let known = self.process.is_some();
        tokio::select! {
            biased;
            done = work => Ok(done),
            exit = self.gone(), if known => Err(exit::error(&exit, doing)),
        }
    }

    /// How the QEMU that there was ended, if it did or does in a moment.
    pub(super) async fn ended(&mut self) -> Option<Exit> {
        self.process.as_ref()?;
        timeout(ENDS, self.gone()).await.ok()
    }

    pub(super) async fn gone(&mut self) -> Exit {
        match &mut self.process {
            Some(Process::Ours { child, .. }) => {
                let status = child.wait().await.ok();
                exit::of(status, layout::tail(&self.dir.join(OUTPUT), TAIL), &self.dir)
            }
            Some(Process::Found(held)) => {
                held.exited().await;
                Exit { output: layout::tail(&self.dir.join(OUTPUT), TAIL), ..Exit::default() }
            }
            None => Exit::default(),
        }
    }
}
