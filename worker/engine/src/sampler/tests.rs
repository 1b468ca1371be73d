//! Tests of the sampler: each field's effect alone and together, and the distributions it draws from.

use super::*;
use crate::mask::MaskSlot;

const ROW: [f32; 8] = [0.5, -1.0, 2.0, 1.5, 0.0, 2.0, -3.0, 1.0];

fn row<'a>(sampling: &'a Sampling, prompt: &'a [u32], outputs: &'a [u32]) -> SampleRow<'a> {
    SampleRow {
        span: 0,
        sampling,
        candidate: 0,
        output_index: outputs.len() as u32,
        prompt,
        outputs,
        mask: None,
    }
}

fn draw(logits: &[f32], sampling: &Sampling, output_index: u32) -> u32 {
    let row = SampleRow {
        output_index,
        ..row(sampling, &[], &[])
    };
    sample(&mut logits.to_vec(), &row).expect("finite").id
}

#[test]
fn a_mask_is_obeyed_by_every_way_to_choose_and_logprobs_stay_those_of_the_raw_row() {
    use crate::mask::tests::Steps;
    let ways = [
        Sampling::default(),
        seeded(1.0),
        seeded(50.0),
        Sampling {
            top_k: 5,
            ..seeded(5.0)
        },
        Sampling {
            top_p: 0.5,
            ..seeded(5.0)
        },
        Sampling {
            min_p: 0.9,
            ..seeded(5.0)
        },
        Sampling {
            logit_bias: vec![(2, 100.0)],
            repetition_penalty: 2.0,
            presence_penalty: 1.0,
            ..seeded(5.0)
        },
    ];
    let plain = score(&ROW, 0, 8).expect("finite");
    for sampling in ways.map(|sampling| Sampling {
        logprobs: Some(8),
        ..sampling
    }) {
        let mut seen = [false; 8];
        for output_index in 0..200 {
            // Allows 4 and 5 of eight, and 4 alone each third time.
            let mask = MaskSlot::new(Box::new(Steps {
                vocab: 8,
                last: 3,
                left: output_index % 3,
            }));
            let row = SampleRow {
                output_index,
                mask: Some(&mask),
                ..row(&sampling, &[1, 2], &[4, 2])
            };
            let sampled = sample(&mut ROW.to_vec(), &row).expect("some are allowed");
            assert!(sampled.id == 4 || (sampled.id == 5 && output_index % 3 != 0));
            seen[sampled.id as usize] = true;
            let logprob = sampled.logprob.expect("asked for");
            assert_eq!(logprob.top, plain.top);
            assert!(plain.top.contains(&(sampled.id, logprob.logprob)));
        }
        assert!(seen[4] && seen[5], "{sampling:?}");
    }
}

fn seeded(temperature: f32) -> Sampling {
    Sampling {
        temperature,
        seed: 42,
        ..Sampling::default()
    }
}

fn softmax_of(logits: &[f32], temperature: f32) -> Vec<f64> {
    let weights: Vec<f64> = logits
        .iter()
        .map(|&x| f64::from(x / temperature).exp())
        .collect();
    let sum: f64 = weights.iter().sum();
    weights.into_iter().map(|weight| weight / sum).collect()
}

/// Draws often and compares the counts with `expected`; where it is 0 no draw may fall.
fn assert_distribution(logits: &[f32], sampling: &Sampling, expected: &[f64]) {
    let draws = if expected.len() > 100 {
        30_000
    } else {
        100_000
    };
    let mut counts = vec![0u32; expected.len()];
    (0..draws).for_each(|index| counts[draw(logits, sampling, index) as usize] += 1);
    let mut chi_square = 0.0;
    let mut freedom = -1.0f64;
    for (id, (&count, &probability)) in counts.iter().zip(expected).enumerate() {
        if probability == 0.0 {
            assert_eq!(count, 0, "token {id} is filtered out");
            continue;
        }
        let mean = probability * f64::from(draws);
        chi_square += (f64::from(count) - mean).powi(2) / mean;
        freedom += 1.0;
    }
    // The 99.99 % quantile, by Wilson and Hilferty.
    let spread = 2.0 / (9.0 * freedom.max(1.0));
    let limit = freedom.max(1.0) * (1.0 - spread + 3.72 * spread.sqrt()).powi(3);
    assert!(
        chi_square < limit,
        "chi-square {chi_square} of {freedom} degrees, limit {limit}; counts {counts:?}"
    );
}

