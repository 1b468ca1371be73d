//! The messages' bytes: released ones stay, and any others cost an error and nothing else.

use std::collections::BTreeSet;

use bytes::BytesMut;
use proptest::prelude::*;
use tokio_util::codec::{Decoder, Encoder};

use super::*;
use crate::request::{
    Chat, ChatMessage, Constraint, FailureKind, Prompt, Sampling, Stop, ToolCallDelta, ToolChoice,
    TopToken,
};
use crate::wire::codec::{decode, encode};
use crate::wire::frame::{BODY_BYTES_MAX, FRAME_VERSION, Frame, FrameCodec, FrameKind, MAGIC};
use crate::wire::link::Message;

mod samples;

use samples::{commands, reports};

/// Released bytes: if one of these changes, deployed peers break. Add a variant, and a line, instead.
const GOLDEN: &[(&str, &str)] = &[
    ("welcome", "000107"),
    (
        "load",
        "010702030102036e2f300b3132372e302e302e313a37036e2f310b3132372e302e302e313a37abababababababababababababababababababababababababababababababab00022f6d010264fb000240fb0008fd0000000002000000",
    ),
    (
        "load remote",
        "010702030102036e2f300b3132372e302e302e313a37036e2f310b3132372e302e302e313a37abababababababababababababababababababababababababababababababab01017204753a2f6d0276310103612f6201fb2c0101026162010264fb000240fb0008fd0000000002000000",
    ),
    ("unload", "0207020301"),
    (
        "start text",
        "0307fb2c01020301000548656c6c6f0000003f280000403f0000803e0000c03f000080bf000000400109000080c0fdffffffffffffffff0103454e4401020101100201030001010202612b010101000204050601fbe803",
    ),
    (
        "start tokens",
        "0307fb2c01020301010201fc701101000000003f280000403f0000803e0000c03f000080bf000000400109000080c0fdffffffffffffffff0103454e4401020101100201030001010202612b010101000204050601fbe803",
    ),
    (
        "start chat",
        "0307fb2c010203010201047573657202686901025b5d0102633101016601045b7b7d5d030166010000003f280000403f0000803e0000c03f000080bf000000400109000080c0fdffffffffffffffff0103454e4401020101100201030001010202612b010101000204050601fbe803",
    ),
    ("cancel", "04fb2c01"),
    ("ping", "0508"),
    ("refused", "06026e6f"),
    (
        "hello",
        "000102027333036e2f30060103677075fc000010000401fb2c01fc7011010003683a310102030103",
    ),
    ("shard loading", "01020301000772656164696e670afb2c01"),
    ("shard ready", "01020301010b01017401fb000864fc000010000c"),
    ("shard failed", "0102030102040178"),
    ("shard unloaded", "0102030103"),
    ("accepted", "02050124"),
    ("rejected", "030501000178"),
    (
        "step prompt",
        "040203010005017001fb2c0102c3a901000000bf01fb2d0101200000c0bf",
    ),
    (
        "step delta",
        "04020301010501010902686901fb2c0102c3a901000000bf01fb2d0101200000c0bf010101026331010166027b7d",
    ),
    ("step embedding", "040203010305020000003f000080bf"),
    ("end stop", "04020301020501092000"),
    ("end length", "04020301020501092001"),
    ("end deadline", "04020301020501092002"),
    ("end cancelled", "04020301020501092003"),
    ("end bad request", "04020301020501092004000178"),
    ("end too large", "04020301020501092004010178"),
    ("end overloaded", "04020301020501092004020178"),
    ("end unavailable", "04020301020501092004030178"),
    ("end internal", "04020301020501092004040178"),
    ("health", "0502030102030405060708090a0b020c0d01"),
    ("pong", "0608"),
    ("log build", "0702030101fb2c01000178"),
    ("log run", "0702030101fb2c01010178"),
];

/// Each variant's number on the wire. A variant that is new here needs a sample, too.
fn command_number(command: &Command) -> u8 {
    match command {
        Command::Welcome { .. } => 0,
        Command::Load { .. } => 1,
        Command::Unload { .. } => 2,
        Command::Start { .. } => 3,
        Command::Cancel { .. } => 4,
        Command::Ping { .. } => 5,
        Command::Refused { .. } => 6,
    }
}

