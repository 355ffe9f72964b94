//! `vmkit template`, and what it does to machines.

mod common;

use std::fs;
use std::process::Command;

use common::{State, text};

/// The images of all tests, and templates of this test alone.
fn own_templates() -> Option<State> {
    let state = State::new()?;
    let images = state.path().join("images");
    let shared = fs::canonicalize(&images).unwrap();
    fs::remove_file(&images).unwrap();
    fs::create_dir(&images).unwrap();
    for entry in fs::read_dir(&shared).unwrap().flatten().filter(|entry| entry.file_name() != "templates") {
        let copied = Command::new("cp").args(["-al"]).arg(entry.path()).arg(&images).status().unwrap();
        assert!(copied.success());
    }
    Some(state)
}

fn templates(state: &State) -> Vec<serde_json::Value> {
    serde_json::from_str(&state.ok(&["template", "ls", "--json"])).unwrap()
}

fn birth(state: &State, name: &str) -> serde_json::Value {
    let inspected: serde_json::Value = serde_json::from_str(&state.ok(&["inspect", name, "--json"])).unwrap();
    inspected["properties"]["birth"].clone()
}

#[test]
fn a_template_is_made_on_first_use_and_listed() {
    let Some(state) = own_templates() else { return };
    assert_eq!(templates(&state).len(), 0);
    // Where none is wanted, none is made.
    state.ok(&["--no-template", "run", "--keep", "--name", "booted", "--", "true"]);
    assert_eq!((templates(&state).len(), birth(&state, "booted")["how"].as_str()), (0, Some("boot")));
    state.ok(&["run", "--keep", "--name", "forked", "--", "true"]);
    let made = templates(&state);
    let key = made[0]["key"].as_str().unwrap();
    assert_eq!((made.len(), made[0]["image"].as_str(), made[0]["cpus"].as_u64()), (1, Some("base"), Some(1)));
    let born = birth(&state, "forked");
    assert_eq!((born["how"].as_str(), born["template"].as_str()), (Some("fork"), Some(key)));
    assert_eq!(born["unused"], true);
    assert!(state.ok(&["inspect", "forked"]).contains("machine-id"));
    // Who is a fork's first command was made before its template rested for 200 ms, and waited in it.
    let script = "read stat < /proc/self/stat; set -- $stat; shift 21; read up idle < /proc/uptime; echo $1 $up";
    let said = state.ok(&["run", "--", "sh", "-c", script]);
    let (since, now) = said.trim().split_once(' ').unwrap();
    let waited = now.parse::<f64>().unwrap() - since.parse::<f64>().unwrap() / 100.0;
    assert!(waited >= 0.2, "a fork's first command was made for it: {said}");
    assert!(state.ok(&["template", "ls"]).contains(key));
    assert!(state.ok(&["ls"]).contains("UNIQUE"));
    // Memory that is its own from the start is a file, and suspending it writes no more than the devices.
    state.ok(&["clone", "--own-memory", "own"]);
    state.ok(&["start", "own"]);
    assert!(state.path().join("vms/own/memory").exists() && !state.path().join("vms/forked/memory").exists());
    for name in ["own", "forked"] {
        state.ok(&["suspend", name]);
    }
    assert!(state.path().join("vms/own/state").exists() && state.path().join("vms/forked/state.apart").exists());
    for name in ["own", "forked"] {
        state.ok(&["start", name]);
        assert_eq!(state.ok(&["exec", name, "--", "hostname"]), format!("{name}\n"));
    }
    // From then on it is no different.
    assert!(state.path().join("vms/forked/memory").exists());
    state.ok(&["suspend", "forked"]);
    assert!(state.path().join("vms/forked/state").exists());
    state.ok(&["start", "forked"]);
    assert_eq!(state.ok(&["template", "rm", "--all"]), format!("{key}\n"));
    assert_eq!(templates(&state).len(), 0);
    assert_eq!(state.fails(3, &["template", "rm", key])["code"], "not-found");
    assert_eq!(state.fails(3, &["template", "rm", "../vms"])["code"], "not-found");
    // What was forked stays.
    assert_eq!(state.ok(&["exec", "forked", "--", "echo", "well"]), "well\n");
    state.ok(&["cleanup", "--all", "--grace", "0"]);
    state.is_clean();
}

