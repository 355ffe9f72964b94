//! What was measured, and what it comes to.

use std::time::Duration;

use serde::{Serialize, Serializer};
use vmkit::{Error, Id};

use super::args::Pattern;
use crate::output::aligned;

/// A request that was answered: which machine, and how long its parts took.
#[derive(Clone, Debug)]
pub struct Answered {
    pub machine: Id,
    pub acquire: Duration,
    pub command: Duration,
    /// Until it was deleted; no part of the latency. Absent when that failed: the pool then tries again.
    pub delete: Option<Duration>,
}

impl Answered {
    /// From wanting a machine to its first command's answer.
    pub fn latency(&self) -> Duration {
        self.acquire + self.command
    }
}

/// The requests of a pattern, in the order in which they were made.
#[derive(Debug)]
pub struct Series {
    pub pattern: Pattern,
    pub requests: Vec<Result<Answered, Error>>,
}

/// What a pattern comes to.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Figures {
    #[serde(serialize_with = "micros")]
    pub median_ms: f64,
    #[serde(serialize_with = "micros")]
    pub p95_ms: f64,
    #[serde(serialize_with = "micros")]
    pub p99_ms: f64,
    /// The part of the requests that was answered, from 0 to 1.
    pub success: f64,
}

impl Series {
    /// Milliseconds, in order.
    pub fn latencies(&self) -> Vec<f64> {
        let answered = self.requests.iter().flatten();
        let mut sorted: Vec<f64> = answered.map(|request| ms(request.latency())).collect();
        sorted.sort_by(f64::total_cmp);
        sorted
    }

    /// `None` when nothing was answered.
    pub fn figures(&self) -> Option<Figures> {
        let sorted = self.latencies();
        Some(Figures {
            median_ms: nearest_rank(&sorted, 50)?,
            p95_ms: nearest_rank(&sorted, 95)?,
            p99_ms: nearest_rank(&sorted, 99)?,
            success: sorted.len() as f64 / self.requests.len() as f64,
        })
    }

    /// How many failed, and the first that did.
    pub fn failed(&self) -> Option<(usize, &Error)> {
        let mut failed = self.requests.iter().filter_map(|request| request.as_ref().err());
        let first = failed.next()?;
        Some((1 + failed.count(), first))
    }
}

/// The percentile of what is in order: the smallest value that so many percent of all do not exceed.
fn nearest_rank(sorted: &[f64], percent: usize) -> Option<f64> {
    let rank = (sorted.len() * percent).div_ceil(100).max(1);
    sorted.get(rank - 1).copied()
}

/// A row for each pattern.
pub fn table(all: &[(Pattern, Figures)]) -> String {
    let row = |(pattern, figures): &(Pattern, Figures)| {
        let Figures { median_ms, p95_ms, p99_ms, success } = *figures;
        let success = format!("{}%", (success * 1000.0).floor() / 10.0);
        vec![pattern.name().to_owned(), text(median_ms), text(p95_ms), text(p99_ms), success]
    };
    aligned(&["PATTERN", "MEDIAN", "P95", "P99", "SUCCESS"], all.iter().map(row).collect(), 1)
}

/// A row for each request.
pub fn each(series: &Series) -> String {
    let row = |(at, request): (usize, &Result<Answered, Error>)| {
        let mut cells = vec![series.pattern.name().to_owned(), (at + 1).to_string()];
        cells.extend(match request {
            Ok(done) => {
                let deleted = done.delete.map_or("failed".to_owned(), |time| text(ms(time)));
                let [acquire, command, total] = [done.acquire, done.command, done.latency()].map(|time| text(ms(time)));
                [done.machine.to_string(), acquire, command, total, deleted]
            }
            Err(_) => ["failed", "-", "-", "-", "-"].map(str::to_owned),
        });
        cells
    };
    let header = ["PATTERN", "REQUEST", "MACHINE", "ACQUIRE", "COMMAND", "TOTAL", "DELETE"];
    aligned(&header, series.requests.iter().enumerate().map(row).collect(), 3)
}

pub fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}

/// With as many digits as mean something.
pub fn text(ms: f64) -> String {
    match ms {
        ms if ms >= 100.0 => format!("{ms:.0} ms"),
        ms if ms >= 10.0 => format!("{ms:.1} ms"),
        ms if ms >= 1.0 => format!("{ms:.2} ms"),
        ms => format!("{ms:.3} ms"),
    }
}

/// Three digits: what is smaller is noise.
fn micros<S: Serializer>(ms: &f64, to: S) -> Result<S::Ok, S::Error> {
    to.serialize_f64((ms * 1000.0).round() / 1000.0)
}

#[cfg(test)]
mod tests {
    use vmkit::ErrorKind;

    use super::*;

    fn series(latencies: &[u64], failures: usize) -> Series {
        let answered = |&time: &u64| {
            let acquire = Duration::from_millis(time - 1);
            Ok(Answered { machine: Id::new("m").unwrap(), acquire, command: Duration::from_millis(1), delete: None })
        };
        let failed = (0..failures).map(|at| Err(Error::new(ErrorKind::TimedOut, format!("failure {at}"))));
        Series { pattern: Pattern::Burst, requests: failed.chain(latencies.iter().map(answered)).collect() }
    }

    #[test]
    fn percentiles_are_nearest_ranks() {
        let hundred: Vec<f64> = (1..=100).map(f64::from).collect();
        assert_eq!([50, 95, 99].map(|percent| nearest_rank(&hundred, percent)), [Some(50.0), Some(95.0), Some(99.0)]);
        let ten = &hundred[..10];
        assert_eq!([50, 95, 99].map(|percent| nearest_rank(ten, percent)), [Some(5.0), Some(10.0), Some(10.0)]);
        assert_eq!([50, 95, 99].map(|percent| nearest_rank(&[7.0], percent)), [Some(7.0); 3]);
        assert_eq!(nearest_rank(&[], 50), None);
    }

    #[test]
    fn failures_count_in_the_rate_alone() {
        let figures = series(&[30, 10, 20], 1).figures().unwrap();
        assert_eq!(figures, Figures { median_ms: 20.0, p95_ms: 30.0, p99_ms: 30.0, success: 0.75 });
        assert_eq!(series(&[], 2).figures(), None);
        let failing = series(&[5], 2);
        let (count, first) = failing.failed().unwrap();
        assert_eq!((count, first.message()), (2, "failure 0"));
        assert!(series(&[5], 0).failed().is_none());
    }

    #[test]
    fn a_rate_is_never_rounded_up_to_all() {
        let nearly = Figures { median_ms: 1.0, p95_ms: 123.4, p99_ms: 12.34, success: 0.9999 };
        let table = table(&[(Pattern::Burst, nearly)]);
        let words: Vec<&str> = table.lines().last().unwrap().split_whitespace().collect();
        assert_eq!(words, ["burst", "1.00", "ms", "123", "ms", "12.3", "ms", "99.9%"]);
    }
}
