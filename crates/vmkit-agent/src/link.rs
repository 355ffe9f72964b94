//! The link layer: a session's beginning is unmistakable on a line that hosts come to and leave at any byte.
//!
//! A marker of eight bytes begins a handshake frame. In data, the marker's first seven bytes are followed by a zero
//! byte that the receiver drops, so the marker never occurs in data. Whoever sees it knows that a session begins.

use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Waker, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// The protocol's version; both sides must have the same.
pub const VERSION: u16 = 10;

/// Begins a handshake frame. All bytes differ, so a match never has to be re-examined.
pub const MARKER: [u8; 8] = [0xF5, b'v', b'm', b'k', b'i', b't', 0x1A, 0xA7];
const PREFIX: usize = 7;
const STUFFING: u8 = 0;

/// Bytes of a handshake frame after its marker.
pub const FRAME: usize = 24;
/// Ends a payload; no byte of the marker.
const END: u8 = 0;
/// The longest message that a handshake carries.
pub const MAX_PAYLOAD: usize = 64 * 1024;
/// Bytes read from the line at once.
const READ: usize = 64 * 1024;
/// A virtio-serial port takes no more at once.
const WRITE: usize = 32 * 1024;

/// Escapes data.
#[derive(Debug, Default)]
pub struct Encoder {
    matched: usize,
}

impl Encoder {
    /// Appends `data` to `out`, escaped. Keeps its place between calls.
    pub fn encode(&mut self, mut data: &[u8], out: &mut Vec<u8>) {
        while !data.is_empty() {
            if self.matched == 0 {
                let plain = memchr::memchr(MARKER[0], data).unwrap_or(data.len());
                out.extend_from_slice(&data[..plain]);
                data = &data[plain..];
            }
            let Some((&byte, rest)) = data.split_first() else { break };
            out.push(byte);
            data = rest;
            self.matched = advance(self.matched, byte);
            if self.matched == PREFIX {
                out.push(STUFFING);
                self.matched = 0;
            }
        }
    }
}

const fn advance(matched: usize, byte: u8) -> usize {
    if byte == MARKER[matched] {
        matched + 1
    } else if byte == MARKER[0] {
        1
    } else {
        0
    }
}

/// Undoes the escape and finds markers.
#[derive(Debug, Default)]
pub struct Decoder {
    matched: usize,
}

/// What a call of [`Decoder::decode`] did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Decoded {
    /// Bytes taken from the input.
    pub consumed: usize,
    /// Bytes put into the output.
    pub produced: usize,
    /// What stopped it.
    pub stop: Stop,
}

/// Why [`Decoder::decode`] stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// Input or output is used up.
    More,
    /// A marker: what was produced before it is the end of another session, and a handshake frame follows.
    Marker,
    /// What no encoder produces: the line carries something else.
    Garbage,
}

impl Decoder {
    /// Decodes from `raw` into `out` until one of them is used up or a marker is found.
    pub fn decode(&mut self, raw: &[u8], out: &mut [u8]) -> Decoded {
        let (mut consumed, mut produced) = (0, 0);
        let done = |consumed, produced, stop| Decoded { consumed, produced, stop };
        loop {
            if self.matched == PREFIX {
                let Some(&byte) = raw.get(consumed) else { return done(consumed, produced, Stop::More) };
                consumed += 1;
                self.matched = 0;
                if byte == MARKER[PREFIX] {
                    return done(consumed, produced, Stop::Marker);
                }
                if byte != STUFFING {
                    // A host was killed in the middle of an escape: this may be the next one's marker already.
                    self.matched = advance(0, byte);
                    return done(consumed, produced, Stop::Garbage);
                }
                continue;
            }
            let room = (raw.len() - consumed).min(out.len() - produced);
            if room == 0 {
                return done(consumed, produced, Stop::More);
            }
            let ahead = &raw[consumed..consumed + room];
            if self.matched == 0 {
                let plain = memchr::memchr(MARKER[0], ahead).unwrap_or(room);
                if plain > 0 {
                    out[produced..produced + plain].copy_from_slice(&ahead[..plain]);
                    consumed += plain;
                    produced += plain;
                    continue;
                }
            }
            out[produced] = ahead[0];
            consumed += 1;
            produced += 1;
            self.matched = advance(self.matched, ahead[0]);
        }
    }
}

