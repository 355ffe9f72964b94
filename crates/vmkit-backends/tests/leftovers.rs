//! What whoever is gone left behind, and machines that nobody attends to.

mod common;

use std::fs;
use std::time::Duration;

use common::{QemuRig, base, id, runtime};
use tokio::time::sleep;
use vmkit::{Instance, State, cleanup};

const MINUTE: Duration = Duration::from_secs(60);

async fn sh(vm: &Instance, script: &str) {
    assert!(vm.command("sh").args(["-c", script]).status().await.unwrap().success(), "{script}");
}

async fn until(what: &str, so: impl Fn() -> bool) {
    for _ in 0..600 {
        if so() {
            return;
        }
        sleep(Duration::from_millis(100)).await;
    }
    panic!("not within a minute: {what}");
}

#[test]
fn the_memory_of_a_machine_that_switches_itself_off_is_removed_by_who_looks() {
    let Some(image) = base() else { return };
    let rig = QemuRig::new(image);
    runtime().block_on(async {
        let vm = rig.running(&rig.host(), "off").await;
        sh(&vm, "(sleep 6; poweroff -f) >/dev/null 2>&1 &").await;
    });
    // Nobody attends to it when it ends.
    let memory = rig.machine(&id("off")).join("memory");
    runtime().block_on(async {
        until("it is off", || rig.pids(&id("off")).is_empty()).await;
        assert!(memory.exists(), "nobody has looked yet");
        let host = rig.host();
        let found = host.list().await.unwrap();
        assert_eq!(found.iter().map(|found| found.state).collect::<Vec<_>>(), [State::Stopped]);
        assert!(!memory.exists(), "all that was in its memory is on the disk");
        cleanup(&host.adopt(&id("off")).await.unwrap(), Duration::ZERO, MINUTE).await.unwrap();
    });
}

#[test]
fn what_a_fork_left_that_was_killed_is_removed_by_who_looks() {
    let Some(image) = base() else { return };
    let rig = QemuRig::new(image);
    // As somebody leaves it who was killed while he saved a machine for its copies.
    let snapshots = rig.dir().join(".snapshots");
    let (draft, lock) = (snapshots.join(".work/fork-0badcafe"), snapshots.join(".locks/fork-0badcafe"));
    fs::create_dir_all(&draft).unwrap();
    fs::create_dir_all(lock.parent().unwrap()).unwrap();
    fs::write(draft.join("memory"), vec![7; 1 << 20]).unwrap();
    fs::File::create(&lock).unwrap().set_len(1).unwrap();
    runtime().block_on(async { assert!(rig.host().list().await.unwrap().is_empty()) });
    assert!(!draft.exists() && !lock.exists(), "nobody will ever want it");
}

#[test]
fn what_a_copy_says_begins_on_a_line_of_its_own() {
    let Some(image) = base() else { return };
    let rig = QemuRig::new(image);
    runtime().block_on(async {
        let host = rig.host();
        let vm = rig.running(&host, "web").await;
        sh(&vm, "echo of the original > /dev/console").await;
        let copy = vm.fork(1).await.unwrap().remove(0);
        sh(&copy, "echo of the copy > /dev/console").await;
        let console = rig.qemu().console_log(copy.id());
        let lines = || fs::read_to_string(&console).unwrap_or_default();
        until("it is written", || lines().contains("of the copy")).await;
        let said = lines();
        let lines: Vec<&str> = said.lines().map(str::trim_end).collect();
        assert!(lines.contains(&"of the original") && lines.contains(&"of the copy"), "{said:?}");
        for vm in [copy, vm] {
            cleanup(&vm, Duration::ZERO, MINUTE).await.unwrap();
        }
    });
}
