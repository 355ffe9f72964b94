//! QEMU's control socket: a session for one operation, each command with a deadline.

use std::io;
use std::path::Path;
use std::time::{Duration, Instant};

use qapi::qmp::{
    self, FileMigrationArgs, JobStatus, MigrateSetParameters, MigrationAddress, MigrationCapability,
    MigrationCapabilityStatus, MigrationChannel, MigrationChannelType, MigrationStatus, QmpCommand, RunState,
    YankInstance,
};
use serde::{Deserialize, Serialize};
use tokio::net::UnixStream;
use tokio::time::{sleep, timeout};
use tracing::debug;
use vmkit::{Error, ErrorKind, Result};

use super::layout::QMP;
use super::session::{Failure, Session};

/// How long QEMU may take to answer one command. Its main loop is never busy for long.
const ANSWERS: Duration = Duration::from_secs(20);

/// How long a control session may take to begin before it is begun again.
const GREETS: Duration = Duration::from_secs(5);

/// How long a guest that is saved while it runs is to stand still for the last of its memory, milliseconds.
const STANDS_STILL: u64 = 10;

const SAVING: &str = "saving the machine's state";

/// Has QEMU take all its disks, or let them go. There since 10.0, and not in the library yet.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct SetActive {
    active: bool,
}

impl QmpCommand for SetActive {}

impl qapi::Command for SetActive {
    const NAME: &'static str = "blockdev-set-active";
    const ALLOW_OOB: bool = false;
    type Ok = qapi::Empty;
}

/// Where a saved execution has its memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Memory {
    /// In a file of its own.
    Elsewhere,
    /// In the saved state.
    Within,
    /// In what QEMU writes, which is taken apart as it comes (`split.rs`).
    Apart,
}

/// A negotiated session; nothing once a command was lost on it: its answer may still come.
pub(crate) struct Qmp(Option<Session>);

/// A QEMU that has said that it is there.
pub(crate) struct Greeted(Session);

impl Greeted {
    /// Waits for the greeting on a machine's socket.
    ///
    /// # Errors
    /// When nobody greets there.
    pub async fn connect(dir: &Path, name: &str) -> Result<Greeted> {
        let stream = super::socket::connect(dir, name).await.map_err(|error| {
            Error::new(ErrorKind::Backend, "QEMU's control socket cannot be reached").caused_by(error)
        })?;
        Greeted::new(Session::open(stream)).await
    }

    async fn new(session: impl Future<Output = io::Result<Session>>) -> Result<Greeted> {
        match timeout(ANSWERS, session).await {
            Ok(Ok(session)) => Ok(Greeted(session)),
            Ok(Err(error)) => Err(not_accepted().caused_by(error)),
            Err(_) => Err(late("greeting")),
        }
    }

    /// Begins a session.
    ///
    /// # Errors
    /// When what answers is not QEMU.
    pub async fn begin(self) -> Result<Qmp> {
        let mut qmp = Qmp(Some(self.0));
        match qmp.execute(qmp::qmp_capabilities { enable: None }).await {
            Ok(_) => Ok(qmp),
            Err(error) => Err(not_accepted().caused_by(error)),
        }
    }
}

fn not_accepted() -> Error {
    Error::new(ErrorKind::Backend, "QEMU did not accept a control session")
}

impl Qmp {
    /// Begins a session on a machine's socket.
    ///
    /// # Errors
    /// When nobody answers there.
    pub async fn connect(dir: &Path, name: &str) -> Result<Qmp> {
        Greeted::connect(dir, name).await?.begin().await
    }

    /// Begins a session on a socket that is connected.
    ///
    /// # Errors
    /// When what answers is not QEMU.
    pub async fn negotiate(stream: UnixStream) -> Result<Qmp> {
        Greeted::new(Session::open(stream)).await?.begin().await
    }

    /// Begins a session whose name the other end knows.
    #[cfg(any(test, feature = "fuzzing"))]
    pub async fn negotiate_as(stream: UnixStream, name: &str) -> Result<Qmp> {
        Greeted::new(Session::named(stream, name.into())).await?.begin().await
    }

