//! Starts a process.

use std::ffi::{CString, OsString};
use std::fs;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags, fcntl_setfl};
use rustix::io::Errno;
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Gid, Pid, Uid};
use tokio::sync::oneshot;

use super::Inner;
use super::users::{self, User};
use super::vfork::{self, Step};
use crate::protocol::{ExecRequest, Exit, Failure};

/// Where programs are looked for when nobody says otherwise.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// More programs than most systems have; to remember where one was found takes a kilobyte.
const MANY: usize = 4096;

/// A process that runs, with our ends of its streams, which do not block.
pub(super) struct Process {
    pub pid: Pid,
    pub stdin: Option<OwnedFd>,
    /// Standard output and standard error.
    pub outputs: [Option<OwnedFd>; 2],
    pub exit: oneshot::Receiver<Exit>,
}

/// Starts it, as the leader of a process group of its own. Errors never contain arguments or environment.
pub(super) fn spawn(
    request: &ExecRequest,
    bound: &[(String, String)],
    agent: &Inner,
) -> Result<Process, (Failure, String)> {
    spawn_as(request, bound, agent, |plan| {
        let connected = [request.stdin, request.stdout, request.stderr];
        let by_spare = agent.spares.take().and_then(|spare| spare.execute(plan, connected));
        by_spare.unwrap_or_else(|| start(plan, connected))
    })
}

/// Starts a program that nobody is connected to: what it has to say is on the console, among what the agent says.
pub(super) fn spawn_unconnected(request: &ExecRequest, agent: &Inner) -> Result<Process, (Failure, String)> {
    spawn_as(request, &[], agent, |plan| {
        let null = null().map_err(no_streams)?;
        let errors = io::stderr();
        let pid = vfork::start(plan, [null.as_raw_fd(), errors.as_raw_fd(), errors.as_raw_fd()])?;
        Ok(Started { pid, stdin: None, outputs: [None, None] })
    })
}

fn spawn_as(
    request: &ExecRequest,
    bound: &[(String, String)],
    agent: &Inner,
    start: impl FnOnce(&vfork::Plan<'_>) -> Result<Started, (Step, Errno)>,
) -> Result<Process, (Failure, String)> {
    let user = match &request.user {
        Some(wanted) => Some(users::find(wanted).map_err(|message| (Failure::NoUser, message))?),
        None => None,
    };
    let cwd = request.cwd.as_deref().unwrap_or("/");
    let env = environment(request, bound, user.as_ref());
    let program = locate(&request.program, Path::new(cwd), &env)?;

    let other =
        |error: io::Error| (Failure::Other, format!("the guest could not start {:?}: {error}", request.program));
    let plan = vfork::Plan {
        program: &text(program.into_os_string().into_vec(), "the program's name")?,
        args: &strings([&request.program].into_iter().chain(&request.args).map(|arg| arg.clone().into_bytes()))?,
        env: &strings(env.into_iter().map(|(key, value)| [key.into_vec(), value.into_vec()].join(&b'=')))?,
        cwd: &text(cwd.as_bytes().to_vec(), "the directory's name")?,
        user: user.map(|user| vfork::Identity {
            uid: Uid::from_raw(user.uid),
            gid: Gid::from_raw(user.gid),
            groups: user.groups.iter().map(|&gid| Gid::from_raw(gid)).collect(),
        }),
    };
    let Started { pid, stdin, outputs } = start(&plan).map_err(|(step, errno)| match step {
        Step::Directory => (Failure::NoDirectory, format!("the guest has no directory {cwd:?}: {errno}")),
        Step::Execute => not_started(&request.program, Path::new(cwd), errno),
        Step::Fork | Step::Streams | Step::User => other(errno.into()),
    })?;
    let exit = agent.reaper.watch(pid);
    Ok(Process { pid, stdin, outputs, exit })
}

/// A process whose end nobody waits for yet.
pub(super) struct Started {
    pub pid: Pid,
    pub stdin: Option<OwnedFd>,
    pub outputs: [Option<OwnedFd>; 2],
}

/// Makes a process for it.
fn start(plan: &vfork::Plan<'_>, [stdin, stdout, stderr]: [bool; 3]) -> Result<Started, (Step, Errno)> {
    let stream = |connect: bool, pipe: fn() -> io::Result<(OwnedFd, OwnedFd)>| {
        let ends =
            if connect { pipe().map(|(theirs, ours)| (theirs, Some(ours))) } else { null().map(|it| (it, None)) };
        ends.map_err(no_streams)
    };
    let (stdin, our_stdin) = stream(stdin, input_pipe)?;
    let (stdout, our_stdout) = stream(stdout, output_pipe)?;
    let (stderr, our_stderr) = stream(stderr, output_pipe)?;
    let pid = vfork::start(plan, [&stdin, &stdout, &stderr].map(AsRawFd::as_raw_fd))?;
    Ok(Started { pid, stdin: our_stdin, outputs: [our_stdout, our_stderr] })
}

fn no_streams(error: io::Error) -> (Step, Errno) {
    (Step::Streams, Errno::from_io_error(&error).unwrap_or(Errno::INVAL))
}

/// The kernel's strings end at their first zero: one in the middle would be another string.
fn text(bytes: Vec<u8>, what: &str) -> Result<CString, (Failure, String)> {
    CString::new(bytes).map_err(|_| (Failure::Invalid, format!("{what} contains a zero byte")))
}

fn strings(list: impl Iterator<Item = Vec<u8>>) -> Result<Vec<CString>, (Failure, String)> {
    list.map(|bytes| text(bytes, "an argument or a variable")).collect()
}

pub(super) fn null() -> io::Result<OwnedFd> {
    Ok(rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?)
}

/// Their end and ours.
pub(super) fn input_pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    let (theirs, ours) = pipe_with(PipeFlags::CLOEXEC)?;
    fcntl_setfl(&ours, OFlags::NONBLOCK)?;
    Ok((theirs, ours))
}

