//! Every await point of what a pool does, with a caller that goes away there, or a pool that closes there.
//!
//! Enumerated by the simulator's gates: an operation is stopped at its first, second, third … call of a kind, until it makes no
//! further one. Then the gates open, and the pool must come back to full size and close with nothing left.
#![cfg(all(feature = "sim", feature = "conformance"))]

mod common;

use std::time::Duration;

use common::pool::{LONG, close, pool, quiet, secs, until};
use vmkit::pool::{KeepFailed, Pool, PoolBuilder, Staging};
use vmkit::sim::{Fault, Verb, World};

#[derive(Clone, Copy, Debug, PartialEq)]
enum Operation {
    Start,
    Acquire,
    AcquireBound,
    AcquireStopped,
    AcquireSuspended,
    StopAndRelease,
    Delete,
    Drop,
    Keep,
    TakeKept,
    Replenish,
    Close,
}

const OPERATIONS: [Operation; 12] = [
    Operation::Start,
    Operation::Acquire,
    Operation::AcquireBound,
    Operation::AcquireStopped,
    Operation::AcquireSuspended,
    Operation::StopAndRelease,
    Operation::Delete,
    Operation::Drop,
    Operation::Keep,
    Operation::TakeKept,
    Operation::Replenish,
    Operation::Close,
];

const VERBS: [Verb; 14] = [
    Verb::Claim,
    Verb::Open,
    Verb::Begin,
    Verb::Clone,
    Verb::Boot,
    Verb::Resume,
    Verb::Suspend,
    Verb::Shutdown,
    Verb::Kill,
    Verb::Destroy,
    Verb::Inspect,
    Verb::Ping,
    Verb::Bind,
    Verb::Spawn,
];

#[derive(Clone, Copy, Debug, PartialEq)]
enum Then {
    Stays,
    CallerGoes,
    PoolCloses,
    CallFails,
}

impl Operation {
    fn configure(self, builder: PoolBuilder) -> PoolBuilder {
        let builder =
            builder.size(2).health_interval(Duration::ZERO).create_timeout(secs(100)).acquire_timeout(secs(1000));
        match self {
            Operation::AcquireStopped => builder.staging(Staging::Stopped),
            Operation::AcquireSuspended => builder.staging(Staging::Suspended),
            Operation::Keep | Operation::TakeKept => builder.keep_failed(KeepFailed { quota: 1, period: secs(5000) }),
            _ => builder,
        }
    }

    /// What it does; the machine it is done to was acquired before.
    async fn run(self, pool: Pool, lease: Option<vmkit::pool::Lease>) {
        match (self, lease) {
            (Operation::Start, _) => drop(pool.start().await),
            (Operation::Acquire | Operation::AcquireStopped | Operation::AcquireSuspended, _) => {
                drop(pool.acquire().await)
            }
            (Operation::AcquireBound, _) => drop(pool.acquire().env("A", "b").await),
            (Operation::StopAndRelease, Some(lease)) => drop(lease.stop_and_release(secs(5)).await),
            (Operation::Delete, Some(lease)) => drop(lease.delete().await),
            (Operation::Drop | Operation::Replenish, Some(lease)) => drop(lease),
            (Operation::Keep, Some(lease)) => lease.mark_failed(),
            (Operation::TakeKept, Some(lease)) => {
                lease.mark_failed();
                let id = lease.id().clone();
                drop(lease);
                until(&pool, "kept or gone", |status| {
                    status.vms.iter().all(|vm| vm.id != id || vm.phase == vmkit::pool::VmPhase::Kept)
                })
                .await;
                if let Ok(lease) = pool.take_kept(&id).await {
                    drop(lease.start(vmkit::ConsoleSinks::discard()).await);
                }
            }
            (Operation::Close, _) => drop(pool.close(LONG).await),
            (operation, None) => panic!("{operation:?} needs a lease"),
        }
    }

