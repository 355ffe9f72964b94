//! `base`: a user land from BusyBox, a shell and the usual tools in one static program.

use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::fs::{AtFlags, CWD, Timespec, Timestamps, utimensat};
use vmkit::{Error, ErrorKind, Result};

use super::ext4::EPOCH;
use crate::elf::Elf;
use crate::run::{not_installed, which};

const DIRS: &[(&str, u32)] = &[
    ("bin", 0o755),
    ("dev", 0o755),
    ("etc", 0o755),
    ("home", 0o755),
    ("lib", 0o755),
    ("mnt", 0o755),
    ("opt", 0o755),
    ("proc", 0o555),
    ("root", 0o700),
    ("run", 0o755),
    ("srv", 0o755),
    ("sys", 0o555),
    ("tmp", 0o1777),
    ("usr/bin", 0o755),
    ("usr/lib", 0o755),
    ("usr/local/bin", 0o755),
    ("usr/share/udhcpc", 0o755),
    ("var/lib", 0o755),
    ("var/log", 0o755),
    ("var/tmp", 0o1777),
];

const FILES: &[(&str, u32, &str)] = &[
    ("etc/passwd", 0o644, "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/nonexistent:/bin/false\n"),
    ("etc/group", 0o644, "root:x:0:\ntty:x:5:\nnogroup:x:65534:\n"),
    ("etc/shadow", 0o600, "root:*:19723:0:99999:7:::\nnobody:*:19723:0:99999:7:::\n"),
    ("etc/hostname", 0o644, "vmkit\n"),
    ("etc/hosts", 0o644, "127.0.0.1 localhost vmkit\n::1 localhost ip6-localhost ip6-loopback\n"),
    ("etc/resolv.conf", 0o644, "nameserver 10.0.2.3\n"),
    ("etc/nsswitch.conf", 0o644, "passwd: files\ngroup: files\nhosts: files dns\n"),
    ("etc/shells", 0o644, "/bin/sh\n"),
    ("etc/machine-id", 0o444, ""),
    ("etc/os-release", 0o644, "NAME=\"vmkit base\"\nID=vmkit-base\nPRETTY_NAME=\"vmkit base (BusyBox)\"\n"),
    (
        "etc/profile",
        0o644,
        "export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin\nexport PS1='\\u@\\h:\\w\\$ '\numask 022\n",
    ),
    ("usr/share/udhcpc/default.script", 0o755, DHCP),
];

/// What BusyBox's DHCP client runs when it has an address.
const DHCP: &str = r#"#!/bin/sh
case $1 in
  deconfig) ip addr flush dev "$interface"; ip link set "$interface" up ;;
  bound|renew)
    ip addr replace "$ip/${mask:-24}" dev "$interface"
    for router in $router; do ip route replace default via "$router" dev "$interface"; break; done
    : >/etc/resolv.conf
    for server in $dns; do echo "nameserver $server" >>/etc/resolv.conf; done ;;
esac
"#;

/// Lays the tree out.
pub(super) fn make(tree: &Path) -> Result<()> {
    let busybox = find()?;
    let failed = |path: &Path, error| Error::io(format!("{} cannot be written", path.display()), error);
    let mode = |path: &Path, mode| fs::set_permissions(path, Permissions::from_mode(mode)).map_err(|e| failed(path, e));
    for (name, bits) in DIRS {
        let path = tree.join(name);
        fs::create_dir_all(&path).map_err(|error| failed(&path, error))?;
        mode(&path, *bits)?;
    }
    for (name, bits, text) in FILES {
        let path = tree.join(name);
        fs::write(&path, text).map_err(|error| failed(&path, error))?;
        mode(&path, *bits)?;
    }
    let own = tree.join("bin/busybox");
    fs::copy(&busybox, &own).map_err(|error| failed(&own, error))?;
    mode(&own, 0o755)?;
    for applet in applets(&busybox)? {
        let path = tree.join("bin").join(applet);
        if path != own {
            symlink("busybox", &path).map_err(|error| failed(&path, error))?;
        }
    }
    // One directory of programs under all its names.
    for (name, target) in [("sbin", "bin"), ("usr/sbin", "bin"), ("var/run", "../run")] {
        let path = tree.join(name);
        symlink(target, &path).map_err(|error| failed(&path, error))?;
    }
    mode(tree, 0o755)?;
    set_times(tree)
}

fn find() -> Result<PathBuf> {
    let missing = |message: String| {
        Error::new(ErrorKind::MissingDependency, message)
            .hint("run `make setup`, or install the package busybox-static")
    };
    let path = which("busybox").ok_or_else(|| not_installed("busybox", "busybox-static"))?;
    let bytes = fs::read(&path).map_err(|error| Error::io(format!("{} cannot be read", path.display()), error))?;
    match Elf::parse(&bytes).map(|elf| elf.is_dynamic()) {
        Ok(false) => Ok(path),
        Err(error) => Err(missing(format!("{} is not a Linux program", path.display())).caused_by(error)),
        Ok(true) => {
            Err(missing(format!("{} is dynamically linked, and a guest has no libraries for it", path.display())))
        }
    }
}

fn applets(busybox: &Path) -> Result<Vec<String>> {
    let output = Command::new(busybox).arg("--list").output();
    let output = output.map_err(|error| Error::io(format!("{} could not be run", busybox.display()), error))?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let mut applets: Vec<String> = text.lines().map(str::to_owned).filter(|name| !name.contains('/')).collect();
    applets.sort();
    applets.dedup();
    match applets.iter().any(|name| name == "sh") {
        true => Ok(applets),
        false => Err(Error::new(ErrorKind::MissingDependency, format!("{} has no shell", busybox.display()))
            .hint("run `make setup`, or install the package busybox-static")),
    }
}

/// Every file has the same time, contents before their directory.
fn set_times(path: &Path) -> Result<()> {
    let failed = |error: std::io::Error| Error::io(format!("{} cannot be read", path.display()), error);
    if path.symlink_metadata().map_err(failed)?.is_dir() {
        for entry in fs::read_dir(path).map_err(failed)? {
            set_times(&entry.map_err(failed)?.path())?;
        }
    }
    let time = Timespec { tv_sec: EPOCH, tv_nsec: 0 };
    let times = Timestamps { last_access: time, last_modification: time };
    utimensat(CWD, path, &times, AtFlags::SYMLINK_NOFOLLOW).map_err(|error| failed(error.into()))
}
