//! The runner's rim: plans that do not fit are refused, tickets come back in order, rows reach their samples and scores,
//! and the announced bytes are the allocated ones.

mod support;

use engine::backend::reference::ReferenceBackend;
use engine::backend::{KvDtype, WeightDtype};
use engine::collective::solo::Solo;
use engine::model_runner::{Footprint, ModelRunner, RunnerOptions};
use engine::models::checkpoint::Checkpoint;
use engine::plan::{Logits, Span, StepPlan};
use engine::request::Sampling;
use engine::runner::{PoolRows, Runner, SampleRow, ScoreRows, StepError};
use proptest::prelude::*;
use std::cell::RefCell;
use support::{Cut, Sequence, Setup, Threads, cpu, models};

type SoloRunner = ModelRunner<ReferenceBackend, Solo>;

const OPTIONS: RunnerOptions = RunnerOptions {
    weight_dtype: WeightDtype::Bf16,
    kv_dtype: KvDtype::Bf16,
    blocks: 9,
    step_tokens_max: 40,
    spans_max: 3,
    generation: 7,
};

fn checkpoint() -> Checkpoint {
    Checkpoint::open(&models().join("tiny-llama")).expect("the tiny model")
}

fn runner() -> SoloRunner {
    ModelRunner::load(
        &checkpoint(),
        &OPTIONS,
        ReferenceBackend,
        Solo::new(),
        &mut |_| {},
    )
    .expect("loads")
}

fn plan(spans: &[(u32, u32, Logits, &[u32])]) -> StepPlan {
    let spans = spans.iter().map(|(position, len, logits, blocks)| Span {
        position: *position,
        len: *len,
        logits: *logits,
        blocks: blocks.to_vec(),
    });
    let spans: Vec<Span> = spans.collect();
    let tokens = (0..spans.iter().map(|span| span.len).sum())
        .map(|i: u32| i * 31 % 2048)
        .collect();
    StepPlan {
        step: 1,
        generation: 7,
        tokens,
        spans,
    }
}

#[test]
fn plans_that_do_not_fit_are_refused_by_what_is_wrong_with_them() {
    let mut runner = runner();
    let mut refuse = |expected: &str, plan: StepPlan| match runner.submit(&plan, &[], &[], &[]) {
        Err(StepError::Broken(reason)) => assert!(
            reason.contains(expected),
            "{reason:?} does not contain {expected:?}"
        ),
        other => panic!("{other:?}, expected {expected:?}"),
    };
    let good = plan(&[(0, 3, Logits::Last, &[1])]);
    let with = |change: &dyn Fn(&mut StepPlan)| {
        let mut plan = good.clone();
        change(&mut plan);
        plan
    };
    refuse(
        "generation 8 came to generation 7",
        with(&|plan| plan.generation = 8),
    );
    refuse(
        "the plan has 0 tokens",
        StepPlan {
            generation: 7,
            ..StepPlan::default()
        },
    );
    refuse(
        "has 2 tokens, its spans 3",
        with(&|plan| plan.tokens.truncate(2)),
    );
    refuse(
        "2048 is outside the vocabulary of 2048",
        with(&|plan| plan.tokens[1] = 2048),
    );
    refuse("device slot", with(&|plan| plan.tokens[1] = 1 << 31));
    refuse("span 0 of 0 tokens", with(&|plan| plan.spans[0].len = 0));
    refuse(
        "does not fit the context",
        with(&|plan| plan.spans[0].position = 1022),
    );
    refuse(
        "does not fit the context",
        with(&|plan| plan.spans[0].position = u32::MAX),
    );
    refuse(
        "past its 0 blocks",
        with(&|plan| plan.spans[0].blocks.clear()),
    );
    refuse(
        "past its 1 blocks",
        with(&|plan| plan.spans[0].position = 14),
    );
    refuse(
        "block 9 is outside the pool of 9",
        with(&|plan| plan.spans[0].blocks = vec![9]),
    );
    refuse("has no block", with(&|plan| plan.spans[0].blocks = vec![0]));
    refuse(
        "41 tokens in 1 spans",
        plan(&[(0, 41, Logits::None, &[1, 2, 3])]),
    );
    refuse(
        "4 tokens in 4 spans",
        plan(&[
            (0, 1, Logits::None, &[1]),
            (0, 1, Logits::None, &[2]),
            (0, 1, Logits::None, &[3]),
            (0, 1, Logits::None, &[4]),
        ]),
    );
}

thread_local! {
    /// One model for all random plans.
    static RUNNER: RefCell<Option<SoloRunner>> = const { RefCell::new(None) };
}

fn mostly_small() -> impl Strategy<Value = u32> {
    prop_oneof![8 => 0u32..20, 1 => 0u32..2000, 1 => any::<u32>()]
}

