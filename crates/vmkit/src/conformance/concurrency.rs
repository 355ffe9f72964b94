//! Two requests at once: what the second becomes.
//!
//! Both are polled in one task, so the first is first.

use std::time::Duration;

use super::bench::{Bench, GRACE, drain, fails_as, settled};
use super::rig::Rig;
use crate::console::ConsoleSinks;
use crate::error::ErrorKind;
use crate::state::State;

pub(super) async fn stop_beside_stop<R: Rig>(bench: &Bench<R>) {
    let vm = bench.running("stops").await;
    let mut changes = vm.subscribe();
    let (first, second) = tokio::join!(vm.stop(Duration::ZERO), vm.stop(GRACE));
    first.stop.unwrap_or_else(|e| panic!("the first stop: {e:?}"));
    second.stop.unwrap_or_else(|e| panic!("the second stop: {e:?}"));
    assert_eq!(drain(&mut changes), [State::Running, State::Stopping, State::Stopped]);
}

pub(super) async fn suspend_beside_suspend<R: Rig>(bench: &Bench<R>) {
    if !bench.suspends() {
        return;
    }
    let vm = bench.running("suspends").await;
    let mut changes = vm.subscribe();
    let (first, second) = tokio::join!(vm.suspend(), vm.suspend());
    first.unwrap_or_else(|e| panic!("the first suspend: {e:?}"));
    second.unwrap_or_else(|e| panic!("the second suspend: {e:?}"));
    assert_eq!(drain(&mut changes), [State::Running, State::Suspending, State::Suspended]);
}

pub(super) async fn start_beside_start<R: Rig>(bench: &Bench<R>) {
    let vm = bench.stopped("starts").await;
    let mut changes = vm.subscribe();
    let (first, second) = tokio::join!(vm.start(ConsoleSinks::discard()), vm.start(ConsoleSinks::discard()));
    first.unwrap_or_else(|e| panic!("the first start: {e:?}"));
    fails_as(second, ErrorKind::IllegalRequest, "a second start");
    assert_eq!(drain(&mut changes), [State::Stopped, State::Starting, State::Running]);
}

pub(super) async fn clone_beside_clone<R: Rig>(bench: &Bench<R>) {
    let vm = bench.initial("clones").await;
    let mut changes = vm.subscribe();
    let (first, second) = tokio::join!(vm.clone_source(), vm.clone_source());
    first.unwrap_or_else(|e| panic!("the first clone: {e:?}"));
    fails_as(second, ErrorKind::IllegalRequest, "a second clone");
    assert_eq!(drain(&mut changes), [State::Initial, State::Cloning, State::Stopped]);
}

pub(super) async fn delete_beside_delete<R: Rig>(bench: &Bench<R>) {
    let vm = bench.stopped("deletes").await;
    let mut changes = vm.subscribe();
    let (first, second) = tokio::join!(vm.delete(), vm.delete());
    first.unwrap_or_else(|e| panic!("the first delete: {e:?}"));
    fails_as(second, ErrorKind::IllegalRequest, "a second delete");
    assert_eq!(drain(&mut changes), [State::Stopped, State::Deleting, State::Deleted]);
}

pub(super) async fn start_beside_stop<R: Rig>(bench: &Bench<R>) {
    let vm = bench.stopped("up-and-down").await;
    let (first, second) = tokio::join!(vm.start(ConsoleSinks::discard()), vm.stop(Duration::ZERO));
    first.unwrap_or_else(|e| panic!("the start: {e:?}"));
    second.stop.unwrap_or_else(|e| panic!("the stop: {e:?}"));
    assert_eq!(vm.state(), State::Stopped);
    bench.off(&vm).await;
}

pub(super) async fn stop_beside_delete<R: Rig>(bench: &Bench<R>) {
    let vm = bench.running("down-and-gone").await;
    let (first, second) = tokio::join!(vm.stop(Duration::ZERO), vm.delete());
    first.stop.unwrap_or_else(|e| panic!("the stop: {e:?}"));
    second.unwrap_or_else(|e| panic!("the delete: {e:?}"));
    assert_eq!(vm.state(), State::Deleted);
    bench.gone(&vm).await;
}

pub(super) async fn start_beside_delete<R: Rig>(bench: &Bench<R>) {
    let vm = bench.stopped("up-and-gone").await;
    let (first, second) = tokio::join!(vm.start(ConsoleSinks::discard()), vm.delete());
    first.unwrap_or_else(|e| panic!("the start: {e:?}"));
    fails_as(second, ErrorKind::IllegalRequest, "deleting what was just started");
    assert_eq!(vm.state(), State::Running);
}

pub(super) async fn suspend_beside_stop<R: Rig>(bench: &Bench<R>) {
    if !bench.suspends() {
        return;
    }
    let vm = bench.running("saved-and-down").await;
    let (first, second) = tokio::join!(vm.suspend(), vm.stop(Duration::ZERO));
    first.unwrap_or_else(|e| panic!("the suspend: {e:?}"));
    fails_as(second.stop, ErrorKind::IllegalRequest, "stopping what was just suspended");
    assert_eq!(vm.state(), State::Suspended);
}

pub(super) async fn reading_never_waits<R: Rig>(bench: &Bench<R>) {
    let vm = bench.stopped("read").await;
    let mut changes = vm.subscribe();
    let reading = async {
        super::bench::sees(&mut changes, State::Starting).await;
        // None of them is an await: what could make them wait is a lock, and then this hangs for good.
        assert_eq!(vm.state(), State::Starting);
        assert!(vm.properties().cloned_from.is_some(), "no properties while Starting");
        fails_as(vm.command("true").status().await, ErrorKind::NotRunning, "executing while Starting");
    };
    let (started, ()) = tokio::join!(vm.start(ConsoleSinks::discard()), reading);
    started.unwrap_or_else(|e| panic!("starting: {e:?}"));
}

pub(super) async fn a_cancelled_waiter_never_runs<R: Rig>(bench: &Bench<R>) {
    let vm = bench.stopped("waiter").await;
    let mut changes = vm.subscribe();
    let waiting = async {
        super::bench::sees(&mut changes, State::Starting).await;
        tokio::select! {
            biased;
            _ = vm.stop(Duration::ZERO) => panic!("a stop passed the queue"),
            () = std::future::ready(()) => {}
        }
    };
    let (started, ()) = tokio::join!(vm.start(ConsoleSinks::discard()), waiting);
    started.unwrap_or_else(|e| panic!("starting: {e:?}"));
    // The queue is served in order: once this one is answered, the cancelled one has had its turn.
    fails_as(vm.delete().await, ErrorKind::IllegalRequest, "deleting a running machine");
    assert_eq!(settled(&vm).await, State::Running, "a cancelled stop ran");
}
