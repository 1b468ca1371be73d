//! Tests of the scheduler against the fake runner: random walks in tiny spaces with all invariants checked at each
//! step, and the rules one by one.

use super::fake::{Expected, Fake, Rng, expected, expected_embedding, expected_scores};
use super::*;
use crate::mask::TokenMask;
use crate::mask::tests::Steps;
use crate::plan::{BLOCK_TOKENS, first_visible_block};
use crate::request::{Sampling, SequenceError};
use crate::runner::{Geometry, Sampled};
use std::collections::{BTreeMap, HashSet};
use std::time::Duration;

fn geometry(blocks: u32) -> Geometry {
    Geometry {
        blocks,
        context_max: 200,
        vocab: 5,
        window: None,
        step_tokens_max: 64,
        spans_max: 8,
    }
}

fn request(key: RequestKey, prompt: Vec<u32>, tokens_max: u32) -> Request {
    Request {
        key,
        prompt,
        candidates: vec![Candidate::default()],
        sampling: Sampling::default(),
        tokens_max,
        stop_ids: Vec::new(),
        prompt_logprobs: None,
        embedding: false,
        deadline: None,
    }
}

/// A prompt that the fake model goes on from for `outputs` greedy tokens without a fault.
fn calm_prompt(rng: &mut Rng, len: usize, outputs: u32, geometry: &Geometry) -> Vec<u32> {
    loop {
        let prompt: Vec<u32> = (0..len)
            .map(|_| rng.of(0..u64::from(geometry.vocab)) as u32)
            .collect();
        let request = request(0, prompt, outputs);
        if expected(&request, &request.candidates[0], geometry).reason == EndReason::Length {
            return request.prompt;
        }
    }
}

/// A scheduler with its runner, and the books on what each candidate gave and owes.
struct Harness {
    scheduler: Scheduler,
    fake: Fake,
    now: Instant,
    owed: BTreeMap<(RequestKey, u32), Owed>,
    scores_owed:
        BTreeMap<RequestKey, Result<Vec<Option<crate::request::TokenLogprob>>, SequenceError>>,
    embeddings_owed: BTreeMap<RequestKey, Vec<f32>>,
    ended: BTreeMap<(RequestKey, u32), (EndReason, u32)>,
    steps: u64,
}

struct Owed {
    expected: Expected,
    first_index: u32,
    given: usize,
}

impl Harness {
    fn new(geometry: Geometry, chunk_tokens_max: u32) -> Self {
        Harness {
            scheduler: Scheduler::new(SchedulerConfig::new(
                geometry,
                3,
                b"test".to_vec(),
                chunk_tokens_max,
            )),
            fake: Fake::new(geometry),
            now: Instant::now(),
            owed: BTreeMap::new(),
            scores_owed: BTreeMap::new(),
            embeddings_owed: BTreeMap::new(),
            ended: BTreeMap::new(),
            steps: 0,
        }
    }

    fn submit(&mut self, request: Request) {
        let geometry = self.scheduler.config.geometry;
        for candidate in &request.candidates {
            let expected = expected(&request, candidate, &geometry);
            let owed = Owed {
                expected,
                first_index: candidate.emitted.len() as u32,
                given: 0,
            };
            assert!(
                self.owed
                    .insert((request.key, candidate.index), owed)
                    .is_none()
            );
        }
        if request.prompt_logprobs.is_some() {
            self.scores_owed
                .insert(request.key, expected_scores(&request, &geometry));
        }
        if request.embedding {
            self.embeddings_owed
                .insert(request.key, expected_embedding(&request.prompt));
        }
        let mut events = Vec::new();
        self.scheduler.submit(request, &mut events);
        self.take(events);
    }

    fn cancel(&mut self, key: RequestKey) {
        self.end(key, None);
    }

    /// Cancels a request, or one candidate of it.
    fn end(&mut self, key: RequestKey, candidate: Option<u32>) {
        let mut events = Vec::new();
        self.scheduler.cancel(key, candidate, &mut events);
        let cancelled = |event: &Event| matches!(event, Event::Ended { reason: EndReason::Cancelled, key: k, .. } if *k == key);
        assert!(events.iter().all(cancelled), "{events:?}");
        self.take(events);
        self.check_blocks();
    }