    /// Tries until QEMU listens and answers. Whoever calls it watches whether QEMU lives, and for how long.
    pub async fn when_up(dir: &Path) -> Result<Qmp> {
        loop {
            if let Ok(stream) = super::socket::connect(dir, QMP).await {
                // A session that does not begin says nothing of the next one.
                match timeout(GREETS, Qmp::negotiate(stream)).await {
                    Ok(Ok(qmp)) => return Ok(qmp),
                    Ok(Err(error)) => debug!(%error, "beginning a control session again"),
                    Err(_) => debug!("a control session did not begin: trying again"),
                }
            }
            sleep(Duration::from_micros(500)).await;
        }
    }

    async fn execute<C: QmpCommand>(&mut self, command: C) -> Result<C::Ok> {
        // Taken, and given back when it was answered: a caller that goes away in between ends the session too.
        let Some(mut session) = self.0.take() else {
            return Err(Error::new(ErrorKind::Backend, format!("the control session ended before {}", C::NAME)));
        };
        match timeout(ANSWERS, session.execute(command)).await {
            Ok(Ok(answer)) => {
                self.0 = Some(session);
                Ok(answer)
            }
            Ok(Err(Failure::Refused(why))) => {
                self.0 = Some(session);
                Err(Error::new(ErrorKind::Backend, format!("QEMU refused {}", C::NAME)).caused_by(why))
            }
            Ok(Err(Failure::Ended(error))) => {
                Err(Error::new(ErrorKind::Backend, format!("QEMU ended the session at {}", C::NAME)).caused_by(error))
            }
            Err(_) => Err(late(C::NAME)),
        }
    }

    /// Lets the guest go on.
    pub async fn cont(&mut self) -> Result<()> {
        self.execute(qmp::cont {}).await.map(drop)
    }

    /// Lets a guest go on that was saved, or was to be; nothing if it runs. What QEMU has announced as saved has a moment's work left,
    /// in which it lets no guest go on.
    pub async fn go_on(&mut self) -> Result<()> {
        let until = Instant::now() + ANSWERS;
        loop {
            let info = self.execute(qmp::query_status {}).await?;
            match info.status {
                _ if info.running => return Ok(()),
                RunState::finish_migrate if Instant::now() < until => sleep(Duration::from_millis(1)).await,
                _ => return self.cont().await,
            }
        }
    }

    /// Returns when the guest has reset itself; never where the session ends before. Cancel-safe.
    pub async fn reset(&mut self) {
        if let Some(session) = &mut self.0
            && session.reset().await.is_ok()
        {
            return;
        }
        std::future::pending().await
    }

    /// Pauses the guest.
    pub async fn stop(&mut self) -> Result<()> {
        self.execute(qmp::stop {}).await.map(drop)
    }

    /// Presses the power button.
    pub async fn power_button(&mut self) -> Result<()> {
        self.execute(qmp::system_powerdown {}).await.map(drop)
    }

    /// Saves the execution to a URI of QEMU's, as [`take_memory`](Qmp::take_memory) said: the devices' state, where the memory is a
    /// file that stays where it is, and else the memory too. The guest stands still from then on.
    pub async fn save(&mut self, uri: &str, memory: Memory) -> Result<()> {
        if memory != Memory::Elsewhere {
            // Else what it writes meanwhile is saved again.
            self.stop().await?;
        }
        let uri = Some(uri.to_owned());
        self.execute(qmp::migrate { channels: None, detach: None, resume: None, uri }).await?;
        self.migrated(SAVING).await
    }

    /// Loads what [`save`](Qmp::save) wrote. Relative to QEMU's directory.
    pub async fn load(&mut self, file: &Path, memory: Memory) -> Result<()> {
        self.take_memory(memory).await?;
        // QEMU reads what it is told byte by byte, each with a turn of its loop: a third of a millisecond for a hundred.
        let (uri, channels) = match file.to_str().filter(|file| !file.contains(',')) {
            Some(file) => (Some(format!("file:{file}")), None),
            None => (None, Some(vec![to_file(file)?])),
        };
        self.execute(qmp::migrate_incoming { channels, exit_on_error: None, uri }).await?;
        self.migrated("loading the machine's state").await
    }

