//! Bad input and bad luck: one clear error each, what to do next, a documented exit code, nothing lost, nothing left.

mod common;

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::Command;

use common::{State, text};

#[test]
fn arguments_that_make_no_sense() {
    let state = State::empty();
    for args in [
        &["clone", "a/b"][..],
        &["clone", ".."],
        &["clone", "web", "--memory", "lots"],
        &["clone", "web", "--memory", "512"],
        &["stop", "web", "--grace", "-1s"],
        &["wait", "web", "Asleep"],
        &["run"],
        &["dance"],
        &["run", "-e", "NOVALUE", "--", "true"],
        &["ls", "--accel", "warp"],
        &["run", "--timeout", "1e30", "--", "true"],
        &["exec", "a/b", "--", "true"],
    ] {
        let error = state.fails(2, args);
        assert_eq!(error["code"], "invalid-argument", "{args:?}");
        assert_eq!(state.vmkit(args).status.code(), Some(2), "{args:?}");
    }
    for args in [&["clone", "a/b"][..], &["start", "a/b"], &["exec", "a/b", "--", "true"], &["cleanup", "a/b"]] {
        let error = text(&state.vmkit(args).stderr);
        assert!(error.contains("begin with a letter or a digit"), "the rule is not said: {error}");
    }
    assert!(fs::read_dir(state.path()).unwrap().next().is_none(), "arguments were refused, and something was made");
}

#[test]
fn what_is_missing_among_the_arguments_and_what_there_is_are_named_to_programs_too() {
    let state = State::empty();
    for (args, named) in [
        (&["start"][..], &["not provided: <NAME>..."][..]),
        (&["fork", "a"], &["not provided: <NEW>..."]),
        (&["clone"], &["not provided: <NAME>"]),
        (&["wait"], &["<NAME>, <STATE>"]),
        (&["cleanup", "--all", "a"], &["--all", "[NAME]..."]),
        (&["states", "--format", "xml"], &["xml", "there are: text, markdown, dot, json"]),
    ] {
        let error = state.fails(2, args);
        let message = error["message"].as_str().unwrap();
        assert!(named.iter().all(|part| message.contains(part)) && !message.contains('\n'), "{args:?}: {message}");
    }
}

#[test]
fn out_of_range() {
    let Some(state) = State::new() else { return };
    assert_eq!(state.fails(2, &["clone", "web", "--cpus", "0"])["code"], "invalid-argument");
    assert_eq!(state.fails(2, &["clone", "web", "--memory", "16M"])["code"], "invalid-argument");
    assert_eq!(state.fails(2, &["run", "--cpus", "1000", "--", "true"])["code"], "invalid-argument");
    assert_eq!(state.fails(2, &["run", "--memory", "64M", "--", "true"])["code"], "invalid-argument");
    // The smallest that is allowed is one that works.
    assert_eq!(state.ok(&["run", "--memory", "96M", "--", "echo", "small"]), "small\n");
    state.is_clean();
}

#[test]
fn what_is_not_there() {
    let Some(state) = State::new() else { return };
    for args in [
        &["start", "nobody"][..],
        &["stop", "nobody"],
        &["suspend", "nobody"],
        &["delete", "nobody"],
        &["inspect", "nobody"],
        &["console", "nobody"],
        &["wait", "nobody", "Running"],
        &["clone", "web", "--image", "nothing"],
        &["image", "rm", "nothing"],
    ] {
        assert_eq!(state.fails(3, args)["code"], "not-found", "{args:?}");
    }
    assert_eq!(state.fails(125, &["exec", "nobody", "--", "true"])["code"], "not-found");
    assert_eq!(state.fails(125, &["run", "--image", "nothing", "--", "true"])["code"], "not-found");
    state.is_clean();
}