fn any_plan() -> impl Strategy<Value = StepPlan> {
    let logits = prop_oneof![
        Just(Logits::None),
        Just(Logits::Last),
        Just(Logits::All),
        Just(Logits::Hidden),
    ];
    let span = (
        mostly_small(),
        mostly_small(),
        logits,
        prop::collection::vec(prop_oneof![20 => 1u32..9, 1 => any::<u32>()], 0..5),
    );
    let span = span.prop_map(|(position, len, logits, blocks)| Span {
        position,
        len,
        logits,
        blocks,
    });
    (
        prop::collection::vec(span, 0..4),
        0i64..8,
        prop_oneof![20 => 0u32..2048, 1 => any::<u32>()],
    )
        .prop_map(|(spans, extra, token)| {
            let total: u64 = spans.iter().map(|span| u64::from(span.len)).sum();
            let count = if extra == 0 { total + 1 } else { total };
            StepPlan {
                step: 1,
                generation: 7,
                tokens: vec![token; count.min(60) as usize],
                spans,
            }
        })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]
    #[test]
    fn a_random_plan_is_executed_or_refused_and_never_panics(plan in any_plan()) {
        RUNNER.with_borrow_mut(|slot| {
            let runner = slot.get_or_insert_with(runner);
            let wanted: usize = plan.spans.iter().map(|span| match span.logits {
                Logits::None | Logits::Hidden => 0,
                Logits::Last => 1,
                Logits::All => span.len as usize,
            }).sum();
            let mut rows = 0;
            match runner.run(&plan, |_, _| rows += 1) {
                Ok(()) => prop_assert_eq!(rows, wanted),
                Err(error) => prop_assert!(matches!(error, StepError::Broken(_)), "{:?}", error),
            }
            Ok(())
        })?;
    }
}

#[test]
fn samples_and_scores_get_the_rows_of_their_spans() {
    let mut runner = runner();
    let plan = plan(&[
        (0, 5, Logits::All, &[3]),
        (0, 2, Logits::None, &[4]),
        (0, 3, Logits::Last, &[5]),
    ]);
    let mut rows = Vec::new();
    runner
        .run(&plan, |row, logits| {
            rows.push((row.span, row.token, row.last, logits.to_vec()))
        })
        .expect("runs");
    let places: Vec<_> = rows
        .iter()
        .map(|(span, token, last, _)| (*span, *token, *last))
        .collect();
    assert_eq!(
        places,
        [
            (0, 0, false),
            (0, 1, false),
            (0, 2, false),
            (0, 3, false),
            (0, 4, true),
            (2, 2, true)
        ]
    );
    let best = |row: &[f32]| {
        (0..row.len())
            .max_by(|a, b| row[*a].total_cmp(&row[*b]))
            .expect("a vocabulary") as u32
    };

    let greedy = Sampling {
        logprobs: Some(1),
        ..Sampling::default()
    };
    let forced = Sampling {
        logit_bias: vec![(77, 1e4)],
        ..Sampling::default()
    };
    let sample = |span, sampling| SampleRow {
        span,
        sampling,
        candidate: 0,
        output_index: 0,
        prompt: &[1],
        outputs: &[],
        mask: None,
    };
    // Two candidates share span 2's row: what one does to it is not seen by the other.
    let samples = [sample(2, &forced), sample(2, &greedy), sample(0, &greedy)];
    let scores = [ScoreRows {
        span: 0,
        targets: &[9, 8, 7, 6],
        top: 2,
    }];
    let first = runner.submit(&plan, &samples, &scores, &[]).expect("runs");
    let second = runner.submit(&plan, &samples[1..], &[], &[]).expect("runs");
    let output = runner.collect(first).expect("there");
    let ids: Vec<u32> = output
        .samples
        .iter()
        .map(|sample| sample.as_ref().expect("finite").id)
        .collect();
    assert_eq!(ids, [77, best(&rows[5].3), best(&rows[4].3)]);
    let scored = output.scores[0].as_ref().expect("finite");
    assert_eq!(
        scored.iter().map(|score| score.id).collect::<Vec<_>>(),
        [9, 8, 7, 6]
    );
    for (score, (_, _, _, logits)) in scored.iter().zip(&rows) {
        assert_eq!(score.top[0].0, best(logits));
    }
    assert_eq!(runner.collect(second).expect("there").samples.len(), 2);
}

#[test]
fn tickets_come_back_in_the_order_of_submission() {
    let mut runner = runner();
    let plan = plan(&[(0, 1, Logits::Last, &[1])]);
    let first = runner.submit(&plan, &[], &[], &[]).expect("runs");
    let second = runner.submit(&plan, &[], &[], &[]).expect("runs");
    assert!(matches!(runner.collect(second), Err(StepError::Broken(_))));
    assert_ne!(first, second);
}

