//! Figures side by side, for people and for programs.

use comfy_table::{CellAlignment, ContentArrangement, Table, presets};
use serde_json::{Map, Value, json};
use vmkit::ErrorKind;

use crate::figures::{FLOOR, Figure, OURS, Target, Wanted, shown};
use crate::plot;
use crate::samples::Samples;

/// What was measured in one run.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// The floor's.
    pub floor: Samples,
    /// vmkit's own.
    pub ours: Samples,
    /// How guests executed: `tcg` or `kvm`.
    pub accelerator: &'static str,
    /// What is shown of it.
    pub wanted: Wanted,
}

/// A ratio and its limit.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Bar {
    /// The figure's name.
    pub name: &'static str,
    /// Ours by the floor's.
    pub ratio: f64,
    /// What is to be reached.
    pub target: Target,
}

impl Report {
    /// The rows that were asked for, measured or not.
    fn rows(&self) -> impl Iterator<Item = &'static Figure> {
        OURS.iter().filter(|figure| self.wanted.asks(figure.name))
    }

    /// A figure of the floor's, measured or computed from those that were.
    fn floor(&self, name: &str) -> Option<f64> {
        match name {
            "resume_answer" => {
                let [resume, fork, process] =
                    ["resume_disk", "fork_total", "fork_process"].map(|part| self.floor.median(part));
                Some(resume? - fork? + process?)
            }
            _ => self.floor.median(name),
        }
    }

    /// A figure of ours, its own or the one that its row shows.
    fn ours(&self, figure: &Figure) -> Option<f64> {
        self.ours.median(shown(figure.name))
    }

    /// A figure of ours by the floor's.
    fn ratio(&self, figure: &Figure) -> Option<f64> {
        let floor = self.floor(figure.floor?)?;
        Some(self.ours(figure)? / floor)
    }

    /// Whether a figure reaches its target; none without one, and when it was not measured.
    fn reached(&self, figure: &Figure) -> Option<bool> {
        match figure.target? {
            Target::Ratio(limit) => Some(self.ratio(figure)? <= limit),
            Target::AtLeast(limit) => Some(self.ratio(figure)? >= limit),
            Target::Milliseconds(limit) => Some(self.ours.median(figure.name)? <= limit),
        }
    }

    /// The names of the figures whose ratio is over its target.
    pub fn over(&self) -> Vec<&'static str> {
        let over = |figure: &&Figure| {
            !matches!(figure.target, Some(Target::Milliseconds(_))) && self.reached(figure) == Some(false)
        };
        self.rows().filter(over).map(|figure| figure.name).collect()
    }

    /// The ratios that have a limit, as SVG.
    ///
    /// # Errors
    /// When it cannot be drawn.
    pub fn plot(&self) -> vmkit::Result<String> {
        let title =
            format!("What vmkit takes, as multiples of what bare QEMU takes ({})", self.accelerator.to_uppercase());
        plot::draw(&self.bars(), &title).map_err(|why| vmkit::Error::new(ErrorKind::Io, why).hint("leave --svg out"))
    }

    fn bars(&self) -> Vec<Bar> {
        let bar = |figure: &Figure| {
            let target = figure.target.filter(|target| !matches!(target, Target::Milliseconds(_)))?;
            Some(Bar { name: figure.name, ratio: self.ratio(figure)?, target })
        };
        self.rows().filter_map(bar).collect()
    }

    /// `{"floor": {…}, "ours": {…}, "ratio": {…}}`, each by the figure's name: medians, milliseconds unless the name says
    /// otherwise. What was not measured, or not asked for, is left out.
    pub fn json(&self) -> Value {
        let object = |pairs: &mut dyn Iterator<Item = (&str, Option<f64>)>, digits| -> Value {
            let known = pairs.filter_map(|(name, value)| Some((name.to_owned(), json!(round(value?, digits)))));
            Value::Object(known.collect::<Map<_, _>>())
        };
        let floor = FLOOR.iter().filter(|(name, _)| self.wanted.asks_floor(name));
        // Where a row shows another one's figure, that is by its own name.
        let own = |figure: &&Figure| self.rows().any(|row| shown(row.name) == figure.name);
        json!({
            "floor": object(&mut floor.map(|(name, _)| (*name, self.floor(name))), 2),
            "ours": object(&mut OURS.iter().filter(own).map(|figure| (figure.name, self.ours(figure))), 2),
            "ratio": object(&mut self.rows().map(|figure| (figure.name, self.ratio(figure))), 3),
        })
    }

    /// A table: first what both have, then the rest.
    pub fn text(&self) -> String {
        let mut table = Table::new();
        table.load_preset(presets::NOTHING).set_content_arrangement(ContentArrangement::Disabled);
        table.set_header(["FIGURE", "OURS", "FLOOR", "RATIO", "TARGET", "", "WHAT"]);
        for figure in self.rows() {
            let ours = self.ours(figure);
            if ours.is_some() {
                let floor = figure.floor.and_then(|name| self.floor(name));
                let verdict = self.reached(figure).map_or("", |reached| if reached { "ok" } else { "over" });
                let (ours, floor, ratio) = (number(ours), number(floor), number(self.ratio(figure)));
                let target = figure.target.map_or(String::new(), target);
                table.add_row([figure.name, &ours, &floor, &ratio, &target, verdict, figure.what]);
            }
        }
        for (name, what) in FLOOR.iter().filter(|(name, _)| self.wanted.asks(name)) {
            let shown = OURS.iter().any(|figure| figure.name == *name && self.ours.median(name).is_some());
            let floor = self.floor(name);
            if floor.is_some() && !shown {
                table.add_row([name, "", &number(floor), "", "", "", what]);
            }
        }
        for (at, column) in table.column_iter_mut().enumerate() {
            column.set_padding((0, 2));
            if (1..=4).contains(&at) {
                column.set_cell_alignment(CellAlignment::Right);
            }
        }
        table.lines().map(|line| line.trim_end().to_owned() + "\n").collect()
    }
}

