//! The state machine: which request is legal in which state, and where an operation may end.
//!
//! Two tables and nothing else. `plan` answers *requests* (spec 1.1), `settle` and `observe` answer *facts*
//! (spec 1.2). Everything here is pure: no I/O, no clock, no lock. No match has a `_` arm over states or actions, so a
//! new state does not compile until every table has said what it means there.

use std::fmt;
use std::io::{self, Write};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Where a virtual machine is in its life.
///
/// Settled states last until somebody asks for a change or the machine exits; transitional ones last as long as the
/// operation that published them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum State {
    /// Named, and nothing exists outside yet.
    Initial,
    /// A clone is being made.
    Cloning,
    /// Booting or resuming; commands cannot be executed yet.
    Starting,
    /// Up, and its agent answers.
    Running,
    /// Shutting down.
    Stopping,
    /// Off; its disk is there.
    Stopped,
    /// Its execution is being saved.
    Suspending,
    /// Off; its disk and its execution are there.
    Suspended,
    /// Its disk and everything else it owns are being removed.
    Deleting,
    /// Nothing of it is left.
    Deleted,
    /// What is there could not be verified, or cannot be used. Only Delete leads out.
    ErrorUnknown,
}

/// What can be asked of a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Action {
    /// Wait: legal in transitional states only.
    None,
    /// Make the machine from its source.
    Clone,
    /// Boot it, or resume it when it is suspended.
    Start,
    /// Shut it down.
    Stop,
    /// Save its execution to disk and switch it off.
    Suspend,
    /// Remove everything it owns.
    Delete,
}

/// What was really found when the backend was asked; never what it claimed on the way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Fact {
    /// Nothing of the machine is there.
    Absent,
    /// Complete and off, with no saved execution.
    Stopped,
    /// Its process is there and the guest was up at least once.
    Running,
    /// Off, with a complete saved execution.
    Suspended,
    /// Something is there and it cannot be used as it is.
    Broken,
}

/// A change under way: the state it publishes meanwhile, and every state it may end in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Edge {
    /// The state the request was made in.
    pub from: State,
    /// The request.
    pub action: Action,
    /// Published while it is under way.
    pub via: State,
    /// Where it ends when it succeeded.
    pub ok: State,
    /// Where it may end when it failed, once that is verified; anything else is `ErrorUnknown`.
    pub err: &'static [State],
}

/// What a request means in a state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Legal: carry out this edge.
    Run(Edge),
    /// Legal, and there is nothing to do: the state stays.
    Already,
    /// Illegal: nothing changes, and the backend is not called.
    Refuse,
}

impl State {
    /// Every state, in table order.
    pub const ALL: [State; 11] = [
        State::Initial,
        State::Cloning,
        State::Starting,
        State::Running,
        State::Stopping,
        State::Stopped,
        State::Suspending,
        State::Suspended,
        State::Deleting,
        State::Deleted,
        State::ErrorUnknown,
    ];

    /// The next state when `action` is requested in this one, or `None` when the pair is illegal.
    ///
    /// Exactly 16 of the 66 pairs are legal.
    pub const fn transition(self, action: Action) -> Option<State> {
        match plan(self, action) {
            Verdict::Run(edge) => Some(edge.via),
            Verdict::Already => Some(self),
            Verdict::Refuse => None,
        }
    }

    /// Whether `action` may be requested in this state.
    pub const fn allowed(self, action: Action) -> bool {
        self.transition(action).is_some()
    }

    /// The legal actions in this state, in table order.
    pub fn valid_actions(self) -> impl Iterator<Item = Action> {
        Action::ALL.into_iter().filter(move |&action| self.allowed(action))
    }

    /// Whether an operation is under way in this state.
    pub const fn is_transitional(self) -> bool {
        match self {
            State::Cloning | State::Starting | State::Stopping | State::Suspending | State::Deleting => true,
            State::Initial
            | State::Running
            | State::Stopped
            | State::Suspended
            | State::Deleted
            | State::ErrorUnknown => false,
        }
    }

