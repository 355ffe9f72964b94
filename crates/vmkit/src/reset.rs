//! A used machine as new: verified, or an error.

use std::time::Duration;

use crate::cleanup::{clean, to_the_end};
use crate::console::ConsoleSinks;
use crate::error::{Error, ErrorKind, Result};
use crate::instance::{Instance, Mark};
use crate::properties::Properties;
use crate::publish::Cause;
use crate::state::State;

/// Rolls a machine back to what it was made from, whatever state it is in: what it has is removed as by a deletion (processes,
/// memory, disk, saved execution), and it is made and started again under its name, within `limit` in all. Afterwards it is
/// Running, and its [`Birth`](crate::Birth) is that of a machine that nobody has used. Where fresh machines are forks of a
/// template, this takes as long as a fork.
///
/// Runs on a task of its own: a cancelled caller does not stop a reset half way.
///
/// # Errors
/// What the step that failed failed with; then the machine is in the state that this step left it in, with nothing of the old
/// one unless the state is that of the deletion, and a reset can be tried again. [`ErrorKind::Inconsistent`] when what runs is
/// not provably new: it is removed again. [`ErrorKind::NotFound`] and [`ErrorKind::NotRunning`] when somebody else has deleted or
/// stopped it meanwhile: it is left to them. [`ErrorKind::Unsupported`] for a copy of a machine ([`Instance::fork`]), which is not
/// touched. [`ErrorKind::TimedOut`], with the state, when `limit` passed.
pub async fn reset(instance: &Instance, console: ConsoleSinks, limit: Duration) -> Result<()> {
    if instance.spec().snapshot.is_some() {
        let error =
            Error::new(ErrorKind::Unsupported, "a copy of a machine that ran has nothing that it could be reset to");
        return Err(error.on(instance.id().as_str()).hint("delete it, and fork the original again"));
    }
    let own = instance.clone();
    let mark = instance.mark();
    to_the_end(instance, limit, "resetting", async move { renew(&own, console, mark).await }).await
}

async fn renew(instance: &Instance, console: ConsoleSinks, mark: Mark) -> Result<()> {
    let old = instance.properties();
    let was_there = is_there(instance);
    clean(instance, Duration::ZERO).await?;
    // Whoever wanted it gone is not to find it again.
    let gone = || taken(instance, ErrorKind::NotFound, "somebody else has deleted it meanwhile");
    if was_there && instance.status().cause == Cause::Elsewhere {
        return Err(gone());
    }
    instance.clone_unless_given_up(mark).await.unwrap_or_else(|| Err(gone()))?;
    instance.start(console).await?;
    let proven = prove_new(&old, instance);
    if proven.is_err() {
        if instance.properties().pid.is_none() && instance.state() != State::Running {
            return Err(taken(instance, ErrorKind::NotRunning, "somebody else has stopped or deleted it meanwhile"));
        }
        // Whoever asked for a new one must not go on with this one.
        clean(instance, Duration::ZERO).await?;
    }
    proven
}

fn is_there(instance: &Instance) -> bool {
    !matches!(instance.state(), State::Initial | State::Deleted)
}

fn taken(instance: &Instance, kind: ErrorKind, why: &str) -> Error {
    Error::new(kind, why)
        .on(instance.id().as_str())
        .during("reset")
        .hint("look whether it is there, and clone and start it if it is to be")
}

/// Whether a machine that runs under another's name is a new one.
pub(crate) fn prove_new(old: &Properties, instance: &Instance) -> Result<()> {
    is_new(old, &instance.properties()).map_err(|why| {
        Error::new(ErrorKind::Inconsistent, format!("the reset is not proven: {why}"))
            .on(instance.id().as_str())
            .hint("the machine is removed; clone and start it, or report this with the backend's name")
    })
}

/// Whether this is another machine than the old one, and a new one, by what the backend says of both.
fn is_new(old: &Properties, new: &Properties) -> std::result::Result<(), &'static str> {
    let Some(birth) = &new.birth else { return Err("the backend does not say how it came to be") };
    if !birth.unused {
        return Err("it was used before");
    }
    if (new.pid, Some(birth)) == (old.pid, old.birth.as_ref()) {
        return Err("it is the one that was there before");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::properties::{Birth, Origin};

    fn machine(pid: u32, at: u64, unused: bool) -> Properties {
        let (template, note, renewed, phases) = (None, None, Vec::new(), Vec::new());
        let birth = Birth { how: Origin::Boot, template, copy_of: None, note, at, unused, renewed, phases };
        Properties { pid: Some(pid), birth: Some(birth), ..Properties::default() }
    }

    #[test]
    fn only_another_unused_machine_is_new() {
        let old = machine(7, 1, true);
        assert!(is_new(&old, &machine(8, 2, true)).is_ok());
        assert!(is_new(&Properties::default(), &machine(8, 2, true)).is_ok());
        assert!(is_new(&old, &old).is_err());
        assert!(is_new(&old, &machine(8, 2, false)).is_err());
        assert!(is_new(&old, &Properties { pid: Some(8), ..Properties::default() }).is_err());
    }
}
