//! Guests that reboot, panic and power off by themselves, however their machines were started.

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use common::farm::{Farm, discard, sh};
use common::{QemuRig, base, id, pids_where, runtime};
use vmkit::conformance::Rig;
use vmkit::{BootImage, ConsoleSinks, ErrorKind, Instance, Source, Spec, State};

/// How long anything that happens at all may take, on a host that is busy with other things.
const PATIENCE: Duration = Duration::from_secs(300);

const BOOT_ID: &str = "cat /proc/sys/kernel/random/boot_id";

/// What a guest says as soon as it says anything: a session of before its reboot may still have to be given up.
async fn says(vm: &Instance, script: &str) -> String {
    let until = Instant::now() + PATIENCE;
    loop {
        match vm.command("sh").args(["-c", script]).output().await {
            Ok(output) => {
                assert!(output.status.success(), "{script}: {output:?}");
                return String::from_utf8(output.stdout).unwrap().trim().to_owned();
            }
            Err(error) if error.kind() == ErrorKind::Agent && Instant::now() < until => {}
            Err(error) => panic!("{script}: {error:?}"),
        }
    }
}

/// Lets the guest reboot under a command, which hears of it. Returns what it is when it is up again.
async fn reboot(vm: &Instance, how: &str) -> String {
    let before = sh(vm, BOOT_ID).await;
    let pid = vm.properties().pid;
    let ended = tokio::time::timeout(PATIENCE, vm.command("sh").args(["-c", how]).output()).await;
    let error = ended.expect("a command hangs in a guest that rebooted").unwrap_err();
    assert!(error.kind() == ErrorKind::Agent && error.message().contains("rebooted"), "{error:?}");
    assert_eq!(vm.state(), State::Running);
    let after = says(vm, BOOT_ID).await;
    assert_ne!(after, before, "it did not reboot");
    assert_eq!((vm.state(), vm.properties().pid), (State::Running, pid), "the same machine, in the same process");
    after
}

/// At once; and as by its reset button.
const ASKED: &str = "reboot -f; sleep 1000";
const RESET: &str = "echo b > /proc/sysrq-trigger; sleep 1000";

/// Reboots a machine, and looks at what is to be gone and what is to be there.
async fn comes_up_again(vm: &Instance, how: &str) {
    // Written through before it reboots: what is not may be lost, as on any machine.
    sh(vm, "echo kept > /kept; echo lost > /dev/shm/lost; sync").await;
    sh(vm, "(sleep 1000) > /dev/null 2>&1 &").await;
    reboot(vm, how).await;
    let name = vm.id().as_str();
    assert_eq!(sh(vm, "cat /kept; hostname; ls /dev/shm; pidof sleep | wc -w").await, format!("kept\n{name}\n0"));
    let clock: i64 = sh(vm, "date +%s").await.parse().unwrap();
    let ours = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs() as i64;
    assert!((clock - ours).abs() <= 5, "the guest's clock is {} s behind", ours - clock);
}

/// Suspends a machine that rebooted, and resumes it: what it has now is what goes on.
async fn goes_on(vm: &Instance) {
    sh(vm, "head -c 20000000 /dev/urandom > /dev/shm/noise; md5sum /dev/shm/noise > /dev/shm/sum").await;
    let before = sh(vm, BOOT_ID).await;
    vm.suspend().await.unwrap();
    vm.start(ConsoleSinks::discard()).await.unwrap();
    sh(vm, "md5sum -c /dev/shm/sum").await;
    assert_eq!(sh(vm, BOOT_ID).await, before, "it booted instead of going on");
}

#[test]
fn a_machine_that_booted_reboots() {
    let Some(image) = base() else { return };
    let rig = QemuRig::new(image);
    runtime().block_on(async {
        let vm = rig.running(&rig.host(), "booted").await;
        let machine_id = sh(&vm, "cat /etc/machine-id").await;
        comes_up_again(&vm, ASKED).await;
        assert_eq!(sh(&vm, "cat /etc/machine-id").await, machine_id);
        goes_on(&vm).await;
        // It was resumed now, and has a kernel all the same.
        comes_up_again(&vm, RESET).await;
        goes_on(&vm).await;
        discard(&vm).await;
    });
}

