//! What can go wrong with simulated hardware, and how it is asked for.

use std::time::Duration;

use rand::Rng;

/// What a provider, a driver or a guest can be called for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Verb {
    /// [`Driver::begin`](crate::Driver::begin)
    Begin,
    /// [`Driver::clone_source`](crate::Driver::clone_source)
    Clone,
    /// [`Driver::boot`](crate::Driver::boot)
    Boot,
    /// [`Driver::resume`](crate::Driver::resume)
    Resume,
    /// [`Driver::suspend`](crate::Driver::suspend)
    Suspend,
    /// [`Driver::prespawn`](crate::Driver::prespawn)
    Prespawn,
    /// [`Driver::snapshot`](crate::Driver::snapshot)
    Snapshot,
    /// [`Driver::shutdown`](crate::Driver::shutdown)
    Shutdown,
    /// [`Driver::kill`](crate::Driver::kill)
    Kill,
    /// [`Driver::destroy`](crate::Driver::destroy)
    Destroy,
    /// [`Driver::inspect`](crate::Driver::inspect)
    Inspect,
    /// [`Driver::exited`](crate::Driver::exited): not part of the call log
    Exited,
    /// [`Provider::open`](crate::Provider::open)
    Open,
    /// [`Provider::adopt`](crate::Provider::adopt)
    Adopt,
    /// [`Provider::claim`](crate::Provider::claim); its id is the pool's name
    Claim,
    /// [`GuestOps::spawn`](crate::GuestOps::spawn)
    Spawn,
    /// [`GuestOps::ping`](crate::GuestOps::ping)
    Ping,
    /// [`GuestOps::bind`](crate::GuestOps::bind)
    Bind,
}

impl Verb {
    /// The verbs that change a machine.
    pub const MUTATING: [Verb; 9] = [
        Verb::Clone,
        Verb::Boot,
        Verb::Resume,
        Verb::Suspend,
        Verb::Prespawn,
        Verb::Snapshot,
        Verb::Shutdown,
        Verb::Kill,
        Verb::Destroy,
    ];

    /// Whether it changes a machine.
    pub fn is_mutating(self) -> bool {
        Verb::MUTATING.contains(&self)
    }

    /// A suspend that fails, fails before it has paused anything; a kill or a question has nothing half done.
    pub(super) fn fails_clean(self) -> bool {
        match self {
            Verb::Clone | Verb::Boot | Verb::Resume | Verb::Prespawn | Verb::Destroy => false,
            Verb::Suspend
            | Verb::Snapshot
            | Verb::Shutdown
            | Verb::Kill
            | Verb::Begin
            | Verb::Inspect
            | Verb::Exited
            | Verb::Open
            | Verb::Adopt
            | Verb::Claim
            | Verb::Spawn
            | Verb::Ping
            | Verb::Bind => true,
        }
    }
}

/// What a call does instead of what it should.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Nothing: it works.
    Ok,
    /// Fails. A clone leaves half a disk, a boot its process, a destroy the disk.
    Err,
    /// Does it, and says that it failed.
    ErrButDone,
    /// Says that it did it, and did nothing. An inspection finds something broken.
    Lie,
    /// Begins and never returns, until [`World::heal`](super::World::heal) or until it is dropped.
    Hang,
    /// Takes that much longer.
    Slow(Duration),
    /// Does it; the machine's process dies that much later.
    DieLater(Duration),
    /// Begins and panics.
    Panic,
}

/// Probabilities of random faults, each from 0 to 1, for verbs that change a machine and for inspections.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Odds {
    /// Of [`Fault::Err`].
    pub err: f64,
    /// Of [`Fault::ErrButDone`].
    pub err_but_done: f64,
    /// Of [`Fault::Lie`].
    pub lie: f64,
    /// Of [`Fault::Hang`].
    pub hang: f64,
    /// Of [`Fault::Slow`], by up to ten seconds.
    pub slow: f64,
    /// Of [`Fault::DieLater`], within ten seconds.
    pub die_later: f64,
    /// Of [`Fault::Panic`].
    pub panic: f64,
}

impl Odds {
    /// The same probability for each kind of fault.
    pub fn each(odds: f64) -> Odds {
        Odds { err: odds, err_but_done: odds, lie: odds, hang: odds, slow: odds, die_later: odds, panic: odds }
    }

    pub(super) fn pick(&self, rng: &mut impl Rng) -> Fault {
        // One draw for the kind and one for the duration, always both: a seed's schedule does not shift with the odds.
        let (mut at, delay) = (rng.random::<f64>(), Duration::from_millis(rng.random_range(1..10_000)));
        let kinds = [
            (self.err, Fault::Err),
            (self.err_but_done, Fault::ErrButDone),
            (self.lie, Fault::Lie),
            (self.hang, Fault::Hang),
            (self.slow, Fault::Slow(delay)),
            (self.die_later, Fault::DieLater(delay)),
            (self.panic, Fault::Panic),
        ];
        for (odds, fault) in kinds {
            if at < odds {
                return fault;
            }
            at -= odds;
        }
        Fault::Ok
    }
}

