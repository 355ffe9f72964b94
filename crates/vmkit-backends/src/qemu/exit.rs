//! How QEMU ended.

use std::path::Path;
use std::process::ExitStatus;

use vmkit::{Error, ErrorKind, Exit};

use super::console;

/// What a guest's kernel that gave up is called.
pub(super) const PANICKED: &str = "the guest's kernel panicked";

/// What nobody can refuse: from whoever looks after the host, or its kernel.
const SIGKILL: i32 = rustix::process::Signal::KILL.as_raw();

const KILLED: &str = "somebody on the host killed it, or its kernel for want of memory (`dmesg` tells); see `vmkit ls`, and start it again";

/// QEMU's own errors end it with the same code as a panic: the console tells.
pub(super) fn of(status: Option<ExitStatus>, output: String, dir: &Path) -> Exit {
    use std::os::unix::process::ExitStatusExt;
    let code = status.and_then(|status| status.code());
    let output = match code == Some(1) && console::ended_panicked(dir) {
        true => format!("{PANICKED}\n{output}"),
        false => output,
    };
    Exit { code, signal: status.and_then(|status| status.signal()), output }
}

/// `doing`: what was being done with the machine.
pub(super) fn error(exit: &Exit, doing: &str) -> Error {
    let (how, next) = match (exit.code, exit.signal) {
        _ if exit.output.starts_with(PANICKED) => (PANICKED.into(), None),
        (Some(code), _) => (format!("QEMU ended with exit code {code} while the machine {doing}"), None),
        (_, Some(SIGKILL)) => (format!("QEMU was killed while the machine {doing}"), Some(KILLED)),
        (_, Some(signal)) => (format!("QEMU was ended by signal {signal} while the machine {doing}"), None),
        (None, None) => (format!("QEMU ended while the machine {doing}"), None),
    };
    let error = Error::new(ErrorKind::Exited, how);
    match next {
        Some(next) => error.hint(next),
        None => error,
    }
}

/// Whether somebody has killed QEMU, who was not us: what it was given is none the worse for it.
pub(super) fn is_killed(error: &Error) -> bool {
    error.next_step() == Some(KILLED)
}
