//! What goes wrong on other people's machines: missing tools, full disks, files that changed.

mod common;

use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use common::{Bench, agent, answer, builder as builder_as, can_build, has, quiet};
use vmkit::ErrorKind;
use vmkit_image::{Cancel, RootSource};

#[test]
#[ignore = "the other tests run it as a process of its own"]
fn builder() {
    common::be_a_builder();
}

#[test]
fn a_missing_tool_is_named_with_its_package() {
    if !can_build() || !has(&["xz"]) {
        return;
    }
    let bench = Bench::new();
    let tree = bench.tree("tree", "content");
    let tar = bench.path("root.tar.xz");
    let pack = Command::new("tar").arg("-cJf").arg(&tar).arg("-C").arg(&tree).arg(".").status();
    assert!(pack.unwrap().success());
    let tar = format!("tar:{}", tar.display());
    for (tool, package, root) in [
        ("busybox", "busybox-static", "base"),
        ("fakeroot", "fakeroot", "base"),
        ("fakeroot", "fakeroot", tar.as_str()),
        ("tar", "tar", tar.as_str()),
        ("xz", "xz-utils", tar.as_str()),
    ] {
        let error = answer(builder_as(&bench, root, &["env"]).env("PATH", path_without(&bench, tool))).unwrap_err();
        assert!(error.starts_with(&format!("missing-dependency | {tool} is not installed")), "{error}");
        assert!(error.ends_with(&format!("install the package {package}")), "{error}");
        bench.assert_swept();
    }
}

/// A directory of all programs but one.
fn path_without(bench: &Bench, tool: &str) -> PathBuf {
    let dir = bench.path(&format!("without-{tool}"));
    if !dir.exists() {
        std::fs::create_dir(&dir).unwrap();
        for entry in ["/usr/bin", "/bin"].iter().flat_map(|dir| std::fs::read_dir(dir).unwrap()) {
            let path = entry.unwrap().path();
            if !path.ends_with(tool) {
                let _ = symlink(&path, dir.join(path.file_name().unwrap()));
            }
        }
    }
    dir
}

#[test]
fn a_full_disk_is_called_that_and_leaves_what_was_there() {
    if !can_build() || !has(&["unshare"]) {
        return;
    }
    let user = if rustix::process::geteuid().is_root() { "--mount" } else { "--map-root-user" };
    if !Command::new("unshare").args([user, "--mount", "true"]).status().unwrap().success() {
        eprintln!("SKIPPED: no mount namespaces here");
        return;
    }
    let bench = Bench::new();
    std::fs::create_dir(bench.path("small")).unwrap();
    std::fs::remove_dir_all(bench.path("store")).unwrap();
    symlink("small", bench.path("store")).unwrap();
    let tree = bench.tree("tree", "content");
    std::fs::write(tree.join("much"), vec![1; 9 << 20]).unwrap();
    let tar = bench.path("root.tar");
    assert!(Command::new("tar").arg("-cf").arg(&tar).arg("-C").arg(&tree).arg(".").status().unwrap().success());
    let tar = format!("tar:{}", tar.display());
    for (root, step) in [("base", 512), (tar.as_str(), 6144)] {
        // Full while the tree is laid out or unpacked, while the disk is written, near the end, and at last not at all.
        let mut failures = 0;
        while !builds_in(&bench, root, user, 1024 + step * failures) {
            failures += 1;
        }
        assert!(failures > 2, "{root} fits everywhere");
    }
}

/// Builds in a file system of this many KiB. Where that fails, it is called what it is, and nothing is left behind.
fn builds_in(bench: &Bench, root: &str, user: &str, kib: u32) -> bool {
    let script = r#"
        small=$VMKIT_TEST_BENCH/small
        mount -t tmpfs -o size="$1k" small "$small" && shift && "$@"
        find "$small" -path '*/work*' | sed 's/^/left /'
    "#;
    let size = kib.to_string();
    let before = ["unshare", user, "--mount", "sh", "-c", script, "sh", &size];
    let output = builder_as(bench, root, &before).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(!text.contains("\nleft "), "{kib} KiB: {text}");
    let line = |start: &str| text.lines().find_map(|line| line.strip_prefix(start));
    if line("digest ").is_some() {
        return true;
    }
    let error = line("error ").unwrap_or_else(|| panic!("{kib} KiB: {text}"));
    assert!(error.starts_with("resource-exhausted | "), "{kib} KiB: {error}");
    assert!(error.contains("free some space"), "{kib} KiB: {error}");
    false
}

