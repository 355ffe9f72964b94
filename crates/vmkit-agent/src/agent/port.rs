//! Virtio-serial ports, and sockets in their place.
//!
//! A port without a host reads as ended and polls as hung up, for as long as nobody comes. Level-triggered waiting would
//! spin on that, and the runtime's own edge-triggered waiting never forgets a hang-up: so each port has an epoll of its own,
//! whose readiness the runtime waits for.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::path::PathBuf;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use rustix::event::epoll;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};

/// The names of the ports that hosts talk to begin so; several, so that several host processes can at once.
pub const NAME: &str = "org.vmkit.agent.";

/// How many ports of ours there will be, where the host says so: `vmkit.ports=` on the kernel's command line.
pub fn ports_to_come() -> Option<usize> {
    fs::read_to_string("/proc/cmdline").ok().and_then(|cmdline| count(&cmdline))
}

fn count(cmdline: &str) -> Option<usize> {
    cmdline.split_ascii_whitespace().filter_map(|word| word.strip_prefix("vmkit.ports=")?.parse().ok()).next_back()
}

/// The device nodes of our ports that are there now.
pub fn ports() -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir("/sys/class/virtio-ports") else { return Vec::new() };
    let mut found: Vec<PathBuf> = entries
        .flatten()
        .filter(|entry| fs::read_to_string(entry.path().join("name")).is_ok_and(|name| name.starts_with(NAME)))
        .map(|entry| PathBuf::from("/dev").join(entry.file_name()))
        // Opening a node that is not there yet would make a regular file of that name.
        .filter(|node| fs::metadata(node).is_ok_and(|meta| meta.file_type().is_char_device()))
        .collect();
    found.sort();
    found
}

/// A virtio-serial port, or what is used as one. Reads as ended once when its host leaves, and then waits for the next.
pub struct Port {
    file: OwnedFd,
    events: AsyncFd<OwnedFd>,
    /// Its end is the end.
    once: bool,
    ended: bool,
}

impl Port {
    /// Opens a port's device node. Must be called in a tokio runtime.
    ///
    /// # Errors
    /// When it cannot be opened, or another process has it.
    pub fn open(node: &std::path::Path) -> io::Result<Port> {
        let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC;
        Port::new(File::from(rustix::fs::open(node, flags, Mode::empty())?).into(), false)
    }

    /// A socket that does not block; it stays ended. Must be called in a tokio runtime.
    ///
    /// # Errors
    /// When it cannot be waited for.
    pub fn socket(socket: OwnedFd) -> io::Result<Port> {
        Port::new(socket, true)
    }

    fn new(file: OwnedFd, once: bool) -> io::Result<Port> {
        let events = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let interest = epoll::EventFlags::IN | epoll::EventFlags::OUT | epoll::EventFlags::ET;
        epoll::add(&events, &file, epoll::EventData::new_u64(0), interest)?;
        Ok(Port { file, events: watch(events)?, once, ended: false })
    }

    /// Waits until something about the port has changed.
    fn poll_change(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        loop {
            let mut guard = ready!(self.events.poll_read_ready(cx))?;
            let mut list = Vec::with_capacity(1);
            let timeout = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
            match epoll::wait(guard.get_inner().as_fd(), rustix::buffer::spare_capacity(&mut list), Some(&timeout)) {
                Ok(0) | Err(Errno::INTR) => guard.clear_ready(),
                Ok(_) => return Poll::Ready(Ok(())),
                Err(error) => return Poll::Ready(Err(error.into())),
            }
        }
    }
}

impl AsFd for Port {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

#[expect(unsafe_code, reason = "the runtime cannot know that a descriptor stays the same one")]
fn watch(events: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an `OwnedFd` is the same open descriptor for as long as it lives, and `AsyncFd` owns it.
    Ok(unsafe { AsyncFd::register_with_interest(events, Interest::READABLE) }?)
}

impl AsyncRead for Port {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        loop {
            match rustix::io::read(&self.file, buf.initialize_unfilled()) {
                Ok(0) if self.once || !self.ended => {
                    self.ended = true;
                    return Poll::Ready(Ok(()));
                }
                Ok(0) | Err(Errno::AGAIN) => ready!(self.poll_change(cx))?,
                Ok(n) => {
                    self.ended = false;
                    buf.advance(n);
                    return Poll::Ready(Ok(()));
                }
                Err(Errno::INTR) => {}
                Err(error) => return Poll::Ready(Err(error.into())),
            }
        }
    }
}

impl AsyncWrite for Port {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        loop {
            match rustix::io::write(&self.file, data) {
                Ok(n) => return Poll::Ready(Ok(n)),
                Err(Errno::AGAIN) => {
                    ready!(self.poll_change(cx))?;
                    // The change may be one that the reader waits for.
                    cx.waker().wake_by_ref();
                }
                Err(Errno::INTR) => {}
                Err(error) => return Poll::Ready(Err(error.into())),
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_host_may_say_how_many_ports_there_are() {
        assert_eq!(count("quiet vmkit.ports=2 vmkit.ports=8 vmkit.hostname=a\n"), Some(8));
        for none in ["", "quiet", "vmkit.ports=", "vmkit.ports=all", "xvmkit.ports=3"] {
            assert_eq!(count(none), None, "{none}");
        }
    }
}
