//! Places for connections that have not said who they are.
//!
//! Owns the bound on them and who has to go when it is reached: the one that has been silent longest. So a flood of
//! silent connections cannot keep a worker out, which says Hello at once.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

use tokio_util::sync::CancellationToken;

/// The connections that have not said Hello yet, in the order of their coming.
pub struct Strangers {
    most: usize,
    waiting: Mutex<VecDeque<(u64, CancellationToken)>>,
}

/// A connection's place, given up when dropped.
pub struct Place {
    strangers: Arc<Strangers>,
    number: u64,
    evicted: CancellationToken,
}

impl Strangers {
    /// Places for `most` connections, at least one.
    pub fn new(most: usize) -> Arc<Self> {
        Arc::new(Strangers {
            most: most.max(1),
            waiting: Mutex::default(),
        })
    }

    /// A place for a new connection; the oldest loses its own when all are taken.
    pub fn take(self: &Arc<Self>) -> Place {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        if waiting.len() >= self.most
            && let Some((_, oldest)) = waiting.pop_front()
        {
            oldest.cancel();
        }
        let number = waiting.back().map_or(0, |(number, _)| number + 1);
        let evicted = CancellationToken::new();
        waiting.push_back((number, evicted.clone()));
        Place {
            strangers: self.clone(),
            number,
            evicted,
        }
    }
}

impl Place {
    /// Resolves when another connection has taken this place.
    pub async fn lost(&self) {
        self.evicted.cancelled().await;
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        // An evicted place's number may have been given again.
        if !self.evicted.is_cancelled() {
            let mut waiting = self
                .strangers
                .waiting
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            waiting.retain(|(number, _)| *number != self.number);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_stranger_goes_when_all_places_are_taken() {
        let strangers = Strangers::new(2);
        let places: Vec<Place> = (0..5).map(|_| strangers.take()).collect();
        let lost: Vec<bool> = places
            .iter()
            .map(|place| place.evicted.is_cancelled())
            .collect();
        assert_eq!(lost, [true, true, true, false, false]);
    }

    #[test]
    fn a_place_that_is_given_up_costs_nobody_his() {
        let strangers = Strangers::new(2);
        let first = strangers.take();
        drop(strangers.take());
        let third = strangers.take();
        assert!(!first.evicted.is_cancelled() && !third.evicted.is_cancelled());
        drop((first, third));
        assert!(strangers.waiting.lock().unwrap().is_empty());
    }
}
