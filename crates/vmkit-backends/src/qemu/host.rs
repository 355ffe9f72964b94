//! What this machine can run guests with: which QEMU, and which accelerator works.
//!
//! Starting QEMU to ask for its version costs as much as a fork, and a broken KVM takes seconds to be found out. So the
//! answers are kept beside the machines, for as long as neither QEMU nor this boot changes.

use std::fs;
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use vmkit::{Error, ErrorKind, Result};

use super::arch::ARCH;
use super::{Accelerator, layout};
use crate::process::boot_id;

/// The first version that saves a machine to a file.
const OLDEST: (u32, u32) = (8, 2);
/// How long a guest of a few million instructions may take before KVM counts as not working: milliseconds where it does.
const KVM_WORKS: Duration = Duration::from_secs(3);
const CACHE: &str = ".qemu.json";

/// What this machine can run guests with.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HostFacts {
    /// QEMU's program.
    pub program: PathBuf,
    /// Its version, as it prints it.
    pub version: String,
    /// Why KVM cannot be used; absent when it works.
    pub kvm_problem: Option<String>,
    /// What the above holds for: the program's size and time, and this boot.
    key: String,
}

impl HostFacts {
    /// Finds out, or remembers. Takes up to three seconds the first time on a machine whose KVM is broken; blocks.
    ///
    /// # Errors
    /// [`ErrorKind::MissingDependency`] when there is no QEMU, or one that is too old.
    pub fn find(dir: &Path, program: Option<&Path>) -> Result<HostFacts> {
        let program = match program {
            Some(program) => program.to_owned(),
            None => in_path(ARCH.program).ok_or_else(|| missing(&format!("{} is not installed", ARCH.program)))?,
        };
        let meta =
            fs::metadata(&program).map_err(|_| missing(&format!("there is no QEMU at {}", program.display())))?;
        let boot = boot_id().unwrap_or_default();
        let key = format!("{}:{}:{}:{}:{boot}", meta.dev(), meta.ino(), meta.len(), meta.mtime());
        let cache = dir.join(CACHE);
        let known = fs::read(&cache).ok().and_then(|text| serde_json::from_slice::<HostFacts>(&text).ok());
        if let Some(known) = known.filter(|known| known.program == program && known.key == key) {
            return Ok(known);
        }
        let version = version(&program)?;
        let kvm_problem = kvm_problem(&program);
        let facts = HostFacts { program, version, kvm_problem, key };
        facts.remember(dir, &cache);
        Ok(facts)
    }

    /// It is only a cache: without it, the next one looks again.
    fn remember(&self, dir: &Path, cache: &Path) {
        let aside = dir.join(format!(".qemu.json.{}", std::process::id()));
        let written = serde_json::to_vec(self).map_err(std::io::Error::from).and_then(|text| fs::write(&aside, text));
        if written.and_then(|()| fs::rename(&aside, cache)).is_err() {
            let _ = layout::remove(&aside);
        }
    }

    /// The accelerator to use. One that was asked for by name is used or is an error.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] when KVM was asked for and does not work, with the reason.
    pub fn accelerator(&self, wanted: Accelerator) -> Result<&'static str> {
        match (wanted, &self.kvm_problem) {
            (Accelerator::Tcg, _) | (Accelerator::Auto, Some(_)) => Ok("tcg"),
            (Accelerator::Kvm | Accelerator::Auto, None) => Ok("kvm"),
            (Accelerator::Kvm, Some(problem)) => {
                Err(Error::new(ErrorKind::Unsupported, format!("KVM was asked for and does not work here: {problem}"))
                    .hint("use the accelerator `auto` or `tcg`, or repair KVM: `vmkit doctor`"))
            }
        }
    }
}

fn missing(message: &str) -> Error {
    Error::new(ErrorKind::MissingDependency, message)
        .hint(format!("run `make setup`, or install Debian's package {}; `vmkit doctor` checks again", ARCH.package))
}

fn in_path(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path)
        .map(|dir| dir.join(program))
        .find(|path| rustix::fs::access(path, rustix::fs::Access::EXEC_OK).is_ok())
}

fn version(program: &Path) -> Result<String> {
    let output = std::process::Command::new(program).arg("--version").stdin(Stdio::null()).output();
    let output =
        output.map_err(|error| missing(&format!("{} cannot be started", program.display())).caused_by(error))?;
    let text = String::from_utf8_lossy(&output.stdout);
    let version = text.split_once("version ").and_then(|(_, rest)| rest.split_whitespace().next());
    let Some(version) = version else {
        return Err(missing(&format!("{} is not QEMU, or is broken", program.display()))
            .with_details(String::from_utf8_lossy(&output.stderr)));
    };
    match parse(version) {
        Some(version) if version < OLDEST => {
            let (major, minor) = OLDEST;
            Err(missing(&format!(
                "QEMU {}.{} is too old: suspending to disk needs {major}.{minor}",
                version.0, version.1
            )))
        }
        _ => Ok(version.to_owned()),
    }
}

