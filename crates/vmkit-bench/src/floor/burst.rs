//! Many bare machines that are all asked for a process at the same moment.
//!
//! Two ways, as nobody's clients are better off than in one of them. All machines run, and all are asked at once: that is what
//! there is with nothing in between. Or none runs but those whose turn it is, as many as there are processors: the least that
//! the processors need, as neither idle guests nor one another's caches are in the way.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Instant;

use super::qemu::Qemu;
use super::{Floor, PROCESS, REPEATS, Result, WARM};
use crate::forks::BURST;
use crate::samples::{Samples, ms, rank};

/// How many of them are made at once.
const MADE: usize = 2;

impl Floor {
    /// What [`burst`](Floor::burst) measures.
    pub const BURST: &[&str] = &["burst_median", "burst_p99", "burst_turns_median", "burst_turns_p99"];

    /// As many machines as ours, as warm as ours, a process's answer of each.
    ///
    /// # Errors
    /// As [`boot`](Floor::boot).
    pub fn burst(&mut self, samples: &mut Samples) -> Result<()> {
        self.need_template(samples)?;
        let made = Mutex::new(Vec::new());
        at_a_time(MADE, vec![(); BURST], |()| {
            let mut vm = self.forked()?;
            for _ in 0..WARM {
                vm.expect(PROCESS.0, PROCESS.1)?;
            }
            lock(&made).push(vm);
            Ok(())
        })?;
        let mut crowd = made.into_inner().unwrap_or_else(PoisonError::into_inner);
        let processors = thread::available_parallelism().map_or(1, usize::from);
        for _ in 0..REPEATS {
            let took = answers(&mut crowd, BURST, |vm| vm.expect(PROCESS.0, PROCESS.1))?;
            samples.add("burst_median", rank(&took, 50));
            samples.add("burst_p99", rank(&took, 99));
            crowd.iter_mut().try_for_each(Qemu::pause)?;
            let took = answers(&mut crowd, processors, |vm| {
                vm.cont()?;
                vm.expect(PROCESS.0, PROCESS.1)?;
                vm.pause()
            })?;
            samples.add("burst_turns_median", rank(&took, 50));
            samples.add("burst_turns_p99", rank(&took, 99));
            crowd.iter_mut().try_for_each(Qemu::cont)?;
        }
        Ok(())
    }
}

/// Asks all of them, so many at a time. Milliseconds from the beginning to each one's end, in order.
fn answers<'a>(
    crowd: &mut [Qemu<'a>],
    width: usize,
    ask: impl Fn(&mut Qemu<'a>) -> Result<()> + Sync,
) -> Result<Vec<f64>> {
    let took = Mutex::new(Vec::new());
    let clock = Instant::now();
    at_a_time(width, crowd.iter_mut().collect(), |vm| {
        ask(vm)?;
        lock(&took).push(ms(clock.elapsed()));
        Ok(())
    })?;
    let mut took = took.into_inner().unwrap_or_else(PoisonError::into_inner);
    took.sort_by(f64::total_cmp);
    Ok(took)
}

/// Does this with each, so many at a time.
///
/// # Errors
/// The first that fails; the others come to their end.
pub(super) fn at_a_time<T: Send>(width: usize, all: Vec<T>, each: impl Fn(T) -> Result<()> + Sync) -> Result<()> {
    let left = Mutex::new(all.into_iter());
    let worker = || std::iter::from_fn(|| lock(&left).next()).try_for_each(&each);
    thread::scope(|scope| {
        let workers: Vec<_> = (0..width).map(|_| scope.spawn(worker)).collect();
        workers.into_iter().try_for_each(|worker| match worker.join() {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic),
        })
    })
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::super::Error;
    use super::*;

    #[test]
    fn each_is_done_once_and_a_failure_is_told() {
        let done = Mutex::new(Vec::new());
        let each = |number| {
            lock(&done).push(number);
            if number == 7 { Err(Error::Interrupted) } else { Ok(()) }
        };
        at_a_time(3, vec![1, 2, 3, 4], each).unwrap();
        let mut so_far = std::mem::take(&mut *lock(&done));
        so_far.sort_unstable();
        assert_eq!(so_far, [1, 2, 3, 4]);
        assert!(matches!(at_a_time(1, vec![7, 8], each), Err(Error::Interrupted)));
        assert_eq!(*lock(&done), [7], "nothing goes on after a failure");
    }
}
