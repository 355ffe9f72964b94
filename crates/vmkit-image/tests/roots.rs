//! Root file systems of all kinds, and what of them survives.

mod common;

use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use common::{Bench, answer, assert_sound, builder as builder_as, can_build, has, look, stat};
use vmkit::ErrorKind;
use vmkit_image::RootSource;

#[test]
#[ignore = "the other tests run it as a process of its own"]
fn builder() {
    common::be_a_builder();
}

/// Packs a tree of oddities, as anybody.
fn odd_tar(bench: &Bench) -> PathBuf {
    let script = r#"
        mkdir tree && cd tree
        echo own >own; chown 1234:5678 own; chmod 640 own
        echo big >big; chown 3000000000:3000000001 big
        echo suid >suid; chmod 4755 suid; echo sgid >sgid; chmod 2755 sgid
        echo none >none; chmod 0 none
        mkdir sticky; chmod 1777 sticky
        mkdir closed; echo in >closed/in; chmod 0 closed
        ln -s /etc/absolute absolute; ln -s nowhere dangling; ln -s ../../above above
        ln -s "$(printf '%0100d' 7)" long
        echo linked >one; ln one two; ln one closed/three
        mknod null c 1 3; chmod 666 null; mknod loop b 7 200; chown 0:6 loop; mkfifo fifo
        echo space >'a b'; echo dash >-n; echo ue >"ü"; echo quote >"q'\$x"
        truncate -s 8M sparse; echo end >>sparse
        chown 7:8 .; chmod 711 .
        tar -c --sparse -f ../root.tar .
    "#;
    let status = Command::new("fakeroot").args(["--", "sh", "-ec", script]).current_dir(bench.dir.path()).status();
    assert!(status.unwrap().success());
    bench.path("root.tar")
}

fn assert_odd(disk: &Path) {
    assert_sound(disk);
    let expect = |path: &str, kind: &str, mode: u32, user: u32, group: u32| {
        assert_eq!(stat(disk, path), (kind.to_owned(), mode, user, group), "{path}");
    };
    expect("/own", "regular", 0o640, 1234, 5678);
    expect("/big", "regular", 0o644, 3_000_000_000, 3_000_000_001);
    expect("/suid", "regular", 0o4755, 0, 0);
    expect("/sgid", "regular", 0o2755, 0, 0);
    expect("/none", "regular", 0, 0, 0);
    expect("/sticky", "directory", 0o1777, 0, 0);
    expect("/closed", "directory", 0, 0, 0);
    expect("/null", "character special", 0o666, 0, 0);
    expect("/loop", "block special", 0o644, 0, 6);
    expect("/fifo", "FIFO", 0o644, 0, 0);
    expect("/", "directory", 0o711, 7, 8);
    // Nobody put them there, and every guest needs them.
    expect("/proc", "directory", 0o555, 0, 0);
    expect("/tmp", "directory", 0o1777, 0, 0);
    assert!(look(disk, "stat /null").contains("(New-style) Device number: 01:03") || device(disk, "/null", 1, 3));
    assert!(device(disk, "/loop", 7, 200));

    for (path, target) in [("/absolute", "/etc/absolute"), ("/dangling", "nowhere"), ("/above", "../../above")] {
        assert!(look(disk, &format!("stat {path}")).contains(&format!("Fast link dest: \"{target}\"")), "{path}");
    }
    assert_eq!(look(disk, "cat /long"), format!("{:0100}", 7));
    let inode = |path: &str| look(disk, &format!("stat {path}")).split_whitespace().nth(1).unwrap().to_owned();
    assert_eq!(inode("/one"), inode("/two"));
    assert_eq!(inode("/one"), inode("/closed/three"));
    assert!(look(disk, "stat /one").contains("Links: 3"));
    for (path, content) in [
        ("/none", "none\n"),
        ("/closed/in", "in\n"),
        ("\"/a b\"", "space\n"),
        ("/-n", "dash\n"),
        ("/ü", "ue\n"),
        ("/q'$x", "quote\n"),
    ] {
        assert_eq!(look(disk, &format!("cat {path}")), content, "{path}");
    }
    let sparse = look(disk, "stat /sparse");
    assert!(sparse.contains("Size: 8388612"), "{sparse}");
    let blocks = sparse.split("Blockcount: ").nth(1).unwrap().split_whitespace().next().unwrap();
    assert!(blocks.parse::<u64>().unwrap() < 64, "{sparse}");
}

