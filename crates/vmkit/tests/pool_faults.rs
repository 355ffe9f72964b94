//! A pool over hardware that fails, hangs, panics, and over other processes' machines.
#![cfg(all(feature = "sim", feature = "conformance"))]

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use common::pool::{LONG, close, drain, full, ids, kinds, pool, pool_over, quiet, secs, until};
use common::{id, spec};
use vmkit::pool::{EventKind, Pool, PoolPhase, Staging, Tier, VmPhase};
use vmkit::sim::{Fault, Odds, SimClaim, SimDriver, SimProvider, Verb, World};
use vmkit::{Adopted, Capabilities, ConsoleSinks, ErrorKind, Found, Host, Id, Provider, Result, Spec, State};

fn failing(world: &World) {
    world.random_faults(Odds { err: 1.0, ..Odds::default() });
}

#[tokio::test(start_paused = true)]
async fn an_hour_without_any_success_and_it_is_at_full_size_again() {
    let (world, builder) = pool();
    let pool = builder.size(4).build().unwrap();
    pool.start().await.unwrap();
    full(&pool, 4).await;
    let mut events = pool.subscribe().await;
    // Everything dies, and for an hour no clone works.
    for _ in 0..10_000 {
        world.fault(None, Verb::Clone, Fault::Err);
    }
    for vm in &full(&pool, 4).await.vms {
        world.crash(&vm.id, 1);
    }
    let ending = tokio::time::Instant::now() + secs(3600);
    tokio::time::sleep_until(ending).await;
    assert_eq!(world.residue(), Vec::<String>::new(), "failed attempts leave nothing");
    let status = pool.status().await;
    assert_eq!(status.counts.ready.sum(), 0);
    assert!(status.totals.failed > 100, "it goes on trying, with a cap: {:?}", status.totals);
    assert!(status.totals.failed < 200, "and not faster than that: {:?}", status.totals);
    world.heal();
    full(&pool, 4).await;
    let told = drain(&mut events);
    assert!(told.iter().any(|event| event.kind == EventKind::ReplenishFailed && event.error.is_some()));
    assert!(told.iter().any(|event| event.kind == EventKind::Replenished));
    close(&pool, &world).await;
}

/// Attempts that hang are ended, recorded, and count: there are never more machines than that.
#[tokio::test(start_paused = true)]
async fn hung_attempts_count_against_the_capacity() {
    let (world, builder) = pool();
    let pool = builder
        .size(3)
        .allowance(2)
        .create_timeout(secs(10))
        .cleanup_timeout(secs(5))
        .create_concurrency(8)
        .build()
        .unwrap();
    // Clones hang, and so does removing what they left half done.
    for _ in 0..10_000 {
        world.fault(None, Verb::Clone, Fault::Hang);
        world.fault(None, Verb::Destroy, Fault::Hang);
    }
    let starting = tokio::spawn({
        let pool = pool.clone();
        async move { pool.start().await }
    });
    let mut most = 0;
    for _ in 0..2000 {
        tokio::time::sleep(secs(1)).await;
        let there = world.residue().iter().filter(|line| line.ends_with("a disk")).count();
        let status = pool.status().await;
        assert!(there <= 5, "{there} of a size of 3 and an allowance of 2: {status:#?}");
        assert!(status.vms.len() >= there, "each is recorded");
        most = most.max(there);
    }
    assert!(most >= 3, "{most}: it did try");
    assert!(
        !ids(&*pool.status().await, VmPhase::Leaked).is_empty()
            || !ids(&*pool.status().await, VmPhase::Hung).is_empty()
    );
    world.heal();
    full(&pool, 3).await;
    assert_eq!(starting.await.unwrap().unwrap_err().kind(), ErrorKind::TimedOut, "after five minutes of that");
    close(&pool, &world).await;
}

#[tokio::test(start_paused = true)]
async fn what_cannot_be_deleted_is_listed_and_tried_again() {
    let (world, builder) = pool();
    let pool = builder.size(1).build().unwrap();
    pool.start().await.unwrap();
    let lease = pool.acquire().await.unwrap();
    let stuck = lease.id().clone();
    for _ in 0..3 {
        world.fault(Some(&stuck), Verb::Destroy, Fault::Err);
    }
    assert_eq!(lease.delete().await.unwrap_err().kind(), ErrorKind::Backend);
    let status = pool.status().await;
    assert_eq!(ids(&status, VmPhase::Leaked), std::slice::from_ref(&stuck));
    assert!(status.vms.iter().find(|vm| vm.id == stuck).unwrap().problem.is_some());
    let status = full(&pool, 1).await;
    assert_eq!((status.totals.delete_failures, status.totals.deleted), (3, 1));
    assert_eq!(status.totals.replacements, 1);
    lease.delete().await.unwrap();
    close(&pool, &world).await;
}

