#![no_main]
//! A client whose agent is noise: an error, never a panic or a hang.

use std::time::Duration;

use libfuzzer_sys::fuzz_target;
use tokio::io::AsyncWriteExt;
use vmkit_agent::client::Client;

fuzz_target!(|data: &[u8]| {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    runtime.block_on(async {
        let (ours, mut theirs) = tokio::io::duplex(64 << 10);
        let noise = async {
            let _ = theirs.write_all(data).await;
            drop(theirs);
        };
        let session = tokio::time::timeout(Duration::from_secs(5), Client::connect(ours));
        let (session, ()) = tokio::join!(session, noise);
        if let Ok(client) = session.expect("a line that ended ends the wait") {
            assert!(client.ping().await.is_err());
        }
    });
});
