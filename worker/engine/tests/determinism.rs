//! The same request gives the same bits however it is run: alone, in a batch, cut into chunks of any size, preempted
//! and recomputed, resumed after some of its tokens, or on cached blocks; on any number of threads; on one rank and on
//! two, whether they sum through shared memory or TCP.

mod support;

use engine::backend::cpu::{CpuBackend, CpuBuf, Pool};
use engine::backend::{KvDtype, WeightDtype};
use engine::collective::Collective;
use engine::collective::host::Transport;
use engine::collective::solo::Solo;
use engine::engine::{Engine, EngineConfig, EngineEnd, EngineHandle};
use engine::follower::{self, FollowerHandle};
use engine::mask::{MaskError, Next, TokenMask, TokenSet};
use engine::model_runner::{ModelRunner, RunnerOptions};
use engine::models::checkpoint::Checkpoint;
use engine::request::{Candidate, EndReason, Event, Request, RequestKey, Sampling, TokenLogprob};
use engine::sampler::random;
use engine::scheduler::Backlog;
use engine::stats::StatsSnapshot;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, mpsc};
use std::time::Duration;
use support::groups::host_pair;

/// Prompts per model: 200 over the three.
const PROMPTS: u64 = 67;

/// Prompts to be embedded, beside those.
const EMBEDDINGS: u64 = 8;

/// Sequences that run together.
const BATCH: u32 = 32;

/// Long enough that only a hang reaches it.
const PATIENCE: Duration = Duration::from_secs(120);

/// How the requests are run.
#[derive(Debug, Clone, Copy)]
struct Way {
    spans_max: u32,
    chunk_tokens_max: u32,
    blocks: u32,
    threads: usize,
    /// How two ranks sum.
    transport: Transport,
    /// Run everything twice, and give the second answers.
    twice: bool,
}

const ALONE: Way = Way {
    spans_max: 1,
    chunk_tokens_max: 512,
    blocks: 600,
    threads: 1,
    transport: Transport::Shm,
    twice: false,
};
const BATCHED: Way = Way {
    spans_max: BATCH,
    threads: 2,
    ..ALONE
};

/// Everything that a candidate's events say, floats as bits.
#[derive(Debug, Default, PartialEq)]
struct Answer {
    tokens: Vec<(u32, Option<Scored>)>,
    prompt: Vec<Option<Scored>>,
    embedding: Vec<u32>,
    end: Option<EndReason>,
}

type Scored = (u32, u32, Vec<(u32, u32)>);

fn bits(scored: TokenLogprob) -> Scored {
    let top = scored
        .top
        .into_iter()
        .map(|(id, logprob)| (id, logprob.to_bits()))
        .collect();
    (scored.id, scored.logprob.to_bits(), top)
}

type Answers = BTreeMap<(RequestKey, u32), Answer>;

/// Whether tokens are drawn or the most probable ones taken.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Choice {
    Greedy,
    Seeded,
}

/// Allows the ids that leave the same rest modulo 3 as the sum of those so far.
#[derive(Debug, Clone)]
struct Thirds(u32);

impl TokenMask for Thirds {
    fn allowed(&mut self, allowed: &mut TokenSet) -> Result<(), MaskError> {
        allowed.copy_from(&[]);
        (self.0 % 3..2048)
            .step_by(3)
            .for_each(|id| allowed.insert(id));
        Ok(())
    }

    fn accept(&mut self, token: u32) -> Result<Next, MaskError> {
        assert_eq!(token % 3, self.0 % 3, "the mask is obeyed");
        self.0 += token;
        Ok(Next::Open)
    }

    fn another(&self) -> Box<dyn TokenMask> {
        Box::new(self.clone())
    }
}

