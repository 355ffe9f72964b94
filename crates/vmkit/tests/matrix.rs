//! Every operation, with every fault in every call it makes, while its caller stays, goes away, sends a kill, drops the
//! handle or drops the whole host. It ends settled, by legal edges, and afterwards a delete empties the world.
#![cfg(all(feature = "sim", feature = "conformance"))]

mod common;

use std::time::Duration;

use common::{check_published, id, machine, settled};
use vmkit::sim::{Fault, SimProvider, Verb, World};
use vmkit::{ConsoleSinks, ErrorKind, Host, Instance, Result, State};

#[derive(Clone, Copy, Debug, PartialEq)]
enum Operation {
    Clone,
    CloneAgain,
    Boot,
    Resume,
    StopGracefully,
    StopNow,
    Suspend,
    Delete,
    DeleteSuspended,
}

const OPERATIONS: [Operation; 9] = [
    Operation::Clone,
    Operation::CloneAgain,
    Operation::Boot,
    Operation::Resume,
    Operation::StopGracefully,
    Operation::StopNow,
    Operation::Suspend,
    Operation::Delete,
    Operation::DeleteSuspended,
];

#[derive(Clone, Copy, Debug, PartialEq)]
enum Caller {
    Stays,
    Drops,
    Kills,
    DropsHandle,
    DropsHost,
}

const CALLERS: [Caller; 5] = [Caller::Stays, Caller::Drops, Caller::Kills, Caller::DropsHandle, Caller::DropsHost];

fn faults() -> [Fault; 8] {
    let later = Duration::from_secs(2);
    [
        Fault::Ok,
        Fault::Err,
        Fault::ErrButDone,
        Fault::Lie,
        Fault::Hang,
        Fault::Slow(later),
        Fault::DieLater(later),
        Fault::Panic,
    ]
}

impl Operation {
    fn from(self) -> State {
        match self {
            Operation::Clone => State::Initial,
            Operation::CloneAgain => State::Deleted,
            Operation::Boot | Operation::Delete => State::Stopped,
            Operation::Resume | Operation::DeleteSuspended => State::Suspended,
            Operation::StopGracefully | Operation::StopNow | Operation::Suspend => State::Running,
        }
    }

    fn success(self) -> State {
        match self {
            Operation::Clone | Operation::CloneAgain | Operation::StopGracefully | Operation::StopNow => State::Stopped,
            Operation::Boot | Operation::Resume => State::Running,
            Operation::Suspend => State::Suspended,
            Operation::Delete | Operation::DeleteSuspended => State::Deleted,
        }
    }

    /// The calls it makes or may make.
    fn verbs(self) -> &'static [Verb] {
        match self {
            Operation::Clone | Operation::CloneAgain => &[Verb::Begin, Verb::Clone, Verb::Destroy, Verb::Inspect],
            Operation::Boot => &[Verb::Begin, Verb::Boot, Verb::Kill, Verb::Inspect, Verb::Exited],
            Operation::Resume => &[Verb::Begin, Verb::Resume, Verb::Kill, Verb::Inspect, Verb::Exited],
            Operation::StopGracefully => &[Verb::Begin, Verb::Shutdown, Verb::Kill, Verb::Inspect, Verb::Exited],
            Operation::StopNow => &[Verb::Begin, Verb::Kill, Verb::Inspect, Verb::Exited],
            Operation::Suspend => &[Verb::Begin, Verb::Suspend, Verb::Kill, Verb::Inspect],
            Operation::Delete | Operation::DeleteSuspended => &[Verb::Begin, Verb::Destroy, Verb::Kill, Verb::Inspect],
        }
    }

    /// The call that does its work; when that fails, recovery makes others.
    fn work(self) -> Verb {
        match self {
            Operation::Clone | Operation::CloneAgain => Verb::Clone,
            Operation::Boot => Verb::Boot,
            Operation::Resume => Verb::Resume,
            Operation::StopGracefully => Verb::Shutdown,
            Operation::StopNow => Verb::Kill,
            Operation::Suspend => Verb::Suspend,
            Operation::Delete | Operation::DeleteSuspended => Verb::Destroy,
        }
    }

    async fn run(self, vm: Instance) -> Result<()> {
        match self {
            Operation::Clone | Operation::CloneAgain => vm.clone_source().await,
            Operation::Boot | Operation::Resume => vm.start(ConsoleSinks::discard()).await,
            Operation::StopGracefully => vm.stop(Duration::from_secs(5)).await.stop,
            Operation::StopNow => vm.stop(Duration::ZERO).await.stop,
            Operation::Suspend => vm.suspend().await,
            Operation::Delete | Operation::DeleteSuspended => vm.delete().await,
        }
    }
}

