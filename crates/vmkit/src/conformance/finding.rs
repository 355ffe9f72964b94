//! Machines that another process made or changes.

use std::time::Duration;

use super::bench::{Bench, delete, eventually, fails_as, id, start, stop};
use super::rig::{Program, Rig};
use crate::console::ConsoleSinks;
use crate::driver::Provider;
use crate::error::ErrorKind;
use crate::state::State;

fn adopts<R: Rig>(bench: &Bench<R>) -> bool {
    let can = bench.host.capabilities().adopt;
    if !can {
        bench.skip("machines cannot be found again");
    }
    can
}

pub(super) async fn another_process_adopts<R: Rig>(bench: &Bench<R>) {
    if !adopts(bench) {
        return;
    }
    let vm = bench.running("shared").await;
    bench.say(&vm, Program::Remember("word".into(), "shared".into())).await;
    let elsewhere = bench.elsewhere().await;
    let found = elsewhere.adopt(vm.id()).await.unwrap_or_else(|e| panic!("adopting: {e:?}"));
    assert_eq!((found.id(), found.state()), (vm.id(), State::Running));
    assert_eq!(found.spec(), vm.spec(), "what it was made from, as found");
    assert_eq!(bench.say(&found, Program::Recall("word".into())).await, "shared");
    let _ = stop(&found, Duration::ZERO).await;
    bench.off(&vm).await;
    eventually("the first process notices that another has stopped it", || async { vm.state() == State::Stopped })
        .await;
    start(&vm).await;
}

pub(super) async fn an_absent_machine_is_not_found<R: Rig>(bench: &Bench<R>) {
    if !adopts(bench) {
        return;
    }
    fails_as(bench.host.adopt(&id("nobody")).await, ErrorKind::NotFound, "adopting what is not there");
    bench.rig.plant_foreign(&id("theirs")).await;
    fails_as(bench.host.adopt(&id("theirs")).await, ErrorKind::NotFound, "adopting what is not ours");
    assert!(bench.rig.foreign_intact(&id("theirs")).await, "somebody else's machine was touched by an adopt");
}

pub(super) async fn every_machine_is_listed<R: Rig>(bench: &Bench<R>) {
    let kept = bench.stopped("listed").await;
    let deleted = bench.stopped("unlisted").await;
    delete(&deleted).await;
    let _unmade = bench.initial("unmade").await;
    let elsewhere = bench.elsewhere().await;
    for host in [&bench.host, &elsewhere] {
        let listed = host.list().await.unwrap_or_else(|e| panic!("listing: {e:?}"));
        let names: Vec<&str> = listed.iter().map(|found| found.id.as_str()).collect();
        assert_eq!(names, [kept.id().as_str()]);
        assert_eq!((listed[0].state, &listed[0].spec), (State::Stopped, &Some(kept.spec().clone())));
    }
}

pub(super) async fn dropped_handles_end_no_machine<R: Rig>(bench: &Bench<R>) {
    if !adopts(bench) {
        return;
    }
    let name = id("orphan");
    {
        let host = bench.elsewhere().await;
        let vm = host.create(name.clone(), bench.rig.spec()).await.unwrap_or_else(|e| panic!("creating: {e:?}"));
        vm.clone_source().await.unwrap_or_else(|e| panic!("cloning: {e:?}"));
        start(&vm).await;
    }
    tokio::time::sleep(super::start::MOMENT).await;
    assert!(bench.rig.processes(&name).await > 0, "the machine died with its last handle");
    let vm = bench.host.adopt(&name).await.unwrap_or_else(|e| panic!("adopting: {e:?}"));
    assert_eq!(vm.state(), State::Running);
    assert_eq!(bench.say(&vm, Program::Print("here".into())).await, "here");
    let _ = stop(&vm, Duration::ZERO).await;
    delete(&vm).await;
    bench.gone(&vm).await;
}

pub(super) async fn two_processes_exclude_each_other<R: Rig>(bench: &Bench<R>) {
    if !adopts(bench) {
        return;
    }
    let vm = bench.stopped("contended").await;
    let elsewhere = bench.elsewhere().await;
    let other = elsewhere.adopt(vm.id()).await.unwrap_or_else(|e| panic!("adopting: {e:?}"));
    let (one, two) = tokio::join!(vm.start(ConsoleSinks::discard()), other.start(ConsoleSinks::discard()));
    match (one, two) {
        (Ok(()), Err(error)) | (Err(error), Ok(())) => {
            assert_eq!(error.kind(), ErrorKind::IllegalRequest, "the one that came second: {error:?}");
        }
        (one, two) => panic!("two starts of one machine by two processes: {one:?} and {two:?}"),
    }
    assert_eq!((vm.state(), other.state()), (State::Running, State::Running));
    let (one, two) = tokio::join!(vm.stop(Duration::ZERO), other.stop(Duration::ZERO));
    one.stop.unwrap_or_else(|e| panic!("one stop of two: {e:?}"));
    two.stop.unwrap_or_else(|e| panic!("the other stop of two: {e:?}"));
    bench.off(&vm).await;
}

pub(super) async fn another_process_deletes<R: Rig>(bench: &Bench<R>) {
    if !adopts(bench) {
        return;
    }
    let vm = bench.stopped("vanishing").await;
    let elsewhere = bench.elsewhere().await;
    let other = elsewhere.adopt(vm.id()).await.unwrap_or_else(|e| panic!("adopting: {e:?}"));
    delete(&other).await;
    fails_as(vm.start(ConsoleSinks::discard()).await, ErrorKind::IllegalRequest, "starting what another has deleted");
    assert_eq!(vm.state(), State::Deleted);
    bench.gone(&vm).await;
}

pub(super) async fn a_pools_name_has_one_holder<R: Rig>(bench: &Bench<R>) {
    let (name, similar) = (id("pool"), id("pool-b"));
    let elsewhere = bench.elsewhere().await;
    let claim = bench.host.provider().claim(&name).await.unwrap_or_else(|e| panic!("claiming: {e:?}"));
    for host in [&elsewhere, &bench.host] {
        let Err(error) = host.provider().claim(&name).await else { panic!("one name was claimed twice") };
        assert_eq!(error.kind(), ErrorKind::Busy, "{error:?}");
        assert!(error.next_step().is_some(), "it does not say what to do next: {error:?}");
    }
    let other = elsewhere.provider().claim(&similar).await.unwrap_or_else(|e| panic!("another name: {e:?}"));
    drop(claim);
    let again = elsewhere.provider().claim(&name).await;
    drop((again.unwrap_or_else(|e| panic!("a name that was given back: {e:?}")), other));
}
