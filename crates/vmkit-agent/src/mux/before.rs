//! A host's session before it has begun: what needs none is asked for and answered with handshakes.

use std::collections::VecDeque;
use std::io;
use std::pin::{Pin, pin};

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::mpsc::UnboundedReceiver;
use tokio::sync::oneshot;

use super::{Told, Wanted};
use crate::client::nonce;
use crate::link::{Handshake, Kind, Link, VERSION};
use crate::protocol::{self, Answer};

/// Returns when a session is needed, with what is wanted of it; false when there will be none.
pub(super) async fn is_begun<S>(
    link: &Link<S>,
    wants: &mut UnboundedReceiver<Wanted>,
    waiting: &mut VecDeque<Wanted>,
) -> bool
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    loop {
        let wanted = match waiting.pop_front() {
            Some(wanted) => Some(wanted),
            None => tokio::select! {
                biased;
                wanted = wants.recv() => wanted,
                heard = link.heard() => match heard {
                    Ok(true) if !link.at_handshake() => return true,
                    Ok(true) => match link.next_handshake().await {
                        Ok(Some(said)) if said.kind != Kind::Up => continue,
                        Ok(Some(_)) => {
                            link.set_anew();
                            return false;
                        }
                        Ok(None) | Err(_) => return false,
                    },
                    // Also its end is to be known to whoever holds the session.
                    Ok(false) | Err(_) => return false,
                }
            },
        };
        match wanted {
            None => return false,
            // Who asked is not there any more: nothing is begun for nobody.
            Some(wanted) if wanted.is_given_up() => {}
            Some(Wanted::Said(reply)) => drop(reply.send(())),
            Some(Wanted::Answer(request, reply)) => match answer(link, request, reply, wants, waiting).await {
                Next::More => {}
                Next::Begins => return true,
                Next::Over => return false,
            },
            Some(wanted) => {
                waiting.push_front(wanted);
                return true;
            }
        }
    }
}

enum Next {
    /// There is no session yet.
    More,
    /// There is to be one.
    Begins,
    /// There will be none.
    Over,
}

/// Asks, and hands the answer over. What is wanted meanwhile has to wait, and the agent is told so.
async fn answer<S>(
    link: &Link<S>,
    request: Vec<u8>,
    mut reply: oneshot::Sender<Option<Told>>,
    wants: &mut UnboundedReceiver<Wanted>,
    waiting: &mut VecDeque<Wanted>,
) -> Next
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let frame = |kind, payload| Handshake { kind, version: VERSION, nonce: nonce(), payload };
    let ask = frame(Kind::Ask, request);
    if link.send_handshake(&ask).await.is_err() {
        return Next::Over;
    }
    // What is to be sent next: nothing can be said while something is being heard, and hearing is not broken off.
    let mut hurried = false;
    waiting.retain(|wanted| !wanted.is_given_up());
    if !waiting.is_empty() {
        hurried = true;
        if link.send_handshake(&frame(Kind::Ask, Vec::new())).await.is_err() {
            return Next::Over;
        }
    }
    let heard = loop {
        let mut next = pin!(link.next_handshake());
        let heard = loop {
            tokio::select! {
                biased;
                heard = &mut next => break heard,
                () = reply.closed() => return give_up(link, next, frame(Kind::Hello, Vec::new())).await,
                more = wants.recv() => match more {
                    None => return Next::Over,
                    Some(wanted) => waiting.push_back(wanted),
                },
            }
            if !std::mem::replace(&mut hurried, true)
                && link.send_handshake(&frame(Kind::Ask, Vec::new())).await.is_err()
            {
                return Next::Over;
            }
        };
        match heard {
            Ok(Some(said)) if said.kind == Kind::Answer && said.nonce == ask.nonce => break said.payload,
            Ok(Some(said)) if said.kind == Kind::Up => {
                link.set_anew();
                return Next::Over;
            }
            Ok(Some(_)) => {}
            Ok(None) | Err(_) => return Next::Over,
        }
    };
    // What cannot be read is nothing, and its asker says so.
    let answer: Answer = protocol::decode(&heard).unwrap_or_default();
    let goes_on = answer.goes_on;
    let (taken, is_taken) = oneshot::channel();
    let told = reply.send(Some(Told { answer, taken })).is_ok();
    if !goes_on {
        return Next::More;
    }
    match told && is_taken.await.is_ok() {
        true => Next::Begins,
        false => give_up(link, pin!(link.next_handshake()), frame(Kind::Hello, Vec::new())).await,
    }
}

/// Begins anew with the agent: what was begun for who is not there any more ends. `next` is being heard.
async fn give_up<S>(
    link: &Link<S>,
    mut next: Pin<&mut impl Future<Output = io::Result<Option<Handshake>>>>,
    hello: Handshake,
) -> Next
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    if link.send_handshake(&hello).await.is_err() {
        return Next::Over;
    }
    let mut heard = next.as_mut().await;
    loop {
        match heard {
            Ok(Some(said)) if said.kind == Kind::Ack && said.nonce == hello.nonce => return Next::More,
            Ok(Some(said)) if said.kind == Kind::Up => {
                link.set_anew();
                return Next::Over;
            }
            Ok(Some(_)) => heard = link.next_handshake().await,
            Ok(None) | Err(_) => return Next::Over,
        }
    }
}
