//! What runs, read from /proc.

use std::collections::HashSet;
use std::fs;

use rustix::process::{Pid, Signal, kill_process, kill_process_group};

/// A process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Proc {
    pub pid: i32,
    pub state: char,
    pub parent: i32,
    pub group: i32,
}

/// Every process there is, threads of the kernel included.
pub(super) fn all() -> Vec<Proc> {
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok())
        .filter_map(|pid| parse(pid, &fs::read_to_string(format!("/proc/{pid}/stat")).ok()?))
        .collect()
}

/// The name in the second field may contain anything, closing brackets included.
fn parse(pid: i32, stat: &str) -> Option<Proc> {
    let mut fields = stat[stat.rfind(')')? + 1..].split_ascii_whitespace();
    let state = fields.next()?.chars().next()?;
    let parent = fields.next()?.parse().ok()?;
    let group = fields.next()?.parse().ok()?;
    Some(Proc { pid, state, parent, group })
}

/// Processes of users: neither process 1 nor the kernel's, and not dead already.
pub(super) fn users() -> impl Iterator<Item = Proc> {
    all().into_iter().filter(|p| p.pid > 2 && p.parent != 2 && p.parent != 0 && p.state != 'Z')
}

/// Signals a command: its process group, and with `tree` whatever descends from it in other groups.
pub(super) fn signal(leader: Pid, signal: Signal, tree: bool) {
    let root = leader.as_raw_nonzero().get();
    let others = if tree { descendants(root, &all()) } else { Vec::new() };
    // A group that is gone is what was wanted.
    let _ = kill_process_group(leader, signal);
    for pid in others {
        if let Some(pid) = Pid::from_raw(pid) {
            let _ = kill_process(pid, signal);
        }
    }
}

/// What descends from `root`, or from a member of its group, and is in another group.
fn descendants(root: i32, all: &[Proc]) -> Vec<i32> {
    let mut family: HashSet<i32> = all.iter().filter(|p| p.pid == root || p.group == root).map(|p| p.pid).collect();
    loop {
        let before = family.len();
        family.extend(all.iter().filter(|p| family.contains(&p.parent)).map(|p| p.pid).collect::<Vec<_>>());
        if family.len() == before {
            break;
        }
    }
    all.iter().filter(|p| family.contains(&p.pid) && p.group != root).map(|p| p.pid).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_names_with_brackets() {
        let stat = "12 (a) b (c) S 3 4 5 6 7";
        assert_eq!(parse(12, stat), Some(Proc { pid: 12, state: 'S', parent: 3, group: 4 }));
        assert_eq!(parse(12, "12 (cut"), None);
    }

    #[test]
    fn finds_those_that_left_the_group() {
        let of = |pid, parent, group| Proc { pid, state: 'S', parent, group };
        let all = [
            of(10, 1, 10),
            of(11, 10, 10),
            of(12, 11, 12),
            of(13, 12, 12),
            of(14, 1, 10),
            of(15, 14, 15),
            of(16, 1, 16),
        ];
        let mut found = descendants(10, &all);
        found.sort_unstable();
        assert_eq!(found, [12, 13, 15]);
    }
}
