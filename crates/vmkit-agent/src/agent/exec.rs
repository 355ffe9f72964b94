//! One command from its start to its end.
//!
//! ```text
//!  host ── control: Exec ▶ … Signal ▶ … end ──▶ ┌─────────┐ ◀── exit ── reaper
//!       ◀─ control: Started, Exited, Silent ─── │  exec   │
//!       ── stdin ─────────────────────────────▶ │         │ ──▶ pipe ──▶ process
//!       ◀─ stdout, stderr (opened on 1st byte) ─└─────────┘ ◀── pipe ◀──
//! ```
//!
//! The exit is told as soon as the process has ended, also when a child of it keeps its output open. The control stream
//! ends when both outputs are spoken for.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use rustix::process::{Pid, Signal};
use tokio::io::{AsyncReadExt, AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::net::unix::pipe;
use tokio::sync::{mpsc, oneshot};

use super::spawn::Process;
use super::{MAX_EXECS, lock, procs};
use crate::mux::{Opener, Stream};
use crate::protocol::{self, Control, Header, Reply, Which};

/// Read from a pipe and written to a stream at once, at most.
const CHUNK: usize = 64 * 1024;
/// Most commands say little: memory that is not touched costs nothing.
const FIRST: usize = 4 * 1024;

/// Every command that runs, of every session.
#[derive(Clone, Default)]
pub(super) struct Running(Arc<Mutex<HashMap<u64, Arc<Life>>>>, Arc<AtomicU64>);

/// Whether a command outlives its session.
pub(super) struct Life {
    session: Opener,
    detached: bool,
    frozen: AtomicBool,
}

impl Life {
    fn outlives(&self) -> bool {
        self.detached || self.frozen.load(Ordering::Relaxed)
    }
}

/// A command's place among those that run; free again when dropped.
pub(super) struct Slot {
    life: Arc<Life>,
    key: u64,
    all: Running,
}

impl Running {
    /// `None` when the session has too many already.
    pub(super) fn enter(&self, session: &Opener, detached: bool) -> Option<Slot> {
        let mut all = lock(&self.0);
        if all.values().filter(|life| life.session.is_same(session)).count() >= MAX_EXECS {
            return None;
        }
        let life = Arc::new(Life { session: session.clone(), detached, frozen: AtomicBool::new(false) });
        let key = self.1.fetch_add(1, Ordering::Relaxed);
        all.insert(key, life.clone());
        Some(Slot { life, key, all: self.clone() })
    }

    /// What runs now is to survive the loss of its session, or not any more.
    pub(super) fn freeze(&self, on: bool) {
        for life in lock(&self.0).values() {
            life.frozen.store(on, Ordering::Relaxed);
        }
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        lock(&self.all.0).remove(&self.key);
    }
}

pub(super) struct Exec {
    pub id: u64,
    pub process: Process,
    pub control: Stream,
    pub opener: Opener,
    pub slot: Slot,
    pub holds: mpsc::Sender<()>,
    pub stdin: Option<oneshot::Receiver<Stream>>,
}

pub(super) async fn run(exec: Exec) {
    let Exec { id, process, control, opener, slot, holds, stdin } = exec;
    let Process { pid, stdin: to_process, stdout, stderr, exit } = process;
    let (from_host, mut to_host) = tokio::io::split(control);
    let started = Reply::Started(pid.as_raw_nonzero().get().unsigned_abs());
    // When it fails the session is gone, and the reader of the control stream sees it as well.
    let _ = say(&mut to_host, &started).await;

    if let (Some(pipe), Some(stream)) = (to_process, stdin) {
        tokio::spawn(feed(stream, pipe));
    }
    let (says, mut replies) = mpsc::unbounded_channel();
    let outputs = [(Which::Stdout, stdout), (Which::Stderr, stderr)].map(|(which, pipe)| {
        pipe.map(|pipe| {
            tokio::spawn(drain(pipe, Header { id, which }, opener.clone(), slot.life.clone(), says.clone()))
        })
    });
    let hold = (!slot.life.detached).then_some(holds);
    let alive = Arc::new(AtomicBool::new(true));
    let listener = tokio::spawn(listen(from_host, pid, slot.life.clone(), alive.clone(), says.clone()));
    drop(opener);

    let mut exit = Some(exit);
    let mut spoken_for = outputs.iter().filter(|output| output.is_none()).count();
    let mut ended = false;
    let mut lost = false;
    // Until the process has ended and both outputs are spoken for, or nobody listens any more.
    while !(ended && (spoken_for == 2 || lost)) {
        tokio::select! {
            biased;
            Some(event) = replies.recv() => match event {
                Event::Opened => spoken_for += 1,
                Event::Silent(which) => {
                    spoken_for += 1;
                    lost |= say(&mut to_host, &Reply::Silent(which)).await.is_err();
                }
                Event::Lost => lost = true,
            },
            status = async { match exit.as_mut() { Some(exit) => exit.await, None => std::future::pending().await } } => {
                exit = None;
                ended = true;
                alive.store(false, Ordering::Relaxed);
                match status {
                    Ok(status) => lost |= say(&mut to_host, &Reply::Exited(status)).await.is_err(),
                    // The reaper is gone only with the agent.
                    Err(_) => lost = true,
                }
            }
        }
        if lost && slot.life.outlives() {
            break;
        }
    }
    let _ = to_host.shutdown().await;
    drop(hold);
    if !ended && let Some(exit) = exit {
        // Outlives its session: its place and its outputs' readers stay until it ends.
        let _ = exit.await;
    }
    for output in outputs.into_iter().flatten() {
        if lost && !slot.life.outlives() {
            output.abort();
        }
        let _ = output.await;
    }
    listener.abort();
}

enum Event {
    /// An output has a stream of its own now.
    Opened,
    /// An output ended without a byte.
    Silent(Which),
    /// The control stream ended.
    Lost,
}

/// Obeys the control stream. Its end ends the process.
async fn listen(
    mut from: ReadHalf<Stream>,
    pid: Pid,
    life: Arc<Life>,
    alive: Arc<AtomicBool>,
    says: mpsc::UnboundedSender<Event>,
) {
    while let Ok(Some(Control::Signal(number))) = protocol::read(&mut from).await {
        // Once it has ended its number may be another's.
        if alive.load(Ordering::Relaxed)
            && let Some(signal) = Signal::from_named_raw(number)
        {
            // Killing means all of it; other signals are for the group, as on a terminal.
            procs::signal(pid, signal, signal == Signal::KILL);
        }
    }
    if alive.load(Ordering::Relaxed) && !life.outlives() {
        procs::signal(pid, Signal::KILL, true);
    }
    // What a command that has ended left in the background lives on, as it does everywhere else.
    let _ = says.send(Event::Lost);
}

/// Host to process. The end of the stream is the end of its input.
async fn feed(stream: oneshot::Receiver<Stream>, mut pipe: pipe::Sender) {
    let Ok(mut stream) = stream.await else { return };
    let mut chunk = vec![0; CHUNK];
    loop {
        match stream.read(&mut chunk).await {
            Ok(0) | Err(_) => return,
            // A process that reads no more resets the stream, which tells the host.
            Ok(n) if pipe.write_all(&chunk[..n]).await.is_err() => return,
            Ok(_) => {}
        }
    }
}

/// Process to host.
async fn drain(
    mut pipe: pipe::Receiver,
    header: Header,
    opener: Opener,
    life: Arc<Life>,
    says: mpsc::UnboundedSender<Event>,
) {
    let mut chunk = vec![0; FIRST];
    let mut stream: Option<Stream> = None;
    loop {
        let n = match pipe.read(&mut chunk).await {
            Ok(0) | Err(_) => break,
            Ok(n) => n,
        };
        let opened = match &mut stream {
            Some(stream) => Some(stream),
            None => match begin(&opener, header).await {
                Some(new) => {
                    let _ = says.send(Event::Opened);
                    Some(stream.insert(new))
                }
                None => None,
            },
        };
        let written = match opened {
            Some(stream) => stream.write_all(&chunk[..n]).await.is_ok(),
            None => false,
        };
        if written {
            if n == chunk.len() && n < CHUNK {
                chunk.resize(CHUNK, 0);
            }
            continue;
        }
        // Nobody reads any more. What outlives its session goes on unheard; anything else gets a broken pipe.
        if !life.outlives() {
            return;
        }
        drop(stream.take());
        while pipe.read(&mut chunk).await.is_ok_and(|n| n > 0) {}
        return;
    }
    match stream {
        Some(mut stream) => drop(stream.shutdown().await),
        None => drop(says.send(Event::Silent(header.which))),
    }
}

async fn begin(opener: &Opener, header: Header) -> Option<Stream> {
    let mut stream = opener.open().await?;
    stream.write_all(&protocol::encode(&header).ok()?).await.ok()?;
    Some(stream)
}

async fn say(to: &mut WriteHalf<Stream>, reply: &Reply) -> std::io::Result<()> {
    to.write_all(&protocol::encode(reply)?).await
}
