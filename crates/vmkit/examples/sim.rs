//! How a service that uses machines is tested without any: the faults of a data centre in a few milliseconds.
//!
//! `cargo run -p vmkit --features sim --example sim`

use std::time::Duration;

use vmkit::sim::{Fault, Latency, SimProvider, Verb, World};
use vmkit::{ConsoleSinks, ErrorKind, Host, Id, Provider, Result, Source, Spec, State, cleanup};

/// What is to be tested: it runs one job in a fresh machine, tries a start twice, and leaves nothing behind.
async fn job<P: Provider>(host: &Host<P>, id: Id) -> Result<String> {
    let vm = host.create(id, Spec::new(Source::Alias("base".into()))).await?;
    let work = async {
        vm.clone_source().await?;
        if vm.start(ConsoleSinks::discard()).await.is_err() {
            vm.start(ConsoleSinks::discard()).await?;
        }
        let output = vm.command("echo").arg("done").output().await?;
        Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    };
    let result = work.await;
    cleanup(&vm, Duration::from_secs(1), Duration::from_secs(60)).await?;
    assert!(matches!(vm.state(), State::Initial | State::Deleted));
    result
}

#[tokio::main(flavor = "current_thread", start_paused = true)]
async fn main() -> Result<()> {
    let world = World::new();
    world.latency(Latency { boot: Duration::from_secs(4), ..Latency::default() });
    let host = Host::new(SimProvider::new(world.clone()));

    // All is well.
    assert_eq!(job(&host, Id::new("well")?).await?, "done");

    // One boot hangs: its own deadline ends it, and the second try works.
    world.fault(None, Verb::Boot, Fault::Hang);
    assert_eq!(job(&host, Id::new("hangs")?).await?, "done");

    // Two boots fail: the job fails, and still nothing is left.
    world.fault(None, Verb::Boot, Fault::Err);
    world.fault(None, Verb::Boot, Fault::ErrButDone);
    assert_eq!(job(&host, Id::new("fails")?).await.unwrap_err().kind(), ErrorKind::Backend);

    // Somebody else has a machine of that name: it is an error, and theirs stays as it is.
    let theirs = Id::new("theirs")?;
    world.plant_foreign(&theirs);
    assert_eq!(job(&host, theirs.clone()).await.unwrap_err().kind(), ErrorKind::AlreadyExists);
    assert!(world.foreign_intact(&theirs));

    assert_eq!(world.residue(), Vec::<String>::new());
    assert_eq!(world.violations(), Vec::<String>::new());
    println!("four jobs, {} calls, nothing left", world.calls().len());
    Ok(())
}
