//! The kernel and the modules that machines boot with.
//!
//! The distribution's package is downloaded and unpacked into the store, as anybody: nothing is installed on this machine, and
//! its boot loader never hears of it. What is kept is the kernel and the few modules of [`modules`](crate::modules).

use std::fs;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use vmkit::{Error, ErrorKind, Result};

use crate::digest;
use crate::files;
use crate::manifest;
use crate::modules::{self, Module};
use crate::progress::Phase;
use crate::recipe::KernelSource;
use crate::run::{Tool, Work};

/// The packages that always name a distribution's newest kernel for virtual machines: Debian's, Ubuntu's.
#[cfg(target_arch = "x86_64")]
const META: &[&str] = &["linux-image-cloud-amd64", "linux-image-virtual"];
/// As on x86_64; nobody has run these.
#[cfg(target_arch = "aarch64")]
const META: &[&str] = &["linux-image-cloud-arm64", "linux-image-virtual"];

/// Names the form of what is cached; rises when other modules are wanted.
const CACHE_FORMAT: u32 = 3;
const RECORD: &str = "kernel.json";

/// A kernel that is ready to go into an image.
#[derive(Debug)]
pub(crate) struct Kernel {
    pub version: String,
    pub file: PathBuf,
    pub modules: Vec<Module>,
    /// Whether it tells the host that it has given up, once the modules are loaded.
    pub tells_panic: bool,
    /// Whether the file is the store's own, so that an image can be a link to it.
    pub ours: bool,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Record {
    version: String,
    /// The digest of `vmlinuz`. Images are links to it, so what damages an image may have damaged it.
    kernel: String,
    /// In the order in which they are loaded.
    modules: Vec<ModuleRecord>,
    #[serde(default)]
    tells_panic: bool,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct ModuleRecord {
    name: String,
    digest: String,
}

/// Gets the kernel. `cache` is where unpacked ones are kept.
pub(crate) fn prepare(work: &Work<'_>, source: &KernelSource, cache: &Path) -> Result<Kernel> {
    match source {
        KernelSource::Distribution => distribution(work, cache),
        KernelSource::Files { kernel, modules } => given(work, kernel, modules.as_deref()),
    }
}

/// The version of the kernel in a cache's directory.
pub(crate) fn cached_version(dir: &Path) -> Option<String> {
    manifest::read::<Record>(&dir.join(RECORD)).ok().map(|record| record.version)
}

fn given(work: &Work<'_>, kernel: &Path, modules: Option<&Path>) -> Result<Kernel> {
    work.report(Phase::Kernel, &kernel.display().to_string());
    // Tools run in another directory.
    let kernel = kernel.canonicalize().map_err(|error| unusable(kernel, error))?;
    let tree = modules.map(|tree| tree.canonicalize().map_err(|error| unusable(tree, error))).transpose()?;
    if !kernel.is_file() {
        return Err(unusable(&kernel, std::io::ErrorKind::InvalidInput.into()));
    }
    let sum = digest::of_file(&kernel)?;
    let name = tree.as_deref().and_then(Path::file_name).and_then(|name| name.to_str());
    let version = name.map_or_else(|| format!("custom-{}", &sum[7..19]), str::to_owned);
    let (mut modules, mut tells_panic) = (Vec::new(), false);
    if let Some(tree) = tree {
        modules = modules::for_boot(&tree, &|file| unpack(work, file))?;
        tells_panic = modules::tell_of_a_panic(&modules, &tree);
    }
    Ok(Kernel { version, file: kernel, modules, tells_panic, ours: false })
}

fn unusable(path: &Path, error: std::io::Error) -> Error {
    Error::new(ErrorKind::InvalidArgument, format!("{} cannot be used as a kernel or its modules", path.display()))
        .caused_by(error)
        .hint("give a kernel and its modules with --kernel PATH --modules DIR, or neither for the distribution's")
}

fn distribution(work: &Work<'_>, cache: &Path) -> Result<Kernel> {
    work.report(Phase::Kernel, "looking for the distribution's kernel");
    let Some(packages) = find_packages(work)? else {
        // Without package lists an earlier kernel is better than none.
        let Some(kernel) = newest(cache).and_then(|dir| open(&dir).ok()) else { return Err(no_lists()) };
        work.report(Phase::Kernel, "apt has no package lists: using the kernel that is in the store");
        return Ok(kernel);
    };
    let dir = cache.join(format!("{}-r{CACHE_FORMAT}", packages.key));
    if let Ok(kernel) = open(&dir) {
        return Ok(kernel);
    }
    work.report(Phase::Kernel, &format!("downloading {}", packages.names.join(" ")));
    let debs = work.path("debs");
    files::make_dir(&debs)?;
    let download = packages.names.iter().fold(apt_get().current_dir(&debs), Tool::arg);
    work.run(&download).map_err(|error| match error.kind() {
        ErrorKind::Io => error
            .hint("bring the package lists up to date: run `apt-get update` as root; or give --kernel and --modules"),
        _ => error,
    })?;

    work.report(Phase::Kernel, "unpacking");
    let tree = work.path("kernel-tree");
    for deb in list(&debs)? {
        work.run(&Tool::new("dpkg-deb", "dpkg").arg("-x").arg(&deb).arg(&tree))?;
    }
    let (version, vmlinuz) = find_kernel(&tree)?;
    let modules = ["usr/lib/modules", "lib/modules"].map(|dir| tree.join(dir).join(&version));
    let modules = modules.iter().find(|dir| dir.join("kernel").is_dir());
    let Some(modules_tree) = modules else {
        return Err(Error::new(ErrorKind::Corrupt, format!("the package of kernel {version} has no modules")));
    };
    let modules = modules::for_boot(modules_tree, &|file| unpack(work, file))?;
    let tells_panic = modules::tell_of_a_panic(&modules, modules_tree);
    store(work, &dir, &Kernel { version, file: vmlinuz, modules, tells_panic, ours: true })?;
    files::remove_tree(&tree)?;
    open(&dir)
}

fn apt_get() -> Tool {
    // apt would rather download as a user of its own, who cannot write here.
    Tool::new("apt-get", "apt").args(&["-qq", "-o", "APT::Sandbox::User=root", "download"])
}

struct Packages {
    key: String,
    names: Vec<String>,
}

/// The packages that hold the newest kernel and its modules; none when apt knows of none.
fn find_packages(work: &Work<'_>) -> Result<Option<Packages>> {
    for meta in META {
        let Some(control) = show(work, meta)? else { continue };
        let Some(image) = depends(&control).into_iter().find(|name| name.starts_with("linux-image-")) else { continue };
        let Some(control) = show(work, &image)? else { continue };
        let parts = ["linux-modules-", "linux-binary-"];
        let mut names = vec![image.clone()];
        names.extend(depends(&control).into_iter().filter(|name| parts.iter().any(|part| name.starts_with(part))));
        let key = format!("{image}_{}", field(&control, "Version").unwrap_or_default());
        return Ok(Some(Packages { key: key.replace(['/', ':'], "_"), names }));
    }
    Ok(None)
}

/// What apt knows of a package's newest version.
fn show(work: &Work<'_>, package: &str) -> Result<Option<String>> {
    match work.run(&Tool::new("apt-cache", "apt").args(&["show", "--no-all-versions", package])) {
        Ok(control) => Ok(Some(String::from_utf8_lossy(&control).into_owned()).filter(|text| !text.is_empty())),
        Err(error) if error.kind() == ErrorKind::Io => Ok(None),
        Err(error) if error.kind() == ErrorKind::MissingDependency => {
            Err(error.hint("install the package apt, or give a kernel with --kernel PATH --modules DIR"))
        }
        Err(error) => Err(error),
    }
}

fn field<'a>(control: &'a str, name: &str) -> Option<&'a str> {
    control.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "))
}

