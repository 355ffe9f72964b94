//! Copies of a machine that runs.

use std::time::Duration;

use super::bench::{Bench, delete, drain, fails_as, id, start, stop};
use super::rig::{Program, Rig};
use crate::error::ErrorKind;
use crate::instance::Instance;
use crate::state::State;

fn recall() -> Program {
    Program::Recall("word".into())
}

async fn fork<R: Rig>(bench: &Bench<R>, vm: &Instance, names: &[&str]) -> Vec<Instance> {
    let names: Vec<_> = names.iter().map(|name| id(name)).collect();
    let copies = vm.fork_as(&names).await.unwrap_or_else(|e| panic!("forking: {e:?}"));
    assert_eq!(copies.iter().map(|copy| copy.id().clone()).collect::<Vec<_>>(), names);
    for copy in &copies {
        assert_eq!(copy.state(), State::Running, "a copy");
        assert!(bench.rig.executes(copy.id()).await, "a copy's processors stand still");
    }
    copies
}

pub(super) async fn copies_go_on_where_it_was<R: Rig>(bench: &Bench<R>) {
    if !bench.forks() {
        return;
    }
    let vm = bench.running("original").await;
    bench.say(&vm, Program::Remember("word".into(), "kept".into())).await;
    bench.say(&vm, Program::Store("file".into(), "written".into())).await;
    let copies = fork(bench, &vm, &["copy-a", "copy-b"]).await;
    for copy in &copies {
        assert_eq!(bench.say(copy, recall()).await, "kept", "a copy's memory");
        assert_eq!(bench.say(copy, Program::Show("file".into())).await, "written", "a copy's disk");
    }
    // From then on each is its own.
    bench.say(&copies[0], Program::Remember("word".into(), "mine".into())).await;
    bench.say(&copies[0], Program::Store("file".into(), "mine".into())).await;
    for other in [&vm, &copies[1]] {
        assert_eq!(bench.say(other, recall()).await, "kept", "memory of {} after its copy wrote", other.id());
        assert_eq!(bench.say(other, Program::Show("file".into())).await, "written", "disk of {}", other.id());
    }
    // A copy that stops has its disk, and no memory.
    let _ = stop(&copies[0], Duration::ZERO).await;
    start(&copies[0]).await;
    assert!(!bench.execute(&copies[0], recall()).await.status.success(), "memory survived a stop");
    for vm in copies.iter().chain([&vm]) {
        let _ = stop(vm, Duration::ZERO).await;
        delete(vm).await;
        bench.gone(vm).await;
    }
}

pub(super) async fn the_original_runs_on<R: Rig>(bench: &Bench<R>) {
    if !bench.forks() {
        return;
    }
    let vm = bench.running("goes-on").await;
    let child = bench.command(&vm, Program::Sleep).spawn().await.unwrap_or_else(|e| panic!("spawning: {e:?}"));
    let mut changes = vm.subscribe();
    drain(&mut changes);
    let copies = fork(bench, &vm, &["goes-on-too"]).await;
    assert_eq!(vm.state(), State::Running, "a machine that was forked");
    assert_eq!(drain(&mut changes), [], "a fork published a change of its original");
    assert!(bench.rig.executes(vm.id()).await, "it was forked, and its processors stand still");
    let alive = bench.execute(&vm, Program::Alive(child.id())).await;
    assert!(alive.status.success(), "a command of the original did not survive its fork");
    drop(child);
    for vm in copies.iter().chain([&vm]) {
        let _ = stop(vm, Duration::ZERO).await;
        delete(vm).await;
    }
}

pub(super) async fn a_copy_of_a_copy<R: Rig>(bench: &Bench<R>) {
    if !bench.forks() {
        return;
    }
    let vm = bench.running("first").await;
    bench.say(&vm, Program::Store("file".into(), "first".into())).await;
    let second = fork(bench, &vm, &["second"]).await.remove(0);
    let _ = stop(&vm, Duration::ZERO).await;
    delete(&vm).await;
    bench.say(&second, Program::Remember("word".into(), "second".into())).await;
    let third = fork(bench, &second, &["third"]).await.remove(0);
    let _ = stop(&second, Duration::ZERO).await;
    delete(&second).await;
    assert_eq!(bench.say(&third, recall()).await, "second");
    assert_eq!(bench.say(&third, Program::Show("file".into())).await, "first");
}

pub(super) async fn only_what_runs_is_forked<R: Rig>(bench: &Bench<R>) {
    if !bench.forks() {
        return;
    }
    let vm = bench.stopped("off").await;
    let before = vm.status();
    fails_as(vm.fork(1).await, ErrorKind::IllegalRequest, "forking a machine that is off");
    assert_eq!(vm.status(), before, "a refused fork changed something");
    fails_as(vm.fork(0).await, ErrorKind::InvalidArgument, "no copies at all");
    let taken = [id("on"), id("off")];
    start(&vm).await;
    fails_as(vm.fork_as(&taken).await, ErrorKind::AlreadyExists, "a copy of a name that is taken");
    fails_as(vm.fork_as(&[id("on"), id("on")]).await, ErrorKind::InvalidArgument, "two copies of one name");
    assert!(bench.rig.artefacts(&id("on")).await.is_empty(), "a fork that failed left a copy");
    assert_eq!(vm.state(), State::Running);
}
