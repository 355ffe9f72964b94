//! Kill -9 of `vmkit`, at any moment: the next command finds every machine again, or removes it.

mod common;

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use common::{State, eventually, signalled, text};
use rustix::process::{Pid, Signal, kill_process};

/// Kills it after this long, unless it was quicker. Returns whether it was killed.
fn kill_after(child: Child, time: Duration) -> bool {
    std::thread::sleep(time);
    end(child, Signal::KILL)
}

/// Sends it a signal. Returns whether that ended it.
fn end(mut child: Child, signal: Signal) -> bool {
    kill_process(Pid::from_child(&child), signal).unwrap();
    // One that is told to end, and not killed, says that it was.
    matches!(child.wait().unwrap().code(), None | Some(130))
}

/// Kills of a command at moments that are spread over the time it takes.
struct Spread {
    whole: Duration,
    signal: Signal,
    killed: u32,
}

impl Spread {
    /// `whole` is what the command took once.
    fn over(whole: Duration) -> Spread {
        Spread { whole, signal: Signal::KILL, killed: 0 }
    }

    /// Kills it at this part of its time, from 0 to 1. One that is done sooner shows what it takes by now: a machine that was
    /// loaded when the whole was measured is not so for ever.
    fn kill_at(&mut self, mut child: Child, part: f64) -> Duration {
        let (start, at) = (Instant::now(), self.whole.mul_f64(part));
        loop {
            if child.try_wait().unwrap().is_some() {
                self.whole = start.elapsed();
                return at;
            }
            let left = at.saturating_sub(start.elapsed());
            if left.is_zero() {
                break;
            }
            std::thread::sleep(left.min(Duration::from_millis(2)));
        }
        self.killed += u32::from(end(child, self.signal));
        at
    }
}

fn took(work: impl FnOnce()) -> Duration {
    let start = Instant::now();
    work();
    start.elapsed()
}

#[test]
fn killed_runs_leave_nothing_that_the_next_command_does_not_clean() {
    let Some(state) = State::new() else { return };
    let mut kills = Spread::over(took(|| drop(state.ok(&["run", "--", "true"]))));
    for step in 0..16 {
        let child = state.command(&["run", "--", "true"]).stderr(Stdio::null()).spawn().unwrap();
        // Close together at the beginning and the end, where most happens in little time.
        let part = f64::from(step) / 15.0;
        let part = if part < 0.5 { 2.0 * part * part } else { 1.0 - 2.0 * (1.0 - part) * (1.0 - part) };
        let at = kills.kill_at(child, part);
        assert_eq!(state.machines(), [], "after a kill at {at:?}");
        state.is_clean();
    }
    let killed = kills.killed;
    assert!(killed >= 8, "only {killed} of 16 runs were killed in time");
}

#[test]
fn a_suspend_that_is_killed_leaves_a_machine_that_goes_on() {
    let Some(state) = State::new() else { return };
    state.ok(&["clone", "web"]);
    state.ok(&["start", "web"]);
    state.ok(&["exec", "web", "--", "sh", "-c", "echo word > /dev/shm/word"]);
    let mut kills = Spread::over(took(|| drop(state.ok(&["suspend", "web"]))));
    state.ok(&["start", "web"]);
    for step in 0..12 {
        let child = state.command(&["suspend", "web"]).stderr(Stdio::null()).spawn().unwrap();
        kills.kill_at(child, f64::from(step) / 11.0);
        let machines = state.machines();
        match machines[0].1.as_str() {
            "Running" => assert_eq!(state.pids().len(), 1),
            "Suspended" => {
                assert_eq!(state.pids(), [0; 0]);
                state.ok(&["start", "web"]);
            }
            other => panic!("a suspend that was killed left it {other}"),
        }
        assert_eq!(state.ok(&["exec", "web", "--", "cat", "/dev/shm/word"]), "word\n");
    }
    // A fork's first, which gives it a memory file.
    state.ok(&["cleanup", "web", "--grace", "0"]);
    let fork = || {
        state.ok(&["clone", "web"]);
        state.ok(&["start", "web"]);
        state.ok(&["exec", "web", "--", "sh", "-c", "head -c 9000000 /dev/urandom > /dev/shm/noise"]);
        state.ok(&["exec", "web", "--", "sh", "-c", "md5sum /dev/shm/noise > /dev/shm/sum; echo word > /dev/shm/word"]);
    };
    fork();
    let mut kills = Spread::over(took(|| drop(state.ok(&["suspend", "web"]))));
    for step in 0..12 {
        state.ok(&["cleanup", "web", "--grace", "0"]);
        fork();
        let child = state.command(&["suspend", "web"]).stderr(Stdio::null()).spawn().unwrap();
        let at = kills.kill_at(child, f64::from(step) / 11.0);
        // Whatever it was cut off at, it is suspended like any other from then on; and once it goes on in a file of its own.
        for _ in 0..2 {
            match state.machines()[0].1.as_str() {
                "Running" => drop(state.ok(&["suspend", "web"])),
                "Suspended" => {}
                other => {
                    panic!("a suspend that was killed at {at:?} left it {other}: {}", state.ok(&["inspect", "web"]))
                }
            }
            assert_eq!(state.pids(), [0; 0]);
            state.ok(&["start", "web"]);
            for file in ["memory.apart", "state.apart", "state.tmp", "save.sock"] {
                assert!(!state.path().join("vms/web").join(file).exists(), "{file} is left");
            }
            assert_eq!(state.ok(&["exec", "web", "--", "cat", "/dev/shm/word"]), "word\n");
            state.ok(&["exec", "web", "--", "md5sum", "-c", "/dev/shm/sum"]);
        }
    }
    let killed = kills.killed;
    assert!(killed >= 4, "only {killed} of 12 first suspends were killed in time");
    state.ok(&["cleanup", "--all", "--grace", "0"]);
    state.is_clean();
}

