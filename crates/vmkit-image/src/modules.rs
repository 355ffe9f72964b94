//! Which kernel modules a machine needs before its root disk is there, and in which order.
//!
//! A distribution's package has no `modules.dep`: `depmod` makes it after installation, from each module's `.modinfo`. That is
//! what is read here, so a tree that was only unpacked will do, and no `depmod` is needed.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use vmkit::{Error, ErrorKind, Result};

use crate::elf::Elf;

/// Loaded before all others, where a kernel has it: from then on the host hears of a panic at once.
const FIRST: &[&str] = &[PANIC];
/// Tells the host that the kernel has given up; since Linux 5.13.
const PANIC: &str = "pvpanic_mmio";
/// Without these no machine comes up.
const REQUIRED: &[&str] = &["virtio_pci", "virtio_blk", "virtio_console", "ext4"];
/// These are loaded where a kernel has them.
const OPTIONAL: &[&str] = &["virtio_mmio", "virtio_net", "virtio_rng"];

/// A module, unpacked.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Module {
    pub name: String,
    pub content: Vec<u8>,
}

/// Reads a module's file and unpacks it.
pub(crate) type Load<'a> = &'a dyn Fn(&Path) -> Result<Vec<u8>>;

/// The modules that a guest loads at boot, each after those it needs.
pub(crate) fn for_boot(tree: &Path, load: Load<'_>) -> Result<Vec<Module>> {
    resolve(tree, [FIRST, REQUIRED, OPTIONAL], load)
}

/// Whether a kernel with these modules, of this tree, tells the host of a panic.
pub(crate) fn tell_of_a_panic(modules: &[Module], tree: &Path) -> bool {
    modules.iter().any(|module| module.name == PANIC) || builtin(tree).is_some_and(|names| names.contains(PANIC))
}

/// What is built in; none where the tree does not say.
fn builtin(tree: &Path) -> Option<BTreeSet<String>> {
    let text = fs::read_to_string(tree.join("modules.builtin")).ok()?;
    Some(text.lines().filter_map(|line| name_of(Path::new(line))).collect())
}

/// Those of the second list must be there.
fn resolve(tree: &Path, lists: [&[&str]; 3], load: Load<'_>) -> Result<Vec<Module>> {
    let mut files = BTreeMap::new();
    index(tree, &mut files)?;
    let mut order = Order { tree, files, builtin: builtin(tree), load, done: BTreeSet::new(), modules: Vec::new() };
    for (list, required) in lists.into_iter().zip([false, true, false]) {
        for name in list {
            if required || order.files.contains_key(*name) {
                order.add(name)?;
            }
        }
    }
    Ok(order.modules)
}

struct Order<'a> {
    tree: &'a Path,
    files: BTreeMap<String, PathBuf>,
    /// None: the tree does not say, so what it has not got is taken to be built in.
    builtin: Option<BTreeSet<String>>,
    load: Load<'a>,
    done: BTreeSet<String>,
    modules: Vec<Module>,
}

impl Order<'_> {
    fn add(&mut self, name: &str) -> Result<()> {
        // Marked before its dependencies are added, so a circle ends.
        if !self.done.insert(name.to_owned()) {
            return Ok(());
        }
        let Some(file) = self.files.get(name).cloned() else {
            if self.builtin.as_ref().is_none_or(|builtin| builtin.contains(name)) {
                return Ok(());
            }
            return Err(Error::new(
                ErrorKind::InvalidArgument,
                format!("the kernel has no {name}, neither built in nor as a module in {}", self.tree.display()),
            )
            .hint("choose a kernel for virtual machines with --kernel and --modules"));
        };
        let content = (self.load)(&file)?;
        let (needs, wants) = dependencies(&content).map_err(|error| {
            Error::new(ErrorKind::Corrupt, format!("{} is not a kernel module", file.display())).caused_by(error)
        })?;
        for need in needs {
            self.add(&need)?;
        }
        for want in wants {
            if self.files.contains_key(&want) {
                self.add(&want)?;
            }
        }
        self.modules.push(Module { name: name.to_owned(), content });
        Ok(())
    }
}

/// What a module cannot do without, and what it wants loaded before itself where there is such a thing.
fn dependencies(content: &[u8]) -> Result<(Vec<String>, Vec<String>)> {
    let info = Elf::parse(content)?
        .section(".modinfo")
        .ok_or_else(|| Error::new(ErrorKind::Corrupt, "it has no section .modinfo"))?;
    let (mut needs, mut wants) = (Vec::new(), Vec::new());
    for field in info.split(|byte| *byte == 0) {
        let field = String::from_utf8_lossy(field);
        if let Some(list) = field.strip_prefix("depends=") {
            needs.extend(list.split(',').filter(|name| !name.is_empty()).map(normal));
        } else if let Some(list) = field.strip_prefix("softdep=pre:") {
            wants.extend(list.split_whitespace().take_while(|word| *word != "post:").map(normal));
        }
    }
    Ok((needs, wants))
}

fn index(dir: &Path, files: &mut BTreeMap<String, PathBuf>) -> Result<()> {
    let failed = |error| Error::io(format!("modules in {} cannot be read", dir.display()), error);
    for entry in fs::read_dir(dir).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let path = entry.path();
        // An installed tree has links to the kernel's sources, which are not followed.
        if entry.file_type().map_err(failed)?.is_dir() {
            index(&path, files)?;
        } else if let Some(name) = name_of(&path) {
            files.insert(name, path);
        }
    }
    Ok(())
}

/// `virtio-rng.ko.xz` is the module `virtio_rng`.
fn name_of(path: &Path) -> Option<String> {
    let file = path.file_name()?.to_str()?;
    let (name, packed) = file.split_once(".ko")?;
    matches!(packed, "" | ".xz" | ".zst" | ".gz").then(|| normal(name))
}

fn normal(name: &str) -> String {
    name.replace('-', "_")
}

#[cfg(test)]
#[path = "modules_tests.rs"]
mod tests;
