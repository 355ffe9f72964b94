//! A process that is made before anybody asks for one: it has its streams, and waits to be told what to execute.
//!
//! Making a process and its pipes is a twentieth of what a guest under emulation does that goes on from a saved execution, up to the
//! answer of its first command. One that was saved with a spare has it when it goes on; others get one when nothing else is to be done.
//!
//! ```text
//!  agent ── clone ─▶ spare: streams, group, signals ─▶ waits ─▶ execute ─▶ the program
//!        ◀─ ready ─┘                                    ▲          │
//!        ── order ──────────────────────────────────────┘          │
//!        ◀─ the kernel: it has left the agent's memory ────────────┘
//! ```
//!
//! The child runs in the agent's memory, which includes the number of the last error: from when it is ready until it has its
//! order, it makes no call that writes there. Before and after, the agent stands still and waits for it.

use std::ffi::{c_int, c_void};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::ptr;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::process::{Pid, Signal, getpid, getppid, kill_process, set_parent_process_death_signal};
use rustix::thread::futex;
use rustix::time::Timespec;

use super::spawn::Started;
use super::vfork::{self, Order, Plan, Step};
use super::{lock, spawn};

/// How long a new one may take to be ready. It is worth no more.
const READY: Duration = Duration::from_secs(2);
/// How long it may take to do its part before it is looked at: somebody may have stopped it.
const LOOKS: Timespec = Timespec { tv_sec: 0, tv_nsec: 50_000_000 };

/// How long it may take to take its order, before somebody else gets it.
const LISTENS: Duration = Duration::from_millis(500);

/// What a spare is about, as both sides know it.
const MADE: u32 = 0;
const WAITS: u32 = 1;
const ORDERED: u32 = 2;
/// It has its order, and uses it until it has left the agent's memory.
const TAKEN: u32 = 3;
/// The order was taken back.
const REVOKED: u32 = 4;
const FAILED: u32 = 5;

/// The descriptor of a spare's own end of what may become its standard input.
const INPUT: RawFd = 3;

/// The agent's spare, if it has one.
#[derive(Default)]
pub(super) struct Spares(Mutex<State>);

#[derive(Default)]
enum State {
    #[default]
    None,
    Made(Spare),
    /// There will be none any more.
    Never,
}

impl Spares {
    /// The spare, if there is one and it lives.
    pub(super) fn take(&self) -> Option<Spare> {
        let mut state = lock(&self.0);
        match std::mem::take(&mut *state) {
            State::Made(spare) => Some(spare).filter(Spare::is_there),
            other => {
                *state = other;
                None
            }
        }
    }

    /// Makes one, unless there is one.
    pub(super) fn make(&self) {
        let mut state = lock(&self.0);
        let missing = match &*state {
            State::None => true,
            State::Made(spare) => !spare.is_there(),
            State::Never => false,
        };
        if missing {
            // Without one everything goes on as well.
            *state = Spare::make().map_or(State::None, State::Made);
        }
    }

    /// Whether one can be made.
    pub(super) fn is_missing(&self) -> bool {
        matches!(&*lock(&self.0), State::None)
    }

    /// From now on there is none.
    pub(super) fn stop(&self) {
        *lock(&self.0) = State::Never;
    }
}

/// A process that waits for its order.
pub(super) struct Spare {
    pid: Pid,
    cell: Box<Cell>,
    /// Where it runs, until it has left the agent's memory.
    stack: Vec<u128>,
    /// The agent's ends of what are to be its streams; they do not block.
    stdin: Option<OwnedFd>,
    outputs: [Option<OwnedFd>; 2],
}

/// What agent and child both see.
struct Cell {
    /// One of the states above.
    state: AtomicU32,
    /// Not zero for as long as the child is in the agent's memory: the kernel sees to that, whatever becomes of the child.
    inside: AtomicU32,
    order: AtomicPtr<Order<'static>>,
    /// Which of its streams it is to have.
    connected: [AtomicBool; 3],
    /// Its ends of nothing, its outputs, and its input.
    ends: [RawFd; 4],
    /// Whom it ends with; nobody for process 1, which has no end.
    agent: Option<Pid>,
}

