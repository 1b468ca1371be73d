//! Flights without actors: every request ends once, whatever happens in whatever order.

use common::ids::{BootId, Generation, Term, WorkerId};
use common::request::{Delta, Prompt};
use common::wire::message::Command;
use proptest::prelude::*;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use super::*;
use crate::actors::meters::Meters;
use crate::actors::permit::{Booking, Credits, EntityShared};
use crate::actors::ticket::{Reading, Whereabouts};
use common::request::Generate;
use tokio::sync::{mpsc, oneshot};

struct Request {
    ticket: Option<Ticket>,
    accepted: oneshot::Receiver<Result<u32, ApiError>>,
    events: mpsc::Receiver<GenerationEvent>,
    whereabouts: Arc<Whereabouts>,
}

fn request(entity: &Arc<EntityShared>, candidates: u32) -> Request {
    let id = RequestId::random();
    let (accept, accepted) = oneshot::channel();
    let (send, events) = mpsc::channel(Ticket::events_max(candidates, 4));
    let whereabouts = Whereabouts::waiting(id, Arc::new(Notify::new()));
    let now = Instant::now();
    let ticket = Ticket {
        request: id,
        generate: Generate {
            candidates,
            ..Generate::new(Prompt::Text("p".into()))
        },
        deadline: now + Duration::from_secs(60),
        arrived: now,
        attempt: 0,
        accepted: Some(accept),
        events: send,
        whereabouts: whereabouts.clone(),
        booking: Booking::new(entity.clone(), 10),
        reading: Reading::new(now),
        meters: Arc::new(Meters::new("e")),
        charge: None,
        prompt_delivered: false,
    };
    Request {
        ticket: Some(ticket),
        accepted,
        events,
        whereabouts,
    }
}

fn link() -> (Arc<Link>, mpsc::Receiver<Command>) {
    Link::new(
        WorkerId("n/0".into()),
        BootId(1),
        Term(1),
        CancellationToken::new(),
    )
}

fn start(
    link: &Arc<Link>,
    ticket: Ticket,
    entity: &Arc<EntityShared>,
    credits: &Arc<Credits>,
) -> Result<(), Box<Flight>> {
    let permit = Permit::take(entity.clone(), credits.clone());
    start_in(link, ticket, Generation(1), permit)
}

fn start_in(
    link: &Arc<Link>,
    ticket: Ticket,
    generation: Generation,
    permit: Permit,
) -> Result<(), Box<Flight>> {
    let flight = Flight::new(ticket, ReplicaId(1), generation, permit);
    link.start(flight, Flight::start)
}

fn delta(request: RequestId, candidate: u32, text: &str) -> Output {
    let delta = Delta {
        candidate,
        ids: vec![1],
        text: text.into(),
        ..Delta::default()
    };
    Output::Delta { request, delta }
}

fn end(request: RequestId, candidate: u32, end: End) -> Output {
    Output::End {
        request,
        candidate,
        output_tokens: 1,
        cached_tokens: 0,
        end,
    }
}

fn engine_gone() -> End {
    End::Error(Failure::new(FailureKind::Unavailable, "the engine ended"))
}

/// One candidate's events so far.
fn text_and_end(events: &mut mpsc::Receiver<GenerationEvent>) -> (String, Option<End>) {
    let mut text = String::new();
    while let Ok(event) = events.try_recv() {
        match event {
            GenerationEvent::Delta(delta) => text.push_str(&delta.text),
            GenerationEvent::End { end, .. } => return (text, Some(end)),
            GenerationEvent::Prompt { .. } | GenerationEvent::Embedding(_) => {}
        }
    }
    (text, None)
}

