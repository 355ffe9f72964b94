//! A command that runs in the guest, as its host has it.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf, WriteHalf};
use tokio::sync::{oneshot, watch};
use tokio::task::JoinHandle;

use super::readers::Arrived;
use super::{AgentError, Client, lock, send};
use crate::mux::Stream;
use crate::protocol::{Control, Exit, Which};

/// A command that runs.
#[derive(Debug)]
pub struct Exec {
    /// Its process id in the guest.
    pub pid: u32,
    /// Its standard input, when connected.
    pub stdin: Option<ExecStdin>,
    /// Its standard output, when connected.
    pub stdout: Option<ExecReader>,
    /// Its standard error, when connected.
    pub stderr: Option<ExecReader>,
    /// Waiting and signalling. Dropped before the command ended, it kills it, unless it was started detached.
    pub control: ExecControl,
}

/// Waiting for a command and signalling it.
#[derive(Debug)]
pub struct ExecControl {
    pub(super) to: Option<WriteHalf<Stream>>,
    pub(super) exit: watch::Receiver<Progress>,
    /// Absent when all has been read.
    pub(super) reader: Option<JoinHandle<()>>,
    pub(super) detached: bool,
    /// Kept for as long as the command is held.
    pub(super) session: Client,
}

#[derive(Clone, Copy, Debug)]
pub(super) enum Progress {
    Running,
    Ended(Exit),
    Lost,
}

impl ExecControl {
    /// How it ended. Does not wait for its streams to be read.
    ///
    /// # Errors
    /// [`AgentError::Closed`] when the connection was lost first, [`AgentError::Rebooted`] when that is why.
    ///
    /// # Cancel safety
    /// May be dropped and called again.
    pub async fn wait(&mut self) -> Result<Exit, AgentError> {
        let progress = self.exit.wait_for(|progress| !matches!(progress, Progress::Running)).await;
        match progress.map(|progress| *progress) {
            Ok(Progress::Ended(exit)) => Ok(exit),
            Ok(Progress::Running | Progress::Lost) | Err(_) => Err(self.session.explain(AgentError::Closed)),
        }
    }

    /// Sends a signal to its process group. One that has ended is left alone.
    ///
    /// # Errors
    /// [`AgentError::Closed`] when the connection is gone.
    pub async fn signal(&mut self, signal: i32) -> Result<(), AgentError> {
        match &mut self.to {
            Some(to) if !matches!(*self.exit.borrow(), Progress::Ended(_)) => send(to, &Control::Signal(signal)).await,
            _ => Ok(()),
        }
    }
}

impl Drop for ExecControl {
    fn drop(&mut self) {
        // The control stream's end is what kills it. One that has ended still has to say what its outputs were.
        if matches!(*self.exit.borrow(), Progress::Running) && !self.detached {
            self.reader.iter().for_each(JoinHandle::abort);
        }
    }
}

/// A command's standard input. Shut it down to signal the end.
#[derive(Debug)]
pub struct ExecStdin(pub(super) Stream);

impl AsyncWrite for ExecStdin {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        match ready!(Pin::new(&mut self.0).poll_write(cx, data)) {
            Err(error) if error.kind() == io::ErrorKind::WriteZero => {
                Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()))
            }
            other => Poll::Ready(other),
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}

/// One of a command's outputs. What is not read holds the command back; nothing is lost. When the session is lost before all of it
/// was read, that is an error after what had arrived, and no end.
#[derive(Debug)]
pub struct ExecReader {
    pub(super) state: Reading,
    pub(super) session: Client,
    pub(super) key: (u64, Which),
}

#[derive(Debug)]
pub(super) enum Reading {
    Waiting(oneshot::Receiver<Arrived>),
    Whole(io::Cursor<Vec<u8>>),
    Open(Stream),
    Ended,
}

impl AsyncRead for ExecReader {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        loop {
            match &mut self.state {
                Reading::Waiting(stream) => {
                    self.state = match ready!(Pin::new(stream).poll(cx)) {
                        Ok(Arrived::Stream(stream)) => Reading::Open(stream),
                        Ok(Arrived::Whole(bytes)) => Reading::Whole(io::Cursor::new(bytes)),
                        // Who says nothing of it has not come to its end.
                        Err(_) => {
                            self.state = Reading::Ended;
                            return Poll::Ready(Err(io::ErrorKind::ConnectionAborted.into()));
                        }
                    };
                }
                Reading::Whole(bytes) => return Pin::new(bytes).poll_read(cx, buf),
                Reading::Open(stream) => {
                    let before = buf.filled().len();
                    let mut read = ready!(Pin::new(&mut *stream).poll_read(cx, buf));
                    if read.is_err() || buf.filled().len() == before {
                        // Its other side has ended a stream that was read to its end, and not all of them at once.
                        if read.is_ok() && stream.get_ref().is_closed() {
                            read = Err(io::ErrorKind::ConnectionAborted.into());
                        }
                        self.state = Reading::Ended;
                    }
                    return Poll::Ready(read);
                }
                Reading::Ended => return Poll::Ready(Ok(())),
            }
        }
    }
}

impl Drop for ExecReader {
    fn drop(&mut self) {
        // A stream that arrives for nobody is reset, and the command sees a broken pipe.
        lock(&self.session.0.waiting).all.remove(&self.key);
    }
}
