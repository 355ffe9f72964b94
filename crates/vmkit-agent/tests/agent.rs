//! The agent as a process of its own, over a Unix socket: the same code as over virtio-serial.

mod common;

use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::time::{sleep, timeout};
use vmkit_agent::client::{AgentError, Client, ExecRequest, Exit};
use vmkit_agent::link::{FRAME, Handshake, Kind, MARKER, VERSION};
use vmkit_agent::protocol::{Failure, Reply, decode};

use common::{Guest, HANGS, alive, finish, gone, number, run, sh};

#[tokio::test]
async fn tells_streams_codes_and_signals_apart() {
    let guest = Guest::start();
    let client = guest.connect().await;
    client.ping().await.unwrap();
    let (exit, out, err) = run(&client, sh("printf out; printf err >&2; exit 7")).await;
    assert_eq!((exit, out.as_slice(), err.as_slice()), (Exit::Code(7), &b"out"[..], &b"err"[..]));
    assert_eq!(run(&client, sh("kill -9 $$")).await.0, Exit::Signal(9));
    assert_eq!(run(&client, sh("kill -TERM $$")).await.0, Exit::Signal(15));
    assert_eq!(run(&client, sh(":")).await, (Exit::Code(0), Vec::new(), Vec::new()));
}

#[tokio::test]
async fn environment_directory_and_standard_input() {
    let guest = Guest::start();
    let client = guest.connect().await;
    let mut request = sh("echo \"$GREETING $PWD\"; cat");
    request.env = vec![("GREETING".into(), "hi".into())];
    request.cwd = Some("/usr".into());
    let (exit, out, _) = run(&client, request).await;
    // Standard input that is not connected reads as empty.
    assert_eq!((exit, out.as_slice()), (Exit::Code(0), &b"hi /usr\n"[..]));
    let mut request = sh("");
    request.program = "env".into();
    request.args.clear();
    request.env_clear = true;
    request.env = vec![("ONLY".into(), "this".into())];
    assert_eq!(run(&client, request).await.1, b"ONLY=this\n");
}

