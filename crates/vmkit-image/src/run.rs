//! The tools a build runs, and how none of them outlives it.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rustix::fs::{Access, MemfdFlags, OFlags, access, fcntl_setfl, memfd_create, statvfs};
use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, kill_process, kill_process_group, waitid};
use vmkit::{Error, ErrorKind, Result};

use crate::progress::{Cancel, Phase, Progress};

/// How long tools may take to clean up after themselves once they are told to end. `LEASH` has the same.
const GRACE: Duration = Duration::from_secs(5);

/// In the environment of all that a build runs. Daemons that a tool started, such as fakeroot's, are in no process group of ours,
/// and outlive a tool that is killed; by this they are found.
const MARK: &str = "VMKIT_BUILD";

/// Runs a tool on a leash: descriptor 3 is a pipe whose other end only the build holds. However the build dies, the pipe
/// closes, and the whole process group ends, and whoever bears the mark.
const LEASH: &str = r#"
exec 3<&0 </dev/null
umask 022
"$@" 3<&- & tool=$!
strays() {
  for process in /proc/[0-9]*; do
    grep -aqsF "VMKIT_BUILD=$VMKIT_BUILD" "$process/environ" && kill -TERM "${process#/proc/}"
  done 2>/dev/null
}
{ read -r _; trap '' TERM; kill -TERM 0; strays; sleep 5; strays; kill -KILL 0; } <&3 &
wait "$tool"
"#;

/// Variables by which a user's habits would change what the tools make.
const MEDDLERS: &[&str] = &["TAR_OPTIONS", "MKE2FS_CONFIG", "DEBUGFS_PAGER", "GZIP", "XZ_OPT", "XZ_DEFAULTS"];

/// A build in progress: its directory, and whom it reports to.
pub(crate) struct Work<'a> {
    dir: PathBuf,
    cancel: &'a Cancel,
    progress: &'a dyn Fn(Progress<'_>),
}

