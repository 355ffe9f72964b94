//! A guest that goes on from a saved execution: its clock stood still, its random numbers may have been used before, and when the
//! execution was another's, so was everything that tells one guest from another.

use std::fs::{self, File, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::ioctl::{NoArg, Opcode, opcode};
use rustix::mount::mount_bind;
use rustix::process::{Pid, Signal, kill_process};
use rustix::time::{ClockId, Timespec, clock_gettime, clock_settime};

use super::machine_id::{self, MachineId};
use super::{Inner, lock, spawn};
use crate::protocol::{ExecRequest, Exit, Fork, Renew, Renewed};

/// Tells the kernel to draw from its pool anew: `RNDRESEEDCRNG` of `linux/random.h`.
const RESEED: Opcode = opcode::none(b'R', 7);
/// Where users put what only they can renew: programs, executed in the order of their names.
const HOOKS: &str = "/etc/vmkit/fork.d";
/// How long each of them may take, and making a key.
const PATIENCE: Duration = Duration::from_secs(60);
const SSH: &str = "/etc/ssh";
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// What was made ready while there was time: a guest that goes on does everything for the first time, and looking for what is not
/// there is much to do.
pub(super) struct Prepared {
    /// The machine id, if the system has one; an error where only the file itself can be written.
    id: io::Result<Option<MachineId>>,
    /// What programs see as the kernel's name of this boot; absent where nothing can be put over the kernel's own.
    boot_id: Option<File>,
    /// Whether there are host keys to be renewed.
    keys: bool,
    /// Whether there are hooks to be executed.
    hooks: bool,
}

/// Gets ready for being saved as what others go on from. With `rests` it will not go on itself.
pub(super) fn prepare(agent: &Inner, rests: bool) {
    let mut prepared = lock(&agent.prepared);
    let (id, boot_id) = match prepared.take() {
        // It has been somebody of its own since.
        Some(Prepared { id: Ok(id), boot_id, .. }) => {
            (id.as_ref().map_or(Ok(()), MachineId::clear).map(|()| id), boot_id)
        }
        Some(Prepared { boot_id, .. }) => (MachineId::prepare(), boot_id),
        None => (MachineId::prepare(), None),
    };
    // Nothing lies over it in one that goes on: a mount there is in the way of those who mount another `/proc`. And it is not read:
    // unless somebody did, each kernel will have one of its own.
    let boot_id = boot_id.or_else(|| if rests { cover_boot_id(&uuid([0; 16])).ok() } else { None });
    let (keys, hooks) = (!host_keys(Path::new(SSH)).is_empty(), !hooks(Path::new(HOOKS)).is_empty());
    *prepared = Some(Prepared { id, boot_id, keys, hooks });
}

/// Writes down for good what was only noted.
pub(super) fn settle(agent: &Inner) {
    if let Some(Prepared { id: Ok(Some(id)), .. }) = &*lock(&agent.prepared)
        && let Err(error) = id.settle()
    {
        eprintln!("vmkit-agent: the machine id could not be written: {error}");
    }
}

/// The same, for the last time: a disk with files that are open for writing cannot be left in order.
pub(super) fn settle_for_good(agent: &Inner) {
    settle(agent);
    lock(&agent.prepared).take();
}

/// All of it, or an error that says what could not be done: nobody is to get a guest that is somebody else too.
pub(super) async fn apply(renew: &Renew, agent: &Inner) -> Result<Renewed, String> {
    agent.running.goes_on();
    // First of all: what is drawn from here on is this guest's own.
    let reseeded = match &agent.pool {
        Some(pool) => reseed(pool, &renew.seed),
        None => pool().and_then(|pool| reseed(&pool, &renew.seed)),
    };
    reseeded.map_err(|error| format!("the guest could not renew its random numbers: {error}"))?;
    let mut what = vec!["random".to_owned()];
    // The guest counts what went by since it was left, and the host when it went on; between the two it stood still.
    let since = lock(&agent.left).take().map_or(0, |left| nanos(clock_gettime(ClockId::Monotonic)) - nanos(left));
    set_clock(renew.now.saturating_add(u64::try_from(since).unwrap_or(0)))?;
    what.push("clock".into());
    if let Some(fork) = &renew.fork {
        become_another(fork, agent, &mut what).await?;
    }
    let clock = u64::try_from(nanos(clock_gettime(ClockId::Realtime))).unwrap_or(0);
    Ok(Renewed { what, clock })
}

/// Sets the clock, nanoseconds since 1970.
pub(super) fn set_clock(now: u64) -> Result<(), String> {
    let now = Timespec { tv_sec: (now / 1_000_000_000) as i64, tv_nsec: (now % 1_000_000_000) as i64 };
    clock_settime(ClockId::Realtime, now).map_err(|error| format!("the guest could not set its clock: {error}"))
}

fn nanos(time: Timespec) -> i64 {
    time.tv_sec.saturating_mul(1_000_000_000).saturating_add(time.tv_nsec)
}

async fn become_another(fork: &Fork, agent: &Inner, what: &mut Vec<String>) -> Result<(), String> {
    rustix::system::sethostname(fork.hostname.as_bytes())
        .map_err(|error| format!("the guest could not be named {:?}: {error}", fork.hostname))?;
    what.push("hostname".into());
    let covered = || cover_boot_id(&uuid(fork.boot_id)).ok().map(|_| Ok(()));
    let (renewed, boot_id, keys, hooks) = match &*lock(&agent.prepared) {
        Some(Prepared { id: Ok(id), boot_id, keys, hooks, .. }) => (
            id.as_ref().map_or(Ok(false), |id| id.renew(fork.machine_id)),
            boot_id.as_ref().map(|file| renew_boot_id(file, fork.boot_id)).or_else(covered),
            *keys,
            *hooks,
        ),
        _ => (machine_id::renew(Path::new("/"), fork.machine_id), covered(), true, true),
    };
    if renewed.map_err(|error| format!("the guest could not renew its machine id: {error}"))? {
        what.push("machine-id".into());
    }
    if let Some(renewed) = boot_id {
        renewed.map_err(|error| format!("the guest could not renew its boot id: {error}"))?;
        what.push("boot-id".into());
    }
    let keys = if keys { host_keys(Path::new(SSH)) } else { Vec::new() };
    for (kind, key) in &keys {
        renew_host_key(kind, key, agent).await?;
    }
    if !keys.is_empty() {
        // Whatever ends it from here on, the others' keys are not there any more.
        rustix::fs::sync();
        what.push("ssh-host-keys".into());
        // One that runs already has read the old ones.
        let pid = fs::read_to_string("/run/sshd.pid").ok().and_then(|pid| Pid::from_raw(pid.trim().parse().ok()?));
        pid.map(|pid| kill_process(pid, Signal::HUP));
    }
    for hook in if hooks { self::hooks(Path::new(HOOKS)) } else { Vec::new() } {
        let name = hook.file_name().unwrap_or_default().to_string_lossy().into_owned();
        execute(&hook.to_string_lossy(), &[], agent).await.map_err(|how| format!("the guest's hook {name} {how}"))?;
        what.push(format!("hook {name}"));
    }
    Ok(())
}

pub(super) fn pool() -> io::Result<File> {
    File::options().write(true).open("/dev/urandom")
}

fn reseed(mut pool: &File, seed: &[u8; 32]) -> io::Result<()> {
    pool.write_all(seed)?;
    match draw_anew(pool) {
        // Older kernels have no such call: what was written is in the pool all the same.
        Ok(()) | Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOTTY) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

#[expect(unsafe_code, reason = "the library cannot know what an ioctl does")]
fn draw_anew(pool: &File) -> rustix::io::Result<()> {
    // SAFETY: this call takes no argument and touches no memory of ours.
    unsafe { rustix::ioctl::ioctl(pool, NoArg::<RESEED>::new()) }
}

/// The kernel keeps the one that was read first: a file in memory is put over it.
fn cover_boot_id(now: &[u8]) -> io::Result<File> {
    let own = Path::new("/run/vmkit/boot_id");
    fs::create_dir_all("/run/vmkit")?;
    fs::write(own, now)?;
    // It belongs to nobody but the kernel, as what it lies over.
    fs::set_permissions(own, Permissions::from_mode(0o444))?;
    let file = File::options().write(true).open(own)?;
    mount_bind(own, BOOT_ID)?;
    Ok(file)
}

fn renew_boot_id(file: &File, id: [u8; 16]) -> io::Result<()> {
    file.write_all_at(&uuid(id), 0)
}

/// As the kernel writes one, with its line's end: random, of version 4.
fn uuid(mut id: [u8; 16]) -> Vec<u8> {
    id[6] = id[6] & 0x0F | 0x40;
    id[8] = id[8] & 0x3F | 0x80;
    let mut text = Vec::with_capacity(37);
    for (place, digit) in machine_id::digits(id).into_iter().enumerate() {
        if matches!(place, 8 | 12 | 16 | 20) {
            text.push(b'-');
        }
        text.push(digit);
    }
    text.push(b'\n');
    text
}

/// Kind and path of every host key.
fn host_keys(dir: &Path) -> Vec<(String, PathBuf)> {
    let mut keys: Vec<(String, PathBuf)> = fs::read_dir(dir)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| {
            let name = entry.file_name().into_string().ok()?;
            let kind = name.strip_prefix("ssh_host_")?.strip_suffix("_key")?;
            Some((kind.to_owned(), entry.path()))
        })
        .collect();
    keys.sort();
    keys
}

/// The old one is there until the new one is complete.
async fn renew_host_key(kind: &str, key: &Path, agent: &Inner) -> Result<(), String> {
    let failed = |how: String| format!("the guest could not renew its SSH host key of type {kind}: {how}");
    let new = key.with_extension("vmkit-new");
    let public = |key: &Path| PathBuf::from(format!("{}.pub", key.display()));
    for stale in [&new, &public(&new)] {
        let _ = fs::remove_file(stale);
    }
    let path = new.to_string_lossy();
    execute("ssh-keygen", &["-q", "-N", "", "-t", kind, "-f", &path], agent)
        .await
        .map_err(|how| failed(format!("ssh-keygen {how}")))?;
    fs::rename(&new, key)
        .and_then(|()| fs::rename(public(&new), public(key)))
        .map_err(|error| failed(error.to_string()))
}

/// What is in a directory and is neither hidden nor a directory itself, in the order of the names. Also what cannot be executed: whoever
/// put it there counts on it.
fn hooks(dir: &Path) -> Vec<PathBuf> {
    let hidden = |path: &Path| path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"."));
    let entries = fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path());
    let mut hooks: Vec<PathBuf> = entries.filter(|path| !hidden(path) && !path.is_dir()).collect();
    hooks.sort();
    hooks
}

