//! Several builders at once, and builders that die.

mod common;

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use common::{Bench, can_build};
use vmkit_image::RootSource;

fn start(bench: &Bench) -> Child {
    common::builder(bench, "base", &["env"]).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap()
}

#[test]
#[ignore = "the other tests run it as a process of its own"]
fn builder() {
    common::be_a_builder();
}

#[test]
fn builders_at_once_make_one_image() {
    if !can_build() {
        return;
    }
    let bench = Bench::new();
    let processes: Vec<_> = (0..2).map(|_| start(&bench)).collect();
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| bench.build("base", RootSource::Base).unwrap());
        }
    });
    for process in processes {
        assert!(process.wait_with_output().unwrap().status.success());
    }
    assert_eq!(bench.entries("images").len(), 1);
    bench.store.verify("base").unwrap();
    bench.assert_swept();
}

#[test]
fn a_build_that_was_killed_is_swept_by_the_next() {
    if !can_build() {
        return;
    }
    let bench = Bench::new();
    for at in
        ["phase root", "phase disk: writing", "phase initramfs", "phase finish: checking", "phase finish: writing"]
    {
        let mut child = start(&bench);
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines().map_while(Result::ok);
        assert!(lines.any(|line| line.starts_with(at)), "the build never came to {at:?}");
        // Into the middle of what it reported, and not always the same middle.
        std::thread::sleep(Duration::from_millis(at.len() as u64 % 5));
        child.kill().unwrap();
        child.wait().unwrap();

        if at != "phase finish: writing" {
            assert!(bench.store.list().unwrap().is_empty(), "killed at {at:?}, and there is an image");
        }
        assert!(bench.build("base", RootSource::Base).is_ok(), "killed at {at:?}");
        bench.store.verify("base").unwrap();
        assert_eq!(bench.entries("images").len(), 1);
        bench.assert_swept();
        assert_no_process_in(bench.dir.path());
        bench.store.remove("base", &|_| false).unwrap();
    }
}

#[test]
fn a_name_means_a_whole_image_whenever_a_build_is_killed() {
    if !can_build() {
        return;
    }
    let bench = Bench::new();
    let old = bench.build("base", RootSource::Dir(bench.tree("tree", "old"))).unwrap();
    let since = Instant::now();
    let new = bench.build("new", RootSource::Base).unwrap();
    let span = since.elapsed();
    bench.store.remove("new", &|_| false).unwrap();
    for step in 0..10 {
        let mut child = start(&bench);
        std::thread::sleep(span * step / 8);
        child.kill().unwrap();
        child.wait().unwrap();
        let now = bench.store.get("base").unwrap();
        assert!(now.digest == old.digest || now.digest == new.digest, "killed at {step}");
        bench.store.verify("base").unwrap();
        // Sweeps, and takes what nobody names.
        bench.store.collect(&|_| false).unwrap();
        bench.assert_swept();
        assert_eq!(bench.entries("images").len(), 1);
    }
    assert_no_process_in(bench.dir.path());
    assert_eq!(bench.build("base", RootSource::Base).unwrap(), vmkit::BootImage { name: "base".to_owned(), ..new });
}

/// The tools of a killed build end by themselves, soon.
fn assert_no_process_in(dir: &Path) {
    let patience = Instant::now() + Duration::from_secs(20);
    let dir = dir.to_str().unwrap();
    loop {
        let processes = std::fs::read_dir("/proc").unwrap().flatten();
        let ours = processes.filter(|process| {
            let file = |name: &str| process.path().join(name);
            let line = std::fs::read(file("cmdline")).unwrap_or_default();
            let place = std::fs::read_link(file("cwd")).unwrap_or_default();
            // Daemons of tools have nothing of ours but the environment.
            let environment = std::fs::read(file("environ")).unwrap_or_default();
            let has = |text: &[u8]| String::from_utf8_lossy(text).contains(dir);
            has(&line) || has(&environment) || place.starts_with(dir)
        });
        let ours: Vec<_> = ours.map(|process| process.file_name()).collect();
        if ours.is_empty() {
            return;
        }
        assert!(Instant::now() < patience, "still running: {ours:?}");
        std::thread::sleep(Duration::from_millis(50));
    }
}
