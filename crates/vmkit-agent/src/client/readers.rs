//! Who waits for what a command says, and who brings it.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use tokio::io::ReadHalf;
use tokio::sync::{oneshot, watch};

use super::exec::Progress;
use super::lock;
use crate::mux::{Stream, acknowledge};
use crate::protocol::{self, Header, Reply, Which};

pub(super) type Waiting = Arc<Mutex<Readers>>;

/// Readers of outputs that the agent has not spoken of yet.
#[derive(Default)]
pub(super) struct Readers {
    pub all: HashMap<(u64, Which), oneshot::Sender<Arrived>>,
    /// How many still read what has arrived and may be for one of them.
    busy: usize,
    /// Nothing more arrives.
    over: bool,
}

impl Readers {
    /// When nothing more arrives, and all that did was handed over, the rest has its end.
    fn settle(&mut self) {
        if self.over && self.busy == 0 {
            self.all.clear();
        }
    }
}

/// Held by whoever reads what may be for a reader.
pub(super) struct Busy(Waiting);

impl Busy {
    pub fn new(waiting: &Waiting) -> Busy {
        lock(waiting).busy += 1;
        Busy(waiting.clone())
    }
}

impl Busy {
    /// Takes what was said of a command; false when that is nothing that is said of one.
    pub fn take(&self, id: u64, reply: Reply, ended: &watch::Sender<Progress>) -> bool {
        match reply {
            Reply::Exited(exit) => drop(ended.send_replace(Progress::Ended(exit))),
            Reply::Said(which, bytes) => {
                if let Some(reader) = lock(&self.0).all.remove(&(id, which)) {
                    let _ = reader.send(Arrived::Whole(bytes));
                }
            }
            Reply::Started(_) | Reply::Failed(..) | Reply::Pong(_) | Reply::Done | Reply::Renewed(_) => return false,
        }
        true
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        let mut readers = lock(&self.0);
        readers.busy -= 1;
        readers.settle();
    }
}

/// How the agent brings an output.
#[derive(Debug)]
pub(super) enum Arrived {
    /// All of it, when it is little and already over.
    Whole(Vec<u8>),
    Stream(Stream),
}

/// Gives the streams that the agent opens to whoever waits for them.
pub(super) struct Arrivals(pub Waiting);

impl Arrivals {
    pub fn hand_over(&self, mut stream: Stream) {
        let busy = Busy::new(&self.0);
        tokio::spawn(async move {
            acknowledge(&mut stream).await;
            if let Ok(Some(Header { id, which })) = protocol::read(&mut stream).await
                && let Some(reader) = lock(&busy.0).all.remove(&(id, which))
            {
                let _ = reader.send(Arrived::Stream(stream));
            }
        });
    }
}

impl Drop for Arrivals {
    /// The session is over.
    fn drop(&mut self) {
        let mut readers = lock(&self.0);
        readers.over = true;
        readers.settle();
    }
}

/// Reads a command's control stream to its end.
pub(super) async fn follow(mut from: ReadHalf<Stream>, id: u64, busy: Busy, ended: watch::Sender<Progress>) {
    while let Ok(Some(reply)) = protocol::read(&mut from).await {
        if !busy.take(id, reply, &ended) {
            break;
        }
    }
    ended.send_if_modified(|progress| {
        let lost = matches!(progress, Progress::Running);
        if lost {
            *progress = Progress::Lost;
        }
        lost
    });
}
