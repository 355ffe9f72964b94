//! Archives in the form that the kernel unpacks as its first root: "newc", of which it needs names, modes and contents.

/// Begins every entry.
pub const MAGIC: &[u8] = b"070701";
/// The magic and thirteen fields of eight hexadecimal digits.
const HEADER: usize = 110;
const LAST: &str = "TRAILER!!!";

/// Writes an archive.
#[derive(Debug, Default)]
pub struct Writer {
    bytes: Vec<u8>,
    entries: u32,
}

impl Writer {
    /// Adds a directory. The kernel makes no parents by itself: they come first.
    pub fn directory(&mut self, name: &str) {
        self.entry(name, 0o040_755, &[]);
    }

    /// Adds a file that may be executed.
    pub fn program(&mut self, name: &str, content: &[u8]) {
        self.entry(name, 0o100_755, content);
    }

    /// The archive.
    pub fn finish(mut self) -> Vec<u8> {
        self.entry(LAST, 0, &[]);
        self.bytes
    }

    fn entry(&mut self, name: &str, mode: u32, content: &[u8]) {
        self.entries += 1;
        let size = u32::try_from(content.len()).expect("a busybox and modules are far below 4 GiB");
        // inode, mode, uid, gid, links, mtime, size, two devices of two numbers each, length of the name, checksum
        let fields = [self.entries, mode, 0, 0, 1, 0, size, 0, 0, 0, 0, name.len() as u32 + 1, 0];
        self.bytes.extend_from_slice(MAGIC);
        self.bytes.extend(fields.iter().flat_map(|field| format!("{field:08x}").into_bytes()));
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.align();
        self.bytes.extend_from_slice(content);
        self.align();
    }

    fn align(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

/// The names and contents in an archive that is not compressed; none when it is not one, or is cut off.
pub fn read(mut bytes: &[u8]) -> Option<Vec<(&str, &[u8])>> {
    let mut entries = Vec::new();
    loop {
        let header = bytes.get(..HEADER).filter(|header| header.starts_with(MAGIC))?;
        let field = |number: usize| {
            let digits = std::str::from_utf8(header.get(6 + 8 * number..14 + 8 * number)?).ok()?;
            usize::from_str_radix(digits, 16).ok()
        };
        let (size, name_size) = (field(6)?, field(11)?);
        let name = bytes.get(HEADER..HEADER + name_size)?.strip_suffix(b"\0")?;
        let name = std::str::from_utf8(name).ok()?;
        if name == LAST {
            return Some(entries);
        }
        let start = (HEADER + name_size).next_multiple_of(4);
        entries.push((name, bytes.get(start..start + size)?));
        bytes = bytes.get((start + size).next_multiple_of(4)..)?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read() {
        let mut writer = Writer::default();
        writer.directory("bin");
        writer.program("bin/tool", b"five!");
        let bytes = writer.finish();
        assert_eq!(bytes.len() % 4, 0);
        assert_eq!(read(&bytes).unwrap(), [("bin", &b""[..]), ("bin/tool", &b"five!"[..])]);
    }

    #[test]
    fn what_is_cut_off_is_refused() {
        let mut writer = Writer::default();
        writer.program("init", &[7; 300]);
        let bytes = writer.finish();
        for end in [0, 50, HEADER, HEADER + 3, 200, bytes.len() - 20] {
            assert_eq!(read(&bytes[..end]), None, "{end}");
        }
        assert_eq!(read(&[0; 512]), None);
    }
}
