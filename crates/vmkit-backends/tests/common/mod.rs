//! Real machines for tests, and a probe that looks past the backend.
#![allow(dead_code, reason = "each test file uses a part")]

pub mod farm;

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use vmkit::conformance::{Program, Rig};
use vmkit::{BootImage, ConsoleSinks, Host, Id, Instance, Source, Spec};
use vmkit_backends::qemu::{Qemu, QemuConfig};
use vmkit_image::{Agent, Cancel, Store};

/// The image that all tests share, made by the first. `None` where no machine can run, unless that is required.
pub fn base() -> Option<BootImage> {
    let built = || -> vmkit::Result<BootImage> {
        let agent = Agent::find(format!("protocol {}", vmkit_agent::link::VERSION))?;
        let store = Store::open(Path::new(env!("CARGO_TARGET_TMPDIR")).join("images"))?;
        store.ensure("base", &agent, &Cancel::new(), &|_| {})
    };
    let runs = || -> vmkit::Result<()> {
        let dir = tempfile::tempdir().unwrap();
        Qemu::new(QemuConfig::new(dir.path()))?.host_facts().map(drop)
    };
    match built().and_then(|image| runs().map(|()| image)) {
        Ok(image) => Some(image),
        Err(error) if required() => panic!("real machines are required and cannot run: {error:?}"),
        Err(error) => {
            eprintln!("SKIPPED: no machine can run here: {error:?}");
            None
        }
    }
}

pub fn required() -> bool {
    std::env::var("VMKIT_REQUIRE").is_ok_and(|wanted| wanted.split(',').any(|part| part == "qemu"))
}

pub fn id(name: &str) -> Id {
    Id::new(name).unwrap()
}

pub fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

/// A directory of machines of its own, and what looks at it from outside.
pub struct QemuRig {
    dir: tempfile::TempDir,
    image: BootImage,
    templates: Option<PathBuf>,
}

impl QemuRig {
    pub fn new(image: BootImage) -> QemuRig {
        let dir = tempfile::Builder::new().prefix("vmkit-test-").tempdir().unwrap();
        QemuRig { dir, image, templates: None }
    }

    /// Fresh machines are forks of templates that all tests share.
    pub fn forking(image: BootImage) -> QemuRig {
        let mut rig = QemuRig::new(image);
        rig.templates = Some(Path::new(env!("CARGO_TARGET_TMPDIR")).join("templates"));
        rig
    }

    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    pub fn machine(&self, id: &Id) -> PathBuf {
        self.dir.path().join(id.as_str())
    }

    pub fn image(&self) -> BootImage {
        self.image.clone()
    }

    pub fn qemu(&self) -> Qemu {
        Qemu::new(QemuConfig { templates: self.templates.clone(), ..QemuConfig::new(self.dir.path()) }).unwrap()
    }

    pub fn host(&self) -> Host<Qemu> {
        Host::new(self.qemu())
    }

    pub async fn running(&self, host: &Host<Qemu>, name: &str) -> Instance {
        let vm = host.create(id(name), self.spec()).await.unwrap();
        vm.clone_source().await.unwrap();
        vm.start(ConsoleSinks::discard()).await.unwrap();
        vm
    }

    /// Every process of a machine, whatever the backend says: by where it works and what it is.
    pub fn pids(&self, id: &Id) -> Vec<u32> {
        let dir = fs::canonicalize(self.dir.path()).unwrap();
        let homes =
            [dir.join(id.as_str()), dir.join(".staging").join(id.as_str()), dir.join(".trash").join(id.as_str())];
        pids_where(|cwd| homes.iter().any(|home| cwd.starts_with(home)))
    }

    /// What QEMU itself says of the machine, on a socket that the backend does not use.
    pub fn status(&self, id: &Id) -> Option<String> {
        let dir = fs::File::open(self.machine(id)).ok()?;
        let mut stream = UnixStream::connect(format!("/proc/self/fd/{}/qmp2.sock", dir.as_raw_fd())).ok()?;
        stream.set_read_timeout(Some(Duration::from_secs(20))).ok()?;
        let mut lines = BufReader::new(stream.try_clone().ok()?).lines();
        let mut answer = |command: &str| -> Option<serde_json::Value> {
            writeln!(stream, "{{\"execute\": \"{command}\"}}").ok()?;
            loop {
                let line: serde_json::Value = serde_json::from_str(&lines.next()?.ok()?).ok()?;
                if let Some(value) = line.get("return") {
                    return Some(value.clone());
                }
            }
        };
        answer("qmp_capabilities")?;
        answer("query-status")?.get("status")?.as_str().map(str::to_owned)
    }

