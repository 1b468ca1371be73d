//! Which cores compute, and which are left to everything else: HTTP, tokenizers, answers.
//!
//! Owns the decision, a function over what the system allows and what cluster.toml says. Compute threads spin between the
//! steps' short regions, and a step is as slow as its slowest thread: they are to have cores for themselves.

use std::collections::HashSet;

/// From this many cores on, one is kept for everything but computing. With fewer it would be missed too much.
const CORES_TO_SPARE: usize = 4;

/// What the system gives this process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Allowed {
    /// Logical processors that it may run on, in rising order.
    pub cores: Vec<usize>,
    /// How many of them its share of time is worth: fewer where a cgroup has a quota.
    pub quota: usize,
    /// For each of `cores`, the lowest one of those that share its execution units.
    pub siblings: Vec<usize>,
}

impl Allowed {
    /// Asks the system.
    #[must_use]
    pub fn read() -> Allowed {
        let quota = std::thread::available_parallelism().map_or(1, usize::from);
        let mut cores = engine::backend::cpu::allowed_cores();
        if cores.is_empty() {
            cores = (0..quota).collect();
        }
        let siblings = cores.iter().map(|core| first_sibling(*core)).collect();
        Allowed {
            cores,
            quota,
            siblings,
        }
    }

    /// One logical processor of each core: two of one core share its vector units and compute no faster than one.
    fn whole_cores(&self) -> Vec<usize> {
        let mut seen = HashSet::new();
        let pairs = self.cores.iter().zip(&self.siblings);
        let firsts = pairs.filter(|(_, sibling)| seen.insert(**sibling));
        firsts.map(|(core, _)| *core).collect()
    }

    /// The lowest processor of the core that a processor is one of.
    fn sibling(&self, core: usize) -> Option<usize> {
        let at = self.cores.iter().position(|allowed| *allowed == core);
        at.map(|at| self.siblings[at])
    }

    /// The processors whose cores are not among `taken`; where there is none, those that are at least not taken themselves.
    fn apart_from(&self, taken: &[usize]) -> Vec<usize> {
        let busy: HashSet<Option<usize>> = taken.iter().map(|core| self.sibling(*core)).collect();
        let mut free: Vec<usize> = self.cores.clone();
        free.retain(|core| !taken.contains(core));
        let apart: Vec<usize> = free
            .iter()
            .filter(|core| !busy.contains(&self.sibling(**core)))
            .copied()
            .collect();
        if apart.is_empty() { free } else { apart }
    }
}

/// Who runs where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Split {
    /// Compute threads, the engine's own counted.
    pub threads: usize,
    /// Where they are pinned, one each; none where the system is to place them.
    pub compute: Vec<usize>,
    /// Where all other threads of the process run; none where they may run anywhere.
    pub others: Vec<usize>,
}

impl std::fmt::Display for Allowed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.cores.len())?;
        let whole = self.whole_cores().len();
        if whole < self.cores.len() {
            write!(f, " logical processors of {whole} cores")?;
        }
        if self.quota < self.cores.len() {
            write!(f, ", time for {}", self.quota)?;
        }
        Ok(())
    }
}

impl std::fmt::Display for Split {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let list = |cores: &[usize]| {
            let texts: Vec<String> = cores.iter().map(ToString::to_string).collect();
            texts.join(",")
        };
        let plural = if self.threads == 1 { "" } else { "s" };
        write!(f, "{} compute thread{plural}", self.threads)?;
        if self.compute.is_empty() {
            return write!(f, ", not pinned");
        }
        write!(f, " on {}", list(&self.compute))?;
        if self.others.is_empty() {
            return write!(f, ", everything else anywhere");
        }
        write!(f, ", everything else on {}", list(&self.others))
    }
}

/// What cluster.toml says of one CPU device.
#[derive(Debug, Clone, Default)]
pub struct Wish {
    /// Compute threads.
    pub threads: Option<usize>,
    /// Where they are to be pinned; empty where it does not say.
    pub cores: Vec<usize>,
}

/// Splits the cores for one (`own`) of a machine's CPU devices.
///
/// What they wish is obeyed. Devices that wish for no cores share those that the others leave, less one where there are
/// enough. Threads are pinned where cores are given, or where the devices take all that is allowed: then no thread could
/// find a better core.
#[must_use]
pub fn split(allowed: &Allowed, devices: &[Wish], own: usize) -> Split {
    let mut taken: Vec<usize> = devices.iter().flat_map(|wish| wish.cores.clone()).collect();
    let sharing: Vec<usize> = (0..devices.len())
        .filter(|at| devices[*at].cores.is_empty())
        .collect();
    let limited = allowed.quota < allowed.cores.len();
    let mut shared = allowed.whole_cores();
    // Nor a given core's other logical processor: two compute threads would share its units.
    let busy: Vec<usize> = taken
        .iter()
        .filter_map(|core| allowed.sibling(*core))
        .collect();
    shared.retain(|core| {
        !allowed
            .sibling(*core)
            .is_some_and(|one| busy.contains(&one))
    });
    if shared.len() >= CORES_TO_SPARE && !limited {
        // The first one is where most systems handle interrupts.
        shared.remove(0);
    }
    let wished = sharing.iter().map(|at| devices[*at].threads);
    let threads = shares(allowed.quota.min(shared.len()), wished.collect());
    let pinned = !limited && threads.iter().sum::<usize>() == shared.len();
    if pinned {
        taken.extend(&shared);
    }
    let (threads, compute) = match sharing.iter().position(|at| *at == own) {
        Some(at) if pinned => {
            let before: usize = threads[..at].iter().sum();
            (threads[at], shared[before..][..threads[at]].to_vec())
        }
        Some(at) => (threads[at], Vec::new()),
        None => {
            let wish = &devices[own];
            let most = wish.cores.len().min(allowed.quota).max(1);
            (wish.threads.unwrap_or(most), wish.cores.clone())
        }
    };
    let others = if taken.is_empty() {
        Vec::new()
    } else {
        allowed.apart_from(&taken)
    };
    Split {
        threads,
        compute,
        others,
    }
}