    /// The name, as it is printed and parsed.
    pub const fn name(self) -> &'static str {
        match self {
            State::Initial => "Initial",
            State::Cloning => "Cloning",
            State::Starting => "Starting",
            State::Running => "Running",
            State::Stopping => "Stopping",
            State::Stopped => "Stopped",
            State::Suspending => "Suspending",
            State::Suspended => "Suspended",
            State::Deleting => "Deleting",
            State::Deleted => "Deleted",
            State::ErrorUnknown => "ErrorUnknown",
        }
    }
}

impl Action {
    /// Every action, in table order.
    pub const ALL: [Action; 6] =
        [Action::None, Action::Clone, Action::Start, Action::Stop, Action::Suspend, Action::Delete];

    /// The name, as it is printed.
    pub const fn name(self) -> &'static str {
        match self {
            Action::None => "None",
            Action::Clone => "Clone",
            Action::Start => "Start",
            Action::Stop => "Stop",
            Action::Suspend => "Suspend",
            Action::Delete => "Delete",
        }
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// A word that names no state.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "unknown state {0:?}; valid states are Initial, Cloning, Starting, Running, Stopping, Stopped, Suspending, Suspended, Deleting, Deleted, ErrorUnknown"
)]
pub struct UnknownState(pub String);

impl FromStr for State {
    type Err = UnknownState;

    /// Parses a state's name without regard to case.
    fn from_str(word: &str) -> Result<State, UnknownState> {
        State::ALL
            .into_iter()
            .find(|state| state.name().eq_ignore_ascii_case(word))
            .ok_or_else(|| UnknownState(word.to_owned()))
    }
}

/// What `action`, requested in `from`, means. Pure and total.
pub const fn plan(from: State, action: Action) -> Verdict {
    const fn run(from: State, action: Action, via: State, ok: State, err: &'static [State]) -> Verdict {
        Verdict::Run(Edge { from, action, via, ok, err })
    }
    use {Action as A, State as S};
    match (from, action) {
        (S::Initial | S::Deleted, A::Clone) => run(from, action, S::Cloning, S::Stopped, &[S::Initial]),
        (S::Stopped, A::Start) => run(from, action, S::Starting, S::Running, &[S::Stopped]),
        // The saved execution is spent once the guest has gone on from it: then only its disk is left.
        (S::Suspended, A::Start) => run(from, action, S::Starting, S::Running, &[S::Suspended, S::Stopped]),
        // Never back to Running: a machine that was told to stop may be half way down.
        (S::Running, A::Stop) => run(from, action, S::Stopping, S::Stopped, &[S::Stopped]),
        (S::Running, A::Suspend) => {
            run(from, action, S::Suspending, S::Suspended, &[S::Suspended, S::Running, S::Stopped])
        }
        (S::Stopped | S::Suspended | S::ErrorUnknown, A::Delete) => {
            run(from, action, S::Deleting, S::Deleted, &[S::Deleted])
        }

        (S::Stopped, A::Stop) | (S::Suspended, A::Suspend) => Verdict::Already,
        (S::Cloning | S::Starting | S::Stopping | S::Suspending | S::Deleting, A::None) => Verdict::Already,

        (S::Initial, A::None | A::Start | A::Stop | A::Suspend | A::Delete)
        | (
            S::Cloning | S::Starting | S::Stopping | S::Suspending | S::Deleting,
            A::Clone | A::Start | A::Stop | A::Suspend | A::Delete,
        )
        | (S::Running, A::None | A::Clone | A::Start | A::Delete)
        | (S::Stopped, A::None | A::Clone | A::Suspend)
        | (S::Suspended, A::None | A::Clone | A::Stop)
        | (S::Deleted, A::None | A::Start | A::Stop | A::Suspend | A::Delete)
        | (S::ErrorUnknown, A::None | A::Clone | A::Start | A::Stop | A::Suspend) => Verdict::Refuse,
    }
}

/// Where an edge really ended, from what was seen afterwards; `None` when nothing could be seen.
pub fn settle(edge: &Edge, seen: Option<Fact>) -> State {
    let state = match seen {
        Some(Fact::Absent) if edge.action == Action::Clone => State::Initial,
        Some(Fact::Absent) => State::Deleted,
        Some(Fact::Stopped) => State::Stopped,
        Some(Fact::Running) => State::Running,
        Some(Fact::Suspended) => State::Suspended,
        Some(Fact::Broken) | None => State::ErrorUnknown,
    };
    if state == edge.ok || edge.err.contains(&state) { state } else { State::ErrorUnknown }
}

