//! How QEMU ended.

use std::path::Path;
use std::process::ExitStatus;

use vmkit::{Error, ErrorKind, Exit};

use super::console;

/// What a guest's kernel that gave up is called.
pub(super) const PANICKED: &str = "the guest's kernel panicked";

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

pub(super) fn error(exit: &Exit) -> Error {
    let how = match (exit.code, exit.signal) {
        _ if exit.output.starts_with(PANICKED) => PANICKED.into(),
        (Some(code), _) => format!("QEMU ended with exit code {code} while the machine was starting"),
        (_, Some(signal)) => format!("QEMU was killed by signal {signal} while the machine was starting"),
        (None, None) => "QEMU ended while the machine was starting".into(),
    };
    Error::new(ErrorKind::Exited, how)
}
