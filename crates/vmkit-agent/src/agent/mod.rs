//! The guest's side: sessions with hosts, the processes they start, and the duties of process 1.

mod bind;
mod chores;
mod exec;
mod init;
mod machine_id;
mod port;
mod procs;
mod quiet;
mod reaper;
mod renew;
mod rest;
mod shutdown;
mod spare;
mod spawn;
mod users;
mod vfork;

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::ops::ControlFlow;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures::future::abortable;
use rustix::time::{ClockId, Timespec, clock_gettime};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::sync::{Notify, mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio::time::timeout;
use yamux::Mode;

use crate::link::{Handshake, Kind, Link, VERSION};
use crate::mux::{Opener, Stream, session};
use crate::protocol::{self, Answer, ExecRequest, Failure, Prepare, Renew, Reply, Request};

use exec::Command;

pub use init::{Init, give_up, init};
pub use port::{NAME as PORT_NAME, Port, ports, ports_to_come};

/// Commands at once in one session.
const MAX_EXECS: usize = 256;
/// How long the next session waits for what the last one ran to be gone.
const ENDS: Duration = Duration::from_secs(3);

/// The agent of one guest; serves any number of lines at once.
#[derive(Clone)]
pub struct Agent(Arc<Inner>);

struct Inner {
    quiet: quiet::Quiet,
    chores: chores::Chores,
    reaper: reaper::Reaper,
    spares: spare::Spares,
    /// Every command that runs, of every session: a suspend freezes them all.
    running: exec::Running,
    /// What every command's environment has beside the agent's own.
    env: Mutex<Vec<(String, String)>>,
    /// The kernel's pool of random numbers, to be written to: opening and closing a file is much to do for a guest that goes on.
    pool: Option<File>,
    /// What was made ready for those who go on from what is saved.
    prepared: Mutex<Option<renew::Prepared>>,
    /// Told once it was: what was being waited for is not to be what others begin with.
    prepares: Notify,
    /// When a host last said good-bye, by the clock that stands still while a machine is saved.
    left: Mutex<Option<Timespec>>,
}

/// Whether a line goes on after its end was read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Line {
    /// A socket: its end is the end.
    Once,
    /// A virtio port: its end is a host that left, and another may come.
    Lasting,
}

impl Agent {
    /// Starts reaping. Must be called in a tokio runtime, once in a process: children of others are reaped as well.
    ///
    /// # Errors
    /// When signals cannot be received.
    pub fn new() -> io::Result<Agent> {
        let quiet = quiet::Quiet::new()?;
        let inner = Arc::new(Inner {
            chores: chores::Chores::default(),
            reaper: reaper::Reaper::start(&quiet)?,
            quiet,
            spares: spare::Spares::default(),
            running: exec::Running::default(),
            env: Mutex::default(),
            left: Mutex::default(),
            pool: renew::pool().ok(),
            prepared: Mutex::default(),
            prepares: Notify::new(),
        });
        tokio::spawn(chores::Chores::keep_doing(inner.clone()));
        tokio::spawn(shutdown::when_asked(inner.clone()));
        Ok(Agent(inner))
    }

    /// What is waited for beside lines: [`serve_port`](Agent::serve_port) is to leave the thread to whoever waits for it.
    ///
    /// # Errors
    /// When it cannot be waited for.
    pub fn watch(&self, other: impl AsFd) -> io::Result<()> {
        self.0.quiet.watch_other(other)
    }

    /// For as long as what is returned is held, [`serve_port`](Agent::serve_port) leaves the thread to others.
    pub fn hold(&self) -> impl Send + use<> {
        self.0.quiet.busy()
    }