impl Spare {
    #[expect(unsafe_code, reason = "the standard library has no such fork")]
    fn make() -> io::Result<Spare> {
        let (their_in, stdin) = spawn::input_pipe()?;
        let (their_out, out) = spawn::output_pipe()?;
        let (their_err, err) = spawn::output_pipe()?;
        let nothing = spawn::null()?;
        let cell = Cell::new([&nothing, &their_out, &their_err, &their_in].map(AsRawFd::as_raw_fd));
        let mut stack = vfork::stack();
        let flags = libc::CLONE_VM | libc::CLONE_CHILD_CLEARTID | libc::SIGCHLD;
        // SAFETY: the child runs `live` on a stack of its own, aligned and larger than it needs. Both that and the cell stay where
        // they are until the kernel has cleared `inside`, which it does when the child executes or ends: see `Drop`.
        let pid = vfork::cloned(|| unsafe {
            let top = stack.as_mut_ptr().add(stack.capacity()).cast::<c_void>();
            let shared = ptr::from_ref(&*cell).cast_mut().cast::<c_void>();
            let inside = cell.inside.as_ptr();
            libc::clone(live, top, flags, shared, ptr::null_mut::<c_int>(), ptr::null_mut::<c_void>(), inside)
        })?;
        let spare = Spare { pid, cell, stack, stdin: Some(stdin), outputs: [Some(out), Some(err)] };
        let until = Instant::now() + READY;
        let state = || spare.cell.state.load(Ordering::Acquire);
        while state() == MADE && spare.is_there() && Instant::now() < until {
            let _ = futex::wait(&spare.cell.state, futex::Flags::PRIVATE, MADE, Some(&LOOKS));
        }
        // From here on its ends are its own: else none of them would ever be seen to end.
        if state() == WAITS { Ok(spare) } else { Err(io::Error::other("it did not get ready")) }
    }

    fn is_there(&self) -> bool {
        self.cell.inside.load(Ordering::Acquire) != 0
    }

    /// Becomes the program, with those of its streams that are to be connected. Returns when it has begun, or with what was
    /// refused; then there is no process. Nothing when it did not take its order: then it is not there any more.
    pub(super) fn execute(mut self, plan: &Plan<'_>, connected: [bool; 3]) -> Option<Result<Started, (Step, Errno)>> {
        let order = Order::new(plan);
        for (stream, connect) in self.cell.connected.iter().zip(connected) {
            stream.store(connect, Ordering::Relaxed);
        }
        // Whoever has taken it uses it until it has left: no return before that.
        self.cell.order.store(ptr::from_ref(&order).cast_mut().cast(), Ordering::Relaxed);
        self.cell.state.store(ORDERED, Ordering::Release);
        let _ = futex::wake(&self.cell.state, futex::Flags::PRIVATE, 1);
        let mut until = Instant::now() + LISTENS;
        while self.is_there() {
            self.look();
            if self.is_there() && Instant::now() > until {
                // Stopped ones go on; whoever holds it otherwise keeps nobody else waiting.
                if self.cell.state.compare_exchange(ORDERED, REVOKED, Ordering::AcqRel, Ordering::Acquire).is_ok() {
                    return None;
                }
                until += LISTENS;
            } else if self.is_there() && self.cell.state.load(Ordering::Acquire) == ORDERED {
                let _ = kill_process(self.pid, Signal::CONT);
            }
        }
        let [stdout, stderr] = &mut self.outputs;
        Some(order.outcome(self.pid).map(|pid| Started {
            pid,
            stdin: self.stdin.take().filter(|_| connected[0]),
            outputs: [stdout.take().filter(|_| connected[1]), stderr.take().filter(|_| connected[2])],
        }))
    }

    /// Waits a moment for it to leave the agent's memory.
    fn look(&self) {
        // The kernel's own wake-up, which is for all processes.
        let _ = futex::wait(&self.cell.inside, futex::Flags::empty(), 1, Some(&LOOKS));
    }
}