/// The names in a package's Depends, without versions; of alternatives the first.
fn depends(control: &str) -> Vec<String> {
    let list = field(control, "Depends").unwrap_or_default();
    list.split(',').filter_map(|item| item.split_whitespace().next()).map(str::to_owned).collect()
}

fn no_lists() -> Error {
    Error::new(ErrorKind::MissingDependency, "apt knows of no kernel for virtual machines")
        .hint("run `make setup` or, as root, `apt-get update`; or give a kernel with --kernel PATH --modules DIR")
}

/// The version and the file of the kernel in an unpacked package.
fn find_kernel(tree: &Path) -> Result<(String, PathBuf)> {
    for file in list(&tree.join("boot"))? {
        let name = file.file_name().and_then(|name| name.to_str());
        if let Some(version) = name.and_then(|name| name.strip_prefix("vmlinuz-")) {
            return Ok((version.to_owned(), file.clone()));
        }
    }
    Err(Error::new(ErrorKind::Corrupt, "the kernel's package has no /boot/vmlinuz"))
}

fn list(dir: &Path) -> Result<Vec<PathBuf>> {
    let failed = |error| Error::io(format!("{} cannot be read", dir.display()), error);
    let entries = fs::read_dir(dir).map_err(failed)?;
    let mut paths = entries.map(|entry| entry.map(|entry| entry.path())).collect::<std::io::Result<Vec<_>>>();
    if let Ok(paths) = &mut paths {
        paths.sort();
    }
    paths.map_err(failed)
}

