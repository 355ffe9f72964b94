//! What only real machines can show.

mod common;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

use tokio::io::AsyncReadExt;
use tokio::time::{Instant, timeout};
use vmkit::conformance::Rig;
use vmkit::{BootImage, ConsoleSinks, ErrorKind, Host, Instance, Source, Spec, State, Timeouts, cleanup};
use vmkit_backends::qemu::{Accelerator, Qemu, QemuConfig};

use common::{QemuRig, base, id, pids_where, runtime};

/// Runs a test on a directory of machines of its own.
fn with_rig(test: impl AsyncFnOnce(&QemuRig, &Host<Qemu>)) {
    let Some(image) = base() else { return };
    let rig = QemuRig::new(image);
    runtime().block_on(async {
        let host = rig.host();
        test(&rig, &host).await;
        for found in host.list().await.unwrap() {
            let vm = host.adopt(&found.id).await.unwrap();
            cleanup(&vm, Duration::ZERO, Duration::from_secs(60)).await.unwrap();
        }
    });
    assert_eq!(pids_where(|cwd| cwd.starts_with(rig.dir())), [0; 0], "processes are left");
}

async fn says(vm: &Instance, script: &str) -> String {
    let output = vm.command("sh").args(["-c", script]).output().await.unwrap();
    assert!(output.status.success(), "{script}: {output:?}");
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

async fn clone(host: &Host<Qemu>, name: &str, spec: Spec) -> Instance {
    let vm = host.create(id(name), spec).await.unwrap();
    vm.clone_source().await.unwrap();
    vm
}

/// Resident memory of a process of this machine, in KiB.
fn resident(pid: &str) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap().trim().trim_end_matches(" kB").parse().unwrap()
}

#[test]
fn a_counter_in_memory_goes_on_after_suspend_and_resume() {
    with_rig(async |rig, host| {
        let vm = rig.running(host, "counter").await;
        says(&vm, "(while :; do echo >> /dev/shm/n; sleep 0.05; done) >/dev/null 2>&1 & sleep 1").await;
        assert_eq!(rig.status(vm.id()).as_deref(), Some("running"));
        let before: u64 = says(&vm, "wc -l < /dev/shm/n").await.parse().unwrap();
        vm.suspend().await.unwrap();
        // Long enough for a clock that stands still to be told from one that goes.
        tokio::time::sleep(Duration::from_secs(10)).await;
        assert_eq!(rig.pids(vm.id()), [0; 0], "a suspended machine has a process");
        assert!(rig.status(vm.id()).is_none());
        // As another process would: nothing of this one's memory helps.
        let elsewhere = rig.host();
        let vm = elsewhere.adopt(vm.id()).await.unwrap();
        assert_eq!(vm.state(), State::Suspended);
        vm.start(ConsoleSinks::discard()).await.unwrap();
        assert_eq!(rig.status(vm.id()).as_deref(), Some("running"));
        let after: u64 = says(&vm, "wc -l < /dev/shm/n").await.parse().unwrap();
        assert!(after >= before, "the counter began anew: {before}, then {after}");
        let clock: i64 = says(&vm, "date +%s").await.parse().unwrap();
        let ours = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs() as i64;
        assert!((clock - ours).abs() <= 5, "the guest's clock is {} s behind", ours - clock);
        let later: u64 = says(&vm, "sleep 1; wc -l < /dev/shm/n").await.parse().unwrap();
        assert!(later > after, "the counter stands still at {after}");
    });
}

