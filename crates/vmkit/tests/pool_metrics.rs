//! What a pool tells a metrics recorder.

mod common;

use common::pool::{close, full, pool};
use vmkit::pool::Tiers;
use vmkit::sim::{Fault, Verb};

/// Counts how often each metric was told something.
#[derive(Clone, Default)]
struct Counting(std::sync::Arc<std::sync::Mutex<std::collections::BTreeMap<String, u64>>>);

struct One(String, Counting);

impl One {
    fn told(&self, by: u64) {
        *self.1.0.lock().unwrap().entry(self.0.clone()).or_default() += by;
    }
}

impl metrics::CounterFn for One {
    fn increment(&self, value: u64) {
        self.told(value);
    }

    fn absolute(&self, value: u64) {
        self.told(value);
    }
}

impl metrics::GaugeFn for One {
    fn increment(&self, _: f64) {}

    fn decrement(&self, _: f64) {}

    fn set(&self, _: f64) {
        self.told(1);
    }
}

impl metrics::HistogramFn for One {
    fn record(&self, value: f64) {
        assert!(value >= 0.0);
        self.told(1);
    }
}

impl Counting {
    fn one(&self, key: &metrics::Key) -> std::sync::Arc<One> {
        assert!(key.labels().any(|label| label.key() == "pool" && label.value() == "p"), "{key}");
        let tier = key.labels().find(|label| label.key() == "tier").map(|label| label.value()).unwrap_or_default();
        std::sync::Arc::new(One(format!("{} {tier}", key.name()).trim().to_owned(), self.clone()))
    }
}

impl metrics::Recorder for Counting {
    fn describe_counter(&self, _: metrics::KeyName, _: Option<metrics::Unit>, _: metrics::SharedString) {}

    fn describe_gauge(&self, _: metrics::KeyName, _: Option<metrics::Unit>, _: metrics::SharedString) {}

    fn describe_histogram(&self, _: metrics::KeyName, _: Option<metrics::Unit>, _: metrics::SharedString) {}

    fn register_counter(&self, key: &metrics::Key, _: &metrics::Metadata<'_>) -> metrics::Counter {
        metrics::Counter::from_arc(self.one(key))
    }

    fn register_gauge(&self, key: &metrics::Key, _: &metrics::Metadata<'_>) -> metrics::Gauge {
        metrics::Gauge::from_arc(self.one(key))
    }

    fn register_histogram(&self, key: &metrics::Key, _: &metrics::Metadata<'_>) -> metrics::Histogram {
        metrics::Histogram::from_arc(self.one(key))
    }
}

#[tokio::test(start_paused = true)]
async fn every_phase_is_measured() {
    let counting = Counting::default();
    let recorder = counting.clone();
    let _guard = metrics::set_default_local_recorder(&recorder);
    let (world, builder) = pool();
    let pool = builder.tiers(Tiers { running: 1, suspended: 1, stopped: 0 }).build().unwrap();
    world.fault(None, Verb::Clone, Fault::Err);
    pool.start().await.unwrap();
    full(&pool, 2).await;
    let (one, other) = tokio::join!(pool.acquire(), pool.acquire().env("A", "b"));
    drop((one.unwrap(), other.unwrap()));
    full(&pool, 2).await;
    close(&pool, &world).await;
    let told = counting.0.lock().unwrap();
    let exactly = [
        ("vmkit_pool_queued_seconds", 2),
        ("vmkit_pool_health_seconds", 1),
        ("vmkit_pool_bind_seconds", 1),
        ("vmkit_pool_handed_over_seconds", 2),
        ("vmkit_pool_create_failed_total", 1),
        ("vmkit_pool_released_total", 2),
        ("vmkit_pool_deleted_total", 5),
    ];
    for (name, times) in exactly {
        assert_eq!(told.get(name), Some(&times), "{name}: {told:#?}");
    }
    let some =
        ["vmkit_pool_start_seconds", "vmkit_pool_vms", "vmkit_pool_waiting", "vmkit_pool_create_seconds running"];
    for name in some {
        assert!(told.get(name).is_some_and(|times| *times > 0), "{name}: {told:#?}");
    }
}
