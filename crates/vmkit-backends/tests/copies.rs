//! Copies of machines that run.

mod common;

use std::collections::HashSet;
use std::time::Duration;

use common::farm::{Farm, discard, sh};
use common::{base, id, runtime};
use vmkit::{ConsoleSinks, ErrorKind, Origin, State, reset};

#[test]
fn copies_go_on_with_what_ran_and_are_nobodys_twins() {
    let Some(image) = base() else { return };
    let farm = Farm::new(image, true);
    runtime().block_on(async {
        let vm = farm.running("web").await;
        let whole = format!("{:?}", farm.qemu().templates().unwrap());
        // Somebody is connected to it, feeds it, and goes on doing so. Nobody does in the copies: there its input has ended.
        let mut child = vm.command("sh").args(["-c", "echo $$ > /dev/shm/pid; read a; read b || exec sleep 100000; echo $a$b"]).stdin(true).stdout(true).spawn().await.unwrap();
        let mut stdin = child.stdin.take().unwrap();
        tokio::io::AsyncWriteExt::write_all(&mut stdin, b"one\n").await.unwrap();
        // In the background, with nobody connected.
        sh(&vm, "sleep 100000 >/dev/null 2>&1 & echo $! > /dev/shm/detached; echo disk > /file; while ! [ -s /dev/shm/pid ]; do sleep 0.1; done").await;
        let copies = vm.fork(2).await.unwrap();
        assert_eq!(copies.iter().map(|copy| copy.id().as_str()).collect::<Vec<_>>(), ["web-1", "web-2"]);
        let mut seen = HashSet::new();
        for vm in copies.iter().chain([&vm]) {
            let alive = "kill -0 $(cat /dev/shm/pid) && kill -0 $(cat /dev/shm/detached) && cat /file";
            assert_eq!(sh(vm, alive).await, "disk", "{}", vm.id());
            assert_eq!(sh(vm, "hostname").await, vm.id().as_str());
            let one = "cat /etc/machine-id /proc/sys/kernel/random/boot_id; head -c 16 /dev/urandom | sha1sum";
            for line in sh(vm, one).await.lines() {
                assert!(seen.insert(line.to_owned()), "{} shares {line}", vm.id());
            }
        }
        let birth = copies[0].properties().birth.unwrap();
        assert_eq!((birth.how, birth.copy_of.as_deref(), birth.unused), (Origin::Fork, Some("web"), false), "{birth:?}");
        assert!(copies[0].properties().memory_used < vm.properties().memory_used, "copies share what they do not change");
        // What runs in the original never noticed.
        tokio::io::AsyncWriteExt::write_all(&mut stdin, b"two\n").await.unwrap();
        drop(stdin);
        let mut said = String::new();
        tokio::io::AsyncReadExt::read_to_string(child.stdout.as_mut().unwrap(), &mut said).await.unwrap();
        assert!(child.wait().await.unwrap().success());
        assert_eq!(said, "onetwo\n");
        // Copies are machines: they suspend, resume and boot from what is on their disks.
        copies[0].suspend().await.unwrap();
        copies[0].start(ConsoleSinks::discard()).await.unwrap();
        sh(&copies[0], "kill -0 $(cat /dev/shm/detached)").await;
        copies[1].stop(Duration::from_secs(20)).await.stop.unwrap();
        copies[1].start(ConsoleSinks::discard()).await.unwrap();
        assert_eq!(sh(&copies[1], "cat /file; ls /dev/shm; hostname").await, "disk\nweb-2");
        // There is nothing that one could be reset to.
        let refused = reset(&copies[1], ConsoleSinks::discard(), Duration::from_secs(60)).await.unwrap_err();
        assert_eq!((refused.kind(), copies[1].state()), (ErrorKind::Unsupported, State::Running));
        for vm in copies.iter().chain([&vm]) {
            discard(vm).await;
        }
        assert_eq!(farm.left(), [""; 0]);
        assert_eq!(format!("{:?}", farm.qemu().templates().unwrap()), whole, "what copies went on from is there no more");
    });
}