    /// One step with all checks. False when there was nothing to run.
    fn step(&mut self) -> bool {
        let mut events = Vec::new();
        let before: HashSet<(RequestKey, u32)> = self
            .scheduler
            .running
            .iter()
            .map(|s| (s.shared.key, s.candidate))
            .collect();
        let preemptions = self.scheduler.counters.preemptions;
        let runs = self.scheduler.schedule(self.now, &mut events);
        self.take(events);
        self.check_blocks();
        self.check_plan(&before, preemptions);
        assert_eq!(
            runs,
            !self.scheduler.is_idle(),
            "as long as there is work, each step does some"
        );
        if !runs {
            return false;
        }
        let (samples, scores, pools) = self.scheduler.rows();
        let mut output = self
            .fake
            .run(self.scheduler.plan(), &samples, &scores, &pools);
        for (span, planned) in self
            .scheduler
            .plan
            .spans
            .iter()
            .zip(&self.scheduler.planned)
        {
            self.fake
                .check_visible(span, &self.scheduler.running[planned.running].tokens);
        }
        let mut events = Vec::new();
        self.scheduler
            .complete(&mut output, &mut events)
            .expect("the output answers the plan");
        self.take(events);
        self.check_blocks();
        self.steps += 1;
        true
    }

    fn run_until_idle(&mut self) {
        let mut left = 20_000;
        while self.step() {
            left -= 1;
            assert!(left > 0, "the work must come to an end");
        }
        assert_eq!(
            self.scheduler.blocks().used_count(),
            0,
            "all blocks are free"
        );
        assert!(
            self.owed.is_empty(),
            "every candidate ended: {:?}",
            self.owed.keys()
        );
    }

    fn take(&mut self, events: Vec<Event>) {
        for event in events {
            match event {
                Event::PromptLogprobs { key, tokens } => {
                    assert_eq!(
                        self.scores_owed.remove(&key),
                        Some(Ok(tokens)),
                        "the prompt's scores, once"
                    );
                }
                Event::Embedding { key, values } => {
                    assert_eq!(
                        self.embeddings_owed.remove(&key),
                        Some(values),
                        "the prompt's embedding, once"
                    );
                }
                Event::Token {
                    key,
                    candidate,
                    index,
                    id,
                    logprob,
                } => {
                    assert!(
                        !self.scores_owed.contains_key(&key),
                        "the prompt's scores come first"
                    );
                    let owed = self
                        .owed
                        .get_mut(&(key, candidate))
                        .expect("no token after the end");
                    assert_eq!(
                        index,
                        owed.first_index + owed.given as u32,
                        "no token twice, none left out"
                    );
                    assert_eq!(
                        owed.expected.tokens.get(owed.given),
                        Some(&Sampled { id, logprob }),
                        "{key}.{candidate}[{index}]"
                    );
                    owed.given += 1;
                }
                Event::Ended {
                    key,
                    candidate,
                    reason,
                    cached_tokens,
                } => {
                    let owed = self
                        .owed
                        .remove(&(key, candidate))
                        .expect("each candidate ends once");
                    match &reason {
                        EndReason::Cancelled | EndReason::Deadline => {}
                        EndReason::Error(
                            SequenceError::NeverFits { .. } | SequenceError::Invalid(_),
                        ) => assert_eq!(owed.given, 0),
                        EndReason::Error(SequenceError::NotFinite)
                            if matches!(self.scores_owed.get(&key), Some(Err(_))) =>
                        {
                            self.scores_owed.remove(&key);
                            assert_eq!(owed.given, 0);
                        }
                        reason => {
                            assert_eq!(
                                (owed.given, reason),
                                (owed.expected.tokens.len(), &owed.expected.reason)
                            );
                            assert!(!self.embeddings_owed.contains_key(&key));
                        }
                    }
                    self.ended.insert((key, candidate), (reason, cached_tokens));
                }
            }
        }
    }

