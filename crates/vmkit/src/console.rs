//! Where a machine's console and its hypervisor's own output go.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::io::{AsyncWrite, AsyncWriteExt};
use tokio::sync::mpsc;

/// Chunks a sink holds for a writer that is slow; what comes beyond is counted and dropped.
const QUEUE: usize = 256;

/// The two sinks of [`Instance::start`](crate::Instance::start).
#[derive(Clone, Default, Debug)]
pub struct ConsoleSinks {
    /// Receives the machine's console.
    pub stdout: Sink,
    /// Receives the hypervisor's own output.
    pub stderr: Sink,
}

impl ConsoleSinks {
    /// Throws both away; a backend's log files have them anyway.
    pub fn discard() -> ConsoleSinks {
        ConsoleSinks::default()
    }
}

/// A place to write to that can never hold up or fail a machine: a writer that is slow, blocks or errors costs output,
/// and how much is counted.
#[derive(Clone, Default, Debug)]
pub struct Sink(Option<Arc<Inner>>);

#[derive(Debug)]
struct Inner {
    chunks: mpsc::Sender<Vec<u8>>,
    lost: Arc<AtomicU64>,
}

impl Sink {
    /// A sink that writes to `writer` on a task of its own. Must be called in a tokio runtime.
    pub fn new(mut writer: impl AsyncWrite + Send + Unpin + 'static) -> Sink {
        let (chunks, mut queue) = mpsc::channel::<Vec<u8>>(QUEUE);
        let lost = Arc::new(AtomicU64::new(0));
        let counter = lost.clone();
        tokio::spawn(async move {
            let mut broken = false;
            while let Some(chunk) = queue.recv().await {
                broken = broken || writer.write_all(&chunk).await.is_err() || writer.flush().await.is_err();
                if broken {
                    counter.fetch_add(chunk.len() as u64, Ordering::Relaxed);
                }
            }
        });
        Sink(Some(Arc::new(Inner { chunks, lost })))
    }

    /// Hands over bytes, without waiting.
    pub fn push(&self, bytes: &[u8]) {
        if let Some(inner) = &self.0
            && !bytes.is_empty()
            && inner.chunks.try_send(bytes.to_vec()).is_err()
        {
            inner.lost.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        }
    }

    /// Bytes that the writer did not take.
    pub fn lost(&self) -> u64 {
        self.0.as_ref().map_or(0, |inner| inner.lost.load(Ordering::Relaxed))
    }

    /// Whether nobody listens.
    pub fn is_discard(&self) -> bool {
        self.0.is_none()
    }
}
