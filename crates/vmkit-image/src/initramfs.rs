//! The initramfs: the agent as `/init`, and the modules that reach the root disk.
//!
//! It is not compressed: with a megabyte or two, a guest's processor takes longer to unpack than the host's to copy.

use vmkit::{Error, ErrorKind, Result};

use crate::modules::Module;

/// Where the agent finds the list of modules, one path a line, in the order in which to load them.
const LIST: &str = "etc/vmkit/modules";

/// The archive. The same agent and modules give the same bytes.
pub(crate) fn archive(agent: &[u8], modules: &[Module]) -> Vec<u8> {
    let mut cpio = Cpio::default();
    for dir in ["dev", "proc", "sys", "run", "sysroot", "etc", "etc/vmkit", "lib", "lib/modules"] {
        cpio.entry(dir, 0o040_755, (0, 0), b"");
    }
    // The kernel opens it before anything is mounted, as init's standard streams.
    cpio.entry("dev/console", 0o020_600, (5, 1), b"");
    cpio.entry("init", 0o100_755, (0, 0), agent);
    let mut list = String::new();
    for module in modules {
        let path = format!("lib/modules/{}.ko", module.name);
        cpio.entry(&path, 0o100_644, (0, 0), &module.content);
        list += &format!("/{path}\n");
    }
    cpio.entry(LIST, 0o100_644, (0, 0), list.as_bytes());
    cpio.finish()
}

/// The same modules with another agent.
///
/// # Errors
/// [`ErrorKind::Corrupt`] when the archive is not one of ours.
pub(crate) fn with_agent(archive_bytes: &[u8], agent: &[u8]) -> Result<Vec<u8>> {
    let entries =
        read(archive_bytes).ok_or_else(|| Error::new(ErrorKind::Corrupt, "the image's initramfs is damaged"))?;
    let mut modules = Vec::new();
    for entry in entries {
        let name = entry.name.strip_prefix("lib/modules/").and_then(|name| name.strip_suffix(".ko"));
        if let Some(name) = name {
            modules.push(Module { name: name.to_owned(), content: entry.content.to_vec() });
        }
    }
    Ok(archive(agent, &modules))
}

struct Entry<'a> {
    name: &'a str,
    #[cfg_attr(not(test), expect(dead_code, reason = "only tests look at modes"))]
    mode: u32,
    #[cfg_attr(not(test), expect(dead_code, reason = "only tests look at devices"))]
    device: (u32, u32),
    content: &'a [u8],
}

/// What is in an archive; none when it is damaged.
fn read(mut bytes: &[u8]) -> Option<Vec<Entry<'_>>> {
    let mut entries = Vec::new();
    loop {
        let header = bytes.get(..110)?;
        if !header.starts_with(b"070701") {
            return None;
        }
        let field = |i: usize| u32::from_str_radix(std::str::from_utf8(&header[6 + 8 * i..14 + 8 * i]).ok()?, 16).ok();
        let (size, name_size) = (field(6)? as usize, field(11)? as usize);
        let name = bytes.get(110..110 + name_size)?.strip_suffix(b"\0")?;
        let name = std::str::from_utf8(name).ok()?;
        let start = (110 + name_size).next_multiple_of(4);
        let content = bytes.get(start..start + size)?;
        if name == "TRAILER!!!" {
            return Some(entries);
        }
        entries.push(Entry { name, mode: field(1)?, device: (field(9)?, field(10)?), content });
        bytes = bytes.get((start + size).next_multiple_of(4)..)?;
    }
}

/// The format that the kernel reads: "newc", `Documentation/driver-api/early-userspace/buffer-format.rst`.
#[derive(Default)]
struct Cpio {
    bytes: Vec<u8>,
    inode: u32,
}

impl Cpio {
    fn entry(&mut self, name: &str, mode: u32, device: (u32, u32), content: &[u8]) {
        self.inode += 1;
        let size = u32::try_from(content.len()).expect("an agent and modules are far below 4 GiB");
        let name_size = name.len() as u32 + 1;
        let inode = if name == "TRAILER!!!" { 0 } else { self.inode };
        // inode, mode, uid, gid, links, mtime, size, device of the file, device it is, size of the name, checksum
        let fields = [inode, mode, 0, 0, 1, 0, size, 0, 0, device.0, device.1, name_size, 0];
        self.bytes.extend(b"070701");
        for field in fields {
            self.bytes.extend(format!("{field:08x}").bytes());
        }
        self.bytes.extend(name.bytes());
        self.bytes.push(0);
        self.pad(4);
        self.bytes.extend(content);
        self.pad(4);
    }

    fn pad(&mut self, to: usize) {
        self.bytes.resize(self.bytes.len().next_multiple_of(to), 0);
    }

    fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, (0, 0), b"");
        self.pad(512);
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_archive_reads_back() {
        let modules = [
            Module { name: "virtio".into(), content: b"one".to_vec() },
            Module { name: "virtio_blk".into(), content: b"three".to_vec() },
        ];
        let bytes = archive(b"agent!", &modules);
        assert_eq!(bytes.len() % 512, 0);
        let entries = read(&bytes).unwrap();
        let get = |name: &str| entries.iter().find(|entry| entry.name == name).unwrap();
        assert_eq!(get("init").mode, 0o100_755);
        assert_eq!(get("init").content, b"agent!");
        assert_eq!((get("dev/console").mode, get("dev/console").device), (0o020_600, (5, 1)));
        assert_eq!(get("sysroot").mode, 0o040_755);
        assert_eq!(get("lib/modules/virtio_blk.ko").content, b"three");
        assert_eq!(get(LIST).content, b"/lib/modules/virtio.ko\n/lib/modules/virtio_blk.ko\n");
        // A directory comes before what is in it: the kernel makes none by itself.
        for (at, entry) in entries.iter().enumerate() {
            if let Some((dir, _)) = entry.name.rsplit_once('/') {
                assert!(entries[..at].iter().any(|earlier| earlier.name == dir), "{}", entry.name);
            }
        }
        assert_eq!(bytes, archive(b"agent!", &modules));
    }

    #[test]
    fn the_agent_is_exchanged_and_nothing_else() {
        let modules = [Module { name: "virtio".into(), content: vec![7; 5000] }];
        let old = archive(b"old", &modules);
        assert_eq!(with_agent(&old, b"newer").unwrap(), archive(b"newer", &modules));
        for cut in [0, 50, 111, old.len() / 2, old.len() - 512] {
            assert_eq!(with_agent(&old[..cut], b"x").unwrap_err().kind(), ErrorKind::Corrupt);
        }
    }
}
