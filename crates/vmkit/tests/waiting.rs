//! `wait_for_state` and `cleanup`, by their tables.
#![cfg(all(feature = "sim", feature = "conformance"))]

mod common;

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use common::{host, id, machine};
use tokio::time::Instant;
use vmkit::sim::{Fault, SimProvider, Verb, World};
use vmkit::{
    ConsoleSinks, ErrorKind, Host, Id, Look, Observed, Result, State, Subscription, cleanup, look, wait_for_state,
};

const SECOND: Duration = Duration::from_secs(1);

/// What is seen, the target, the intermediates: what comes of it, and after how many looks.
type Wait<'a> = (&'a [State], State, &'a [State], Option<ErrorKind>, usize);
/// The state, what is to go wrong on the way, and which calls are made.
type Cleanup<'a> = (State, Option<(Verb, Fault)>, &'a [Verb]);

/// An instance that cannot publish: it goes through a list of states, one a look.
struct Polled(Id, Vec<State>, AtomicUsize);

impl Observed for Polled {
    fn id(&self) -> &Id {
        &self.0
    }

    async fn state(&self) -> Result<State> {
        let at = self.2.fetch_add(1, Ordering::Relaxed);
        Ok(self.1[at.min(self.1.len() - 1)])
    }

    fn subscribe(&self) -> Option<Subscription> {
        None
    }
}

#[tokio::test(start_paused = true)]
async fn waiting_follows_its_table() {
    use State::{Cloning, ErrorUnknown, Initial, Running, Starting, Stopped};
    let polled = |states: &[State]| Polled(id("polled"), states.to_vec(), AtomicUsize::new(0));
    let rows: [Wait<'_>; 9] = [
        (&[Running], Running, &[], None, 1),
        (&[Running], Running, &[Starting], None, 1),
        (&[Stopped, Starting, Running], Running, &[], None, 3),
        (&[Stopped, Starting, Running], Running, &[Stopped, Starting], None, 3),
        (&[Stopped, Starting, Running], Running, &[Starting], Some(ErrorKind::UnexpectedState), 1),
        (&[Starting, ErrorUnknown, Running], Running, &[Starting], Some(ErrorKind::UnexpectedState), 2),
        (&[Starting, ErrorUnknown, Running], Running, &[], None, 3),
        (&[Initial, Cloning], Stopped, &[], Some(ErrorKind::TimedOut), 10),
        (&[Initial, Cloning], Stopped, &[Initial, Cloning], Some(ErrorKind::TimedOut), 10),
    ];
    for (seen, target, intermediates, expected, looks) in rows {
        let of = polled(seen);
        let deadline = Some(Instant::now() + Duration::from_millis(950));
        let result = wait_for_state(&of, Duration::from_millis(100), deadline, target, intermediates).await;
        let row = format!("{seen:?} to {target} by {intermediates:?}");
        match expected {
            None => result.unwrap_or_else(|e| panic!("{row}: {e:?}")),
            Some(kind) => {
                let error = result.expect_err(&row);
                assert_eq!(error.kind(), kind, "{row}");
                let last = seen[(looks - 1).min(seen.len() - 1)];
                assert_eq!(error.state(), Some(last), "{row}");
                assert!(error.to_string().contains(target.name()), "{row}: {error}");
            }
        }
        assert_eq!(of.2.load(Ordering::Relaxed), looks, "{row}: looks");
    }
    let of = polled(&[Running]);
    let zero = wait_for_state(&of, Duration::ZERO, None, Running, &[]).await;
    assert_eq!(zero.unwrap_err().kind(), ErrorKind::InvalidArgument);
    assert_eq!(of.2.load(Ordering::Relaxed), 0, "a look before the arguments were judged");
    assert_eq!(look(&id("x"), Running, Running, &[Stopped]).unwrap(), Look::Done);
    assert_eq!(look(&id("x"), Stopped, Running, &[Stopped]).unwrap(), Look::NotYet(Stopped));
    let strayed = look(&id("x"), Initial, Running, &[Stopped, Starting]).unwrap_err().to_string();
    assert!(["Initial", "Running", "Stopped", "Starting"].iter().all(|name| strayed.contains(name)), "{strayed}");
}

#[tokio::test(start_paused = true)]
async fn a_state_that_lasts_no_time_is_seen() {
    let world = World::new();
    let host = Host::new(SimProvider::new(world));
    let vm = machine(&host, "vm", State::Stopped).await;
    let waiting = wait_for_state(&vm, 10 * SECOND, None, State::Starting, &[]);
    let (waited, started) = tokio::join!(waiting, vm.start(ConsoleSinks::discard()));
    waited.unwrap();
    started.unwrap();
}

