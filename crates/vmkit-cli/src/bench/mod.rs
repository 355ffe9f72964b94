//! `vmkit bench`: how long what vmkit does takes here.
//!
//! ```text
//!  args ─┬▶ compare: a table of ours and bare QEMU's (crate vmkit-bench)
//!        └▶ mod: the pool of either backend, its start and its end ─▶ pool: requests in patterns
//!                       │                                                  │ series
//!                       ▼                                                  ▼
//!            table, JSON, plot ◀──────────────────────────────────────  figures
//! ```

mod args;
mod compare;
mod figures;
mod plot;
mod pool;

use std::time::{Duration, Instant};

use serde::Serialize;
use vmkit::pool::{Pool, PoolBuilder};
use vmkit::sim::{SimProvider, World};
use vmkit::{Error, Host, Source};
use vmkit_image::Hold;

use crate::args::Args;
use crate::context::Context;
use crate::output::{Failure, Output};
use crate::run::{CLEANUP_LIMIT, spec};
use crate::signals::{self, Signals};
use args::{Backend, Pattern, PoolArgs};
use figures::{Figures, Series};

pub use args::{BenchArgs, BenchCommand};
pub use compare::compare;

/// How long making an image may take to be given up.
const GIVES_UP: Duration = Duration::from_secs(10);

/// `vmkit bench pool`.
pub async fn pool(args: &Args, bench: &PoolArgs, output: &Output) -> Result<u8, Failure> {
    // From here on a signal closes the pool, whatever it is about.
    let mut signals = Signals::new();
    // What cannot work is said before minutes are spent.
    bench.config().check()?;
    let svg = bench.svg.as_deref().map(plot::Target::open).transpose()?;
    let context = match bench.backend {
        Backend::Sim => None,
        Backend::Qemu => Some(tokio::select! {
            context = Context::open(args, output) => context?,
            signal = signals.next() => return Ok(signals::exit_code(signal)),
        }),
    };
    let made = builder(context, bench);
    tokio::pin!(made);
    let (builder, hold) = tokio::select! {
        made = &mut made => made?,
        signal = signals.next() => {
            // The same signal has the image given up; this waits for it.
            let _ = tokio::time::timeout(GIVES_UP, made).await;
            return Ok(signals::exit_code(signal));
        }
    };
    let pool = builder.config(bench.config()).build()?;
    let measured = tokio::select! {
        measured = pool::measure(&pool, bench, output) => measured.map_err(Failure::from),
        signal = signals.next() => {
            output.note("asked to end: closing the pool");
            return match close(&pool, output).await {
                Ok(()) => Ok(signals::exit_code(signal)),
                Err(error) => Err(Failure { error, code: signals::exit_code(signal) }),
            };
        }
    };
    let closed = close(&pool, output).await;
    drop(hold);
    let measured = match (measured, closed) {
        (Ok(measured), Ok(())) => measured,
        (Ok(_), Err(error)) => return Err(error.into()),
        (Err(failure), Ok(())) => return Err(failure),
        (Err(failure), Err(left)) => {
            output.failure(&left.into());
            return Err(failure);
        }
    };
    report(&measured, bench, svg, output)?;
    Ok(0)
}

/// A pool of real machines, or without a context of simulated ones, and a hold on their image for as long as machines are made
/// of it.
async fn builder(context: Option<Context>, bench: &PoolArgs) -> Result<(PoolBuilder, Option<Hold>), Error> {
    Ok(match context {
        None => {
            let world = World::new();
            world.log_calls(false);
            let source = Source::Alias(bench.shape.image.clone());
            (Pool::builder(Host::new(SimProvider::new(world)), spec(&bench.shape, source)), None)
        }
        Some(context) => {
            let (image, hold) = context.image(&bench.shape.image).await?;
            (Pool::builder(context.host, spec(&bench.shape, Source::Boot(image))), Some(hold))
        }
    })
}

/// Closes it; what is left after all is an error that names it.
async fn close(pool: &Pool, output: &Output) -> Result<(), Error> {
    let began = Instant::now();
    let bar = pool::Bar::new(output, "closing", 0);
    let report = pool.close(CLEANUP_LIMIT).await;
    drop(bar);
    let deleted = report.deleted;
    report
        .into_result()
        .map_err(|error| error.hint("`vmkit cleanup --all` deletes them, and so does the next bench"))?;
    output.note(format!("closed: {deleted} machines deleted in {}", seconds(began.elapsed())));
    Ok(())
}

/// What programs read: those that were measured.
#[derive(Serialize)]
struct Report {
    #[serde(skip_serializing_if = "Option::is_none")]
    sequential: Option<Figures>,
    #[serde(skip_serializing_if = "Option::is_none")]
    staggered: Option<Figures>,
    #[serde(skip_serializing_if = "Option::is_none")]
    burst: Option<Figures>,
}

fn report(measured: &[Series], bench: &PoolArgs, svg: Option<plot::Target>, output: &Output) -> Result<(), Failure> {
    let figures: Vec<(Pattern, Figures)> =
        measured.iter().filter_map(|series| Some((series.pattern, series.figures()?))).collect();
    let of = |wanted| figures.iter().find(|(pattern, _)| *pattern == wanted).map(|(_, figures)| *figures);
    let report =
        Report { sequential: of(Pattern::Sequential), staggered: of(Pattern::Staggered), burst: of(Pattern::Burst) };
    output.result(&report, || {
        let mut text = String::new();
        if bench.each {
            measured.iter().for_each(|series| text.push_str(&format!("{}\n", figures::each(series))));
        }
        text + &figures::table(&figures)
    })?;
    // Last: what was measured is not lost to a full disk.
    match svg {
        Some(target) => Ok(target.write(&plot::draw(measured, &title(bench))?)?),
        None => Ok(()),
    }
}

fn title(bench: &PoolArgs) -> String {
    let backend = match bench.backend {
        Backend::Qemu => "QEMU",
        Backend::Sim => "simulated hardware",
    };
    let (size, staging, requests) = (bench.size, bench.staging, bench.requests);
    let prespawned = if bench.prespawn { ", prespawned" } else { "" };
    format!("Pool of {size} {staging} machines on {backend}{prespawned}, {requests} requests each")
}

fn seconds(time: Duration) -> String {
    format!("{:.1} s", time.as_secs_f64())
}