#[test]
fn a_resume_that_is_killed_or_interrupted_loses_nothing() {
    let Some(state) = State::new() else { return };
    state.ok(&["clone", "web"]);
    state.ok(&["start", "web"]);
    state.ok(&["exec", "web", "--", "sh", "-c", "echo word > /dev/shm/word"]);
    state.ok(&["suspend", "web"]);
    let whole = took(|| drop(state.ok(&["start", "web"])));
    for signal in [Signal::KILL, Signal::INT] {
        let mut ends = Spread { signal, ..Spread::over(whole) };
        for step in 0..20 {
            state.ok(&["suspend", "web"]);
            let child = state.command(&["start", "web"]).stderr(Stdio::null()).spawn().unwrap();
            // From where it asks QEMU for something on.
            let at = ends.kill_at(child, 0.3 + 0.7 * f64::from(step) / 19.0);
            match state.machines()[0].1.as_str() {
                "Running" => assert_eq!(state.pids().len(), 1),
                "Suspended" => {
                    assert_eq!(state.pids(), [0; 0]);
                    state.ok(&["start", "web"]);
                }
                other => panic!("{signal:?} of a resume at {at:?} left it {other}: {}", state.ok(&["inspect", "web"])),
            }
            assert_eq!(state.ok(&["exec", "web", "--", "cat", "/dev/shm/word"]), "word\n");
        }
        let ended = ends.killed;
        assert!(ended >= 8, "only {ended} of 20 resumes were ended by {signal:?} in time");
    }
    state.ok(&["cleanup", "--all", "--grace", "0"]);
    state.is_clean();
}

/// Whoever was to make them was killed between taking the lock and anything else.
#[test]
fn locks_of_machines_that_never_were_are_gone_with_the_next_look_and_others_stay() {
    let Some(state) = State::new() else { return };
    state.ok(&["clone", "web"]);
    let lock = |name: &str| state.path().join("vms/.locks").join(name);
    let theirs = lock("web").exists();
    std::fs::write(lock("ghost"), "").unwrap();
    std::fs::write(lock("killed"), "-").unwrap();
    state.ok(&["ls"]);
    assert!(!lock("ghost").exists() && !lock("killed").exists());
    assert_eq!(lock("web").exists(), theirs);
    // Somebody who is about to make a machine has its lock.
    let held = std::fs::File::create(lock("held")).unwrap();
    rustix::fs::flock(&held, rustix::fs::FlockOperation::LockExclusive).unwrap();
    state.ok(&["ls"]);
    assert!(lock("held").exists());
    drop(held);
    state.ok(&["cleanup", "--all", "--grace", "0"]);
    state.is_clean();
}

