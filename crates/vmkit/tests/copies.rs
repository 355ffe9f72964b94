//! Forks of machines that run: all copies or none, whatever fails and whoever goes away.
#![cfg(all(feature = "sim", feature = "conformance"))]

mod common;

use std::time::Duration;

use common::{host, id, machine, spec};
use vmkit::sim::{Fault, Latency, Verb, World};
use vmkit::{ConsoleSinks, ErrorKind, Host, State};

const SECOND: Duration = Duration::from_secs(1);

/// What is left of copies; the original stays.
fn left(world: &World) -> Vec<String> {
    let copies = ["a", "b", "c"].map(id);
    copies.iter().filter(|copy| world.has_disk(copy) || world.processes(copy) > 0).map(ToString::to_string).collect()
}

#[tokio::test(start_paused = true)]
async fn one_copy_that_fails_takes_the_others_with_it() {
    let (world, host) = host();
    let vm = machine(&host, "vm", State::Running).await;
    world.fault(Some(&id("b")), Verb::Boot, Fault::Err);
    let failed = vm.fork_as(&["a", "b", "c"].map(id)).await.unwrap_err();
    assert_eq!((failed.kind(), failed.instance()), (ErrorKind::Backend, Some("b")), "{failed:?}");
    assert_eq!((left(&world), vm.state()), (Vec::new(), State::Running));
    // And the names are free again.
    let copies = vm.fork_as(&["a", "b", "c"].map(id)).await.unwrap();
    assert!(copies.iter().all(|copy| copy.state() == State::Running));
    assert_eq!(world.violations(), [""; 0]);
}

#[tokio::test(start_paused = true)]
async fn a_fork_that_nobody_waits_for_any_more_is_undone() {
    // While it saves, clones, boots; and while what failed is taken back.
    for millis in [500, 1_500, 2_500, 3_500, 4_500] {
        let (world, host) = host();
        let vm = machine(&host, "vm", State::Running).await;
        world.latency(Latency { clone: SECOND, boot: SECOND, suspend: SECOND, destroy: SECOND, ..Latency::default() });
        world.fault(Some(&id("c")), Verb::Boot, Fault::ErrButDone);
        let names = ["a", "b", "c"].map(id);
        let gone = tokio::time::timeout(Duration::from_millis(millis), vm.fork_as(&names)).await;
        assert!(gone.is_err(), "it was over within {millis} ms");
        tokio::time::sleep(60 * SECOND).await;
        assert_eq!((left(&world), vm.state()), (Vec::new(), State::Running), "after {millis} ms");
        assert_eq!(world.violations(), [""; 0]);
        drop(host);
    }
}

#[tokio::test(start_paused = true)]
async fn what_goes_wrong_with_a_snapshot_leaves_the_original_running() {
    let (world, host) = host();
    let vm = machine(&host, "vm", State::Running).await;
    for fault in [Fault::Err, Fault::ErrButDone, Fault::Panic] {
        world.fault(None, Verb::Snapshot, fault);
        assert!(vm.fork(1).await.is_err(), "{fault:?}");
        assert_eq!(vm.state(), State::Running, "{fault:?}");
        vm.ping().await.unwrap();
    }
    // One that lies about it is found out at the first copy.
    world.fault(None, Verb::Snapshot, Fault::Lie);
    assert_eq!(vm.fork(1).await.unwrap_err().kind(), ErrorKind::NotFound);
    // A forced stop reaches one that hangs.
    world.fault(None, Verb::Snapshot, Fault::Hang);
    let forking = tokio::spawn({
        let vm = vm.clone();
        async move { vm.fork(1).await }
    });
    tokio::time::sleep(SECOND).await;
    vm.kill().await.stop.unwrap();
    assert_eq!((forking.await.unwrap().unwrap_err().kind(), vm.state()), (ErrorKind::Cancelled, State::Stopped));
    assert_eq!(world.violations(), [""; 0]);
}

#[tokio::test(start_paused = true)]
async fn a_machine_that_ends_while_it_is_forked_has_ended_as_ever() {
    let (world, host) = host();
    let vm = machine(&host, "vm", State::Running).await;
    world.latency(Latency { suspend: 5 * SECOND, ..Latency::default() });
    let forking = tokio::spawn({
        let vm = vm.clone();
        async move { vm.fork(1).await }
    });
    tokio::time::sleep(SECOND).await;
    assert!(world.crash(&id("vm"), 3));
    assert_eq!(forking.await.unwrap().unwrap_err().kind(), ErrorKind::Exited);
    tokio::time::sleep(SECOND).await;
    assert_eq!(vm.state(), State::Stopped);
    let report = vm.stop(SECOND).await;
    assert_eq!(report.run.unwrap_err().kind(), ErrorKind::Exited, "how it ended is told once");
}