#[test]
fn a_boot_for_want_of_a_template_is_told() {
    let Some(state) = own_templates() else { return };
    let there = state.path().join("images/templates");
    fs::create_dir_all(&there).unwrap();
    let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", "size=1m", "none"]).arg(&there).status().unwrap();
    assert!(mounted.success(), "this test mounts a small disk, which takes root");
    let run = |options: &[&str]| {
        let output = state.vmkit(&[options, &["run", "--", "true"]].concat());
        assert!(output.status.success(), "{}", text(&output.stderr));
        text(&output.stderr)
    };
    // Quiet is about remarks, and this is none.
    let told = run(&["-q"]);
    assert!(told.contains("warning: booting, because no template could be made (id=run-"), "{told}");
    assert!(told.contains("MiB are free"), "{told}");
    let told = run(&["--json"]);
    let warning = told.lines().find_map(|line| {
        let value: serde_json::Value = serde_json::from_str(line).unwrap();
        value["warning"].is_string().then_some(value)
    });
    let warning = warning.unwrap_or_else(|| panic!("no warning in {told}"));
    assert_eq!(warning["warning"], "booting, because no template could be made");
    assert!(warning["error"].as_str().unwrap().contains("MiB are free"), "{warning}");
    // Where nobody wants to hear it, nobody does; where none was wanted, there is nothing to tell.
    for options in [&["-q", "--log", "off"][..], &["-q", "--no-template"]] {
        assert_eq!(run(options), "");
    }
    assert!(Command::new("umount").arg(&there).status().unwrap().success());
}

#[test]
fn a_warm_up_is_in_every_fork_and_an_image_takes_its_templates_with_it() {
    let Some(state) = own_templates() else { return };
    let key = state.ok(&["template", "build", "--memory", "192M", "--warm", "echo warm > /dev/shm/w"]);
    assert_eq!(state.ok(&["run", "--memory", "192M", "--", "cat", "/dev/shm/w"]), "warm\n");
    assert_eq!(templates(&state)[0]["warm"][2], "echo warm > /dev/shm/w");
    // One that fails says what it said, and leaves the one before.
    let error = state.fails(1, &["template", "build", "--memory", "192M", "--warm", "echo reason >&2; exit 9"]);
    assert!(error["details"].as_str().unwrap().contains("reason"), "{error}");
    assert_eq!(state.ok(&["run", "--memory", "192M", "--", "cat", "/dev/shm/w"]), "warm\n");
    // One that takes its guest away fails the same way each time. Arguments are in no error.
    for (script, how) in [
        ("reboot -f; sleep 1000 # word", "rebooted"),
        ("reboot # word", "rebooted"),
        ("poweroff -f; sleep 1000 # word", "ended"),
    ] {
        let error = state.fails(1, &["template", "build", "--memory", "192M", "--warm", script]);
        let expected = format!("the template's warm-up \"sh\" {how} its guest");
        assert_eq!((error["message"].as_str(), error["retryable"] == true), (Some(expected.as_str()), how == "ended"));
        assert!(error["hint"].as_str().unwrap().contains("leaves the guest running"), "{error}");
        assert!(!error.to_string().contains("word") && error["instance"].is_null(), "{error}");
    }
    assert_eq!(state.ok(&["run", "--memory", "192M", "--", "cat", "/dev/shm/w"]), "warm\n");
    // Made again without it, by the same name.
    assert_eq!(state.ok(&["template", "build", "--memory", "192M"]), key);
    assert_eq!(state.vmkit(&["run", "--memory", "192M", "--", "cat", "/dev/shm/w"]).status.code(), Some(1));
    assert_eq!(state.fails(3, &["template", "build", "nothing"])["code"], "not-found");
    assert_eq!(state.fails(2, &["template", "build", "--memory", "1M"])["code"], "invalid-argument");
    state.ok(&["image", "rm", "base"]);
    assert_eq!(templates(&state).len(), 0, "templates of an image that is gone");
    state.is_clean();
}

