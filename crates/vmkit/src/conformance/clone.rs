//! Making a machine and removing it.

use super::bench::{Bench, delete, fails_as, id, settled, start, stop};
use super::rig::{Program, Rig};
use crate::driver::{Driver, Provider};
use crate::error::ErrorKind;
use crate::state::{Action, Fact, State};
use std::time::Duration;

pub(super) async fn a_machine_is_made_of_nothing<R: Rig>(bench: &Bench<R>) {
    let vm = bench.initial("fresh").await;
    assert_eq!(vm.id().as_str(), "fresh");
    assert_eq!(vm.state(), State::Initial);
    bench.gone(&vm).await;
}

pub(super) async fn a_name_is_taken_once<R: Rig>(bench: &Bench<R>) {
    let _vm = bench.initial("twice").await;
    let again = bench.host.create(id("twice"), bench.rig.spec()).await;
    fails_as(again, ErrorKind::AlreadyExists, "creating a second machine of one name");
}

pub(super) async fn cloning_ends_stopped<R: Rig>(bench: &Bench<R>) {
    let vm = bench.stopped("made").await;
    assert!(!bench.rig.artefacts(vm.id()).await.is_empty(), "cloned, and nothing is there");
    bench.off(&vm).await;
}

pub(super) async fn a_foreign_machine_stays_untouched<R: Rig>(bench: &Bench<R>) {
    let name = id("theirs");
    bench.rig.plant_foreign(&name).await;
    let vm = bench.host.create(name.clone(), bench.rig.spec()).await.unwrap_or_else(|e| panic!("creating: {e:?}"));
    fails_as(vm.clone_source().await, ErrorKind::AlreadyExists, "cloning over somebody else's machine");
    assert_eq!(vm.state(), State::Initial);
    assert!(bench.rig.foreign_intact(&name).await, "somebody else's machine was touched by a clone");
    fails_as(vm.delete().await, ErrorKind::IllegalRequest, "deleting what was never made");
    let listed = bench.host.list().await.unwrap_or_else(|e| panic!("listing: {e:?}"));
    assert!(listed.iter().all(|found| found.id != name), "somebody else's machine is listed as ours");
    crate::cleanup(&vm, Duration::ZERO, Duration::from_secs(60)).await.unwrap_or_else(|e| panic!("cleaning up: {e:?}"));
    assert!(bench.rig.foreign_intact(&name).await, "somebody else's machine was touched by a cleanup");
}

pub(super) async fn cloning_again_gives_fresh_content<R: Rig>(bench: &Bench<R>) {
    let vm = bench.running("again").await;
    bench.say(&vm, Program::Store("kept".into(), "old".into())).await;
    assert_eq!(bench.say(&vm, Program::Show("kept".into())).await, "old", "a file that was just written");
    let _ = stop(&vm, Duration::ZERO).await;
    delete(&vm).await;
    bench.gone(&vm).await;
    vm.clone_source().await.unwrap_or_else(|e| panic!("cloning again: {e:?}"));
    assert_eq!(vm.state(), State::Stopped);
    start(&vm).await;
    let shown = bench.execute(&vm, Program::Show("kept".into())).await;
    assert!(!shown.status.success(), "a clone of a deleted machine has its old files");
}

pub(super) async fn a_failed_clone_leaves_nothing<R: Rig>(bench: &Bench<R>) {
    let Some(spec) = bench.rig.unclonable() else {
        return bench.skip("the rig has no source that is missing");
    };
    let vm = bench.make("unmade", spec).await;
    assert!(vm.clone_source().await.is_err(), "a clone of a missing source succeeded");
    assert_eq!(vm.state(), State::Initial, "after a clone that failed");
    bench.gone(&vm).await;
}

pub(super) async fn a_dropped_clone_settles<R: Rig>(bench: &Bench<R>) {
    let vm = bench.initial("dropped").await;
    let mut changes = vm.subscribe();
    tokio::select! {
        biased;
        _ = vm.clone_source() => {}
        () = super::bench::sees(&mut changes, State::Cloning) => {}
    }
    match settled(&vm).await {
        State::Initial => bench.gone(&vm).await,
        // It was quicker than we.
        State::Stopped => bench.off(&vm).await,
        state => panic!("a dropped clone settled in {state}"),
    }
}

pub(super) async fn deleting_leaves_nothing<R: Rig>(bench: &Bench<R>) {
    let vm = bench.stopped("gone").await;
    delete(&vm).await;
    bench.gone(&vm).await;
    fails_as(vm.delete().await, ErrorKind::IllegalRequest, "deleting twice");
    let listed = bench.host.list().await.unwrap_or_else(|e| panic!("listing: {e:?}"));
    assert!(listed.iter().all(|found| found.id != *vm.id()), "a deleted machine is listed");
}

/// At the driver itself: nothing above it destroys twice.
pub(super) async fn destroying_is_idempotent<R: Rig>(bench: &Bench<R>) {
    let name = id("nothing");
    let mut driver = bench.host.provider().open(&name, &bench.rig.spec()).await.unwrap_or_else(|e| panic!("{e:?}"));
    for made in [false, true] {
        driver.begin(Action::Clone).await.unwrap_or_else(|e| panic!("begin: {e:?}"));
        if made {
            driver.clone_source().await.unwrap_or_else(|e| panic!("cloning: {e:?}"));
            assert_eq!(driver.inspect().await.ok(), Some(Fact::Stopped), "after a clone");
        }
        for time in ["once", "twice"] {
            driver.destroy().await.unwrap_or_else(|e| panic!("destroying {time}, made: {made}: {e:?}"));
        }
        assert_eq!(driver.inspect().await.ok(), Some(Fact::Absent), "after a destroy");
        driver.end();
        let left = bench.rig.artefacts(&name).await;
        assert!(left.is_empty(), "destroyed, and left {left:?}");
    }
}
