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

#[test]
fn ranking_by_insertion_and_by_selection_agree() {
    for seed in 0..50 {
        // Few distinct values: many ties.
        let logits: Vec<f32> = (0..500)
            .map(|i| (random::uniform(seed, i, 0) * 40.0).floor() as f32)
            .collect();
        let mut expected: Vec<(f32, u32)> = logits.iter().copied().zip(0..).collect();
        expected.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
        for count in [0, 1, 5, INSERTION_MAX, INSERTION_MAX + 1, 300, 500, 501] {
            let mut ranked = vec![(9.0, 9)];
            rank(&logits, count, &mut ranked);
            assert_eq!(ranked, expected[..count.min(500)], "the best {count}");
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
