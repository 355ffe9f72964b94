//! What a lease is given, what it may do, and what it may not any more.
#![cfg(all(feature = "sim", feature = "conformance"))]

mod common;

use std::collections::BTreeSet;
use std::time::Duration;

use common::pool::{LONG, close, full, pool, secs, until};
use vmkit::pool::Reuse;
use vmkit::sim::{Fault, Verb};
use vmkit::{ConsoleSinks, ErrorKind, GuestFile, Id, State};

#[tokio::test(start_paused = true)]
async fn late_binding_gives_the_warm_machine_what_it_needs() {
    let (world, builder) = pool();
    let pool = builder.size(2).build().unwrap();
    pool.start().await.unwrap();
    full(&pool, 2).await;
    let began = tokio::time::Instant::now();
    let file = GuestFile { path: "/run/secret".into(), content: b"x".to_vec(), mode: 0o600 };
    let lease =
        pool.acquire().env("JOB", "17").hostname("worker").file(file).label("team", "red").holder("me").await.unwrap();
    assert!(began.elapsed() < Duration::from_millis(10), "no cold start");
    assert_eq!(lease.command("env").arg("JOB").output().await.unwrap().stdout, b"17\n");
    assert_eq!(lease.command("hostname").output().await.unwrap().stdout, b"worker\n");
    assert_eq!(lease.command("cat").arg("/run/secret").output().await.unwrap().stdout, b"x");
    assert_eq!(world.count(lease.id(), Verb::Bind), 1);
    let status = pool.status().await;
    let held = status.vms.iter().find(|vm| vm.id == *lease.id()).unwrap();
    assert_eq!((held.holder.as_deref(), held.labels["team"].as_str()), (Some("me"), "red"));
    drop(lease);
    full(&pool, 2).await;
    // A machine that cannot be bound goes, and the next is tried.
    world.fault(None, Verb::Bind, Fault::Err);
    let lease = pool.acquire().env("JOB", "18").await.unwrap();
    assert_eq!(lease.command("env").arg("JOB").output().await.unwrap().stdout, b"18\n");
    assert_eq!(pool.status().await.totals.unfit, 1);
    drop(lease);
    full(&pool, 2).await;
    // What the caller does wrong is told at once, and costs no machine.
    let file = |path: &str, mode| GuestFile { path: path.into(), content: Vec::new(), mode };
    let mut large = file("/large", 0o600);
    large.content = vec![0; (4 << 20) + 1];
    let mut wrong = vec![pool.acquire().file(large)];
    for path in ["", "no/path", "/", "/tmp/", "/tmp/..", "/a\0b"] {
        wrong.push(pool.acquire().file(file(path, 0o600)));
    }
    wrong.push(pool.acquire().file(file("/a", 0o10000)));
    for name in ["", "-a", "a b", "a\n", "a.", "\u{fc}", &"a".repeat(65)] {
        wrong.push(pool.acquire().hostname(name));
    }
    let long = "x".repeat(128 << 10);
    for (key, value) in [("", "1"), ("a=b", "1"), ("a\0", "1"), ("a", "x\0secret"), ("a", &long)] {
        wrong.push(pool.acquire().env(key, value));
    }
    for acquire in wrong {
        let error = acquire.await.unwrap_err();
        assert_eq!((error.kind(), error.operation()), (ErrorKind::InvalidArgument, Some("Acquire")), "{error:?}");
        assert!(!format!("{error:?}").contains("secret"));
    }
    assert_eq!(pool.status().await.totals.unfit, 1);
    close(&pool, &world).await;
}

