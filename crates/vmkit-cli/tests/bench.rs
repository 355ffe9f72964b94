//! `vmkit bench pool`: what it prints and draws, what it refuses, and that nothing of it is left.

mod common;

use std::fs;
use std::path::Path;
use std::process::Stdio;

use common::{State, eventually, signalled, text};
use serde_json::Value;

const PATTERNS: [&str; 3] = ["sequential", "staggered", "burst"];

fn sim(more: &[&'static str]) -> Vec<&'static str> {
    [&["bench", "pool", "--backend", "sim"][..], more].concat()
}

/// The report has exactly these patterns, each with exactly its figures, and they are possible ones.
fn is_report(text: &str, patterns: &[&str]) {
    let report: Value = serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"));
    let keys = |value: &Value| value.as_object().unwrap().keys().cloned().collect::<Vec<_>>();
    let mut expected = patterns.to_vec();
    expected.sort_unstable();
    assert_eq!(keys(&report), expected);
    for pattern in patterns {
        let figures = &report[pattern];
        assert_eq!(keys(figures), ["median_ms", "p95_ms", "p99_ms", "success"], "{pattern}");
        let [median, p95, p99] = ["median_ms", "p95_ms", "p99_ms"].map(|key| figures[key].as_f64().unwrap());
        assert!(0.0 < median && median <= p95 && p95 <= p99, "{pattern}: {figures}");
        assert_eq!(figures["success"], 1.0, "{pattern}");
    }
}

#[test]
fn json_has_three_patterns_with_four_figures_each_and_nothing_beside_it() {
    let state = State::empty();
    for staging in ["running", "suspended", "stopped"] {
        let output = state.vmkit(&sim(&["--size", "3", "--requests", "10", "--json", "--staging", staging]));
        assert!(output.status.success(), "{}", text(&output.stderr));
        is_report(&text(&output.stdout), &PATTERNS);
        assert_eq!(text(&output.stderr), "", "with --json nothing is said beside the result");
    }
    is_report(&state.ok(&sim(&["--only", "burst", "--json"])), &["burst"]);
    is_report(&state.ok(&sim(&["--only", "staggered", "--json"])), &["sequential", "staggered"]);
    assert!(fs::read_dir(state.path()).unwrap().next().is_none(), "simulated machines need no files");
}

#[test]
fn the_table_has_a_row_for_each_pattern_and_for_each_request() {
    let state = State::empty();
    let output = state.vmkit(&sim(&["--size", "2", "--requests", "5", "--each"]));
    assert!(output.status.success(), "{}", text(&output.stderr));
    let table = text(&output.stdout);
    let rows = |pattern: &str| table.lines().filter(|line| line.starts_with(pattern)).collect::<Vec<_>>();
    for pattern in PATTERNS {
        let rows = rows(pattern);
        assert_eq!(rows.len(), 6, "five requests and a summary of {pattern}:\n{table}");
        assert!(rows[5].ends_with("100%"), "{table}");
        for (at, row) in rows[..5].iter().enumerate() {
            let words: Vec<&str> = row.split_whitespace().collect();
            assert_eq!(words[1], (at + 1).to_string(), "{table}");
            assert!(words[2].starts_with("bench-"), "{table}");
        }
    }
    // No machine was given to two requests.
    let mut machines: Vec<&str> = table.split_whitespace().filter(|word| word.starts_with("bench-")).collect();
    machines.sort_unstable();
    machines.dedup();
    assert_eq!(machines.len(), 15, "{table}");
    let said = text(&output.stderr);
    assert!(said.contains("half of the sequential median") && said.contains("filled: 2 machines"), "{said}");
    assert_eq!(text(&state.vmkit(&sim(&["--quiet"])).stderr), "");
}

#[test]
fn the_plot_is_a_drawing_with_all_three_patterns() {
    let state = State::empty();
    let file = state.path().join("pool.svg");
    fs::write(&file, "x".repeat(1 << 20)).unwrap();
    let output = state.command(&sim(&["--size", "2", "--requests", "9", "--svg"])).arg(&file).output().unwrap();
    assert!(output.status.success(), "{}", text(&output.stderr));
    let drawing = fs::read_to_string(&file).unwrap();
    let words = well_formed(&drawing);
    for word in PATTERNS.iter().chain(&["Pool of 2 running machines", "log scale", "requests answered", "100%"]) {
        assert!(words.iter().any(|said| said.contains(word)), "no {word} in {words:?}");
    }
    // Opaque, over all of it, before anything else.
    let (background, _) = drawing.split_once("<text").unwrap();
    assert!(background.contains(r##"opacity="1" fill="#FFFFFF""##), "{background}");
    for colour in ["#0072B2", "#D55E00", "#008762"] {
        let lines = drawing.lines().filter(|line| line.starts_with("<polyline") && line.contains(colour)).count();
        assert_eq!(lines, 2, "a curve of {colour}, and its mark in the legend");
    }
}

/// Checks that it is well-formed XML of one svg element, as far as drawings go, and returns its texts.
fn well_formed(drawing: &str) -> Vec<String> {
    let (mut open, mut texts) = (Vec::new(), Vec::new());
    let mut rest = drawing.trim();
    while let Some(at) = rest.find('<') {
        let said = rest[..at].trim();
        assert!(!said.contains('>') && !said.replace("&apos;", "").contains('&'), "{said:?}");
        if !said.is_empty() {
            assert_eq!(open.last(), Some(&"text"), "text outside of one: {said:?}");
            texts.push(said.to_owned());
        }
        let end = at + rest[at..].find('>').expect("a tag ends");
        let tag = &rest[at + 1..end];
        let name = tag.split([' ', '\n', '/']).find(|word| !word.is_empty()).unwrap();
        assert_eq!(tag.matches('"').count() % 2, 0, "{tag}");
        match tag.starts_with('/') {
            true => assert_eq!(open.pop(), Some(name), "{tag}"),
            false if tag.ends_with('/') => assert!(!open.is_empty(), "{tag} outside of the drawing"),
            false => {
                assert!(!open.is_empty() || (name == "svg" && texts.is_empty()), "{tag} is not in the drawing");
                open.push(name);
            }
        }
        rest = &rest[end + 1..];
    }
    assert!(open.is_empty() && rest.is_empty(), "{open:?} {rest:?}");
    texts
}

#[test]
fn bad_arguments_are_refused_before_any_work() {
    let state = State::empty();
    for args in [
        &["--size", "0"][..],
        &["--size", "-1"],
        &["--size", "many"],
        &["--requests", "0"],
        &["--staging", "lukewarm"],
        &["--backend", "paper"],
        &["--only", "none"],
        &["--name", "a/b"],
        &["--name", "a-name-that-is-longer-than-forty-characters"],
        &["--memory", "512"],
    ] {
        // Of real machines: nothing of them is begun.
        let error = state.fails(2, &[&["bench", "pool"][..], args].concat());
        assert_eq!(error["code"], "invalid-argument", "{args:?}");
    }
    let staging = text(&state.vmkit(&sim(&["--staging", "lukewarm"])).stderr);
    assert!(["running", "suspended", "stopped"].iter().all(|word| staging.contains(word)), "{staging}");
    let nowhere = state.path().join("no/such/pool.svg");
    let directory = state.path().to_path_buf();
    for path in [nowhere, directory] {
        let path = path.to_str().unwrap();
        let error = state.fails(1, &["bench", "pool", "--svg", path]);
        assert_eq!(error["code"], "io", "{error}");
        assert!(error["message"].as_str().unwrap().contains(path), "{error}");
    }
    assert!(fs::read_dir(state.path()).unwrap().next().is_none(), "arguments were refused, and something was made");
}

#[test]
fn what_cannot_be_made_is_said_at_once_and_leaves_no_drawing() {
    let state = State::empty();
    let file = state.path().join("pool.svg");
    let args = sim(&["--image", "missing", "--svg"]);
    let output = state.command(&args).arg(&file).output().unwrap();
    assert_eq!(output.status.code(), Some(3), "{}", text(&output.stderr));
    assert!(text(&output.stderr).contains("there is no image missing"), "{}", text(&output.stderr));
    assert_eq!(text(&output.stdout), "");
    assert!(!file.exists());
}

/// Nothing is left of a real bench but what stays between them: images, and the lock of the pool's name.
fn is_over(state: &State) {
    let list: Value = serde_json::from_str(&state.ok(&["ls", "--json"])).unwrap();
    assert_eq!(list, serde_json::json!([]));
    state.is_clean();
}

const SMALL: [&str; 6] = ["bench", "pool", "--size", "2", "--requests", "4"];

#[test]
fn real_machines_are_measured_and_gone() {
    let Some(state) = State::new() else { return };
    for staging in ["running", "suspended"] {
        let args = [&SMALL[..], &["--json", "--staging", staging]].concat();
        is_report(&state.ok(&args), &PATTERNS);
        is_over(&state);
    }
    let too_small = state.fails(2, &[&SMALL[..], &["--memory", "16M"]].concat());
    assert_eq!(too_small["code"], "invalid-argument", "{too_small}");
    is_over(&state);
}

#[test]
fn a_signal_closes_the_pool() {
    let Some(state) = State::new() else { return };
    let file = state.path().join("pool.svg");
    for (signal, code, machines) in [("-INT", 130, 0), ("-TERM", 143, 1), ("-HUP", 129, 2)] {
        let mut bench = state.command(&SMALL);
        let mut bench = bench.arg("--svg").arg(&file).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        // In the midst of it: before there is a machine, and when there are some.
        eventually(|| file.exists() && state.pids().len() >= machines);
        signalled(bench.id(), signal);
        assert_eq!(bench.wait().unwrap().code(), Some(code), "{signal}");
        assert!(!file.exists(), "an empty drawing is left");
        is_over(&state);
    }
}

/// A bench that is killed when its pool is full, and leaves machines.
fn killed(state: &State) {
    let mut bench = state.command(&SMALL).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    eventually(|| state.machines().iter().filter(|(_, word)| word == "Running").count() == 2);
    bench.kill().unwrap();
    assert_eq!(bench.wait().unwrap().code(), None, "it was over before it was killed");
    // The other commands' sweep is for `run`'s machines: these are the pool's, and looked at, not touched.
    let left = state.machines();
    assert!(!left.is_empty() && left.iter().all(|(name, _)| name.starts_with("bench-")), "{left:?}");
}

#[test]
fn what_a_killed_bench_left_is_deleted_by_the_next_and_by_a_cleanup() {
    let Some(state) = State::new() else { return };
    killed(&state);
    let left = state.machines();
    // Another name's pool leaves them alone.
    let other = [&SMALL[..], &["--name", "other", "--only", "burst", "--json"]].concat();
    is_report(&state.ok(&other), &["burst"]);
    assert_eq!(state.machines(), left);
    is_report(&state.ok(&[&SMALL[..], &["--only", "burst", "--json"]].concat()), &["burst"]);
    is_over(&state);
    killed(&state);
    state.ok(&["cleanup", "--all", "--grace", "0"]);
    is_over(&state);
}

#[test]
fn one_bench_at_a_time_has_the_name() {
    let Some(state) = State::new() else { return };
    let mut first = state.command(&["bench", "pool", "--size", "2", "--requests", "1000"]);
    let mut first = first.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    eventually(|| !state.pids().is_empty());
    let error = state.fails(1, &SMALL);
    assert_eq!(error["code"], "busy", "{error}");
    assert!(error["message"].as_str().unwrap().contains(&first.id().to_string()), "{error}");
    assert!(Path::new(&format!("/proc/{}", first.id())).exists(), "the first goes on");
    signalled(first.id(), "-INT");
    assert_eq!(first.wait().unwrap().code(), Some(130));
    is_over(&state);
}

#[test]
fn what_was_measured_is_not_lost_to_a_full_disk() {
    let state = State::empty();
    let output = state.vmkit(&sim(&["--requests", "4", "--svg", "/dev/full"]));
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert!(text(&output.stdout).contains("burst"), "{output:?}");
    assert!(text(&output.stderr).contains("/dev/full"), "{output:?}");
}