#[test]
fn late_words_of_an_older_attempt_do_not_touch_the_newer_one() {
    let (entity, credits) = (EntityShared::new(Arc::default()), Credits::new(4));
    let permit = || Permit::take(entity.clone(), credits.clone());
    let (link, _commands) = link();
    let now = Instant::now();
    let mut request = request(&entity, 1);
    let ticket = request.ticket.take().unwrap();
    let id = ticket.request;
    assert!(start_in(&link, ticket, Generation(1), permit()).is_ok());
    link.replica_lost(ReplicaId(1), "gone");
    let ticket = entity.take_returned().pop().unwrap();
    assert!(start_in(&link, ticket, Generation(2), permit()).is_ok());
    // All that generation 1 may still have had to say.
    let unavailable = || Failure::new(FailureKind::Unavailable, "not ready");
    link.flights.accepted(id, 0, 9);
    link.flights.rejected(id, 0, unavailable());
    for stale in [
        delta(id, 0, "late"),
        end(id, 0, engine_gone()),
        end(id, 0, End::Stop),
    ] {
        link.step(ReplicaId(1), Generation(1), vec![stale], now);
    }
    // Of another replica, and before this attempt was taken.
    link.step(ReplicaId(2), Generation(2), vec![delta(id, 0, "late")], now);
    link.step(ReplicaId(1), Generation(2), vec![delta(id, 0, "late")], now);
    assert!(request.accepted.try_recv().is_err(), "nothing was told");
    link.flights.accepted(id, 1, 3);
    assert_eq!(request.accepted.try_recv().unwrap().unwrap(), 3);
    let outputs = vec![delta(id, 0, "here"), end(id, 0, End::Stop)];
    link.step(ReplicaId(1), Generation(2), outputs, now);
    assert_eq!(
        text_and_end(&mut request.events),
        ("here".into(), Some(End::Stop))
    );
    assert_eq!((entity.running(), credits.running()), (0, 0));
}

#[test]
fn an_engines_end_is_a_lost_replica_before_the_first_output_and_a_typed_error_after_it() {
    let (entity, credits) = (EntityShared::new(Arc::default()), Credits::new(4));
    credits.set_up(true, Instant::now());
    let (link, mut commands) = link();
    let now = Instant::now();
    let [mut waiting, mut streaming, mut several] =
        [1, 1, 3].map(|candidates| request(&entity, candidates));
    let mut ids = Vec::new();
    for request in [&mut waiting, &mut streaming, &mut several] {
        let ticket = request.ticket.take().unwrap();
        ids.push(ticket.request);
        assert!(start(&link, ticket, &entity, &credits).is_ok());
        assert!(matches!(commands.try_recv(), Ok(Command::Start { .. })));
        link.flights.accepted(*ids.last().unwrap(), 0, 3);
    }
    link.step(
        ReplicaId(1),
        Generation(1),
        vec![delta(ids[1], 0, "half")],
        now,
    );
    let outputs = ids.iter().map(|&id| end(id, 0, engine_gone())).collect();
    link.step(ReplicaId(1), Generation(1), outputs, now);
    let returned = entity.take_returned();
    let again: Vec<_> = returned.iter().map(|t| (t.request, t.attempt)).collect();
    assert_eq!(again, [(ids[0], 1), (ids[2], 1)]);
    assert!(
        !credits.load(Instant::now()).up,
        "the replica is left alone for a moment"
    );
    // Candidates that may still run there are cancelled, before the id can be given out again.
    let command = commands.try_recv();
    assert!(
        matches!(command, Ok(Command::Cancel { request }) if request == ids[2]),
        "{command:?}"
    );
    assert!(commands.try_recv().is_err());
    assert_eq!(text_and_end(&mut waiting.events), (String::new(), None));
    let (text, ended) = text_and_end(&mut streaming.events);
    let Some(End::Error(failure)) = ended else {
        panic!("{ended:?}")
    };
    assert_eq!(
        (text.as_str(), failure.kind),
        ("half", FailureKind::Unavailable)
    );
    assert!(
        failure.message.contains("the engine ended")
            && failure.message.ends_with("send the request again"),
        "{failure}"
    );
    assert_eq!(credits.running(), 0);
}

