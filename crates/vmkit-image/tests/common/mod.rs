//! What the tests of images share: tools that must be there, stand-ins for the agent and the kernel, looks into disks.

#![allow(dead_code, reason = "each test program uses a part")]

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;
use vmkit::BootImage;
use vmkit_image::{Agent, Cancel, KernelSource, Progress, Recipe, RootSource, Store};

/// Small, so that tests are quick.
pub const SIZE: u64 = 64 << 20;

/// Whether the tools are there. Where `VMKIT_REQUIRE` demands real machines it is an error when they are not.
pub fn has(tools: &[&str]) -> bool {
    let path = format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default());
    let there = |tool: &&str| path.split(':').any(|dir| Path::new(dir).join(tool).is_file());
    let missing: Vec<_> = tools.iter().filter(|tool| !there(tool)).collect();
    if missing.is_empty() {
        return true;
    }
    let required = std::env::var("VMKIT_REQUIRE").is_ok_and(|what| what.contains("qemu"));
    assert!(!required, "VMKIT_REQUIRE is set, and these are missing: {missing:?}; run `make setup`");
    eprintln!("SKIPPED: not installed: {missing:?}; run `make setup`");
    false
}

/// Tools that every build needs.
pub fn can_build() -> bool {
    has(&["busybox", "fakeroot", "mke2fs", "debugfs", "tar"])
}

/// A store of its own, with a stand-in for the kernel: nothing is downloaded.
pub struct Bench {
    pub dir: TempDir,
    pub store: Store,
}