/// The probabilities of the tokens in `kept`, the others 0, summing to 1.
fn only(probabilities: &[f64], kept: &[usize]) -> Vec<f64> {
    let sum: f64 = kept.iter().map(|&id| probabilities[id]).sum();
    (0..probabilities.len())
        .map(|id| {
            if kept.contains(&id) {
                probabilities[id] / sum
            } else {
                0.0
            }
        })
        .collect()
}

#[test]
fn greedy_takes_the_lowest_id_of_equals() {
    assert_eq!(draw(&ROW, &Sampling::default(), 0), 2);
    assert_eq!(draw(&[0.0, -0.0, 0.0], &Sampling::default(), 0), 0);
}

#[test]
fn temperature_draws_follow_the_softmax() {
    for temperature in [0.5, 1.0, 2.0] {
        assert_distribution(&ROW, &seeded(temperature), &softmax_of(&ROW, temperature));
    }
}

#[test]
fn a_wide_row_is_drawn_from_across_all_runs() {
    let logits: Vec<f32> = (0..1000).map(|i| (i % 7) as f32 * 0.3).collect();
    assert_distribution(&logits, &seeded(1.0), &softmax_of(&logits, 1.0));
}

#[test]
fn top_k_keeps_the_most_probable_and_lower_ids_of_equals() {
    let all = softmax_of(&ROW, 1.0);
    assert_distribution(
        &ROW,
        &Sampling {
            top_k: 3,
            ..seeded(1.0)
        },
        &only(&all, &[2, 5, 3]),
    );
    assert_distribution(
        &ROW,
        &Sampling {
            top_k: 99,
            ..seeded(1.0)
        },
        &all,
    );
    let tied = [1.0, 2.0, 1.0, 1.0];
    assert_distribution(
        &tied,
        &Sampling {
            top_k: 2,
            ..seeded(1.0)
        },
        &only(&softmax_of(&tied, 1.0), &[1, 0]),
    );
}

#[test]
fn top_p_keeps_the_smallest_set_that_reaches_it() {
    let all = softmax_of(&ROW, 1.0);
    let two = all[2] + all[5];
    for (top_p, kept) in [
        (two - 1e-4, &[2, 5][..]),
        (two + 1e-4, &[2, 5, 3]),
        (all[2] - 1e-4, &[2]),
        (1e-9, &[2]),
    ] {
        let sampling = Sampling {
            top_p: top_p as f32,
            ..seeded(1.0)
        };
        assert_distribution(&ROW, &sampling, &only(&all, kept));
    }
}

#[test]
fn top_p_counts_shares_of_what_top_k_left() {
    // Of tokens 2, 5 and 3 alone, 2 and 5 hold 2 e^2 / (2 e^2 + e^1.5) = 0.767.
    let all = softmax_of(&ROW, 1.0);
    let sampling = |top_p| Sampling {
        top_k: 3,
        top_p,
        ..seeded(1.0)
    };
    assert_distribution(&ROW, &sampling(0.76), &only(&all, &[2, 5]));
    assert_distribution(&ROW, &sampling(0.775), &only(&all, &[2, 5, 3]));
}

#[test]
fn min_p_keeps_what_is_probable_enough_beside_the_best() {
    let all = softmax_of(&ROW, 1.0);
    // Relative to the best: 1.5 is e^-0.5 = 0.607, 1.0 is 0.368, 0.5 is 0.223.
    assert_distribution(
        &ROW,
        &Sampling {
            min_p: 0.5,
            ..seeded(1.0)
        },
        &only(&all, &[2, 5, 3]),
    );
    assert_distribution(
        &ROW,
        &Sampling {
            min_p: 0.3,
            ..seeded(1.0)
        },
        &only(&all, &[2, 5, 3, 7]),
    );
    assert_distribution(
        &ROW,
        &Sampling {
            min_p: 0.5,
            top_k: 2,
            ..seeded(1.0)
        },
        &only(&all, &[2, 5]),
    );
}