/// The threads of devices that share `cores` cores: what each wishes, or an equal part.
fn shares(cores: usize, wished: Vec<Option<usize>>) -> Vec<usize> {
    let count = wished.len().max(1);
    let part = |at: usize| (cores / count + usize::from(at < cores % count)).max(1);
    let threads = wished.into_iter().enumerate();
    threads
        .map(|(at, threads)| threads.unwrap_or_else(|| part(at)))
        .collect()
}

/// The lowest of the logical processors that share a core with this one.
fn first_sibling(core: usize) -> usize {
    let path = format!("/sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list");
    let text = std::fs::read_to_string(path).unwrap_or_default();
    let first = text.trim().split([',', '-']).next();
    first.and_then(|first| first.parse().ok()).unwrap_or(core)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device(threads: Option<usize>, cores: &[usize]) -> Wish {
        Wish {
            threads,
            cores: cores.to_vec(),
        }
    }

    fn allowed(cores: usize) -> Allowed {
        Allowed {
            cores: (0..cores).collect(),
            quota: cores,
            siblings: (0..cores).collect(),
        }
    }

    /// What each device gets.
    fn splits(allowed: &Allowed, devices: &[Wish]) -> Vec<String> {
        let texts = (0..devices.len()).map(|own| split(allowed, devices, own).to_string());
        texts.collect()
    }

    #[test]
    fn small_hosts_compute_on_every_core_and_larger_ones_keep_one() {
        let alone = [device(None, &[])];
        let of = |cores| splits(&allowed(cores), &alone).remove(0);
        assert_eq!(of(1), "1 compute thread on 0, everything else anywhere");
        assert_eq!(
            of(3),
            "3 compute threads on 0,1,2, everything else anywhere"
        );
        assert_eq!(of(4), "3 compute threads on 1,2,3, everything else on 0");
        assert_eq!(
            of(8),
            "7 compute threads on 1,2,3,4,5,6,7, everything else on 0"
        );
    }

    #[test]
    fn devices_of_a_node_share_its_cores() {
        let two = [device(None, &[]), device(None, &[])];
        assert_eq!(
            splits(&allowed(6), &two),
            [
                "3 compute threads on 1,2,3, everything else on 0",
                "2 compute threads on 4,5, everything else on 0"
            ]
        );
        let one_each = [device(Some(1), &[]), device(Some(1), &[])];
        assert_eq!(
            splits(&allowed(2), &one_each),
            [
                "1 compute thread on 0, everything else anywhere",
                "1 compute thread on 1, everything else anywhere"
            ]
        );
        let crowded = splits(&allowed(1), &two);
        assert_eq!(crowded, ["1 compute thread, not pinned"; 2]);
    }

    #[test]
    fn what_cluster_toml_says_is_obeyed() {
        let given = [device(None, &[4, 5]), device(None, &[])];
        assert_eq!(
            splits(&allowed(6), &given),
            [
                "2 compute threads on 4,5, everything else on 0",
                "3 compute threads on 1,2,3, everything else on 0"
            ]
        );
        assert_eq!(
            splits(&allowed(8), &[device(Some(2), &[])]),
            ["2 compute threads, not pinned"]
        );
        assert_eq!(
            splits(&allowed(2), &[device(Some(9), &[0, 1])]),
            ["9 compute threads on 0,1, everything else anywhere"]
        );
    }

    #[test]
    fn a_quota_below_the_cores_limits_the_threads_and_pins_none() {
        let limited = Allowed {
            quota: 2,
            ..allowed(64)
        };
        assert_eq!(limited.to_string(), "64, time for 2");
        let alone = [device(None, &[])];
        assert_eq!(splits(&limited, &alone), ["2 compute threads, not pinned"]);
        let pinned = [device(None, &[0, 1, 2, 3])];
        assert!(splits(&limited, &pinned)[0].starts_with("2 compute threads on 0,1,2,3"));
    }

    #[test]
    fn of_two_logical_processors_of_a_core_one_computes() {
        let smt = Allowed {
            siblings: vec![0, 1, 2, 3, 0, 1, 2, 3],
            ..allowed(8)
        };
        assert_eq!(smt.to_string(), "8 logical processors of 4 cores");
        assert_eq!(
            splits(&smt, &[device(None, &[])]),
            ["3 compute threads on 1,2,3, everything else on 0,4"]
        );
        let two_cores = Allowed {
            siblings: vec![0, 1, 0, 1],
            ..allowed(4)
        };
        assert_eq!(
            splits(&two_cores, &[device(None, &[])]),
            ["2 compute threads on 0,1, everything else on 2,3"]
        );
    }

    #[test]
    fn the_system_tells_where_this_process_may_run() {
        let here = Allowed::read();
        assert!(!here.cores.is_empty() && here.quota >= 1);
        assert_eq!(here.cores.len(), here.siblings.len());
    }
}
