//! Whether and where a served entity fits: memory plan and placement together, and what would help when it does not.

use common::config::WorkloadType;
use common::wire::message::DeviceKind;

use super::memory_plan::{self, MemoryPlan, RankNeed};
use super::placement::{self, NoPlace, Place};
use super::{bytes_text, placement::Need};
use crate::registry::ModelFacts;

/// Most shards that cluster.toml lets a workload type have.
const SHARDS_MAX: u32 = 64;

/// A replica to place.
#[derive(Debug, Clone, Copy)]
pub struct Wish<'a> {
    /// The model.
    pub facts: &'a ModelFacts,
    /// On what.
    pub workload: &'a WorkloadType,
    /// Sequences at a time.
    pub concurrency: u32,
}

/// A place for a replica.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fit {
    /// The devices of ranks 0, 1, ...: indices into the places.
    pub devices: Vec<usize>,
    /// Each rank's memory.
    pub plan: MemoryPlan,
}

/// Why there is no place.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NoFit {
    /// It fits as soon as more workers are there.
    #[error("{0}")]
    Waiting(String),
    /// It does not fit; says what would.
    #[error("{0}")]
    Never(String),
}

/// Finds devices and sizes the KV pool to what they have.
///
/// # Errors
/// [`NoFit`].
pub fn fit(wish: Wish<'_>, places: &[Place], types: &[WorkloadType]) -> Result<Fit, NoFit> {
    let need = rank_need(wish).map_err(|e| {
        let mut message = format!("{}: {e}", wish.facts.model);
        if let Some((other, _)) = smallest(wish.facts, wish.concurrency, places, types) {
            message.push_str(&format!("; workload type {} would do", other.name));
        }
        NoFit::Never(message)
    })?;
    if wish
        .workload
        .memory_bytes
        .is_some_and(|memory| need.least_bytes() > memory)
    {
        let given = bytes_text(wish.workload.memory_bytes.unwrap_or_default());
        let reason = format!("workload type {} gives {given} on each", wish.workload.name);
        return Err(NoFit::Never(never(wish, &need, &reason, places, types)));
    }
    let (devices, budget) = devices_for(wish.workload, &need, places).map_err(|e| match e {
        NoPlace::Waiting { .. } => NoFit::Waiting(e.to_string()),
        NoPlace::NoRoom(reason) => NoFit::Never(never(wish, &need, &reason, places, types)),
    })?;
    let plan = need.fit(budget, wish.concurrency);
    debug_assert!(plan.is_some(), "placement looked at the least bytes");
    plan.map(|plan| Fit { devices, plan })
        .ok_or_else(|| NoFit::Never(never(wish, &need, "no room", places, types)))
}

/// The smallest workload type that the model fits: the fewest devices, then the least memory, then the first in
/// cluster.toml. Takes every worker to be there.
pub fn smallest<'a>(
    facts: &ModelFacts,
    concurrency: u32,
    places: &[Place],
    types: &'a [WorkloadType],
) -> Option<(&'a WorkloadType, Fit)> {
    let linked = all_linked(places);
    let mut by_size: Vec<&WorkloadType> = types.iter().collect();
    by_size.sort_by_key(|entry| (entry.shards, entry.memory_bytes.unwrap_or(u64::MAX)));
    by_size.into_iter().find_map(|workload| {
        let wish = Wish {
            facts,
            workload,
            concurrency,
        };
        let need = rank_need(wish).ok()?;
        let (devices, budget) = devices_for(workload, &need, &linked).ok()?;
        let plan = need.fit(budget, concurrency)?;
        Some((workload, Fit { devices, plan }))
    })
}

/// The fewest shards on devices of `budget` bytes each with which the model fits, if any number does.
pub fn shards_within(facts: &ModelFacts, kind: DeviceKind, budget: u64) -> Option<u32> {
    (1..=SHARDS_MAX).find(|&shards| {
        memory_plan::need(facts, kind, shards, 1).is_ok_and(|need| need.least_bytes() <= budget)
    })
}