/// Their end and ours.
pub(super) fn output_pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    let (ours, theirs) = pipe_with(PipeFlags::CLOEXEC)?;
    fcntl_setfl(&ours, OFlags::NONBLOCK)?;
    Ok((theirs, ours))
}

fn environment(request: &ExecRequest, bound: &[(String, String)], user: Option<&User>) -> Vec<(OsString, OsString)> {
    let mut env: Vec<(OsString, OsString)> = Vec::new();
    let mut set = |key: &str, value: OsString| {
        env.retain(|(known, _)| known != key);
        env.push((key.into(), value));
    };
    if !request.env_clear {
        for (key, value) in std::env::vars_os() {
            if let Some(key) = key.to_str() {
                set(key, value);
            }
        }
        if std::env::var_os("PATH").is_none() {
            set("PATH", PATH.into());
        }
        match user {
            Some(user) => {
                set("HOME", user.home.clone().into());
                for (key, value) in [("USER", &user.name), ("LOGNAME", &user.name), ("SHELL", &user.shell)] {
                    if let Some(value) = value {
                        set(key, value.into());
                    }
                }
            }
            // The kernel gives process 1 the root directory as its home.
            None if std::process::id() == 1 => {
                set("HOME", "/root".into());
                set("USER", "root".into());
                set("LOGNAME", "root".into());
            }
            None => {}
        }
        for (key, value) in bound {
            set(key, value.into());
        }
    }
    for (key, value) in &request.env {
        set(key, value.into());
    }
    env
}

fn locate(program: &str, cwd: &Path, env: &[(OsString, OsString)]) -> Result<PathBuf, (Failure, String)> {
    let missing = || (Failure::NotFound, format!("the guest has no program {program:?}"));
    if program.is_empty() {
        return Err(missing());
    }
    if program.contains('/') {
        // The kernel resolves it, after the change of directory; what it refuses is looked at then.
        return Ok(program.into());
    }
    let path = env.iter().find(|(key, _)| key == "PATH").map_or_else(|| PATH.into(), |(_, value)| value.clone());
    let mut denied = false;
    for dir in std::env::split_paths(&path) {
        let candidate = cwd.join(dir).join(program);
        match fs::metadata(&candidate) {
            Ok(meta) if executable(&meta) => return Ok(candidate),
            Ok(meta) if meta.is_file() => denied = true,
            Ok(_) | Err(_) => {}
        }
    }
    Err(if denied { not_executable(program, "permission denied") } else { missing() })
}

/// Looks once for every program that a command may be called by.
pub(super) fn look_for_all() {
    let env = environment(&ExecRequest::default(), &[], None);
    let path = env.iter().find(|(key, _)| key == "PATH").map_or_else(|| PATH.into(), |(_, value)| value.clone());
    let names = std::env::split_paths(&path)
        .filter_map(|dir| fs::read_dir(dir).ok())
        .flat_map(|entries| entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()));
    for name in names.take(MANY) {
        let _ = locate(&name, Path::new("/"), &env);
    }
}

fn executable(meta: &fs::Metadata) -> bool {
    meta.is_file() && meta.permissions().mode() & 0o111 != 0
}

fn not_executable(program: &str, why: &str) -> (Failure, String) {
    (Failure::NotExecutable, format!("the guest cannot execute {program:?}: {why}"))
}

/// Why the kernel would not execute it.
fn not_started(program: &str, cwd: &Path, errno: Errno) -> (Failure, String) {
    match errno {
        Errno::NOEXEC => not_executable(program, "not a program of this machine's kind, and no #! line"),
        Errno::ACCESS => match fs::metadata(cwd.join(program)) {
            Ok(meta) if meta.is_dir() => not_executable(program, "it is a directory"),
            Ok(_) | Err(_) => not_executable(program, "permission denied"),
        },
        Errno::NOENT | Errno::NOTDIR => match fs::metadata(cwd.join(program)) {
            Ok(_) => not_executable(program, "its interpreter is missing"),
            Err(_) => (Failure::NotFound, format!("the guest has no program {program:?}")),
        },
        Errno::TOOBIG => {
            let what = "arguments and environment are longer than a process can be given: use a file or standard input";
            (Failure::Invalid, format!("the guest could not start {program:?}: {what}"))
        }
        _ => (Failure::Other, format!("the guest could not start {program:?}: {errno}")),
    }
}
