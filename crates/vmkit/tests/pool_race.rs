//! Callers of a pool that meet: order, fairness, hand-over, cancellation, release from all sides, closing.
#![cfg(all(feature = "sim", feature = "conformance"))]

mod common;

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use common::pool::{LONG, close, drain, full, pool, pool_over, secs, until};
use futures::FutureExt;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use vmkit::pool::{EventKind, Lease, Next, Pool, Staging};
use vmkit::sim::{Verb, World};
use vmkit::{ErrorKind, Id, State};

/// A pool on hardware that takes no time, that is full.
async fn quick(size: usize) -> (World, Pool) {
    let world = World::new();
    let pool = pool_over(&world).size(size).create_concurrency(16).health_interval(Duration::ZERO).build().unwrap();
    pool.start().await.unwrap();
    full(&pool, size).await;
    (world, pool)
}

#[tokio::test(start_paused = true)]
async fn a_hundred_waiters_are_served_in_order() {
    let (world, builder) = pool();
    let pool = builder.size(3).build().unwrap();
    pool.start().await.unwrap();
    full(&pool, 3).await;
    let mut events = pool.subscribe().await;
    let mut tasks = Vec::new();
    for number in 0..100 {
        let waiting = pool.acquire().holder(number.to_string()).timeout(LONG).queue();
        tasks.push(tokio::spawn(async move {
            let lease = waiting.await.unwrap();
            tokio::time::sleep(secs(1)).await;
            lease.delete().await.unwrap();
        }));
    }
    for task in tasks {
        task.await.unwrap();
    }
    let told = drain(&mut events);
    let served = told.iter().filter(|event| event.kind == EventKind::VmDequeued);
    let served: Vec<String> = served.map(|event| event.holder.as_deref().unwrap().to_owned()).collect();
    assert_eq!(served, (0..100).map(|number| number.to_string()).collect::<Vec<_>>());
    close(&pool, &world).await;
}

#[tokio::test(start_paused = true)]
async fn a_greedy_key_does_not_starve_another() {
    let (world, builder) = pool();
    let pool = builder.size(1).weight("heavy", 3).build().unwrap();
    pool.start().await.unwrap();
    let lease = pool.acquire().await.unwrap();
    let order = Arc::new(Mutex::new(Vec::new()));
    let mut tasks = Vec::new();
    for key in std::iter::repeat_n("heavy", 40).chain(std::iter::repeat_n("light", 5)) {
        let (waiting, order) = (pool.acquire().key(key).timeout(LONG).queue(), order.clone());
        tasks.push(tokio::spawn(async move {
            let lease = waiting.await.unwrap();
            order.lock().unwrap().push(key);
            lease.delete().await.unwrap();
        }));
    }
    drop(lease);
    for task in tasks {
        task.await.unwrap();
    }
    let order = order.lock().unwrap().clone();
    let light = order[..20].iter().filter(|key| **key == "light").count();
    assert_eq!(light, 5, "one of four, as the weights say: {order:?}");
    close(&pool, &world).await;
}

#[tokio::test(start_paused = true)]
async fn a_waiter_sees_its_place_and_a_full_queue_says_so() {
    let (world, builder) = pool();
    let pool = builder.size(1).max_waiting(3).build().unwrap();
    pool.start().await.unwrap();
    let mut held = pool.acquire().await.unwrap();
    let mut waiting: Vec<_> = (0..3).map(|_| pool.acquire().timeout(LONG).queue()).collect();
    for (ahead, waiter) in waiting.iter().enumerate() {
        let place = waiter.place().await.unwrap();
        assert_eq!(place.ahead, ahead);
        assert!(place.estimate.unwrap() >= common::latency().boot, "from how long it takes to make one");
    }
    assert_eq!(pool.acquire().await.unwrap_err().kind(), ErrorKind::Exhausted);
    assert_eq!(pool.status().await.counts.waiting, 3);
    // One that goes away makes room and lets the others move up.
    drop(waiting.remove(0));
    assert_eq!(waiting[0].place().await.unwrap().ahead, 0);
    waiting.push(pool.acquire().timeout(LONG).queue());
    for waiter in waiting {
        drop(held);
        held = waiter.await.unwrap();
    }
    drop(held);
    close(&pool, &world).await;
}

/// Polls a future so many times, with whatever else there is running in between, then drops it.
async fn poll_some<T>(future: impl Future<Output = T>, times: usize) -> Option<T> {
    let mut future = Box::pin(future);
    for _ in 0..times {
        if let Some(output) = future.as_mut().now_or_never() {
            return Some(output);
        }
        tokio::task::yield_now().await;
    }
    None
}

