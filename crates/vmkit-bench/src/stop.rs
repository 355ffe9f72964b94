//! Being asked to end.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::runtime::Builder;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use vmkit_image::Cancel;

/// Raised by the first signal that asks to end; whatever is under way then gives up, and cleans up after itself.
#[derive(Clone, Debug)]
pub struct Stop {
    /// For what blocks.
    pub(crate) flag: Arc<AtomicBool>,
    /// For making an image.
    pub(crate) image: Cancel,
    changes: watch::Receiver<Option<i32>>,
}

impl Stop {
    /// Listens from now on. From then on the signals no longer end this process by themselves.
    ///
    /// # Errors
    /// When signals cannot be listened to.
    pub fn listen() -> io::Result<Stop> {
        let (raise, changes) = watch::channel(None);
        let stop = Stop { flag: Arc::default(), image: Cancel::new(), changes };
        // On a thread of its own: the main one measures, and blocks.
        let runtime = Builder::new_current_thread().enable_io().build()?;
        let (mut interrupt, mut terminate, mut hangup) = {
            let _inside = runtime.enter();
            (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?, signal(SignalKind::hangup())?)
        };
        let (flag, image) = (stop.flag.clone(), stop.image.clone());
        std::thread::Builder::new().name("signals".into()).spawn(move || {
            runtime.block_on(async {
                let number = tokio::select! {
                    _ = interrupt.recv() => 2,
                    _ = terminate.recv() => 15,
                    _ = hangup.recv() => 1,
                };
                flag.store(true, Ordering::Relaxed);
                image.cancel();
                // Kept: a sender that is gone is no signal.
                let _ = raise.send(Some(number));
                std::future::pending::<()>().await;
            });
        })?;
        Ok(stop)
    }

    /// The number of the signal that raised it.
    pub fn signal(&self) -> Option<i32> {
        *self.changes.borrow()
    }

    /// Whether it was raised.
    pub fn is_raised(&self) -> bool {
        self.signal().is_some()
    }

    /// Waits for it. Cancel-safe.
    pub async fn raised(&self) {
        let mut changes = self.changes.clone();
        if changes.wait_for(Option::is_some).await.is_err() {
            std::future::pending().await
        }
    }
}