#[test]
fn a_fork_reboots_as_itself_and_not_as_its_template() {
    let Some(image) = base() else { return };
    let farm = Farm::new(image, false);
    runtime().block_on(async {
        for own in [false, true] {
            let vm = farm.running_as("web", farm.spec().own_memory(own)).await;
            let twin = farm.running("twin").await;
            // What it is called is on its disk some seconds after it was forked, or as soon as it shuts down.
            let kept =
                "mkdir /m; mount -o bind / /m; until test -s /m/etc/machine-id; do sleep 1; done; umount /m; sync";
            let machine_id = sh(&vm, "cat /etc/machine-id").await;
            sh(&vm, kept).await;
            comes_up_again(&vm, RESET).await;
            assert_eq!(sh(&vm, "cat /etc/machine-id").await, machine_id);
            // One that reboots before that has another name, and nobody else's.
            let earlier = sh(&twin, "cat /etc/machine-id").await;
            reboot(&twin, ASKED).await;
            let later = sh(&twin, "cat /etc/machine-id").await;
            assert!(
                later.len() == 32 && later != machine_id && earlier != machine_id,
                "{earlier} {later} {machine_id}"
            );
            let random = "head -c 16 /dev/urandom | od -An -tx1";
            assert_ne!(sh(&vm, random).await, sh(&twin, random).await);
            // Its memory is its process's own, or in a file: either is saved as it is now.
            goes_on(&vm).await;
            comes_up_again(&vm, ASKED).await;
            discard(&vm).await;
            discard(&twin).await;
        }
        assert_eq!(farm.left(), [""; 0]);
    });
}

#[test]
fn another_process_finds_a_rebooted_machine_running() {
    let Some(image) = base() else { return };
    let farm = Farm::new(image, false);
    runtime().block_on(async {
        let vm = farm.running("web").await;
        let before = sh(&vm, BOOT_ID).await;
        // Nobody waits for what reboots it, and who comes in the middle of it waits until it is up.
        let command = vm.command("sh").args(["-c", "sleep 1; reboot -f"]).detached(true);
        drop(command.spawn().await.unwrap());
        drop(vm);
        let until = Instant::now() + PATIENCE;
        loop {
            let host = vmkit::Host::new(farm.qemu().clone());
            let found = host.adopt(&id("web")).await.unwrap();
            assert_eq!(found.state(), State::Running);
            if says(&found, BOOT_ID).await != before {
                break discard(&found).await;
            }
            assert!(Instant::now() < until, "it did not reboot");
        }
        assert_eq!(farm.left(), [""; 0]);
    });
}

#[test]
fn a_rebooted_machine_shuts_down_and_boots() {
    let Some(image) = base() else { return };
    let farm = Farm::new(image, false);
    runtime().block_on(async {
        let vm = farm.running("web").await;
        comes_up_again(&vm, ASKED).await;
        let report = vm.stop(PATIENCE).await;
        report.stop.unwrap();
        report.run.unwrap();
        assert!(!report.forced);
        vm.start(ConsoleSinks::discard()).await.unwrap();
        assert_eq!(sh(&vm, "cat /kept; hostname").await, "kept\nweb");
        // Switching itself off is not rebooting.
        let _ = vm.command("poweroff").arg("-f").output().await;
        ends(&vm, &farm.qemu().machine_dir(vm.id())).await;
        vm.stop(Duration::ZERO).await.run.unwrap();
        discard(&vm).await;
    });
}

#[test]
fn a_guest_reboots_and_goes_off_in_good_order() {
    let Some(image) = base() else { return };
    let farm = Farm::new(image, true);
    runtime().block_on(async {
        let vm = farm.running("web").await;
        let machine_id = sh(&vm, "cat /etc/machine-id").await;
        for (how, reboots) in [("reboot", true), ("poweroff", false), ("halt", false)] {
            let before = sh(&vm, BOOT_ID).await;
            // Told that it is to end, and given the time for it.
            let script = "trap 'echo told > /told; exit' TERM; echo > /ready; while :; do sleep 0.1; done";
            let told = vm.command("sh").args(["-c", script]).detached(true);
            drop(told.spawn().await.unwrap());
            sh(&vm, "rm -f /told; until test -e /ready; do sleep 0.1; done; rm /ready").await;
            assert!(vm.command(how).output().await.unwrap().status.success());
            if reboots {
                let until = Instant::now() + PATIENCE;
                let again = async || match vm.command("sh").args(["-c", BOOT_ID]).output().await {
                    Ok(output) => output.status.success() && String::from_utf8_lossy(&output.stdout).trim() != before,
                    Err(error) => {
                        assert_eq!(error.kind(), ErrorKind::Agent, "{error:?}");
                        false
                    }
                };
                while !again().await {
                    assert!(Instant::now() < until, "it did not reboot");
                }
            } else {
                ends(&vm, &farm.qemu().machine_dir(vm.id())).await;
                vm.stop(Duration::ZERO).await.run.unwrap();
                vm.start(ConsoleSinks::discard()).await.unwrap();
            }
            assert_eq!(sh(&vm, "cat /told /etc/machine-id").await, format!("told\n{machine_id}"), "{how}");
        }
        // Whoever switches it off while it is about to reboot counts on that: what does not end when it is told to takes its time.
        let stays = vm.command("sh").args(["-c", "trap '' TERM; while :; do sleep 0.1; done"]).detached(true);
        drop(stays.spawn().await.unwrap());
        assert!(vm.command("reboot").output().await.unwrap().status.success());
        let report = vm.stop(PATIENCE).await;
        report.stop.unwrap();
        assert!(!report.forced);
        assert_eq!(vm.state(), State::Stopped);
        discard(&vm).await;
        assert_eq!(farm.left(), [""; 0]);
    });
}

