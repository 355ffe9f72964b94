//! A pool's life: start, acquire, release, tiers, health, limits, close.
#![cfg(all(feature = "sim", feature = "conformance"))]

mod common;

use std::time::Duration;

use common::pool::{LONG, close, drain, full, ids, kinds, pool, pool_over, secs, until};
use common::{id, spec};
use vmkit::pool::{EventKind, KeepFailed, OnFailure, Pool, PoolPhase, Staging, Tier, Tiers, VmPhase};
use vmkit::sim::{Fault, SimProvider, Verb};
use vmkit::{ErrorKind, Host, State};

#[tokio::test(start_paused = true)]
async fn start_returns_when_one_is_ready_and_the_rest_follows() {
    let (world, builder) = pool();
    let pool = builder.size(3).create_concurrency(1).build().unwrap();
    assert_eq!(pool.status().await.phase, PoolPhase::New);
    pool.start().await.unwrap();
    let status = pool.status().await;
    assert_eq!((status.counts.ready.running, status.counts.creating.running), (1, 1));
    full(&pool, 3).await;
    close(&pool, &world).await;
    assert_eq!(pool.status().await.phase, PoolPhase::Closed);
}

#[tokio::test(start_paused = true)]
async fn start_is_once_only() {
    let (world, builder) = pool();
    let pool = builder.build().unwrap();
    let (first, second) = tokio::join!(pool.start(), pool.start());
    first.unwrap();
    let second = second.unwrap_err();
    assert_eq!(second.kind(), ErrorKind::IllegalRequest);
    assert!(second.next_step().is_some(), "{second:?}");
    assert_eq!(pool.start().await.unwrap_err().kind(), ErrorKind::IllegalRequest);
    close(&pool, &world).await;
    assert_eq!(pool.start().await.unwrap_err().kind(), ErrorKind::Closed);
    let never = pool_over(&world).build().unwrap();
    assert_eq!(never.acquire().await.unwrap_err().kind(), ErrorKind::IllegalRequest);
    assert!(never.close(secs(1)).await.is_clean());
    assert_eq!(never.start().await.unwrap_err().kind(), ErrorKind::Closed);
}

#[tokio::test(start_paused = true)]
async fn a_used_machine_is_deleted_and_replaced() {
    let (world, builder) = pool();
    let pool = builder.size(2).build().unwrap();
    pool.start().await.unwrap();
    full(&pool, 2).await;
    let lease = pool.acquire().holder("test").await.unwrap();
    let used = lease.id().clone();
    assert_eq!(lease.command("echo").arg("hi").output().await.unwrap().stdout, b"hi\n");
    assert_eq!(ids(&*pool.status().await, VmPhase::Held), std::slice::from_ref(&used));
    lease.delete().await.unwrap();
    assert_eq!(lease.state(), State::Deleted);
    assert!(!world.has_disk(&used));
    drop(lease);
    let status = full(&pool, 2).await;
    assert!(status.vms.iter().all(|vm| vm.id != used));
    assert_eq!((status.totals.released, status.totals.replacements, status.totals.deleted), (1, 1, 1));
    // Dropped without a word: the same.
    drop(pool.acquire().await.unwrap());
    let status = full(&pool, 2).await;
    assert_eq!((status.totals.released, status.totals.replacements, status.totals.deleted), (2, 2, 2));
    close(&pool, &world).await;
}

#[tokio::test(start_paused = true)]
async fn a_stopped_lease_is_replaced_at_once_while_its_disk_is_read() {
    let (world, builder) = pool();
    let pool = builder.size(1).build().unwrap();
    pool.start().await.unwrap();
    let lease = pool.acquire().await.unwrap();
    let report = lease.stop_and_release(secs(10)).await;
    assert!(report.stop.is_ok() && report.run.is_ok());
    let status = until(&pool, "replaced", |status| status.counts.ready.running == 1).await;
    assert_eq!(ids(&status, VmPhase::Stopped), [lease.id().clone()]);
    assert_eq!(lease.state(), State::Stopped);
    // A second one requests no second replacement.
    let _ = lease.stop_and_release(secs(10)).await;
    let pool_size = pool.status().await.counts.counted();
    assert_eq!(pool_size, 1);
    assert!(lease.release().await.unwrap().stop.is_ok());
    let status = full(&pool, 1).await;
    assert_eq!((status.totals.released, status.totals.replacements), (1, 1));
    close(&pool, &world).await;
}

