//! Templates, and the machines that are forks of them.

mod common;

use std::collections::HashSet;
use std::fs;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use common::farm::{Farm, discard, sh};
use common::{base, id, pids_where, runtime, tell};
use futures::future::{join_all, try_join_all};
use vmkit::{ConsoleSinks, ErrorKind, Instance, Origin, State, cleanup};

#[test]
fn a_template_is_made_once_and_its_forks_are_born_of_it() {
    let Some(image) = base() else { return };
    let farm = Farm::new(image, true);
    runtime().block_on(async {
        assert!(farm.qemu().template_for(&farm.spec()).unwrap().is_none());
        // Everybody wants it at once.
        let vms = join_all(["a", "b", "c"].map(|name| farm.running(name))).await;
        let templates = farm.qemu().templates().unwrap();
        assert_eq!(templates.len(), 1, "{templates:?}");
        for vm in &vms {
            let birth = vm.properties().birth.unwrap();
            assert_eq!((birth.how, birth.template.as_ref()), (Origin::Fork, Some(&templates[0].key)), "{birth:?}");
            assert!(birth.unused && birth.note.is_none());
            for part in ["random", "clock", "hostname", "machine-id"] {
                assert!(birth.renewed.iter().any(|renewed| renewed == part), "{part}: {birth:?}");
            }
            assert!(birth.phases.iter().map(|phase| phase.ms).sum::<f64>() > 0.0);
        }
        // Another shape is another template.
        let wide = farm.running_as("wide", farm.spec().cpus(2)).await;
        assert_eq!(sh(&wide, "nproc").await, "2");
        assert_eq!(farm.qemu().templates().unwrap().len(), 2);
        // What was forked needs its template no more.
        let key = &templates[0].key;
        farm.qemu().remove_template(key).await.unwrap();
        assert_eq!(farm.qemu().remove_template(key).await.unwrap_err().kind(), ErrorKind::NotFound);
        assert_eq!(sh(&vms[0], "ls / | wc -l; cat /etc/hostname /bin/busybox | wc -c").await.lines().count(), 2);
        vms[0].stop(Duration::from_secs(20)).await.stop.unwrap();
        vms[0].start(ConsoleSinks::discard()).await.unwrap();
        assert_eq!(sh(&vms[0], "hostname").await, "a");
        for vm in vms.iter().chain([&wide]) {
            discard(vm).await;
        }
        assert_eq!(farm.left(), [""; 0]);
    });
}

#[test]
fn a_fork_boots_from_what_it_wrote_and_keeps_who_it_is() {
    let Some(image) = base() else { return };
    let farm = Farm::new(image, false);
    runtime().block_on(async {
        let vm = farm.running("web").await;
        let other = farm.running("other").await;
        sh(&vm, "echo kept > /kept; echo lost > /dev/shm/lost").await;
        let calm = "cd /proc/sys; cat vm/compaction_proactiveness vm/stat_interval kernel/watchdog";
        assert_eq!(sh(&vm, calm).await, "0\n60\n0", "an idle guest is to be left alone");
        let background = "grep -c ' / ext4 .*noinit_itable,no_prefetch_block_bitmaps' /proc/mounts";
        assert_eq!(sh(&vm, background).await, "1", "nor does its file system work by itself");
        let before = sh(&vm, "cat /etc/machine-id").await;
        assert!(!vm.properties().birth.unwrap().renewed.is_empty());
        vm.stop(Duration::from_secs(20)).await.stop.unwrap();
        vm.start(ConsoleSinks::discard()).await.unwrap();
        let disk = "dmesg | grep -c 'vda): mounted'; dmesg | grep -c 'recovery complete' || true";
        assert_eq!(sh(&vm, disk).await, "1\n0", "its disk was not left in order");
        // It booted: its memory is gone, and its disk and its name are not.
        let birth = vm.properties().birth.unwrap();
        assert!(birth.how == Origin::Boot && !birth.unused, "{birth:?}");
        assert_eq!(sh(&vm, "cat /kept; hostname; ls /dev/shm").await, "kept\nweb");
        assert_eq!(sh(&vm, "cat /etc/machine-id").await, before);
        // One that was killed before it could write that down has a name of its own all the same.
        let twin = sh(&other, "cat /etc/machine-id").await;
        other.kill().await.stopped().unwrap();
        other.start(ConsoleSinks::discard()).await.unwrap();
        let own = sh(&other, "cat /etc/machine-id").await;
        assert!(own.len() == 32 && own != before, "{own}, {twin}");
        for vm in [&vm, &other] {
            discard(vm).await;
        }
        assert_eq!(farm.left(), [""; 0]);
    });
}