/// Random requests; some with several candidates, penalties or scored prompts, and some embeddings.
fn requests(vocab: u32, choice: Choice) -> Vec<Request> {
    let number =
        |key: u64, what: u32, below: u32| (random::uniform(key, 0, what) * f64::from(below)) as u32;
    let request = |key: u64| Request {
        key,
        prompt: (0..1 + number(key, 0, if key.is_multiple_of(8) { 160 } else { 60 }))
            .map(|i| 3 + number(key, 10 + i, vocab - 3))
            .collect(),
        candidates: (0..if key % 9 == 1 { 3 } else { 1 })
            .map(|index| Candidate {
                index,
                emitted: Vec::new(),
                mask: (key % 7 == 3).then(|| Box::new(Thirds(0)) as _),
            })
            .collect(),
        sampling: Sampling {
            temperature: if choice == Choice::Greedy { 0.0 } else { 0.8 },
            top_p: if key % 2 == 1 { 0.9 } else { 1.0 },
            repetition_penalty: if key.is_multiple_of(5) { 1.2 } else { 1.0 },
            seed: key,
            logprobs: Some(3),
            ..Sampling::default()
        },
        tokens_max: 4 + number(key, 1, if key.is_multiple_of(6) { 30 } else { 8 }),
        // Most go on past the model's end, so that there is more to compare.
        stop_ids: if key.is_multiple_of(4) {
            vec![2]
        } else {
            Vec::new()
        },
        prompt_logprobs: (key % 11 == 2).then_some(2),
        embedding: false,
        deadline: None,
    };
    let embedding = |key| Request {
        candidates: vec![Candidate::default()],
        tokens_max: 0,
        prompt_logprobs: None,
        embedding: true,
        ..request(key)
    };
    (0..PROMPTS)
        .map(request)
        .chain((PROMPTS..PROMPTS + EMBEDDINGS).map(embedding))
        .collect()
}

/// Engines of one model over one or two ranks.
struct Model {
    checkpoint: Checkpoint,
    ranks: u32,
    weights: WeightDtype,
    kv_dtype: KvDtype,
}

/// A running engine, with its follower if it has one.
struct Running {
    engine: EngineHandle,
    follower: Option<FollowerHandle>,
    events: mpsc::Receiver<Vec<Event>>,
}

impl Model {
    fn start(&self, way: Way) -> Running {
        let (events_in, events) = mpsc::channel();
        // The ranks of one machine share its threads.
        let pool = Pool::new(way.threads, &[]).expect("threads");
        let config = EngineConfig {
            name: "engine".into(),
            generation: 1,
            prefix_salt: Vec::new(),
            chunk_tokens_max: way.chunk_tokens_max,
            backlog: Backlog {
                tokens: 1 << 20,
                sequences: 1 << 10,
            },
        };
        let sink = Box::new(move |events| drop(events_in.send(events)));
        if self.ranks == 1 {
            let leader = Box::new(self.load(way, &pool, Solo::new()));
            let engine = Engine::spawn(leader, config, sink, Box::new(drop)).expect("a thread");
            return Running {
                engine,
                follower: None,
                events,
            };
        }
        let [leader, second] = host_pair(1, way.transport);
        let second = Box::new(self.load(way, &pool, second));
        let follower = follower::spawn("follower", second, 1, Box::new(drop)).expect("a thread");
        let leader = Box::new(self.load(way, &pool, leader));
        let engine = Engine::spawn(leader, config, sink, Box::new(drop)).expect("a thread");
        Running {
            engine,
            follower: Some(follower),
            events,
        }
    }

    fn load<C: Collective<CpuBuf>>(
        &self,
        way: Way,
        pool: &Arc<Pool>,
        collective: C,
    ) -> ModelRunner<CpuBackend, C> {
        let options = RunnerOptions {
            weight_dtype: self.weights,
            kv_dtype: self.kv_dtype,
            blocks: way.blocks,
            step_tokens_max: 512,
            spans_max: way.spans_max,
            generation: 1,
        };
        let backend = CpuBackend::new(pool.clone()).expect("memory");
        ModelRunner::load(&self.checkpoint, &options, backend, collective, &mut |_| {})
            .expect("the model loads")
    }

    /// Runs the requests one way; gives their answers, the prompt tokens that were cached, and the engine's numbers.
    fn run(&self, way: Way, requests: &[Request]) -> (Answers, u32, StatsSnapshot) {
        let running = self.start(way);
        if way.twice {
            running.answer(requests);
        }
        let (answers, cached) = running.answer(requests);
        let stats = running.engine.stats().snapshot();
        running.engine.stop();
        assert!(matches!(running.engine.wait(), EngineEnd::Stopped));
        if let Some(follower) = running.follower {
            assert!(matches!(follower.wait(), EngineEnd::Stopped));
        }
        (answers, cached, stats)
    }
}

