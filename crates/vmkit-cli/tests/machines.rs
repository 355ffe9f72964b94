//! Commands on real machines, as a user gives them.

mod common;

use std::io::{Read, Write};
use std::process::Stdio;

use common::{State, eventually, signalled, text};

#[test]
fn run_gives_output_and_exit_code_and_leaves_nothing() {
    let Some(state) = State::new() else { return };
    let output = state.vmkit(&[
        "run",
        "-e",
        "WORD=a b",
        "-w",
        "/tmp",
        "--",
        "sh",
        "-c",
        "echo $WORD in $PWD; echo oops >&2; exit 7",
    ]);
    assert_eq!(output.status.code(), Some(7), "{}", text(&output.stderr));
    assert_eq!((text(&output.stdout), text(&output.stderr)), ("a b in /tmp\n".into(), "oops\n".into()));
    state.is_clean();
}

#[test]
fn run_tells_how_a_command_ended() {
    let Some(state) = State::new() else { return };
    for (code, args) in [(137, &["sh", "-c", "kill -9 $$"][..]), (127, &["no-such-program"]), (126, &["/etc/passwd"])] {
        let mut all = vec!["run", "--"];
        all.extend(args);
        assert_eq!(state.vmkit(&all).status.code(), Some(code), "{args:?}");
    }
    assert_eq!(state.vmkit(&["run", "--timeout", "1s", "--", "sleep", "1000"]).status.code(), Some(124));
    state.is_clean();
}

