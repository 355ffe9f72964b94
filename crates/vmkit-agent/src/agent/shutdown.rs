//! Shutting the machine down, or starting it again: because the host says so, or somebody in the guest, who tells process 1 by a
//! signal.

use std::ffi::c_int;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
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

/// What BusyBox's `halt`, `poweroff` and `reboot` send to process 1. A machine that is halted is of no use to anybody: it goes off.
pub(super) const SIGNALS: [c_int; 3] = [libc::SIGUSR1, libc::SIGUSR2, libc::SIGTERM];

/// What was asked for. Being off counts for more than starting again, whichever was first: a host that asks for it counts on it.
static ASKED: AtomicU8 = AtomicU8::new(NOTHING);
const NOTHING: u8 = 0;
const RESTART: u8 = 1;
const OFF: u8 = 2;

/// Notes what a signal asks for. For a signal's handler.
pub(super) fn ask(signal: c_int) {
    ASKED.fetch_max(if signal == libc::SIGTERM { RESTART } else { OFF }, Ordering::Relaxed);
}

/// Whether process 1 is to end the machine. From then on the agent is never idle.
pub(super) fn is_asked() -> bool {
    ASKED.load(Ordering::Relaxed) != NOTHING
}

/// Does what process 1 is asked for.
pub(super) async fn when_asked(agent: Arc<Inner>) {
    agent.reaper.asked().await;
    renew::settle_for_good(&agent);
    agent.spares.stop();
    sleep(ANSWERS).await;
    end_all().await;
    match ASKED.load(Ordering::Relaxed) {
        RESTART => end(RebootCommand::Restart),
        _ => end(RebootCommand::PowerOff),
    }
}

/// The host wants it off: what is to be said to it first is to be said within milliseconds.
pub(super) fn switch_off(agent: &Inner) {
    if std::process::id() == 1 {
        ask(libc::SIGUSR2);
        agent.reaper.tell_asked();
    } else {
        renew::settle(agent);
        ask_first();
    }
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

/// As process 1: ends every other process, in good order first.
async fn end_all() {
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
}

/// Switches the machine off, now.
pub(super) fn off() {
    end(RebootCommand::PowerOff);
}

/// Writes everything out first.
fn end(how: RebootCommand) {
    rustix::fs::sync();
    let _ = mount_remount("/", MountFlags::RDONLY, "");
    if let Err(error) = reboot(how) {
        eprintln!("vmkit-agent: the kernel refuses to end: {error}");
    }
}
