//! Which figures there are, what each is held against, and what is to be reached.

/// One of vmkit's own figures.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Figure {
    /// Its name, also in JSON.
    pub name: &'static str,
    /// The floor's figure that it is held against.
    pub floor: Option<&'static str>,
    /// What is to be reached.
    pub target: Option<Target>,
    /// What is measured.
    pub what: &'static str,
}

/// What a figure has to stay under.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Target {
    /// This many times the floor's figure.
    Ratio(f64),
    /// At least this many times the floor's figure.
    AtLeast(f64),
    /// This many milliseconds. A wish and no more: absolute times belong to the machine they were measured on.
    Milliseconds(f64),
}

const fn figure(name: &'static str, floor: Option<&'static str>, target: Option<Target>, what: &'static str) -> Figure {
    Figure { name, floor, target, what }
}

/// vmkit's own figures, in the order in which they are shown.
pub const OURS: &[Figure] = &[
    figure("fork_process", Some("fork_process"), Some(Target::Ratio(1.25)), "a fresh machine, to a process's answer"),
    figure(
        "run_process",
        Some("fork_process"),
        Some(Target::Ratio(1.6)),
        "`vmkit run -- true`, to its exit; all deleted",
    ),
    figure("cold_boot", Some("cold_boot"), Some(Target::Ratio(1.25)), "without a template, to a process's answer"),
    figure("run_boot", Some("cold_boot"), Some(Target::Ratio(1.5)), "`vmkit --no-template run -- true`, to its exit"),
    figure("process_warm", Some("process_warm"), Some(Target::Ratio(1.3)), "a process's answer on a warm machine"),
    figure("exec_warm", Some("exec_warm"), None, "the agent's own answer on a warm machine"),
    figure("out_mib_s", Some("out_mib_s"), None, "MiB a second out of a process (more is better)"),
    figure("in_mib_s", None, None, "MiB a second into a process (more is better)"),
    figure("suspend", Some("suspend"), Some(Target::Ratio(3.0)), "to disk, and the process gone"),
    figure("suspend_fsync", Some("suspend"), None, "the same, written through to the disk"),
    figure(
        "resume",
        Some("resume_disk"),
        Some(Target::Ratio(1.4)),
        "start of a suspended machine, to the agent's answer",
    ),
    figure("resume_process", Some("resume_process"), None, "the same, to a process's answer"),
    figure(
        "acquire_running",
        Some("process_warm"),
        Some(Target::Ratio(1.3)),
        "from a running, warm pool that is full again, to a process's answer",
    ),
    figure(
        "acquire_running_rested",
        Some("process_rested"),
        None,
        "the same after a rest of 250 ms, by a bare machine after one",
    ),
    figure(
        "acquire_suspended",
        Some("resume_answer"),
        Some(Target::Ratio(1.5)),
        "from a suspended pool, to a process's answer",
    ),
    figure(
        "acquire_suspended_prespawned",
        Some("resume_answer"),
        None,
        "the same, with a process that waits for each machine",
    ),
    figure("acquire_stopped", Some("fork_process"), None, "from a stopped pool, to a process's answer"),
    figure(
        "acquire_stopped_prespawned",
        Some("fork_process"),
        None,
        "the same, with a process that waits for each machine",
    ),
    figure("waiting_mib", Some("paused_unique_mib"), None, "MiB that a process that waits has for itself"),
    figure(
        "churn_per_s",
        Some("forks_per_s"),
        Some(Target::AtLeast(0.85)),
        "acquired, a process's answer, deleted, replaced; a second, two at a time",
    ),
    figure(
        "unique_mib",
        Some("paused_unique_mib"),
        Some(Target::Ratio(1.25)),
        "MiB that a ready machine has for itself",
    ),
    figure(
        "burst_median",
        Some("process_warm"),
        Some(Target::Ratio(35.0)),
        "100 acquires at once from 100 running, warm machines, to a process's answer",
    ),
    figure("burst_p99", Some("process_warm"), Some(Target::Ratio(70.0)), "the same, the slowest but one"),
    figure("burst_median_bare", Some("burst_median"), None, "burst_median by 100 bare machines, all asked at once"),
    figure("burst_p99_bare", Some("burst_p99"), None, "burst_p99 by the same"),
    figure("burst_median_turns", Some("burst_turns_median"), None, "burst_median by 100 bare machines, in turns"),
    figure("burst_p99_turns", Some("burst_turns_p99"), None, "burst_p99 by the same"),
    figure("burst_success", None, None, "the same, how many succeeded, percent"),
    figure("clone", None, None, "create and clone"),
    figure("delete", None, None, "forced stop and delete"),
    figure("states_ms", None, Some(Target::Milliseconds(10.0)), "`vmkit states`, to its exit"),
];

