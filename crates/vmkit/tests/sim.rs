//! The simulator itself: faults do what they say, gates hold, and the impossible is noticed.
#![cfg(all(feature = "sim", feature = "conformance"))]

mod common;

use std::time::Duration;

use common::{id, machine, spec};
use vmkit::sim::{Fault, SimProvider, Verb, World};
use vmkit::{Action, ConsoleSinks, Driver, ErrorKind, ExitStatus, Fact, Host, Provider, Spent, State};

fn host() -> (World, Host<SimProvider>) {
    let world = World::new();
    (world.clone(), Host::new(SimProvider::new(world)))
}

#[tokio::test(start_paused = true)]
async fn every_fault_does_what_it_says() {
    let second = Duration::from_secs(1);
    // The fault of a boot: its result, whether a process is there then, and whether it is two seconds later.
    let rows = [
        (Fault::Ok, Some(true), true, true),
        (Fault::Err, Some(false), true, true),
        (Fault::ErrButDone, Some(false), true, true),
        (Fault::Lie, Some(true), false, false),
        (Fault::Hang, None, true, true),
        (Fault::Slow(second), Some(true), true, true),
        (Fault::DieLater(second), Some(true), true, false),
    ];
    for (fault, result, process, later) in rows {
        let world = World::new();
        let mut driver = SimProvider::new(world.clone()).open(&id("vm"), &spec()).await.unwrap();
        driver.begin(Action::Clone).await.unwrap();
        driver.clone_source().await.unwrap();
        world.fault(Some(&id("vm")), Verb::Boot, fault);
        let booted = tokio::time::timeout(60 * second, driver.boot(ConsoleSinks::discard())).await;
        assert_eq!(booted.ok().map(|booted| booted.is_ok()), result, "{fault:?}");
        assert_eq!(world.processes(&id("vm")) > 0, process, "{fault:?}");
        tokio::time::sleep(2 * second).await;
        assert_eq!(world.processes(&id("vm")) > 0, later, "{fault:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_dropped_call_is_left_half_done() {
    let world = World::new();
    world.latency(common::latency());
    let mut driver = SimProvider::new(world.clone()).open(&id("vm"), &spec()).await.unwrap();
    let moment = Duration::from_millis(10);
    driver.begin(Action::Clone).await.unwrap();
    tokio::time::timeout(moment, driver.clone_source()).await.unwrap_err();
    assert_eq!((driver.inspect().await.unwrap(), world.has_disk(&id("vm"))), (Fact::Broken, true));
    driver.destroy().await.unwrap();
    driver.clone_source().await.unwrap();
    tokio::time::timeout(moment, driver.boot(ConsoleSinks::discard())).await.unwrap_err();
    assert_eq!((driver.inspect().await.unwrap(), world.processes(&id("vm"))), (Fact::Broken, 1));
    driver.kill().await.unwrap();
    driver.boot(ConsoleSinks::discard()).await.unwrap();
    tokio::time::timeout(moment, driver.suspend()).await.unwrap_err();
    assert_eq!((driver.inspect().await.unwrap(), world.has_saved_execution(&id("vm"))), (Fact::Broken, false));
    driver.kill().await.unwrap();
    tokio::time::timeout(moment, driver.destroy()).await.unwrap_err();
    assert_eq!(driver.inspect().await.unwrap(), Fact::Broken);
    driver.destroy().await.unwrap();
    assert_eq!(driver.inspect().await.unwrap(), Fact::Absent);
    assert_eq!(world.violations(), Vec::<String>::new());
}

#[tokio::test(start_paused = true)]
async fn what_a_dead_process_left_is_cleared_up_by_the_next() {
    // How far the process got, and what the next one finds.
    let rows = [(Verb::Clone, None), (Verb::Boot, Some(State::Stopped)), (Verb::Suspend, Some(State::Running))];
    for (verb, expected) in rows {
        let world = World::new();
        world.latency(common::latency());
        let provider = SimProvider::new(world.clone());
        let mut driver = provider.open(&id("vm"), &spec()).await.unwrap();
        let moment = Duration::from_millis(10);
        driver.begin(Action::Clone).await.unwrap();
        if verb == Verb::Clone {
            tokio::time::timeout(moment, driver.clone_source()).await.unwrap_err();
        } else {
            driver.clone_source().await.unwrap();
        }
        match verb {
            Verb::Boot => {
                tokio::time::timeout(moment, driver.boot(ConsoleSinks::discard())).await.unwrap_err();
            }
            Verb::Suspend => {
                driver.boot(ConsoleSinks::discard()).await.unwrap();
                tokio::time::timeout(moment, driver.suspend()).await.unwrap_err();
            }
            _ => {}
        }
        drop(driver);
        let adopted = provider.adopt(&id("vm")).await;
        assert_eq!(adopted.ok().map(|adopted| adopted.state), expected, "died in {verb:?}");
        let listed = provider.list().await.unwrap();
        assert_eq!(listed.first().map(|found| found.state), expected, "died in {verb:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn the_impossible_is_a_violation() {
    let world = World::new();
    let provider = SimProvider::new(world.clone());
    let mut driver = provider.open(&id("vm"), &spec()).await.unwrap();
    let mut expected = 0;
    let mut violated = |world: &World, what: &str| {
        expected += 1;
        let violations = world.violations();
        assert_eq!(violations.len(), expected, "{what}: {violations:?}");
        assert!(violations.last().unwrap().contains(what), "{what}: {violations:?}");
    };
    driver.clone_source().await.unwrap_err();
    violated(&world, "without the machine's lock");
    driver.begin(Action::Clone).await.unwrap();
    driver.boot(ConsoleSinks::discard()).await.unwrap_err();
    violated(&world, "without a disk");
    driver.clone_source().await.unwrap();
    driver.resume(ConsoleSinks::discard(), &Spent::new()).await.unwrap_err();
    violated(&world, "without a saved execution");
    driver.boot(ConsoleSinks::discard()).await.unwrap();
    driver.boot(ConsoleSinks::discard()).await.unwrap_err();
    violated(&world, "while its process is alive");
    driver.suspend().await.unwrap();
    driver.boot(ConsoleSinks::discard()).await.unwrap_err();
    violated(&world, "over a saved execution");
    world.fault(None, Verb::Destroy, Fault::Err);
    driver.destroy().await.unwrap_err();
    driver.boot(ConsoleSinks::discard()).await.unwrap_err();
    violated(&world, "whose destruction began");
    driver.destroy().await.unwrap();
    world.plant_foreign(&id("theirs"));
    let mut driver = provider.open(&id("theirs"), &spec()).await.unwrap();
    driver.begin(Action::Start).await.unwrap();
    driver.boot(ConsoleSinks::discard()).await.unwrap_err();
    assert!(world.violations().iter().any(|what| what.contains("somebody else's")));
    assert!(world.foreign_intact(&id("theirs")));
}

#[tokio::test(start_paused = true)]
#[should_panic(expected = "without a disk")]
async fn a_strict_world_panics() {
    let world = World::new();
    world.strict(true);
    let mut driver = SimProvider::new(world).open(&id("vm"), &spec()).await.unwrap();
    driver.begin(Action::Start).await.unwrap();
    let _ = driver.boot(ConsoleSinks::discard()).await;
}

#[tokio::test(start_paused = true)]
async fn gates_hold_calls_until_they_are_released() {
    let (world, host) = host();
    world.stepping(true);
    let vm = host.create(id("vm"), spec()).await.unwrap();
    let cloning = vm.clone();
    let cloning = tokio::spawn(async move { cloning.clone_source().await });
    world.wait_parked(&id("vm"), Verb::Clone).await;
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert_eq!((vm.state(), world.has_disk(&id("vm"))), (State::Cloning, false));
    assert_eq!(world.parked().len(), 1);
    assert!(world.release(&id("vm")));
    cloning.await.unwrap().unwrap();
    assert!(!world.release(&id("vm")));
    // A caller that goes away leaves its gate, and the rollback parks at the next.
    let starting = vm.clone();
    let starting = tokio::spawn(async move { starting.start(ConsoleSinks::discard()).await });
    world.wait_parked(&id("vm"), Verb::Boot).await;
    starting.abort();
    world.wait_parked(&id("vm"), Verb::Kill).await;
    assert_eq!(world.parked().len(), 1);
    world.stepping(false);
    assert_eq!(common::settled(&vm).await, State::Stopped);
}

#[tokio::test(start_paused = true)]
async fn faults_end_when_the_world_heals() {
    let (world, host) = host();
    let vm = machine(&host, "vm", State::Stopped).await;
    world.fault(None, Verb::Boot, Fault::Hang);
    world.fault(None, Verb::Suspend, Fault::Err);
    let healing = async {
        tokio::time::sleep(Duration::from_secs(5)).await;
        world.heal();
    };
    let (started, ()) = tokio::join!(vm.start(ConsoleSinks::discard()), healing);
    started.unwrap();
    vm.suspend().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn guests_have_programs() {
    let (_, host) = host();
    let vm = machine(&host, "vm", State::Running).await;
    // The command, its standard output, its standard error, how it ends.
    let code = ExitStatus::Code;
    let rows: [(&[&str], &str, &str, ExitStatus); 20] = [
        (&["echo", "a", "b"], "a b\n", "", code(0)),
        (&["/bin/echo", "-n", "a"], "a", "", code(0)),
        (&["warn", "a"], "", "a\n", code(0)),
        (&["true"], "", "", code(0)),
        (&["false"], "", "", code(1)),
        (&["exit", "42"], "", "", code(42)),
        (&["signal", "15"], "", "", ExitStatus::Signal(15)),
        (&["sleep", "3600"], "", "", code(0)),
        (&["sleep", "x"], "", "", code(1)),
        (&["pwd"], "/\n", "", code(0)),
        (&["whoami"], "root\n", "", code(0)),
        (&["counter"], "1\n", "", code(0)),
        (&["counter"], "2\n", "", code(0)),
        (&["recall", "k"], "", "", code(1)),
        (&["remember", "k", "v"], "", "", code(0)),
        (&["recall", "k"], "v\n", "", code(0)),
        (&["cat", "/f"], "", "cat: /f: no such file\n", code(1)),
        (&["alive", "1"], "", "", code(1)),
        (&["sh", "-c", "echo out; echo err >&2; exit 7; echo never"], "out\n", "err\n", code(7)),
        (&["sh", "-c", "kill -9 $$"], "", "", ExitStatus::Signal(9)),
    ];
    for (words, stdout, stderr, status) in rows {
        let output = vm.command(words[0]).args(words[1..].iter().copied()).output().await.unwrap();
        let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
        assert_eq!((text(&output.stdout).as_str(), text(&output.stderr).as_str()), (stdout, stderr), "{words:?}");
        assert_eq!(output.status, status, "{words:?}");
    }
    let env = vm.command("env").env("A", "1").user("app:app").output().await.unwrap();
    assert_eq!(env.stdout, b"A=1\n");
    let missing = vm.command("nothing").status().await.unwrap_err();
    assert_eq!(missing.kind(), ErrorKind::NotFound);
    assert_eq!(vm.command("/etc/passwd").status().await.unwrap_err().kind(), ErrorKind::PermissionDenied);
    assert_eq!(vm.command("/opt/echo").status().await.unwrap_err().kind(), ErrorKind::NotFound);
}

#[tokio::test(start_paused = true)]
async fn endless_output_takes_bounded_memory_and_ends_with_its_reader() {
    use tokio::io::AsyncReadExt;
    let (_, host) = host();
    let vm = machine(&host, "vm", State::Running).await;
    let mut child = vm.command("yes").stdout(true).spawn().await.unwrap();
    let mut first = [0; 4];
    child.stdout.as_mut().unwrap().read_exact(&mut first).await.unwrap();
    assert_eq!(&first, b"y\ny\n");
    drop(child.stdout.take());
    assert_eq!(child.wait().await.unwrap(), ExitStatus::Signal(13));
}

#[tokio::test(start_paused = true)]
async fn guests_answer_with_the_faults_they_were_given() {
    let (world, host) = host();
    let vm = machine(&host, "vm", State::Running).await;
    world.fault(None, Verb::Ping, Fault::Err);
    assert_eq!(vm.ping().await.unwrap_err().kind(), ErrorKind::Agent);
    vm.ping().await.unwrap();
    world.fault(None, Verb::Spawn, Fault::Hang);
    let crashing = async {
        tokio::time::sleep(Duration::from_secs(1)).await;
        world.crash(&id("vm"), 1)
    };
    let (status, _) = tokio::join!(vm.command("true").status(), crashing);
    assert_eq!(status.unwrap_err().kind(), ErrorKind::NotRunning);
}