/// What no guest can be given costs its caller two machines, and nobody else anything.
#[tokio::test(start_paused = true)]
async fn a_binding_that_guests_refuse_is_its_callers_matter() {
    let (world, builder) = pool();
    let pool = builder.size(3).build().unwrap();
    pool.start().await.unwrap();
    full(&pool, 3).await;
    let file = GuestFile { path: "/proc/x".into(), content: Vec::new(), mode: 0o600 };
    let error = pool.acquire().file(file).key("bad").await.unwrap_err();
    assert!(error.kind() == ErrorKind::Backend && error.to_string().contains("/proc/x"), "{error:?}");
    // The pool is as well as before: others are served at once, and what is gone is replaced without a pause.
    let began = tokio::time::Instant::now();
    drop(pool.acquire().key("good").await.unwrap());
    assert!(began.elapsed() < Duration::from_millis(10));
    let status = full(&pool, 3).await;
    assert_eq!((status.totals.unfit, status.totals.failed), (2, 0));
    assert!(status.trouble.is_none(), "{:?}", status.trouble);
    close(&pool, &world).await;
}

/// Whoever keeps a lease after it was given back cannot make its machine again, which nobody would delete.
#[tokio::test(start_paused = true)]
async fn what_was_given_back_stays_gone() {
    let (world, builder) = pool();
    let pool = builder.size(1).build().unwrap();
    pool.start().await.unwrap();
    let lease = pool.acquire().await.unwrap();
    lease.delete().await.unwrap();
    let error = lease.clone_source().await.unwrap_err();
    assert!(error.kind() == ErrorKind::IllegalRequest && error.to_string().contains("taken it back"), "{error:?}");
    assert_eq!(vmkit::reset(&lease, ConsoleSinks::discard(), LONG).await.unwrap_err().kind(), error.kind());
    // To stop what is gone is to have stopped it.
    lease.stop_and_release(Duration::ZERO).await.stopped().unwrap();
    lease.release().await.unwrap().stopped().unwrap();
    // A lease may be made new while it is held.
    full(&pool, 1).await;
    let lease = pool.acquire().await.unwrap();
    lease.command("counter").output().await.unwrap();
    vmkit::reset(&lease, ConsoleSinks::discard(), LONG).await.unwrap();
    assert_eq!(lease.command("counter").output().await.unwrap().stdout, b"1\n");
    drop(lease);
    close(&pool, &world).await;
}

/// Whatever keeps a command from ending with success marks its lease.
#[tokio::test(start_paused = true)]
async fn a_command_that_is_lost_marks_its_lease() {
    let (world, builder) = pool();
    let pool = builder.size(1).build().unwrap();
    pool.start().await.unwrap();
    let lease = pool.acquire().await.unwrap();
    lease.command("true").status().await.unwrap();
    assert!(!lease.is_failed());
    let error = lease.command("sleep").arg("60").timeout(secs(1)).status().await.unwrap_err();
    assert!(error.kind() == ErrorKind::TimedOut && lease.is_failed());
    lease.mark_well();
    assert_eq!(lease.command("nope").status().await.unwrap_err().kind(), ErrorKind::NotFound);
    assert!(lease.is_failed());
    lease.mark_well();
    let mut child = lease.command("sleep").arg("infinity").spawn().await.unwrap();
    lease.kill().await.stopped().unwrap();
    assert!(child.wait().await.is_err() && lease.is_failed());
    drop((child, lease));
    close(&pool, &world).await;
}

#[tokio::test(start_paused = true)]
async fn a_time_limit_ends_the_lease() {
    let (world, builder) = pool();
    let pool = builder.size(1).build().unwrap();
    pool.start().await.unwrap();
    let lease = pool.acquire().time_limit(secs(60)).await.unwrap();
    let running = lease.command("sleep").arg("infinity").spawn().await.unwrap();
    tokio::time::sleep(secs(59)).await;
    assert!(!lease.is_ended());
    tokio::time::sleep(secs(2)).await;
    assert!(lease.is_ended());
    assert_eq!(lease.command("true").status().await.unwrap_err().kind(), ErrorKind::NotRunning);
    full(&pool, 1).await;
    drop((running, lease));
    let status = full(&pool, 1).await;
    assert_eq!((status.totals.released, status.totals.replacements, status.totals.deleted), (1, 1, 1));
    close(&pool, &world).await;
}

