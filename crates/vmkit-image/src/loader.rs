//! A kernel that is read from where the initramfs is.
//!
//! QEMU reads the file of `-kernel` into memory of its own and only maps that of `-initrd`. A machine that goes on from a saved
//! execution needs neither, until it reboots: to have a kernel then it would pay 13 MiB now. So the two are cut otherwise:
//!
//! ```text
//!  vmlinuz    [ setup | kernel, compressed ]
//!  initramfs                                 [ archive ]
//!      become
//!  -kernel    [ setup | loader ]                            a few pages
//!  -initrd    [ kernel, compressed | 0… ][ archive ]        mapped, and untouched until somebody boots
//! ```
//!
//! The setup goes on into the loader as it would into the kernel. The loader copies the kernel from the front of the initramfs to
//! where it wants to be, takes it off the initramfs, which stays where it is, and goes on into the kernel: the 32-bit boot protocol of
//! the kernel's `Documentation/arch/x86/boot.rst`, where all offsets below are from.

/// The first version whose header says where a kernel wants to be.
const OLDEST: u16 = 0x020a;
/// Where QEMU puts what comes after the setup, and where the setup goes on.
const ENTRY: u32 = 0x10_0000;
const SECTOR: usize = 512;
/// The kernel and the initramfs begin on a page of their own, so that the kernel can free the latter's.
const PAGE: usize = 4096;
/// Far more than any kernel has.
const MOST: usize = 512 << 20;

/// Where in the loader the length of what is before the archive stands.
const LENGTH_AT: usize = 9;

/// A kernel and its initramfs, cut anew.
#[derive(Debug)]
pub(crate) struct Loader {
    /// For `-kernel`.
    pub kernel: Vec<u8>,
    /// What comes before the archive in the file for `-initrd`; whole pages.
    pub front: Vec<u8>,
}

/// Cuts a kernel.
///
/// # Errors
/// Why this kernel cannot be moved so; it boots as it is.
pub(crate) fn cut(vmlinuz: &[u8]) -> Result<Loader, &'static str> {
    let setup = setup_size(vmlinuz)?;
    let number = |at: usize| u32::from_le_bytes([vmlinuz[at], vmlinuz[at + 1], vmlinuz[at + 2], vmlinuz[at + 3]]);
    if (number(0x206) as u16) < OLDEST {
        return Err("its boot protocol is older than 2.10");
    }
    if vmlinuz[0x211] & 1 == 0 || number(0x214) != ENTRY {
        return Err("it is not one that is loaded at 1 MiB");
    }
    if vmlinuz[0x234] == 0 {
        return Err("it is not relocatable");
    }
    let (home, above) = (number(0x258), number(0x25c));
    // Neither on the loader itself, nor out of its reach.
    if above != 0 || home < 2 * ENTRY || !(home as usize).is_multiple_of(PAGE) {
        return Err("the address it wants to be at is none that it can be copied to");
    }
    let mut front = vmlinuz[setup..].to_vec();
    if front.is_empty() || front.len() > MOST {
        return Err("its size makes no sense");
    }
    let dwords = front.len().div_ceil(4) as u32;
    front.resize(front.len().next_multiple_of(PAGE), 0);
    let code = code(front.len() as u32, home, dwords);
    let mut kernel = vmlinuz[..setup].to_vec();
    // How much there is after the setup, in units of 16 bytes.
    kernel[0x1f4..0x1f8].copy_from_slice(&(code.len() as u32 / 16).to_le_bytes());
    kernel.extend(code);
    Ok(Loader { kernel, front })
}

/// How much of an initramfs is before its archive, as the loader beside it says.
pub(crate) fn front_size(kernel: &[u8]) -> Option<usize> {
    let at = setup_size(kernel).ok()? + LENGTH_AT;
    let bytes = kernel.get(at..at + 4)?;
    Some(u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]) as usize)
}

/// The length of a kernel's first part, which is executed in 16-bit mode.
fn setup_size(vmlinuz: &[u8]) -> Result<usize, &'static str> {
    if vmlinuz.len() < 0x268 || vmlinuz[0x1fe..0x200] != [0x55, 0xaa] || &vmlinuz[0x202..0x206] != b"HdrS" {
        return Err("it is no kernel of this processor's boot protocol");
    }
    let sectors = match vmlinuz[0x1f1] {
        // So it was before there was such a number.
        0 => 4,
        sectors => usize::from(sectors),
    };
    let size = (sectors + 1) * SECTOR;
    if size >= vmlinuz.len() {
        return Err("it is cut off");
    }
    Ok(size)
}