/// A machine that stopped well and had crashed before is given back all the same.
#[tokio::test(start_paused = true)]
async fn a_run_error_is_no_reason_to_keep_a_machine() {
    let (world, builder) = pool();
    let pool = builder.size(1).build().unwrap();
    pool.start().await.unwrap();
    let lease = pool.acquire().await.unwrap();
    world.crash(lease.id(), 3);
    tokio::time::sleep(secs(1)).await;
    let report = lease.stop_and_release(secs(1)).await;
    assert_eq!(report.run.unwrap_err().kind(), ErrorKind::Exited);
    assert!(report.stop.is_ok());
    lease.delete().await.unwrap();
    full(&pool, 1).await;
    close(&pool, &world).await;
}

#[tokio::test(start_paused = true)]
async fn each_staging_prepares_as_it_says() {
    for (staging, suspendable, tier) in [
        (Staging::Running, true, Tier::Running),
        (Staging::Suspended, true, Tier::Suspended),
        (Staging::Suspended, false, Tier::Stopped),
        (Staging::Stopped, true, Tier::Stopped),
    ] {
        let world = vmkit::sim::World::new();
        world.latency(common::latency());
        let host = Host::new(SimProvider::new(world.clone()).suspendable(suspendable));
        let pool = Pool::builder(host, spec()).size(2).staging(staging).build().unwrap();
        pool.start().await.unwrap();
        let status = full(&pool, 2).await;
        assert_eq!(status.counts.ready, Tiers::only(tier, 2), "{staging}, suspendable: {suspendable}");
        let lease = pool.acquire().await.unwrap();
        assert_eq!(lease.state(), State::Running);
        lease.delete().await.unwrap();
        let status = full(&pool, 2).await;
        assert_eq!(status.counts.ready, Tiers::only(tier, 2));
        close(&pool, &world).await;
    }
}

/// Nobody holds anything while a machine starts.
#[tokio::test(start_paused = true)]
async fn many_starts_take_the_time_of_one() {
    let (world, builder) = pool();
    let pool = builder.size(20).staging(Staging::Stopped).create_concurrency(20).build().unwrap();
    pool.start().await.unwrap();
    full(&pool, 20).await;
    let began = tokio::time::Instant::now();
    let leases = futures::future::join_all((0..20).map(|_| async { pool.acquire().await.unwrap() })).await;
    assert!(began.elapsed() < 2 * common::latency().boot, "{:?}", began.elapsed());
    drop(leases);
    close(&pool, &world).await;
}

#[tokio::test(start_paused = true)]
async fn mixed_tiers_serve_the_hottest_and_promote_behind() {
    let (world, builder) = pool();
    let tiers = Tiers { running: 2, suspended: 6, stopped: 0 };
    let pool = builder.tiers(tiers).build().unwrap();
    pool.start().await.unwrap();
    assert_eq!(full(&pool, 8).await.counts.ready, tiers);
    let began = tokio::time::Instant::now();
    let one = pool.acquire().await.unwrap();
    assert!(began.elapsed() < Duration::from_millis(10), "a running one was there");
    let status = until(&pool, "promoted", |status| status.counts.ready.running == 2).await;
    assert_eq!(status.counts.ready.suspended, 5);
    drop(one);
    assert_eq!(full(&pool, 8).await.counts.ready, tiers);
    // More than are running: the others are resumed for those who wait.
    let began = tokio::time::Instant::now();
    let leases = futures::future::join_all((0..8).map(|_| async { pool.acquire().await.unwrap() })).await;
    assert!(began.elapsed() < 2 * common::latency().boot);
    drop(leases);
    assert_eq!(full(&pool, 8).await.counts.ready, tiers);
    // Those who wait go away: what was resumed for them is cooled down again.
    let waiting: Vec<_> = (0..8).map(|_| pool.acquire().queue()).collect();
    tokio::time::sleep(secs(1)).await;
    drop(waiting);
    assert_eq!(full(&pool, 8).await.counts.ready, tiers);
    assert_eq!(pool.status().await.totals.acquired, 9);
    close(&pool, &world).await;
}

