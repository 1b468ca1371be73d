//! Groups of threads, each rank with its own end as a process would have it: sums, gathers, plans and deaths.

use std::io::Write;
use std::net::{TcpListener, TcpStream};
use std::sync::Barrier;
use std::time::{Duration, Instant};

use super::host::{
    FormError, GroupBuilder, GroupId, GroupKey, GroupListener, HostGroup, Membership, Transport,
    host_id, join,
};
use super::solo::Solo;
use super::{Collective, CollectiveError};
use crate::runner::StepError;

const SOON: Duration = Duration::from_secs(20);
const BOTH: [Transport; 2] = [Transport::Shm, Transport::Tcp];

fn listener() -> GroupListener {
    GroupListener::start(TcpListener::bind("127.0.0.1:0").unwrap()).unwrap()
}

fn member(rank: u32, ranks: u32, transport: Transport) -> Membership {
    Membership {
        id: GroupId {
            group: 7,
            generation: 3,
        },
        rank,
        ranks,
        key: GroupKey::new(&[9; 32]).unwrap(),
        host: host_id(),
        transport,
        wait_max: Duration::from_secs(30),
    }
}

/// Forms a group of threads' worth of ranks, in rank order. `adapt` may change a membership.
fn form(
    ranks: u32,
    transport: Transport,
    adapt: impl Fn(&mut Membership) + Sync,
) -> Vec<HostGroup> {
    let listener = listener();
    std::thread::scope(|scope| {
        let (listener, adapt) = (&listener, &adapt);
        let threads: Vec<_> = (0..ranks)
            .map(|rank| {
                scope.spawn(move || {
                    let mut member = member(rank, ranks, transport);
                    adapt(&mut member);
                    if rank == 0 {
                        GroupBuilder::new(listener, member)
                            .unwrap()
                            .lead(SOON)
                            .unwrap()
                    } else {
                        join(listener.address(), &member, SOON).unwrap()
                    }
                })
            })
            .collect();
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap())
            .collect()
    })
}

/// Runs `body` on all ranks at once; gives their results in rank order.
pub(super) fn on_all<R: Send, T: Send>(
    ranks: &mut [R],
    body: impl Fn(&mut R) -> T + Sync,
) -> Vec<T> {
    std::thread::scope(|scope| {
        let body = &body;
        let threads: Vec<_> = ranks
            .iter_mut()
            .map(|rank| scope.spawn(move || body(rank)))
            .collect();
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap())
            .collect()
    })
}

/// Numbers of very different sizes, so that another order of addition gives other bits.
fn numbers(rank: u32, len: usize, seed: u32) -> Vec<f32> {
    let mut state = rank.wrapping_mul(0x9e37_79b9) ^ seed.wrapping_mul(0x85eb_ca6b) | 1;
    (0..len)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 17;
            state ^= state << 5;
            (state as f32 / u32::MAX as f32 - 0.5) * 10f32.powi((state % 9) as i32 - 4)
        })
        .collect()
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

fn rank_lost<T: std::fmt::Debug>(result: Result<T, CollectiveError>) -> (u32, u32, String) {
    match result {
        Err(CollectiveError::RankLost {
            rank,
            ranks,
            reason,
        }) => (rank, ranks, reason),
        other => panic!("expected a lost rank, got {other:?}"),
    }
}

#[test]
fn sums_are_added_in_rank_order_on_every_rank_and_transport() {
    for ranks in [2, 4] {
        for transport in BOTH {
            let mut groups = form(ranks, transport, |_| {});
            assert!(groups.iter().all(|group| group.transport() == transport));
            for (seed, len) in [0, 1, 7, 4096, 65_535, 65_536, 65_537, 200_003]
                .into_iter()
                .enumerate()
            {
                let seed = seed as u32;
                let expected = (1..ranks).fold(numbers(0, len, seed), |mut sum, rank| {
                    sum.iter_mut()
                        .zip(numbers(rank, len, seed))
                        .for_each(|(sum, x)| *sum += x);
                    sum
                });
                let sums = on_all(&mut groups, |group| {
                    let mut values = numbers(group.rank(), len, seed);
                    group.all_reduce_sum(&mut values).unwrap();
                    values
                });
                for sum in sums {
                    assert!(
                        bits(&sum) == bits(&expected),
                        "{ranks} ranks, {transport:?}, {len} numbers"
                    );
                }
            }
        }
    }
}

