//! Processes that outlive whoever started them: named so that a recycled pid is never taken for them.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Duration;

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde::{Deserialize, Serialize};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Which process: its pid, when it started, and in which boot of this machine. Pids come back, the three together do not.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Identity {
    /// Its pid.
    pub pid: u32,
    /// When it started, in clock ticks since boot (`/proc/PID/stat`, field 22).
    pub start_time: u64,
    /// The kernel's random name of this boot.
    pub boot_id: String,
}

impl Identity {
    /// The process that has this pid now; `None` when there is none, or only its exit status is left.
    ///
    /// # Errors
    /// When `/proc` cannot be read.
    pub fn of(pid: u32) -> io::Result<Option<Identity>> {
        let Some(stat) = Stat::of(pid)? else { return Ok(None) };
        Ok(Some(Identity { pid, start_time: stat.start_time, boot_id: boot_id()? }))
    }

    /// Whether this very process runs. One that has ended and waits for its parent does not.
    pub fn is_alive(&self) -> bool {
        Identity::of(self.pid).is_ok_and(|now| now.as_ref() == Some(self))
    }

    /// Whether it works in this directory: the directory itself, whatever it is called by now. What may not be looked at
    /// counts as working there; it may not be signalled either.
    pub fn works_in(&self, dir: &Path) -> bool {
        match (fs::metadata(format!("/proc/{}/cwd", self.pid)), fs::metadata(dir)) {
            (Ok(cwd), Ok(dir)) => (cwd.dev(), cwd.ino()) == (dir.dev(), dir.ino()),
            (Err(error), Ok(_)) => error.kind() == io::ErrorKind::PermissionDenied,
            (_, Err(_)) => false,
        }
    }

    /// Returns when nothing of it is left but its exit status. One that was killed counts as ended as soon as its first thread
    /// has; the others may still have its files open, and its sockets. One that runs is not waited for.
    ///
    /// # Errors
    /// When the kernel gives no descriptor for it.
    pub async fn let_go(&self) -> io::Result<()> {
        let Some(pid) = i32::try_from(self.pid).ok().and_then(Pid::from_raw) else { return Ok(()) };
        let fd = match pidfd_open(pid, PidfdFlags::empty()) {
            Ok(fd) => fd,
            Err(rustix::io::Errno::SRCH) => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        let ending = Stat::read(self.pid)?.is_some_and(|stat| stat.ended && stat.start_time == self.start_time);
        if ending && boot_id()? == self.boot_id {
            let _ = watch(fd)?.readable().await?;
        }
        Ok(())
    }

    /// A hold on this very process, if it runs.
    ///
    /// # Errors
    /// When the kernel gives no descriptor for it.
    pub fn hold(&self) -> io::Result<Option<Held>> {
        let Some(pid) = i32::try_from(self.pid).ok().and_then(Pid::from_raw) else { return Ok(None) };
        let fd = match pidfd_open(pid, PidfdFlags::empty()) {
            Ok(fd) => fd,
            Err(rustix::io::Errno::SRCH) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        // Looked at after it is held: from here on the descriptor can mean nobody else.
        if !self.is_alive() {
            return Ok(None);
        }
        Ok(Some(Held { fd: watch(fd)?, identity: self.clone() }))
    }
}

/// A process that is held by descriptor: signals and waits reach it or nobody. Must be used in a tokio runtime.
#[derive(Debug)]
pub struct Held {
    fd: AsyncFd<OwnedFd>,
    identity: Identity,
}

impl Held {
    /// Which process.
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// Returns when it has ended. Cancel-safe.
    pub async fn exited(&self) {
        // An error means that the runtime shuts down: then nobody waits any more.
        let _ = self.fd.readable().await.map(|mut ready| ready.retain_ready());
    }

    /// Kills it. One that has ended is left alone.
    ///
    /// # Errors
    /// When it is somebody else's.
    pub fn kill(&self) -> io::Result<()> {
        match pidfd_send_signal(self.fd.get_ref(), Signal::KILL) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

#[expect(unsafe_code, reason = "the runtime cannot know that a descriptor stays the same one")]
fn watch(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an `OwnedFd` is the same open descriptor for as long as it lives, and `AsyncFd` owns it.
    Ok(unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) }?)
}

/// What a process has used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Processor time.
    pub cpu: Duration,
    /// Memory that it has for itself and that the kernel cannot take back, bytes; absent when it may not be looked at.
    pub private: Option<u64>,
}

/// What a process has used until now; `None` when it is gone.
pub fn usage(pid: u32) -> Option<Usage> {
    let stat = Stat::of(pid).ok()??;
    let ticks = rustix::param::clock_ticks_per_second().max(1);
    let private = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).ok().map(|text| {
        let field = |name: &str| -> u64 {
            let line = text.lines().find_map(|line| line.strip_prefix(name));
            line.and_then(|rest| rest.split_whitespace().next()?.parse().ok()).unwrap_or(0)
        };
        // What is "dirty" includes pages of files that nobody else looks at now and that were not written to disk yet: the kernel
        // takes those back.
        field("Anonymous:") * 1024
    });
    Some(Usage { cpu: Duration::from_millis(stat.cpu_ticks * 1000 / ticks), private })
}

