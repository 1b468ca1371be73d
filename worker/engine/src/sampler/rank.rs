//! Tokens in falling order: larger logits first, of equals the lower ids. Finds the first ones without sorting the row.
//!
//! A token and its logit are one number, a [`Key`], whose order is the falling one: what is sorted are plain integers.

use crate::backend::cpu::Isa;

/// A token with its logit; smaller keys come first.
pub(super) type Key = u64;

/// Numbers looked at side by side.
const LANES: usize = 16;
/// Numbers of each lane that one maximum stands for, where the best few are looked for.
const DEPTH: usize = 16;

/// The key of a token. Zero has two signs and is one value.
#[inline(always)]
pub(super) fn key(x: f32, id: u32) -> Key {
    let bits = (x + 0.0).to_bits();
    let rising = if bits >> 31 == 1 {
        !bits
    } else {
        bits | 1 << 31
    };
    u64::from(!rising) << 32 | u64::from(id)
}

/// The token of a key.
pub(super) fn id(key: Key) -> u32 {
    key as u32
}

/// The logit of a key.
#[inline(always)]
pub(super) fn logit(key: Key) -> f32 {
    let rising = !((key >> 32) as u32);
    let positive = rising >> 31 == 1;
    f32::from_bits(if positive {
        rising & !(1 << 31)
    } else {
        !rising
    })
}

/// Index of the largest logit, the first of equals.
pub(super) fn argmax(logits: &[f32]) -> usize {
    Isa::detect().vectorise(|| {
        let max = max(logits);
        // Whole blocks first: so the search is vector code as well.
        let (blocks, _) = logits.as_chunks::<{ 4 * LANES }>();
        let has = |block: &[f32; 4 * LANES]| block.iter().fold(false, |has, x| has | (*x == max));
        let from = blocks.iter().position(has).unwrap_or(blocks.len()) * 4 * LANES;
        let at = logits[from..].iter().position(|x| *x == max);
        at.map_or(0, |at| from + at)
    })
}

#[inline(always)]
fn max(logits: &[f32]) -> f32 {
    let (blocks, rest) = logits.as_chunks::<{ 4 * LANES }>();
    let mut lanes = [f32::NEG_INFINITY; 4 * LANES];
    for block in blocks {
        for (lane, x) in lanes.iter_mut().zip(block) {
            *lane = larger(*lane, *x);
        }
    }
    lanes
        .iter()
        .chain(rest)
        .fold(f32::NEG_INFINITY, |max, x| larger(max, *x))
}

#[inline(always)]
fn larger(a: f32, b: f32) -> f32 {
    if b > a { b } else { a }
}

/// Fills `keys` with the logits of at least `least`, by id.
pub(super) fn collect(logits: &[f32], least: f32, keys: &mut Vec<Key>) {
    keys.clear();
    Isa::detect().vectorise(|| {
        let mut take = |from: usize, block: &[f32]| {
            for (&x, id) in block.iter().zip(from as u32..) {
                if x >= least {
                    keys.push(key(x, id));
                }
            }
        };
        let (blocks, rest) = logits.as_chunks::<LANES>();
        for (block, number) in blocks.iter().zip(0..) {
            // Most blocks hold none where few are looked for.
            if block.iter().fold(false, |any, x| any | (*x >= least)) {
                take(number * LANES, block);
            }
        }
        take(blocks.len() * LANES, rest);
    });
}

/// Fills `keys` with the `count` first in falling order, or all when there are fewer. `maxima` is scratch memory.
pub(super) fn rank(logits: &[f32], count: usize, keys: &mut Vec<Key>, maxima: &mut Vec<f32>) {
    keys.clear();
    if count == 0 {
        return;
    }
    collect(logits, least_of(logits, count, maxima), keys);
    if count < keys.len() {
        keys.select_nth_unstable(count);
        keys.truncate(count);
    }
    keys.sort_unstable();
}

/// From this many tokens on, counting digits sorts faster than comparing.
const RADIX_MIN: usize = 1024;
/// Bits of a digit; three of them are a logit.
const DIGIT: u32 = 11;

/// Puts tokens that are in the order of their ids into falling order. `spare` is scratch memory.
pub(super) fn sort(keys: &mut Vec<Key>, spare: &mut Vec<Key>) {
    if keys.len() < RADIX_MIN {
        return keys.sort_unstable();
    }
    // From the lowest digit of the logit on; each pass keeps the order of equals, so the ids need none.
    let digit = |key: Key, pass: u32| (key >> (32 + pass * DIGIT)) as usize & ((1 << DIGIT) - 1);
    let mut counts = [[0u32; 1 << DIGIT]; 3];
    for &key in &*keys {
        for (counts, pass) in counts.iter_mut().zip(0..) {
            counts[digit(key, pass)] += 1;
        }
    }
    for (counts, pass) in counts.iter_mut().zip(0..) {
        let mut next = 0;
        for count in counts.iter_mut() {
            next += std::mem::replace(count, next);
        }
        spare.clear();
        spare.resize(keys.len(), 0);
        for &key in &*keys {
            let place = &mut counts[digit(key, pass)];
            spare[*place as usize] = key;
            *place += 1;
        }
        std::mem::swap(keys, spare);
    }
}

/// A logit that at least `count` tokens reach, if there are so many, and few more: the `count`-th largest of the maxima of
/// disjoint groups of tokens.
fn least_of(logits: &[f32], count: usize, maxima: &mut Vec<f32>) -> f32 {
    maxima.clear();
    Isa::detect().vectorise(|| {
        let (blocks, _) = logits.as_chunks::<LANES>();
        for blocks in blocks.chunks_exact(DEPTH) {
            let mut lanes = [f32::NEG_INFINITY; LANES];
            for block in blocks {
                for (lane, x) in lanes.iter_mut().zip(block) {
                    *lane = larger(*lane, *x);
                }
            }
            maxima.extend_from_slice(&lanes);
        }
    });
    if maxima.len() < count {
        return f32::NEG_INFINITY;
    }
    let (_, least, _) = maxima.select_nth_unstable_by(count - 1, |a, b| b.total_cmp(a));
    *least
}
