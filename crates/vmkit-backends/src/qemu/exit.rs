//! How QEMU ended.

use std::process::ExitStatus;

use vmkit::{Error, ErrorKind, Exit};

pub(super) fn of(status: Option<ExitStatus>, output: String) -> Exit {
    use std::os::unix::process::ExitStatusExt;
    Exit { code: status.and_then(|status| status.code()), signal: status.and_then(|status| status.signal()), output }
}

pub(super) fn error(exit: &Exit) -> Error {
    let how = match (exit.code, exit.signal) {
        (Some(code), _) => format!("QEMU ended with exit code {code} while the machine was starting"),
        (_, Some(signal)) => format!("QEMU was killed by signal {signal} while the machine was starting"),
        (None, None) => "QEMU ended while the machine was starting".into(),
    };
    Error::new(ErrorKind::Exited, how)
}
