//! A replica without its actor: what it makes of time.

use common::ids::{BootId, Term};
use tokio::sync::mpsc;

use super::*;
use crate::actors::record::{StoredOptions, StoredSource};

fn member(name: &str) -> (Member, mpsc::Receiver<Command>) {
    let worker = WorkerId(format!("n/{name}"));
    let (link, commands) = Link::new(worker, BootId(1), Term(1), CancellationToken::new());
    let group_address = "127.0.0.1:1".into();
    (
        Member {
            link,
            group_address,
        },
        commands,
    )
}

fn pair(members: &[Member], now: Instant) -> Replica {
    let options = StoredOptions {
        kv_dtype: common::wire::message::KvDtype::Bf16,
        quantization: common::wire::message::Quantization::None,
        kv_blocks: 100,
        step_tokens_max: 64,
        sequences_max: 8,
        context_max: 1024,
        memory_bytes: 1 << 20,
        kv_bytes: 0,
    };
    let assignment = Assignment {
        replica: ReplicaId(1),
        generation: Generation(1),
        endpoint: "e".into(),
        members: members.iter().map(|m| m.link.worker.clone()).collect(),
        source: StoredSource::Folder("/models/m".into()),
        options,
    };
    let meters = Arc::new(Meters::new("e"));
    Replica::load(assignment, members, Credits::new(1), meters, now)
}

fn loading(done_bytes: u64) -> ShardNews {
    ShardNews::State(ShardState::Loading {
        stage: "reading weights".into(),
        done_bytes,
        total_bytes: 100,
    })
}

#[test]
fn a_load_without_progress_is_over_and_says_where_it_stopped() {
    let start = Instant::now();
    let at = |s| start + Duration::from_secs(s);
    let [(one, _one), (two, _two)] = [member("0"), member("1")];
    let mut replica = pair(&[one.clone(), two.clone()], start);
    replica.news(
        &one.link,
        ShardNews::State(crate::actors::testing::ready_state()),
        at(1),
    );
    replica.news(&two.link, loading(10), at(200));
    replica.tick(at(499));
    assert!(
        matches!(replica.status(), Status::Starting(_)),
        "it still reads"
    );
    replica.news(&two.link, loading(20), at(499));
    // Said again, but nothing new: no progress.
    replica.news(&two.link, loading(20), at(700));
    replica.tick(at(798));
    assert!(matches!(replica.status(), Status::Starting(_)));
    replica.tick(at(799));
    let Status::Over { fatal, message, .. } = replica.status() else {
        panic!("{:?}", replica.status())
    };
    assert!(!fatal, "another attempt may do");
    assert!(
        message.contains("rank 1 on n/1") && message.ends_with("reading weights"),
        "{message}"
    );
}

#[test]
fn the_words_of_a_load_have_its_stage_and_the_bytes_of_all_ranks() {
    let start = Instant::now();
    let [(one, _one), (two, _two)] = [member("0"), member("1")];
    let mut replica = pair(&[one.clone(), two.clone()], start);
    let words = |replica: &Replica| match replica.status() {
        Status::Starting(words) => words,
        other => panic!("{other:?}"),
    };
    let reading = |done_mib: u64| {
        ShardNews::State(ShardState::Loading {
            stage: "reading weights".into(),
            done_bytes: done_mib << 20,
            total_bytes: 512 << 20,
        })
    };
    replica.news(&one.link, reading(200), start);
    replica.news(&two.link, reading(56), start);
    assert_eq!(words(&replica), "reading weights 25 %: 256 MiB of 1.0 GiB");
    replica.news(&two.link, reading(184), start);
    assert_eq!(words(&replica), "reading weights 37 %: 384 MiB of 1.0 GiB");
    for member in [&one, &two] {
        let most = ShardNews::State(ShardState::Loading {
            stage: "reading weights".into(),
            done_bytes: u64::MAX,
            total_bytes: u64::MAX,
        });
        replica.news(&member.link, most, start);
    }
    assert!(words(&replica).starts_with("reading weights 100 %"));
}

#[test]
fn a_replica_that_is_loaded_has_no_such_deadline() {
    let start = Instant::now();
    let [(one, _one), (two, _two)] = [member("0"), member("1")];
    let mut replica = pair(&[one.clone(), two.clone()], start);
    for member in [one, two] {
        let ready = ShardNews::State(crate::actors::testing::ready_state());
        replica.news(&member.link, ready, start);
    }
    replica.tick(start + Duration::from_secs(1_000_000));
    assert!(matches!(replica.status(), Status::Ready { .. }));
}

#[test]
fn a_replaced_replica_serves_until_its_endpoint_has_heard_and_then_goes_when_idle() {
    let now = Instant::now();
    let retirement = Retirement {
        serves_until: now + HANDOVER,
        at: now + 60 * HANDOVER,
    };
    assert!(!retirement.is_due(0, now));
    assert!(retirement.is_due(0, now + HANDOVER));
    assert!(!retirement.is_due(1, now + HANDOVER));
    assert!(retirement.is_due(1, now + 60 * HANDOVER));
}
