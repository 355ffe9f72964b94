//! Ways into decoders, for fuzzing.

use std::time::Duration;

use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;

use super::qmp::Qmp;

/// A control session whose other end says `bytes` and leaves. Whether it is taken for QEMU.
///
/// # Panics
/// When the session does not end with its line.
pub async fn control_session(bytes: &[u8]) -> bool {
    let (ours, mut theirs) = UnixStream::pair().expect("a pair of sockets");
    let said = async {
        let _ = theirs.write_all(bytes).await;
        let _ = theirs.shutdown().await;
        // Whatever is asked is not answered.
        let _ = tokio::io::copy(&mut theirs, &mut tokio::io::sink()).await;
    };
    let session = async {
        let Ok(mut qmp) = Qmp::negotiate_as(ours, "us").await else { return false };
        let answered = qmp.go_on().await.is_ok();
        // Whoever calls off what has failed asks again on the same session.
        let _ = qmp.cont().await;
        answered
    };
    let both = async { tokio::join!(session, said).0 };
    tokio::time::timeout(Duration::from_secs(10), both).await.expect("a line that ended ends the session")
}

#[cfg(test)]
mod tests {
    use super::control_session;

    const GREETING: &str = r#"{"QMP": {"version": {"qemu": {"micro": 2, "minor": 0, "major": 10}, "package": ""}, "capabilities": ["oob"]}}"#;
    const READY: &str = r#"{"return": {}, "id": "us.0"}"#;
    const STATUS: &str = r#"{"return": {"status": "running", "running": true}, "id": "us.1"}"#;

    #[tokio::test]
    async fn what_is_not_qemu_is_an_error() {
        let sane = format!("{GREETING}\n{READY}\n");
        for noise in ["", "\n", "{", "\u{0}\u{1}", "[]\n", "{\"QMP\": 3}\n", "{\"return\": {}}\n", GREETING, &sane] {
            assert!(!control_session(noise.as_bytes()).await, "{noise:?}");
        }
    }

    /// Every cut and every flipped byte of a sane conversation: an error or an answer, never a panic or a hang.
    #[tokio::test]
    async fn damaged_conversations_end() {
        let sane = format!("{GREETING}\n{READY}\n{STATUS}\n").into_bytes();
        for at in 0..sane.len() {
            control_session(&sane[..at]).await;
            let mut flipped = sane.clone();
            flipped[at] ^= 0x20;
            control_session(&flipped).await;
        }
    }
}
