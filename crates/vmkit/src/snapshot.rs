//! Copies of a machine that runs.

use std::any::Any;
use std::fmt;
use std::time::Duration;

use futures::future::try_join_all;
use tracing::warn;

use crate::cleanup::cleanup;
use crate::console::ConsoleSinks;
use crate::error::{Error, ErrorKind, Result};
use crate::instance::Instance;
use crate::spec::{Id, Spec};

/// How long what is left of copies that were given up may take to be removed.
const CLEANUP: Duration = Duration::from_secs(60);

/// How many copies start at the same time: more only wait for each other.
const AT_ONCE: usize = 8;

/// More copies at once than any host has room for: a mistake, not a wish.
const MOST: usize = 10_000;

/// What a machine was at one moment while it ran, for copies to go on from. Dropping it removes it; copies that were started keep
/// what they need.
pub struct Snapshot {
    spec: Spec,
    stood_still: Duration,
    _kept: Box<dyn Any + Send + Sync>,
}

impl Snapshot {
    /// For drivers: `spec` is what copies are made from, and `kept` removes the snapshot when it is dropped.
    pub fn new(spec: Spec, stood_still: Duration, kept: impl Any + Send + Sync) -> Snapshot {
        Snapshot { spec, stood_still, _kept: Box::new(kept) }
    }

    /// What a copy is made from: created, cloned and started, it goes on where the original was. It is somebody of its own by then,
    /// as every fork is.
    pub fn spec(&self) -> &Spec {
        &self.spec
    }

    /// How long the original stood still for it.
    pub fn stood_still(&self) -> Duration {
        self.stood_still
    }
}

impl fmt::Debug for Snapshot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Snapshot").field("spec", &self.spec).field("stood_still", &self.stood_still).finish()
    }
}

impl Instance {
    /// `n` copies of this machine, which is Running and runs on, standing still for milliseconds: memory, processes and disk as they
    /// were, each with an identity of its own, Running. Their names are this one's with a number, the next that is free. All of them, or none.
    ///
    /// What a program has in its own memory is in every copy: random numbers it has drawn, keys, connections.
    ///
    /// Copies have its labels, but for vmkit's own. So a copy of a pool's machine is not the pool's: whoever makes it deletes it, and
    /// neither the pool's close nor its next start does.
    ///
    /// # Errors
    /// [`ErrorKind::IllegalRequest`] unless it is Running; [`ErrorKind::Unsupported`] where the backend has no copies;
    /// [`ErrorKind::InvalidArgument`] for none at all, and for more than 10,000; what making a machine fails with.
    ///
    /// # Cancel safety
    /// Dropped, it is undone: copies that are there already are deleted, on a task of their own.
    pub async fn fork(&self, n: usize) -> Result<Vec<Instance>> {
        self.check_number(n)?;
        let snapshot = self.snapshot().await?;
        let mut copies = Copies(Vec::new());
        let named = self.number_copies(n, snapshot.spec(), &mut copies).await;
        finish(copies, named).await
    }

    /// The same, with names given.
    ///
    /// # Errors
    /// As [`fork`](Instance::fork); [`ErrorKind::AlreadyExists`] for a name that is taken, [`ErrorKind::InvalidArgument`] for one that
    /// is given twice.
    ///
    /// # Cancel safety
    /// As [`fork`](Instance::fork).
    pub async fn fork_as(&self, names: &[Id]) -> Result<Vec<Instance>> {
        let failed = |error: Error| error.on(self.id().as_str()).during("Fork");
        self.check_number(names.len())?;
        for (at, name) in names.iter().enumerate() {
            if names[..at].contains(name) {
                let error = Error::new(ErrorKind::InvalidArgument, format!("the name {name} is given twice"));
                return Err(failed(error.hint("each copy needs a name of its own")));
            }
            if self.is_known(name).await? {
                let error = Error::new(ErrorKind::AlreadyExists, format!("a machine of the name {name} exists"));
                return Err(error.on(name.as_str()).during("Fork").hint("choose another name"));
            }
        }
        let snapshot = self.snapshot().await?;
        let mut copies = Copies(Vec::new());
        let named = self.name_copies(names, snapshot.spec(), &mut copies).await;
        finish(copies, named).await
    }

    fn check_number(&self, n: usize) -> Result<()> {
        let (message, hint) = match n {
            0 => ("a fork makes at least one copy".to_owned(), "say how many, or name the copies"),
            1..=MOST => return Ok(()),
            _ => (format!("{n} copies are more than the {MOST} that a fork makes"), "make fewer at once"),
        };
        Err(Error::new(ErrorKind::InvalidArgument, message).hint(hint).on(self.id().as_str()).during("Fork"))
    }

    async fn name_copies(&self, names: &[Id], spec: &Spec, copies: &mut Copies) -> Result<()> {
        for name in names {
            copies.0.push(self.beside(name, spec).await?);
        }
        Ok(())
    }

    /// A name is chosen when it is taken: another fork may be looking for names just now.
    async fn number_copies(&self, n: usize, spec: &Spec, copies: &mut Copies) -> Result<()> {
        let mut number = 0;
        while copies.0.len() < n {
            // Backends may know their machines without waiting: a caller's timeout must fire all the same.
            tokio::task::consume_budget().await;
            number += 1;
            let name = self.numbered(number)?;
            if self.is_known(&name).await? {
                continue;
            }
            match self.beside(&name, spec).await {
                Ok(copy) => copies.0.push(copy),
                Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn numbered(&self, number: usize) -> Result<Id> {
        let end = format!("-{number}");
        let stem: String = self.id().as_str().chars().take(63 - end.len()).collect();
        Id::new(stem + &end)
    }
}

/// Starts copies that have their names, unless one has none. All of them, or none.
async fn finish(mut copies: Copies, named: Result<()>) -> Result<Vec<Instance>> {
    let mut made = named;
    if made.is_ok() {
        for some in copies.0.chunks(AT_ONCE) {
            made = try_join_all(some.iter().map(begin)).await.map(drop);
            if made.is_err() {
                break;
            }
        }
    }
    match made {
        Ok(()) => Ok(std::mem::take(&mut copies.0)),
        Err(error) => {
            copies.give_up().await;
            Err(error)
        }
    }
}

async fn begin(copy: &Instance) -> Result<()> {
    copy.clone_source().await?;
    copy.start(ConsoleSinks::discard()).await
}

/// Copies that nobody has yet: dropped, they are deleted.
struct Copies(Vec<Instance>);

impl Copies {
    async fn give_up(&mut self) {
        // On a task of its own: whoever waits for it may go away.
        let _ = tokio::spawn(delete(std::mem::take(&mut self.0))).await;
    }
}

impl Drop for Copies {
    fn drop(&mut self) {
        let copies = std::mem::take(&mut self.0);
        if copies.is_empty() {
            return;
        }
        // Plain machines: a runtime that ends drops what it is given at once, and must not be given it again by that.
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn(delete(copies));
        }
    }
}

async fn delete(copies: Vec<Instance>) {
    for copy in copies {
        if let Err(error) = cleanup(&copy, Duration::ZERO, CLEANUP).await {
            warn!(id = %copy.id(), %error, "a copy that was given up could not be deleted");
        }
    }
}
