//! Random schedules over a pool: faults, crashes, callers that go away, processes that are killed.
//!
//! Judged by rules that ask neither the plan nor the counts how it should be: what is physically there is listed (I3); nobody
//! gets a machine twice (I5); the hardware received no call that it must not (I1, I8); every published change is in the tables
//! (I2); sizes hold (I4); released and replaced agree (I6); a closed pool leaves no task and no machine (I7); events are in order
//! and none is lost in silence (I9); the pool answers while everything hangs (I10); all that with callers that are aborted (I11)
//! and processes that are killed (I12), beside machines that belong to others.
//!
//! `VMKIT_SEED=n` runs one schedule alone; `VMKIT_SCHEDULES=n` sets how many each test runs.
#![cfg(all(feature = "sim", feature = "conformance"))]

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use common::pool::{LONG, secs};
use common::{check_published, id, spec};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use tokio::task::JoinHandle;
use vmkit::pool::{EventKind, Events, KeepFailed, Lease, Next, OnFailure, Pool, PoolStatus, Reuse, Tiers, VmPhase};
use vmkit::sim::{Odds, SimProvider, World};
use vmkit::{ConsoleSinks, ErrorKind, Host, Id, Status, Subscription, Timeouts};

const STEPS: usize = 200;

/// Seeds that once found a mistake.
const REGRESSIONS: &[u64] = &[];

type Held = Arc<Mutex<Vec<Arc<Lease>>>>;

/// What lasts longer than a process.
struct Outside {
    world: World,
    rng: StdRng,
    odds: Odds,
    /// Every machine that anybody was ever given, and what executed it: a name may come again.
    given: Arc<Mutex<BTreeSet<String>>>,
}

/// One process: a pool, its callers, and who looks at it.
struct Process {
    world: World,
    host: Host<SimProvider>,
    pool: Pool,
    held: Held,
    given: Arc<Mutex<BTreeSet<String>>>,
    tasks: Vec<JoinHandle<()>>,
    events: Events,
    told: Told,
    watchers: BTreeMap<Id, (Subscription, Option<Status>)>,
    most: usize,
    allowance: usize,
}

/// What the events have told.
#[derive(Default)]
struct Told {
    last: u64,
    vms: BTreeMap<Id, EventKind>,
    acquired: u64,
    /// Names come again.
    again: bool,
}

impl Told {
    /// Which event of a machine may follow which.
    fn may_follow(&self, before: Option<EventKind>, next: EventKind) -> bool {
        use EventKind as K;
        match next {
            K::VmCreateStarted => before.is_none() || (self.again && before == Some(K::Released)),
            K::VmCreated | K::VmCreateFailed => before == Some(K::VmCreateStarted),
            K::ReplenishFailed => before == Some(K::VmCreateFailed),
            // A grant that came back is granted again.
            K::VmDequeued => matches!(before, Some(K::VmCreated | K::VmDequeued)),
            K::Acquired => before == Some(K::VmDequeued),
            K::AcquireFailed => matches!(before, Some(K::VmCreated | K::VmDequeued)),
            K::Release => before == Some(K::Acquired),
            K::ReplenishStarted => before == Some(K::Release),
            K::Released => matches!(before, Some(K::Release | K::ReplenishStarted)),
            K::OrphanedVmDeleted => before.is_none(),
            K::AcquiredVmRetained => matches!(before, Some(K::Acquired | K::Release | K::ReplenishStarted)),
            K::AcquireWaiting | K::AttemptToUseClosedPool | K::Replenished | K::StartPoolFull => false,
        }
    }

    fn read(&mut self, events: &mut Events) {
        while let Some(next) = events.try_next() {
            match next {
                Next::Lost(lost) => {
                    self.last += lost;
                    self.vms.clear();
                    panic!("{lost} events lost with room for all");
                }
                Next::Event(event) => {
                    assert_eq!(event.sequence, self.last + 1, "an event is missing (I9)");
                    self.last = event.sequence;
                    self.acquired += u64::from(event.kind == EventKind::Acquired);
                    if let Some(vm) = &event.vm {
                        let before = self.vms.insert(vm.clone(), event.kind);
                        assert!(self.may_follow(before, event.kind), "{:?} after {before:?} of {vm} (I9)", event.kind);
                    }
                }
            }
        }
    }
}