/// The devices of a replica, and the bytes that each of them has for it.
fn devices_for(
    workload: &WorkloadType,
    need: &RankNeed,
    places: &[Place],
) -> Result<(Vec<usize>, u64), NoPlace> {
    let devices = placement::place(device_need(workload, need), places)?;
    let free = devices
        .iter()
        .filter_map(|&device| places[device].free_bytes)
        .min();
    let budget = [free, workload.memory_bytes].into_iter().flatten().min();
    Ok((devices, budget.unwrap_or(u64::MAX)))
}

fn all_linked(places: &[Place]) -> Vec<Place> {
    let linked = |place: &Place| Place {
        linked: true,
        ..place.clone()
    };
    places.iter().map(linked).collect()
}

fn rank_need(wish: Wish<'_>) -> Result<RankNeed, memory_plan::NoPlan> {
    memory_plan::need(
        wish.facts,
        wish.workload.device,
        wish.workload.shards,
        wish.concurrency,
    )
}

fn device_need(workload: &WorkloadType, need: &RankNeed) -> Need {
    Need {
        kind: workload.device,
        ranks: workload.shards as usize,
        bytes: need.least_bytes(),
    }
}

/// The refusal: what is needed, why it does not fit, what would.
fn never(
    wish: Wish<'_>,
    need: &RankNeed,
    reason: &str,
    places: &[Place],
    types: &[WorkloadType],
) -> String {
    let mut help = Vec::new();
    if let Some((other, _)) = smallest(wish.facts, wish.concurrency, places, types) {
        help.push(format!("workload type {}", other.name));
    }
    // The ranks must all fit: the device that is last among the best decides.
    let mut free: Vec<u64> = places
        .iter()
        .filter(|p| p.kind == wish.workload.device)
        .filter_map(|p| p.free_bytes)
        .collect();
    free.sort_unstable_by(|a, b| b.cmp(a));
    let budget = free
        .get(wish.workload.shards as usize - 1)
        .copied()
        .unwrap_or(0);
    let budget = budget.min(wish.workload.memory_bytes.unwrap_or(u64::MAX));
    if help.is_empty()
        && let Some(shards) = shards_within(wish.facts, wish.workload.device, budget)
    {
        help.push(format!("a workload type with {shards} shards"));
    }
    let context = need.context_within(budget);
    if context > 0 && context < u64::from(need.context_max) {
        help.push(format!(
            "context_max = {context} for this model in cluster.toml"
        ));
    }
    if !free.is_empty() {
        help.push(format!(
            "{} free on each device",
            bytes_text(need.least_bytes())
        ));
    }
    let help = if help.is_empty() {
        "devices of this kind in cluster.toml".to_owned()
    } else {
        help.join("; or ")
    };
    format!(
        "{} does not fit workload type {}: {} are needed on each of {} devices ({}); {reason}. What would do: {help}",
        wish.facts.model,
        wish.workload.name,
        bytes_text(need.least_bytes()),
        wish.workload.shards,
        need.text()
    )
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use common::model_ref::ModelRef;

    use super::*;

    fn tiny_llama() -> ModelFacts {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/models/tiny-llama");
        let model = ModelRef::new("m", "1").unwrap();
        let context = crate::registry::Context::exact(&model, Default::default());
        crate::registry::read_facts(&context, &folder).unwrap()
    }

    fn workload(name: &str, shards: u32, memory_bytes: Option<u64>) -> WorkloadType {
        WorkloadType {
            name: name.into(),
            device: DeviceKind::Cpu,
            shards,
            memory_bytes,
            stands_in_for: None,
        }
    }

    fn cpus(free: &[u64]) -> Vec<Place> {
        let place = |(i, &free): (usize, &u64)| Place {
            worker: format!("n/{i}"),
            node: "n".into(),
            kind: DeviceKind::Cpu,
            free_bytes: Some(free),
            linked: true,
            rank_before: None,
        };
        free.iter().enumerate().map(place).collect()
    }

    #[test]
    fn a_small_model_gets_the_pool_its_concurrency_asks_for() {
        let (facts, one) = (tiny_llama(), workload("CPU", 1, None));
        let fit = fit(
            Wish {
                facts: &facts,
                workload: &one,
                concurrency: 4,
            },
            &cpus(&[1 << 30]),
            &[],
        )
        .unwrap();
        assert_eq!((fit.devices.clone(), fit.plan.concurrency()), (vec![0], 4));
        assert!(fit.plan.bytes() <= 1 << 30);
    }

    #[test]
    fn what_does_not_fit_says_what_would() {
        let (facts, types) = (
            tiny_llama(),
            [workload("CPU", 1, None), workload("PAIR", 2, None)],
        );
        let wish = Wish {
            facts: &facts,
            workload: &types[0],
            concurrency: 4,
        };
        let one = memory_plan::need(&facts, DeviceKind::Cpu, 1, 4).unwrap();
        let tight = one.least_bytes() - 10 * one.block_bytes;
        let NoFit::Never(message) = fit(wish, &cpus(&[tight, tight]), &types).unwrap_err() else {
            panic!("it cannot fit")
        };
        assert!(
            message.contains("What would do: workload type PAIR; or context_max = "),
            "{message}"
        );
        assert!(message.contains("free on each device"), "{message}");
        let NoFit::Never(message) = fit(wish, &[], &types).unwrap_err() else {
            panic!("there are no devices")
        };
        assert!(message.contains("cluster.toml has 0"), "{message}");
        assert!(
            message.contains("What would do: devices of this kind"),
            "{message}"
        );
    }

    #[test]
    fn the_smallest_type_has_the_fewest_devices_then_the_least_memory() {
        let facts = tiny_llama();
        let types = [
            workload("PAIR", 2, None),
            workload("BIG", 1, None),
            workload("SMALL", 1, Some(64 << 20)),
            workload("TINY", 1, Some(1 << 20)),
        ];
        let chosen = |places: &[Place]| {
            smallest(&facts, 4, places, &types).map(|(workload, _)| workload.name.clone())
        };
        assert_eq!(chosen(&cpus(&[1 << 30, 1 << 30])).unwrap(), "SMALL");
        let one = memory_plan::need(&facts, DeviceKind::Cpu, 1, 4).unwrap();
        let tight = one.least_bytes() - 1;
        assert_eq!(chosen(&cpus(&[tight, tight])).unwrap(), "PAIR");
        assert_eq!(chosen(&cpus(&[tight])), None);
        // As if all workers were there.
        let mut away = cpus(&[1 << 30]);
        away[0].linked = false;
        assert_eq!(chosen(&away).unwrap(), "SMALL");
        assert_eq!(shards_within(&facts, DeviceKind::Cpu, tight), Some(2));
        assert_eq!(shards_within(&facts, DeviceKind::Cpu, 1 << 20), None);
    }

    #[test]
    fn a_types_memory_bounds_the_plan() {
        let facts = tiny_llama();
        let need = memory_plan::need(&facts, DeviceKind::Cpu, 1, 4).unwrap();
        let exact = workload("CPU", 1, Some(need.least_bytes()));
        let fitted = fit(
            Wish {
                facts: &facts,
                workload: &exact,
                concurrency: 4,
            },
            &cpus(&[1 << 30]),
            &[],
        )
        .unwrap();
        assert_eq!(fitted.plan.concurrency(), 1);
        assert!(fitted.plan.bytes() <= need.least_bytes());
        let less = workload("CPU", 1, Some(need.least_bytes() - 1));
        let refused = fit(
            Wish {
                facts: &facts,
                workload: &less,
                concurrency: 4,
            },
            &cpus(&[1 << 30]),
            &[],
        )
        .unwrap_err();
        assert!(
            refused.to_string().contains("workload type CPU gives"),
            "{refused}"
        );
    }

    #[test]
    fn missing_workers_are_waited_for() {
        let (facts, pair) = (tiny_llama(), workload("PAIR", 2, None));
        let mut places = cpus(&[1 << 30, 1 << 30]);
        places[1].linked = false;
        let waiting = fit(
            Wish {
                facts: &facts,
                workload: &pair,
                concurrency: 4,
            },
            &places,
            &[],
        )
        .unwrap_err();
        assert!(matches!(waiting, NoFit::Waiting(_)), "{waiting}");
    }
}