/// Who speaks in a handshake.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The host begins a session.
    Hello,
    /// The agent is there, or its session has ended.
    Ack,
    /// The machine is about to be saved: what runs survives the loss of its session, which ends, and the line stays.
    Bye,
    /// The agent has just begun: what it was told before, if there was one before, is forgotten.
    Up,
    /// A request that needs no session, made before there is one; without a payload, its host waits no longer than it must.
    Ask,
    /// To an `Ask`.
    Answer,
}

/// A handshake frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Handshake {
    /// Who speaks.
    pub kind: Kind,
    /// The speaker's protocol version.
    pub version: u16,
    /// Tells this session's answer from an older one's.
    pub nonce: [u8; 16],
    /// What is said with it: a question that need not wait for a session, or its answer. Sent as data is, so that a host that
    /// leaves in the middle of it is noticed when the next one begins. At most [`MAX_PAYLOAD`] bytes.
    pub payload: Vec<u8>,
}

impl Handshake {
    /// The frame with its marker.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(MARKER.len() + FRAME + self.payload.len());
        out.extend_from_slice(&MARKER);
        out.push(match self.kind {
            Kind::Hello => 1,
            Kind::Ack => 2,
            Kind::Bye => 3,
            Kind::Up => 4,
            Kind::Ask => 5,
            Kind::Answer => 6,
        });
        out.push(0);
        out.extend_from_slice(&self.version.to_le_bytes());
        out.extend_from_slice(&self.nonce);
        out.extend_from_slice(&(self.payload.len() as u32).to_le_bytes());
        if !self.payload.is_empty() {
            let mut encoder = Encoder::default();
            encoder.encode(&self.payload, &mut out);
            // Whatever the payload ends with: what comes after it begins with nothing of a marker.
            encoder.encode(&[END], &mut out);
        }
        out
    }

    /// The frame after a marker, and how many bytes of payload follow it; `None` when it is none of ours.
    pub fn decode(frame: &[u8; FRAME]) -> Option<(Handshake, usize)> {
        let kind = match frame[0] {
            1 => Kind::Hello,
            2 => Kind::Ack,
            3 => Kind::Bye,
            4 => Kind::Up,
            5 => Kind::Ask,
            6 => Kind::Answer,
            _ => return None,
        };
        let version = u16::from_le_bytes([frame[2], frame[3]]);
        let mut nonce = [0; 16];
        nonce.copy_from_slice(&frame[4..20]);
        let length = u32::from_le_bytes([frame[20], frame[21], frame[22], frame[23]]) as usize;
        (length <= MAX_PAYLOAD).then_some((Handshake { kind, version, nonce, payload: Vec::new() }, length))
    }
}

/// The line, shared by the handshakes and the sessions on it.
pub(crate) struct Link<S>(Arc<Mutex<Inner<S>>>);

impl<S> Clone for Link<S> {
    fn clone(&self) -> Link<S> {
        Link(self.0.clone())
    }
}

