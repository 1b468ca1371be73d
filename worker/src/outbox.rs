//! What this worker has to tell: reports on their way to the coordinator, and the state of its shards.
//!
//! Owns the queue of the current link, the last known state of every shard, which a new link begins with, and the log
//! lines that wait. Anyone may send at any time without waiting. The queue is bounded; when it is full the coordinator
//! does not read, and the link is given up: what was queued is lost with it, and the next link starts from the shards'
//! states. Log lines never fill it: they take at most half, and wait for their turn.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use common::ids::{Generation, ReplicaId};
use common::wire::message::{HeldShard, LogLine, Report};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::logs::LogBook;

/// Reports that may wait for the socket: some seconds of steps.
const QUEUE_REPORTS_MAX: usize = 1024;

/// Where reports go.
#[derive(Default)]
pub struct Outbox {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    link: Option<Link>,
    shards: BTreeMap<(ReplicaId, Generation), HeldShard>,
    logs: LogBook,
}

struct Link {
    reports: mpsc::Sender<Report>,
    broken: CancellationToken,
}

/// The other end of a link's queue.
pub struct Queue {
    /// What is to be sent, in order.
    pub reports: mpsc::Receiver<Report>,
    /// Cancelled when the queue overflowed: the link must be dropped.
    pub broken: CancellationToken,
    /// The shards as they were when the queue began; later changes are in the queue.
    pub shards: Vec<HeldShard>,
}

impl Outbox {
    /// Begins a link's queue; the queue of the link before is over.
    pub fn attach(&self) -> Queue {
        let (sender, reports) = mpsc::channel(QUEUE_REPORTS_MAX);
        let broken = CancellationToken::new();
        let mut state = self.lock();
        state.link = Some(Link {
            reports: sender,
            broken: broken.clone(),
        });
        Queue {
            reports,
            broken,
            shards: state.shards.values().cloned().collect(),
        }
    }

    /// Ends the link's queue: reports are dropped until the next one begins.
    pub fn detach(&self) {
        self.lock().link = None;
    }

    /// Queues a report, if there is a link. Never waits.
    pub fn send(&self, report: Report) {
        self.lock().send(report);
    }

    /// Notes a shard's state and reports it.
    pub fn send_shard(&self, shard: HeldShard) {
        let mut state = self.lock();
        state
            .shards
            .insert((shard.replica, shard.generation), shard.clone());
        state.report(shard);
    }

    /// Reports a shard's last state and forgets the shard.
    pub fn send_last(&self, shard: HeldShard) {
        let mut state = self.lock();
        state.shards.remove(&(shard.replica, shard.generation));
        state.report(shard);
    }

    /// Notes a line of a shard's log; it goes out with the shard's next state, or with the next answer to a ping.
    pub fn log(&self, replica: ReplicaId, generation: Generation, rank: u32, line: LogLine) {
        self.lock().logs.add(replica, generation, rank, line);
    }

    /// Sends all log lines that wait, as far as there is room.
    pub fn flush_logs(&self) {
        let mut state = self.lock();
        for (replica, generation) in state.logs.shards() {
            state.send_log(replica, generation);
        }
    }

    /// The last known state of a replica's shards up to a generation.
    pub fn held(&self, replica: ReplicaId, up_to: Generation) -> Vec<HeldShard> {
        self.lock()
            .shards
            .range((replica, Generation(0))..=(replica, up_to))
            .map(|(_, shard)| shard.clone())
            .collect()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn report(&mut self, shard: HeldShard) {
        let HeldShard {
            replica,
            generation,
            rank,
            state,
        } = shard;
        // What led to the state is read before it.
        self.send_log(replica, generation);
        self.send(Report::Shard {
            replica,
            generation,
            rank,
            state,
        });
    }

    fn send_log(&mut self, replica: ReplicaId, generation: Generation) {
        let has_room = |link: &Link| link.reports.capacity() > QUEUE_REPORTS_MAX / 2;
        if self.link.as_ref().is_some_and(has_room)
            && let Some(report) = self.logs.take(replica, generation)
        {
            self.send(report);
        }
    }

    fn send(&mut self, report: Report) {
        let Some(link) = &self.link else { return };
        match link.reports.try_send(report) {
            Ok(()) => {}
            Err(mpsc::error::TrySendError::Closed(_)) => self.link = None,
            Err(mpsc::error::TrySendError::Full(_)) => {
                tracing::warn!(
                    queued = QUEUE_REPORTS_MAX,
                    "the coordinator does not read; giving up the link"
                );
                link.broken.cancel();
                self.link = None;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use common::wire::message::ShardState;

    use super::*;

    fn shard(generation: u64, state: ShardState) -> HeldShard {
        HeldShard {
            replica: ReplicaId(1),
            generation: Generation(generation),
            rank: 0,
            state,
        }
    }

    #[test]
    fn a_new_link_begins_with_the_shards_states_and_hears_of_changes_after() {
        let outbox = Outbox::default();
        outbox.send(Report::Pong { nonce: 1 });
        outbox.send_shard(shard(1, ShardState::Unloaded));
        outbox.send_shard(shard(2, ShardState::Unloaded));
        outbox.send_last(shard(1, ShardState::Unloaded));
        let mut queue = outbox.attach();
        assert_eq!(queue.shards, [shard(2, ShardState::Unloaded)]);
        assert!(
            queue.reports.try_recv().is_err(),
            "what was said without a link is gone"
        );
        outbox.send_last(shard(2, ShardState::Unloaded));
        assert!(matches!(
            queue.reports.try_recv(),
            Ok(Report::Shard {
                generation: Generation(2),
                ..
            })
        ));
        assert!(outbox.held(ReplicaId(1), Generation(9)).is_empty());
    }

    #[test]
    fn log_lines_wait_for_a_link_with_room_and_go_before_the_shards_state() {
        use common::wire::message::LogPhase;
        let outbox = Outbox::default();
        let line = |text: &str| LogLine {
            at_ms: 1,
            phase: LogPhase::Build,
            text: text.into(),
        };
        outbox.log(ReplicaId(1), Generation(1), 0, line("early"));
        outbox.flush_logs();
        let mut queue = outbox.attach();
        outbox.send_shard(shard(1, ShardState::Unloaded));
        assert!(matches!(queue.reports.try_recv(), Ok(Report::Log { .. })));
        assert!(matches!(queue.reports.try_recv(), Ok(Report::Shard { .. })));
        for nonce in 0..QUEUE_REPORTS_MAX as u64 / 2 {
            outbox.send(Report::Pong { nonce });
        }
        outbox.log(ReplicaId(1), Generation(1), 0, line("late"));
        outbox.flush_logs();
        let mut next = || queue.reports.try_recv();
        while let Ok(report) = next() {
            assert!(matches!(report, Report::Pong { .. }), "{report:?}");
        }
        outbox.flush_logs();
        assert!(matches!(next(), Ok(Report::Log { .. })));
    }

    #[test]
    fn a_full_queue_gives_up_the_link_and_not_the_sender() {
        let outbox = Outbox::default();
        let queue = outbox.attach();
        for nonce in 0..QUEUE_REPORTS_MAX as u64 {
            outbox.send(Report::Pong { nonce });
        }
        assert!(!queue.broken.is_cancelled());
        outbox.send(Report::Pong { nonce: 0 });
        assert!(queue.broken.is_cancelled());
        let mut next = outbox.attach();
        outbox.send(Report::Pong { nonce: 9 });
        assert_eq!(next.reports.try_recv().unwrap(), Report::Pong { nonce: 9 });
    }
}