#[test]
fn a_gigabyte_passes_at_constant_memory() {
    const GIB: u64 = 1 << 30;
    with_rig(async |rig, host| {
        let vm = rig.running(host, "flood").await;
        let mut child =
            vm.command("dd").args(["if=/dev/zero", "bs=64k", "count=16384"]).stdout(true).spawn().await.unwrap();
        let mut stdout = child.stdout.take().unwrap();
        let (mut total, mut buffer) = (0, vec![0; 256 << 10]);
        let (mut ours, mut agents) = (Vec::new(), Vec::new());
        while total < GIB {
            let read = stdout.read(&mut buffer).await.unwrap();
            assert!(read > 0, "the stream ended after {total} bytes");
            assert!(buffer[..read].iter().all(|byte| *byte == 0));
            if total / (GIB / 8) != (total + read as u64) / (GIB / 8) {
                ours.push(resident("self"));
                agents.push(says(&vm, "grep VmRSS /proc/1/status | tr -dc 0-9").await.parse::<u64>().unwrap());
            }
            total += read as u64;
        }
        assert_eq!(stdout.read(&mut buffer).await.unwrap(), 0);
        assert!(child.wait().await.unwrap().success());
        for (who, sizes) in [("this process", ours), ("the agent", agents)] {
            let growth = sizes.iter().max().unwrap() - sizes[0];
            assert!(growth < 16 << 10, "{who} grew by {growth} KiB: {sizes:?}");
        }
    });
}

#[test]
fn sixty_four_commands_at_once() {
    with_rig(async |rig, host| {
        let vm = rig.running(host, "many").await;
        let commands: Vec<_> = (0..64)
            .map(|n| {
                let command = vm
                    .command("sh")
                    .args(["-c", "cat; echo $0; exit $1"])
                    .arg(format!("number {n}"))
                    .arg(n.to_string());
                tokio::spawn(async move { (n, command.stdin(false).output().await) })
            })
            .collect();
        for command in commands {
            let (n, output) = command.await.unwrap();
            let output = output.unwrap();
            assert_eq!(output.status.code(), Some(n));
            assert_eq!(output.stdout, format!("number {n}\n").into_bytes());
        }
    });
}

#[test]
fn a_guest_that_ignores_the_power_button_is_forced_at_its_grace() {
    with_rig(async |rig, host| {
        let vm = rig.running(host, "deaf").await;
        // Its processors stand still: it hears neither its agent nor the button.
        rig.tell(vm.id(), "stop");
        let grace = Duration::from_secs(3);
        let start = Instant::now();
        let report = vm.stop(grace).await;
        report.stop.unwrap();
        report.run.unwrap();
        assert!(report.forced && start.elapsed() >= grace, "forced: {}, after {:?}", report.forced, start.elapsed());
        assert_eq!(vm.state(), State::Stopped);
        assert_eq!(rig.pids(vm.id()), [0; 0]);
    });
}

#[test]
fn a_guest_without_a_root_fails_at_once_and_says_why() {
    with_rig(async |rig, host| {
        let image = BootImage { cmdline: "vmkit.root=/dev/vda vmkit.rootfstype=vfat".into(), ..rig.image() };
        let vm = clone(host, "rootless", Spec::new(Source::Boot(image))).await;
        let start = Instant::now();
        let error = vm.start(ConsoleSinks::discard()).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Exited, "{error:?}");
        assert!(error.details().unwrap().contains("mounting"), "{error:?}");
        assert!(start.elapsed() < Timeouts::default().start / 2, "it took {:?} to fail", start.elapsed());
        assert_eq!(vm.state(), State::Stopped);
    });
}

#[test]
fn a_qemu_that_ends_while_starting_fails_at_once_with_what_it_said() {
    with_rig(async |rig, host| {
        let kernel = rig.dir().join(".kernel");
        fs::write(&kernel, "no kernel").unwrap();
        let image = BootImage { kernel: kernel.clone(), loader: Some(kernel), ..rig.image() };
        let vm = clone(host, "kernelless", Spec::new(Source::Boot(image))).await;
        let error = vm.start(ConsoleSinks::discard()).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Exited, "{error:?}");
        assert!(error.details().unwrap().contains("kernel"), "{error:?}");
        assert_eq!(vm.state(), State::Stopped);
        vm.delete().await.unwrap();
    });
}

