//! Steps of decodes on a device that records and replays them, and tokens that the device draws: outputs are, bit for bit,
//! those of the plain reference, on one rank and on two.

mod support;

use engine::backend::reference::ReferenceBackend;
use engine::backend::{Backend, KvDtype, WeightDtype};
use engine::collective::Collective;
use engine::collective::solo::Solo;
use engine::model_runner::{ModelRunner, RunnerOptions};
use engine::models::checkpoint::Checkpoint;
use engine::plan::{BLOCK_TOKENS, Logits, Span, StepPlan};
use engine::request::Sampling;
use engine::runner::{PoolRows, Runner, SampleRow, ScoreRows, StepError};
use engine::sampler::random;
use proptest::prelude::*;
use support::models;
use support::recorder::{Group, Recorder, Seen, Tape};
use support::{Exchange, Threads};

/// Sequences that run together; more than the recorder computes the logits of at a time.
const SEQUENCES: usize = 9;

/// Blocks of a sequence.
const BLOCKS: usize = 4;

const OPTIONS: RunnerOptions = RunnerOptions {
    weight_dtype: WeightDtype::Bf16,
    kv_dtype: KvDtype::Bf16,
    blocks: (SEQUENCES * BLOCKS) as u32 + 1,
    step_tokens_max: 30,
    spans_max: SEQUENCES as u32,
    generation: 1,
};

fn checkpoint(name: &str) -> Checkpoint {
    Checkpoint::open(&models().join(name)).expect("the tiny model")
}

/// One step, with all that is wanted of it.
#[derive(Debug)]
struct Scene {
    plan: StepPlan,
    /// Span, sampling, candidate.
    samples: Vec<(usize, Sampling, u32)>,
    /// Span, targets.
    scores: Vec<(usize, Vec<u32>)>,
    pools: Vec<usize>,
}

/// Numbers that a seed decides.
struct Dice(u64, u32);

impl Dice {
    fn roll(&mut self, below: usize) -> usize {
        self.1 += 1;
        (random::uniform(self.0, 0, self.1) * below as f64) as usize
    }

    fn one_in(&mut self, chances: usize) -> bool {
        self.roll(chances) == 0
    }

    /// Mostly what a device can draw.
    fn sampling(&mut self) -> Sampling {
        let mut sampling = Sampling {
            temperature: [0.0, 0.7, 1.5][self.roll(3)],
            top_k: [0, 5, 200][self.roll(3)],
            top_p: [1.0, 0.9][self.roll(2)],
            min_p: [0.0, 0.05][self.roll(2)],
            seed: self.roll(1000) as u64,
            ..Sampling::default()
        };
        match self.roll(12) {
            0 => sampling.logprobs = Some(2),
            1 => sampling.repetition_penalty = 1.3,
            2 => sampling.logit_bias = vec![(7, 50.0)],
            _ => (),
        }
        sampling
    }
}

/// Random steps over some sequences, most of them decodes alone.
fn scenes(seed: u64, steps: usize) -> Vec<Scene> {
    let mut dice = Dice(seed, 0);
    let mut done = [0; SEQUENCES];
    let scene = |step: usize| {
        let mut scene = Scene {
            plan: StepPlan {
                step: step as u64,
                generation: 1,
                ..StepPlan::default()
            },
            samples: Vec::new(),
            scores: Vec::new(),
            pools: Vec::new(),
        };
        let decodes = step > 1 && !dice.one_in(4);
        let most = 1 + dice.roll(SEQUENCES);
        for (sequence, done) in done.iter_mut().enumerate() {
            let left = BLOCKS * BLOCK_TOKENS - *done;
            let runs = *done > 0 || !decodes;
            if !runs || left == 0 || scene.plan.spans.len() == most || dice.one_in(4) {
                continue;
            }
            let room = left.min(OPTIONS.step_tokens_max as usize - scene.plan.tokens.len());
            let len = if decodes { 1 } else { room.min(dice.roll(8)) };
            if len == 0 {
                continue;
            }
            let logits = match dice.roll(8) {
                0 if !decodes => Logits::None,
                1 if !decodes => Logits::Hidden,
                2 | 3 if !decodes => Logits::All,
                _ => Logits::Last,
            };
            let span = scene.plan.spans.len();
            let tokens = (0..len).map(|_| dice.roll(2048) as u32);
            scene.plan.tokens.extend(tokens);
            let first = 1 + (sequence * BLOCKS) as u32;
            scene.plan.spans.push(Span {
                position: *done as u32,
                len: len as u32,
                logits,
                blocks: (first..first + BLOCKS as u32).collect(),
            });
            *done += len;
            match logits {
                Logits::None => continue,
                Logits::Hidden => {
                    scene.pools.push(span);
                    continue;
                }
                Logits::All if dice.one_in(2) => {
                    scene.scores.push((span, vec![3; dice.roll(len + 1)]));
                }
                Logits::All | Logits::Last => (),
            }
            // Candidates share their prompt's last row.
            for candidate in 0..1 + u32::from(dice.one_in(6)) {
                scene.samples.push((span, dice.sampling(), candidate));
            }
        }
        scene
    };
    let scenes = (1..=steps).map(scene);
    scenes
        .filter(|scene| !scene.plan.tokens.is_empty())
        .collect()
}