/// How a provider may be odd beyond what the simulator's faults are.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Oddity {
    PanicsOnOpen,
    HangsOnOpen,
    ListsTwice,
    /// What it was asked to open it opens, long after nobody waits for it.
    IgnoresCancellation,
}

struct Odd {
    inner: SimProvider,
    how: Oddity,
    left: Arc<AtomicUsize>,
}

impl Odd {
    fn acts(&self) -> bool {
        self.left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1)).is_ok()
    }
}

impl Provider for Odd {
    type Driver = SimDriver;
    type Claim = SimClaim;

    fn capabilities(&self) -> Capabilities {
        self.inner.capabilities()
    }

    async fn open(&self, id: &Id, spec: &Spec) -> Result<SimDriver> {
        match self.how {
            Oddity::PanicsOnOpen if self.acts() => panic!("it was to panic"),
            Oddity::HangsOnOpen if self.acts() => std::future::pending().await,
            Oddity::IgnoresCancellation if self.acts() => {
                let (inner, id, spec) = (self.inner.clone(), id.clone(), spec.clone());
                let opening = tokio::spawn(async move {
                    tokio::time::sleep(secs(1000)).await;
                    inner.open(&id, &spec).await
                });
                opening.await.unwrap()
            }
            _ => self.inner.open(id, spec).await,
        }
    }

    async fn list(&self) -> Result<Vec<Found>> {
        let mut found = self.inner.list().await?;
        if self.how == Oddity::ListsTwice {
            found.extend(found.clone());
        }
        Ok(found)
    }

    async fn adopt(&self, id: &Id) -> Result<Adopted<SimDriver>> {
        self.inner.adopt(id).await
    }

    async fn claim(&self, name: &Id) -> Result<SimClaim> {
        self.inner.claim(name).await
    }
}

#[test]
fn odd_providers_do_no_harm() {
    quiet();
    for how in [Oddity::PanicsOnOpen, Oddity::HangsOnOpen, Oddity::ListsTwice, Oddity::IgnoresCancellation] {
        let world = World::new();
        world.latency(common::latency());
        let odd = || Odd { inner: SimProvider::new(world.clone()), how, left: Arc::new(AtomicUsize::new(5)) };
        let build =
            || Pool::builder(Host::new(odd()), spec()).name("p").size(3).create_timeout(secs(60)).build().unwrap();
        // A process that is killed leaves something for the next to list.
        common::paused().block_on(async {
            let pool = build();
            pool.start().await.unwrap();
            let status = full(&pool, 3).await;
            let oddly = how != Oddity::ListsTwice;
            assert_eq!(status.totals.failed > 0, oddly, "{how:?}: {:?}", status.totals);
            std::mem::forget(pool);
        });
        assert_eq!(world.residue().len(), 6, "three disks and three processes: {:?}", world.residue());
        common::paused().block_on(async {
            let pool = build();
            pool.start().await.unwrap();
            full(&pool, 3).await;
            assert_eq!(pool.status().await.totals.deleted, 3, "{how:?}: each leftover once");
            tokio::time::sleep(secs(2000)).await;
            full(&pool, 3).await;
            close(&pool, &world).await;
        });
    }
}

#[tokio::test(start_paused = true)]
async fn faults_of_every_kind_in_every_call_end_at_full_size() {
    quiet();
    let kinds = [Fault::Err, Fault::ErrButDone, Fault::Lie, Fault::Hang, Fault::Panic, Fault::DieLater(secs(1))];
    let verbs =
        [Verb::Open, Verb::Clone, Verb::Boot, Verb::Suspend, Verb::Resume, Verb::Destroy, Verb::Kill, Verb::Inspect];
    for staging in [Staging::Running, Staging::Suspended, Staging::Stopped] {
        for (verb, fault) in verbs.into_iter().flat_map(|verb| kinds.map(|fault| (verb, fault))) {
            let (world, builder) = pool();
            let pool = builder.size(2).staging(staging).create_timeout(secs(30)).build().unwrap();
            for _ in 0..4 {
                world.fault(None, verb, fault);
            }
            pool.start().await.unwrap();
            let lease = pool.acquire().await.unwrap_or_else(|error| panic!("{staging}, {verb:?} {fault:?}: {error:?}"));
            assert_eq!(lease.state(), State::Running, "{staging}, {verb:?} {fault:?}");
            drop(lease);
            world.heal();
            full(&pool, 2).await;
            close(&pool, &world).await;
        }
    }
}