    fn check_blocks(&self) {
        let Scheduler {
            running,
            waiting,
            parked,
            blocks,
            ..
        } = &self.scheduler;
        blocks.check_invariants(running.iter().map(|sequence| sequence.table.blocks()));
        assert!(
            waiting
                .iter()
                .chain(parked)
                .all(|sequence| sequence.table.blocks().is_empty()),
            "only running ones hold blocks"
        );
    }

    fn check_plan(&self, before: &HashSet<(RequestKey, u32)>, preemptions: u64) {
        let Scheduler {
            config,
            running,
            plan,
            planned,
            blocks,
            counters,
            ..
        } = &self.scheduler;
        assert_eq!(plan.check(&config.geometry), Ok(()));
        let planned_tokens: usize = plan.spans.iter().map(|span| span.len as usize).sum();
        assert_eq!(planned_tokens, plan.tokens.len());
        assert_eq!(
            planned
                .iter()
                .map(|planned| planned.running)
                .collect::<Vec<_>>(),
            (0..running.len()).collect::<Vec<_>>(),
            "every running sequence gets on in every step"
        );
        if counters.preemptions > preemptions {
            assert!(
                running
                    .iter()
                    .all(|s| before.contains(&(s.shared.key, s.candidate))),
                "no admission beside a preemption"
            );
        }
        for (span, sequence) in plan.spans.iter().zip(running) {
            assert!(span.len <= config.chunk_tokens_max);
            assert_eq!(span.position as usize, sequence.computed);
            for block in
                span.position as usize / BLOCK_TOKENS..(span.end() as usize).div_ceil(BLOCK_TOKENS)
            {
                assert_eq!(
                    blocks.refs(span.blocks[block]),
                    1,
                    "nobody shares a block that is written"
                );
            }
            let visible = first_visible_block(span.position as usize, config.geometry.window);
            assert!(
                span.blocks[..visible].iter().all(|&id| id == 0),
                "blocks behind the window are free"
            );
            assert!(
                sequence.table.held() <= config.blocks_most(sequence.tokens.len()),
                "no more blocks than reckoned"
            );
        }
    }
}

/// A random request over few prompt streams, so that prefixes are shared often.
fn random_request(rng: &mut Rng, key: RequestKey, harness: &Harness) -> Request {
    let Geometry {
        context_max, vocab, ..
    } = harness.scheduler.config.geometry;
    let stream = rng.of(0..3);
    // Short prompts with long outputs make running sequences outgrow the pool.
    let grows = rng.one_in(2);
    let len_max = if grows { 20 } else { u64::from(context_max) };
    let len = rng.of(1..len_max + 1).min(rng.of(1..len_max + 1));
    let own = rng.of(0..len + 1);
    let own = if rng.one_in(2) { 0 } else { own };
    let mut common = Rng(stream);
    let mut prompt: Vec<u32> = (0..len)
        .map(|_| common.of(0..u64::from(vocab)) as u32)
        .collect();
    let own_from = prompt.len() - own as usize;
    prompt[own_from..]
        .iter_mut()
        .for_each(|id| *id = rng.of(0..u64::from(vocab)) as u32);
    let emitted = |rng: &mut Rng| {
        let len = if rng.one_in(4) { rng.of(0..10) } else { 0 };
        (0..len)
            .map(|_| rng.of(0..u64::from(vocab)) as u32)
            .collect()
    };
    if rng.one_in(7) {
        return Request {
            embedding: true,
            ..request(key, prompt, 0)
        };
    }
    let mask = |rng: &mut Rng| -> Option<Box<dyn TokenMask>> {
        let steps = Steps {
            vocab,
            last: 0,
            left: rng.of(1..60) as u32,
        };
        rng.one_in(4).then(|| Box::new(steps) as _)
    };
    let count = if rng.one_in(3) { rng.of(2..5) } else { 1 };
    Request {
        candidates: (0..count)
            .map(|i| Candidate {
                index: i as u32 * 3,
                emitted: emitted(rng),
                mask: mask(rng),
            })
            .collect(),
        sampling: Sampling {
            temperature: rng.pick(&[0.0, 1.0, 5.0]),
            seed: rng.next(),
            logprobs: rng.pick(&[None, None, Some(0), Some(2)]),
            frequency_penalty: rng.pick(&[0.0, 0.0, 0.7]),
            ..Sampling::default()
        },
        stop_ids: if rng.one_in(8) {
            vec![rng.of(0..u64::from(vocab)) as u32]
        } else {
            Vec::new()
        },
        prompt_logprobs: rng.pick(&[None, None, None, None, None, Some(0), Some(2)]),
        embedding: false,
        deadline: rng
            .one_in(6)
            .then(|| harness.now + Duration::from_millis(rng.of(0..40))),
        ..request(key, prompt, if grows { 150 } else { rng.of(0..40) as u32 })
    }
}

