//! Tokens drawn on the device: those that the host's sampler chooses, for all ways of choosing.

use super::Twins;
use crate::backend::{Backend, Draw, NOT_FINITE};
use crate::sampler;

/// Rows of logits, each drawn from in several ways; vocabularies of one token, of odd sizes and of many runs.
pub(super) fn like_the_sampler<B: Backend>(twins: &mut Twins<B>) {
    if !twins.device.draws(1) {
        return;
    }
    let vocabularies = [
        (1, 20),
        (2, 20),
        (31, 40),
        (257, 60),
        (1000, 60),
        (5003, 12),
    ];
    for (vocab, rows) in vocabularies {
        let logits = rows_of_logits(twins, rows, vocab);
        let draws: Vec<Draw> = (0..3 * rows)
            .map(|i| random_draw(twins, (i % rows) as u32, vocab))
            .collect();
        let buf = twins.buf(&logits);
        // Two calls, whose tokens come back in order.
        let (first, second) = draws.split_at(rows);
        twins.device.draw(vocab, &buf.device, first);
        twins.device.draw(vocab, &buf.device, second);
        let mut drawn = vec![7];
        twins.device.drawn(&mut drawn).expect("a working device");
        assert_eq!(
            (drawn.len(), drawn[0]),
            (1 + draws.len(), 7),
            "tokens are appended"
        );
        for (token, draw) in drawn[1..].iter().zip(&draws) {
            let row = &logits[draw.row as usize * vocab..][..vocab];
            let expected = sampler::choose(row, draw);
            assert_eq!(*token, expected, "of {vocab} tokens, {draw:?}");
        }
        let mut none = Vec::new();
        twins.device.drawn(&mut none).expect("a working device");
        assert!(none.is_empty(), "tokens are given once");
    }
    let logits = [0.0, f32::NAN, 1.0, 2.0, f32::INFINITY, 0.0, 1.0, 2.0, 3.0];
    let buf = twins.buf(&logits);
    let draws = [0, 1, 2].map(|row| Draw {
        row,
        temperature: 1.0,
        top_k: 0,
        top_p: 1.0,
        min_p: 0.0,
        u: 0.999,
    });
    twins.device.draw(3, &buf.device, &draws);
    let mut drawn = Vec::new();
    twins.device.drawn(&mut drawn).expect("a working device");
    assert_eq!(drawn, [NOT_FINITE, NOT_FINITE, 2]);
}

/// Some rows flat, some steep, some full of equals.
fn rows_of_logits<B: Backend>(twins: &mut Twins<B>, rows: usize, vocab: usize) -> Vec<f32> {
    let mut logits = Vec::with_capacity(rows * vocab);
    for row in 0..rows {
        let size = [0.5, 8.0, 30.0, 1e-3][row % 4];
        let values = twins.random.numbers(vocab, size);
        let steps = if row % 3 == 0 { 4.0 / size } else { 0.0 };
        logits.extend(values.iter().map(|x| {
            if steps > 0.0 {
                (x * steps).round() / steps
            } else {
                *x
            }
        }));
    }
    logits
}

fn random_draw<B: Backend>(twins: &mut Twins<B>, row: u32, vocab: usize) -> Draw {
    let mut pick = |of: usize| twins.random.next() as usize % of;
    let temperature = [0.0, 1e-6, 0.3, 0.7, 1.0, 2.5][pick(6)];
    let top_k = [0, 0, 1, 5, 64, 65, vocab, 2 * vocab][pick(8)] as u32;
    let top_p = [1.0, 1.0, 1e-6, 0.3, 0.9, 0.999][pick(6)];
    let min_p = [0.0, 0.0, 0.05, 0.9, 1.0][pick(5)];
    let u = [
        0.0,
        0.999_999_999_999,
        (pick(1 << 30)) as f64 / f64::from(1 << 30),
    ][pick(3)];
    Draw {
        row,
        temperature,
        top_k,
        top_p,
        min_p,
        u,
    }
}
