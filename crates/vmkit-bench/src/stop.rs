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
    pub flag: Arc<AtomicBool>,
    /// For making an image.
    pub image: Cancel,
    changes: watch::Receiver<bool>,
}

impl Stop {
    /// Listens from now on.
    ///
    /// # Errors
    /// When signals cannot be listened to.
    pub fn listen() -> io::Result<Stop> {
        let (raise, changes) = watch::channel(false);
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
                tokio::select! {
                    _ = interrupt.recv() => {}
                    _ = terminate.recv() => {}
                    _ = hangup.recv() => {}
                }
                flag.store(true, Ordering::Relaxed);
                image.cancel();
                // Kept: a sender that is gone is no signal.
                let _ = raise.send(true);
                std::future::pending::<()>().await;
            });
        })?;
        Ok(stop)
    }

    /// Whether it was raised.
    pub fn is_raised(&self) -> bool {
        *self.changes.borrow()
    }

    /// Waits for it. Cancel-safe.
    pub async fn raised(&self) {
        let mut changes = self.changes.clone();
        if changes.wait_for(|raised| *raised).await.is_err() {
            std::future::pending().await
        }
    }
}