impl<'a> Work<'a> {
    pub(crate) fn new(dir: PathBuf, cancel: &'a Cancel, progress: &'a dyn Fn(Progress<'_>)) -> Work<'a> {
        Work { dir, cancel, progress }
    }

    /// A path in the build's own directory.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    pub(crate) fn report(&self, phase: Phase, detail: &str) {
        (self.progress)(Progress { phase, detail });
    }

    pub(crate) fn check(&self) -> Result<()> {
        self.cancel.check()
    }

    /// Runs a tool to its end and returns what it wrote to its standard output.
    pub(crate) fn run(&self, tool: &Tool) -> Result<Vec<u8>> {
        self.execute(tool).map(|(output, _)| output)
    }

    /// Runs a tool whose exit status says little: whatever it complains of is an error. A line that begins with `greeting` is
    /// none.
    pub(crate) fn run_silent(&self, tool: &Tool, greeting: &str) -> Result<()> {
        let (_, log) = self.execute(tool)?;
        let log = String::from_utf8_lossy(&log);
        let complaints: Vec<&str> =
            log.lines().filter(|line| !line.trim().is_empty() && !line.starts_with(greeting)).collect();
        match complaints.is_empty() {
            true => Ok(()),
            false => Err(tool.error("it complained", &complaints.join("\n"), self.is_full())),
        }
    }

    /// Runs a tool to its end and returns its standard output and its standard error.
    fn execute(&self, tool: &Tool) -> Result<(Vec<u8>, Vec<u8>)> {
        self.cancel.check()?;
        tool.require()?;
        let failed = |error| Error::io(format!("{} could not be run", tool.name()), error);
        let mut output = scratch("output").map_err(failed)?;
        let mut log = scratch("log").map_err(failed)?;
        let mut command = Command::new("/bin/sh");
        command.args(["-c", LEASH, "leash"]).args(&tool.args);
        command.current_dir(tool.dir.as_deref().unwrap_or(&self.dir));
        for name in MEDDLERS {
            command.env_remove(name);
        }
        command.env(MARK, self.mark());
        command.env("PATH", search_path()).env("LC_ALL", "C").envs(tool.env.iter().cloned());
        command.stdin(Stdio::piped()).process_group(0);
        command.stdout(output.try_clone().map_err(failed)?).stderr(log.try_clone().map_err(failed)?);

        let mut child = command.spawn().map_err(failed)?;
        let ended = self.wait(Pid::from_child(&child), tool, &mut log);
        // The leader is not reaped yet, so the group is still ours: nothing of it may go on, whatever happened.
        let _ = kill_process_group(Pid::from_child(&child), Signal::KILL);
        let status = child.wait().map_err(failed)?;
        if ended.is_err() {
            self.end_strays();
        }
        ended?;

        let text = read_all(&mut log).map_err(failed)?;
        if !status.success() {
            return Err(tool.error(&status.to_string(), &String::from_utf8_lossy(&text), self.is_full()));
        }
        Ok((read_all(&mut output).map_err(failed)?, text))
    }

    /// Tells this build from every other.
    fn mark(&self) -> &OsStr {
        self.dir.file_name().unwrap_or_default()
    }

    /// Ends what a cancelled tool left outside of its process group.
    fn end_strays(&self) {
        let mark = [MARK.as_bytes(), b"=", self.mark().as_bytes()].concat();
        for process in std::fs::read_dir("/proc").into_iter().flatten().flatten() {
            let pid = process.file_name().to_str().and_then(|name| name.parse().ok()).and_then(Pid::from_raw);
            let environment = pid.and_then(|_| std::fs::read(process.path().join("environ")).ok()).unwrap_or_default();
            if let Some(pid) = pid.filter(|_| environment.split(|byte| *byte == 0).any(|entry| entry == mark)) {
                let _ = kill_process(pid, Signal::TERM);
            }
        }
    }

    /// Whether the file system has no space left to speak of. Not every tool says that this is why it failed.
    fn is_full(&self) -> bool {
        statvfs(&self.dir).is_ok_and(|fs| fs.f_bavail * fs.f_frsize < 1 << 20 || (fs.f_files > 0 && fs.f_favail == 0))
    }

    /// Returns when the tool has ended, on its own or because it was to.
    fn wait(&self, pid: Pid, tool: &Tool, log: &mut File) -> Result<()> {
        let mut pause = Duration::from_millis(1);
        let mut kill_at = None;
        let mut seen = 0;
        loop {
            let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
            match waitid(WaitId::Pid(pid), options) {
                Ok(None) | Err(rustix::io::Errno::INTR) => {}
                Ok(Some(_)) if kill_at.is_some() => return self.cancel.check(),
                Ok(Some(_)) => return Ok(()),
                Err(error) => return Err(Error::io(format!("{} could not be waited for", tool.name()), error.into())),
            }
            match kill_at {
                None if self.cancel.is_cancelled() => {
                    let _ = kill_process_group(pid, Signal::TERM);
                    kill_at = Some(Instant::now() + GRACE);
                }
                Some(at) if Instant::now() >= at => {
                    let _ = kill_process_group(pid, Signal::KILL);
                }
                _ => {}
            }
            if let Some(phase) = tool.follow {
                seen = self.relay(phase, log, seen);
            }
            std::thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(50));
        }
    }

    /// Reports the newest line of the tool's log, when there is a new one.
    fn relay(&self, phase: Phase, log: &mut File, seen: u64) -> u64 {
        let mut text = Vec::new();
        if log.seek(SeekFrom::Start(seen)).is_err() || log.read_to_end(&mut text).is_err() {
            return seen;
        }
        let Some(end) = text.iter().rposition(|byte| *byte == b'\n') else { return seen };
        let text = String::from_utf8_lossy(&text[..end]);
        if let Some(line) = text.lines().rev().map(str::trim).find(|line| !line.is_empty()) {
            self.report(phase, line.strip_prefix("I: ").unwrap_or(line));
        }
        seen + end as u64 + 1
    }
}