#[test]
fn a_boot_that_does_not_finish_fails_at_its_deadline() {
    with_rig(async |rig, host| {
        let timeouts = Timeouts { start: Duration::from_secs(2), ..Timeouts::default() };
        // A guest that waits for ever before it is up.
        let image = BootImage { cmdline: "vmkit.root=/dev/vdz".into(), ..rig.image() };
        let vm = clone(host, "slow", Spec::new(Source::Boot(image)).timeouts(timeouts)).await;
        let error = vm.start(ConsoleSinks::discard()).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::TimedOut, "{error:?}");
        assert_eq!(vm.state(), State::Stopped);
        assert_eq!(rig.pids(vm.id()), [0; 0]);
    });
}

#[test]
fn a_recycled_pid_is_never_signalled() {
    with_rig(async |rig, host| {
        let vm = rig.running(host, "recycled").await;
        let mut bystander = std::process::Command::new("sleep").arg("600").spawn().unwrap();
        // Its process has ended, and its pid is somebody else's now.
        rig.kill_process(vm.id()).await;
        let path = rig.machine(vm.id()).join("run.json");
        let mut run: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        run["process"]["pid"] = bystander.id().into();
        fs::write(&path, run.to_string()).unwrap();
        let elsewhere = rig.host();
        let found = elsewhere.adopt(vm.id()).await.unwrap();
        assert_eq!(found.state(), State::Stopped);
        found.kill().await.stop.unwrap();
        found.delete().await.unwrap();
        assert!(bystander.try_wait().unwrap().is_none(), "a bystander was killed");
        bystander.kill().unwrap();
        bystander.wait().unwrap();
    });
}

#[test]
fn a_forced_stop_finds_a_process_that_its_starter_has_not_recorded_yet() {
    with_rig(async |rig, host| {
        let vm = clone(host, "unrecorded", rig.spec()).await;
        // Another process stands still in the middle of a start: it has the lock and a QEMU, and has written nothing.
        let lock = fs::File::create(rig.dir().join(".locks/unrecorded")).unwrap();
        rustix::fs::flock(&lock, rustix::fs::FlockOperation::NonBlockingLockExclusive).unwrap();
        let start = vmkit::Action::ALL.iter().position(|action| *action == vmkit::Action::Start).unwrap();
        lock.set_len(start as u64).unwrap();
        let program = rig.dir().join("qemu-system-stand-in");
        fs::copy("/bin/sleep", &program).unwrap();
        let mut qemu =
            std::process::Command::new(&program).arg("600").current_dir(rig.machine(vm.id())).spawn().unwrap();
        let elsewhere = rig.host();
        let found = elsewhere.adopt(vm.id()).await.unwrap();
        assert_eq!(found.state(), State::Starting);
        found.kill().await.stop.unwrap();
        let left = qemu.try_wait().unwrap();
        qemu.kill().unwrap();
        qemu.wait().unwrap();
        assert!(left.is_some(), "it was said to be off, and its process runs");
        drop(lock);
    });
}

#[test]
fn what_the_last_process_left_listening_is_not_taken_for_the_next_one() {
    with_rig(async |rig, host| {
        let vm = clone(host, "stale", rig.spec()).await;
        let dir = rig.machine(vm.id());
        // A QEMU that was killed and is not gone yet: it is connected to, and resets the connection, or never answers.
        for resumed in [false, true] {
            let stale: Vec<_> = ["agent.0.sock", "qmp.sock"]
                .iter()
                .map(|name| {
                    let _ = fs::remove_file(dir.join(name));
                    std::os::unix::net::UnixListener::bind(dir.join(name)).unwrap()
                })
                .collect();
            vm.start(ConsoleSinks::discard()).await.unwrap();
            assert_eq!(says(&vm, "echo up").await, "up");
            drop(stale);
            if !resumed {
                vm.suspend().await.unwrap();
            }
        }
    });
}

