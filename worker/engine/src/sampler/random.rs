//! Random numbers without state: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011).
//!
//! A draw is a pure function of seed, candidate and output index, so a sequence that is recomputed, moved or batched
//! differently draws the same numbers.

const MULTIPLIERS: [u32; 2] = [0xd251_1f53, 0xcd9e_8d57];
const WEYL: [u32; 2] = [0x9e37_79b9, 0xbb67_ae85];
const ROUNDS: usize = 10;

/// A number in `[0, 1)`, a multiple of 2^-53. Key: the seed's halves. Counter: output index, candidate, 0, 0.
pub fn uniform(seed: u64, candidate: u32, output_index: u32) -> f64 {
    let [high, low, ..] = philox(
        [output_index, candidate, 0, 0],
        [seed as u32, (seed >> 32) as u32],
    );
    let bits = (u64::from(high) << 32 | u64::from(low)) >> 11;
    bits as f64 / (1u64 << 53) as f64
}

fn philox(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for _ in 0..ROUNDS {
        let [a, b] = [0, 1].map(|i| u64::from(MULTIPLIERS[i]) * u64::from(counter[2 * i]));
        let high = |product: u64| (product >> 32) as u32;
        counter = [
            high(b) ^ counter[1] ^ key[0],
            b as u32,
            high(a) ^ counter[3] ^ key[1],
            a as u32,
        ];
        key = [key[0].wrapping_add(WEYL[0]), key[1].wrapping_add(WEYL[1])];
    }
    counter
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_authors_known_answers_are_met() {
        assert_eq!(
            philox([0; 4], [0; 2]),
            [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]
        );
        assert_eq!(
            philox([u32::MAX; 4], [u32::MAX; 2]),
            [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]
        );
        let counter = [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344];
        let expected = [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1];
        assert_eq!(philox(counter, [0xa409_3822, 0x299f_31d0]), expected);
    }

    #[test]
    fn draws_spread_evenly_over_seeds_candidates_and_indices() {
        let draws: [fn(u32) -> f64; 3] = [
            |i| uniform(u64::from(i), 0, 0),
            |i| uniform(7, i, 0),
            |i| uniform(7, 0, i),
        ];
        for draw in draws {
            let mut counts = [0u32; 64];
            (0..64_000).for_each(|i| counts[(draw(i) * 64.0) as usize] += 1);
            let chi_square: f64 = counts
                .iter()
                .map(|&count| (f64::from(count) - 1000.0).powi(2) / 1000.0)
                .sum();
            // 63 degrees of freedom: the 0.1 % and 99.9 % quantiles.
            assert!(
                (33.0..103.5).contains(&chi_square),
                "chi-square {chi_square}"
            );
        }
    }
}