#[tokio::test(start_paused = true)]
async fn a_dead_machine_is_never_handed_out() {
    let (world, builder) = pool();
    let pool = builder.size(2).build().unwrap();
    pool.start().await.unwrap();
    let status = full(&pool, 2).await;
    // Its agent is dead, and nothing else tells; it is the one whose turn it is.
    let dead = status.vms[1].id.clone();
    world.fault(Some(&dead), Verb::Ping, Fault::Hang);
    let lease = pool.acquire().await.unwrap();
    assert_ne!(*lease.id(), dead);
    let status = until(&pool, "replaced", |status| status.counts.ready.running == 1 && status.counts.all() == 2).await;
    assert_eq!(status.totals.unfit, 1);
    drop(lease);
    full(&pool, 2).await;
    // One that exits while it idles is replaced before anybody asks.
    let first = pool.status().await.vms[0].id.clone();
    world.crash(&first, 1);
    tokio::time::sleep(Duration::from_millis(10)).await;
    assert!(ids(&*pool.status().await, VmPhase::Ready(Tier::Running)).iter().all(|id| *id != first));
    full(&pool, 2).await;
    // One that is silent while it idles is found by its regular check.
    let silent = pool.status().await.vms[0].id.clone();
    world.fault(Some(&silent), Verb::Ping, Fault::Err);
    tokio::time::sleep(secs(31)).await;
    assert!(full(&pool, 2).await.vms.iter().all(|vm| vm.id != silent));
    close(&pool, &world).await;
}

#[tokio::test(start_paused = true)]
async fn the_newest_is_handed_over_and_the_oldest_goes() {
    let (world, builder) = pool();
    let pool = builder.size(4).create_concurrency(1).build().unwrap();
    pool.start().await.unwrap();
    let mut by_age = full(&pool, 4).await.vms.clone();
    by_age.sort_by_key(|vm| std::cmp::Reverse(vm.age));
    let id = |at: usize| by_age[at].id.clone();
    // What somebody holds counts, and the rest is too much.
    let lease = pool.acquire().await.unwrap();
    assert_eq!(*lease.id(), id(3));
    pool.resize(3).await.unwrap();
    let status = until(&pool, "shrunk", |status| status.counts.all() == 3).await;
    assert_eq!(ids(&status, VmPhase::Ready(Tier::Running)), [id(1), id(2)]);
    assert_eq!(*pool.acquire().await.unwrap().id(), id(2));
    drop(lease);
    close(&pool, &world).await;
}

#[tokio::test(start_paused = true)]
async fn resize_while_it_runs() {
    let (world, builder) = pool();
    let pool = builder.tiers(Tiers { running: 1, suspended: 2, stopped: 0 }).build().unwrap();
    pool.start().await.unwrap();
    full(&pool, 3).await;
    pool.resize(6).await.unwrap();
    assert_eq!(full(&pool, 6).await.counts.ready, Tiers { running: 1, suspended: 5, stopped: 0 });
    let lease = pool.acquire().await.unwrap();
    pool.resize(1).await.unwrap();
    let status = until(&pool, "shrunk", |status| status.counts.all() == 1).await;
    assert_eq!(status.counts.unreleased, 1);
    drop(lease);
    assert_eq!(full(&pool, 1).await.counts.ready, Tiers { running: 1, suspended: 0, stopped: 0 });
    pool.resize(0).await.unwrap();
    full(&pool, 0).await;
    pool.resize(3).await.unwrap();
    assert_eq!(full(&pool, 3).await.counts.ready, Tiers { running: 1, suspended: 2, stopped: 0 });
    close(&pool, &world).await;
}

#[tokio::test(start_paused = true)]
async fn no_size_is_beyond_the_maximum_or_any_host() {
    let (world, builder) = pool();
    let pool = builder.size(2).build().unwrap();
    pool.start().await.unwrap();
    for size in [1_000_001, usize::MAX] {
        let refused = pool.resize(size).await.unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::InvalidArgument, "{refused:?}");
        assert!(refused.next_step().is_some(), "{refused:?}");
    }
    full(&pool, 2).await;
    // Without a maximum, the size that was built is none.
    pool.resize(4).await.unwrap();
    full(&pool, 4).await;
    close(&pool, &world).await;
}

