//! A replica as the coordinator keeps it: what is wanted, how far it is, what it claims, when to try again.
//!
//! Plain values; [`super::coordinator`] moves them on.

use std::sync::Arc;
use std::time::{Duration, Instant};

use actix::Addr;
use common::ids::{Generation, ReplicaId, WorkerId};
use common::wire::message::LogPhase;

use super::messages::Status;
use super::permit::Credits;
use super::record::Assignment;
use super::replica::ReplicaActor;
use crate::policy::lifecycle::{Entity, Event};
use crate::registry::ModelFacts;

/// Formations of a replica that never served before its deployment fails.
const ATTEMPTS_MAX: u32 = 3;
/// Pause before the first repetition; doubles with each.
const PAUSE_FIRST: Duration = Duration::from_millis(250);
/// Longest pause between two attempts.
const PAUSE_MAX: Duration = Duration::from_secs(30);
/// How often a replica without room looks again, beside the occasions when room is made.
pub const ROOM_PAUSE: Duration = Duration::from_secs(2);

/// A replica that is wanted, or still there.
pub struct Slot {
    /// Which.
    pub replica: ReplicaId,
    /// Its endpoint's name.
    pub endpoint: String,
    /// Its newest generation.
    pub generation: Generation,
    /// The workers of ranks 0, 1, ... of the newest formation that was ready: what they kept of it serves the next one.
    pub members: Vec<WorkerId>,
    /// The worker that a formation after that was over because of: it is not preferred, though it is a member.
    pub unreliable: Option<WorkerId>,
    /// How far it is.
    pub stage: Stage,
    /// Formations since it last served.
    pub attempts: u32,
    /// How it stands, in words.
    pub message: String,
    /// The model's task, once known.
    pub task: Option<String>,
    /// What stands in for what.
    pub stand_in: Option<String>,
    /// That it takes fewer requests at a time than its size stands for.
    pub shortage: Option<String>,
}

/// How far a replica is.
pub enum Stage {
    /// To be placed, from this moment on.
    Idle(Instant),
    /// Its model's headers are being read.
    Reading,
    /// Its headers are known; to be placed as soon as there are workers.
    Waiting(Arc<ModelFacts>, Instant),
    /// Placed; where is being stored.
    Placing(Assignment),
    /// It has an actor.
    Running(Running),
    /// It cannot be brought up.
    Failed,
}

/// A replica with an actor.
pub struct Running {
    /// Where it is.
    pub assignment: Assignment,
    /// Its actor.
    pub addr: Addr<ReplicaActor>,
    /// Its credits.
    pub credits: Arc<Credits>,
    /// What it last said.
    pub status: Status,
    /// It was told to go.
    pub retiring: bool,
    /// This formation has taken requests.
    pub has_served: bool,
}

impl Slot {
    /// A replica that nothing was done for yet.
    pub fn new(replica: ReplicaId, endpoint: &str, now: Instant) -> Self {
        Slot {
            replica,
            endpoint: endpoint.to_owned(),
            generation: Generation(0),
            members: Vec::new(),
            unreliable: None,
            stage: Stage::Idle(now),
            attempts: 0,
            message: "Creating resources for served entity.".to_owned(),
            task: None,
            stand_in: None,
            shortage: None,
        }
    }

    /// The rank that a worker had when it was last ready, if it shall have it again.
    pub fn rank_before(&self, worker: &str) -> Option<usize> {
        let reliable = |member: &WorkerId| self.unreliable.as_ref() != Some(member);
        self.members
            .iter()
            .position(|member| member.0 == worker && reliable(member))
    }

    /// Bytes it claims on a worker's device.
    pub fn claim(&self, worker: &WorkerId) -> u64 {
        let assignment = match &self.stage {
            Stage::Placing(assignment) | Stage::Running(Running { assignment, .. }) => assignment,
            _ => return 0,
        };
        if assignment.members.contains(worker) {
            assignment.options.memory_bytes
        } else {
            0
        }
    }

    /// It was told to go, and its memory will be free in a moment.
    pub fn is_retiring(&self) -> bool {
        matches!(&self.stage, Stage::Running(running) if running.retiring)
    }

    /// It takes requests.
    pub fn is_ready(&self) -> bool {
        matches!(
            &self.stage,
            Stage::Running(Running {
                status: Status::Ready { .. } | Status::Stalled,
                retiring: false,
                ..
            })
        )
    }

