//! Closing, aborting and the watchdog.

use std::sync::mpsc;

use super::*;

#[test]
fn a_stuck_collective_leaves_the_stream_when_any_thread_aborts() {
    let stand_in = StandIn::new(&[]);
    let mut communicators = stand_in.communicators(2);
    // Rank 1 never comes to the sum.
    let stream = stand_in.stream();
    let mut values = [1.0; 4];
    enqueue_sum(&mut communicators[0], &mut values, stream).unwrap();
    assert!(!stream.synchronize(30), "the sum waits for the other rank");
    let aborter = communicators[0].aborter();
    std::thread::spawn(move || aborter.abort(SOON))
        .join()
        .unwrap()
        .unwrap();
    assert!(stream.synchronize(20_000));
    // The owner learns at its next call; again is harmless.
    assert_eq!(
        enqueue_sum(&mut communicators[0], &mut values, stream),
        Err(Error::Ended)
    );
    assert_eq!(communicators[0].group().map(drop), Err(Error::Ended));
    assert_eq!(communicators[0].async_error(), Err(Error::Ended));
    assert_eq!(communicators[0].aborter().abort(SOON), Ok(()));
    stand_in.assert_rules_kept();
}

#[test]
fn an_abort_that_takes_long_runs_beside_the_caller() {
    let stand_in = StandIn::new(&[]);
    stand_in.set("stand_in_hold_aborts", 1);
    let communicator = stand_in.communicators(1).remove(0);
    let within = Duration::from_millis(20);
    let stuck = communicator.aborter().abort(within).unwrap_err();
    assert_eq!(stuck, AbortError::StillRunning(within));
    assert_eq!(
        stuck.to_string(),
        "ncclCommAbort did not return within 0.02 s"
    );
    let start = Instant::now();
    let aborter = communicator.aborter();
    drop(communicator);
    assert!(
        start.elapsed() < Duration::from_secs(5),
        "dropping does not wait"
    );
    stand_in.set("stand_in_hold_aborts", 0);
    assert_eq!(aborter.begin().wait(SOON), Some(Ok(End::Aborted)));
    stand_in.assert_rules_kept();
}

#[test]
fn an_owner_in_the_middle_of_its_calls_is_stopped_between_two_of_them() {
    let stand_in = StandIn::new(&["LAUNCH_MS=0"]);
    for _ in 0..20 {
        let mut communicator = stand_in.communicators(1).remove(0);
        let aborter = communicator.aborter();
        let (begun, begin) = mpsc::channel();
        std::thread::scope(|scope| {
            let stand_in = &stand_in;
            let owner = scope.spawn(move || {
                let stream = stand_in.stream();
                let mut values = [1.0; 8];
                let mut calls = 0;
                let error = loop {
                    if let Err(error) = enqueue_sum(&mut communicator, &mut values, stream) {
                        break error;
                    }
                    calls += 1;
                    if calls == 5 {
                        begun.send(()).unwrap();
                    }
                };
                assert!(stream.synchronize(20_000));
                error
            });
            begin.recv().unwrap();
            let beside = scope.spawn({
                let aborter = aborter.clone();
                move || while aborter.async_error().is_ok() {}
            });
            aborter.abort(SOON).unwrap();
            beside.join().unwrap();
            assert_eq!(owner.join().unwrap(), Error::Ended);
        });
    }
    stand_in.assert_rules_kept();
}

#[test]
fn a_close_waits_for_the_work_and_the_other_ranks() {
    let stand_in = StandIn::new(&[]);
    let mut communicators = stand_in.communicators(2);
    let sums = on_all(&mut communicators, |communicator| {
        let mut values = [1.0; 2];
        let stream = stand_in.stream();
        enqueue_sum(communicator, &mut values, stream).unwrap();
        assert!(stream.synchronize(20_000));
        values
    });
    assert_eq!(sums, [[2.0; 2]; 2]);
    let second = communicators.pop().unwrap();
    let first = communicators.pop().unwrap().close(SOON);
    assert_eq!(
        first.wait(Duration::from_millis(20)),
        None,
        "rank 1 is still open"
    );
    let second = second.close(SOON);
    assert_eq!(first.wait(SOON), Some(Ok(End::Closed)));
    assert_eq!(second.wait(SOON), Some(Ok(End::Closed)));
    assert_eq!(stand_in.count("stand_in_destroys"), 2);
    assert_eq!(stand_in.count("stand_in_aborts"), 0);
    stand_in.assert_rules_kept();
}

