//! Takes a saved execution apart while QEMU writes it: the guest's memory goes into a memory file, the rest becomes a saved
//! execution whose memory is elsewhere.
//!
//! ```text
//!  what QEMU writes                                            state                  memory
//!  header, configuration ────────────────────────────────────▶ and that memory which is a file is left out
//!  section "ram": blocks and their sizes ────────────────────▶ and where they are
//!                 pages of the guest's memory ─────────────────────────────────────▶ at their addresses; zeros are holes
//!                 pages of other blocks (firmware) ──────────▶ as they are
//!  sections of the devices ──────────────────────────────────▶ as they are
//! ```
//!
//! QEMU itself could load such memory into a file too, but when somebody waits for the machine to go on: 12 s for 1.4 GiB. What is written here is QEMU's migration stream, which newer QEMUs
//! keep reading: `docs/devel/migration` of its source. Whatever in it is not known here is an error before anything was lost.

use std::fs::File;
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::net::UnixListener;
use tokio::time::timeout;
use vmkit::{Error, ErrorKind, Result};

use super::arch::ARCH;
use super::layout;
use super::through::Through;

/// How long what was taken apart of a save that failed may take to be known.
const ENDS: Duration = Duration::from_secs(2);

const MAGIC: u32 = 0x5145_564d;
const VERSION: u32 = 3;
/// Of the section of memory.
const RAM: u32 = 4;

const START: u8 = 0x01;
const PART: u8 = 0x02;
const END: u8 = 0x03;
const SUBSECTION: u8 = 0x05;
const CONFIGURATION: u8 = 0x07;
const COMMAND: u8 = 0x08;
const FOOTER: u8 = 0x7e;

const ZERO: u64 = 0x02;
const SIZES: u64 = 0x04;
const PAGE: u64 = 0x08;
const EOS: u64 = 0x10;
const CONTINUE: u64 = 0x20;

const CAPABILITIES: &[u8] = b"configuration/capabilities";
const PAGE_BITS: &[u8] = b"configuration/target-page-bits";
/// What a QEMU that loads it says too.
const IGNORE_SHARED: &[u8] = b"x-ignore-shared";

/// A page of the stream, which is what an address has no flags of.
const PAGE_SIZE: usize = 4096;
/// How much memory is written at once.
const RUN: usize = 1 << 20;

/// What QEMU calls the guest's memory.
const BLOCK: &[u8] = b"m0";
/// Longer than the name of any machine type.
const NAME: usize = 256;
/// Where QEMU connects to, in its directory.
pub(super) const SOCKET: &str = "save.sock";

/// What QEMU is told to save to.
pub(super) const URI: &str = "unix:save.sock";

/// Takes apart what a QEMU that works in `dir` saves while `saving` has it save to [`URI`], with its memory in it. The two files need
/// not have been there. `durable`: the memory goes to disk as it comes, as far as that makes the end of it come sooner; whoever needs it
/// there still has to see to that.
///
/// # Errors
/// [`ErrorKind::Unsupported`] when QEMU writes what is not known; what saving fails with, and writing.
pub(super) async fn receive<T>(
    dir: &Path,
    (state, memory): (PathBuf, PathBuf),
    size: u64,
    durable: bool,
    saving: impl Future<Output = Result<T>>,
) -> Result<T> {
    let listener = Listener::new(dir)?;
    let take_apart = async move {
        let (stream, _) = listener.socket.accept().await.map_err(unreachable)?;
        let stream = stream.into_std().and_then(|stream| stream.set_nonblocking(false).map(|()| stream));
        let stream = stream.map_err(unreachable)?;
        let work = move || {
            let new = |path: &Path| File::create(path).map_err(unwritable);
            split(stream, new(&state)?, Memory::new(new(&memory)?, size, durable)?)
        };
        tokio::task::spawn_blocking(work).await.map_err(|error| unreachable(io::Error::other(error)))?
    };
    let mut take_apart = tokio::spawn(take_apart);
    // Never cut off: its control session is needed afterwards, whatever becomes of this.
    let saved = saving.await;
    match saved {
        Ok(saved) => (&mut take_apart).await.map_err(|error| unreachable(io::Error::other(error)))?.map(|()| saved),
        Err(error) => {
            // It may not even have connected.
            let taken_apart = timeout(ENDS, &mut take_apart).await;
            take_apart.abort();
            match taken_apart {
                Ok(Ok(Err(cause))) if cause.kind() != ErrorKind::Backend => Err(cause),
                _ => Err(error),
            }
        }
    }
}

