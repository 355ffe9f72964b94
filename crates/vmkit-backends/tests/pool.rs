//! A pool of real machines, whose processes are killed at random.

mod common;

use std::fs;
use std::time::Duration;

use tokio::time::sleep;
use vmkit::conformance::Rig;
use vmkit::pool::{Lease, Pool, Reuse, Staging};
use vmkit::{ErrorKind, State};

use common::{QemuRig, base, pids_where, runtime};

const SIZE: usize = 4;
const CYCLES: u64 = 50;
const PATIENCE: Duration = Duration::from_secs(300);

/// A stream of numbers that a seed replays.
struct Dice(u64);

impl Dice {
    fn from_env() -> Dice {
        let clock = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
        let seed = std::env::var("VMKIT_SEED").ok().and_then(|seed| seed.parse().ok());
        let seed = seed.unwrap_or(clock.as_nanos() as u64);
        println!("VMKIT_SEED={seed}");
        Dice(seed)
    }

    fn roll(&mut self, sides: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        (x ^ (x >> 31)) % sides
    }
}

/// Kills a QEMU of these machines, whichever; the name of its machine, if there was one.
fn kill_one(rig: &QemuRig, dice: &mut Dice) -> Option<String> {
    let pids = pids_where(|cwd| cwd.starts_with(rig.dir()));
    if pids.is_empty() {
        return None;
    }
    let pid = pids[dice.roll(pids.len() as u64) as usize];
    let cwd = fs::read_link(format!("/proc/{pid}/cwd")).ok()?;
    // It may have ended by itself meanwhile.
    let done = std::process::Command::new("kill").args(["-9", &pid.to_string()]).status().unwrap().success();
    done.then(|| cwd.file_name().unwrap().to_string_lossy().into_owned())
}

/// What is left of machines in the file system.
fn left(rig: &QemuRig) -> Vec<String> {
    let list = |part: &str| {
        let entries = fs::read_dir(rig.dir().join(part)).into_iter().flatten().flatten();
        entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect::<Vec<_>>()
    };
    let machines = list("").into_iter().filter(|name| !name.starts_with('.'));
    machines.chain([".staging", ".trash", ".locks"].into_iter().flat_map(list)).collect()
}

/// Waits until this machine is known to have ended, sees that it says so, and deletes it.
async fn delete_ended(lease: Lease) {
    let mut states = lease.subscribe();
    while states.next().await.unwrap().state == State::Running {}
    let error = lease.command("/bin/busybox").arg("true").output().await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotRunning, "{error:?}");
    lease.delete().await.unwrap();
}

