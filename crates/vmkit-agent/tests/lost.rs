//! Lines that break, hosts that leave and callers that give up at the worst moments: nothing is taken for what it is not.

mod common;

use std::sync::{Arc, Mutex};
use std::time::Duration;

use common::{Guest, HANGS, gone, number, run, sh};
use futures::future::join_all;
use rustix::process::{Pid, Signal, kill_process};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::time::{sleep, timeout};
use vmkit_agent::client::{Client, ExecRequest, Exit};
use vmkit_agent::link::MARKER;

fn whole(script: &str) -> ExecRequest {
    ExecRequest { whole: true, ..sh(script) }
}

/// Reads what is there, and what comes in the next moments.
async fn gathered(from: &mut UnixStream) -> Vec<u8> {
    let (mut all, mut chunk) = (Vec::new(), vec![0; 1 << 20]);
    while let Ok(Ok(n)) = timeout(Duration::from_millis(700), from.read(&mut chunk)).await
        && n > 0
    {
        all.extend_from_slice(&chunk[..n]);
    }
    all
}

#[tokio::test]
async fn an_answer_and_the_end_of_the_line_are_an_answer() {
    for session in [false, true] {
        let guest = Guest::start();
        let (line, mut host) = UnixStream::pair().unwrap();
        let mut agent = guest.line().await;
        let proxy = async {
            // The greeting and its answer, and what begins a session.
            let mut chunk = vec![0; 1 << 16];
            for _ in 0..1 + usize::from(session) {
                let n = host.read(&mut chunk).await.unwrap();
                agent.write_all(&chunk[..n]).await.unwrap();
                let n = agent.read(&mut chunk).await.unwrap();
                host.write_all(&chunk[..n]).await.unwrap();
            }
            let n = host.read(&mut chunk).await.unwrap();
            agent.write_all(&chunk[..n]).await.unwrap();
            let said = gathered(&mut agent).await;
            assert!(!said.is_empty());
            // All at once, with the end.
            host.write_all(&said).await.unwrap();
            drop(host);
        };
        let asks = async {
            let client = Client::connect(line).await.unwrap();
            if session {
                // A command that is fed takes one.
                let request = ExecRequest { stdin: true, ..whole("read x") };
                let _ = timeout(Duration::from_millis(300), client.exec(request)).await;
            }
            let mut exec = client.exec(whole("echo said; echo error >&2")).await.ok()?;
            let (mut out, mut err) = (Vec::new(), Vec::new());
            let out_is_whole = exec.stdout.take().unwrap().read_to_end(&mut out).await.is_ok();
            let err_is_whole = exec.stderr.take().unwrap().read_to_end(&mut err).await.is_ok();
            let exit = exec.control.wait().await.ok()?;
            Some((exit, out_is_whole, out, err_is_whole, err))
        };
        let (answer, ()) = timeout(HANGS, async { tokio::join!(asks, proxy) }).await.unwrap();
        match answer {
            None => assert!(session, "an answer that had arrived was lost"),
            Some(answer) => {
                assert_eq!(answer, (Exit::Code(0), true, b"said\n".to_vec(), true, b"error\n".to_vec()));
            }
        }
    }
}

#[tokio::test]
async fn output_that_was_lost_is_no_end_of_it() {
    let guest = Guest::start();
    let client = guest.connect().await;
    // As much as fits on the way: it ends, and nobody has read it.
    let mut exec = timeout(HANGS, client.exec(sh("head -c 300000 /dev/zero"))).await.unwrap().unwrap();
    assert_eq!(timeout(HANGS, exec.control.wait()).await.unwrap().unwrap(), Exit::Code(0));
    kill_process(Pid::from_raw(guest.agent.id() as i32).unwrap(), Signal::KILL).unwrap();
    timeout(HANGS, client.closed()).await.unwrap();
    let mut out = Vec::new();
    let read = timeout(HANGS, exec.stdout.take().unwrap().read_to_end(&mut out)).await.unwrap();
    assert!(out.len() < 300_000, "nothing was lost");
    assert_eq!(read.unwrap_err().kind(), std::io::ErrorKind::ConnectionAborted, "after {} bytes", out.len());
}

#[tokio::test]
async fn what_nobody_waits_for_any_more_is_not_asked_for() {
    let guest = Guest::start();
    let (line, host) = UnixStream::pair().unwrap();
    let agent = guest.line().await;
    let said = Arc::new(Mutex::new(Vec::new()));
    let heard = said.clone();
    tokio::spawn(async move {
        let ((mut from_host, mut to_host), (mut from_agent, mut to_agent)) = (host.into_split(), agent.into_split());
        let back = tokio::io::copy(&mut from_agent, &mut to_host);
        let forth = async {
            let mut chunk = vec![0; 1 << 16];
            while let Ok(n) = from_host.read(&mut chunk).await
                && n > 0
            {
                heard.lock().unwrap().extend_from_slice(&chunk[..n]);
                to_agent.write_all(&chunk[..n]).await.unwrap();
            }
        };
        tokio::join!(back, forth)
    });
    let asked = |word: &str| said.lock().unwrap().windows(word.len()).any(|window| window == word.as_bytes());
    let client = timeout(HANGS, Client::connect(line)).await.unwrap().unwrap();
    assert_eq!(run(&client, whole("exit 1; early")).await.0, Exit::Code(1));
    let agent = Pid::from_raw(guest.agent.id() as i32).unwrap();
    kill_process(agent, Signal::STOP).unwrap();
    let first = {
        let client = client.clone();
        tokio::spawn(async move { run(&client, whole("exit 2; first")).await.0 })
    };
    while !asked("first") {
        sleep(Duration::from_millis(5)).await;
    }
    for _ in 0..3 {
        assert!(timeout(Duration::from_millis(50), client.exec(whole("exit 4; late"))).await.is_err());
    }
    kill_process(agent, Signal::CONT).unwrap();
    assert_eq!(timeout(HANGS, first).await.unwrap().unwrap(), Exit::Code(2));
    assert_eq!(run(&client, whole("exit 3; last")).await.0, Exit::Code(3));
    assert!(asked("early") && asked("last") && !asked("late"), "its caller had given up before it was asked for");
}

