//! QEMU's control socket: a session for one operation, each command with a deadline.

use std::path::Path;
use std::time::Duration;

use qapi::ExecuteError;
use qapi::futures::{QapiStream, QmpStreamTokio};
use qapi::qmp::{
    self, FileMigrationArgs, MigrateSetParameters, MigrationAddress, MigrationCapability, MigrationCapabilityStatus,
    MigrationChannel, MigrationChannelType, MigrationStatus,
};
use tokio::io::{ReadHalf, WriteHalf};
use tokio::net::UnixStream;
use tokio::time::{sleep, timeout};
use tracing::debug;
use vmkit::{Error, ErrorKind, Result};

use super::layout::QMP;

/// How long QEMU may take to answer one command. Its main loop is never busy for long.
const ANSWERS: Duration = Duration::from_secs(20);

/// How long a control session may take to begin before it is begun again.
const GREETS: Duration = Duration::from_secs(5);

type Reader = QmpStreamTokio<ReadHalf<UnixStream>>;
type Writer = QmpStreamTokio<WriteHalf<UnixStream>>;

/// Where a saved execution has its memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Memory {
    /// In a file of its own.
    Elsewhere,
    /// In the saved state.
    Within,
}

/// A negotiated session; nothing once a command was lost on it, which nobody can tell from its answer being late.
pub(crate) struct Qmp(Option<QapiStream<Reader, Writer>>);

impl Qmp {
    /// Begins a session on a machine's socket.
    ///
    /// # Errors
    /// When nobody answers there.
    pub async fn connect(dir: &Path, name: &str) -> Result<Qmp> {
        let stream = super::socket::connect(dir, name).await.map_err(|error| {
            Error::new(ErrorKind::Backend, "QEMU's control socket cannot be reached").caused_by(error)
        })?;
        Qmp::negotiate(stream).await
    }

    /// Begins a session on a socket that is connected.
    ///
    /// # Errors
    /// When what answers is not QEMU.
    pub async fn negotiate(stream: UnixStream) -> Result<Qmp> {
        let session = async { QmpStreamTokio::open(stream).await?.negotiate().await };
        match timeout(ANSWERS, session).await {
            Ok(Ok(stream)) => Ok(Qmp(Some(stream))),
            Ok(Err(error)) => {
                Err(Error::new(ErrorKind::Backend, "QEMU did not accept a control session").caused_by(error))
            }
            Err(_) => Err(late("negotiating")),
        }
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

    async fn execute<C>(&mut self, command: C) -> Result<C::Ok>
    where
        C: qapi::qmp::QmpCommand,
    {
        // Taken, and given back when it was answered: a caller that goes away in between ends the session too.
        let Some(mut session) = self.0.take() else {
            return Err(Error::new(ErrorKind::Backend, format!("the control session ended before {}", C::NAME)));
        };
        match timeout(ANSWERS, session.execute(command)).await {
            Ok(Ok(answer)) => {
                self.0 = Some(session);
                Ok(answer)
            }
            Ok(Err(ExecuteError::Qapi(error))) => {
                self.0 = Some(session);
                Err(Error::new(ErrorKind::Backend, format!("QEMU refused {}", C::NAME)).caused_by(error.to_string()))
            }
            Ok(Err(ExecuteError::Io(error))) => {
                Err(Error::new(ErrorKind::Backend, format!("QEMU ended the session at {}", C::NAME)).caused_by(error))
            }
            Err(_) => Err(late(C::NAME)),
        }
    }

    /// Whether the guest's processors run.
    pub async fn is_running(&mut self) -> Result<bool> {
        Ok(self.execute(qmp::query_status {}).await?.running)
    }

    /// Lets the guest go on.
    pub async fn cont(&mut self) -> Result<()> {
        self.execute(qmp::cont {}).await.map(drop)
    }

    /// Pauses the guest.
    pub async fn stop(&mut self) -> Result<()> {
        self.execute(qmp::stop {}).await.map(drop)
    }

    /// Presses the power button.
    pub async fn power_button(&mut self) -> Result<()> {
        self.execute(qmp::system_powerdown {}).await.map(drop)
    }

    /// Saves the execution to a file in QEMU's directory: the devices' state, where the memory is a file that stays where it is,
    /// and else the memory too.
    pub async fn save(&mut self, file: &str, memory: Memory) -> Result<()> {
        self.take_memory(memory).await?;
        let uri = Some(format!("file:{file}"));
        self.execute(qmp::migrate { channels: None, detach: None, resume: None, uri }).await?;
        self.migrated("saving the machine's state").await
    }

    /// Loads what [`save`](Qmp::save) wrote. Relative to QEMU's directory.
    pub async fn load(&mut self, file: &Path, memory: Memory) -> Result<()> {
        self.take_memory(memory).await?;
        let filename = file.to_str().ok_or_else(|| {
            Error::new(ErrorKind::InvalidArgument, format!("{} is not valid UTF-8", file.display()))
                .hint("use another state directory")
        })?;
        // Structured: in a URI, a path may have no commas.
        let addr = MigrationAddress::file(FileMigrationArgs { filename: filename.to_owned(), offset: 0 });
        let channels = Some(vec![MigrationChannel { addr, channel_type: MigrationChannelType::main }]);
        self.execute(qmp::migrate_incoming { channels, exit_on_error: None, uri: None }).await?;
        self.migrated("loading the machine's state").await
    }

    async fn take_memory(&mut self, memory: Memory) -> Result<()> {
        let state = memory == Memory::Elsewhere;
        let capability = MigrationCapabilityStatus { capability: MigrationCapability::x_ignore_shared, state };
        self.execute(qmp::migrate_set_capabilities { capabilities: vec![capability] }).await?;
        if memory == Memory::Within {
            // A file takes what it is given; the limit is for networks.
            let limit =
                MigrateSetParameters { max_bandwidth: Some(i64::MAX as u64), ..MigrateSetParameters::default() };
            self.execute(qmp::migrate_set_parameters(limit)).await?;
        }
        Ok(())
    }

    /// Asked again and again: the event that announces it may be missed, the answer to a question cannot.
    async fn migrated(&mut self, doing: &str) -> Result<()> {
        let mut pause = Duration::from_micros(200);
        loop {
            let info = self.execute(qmp::query_migrate {}).await?;
            match info.status {
                Some(MigrationStatus::completed) => return Ok(()),
                Some(MigrationStatus::failed | MigrationStatus::cancelled) => {
                    let why = info.error_desc.unwrap_or_else(|| "QEMU does not say why".into());
                    return Err(Error::new(ErrorKind::Backend, format!("{doing} failed: {why}")));
                }
                _ => {}
            }
            sleep(pause).await;
            pause = (pause * 2).min(Duration::from_millis(20));
        }
    }
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
        let died = qmp.save("state", Memory::Elsewhere).await.unwrap_err();
        assert_eq!(died.kind(), ErrorKind::Backend, "{died:?}");
        // As calling off a suspend does.
        for _ in 0..2 {
            let ended = qmp.cont().await.unwrap_err();
            assert!(ended.message().contains("session ended"), "{ended:?}");
        }
        qemu.await.unwrap();
    }
}
