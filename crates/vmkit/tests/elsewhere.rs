//! What happens where a handle does not look: other processes, runtimes that end, requests that still wait.
#![cfg(all(feature = "sim", feature = "conformance"))]

mod common;

use std::time::Duration;

use common::{id, machine, paused, spec};
use tokio::time::{Instant, sleep, timeout};
use vmkit::sim::{Fault, Latency, SimProvider, Verb, World};
use vmkit::{Cause, ConsoleSinks, ErrorKind, Host, Instance, State, cleanup, reset, wait_for_state};

const SECOND: Duration = Duration::from_secs(1);
const MINUTE: Duration = Duration::from_secs(60);

fn ms(n: u64) -> Duration {
    Duration::from_millis(n)
}

fn hosts(world: &World) -> [Host<SimProvider>; 2] {
    [(); 2].map(|()| Host::new(SimProvider::new(world.clone())))
}

async fn start(vm: &Instance) {
    vm.start(ConsoleSinks::discard()).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn what_another_process_does_with_a_machine_that_is_off_is_seen_by_who_looks() {
    let world = World::new();
    world.latency(common::latency());
    let [host, elsewhere] = hosts(&world);
    let vm = machine(&host, "vm", State::Stopped).await;
    let other = elsewhere.adopt(vm.id()).await.unwrap();
    start(&other).await;
    assert_eq!(vm.refresh().await.unwrap(), State::Running);
    assert_eq!((vm.state(), vm.status().cause), (State::Running, Cause::Elsewhere));
    assert!(vm.command("true").status().await.unwrap().success());
    // Nothing has to be asked: whoever waits sees it.
    other.suspend().await.unwrap();
    wait_for_state(&vm, SECOND, Some(Instant::now() + MINUTE), State::Suspended, &[]).await.unwrap();
    let (started, seen) = tokio::join!(other.start(ConsoleSinks::discard()), async {
        wait_for_state(&vm, ms(100), Some(Instant::now() + MINUTE), State::Starting, &[]).await?;
        wait_for_state(&vm, ms(100), Some(Instant::now() + MINUTE), State::Running, &[]).await
    });
    started.and(seen).unwrap();
    // A host hands out what there is.
    other.suspend().await.unwrap();
    wait_for_state(&vm, SECOND, Some(Instant::now() + MINUTE), State::Suspended, &[]).await.unwrap();
    start(&other).await;
    assert_eq!(host.adopt(vm.id()).await.unwrap().state(), State::Running);
    other.stop(Duration::ZERO).await.stopped().unwrap();
    other.delete().await.unwrap();
    assert_eq!(host.adopt(vm.id()).await.unwrap_err().kind(), ErrorKind::NotFound);
    assert_eq!(vm.state(), State::Deleted);
    // Another may have its name.
    let again = machine(&elsewhere, "vm", State::Stopped).await;
    assert_eq!(host.adopt(again.id()).await.unwrap().state(), State::Stopped);
    let late = machine(&host, "late", State::Stopped).await;
    elsewhere.adopt(late.id()).await.unwrap().delete().await.unwrap();
    assert_eq!(host.create(id("late"), spec()).await.unwrap().state(), State::Initial);
}

#[test]
fn a_machine_is_adopted_anew_when_the_runtime_has_ended_that_drove_it() {
    let world = World::new();
    let host = Host::new(SimProvider::new(world.clone()));
    let vm = paused().block_on(machine(&host, "vm", State::Running));
    paused().block_on(async {
        for error in [vm.ping().await.unwrap_err(), vm.command("true").status().await.unwrap_err()] {
            assert_eq!(error.kind(), ErrorKind::Cancelled, "it runs: {error:?}");
            assert!(error.next_step().unwrap().contains("adopt"), "{error:?}");
        }
        let mut changes = vm.subscribe();
        assert_eq!(changes.next().await.unwrap().state, State::Running);
        assert_eq!(timeout(MINUTE, changes.next()).await, Ok(None), "nobody publishes any more");
        let waits = wait_for_state(&vm, SECOND, None, State::Stopped, &[]);
        assert_eq!(timeout(MINUTE, waits).await.unwrap().unwrap_err().kind(), ErrorKind::Cancelled);
        let again = host.adopt(vm.id()).await.unwrap();
        assert!(again.command("true").status().await.unwrap().success());
        cleanup(&again, Duration::ZERO, MINUTE).await.unwrap();
        assert_eq!(world.residue(), [""; 0]);
        host.create(id("vm"), spec()).await.unwrap();
    });
}

#[test]
fn a_runtime_that_ends_in_a_fork_ends() {
    for multi in [false, true] {
        let world = World::new();
        world.latency(Latency { boot: ms(500), ..Latency::default() });
        let mut builder = match multi {
            true => tokio::runtime::Builder::new_multi_thread(),
            false => tokio::runtime::Builder::new_current_thread(),
        };
        let runtime = builder.enable_all().build().unwrap();
        runtime.block_on(async {
            let host = Host::new(SimProvider::new(world.clone()));
            let vm = machine(&host, "vm", State::Running).await;
            tokio::spawn(async move { vm.fork(2).await });
            while world.count(&id("vm-1"), Verb::Boot) == 0 {
                sleep(ms(1)).await;
            }
        });
        drop(runtime);
        // What it left is found by the next.
        paused().block_on(async {
            let host = Host::new(SimProvider::new(world.clone()));
            for found in host.list().await.unwrap() {
                cleanup(&host.adopt(&found.id).await.unwrap(), Duration::ZERO, MINUTE).await.unwrap();
            }
        });
        assert_eq!(world.residue(), [""; 0]);
    }
}

/// Whenever it comes: what was asked for before is done before, and a reset that goes on makes nothing again.
#[tokio::test(start_paused = true)]
async fn what_is_cleaned_up_stays_gone() {
    for cut in 0..150 {
        let world = World::new();
        world.latency(Latency { clone: ms(20), boot: ms(50), kill: ms(10), destroy: ms(20), ..Latency::default() });
        let host = Host::new(SimProvider::new(world.clone()));
        let vm = machine(&host, "vm", State::Running).await;
        for _ in 0..50 {
            world.fault(Some(vm.id()), Verb::Begin, Fault::Slow(ms(3)));
        }
        let _ = timeout(ms(cut), reset(&vm, ConsoleSinks::discard(), MINUTE)).await;
        cleanup(&vm, Duration::ZERO, MINUTE).await.unwrap();
        sleep(1000 * SECOND).await;
        assert_eq!((vm.state(), world.residue()), (State::Deleted, Vec::new()), "a reset cut off after {cut} ms");
    }
}

#[tokio::test(start_paused = true)]
async fn a_clone_that_waits_is_cleaned_up_too() {
    for cloned_before in [false, true] {
        let world = World::new();
        let host = Host::new(SimProvider::new(world.clone()));
        let vm = machine(&host, "vm", if cloned_before { State::Deleted } else { State::Initial }).await;
        world.fault(Some(vm.id()), Verb::Begin, Fault::Slow(ms(5)));
        let cloning = tokio::spawn({
            let vm = vm.clone();
            async move { vm.clone_source().await }
        });
        sleep(ms(1)).await;
        cleanup(&vm, Duration::ZERO, MINUTE).await.unwrap();
        cloning.await.unwrap().unwrap();
        assert_eq!((vm.state(), world.residue()), (State::Deleted, Vec::new()));
    }
}