#[test]
fn gathered_columns_stand_side_by_side_whatever_their_widths() {
    let shapes: [(usize, [usize; 4]); 6] = [
        (1, [5, 5, 5, 4]),
        (3, [4, 0, 2, 1]),
        (0, [3, 3, 3, 3]),
        (2, [0, 0, 0, 9]),
        (7, [30_000, 30_000, 11, 0]),
        (1, [1, 0, 200_000, 3]),
    ];
    for transport in BOTH {
        let mut groups = form(4, transport, |_| {});
        for (rows, widths) in shapes {
            let whole = widths.iter().sum::<usize>();
            let gathered = on_all(&mut groups, |group| {
                let part = numbers(group.rank(), rows * widths[group.rank() as usize], 1);
                let mut out = vec![-1.0; rows * whole];
                group
                    .gather_columns(&part, rows, &widths, &mut out)
                    .unwrap();
                out
            });
            let mut expected = vec![-1.0; rows * whole];
            let mut column = 0;
            for (rank, width) in (0..).zip(widths) {
                let part = numbers(rank, rows * width, 1);
                for row in 0..rows {
                    expected[row * whole + column..][..width]
                        .copy_from_slice(&part[row * width..][..width]);
                }
                column += width;
            }
            assert!(
                gathered[0] == expected,
                "{transport:?}, {rows} rows of {widths:?}"
            );
            assert!(gathered[1..].iter().flatten().all(|value| *value == -1.0));
        }
    }
}

#[test]
fn a_long_mixed_run_gives_the_same_bits_on_both_transports() {
    let results = BOTH.map(|transport| {
        let mut groups = form(4, transport, |_| {});
        on_all(&mut groups, |group| {
            let mut state = numbers(group.rank(), 90_000, 5);
            let mut logits = vec![0.0; 4 * 300];
            for step in 0..60u32 {
                let len = (step as usize * 7919) % 90_000;
                group.all_reduce_sum(&mut state[..len]).unwrap();
                group.all_reduce_sum(&mut state[..64]).unwrap();
                group
                    .gather_columns(&state[..300], 1, &[300; 4], &mut logits)
                    .unwrap();
                state.iter_mut().for_each(|value| *value *= 0.25);
            }
            (bits(&state), bits(&logits))
        })
    });
    assert!(results[0] == results[1]);
}

#[test]
fn plans_reach_all_followers_in_order() {
    for transport in BOTH {
        let mut groups = form(3, transport, |_| {});
        let plans: Vec<Vec<u8>> = [0, 1, 100, 70_000]
            .map(|len| (0..len).map(|i| i as u8).collect())
            .to_vec();
        let received = on_all(&mut groups, |group| {
            let mut received = Vec::new();
            for plan in &plans {
                let mut buffer = plan.clone();
                if group.rank() == 0 {
                    group.send_plan(plan).unwrap();
                } else {
                    group.recv_plan(&mut buffer).unwrap();
                }
                received.push(buffer);
                group.all_reduce_sum(&mut [1.0; 3]).unwrap();
            }
            received
        });
        assert!(received.iter().all(|received| *received == plans));
    }
}

#[test]
fn a_follower_that_goes_in_the_middle_of_a_sum_is_named_by_every_survivor() {
    for transport in BOTH {
        let mut groups = form(4, transport, |_| {});
        let gone = groups.remove(2);
        let met = Barrier::new(4);
        let start = Instant::now();
        let errors = std::thread::scope(|scope| {
            scope.spawn(|| {
                met.wait();
                drop(gone);
            });
            on_all(&mut groups, |group| {
                met.wait();
                // The first sum may still find the rank alive; none can complete.
                rank_lost(group.all_reduce_sum(&mut vec![1.0; 300_000]))
            })
        });
        for (rank, ranks, reason) in errors {
            assert_eq!((rank, ranks), (2, 4), "{transport:?}: {reason}");
        }
        assert!(
            start.elapsed() < Duration::from_secs(5),
            "{:?}",
            start.elapsed()
        );
        // The group stays over.
        assert_eq!(rank_lost(groups[0].send_plan(b"more")).0, 2);
    }
}