/// Changes a byte in the middle, whatever the mode of the file says.
fn flip(path: &Path) {
    std::fs::set_permissions(path, PermissionsExt::from_mode(0o644)).unwrap();
    let mut bytes = std::fs::read(path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 0xff;
    std::fs::write(path, bytes).unwrap();
}

#[test]
fn damage_that_keeps_the_size_is_found_and_repaired() {
    if !can_build() {
        return;
    }
    let bench = Bench::new();
    let tree = bench.tree("tree", "content");
    let image = bench.build("mine", RootSource::Dir(tree.clone())).unwrap();
    let disk = image.disk.clone().unwrap();
    let again = format!("vmkit image build mine --rootfs {}", tree.display());
    for file in [&image.kernel, &image.initramfs, &disk] {
        flip(file);
        let error = bench.store.verify("mine").unwrap_err();
        let name = file.file_name().unwrap().to_str().unwrap();
        assert!(error.kind() == ErrorKind::Corrupt && error.message().contains(name), "{error:?}");
        assert!(error.next_step().unwrap().contains(&again), "{error:?}");
        // It is not passed on to the image with a newer agent.
        let error = bench.store.ensure("mine", &bench.other_agent(), &Cancel::new(), &quiet).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt);

        assert_eq!(bench.build("mine", RootSource::Dir(tree.clone())).unwrap(), image);
        bench.store.verify("mine").unwrap();
        bench.assert_swept();
    }
    // Its description, and what its name means.
    let manifest = disk.with_file_name("manifest.json");
    let record = bench.store.path().join("names/mine.json");
    let text = std::fs::read_to_string(&manifest).unwrap();
    let record_text = std::fs::read_to_string(&record).unwrap();
    for (file, damage) in [
        (&manifest, String::new()),
        (&manifest, text.replace("vmkit.root=/dev/vda", "vmkit.root=/dev/vdb")),
        (&manifest, text[..text.len() / 2].to_owned()),
        (&record, "{}".to_owned()),
        (&record, record_text.replace("sha256:", "../../../")),
        (&record, record_text.replace(&image.digest, &format!("sha256:{:064}", 0))),
    ] {
        std::fs::set_permissions(file, PermissionsExt::from_mode(0o644)).unwrap();
        std::fs::write(file, &damage).unwrap();
        let error = bench.store.get("mine").unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{damage}");
        assert!(error.next_step().unwrap().contains("vmkit image build mine --rootfs"), "{error:?}");
        assert_eq!(bench.store.info("mine").unwrap().problems.len(), 1);
        assert_eq!(bench.build("mine", RootSource::Dir(tree.clone())).unwrap(), image);
        bench.store.verify("mine").unwrap();
    }
}

#[test]
fn a_name_nobody_can_read_keeps_every_image() {
    if !can_build() {
        return;
    }
    let bench = Bench::new();
    let image = bench.build("mine", RootSource::Dir(bench.tree("tree", "content"))).unwrap();
    std::fs::write(bench.store.path().join("names/mine.json"), "{").unwrap();
    assert_eq!(bench.store.collect(&|_| false).unwrap(), 0);
    assert!(image.disk.as_ref().unwrap().exists());
    bench.store.remove("mine", &|_| false).unwrap();
    assert!(!image.disk.as_ref().unwrap().exists());
}

#[test]
fn names_that_are_paths_are_refused_everywhere() {
    let bench = Bench::new();
    let store = &bench.store;
    for name in ["a/b", "/etc/passwd", "..", ".hidden", "", "a b", "a\nb", &"x".repeat(64)] {
        for error in [
            store.get(name).unwrap_err(),
            store.info(name).unwrap_err(),
            store.verify(name).unwrap_err(),
            store.remove(name, &|_| false).unwrap_err(),
            store.ensure(name, &agent(), &Cancel::new(), &quiet).unwrap_err(),
            bench.build(name, RootSource::Base).unwrap_err(),
        ] {
            assert_eq!(error.kind(), ErrorKind::InvalidArgument, "{name:?}: {error:?}");
            assert!(error.next_step().is_some(), "{name:?}");
        }
    }
}

#[test]
fn an_agent_that_no_guest_could_run_is_refused() {
    let bench = Bench::new();
    let bytes = std::fs::read(agent().path()).unwrap();
    let mut foreign = bytes.clone();
    foreign[18] ^= 0xff;
    let dynamic = std::fs::read(std::env::current_exe().unwrap()).unwrap();
    for (what, content) in
        [("text", b"#!/bin/sh\n".to_vec()), ("foreign", foreign), ("dynamic", dynamic), ("empty", vec![])]
    {
        let path = bench.path(what);
        std::fs::write(&path, content).unwrap();
        let error = vmkit_image::Agent::new(path, "test").unwrap_err();
        assert_eq!(error.kind(), ErrorKind::MissingDependency, "{what}");
        assert!(error.next_step().unwrap().contains("make agent"), "{what}");
    }
}
