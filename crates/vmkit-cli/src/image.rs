//! `vmkit image`.

use std::io::Read;
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use vmkit::{Error, ErrorKind};
use vmkit_image::{KernelSource, Recipe, RootSource};

use crate::args::{Args, BuildArgs, ImageCommand};
use crate::context::{Context, agent};
use crate::output::{Failure, Output, age, bytes, table};
use crate::signals;

pub async fn dispatch(args: &Args, command: &ImageCommand, output: &Output) -> Result<u8, Failure> {
    let context = Context::open(args, output).await?;
    match command {
        ImageCommand::Ls => ls(&context),
        ImageCommand::Build(build) => make(&context, build).await,
        ImageCommand::Rm { names } => rm(&context, names).await,
    }
}

fn ls(context: &Context) -> Result<u8, Failure> {
    let images = context.images()?.list()?;
    context.output.result(&images, || {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let header = ["NAME", "SIZE", "DISK", "KERNEL", "AGE", "SOURCE", "DIGEST"];
        let rows = images.iter().map(|image| {
            let short = image.digest.strip_prefix("sha256:").unwrap_or(&image.digest);
            vec![
                image.name.clone(),
                bytes(image.size),
                bytes(image.virtual_size),
                image.kernel_version.clone(),
                age(now.saturating_sub(Duration::from_secs(image.created))),
                image.source.clone(),
                short.get(..12).unwrap_or(short).to_owned(),
            ]
        });
        table(&header, rows.collect())
    })?;
    for image in &images {
        for problem in &image.problems {
            context.output.warn(problem);
        }
    }
    Ok(0)
}

async fn make(context: &Context, build: &BuildArgs) -> Result<u8, Failure> {
    let agent = agent()?;
    let mut recipe = match &build.rootfs {
        None => Recipe::built_in(&build.name, agent)?,
        Some(root) if root.is_dir() => Recipe::new(RootSource::Dir(root.clone()), agent),
        Some(root) => Recipe::new(RootSource::Tar(root.clone()), agent),
    };
    if let Some(size) = build.size {
        recipe = recipe.size(size);
    }
    if let Some(kernel) = &build.kernel {
        check_kernel(kernel)?;
        recipe = recipe.kernel(KernelSource::Files { kernel: kernel.clone(), modules: build.modules.clone() });
    }
    let (store, name) = (context.images()?, build.name.clone());
    let built = context.blocking(move |cancel, progress| {
        store.build(&name, &recipe, cancel, progress)?;
        store.info(&name)
    });
    let info = match signals::unless_asked(built).await {
        Ok(built) => built?,
        Err(signal) => return Ok(signals::exit_code(signal)),
    };
    context.output.result(&info, || format!("{} {}\n", info.name, info.digest))?;
    Ok(0)
}

/// A file that is no kernel makes an image of which no machine boots. What cannot be read is said when it is copied.
fn check_kernel(path: &Path) -> vmkit::Result<()> {
    // The magic number of the boot protocol, and where it is.
    let (at, magic): (usize, &[u8]) = match std::env::consts::ARCH {
        "x86_64" => (0x202, b"HdrS"),
        _ => (0x38, b"ARM\x64"),
    };
    let mut start = Vec::new();
    let read = std::fs::File::open(path).and_then(|file| file.take(1024).read_to_end(&mut start));
    match read.is_err() || start.get(at..at + magic.len()) == Some(magic) {
        true => Ok(()),
        false => Err(Error::new(ErrorKind::InvalidArgument, format!("{} is no kernel", path.display()))
            .hint("give the compressed kernel that a boot loader would start: vmlinuz, bzImage or Image")),
    }
}

/// Each gets its turn; the first failure counts.
async fn rm(context: &Context, names: &[String]) -> Result<u8, Failure> {
    let mut removed = Vec::new();
    let mut first: Option<Failure> = None;
    for name in names {
        match remove(context, name).await {
            Ok(()) => {
                if !context.output.json {
                    context.output.result(&(), || format!("{name}\n"))?;
                }
                removed.push(serde_json::json!({ "removed": name }));
            }
            Err(error) => {
                let failure = Failure::from(error);
                if let Some(earlier) = first.replace(failure) {
                    context.output.failure(&earlier);
                    first = first.map(|last| Failure { code: earlier.code, ..last });
                }
            }
        }
    }
    if context.output.json {
        context.output.result(&removed, String::new)?;
    }
    first.map_or(Ok(0), Err)
}

async fn remove(context: &Context, name: &str) -> vmkit::Result<()> {
    // A machine whose record is damaged: say so, instead of that the image is in use.
    context.qemu().images_in_use()?;
    let (store, own, qemu) = (context.images()?, name.to_owned(), context.qemu().clone());
    // Asked again under the store's lock, when no machine can be on its way.
    let in_use = move |digest: &str| qemu.images_in_use().map_or(true, |used| used.iter().any(|used| used == digest));
    context.blocking(move |_, _| store.remove(&own, &in_use)).await?;
    crate::template::prune(context).await
}