fn timeouts() -> Timeouts {
    let s = Duration::from_secs;
    Timeouts { clone: s(9), start: s(20), suspend: s(9), kill: s(5), delete: s(9), inspect: s(3), lock: s(60) }
}

impl Outside {
    fn new(seed: u64, odds: Odds) -> Outside {
        let world = World::seeded(seed);
        world.log_calls(false);
        world.latency(common::latency());
        Outside { world, rng: StdRng::seed_from_u64(seed), odds, given: Arc::default() }
    }

    /// What is not this pool's: somebody's machine with a name like the pool's, and one of a pool whose name begins like it.
    async fn others(&self) {
        self.world.plant_foreign(&id("p-foreign-1"));
        let host = Host::new(SimProvider::new(self.world.clone()));
        let vm = host.create(id("p-2-aaaa-1"), spec().label("vmkit.pool", "p-2")).await.unwrap();
        vm.clone_source().await.unwrap();
    }

    fn others_are_well(&self) {
        assert!(self.world.foreign_intact(&id("p-foreign-1")), "a foreign machine was touched (I12)");
        assert!(self.world.has_disk(&id("p-2-aaaa-1")), "another pool's machine was touched (I12)");
    }

    async fn process(&mut self) -> Process {
        let (world, rng) = (self.world.clone(), &mut self.rng);
        let host = Host::new(SimProvider::new(world.clone()).suspendable(rng.random_range(0..8) > 0));
        let tiers = match rng.random_range(0..4) {
            0 => Tiers { running: rng.random_range(1..5), suspended: 0, stopped: 0 },
            1 => Tiers { running: 0, suspended: rng.random_range(1..4), stopped: 0 },
            2 => Tiers { running: 0, suspended: 0, stopped: rng.random_range(1..4) },
            _ => Tiers { running: 1, suspended: rng.random_range(0..3), stopped: rng.random_range(0..3) },
        };
        let allowance = rng.random_range(1..3);
        let mut builder = Pool::builder(host.clone(), spec().timeouts(timeouts()))
            .name("p")
            .seed(rng.random())
            .tiers(tiers)
            .allowance(allowance)
            .create_concurrency(rng.random_range(1..5))
            .create_timeout(secs(rng.random_range(7..60)))
            .cleanup_timeout(secs(rng.random_range(5..60)))
            .health_interval(secs(rng.random_range(5..40)))
            .on_failure(if rng.random_range(0..4) == 0 { OnFailure::FailFast } else { OnFailure::Wait })
            .event_buffer(1 << 12);
        if rng.random_range(0..2) == 0 {
            builder = builder.keep_failed(KeepFailed { quota: 1, period: secs(rng.random_range(20..100)) });
        }
        let again = rng.random_range(0..2) == 0;
        if again {
            builder = builder.reuse(Reuse::Reset);
        }
        if rng.random_range(0..3) == 0 {
            builder = builder.max_age(secs(rng.random_range(30..300)));
        }
        if rng.random_range(0..4) == 0 {
            builder = builder.create_interval(secs(1));
        }
        let pool = builder.build().unwrap();
        let starting = pool.clone();
        let started = tokio::spawn(async move {
            if let Err(error) = starting.start().await {
                assert!(
                    !matches!(error.kind(), ErrorKind::Busy | ErrorKind::IllegalRequest),
                    "the name of a dead process, or started twice: {error:?}"
                );
            }
        });
        // The supervisor is there once it is asked.
        tokio::task::yield_now().await;
        let events = pool.subscribe().await;
        let told = Told { last: events.status().sequence, again, ..Told::default() };
        Process {
            world,
            host,
            pool,
            held: Held::default(),
            given: self.given.clone(),
            tasks: vec![started],
            events,
            told,
            watchers: BTreeMap::new(),
            most: tiers.sum(),
            allowance,
        }
    }
}