fn random_harness(rng: &mut Rng) -> Harness {
    let blocks = rng.of(8..21) as u32;
    if rng.one_in(2) {
        // Under pressure: many sequences that may each fill the pool.
        let context_max = (blocks - 1) * 16;
        let geometry = Geometry {
            blocks,
            context_max,
            vocab: 2,
            window: None,
            step_tokens_max: 40,
            spans_max: 8,
        };
        return Harness::new(geometry, 16);
    }
    let geometry = Geometry {
        blocks,
        context_max: rng.of(20..u64::from(blocks) * 16) as u32,
        vocab: 2,
        window: rng.pick(&[None, None, Some(5), Some(16), Some(33)]),
        step_tokens_max: rng.of(1..60) as u32,
        spans_max: rng.of(1..8) as u32,
    };
    Harness::new(geometry, rng.pick(&[1, 3, 7, 16, 64]))
}

#[test]
fn a_hundred_thousand_random_steps_break_no_invariant_and_change_no_token() {
    let mut rng = Rng(1);
    let (mut steps, mut preemptions, mut hits, mut key) = (0, 0, 0, 0);
    let mut ends = BTreeMap::<String, u64>::new();
    while steps < 100_000 {
        let mut harness = random_harness(&mut rng);
        let pace = rng.of(2..16);
        while harness.steps < 300 {
            if rng.one_in(pace) {
                key += 1;
                let request = random_request(&mut rng, key, &harness);
                harness.submit(request);
            }
            if rng.one_in(25) {
                let candidate = rng.one_in(2).then(|| rng.of(0..3) as u32);
                harness.end(rng.of(key.saturating_sub(6)..key + 1), candidate);
            }
            if !harness.step() {
                harness.steps += 1;
            }
            harness.now += Duration::from_millis(1);
        }
        harness.run_until_idle();
        steps += harness.steps;
        preemptions += harness.scheduler.counters().preemptions;
        hits += harness.scheduler.counters().prefix_hits;
        for (reason, _) in harness.ended.values() {
            let name = format!("{reason:?}");
            *ends
                .entry(name.chars().take_while(|c| c.is_alphabetic()).collect())
                .or_default() += 1;
        }
    }
    println!("{steps} steps, {preemptions} preemptions, {hits} cached tokens, ends {ends:?}");
    assert!(
        preemptions > 1000 && hits > 10_000,
        "the walk meets what it is to test: {preemptions} preemptions, {hits} hits"
    );
    assert_eq!(
        ends.keys().collect::<Vec<_>>(),
        [
            "Cancelled",
            "Complete",
            "Deadline",
            "Error",
            "Length",
            "StopToken"
        ]
    );
}

