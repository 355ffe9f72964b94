//! The table of requests, in the forms people and programs read.

use std::fmt::Write;

use serde::Serialize;

use crate::state::{Action, Edge, State, Verdict, plan};

/// One legal pair of the table of requests, as `--format json` prints it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct StateRow {
    /// The state a request is made in.
    pub from: State,
    /// The request; `None` is to wait.
    pub action: Action,
    /// The state it leads to at once.
    pub next: State,
    /// Where that ends when it succeeds; absent when there is nothing to do.
    pub success: Option<State>,
    /// Where it may end when it fails, once that was verified. Anything else is ErrorUnknown.
    pub failure: Vec<State>,
}

/// Every legal pair, in table order.
pub fn states_rows() -> Vec<StateRow> {
    let mut rows = Vec::new();
    for from in State::ALL {
        for action in Action::ALL {
            match plan(from, action) {
                Verdict::Run(Edge { via, ok, err, .. }) => {
                    let mut failure = err.to_vec();
                    failure.push(State::ErrorUnknown);
                    rows.push(StateRow { from, action, next: via, success: Some(ok), failure });
                }
                Verdict::Already => {
                    rows.push(StateRow { from, action, next: from, success: None, failure: Vec::new() });
                }
                Verdict::Refuse => {}
            }
        }
    }
    rows
}

/// The tables of requests and of completions, in Markdown: `docs/states.md`.
pub fn states_markdown() -> String {
    let mut text = String::from(
        "# States\n\n<!-- Rendered from the table in the code: `UPDATE_GOLDEN=1 cargo test -p vmkit --test states`. -->\n\n\
         ## Requests\n\nWhat may be asked for in which state, and the state it leads to at once. An empty cell is an \
         error that changes nothing and\ncalls nothing.\n\n|",
    );
    for action in Action::ALL {
        let _ = write!(text, " | {}", if action == Action::None { "(wait)" } else { action.name() });
    }
    text.push_str(" |\n|---|---|---|---|---|---|---|\n");
    for from in State::ALL {
        let _ = write!(text, "| **{from}**");
        for action in Action::ALL {
            match from.transition(action) {
                Some(next) => drop(write!(text, " | {next}")),
                None => text.push_str(" | "),
            }
        }
        text.push_str(" |\n");
    }
    text.push_str(
        "\nOut of ErrorUnknown only Delete leads. Where a machine is in it because the memory of its saved execution is gone, \
         `vmkit start\n--discard` gives that execution up before the table is asked: what is left is Stopped, and is \
         booted from its disk.\n",
    );
    text.push_str(
        "\n## Completions\n\nWhere an operation may end. After every operation the machine is inspected, and what was \
         found is published; what could not\nbe verified is ErrorUnknown.\n\n\
         | from | request | success | failure |\n|---|---|---|---|\n",
    );
    for row in states_rows() {
        let Some(success) = row.success else { continue };
        let failure: Vec<&str> = row.failure.iter().map(|state| state.name()).collect();
        let _ = writeln!(text, "| {} | {} | {} … {success} | {} |", row.from, row.action, row.next, failure.join(", "));
    }
    text.push_str("| Running | nobody asked: the machine exited | Stopped | ErrorUnknown |\n");
    text
}

/// The same as a graph, for `dot`.
pub fn states_dot() -> String {
    let mut text = String::from("digraph states {\n    rankdir=LR;\n");
    for state in State::ALL {
        let shape = if state.is_transitional() { "ellipse, style=dashed" } else { "box" };
        let _ = writeln!(text, "    {state} [shape={shape}];");
    }
    // Two requests may share their way back: each arrow is drawn once.
    let mut drawn = std::collections::BTreeSet::new();
    for row in states_rows() {
        let Some(success) = row.success else {
            if !row.from.is_transitional() {
                let _ = writeln!(text, "    {} -> {} [label=\"{}\"];", row.from, row.from, row.action);
            }
            continue;
        };
        let _ = writeln!(text, "    {} -> {} [label=\"{}\"];", row.from, row.next, row.action);
        if drawn.insert((row.next, success)) {
            let _ = writeln!(text, "    {} -> {success};", row.next);
        }
        for failure in row.failure.into_iter().filter(|failure| *failure != success) {
            if drawn.insert((row.next, failure)) {
                let _ = writeln!(text, "    {} -> {failure} [style=dotted];", row.next);
            }
        }
    }
    text.push_str("    Running -> Stopped [label=\"exited\", style=dotted];\n}\n");
    text
}