#[test]
fn a_state_directory_that_cannot_be_written() {
    let state = State::empty();
    let file = state.path().join("file");
    fs::write(&file, "").unwrap();
    let output = state.command(&["ls"]).env("VMKIT_STATE_DIR", file.join("below")).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let error = text(&output.stderr);
    assert!(error.contains("cannot be made") && error.contains("next: "), "{error}");
    let output = state.command(&["run", "--", "true"]).env("VMKIT_STATE_DIR", file.join("below")).output().unwrap();
    assert_eq!(output.status.code(), Some(125));
    let output =
        state.command(&["ls"]).env_remove("VMKIT_STATE_DIR").env_remove("HOME").env_remove("XDG_STATE_HOME").output();
    assert!(text(&output.unwrap().stderr).contains("--state-dir"));
}

#[test]
fn no_qemu() {
    let Some(state) = State::new() else { return };
    let empty = state.path().join("empty");
    fs::create_dir(&empty).unwrap();
    let without = |args: &[&str]| state.command(args).env("PATH", &empty).output().unwrap();
    let output = without(&["clone", "web"]);
    assert_eq!(output.status.code(), Some(6), "{}", text(&output.stderr));
    assert!(text(&output.stderr).contains("make setup"));
    assert_eq!(without(&["run", "--", "true"]).status.code(), Some(125));
    let doctor = without(&["doctor"]);
    assert_eq!(doctor.status.code(), Some(6));
    assert!(text(&doctor.stdout).contains("missing  QEMU"), "{}", text(&doctor.stdout));
    // Looking and deleting need none.
    state.ok(&["clone", "web"]);
    assert!(text(&without(&["ls"]).stdout).contains("web"));
    assert!(without(&["delete", "web"]).status.success());
    state.is_clean();
}

/// A store of its own for a test that damages it.
fn own_images(state: &State) {
    let images = state.path().join("images");
    let shared = fs::canonicalize(&images).unwrap();
    fs::remove_file(&images).unwrap();
    let copied = Command::new("cp").args(["-a", "--sparse=always"]).args([&shared, &images]).status().unwrap();
    assert!(copied.success());
}

#[test]
fn a_damaged_image() {
    let Some(state) = State::new() else { return };
    own_images(&state);
    state.ok(&["clone", "before"]);
    let inspected: serde_json::Value = serde_json::from_str(&state.ok(&["inspect", "before", "--json"])).unwrap();
    let disk = inspected["spec"]["source"]["boot"]["disk"].as_str().unwrap().to_owned();
    let set = |mode: &str, path: &Path| assert!(Command::new("chmod").arg(mode).arg(path).status().unwrap().success());
    set("u+w", Path::new(&disk).parent().unwrap());
    set("u+w", Path::new(&disk));
    fs::remove_file(&disk).unwrap();
    let error = state.fails(1, &["clone", "web"]);
    assert_eq!(error["code"], "corrupt");
    assert!(error["hint"].as_str().unwrap().contains("image build base"), "{error}");
    assert_eq!(state.fails(1, &["start", "before"])["code"], "corrupt");
    assert_eq!(state.machines(), [("before".into(), "Stopped".into())]);
    assert!(text(&state.vmkit(&["image", "ls"]).stderr).contains("damaged"));
    state.ok(&["delete", "before"]);
    state.is_clean();
}

#[test]
fn an_image_in_use_stays() {
    let Some(state) = State::new() else { return };
    own_images(&state);
    state.ok(&["clone", "web"]);
    assert_eq!(state.fails(1, &["image", "rm", "base"])["code"], "busy");
    state.ok(&["start", "web"]);
    state.ok(&["cleanup", "web", "--grace", "0"]);
    state.ok(&["image", "rm", "base"]);
    assert_eq!(state.ok(&["image", "ls", "--json"]).trim(), "[]");
}

#[test]
fn a_damaged_machine() {
    let Some(state) = State::new() else { return };
    state.ok(&["clone", "web"]);
    fs::write(state.path().join("vms/web/vm.json"), "{ half").unwrap();
    assert_eq!(state.machines(), [("web".into(), "ErrorUnknown".into())]);
    let listed = state.vmkit(&["ls"]);
    assert!(text(&listed.stderr).contains("damaged"), "{}", text(&listed.stderr));
    assert_eq!(state.fails(4, &["start", "web"])["state"], "ErrorUnknown");
    state.ok(&["delete", "web"]);
    state.is_clean();
}

