//! QEMUs that are started ahead of time, and wait for what their machines go on from.

mod common;

use std::fs;
use std::time::Duration;

use common::farm::{Farm, discard, sh};
use common::{base, id, pids_where, runtime};
use tokio::time::{sleep, timeout};
use vmkit::{ConsoleSinks, ErrorKind, Instance, Origin, State};

/// The QEMUs of a machine, whatever its records say.
fn pids(farm: &Farm, vm: &Instance) -> Vec<u32> {
    let dir = fs::canonicalize(farm.qemu().machine_dir(vm.id())).unwrap();
    pids_where(|cwd| cwd == dir)
}

async fn stopped(farm: &Farm, name: &str, own_memory: bool) -> Instance {
    let vm = farm.host.create(id(name), farm.spec().own_memory(own_memory)).await.unwrap();
    vm.clone_source().await.unwrap();
    vm
}

async fn start(vm: &Instance) {
    vm.start(ConsoleSinks::discard()).await.unwrap();
}

#[test]
fn a_fork_goes_on_in_the_process_that_waits() {
    let Some(image) = base() else { return };
    let farm = Farm::new(image, false);
    runtime().block_on(async {
        for own_memory in [false, true] {
            let vm = stopped(&farm, "web", own_memory).await;
            vm.prespawn().await.unwrap();
            let waiting = pids(&farm, &vm);
            assert_eq!(waiting.len(), 1, "{waiting:?}");
            let seen = vm.properties();
            assert_eq!((vm.state(), seen.pid, seen.uptime), (State::Stopped, Some(waiting[0]), None));
            assert!(seen.memory_used.is_some_and(|own| own > 0), "what it costs is shown");
            assert!(seen.birth.is_none(), "nobody was born yet");
            // The copy is made ahead of time too.
            assert_eq!(farm.qemu().machine_dir(vm.id()).join("memory").exists(), own_memory);
            start(&vm).await;
            assert_eq!(pids(&farm, &vm), waiting, "it goes on in another process");
            assert_eq!(farm.qemu().machine_dir(vm.id()).join("memory").exists(), own_memory);
            let (seen, birth) = (vm.properties(), vm.properties().birth.unwrap());
            assert!(seen.uptime.is_some());
            assert!(birth.how == Origin::Fork && birth.unused && !birth.renewed.is_empty(), "{birth:?}");
            assert_eq!(sh(&vm, "hostname").await, "web");
            // It has run: from now on there is a disk to boot from, and a saved execution to wait for.
            sh(&vm, "echo kept > /dev/shm/word").await;
            vm.suspend().await.unwrap();
            assert_eq!(pids(&farm, &vm), [0; 0]);
            vm.prespawn().await.unwrap();
            let waiting = pids(&farm, &vm);
            start(&vm).await;
            assert_eq!((pids(&farm, &vm), waiting.len()), (waiting, 1));
            assert_eq!(sh(&vm, "cat /dev/shm/word").await, "kept");
            discard(&vm).await;
        }
        assert_eq!(farm.left(), [""; 0]);
    });
}

#[test]
fn what_waits_for_something_else_is_ended() {
    let Some(image) = base() else { return };
    let farm = Farm::new(image, true);
    runtime().block_on(async {
        let vm = stopped(&farm, "web", false).await;
        vm.prespawn().await.unwrap();
        let waiting = pids(&farm, &vm);
        // Another template of the same name: what waits has the memory of the first.
        let key = farm.qemu().template_for(&farm.spec()).unwrap().unwrap().key;
        farm.qemu().remove_template(&key).await.unwrap();
        assert_eq!(farm.qemu().build_template(&farm.spec(), &[], false).await.unwrap().key, key);
        start(&vm).await;
        let now = pids(&farm, &vm);
        assert!(now.len() == 1 && now != waiting, "{now:?}, {waiting:?}");
        assert_eq!(sh(&vm, "echo well").await, "well");
        // A saved execution that is given up.
        vm.suspend().await.unwrap();
        vm.prespawn().await.unwrap();
        assert!(farm.qemu().discard_saved(vm.id()).await.unwrap());
        assert_eq!(pids(&farm, &vm), [0; 0], "it waits for what is not there any more");
        discard(&vm).await;
        assert_eq!(farm.left(), [""; 0]);
    });
}

#[test]
fn one_that_is_cut_off_leaves_nothing() {
    let Some(image) = base() else { return };
    let farm = Farm::new(image, false);
    let runs = runtime();
    let (fresh, saved) = runs.block_on(async {
        let fresh = stopped(&farm, "fresh", false).await;
        let saved = farm.running("saved").await;
        sh(&saved, "echo kept > /dev/shm/word").await;
        saved.suspend().await.unwrap();
        for ms in [0, 1, 3, 10, 30, 60, 100] {
            for vm in [&fresh, &saved] {
                let state = vm.state();
                let cut_off = timeout(Duration::from_millis(ms), vm.prespawn()).await.is_err();
                // Whoever asks next waits until that is undone.
                let refused = vm.suspend().await;
                assert_eq!((vm.state(), refused.is_ok()), (state, state == State::Suspended), "after {ms} ms");
                let waiting = pids(&farm, vm).len();
                // It may have been done just when nobody wanted it any more.
                assert!(waiting == 1 || cut_off && waiting == 0, "{waiting} wait after {ms} ms");
            }
        }
        (fresh.id().clone(), saved.id().clone())
    });
    // Whoever was at it dies: the next one clears up.
    for ms in [1, 5, 20, 50] {
        let dies = runtime();
        let host = dies.block_on(async { vmkit::Host::new(farm.qemu().clone()) });
        for id in [&fresh, &saved] {
            let vm = dies.block_on(host.adopt(id)).unwrap();
            dies.spawn(async move { vm.prespawn().await });
        }
        dies.block_on(async { sleep(Duration::from_millis(ms)).await });
        drop(dies);
        let next = runtime();
        next.block_on(async {
            let host = vmkit::Host::new(farm.qemu().clone());
            for id in [&fresh, &saved] {
                let vm = host.adopt(id).await.unwrap();
                vm.prespawn().await.unwrap();
                assert_eq!(pids(&farm, &vm).len(), 1, "after {ms} ms");
            }
        });
    }
    runtime().block_on(async {
        let host = vmkit::Host::new(farm.qemu().clone());
        for id in [&fresh, &saved] {
            let vm = host.adopt(id).await.unwrap();
            start(&vm).await;
            assert_eq!(pids(&farm, &vm).len(), 1);
            let word = vm.command("cat").arg("/dev/shm/word").output().await.unwrap();
            assert_eq!(word.status.success(), *id == saved, "{word:?}");
            discard(&vm).await;
        }
        assert_eq!(farm.left(), [""; 0]);
    });
}

#[test]
fn where_there_is_no_template_nobody_waits() {
    let Some(image) = base() else { return };
    let rig = common::QemuRig::new(image);
    runtime().block_on(async {
        let host = rig.host();
        let vm = host.create(id("boots"), vmkit::conformance::Rig::spec(&rig)).await.unwrap();
        vm.clone_source().await.unwrap();
        let error = vm.prespawn().await.unwrap_err();
        assert!(error.kind() == ErrorKind::Unsupported && error.next_step().is_some(), "{error:?}");
        assert_eq!((vm.state(), rig.pids(vm.id()).len()), (State::Stopped, 0));
        vm.delete().await.unwrap();
    });
}
