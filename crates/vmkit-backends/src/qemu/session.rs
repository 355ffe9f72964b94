//! A session on QEMU's control socket, as its `docs/interop/qmp-spec` has it: one object a line, a greeting, then commands, each with one
//! answer, and announcements in between.
//!
//! The commands are the `qapi` crate's, the session is not: what somebody asked who was killed, QEMU answers to whoever connects next. Each
//! session therefore has a name that no other has, each command is known by it, and what answers another is dropped.

use std::io;

use qapi::qmp::{MigrationStatus, QmpCommand};
use qapi::{Any, Execute};
use serde::Deserialize;
use serde::de::IgnoredAny;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tracing::debug;

/// One line of QEMU's.
#[derive(Deserialize)]
struct Message {
    #[serde(rename = "QMP")]
    greeting: Option<IgnoredAny>,
    id: Option<Any>,
    #[serde(rename = "return")]
    answer: Option<Any>,
    error: Option<Refusal>,
    event: Option<String>,
    #[serde(default)]
    data: Any,
}

#[derive(Deserialize)]
struct Refusal {
    desc: String,
}

/// Why a command has no answer.
#[derive(Debug)]
pub(super) enum Failure {
    /// QEMU does not do it, and says why. The session goes on.
    Refused(String),
    /// The session is over.
    Ended(io::Error),
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Failure {
        Failure::Ended(error)
    }
}

/// A session with a QEMU that has said that it is there.
pub(super) struct Session {
    lines: Lines<BufReader<OwnedReadHalf>>,
    to: OwnedWriteHalf,
    name: String,
    asked: u32,
    /// Whether saving or loading was announced to be over, since it was last asked for.
    announced: bool,
    /// Whether the guest was reset, by itself, since the session began.
    reset: bool,
}

impl Session {
    /// Waits for the greeting.
    pub async fn open(stream: UnixStream) -> io::Result<Session> {
        let mut name = [0; 8];
        rustix::rand::getrandom(&mut name, rustix::rand::GetRandomFlags::empty())?;
        Session::named(stream, format!("{:016x}", u64::from_ne_bytes(name))).await
    }

    /// `name`: no other session's.
    pub async fn named(stream: UnixStream, name: String) -> io::Result<Session> {
        let (from, to) = stream.into_split();
        let mut session =
            Session { lines: BufReader::new(from).lines(), to, name, asked: 0, announced: false, reset: false };
        while session.next().await?.greeting.is_none() {
            debug!("what was said before the greeting is for a session before this one");
        }
        Ok(session)
    }

    /// Not to be dropped before it is done, if the session is to go on.
    pub async fn execute<C: QmpCommand>(&mut self, command: C) -> Result<C::Ok, Failure> {
        let id = format!("{}.{}", self.name, self.asked);
        self.asked += 1;
        if matches!(C::NAME, "migrate" | "migrate-incoming") {
            self.announced = false;
        }
        let mut line = serde_json::to_vec(&Execute::with_id(command, &id)).map_err(io::Error::from)?;
        line.push(b'\n');
        self.to.write_all(&line).await?;
        loop {
            let message = self.next().await?;
            if message.event.is_some() {
                continue;
            }
            match message {
                Message { id: Some(Any::String(of)), answer: Some(answer), .. } if of == id => {
                    return C::Ok::deserialize(answer).map_err(|error| io::Error::from(error).into());
                }
                Message { id: Some(Any::String(of)), error: Some(error), .. } if of == id => {
                    return Err(Failure::Refused(error.desc));
                }
                Message { id: other, .. } => debug!(?other, "an answer to a session before this one"),
            }
        }
    }

    /// Waits until saving or loading that was asked for is over, however it went: once it was announced, at once. Cancel-safe.
    pub async fn announced(&mut self) -> io::Result<()> {
        while !self.announced {
            self.next().await?;
        }
        Ok(())
    }

    /// Waits until the guest was reset, by itself: it reboots. Cancel-safe.
    pub async fn reset(&mut self) -> io::Result<()> {
        while !self.reset {
            self.next().await?;
        }
        Ok(())
    }

