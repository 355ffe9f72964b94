//! The guest's side: sessions with hosts, the processes they start, and the duties of process 1.

mod bind;
mod exec;
mod init;
mod machine_id;
mod port;
mod procs;
mod reaper;
mod renew;
mod rest;
mod shutdown;
mod spare;
mod spawn;
mod users;
mod vfork;

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures::future::abortable;
use rustix::time::{ClockId, Timespec, clock_gettime};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::sync::{Notify, mpsc, oneshot};
use tokio::task::{AbortHandle, JoinHandle};
use yamux::Mode;

use crate::link::{Handshake, Kind, Link, VERSION};
use crate::mux::{Opener, Stream, session};
use crate::protocol::{self, ExecRequest, Failure, Prepare, Renew, Reply, Request};

pub use init::{Init, give_up, init};
pub use port::{NAME as PORT_NAME, Port, ports};

/// Commands at once in one session.
const MAX_EXECS: usize = 256;
/// How long the next session waits for what the last one ran to be gone.
const ENDS: Duration = Duration::from_secs(3);

/// How long after a guest became another it writes that down, should nothing make it do so before: most are gone by then, and a pool
/// that is being filled is not kept from it by those that are ready. One that is killed before boots as somebody new.
const SETTLES: Duration = Duration::from_secs(60);

/// The agent of one guest; serves any number of lines at once.
#[derive(Clone)]
pub struct Agent(Arc<Inner>);

struct Inner {
    reaper: reaper::Reaper,
    spares: spare::Spares,
    /// Every command that runs, of every session: a suspend freezes them all.
    running: exec::Running,
    /// What every command's environment has beside the agent's own.
    env: Mutex<Vec<(String, String)>>,
    /// What was made ready for those who go on from what is saved.
    prepared: Mutex<Option<renew::Prepared>>,
    /// Told once it was: what was being waited for is not to be what others begin with.
    prepares: Notify,
    /// When a host last said good-bye, by the clock that stands still while a machine is saved.
    left: Mutex<Option<Timespec>>,
    /// Who will write down who this guest is.
    settles: Mutex<Option<AbortHandle>>,
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
        Ok(Agent(Arc::new(Inner {
            reaper: reaper::Reaper::start()?,
            spares: spare::Spares::default(),
            running: exec::Running::default(),
            env: Mutex::default(),
            left: Mutex::default(),
            settles: Mutex::default(),
            prepared: Mutex::default(),
            prepares: Notify::new(),
        })))
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
        let link = Link::new(line);
        // A guest that reboots does so with its host on the line, which else would wait for ever for what the agent before was told.
        let up = Handshake { kind: Kind::Up, version: VERSION, nonce: [0; 16], payload: Vec::new() };
        let mut unsaid = kind == Line::Lasting;
        let mut session: Option<Live> = None;
        let mut begins = false;
        loop {
            if std::mem::take(&mut begins) {
                // Nothing is set up before its host says something: a machine that is ready may wait for that for long.
                match (link.heard().await?, kind) {
                    (true, _) => session = Some(self.begin(link.clone())),
                    (false, Line::Once) => return Ok(()),
                    (false, Line::Lasting) => continue,
                }
            }
            if let Some(live) = &mut session {
                tokio::select! {
                    biased;
                    () = link.interrupted() => {}
                    _ = &mut live.ends => session = None,
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
                end(session.take()).await;
                match kind {
                    Line::Once => return Ok(()),
                    Line::Lasting => continue,
                }
            };
            match hello.kind {
                Kind::Hello | Kind::Bye => unsaid = false,
                Kind::Ack | Kind::Up => {
                    end(session.take()).await;
                    continue;
                }
            }
            if hello.kind == Kind::Bye && hello.version == VERSION {
                // Before the session ends what it started. What else its end takes is done while the host goes on.
                self.0.running.freeze(true);
                session.iter().for_each(|live| live.drive.abort());
                *lock(&self.0.left) = Some(clock_gettime(ClockId::Monotonic));
            } else {
                end(session.take()).await;
            }
            // Also to a host of another version: it is to know which one this is.
            let payload = if hello.version == VERSION { self.told(&hello.payload).await } else { Vec::new() };
            link.send_handshake(&Handshake { kind: Kind::Ack, version: VERSION, nonce: hello.nonce, payload }).await?;
            match hello.kind {
                Kind::Hello if hello.version == VERSION => begins = true,
                _ => end(session.take()).await,
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
                        let inner = self.0.clone();
                        let settles = tokio::spawn(async move {
                            tokio::time::sleep(SETTLES).await;
                            renew::settle(&inner);
                        });
                        *lock(&self.0.settles) = Some(settles.abort_handle());
                    }
                    Reply::Renewed(renewed)
                }
                Err(message) => Reply::Failed(Failure::Other, message),
            },
            Err(error) => Reply::Failed(Failure::Invalid, error.to_string()),
        };
        protocol::payload(&reply)
    }

    fn begin<S>(&self, link: Link<S>) -> Live
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        link.begin();
        let (holds, mut ended) = mpsc::channel::<()>(1);
        let agent = self.clone();
        let (drive, _) = session(link, Mode::Server, |opener| {
            let session = Session { agent, opener, stdins: Arc::default(), holds };
            move |stream| drop(tokio::spawn(session.clone().stream(stream)))
        });
        let (drive, abort) = abortable(drive);
        let ends = tokio::spawn(async move {
            let _ = drive.await;
            let _ = tokio::time::timeout(ENDS, ended.recv()).await;
        });
        Live { drive: abort, ends }
    }
}

