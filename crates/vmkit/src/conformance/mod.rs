//! The suite that every backend must pass: one named case for each promise of the lifecycle.
//!
//! A backend brings a [`Rig`]: providers over one place, an image, how commands are spelled in its guests, and a probe
//! that looks at processes and files by itself, past the backend. Each case gets a fresh rig.
//!
//! ```
//! use vmkit::conformance;
//! # use vmkit::conformance::Rig;
//! # fn check(my_rig: impl Rig) {
//! # let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
//! // In a test file, `vmkit::conformance_suite!(run);` makes a #[test] of each case that calls `run(name)`:
//! let run = |name: &str| runtime.block_on(conformance::run(name, my_rig));
//! # let _ = run;
//! # }
//! ```
//!
//! A failure is a panic that says which promise was broken. A case that a rig cannot carry out is reported to
//! [`Rig::skipped`]: never in silence. No case asserts a duration tighter than the lifecycle promises.

mod bench;
mod clone;
mod concurrency;
mod exec;
mod finding;
mod fork;
mod prespawn;
mod rig;
mod start;
mod states;
mod stop;
mod streams;
mod suspend;

pub use bench::Bench;
pub use rig::{Program, Rig};

/// Makes a `#[test]` of every case: `conformance_suite!(run)` calls `run(name)`, a `fn(&str)` of yours that builds a
/// runtime and a rig and awaits [`conformance::run`](crate::conformance::run) in it.
#[macro_export]
macro_rules! conformance_suite {
    ($run:path) => {
        $crate::__conformance_cases!({ $crate::__conformance_tests } $run);
    };
}

#[doc(hidden)]
#[macro_export]
macro_rules! __conformance_tests {
    ($run:path; $($module:ident: $($case:ident)+;)+) => {
        $(mod $module {
            $(#[test]
            fn $case() {
                ($run)(stringify!($case));
            })+
        })+
    };
}

#[doc(hidden)]
#[macro_export]
macro_rules! __conformance_cases {
    ({ $($then:tt)+ } $($extra:tt)*) => {
        $($then)+! {
            $($extra)*;
            clone:
                a_machine_is_made_of_nothing a_name_is_taken_once cloning_ends_stopped
                a_foreign_machine_stays_untouched cloning_again_gives_fresh_content a_failed_clone_leaves_nothing
                a_dropped_clone_settles deleting_leaves_nothing destroying_is_idempotent;
            start:
                a_started_machine_executes the_console_is_received a_bad_console_costs_only_output
                a_dropped_start_is_undone a_kill_reaches_a_starting_machine a_death_while_starting_fails_at_once;
            stop:
                stopping_at_once_forces stopping_gracefully_does_not_force stopping_forces_after_the_grace
                stopping_twice_publishes_nothing killing_is_idempotent a_death_is_noticed
                a_crash_is_a_run_error_and_no_stop_error a_crash_ends_commands;
            suspend:
                suspendable_is_constant suspending_keeps_the_execution suspending_leaves_no_process
                resuming_spends_the_execution stopping_loses_the_memory suspending_twice_publishes_nothing
                a_suspended_machine_is_deleted;
            prespawn:
                a_waiting_process_changes_nothing a_start_takes_up_what_waits
                a_waiting_process_that_is_gone_costs_nothing a_waiting_process_ends_with_its_machine
                another_process_takes_up_what_waits only_what_is_off_is_waited_for;
            fork:
                copies_go_on_where_it_was the_original_runs_on a_copy_of_a_copy only_what_runs_is_forked;
            states:
                every_state_is_seen illegal_requests_change_nothing properties_in_every_state
                waiting_for_a_state cleaning_up_in_every_state;
            exec:
                nothing_is_executed_unless_running exit_codes_are_told signals_are_told_from_codes
                the_environment_is_passed the_directory_is_passed programs_that_cannot_run
                arguments_are_in_no_error a_dropped_command_is_killed_with_its_tree a_late_command_is_killed
                commands_run_side_by_side a_binding_is_applied;
            streams:
                streams_are_separate bytes_pass_unchanged output_is_held_back no_input_reads_as_empty;
            concurrency:
                stop_beside_stop suspend_beside_suspend start_beside_start clone_beside_clone delete_beside_delete
                start_beside_stop stop_beside_delete start_beside_delete suspend_beside_stop
                reading_never_waits a_cancelled_waiter_never_runs;
            finding:
                another_process_adopts an_absent_machine_is_not_found every_machine_is_listed
                dropped_handles_end_no_machine two_processes_exclude_each_other
                another_process_deletes a_pools_name_has_one_holder;
        }
    };
}

macro_rules! table {
    (; $($module:ident: $($case:ident)+;)+) => {
        /// The names of all cases.
        pub const ALL: &[&str] = &[$($(stringify!($case),)+)+];

        async fn dispatch<R: Rig>(name: &str, bench: &Bench<R>) {
            match name {
                $($(stringify!($case) => $module::$case(bench).await,)+)+
                _ => panic!("there is no case {name:?}"),
            }
        }
    };
}

__conformance_cases!({ table });

/// Runs one case on a fresh rig.
///
/// # Panics
/// When a promise is broken, or there is no case of that name.
pub async fn run<R: Rig>(name: &str, rig: R) {
    let limit = rig.limit();
    let bench = Bench::new(rig, name).await;
    let running = async {
        dispatch(name, &bench).await;
        bench.finish().await;
    };
    if tokio::time::timeout(limit, running).await.is_err() {
        panic!("{name}: not over after {limit:?}");
    }
}
