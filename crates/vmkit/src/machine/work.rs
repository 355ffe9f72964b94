//! A driver's work: under its deadline, against a panic, and against whoever may end it early.

use std::any::Any;
use std::future::{Future, pending};
use std::panic::AssertUnwindSafe;
use std::time::Duration;

use futures::FutureExt;
use tokio::sync::mpsc;
use tokio::time::timeout;
use tracing::warn;

use super::Kill;
use crate::driver::{Driver, Exit, Spent};
use crate::error::{Error, ErrorKind, Result};
use crate::spec::Id;
use crate::state::{Action, Fact, State};

/// Why an operation's own work ended.
pub(super) enum Ended<T> {
    Done(Result<T>),
    Panicked,
    /// The caller is gone, and this operation is one that a gone caller cancels.
    CallerGone,
    Killed(Kill),
}

/// Runs a driver's work under its deadline, against a panic, and against whoever may end it early.
pub(super) async fn work<T>(
    call: impl Future<Output = Result<T>>,
    limit: Duration,
    doing: &str,
    caller_gone: impl Future<Output = ()>,
    kills: Option<&mut mpsc::UnboundedReceiver<Kill>>,
) -> Ended<T> {
    let killed = async {
        match kills {
            Some(kills) => match kills.recv().await {
                Some(kill) => kill,
                None => pending().await,
            },
            None => pending().await,
        }
    };
    // Biased: whoever ends it comes before its own progress, so that a busy driver cannot starve a forced stop.
    tokio::select! {
        biased;
        kill = killed => Ended::Killed(kill),
        () = caller_gone => Ended::CallerGone,
        done = guarded(timeout(limit, call)) => match done {
            None => Ended::Panicked,
            Some(Ok(result)) => Ended::Done(result),
            Some(Err(_)) => {
                Ended::Done(Err(Error::new(ErrorKind::TimedOut, format!("{doing} took longer than {limit:?}"))))
            }
        },
    }
}

/// That a caller is gone, of a resume: none, once its saved execution is spent.
pub(super) async fn unless_spent(spent: &Spent, caller_gone: impl Future<Output = ()>) {
    caller_gone.await;
    if spent.is_set() {
        pending().await
    }
}

/// Whether taking the machine took longer than it may, because another process has it.
pub(super) fn held_elsewhere(taken: &Ended<Option<Fact>>) -> bool {
    matches!(taken, Ended::Done(Err(error)) if error.kind() == ErrorKind::TimedOut)
}

/// The output of a future, or `None` when it panicked.
pub(super) async fn guarded<T>(call: impl Future<Output = T>) -> Option<T> {
    match AssertUnwindSafe(call).catch_unwind().await {
        Ok(output) => Some(output),
        Err(payload) => {
            warn!(message = panic_message(payload.as_ref()), "a backend panicked");
            None
        }
    }
}

fn panic_message(payload: &(dyn Any + Send)) -> &str {
    payload
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| payload.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("no message")
}

/// What a machine's task notices while nobody asks anything of it.
pub(super) enum Noticed {
    /// The machine exited.
    Exit(Exit),
    /// Another process has ended its operation; `None` when the backend panicked.
    Free(Option<Result<Option<Fact>>>),
}

/// Watches a machine that runs, and one that was found in the middle of another process's operation. Cancel-safe.
pub(super) async fn notice<D: Driver>(id: &Id, driver: &mut D, state: State) -> Noticed {
    if state == State::Running {
        Noticed::Exit(exited(id, driver).await)
    } else if state.is_transitional() {
        Noticed::Free(guarded(driver.begin(Action::None)).await)
    } else {
        pending().await
    }
}

/// A driver that panics while it watches is one that can tell nothing: as good as an exit that nobody can explain.
pub(super) async fn exited<D: Driver>(id: &Id, driver: &mut D) -> Exit {
    match guarded(driver.exited()).await {
        Some(exit) => exit,
        None => {
            warn!(%id, "the backend panicked while watching the machine");
            Exit::default()
        }
    }
}

pub(super) fn flat<T>(ended: Ended<T>) -> Result<T> {
    match ended {
        Ended::Done(result) => result,
        Ended::Panicked => Err(Error::new(ErrorKind::Panicked, "the backend panicked")),
        Ended::CallerGone | Ended::Killed(_) => Err(Error::new(ErrorKind::Cancelled, "cancelled")),
    }
}

pub(super) fn split_kill(ended: Ended<()>) -> (Ended<()>, Option<Kill>) {
    match ended {
        Ended::Killed(kill) => {
            let error = Error::new(ErrorKind::Cancelled, "a forced stop ended it");
            (Ended::Done(Err(error)), Some(kill))
        }
        other => (other, None),
    }
}
