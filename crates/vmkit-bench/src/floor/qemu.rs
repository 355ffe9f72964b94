//! One bare QEMU: its control session, and its guest's shell.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, ErrorKind as Io, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::guest::GREETING;
use super::{Config, Error, Result};

/// Nothing takes this long, on any machine: what does is stuck.
const PATIENCE: Duration = Duration::from_secs(120);
/// How often a wait looks whether it is to be given up.
const LOOK: Duration = Duration::from_millis(100);
/// A port's reads are this large at most.
const CHUNK: usize = 1 << 17;
/// What the shell says after each command.
const DONE: &[u8] = b"answered\n";

#[cfg(target_arch = "x86_64")]
const MACHINE: &str = "q35,sata=off,usb=off,vmport=off";
#[cfg(target_arch = "x86_64")]
const CONSOLE: &str = "ttyS0";
// Nobody has run this.
#[cfg(not(target_arch = "x86_64"))]
const MACHINE: &str = "virt,gic-version=max";
#[cfg(not(target_arch = "x86_64"))]
const CONSOLE: &str = "ttyAMA0";

/// The file that is a guest's memory.
#[derive(Clone, Copy, Debug)]
pub struct Memory<'a> {
    /// Its path.
    pub file: &'a Path,
    /// Whether what the guest writes goes into the file; else it stays in the process, copy on write.
    pub shared: bool,
}

/// How a guest comes up.
#[derive(Clone, Copy, Debug)]
pub enum Begin<'a> {
    /// From its kernel.
    Boot,
    /// From devices' state that was saved to this file.
    Load(&'a Path),
}

/// A QEMU process, killed when dropped.
#[derive(Debug)]
pub struct Qemu<'a> {
    config: &'a Config,
    process: Process,
    monitor: BufReader<UnixStream>,
    port: UnixStream,
    /// The moment before the process was started.
    pub started: Instant,
    /// From there to a control session.
    pub ready: Duration,
    /// How long loading the devices' state took.
    pub loading: Duration,
}

/// The process and its directory; both end with it.
#[derive(Debug)]
struct Process {
    child: Child,
    dir: PathBuf,
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended, and there is nobody to tell.
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = fs::remove_dir_all(&self.dir);
    }
}

impl Process {
    fn start(config: &Config, memory: Memory<'_>, begin: Begin<'_>) -> Result<Process> {
        let dir = config.new_dir()?;
        let errors = File::create(dir.join("err")).map_err(Error::io("no file for QEMU's errors"))?;
        let mut command = Command::new(&config.program);
        command.args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]);
        command.args(["-M", &format!("{MACHINE},memory-backend=m0")]);
        command.args(match config.kvm {
            true => ["-accel", "kvm", "-cpu", "host"],
            false => ["-accel", "tcg,thread=multi", "-cpu", "max"],
        });
        command.args(["-m", &config.memory_mib.to_string()]);
        let (size, file) = (config.memory_mib, memory.file.display());
        let share = if memory.shared { "on" } else { "off" };
        command.args(["-object", &format!("memory-backend-file,id=m0,size={size}M,mem-path={file},share={share}")]);
        command.args(["-qmp", "unix:qmp,server=on,wait=off"]);
        command.args(["-serial", "file:serial"]);
        command.args(["-device", "virtio-serial-pci"]);
        command.args(["-chardev", "socket,id=shell,path=port,server=on,wait=off"]);
        command.args(["-device", "virtserialport,chardev=shell,name=vmkit-bench.shell"]);
        match begin {
            Begin::Load(_) => command.args(["-incoming", "defer", "-S"]),
            Begin::Boot => command
                .arg("-kernel")
                .arg(&config.guest.kernel)
                .arg("-initrd")
                .arg(&config.guest.initramfs)
                .args(["-append", &format!("console={CONSOLE} quiet reboot=t panic=-1")]),
        };
        // Where it is found when the bench is killed, and short names of sockets: an address holds 107 bytes.
        command.current_dir(&dir);
        // A Ctrl-C at the terminal is for the bench, which then ends its QEMUs.
        command.process_group(0).stdin(Stdio::null()).stdout(Stdio::null()).stderr(errors);
        let child = command.spawn().map_err(Error::io(format!("{} cannot be started", config.program.display())))?;
        Ok(Process { child, dir })
    }

    /// Connects to one of its sockets as soon as that is there.
    fn connect(&mut self, name: &str, wait: &Wait<'_>) -> Result<UnixStream> {
        let dir = File::open(&self.dir).map_err(Error::io("a machine's directory cannot be read"))?;
        let path = format!("/proc/self/fd/{}/{name}", dir.as_raw_fd());
        loop {
            if let Ok(stream) = UnixStream::connect(&path) {
                stream.set_read_timeout(Some(LOOK)).map_err(Error::io("a socket cannot be set up"))?;
                return Ok(stream);
            }
            if let Ok(Some(status)) = self.child.try_wait() {
                return Err(self.failure(&format!("QEMU ended with {status}")));
            }
            wait.go_on().map_err(|error| self.explain(error))?;
            sleep(Duration::from_micros(300));
        }
    }

    /// Adds to a wait that was too long what there is to read about it.
    fn explain(&self, error: Error) -> Error {
        match error {
            Error::Qemu(what) => self.failure(&what),
            other => other,
        }
    }

    fn failure(&self, what: &str) -> Error {
        let mut text = what.to_owned();
        for (name, title) in [("err", "QEMU said"), ("serial", "the guest's console ends with")] {
            let content = fs::read(self.dir.join(name)).unwrap_or_default();
            let end = String::from_utf8_lossy(&content[content.len().saturating_sub(2000)..]).trim().to_owned();
            if !end.is_empty() {
                text += &format!("; {title}: {end}");
            }
        }
        Error::Qemu(text)
    }
}