#[test]
fn filters_that_leave_one_token_equal_greedy() {
    for seed in 0..200 {
        let logits: Vec<f32> = (0..300)
            .map(|i| random::uniform(seed, i, 0) as f32)
            .collect();
        let greedy = draw(&logits, &Sampling::default(), 0);
        let one = |change: fn(&mut Sampling)| {
            let mut sampling = Sampling {
                seed,
                ..seeded(1.0)
            };
            change(&mut sampling);
            draw(&logits, &sampling, 0)
        };
        assert_eq!(one(|s| s.top_k = 1), greedy);
        assert_eq!(one(|s| s.top_p = 1e-9), greedy);
        assert_eq!(one(|s| s.min_p = 1.0), greedy);
        assert_eq!(one(|s| s.temperature = 1e-9), greedy);
        assert_eq!(one(|s| s.temperature = f32::MIN_POSITIVE / 8.0), greedy);
    }
}

#[test]
fn a_flat_row_wider_than_one_ranking_pass_keeps_its_whole_nucleus() {
    let logits = vec![1.0; 2000];
    let mut probabilities = vec![0.0; 2000];
    probabilities[..1000].fill(1e-3);
    let sampling = Sampling {
        top_p: 0.49999,
        ..seeded(1.0)
    };
    assert_distribution(&logits, &sampling, &probabilities);
}

/// What [`choose`] does, by sorting the whole row.
fn choose_by_sorting(logits: &[f32], draw: &Draw) -> u32 {
    let mut ranked: Vec<(f32, u32)> = logits.iter().copied().zip(0..).collect();
    ranked.sort_by(|a, b| b.0.partial_cmp(&a.0).expect("finite").then(a.1.cmp(&b.1)));
    let best = ranked[0];
    if draw.temperature == 0.0 {
        return best.1;
    }
    let softmax = softmax::Softmax {
        max: best.0,
        scale: (1.0 / draw.temperature).min(1e30),
    };
    let weight = |x: f32| f64::from(softmax.weight(x));
    let sum = |kept: &[(f32, u32)]| kept.iter().map(|(x, _)| weight(*x)).sum::<f64>();
    let mut whole = softmax.sum(logits);
    if draw.top_k > 0 {
        ranked.truncate(draw.top_k as usize);
        whole = sum(&ranked);
    } else if draw.top_p >= 1.0 {
        ranked.sort_by_key(|(_, id)| *id);
    }
    if draw.top_p < 1.0 {
        let mut running = 0.0;
        let reached = ranked.iter().position(|(x, _)| {
            running += weight(*x);
            running >= f64::from(draw.top_p) * whole
        });
        ranked.truncate(reached.map_or(ranked.len(), |at| at + 1));
    }
    ranked.retain(|(x, _)| weight(*x) >= f64::from(draw.min_p));
    let mut left = draw.u * sum(&ranked);
    for (x, id) in ranked {
        if left < weight(x) {
            return id;
        }
        left -= weight(x);
    }
    best.1
}

proptest::proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig::with_cases(400))]

    #[test]
    fn filtered_draws_are_those_of_a_row_that_is_sorted_whole(
        seed in 0u64..1 << 40,
        len in proptest::prop_oneof![1usize..40, 200usize..300, 3000usize..9000],
        spread in proptest::prop_oneof![0.0f32..0.1, 0.5f32..3.0, 5.0f32..40.0],
        // Logits of few values have many ties, also of the two zeros.
        steps in proptest::prop_oneof![0.0f32..3.0, 5.0f32..50.0, 1e6f32..1e7],
        temperature in proptest::prop_oneof![0.0f32..0.01, 0.3f32..2.0, 100.0f32..1e9],
        top_k in proptest::prop_oneof![0u32..1, 1u32..70, 100u32..5000],
        top_p in proptest::prop_oneof![1.0f32..1.01, 0.0001f32..0.1, 0.5f32..0.99999],
        min_p in proptest::prop_oneof![0.0f32..0.00001, 0.001f32..1.0],
    ) {
        let logits: Vec<f32> = (0..len as u32)
            .map(|id| {
                let even = random::uniform(seed, id, 0) - random::uniform(seed, id, 1);
                (even as f32 * steps).round() / steps.max(1.0) * spread
            })
            .collect();
        let min_p = if min_p < 0.00001 { 0.0 } else { min_p };
        proptest::prop_assume!(top_k > 0 || top_p < 1.0 || min_p > 0.0);
        for index in 0..8 {
            let u = random::uniform(seed, 0, index);
            let draw = Draw { row: 0, temperature, top_k, top_p, min_p, u };
            proptest::prop_assert_eq!(choose(&logits, &draw), choose_by_sorting(&logits, &draw), "{:?}", draw);
        }
    }
}

