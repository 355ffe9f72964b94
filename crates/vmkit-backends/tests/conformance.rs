//! The conformance suite on real QEMU machines.

mod common;

use common::{QemuRig, base, runtime};

fn run(name: &str) {
    let Some(image) = base() else { return };
    runtime().block_on(vmkit::conformance::run(name, QemuRig::new(image)));
}

vmkit::conformance_suite!(crate::run);