#[test]
fn ten_thousand_random_cancels_leave_all_blocks_free() {
    let mut rng = Rng(2);
    let (mut cancels, mut key) = (0, 0);
    let mut states = [0u32; 4];
    while cancels < 10_000 {
        let mut harness = random_harness(&mut rng);
        let first = key;
        for _ in 0..100 {
            key += 1;
            let request = Request {
                deadline: None,
                ..random_request(&mut rng, key, &harness)
            };
            harness.submit(request);
            for _ in 0..rng.of(0..6) {
                harness.step();
            }
            let victim = rng.of(first + 1..key + 1);
            let of = |sequence: &Sequence| sequence.shared.key == victim;
            let Scheduler {
                running,
                waiting,
                parked,
                ..
            } = &harness.scheduler;
            states[0] += u32::from(running.iter().any(|s| of(s) && s.rest() > 1));
            states[1] += u32::from(running.iter().any(|s| of(s) && s.rest() == 1));
            states[2] += u32::from(waiting.iter().any(of));
            states[3] += u32::from(parked.iter().any(of));
            harness.cancel(victim);
            cancels += 1;
        }
        (first + 1..=key).for_each(|key| harness.cancel(key));
        assert!(harness.scheduler.is_idle());
        assert_eq!(harness.scheduler.blocks().used_count(), 0);
    }
    assert!(
        states.iter().all(|&count| count > 100),
        "prefilling, decoding, waiting and parked ones were cancelled: {states:?}"
    );
}

#[test]
#[should_panic(expected = "holds another sequence's K and V")]
fn the_fake_notices_a_block_of_another_sequence() {
    let mut harness = Harness::new(geometry(32), 64);
    let mut rng = Rng(12);
    for key in 1..=2 {
        harness.submit(request(key, calm_prompt(&mut rng, 40, 9, &geometry(32)), 9));
    }
    assert!(harness.step());
    assert!(harness.scheduler.schedule(harness.now, &mut Vec::new()));
    let mut plan = harness.scheduler.plan().clone();
    plan.spans[0].blocks[1] = plan.spans[1].blocks[1];
    let (samples, scores, pools) = harness.scheduler.rows();
    harness.fake.run(&plan, &samples, &scores, &pools);
}

#[test]
fn candidates_share_the_prompts_full_blocks() {
    let mut harness = Harness::new(geometry(32), 64);
    let prompt = calm_prompt(&mut Rng(3), 40, 4, &geometry(32));
    let candidates = (0..4)
        .map(|index| Candidate {
            index,
            emitted: Vec::new(),
            mask: None,
        })
        .collect();
    harness.submit(Request {
        candidates,
        ..request(1, prompt, 4)
    });
    assert!(harness.step());
    assert_eq!(
        harness.scheduler.running_count(),
        1,
        "the siblings wait for the prompt"
    );
    assert!(harness.step());
    assert_eq!(harness.scheduler.running_count(), 4);
    assert_eq!(
        harness.scheduler.blocks().used_count(),
        2 + 4,
        "two full blocks once, the rest of the prompt per candidate"
    );
    harness.run_until_idle();
    let cached: Vec<u32> = harness.ended.values().map(|(_, cached)| *cached).collect();
    assert_eq!(cached, [0, 32, 32, 32]);
}

#[test]
fn siblings_go_on_when_their_leader_ends_early() {
    let mut harness = Harness::new(geometry(32), 7);
    let mut rng = Rng(4);
    // A leader that fails on scoring its prompt.
    let prompt = loop {
        let prompt: Vec<u32> = (0..60).map(|_| rng.of(0..5) as u32).collect();
        let request = Request {
            prompt_logprobs: Some(0),
            ..request(1, prompt, 3)
        };
        let fails = expected_scores(&request, &geometry(32)).is_err();
        if fails
            && expected(&request, &request.candidates[0], &geometry(32)).reason == EndReason::Length
        {
            break request.prompt;
        }
    };
    let candidates = (0..2)
        .map(|index| Candidate {
            index,
            emitted: Vec::new(),
            mask: None,
        })
        .collect();
    harness.submit(Request {
        candidates,
        prompt_logprobs: Some(0),
        ..request(1, prompt, 3)
    });
    harness.run_until_idle();
    let reasons: Vec<EndReason> = harness
        .ended
        .into_values()
        .map(|(reason, _)| reason)
        .collect();
    assert_eq!(
        reasons,
        [
            EndReason::Error(SequenceError::NotFinite),
            EndReason::Length
        ]
    );
}

