//! Whatever state it is in: gone.

use std::time::Duration;

use crate::error::{Error, ErrorKind, Result};
use crate::instance::Instance;
use crate::state::State;

/// Stops and deletes a machine, whatever state it is in, within `limit` in all.
///
/// Runs on a task of its own: a cancelled caller does not stop a cleanup half way. Not found is success. What was asked of the machine
/// before is done before, and a reset that is under way makes it no more.
///
/// # Errors
/// What the last step failed with; [`ErrorKind::TimedOut`], with the state, when `limit` passed.
pub async fn cleanup(instance: &Instance, grace: Duration, limit: Duration) -> Result<()> {
    let own = instance.clone();
    own.give_up();
    to_the_end(instance, limit, "cleaning up", async move { clean(&own, grace).await }).await
}

/// Does something to a machine on a task of its own, which a caller that is cancelled does not stop, within `limit`.
pub(crate) async fn to_the_end(
    instance: &Instance,
    limit: Duration,
    doing: &'static str,
    work: impl Future<Output = Result<()>> + Send + 'static,
) -> Result<()> {
    let own = instance.clone();
    let task = tokio::spawn(async move {
        match tokio::time::timeout(limit, work).await {
            Ok(result) => result,
            Err(_) => {
                let state = own.state();
                let message = format!("{doing} took longer than {limit:?}, and the machine is {state}");
                Err(Error::new(ErrorKind::TimedOut, message).on(own.id().as_str()).while_in(state))
            }
        }
    });
    task.await.unwrap_or_else(|lost| {
        let error = Error::new(ErrorKind::Cancelled, format!("{doing} ended with the runtime that did it"));
        Err(error.on(instance.id().as_str()).caused_by(lost))
    })
}

/// The same, of somebody who goes on with the machine, and without a limit.
pub(crate) async fn clean(instance: &Instance, grace: Duration) -> Result<()> {
    loop {
        match instance.state() {
            State::Deleted | State::Initial => {
                // A clone may wait in its queue.
                instance.pass().await;
                if matches!(instance.state(), State::Deleted | State::Initial) {
                    return Ok(());
                }
            }
            State::Running => {
                let report = instance.stop(grace).await;
                match instance.state() {
                    // Judged by the state it left: how it ran does not matter any more.
                    State::Running => report.stop?,
                    _ => continue,
                }
            }
            State::Stopped | State::Suspended | State::ErrorUnknown => match instance.delete().await {
                Ok(()) => {}
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                // Somebody else has changed it since we looked: judge again.
                Err(error) if error.kind() == ErrorKind::IllegalRequest => {}
                Err(error) => return Err(error),
            },
            State::Cloning | State::Starting | State::Stopping | State::Suspending | State::Deleting => {
                settled(instance).await?;
            }
        }
    }
}

async fn settled(instance: &Instance) -> Result<()> {
    let mut changes = instance.subscribe();
    while let Some(status) = changes.next().await {
        if !status.state.is_transitional() {
            return Ok(());
        }
    }
    Err(Error::new(ErrorKind::Cancelled, "the runtime that drives the machine has shut down")
        .on(instance.id().as_str()))
}