/// The floor's figures, in the order in which they are shown, and what is measured.
pub const FLOOR: &[(&str, &str)] = &[
    ("qmp_ready", "start of QEMU, to a control session"),
    ("cold_boot", "start of QEMU, to the guest's shell"),
    ("template_save", "devices' state of that guest, to a file"),
    ("fork_total", "start of QEMU on it, memory copy on write, to a builtin's answer"),
    ("fork_process", "the same, to a process's answer"),
    ("fork_load", "of that, loading the devices' state"),
    ("resume_paused", "going on after a pause, to a builtin's answer"),
    ("suspend", "devices' state to a file, memory in a file of its own"),
    ("resume_disk", "start of QEMU on those files, to a builtin's answer"),
    ("resume_process", "the same, to a process's answer"),
    ("resume_answer", "resume_disk - fork_total + fork_process"),
    ("exec_warm", "a builtin's answer on a warm machine"),
    ("process_warm", "a process's answer on a warm machine"),
    ("process_rested", "a process's answer on a warm machine, after a rest of 250 ms"),
    ("process_beside", "the same without a rest, beside a full running pool"),
    ("forks_per_s", "throw-away machines a second, two at a time"),
    ("paused_unique_mib", "MiB that a forked and paused machine has for itself"),
    ("burst_median", "100 running, warm machines, all asked for a process at once"),
    ("burst_p99", "the same, the slowest but one"),
    ("burst_turns_median", "the same, in turns on all processors, the others paused: the least that is needed"),
    ("burst_turns_p99", "the same, the slowest but one"),
    ("out_mib_s", "MiB a second out of the guest"),
];

/// Every name there is.
pub fn names() -> Vec<&'static str> {
    let mut names: Vec<_> = OURS.iter().map(|figure| figure.name).collect();
    names.extend(FLOOR.iter().map(|(name, _)| name).filter(|name| ours(name).is_none()));
    names
}

/// vmkit's own figure of this name.
pub fn ours(name: &str) -> Option<&'static Figure> {
    OURS.iter().find(|figure| figure.name == name)
}

