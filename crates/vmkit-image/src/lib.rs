//! Images of vmkit: kernel, initramfs and base disk, in a store addressed by content.
//!
//! ```text
//!  Recipe ──▶ Store::build ──┬─ kernel     the distribution's package, unpacked: no root, nothing installed
//!                            ├─ initramfs  the agent as /init, and the modules that reach the root disk; the kernel in front
//!                            ├─ loader     what takes the kernel from there
//!                            └─ disk       a sparse ext4 that machines share read-only
//!                                │
//!          images/sha256-…  ◀── rename ── work/      names/base.json ──▶ sha256:…
//! ```
//!
//! Everything here blocks: it copies files and runs tools. From async code, call it in `spawn_blocking`.
//!
//! An image is complete or not there. It is made in a directory of its own under the store's lock, written to disk, and
//! renamed; what a killed build left is swept by the next one. The name moves last, so it never points at half an image.
//! A machine made from an image keeps it by digest: building the name again makes another image beside it, and
//! [`Store::collect`] removes what neither a name nor a machine refers to.
//!
//! Deliberately absent: a registry client, layers, and boot loaders on disks. A root file system comes as a directory or a tar.

mod agent;
mod builder;
mod digest;
mod elf;
mod files;
mod initramfs;
mod kernel;
mod loader;
mod lock;
mod manifest;
mod modules;
mod progress;
mod recipe;
mod root;
mod run;
mod store;

pub use agent::Agent;
pub use manifest::ImageInfo;
pub use progress::{Cancel, Phase, Progress};
pub use recipe::{KernelSource, Recipe, RootSource};
pub use store::{Hold, Store};