#[test]
fn the_best_are_found_in_falling_order_however_many() {
    for seed in 0..50 {
        // Few distinct values: many ties.
        let logits: Vec<f32> = (0..500)
            .map(|i| (random::uniform(seed, i, 0) * 40.0).floor() as f32 - 20.0)
            .collect();
        let mut expected: Vec<(u32, f32)> = (0..).zip(logits.iter().copied()).collect();
        expected.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        for count in [0, 1, 5, 16, 17, 300, 500, 501] {
            let mut kept = Kept::default();
            let best: Vec<(u32, f32)> = kept.rank(&logits, count).collect();
            assert_eq!(best, expected[..count.min(500)], "the best {count}");
        }
    }
}

#[test]
fn penalties_and_biases_change_logits_by_their_formulas() {
    let sampling = Sampling {
        repetition_penalty: 2.0,
        presence_penalty: 0.25,
        frequency_penalty: 0.5,
        logit_bias: vec![(4, 3.0)],
        ..Sampling::default()
    };
    let mut logits = ROW;
    // Twice: the counts must be clean after the first call.
    for _ in 0..2 {
        logits = ROW;
        let sampled = sample(&mut logits, &row(&sampling, &[2, 2, 6], &[5, 5, 1])).expect("finite");
        assert_eq!(sampled.id, 4);
    }
    let expected = [
        0.5,
        -2.0 - 0.75,
        2.0 / 2.0,
        1.5,
        3.0,
        2.0 / 2.0 - 1.25,
        -3.0 * 2.0,
        1.0,
    ];
    assert_eq!(logits, expected);
}

#[test]
fn presence_and_frequency_look_at_outputs_only() {
    let sampling = Sampling {
        presence_penalty: 1.0,
        frequency_penalty: 1.0,
        ..Sampling::default()
    };
    let mut logits = ROW;
    sample(&mut logits, &row(&sampling, &[2, 5], &[])).expect("finite");
    assert_eq!(logits, ROW);
}

#[test]
fn a_draw_depends_on_seed_candidate_and_index_alone() {
    let flat = [0.0; 4096];
    let of = |seed, candidate, output_index| {
        let sampling = Sampling {
            seed,
            ..seeded(1.0)
        };
        sample(
            &mut flat.to_vec(),
            &SampleRow {
                candidate,
                output_index,
                ..row(&sampling, &[], &[])
            },
        )
        .expect("finite")
        .id
    };
    assert_eq!(of(1, 2, 3), of(1, 2, 3));
    let others = [of(2, 2, 3), of(1, 3, 3), of(1, 2, 4)];
    assert!(others.iter().all(|&id| id != of(1, 2, 3)), "{others:?}");
}

#[test]
fn logprobs_are_of_the_raw_row() {
    let probabilities = softmax_of(&ROW, 1.0);
    let expected = |id: u32| probabilities[id as usize].ln() as f32;
    let sampling = Sampling {
        temperature: 0.3,
        top_k: 1,
        logit_bias: vec![(6, 100.0)],
        repetition_penalty: 3.0,
        logprobs: Some(3),
        ..Sampling::default()
    };
    let sampled = sample(&mut ROW.to_vec(), &row(&sampling, &[6], &[])).expect("finite");
    let logprob = sampled.logprob.expect("asked for");
    assert_eq!((sampled.id, logprob.id), (6, 6));
    assert!((logprob.logprob - expected(6)).abs() < 1e-6);
    assert_eq!(
        logprob.top.iter().map(|&(id, _)| id).collect::<Vec<_>>(),
        [2, 5, 3]
    );
    logprob
        .top
        .iter()
        .for_each(|&(id, logprob)| assert!((logprob - expected(id)).abs() < 1e-6));
}

