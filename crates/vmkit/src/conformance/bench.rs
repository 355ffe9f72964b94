//! What every case needs: a host, machines in a certain state, and looking until something is so.

use std::future::Future;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use super::rig::{Program, Rig};
use crate::cleanup::cleanup;
use crate::command::{Command, Output};
use crate::console::ConsoleSinks;
use crate::error::{Error, ErrorKind, Result};
use crate::host::Host;
use crate::instance::Instance;
use crate::publish::Subscription;
use crate::spec::{Id, Spec};
use crate::state::State;

/// Long enough for a guest under slow emulation to shut down.
pub(super) const GRACE: Duration = Duration::from_secs(60);
/// Long enough for anything that is to become so.
const SOON: Duration = Duration::from_secs(30);

/// A rig, a host over it, and the machines that a case made.
pub struct Bench<R: Rig> {
    pub(super) rig: R,
    pub(super) host: Host<R::Provider>,
    case: String,
    made: Mutex<Vec<Instance>>,
}

impl<R: Rig> Bench<R> {
    pub(super) async fn new(rig: R, case: &str) -> Bench<R> {
        let host = Host::new(rig.provider().await);
        Bench { rig, host, case: case.to_owned(), made: Mutex::default() }
    }

    /// Removes what the case left, and has the rig look at everything once more.
    pub(super) async fn finish(&self) {
        let made = std::mem::take(&mut *self.made.lock().unwrap_or_else(PoisonError::into_inner));
        for vm in &made {
            cleanup(vm, Duration::ZERO, GRACE * 2)
                .await
                .unwrap_or_else(|e| panic!("cleaning up after the case: {e:?}"));
            let left = self.rig.artefacts(vm.id()).await;
            assert!(left.is_empty(), "{} is deleted and left {left:?}", vm.id());
            assert_eq!(self.rig.processes(vm.id()).await, 0, "{} is deleted and has processes", vm.id());
        }
        self.rig.finish().await;
    }

    pub(super) fn skip(&self, why: &str) {
        self.rig.skipped(&self.case, why);
    }

    /// Whether machines can be suspended; says so when not.
    pub(super) fn suspends(&self) -> bool {
        let can = self.host.capabilities().suspend;
        if !can {
            self.skip("its machines cannot be suspended");
        }
        can
    }

    pub(super) fn forks(&self) -> bool {
        let can = self.host.capabilities().fork;
        if !can {
            self.skip("its machines cannot be forked");
        }
        can
    }

    /// What another process has.
    pub(super) async fn elsewhere(&self) -> Host<R::Provider> {
        Host::new(self.rig.provider().await)
    }

    pub(super) async fn initial(&self, name: &str) -> Instance {
        self.make(name, self.rig.spec()).await
    }

    pub(super) async fn make(&self, name: &str, spec: Spec) -> Instance {
        let vm = self.host.create(id(name), spec).await.unwrap_or_else(|e| panic!("creating {name}: {e:?}"));
        self.made.lock().unwrap_or_else(PoisonError::into_inner).push(vm.clone());
        vm
    }

    pub(super) async fn stopped(&self, name: &str) -> Instance {
        let vm = self.initial(name).await;
        vm.clone_source().await.unwrap_or_else(|e| panic!("cloning: {e:?}"));
        assert_eq!(vm.state(), State::Stopped, "after a clone");
        vm
    }

    pub(super) async fn running(&self, name: &str) -> Instance {
        let vm = self.stopped(name).await;
        start(&vm).await;
        assert!(self.rig.executes(vm.id()).await, "{name} is Running, and its processors stand still");
        vm
    }

    pub(super) async fn suspended(&self, name: &str) -> Instance {
        let vm = self.running(name).await;
        vm.suspend().await.unwrap_or_else(|e| panic!("suspending: {e:?}"));
        assert_eq!(vm.state(), State::Suspended, "after a suspend");
        vm
    }

    pub(super) fn command(&self, vm: &Instance, program: Program) -> Command {
        let words = self.rig.command(&program);
        let (program, args) = words.split_first().unwrap_or_else(|| panic!("the rig spells {program:?} as nothing"));
        vm.command(program).args(args)
    }

    pub(super) async fn execute(&self, vm: &Instance, program: Program) -> Output {
        let name = format!("{program:?}");
        self.command(vm, program).output().await.unwrap_or_else(|e| panic!("executing {name}: {e:?}"))
    }

    /// What a program that has to succeed prints, without white space around it.
    pub(super) async fn say(&self, vm: &Instance, program: Program) -> String {
        let name = format!("{program:?}");
        let output = self.execute(vm, program).await;
        assert!(output.status.success(), "{name} ended with {}", output.status);
        String::from_utf8_lossy(&output.stdout).trim().to_owned()
    }

    pub(super) async fn off(&self, vm: &Instance) {
        let left = self.rig.processes(vm.id()).await;
        assert_eq!(left, 0, "{} is {} and has processes", vm.id(), vm.state());
        assert!(!self.rig.executes(vm.id()).await, "{} is {} and its processors run", vm.id(), vm.state());
    }

    pub(super) async fn gone(&self, vm: &Instance) {
        self.off(vm).await;
        let left = self.rig.artefacts(vm.id()).await;
        assert!(left.is_empty(), "{} is {} and left {left:?}", vm.id(), vm.state());
    }
}

pub(super) fn id(name: &str) -> Id {
    Id::new(name).unwrap_or_else(|e| panic!("{e:?}"))
}

pub(super) async fn start(vm: &Instance) {
    vm.start(ConsoleSinks::discard()).await.unwrap_or_else(|e| panic!("starting: {e:?}"));
    assert_eq!(vm.state(), State::Running, "after a start");
}

/// Stops it, which has to work, and returns its run error.
pub(super) async fn stop(vm: &Instance, grace: Duration) -> Result<()> {
    let report = vm.stop(grace).await;
    report.stop.unwrap_or_else(|e| panic!("stopping: {e:?}"));
    assert_eq!(vm.state(), State::Stopped, "after a stop");
    report.run
}

pub(super) async fn delete(vm: &Instance) {
    vm.delete().await.unwrap_or_else(|e| panic!("deleting: {e:?}"));
    assert_eq!(vm.state(), State::Deleted, "after a delete");
}

#[track_caller]
pub(super) fn fails_as<T>(result: Result<T>, kind: ErrorKind, what: &str) -> Error {
    match result {
        Ok(_) => panic!("{what} succeeded, expected {}", kind.code()),
        Err(error) if error.kind() == kind => error,
        Err(error) => panic!("{what} failed with {error:?}, expected {}", kind.code()),
    }
}

/// Looks until it is so.
pub(super) async fn eventually<F: Future<Output = bool>>(what: &str, mut so: impl FnMut() -> F) {
    let end = Instant::now() + SOON;
    while !so().await {
        assert!(Instant::now() < end, "not within {SOON:?}: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Waits until a state is published, or ends with the last one before.
pub(super) async fn sees(changes: &mut Subscription, state: State) {
    while let Some(status) = changes.next().await {
        if status.state == state {
            return;
        }
    }
    panic!("nobody publishes any more, and {state} was not seen");
}

/// Waits until it settles, and says where.
pub(super) async fn settled(vm: &Instance) -> State {
    let mut changes = vm.subscribe();
    while let Some(status) = changes.next().await {
        if !status.state.is_transitional() {
            return status.state;
        }
    }
    vm.state()
}

/// Every state that was published until now.
pub(super) fn drain(changes: &mut Subscription) -> Vec<State> {
    std::iter::from_fn(|| changes.try_next()).map(|status| status.state).collect()
}