fn parse(version: &str) -> Option<(u32, u32)> {
    let mut parts = version.split('.');
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

#[cfg(target_arch = "x86_64")]
const KVM_PROGRAM: bool = true;
#[cfg(not(target_arch = "x86_64"))]
const KVM_PROGRAM: bool = false;

/// Why KVM cannot be used. The device proves nothing: it may open, make a machine, and then crawl. So a guest is run.
fn kvm_problem(program: &Path) -> Option<String> {
    if let Err(error) = fs::File::options().read(true).write(true).open("/dev/kvm") {
        return Some(match error.kind() {
            std::io::ErrorKind::NotFound => "there is no /dev/kvm".into(),
            std::io::ErrorKind::PermissionDenied => "/dev/kvm may not be opened (is the user in the group kvm?)".into(),
            _ => format!("/dev/kvm cannot be opened: {error}"),
        });
    }
    if !KVM_PROGRAM {
        return None;
    }
    run_kvm_guest(program).unwrap_or_else(|error| Some(format!("it could not be tried: {error}")))
}

/// A ROM whose first instructions count to sixteen million and then write to the port that ends QEMU with exit code 33.
fn rom() -> Vec<u8> {
    let mut rom = vec![0xF4; 0x10000];
    // mov ecx, 0x1000000; loop: dec ecx; jnz loop; mov al, 0x10; out 0xf4, al; hlt
    let code = [0x66, 0xB9, 0x00, 0x00, 0x00, 0x01, 0x66, 0x49, 0x75, 0xFC, 0xB0, 0x10, 0xE6, 0xF4, 0xF4];
    rom[0xFF80..0xFF80 + code.len()].copy_from_slice(&code);
    // The processor starts 16 bytes below the end: a short jump back.
    rom[0xFFF0..0xFFF2].copy_from_slice(&[0xEB, 0x8E]);
    rom
}

fn run_kvm_guest(program: &Path) -> std::io::Result<Option<String>> {
    let path =
        std::env::temp_dir().join(format!("vmkit-kvm-{}-{:?}.rom", std::process::id(), std::thread::current().id()));
    fs::File::create(&path)?.write_all(&rom())?;
    let spawned = std::process::Command::new(program)
        .args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-accel", "kvm", "-cpu", "host"])
        .args(["-M", "q35", "-m", "16", "-device", "isa-debug-exit,iobase=0xf4,iosize=1", "-bios"])
        .arg(&path)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn();
    let outcome = spawned.and_then(|mut child| {
        let start = Instant::now();
        loop {
            if let Some(status) = child.try_wait()? {
                let output = child.wait_with_output()?;
                let text = String::from_utf8_lossy(&output.stderr);
                let last = text.lines().last().unwrap_or("QEMU says nothing").to_owned();
                return Ok(match status.code() {
                    Some(33) => None,
                    _ => Some(format!("QEMU cannot run a guest with it ({status}; {last})")),
                });
            }
            if start.elapsed() > KVM_WORKS {
                child.kill()?;
                child.wait()?;
                return Ok(Some(format!("a guest that takes milliseconds did not end in {KVM_WORKS:?}")));
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    });
    let _ = fs::remove_file(&path);
    outcome
}

#[cfg(test)]
mod tests {
    use super::*;

    fn facts(kvm_problem: Option<&str>) -> HostFacts {
        let kvm_problem = kvm_problem.map(str::to_owned);
        HostFacts { program: "/qemu".into(), version: "10.0.2".into(), kvm_problem, key: String::new() }
    }

    #[test]
    fn nothing_is_downgraded() {
        let (works, broken) = (facts(None), facts(Some("there is no /dev/kvm")));
        assert_eq!(works.accelerator(Accelerator::Auto).unwrap(), "kvm");
        assert_eq!(works.accelerator(Accelerator::Kvm).unwrap(), "kvm");
        assert_eq!(works.accelerator(Accelerator::Tcg).unwrap(), "tcg");
        assert_eq!(broken.accelerator(Accelerator::Auto).unwrap(), "tcg");
        let error = broken.accelerator(Accelerator::Kvm).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported);
        assert!(error.message().contains("there is no /dev/kvm"));
    }

    #[test]
    fn no_qemu_and_an_old_qemu_say_what_to_install() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let fake = dir.path().join("qemu");
        let error = HostFacts::find(dir.path(), Some(&fake)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::MissingDependency);
        for (text, complaint) in
            [("QEMU emulator version 7.2.9 (Debian)", "too old"), ("something else", "is not QEMU")]
        {
            fs::write(&fake, format!("#!/bin/sh\necho '{text}'\n")).unwrap();
            fs::set_permissions(&fake, fs::Permissions::from_mode(0o755)).unwrap();
            let error = HostFacts::find(dir.path(), Some(&fake)).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::MissingDependency);
            assert!(error.message().contains(complaint), "{error}");
            assert!(error.next_step().unwrap().contains(ARCH.package));
        }
    }

    #[test]
    fn the_answers_are_remembered_until_the_program_changes() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let (fake, count) = (dir.path().join("qemu"), dir.path().join("count"));
        let script = format!("#!/bin/sh\necho x >> {}\necho 'QEMU emulator version 10.1.2'\n", count.display());
        fs::write(&fake, &script).unwrap();
        fs::set_permissions(&fake, fs::Permissions::from_mode(0o755)).unwrap();
        let asked = || fs::read_to_string(&count).unwrap().lines().count();
        let first = HostFacts::find(dir.path(), Some(&fake)).unwrap();
        let once = asked();
        assert_eq!(HostFacts::find(dir.path(), Some(&fake)).unwrap(), first);
        assert_eq!(asked(), once);
        fs::write(&fake, format!("{script}\n# changed")).unwrap();
        HostFacts::find(dir.path(), Some(&fake)).unwrap();
        assert!(asked() > once);
    }
}
