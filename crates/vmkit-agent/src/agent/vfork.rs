//! The shortest way from a request to a running program.
//!
//! The standard library's own way asks the kernel for every signal's handler before it executes, 130 calls in all; under
//! emulation that is a tenth of a short command's time. Here the child borrows the agent's memory until it executes, and makes
//! the calls that are needed and no others.

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::os::fd::RawFd;
use std::ptr;
use std::sync::atomic::{AtomicI32, Ordering};

use rustix::io::Errno;
use rustix::process::{Gid, Pid, Uid};

use super::shutdown;

/// More than the child's few frames need.
const STACK: usize = 64 * 1024;

/// What is to run.
pub(super) struct Plan<'a> {
    pub program: &'a CStr,
    pub args: &'a [CString],
    pub env: &'a [CString],
    pub cwd: &'a CStr,
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

/// A plan as a child sees it, in memory that it shares with the agent; and what became of it.
pub(super) struct Order<'a> {
    plan: &'a Plan<'a>,
    argv: Vec<*const c_char>,
    envp: Vec<*const c_char>,
    step: AtomicI32,
    errno: AtomicI32,
}

impl<'a> Order<'a> {
    pub(super) fn new(plan: &'a Plan<'a>) -> Order<'a> {
        let list = |strings: &[CString]| {
            strings.iter().map(|string| string.as_ptr()).chain([ptr::null()]).collect::<Vec<*const c_char>>()
        };
        let (step, errno) = (AtomicI32::new(Step::Fork as i32), AtomicI32::new(0));
        Order { plan, argv: list(plan.args), envp: list(plan.env), step, errno }
    }

    /// What became of it, once the child does not use the agent's memory any more. One that was refused is reaped: there is no child.
    pub(super) fn outcome(&self, pid: Pid) -> Result<Pid, (Step, Errno)> {
        match self.errno.load(Ordering::Relaxed) {
            0 => Ok(pid),
            errno => {
                // One that has not ended quite yet is the reaper's.
                let _ = rustix::process::waitpid(Some(pid), rustix::process::WaitOptions::NOHANG);
                Err((step(self.step.load(Ordering::Relaxed)), Errno::from_raw_os_error(errno)))
            }
        }
    }

    /// In the child, which is ready but for what the plan says: becomes the program, or notes what was refused and ends.
    pub(super) fn execute(&self) -> ! {
        let (step, errno) = self.become_it();
        self.refuse(step, errno)
    }

    #[expect(unsafe_code, reason = "plain system calls, of which the safe ones would touch the parent's memory")]
    fn become_it(&self) -> (Step, Errno) {
        let plan = self.plan;
        // SAFETY: a string that ends with a zero.
        if plan.cwd != c"/" && unsafe { libc::chdir(plan.cwd.as_ptr()) } < 0 {
            return (Step::Directory, last_errno());
        }
        if let Some(user) = &plan.user {
            // Straight to the kernel: the library's calls would change the agent's threads too. The order is groups, gid, uid:
            // after the last one the others are not permitted.
            let become_user = || {
                rustix::thread::set_thread_groups(&user.groups)?;
                rustix::thread::set_thread_res_gid(user.gid, user.gid, user.gid)?;
                rustix::thread::set_thread_res_uid(user.uid, user.uid, user.uid)
            };
            if let Err(errno) = become_user() {
                return (Step::User, errno);
            }
        }
        // SAFETY: both lists end with a null, and their strings outlive the call.
        unsafe { libc::execve(plan.program.as_ptr(), self.argv.as_ptr(), self.envp.as_ptr()) };
        (Step::Execute, last_errno())
    }

    pub(super) fn refuse(&self, step: Step, errno: Errno) -> ! {
        self.step.store(step as i32, Ordering::Relaxed);
        self.errno.store(errno.raw_os_error(), Ordering::Relaxed);
        end()
    }
}

fn step(number: i32) -> Step {
    [Step::Fork, Step::Streams, Step::Directory, Step::User, Step::Execute]
        .into_iter()
        .find(|step| *step as i32 == number)
        .unwrap_or(Step::Execute)
}

/// What a child has before it executes: memory for its few frames, untouched until then.
pub(super) fn stack() -> Vec<u128> {
    Vec::with_capacity(STACK / size_of::<u128>())
}

