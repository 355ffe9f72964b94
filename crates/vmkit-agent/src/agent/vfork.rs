//! The shortest way from a request to a running program.
//!
//! The standard library's own way asks the kernel for every signal's handler before it executes, 130 calls in all; under
//! emulation that is a tenth of a short command's time. Here the child borrows the agent's memory until it executes, and makes
//! the calls that are needed and no others.

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr;
use std::sync::atomic::{AtomicI32, Ordering};

use rustix::io::Errno;
use rustix::process::{Gid, Pid, Uid};

/// More than the child's few frames need.
const STACK: usize = 64 * 1024;

/// What is to run.
pub(super) struct Plan<'a> {
    pub program: &'a CStr,
    pub args: &'a [CString],
    pub env: &'a [CString],
    pub cwd: &'a CStr,
    /// Standard input, output and error.
    pub streams: [BorrowedFd<'a>; 3],
    pub user: Option<Identity>,
}

/// Whom it runs as.
pub(super) struct Identity {
    pub uid: Uid,
    pub gid: Gid,
    pub groups: Vec<Gid>,
}

/// What the kernel refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    Fork,
    Streams,
    Directory,
    User,
    Execute,
}

/// What the child sees. It lies in memory that parent and child share, and the parent stands still meanwhile.
struct Shared<'a> {
    plan: &'a Plan<'a>,
    argv: Vec<*const c_char>,
    envp: Vec<*const c_char>,
    step: AtomicI32,
    errno: AtomicI32,
}

/// Executes it as the leader of a process group of its own, with every signal as a new program expects it.
/// Returns when the program has begun, or with what was refused; then there is no child.
pub(super) fn start(plan: &Plan<'_>) -> Result<Pid, (Step, Errno)> {
    let list = |strings: &[CString]| {
        strings.iter().map(|string| string.as_ptr()).chain([ptr::null()]).collect::<Vec<*const c_char>>()
    };
    let shared = Shared {
        plan,
        argv: list(plan.args),
        envp: list(plan.env),
        step: AtomicI32::new(Step::Fork as i32),
        errno: AtomicI32::new(0),
    };
    // The child is not to run the agent's signal handlers on the agent's memory.
    let before = block_signals();
    let pid = fork(&shared);
    restore_signals(&before);
    let pid = pid.map_err(|errno| (Step::Fork, errno))?;
    match shared.errno.load(Ordering::Relaxed) {
        0 => Ok(pid),
        errno => {
            // It has ended already; when the reaper was faster, that is as well.
            let _ = rustix::process::waitpid(Some(pid), rustix::process::WaitOptions::empty());
            Err((step(shared.step.load(Ordering::Relaxed)), Errno::from_raw_os_error(errno)))
        }
    }
}

fn step(number: i32) -> Step {
    [Step::Fork, Step::Streams, Step::Directory, Step::User, Step::Execute]
        .into_iter()
        .find(|step| *step as i32 == number)
        .unwrap_or(Step::Execute)
}

#[expect(unsafe_code, reason = "the standard library has no such fork")]
fn fork(shared: &Shared<'_>) -> Result<Pid, Errno> {
    // Not touched before: fresh memory costs nothing until it is used, and the child uses the top of it only.
    let mut stack: Vec<u128> = Vec::with_capacity(STACK / size_of::<u128>());
    let flags = libc::CLONE_VM | libc::CLONE_VFORK | libc::SIGCHLD;
    // SAFETY: the child runs `child` on a stack of its own, aligned and larger than it needs, which outlives it: with VFORK this
    // thread stands still until the child has executed or ended. `shared` outlives it for the same reason.
    let pid = unsafe {
        let top = stack.as_mut_ptr().add(stack.capacity()).cast::<c_void>();
        libc::clone(child, top, flags, ptr::from_ref(shared).cast_mut().cast())
    };
    match Pid::from_raw(pid) {
        Some(pid) if pid.as_raw_nonzero().get() > 0 => Ok(pid),
        _ => Err(last_errno()),
    }
}

/// The child, from its first moment to its program. It allocates nothing and takes no lock: it is a guest in its parent's memory.
#[expect(unsafe_code, reason = "called by the kernel, as it were")]
extern "C" fn child(shared: *mut c_void) -> c_int {
    // SAFETY: `fork` passes a `Shared` that outlives this function's use of it, and nobody writes to it meanwhile.
    let shared = unsafe { &*shared.cast::<Shared<'_>>() };
    let (step, errno) = match prepare(shared.plan) {
        Ok(()) => {
            // SAFETY: both lists end with a null, and their strings outlive the call.
            unsafe { libc::execve(shared.plan.program.as_ptr(), shared.argv.as_ptr(), shared.envp.as_ptr()) };
            (Step::Execute, last_errno())
        }
        Err(refused) => refused,
    };
    shared.step.store(step as i32, Ordering::Relaxed);
    shared.errno.store(errno.raw_os_error(), Ordering::Relaxed);
    // SAFETY: ends this process and runs nothing of the parent's on the way.
    unsafe { libc::_exit(127) }
}

#[expect(unsafe_code, reason = "plain system calls, of which the safe ones would touch the parent's memory")]
fn prepare(plan: &Plan<'_>) -> Result<(), (Step, Errno)> {
    let done = |result: c_int, step| if result < 0 { Err((step, last_errno())) } else { Ok(()) };
    for (number, stream) in (0..).zip(&plan.streams) {
        // SAFETY: descriptors of this process, which is the child's own table.
        done(unsafe { libc::dup2(stream.as_raw_fd(), number) }, Step::Streams)?;
    }
    // SAFETY: a string that ends with a zero.
    done(unsafe { libc::chdir(plan.cwd.as_ptr()) }, Step::Directory)?;
    // SAFETY: a number of our own.
    done(unsafe { libc::setpgid(0, 0) }, Step::Streams)?;
    if let Some(user) = &plan.user {
        // Straight to the kernel: the library's calls would change the agent's threads too. The order is groups, gid, uid:
        // after the last one the others are not permitted.
        let become_user = || {
            rustix::thread::set_thread_groups(&user.groups)?;
            rustix::thread::set_thread_res_gid(user.gid, user.gid, user.gid)?;
            rustix::thread::set_thread_res_uid(user.uid, user.uid, user.uid)
        };
        become_user().map_err(|errno| (Step::User, errno))?;
    }
    // Executing resets handlers, but not what is ignored; and a handler must not run before.
    for signal in [libc::SIGPIPE, libc::SIGCHLD] {
        // SAFETY: the default is no function of ours.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    }
    restore_signals(&no_signals());
    Ok(())
}

fn last_errno() -> Errno {
    Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::INVAL)
}

#[expect(unsafe_code, reason = "the libraries that we use have no such call")]
fn no_signals() -> libc::sigset_t {
    // SAFETY: all zeros is a valid set, and `sigemptyset` only writes to it.
    unsafe {
        let mut set = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        set
    }
}

/// Returns what was blocked before.
#[expect(unsafe_code, reason = "the libraries that we use have no such call")]
fn block_signals() -> libc::sigset_t {
    let (mut all, mut before) = (no_signals(), no_signals());
    // SAFETY: both sets outlive the calls.
    unsafe {
        libc::sigfillset(&raw mut all);
        libc::pthread_sigmask(libc::SIG_SETMASK, &raw const all, &raw mut before);
    }
    before
}

#[expect(unsafe_code, reason = "the libraries that we use have no such call")]
fn restore_signals(set: &libc::sigset_t) {
    // SAFETY: the set outlives the call.
    unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, set, ptr::null_mut()) };
}