/// Where these bytes are: in what files of the machine, and in what memory of its process.
fn found(farm: &Farm, vm: &Instance, secret: &[u8]) -> Vec<String> {
    let dir = farm.qemu().machine_dir(vm.id());
    let finder = memchr::memmem::Finder::new(secret);
    let has = |bytes: &[u8]| finder.find(bytes).is_some();
    let files = fs::read_dir(&dir).unwrap().flatten().filter(|entry| entry.file_type().unwrap().is_file());
    let mut places: Vec<String> = files
        .filter(|entry| has(&fs::read(entry.path()).unwrap()))
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    for pid in pids_where(|cwd| cwd.starts_with(&dir)) {
        let memory = fs::File::open(format!("/proc/{pid}/mem")).unwrap();
        let maps = || fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
        for line in maps().lines() {
            let (range, rest) = line.split_once(' ').unwrap();
            let (from, to) = range.split_once('-').unwrap();
            let [from, to] = [from, to].map(|text| u64::from_str_radix(text, 16).unwrap());
            // What the kernel lends it cannot be read so.
            if !rest.starts_with('r') || rest.ends_with("[vvar]") || rest.ends_with("[vsyscall]") {
                continue;
            }
            let mut bytes = vec![0; usize::try_from(to - from).unwrap()];
            match std::os::unix::fs::FileExt::read_exact_at(&memory, &mut bytes, from) {
                Ok(()) if has(&bytes) => places.push(format!("memory {line}")),
                Ok(()) => {}
                // Of a file that is shorter than its mapping; or it is gone by now.
                Err(error) => {
                    let is_gone = || !maps().lines().any(|now| now == line);
                    assert!(rest.contains('/') || rest.contains("[vvar") || is_gone(), "{line}: {error}");
                }
            }
        }
    }
    places
}

#[test]
fn nothing_of_a_machine_survives_its_reset() {
    let Some(image) = base() else { return };
    let farm = Farm::new(image, false);
    let secret = "correct-horse-battery-staple";
    runtime().block_on(async {
        for own in [false, true] {
            let vm = farm.running_as("web", farm.spec().own_memory(own)).await;
            for suspended in [false, true] {
                // In a file on its disk, in one in its memory, and in a process that still runs. Put together in the guest, so
                // that nothing of ours has it in one piece.
                let script = "s=correct-horse-; s=${s}battery-; s=${s}staple; echo $s > /secret; echo $s > /dev/shm/secret; \
                    (sleep 1000; echo $s) > /dev/null 2>&1 & sync";
                sh(&vm, script).await;
                let before = vm.properties();
                if suspended {
                    vm.suspend().await.unwrap();
                }
                let places = found(&farm, &vm, secret.as_bytes());
                let disk = places.iter().any(|place| place == "disk.qcow2");
                let memory = places.iter().any(|place| match suspended {
                    false => place.starts_with("memory "),
                    true => place == "memory" || place == "memory.apart",
                });
                assert!(disk && memory, "the search finds nothing: {places:?}");
                vmkit::reset(&vm, ConsoleSinks::discard(), Duration::from_secs(120)).await.unwrap();
                assert_eq!(vm.state(), State::Running);
                let after = vm.properties();
                let birth = after.birth.unwrap();
                assert!(birth.unused && birth.how == Origin::Fork, "{birth:?}");
                assert!(birth.at > before.birth.unwrap().at && after.pid != before.pid);
                assert_eq!(found(&farm, &vm, secret.as_bytes()), [""; 0]);
                assert_eq!(sh(&vm, "ls /secret /dev/shm/secret 2>&1 | grep -c 'No such'; pidof sleep | wc -w").await, "2\n0");
            }
            discard(&vm).await;
        }
        assert_eq!(farm.left(), [""; 0]);
    });
}

/// Fills memory with what `md5sum -c /dev/shm/sum` knows again.
async fn noise(vm: &Instance, bytes: u32) {
    sh(vm, &format!("head -c {bytes} /dev/urandom > /dev/shm/noise; md5sum /dev/shm/noise > /dev/shm/sum")).await;
}