#[test]
fn a_run_that_fails_does_not_touch_the_machine_that_has_its_name() {
    let Some(state) = State::new() else { return };
    state.ok(&["clone", "kept"]);
    let there = [("kept".to_owned(), "Stopped".to_owned())];
    state.fails(125, &["run", "--name", "kept", "--image", "nothing", "--", "true"]);
    state.fails(125, &["run", "--keep", "--name", "kept", "--image", "nothing", "--", "true"]);
    state.fails(125, &["run", "--name", "kept", "--", "true"]);
    assert_eq!(state.machines(), there);
    // A run that was killed before it found the name taken: its file is there, and the machine is not its.
    fs::create_dir_all(state.path().join("run")).unwrap();
    fs::write(state.path().join("run/kept"), "01234567").unwrap();
    assert_eq!(state.machines(), there);
    assert!(!state.path().join("run/kept").exists(), "nobody cleared up after it");
    state.ok(&["delete", "kept"]);
    state.is_clean();
}

#[test]
fn a_copy_of_a_state_directory_leaves_the_original_alone() {
    let Some(state) = State::new() else { return };
    state.ok(&["clone", "web"]);
    state.ok(&["start", "web"]);
    let copy = State::empty();
    let copied =
        Command::new("cp").arg("-a").args([state.path().join("vms"), copy.path().join("vms")]).status().unwrap();
    assert!(copied.success());
    assert_eq!(copy.machines(), [("web".into(), "Stopped".into())]);
    copy.ok(&["stop", "--force", "web"]);
    copy.ok(&["cleanup", "--all", "--grace", "0"]);
    assert_eq!(state.ok(&["exec", "web", "--", "echo", "here"]), "here\n");
    state.ok(&["cleanup", "--all", "--grace", "0"]);
    state.is_clean();
}

#[test]
fn lost_output_is_a_failure() {
    let Some(state) = State::new() else { return };
    let full = || std::process::Stdio::from(fs::File::options().write(true).open("/dev/full").unwrap());
    let output = state.command(&["run", "--", "echo", "lost"]).stdout(full()).output().unwrap();
    assert_eq!(output.status.code(), Some(125), "{}", text(&output.stderr));
    assert!(text(&output.stderr).contains("is lost") && text(&output.stderr).contains("next: "));
    state.is_clean();
    let output = state.command(&["completions", "bash"]).stdout(full()).output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{}", text(&output.stderr));
    let output = state.command(&["states"]).stdout(full()).output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{}", text(&output.stderr));
}

#[test]
fn nobody_becomes_root_by_a_number() {
    let Some(state) = State::new() else { return };
    for user in ["4294967295", "0:4294967295"] {
        assert_eq!(state.fails(125, &["run", "-u", user, "--", "id"])["code"], "invalid-argument");
    }
    assert!(state.ok(&["run", "-u", "1234:5678", "--", "id"]).contains("uid=1234 gid=5678"));
    state.is_clean();
}

#[test]
fn what_is_not_ours_is_not_touched() {
    let Some(state) = State::new() else { return };
    state.ok(&["ls"]);
    let theirs = state.path().join("vms/theirs");
    fs::create_dir(&theirs).unwrap();
    fs::write(theirs.join("precious"), "x").unwrap();
    assert_eq!(state.fails(1, &["clone", "theirs"])["code"], "already-exists");
    assert_eq!(state.fails(125, &["run", "--name", "theirs", "--", "true"])["code"], "already-exists");
    assert_eq!(state.fails(3, &["delete", "theirs"])["code"], "not-found");
    state.ok(&["cleanup", "theirs"]);
    state.ok(&["cleanup", "--all"]);
    assert_eq!(state.machines(), []);
    assert_eq!(fs::read_to_string(theirs.join("precious")).unwrap(), "x");
    let locks: Vec<_> = fs::read_dir(state.path().join("vms/.locks")).unwrap().collect();
    assert!(locks.is_empty(), "what was refused left its lock: {locks:?}");
}

