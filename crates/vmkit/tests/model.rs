//! Random schedules: several machines, two processes that operate on each of them, faults, crashes, callers that go away.
//!
//! Judged by rules that do not ask the code: every published change is an edge of the tables, one generation on (I2); the
//! hardware received no call that it must not (I1, I8); what is refused is not in the table; when the faults have ended,
//! every machine can be removed and nothing is left (I3, I11); reading never waits (I10).
#![cfg(all(feature = "sim", feature = "conformance"))]

mod common;

use std::time::Duration;

use common::{check_published, id, spec, table};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use vmkit::sim::{Broken, Odds, SimProvider, World};
use vmkit::{Action, ConsoleSinks, Error, ErrorKind, Host, Instance, State, Status, Subscription, Timeouts, cleanup};

const MACHINES: [&str; 3] = ["a", "b", "c"];
const STEPS: usize = 60;

struct Watcher {
    vm: String,
    changes: Subscription,
    last: Option<Status>,
}

struct Run {
    world: World,
    rng: StdRng,
    hosts: Vec<Host<SimProvider>>,
    watchers: Vec<Watcher>,
    tasks: Vec<tokio::task::JoinHandle<()>>,
    reached: std::collections::BTreeSet<State>,
}

fn timeouts() -> Timeouts {
    let s = Duration::from_secs;
    Timeouts { clone: s(9), start: s(20), suspend: s(9), kill: s(5), delete: s(9), inspect: s(3), lock: s(60) }
}

/// What is refused has to be illegal by the table, in the state that the refusal names.
fn judge(action: Action, error: &Error) {
    if error.kind() == ErrorKind::IllegalRequest {
        let state = error.state().expect("a refusal names the state");
        let legal = table::LEGAL.iter().any(|row| (row.0, row.1) == (state, action));
        assert!(!legal, "{action} while {state} is legal, and was refused");
    }
}

async fn operate(vm: Instance, choice: u32, grace: Duration) {
    let (action, result) = match choice {
        0 => (Action::Clone, vm.clone_source().await),
        1 | 2 => (Action::Start, vm.start(ConsoleSinks::discard()).await),
        3 => (Action::Stop, vm.stop(grace).await.stop),
        4 => (Action::Stop, vm.kill().await.stop),
        5 => (Action::Suspend, vm.suspend().await),
        6 => (Action::Delete, vm.delete().await),
        7 => {
            // No request of the table, and legal where the machine is off.
            if let Err(error) = vm.prespawn().await
                && error.kind() == ErrorKind::IllegalRequest
            {
                let state = error.state().expect("a refusal names the state");
                assert!(!matches!(state, State::Stopped | State::Suspended), "{error:?}");
            }
            return;
        }
        _ => {
            let output = vm.command("echo").arg("hello").output().await;
            if let Ok(output) = &output {
                assert_eq!(output.stdout, b"hello\n");
            }
            return;
        }
    };
    if let Err(error) = result {
        judge(action, &error);
    }
}

impl Run {
    fn new(seed: u64) -> Run {
        let world = World::seeded(seed);
        world.latency(common::latency());
        let hosts = (0..2).map(|_| Host::new(SimProvider::new(world.clone()))).collect();
        Run {
            world,
            rng: StdRng::seed_from_u64(seed),
            hosts,
            watchers: Vec::new(),
            tasks: Vec::new(),
            reached: Default::default(),
        }
    }

    /// One process's handle on a machine: the one it has, the machine found, or a new one.
    async fn handle(&mut self, host: usize, name: &str) -> Option<Instance> {
        let host = self.hosts[host].clone();
        if let Some(vm) = host.get(&id(name)) {
            return Some(vm);
        }
        let vm = match host.adopt(&id(name)).await {
            Ok(vm) => vm,
            Err(_) => host.create(id(name), spec().timeouts(timeouts())).await.ok()?,
        };
        self.watchers.push(Watcher { vm: name.to_owned(), changes: vm.subscribe(), last: None });
        Some(vm)
    }

    async fn step(&mut self) {
        let name = MACHINES[self.rng.random_range(0..MACHINES.len())];
        match self.rng.random_range(0..12) {
            0 => {
                self.world.crash(&id(name), 1);
            }
            1 if !self.tasks.is_empty() => {
                let at = self.rng.random_range(0..self.tasks.len());
                self.tasks[at].abort();
            }
            2 => {
                // A process ends: its handles, its host and its tasks go, the machines stay.
                let host = self.rng.random_range(0..2);
                self.hosts[host] = Host::new(SimProvider::new(self.world.clone()));
            }
            _ => {
                let host = self.rng.random_range(0..2);
                let (choice, grace) = (self.rng.random_range(0..9), self.rng.random_range(0..3000));
                if let Some(vm) = self.handle(host, name).await {
                    let grace = Duration::from_millis(grace);
                    self.tasks.push(tokio::spawn(operate(vm, choice, grace)));
                }
            }
        }
        // Often at the same instant.
        let rest = self.rng.random_range(0..4000) * self.rng.random_range(0..2);
        tokio::time::sleep(Duration::from_millis(rest)).await;
        self.check().await;
    }

