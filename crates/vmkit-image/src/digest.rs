//! Digests that cost what a file holds and not what it spans.
//!
//! The digest of a file is the SHA-256 of its length and of each 4 KiB block that is not all zeros, with its offset. A hole and
//! a block of zeros are the same content, so a sparse disk and a full copy of it have one digest.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use rustix::fs::{FallocateFlags, SeekFrom, fallocate, seek};
use rustix::io::Errno;
use sha2::{Digest, Sha256};
use vmkit::{Error, Result};

const BLOCK: usize = 4096;
const CHUNK: usize = 256 * BLOCK;

/// The digest of bytes in memory: as if they were a file.
pub(crate) fn of_bytes(bytes: &[u8]) -> String {
    let mut sum = Sum::new(bytes.len() as u64);
    for (i, block) in bytes.chunks(BLOCK).enumerate() {
        sum.block((i * BLOCK) as u64, block);
    }
    sum.finish()
}

/// The digest of a file.
pub(crate) fn of_file(path: &Path) -> Result<String> {
    let file = File::open(path).map_err(|error| failed(path, error))?;
    scan(&file, |_, _| Ok(())).map_err(|error| failed(path, error))
}

/// Gives blocks of zeros back to the file system, and returns the digest.
pub(crate) fn dig_holes(path: &Path) -> Result<String> {
    let file = File::options().read(true).write(true).open(path).map_err(|error| failed(path, error))?;
    let mut can_dig = true;
    let digest = scan(&file, |at, len| {
        if can_dig {
            let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            match fallocate(&file, flags, at, len) {
                Ok(()) => {}
                // The file system has no holes: the disk is larger than need be, and right.
                Err(Errno::OPNOTSUPP | Errno::NOSYS) => can_dig = false,
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    });
    digest.map_err(|error| failed(path, error))
}

fn failed(path: &Path, error: std::io::Error) -> Error {
    Error::io(format!("{} cannot be read", path.display()), error)
}

/// Reads what is not a hole; `zeros` learns of each run of zeros, holes too: what reads as a hole may be allocated in advance.
fn scan(file: &File, mut zeros: impl FnMut(u64, u64) -> std::io::Result<()>) -> std::io::Result<String> {
    let len = file.metadata()?.len();
    let mut sum = Sum::new(len);
    let mut buffer = vec![0; CHUNK];
    let mut at = 0;
    while at < len {
        let start = match seek(file, SeekFrom::Data(at)) {
            Ok(start) => start / BLOCK as u64 * BLOCK as u64,
            Err(Errno::NXIO) => {
                zeros(at, len - at)?;
                break;
            }
            Err(error) => return Err(error.into()),
        };
        if start > at {
            zeros(at, start - at)?;
        }
        let end = seek(file, SeekFrom::Hole(start.max(at)))?.min(len);
        at = start.max(at);
        while at < end {
            let wanted = usize::try_from(len - at).unwrap_or(CHUNK).min(CHUNK);
            let chunk = &mut buffer[..wanted];
            file.read_exact_at(chunk, at)?;
            let mut run = None;
            for (i, block) in chunk.chunks(BLOCK).enumerate() {
                let offset = at + (i * BLOCK) as u64;
                if sum.block(offset, block) {
                    if let Some(from) = run.take() {
                        zeros(from, offset - from)?;
                    }
                } else {
                    run.get_or_insert(offset);
                }
            }
            at += wanted as u64;
            if let Some(from) = run {
                zeros(from, at - from)?;
            }
        }
    }
    Ok(sum.finish())
}

struct Sum(Sha256);

impl Sum {
    fn new(len: u64) -> Sum {
        Sum(Sha256::new_with_prefix(len.to_le_bytes()))
    }

    /// Adds a block, and says whether it has any content.
    fn block(&mut self, at: u64, block: &[u8]) -> bool {
        static ZEROS: [u8; BLOCK] = [0; BLOCK];
        if block == &ZEROS[..block.len()] {
            return false;
        }
        self.0.update(at.to_le_bytes());
        self.0.update(block);
        true
    }

    fn finish(self) -> String {
        use std::fmt::Write;
        let mut text = "sha256:".to_owned();
        for byte in self.0.finalize() {
            write!(text, "{byte:02x}").expect("a string takes all text");
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn holes_and_zeros_are_the_same_content() {
        let dir = tempfile::tempdir().unwrap();
        let (full, sparse) = (dir.path().join("full"), dir.path().join("sparse"));
        let mut content = vec![0; 40 << 20];
        content[10 << 20] = 1;
        content[(30 << 20) + 5] = 2;
        content.truncate((40 << 20) - 100);
        std::fs::write(&full, &content).unwrap();
        let file = File::create(&sparse).unwrap();
        file.set_len(content.len() as u64).unwrap();
        file.write_all_at(&[1], 10 << 20).unwrap();
        file.write_all_at(&[2], (30 << 20) + 5).unwrap();

        let digest = of_bytes(&content);
        assert_eq!(of_file(&full).unwrap(), digest);
        assert_eq!(of_file(&sparse).unwrap(), digest);
        assert_eq!(dig_holes(&full).unwrap(), digest);
        assert_eq!(of_file(&full).unwrap(), digest);
        assert_eq!(std::fs::read(&full).unwrap(), content);
        let blocks = std::fs::metadata(&full).unwrap().blocks();
        assert!(blocks * 512 < 1 << 20, "{blocks} blocks are left");
    }

    #[test]
    fn place_and_length_count() {
        let mut content = vec![0; 3 * BLOCK];
        content[0] = 1;
        let first = of_bytes(&content);
        content.swap(0, BLOCK);
        assert_ne!(of_bytes(&content), first);
        content.swap(0, BLOCK);
        content.push(0);
        assert_ne!(of_bytes(&content), first);
    }
}
