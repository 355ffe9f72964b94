//! Guests that hang, readers that do not read, holders that do not let go: none of them keeps anybody waiting.

mod common;

use std::io::Read;
use std::process::{Child, Stdio};
use std::time::Duration;

use common::{State, eventually, signalled, text};

/// A machine that runs, and whose processor can be taken away.
fn running(state: &State) -> u32 {
    state.ok(&["clone", "web"]);
    state.ok(&["start", "web"]);
    state.pids()[0]
}

/// Its exit code, once it has ended.
fn ended(child: &mut Child) -> Option<i32> {
    eventually(|| child.try_wait().unwrap().is_some());
    child.wait().unwrap().code()
}

#[test]
fn a_guest_that_hangs_is_given_up_at_the_timeout() {
    let Some(state) = State::new() else { return };
    let qemu = running(&state);
    signalled(qemu, "-STOP");
    // It never starts the command.
    assert_eq!(state.vmkit(&["exec", "--timeout", "1s", "web", "--", "true"]).status.code(), Some(124));
    signalled(qemu, "-CONT");
    // It has started the command, and takes neither its input nor the signal that is to end it.
    let mut child = state
        .command(&["exec", "-i", "--timeout", "4s", "web", "--", "sh", "-c", "echo up; sleep 1000"])
        .stdin(Stdio::from(std::fs::File::open("/dev/zero").unwrap()))
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut up = [0; 3];
    child.stdout.as_mut().unwrap().read_exact(&mut up).unwrap();
    signalled(qemu, "-STOP");
    assert_eq!(ended(&mut child), Some(124));
    signalled(qemu, "-CONT");
    state.ok(&["cleanup", "--all", "--grace", "0"]);
    state.is_clean();
}

#[test]
fn a_guest_that_hangs_keeps_nobody_from_ending() {
    let Some(state) = State::new() else { return };
    let qemu = running(&state);
    for (input, signals) in [(Stdio::null(), 1), (Stdio::from(std::fs::File::open("/dev/zero").unwrap()), 2)] {
        let mut child = state
            .command(&["exec", "-i", "web", "--", "sh", "-c", "echo up; sleep 1000"])
            .stdin(input)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut up = [0; 3];
        child.stdout.as_mut().unwrap().read_exact(&mut up).unwrap();
        signalled(qemu, "-STOP");
        for _ in 0..signals {
            signalled(child.id(), "-INT");
            std::thread::sleep(Duration::from_millis(300));
        }
        assert_eq!(ended(&mut child), Some(130));
        signalled(qemu, "-CONT");
        // With its line gone, the command goes too.
        eventually(|| state.vmkit(&["exec", "web", "--", "pidof", "sleep"]).status.code() == Some(1));
    }
    state.ok(&["cleanup", "--all", "--grace", "0"]);
    state.is_clean();
}

#[test]
fn a_timeout_covers_output_that_nobody_takes() {
    let Some(state) = State::new() else { return };
    running(&state);
    // One that goes on for ever, and one that ends while its output is on the way.
    for script in ["exec yes", "head -c 300000 /dev/zero"] {
        let mut child = state
            .command(&["exec", "--timeout", "1s", "web", "--", "sh", "-c", script])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        assert_eq!(ended(&mut child), Some(124), "{script}");
    }
    // What is taken arrives, however late.
    let mut child = state
        .command(&["exec", "--timeout", "1s", "web", "--", "sh", "-c", "head -c 300000 /dev/zero; exec sleep 1000"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut received = Vec::new();
    child.stdout.take().unwrap().read_to_end(&mut received).unwrap();
    assert_eq!((ended(&mut child), received.len()), (Some(124), 300_000));
    state.ok(&["cleanup", "--all", "--grace", "0"]);
    state.is_clean();
}

#[test]
fn a_standard_error_that_cannot_be_written_changes_nothing_else() {
    let Some(state) = State::new() else { return };
    let full = || Stdio::from(std::fs::File::options().write(true).open("/dev/full").unwrap());
    for (code, args) in [
        (3, &["start", "nobody"][..]),
        (3, &["--json", "start", "nobody"]),
        (2, &["dance"]),
        (0, &["--json", "run", "--timings", "--", "true"]),
        (0, &["run", "--keep", "--name", "kept", "--", "true"]),
    ] {
        let output = state.command(args).stderr(full()).output().unwrap();
        assert_eq!(output.status.code(), Some(code), "{args:?}: {}", text(&output.stdout));
    }
    assert_eq!(state.machines(), [("kept".into(), "Running".into())]);
    state.ok(&["cleanup", "--all", "--grace", "0"]);
    state.is_clean();
}

#[test]
fn a_reader_that_stands_still_keeps_nobody_from_ending_it() {
    let Some(state) = State::new() else { return };
    state.ok(&["clone", "web"]);
    state.ok(&["start", "web"]);
    let script = "head -c 300000 /dev/zero; touch /ended";
    let mut child = state.command(&["exec", "web", "--", "sh", "-c", script]).stdout(Stdio::piped()).spawn().unwrap();
    // The pipe is full, nobody reads it, and the command has ended.
    eventually(|| state.vmkit(&["exec", "web", "--", "test", "-e", "/ended"]).status.success());
    std::thread::sleep(Duration::from_secs(1));
    assert!(child.try_wait().unwrap().is_none(), "what was not read yet is lost");
    signalled(child.id(), "-TERM");
    assert_eq!(child.wait().unwrap().code(), Some(143));
    state.ok(&["cleanup", "--all", "--grace", "0"]);
    state.is_clean();
}

#[test]
fn a_holder_that_stands_still_keeps_nobody_from_ending() {
    let Some(state) = State::new() else { return };
    state.ok(&["clone", "web"]);
    let mut holder = state.command(&["start", "web"]).stderr(Stdio::null()).spawn().unwrap();
    eventually(|| !state.pids().is_empty());
    signalled(holder.id(), "-STOP");
    for signal in ["-TERM", "-INT"] {
        let mut waiting = state.command(&["stop", "web"]).spawn().unwrap();
        std::thread::sleep(Duration::from_millis(500));
        assert!(waiting.try_wait().unwrap().is_none(), "it did not wait for the lock");
        signalled(waiting.id(), signal);
        eventually(|| waiting.try_wait().unwrap().is_some());
    }
    state.ok(&["stop", "--force", "web"]);
    assert_eq!(state.pids(), [0; 0]);
    signalled(holder.id(), "-KILL");
    holder.wait().unwrap();
    assert_eq!(state.machines(), [("web".into(), "Stopped".into())]);
    state.ok(&["delete", "web"]);
    state.is_clean();
}

/// A minute: that long it is hoped for.
#[test]
fn a_machine_that_had_to_be_ended_says_why() {
    let Some(state) = State::new() else { return };
    let qemu = running(&state);
    signalled(qemu, "-STOP");
    let mut suspend = state.command(&["suspend", "web"]).stderr(Stdio::null()).spawn().unwrap();
    eventually(|| state.ok(&["ls"]).contains("Suspending"));
    suspend.kill().unwrap();
    suspend.wait().unwrap();
    assert_eq!(state.machines(), [("web".into(), "Stopped".into())]);
    assert_eq!(state.pids(), [0; 0]);
    let inspected = state.ok(&["inspect", "web"]);
    assert!(inspected.contains("a suspend of it was cut off and could not be called off"), "{inspected}");
    state.ok(&["start", "web"]);
    let inspected = state.ok(&["inspect", "web"]);
    assert!(!inspected.contains("problem"), "{inspected}");
    state.ok(&["cleanup", "--all", "--grace", "0"]);
    state.is_clean();
}