#[test]
fn decodes_get_their_token_beside_any_prompt() {
    let mut harness = Harness::new(
        Geometry {
            step_tokens_max: 10,
            ..geometry(64)
        },
        8,
    );
    let mut rng = Rng(5);
    harness.submit(request(1, calm_prompt(&mut rng, 150, 5, &geometry(64)), 5));
    for key in [2, 3] {
        harness.submit(request(
            key,
            calm_prompt(&mut rng, 2, 40, &geometry(64)),
            40,
        ));
    }
    let given = |harness: &Harness| {
        [2, 3].map(|key| harness.owed.get(&(key, 0)).map_or(0, |owed| owed.given))
    };
    while given(&harness).contains(&0) {
        assert!(harness.step());
    }
    let mut beside = 0;
    while harness.scheduler.running[0].rest() > 1 {
        let before = given(&harness);
        assert!(harness.step());
        assert_eq!(
            given(&harness),
            before.map(|given| given + 1),
            "a token in each step"
        );
        beside += 1;
    }
    assert!(beside > 10, "{beside} steps beside the prompt");
    harness.run_until_idle();
}

#[test]
fn the_youngest_is_preempted_goes_to_the_head_and_repeats_no_token() {
    let mut harness = Harness::new(geometry(9), 64);
    let mut rng = Rng(6);
    for key in 1..=3 {
        harness.submit(request(
            key,
            calm_prompt(&mut rng, 30, 60, &geometry(9)),
            60,
        ));
    }
    let mut preempted = Vec::new();
    while harness.step() {
        let in_front = harness
            .scheduler
            .waiting
            .front()
            .filter(|sequence| sequence.preemptions > 0);
        preempted.extend(in_front.map(|sequence| sequence.shared.key));
    }
    harness.run_until_idle();
    assert!(
        preempted.contains(&3) && !preempted.contains(&1),
        "{preempted:?}"
    );
    assert!(harness.scheduler.counters().preemptions > 0);
}

#[test]
fn one_preempted_often_is_spared_for_one_preempted_less() {
    let mut harness = Harness::new(geometry(9), 64);
    let mut rng = Rng(7);
    for key in 1..=2 {
        harness.submit(request(
            key,
            calm_prompt(&mut rng, 30, 60, &geometry(9)),
            60,
        ));
    }
    assert!(harness.step());
    assert_eq!(harness.scheduler.victim_from(0), 1);
    harness.scheduler.running[1].preemptions = planning::PREEMPTIONS_MAX;
    assert_eq!(harness.scheduler.victim_from(0), 0);
    harness.scheduler.running[0].preemptions = planning::PREEMPTIONS_MAX;
    assert_eq!(harness.scheduler.victim_from(0), 1);
    harness.run_until_idle();
}

#[test]
fn scored_prompts_skip_the_cache_and_others_use_it() {
    let mut harness = Harness::new(geometry(32), 64);
    let mut rng = Rng(8);
    let scored = loop {
        let prompt = calm_prompt(&mut rng, 50, 2, &geometry(32));
        let request = Request {
            prompt_logprobs: Some(1),
            ..request(2, prompt, 2)
        };
        if expected_scores(&request, &geometry(32)).is_ok() {
            break request;
        }
    };
    harness.submit(request(1, scored.prompt.clone(), 2));
    harness.run_until_idle();
    harness.submit(scored.clone());
    harness.submit(Request {
        key: 3,
        prompt_logprobs: None,
        ..scored.clone()
    });
    harness.submit(Request {
        key: 4,
        tokens_max: 0,
        ..scored
    });
    harness.run_until_idle();
    let cached: Vec<u32> = harness.ended.values().map(|(_, cached)| *cached).collect();
    assert_eq!(cached, [0, 0, 48, 0]);
    assert!(harness.scores_owed.is_empty());
    assert_eq!(harness.scheduler.counters().prefix_hits, 48);
}

#[test]
fn an_embedding_skips_the_cache_and_leaves_its_blocks_there() {
    let mut harness = Harness::new(geometry(32), 7);
    let prompt = calm_prompt(&mut Rng(12), 50, 2, &geometry(32));
    harness.submit(request(1, prompt.clone(), 2));
    harness.run_until_idle();
    harness.submit(Request {
        embedding: true,
        ..request(2, prompt.clone(), 0)
    });
    harness.run_until_idle();
    harness.submit(request(3, prompt, 2));
    harness.run_until_idle();
    let ends: Vec<(EndReason, u32)> = harness.ended.into_values().collect();
    let end = |cached| (EndReason::Length, cached);
    assert_eq!(ends, [end(0), end(0), end(48)]);
}

