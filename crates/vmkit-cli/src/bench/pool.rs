//! Requests to a pool, in patterns.

use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use tokio::task::JoinSet;
use tokio::time::Instant;
use vmkit::pool::{EventKind, Next, Pool};
use vmkit::{Error, ErrorKind, Result};

use super::args::{Backend, Pattern, PoolArgs};
use super::figures::{self, Answered, Series};
use super::seconds;
use crate::output::Output;

const TICK: Duration = Duration::from_millis(100);

/// What a machine is asked first, and what it has to answer.
#[derive(Clone, Copy, Debug)]
struct Question {
    program: &'static str,
    answer: &'static str,
}

impl Question {
    fn to(backend: Backend) -> Question {
        match backend {
            Backend::Qemu => Question { program: "uname", answer: "Linux\n" },
            Backend::Sim => Question { program: "true", answer: "" },
        }
    }
}

/// Starts the pool, and makes every pattern's requests on it.
///
/// # Errors
/// When the pool does not fill, and when no request of a pattern is answered. The pool is the caller's to close.
pub async fn measure(pool: &Pool, bench: &PoolArgs, output: &Output) -> Result<Vec<Series>> {
    start(pool, bench, output).await?;
    let mut work = Work::new(pool, bench);
    let mut measured = Vec::new();
    for pattern in bench.patterns() {
        let series = work.series(pattern, bench, output).await?;
        if let Some(figures) = series.figures().filter(|_| pattern == Pattern::Sequential) {
            work.interval = Duration::from_secs_f64(figures.median_ms / 2000.0);
        }
        measured.push(series);
    }
    Ok(measured)
}

/// Starts the pool and fills it.
async fn start(pool: &Pool, bench: &PoolArgs, output: &Output) -> Result<()> {
    let began = Instant::now();
    let bar = Bar::new(output, "filling", bench.size.into());
    tokio::select! {
        // Biased: there is nothing to subscribe to before it has been started.
        biased;
        started = pool.start() => started?,
        error = hopeless(pool) => return Err(error),
    }
    Work::new(pool, bench).full(|ready| bar.reach(ready)).await?;
    drop(bar);
    let (size, staging) = (bench.size, bench.staging);
    output.note(format!("filled: {size} machines, {staging}, in {}", seconds(began.elapsed())));
    Ok(())
}

/// The first failure that another attempt does not mend; a pool by itself would go on trying.
async fn hopeless(pool: &Pool) -> Error {
    let mut events = pool.subscribe().await;
    while let Some(next) = events.next().await {
        if let Some(error) = fatal(&next) {
            return error;
        }
    }
    std::future::pending().await
}

fn fatal(next: &Next) -> Option<Error> {
    let Next::Event(event) = next else { return None };
    let error = event.error.as_ref().filter(|_| event.kind == EventKind::VmCreateFailed)?;
    (!error.is_retryable()).then(|| error.duplicate())
}

/// Requests of one kind to one pool.
struct Work<'a> {
    pool: &'a Pool,
    question: Question,
    limit: Duration,
    /// Between staggered requests.
    interval: Duration,
}

