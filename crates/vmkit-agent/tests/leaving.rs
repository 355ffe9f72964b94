//! Hosts that leave, and what runs lives on.

mod common;

use std::time::Duration;

use tokio::time::{sleep, timeout};
use vmkit_agent::client::{AgentError, Client};

use common::{Guest, HANGS, alive, gone, number, sh};

#[tokio::test]
async fn frozen_commands_survive_the_loss_of_their_session() {
    let guest = Guest::start();
    let client = guest.connect().await;
    let other = guest.connect().await;
    let note = guest.path("count");
    let script = format!("n=0; while :; do n=$((n+1)); echo $n; echo $n > {}; sleep 0.01; done", note.display());
    let kept = client.exec(sh(&script)).await.unwrap();
    let pid = kept.pid;
    // Through any session, for the commands of all.
    other.freeze(true).await.unwrap();
    drop(kept);
    drop(client);
    let before = number(&note).await;
    sleep(Duration::from_millis(300)).await;
    assert!(alive(pid), "a frozen command ended with its session");
    assert!(number(&note).await > before, "it is not read from any more, and hangs");
    other.freeze(false).await.unwrap();
    rustix::process::kill_process_group(
        rustix::process::Pid::from_raw(pid as i32).unwrap(),
        rustix::process::Signal::KILL,
    )
    .unwrap();
}

#[tokio::test]
async fn leaving_ends_the_session_and_what_runs_lives_on() {
    let guest = Guest::start();
    let client = guest.connect().await;
    let other = guest.connect().await;
    let kept = client.exec(sh("sleep 600")).await.unwrap();
    let others = other.exec(sh("sleep 600")).await.unwrap();
    let left = timeout(HANGS, client.leave()).await.unwrap().unwrap();
    assert!(matches!(client.ping().await, Err(AgentError::Closed)));
    assert!(matches!(client.leave().await, Err(AgentError::Closed)), "a session ends once");
    let pids = [kept.pid, others.pid];
    // Through any session, for the commands of all; and the other sessions go on.
    timeout(HANGS, other.ping()).await.unwrap().unwrap();
    drop((kept, others, other, client));
    sleep(Duration::from_millis(200)).await;
    assert!(pids.into_iter().all(alive), "{pids:?}");

    // The line is free for the next, and called off it is as if nothing had been.
    drop(left);
    let client = guest.connect().await;
    client.freeze(false).await.unwrap();
    let ends = client.exec(sh("sleep 600")).await.unwrap();
    let pid = ends.pid;
    drop((ends, client));
    assert!(gone(pid).await, "called off, and it still outlives its session");

    // What was let go of before ends, however soon the good-bye follows.
    let client = guest.connect().await;
    let dropped = client.exec(sh("sleep 600")).await.unwrap();
    let pid = dropped.pid;
    drop(dropped);
    let left = timeout(HANGS, client.leave()).await.unwrap().unwrap();
    assert!(gone(pid).await, "it was let go of before the good-bye");
    drop((left, client));
    guest.connect().await.freeze(false).await.unwrap();

    // On a line that nobody has said anything on, too.
    let left = timeout(HANGS, Client::leave_from(guest.line().await)).await.unwrap().unwrap();
    let client = guest.connect().await;
    let frozen = client.exec(sh("sleep 600")).await.unwrap();
    let pids = [pids[0], pids[1], frozen.pid];
    drop((frozen, client, left));
    sleep(Duration::from_millis(200)).await;
    for pid in pids {
        assert!(alive(pid));
        let group = rustix::process::Pid::from_raw(pid as i32).unwrap();
        rustix::process::kill_process_group(group, rustix::process::Signal::KILL).unwrap();
    }
}
