//! Which served entity gets a call, and which replica a request.
//!
//! The split is smooth weighted round-robin: in any run of calls each entity is within one call per entity of its exact
//! share, and after every full cycle of 100 the shares are exact.

/// Splits calls by percentage, without chance.
#[derive(Debug, Clone, Default)]
pub struct Split {
    weights: Vec<u32>,
    credit: Vec<i64>,
}

impl Split {
    /// A split by these weights; entries of weight 0 are never chosen.
    pub fn new(weights: Vec<u32>) -> Self {
        Split {
            credit: vec![0; weights.len()],
            weights,
        }
    }

    /// The entry that takes the next call; `None` when all weights are 0.
    pub fn take(&mut self) -> Option<usize> {
        let total: i64 = self.weights.iter().map(|&weight| i64::from(weight)).sum();
        for (credit, &weight) in self.credit.iter_mut().zip(&self.weights) {
            *credit += i64::from(weight);
        }
        // The first of the largest, so that equal weights take turns in order.
        let best = (0..self.weights.len())
            .filter(|&i| self.weights[i] > 0)
            .rev()
            .max_by_key(|&i| self.credit[i])?;
        self.credit[best] -= total;
        Some(best)
    }

    /// The weights it was made with.
    pub fn weights(&self) -> &[u32] {
        &self.weights
    }
}

/// A replica's load.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ReplicaLoad {
    /// Requests it may run at a time.
    pub credits: u32,
    /// Requests it runs.
    pub running: u32,
    /// It can take requests.
    pub up: bool,
}

/// The least loaded replica with a free credit: the smallest share of credits in use, the first of equals.
pub fn choose(replicas: &[ReplicaLoad]) -> Option<usize> {
    let free = |load: &ReplicaLoad| load.up && load.running < load.credits;
    let share = |load: &ReplicaLoad| u64::from(load.running) * (1 << 32) / u64::from(load.credits);
    (0..replicas.len())
        .filter(|&i| free(&replicas[i]))
        .min_by_key(|&i| share(&replicas[i]))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn shares_are_exact_over_each_cycle_and_close_within_it(
            cuts in proptest::collection::vec(0u32..=100, 0..9), calls in 1usize..400,
        ) {
            let mut cuts = cuts;
            cuts.extend([0, 100]);
            cuts.sort_unstable();
            let weights: Vec<u32> = cuts.windows(2).map(|pair| pair[1] - pair[0]).collect();
            let mut split = Split::new(weights.clone());
            let mut counts = vec![0u64; weights.len()];
            for call in 1..=calls {
                counts[split.take().unwrap()] += 1;
                for (&count, &weight) in counts.iter().zip(&weights) {
                    let exact = call as f64 * f64::from(weight) / 100.0;
                    prop_assert!((count as f64 - exact).abs() < weights.len() as f64, "{counts:?} after {call} of {weights:?}");
                    prop_assert!(weight > 0 || count == 0);
                    if call % 100 == 0 { prop_assert_eq!(count as f64, exact); }
                }
            }
        }

        #[test]
        fn any_hundred_calls_in_a_row_are_split_exactly(
            cuts in proptest::collection::vec(0u32..=100, 1..9), before in 0usize..300,
        ) {
            let mut cuts = cuts;
            cuts.extend([0, 100]);
            cuts.sort_unstable();
            let weights: Vec<u32> = cuts.windows(2).map(|pair| pair[1] - pair[0]).collect();
            let mut split = Split::new(weights.clone());
            for _ in 0..before {
                split.take();
            }
            let mut counts = vec![0u32; weights.len()];
            for _ in 0..100 {
                counts[split.take().unwrap()] += 1;
            }
            prop_assert_eq!(counts, weights);
        }

        #[test]
        fn the_chosen_replica_is_free_and_none_is_less_loaded(
            loads in proptest::collection::vec((1u32..8, 0u32..8, any::<bool>()), 0..6),
        ) {
            let loads: Vec<ReplicaLoad> =
                loads.into_iter().map(|(credits, running, up)| ReplicaLoad { credits, running, up }).collect();
            let free: Vec<usize> = (0..loads.len()).filter(|&i| loads[i].up && loads[i].running < loads[i].credits).collect();
            match choose(&loads) {
                None => prop_assert!(free.is_empty()),
                Some(chosen) => {
                    prop_assert!(free.contains(&chosen));
                    let share = |i: usize| f64::from(loads[i].running) / f64::from(loads[i].credits);
                    prop_assert!(free.iter().all(|&other| share(chosen) <= share(other)));
                }
            }
        }
    }

    #[test]
    fn no_weights_choose_nobody() {
        assert_eq!(Split::new(vec![0, 0]).take(), None);
        assert_eq!(Split::default().take(), None);
    }
}
