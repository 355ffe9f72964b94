//! `vmkit template`.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use vmkit::{Error, ErrorKind, Result, Source, Spec};

use crate::args::{Args, TemplateArgs, TemplateCommand};
use crate::context::{Busy, Context};
use crate::output::{Failure, Output, age, bytes, table};
use crate::signals;

pub async fn dispatch(args: &Args, command: &TemplateCommand, output: &Output) -> Result<u8, Failure> {
    let context = Context::with_templates(args, output)?;
    match command {
        TemplateCommand::Ls => ls(&context),
        TemplateCommand::Build(build) => make(&context, build).await,
        TemplateCommand::Rm { keys, all } => rm(&context, keys, *all).await,
    }
}

fn ls(context: &Context) -> Result<u8, Failure> {
    let templates = context.qemu().templates()?;
    context.output.result(&templates, || {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let header = ["KEY", "IMAGE", "CPUS", "MEMORY", "SIZE", "QEMU", "ACCEL", "AGE", "WARM"];
        let rows = templates.iter().map(|template| {
            vec![
                template.key.clone(),
                template.image.clone(),
                template.cpus.to_string(),
                bytes(template.memory_mib << 20),
                bytes(template.size),
                template.qemu.clone(),
                template.accelerator.clone(),
                age(now.saturating_sub(Duration::from_secs(template.created))),
                template.warm.last().cloned().unwrap_or_else(|| "-".into()),
            ]
        });
        table(&header, rows.collect())
    })?;
    Ok(0)
}

async fn make(context: &Context, build: &TemplateArgs) -> Result<u8, Failure> {
    // The image may have to be made first.
    let (image, _hold) = match signals::unless_asked(context.image(&build.image)).await {
        Ok(image) => image?,
        Err(signal) => return Ok(signals::exit_code(signal)),
    };
    let spec = Spec::new(Source::Boot(image)).cpus(build.cpus).memory_mib(build.memory);
    spec.check()?;
    let warm: Vec<String> = build.warm.iter().flat_map(|line| ["sh".to_owned(), "-c".into(), line.clone()]).collect();
    let busy = Busy::new(&context.output, "making a template", &build.image);
    let made = tokio::select! {
        made = context.qemu().build_template(&spec, &warm, true) => made,
        signal = signals::asked_to_end() => {
            context.half_made().await;
            return Ok(signals::exit_code(signal));
        }
    };
    drop(busy);
    let info = made?;
    context.output.result(&info, || format!("{}\n", info.key))?;
    Ok(0)
}

/// Each gets its turn; the first failure counts.
async fn rm(context: &Context, keys: &[String], all: bool) -> Result<u8, Failure> {
    let known: Vec<String> = context.qemu().templates()?.into_iter().map(|template| template.key).collect();
    let keys = match all {
        true => known,
        false => keys.iter().map(|key| whole(key, &known)).collect::<Result<_>>()?,
    };
    let mut removed = Vec::new();
    let mut first: Option<Failure> = None;
    for key in keys {
        match context.qemu().remove_template(&key).await {
            Ok(()) => {
                if !context.output.json {
                    context.output.result(&(), || format!("{key}\n"))?;
                }
                removed.push(serde_json::json!({ "removed": key }));
            }
            Err(error) => match first {
                None => first = Some(error.into()),
                Some(_) => context.output.failure(&error.into()),
            },
        }
    }
    if context.output.json {
        context.output.result(&removed, String::new)?;
    }
    first.map_or(Ok(0), Err)
}

/// The key that begins so, where only one does; what begins no key stays as it is.
fn whole(key: &str, known: &[String]) -> Result<String> {
    // Nothing, as from a variable that is not set, begins them all.
    let mut begin_so = known.iter().filter(|known| !key.is_empty() && known.starts_with(key));
    match (begin_so.next(), begin_so.next()) {
        (Some(first), Some(_)) if first != key => {
            Err(Error::new(ErrorKind::InvalidArgument, format!("{key:?} begins more than one template's key"))
                .hint("give more of it: `vmkit template ls`"))
        }
        (Some(first), _) => Ok(first.clone()),
        (None, _) => Ok(key.to_owned()),
    }
}

/// Removes the templates of images that are gone.
pub async fn prune(context: &Context) -> Result<()> {
    let store = context.images()?;
    if context.qemu().templates().is_ok() {
        context.qemu().prune_templates(|digest| store.has(digest)).await?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_may_be_given_by_its_beginning() {
        let known = ["ab-1", "ab-2", "c-1", "c-1x"].map(str::to_owned);
        assert_eq!(whole("c-1x", &known).unwrap(), "c-1x");
        assert_eq!(whole("c-1", &known).unwrap(), "c-1");
        assert_eq!(whole("ab-2", &known).unwrap(), "ab-2");
        assert_eq!(whole("zz", &known).unwrap(), "zz");
        assert_eq!(whole("", &known[..1]).unwrap(), "");
        for several in ["a", "ab-", "c"] {
            assert_eq!(whole(several, &known).unwrap_err().kind(), ErrorKind::InvalidArgument, "{several:?}");
        }
    }
}