/// The outputs of all scenes, in words that tell every bit; of a follower they are empty.
fn play<B: Backend, C: Collective<B::Buf>>(
    runner: &mut ModelRunner<B, C>,
    scenes: &[Scene],
    leads: bool,
) -> Result<Vec<String>, StepError> {
    let step = |scene: &Scene| {
        let (mut samples, mut scores) = (Vec::new(), Vec::new());
        let mut pools = Vec::new();
        if leads {
            samples.extend(
                scene
                    .samples
                    .iter()
                    .map(|(span, sampling, candidate)| SampleRow {
                        span: *span,
                        sampling,
                        candidate: *candidate,
                        output_index: scene.plan.step as u32,
                        prompt: &[1, 2],
                        outputs: &[3],
                        mask: None,
                    }),
            );
            scores.extend(scene.scores.iter().map(|(span, targets)| ScoreRows {
                span: *span,
                targets,
                top: 2,
            }));
            pools.extend(scene.pools.iter().map(|&span| PoolRows { span, sum: &[] }));
        }
        let ticket = runner.submit(&scene.plan, &samples, &scores, &pools)?;
        Ok(format!("{:?}", runner.collect(ticket)?))
    };
    scenes.iter().map(step).collect()
}

/// Plays the scenes on a group of ranks; gives rank 0's outputs.
fn on_ranks<B: Backend, C: Collective<B::Buf>>(
    name: &str,
    ranks: Vec<(B, C)>,
    scenes: &[Scene],
) -> Vec<String> {
    let checkpoint = checkpoint(name);
    std::thread::scope(|scope| {
        let play_rank = |(backend, collective): (B, C)| {
            let checkpoint = &checkpoint;
            scope.spawn(move || {
                let leads = collective.rank() == 0;
                let mut runner =
                    ModelRunner::load(checkpoint, &OPTIONS, backend, collective, &mut |_| {})
                        .expect("loads");
                play(&mut runner, scenes, leads).expect("runs")
            })
        };
        let ranks: Vec<_> = ranks.into_iter().map(play_rank).collect();
        let mut outputs = ranks.into_iter().map(|rank| rank.join().expect("no panic"));
        let first = outputs.next().expect("rank 0");
        outputs.for_each(drop);
        first
    })
}

/// Compares the recorder with the plain reference; tells what the recorder saw on each rank.
fn compare(name: &str, ranks: u32, scenes: &[Scene]) -> Vec<Seen> {
    let plain = Threads::group(ranks);
    let plain = plain.into_iter().map(|group| (ReferenceBackend, group));
    let expected = on_ranks(name, plain.collect(), scenes);
    let tapes: Vec<Tape> = (0..ranks).map(|_| Tape::default()).collect();
    let recorders = Exchange::group(ranks).into_iter().zip(&tapes);
    let recorders = recorders.map(|(exchange, tape)| {
        let group = Group {
            tape: tape.clone(),
            exchange,
            fails_at: usize::MAX,
        };
        (Recorder { tape: tape.clone() }, group)
    });
    let found = on_ranks(name, recorders.collect(), scenes);
    for ((found, expected), scene) in found.iter().zip(&expected).zip(scenes) {
        assert_eq!(found, expected, "{name}, {ranks} ranks: {scene:?}");
    }
    tapes.iter().map(Tape::seen).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, max_shrink_iters: 20, ..ProptestConfig::default() })]

    #[test]
    fn recorded_steps_and_drawn_tokens_are_those_of_the_plain_reference(
        seed in any::<u64>(), model in 0usize..3, ranks in 1u32..3,
    ) {
        let name = ["tiny-llama", "tiny-mistral", "tiny-mpt"][model];
        compare(name, ranks, &scenes(seed, 30));
    }
}