/// As many as there may ever be: what is reckoned with them does not overflow.
#[tokio::test(start_paused = true)]
async fn numbers_that_only_limit_may_be_endless() {
    for many in [1 << 32, usize::MAX] {
        let (world, builder) = pool();
        let keep = KeepFailed { quota: many, period: secs(60) };
        let builder = builder.size(2).allowance(many).create_concurrency(many).max_waiting(many).keep_failed(keep);
        let pool = builder.create_backoff_cap(Duration::MAX).build().unwrap();
        pool.start().await.unwrap();
        full(&pool, 2).await;
        let mut leases = Vec::new();
        for _ in 0..2 {
            leases.push(pool.acquire().await.unwrap());
        }
        let waiter = pool.acquire().queue();
        assert!(waiter.place().await.unwrap().estimate.is_some());
        drop(waiter);
        drop(leases);
        close(&pool, &world).await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_minimum_is_kept_ready_up_to_a_maximum() {
    let (world, builder) = pool();
    let pool = builder.size(2).min_ready(2).max(5).build().unwrap();
    pool.start().await.unwrap();
    full(&pool, 2).await;
    let mut leases = Vec::new();
    for held in 1..=5_usize {
        leases.push(pool.acquire().await.unwrap());
        let all = (held + 2).min(5);
        until(&pool, "grown", |status| status.counts.ready.sum() == all - held && status.counts.all() == all).await;
    }
    assert_eq!(pool.resize(6).await.unwrap_err().kind(), ErrorKind::InvalidArgument);
    let late = pool.acquire().timeout(secs(60)).await.unwrap_err();
    assert_eq!(late.kind(), ErrorKind::TimedOut);
    leases.clear();
    full(&pool, 2).await;
    close(&pool, &world).await;
}

#[tokio::test(start_paused = true)]
async fn old_machines_are_exchanged_one_at_a_time() {
    let (world, builder) = pool();
    let pool = builder.size(4).max_age(secs(3600)).build().unwrap();
    pool.start().await.unwrap();
    let first: Vec<_> = full(&pool, 4).await.vms.iter().map(|vm| vm.id.clone()).collect();
    let mut least = usize::MAX;
    let mut most = 0;
    for _ in 0..5000 {
        tokio::time::sleep(secs(1)).await;
        let counts = pool.status().await.counts;
        least = least.min(counts.ready.sum());
        most = most.max(counts.counted());
    }
    assert_eq!((least, most), (4, 5), "never fewer ready, never more than one beyond the size");
    let status = pool.status().await;
    assert!(status.vms.iter().all(|vm| !first.contains(&vm.id) && vm.age < secs(3700)), "{status:#?}");
    assert_eq!(status.totals.recycled, 4);
    close(&pool, &world).await;
}

#[tokio::test(start_paused = true)]
async fn idle_machines_are_exchanged() {
    let (world, builder) = pool();
    let pool = builder.size(2).staging(Staging::Suspended).max_idle(secs(600)).build().unwrap();
    pool.start().await.unwrap();
    full(&pool, 2).await;
    tokio::time::sleep(secs(700)).await;
    let status = full(&pool, 2).await;
    assert_eq!((status.totals.recycled, status.counts.ready), (2, Tiers::only(Tier::Suspended, 2)));
    close(&pool, &world).await;
}

#[tokio::test(start_paused = true)]
async fn failed_leases_are_kept_under_a_quota_and_a_period() {
    let (world, builder) = pool();
    let pool = builder.size(3).keep_failed(KeepFailed { quota: 1, period: secs(600) }).build().unwrap();
    pool.start().await.unwrap();
    full(&pool, 3).await;
    let lease = pool.acquire().await.unwrap();
    let (kept, other) = (lease.id().clone(), pool.acquire().await.unwrap());
    lease.command("remember").args(["clue", "here"]).status().await.unwrap();
    assert!(!lease.is_failed());
    assert_eq!(lease.command("false").status().await.unwrap().code(), Some(1));
    assert!(lease.is_failed());
    drop(lease);
    // One that succeeded, or was beyond the quota, goes as ever.
    let status = until(&pool, "kept", |status| !ids(status, VmPhase::Kept).is_empty()).await;
    assert_eq!(ids(&status, VmPhase::Kept), std::slice::from_ref(&kept));
    other.mark_failed();
    drop(other);
    let status = until(&pool, "replaced", |status| status.counts.ready.sum() == 3 && status.counts.all() == 4).await;
    assert_eq!(ids(&status, VmPhase::Kept), std::slice::from_ref(&kept));
    // It is there again, with what was in its memory.
    let capsule = pool.take_kept(&kept).await.unwrap();
    assert_eq!(pool.take_kept(&kept).await.unwrap_err().kind(), ErrorKind::NotFound);
    capsule.start(vmkit::ConsoleSinks::discard()).await.unwrap();
    assert_eq!(capsule.command("recall").arg("clue").output().await.unwrap().stdout, b"here\n");
    drop(capsule);
    let status = until(&pool, "kept again", |status| !ids(status, VmPhase::Kept).is_empty()).await;
    assert_eq!(status.totals.replacements, 2, "it is not replaced twice");
    tokio::time::sleep(secs(600)).await;
    let status = full(&pool, 3).await;
    assert_eq!(status.totals.deleted, 2);
    // And by hand.
    let lease = pool.acquire().await.unwrap();
    lease.mark_failed();
    let id = lease.id().clone();
    drop(lease);
    until(&pool, "kept", |status| !ids(status, VmPhase::Kept).is_empty()).await;
    assert_eq!(pool.discard_kept(&common::id("other")).await.unwrap_err().kind(), ErrorKind::NotFound);
    pool.discard_kept(&id).await.unwrap();
    full(&pool, 3).await;
    close(&pool, &world).await;
}

#[tokio::test(start_paused = true)]
async fn closing_leaves_what_it_is_to_leave() {
    let (world, builder) = pool();
    let pool = builder.size(3).delete_acquired_on_close(false).build().unwrap();
    pool.start().await.unwrap();
    full(&pool, 3).await;
    let (mut events, lease) = (pool.subscribe().await, pool.acquire().await.unwrap());
    let report = pool.close(secs(60)).await;
    assert_eq!((report.retained.clone(), report.is_clean()), (vec![lease.id().clone()], true));
    assert!(lease.is_retained());
    assert_eq!(lease.command("echo").arg("alive").output().await.unwrap().stdout, b"alive\n");
    let told = drain(&mut events);
    assert!(kinds(&told, lease.id()).contains(&EventKind::AcquiredVmRetained));
    assert!(events.next().await.is_none(), "the stream ends");
    // Another pool of that name would delete it: it has to wait for its holder.
    let again = pool_over(&world).size(1).build().unwrap();
    assert_eq!(again.start().await.unwrap_err().kind(), ErrorKind::Busy);
    assert_eq!(lease.command("echo").arg("alive").output().await.unwrap().stdout, b"alive\n");
    lease.delete().await.unwrap();
    drop(lease);
    again.start().await.unwrap();
    close(&again, &world).await;
    assert_eq!(world.residue(), Vec::<String>::new());
}

#[tokio::test(start_paused = true)]
async fn closing_deletes_held_machines_by_default() {
    let (world, builder) = pool();
    let pool = builder.size(2).build().unwrap();
    pool.start().await.unwrap();
    let lease = pool.acquire().await.unwrap();
    close(&pool, &world).await;
    assert!(lease.is_ended());
    assert_eq!(lease.state(), State::Deleted);
    lease.delete().await.unwrap();
    assert_eq!(pool.acquire().await.unwrap_err().kind(), ErrorKind::Closed);
    assert!(pool.close(secs(1)).await.is_clean());
}

#[tokio::test(start_paused = true)]
async fn a_forgotten_pool_clears_up_when_its_leases_are_given_back() {
    let (world, builder) = pool();
    let pool = builder.size(3).build().unwrap();
    pool.start().await.unwrap();
    full(&pool, 3).await;
    let lease = pool.acquire().await.unwrap();
    drop(pool);
    tokio::time::sleep(secs(60)).await;
    assert_eq!(world.residue().len(), 2, "the held one's disk and process: {:?}", world.residue());
    assert_eq!(lease.command("true").status().await.unwrap().code(), Some(0));
    drop(lease);
    tokio::time::sleep(secs(60)).await;
    assert_eq!(world.residue(), Vec::<String>::new());
    // Its name is free again.
    let pool = pool_over(&world).build().unwrap();
    pool.start().await.unwrap();
    close(&pool, &world).await;
}

#[tokio::test(start_paused = true)]
async fn fail_fast_says_why_at_once() {
    let (world, builder) = pool();
    let pool = builder.size(1).on_failure(OnFailure::FailFast).build().unwrap();
    world.fault(None, Verb::Boot, Fault::Err);
    assert_eq!(pool.start().await.unwrap_err().kind(), ErrorKind::Backend);
    full(&pool, 1).await;
    let lease = pool.acquire().await.unwrap();
    for _ in 0..100 {
        world.fault(None, Verb::Clone, Fault::Err);
    }
    drop(lease);
    let error = pool.acquire().await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Backend, "{error:?}");
    let error = pool.acquire().await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Backend, "{error:?}");
    world.heal();
    full(&pool, 1).await;
    drop(pool.acquire().await.unwrap());
    close(&pool, &world).await;
}

