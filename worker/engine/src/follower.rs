//! The ranks above 0 of a shard group: they execute the leader's plans and decide nothing.
//!
//! The loop's end is the stream's end: the leader says that it is done, is lost, or this rank's group is aborted.

use crate::end::{EndCell, EngineEnd, OnEnd, guarded};
use crate::plan::StepPlan;
use crate::runner::{Runner, StepError};
use crate::stats::Stats;
use std::sync::Arc;

/// A runner that also receives the leader's plans: on ranks above 0 both come through one group.
pub trait PlanSource: Runner {
    /// Waits for the leader's next plan and puts its bytes in `bytes`. No bytes at all: the leader is done, see
    /// [`Runner::end`].
    ///
    /// # Errors
    /// [`StepError`]: the leader is lost or the group was ended.
    fn recv_plan(&mut self, bytes: &mut Vec<u8>) -> Result<(), StepError>;
}

/// A follower's thread seen from outside. Dropping it does not end the thread: ending the group does.
#[derive(Clone)]
pub struct FollowerHandle {
    end: Arc<EndCell>,
    stats: Arc<Stats>,
}

impl FollowerHandle {
    /// Why the follower is over, if it is.
    pub fn ended(&self) -> Option<EngineEnd> {
        self.end.get()
    }

    /// Waits until the follower is over.
    pub fn wait(&self) -> EngineEnd {
        self.end.wait()
    }

    /// The follower's step counter and times.
    pub fn stats(&self) -> Arc<Stats> {
        self.stats.clone()
    }
}

/// Starts a thread `name` that executes the leader's plans of one generation on `runner`. `on_end` is told the end.
///
/// # Errors
/// When the thread cannot be started.
pub fn spawn(
    name: &str,
    runner: Box<dyn PlanSource>,
    generation: u64,
    on_end: OnEnd,
) -> std::io::Result<FollowerHandle> {
    let handle = FollowerHandle {
        end: Arc::default(),
        stats: Arc::default(),
    };
    let FollowerHandle { end, stats } = handle.clone();
    std::thread::Builder::new()
        .name(name.into())
        .spawn(move || {
            let mut runner = runner;
            let reason = guarded(|| {
                follow(&mut *runner, generation, &stats)
                    .err()
                    .map_or(EngineEnd::Stopped, EngineEnd::from)
            });
            let ended = reason;
            let reason = guarded(|| {
                runner.end(&ended);
                ended
            });
            end.set(reason.clone());
            on_end(reason);
        })?;
    Ok(handle)
}

fn follow(runner: &mut dyn PlanSource, generation: u64, stats: &Stats) -> Result<(), StepError> {
    let mut bytes = Vec::new();
    loop {
        stats.idle();
        runner.recv_plan(&mut bytes)?;
        if bytes.is_empty() {
            return Ok(());
        }
        stats.begin_step();
        let plan = StepPlan::decode(&bytes).map_err(broken)?;
        if plan.generation != generation {
            return Err(broken(format!(
                "a plan of generation {} came to generation {generation}",
                plan.generation
            )));
        }
        plan.check(&runner.geometry()).map_err(broken)?;
        let ticket = runner.submit(&plan, &[], &[], &[])?;
        runner.collect(ticket)?;
        stats.end_step();
    }
}

fn broken(reason: impl ToString) -> StepError {
    StepError::Broken(reason.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::{Logits, Span};
    use crate::runner::{Geometry, PoolRows, SampleRow, ScoreRows, StepOutput, Ticket};
    use std::collections::VecDeque;
    use std::sync::mpsc;

    struct Scripted {
        plans: VecDeque<Vec<u8>>,
        seen: mpsc::Sender<u64>,
        output: StepOutput,
    }

    impl Runner for Scripted {
        fn submit(
            &mut self,
            plan: &StepPlan,
            _: &[SampleRow<'_>],
            _: &[ScoreRows<'_>],
            _: &[PoolRows<'_>],
        ) -> Result<Ticket, StepError> {
            assert_ne!(plan.step, 13, "an unlucky step");
            self.seen.send(plan.step).map_err(broken)?;
            Ok(Ticket(plan.step))
        }

        fn collect(&mut self, _: Ticket) -> Result<&mut StepOutput, StepError> {
            Ok(&mut self.output)
        }

        fn geometry(&self) -> Geometry {
            Geometry {
                blocks: 4,
                context_max: 32,
                vocab: 8,
                window: None,
                step_tokens_max: 16,
                spans_max: 4,
            }
        }
    }

    impl PlanSource for Scripted {
        fn recv_plan(&mut self, bytes: &mut Vec<u8>) -> Result<(), StepError> {
            *bytes = self
                .plans
                .pop_front()
                .ok_or_else(|| broken("rank 0 is lost"))?;
            Ok(())
        }
    }

    fn plan(step: u64, generation: u64, token: u32) -> Vec<u8> {
        let span = Span {
            position: 0,
            len: 1,
            logits: Logits::Last,
            blocks: vec![1],
        };
        let mut bytes = Vec::new();
        StepPlan {
            step,
            generation,
            tokens: vec![token],
            spans: vec![span],
        }
        .encode(&mut bytes);
        bytes
    }

    /// The follower's end as text, and the steps it ran.
    fn run(plans: Vec<Vec<u8>>) -> (String, Vec<u64>) {
        let (seen, steps) = mpsc::channel();
        let (on_end, told) = mpsc::channel();
        let runner = Box::new(Scripted {
            plans: plans.into(),
            seen,
            output: StepOutput::default(),
        });
        let on_end: OnEnd =
            Box::new(move |end| on_end.send(end.to_string()).expect("the test listens"));
        let handle = spawn("follower", runner, 7, on_end).expect("a thread");
        let end = handle.wait().to_string();
        assert_eq!(told.recv().expect("told once"), end);
        assert_eq!(handle.ended().map(|end| end.to_string()), Some(end.clone()));
        let steps: Vec<u64> = steps.iter().collect();
        assert_eq!(handle.stats().snapshot().steps, steps.len() as u64);
        (end, steps)
    }

    #[test]
    fn plans_run_until_the_leader_is_done() {
        assert_eq!(
            run(vec![plan(1, 7, 0), plan(2, 7, 0), Vec::new()]),
            ("the engine was stopped".into(), vec![1, 2])
        );
    }

    #[test]
    fn whatever_is_no_plan_for_this_rank_ends_it_with_a_reason() {
        let ends_with = |bytes: Vec<u8>, text: &str| {
            let (end, steps) = run(vec![plan(1, 7, 0), bytes]);
            assert!(end.contains(text), "expected {text}, got {end}");
            assert_eq!(steps, [1]);
        };
        ends_with(plan(2, 6, 0), "generation 6 came to generation 7");
        ends_with(plan(2, 7, 8), "outside the vocabulary of 8");
        ends_with(vec![2, 0, 0, 0], "cut short");
        ends_with(plan(13, 7, 0), "an unlucky step");
        assert_eq!(run(Vec::new()), ("rank 0 is lost".into(), vec![]));
    }
}