#[test]
fn long_runs_meet_every_way_that_a_step_can_go() {
    let seen = compare("tiny-llama", 2, &scenes(5, 150));
    let [leader, follower] = seen[..] else {
        panic!("{seen:?}")
    };
    assert!(leader.replayed > 5 && leader.compared > 5, "{leader:?}");
    assert!(leader.padded > 5 && leader.spoilt > 0, "{leader:?}");
    assert!(leader.drawn > 100, "{leader:?}");
    // Followers record alike, and draw nothing.
    assert_eq!(follower, Seen { drawn: 0, ..leader });
}

#[test]
fn what_is_set_aside_is_taken_to_the_byte() {
    for name in ["tiny-llama", "tiny-mistral", "tiny-mpt"] {
        let checkpoint = checkpoint(name);
        for weight_dtype in [
            WeightDtype::F32,
            WeightDtype::Bf16,
            WeightDtype::Int8,
            WeightDtype::Int4,
        ] {
            let options = RunnerOptions {
                weight_dtype,
                ..OPTIONS
            };
            for ranks in [1, 2, 4] {
                for exchange in Exchange::group(ranks) {
                    let recorder = Recorder::default();
                    let tape = recorder.tape.clone();
                    let group = Group {
                        tape: tape.clone(),
                        exchange,
                        fails_at: 0,
                    };
                    ModelRunner::load(&checkpoint, &options, recorder, group, &mut |_| {})
                        .expect("loads");
                    let (reserved, taken) = tape.memory();
                    assert_eq!(reserved, taken, "{name}, {weight_dtype:?}, {ranks} ranks");
                }
            }
        }
    }
}

#[test]
fn a_group_that_fails_in_the_middle_of_a_step_leaves_weights_that_work_and_no_recording() {
    let checkpoint = checkpoint("tiny-llama");
    let scenes = scenes(11, 40);
    let [group] = &mut Exchange::group(1)[..] else {
        panic!("one rank")
    };
    let recorder = Recorder::default();
    let tape = recorder.tape.clone();
    let of_group = |fails_at| Group {
        tape: tape.clone(),
        exchange: group.clone(),
        fails_at,
    };
    let whole = of_group(usize::MAX);
    let mut runner =
        ModelRunner::load(&checkpoint, &OPTIONS, recorder, whole, &mut |_| {}).expect("loads");
    let expected = play(&mut runner, &scenes, true).expect("runs");
    for fails_at in [0, 3, 40, 61, 100, 123] {
        let mut parts = runner.into_parts();
        assert!(tape.is_blank(), "recordings hold the group that is over");
        assert!(parts.fits(&checkpoint, &OPTIONS, 0, 1));
        assert_eq!(parts.backend().numerics(), "reference-1");
        runner = ModelRunner::from_parts(parts, &OPTIONS, of_group(fails_at)).expect("fits");
        let lost = play(&mut runner, &scenes, true);
        assert!(
            matches!(lost, Err(StepError::RankLost { rank: 1, .. })),
            "{lost:?}"
        );
        let after = play(&mut runner, &scenes, true)
            .expect_err("it is over")
            .to_string();
        assert!(after.contains("an earlier step failed"), "{after}");

        let parts = runner.into_parts();
        assert!(tape.is_blank(), "a recording is left half made");
        let whole = of_group(usize::MAX);
        runner = ModelRunner::from_parts(parts, &OPTIONS, whole).expect("fits");
        assert_eq!(play(&mut runner, &scenes, true).expect("runs"), expected);
    }
}

#[test]
fn parts_of_another_rank_or_of_other_options_are_refused() {
    let checkpoint = checkpoint("tiny-llama");
    let load = || {
        let group = Threads::group(2).swap_remove(1);
        let loaded = ModelRunner::load(&checkpoint, &OPTIONS, ReferenceBackend, group, &mut |_| {});
        loaded.expect("loads").into_parts()
    };
    let later = RunnerOptions {
        generation: 2,
        ..OPTIONS
    };
    let smaller = RunnerOptions {
        blocks: 3,
        ..OPTIONS
    };
    assert!(load().fits(&checkpoint, &later, 1, 2));
    assert!(!load().fits(&checkpoint, &smaller, 1, 2));
    assert!(!load().fits(&checkpoint, &later, 0, 2));
    let group = || Threads::group(2).swap_remove(1);
    assert!(ModelRunner::from_parts(load(), &later, group()).is_ok());
    let refused = |error: Option<engine::models::checkpoint::LoadError>| {
        let text = error.expect("refused").to_string();
        assert!(
            text.contains("the weights kept are those of rank 1 of 2"),
            "{text}"
        );
    };
    refused(ModelRunner::from_parts(load(), &smaller, group()).err());
    refused(ModelRunner::from_parts(load(), &later, Solo::new()).err());
}
