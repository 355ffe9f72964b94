//! vmkit's own figures: forks of templates, one at a time and many.

use std::time::{Duration, Instant};

use futures::future::{join_all, try_join_all};
use vmkit::pool::{Pool, Staging};
use vmkit::{ConsoleSinks, Error as VmkitError, Id};

use crate::error::Result;
use crate::ours::{CLEANUP, FILLS, Ours, PROCESS, REPEATS, WARM, fill, remove, run, say};
use crate::samples::{Samples, ms, rank};

/// Throw-away machines in a round, how many at a time, and how many the pool keeps ready for them.
const CHURN: (usize, usize, usize) = (40, 2, 2);
/// How long a machine is ready before its memory is looked at: QEMU gives back what it needed to load a state a moment later.
const WAITS: Duration = Duration::from_millis(500);
/// Machines that are acquired at once.
pub(crate) const BURST: usize = 100;

impl Ours {
    /// What [`fork`](Ours::fork) measures.
    pub const FORK: &[&str] = &["fork_process", "unique_mib"];
    /// What [`churn`](Ours::churn) measures.
    pub const CHURN: &[&str] = &["churn_per_s"];
    /// What [`burst`](Ours::burst) measures.
    pub const BURST: &[&str] = &["burst_median", "burst_p99", "burst_success"];

    /// Makes the template that is to be forked.
    ///
    /// # Errors
    /// When it cannot be made, or on an interruption.
    pub fn template(&self) -> Result<()> {
        run(&self.runtime, &self.stop, self.forks.provider().build_template(&self.spec, &[], false)).map(drop)
    }

    /// A fresh machine's way from nothing to a process's answer, and the memory that a ready one has for itself.
    ///
    /// # Errors
    /// When vmkit fails, or on an interruption.
    pub fn fork(&mut self, samples: &mut Samples) -> Result<()> {
        for _ in 0..REPEATS {
            let id = self.next()?;
            let measure = async {
                let clock = Instant::now();
                let vm = self.forks.create(id.clone(), self.spec.clone()).await?;
                vm.clone_source().await?;
                vm.start(ConsoleSinks::discard()).await?;
                say(&vm, PROCESS.0, PROCESS.1).await?;
                samples.add("fork_process", ms(clock.elapsed()));
                Ok(())
            };
            let measured = run(&self.runtime, &self.stop, measure);
            self.runtime.block_on(remove(&self.forks, &id))?;
            measured?;
        }
        let id = self.next()?;
        let measure = async {
            let vm = self.forks.create(id.clone(), self.spec.clone()).await?;
            vm.clone_source().await?;
            vm.start(ConsoleSinks::discard()).await?;
            tokio::time::sleep(WAITS).await;
            if let Some(own) = vm.properties().memory_used {
                samples.add("unique_mib", own as f64 / f64::from(1 << 20));
            }
            Ok(())
        };
        let measured = run(&self.runtime, &self.stop, measure);
        self.runtime.block_on(remove(&self.forks, &id))?;
        measured
    }

    fn next(&mut self) -> Result<Id> {
        self.made += 1;
        Ok(Id::new(format!("bench-{}", self.made))?)
    }

    /// Throw-away machines from a pool: acquired, used, deleted, replaced.
    ///
    /// # Errors
    /// As [`fork`](Ours::fork).
    pub fn churn(&self, samples: &mut Samples) -> Result<()> {
        let (count, workers, size) = CHURN;
        let pool = Pool::builder(self.forks.clone(), self.spec.clone()).name("churn").size(size);
        let pool = pool.staging(Staging::Running).build()?;
        let work = async {
            pool.start().await?;
            fill(&pool, size, FILLS).await;
            let clock = Instant::now();
            let worker = async || {
                for _ in 0..count / workers {
                    let lease = pool.acquire().await?;
                    say(&lease, PROCESS.0, PROCESS.1).await?;
                    lease.delete().await?;
                }
                Ok::<_, VmkitError>(())
            };
            try_join_all((0..workers).map(|_| worker())).await?;
            // The last ones are replaced too: what was taken out is there again.
            fill(&pool, size, FILLS).await;
            samples.add("churn_per_s", count as f64 / clock.elapsed().as_secs_f64());
            Ok(())
        };
        let measured = run(&self.runtime, &self.stop, work);
        self.runtime.block_on(pool.close(CLEANUP)).into_result()?;
        measured
    }

    /// Everybody at once: as many acquires as there are machines, all of them running and warm.
    ///
    /// # Errors
    /// As [`fork`](Ours::fork).
    pub fn burst(&self, samples: &mut Samples) -> Result<()> {
        let pool = Pool::builder(self.forks.clone(), self.spec.clone()).name("burst").size(BURST);
        let pool = pool
            .staging(Staging::Running)
            .ready_command(PROCESS.0.iter().copied())
            .ready_runs(WARM)
            .create_concurrency(2);
        let pool = pool.build()?;
        let work = async {
            pool.start().await?;
            fill(&pool, BURST, FILLS).await;
            let clock = Instant::now();
            let one = async || {
                let lease = pool.acquire().await?;
                say(&lease, PROCESS.0, PROCESS.1).await?;
                Ok::<_, VmkitError>((clock.elapsed(), lease))
            };
            let answers = join_all((0..BURST).map(|_| one())).await;
            let mut took: Vec<f64> = answers.iter().flatten().map(|(took, _)| ms(*took)).collect();
            took.sort_by(f64::total_cmp);
            samples.add("burst_success", took.len() as f64 * 100.0 / BURST as f64);
            if !took.is_empty() {
                samples.add("burst_median", rank(&took, 50));
                samples.add("burst_p99", rank(&took, 99));
            }
            match answers.into_iter().find_map(|answer| answer.err()) {
                Some(error) if took.is_empty() => Err(error),
                _ => Ok(()),
            }
        };
        let measured = run(&self.runtime, &self.stop, work);
        self.runtime.block_on(pool.close(CLEANUP)).into_result()?;
        measured
    }
}
