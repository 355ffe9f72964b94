//! A simulated guest: its memory, its processes, and the way in.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use futures::FutureExt;
use futures::future::BoxFuture;
use tokio::sync::watch;

use super::fault::{Broken, Fault, Verb};
use super::hardware::Phase;
use super::programs::{self, Context};
use super::world::World;
use crate::error::{Error, ErrorKind, Result};
use crate::guest::{
    Binding, CommandSpec, ExitStatus, GuestOps, GuestProcess, GuestReader, GuestWriter, ProcessControl,
};
use crate::spec::Id;

/// What a stream holds before its writer waits for its reader.
const BUFFER: usize = 64 * 1024;
/// Not a signal: the connection of whoever started it is gone.
const CUT: i32 = -1;
/// Signals that do not end a process: CHLD, CONT, URG, WINCH.
const HARMLESS: [i32; 5] = [0, 17, 18, 23, 28];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Power {
    On,
    Frozen,
    Lost,
}

/// What is in a guest's memory, its processes included. Kept by a suspend, lost with the machine's process.
pub(super) struct Memory {
    inner: Mutex<Inner>,
    power: watch::Sender<Power>,
}

#[derive(Default)]
struct Inner {
    values: BTreeMap<String, String>,
    hostname: Option<String>,
    env: Vec<(String, String)>,
    count: u64,
    processes: BTreeMap<u32, Process>,
    last_pid: u32,
}

struct Process {
    group: u32,
    attached: bool,
    signal: watch::Sender<i32>,
}

impl Memory {
    pub(super) fn new() -> Memory {
        Memory { inner: Mutex::default(), power: watch::Sender::new(Power::On) }
    }

    /// The same, for another machine. What runs in it are tasks of this process, and stays here.
    pub(super) fn copy(&self) -> Memory {
        let Inner { values, hostname, env, count, processes: _, last_pid } = &*self.lock();
        let inner = Inner {
            values: values.clone(),
            hostname: hostname.clone(),
            env: env.clone(),
            count: *count,
            processes: BTreeMap::new(),
            last_pid: *last_pid,
        };
        Memory { inner: Mutex::new(inner), power: watch::Sender::new(Power::On) }
    }

    /// Nothing in the guest moves.
    pub(super) fn freeze(&self) {
        self.power.send_replace(Power::Frozen);
    }

    pub(super) fn thaw(&self) {
        self.power.send_replace(Power::On);
    }

    pub(super) fn lose(&self) {
        self.power.send_replace(Power::Lost);
    }

    /// Ends what somebody is connected to.
    pub(super) fn disconnect(&self) {
        for process in self.lock().processes.values().filter(|process| process.attached) {
            process.signal.send_replace(CUT);
        }
    }

    pub(super) fn remember(&self, key: &str, value: &str) {
        self.lock().values.insert(key.to_owned(), value.to_owned());
    }

    pub(super) fn recall(&self, key: &str) -> Option<String> {
        self.lock().values.get(key).cloned()
    }

    pub(super) fn hostname(&self) -> Option<String> {
        self.lock().hostname.clone()
    }

    /// A command's environment: what the guest was bound to, then the command's own.
    fn environment(&self, own: Vec<(String, String)>) -> Vec<(String, String)> {
        let mut env = self.lock().env.clone();
        env.extend(own);
        env
    }

    pub(super) fn count(&self) -> u64 {
        let mut inner = self.lock();
        inner.count += 1;
        inner.count
    }

    pub(super) fn is_alive(&self, pid: u32) -> bool {
        self.lock().processes.contains_key(&pid)
    }

    /// Enters a process into the table; in a group of its own when `group` is absent.
    pub(super) fn enter(self: &Arc<Memory>, group: Option<u32>, attached: bool) -> Entry {
        let mut inner = self.lock();
        inner.last_pid += 1;
        let pid = 100 + inner.last_pid;
        let group = group.unwrap_or(pid);
        let signal = watch::Sender::new(0);
        let signals = signal.subscribe();
        inner.processes.insert(pid, Process { group, attached, signal });
        Entry { memory: self.clone(), pid, group, signals, power: self.power.subscribe() }
    }