#[test]
fn times_without_an_end_are_times() {
    let Some(state) = State::new() else { return };
    // More than any clock can say.
    let forever = "18000000000000000000";
    assert_eq!(state.ok(&["run", "--timeout", forever, "--", "echo", "done"]), "done\n");
    state.ok(&["clone", "web"]);
    state.ok(&["wait", "web", "Stopped", "--timeout", forever]);
    state.ok(&["start", "web", "--timeout", forever]);
    state.ok(&["stop", "web", "--grace", forever]);
    state.ok(&["cleanup", "web", "--grace", forever]);
    state.is_clean();
}

#[test]
fn a_moved_state_directory() {
    let Some(state) = State::new() else { return };
    own_images(&state);
    state.ok(&["clone", "web"]);
    let away = State::empty();
    let moved = |from: &State, to: &State| {
        for part in ["vms", "images"] {
            fs::rename(from.path().join(part), to.path().join(part)).unwrap();
        }
    };
    moved(&state, &away);
    let error = away.fails(1, &["start", "web"]);
    assert_eq!(error["code"], "corrupt");
    assert!(error["hint"].as_str().unwrap().contains("move it back"), "{error}");
    // Nothing was lost: new machines run there, and the old one runs where it was made.
    away.ok(&["run", "--", "true"]);
    moved(&away, &state);
    state.ok(&["start", "web"]);
    state.ok(&["cleanup", "--all", "--grace", "0"]);
    state.is_clean();
}

