//! Machines that are forks of templates.

use std::fs;
use std::path::Path;
use std::time::Duration;

use vmkit::{BootImage, ConsoleSinks, Host, Instance, Source, Spec, cleanup};
use vmkit_backends::qemu::{Qemu, QemuConfig};

use super::{id, pids_where};

/// Machines and templates of one test.
pub struct Farm {
    pub dir: tempfile::TempDir,
    pub image: BootImage,
    pub host: Host<Qemu>,
}

impl Farm {
    /// With templates of its own, or with those that all tests share.
    pub fn new(image: BootImage, own: bool) -> Farm {
        let dir = tempfile::Builder::new().prefix("vmkit-test-").tempdir().unwrap();
        let shared = Path::new(env!("CARGO_TARGET_TMPDIR")).join("templates");
        let templates = Some(if own { dir.path().join("templates") } else { shared });
        let config = QemuConfig { templates, ..QemuConfig::new(dir.path().join("vms")) };
        Farm { image, host: Host::new(Qemu::new(config).unwrap()), dir }
    }

    pub fn qemu(&self) -> &Qemu {
        self.host.provider()
    }

    pub fn spec(&self) -> Spec {
        Spec::new(Source::Boot(self.image.clone())).memory_mib(192)
    }

    pub async fn running(&self, name: &str) -> Instance {
        self.running_as(name, self.spec()).await
    }

    pub async fn running_as(&self, name: &str, spec: Spec) -> Instance {
        let vm = self.host.create(id(name), spec).await.unwrap();
        vm.clone_source().await.unwrap();
        vm.start(ConsoleSinks::discard()).await.unwrap();
        vm
    }

    pub fn left(&self) -> Vec<String> {
        let vms = fs::canonicalize(self.dir.path().join("vms")).unwrap();
        let mut left: Vec<String> = pids_where(|cwd| cwd.starts_with(&vms)).iter().map(ToString::to_string).collect();
        for part in ["", ".staging", ".trash", ".locks"] {
            let entries = fs::read_dir(vms.join(part)).unwrap().flatten();
            left.extend(entries.map(|entry| entry.file_name().into_string().unwrap()).filter(|n| !n.starts_with('.')));
        }
        left
    }
}

impl Drop for Farm {
    fn drop(&mut self) {
        // Also after a panic: nothing outlives its test.
        let dir = fs::canonicalize(self.dir.path()).unwrap();
        for pid in pids_where(|cwd| cwd.starts_with(&dir)) {
            let _ = std::process::Command::new("kill").args(["-9", &pid.to_string()]).status();
        }
    }
}

pub async fn sh(vm: &Instance, script: &str) -> String {
    let output = vm.command("sh").args(["-c", script]).output().await.unwrap();
    assert!(output.status.success(), "{script}: {output:?}");
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

pub async fn discard(vm: &Instance) {
    cleanup(vm, Duration::ZERO, Duration::from_secs(60)).await.unwrap();
}