/// The state after a machine that nobody asked to change is found otherwise; `None` when nothing changed.
///
/// Only a Running machine changes by itself: it exits.
pub fn observe(from: State, seen: Option<Fact>) -> Option<State> {
    match from {
        State::Running => match seen {
            Some(Fact::Running) => None,
            Some(Fact::Stopped) => Some(State::Stopped),
            Some(Fact::Absent | Fact::Suspended | Fact::Broken) | None => Some(State::ErrorUnknown),
        },
        State::Initial
        | State::Cloning
        | State::Starting
        | State::Stopping
        | State::Stopped
        | State::Suspending
        | State::Suspended
        | State::Deleting
        | State::Deleted
        | State::ErrorUnknown => None,
    }
}

/// The state of a machine that was found, not made: after a restart, or when another process has changed it.
pub const fn found(fact: Fact) -> State {
    match fact {
        Fact::Absent => State::Deleted,
        Fact::Stopped => State::Stopped,
        Fact::Running => State::Running,
        Fact::Suspended => State::Suspended,
        Fact::Broken => State::ErrorUnknown,
    }
}

/// The states that somebody else led a machine through, from what we knew to what is there now.
///
/// Another process may operate on the same machine. Its changes are published as the legal steps that lead there, so
/// that a subscriber sees no edge that is in neither table. Empty when nothing changed.
pub fn retrace(from: State, to: State) -> Vec<State> {
    // Breadth first over the legal edges: at most six settled states, so the first path found is a shortest one.
    let mut paths = vec![vec![from]];
    let mut seen = vec![from];
    if from == to {
        return Vec::new();
    }
    while !paths.is_empty() {
        let mut longer = Vec::new();
        for path in paths {
            let last = path[path.len() - 1];
            for step in steps(last) {
                if step[step.len() - 1] == to {
                    return path.iter().chain(&step).skip(1).copied().collect();
                }
                let end = step[step.len() - 1];
                if !seen.contains(&end) {
                    seen.push(end);
                    longer.push(path.iter().chain(&step).copied().collect());
                }
            }
        }
        paths = longer;
    }
    // Only a state that nothing leads to is left: Initial, which nobody leads a machine back to.
    vec![State::ErrorUnknown]
}

fn steps(from: State) -> Vec<Vec<State>> {
    let mut steps = Vec::new();
    if from.is_transitional() {
        // Found in the middle of somebody's operation: whatever it settled to is legal for one of its edges.
        for start in State::ALL {
            for action in Action::ALL {
                if let Verdict::Run(edge) = plan(start, action)
                    && edge.via == from
                {
                    steps.push(vec![edge.ok]);
                    steps.extend(edge.err.iter().map(|&end| vec![end]));
                }
            }
        }
        steps.push(vec![State::ErrorUnknown]);
        return steps;
    }
    if from == State::Running {
        steps.push(vec![State::Stopped]);
    }
    let mut failures = Vec::new();
    if from == State::Running {
        failures.push(vec![State::ErrorUnknown]);
    }
    for action in Action::ALL {
        if let Verdict::Run(edge) = plan(from, action) {
            steps.push(vec![edge.via, edge.ok]);
            failures.push(vec![edge.via, State::ErrorUnknown]);
        }
    }
    // Last: what went well is the likelier history.
    steps.extend(failures);
    steps
}

/// Writes the request table, one line a state: the name padded to 14 columns, two spaces, the legal actions.
///
/// # Errors
/// What `out` returns.
pub fn print_states(out: &mut impl Write) -> io::Result<()> {
    for state in State::ALL {
        let entries: Vec<String> = state
            .valid_actions()
            .filter_map(|action| state.transition(action).map(|next| (action, next)))
            .map(|(action, next)| match action {
                Action::None => format!("(waiting) -> {next}"),
                Action::Clone | Action::Start | Action::Stop | Action::Suspend | Action::Delete => {
                    format!("{action} -> {next}")
                }
            })
            .collect();
        writeln!(out, "{:<14}  {}", state, entries.join(",  "))?;
    }
    Ok(())
}
