//! Builds an image: `cargo run -p vmkit-image --example build -- STORE NAME [DIR|TAR]`.
//!
//! The agent is what `VMKIT_AGENT` names.

use std::path::PathBuf;

use vmkit_image::{Agent, Cancel, Recipe, RootSource, Store};

fn main() -> vmkit::Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [store, name, rest @ ..] = args.as_slice() else { panic!("usage: build STORE NAME [DIR|TAR]") };
    let agent = Agent::find("example")?;
    let recipe = match rest.first().map(PathBuf::from) {
        None => Recipe::built_in(name, agent)?,
        Some(path) if path.is_dir() => Recipe::new(RootSource::Dir(path), agent),
        Some(path) => Recipe::new(RootSource::Tar(path), agent),
    };
    let progress = |progress: vmkit_image::Progress<'_>| eprintln!("{}: {}", progress.phase, progress.detail);
    let image = Store::open(store)?.build(name, &recipe, &Cancel::new(), &progress)?;
    println!("{image:#?}");
    Ok(())
}