#[test]
fn nobody_takes_anothers_name_however_it_ends() {
    let Some(image) = base() else { return };
    let farm = Farm::new(image, false);
    runtime().block_on(async {
        let vm = farm.running("web").await;
        let own = sh(&vm, "cat /etc/machine-id").await;
        // From its first copy on it has its machine id on its disk, as a machine that boots has.
        discard(&vm.fork(1).await.unwrap().remove(0)).await;
        let copy = vm.fork(1).await.unwrap().remove(0);
        let copied = sh(&copy, "cat /etc/machine-id").await;
        // Nobody gives either the time to write anything down.
        vm.kill().await.stop.unwrap();
        copy.kill().await.stop.unwrap();
        for vm in [&vm, &copy] {
            vm.start(ConsoleSinks::discard()).await.unwrap();
        }
        assert_eq!(sh(&vm, "cat /etc/machine-id").await, own, "the original is who it was");
        let after = sh(&copy, "cat /etc/machine-id").await;
        assert!(after.len() == 32 && after != own, "{after} was {copied}, and {own} is the original's");
        // The same for one that booted.
        let copy = vm.fork_as(&[id("another")]).await.unwrap().remove(0);
        vm.kill().await.stop.unwrap();
        vm.start(ConsoleSinks::discard()).await.unwrap();
        assert_eq!(sh(&vm, "cat /etc/machine-id").await, own, "the original that booted is who it was");
        discard(&copy).await;
        discard(&farm.host.adopt(&id("web-1")).await.unwrap()).await;
        discard(&vm).await;
        assert_eq!(farm.left(), [""; 0]);
    });
}

#[test]
fn what_survived_a_suspend_survives_a_fork_too() {
    let Some(image) = base() else { return };
    let farm = Farm::new(image, false);
    runtime().block_on(async {
        let vm = farm.running("web").await;
        // It prints when it is told to, and ends when nobody hears it.
        let talks = "echo $$ > /dev/shm/pid; while :; do [ -e /dev/shm/say ] && { echo said && echo again && rm /dev/shm/say; }; sleep 0.2; done";
        let child = vm.command("sh").args(["-c", talks]).stdout(true).spawn().await.unwrap();
        sh(&vm, "while ! [ -s /dev/shm/pid ]; do sleep 0.1; done").await;
        vm.suspend().await.unwrap();
        drop(child);
        vm.start(ConsoleSinks::discard()).await.unwrap();
        let copy = vm.fork(1).await.unwrap().remove(0);
        let copy_of_copy = copy.fork_as(&[id("third")]).await.unwrap().remove(0);
        for vm in [&vm, &copy, &copy_of_copy] {
            let script = "touch /dev/shm/say; while [ -e /dev/shm/say ]; do kill -0 $(cat /dev/shm/pid) || exit 1; sleep 0.1; done";
            sh(vm, script).await;
            sh(vm, "sleep 1; kill -0 $(cat /dev/shm/pid)").await;
        }
        for vm in [&vm, &copy, &copy_of_copy] {
            discard(vm).await;
        }
        assert_eq!(farm.left(), [""; 0]);
    });
}

#[test]
fn what_cannot_be_copied_is_an_error_and_nothing_changes() {
    let Some(image) = base() else { return };
    let farm = Farm::new(image, false);
    runtime().block_on(async {
        let vm = farm.running("web").await;
        assert_eq!(vm.fork(0).await.unwrap_err().kind(), ErrorKind::InvalidArgument);
        // A name that somebody else has, seen by nobody before.
        let foreign = farm.dir.path().join("vms/web-1");
        std::fs::create_dir(&foreign).unwrap();
        let taken = vm.fork_as(&[id("fine"), id("web-1")]).await.unwrap_err();
        assert_eq!(taken.kind(), ErrorKind::AlreadyExists, "{taken:?}");
        assert!(foreign.is_dir());
        std::fs::remove_dir(&foreign).unwrap();
        assert_eq!(sh(&vm, "echo runs").await, "runs");
        // A copy that was never started, and what it was to be a copy of is gone.
        let snapshot = vm.snapshot().await.unwrap();
        let late = farm.host.create(id("late"), snapshot.spec().clone()).await.unwrap();
        late.clone_source().await.unwrap();
        drop(snapshot);
        let error = late.start(ConsoleSinks::discard()).await.unwrap_err();
        assert_eq!((error.kind(), late.state()), (ErrorKind::NotFound, State::Stopped), "{error:?}");
        discard(&late).await;
        discard(&vm).await;
        assert_eq!(farm.left(), [""; 0]);
    });
}
