//! Machines that had a rough time: what happened to them is said, and there is a way on.

mod common;

use std::fs;
use std::process::Stdio;
use std::time::Duration;

use common::{State, eventually, signalled, text};

fn state_of(state: &State, name: &str) -> String {
    state.machines().into_iter().find(|(id, _)| id == name).map(|(_, state)| state).unwrap_or_default()
}

#[test]
fn a_guest_that_crashed_starts_again() {
    let Some(state) = State::new() else { return };
    state.ok(&["clone", "web"]);
    state.ok(&["start", "web"]);
    // What a program says on the console is not what a kernel says.
    let script = "echo 'Kernel panic - not syncing: not really' >/dev/console; sync; echo c > /proc/sysrq-trigger";
    let error = state.fails(125, &["exec", "web", "--", "sh", "-c", script]);
    assert_eq!((error["code"].as_str(), error["state"].as_str()), (Some("not-running"), None), "{error}");
    assert!(error["message"].as_str().unwrap().contains("ended while the command ran"), "{error}");
    eventually(|| state_of(&state, "web") == "Stopped");
    state.ok(&["start", "web"]);
    assert_eq!(state.ok(&["exec", "web", "--", "echo", "again"]), "again\n");
    state.ok(&["cleanup", "--all", "--grace", "0"]);
    state.is_clean();
}

#[test]
fn what_a_command_leaves_behind_keeps_nobody_waiting() {
    let Some(state) = State::new() else { return };
    state.ok(&["clone", "web"]);
    state.ok(&["start", "web"]);
    for pause in ["0.3", "0.01"] {
        let script = format!("(while :; do echo tick; sleep {pause}; done) & echo hi; exit 3");
        let mut child =
            state.command(&["exec", "web", "--", "sh", "-c", &script]).stdout(Stdio::piped()).spawn().unwrap();
        // Its output is taken, and it never ends: without a limit this would not either.
        let said = std::thread::spawn({
            let mut stdout = child.stdout.take().unwrap();
            move || std::io::copy(&mut stdout, &mut std::io::sink())
        });
        eventually(|| child.try_wait().unwrap().is_some());
        assert_eq!(child.wait().unwrap().code(), Some(3));
        assert!(said.join().unwrap().unwrap() >= 3);
    }
    // Input that cannot be read is not an input that is empty.
    let dir = Stdio::from(fs::File::open("/").unwrap());
    let output = state.command(&["exec", "-i", "web", "--", "wc", "-c"]).stdin(dir).output().unwrap();
    assert_eq!((output.status.code(), text(&output.stdout).as_str()), (Some(125), ""), "{}", text(&output.stderr));
    assert!(text(&output.stderr).contains("standard input cannot be read"));
    state.ok(&["cleanup", "--all", "--grace", "0"]);
    state.is_clean();
}

#[test]
fn a_process_without_a_record_is_found_and_ended() {
    let Some(state) = State::new() else { return };
    for damage in [Some("{\"x"), None] {
        state.ok(&["clone", "web"]);
        state.ok(&["start", "web"]);
        let record = state.path().join("vms/web/run.json");
        match damage {
            Some(text) => fs::write(&record, text).unwrap(),
            None => fs::remove_file(&record).unwrap(),
        }
        assert_eq!(state_of(&state, "web"), "ErrorUnknown", "{damage:?}");
        assert_eq!(state.fails(4, &["start", "web"])["code"], "illegal-request");
        assert_eq!(state.pids().len(), 1);
        state.ok(&["cleanup", "web"]);
        state.is_clean();
    }
}

#[test]
fn a_machine_that_cannot_go_on_boots_from_its_disk() {
    let Some(state) = State::new() else { return };
    state.ok(&["clone", "web"]);
    for damage in ["state", "memory"] {
        state.ok(&["start", "web"]);
        state.ok(&["exec", "web", "--", "sh", "-c", &format!("echo {damage} >> /kept; sync")]);
        state.ok(&["suspend", "web"]);
        let dir = state.path().join("vms/web");
        // What a fork saves for the first time is not called that yet.
        let saved = if dir.join("state").exists() { damage.to_owned() } else { format!("{damage}.apart") };
        fs::File::options().write(true).open(dir.join(saved)).unwrap().set_len(100).unwrap();
        let error = state.fails(1, &["start", "web"]);
        assert!(error["hint"].as_str().unwrap().contains("--discard"), "{error}");
        assert_eq!(state_of(&state, "web"), "Suspended");
        state.ok(&["start", "--discard", "web"]);
        assert!(state.ok(&["exec", "web", "--", "cat", "/kept"]).ends_with(&format!("{damage}\n")));
        // Nothing saved: nothing given up.
        state.ok(&["suspend", "web"]);
        fs::remove_file(dir.join("memory")).unwrap();
        assert_eq!(state_of(&state, "web"), "ErrorUnknown");
        state.ok(&["start", "--discard", "web"]);
        state.ok(&["stop", "web"]);
    }
    assert_eq!(state.fails(3, &["start", "--discard", "nobody"])["code"], "not-found");
    state.ok(&["cleanup", "--all", "--grace", "0"]);
    state.is_clean();
}

