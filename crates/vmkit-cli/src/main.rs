//! The `vmkit` command.
//!
//! Thin: arguments are parsed and lowered once, a command is carried out, its error becomes text and an exit code.

mod args;
mod bench;
mod child;
mod context;
mod doctor;
mod image;
mod lifecycle;
mod list;
mod log;
mod output;
mod owner;
mod run;
mod signals;
mod states;
mod template;

use std::process::ExitCode;

use clap::{CommandFactory, Parser};

use args::{Args, Command};
use bench::{BenchArgs, BenchCommand};
use output::{Failure, Output};

fn main() -> ExitCode {
    let args = match Args::try_parse() {
        Ok(args) => args,
        Err(error) => return output::usage(&error),
    };
    let output = Output::new(args.json, args.quiet);
    log::begin(&args.log, &output);
    let result = match &args.command {
        // The two that need no runtime, no state and no QEMU.
        Command::States { format } => states::print(*format, &output),
        Command::Completions { shell } => {
            // Into memory first: a full disk is an error, and the generator would panic.
            let mut script = Vec::new();
            clap_complete::generate(*shell, &mut Args::command(), "vmkit", &mut script);
            output::print_all(&script).map(|()| 0)
        }
        // It has a runtime of its own for each half of what it compares.
        Command::Bench(BenchArgs { command, table }) if !matches!(command, Some(BenchCommand::Pool(_))) => {
            bench::compare(&args, command.as_ref(), table, &output)
        }
        _ => carry_out(&args, &output),
    };
    let code = match result {
        Ok(code) => code,
        Err(failure) => {
            output.failure(&failure);
            failure.code
        }
    };
    // Not by returning: a thread that reads standard input cannot be woken up, and nothing waits for it.
    std::process::exit(code.into())
}

fn carry_out(args: &Args, output: &Output) -> Result<u8, Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|error| Failure::from(vmkit::Error::io("the runtime cannot be started", error)))?;
    let result = runtime.block_on(dispatch(args, output));
    runtime.shutdown_background();
    result
}

async fn dispatch(args: &Args, output: &Output) -> Result<u8, Failure> {
    match &args.command {
        Command::Run(run) => run::run(args, run, output).await,
        Command::Exec(exec) => run::exec(args, exec, output).await,
        Command::Clone(clone) => lifecycle::clone(args, clone, output).await,
        Command::Start { names, timeout, discard } => lifecycle::start(args, names, *timeout, *discard, output).await,
        Command::Fork { name, names } => lifecycle::fork(args, name, names, output).await,
        Command::Suspend { names } => lifecycle::suspend(args, names, output).await,
        Command::Stop { names, grace, force } => lifecycle::stop(args, names, *grace, *force, output).await,
        Command::Delete { names } => lifecycle::delete(args, names, output).await,
        Command::Wait { name, state, timeout } => lifecycle::wait(args, name, *state, *timeout, output).await,
        Command::Reset { names } => lifecycle::reset(args, names, output).await,
        Command::Cleanup { names, all, grace } => lifecycle::cleanup(args, names, *all, *grace, output).await,
        Command::Ls { names_only } => list::ls(args, *names_only, output).await,
        Command::Inspect { name } => list::inspect(args, name, output).await,
        Command::Console { name, follow, lines } => list::console(args, name, *follow, *lines).await,
        Command::Image { command } => image::dispatch(args, command, output).await,
        Command::Template { command } => template::dispatch(args, command, output).await,
        Command::Bench(BenchArgs { command: Some(BenchCommand::Pool(bench)), .. }) => {
            bench::pool(args, bench, output).await
        }
        Command::Doctor => doctor::doctor(args, output),
        Command::States { .. } | Command::Completions { .. } | Command::Bench(_) => {
            unreachable!("carried out without a runtime")
        }
    }
}
