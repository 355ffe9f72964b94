//! The streams of commands.

use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::bench::Bench;
use super::rig::{Program, Rig};
use crate::guest::ExitStatus;

/// More than every buffer on the way together.
const MUCH: usize = 8 << 20;

pub(super) async fn streams_are_separate<R: Rig>(bench: &Bench<R>) {
    let vm = bench.running("apart").await;
    let out = bench.execute(&vm, Program::Print("out".into())).await;
    assert_eq!((out.stdout.as_slice(), out.stderr.as_slice()), (&b"out\n"[..], &b""[..]));
    let err = bench.execute(&vm, Program::PrintError("err".into())).await;
    assert_eq!((err.stdout.as_slice(), err.stderr.as_slice()), (&b""[..], &b"err\n"[..]));
}

pub(super) async fn bytes_pass_unchanged<R: Rig>(bench: &Bench<R>) {
    let vm = bench.running("binary").await;
    let sent: Vec<u8> = (0..256 * 1024_u32).map(|n| (n ^ (n >> 8)) as u8).collect();
    let command = bench.command(&vm, Program::Cat).stdin(true).stdout(true);
    let mut child = command.spawn().await.unwrap_or_else(|e| panic!("spawning: {e:?}"));
    let (Some(mut stdin), Some(mut stdout)) = (child.stdin.take(), child.stdout.take()) else {
        panic!("streams that were asked for are not there");
    };
    let writing = async {
        stdin.write_all(&sent).await.unwrap_or_else(|e| panic!("writing: {e}"));
        stdin.shutdown().await.unwrap_or_else(|e| panic!("closing: {e}"));
        drop(stdin);
    };
    let mut received = Vec::new();
    let (read, ()) = tokio::join!(stdout.read_to_end(&mut received), writing);
    read.unwrap_or_else(|e| panic!("reading: {e}"));
    assert_eq!(received.len(), sent.len(), "bytes that came back");
    if let Some(at) = (0..sent.len()).find(|&at| sent[at] != received[at]) {
        panic!("byte {at} was sent as {:#04x} and came back as {:#04x}", sent[at], received[at]);
    }
    assert_eq!(child.wait().await.ok(), Some(ExitStatus::Code(0)));
}

pub(super) async fn output_is_held_back<R: Rig>(bench: &Bench<R>) {
    let vm = bench.running("patient").await;
    let command = bench.command(&vm, Program::Produce(MUCH)).stdout(true);
    let mut child = command.spawn().await.unwrap_or_else(|e| panic!("spawning: {e:?}"));
    let Some(mut stdout) = child.stdout.take() else { panic!("no standard output") };
    let early = tokio::time::timeout(super::start::MOMENT * 4, child.wait()).await;
    assert!(early.is_err(), "{MUCH} bytes were written while nobody read: {early:?}");
    let (mut total, mut buffer) = (0, vec![0; 64 * 1024]);
    loop {
        match stdout.read(&mut buffer).await.unwrap_or_else(|e| panic!("reading after {total} bytes: {e}")) {
            0 => break,
            read => total += read,
        }
    }
    assert_eq!(total, MUCH, "bytes that arrived");
    assert_eq!(child.wait().await.ok(), Some(ExitStatus::Code(0)));
}

pub(super) async fn no_input_reads_as_empty<R: Rig>(bench: &Bench<R>) {
    let vm = bench.running("silent").await;
    let output = bench.execute(&vm, Program::Cat).await;
    assert_eq!((output.status, output.stdout.len()), (ExitStatus::Code(0), 0));
}