    /// [`serve`](Agent::serve), which keeps the thread while there is nothing else to do for the agent: nobody else may use the
    /// runtime, except who [holds](Agent::hold) the agent or waits for what it [watches](Agent::watch).
    ///
    /// # Errors
    /// As it.
    pub fn serve_port(&self, port: Port, kind: Line) -> impl Future<Output = io::Result<()>> + Send + use<> {
        let agent = self.clone();
        // Until it has had its first turn.
        let busy = self.0.quiet.busy();
        async move {
            let number = agent.0.quiet.watch_line(&port)?;
            quiet::serve(&agent.0, number, busy, agent.serve_line(port, kind, number)).await
        }
    }

    /// Returns when what this guest is now is about to be saved, for others to go on from. For one caller.
    pub async fn prepares(&self) {
        self.0.prepares.notified().await;
    }

    /// Serves one line: one session after the other, for as long as the line lasts. What a session started and did not
    /// detach ends with it, before the next one begins.
    ///
    /// # Errors
    /// When the line cannot be read or written.
    pub async fn serve<S>(&self, line: S, kind: Line) -> io::Result<()>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        self.serve_line(line, kind, quiet::NONE).await
    }

    async fn serve_line<S>(&self, line: S, kind: Line, number: u64) -> io::Result<()>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let (mut session, mut host) = (None, None);
        let served = self.serve_hosts(line, kind, number, &mut session, &mut host).await;
        end(session, &self.0).await;
        end_alone(host.and_then(|host: Host| host.alone), &self.0).await;
        served
    }

    /// `session` is under way; with `host`, none was begun yet.
    async fn serve_hosts<S>(
        &self,
        line: S,
        kind: Line,
        number: u64,
        session: &mut Option<Live>,
        host: &mut Option<Host>,
    ) -> io::Result<()>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let link = Link::new(line);
        // A guest that reboots does so with its host on the line, which else would wait for ever for what the agent before was told.
        let up = Handshake { kind: Kind::Up, version: VERSION, nonce: [0; 16], payload: Vec::new() };
        let mut unsaid = kind == Line::Lasting;
        loop {
            if let Some(waits) = host {
                // Nothing is set up before it says something: a machine that is ready may wait for that for long.
                if !link.heard().await? {
                    end_alone(waits.alone.take(), &self.0).await;
                    *host = None;
                    match kind {
                        Line::Once => return Ok(()),
                        Line::Lasting => continue,
                    }
                }
                if !link.at_handshake() {
                    *session = Some(self.begin(link.clone(), waits.alone.take()));
                    *host = None;
                }
            }
            if let Some(live) = session {
                tokio::select! {
                    biased;
                    () = link.interrupted() => {}
                    _ = &mut live.ends => {
                        let alone = lock(&live.alone).take();
                        *session = None;
                        end_alone(alone, &self.0).await;
                    }
                }
            }
            let mut next = std::pin::pin!(link.next_handshake());
            let heard = match unsaid {
                // No host may be there, for as long as it likes; and one that begins anew need not be told.
                true => tokio::select! {
                    biased;
                    heard = &mut next => heard?,
                    said = link.send_handshake(&up) => {
                        unsaid = false;
                        said?;
                        next.await?
                    }
                },
                false => next.await?,
            };
            let Some(hello) = heard else {
                end(session.take(), &self.0).await;
                match kind {
                    Line::Once => return Ok(()),
                    Line::Lasting => continue,
                }
            };
            match hello.kind {
                Kind::Hello | Kind::Bye => unsaid = false,
                Kind::Ask if hello.version == VERSION && host.is_some() => {
                    let Some(waits) = host else { continue };
                    let is_there = match self.asked(&link, number, waits, &hello.payload).await {
                        Asked::Answer(answer) => {
                            let payload = protocol::payload(&answer);
                            let nonce = hello.nonce;
                            let answer = Handshake { kind: Kind::Answer, version: VERSION, nonce, payload };
                            let told = self.tell(&link, &answer).await?;
                            self.0.spare_soon();
                            told
                        }
                        Asked::Nothing => true,
                        Asked::Left => false,
                    };
                    if !is_there {
                        end_alone(waits.alone.take(), &self.0).await;
                        *host = None;
                        if kind == Line::Once {
                            return Ok(());
                        }
                    }
                    continue;
                }
                Kind::Ask => {
                    // It was told to somebody who is not there any more.
                    end(session.take(), &self.0).await;
                    link.send_handshake(&up).await?;
                    continue;
                }
                Kind::Ack | Kind::Up | Kind::Answer => {
                    end(session.take(), &self.0).await;
                    continue;
                }
            }
            if hello.kind == Kind::Bye && hello.version == VERSION {
                // Before the session ends what it started. What else its end takes is done while the host goes on.
                self.0.running.freeze(true);
                session.iter().for_each(|live| live.drive.abort());
                *lock(&self.0.left) = Some(clock_gettime(ClockId::Monotonic));
            } else {
                end(session.take(), &self.0).await;
            }
            if let Some(Host { alone }) = host.take() {
                end_alone(alone, &self.0).await;
            }
            // Also to a host of another version: it is to know which one this is.
            let payload = if hello.version == VERSION { self.told(&hello.payload).await } else { Vec::new() };
            link.send_handshake(&Handshake { kind: Kind::Ack, version: VERSION, nonce: hello.nonce, payload }).await?;
            match hello.kind {
                Kind::Hello if hello.version == VERSION => *host = Some(Host::default()),
                _ => end(session.take(), &self.0).await,
            }
        }
    }

    /// Does what was said with a handshake; the answer goes with its own.
    async fn told(&self, payload: &[u8]) -> Vec<u8> {
        if payload.is_empty() {
            return Vec::new();
        }
        let reply = match protocol::decode::<Renew>(payload) {
            Ok(renew) => match renew::apply(&renew, &self.0).await {
                Ok(renewed) => {
                    if renew.fork.is_some() {
                        self.0.settle_later();
                    }
                    Reply::Renewed(renewed)
                }
                Err(message) => Reply::Failed(Failure::Other, message),
            },
            Err(error) => Reply::Failed(Failure::Invalid, error.to_string()),
        };
        protocol::payload(&reply)
    }

    /// Says something to a host, unless it leaves first: a port takes nothing then until another comes, to whom it says nothing.
    /// False when it has left.
    async fn tell<S>(&self, link: &Link<S>, said: &Handshake) -> io::Result<bool>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let mut telling = std::pin::pin!(link.send_handshake(said));
        tokio::select! {
            biased;
            told = &mut telling => return told.map(|()| true),
            heard = link.heard() => if !heard? {
                return Ok(false);
            }
        }
        // It said more before it left, if it has: its end cannot be heard before that.
        let _busy = self.0.quiet.busy();
        timeout(ENDS, telling).await.map_or(Ok(false), |told| told.map(|()| true))
    }

    /// Does what needs no session.
    async fn asked<S>(&self, link: &Link<S>, number: u64, host: &mut Host, payload: &[u8]) -> Asked
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        if payload.is_empty() {
            return Asked::Nothing;
        }
        let only = |reply| Asked::Answer(Answer { replies: vec![reply], goes_on: false });
        let request = match protocol::decode::<Request>(payload) {
            Ok(request) if request.is_short() => request,
            Ok(_) => return only(Reply::Failed(Failure::Invalid, "that takes a session".into())),
            Err(error) => return only(Reply::Failed(Failure::Invalid, error.to_string())),
        };
        end_alone(host.alone.take(), &self.0).await;
        let request = match self.reply(request) {
            ControlFlow::Break(reply) => return only(reply),
            ControlFlow::Continue(Request::Exec(request)) => request,
            ControlFlow::Continue(_) => return only(Reply::Failed(Failure::Invalid, "that takes a session".into())),
        };
        let mut command = match self.start(&request, None) {
            Ok((command, _)) => command,
            Err((failure, message)) => return only(Reply::Failed(failure, message)),
        };
        let waits = self.0.quiet.waits(number);
        let is_there = command.is_over(&self.0.quiet, link.heard()).await;
        drop(waits);
        if !is_there {
            host.alone = Some(command);
            return Asked::Left;
        }
        if let Some(replies) = command.all() {
            return Asked::Answer(Answer { replies, goes_on: false });
        }
        let replies = vec![command.started()];
        host.alone = Some(command);
        Asked::Answer(Answer { replies, goes_on: true })
    }

    /// Does what is done at once, or gives the request back.
    fn reply(&self, request: Request) -> ControlFlow<Reply, Request> {
        ControlFlow::Break(match request {
            Request::Ping(number) => Reply::Pong(number),
            Request::Freeze(on) => {
                self.0.running.freeze(on);
                if !on {
                    *lock(&self.0.left) = None;
                    // It goes on as who it was, also after it was made ready for others to go on from.
                    renew::settle(&self.0);
                }
                Reply::Done
            }
            Request::Bind(binding) => match bind::apply(binding, &self.0.env) {
                Ok(()) => Reply::Done,
                Err((failure, message)) => Reply::Failed(failure, message),
            },
            Request::Clock(now) => match renew::set_clock(now) {
                Ok(()) => Reply::Done,
                Err(message) => Reply::Failed(Failure::Other, message),
            },
            other => return ControlFlow::Continue(other),
        })
    }

    /// Starts a command, and returns what it reads from with it.
    fn start(
        &self,
        request: &ExecRequest,
        session: Option<&Opener>,
    ) -> Result<(Command, Option<OwnedFd>), (Failure, String)> {
        let Some(slot) = self.0.running.enter(session, request.detached) else {
            return Err((Failure::Limit, format!("{MAX_EXECS} commands run already in this session")));
        };
        let bound = lock(&self.0.env).clone();
        spawn::spawn(request, &bound, &self.0).map(|process| Command::new(request.id, process, slot))
    }

    fn begin<S>(&self, link: Link<S>, alone: Option<Command>) -> Live
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        link.begin();
        let busy = self.0.quiet.busy();
        let (holds, mut ended) = mpsc::channel::<()>(1);
        let agent = self.clone();
        let alone = Arc::new(Mutex::new(alone));
        let adopts = alone.clone();
        let (drive, _) = session(link, Mode::Server, |opener| {
            let session = Session { agent, opener, stdins: Arc::default(), adopts, holds };
            move |stream| drop(tokio::spawn(session.clone().stream(stream)))
        });
        let (drive, abort) = abortable(drive);
        let ends = tokio::spawn(async move {
            let _busy = busy;
            let _ = drive.await;
            let _ = timeout(ENDS, ended.recv()).await;
        });
        Live { drive: abort, ends, alone }
    }
}

