//! Being asked to end: Ctrl-C, a supervisor, a terminal that closes.

use tokio::signal::unix::{Signal, SignalKind, signal};

/// The signals that ask this process to end. From its making on they no longer end it by themselves.
pub struct Signals {
    interrupt: Option<Signal>,
    terminate: Option<Signal>,
    hangup: Option<Signal>,
}

impl Signals {
    pub fn new() -> Signals {
        let listen = |kind| signal(kind).ok();
        Signals {
            interrupt: listen(SignalKind::interrupt()),
            terminate: listen(SignalKind::terminate()),
            hangup: listen(SignalKind::hangup()),
        }
    }

    /// The next one's number. Cancel-safe.
    pub async fn next(&mut self) -> i32 {
        async fn of(signal: &mut Option<Signal>) {
            let received = match signal {
                Some(signal) => signal.recv().await,
                None => None,
            };
            if received.is_none() {
                std::future::pending().await
            }
        }
        tokio::select! {
            () = of(&mut self.interrupt) => 2,
            () = of(&mut self.terminate) => 15,
            () = of(&mut self.hangup) => 1,
        }
    }
}

/// Waits for one.
pub async fn asked_to_end() -> i32 {
    Signals::new().next().await
}

/// Does what gives itself up at a signal, to its end. `Err` is the signal: what was given up for it is no error of its own.
pub async fn unless_asked<T>(work: impl Future<Output = T>) -> Result<T, i32> {
    let mut signals = Signals::new();
    let mut work = std::pin::pin!(work);
    tokio::select! {
        biased;
        signal = signals.next() => {
            let _ = work.await;
            Err(signal)
        }
        done = &mut work => Ok(done),
    }
}

/// What a shell reports of a process that a signal ended.
pub fn exit_code(signal: i32) -> u8 {
    u8::try_from(128 + signal).unwrap_or(255)
}
