//! Process 1: from the kernel's hand-over to a system in which commands can be executed.
//!
//! ```text
//!  initramfs: /init ── modules ── wait for the root disk ── mount it ── move to it ──▶ proc, sys, dev … ── ports
//! ```
//!
//! The same process stays process 1 in the root disk; the disk needs no agent.

use std::fs;
use std::io;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::fs::{Mode, OFlags};
use rustix::mount::{MountFlags, mount, mount_move};

/// The modules to load, one path a line, in their order.
const MODULES: &str = "/etc/vmkit/modules";
/// Where the root disk is mounted before it becomes the root.
const NEW_ROOT: &str = "/root.new";
/// How long the root disk may take to appear.
const APPEARS: Duration = Duration::from_secs(60);

/// What the kernel's command line says to us.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Init {
    /// `vmkit.root=`: the device of the root disk; absent when the initramfs is all there is.
    pub root: Option<String>,
    /// `vmkit.rootfstype=`.
    pub fstype: Option<String>,
    /// `vmkit.hostname=`.
    pub hostname: Option<String>,
}

impl Init {
    fn parse(cmdline: &str) -> Init {
        let value = |key: &str| {
            cmdline.split_ascii_whitespace().filter_map(|word| word.strip_prefix(key)).next_back().map(str::to_owned)
        };
        Init { root: value("vmkit.root="), fstype: value("vmkit.rootfstype="), hostname: value("vmkit.hostname=") }
    }
}

/// Brings the system up. To be called first thing by process 1, before there are threads.
///
/// # Errors
/// What is missing, in words for the console: the machine cannot be used then.
pub fn init() -> io::Result<()> {
    special(Path::new("/"))?;
    let init = Init::parse(&fs::read_to_string("/proc/cmdline").map_err(|e| says("reading /proc/cmdline", e))?);
    load_modules()?;
    if let Some(root) = &init.root {
        enter(root, init.fstype.as_deref().unwrap_or("ext4"))?;
    }
    // What only makes life easier must not keep a machine from starting.
    let id = super::machine_id::first(Path::new("/")).map_err(|error| says("giving the system a machine id", error));
    for result in [directories(), loopback(), hostname(init.hostname.as_deref()), id, calm()] {
        if let Err(error) = result {
            eprintln!("vmkit-agent: {error}");
        }
    }
    // The console's one sure line: a boot that ends before it never got to its root.
    eprintln!("vmkit-agent {}: up, root {}", env!("CARGO_PKG_VERSION"), init.root.as_deref().unwrap_or("initramfs"));
    Ok(())
}

/// Switches off, for a system that cannot be brought up.
pub fn give_up(error: &io::Error) {
    eprintln!("vmkit-agent: {error}");
    super::shutdown::off();
}

fn says(doing: &str, error: impl Into<io::Error>) -> io::Error {
    let error = error.into();
    io::Error::new(error.kind(), format!("{doing}: {error}"))
}

/// The file systems that show the kernel.
fn special(root: &Path) -> io::Result<()> {
    let usual = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    for (kind, place, flags, data) in [
        ("proc", "proc", usual, None),
        ("sysfs", "sys", usual, None),
        ("devtmpfs", "dev", MountFlags::NOSUID, Some(c"mode=0755")),
    ] {
        let place = root.join(place);
        let _ = fs::create_dir_all(&place);
        match mount(kind, &place, kind, flags, data) {
            // The kernel mounts /dev of itself when it is told to.
            Ok(()) | Err(rustix::io::Errno::BUSY) => {}
            Err(error) => return Err(says(&format!("mounting {}", place.display()), error)),
        }
    }
    Ok(())
}

fn load_modules() -> io::Result<()> {
    let list = match fs::read_to_string(MODULES) {
        Ok(list) => list,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(says(MODULES, error)),
    };
    for path in list.lines().filter(|line| !line.is_empty()) {
        let file =
            rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).map_err(|e| says(path, e))?;
        match rustix::system::finit_module(&file, c"", 0) {
            Ok(()) | Err(rustix::io::Errno::EXIST) => {}
            Err(error) => return Err(says(&format!("loading {path}"), error)),
        }
    }
    Ok(())
}

