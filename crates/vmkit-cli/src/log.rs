//! What goes on inside, for people: warnings always, the rest when `--log` asks for it.

use std::error::Error;
use std::fmt::{self, Write as _};

use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::layer::{Context, Layer, SubscriberExt};

use crate::output::Output;

pub const DEFAULT: &str = "warn";

/// A level, of vmkit's own parts, or a list of `PART=LEVEL` and levels of all others.
pub fn filter(text: &str) -> Result<Targets, String> {
    const WORDS: &str =
        "use off, error, warn, info, debug, trace, or parts with levels: vmkit_backends=debug,vmkit=info";
    // A variable that is empty is as good as none.
    let text = if text.is_empty() { DEFAULT } else { text };
    let level = |word: &str| word.parse::<LevelFilter>().ok().filter(|_| !word.is_empty());
    if let Some(level) = level(text) {
        return Ok(Targets::new().with_target("vmkit", level));
    }
    // A word alone would be a part at its loudest.
    let parts = text.split(',').all(|part| level(part.rsplit_once('=').map_or(part, |(_, level)| level)).is_some());
    text.parse().ok().filter(|_| parts).ok_or_else(|| WORDS.to_owned())
}

/// Prints what is told from now on, in this process.
pub fn begin(filter: &Targets, output: &Output) {
    let lines = Lines { output: *output }.with_filter(filter.clone());
    tracing::subscriber::set_global_default(tracing_subscriber::registry().with(lines))
        .expect("nobody was before main");
}

/// A line, or an object, for each event.
struct Lines {
    output: Output,
}

impl<S: Subscriber> Layer<S> for Lines {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let mut told = Told::default();
        event.record(&mut told);
        let (level, part) = (*event.metadata().level(), event.metadata().target());
        if level <= Level::WARN { self.output.warn_told(&told) } else { self.output.trace(level, part, &told) }
    }
}

/// What an event says.
#[derive(Default)]
pub struct Told {
    pub message: String,
    pub fields: Vec<(&'static str, String)>,
}

impl Told {
    /// `MESSAGE (id=web): ERROR`.
    pub fn line(&self) -> String {
        let mut line = self.message.clone();
        let others: Vec<_> = self.fields.iter().filter(|(name, _)| *name != "error").collect();
        for (at, (name, value)) in others.iter().enumerate() {
            let _ = write!(line, "{}{name}={value}", if at == 0 { " (" } else { ", " });
        }
        if !others.is_empty() {
            line.push(')');
        }
        for (_, error) in self.fields.iter().filter(|(name, _)| *name == "error") {
            let _ = write!(line, ": {error}");
        }
        line
    }
}

impl Visit for Told {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        match field.name() {
            "message" => self.message = format!("{value:?}"),
            name => self.fields.push((name, format!("{value:?}"))),
        }
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        match field.name() {
            "message" => self.message = value.to_owned(),
            name => self.fields.push((name, value.to_owned())),
        }
    }

    fn record_error(&mut self, field: &Field, value: &(dyn Error + 'static)) {
        let mut text = value.to_string();
        let mut source = value.source();
        while let Some(cause) = source {
            let _ = write!(text, ": {cause}");
            source = cause.source();
        }
        self.fields.push((field.name(), text));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_level_is_of_our_own_parts() {
        let debug = filter("debug").unwrap();
        assert!(debug.would_enable("vmkit_backends::qemu", &Level::DEBUG) && !debug.would_enable("mio", &Level::ERROR));
        assert!(!debug.would_enable("vmkit", &Level::TRACE));
        let parts = filter("vmkit_backends=trace,error").unwrap();
        assert!(parts.would_enable("vmkit_backends", &Level::TRACE) && !parts.would_enable("vmkit", &Level::WARN));
        assert!(!filter("off").unwrap().would_enable("vmkit", &Level::ERROR));
        assert_eq!(filter("").unwrap(), filter("warn").unwrap());
        for wrong in ["loud", "=debug,", "vmkit=loud", "debug=vmkit"] {
            assert!(filter(wrong).unwrap_err().contains("warn"), "{wrong}");
        }
    }

    #[test]
    fn an_event_is_a_line() {
        let fields = vec![("id", "web".to_owned()), ("error", "no room".to_owned()), ("code", "1".to_owned())];
        let told = Told { message: "booting".into(), fields };
        assert_eq!(told.line(), "booting (id=web, code=1): no room");
        assert_eq!(Told { message: "closed".into(), fields: Vec::new() }.line(), "closed");
    }
}