#[tokio::test(start_paused = true)]
async fn waiting_for_what_nobody_drives_is_cancelled() {
    let (_, host) = host();
    let vm = machine(&host, "vm", State::Stopped).await;
    struct Ended(Id, std::sync::Mutex<Option<Subscription>>);
    impl Observed for Ended {
        fn id(&self) -> &Id {
            &self.0
        }
        async fn state(&self) -> Result<State> {
            Ok(State::Stopped)
        }
        fn subscribe(&self) -> Option<Subscription> {
            self.1.lock().unwrap().take()
        }
    }
    let of = Ended(id("vm"), std::sync::Mutex::new(Some(vm.subscribe())));
    drop((vm, host));
    let error = wait_for_state(&of, SECOND, None, State::Running, &[]).await.unwrap_err();
    assert_eq!((error.kind(), error.state()), (ErrorKind::Cancelled, Some(State::Stopped)));
}

#[tokio::test(start_paused = true)]
async fn cleaning_up_follows_its_table() {
    let rows: [Cleanup<'_>; 9] = [
        (State::Initial, None, &[]),
        (State::Deleted, None, &[]),
        (State::Stopped, None, &[Verb::Destroy]),
        (State::Suspended, None, &[Verb::Destroy]),
        (State::Running, None, &[Verb::Shutdown, Verb::Kill, Verb::Destroy]),
        (State::Running, Some((Verb::Shutdown, Fault::Err)), &[Verb::Shutdown, Verb::Kill, Verb::Destroy]),
        (
            State::Running,
            Some((Verb::Shutdown, Fault::Panic)),
            &[Verb::Shutdown, Verb::Kill, Verb::Kill, Verb::Destroy],
        ),
        (State::Running, Some((Verb::Kill, Fault::Err)), &[Verb::Shutdown, Verb::Kill, Verb::Destroy]),
        (State::Stopped, Some((Verb::Destroy, Fault::ErrButDone)), &[Verb::Destroy]),
    ];
    for (number, (state, fault, expected)) in rows.into_iter().enumerate() {
        let (world, host) = host();
        let vm = machine(&host, &format!("vm-{number}"), state).await;
        let before = world.calls().len();
        if let Some((verb, fault)) = fault {
            world.fault(None, verb, fault);
        }
        cleanup(&vm, 5 * SECOND, 60 * SECOND).await.unwrap_or_else(|e| panic!("row {number}: {e:?}"));
        let calls: Vec<Verb> = world.calls()[before..].iter().map(|call| call.verb).collect();
        let mutating: Vec<Verb> = calls.into_iter().filter(|verb| verb.is_mutating()).collect();
        assert_eq!(mutating, expected, "row {number}");
        assert_eq!(world.residue(), Vec::<String>::new(), "row {number}");
    }
}

#[tokio::test(start_paused = true)]
async fn cleaning_up_waits_for_what_is_under_way() {
    let (world, host) = host();
    let vm = machine(&host, "vm", State::Stopped).await;
    let starting = vm.clone();
    let starting = tokio::spawn(async move { starting.start(ConsoleSinks::discard()).await });
    wait_for_state(&vm, SECOND, None, State::Starting, &[]).await.unwrap();
    cleanup(&vm, 5 * SECOND, 60 * SECOND).await.unwrap();
    starting.await.unwrap().unwrap();
    assert_eq!((vm.state(), world.residue()), (State::Deleted, vec![]));
}

#[tokio::test(start_paused = true)]
async fn cleaning_up_has_a_deadline_of_its_own() {
    let (world, host) = host();
    let vm = machine(&host, "vm", State::Stopped).await;
    world.fault(None, Verb::Destroy, Fault::Hang);
    let error = cleanup(&vm, SECOND, 2 * SECOND).await.unwrap_err();
    assert_eq!((error.kind(), error.state()), (ErrorKind::TimedOut, Some(State::Deleting)));
    assert!(error.to_string().contains("Deleting"), "{error}");
}

#[tokio::test(start_paused = true)]
async fn a_cancelled_caller_does_not_stop_a_cleanup() {
    let (world, host) = host();
    let vm = machine(&host, "vm", State::Running).await;
    let own = vm.clone();
    let cleaning = tokio::spawn(async move { cleanup(&own, 5 * SECOND, 60 * SECOND).await });
    wait_for_state(&vm, SECOND, None, State::Stopping, &[]).await.unwrap();
    cleaning.abort();
    wait_for_state(&vm, SECOND, Some(Instant::now() + 60 * SECOND), State::Deleted, &[]).await.unwrap();
    assert_eq!(world.residue(), Vec::<String>::new());
}