    /// Sends a signal to a process group.
    fn signal(&self, group: u32, signal: i32) {
        for process in self.lock().processes.values().filter(|process| process.group == group) {
            process.signal.send_replace(signal);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A process in the table, for as long as it is there.
pub(super) struct Entry {
    memory: Arc<Memory>,
    pub pid: u32,
    pub group: u32,
    signals: watch::Receiver<i32>,
    power: watch::Receiver<Power>,
}

impl Entry {
    /// Runs a program until it ends, is signalled or loses its memory; stands still while the machine does. `None` when
    /// nobody will ever know how it ended.
    pub(super) async fn run(mut self, program: impl Future<Output = ExitStatus>) -> Option<ExitStatus> {
        let mut program = std::pin::pin!(program);
        loop {
            let power = *self.power.borrow_and_update();
            let signal = *self.signals.borrow_and_update();
            match (power, signal) {
                (Power::Lost, _) | (_, CUT) => return None,
                (_, signal) if HARMLESS.contains(&signal) => {}
                (_, signal) => return Some(ExitStatus::Signal(signal)),
            }
            tokio::select! {
                biased;
                _ = self.power.changed() => {}
                _ = self.signals.changed() => {}
                status = &mut program, if power == Power::On => return Some(status),
            }
        }
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        self.memory.lock().processes.remove(&self.pid);
    }
}

/// The way into a simulated guest, for as long as that very process of the machine is up.
pub(super) struct SimGuest {
    pub world: World,
    pub id: Id,
    pub pid: u32,
}

impl SimGuest {
    async fn ask(&self, verb: Verb) -> Result<(Arc<Memory>, BTreeSet<Broken>)> {
        let fault = self.world.change(|hw| {
            hw.log(verb, &self.id);
            hw.pick(&self.id, verb)
        });
        self.world.gate(&self.id, verb).await;
        let delay = match fault {
            Fault::Err | Fault::ErrButDone => {
                return Err(Error::new(ErrorKind::Agent, format!("sim: {verb:?} was to fail")));
            }
            Fault::Hang => {
                self.world.hang().await;
                std::time::Duration::ZERO
            }
            Fault::Slow(delay) => delay,
            Fault::Panic => panic!("sim: {verb:?} was to panic"),
            Fault::Ok | Fault::Lie | Fault::DieLater(_) => std::time::Duration::ZERO,
        };
        self.world.pause(delay).await;
        // A machine that stands still does not answer, until it goes on or is gone.
        self.world
            .until(&self.id, |hw| match hw.process(&self.id, self.pid) {
                Ok(process) if process.phase == Phase::Paused => None,
                Ok(process) => Some(Ok(process.memory.clone())),
                Err(_) => Some(Err(gone())),
            })
            .await
            .map(|memory| (memory, self.world.look(|hw| hw.broken.clone())))
    }
}

fn gone() -> Error {
    Error::new(ErrorKind::Agent, "the connection to the guest has ended")
}

impl GuestOps for SimGuest {
    fn spawn(&self, command: CommandSpec) -> BoxFuture<'_, Result<GuestProcess>> {
        async move {
            let (memory, broken) = self.ask(Verb::Spawn).await?;
            let tell = |error: Error| match broken.contains(&Broken::TellsArguments) {
                true => Error::new(error.kind(), format!("{}: {:?} {:?}", error.message(), command.args, command.env)),
                false => error,
            };
            programs::find(&command.program).map_err(tell)?;
            let entry = memory.enter(None, !command.detached);
            let (pid, group) = (entry.pid, entry.group);
            let (stdin, stdin_of) = pipe(command.stdin);
            let (stdout_of, stdout) = pipe(command.stdout);
            let (stderr_of, stderr) = pipe(command.stderr);
            let context = Context {
                world: self.world.clone(),
                id: self.id.clone(),
                memory: memory.clone(),
                group,
                broken: broken.clone(),
                env: memory.environment(command.env),
                cwd: command.cwd,
                user: command.user,
                stdin: stdin_of,
                stdout: stdout_of,
                stderr: stderr_of,
            };
            let (tell_end, end) = watch::channel(None);
            tokio::spawn(async move {
                let ended = entry.run(programs::run(context, command.program, command.args)).await;
                tell_end.send_replace(Some(ended));
            });
            let control = Control {
                world: self.world.clone(),
                id: self.id.clone(),
                machine: self.pid,
                memory,
                group,
                end,
                detached: command.detached,
                broken,
            };
            Ok(GuestProcess {
                pid,
                stdin: stdin.map(|stream| Box::new(stream) as GuestWriter),
                stdout: stdout.map(|stream| Box::new(stream) as GuestReader),
                stderr: stderr.map(|stream| Box::new(stream) as GuestReader),
                control: Box::new(control),
            })
        }
        .boxed()
    }

    fn bind(&self, binding: Binding) -> BoxFuture<'_, Result<()>> {
        async move {
            let (memory, _) = self.ask(Verb::Bind).await?;
            for file in binding.files {
                if !file.path.starts_with('/') {
                    let message = format!("the file {:?} has no absolute path", file.path);
                    return Err(Error::new(ErrorKind::InvalidArgument, message));
                }
                // As in a real guest: nobody makes files there.
                if file.path.starts_with("/proc/") {
                    let message = format!("the guest could not write {:?}", file.path);
                    return Err(Error::new(ErrorKind::Backend, message));
                }
                self.world.change(|hw| hw.unit(&self.id).files.insert(file.path, file.content));
            }
            let mut inner = memory.lock();
            inner.env.extend(binding.env);
            if binding.hostname.is_some() {
                inner.hostname = binding.hostname;
            }
            Ok(())
        }
        .boxed()
    }

    fn ping(&self) -> BoxFuture<'_, Result<()>> {
        self.ask(Verb::Ping).map(|answer| answer.map(drop)).boxed()
    }
}

