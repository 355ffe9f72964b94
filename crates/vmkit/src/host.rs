//! The machines of one provider.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};

use futures::FutureExt;
use futures::future::BoxFuture;

use crate::driver::{Adopted, Capabilities, Found, Provider};
use crate::error::{Error, ErrorKind, Result};
use crate::instance::{Home, Instance, WeakInstance};
use crate::machine::Registrar;
use crate::spec::{Id, Spec};
use crate::state::State;

/// Creates, lists and adopts machines, and makes sure that this process has one task per machine.
///
/// Cheap to clone. Dropping it ends no machine.
pub struct Host<P: Provider>(Arc<Inner<P>>);

struct Inner<P> {
    provider: P,
    instances: Arc<Mutex<Instances>>,
}

type Instances = HashMap<Id, Entry>;

enum Entry {
    /// Somebody is opening it: the name is taken until that is done.
    Opening,
    /// Nothing exists outside: the name is taken for as long as somebody has a handle.
    Named(WeakInstance),
    /// Something may exist outside: kept, so that it is watched also when nobody has a handle.
    Held(Instance),
}

impl<P: Provider> Host<P> {
    /// A host over `provider`.
    pub fn new(provider: P) -> Host<P> {
        Host(Arc::new(Inner { provider, instances: Arc::default() }))
    }

    /// The provider.
    pub fn provider(&self) -> &P {
        &self.0.provider
    }

    /// What its machines can do.
    pub fn capabilities(&self) -> Capabilities {
        self.0.provider.capabilities()
    }

    /// A new machine, Initial: nothing exists until it is cloned. Must be called in a tokio runtime.
    ///
    /// # Errors
    /// [`ErrorKind::AlreadyExists`] when this host has a machine of that name; [`ErrorKind::InvalidArgument`] for a spec
    /// out of range.
    pub async fn create(&self, id: Id, spec: Spec) -> Result<Instance> {
        spec.check().map_err(|e| e.on(id.as_str()))?;
        if let Some(there) = self.get(&id) {
            // Another process may have deleted it.
            look(&there).await;
        }
        let reserved = self.reserve(&id)?;
        let driver = self.0.provider.open(&id, &spec).await.map_err(|e| e.on(id.as_str()))?;
        let home = self.home();
        Ok(reserved.fill(|exists| Instance::spawn(id, spec, driver, State::Initial, exists, home)))
    }

    /// The machine of that name, wherever it was made: this process's handle, or the machine found and taken over. Its state is the
    /// one it has now, whoever brought it there.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] when there is none.
    pub async fn adopt(&self, id: &Id) -> Result<Instance> {
        if let Some(instance) = self.get(id) {
            look(&instance).await;
            if !instance.is_orphan() && instance.state() != State::Deleted {
                return Ok(instance);
            }
        }
        let reserved = self.reserve(id)?;
        let Adopted { driver, spec, state } = self.0.provider.adopt(id).await.map_err(|e| e.on(id.as_str()))?;
        let home = self.home();
        Ok(reserved.fill(|exists| Instance::spawn(id.clone(), spec, driver, state, exists, home)))
    }

    /// This process's handle of a machine, if it has one. One whose runtime has ended is none.
    pub fn get(&self, id: &Id) -> Option<Instance> {
        let instance = match self.lock().get(id) {
            Some(Entry::Held(instance)) => Some(instance.clone()),
            Some(Entry::Named(instance)) => instance.upgrade(),
            Some(Entry::Opening) | None => None,
        };
        instance.filter(|instance| !instance.is_orphan())
    }

    /// Every machine that is there, whoever made it.
    ///
    /// # Errors
    /// When the provider cannot look.
    pub async fn list(&self) -> Result<Vec<Found>> {
        self.0.provider.list().await
    }

    fn home(&self) -> Arc<dyn Home> {
        Arc::new(Neighbours(Arc::downgrade(&self.0)))
    }