#[tokio::test(start_paused = true)]
async fn names_are_numbers_and_free_ones() {
    let (_world, host) = host();
    let vm = machine(&host, "vm", State::Running).await;
    let taken = host.create(id("vm-2"), spec()).await.unwrap();
    let copies = vm.fork(2).await.unwrap();
    assert_eq!(copies.iter().map(|copy| copy.id().as_str()).collect::<Vec<_>>(), ["vm-1", "vm-3"]);
    let twice = vm.fork_as(&["a", "b", "a"].map(id)).await.unwrap_err();
    assert_eq!((twice.kind(), twice.instance()), (ErrorKind::InvalidArgument, Some("vm")), "{twice:?}");
    let known = vm.fork_as(&["a", "vm-2"].map(id)).await.unwrap_err();
    assert_eq!((known.kind(), known.instance()), (ErrorKind::AlreadyExists, Some("vm-2")), "{known:?}");
    drop(taken);
    // A name as long as names may be.
    let long = machine(&host, &"x".repeat(63), State::Running).await;
    let copy = long.fork(1).await.unwrap().remove(0);
    assert_eq!(copy.id().as_str(), "x".repeat(61) + "-1");
    // A machine whose host is gone has nobody to make others.
    let weak: Host<_> = host;
    drop((copies, copy, weak));
    assert_eq!(vm.fork(1).await.unwrap_err().kind(), ErrorKind::Cancelled);
}

#[tokio::test(start_paused = true)]
async fn forks_at_once_take_different_names() {
    let (world, host) = host();
    let vm = machine(&host, "vm", State::Running).await;
    let forks = futures::future::try_join_all((0..4).map(|_| vm.fork(2))).await.unwrap();
    let mut names: Vec<_> = forks.iter().flatten().map(|copy| copy.id().to_string()).collect();
    names.sort();
    assert_eq!(names, (1..=8).map(|number| format!("vm-{number}")).collect::<Vec<_>>());
    assert!(forks.iter().flatten().all(|copy| copy.state() == State::Running));
    assert_eq!(world.violations(), [""; 0]);
}

#[tokio::test(start_paused = true)]
async fn a_numbered_fork_is_undone_as_a_named_one() {
    let numbers = ["vm-1", "vm-2", "vm-3"].map(id);
    for millis in [500, 1_500, 2_500, 3_500] {
        let (world, host) = host();
        let vm = machine(&host, "vm", State::Running).await;
        world.latency(Latency { clone: SECOND, boot: SECOND, suspend: SECOND, destroy: SECOND, ..Latency::default() });
        world.fault(Some(&numbers[2]), Verb::Boot, Fault::ErrButDone);
        assert!(tokio::time::timeout(Duration::from_millis(millis), vm.fork(3)).await.is_err(), "{millis} ms");
        tokio::time::sleep(60 * SECOND).await;
        assert!(!numbers.iter().any(|copy| world.has_disk(copy) || world.processes(copy) > 0), "{millis} ms");
        world.heal();
        // All of them are free again.
        let copies = vm.fork(3).await.unwrap();
        assert_eq!(copies.iter().map(|copy| copy.id().clone()).collect::<Vec<_>>(), numbers);
        assert_eq!(world.violations(), [""; 0]);
    }
}

#[tokio::test(start_paused = true)]
async fn a_number_of_copies_that_nobody_can_mean_is_refused() {
    let (_world, host) = host();
    let vm = machine(&host, "vm", State::Running).await;
    for n in [0, 10_001, usize::MAX] {
        let refused = vm.fork(n).await.unwrap_err();
        assert_eq!((refused.kind(), refused.instance()), (ErrorKind::InvalidArgument, Some("vm")), "{refused:?}");
        assert!(refused.next_step().is_some(), "{refused:?}");
    }
    assert_eq!(vm.fork_as(&[]).await.unwrap_err().kind(), ErrorKind::InvalidArgument);
}

#[tokio::test(start_paused = true)]
async fn copies_have_the_labels_that_are_their_owners() {
    let (_world, host) = host();
    let spec = spec().label("team", "x").label("vmkit.pool", "ci").label("vmkit.run", "word").label("vmkit", "y");
    let vm = host.create(id("vm"), spec).await.unwrap();
    vm.clone_source().await.unwrap();
    vm.start(ConsoleSinks::discard()).await.unwrap();
    let copy = vm.fork(1).await.unwrap().remove(0);
    let labels: Vec<_> = copy.spec().labels.iter().map(|(key, value)| (key.as_str(), value.as_str())).collect();
    assert_eq!(labels, [("team", "x"), ("vmkit", "y")]);
}