#[tokio::test]
async fn says_what_was_wrong_and_never_the_arguments() {
    let guest = Guest::start();
    let client = guest.connect().await;
    let plain = guest.path("plain");
    std::fs::write(&plain, "no program").unwrap();
    let strange = guest.path("strange");
    std::fs::write(&strange, [0u8; 64]).unwrap();
    std::fs::set_permissions(&strange, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let ask = |program: &str| ExecRequest {
        program: program.into(),
        args: vec!["--password=secret".into()],
        env: vec![("TOKEN".into(), "secret".into())],
        ..ExecRequest::default()
    };
    let mut errors = Vec::new();
    for program in ["no-such-program", "/no/such/program", ""] {
        let error = client.exec(ask(program)).await.unwrap_err();
        assert!(matches!(error, AgentError::NotFound(_)), "{program}: {error:?}");
        errors.push(error);
    }
    for program in [plain.to_str().unwrap(), strange.to_str().unwrap(), "/tmp"] {
        let error = client.exec(ask(program)).await.unwrap_err();
        assert!(matches!(error, AgentError::NotExecutable(_)), "{program}: {error:?}");
        errors.push(error);
    }
    let error = client.exec(ExecRequest { cwd: Some("/no/such".into()), ..ask("true") }).await.unwrap_err();
    assert!(matches!(error, AgentError::NoSuchDirectory(_)), "{error:?}");
    errors.push(error);
    let error = client.exec(ExecRequest { args: vec!["secret".repeat(25_000)], ..ask("true") }).await.unwrap_err();
    assert!(matches!(error, AgentError::Invalid(_)), "{error:?}");
    errors.push(error);
    let error = client.exec(ExecRequest { user: Some("nobody-here".into()), ..ask("true") }).await.unwrap_err();
    assert!(matches!(error, AgentError::NoSuchUser(_)), "{error:?}");
    errors.push(error);
    for error in errors {
        assert!(!format!("{error} {error:?}").contains("secret"), "{error:?}");
    }
    assert!(!format!("{:?}", ask("true")).contains("secret"));
}

#[tokio::test]
async fn runs_as_another_user() {
    if !rustix::process::geteuid().is_root() {
        // Only root may: then the answer must be an error, not a process that runs as somebody else.
        let guest = Guest::start();
        let error = guest.connect().await.exec(ExecRequest { user: Some("0:12".into()), ..sh("id -u") }).await;
        assert!(error.is_err());
        return;
    }
    let guest = Guest::start();
    let client = guest.connect().await;
    let request = ExecRequest { user: Some("4242:4343".into()), ..sh("id -u; id -g; id -G; echo $HOME") };
    assert_eq!(String::from_utf8(run(&client, request).await.1).unwrap(), "4242\n4343\n4343\n/\n");
}

#[tokio::test]
async fn carries_every_byte_both_ways() {
    let guest = Guest::start();
    let client = guest.connect().await;
    // Full of what the link layer has to escape.
    let mut data = Vec::new();
    for n in 0..400_000u32 {
        data.extend_from_slice(&MARKER[..(n % 9) as usize]);
        data.extend_from_slice(&n.wrapping_mul(2_654_435_761).to_le_bytes());
    }
    let mut exec = client.exec(ExecRequest { stdin: true, ..sh("cat") }).await.unwrap();
    let (mut stdin, mut stdout) = (exec.stdin.take().unwrap(), exec.stdout.take().unwrap());
    let sent = data.clone();
    let writer = tokio::spawn(async move {
        stdin.write_all(&sent).await.unwrap();
        stdin.shutdown().await.unwrap();
    });
    let mut got = Vec::new();
    timeout(HANGS, stdout.read_to_end(&mut got)).await.unwrap().unwrap();
    writer.await.unwrap();
    assert!(got == data, "{} bytes sent, {} came back", data.len(), got.len());
    assert_eq!(exec.control.wait().await.unwrap(), Exit::Code(0));
}

#[tokio::test]
async fn holds_a_fast_writer_back_and_nobody_else() {
    let guest = Guest::start();
    let client = guest.connect().await;
    let mut exec = client.exec(sh("head -c 300000000 /dev/zero")).await.unwrap();
    let mut stdout = exec.stdout.take().unwrap();
    let mut first = [0; 10];
    stdout.read_exact(&mut first).await.unwrap();
    sleep(Duration::from_millis(300)).await;
    let before = guest.resident();
    // Its reader sleeps; others are served.
    for _ in 0..20 {
        assert_eq!(run(&client, sh("echo x")).await.1, b"x\n");
    }
    let mut total = first.len();
    let mut chunk = vec![0; 1 << 16];
    let mut peak = before;
    loop {
        let n = timeout(HANGS, stdout.read(&mut chunk)).await.unwrap().unwrap();
        if n == 0 {
            break;
        }
        total += n;
        peak = peak.max(guest.resident());
    }
    assert_eq!(total, 300_000_000);
    assert!(peak < before + 8 * 1024, "the agent grew from {before} KiB to {peak} KiB");
    assert_eq!(exec.control.wait().await.unwrap(), Exit::Code(0));
}

#[tokio::test]
async fn many_at_once_and_a_limit() {
    let guest = Guest::start();
    let client = guest.connect().await;
    let all: Vec<_> = (0..64)
        .map(|n| {
            let client = client.clone();
            tokio::spawn(async move { run(&client, sh(&format!("sleep 0.2; echo {n}; exit {n}"))).await })
        })
        .collect();
    for (n, one) in all.into_iter().enumerate() {
        let (exit, out, _) = one.await.unwrap();
        assert_eq!((exit, out), (Exit::Code(n as i32), format!("{n}\n").into_bytes()));
    }
    let quiet = || ExecRequest { program: "sleep".into(), args: vec!["100".into()], ..ExecRequest::default() };
    let mut held = Vec::new();
    for _ in 0..256 {
        held.push(client.exec(quiet()).await.unwrap());
    }
    assert!(matches!(client.exec(quiet()).await.unwrap_err(), AgentError::Limit(_)));
    let pids: Vec<u32> = held.iter().map(|exec| exec.pid).collect();
    drop(held);
    for pid in pids {
        assert!(gone(pid).await);
    }
    assert_eq!(run(&client, sh("echo free")).await.1, b"free\n");
}

#[tokio::test]
async fn dropping_kills_the_whole_tree() {
    let guest = Guest::start();
    let client = guest.connect().await;
    let (group, left) = (guest.path("group"), guest.path("left"));
    // One child in its group, and one that has left it.
    let script = format!(
        "sleep 1000 & echo $! > {}; setsid sh -c 'echo $$ > {}; exec sleep 1000' & wait",
        group.display(),
        left.display()
    );
    let exec = client.exec(sh(&script)).await.unwrap();
    let pids = [exec.pid, number(&group).await, number(&left).await];
    assert!(pids.iter().all(|&pid| alive(pid)));
    drop(exec);
    for pid in pids {
        assert!(gone(pid).await, "{pid} lives on");
    }
    client.ping().await.unwrap();
}

#[tokio::test]
async fn signals_reach_the_group() {
    let guest = Guest::start();
    let client = guest.connect().await;
    let mut exec =
        client.exec(sh("trap 'echo caught; exit 3' TERM; echo ready; while :; do sleep 0.05; done")).await.unwrap();
    let mut stdout = exec.stdout.take().unwrap();
    let mut line = [0; 6];
    stdout.read_exact(&mut line).await.unwrap();
    exec.control.signal(15).await.unwrap();
    let mut rest = Vec::new();
    stdout.read_to_end(&mut rest).await.unwrap();
    assert_eq!((exec.control.wait().await.unwrap(), rest.as_slice()), (Exit::Code(3), &b"caught\n"[..]));
    // One that has ended is left alone.
    exec.control.signal(9).await.unwrap();
}

#[tokio::test]
async fn the_exit_is_told_while_a_child_holds_the_output() {
    let guest = Guest::start();
    let client = guest.connect().await;
    let note = guest.path("pid");
    let mut exec = client.exec(sh(&format!("sleep 1000 & echo $! > {}; exit 4", note.display()))).await.unwrap();
    assert_eq!(timeout(HANGS, exec.control.wait()).await.unwrap().unwrap(), Exit::Code(4));
    let pid = number(&note).await;
    drop(exec);
    // What a command leaves in the background is its own.
    client.ping().await.unwrap();
    sleep(Duration::from_millis(100)).await;
    assert!(alive(pid));
    rustix::process::kill_process(rustix::process::Pid::from_raw(pid as i32).unwrap(), rustix::process::Signal::KILL)
        .unwrap();
}

/// Whether it is told of its start with its end or before: it is the same command.
#[tokio::test]
async fn a_command_that_is_waited_for_is_told_of_when_it_lasts() {
    let guest = Guest::start();
    let client = guest.connect().await;
    let whole = |script: &str| ExecRequest { whole: true, ..sh(script) };
    let (exit, out, err) = run(&client, whole("printf $$; printf err >&2; exit 7")).await;
    assert_eq!((exit, err.as_slice()), (Exit::Code(7), &b"err"[..]));
    assert_ne!(out, b"");
    // It never ends by itself, and yet its start is known, and it can be ended.
    let mut lasting = timeout(HANGS, client.exec(whole("echo begun; exec sleep 600"))).await.unwrap().unwrap();
    assert!(alive(lasting.pid));
    lasting.control.signal(15).await.unwrap();
    assert_eq!(finish(lasting).await, (Exit::Signal(15), b"begun\n".to_vec(), Vec::new()));
    // More than is looked at in one piece, and nobody who waits for its start meanwhile.
    let (exit, out, _) = run(&client, whole("head -c 300000 /dev/zero")).await;
    assert_eq!((exit, out.len()), (Exit::Code(0), 300_000));
    let fed = ExecRequest { stdin: true, program: "cat".into(), args: Vec::new(), ..whole("") };
    let mut fed = timeout(HANGS, client.exec(fed)).await.unwrap().unwrap();
    fed.stdin.as_mut().unwrap().write_all(b"in").await.unwrap();
    assert_eq!(finish(fed).await, (Exit::Code(0), b"in".to_vec(), Vec::new()));
    // Nobody waits any more: it ends, told or not.
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("pid");
    let starting = client.exec(whole(&format!("echo $$ >{}; exec sleep 600", file.display())));
    drop(timeout(Duration::from_millis(1), starting).await);
    if let Ok(Ok(pid)) = timeout(Duration::from_secs(2), async { Ok::<_, ()>(number(&file).await) }).await {
        assert!(gone(pid).await, "it outlives whoever waited for its start");
    }
}

#[tokio::test]
async fn a_lost_line_ends_what_it_ran_unless_detached() {
    let guest = Guest::start();
    let line = guest.line().await.into_std().unwrap();
    let cut = line.try_clone().unwrap();
    let client = Client::connect(UnixStream::from_std(line).unwrap()).await.unwrap();
    let mut plain = client.exec(sh("echo up; sleep 1000")).await.unwrap();
    let detached =
        client.exec(ExecRequest { detached: true, ..sh("while :; do echo x; sleep 0.01; done") }).await.unwrap();
    assert!(alive(plain.pid) && alive(detached.pid));
    // The host's handles are all still held: what is lost is the line.
    cut.shutdown(std::net::Shutdown::Both).unwrap();
    assert!(gone(plain.pid).await);
    assert!(matches!(timeout(HANGS, plain.control.wait()).await.unwrap(), Err(AgentError::Closed)));
    guest.connect().await.ping().await.unwrap();
    assert!(alive(detached.pid), "a detached command ended with its session");
    let group = rustix::process::Pid::from_raw(detached.pid as i32).unwrap();
    rustix::process::kill_process_group(group, rustix::process::Signal::KILL).unwrap();
}

#[tokio::test]
async fn a_second_hello_on_a_line_ends_the_first_session() {
    let guest = Guest::start();
    // A relay that stays connected while hosts come and go, as a virtio port does.
    let line = guest.line().await;
    let (mut from_agent, mut to_agent) = line.into_split();
    let (ours, theirs) = tokio::io::duplex(1 << 16);
    let (mut from_host, mut to_host) = tokio::io::split(theirs);
    let first = tokio::spawn(async move {
        let mut chunk = vec![0; 1 << 16];
        loop {
            match from_host.read(&mut chunk).await {
                Ok(0) | Err(_) => return to_agent,
                Ok(n) => to_agent.write_all(&chunk[..n]).await.unwrap(),
            }
        }
    });
    let back = tokio::spawn(async move {
        let mut chunk = vec![0; 1 << 16];
        loop {
            tokio::select! {
                n = from_agent.read(&mut chunk) => {
                    let n = n.unwrap();
                    if to_host.write_all(&chunk[..n]).await.is_err() {
                        return from_agent;
                    }
                }
                () = sleep(Duration::from_millis(50)) => if to_host.write_all(&[]).await.is_err() { return from_agent },
            }
        }
    });
    let client = Client::connect(ours).await.unwrap();
    let plain = client.exec(sh("sleep 1000")).await.unwrap();
    let detached =
        client.exec(ExecRequest { detached: true, ..sh("while :; do echo x; sleep 0.01; done") }).await.unwrap();
    let (plain_pid, detached_pid) = (plain.pid, detached.pid);
    assert!(alive(plain_pid) && alive(detached_pid));
    drop((plain, detached));
    assert!(gone(plain_pid).await);
    drop(client);
    let mut to_agent = timeout(HANGS, first).await.unwrap().unwrap();
    back.abort();
    // Half a frame of the lost session is still on the line, and then somebody new says hello.
    to_agent.write_all(&[0, 1, 2]).await.unwrap();
    let hello = Handshake { kind: Kind::Hello, version: VERSION, nonce: [7; 16], payload: Vec::new() };
    to_agent.write_all(&hello.encode()).await.unwrap();
    sleep(Duration::from_millis(100)).await;
    assert!(alive(detached_pid), "a detached command ended with its session");
    rustix::process::kill_process_group(
        rustix::process::Pid::from_raw(detached_pid as i32).unwrap(),
        rustix::process::Signal::KILL,
    )
    .unwrap();
}

#[tokio::test]
async fn garbage_before_a_handshake_is_skipped() {
    let guest = Guest::start();
    let mut line = guest.line().await;
    let garbage: Vec<u8> = (0..100_000u32).map(|n| (n.wrapping_mul(40_503) >> 7) as u8).collect();
    line.write_all(&garbage).await.unwrap();
    line.write_all(&MARKER[..5]).await.unwrap();
    let client = timeout(HANGS, Client::connect(line)).await.unwrap().unwrap();
    assert_eq!(run(&client, sh("echo through")).await.1, b"through\n");
}

#[tokio::test]
async fn another_version_is_a_clear_error_on_both_sides() {
    // An agent of the future.
    let (ours, mut theirs) = tokio::io::duplex(1024);
    let agent = tokio::spawn(async move {
        let mut hello = [0; 32];
        theirs.read_exact(&mut hello).await.unwrap();
        let nonce = hello[12..28].try_into().unwrap();
        let ack = Handshake { kind: Kind::Ack, version: VERSION + 1, nonce, payload: Vec::new() };
        theirs.write_all(&ack.encode()).await.unwrap();
        theirs
    });
    let error = timeout(HANGS, Client::connect(ours)).await.unwrap().unwrap_err();
    assert!(matches!(error, AgentError::Version { host: VERSION, guest } if guest == VERSION + 1), "{error:?}");
    drop(agent.await.unwrap());

    // A host of the future learns the agent's version, and a host of today is served on the same line afterwards.
    let guest = Guest::start();
    let mut line = guest.line().await;
    let hello = Handshake { kind: Kind::Hello, version: VERSION + 1, nonce: [9; 16], payload: vec![1, 2, 3] };
    line.write_all(&hello.encode()).await.unwrap();
    let mut ack = [0; 32];
    timeout(HANGS, line.read_exact(&mut ack)).await.unwrap().unwrap();
    let answer = Handshake::decode(ack[8..].try_into().unwrap()).unwrap();
    assert_eq!(answer, (Handshake { kind: Kind::Ack, version: VERSION, nonce: [9; 16], payload: Vec::new() }, 0));
    let client = timeout(HANGS, Client::connect(line)).await.unwrap().unwrap();
    client.ping().await.unwrap();
}

#[tokio::test]
async fn a_dead_agent_is_an_error_not_a_hang() {
    let mut guest = Guest::start();
    let client = guest.connect().await;
    let mut exec = client.exec(sh("sleep 1000")).await.unwrap();
    guest.agent.kill().unwrap();
    let ended = timeout(HANGS, exec.control.wait()).await.unwrap();
    assert!(matches!(ended, Err(AgentError::Closed)), "{ended:?}");
    assert!(matches!(timeout(HANGS, client.ping()).await.unwrap(), Err(AgentError::Closed)));
    timeout(HANGS, client.closed()).await.unwrap();
    rustix::process::kill_process_group(
        rustix::process::Pid::from_raw(exec.pid as i32).unwrap(),
        rustix::process::Signal::KILL,
    )
    .unwrap();
}

#[tokio::test]
async fn what_is_said_with_a_handshake_is_answered_with_it_or_dropped_when_half_of_it_is_missing() {
    let guest = Guest::start();
    let mut line = guest.line().await;
    // Ends as a marker begins, and contains one.
    let nonsense = [&[0xFF; 40], &MARKER[..], &MARKER[..7]].concat();
    let hello =
        |nonce| Handshake { kind: Kind::Hello, version: VERSION, nonce: [nonce; 16], payload: nonsense.clone() };
    // A host that is killed in the middle of it, at any byte, is followed by another.
    let whole = hello(1).encode();
    for cut in MARKER.len() + FRAME..whole.len() {
        line.write_all(&whole[..cut]).await.unwrap();
        line.write_all(&hello(2).encode()).await.unwrap();
        // The session that the last one began may have had something to say meanwhile.
        let mut seen = Vec::new();
        while !seen.ends_with(&MARKER) {
            seen.push(timeout(HANGS, line.read_u8()).await.unwrap().unwrap());
        }
        let mut ack = [0; FRAME];
        timeout(HANGS, line.read_exact(&mut ack)).await.unwrap().unwrap();
        let (answer, length) = Handshake::decode(&ack).unwrap();
        assert_eq!((answer.kind, answer.nonce), (Kind::Ack, [2; 16]), "cut at {cut}");
        let mut payload = vec![0; length + 1];
        timeout(HANGS, line.read_exact(&mut payload)).await.unwrap().unwrap();
        let reply: Reply = decode(&payload[..length]).unwrap();
        assert!(matches!(reply, Reply::Failed(Failure::Invalid, _)), "{reply:?}");
    }
    // The session that was asked for is there all the same, and the line is good for the next.
    let client = timeout(HANGS, Client::connect(line)).await.unwrap().unwrap();
    client.ping().await.unwrap();
}