impl Process {
    fn spawn(&mut self, work: impl Future<Output = ()> + Send + 'static) {
        self.tasks.push(tokio::spawn(work));
    }

    fn some_lease(&self, rng: &mut StdRng) -> Option<Arc<Lease>> {
        let held = self.held.lock().unwrap();
        let at = rng.random_range(0..held.len().max(1));
        held.get(at).cloned()
    }

    async fn step(&mut self, rng: &mut StdRng) {
        let lease = self.some_lease(rng);
        match (rng.random_range(0..17), lease) {
            (0..5, _) => self.acquire(rng),
            (5 | 6, Some(lease)) => self.held.lock().unwrap().retain(|other| !Arc::ptr_eq(other, &lease)),
            (7, Some(lease)) => self.spawn(async move { drop(lease.delete().await) }),
            (8, Some(lease)) => {
                let grace = Duration::from_millis(rng.random_range(0..3000));
                self.spawn(async move { drop(lease.stop_and_release(grace).await) });
            }
            (9, Some(lease)) => {
                // Two at once.
                let (one, other) = (lease.clone(), lease);
                self.spawn(async move { drop(one.stop_and_release(Duration::ZERO).await) });
                self.spawn(async move { drop(other.delete().await) });
            }
            (10, Some(lease)) => {
                lease.mark_failed();
                self.spawn(async move { drop(lease.command("echo").arg("x").output().await) });
            }
            (11, _) => {
                let status = self.pool.status().await;
                if !status.vms.is_empty() {
                    let at = rng.random_range(0..status.vms.len());
                    self.world.crash(&status.vms[at].id, 1);
                }
            }
            (12 | 13, _) if !self.tasks.is_empty() => {
                let at = rng.random_range(0..self.tasks.len());
                self.tasks[at].abort();
            }
            (14, _) => {
                let size = rng.random_range(0..5);
                if self.pool.resize(size).await.is_ok() {
                    self.most = self.most.max(size);
                }
            }
            (15, _) => self.look_at_kept(rng).await,
            _ => {}
        }
        // Often at the same instant, so that things meet.
        if rng.random_range(0..2) == 0 {
            tokio::time::sleep(Duration::from_millis(rng.random_range(0..4000))).await;
        } else {
            for _ in 0..rng.random_range(0..6) {
                tokio::task::yield_now().await;
            }
        }
        self.check().await;
    }

    fn acquire(&mut self, rng: &mut StdRng) {
        let mut acquire = self.pool.acquire().timeout(Duration::from_millis(rng.random_range(0..30_000)));
        if rng.random_range(0..4) == 0 {
            acquire = acquire.env("KEY", "value");
        }
        if rng.random_range(0..6) == 0 {
            acquire = acquire.time_limit(secs(rng.random_range(1..20)));
        }
        if rng.random_range(0..3) == 0 {
            acquire = acquire.key("other");
        }
        let (held, given) = (self.held.clone(), self.given.clone());
        self.spawn(async move {
            if let Ok(lease) = acquire.await {
                let which = format!("{} as process {:?}", lease.id(), lease.properties().pid);
                assert!(given.lock().unwrap().insert(which.clone()), "{which} was given twice (I5)");
                held.lock().unwrap().push(Arc::new(lease));
            }
        });
    }

    async fn look_at_kept(&mut self, rng: &mut StdRng) {
        let kept = common::pool::ids(&*self.pool.status().await, VmPhase::Kept);
        let Some(id) = kept.into_iter().next() else { return };
        let (pool, discards) = (self.pool.clone(), rng.random_range(0..2) == 0);
        self.spawn(async move {
            if discards {
                drop(pool.discard_kept(&id).await);
            } else if let Ok(lease) = pool.take_kept(&id).await {
                drop(lease.start(ConsoleSinks::discard()).await);
            }
        });
    }

