//! States: published, refused, waited for, cleaned up from.

use std::time::Duration;

use tokio::time::Instant;

use super::bench::{Bench, GRACE, delete, fails_as, start, stop};
use super::rig::Rig;
use crate::cleanup::cleanup;
use crate::console::ConsoleSinks;
use crate::error::{Error, ErrorKind, Result};
use crate::instance::Instance;
use crate::state::State;
use crate::wait::wait_for_state;

const POLL: Duration = Duration::from_millis(10);

pub(super) async fn every_state_is_seen<R: Rig>(bench: &Bench<R>) {
    let vm = bench.initial("watched").await;
    let mut changes = vm.subscribe();
    vm.clone_source().await.unwrap_or_else(|e| panic!("cloning: {e:?}"));
    start(&vm).await;
    let _ = stop(&vm, Duration::ZERO).await;
    delete(&vm).await;
    let expected = [
        State::Initial,
        State::Cloning,
        State::Stopped,
        State::Starting,
        State::Running,
        State::Stopping,
        State::Stopped,
        State::Deleting,
        State::Deleted,
    ];
    for (generation, state) in expected.into_iter().enumerate() {
        let status = changes.try_next().unwrap_or_else(|| panic!("{state} was not published"));
        assert_eq!((status.state, status.generation), (state, generation as u64));
    }
    assert!(changes.try_next().is_none(), "more was published than happened");
}

pub(super) async fn illegal_requests_change_nothing<R: Rig>(bench: &Bench<R>) {
    let vm = bench.initial("strict").await;
    refuses(&vm, &["Start", "Stop", "Suspend", "Delete"]).await;
    vm.clone_source().await.unwrap_or_else(|e| panic!("cloning: {e:?}"));
    refuses(&vm, &["Clone", "Suspend"]).await;
    start(&vm).await;
    refuses(&vm, &["Clone", "Start", "Delete"]).await;
    let _ = stop(&vm, Duration::ZERO).await;
    delete(&vm).await;
    refuses(&vm, &["Start", "Stop", "Suspend", "Delete"]).await;
}

async fn refuses(vm: &Instance, actions: &[&str]) {
    for &action in actions {
        let before = vm.status();
        let result: Result<()> = match action {
            "Clone" => vm.clone_source().await,
            "Start" => vm.start(ConsoleSinks::discard()).await,
            "Stop" => vm.stop(GRACE).await.stop,
            "Suspend" => vm.suspend().await,
            _ => vm.delete().await,
        };
        let error: Error = fails_as(result, ErrorKind::IllegalRequest, action);
        let text = error.to_string();
        for part in [vm.id().as_str(), before.state.name(), action] {
            assert!(text.contains(part), "{text:?} does not name {part}");
        }
        assert_eq!(vm.status(), before, "a refused {action} changed something");
    }
}

pub(super) async fn properties_in_every_state<R: Rig>(bench: &Bench<R>) {
    let vm = bench.initial("known").await;
    let image = vm.spec().source.name().to_owned();
    let looks = |vm: &Instance| {
        let (state, properties) = (vm.state(), vm.properties());
        assert_eq!(vm.id().as_str(), "known", "its id while {state}");
        let cloned_from = properties.cloned_from.unwrap_or_else(|| panic!("no clone info while {state}"));
        assert_eq!(cloned_from.image, image, "what it was cloned from, while {state}");
        assert!(state == State::Running || properties.ip.is_none(), "an address while {state}");
        assert!(!properties.backend.is_empty(), "no backend while {state}");
        assert_eq!((properties.cpus, properties.memory_mib), (vm.spec().cpus, vm.spec().memory_mib));
    };
    looks(&vm);
    vm.clone_source().await.unwrap_or_else(|e| panic!("cloning: {e:?}"));
    looks(&vm);
    start(&vm).await;
    looks(&vm);
    if bench.host.capabilities().suspend {
        vm.suspend().await.unwrap_or_else(|e| panic!("suspending: {e:?}"));
        looks(&vm);
    } else {
        let _ = stop(&vm, Duration::ZERO).await;
        looks(&vm);
    }
    delete(&vm).await;
    looks(&vm);
}

pub(super) async fn waiting_for_a_state<R: Rig>(bench: &Bench<R>) {
    let vm = bench.initial("awaited").await;
    let zero = wait_for_state(&vm, Duration::ZERO, None, State::Initial, &[]).await;
    fails_as(zero, ErrorKind::InvalidArgument, "waiting with an interval of zero");
    let past = Some(Instant::now());
    let there = wait_for_state(&vm, POLL, past, State::Initial, &[]).await;
    there.unwrap_or_else(|e| panic!("at the target, after the deadline: {e:?}"));
    let late = wait_for_state(&vm, POLL, past, State::Stopped, &[]).await;
    assert_eq!(fails_as(late, ErrorKind::TimedOut, "waiting in vain").state(), Some(State::Initial));
    let strayed = wait_for_state(&vm, POLL, None, State::Running, &[State::Stopped]).await;
    fails_as(strayed, ErrorKind::UnexpectedState, "waiting from a state that is not listed");
    let waiting = wait_for_state(&vm, POLL, None, State::Stopped, &[State::Initial, State::Cloning]);
    let (waited, cloned) = tokio::join!(waiting, vm.clone_source());
    cloned.unwrap_or_else(|e| panic!("cloning: {e:?}"));
    waited.unwrap_or_else(|e| panic!("waiting for the clone: {e:?}"));
}

pub(super) async fn cleaning_up_in_every_state<R: Rig>(bench: &Bench<R>) {
    let mut made = vec![bench.initial("clean-initial").await, bench.stopped("clean-stopped").await];
    made.push(bench.running("clean-running").await);
    if bench.host.capabilities().suspend {
        made.push(bench.suspended("clean-suspended").await);
    }
    for vm in &made {
        let from = vm.state();
        cleanup(vm, Duration::ZERO, GRACE * 2).await.unwrap_or_else(|e| panic!("cleaning up from {from}: {e:?}"));
        bench.gone(vm).await;
        cleanup(vm, Duration::ZERO, GRACE).await.unwrap_or_else(|e| panic!("cleaning up twice: {e:?}"));
    }
    // And one that died a moment ago.
    let vm = &made[2];
    vm.clone_source().await.unwrap_or_else(|e| panic!("cloning again: {e:?}"));
    start(vm).await;
    bench.rig.kill_process(vm.id()).await;
    cleanup(vm, Duration::ZERO, GRACE * 2).await.unwrap_or_else(|e| panic!("cleaning up a dead machine: {e:?}"));
    bench.gone(vm).await;
}