type Pipe = tokio::io::DuplexStream;

fn pipe(connected: bool) -> (Option<Pipe>, Option<Pipe>) {
    if !connected {
        return (None, None);
    }
    let (one, other) = tokio::io::duplex(BUFFER);
    (Some(one), Some(other))
}

struct Control {
    world: World,
    id: Id,
    machine: u32,
    memory: Arc<Memory>,
    group: u32,
    end: watch::Receiver<Option<Option<ExitStatus>>>,
    detached: bool,
    broken: BTreeSet<Broken>,
}

impl ProcessControl for Control {
    fn wait(&mut self) -> BoxFuture<'_, Result<ExitStatus>> {
        async {
            let ended = self.end.wait_for(Option::is_some).await.ok().and_then(|ended| ended.flatten());
            let status = ended.ok_or_else(gone)?;
            Ok(match status {
                _ if self.broken.contains(&Broken::ExitCodeAlwaysZero) => ExitStatus::Code(0),
                ExitStatus::Signal(signal) if self.broken.contains(&Broken::SignalsAsCodes) => {
                    ExitStatus::Code(128 + signal)
                }
                status => status,
            })
        }
        .boxed()
    }

    fn signal(&mut self, signal: i32) -> BoxFuture<'_, Result<()>> {
        async move {
            self.world.change(|hw| hw.process(&self.id, self.machine).map(drop).map_err(|_| gone()))?;
            self.memory.signal(self.group, signal);
            Ok(())
        }
        .boxed()
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        if !self.detached && !self.broken.contains(&Broken::CancelLeavesProcess) {
            self.memory.signal(self.group, 9);
        }
    }
}