/// Puts an unpacked kernel into the cache.
fn store(work: &Work<'_>, dir: &Path, unpacked: &Kernel) -> Result<()> {
    let aside = work.path("kernel");
    let failed = |error| Error::io(format!("{} cannot be written", aside.display()), error);
    files::make_dir(&aside)?;
    let Kernel { version, file, modules, tells_panic, .. } = unpacked;
    let kernel = digest::of_file(file)?;
    fs::rename(file, aside.join("vmlinuz")).map_err(failed)?;
    let mut record = Record { version: version.clone(), kernel, modules: Vec::new(), tells_panic: *tells_panic };
    for Module { name, content } in modules {
        fs::write(aside.join(format!("{name}.ko")), content).map_err(failed)?;
        record.modules.push(ModuleRecord { name: name.clone(), digest: digest::of_bytes(content) });
    }
    fs::write(aside.join(RECORD), manifest::text(&record)).map_err(failed)?;
    files::seal(&aside)?;
    files::remove_tree(dir)?;
    fs::rename(&aside, dir).map_err(failed)?;
    files::sync_dir(dir.parent().unwrap_or(dir))
}

/// Takes a kernel out of the cache, if it is still what came into it.
fn open(dir: &Path) -> Result<Kernel> {
    let damaged = |path: &Path| Error::new(ErrorKind::Corrupt, format!("{} was changed", path.display()));
    let record: Record = manifest::read(&dir.join(RECORD))?;
    let file = dir.join("vmlinuz");
    if digest::of_file(&file)? != record.kernel {
        return Err(damaged(&file));
    }
    let mut modules = Vec::new();
    for ModuleRecord { name, digest } in record.modules {
        let path = dir.join(format!("{name}.ko"));
        let content =
            fs::read(&path).map_err(|error| Error::io(format!("{} cannot be read", path.display()), error))?;
        if digest::of_bytes(&content) != digest {
            return Err(damaged(&path));
        }
        modules.push(Module { name, content });
    }
    Ok(Kernel { version: record.version, file, modules, tells_panic: record.tells_panic, ours: true })
}

/// The kernel that came into the cache last, of those in a form that we know.
pub(crate) fn newest(cache: &Path) -> Option<PathBuf> {
    let dirs = list(cache).ok()?.into_iter().filter(|dir| cached_version(dir).is_some());
    dirs.max_by_key(|dir| fs::metadata(dir.join(RECORD)).and_then(|meta| meta.modified()).ok())
}

fn unpack(work: &Work<'_>, file: &Path) -> Result<Vec<u8>> {
    let (tool, package) = match file.extension().and_then(|end| end.to_str()) {
        Some("xz") => ("xz", "xz-utils"),
        Some("zst") => ("zstd", "zstd"),
        Some("gz") => ("gzip", "gzip"),
        _ => return fs::read(file).map_err(|error| Error::io(format!("{} cannot be read", file.display()), error)),
    };
    work.run(&Tool::new(tool, package).arg("-dc").arg(file))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_control_record_is_read() {
        let control = "Package: linux-image-virtual\nVersion: 6.8.0.31.31\nDepends: linux-image-6.8.0-31-generic (= 6.8.0-31.31), \
                       linux-modules-6.8.0-31-generic, kmod | other\nDescription: Depends: not\n";
        assert_eq!(depends(control), ["linux-image-6.8.0-31-generic", "linux-modules-6.8.0-31-generic", "kmod"]);
        assert_eq!(field(control, "Version"), Some("6.8.0.31.31"));
        assert_eq!(field(control, "Depend"), None);
    }

    #[test]
    fn a_kernel_comes_out_of_the_cache_as_it_went_in_or_not_at_all() {
        let dir = tempfile::tempdir().unwrap();
        let cancel = crate::progress::Cancel::new();
        let work = Work::new(dir.path().join("work"), &cancel, &|_| {});
        fs::create_dir_all(work.path("")).unwrap();
        let place = dir.path().join("kernel-1");
        let put = || {
            fs::write(work.path("vmlinuz"), "a kernel").unwrap();
            let modules = vec![Module { name: "virtio".into(), content: b"module".to_vec() }];
            let (version, file) = ("6.1".to_owned(), work.path("vmlinuz"));
            store(&work, &place, &Kernel { version, file, modules, tells_panic: true, ours: true }).unwrap();
            assert!(work.path("kernel").symlink_metadata().is_err(), "moved, and nothing is left");
        };
        put();
        let kernel = open(&place).unwrap();
        assert_eq!((kernel.version.as_str(), kernel.modules[0].content.as_slice()), ("6.1", b"module".as_slice()));
        assert!(kernel.tells_panic);
        for name in ["vmlinuz", "virtio.ko", RECORD] {
            let path = place.join(name);
            fs::remove_file(&path).unwrap();
            fs::write(&path, "another").unwrap();
            assert_eq!(open(&place).unwrap_err().kind(), ErrorKind::Corrupt, "{name}");
            put();
        }
        open(&place).unwrap();
    }
}
