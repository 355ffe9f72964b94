//! The store: names, digests, agents, and what is thrown away when.

mod common;

use std::os::unix::fs::MetadataExt;

use common::{Bench, agent, assert_sound, can_build, look, quiet};
use vmkit::ErrorKind;
use vmkit_image::{Cancel, RootSource};

#[test]
fn base_has_a_user_land_and_its_disk_is_sparse() {
    if !can_build() {
        return;
    }
    let bench = Bench::new();
    let image = bench.build("base", RootSource::Base).unwrap();
    let disk = image.disk.as_ref().unwrap();
    let meta = disk.metadata().unwrap();
    assert_eq!(meta.len(), common::SIZE);
    assert!(meta.blocks() * 512 < meta.len() / 4, "{} blocks", meta.blocks());
    assert_eq!(meta.mode() & 0o222, 0, "a base disk is never written to");
    assert_sound(disk);
    assert!(look(disk, "stat /bin/sh").contains("Fast link dest: \"busybox\""));
    assert_eq!(common::stat(disk, "/tmp"), ("directory".to_owned(), 0o1777, 0, 0));
    assert_eq!(common::stat(disk, "/bin/busybox"), ("regular".to_owned(), 0o755, 0, 0));
    let modules = "lsm=landlock,lockdown,yama,integrity,apparmor,bpf";
    assert_eq!(image.cmdline, format!("vmkit.root=/dev/vda vmkit.rootfstype=ext4 {modules}"));

    let listed = bench.store.list().unwrap();
    assert_eq!(listed.len(), 1);
    assert_eq!((listed[0].name.as_str(), listed[0].source.as_str()), ("base", "base"));
    assert_eq!((listed[0].virtual_size, &listed[0].digest), (common::SIZE, &image.digest));
    assert!(listed[0].problems.is_empty() && listed[0].size < common::SIZE);
    assert_eq!(bench.store.info("base").unwrap(), listed[0]);
    assert_eq!(bench.store.get("base").unwrap(), image);
    bench.store.verify("base").unwrap();

    // The same recipe gives the same bytes.
    assert_eq!(bench.build("again", RootSource::Base).unwrap().digest, image.digest);
    assert_eq!(bench.entries("images").len(), 1);
    bench.assert_swept();
}

#[test]
fn a_newer_agent_costs_an_initramfs_and_no_disk() {
    if !can_build() {
        return;
    }
    let bench = Bench::new();
    let old = bench.build("mine", RootSource::Dir(bench.tree("tree", "content"))).unwrap();
    assert!(bench.store.is_current("mine", &agent()).unwrap());
    let newer = bench.other_agent();
    assert!(!bench.store.is_current("mine", &newer).unwrap());

    let new = bench.store.ensure("mine", &newer, &Cancel::new(), &quiet).unwrap();
    assert_ne!(new.digest, old.digest);
    assert!(bench.store.is_current("mine", &newer).unwrap());
    let inode = |image: &vmkit::BootImage| image.disk.as_ref().unwrap().metadata().unwrap().ino();
    assert_eq!(inode(&new), inode(&old), "the disk is shared");
    let initramfs = std::fs::read(&new.initramfs).unwrap();
    let agent = std::fs::read(newer.path()).unwrap();
    assert!(initramfs.windows(4096).any(|window| window == &agent[agent.len() - 4096..]));
    assert_eq!(bench.store.ensure("mine", &newer, &Cancel::new(), &quiet).unwrap(), new, "nothing is left to do");

    // A machine has the old image: it stays, disk and all. Then it goes.
    assert_eq!(bench.store.collect(&|digest| digest == old.digest).unwrap(), 0);
    assert!(old.disk.as_ref().unwrap().exists() && old.initramfs.exists());
    bench.store.collect(&|_| false).unwrap();
    assert!(!old.initramfs.exists() && new.disk.as_ref().unwrap().exists());
    bench.store.verify("mine").unwrap();
}

#[test]
fn what_a_machine_or_a_name_refers_to_is_not_removed() {
    if !can_build() {
        return;
    }
    let bench = Bench::new();
    let first = bench.build("one", RootSource::Dir(bench.tree("first", "1"))).unwrap();
    let second = bench.build("one", RootSource::Dir(bench.tree("second", "2"))).unwrap();
    assert_ne!(first.digest, second.digest);
    assert_eq!(bench.build("two", RootSource::Dir(bench.path("second"))).unwrap().digest, second.digest);

    let hold = bench.store.hold().unwrap();
    assert_eq!(bench.store.collect(&|_| false).unwrap(), 0, "somebody is about to refer to one");
    drop(hold);
    assert!(bench.store.collect(&|_| false).unwrap() > 0);
    assert!(!first.kernel.exists() && second.kernel.exists());

    // Another name means the same image: the machine loses nothing.
    bench.store.remove("one", &|digest| digest == second.digest).unwrap();
    let error = bench.store.remove("two", &|digest| digest == second.digest).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Busy);
    assert!(error.next_step().is_some() && second.disk.as_ref().unwrap().exists());
    bench.store.remove("two", &|_| false).unwrap();
    assert!(bench.entries("images").is_empty() && bench.store.list().unwrap().is_empty());
    assert_eq!(bench.store.remove("two", &|_| false).unwrap_err().kind(), ErrorKind::NotFound);
}