/// At every call that making a machine consists of.
#[tokio::test(start_paused = true)]
async fn a_close_at_every_phase_of_creation() {
    for verb in [Verb::Claim, Verb::Open, Verb::Begin, Verb::Clone, Verb::Inspect, Verb::Boot, Verb::Suspend] {
        for nth in 0..4 {
            let (world, builder) = pool();
            let pool = builder.size(2).staging(Staging::Suspended).build().unwrap();
            world.step_at(&[verb]);
            let starting = tokio::spawn({
                let pool = pool.clone();
                async move { pool.start().await }
            });
            // The nth call of that kind is where it is closed.
            for _ in 0..nth {
                tokio::time::sleep(secs(10)).await;
                if let Some(parked) = world.parked().first() {
                    world.release(&parked.id);
                }
            }
            tokio::time::sleep(secs(10)).await;
            let closing = tokio::spawn({
                let pool = pool.clone();
                async move { pool.close(LONG).await }
            });
            tokio::time::sleep(secs(1)).await;
            world.stepping(false);
            assert!(closing.await.unwrap().is_clean(), "{verb:?}");
            let _ = starting.await.unwrap();
            assert_eq!(world.residue(), Vec::<String>::new(), "{verb:?}");
            assert_eq!(world.violations(), Vec::<String>::new());
            let again = pool_over(&world).build().unwrap();
            again.start().await.unwrap();
            close(&again, &world).await;
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_close_with_a_hung_deletion_returns_in_time_and_names_it() {
    let (world, builder) = pool();
    let pool = builder.size(3).build().unwrap();
    pool.start().await.unwrap();
    let stuck = full(&pool, 3).await.vms[1].id.clone();
    for _ in 0..100 {
        world.fault(Some(&stuck), Verb::Destroy, Fault::Hang);
    }
    let began = tokio::time::Instant::now();
    let (one, other) = tokio::join!(pool.close(secs(600)), pool.close(secs(30)));
    assert_eq!(began.elapsed(), secs(30), "the earliest of their limits");
    assert_eq!(one.left, other.left, "one result for both");
    assert_eq!(one.left.iter().map(|left| left.id.clone()).collect::<Vec<_>>(), std::slice::from_ref(&stuck));
    assert_eq!(one.deleted, 2);
    let error = one.into_result().unwrap_err();
    assert!(error.details().unwrap().contains(stuck.as_str()), "{error:?}");
    assert_eq!(pool.status().await.phase, PoolPhase::Closing);
    // Another close tries again.
    assert!(!pool.close(secs(1)).await.is_clean());
    world.heal();
    close(&pool, &world).await;
    assert_eq!(pool.status().await.phase, PoolPhase::Closed);
}

#[tokio::test(start_paused = true)]
async fn ready_machines_are_deleted_at_once_not_one_after_the_other() {
    let (world, builder) = pool();
    let pool = builder.size(50).create_concurrency(50).build().unwrap();
    pool.start().await.unwrap();
    full(&pool, 50).await;
    let began = tokio::time::Instant::now();
    close(&pool, &world).await;
    assert!(began.elapsed() < secs(1), "{:?}", began.elapsed());
}

/// Own by label, exactly: a name that begins alike is somebody else's.
#[tokio::test(start_paused = true)]
async fn only_what_carries_the_pools_own_label_is_deleted() {
    let world = World::new();
    let host = Host::new(SimProvider::new(world.clone()));
    let machines = [("p-left-1", "p"), ("x", "p"), ("p-b-c-1", "p-b"), ("p-1", "pp"), ("p-2", "")];
    for (name, label) in machines {
        let spec = if label.is_empty() { spec() } else { spec().label("vmkit.pool", label) };
        let vm = host.create(id(name), spec).await.unwrap();
        vm.clone_source().await.unwrap();
        vm.start(ConsoleSinks::discard()).await.unwrap();
    }
    world.plant_foreign(&id("p-foreign"));
    drop(host);
    let pool = pool_over(&world).size(1).build().unwrap();
    let starting = pool.clone();
    let starting = tokio::spawn(async move { starting.start().await });
    tokio::task::yield_now().await;
    let mut events = pool.subscribe().await;
    starting.await.unwrap().unwrap();
    full(&pool, 1).await;
    for (name, label) in machines {
        assert_eq!(world.has_disk(&id(name)), label != "p", "{name} of the pool {label:?}");
        assert_eq!(world.processes(&id(name)) > 0, label != "p");
    }
    assert!(world.foreign_intact(&id("p-foreign")));
    let told = drain(&mut events);
    assert_eq!(kinds(&told, &id("x")), [EventKind::OrphanedVmDeleted]);
    assert_eq!(kinds(&told, &id("p-left-1")), [EventKind::OrphanedVmDeleted]);
    assert!(pool.close(LONG).await.is_clean());
}

/// A second process with the same name is refused before it deletes anything.
#[tokio::test(start_paused = true)]
async fn a_name_belongs_to_one_living_process() {
    let (world, builder) = pool();
    let first = builder.size(2).build().unwrap();
    first.start().await.unwrap();
    full(&first, 2).await;
    let lease = first.acquire().await.unwrap();
    let second = pool_over(&world).size(1).build().unwrap();
    let error = second.start().await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Busy);
    assert!(error.to_string().contains("the pool p is in use"), "{error}");
    assert_eq!(lease.command("true").status().await.unwrap().code(), Some(0));
    assert_eq!(second.status().await.phase, PoolPhase::New);
    drop(lease);
    close(&first, &world).await;
    // Free now, and the start that failed started nothing.
    second.start().await.unwrap();
    full(&second, 1).await;
    close(&second, &world).await;
}

#[tokio::test(start_paused = true)]
async fn a_start_that_cannot_look_may_be_tried_again() {
    let (world, builder) = pool();
    let pool = builder.size(1).build().unwrap();
    world.fault(None, Verb::Claim, Fault::Err);
    let early = pool.clone();
    let (started, acquired) = tokio::join!(pool.start(), async move {
        tokio::task::yield_now().await;
        early.acquire().await
    });
    assert_eq!(started.unwrap_err().kind(), ErrorKind::Backend);
    assert!(acquired.is_err());
    pool.start().await.unwrap();
    drop(pool.acquire().await.unwrap());
    close(&pool, &world).await;
}

/// Creation is limited in rate and in number, and makes way for callers.
#[tokio::test(start_paused = true)]
async fn refill_is_shaped() {
    let (world, builder) = pool();
    let pool = builder.size(12).create_concurrency(3).create_interval(secs(2)).build().unwrap();
    let starting = pool.clone();
    tokio::spawn(async move { starting.start().await });
    let (mut most, mut made) = (0, 0);
    for _ in 0..240 {
        tokio::time::sleep(Duration::from_millis(250)).await;
        let status = pool.status().await;
        most = most.max(status.counts.creating.sum());
        assert!(status.totals.attempts - made <= 1, "two within a quarter of a second");
        made = status.totals.attempts;
    }
    assert_eq!((most, made), (3, 12));
    let (cold_world, builder) = common::pool::pool();
    let cold = builder.size(4).staging(Staging::Stopped).build().unwrap();
    cold.start().await.unwrap();
    full(&cold, 4).await;
    let first = tokio::spawn(cold.acquire().queue());
    tokio::time::sleep(Duration::from_millis(1)).await;
    cold.resize(5).await.unwrap();
    tokio::time::sleep(secs(1)).await;
    assert_eq!(cold.status().await.counts.creating.sum(), 0, "somebody's machine starts");
    let lease = first.await.unwrap().unwrap();
    tokio::time::sleep(Duration::from_millis(1)).await;
    assert_eq!(cold.status().await.counts.creating.sum(), 1, "and now there is time");
    drop(lease);
    close(&cold, &cold_world).await;
    close(&pool, &world).await;
}

#[tokio::test(start_paused = true)]
async fn total_failure_is_no_busy_loop() {
    let (world, builder) = pool();
    let pool = builder.size(4).staging(Staging::Stopped).build().unwrap();
    pool.start().await.unwrap();
    full(&pool, 4).await;
    // Clones work, starts never do.
    for _ in 0..100_000 {
        world.fault(None, Verb::Boot, Fault::Err);
    }
    assert_eq!(pool.acquire().timeout(secs(1000)).await.unwrap_err().kind(), ErrorKind::TimedOut);
    let tried = world.calls().iter().filter(|call| call.verb == Verb::Boot).count();
    assert!((20..80).contains(&tried), "{tried} starts in 1000 s");
    world.heal();
    drop(pool.acquire().await.unwrap());
    // Machines that come up and whose agents are dead: the same.
    for _ in 0..100_000 {
        world.fault(None, Verb::Ping, Fault::Err);
    }
    let before = pool.status().await.totals.attempts;
    assert_eq!(pool.acquire().timeout(secs(1000)).await.unwrap_err().kind(), ErrorKind::TimedOut);
    let made = pool.status().await.totals.attempts - before;
    assert!(made < 100, "{made} made for nothing in 1000 s");
    world.heal();
    let lease = pool.acquire().await.unwrap();
    assert_eq!(lease.state(), State::Running);
    failing(&world);
    drop(lease);
    tokio::time::sleep(secs(100)).await;
    world.heal();
    let status = until(&pool, "full", |status| status.counts.ready.sum() == 4 && status.counts.all() == 4).await;
    assert!(status.counts.ready.of(Tier::Stopped) >= 3);
    close(&pool, &world).await;
}
