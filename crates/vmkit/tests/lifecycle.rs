//! What the hardware sees of a lifecycle: how often it is called, and what becomes of panics, subscribers and waiters.
#![cfg(all(feature = "sim", feature = "conformance"))]

mod common;

use std::time::Duration;

use common::{host, id, machine, settled, spec, table};
use tokio::time::Instant;
use vmkit::sim::{Fault, SimProvider, Verb, World};
use vmkit::{Action, ConsoleSinks, Driver, ErrorKind, Host, Provider, Result, State};

const SECOND: Duration = Duration::from_secs(1);

fn illegal(result: Result<()>) -> bool {
    result.is_err_and(|error| error.kind() == ErrorKind::IllegalRequest)
}

#[tokio::test(start_paused = true)]
async fn an_illegal_request_calls_nothing_but_the_lock() {
    let (world, host) = host();
    for state in [State::Initial, State::Stopped, State::Running, State::Suspended, State::Deleted] {
        let vm = machine(&host, &format!("vm-{state}"), state).await;
        let calls = world.calls().into_iter().filter(|call| call.verb != Verb::Begin).count();
        for action in Action::ALL {
            if action == Action::None || table::LEGAL.iter().any(|row| (row.0, row.1) == (state, action)) {
                continue;
            }
            let result = match action {
                Action::None => Ok(()),
                Action::Clone => vm.clone_source().await,
                Action::Start => vm.start(ConsoleSinks::discard()).await,
                Action::Stop => vm.stop(SECOND).await.stop,
                Action::Suspend => vm.suspend().await,
                Action::Delete => vm.delete().await,
            };
            assert!(illegal(result), "{action} while {state}");
        }
        let now = world.calls().into_iter().filter(|call| call.verb != Verb::Begin).count();
        assert_eq!(now, calls, "a refused request while {state} reached the hardware");
    }
}

#[tokio::test(start_paused = true)]
async fn the_second_of_two_requests_calls_nothing() {
    let (world, host) = host();
    let vm = machine(&host, "vm", State::Initial).await;
    let name = id("vm");
    let (one, two) = tokio::join!(vm.clone_source(), vm.clone_source());
    assert!(one.is_ok() && illegal(two) && world.count(&name, Verb::Clone) == 1);
    let (one, two) = tokio::join!(vm.start(ConsoleSinks::discard()), vm.start(ConsoleSinks::discard()));
    assert!(one.is_ok() && illegal(two) && world.count(&name, Verb::Boot) == 1);
    let (one, two) = tokio::join!(vm.suspend(), vm.suspend());
    assert!(one.is_ok() && two.is_ok() && world.count(&name, Verb::Suspend) == 1);
    vm.start(ConsoleSinks::discard()).await.unwrap();
    let (one, two) = tokio::join!(vm.stop(5 * SECOND), vm.stop(5 * SECOND));
    assert!(one.stop.is_ok() && two.stop.is_ok());
    assert_eq!((world.count(&name, Verb::Shutdown), world.count(&name, Verb::Kill)), (1, 1));
    let (one, two) = tokio::join!(vm.delete(), vm.delete());
    assert!(one.is_ok() && illegal(two) && world.count(&name, Verb::Destroy) == 1);
}

#[tokio::test(start_paused = true)]
async fn a_stop_behind_a_failed_start_has_nothing_to_do() {
    let (world, host) = host();
    let vm = machine(&host, "vm", State::Stopped).await;
    world.fault(None, Verb::Boot, Fault::Err);
    let (started, stopped) = tokio::join!(vm.start(ConsoleSinks::discard()), vm.stop(SECOND));
    assert_eq!(started.unwrap_err().kind(), ErrorKind::Backend);
    stopped.stop.unwrap();
    assert_eq!((vm.state(), world.count(&id("vm"), Verb::Shutdown)), (State::Stopped, 0));
}

#[tokio::test(start_paused = true)]
async fn a_kill_reaches_a_boot_that_hangs() {
    let (world, host) = host();
    let vm = machine(&host, "vm", State::Stopped).await;
    world.fault(None, Verb::Boot, Fault::Hang);
    let begun = Instant::now();
    let killing = async {
        tokio::time::sleep(SECOND).await;
        vm.kill().await
    };
    let (started, killed) = tokio::join!(vm.start(ConsoleSinks::discard()), killing);
    assert_eq!(started.unwrap_err().kind(), ErrorKind::Cancelled);
    killed.stop.unwrap();
    assert!(begun.elapsed() < 5 * SECOND, "it took {:?}", begun.elapsed());
    assert_eq!((vm.state(), world.processes(&id("vm"))), (State::Stopped, 0));
}

