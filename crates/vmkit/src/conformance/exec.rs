//! Executing commands.

use std::error::Error as _;
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};

use super::bench::{Bench, eventually, fails_as, start};
use super::rig::{Program, Rig};
use crate::command::Child;
use crate::error::{Error, ErrorKind};
use crate::guest::{Binding, ExitStatus, GuestFile};
use crate::instance::Instance;

const SECRET: &str = "hunter2-hunter2";

pub(super) async fn nothing_is_executed_unless_running<R: Rig>(bench: &Bench<R>) {
    let store = || Program::Store("left".into(), "behind".into());
    let vm = bench.initial("idle").await;
    fails_as(bench.command(&vm, store()).status().await, ErrorKind::NotRunning, "executing while Initial");
    vm.clone_source().await.unwrap_or_else(|e| panic!("cloning: {e:?}"));
    fails_as(bench.command(&vm, store()).status().await, ErrorKind::NotRunning, "executing while Stopped");
    fails_as(vm.ping().await, ErrorKind::NotRunning, "asking while Stopped");
    start(&vm).await;
    let shown = bench.execute(&vm, Program::Show("left".into())).await;
    assert!(!shown.status.success(), "a command that was refused was executed later");
}

pub(super) async fn exit_codes_are_told<R: Rig>(bench: &Bench<R>) {
    let vm = bench.running("codes").await;
    for code in [0, 1, 7, 255] {
        assert_eq!(bench.execute(&vm, Program::Exit(code)).await.status, ExitStatus::Code(code));
    }
}

pub(super) async fn signals_are_told_from_codes<R: Rig>(bench: &Bench<R>) {
    let vm = bench.running("signals").await;
    for signal in [9, 15] {
        assert_eq!(bench.execute(&vm, Program::Signal(signal)).await.status, ExitStatus::Signal(signal));
        assert_eq!(bench.execute(&vm, Program::Exit(128 + signal)).await.status, ExitStatus::Code(128 + signal));
    }
    let mut child = spawn(bench, &vm, Program::Sleep).await;
    child.signal(15).await.unwrap_or_else(|e| panic!("signalling: {e:?}"));
    assert_eq!(child.wait().await.ok(), Some(ExitStatus::Signal(15)), "a sleep that was signalled");
}

pub(super) async fn the_environment_is_passed<R: Rig>(bench: &Bench<R>) {
    let vm = bench.running("environment").await;
    let command = bench.command(&vm, Program::Env("VMKIT_WORD".into())).env("VMKIT_WORD", "a b=c $d");
    let output = command.output().await.unwrap_or_else(|e| panic!("executing: {e:?}"));
    assert_eq!(String::from_utf8_lossy(&output.stdout), "a b=c $d\n");
    let without = bench.execute(&vm, Program::Env("VMKIT_WORD".into())).await;
    assert!(!without.status.success(), "one command's environment reached another");
}

pub(super) async fn the_directory_is_passed<R: Rig>(bench: &Bench<R>) {
    let vm = bench.running("directory").await;
    let output = bench.command(&vm, Program::Directory).current_dir("/dev").output().await;
    assert_eq!(output.unwrap_or_else(|e| panic!("executing: {e:?}")).stdout, b"/dev\n");
}

pub(super) async fn programs_that_cannot_run<R: Rig>(bench: &Bench<R>) {
    let vm = bench.running("cannot").await;
    fails_as(bench.command(&vm, Program::Missing).output().await, ErrorKind::NotFound, "a program that is not there");
    let refused = bench.command(&vm, Program::NotExecutable).output().await;
    fails_as(refused, ErrorKind::PermissionDenied, "a file that cannot be executed");
    assert_eq!(bench.say(&vm, Program::Print("still".into())).await, "still", "after programs that could not run");
}

pub(super) async fn arguments_are_in_no_error<R: Rig>(bench: &Bench<R>) {
    let vm = bench.running("discreet").await;
    let secret = |program| bench.command(&vm, program).arg(SECRET).env("TOKEN", SECRET);
    let debugged = format!("{:?}", secret(Program::Cat));
    assert!(!debugged.contains(SECRET), "a command tells its arguments: {debugged}");
    discreet(fails_as(secret(Program::Missing).output().await, ErrorKind::NotFound, "a missing program"));
    let refused = secret(Program::NotExecutable).output().await;
    discreet(fails_as(refused, ErrorKind::PermissionDenied, "a file that cannot be executed"));
    let _ = super::bench::stop(&vm, Duration::ZERO).await;
    discreet(fails_as(secret(Program::Cat).output().await, ErrorKind::NotRunning, "executing while Stopped"));
}

fn discreet(error: Error) {
    let mut told = format!("{error} {error:?} {:?} {:?}", error.details(), error.next_step());
    let mut source = error.source();
    while let Some(error) = source {
        told = format!("{told} {error} {error:?}");
        source = error.source();
    }
    assert!(!told.contains(SECRET), "an error tells arguments: {told}");
}