    async fn check(&mut self) {
        for watcher in &mut self.watchers {
            let mut seen = Vec::new();
            check_published(&mut watcher.changes, &mut watcher.last, &mut seen);
            self.reached.extend(seen);
        }
        for host in &self.hosts {
            for vm in MACHINES.iter().filter_map(|name| host.get(&id(name))) {
                // Neither may wait for an operation: time stands still here, so waiting would be for ever.
                let _ = (vm.state(), vm.properties());
            }
        }
        assert_eq!(self.world.violations(), Vec::<String>::new());
        let mut rest = Vec::new();
        for task in self.tasks.drain(..) {
            if !task.is_finished() {
                rest.push(task);
            } else if let Err(error) = task.await {
                assert!(error.is_cancelled(), "an operation panicked: {error}");
            }
        }
        self.tasks = rest;
    }

    async fn end(mut self) {
        self.world.heal();
        tokio::time::sleep(Duration::from_secs(1000)).await;
        self.check().await;
        assert_eq!(self.tasks.len(), 0, "operations that never end");
        for watcher in &self.watchers {
            let state = watcher.last.unwrap().state;
            assert!(!state.is_transitional() || self.gone(&watcher.vm), "{} was left {state}", watcher.vm);
        }
        let host = self.hosts[0].clone();
        for name in MACHINES {
            if let Some(vm) = self.handle(0, name).await {
                cleanup(&vm, Duration::from_secs(1), Duration::from_secs(600)).await.unwrap();
                assert!(matches!(vm.state(), State::Initial | State::Deleted), "cleaned up, and {}", vm.state());
            }
            assert!(host.get(&id(name)).is_none_or(|vm| !vm.state().is_transitional()));
        }
        // Nothing that one process cleaned up is there for the other.
        assert_eq!(self.world.residue(), Vec::<String>::new());
        self.check().await;
    }

    /// Whether no process has a handle on it any more: a host that ended publishes nothing further.
    fn gone(&self, name: &str) -> bool {
        self.hosts.iter().all(|host| host.get(&id(name)).is_none_or(|vm| !vm.state().is_transitional()))
    }
}

fn schedules(seeds: std::ops::Range<u64>, odds: Odds) {
    let seeds = match std::env::var("VMKIT_SEED").ok().and_then(|seed| seed.parse().ok()) {
        Some(seed) => seed..seed + 1,
        None => seeds,
    };
    for seed in seeds {
        let ran = std::panic::catch_unwind(|| {
            common::paused().block_on(async {
                let mut run = Run::new(seed);
                run.world.random_faults(odds);
                for _ in 0..STEPS {
                    run.step().await;
                }
                run.end().await;
            });
        });
        assert!(ran.is_ok(), "seed {seed}: VMKIT_SEED={seed} runs it alone");
    }
}

#[test]
fn schedules_without_faults() {
    schedules(0..150, Odds::default());
}

#[test]
fn schedules_with_rare_faults() {
    schedules(1000..1150, Odds::each(0.02));
}

#[test]
fn schedules_with_many_faults() {
    schedules(2000..2150, Odds::each(0.08));
}

/// The rules have teeth: without the lock between processes they are broken before long.
#[test]
fn schedules_without_a_lock_are_caught() {
    let caught = (0..50).any(|seed| {
        let ran = std::panic::catch_unwind(|| {
            common::paused().block_on(async {
                let mut run = Run::new(seed);
                run.world = run.world.clone().broken(Broken::NoLock);
                for _ in 0..STEPS {
                    run.step().await;
                }
            });
        });
        ran.is_err()
    });
    assert!(caught, "two processes without a lock, and nothing was noticed");
}

#[test]
fn schedules_reach_every_state() {
    let mut reached = std::collections::BTreeSet::new();
    for seed in 0..40 {
        reached.extend(common::paused().block_on(async {
            let mut run = Run::new(seed);
            run.world.random_faults(Odds::each(0.05));
            for _ in 0..STEPS {
                run.step().await;
            }
            run.reached
        }));
    }
    assert_eq!(reached.into_iter().collect::<Vec<_>>(), State::ALL);
}

#[test]
fn schedules_are_the_same_for_the_same_seed() {
    let calls = |seed| {
        common::paused().block_on(async {
            let mut run = Run::new(seed);
            run.world.random_faults(Odds::each(0.05));
            for _ in 0..STEPS {
                run.step().await;
            }
            run.world.calls()
        })
    };
    assert_eq!(calls(7), calls(7));
}