/// The loader: in 32-bit mode with flat segments, interrupts off, `boot_params` at `esi`. `front` bytes are before the archive;
/// of these `dwords` times 4 are the kernel, whose home is `home`.
fn code(front: u32, home: u32, dwords: u32) -> Vec<u8> {
    let mut code = Vec::with_capacity(80);
    let mut add = |bytes: &[u8], number: Option<u32>| {
        code.extend_from_slice(bytes);
        code.extend(number.into_iter().flat_map(u32::to_le_bytes));
    };
    add(&[0x8b, 0x86, 0x18, 0x02, 0, 0], None); //        mov  eax, [esi + 0x218]       ramdisk_image: the kernel is there
    add(&[0x89, 0xf2], None); //                          mov  edx, esi
    add(&[0xb9], Some(front)); //                         mov  ecx, front
    add(&[0x01, 0x8a, 0x18, 0x02, 0, 0], None); //        add  [edx + 0x218], ecx       the archive begins after it
    add(&[0x29, 0x8a, 0x1c, 0x02, 0, 0], None); //        sub  [edx + 0x21c], ecx       ramdisk_size
    add(&[0xb9], Some(dwords)); //                        mov  ecx, dwords
    add(&[0xbf], Some(home)); //                          mov  edi, home
    add(&[0x89, 0xc6], None); //                          mov  esi, eax
    add(&[0xfc], None); //                                cld
    add(&[0x39, 0xf7], None); //                          cmp  edi, esi
    add(&[0x76, 0x09], None); //                          jbe  copy                     downwards: the first first
    add(&[0xfd], None); //                                std                           upwards: the last first, as they may overlap
    add(&[0x8d, 0x74, 0x8e, 0xfc], None); //              lea  esi, [esi + 4*ecx - 4]
    add(&[0x8d, 0x7c, 0x8f, 0xfc], None); //              lea  edi, [edi + 4*ecx - 4]
    add(&[0xf3, 0xa5], None); //                    copy: rep movsd
    add(&[0xfc], None); //                                cld
    add(&[0x89, 0xd6], None); //                          mov  esi, edx                 as the kernel expects it
    add(&[0x31, 0xff], None); //                          xor  edi, edi
    add(&[0x31, 0xdb], None); //                          xor  ebx, ebx
    add(&[0x31, 0xed], None); //                          xor  ebp, ebp
    add(&[0xb8], Some(home)); //                          mov  eax, home
    add(&[0xff, 0xe0], None); //                          jmp  eax
    code.resize(code.len().next_multiple_of(16), 0);
    code
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Something with a header of the kind that Debian's kernels have, two sectors of setup, and `size` bytes to be executed.
    fn kernel(size: usize) -> Vec<u8> {
        let mut bytes = vec![0xee; 3 * SECTOR];
        bytes[0x1f1] = 2;
        bytes[0x1fe..0x200].copy_from_slice(&[0x55, 0xaa]);
        bytes[0x202..0x206].copy_from_slice(b"HdrS");
        bytes[0x206..0x208].copy_from_slice(&0x020f_u16.to_le_bytes());
        bytes[0x211] = 1;
        bytes[0x214..0x218].copy_from_slice(&ENTRY.to_le_bytes());
        bytes[0x234] = 1;
        bytes[0x258..0x260].copy_from_slice(&0x100_0000_u64.to_le_bytes());
        bytes.extend((0..size).map(|at| (at % 251) as u8));
        bytes
    }

    #[test]
    fn a_kernel_is_cut_into_a_loader_and_what_it_loads() {
        let whole = kernel(3 * PAGE + 5);
        let Loader { kernel, front } = cut(&whole).unwrap();
        let setup = 3 * SECTOR;
        assert_eq!(front[..3 * PAGE + 5], whole[setup..]);
        assert_eq!(front.len(), 4 * PAGE, "the archive begins on a page of its own");
        assert!(front[3 * PAGE + 5..].iter().all(|byte| *byte == 0));
        assert_eq!(front_size(&kernel), Some(front.len()));
        // The setup is the kernel's, but for the length of what comes after it.
        let mut same = kernel[..setup].to_vec();
        assert_eq!(same[0x1f4..0x1f8], ((kernel.len() - setup) as u32 / 16).to_le_bytes());
        same[0x1f4..0x1f8].copy_from_slice(&whole[0x1f4..0x1f8]);
        assert_eq!(same, whole[..setup]);
        let numbers = |number: u32| kernel[setup..].windows(4).filter(|bytes| *bytes == number.to_le_bytes()).count();
        assert_eq!(numbers(0x100_0000), 2, "where to copy to, and where to go on");
        assert_eq!(numbers((3 * PAGE as u32 + 8) / 4), 1, "how much to copy");
        assert!(kernel.len() - setup < 128);
    }

    /// What [`code`] is made of, executed by hand: enough of the processor for these instructions alone.
    fn execute(code: &[u8], memory: &mut [u8], boot_params: u32) -> (u32, u32) {
        let load =
            |memory: &[u8], at: u32| u32::from_le_bytes(memory[at as usize..at as usize + 4].try_into().unwrap());
        let store = |memory: &mut [u8], at: u32, value: u32| {
            memory[at as usize..at as usize + 4].copy_from_slice(&value.to_le_bytes());
        };
        let (mut eax, mut ecx, mut edx, mut esi, mut edi) = (0_u32, 0_u32, 0_u32, boot_params, 0_u32);
        let (mut at, mut down, mut upwards) = (0, false, false);
        loop {
            let number = |from: usize| load(code, (at + from) as u32);
            at += match code[at..] {
                [0x8b, 0x86, ..] => (eax = load(memory, esi + number(2)), 6).1,
                [0x89, 0xf2, ..] => (edx = esi, 2).1,
                [0x89, 0xc6, ..] => (esi = eax, 2).1,
                [0x89, 0xd6, ..] => (esi = edx, 2).1,
                [0xb9, ..] => (ecx = number(1), 5).1,
                [0xbf, ..] => (edi = number(1), 5).1,
                [0xb8, ..] => (eax = number(1), 5).1,
                [sign @ (0x01 | 0x29), 0x8a, ..] => {
                    let place = edx + number(2);
                    let now = load(memory, place);
                    store(memory, place, if sign == 1 { now + ecx } else { now - ecx });
                    6
                }
                [0xfc, ..] => (down = false, 1).1,
                [0xfd, ..] => (down = true, 1).1,
                [0x39, 0xf7, ..] => (upwards = edi > esi, 2).1,
                [0x76, by, ..] => 2 + if upwards { 0 } else { usize::from(by) },
                [0x8d, 0x74, 0x8e, 0xfc, ..] => (esi = esi + 4 * ecx - 4, 4).1,
                [0x8d, 0x7c, 0x8f, 0xfc, ..] => (edi = edi + 4 * ecx - 4, 4).1,
                [0xf3, 0xa5, ..] => {
                    let step = if down { 4_u32.wrapping_neg() } else { 4 };
                    for _ in 0..ecx {
                        store(memory, edi, load(memory, esi));
                        (esi, edi) = (esi.wrapping_add(step), edi.wrapping_add(step));
                    }
                    2
                }
                [0x31, 0xff | 0xdb | 0xed, ..] => 2,
                [0xff, 0xe0, ..] => return (eax, esi),
                _ => panic!("no instruction at {at}"),
            };
        }
    }

    #[test]
    fn the_loader_moves_the_kernel_home_and_leaves_the_archive() {
        let (front, size, params) = (PAGE as u32, 4000_usize, 0x100_u32);
        let content: Vec<u8> = (0..size).map(|at| (at % 249) as u8).collect();
        // Away from each other, and overlapping: downwards and upwards.
        for (from, home) in [(0x8000, 0x2000), (0x2800, 0x2000), (0x2000, 0x2800), (0x2000, 0x8000), (0x2000, 0x2000)] {
            let mut memory = vec![0; 0x10000];
            memory[from..from + size].copy_from_slice(&content);
            memory[0x318..0x31c].copy_from_slice(&(from as u32).to_le_bytes());
            memory[0x31c..0x320].copy_from_slice(&(front + 77).to_le_bytes());
            let ends = execute(&code(front, home as u32, size as u32 / 4), &mut memory, params);
            assert_eq!(ends, (home as u32, params), "{from:x} to {home:x}");
            assert_eq!(memory[home..home + size], content, "{from:x} to {home:x}");
            assert_eq!(memory[0x318..0x31c], (from as u32 + front).to_le_bytes());
            assert_eq!(memory[0x31c..0x320], 77_u32.to_le_bytes());
        }
    }

    #[test]
    fn a_kernel_that_does_not_fit_is_refused_with_the_reason() {
        let with = |at: usize, bytes: &[u8]| {
            let mut kernel = kernel(PAGE);
            kernel[at..at + bytes.len()].copy_from_slice(bytes);
            cut(&kernel).unwrap_err()
        };
        assert_eq!(with(0x202, b"none"), "it is no kernel of this processor's boot protocol");
        assert_eq!(with(0x206, &[9, 2]), "its boot protocol is older than 2.10");
        assert_eq!(with(0x211, &[0]), "it is not one that is loaded at 1 MiB");
        assert_eq!(with(0x216, &[0x20]), "it is not one that is loaded at 1 MiB");
        assert_eq!(with(0x234, &[0]), "it is not relocatable");
        for home in [0x10_0000_u64, 0x100_0001, 0x1_0100_0000] {
            assert!(with(0x258, &home.to_le_bytes()).starts_with("the address"), "{home:x}");
        }
        assert_eq!(with(0x1f1, &[200]), "it is cut off");
        assert_eq!(cut(b"").unwrap_err(), "it is no kernel of this processor's boot protocol");
        assert_eq!(cut(&kernel(0)).unwrap_err(), "it is cut off");
    }
}
