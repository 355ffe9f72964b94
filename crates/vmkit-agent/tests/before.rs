//! What is asked of an agent before a session has begun, and what becomes of it when one begins.

mod common;

use std::time::Duration;

use common::{Guest, HANGS, alive, finish, gone, number, run, sh};
use rustix::process::{Pid, Signal, kill_process};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::time::{sleep, timeout};
use vmkit_agent::client::{AgentError, Bind, Client, ExecRequest, Exit};
use vmkit_agent::link::MARKER;

fn whole(script: &str) -> ExecRequest {
    ExecRequest { whole: true, ..sh(script) }
}

/// A line that can be listened to: what each side said, until it is asked.
struct Tapped {
    line: UnixStream,
    said: tokio::task::JoinHandle<(Vec<u8>, Vec<u8>)>,
}

async fn tapped(guest: &Guest) -> Tapped {
    let path = guest.path("tap");
    let listener = UnixListener::bind(&path).unwrap();
    let line = UnixStream::connect(&path).await.unwrap();
    let (ours, _) = listener.accept().await.unwrap();
    let theirs = guest.line().await;
    let said = tokio::spawn(async move {
        let ((mut from_host, mut to_host), (mut from_guest, mut to_guest)) = (ours.into_split(), theirs.into_split());
        let forth = async {
            let mut said = Vec::new();
            let mut chunk = vec![0; 4096];
            while let Ok(n) = from_host.read(&mut chunk).await
                && n > 0
            {
                said.extend_from_slice(&chunk[..n]);
                to_guest.write_all(&chunk[..n]).await.unwrap();
            }
            to_guest.shutdown().await.unwrap();
            said
        };
        let back = async {
            let mut said = Vec::new();
            let mut chunk = vec![0; 4096];
            while let Ok(n) = from_guest.read(&mut chunk).await
                && n > 0
            {
                said.extend_from_slice(&chunk[..n]);
                let _ = to_host.write_all(&chunk[..n]).await;
            }
            said
        };
        tokio::join!(forth, back)
    });
    Tapped { line, said }
}

/// What was said apart from handshakes, which are frames of 32 bytes with what is said with them.
fn sessions(mut said: &[u8]) -> usize {
    let mut others = 0;
    while !said.is_empty() {
        if said.starts_with(&MARKER) {
            let length = u32::from_le_bytes(said[28..32].try_into().unwrap()) as usize;
            said = &said[32 + length + usize::from(length > 0)..];
        } else {
            others += 1;
            said = &said[1..];
        }
    }
    others
}

#[tokio::test]
async fn short_requests_need_no_session() {
    let guest = Guest::start();
    let tap = tapped(&guest).await;
    let client = timeout(HANGS, Client::connect(tap.line)).await.unwrap().unwrap();
    client.ping().await.unwrap();
    client.bind(Bind { env: vec![("KEY".into(), "value".into())], ..Bind::default() }).await.unwrap();
    let (exit, out, err) = run(&client, whole("printf $KEY; printf err >&2; exit 7")).await;
    assert_eq!((exit, out, err), (Exit::Code(7), b"value".to_vec(), b"err".to_vec()));
    assert_eq!(run(&client, whole("kill -9 $$")).await.0, Exit::Signal(9));
    client.freeze(true).await.unwrap();
    client.freeze(false).await.unwrap();
    let nothing = ExecRequest { stdout: false, stderr: false, ..whole("echo unheard") };
    assert_eq!(run(&client, nothing).await, (Exit::Code(0), Vec::new(), Vec::new()));
    let missing = ExecRequest { program: "/no/such/program".into(), ..whole("") };
    assert!(matches!(client.exec(missing).await, Err(AgentError::NotFound(_))));
    let nowhere = ExecRequest { cwd: Some("/no/such/directory".into()), ..whole("true") };
    assert!(matches!(client.exec(nowhere).await, Err(AgentError::NoSuchDirectory(_))));
    drop(client);
    let (host, agent) = timeout(HANGS, tap.said).await.unwrap().unwrap();
    assert!(!host.is_empty() && sessions(&host) == 0 && sessions(&agent) == 0, "a session was begun");
}

#[tokio::test]
async fn a_command_that_lasts_goes_on_in_a_session() {
    let guest = Guest::start();
    let client = guest.connect().await;
    let script = "echo begun; sleep 0.5; echo $$ over; echo error >&2; exit 3";
    let mut exec = timeout(HANGS, client.exec(whole(script))).await.unwrap().unwrap();
    let pid = exec.pid;
    assert!(alive(pid));
    let mut begun = [0; 6];
    timeout(HANGS, exec.stdout.as_mut().unwrap().read_exact(&mut begun)).await.unwrap().unwrap();
    assert_eq!(&begun, b"begun\n");
    let (exit, out, err) = finish(exec).await;
    assert_eq!((exit, out, err), (Exit::Code(3), format!("{pid} over\n").into_bytes(), b"error\n".to_vec()));

    // A signal finds it, and so does the end of who holds it.
    let mut exec = timeout(HANGS, client.exec(whole("exec sleep 600"))).await.unwrap().unwrap();
    exec.control.signal(15).await.unwrap();
    assert_eq!(timeout(HANGS, exec.control.wait()).await.unwrap().unwrap(), Exit::Signal(15));
    let exec = guest.connect().await.exec(whole("exec sleep 600")).await.unwrap();
    let pid = exec.pid;
    drop(exec);
    assert!(gone(pid).await);
}