fn device(disk: &Path, path: &str, major: u32, minor: u32) -> bool {
    look(disk, &format!("stat {path}")).contains(&format!("Device major/minor number: {major:02}:{minor:02}"))
}

#[test]
fn a_tar_keeps_owners_modes_links_and_devices() {
    if !can_build() || !has(&["xz", "zstd", "gzip"]) {
        return;
    }
    let bench = Bench::new();
    let tar = odd_tar(&bench);
    let image = bench.build("odd", RootSource::Tar(tar.clone())).unwrap();
    assert_odd(image.disk.as_ref().unwrap());

    // How it is packed, and who builds it where, does not matter.
    for pack in ["gzip", "xz", "zstd"] {
        let packed = bench.path(pack);
        let status = Command::new(pack).arg("-c").arg(&tar).stdout(std::fs::File::create(&packed).unwrap()).status();
        assert!(status.unwrap().success());
        assert_eq!(bench.build("packed", RootSource::Tar(packed)).unwrap().digest, image.digest, "{pack}");
    }
    let Some(other) = other_user() else { return };
    let theirs = Bench::new();
    chown(theirs.dir.path(), Some(other), Some(other)).unwrap();
    std::fs::remove_dir_all(theirs.path("store")).unwrap();
    let id = other.to_string();
    let command = ["setpriv", "--reuid", &id, "--regid", &id, "--clear-groups", "--"];
    let mut command = builder_as(&theirs, &format!("tar:{}", tar.display()), &command);
    assert_eq!(answer(command.env("HOME", "/nonexistent")).unwrap(), image.digest);
}

/// An ordinary user that root can be.
fn other_user() -> Option<u32> {
    let root = rustix::process::geteuid().is_root();
    if !root {
        eprintln!("SKIPPED in part: only root can build as somebody else; this was built without root");
    }
    root.then_some(54321)
}

#[test]
fn a_directory_is_taken_as_it_is_found_and_not_changed() {
    if !can_build() {
        return;
    }
    let bench = Bench::new();
    let tree = bench.tree("tree", "content");
    std::fs::create_dir(tree.join("tmp")).unwrap();
    std::fs::set_permissions(tree.join("tmp"), PermissionsExt::from_mode(0o700)).unwrap();
    symlink("nowhere", tree.join("proc")).unwrap();
    std::fs::hard_link(tree.join("file"), tree.join("same")).unwrap();
    std::fs::set_permissions(tree.join("file"), PermissionsExt::from_mode(0o604)).unwrap();
    let mut owner = (rustix::process::getuid().as_raw(), rustix::process::getgid().as_raw());
    if other_user().is_some() {
        owner = (77, 88);
        chown(tree.join("file"), Some(77), Some(88)).unwrap();
    }
    let names = || std::fs::read_dir(&tree).unwrap().map(|entry| entry.unwrap().file_name()).collect::<Vec<_>>();
    let before = names();

    let image = bench.build("mine", RootSource::Dir(tree.clone())).unwrap();
    let disk = image.disk.as_ref().unwrap();
    assert_sound(disk);
    assert_eq!(stat(disk, "/file"), ("regular".to_owned(), 0o604, owner.0, owner.1));
    assert!(look(disk, "stat /same").contains("Links: 2"));
    assert_eq!(stat(disk, "/tmp").1, 0o700);
    assert_eq!(stat(disk, "/proc").0, "symlink", "a link that leads nowhere is somebody's decision");
    assert_eq!(names(), before);

    // Tools run in a directory of their own, and names may look like options.
    std::fs::rename(&tree, bench.path("-d")).unwrap();
    let mut command = builder_as(&bench, "dir:-d", &["env"]);
    assert_eq!(answer(command.current_dir(bench.dir.path())).unwrap(), image.digest);
    let odd = bench.path("a b'\"$(x);:,");
    std::fs::rename(bench.path("-d"), &odd).unwrap();
    assert_eq!(bench.build("odd", RootSource::Dir(odd)).unwrap().digest, image.digest);
}