#[tokio::test(start_paused = true)]
async fn a_kill_reaches_a_boot_that_hangs_in_another_process() {
    let (world, one) = host();
    let two = Host::new(SimProvider::new(world.clone()));
    let vm = machine(&one, "vm", State::Stopped).await;
    let other = two.adopt(&id("vm")).await.unwrap();
    world.fault(None, Verb::Boot, Fault::Hang);
    let begun = Instant::now();
    let killing = async {
        tokio::time::sleep(SECOND).await;
        other.kill().await
    };
    let (started, killed) = tokio::join!(vm.start(ConsoleSinks::discard()), killing);
    assert_eq!(started.unwrap_err().kind(), ErrorKind::Exited);
    killed.stop.unwrap();
    assert!(begun.elapsed() < 5 * SECOND, "it took {:?}", begun.elapsed());
    assert_eq!((vm.state(), other.state()), (State::Stopped, State::Stopped));
}

#[tokio::test(start_paused = true)]
async fn a_kill_does_not_wait_for_a_holder_that_stands_still() {
    let (world, one) = host();
    let vm = machine(&one, "vm", State::Running).await;
    // Another process took the machine and was stopped: it neither goes on nor lets go.
    let mut still = SimProvider::new(world.clone()).adopt(&id("vm")).await.unwrap().driver;
    still.begin(Action::Suspend).await.unwrap();
    let begun = Instant::now();
    let report = vm.kill().await;
    report.stop.unwrap();
    assert!(report.forced && begun.elapsed() < 10 * SECOND, "it took {:?}", begun.elapsed());
    assert_eq!((vm.state(), world.processes(&id("vm"))), (State::Stopped, 0));
    still.end();
    vm.delete().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_machine_adopted_in_the_middle_of_a_start_is_followed_to_its_end() {
    let (world, one) = host();
    let vm = machine(&one, "vm", State::Stopped).await;
    let two = Host::new(SimProvider::new(world));
    let adopting = async {
        tokio::time::sleep(SECOND).await;
        let other = two.adopt(&id("vm")).await.unwrap();
        assert_eq!(other.state(), State::Starting);
        // Nobody asks anything of it.
        assert_eq!(settled(&other).await, State::Running);
        other.command("echo").arg("here").output().await.unwrap()
    };
    let (started, output) = tokio::join!(vm.start(ConsoleSinks::discard()), adopting);
    started.unwrap();
    assert_eq!(output.stdout, b"here\n");
}

#[tokio::test(start_paused = true)]
async fn a_panic_ends_in_error_unknown_and_delete_leads_out() {
    let rows = [
        (State::Initial, Verb::Clone),
        (State::Stopped, Verb::Boot),
        (State::Suspended, Verb::Resume),
        (State::Running, Verb::Suspend),
        (State::Running, Verb::Shutdown),
        (State::Stopped, Verb::Destroy),
    ];
    for (number, (from, verb)) in rows.into_iter().enumerate() {
        let (world, host) = host();
        let vm = machine(&host, &format!("vm-{number}"), from).await;
        world.fault(None, verb, Fault::Panic);
        let result = match verb {
            Verb::Clone => vm.clone_source().await,
            Verb::Suspend => vm.suspend().await,
            Verb::Shutdown => vm.stop(SECOND).await.stop,
            Verb::Destroy => vm.delete().await,
            _ => vm.start(ConsoleSinks::discard()).await,
        };
        assert_eq!(result.unwrap_err().kind(), ErrorKind::Panicked, "{verb:?}");
        assert_eq!(vm.state(), State::ErrorUnknown, "{verb:?}");
        vm.delete().await.unwrap();
        assert_eq!((vm.state(), world.residue()), (State::Deleted, vec![]), "{verb:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn deleting_what_is_unknown_and_absent_succeeds() {
    let (world, host) = host();
    let vm = machine(&host, "vm", State::Initial).await;
    world.fault(None, Verb::Clone, Fault::Err);
    world.fault(None, Verb::Inspect, Fault::Err);
    vm.clone_source().await.unwrap_err();
    assert_eq!((vm.state(), world.residue()), (State::ErrorUnknown, vec![]));
    vm.delete().await.unwrap();
    assert_eq!(vm.state(), State::Deleted);
}

#[tokio::test(start_paused = true)]
async fn a_subscriber_that_reads_late_or_goes_away_costs_nobody_anything() {
    let (_, host) = host();
    let vm = machine(&host, "vm", State::Initial).await;
    let mut late = vm.subscribe();
    drop(vm.subscribe());
    for _ in 0..50 {
        vm.clone_source().await.unwrap();
        vm.delete().await.unwrap();
    }
    for generation in 0..=200 {
        assert_eq!(late.try_next().unwrap().generation, generation);
    }
    assert!(late.try_next().is_none());
}

#[tokio::test(start_paused = true)]
async fn a_subscription_ends_with_the_last_handle_and_the_machine_does_not() {
    let (world, host) = host();
    let vm = machine(&host, "vm", State::Running).await;
    let mut changes = vm.subscribe();
    drop((vm, host));
    assert_eq!(changes.next().await.unwrap().state, State::Running);
    assert!(changes.next().await.is_none());
    assert_eq!(world.processes(&id("vm")), 1);
}

#[tokio::test(start_paused = true)]
async fn a_failing_boot_tells_the_end_of_its_output_at_once() {
    let (world, host) = host();
    let vm = machine(&host, "vm", State::Stopped).await;
    let begun = Instant::now();
    let crashing = async {
        tokio::time::sleep(SECOND).await;
        world.crash(&id("vm"), 3)
    };
    let (started, _) = tokio::join!(vm.start(ConsoleSinks::discard()), crashing);
    let error = started.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Exited);
    assert!(error.details().unwrap().contains("crashed"), "{error:?}");
    assert!(begun.elapsed() < 2 * SECOND);
}

#[tokio::test(start_paused = true)]
async fn three_tenths_of_a_second_of_grace_are_three_tenths() {
    let (world, host) = host();
    let vm = machine(&host, "vm", State::Running).await;
    world.fault(None, Verb::Shutdown, Fault::Lie);
    let begun = Instant::now();
    let report = vm.stop(Duration::from_millis(300)).await;
    report.stop.unwrap();
    assert!(report.forced && report.run.is_ok());
    let took = begun.elapsed();
    assert!((Duration::from_millis(300)..Duration::from_millis(400)).contains(&took), "{took:?}");
}

#[tokio::test(start_paused = true)]
async fn a_machine_that_cannot_be_suspended_says_so() {
    let host = Host::new(SimProvider::new(World::new()).suspendable(false));
    let vm = host.create(id("vm"), spec()).await.unwrap();
    vm.clone_source().await.unwrap();
    vm.start(ConsoleSinks::discard()).await.unwrap();
    let before = vm.status();
    assert_eq!(vm.suspend().await.unwrap_err().kind(), ErrorKind::Unsupported);
    assert_eq!((vm.status(), vm.suspendable()), (before, false));
}

#[tokio::test(start_paused = true)]
async fn a_name_is_free_again_when_opening_failed() {
    let (world, host) = host();
    world.fault(None, Verb::Open, Fault::Err);
    assert_eq!(host.create(id("vm"), spec()).await.unwrap_err().kind(), ErrorKind::Backend);
    drop(host.create(id("vm"), spec()).await.unwrap());
    host.create(id("vm"), spec()).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_dropped_start_is_undone_and_a_dropped_stop_is_carried_out() {
    let (world, host) = host();
    for state in [State::Stopped, State::Suspended] {
        let vm = machine(&host, &format!("vm-{state}"), state).await;
        let begun = Instant::now();
        tokio::time::timeout(SECOND, vm.start(ConsoleSinks::discard())).await.unwrap_err();
        assert_eq!(settled(&vm).await, state);
        assert!(begun.elapsed() < 2 * SECOND, "a dropped start went on");
        assert_eq!(world.processes(vm.id()), 0);
    }
    let vm = machine(&host, "vm", State::Running).await;
    assert!(tokio::time::timeout(SECOND, vm.stop(60 * SECOND)).await.is_err());
    assert_eq!(settled(&vm).await, State::Stopped);
    assert_eq!(vm.stop(SECOND).await.run.map_err(|e| e.kind()), Ok(()));
}

#[tokio::test(start_paused = true)]
async fn a_resume_that_has_spent_what_was_saved_goes_on_without_its_caller() {
    let (world, host) = host();
    let vm = machine(&host, "vm", State::Suspended).await;
    let begun = Instant::now();
    tokio::time::timeout(3 * SECOND, vm.start(ConsoleSinks::discard())).await.unwrap_err();
    assert_eq!((vm.state(), settled(&vm).await), (State::Starting, State::Running));
    assert_eq!(begun.elapsed().as_secs(), 4);
    // Who wants it off has it off.
    vm.suspend().await.unwrap();
    let (started, killed) = tokio::join!(vm.start(ConsoleSinks::discard()), async {
        tokio::time::sleep(3 * SECOND).await;
        vm.kill().await
    });
    assert_eq!(started.unwrap_err().kind(), ErrorKind::Cancelled);
    killed.stop.unwrap();
    assert_eq!((vm.state(), world.processes(vm.id())), (State::Stopped, 0));
    assert_eq!(world.violations(), Vec::<String>::new());
}

#[tokio::test(start_paused = true)]
async fn what_another_process_deletes_is_not_made_again_by_a_reset() {
    let (world, host) = host();
    let theirs = Host::new(SimProvider::new(world.clone()));
    let vm = machine(&host, "vm", State::Stopped).await;
    theirs.adopt(&id("vm")).await.unwrap().delete().await.unwrap();
    let error = vmkit::reset(&vm, ConsoleSinks::discard(), 60 * SECOND).await.unwrap_err();
    assert_eq!((error.kind(), vm.state()), (ErrorKind::NotFound, State::Deleted), "{error:?}");
    assert_eq!(world.residue(), Vec::<String>::new());
    // Who knows that it is gone makes it again.
    vmkit::reset(&vm, ConsoleSinks::discard(), 60 * SECOND).await.unwrap();
    assert_eq!(vm.state(), State::Running);
}

#[tokio::test(start_paused = true)]
async fn a_suspend_that_is_cut_off_ends_off() {
    let (world, host) = host();
    for killed in [false, true] {
        let vm = machine(&host, &format!("vm-{killed}"), State::Running).await;
        world.fault(None, Verb::Suspend, Fault::Hang);
        let killing = async {
            if killed {
                tokio::time::sleep(SECOND).await;
                vm.kill().await.stop.unwrap();
            }
        };
        let (suspended, ()) = tokio::join!(vm.suspend(), killing);
        let kind = if killed { ErrorKind::Cancelled } else { ErrorKind::TimedOut };
        assert_eq!(suspended.unwrap_err().kind(), kind);
        assert_eq!((vm.state(), world.processes(vm.id())), (State::Stopped, 0));
    }
    // One that fails by itself leaves the machine as it was.
    let vm = machine(&host, "vm", State::Running).await;
    world.fault(None, Verb::Suspend, Fault::Err);
    assert_eq!(vm.suspend().await.unwrap_err().kind(), ErrorKind::Backend);
    assert_eq!(vm.state(), State::Running);
}

#[tokio::test(start_paused = true)]
async fn a_reset_machine_is_new_whatever_it_was_in() {
    let (world, host) = host();
    for state in [State::Initial, State::Stopped, State::Running, State::Suspended, State::Deleted] {
        let vm = machine(&host, &format!("vm-{state}"), State::Running).await;
        vm.command("counter").output().await.unwrap();
        match state {
            State::Running => {}
            State::Suspended => vm.suspend().await.unwrap(),
            _ => vm.stop(SECOND).await.stop.unwrap(),
        }
        if matches!(state, State::Initial | State::Deleted) {
            vm.delete().await.unwrap();
        }
        vmkit::reset(&vm, ConsoleSinks::discard(), 60 * SECOND).await.unwrap();
        assert_eq!(vm.state(), State::Running, "{state}");
        assert!(vm.properties().birth.unwrap().unused);
        assert_eq!(vm.command("counter").output().await.unwrap().stdout, b"1\n", "{state}");
        // A cancelled caller does not stop it half way.
        let mut states = vm.subscribe();
        let reset = vmkit::reset(&vm, ConsoleSinks::discard(), 60 * SECOND);
        assert!(tokio::time::timeout(Duration::from_millis(1), reset).await.is_err());
        while states.next().await.unwrap().state != State::Deleted {}
        while states.next().await.unwrap().state != State::Running {}
    }
    // One that cannot be made again is not there, and says so; a second attempt succeeds.
    let vm = machine(&host, "vm", State::Running).await;
    world.fault(Some(&id("vm")), Verb::Boot, Fault::Err);
    let error = vmkit::reset(&vm, ConsoleSinks::discard(), 60 * SECOND).await.unwrap_err();
    assert_eq!((error.operation(), vm.state()), (Some("Start"), State::Stopped), "{error:?}");
    vmkit::reset(&vm, ConsoleSinks::discard(), 60 * SECOND).await.unwrap();
    assert_eq!(vm.state(), State::Running);
}