/// A wait that has an end.
struct Wait<'a> {
    config: &'a Config,
    until: Instant,
    what: &'a str,
}

impl<'a> Wait<'a> {
    fn for_(config: &'a Config, what: &'a str) -> Wait<'a> {
        Wait { config, until: Instant::now() + PATIENCE, what }
    }

    fn go_on(&self) -> Result<()> {
        if self.config.is_interrupted() {
            return Err(Error::Interrupted);
        }
        match Instant::now() < self.until {
            true => Ok(()),
            false => Err(Error::Qemu(format!("{} took longer than {PATIENCE:?}", self.what))),
        }
    }

    /// Reads, again and again until there is something.
    fn retry(&self, mut read: impl FnMut() -> std::io::Result<usize>) -> Result<usize> {
        loop {
            match read() {
                Ok(0) => return Err(Error::Qemu(format!("QEMU went away during {}", self.what))),
                Ok(size) => return Ok(size),
                Err(error) if matches!(error.kind(), Io::WouldBlock | Io::TimedOut | Io::Interrupted) => {
                    self.go_on()?
                }
                Err(error) => return Err(Error::Qemu(format!("{}: {error}", self.what))),
            }
        }
    }
}

impl<'a> Qemu<'a> {
    /// Starts a process. A guest that boots is still doing so afterwards; one that was loaded runs.
    ///
    /// # Errors
    /// When QEMU ends, does not answer, or refuses something; with its words.
    pub fn start(config: &'a Config, memory: Memory<'_>, begin: Begin<'_>) -> Result<Qemu<'a>> {
        let wait = Wait::for_(config, "QEMU's start");
        let started = Instant::now();
        let mut process = Process::start(config, memory, begin)?;
        let mut monitor = BufReader::new(process.connect("qmp", &wait)?);
        let mut greeting = Vec::new();
        wait.retry(|| monitor.read_until(b'\n', &mut greeting)).map_err(|error| process.explain(error))?;
        execute(&mut monitor, &wait, "qmp_capabilities", Value::Null).map_err(|error| process.explain(error))?;
        let ready = started.elapsed();
        let port = process.connect("port", &wait)?;
        let mut qemu = Qemu { config, process, monitor, port, started, ready, loading: Duration::ZERO };
        if let Begin::Load(state) = begin {
            qemu.ignore_shared_memory()?;
            let clock = Instant::now();
            qemu.execute("migrate-incoming", json!({ "uri": format!("file:{}", state.display()) }))?;
            qemu.wait_until_migrated()?;
            qemu.loading = clock.elapsed();
            qemu.cont()?;
        }
        Ok(qemu)
    }

    /// Waits until a guest that boots has a shell.
    ///
    /// # Errors
    /// When it does not come up; with the end of its console.
    pub fn wait_for_shell(&mut self) -> Result<()> {
        self.read_to(GREETING, "the guest's boot").map(drop)
    }

    /// Gives the guest's shell a line. Returns what it printed.
    ///
    /// # Errors
    /// When there is no answer.
    pub fn shell(&mut self, line: &str) -> Result<Vec<u8>> {
        let done = String::from_utf8_lossy(DONE);
        let sent = self.port.write_all(format!("{line}; echo {done}").as_bytes());
        sent.map_err(Error::io("the guest's port cannot be written to"))?;
        let mut printed = self.read_to(DONE, "a command in the guest")?;
        printed.truncate(printed.len() - DONE.len());
        Ok(printed)
    }

    /// [`shell`](Qemu::shell), of a line whose answer is known.
    ///
    /// # Errors
    /// Also when the answer is another one: then what is measured is not what it should be.
    pub fn expect(&mut self, line: &str, answer: &str) -> Result<()> {
        let printed = self.shell(line)?;
        match String::from_utf8_lossy(&printed).trim() {
            said if said == answer => Ok(()),
            said => Err(self.process.failure(&format!("`{line}` printed {said:?} instead of {answer:?}"))),
        }
    }

    /// Halts the guest's processor.
    ///
    /// # Errors
    /// When QEMU refuses.
    pub fn pause(&mut self) -> Result<()> {
        self.execute("stop", Value::Null).map(drop)
    }

    /// Lets the guest's processor go on.
    ///
    /// # Errors
    /// When QEMU refuses.
    pub fn cont(&mut self) -> Result<()> {
        self.execute("cont", Value::Null).map(drop)
    }

    /// Halts the guest and writes its devices' state to a file; its memory is in a file as it is. Returns how long that took.
    ///
    /// # Errors
    /// When QEMU fails to.
    pub fn save(&mut self, to: &Path) -> Result<Duration> {
        self.ignore_shared_memory()?;
        let clock = Instant::now();
        self.pause()?;
        self.execute("migrate", json!({ "uri": format!("file:{}", to.display()) }))?;
        self.wait_until_migrated()?;
        Ok(clock.elapsed())
    }

    /// Ends the process, and waits for its end.
    ///
    /// # Errors
    /// When it does not end.
    pub fn quit(mut self) -> Result<()> {
        // The session may end before its answer arrives.
        match self.execute("quit", Value::Null) {
            Ok(_) | Err(Error::Qemu(_)) => {}
            Err(error) => return Err(error),
        }
        self.process.child.wait().map(drop).map_err(Error::io("QEMU's end cannot be waited for"))
    }

    /// Memory that no other process shares and that would have to be written out, in MiB.
    ///
    /// # Errors
    /// When the kernel does not tell.
    pub fn own_memory_mib(&self) -> Result<f64> {
        let path = format!("/proc/{}/smaps_rollup", self.process.child.id());
        let text = fs::read_to_string(&path).map_err(Error::io(format!("{path} cannot be read")))?;
        private_dirty_mib(&text).ok_or_else(|| Error::Setup(format!("{path} has no Private_Dirty")))
    }

    fn ignore_shared_memory(&mut self) -> Result<()> {
        let capability = json!({ "capability": "x-ignore-shared", "state": true });
        self.execute("migrate-set-capabilities", json!({ "capabilities": [capability] })).map(drop)
    }

    fn wait_until_migrated(&mut self) -> Result<()> {
        let wait = Wait::for_(self.config, "saving or loading a state");
        loop {
            let answer = self.execute("query-migrate", Value::Null)?;
            match answer["status"].as_str() {
                Some("completed") => return Ok(()),
                Some("failed" | "cancelled") => {
                    return Err(self.process.failure(&format!("migration failed: {answer}")));
                }
                _ => wait.go_on()?,
            }
            sleep(Duration::from_micros(500));
        }
    }

    fn execute(&mut self, command: &str, arguments: Value) -> Result<Value> {
        let wait = Wait::for_(self.config, command);
        execute(&mut self.monitor, &wait, command, arguments).map_err(|error| self.process.explain(error))
    }

    /// Reads up to an answer, which is the last thing that the shell prints before it waits again.
    fn read_to(&mut self, end: &[u8], what: &str) -> Result<Vec<u8>> {
        let wait = Wait::for_(self.config, what);
        let (mut got, mut chunk) = (Vec::new(), vec![0; CHUNK]);
        while !got.ends_with(end) {
            let size = wait.retry(|| self.port.read(&mut chunk)).map_err(|error| self.process.explain(error))?;
            got.extend_from_slice(&chunk[..size]);
        }
        Ok(got)
    }
}

/// One command on the control session; events in between are passed over.
fn execute(monitor: &mut BufReader<UnixStream>, wait: &Wait<'_>, command: &str, arguments: Value) -> Result<Value> {
    let mut message = json!({ "execute": command });
    if !arguments.is_null() {
        message["arguments"] = arguments;
    }
    let sent = monitor.get_mut().write_all(format!("{message}\n").as_bytes());
    sent.map_err(|error| Error::Qemu(format!("{command} cannot be sent: {error}")))?;
    let mut line = Vec::new();
    loop {
        line.clear();
        // A read that times out keeps what it has, so that the next one goes on there.
        wait.retry(|| monitor.read_until(b'\n', &mut line))?;
        let mut answer: Value = serde_json::from_slice(&line)
            .map_err(|error| Error::Qemu(format!("{command} was answered with no JSON: {error}")))?;
        if let Some(value) = answer.get_mut("return") {
            return Ok(value.take());
        }
        if let Some(error) = answer.get("error") {
            return Err(Error::Qemu(format!("QEMU refuses {command}: {error}")));
        }
    }
}

fn private_dirty_mib(rollup: &str) -> Option<f64> {
    let line = rollup.lines().find_map(|line| line.strip_prefix("Private_Dirty:"))?;
    let kib: f64 = line.split_whitespace().next()?.parse().ok()?;
    Some(kib / 1024.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_of_its_own_is_read() {
        let rollup = "55d0-7ffd ---p 00000000 00:00 0  [rollup]\nRss:  99999 kB\nPrivate_Dirty:     2048 kB\n";
        assert_eq!(private_dirty_mib(rollup), Some(2.0));
        assert_eq!(private_dirty_mib("Rss: 1 kB\n"), None);
    }
}
