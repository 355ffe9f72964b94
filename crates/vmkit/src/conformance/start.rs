//! Starting.

use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::AsyncWrite;
use tokio::time::Instant;

use super::bench::{Bench, GRACE, eventually, sees, settled, start, stop};
use super::rig::{Program, Rig};
use crate::console::{ConsoleSinks, Sink};
use crate::state::State;

pub(super) async fn a_started_machine_executes<R: Rig>(bench: &Bench<R>) {
    let vm = bench.stopped("ready").await;
    start(&vm).await;
    // At the first try: ready means ready.
    assert_eq!(bench.say(&vm, Program::Print("hello".into())).await, "hello");
    vm.ping().await.unwrap_or_else(|e| panic!("the agent does not answer: {e:?}"));
    assert!(bench.rig.processes(vm.id()).await > 0, "Running, and it has no process");
}

pub(super) async fn the_console_is_received<R: Rig>(bench: &Bench<R>) {
    let vm = bench.stopped("console").await;
    let seen = Tape::default();
    let sinks = ConsoleSinks { stdout: Sink::new(seen.clone()), stderr: Sink::default() };
    vm.start(sinks).await.unwrap_or_else(|e| panic!("starting: {e:?}"));
    eventually("the machine prints to its console", || async { !seen.is_empty() }).await;
}

pub(super) async fn a_bad_console_costs_only_output<R: Rig>(bench: &Bench<R>) {
    let vm = bench.stopped("mute").await;
    let sinks = ConsoleSinks { stdout: Sink::new(Bad::Fails), stderr: Sink::new(Bad::Blocks) };
    let lost = sinks.stdout.clone();
    vm.start(sinks).await.unwrap_or_else(|e| panic!("starting with sinks that fail and block: {e:?}"));
    assert_eq!(bench.say(&vm, Program::Print("alive".into())).await, "alive");
    eventually("what a failing sink did not take is counted", || async { lost.lost() > 0 }).await;
}

pub(super) async fn a_dropped_start_is_undone<R: Rig>(bench: &Bench<R>) {
    let vm = bench.stopped("undone").await;
    let mut changes = vm.subscribe();
    tokio::select! {
        biased;
        _ = vm.start(ConsoleSinks::discard()) => {}
        () = sees(&mut changes, State::Starting) => {}
    }
    match settled(&vm).await {
        State::Stopped => bench.off(&vm).await,
        // It was quicker than we.
        State::Running => {}
        state => panic!("a dropped start settled in {state}"),
    }
}

pub(super) async fn a_kill_reaches_a_starting_machine<R: Rig>(bench: &Bench<R>) {
    let vm = bench.stopped("killed").await;
    let mut changes = vm.subscribe();
    let killing = async {
        sees(&mut changes, State::Starting).await;
        vm.kill().await
    };
    let (_, report) = tokio::join!(vm.start(ConsoleSinks::discard()), killing);
    report.stop.unwrap_or_else(|e| panic!("killing it while it starts: {e:?}"));
    assert_eq!(vm.state(), State::Stopped);
    bench.off(&vm).await;
}

pub(super) async fn a_death_while_starting_fails_at_once<R: Rig>(bench: &Bench<R>) {
    let vm = bench.stopped("stillborn").await;
    let killing = async {
        eventually("a starting machine has a process", || async { bench.rig.processes(vm.id()).await > 0 }).await;
        bench.rig.kill_process(vm.id()).await;
        Instant::now()
    };
    let (started, killed) = tokio::join!(vm.start(ConsoleSinks::discard()), killing);
    let error = match started {
        Err(error) => error,
        // It was quicker than we: then the death is noticed as any other.
        Ok(()) => return bench.skip("it had started before it could be killed"),
    };
    let took = killed.elapsed();
    assert!(
        took < vm.spec().timeouts.start / 2,
        "it died while starting, and that took {took:?} to be told: {error:?}"
    );
    assert_eq!(settled(&vm).await, State::Stopped);
    let _ = stop(&vm, GRACE).await;
    bench.off(&vm).await;
}

/// Keeps what is written to it.
#[derive(Clone, Default)]
struct Tape(Arc<Mutex<Vec<u8>>>);

impl Tape {
    fn is_empty(&self) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).is_empty()
    }
}

impl AsyncWrite for Tape {
    fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).extend_from_slice(bytes);
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

/// A sink as bad as sinks get.
#[derive(Clone, Copy)]
enum Bad {
    Fails,
    Blocks,
}

impl AsyncWrite for Bad {
    fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, _: &[u8]) -> Poll<io::Result<usize>> {
        match *self {
            Bad::Fails => Poll::Ready(Err(io::Error::other("a sink that fails"))),
            Bad::Blocks => Poll::Pending,
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

/// Used by cases that only need time to pass in the guest's favour.
pub(super) const MOMENT: Duration = Duration::from_millis(500);
