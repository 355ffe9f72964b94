//! `vmkit doctor`: everything that is needed, found or not, and the exact next step.

use std::path::{Path, PathBuf};

use anstyle::{AnsiColor, Style};
use serde::Serialize;
use vmkit_backends::qemu::Accelerator;

use crate::args::Args;
use crate::context::{Context, agent};
use crate::output::{Failure, Output, bytes};

/// Free space below which a machine or two no longer fit.
const LITTLE: u64 = 2 << 30;

/// One thing that is needed.
#[derive(Serialize)]
struct Check {
    name: &'static str,
    found: bool,
    /// Without it, no machine can run; else only what `needed_for` says cannot be done.
    required: bool,
    needed_for: &'static str,
    detail: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    next: Option<String>,
}

impl Check {
    fn found(name: &'static str, needed_for: &'static str, detail: impl Into<String>) -> Check {
        Check { name, found: true, required: true, needed_for, detail: detail.into(), next: None }
    }

    fn missing(
        name: &'static str,
        needed_for: &'static str,
        detail: impl Into<String>,
        next: impl Into<String>,
    ) -> Check {
        Check { found: false, next: Some(next.into()), ..Check::found(name, needed_for, detail) }
    }

    fn optional(self) -> Check {
        Check { required: false, ..self }
    }
}

pub fn doctor(args: &Args, output: &Output) -> Result<u8, Failure> {
    let mut checks = Vec::new();
    match Context::open_without_sweep(args, output) {
        Ok(context) => {
            state(&context, &mut checks);
            qemu(&context, args.accel, &mut checks);
            images(&context, &mut checks);
        }
        Err(error) => {
            let next = error.next_step().unwrap_or("use another directory: --state-dir DIR").to_owned();
            checks.push(Check::missing("state directory", "machines and images", error.to_string(), next));
        }
    }
    match agent() {
        Ok(agent) => checks.push(Check::found("guest agent", "images", agent.path().display().to_string())),
        Err(error) => {
            let next = error.next_step().unwrap_or("build it with `make agent`").to_owned();
            checks.push(Check::missing("guest agent", "images", error.to_string(), next));
        }
    }
    checks.extend(tools());
    let missing = checks.iter().any(|check| check.required && !check.found);
    output.result(&checks, || checks.iter().map(line).collect())?;
    Ok(if missing { 6 } else { 0 })
}

fn line(check: &Check) -> String {
    let (mark, style) = match (check.found, check.required) {
        (true, _) => ("ok     ", AnsiColor::Green.on_default()),
        (false, true) => ("missing", AnsiColor::Red.on_default().bold()),
        (false, false) => ("absent ", AnsiColor::Yellow.on_default()),
    };
    let style = if colours() { style } else { Style::new() };
    let mut text = format!("{style}{mark}{style:#}  {:<16} {}", check.name, check.detail);
    if !check.found {
        text.push_str(&format!("\n         {:<16} needed for: {}", "", check.needed_for));
    }
    if let Some(next) = &check.next {
        text.push_str(&format!("\n         {:<16} next: {next}", ""));
    }
    text + "\n"
}

fn colours() -> bool {
    anstream::AutoStream::choice(&std::io::stdout()) != anstream::ColorChoice::Never
}

fn state(context: &Context, checks: &mut Vec<Check>) {
    let dir = context.dir.display();
    let free = rustix::fs::statvfs(&context.dir).map(|stat| stat.f_bavail.saturating_mul(stat.f_frsize));
    checks.push(match free {
        Ok(free) if free < LITTLE => Check::missing(
            "state directory",
            "machines: their memory and disks are files",
            format!("{dir} has {} free, and should have {}", bytes(free), bytes(LITTLE)),
            "free some space, or use another disk: --state-dir DIR, or VMKIT_STATE_DIR",
        ),
        Ok(free) => Check::found("state directory", "machines and images", format!("{dir}, {} free", bytes(free))),
        Err(error) => {
            Check::missing("state directory", "machines and images", error.to_string(), "use another directory")
        }
    });
}

fn qemu(context: &Context, wanted: Accelerator, checks: &mut Vec<Check>) {
    let facts = match context.qemu().host_facts() {
        Ok(facts) => facts,
        Err(error) => {
            let next = error.next_step().unwrap_or("run `make setup`").to_owned();
            return checks.push(Check::missing("QEMU", "running machines", error.to_string(), next));
        }
    };
    checks.push(Check::found("QEMU", "running machines", format!("{} ({})", facts.version, facts.program.display())));
    checks.push(match &facts.kvm_problem {
        None => Check::found("KVM", "speed", "works: a guest was run with it"),
        Some(problem) => Check::missing(
            "KVM",
            "speed: machines run all the same, by translation (tcg)",
            problem,
            "use a host with hardware virtualization, nested if it is a VM itself, and join its group kvm",
        )
        .optional(),
    });
    checks.push(match facts.accelerator(wanted) {
        Ok(chosen) => Check::found("accelerator", "running machines", chosen),
        Err(error) => Check::missing("accelerator", "what was asked for", error.to_string(), "use --accel auto or tcg"),
    });
}

fn images(context: &Context, checks: &mut Vec<Check>) {
    let needed_for = "`vmkit run` without waiting for a build";
    let base = context.images().and_then(|store| store.get("base"));
    checks.push(match base {
        Ok(image) => Check::found("image base", needed_for, image.digest),
        Err(error) => {
            let next = error.next_step().unwrap_or("run `vmkit image build base`").to_owned();
            Check::missing("image base", needed_for, error.to_string(), next).optional()
        }
    });
}

/// What images are made with: a program, Debian's package of it, and what for.
const TOOLS: &[(&str, &str, &str)] = &[
    ("busybox", "busybox-static", "the image base"),
    ("mke2fs", "e2fsprogs", "the disks of images"),
    ("debugfs", "e2fsprogs", "the disks of images"),
    ("fakeroot", "fakeroot", "the disks of images"),
    ("apt-get", "apt", "the kernel of images"),
    ("dpkg-deb", "dpkg", "the kernel of images"),
    ("xz", "xz-utils", "kernel modules and root file systems"),
    ("zstd", "zstd", "kernel modules and root file systems"),
    ("mmdebstrap", "mmdebstrap", "the image debian"),
];

fn tools() -> Vec<Check> {
    TOOLS
        .iter()
        .map(|&(program, package, needed_for)| match in_path(program) {
            Some(path) => Check::found(program, needed_for, path.display().to_string()).optional(),
            None => Check::missing(
                program,
                needed_for,
                format!("{program} is not installed"),
                format!("run `make setup`, or: apt-get install {package}"),
            )
            .optional(),
        })
        .collect()
}

fn in_path(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    // As an ordinary user, the administrator's programs are often not in the path.
    let dirs = std::env::split_paths(&path).chain(["/usr/sbin", "/sbin"].map(PathBuf::from));
    let runs = |path: &Path| rustix::fs::access(path, rustix::fs::Access::EXEC_OK).is_ok();
    dirs.map(|dir| dir.join(program)).find(|path| runs(path))
}