#[tokio::test]
async fn much_output_is_whole() {
    let guest = Guest::start();
    let client = guest.connect().await;
    let (exit, out, _) = run(&client, whole("head -c 3000000 /dev/zero")).await;
    assert_eq!((exit, out.len()), (Exit::Code(0), 3_000_000));
    assert!(out.iter().all(|&byte| byte == 0));
    // What holds an output open is waited for, and the end is told.
    let client = guest.connect().await;
    let exec =
        timeout(HANGS, client.exec(whole("echo first; (sleep 0.4; echo last) & exit 4"))).await.unwrap().unwrap();
    assert_eq!(finish(exec).await, (Exit::Code(4), b"first\nlast\n".to_vec(), Vec::new()));
}

#[tokio::test]
async fn others_are_served_while_one_is_waited_for() {
    let guest = Guest::start();
    let client = guest.connect().await;
    let running = {
        let client = client.clone();
        tokio::spawn(async move { client.exec(whole("sleep 0.1; exec sleep 600")).await })
    };
    let marks: Vec<_> = (0..20)
        .map(|n| {
            let client = client.clone();
            tokio::spawn(async move { run(&client, whole(&format!("echo {n}; exit {n}"))).await })
        })
        .collect();
    timeout(HANGS, client.ping()).await.unwrap().unwrap();
    for (n, mark) in marks.into_iter().enumerate() {
        let expected = (Exit::Code(n as i32), format!("{n}\n").into_bytes(), Vec::new());
        assert_eq!(timeout(HANGS, mark).await.unwrap().unwrap(), expected);
    }
    let exec = timeout(HANGS, running).await.unwrap().unwrap().unwrap();
    assert!(alive(exec.pid));
    drop(exec);

    // On another line too.
    let first = guest.connect().await;
    let second = guest.connect().await;
    let running = tokio::spawn(async move { first.exec(whole("exec sleep 600")).await });
    assert_eq!(run(&second, whole("exit 5")).await.0, Exit::Code(5));
    drop(timeout(HANGS, running).await.unwrap().unwrap().unwrap());
    assert_eq!(run(&second, whole("exit 6")).await.0, Exit::Code(6));
}

#[tokio::test]
async fn who_gives_up_ends_what_was_begun() {
    let guest = Guest::start();
    let client = guest.connect().await;
    for n in 0..10 {
        let file = guest.path(&format!("pid{n}"));
        let script = format!("echo $$ > {0}.new; mv {0}.new {0}; exec sleep 600", file.display());
        let exec = client.exec(whole(&script));
        // At each stage: just asked, begun, and gone over to a session.
        assert!(timeout(Duration::from_millis(30 * n), exec).await.is_err() || n > 5);
        if n > 2 {
            assert!(gone(number(&file).await).await, "it outlived who asked for it");
        }
        timeout(HANGS, client.ping()).await.unwrap().unwrap();
        assert_eq!(run(&client, whole("exit 9")).await.0, Exit::Code(9));
    }
}

#[tokio::test]
async fn a_host_that_is_killed_ends_what_it_began() {
    let guest = Guest::start();
    let file = guest.path("pid");
    let script = format!("echo $$ > {0}.new; mv {0}.new {0}; exec sleep 600", file.display());
    let client = guest.connect().await;
    let asking = tokio::spawn(async move { client.exec(whole(&script)).await });
    let pid = number(&file).await;
    asking.abort();
    assert!(gone(pid).await);
    assert_eq!(run(&guest.connect().await, whole("exit 9")).await.0, Exit::Code(9));
}

#[tokio::test]
async fn what_runs_when_its_machine_is_saved_lives_on() {
    let guest = Guest::start();
    let client = guest.connect().await;
    let file = guest.path("pid");
    let script = format!("echo $$ > {0}.new; mv {0}.new {0}; sleep 600", file.display());
    let left = {
        let asking = client.clone();
        let asked = tokio::spawn(async move { asking.exec(whole(&script)).await });
        number(&file).await;
        let left = timeout(HANGS, client.leave()).await.unwrap().unwrap();
        let _ = timeout(HANGS, asked).await.unwrap().unwrap();
        left
    };
    let pid = number(&file).await;
    drop(left);
    sleep(Duration::from_millis(300)).await;
    assert!(alive(pid), "it ended with its session, as if its machine had not been saved");
    assert_eq!(run(&guest.connect().await, whole("exit 9")).await.0, Exit::Code(9));
    kill_process(Pid::from_raw(pid as i32).unwrap(), Signal::KILL).unwrap();
    assert!(gone(pid).await, "and is reaped");
}

#[tokio::test]
async fn an_agent_that_keeps_the_thread_sleeps_and_hears_everybody() {
    let guest = Guest::start();
    let first = guest.connect().await;
    let second = guest.connect().await;
    for _ in 0..20 {
        assert_eq!(run(&first, whole("exit 1")).await.0, Exit::Code(1));
        assert_eq!(run(&second, whole("exit 2")).await.0, Exit::Code(2));
        let third = guest.connect().await;
        assert_eq!(run(&third, sh("exit 3")).await.0, Exit::Code(3));
    }
    // What a command leaves in the background is reaped by whoever is its parent, and is no reason to be awake.
    assert_eq!(run(&first, whole("sleep 0.2 > /dev/null 2>&1 & exit 0")).await.0, Exit::Code(0));
    sleep(Duration::from_millis(700)).await;
    let ticks = || {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", guest.agent.id())).unwrap();
        let fields: Vec<&str> = stat[stat.rfind(')').unwrap() + 2..].split(' ').collect();
        fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
    };
    let before = ticks();
    sleep(Duration::from_secs(1)).await;
    assert!(ticks() - before <= 2, "an idle agent uses a processor");
}
