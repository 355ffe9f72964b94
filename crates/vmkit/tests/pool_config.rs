//! A pool's configuration as it stands in a file, and the plan that follows from counts.
#![cfg(all(feature = "sim", feature = "conformance"))]

use std::time::Duration;

use tokio::time::Instant;
use vmkit::ErrorKind;
use vmkit::pool::plan::{Counts, Gate, Limits, Steps, Tiers, plan};
use vmkit::pool::{EventKind, KeepFailed, OnFailure, PoolConfig, Staging};

fn parse(text: &str) -> Result<PoolConfig, String> {
    serde_json::from_str(text).map_err(|error| error.to_string())
}

#[test]
fn what_is_absent_has_its_default() {
    let config = parse("{}").unwrap();
    assert_eq!(config, PoolConfig::default());
    assert!(config.delete_acquired_on_close, "absent means true");
    assert_eq!((config.size(), config.staging), (2, Staging::Running));
    let minute = Duration::from_secs(60);
    assert_eq!((config.cleanup_timeout, config.stop_timeout, config.create_timeout), (minute, minute, 5 * minute));
    assert_eq!(config.create_backoff, Duration::from_millis(500));
    assert!(!parse(r#"{"delete_acquired_on_close": false}"#).unwrap().delete_acquired_on_close);
}

#[test]
fn names_are_read_without_regard_to_case() {
    for (word, staging) in
        [("SUSPENDED", Staging::Suspended), ("Stopped", Staging::Stopped), ("running", Staging::Running)]
    {
        assert_eq!(parse(&format!(r#"{{"staging": "{word}"}}"#)).unwrap().staging, staging);
    }
    assert_eq!(parse(r#"{"on_failure": "Fail_Fast"}"#).unwrap().on_failure, OnFailure::FailFast);
}

#[test]
fn what_is_unknown_is_an_error_that_lists_what_is_valid() {
    let error = parse(r#"{"staging": "hot"}"#).unwrap_err();
    assert!(error.contains("running, suspended, stopped") && error.contains("hot"), "{error}");
    let error = parse(r#"{"sise": 3}"#).unwrap_err();
    assert!(error.contains("sise") && error.contains("`size`") && error.contains("`staging`"), "{error}");
    let error = parse(r#"{"tiers": {"warm": 1}}"#).unwrap_err();
    assert!(error.contains("`running`, `suspended`, `stopped`"), "{error}");
    let error = parse(r#"{"stop_timeout": "soon"}"#).unwrap_err();
    assert!(error.contains("soon") && error.contains("1m 30s"), "{error}");
}

#[test]
fn it_reads_what_it_writes() {
    let config = PoolConfig {
        name: "ci".into(),
        tiers: Some(Tiers { running: 2, suspended: 6, stopped: 0 }),
        stop_timeout: Duration::from_millis(90_500),
        max_age: Some(Duration::from_secs(3600)),
        keep_failed: Some(KeepFailed { quota: 2, period: Duration::from_secs(60) }),
        ..PoolConfig::default()
    };
    let text = serde_json::to_string(&config).unwrap();
    assert!(text.contains("\"1m 30s 500ms\""), "{text}");
    assert_eq!(parse(&text).unwrap(), config);
    assert_eq!(config.size(), 8);
}

#[test]
fn parts_that_do_not_agree_are_refused() {
    let base = PoolConfig::default;
    let tiers = Some(Tiers { running: 1, suspended: 1, stopped: 0 });
    let wrong = [
        PoolConfig { size: Some(3), tiers, ..base() },
        PoolConfig { size: Some(0), ..base() },
        PoolConfig { size: Some(3), max: Some(2), ..base() },
        PoolConfig { min_ready: Some(9), max: Some(4), ..base() },
        PoolConfig { allowance: 0, ..base() },
        PoolConfig { create_timeout: Duration::ZERO, ..base() },
        PoolConfig { weights: [("a".to_owned(), 0)].into(), ..base() },
        PoolConfig { name: "a/b".into(), ..base() },
    ];
    for config in wrong {
        let error = config.check().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidArgument);
        assert!(error.next_step().is_some(), "{error}");
    }
    PoolConfig { size: Some(2), tiers, ..base() }.check().unwrap();
}

#[test]
fn there_are_sixteen_kinds_of_events() {
    let kinds: std::collections::BTreeSet<_> = EventKind::ALL.into_iter().collect();
    assert_eq!(kinds.len(), 16);
}

/// Every combination of small counts: the plan keeps the size and only uses what is there.
#[test]
fn a_plan_never_asks_for_what_is_not_there() {
    let now = Instant::now();
    let limits = Limits {
        tiers: Tiers { running: 1, suspended: 1, stopped: 1 },
        min_ready: None,
        max: 3,
        allowance: 1,
        concurrency: 2,
    };
    let closed = Gate { failures: 1, opens: Some(now + Duration::from_secs(1)) };
    let mut tried = 0;
    for code in 0..3_u32.pow(9) {
        let at = |place: u32| (code / 3_u32.pow(place) % 3) as usize;
        let counts = Counts {
            ready: Tiers { running: at(0), suspended: at(1), stopped: at(2) },
            creating: Tiers { running: at(3), suspended: 0, stopped: 0 },
            promoting: at(4),
            unreleased: at(5),
            hung: at(6),
            waiting: at(7),
            expired: Tiers { running: at(8).min(at(0)), suspended: 0, stopped: 0 },
            ..Counts::default()
        };
        for (start, create) in [(Gate::default(), Gate::default()), (closed, closed)] {
            let steps = plan(now, &counts, &limits, 3, &start, &create);
            let Steps { hand_over, resume, boot, demote, create: made, trim, recycle, .. } = steps;
            let recycled = usize::from(recycle.is_some());
            assert!(hand_over + demote.sum() + trim.running + recycled <= counts.ready.running, "{counts:?} {steps:?}");
            assert!(resume + trim.suspended <= counts.ready.suspended, "{counts:?} {steps:?}");
            assert!(boot + trim.stopped <= counts.ready.stopped, "{counts:?} {steps:?}");
            assert_eq!(hand_over, counts.waiting.min(counts.ready.running), "a machine that is there is handed over");
            if create == closed {
                assert_eq!((made.sum(), resume + boot), (0, 0), "not before the gate opens");
            }
            assert!(!(steps.stranded && counts.ready.running > hand_over), "{counts:?} {steps:?}");
            let kept = counts.ready.sum() + counts.promoting + counts.unreleased - trim.sum() - recycled;
            assert!(
                trim.sum() + recycled == 0 || kept >= 3,
                "what hangs costs nothing that is ready: {counts:?} {steps:?}"
            );
            tried += 1;
        }
    }
    assert_eq!(tried, 2 * 3_usize.pow(9));
}

#[test]
fn a_split_keeps_the_hot_and_gives_from_the_cold() {
    let tiers = Tiers { running: 2, suspended: 6, stopped: 0 };
    let split = |total| {
        let Tiers { running, suspended, stopped } = tiers.split(total);
        (running, suspended, stopped)
    };
    assert_eq!([split(0), split(1), split(2), split(5)], [(0, 0, 0), (1, 0, 0), (2, 0, 0), (2, 3, 0)]);
    assert_eq!(split(20), (2, 18, 0));
}

#[test]
fn numbers_that_no_host_has_are_refused() {
    let base = PoolConfig::default;
    let none = Tiers { running: 0, suspended: 0, stopped: 0 };
    for many in [1_000_001, 1 << 40, usize::MAX] {
        let wrong = [
            ("size", PoolConfig { size: Some(many), ..base() }),
            ("max", PoolConfig { max: Some(many), ..base() }),
            ("min_ready", PoolConfig { min_ready: Some(many), ..base() }),
            ("event_buffer", PoolConfig { event_buffer: many, ..base() }),
            ("tiers.running", PoolConfig { tiers: Some(Tiers { running: many, suspended: 1, ..none }), ..base() }),
            ("tiers.suspended", PoolConfig { tiers: Some(Tiers { suspended: many, stopped: 1, ..none }), ..base() }),
            ("tiers.stopped", PoolConfig { tiers: Some(Tiers { stopped: many, running: 1, ..none }), ..base() }),
        ];
        for (key, config) in wrong {
            let error = config.check().unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidArgument, "{key}");
            assert!(error.message().starts_with(key) && error.next_step().is_some(), "{error:?}");
        }
    }
    let tiers = Some(Tiers { running: 1_000_000, suspended: 1, ..none });
    assert_eq!(PoolConfig { tiers, ..base() }.check().unwrap_err().kind(), ErrorKind::InvalidArgument);
    PoolConfig { event_buffer: 1_000_000, ..base() }.check().unwrap();
}
