//! Making communicators, and their operations.

use super::*;

/// Numbers of one rank.
fn numbers(rank: u32, len: usize) -> Vec<f32> {
    (0..len).map(|i| (i * 10 + rank as usize) as f32).collect()
}

#[test]
fn sums_and_maxima_are_taken_over_all_ranks_in_place_or_not() {
    let stand_in = StandIn::new(&[]);
    let mut communicators = stand_in.communicators(3);
    let results = on_all(&mut communicators, |communicator| {
        let stream = stand_in.stream();
        let mut sum = numbers(communicator.rank(), 5);
        let send = numbers(communicator.rank(), 5);
        let mut max = vec![0.0f32; 5];
        for _ in 0..20 {
            sum.copy_from_slice(&send);
            enqueue_sum(communicator, &mut sum, stream).unwrap();
            // SAFETY: both vectors outlive the wait for the stream below.
            unsafe {
                communicator.all_reduce(
                    send.as_ptr().cast(),
                    max.as_mut_ptr().cast(),
                    5,
                    DataType::F32,
                    ReduceOp::Max,
                    stream.raw,
                )
            }
            .unwrap();
            assert!(stream.synchronize(20_000));
        }
        (sum, max)
    });
    for (sum, max) in results {
        assert_eq!(sum, [3.0, 33.0, 63.0, 93.0, 123.0]);
        assert_eq!(max, numbers(2, 5));
    }
    stand_in.assert_rules_kept();
}

#[test]
fn gathered_numbers_stand_in_rank_order_and_broadcast_ones_are_the_roots() {
    let stand_in = StandIn::new(&[]);
    let mut communicators = stand_in.communicators(3);
    let results = on_all(&mut communicators, |communicator| {
        let stream = stand_in.stream();
        let rank = communicator.rank() as u8;
        let (send, mut all, mut roots) = ([rank, rank + 10], [0u8; 6], [0u8; 2]);
        // SAFETY: the arrays outlive the wait for the stream below.
        unsafe {
            let (send, data) = (send.as_ptr().cast(), DataType::U8);
            communicator
                .all_gather(send, all.as_mut_ptr().cast(), 2, data, stream.raw)
                .unwrap();
            communicator
                .broadcast(send, roots.as_mut_ptr().cast(), 2, data, 1, stream.raw)
                .unwrap();
        }
        assert!(stream.synchronize(20_000));
        (all, roots)
    });
    assert!(
        results
            .iter()
            .all(|result| *result == ([0, 10, 1, 11, 2, 12], [1, 11]))
    );
    stand_in.assert_rules_kept();
}

#[test]
fn sends_and_receives_of_a_group_may_wait_for_each_other() {
    let stand_in = StandIn::new(&[]);
    let mut communicators = stand_in.communicators(4);
    let results = on_all(&mut communicators, |communicator| {
        let (rank, ranks) = (communicator.rank(), communicator.ranks());
        let stream = stand_in.stream();
        let mut inbox = vec![[0.0f32; 3]; ranks as usize];
        let outbox = numbers(rank, 3);
        let mut group = communicator.group().unwrap();
        for peer in (0..ranks).filter(|peer| *peer != rank) {
            // SAFETY: both vectors outlive the wait for the stream below.
            unsafe {
                let to = inbox[peer as usize].as_mut_ptr().cast();
                group.recv(to, 3, DataType::F32, peer, stream.raw).unwrap();
                let from = outbox.as_ptr().cast();
                group
                    .send(from, 3, DataType::F32, peer, stream.raw)
                    .unwrap();
            }
        }
        group.end().unwrap();
        assert!(stream.synchronize(20_000));
        inbox
    });
    for (rank, inbox) in (0..).zip(results) {
        for (peer, got) in (0..).zip(inbox) {
            let expected = if peer == rank {
                vec![0.0; 3]
            } else {
                numbers(peer, 3)
            };
            assert_eq!(got.to_vec(), expected, "rank {rank} from {peer}");
        }
    }
    stand_in.assert_rules_kept();
}

#[test]
fn an_empty_group_does_nothing() {
    let stand_in = StandIn::new(&[]);
    let mut communicators = stand_in.communicators(1);
    communicators[0].group().unwrap().end().unwrap();
    drop(communicators[0].group().unwrap());
    stand_in.assert_rules_kept();
}