#[test]
fn rows_that_the_plan_does_not_give_cannot_be_sampled_scored_or_summed() {
    let mut runner = runner();
    let plan = plan(&[
        (0, 2, Logits::None, &[1]),
        (0, 2, Logits::Last, &[2]),
        (0, 2, Logits::Hidden, &[3]),
    ]);
    let sampling = Sampling::default();
    let sample = |span| SampleRow {
        span,
        sampling: &sampling,
        candidate: 0,
        output_index: 0,
        prompt: &[1],
        outputs: &[],
        mask: None,
    };
    for samples in [[sample(0)], [sample(2)], [sample(3)]] {
        assert!(matches!(
            runner.submit(&plan, &samples, &[], &[]),
            Err(StepError::Broken(_))
        ));
    }
    let score = ScoreRows {
        span: 1,
        targets: &[1],
        top: 0,
    };
    assert!(matches!(
        runner.submit(&plan, &[], &[score], &[]),
        Err(StepError::Broken(_))
    ));
    for span in [1, 3] {
        let pool = PoolRows { span, sum: &[] };
        assert!(matches!(
            runner.submit(&plan, &[], &[], &[pool]),
            Err(StepError::Broken(_))
        ));
    }
}

#[test]
fn impossible_options_and_ranks_are_refused_in_words() {
    let message = |options: RunnerOptions| match ModelRunner::load(
        &checkpoint(),
        &options,
        ReferenceBackend,
        Solo::new(),
        &mut |_| {},
    ) {
        Err(error) => error.to_string(),
        Ok(_) => panic!("loaded with {options:?}"),
    };
    assert!(
        message(RunnerOptions {
            blocks: 1,
            ..OPTIONS
        })
        .contains("a KV pool of 1 blocks")
    );
    assert!(
        message(RunnerOptions {
            step_tokens_max: 0,
            ..OPTIONS
        })
        .contains("a step of 0 tokens in 3 spans")
    );
    assert!(
        message(RunnerOptions {
            spans_max: u32::MAX,
            ..OPTIONS
        })
        .contains("both must be 1 to 1048576")
    );
    let third = Threads::group(3).pop().expect("three ranks");
    let error = ModelRunner::load(
        &checkpoint(),
        &OPTIONS,
        ReferenceBackend,
        third,
        &mut |_| {},
    )
    .err()
    .expect("8 heads over 3 ranks");
    assert_eq!(
        error.to_string(),
        "8 attention heads cannot be divided among 3 ranks; it needs a divisor of 8"
    );
}

#[test]
fn the_footprint_counts_every_weight_once_and_halves_with_the_ranks() {
    for name in ["tiny-llama", "tiny-mistral", "tiny-mpt"] {
        let checkpoint = Checkpoint::open(&models().join(name)).expect("the tiny model");
        let bytes = std::fs::read(models().join(name).join("model.safetensors")).expect("there");
        let file = safetensors::SafeTensors::deserialize(&bytes).expect("good");
        let numbers: usize = file
            .tensors()
            .iter()
            .map(|(_, tensor)| tensor.shape().iter().product::<usize>())
            .sum();
        let whole =
            Footprint::of::<ReferenceBackend>(&checkpoint.spec, 0, 1, &OPTIONS).expect("one rank");
        assert_eq!(
            whole.weights,
            4 * numbers as u64,
            "{name}: the reference keeps 4 bytes of each number"
        );
        let spec = &checkpoint.spec;
        assert_eq!(
            whole.kv_block,
            (2 * spec.layers * 16 * spec.kv_heads * spec.head_width * 2) as u64
        );
        let norms = 4 * (2 * spec.layers + 1) * spec.hidden;
        for rank in 0..2 {
            let half = Footprint::of::<ReferenceBackend>(&checkpoint.spec, rank, 2, &OPTIONS)
                .expect("two ranks");
            assert_eq!(
                2 * (half.weights - norms as u64),
                whole.weights - norms as u64,
                "{name}"
            );
            assert_eq!(2 * half.kv_block, whole.kv_block, "{name}");
        }
    }
}

#[test]
fn logits_have_the_same_bits_however_sequences_are_cut_and_batched() {
    for model in ["tiny-llama", "tiny-mistral", "tiny-mpt"] {
        for ranks in [1, 2] {
            let sequences: Vec<Sequence> = [(90, 80), (17, 16), (33, 2), (70, 70), (1, 1)]
                .map(|(len, prefill)| Sequence {
                    tokens: (0..len).map(|i| (i * 97 + len) % 2040).collect(),
                    prefill,
                })
                .to_vec();
            let run = |chunk, step_tokens, sequences: &[Sequence]| {
                let cut = Cut { chunk, step_tokens };
                let setup = Setup {
                    cut,
                    ..Setup::new(ranks, KvDtype::Bf16)
                };
                let logits = support::run(&models().join(model), setup, cpu, sequences);
                let bits = |row: Vec<f32>| row.into_iter().map(f32::to_bits).collect::<Vec<u32>>();
                let all = logits
                    .into_iter()
                    .map(|rows| rows.into_iter().map(bits).collect());
                all.collect::<Vec<Vec<Vec<u32>>>>()
            };
            let alone = |sequence| run(300, 300, std::slice::from_ref(sequence));
            let alone: Vec<_> = sequences.iter().flat_map(alone).collect();
            for (chunk, step_tokens) in [(1, 8), (7, 24), (64, 100), (300, 300)] {
                let together = run(chunk, step_tokens, &sequences);
                assert!(
                    together == alone,
                    "{model}, {ranks} ranks, chunks of {chunk}, {step_tokens} tokens per step"
                );
            }
        }
    }
}
