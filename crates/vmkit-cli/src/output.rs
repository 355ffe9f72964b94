//! What people and programs read: results on standard output, everything else on standard error.

use std::error::Error as _;

use anstyle::{AnsiColor, Style};
use comfy_table::{ContentArrangement, Table, presets};
use serde::Serialize;
use vmkit::{Error, ErrorKind};

const RED: Style = AnsiColor::Red.on_default().bold();
const DIM: Style = Style::new().dimmed();

/// A failure and the code to end with.
#[derive(Debug)]
pub struct Failure {
    pub error: Error,
    pub code: u8,
}

impl From<Error> for Failure {
    fn from(error: Error) -> Failure {
        let code = match error.kind() {
            ErrorKind::NotFound => 3,
            ErrorKind::IllegalRequest | ErrorKind::NotRunning => 4,
            ErrorKind::TimedOut => 5,
            ErrorKind::MissingDependency => 6,
            ErrorKind::InvalidArgument => 2,
            _ => 1,
        };
        Failure { error, code }
    }
}

impl Failure {
    /// A failure of `run` or `exec`: the other codes are the command's.
    pub fn of_run(error: Error) -> Failure {
        Failure { error, code: 125 }
    }

    /// A machine that `run` could not make: when it was asked for something that cannot be, the arguments make no sense.
    pub fn of_make(error: Error) -> Failure {
        let code = if error.kind() == ErrorKind::InvalidArgument { 2 } else { 125 };
        Failure { error, code }
    }
}

/// How to print.
#[derive(Clone, Copy, Debug)]
pub struct Output {
    pub json: bool,
    pub quiet: bool,
}

impl Output {
    pub fn new(json: bool, quiet: bool) -> Output {
        Output { json, quiet }
    }

    /// A remark for people.
    pub fn note(&self, text: impl AsRef<str>) {
        if !self.quiet && !self.json {
            anstream::eprintln!("{DIM}vmkit: {}{DIM:#}", text.as_ref());
        }
    }

    /// Something that went wrong and does not end the command.
    pub fn warn(&self, text: impl AsRef<str>) {
        if self.json {
            eprintln!("{}", serde_json::json!({ "warning": text.as_ref() }));
        } else {
            let yellow = AnsiColor::Yellow.on_default().bold();
            anstream::eprintln!("{yellow}warning:{yellow:#} {}", text.as_ref());
        }
    }

    /// A result: one JSON document, or what `text` makes of it.
    pub fn result<T: Serialize>(&self, value: &T, text: impl FnOnce() -> String) -> Result<(), Failure> {
        let text = if self.json { pretty(value)? } else { text() };
        print_all(text.as_bytes())
    }

    /// A failure: what happened, why, what to do next.
    pub fn failure(&self, failure: &Failure) {
        if self.json {
            eprintln!("{}", failure_json(&failure.error));
            return;
        }
        anstream::eprintln!("{RED}error:{RED:#} {}", failure.error);
        let mut source = failure.error.source();
        while let Some(cause) = source {
            anstream::eprintln!("  because: {cause}");
            source = cause.source();
        }
        if let Some(details) = failure.error.details() {
            for line in details.trim_end().lines() {
                anstream::eprintln!("  {DIM}| {line}{DIM:#}");
            }
        }
        if let Some(hint) = failure.error.next_step() {
            anstream::eprintln!("  next: {hint}");
        }
    }
}

/// Help, the version, or arguments that make no sense: those as JSON when that was asked for.
pub fn usage(error: &clap::Error) -> std::process::ExitCode {
    if error.use_stderr() && std::env::args_os().take_while(|arg| arg != "--").any(|arg| arg == "--json") {
        let text = error.render().to_string();
        let message = text.lines().next().unwrap_or_default().trim_start_matches("error: ");
        let error = Error::new(ErrorKind::InvalidArgument, message)
            .hint("`vmkit help` and `vmkit help COMMAND` say what there is");
        eprintln!("{}", failure_json(&error));
    } else {
        // A reader of the help that went away is no failure.
        let _ = error.print();
    }
    std::process::ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2))
}

fn failure_json(error: &Error) -> serde_json::Value {
    let mut causes = Vec::new();
    let mut source = error.source();
    while let Some(cause) = source {
        causes.push(cause.to_string());
        source = cause.source();
    }
    serde_json::json!({ "error": {
        "code": error.kind().code(),
        "message": error.to_string(),
        "instance": error.instance(),
        "operation": error.operation(),
        "state": error.state(),
        "causes": causes,
        "hint": error.next_step(),
        "details": error.details(),
        "retryable": error.is_retryable(),
    } })
}

fn pretty<T: Serialize>(value: &T) -> Result<String, Failure> {
    let text = serde_json::to_string_pretty(value);
    text.map(|text| text + "\n").map_err(|error| Error::io("the result cannot be written as JSON", error.into()).into())
}

/// Writes to standard output. A reader that went away, as `head` does, is no failure.
pub fn print_all(bytes: &[u8]) -> Result<(), Failure> {
    use std::io::Write;
    let mut out = std::io::stdout().lock();
    match out.write_all(bytes).and_then(|()| out.flush()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
            let lost = Error::io("standard output cannot be written", error);
            Err(lost.hint("make room where the output goes").into())
        }
        _ => Ok(()),
    }
}

/// A table for people: no lines, columns as wide as they must be.
pub fn table(header: &[&str], rows: Vec<Vec<String>>) -> String {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING).set_content_arrangement(ContentArrangement::Disabled).set_header(header);
    table.add_rows(rows);
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
    table.lines().map(|line| line.trim_end().to_owned() + "\n").collect()
}

/// `3.4 GiB`.
pub fn bytes(bytes: u64) -> String {
    indicatif::HumanBytes(bytes).to_string()
}

/// `2m 3s`, without what is below a second.
pub fn age(time: std::time::Duration) -> String {
    humantime::format_duration(std::time::Duration::from_secs(time.as_secs())).to_string()
}