/// One cell: a fault in one call, perhaps after the operation's own work has failed, so that recovery is what fails.
async fn cell(operation: Operation, verb: Verb, fault: Fault, work_fails: bool, caller: Caller) {
    let world = World::new();
    world.latency(common::latency());
    let mut host = Some(Host::new(SimProvider::new(world.clone())));
    let name = id("vm");
    let vm = machine(host.as_ref().unwrap(), "vm", operation.from()).await;
    let mut changes = vm.subscribe();
    let (mut last, mut seen) = (None, Vec::new());

    if work_fails {
        world.fault(Some(&name), operation.work(), Fault::Err);
    }
    world.fault(Some(&name), verb, fault);
    world.step_at(&[verb]);
    let mut running = tokio::spawn(operation.run(vm.clone()));
    // Not every call is made in every case: then the caller acts when all is over.
    let parked = tokio::time::timeout(Duration::from_secs(1000), world.wait_parked(&name, verb)).await.is_ok();
    let mut killing = None;
    let mut vm = Some(vm);
    match caller {
        Caller::Stays => {}
        Caller::Drops => running.abort(),
        Caller::Kills => {
            let vm = vm.clone().unwrap();
            killing = Some(tokio::spawn(async move { vm.kill().await }));
            tokio::task::yield_now().await;
        }
        Caller::DropsHandle | Caller::DropsHost => {
            running.abort();
            let _ = (&mut running).await;
            vm = None;
            if caller == Caller::DropsHost {
                host = None;
            }
        }
    }
    world.stepping(false);
    let ended = match vm {
        Some(_) => running.await.ok(),
        None => None,
    };
    if let Some(killing) = killing {
        // However it went: it is answered.
        let _ = killing.await.unwrap();
    }

    // Whoever comes next takes over what is there.
    let host = host.unwrap_or_else(|| Host::new(SimProvider::new(world.clone())));
    let found = match vm {
        Some(vm) => Some(vm),
        None => match host.adopt(&name).await {
            Ok(vm) => Some(vm),
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::NotFound, "{error:?}");
                None
            }
        },
    };
    // Longer than all deadlines together, so that the task has ended whatever hung.
    tokio::time::sleep(Duration::from_secs(2000)).await;
    check_published(&mut changes, &mut last, &mut seen);
    assert!(!last.unwrap().state.is_transitional(), "left in {}", last.unwrap().state);
    if let Some(Ok(())) = ended {
        assert!(seen.contains(&operation.success()), "succeeded without {}: {seen:?}", operation.success());
    }
    if (fault, work_fails, caller) == (Fault::Ok, false, Caller::Stays) {
        assert!(matches!(ended, Some(Ok(()))), "failed with no fault: {ended:?}");
        assert!(parked || matches!(verb, Verb::Kill | Verb::Destroy | Verb::Exited), "{verb:?} was not called");
    }

    world.heal();
    let vm = match found {
        Some(vm) => vm,
        None => match host.adopt(&name).await {
            Ok(vm) => vm,
            Err(_) => return assert_eq!(world.residue(), Vec::<String>::new(), "not found, and something is left"),
        },
    };
    match settled(&vm).await {
        State::Initial | State::Deleted => {}
        State::Running => {
            vm.stop(Duration::ZERO).await.stop.unwrap();
            vm.delete().await.unwrap();
        }
        State::Stopped | State::Suspended | State::ErrorUnknown => vm.delete().await.unwrap(),
        state => panic!("settled in {state}"),
    }
    assert!(matches!(vm.state(), State::Initial | State::Deleted), "after a delete: {}", vm.state());
    assert_eq!(world.residue(), Vec::<String>::new(), "after a delete");
    assert_eq!(world.violations(), Vec::<String>::new());
}

fn matrix(operation: Operation) {
    for &verb in operation.verbs() {
        for fault in faults() {
            for work_fails in [false, true] {
                if work_fails && verb == operation.work() {
                    continue;
                }
                for caller in CALLERS {
                    let at = format!("{operation:?}, {verb:?} {fault:?}, work fails: {work_fails}, caller {caller:?}");
                    if std::env::var_os("TRACE").is_some() {
                        eprintln!("{at}");
                    }
                    let ran = std::panic::catch_unwind(|| {
                        common::paused().block_on(cell(operation, verb, fault, work_fails, caller));
                    });
                    assert!(ran.is_ok(), "in cell: {at}");
                }
            }
        }
    }
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
    clone Clone
    clone_again CloneAgain
    boot Boot
    resume Resume
    stop_gracefully StopGracefully
    stop_now StopNow
    suspend Suspend
    delete Delete
    delete_suspended DeleteSuspended
}