#[test]
fn a_leader_that_goes_is_named_by_followers_in_a_sum_and_by_idle_ones() {
    for transport in BOTH {
        let mut groups = form(3, transport, |_| {});
        drop(groups.remove(0));
        let errors = on_all(&mut groups, |group| {
            let mut plan = Vec::new();
            rank_lost(if group.rank() == 1 {
                group.all_reduce_sum(&mut [0.0; 8])
            } else {
                group.recv_plan(&mut plan)
            })
        });
        assert!(
            errors
                .iter()
                .all(|(rank, ranks, _)| (*rank, *ranks) == (0, 3)),
            "{errors:?}"
        );
    }
}

#[test]
fn a_rank_that_lives_but_stays_silent_is_lost_after_the_longest_wait() {
    for transport in BOTH {
        let mut groups = form(2, transport, |member| {
            member.wait_max = Duration::from_millis(150)
        });
        let (rank, _, reason) = rank_lost(groups[0].all_reduce_sum(&mut [1.0]));
        assert_eq!(
            (rank, reason.as_str()),
            (1, "it did not answer within 0.15 s")
        );
        // Its connection was closed: it learns when it waits for the next plan.
        assert_eq!(rank_lost(groups[1].recv_plan(&mut Vec::new())).0, 0);
    }
}

#[test]
fn an_abort_from_another_thread_ends_a_blocked_call() {
    for transport in BOTH {
        for in_sum in [false, true] {
            let mut groups = form(2, transport, |_| {});
            let mut blocked = groups.pop().unwrap();
            let handle = blocked.abort_handle();
            let (entered, enter) = std::sync::mpsc::channel();
            let thread = std::thread::spawn(move || {
                entered.send(()).unwrap();
                let mut plan = Vec::new();
                if in_sum {
                    blocked.all_reduce_sum(&mut [1.0; 9])
                } else {
                    blocked.recv_plan(&mut plan)
                }
            });
            enter.recv().unwrap();
            handle.abort();
            assert_eq!(thread.join().unwrap(), Err(CollectiveError::Aborted));
            // What the blocked rank had contributed before may still complete one sum.
            let leader = &mut groups[0];
            let lost = leader
                .all_reduce_sum(&mut [1.0; 9])
                .and_then(|()| leader.all_reduce_sum(&mut [1.0; 9]));
            assert_eq!(rank_lost(lost).0, 1);
        }
    }
}

#[test]
fn a_death_is_seen_from_beside_behind_no_plan_and_with_its_name() {
    let mut groups = form(3, Transport::Auto, |_| {});
    let watches: Vec<_> = groups.iter().map(HostGroup::link_watch).collect();
    assert!(
        watches
            .iter()
            .all(|watch| watch.lost(Duration::ZERO).is_none())
    );
    groups[0].send_plan(b"the last step").unwrap();
    drop(groups.remove(2));
    assert_eq!(rank_lost(watches[0].lost(SOON).map_or(Ok(()), Err)).0, 2);
    assert!(
        watches[1].lost(Duration::ZERO).is_none(),
        "its leader lives"
    );
    // The leader tells of the loss, behind a plan that rank 1 has not read.
    let loss = watches[0].lost(SOON).unwrap();
    groups[0].fail(loss.clone());
    assert!(watches[0].lost(Duration::ZERO).is_none(), "it has closed");
    assert!(watches[1].lost(Duration::from_millis(20)).is_none());
    let mut plan = Vec::new();
    groups[1].recv_plan(&mut plan).unwrap();
    assert_eq!(plan, b"the last step");
    assert_eq!(watches[1].lost(SOON), Some(loss.clone()));
    // Looking has taken nothing away.
    assert_eq!(groups[1].recv_plan(&mut plan), Err(loss));
}