pub(super) async fn a_dropped_command_is_killed_with_its_tree<R: Rig>(bench: &Bench<R>) {
    let vm = bench.running("tree").await;
    let mut parent = bench.command(&vm, Program::Family).stdout(true).spawn().await;
    let parent_child = parent.as_mut().unwrap_or_else(|e| panic!("spawning: {e:?}"));
    let (parent_pid, grandchild) = (parent_child.id(), first_number(parent_child).await);
    for pid in [parent_pid, grandchild] {
        assert!(alive(bench, &vm, pid).await, "process {pid} of a command is not there");
    }
    drop(parent);
    for (who, pid) in [("a dropped command", parent_pid), ("its child", grandchild)] {
        eventually(&format!("{who} is killed"), || async { !alive(bench, &vm, pid).await }).await;
    }
}

pub(super) async fn a_late_command_is_killed<R: Rig>(bench: &Bench<R>) {
    let vm = bench.running("late").await;
    let mut child = bench
        .command(&vm, Program::Sleep)
        .timeout(Duration::from_secs(1))
        .spawn()
        .await
        .unwrap_or_else(|e| panic!("spawning: {e:?}"));
    let pid = child.id();
    fails_as(child.wait().await, ErrorKind::TimedOut, "a command that takes too long");
    eventually("a command that took too long is killed", || async { !alive(bench, &vm, pid).await }).await;
}

pub(super) async fn commands_run_side_by_side<R: Rig>(bench: &Bench<R>) {
    let vm = bench.running("both").await;
    let mut cats = Vec::new();
    for _ in 0..3 {
        let command = bench.command(&vm, Program::Cat).stdin(true).stdout(true);
        cats.push(command.spawn().await.unwrap_or_else(|e| panic!("spawning: {e:?}")));
    }
    // The last one first: nobody waits for those before.
    for (number, cat) in cats.iter_mut().enumerate().rev() {
        let word = format!("word {number}");
        let (Some(mut stdin), Some(mut stdout)) = (cat.stdin.take(), cat.stdout.take()) else {
            panic!("streams that were asked for are not there");
        };
        stdin.write_all(word.as_bytes()).await.unwrap_or_else(|e| panic!("writing: {e}"));
        stdin.shutdown().await.unwrap_or_else(|e| panic!("closing: {e}"));
        drop(stdin);
        let mut read = String::new();
        stdout.read_to_string(&mut read).await.unwrap_or_else(|e| panic!("reading: {e}"));
        assert_eq!(read, word);
        assert_eq!(cat.wait().await.ok(), Some(ExitStatus::Code(0)));
    }
}

async fn spawn<R: Rig>(bench: &Bench<R>, vm: &Instance, program: Program) -> Child {
    bench.command(vm, program).spawn().await.unwrap_or_else(|e| panic!("spawning: {e:?}"))
}

async fn alive<R: Rig>(bench: &Bench<R>, vm: &Instance, pid: u32) -> bool {
    bench.execute(vm, Program::Alive(pid)).await.status.success()
}

async fn first_number(child: &mut Child) -> u32 {
    let stdout = child.stdout.as_mut().unwrap_or_else(|| panic!("no standard output"));
    let mut line = String::new();
    BufReader::new(stdout).read_line(&mut line).await.unwrap_or_else(|e| panic!("reading: {e}"));
    line.trim().parse().unwrap_or_else(|e| panic!("{line:?} is no process id: {e}"))
}

pub(super) async fn a_binding_is_applied<R: Rig>(bench: &Bench<R>) {
    let vm = bench.running("bound").await;
    let secret = |text: &str| GuestFile { path: "/run/bound/secret".into(), content: text.into(), mode: 0o600 };
    let binding = Binding {
        hostname: Some("another".into()),
        env: vec![("VMKIT_WORD".into(), "late".into())],
        files: vec![secret(SECRET)],
    };
    assert!(!format!("{binding:?}").contains(SECRET), "a binding tells what is in its files");
    vm.bind(binding).await.unwrap_or_else(|e| panic!("binding: {e:?}"));
    assert_eq!(bench.say(&vm, Program::Hostname).await, "another");
    assert_eq!(bench.say(&vm, Program::Env("VMKIT_WORD".into())).await, "late");
    assert_eq!(bench.say(&vm, Program::Read("/run/bound/secret".into())).await, SECRET);
    let own = bench.command(&vm, Program::Env("VMKIT_WORD".into())).env("VMKIT_WORD", "own").output().await;
    assert_eq!(own.unwrap_or_else(|e| panic!("executing: {e:?}")).stdout, b"own\n", "a command's own variable");
    let relative = Binding { files: vec![GuestFile { path: "here".into(), ..secret(SECRET) }], ..Binding::default() };
    discreet(fails_as(vm.bind(relative).await, ErrorKind::InvalidArgument, "a file without an absolute path"));
    let _ = super::bench::stop(&vm, Duration::ZERO).await;
    fails_as(vm.bind(Binding::default()).await, ErrorKind::NotRunning, "binding a machine that is off");
}
