//! A conformance rig over simulated hardware.
#![allow(dead_code, reason = "each test file uses a part")]

pub mod pool;
pub mod table;

use std::time::Duration;

use vmkit::conformance::{Program, Rig};
use vmkit::sim::{Broken, Latency, SimProvider, World};
use vmkit::{ConsoleSinks, Host, Id, Instance, Source, Spec, State, Subscription};

pub fn id(name: &str) -> Id {
    Id::new(name).unwrap()
}

pub fn spec() -> Spec {
    Spec::new(Source::Alias("base".into()))
}

/// Time stands still until everybody waits.
pub fn paused() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap()
}

pub fn latency() -> Latency {
    let ms = Duration::from_millis;
    let (boot, prespawn, suspend) = (ms(4000), ms(1000), ms(700));
    Latency { clone: ms(300), boot, prespawn, suspend, shutdown: ms(1500), kill: ms(20), destroy: ms(50) }
}

/// Hardware that takes its time, and a host over it.
pub fn host() -> (World, Host<SimProvider>) {
    let world = World::new();
    world.latency(latency());
    (world.clone(), Host::new(SimProvider::new(world)))
}

pub struct SimRig(pub World);

impl SimRig {
    pub fn new() -> SimRig {
        let world = World::new();
        world.latency(latency());
        SimRig(world)
    }

    pub fn broken(how: Broken) -> SimRig {
        SimRig(SimRig::new().0.broken(how))
    }
}

impl Rig for SimRig {
    type Provider = SimProvider;

    async fn provider(&self) -> SimProvider {
        SimProvider::new(self.0.clone())
    }

    fn spec(&self) -> Spec {
        spec()
    }

    fn unclonable(&self) -> Option<Spec> {
        Some(Spec::new(Source::Alias("missing".into())))
    }

    fn command(&self, program: &Program) -> Vec<String> {
        match program {
            Program::Print(word) => vec!["echo".into(), word.clone()],
            Program::PrintError(word) => vec!["warn".into(), word.clone()],
            Program::Cat => vec!["cat".into()],
            Program::Exit(code) => vec!["exit".into(), code.to_string()],
            Program::Signal(signal) => vec!["signal".into(), signal.to_string()],
            Program::Sleep => vec!["sleep".into(), "infinity".into()],
            Program::Remember(key, word) => vec!["remember".into(), key.clone(), word.clone()],
            Program::Recall(key) => vec!["recall".into(), key.clone()],
            Program::Store(key, word) => vec!["store".into(), key.clone(), word.clone()],
            Program::Show(key) => vec!["cat".into(), key.clone()],
            Program::Env(name) => vec!["env".into(), name.clone()],
            Program::Directory => vec!["pwd".into()],
            Program::Hostname => vec!["hostname".into()],
            Program::Read(path) => vec!["cat".into(), path.clone()],
            Program::Produce(bytes) => vec!["produce".into(), bytes.to_string()],
            Program::Family => vec!["family".into()],
            Program::Alive(pid) => vec!["alive".into(), pid.to_string()],
            Program::Missing => vec!["/no/such/program".into()],
            Program::NotExecutable => vec!["/etc/hostname".into()],
        }
    }

    async fn processes(&self, id: &Id) -> usize {
        self.0.processes(id)
    }

    async fn executes(&self, id: &Id) -> bool {
        self.0.executes(id)
    }

    async fn artefacts(&self, id: &Id) -> Vec<String> {
        let disk = self.0.has_disk(id).then(|| "a disk".to_owned());
        disk.into_iter().chain(self.0.has_saved_execution(id).then(|| "a saved execution".to_owned())).collect()
    }

    async fn saved_execution(&self, id: &Id) -> bool {
        self.0.has_saved_execution(id)
    }

    async fn kill_process(&self, id: &Id) {
        self.0.signal(id, 9);
    }

    async fn plant_foreign(&self, id: &Id) {
        self.0.plant_foreign(id);
    }

    async fn foreign_intact(&self, id: &Id) -> bool {
        self.0.foreign_intact(id)
    }

    async fn finish(&self) {
        let violations = self.0.violations();
        assert!(violations.is_empty(), "violations: {violations:#?}");
    }
}

/// Checks every change that was published since the last look: each an edge of the tables, each one generation on.
pub fn check_published(changes: &mut Subscription, last: &mut Option<vmkit::Status>, seen: &mut Vec<State>) {
    while let Some(next) = changes.try_next() {
        if let Some(last) = last {
            assert_eq!(next.generation, last.generation + 1, "a change was missed: {last:?}, then {next:?}");
            assert!(table::is_an_edge(last.state, next.state), "{} to {} is in no table", last.state, next.state);
        }
        seen.push(next.state);
        *last = Some(next);
    }
}

/// A machine brought to a settled state.
pub async fn machine(host: &Host<SimProvider>, name: &str, state: State) -> Instance {
    let vm = host.create(id(name), spec()).await.unwrap();
    if state == State::Initial {
        return vm;
    }
    vm.clone_source().await.unwrap();
    match state {
        State::Stopped => {}
        State::Deleted => vm.delete().await.unwrap(),
        State::Running => vm.start(ConsoleSinks::discard()).await.unwrap(),
        State::Suspended => {
            vm.start(ConsoleSinks::discard()).await.unwrap();
            vm.suspend().await.unwrap();
        }
        state => panic!("a machine cannot simply be {state}"),
    }
    assert_eq!(vm.state(), state);
    vm
}

/// Waits until it is not in the middle of anything: longer than all deadlines together, and not for ever.
pub async fn settled(vm: &Instance) -> State {
    let mut changes = vm.subscribe();
    let settling = async {
        while let Some(status) = changes.next().await {
            if !status.state.is_transitional() {
                return status.state;
            }
        }
        vm.state()
    };
    let limit = Duration::from_secs(10_000);
    tokio::time::timeout(limit, settling).await.unwrap_or_else(|_| panic!("still {} after {limit:?}", vm.state()))
}