    fn needs_lease(self) -> bool {
        match self {
            Operation::Start
            | Operation::Acquire
            | Operation::AcquireBound
            | Operation::AcquireStopped
            | Operation::AcquireSuspended
            | Operation::Close => false,
            Operation::StopAndRelease
            | Operation::Delete
            | Operation::Drop
            | Operation::Keep
            | Operation::TakeKept
            | Operation::Replenish => true,
        }
    }
}

/// Stops at the nth call of a kind; whether there was one.
async fn cell(operation: Operation, verb: Verb, nth: usize, then: Then) -> bool {
    let (world, builder): (World, PoolBuilder) = pool();
    let pool = operation.configure(builder).build().unwrap();
    let mut lease = None;
    if operation != Operation::Start {
        pool.start().await.unwrap();
        until(&pool, "full", |status| status.counts.ready.sum() == 2).await;
    }
    if operation.needs_lease() {
        lease = Some(pool.acquire().await.unwrap());
    }
    world.step_at(&[verb]);
    let mut running = tokio::spawn(operation.run(pool.clone(), lease));
    let mut reached = false;
    for at in 0..=nth {
        // As long as the longest of what lies between two calls.
        tokio::time::sleep(secs(20)).await;
        let parked = world.parked();
        let Some(first) = parked.first() else { break };
        if at == nth {
            reached = true;
            break;
        }
        world.release(&first.id);
    }
    match then {
        Then::Stays => {}
        Then::CallerGoes => running.abort(),
        Then::PoolCloses => {
            let closing = tokio::spawn({
                let pool = pool.clone();
                async move { pool.close(LONG).await }
            });
            tokio::time::sleep(Duration::from_millis(1)).await;
            world.stepping(false);
            assert!(closing.await.unwrap().is_clean());
        }
        Then::CallFails => {
            // This call goes on; the next of its kind fails in the worst way.
            world.fault(None, verb, Fault::Panic);
        }
    }
    tokio::task::yield_now().await;
    world.stepping(false);
    let _ = (&mut running).await;
    let closed = then == Then::PoolCloses || operation == Operation::Close;
    if !closed {
        if operation == Operation::Start {
            // Whoever started it is gone; it started all the same, or the name was never taken.
            let _ = pool.start().await;
        }
        let status = until(&pool, "full again", |status| {
            status.counts.ready.sum() == 2 && status.counts.all() == 2 + status.counts.kept
        })
        .await;
        assert_eq!(status.totals.released, status.totals.replacements);
        assert_eq!(status.totals.acquired, status.totals.released);
    }
    close(&pool, &world).await;
    reached
}

fn matrix(operation: Operation) {
    quiet();
    let mut points = 0;
    for verb in VERBS {
        for then in [Then::Stays, Then::CallerGoes, Then::PoolCloses, Then::CallFails] {
            for nth in 0.. {
                let ran = std::panic::catch_unwind(|| common::paused().block_on(cell(operation, verb, nth, then)));
                let reached =
                    ran.unwrap_or_else(|_| panic!("in cell: {operation:?}, call {nth} of {verb:?}, {then:?}"));
                if !reached {
                    break;
                }
                points += 1;
                assert!(nth < 60, "{operation:?} never ends calling {verb:?}");
            }
        }
    }
    assert!(points >= 16, "{operation:?} has {points} points: nothing was stepped through");
}

macro_rules! matrices {
    ($($name:ident $operation:ident)+) => {
        $(#[test]
        fn $name() {
            matrix(Operation::$operation);
        })+

        #[test]
        fn every_operation_has_a_matrix() {
            assert_eq!([$(Operation::$operation),+], OPERATIONS);
        }
    };
}

matrices! {
    start Start
    acquire Acquire
    acquire_bound AcquireBound
    acquire_stopped AcquireStopped
    acquire_suspended AcquireSuspended
    stop_and_release StopAndRelease
    delete Delete
    dropping Drop
    keep Keep
    take_kept TakeKept
    replenish Replenish
    closing Close
}
