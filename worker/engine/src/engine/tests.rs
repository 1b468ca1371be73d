//! Tests of the engine's thread over the fake runner: events, bounds, and ends of every kind.

use super::*;
use crate::request::{Candidate, Sampling};
use crate::runner::Geometry;
use crate::scheduler::fake::{Fake, Rng, expected};
use std::collections::BTreeMap;
use std::sync::mpsc;
use std::time::Duration;

const GEOMETRY: Geometry = Geometry {
    blocks: 24,
    context_max: 200,
    vocab: 5,
    window: None,
    step_tokens_max: 32,
    spans_max: 4,
};

/// Long enough that only a hang reaches it.
const PATIENCE: Duration = Duration::from_secs(60);

type Ends = mpsc::Receiver<EngineEnd>;
type Events = mpsc::Receiver<Vec<Event>>;

fn config() -> EngineConfig {
    EngineConfig {
        name: "engine".into(),
        generation: 1,
        prefix_salt: b"test".to_vec(),
        chunk_tokens_max: 32,
        backlog: Backlog {
            tokens: 10_000,
            sequences: 1000,
        },
    }
}

fn spawn_with(fake: Fake, config: EngineConfig) -> (EngineHandle, Events, Ends) {
    let (events_in, events) = mpsc::channel();
    let (end_in, ends) = mpsc::channel();
    let sink: Sink = Box::new(move |events| drop(events_in.send(events)));
    // Not every test waits for the end.
    let on_end: OnEnd = Box::new(move |end| drop(end_in.send(end)));
    (
        Engine::spawn(Box::new(fake), config, sink, on_end).expect("a thread"),
        events,
        ends,
    )
}

fn spawn() -> (EngineHandle, Events, Ends) {
    spawn_with(Fake::new(GEOMETRY), config())
}

/// A fake that waits before each step until the returned sender speaks, and reports that it waits.
fn gated() -> (Fake, mpsc::Sender<()>, mpsc::Receiver<()>) {
    let (go, gate) = mpsc::channel::<()>();
    let (at_gate, reached) = mpsc::channel();
    let mut fake = Fake::new(GEOMETRY);
    fake.before_step = Box::new(move |_| {
        // A dropped sender opens the gate for good, a dropped receiver no longer cares.
        let (_, _) = (at_gate.send(()), gate.recv());
        Ok(())
    });
    (fake, go, reached)
}

fn request(key: RequestKey, rng: &mut Rng) -> Request {
    let len = rng.of(1..60);
    Request {
        key,
        prompt: (0..len).map(|_| rng.of(0..5) as u32).collect(),
        candidates: (0..rng.of(1..4) as u32)
            .map(|index| Candidate {
                index,
                emitted: Vec::new(),
                mask: None,
            })
            .collect(),
        sampling: Sampling {
            temperature: 1.0,
            seed: key,
            ..Sampling::default()
        },
        tokens_max: rng.of(1..30) as u32,
        stop_ids: Vec::new(),
        prompt_logprobs: None,
        embedding: false,
        deadline: None,
    }
}

/// Collects events until all these candidates ended; gives each one's tokens and end.
fn collect(
    events: &Events,
    requests: &[Request],
) -> BTreeMap<(RequestKey, u32), (Vec<u32>, EndReason)> {
    let mut owed: usize = requests
        .iter()
        .map(|request| request.candidates.len())
        .sum();
    let mut tokens: BTreeMap<(RequestKey, u32), Vec<u32>> = BTreeMap::new();
    let mut ended = BTreeMap::new();
    while owed > 0 {
        for event in events.recv_timeout(PATIENCE).expect("every candidate ends") {
            match event {
                Event::Token {
                    key, candidate, id, ..
                } => tokens.entry((key, candidate)).or_default().push(id),
                Event::Ended {
                    key,
                    candidate,
                    reason,
                    ..
                } => {
                    let tokens = tokens.remove(&(key, candidate)).unwrap_or_default();
                    assert!(
                        ended.insert((key, candidate), (tokens, reason)).is_none(),
                        "each candidate ends once"
                    );
                    owed -= 1;
                }
                Event::PromptLogprobs { .. } | Event::Embedding { .. } => {}
            }
        }
    }
    ended
}

