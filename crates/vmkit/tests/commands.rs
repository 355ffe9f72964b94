//! What commands are refused before anybody is asked, and what their errors say.
#![cfg(all(feature = "sim", feature = "conformance"))]

mod common;

use std::time::Duration;

use common::{host, machine};
use vmkit::sim::Verb;
use vmkit::{Command, ErrorKind, Instance, State};

const SECRET: &str = "a secret";

/// The longest argument that Linux passes to a process, without the zero at its end.
const LONGEST: usize = (128 << 10) - 1;

async fn refused(command: Command) -> vmkit::Error {
    let error = command.output().await.unwrap_err();
    assert_eq!((error.kind(), error.instance()), (ErrorKind::InvalidArgument, Some("vm")), "{error:?}");
    assert!(error.next_step().is_some() && !error.is_retryable(), "{error:?}");
    assert!(!format!("{error:?}").contains(SECRET), "{error:?}");
    error
}

#[tokio::test(start_paused = true)]
async fn what_no_process_can_be_given_is_refused_before_the_guest_is_asked() {
    let (world, host) = host();
    let vm = machine(&host, "vm", State::Running).await;
    let echo = |vm: &Instance| vm.command("echo");
    for (key, value, name) in [
        ("A=B", SECRET, "A"),
        ("A=a secret", "", "A"),
        ("", SECRET, ""),
        ("A\0", SECRET, "A\0"),
        ("A", "a secret\0", "A"),
    ] {
        let error = refused(echo(&vm).env("FINE", "x").env(key, value)).await;
        assert!(error.message().contains(&format!("the variable {name:?}")), "{error:?}");
    }
    refused(echo(&vm).env("A", SECRET.repeat(LONGEST / 8 + 1))).await;
    let error = refused(echo(&vm).arg("fine").arg("a secret\0")).await;
    assert!(error.message().contains("argument 2"), "{error:?}");
    refused(echo(&vm).arg("x".repeat(LONGEST + 1))).await;
    refused(vm.command("ec\0ho")).await;
    assert!(!world.calls().iter().any(|call| call.verb == Verb::Spawn));
    // As long as may be.
    let long = "x".repeat(LONGEST);
    assert_eq!(echo(&vm).arg(&long).output().await.unwrap().stdout.len(), LONGEST + 1);
}

#[tokio::test(start_paused = true)]
async fn what_is_no_signal_is_refused() {
    let (_world, host) = host();
    let vm = machine(&host, "vm", State::Running).await;
    let mut child = vm.command("sleep").arg("1000").spawn().await.unwrap();
    for signal in [i32::MIN, -9, -1, 0, 65, 1000, i32::MAX] {
        let error = child.signal(signal).await.unwrap_err();
        assert_eq!((error.kind(), error.instance()), (ErrorKind::InvalidArgument, Some("vm")), "{error:?}");
        assert!(error.next_step().is_some(), "{error:?}");
    }
    child.signal(64).await.unwrap();
    assert_eq!(child.wait().await.unwrap().signal(), Some(64));
    // Also of one that has ended.
    assert_eq!(child.signal(65).await.unwrap_err().kind(), ErrorKind::InvalidArgument);
    child.signal(1).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_command_that_takes_too_long_says_what_to_do() {
    let (_world, host) = host();
    let vm = machine(&host, "vm", State::Running).await;
    let late = vm.command("sleep").arg("1000").timeout(Duration::from_secs(1)).status().await.unwrap_err();
    assert_eq!(late.kind(), ErrorKind::TimedOut);
    assert!(late.next_step().is_some(), "{late:?}");
}