#[test]
fn a_fork_that_is_killed_leaves_the_original_running_and_no_half_copies() {
    let Some(state) = State::new() else { return };
    state.ok(&["clone", "web"]);
    state.ok(&["start", "web"]);
    state.ok(&["exec", "web", "--", "sh", "-c", "echo word > /dev/shm/word"]);
    let mut kills = Spread::over(took(|| drop(state.ok(&["fork", "web", "copy", "other"]))));
    state.ok(&["cleanup", "copy", "other", "--grace", "0"]);
    for step in 0..12 {
        let child = state
            .command(&["fork", "web", "copy", "other"])
            .stderr(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        kills.kill_at(child, f64::from(step) / 11.0);
        for (name, found) in state.machines() {
            assert_eq!(found, "Running", "{name}, after a fork that was killed");
            assert_eq!(state.ok(&["exec", &name, "--", "cat", "/dev/shm/word"]), "word\n");
        }
        assert!(state.machines().iter().any(|(name, _)| name == "web"));
        state.ok(&["cleanup", "copy", "other", "--grace", "0"]);
        assert_eq!(state.pids().len(), 1, "only the original's process is left");
        for part in ["", ".work", ".staging", ".trash", ".locks"] {
            let place = state.path().join("vms/.snapshots").join(part);
            let left = std::fs::read_dir(&place).into_iter().flatten().flatten().map(|entry| entry.file_name());
            let left: Vec<_> = left.filter(|name| !name.to_string_lossy().starts_with('.')).collect();
            assert!(left.is_empty(), "{part}: what copies went on from is left: {left:?}");
        }
    }
    let killed = kills.killed;
    assert!(killed >= 6, "only {killed} of 12 forks were killed in time");
    state.ok(&["cleanup", "--all", "--grace", "0"]);
    state.is_clean();
}

#[test]
fn other_operations_that_are_killed_leave_a_settled_machine() {
    let Some(state) = State::new() else { return };
    state.ok(&["clone", "web"]);
    let start = took(|| drop(state.ok(&["start", "web"])));
    let resume = {
        state.ok(&["suspend", "web"]);
        took(|| drop(state.ok(&["start", "web"])))
    };
    state.ok(&["stop", "--grace", "0", "web"]);
    for step in 0..6 {
        let part = f64::from(step) / 5.0;
        kill_after(state.command(&["start", "web"]).stderr(Stdio::null()).spawn().unwrap(), start.mul_f64(part));
        match state.machines()[0].1.as_str() {
            "Stopped" => {
                assert_eq!(state.pids(), [0; 0]);
                state.ok(&["start", "web"]);
            }
            "Running" => assert_eq!(state.pids().len(), 1),
            other => panic!("a start that was killed left it {other}"),
        }
        state.ok(&["suspend", "web"]);
        kill_after(state.command(&["start", "web"]).stderr(Stdio::null()).spawn().unwrap(), resume.mul_f64(part));
        match state.machines()[0].1.as_str() {
            "Suspended" => drop(state.ok(&["start", "web"])),
            "Running" => {}
            other => panic!("a resume that was killed left it {other}"),
        }
        assert_eq!(state.ok(&["exec", "web", "--", "echo", "up"]), "up\n");
        kill_after(state.command(&["stop", "web"]).spawn().unwrap(), Duration::from_millis(20 * step as u64));
        state.ok(&["cleanup", "web", "--grace", "0"]);
        state.is_clean();
        kill_after(state.command(&["clone", "web"]).spawn().unwrap(), Duration::from_millis(2 * step as u64));
        match state.machines().first() {
            Some((_, settled)) => assert_eq!(settled, "Stopped"),
            None => drop(state.ok(&["clone", "web"])),
        }
    }
    state.ok(&["delete", "web"]);
    state.is_clean();
}

#[test]
fn a_qemu_that_is_killed_while_it_is_suspended_is_an_error_and_a_stopped_machine() {
    let Some(state) = State::new() else { return };
    state.ok(&["clone", "web"]);
    for step in 0..8 {
        state.ok(&["start", "web"]);
        let mut suspend = state.command(&["suspend", "web"]).stderr(Stdio::null()).spawn().unwrap();
        std::thread::sleep(Duration::from_millis(6 * step));
        for pid in state.pids() {
            let _ = std::process::Command::new("kill").args(["-9", &pid.to_string()]).stderr(Stdio::null()).status();
        }
        let code = suspend.wait().unwrap().code();
        match state.machines()[0].1.as_str() {
            "Stopped" => assert!(matches!(code, Some(1 | 4)), "{code:?}"),
            "Suspended" => assert_eq!(code, Some(0)),
            other => panic!("it is {other}, and suspending ended with {code:?}"),
        }
        assert_eq!(state.pids(), [0; 0]);
    }
    state.ok(&["cleanup", "--all", "--grace", "0"]);
    state.is_clean();
}

/// A fork's first suspend writes all of its memory: there is time to kill its QEMU while it does.
#[test]
fn a_machine_that_ended_in_a_suspend_says_why_until_it_is_started() {
    let Some(state) = State::new() else { return };
    let ended = (0..5).any(|_| {
        state.ok(&["clone", "web"]);
        state.ok(&["start", "web"]);
        let suspend = state.command(&["suspend", "web"]).stderr(Stdio::piped()).spawn().unwrap();
        eventually(|| state.path().join("vms/web/memory.apart").exists());
        for pid in state.pids() {
            kill_process(Pid::from_raw(pid.cast_signed()).unwrap(), Signal::KILL).unwrap();
        }
        let output = suspend.wait_with_output().unwrap();
        if output.status.success() {
            // It was done when we came to look.
            state.ok(&["cleanup", "web"]);
            return false;
        }
        assert_eq!(output.status.code(), Some(1), "{}", text(&output.stderr));
        true
    });
    assert!(ended, "no suspend was caught while it wrote");
    assert_eq!(state.machines(), [("web".into(), "Stopped".into())]);
    let why = "while the machine was being suspended";
    assert!(state.ok(&["inspect", "web"]).contains(why));
    let listed = state.vmkit(&["ls"]);
    assert!(text(&listed.stderr).contains(why), "{}", text(&listed.stderr));
    state.ok(&["start", "web"]);
    assert!(!state.ok(&["inspect", "web"]).contains(why));
    state.ok(&["cleanup", "--all", "--grace", "0"]);
    state.is_clean();
}

#[test]
fn a_copy_whose_maker_was_killed_when_it_was_ready_stays_and_is_a_copy_no_more() {
    let Some(state) = State::new() else { return };
    state.ok(&["clone", "web"]);
    state.ok(&["start", "web"]);
    state.ok(&["exec", "web", "--", "sh", "-c", "echo word > /dev/shm/word; echo word > /root/word"]);
    state.ok(&["fork", "web", "copy"]);
    // As if whoever started it had died before it could say that the copy is on its own.
    let fresh = state.path().join("vms/copy/fresh");
    std::fs::write(&fresh, "").unwrap();
    let start = vmkit::Action::ALL.iter().position(|action| *action == vmkit::Action::Start).unwrap();
    std::fs::File::create(state.path().join("vms/.locks/copy")).unwrap().set_len(start as u64).unwrap();
    assert_eq!(state.ok(&["exec", "copy", "--", "cat", "/dev/shm/word"]), "word\n");
    assert!(!fresh.exists());
    // What it was a copy of is kept no more: what starts again is its own disk.
    state.ok(&["stop", "copy"]);
    state.ok(&["start", "copy"]);
    assert_eq!(state.ok(&["exec", "copy", "--", "sh", "-c", "cat /root/word; ls /dev/shm"]), "word\n");
    state.ok(&["cleanup", "--all", "--grace", "0"]);
    state.is_clean();
}

#[test]
fn a_qemu_that_is_killed_is_found_stopped() {
    let Some(state) = State::new() else { return };
    state.ok(&["clone", "web"]);
    state.ok(&["start", "web"]);
    let mut exec = state.command(&["exec", "web", "--", "sleep", "1000"]).stderr(Stdio::null()).spawn().unwrap();
    std::thread::sleep(Duration::from_millis(500));
    for pid in state.pids() {
        assert!(std::process::Command::new("kill").args(["-9", &pid.to_string()]).status().unwrap().success());
    }
    let noticed = took(|| assert_eq!(exec.wait().unwrap().code(), Some(125)));
    assert!(noticed < Duration::from_secs(5), "noticed after {noticed:?}");
    assert_eq!(state.machines(), [("web".into(), "Stopped".into())]);
    state.ok(&["start", "web"]);
    state.ok(&["cleanup", "--all", "--grace", "0"]);
    state.is_clean();
}

/// QEMU answers a command whose asker has gone to whoever is there when it is done.
#[test]
fn what_somebody_asked_who_was_killed_is_not_taken_for_an_answer_to_the_next() {
    let Some(state) = State::new() else { return };
    state.ok(&["clone", "web"]);
    state.ok(&["start", "web"]);
    for _ in 0..5 {
        let asked = UnixStream::connect(state.path().join("vms/web/qmp.sock")).unwrap();
        let mut lines = BufReader::new(&asked).lines();
        lines.next().unwrap().unwrap();
        writeln!(&asked, r#"{{"execute": "qmp_capabilities", "id": 0}}"#).unwrap();
        lines.next().unwrap().unwrap();
        // Takes QEMU some milliseconds: in the middle of them it stands still, until the next one waits for its greeting.
        writeln!(&asked, r#"{{"execute": "query-qmp-schema", "id": 1}}"#).unwrap();
        std::thread::sleep(Duration::from_millis(1));
        let pid = state.pids()[0];
        signalled(pid, "-STOP");
        drop(lines);
        drop(asked);
        let suspend = state.command(&["suspend", "web"]).stderr(Stdio::piped()).spawn().unwrap();
        std::thread::sleep(Duration::from_millis(200));
        signalled(pid, "-CONT");
        let suspended = suspend.wait_with_output().unwrap();
        assert!(suspended.status.success(), "{}", text(&suspended.stderr));
        state.ok(&["start", "web"]);
        assert_eq!(state.ok(&["exec", "web", "--", "echo", "up"]), "up\n");
    }
    state.ok(&["cleanup", "--all", "--grace", "0"]);
    state.is_clean();
}

/// A QEMU that is killed as soon as a guest is to run in it.
fn killed_qemu() -> tempfile::TempDir {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir().unwrap();
    let program = format!("qemu-system-{}", std::env::consts::ARCH);
    let qemu = std::env::split_paths(&std::env::var_os("PATH").unwrap())
        .map(|dir| dir.join(&program))
        .find(|path| path.is_file())
        .unwrap();
    // Machines have a monitor; what is asked for its version has none.
    let script = format!("#!/bin/sh\ncase \"$*\" in *qmp*) kill -KILL $$;; esac\nexec {} \"$@\"\n", qemu.display());
    std::fs::write(dir.path().join(&program), script).unwrap();
    std::fs::set_permissions(dir.path().join(&program), std::fs::Permissions::from_mode(0o755)).unwrap();
    dir
}

#[test]
fn a_qemu_that_is_killed_is_said_to_be_and_what_it_was_given_is_kept() {
    let Some(state) = State::new() else { return };
    for name in ["saved", "fresh", "web"] {
        state.ok(&["clone", name]);
    }
    state.ok(&["start", "saved", "web"]);
    state.ok(&["exec", "saved", "--", "sh", "-c", "echo word > /dev/shm/word"]);
    state.ok(&["suspend", "saved"]);
    let killed = killed_qemu();
    let mut path = std::ffi::OsString::from(killed.path());
    path.push(":");
    path.push(std::env::var_os("PATH").unwrap());
    for name in ["saved", "fresh"] {
        let output = state.command(&["--json", "start", name]).env("PATH", &path).output().unwrap();
        let error: serde_json::Value = serde_json::from_slice(&output.stderr).unwrap();
        let (error, hint) = (&error["error"], error["error"]["hint"].as_str().unwrap());
        assert_eq!(error["code"], "exited", "{error}");
        assert!(error["message"].as_str().unwrap().contains("QEMU was killed"), "{error}");
        assert!(
            !hint.contains("--discard") && !hint.contains("template") && hint.contains("start it again"),
            "{error}"
        );
        state.ok(&["start", name]);
    }
    assert_eq!(state.ok(&["exec", "saved", "--", "cat", "/dev/shm/word"]), "word\n");
    // One that ends while it is being suspended, or copied.
    for verb in [&["suspend", "web"][..], &["fork", "web", "copy"]] {
        if state.machines().iter().any(|machine| *machine == ("web".into(), "Stopped".into())) {
            state.ok(&["start", "web"]);
        }
        let shown: serde_json::Value = serde_json::from_str(&state.ok(&["--json", "inspect", "web"])).unwrap();
        let pid = u32::try_from(shown["properties"]["pid"].as_u64().unwrap()).unwrap();
        common::signalled(pid, "-STOP");
        let mut args = vec!["--json"];
        args.extend(verb);
        let child = state.command(&args).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let begun =
            || match verb[0] {
                // Its lock's holder says what it does.
                "suspend" => !state.machines().contains(&("web".into(), "Running".into())),
                _ => state.path().join("vms/.snapshots/.work").read_dir().is_ok_and(|dir| {
                    dir.flatten().any(|entry| entry.file_name().to_string_lossy().starts_with("fork-"))
                }),
            };
        common::eventually(begun);
        common::signalled(pid, "-KILL");
        let output = child.wait_with_output().unwrap();
        let error: serde_json::Value = serde_json::from_slice(&output.stderr).unwrap();
        assert_eq!(error["error"]["code"], "exited", "{error}");
    }
    state.ok(&["cleanup", "--all", "--grace", "0"]);
    state.is_clean();
}