/// Executes a program to its end. The error says how it ended, and the console why.
async fn execute(program: &str, args: &[&str], agent: &Inner) -> Result<(), String> {
    let _busy = agent.quiet.busy();
    let args = args.iter().map(|&arg| arg.to_owned()).collect();
    let request = ExecRequest { program: program.to_owned(), args, ..ExecRequest::default() };
    let process =
        spawn::spawn_unconnected(&request, agent).map_err(|(_, message)| format!("did not start: {message}"))?;
    match tokio::time::timeout(PATIENCE, process.exit).await {
        Ok(Ok(Exit::Code(0))) => Ok(()),
        Ok(Ok(Exit::Code(code))) => Err(format!("ended with exit code {code}")),
        Ok(Ok(Exit::Signal(signal))) => Err(format!("was ended by signal {signal}")),
        Ok(Err(_)) => Err("was lost".into()),
        Err(_) => {
            super::procs::signal(process.pid, Signal::KILL, true);
            Err(format!("took longer than {PATIENCE:?}"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_boot_id_is_written_as_the_kernel_writes_it() {
        let text = String::from_utf8(uuid([0xFF; 16])).unwrap();
        assert_eq!(text, "ffffffff-ffff-4fff-bfff-ffffffffffff\n");
        let kernels = fs::read_to_string(BOOT_ID).unwrap();
        let shape = |text: &str| text.chars().map(|c| if c.is_ascii_hexdigit() { 'x' } else { c }).collect::<String>();
        assert_eq!(shape(&text), shape(&kernels));
    }

    #[test]
    fn keys_and_hooks_are_found_in_order() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["ssh_host_rsa_key", "ssh_host_rsa_key.pub", "ssh_host_ed25519_key", "sshd_config", "ssh_host_key"]
        {
            fs::write(dir.path().join(name), "").unwrap();
        }
        let kinds: Vec<String> = host_keys(dir.path()).into_iter().map(|(kind, _)| kind).collect();
        assert_eq!(kinds, ["ed25519", "rsa"]);
        for name in ["20-one", "10-other", ".hidden"] {
            fs::write(dir.path().join(name), "").unwrap();
        }
        fs::create_dir(dir.path().join("15-dir")).unwrap();
        assert_eq!(hooks(dir.path())[..2], [dir.path().join("10-other"), dir.path().join("20-one")]);
        assert_eq!(hooks(dir.path()).len(), 7);
        assert!(hooks(Path::new("/no/such/directory")).is_empty());
    }
}
