//! The guest: a kernel, and an initramfs with nothing in it but a shell on a port.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::cpio;
use super::{Error, Result};

/// The port's node in the guest: the first port after the console's, which is number 0.
const PORT: &str = "/dev/vport0p1";
/// What the guest's shell says before it reads its first command.
pub(super) const GREETING: &[u8] = b"listening\n";
/// What reaches the port, in the order in which they need each other. A kernel that has one built in has no module of it.
const MODULES: &[&str] =
    &["virtio_ring", "virtio", "virtio_pci_legacy_dev", "virtio_pci_modern_dev", "virtio_pci", "virtio_console"];

/// What is booted.
#[derive(Clone, Debug)]
pub struct Guest {
    /// The kernel.
    pub kernel: PathBuf,
    /// The initramfs, compressed.
    pub initramfs: PathBuf,
}

impl Guest {
    /// Makes the initramfs, in `dir`, with the busybox in `PATH` and with the kernel's modules as they are in the initramfs
    /// `modules_from`.
    ///
    /// # Errors
    /// When a program is missing, `modules_from` is not an archive of modules, or `dir` cannot be written to.
    pub fn make(dir: &Path, kernel: &Path, modules_from: &Path) -> Result<Guest> {
        let read = |path: &Path| fs::read(path).map_err(Error::io(format!("{} cannot be read", path.display())));
        let source = read(modules_from)?;
        let modules = archive_in(&source).and_then(modules).ok_or_else(|| {
            Error::Setup(format!("{} has no modules: the floor needs the image `base`", modules_from.display()))
        })?;
        let busybox = in_path("busybox").ok_or_else(|| Error::Missing("busybox".into()))?;
        let archive = archive(&read(&busybox)?, &modules);
        let initramfs = dir.join("initramfs.gz");
        compress(&archive, &initramfs)?;
        Ok(Guest { kernel: kernel.to_owned(), initramfs })
    }
}

/// The archive in an initramfs, which may have a kernel in front of it, in whole pages.
fn archive_in(initramfs: &[u8]) -> Option<&[u8]> {
    let at = (0..initramfs.len()).step_by(4096).find(|&at| initramfs[at..].starts_with(cpio::MAGIC))?;
    Some(&initramfs[at..])
}

/// The modules that the guest needs, of those in an archive.
fn modules(initramfs: &[u8]) -> Option<Vec<(&'static str, &[u8])>> {
    let entries = cpio::read(initramfs)?;
    let find = |module: &str| {
        let file = format!("/{module}.ko");
        entries.iter().find(|(name, _)| name.ends_with(&file)).map(|(_, content)| *content)
    };
    let found: Vec<_> = MODULES.iter().filter_map(|&module| Some((module, find(module)?))).collect();
    (!found.is_empty()).then_some(found)
}

fn archive(busybox: &[u8], modules: &[(&str, &[u8])]) -> Vec<u8> {
    let mut archive = cpio::Writer::default();
    for dir in ["bin", "dev", "lib", "proc", "sys"] {
        archive.directory(dir);
    }
    archive.program("bin/busybox", busybox);
    for (module, content) in modules {
        archive.program(&format!("lib/{module}.ko"), content);
    }
    archive.program("init", init(modules).as_bytes());
    archive.finish()
}

fn init(modules: &[(&str, &[u8])]) -> String {
    let mut script = String::from("#!/bin/busybox sh\nbb=/bin/busybox\n");
    for (kind, at) in [("proc", "/proc"), ("sysfs", "/sys"), ("devtmpfs", "/dev")] {
        script += &format!("$bb mount -t {kind} {kind} {at}\n");
    }
    for (module, _) in modules {
        script += &format!("$bb insmod /lib/{module}.ko\n");
    }
    // Opened too early, the node would become an ordinary file: so it is waited for.
    script += &format!("$bb --install -s /bin\nexport PATH=/bin\nuntil [ -c {PORT} ]; do usleep 10000; done\n");
    let greeting = String::from_utf8_lossy(GREETING);
    script + &format!("exec 0<>{PORT} 1<&0 2<&0\necho {}\nexec sh\n", greeting.trim_end())
}

/// Compressed, though a guest under TCG takes longer to unpack it than to have it copied: that is how distributions ship
/// theirs, so it belongs to what booting costs.
fn compress(archive: &[u8], to: &Path) -> Result<()> {
    let failed = || Error::io(format!("{} cannot be written with gzip", to.display()));
    let file = File::create(to).map_err(failed())?;
    let mut gzip =
        Command::new("gzip").arg("-1").stdin(Stdio::piped()).stdout(file).spawn().map_err(Error::start("gzip"))?;
    // Its end is dropped here, so that gzip comes to an end too.
    let written = gzip.stdin.take().map_or(Ok(()), |mut into| into.write_all(archive));
    let ended = gzip.wait().map_err(failed())?;
    written.map_err(failed())?;
    match ended.success() {
        true => Ok(()),
        false => Err(Error::Setup(format!("gzip ended with {ended}"))),
    }
}

fn in_path(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|dir| dir.join(program)).find(|file| file.is_file())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image() -> Vec<u8> {
        let mut image = cpio::Writer::default();
        for name in ["lib/modules/virtio_console.ko", "lib/modules/ext4.ko", "lib/modules/virtio.ko", "init"] {
            image.program(name, name.as_bytes());
        }
        image.finish()
    }

    #[test]
    fn modules_are_loaded_in_order_and_only_those_that_are_needed() {
        let image = image();
        let modules = modules(&image).unwrap();
        assert_eq!(modules.iter().map(|(name, _)| *name).collect::<Vec<_>>(), ["virtio", "virtio_console"]);
        let script = init(&modules);
        let at = |text: &str| script.find(text).unwrap_or_else(|| panic!("{text} is missing in {script}"));
        assert!(at("insmod /lib/virtio.ko") < at("insmod /lib/virtio_console.ko"));
        assert!(at("insmod /lib/virtio_console.ko") < at("until") && at("until") < at("echo listening"));
    }

    #[test]
    fn what_has_no_modules_is_refused() {
        assert_eq!(modules(b"\x1f\x8bcompressed"), None);
        assert_eq!(modules(&cpio::Writer::default().finish()), None);
    }

    #[test]
    fn directories_come_before_what_is_in_them() {
        let bytes = archive(b"busybox", &[("virtio", b"module")]);
        let names: Vec<_> = cpio::read(&bytes).unwrap().into_iter().map(|(name, _)| name).collect();
        for (at, name) in names.iter().enumerate() {
            if let Some((dir, _)) = name.rsplit_once('/') {
                assert!(names[..at].contains(&dir), "{name}");
            }
        }
    }
}