/// The figure of ours that a row shows: itself, unless it holds another one against something else of the floor's.
pub fn shown(name: &'static str) -> &'static str {
    match name {
        "burst_median_bare" | "burst_median_turns" => "burst_median",
        "burst_p99_bare" | "burst_p99_turns" => "burst_p99",
        itself => itself,
    }
}

/// What a figure of the floor is computed from: itself, unless nothing measures it alone.
pub fn parts(floor: &'static str) -> &'static [&'static str] {
    match FLOOR.iter().position(|(name, _)| *name == floor) {
        Some(_) if floor == "resume_answer" => &["resume_disk", "fork_total", "fork_process"],
        Some(at) => std::slice::from_ref(&FLOOR[at].0),
        None => &[],
    }
}

/// Which figures are wanted: all, or some and what they are held against.
#[derive(Clone, Debug, Default)]
pub struct Wanted {
    only: Vec<String>,
    ours: bool,
}

impl Wanted {
    /// All figures when `only` is empty; of vmkit's own none without `ours`.
    pub fn new(only: Vec<String>, ours: bool) -> Wanted {
        Wanted { only, ours }
    }

    /// Whether one of these figures of vmkit's own is wanted.
    pub fn ours(&self, names: &[&str]) -> bool {
        let shows = |name: &str| OURS.iter().any(|row| shown(row.name) == name && self.names(row.name));
        self.ours && (self.only.is_empty() || names.iter().any(|name| shows(name)))
    }

    /// Whether one of these figures of the floor is wanted.
    pub fn floor(&self, names: &[&str]) -> bool {
        let beside = |name: &str| {
            let held = |figure: &&Figure| figure.floor.is_some_and(|floor| parts(floor).contains(&name));
            self.ours && OURS.iter().filter(held).any(|figure| self.names(figure.name))
        };
        self.only.is_empty() || names.iter().any(|name| self.names(name) || beside(name))
    }

    /// Whether a figure of this name was asked for. More is measured by the way.
    pub fn asks(&self, name: &str) -> bool {
        self.only.is_empty() || self.names(name)
    }

    /// Whether a figure of the floor's was asked for, or one of ours that is held against it.
    pub fn asks_floor(&self, name: &str) -> bool {
        let held = |figure: &Figure| figure.floor == Some(name) && self.names(figure.name);
        self.asks(name) || (self.ours && OURS.iter().any(held))
    }

    fn names(&self, name: &str) -> bool {
        self.only.iter().any(|only| only == name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_figure_is_held_against_one_that_exists() {
        for figure in OURS {
            if let Some(floor) = figure.floor {
                assert!(FLOOR.iter().any(|(name, _)| *name == floor), "{floor}");
            }
            let against_nothing =
                matches!(figure.target, Some(Target::Ratio(_) | Target::AtLeast(_))) && figure.floor.is_none();
            assert!(!against_nothing, "{figure:?}");
            assert!(ours(shown(figure.name)).is_some_and(|row| shown(row.name) == row.name), "{figure:?}");
        }
        let mut names = names();
        let all = names.len();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), all);
    }

    #[test]
    fn what_others_read_by_name_is_there() {
        for name in [
            "cold_boot",
            "fork_process",
            "run_process",
            "suspend",
            "suspend_fsync",
            "resume",
            "acquire_running",
            "churn_per_s",
            "unique_mib",
            "burst_median",
            "burst_p99",
            "burst_success",
            "process_warm",
            "out_mib_s",
            "in_mib_s",
        ] {
            assert!(ours(name).is_some_and(|figure| shown(figure.name) == name), "{name}");
        }
        for name in [
            "qmp_ready",
            "cold_boot",
            "template_save",
            "fork_total",
            "fork_load",
            "resume_paused",
            "suspend",
            "resume_disk",
            "fork_process",
            "process_warm",
            "forks_per_s",
            "paused_unique_mib",
            "exec_warm",
            "out_mib_s",
        ] {
            assert_eq!(parts(name), [name]);
        }
    }

    #[test]
    fn what_is_wanted_brings_what_it_is_held_against() {
        let wanted = Wanted::new(vec!["run_process".into()], true);
        assert!(wanted.ours(&["states_ms", "run_process"]) && !wanted.ours(&["cold_boot"]));
        assert!(wanted.floor(&["resume_paused", "fork_process"]) && !wanted.floor(&["suspend"]));
        let burst = Wanted::new(vec!["burst_p99_turns".into()], true);
        assert!(burst.ours(&["burst_p99"]) && burst.floor(&["burst_turns_p99"]) && !burst.floor(&["process_warm"]));
        let all = Wanted::new(Vec::new(), true);
        assert!(all.ours(&["clone"]) && all.floor(&["forks_per_s"]));
        let floor = Wanted::new(Vec::new(), false);
        assert!(!floor.ours(&["cold_boot"]) && floor.floor(&["cold_boot"]));
    }
}