#[test]
fn a_rank_that_does_not_come_is_an_error_at_the_deadline_and_leaves_nothing_behind() {
    let stand_in = StandIn::new(&[]);
    let member = Member {
        id: stand_in.library.unique_id().unwrap(),
        rank: 0,
        ranks: 2,
    };
    let within = Duration::from_millis(50);
    let error =
        Communicator::init(&stand_in.library, &member, Config::default(), within).unwrap_err();
    assert_eq!(
        error.to_string(),
        "ncclCommInitRankConfig was still in progress after 0.05 s"
    );
    assert_eq!(stand_in.count("stand_in_aborts"), 1);
    stand_in.assert_rules_kept();
}

#[test]
fn the_wait_for_the_others_is_ended_from_another_thread() {
    let stand_in = StandIn::new(&[]);
    let member = Member {
        id: stand_in.library.unique_id().unwrap(),
        rank: 1,
        ranks: 2,
    };
    let forming = Communicator::begin(&stand_in.library, &member, Config::default()).unwrap();
    let aborter = forming.aborter();
    let thread = std::thread::spawn(move || forming.wait(SOON).map(drop));
    aborter.abort(SOON).unwrap();
    assert_eq!(thread.join().unwrap(), Err(Error::Ended));
    stand_in.assert_rules_kept();
}

#[test]
fn nccls_refusal_is_told_with_its_code_and_words() {
    let stand_in = StandIn::new(&["INIT_RESULT=5"]);
    let member = Member {
        id: stand_in.library.unique_id().unwrap(),
        rank: 0,
        ranks: 1,
    };
    let error =
        Communicator::init(&stand_in.library, &member, Config::default(), SOON).unwrap_err();
    assert_eq!(error.code(), Some(ResultCode::InvalidUsage));
    assert_eq!(
        error.to_string(),
        "ncclCommInitRankConfig failed: ncclInvalidUsage (invalid usage; Duplicate GPU detected)"
    );
    stand_in.assert_rules_kept();
}

#[test]
fn a_refused_operation_is_told_and_ranks_out_of_range_are_refused() {
    let stand_in = StandIn::new(&[]);
    let mut communicator = stand_in.communicators(1).remove(0);
    let stream = stand_in.stream();
    for peer in [1, u32::MAX] {
        let number = [0u8; 1];
        // SAFETY: NCCL refuses the send and never reads the number.
        let sent =
            unsafe { communicator.send(number.as_ptr().cast(), 1, DataType::U8, peer, stream.raw) };
        assert_eq!(
            sent.unwrap_err().to_string(),
            "ncclSend failed: ncclInvalidArgument (invalid argument; no such peer)"
        );
    }
    let id = stand_in.library.unique_id().unwrap();
    for (rank, ranks) in [(0, 0), (2, 2), (u32::MAX - 1, u32::MAX)] {
        let member = Member { id, rank, ranks };
        let refused = Communicator::begin(&stand_in.library, &member, Config::default());
        assert_eq!(refused.map(drop), Err(Error::NoSuchRank { rank, ranks }));
    }
}

#[test]
fn a_call_that_stays_in_progress_fails_at_its_deadline() {
    let stand_in = StandIn::new(&["LAUNCH_MS=60000"]);
    let member = Member {
        id: stand_in.library.unique_id().unwrap(),
        rank: 0,
        ranks: 1,
    };
    let config = Config {
        call_wait_max: Duration::from_millis(30),
    };
    let mut communicator = Communicator::init(&stand_in.library, &member, config, SOON).unwrap();
    let mut values = [1.0];
    let error = enqueue_sum(&mut communicator, &mut values, stand_in.stream()).unwrap_err();
    assert_eq!(
        error,
        Error::TimedOut {
            call: "ncclAllReduce",
            waited: config.call_wait_max
        }
    );
    communicator.aborter().abort(SOON).unwrap();
    stand_in.assert_rules_kept();
}

#[test]
fn an_error_in_the_background_is_seen_by_the_owner_and_from_beside() {
    let stand_in = StandIn::new(&[]);
    let mut communicator = stand_in.communicators(1).remove(0);
    let aborter = communicator.aborter();
    assert_eq!(aborter.async_error(), Ok(()));
    stand_in.set("stand_in_async_error", 6);
    assert_eq!(
        aborter.async_error().unwrap_err().code(),
        Some(ResultCode::Remote)
    );
    assert_eq!(
        communicator.async_error().unwrap_err().code(),
        Some(ResultCode::Remote)
    );
    let mut values = [1.0];
    let stream = stand_in.stream();
    let error = enqueue_sum(&mut communicator, &mut values, stream).unwrap_err();
    assert_eq!(error.code(), Some(ResultCode::Remote));
    assert!(stream.synchronize(20_000));
}