    async fn check(&mut self) {
        // It answers at once, whatever hangs (I10): time stands still here, so waiting for anything would move it.
        let before = tokio::time::Instant::now();
        let status = self.pool.status().await;
        assert_eq!(before.elapsed(), Duration::ZERO, "the pool's status waited for something (I10)");

        assert_eq!(self.world.violations(), Vec::<String>::new(), "(I1, I8)");
        let counted = status.counts.counted();
        assert!(counted <= self.most + self.allowance, "{counted} of {} (I4): {status:#?}", self.most);
        self.listed(&status);
        for vm in &status.vms {
            if !self.watchers.contains_key(&vm.id)
                && let Some(instance) = self.host.get(&vm.id)
            {
                self.watchers.insert(vm.id.clone(), (instance.subscribe(), None));
            }
        }
        for (changes, last) in self.watchers.values_mut() {
            check_published(changes, last, &mut Vec::new());
        }
        self.watchers.retain(|id, _| status.vms.iter().any(|vm| vm.id == *id));
        assert_eq!(status.totals.released, status.totals.replacements, "(I6)");
        self.told.read(&mut self.events);
        assert!(self.told.last >= status.sequence, "fewer events than were sent (I9)");
        assert!(self.told.acquired >= status.totals.acquired, "(I9)");
        let mut rest = Vec::new();
        for task in self.tasks.drain(..) {
            if !task.is_finished() {
                rest.push(task);
            } else if let Err(error) = task.await {
                assert!(error.is_cancelled(), "a caller panicked: {error}");
            }
        }
        self.tasks = rest;
    }

    /// Everything of the pool's that is physically there is known to it (I3).
    fn listed(&self, status: &PoolStatus) {
        if status.phase == vmkit::pool::PoolPhase::Starting {
            return;
        }
        let known: BTreeSet<&str> = status.vms.iter().map(|vm| vm.id.as_str()).collect();
        for line in self.world.residue() {
            let name = line.split(": ").next().unwrap();
            assert!(known.contains(name) || name.starts_with("p-2-"), "not listed: {line} (I3): {status:#?}");
        }
    }

    /// After the faults: full size again, then closed, and nothing is left.
    async fn end(mut self) {
        self.world.heal();
        for task in &self.tasks {
            task.abort();
        }
        self.held.lock().unwrap().clear();
        let _ = self.pool.resize(3).await;
        self.most = self.most.max(3);
        tokio::time::sleep(secs(600)).await;
        self.check().await;
        let status = self.pool.status().await;
        let counts = status.counts;
        assert_eq!((counts.ready.sum(), counts.unreleased, counts.waiting), (3, 0, 0), "not full again: {status:#?}");
        assert_eq!(status.totals.acquired, status.totals.released, "(I6)");
        let given = self.given.lock().unwrap().len() as u64;
        assert!(given <= self.told.acquired || status.totals.acquired <= given);
        let report = self.pool.close(LONG).await;
        assert!(report.is_clean(), "{report:?}");
        let left: Vec<String> = self.world.residue().into_iter().filter(|line| !line.starts_with("p-2-")).collect();
        assert_eq!(left, Vec::<String>::new(), "(I7)");
        self.told.read(&mut self.events);
        assert!(self.events.next().await.is_none(), "the stream of events has not ended");
        let status = self.pool.status().await;
        assert_eq!(self.told.last, status.sequence, "(I9)");
        assert!(status.vms.is_empty() && status.counts.all() == 0, "{status:#?}");
        let totals = status.totals;
        assert!(totals.deleted <= totals.attempts + totals.delete_failures + self.told.vms.len() as u64);
        drop((self.pool, self.host, self.watchers));
        tokio::time::sleep(secs(1)).await;
        let alive = tokio::runtime::Handle::current().metrics().num_alive_tasks();
        assert_eq!(alive, 0, "tasks outlive a closed pool (I7)");
    }
}

