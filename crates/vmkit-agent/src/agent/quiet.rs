//! What an idle guest's agent does without the runtime.
//!
//! A guest that goes on from a saved execution does everything for the first time again, and a runtime's way from an event to who
//! waits for it is as long as most of what is asked for. While there is nothing but one line to be served, whoever serves it keeps
//! the thread, waits in place, and is polled again:
//!
//! ```text
//!  runtime ─▶ a line's task ─▶ nothing to do ─▶ anybody else? ─ no ─▶ wait: this line, a child, a chore
//!                 ▲                                  │ yes                 │        │ another line
//!                 │                               runtime ◀────────────────┼────────┘
//!                 └────────────────────────────────────────────────────────┘
//! ```
//!
//! Whoever needs the runtime for more than the next turn, or has others do something there, or uses a timer, holds a [`Busy`].

use std::os::fd::{AsFd, OwnedFd};
use std::pin::pin;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};
use std::{future, io};

use rustix::event::{Timespec, epoll};
use rustix::io::Errno;
use tokio::task::{unconstrained, yield_now};
use tokio::time::sleep_until;

use super::{Inner, shutdown};

/// A child has ended.
const CHILD: u64 = 0;
/// Something that only the runtime knows what to do with.
const OTHER: u64 = 1;
/// The first line; each has a number of its own.
const LINES: u64 = 2;
/// The number of no line, and of one that never keeps the thread.
pub(super) const NONE: u64 = 0;
/// Turns that the others have before the thread is kept: what one of them begins may be another's to end.
const TURNS: usize = 3;

pub(super) struct Quiet {
    /// Everything that may happen to an idle agent. Each tells of itself once.
    events: OwnedFd,
    busy: Arc<AtomicUsize>,
    /// How many lines there were.
    lines: AtomicU64,
    /// The line that waits for a child; nobody else keeps the thread meanwhile. [`NONE`] if there is none.
    waits: Arc<AtomicU64>,
    /// Nobody but who keeps the thread is polled.
    kept: AtomicBool,
    /// How often it was kept.
    times: AtomicU64,
    /// When who keeps it wants to be polled again at the latest.
    until: Mutex<Option<Instant>>,
}

/// Held by whoever needs the runtime.
pub(super) struct Busy(Arc<AtomicUsize>);

impl Drop for Busy {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Held while a line waits for a child.
pub(super) enum Waits {
    Alone(Arc<AtomicU64>),
    Busy(#[expect(dead_code, reason = "held")] Busy),
}

impl Drop for Waits {
    fn drop(&mut self) {
        if let Waits::Alone(waits) = self {
            waits.store(NONE, Ordering::Relaxed);
        }
    }
}

enum Event {
    Own,
    Child,
    Other,
    /// Time has passed, or nothing happened.
    Nothing,
}

impl Quiet {
    pub fn new() -> io::Result<Quiet> {
        Ok(Quiet {
            events: epoll::create(epoll::CreateFlags::CLOEXEC)?,
            busy: Arc::default(),
            lines: AtomicU64::new(LINES),
            waits: Arc::new(AtomicU64::new(NONE)),
            kept: AtomicBool::new(false),
            times: AtomicU64::new(0),
            until: Mutex::default(),
        })
    }

    pub fn busy(&self) -> Busy {
        self.busy.fetch_add(1, Ordering::Relaxed);
        Busy(self.busy.clone())
    }

    /// A line is about to wait for a child: the thread may be kept for it, and for nobody else.
    pub fn waits(&self, line: u64) -> Waits {
        let alone =
            line != NONE && self.waits.compare_exchange(NONE, line, Ordering::Relaxed, Ordering::Relaxed).is_ok();
        if alone { Waits::Alone(self.waits.clone()) } else { Waits::Busy(self.busy()) }
    }

    /// What is told of children.
    pub fn watch_children(&self, counter: impl AsFd) -> io::Result<()> {
        self.watch(counter, CHILD)
    }

    /// What the runtime waits for without being busy.
    pub fn watch_other(&self, other: impl AsFd) -> io::Result<()> {
        self.watch(other, OTHER)
    }

    /// A line, which has the number that is returned.
    pub fn watch_line(&self, line: impl AsFd) -> io::Result<u64> {
        let number = self.lines.fetch_add(1, Ordering::Relaxed);
        self.watch(line, number).map(|()| number)
    }

    fn watch(&self, what: impl AsFd, number: u64) -> io::Result<()> {
        let interest = epoll::EventFlags::IN | epoll::EventFlags::OUT | epoll::EventFlags::ET;
        Ok(epoll::add(&self.events, what, epoll::EventData::new_u64(number), interest)?)
    }