impl Bench {
    pub fn new() -> Bench {
        let dir = tempfile::tempdir().unwrap();
        std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
        std::fs::write(dir.path().join("kernel"), "a kernel").unwrap();
        let store = Store::open(dir.path().join("store")).unwrap();
        Bench { dir, store }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn recipe(&self, root: RootSource) -> Recipe {
        Recipe::new(root, agent()).kernel(kernel(&self.path("kernel"))).size(SIZE)
    }

    pub fn build(&self, name: &str, root: RootSource) -> vmkit::Result<BootImage> {
        self.store.build(name, &self.recipe(root), &Cancel::new(), &quiet)
    }

    /// A directory with one file as a root file system.
    pub fn tree(&self, name: &str, content: &str) -> PathBuf {
        let tree = self.path(name);
        std::fs::create_dir_all(&tree).unwrap();
        std::fs::write(tree.join("file"), content).unwrap();
        tree
    }

    /// An agent that differs from [`agent`]'s by what comes after the program's end.
    pub fn other_agent(&self) -> Agent {
        let path = self.path("other-agent");
        let mut bytes = std::fs::read(agent().path()).unwrap();
        bytes.extend(b"newer");
        std::fs::write(&path, bytes).unwrap();
        Agent::new(path, "test").unwrap()
    }

    /// What is in a part of the store.
    pub fn entries(&self, part: &str) -> Vec<String> {
        let entries = std::fs::read_dir(self.store.path().join(part)).unwrap();
        let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    /// Nothing is left of any build but its image.
    pub fn assert_swept(&self) {
        let known = ["hold", "images", "kernels", "lock", "names"];
        assert!(self.entries(".").iter().all(|name| known.contains(&name.as_str())), "{:?}", self.entries("."));
        assert!(self.entries("images").iter().all(|name| name.len() == 71), "{:?}", self.entries("images"));
        assert!(self.entries("names").iter().all(|name| name.ends_with(".json")), "{:?}", self.entries("names"));
    }
}

fn kernel(file: &Path) -> KernelSource {
    KernelSource::Files { kernel: file.to_owned(), modules: None }
}

/// The real one, which tests do not look for.
pub fn agent() -> Agent {
    let path =
        std::env::var_os("VMKIT_AGENT").expect("VMKIT_AGENT names no agent: use `make test`, or `make agent` first");
    Agent::new(path, "test").unwrap()
}

/// A test program's other life: a process that builds one image and says how that went. Each program that needs it has an
/// ignored test which calls this.
///
/// It builds in the [`Bench`] that `VMKIT_TEST_BENCH` names, from what `VMKIT_TEST_ROOT` says.
pub fn be_a_builder() {
    let Some(dir) = std::env::var_os("VMKIT_TEST_BENCH").map(PathBuf::from) else { return };
    let root = std::env::var("VMKIT_TEST_ROOT").unwrap();
    let root = match root.split_once(':') {
        Some(("dir", path)) => RootSource::Dir(path.into()),
        Some(("tar", path)) => RootSource::Tar(path.into()),
        _ => RootSource::Base,
    };
    let report = |progress: Progress<'_>| println!("\nphase {}: {}", progress.phase, progress.detail);
    let recipe = Recipe::new(root, agent()).kernel(kernel(&dir.join("kernel"))).size(SIZE);
    let made = Store::open(dir.join("store")).and_then(|store| store.build("base", &recipe, &Cancel::new(), &report));
    match made {
        Ok(image) => println!("\ndigest {}", image.digest),
        Err(error) => {
            println!("\nerror {} | {error} | {}", error.kind().code(), error.next_step().unwrap_or_default());
            std::process::exit(3);
        }
    }
}

/// A builder, to be started by whatever comes before it, such as `setpriv`.
pub fn builder(bench: &Bench, root: &str, before: &[&str]) -> Command {
    // Another user may not be let into the directory where it was compiled.
    let program = bench.path("builder");
    if !program.exists() {
        std::fs::copy(std::env::current_exe().unwrap(), &program).unwrap();
        std::fs::copy(agent().path(), bench.path("agent")).unwrap();
    }
    let words = before.iter().map(Into::into).chain([program.into_os_string()]).collect::<Vec<std::ffi::OsString>>();
    let mut command = Command::new(&words[0]);
    command.args(&words[1..]).args(["--exact", "builder", "--ignored", "--nocapture"]);
    command.env("VMKIT_TEST_BENCH", bench.dir.path()).env("VMKIT_TEST_ROOT", root);
    command.env("VMKIT_AGENT", bench.path("agent"));
    command
}

/// What a builder that ended said: a digest, or an error's code, message and next step.
pub fn answer(command: &mut Command) -> Result<String, String> {
    let output = command.output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let line = |start: &str| text.lines().find_map(|line| line.strip_prefix(start)).map(str::to_owned);
    match line("digest ") {
        Some(digest) => Ok(digest),
        None => Err(line("error ").unwrap_or_else(|| {
            panic!("the builder said neither: {text}\n{}", String::from_utf8_lossy(&output.stderr))
        })),
    }
}

pub fn quiet(_: Progress<'_>) {}

/// What debugfs answers about a disk.
pub fn look(disk: &Path, request: &str) -> String {
    let output = tool("debugfs").args(["-R", request]).arg(disk).output().unwrap();
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// The type and permissions of a file in a disk, its owner and group.
pub fn stat(disk: &Path, path: &str) -> (String, u32, u32, u32) {
    let text = look(disk, &format!("stat {path}"));
    let words: Vec<&str> = text.split_whitespace().collect();
    let after = |key: &str| words.iter().position(|word| *word == key).map_or("", |at| words[at + 1]);
    // debugfs takes large ids for negative ones.
    let number =
        |key: &str| after(key).parse::<i64>().unwrap_or_else(|_| panic!("no {key} of {path} in {text}")) as u32;
    let mode = u32::from_str_radix(after("Mode:"), 8).unwrap_or_else(|_| panic!("no {path}: {text}"));
    let kind = text.split("Type:").nth(1).unwrap().split("Mode:").next().unwrap().trim().to_owned();
    (kind, mode, number("User:"), number("Group:"))
}

/// The file system has no errors.
pub fn assert_sound(disk: &Path) {
    let output = tool("e2fsck").arg("-fn").arg(disk).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
}

fn tool(name: &str) -> Command {
    let mut command = Command::new(name);
    command.env("PATH", format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default()));
    command
}
