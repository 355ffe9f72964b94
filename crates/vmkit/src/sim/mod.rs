//! Simulated hardware, for tests of what you build on machines.
//!
//! A [`World`] is the hardware: a durable store of machines that outlives providers and hosts, as disks and processes
//! outlive the program that made them. A [`SimProvider`] is one process's view of it; several over one world are
//! several processes, with a lock per machine between them. Commands are executed by a handful of built-in
//! [programs](self#programs).
//!
//! ```
//! use std::time::Duration;
//! use vmkit::sim::{Fault, SimProvider, Verb, World};
//! use vmkit::{ConsoleSinks, ErrorKind, Host, Id, Source, Spec, State};
//!
//! # fn main() -> vmkit::Result<()> {
//! # tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap().block_on(async {
//! let world = World::new();
//! let host = Host::new(SimProvider::new(world.clone()));
//! let id = Id::new("web")?;
//! let vm = host.create(id.clone(), Spec::new(Source::Alias("base".into()))).await?;
//! vm.clone_source().await?;
//!
//! // The next boot fails. What does your code do then?
//! world.fault(Some(&id), Verb::Boot, Fault::Err);
//! assert_eq!(vm.start(ConsoleSinks::discard()).await.unwrap_err().kind(), ErrorKind::Backend);
//! assert_eq!(vm.state(), State::Stopped);
//!
//! // And when it crashes?
//! vm.start(ConsoleSinks::discard()).await?;
//! world.crash(&id, 1);
//! let report = vm.stop(Duration::from_secs(1)).await;
//! assert_eq!(report.run.unwrap_err().kind(), ErrorKind::Exited);
//!
//! vm.delete().await?;
//! assert_eq!(world.residue(), Vec::<String>::new());
//! # Ok(()) }) }
//! ```
//!
//! Time is tokio's: under `#[tokio::test(start_paused = true)]` hours of deadlines and backoffs pass in an instant. A
//! dropped future leaves the world half done, as on hardware: half a disk, a process that boots and belongs to nobody.
//! A call that no hardware could carry out, or that the lifecycle forbids, is a [violation](World::violations).
//!
//! Every image is there, but the one called `missing`.
//!
//! # Programs
//!
//! | program | what it does |
//! |---|---|
//! | `echo [-n] …`, `warn …` | prints its arguments, to standard error in the second case |
//! | `cat [FILE…]` | copies its input, or files of the machine's disk |
//! | `store FILE TEXT` | writes a file on the machine's disk |
//! | `remember KEY TEXT`, `recall KEY` | writes and reads the guest's memory |
//! | `counter` | counts up in the guest's memory and prints the count |
//! | `true`, `false`, `exit N`, `signal N` | ends so; the last by that signal |
//! | `sleep SECONDS` | also `infinity` |
//! | `env [NAME]`, `pwd`, `whoami`, `hostname` | prints what the command was given |
//! | `yes`, `produce N` | prints without end, or N bytes |
//! | `family` | starts a child, prints its process id, and waits for it |
//! | `alive PID` | succeeds while there is such a process |
//! | `sh -c …` | the above, separated by `;`, with `>&2`, and `kill -N $$` |
//!
//! Files in `/etc` are there and cannot be executed; every other program is not found.

mod driver;
mod fault;
mod guest;
mod hardware;
mod probe;
mod programs;
mod provider;
mod world;

pub use driver::SimDriver;
pub use fault::{Broken, Fault, Latency, Odds, Verb};
pub use provider::{SimClaim, SimProvider};
pub use world::{Call, Parked, World};