/// What came of a request that was made before a session.
enum Asked {
    Answer(Answer),
    /// There is nothing to be said to a host that only wants to be told soon: it is, or it was.
    Nothing,
    /// The host left meanwhile.
    Left,
}

/// A host that was greeted.
#[derive(Default)]
struct Host {
    /// A command that was not over at once; a session is to adopt it.
    alone: Option<Command>,
}

/// A session that is under way; dropped, it ends.
struct Live {
    /// What reads and writes; without it, everything else of the session comes to its end.
    drive: futures::future::AbortHandle,
    /// Until what it started, and was not to outlive it, is gone.
    ends: JoinHandle<()>,
    /// What it has not adopted yet.
    alone: Arc<Mutex<Option<Command>>>,
}

impl Drop for Live {
    fn drop(&mut self) {
        self.drive.abort();
    }
}

async fn end(session: Option<Live>, agent: &Inner) {
    if let Some(mut session) = session {
        session.drive.abort();
        let _ = (&mut session.ends).await;
        let alone = lock(&session.alone).take();
        end_alone(alone, agent).await;
    }
}

async fn end_alone(command: Option<Command>, agent: &Inner) {
    if let Some(command) = command {
        command.let_go(agent).await;
    }
}

/// Commands that wait for the stream of their standard input.
type Stdins = Arc<Mutex<HashMap<u64, oneshot::Sender<Stream>>>>;