    /// Saves the execution, memory and all, to a URI of QEMU's while the guest runs: it stands still for the last of it, and then stands
    /// still until it is told to go on. One that writes faster than it can be saved for `patience`, or until `most` bytes are
    /// written, stands still for longer. Returns since when it stands still.
    pub async fn save_running(&mut self, uri: &str, patience: Duration, most: u64) -> Result<Instant> {
        self.take_memory(Memory::Within).await?;
        let limit = MigrateSetParameters { downtime_limit: Some(STANDS_STILL), ..MigrateSetParameters::default() };
        self.execute(qmp::migrate_set_parameters(limit)).await?;
        let uri = Some(uri.to_owned());
        self.execute(qmp::migrate { channels: None, detach: None, resume: None, uri }).await?;
        let until = Instant::now() + patience;
        let chase = Chase { until, most };
        if self.migrated_or(SAVING, Some(chase)).await? {
            let info = self.execute(qmp::query_migrate {}).await?;
            let downtime = Duration::from_millis(info.downtime.and_then(|ms| u64::try_from(ms).ok()).unwrap_or(0));
            return Ok(Instant::now().checked_sub(downtime).unwrap_or(until));
        }
        let since = Instant::now();
        self.stop().await?;
        self.migrated(SAVING).await?;
        Ok(since)
    }

    /// Ends saving that is under way, whoever began it.
    pub async fn save_no_more(&mut self) -> Result<()> {
        self.execute(qmp::migrate_cancel {}).await?;
        loop {
            match self.execute(qmp::query_migrate {}).await?.status {
                None
                | Some(
                    MigrationStatus::none
                    | MigrationStatus::completed
                    | MigrationStatus::failed
                    | MigrationStatus::cancelled,
                ) => return self.cleared().await,
                _ => sleep(Duration::from_millis(2)).await,
            }
        }
    }

    /// Takes what lies between a disk and its base into the disk.
    pub async fn flatten(&mut self, disk: &str, base: &str) -> Result<()> {
        // A QEMU that knows this has left its disks alone until the guest goes on, which it will not; an older one has not.
        match self.execute(SetActive { active: true }).await {
            Err(error) if self.0.is_none() => return Err(error),
            activated => drop(activated),
        }
        let job = "flatten".to_owned();
        self.execute(qmp::block_stream {
            job_id: Some(job.clone()),
            device: disk.to_owned(),
            base_node: Some(base.to_owned()),
            auto_dismiss: Some(false),
            auto_finalize: None,
            backing_file: None,
            backing_mask_protocol: None,
            base: None,
            bottom: None,
            filter_node_name: None,
            on_error: None,
            speed: None,
        })
        .await?;
        loop {
            let jobs = self.execute(qmp::query_jobs {}).await?;
            match jobs.into_iter().find(|other| other.id == job) {
                Some(done) if done.status == JobStatus::concluded => {
                    self.execute(qmp::job_dismiss { id: job }).await?;
                    return match done.error {
                        None => Ok(()),
                        Some(why) => {
                            Err(Error::new(ErrorKind::Backend, format!("copying the disk's layer failed: {why}")))
                        }
                    };
                }
                Some(_) => sleep(Duration::from_millis(1)).await,
                None => return Err(Error::new(ErrorKind::Backend, "copying the disk's layer has ended unseen")),
            }
        }
    }

    /// What is saved or loaded next has its memory there.
    pub async fn take_memory(&mut self, memory: Memory) -> Result<()> {
        let (capability, state) = (MigrationCapability::x_ignore_shared, memory == Memory::Elsewhere);
        let capabilities = vec![MigrationCapabilityStatus { capability, state }];
        self.execute(qmp::migrate_set_capabilities { capabilities }).await?;
        if memory != Memory::Elsewhere {
            // A file takes what it is given; the limit is for networks.
            let limit =
                MigrateSetParameters { max_bandwidth: Some(i64::MAX as u64), ..MigrateSetParameters::default() };
            self.execute(qmp::migrate_set_parameters(limit)).await?;
        }
        Ok(())
    }

    async fn migrated(&mut self, doing: &str) -> Result<()> {
        self.migrated_or(doing, None).await.map(drop)
    }

