//! A pool of real machines: image, templates, pool, a command.
//!
//! `make setup build` installs QEMU and builds the guest agent; then
//! `VMKIT_AGENT=target/release/vmkit-agent cargo run -p vmkit-backends --example pool -- DIRECTORY`. The image and its template are made
//! the first time, in DIRECTORY.

use std::path::PathBuf;
use std::time::Duration;

use vmkit::pool::{Pool, Staging};
use vmkit::{Error, ErrorKind, Host, Result, Source, Spec};
use vmkit_backends::qemu::{Qemu, QemuConfig};
use vmkit_image::{Agent, Cancel, Store};

#[tokio::main]
async fn main() -> Result<()> {
    let dir = std::env::args_os().nth(1).map(PathBuf::from);
    let dir = dir.ok_or_else(|| Error::new(ErrorKind::InvalidArgument, "say in which directory"))?;

    // The image, made when it is not there. It blocks, and nothing else is to be done yet.
    let agent = Agent::find(format!("protocol {}", vmkit_agent::link::VERSION))?;
    let image = Store::open(dir.join("images"))?.ensure("base", &agent, &Cancel::new(), &|_| {})?;

    // Machines, and the templates that fresh ones are forks of.
    let config = QemuConfig { templates: Some(dir.join("templates")), ..QemuConfig::new(dir.join("vms")) };
    let host = Host::new(Qemu::new(config)?);
    let spec = Spec::new(Source::Boot(image)).memory_mib(192);

    let pool = Pool::builder(host, spec).name("example").size(2).staging(Staging::Running);
    let pool = pool.ready_command(["/bin/busybox", "uname"]).ready_runs(3).build()?;
    pool.start().await?;

    let lease = pool.acquire().env("JOB", "17").timeout(Duration::from_secs(60)).await?;
    let output = lease.command("sh").args(["-c", "echo job $JOB on $(hostname)"]).output().await?;
    print!("{}", String::from_utf8_lossy(&output.stdout));
    // Deleted, and replaced. A lease that is dropped is deleted in the background.
    lease.delete().await?;

    pool.close(Duration::from_secs(60)).await.into_result().map(drop)
}
