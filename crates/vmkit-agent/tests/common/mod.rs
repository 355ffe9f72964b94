//! An agent as a process of its own, and what is asked of it.
#![allow(dead_code, reason = "each test file uses a part")]

use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use tokio::io::AsyncReadExt;
use tokio::net::UnixStream;
use tokio::time::{sleep, timeout};
use vmkit_agent::client::{Client, Exec, ExecRequest, Exit};

/// Long enough for the slowest machine; only a hang reaches it.
pub const HANGS: Duration = Duration::from_secs(60);

pub struct Guest {
    pub agent: Child,
    pub dir: tempfile::TempDir,
}

impl Guest {
    pub fn start() -> Guest {
        let dir = tempfile::tempdir().unwrap();
        let agent = Command::new(env!("CARGO_BIN_EXE_vmkit-agent"))
            .arg("--listen")
            .arg(format!("unix:{}", dir.path().join("s").display()))
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        Guest { agent, dir }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub async fn line(&self) -> UnixStream {
        for _ in 0..1000 {
            if let Ok(line) = UnixStream::connect(self.path("s")).await {
                return line;
            }
            sleep(Duration::from_millis(5)).await;
        }
        panic!("the agent does not listen");
    }

    pub async fn connect(&self) -> Client {
        timeout(HANGS, Client::connect(self.line().await)).await.unwrap().unwrap()
    }

    /// Resident memory of the agent, KiB.
    pub fn resident(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.agent.id())).unwrap();
        let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
        line.split_ascii_whitespace().nth(1).unwrap().parse().unwrap()
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.agent.kill();
        let _ = self.agent.wait();
    }
}

pub fn sh(script: &str) -> ExecRequest {
    ExecRequest {
        program: "sh".into(),
        args: vec!["-c".into(), script.into()],
        stdout: true,
        stderr: true,
        ..ExecRequest::default()
    }
}

pub async fn finish(mut exec: Exec) -> (Exit, Vec<u8>, Vec<u8>) {
    let (mut out, mut err) = (Vec::new(), Vec::new());
    drop(exec.stdin.take());
    timeout(HANGS, async {
        if let Some(mut stdout) = exec.stdout.take() {
            stdout.read_to_end(&mut out).await.unwrap();
        }
        if let Some(mut stderr) = exec.stderr.take() {
            stderr.read_to_end(&mut err).await.unwrap();
        }
        (exec.control.wait().await.unwrap(), out, err)
    })
    .await
    .unwrap()
}

pub async fn run(client: &Client, request: ExecRequest) -> (Exit, Vec<u8>, Vec<u8>) {
    finish(timeout(HANGS, client.exec(request)).await.unwrap().unwrap()).await
}

pub fn alive(pid: u32) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/stat"))
        .is_ok_and(|stat| !stat[stat.rfind(')').unwrap()..].starts_with(") Z"))
}

pub async fn gone(pid: u32) -> bool {
    for _ in 0..2000 {
        if !alive(pid) {
            return true;
        }
        sleep(Duration::from_millis(5)).await;
    }
    false
}

/// The number that a script writes into a file.
pub async fn number(path: &std::path::Path) -> u32 {
    for _ in 0..4000 {
        if let Some(number) = std::fs::read_to_string(path).ok().and_then(|text| text.trim().parse().ok()) {
            return number;
        }
        sleep(Duration::from_millis(5)).await;
    }
    panic!("nothing was written to {}", path.display());
}
