//! The programs that every simulated guest has.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt;
use futures::future::BoxFuture;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};

use super::fault::Broken;
use super::guest::Memory;
use super::world::World;
use crate::error::{Error, ErrorKind, Result};
use crate::guest::ExitStatus;
use crate::spec::Id;

const PROGRAMS: [&str; 23] = [
    "echo", "warn", "cat", "store", "remember", "recall", "counter", "true", "false", "exit", "signal", "sleep", "env",
    "pwd", "whoami", "hostname", "yes", "produce", "family", "alive", "sh", "kill", "uname",
];
/// A write to a stream that nobody reads any more.
const PIPE: ExitStatus = ExitStatus::Signal(13);

/// What a program is given.
pub(super) struct Context {
    pub world: World,
    pub id: Id,
    pub memory: Arc<Memory>,
    pub group: u32,
    pub broken: BTreeSet<Broken>,
    pub env: Vec<(String, String)>,
    pub cwd: Option<PathBuf>,
    pub user: Option<String>,
    pub stdin: Option<DuplexStream>,
    pub stdout: Option<DuplexStream>,
    pub stderr: Option<DuplexStream>,
}

/// Whether a program can be executed.
pub(super) fn find(program: &str) -> Result<()> {
    if program.starts_with("/etc/") {
        return Err(Error::new(ErrorKind::PermissionDenied, format!("{program} cannot be executed")));
    }
    if PROGRAMS.contains(&name(program)) {
        return Ok(());
    }
    Err(Error::new(ErrorKind::NotFound, format!("there is no program {program}")))
}

/// A program's name; known ones are in `/bin` and `/usr/bin` as well.
fn name(program: &str) -> &str {
    program.strip_prefix("/usr/bin/").or_else(|| program.strip_prefix("/bin/")).unwrap_or(program)
}

/// Runs a program to its end.
pub(super) async fn run(mut context: Context, program: String, args: Vec<String>) -> ExitStatus {
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    context.execute(name(&program), &args).await.unwrap_or(PIPE)
}

type Ended = std::io::Result<ExitStatus>;

