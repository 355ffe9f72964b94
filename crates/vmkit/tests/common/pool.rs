//! Pools over simulated hardware.

use std::sync::Arc;
use std::time::Duration;

use vmkit::pool::{Event, EventKind, Events, Next, Pool, PoolBuilder, PoolStatus, VmPhase};
use vmkit::sim::{SimProvider, World};
use vmkit::{Host, Id};

use super::{latency, spec};

pub const LONG: Duration = Duration::from_secs(100_000);

pub fn secs(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

/// A world that takes its time, and a pool over it that is to be configured.
pub fn pool() -> (World, PoolBuilder) {
    let world = World::new();
    world.latency(latency());
    let builder = pool_over(&world);
    (world, builder)
}

/// A pool of another process over the same world.
pub fn pool_over(world: &World) -> PoolBuilder {
    Pool::builder(Host::new(SimProvider::new(world.clone())), spec()).name("p").seed(7)
}

/// Waits until the pool's status is as wanted; not for ever.
pub async fn until(pool: &Pool, what: &str, wanted: impl Fn(&PoolStatus) -> bool) -> Arc<PoolStatus> {
    for _ in 0..200_000 {
        let status = pool.status().await;
        if wanted(&status) {
            return status;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("never {what}: {:#?}", pool.status().await);
}

/// Waits until so many are ready and nothing else is under way.
pub async fn full(pool: &Pool, ready: usize) -> Arc<PoolStatus> {
    until(pool, "full", |status| status.counts.ready.sum() == ready && status.counts.all() == ready).await
}

/// Closes it, and checks that nothing at all is left.
pub async fn close(pool: &Pool, world: &World) {
    let report = pool.close(LONG).await;
    assert!(report.is_clean(), "{report:?}");
    assert_eq!(world.residue(), Vec::<String>::new());
    assert_eq!(world.violations(), Vec::<String>::new());
    tokio::task::yield_now().await;
}

pub fn ids(status: &PoolStatus, phase: VmPhase) -> Vec<Id> {
    status.vms.iter().filter(|vm| vm.phase == phase).map(|vm| vm.id.clone()).collect()
}

/// Every event so far; none may have been lost.
pub fn drain(events: &mut Events) -> Vec<Arc<Event>> {
    std::iter::from_fn(|| events.try_next())
        .map(|next| match next {
            Next::Event(event) => event,
            Next::Lost(lost) => panic!("{lost} events were lost"),
        })
        .collect()
}

pub fn kinds(events: &[Arc<Event>], id: &Id) -> Vec<EventKind> {
    events.iter().filter(|event| event.vm.as_ref() == Some(id)).map(|event| event.kind).collect()
}

/// Panics that were asked for are not printed: thousands of them would hide the one that was not.
pub fn quiet() {
    static ONCE: std::sync::Once = std::sync::Once::new();
    ONCE.call_once(|| {
        let print = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            let text = info.payload().downcast_ref::<&str>().copied();
            let text = text.or_else(|| info.payload().downcast_ref::<String>().map(String::as_str));
            let asked = text.is_some_and(|text| text.ends_with("was to panic"));
            if !asked {
                print(info);
            }
        }));
    });
}
