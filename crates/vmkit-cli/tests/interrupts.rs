//! Ctrl-C and its kin: the exit code says so and no error does, and what was done all the same is listed.

mod common;

use std::fs;
use std::process::{Child, Stdio};

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
