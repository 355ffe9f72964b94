//! Whom the scheduler prefers: the commands.
//!
//! A command's output wakes the agent. If that takes the processor from the command at once, each line costs two switches of
//! address space, which under emulation cost as much as all the rest. A batch task waits until the command waits or its slice
//! ends, and then finds everything at once: output, its end, the exit.

/// Makes this thread one that does not take the processor from others when it wakes up.
pub fn be_patient() {
    // What cannot be had costs speed and nothing else.
    let _ = policy(libc::SCHED_BATCH);
}

/// Makes this thread, a child's that inherited our policy, an ordinary one.
pub(super) fn be_ordinary() {
    let _ = policy(libc::SCHED_OTHER);
}

#[expect(unsafe_code, reason = "the library that we use has no such call")]
fn policy(policy: i32) -> std::io::Result<()> {
    let parameters = libc::sched_param { sched_priority: 0 };
    // SAFETY: the parameters outlive the call, which reads them and nothing else.
    match unsafe { libc::sched_setscheduler(0, policy, &raw const parameters) } {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    }
}