/// QEMU executes them byte by byte.
#[test]
fn a_translated_guest_has_no_fast_strings() {
    let Some(image) = base() else { return };
    let farm = Farm::new(image, false);
    runtime().block_on(async {
        let vm = farm.running("web").await;
        let flags = sh(&vm, "grep -m1 ^flags /proc/cpuinfo").await;
        let has = |flag: &str| flags.split_whitespace().any(|other| other == flag);
        assert!(has("sse2"), "{flags}");
        if vm.properties().accelerator.as_deref() == Some("tcg") {
            assert!(!has("erms") && !has("fsrm"), "{flags}");
        }
        discard(&vm).await;
    });
}

#[test]
fn a_fork_is_suspended_with_its_memory_and_goes_on() {
    let Some(image) = base() else { return };
    let farm = Farm::new(image, false);
    runtime().block_on(async {
        for own in [false, true] {
            let vm = farm.running_as("web", farm.spec().own_memory(own)).await;
            noise(&vm, 20000000).await;
            // The first time, and when the memory is its own in any case.
            for _ in 0..2 {
                vm.suspend().await.unwrap();
                assert_eq!(vm.state(), State::Suspended);
                let dir = farm.qemu().machine_dir(vm.id());
                assert!(pids_where(|cwd| cwd.starts_with(&dir)).is_empty());
                vm.start(ConsoleSinks::discard()).await.unwrap();
                sh(&vm, "md5sum -c /dev/shm/sum").await;
            }
            discard(&vm).await;
        }
        assert_eq!(farm.left(), [""; 0]);
    });
}

