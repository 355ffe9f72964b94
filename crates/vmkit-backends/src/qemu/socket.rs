//! Connecting to, and listening on, sockets in a machine's directory.
//!
//! A socket's address holds 107 bytes, and directories may be deeper than that: it is named relative to a descriptor.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;

use tokio::net::{UnixListener, UnixStream};

/// Connects to the socket `name` in `dir`.
///
/// # Errors
/// When nobody listens there.
pub(crate) async fn connect(dir: &Path, name: &str) -> io::Result<UnixStream> {
    let dir = File::open(dir)?;
    UnixStream::connect(format!("/proc/self/fd/{}/{name}", dir.as_raw_fd())).await
}

/// Listens on a new socket `name` in `dir`.
///
/// # Errors
/// When there is something of that name, or it cannot be made.
pub(crate) fn listen(dir: &Path, name: &str) -> io::Result<UnixListener> {
    let dir = File::open(dir)?;
    UnixListener::bind(format!("/proc/self/fd/{}/{name}", dir.as_raw_fd()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_directory_that_is_too_deep_for_an_address_is_reached() {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("x".repeat(200));
        std::fs::create_dir(&dir).unwrap();
        let _listener = listen(&dir, "here.sock").unwrap();
        connect(&dir, "here.sock").await.unwrap();
        assert!(connect(&dir, "not.sock").await.is_err());
    }
}
