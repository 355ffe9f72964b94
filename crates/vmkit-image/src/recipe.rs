//! What an image is to be made of.

use std::path::PathBuf;

use vmkit::{Error, ErrorKind, Result};

use crate::agent::Agent;

/// Where the root file system comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum RootSource {
    /// A shell and the usual tools from BusyBox; made in a second.
    Base,
    /// A minimal system with apt, of this machine's distribution and release, from its own package sources.
    Debian,
    /// A directory. Owners are as the file system has them.
    Dir(PathBuf),
    /// A tar, plain or compressed. Owners, modes, links and device nodes are as it has them, whoever builds.
    Tar(PathBuf),
}

/// Where the kernel comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum KernelSource {
    /// The distribution's kernel for virtual machines, fetched by apt into the store. Nothing is installed.
    Distribution,
    /// A kernel and the tree of its modules; no modules when it has built in what it needs.
    Files {
        /// The kernel, bootable by QEMU's `-kernel`.
        kernel: PathBuf,
        /// The directory that contains `kernel/`, `modules.builtin` and so on: `/lib/modules/VERSION`.
        modules: Option<PathBuf>,
    },
}

impl KernelSource {
    /// `VMKIT_KERNEL` and `VMKIT_MODULES` when they are set, else the distribution's.
    pub fn from_env() -> KernelSource {
        let path = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        match path("VMKIT_KERNEL") {
            Some(kernel) => KernelSource::Files { kernel, modules: path("VMKIT_MODULES") },
            None => KernelSource::Distribution,
        }
    }
}

/// How to make an image.
#[derive(Clone, Debug)]
pub struct Recipe {
    pub(crate) root: RootSource,
    pub(crate) kernel: KernelSource,
    pub(crate) agent: Agent,
    pub(crate) size: Option<u64>,
}

impl Recipe {
    /// The names that need no root file system of yours.
    pub const BUILT_IN: &'static [&'static str] = &["base", "debian"];

    /// From a root file system, with the kernel of [`KernelSource::from_env`] and a disk of the default size.
    pub fn new(root: RootSource, agent: Agent) -> Recipe {
        Recipe { root, kernel: KernelSource::from_env(), agent, size: None }
    }

    /// The built-in recipe of this name.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`] when there is none.
    pub fn built_in(name: &str, agent: Agent) -> Result<Recipe> {
        match name {
            "base" => Ok(Recipe::new(RootSource::Base, agent)),
            "debian" => Ok(Recipe::new(RootSource::Debian, agent)),
            _ => Err(Error::new(ErrorKind::InvalidArgument, format!("no built-in image is called {name:?}")).hint(
                format!(
                    "built in are {}; for your own: vmkit image build {name} --rootfs DIR|TAR",
                    Recipe::BUILT_IN.join(" and ")
                ),
            )),
        }
    }

    /// Sets where the kernel comes from.
    #[must_use]
    pub fn kernel(mut self, kernel: KernelSource) -> Recipe {
        self.kernel = kernel;
        self
    }

    /// Sets how large the disk is from inside a machine, in bytes. The default is 4 GiB, more when the content needs it; only
    /// what is written occupies space.
    #[must_use]
    pub fn size(mut self, bytes: u64) -> Recipe {
        self.size = Some(bytes);
        self
    }

    /// What the root file system is made from, for listings.
    pub(crate) fn source(&self) -> String {
        match &self.root {
            RootSource::Base => "base".to_owned(),
            RootSource::Debian => "debian".to_owned(),
            RootSource::Dir(path) | RootSource::Tar(path) => {
                std::path::absolute(path).unwrap_or_else(|_| path.clone()).display().to_string()
            }
        }
    }

    /// The built-in recipe's name, when it is one.
    pub(crate) fn name(&self) -> Option<&'static str> {
        match self.root {
            RootSource::Base => Some("base"),
            RootSource::Debian => Some("debian"),
            RootSource::Dir(_) | RootSource::Tar(_) => None,
        }
    }
}