#[test]
fn expired_work_ends_before_it_is_prefilled() {
    let mut harness = Harness::new(geometry(32), 64);
    let deadline = Some(harness.now + Duration::from_millis(5));
    harness.submit(Request {
        deadline,
        ..request(1, calm_prompt(&mut Rng(9), 20, 60, &geometry(32)), 60)
    });
    assert!(harness.step());
    harness.now += Duration::from_millis(5);
    harness.submit(Request {
        deadline,
        ..request(2, vec![1; 20], 60)
    });
    assert!(!harness.step(), "nothing is left to run");
    let reasons: Vec<EndReason> = harness
        .ended
        .values()
        .map(|(reason, _)| reason.clone())
        .collect();
    assert_eq!(reasons, [EndReason::Deadline, EndReason::Deadline]);
    assert_eq!(
        harness.scheduler.counters().tokens_in,
        20,
        "the second never ran"
    );
}

#[test]
fn what_has_nothing_to_do_or_can_never_run_ends_at_once() {
    let mut harness = Harness::new(geometry(4), 64);
    harness.submit(request(1, vec![1; 10], 0));
    harness.submit(request(2, vec![1; 49], 1));
    harness.submit(request(3, vec![9], 1));
    let emitted = Candidate {
        index: 0,
        emitted: vec![1, 2],
        mask: None,
    };
    harness.submit(Request {
        candidates: vec![emitted],
        ..request(4, vec![1], 2)
    });
    assert!(harness.scheduler.is_idle());
    let reasons: Vec<EndReason> = harness
        .ended
        .values()
        .map(|(reason, _)| reason.clone())
        .collect();
    assert_eq!(reasons[0], EndReason::Length);
    assert_eq!(
        reasons[1],
        EndReason::Error(SequenceError::NeverFits {
            needed: 4,
            available: 3
        })
    );
    assert!(matches!(
        &reasons[2],
        EndReason::Error(SequenceError::Invalid(_))
    ));
    assert_eq!(reasons[3], EndReason::Length);
}

#[test]
fn the_end_of_the_context_ends_a_sequence() {
    let small = Geometry {
        context_max: 20,
        ..geometry(32)
    };
    let mut harness = Harness::new(small, 64);
    let prompt = calm_prompt(&mut Rng(10), 15, 100, &small);
    harness.submit(request(1, prompt, 100));
    harness.run_until_idle();
    assert_eq!(harness.scheduler.counters().tokens_out, 5);
}

#[test]
fn an_output_that_does_not_answer_the_plan_is_a_broken_step() {
    let mut harness = Harness::new(geometry(32), 64);
    harness.submit(request(1, vec![1; 10], 5));
    assert!(harness.scheduler.schedule(harness.now, &mut Vec::new()));
    let result = harness
        .scheduler
        .complete(&mut StepOutput::default(), &mut Vec::new());
    assert!(
        matches!(result, Err(StepError::Broken(text)) if text.contains("(0, 0, 0) where (1, 0, 0)"))
    );
}

#[test]
fn the_backlog_counts_what_was_never_admitted() {
    let mut harness = Harness::new(geometry(32), 64);
    let prompt = calm_prompt(&mut Rng(11), 40, 4, &geometry(32));
    let candidates: Vec<Candidate> = (0..3)
        .map(|index| Candidate {
            index,
            emitted: vec![],
            mask: None,
        })
        .collect();
    let first = Request {
        candidates,
        ..request(1, prompt, 4)
    };
    let of = Backlog::of(&first);
    assert_eq!(
        of,
        Backlog {
            tokens: 40,
            sequences: 3
        }
    );
    harness.submit(first);
    assert_eq!(harness.scheduler.backlog(), of);
    assert!(harness.step());
    assert!(harness.step());
    assert_eq!(harness.scheduler.backlog(), Backlog::default());
    harness.run_until_idle();
}