#[test]
fn a_hand_over_cancelled_ten_thousand_times_loses_nothing() {
    common::paused().block_on(async {
        let (world, pool) = quick(2).await;
        world.log_calls(false);
        let (mut rng, mut had) = (StdRng::seed_from_u64(1), 0);
        for _ in 0..10_000 {
            // Two at once: the machine that one does not take, the other may.
            let (one, other) = (rng.random_range(0..9), rng.random_range(0..9));
            let (first, second) =
                tokio::join!(poll_some(pool.acquire().queue(), one), poll_some(pool.acquire().queue(), other));
            had += [first, second].into_iter().flatten().map(|lease| drop(lease.unwrap())).count();
        }
        let status = full(&pool, 2).await;
        assert!(had > 1000 && had < 19_000, "{had}: neither always nor never in time");
        assert_eq!(status.totals.released, status.totals.acquired);
        assert!(status.totals.acquired >= had as u64);
        assert_eq!(status.totals.unfit, 0, "what nobody took was not thrown away");
        close(&pool, &world).await;
    });
}

/// From all sides at once: one deletion, one replacement.
#[test]
fn delete_stop_and_drop_at_once_ten_thousand_times() {
    common::paused().block_on(async {
        let (world, pool) = quick(4).await;
        let mut rng = StdRng::seed_from_u64(2);
        for round in 0..10_000_u64 {
            let lease = Arc::new(pool.acquire().await.unwrap());
            let mut tasks = Vec::new();
            for side in 0..rng.random_range(1..4) {
                let (lease, side, wait) = (lease.clone(), (side + round) % 3, rng.random_range(0..4));
                tasks.push(tokio::spawn(async move {
                    for _ in 0..wait {
                        tokio::task::yield_now().await;
                    }
                    match side {
                        0 => drop(lease.delete().await),
                        1 => drop(lease.stop_and_release(Duration::ZERO).await),
                        _ => drop(lease),
                    }
                }));
            }
            drop(lease);
            if rng.random_range(0..4) == 0 {
                tasks[0].abort();
            }
            for task in tasks {
                let _ = task.await;
            }
        }
        let status = full(&pool, 4).await;
        let totals = status.totals;
        assert_eq!(
            (totals.acquired, totals.released, totals.replacements, totals.deleted, totals.attempts),
            (10_000, 10_000, 10_000, 10_000, 10_004)
        );
        let mut destroyed: HashMap<Id, usize> = HashMap::new();
        for call in world.calls().into_iter().filter(|call| call.verb == Verb::Destroy) {
            *destroyed.entry(call.id).or_default() += 1;
        }
        assert_eq!(destroyed.len(), 10_000);
        assert!(destroyed.values().all(|count| *count == 1), "one deletion each");
        close(&pool, &world).await;
    });
}

/// Whoever gets a lease while the pool closes gets a machine that is there, or an error.
#[test]
fn an_acquire_that_races_a_close_never_gets_a_deleted_machine() {
    for (round, retains) in (0..400).flat_map(|round| [(round, false), (round, true)]) {
        common::paused().block_on(async {
            let world = World::new();
            let pool = pool_over(&world).size(2).delete_acquired_on_close(!retains).build().unwrap();
            pool.start().await.unwrap();
            full(&pool, 2).await;
            let acquiring = tokio::spawn({
                let pool = pool.clone();
                async move { pool.acquire().await }
            });
            for _ in 0..round % 20 {
                tokio::task::yield_now().await;
            }
            let report = pool.close(LONG).await;
            assert!(report.is_clean());
            match acquiring.await.unwrap() {
                Ok(lease) if retains => {
                    assert_eq!(lease.state(), State::Running);
                    assert!(lease.is_retained() && report.retained == [lease.id().clone()]);
                    lease.delete().await.unwrap();
                }
                // Taken first and closed then: it was told.
                Ok(lease) => assert!(lease.is_ended()),
                Err(error) => assert_eq!(error.kind(), ErrorKind::Closed),
            }
            assert_eq!((world.residue(), world.violations()), (Vec::new(), Vec::new()));
        });
    }
}

#[tokio::test(start_paused = true)]
async fn a_close_with_a_thousand_waiters_wakes_them_all() {
    let (world, builder) = pool();
    let pool = builder.size(1).staging(Staging::Stopped).build().unwrap();
    pool.start().await.unwrap();
    let mut events = pool.subscribe().await;
    let waiting: Vec<_> = (0..1000).map(|_| tokio::spawn(pool.acquire().timeout(LONG).queue())).collect();
    tokio::time::sleep(Duration::from_millis(1)).await;
    let closing = tokio::spawn({
        let pool = pool.clone();
        async move { pool.close(LONG).await }
    });
    tokio::task::yield_now().await;
    assert_eq!(pool.acquire().await.unwrap_err().kind(), ErrorKind::Closed);
    for waiter in waiting {
        assert_eq!(waiter.await.unwrap().unwrap_err().kind(), ErrorKind::Closed);
    }
    assert!(closing.await.unwrap().is_clean());
    assert_eq!(world.residue(), Vec::<String>::new());
    let mut seen = Vec::new();
    while let Some(next) = events.next().await {
        match next {
            Next::Event(event) => seen.push(event.kind),
            Next::Lost(lost) => assert!(lost > 0),
        }
    }
    assert!(seen.contains(&EventKind::AttemptToUseClosedPool));
}

