//! The process that waits for the next command.

mod common;

use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use tokio::io::AsyncWriteExt;
use tokio::time::{sleep, timeout};
use vmkit_agent::client::{AgentError, Client, ExecRequest, Exit};

use common::{Guest, HANGS, alive, finish, gone, run, sh};

/// The agent's spare, as soon as it has one.
async fn spare(guest: &Guest) -> u32 {
    let children = format!("/proc/{0}/task/{0}/children", guest.agent.id());
    for _ in 0..4000 {
        let children = std::fs::read_to_string(&children).unwrap();
        let named = |pid: &&str| {
            std::fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name.trim() == "vmkit-spare")
        };
        // One that could not become a program has its name until it is reaped, but no memory; and one that waits sleeps.
        let lives = |pid: &u32| {
            let read = |file: &str| std::fs::read_to_string(format!("/proc/{pid}/{file}")).unwrap_or_default();
            !read("maps").is_empty() && read("stat").contains(") S ")
        };
        if let Some(pid) = children.split_whitespace().filter(named).map(|pid| pid.parse().unwrap()).find(lives) {
            return pid;
        }
        sleep(Duration::from_millis(5)).await;
    }
    panic!("no spare was made");
}

/// A guest with one, and a session with it.
async fn with_spare() -> (Guest, Client, u32) {
    let guest = Guest::start();
    let client = guest.connect().await;
    assert_eq!(run(&client, sh("exit 3")).await.0, Exit::Code(3));
    let pid = spare(&guest).await;
    (guest, client, pid)
}

fn signal(pid: u32, signal: Signal) {
    kill_process(Pid::from_raw(pid as i32).unwrap(), signal).unwrap();
}

/// Who has stopped a process so that only killing it moves it; lets go of it when dropped.
struct Tracer(std::process::Child);

impl Tracer {
    fn attach(pid: u32) -> Tracer {
        // By a system call of its own, so that no tool need be there: PTRACE_ATTACH is 16.
        let script = format!(
            "import ctypes, os, sys, time\nc = ctypes.CDLL(None, use_errno=True)\nc.ptrace.argtypes = [ctypes.c_long] * 4\n\
             assert c.ptrace(16, {pid}, 0, 0) == 0, ctypes.get_errno()\nos.waitpid({pid}, 0x40000000)\nprint(1, flush=True)\n\
             sys.stdin.read()"
        );
        let mut tracer = std::process::Command::new("python3")
            .args(["-c", &script])
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let mut ready = [0; 2];
        std::io::Read::read_exact(tracer.stdout.as_mut().unwrap(), &mut ready).unwrap();
        Tracer(tracer)
    }
}

impl Drop for Tracer {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        let _ = self.0.wait();
    }
}

async fn text(client: &Client, request: ExecRequest) -> String {
    let (exit, out, err) = run(client, request).await;
    assert_eq!(exit, Exit::Code(0), "{}", String::from_utf8_lossy(&err));
    String::from_utf8(out).unwrap()
}

#[tokio::test]
async fn becomes_the_next_command_and_is_as_any_other() {
    let (guest, client, first) = with_spare().await;
    let script = "echo $$; pwd; cut -d' ' -f5 /proc/$$/stat; readlink /proc/$$/fd/0; cat /proc/$$/comm";
    let by_spare = text(&client, sh(script)).await;
    // At once: there is none by now.
    let by_none = text(&client, sh(script)).await;
    let pid = |text: &str| text.lines().next().unwrap().parse::<u32>().unwrap();
    assert_eq!(pid(&by_spare), first);
    assert_ne!(pid(&by_none), first);
    let rest = |text: &str| text.replace(&format!("{}\n", pid(text)), "PID\n");
    assert_eq!(rest(&by_spare), rest(&by_none));
    assert!(by_spare.contains("/dev/null"), "{by_spare}");

    // A shell changes its own while it waits.
    let signals = || ExecRequest {
        program: "grep".into(),
        args: ["-E", "^(Pid|Sig(Blk|Ign)):", "/proc/self/status"].map(str::to_owned).to_vec(),
        ..sh("")
    };
    let pid = spare(&guest).await;
    let by_spare = text(&client, signals()).await;
    let by_none = text(&client, signals()).await;
    let (first, rest) = by_spare.split_once('\n').unwrap();
    assert_eq!(first, format!("Pid:\t{pid}"));
    assert_eq!(Some(rest), by_none.split_once('\n').map(|(_, rest)| rest));
    assert!(rest.contains("SigBlk:\t0000000000000000"), "{rest}");

    // It has nothing open but its streams, whatever the agent was started with.
    let pid = spare(&guest).await;
    assert_eq!(text(&client, sh("echo $$; ls /proc/$$/fd")).await, format!("{pid}\n0\n1\n2\n"));

    // Nothing is connected; and in a directory.
    let pid = spare(&guest).await;
    let out = guest.path("out");
    let script = format!("{{ pwd; readlink /proc/$$/fd/1 /proc/$$/fd/2; echo $$; }} > {}", out.display());
    let cwd = guest.dir.path().to_str().unwrap().to_owned();
    let request = ExecRequest { stdout: false, stderr: false, cwd: Some(cwd.clone()), ..sh(&script) };
    assert_eq!(run(&client, request).await, (Exit::Code(0), Vec::new(), Vec::new()));
    let said = std::fs::read_to_string(&out).unwrap();
    let lines: Vec<&str> = said.lines().collect();
    assert_eq!(lines, [&cwd, out.to_str().unwrap(), "/dev/null", &pid.to_string()]);

    // Everything is.
    let pid = spare(&guest).await;
    let mut exec =
        client.exec(ExecRequest { stdin: true, ..sh("cat; echo $$; echo error >&2; exit 7") }).await.unwrap();
    assert_eq!(exec.pid, pid);
    exec.stdin.as_mut().unwrap().write_all(b"word\n").await.unwrap();
    assert_eq!(finish(exec).await, (Exit::Code(7), format!("word\n{pid}\n").into_bytes(), b"error\n".to_vec()));

    // As another user, where that is permitted.
    if rustix::process::geteuid().is_root() {
        let pid = spare(&guest).await;
        let said = text(&client, ExecRequest { user: Some("65534:65534".into()), ..sh("id -u; id -g; echo $$") }).await;
        assert_eq!(said, format!("65534\n65534\n{pid}\n"));
    }
}

