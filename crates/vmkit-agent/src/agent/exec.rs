//! One command from its start to its end.
//!
//! ```text
//!  host ── control: Exec ▶ … Signal ▶ … end ──▶ ┌─────────┐ ◀── exit ── reaper
//!       ◀─ control: Started, Exited, Said ───── │  exec   │
//!       ── stdin ─────────────────────────────▶ │         │ ──▶ pipe ──▶ process
//!       ◀─ stdout, stderr (when there is more) ─└─────────┘ ◀── pipe ◀──
//! ```
//!
//! Most commands are over before the agent first looks, and have said little: all that there is to tell is then told in one
//! message, and nothing is set up that would wait for more. That needs no session either: see [`Command::is_over`]. Of the others, the exit is told as soon as the process has ended,
//! also when a child of it keeps its output open. The control stream ends when both outputs are spoken for.

use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use futures::FutureExt;
use futures::future::{BoxFuture, join_all};
use rustix::io::Errno;
use rustix::process::{Pid, Signal};
use tokio::io::{AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::net::unix::pipe;
use tokio::sync::{mpsc, oneshot};
use tokio::time::{sleep, timeout};

use super::quiet::Quiet;
use super::spawn::Process;
use super::{ENDS, Inner, MAX_EXECS, lock, procs};
use crate::mux::{Opener, Stream, acknowledge};
use crate::protocol::{self, Control, Exit, Header, Reply, Which};

/// Read from a pipe and written to a stream at once, at most.
const CHUNK: usize = 64 * 1024;
/// How long a command may take to be over before its outputs are looked at; from then on each look waits twice as long, until it
/// has said something. Nobody notices it in a command that takes longer, and a shorter one is spared most of what the agent does:
/// a translated guest takes six milliseconds to execute the smallest program, and a hundred for the first time.
const BRIEF: Duration = Duration::from_millis(15);
/// No look waits this long: the command is not a brief one.
const QUIET: Duration = Duration::from_millis(200);
/// Most commands say little: memory that is not touched costs nothing.
const FIRST: usize = 4 * 1024;

/// Every command that runs, of every session.
#[derive(Clone, Default)]
pub(super) struct Running {
    all: Arc<Mutex<HashMap<u64, Arc<Life>>>>,
    last: Arc<AtomicU64>,
    /// What starts now is to survive the loss of its session too.
    frozen: Arc<AtomicBool>,
}

/// Whether a command outlives its session.
pub(super) struct Life {
    /// Which it is of, once that has begun.
    session: OnceLock<Opener>,
    detached: bool,
    frozen: AtomicBool,
    /// Its session was lost while the guest was saved: nobody ends it for that any more.
    kept: AtomicBool,
}

impl Life {
    fn outlives(&self) -> bool {
        self.detached || self.frozen.load(Ordering::Relaxed) || self.kept.load(Ordering::Relaxed)
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
    pub(super) fn enter(&self, session: Option<&Opener>, detached: bool) -> Option<Slot> {
        let mut all = lock(&self.all);
        if let Some(session) = session {
            let same = |life: &&Arc<Life>| life.session.get().is_some_and(|its| its.is_same(session));
            if all.values().filter(same).count() >= MAX_EXECS {
                return None;
            }
        }
        let life = Arc::new(Life {
            session: session.cloned().map_or_else(OnceLock::new, OnceLock::from),
            detached,
            frozen: AtomicBool::new(self.frozen.load(Ordering::Relaxed)),
            kept: AtomicBool::new(false),
        });
        let key = self.last.fetch_add(1, Ordering::Relaxed);
        all.insert(key, life.clone());
        Some(Slot { life, key, all: self.clone() })
    }

    /// What runs now, and what is started until it is called off, is to survive the loss of its session, or not any more.
    pub(super) fn freeze(&self, on: bool) {
        let all = lock(&self.all);
        self.frozen.store(on, Ordering::Relaxed);
        for life in all.values() {
            life.frozen.store(on, Ordering::Relaxed);
        }
    }

    /// The guest goes on from what was saved: what ran then lives on, and what is started from now on ends with its session again.
    pub(super) fn goes_on(&self) {
        let all = lock(&self.all);
        self.frozen.store(false, Ordering::Relaxed);
        for life in all.values().filter(|life| life.frozen.load(Ordering::Relaxed)) {
            life.kept.store(true, Ordering::Relaxed);
        }
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        lock(&self.all.all).remove(&self.key);
    }
}

/// A command that was started.
pub(super) struct Command {
    pub id: u64,
    pid: Pid,
    outputs: [Output; 2],
    exit: oneshot::Receiver<Exit>,
    exited: Option<Exit>,
    slot: Slot,
}

/// Its input, and the stream that brings it.
pub(super) type Input = (OwnedFd, oneshot::Receiver<Stream>);

/// Its session.
pub(super) struct Host {
    pub control: Stream,
    pub opener: Opener,
    pub holds: mpsc::Sender<()>,
}

impl Command {
    /// It, and what it reads from.
    pub fn new(id: u64, process: Process, slot: Slot) -> (Command, Option<OwnedFd>) {
        let Process { pid, stdin, outputs: [stdout, stderr], exit } = process;
        let outputs = [Output::new(Which::Stdout, stdout), Output::new(Which::Stderr, stderr)];
        (Command { id, pid, outputs, exit, exited: None, slot }, stdin)
    }

    pub fn started(&self) -> Reply {
        Reply::Started(self.pid.as_raw_nonzero().get().unsigned_abs())
    }

    /// Waits for its end for as long as it is a brief one, and until its host says something. False when the host has left.
    pub async fn is_over(&mut self, quiet: &Quiet, host: impl Future<Output = io::Result<bool>>) -> bool {
        let mut host = pin!(host);
        let mut looks = Looks::default();
        loop {
            tokio::select! {
                biased;
                status = &mut self.exit => {
                    self.exited = status.ok();
                    return true;
                }
                heard = &mut host => return heard.unwrap_or(false),
                () = quiet.pause(looks.pause) => {}
            }
            if !looks.are_worth_it(&mut self.outputs) {
                return true;
            }
        }
    }

    /// All that there is to tell, when it has ended and nobody else has its outputs.
    pub fn all(&mut self) -> Option<Vec<Reply>> {
        let exited = self.exited?;
        self.outputs.iter_mut().for_each(Output::look);
        if self.outputs.iter().any(|output| output.pipe.is_some()) {
            return None;
        }
        let mut replies = vec![self.started()];
        let connected = self.outputs.iter_mut().filter(|output| output.connected);
        replies.extend(connected.map(|output| Reply::Said(output.which, std::mem::take(&mut output.said))));
        replies.push(Reply::Exited(exited));
        Some(replies)
    }

    /// It is of this session from now on.
    pub fn is_adopted_by(&self, session: &Opener) {
        let _ = self.slot.life.session.set(session.clone());
    }

    /// Ends it, since no session will adopt it; one that outlives sessions goes on unheard.
    pub async fn let_go(mut self, agent: &Inner) {
        let busy = agent.quiet.busy();
        if self.slot.life.outlives() {
            tokio::spawn(async move {
                let _busy = busy;
                let pipes = self.outputs.iter_mut().filter_map(|output| output.pipe.take());
                let pipes = pipes.filter_map(|pipe| pipe::Receiver::from_owned_fd_unchecked(pipe).ok());
                join_all(pipes.map(|mut pipe| async move { discard(&mut pipe, &mut [0; FIRST]).await })).await;
                if self.exited.is_none() {
                    let _ = self.exit.await;
                }
            });
        } else if self.exited.is_none() {
            procs::signal(self.pid, Signal::KILL, true);
            let _ = timeout(ENDS, self.exit).await;
        }
    }
}

/// Runs it to its end in its session. `looks`: it may be over before anything is set up. `news` is to be told first.
pub(super) async fn run(mut command: Command, host: Host, input: Option<Input>, looks: bool, mut news: Vec<Reply>) {
    let Host { control, opener, holds } = host;
    let (from_host, mut to_host) = tokio::io::split(control);
    let alive = Arc::new(AtomicBool::new(command.exited.is_none()));
    let (says, mut replies) = mpsc::unbounded_channel();
    let life = command.slot.life.clone();
    let mut listener = Some(listen(from_host, command.pid, life, alive.clone(), says.clone()).boxed());
    if looks {
        command.is_brief(&mut listener, &mut to_host, &mut news).await;
    }
    let Command { id, outputs, mut exit, mut exited, slot, .. } = command;
    alive.store(exited.is_none(), Ordering::Relaxed);
    let mut spoken_for = 0;
    let mut open = Vec::new();
    for mut output in outputs {
        output.look();
        match output.pipe {
            Some(pipe) => open.push((output.which, pipe, output.said)),
            None => {
                spoken_for += 1;
                if output.connected {
                    news.push(Reply::Said(output.which, output.said));
                }
            }
        }
    }
    news.extend(exited.map(Reply::Exited));
    tell(&mut to_host, &mut news).await;
    if exited.is_some() && open.is_empty() {
        let _ = to_host.shutdown().await;
        return;
    }

    if let Some((pipe, stream)) = input
        && let Ok(pipe) = pipe::Sender::from_owned_fd_unchecked(pipe)
    {
        tokio::spawn(feed(stream, pipe));
    }
    let outputs: Vec<_> = open
        .into_iter()
        .filter_map(|(which, pipe, said)| {
            let Ok(pipe) = pipe::Receiver::from_owned_fd_unchecked(pipe) else {
                // What comes after cannot be waited for; what came is told.
                let _ = says.send(Event::Said(which, said));
                return None;
            };
            let header = Header { id, which };
            Some(tokio::spawn(drain(pipe, said, header, opener.clone(), slot.life.clone(), says.clone())))
        })
        .collect();
    let hold = (!slot.life.detached).then_some(holds);
    let listener = listener.map(tokio::spawn);
    drop(opener);

    let mut lost = false;
    // Until the process has ended and both outputs are spoken for, or nobody listens any more.
    while !(exited.is_some() && (spoken_for == 2 || lost)) {
        tokio::select! {
            biased;
            Some(event) = replies.recv() => match event {
                Event::Opened => spoken_for += 1,
                Event::Said(which, said) => {
                    spoken_for += 1;
                    lost |= say(&mut to_host, &[Reply::Said(which, said)]).await.is_err();
                }
                Event::Lost => lost = true,
            },
            status = &mut exit, if exited.is_none() => {
                alive.store(false, Ordering::Relaxed);
                match status {
                    Ok(status) => {
                        exited = Some(status);
                        lost |= say(&mut to_host, &[Reply::Exited(status)]).await.is_err();
                    }
                    // The reaper is gone only with the agent.
                    Err(_) => return,
                }
            }
        }
        if lost && slot.life.outlives() {
            break;
        }
    }
    let _ = to_host.shutdown().await;
    drop(hold);
    if exited.is_none() {
        // Outlives its session: its place and its outputs' readers stay until it ends.
        let _ = exit.await;
    }
    for output in outputs {
        if lost && !slot.life.outlives() {
            output.abort();
        }
        let _ = output.await;
    }
    if let Some(listener) = listener {
        listener.abort();
    }
}

impl Command {
    /// Waits for its end for as long as it is a brief one: nothing is set up yet that would wait for what it says. Only its host is
    /// listened to, until that is done; it is told `news` once the command is not over at once.
    async fn is_brief(
        &mut self,
        listener: &mut Option<BoxFuture<'static, ()>>,
        to_host: &mut WriteHalf<Stream>,
        news: &mut Vec<Reply>,
    ) {
        let mut looks = Looks::default();
        while let Some(host) = listener {
            tokio::select! {
                biased;
                status = &mut self.exit => {
                    self.exited = status.ok();
                    return;
                }
                () = host => *listener = None,
                () = sleep(looks.pause) => {}
            }
            tell(to_host, news).await;
            if !looks.are_worth_it(&mut self.outputs) {
                return;
            }
        }
    }
}

/// How often a command is looked at that may be a brief one.
struct Looks {
    pause: Duration,
    spoke: bool,
}

impl Default for Looks {
    fn default() -> Looks {
        Looks { pause: BRIEF, spoke: false }
    }
}

impl Looks {
    /// Looks, and says whether to look again: as long as it says nothing, and a moment longer.
    fn are_worth_it(&mut self, outputs: &mut [Output; 2]) -> bool {
        outputs.iter_mut().for_each(Output::look);
        // More than fits here is not brief.
        if self.spoke || outputs.iter().any(|output| output.said.len() == FIRST) {
            return false;
        }
        let speaks = outputs.iter().any(|output| !output.said.is_empty());
        (self.pause, self.spoke) = if speaks { (BRIEF, true) } else { (self.pause * 2, false) };
        self.pause < QUIET
    }
}

/// One of a command's outputs, as far as it was looked at.
struct Output {
    which: Which,
    connected: bool,
    /// What it said so far.
    said: Vec<u8>,
    /// Absent when that is all.
    pipe: Option<OwnedFd>,
}

impl Output {
    fn new(which: Which, pipe: Option<OwnedFd>) -> Output {
        Output { which, connected: pipe.is_some(), said: Vec::new(), pipe }
    }

    /// Takes what is there, up to [`FIRST`] bytes in all.
    fn look(&mut self) {
        let mut chunk = [0; FIRST];
        while let Some(pipe) = &self.pipe
            && self.said.len() < FIRST
        {
            match rustix::io::read(pipe, &mut chunk[self.said.len()..]) {
                Ok(0) => self.pipe = None,
                Ok(n) => self.said.extend_from_slice(&chunk[self.said.len()..][..n]),
                Err(Errno::INTR) => {}
                // Nothing for now; what is wrong with it, if something is, is found again by who waits for more.
                Err(_) => return,
            }
        }
    }
}

enum Event {
    /// An output has a stream of its own now.
    Opened,
    /// An output ended, and this is all of it.
    Said(Which, Vec<u8>),
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
    acknowledge(&mut stream).await;
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

/// Process to host. `said` was read already.
async fn drain(
    mut pipe: pipe::Receiver,
    said: Vec<u8>,
    header: Header,
    opener: Opener,
    life: Arc<Life>,
    says: mpsc::UnboundedSender<Event>,
) {
    let mut chunk = said;
    let mut n = chunk.len();
    chunk.resize(FIRST, 0);
    let mut stream: Option<Stream> = None;
    loop {
        if n == 0 {
            n = match pipe.read(&mut chunk).await {
                Ok(0) | Err(_) => break,
                Ok(n) => n,
            };
            if stream.is_none() && n < FIRST {
                match pipe.try_read(&mut chunk[n..]) {
                    Ok(0) => {
                        chunk.truncate(n);
                        return drop(says.send(Event::Said(header.which, chunk)));
                    }
                    Ok(more) => n += more,
                    Err(_) => {}
                }
            }
        }
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
            n = 0;
            continue;
        }
        // Nobody reads any more. What outlives its session goes on unheard; anything else gets a broken pipe.
        if !life.outlives() {
            return;
        }
        drop(stream.take());
        return discard(&mut pipe, &mut chunk).await;
    }
    match stream {
        Some(mut stream) => drop(stream.shutdown().await),
        None => drop(says.send(Event::Said(header.which, Vec::new()))),
    }
}

/// What nobody hears must not hold up who says it.
async fn discard(pipe: &mut pipe::Receiver, chunk: &mut [u8]) {
    while pipe.read(chunk).await.is_ok_and(|n| n > 0) {}
}

async fn begin(opener: &Opener, header: Header) -> Option<Stream> {
    let mut stream = opener.open().await?;
    stream.write_all(&protocol::encode(&header).ok()?).await.ok()?;
    Some(stream)
}

/// Says what is new. When that fails the session is gone, and the reader of the control stream sees it as well.
pub(super) async fn tell(to: &mut (impl AsyncWrite + Unpin), news: &mut Vec<Reply>) {
    let news = std::mem::take(news);
    if !news.is_empty() {
        let _ = say(to, &news).await;
    }
}

async fn say(to: &mut (impl AsyncWrite + Unpin), replies: &[Reply]) -> std::io::Result<()> {
    let mut bytes = Vec::new();
    for reply in replies {
        bytes.extend(protocol::encode(reply)?);
    }
    to.write_all(&bytes).await
}
