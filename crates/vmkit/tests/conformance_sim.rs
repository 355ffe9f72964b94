//! The conformance suite on simulated hardware, and that it has teeth: each broken backend fails it.
#![cfg(all(feature = "sim", feature = "conformance"))]

mod common;

use std::panic::{AssertUnwindSafe, catch_unwind};

use common::{SimRig, paused};
use vmkit::conformance;
use vmkit::sim::Broken;

fn run(name: &str) {
    paused().block_on(conformance::run(name, SimRig::new()));
}

vmkit::conformance_suite!(crate::run);

/// Which cases a broken backend has to fail. It may fail more.
const TEETH: [(Broken, &str); 33] = [
    (Broken::Liar, "a_started_machine_executes"),
    (Broken::Leaker, "deleting_leaves_nothing"),
    (Broken::HangsOnKill, "stopping_at_once_forces"),
    (Broken::KillIsGraceful, "stopping_at_once_forces"),
    (Broken::KillLeavesChild, "stopping_at_once_forces"),
    (Broken::DestroyNotIdempotent, "destroying_is_idempotent"),
    (Broken::DestroysDiskFirst, "a_suspended_machine_is_deleted"),
    (Broken::StaleDisk, "cloning_again_gives_fresh_content"),
    (Broken::DeletesForeign, "a_foreign_machine_stays_untouched"),
    (Broken::KeepsHalfClones, "a_failed_clone_leaves_nothing"),
    (Broken::ForgetsSuspend, "suspending_keeps_the_execution"),
    (Broken::CopiesBoot, "copies_go_on_where_it_was"),
    (Broken::ForkEndsOriginal, "the_original_runs_on"),
    (Broken::SuspendLeavesProcess, "suspending_leaves_no_process"),
    (Broken::PrespawnRuns, "a_waiting_process_changes_nothing"),
    (Broken::PrespawnOutlives, "a_waiting_process_ends_with_its_machine"),
    (Broken::StopKeepsMemory, "stopping_loses_the_memory"),
    (Broken::NeverNoticesDeath, "a_death_is_noticed"),
    (Broken::ForgetsExit, "a_crash_is_a_run_error_and_no_stop_error"),
    (Broken::SilentConsole, "the_console_is_received"),
    (Broken::ExecMergesStreams, "streams_are_separate"),
    (Broken::ExitCodeAlwaysZero, "exit_codes_are_told"),
    (Broken::SignalsAsCodes, "signals_are_told_from_codes"),
    (Broken::SevenBit, "bytes_pass_unchanged"),
    (Broken::DropsOutput, "output_is_held_back"),
    (Broken::IgnoresEnv, "the_environment_is_passed"),
    (Broken::IgnoresCwd, "the_directory_is_passed"),
    (Broken::CancelLeavesProcess, "a_dropped_command_is_killed_with_its_tree"),
    (Broken::TellsArguments, "arguments_are_in_no_error"),
    (Broken::StaleList, "deleting_leaves_nothing"),
    (Broken::NeverAdopts, "another_process_adopts"),
    (Broken::NoLock, "two_processes_exclude_each_other"),
    (Broken::SharesClaims, "a_pools_name_has_one_holder"),
];

#[test]
fn every_broken_backend_fails_its_case() {
    for broken in Broken::ALL {
        let cases: Vec<&str> = TEETH.iter().filter(|(how, _)| *how == broken).map(|(_, case)| *case).collect();
        assert!(!cases.is_empty(), "{broken:?} has no case that is to catch it");
        for case in cases {
            assert!(conformance::ALL.contains(&case), "there is no case {case}");
            let ran = catch_unwind(AssertUnwindSafe(|| {
                paused().block_on(conformance::run(case, SimRig::broken(broken)));
            }));
            assert!(ran.is_err(), "{case} did not catch {broken:?}");
        }
    }
}