impl<'a> Work<'a> {
    fn new(pool: &'a Pool, bench: &PoolArgs) -> Work<'a> {
        Work { pool, question: Question::to(bench.backend), limit: bench.timeout, interval: Duration::ZERO }
    }

    /// A pattern's requests, on a pool that is full when they begin.
    async fn series(&self, pattern: Pattern, bench: &PoolArgs, output: &Output) -> Result<Series> {
        self.full(|_| ()).await?;
        let (name, count) = (pattern.name(), bench.requests);
        if pattern == Pattern::Staggered {
            let every = figures::text(figures::ms(self.interval));
            output.note(format!("{name}: a request every {every}, half of the sequential median"));
        }
        let bar = Bar::new(output, name, count.into());
        let requests = match pattern {
            Pattern::Sequential => self.sequential(count, &bar).await?,
            Pattern::Staggered => self.at_intervals(count, self.interval, &bar).await,
            Pattern::Burst => self.at_intervals(count, Duration::ZERO, &bar).await,
        };
        drop(bar);
        let series = Series { pattern, requests };
        let Some((failed, first)) = series.failed() else { return Ok(series) };
        if series.figures().is_none() {
            let hint = first.next_step().unwrap_or("`vmkit run -- uname` shows whether a single machine works");
            return Err(Error::new(first.kind(), format!("{name}: none of {count} requests was answered"))
                .hint(hint)
                .caused_by(first.duplicate()));
        }
        output.warn_of(&format!("{name}: {failed} of {count} requests failed; the first"), first);
        Ok(series)
    }

    /// Waits until every machine is ready, and tells how many are.
    async fn full(&self, told: impl Fn(u64)) -> Result<()> {
        let size = self.pool.config().size();
        let mut events = self.pool.subscribe().await;
        let (mut most, mut deadline) = (0, Instant::now() + self.limit);
        loop {
            let status = self.pool.status().await;
            let ready = status.counts.ready.sum();
            told(ready as u64);
            if ready >= size {
                return Ok(());
            }
            if ready > most {
                (most, deadline) = (ready, Instant::now() + self.limit);
            }
            // Several events at once are one reason to look again, and so is the time, as not every change is an event.
            let mut next = tokio::time::timeout(TICK, events.next()).await.unwrap_or_default();
            while let Some(event) = next {
                if let Some(error) = fatal(&event) {
                    return Err(error);
                }
                next = events.try_next();
            }
            if Instant::now() > deadline {
                let message = format!("{ready} of {size} machines are ready, and no other was within {:?}", self.limit);
                let error = Error::new(ErrorKind::TimedOut, message).hint("allow more time with --timeout");
                return Err(match &status.trouble {
                    Some(trouble) => error.with_details(trouble.error.clone()),
                    None => error,
                });
            }
        }
    }

    /// One after the other, each on a full pool.
    async fn sequential(&self, count: u32, bar: &Bar) -> Result<Vec<Result<Answered>>> {
        let mut requests = Vec::with_capacity(count as usize);
        for _ in 0..count {
            self.full(|_| ()).await?;
            requests.push(request(self.pool.clone(), self.question, self.limit, Instant::now()).await);
            bar.step();
        }
        Ok(requests)
    }

    /// One at each interval, whatever the others do; without one, all at once. A timer has its own grain: requests may be late
    /// by a millisecond, the next ones then make up for it.
    async fn at_intervals(&self, count: u32, interval: Duration, bar: &Bar) -> Vec<Result<Answered>> {
        let began = Instant::now();
        let mut under_way = JoinSet::new();
        let mut requests: Vec<(u32, Result<Answered>)> = Vec::with_capacity(count as usize);
        for at in 0..count {
            let due = began + interval.mul_f64(at.into());
            while let Some(wait) = due.checked_duration_since(Instant::now()).filter(|wait| !wait.is_zero()) {
                tokio::select! {
                    () = tokio::time::sleep(wait) => {}
                    Some(ended) = under_way.join_next() => requests.extend(keep(ended, bar)),
                }
            }
            // All of a burst begin when it does, however long it takes to send them.
            let wanted = if interval.is_zero() { began } else { Instant::now() };
            let work = request(self.pool.clone(), self.question, self.limit, wanted);
            under_way.spawn(async move { (at, work.await) });
        }
        while let Some(ended) = under_way.join_next().await {
            requests.extend(keep(ended, bar));
        }
        requests.sort_by_key(|(at, _)| *at);
        requests.into_iter().map(|(_, request)| request).collect()
    }
}

type Ended = std::result::Result<(u32, Result<Answered>), tokio::task::JoinError>;

fn keep(ended: Ended, bar: &Bar) -> Option<(u32, Result<Answered>)> {
    bar.step();
    match ended {
        Ok(request) => Some(request),
        Err(error) => {
            Some((u32::MAX, Err(Error::new(ErrorKind::Panicked, "a request ended half way").caused_by(error))))
        }
    }
}

/// One request, from when it was wanted. Its machine is deleted when the answer is there, or when there is none.
async fn request(pool: Pool, question: Question, limit: Duration, wanted: Instant) -> Result<Answered> {
    let left = || limit.saturating_sub(wanted.elapsed());
    let lease = pool.acquire().timeout(left()).await?;
    let acquire = wanted.elapsed();
    let output = lease.command(question.program).timeout(left()).output().await?;
    let command = wanted.elapsed() - acquire;
    if !output.status.success() || output.stdout != question.answer.as_bytes() {
        let said = String::from_utf8_lossy(&output.stdout).chars().take(80).collect::<String>();
        let message = format!("{} ended with {:?} and answered {said:?}", question.program, output.status);
        return Err(Error::new(ErrorKind::Agent, message)
            .on(lease.id().as_str())
            .hint(format!("{:?} was expected: use an image that has it", question.answer)));
    }
    let delete = lease.delete().await.ok().map(|()| wanted.elapsed() - command - acquire);
    Ok(Answered { machine: lease.id().clone(), acquire, command, delete })
}

/// How far it is, on a terminal.
pub struct Bar(ProgressBar);

impl Bar {
    /// Of so many steps; of none, that something is under way.
    pub fn new(output: &Output, doing: &'static str, steps: u64) -> Bar {
        if output.quiet || output.json {
            return Bar(ProgressBar::hidden());
        }
        let (bar, template) = match steps {
            0 => (ProgressBar::new_spinner(), "{spinner} {prefix} {elapsed}"),
            steps => (ProgressBar::new(steps), "{spinner} {prefix:<10} {bar:40} {pos}/{len} {elapsed}"),
        };
        let bar = match ProgressStyle::with_template(template) {
            Ok(style) => bar.with_style(style),
            Err(_) => bar,
        };
        let bar = bar.with_prefix(doing);
        bar.enable_steady_tick(TICK);
        Bar(bar)
    }