struct Inner<S> {
    line: S,
    raw: Box<[u8]>,
    start: usize,
    end: usize,
    decoder: Decoder,
    encoder: Encoder,
    out: Vec<u8>,
    sent: usize,
    /// A marker was read: a handshake frame is next, whatever session was under way.
    marked: bool,
    /// Who ends the session that is under way when a marker was read; without one it has its end there.
    listens: Option<Option<Waker>>,
    /// A session that reads nothing any more: the rest is the listener's.
    over: bool,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Link<S> {
    pub(crate) fn new(line: S) -> Link<S> {
        Link(Arc::new(Mutex::new(Inner {
            line,
            raw: vec![0; READ].into_boxed_slice(),
            start: 0,
            end: 0,
            decoder: Decoder::default(),
            encoder: Encoder::default(),
            out: Vec::new(),
            sent: 0,
            marked: false,
            listens: None,
            over: false,
        })))
    }

    /// A session begins that does not end where a handshake frame begins, but reads no further: whoever waits for
    /// [`interrupted`](Link::interrupted) ends it.
    pub(crate) fn begin(&self) {
        let mut inner = self.lock();
        (inner.listens, inner.over) = (Some(None), false);
    }

    /// Returns when a handshake frame has begun in the middle of a session. For one caller.
    pub(crate) async fn interrupted(&self) {
        std::future::poll_fn(|cx| {
            let mut inner = self.lock();
            inner.listens = Some(Some(cx.waker().clone()));
            if inner.over { Poll::Ready(()) } else { Poll::Pending }
        })
        .await;
    }

    /// Returns when the other side has said something that was not read yet: false at the end of the line.
    pub(crate) async fn heard(&self) -> io::Result<bool> {
        std::future::poll_fn(|cx| self.poll_heard(cx)).await
    }

    /// As [`heard`](Link::heard).
    pub(crate) fn poll_heard(&self, cx: &mut Context<'_>) -> Poll<io::Result<bool>> {
        self.lock().poll_fill(cx).map_ok(|n| n > 0)
    }

    /// Whether what was heard is a handshake's first byte, where a session may begin: no session begins with it.
    pub(crate) fn at_handshake(&self) -> bool {
        let inner = self.lock();
        inner.marked || inner.raw[inner.start..inner.end].first() == Some(&MARKER[0])
    }

    /// The next handshake frame, whatever comes before it; `None` at the end of the line.
    pub(crate) async fn next_handshake(&self) -> io::Result<Option<Handshake>> {
        let mut skip = vec![0; 4096];
        loop {
            while !self.lock().marked {
                let n = std::future::poll_fn(|cx| self.lock().poll_data(cx, &mut skip)).await;
                match n {
                    Ok(0) if !self.lock().marked => return Ok(None),
                    Ok(_) => {}
                    Err(error) if error.kind() == io::ErrorKind::InvalidData => {}
                    Err(error) => return Err(error),
                }
            }
            let mut frame = [0; FRAME];
            for byte in &mut frame {
                match std::future::poll_fn(|cx| self.lock().poll_raw_byte(cx)).await {
                    Ok(Some(next)) => *byte = next,
                    ended => {
                        // Half a frame and the end of the line: the next host's is a frame of its own.
                        self.lock().marked = false;
                        return ended.map(|_| None);
                    }
                }
            }
            self.lock().marked = false;
            let Some((mut handshake, length)) = Handshake::decode(&frame) else { continue };
            let whole = if length == 0 { 0 } else { length + 1 };
            handshake.payload.resize(whole, 0);
            let mut arrived = 0;
            while arrived < whole {
                let rest = &mut handshake.payload[arrived..];
                match std::future::poll_fn(|cx| self.lock().poll_data(cx, rest)).await {
                    Ok(0) if self.lock().marked => break,
                    // Half of it and the end of the line.
                    Ok(0) => return Ok(None),
                    Ok(n) => arrived += n,
                    Err(error) if error.kind() == io::ErrorKind::InvalidData => break,
                    Err(error) => return Err(error),
                }
            }
            if arrived == whole && handshake.payload.pop().is_none_or(|end| end == END) {
                return Ok(Some(handshake));
            }
            // Whoever said it left in the middle: what follows is the next one's, or the line's end.
        }
    }

    /// Whether a session ended because the other side began anew.
    pub(crate) fn began_anew(&self) -> bool {
        self.lock().marked
    }

    /// The other side began anew, as was heard before a session.
    pub(crate) fn set_anew(&self) {
        self.lock().marked = true;
    }

    /// Begins a session in our direction: drops what was not sent yet and sends the frame.
    pub(crate) async fn send_handshake(&self, handshake: &Handshake) -> io::Result<()> {
        {
            let mut inner = self.lock();
            inner.out.clear();
            inner.sent = 0;
            inner.encoder = Encoder::default();
            inner.out = handshake.encode();
        }
        std::future::poll_fn(|cx| self.lock().poll_send(cx)).await
    }

    /// Sends what is waiting. Sessions call it when they have nothing more to say for now: many frames, one write.
    /// A session that is over has nothing more to say.
    pub(crate) fn poll_send(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut inner = self.lock();
        if inner.over { Poll::Pending } else { inner.poll_send(cx) }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Inner<S>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> Inner<S> {
    fn poll_fill(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        if self.start == self.end {
            let mut buf = ReadBuf::new(&mut self.raw);
            ready!(Pin::new(&mut self.line).poll_read(cx, &mut buf))?;
            (self.start, self.end) = (0, buf.filled().len());
        }
        Poll::Ready(Ok(self.end - self.start))
    }

    fn poll_raw_byte(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Option<u8>>> {
        if ready!(self.poll_fill(cx))? == 0 {
            return Poll::Ready(Ok(None));
        }
        self.start += 1;
        Poll::Ready(Ok(Some(self.raw[self.start - 1])))
    }

    /// Decoded data; 0 at the end of the line and, after what came before it, at a marker.
    fn poll_data(&mut self, cx: &mut Context<'_>, out: &mut [u8]) -> Poll<io::Result<usize>> {
        loop {
            if self.marked || out.is_empty() || ready!(self.poll_fill(cx))? == 0 {
                return Poll::Ready(Ok(0));
            }
            let decoded = self.decoder.decode(&self.raw[self.start..self.end], out);
            self.start += decoded.consumed;
            match decoded.stop {
                Stop::Marker => self.marked = true,
                Stop::Garbage => return Poll::Ready(Err(io::ErrorKind::InvalidData.into())),
                Stop::More if decoded.produced == 0 => continue,
                Stop::More => {}
            }
            return Poll::Ready(Ok(decoded.produced));
        }
    }

    fn poll_send(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while self.sent < self.out.len() {
            let next = &self.out[self.sent..(self.sent + WRITE).min(self.out.len())];
            let n = ready!(Pin::new(&mut self.line).poll_write(cx, next))?;
            if n == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.sent += n;
        }
        self.out.clear();
        self.sent = 0;
        Pin::new(&mut self.line).poll_flush(cx)
    }
}

/// The multiplexer's view of the line: one session's data.
impl<S: AsyncRead + AsyncWrite + Unpin> futures::io::AsyncRead for Link<S> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, out: &mut [u8]) -> Poll<io::Result<usize>> {
        let mut inner = self.lock();
        if inner.over {
            return Poll::Pending;
        }
        let read = ready!(inner.poll_data(cx, out));
        if inner.marked
            && matches!(read, Ok(0))
            && let Some(listener) = &mut inner.listens
        {
            if let Some(listener) = listener.take() {
                listener.wake();
            }
            inner.over = true;
            return Poll::Pending;
        }
        Poll::Ready(read)
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> futures::io::AsyncWrite for Link<S> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        let inner = &mut *self.lock();
        if inner.over {
            return Poll::Pending;
        }
        if inner.out.len() >= WRITE {
            ready!(inner.poll_send(cx))?;
        }
        let data = &data[..data.len().min(WRITE)];
        inner.encoder.encode(data, &mut inner.out);
        Poll::Ready(Ok(data.len()))
    }

    /// Deliberately nothing: the multiplexer flushes after every frame, and each write costs a guest dearly. What drives
    /// the session sends when there is nothing more to say.
    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_close(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.lock().poll_send(cx)
    }
}
