//! Which devices hold the ranks of a replica.
//!
//! Deterministic, and spreads: of the devices with room it takes those with the most free memory, and the ranks of a
//! group on one node where one node has enough of them (shared memory instead of TCP). A replica that is formed again
//! goes where it was, rank by rank, as far as there is room: what its workers kept of it need not be loaded again.

use common::wire::message::DeviceKind;

use super::bytes_text;

/// A device as placement sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// The worker's name.
    pub worker: String,
    /// The node's name.
    pub node: String,
    /// What it is.
    pub kind: DeviceKind,
    /// Bytes no other shard has a claim on; `None` when the device's size is not known yet.
    pub free_bytes: Option<u64>,
    /// Its worker is there.
    pub linked: bool,
    /// The rank it had in the replica's formation before this one.
    pub rank_before: Option<usize>,
}

/// What a replica needs of each of its devices.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Need {
    /// Kind of the devices.
    pub kind: DeviceKind,
    /// How many, one per rank.
    pub ranks: usize,
    /// Least bytes on each.
    pub bytes: u64,
}

/// Why a replica has no place.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NoPlace {
    /// It would fit if all workers of cluster.toml were there.
    #[error("waiting for workers: {needed} of kind {kind} with {} free each are needed, {there} are there", bytes_text(*bytes))]
    Waiting {
        /// Devices needed.
        needed: usize,
        /// Of this kind.
        kind: &'static str,
        /// Bytes needed on each.
        bytes: u64,
        /// Devices with room whose worker is there.
        there: usize,
    },
    /// It does not fit the cluster as it is configured and filled.
    #[error("{0}")]
    NoRoom(String),
}

/// The devices for ranks 0, 1, ...: indices into `places`.
///
/// # Errors
/// [`NoPlace::Waiting`] while workers are missing, [`NoPlace::NoRoom`] when even all of them would not do.
pub fn place(need: Need, places: &[Place]) -> Result<Vec<usize>, NoPlace> {
    let room = |place: &Place| {
        place.kind == need.kind && place.free_bytes.is_none_or(|free| free >= need.bytes)
    };
    let mut usable: Vec<usize> = (0..places.len())
        .filter(|&i| places[i].linked && room(&places[i]))
        .collect();
    if usable.len() < need.ranks {
        let possible = places.iter().filter(|place| room(place)).count();
        if possible >= need.ranks {
            return Err(NoPlace::Waiting {
                needed: need.ranks,
                kind: kind_name(need.kind),
                bytes: need.bytes,
                there: usable.len(),
            });
        }
        return Err(NoPlace::NoRoom(no_room(need, places, possible)));
    }
    // Those of before first, then most free; the order of cluster.toml among equals. A device of unknown size comes last.
    let before = |i: usize| places[i].rank_before.filter(|&rank| rank < need.ranks);
    let free = |i: usize| places[i].free_bytes.unwrap_or(0);
    usable.sort_by_key(|&i| (before(i).is_none(), std::cmp::Reverse(free(i)), i));
    let on_node = |node: &str| {
        usable
            .iter()
            .copied()
            .filter(|&i| places[i].node == node)
            .take(need.ranks)
            .collect::<Vec<_>>()
    };
    let together = usable
        .iter()
        .map(|&i| on_node(&places[i].node))
        .find(|group| group.len() == need.ranks);
    let mut chosen = together.unwrap_or_else(|| usable[..need.ranks].to_vec());
    // Ranks in the order of cluster.toml: neighbours there are neighbours in the group.
    chosen.sort_unstable();
    Ok(seat(chosen, need.ranks, before))
}

/// Gives each device the rank it had `before`, and the others those that are left, in order.
fn seat(devices: Vec<usize>, ranks: usize, before: impl Fn(usize) -> Option<usize>) -> Vec<usize> {
    let mut seats: Vec<Option<usize>> = vec![None; ranks];
    let mut standing = Vec::new();
    for device in devices {
        match before(device) {
            Some(rank) if seats[rank].is_none() => seats[rank] = Some(device),
            _ => standing.push(device),
        }
    }
    let mut standing = standing.into_iter();
    let seated: Vec<usize> = seats
        .into_iter()
        .filter_map(|seat| seat.or_else(|| standing.next()))
        .collect();
    debug_assert!(seated.len() == ranks && standing.next().is_none());
    seated
}

fn kind_name(kind: DeviceKind) -> &'static str {
    match kind {
        DeviceKind::Cpu => "cpu",
        DeviceKind::Cuda => "cuda",
    }
}