    fn step(&self) {
        self.0.inc(1);
    }

    fn reach(&self, position: u64) {
        self.0.set_position(position);
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;
    use vmkit::sim::{Fault, Latency, SimProvider, Verb, World};
    use vmkit::{Host, Source, Spec};

    use super::*;
    use crate::args::{Args, Command};
    use crate::bench::{BenchArgs, BenchCommand};

    const QUIET: Output = Output { json: false, quiet: true };

    fn asked(more: &[&str]) -> PoolArgs {
        let all = ["vmkit", "bench", "pool", "--backend", "sim", "--size", "2", "--requests", "4"];
        match Args::parse_from(all.iter().chain(more)).command {
            Command::Bench(BenchArgs { command: Some(BenchCommand::Pool(bench)), .. }) => *bench,
            _ => unreachable!("that is the command"),
        }
    }

    fn pool(world: &World, bench: &PoolArgs) -> Pool {
        let host = Host::new(SimProvider::new(world.clone()));
        Pool::builder(host, Spec::new(Source::Alias("base".into()))).config(bench.config()).build().unwrap()
    }

    #[tokio::test(start_paused = true)]
    async fn requests_that_fail_count_and_the_others_go_on() {
        let (world, bench) = (World::new(), asked(&[]));
        let pool = pool(&world, &bench);
        world.fault(None, Verb::Spawn, Fault::Err);
        let measured = measure(&pool, &bench, &QUIET).await.unwrap();
        assert_eq!(measured.iter().map(|series| series.pattern).collect::<Vec<_>>(), Pattern::ALL);
        let figures: Vec<f64> = measured.iter().map(|series| series.figures().unwrap().success).collect();
        assert_eq!(figures, [0.75, 1.0, 1.0], "the first command of all failed");
        let (count, error) = measured[0].failed().unwrap();
        assert!(count == 1 && measured[0].requests[0].is_err(), "{error}");
        assert_eq!(pool.close(Duration::from_secs(60)).await.left, []);
        assert_eq!(world.residue(), Vec::<String>::new());
    }

    #[tokio::test(start_paused = true)]
    async fn a_pattern_without_an_answer_is_an_error_and_so_is_a_wrong_answer() {
        let (world, bench) = (World::new(), asked(&[]));
        let pool = pool(&world, &bench);
        start(&pool, &bench, &QUIET).await.unwrap();
        // `uname` is there, and is not the system that was expected.
        let work = Work { question: Question::to(Backend::Qemu), ..Work::new(&pool, &bench) };
        let error = work.at_intervals(1, Duration::ZERO, &Bar::new(&QUIET, "", 1)).await.remove(0).unwrap_err();
        assert!(error.message().contains(r#"answered "Linux sim\n""#), "{error}");
        for _ in 0..bench.requests {
            world.fault(None, Verb::Spawn, Fault::Err);
        }
        let error = Work { question: Question::to(Backend::Sim), ..work }.series(Pattern::Burst, &bench, &QUIET).await;
        assert!(error.unwrap_err().message().contains("none of 4 requests"));
        assert_eq!(pool.close(Duration::from_secs(60)).await.left, []);
    }

    #[tokio::test(start_paused = true)]
    async fn a_pool_that_does_not_fill_is_late_or_hopeless() {
        let (world, bench) = (World::new(), asked(&["--timeout", "10s"]));
        world.latency(Latency { boot: Duration::from_secs(60), ..Latency::default() });
        let late = pool(&world, &bench);
        assert_eq!(measure(&late, &bench, &QUIET).await.unwrap_err().kind(), ErrorKind::TimedOut);
        assert_eq!(late.close(Duration::from_secs(600)).await.left, []);
        let host = Host::new(SimProvider::new(world.clone()));
        let hopeless = Pool::builder(host, Spec::new(Source::Alias("missing".into()))).config(bench.config());
        let hopeless = hopeless.build().unwrap();
        assert_eq!(measure(&hopeless, &bench, &QUIET).await.unwrap_err().kind(), ErrorKind::NotFound);
        assert_eq!(hopeless.close(Duration::from_secs(60)).await.left, []);
        assert_eq!(world.residue(), Vec::<String>::new());
    }
}
