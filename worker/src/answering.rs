//! The thread between an engine and the link: submits requests, turns events into outputs, cancels.
//!
//! Owns a leader's [`Answers`]. Everything comes through one queue, in order, so that no event of a request arrives
//! before the request itself. Never waits for the link; the engine waits for this thread when it is behind.

use std::sync::Arc;
use std::thread::JoinHandle;

use common::ids::{Generation, ReplicaId, RequestId};
use common::request::{Failure, FailureKind};
use common::wire::message::{Output, Report};
use engine::engine::{EngineHandle, SubmitError};
use engine::request::Event;
use tokio::sync::mpsc;

use crate::answer::{Answers, failure_of, output_bytes};
use crate::outbox::Outbox;
use crate::translate::Prepared;

/// Steps and requests that may wait for this thread.
pub const QUEUE_MAX: usize = 1024;
/// Outputs of a step are sent in frames of about this many bytes.
const REPORT_BYTES: usize = 4 << 20;

/// What there is to do.
pub enum Work {
    /// Run a request.
    Begin {
        /// What to run.
        prepared: Box<Prepared>,
        /// Which attempt of the request this is.
        attempt: u32,
    },
    /// The engine has done a step.
    Events(Vec<Event>),
    /// An answer is not wanted any more.
    Cancel(RequestId),
    /// No answer is wanted any more: the link is gone.
    Forget,
}

/// Starts the thread; it ends when all senders of `work` are gone.
///
/// # Errors
/// When the thread cannot start.
pub fn spawn(
    replica: ReplicaId,
    generation: Generation,
    engine: EngineHandle,
    outbox: Arc<Outbox>,
    mut work: mpsc::Receiver<Work>,
) -> std::io::Result<JoinHandle<()>> {
    let mut answering = Answering {
        replica,
        generation,
        engine,
        outbox,
        answers: Answers::default(),
    };
    std::thread::Builder::new()
        .name(format!("answers-{replica}"))
        .spawn(move || {
            while let Some(work) = work.blocking_recv() {
                answering.take(work);
            }
        })
}

struct Answering {
    replica: ReplicaId,
    generation: Generation,
    engine: EngineHandle,
    outbox: Arc<Outbox>,
    answers: Answers,
}

impl Answering {
    fn take(&mut self, work: Work) {
        match work {
            Work::Begin { prepared, attempt } => self.begin(*prepared, attempt),
            Work::Events(events) => {
                let step = self.answers.step(events);
                for (key, candidate) in step.cancel {
                    self.engine.cancel_candidate(key, candidate);
                }
                self.send(step.outputs);
            }
            Work::Cancel(request) => {
                if let Some(key) = self.answers.key(request) {
                    self.engine.cancel(key);
                }
            }
            Work::Forget => self
                .answers
                .forget()
                .into_iter()
                .for_each(|key| self.engine.cancel(key)),
        }
    }

    fn begin(&mut self, prepared: Prepared, attempt: u32) {
        let Prepared {
            key,
            request: for_engine,
            answer,
            prompt_tokens,
        } = prepared;
        let request = answer.request;
        if self.answers.key(request).is_some() {
            // An older attempt that was cancelled and is not over yet: the newer one may go on in a moment.
            let failure = Failure::new(
                FailureKind::Unavailable,
                format!("request {request} is running already"),
            );
            return self.outbox.send(Report::Rejected {
                request,
                attempt,
                failure,
            });
        }
        if let Some(Err(error)) = for_engine.map(|for_engine| self.engine.submit(for_engine)) {
            return self.outbox.send(Report::Rejected {
                request,
                attempt,
                failure: refusal(error),
            });
        }
        self.outbox.send(Report::Accepted {
            request,
            attempt,
            prompt_tokens,
        });
        let outputs = self.answers.begin(key, answer);
        self.send(outputs);
    }

    fn send(&self, outputs: Vec<Output>) {
        for outputs in frames(outputs) {
            self.outbox.send(Report::Step {
                replica: self.replica,
                generation: self.generation,
                outputs,
            });
        }
    }
}

fn refusal(error: SubmitError) -> Failure {
    match error {
        SubmitError::Full(full) => Failure::new(FailureKind::Overloaded, full.to_string()),
        SubmitError::Stopped => {
            Failure::new(FailureKind::Unavailable, "the replica is being stopped")
        }
        SubmitError::Refused(error) => failure_of(&error),
    }
}

/// A step's outputs in as few frames as they fit; one frame, but for log-probabilities of long prompts.
fn frames(outputs: Vec<Output>) -> Vec<Vec<Output>> {
    let mut frames: Vec<Vec<Output>> = Vec::new();
    let mut bytes = 0;
    for output in outputs {
        let more = output_bytes(&output);
        match frames.last_mut() {
            Some(frame) if bytes + more <= REPORT_BYTES => {
                bytes += more;
                frame.push(output);
            }
            _ => {
                bytes = more;
                frames.push(vec![output]);
            }
        }
    }
    frames
}

#[cfg(test)]
mod tests {
    use common::request::Delta;

    use super::*;

    #[test]
    fn a_step_is_one_frame_unless_it_is_huge() {
        let delta = |bytes: usize| Output::Delta {
            request: RequestId(1),
            delta: Delta {
                text: "x".repeat(bytes),
                ..Delta::default()
            },
        };
        let sizes = |texts: &[usize]| -> Vec<usize> {
            frames(texts.iter().map(|&bytes| delta(bytes)).collect())
                .iter()
                .map(Vec::len)
                .collect()
        };
        assert_eq!(sizes(&[]), [0usize; 0]);
        assert_eq!(sizes(&[5; 64]), [64]);
        assert_eq!(sizes(&[3 << 20, 3 << 20, 1, 5 << 20]), [1, 2, 1]);
    }
}
