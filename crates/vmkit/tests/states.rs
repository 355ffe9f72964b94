//! The two tables, written out as data and compared with the code; and their renderings.
#![cfg(all(feature = "sim", feature = "conformance"))]

mod common;

use common::table::{LEGAL, SEEN, SETTLES, is_an_edge};
use vmkit::{
    Action, Fact, State, Verdict, found, observe, plan, print_states, retrace, settle, states_dot, states_markdown,
    states_rows,
};

#[test]
fn exactly_sixteen_of_the_66_pairs_are_legal() {
    for from in State::ALL {
        let mut legal = Vec::new();
        for action in Action::ALL {
            let expected = LEGAL.iter().find(|row| (row.0, row.1) == (from, action)).map(|row| row.2);
            assert_eq!(from.transition(action), expected, "{action} while {from}");
            assert_eq!(from.allowed(action), expected.is_some(), "{action} while {from}");
            legal.extend(expected.map(|_| action));
        }
        assert_eq!(from.valid_actions().collect::<Vec<_>>(), legal, "while {from}");
    }
}

#[test]
fn every_operation_settles_by_what_is_seen() {
    let mut edges = 0;
    for from in State::ALL {
        for action in Action::ALL {
            let Verdict::Run(edge) = plan(from, action) else { continue };
            edges += 1;
            let row = SETTLES.iter().find(|row| (row.0, row.1) == (from, action));
            let Some((_, _, ends)) = row else { panic!("{action} from {from} is not in the table") };
            for (seen, end) in SEEN.into_iter().zip(ends) {
                assert_eq!(settle(&edge, seen), *end, "{action} from {from}, seen {seen:?}");
            }
            assert_eq!((edge.from, edge.action), (from, action));
            assert!(edge.via.is_transitional() && !edge.ok.is_transitional());
        }
    }
    assert_eq!(edges, SETTLES.len());
}

#[test]
fn only_a_running_machine_changes_by_itself() {
    let ends = [
        Some(State::ErrorUnknown),
        Some(State::Stopped),
        None,
        Some(State::ErrorUnknown),
        Some(State::ErrorUnknown),
        Some(State::ErrorUnknown),
    ];
    for from in State::ALL {
        for (seen, end) in SEEN.into_iter().zip(ends) {
            let expected = if from == State::Running { end } else { None };
            assert_eq!(observe(from, seen), expected, "{from}, seen {seen:?}");
        }
    }
}

#[test]
fn transitional_states_are_the_five() {
    let five = [State::Cloning, State::Starting, State::Stopping, State::Suspending, State::Deleting];
    for state in State::ALL {
        assert_eq!(state.is_transitional(), five.contains(&state), "{state}");
    }
}

#[test]
fn what_others_did_is_retraced_by_legal_steps() {
    let facts = [Fact::Absent, Fact::Stopped, Fact::Running, Fact::Suspended, Fact::Broken];
    for from in State::ALL {
        for fact in facts {
            let to = found(fact);
            let steps = retrace(from, to);
            if from == to {
                assert!(steps.is_empty(), "{from} to itself: {steps:?}");
                continue;
            }
            assert_eq!(steps.last(), Some(&to), "{from} to {to}: {steps:?}");
            let mut last = from;
            for next in steps {
                assert!(is_an_edge(last, next), "{from} to {to} by {last} to {next}");
                last = next;
            }
        }
    }
}

#[test]
fn names_parse_without_regard_to_case() {
    for state in State::ALL {
        assert_eq!(state.name().to_lowercase().parse(), Ok(state));
        assert_eq!(state.name().to_uppercase().parse(), Ok(state));
        let json = serde_json::to_string(&state).unwrap();
        assert_eq!(json, format!("\"{state}\""));
    }
    let error = "Runing".parse::<State>().unwrap_err().to_string();
    assert!(State::ALL.iter().all(|state| error.contains(state.name())), "{error}");
}

#[test]
fn the_text_is_the_golden_file() {
    let mut text = Vec::new();
    print_states(&mut text).unwrap();
    golden("states.txt", &String::from_utf8(text).unwrap());
}

#[test]
fn the_markdown_is_the_golden_file() {
    golden("../../docs/states.md", &states_markdown());
}

#[test]
fn rows_and_graph_have_every_legal_pair() {
    let rows: Vec<_> = states_rows().iter().map(|row| (row.from, row.action, row.next)).collect();
    assert_eq!(rows, LEGAL);
    let json = serde_json::to_value(states_rows()).unwrap();
    assert_eq!(json[0]["from"], "Initial");
    assert_eq!(json[0]["success"], "Stopped");
    let dot = states_dot();
    for (from, action, next) in LEGAL.iter().filter(|row| row.1 != Action::None) {
        assert!(dot.contains(&format!("{from} -> {next} [label=\"{action}\"]")), "{from} {action} in {dot}");
    }
}

fn golden(path: &str, text: &str) {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join(path);
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        std::fs::write(&path, text).unwrap();
    }
    let kept = std::fs::read_to_string(&path).unwrap_or_default();
    assert_eq!(kept, text, "{} is out of date: UPDATE_GOLDEN=1 rewrites it", path.display());
}
