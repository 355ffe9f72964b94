//! Shutting the machine down.

use std::time::Duration;

use rustix::mount::{MountFlags, mount_remount};
use rustix::process::{Pid, Signal, kill_process_group};
use rustix::system::{RebootCommand, reboot};
use tokio::time::{Instant, sleep};

use super::procs;

/// How long processes may take to end of themselves.
const TERMINATES: Duration = Duration::from_secs(5);
/// How long the kernel may take to end them.
const DIES: Duration = Duration::from_secs(2);
/// So that the answer to the request leaves first.
const ANSWERS: Duration = Duration::from_millis(5);

/// As process 1: ends every process, in good order first, and switches the machine off. Otherwise it asks whoever is
/// process 1 to.
pub(super) async fn shutdown() {
    sleep(ANSWERS).await;
    if std::process::id() != 1 {
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
        return;
    }
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
    off();
}

/// Writes everything out and switches the machine off, now.
pub(super) fn off() {
    rustix::fs::sync();
    let _ = mount_remount("/", MountFlags::RDONLY, "");
    if let Err(error) = reboot(RebootCommand::PowerOff) {
        eprintln!("vmkit-agent: the kernel refuses to switch the machine off: {error}");
    }
}
