//! As much of ELF as it takes to read a module's dependencies and to see whether a program is static.

use vmkit::{Error, ErrorKind, Result};

/// A 64-bit little-endian ELF file.
pub(crate) struct Elf<'a>(&'a [u8]);

const SHT_NOBITS: u64 = 8;
const PT_INTERP: u64 = 3;
/// `e_machine` of what we run on.
#[cfg(target_arch = "x86_64")]
pub(crate) const MACHINE: u64 = 62;
/// `e_machine` of what we run on.
#[cfg(target_arch = "aarch64")]
pub(crate) const MACHINE: u64 = 183;

impl<'a> Elf<'a> {
    /// Checks the magic number, the class and the byte order.
    pub(crate) fn parse(bytes: &'a [u8]) -> Result<Elf<'a>> {
        match bytes.starts_with(b"\x7fELF\x02\x01") && bytes.len() >= 64 {
            true => Ok(Elf(bytes)),
            false => Err(Error::new(ErrorKind::InvalidArgument, "not a 64-bit little-endian ELF file")),
        }
    }

    /// The processor it is for.
    pub(crate) fn machine(&self) -> u64 {
        self.number(18, 2).unwrap_or(0)
    }

    /// Whether it needs a dynamic loader.
    pub(crate) fn is_dynamic(&self) -> bool {
        let (Some(table), Some(size), Some(count)) = (self.number(32, 8), self.number(54, 2), self.number(56, 2))
        else {
            return false;
        };
        (0..count).any(|i| {
            let at = table.checked_add(i * size);
            at.and_then(|at| self.number(at, 4)) == Some(PT_INTERP)
        })
    }

    /// The content of the section with this name.
    pub(crate) fn section(&self, name: &str) -> Option<&'a [u8]> {
        let (table, size) = (self.number(40, 8)?, self.number(58, 2)?);
        let (count, names) = (self.number(60, 2)?, self.number(62, 2)?);
        let header = |i: u64| table.checked_add(i.checked_mul(size)?);
        let strings = self.body(header(names)?)?;
        (0..count).find_map(|i| {
            let at = header(i)?;
            let own = strings.get(self.number(at, 4)? as usize..)?;
            let own = &own[..own.iter().position(|b| *b == 0)?];
            if own == name.as_bytes() { self.body(at) } else { None }
        })
    }

    fn body(&self, header: u64) -> Option<&'a [u8]> {
        if self.number(header.checked_add(4)?, 4)? == SHT_NOBITS {
            return None;
        }
        let start = self.number(header.checked_add(24)?, 8)?;
        let end = start.checked_add(self.number(header.checked_add(32)?, 8)?)?;
        self.0.get(usize::try_from(start).ok()?..usize::try_from(end).ok()?)
    }

    fn number(&self, at: u64, bytes: usize) -> Option<u64> {
        let at = usize::try_from(at).ok()?;
        let field = self.0.get(at..at.checked_add(bytes)?)?;
        Some(field.iter().rev().fold(0, |sum, byte| sum << 8 | u64::from(*byte)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn our_own_executable_is_read() {
        let bytes = std::fs::read(std::env::current_exe().unwrap()).unwrap();
        let elf = Elf::parse(&bytes).unwrap();
        assert_eq!(elf.machine(), MACHINE);
        assert!(elf.section(".text").is_some_and(|text| text.len() > 1000));
        assert!(elf.section(".no-such-section").is_none());
    }

    #[test]
    fn damage_is_an_answer_and_never_a_panic() {
        let mut bytes = std::fs::read(std::env::current_exe().unwrap()).unwrap();
        assert!(Elf::parse(b"#!/bin/sh").is_err());
        for at in 16..64 {
            let old = std::mem::replace(&mut bytes[at], 0xff);
            let elf = Elf::parse(&bytes).unwrap();
            let _ = (elf.section(".text"), elf.is_dynamic());
            bytes[at] = old;
        }
        bytes[16..64].fill(0xff);
        let elf = Elf::parse(&bytes).unwrap();
        assert!(elf.section(".text").is_none() && !elf.is_dynamic());
    }
}