/// How long the hardware takes. Zero by default.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Latency {
    /// Making a disk.
    pub clone: Duration,
    /// From power on until the guest's agent answers; also of a resume.
    pub boot: Duration,
    /// Until a process waits for what it is to go on from. A start that takes it up is shorter by that.
    pub prespawn: Duration,
    /// Saving an execution, also for copies of it.
    pub suspend: Duration,
    /// From being asked to shut down until it is off.
    pub shutdown: Duration,
    /// Until a killed process is gone.
    pub kill: Duration,
    /// Removing a disk.
    pub destroy: Duration,
}

impl Latency {
    pub(super) fn of(&self, verb: Verb) -> Duration {
        match verb {
            Verb::Clone => self.clone,
            Verb::Boot | Verb::Resume => self.boot,
            Verb::Prespawn => self.prespawn,
            Verb::Suspend | Verb::Snapshot => self.suspend,
            Verb::Kill => self.kill,
            Verb::Destroy => self.destroy,
            Verb::Shutdown
            | Verb::Begin
            | Verb::Inspect
            | Verb::Exited
            | Verb::Open
            | Verb::Adopt
            | Verb::Claim
            | Verb::Spawn
            | Verb::Ping
            | Verb::Bind => Duration::ZERO,
        }
    }
}

/// Backends that keep a promise badly, on purpose: a suite that passes one of them has no teeth.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Broken {
    /// A boot says that it worked, and nothing runs.
    Liar,
    /// A destroy leaves the disk behind, and nothing that the backend says admits it.
    Leaker,
    /// A kill never returns.
    HangsOnKill,
    /// A kill asks the guest, and returns.
    KillIsGraceful,
    /// A kill leaves a child of the machine's process alive.
    KillLeavesChild,
    /// A second destroy is an error.
    DestroyNotIdempotent,
    /// The disk is removed before the saved execution that needs it.
    DestroysDiskFirst,
    /// A clone of a deleted machine finds the old files again.
    StaleDisk,
    /// A clone over somebody else's machine removes it.
    DeletesForeign,
    /// A failed clone cannot be removed.
    KeepsHalfClones,
    /// A resumed machine has forgotten what was in memory.
    ForgetsSuspend,
    /// A copy's memory is that of a machine that has just booted.
    CopiesBoot,
    /// A machine that was copied has ended.
    ForkEndsOriginal,
    /// A suspended machine's process lives on.
    SuspendLeavesProcess,
    /// A machine whose process was to wait runs.
    PrespawnRuns,
    /// A process that was to wait outlives its machine.
    PrespawnOutlives,
    /// A stopped machine's memory is there again after a start.
    StopKeepsMemory,
    /// A machine that ended by itself is never noticed.
    NeverNoticesDeath,
    /// How a process ended is forgotten.
    ForgetsExit,
    /// The console is silent.
    SilentConsole,
    /// Standard error goes to standard output.
    ExecMergesStreams,
    /// Every command ends with 0.
    ExitCodeAlwaysZero,
    /// A death by signal is reported as an exit code.
    SignalsAsCodes,
    /// Bytes above 127 do not pass.
    SevenBit,
    /// Output is read ahead and what is too much is thrown away.
    DropsOutput,
    /// The environment of a command is forgotten.
    IgnoresEnv,
    /// The working directory of a command is forgotten.
    IgnoresCwd,
    /// A cancelled command runs on.
    CancelLeavesProcess,
    /// Errors contain the arguments.
    TellsArguments,
    /// Deleted machines are still listed.
    StaleList,
    /// Machines are not found by another process.
    NeverAdopts,
    /// Another process may operate at the same time.
    NoLock,
    /// Several processes may have the same pool's name.
    SharesClaims,
}

impl Broken {
    /// Each of them.
    pub const ALL: [Broken; 33] = [
        Broken::Liar,
        Broken::Leaker,
        Broken::HangsOnKill,
        Broken::KillIsGraceful,
        Broken::KillLeavesChild,
        Broken::DestroyNotIdempotent,
        Broken::DestroysDiskFirst,
        Broken::StaleDisk,
        Broken::DeletesForeign,
        Broken::KeepsHalfClones,
        Broken::ForgetsSuspend,
        Broken::CopiesBoot,
        Broken::ForkEndsOriginal,
        Broken::SuspendLeavesProcess,
        Broken::PrespawnRuns,
        Broken::PrespawnOutlives,
        Broken::StopKeepsMemory,
        Broken::NeverNoticesDeath,
        Broken::ForgetsExit,
        Broken::SilentConsole,
        Broken::ExecMergesStreams,
        Broken::ExitCodeAlwaysZero,
        Broken::SignalsAsCodes,
        Broken::SevenBit,
        Broken::DropsOutput,
        Broken::IgnoresEnv,
        Broken::IgnoresCwd,
        Broken::CancelLeavesProcess,
        Broken::TellsArguments,
        Broken::StaleList,
        Broken::NeverAdopts,
        Broken::NoLock,
        Broken::SharesClaims,
    ];
}