/// A program to run, with its arguments.
pub(crate) struct Tool {
    /// The program itself is the first.
    args: Vec<OsString>,
    /// What must be there, each with the package that has it: the program, and those that it runs in turn.
    programs: Vec<(&'static str, &'static str)>,
    env: Vec<(&'static str, OsString)>,
    dir: Option<PathBuf>,
    follow: Option<Phase>,
}

impl Tool {
    /// `package` is what to install when the program is not there.
    pub(crate) fn new(name: &'static str, package: &'static str) -> Tool {
        Tool { args: vec![name.into()], programs: vec![(name, package)], env: Vec::new(), dir: None, follow: None }
    }

    /// Says that the tool runs this program, so that it is missed before the tool misses it.
    pub(crate) fn needs(mut self, name: &'static str, package: &'static str) -> Tool {
        self.programs.push((name, package));
        self
    }

    /// Has this tool run the other one, which comes after the arguments so far.
    pub(crate) fn then(mut self, other: Tool) -> Tool {
        self.args.extend(other.args);
        // The one whose failure it will be is what errors name.
        self.programs.splice(0..0, other.programs);
        self.env.extend(other.env);
        self
    }

    pub(crate) fn arg(mut self, arg: impl AsRef<OsStr>) -> Tool {
        self.args.push(arg.as_ref().to_owned());
        self
    }

    pub(crate) fn args(mut self, args: &[&str]) -> Tool {
        self.args.extend(args.iter().map(Into::into));
        self
    }

    pub(crate) fn env(mut self, name: &'static str, value: impl AsRef<OsStr>) -> Tool {
        self.env.push((name, value.as_ref().to_owned()));
        self
    }

    pub(crate) fn current_dir(mut self, dir: &Path) -> Tool {
        self.dir = Some(dir.to_owned());
        self
    }

    /// Reports its log line by line while it runs.
    pub(crate) fn follow(mut self, phase: Phase) -> Tool {
        self.follow = Some(phase);
        self
    }

    fn name(&self) -> &'static str {
        self.programs[0].0
    }

    /// Every program is there.
    fn require(&self) -> Result<()> {
        match self.programs.iter().find(|(name, _)| which(name).is_none()) {
            Some((name, package)) => Err(not_installed(name, package)),
            None => Ok(()),
        }
    }

    fn error(&self, how: &str, log: &str, full: bool) -> Error {
        let lines: Vec<&str> = log.lines().collect();
        let tail = lines[lines.len().saturating_sub(20)..].join("\n");
        let full = full || log.contains("No space left on device") || log.contains("Disk quota exceeded");
        let kind = if full { ErrorKind::ResourceExhausted } else { ErrorKind::Io };
        let error = Error::new(kind, format!("{} failed ({how})", self.name())).with_details(tail);
        match full {
            true => error.hint("free some space, or use another disk with --state-dir or VMKIT_STATE_DIR"),
            false => error,
        }
    }
}

/// What to say of a program that is not there.
pub(crate) fn not_installed(name: &str, package: &str) -> Error {
    Error::new(ErrorKind::MissingDependency, format!("{name} is not installed"))
        .hint(format!("run `make setup`, or install the package {package}"))
}

/// Where ordinary users do not look, and where mke2fs is.
fn search_path() -> String {
    let path = std::env::var("PATH").unwrap_or_else(|_| "/usr/bin:/bin".to_owned());
    format!("{path}:/usr/local/sbin:/usr/sbin:/sbin")
}

/// Finds a program in the search path of tools.
pub(crate) fn which(name: &str) -> Option<PathBuf> {
    let can_run = |path: &PathBuf| path.is_file() && access(path, Access::EXEC_OK).is_ok();
    search_path().split(':').map(|dir| Path::new(dir).join(name)).find(can_run)
}

