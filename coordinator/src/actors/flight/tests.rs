//! Flights without actors: every request ends once, whatever happens in whatever order.

use common::ids::{BootId, Term, WorkerId};
use common::request::{Delta, Prompt};
use common::wire::message::Command;
use proptest::prelude::*;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use super::*;
use crate::actors::meters::Meters;
use crate::actors::permit::{Booking, Credits, EntityShared};
use crate::actors::replica::start_of;
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
    link.start(Flight::new(ticket, ReplicaId(1), permit), |flight| {
        start_of(flight, ReplicaId(1), common::ids::Generation(1))
    })
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

/// What a test may do next.
#[derive(Debug, Clone)]
enum Step {
    Begin(u32),
    Accept(usize),
    Reject(usize, FailureKind),
    Delta(usize, u32),
    End(usize, u32),
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
    let step = prop_oneof![
        4 => (1u32..4).prop_map(Step::Begin),
        3 => at.clone().prop_map(Step::Accept),
        1 => (at.clone(), kind).prop_map(|(at, kind)| Step::Reject(at, kind)),
        4 => (at.clone(), 0u32..5).prop_map(|(at, candidate)| Step::Delta(at, candidate)),
        4 => (at.clone(), 0u32..5).prop_map(|(at, candidate)| Step::End(at, candidate)),
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
        let give = |link: &Arc<Link>, ticket: Ticket| if let Err(flight) = start(link, ticket, &entity, &credits) {
            flight.put_back(Duration::ZERO);
        };
        let now = Instant::now();
        // Those whose worker sent more than their channels hold.
        let mut given_up: Vec<RequestId> = Vec::new();
        for step in steps {
            let known = |at: usize| requests.get(at).map(|(id, ..)| *id);
            match step {
                Step::Begin(candidates) => {
                    let mut request = request(&entity, candidates);
                    let ticket = request.ticket.take().unwrap();
                    requests.push((ticket.request, candidates, request));
                    give(&link, ticket);
                }
                Step::Accept(at) => if let Some(id) = known(at) { link.flights.accepted(id, 3) },
                Step::Reject(at, kind) => if let Some(id) = known(at) { link.flights.rejected(id, Failure::new(kind, "no")) },
                Step::Delta(at, candidate) => if let Some(request) = known(at) {
                    let delta = Delta { candidate, ids: vec![1], text: "x".into(), logprobs: vec![] };
                    given_up.extend(link.flights.step(vec![Output::Delta { request, delta }], now));
                },
                Step::End(at, candidate) => if let Some(request) = known(at) {
                    let output = Output::End { request, candidate, output_tokens: 1, cached_tokens: 0, end: End::Stop };
                    given_up.extend(link.flights.step(vec![output], now));
                },
                Step::Leave(at) => if let Some((.., request)) = requests.get(at) { request.whereabouts.cancel() },
                Step::ReplicaLost => link.replica_lost(ReplicaId(1), "gone"),
                Step::LinkLost => {
                    link.flights.close("gone");
                    (link, commands) = self::link();
                }
                Step::Sweep => link.sweep(now, Duration::from_secs(30)),
            }
            while commands.try_recv().is_ok() {}
            for ticket in entity.take_returned() { give(&link, ticket); }
        }
        // The last link goes, again and again: nothing is left.
        for _ in 0..=ATTEMPTS_MAX {
            link.flights.close("the end");
            (link, commands) = self::link();
            for ticket in entity.take_returned() { give(&link, ticket); }
        }
        prop_assert_eq!((entity.running(), entity.tokens(), credits.running()), (0, 0, 0));
        drop(commands);
        for (id, candidates, mut request) in requests {
            let left = matches!(*request.whereabouts.place(), Place::Cancelled);
            let mut ends = vec![0; candidates as usize];
            while let Ok(event) = request.events.try_recv() {
                match event {
                    GenerationEvent::End { candidate, .. } => ends[candidate as usize] += 1,
                    GenerationEvent::Delta(delta) => prop_assert_eq!(ends[delta.candidate as usize], 0, "output after the end"),
                    GenerationEvent::Prompt { .. } => {}
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
