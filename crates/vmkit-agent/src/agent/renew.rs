//! A guest that goes on from a saved execution: its clock stood still, and its random numbers may have been used before.

use std::fs::File;
use std::io::{self, Write};

use rustix::ioctl::{NoArg, Opcode, opcode};
use rustix::time::{ClockId, Timespec, clock_settime};

use crate::protocol::Renew;

/// Tells the kernel to draw from its pool anew: `RNDRESEEDCRNG` of `linux/random.h`.
const RESEED: Opcode = opcode::none(b'R', 7);

/// Both or neither is said to have worked.
pub(super) fn apply(renewed: &Renew) -> Result<(), String> {
    reseed(&renewed.seed).map_err(|error| format!("the guest could not renew its random numbers: {error}"))?;
    let now = Timespec { tv_sec: (renewed.now / 1_000_000_000) as i64, tv_nsec: (renewed.now % 1_000_000_000) as i64 };
    clock_settime(ClockId::Realtime, now).map_err(|error| format!("the guest could not set its clock: {error}"))
}

fn reseed(seed: &[u8; 32]) -> io::Result<()> {
    let mut pool = File::options().write(true).open("/dev/urandom")?;
    pool.write_all(seed)?;
    match draw_anew(&pool) {
        // Older kernels have no such call: what was written is in the pool all the same.
        Ok(()) | Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOTTY) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

#[expect(unsafe_code, reason = "the library cannot know what an ioctl does")]
fn draw_anew(pool: &File) -> rustix::io::Result<()> {
    // SAFETY: this call takes no argument and touches no memory of ours.
    unsafe { rustix::ioctl::ioctl(pool, NoArg::<RESEED>::new()) }
}
