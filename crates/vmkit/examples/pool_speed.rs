//! How fast a pool hands over, on simulated machines: what vmkit itself costs.
//!
//! `cargo run --release -p vmkit --all-features --example pool_speed`
//!
//! First one caller after the other, acquire and release of a machine that is ready, at several sizes; each machine's agent is
//! asked before it is handed over, as by default. Then many callers at once over a pool of 10,000, until all are handed over, and
//! without end, with every machine deleted and replaced meanwhile, on the same processors.

use std::time::{Duration, Instant};

use vmkit::pool::Pool;
use vmkit::sim::{SimProvider, World};
use vmkit::{Host, Source, Spec};

async fn pool(size: usize) -> Pool {
    let world = World::new();
    world.log_calls(false);
    let host = Host::new(SimProvider::new(world));
    let spec = Spec::new(Source::Alias("base".into()));
    let pool =
        Pool::builder(host, spec).name("speed").size(size).create_concurrency(64).health_interval(Duration::ZERO);
    let pool = pool.build().expect("a valid configuration");
    pool.start().await.expect("it starts");
    full(&pool, size).await;
    pool
}

async fn full(pool: &Pool, size: usize) {
    // Polled rarely: a status of 100,000 machines is not free.
    while pool.status().await.counts.ready.running < size {
        tokio::time::sleep(Duration::from_millis(if size > 1000 { 100 } else { 2 })).await;
    }
}

/// One after the other. Deleting and replacing, which a release has others do, is over before the next are acquired.
async fn latency(size: usize, rounds: usize) {
    let pool = pool(size).await;
    let mut took = Vec::with_capacity(rounds);
    while took.len() < rounds {
        let (mut held, first) = (Vec::new(), took.len());
        for _ in 0..(size / 2).min(500) {
            let began = Instant::now();
            held.push(pool.acquire().await.expect("a machine is ready"));
            took.push(began.elapsed());
        }
        for (lease, took) in held.into_iter().zip(&mut took[first..]) {
            let began = Instant::now();
            drop(lease);
            *took += began.elapsed();
        }
        full(&pool, size).await;
    }
    took.sort_unstable();
    let us = |part: usize| took[took.len() * part / 100].as_secs_f64() * 1e6;
    println!("{size:>7}  {:>8.1} us  {:>8.1} us", us(50), us(99));
    assert!(pool.close(Duration::from_secs(600)).await.is_clean());
}

/// As many callers as there are machines, all at once.
async fn burst(size: usize, callers: usize) -> f64 {
    let pool = pool(size).await;
    let began = Instant::now();
    let tasks: Vec<_> = (0..callers)
        .map(|_| {
            let pool = pool.clone();
            tokio::spawn(async move {
                let mut leases = Vec::with_capacity(size / callers);
                for _ in 0..size / callers {
                    leases.push(pool.acquire().await.expect("a machine is ready"));
                }
                leases
            })
        })
        .collect();
    let mut leases = Vec::with_capacity(size);
    for task in tasks {
        leases.extend(task.await.expect("no panic"));
    }
    let rate = leases.len() as f64 / began.elapsed().as_secs_f64();
    drop(leases);
    assert!(pool.close(Duration::from_secs(600)).await.is_clean());
    rate
}

/// Acquire and release without end: every machine is deleted and made again, on the same processors.
async fn churn(size: usize, callers: usize, time: Duration) -> f64 {
    let pool = pool(size).await;
    let began = Instant::now();
    let tasks: Vec<_> = (0..callers)
        .map(|_| {
            let pool = pool.clone();
            tokio::spawn(async move {
                let mut count = 0_u64;
                while began.elapsed() < time {
                    drop(pool.acquire().await.expect("a machine is ready"));
                    count += 1;
                }
                count
            })
        })
        .collect();
    let mut count = 0;
    for task in tasks {
        count += task.await.expect("no panic");
    }
    let rate = count as f64 / began.elapsed().as_secs_f64();
    assert!(pool.close(Duration::from_secs(600)).await.is_clean());
    rate
}

fn main() {
    println!("acquire + release of a ready machine, one thread\n   size       median          p99");
    for size in [10, 1_000, 100_000] {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        runtime.block_on(latency(size, 2_000));
    }
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("a runtime");
    runtime.block_on(async {
        println!("\nthe same, two threads");
        for size in [10, 1_000, 100_000] {
            tokio::spawn(latency(size, 2_000)).await.expect("no panic");
        }
        println!("\nacquires per second over 10,000 machines, two threads");
        println!("{:>10.0}  all of them, 8 callers", tokio::spawn(burst(10_000, 8)).await.expect("no panic"));
        let churn = tokio::spawn(churn(10_000, 8, Duration::from_secs(5))).await.expect("no panic");
        println!("{churn:>10.0}  without end, each machine deleted and made again");
    });
}