#[test]
fn a_file_that_may_not_be_read_is_named() {
    if !can_build() {
        return;
    }
    let bench = Bench::new();
    let tree = bench.tree("tree", "secret");
    std::fs::set_permissions(tree.join("file"), PermissionsExt::from_mode(0o000)).unwrap();
    let root = format!("dir:{}", tree.display());
    let mut command = match other_user() {
        Some(id) => {
            chown(bench.dir.path(), Some(id), Some(id)).unwrap();
            std::fs::remove_dir_all(bench.path("store")).unwrap();
            let id = id.to_string();
            builder_as(&bench, &root, &["setpriv", "--reuid", &id, "--regid", &id, "--clear-groups", "--"])
        }
        None => builder_as(&bench, &root, &["env"]),
    };
    let error = answer(&mut command).unwrap_err();
    assert!(
        error.starts_with("permission-denied") && error.contains("/file") && error.contains("give the tar"),
        "{error}"
    );
}

#[test]
fn what_is_no_root_file_system_is_refused_with_what_to_do() {
    if !can_build() {
        return;
    }
    let bench = Bench::new();
    let tree = bench.tree("tree", "content");
    let text = tree.join("file");
    let escape = bench.path("escape.tar");
    let pack = ["-c", "-P", "-f", escape.to_str().unwrap(), "--transform=s,file,../../escaped,", "file"];
    assert!(Command::new("tar").args(pack).current_dir(&tree).status().unwrap().success());
    for root in [
        RootSource::Dir(bench.path("nowhere")),
        RootSource::Dir(text.clone()),
        RootSource::Dir(text.join("below")),
        RootSource::Tar(bench.path("nowhere.tar")),
        RootSource::Tar(text),
        RootSource::Tar(tree.clone()),
        RootSource::Tar(escape),
    ] {
        let error = bench.build("mine", root.clone()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidArgument, "{root:?}: {error:?}");
        assert!(error.next_step().is_some(), "{root:?}");
        bench.assert_swept();
    }
    assert!(!bench.path("escaped").exists() && !bench.path("store/escaped").exists());
}

#[test]
fn a_size_that_does_not_fit_is_refused_and_one_that_does_is_exact() {
    if !can_build() {
        return;
    }
    let bench = Bench::new();
    let tree = bench.tree("tree", "content");
    std::fs::write(tree.join("much"), vec![1; 40 << 20]).unwrap();
    let build = |size: u64| {
        let recipe = bench.recipe(RootSource::Dir(tree.clone())).size(size);
        bench.store.build("mine", &recipe, &vmkit_image::Cancel::new(), &common::quiet)
    };
    for size in [0, 1 << 20, common::SIZE, 1 << 60, u64::MAX] {
        let error = build(size).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidArgument, "{size}");
        assert!(error.next_step().unwrap().contains("MiB"), "{size}");
    }
    // What is large costs neither time nor space.
    let image = build(200 << 30).unwrap();
    let meta = image.disk.as_ref().unwrap().metadata().unwrap();
    assert_eq!(meta.len(), 200 << 30);
    assert!(meta.blocks() * 512 < 128 << 20, "{} KiB", meta.blocks() / 2);
}