#[test]
fn an_ordinary_user_and_somebody_elses_state_directory() {
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::process::CommandExt;
    assert!(rustix::process::geteuid().is_root(), "this test becomes an ordinary user, which takes root");
    let state = State::empty();
    // Where that user can reach both.
    let program = state.path().join("vmkit");
    fs::copy(env!("CARGO_BIN_EXE_vmkit"), &program).unwrap();
    fs::set_permissions(state.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let theirs = state.path().join("theirs");
    fs::create_dir(&theirs).unwrap();
    let ordinary = |args: &[&str]| {
        let mut command = Command::new(&program);
        command.args(args).env("VMKIT_STATE_DIR", &theirs).uid(65534).gid(65534).current_dir("/").output().unwrap()
    };
    for made in [false, true] {
        if made {
            // All of it is there, and readable.
            assert!(state.command(&["ls"]).env("VMKIT_STATE_DIR", &theirs).status().unwrap().success());
            assert!(Command::new("chmod").args(["-R", "a+rX"]).arg(&theirs).status().unwrap().success());
        }
        for (code, args) in [(1, &["ls"][..]), (1, &["clone", "web"]), (125, &["run", "--", "true"])] {
            let output = ordinary(args);
            let error = text(&output.stderr);
            assert_eq!(output.status.code(), Some(code), "{args:?}: {error}");
            assert!(error.contains(theirs.to_str().unwrap()) && error.contains("Permission denied"), "{error}");
            assert!(error.contains("next: ") && error.contains("--state-dir"), "{error}");
        }
        assert_eq!(ordinary(&["doctor"]).status.code(), Some(6));
    }
}

#[test]
fn several_images_are_removed_each_in_its_turn() {
    let Some(state) = State::new() else { return };
    own_images(&state);
    let output = state.vmkit(&["--json", "image", "rm", "nothing", "base", "none"]);
    assert_eq!(output.status.code(), Some(3));
    let removed: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(removed, serde_json::json!([{ "removed": "base" }]));
    let errors: Vec<serde_json::Value> =
        text(&output.stderr).lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(errors.len(), 2, "{errors:?}");
}

/// The marker and the frame of the agent's link, with a version that nobody speaks.
fn old_agent(listener: &UnixListener) {
    let (mut stream, _) = listener.accept().unwrap();
    let mut hello = [0; 32];
    stream.read_exact(&mut hello).unwrap();
    let link = vmkit_agent::link::Handshake {
        kind: vmkit_agent::link::Kind::Ack,
        version: 9999,
        nonce: vmkit_agent::link::Handshake::decode(hello[8..].try_into().unwrap()).unwrap().0.nonce,
        payload: Vec::new(),
    };
    stream.write_all(&link.encode()).unwrap();
    let _ = stream.read(&mut hello);
}

#[test]
fn an_agent_of_another_version() {
    let Some(state) = State::new() else { return };
    state.ok(&["clone", "old"]);
    // A process stands in for its QEMU, and this test for its agent.
    let dir = state.path().join("vms/old");
    let mut qemu = Command::new("sleep").arg("600").current_dir(&dir).spawn().unwrap();
    let process = vmkit_backends::process::Identity::of(qemu.id()).unwrap();
    let run = serde_json::json!({ "process": process, "accelerator": "tcg", "started": 0, "ready": true });
    fs::write(dir.join("run.json"), run.to_string()).unwrap();
    let listener = UnixListener::bind(dir.join("agent.0.sock")).unwrap();
    let agent = std::thread::spawn(move || old_agent(&listener));
    let error = state.fails(125, &["exec", "old", "--", "true"]);
    assert_eq!(error["code"], "agent");
    assert!(error["message"].as_str().unwrap().contains("version"), "{error}");
    agent.join().unwrap();
    qemu.kill().unwrap();
    qemu.wait().unwrap();
    state.ok(&["delete", "old"]);
}

#[test]
fn a_full_disk() {
    let Some(state) = State::new() else { return };
    let small = state.path().join("small");
    fs::create_dir(&small).unwrap();
    let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", "size=1m", "none"]).arg(&small).status().unwrap();
    assert!(mounted.success(), "this test mounts a small disk, which takes root");
    let images = fs::canonicalize(state.path().join("images")).unwrap();
    std::os::unix::fs::symlink(images, small.join("images")).unwrap();
    let on_small = |args: &[&str]| state.command(args).env("VMKIT_STATE_DIR", &small).output().unwrap();
    // Room for the machine, none for its memory.
    assert!(on_small(&["clone", "web"]).status.success());
    let output = on_small(&["--no-template", "start", "web"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("MiB are free") && text(&output.stderr).contains("next: "));
    let run = on_small(&["--no-template", "run", "--", "true"]);
    assert_eq!(run.status.code(), Some(125), "{}", text(&run.stderr));
    assert_eq!(text(&on_small(&["ls", "--names-only"]).stdout), "web\n", "the run left something");
    // A fork has its memory elsewhere until it is suspended.
    let run = on_small(&["run", "--", "true"]);
    assert!(run.status.success(), "{}", text(&run.stderr));
    // One that cannot be suspended for want of room goes on, and nothing of the attempt is left.
    assert!(on_small(&["start", "web"]).status.success());
    let output = on_small(&["suspend", "web"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("free some space"), "{}", text(&output.stderr));
    let output = on_small(&["exec", "web", "--", "echo", "on"]);
    assert_eq!(text(&output.stdout), "on\n", "{}", text(&output.stderr));
    for file in ["memory.apart", "state.tmp", "state.apart", "memory", "save.sock"] {
        assert!(!small.join("vms/web").join(file).exists(), "{file} is left");
    }
    assert!(on_small(&["stop", "--force", "web"]).status.success());
    // No room for anything.
    let _ = fs::write(small.join("filler"), vec![1; 2 << 20]);
    let output = on_small(&["clone", "more"]);
    assert_eq!(output.status.code(), Some(1), "{}", text(&output.stderr));
    assert!(text(&output.stderr).contains("free some space"), "{}", text(&output.stderr));
    assert!(on_small(&["delete", "web"]).status.success(), "a full disk keeps nobody from deleting");
    assert!(fs::read_dir(small.join("vms/.staging")).unwrap().next().is_none());
    assert!(Command::new("umount").arg(&small).status().unwrap().success());
}

#[test]
fn a_kernel_that_is_none() {
    let state = State::empty();
    let root = state.path().join("root");
    fs::create_dir(&root).unwrap();
    let args = ["image", "build", "mine", "--rootfs", root.to_str().unwrap(), "--kernel", "/etc/passwd"];
    let error = state.fails(2, &args);
    assert_eq!(
        (error["code"].as_str(), error["message"].as_str()),
        (Some("invalid-argument"), Some("/etc/passwd is no kernel"))
    );
    assert!(!state.path().join("images/names/mine.json").exists());
}