/// A reader that does not read loses the oldest, is told how many, and goes on from a new snapshot. Nobody waits for it.
#[tokio::test(start_paused = true)]
async fn a_slow_reader_loses_the_oldest_and_is_told() {
    let world = World::new();
    let pool = pool_over(&world).size(1).event_buffer(16).build().unwrap();
    pool.start().await.unwrap();
    full(&pool, 1).await;
    let mut slow = pool.subscribe().await;
    let before = slow.status().sequence;
    for _ in 0..20 {
        pool.acquire().await.unwrap().delete().await.unwrap();
    }
    full(&pool, 1).await;
    let sent = pool.status().await.sequence - before;
    let (mut received, mut lost, mut last) = (0, 0, None);
    while let Some(next) = slow.try_next() {
        match next {
            Next::Event(event) => {
                received += 1;
                last = Some(event.sequence);
            }
            Next::Lost(count) => lost += count,
        }
    }
    assert!(lost > 0);
    assert_eq!(received + lost, sent, "received and dropped are all that was sent (I9)");
    assert_eq!(last, Some(before + sent), "the newest is not what is lost");
    // A new subscription goes on where its snapshot ends.
    let mut again = pool.subscribe().await;
    let from = again.status().sequence;
    drop(pool.acquire().await.unwrap());
    full(&pool, 1).await;
    let first = drain(&mut again);
    assert_eq!(first[0].sequence, from + 1);
    assert!(first.iter().all(|event| &*event.pool == "p"));
    assert!(first.iter().filter(|event| event.kind == EventKind::Acquired).all(|event| event.vm.is_some()));
    close(&pool, &world).await;
}

/// A lease is a handle on a machine of its own task: nothing of its acquirer's keeps it alive.
#[tokio::test(start_paused = true)]
async fn callers_that_end_take_nothing_with_them() {
    let (world, builder) = pool();
    let pool = builder.size(2).build().unwrap();
    // Whoever starts the pool goes away at once.
    let starting = tokio::spawn({
        let pool = pool.clone();
        async move { pool.start().await }
    });
    tokio::task::yield_now().await;
    starting.abort();
    full(&pool, 2).await;
    // And whoever deletes.
    let lease: Lease = pool.acquire().await.unwrap();
    let id = lease.id().clone();
    let deleting = tokio::spawn(async move { lease.delete().await });
    tokio::task::yield_now().await;
    deleting.abort();
    let status = full(&pool, 2).await;
    assert!(!world.has_disk(&id));
    assert_eq!((status.totals.released, status.totals.deleted), (1, 1));
    // And whoever closes.
    let closing = tokio::spawn({
        let pool = pool.clone();
        async move { pool.close(LONG).await }
    });
    tokio::task::yield_now().await;
    closing.abort();
    until(&pool, "closed", |status| status.phase == vmkit::pool::PoolPhase::Closed).await;
    assert_eq!(world.residue(), Vec::<String>::new());
}

/// Who was given a dead machine is next, before those who came later.
#[tokio::test(start_paused = true)]
async fn a_dead_machine_costs_no_place() {
    let (world, builder) = pool();
    let pool = builder.size(1).build().unwrap();
    pool.start().await.unwrap();
    let status = full(&pool, 1).await;
    world.fault(Some(&status.vms[0].id), Verb::Ping, vmkit::sim::Fault::Slow(secs(2)));
    world.fault(Some(&status.vms[0].id), Verb::Ping, vmkit::sim::Fault::Err);
    world.step_at(&[Verb::Ping]);
    let first = tokio::spawn(pool.acquire().holder("first").timeout(LONG).queue());
    world.wait_parked(&status.vms[0].id, Verb::Ping).await;
    let second = tokio::spawn(pool.acquire().holder("second").timeout(LONG).queue());
    tokio::time::sleep(secs(1)).await;
    world.crash(&status.vms[0].id, 1);
    world.stepping(false);
    let lease = first.await.unwrap().unwrap();
    assert_ne!(*lease.id(), status.vms[0].id);
    assert!(!second.is_finished());
    drop(lease);
    drop(second.await.unwrap().unwrap());
    close(&pool, &world).await;
}

/// A caller that queued and then never looked again keeps no machine from others.
#[tokio::test(start_paused = true)]
async fn a_caller_that_does_not_look_is_passed_over() {
    let (world, builder) = pool();
    let pool = builder.size(1).build().unwrap();
    pool.start().await.unwrap();
    let lease = pool.acquire().await.unwrap();
    let idle = pool.acquire().timeout(secs(5)).queue();
    tokio::time::sleep(secs(10)).await;
    drop(lease);
    let lease = pool.acquire().await.unwrap();
    assert_eq!(pool.status().await.totals.unfit, 0, "no machine was wasted on it");
    assert_eq!(idle.await.unwrap_err().kind(), ErrorKind::TimedOut);
    // One that was granted, in time, what it then does not take.
    let idle = pool.acquire().timeout(secs(60)).queue();
    drop(lease);
    until(&pool, "granted", |status| status.counts.unreleased == 1 && status.counts.waiting == 0).await;
    let lease = pool.acquire().timeout(LONG).await.unwrap();
    assert_eq!(pool.status().await.totals.unfit, 1);
    assert!(idle.await.is_err(), "it was taken back");
    drop(lease);
    full(&pool, 1).await;
    close(&pool, &world).await;
}