fn schedule(seed: u64, odds: Odds) {
    let mut outside = Outside::new(seed, odds);
    let kills = outside.rng.random_range(0..3);
    common::paused().block_on(outside.others());
    for life in 0..=kills {
        // Dropping its runtime kills a process: every task stops at the await point it is at.
        let runtime = common::paused();
        let ended = runtime.block_on(async {
            outside.world.random_faults(outside.odds);
            let mut process = outside.process().await;
            let mut rng = StdRng::seed_from_u64(outside.rng.random());
            for _ in 0..STEPS / (kills + 1) {
                process.step(&mut rng).await;
            }
            if life == kills {
                process.end().await;
                None
            } else {
                Some(process)
            }
        });
        drop(runtime);
        drop(ended);
        outside.others_are_well();
    }
}

fn schedules(seeds: std::ops::Range<u64>, odds: Odds) {
    let number = |name: &str| std::env::var(name).ok().and_then(|value| value.parse::<u64>().ok());
    let seeds = match (number("VMKIT_SEED"), number("VMKIT_SCHEDULES")) {
        (Some(seed), _) if seeds.contains(&seed) => seed..seed + 1,
        (Some(_), _) => return,
        (None, Some(count)) => seeds.start..seeds.start + count,
        (None, None) => seeds,
    };
    common::pool::quiet();
    for seed in seeds {
        let ran = std::panic::catch_unwind(|| schedule(seed, odds));
        assert!(ran.is_ok(), "seed {seed}: VMKIT_SEED={seed} runs it alone");
    }
}

#[test]
fn schedules_without_faults() {
    schedules(0..2500, Odds::default());
}

#[test]
fn schedules_with_rare_faults() {
    schedules(100_000..103_500, Odds::each(0.004));
}

#[test]
fn schedules_with_many_faults() {
    schedules(200_000..204_000, Odds::each(0.03));
}

#[test]
fn schedules_that_once_failed() {
    for &seed in REGRESSIONS {
        schedule(
            seed,
            if seed < 100_000 {
                Odds::default()
            } else if seed < 200_000 {
                Odds::each(0.004)
            } else {
                Odds::each(0.03)
            },
        );
    }
}

/// What a schedule did, call by call.
fn calls(seed: u64) -> Vec<vmkit::sim::Call> {
    let mut outside = Outside::new(seed, Odds::each(0.01));
    outside.world.log_calls(true);
    common::paused().block_on(async {
        outside.world.random_faults(outside.odds);
        let mut process = outside.process().await;
        let mut rng = StdRng::seed_from_u64(outside.rng.random());
        for _ in 0..STEPS {
            process.step(&mut rng).await;
        }
        process.world.calls()
    })
}

#[test]
fn schedules_are_the_same_for_the_same_seed() {
    common::pool::quiet();
    for seed in 0..5 {
        assert!(calls(seed) == calls(seed), "seed {seed} cannot be replayed");
    }
}

/// The rules have teeth: a backend that leaves disks behind and denies it, or lets two operate at once, is caught.
#[test]
fn broken_backends_are_caught() {
    for how in [vmkit::sim::Broken::Leaker, vmkit::sim::Broken::KeepsHalfClones] {
        let caught = (0..20).any(|seed| {
            let ran = std::panic::catch_unwind(|| {
                let mut outside = Outside::new(seed, Odds { err: 0.05, ..Odds::default() });
                outside.world = outside.world.clone().broken(how);
                common::paused().block_on(async {
                    outside.world.random_faults(outside.odds);
                    let mut process = outside.process().await;
                    let mut rng = StdRng::seed_from_u64(seed);
                    for _ in 0..STEPS {
                        process.step(&mut rng).await;
                    }
                    process.end().await;
                });
            });
            ran.is_err()
        });
        assert!(caught, "{how:?} was not noticed");
    }
}
