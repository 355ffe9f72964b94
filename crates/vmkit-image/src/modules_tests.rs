use super::*;

/// A module as far as it is looked at: an ELF file with a section `.modinfo`.
fn module(modinfo: &str) -> Vec<u8> {
    let names = b"\0.modinfo\0.shstrtab\0";
    let (info_at, names_at) = (64, 64 + modinfo.len());
    let table_at = names_at + names.len();
    let mut bytes = vec![0; 64];
    bytes[..6].copy_from_slice(b"\x7fELF\x02\x01");
    bytes[40..48].copy_from_slice(&(table_at as u64).to_le_bytes());
    bytes[58] = 64; // the size of a section's header
    bytes[60] = 3; // how many there are
    bytes[62] = 2; // which one has the names
    bytes.extend(modinfo.bytes());
    bytes.extend(names);
    for (name, at, size) in [(0u32, 0, 0), (1, info_at, modinfo.len()), (10, names_at, names.len())] {
        let mut header = [0; 64];
        header[..4].copy_from_slice(&name.to_le_bytes());
        header[4] = 1;
        header[24..32].copy_from_slice(&(at as u64).to_le_bytes());
        header[32..40].copy_from_slice(&(size as u64).to_le_bytes());
        bytes.extend(header);
    }
    bytes
}

/// A tree of modules, each with what it says of itself, and what is built in when the tree says so.
fn tree(modules: &[(&str, &str)], builtin: Option<&str>) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for (path, modinfo) in modules {
        let path = dir.path().join("kernel").join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, module(modinfo)).unwrap();
    }
    if let Some(text) = builtin {
        fs::write(dir.path().join("modules.builtin"), text).unwrap();
    }
    dir
}

fn names(tree: &Path, required: &[&str], optional: &[&str]) -> Result<Vec<String>> {
    let load = |path: &Path| fs::read(path).map_err(|error| Error::io("unreadable", error));
    Ok(resolve(tree, [&[], required, optional], &load)?.into_iter().map(|module| module.name).collect())
}

#[test]
fn each_module_comes_after_what_it_needs() {
    let modules = [
        ("drivers/block/virtio_blk.ko", "license=GPL\0depends=virtio_ring,virtio\0"),
        ("drivers/virtio/virtio.ko", "depends=virtio-ring\0"),
        ("drivers/virtio/virtio_ring.ko", "depends=\0"),
        ("drivers/net/unrelated.ko", "depends=nothing-that-exists\0"),
    ];
    let tree = tree(&modules, Some(""));
    assert_eq!(names(tree.path(), &["virtio_blk"], &[]).unwrap(), ["virtio_ring", "virtio", "virtio_blk"]);
}

#[test]
fn soft_dependencies_come_first_where_they_exist() {
    let modules = [
        ("ext4.ko", "depends=jbd2\0softdep=pre: crc32c absent post: later\0"),
        ("jbd2.ko", ""),
        ("crc32c.ko", ""),
        ("later.ko", ""),
    ];
    let tree = tree(&modules, Some(""));
    assert_eq!(names(tree.path(), &["ext4"], &[]).unwrap(), ["jbd2", "crc32c", "ext4"]);
}

#[test]
fn what_is_built_in_needs_no_file_and_what_is_nowhere_is_an_error() {
    let modules = [("virtio_console.ko", "depends=virtio\0")];
    let said = tree(&modules, Some("kernel/drivers/virtio/virtio.ko\nkernel/fs/ext4/ext4.ko\n"));
    assert_eq!(names(said.path(), &["ext4", "virtio_console"], &["virtio_rng"]).unwrap(), ["virtio_console"]);
    let error = names(said.path(), &["virtio_blk"], &[]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidArgument);
    assert!(error.message().contains("virtio_blk"), "{error}");

    // A tree that does not say what is built in is believed to have all it needs.
    let silent = tree(&modules, None);
    assert_eq!(names(silent.path(), &["ext4", "virtio_console"], &[]).unwrap(), ["virtio_console"]);
}

#[test]
fn circles_end_and_hyphens_are_underscores() {
    let tree = tree(&[("a-one.ko", "depends=b_two\0"), ("b_two.ko", "depends=a-one\0")], Some(""));
    assert_eq!(names(tree.path(), &["a_one"], &[]).unwrap(), ["b_two", "a_one"]);
    assert_eq!(name_of(Path::new("x/virtio-rng.ko.xz")).as_deref(), Some("virtio_rng"));
    assert_eq!(name_of(Path::new("x/virtio-rng.ko.bz2")), None);
    assert_eq!(name_of(Path::new("x/modules.dep")), None);
}

#[test]
fn a_file_that_is_no_module_is_named() {
    let tree = tree(&[], Some(""));
    fs::create_dir_all(tree.path().join("kernel")).unwrap();
    fs::write(tree.path().join("kernel/virtio_blk.ko"), "not ELF").unwrap();
    let error = names(tree.path(), &["virtio_blk"], &[]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt);
    assert!(error.message().contains("virtio_blk.ko"), "{error}");
}

#[test]
fn what_tells_of_a_panic_is_loaded_first_or_built_in() {
    let load = |path: &Path| fs::read(path).map_err(|error| Error::io("unreadable", error));
    let file = ("drivers/misc/pvpanic-mmio.ko", "depends=pvpanic\0");
    let with = tree(&[file, ("drivers/misc/pvpanic.ko", "depends=\0")], None);
    let modules = for_boot(with.path(), &load).unwrap();
    let names: Vec<&str> = modules.iter().map(|module| module.name.as_str()).collect();
    assert_eq!(names, ["pvpanic", "pvpanic_mmio"]);
    assert!(tell_of_a_panic(&modules, with.path()));
    let built_in = tree(&[], Some("kernel/drivers/misc/pvpanic/pvpanic-mmio.ko\n"));
    assert!(tell_of_a_panic(&[], built_in.path()));
    // Its other half alone does nothing, and who says nothing has none.
    for without in [tree(&[], Some("kernel/drivers/misc/pvpanic/pvpanic.ko\n")), tree(&[], None)] {
        assert!(!tell_of_a_panic(&[], without.path()));
    }
}