fn target(target: Target) -> String {
    match target {
        Target::Ratio(limit) => format!("≤ {limit}×"),
        Target::AtLeast(limit) => format!("≥ {limit}×"),
        Target::Milliseconds(limit) => format!("≤ {limit} ms"),
    }
}

/// With as many digits as mean something.
fn number(value: Option<f64>) -> String {
    match value {
        None => String::new(),
        Some(value) if value.abs() >= 100.0 => format!("{value:.0}"),
        Some(value) if value.abs() >= 10.0 => format!("{value:.1}"),
        Some(value) => format!("{value:.2}"),
    }
}

fn round(value: f64, digits: i32) -> f64 {
    let scale = 10_f64.powi(digits);
    (value * scale).round() / scale
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report() -> Report {
        let mut report = Report::default();
        for (name, value) in [("cold_boot", 2000.0), ("process_warm", 4.0), ("fork_total", 50.0), ("forks_per_s", 10.0)]
        {
            report.floor.add(name, value);
        }
        for (name, value) in [
            ("cold_boot", 2400.0),
            ("run_boot", 3100.0),
            ("process_warm", 4.4444),
            ("churn_per_s", 8.0),
            ("states_ms", 12.0),
        ] {
            report.ours.add(name, value);
        }
        report
    }

    #[test]
    fn the_json_has_what_was_measured_and_nothing_else() {
        let expected = json!({
            "floor": { "cold_boot": 2000.0, "process_warm": 4.0, "fork_total": 50.0, "forks_per_s": 10.0 },
            "ours": { "cold_boot": 2400.0, "run_boot": 3100.0, "process_warm": 4.44, "churn_per_s": 8.0, "states_ms": 12.0 },
            "ratio": { "cold_boot": 1.2, "run_boot": 1.55, "process_warm": 1.111, "churn_per_s": 0.8 },
        });
        assert_eq!(report().json(), expected);
    }

    #[test]
    fn what_was_measured_by_the_way_is_not_shown() {
        let only = |names: &[&str]| {
            let names = names.iter().map(ToString::to_string).collect();
            Report { wanted: Wanted::new(names, true), ..report() }
        };
        let expected = json!({
            "floor": { "cold_boot": 2000.0 }, "ours": { "run_boot": 3100.0 }, "ratio": { "run_boot": 1.55 },
        });
        let run = only(&["run_boot"]);
        assert_eq!(run.json(), expected);
        let text = run.text();
        assert_eq!(text.lines().count(), 2, "{text}");
        assert!(text.lines().nth(1).unwrap().starts_with("run_boot  3100   2000"), "{text}");
        let bars: Vec<_> = run.bars().iter().map(|bar| bar.name).collect();
        assert_eq!((bars, run.over()), (vec!["run_boot"], vec!["run_boot"]));
        assert_eq!(only(&["process_warm"]).over(), [""; 0]);
        // A figure of the floor's alone is a row of its own.
        let text = only(&["fork_total"]).text();
        assert!(text.lines().count() == 2 && text.contains("fork_total"), "{text}");
        // A row may show the figure of another, which has its own name in JSON.
        let mut burst = only(&["burst_p99_turns"]);
        burst.floor.add("burst_turns_p99", 50.0);
        burst.ours.add("burst_p99", 75.0);
        burst.ours.add("burst_median", 70.0);
        let expected = json!({
            "floor": { "burst_turns_p99": 50.0 }, "ours": { "burst_p99": 75.0 }, "ratio": { "burst_p99_turns": 1.5 },
        });
        assert_eq!(burst.json(), expected);
        // One that is computed brings no others.
        let mut resume = only(&["acquire_suspended"]);
        for name in ["resume_disk", "fork_process"] {
            resume.floor.add(name, 60.0);
        }
        assert_eq!(resume.json()["floor"], json!({ "resume_answer": 70.0 }));
    }

    #[test]
    fn only_ratios_are_over() {
        let bars: Vec<_> = report().bars().iter().map(|bar| bar.name).collect();
        assert_eq!(bars, ["cold_boot", "run_boot", "process_warm", "churn_per_s"]);
        assert_eq!(report().over(), ["run_boot", "churn_per_s"]);
        assert!(Report::default().over().is_empty());
    }

    #[test]
    fn the_table_is_aligned() {
        let text = report().text();
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines.len(), 8, "{text}");
        let words = |line: usize| lines[line].split_whitespace().take(7).collect::<Vec<_>>().join(" ");
        assert!(words(0).starts_with("FIGURE OURS FLOOR RATIO TARGET WHAT"), "{text}");
        assert!(words(1).starts_with("cold_boot 2400 2000 1.20 ≤ 1.25× ok"), "{text}");
        assert!(words(2).starts_with("run_boot 3100 2000 1.55 ≤ 1.5× over"), "{text}");
        assert!(words(3).starts_with("process_warm 4.44 4.00 1.11 ≤ 1.3× ok"), "{text}");
        assert!(words(4).starts_with("churn_per_s 8.00 10.0 0.80 ≥ 0.85× over"), "{text}");
        assert!(words(5).starts_with("states_ms 12.0 ≤ 10 ms over"), "{text}");
        assert!(words(6).starts_with("fork_total 50.0 start"), "{text}");
        assert!(words(7).starts_with("forks_per_s 10.0"), "{text}");
        let column = |line: usize, text: &str| {
            lines[line].chars().count() - lines[line].split(text).last().unwrap().chars().count()
        };
        assert_eq!(column(1, "2400"), column(5, "12.0"), "{text}");
    }
}