impl Drop for Spare {
    fn drop(&mut self) {
        let until = Instant::now() + READY;
        while self.is_there() && Instant::now() < until {
            let _ = kill_process(self.pid, Signal::KILL);
            self.look();
        }
        if self.is_there() {
            // Held by whoever freezes processes. It ends when it is let go; its memory is to be there until then.
            std::mem::forget((std::mem::take(&mut self.stack), std::mem::replace(&mut self.cell, Cell::new([-1; 4]))));
        }
    }
}

/// The child, from its first moment to its program. As one of [`vfork`], it is a guest in its parent's memory.
#[expect(unsafe_code, reason = "called by the kernel, as it were")]
extern "C" fn live(cell: *mut c_void) -> c_int {
    // SAFETY: `make` passes a `Cell` that lies still until this process has left the agent's memory.
    let cell = unsafe { &*cell.cast::<Cell>() };
    let ready = cell.get_ready();
    cell.state.store(if ready.is_ok() { WAITS } else { FAILED }, Ordering::Release);
    let _ = futex::wake(&cell.state, futex::Flags::PRIVATE, 1);
    if ready.is_err() {
        vfork::end();
    }
    while cell.state.load(Ordering::Acquire) == WAITS {
        let _ = futex::wait(&cell.state, futex::Flags::PRIVATE, WAITS, None);
    }
    if cell.state.compare_exchange(ORDERED, TAKEN, Ordering::AcqRel, Ordering::Acquire).is_err() {
        // To be killed.
        loop {
            let _ = futex::wait(&cell.state, futex::Flags::PRIVATE, REVOKED, None);
        }
    }
    // SAFETY: `execute` gave it, and does not return before this process has left the agent's memory.
    let order = unsafe { &*cell.order.load(Ordering::Relaxed) };
    match cell.connect() {
        Ok(()) => order.execute(),
        Err(errno) => order.refuse(Step::Streams, errno),
    }
}

impl Cell {
    fn new(ends: [RawFd; 4]) -> Box<Cell> {
        Box::new(Cell {
            state: AtomicU32::new(MADE),
            inside: AtomicU32::new(1),
            order: AtomicPtr::default(),
            connected: Default::default(),
            ends,
            agent: Some(getpid()).filter(|&pid| pid != Pid::INIT),
        })
    }

    /// In the child, while the agent stands still.
    #[expect(unsafe_code, reason = "the libraries that we use have no such calls")]
    fn get_ready(&self) -> Result<(), (Step, Errno)> {
        let [nothing, out, err, input] = self.ends;
        vfork::get_ready([nothing, out, err])?;
        let done = |result| if result < 0 { Err((Step::Streams, vfork::last_errno())) } else { Ok(()) };
        if input != INPUT {
            // SAFETY: in a table of descriptors of its own.
            done(unsafe { libc::dup3(input, INPUT, libc::O_CLOEXEC) })?;
        }
        // What the agent has open is not to stay open for its sake.
        // SAFETY: as above; the number is the one after the last that is needed.
        done(unsafe { libc::syscall(libc::SYS_close_range, INPUT + 1, c_int::MAX, 0) } as c_int)?;
        if self.agent.is_some() {
            set_parent_process_death_signal(Some(Signal::KILL)).map_err(|errno| (Step::Fork, errno))?;
            if getppid() != self.agent {
                // It has ended before that.
                vfork::end();
            }
        }
        // For whoever looks at the guest's processes.
        rustix::thread::set_name(c"vmkit-spare").map_err(|errno| (Step::Fork, errno))
    }

    /// In the child, which has its order.
    fn connect(&self) -> Result<(), Errno> {
        if self.agent.is_some() {
            set_parent_process_death_signal(None)?;
        }
        let [stdin, stdout, stderr] = &self.connected;
        // Nothing is at 0 until then.
        for (stream, from, to, when) in [(stdout, 0, 1, false), (stderr, 0, 2, false), (stdin, INPUT, 0, true)] {
            if stream.load(Ordering::Relaxed) == when && vfork::dup2(from, to) < 0 {
                return Err(vfork::last_errno());
            }
        }
        Ok(())
    }
}