#[tokio::test(start_paused = true)]
async fn a_late_acquire_says_why_and_when_it_is_tried_next() {
    let (world, builder) = pool();
    let pool = builder.size(1).build().unwrap();
    pool.start().await.unwrap();
    let lease = pool.acquire().await.unwrap();
    let error = pool.acquire().timeout(secs(10)).await.unwrap_err();
    assert_eq!((error.kind(), error.next_step()), (ErrorKind::TimedOut, Some("wait longer, or make the pool larger")));
    for _ in 0..1000 {
        world.fault(None, Verb::Clone, Fault::Err);
    }
    drop(lease);
    let error = pool.acquire().timeout(secs(60)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::TimedOut);
    assert!(format!("{error:?}").contains("Clone was to fail"), "{error:?}");
    assert!(error.next_step().unwrap().contains("next attempt"), "{error:?}");
    let trouble = pool.status().await.trouble.clone().unwrap();
    assert!(trouble.failures > 3 && trouble.error.contains("Clone was to fail"));
    world.heal();
    full(&pool, 1).await;
    assert!(pool.status().await.trouble.is_none());
    close(&pool, &world).await;
}

#[tokio::test(start_paused = true)]
async fn the_console_goes_where_it_is_to_go() {
    let (world, builder) = pool();
    let (write, mut read) = tokio::io::duplex(4096);
    let sink = vmkit::Sink::new(write);
    let sinks = vmkit::ConsoleSinks { stdout: sink.clone(), stderr: vmkit::Sink::default() };
    let pool = builder.size(1).console(move |_| sinks.clone()).build().unwrap();
    pool.start().await.unwrap();
    let mut text = [0; 256];
    let length = tokio::io::AsyncReadExt::read(&mut read, &mut text).await.unwrap();
    assert!(String::from_utf8_lossy(&text[..length]).contains("sim: Boot"));
    close(&pool, &world).await;
}