    /// Its actor, if it has one of this generation.
    pub fn running(&mut self, generation: Generation) -> Option<&mut Running> {
        match &mut self.stage {
            Stage::Running(running) if running.assignment.generation == generation => Some(running),
            _ => None,
        }
    }

    /// A formation did not come about, or is over. `served`: its entity is in force, so that it is brought back for as
    /// long as it takes.
    pub fn over(&mut self, fatal: bool, served: bool, message: String, now: Instant) {
        let was_ready = self.is_ready();
        self.attempts = if was_ready { 0 } else { self.attempts + 1 };
        self.message = message;
        let give_up = !served && (fatal || self.attempts >= ATTEMPTS_MAX);
        let pause = match self.attempts {
            0 => Duration::ZERO,
            n => PAUSE_MAX.min(PAUSE_FIRST * 2u32.saturating_pow(n - 1)),
        };
        self.stage = if give_up {
            Stage::Failed
        } else {
            Stage::Idle(now + pause)
        };
    }

    /// Which of its logs news of it belong to.
    pub fn phase(&self) -> LogPhase {
        match &self.stage {
            Stage::Running(running) if running.has_served => LogPhase::Run,
            _ => LogPhase::Build,
        }
    }

    /// What is done next after an end, for its log.
    pub fn next_words(&self) -> &'static str {
        match &self.stage {
            Stage::Failed => "the deployment has failed; it is not tried again",
            _ => "it is formed again",
        }
    }

    /// There may be more room than before: a pause because of room is over.
    pub fn retry_now(&mut self, now: Instant) {
        if let Stage::Waiting(_, at) = &mut self.stage {
            *at = now;
        }
    }

    /// How it stands, for clients.
    pub fn words(&self) -> String {
        let notes = self.stand_in.iter().chain(&self.shortage);
        notes.fold(self.message.clone(), |words, note| {
            format!("{words}; {note}")
        })
    }

    /// What its endpoint is to be told, given how the stored entity says it stands.
    pub fn event(&self, entity: &Entity) -> Option<Event> {
        use crate::api::DeploymentState as State;
        let (replica, message) = (self.replica, self.words());
        match (self.is_ready(), &self.stage, entity.state) {
            (true, _, State::Creating | State::Recovering) => Some(Event::Up { replica, message }),
            (false, Stage::Failed, State::Creating | State::Recovering) => {
                Some(Event::Failed { replica, message })
            }
            (false, _, State::Ready) => Some(Event::Lost { replica, message }),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn slot() -> Slot {
        Slot::new(ReplicaId(1), "e", Instant::now())
    }

    #[test]
    fn a_deployment_fails_at_once_when_trying_again_is_no_use_and_else_after_some_attempts() {
        let now = Instant::now();
        let mut fatal = slot();
        fatal.over(true, false, "corrupt".into(), now);
        assert!(matches!(fatal.stage, Stage::Failed));
        let mut unlucky = slot();
        for attempt in 1..ATTEMPTS_MAX {
            unlucky.over(false, false, "rank lost".into(), now);
            assert!(
                matches!(unlucky.stage, Stage::Idle(at) if at > now),
                "attempt {attempt}"
            );
        }
        unlucky.over(false, false, "rank lost".into(), now);
        assert!(matches!(unlucky.stage, Stage::Failed));
    }

    #[test]
    fn a_member_has_its_rank_again_unless_the_formation_was_over_because_of_it() {
        let mut slot = slot();
        slot.members = vec![WorkerId("n/0".into()), WorkerId("n/1".into())];
        assert_eq!(slot.rank_before("n/1"), Some(1));
        slot.unreliable = Some(WorkerId("n/0".into()));
        assert_eq!(
            (slot.rank_before("n/0"), slot.rank_before("n/1")),
            (None, Some(1))
        );
        assert_eq!(slot.rank_before("n/2"), None);
    }

    #[test]
    fn what_is_in_force_is_brought_back_for_as_long_as_it_takes() {
        let (mut slot, now) = (slot(), Instant::now());
        for _ in 0..100 {
            slot.over(true, true, "x".into(), now);
            assert!(matches!(slot.stage, Stage::Idle(at) if at <= now + PAUSE_MAX));
        }
    }
}