#[tokio::test]
async fn a_command_that_no_session_adopts_ends_with_its_line() {
    let guest = Guest::start();
    let file = guest.path("pid");
    let script = format!("echo $$ > {0}.new; mv {0}.new {0}; exec sleep 600", file.display());
    // What a host says, to be said again by one that is killed before it adopts what it began.
    let (line, host) = UnixStream::pair().unwrap();
    let mut agent = guest.line().await;
    let proxy = async {
        let (mut host, mut said) = (host, Vec::new());
        let mut chunk = vec![0; 1 << 16];
        let n = host.read(&mut chunk).await.unwrap();
        agent.write_all(&chunk[..n]).await.unwrap();
        said.push(chunk[..n].to_vec());
        let n = agent.read(&mut chunk).await.unwrap();
        host.write_all(&chunk[..n]).await.unwrap();
        let n = host.read(&mut chunk).await.unwrap();
        said.push(chunk[..n].to_vec());
        said
    };
    let asks = async {
        let client = Client::connect(line).await.unwrap();
        client.exec(whole(&script)).await.unwrap_err();
    };
    let (said, ()) = timeout(HANGS, async { tokio::join!(proxy, asks) }).await.unwrap();
    drop(agent);
    assert!(said.iter().all(|said| said.starts_with(&MARKER)));

    let mut line = guest.line().await;
    let mut chunk = vec![0; 1 << 16];
    line.write_all(&said[0]).await.unwrap();
    assert!(timeout(HANGS, line.read(&mut chunk)).await.unwrap().unwrap() > 0);
    line.write_all(&said[1]).await.unwrap();
    assert!(timeout(HANGS, line.read(&mut chunk)).await.unwrap().unwrap() > 0);
    let pid = number(&file).await;
    // A session: the first frame of one, which asks whether anybody is there.
    line.write_all(&[0, 2, 0, 1, 0, 0, 0, 0, 0, 0, 0, 7]).await.unwrap();
    assert!(timeout(HANGS, line.read(&mut chunk)).await.unwrap().unwrap() > 0);
    drop(line);
    assert!(gone(pid).await, "it outlived the host that began it");
}

#[tokio::test]
async fn commands_that_queue_behind_a_question_run_side_by_side() {
    const ALL: usize = 20;
    let guest = Guest::start();
    let client = guest.connect().await;
    let file = guest.path("begun");
    let script = format!("echo >> {0}; sleep 0.2; wc -l < {0}", file.display());
    let asked = async {
        let ping = client.ping();
        let all = join_all((0..ALL).map(|_| run(&client, whole(&script))));
        tokio::join!(ping, all)
    };
    let (ping, all) = timeout(HANGS, asked).await.unwrap();
    ping.unwrap();
    let seen = all.iter().map(|(_, out, _)| String::from_utf8_lossy(out).trim().parse::<usize>().unwrap());
    assert!(seen.sum::<usize>() > ALL * (ALL + 1) / 2, "each began when the one before it had ended");
}

#[tokio::test]
async fn many_commands_speak_at_once() {
    const ALL: usize = 200;
    let guest = Guest::start();
    let client = guest.connect().await;
    let speaks = async |n: usize| {
        let request =
            ExecRequest { stdin: true, ..sh(&format!("echo out {n}; echo err {n} >&2; read word; echo $word")) };
        let mut exec = client.exec(request).await.unwrap();
        for stream in [exec.stdout.as_mut(), exec.stderr.as_mut()] {
            let wanted = format!("{n}\n");
            let mut said = vec![0; 4 + wanted.len()];
            stream.unwrap().read_exact(&mut said).await.unwrap();
            assert!(said.ends_with(wanted.as_bytes()));
        }
        exec
    };
    // None of them has ended when the last one speaks.
    let mut all = timeout(HANGS, join_all((0..ALL).map(speaks))).await.expect("some are not heard");
    timeout(HANGS, client.ping()).await.unwrap().unwrap();
    for exec in &mut all {
        exec.stdin.as_mut().unwrap().write_all(b"word\n").await.unwrap();
    }
    for mut exec in all {
        let mut out = String::new();
        timeout(HANGS, exec.stdout.as_mut().unwrap().read_to_string(&mut out)).await.unwrap().unwrap();
        assert_eq!(out, "word\n");
        assert_eq!(timeout(HANGS, exec.control.wait()).await.unwrap().unwrap(), Exit::Code(0));
    }
}
