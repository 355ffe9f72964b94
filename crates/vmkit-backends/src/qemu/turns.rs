//! Turns: whoever asks a guest for something brief when many do is served one after the other, as many at a time as the host
//! has processors. Served all at once, each would have a small share of a processor, all of them would be done late, and each
//! would find its caches full of another's.
//!
//! A turn only orders what is done, and never keeps it from being done: it is given back after [`HOLD`], so a guest that does
//! not answer holds nobody up for long, and nobody waits much longer than [`WAITS`].

use std::collections::VecDeque;
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::{Instant, sleep_until, timeout};

/// How long a turn lasts at most.
const HOLD: Duration = Duration::from_millis(50);
/// After how long a question counts as a command: there may always be one more of those.
const AGES: Duration = Duration::from_secs(1);
/// How long somebody waits at most: the host is overloaded then, whatever the order.
const WAITS: Duration = Duration::from_secs(3);

/// What a turn is wanted for. The first goes first: whose machine was asked whether it is well is about to use it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Want {
    Command,
    Question,
}

/// Who has a turn, and who waits for one.
#[derive(Debug)]
pub(crate) struct Turns(Mutex<State>);

#[derive(Debug)]
struct State {
    free: usize,
    waiting: [VecDeque<oneshot::Sender<Turn>>; 2],
}

/// Passed on when it is dropped.
#[derive(Debug)]
struct Turn {
    turns: Arc<Turns>,
    since: Instant,
}

impl Turn {
    fn new(turns: &Arc<Turns>) -> Turn {
        Turn { turns: turns.clone(), since: Instant::now() }
    }

    fn ends(&self) -> Instant {
        self.since + HOLD
    }
}

impl Turns {
    pub fn new(count: usize) -> Arc<Turns> {
        Arc::new(Turns(Mutex::new(State { free: count, waiting: Default::default() })))
    }

    /// Those of this host, for everything in this process.
    fn of_host() -> Arc<Turns> {
        static TURNS: LazyLock<Arc<Turns>> =
            LazyLock::new(|| Turns::new(std::thread::available_parallelism().map_or(1, usize::from)));
        TURNS.clone()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A turn, in order; `None` when that takes too long.
    async fn take(self: &Arc<Turns>, want: Want) -> Option<Turn> {
        if want == Want::Question
            && let Ok(turn) = timeout(AGES, self.wait(want)).await
        {
            return turn;
        }
        timeout(WAITS, self.wait(Want::Command)).await.ok()?
    }

    async fn wait(self: &Arc<Turns>, want: Want) -> Option<Turn> {
        let turn = {
            let mut state = self.state();
            if state.free > 0 {
                state.free -= 1;
                return Some(Turn::new(self));
            }
            let (pass, turn) = oneshot::channel();
            state.waiting[want as usize].push_back(pass);
            turn
        };
        turn.await.ok()
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        let next = {
            let mut state = self.turns.state();
            let next = state.waiting.iter_mut().find_map(|line| {
                // Who has given up is passed over here, and not by one drop inside another.
                std::iter::from_fn(|| line.pop_front()).find(|next| !next.is_closed())
            });
            if next.is_none() {
                state.free += 1;
            }
            next
        };
        if let Some(next) = next {
            // One that is not received any more passes itself on.
            let _ = next.send(Turn::new(&self.turns));
        }
    }
}

/// One machine's place among the turns: what is done in it at the same time has one turn.
#[derive(Debug)]
pub(crate) struct Place {
    turns: Arc<Turns>,
    last: Mutex<Weak<Turn>>,
}

impl Place {
    pub fn new() -> Place {
        Place::among(Turns::of_host())
    }

    fn among(turns: Arc<Turns>) -> Place {
        Place { turns, last: Mutex::default() }
    }

    /// Does this when it is its turn.
    ///
    /// # Cancel safety
    /// Dropped at any instant, it gives up its place or its turn.
    pub async fn take<T>(&self, want: Want, work: impl Future<Output = T>) -> T {
        let Some(turn) = self.turn(want).await else { return work.await };
        tokio::pin!(work);
        tokio::select! {
            biased;
            done = &mut work => done,
            () = sleep_until(turn.ends()) => {
                drop(turn);
                work.await
            }
        }
    }