impl Context {
    fn execute<'a>(&'a mut self, program: &'a str, args: &'a [&'a str]) -> BoxFuture<'a, Ended> {
        async move {
            let first = args.first().copied().unwrap_or_default();
            let code = match program {
                "echo" => match args.split_first() {
                    Some((&"-n", rest)) => self.print(&rest.join(" ")).await?,
                    _ => self.print(&format!("{}\n", args.join(" "))).await?,
                },
                "warn" => self.warn(&format!("{}\n", args.join(" "))).await?,
                "cat" => self.cat(args).await?,
                "store" => {
                    let text = args.get(1..).unwrap_or_default().join(" ").into_bytes();
                    self.world.change(|hw| hw.unit(&self.id).files.insert(first.to_owned(), text));
                    0
                }
                "remember" => {
                    self.memory.remember(first, &args.get(1..).unwrap_or_default().join(" "));
                    0
                }
                "recall" => match self.memory.recall(first) {
                    Some(value) => self.print(&format!("{value}\n")).await?,
                    None => 1,
                },
                "counter" => {
                    let count = self.memory.count();
                    self.print(&format!("{count}\n")).await?
                }
                "true" => 0,
                "false" => 1,
                "exit" => first.parse::<i32>().map_or(2, |code| code & 0xff),
                "signal" => return Ok(first.parse().map_or(ExitStatus::Code(2), ExitStatus::Signal)),
                "kill" => match (first.strip_prefix('-').and_then(|signal| signal.parse().ok()), args.get(1)) {
                    (Some(signal), Some(&"$$")) => return Ok(ExitStatus::Signal(signal)),
                    _ => 2,
                },
                "sleep" => match first.parse::<f64>().ok().and_then(|time| Duration::try_from_secs_f64(time).ok()) {
                    Some(time) => {
                        tokio::time::sleep(time).await;
                        0
                    }
                    None if first == "infinity" => std::future::pending().await,
                    None => 1,
                },
                "env" => self.env(args.first().copied()).await?,
                "pwd" => {
                    let ignored = self.broken.contains(&Broken::IgnoresCwd);
                    let cwd = self.cwd.clone().filter(|_| !ignored).unwrap_or_else(|| PathBuf::from("/"));
                    self.print(&format!("{}\n", cwd.display())).await?
                }
                "hostname" => {
                    let name = self.memory.hostname().unwrap_or_else(|| self.id.to_string());
                    self.print(&format!("{name}\n")).await?
                }
                "whoami" => {
                    let user = self.user.clone().unwrap_or_else(|| "root".to_owned());
                    let user = user.split(':').next().unwrap_or_default().to_owned();
                    self.print(&format!("{user}\n")).await?
                }
                "uname" => self.print("Linux sim\n").await?,
                "yes" => loop {
                    self.print("y\n").await?;
                    // Nobody may be listening at all: do not keep the thread.
                    tokio::task::yield_now().await;
                },
                "produce" => self.produce(first.parse().unwrap_or(0)).await?,
                "family" => {
                    let child = self.memory.enter(Some(self.group), false);
                    let pid = child.pid;
                    let child = tokio::spawn(child.run(std::future::pending()));
                    self.print(&format!("{pid}\n")).await?;
                    let _ = child.await;
                    0
                }
                "alive" => i32::from(!first.parse().is_ok_and(|pid| self.memory.is_alive(pid))),
                "sh" => return self.script(args.get(1).copied().unwrap_or_default()).await,
                _ => 127,
            };
            Ok(ExitStatus::Code(code))
        }
        .boxed()
    }

    async fn script(&mut self, script: &str) -> Ended {
        let mut last = ExitStatus::Code(0);
        for line in script.split(';').map(str::trim).filter(|line| !line.is_empty()) {
            let (line, to_stderr) = match line.strip_suffix(">&2") {
                Some(line) => (line, true),
                None => (line, false),
            };
            let words: Vec<&str> = line.split_whitespace().map(|word| word.trim_matches(['\'', '"'])).collect();
            let Some((&program, args)) = words.split_first() else { continue };
            last = match program {
                "echo" if to_stderr => self.execute("warn", args).await?,
                _ if find(program).is_err() => ExitStatus::Code(127),
                _ => self.execute(name(program), args).await?,
            };
            if matches!(program, "exit") || last.signal().is_some() {
                break;
            }
        }
        Ok(last)
    }

    async fn cat(&mut self, files: &[&str]) -> std::io::Result<i32> {
        for file in files {
            let found = self.world.look(|hw| hw.units.get(&self.id).and_then(|unit| unit.files.get(*file).cloned()));
            match found {
                Some(bytes) => self.write(&bytes).await?,
                None => {
                    self.warn(&format!("cat: {file}: no such file\n")).await?;
                    return Ok(1);
                }
            }
        }
        if !files.is_empty() {
            return Ok(0);
        }
        let Some(mut stdin) = self.stdin.take() else { return Ok(0) };
        let mut buffer = vec![0; 16 * 1024];
        loop {
            match stdin.read(&mut buffer).await? {
                0 => return Ok(0),
                read => self.write(&buffer[..read]).await?,
            }
        }
    }

    async fn env(&mut self, wanted: Option<&str>) -> std::io::Result<i32> {
        if self.broken.contains(&Broken::IgnoresEnv) {
            return Ok(1);
        }
        let env = self.env.clone();
        match wanted {
            Some(wanted) => match env.iter().rev().find(|(key, _)| key == wanted) {
                Some((_, value)) => self.print(&format!("{value}\n")).await,
                None => Ok(1),
            },
            None => {
                for (key, value) in env {
                    self.print(&format!("{key}={value}\n")).await?;
                }
                Ok(0)
            }
        }
    }

    async fn produce(&mut self, mut bytes: usize) -> std::io::Result<i32> {
        let chunk = [b'x'; 16 * 1024];
        while bytes > 0 {
            let part = bytes.min(chunk.len());
            self.write(&chunk[..part]).await?;
            bytes -= part;
        }
        Ok(0)
    }

    async fn print(&mut self, text: &str) -> std::io::Result<i32> {
        self.write(text.as_bytes()).await.map(|()| 0)
    }

    async fn warn(&mut self, text: &str) -> std::io::Result<i32> {
        if self.broken.contains(&Broken::ExecMergesStreams) {
            return self.print(text).await;
        }
        match &mut self.stderr {
            Some(stderr) => stderr.write_all(text.as_bytes()).await.map(|()| 0),
            None => Ok(0),
        }
    }

    async fn write(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        let Some(stdout) = &mut self.stdout else { return Ok(()) };
        let masked: Vec<u8>;
        let bytes = if self.broken.contains(&Broken::SevenBit) {
            masked = bytes.iter().map(|byte| byte & 0x7f).collect();
            &masked
        } else {
            bytes
        };
        if self.broken.contains(&Broken::DropsOutput) {
            // What does not fit now is thrown away.
            return match tokio::time::timeout(Duration::ZERO, stdout.write_all(bytes)).await {
                Ok(written) => written,
                Err(_) => Ok(()),
            };
        }
        stdout.write_all(bytes).await
    }
}
