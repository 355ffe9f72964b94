//! Requests to a pool, in patterns.

use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use tokio::task::JoinSet;
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
    let work = Work { pool, question: Question::to(bench.backend), limit: bench.timeout };
    let mut measured = Vec::new();
    let mut interval = Duration::ZERO;
    for pattern in bench.patterns() {
        work.full(|_| ()).await?;
        let bar = Bar::new(output, pattern.name(), bench.requests.into());
        let requests = match pattern {
            Pattern::Sequential => work.sequential(bench.requests, &bar).await?,
            Pattern::Staggered => {
                let every = figures::text(figures::ms(interval));
                output.note(format!("staggered: a request every {every}, half of the sequential median"));
                work.at_intervals(bench.requests, interval, &bar).await
            }
            Pattern::Burst => work.at_intervals(bench.requests, Duration::ZERO, &bar).await,
        };
        drop(bar);
        let series = Series { pattern, requests };
        if let Some((count, first)) = series.failed() {
            let what = format!("{}: {count} of {} requests failed; the first", pattern.name(), series.requests.len());
            match series.figures() {
                Some(_) => output.warn_of(&what, first),
                None => {
                    let all = format!("{}: none of {count} requests was answered", pattern.name());
                    let hint = first.next_step().unwrap_or("`vmkit run -- uname` shows whether a single machine works");
                    return Err(Error::new(first.kind(), all).hint(hint).caused_by(first.duplicate()));
                }
            }
        }
        if let Some(figures) = series.figures().filter(|_| pattern == Pattern::Sequential) {
            interval = Duration::from_secs_f64(figures.median_ms / 2000.0);
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
    let work = Work { pool, question: Question::to(bench.backend), limit: bench.timeout };
    work.full(|ready| bar.reach(ready)).await?;
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
}

impl Work<'_> {
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