#[derive(Clone)]
struct Session {
    agent: Agent,
    opener: Opener,
    stdins: Stdins,
    /// What was begun before it.
    adopts: Arc<Mutex<Option<Command>>>,
    /// Held by every command that the session's end is to end.
    holds: mpsc::Sender<()>,
}

impl Session {
    async fn stream(self, mut stream: Stream) {
        // A stream that says nothing sensible is reset by being dropped.
        let Ok(Some(request)) = protocol::read(&mut stream).await else { return };
        let request = match self.agent.reply(request) {
            ControlFlow::Break(reply) => return answer(&mut stream, &reply).await,
            ControlFlow::Continue(request) => request,
        };
        match request {
            Request::Exec(request) => self.exec(request, stream).await,
            Request::Adopt(id) => self.adopt(id, stream).await,
            Request::Stdin(id) => {
                if let Some(command) = lock(&self.stdins).remove(&id) {
                    let _ = command.send(stream);
                }
            }
            Request::Prepare(Prepare { rests }) => {
                self.agent.0.prepares.notify_one();
                // Not while others are made of what is on its disk: whoever has it prepared tells it when that is over.
                self.agent.0.settle_not();
                let inner = self.agent.0.clone();
                // It may take long, and others are served meanwhile.
                let _ = tokio::task::spawn_blocking(move || {
                    renew::prepare(&inner, rests);
                    rustix::fs::sync();
                })
                .await;
                if rests {
                    rest::rest(&self.agent.0).await;
                }
                answer(&mut stream, &Reply::Done).await;
            }
            Request::Shutdown => {
                answer(&mut stream, &Reply::Done).await;
                shutdown::switch_off(&self.agent.0);
            }
            Request::Ping(_) | Request::Clock(_) | Request::Freeze(_) | Request::Bind(_) => {}
        }
    }

