//! Many bare machines that are all asked for a process at the same moment.

use std::sync::Mutex;
use std::thread;

use super::qemu::Qemu;
use super::{Floor, PROCESS, REPEATS, Result, WARM};
use crate::samples::{Samples, ms, rank};
use std::time::Instant;

/// As many as ours.
const BURST: usize = crate::forks::BURST;
/// How many of them are made at once.
const MADE: usize = 2;

impl Floor {
    /// What [`burst`](Floor::burst) measures.
    pub const BURST: &[&str] = &["burst_median", "burst_p99", "burst_turns_median", "burst_turns_p99"];

    /// A hundred running, warm machines, each of which is asked for a process: all at once, which is what a hundred clients
    /// with nothing between them and QEMU do; and in turns, as many at a time as there are processors.
    ///
    /// # Errors
    /// As [`boot`](Floor::boot).
    pub fn burst(&mut self, samples: &mut Samples) -> Result<()> {
        self.need_template(samples)?;
        let made = Mutex::new(Vec::new());
        let each = |_: ()| {
            let mut vm = self.forked()?;
            for _ in 0..WARM {
                vm.expect(PROCESS.0, PROCESS.1)?;
            }
            made.lock().unwrap_or_else(std::sync::PoisonError::into_inner).push(vm);
            Ok(())
        };
        at_a_time(MADE, vec![(); BURST], each)?;
        let mut crowd = made.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
        let processors = thread::available_parallelism().map_or(1, usize::from);
        let ways =
            [(BURST, ["burst_median", "burst_p99"]), (processors, ["burst_turns_median", "burst_turns_p99"])];
        for _ in 0..REPEATS {
            for (width, [median, p99]) in ways {
                let took = answers(&mut crowd, width)?;
                samples.add(median, rank(&took, 50));
                samples.add(p99, rank(&took, 99));
            }
        }
        Ok(())
    }
}

/// Milliseconds from the beginning to each one's answer, in order.
fn answers(crowd: &mut [Qemu<'_>], width: usize) -> Result<Vec<f64>> {
    let took = Mutex::new(Vec::new());
    let clock = Instant::now();
    at_a_time(width, crowd.iter_mut().collect(), |vm: &mut Qemu<'_>| {
        vm.expect(PROCESS.0, PROCESS.1)?;
        took.lock().unwrap_or_else(std::sync::PoisonError::into_inner).push(ms(clock.elapsed()));
        Ok(())
    })?;
    Ok(took.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner))
}

/// Does this with each, so many at a time.
pub(super) fn at_a_time<T: Send>(width: usize, all: Vec<T>, each: impl Fn(T) -> Result<()> + Sync) -> Result<()> {
    let left = Mutex::new(all.into_iter());
    let next = || left.lock().unwrap_or_else(std::sync::PoisonError::into_inner).next();
    let worker = || -> Result<()> { std::iter::from_fn(next).try_for_each(&each) };
    thread::scope(|scope| {
        let workers: Vec<_> = (0..width).map(|_| scope.spawn(worker)).collect();
        workers.into_iter().try_for_each(|worker| match worker.join() {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic),
        })
    })
}
