//! The conformance suite on real QEMU machines: on those that boot, and on those that are forks of a template.

mod common;

use common::{QemuRig, base, runtime};

mod booting {
    use super::{QemuRig, base, runtime};

    pub fn run(name: &str) {
        let Some(image) = base() else { return };
        runtime().block_on(vmkit::conformance::run(name, QemuRig::new(image)));
    }

    vmkit::conformance_suite!(crate::booting::run);
}

mod forking {
    use super::{QemuRig, base, runtime};

    pub fn run(name: &str) {
        let Some(image) = base() else { return };
        runtime().block_on(vmkit::conformance::run(name, QemuRig::forking(image)));
    }

    vmkit::conformance_suite!(crate::forking::run);
}