#[test]
fn damage_is_seen_and_a_build_repairs_it() {
    if !can_build() {
        return;
    }
    let bench = Bench::new();
    let image = bench.build("mine", RootSource::Dir(bench.tree("tree", "content"))).unwrap();
    std::fs::remove_file(&image.initramfs).unwrap();
    let error = bench.store.get("mine").unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt);
    assert!(error.message().contains("initramfs"), "{error}");
    assert_eq!(bench.store.list().unwrap()[0].problems.len(), 1);
    assert_eq!(bench.build("mine", RootSource::Dir(bench.path("tree"))).unwrap(), image);
    bench.store.verify("mine").unwrap();
    bench.assert_swept();
}

#[test]
fn what_is_not_there_is_named_with_what_to_do() {
    if !can_build() {
        return;
    }
    let bench = Bench::new();
    for error in [bench.store.get("base").unwrap_err(), bench.store.info("base").unwrap_err()] {
        assert_eq!(error.kind(), ErrorKind::NotFound);
        assert!(error.next_step().unwrap().contains("vmkit image build base"));
    }
    let error = vmkit_image::Agent::new(bench.path("no-agent"), "test").unwrap_err();
    assert_eq!(error.kind(), ErrorKind::MissingDependency);
    assert!(error.next_step().unwrap().contains("VMKIT_AGENT"));
    let error = bench.build("../escape", RootSource::Base).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidArgument);
    let error = bench.build("mine", RootSource::Dir(bench.path("nowhere"))).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidArgument);
    bench.assert_swept();
}

#[test]
fn a_cancelled_build_leaves_nothing() {
    if !can_build() {
        return;
    }
    let bench = Bench::new();
    let cancel = Cancel::new();
    let raise = |progress: vmkit_image::Progress<'_>| {
        if progress.phase == vmkit_image::Phase::Disk {
            cancel.cancel();
        }
    };
    let recipe = bench.recipe(RootSource::Base);
    let error = bench.store.build("base", &recipe, &cancel, &raise).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Cancelled);
    assert_eq!(bench.store.get("base").unwrap_err().kind(), ErrorKind::NotFound);
    bench.assert_swept();
}

/// As much of a kernel's header as counts, and then its code.
fn kernel(code: &[u8]) -> Vec<u8> {
    let mut kernel = vec![0; 1024];
    for (at, bytes) in [
        (0x1f1, &[1][..]),
        (0x1fe, &[0x55, 0xaa]),
        (0x202, b"HdrS\x0f\x02"),
        (0x211, &[1]),
        (0x214, &0x10_0000_u32.to_le_bytes()),
        (0x234, &[1]),
        (0x258, &0x100_0000_u64.to_le_bytes()),
    ] {
        kernel[at..at + bytes.len()].copy_from_slice(bytes);
    }
    [&kernel, code].concat()
}

#[test]
#[cfg(target_arch = "x86_64")]
fn a_kernel_that_tells_of_a_panic_boots_again_from_the_front_of_the_initramfs() {
    if !can_build() {
        return;
    }
    let bench = Bench::new();
    let tree = bench.path("6.1-test");
    std::fs::create_dir(&tree).unwrap();
    let built_in =
        ["virtio_pci", "virtio_blk", "virtio_console", "ext4"].map(|name| format!("kernel/{name}.ko\n")).concat();
    let code: Vec<u8> = (0..10_000).map(|at| (at % 253) as u8).collect();
    let build = |name: &str, content: &[u8], built_in: &str| {
        let file = bench.path("given-kernel");
        std::fs::write(&file, content).unwrap();
        std::fs::write(tree.join("modules.builtin"), built_in).unwrap();
        let source = vmkit_image::KernelSource::Files { kernel: file, modules: Some(tree.clone()) };
        let recipe = bench.recipe(RootSource::Dir(bench.path("root"))).kernel(source);
        bench.store.build(name, &recipe, &Cancel::new(), &quiet).unwrap()
    };
    bench.tree("root", "content");
    let read = |path: &std::path::Path| std::fs::read(path).unwrap();
    let tells = format!("{built_in}kernel/pvpanic-mmio.ko\n");

    let silent = build("silent", &kernel(&code), &built_in);
    assert_eq!(silent.loader, None, "its panic would be taken for a reboot");
    let image = build("mine", &kernel(&code), &tells);
    let loader = image.loader.clone().unwrap();
    assert!(loader.metadata().unwrap().len() < 2048);
    let (plain, front) = (read(&silent.initramfs), read(&image.initramfs));
    assert_eq!(front[..code.len()], code);
    assert_eq!(front[12 << 10..], plain, "the archive, on a page of its own");
    assert_eq!(read(&image.kernel), kernel(&code), "and the kernel as it was given");
    bench.store.verify("mine").unwrap();
    // A newer agent changes the archive alone.
    let newer = bench.other_agent();
    let new = bench.store.ensure("mine", &newer, &Cancel::new(), &quiet).unwrap();
    let other = bench.store.ensure("silent", &newer, &Cancel::new(), &quiet).unwrap();
    assert_eq!(new.loader.as_ref().unwrap().metadata().unwrap().ino(), loader.metadata().unwrap().ino());
    assert_eq!(read(&new.initramfs), [&front[..12 << 10], &read(&other.initramfs)].concat());
    assert_ne!(read(&other.initramfs), plain);
    std::fs::remove_file(new.loader.unwrap()).unwrap();
    assert!(bench.store.get("mine").unwrap_err().message().contains("loader"));
    // What cannot be moved is started as it is.
    let odd = build("odd", b"another kind of kernel", &tells);
    assert_eq!((odd.loader.as_ref(), read(&odd.initramfs)), (Some(&odd.kernel), plain));
}