#[test]
fn whoever_makes_a_template_may_die() {
    let Some(state) = own_templates() else { return };
    for pause in [0, 500, 1500] {
        let mut maker = state.command(&["run", "--", "true"]).spawn().unwrap();
        common::eventually(|| maker.try_wait().unwrap().is_some() || !makers(&state).is_empty());
        std::thread::sleep(std::time::Duration::from_millis(pause));
        match pause {
            500 => common::signalled(maker.id(), "-INT"),
            _ => maker.kill().unwrap(),
        }
        maker.wait().unwrap();
        // Whatever comes next removes what is left, and its process.
        state.ok(&["ls"]);
        assert_eq!(makers(&state), [0; 0]);
        // The next one makes it, and nothing of the dead one's is left.
        let output = state.vmkit(&["run", "--", "echo", "well"]);
        assert_eq!(text(&output.stdout), "well\n", "{}", text(&output.stderr));
        assert_eq!(makers(&state), [0; 0]);
        assert_eq!(templates(&state).len(), 1);
        state.ok(&["template", "rm", "--all"]);
        state.is_clean();
    }
}

#[test]
fn a_template_that_is_given_up_is_not_left_running() {
    let Some(state) = own_templates() else { return };
    state.ok(&["clone", "web"]);
    for args in [&["template", "build"][..], &["start", "web"]] {
        let mut maker = state.command(args).spawn().unwrap();
        common::eventually(|| maker.try_wait().unwrap().is_some() || !makers(&state).is_empty());
        common::signalled(maker.id(), "-INT");
        assert_eq!(maker.wait().unwrap().code(), Some(130), "{args:?}");
        assert_eq!(makers(&state), [0; 0], "{args:?}");
    }
    // It begins soon, and takes longer than that where nothing is as fast as a boot.
    state.fails(5, &["--accel", "tcg", "start", "--timeout", "500ms", "web"]);
    assert_eq!(templates(&state).len(), 0);
    // It may have taken long to end: then the next command does it.
    assert_eq!(state.machines(), [("web".to_owned(), "Stopped".to_owned())]);
    assert_eq!(makers(&state), [0; 0]);
    state.ok(&["cleanup", "--all"]);
    state.is_clean();
}

/// Every QEMU that is to become a template.
fn makers(state: &State) -> Vec<u32> {
    let home = fs::canonicalize(state.path()).unwrap().join("images/templates");
    let entries = fs::read_dir("/proc").unwrap().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    pids.filter(|pid| fs::read_link(format!("/proc/{pid}/cwd")).is_ok_and(|cwd| cwd.starts_with(&home))).collect()
}

#[test]
fn a_used_machine_is_reset() {
    let Some(state) = State::new() else { return };
    state.ok(&["run", "--keep", "--name", "box", "--", "sh", "-c", "echo used > /used"]);
    let (before, pids) = (birth(&state, "box"), state.pids());
    state.ok(&["suspend", "box"]);
    assert_eq!(state.ok(&["reset", "box"]), "box\n");
    let after = birth(&state, "box");
    assert!(after["unused"] == true && after["at"].as_u64() > before["at"].as_u64(), "{before} {after}");
    assert!(state.pids().iter().all(|pid| !pids.contains(pid)));
    let output = state.vmkit(&["exec", "box", "--", "cat", "/used"]);
    assert!(text(&output.stderr).contains("No such file"), "{output:?}");
    // Also one that is off, and never one that is not there.
    state.ok(&["stop", "--force", "box"]);
    state.fails(3, &["reset", "box", "nosuch"]);
    assert_eq!(state.machines(), [("box".to_owned(), "Running".to_owned())]);
    state.ok(&["cleanup", "box"]);
    state.is_clean();
}