#[test]
fn every_rank_hears_the_words_of_all_and_one_that_says_nothing_is_lost() {
    for transport in BOTH {
        let mut groups = form(3, transport, |_| {});
        let heard = on_all(&mut groups, |group| {
            let word = vec![b'a'; group.rank() as usize];
            group.exchange(&word, SOON)
        });
        let all = vec![b"".to_vec(), b"a".to_vec(), b"aa".to_vec()];
        assert_eq!(heard, vec![Ok(all.clone()), Ok(all.clone()), Ok(all)]);
        let heard = on_all(&mut groups, |group| match group.rank() {
            2 => Ok(Vec::new()),
            _ => group.exchange(b"here", Duration::from_millis(300)),
        });
        for told in &heard[..2] {
            let told = told.as_ref().unwrap_err().to_string();
            assert_eq!(told, "rank 2 of 3 is lost: it did not answer within 0.3 s");
        }
    }
}

#[test]
fn ranks_that_disagree_on_a_sum_fail_instead_of_mixing_numbers() {
    let mut groups = form(2, Transport::Tcp, |_| {});
    let results = on_all(&mut groups, |group| {
        group.all_reduce_sum(&mut vec![1.0; 4 + group.rank() as usize])
    });
    assert!(
        matches!(&results[0], Err(CollectiveError::OutOfStep(what)) if what.contains("rank 1 sent 20 bytes")),
        "{results:?}"
    );
    assert!(results[1].is_err());
}

#[test]
fn ranks_on_different_machines_use_tcp() {
    let groups = form(3, Transport::Auto, |member| {
        member.host = format!("machine-{}", member.rank / 2)
    });
    assert!(
        groups
            .iter()
            .all(|group| group.transport() == Transport::Tcp)
    );
    let groups = form(3, Transport::Auto, |_| {});
    assert!(
        groups
            .iter()
            .all(|group| group.transport() == Transport::Shm)
    );
}

#[test]
fn a_group_that_cannot_form_names_the_missing_ranks_to_all() {
    let listener = listener();
    let builder = GroupBuilder::new(&listener, member(0, 4, Transport::Auto)).unwrap();
    let address = listener.address();
    let present = std::thread::spawn(move || join(address, &member(2, 4, Transport::Auto), SOON));
    let error = builder.lead(Duration::from_secs(1)).unwrap_err();
    assert_eq!(
        error,
        FormError::Missing {
            missing: vec![1, 3],
            ranks: 4,
            waited_s: 1
        }
    );
    assert_eq!(error.to_string(), "ranks 1, 3 of 4 did not join within 1 s");
    let told = present.join().unwrap().unwrap_err();
    assert_eq!(
        told.to_string(),
        "rank 1 of 4 is lost: it did not join within 1 s"
    );
}

#[test]
fn a_member_whose_leader_was_never_told_of_the_group_says_so() {
    let listener = listener();
    let error = join(
        listener.address(),
        &member(1, 2, Transport::Auto),
        Duration::from_secs(2),
    )
    .unwrap_err();
    assert!(
        error
            .to_string()
            .ends_with("it does not lead generation 3 of group 7"),
        "{error}"
    );
}

#[test]
fn a_wrong_key_or_generation_does_not_get_in_and_does_not_disturb() {
    let listener = listener();
    let builder = GroupBuilder::new(&listener, member(0, 2, Transport::Auto)).unwrap();
    let mut stranger = member(1, 2, Transport::Auto);
    stranger.key = GroupKey::new(&[8; 32]).unwrap();
    let error = join(listener.address(), &stranger, SOON).unwrap_err();
    assert!(
        error
            .to_string()
            .ends_with("it has another key for this generation"),
        "{error}"
    );
    let mut late = member(1, 2, Transport::Auto);
    late.id.generation = 2;
    assert!(join(listener.address(), &late, Duration::from_millis(200)).is_err());
    let address = listener.address();
    let real = std::thread::spawn(move || join(address, &member(1, 2, Transport::Auto), SOON));
    builder.lead(SOON).unwrap();
    real.join().unwrap().unwrap();
}

