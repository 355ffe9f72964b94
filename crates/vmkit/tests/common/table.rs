//! The tables of the lifecycle as data, written by hand: nothing here asks the code that is under test.

use vmkit::{Action, Fact, State};

/// The legal requests; every pair that is not here is illegal.
pub const LEGAL: [(State, Action, State); 16] = [
    (State::Initial, Action::Clone, State::Cloning),
    (State::Cloning, Action::None, State::Cloning),
    (State::Starting, Action::None, State::Starting),
    (State::Running, Action::Stop, State::Stopping),
    (State::Running, Action::Suspend, State::Suspending),
    (State::Stopping, Action::None, State::Stopping),
    (State::Stopped, Action::Start, State::Starting),
    (State::Stopped, Action::Stop, State::Stopped),
    (State::Stopped, Action::Delete, State::Deleting),
    (State::Suspending, Action::None, State::Suspending),
    (State::Suspended, Action::Start, State::Starting),
    (State::Suspended, Action::Suspend, State::Suspended),
    (State::Suspended, Action::Delete, State::Deleting),
    (State::Deleting, Action::None, State::Deleting),
    (State::Deleted, Action::Clone, State::Cloning),
    (State::ErrorUnknown, Action::Delete, State::Deleting),
];

/// What can be seen after an operation, in the order of the columns below.
pub const SEEN: [Option<Fact>; 6] =
    [Some(Fact::Absent), Some(Fact::Stopped), Some(Fact::Running), Some(Fact::Suspended), Some(Fact::Broken), None];

/// Where each operation ends, by what is seen afterwards.
pub const SETTLES: [(State, Action, [State; 6]); 9] = {
    use State::{Deleted as D, ErrorUnknown as E, Initial as I, Running as R, Stopped as S, Suspended as U};
    [
        (I, Action::Clone, [I, S, E, E, E, E]),
        (D, Action::Clone, [I, S, E, E, E, E]),
        (S, Action::Start, [E, S, R, E, E, E]),
        (U, Action::Start, [E, S, R, U, E, E]),
        (R, Action::Stop, [E, S, E, E, E, E]),
        (R, Action::Suspend, [E, S, R, U, E, E]),
        (S, Action::Delete, [D, E, E, E, E, E]),
        (U, Action::Delete, [D, E, E, E, E, E]),
        (E, Action::Delete, [D, E, E, E, E, E]),
    ]
};

/// Whether one state may follow another: requested, settled, or the machine exited.
pub fn is_an_edge(from: State, to: State) -> bool {
    let requested = LEGAL.iter().any(|row| (row.0, row.2) == (from, to) && from != to);
    let leads_here = |row: &&(State, Action, [State; 6])| {
        LEGAL.iter().any(|legal| (legal.0, legal.1, legal.2) == (row.0, row.1, from))
    };
    let settled = SETTLES.iter().filter(leads_here).any(|row| row.2.contains(&to));
    let exited = from == State::Running && (to == State::Stopped || to == State::ErrorUnknown);
    requested || settled || exited
}