    /// Cancel-safe.
    async fn next(&mut self) -> io::Result<Message> {
        let line = self.lines.next_line().await?.ok_or(io::ErrorKind::UnexpectedEof)?;
        let message: Message = serde_json::from_str(&line)?;
        self.reset |= message.event.as_deref() == Some("RESET") && message.data.get("guest") == Some(&Any::Bool(true));
        if message.event.as_deref() == Some("MIGRATION") {
            let status = message.data.get("status").map(MigrationStatus::deserialize);
            self.announced |= matches!(
                status,
                Some(Ok(MigrationStatus::completed | MigrationStatus::failed | MigrationStatus::cancelled))
            );
        }
        Ok(message)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use qapi::qmp;

    const GREETING: &str = r#"{"QMP": {"version": {}, "capabilities": ["oob"]}}"#;

    /// A session named "us", with a QEMU that says this.
    async fn session(said: &str) -> (Session, UnixStream) {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.write_all(said.as_bytes()).await.unwrap();
        (Session::named(ours, "us".into()).await.unwrap(), theirs)
    }

    #[tokio::test]
    async fn answers_to_others_are_nobodys() {
        let before = r#"{"return": {}, "id": 1}"#;
        let late = [
            r#"{"return": {}, "id": 0}"#,
            r#"{"return": {}, "id": "them.0"}"#,
            r#"{"error": {"class": "GenericError", "desc": "to them"}, "id": "them.1"}"#,
            r#"{"error": {"class": "GenericError", "desc": "to nobody"}}"#,
            r#"{"return": {}}"#,
            r#"{"event": "SOMETHING_NEW", "data": {"of": 2031}, "timestamp": {}}"#,
            r#"{"return": [], "id": "us.0"}"#,
            r#"{"error": {"class": "GenericError", "desc": "not now"}, "id": "us.1"}"#,
        ];
        let (mut session, _theirs) = session(&format!("{before}\n{GREETING}\n{}\n", late.join("\n"))).await;
        assert_eq!(session.execute(qmp::query_yank {}).await.unwrap().len(), 0);
        let refused = session.execute(qmp::stop {}).await.unwrap_err();
        assert!(matches!(&refused, Failure::Refused(why) if why == "not now"), "{refused:?}");
    }

    #[tokio::test]
    async fn two_sessions_have_two_names() {
        let open = async || {
            let (ours, mut theirs) = UnixStream::pair().unwrap();
            theirs.write_all(format!("{GREETING}\n").as_bytes()).await.unwrap();
            Session::open(ours).await.unwrap().name
        };
        assert_ne!(open().await, open().await);
    }

    #[tokio::test]
    async fn a_guest_that_resets_itself_is_told_from_one_that_is_reset() {
        let event = |guest| format!("{{\"event\": \"RESET\", \"data\": {{\"guest\": {guest}, \"reason\": \"x\"}}}}\n");
        let (mut ours, mut theirs) = session(&format!("{GREETING}\n{}", event(false))).await;
        theirs.shutdown().await.unwrap();
        assert_eq!(ours.reset().await.unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
        let said = [event(true), "{\"return\": {}, \"id\": \"us.0\"}\n".to_owned()];
        let (mut ours, _theirs) = session(&format!("{GREETING}\n{}", said.concat())).await;
        ours.execute(qmp::stop {}).await.unwrap();
        ours.reset().await.unwrap();
    }

    #[tokio::test]
    async fn what_is_announced_before_it_is_asked_about_is_not_missed_and_nothing_of_what_was_before() {
        let event = |status| format!("{{\"event\": \"MIGRATION\", \"data\": {{\"status\": \"{status}\"}}}}\n");
        let answer = |number| format!("{{\"return\": {{}}, \"id\": \"us.{number}\"}}\n");
        let said = [event("active"), event("completed"), answer(0), event("failed"), answer(1), event("of the future")];
        let (mut session, mut theirs) = session(&format!("{GREETING}\n{}", said.concat())).await;
        session.execute(qmp::stop {}).await.unwrap();
        session.announced().await.unwrap();
        let uri = Some("file:state".to_owned());
        session.execute(qmp::migrate { channels: None, detach: None, resume: None, uri }).await.unwrap();
        session.announced().await.unwrap();
        // What is asked for again is not over yet, and then never is.
        session.announced = false;
        theirs.shutdown().await.unwrap();
        assert_eq!(session.announced().await.unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }
}