#[test]
fn garbage_and_silence_at_the_listener_disturb_nobody() {
    let listener = listener();
    let mut connections = Vec::new();
    for i in 0..20u8 {
        let mut connection = TcpStream::connect(listener.address()).unwrap();
        // Every other one says nothing at all; a member must get in all the same.
        if i % 2 == 0 {
            connection.write_all(&[i; 300]).unwrap();
        }
        connections.push(connection);
    }
    let builder = GroupBuilder::new(&listener, member(0, 2, Transport::Auto)).unwrap();
    let address = listener.address();
    let real = std::thread::spawn(move || join(address, &member(1, 2, Transport::Auto), SOON));
    builder.lead(SOON).unwrap();
    real.join().unwrap().unwrap();
}

#[test]
fn two_groups_form_through_one_listener_at_a_time() {
    let listener = listener();
    let address = listener.address();
    let of = |group: u64, rank: u32| Membership {
        id: GroupId {
            group,
            generation: 1,
        },
        ..member(rank, 2, Transport::Auto)
    };
    let first = GroupBuilder::new(&listener, of(1, 0)).unwrap();
    let second = GroupBuilder::new(&listener, of(2, 0)).unwrap();
    assert!(matches!(
        GroupBuilder::new(&listener, of(2, 0)),
        Err(FormError::Invalid(_))
    ));
    let members =
        [2, 1].map(|group| std::thread::spawn(move || join(address, &of(group, 1), SOON).unwrap()));
    let leaders = [first, second].map(|builder| builder.lead(SOON).unwrap());
    for (mut leader, member) in leaders.into_iter().rev().zip(members) {
        let mut member = member.join().unwrap();
        leader.send_plan(b"go").unwrap();
        let mut plan = Vec::new();
        member.recv_plan(&mut plan).unwrap();
        assert_eq!(plan, b"go");
    }
}

#[test]
fn impossible_memberships_are_refused() {
    let listener = listener();
    assert!(matches!(
        GroupBuilder::new(&listener, member(0, 1, Transport::Auto)),
        Err(FormError::Invalid(_))
    ));
    assert!(matches!(
        GroupBuilder::new(&listener, member(1, 2, Transport::Auto)),
        Err(FormError::Invalid(_))
    ));
    assert!(matches!(
        join(listener.address(), &member(0, 2, Transport::Auto), SOON),
        Err(FormError::Invalid(_))
    ));
    assert!(matches!(
        join(listener.address(), &member(5, 5, Transport::Auto), SOON),
        Err(FormError::Invalid(_))
    ));
    assert!(GroupKey::new(&[1; 8]).is_err());
}

#[test]
fn a_lost_rank_is_a_lost_rank_of_the_step() {
    let error = CollectiveError::RankLost {
        rank: 2,
        ranks: 4,
        reason: "it closed its connection".into(),
    };
    let text = error.to_string();
    let step = StepError::from(error);
    assert!(matches!(
        step,
        StepError::RankLost {
            rank: 2,
            ranks: 4,
            ..
        }
    ));
    assert_eq!(step.to_string(), text);
}

#[test]
fn the_group_of_one_changes_nothing_until_it_is_ended() {
    let mut solo: Box<dyn Collective<Vec<f32>>> = Box::new(Solo::new());
    let (mut values, mut out) = (vec![1.0, 2.0, 3.0, 4.0], vec![0.0; 5]);
    solo.all_reduce_sum(&mut values, 4).unwrap();
    solo.gather_columns(&values, 2, &[2], &mut out).unwrap();
    assert_eq!(
        (values.as_slice(), out.as_slice()),
        (&[1.0, 2.0, 3.0, 4.0][..], &[1.0, 2.0, 3.0, 4.0, 0.0][..])
    );
    assert!(solo.gather_columns(&values, 3, &[2], &mut out).is_err());
    solo.abort_handle().abort();
    assert_eq!(
        solo.all_reduce_sum(&mut values, 4),
        Err(CollectiveError::Aborted)
    );
}
