//! The last moments of a guest that others will go on from.
//!
//! Whatever its kernel still has to do would be done by each of them, with code that is cold; and what it had to do once already,
//! it finds done: stacks and structures that an ended process leaves are the next one's.

use std::fs;
use std::time::Duration;

use tokio::time::{sleep, timeout};

use super::{Inner, spawn};
use crate::protocol::ExecRequest;

/// The kernel measures its time-stamp counter for a second after its boot, and then takes it for its clock.
const CLOCK: &str = "/sys/devices/system/clocksource/clocksource0/current_clocksource";
const UNMEASURED: &str = "tsc-early";
/// No kernel takes longer, and a template is one without that too.
const MEASURES: Duration = Duration::from_secs(5);
const LOOKS: Duration = Duration::from_millis(50);

const TIMES: usize = 3;
/// How long a process may take that does nothing.
const ENDS: Duration = Duration::from_secs(10);

/// Until there is nothing left to wait for. What does not come is not there for those who go on, and costs them time.
pub(super) async fn rest(agent: &Inner) {
    let measured = async {
        while fs::read_to_string(CLOCK).is_ok_and(|name| name.trim_end() == UNMEASURED) {
            sleep(LOOKS).await;
        }
    };
    let _ = timeout(MEASURES, measured).await;
    // The one program that every guest has, and the one that most have: what else is executed is often begun by it, and uses the
    // same libraries. The kernel keeps more at hand of what was used more than once.
    for _ in 0..TIMES {
        execute("/proc/self/exe", &["--version"], agent).await;
        execute("sh", &["-c", ":"], agent).await;
    }
    // The kernel remembers where a name was found, and where it was not.
    let _ = tokio::task::spawn_blocking(spawn::look_for_all).await;
    agent.spares.make();
}

async fn execute(program: &str, args: &[&str], agent: &Inner) {
    let request = ExecRequest {
        program: program.to_owned(),
        args: args.iter().map(|&arg| arg.to_owned()).collect(),
        stdout: true,
        stderr: true,
        ..ExecRequest::default()
    };
    if let Ok(process) = spawn::spawn(&request, &[], agent) {
        let _ = timeout(ENDS, process.exit).await;
    }
}