/// Waits for QEMU in its directory.
struct Listener {
    socket: UnixListener,
    path: PathBuf,
}

impl Listener {
    fn new(dir: &Path) -> Result<Listener> {
        let path = dir.join(SOCKET);
        layout::remove(&path)?;
        let socket = super::socket::listen(dir, SOCKET).map_err(unreachable)?;
        Ok(Listener { socket, path })
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        let _ = layout::remove(&self.path);
    }
}

/// Reads all that QEMU writes. Blocks.
fn split(from: impl Read, state: impl Write, memory: Memory) -> Result<()> {
    let (from, state) = (BufReader::with_capacity(RUN, from), BufWriter::new(state));
    Split { from, state, memory, last: None }.all()
}

struct Split<R, W: Write> {
    from: BufReader<R>,
    state: BufWriter<W>,
    memory: Memory,
    /// Whether the last page was one of the guest's memory: a page that goes on is of the same block, also in the next part.
    last: Option<bool>,
}

impl<R: Read, W: Write> Split<R, W> {
    fn all(mut self) -> Result<()> {
        if (self.keep_u32()?, self.keep_u32()?) != (MAGIC, VERSION) {
            return Err(unknown("its beginning"));
        }
        if self.keep_u8()? != CONFIGURATION {
            return Err(unknown("no configuration"));
        }
        let machine = self.keep_u32()? as usize;
        if machine > NAME {
            return Err(unknown("its machine"));
        }
        self.keep(machine)?;
        let mut next = self.configuration()?;
        let mut ram = None;
        loop {
            match next {
                START => {
                    self.put(&[next])?;
                    let section = self.keep_u32()?;
                    let known = self.keep_name()? == b"ram" && ram.is_none();
                    if !known || (self.keep_u32()?, self.keep_u32()?) != (0, RAM) {
                        return Err(unknown("a section beside memory"));
                    }
                    self.sizes()?;
                    self.footer(section)?;
                    ram = Some(section);
                }
                PART | END => {
                    self.put(&[next])?;
                    let section = self.keep_u32()?;
                    if ram != Some(section) {
                        return Err(unknown("a part of another section"));
                    }
                    self.pages()?;
                    self.footer(section)?;
                    if next == END {
                        break;
                    }
                }
                COMMAND => {
                    self.put(&[next])?;
                    self.keep_u16()?;
                    let length = self.keep_u16()?;
                    self.keep(length.into())?;
                }
                _ => return Err(unknown("a part of another kind")),
            }
            next = self.take_u8()?;
        }
        // The devices, to the end.
        io::copy(&mut self.from, &mut self.state).map_err(unwritable)?;
        self.state.flush().map_err(unwritable)?;
        self.memory.finish().map_err(unwritable)
    }

    /// What QEMU says of itself; and, which it did not, that it left out memory that is a file. Returns what comes after.
    fn configuration(&mut self) -> Result<u8> {
        loop {
            let next = self.take_u8()?;
            if next != SUBSECTION {
                self.put(&[SUBSECTION])?;
                self.put_name(CAPABILITIES)?;
                self.put(&[1_u32.to_be_bytes(), 1_u32.to_be_bytes()].concat())?;
                self.put_name(IGNORE_SHARED)?;
                return Ok(next);
            }
            self.put(&[next])?;
            if self.keep_name()? != PAGE_BITS || (self.keep_u32()?, self.keep_u32()?) != (1, PAGE_SIZE.trailing_zeros())
            {
                return Err(unknown("its configuration"));
            }
        }
    }

    /// The blocks of memory.
    fn sizes(&mut self) -> Result<()> {
        let total = self.keep_u64()?;
        if total & 0xfff != SIZES {
            return Err(unknown("no sizes of memory"));
        }
        let (mut left, mut found) = (total & !0xfff, false);
        while left > 0 {
            let is_memory = self.keep_name()? == BLOCK;
            let length = self.keep_u64()?;
            left = left.checked_sub(length).ok_or_else(|| unknown("sizes of memory that do not add up"))?;
            if is_memory && length != self.memory.size {
                return Err(unknown("another size of memory"));
            }
            found |= is_memory;
            // Where the guest sees it: who loads it compares that, of what is left out.
            self.put(&if is_memory { ARCH.memory_at } else { 0 }.to_be_bytes())?;
        }
        if !found || self.keep_u64()? != EOS {
            return Err(unknown("other blocks of memory"));
        }
        Ok(())
    }

