//! Who waits, and in which order they are served: first come first served within a key, and by weight between keys.
//!
//! Each waiter is given a finish time in a virtual clock that runs with the service: one unit, divided by the weight of
//! its key, after the key's last one. The smallest is served next. With one key that is the order of arrival; with several,
//! none gets more than its share while others wait, however many it has in the queue.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

/// One unit of service for weight 1; large, so that weights divide it finely.
const UNIT: u64 = 1 << 20;

/// A place in the order. A waiter keeps it when what it was given turns out dead.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Turn {
    finish: u64,
    arrival: u64,
}

#[derive(Default)]
struct Share {
    waiting: usize,
    last: u64,
}

/// Waiters, each found by its ticket and served by its turn.
pub(super) struct Queue<W> {
    order: BTreeMap<Turn, Entry<W>>,
    turns: HashMap<u64, Turn>,
    shares: HashMap<Arc<str>, Share>,
    clock: u64,
    arrivals: u64,
}

struct Entry<W> {
    ticket: u64,
    key: Arc<str>,
    waiter: W,
}

impl<W> Queue<W> {
    pub(super) fn new() -> Queue<W> {
        Queue { order: BTreeMap::new(), turns: HashMap::new(), shares: HashMap::new(), clock: 0, arrivals: 0 }
    }

    pub(super) fn len(&self) -> usize {
        self.order.len()
    }

    pub(super) fn push(&mut self, ticket: u64, key: Arc<str>, weight: u32, waiter: W) {
        let share = self.shares.entry(key.clone()).or_default();
        let finish = share.last.max(self.clock) + UNIT / u64::from(weight.max(1));
        share.last = finish;
        self.arrivals += 1;
        let turn = Turn { finish, arrival: self.arrivals };
        self.put_back(ticket, key, turn, waiter);
    }

    /// The turn of somebody who is served at once, since nobody waits.
    pub(super) fn pass(&mut self, weight: u32) -> Turn {
        self.clock += UNIT / u64::from(weight.max(1));
        self.arrivals += 1;
        Turn { finish: self.clock, arrival: self.arrivals }
    }

    /// Takes up the place again that a waiter had.
    pub(super) fn put_back(&mut self, ticket: u64, key: Arc<str>, turn: Turn, waiter: W) {
        self.shares.entry(key.clone()).or_default().waiting += 1;
        self.turns.insert(ticket, turn);
        self.order.insert(turn, Entry { ticket, key, waiter });
    }

    /// Whoever is served next.
    pub(super) fn pop(&mut self) -> Option<(Turn, W)> {
        let (turn, entry) = self.order.pop_first()?;
        self.clock = self.clock.max(turn.finish);
        self.turns.remove(&entry.ticket);
        self.leave(&entry.key);
        Some((turn, entry.waiter))
    }

    pub(super) fn remove(&mut self, ticket: u64) -> Option<W> {
        let turn = self.turns.remove(&ticket)?;
        let entry = self.order.remove(&turn)?;
        self.leave(&entry.key);
        Some(entry.waiter)
    }

    /// How many are before it. Linear: asked by people, not on the way of a machine.
    pub(super) fn ahead(&self, ticket: u64) -> Option<usize> {
        let turn = self.turns.get(&ticket)?;
        Some(self.order.range(..turn).count())
    }

    /// A key with nobody in the queue owes nothing and is owed nothing; so the table does not grow with the callers.
    fn leave(&mut self, key: &Arc<str>) {
        if let Some(share) = self.shares.get_mut(key) {
            share.waiting -= 1;
            if share.waiting == 0 {
                self.shares.remove(key);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn drain(queue: &mut Queue<u64>) -> Vec<u64> {
        std::iter::from_fn(|| queue.pop().map(|(_, waiter)| waiter)).collect()
    }

    #[test]
    fn one_key_is_first_come_first_served() {
        let mut queue = Queue::new();
        for ticket in 0..100 {
            queue.push(ticket, "".into(), 1, ticket);
        }
        assert_eq!(queue.remove(3), Some(3));
        assert_eq!(queue.remove(3), None);
        assert_eq!(queue.ahead(10), Some(9));
        let expected: Vec<u64> = (0..100).filter(|ticket| *ticket != 3).collect();
        assert_eq!(drain(&mut queue), expected);
        assert!(queue.shares.is_empty() && queue.turns.is_empty());
    }

    #[test]
    fn a_greedy_key_cannot_starve_others() {
        let mut queue = Queue::new();
        for ticket in 0..1000 {
            queue.push(ticket, "greedy".into(), 1, ticket);
        }
        for ticket in 1000..1003 {
            queue.push(ticket, "modest".into(), 1, ticket);
        }
        let order = drain(&mut queue);
        let place = |ticket| order.iter().position(|at| *at == ticket).unwrap();
        assert_eq!([place(1000), place(1001), place(1002)], [1, 3, 5], "every other one");
    }

    #[test]
    fn weights_divide_the_service() {
        let mut queue = Queue::new();
        for ticket in 0..400 {
            let (key, weight) = if ticket % 2 == 0 { ("heavy", 3) } else { ("light", 1) };
            queue.push(ticket, key.into(), weight, ticket);
        }
        let served: Vec<u64> = (0..100).filter_map(|_| queue.pop().map(|(_, ticket)| ticket)).collect();
        let heavy = served.iter().filter(|ticket| **ticket % 2 == 0).count();
        assert!((74..=76).contains(&heavy), "{heavy} of 100 for three quarters of the weight");
    }

    #[test]
    fn a_waiter_that_comes_back_has_its_place() {
        let mut queue = Queue::new();
        for ticket in 0..5 {
            queue.push(ticket, "".into(), 1, ticket);
        }
        let (turn, first) = queue.pop().unwrap();
        queue.put_back(first, "".into(), turn, first);
        assert_eq!(drain(&mut queue), [0, 1, 2, 3, 4]);
    }
}
