//! What people and programs read: results on standard output, everything else on standard error.

use std::error::Error as _;
use std::sync::LazyLock;
use std::time::Instant;

use anstyle::{AnsiColor, Style};
use clap::error::{ContextKind, ContextValue};
use comfy_table::{CellAlignment, ContentArrangement, Table, presets};
use serde::Serialize;
use tracing::Level;
use vmkit::{Error, ErrorKind};

use crate::log::Told;

const RED: Style = AnsiColor::Red.on_default().bold();
const DIM: Style = Style::new().dimmed();
/// When the program began, as far as what it tells is concerned.
static BEGAN: LazyLock<Instant> = LazyLock::new(Instant::now);

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
        LazyLock::force(&BEGAN);
        Output { json, quiet }
    }

    /// A remark for people.
    pub fn note(&self, text: impl AsRef<str>) {
        if !self.quiet && !self.json {
            say(&format!("{DIM}vmkit: {}{DIM:#}\n", text.as_ref()));
        }
    }

    /// Something that went wrong and does not end the command.
    pub fn warn(&self, text: impl AsRef<str>) {
        if self.json {
            say_json(&serde_json::json!({ "warning": text.as_ref() }));
        } else {
            let yellow = AnsiColor::Yellow.on_default().bold();
            say(&format!("{yellow}warning:{yellow:#} {}\n", text.as_ref()));
        }
    }

    /// What went wrong inside and does not end the command.
    pub fn warn_told(&self, told: &Told) {
        match self.json {
            true => say_json(&told_json("warning", told)),
            false => self.warn(told.line()),
        }
    }

    /// What goes on inside, and when: since the program began.
    pub fn trace(&self, level: Level, part: &str, told: &Told) {
        let level = level.as_str().to_lowercase();
        let ms = BEGAN.elapsed().as_secs_f64() * 1e3;
        if self.json {
            let mut value = told_json(&level, told);
            value["part"] = part.into();
            value["ms"] = ((ms * 1e3).round() / 1e3).into();
            return say_json(&value);
        }
        say(&format!("{DIM}{level}: {ms:.1} ms {part}: {}{DIM:#}\n", told.line()));
    }

    /// An error that does not end the command, and what it means for it.
    pub fn warn_of(&self, what: &str, error: &Error) {
        if self.json {
            let mut value = failure_json(error);
            value["warning"] = what.into();
            return say_json(&value);
        }
        let yellow = AnsiColor::Yellow.on_default().bold();
        say(&format!("{yellow}warning:{yellow:#} {what}: {}", at_length(error)));
    }

    /// A result: one JSON document, or what `text` makes of it.
    pub fn result<T: Serialize>(&self, value: &T, text: impl FnOnce() -> String) -> Result<(), Failure> {
        let text = if self.json { pretty(value)? } else { text() };
        print_all(text.as_bytes())
    }

    /// A failure: what happened, why, what to do next.
    pub fn failure(&self, failure: &Failure) {
        if self.json {
            return say_json(&failure_json(&failure.error));
        }
        say(&format!("{RED}error:{RED:#} {}", at_length(&failure.error)));
    }
}

/// An error, why, what explains it, and what to do next: a line each.
fn at_length(error: &Error) -> String {
    let mut text = format!("{error}\n");
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(&format!("  because: {cause}\n"));
        source = cause.source();
    }
    for line in error.details().unwrap_or_default().trim_end().lines() {
        text.push_str(&format!("  {DIM}| {line}{DIM:#}\n"));
    }
    if let Some(hint) = next_step(error) {
        text.push_str(&format!("  next: {hint}\n"));
    }
    text
}

/// To be copied as it stands.
fn next_step(error: &Error) -> Option<String> {
    let hint = error.next_step()?;
    Some(error.instance().map_or_else(|| hint.to_owned(), |name| hint.replace(" NAME", &format!(" {name}"))))
}

/// Text on standard error, coloured where that is wanted. Nobody can be told that it cannot be written; what was to be done
/// goes on.
fn say(text: &str) {
    use std::io::Write;
    let _ = anstream::stderr().lock().write_all(text.as_bytes());
}

/// One line of JSON on standard error.
pub fn say_json(value: &serde_json::Value) {
    use std::io::Write;
    let _ = std::io::stderr().lock().write_all(format!("{value}\n").as_bytes());
}

/// Help, the version, or arguments that make no sense: those as JSON when that was asked for.
pub fn usage(error: &clap::Error) -> std::process::ExitCode {
    if error.use_stderr() && std::env::args_os().take_while(|arg| arg != "--").any(|arg| arg == "--json") {
        let error = Error::new(ErrorKind::InvalidArgument, in_one_line(error))
            .hint("`vmkit help` and `vmkit help COMMAND` say what there is");
        say_json(&failure_json(&error));
    } else {
        // A reader of the help that went away is no failure.
        match error.print() {
            Err(lost) if !error.use_stderr() && lost.kind() != std::io::ErrorKind::BrokenPipe => {
                return std::process::ExitCode::FAILURE;
            }
            _ => {}
        }
    }
    std::process::ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2))
}

/// What makes no sense, and what there is to say of it in lists: which arguments are missing or in the way, which values there are.
fn in_one_line(error: &clap::Error) -> String {
    let text = error.render().to_string();
    let mut message = text.lines().next().unwrap_or_default().trim_start_matches("error: ").to_owned();
    let list = |kind| match error.get(kind) {
        Some(ContextValue::Strings(words)) if !words.is_empty() => Some(words.join(", ")),
        _ => None,
    };
    for kind in [ContextKind::InvalidArg, ContextKind::PriorArg] {
        message.extend(list(kind).map(|words| format!(" {words}")));
    }
    for kind in [ContextKind::ValidValue, ContextKind::ValidSubcommand] {
        message.extend(list(kind).map(|words| format!(" (there are: {words})")));
    }
    message
}

fn told_json(level: &str, told: &Told) -> serde_json::Value {
    let mut value: serde_json::Map<_, _> =
        told.fields.iter().map(|(name, field)| ((*name).to_owned(), field.as_str().into())).collect();
    value.insert(level.to_owned(), told.message.as_str().into());
    value.into()
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
        "hint": next_step(error),
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
    print_some(bytes).map(drop)
}

/// Writes to standard output, and tells whether anybody still reads it.
pub fn print_some(bytes: &[u8]) -> Result<bool, Failure> {
    use std::io::Write;
    let mut out = std::io::stdout().lock();
    match out.write_all(bytes).and_then(|()| out.flush()) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(false),
        Err(error) => {
            let lost = Error::io("standard output cannot be written", error);
            Err(lost.hint("make room where the output goes").into())
        }
    }
}

/// A table for people: no lines, columns as wide as they must be.
pub fn table(header: &[&str], rows: Vec<Vec<String>>) -> String {
    aligned(header, rows, header.len())
}

/// A table whose columns from one on are numbers, which stand on the right.
pub fn aligned(header: &[&str], rows: Vec<Vec<String>>, numbers: usize) -> String {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING).set_content_arrangement(ContentArrangement::Disabled).set_header(header);
    table.add_rows(rows);
    for (at, column) in table.column_iter_mut().enumerate() {
        column.set_padding((0, 2));
        if at >= numbers {
            column.set_cell_alignment(CellAlignment::Right);
        }
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
