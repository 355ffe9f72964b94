//! Drives a multiplexed session over the link.

mod before;

use std::collections::VecDeque;
use std::task::Poll;

use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::sync::{mpsc, oneshot};
use tokio_util::compat::{Compat, FuturesAsyncReadCompatExt};
use yamux::{Config, Connection, Mode};

use crate::link::Link;
use crate::protocol::Answer;

/// One stream of a session, with flow control of its own. Dropped without having been shut down, it is reset.
pub(crate) type Stream = Compat<yamux::Stream>;

/// Tells the other side that a stream which it opened was taken, where nothing is written that would: it opens only so many
/// without.
pub(crate) async fn acknowledge(stream: &mut Stream) {
    let _ = stream.write(&[]).await;
}

/// Streams at once: 256 commands with four each.
const STREAMS: usize = 1024;
/// What one stream may hold for a reader that does not read, and so what bounds a session's memory.
const WINDOW: usize = 256 * 1024;

/// Opens streams of a session.
#[derive(Clone, Debug)]
pub(crate) struct Opener(mpsc::UnboundedSender<Wanted>);

/// What is wanted of a session.
#[derive(Debug)]
pub(crate) enum Wanted {
    Stream(oneshot::Sender<Stream>),
    /// An answer to a request, if the session has not begun; nothing if it has.
    Answer(Vec<u8>, oneshot::Sender<Option<Told>>),
    /// What was wanted before has been said.
    Said(oneshot::Sender<()>),
}

impl Wanted {
    /// Whether nobody waits for it any more.
    fn is_given_up(&self) -> bool {
        match self {
            Wanted::Stream(reply) => reply.is_closed(),
            Wanted::Answer(_, reply) => reply.is_closed(),
            Wanted::Said(reply) => reply.is_closed(),
        }
    }
}

/// An answer on its way. Dropped on it, what was begun ends.
#[derive(Debug)]
pub(crate) struct Told {
    answer: Answer,
    taken: oneshot::Sender<()>,
}

impl Opener {
    /// A new stream; `None` when the session is over.
    pub(crate) async fn open(&self) -> Option<Stream> {
        let (reply, stream) = oneshot::channel();
        self.0.send(Wanted::Stream(reply)).ok()?;
        stream.await.ok()
    }

    /// The answer to a request, as a handshake carries it, if the session has not begun: `Some(None)` when it has, and `None` when it
    /// is over. Dropped, it ends what was begun.
    pub(crate) async fn ask(&self, request: Vec<u8>) -> Option<Option<Answer>> {
        let (reply, answer) = oneshot::channel();
        self.0.send(Wanted::Answer(request, reply)).ok()?;
        let told = answer.await.ok()?;
        Some(told.map(|Told { answer, taken }| {
            let _ = taken.send(());
            answer
        }))
    }

    /// Returns when what was wanted before has been said, and what was let go of.
    pub(crate) async fn settle(&self) {
        let (reply, said) = oneshot::channel();
        if self.0.send(Wanted::Said(reply)).is_ok() {
            let _ = said.await;
        }
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
    let (open, mut opens) = mpsc::unbounded_channel();
    let opener = Opener(open);
    let mut arrived = arrived(opener.clone());
    let drive = async move {
        let mut before = VecDeque::new();
        if mode == Mode::Client && !before::is_begun(&link, &mut opens, &mut before).await {
            return;
        }
        let mut next: Option<Next> = None;
        let mut openers = true;
        std::future::poll_fn(move |cx| {
            loop {
                while next.is_none() && openers {
                    let wanted = match before.pop_front() {
                        Some(wanted) => Poll::Ready(Some(wanted)),
                        None => opens.poll_recv(cx),
                    };
                    match wanted {
                        Poll::Ready(Some(Wanted::Stream(reply))) => next = Some(Next::Stream(reply)),
                        Poll::Ready(Some(Wanted::Said(reply))) => next = Some(Next::Said(reply)),
                        Poll::Ready(Some(Wanted::Answer(_, reply))) => drop(reply.send(None)),
                        // Every handle on this session is gone.
                        Poll::Ready(None) => openers = false,
                        Poll::Pending => break,
                    }
                }
                if next.is_some() {
                    match connection.poll_new_outbound(cx) {
                        Poll::Ready(Ok(stream)) => {
                            match next.take() {
                                Some(Next::Stream(reply)) => drop(reply.send(stream.compat())),
                                // What was let go of before comes before a new stream.
                                Some(Next::Said(reply)) => drop(reply.send(())),
                                None => {}
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

/// Who gets the next stream.
enum Next {
    Stream(oneshot::Sender<Stream>),
    Said(oneshot::Sender<()>),
}
