//! Counters that cannot lie: what is taken gives itself back when it is dropped.
//!
//! Owns a served entity's shared counters, the right to run one request ([`Permit`]) and the tokens a waiting prompt is
//! booked with ([`Booking`]). Whoever drops them, for whatever reason, wakes the endpoint.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::Notify;

use super::ticket::Ticket;
use crate::policy::routing::ReplicaLoad;

/// What the flights of one served entity share with the actor at its door.
#[derive(Debug)]
pub struct EntityShared {
    running: AtomicU64,
    tokens: AtomicU64,
    ended: AtomicU64,
    spent: AtomicU64,
    /// Requests whose replica died before their first token; `None` once the entity is gone. Never more than run.
    returned: Mutex<Option<Vec<Ticket>>>,
    wake: Arc<Notify>,
}

impl EntityShared {
    /// Counters at zero. `wake` is notified whenever there may be something to do.
    pub fn new(wake: Arc<Notify>) -> Arc<Self> {
        Arc::new(EntityShared {
            running: AtomicU64::new(0),
            tokens: AtomicU64::new(0),
            ended: AtomicU64::new(0),
            spent: AtomicU64::new(0),
            returned: Mutex::new(Some(Vec::new())),
            wake,
        })
    }

    /// Requests given to replicas and not over.
    pub fn running(&self) -> u64 {
        self.running.load(Ordering::Acquire)
    }

    /// Prompt tokens booked.
    pub fn tokens(&self) -> u64 {
        self.tokens.load(Ordering::Acquire)
    }

    /// Requests that ended since the last call.
    pub fn take_ended(&self) -> u64 {
        self.ended.swap(0, Ordering::AcqRel)
    }

    /// Prompt or output tokens of its requests were computed.
    pub fn spend(&self, tokens: u64) {
        self.spent.fetch_add(tokens, Ordering::AcqRel);
    }

    /// Tokens spent since the last call.
    pub fn take_spent(&self) -> u64 {
        self.spent.swap(0, Ordering::AcqRel)
    }

    /// Something may be to do.
    pub fn wake(&self) {
        self.wake.notify_one();
    }

    /// What wakes the actor at the door.
    pub fn waker(&self) -> Arc<Notify> {
        self.wake.clone()
    }

    /// Gives a request back to the queue's front; the ticket comes back when the entity is gone.
    ///
    /// # Errors
    /// The ticket, when there is no queue any more.
    pub fn give_back(&self, ticket: Ticket) -> Result<(), Box<Ticket>> {
        match self.returned().as_mut() {
            Some(returned) => returned.push(ticket),
            None => return Err(Box::new(ticket)),
        }
        self.wake();
        Ok(())
    }

    /// The requests given back since the last call.
    pub fn take_returned(&self) -> Vec<Ticket> {
        self.returned()
            .as_mut()
            .map(std::mem::take)
            .unwrap_or_default()
    }

    /// The entity is gone: nothing is given back to it any more.
    pub fn close(&self) -> Vec<Ticket> {
        self.returned().take().unwrap_or_default()
    }

    fn returned(&self) -> MutexGuard<'_, Option<Vec<Ticket>>> {
        self.returned.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Prompt tokens of one request that are not computed yet.
#[derive(Debug)]
pub struct Booking {
    entity: Arc<EntityShared>,
    tokens: u64,
}

impl Booking {
    /// Books tokens.
    pub fn new(entity: Arc<EntityShared>, tokens: u64) -> Self {
        entity.tokens.fetch_add(tokens, Ordering::AcqRel);
        Booking { entity, tokens }
    }

