//! An image is put together in a directory that nobody else knows, then moved into the store.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use rustix::fs::{CWD, RenameFlags, renameat_with};
use rustix::io::Errno;
use vmkit::{Error, ErrorKind, Result};

use crate::agent::Agent;
use crate::digest;
use crate::files;
use crate::initramfs;
use crate::kernel;
use crate::loader;
use crate::manifest::{self, DISK, FORMAT, FileEntry, INITRAMFS, KERNEL, LOADER, Manifest};
use crate::progress::Phase;
use crate::recipe::Recipe;
use crate::root;
use crate::run::Work;

/// The agent mounts this disk as its root; console and the rest are the backend's. Of the security modules that Debian's kernels
/// begin with, those that do something without a policy that nobody ships: TOMOYO looks up the path of every program, and allows it.
const CMDLINE: &str = "vmkit.root=/dev/vda vmkit.rootfstype=ext4 lsm=landlock,lockdown,yama,integrity,apparmor,bpf";

/// Makes an image in the directory `image` and describes it.
pub(crate) fn build(work: &Work<'_>, recipe: &Recipe, kernels: &Path, image: &Path) -> Result<Manifest> {
    let kernel = kernel::prepare(work, &recipe.kernel, kernels)?;
    root::make(work, &recipe.root, recipe.size, &image.join(DISK))?;
    let agent = read_agent(&recipe.agent)?;
    work.report(Phase::Initramfs, &format!("the agent and {} modules", kernel.modules.len()));
    match kernel.ours {
        true => link(&kernel.file, &image.join(KERNEL))?,
        false => copy(&kernel.file, &image.join(KERNEL))?,
    }
    // Elsewhere nothing has ever been rebooted.
    let reboots = kernel.tells_panic && cfg!(target_arch = "x86_64");
    let loader = if reboots { cut(work, &image.join(KERNEL))? } else { None };
    let archive = initramfs::archive(&agent, &kernel.modules);
    let mut files = BTreeMap::new();
    match loader {
        Some(loader::Loader { kernel, front }) => {
            write(&image.join(LOADER), &kernel)?;
            files.insert(LOADER.to_owned(), entry(&image.join(LOADER), digest::of_file)?);
            write(&image.join(INITRAMFS), &[front, archive].concat())?;
        }
        None => write(&image.join(INITRAMFS), &archive)?,
    }

    work.report(Phase::Finish, "checking");
    files.insert(DISK.to_owned(), entry(&image.join(DISK), digest::dig_holes)?);
    files.insert(INITRAMFS.to_owned(), entry(&image.join(INITRAMFS), digest::of_file)?);
    files.insert(KERNEL.to_owned(), entry(&image.join(KERNEL), digest::of_file)?);
    work.check()?;
    describe(image, kernel.version, reboots, &recipe.agent, files)
}

/// What starts the kernel where memory for it is not to be held; none for a kernel that has to be started as it is.
fn cut(work: &Work<'_>, kernel: &Path) -> Result<Option<loader::Loader>> {
    let bytes = fs::read(kernel).map_err(|error| Error::io(format!("{} cannot be read", kernel.display()), error))?;
    match loader::cut(&bytes) {
        Ok(loader) => Ok(Some(loader)),
        Err(why) => {
            work.report(Phase::Kernel, &format!("every machine will hold the whole kernel in memory: {why}"));
            Ok(None)
        }
    }
}