#[test]
fn a_qemu_that_saves_what_is_not_known_saves_as_it_likes() {
    let Some(image) = base() else { return };
    let farm = Farm::new(image, false);
    runtime().block_on(async {
        let vm = farm.running("web").await;
        noise(&vm, 5000000).await;
        let dir = farm.qemu().machine_dir(vm.id());
        // A section that no machine of ours has.
        let bitmap = r#"{"execute": "block-dirty-bitmap-add", "arguments": {"node": "disk", "name": "odd"}}"#;
        let ability = r#"{"capability": "dirty-bitmaps", "state": true}"#;
        let able =
            format!(r#"{{"execute": "migrate-set-capabilities", "arguments": {{"capabilities": [{ability}]}}}}"#);
        tell(&dir, &[bitmap, &able]);
        let error = vm.fork(1).await.unwrap_err();
        assert!(error.kind() == ErrorKind::Unsupported && error.next_step().is_some(), "{error:?}");
        sh(&vm, "md5sum -c /dev/shm/sum").await;
        vm.suspend().await.unwrap();
        assert!(dir.join("state.full").exists() && !dir.join("memory.apart").exists());
        vm.start(ConsoleSinks::discard()).await.unwrap();
        sh(&vm, "md5sum -c /dev/shm/sum").await;
        discard(&vm).await;
        assert_eq!(farm.left(), [""; 0]);
    });
}

#[test]
fn what_an_older_vmkit_suspended_with_its_memory_in_it_goes_on() {
    let Some(image) = base() else { return };
    let farm = Farm::new(image, false);
    runtime().block_on(async {
        let vm = farm.running("web").await;
        noise(&vm, 5000000).await;
        let dir = farm.qemu().machine_dir(vm.id());
        let migrate = r#"{"execute": "migrate", "arguments": {"uri": "file:state.full"}}"#;
        let within = r#"{"execute": "migrate-set-capabilities", "arguments": {"capabilities": [
            {"capability": "x-ignore-shared", "state": false}]}}"#
            .replace('\n', " ");
        tell(&dir, &[r#"{"execute": "stop"}"#, &within, migrate]);
        while !tell(&dir, &[r#"{"execute": "query-migrate"}"#]).contains(r#""status": "completed""#) {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let pids = pids_where(|cwd| cwd.starts_with(&dir));
        std::process::Command::new("kill").args(["-9", &pids[0].to_string()]).status().unwrap();
        drop(vm);
        let vm = loop {
            match farm.host.adopt(&id("web")).await {
                Ok(vm) if vm.state() == State::Suspended => break vm,
                other => {
                    drop(other);
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
            }
        };
        vm.start(ConsoleSinks::discard()).await.unwrap();
        sh(&vm, "md5sum -c /dev/shm/sum").await;
        vm.suspend().await.unwrap();
        vm.start(ConsoleSinks::discard()).await.unwrap();
        sh(&vm, "md5sum -c /dev/shm/sum").await;
        discard(&vm).await;
        assert_eq!(farm.left(), [""; 0]);
    });
}

#[test]
fn no_two_forks_are_twins() {
    const FORKS: usize = 200;
    /// What a guest's clock may differ by, and what asking for it may take beside others.
    const CLOCK: Duration = Duration::from_millis(50);
    let Some(image) = base() else { return };
    let farm = Farm::new(image, false);
    runtime().block_on(async {
        let mut seen: [HashSet<String>; 4] = Default::default();
        let mut late = Vec::new();
        for batch in 0..FORKS / 4 {
            let vms = join_all((0..4).map(|n| {
                let farm = &farm;
                async move { farm.running(&format!("twin-{batch}-{n}")).await }
            }))
            .await;
            for vm in &vms {
                let script = "head -c 16 /dev/urandom | od -An -tx1 | tr -d ' \\n'; echo; cat /etc/machine-id \
                              /proc/sys/kernel/random/boot_id; hostname; adjtimex | grep -E 'time.tv_(sec|usec)'";
                let asked = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
                let said = sh(vm, script).await;
                let answered = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
                let mut lines = said.lines();
                for seen in &mut seen {
                    let line = lines.next().unwrap();
                    assert!(seen.insert(line.to_owned()), "two machines have {line}");
                }
                let mut number = || lines.next().unwrap().split_whitespace().last().unwrap().parse::<u64>().unwrap();
                let (seconds, micros) = (number(), number());
                // Its clock was read at some moment between the question and the answer.
                let clock = Duration::from_secs(seconds) + Duration::from_micros(micros);
                let off = asked.saturating_sub(clock).max(clock.saturating_sub(answered));
                if off > CLOCK {
                    late.push(off);
                }
            }
            try_join_all(vms.iter().map(|vm| cleanup(vm, Duration::ZERO, Duration::from_secs(60)))).await.unwrap();
        }
        assert_eq!(seen.map(|seen| seen.len()), [FORKS; 4]);
        assert!(late.is_empty(), "clocks are wrong by {late:?}");
        assert_eq!(farm.left(), [""; 0]);
    });
}

#[test]
fn a_fork_that_cannot_be_made_its_own_is_not_handed_out() {
    let Some(image) = base() else { return };
    let farm = Farm::new(image, true);
    runtime().block_on(async {
        // The template's guest gets hooks; a machine that boots has no use for them.
        let hook = |script: &str| {
            let path = "/etc/vmkit/fork.d/10-check";
            format!("mkdir -p /etc/vmkit/fork.d && printf '#!/bin/sh\\n{script}\\n' > {path} && chmod 755 {path}")
        };
        let warm = |script: String| ["sh".to_owned(), "-c".into(), script];
        let good = warm(hook("cat /etc/machine-id > /hooked"));
        farm.qemu().build_template(&farm.spec(), &good, true).await.unwrap();
        let vm = farm.running("good").await;
        assert!(vm.properties().birth.unwrap().renewed.contains(&"hook 10-check".to_owned()));
        assert_eq!(sh(&vm, "cat /hooked").await, sh(&vm, "cat /etc/machine-id").await);
        // What it had read before it was saved is another's.
        assert!(vm.properties().birth.unwrap().renewed.contains(&"boot-id".to_owned()));
        discard(&vm).await;

        farm.qemu().build_template(&farm.spec(), &warm(hook("echo because >&2; exit 3")), true).await.unwrap();
        let vm = farm.host.create(id("bad"), farm.spec()).await.unwrap();
        vm.clone_source().await.unwrap();
        let error = vm.start(ConsoleSinks::discard()).await.unwrap_err();
        assert!(error.message().contains("10-check") && error.message().contains("exit code 3"), "{error:?}");
        assert!(error.details().unwrap().contains("because"), "{error:?}");
        assert_eq!(vm.state(), State::Stopped);
        discard(&vm).await;
        // Whoever put it there counts on it.
        let hook = "mkdir -p /etc/vmkit/fork.d && echo : > /etc/vmkit/fork.d/20-forgotten";
        farm.qemu().build_template(&farm.spec(), &warm(hook.into()), true).await.unwrap();
        let vm = farm.host.create(id("forgotten"), farm.spec()).await.unwrap();
        vm.clone_source().await.unwrap();
        let error = vm.start(ConsoleSinks::discard()).await.unwrap_err();
        assert!(error.message().contains("20-forgotten did not start: the guest cannot execute"), "{error:?}");
        discard(&vm).await;
        // A warm-up that fails is no template, and the one before stays.
        let error =
            farm.qemu().build_template(&farm.spec(), &warm("echo why >&2; exit 4".into()), true).await.unwrap_err();
        assert!(error.details().unwrap().contains("why"), "{error:?}");
        assert!(!error.to_string().contains("exit 4"), "arguments are in no error: {error}");
        assert_eq!(farm.qemu().templates().unwrap().len(), 1);
        assert_eq!(farm.left(), [""; 0]);
    });
}

#[test]
fn a_damaged_template_is_an_error_and_another_takes_its_place() {
    let Some(image) = base() else { return };
    let farm = Farm::new(image, true);
    runtime().block_on(async {
        let info = farm.qemu().build_template(&farm.spec(), &[], false).await.unwrap();
        let state = farm.dir.path().join("templates").join(&info.key).join("state");
        fs::remove_file(&state).unwrap();
        fs::write(&state, "not a saved execution").unwrap();
        let vm = farm.host.create(id("web"), farm.spec()).await.unwrap();
        vm.clone_source().await.unwrap();
        let error = vm.start(ConsoleSinks::discard()).await.unwrap_err();
        assert!(error.next_step().unwrap().contains(&info.key), "{error:?}");
        // Nothing of it ran: it is as fresh as before.
        farm.qemu().remove_template(&info.key).await.unwrap();
        vm.start(ConsoleSinks::discard()).await.unwrap();
        assert_eq!(vm.properties().birth.unwrap().how, Origin::Fork);
        // One of which a file is missing is none.
        for file in ["state", "memory", "disk.qcow2"] {
            fs::remove_file(state.with_file_name(file)).unwrap();
            assert!(farm.qemu().template_for(&farm.spec()).unwrap().is_none(), "{file}");
            let again = farm.running("again").await;
            assert_eq!(again.properties().birth.unwrap().how, Origin::Fork);
            assert_eq!(sh(&again, "echo well").await, "well");
            discard(&again).await;
        }
        discard(&vm).await;
        assert_eq!(farm.left(), [""; 0]);
    });
}

/// Zeroes where a guest's kernel was, wherever that was: the first thing it does is a triple fault, and QEMU resets it.
fn damage(memory: &std::path::Path) {
    let mut first = vec![0; 1 << 20];
    let file = fs::File::open(memory).unwrap();
    std::io::Read::read_exact(&mut &file, &mut first).unwrap();
    fs::remove_file(memory).unwrap();
    fs::write(memory, first).unwrap();
    fs::File::options().write(true).open(memory).unwrap().set_len(file.metadata().unwrap().len()).unwrap();
}

#[test]
fn a_guest_that_boots_instead_of_going_on_is_an_error() {
    let Some(image) = base() else { return };
    let farm = Farm::new(image, true);
    runtime().block_on(async {
        let vm = farm.running("web").await;
        sh(&vm, "echo kept > /kept; sync").await;
        vm.suspend().await.unwrap();
        vm.start(ConsoleSinks::discard()).await.unwrap();
        vm.suspend().await.unwrap();
        damage(&farm.qemu().machine_dir(vm.id()).join("memory"));
        let error = vm.start(ConsoleSinks::discard()).await.unwrap_err();
        assert!(error.next_step().unwrap().contains("boots from its disk"), "{error:?}");
        assert_eq!(vm.state(), State::Stopped, "{error:?}");
        vm.start(ConsoleSinks::discard()).await.unwrap();
        assert_eq!(sh(&vm, "cat /kept").await, "kept");
        discard(&vm).await;
        // The same of a template.
        let key = farm.qemu().template_for(&farm.spec()).unwrap().unwrap().key;
        damage(&farm.dir.path().join("templates").join(&key).join("memory"));
        let vm = farm.host.create(id("fork"), farm.spec()).await.unwrap();
        vm.clone_source().await.unwrap();
        let error = vm.start(ConsoleSinks::discard()).await.unwrap_err();
        assert!(error.next_step().unwrap().contains(&key), "{error:?}");
        discard(&vm).await;
        assert_eq!(farm.left(), [""; 0]);
    });
}