#[tokio::test(start_paused = true)]
async fn a_machine_that_is_given_back_is_made_again_under_its_name_where_that_is_wanted() {
    let (world, builder) = pool();
    let pool = builder.size(2).reuse(Reuse::Reset).build().unwrap();
    pool.start().await.unwrap();
    full(&pool, 2).await;
    let all: BTreeSet<Id> = pool.status().await.vms.iter().map(|vm| vm.id.clone()).collect();
    let lease = pool.acquire().await.unwrap();
    let used = lease.id().clone();
    let process = lease.properties().pid;
    assert!(lease.command("store").args(["/secret", "s3cret"]).output().await.unwrap().status.success());
    lease.delete().await.unwrap();
    assert_eq!(lease.state(), State::Deleted);
    let status = full(&pool, 2).await;
    assert_eq!(status.vms.iter().map(|vm| vm.id.clone()).collect::<BTreeSet<_>>(), all, "the same names");
    assert_eq!((status.totals.released, status.totals.replacements, status.totals.deleted), (1, 1, 1));

    // Whoever had it has nothing of the new one, whatever he tries.
    let gone = [
        lease.start(ConsoleSinks::discard()).await,
        lease.suspend().await,
        lease.clone_source().await,
        lease.ping().await,
    ];
    assert!(gone.iter().all(Result::is_err), "{gone:?}");
    drop((lease.kill().await, lease.stop(LONG).await));
    assert_eq!((lease.state(), lease.properties().pid), (State::Deleted, None));
    let leases = [pool.acquire().await.unwrap(), pool.acquire().await.unwrap()];
    drop(lease);
    let again = leases.iter().find(|lease| lease.id() == &used).unwrap();
    assert!(again.properties().birth.unwrap().unused && again.properties().pid != process);
    let secret = again.command("cat").arg("/secret").output().await.unwrap();
    assert!(!secret.status.success(), "{secret:?}");
    // Dropped without a word: the same.
    drop(leases);
    let status = full(&pool, 2).await;
    assert_eq!(status.vms.iter().map(|vm| vm.id.clone()).collect::<BTreeSet<_>>(), all);
    assert_eq!((status.totals.released, status.totals.replacements, status.totals.deleted), (3, 3, 3));
    close(&pool, &world).await;
}

#[tokio::test(start_paused = true)]
async fn what_there_is_no_room_for_is_only_deleted_and_what_cannot_be_is_replaced() {
    let (world, builder) = pool();
    let pool = builder.size(2).reuse(Reuse::Reset).cleanup_timeout(secs(5)).build().unwrap();
    pool.start().await.unwrap();
    full(&pool, 2).await;
    let (first, second) = (pool.acquire().await.unwrap(), pool.acquire().await.unwrap());
    let names = [first.id().clone(), second.id().clone()];
    // Stopped first: its place is taken by another at once.
    first.stop_and_release(LONG).await.stop.unwrap();
    until(&pool, "replaced", |status| status.counts.ready.running == 1).await;
    drop(first);
    let status = until(&pool, "deleted", |status| status.totals.deleted == 1).await;
    assert!(status.vms.iter().all(|vm| vm.id != names[0]), "{status:?}");

    // A disk that cannot be removed, or not soon, is no reason to wait for it.
    world.fault(Some(&names[1]), Verb::Destroy, Fault::Err);
    second.delete().await.unwrap_err();
    let status = full(&pool, 2).await;
    assert!(status.totals.delete_failures > 0);
    close(&pool, &world).await;
}

#[tokio::test(start_paused = true)]
async fn a_deletion_that_hangs_keeps_no_other_machine_from_being_made() {
    let (world, builder) = pool();
    let pool = builder.size(1).reuse(Reuse::Reset).create_concurrency(1).cleanup_timeout(secs(60)).build().unwrap();
    pool.start().await.unwrap();
    let lease = pool.acquire().await.unwrap();
    world.fault(Some(lease.id()), Verb::Destroy, Fault::Hang);
    let began = tokio::time::Instant::now();
    drop(lease);
    let next = pool.acquire().await.unwrap();
    assert!(began.elapsed() < secs(20), "{:?}", began.elapsed());
    drop(next);
    close(&pool, &world).await;
}