#[test]
fn requests_from_many_threads_get_exactly_their_own_tokens() {
    let (handle, events, _ends) = spawn();
    let requests: Vec<Request> = (0..40).map(|key| request(key, &mut Rng(key))).collect();
    std::thread::scope(|scope| {
        for some in requests.chunks(10) {
            let handle = handle.clone();
            scope.spawn(move || {
                some.iter()
                    .for_each(|request| handle.submit(request.clone()).expect("taken"))
            });
        }
    });
    let ended = collect(&events, &requests);
    for request in &requests {
        for candidate in &request.candidates {
            let expected = expected(request, candidate, &GEOMETRY);
            let ids = expected
                .tokens
                .into_iter()
                .map(|sampled| sampled.id)
                .collect();
            assert_eq!(
                ended[&(request.key, candidate.index)],
                (ids, expected.reason)
            );
        }
    }
    let snapshot = handle.stats().snapshot();
    assert!(snapshot.steps > 0 && snapshot.tokens_out > 0);
    assert_eq!(
        (
            snapshot.running,
            snapshot.waiting,
            snapshot.blocks_used,
            snapshot.blocks_total
        ),
        (0, 0, 0, 23)
    );
}

#[test]
fn a_refused_request_has_no_events_and_says_why() {
    let (handle, events, _ends) = spawn();
    let refused = |change: fn(&mut Request)| {
        let mut request = request(1, &mut Rng(1));
        change(&mut request);
        handle.submit(request).expect_err("refused")
    };
    assert!(matches!(
        refused(|r| r.prompt.clear()),
        SubmitError::Refused(SequenceError::Invalid(_))
    ));
    assert!(matches!(
        refused(|r| r.prompt = vec![5]),
        SubmitError::Refused(SequenceError::Invalid(_))
    ));
    handle.stop();
    handle.wait();
    assert_eq!(refused(|_| ()), SubmitError::Stopped);
    assert!(events.try_recv().is_err());
}

#[test]
fn a_full_backlog_refuses_until_it_drains() {
    let (fake, go, reached) = gated();
    let backlog = Backlog {
        tokens: 20,
        sequences: 3,
    };
    let (handle, events, _ends) = spawn_with(
        fake,
        EngineConfig {
            backlog,
            ..config()
        },
    );
    let of = |key, len| Request {
        prompt: vec![1; len],
        candidates: vec![Candidate::default()],
        ..request(key, &mut Rng(key))
    };
    handle
        .submit(of(1, 30))
        .expect("an empty backlog takes anything");
    reached.recv_timeout(PATIENCE).expect("the step begins");
    let mut taken = vec![of(1, 30)];
    let full = (2..9).find_map(|key| {
        let request = of(key, 8);
        taken.push(request.clone());
        handle.submit(request).err()
    });
    taken.pop();
    assert!(
        matches!(full, Some(SubmitError::Full(full)) if full.limits == backlog),
        "{full:?}"
    );
    assert_eq!(
        taken.len(),
        3,
        "the first is admitted, two of 8 tokens may wait, a third not"
    );
    drop(go);
    collect(&events, &taken);
    handle
        .submit(of(20, 30))
        .expect("the backlog is empty again");
    collect(&events, &[of(20, 30)]);
}

#[test]
fn a_key_in_flight_is_refused_and_free_again_after_its_end() {
    let (fake, go, reached) = gated();
    let (handle, events, _ends) = spawn_with(fake, config());
    let request = request(7, &mut Rng(7));
    handle.submit(request.clone()).expect("taken");
    reached.recv_timeout(PATIENCE).expect("the step begins");
    assert!(
        matches!(handle.submit(request.clone()), Err(SubmitError::Refused(SequenceError::Invalid(text))) if text.contains("in flight"))
    );
    drop(go);
    collect(&events, std::slice::from_ref(&request));
    handle.submit(request.clone()).expect("the key is free");
    collect(&events, &[request]);
}

#[test]
fn a_cancelled_request_ends_before_the_next_step() {
    let (fake, go, reached) = gated();
    let (handle, events, _ends) = spawn_with(fake, config());
    let long = Request {
        tokens_max: 100,
        ..request(1, &mut Rng(1))
    };
    let queued = request(2, &mut Rng(2));
    handle.submit(long.clone()).expect("taken");
    reached
        .recv_timeout(PATIENCE)
        .expect("the first step begins");
    handle.submit(queued.clone()).expect("taken");
    (0..3).for_each(|_| [1, 2, 99].into_iter().for_each(|key| handle.cancel(key)));
    go.send(()).expect("the engine waits");
    let ended = collect(&events, &[long, queued]);
    assert!(
        ended
            .values()
            .all(|(_, reason)| *reason == EndReason::Cancelled),
        "{ended:?}"
    );
    assert_eq!(handle.stats().snapshot().steps, 1);
}