/// A session that is under way; dropped, it ends.
struct Live {
    /// What reads and writes; without it, everything else of the session comes to its end.
    drive: futures::future::AbortHandle,
    /// Until what it started, and was not to outlive it, is gone.
    ends: JoinHandle<()>,
}

impl Drop for Live {
    fn drop(&mut self) {
        self.drive.abort();
    }
}

async fn end(session: Option<Live>) {
    if let Some(mut session) = session {
        session.drive.abort();
        let _ = (&mut session.ends).await;
    }
}

/// Commands that wait for the stream of their standard input.
type Stdins = Arc<Mutex<HashMap<u64, oneshot::Sender<Stream>>>>;

#[derive(Clone)]
struct Session {
    agent: Agent,
    opener: Opener,
    stdins: Stdins,
    /// Held by every command that the session's end is to end.
    holds: mpsc::Sender<()>,
}

impl Session {
    async fn stream(self, mut stream: Stream) {
        // A stream that says nothing sensible is reset by being dropped.
        let Ok(Some(request)) = protocol::read(&mut stream).await else { return };
        match request {
            Request::Exec(request) => self.exec(request, stream).await,
            Request::Stdin(id) => {
                if let Some(command) = lock(&self.stdins).remove(&id) {
                    let _ = command.send(stream);
                }
            }
            Request::Ping(number) => answer(&mut stream, &Reply::Pong(number)).await,
            Request::Freeze(on) => {
                self.agent.0.running.freeze(on);
                if !on {
                    *lock(&self.agent.0.left) = None;
                    // It goes on as who it was, also after it was made ready for others to go on from.
                    renew::settle(&self.agent.0);
                }
                answer(&mut stream, &Reply::Done).await;
            }
            Request::Bind(binding) => match bind::apply(binding, &self.agent.0.env) {
                Ok(()) => answer(&mut stream, &Reply::Done).await,
                Err((failure, message)) => answer(&mut stream, &Reply::Failed(failure, message)).await,
            },
            Request::Prepare(Prepare { rests }) => {
                self.agent.0.prepares.notify_one();
                // Not while others are made of what is on its disk: whoever has it prepared tells it when that is over.
                lock(&self.agent.0.settles).take().iter().for_each(AbortHandle::abort);
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
            Request::Clock(now) => match renew::set_clock(now) {
                Ok(()) => answer(&mut stream, &Reply::Done).await,
                Err(message) => answer(&mut stream, &Reply::Failed(Failure::Other, message)).await,
            },
            Request::Shutdown => {
                renew::settle(&self.agent.0);
                self.agent.0.spares.stop();
                answer(&mut stream, &Reply::Done).await;
                tokio::spawn(shutdown::shutdown());
            }
        }
    }

    async fn exec(self, request: ExecRequest, mut control: Stream) {
        let Some(slot) = self.agent.0.running.enter(&self.opener, request.detached) else {
            let message = format!("{MAX_EXECS} commands run already in this session");
            return answer(&mut control, &Reply::Failed(Failure::Limit, message)).await;
        };
        let (id, whole) = (request.id, request.whole);
        let stdin = request.stdin.then(|| {
            let (send, stream) = oneshot::channel();
            lock(&self.stdins).insert(id, send);
            stream
        });
        let bound = lock(&self.agent.0.env).clone();
        // The session's own handles are let go: only what its end is to end may hold it.
        let Session { agent, opener, stdins, holds } = self;
        match spawn::spawn(&request, &bound, &agent.0) {
            Ok(process) => {
                exec::run(exec::Exec { id, process, control, opener, slot, holds, stdin, whole }).await;
            }
            Err((failure, message)) => answer(&mut control, &Reply::Failed(failure, message)).await,
        }
        lock(&stdins).remove(&id);
        // What was said is sent first.
        tokio::task::yield_now().await;
        agent.0.spares.make_soon();
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