fn report_number(report: &Report) -> u8 {
    match report {
        Report::Hello(_) => 0,
        Report::Shard { .. } => 1,
        Report::Accepted { .. } => 2,
        Report::Rejected { .. } => 3,
        Report::Step { .. } => 4,
        Report::Health { .. } => 5,
        Report::Pong { .. } => 6,
        Report::Log { .. } => 7,
    }
}

#[test]
fn released_messages_keep_their_bytes() {
    let commands = commands();
    let reports = reports();
    let encoded: Vec<(&str, String)> = commands
        .iter()
        .map(|(name, message)| (*name, hex::encode(encode(message).unwrap())))
        .chain(
            reports
                .iter()
                .map(|(name, message)| (*name, hex::encode(encode(message).unwrap()))),
        )
        .collect();
    let golden: Vec<(&str, String)> = GOLDEN
        .iter()
        .map(|(name, bytes)| (*name, (*bytes).to_owned()))
        .collect();
    assert_eq!(encoded, golden, "{encoded:#?}");
}

#[test]
fn every_variant_has_a_sample_that_survives_the_wire() {
    let mut numbers = BTreeSet::new();
    for (name, command) in commands() {
        let bytes = encode(&command).unwrap();
        assert_eq!(bytes[0], command_number(&command), "{name}");
        assert_eq!(decode::<Command>(&bytes).unwrap(), command, "{name}");
        numbers.insert(bytes[0]);
    }
    assert_eq!(numbers, (0..=6).collect());
    numbers.clear();
    for (name, report) in reports() {
        let bytes = encode(&report).unwrap();
        assert_eq!(bytes[0], report_number(&report), "{name}");
        assert_eq!(decode::<Report>(&bytes).unwrap(), report, "{name}");
        numbers.insert(bytes[0]);
    }
    assert_eq!(numbers, (0..=7).collect());
}

/// The bytes of all samples.
fn bodies() -> Vec<Vec<u8>> {
    let commands = commands()
        .into_iter()
        .map(|(_, message)| encode(&message).unwrap().to_vec());
    let reports = reports()
        .into_iter()
        .map(|(_, message)| encode(&message).unwrap().to_vec());
    commands.chain(reports).collect()
}

/// What a peer may make of a good body.
#[derive(Debug, Clone)]
enum Damage {
    Flip(prop::sample::Index, u8),
    Overwrite(prop::sample::Index, Vec<u8>),
    Insert(prop::sample::Index, Vec<u8>),
    Cut(prop::sample::Index),
}

fn damage() -> impl Strategy<Value = Damage> {
    let at = any::<prop::sample::Index>;
    // bincode's marks of longer numbers, with lengths that lie.
    let lie = prop_oneof![
        any::<u16>().prop_map(|n| [&[251], &n.to_le_bytes()[..]].concat()),
        any::<u32>().prop_map(|n| [&[252], &n.to_le_bytes()[..]].concat()),
        any::<u64>().prop_map(|n| [&[253], &n.to_le_bytes()[..]].concat()),
        prop::collection::vec(any::<u8>(), 1..20),
    ];
    prop_oneof![
        (at(), 0u8..8).prop_map(|(at, bit)| Damage::Flip(at, bit)),
        (at(), lie.clone()).prop_map(|(at, bytes)| Damage::Overwrite(at, bytes)),
        (at(), lie).prop_map(|(at, bytes)| Damage::Insert(at, bytes)),
        at().prop_map(Damage::Cut),
    ]
}

fn damaged(mut body: Vec<u8>, damages: Vec<Damage>) -> Vec<u8> {
    for damage in damages {
        if body.is_empty() {
            break;
        }
        let length = body.len();
        match damage {
            Damage::Flip(at, bit) => body[at.index(length)] ^= 1 << bit,
            Damage::Overwrite(at, bytes) => {
                let at = at.index(length);
                let end = (at + bytes.len()).min(length);
                body.splice(at..end, bytes);
            }
            Damage::Insert(at, bytes) => {
                let at = at.index(length);
                body.splice(at..at, bytes);
            }
            Damage::Cut(at) => body.truncate(at.index(length)),
        }
    }
    body
}

