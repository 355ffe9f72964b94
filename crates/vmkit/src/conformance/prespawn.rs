//! Processes that are started ahead of time, and wait for the state of a machine that is off.

use std::time::Duration;

use super::bench::{Bench, delete, drain, fails_as, start, stop};
use super::rig::{Program, Rig};
use crate::error::ErrorKind;
use crate::instance::Instance;
use crate::state::State;

/// A suspended machine that remembers a word, with a process that waits for it.
async fn waited_for<R: Rig>(bench: &Bench<R>, name: &str) -> Instance {
    let vm = bench.running(name).await;
    bench.say(&vm, Program::Remember("word".into(), "kept".into())).await;
    vm.suspend().await.unwrap_or_else(|e| panic!("suspending: {e:?}"));
    prespawn(&vm).await;
    vm
}

async fn prespawn(vm: &Instance) {
    vm.prespawn().await.unwrap_or_else(|e| panic!("starting its process ahead of time: {e:?}"));
}

async fn remembers<R: Rig>(bench: &Bench<R>, vm: &Instance) {
    assert!(bench.rig.executes(vm.id()).await, "it was resumed, and its processors stand still");
    assert_eq!(bench.say(vm, Program::Recall("word".into())).await, "kept", "memory after a resume");
    assert_eq!(bench.rig.processes(vm.id()).await, 1, "a machine that took up the process that waited");
}

pub(super) async fn a_waiting_process_changes_nothing<R: Rig>(bench: &Bench<R>) {
    if !bench.suspends() {
        return;
    }
    let vm = bench.suspended("waited-for").await;
    let mut changes = vm.subscribe();
    drain(&mut changes);
    for _ in 0..2 {
        prespawn(&vm).await;
        assert_eq!(vm.state(), State::Suspended, "a process waits for it");
        assert_eq!(drain(&mut changes), [], "a process that waits published a change");
        assert_eq!(bench.rig.processes(vm.id()).await, 1, "a process waits for it, once");
        assert!(!bench.rig.executes(vm.id()).await, "a machine that is off executes");
        assert!(bench.rig.saved_execution(vm.id()).await, "its saved execution is gone before it is started");
    }
    fails_as(vm.command("true").status().await, ErrorKind::NotRunning, "executing in a suspended machine");
    if bench.host.capabilities().adopt {
        let found = bench.host.list().await.unwrap_or_else(|e| panic!("listing: {e:?}"));
        let found = found.iter().find(|found| found.id == *vm.id()).unwrap_or_else(|| panic!("it is not listed"));
        assert_eq!((found.state, &found.problem), (State::Suspended, &None));
    }
}

pub(super) async fn a_start_takes_up_what_waits<R: Rig>(bench: &Bench<R>) {
    if !bench.suspends() {
        return;
    }
    let vm = waited_for(bench, "taken-up").await;
    start(&vm).await;
    remembers(bench, &vm).await;
    assert!(!bench.rig.saved_execution(vm.id()).await, "resumed, and its execution could be resumed again");
    let _ = stop(&vm, Duration::ZERO).await;
    bench.off(&vm).await;
    start(&vm).await;
}

pub(super) async fn a_waiting_process_that_is_gone_costs_nothing<R: Rig>(bench: &Bench<R>) {
    if !bench.suspends() {
        return;
    }
    let vm = waited_for(bench, "forsaken").await;
    bench.rig.kill_process(vm.id()).await;
    assert_eq!(vm.state(), State::Suspended, "the process that waited for it is gone");
    start(&vm).await;
    remembers(bench, &vm).await;
}

pub(super) async fn a_waiting_process_ends_with_its_machine<R: Rig>(bench: &Bench<R>) {
    if !bench.suspends() {
        return;
    }
    let vm = bench.suspended("given-up").await;
    prespawn(&vm).await;
    delete(&vm).await;
    bench.gone(&vm).await;
}

pub(super) async fn another_process_takes_up_what_waits<R: Rig>(bench: &Bench<R>) {
    if !bench.suspends() {
        return;
    }
    if !bench.host.capabilities().adopt {
        return bench.skip("its machines are not found by others");
    }
    let vm = waited_for(bench, "passed-on").await;
    let elsewhere = bench.elsewhere().await;
    let other = elsewhere.adopt(vm.id()).await.unwrap_or_else(|e| panic!("adopting: {e:?}"));
    assert_eq!(other.state(), State::Suspended, "found with a process that waits");
    start(&other).await;
    remembers(bench, &other).await;
}

pub(super) async fn only_what_is_off_is_waited_for<R: Rig>(bench: &Bench<R>) {
    let vm = bench.initial("not-off").await;
    fails_as(vm.prespawn().await, ErrorKind::IllegalRequest, "a process for a machine that is not there");
    vm.clone_source().await.unwrap_or_else(|e| panic!("cloning: {e:?}"));
    start(&vm).await;
    let before = vm.status();
    fails_as(vm.prespawn().await, ErrorKind::IllegalRequest, "a second process for a machine that runs");
    assert_eq!(vm.status(), before, "a refused request changed something");
    assert!(bench.rig.executes(vm.id()).await, "its processors stand still");
    let _ = stop(&vm, Duration::ZERO).await;
    let error = fails_as(vm.prespawn().await, ErrorKind::Unsupported, "waiting for a machine that boots from its disk");
    assert!(error.next_step().is_some(), "it does not say what to do next: {error:?}");
    bench.off(&vm).await;
    start(&vm).await;
}