/// Returns when a machine has ended of itself.
async fn ends(vm: &Instance, dir: &Path) {
    let until = Instant::now() + PATIENCE;
    while vm.state() != State::Stopped {
        assert!(Instant::now() < until, "it is {:?}", vm.state());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(pids_where(|cwd| cwd.starts_with(dir)), [0; 0]);
}

#[test]
fn a_panic_ends_a_machine_and_is_the_reason() {
    let Some(image) = base() else { return };
    let farm = Farm::new(image, false);
    runtime().block_on(async {
        let vm = farm.running("web").await;
        for rebooted in [false, true] {
            if rebooted {
                vm.start(ConsoleSinks::discard()).await.unwrap();
                reboot(&vm, ASKED).await;
            }
            let ended = vm.command("sh").args(["-c", "echo c > /proc/sysrq-trigger; sleep 1000"]).output();
            tokio::time::timeout(PATIENCE, ended).await.unwrap().unwrap_err();
            ends(&vm, &farm.qemu().machine_dir(vm.id())).await;
            let error = vm.stop(Duration::ZERO).await.run.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Exited, "{error:?}");
            assert!(error.details().unwrap().contains("the guest's kernel panicked"), "{error:?}");
        }
        discard(&vm).await;
    });
}

#[test]
fn a_kernel_that_panics_while_it_boots_is_not_booted_again_and_again() {
    let Some(image) = base() else { return };
    let rig = QemuRig::new(image);
    runtime().block_on(async {
        let host = rig.host();
        // Before there is anything that could tell the host so.
        for cmdline in ["rdinit=/none root=/none", "rdinit=/dev/console init=/dev/console"] {
            let image = BootImage { cmdline: cmdline.into(), ..rig.image() };
            let vm = host.create(id("panics"), Spec::new(Source::Boot(image))).await.unwrap();
            vm.clone_source().await.unwrap();
            let error = vm.start(ConsoleSinks::discard()).await.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Exited, "{error:?}");
            assert!(error.message().contains("panicked"), "{error:?}");
            let console = fs::read_to_string(rig.machine(vm.id()).join("serial.log")).unwrap();
            assert_eq!(
                console.matches("Kernel panic - not syncing").count(),
                2,
                "its beginning and its end: {console}"
            );
            assert_eq!((vm.state(), rig.pids(vm.id())), (State::Stopped, vec![]));
            vm.delete().await.unwrap();
        }
    });
}

/// The initramfs without the kernel that is in front of it.
fn archive(rig: &QemuRig) -> PathBuf {
    let whole = fs::read(&rig.image().initramfs).unwrap();
    let at = whole.chunks(4096).position(|page| page.starts_with(b"070701")).unwrap() * 4096;
    let place = rig.dir().join(".initramfs");
    fs::write(&place, &whole[at..]).unwrap();
    place
}

#[test]
fn without_a_loader_a_guest_that_reboots_ends_its_machine() {
    let Some(image) = base() else { return };
    let rig = QemuRig::new(image);
    runtime().block_on(async {
        // As an image whose kernel cannot say that it has given up.
        let image = BootImage { loader: None, initramfs: archive(&rig), ..rig.image() };
        let host = rig.host();
        let vm = host.create(id("plain"), Spec { source: Source::Boot(image), ..rig.spec() }).await.unwrap();
        vm.clone_source().await.unwrap();
        vm.start(ConsoleSinks::discard()).await.unwrap();
        let _ = vm.command("reboot").arg("-f").output().await;
        ends(&vm, &rig.machine(vm.id())).await;
        discard(&vm).await;
    });
}

#[test]
fn a_kernel_that_needs_no_loader_is_held_and_boots_again_too() {
    let Some(image) = base() else { return };
    let rig = QemuRig::new(image);
    runtime().block_on(async {
        let image = BootImage { loader: Some(rig.image().kernel), initramfs: archive(&rig), ..rig.image() };
        let host = rig.host();
        let vm = host.create(id("whole"), Spec { source: Source::Boot(image), ..rig.spec() }).await.unwrap();
        vm.clone_source().await.unwrap();
        vm.start(ConsoleSinks::discard()).await.unwrap();
        goes_on(&vm).await;
        comes_up_again(&vm, ASKED).await;
        discard(&vm).await;
    });
}

#[test]
fn a_small_guest_reboots() {
    let Some(image) = base() else { return };
    let farm = Farm::new(image, true);
    runtime().block_on(async {
        let vm = farm.running_as("small", farm.spec().memory_mib(96)).await;
        reboot(&vm, ASKED).await;
        discard(&vm).await;
    });
}