fn survives(staging: Staging, prespawn: bool) {
    let Some(image) = base() else { return };
    let rig = QemuRig::forking(image);
    let mut dice = Dice::from_env();
    let (mut killed, mut used) = (0, Vec::new());
    runtime().block_on(async {
        let pool = Pool::builder(rig.host(), rig.spec()).name("real").size(SIZE).staging(staging);
        let pool = pool.prespawn(prespawn).build().unwrap();
        pool.start().await.unwrap();
        for cycle in 0..CYCLES {
            // Half of them at once: before a machine can have answered.
            let (kill, after) = (dice.roll(2) == 0, Duration::from_millis(dice.roll(2) * dice.roll(200)));
            // Of a machine that is ready, that is being made, or that is being deleted.
            if kill && (staging != Staging::Stopped || prespawn) {
                killed += u64::from(kill_one(&rig, &mut dice).is_some());
            }
            let mut acquiring = Box::pin(async { pool.acquire().timeout(PATIENCE).await });
            let (mut early, mut victim) = (None, None);
            if kill && staging == Staging::Stopped && !prespawn {
                // None runs before it is wanted: of one that boots, then.
                let killing = async {
                    while pids_where(|cwd| cwd.starts_with(rig.dir())).is_empty() {
                        sleep(Duration::from_millis(5)).await;
                    }
                    sleep(after).await;
                    kill_one(&rig, &mut dice)
                };
                tokio::select! {
                    lease = &mut acquiring => early = Some(lease),
                    done = killing => victim = done,
                }
            }
            let lease = match early {
                Some(lease) => lease.unwrap(),
                None => acquiring.await.unwrap(),
            };
            assert!(!used.contains(lease.id()), "{} is handed out a second time", lease.id());
            used.push(lease.id().clone());
            if let Some(victim) = victim {
                // Killed between its answer and this line: nobody could know it when it was handed out.
                let late = lease.id().as_str() == victim;
                killed += u64::from(!late);
                if late {
                    delete_ended(lease).await;
                    continue;
                }
            }
            let word = format!("cycle {cycle}");
            let output = lease.command("/bin/busybox").args(["echo", &word]).output().await.unwrap();
            assert_eq!(output.stdout, format!("{word}\n").into_bytes());
            assert_eq!(rig.status(lease.id()).as_deref(), Some("running"));
            match dice.roll(4) {
                0 => lease.delete().await.unwrap(),
                1 => drop(lease),
                2 => {
                    lease.stop_and_release(Duration::ZERO).await.stopped().unwrap();
                    lease.delete().await.unwrap();
                }
                _ => {
                    rig.kill_process(lease.id()).await;
                    delete_ended(lease).await;
                }
            }
            let status = pool.status().await;
            assert!(status.vms.len() <= SIZE * 2 + pool.config().allowance, "{status:#?}");
        }
        let report = pool.close(PATIENCE).await;
        assert!(report.is_clean(), "{report:?}");
    });
    assert!(killed > 0, "nothing was killed");
    assert_eq!(left(&rig), [""; 0], "files are left");
    assert_eq!(pids_where(|cwd| cwd.starts_with(rig.dir())), [0; 0], "processes are left");
}

#[test]
fn a_running_pool_survives_kills() {
    survives(Staging::Running, false);
}

#[test]
fn a_suspended_pool_survives_kills() {
    survives(Staging::Suspended, false);
}

#[test]
fn a_stopped_pool_survives_kills() {
    survives(Staging::Stopped, false);
}

#[test]
fn a_pool_that_prespawns_survives_kills() {
    survives(Staging::Suspended, true);
    survives(Staging::Stopped, true);
}

#[test]
fn a_machine_of_a_pool_comes_again_under_its_name_and_has_nothing_of_what_it_was() {
    let Some(image) = base() else { return };
    let rig = QemuRig::forking(image);
    runtime().block_on(async {
        let pool = Pool::builder(rig.host(), rig.spec()).name("again").size(1).reuse(Reuse::Reset).build().unwrap();
        pool.start().await.unwrap();
        let lease = pool.acquire().timeout(PATIENCE).await.unwrap();
        let (name, birth) = (lease.id().clone(), lease.properties().birth.unwrap());
        let hide = "echo hidden > /secret; cp /secret /dev/shm/secret; sync";
        assert!(lease.command("/bin/sh").args(["-c", hide]).output().await.unwrap().status.success());
        lease.delete().await.unwrap();

        // Whoever has it still has nothing of the next.
        let next = pool.acquire().timeout(PATIENCE).await.unwrap();
        assert_eq!((next.id(), next.state()), (&name, State::Running));
        drop((lease.kill().await, lease.stop(Duration::ZERO).await));
        assert_eq!(lease.delete().await.ok(), Some(()));
        assert_eq!((lease.state(), lease.properties().pid), (State::Deleted, None));
        let look = next.command("/bin/sh").args(["-c", "cat /secret /dev/shm/secret"]).output().await.unwrap();
        assert!(!look.status.success() && look.stdout.is_empty(), "{look:?}");
        let new = next.properties().birth.unwrap();
        assert!(new.unused && new != birth, "{new:?}");
        drop((lease, next));
        assert!(pool.close(PATIENCE).await.is_clean());
    });
    assert_eq!(left(&rig), Vec::<String>::new());
}