    /// One command on the second control socket.
    pub fn tell(&self, id: &Id, command: &str) {
        tell(&self.machine(id), &[&format!("{{\"execute\": \"{command}\"}}")]);
    }
}

/// Commands on the second control socket of the machine in `dir`. Returns what the last one returned.
pub fn tell(dir: &Path, commands: &[&str]) -> String {
    let dir = fs::File::open(dir).unwrap();
    let mut stream = UnixStream::connect(format!("/proc/self/fd/{}/qmp2.sock", dir.as_raw_fd())).unwrap();
    let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
    let mut returned = String::new();
    for command in ["{\"execute\": \"qmp_capabilities\"}"].iter().chain(commands) {
        writeln!(stream, "{command}").unwrap();
        returned = lines.by_ref().map(Result::unwrap).find(|line| line.contains("\"return\"")).unwrap();
    }
    returned
}

/// The pids of every QEMU that works in a directory of which `is` is true. Deleted directories keep their name.
pub fn pids_where(is: impl Fn(&Path) -> bool) -> Vec<u32> {
    let entries = fs::read_dir("/proc").unwrap().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    pids.filter(|pid| {
        let cwd = fs::read_link(format!("/proc/{pid}/cwd")).unwrap_or_default();
        let cwd = PathBuf::from(cwd.to_string_lossy().trim_end_matches(" (deleted)"));
        let exe = fs::read_link(format!("/proc/{pid}/exe")).unwrap_or_default();
        is(&cwd) && exe.to_string_lossy().contains("qemu-system")
    })
    .collect()
}

impl Drop for QemuRig {
    fn drop(&mut self) {
        // Also after a panic: nothing outlives its test.
        let dir = fs::canonicalize(self.dir.path()).unwrap();
        for pid in pids_where(|cwd| cwd.starts_with(&dir)) {
            let _ = std::process::Command::new("kill").args(["-9", &pid.to_string()]).status();
        }
    }
}

impl Rig for QemuRig {
    type Provider = Qemu;

    async fn provider(&self) -> Qemu {
        self.qemu()
    }

    fn spec(&self) -> Spec {
        Spec::new(Source::Boot(self.image.clone())).memory_mib(192)
    }

    fn unclonable(&self) -> Option<Spec> {
        let image = BootImage { disk: Some("/no/such/disk".into()), ..self.image.clone() };
        Some(Spec::new(Source::Boot(image)))
    }

    fn command(&self, program: &Program) -> Vec<String> {
        program.busybox()
    }

    async fn processes(&self, id: &Id) -> usize {
        self.pids(id).len()
    }

    async fn executes(&self, id: &Id) -> bool {
        self.status(id).as_deref() == Some("running")
    }

    async fn artefacts(&self, id: &Id) -> Vec<String> {
        let parts = ["", ".staging", ".trash", ".locks"].map(|part| self.dir.path().join(part).join(id.as_str()));
        let there = parts.iter().filter(|path| path.symlink_metadata().is_ok());
        there.map(|path| path.display().to_string()).collect()
    }

    async fn saved_execution(&self, id: &Id) -> bool {
        let there = |file: &str| self.machine(id).join(file).is_file();
        there("state") && there("memory") || there("state.apart") && there("memory.apart")
    }

    async fn kill_process(&self, id: &Id) {
        for pid in self.pids(id) {
            assert!(std::process::Command::new("kill").args(["-9", &pid.to_string()]).status().unwrap().success());
        }
    }

    async fn plant_foreign(&self, id: &Id) {
        let dir = self.machine(id);
        fs::create_dir(&dir).unwrap();
        fs::write(dir.join("precious"), "not ours").unwrap();
    }

    async fn foreign_intact(&self, id: &Id) -> bool {
        let dir = self.machine(id);
        fs::read_to_string(dir.join("precious")).is_ok_and(|text| text == "not ours")
            && fs::read_dir(dir).unwrap().count() == 1
    }

    async fn finish(&self) {
        let left: Vec<PathBuf> = [".staging", ".trash"]
            .iter()
            .flat_map(|part| fs::read_dir(self.dir.path().join(part)).unwrap().flatten().map(|entry| entry.path()))
            .collect();
        assert!(left.is_empty(), "left over: {left:?}");
    }

    fn skipped(&self, case: &str, why: &str) {
        assert!(!required(), "{case} was skipped, and real machines are required: {why}");
        eprintln!("SKIPPED {case}: {why}");
    }

    fn slack(&self) -> Duration {
        // The test itself may wait for a processor.
        Duration::from_secs(2)
    }
}