/// The pids of every process whose working directory is `dir`, as far as we may see.
pub(crate) fn working_in(dir: &Path) -> Vec<u32> {
    let Ok(wanted) = fs::metadata(dir) else { return Vec::new() };
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    let pids = entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    pids.filter(|pid| {
        fs::metadata(format!("/proc/{pid}/cwd")).is_ok_and(|cwd| (cwd.dev(), cwd.ino()) == (wanted.dev(), wanted.ino()))
    })
    .collect()
}

/// The kernel's random name of this boot.
pub(crate) fn boot_id() -> io::Result<String> {
    Ok(fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim().to_owned())
}

struct Stat {
    start_time: u64,
    cpu_ticks: u64,
    /// Only its exit status is left, or its other threads are on their way out.
    ended: bool,
}

impl Stat {
    /// `None` for a process of which only the exit status is left.
    fn of(pid: u32) -> io::Result<Option<Stat>> {
        Ok(Stat::read(pid)?.filter(|stat| !stat.ended))
    }

    fn read(pid: u32) -> io::Result<Option<Stat>> {
        let text = match fs::read_to_string(format!("/proc/{pid}/stat")) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            // It ended between opening and reading.
            Err(error) if error.raw_os_error() == Some(rustix::io::Errno::SRCH.raw_os_error()) => return Ok(None),
            Err(error) => return Err(error),
        };
        Ok(Stat::parse(&text))
    }

    fn parse(text: &str) -> Option<Stat> {
        // The name, in parentheses, may contain anything, also parentheses and blanks.
        let rest: Vec<&str> = text.get(text.rfind(')')? + 1..)?.split_whitespace().collect();
        let ended = matches!(*rest.first()?, "Z" | "X" | "x");
        let field = |number: usize| rest.get(number - 3)?.parse::<u64>().ok();
        Some(Stat { start_time: field(22)?, cpu_ticks: field(14)? + field(15)?, ended })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_with_parentheses_and_blanks_does_not_confuse() {
        let text = "42 (a) b (c d) S 1 42 42 0 -1 4194304 1 0 0 0 7 5 0 0 20 0 1 0 987654 1 1 1";
        let stat = Stat::parse(text).unwrap();
        assert_eq!((stat.start_time, stat.cpu_ticks), (987_654, 12));
        assert!(!stat.ended && Stat::parse(&text.replace(") S", ") Z")).unwrap().ended);
    }

    #[tokio::test]
    async fn a_process_is_alive_until_it_ends_and_a_wrong_start_time_is_somebody_else() {
        let mut child = std::process::Command::new("sleep").arg("600").spawn().unwrap();
        let identity = Identity::of(child.id()).unwrap().unwrap();
        assert!(identity.is_alive());
        let recycled = Identity { start_time: identity.start_time + 1, ..identity.clone() };
        assert!(!recycled.is_alive());
        assert!(recycled.hold().unwrap().is_none());
        let earlier = Identity { boot_id: "another".into(), ..identity.clone() };
        assert!(!earlier.is_alive());
        let held = identity.hold().unwrap().unwrap();
        held.kill().unwrap();
        held.exited().await;
        assert!(!identity.is_alive(), "an exit status is not a process");
        child.wait().unwrap();
        held.kill().unwrap();
        assert!(identity.hold().unwrap().is_none());
    }

    #[test]
    fn processes_are_found_by_where_they_work() {
        let dir = tempfile::tempdir().unwrap();
        let mut child = std::process::Command::new("sleep").arg("600").current_dir(dir.path()).spawn().unwrap();
        assert_eq!(working_in(dir.path()), [child.id()]);
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(working_in(dir.path()), [0; 0]);
    }
}