#[test]
fn a_short_command_ends_with_who_asked_for_it() {
    let Some(state) = State::new() else { return };
    state.ok(&["clone", "web"]);
    state.ok(&["start", "web"]);
    // Too short to be told of when its time is over, or its host is gone; nobody else says anything to the guest meanwhile.
    let late = |name: &str| format!("sleep 1; echo done > /dev/shm/{name}");
    let mut host = state.command(&["exec", "web", "--", "sh", "-c", &late("killed")]).spawn().unwrap();
    std::thread::sleep(Duration::from_millis(100));
    host.kill().unwrap();
    host.wait().unwrap();
    std::thread::sleep(Duration::from_secs(3));
    let timed =
        state.command(&["exec", "--timeout", "100ms", "web", "--", "sh", "-c", &late("timed")]).output().unwrap();
    assert_eq!(timed.status.code(), Some(124), "{timed:?}");
    std::thread::sleep(Duration::from_secs(3));
    assert_eq!(state.ok(&["exec", "web", "--", "ls", "/dev/shm"]), "", "a command outlived who asked for it");
    state.ok(&["cleanup", "--all", "--grace", "0"]);
    state.is_clean();
}

#[test]
fn output_that_was_lost_with_its_machine_is_no_success() {
    let Some(state) = State::new() else { return };
    state.ok(&["clone", "web"]);
    state.ok(&["start", "web"]);
    // More than is on the way when nobody reads, but for what the guest itself can hold: it ends.
    let script = "head -c 310000 /dev/zero; echo over > /dev/shm/over";
    let mut command = state.command(&["exec", "web", "--", "sh", "-c", script]);
    let exec = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    eventually(|| state.ok(&["exec", "web", "--", "ls", "/dev/shm"]).contains("over"));
    state.ok(&["stop", "--force", "web"]);
    let output = exec.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(125), "{} bytes, {}", output.stdout.len(), text(&output.stderr));
    assert!(output.stdout.len() < 310_000 && text(&output.stderr).contains("next: "), "{}", text(&output.stderr));
    state.ok(&["cleanup", "--all", "--grace", "0"]);
    state.is_clean();
}

#[test]
fn a_suspend_that_cannot_begin_changes_nothing() {
    let Some(state) = State::new() else { return };
    state.ok(&["clone", "web"]);
    state.ok(&["start", "web"]);
    let qemu = state.pids()[0];
    signalled(qemu, "-STOP");
    let error = state.fails(1, &["suspend", "web"]);
    assert!(error["message"].as_str().unwrap().contains("nothing was changed"), "{error}");
    signalled(qemu, "-CONT");
    assert_eq!(state_of(&state, "web"), "Running");
    assert_eq!(state.ok(&["exec", "web", "--", "echo", "still here"]), "still here\n");
    state.ok(&["cleanup", "--all", "--grace", "0"]);
    state.is_clean();
}

#[test]
fn a_state_directory_without_a_name_is_no_other() {
    let state = State::empty();
    assert_eq!(state.fails(2, &["--state-dir", "", "ls"])["code"], "invalid-argument");
}

#[test]
fn a_machine_whose_saved_memory_is_gone_can_be_booted_from_its_disk() {
    let Some(state) = State::new() else { return };
    // The second one's has been in a file of its own before: both are missed.
    for times in [1, 2] {
        state.ok(&["clone", "web"]);
        for _ in 0..times {
            state.ok(&["start", "web"]);
            state.ok(&["exec", "web", "--", "sh", "-c", "echo kept > /kept; sync"]);
            state.ok(&["suspend", "web"]);
        }
        let dir = state.path().join("vms/web");
        for entry in fs::read_dir(&dir).unwrap().flatten() {
            if entry.file_name().to_string_lossy().starts_with("memory") {
                fs::remove_file(entry.path()).unwrap();
            }
        }
        let error = state.fails(4, &["start", "web"]);
        assert_eq!(error["state"], "ErrorUnknown");
        assert!(error["hint"].as_str().unwrap().contains("`vmkit start --discard web`"), "{error}");
        // Without its disk there is nothing to boot.
        fs::rename(dir.join("disk.qcow2"), dir.join("away")).unwrap();
        let error = state.fails(4, &["start", "web"]);
        assert!(!error["hint"].as_str().unwrap().contains("--discard"), "{error}");
        fs::rename(dir.join("away"), dir.join("disk.qcow2")).unwrap();
        state.ok(&["start", "--discard", "web"]);
        assert_eq!(state.ok(&["exec", "web", "--", "cat", "/kept"]), "kept\n");
        state.ok(&["cleanup", "web", "--grace", "0"]);
    }
    state.is_clean();
}
