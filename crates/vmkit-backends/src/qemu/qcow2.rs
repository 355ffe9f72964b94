//! An overlay: an empty qcow2 file on a base disk.
//!
//! Written by us because starting `qemu-img` takes longer than all the rest of a clone. The format is QEMU's
//! `docs/interop/qcow2.rst`: header, refcount table, one refcount block and the first-level table, a cluster each.

use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::Path;

const CLUSTER_BITS: u32 = 16;
const CLUSTER: u64 = 1 << CLUSTER_BITS;
/// What one entry of the first-level table maps: a cluster of 8-byte entries, each for a cluster.
const PER_L1_ENTRY: u64 = CLUSTER / 8 * CLUSTER;
const HEADER: u32 = 104;
const BACKING_FORMAT: u32 = 0xE279_2ACA;

/// What an overlay is put on.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Base<'a> {
    /// A raw disk.
    Raw(&'a Path),
    /// Another overlay.
    Overlay(&'a Path),
}

/// Writes an overlay of `size` bytes on `base` to `file`, which is empty.
///
/// # Errors
/// What writing returns; `InvalidInput` for a size or a name that the format cannot hold.
pub(crate) fn write_overlay(file: &File, base: Base<'_>, size: u64) -> io::Result<()> {
    let (base, format) = match base {
        Base::Raw(base) => (base, b"raw\0\0\0\0\0"),
        Base::Overlay(base) => (base, b"qcow2\0\0\0"),
    };
    let name: &OsStr = base.as_os_str();
    let l1_entries = size.div_ceil(PER_L1_ENTRY);
    let l1_clusters = (l1_entries * 8).div_ceil(CLUSTER).max(1);
    // One refcount block counts 32,768 clusters: far more than a first-level table can need here.
    if l1_clusters > 1024 || name.len() > 1023 || size == 0 || !size.is_multiple_of(512) {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "the base disk's size or name does not fit an overlay",
        ));
    }
    let mut header = Vec::with_capacity(4096);
    let backing_offset = u64::from(HEADER) + 8 + 8 + 8;
    header.extend(b"QFI\xfb");
    header.extend(3u32.to_be_bytes());
    header.extend(backing_offset.to_be_bytes());
    header.extend((name.len() as u32).to_be_bytes());
    header.extend(CLUSTER_BITS.to_be_bytes());
    header.extend(size.to_be_bytes());
    header.extend(0u32.to_be_bytes()); // no encryption
    header.extend((l1_entries as u32).to_be_bytes());
    header.extend((3 * CLUSTER).to_be_bytes());
    header.extend(CLUSTER.to_be_bytes()); // refcount table
    header.extend(1u32.to_be_bytes());
    header.extend(0u32.to_be_bytes()); // no snapshots
    header.extend(0u64.to_be_bytes());
    header.extend([0; 24]); // no features
    header.extend(4u32.to_be_bytes()); // refcounts of 16 bits
    header.extend(HEADER.to_be_bytes());
    header.extend(BACKING_FORMAT.to_be_bytes());
    header.extend(format.iter().position(|byte| *byte == 0).map_or(8, |length| length as u32).to_be_bytes());
    header.extend(format);
    header.extend([0; 8]); // end of extensions
    header.extend(name.as_bytes());
    debug_assert_eq!(header.len() as u64, backing_offset + name.len() as u64);
    file.write_all_at(&header, 0)?;
    file.write_all_at(&(2 * CLUSTER).to_be_bytes(), CLUSTER)?;
    let used = 3 + l1_clusters;
    let counts: Vec<u8> = (0..used).flat_map(|_| 1u16.to_be_bytes()).collect();
    file.write_all_at(&counts, 2 * CLUSTER)?;
    file.set_len(used * CLUSTER)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The format's own tool is the judge.
    #[test]
    fn qemu_img_finds_overlays_sound() {
        let dir = tempfile::tempdir().unwrap();
        let base = dir.path().join("base,with=odd \"name\".raw");
        for size in [64 << 20, 4 << 30, 5 << 40] {
            File::create(&base).unwrap().set_len(size).unwrap();
            let path = dir.path().join("disk.qcow2");
            write_overlay(&File::create(&path).unwrap(), Base::Raw(&base), size).unwrap();
            let check =
                std::process::Command::new("qemu-img").args(["check", "-f", "qcow2"]).arg(&path).output().unwrap();
            assert!(check.status.success(), "{check:?}");
            let info =
                std::process::Command::new("qemu-img").args(["info", "--output=json"]).arg(&path).output().unwrap();
            let info: serde_json::Value = serde_json::from_slice(&info.stdout).unwrap();
            assert_eq!(info["virtual-size"], size);
            assert_eq!(info["backing-filename"], base.to_str().unwrap());
            assert_eq!(info["backing-filename-format"], "raw");
        }
        // One overlay on another.
        let (layer, top) = (dir.path().join("layer.qcow2"), dir.path().join("top.qcow2"));
        File::create(&base).unwrap().set_len(64 << 20).unwrap();
        write_overlay(&File::create(&layer).unwrap(), Base::Raw(&base), 64 << 20).unwrap();
        write_overlay(&File::create(&top).unwrap(), Base::Overlay(Path::new("layer.qcow2")), 64 << 20).unwrap();
        let info = ["info", "--backing-chain", "--output=json"];
        let chain = std::process::Command::new("qemu-img").args(info).arg(&top).output().unwrap().stdout;
        let chain: serde_json::Value = serde_json::from_slice(&chain).unwrap();
        assert_eq!((chain[0]["backing-filename-format"].as_str(), chain.as_array().unwrap().len()), (Some("qcow2"), 3));
        let file = File::create(dir.path().join("no")).unwrap();
        assert!(write_overlay(&file, Base::Raw(&base), 0).is_err());
        assert!(write_overlay(&file, Base::Raw(Path::new(&"x".repeat(1024))), 1 << 20).is_err());
    }
}
