//! Reaps every child: commands, and the orphans that fall to process 1.
//!
//! A signal says that one has ended, and others that the machine is to (`shutdown.rs`). Their handler adds to a counter that the
//! runtime waits for, and does no more: the runtime's own way of receiving signals sends itself a message, which costs a guest under
//! emulation several times as much.

use std::collections::HashMap;
use std::ffi::c_int;
use std::io;
use std::os::fd::{BorrowedFd, IntoRawFd, OwnedFd};
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::{Arc, Mutex};

use rustix::event::{EventfdFlags, eventfd};
use rustix::process::{Pid, WaitOptions, wait};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::{Notify, oneshot};

use super::quiet::Quiet;
use super::{lock, shutdown};
use crate::protocol::Exit;

/// The counter's descriptor, for the handler. It is never closed: a handler may use it at any time.
static ENDED: AtomicI32 = AtomicI32::new(-1);

#[derive(Clone, Default)]
pub(super) struct Reaper {
    watchers: Arc<Mutex<HashMap<i32, oneshot::Sender<Exit>>>>,
    asked: Arc<Notify>,
}

impl Reaper {
    /// Once in a process; a second one takes over from the first.
    pub(super) fn start(quiet: &Quiet) -> io::Result<Reaper> {
        let reaper = Reaper::default();
        let counter = eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?;
        // Another name for the handler: that of the runtime is closed with the runtime.
        let handlers = rustix::io::fcntl_dupfd_cloexec(&counter, 0)?;
        ENDED.store(handlers.into_raw_fd(), Ordering::SeqCst);
        quiet.watch_children(&counter)?;
        let counter = watch(counter)?;
        handle_signals()?;
        let own = reaper.clone();
        tokio::spawn(async move {
            loop {
                own.reap();
                if shutdown::is_asked() {
                    own.tell_asked();
                }
                // An error means that the runtime ends.
                let Ok(mut ready) = counter.readable().await else { return };
                let _ = rustix::io::read(ready.get_inner(), &mut [0; 8]);
                ready.clear_ready();
            }
        });
        Ok(reaper)
    }

    /// How a child ends. To be called with nothing awaited since it was started, on the one thread that also reaps: so
    /// the child cannot be reaped in between.
    pub(super) fn watch(&self, pid: Pid) -> oneshot::Receiver<Exit> {
        let (send, exit) = oneshot::channel();
        lock(&self.watchers).insert(pid.as_raw_nonzero().get(), send);
        exit
    }

    /// Tells that process 1 is to end the machine.
    pub(super) fn tell_asked(&self) {
        self.asked.notify_one();
    }

    /// Returns when process 1 is to end the machine. For one caller.
    pub(super) async fn asked(&self) {
        self.asked.notified().await;
    }

    /// Reaps what has ended by now.
    pub(super) fn reap(&self) {
        while let Ok(Some((pid, status))) = wait(WaitOptions::NOHANG) {
            let exit = match (status.exit_status(), status.terminating_signal()) {
                (Some(code), _) => Exit::Code(code),
                (None, Some(signal)) => Exit::Signal(signal),
                (None, None) => continue,
            };
            if let Some(watcher) = lock(&self.watchers).remove(&pid.as_raw_nonzero().get()) {
                let _ = watcher.send(exit);
            }
        }
    }
}

#[expect(unsafe_code, reason = "the runtime cannot know that a descriptor stays the same one")]
fn watch(counter: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an `OwnedFd` is the same open descriptor for as long as it lives, and `AsyncFd` owns it.
    Ok(unsafe { AsyncFd::register_with_interest(counter, Interest::READABLE) }?)
}

#[expect(unsafe_code, reason = "the libraries that we use have no such call")]
fn handle_signals() -> io::Result<()> {
    let handler: extern "C" fn(c_int) = heard;
    // Whoever is not process 1 ends by them, as ever.
    let ends: &[c_int] = if std::process::id() == 1 { &shutdown::SIGNALS } else { &[] };
    for &signal in [libc::SIGCHLD].iter().chain(ends) {
        // SAFETY: all zeros is a valid action. The handler makes one system call, on a descriptor that is never closed.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = handler as libc::sighandler_t;
            action.sa_flags = libc::SA_RESTART | libc::SA_NOCLDSTOP;
            if libc::sigaction(signal, &raw const action, std::ptr::null_mut()) != 0 {
                return Err(io::Error::last_os_error());
            }
        }
    }
    Ok(())
}

/// Touches no error number: a child may be using it, in the same memory.
#[expect(unsafe_code, reason = "called by the kernel, at any moment")]
extern "C" fn heard(signal: c_int) {
    if signal != libc::SIGCHLD {
        shutdown::ask(signal);
    }
    // SAFETY: the descriptor is never closed.
    let counter = unsafe { BorrowedFd::borrow_raw(ENDED.load(Ordering::Relaxed)) };
    // A counter that is full says what is to be said already.
    let _ = rustix::io::write(counter, &1u64.to_ne_bytes());
}
