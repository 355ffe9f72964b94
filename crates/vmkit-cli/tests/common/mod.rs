//! The built program on a state directory of its own, and what looks at it from outside.
#![allow(dead_code, reason = "each test file uses a part")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use vmkit_image::{Agent, Cancel, Store};

/// A state directory that shares its images with all tests.
pub struct State {
    dir: tempfile::TempDir,
}

impl State {
    /// `None` where no machine can run, unless that is required.
    pub fn new() -> Option<State> {
        let images = Path::new(env!("CARGO_TARGET_TMPDIR")).join("images");
        let built = Agent::find(format!("protocol {}", vmkit_agent::link::VERSION))
            .and_then(|agent| Store::open(&images)?.ensure("base", &agent, &Cancel::new(), &|_| {}).map(drop));
        let state = State::empty();
        std::os::unix::fs::symlink(&images, state.path().join("images")).unwrap();
        let doctor = state.vmkit(&["doctor", "--json"]);
        let checks: serde_json::Value = serde_json::from_slice(&doctor.stdout).unwrap();
        let missing = |check: &&serde_json::Value| check["required"] == true && check["found"] == false;
        let problem = match &built {
            Err(error) => Some(format!("{error:?}")),
            Ok(()) => checks.as_array().unwrap().iter().find(missing).map(ToString::to_string),
        };
        match problem {
            None => Some(state),
            Some(problem) if std::env::var("VMKIT_REQUIRE").is_ok_and(|wanted| wanted.contains("qemu")) => {
                panic!("real machines are required and cannot run: {problem}")
            }
            Some(problem) => {
                eprintln!("SKIPPED: no machine can run here: {problem}");
                None
            }
        }
    }

    /// A state directory with nothing in it.
    pub fn empty() -> State {
        State { dir: tempfile::Builder::new().prefix("vmkit-cli-").tempdir().unwrap() }
    }

    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vmkit"));
        command.args(args).env("VMKIT_STATE_DIR", self.path()).env_remove("VMKIT_ACCEL").stdin(Stdio::null());
        command
    }

    pub fn vmkit(&self, args: &[&str]) -> Output {
        self.command(args).output().unwrap()
    }

    /// Runs what has to succeed, and returns what it printed.
    pub fn ok(&self, args: &[&str]) -> String {
        let output = self.vmkit(args);
        let said = text(&output.stderr);
        assert!(output.status.success(), "vmkit {args:?}: {}\n{said}", output.status);
        // Warnings say why a machine is not in the state that a test expects.
        eprint!("{said}");
        text(&output.stdout)
    }

    /// Runs what has to fail with this code, and returns its error as JSON.
    pub fn fails(&self, code: i32, args: &[&str]) -> serde_json::Value {
        let mut all = vec!["--json"];
        all.extend(args);
        let output = self.vmkit(&all);
        assert_eq!(output.status.code(), Some(code), "vmkit {args:?}: {}\n{}", output.status, text(&output.stderr));
        let last = text(&output.stderr).lines().last().unwrap_or_default().to_owned();
        let error: serde_json::Value = serde_json::from_str(&last).unwrap_or_else(|_| panic!("vmkit {args:?}: {last}"));
        let error = error["error"].clone();
        assert!(error["hint"].is_string(), "vmkit {args:?} does not say what to do next: {error}");
        error
    }

    /// The machines there are, by name and state.
    pub fn machines(&self) -> Vec<(String, String)> {
        let list: serde_json::Value = serde_json::from_str(&self.ok(&["ls", "--json"])).unwrap();
        let word = |value: &serde_json::Value| value.as_str().unwrap().to_owned();
        list.as_array().unwrap().iter().map(|vm| (word(&vm["id"]), word(&vm["state"]))).collect()
    }

    /// Every QEMU of this state directory, whatever vmkit says.
    pub fn pids(&self) -> Vec<u32> {
        let home = fs::canonicalize(self.path()).unwrap();
        let entries = fs::read_dir("/proc").unwrap().flatten();
        let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
        pids.filter(|pid| {
            let exe = fs::read_link(format!("/proc/{pid}/exe")).unwrap_or_default();
            fs::read_link(format!("/proc/{pid}/cwd")).is_ok_and(|cwd| cwd.starts_with(&home))
                && exe.to_string_lossy().contains("qemu-system")
        })
        .collect()
    }

    /// Everything of machines that is on disk, whatever vmkit says.
    pub fn left(&self) -> Vec<PathBuf> {
        let parts = ["vms", "vms/.staging", "vms/.trash", "vms/.locks", "run"].map(|part| self.path().join(part));
        let entries = parts.iter().filter_map(|part| fs::read_dir(part).ok()).flatten().flatten();
        let hidden = |path: &PathBuf| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with('.'));
        entries.map(|entry| entry.path()).filter(|path| !hidden(path)).collect()
    }

    pub fn is_clean(&self) {
        assert_eq!(self.pids(), [0; 0], "processes are left");
        let left = self.left();
        assert!(left.is_empty(), "files are left: {left:?}");
    }
}

impl Drop for State {
    fn drop(&mut self) {
        // Also after a panic: nothing outlives its test.
        for pid in self.pids() {
            let _ = Command::new("kill").args(["-9", &pid.to_string()]).status();
        }
    }
}

pub fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

pub fn signalled(pid: u32, signal: &str) {
    assert!(Command::new("kill").args([signal, &pid.to_string()]).status().unwrap().success());
}

pub fn eventually(mut so: impl FnMut() -> bool) {
    let start = Instant::now();
    while !so() {
        assert!(start.elapsed() < Duration::from_secs(60), "it never came to be so");
        std::thread::sleep(Duration::from_millis(5));
    }
}
