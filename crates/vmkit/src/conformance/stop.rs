//! Stopping, and machines that end by themselves.

use std::time::Duration;

use tokio::time::Instant;

use super::bench::{Bench, GRACE, fails_as, id, sees, stop};
use super::rig::{Program, Rig};
use crate::driver::{Driver, Provider};
use crate::error::ErrorKind;
use crate::state::{Action, Fact, State};

pub(super) async fn stopping_at_once_forces<R: Rig>(bench: &Bench<R>) {
    let vm = bench.running("forced").await;
    let report = vm.stop(Duration::ZERO).await;
    report.stop.unwrap_or_else(|e| panic!("stopping: {e:?}"));
    report.run.unwrap_or_else(|e| panic!("the signal that we sent is reported as a run error: {e:?}"));
    assert!(report.forced, "a grace of zero, and it was not forced");
    assert_eq!(vm.state(), State::Stopped);
    bench.off(&vm).await;
}

pub(super) async fn stopping_gracefully_does_not_force<R: Rig>(bench: &Bench<R>) {
    let vm = bench.running("graceful").await;
    let report = vm.stop(GRACE).await;
    report.stop.unwrap_or_else(|e| panic!("stopping: {e:?}"));
    report.run.unwrap_or_else(|e| panic!("it shut down well, with a run error: {e:?}"));
    assert!(!report.forced, "it did not shut down within {GRACE:?}");
    assert_eq!(vm.state(), State::Stopped);
    bench.off(&vm).await;
}

pub(super) async fn stopping_forces_after_the_grace<R: Rig>(bench: &Bench<R>) {
    let vm = bench.running("impatient").await;
    let report = vm.stop(Duration::from_millis(1)).await;
    report.stop.unwrap_or_else(|e| panic!("stopping: {e:?}"));
    report.run.unwrap_or_else(|e| panic!("it was stopped, with a run error: {e:?}"));
    assert_eq!(vm.state(), State::Stopped);
    bench.off(&vm).await;
}

pub(super) async fn stopping_twice_publishes_nothing<R: Rig>(bench: &Bench<R>) {
    let vm = bench.stopped("calm").await;
    let before = vm.status();
    let _ = stop(&vm, GRACE).await;
    assert_eq!(vm.status(), before, "an idempotent stop published something");
}

/// At the driver itself: nothing above it kills what is not there.
pub(super) async fn killing_is_idempotent<R: Rig>(bench: &Bench<R>) {
    let name = id("off");
    let mut driver = bench.host.provider().open(&name, &bench.rig.spec()).await.unwrap_or_else(|e| panic!("{e:?}"));
    driver.begin(Action::Clone).await.unwrap_or_else(|e| panic!("begin: {e:?}"));
    driver.kill().await.unwrap_or_else(|e| panic!("killing what was never made: {e:?}"));
    driver.clone_source().await.unwrap_or_else(|e| panic!("cloning: {e:?}"));
    for time in ["once", "twice"] {
        driver.kill().await.unwrap_or_else(|e| panic!("killing {time}: {e:?}"));
    }
    assert_eq!(driver.inspect().await.ok(), Some(Fact::Stopped));
    driver.destroy().await.unwrap_or_else(|e| panic!("destroying: {e:?}"));
    driver.end();
}

pub(super) async fn a_death_is_noticed<R: Rig>(bench: &Bench<R>) {
    let vm = bench.running("dies").await;
    let mut changes = vm.subscribe();
    bench.rig.kill_process(vm.id()).await;
    let killed = Instant::now();
    let limit = Duration::from_secs(1) + bench.rig.slack();
    if tokio::time::timeout(limit, sees(&mut changes, State::Stopped)).await.is_err() {
        panic!("it died {:?} ago, and is {}", killed.elapsed(), vm.state());
    }
    bench.off(&vm).await;
}

pub(super) async fn a_crash_is_a_run_error_and_no_stop_error<R: Rig>(bench: &Bench<R>) {
    let vm = bench.running("crashes").await;
    let mut changes = vm.subscribe();
    bench.rig.kill_process(vm.id()).await;
    sees(&mut changes, State::Stopped).await;
    fails_as(stop(&vm, GRACE).await, ErrorKind::Exited, "the run of a machine that was killed");
    stop(&vm, GRACE).await.unwrap_or_else(|e| panic!("a run error is told twice: {e:?}"));
}

pub(super) async fn a_crash_ends_commands<R: Rig>(bench: &Bench<R>) {
    let vm = bench.running("takes-along").await;
    let mut child = bench.command(&vm, Program::Sleep).spawn().await.unwrap_or_else(|e| panic!("spawning: {e:?}"));
    let killing = async {
        tokio::time::sleep(super::start::MOMENT).await;
        bench.rig.kill_process(vm.id()).await;
    };
    let (ended, ()) = tokio::join!(child.wait(), killing);
    fails_as(ended, ErrorKind::NotRunning, "a command in a machine that died");
    fails_as(vm.ping().await, ErrorKind::NotRunning, "asking a machine that died");
}