#[test]
fn a_score_equals_the_logprob_of_a_sampled_token() {
    let sampling = Sampling {
        logprobs: Some(2),
        ..Sampling::default()
    };
    let sampled = sample(&mut ROW.to_vec(), &row(&sampling, &[], &[])).expect("finite");
    assert_eq!(
        Some(score(&ROW, sampled.id, 2).expect("finite")),
        sampled.logprob
    );
    assert_eq!(score(&ROW, 1, 0).expect("finite").top, []);
    assert!(matches!(score(&ROW, 8, 0), Err(SequenceError::Invalid(_))));
}

#[test]
fn a_row_that_is_not_finite_is_an_error() {
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        for at in [0, 3, 7] {
            let mut logits = ROW;
            logits[at] = bad;
            assert_eq!(
                sample(&mut logits, &row(&seeded(1.0), &[], &[])),
                Err(SequenceError::NotFinite)
            );
            assert_eq!(score(&logits, 0, 1), Err(SequenceError::NotFinite));
        }
    }
    assert!(matches!(
        sample(&mut [], &row(&seeded(1.0), &[], &[])),
        Err(SequenceError::Invalid(_))
    ));
}

#[test]
fn a_device_draws_what_nothing_but_the_row_decides() {
    use crate::mask::tests::Steps;
    let plain = Sampling {
        temperature: 0.7,
        top_k: 4,
        top_p: 0.9,
        min_p: 0.01,
        seed: 9,
        ..Sampling::default()
    };
    let drawn = super::draw(&row(&plain, &[1], &[2, 3]), 5).expect("plain");
    let u = random::uniform(9, 0, 2);
    assert_eq!((drawn.row, drawn.temperature, drawn.u), (5, 0.7, u));
    assert_eq!((drawn.top_k, drawn.top_p, drawn.min_p), (4, 0.9, 0.01));
    let others: [fn(&mut Sampling); 5] = [
        |sampling| sampling.logprobs = Some(0),
        |sampling| sampling.logit_bias = vec![(1, 0.0)],
        |sampling| sampling.repetition_penalty = 1.1,
        |sampling| sampling.presence_penalty = 0.1,
        |sampling| sampling.frequency_penalty = -0.1,
    ];
    for change in others {
        let mut sampling = plain.clone();
        change(&mut sampling);
        assert_eq!(super::draw(&row(&sampling, &[1], &[2]), 0), None);
    }
    let (vocab, last, left) = (8, 3, 1);
    let mask = MaskSlot::new(Box::new(Steps { vocab, last, left }));
    let masked = SampleRow {
        mask: Some(&mask),
        ..row(&plain, &[1], &[2])
    };
    assert_eq!(super::draw(&masked, 0), None);
}

#[test]
fn a_draw_chooses_as_the_host_does_and_tells_a_broken_row() {
    for sampling in [
        Sampling::default(),
        seeded(1.0),
        Sampling {
            top_k: 3,
            top_p: 0.8,
            ..seeded(2.0)
        },
        Sampling {
            min_p: 0.2,
            ..seeded(3.0)
        },
    ] {
        for output_index in 0..100 {
            let row = SampleRow {
                output_index,
                ..row(&sampling, &[], &[])
            };
            let drawn = choose(&ROW, &super::draw(&row, 0).expect("plain"));
            assert_eq!(drawn, draw(&ROW, &sampling, output_index));
        }
        let drawn = super::draw(&row(&sampling, &[], &[]), 0).expect("plain");
        for broken in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            assert_eq!(choose(&[1.0, broken], &drawn), NOT_FINITE);
        }
        assert_eq!(choose(&[], &drawn), NOT_FINITE);
    }
}