impl Running {
    fn answer(&self, requests: &[Request]) -> (Answers, u32) {
        requests
            .iter()
            .for_each(|request| self.engine.submit(request.clone()).expect("taken"));
        let mut owed: usize = requests
            .iter()
            .map(|request| request.candidates.len())
            .sum();
        let (mut answers, mut cached) = (Answers::new(), 0);
        while owed > 0 {
            for event in self
                .events
                .recv_timeout(PATIENCE)
                .expect("every candidate ends")
            {
                match event {
                    Event::PromptLogprobs { key, tokens } => {
                        answers.entry((key, 0)).or_default().prompt =
                            tokens.into_iter().map(|token| token.map(bits)).collect();
                    }
                    Event::Embedding { key, values } => {
                        answers.entry((key, 0)).or_default().embedding =
                            values.into_iter().map(f32::to_bits).collect();
                    }
                    Event::Token {
                        key,
                        candidate,
                        id,
                        logprob,
                        ..
                    } => {
                        answers
                            .entry((key, candidate))
                            .or_default()
                            .tokens
                            .push((id, logprob.map(bits)));
                    }
                    Event::Ended {
                        key,
                        candidate,
                        reason,
                        cached_tokens,
                    } => {
                        assert!(
                            matches!(
                                reason,
                                EndReason::Length | EndReason::StopToken { id: 2, .. }
                            ),
                            "{reason:?}"
                        );
                        answers.entry((key, candidate)).or_default().end = Some(reason);
                        cached += cached_tokens;
                        owed -= 1;
                    }
                }
            }
        }
        (answers, cached)
    }
}

/// The first difference, in words short enough to read.
fn assert_same(what: &str, expected: &Answers, got: &Answers) {
    assert_eq!(
        expected.keys().collect::<Vec<_>>(),
        got.keys().collect::<Vec<_>>()
    );
    for (key, answer) in got {
        let expected = &expected[key];
        assert_eq!(
            expected.prompt, answer.prompt,
            "{what}: scores of the prompt of {key:?}"
        );
        for (index, (expected, token)) in expected.tokens.iter().zip(&answer.tokens).enumerate() {
            assert_eq!(expected, token, "{what}: token {index} of {key:?}");
        }
        assert_eq!(expected, answer, "{what}: {key:?}");
    }
}

/// The requests as they go on elsewhere after half of their tokens, and the answers that are left to give.
fn resume(requests: &[Request], answers: &Answers) -> (Vec<Request>, Answers) {
    let half = |answer: &Answer| answer.tokens.len() / 2;
    let rest = answers.iter().map(|(key, answer)| {
        let tokens = answer.tokens[half(answer)..].to_vec();
        (
            *key,
            Answer {
                tokens,
                prompt: Vec::new(),
                embedding: answer.embedding.clone(),
                end: answer.end.clone(),
            },
        )
    });
    let resumed = requests.iter().cloned().map(|mut request| {
        for candidate in &mut request.candidates {
            let answer = &answers[&(request.key, candidate.index)];
            candidate.emitted = answer.tokens[..half(answer)]
                .iter()
                .map(|(id, _)| *id)
                .collect();
            for id in &candidate.emitted {
                let accepted = candidate.mask.as_mut().map(|mask| mask.accept(*id));
                assert!(matches!(accepted, None | Some(Ok(Next::Open))));
            }
        }
        Request {
            prompt_logprobs: None,
            ..request
        }
    });
    (resumed.collect(), rest.collect())
}

fn check(name: &str, ranks: u32, kv_dtype: KvDtype) {
    check_weights(name, ranks, WeightDtype::Bf16, kv_dtype);
}

fn check_weights(name: &str, ranks: u32, weights: WeightDtype, kv_dtype: KvDtype) {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../tests/models")
        .join(name);
    let model = Model {
        checkpoint: Checkpoint::open(&dir).expect("a good checkpoint"),
        ranks,
        weights,
        kv_dtype,
    };
    for choice in [Choice::Greedy, Choice::Seeded] {
        let requests = requests(model.checkpoint.spec.vocab as u32, choice);
        check_requests(&model, &requests, &format!("{name}, {choice:?}"));
    }
}

