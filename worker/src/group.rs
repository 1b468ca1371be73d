//! Forming a shard group: rank 0 waits for its members, the others dial it.
//!
//! Owns the way from a [`ShardSpec`] to a membership. How ranks meet and talk is the engine's part.

use std::net::{SocketAddr, ToSocketAddrs};
use std::time::Duration;

use common::request::{Failure, FailureKind};
use common::wire::message::ShardSpec;
use engine::collective::host::{
    FormError, GroupBuilder, GroupId, GroupKey, GroupListener, HostGroup, Membership, Transport,
    WAIT_MAX, host_id, join,
};

/// A group forms within this time or not at all: its members were all told at once, and may first have to give back
/// the memory of an earlier generation.
const FORM_MAX: Duration = Duration::from_secs(60);

/// Forms the group of a shard, with this process as its rank.
///
/// # Errors
/// [`FailureKind::Unavailable`] says which rank is missing; another life of the group may form.
pub fn form(spec: &ShardSpec, listener: &GroupListener) -> Result<HostGroup, Failure> {
    form_within(spec, listener, FORM_MAX)
}

fn form_within(
    spec: &ShardSpec,
    listener: &GroupListener,
    within: Duration,
) -> Result<HostGroup, Failure> {
    let membership = membership(spec).map_err(unavailable)?;
    if spec.rank == 0 {
        GroupBuilder::new(listener, membership)
            .and_then(|builder| builder.lead(within))
            .map_err(unavailable)
    } else {
        join(leader_address(spec)?, &membership, within).map_err(unavailable)
    }
}

fn membership(spec: &ShardSpec) -> Result<Membership, FormError> {
    Ok(Membership {
        id: GroupId {
            group: spec.replica.0,
            generation: spec.generation.0,
        },
        rank: spec.rank,
        ranks: spec.members.len() as u32,
        key: GroupKey::new(&spec.group_key)?,
        host: host_id(),
        transport: Transport::Auto,
        wait_max: WAIT_MAX,
    })
}

fn leader_address(spec: &ShardSpec) -> Result<SocketAddr, Failure> {
    let failed = |why: String| Failure::new(FailureKind::Unavailable, why);
    let leader = spec
        .members
        .first()
        .ok_or_else(|| failed("the shard group has no members".into()))?;
    let address = &leader.group_address;
    let mut found = address.to_socket_addrs().map_err(|e| {
        failed(format!(
            "the address {address} of rank 0 ({}) cannot be resolved: {e}",
            leader.worker
        ))
    })?;
    found.next().ok_or_else(|| {
        failed(format!(
            "the address {address} of rank 0 ({}) names no host",
            leader.worker
        ))
    })
}

fn unavailable(error: FormError) -> Failure {
    Failure::new(
        FailureKind::Unavailable,
        format!("the shard group did not form: {error}"),
    )
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use common::ids::{Generation, ReplicaId, WorkerId};
    use common::wire::message::{GroupMember, KvDtype, ModelSource, Quantization, ShardOptions};

    use super::*;

    fn listener() -> GroupListener {
        GroupListener::start(TcpListener::bind("127.0.0.1:0").unwrap()).unwrap()
    }

    fn spec(rank: u32, addresses: &[String]) -> ShardSpec {
        let member = |address: &String| GroupMember {
            worker: WorkerId("n/d".into()),
            group_address: address.clone(),
        };
        ShardSpec {
            replica: ReplicaId(1),
            generation: Generation(2),
            rank,
            members: addresses.iter().map(member).collect(),
            group_key: [7; 32],
            source: ModelSource::Folder("/nowhere".into()),
            options: ShardOptions {
                kv_dtype: KvDtype::F32,
                quantization: Quantization::None,
                kv_blocks: 2,
                step_tokens_max: 1,
                sequences_max: 1,
                context_max: 1,
                memory_bytes: 1,
            },
        }
    }

    #[test]
    fn two_ranks_find_each_other() {
        let (leader, other) = (listener(), listener());
        let addresses = [leader.address().to_string(), other.address().to_string()];
        let [first, second] = [0, 1].map(|rank| spec(rank, &addresses));
        std::thread::scope(|scope| {
            let second = scope.spawn(move || form(&second, &other));
            let first = form(&first, &leader).unwrap();
            let second = second.join().unwrap().unwrap();
            assert_eq!(
                (
                    (first.rank(), first.ranks()),
                    (second.rank(), second.ranks())
                ),
                ((0, 2), (1, 2))
            );
        });
    }

    #[test]
    fn a_missing_rank_is_named_and_the_group_may_be_formed_again() {
        let leader = listener();
        let addresses = [
            leader.address().to_string(),
            "127.0.0.1:1".into(),
            "127.0.0.1:1".into(),
        ];
        let failure =
            form_within(&spec(0, &addresses), &leader, Duration::from_millis(10)).unwrap_err();
        assert!(failure.kind.retryable());
        assert!(
            failure.message.contains("ranks 1, 2 of 3 did not join"),
            "{failure}"
        );
    }

    #[test]
    fn an_address_that_is_none_names_the_worker() {
        let failure = form(&spec(1, &["nonsense".into(), String::new()]), &listener()).unwrap_err();
        assert!(
            failure.message.contains("nonsense of rank 0 (n/d)"),
            "{failure}"
        );
    }
}
