//! Suspending and resuming.

use std::time::Duration;

use super::bench::{Bench, delete, fails_as, start, stop};
use super::rig::{Program, Rig};
use crate::error::ErrorKind;
use crate::state::State;

fn remember() -> Program {
    Program::Remember("word".into(), "kept".into())
}

fn recall() -> Program {
    Program::Recall("word".into())
}

pub(super) async fn suspendable_is_constant<R: Rig>(bench: &Bench<R>) {
    let vm = bench.initial("constant").await;
    let can = vm.suspendable();
    vm.clone_source().await.unwrap_or_else(|e| panic!("cloning: {e:?}"));
    assert_eq!(vm.suspendable(), can);
    start(&vm).await;
    assert_eq!(vm.suspendable(), can);
    if !can {
        let before = vm.status();
        fails_as(vm.suspend().await, ErrorKind::Unsupported, "suspending a machine that cannot be");
        assert_eq!(vm.status(), before, "a refused suspend changed something");
    }
}

pub(super) async fn suspending_keeps_the_execution<R: Rig>(bench: &Bench<R>) {
    if !bench.suspends() {
        return;
    }
    let vm = bench.running("kept").await;
    bench.say(&vm, remember()).await;
    let child = bench.command(&vm, Program::Sleep).detached(true).spawn().await;
    let child = child.unwrap_or_else(|e| panic!("spawning: {e:?}"));
    let pid = child.id();
    vm.suspend().await.unwrap_or_else(|e| panic!("suspending: {e:?}"));
    start(&vm).await;
    assert!(bench.rig.executes(vm.id()).await, "it was resumed, and its processors stand still");
    assert_eq!(bench.say(&vm, recall()).await, "kept", "memory after a resume");
    let alive = bench.execute(&vm, Program::Alive(pid)).await;
    assert!(alive.status.success(), "a detached process did not survive a suspend");
}

pub(super) async fn suspending_leaves_no_process<R: Rig>(bench: &Bench<R>) {
    if !bench.suspends() {
        return;
    }
    let vm = bench.suspended("cold").await;
    bench.off(&vm).await;
    assert!(bench.rig.saved_execution(vm.id()).await, "Suspended, and no execution is saved");
    fails_as(vm.command("true").status().await, ErrorKind::NotRunning, "executing in a suspended machine");
}

pub(super) async fn resuming_spends_the_execution<R: Rig>(bench: &Bench<R>) {
    if !bench.suspends() {
        return;
    }
    let vm = bench.suspended("spent").await;
    start(&vm).await;
    assert!(!bench.rig.saved_execution(vm.id()).await, "resumed, and its execution could be resumed again");
    let _ = stop(&vm, Duration::ZERO).await;
    start(&vm).await;
}

pub(super) async fn stopping_loses_the_memory<R: Rig>(bench: &Bench<R>) {
    let vm = bench.running("forgets").await;
    bench.say(&vm, remember()).await;
    assert_eq!(bench.say(&vm, recall()).await, "kept", "memory that was just written");
    let _ = stop(&vm, Duration::ZERO).await;
    start(&vm).await;
    let recalled = bench.execute(&vm, recall()).await;
    assert!(!recalled.status.success(), "memory survived a stop");
}

pub(super) async fn suspending_twice_publishes_nothing<R: Rig>(bench: &Bench<R>) {
    if !bench.suspends() {
        return;
    }
    let vm = bench.suspended("twice").await;
    let before = vm.status();
    vm.suspend().await.unwrap_or_else(|e| panic!("suspending twice: {e:?}"));
    assert_eq!(vm.status(), before, "an idempotent suspend published something");
}

pub(super) async fn a_suspended_machine_is_deleted<R: Rig>(bench: &Bench<R>) {
    if !bench.suspends() {
        return;
    }
    let vm = bench.suspended("discarded").await;
    delete(&vm).await;
    bench.gone(&vm).await;
    assert!(!bench.rig.saved_execution(vm.id()).await, "deleted, and its execution is still saved");
    assert_eq!(vm.state(), State::Deleted);
}