#[test]
fn a_cancel_before_the_start_keeps_the_request_from_the_worker() {
    let (entity, credits) = (EntityShared::new(Arc::default()), Credits::new(4));
    let (link, mut commands) = link();
    let mut request = request(&entity, 1);
    request.whereabouts.cancel();
    assert!(start(&link, request.ticket.take().unwrap(), &entity, &credits).is_ok());
    assert!(commands.try_recv().is_err() && link.flights.is_empty());
    assert_eq!(
        (entity.running(), entity.tokens(), credits.running()),
        (0, 0, 0)
    );
}

#[test]
fn a_busy_link_gives_the_flight_back_and_keeps_room_for_cancels() {
    let (entity, credits) = (EntityShared::new(Arc::default()), Credits::new(u32::MAX));
    let (link, commands) = link();
    let mut started = Vec::new();
    loop {
        let mut request = request(&entity, 1);
        if start(&link, request.ticket.take().unwrap(), &entity, &credits).is_err() {
            break;
        }
        started.push(request);
    }
    assert!(started.len() >= 256);
    started
        .iter()
        .for_each(|request| request.whereabouts.cancel());
    assert!(!link.cut_token().is_cancelled(), "all cancels fitted");
    assert_eq!(commands.len(), 2 * started.len());
    assert_eq!((entity.running(), entity.tokens()), (0, 0));
}

/// What a test may do next. `late`: as an older attempt or generation would.
#[derive(Debug, Clone)]
enum Step {
    Begin(u32),
    Accept(usize, bool),
    Reject(usize, FailureKind, bool),
    Delta(usize, u32, bool),
    End(usize, u32, End, bool),
    Leave(usize),
    ReplicaLost,
    LinkLost,
    Sweep,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let at = 0usize..12;
    let kind = prop_oneof![
        Just(FailureKind::Unavailable),
        Just(FailureKind::BadRequest),
        Just(FailureKind::Internal)
    ];
    let ends = prop_oneof![
        2 => Just(End::Stop),
        1 => Just(engine_gone()),
        1 => Just(End::Error(Failure::new(FailureKind::Internal, "not finite"))),
    ];
    let late = || proptest::bool::weighted(0.2);
    let step = prop_oneof![
        4 => (1u32..4).prop_map(Step::Begin),
        5 => (at.clone(), late()).prop_map(|(at, late)| Step::Accept(at, late)),
        1 => (at.clone(), kind, late()).prop_map(|(at, kind, late)| Step::Reject(at, kind, late)),
        4 => (at.clone(), 0u32..5, late()).prop_map(|(at, candidate, late)| Step::Delta(at, candidate, late)),
        4 => (at.clone(), 0u32..5, ends, late())
            .prop_map(|(at, candidate, end, late)| Step::End(at, candidate, end, late)),
        1 => at.prop_map(Step::Leave),
        1 => Just(Step::ReplicaLost),
        1 => Just(Step::LinkLost),
        1 => Just(Step::Sweep),
    ];
    proptest::collection::vec(step, 1..120)
}

