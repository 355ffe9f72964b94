//! SSH host keys: no two forks have the same, and none has its template's.

mod common;

use std::collections::HashSet;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;

use common::farm::{Farm, discard, sh};
use common::{base, runtime};
use vmkit::BootImage;
use vmkit_image::{Agent, Cancel, Recipe, RootSource, Store};

const KINDS: [&str; 3] = ["ecdsa", "ed25519", "rsa"];

fn output(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(output.status.success(), "{command:?}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// A system that has a shell, `ssh-keygen` and what it needs, and host keys.
fn root(dir: &Path) {
    let copy = |from: &str| {
        let to = dir.join(from.trim_start_matches('/'));
        fs::create_dir_all(to.parent().unwrap()).unwrap();
        fs::copy(from, &to).unwrap_or_else(|error| panic!("{from}: {error}; is openssh-client installed?"));
    };
    copy("/usr/bin/ssh-keygen");
    for word in output(Command::new("ldd").arg("/usr/bin/ssh-keygen")).split_whitespace() {
        if word.starts_with('/') {
            copy(word);
        }
    }
    let busybox = output(Command::new("sh").args(["-c", "command -v busybox"]));
    fs::create_dir_all(dir.join("bin")).unwrap();
    fs::copy(busybox.trim(), dir.join("bin/busybox")).unwrap();
    for applet in ["sh", "cat", "sha256sum", "stat", "ls"] {
        symlink("busybox", dir.join("bin").join(applet)).unwrap();
    }
    fs::create_dir_all(dir.join("etc/ssh")).unwrap();
    fs::write(dir.join("etc/passwd"), "root:x:0:0:root:/root:/bin/sh\n").unwrap();
    for kind in KINDS {
        let key = dir.join(format!("etc/ssh/ssh_host_{kind}_key"));
        output(Command::new("ssh-keygen").args(["-q", "-N", "", "-t", kind, "-f"]).arg(key));
    }
}

fn image(farm: &Farm) -> BootImage {
    let tree = farm.dir.path().join("root");
    root(&tree);
    let agent = Agent::find(format!("protocol {}", vmkit_agent::link::VERSION)).unwrap();
    let store = Store::open(farm.dir.path().join("images")).unwrap();
    store.build("keys", &Recipe::new(RootSource::Dir(tree), agent), &Cancel::new(), &|_| {}).unwrap()
}

#[test]
fn no_two_forks_have_the_same_host_keys() {
    let Some(image_of_all) = base() else { return };
    let mut farm = Farm::new(image_of_all, true);
    farm.image = image(&farm);
    let own = |kind: &str| fs::read_to_string(farm.dir.path().join(format!("root/etc/ssh/ssh_host_{kind}_key.pub")));
    let words = |key: &str| key.split_whitespace().take(2).collect::<Vec<_>>().join(" ");
    let mut seen: HashSet<String> = KINDS.iter().map(|kind| words(&own(kind).unwrap())).collect();
    assert_eq!(seen.len(), KINDS.len());
    runtime().block_on(async {
        for name in ["one", "two"] {
            let vm = farm.running(name).await;
            let birth = vm.properties().birth.unwrap();
            assert!(birth.renewed.contains(&"ssh-host-keys".to_owned()), "{birth:?}");
            for kind in KINDS {
                let key = format!("/etc/ssh/ssh_host_{kind}_key");
                let public = words(&sh(&vm, &format!("cat {key}.pub")).await);
                assert!(seen.insert(public.clone()), "{name} has the {kind} key of somebody else");
                // The two belong together, and nobody else may read the one.
                assert_eq!(words(&sh(&vm, &format!("ssh-keygen -y -f {key}")).await), public);
                assert_eq!(sh(&vm, &format!("stat -c %a {key}")).await, "600");
            }
            assert_eq!(sh(&vm, "ls /etc/ssh").await.lines().count(), 2 * KINDS.len(), "something is left beside them");
            discard(&vm).await;
        }
        assert_eq!(farm.left(), [""; 0]);
    });
}