#[test]
fn a_close_that_does_not_come_to_its_end_becomes_an_abort() {
    let stand_in = StandIn::new(&[]);
    let mut communicators = stand_in.communicators(2);
    let late = communicators.remove(1).close(Duration::from_millis(20));
    assert_eq!(late.wait(SOON), Some(Ok(End::Aborted)), "by its deadline");
    let communicator = communicators.remove(0);
    let aborter = communicator.aborter();
    // Rank 1 is gone: only an abort ends it.
    let closing = communicator.close(SOON * 10);
    aborter.abort(SOON).unwrap();
    assert_eq!(closing.wait(SOON), Some(Ok(End::Aborted)), "by an aborter");
    stand_in.assert_rules_kept();
}

#[test]
fn a_dropped_communicator_is_closed_in_the_background() {
    let stand_in = StandIn::new(&[]);
    drop(stand_in.communicators(2));
    until("both are destroyed", || {
        stand_in.count("stand_in_destroys") == 2
    });
    assert_eq!(stand_in.count("stand_in_aborts"), 0);
    stand_in.assert_rules_kept();
}

#[test]
fn a_watchdog_aborts_by_its_rule_and_tells_how_that_went() {
    for hold in [0, 1] {
        let stand_in = StandIn::new(&[]);
        let mut communicators = stand_in.communicators(2);
        stand_in.set("stand_in_hold_aborts", hold);
        let stream = stand_in.stream();
        let mut values = [1.0];
        enqueue_sum(&mut communicators[0], &mut values, stream).unwrap();
        let (told, outcome) = mpsc::channel();
        let mut looks = 0;
        let within = if hold == 0 {
            SOON
        } else {
            Duration::from_millis(20)
        };
        let watchdog = Watchdog::start(
            communicators[0].aborter(),
            Duration::from_millis(2),
            within,
            move |health| {
                assert_eq!(health, Ok(()));
                looks += 1;
                if looks < 5 {
                    Verdict::Wait
                } else {
                    Verdict::Abort
                }
            },
            move |outcome| told.send(outcome).unwrap(),
        )
        .unwrap();
        let outcome = outcome.recv_timeout(SOON).unwrap();
        assert_eq!(outcome.is_ok(), hold == 0, "{outcome:?}");
        stand_in.set("stand_in_hold_aborts", 0);
        assert!(stream.synchronize(20_000));
        drop(watchdog);
        stand_in.assert_rules_kept();
    }
}

#[test]
fn a_watchdog_sees_errors_in_the_background_and_looks_at_once_when_told() {
    let stand_in = StandIn::new(&[]);
    let communicator = stand_in.communicators(1).remove(0);
    let (told, outcome) = mpsc::channel();
    let watchdog = Watchdog::start(
        communicator.aborter(),
        SOON * 100,
        SOON,
        |health| match health {
            Ok(()) => Verdict::Wait,
            Err(_) => Verdict::Abort,
        },
        move |outcome| told.send(outcome).unwrap(),
    )
    .unwrap();
    stand_in.set("stand_in_async_error", 6);
    watchdog.look();
    assert_eq!(outcome.recv_timeout(SOON), Ok(Ok(())));
}

#[test]
fn a_watchdog_ends_with_its_communicator_or_its_handle() {
    let stand_in = StandIn::new(&[]);
    for by_communicator in [true, false] {
        let communicator = stand_in.communicators(1).remove(0);
        let (alive, gone) = mpsc::channel::<()>();
        let watchdog = Watchdog::start(
            communicator.aborter(),
            Duration::from_millis(1),
            SOON,
            |_| Verdict::Wait,
            move |_| drop(alive),
        )
        .unwrap();
        if by_communicator {
            assert_eq!(communicator.close(SOON).wait(SOON), Some(Ok(End::Closed)));
        } else {
            drop(watchdog);
        }
        assert_eq!(
            gone.recv_timeout(SOON),
            Err(mpsc::RecvTimeoutError::Disconnected)
        );
    }
    stand_in.assert_rules_kept();
}