#[tokio::test(start_paused = true)]
async fn a_pool_may_not_be_named_as_it_likes() {
    let (_, builder) = pool();
    assert_eq!(builder.name("../x").build().unwrap_err().kind(), ErrorKind::InvalidArgument);
    let (_, builder) = pool();
    assert_eq!(builder.name(&"x".repeat(41)).build().unwrap_err().kind(), ErrorKind::InvalidArgument);
    let (world, builder) = pool();
    let longest = builder.name(&"x".repeat(40)).size(1).build().unwrap();
    longest.start().await.unwrap();
    let status = full(&longest, 1).await;
    assert!(status.vms[0].id.as_str().starts_with(&"x".repeat(40)));
    assert!(longest.close(LONG).await.is_clean());
    assert_eq!(world.residue(), Vec::<String>::new());
    let _ = id("x");
}

/// A policy of somebody else's, one that sometimes panics.
#[tokio::test(start_paused = true)]
async fn another_sizing_may_decide() {
    struct Odd;
    impl vmkit::pool::Sizing for Odd {
        fn total(&self, counts: &vmkit::pool::Counts, limits: &vmkit::pool::Limits) -> usize {
            assert!(counts.unreleased < 2, "it was to panic");
            limits.tiers.sum() + 1
        }
    }
    common::pool::quiet();
    let (world, builder) = pool();
    let pool = builder.size(2).max(10).sizing(Odd).console(|_| panic!("it was to panic")).build().unwrap();
    pool.start().await.unwrap();
    full(&pool, 3).await;
    let leases = (pool.acquire().await.unwrap(), pool.acquire().await.unwrap());
    until(&pool, "of its size", |status| status.counts.all() == 2).await;
    drop(leases);
    full(&pool, 3).await;
    close(&pool, &world).await;
}

