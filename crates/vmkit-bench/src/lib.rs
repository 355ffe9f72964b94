//! What bare QEMU costs on this machine, and what vmkit costs beside it. `vmkit bench` shows it.
//!
//! ```text
//!  session ──┬─ floor      bare QEMU: no vmkit in between
//!  (rounds)  ├─ ours       the library
//!            └─ commands   `vmkit run`, `vmkit states`, as processes
//!      │          │ samples
//!      ▼          ▼
//!    place      report     medians, ratios, targets; plot
//! ```
//!
//! The project carries its own floor because an absolute time says nothing without one: machines differ, and the same machine
//! differs from hour to hour. So both are measured in turns, and nothing here asserts a time.
//!
//! All of a run is in one directory, whose lock the run holds ([`sweep`]): what a run that was killed left is found by it.

#![forbid(unsafe_code)]

mod args;
mod commands;
mod density;
mod error;
mod figures;
mod floor;
mod forks;
mod ours;
mod place;
mod plot;
mod report;
mod samples;
mod session;
mod stop;

pub use args::{DensityArgs, FloorArgs, TableArgs};
pub use density::Crowds;
pub use error::{Error, Result};
pub use figures::Wanted;
pub use place::sweep;
pub use report::Report;
pub use session::{Plan, Tell, density, measure};
pub use stop::Stop;