/// A file in memory: a log on a full disk could not say that the disk is full. Appended to, as reading moves the place where a
/// tool would write.
fn scratch(name: &str) -> std::io::Result<File> {
    let file = memfd_create(name, MemfdFlags::CLOEXEC)?;
    fcntl_setfl(&file, OFlags::RDWR | OFlags::APPEND)?;
    Ok(file.into())
}

fn read_all(file: &mut File) -> std::io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    file.seek(SeekFrom::Start(0))?;
    file.read_to_end(&mut bytes)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn in_work<T>(test: impl FnOnce(&Work<'_>) -> T) -> T {
        let dir = tempfile::tempdir().unwrap();
        let cancel = Cancel::new();
        test(&Work::new(dir.path().to_owned(), &cancel, &|_| {}))
    }

    #[test]
    fn what_is_not_installed_is_named_with_its_package() {
        in_work(|work| {
            let missing = || Tool::new("no-such-tool", "some-package");
            for tool in [
                missing(),
                Tool::new("env", "coreutils").then(missing()),
                Tool::new("true", "x").needs("no-such-tool", "some-package"),
            ] {
                let error = work.run(&tool).unwrap_err();
                assert_eq!(error.kind(), ErrorKind::MissingDependency);
                assert_eq!(error.message(), "no-such-tool is not installed");
                assert!(error.next_step().unwrap().ends_with("install the package some-package"));
            }
        });
    }

    #[test]
    fn a_failure_tells_what_the_tool_said_and_nothing_is_interpreted() {
        in_work(|work| {
            let sh =
                |script: &str| Tool::new("sh", "dash").args(&["-c", script, "sh", "$(false) `false`; *", "two words"]);
            assert_eq!(work.run(&sh(r#"printf '%s|' "$@""#)).unwrap(), b"$(false) `false`; *|two words|");
            let error = work.run(&sh("echo why >&2; exit 7")).unwrap_err();
            assert_eq!((error.kind(), error.details()), (ErrorKind::Io, Some("why")));
            let error = work.run(&sh("echo 'x: No space left on device' >&2; exit 1")).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::ResourceExhausted);
            assert!(error.next_step().is_some());
            // Closed, not inherited: only we hold the leash.
            work.run(&sh("test ! -e /proc/$$/fd/3")).unwrap();

            work.run_silent(&sh("echo 'tool 1.0' >&2"), "tool ").unwrap();
            let error = work.run_silent(&sh("echo 'tool 1.0' >&2; echo bad >&2"), "tool ").unwrap_err();
            assert_eq!(error.details(), Some("bad"));
        });
    }

    #[test]
    fn a_cancelled_tool_ends_with_its_children() {
        let dir = tempfile::tempdir().unwrap();
        let cancel = Cancel::new();
        let report = |progress: Progress<'_>| {
            assert_eq!(progress.detail, "begun");
            cancel.cancel();
        };
        let work = Work::new(dir.path().to_owned(), &cancel, &report);
        // One in its process group, and one that left it.
        let script = "setsid sleep 600 & echo $! >stray; sleep 600 & echo $! >child; sleep 0.1; echo begun >&2; wait";
        let since = Instant::now();
        let error = work.run(&Tool::new("sh", "dash").args(&["-c", script]).follow(Phase::Root)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Cancelled);
        assert!(since.elapsed() < GRACE);
        for file in ["child", "stray"] {
            let pid = std::fs::read_to_string(dir.path().join(file)).unwrap();
            let state = || std::fs::read_to_string(format!("/proc/{}/stat", pid.trim())).unwrap_or_default();
            while !(state().is_empty() || state().contains(") Z ")) {
                assert!(since.elapsed() < GRACE, "{file}: {}", state());
                std::thread::sleep(Duration::from_millis(10));
            }
        }
    }
}