fn no_room(need: Need, places: &[Place], possible: usize) -> String {
    let of_kind: Vec<&Place> = places
        .iter()
        .filter(|place| place.kind == need.kind)
        .collect();
    let kind = kind_name(need.kind);
    if of_kind.len() < need.ranks {
        return format!(
            "{} devices of kind {kind} are needed and cluster.toml has {}: add devices, or choose a workload type with fewer shards",
            need.ranks,
            of_kind.len()
        );
    }
    let free: Vec<String> = of_kind
        .iter()
        .map(|place| {
            format!(
                "{} {}",
                place.worker,
                place.free_bytes.map_or("unknown".to_owned(), bytes_text)
            )
        })
        .collect();
    format!(
        "{} on each of {} {kind} devices are needed, {possible} of them have that free ({}): \
         delete an endpoint, give the devices more memory in cluster.toml, or choose a workload type with more shards",
        bytes_text(need.bytes),
        need.ranks,
        free.join(", ")
    )
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn cpu(worker: &str, free: u64) -> Place {
        let node = worker.split('/').next().unwrap().to_owned();
        Place {
            worker: worker.into(),
            node,
            kind: DeviceKind::Cpu,
            free_bytes: Some(free),
            linked: true,
            rank_before: None,
        }
    }

    fn need(ranks: usize, bytes: u64) -> Need {
        Need {
            kind: DeviceKind::Cpu,
            ranks,
            bytes,
        }
    }

    #[test]
    fn the_emptiest_device_takes_the_next_shard() {
        let places = [cpu("a/0", 10), cpu("a/1", 30), cpu("b/0", 30)];
        assert_eq!(
            place(need(1, 5), &places),
            Ok(vec![1]),
            "the first of equals"
        );
        assert_eq!(
            place(need(1, 5), &[cpu("a/0", 10), cpu("a/1", 4)]),
            Ok(vec![0])
        );
    }

    #[test]
    fn ranks_stay_on_one_node_where_they_can() {
        let places = [cpu("a/0", 90), cpu("b/0", 20), cpu("b/1", 20)];
        assert_eq!(place(need(2, 10), &places), Ok(vec![1, 2]));
        assert_eq!(place(need(3, 10), &places), Ok(vec![0, 1, 2]));
    }

    #[test]
    fn a_replica_that_is_formed_again_finds_its_ranks_where_they_were() {
        let mut places = [cpu("a/0", 20), cpu("a/1", 10), cpu("a/2", 30)];
        places[1].rank_before = Some(1);
        assert_eq!(
            place(need(2, 5), &places),
            Ok(vec![2, 1]),
            "rank 0 was lost: the emptiest device takes its place"
        );
        places[0].rank_before = Some(0);
        assert_eq!(place(need(2, 5), &places), Ok(vec![0, 1]));
        assert_eq!(
            place(need(2, 15), &places),
            Ok(vec![0, 2]),
            "no room any more where rank 1 was"
        );
        assert_eq!(
            place(need(1, 5), &places),
            Ok(vec![0]),
            "a group of fewer ranks has no rank 1"
        );
        let mut apart = [cpu("a/0", 20), cpu("b/0", 20), cpu("b/1", 20)];
        apart[0].rank_before = Some(1);
        assert_eq!(place(need(2, 5), &apart), Ok(vec![1, 2]), "one node first");
    }

    #[test]
    fn missing_workers_are_waited_for_and_missing_memory_is_not() {
        let mut places = [cpu("a/0", 10), cpu("a/1", 10)];
        places[1].linked = false;
        let waiting = place(need(2, 10), &places).unwrap_err();
        assert_eq!(
            waiting.to_string(),
            "waiting for workers: 2 of kind cpu with 10 B free each are needed, 1 are there"
        );
        let full = place(need(2, 11), &places).unwrap_err().to_string();
        assert!(
            full.contains("11 B on each of 2 cpu devices are needed, 0 of them")
                && full.contains("a/1 10 B"),
            "{full}"
        );
        let few = place(need(3, 1), &places).unwrap_err().to_string();
        assert!(
            few.contains("3 devices of kind cpu are needed and cluster.toml has 2"),
            "{few}"
        );
    }

    #[test]
    fn a_device_of_unknown_size_is_used_when_it_is_there() {
        let gpu = |linked| Place {
            kind: DeviceKind::Cuda,
            free_bytes: None,
            linked,
            ..cpu("a/gpu0", 0)
        };
        let need = Need {
            kind: DeviceKind::Cuda,
            ranks: 1,
            bytes: 70 << 30,
        };
        assert_eq!(place(need, &[gpu(true)]), Ok(vec![0]));
        assert!(matches!(
            place(need, &[gpu(false)]),
            Err(NoPlace::Waiting { there: 0, .. })
        ));
    }

    proptest! {
        #[test]
        fn what_is_placed_fits_and_what_fits_is_placed(
            devices in proptest::collection::vec((0u8..3, 0u64..20, any::<bool>(), proptest::option::of(0usize..6)), 0..8),
            ranks in 1usize..5, bytes in 0u64..20,
        ) {
            let places: Vec<Place> = devices
                .iter()
                .enumerate()
                .map(|(i, &(node, free, linked, rank_before))| Place {
                    linked,
                    rank_before,
                    ..cpu(&format!("{node}/{i}"), free)
                })
                .collect();
            let fitting = places.iter().filter(|p| p.linked && p.free_bytes >= Some(bytes)).count();
            match place(need(ranks, bytes), &places) {
                Ok(chosen) => {
                    prop_assert_eq!(chosen.len(), ranks);
                    let once: std::collections::BTreeSet<&usize> = chosen.iter().collect();
                    prop_assert_eq!(once.len(), ranks, "each device once");
                    prop_assert!(chosen.iter().all(|&i| places[i].linked && places[i].free_bytes >= Some(bytes)));
                    prop_assert_eq!(place(need(ranks, bytes), &places), Ok(chosen), "the same again");
                }
                Err(_) => prop_assert!(fitting < ranks),
            }
        }
    }
}