fn check_requests(model: &Model, requests: &[Request], name: &str) {
    let (alone, cached, stats) = model.run(ALONE, requests);
    assert_eq!(stats.preemptions, 0);
    assert!(cached > 0, "candidates share their prompt");
    let embeddings = alone
        .values()
        .filter(|answer| !answer.embedding.is_empty())
        .count();
    assert_eq!(embeddings as u64, EMBEDDINGS);
    let tokens: usize = alone.values().map(|answer| answer.tokens.len()).sum();
    assert!(
        tokens > 600,
        "there is something to compare: {tokens} tokens"
    );
    for chunk_tokens_max in [1, 7, 64, 512] {
        let (answers, ..) = model.run(
            Way {
                chunk_tokens_max,
                ..BATCHED
            },
            requests,
        );
        assert_same(
            &format!("{name}, in a batch, chunks of {chunk_tokens_max}"),
            &alone,
            &answers,
        );
    }
    if model.ranks > 1 {
        let way = Way {
            transport: Transport::Tcp,
            ..BATCHED
        };
        let (answers, ..) = model.run(way, requests);
        assert_same(&format!("{name}, over TCP"), &alone, &answers);
    }
    let (answers, warm, _) = model.run(
        Way {
            twice: true,
            ..BATCHED
        },
        requests,
    );
    assert!(
        warm > 4 * cached,
        "{warm} prompt tokens were cached, {cached} without a first run"
    );
    assert_same(&format!("{name}, cached"), &alone, &answers);

    let (resumed, rest) = resume(requests, &alone);
    let (answers, ..) = model.run(BATCHED, &resumed);
    assert_same(&format!("{name}, resumed"), &rest, &answers);

    // A quarter of what a batch needs when it runs together; less where the window gives blocks back on the way.
    let needs = |request: &Request| {
        (request.prompt.len() + request.tokens_max as usize).div_ceil(16) * request.candidates.len()
    };
    let generated = requests.iter().filter(|request| !request.embedding);
    let together = generated.map(needs).sum::<usize>() as u32 * BATCH / PROMPTS as u32;
    let pool = together
        / if model.checkpoint.spec.window.is_some() {
            10
        } else {
            4
        };
    let (answers, _, stats) = model.run(
        Way {
            blocks: pool + 1,
            threads: 3,
            ..BATCHED
        },
        requests,
    );
    assert!(
        stats.preemptions > 0,
        "the pool of {pool} blocks is too small"
    );
    assert_same(
        &format!("{name}, preempted {} times", stats.preemptions),
        &alone,
        &answers,
    );
}

#[test]
fn llama_gives_the_same_bits_however_it_is_run() {
    check("tiny-llama", 1, KvDtype::Bf16);
}

#[test]
fn mistral_gives_the_same_bits_however_it_is_run() {
    check("tiny-mistral", 1, KvDtype::Bf16);
}

#[test]
fn mpt_gives_the_same_bits_however_it_is_run() {
    check("tiny-mpt", 1, KvDtype::Bf16);
}

#[test]
fn llama_on_two_ranks_gives_the_same_bits_however_it_is_run() {
    check("tiny-llama", 2, KvDtype::Bf16);
}

#[test]
fn mistral_on_two_ranks_gives_the_same_bits_however_it_is_run() {
    check("tiny-mistral", 2, KvDtype::Bf16);
}

#[test]
fn mpt_on_two_ranks_gives_the_same_bits_however_it_is_run() {
    check("tiny-mpt", 2, KvDtype::Bf16);
}

#[test]
fn llama_with_an_f32_cache_gives_the_same_bits_however_it_is_run() {
    check("tiny-llama", 1, KvDtype::F32);
}

#[test]
fn llama_with_an_int8_cache_gives_the_same_bits_however_it_is_run() {
    check("tiny-llama", 1, KvDtype::Int8);
}

#[test]
fn mistral_with_an_int8_cache_on_two_ranks_gives_the_same_bits_however_it_is_run() {
    check("tiny-mistral", 2, KvDtype::Int8);
}

#[test]
fn llama_in_int8_gives_the_same_bits_however_it_is_run() {
    check_weights("tiny-llama", 1, WeightDtype::Int8, KvDtype::Bf16);
}

#[test]
fn mistral_in_int4_gives_the_same_bits_however_it_is_run() {
    check_weights("tiny-mistral", 1, WeightDtype::Int4, KvDtype::Int8);
}

#[test]
fn mpt_in_int4_on_two_ranks_gives_the_same_bits_however_it_is_run() {
    check_weights("tiny-mpt", 2, WeightDtype::Int4, KvDtype::Bf16);
}
