//! Cold boots while the host has more to do than it can: none hangs.

mod common;

use std::process::{Child, Command};
use std::time::Duration;

use common::{QemuRig, base, runtime};
use vmkit::cleanup;

const BOOTS: usize = 30;
const AT_ONCE: usize = 2;
const BUSY: usize = 4;

/// Processes that do nothing, as fast as they can.
struct Load(Vec<Child>);

impl Load {
    fn new() -> Load {
        Load((0..BUSY).map(|_| Command::new("sh").args(["-c", "while :; do :; done"]).spawn().unwrap()).collect())
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        for child in &mut self.0 {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

#[test]
fn thirty_cold_boots_under_load() {
    let Some(image) = base() else { return };
    let rig = QemuRig::new(image);
    runtime().block_on(async {
        let host = rig.host();
        let _load = Load::new();
        for round in 0..BOOTS / AT_ONCE {
            let boot = async |n: usize| {
                let vm = rig.running(&host, &format!("boot-{round}-{n}")).await;
                let output = vm.command("echo").arg("up").output().await.unwrap();
                assert_eq!(output.stdout, b"up\n");
                cleanup(&vm, Duration::ZERO, Duration::from_secs(60)).await.unwrap();
            };
            tokio::join!(boot(0), boot(1));
        }
    });
}
