//! Hypervisor backends of vmkit, written against its public API alone.
//!
//! [`qemu`] is the one there is. A backend of your own needs no more than this crate uses: the traits of
//! [`vmkit::Driver`] and [`vmkit::Provider`], and the suite in `vmkit::conformance` to prove it.

pub mod process;
pub mod qemu;
