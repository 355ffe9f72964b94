//! Ctrl-C and its kin: the exit code says so and no error does, and what was done all the same is listed.

mod common;

use std::fs;
use std::process::{Child, Output, Stdio};

use common::{State, eventually, signalled, text};

fn begun(state: &State, args: &[&str]) -> Child {
    state.command(args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

/// Whether a process does something of its own at an interrupt, instead of just ending.
fn listens(pid: u32) -> bool {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let caught = status.lines().find_map(|line| line.strip_prefix("SigCgt:")).unwrap().trim();
    u64::from_str_radix(caught, 16).unwrap() & (1 << (2 - 1)) != 0
}

#[test]
fn an_image_that_a_signal_gives_up_is_no_error() {
    // Where images can be made, one is to be made in a store of its own.
    let Some(_) = State::new() else { return };
    let state = State::empty();
    fs::create_dir(state.path().join("images")).unwrap();
    // Somebody else builds: whoever wants to waits, for as long as it takes.
    let lock = fs::File::create(state.path().join("images/lock")).unwrap();
    rustix::fs::flock(&lock, rustix::fs::FlockOperation::LockExclusive).unwrap();
    for (signal, code) in [("-INT", 130), ("-TERM", 143), ("-HUP", 129)] {
        for args in [&["image", "build", "base"][..], &["--json", "image", "build", "base"], &["template", "build"]] {
            let child = begun(&state, args);
            eventually(|| listens(child.id()));
            signalled(child.id(), signal);
            let output = child.wait_with_output().unwrap();
            let said = text(&output.stderr);
            assert_eq!((output.status.code(), text(&output.stdout)), (Some(code), String::new()), "{args:?}: {said}");
            assert!(!said.contains("error"), "{args:?}: {said}");
        }
    }
}

/// Every machine that is listed as done, and in which state.
fn listed(output: &Output) -> Vec<(String, String)> {
    let done: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let word = |value: &serde_json::Value| value.as_str().unwrap().to_owned();
    done.as_array().unwrap().iter().map(|vm| (word(&vm["id"]), word(&vm["state"]))).collect()
}

#[test]
fn what_a_signal_finds_under_way_is_done_to_its_end_and_listed() {
    let Some(state) = State::new() else { return };
    let machines = |states: [&str; 3]| {
        let named = ["one", "two", "three"].into_iter().zip(states);
        named.map(|(name, state)| (name.to_owned(), state.to_owned())).collect::<Vec<_>>()
    };
    for (verb, while_in, done) in [
        (&["suspend"][..], "Suspending", "Suspended"),
        (&["stop"], "Stopping", "Stopped"),
        (&["cleanup"], "Stopping", "Deleted"),
    ] {
        for json in [&["--json"][..], &[]] {
            for name in ["one", "two", "three"] {
                state.ok(&["clone", name]);
            }
            state.ok(&["start", "one", "two", "three"]);
            let shown: serde_json::Value = serde_json::from_str(&state.ok(&["--json", "inspect", "two"])).unwrap();
            let two = u32::try_from(shown["properties"]["pid"].as_u64().unwrap()).unwrap();
            // It stands still in the middle of the second.
            signalled(two, "-STOP");
            let child = begun(&state, &[json, verb, &["one", "two", "three"]].concat());
            eventually(|| state.machines().contains(&("two".into(), while_in.into())));
            signalled(child.id(), "-INT");
            signalled(two, "-CONT");
            let output = child.wait_with_output().unwrap();
            assert_eq!(output.status.code(), Some(130), "{verb:?}: {}", text(&output.stderr));
            let expected = machines([done, done, "Running"]);
            match json {
                [] => assert_eq!(text(&output.stdout), "one\ntwo\n", "{verb:?}"),
                _ => assert_eq!(listed(&output), expected[..2], "{verb:?}"),
            }
            let mut found = state.machines();
            found.sort();
            let mut there: Vec<_> = expected.into_iter().filter(|(_, state)| state != "Deleted").collect();
            there.sort();
            assert_eq!(found, there, "{verb:?}");
            state.ok(&["cleanup", "--all", "--grace", "0"]);
        }
    }
    state.is_clean();
}

#[test]
fn a_start_is_listed_when_there_was_no_way_back() {
    let Some(state) = State::new() else { return };
    state.ok(&["clone", "web"]);
    state.ok(&["start", "web"]);
    state.ok(&["suspend", "web"]);
    let start = std::time::Instant::now();
    state.ok(&["start", "web"]);
    let whole = start.elapsed();
    for step in 0..16 {
        if state.machines()[0].1 == "Running" {
            state.ok(&["suspend", "web"]);
        }
        let child = begun(&state, &["--json", "start", "web"]);
        // Wherever that is: what is said has to be what is found.
        std::thread::sleep(whole.mul_f64(f64::from(step) / 16.0));
        signalled(child.id(), "-INT");
        let output = child.wait_with_output().unwrap();
        let running: Vec<_> = state.machines().into_iter().filter(|(_, state)| state == "Running").collect();
        match output.status.code() {
            // It had not begun to listen.
            None => assert_eq!(running, []),
            _ => assert_eq!(listed(&output), running, "{output:?}"),
        }
    }
    state.ok(&["cleanup", "--all", "--grace", "0"]);
    state.is_clean();
}