#[tokio::test]
async fn what_it_cannot_become_is_said_and_the_next_one_can() {
    let (guest, client, _) = with_spare().await;
    let program = |program: &str| ExecRequest { program: program.into(), ..ExecRequest::default() };
    assert!(matches!(client.exec(program("/no/such/program")).await, Err(AgentError::NotFound(_))));
    spare(&guest).await;
    let elsewhere = ExecRequest { cwd: Some("/no/such/directory".into()), ..sh("true") };
    assert!(matches!(client.exec(elsewhere).await, Err(AgentError::NoSuchDirectory(_))));
    spare(&guest).await;
    assert!(matches!(client.exec(program("/etc")).await, Err(AgentError::NotExecutable(_))));
    let pid = spare(&guest).await;
    assert_eq!(text(&client, sh("echo $$")).await, format!("{pid}\n"));
}

#[tokio::test]
async fn killed_it_is_replaced_and_stopped_it_goes_on() {
    let (guest, client, first) = with_spare().await;
    signal(first, Signal::KILL);
    assert!(gone(first).await);
    assert_ne!(text(&client, sh("echo $$")).await, format!("{first}\n"));
    let second = spare(&guest).await;
    signal(second, Signal::STOP);
    let said = timeout(HANGS, text(&client, sh("echo $$"))).await.unwrap();
    assert_eq!(said, format!("{second}\n"));
    // Asked to end, as whoever ends all processes does; the other kills with a dump of the memory that it shares.
    for kills in [Signal::TERM, Signal::ABORT] {
        let next = spare(&guest).await;
        signal(next, kills);
        assert!(gone(next).await, "it ignores a signal that a new program does not");
        assert_eq!(run(&client, sh("exit 4")).await.0, Exit::Code(4));
    }
}

#[tokio::test]
async fn held_by_somebody_it_holds_nobody_up() {
    let (guest, client, held) = with_spare().await;
    // As a debugger does it: it does not go on by being told to.
    let tracer = Tracer::attach(held);
    let said = timeout(HANGS, text(&client, sh("echo $$"))).await.unwrap();
    assert_ne!(said, format!("{held}\n"));
    drop(tracer);
    assert!(gone(held).await, "nobody will ever give it an order");
    let next = spare(&guest).await;
    assert_eq!(text(&client, sh("echo $$")).await, format!("{next}\n"));
}

#[tokio::test]
async fn keeps_nothing_open_that_is_not_its_own() {
    let (guest, client, first) = with_spare().await;
    let mut exec = client.exec(ExecRequest { stdin: true, ..sh("cat; echo ended") }).await.unwrap();
    assert_eq!(exec.pid, first);
    // Made while the agent has the other ends of that one's streams.
    assert_eq!(run(&client, sh("true")).await.0, Exit::Code(0));
    let second = spare(&guest).await;
    let open = std::fs::read_dir(format!("/proc/{second}/fd")).unwrap().count();
    assert_eq!(open, 4, "three streams, and what may become its input");
    exec.stdin.as_mut().unwrap().write_all(b"word\n").await.unwrap();
    assert_eq!(finish(exec).await, (Exit::Code(0), b"word\nended\n".to_vec(), Vec::new()));
    assert!(alive(second));
}

#[tokio::test]
async fn ends_with_the_agent_and_what_it_became_does_not() {
    let (mut guest, client, _) = with_spare().await;
    let exec = client.exec(ExecRequest { detached: true, ..sh("sleep 600") }).await.unwrap();
    let pid = exec.pid;
    assert_eq!(run(&client, sh("true")).await.0, Exit::Code(0));
    let waits = spare(&guest).await;
    guest.agent.kill().unwrap();
    guest.agent.wait().unwrap();
    assert!(gone(waits).await, "nobody will ever give it an order");
    sleep(Duration::from_millis(100)).await;
    assert!(alive(pid), "a command that is detached ended with the agent");
    signal(pid, Signal::KILL);
}