/// A limit beyond what a clock can say is none.
#[tokio::test(start_paused = true)]
async fn limits_may_be_endless() {
    let (world, builder) = pool();
    let ever = Duration::MAX;
    let builder = builder.acquire_timeout(ever).cleanup_timeout(ever).stop_timeout(ever).create_timeout(ever);
    let builder = builder.health_interval(ever).health_timeout(ever).max_age(ever).max_idle(ever);
    let keep = KeepFailed { quota: 1, period: ever };
    let pool = builder.size(2).keep_failed(keep).build().unwrap();
    pool.start().await.unwrap();
    full(&pool, 2).await;
    let lease = pool.acquire().timeout(ever).time_limit(ever).await.unwrap();
    lease.mark_failed();
    drop(lease);
    until(&pool, "kept", |status| !ids(status, VmPhase::Kept).is_empty()).await;
    assert!(pool.close(ever).await.is_clean());
    assert_eq!(world.residue(), Vec::<String>::new());
}

#[tokio::test(start_paused = true)]
async fn the_ready_command_is_executed_after_each_boot_as_often_as_is_said() {
    for (staging, runs) in [Staging::Running, Staging::Suspended, Staging::Stopped].map(|s| [(s, 1), (s, 3)]).concat() {
        let (world, builder) = pool();
        let builder = if runs == 1 { builder } else { builder.ready_runs(runs) };
        let pool = builder.size(1).staging(staging).ready_command(["counter"]).build().unwrap();
        pool.start().await.unwrap();
        let lease = pool.acquire().timeout(LONG).await.unwrap();
        // It counts in the guest's memory: that often before this.
        let said = String::from_utf8(lease.command("counter").output().await.unwrap().stdout).unwrap();
        assert_eq!(said, format!("{}\n", runs + 1), "{staging:?}");
        lease.delete().await.unwrap();
        drop(lease);
        close(&pool, &world).await;
    }
    assert_eq!(pool().1.ready_runs(0).build().unwrap_err().kind(), ErrorKind::InvalidArgument);
}

#[tokio::test(start_paused = true)]
async fn a_machine_whose_ready_command_fails_is_never_handed_out() {
    let (world, builder) = pool();
    let words = ["sh", "-c", "warn secret; exit 3"];
    let pool = builder.size(1).ready_command(words).on_failure(OnFailure::FailFast).build().unwrap();
    let error = pool.start().await.unwrap_err();
    assert!(error.to_string().contains("ready command \"sh\" ended with exit code 3"), "{error:?}");
    assert!(!format!("{error:?}").contains("secret"), "{error:?}");
    assert_eq!(pool.acquire().timeout(secs(60)).await.unwrap_err().kind(), ErrorKind::Backend);
    close(&pool, &world).await;
}

/// A process waits for each machine that is off, once. Without one a machine is as good.
#[tokio::test(start_paused = true)]
async fn processes_wait_for_machines_that_are_off() {
    for staging in [Staging::Suspended, Staging::Stopped] {
        for fault in [Fault::Ok, Fault::Err] {
            let (world, builder) = pool();
            world.fault(None, Verb::Prespawn, fault);
            let pool = builder.size(1).staging(staging).prespawn(true).build().unwrap();
            pool.start().await.unwrap();
            let waits = full(&pool, 1).await.vms[0].id.clone();
            assert_eq!(world.count(&waits, Verb::Prespawn), 1);
            assert_eq!(world.processes(&waits), usize::from(fault == Fault::Ok), "{staging}, {fault:?}");
            assert!(!world.executes(&waits));
            let lease = pool.acquire().await.unwrap();
            assert_eq!((lease.id(), lease.state(), world.processes(&waits)), (&waits, State::Running, 1));
            drop(lease);
            close(&pool, &world).await;
        }
    }
    let error = pool().1.size(1).prespawn(true).build().unwrap_err();
    assert!(error.kind() == ErrorKind::InvalidArgument && error.to_string().contains("prespawn"), "{error:?}");
}
