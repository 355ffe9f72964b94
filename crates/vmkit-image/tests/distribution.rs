//! The built-in images for real: the distribution's kernel, and Debian from this machine's package sources.

mod common;

use std::os::unix::fs::{MetadataExt, PermissionsExt};

use common::{agent, assert_sound, can_build, has, look, quiet, stat};
use vmkit::ErrorKind;
use vmkit_image::{Cancel, KernelSource, Recipe, Store};

/// One test, because a kernel is downloaded and Debian takes half a minute.
#[test]
fn base_and_debian_share_the_distributions_kernel() {
    if !can_build() || !has(&["mmdebstrap", "apt-get", "dpkg-deb"]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path().join("store")).unwrap();
    let build = |name: &str| {
        let recipe = Recipe::built_in(name, agent()).unwrap().kernel(KernelSource::Distribution);
        store.build(name, &recipe, &Cancel::new(), &quiet).unwrap()
    };
    let base = build("base");
    let kernel = std::fs::read(&base.kernel).unwrap();
    if cfg!(target_arch = "x86_64") {
        assert_eq!(&kernel[0x202..0x206], b"HdrS", "a kernel that boots");
    }
    let initramfs = std::fs::read(&base.initramfs).unwrap();
    let find = |text: &str| initramfs.windows(text.len()).position(|window| window == text.as_bytes());
    assert!(find("lib/modules/virtio_blk.ko") < find("etc/vmkit/modules\0"));
    for module in ["virtio_ring", "virtio", "virtio_pci", "virtio_blk", "virtio_console"] {
        assert!(find(&format!("/lib/modules/{module}.ko\n")).is_some(), "{module} is not loaded");
    }

    let debian = build("debian");
    let disk = debian.disk.as_ref().unwrap();
    assert_sound(disk);
    assert!(look(disk, "cat /usr/lib/os-release").contains("VERSION_CODENAME="));
    assert_eq!(stat(disk, "/usr/bin/apt-get").1, 0o755);
    assert_eq!(look(disk, "cat /etc/hostname"), "vmkit\n");
    assert_eq!(look(disk, "cat /etc/machine-id"), "");
    assert_eq!((stat(disk, "/usr/bin/su").1, stat(disk, "/tmp").1), (0o4755, 0o1777));
    assert_eq!(stat(disk, "/etc/shadow").1, 0o640);
    let meta = disk.metadata().unwrap();
    assert!(meta.len() == 4 << 30 && meta.blocks() * 512 < 512 << 20, "{} KiB", meta.blocks() / 2);
    let inode = |image: &vmkit::BootImage| image.kernel.metadata().unwrap().ino();
    assert_eq!(inode(&base), inode(&debian), "one file under two names");

    // So what damages one damages both, and the store's own copy: it is fetched again.
    std::fs::set_permissions(&base.kernel, PermissionsExt::from_mode(0o644)).unwrap();
    std::fs::write(&base.kernel, vec![0; kernel.len()]).unwrap();
    assert_eq!(store.verify("base").unwrap_err().kind(), ErrorKind::Corrupt);
    assert_eq!(build("base"), base);
    store.verify("base").unwrap();
    assert_eq!(store.verify("debian").unwrap_err().next_step(), Some("build it again: vmkit image build debian"));
}