    fn reserve(&self, id: &Id) -> Result<Reservation> {
        let mut instances = self.lock();
        let taken = match instances.get(id) {
            Some(Entry::Named(instance)) => instance.upgrade().is_some_and(|instance| !instance.is_orphan()),
            Some(Entry::Held(instance)) => !instance.is_orphan(),
            Some(Entry::Opening) => true,
            None => false,
        };
        if taken {
            return Err(Error::new(ErrorKind::AlreadyExists, "a machine of that name exists")
                .on(id.as_str())
                .hint("choose another name, or adopt the one that is there"));
        }
        instances.insert(id.clone(), Entry::Opening);
        Ok(Reservation { id: id.clone(), instances: self.0.instances.clone(), filled: false })
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Instances> {
        self.0.instances.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Looks at what is known as off: others may have brought it elsewhere. One that cannot be looked at can still be deleted.
async fn look(instance: &Instance) {
    // Nobody waits for an operation that is under way here.
    if matches!(instance.state(), State::Stopped | State::Suspended) {
        let _ = instance.refresh().await;
    }
}

/// What a machine knows of its host, which it does not keep.
struct Neighbours<P>(Weak<Inner<P>>);

impl<P: Provider> Neighbours<P> {
    fn host(&self) -> Result<Host<P>> {
        self.0.upgrade().map(Host).ok_or_else(|| {
            Error::new(ErrorKind::Cancelled, "the host that the machine was made with has been dropped")
                .hint("keep the host for as long as machines are made with it")
        })
    }
}

impl<P: Provider> Home for Neighbours<P> {
    fn create(&self, id: Id, spec: Spec) -> BoxFuture<'_, Result<Instance>> {
        async move { self.host()?.create(id, spec).await }.boxed()
    }

    fn is_known<'a>(&'a self, id: &'a Id) -> BoxFuture<'a, Result<bool>> {
        async move {
            let host = self.host()?;
            if host.get(id).is_some() {
                return Ok(true);
            }
            match host.provider().adopt(id).await {
                Ok(_) => Ok(true),
                Err(error) if error.kind() == ErrorKind::NotFound => Ok(false),
                Err(error) => Err(error.on(id.as_str())),
            }
        }
        .boxed()
    }
}

impl<P: Provider> Clone for Host<P> {
    fn clone(&self) -> Host<P> {
        Host(self.0.clone())
    }
}

/// A name taken; free again when dropped unfilled, by an error or a caller that went away.
struct Reservation {
    id: Id,
    instances: Arc<Mutex<Instances>>,
    filled: bool,
}

impl Reservation {
    fn fill(mut self, spawn: impl FnOnce(Registrar) -> Instance) -> Instance {
        let shelf: Arc<OnceLock<WeakInstance>> = Arc::default();
        // Weak: a machine's task must not keep the table alive that keeps the task alive.
        let (id, instances, own) = (self.id.clone(), Arc::downgrade(&self.instances), shelf.clone());
        let instance = spawn(Box::new(move |exists| {
            let (Some(instances), Some(own)) = (instances.upgrade(), own.get()) else { return };
            let mut instances = instances.lock().unwrap_or_else(PoisonError::into_inner);
            // A name that was free may belong to another machine by now.
            let (mine, free) = match instances.get(&id) {
                Some(Entry::Held(other)) => (own.is(other), false),
                Some(Entry::Named(other)) => (own.is_same(other), other.upgrade().is_none()),
                Some(Entry::Opening) => (false, false),
                None => (false, true),
            };
            match own.upgrade() {
                Some(instance) if exists && (mine || free) => drop(instances.insert(id.clone(), Entry::Held(instance))),
                _ if !exists && mine => drop(instances.remove(&id)),
                _ => {}
            }
        }));
        let _ = shelf.set(instance.downgrade());
        let entry = match instance.state() {
            State::Initial => Entry::Named(instance.downgrade()),
            _ => Entry::Held(instance.clone()),
        };
        self.instances.lock().unwrap_or_else(PoisonError::into_inner).insert(self.id.clone(), entry);
        self.filled = true;
        instance
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        if !self.filled {
            self.instances.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.id);
        }
    }
}
