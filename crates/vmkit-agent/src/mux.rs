//! Drives a multiplexed session over the link.

use std::task::{Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{mpsc, oneshot};
use tokio_util::compat::{Compat, FuturesAsyncReadCompatExt};
use yamux::{Config, Connection, Mode};

use crate::link::Link;

/// One stream of a session, with flow control of its own. Dropped without having been shut down, it is reset.
pub(crate) type Stream = Compat<yamux::Stream>;

/// Streams at once: 256 commands with four each.
const STREAMS: usize = 1024;
/// What one stream may hold for a reader that does not read, and so what bounds a session's memory.
const WINDOW: usize = 256 * 1024;

/// Opens streams of a session.
#[derive(Clone, Debug)]
pub(crate) struct Opener(mpsc::UnboundedSender<oneshot::Sender<Stream>>);

impl Opener {
    /// A new stream; `None` when the session is over.
    pub(crate) async fn open(&self) -> Option<Stream> {
        let (reply, stream) = oneshot::channel();
        self.0.send(reply).ok()?;
        stream.await.ok()
    }

    pub(crate) fn is_same(&self, other: &Opener) -> bool {
        self.0.same_channel(&other.0)
    }

    pub(crate) async fn closed(&self) {
        self.0.closed().await;
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.0.is_closed()
    }
}

/// A session: what to drive, and how to open streams. Those that the other side opens go to `arrived`, which is dropped when the
/// session is over.
pub(crate) fn session<S, F>(
    link: Link<S>,
    mode: Mode,
    arrived: impl FnOnce(Opener) -> F,
) -> (impl Future<Output = ()> + Send, Opener)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    F: FnMut(Stream) + Send + 'static,
{
    let mut config = Config::default();
    config.set_max_connection_receive_window(None);
    config.set_max_num_streams(STREAMS);
    config.set_max_connection_receive_window(Some(STREAMS * WINDOW));
    let mut connection = Connection::new(link.clone(), config, mode);
    let (open, mut opens) = mpsc::unbounded_channel::<oneshot::Sender<Stream>>();
    let opener = Opener(open);
    let mut arrived = arrived(opener.clone());
    let drive = async move {
        let mut next: Option<oneshot::Sender<Stream>> = None;
        let mut openers = true;
        // The multiplexer speaks as soon as it is driven. One that nobody needs yet is not: its other side would be woken for nothing.
        let mut idle = true;
        std::future::poll_fn(move |cx| {
            loop {
                if idle {
                    match opens.poll_recv(cx) {
                        Poll::Ready(Some(reply)) => next = Some(reply),
                        Poll::Ready(None) => return Poll::Ready(()),
                        // Also its end: whoever holds the session is to know.
                        Poll::Pending => drop(ready!(link.poll_heard(cx))),
                    }
                    idle = false;
                }
                if next.is_none() && openers {
                    match opens.poll_recv(cx) {
                        Poll::Ready(Some(reply)) => next = Some(reply),
                        // Every handle on this session is gone.
                        Poll::Ready(None) => openers = false,
                        Poll::Pending => {}
                    }
                }
                if next.is_some() {
                    match connection.poll_new_outbound(cx) {
                        Poll::Ready(Ok(stream)) => {
                            if let Some(reply) = next.take() {
                                let _ = reply.send(stream.compat());
                            }
                            continue;
                        }
                        Poll::Ready(Err(_)) => return Poll::Ready(()),
                        Poll::Pending => {}
                    }
                }
                match connection.poll_next_inbound(cx) {
                    Poll::Ready(Some(Ok(stream))) => {
                        arrived(stream.compat());
                        continue;
                    }
                    Poll::Ready(Some(Err(_)) | None) => return Poll::Ready(()),
                    Poll::Pending => {}
                }
                // Nothing more to say for now: one write for all of it.
                return match link.poll_send(cx) {
                    Poll::Ready(Err(_)) => Poll::Ready(()),
                    Poll::Ready(Ok(())) | Poll::Pending if !openers => Poll::Ready(()),
                    Poll::Ready(Ok(())) | Poll::Pending => Poll::Pending,
                };
            }
        })
        .await;
    };
    (drive, opener)
}
