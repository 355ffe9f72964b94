//! Looking at machines.

use std::io::{Read, Seek, SeekFrom};
use std::time::Duration;

use serde::Serialize;
use vmkit::{Birth, Error, ErrorKind, Found, Id, Origin, State};

use crate::args::Args;
use crate::context::Context;
use crate::output::{Failure, Output, age, bytes, print_some, table};

const POLL: Duration = Duration::from_millis(100);

pub async fn ls(args: &Args, names_only: bool, output: &Output) -> Result<u8, Failure> {
    let context = Context::open(args, output).await?;
    let machines = context.host.list().await?;
    output.result(&machines, || {
        if names_only {
            return machines.iter().map(|found| format!("{}\n", found.id)).collect();
        }
        let header = ["NAME", "STATE", "IMAGE", "CPUS", "MEMORY", "UNIQUE", "DISK", "UPTIME", "PID", "ACCEL"];
        table(&header, machines.iter().map(row).collect())
    })?;
    for found in &machines {
        if let Some(problem) = found.problem.as_ref().filter(|_| !output.json && !names_only) {
            output.warn(format!("{}: {problem}", found.id));
        }
    }
    Ok(0)
}

fn row(found: &Found) -> Vec<String> {
    let properties = &found.properties;
    let or_none = |value: Option<String>| value.unwrap_or_else(|| "-".into());
    vec![
        found.id.to_string(),
        found.state.to_string(),
        or_none(properties.cloned_from.as_ref().map(|from| from.image.clone())),
        or_none((properties.cpus > 0).then(|| properties.cpus.to_string())),
        or_none((properties.memory_mib > 0).then(|| bytes(properties.memory_mib << 20))),
        or_none(properties.memory_used.map(bytes)),
        or_none(properties.disk_used.map(bytes)),
        or_none(properties.uptime.map(age)),
        or_none(properties.pid.map(|pid| pid.to_string())),
        or_none(properties.accelerator.clone()),
    ]
}

#[derive(Serialize)]
struct Inspected<'a> {
    #[serde(flatten)]
    found: &'a Found,
    directory: std::path::PathBuf,
    console: std::path::PathBuf,
}

pub async fn inspect(args: &Args, id: &Id, output: &Output) -> Result<u8, Failure> {
    let context = Context::open(args, output).await?;
    let machines = context.host.list().await?;
    let Some(found) = machines.iter().find(|found| found.id == *id) else { return Err(not_found(id).into()) };
    let inspected =
        Inspected { found, directory: context.qemu().machine_dir(id), console: context.qemu().console_log(id) };
    output.result(&inspected, || {
        let properties = &found.properties;
        let mut rows = vec![
            ("name", found.id.to_string()),
            ("state", found.state.to_string()),
            ("cpus", properties.cpus.to_string()),
            ("memory", bytes(properties.memory_mib << 20)),
        ];
        let mut add = |key, value: Option<String>| rows.extend(value.map(|value| (key, value)));
        add("problem", found.problem.clone());
        add("image", properties.cloned_from.as_ref().map(|from| from.image.clone()));
        add("digest", properties.cloned_from.as_ref().and_then(|from| from.digest.clone()));
        add("address", properties.ip.map(|ip| ip.to_string()));
        add("backend", Some(properties.backend.clone()));
        add("accelerator", properties.accelerator.clone());
        add("pid", properties.pid.map(|pid| pid.to_string()));
        add("uptime", properties.uptime.map(age));
        add("cpu time", properties.cpu_time.map(|time| humantime::format_duration(time).to_string()));
        add("unique", properties.memory_used.map(bytes));
        add("disk used", properties.disk_used.map(bytes));
        if let Some(birth) = &properties.birth {
            add("birth", Some(how(birth)));
            add("renewed", Some(birth.renewed.join(", ")).filter(|renewed| !renewed.is_empty()));
            let phases = birth.phases.iter().map(|phase| format!("{} {} ms", phase.name, phase.ms));
            add("phases", Some(phases.collect::<Vec<_>>().join(", ")));
            add("note", birth.note.clone());
        }
        for (key, value) in found.spec.iter().flat_map(|spec| &spec.labels) {
            add("label", Some(format!("{key}={value}")));
        }
        add("directory", Some(inspected.directory.display().to_string()));
        add("console", Some(inspected.console.display().to_string()));
        rows.into_iter().map(|(key, value)| format!("{key:<12} {value}\n")).collect()
    })?;
    Ok(0)
}

fn how(birth: &Birth) -> String {
    let how = match (birth.how, &birth.template) {
        (Origin::Fork, _) if birth.copy_of.is_some() => {
            format!("copy of {}, as it ran", birth.copy_of.as_deref().unwrap_or_default())
        }
        (Origin::Fork, Some(template)) => format!("fork of {template}"),
        (Origin::Fork, None) => "fork".into(),
        (Origin::Boot, _) => "boot".into(),
    };
    if birth.unused { format!("{how}, never used before") } else { how }
}

fn not_found(id: &Id) -> Error {
    Error::new(ErrorKind::NotFound, "there is no such machine")
        .on(id.as_str())
        .hint("`vmkit ls` lists the machines there are")
}

pub async fn console(args: &Args, id: &Id, follow: bool, lines: Option<usize>) -> Result<u8, Failure> {
    let output = Output::new(args.json, true);
    let context = Context::open(args, &output).await?;
    let state = context.qemu().state(id).await?;
    if state == State::Deleted {
        return Err(not_found(id).into());
    }
    let path = context.qemu().console_log(id);
    let mut text = match std::fs::read(&path) {
        Ok(text) => text,
        // Never started: it has printed nothing.
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Vec::new(),
        Err(error) => return Err(Error::io(format!("{} cannot be read", path.display()), error).into()),
    };
    let mut at = text.len() as u64;
    if let Some(lines) = lines {
        text = last_lines(&text, lines).to_vec();
    }
    if !print_some(&text)? || !follow {
        return Ok(0);
    }
    loop {
        let ended = !matches!(context.qemu().state(id).await?, State::Running | State::Starting | State::Suspending);
        let more = std::fs::File::open(&path).and_then(|mut file| {
            // It began anew: the machine was started again.
            if file.metadata()?.len() < at {
                at = 0;
            }
            file.seek(SeekFrom::Start(at))?;
            let mut more = Vec::new();
            file.read_to_end(&mut more)?;
            Ok(more)
        });
        let more = more.unwrap_or_default();
        at += more.len() as u64;
        if !print_some(&more)? || ended {
            return Ok(0);
        }
        tokio::time::sleep(POLL).await;
    }
}

fn last_lines(text: &[u8], lines: usize) -> &[u8] {
    let body = text.strip_suffix(b"\n").unwrap_or(text);
    let mut starts = body.iter().enumerate().rev().filter(|(_, byte)| **byte == b'\n').map(|(at, _)| at + 1);
    match lines {
        0 => &[],
        lines => &text[starts.nth(lines - 1).unwrap_or(0)..],
    }
}

#[cfg(test)]
mod tests {
    use super::last_lines;

    #[test]
    fn the_last_lines() {
        let text = b"one\ntwo\nthree\n";
        assert_eq!(last_lines(text, 0), b"");
        assert_eq!(last_lines(text, 1), b"three\n");
        assert_eq!(last_lines(text, 2), b"two\nthree\n");
        assert_eq!(last_lines(text, 9), text);
        assert_eq!(last_lines(b"cut", 1), b"cut");
    }
}