/// Puts a body through a frame and takes it for a message. A message that comes out is one that could be sent, in no
/// more bytes than came.
fn take<M: Message>(body: &[u8]) -> Result<(), TestCaseError> {
    let mut stream = BytesMut::new();
    let frame = Frame {
        kind: M::KIND,
        body: body.to_vec().into(),
    };
    FrameCodec::default().encode(frame, &mut stream).unwrap();
    let frame = FrameCodec::default().decode(&mut stream).unwrap().unwrap();
    prop_assert!(frame.kind == M::KIND && stream.is_empty());
    let Ok(message) = decode::<M>(&frame.body) else {
        return Ok(());
    };
    let again = encode(&message).unwrap();
    prop_assert!(again.len() <= body.len());
    let same = encode(&decode::<M>(&again).unwrap()).unwrap();
    prop_assert_eq!(again, same);
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn a_good_frame_around_anything_is_a_message_or_an_error(
        variant in 0u8..9,
        rest in prop::collection::vec(prop_oneof![0u8..4, any::<u8>()], 0..300),
    ) {
        let body = [&[variant], &rest[..]].concat();
        take::<Command>(&body)?;
        take::<Report>(&body)?;
    }

    #[test]
    fn a_damaged_message_is_a_message_or_an_error(
        at in any::<prop::sample::Index>(),
        damages in prop::collection::vec(damage(), 1..4),
    ) {
        let bodies = bodies();
        let body = damaged(bodies[at.index(bodies.len())].clone(), damages);
        take::<Command>(&body)?;
        take::<Report>(&body)?;
    }

    #[test]
    fn a_stream_of_damaged_frames_ends_in_an_error_or_waits(
        at in prop::collection::vec(any::<prop::sample::Index>(), 1..4),
        damages in prop::collection::vec(damage(), 0..4),
        kind in 0u8..2,
    ) {
        let bodies = bodies();
        let mut stream = Vec::new();
        for at in at {
            let body = &bodies[at.index(bodies.len())];
            stream.extend_from_slice(&MAGIC.to_le_bytes());
            stream.extend_from_slice(&[FRAME_VERSION, kind]);
            stream.extend_from_slice(&(body.len() as u32).to_le_bytes());
            stream.extend_from_slice(body);
        }
        let stream = damaged(stream, damages);
        let (mut source, mut codec) = (BytesMut::from(&stream[..]), FrameCodec::default());
        while let Ok(Some(frame)) = codec.decode(&mut source) {
            prop_assert!(frame.body.len() <= stream.len());
            match frame.kind {
                FrameKind::Command => drop(decode::<Command>(&frame.body)),
                FrameKind::Report => drop(decode::<Report>(&frame.body)),
            }
        }
    }
}

#[test]
fn every_beginning_of_a_message_is_an_error() {
    for body in bodies() {
        for end in 0..body.len() {
            let (cut, message) = (&body[..end], hex::encode(&body));
            let taken = (
                decode::<Command>(cut).is_ok(),
                decode::<Report>(cut).is_ok(),
            );
            // What begins one direction's message may be a whole one of the other's.
            assert!(taken != (true, true), "{message} cut after {end}");
            let whole = (decode::<Command>(&body), decode::<Report>(&body));
            assert!(!(taken.0 && whole.0.is_ok()), "{message} cut after {end}");
            assert!(!(taken.1 && whole.1.is_ok()), "{message} cut after {end}");
        }
    }
}

#[test]
fn the_longest_legal_prompt_fits_a_frame() {
    let generate = Generate::new(Prompt::Text("x".repeat(6 << 20)));
    let start = Start {
        request: RequestId(1),
        replica: ReplicaId(2),
        generation: Generation(3),
        attempt: 0,
        generate,
        resume: Vec::new(),
        deadline_ms: None,
    };
    let command = Command::Start {
        term: Term(1),
        start: Box::new(start),
    };
    let body = encode(&command).unwrap();
    assert!(body.len() < BODY_BYTES_MAX);
    assert_eq!(decode::<Command>(&body).unwrap(), command);
}