    async fn exec(self, request: ExecRequest, mut control: Stream) {
        let (id, whole) = (request.id, request.whole);
        let stdin = request.stdin.then(|| {
            let (send, stream) = oneshot::channel();
            lock(&self.stdins).insert(id, send);
            stream
        });
        let (stdins, agent) = (self.stdins.clone(), self.agent.clone());
        match agent.start(&request, Some(&self.opener)) {
            Ok((command, to_process)) => {
                let mut news = vec![command.started()];
                if !whole || stdin.is_some() {
                    exec::tell(&mut control, &mut news).await;
                }
                // What is fed may wait for its input before it ends.
                let looks = stdin.is_none();
                self.run(command, control, to_process.zip(stdin), looks, news).await;
            }
            Err((failure, message)) => {
                answer(&mut control, &Reply::Failed(failure, message)).await;
                agent.0.spare_soon();
            }
        }
        lock(&stdins).remove(&id);
    }

    async fn adopt(self, id: u64, mut control: Stream) {
        let command = lock(&self.adopts).take_if(|command| command.id == id);
        match command {
            Some(command) => {
                command.is_adopted_by(&self.opener);
                self.run(command, control, None, false, Vec::new()).await;
            }
            None => answer(&mut control, &Reply::Failed(Failure::Invalid, "no such command".into())).await,
        }
    }

    async fn run(self, command: Command, control: Stream, input: Option<exec::Input>, looks: bool, news: Vec<Reply>) {
        // The session's own handles are let go: only what its end is to end may hold it.
        let Session { agent, opener, holds, .. } = self;
        let _busy = agent.0.quiet.busy();
        exec::run(command, exec::Host { control, opener, holds }, input, looks, news).await;
        // What was said is sent first.
        tokio::task::yield_now().await;
        agent.0.spare_soon();
    }
}

/// Says the last word on a stream.
async fn answer(stream: &mut Stream, reply: &Reply) {
    if let Ok(bytes) = protocol::encode(reply)
        && stream.write_all(&bytes).await.is_ok()
    {
        let _ = stream.shutdown().await;
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
