//! A thousand machines, and what is left of them. Alone in its process, whose files and memory are counted.

mod common;

use std::fs;
use std::ops::Range;

use common::farm::{Farm, discard, sh};
use common::{base, runtime};

/// What this process and this test have now: open files, children, files of machines and templates; and the memory, KiB.
fn inventory(farm: &Farm) -> (usize, Vec<String>, Vec<String>, u64) {
    let open = fs::read_dir("/proc/self/fd").unwrap().count();
    let me = std::process::id().to_string();
    let parent = |pid: &str| {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        stat.rsplit_once(") ")?.1.split(' ').nth(1).map(str::to_owned)
    };
    let processes = fs::read_dir("/proc").unwrap().flatten().map(|entry| entry.file_name().into_string().unwrap());
    let children = processes.filter(|pid| parent(pid).as_ref() == Some(&me)).collect();
    let mut files = farm.left();
    let mut dirs = vec![farm.dir.path().to_owned()];
    while let Some(dir) = dirs.pop() {
        for entry in fs::read_dir(dir).unwrap().flatten() {
            files.push(entry.path().display().to_string());
            if entry.file_type().unwrap().is_dir() {
                dirs.push(entry.path());
            }
        }
    }
    files.sort();
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let own = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
    (open, children, files, own.trim().trim_end_matches(" kB").parse().unwrap())
}

/// One machine after the other, two at a time: made, used, deleted.
async fn cycles(farm: &Farm, numbers: Range<usize>) {
    let worker = async |first: usize| {
        for number in (first..numbers.end).step_by(2) {
            let vm = farm.running(&format!("cycle-{number}")).await;
            assert_eq!(sh(&vm, &format!("echo {number}")).await, number.to_string());
            discard(&vm).await;
        }
    };
    tokio::join!(worker(numbers.start), worker(numbers.start + 1));
}

#[test]
fn a_thousand_machines_leave_nothing() {
    let Some(image) = base() else { return };
    let farm = Farm::new(image, true);
    runtime().block_on(async {
        // What is made once is there afterwards: the template, and what the runtime keeps.
        cycles(&farm, 0..50).await;
        let before = inventory(&farm);
        cycles(&farm, 50..1050).await;
        let after = inventory(&farm);
        assert_eq!((&after.0, &after.1, &after.2), (&before.0, &before.1, &before.2));
        assert_eq!(farm.left(), [""; 0]);
        // Allocators keep some; 4 KiB a machine would be more.
        assert!(after.3 < before.3 + 3 * 1024, "{} KiB of memory, and {} before", after.3, before.3);
    });
}
