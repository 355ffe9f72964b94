//! One pool shared by all tests of a process: each test gets a machine of its own at once, and none pays for a boot.
//!
//! To copy, put `fleet` where your tests find it and give it your own host. Simulated machines here, so that it runs anywhere:
//! `cargo run -p vmkit --features sim --example pool_tests`

use std::time::Duration;

use tokio::sync::OnceCell;
use vmkit::pool::{KeepFailed, Lease, Pool, Tiers};
use vmkit::sim::{Latency, SimProvider, World};
use vmkit::{Host, Result, Source, Spec};

/// The machines of this process's tests, made by whichever test comes first.
async fn fleet() -> &'static Pool {
    static FLEET: OnceCell<Pool> = OnceCell::const_new();
    FLEET
        .get_or_init(|| async {
            let world = World::new();
            world.latency(Latency {
                clone: Duration::from_millis(20),
                boot: Duration::from_millis(300),
                ..Latency::default()
            });
            let host = Host::new(SimProvider::new(world));
            let pool = Pool::builder(host, Spec::new(Source::Alias("base".into())))
                // Two test runs at once need two names: a name belongs to one process at a time.
                .name(&format!("tests-{}", std::process::id()))
                // Two are up, two more cost no processor until they are needed.
                .tiers(Tiers { running: 2, suspended: 2, stopped: 0 })
                // A test that failed leaves its machine to be looked at.
                .keep_failed(KeepFailed { quota: 1, period: Duration::from_secs(3600) })
                .build()
                .expect("the configuration is valid");
            pool.start().await.expect("machines can be made");
            pool
        })
        .await
}

/// A machine for one test: named after it, and taken away if it hangs.
async fn machine(test: &str) -> Result<Lease> {
    let limit = Duration::from_secs(300);
    fleet().await.acquire().holder(test).env("TEST", test).time_limit(limit).await
}

// In a test file each of these has a `#[tokio::test(flavor = "multi_thread")]`, and a runtime that all tests share: machines live
// on the runtime that the pool was started on.

async fn it_says_hello() -> Result<()> {
    let vm = machine("it_says_hello").await?;
    let output = vm.command("echo").arg("hello").output().await?;
    assert_eq!(output.stdout, b"hello\n");
    // Dropped here: deleted in the background, also if the assertion fails.
    Ok(())
}

async fn it_knows_its_test() -> Result<()> {
    let vm = machine("it_knows_its_test").await?;
    assert_eq!(vm.command("env").arg("TEST").output().await?.stdout, b"it_knows_its_test\n");
    Ok(())
}

async fn it_leaves_a_log() -> Result<()> {
    let vm = machine("it_leaves_a_log").await?;
    vm.command("store").args(["/var/log/job", "all went well"]).status().await?;
    // Stopped, its place in the pool is filled again, while its disk is still there to be read.
    vm.stop_and_release(Duration::from_secs(5)).await.stopped()?;
    vm.delete().await
}

#[tokio::main]
async fn main() -> Result<()> {
    let tests: Vec<_> = (0..8)
        .flat_map(|_| {
            [tokio::spawn(it_says_hello()), tokio::spawn(it_knows_its_test()), tokio::spawn(it_leaves_a_log())]
        })
        .collect();
    let count = tests.len();
    for test in tests {
        test.await.expect("no test panics")?;
    }
    let status = fleet().await.status().await;
    println!(
        "{count} tests, {} machines made, {} waited for one at the end",
        status.totals.attempts, status.counts.waiting
    );
    // At the end of the process; what a killed one leaves, the next with its name deletes.
    fleet().await.close(Duration::from_secs(60)).await.into_result()?;
    Ok(())
}