/// The end of a child that did not become a program.
#[expect(unsafe_code, reason = "the libraries that we use have no such call")]
pub(super) fn end() -> ! {
    // SAFETY: ends this process and runs nothing of the parent's on the way.
    unsafe { libc::_exit(127) }
}

struct Child<'a> {
    order: Order<'a>,
    streams: [RawFd; 3],
}

/// Executes it as the leader of a process group of its own, with every signal as a new program expects it.
/// Returns when the program has begun, or with what was refused; then there is no child. The streams are kept open until then.
pub(super) fn start(plan: &Plan<'_>, streams: [RawFd; 3]) -> Result<Pid, (Step, Errno)> {
    let child = Child { order: Order::new(plan), streams };
    let pid = fork(&child).map_err(|errno| (Step::Fork, errno))?;
    child.order.outcome(pid)
}

#[expect(unsafe_code, reason = "the standard library has no such fork")]
fn fork(child: &Child<'_>) -> Result<Pid, Errno> {
    let mut stack = stack();
    // SAFETY: the child runs `begin` on a stack of its own, aligned and larger than it needs, which outlives it: with VFORK this
    // thread stands still until the child has executed or ended. `child` outlives it for the same reason.
    cloned(|| unsafe {
        let top = stack.as_mut_ptr().add(stack.capacity()).cast::<c_void>();
        let flags = libc::CLONE_VM | libc::CLONE_VFORK | libc::SIGCHLD;
        libc::clone(begin, top, flags, ptr::from_ref(child).cast_mut().cast())
    })
}

/// Calls the kernel for a child that runs in the agent's memory, with all signals blocked.
pub(super) fn cloned(clone: impl FnOnce() -> c_int) -> Result<Pid, Errno> {
    // The child is not to run the agent's signal handlers on the agent's memory.
    let before = block_signals();
    let pid = clone();
    let failed = last_errno();
    restore_signals(&before);
    Pid::from_raw(pid).filter(|pid| pid.as_raw_nonzero().get() > 0).ok_or(failed)
}

/// The child, from its first moment to its program. It allocates nothing and takes no lock: it is a guest in its parent's memory.
#[expect(unsafe_code, reason = "called by the kernel, as it were")]
extern "C" fn begin(child: *mut c_void) -> c_int {
    // SAFETY: `fork` passes a `Child` that outlives this function's use of it, and nobody writes to it meanwhile.
    let child = unsafe { &*child.cast::<Child<'_>>() };
    match get_ready(child.streams) {
        Ok(()) => child.order.execute(),
        Err((step, errno)) => child.order.refuse(step, errno),
    }
}

/// What every child does before it knows what for: its streams, a directory, a group of its own, signals as new programs have them.
#[expect(unsafe_code, reason = "plain system calls, of which the safe ones would touch the parent's memory")]
pub(super) fn get_ready(streams: [RawFd; 3]) -> Result<(), (Step, Errno)> {
    let done = |result: c_int, step| if result < 0 { Err((step, last_errno())) } else { Ok(()) };
    for (number, stream) in (0..).zip(streams) {
        done(dup2(stream, number), Step::Streams)?;
    }
    // SAFETY: a string that ends with a zero.
    done(unsafe { libc::chdir(c"/".as_ptr()) }, Step::Directory)?;
    // SAFETY: a number of our own.
    done(unsafe { libc::setpgid(0, 0) }, Step::Streams)?;
    // Executing resets handlers, but not what is ignored; and a handler must not run before.
    for signal in [libc::SIGPIPE, libc::SIGCHLD].into_iter().chain(shutdown::SIGNALS) {
        // SAFETY: the default is no function of ours.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    }
    restore_signals(&no_signals());
    Ok(())
}

/// In a child, whose table of descriptors is its own.
#[expect(unsafe_code, reason = "the safe one wants to own what is replaced")]
pub(super) fn dup2(from: RawFd, to: RawFd) -> c_int {
    // SAFETY: whatever the numbers are, only this process's table is changed, and it executes or ends.
    unsafe { libc::dup2(from, to) }
}

pub(super) fn last_errno() -> Errno {
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