#[test]
fn binary_data_passes_through_a_pipe() {
    let Some(state) = State::new() else { return };
    let sent: Vec<u8> = (0..3_000_000u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let mut child =
        state.command(&["run", "-i", "--", "cat"]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let feeder = std::thread::spawn({
        let sent = sent.clone();
        move || stdin.write_all(&sent).unwrap()
    });
    let mut received = Vec::new();
    child.stdout.take().unwrap().read_to_end(&mut received).unwrap();
    feeder.join().unwrap();
    assert!(child.wait().unwrap().success());
    assert!(received == sent, "{} bytes of {} came back", received.len(), sent.len());
    state.is_clean();
}

#[test]
fn a_reader_that_goes_away_ends_the_command() {
    let Some(state) = State::new() else { return };
    let mut child = state.command(&["run", "--", "yes"]).stdout(Stdio::piped()).spawn().unwrap();
    let mut first = [0; 4];
    child.stdout.as_mut().unwrap().read_exact(&mut first).unwrap();
    assert_eq!(&first, b"y\ny\n");
    drop(child.stdout.take());
    // As in a shell's pipeline: by the signal of a broken pipe, or the error that is given instead.
    assert!(matches!(child.wait().unwrap().code(), Some(141 | 1)));
    state.is_clean();
}

#[test]
fn signals_end_the_command_and_delete_the_machine() {
    let Some(state) = State::new() else { return };
    for (signal, code) in [("-INT", 130), ("-TERM", 143)] {
        let mut child =
            state.command(&["run", "--", "sh", "-c", "echo up; sleep 1000"]).stdout(Stdio::piped()).spawn().unwrap();
        let mut up = [0; 3];
        child.stdout.as_mut().unwrap().read_exact(&mut up).unwrap();
        signalled(child.id(), signal);
        assert_eq!(child.wait().unwrap().code(), Some(code));
        state.is_clean();
        // While it starts.
        let mut child = state.command(&["run", "--", "true"]).spawn().unwrap();
        eventually(|| !state.pids().is_empty());
        signalled(child.id(), signal);
        assert_eq!(child.wait().unwrap().code(), Some(code));
        state.is_clean();
    }
}

#[test]
fn the_lifecycle_across_invocations() {
    let Some(state) = State::new() else { return };
    state.ok(&["clone", "web", "--memory", "192M", "--cpus", "2", "--label", "role=test"]);
    assert_eq!(state.machines(), [("web".into(), "Stopped".into())]);
    assert_eq!(state.fails(1, &["clone", "web"])["code"], "already-exists");
    assert_eq!(state.fails(4, &["suspend", "web"])["code"], "illegal-request");
    assert_eq!(state.fails(125, &["exec", "web", "--", "true"])["code"], "not-running");
    state.ok(&["start", "web"]);
    assert_eq!(state.fails(4, &["start", "web"])["state"], "Running");
    assert_eq!(state.fails(4, &["delete", "web"])["code"], "illegal-request");
    assert_eq!(state.ok(&["exec", "web", "--", "nproc"]), "2\n");
    // What runs in the background and lets go of its streams lives on. It adds to its file: one that is written anew is
    // empty for a moment, and a reader sees that.
    let count = "while :; do echo >> /dev/shm/n; sleep 0.05; done";
    state.ok(&["exec", "web", "--", "sh", "-c", &format!("({count}) >/dev/null 2>&1 & sleep 0.5")]);
    let number = || state.ok(&["exec", "web", "--", "sh", "-c", "wc -l < /dev/shm/n"]).trim().parse::<u64>().unwrap();
    let before = number();
    state.ok(&["suspend", "web"]);
    assert_eq!(state.pids(), [0; 0]);
    assert_eq!(state.machines(), [("web".into(), "Suspended".into())]);
    state.ok(&["suspend", "web"]);
    state.ok(&["start", "web"]);
    let after = number();
    assert!(after >= before, "{before}, then {after}");
    eventually(|| number() > after);

    let inspected: serde_json::Value = serde_json::from_str(&state.ok(&["inspect", "web", "--json"])).unwrap();
    assert_eq!(inspected["state"], "Running");
    assert_eq!(inspected["properties"]["pid"], state.pids()[0]);
    assert_eq!(inspected["spec"]["labels"]["role"], "test");
    assert!(state.ok(&["ls"]).contains("web"));
    assert!(state.ok(&["console", "web"]).contains("vmkit-agent"));
    assert_eq!(state.ok(&["wait", "web", "running"]), "web Running\n");
    assert_eq!(state.fails(5, &["wait", "web", "Stopped", "--timeout", "0.2"])["state"], "Running");

    state.ok(&["stop", "web"]);
    // A boot that took too long is taken back before anybody is told.
    state.fails(5, &["--no-template", "start", "web", "--timeout", "0.05"]);
    assert_eq!((state.pids(), state.machines()[0].1.as_str()), (vec![], "Stopped"));
    state.ok(&["stop", "web"]);
    assert!(state.fails(125, &["exec", "web", "--", "true"])["hint"].as_str().unwrap().contains("start"));
    state.ok(&["delete", "web"]);
    assert_eq!(state.fails(3, &["delete", "web"])["code"], "not-found");
    state.ok(&["cleanup", "web"]);
    state.ok(&["wait", "web", "Deleted"]);
    state.is_clean();
}

#[test]
fn two_invocations_on_one_machine() {
    let Some(state) = State::new() else { return };
    state.ok(&["clone", "web"]);
    let starts: Vec<_> =
        (0..2).map(|_| state.command(&["start", "web"]).stderr(Stdio::null()).spawn().unwrap()).collect();
    let mut codes: Vec<_> = starts.into_iter().map(|mut start| start.wait().unwrap().code().unwrap()).collect();
    codes.sort_unstable();
    assert_eq!(codes, [0, 4], "one of two starts wins, the other is judged by what it left");
    let stops: Vec<_> = (0..2).map(|_| state.command(&["stop", "web"]).spawn().unwrap()).collect();
    for mut stop in stops {
        assert!(stop.wait().unwrap().success());
    }
    // Start ∥ Stop: the stop waits, then stops. Others are told that it is starting.
    let mut start = state.command(&["start", "web"]).spawn().unwrap();
    eventually(|| state.machines() == [("web".into(), "Starting".into())]);
    state.ok(&["stop", "web"]);
    assert!(start.wait().unwrap().success());
    assert_eq!(state.machines(), [("web".into(), "Stopped".into())]);
    // A forced stop passes the queue.
    let mut start = state.command(&["start", "web"]).stderr(Stdio::null()).spawn().unwrap();
    eventually(|| !state.pids().is_empty());
    state.ok(&["stop", "--force", "web"]);
    assert_eq!(start.wait().unwrap().code(), Some(1));
    state.ok(&["cleanup", "--all"]);
    state.is_clean();
}

#[test]
fn what_a_command_leaves_in_the_background_keeps_nobody_waiting() {
    let Some(state) = State::new() else { return };
    for script in ["sleep 1000 & echo said", "yes & echo said"] {
        let child = state.command(&["run", "--", "sh", "-c", script]).stdout(Stdio::piped()).spawn().unwrap();
        let output = child.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(0));
        assert!(text(&output.stdout).contains("said\n"));
        state.is_clean();
    }
}

#[test]
fn a_guest_that_ends_itself_is_told_with_its_last_words() {
    let Some(state) = State::new() else { return };
    for (script, word) in [("poweroff -f", "Power down"), ("echo c > /proc/sysrq-trigger", "panic")] {
        let error = state.fails(125, &["run", "--", "sh", "-c", script]);
        assert_eq!(error["code"], "not-running");
        assert!(error["details"].as_str().unwrap().contains(word), "{error}");
        state.is_clean();
    }
}

#[test]
fn a_timeout_ends_what_has_left_the_process_group_too() {
    let Some(state) = State::new() else { return };
    state.ok(&["run", "--keep", "--name", "web", "--", "true"]);
    let script = "setsid sh -c 'echo up; sleep 1000; true' & wait";
    let output = state.vmkit(&["exec", "--timeout", "2s", "web", "--", "sh", "-c", script]);
    assert_eq!((output.status.code(), text(&output.stdout)), (Some(124), "up\n".into()));
    eventually(|| state.vmkit(&["exec", "web", "--", "pidof", "sleep"]).status.code() == Some(1));
    state.ok(&["cleanup", "--all", "--grace", "0"]);
    state.is_clean();
}

#[test]
fn the_name_of_a_kept_machine_is_told_to_programs_too() {
    let Some(state) = State::new() else { return };
    let output = state.vmkit(&["--json", "run", "--keep", "--", "true"]);
    let told: serde_json::Value = serde_json::from_slice(&output.stderr).unwrap();
    assert_eq!(state.machines(), [(told["kept"].as_str().unwrap().to_owned(), "Running".into())]);
    let cleaned: serde_json::Value = serde_json::from_str(&state.ok(&["--json", "cleanup", "--all"])).unwrap();
    assert_eq!(cleaned.as_array().unwrap().len(), 1);
    assert_eq!(state.ok(&["--json", "cleanup", "--all"]).trim(), "[]");
    state.is_clean();
}

#[test]
fn a_kept_machine_is_kept() {
    let Some(state) = State::new() else { return };
    state.ok(&["run", "--keep", "--name", "kept", "--", "sh", "-c", "echo note > /note"]);
    assert_eq!(state.machines(), [("kept".into(), "Running".into())]);
    assert_eq!(state.ok(&["exec", "kept", "--", "cat", "/note"]), "note\n");
    let error = state.fails(125, &["run", "--name", "kept", "--", "true"]);
    assert_eq!(error["code"], "already-exists");
    assert_eq!(
        state.ok(&["exec", "kept", "--", "cat", "/note"]),
        "note\n",
        "the machine that had the name was touched"
    );
    state.ok(&["cleanup", "--all", "--grace", "0"]);
    state.is_clean();
}