    async fn turn(&self, want: Want) -> Option<Arc<Turn>> {
        let last = || self.last.lock().unwrap_or_else(PoisonError::into_inner);
        let shared = last().upgrade().filter(|turn| Instant::now() < turn.ends());
        if shared.is_some() {
            return shared;
        }
        let turn = Arc::new(self.turns.take(want).await?);
        *last() = Arc::downgrade(&turn);
        Some(turn)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::task::yield_now;
    use tokio::time::sleep;

    /// Machines that share so many turns.
    fn places(turns: usize, count: usize) -> Vec<Arc<Place>> {
        let turns = Turns::new(turns);
        (0..count).map(|_| Arc::new(Place::among(turns.clone()))).collect()
    }

    fn free(place: &Place) -> usize {
        place.turns.state().free
    }

    #[tokio::test(start_paused = true)]
    async fn as_many_at_a_time_as_there_are_turns_and_in_order() {
        let places = places(2, 10);
        let (under_way, done) = (Arc::new(Mutex::new((0, 0))), Arc::new(Mutex::new(Vec::new())));
        let tasks: Vec<_> = places
            .iter()
            .cloned()
            .enumerate()
            .map(|(number, place)| {
                let (under_way, done) = (under_way.clone(), done.clone());
                tokio::spawn(async move {
                    let work = async {
                        {
                            let mut under_way = under_way.lock().unwrap();
                            under_way.0 += 1;
                            under_way.1 = under_way.1.max(under_way.0);
                        }
                        sleep(Duration::from_millis(10)).await;
                        under_way.lock().unwrap().0 -= 1;
                        done.lock().unwrap().push(number);
                    };
                    place.take(Want::Command, work).await;
                })
            })
            .collect();
        for task in tasks {
            task.await.unwrap();
        }
        assert_eq!(under_way.lock().unwrap().1, 2);
        assert_eq!(*done.lock().unwrap(), (0..10).collect::<Vec<_>>());
        assert_eq!(free(&places[0]), 2);
    }

    #[tokio::test(start_paused = true)]
    async fn commands_go_before_questions() {
        let places = places(1, 3);
        let order = Arc::new(Mutex::new(Vec::new()));
        let begin = |place: usize, want, word: &'static str| {
            let (place, order) = (places[place].clone(), order.clone());
            tokio::spawn(async move {
                let work = async {
                    sleep(Duration::from_millis(1)).await;
                    order.lock().unwrap().push(word);
                };
                place.take(want, work).await;
            })
        };
        let tasks = [
            begin(0, Want::Question, "first"),
            begin(1, Want::Question, "question"),
            begin(2, Want::Command, "command"),
        ];
        for task in tasks {
            task.await.unwrap();
        }
        assert_eq!(*order.lock().unwrap(), ["first", "command", "question"]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_guest_that_does_not_answer_gives_its_turn_back() {
        let places = places(1, 2);
        let hung = places[0].clone();
        let hung = tokio::spawn(async move { hung.take(Want::Command, std::future::pending::<()>()).await });
        yield_now().await;
        let since = Instant::now();
        places[1].take(Want::Question, async {}).await;
        assert_eq!(since.elapsed(), HOLD);
        assert!(!hung.is_finished(), "what it asked for goes on");
        assert_eq!(free(&places[1]), 1);
        hung.abort();
        assert!(hung.await.unwrap_err().is_cancelled());
        assert_eq!(free(&places[1]), 1, "a turn is not given back twice");
    }

    #[tokio::test(start_paused = true)]
    async fn who_gives_up_takes_no_turn_with_it() {
        let places = places(1, 4);
        let slow = places[0].clone();
        let slow = tokio::spawn(async move { slow.take(Want::Command, sleep(Duration::from_millis(20))).await });
        yield_now().await;
        let waiting: Vec<_> = places[1..3]
            .iter()
            .cloned()
            .map(|place| tokio::spawn(async move { place.take(Want::Command, async {}).await }))
            .collect();
        yield_now().await;
        for task in waiting {
            task.abort();
            assert!(task.await.unwrap_err().is_cancelled());
        }
        let since = Instant::now();
        places[3].take(Want::Command, async {}).await;
        assert_eq!(since.elapsed(), Duration::from_millis(20));
        slow.await.unwrap();
        assert_eq!(free(&places[3]), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn nobody_waits_for_ever() {
        let places = places(0, 1);
        for (want, waits) in [(Want::Command, WAITS), (Want::Question, AGES + WAITS)] {
            let since = Instant::now();
            places[0].take(want, async {}).await;
            assert_eq!(since.elapsed(), waits);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn commands_do_not_starve_a_question() {
        let places = places(1, 12);
        let busy: Vec<_> = (1..12)
            .map(|place| {
                let place = places[place].clone();
                tokio::spawn(async move {
                    loop {
                        place.take(Want::Command, sleep(Duration::from_millis(10))).await;
                    }
                })
            })
            .collect();
        yield_now().await;
        let since = Instant::now();
        places[0].take(Want::Question, async {}).await;
        // Its second begins behind those that wait then.
        assert!((AGES..AGES + Duration::from_millis(200)).contains(&since.elapsed()), "{:?}", since.elapsed());
        busy.iter().for_each(tokio::task::JoinHandle::abort);
    }

    #[tokio::test(start_paused = true)]
    async fn one_machine_has_one_turn() {
        let places = places(1, 2);
        let work = || places[0].take(Want::Command, sleep(Duration::from_millis(10)));
        let since = Instant::now();
        // The other machine's turn comes after both: they share theirs.
        tokio::join!(work(), async {
            yield_now().await;
            work().await;
        });
        assert_eq!(since.elapsed(), Duration::from_millis(10));
        assert_eq!(free(&places[1]), 1);
    }
}