#[test]
fn damaged_machines_are_shown_and_can_be_deleted() {
    with_rig(async |rig, host| {
        for (name, damage) in [("record", "vm.json"), ("disk", "disk.qcow2")] {
            clone(host, name, rig.spec()).await;
            let file = rig.machine(&id(name)).join(damage);
            match damage {
                "vm.json" => fs::write(file, "{ half").unwrap(),
                _ => fs::remove_file(file).unwrap(),
            }
        }
        let elsewhere = rig.host();
        let found = elsewhere.list().await.unwrap();
        assert_eq!(found.len(), 2);
        for found in found {
            assert_eq!(found.state, State::ErrorUnknown);
            assert!(found.problem.is_some(), "{found:?}");
            let vm = elsewhere.adopt(&found.id).await.unwrap();
            assert_eq!(vm.start(ConsoleSinks::discard()).await.unwrap_err().kind(), ErrorKind::IllegalRequest);
            vm.delete().await.unwrap();
            assert!(!rig.machine(&found.id).exists());
        }
    });
}

#[test]
fn an_accelerator_asked_for_by_name_is_used_or_is_an_error() {
    with_rig(async |rig, _| {
        let facts = rig.qemu().host_facts().unwrap();
        let host =
            |accelerator| Host::new(Qemu::new(QemuConfig { accelerator, ..QemuConfig::new(rig.dir()) }).unwrap());
        let vm = clone(&host(Accelerator::Tcg), "tcg", rig.spec()).await;
        vm.start(ConsoleSinks::discard()).await.unwrap();
        assert_eq!(vm.properties().accelerator.as_deref(), Some("tcg"));
        let kvm = host(Accelerator::Kvm).create(id("kvm"), rig.spec()).await;
        match facts.kvm_problem {
            Some(_) => assert_eq!(kvm.unwrap_err().kind(), ErrorKind::Unsupported),
            None => drop(kvm.unwrap()),
        }
    });
}

#[test]
fn a_qemu_that_is_too_old_is_refused() {
    with_rig(async |rig, _| {
        let program = rig.dir().join(".old-qemu");
        fs::write(&program, "#!/bin/sh\necho QEMU emulator version 7.2.0\n").unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        let old = Qemu::new(QemuConfig { program: Some(program), ..QemuConfig::new(rig.dir()) }).unwrap();
        let error = Host::new(old).create(id("old"), rig.spec()).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::MissingDependency, "{error:?}");
    });
}

#[test]
fn processes_share_the_lines_to_one_guest() {
    with_rig(async |rig, host| {
        let vm = rig.running(host, "shared").await;
        let mut others = Vec::new();
        for _ in 0..7 {
            // Each host has a session of its own, as each process would.
            let other = rig.host().adopt(vm.id()).await.unwrap();
            assert_eq!(says(&other, "echo here").await, "here");
            others.push(other);
        }
        let late = rig.host().adopt(vm.id()).await.unwrap();
        let waiting = tokio::spawn(async move { late.ping().await });
        drop(others.pop());
        timeout(Duration::from_secs(60), waiting).await.unwrap().unwrap().unwrap();
    });
}

#[test]
fn deep_directories_are_no_problem() {
    let Some(image) = base() else { return };
    let rig = QemuRig::new(image);
    runtime().block_on(async {
        // Deeper than a socket's address can say.
        let deep = rig.dir().join("d".repeat(120)).join("e".repeat(120));
        fs::create_dir_all(&deep).unwrap();
        let host = Host::new(Qemu::new(QemuConfig::new(&deep)).unwrap());
        let vm = clone(&host, "deep", rig.spec()).await;
        vm.start(ConsoleSinks::discard()).await.unwrap();
        assert_eq!(says(&vm, "echo deep").await, "deep");
        vm.suspend().await.unwrap();
        vm.start(ConsoleSinks::discard()).await.unwrap();
        cleanup(&vm, Duration::ZERO, Duration::from_secs(60)).await.unwrap();
    });
}
