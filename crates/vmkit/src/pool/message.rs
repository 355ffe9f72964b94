//! What the supervisor is told: by callers, by leases, by the tasks it started.

use std::any::Any;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;

use super::acquire::{Grant, Place};
use super::close::CloseReport;
use super::events::Events;
use super::lease::Lease;
use super::plan::Tier;
use super::queue::Turn;
use super::slots::SlotNo;
use super::status::PoolStatus;
use crate::driver::Found;
use crate::error::{Error, Result};
use crate::instance::Instance;
use crate::properties::Properties;
use crate::publish::Status;
use crate::spec::Id;

pub(super) type Mailbox = mpsc::UnboundedSender<Message>;

/// A caller that wants a machine, and the way to answer it.
pub(super) struct Waiter {
    pub who: Claimant,
    pub reply: oneshot::Sender<Result<Grant>>,
}

/// Who wants a machine; with it a caller whose machine was unfit is in its place again.
#[derive(Clone)]
pub(super) struct Claimant {
    pub ticket: u64,
    pub key: Arc<str>,
    pub holder: Option<Arc<str>>,
    pub labels: Arc<BTreeMap<String, String>>,
    pub limit: Option<Duration>,
    pub since: Instant,
    pub deadline: Instant,
    /// Where it was in the queue; absent until it was there.
    pub turn: Option<Turn>,
}

/// A machine that was made, or was not.
pub(super) struct Made {
    pub instance: Option<Instance>,
    pub result: Result<Tier>,
    pub took: Duration,
}

/// What a process of the pool finds when it starts.
pub(super) struct Prepared {
    pub claim: Box<dyn Any + Send + Sync>,
    pub found: Vec<Found>,
}

pub(super) enum Message {
    // From callers.
    Acquire(Box<Waiter>),
    Cancel(u64),
    Place(u64, oneshot::Sender<Option<Place>>),
    Status(oneshot::Sender<Arc<PoolStatus>>),
    Subscribe(oneshot::Sender<Events>),
    Resize(usize, oneshot::Sender<Result<()>>),
    Take(Id, oneshot::Sender<Result<Lease>>),
    Discard(Id, oneshot::Sender<Result<()>>),
    Close(Instant, oneshot::Sender<CloseReport>),
    /// Every handle is gone.
    Abandoned,
    // From grants and leases.
    Delivered(SlotNo),
    /// Not delivered after all; `touched` when it is not as it was any more.
    Back {
        slot: SlotNo,
        touched: bool,
    },
    Rejected {
        slot: SlotNo,
        error: Error,
        /// By a guest that is well: nothing is wrong with the pool.
        answered: bool,
        waiter: Option<Box<Waiter>>,
    },
    Stopped(SlotNo),
    Dropped {
        slot: SlotNo,
        failed: bool,
    },
    Delete(SlotNo, oneshot::Sender<Result<()>>),
    // From tasks, each exactly once.
    Prepared(Result<Prepared>),
    Created(SlotNo, Box<Made>),
    Promoted(SlotNo, Result<()>, Duration),
    Demoted(SlotNo, Result<()>),
    Kept(SlotNo, Result<()>),
    Checked(SlotNo, Result<()>),
    /// With what was known of it before, for one that is made again.
    Removed(SlotNo, Result<()>, Option<Box<Properties>>),
    // From machines.
    Changed(SlotNo, Status),
}