    /// Whether nobody else is polled now.
    pub fn is_kept(&self) -> bool {
        self.kept.load(Ordering::Relaxed)
    }

    /// Whether nothing but this line needs anything.
    fn is_idle(&self, line: u64) -> bool {
        let waits = self.waits.load(Ordering::Relaxed);
        self.busy.load(Ordering::Relaxed) == 0 && (waits == NONE || waits == line) && !shutdown::is_asked()
    }

    /// A pause that needs no timer of the runtime while the thread is kept.
    pub async fn pause(&self, time: Duration) {
        let until = Instant::now() + time;
        let mut timer = None;
        future::poll_fn(|cx| {
            if Instant::now() >= until {
                return Poll::Ready(());
            }
            if self.is_kept() {
                let mut next = super::lock(&self.until);
                *next = Some(next.map_or(until, |next| next.min(until)));
                return Poll::Pending;
            }
            timer.get_or_insert_with(|| Box::pin(sleep_until(until.into()))).as_mut().poll(cx)
        })
        .await;
    }

    /// Waits in place.
    fn wait(&self, own: u64, until: Option<Instant>) -> Event {
        let left = until.map(|until| until.saturating_duration_since(Instant::now()));
        let timeout = left.map(|left| Timespec {
            tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: left.subsec_nanos().into(),
        });
        let mut list = Vec::with_capacity(1);
        match epoll::wait(&self.events, rustix::buffer::spare_capacity(&mut list), timeout.as_ref()) {
            // A handler's: of a child, or of somebody who wants the machine to end.
            Err(Errno::INTR) => return Event::Child,
            Err(_) => return Event::Other,
            Ok(_) => {}
        }
        match list.first().map(|event| event.data.u64()) {
            None => Event::Nothing,
            Some(CHILD) => Event::Child,
            Some(number) if number == own => Event::Own,
            Some(_) => Event::Other,
        }
    }
}

/// Serves a line, and keeps the thread for as long as nobody else has anything to do. `busy` is held until the first turn is over.
pub(super) async fn serve<F: Future>(agent: &Inner, line: u64, busy: Busy, served: F) -> F::Output {
    let quiet = &agent.quiet;
    // Turns are taken here: the runtime's own count of them would end the keeping, and nobody would notice.
    let mut served = pin!(unconstrained(served));
    let (mut cedes, mut busy) = (false, Some(busy));
    'served: loop {
        let done = future::poll_fn(|cx| match (served.as_mut().poll(cx), drop(busy.take())).0 {
            Poll::Ready(output) => Poll::Ready(Some(output)),
            Poll::Pending if quiet.is_idle(line) && !cedes => Poll::Ready(None),
            Poll::Pending => {
                // Something happens to this line, or the other one's task is over.
                cedes = false;
                Poll::Pending
            }
        });
        if let Some(output) = done.await {
            return output;
        }
        let kept = quiet.times.load(Ordering::Relaxed);
        for _ in 0..TURNS {
            yield_now().await;
            // Whoever kept the thread meanwhile did so for what others have not done yet, and may have heard of what is for this line.
            if kept != quiet.times.load(Ordering::Relaxed) {
                continue 'served;
            }
        }
        quiet.times.fetch_add(1, Ordering::Relaxed);
        quiet.kept.store(true, Ordering::Relaxed);
        let kept = future::poll_fn(|cx| Poll::Ready(keep(agent, line, served.as_mut(), cx))).await;
        quiet.kept.store(false, Ordering::Relaxed);
        agent.chores.tell();
        match kept {
            Ok(output) => return output,
            Err(other) => cedes = other,
        }
    }
}

/// Polls until the output is there. The error says whether another line is to be served.
fn keep<F: Future>(
    agent: &Inner,
    line: u64,
    mut served: std::pin::Pin<&mut F>,
    cx: &mut Context<'_>,
) -> Result<F::Output, bool> {
    let quiet = &agent.quiet;
    let mut first = true;
    loop {
        super::lock(&quiet.until).take();
        if let Poll::Ready(output) = served.as_mut().poll(cx) {
            return Ok(output);
        }
        if !quiet.is_idle(line) {
            return Err(false);
        }
        let until = [super::lock(&quiet.until).take(), agent.chores.next()].into_iter().flatten().min();
        match quiet.wait(line, until) {
            Event::Own => {}
            Event::Nothing => agent.chores.run(agent),
            Event::Child => agent.reaper.reap(),
            // The first may be of something that was done before.
            Event::Other => return Err(!first),
        }
        first = false;
    }
}
