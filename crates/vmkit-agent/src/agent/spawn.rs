//! Starts a process.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::Pid;
use tokio::net::unix::pipe;
use tokio::sync::oneshot;

use super::patience;
use super::reaper::Reaper;
use super::users::{self, User};
use crate::protocol::{ExecRequest, Exit, Failure};

/// Where programs are looked for when nobody says otherwise.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// A process that runs, with our ends of its streams.
pub(super) struct Process {
    pub pid: Pid,
    pub stdin: Option<pipe::Sender>,
    pub stdout: Option<pipe::Receiver>,
    pub stderr: Option<pipe::Receiver>,
    pub exit: oneshot::Receiver<Exit>,
}

/// Starts it, as the leader of a process group of its own. Errors never contain arguments or environment.
pub(super) fn spawn(
    request: &ExecRequest,
    bound: &[(String, String)],
    reaper: &Reaper,
) -> Result<Process, (Failure, String)> {
    let user = match &request.user {
        Some(wanted) => Some(users::find(wanted).map_err(|message| (Failure::NoUser, message))?),
        None => None,
    };
    let cwd = request.cwd.as_deref().unwrap_or("/");
    if !fs::metadata(cwd).is_ok_and(|meta| meta.is_dir()) {
        return Err((Failure::NoDirectory, format!("the guest has no directory {cwd:?}")));
    }
    let env = environment(request, bound, user.as_ref());
    let program = locate(&request.program, Path::new(cwd), &env)?;

    let other =
        |error: io::Error| (Failure::Other, format!("the guest could not start {:?}: {error}", request.program));
    let (stdin, our_stdin) = input(request.stdin).map_err(other)?;
    let (stdout, our_stdout) = output(request.stdout).map_err(other)?;
    let (stderr, our_stderr) = output(request.stderr).map_err(other)?;
    let mut command = Command::new(&program);
    command.arg0(&request.program).args(&request.args).env_clear().envs(env).process_group(0);
    command.stdin(stdin).stdout(stdout).stderr(stderr);
    // Without a directory to change to, the standard library takes its faster way.
    if std::env::current_dir().ok().as_deref() != Some(Path::new(cwd)) {
        command.current_dir(cwd);
    }
    if let Some(user) = user {
        become_user(&mut command, user);
    }
    let child = command.spawn().map_err(|error| match error.kind() {
        io::ErrorKind::PermissionDenied => not_executable(&request.program, "permission denied"),
        io::ErrorKind::NotFound => not_executable(&request.program, "its interpreter is missing"),
        _ if error.raw_os_error() == Some(rustix::io::Errno::NOEXEC.raw_os_error()) => {
            not_executable(&request.program, "not a program of this machine's kind, and no #! line")
        }
        _ => other(error),
    })?;
    let pid = Pid::from_child(&child);
    patience::be_ordinary(pid.as_raw_nonzero().get());
    // It runs first, for a slice at most: most commands are over by then, and all that there is to say of them is said at once.
    std::thread::yield_now();
    Ok(Process { pid, stdin: our_stdin, stdout: our_stdout, stderr: our_stderr, exit: reaper.watch(pid) })
}

fn input(connect: bool) -> io::Result<(Stdio, Option<pipe::Sender>)> {
    if !connect {
        return Ok((Stdio::null(), None));
    }
    let (theirs, ours): (OwnedFd, OwnedFd) = pipe_with(PipeFlags::CLOEXEC)?;
    Ok((Stdio::from(theirs), Some(pipe::Sender::from_owned_fd(ours)?)))
}

fn output(connect: bool) -> io::Result<(Stdio, Option<pipe::Receiver>)> {
    if !connect {
        return Ok((Stdio::null(), None));
    }
    let (ours, theirs): (OwnedFd, OwnedFd) = pipe_with(PipeFlags::CLOEXEC)?;
    Ok((Stdio::from(theirs), Some(pipe::Receiver::from_owned_fd(ours)?)))
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
        // The kernel resolves it after the change of directory; so do we.
        return match fs::metadata(cwd.join(program)) {
            Ok(meta) if executable(&meta) => Ok(program.into()),
            Ok(meta) if meta.is_dir() => Err(not_executable(program, "it is a directory")),
            Ok(_) => Err(not_executable(program, "permission denied")),
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                Err(not_executable(program, "permission denied"))
            }
            Err(_) => Err(missing()),
        };
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

fn executable(meta: &fs::Metadata) -> bool {
    meta.is_file() && meta.permissions().mode() & 0o111 != 0
}

fn not_executable(program: &str, why: &str) -> (Failure, String) {
    (Failure::NotExecutable, format!("the guest cannot execute {program:?}: {why}"))
}

#[expect(unsafe_code, reason = "supplementary groups have to be set between fork and exec")]
fn become_user(command: &mut Command, user: User) {
    let groups: Vec<_> = user.groups.iter().map(|&gid| rustix::process::Gid::from_raw(gid)).collect();
    let (uid, gid) = (rustix::process::Uid::from_raw(user.uid), rustix::process::Gid::from_raw(user.gid));
    // SAFETY: between fork and exec only async-signal-safe calls are allowed; these are plain system calls on memory that
    // was allocated before the fork. The order is groups, gid, uid: after the last one the others are not permitted.
    unsafe {
        command.pre_exec(move || {
            rustix::thread::set_thread_groups(&groups)?;
            rustix::thread::set_thread_res_gid(gid, gid, gid)?;
            rustix::thread::set_thread_res_uid(uid, uid, uid)?;
            Ok(())
        });
    }
}
