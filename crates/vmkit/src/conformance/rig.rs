//! What a backend brings to the suite.

use std::future::Future;
use std::time::Duration;

use crate::driver::Provider;
use crate::spec::{Id, Spec};

/// A backend under test, with a probe of its own.
///
/// Made afresh for each case. It cleans up after itself when dropped, also when the case panicked.
pub trait Rig: Send + Sync + 'static {
    /// The backend.
    type Provider: Provider;

    /// A new provider over the same machines: what a new process would have.
    fn provider(&self) -> impl Future<Output = Self::Provider> + Send;

    /// A small machine whose guest executes commands.
    fn spec(&self) -> Spec;

    /// A machine that cannot be cloned, because its source is not there; `None` when that cannot be had.
    fn unclonable(&self) -> Option<Spec>;

    /// How a program is spelled in its guests: the program, then its arguments.
    fn command(&self, program: &Program) -> Vec<String>;

    /// How many processes of a machine are alive, looked at past the backend.
    fn processes(&self, id: &Id) -> impl Future<Output = usize> + Send;

    /// Whether a machine's processors run, by what the hypervisor says past the backend.
    fn executes(&self, id: &Id) -> impl Future<Output = bool> + Send;

    /// What a machine has left on disk, one line each, looked at past the backend; its saved execution included.
    fn artefacts(&self, id: &Id) -> impl Future<Output = Vec<String>> + Send;

    /// Whether a machine has a complete saved execution, looked at past the backend.
    fn saved_execution(&self, id: &Id) -> impl Future<Output = bool> + Send;

    /// Kills a machine's main process from outside, as `kill -9` does.
    fn kill_process(&self, id: &Id) -> impl Future<Output = ()> + Send;

    /// Puts something of that name there that is not ours.
    fn plant_foreign(&self, id: &Id) -> impl Future<Output = ()> + Send;

    /// Whether what was planted is as it was.
    fn foreign_intact(&self, id: &Id) -> impl Future<Output = bool> + Send;

    /// Looks at everything once more after a case that passed; panics when something is wrong or left over.
    fn finish(&self) -> impl Future<Output = ()> + Send {
        async {}
    }

    /// Says that a case, or a part of it, could not be carried out. Panic where that is not acceptable.
    fn skipped(&self, case: &str, why: &str) {
        eprintln!("SKIPPED {case}: {why}");
    }

    /// How long one case may take.
    fn limit(&self) -> Duration {
        Duration::from_secs(600)
    }

    /// Added to the second in which a death has to be noticed, where the machine that tests is slow.
    fn slack(&self) -> Duration {
        Duration::ZERO
    }
}

/// What cases execute in a guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Program {
    /// Prints one word and a newline.
    Print(String),
    /// Prints one word and a newline to standard error.
    PrintError(String),
    /// Copies standard input to standard output.
    Cat,
    /// Ends with an exit code.
    Exit(i32),
    /// Ends by a signal.
    Signal(i32),
    /// Sleeps for a day or longer.
    Sleep,
    /// Writes a word to memory, under a key.
    Remember(String, String),
    /// Prints the word that is in memory under a key; fails when there is none.
    Recall(String),
    /// Writes a word to the root disk, under a key.
    Store(String, String),
    /// Prints the word that is on the root disk under a key; fails when there is none.
    Show(String),
    /// Prints a variable of its environment; fails when it is not set.
    Env(String),
    /// Prints its working directory.
    Directory,
    /// Prints the host name.
    Hostname,
    /// Prints a file.
    Read(String),
    /// Prints that many bytes.
    Produce(usize),
    /// Starts a child that sleeps, prints the child's process id, waits for it.
    Family,
    /// Succeeds when there is a process of that id.
    Alive(u32),
    /// There is no such program.
    Missing,
    /// There is such a file, and it cannot be executed.
    NotExecutable,
}

impl Program {
    /// How it is spelled where there is busybox, `/dev/shm`, `/proc` and a root that can be written to.
    pub fn busybox(&self) -> Vec<String> {
        let words: &[&str] = match self {
            Program::Print(word) => &["echo", word],
            Program::PrintError(word) => &["sh", "-c", "echo \"$0\" >&2", word],
            Program::Cat => &["cat"],
            Program::Exit(code) => return shell(format!("exit {code}")),
            Program::Signal(signal) => return shell(format!("kill -{signal} $$")),
            Program::Sleep => &["sleep", "100000"],
            Program::Remember(key, word) => &["sh", "-c", "echo \"$1\" > \"/dev/shm/$0\"", key, word],
            Program::Recall(key) => return vec!["cat".into(), format!("/dev/shm/{key}")],
            Program::Store(key, word) => &["sh", "-c", "echo \"$1\" > \"/$0\"", key, word],
            Program::Show(key) => return vec!["cat".into(), format!("/{key}")],
            Program::Env(name) => return shell(format!("echo \"${{{name}?}}\"")),
            Program::Directory => &["pwd"],
            Program::Hostname => &["hostname"],
            Program::Read(path) => &["cat", path],
            Program::Produce(bytes) => {
                return vec!["head".into(), "-c".into(), bytes.to_string(), "/dev/zero".into()];
            }
            Program::Family => &["sh", "-c", "sleep 100000 & echo $!; wait"],
            Program::Alive(pid) => return shell(format!("kill -0 {pid}")),
            Program::Missing => &["/no/such/program"],
            Program::NotExecutable => &["/proc/version"],
        };
        words.iter().map(|word| (*word).to_owned()).collect()
    }
}

fn shell(script: String) -> Vec<String> {
    vec!["sh".to_owned(), "-c".to_owned(), script]
}