    /// Whether it is done, and not the chase over. QEMU announces that, which is when it is asked: an announcement may be missed, and may
    /// be one of what was done before.
    async fn migrated_or(&mut self, doing: &str, chase: Option<Chase>) -> Result<bool> {
        let mut patience = Duration::from_millis(2);
        loop {
            self.announced(patience).await;
            let info = self.execute(qmp::query_migrate {}).await?;
            match info.status {
                Some(MigrationStatus::completed) => return Ok(true),
                Some(MigrationStatus::failed | MigrationStatus::cancelled) => {
                    // Whether that went well or not: why it failed says more.
                    let _ = self.cleared().await;
                    let why = info.error_desc.unwrap_or_else(|| "QEMU does not say why".into());
                    return Err(Error::new(ErrorKind::Backend, format!("{doing} failed: {why}")));
                }
                _ => {}
            }
            let written = info.ram.and_then(|ram| u64::try_from(ram.transferred).ok()).unwrap_or(0);
            if chase.is_some_and(|Chase { until, most }| Instant::now() > until || written > most) {
                return Ok(false);
            }
            patience = (patience * 2).min(Duration::from_millis(20));
        }
    }

    /// Waits until nothing is left of saving that failed or was ended. QEMU announces that first, and has work left for a moment, in which
    /// it refuses to save again.
    async fn cleared(&mut self) -> Result<()> {
        let until = Instant::now() + ANSWERS;
        while self.execute(qmp::query_yank {}).await?.iter().any(|left| matches!(left, YankInstance::migration)) {
            if Instant::now() > until {
                return Err(late("ending what it saved"));
            }
            sleep(Duration::from_millis(1)).await;
        }
        Ok(())
    }

    /// Waits until QEMU announces that saving or loading is done, or has failed, at most that long.
    async fn announced(&mut self, patience: Duration) {
        if let Some(session) = &mut self.0 {
            // A session that has ended says so at the next command.
            let _ = timeout(patience, session.announced()).await;
        }
    }
}

/// How long a guest that runs is saved before it has to stand still.
#[derive(Clone, Copy)]
struct Chase {
    until: Instant,
    /// Bytes.
    most: u64,
}

/// Structured: in a URI, a path may have no commas.
fn to_file(file: &Path) -> Result<MigrationChannel> {
    let filename = file.to_str().ok_or_else(|| {
        Error::new(ErrorKind::InvalidArgument, format!("{} is not valid UTF-8", file.display()))
            .hint("use another state directory")
    })?;
    let addr = MigrationAddress::file(FileMigrationArgs { filename: filename.to_owned(), offset: 0 });
    Ok(MigrationChannel { addr, channel_type: MigrationChannelType::main })
}

fn late(doing: &str) -> Error {
    Error::new(ErrorKind::TimedOut, format!("QEMU took longer than {ANSWERS:?} for {doing}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};

    const GREETING: &str =
        r#"{"QMP": {"version": {"qemu": {"micro": 0, "minor": 0, "major": 10}, "package": ""}, "capabilities": []}}"#;

    /// Stands in for a QEMU: negotiates, answers with `answers` one after the other, and then dies at the next command.
    async fn qemu(stream: UnixStream, answers: &[&str]) {
        let (from, mut to) = stream.into_split();
        let mut commands = BufReader::new(from).lines();
        to.write_all(format!("{GREETING}\n").as_bytes()).await.unwrap();
        for answer in [r#""return": {}"#].iter().chain(answers) {
            let command: serde_json::Value =
                serde_json::from_str(&commands.next_line().await.unwrap().unwrap()).unwrap();
            let id = command.get("id").map(|id| format!(r#", "id": {id}"#)).unwrap_or_default();
            to.write_all(format!("{{{answer}{id}}}\n").as_bytes()).await.unwrap();
        }
        commands.next_line().await.unwrap();
    }

    #[tokio::test]
    async fn a_qemu_that_dies_is_an_error_at_every_command_from_then_on() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let refusal = r#""error": {"class": "GenericError", "desc": "not now"}"#;
        let qemu = tokio::spawn(async move { qemu(theirs, &[refusal, r#""return": {}"#]).await });
        let mut qmp = Qmp::negotiate(ours).await.unwrap();
        let refused = qmp.stop().await.unwrap_err();
        assert!(refused.message().contains("refused stop"), "{refused:?}");
        // A refusal does not end the session.
        qmp.stop().await.unwrap();
        let died = qmp.save("file:state", Memory::Elsewhere).await.unwrap_err();
        assert_eq!(died.kind(), ErrorKind::Backend, "{died:?}");
        // As calling off a suspend does.
        for _ in 0..2 {
            let ended = qmp.cont().await.unwrap_err();
            assert!(ended.message().contains("session ended"), "{ended:?}");
        }
        qemu.await.unwrap();
    }
}