/// Makes the same image with another agent: the disk and the kernel are shared, only the initramfs is new.
pub(crate) fn exchange_agent(
    work: &Work<'_>,
    old: &Path,
    manifest: &Manifest,
    agent: &Agent,
    image: &Path,
) -> Result<Manifest> {
    work.report(Phase::Initramfs, "bringing the agent up to date");
    let read = |name: &str| {
        let path = old.join(name);
        fs::read(&path).map_err(|error| Error::io(format!("{} cannot be read", path.display()), error))
    };
    let mut files = manifest.files.clone();
    let mut content = read(INITRAMFS)?;
    let front = match files.contains_key(LOADER) {
        true => loader::front_size(&read(LOADER)?).filter(|size| *size <= content.len()),
        false => Some(0),
    };
    let archive =
        content.split_off(front.ok_or_else(|| Error::new(ErrorKind::Corrupt, "the image's loader is damaged"))?);
    content.extend(initramfs::with_agent(&archive, &read_agent(agent)?)?);
    write(&image.join(INITRAMFS), &content)?;
    files.insert(INITRAMFS.to_owned(), entry(&image.join(INITRAMFS), digest::of_file)?);
    for name in files.keys().filter(|name| *name != INITRAMFS) {
        link(&old.join(name), &image.join(name))?;
    }
    describe(image, manifest.kernel_version.clone(), manifest.reboots, agent, files)
}

/// Moves a finished image to its place. What was there, if anything, is damaged: the two change places.
pub(crate) fn place(work: &Work<'_>, image: &Path, place: &Path) -> Result<()> {
    work.report(Phase::Finish, "writing through to disk");
    files::seal(image)?;
    let failed = |error| Error::io(format!("{} cannot be put in its place", place.display()), error);
    match renameat_with(CWD, image, CWD, place, RenameFlags::EXCHANGE) {
        Ok(()) => {}
        Err(Errno::NOENT) => fs::rename(image, place).map_err(failed)?,
        // A file system that cannot exchange: for a moment nothing is there, as good as what was.
        Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => {
            fs::rename(place, work.path("damaged")).map_err(failed)?;
            fs::rename(image, place).map_err(failed)?;
        }
        Err(error) => return Err(failed(error.into())),
    }
    files::sync_dir(place.parent().unwrap_or(place))
}

fn describe(
    image: &Path,
    kernel: String,
    reboots: bool,
    agent: &Agent,
    files: BTreeMap<String, FileEntry>,
) -> Result<Manifest> {
    let manifest = Manifest {
        format: FORMAT,
        digest: String::new(),
        created: manifest::now(),
        kernel_version: kernel,
        agent_digest: agent.digest().to_owned(),
        agent_version: agent.version().to_owned(),
        cmdline: CMDLINE.to_owned(),
        reboots,
        files,
    }
    .seal();
    write(&image.join("manifest.json"), &manifest::text(&manifest))?;
    Ok(manifest)
}

fn entry(path: &Path, sum: fn(&Path) -> Result<String>) -> Result<FileEntry> {
    let meta = path.metadata().map_err(|error| Error::io(format!("{} cannot be read", path.display()), error))?;
    Ok(FileEntry { digest: sum(path)?, size: meta.len() })
}

/// Reads the agent again, and makes sure that it is still the one whose digest we have.
fn read_agent(agent: &Agent) -> Result<Vec<u8>> {
    let path = agent.path();
    let bytes = fs::read(path).map_err(|error| Error::io(format!("{} cannot be read", path.display()), error))?;
    match digest::of_bytes(&bytes) == agent.digest() {
        true => Ok(bytes),
        false => Err(Error::new(ErrorKind::Busy, format!("{} changed meanwhile", path.display()))
            .hint("try again when the agent's build is done")),
    }
}

fn write(path: &Path, content: &[u8]) -> Result<()> {
    fs::write(path, content).map_err(|error| Error::io(format!("{} cannot be written", path.display()), error))
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    let failed = |error| Error::io(format!("{} cannot be copied to {}", from.display(), to.display()), error);
    fs::copy(from, to).map(drop).map_err(failed)
}

/// A second name for a file of the store, which is never written to.
fn link(from: &Path, to: &Path) -> Result<()> {
    // Where there are no links a copy does, without holes: they are dug again.
    fs::hard_link(from, to).or_else(|_| copy(from, to).and_then(|()| digest::dig_holes(to)).map(drop))
}