#[test]
fn an_idle_engine_rests_and_wakes() {
    let (handle, events, _ends) = spawn();
    for key in 0..3 {
        let request = request(key, &mut Rng(key));
        handle.submit(request.clone()).expect("taken");
        collect(&events, &[request]);
        while handle.stats().current_step().is_some() {
            std::thread::yield_now();
        }
        assert!(!handle.stats().is_stalled());
    }
}

#[test]
fn a_running_step_is_seen_from_outside() {
    let (fake, go, reached) = gated();
    let (handle, events, _ends) = spawn_with(fake, config());
    let request = request(1, &mut Rng(1));
    handle.submit(request.clone()).expect("taken");
    reached.recv_timeout(PATIENCE).expect("the step begins");
    assert!(handle.stats().current_step().is_some());
    assert_eq!(handle.stats().snapshot().steps, 0);
    drop(go);
    collect(&events, &[request]);
}

/// Submits requests to an engine that ends in its `steps`th step, and gives the end's text.
fn end_of(fault: fn() -> Result<(), StepError>, steps: u64) -> String {
    let mut fake = Fake::new(GEOMETRY);
    fake.before_step = Box::new(move |plan| if plan.step == steps { fault() } else { Ok(()) });
    let (handle, events, ends) = spawn_with(fake, config());
    let mut requests: Vec<Request> = (0..20)
        .map(|key| Request {
            tokens_max: 100,
            ..request(key, &mut Rng(key))
        })
        .collect();
    requests.retain(|request| match handle.submit(request.clone()) {
        Ok(()) => true,
        Err(SubmitError::Stopped) => false,
        Err(error) => panic!("{error}"),
    });
    let ended = collect(&events, &requests);
    let end = ends.recv_timeout(PATIENCE).expect("told once").to_string();
    let owed = ended
        .values()
        .filter(|(_, reason)| *reason == EndReason::Error(SequenceError::Engine(end.clone())))
        .count();
    assert!(owed > 0, "some were in flight: {ended:?}");
    assert_eq!(handle.wait().to_string(), end);
    assert_eq!(handle.ended().map(|end| end.to_string()), Some(end.clone()));
    assert_eq!(
        handle.submit(request(99, &mut Rng(99))),
        Err(SubmitError::Stopped)
    );
    assert!(events.try_recv().is_err(), "nothing follows the end");
    end
}

#[test]
fn a_failed_step_ends_everything_once() {
    let lost = || {
        Err(StepError::RankLost {
            rank: 1,
            ranks: 2,
            reason: "no answer".into(),
        })
    };
    assert_eq!(end_of(lost, 5), "rank 1 of 2 is lost: no answer");
}

#[test]
fn a_panic_in_the_runner_ends_everything_once() {
    assert_eq!(
        end_of(|| panic!("division by zero"), 3),
        "the engine panicked: division by zero"
    );
}

#[test]
fn a_stopped_engine_ends_what_is_in_flight() {
    let (fake, go, reached) = gated();
    let (handle, events, ends) = spawn_with(fake, config());
    let requests: Vec<Request> = (0..9)
        .map(|key| Request {
            tokens_max: 100,
            ..request(key, &mut Rng(key))
        })
        .collect();
    handle.submit(requests[0].clone()).expect("taken");
    reached.recv_timeout(PATIENCE).expect("the step begins");
    requests[1..]
        .iter()
        .for_each(|request| handle.submit(request.clone()).expect("taken"));
    handle.stop();
    go.send(()).expect("the engine waits");
    let ended = collect(&events, &requests);
    let stopped = EndReason::Error(SequenceError::Engine("the engine was stopped".into()));
    assert!(
        ended.values().all(|(_, reason)| *reason == stopped),
        "{ended:?}"
    );
    assert!(matches!(handle.wait(), EngineEnd::Stopped));
    assert!(matches!(
        ends.recv_timeout(PATIENCE),
        Ok(EngineEnd::Stopped)
    ));
}

#[test]
fn an_engine_without_handles_stops() {
    let (handle, _events, ends) = spawn();
    let clone = handle.clone();
    drop(handle);
    assert!(clone.ended().is_none());
    drop(clone);
    assert!(matches!(
        ends.recv_timeout(PATIENCE),
        Ok(EngineEnd::Stopped)
    ));
}