    /// Pages, to the end of this part.
    fn pages(&mut self) -> Result<()> {
        let mut page = [0; PAGE_SIZE];
        loop {
            let word = self.take(8)?;
            let head = u64::from_be_bytes(word.as_slice().try_into().unwrap_or_default());
            let (at, flags) = (head & !0xfff, head & 0xfff);
            if flags == EOS {
                return self.put(&word);
            }
            let name = match flags & CONTINUE {
                0 => Some(self.take_name()?),
                _ => None,
            };
            if let Some(name) = &name {
                self.last = Some(name == BLOCK);
            }
            let Some(mine) = self.last else { return Err(unknown("a page of no block")) };
            let zero = match flags & !CONTINUE {
                ZERO if self.take_u8()? == 0 => true,
                PAGE => {
                    self.from.read_exact(&mut page).map_err(unreadable)?;
                    false
                }
                _ => return Err(unknown("a page of another kind")),
            };
            match (mine, zero) {
                (true, true) => self.memory.zero(at)?,
                (true, false) => self.memory.page(at, &page)?,
                (false, _) => {
                    self.put(&word)?;
                    name.map_or(Ok(()), |name| self.put_name(&name))?;
                    self.put(if zero { &[0] } else { &page })?;
                }
            }
        }
    }

    fn footer(&mut self, section: u32) -> Result<()> {
        match (self.keep_u8()?, self.keep_u32()?) {
            (FOOTER, of) if of == section => Ok(()),
            _ => Err(unknown("the end of a section")),
        }
    }

    fn take(&mut self, length: usize) -> Result<Vec<u8>> {
        let mut bytes = vec![0; length];
        self.from.read_exact(&mut bytes).map_err(unreadable)?;
        Ok(bytes)
    }

    fn take_u8(&mut self) -> Result<u8> {
        self.take(1).map(|byte| byte[0])
    }

    fn take_name(&mut self) -> Result<Vec<u8>> {
        let length = self.take_u8()?;
        self.take(length.into())
    }

    fn put(&mut self, bytes: &[u8]) -> Result<()> {
        self.state.write_all(bytes).map_err(unwritable)
    }

    fn put_name(&mut self, name: &[u8]) -> Result<()> {
        self.put(&[u8::try_from(name.len()).unwrap_or_default()])?;
        self.put(name)
    }

    /// What is in both.
    fn keep(&mut self, length: usize) -> Result<()> {
        let bytes = self.take(length)?;
        self.put(&bytes)
    }

    fn keep_name(&mut self) -> Result<Vec<u8>> {
        let name = self.take_name()?;
        self.put_name(&name)?;
        Ok(name)
    }

    fn keep_array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut bytes = [0; N];
        self.from.read_exact(&mut bytes).map_err(unreadable)?;
        self.put(&bytes)?;
        Ok(bytes)
    }

    fn keep_u8(&mut self) -> Result<u8> {
        self.keep_array::<1>().map(|byte| byte[0])
    }

    fn keep_u16(&mut self) -> Result<u16> {
        self.keep_array().map(u16::from_be_bytes)
    }

    fn keep_u32(&mut self) -> Result<u32> {
        self.keep_array().map(u32::from_be_bytes)
    }

    fn keep_u64(&mut self) -> Result<u64> {
        self.keep_array().map(u64::from_be_bytes)
    }
}

/// A memory file that is being written, in runs of pages.
struct Memory {
    file: File,
    size: u64,
    /// Where the run begins that is not written yet.
    at: u64,
    run: Vec<u8>,
    /// Which pages were written: a guest that runs writes them again, and may clear them.
    written: Vec<bool>,
    through: Option<Through>,
}

impl Memory {
    fn new(file: File, size: u64, durable: bool) -> Result<Memory> {
        file.set_len(size).map_err(unwritable)?;
        let through = durable.then(|| Through::new(&file)).transpose().map_err(unwritable)?;
        let pages = usize::try_from(size / PAGE_SIZE as u64).unwrap_or_default();
        Ok(Memory { file, size, at: 0, run: Vec::with_capacity(RUN), written: vec![false; pages], through })
    }

