//! The lifecycle of virtual machines.
//!
//! A [`Host`] makes and finds machines through a [`Provider`] (a backend). An [`Instance`] is a handle on one: clone,
//! start, stop, suspend, delete, and commands executed in it. One task per machine owns the [`Driver`] and is the only
//! writer of its [`State`]; what a driver returns is a claim, what it finds when asked is the fact.
//!
//! ```text
//!  Host ── create / adopt ──▶ Instance ──requests──▶ machine's task ──▶ Driver ──▶ hypervisor
//!                                ▲ └──── command ───────────────────▶ Guest ────▶ agent
//!                                └──────── status, every change ──────┘
//! ```
//!
//! The table of requests, as `vmkit states` prints it:
//!
//! ```text
#![doc = include_str!("../states.txt")]
//! ```

mod cleanup;
mod command;
mod console;
mod driver;
mod error;
mod guest;
mod host;
mod instance;
mod machine;
pub mod pool;
mod properties;
mod publish;
mod render;
mod reset;
mod snapshot;
mod spec;
mod state;
mod wait;

#[cfg(feature = "conformance")]
pub mod conformance;
#[cfg(feature = "sim")]
pub mod sim;

pub use cleanup::cleanup;
pub use command::{Child, Command, Output};
pub use console::{ConsoleSinks, Sink};
pub use driver::{Adopted, Capabilities, Driver, Exit, Found, Probe, Provider, Spent};
pub use error::{Error, ErrorKind, Result};
pub use guest::{
    Binding, CommandSpec, ExitStatus, Guest, GuestFile, GuestOps, GuestProcess, GuestReader, GuestWriter,
    ProcessControl,
};
pub use host::Host;
pub use instance::{Instance, StopReport};
pub use properties::{Birth, CloneInfo, Origin, Phase, Properties};
pub use publish::{Cause, Status, Subscription};
pub use render::{StateRow, states_dot, states_markdown, states_rows};
pub use reset::reset;
pub use snapshot::Snapshot;
pub use spec::{BootImage, Id, Source, Spec, Timeouts};
pub use state::{
    Action, Edge, Fact, State, UnknownState, Verdict, found, observe, plan, print_states, retrace, settle,
};
pub use wait::{Look, Observed, look, wait_for_state};

/// The README's example, so that it compiles and runs.
#[cfg(all(doctest, feature = "sim"))]
#[doc = include_str!("../../../README.md")]
pub struct Readme;
