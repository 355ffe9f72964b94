//! Waiting for a state.

use std::future::Future;
use std::time::Duration;

use tokio::time::Instant;

use crate::error::{Error, ErrorKind, Result};
use crate::instance::Instance;
use crate::publish::Subscription;
use crate::spec::Id;
use crate::state::State;

/// Whatever has a state to wait for: an [`Instance`], or something of yours that can only be polled.
pub trait Observed {
    /// Whose state it is.
    fn id(&self) -> &Id;
    /// The state now.
    fn state(&self) -> impl Future<Output = Result<State>> + Send;
    /// Every change from now on; `None` for what cannot publish and is polled at the interval.
    fn subscribe(&self) -> Option<Subscription>;
}

impl Observed for Instance {
    fn id(&self) -> &Id {
        Instance::id(self)
    }

    async fn state(&self) -> Result<State> {
        // All others are watched, and a question would only keep them from what they do.
        match Instance::state(self) {
            State::Stopped | State::Suspended => self.refresh().await,
            state => Ok(state),
        }
    }

    fn subscribe(&self) -> Option<Subscription> {
        Some(Instance::subscribe(self))
    }
}

/// One look: whether a wait is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Look {
    /// The target.
    Done,
    /// Tolerated on the way there.
    NotYet(State),
}

/// The one-shot form of [`wait_for_state`], for callers that drive their own loop.
///
/// # Errors
/// [`ErrorKind::UnexpectedState`] when `seen` is neither the target nor one of a non-empty list of intermediates.
pub fn look(id: &Id, seen: State, target: State, intermediates: &[State]) -> Result<Look> {
    if seen == target {
        return Ok(Look::Done);
    }
    if intermediates.is_empty() || intermediates.contains(&seen) {
        return Ok(Look::NotYet(seen));
    }
    let listed: Vec<&str> = intermediates.iter().map(|state| state.name()).collect();
    let message = format!("waiting for {target} by way of {}, and it is {seen}", listed.join(", "));
    Err(Error::new(ErrorKind::UnexpectedState, message).on(id.as_str()).while_in(seen))
}

/// Waits until `target` is seen. Driven by publication where there is one, so that a state is seen however short it was. Looked at
/// every `interval` where there is none, and where there is one as well: what another process does with a machine that is off is seen
/// by that.
///
/// The first look is immediate, and at the target it is success even when the deadline has passed. With a non-empty
/// list of `intermediates`, any other state ends the wait at once, the first one included; with an empty list only the
/// deadline ends it. `None` waits for ever; dropping the future cancels.
///
/// # Errors
/// [`ErrorKind::InvalidArgument`] for an interval of zero, before any look; [`ErrorKind::UnexpectedState`];
/// [`ErrorKind::TimedOut`] at the deadline and [`ErrorKind::Cancelled`] when nobody publishes any more, both with the
/// last state.
pub async fn wait_for_state(
    of: &impl Observed,
    interval: Duration,
    deadline: Option<Instant>,
    target: State,
    intermediates: &[State],
) -> Result<()> {
    if interval.is_zero() {
        let error = Error::new(ErrorKind::InvalidArgument, "an interval of zero would never rest");
        return Err(error.on(of.id().as_str()));
    }
    let mut last = None;
    let mut subscription = of.subscribe();
    let waiting = async {
        loop {
            let seen = match &mut subscription {
                Some(subscription) => {
                    let again = async {
                        tokio::time::sleep(interval).await;
                        of.state().await
                    };
                    let status = tokio::select! {
                        biased;
                        status = subscription.next() => status,
                        // What is new is published; what could not be seen may be the next time.
                        _ = again => continue,
                    };
                    match status {
                        Some(status) => status.state,
                        None => {
                            let message = format!("nobody drives it towards {target} any more");
                            let error = Error::new(ErrorKind::Cancelled, message);
                            return Err(last.map_or(error.duplicate(), |state| error.while_in(state)));
                        }
                    }
                }
                None => of.state().await?,
            };
            last = Some(seen);
            match look(of.id(), seen, target, intermediates)? {
                Look::Done => return Ok(()),
                Look::NotYet(_) if subscription.is_none() => tokio::time::sleep(interval).await,
                Look::NotYet(_) => {}
            }
        }
    };
    let ended = match deadline {
        // Biased towards the look: at the target it is success, whatever the clock says.
        Some(deadline) => tokio::select! {
            biased;
            ended = waiting => Some(ended),
            () = tokio::time::sleep_until(deadline) => None,
        },
        None => Some(waiting.await),
    };
    let Some(ended) = ended else {
        let last = match last {
            Some(state) => state,
            None => of.state().await?,
        };
        let message = format!("waited for {target}, and it is still {last}");
        return Err(Error::new(ErrorKind::TimedOut, message).on(of.id().as_str()).while_in(last));
    };
    ended.map_err(|error| error.on(of.id().as_str()))
}