    /// Corrects the booking: to the worker's count, then to 0 with the first output.
    pub fn settle(&mut self, tokens: u64) {
        if tokens == self.tokens {
            return;
        }
        // Add before subtracting: the sum never passes through a value that is too small.
        self.entity.tokens.fetch_add(tokens, Ordering::AcqRel);
        self.entity.tokens.fetch_sub(self.tokens, Ordering::AcqRel);
        self.tokens = tokens;
    }
}

impl Drop for Booking {
    fn drop(&mut self) {
        self.entity.tokens.fetch_sub(self.tokens, Ordering::AcqRel);
    }
}

/// A replica's credits, as its endpoint sees them.
#[derive(Debug)]
pub struct Credits {
    credits: u32,
    running: AtomicU32,
    /// It takes requests from this moment on; `None` while it is down.
    open_from: Mutex<Option<Instant>>,
}

impl Credits {
    /// So many credits, none taken; down.
    pub fn new(credits: u32) -> Arc<Self> {
        Arc::new(Credits {
            credits,
            running: AtomicU32::new(0),
            open_from: Mutex::new(None),
        })
    }

    /// How many there are, taken or not.
    pub fn total(&self) -> u32 {
        self.credits
    }

    /// The replica takes requests, or not.
    pub fn set_up(&self, up: bool, now: Instant) {
        let mut open_from = self
            .open_from
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        match (up, *open_from) {
            (true, None) => *open_from = Some(now),
            (true, Some(_)) => {}
            (false, _) => *open_from = None,
        }
    }

    /// The replica refused or is slow to take: leave it alone for a moment.
    pub fn suspend(&self, until: Instant) {
        let mut open_from = self
            .open_from
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if open_from.is_some() {
            *open_from = Some(until);
        }
    }

    /// It is not down, though it may be suspended.
    pub fn is_up(&self) -> bool {
        self.open_from
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .is_some()
    }

    /// Its load at `now`.
    pub fn load(&self, now: Instant) -> ReplicaLoad {
        let open_from = *self
            .open_from
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        ReplicaLoad {
            credits: self.credits,
            running: self.running(),
            up: open_from.is_some_and(|from| from <= now),
        }
    }

    /// Requests it runs.
    pub fn running(&self) -> u32 {
        self.running.load(Ordering::Acquire)
    }
}

/// The right to run one request on one replica.
#[derive(Debug)]
pub struct Permit {
    entity: Arc<EntityShared>,
    credits: Arc<Credits>,
}

impl Permit {
    /// Takes one place of the entity and one credit of the replica; callers have looked at both loads.
    pub fn take(entity: Arc<EntityShared>, credits: Arc<Credits>) -> Self {
        entity.running.fetch_add(1, Ordering::AcqRel);
        credits.running.fetch_add(1, Ordering::AcqRel);
        Permit { entity, credits }
    }

    /// The entity it belongs to.
    pub fn entity(&self) -> &Arc<EntityShared> {
        &self.entity
    }

    /// Leaves the replica alone for a moment.
    pub fn suspend(&self, pause: Duration) {
        self.credits.suspend(Instant::now() + pause);
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.credits.running.fetch_sub(1, Ordering::AcqRel);
        self.entity.running.fetch_sub(1, Ordering::AcqRel);
        self.entity.ended.fetch_add(1, Ordering::AcqRel);
        self.entity.wake();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_dropped_is_given_back() {
        let entity = EntityShared::new(Arc::default());
        let credits = Credits::new(2);
        let permit = Permit::take(entity.clone(), credits.clone());
        let mut booking = Booking::new(entity.clone(), 100);
        assert_eq!(
            (entity.running(), credits.running(), entity.tokens()),
            (1, 1, 100)
        );
        booking.settle(40);
        assert_eq!(entity.tokens(), 40);
        drop((permit, booking));
        assert_eq!(
            (
                entity.running(),
                credits.running(),
                entity.tokens(),
                entity.take_ended()
            ),
            (0, 0, 0, 1)
        );
        assert_eq!(entity.take_ended(), 0);
    }

    #[test]
    fn a_suspended_replica_takes_nothing_until_its_time_and_one_that_is_down_is_not_woken_by_it() {
        let (credits, now) = (Credits::new(2), Instant::now());
        let later = now + Duration::from_secs(1);
        credits.suspend(later);
        assert!(!credits.is_up());
        credits.set_up(true, now);
        credits.suspend(later);
        assert!(credits.is_up() && !credits.load(now).up && credits.load(later).up);
        credits.set_up(true, now);
        assert!(!credits.load(now).up, "being up already ends no suspension");
    }
}
