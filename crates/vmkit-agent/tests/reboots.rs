//! A line that outlives the agent at its other end.

use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};
use tokio::time::timeout;
use vmkit_agent::agent::{Agent, Line};
use vmkit_agent::client::{AgentError, Client, ExecRequest};
use vmkit_agent::link::{FRAME, Handshake, Kind, MARKER, VERSION};

/// Long enough for the slowest machine; only a hang reaches it.
const HANGS: Duration = Duration::from_secs(60);

fn frame(kind: Kind, nonce: [u8; 16]) -> Vec<u8> {
    Handshake { kind, version: VERSION, nonce, payload: Vec::new() }.encode()
}

/// The next handshake that a host sends; what comes before it is passed over.
async fn next(line: &mut DuplexStream) -> Handshake {
    let mut matched = 0;
    while matched < MARKER.len() {
        let byte = line.read_u8().await.unwrap();
        matched = if byte == MARKER[matched] { matched + 1 } else { usize::from(byte == MARKER[0]) };
    }
    let mut bytes = [0; FRAME];
    line.read_exact(&mut bytes).await.unwrap();
    Handshake::decode(&bytes).unwrap().0
}

#[tokio::test]
async fn what_was_asked_of_an_agent_of_before_ends_with_the_reason() {
    let (ours, mut guest) = duplex(64 << 10);
    let agent = tokio::spawn(async move {
        next(&mut guest).await;
        // It rebooted while it was greeted, and is greeted again.
        guest.write_all(&frame(Kind::Up, [0; 16])).await.unwrap();
        let again = next(&mut guest).await;
        assert_eq!(again.kind, Kind::Hello);
        guest.write_all(&frame(Kind::Ack, again.nonce)).await.unwrap();
        guest
    });
    let client = timeout(HANGS, Client::connect(ours)).await.unwrap().unwrap();
    let mut guest = agent.await.unwrap();
    let (waiting, asking) = (client.clone(), client.clone());
    let request = ExecRequest { program: "sleep".into(), ..ExecRequest::default() };
    let waiting = tokio::spawn(async move { waiting.exec(request).await.map(drop) });
    let asking = tokio::spawn(async move { asking.ping().await });
    // Both were sent, and whoever would have answered is gone.
    guest.read_u8().await.unwrap();
    guest.write_all(&frame(Kind::Up, [0; 16])).await.unwrap();
    for answer in [timeout(HANGS, waiting).await.unwrap().unwrap(), timeout(HANGS, asking).await.unwrap().unwrap()] {
        assert!(matches!(answer, Err(AgentError::Rebooted)), "{answer:?}");
    }
    assert!(client.is_closed());
    assert!(matches!(client.ping().await, Err(AgentError::Rebooted)), "also whoever asks later");
}

#[tokio::test]
async fn an_agent_says_that_it_has_begun_and_is_there_for_whoever_comes() {
    let agent = Agent::new().unwrap();
    let (mut ours, port) = duplex(64 << 10);
    let served = agent.clone();
    tokio::spawn(async move { served.serve(port, Line::Lasting).await });
    let up = timeout(HANGS, next(&mut ours)).await.unwrap();
    assert_eq!((up.kind, up.version), (Kind::Up, VERSION));
    // What a session of before had sent is passed over.
    ours.write_all(b"the rest of something").await.unwrap();
    let client = timeout(HANGS, Client::connect(ours)).await.unwrap().unwrap();
    client.ping().await.unwrap();
    // One that is greeted before it could say so need not: nobody is there who knew another.
    let (mut ours, port) = duplex(64 << 10);
    ours.write_all(&frame(Kind::Hello, [7; 16])).await.unwrap();
    tokio::spawn(async move { agent.serve(port, Line::Lasting).await });
    let first = timeout(HANGS, next(&mut ours)).await.unwrap();
    assert_eq!((first.kind, first.nonce), (Kind::Ack, [7; 16]));
}