    fn page(&mut self, at: u64, page: &[u8; PAGE_SIZE]) -> Result<()> {
        *self.entry(at)? = true;
        if at != self.at + self.run.len() as u64 || self.run.len() + PAGE_SIZE > RUN {
            self.flush().map_err(unwritable)?;
            self.at = at;
        }
        self.run.extend_from_slice(page);
        Ok(())
    }

    fn zero(&mut self, at: u64) -> Result<()> {
        match *self.entry(at)? {
            true => self.page(at, &[0; PAGE_SIZE]),
            false => Ok(()),
        }
    }

    fn entry(&mut self, at: u64) -> Result<&mut bool> {
        let page = usize::try_from(at / PAGE_SIZE as u64).ok();
        page.and_then(|page| self.written.get_mut(page)).ok_or_else(|| unknown("a page beyond the end of its memory"))
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.write_all_at(&self.run, self.at)?;
        let wrote = self.run.len() as u64;
        self.at += wrote;
        self.run.clear();
        self.through.as_mut().map_or(Ok(()), |through| through.wrote(wrote))
    }

    /// Writes what is left.
    fn finish(mut self) -> io::Result<()> {
        self.flush()?;
        self.through.map_or(Ok(()), Through::finish)
    }
}

fn unknown(what: &str) -> Error {
    Error::new(ErrorKind::Unsupported, format!("this QEMU saves executions in a way that is not known: {what}"))
        .hint("use another version of QEMU: `vmkit doctor` says which this one is; nothing was changed")
}

fn unreadable(error: io::Error) -> Error {
    Error::new(ErrorKind::Backend, "what QEMU saves ends too early").caused_by(error)
}

fn unwritable(error: io::Error) -> Error {
    Error::io("the machine's state cannot be written", error)
}