proptest! {
    #[test]
    fn every_request_ends_once_and_gives_back_what_it_took(steps in steps()) {
        let (entity, credits) = (EntityShared::new(Arc::default()), Credits::new(u32::MAX));
        let (mut link, mut commands) = link();
        let mut requests: Vec<(RequestId, u32, Request)> = Vec::new();
        let give = |link: &Arc<Link>, ticket: Ticket, generation: u64| {
            let permit = Permit::take(entity.clone(), credits.clone());
            if let Err(flight) = start_in(link, ticket, Generation(generation), permit) {
                flight.put_back(Duration::ZERO);
            }
        };
        let now = Instant::now();
        // Those whose worker sent more than their channels hold.
        let mut given_up: Vec<RequestId> = Vec::new();
        // What the worker was last told of each request, and whether it has accepted that.
        let mut told: HashMap<RequestId, (Start, bool)> = HashMap::new();
        let mut generation = 1;
        for step in steps {
            let known = |at: usize| requests.get(at).map(|(id, ..)| *id);
            let attempt = |id, late| told.get(&id).map_or(0, |(start, _)| start.attempt).wrapping_sub(u32::from(late));
            let mut step_of = |request: RequestId, late: bool, output: Output| {
                let of = told.get(&request).map_or(generation, |(start, _)| start.generation.0) - u64::from(late);
                let stepped = link.flights.step(ReplicaId(1), Generation(of), vec![output], now);
                if stepped.lost.is_empty() {
                    given_up.extend(&stepped.cancel);
                }
                stepped.follow_up(&link);
            };
            match step {
                Step::Begin(candidates) => {
                    let mut request = request(&entity, candidates);
                    let ticket = request.ticket.take().unwrap();
                    requests.push((ticket.request, candidates, request));
                    give(&link, ticket, generation);
                }
                Step::Accept(at, late) => if let Some(id) = known(at) {
                    link.flights.accepted(id, attempt(id, late), 3);
                    if let Some((_, accepted)) = told.get_mut(&id) { *accepted |= !late; }
                },
                Step::Reject(at, kind, late) => if let Some(id) = known(at) {
                    link.flights.rejected(id, attempt(id, late), Failure::new(kind, "no"));
                },
                Step::Delta(at, candidate, late) => if let Some(request) = known(at) {
                    let accepted = told.get(&request).is_some_and(|(_, accepted)| *accepted);
                    let text = if accepted && !late { "x" } else { "late" };
                    step_of(request, late, delta(request, candidate, text));
                },
                Step::End(at, candidate, why, late) => if let Some(request) = known(at) {
                    step_of(request, late, end(request, candidate, why));
                },
                Step::Leave(at) => if let Some((.., request)) = requests.get(at) { request.whereabouts.cancel() },
                Step::ReplicaLost => {
                    link.replica_lost(ReplicaId(1), "gone");
                    generation += 1;
                }
                Step::LinkLost => {
                    link.flights.close("gone");
                    (link, commands) = self::link();
                }
                Step::Sweep => link.sweep(now, Duration::from_secs(30)),
            }
            for ticket in entity.take_returned() { give(&link, ticket, generation); }
            while let Ok(command) = commands.try_recv() {
                if let Command::Start { start, .. } = command {
                    told.insert(start.request, (*start, false));
                }
            }
        }
        // The last link goes, again and again: nothing is left.
        for _ in 0..=ATTEMPTS_MAX {
            link.flights.close("the end");
            (link, commands) = self::link();
            for ticket in entity.take_returned() { give(&link, ticket, generation); }
        }
        prop_assert_eq!((entity.running(), entity.tokens(), credits.running()), (0, 0, 0));
        drop(commands);
        for (id, candidates, mut request) in requests {
            let left = matches!(*request.whereabouts.place(), Place::Cancelled);
            let mut ends = vec![0; candidates as usize];
            while let Ok(event) = request.events.try_recv() {
                match event {
                    GenerationEvent::End { candidate, end, .. } => {
                        ends[candidate as usize] += 1;
                        if let End::Error(failure) = end && failure.kind.retryable() {
                            prop_assert!(failure.message.ends_with("send the request again"), "{}", failure);
                        }
                    }
                    GenerationEvent::Delta(delta) => {
                        prop_assert_eq!(ends[delta.candidate as usize], 0, "output after the end");
                        prop_assert_eq!(delta.text, "x", "of an older attempt");
                    }
                    GenerationEvent::Prompt { .. } | GenerationEvent::Embedding(_) => {}
                }
            }
            prop_assert!(request.events.is_closed(), "somebody may still send");
            prop_assert!(ends.iter().all(|&ends| ends <= 1), "{:?}", ends);
            let refused = matches!(request.accepted.try_recv(), Ok(Err(_)));
            let ended = ends.iter().all(|&ends| ends == 1);
            prop_assert!(ended || refused || left || given_up.contains(&id), "{:?}", ends);
            prop_assert!(!(refused && ends.contains(&1)), "refused and ended");
        }
    }
}