/// Makes the disk the root, and stays process 1 in it.
fn enter(device: &str, fstype: &str) -> io::Result<()> {
    let since = Instant::now();
    while !Path::new(device).exists() {
        if since.elapsed() > APPEARS {
            let found: Vec<String> = fs::read_dir("/sys/class/block")
                .map(|entries| entries.flatten().map(|e| e.file_name().to_string_lossy().into_owned()).collect())
                .unwrap_or_default();
            let message = format!("the root disk {device} has not appeared; disks here: {}", found.join(" "));
            return Err(io::Error::new(io::ErrorKind::NotFound, message));
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    fs::create_dir_all(NEW_ROOT).map_err(|e| says(NEW_ROOT, e))?;
    mount_root(device, fstype).map_err(|e| says(&format!("mounting {device} as {fstype}"), e))?;
    for place in ["proc", "sys", "dev"] {
        let target = Path::new(NEW_ROOT).join(place);
        let _ = fs::create_dir_all(&target);
        mount_move(Path::new("/").join(place), &target).map_err(|e| says(&format!("moving /{place}"), e))?;
    }
    rustix::process::chdir(NEW_ROOT).map_err(|e| says(NEW_ROOT, e))?;
    // Nothing reads the initramfs again: its memory is the guest's.
    empty_initramfs(Path::new("/"));
    mount_move(".", "/").map_err(|e| says("moving the root", e))?;
    rustix::process::chroot(".").map_err(|e| says("changing the root", e))?;
    rustix::process::chdir("/").map_err(|e| says("changing to the root", e))
}

/// Without the work that ext4 does in the background after a mount, which every fork of a template would go on with: it reads
/// ahead what only a disk that is filled needs, and clears tables that an image of ours has clear. An older kernel does not know
/// the options, and does it.
fn mount_root(device: &str, fstype: &str) -> rustix::io::Result<()> {
    let mount = |options| mount(device, NEW_ROOT, fstype, MountFlags::NOATIME, options);
    let quiet = (fstype == "ext4").then_some(c"noinit_itable,no_prefetch_block_bitmaps");
    match (mount(quiet), quiet) {
        (Err(rustix::io::Errno::INVAL), Some(_)) => mount(None),
        (mounted, _) => mounted,
    }
}

/// Removes the files of the initramfs, and never what is mounted in it.
fn empty_initramfs(dir: &Path) {
    use std::os::unix::fs::MetadataExt;
    let Ok(own) = fs::symlink_metadata(dir) else { return };
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        let Ok(meta) = fs::symlink_metadata(&path) else { continue };
        if meta.dev() != own.dev() {
            continue;
        }
        if meta.is_dir() {
            empty_initramfs(&path);
            let _ = fs::remove_dir(&path);
        } else {
            let _ = fs::remove_file(&path);
        }
    }
}

/// Keeps the kernel from waking an idle guest for housekeeping, several times a second: a host may have hundreds of them, and
/// each wakes a processor and fills its caches. What a kernel does not have is left alone.
fn calm() -> io::Result<()> {
    for (name, value) in [
        // Compacting memory that nobody needs yet; it is still done when somebody does.
        ("vm/compaction_proactiveness", "0"),
        // How old the counters in /proc/vmstat may be, seconds.
        ("vm/stat_interval", "60"),
        // A processor that stands still is one that the host has no time for.
        ("kernel/watchdog", "0"),
    ] {
        match fs::write(format!("/proc/sys/{name}"), value) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(says(&format!("setting {name}"), error)),
        }
    }
    Ok(())
}

fn directories() -> io::Result<()> {
    let usual = MountFlags::NOSUID | MountFlags::NODEV;
    for (kind, place, flags, data) in [
        ("devpts", "/dev/pts", MountFlags::NOSUID | MountFlags::NOEXEC, c"gid=5,mode=620,ptmxmode=666"),
        ("tmpfs", "/dev/shm", usual, c"mode=1777"),
        ("tmpfs", "/run", usual, c"mode=0755"),
        ("tmpfs", "/tmp", usual, c"mode=1777"),
    ] {
        fs::create_dir_all(place).map_err(|e| says(place, e))?;
        mount(kind, place, kind, flags, data).map_err(|e| says(&format!("mounting {place}"), e))?;
    }
    for (link, target) in
        [("/dev/fd", "/proc/self/fd"), ("/dev/stdin", "fd/0"), ("/dev/stdout", "fd/1"), ("/dev/stderr", "fd/2")]
    {
        let _ = std::os::unix::fs::symlink(target, link);
    }
    Ok(())
}

fn hostname(wanted: Option<&str>) -> io::Result<()> {
    let own = fs::read_to_string("/etc/hostname").unwrap_or_default();
    let name = wanted.unwrap_or_else(|| own.trim());
    if name.is_empty() {
        return Ok(());
    }
    rustix::system::sethostname(name.as_bytes()).map_err(|e| says("setting the host name", e))
}

/// Switches the loopback interface on: one netlink message, `RTM_NEWLINK` with `IFF_UP` for interface 1.
fn loopback() -> io::Result<()> {
    use rustix::net::netlink::SocketAddrNetlink;
    use rustix::net::{AddressFamily, SendFlags, SocketFlags, SocketType, sendto, socket_with};
    const RTM_NEWLINK: u16 = 16;
    const NLM_F_REQUEST: u16 = 1;
    const IFF_UP: u32 = 1;
    let mut message = Vec::with_capacity(32);
    message.extend_from_slice(&32u32.to_ne_bytes());
    message.extend_from_slice(&RTM_NEWLINK.to_ne_bytes());
    message.extend_from_slice(&NLM_F_REQUEST.to_ne_bytes());
    message.extend_from_slice(&[0; 8]);
    // Any family, any type; the loopback interface is always the first.
    message.extend_from_slice(&[0; 4]);
    message.extend_from_slice(&1u32.to_ne_bytes());
    message.extend_from_slice(&IFF_UP.to_ne_bytes());
    message.extend_from_slice(&IFF_UP.to_ne_bytes());
    // Without a protocol it is the routing one.
    let socket = socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, None)
        .map_err(|e| says("the loopback interface", e))?;
    sendto(&socket, &message, SendFlags::empty(), &SocketAddrNetlink::new(0, 0))
        .map_err(|e| says("the loopback interface", e))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_word_counts() {
        let init = Init::parse("quiet vmkit.root=/dev/vda vmkit.rootfstype=ext4 vmkit.hostname=a vmkit.hostname=b\n");
        assert_eq!(init.root.as_deref(), Some("/dev/vda"));
        assert_eq!(init.fstype.as_deref(), Some("ext4"));
        assert_eq!(init.hostname.as_deref(), Some("b"));
        assert_eq!(Init::parse("quiet"), Init::default());
    }
}