fn unreachable(error: io::Error) -> Error {
    Error::io("QEMU's state cannot be received", error)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGES: u64 = 600;
    const DEVICES: &[u8] = b"\x04devices, and what comes after them";

    fn name(name: &[u8]) -> Vec<u8> {
        [&[name.len() as u8], name].concat()
    }

    fn page(of: u8) -> Vec<u8> {
        vec![of; PAGE_SIZE]
    }

    fn head(at: u64, flags: u64) -> Vec<u8> {
        ((at * PAGE_SIZE as u64) | flags).to_be_bytes().to_vec()
    }

    fn section(kind: u8, body: &[Vec<u8>]) -> Vec<u8> {
        let id = 2_u32.to_be_bytes();
        [vec![kind], id.to_vec(), body.concat(), vec![FOOTER], id.to_vec()].concat()
    }

    /// The configuration and the blocks as QEMU writes them, and as they are to be.
    fn beginning(done: bool) -> Vec<u8> {
        let words = |words: &[u32]| words.iter().flat_map(|word| word.to_be_bytes()).collect::<Vec<u8>>();
        let mut all = vec![words(&[MAGIC, VERSION]), vec![CONFIGURATION], words(&[3]), b"q35".to_vec()];
        all.extend([vec![SUBSECTION], name(PAGE_BITS), words(&[1, 12])]);
        if done {
            all.extend([vec![SUBSECTION], name(CAPABILITIES), words(&[1, 1]), name(IGNORE_SHARED)]);
        }
        let mut blocks = vec![name(b"ram"), words(&[0, RAM]), head(PAGES + 2, SIZES)];
        for (block, pages) in [(BLOCK, PAGES), (b"firmware", 2)] {
            blocks.extend([name(block), head(pages, 0)]);
            blocks.extend(done.then(|| vec![0; 8]));
        }
        blocks.push(head(0, EOS));
        all.push(section(START, &blocks));
        all.concat()
    }

    fn taken_apart(stream: &[u8]) -> Result<(Vec<u8>, Vec<u8>)> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("memory");
        let mut state = Vec::new();
        split(stream, &mut state, Memory::new(File::create(&path).unwrap(), PAGES * PAGE_SIZE as u64, true)?)?;
        Ok((state, std::fs::read(path).unwrap()))
    }

    fn stream() -> Vec<u8> {
        let mut all = beginning(false);
        // More than one run, as a guest that stands still is saved.
        let mut part = vec![head(0, PAGE), name(BLOCK), page(1)];
        (1..400).for_each(|at| part.extend([head(at, PAGE | CONTINUE), page((at % 250) as u8 + 1)]));
        part.extend([head(400, ZERO | CONTINUE), vec![0], head(0, EOS)]);
        all.extend(section(PART, &part));
        let mut part = vec![head(402, PAGE | CONTINUE), page(9)];
        part.extend([head(1, PAGE), name(b"firmware"), page(77), head(0, ZERO | CONTINUE), vec![0], head(0, EOS)]);
        all.extend(section(PART, &part));
        all.extend([vec![COMMAND], vec![0, 11, 0, 2], b"ok".to_vec()].concat());
        // Once more: what a guest wrote that runs, and cleared.
        let again = [head(1, PAGE), name(BLOCK), page(222), head(402, ZERO | CONTINUE), vec![0], head(0, EOS)];
        all.extend(section(END, &again));
        all.extend_from_slice(DEVICES);
        all
    }

    #[test]
    fn memory_is_where_it_belongs_and_the_rest_as_it_was() {
        let (state, memory) = taken_apart(&stream()).unwrap();
        for at in 0..PAGES as usize {
            let wanted = match at {
                0 => 1,
                1 => 222,
                400.. => 0,
                _ => (at % 250) as u8 + 1,
            };
            assert!(memory[at * PAGE_SIZE..][..PAGE_SIZE].iter().all(|byte| *byte == wanted), "page {at}");
        }
        assert_eq!(memory.len(), PAGES as usize * PAGE_SIZE);
        let firmware = [head(1, PAGE), name(b"firmware"), page(77), head(0, ZERO | CONTINUE), vec![0], head(0, EOS)];
        let wanted = [
            beginning(true),
            section(PART, &[head(0, EOS)]),
            section(PART, &firmware),
            [vec![COMMAND], vec![0, 11, 0, 2], b"ok".to_vec()].concat(),
            section(END, &[head(0, EOS)]),
            DEVICES.to_vec(),
        ];
        assert!(state == wanted.concat(), "the state is not what it was");
    }

    #[test]
    fn a_stream_that_ends_early_is_an_error() {
        let whole = stream();
        for length in (0..whole.len() - DEVICES.len()).step_by(977) {
            assert_eq!(taken_apart(&whole[..length]).unwrap_err().kind(), ErrorKind::Backend, "{length}");
        }
    }

    #[test]
    fn what_is_not_known_is_an_error_and_no_memory() {
        let whole = stream();
        let begins = beginning(false).len();
        let after = |bytes: &[u8]| [&whole[..begins], bytes].concat();
        let part = |body: &[Vec<u8>]| after(&section(PART, body));
        for (what, stream) in [
            ("nothing of QEMU's", b"#!/bin/sh\nexit 0\n".repeat(9)),
            ("another section", after(&[START])),
            ("a part of another", after(&[PART, 0, 0, 0, 9])),
            ("a kind of part", after(&[0x55])),
            ("devices before memory's end", after(DEVICES)),
            ("compressed", part(&[head(0, 0x100), name(BLOCK)])),
            ("full of something", part(&[head(0, ZERO), name(BLOCK), vec![7]])),
            ("of no block", part(&[head(0, PAGE | CONTINUE), page(0)])),
            ("beyond the end", part(&[head(PAGES, PAGE), name(BLOCK), page(1)])),
            ("a flush", part(&[head(0, 0x200)])),
        ] {
            let stream = [stream, vec![0; 1 << 16]].concat();
            assert_eq!(taken_apart(&stream).unwrap_err().kind(), ErrorKind::Unsupported, "{what}");
        }
        // Another size than the machine's, and abilities that are not known.
        let mut other = whole.clone();
        let at = whole.windows(BLOCK.len()).position(|window| window == BLOCK).unwrap() + BLOCK.len();
        other[at + 6] ^= 0x10;
        assert_eq!(taken_apart(&other).unwrap_err().kind(), ErrorKind::Unsupported);
        let at = whole.windows(PAGE_BITS.len()).position(|window| window == PAGE_BITS).unwrap();
        let mut other = whole;
        other[at] ^= 1;
        assert_eq!(taken_apart(&other).unwrap_err().kind(), ErrorKind::Unsupported);
    }
}
