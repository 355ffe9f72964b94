//! Shutting the machine down, or starting it again: because the host says so, or somebody in the guest, who tells process 1 by a signal.

use std::ffi::c_int;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::time::Duration;

use rustix::mount::{MountFlags, mount_remount};
use rustix::process::{Pid, Signal, kill_process_group};
use rustix::system::{RebootCommand, reboot};
use tokio::time::{Instant, sleep};

use super::{Inner, procs, renew};

/// How long processes may take to end of themselves.
const TERMINATES: Duration = Duration::from_secs(5);
/// How long the kernel may take to end them.
const DIES: Duration = Duration::from_secs(2);
/// So that the answer to the request leaves first, and how the command ended that asked for it.
const ANSWERS: Duration = Duration::from_millis(20);

/// Which signal asked for it; 0 while nobody has.
static ASKED: AtomicI32 = AtomicI32::new(0);

/// Whether anybody has asked for it to be off.
static OFF: AtomicBool = AtomicBool::new(false);

/// What BusyBox's `halt`, `poweroff` and `reboot` send to process 1. A machine that is halted is of no use to anybody: it goes off.
pub(super) const SIGNALS: [c_int; 3] = [libc::SIGUSR1, libc::SIGUSR2, libc::SIGTERM];

/// Notes that a signal has asked for it. For a signal's handler.
pub(super) fn ask(signal: c_int) {
    OFF.fetch_or(signal != libc::SIGTERM, Ordering::Relaxed);
    ASKED.store(signal, Ordering::Relaxed);
}

/// Whether a signal has asked for it. From then on the agent is never idle.
pub(super) fn is_asked() -> bool {
    ASKED.load(Ordering::Relaxed) != 0
}

/// Does what a signal asks for.
pub(super) async fn when_asked(agent: Arc<Inner>) {
    agent.reaper.asked().await;
    let how = match ASKED.load(Ordering::Relaxed) {
        libc::SIGTERM => RebootCommand::Restart,
        _ => RebootCommand::PowerOff,
    };
    begin(&agent, how);
}

/// Begins it. What is to be said first is to be said within milliseconds.
pub(super) fn begin(agent: &Inner, how: RebootCommand) {
    OFF.fetch_or(matches!(how, RebootCommand::PowerOff), Ordering::Relaxed);
    renew::settle(agent);
    agent.spares.stop();
    let busy = agent.quiet.busy();
    tokio::spawn(async move {
        let _busy = busy;
        sleep(ANSWERS).await;
        if std::process::id() == 1 {
            as_first(how).await;
        } else {
            ask_first();
        }
    });
}

/// Asks whoever is process 1 to switch the machine off.
fn ask_first() {
    for program in ["systemctl", "poweroff", "/sbin/poweroff"] {
        let mut command = std::process::Command::new(program);
        if program == "systemctl" {
            command.arg("poweroff");
        }
        if command.spawn().is_ok() {
            return;
        }
    }
    eprintln!("vmkit-agent: asked to shut down, and there is no program here that does");
}

/// As process 1: ends every process, in good order first, and then the system.
async fn as_first(how: RebootCommand) {
    // To process 1 itself this number means everybody else.
    let everybody = Pid::INIT;
    for (signal, patience) in [(Signal::TERM, TERMINATES), (Signal::KILL, DIES)] {
        let _ = kill_process_group(everybody, signal);
        // Stopped ones have to go on to end.
        let _ = kill_process_group(everybody, Signal::CONT);
        let until = Instant::now() + patience;
        let mut pause = Duration::from_millis(2);
        while procs::users().next().is_some() && Instant::now() < until {
            sleep(pause).await;
            pause = (pause * 2).min(Duration::from_millis(100));
        }
        if procs::users().next().is_none() {
            break;
        }
    }
    end(how);
}

/// Writes everything out and switches the machine off, now.
pub(super) fn off() {
    end(RebootCommand::PowerOff);
}

fn end(how: RebootCommand) {
    // Somebody may have asked for the one while the other was under way: a host that is to switch it off counts on it.
    let how = if OFF.load(Ordering::Relaxed) { RebootCommand::PowerOff } else { how };
    rustix::fs::sync();
    let _ = mount_remount("/", MountFlags::RDONLY, "");
    if let Err(error) = reboot(how) {
        eprintln!("vmkit-agent: the kernel refuses to end: {error}");
    }
}
