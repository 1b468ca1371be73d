use common::request::{Failure, FailureKind};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::super::account::tests::{Ledger, account};
use super::super::tests::fake::{delta, end, generation};
use super::*;

fn later() -> Deadline {
    Deadline {
        at: Instant::now() + Duration::from_secs(60),
        allowed_ms: 60_000,
    }
}

async fn fault(events: Vec<GenerationEvent>) -> Fault {
    let mut parts = Parts::new(
        vec![generation(3, events)],
        &[2],
        false,
        later(),
        account(&Arc::default()),
    );
    collect(&mut parts).await.unwrap_err()
}

#[tokio::test]
async fn choices_are_numbered_by_prompt_then_candidate() {
    let answer = |name: &str| {
        let text = |candidate: u32| delta(candidate, &format!("{name}{candidate}"));
        vec![
            text(1),
            text(0),
            end(0, 1, End::Stop),
            end(1, 2, End::Length),
        ]
    };
    let generations = vec![generation(3, answer("a")), generation(4, answer("b"))];
    let mut parts = Parts::new(
        generations,
        &[2, 2],
        false,
        later(),
        account(&Arc::default()),
    );
    let choices = collect(&mut parts).await.unwrap();
    let texts: Vec<&str> = choices.iter().map(|choice| choice.text.as_str()).collect();
    assert_eq!(texts, ["a0", "a1", "b0", "b1"]);
    let finishes: Vec<Finish> = choices.iter().filter_map(|choice| choice.finish).collect();
    assert_eq!(
        finishes,
        [Finish::Stop, Finish::Length, Finish::Stop, Finish::Length]
    );
    assert_eq!(
        parts.usage(),
        Usage {
            prompt_tokens: 7,
            completion_tokens: 6
        }
    );
}

#[tokio::test]
async fn a_prompt_stands_in_front_of_each_of_its_choices() {
    let prompt = GenerationEvent::Prompt {
        text: "p:".into(),
        tokens: Vec::new(),
    };
    let events = vec![
        prompt,
        delta(0, "x"),
        delta(1, "y"),
        end(0, 1, End::Stop),
        end(1, 1, End::Stop),
    ];
    let mut parts = Parts::new(
        vec![generation(1, events)],
        &[2],
        false,
        later(),
        account(&Arc::default()),
    );
    let choices = collect(&mut parts).await.unwrap();
    assert_eq!(
        (choices[0].text.as_str(), choices[1].text.as_str()),
        ("p:x", "p:y")
    );
}

#[tokio::test]
async fn every_bad_end_is_a_fault_of_its_kind() {
    let failed = |kind| End::Error(Failure::new(kind, "why"));
    let table = [
        (End::Deadline, "DEADLINE_EXCEEDED"),
        (End::Cancelled, "TEMPORARILY_UNAVAILABLE"),
        (failed(FailureKind::BadRequest), "BAD_REQUEST"),
        (failed(FailureKind::TooLarge), "BAD_REQUEST"),
        (failed(FailureKind::Overloaded), "REQUEST_LIMIT_EXCEEDED"),
        (failed(FailureKind::Unavailable), "TEMPORARILY_UNAVAILABLE"),
        (failed(FailureKind::Internal), "INTERNAL_ERROR"),
    ];
    for (bad, code) in table {
        let events = vec![delta(0, "x"), end(0, 1, End::Stop), end(1, 1, bad)];
        assert_eq!(fault(events).await.code, code);
    }
}

#[tokio::test]
async fn an_answer_that_breaks_the_rules_is_a_fault_and_no_panic() {
    let broken_off = fault(vec![delta(0, "x"), end(0, 1, End::Stop)]).await;
    assert_eq!(broken_off.message, "the answer broke off before its end");
    for events in [
        vec![delta(2, "x")],
        vec![end(u32::MAX, 0, End::Stop)],
        vec![end(0, 1, End::Stop), delta(0, "x")],
        vec![end(0, 1, End::Stop), end(0, 1, End::Stop)],
    ] {
        assert_eq!(fault(events).await.code, "INTERNAL_ERROR");
    }
}

#[tokio::test]
async fn what_the_deadline_cuts_is_kept_when_asked_for() {
    let events = vec![delta(0, "half"), end(0, 1, End::Deadline)];
    let mut parts = Parts::new(
        vec![generation(1, events)],
        &[1],
        true,
        later(),
        account(&Arc::default()),
    );
    let choices = collect(&mut parts).await.unwrap();
    assert_eq!(
        (choices[0].text.as_str(), choices[0].finish),
        ("half", Some(Finish::Length))
    );
}

#[tokio::test]
async fn a_cluster_that_says_nothing_is_given_up() {
    let (sender, events) = tokio::sync::mpsc::channel(1);
    let guard = crate::api::CancelGuard::new(|| {});
    let past = Deadline {
        at: Instant::now() - DEADLINE_GRACE,
        allowed_ms: 5,
    };
    let silent = Generation {
        prompt_tokens: 1,
        events,
        guard,
    };
    let mut parts = Parts::new(vec![silent], &[1], false, past, account(&Arc::default()));
    assert_eq!(
        collect(&mut parts).await.unwrap_err().code,
        "DEADLINE_EXCEEDED"
    );
    drop(sender);
}

#[tokio::test]
async fn a_fault_of_one_prompt_cancels_the_others_at_once() {
    let cancelled = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&cancelled);
    let (sender, events) = tokio::sync::mpsc::channel(1);
    let guard = crate::api::CancelGuard::new(move || {
        count.fetch_add(1, Ordering::SeqCst);
    });
    let waiting = Generation {
        prompt_tokens: 1,
        events,
        guard,
    };
    let failing = generation(1, vec![end(0, 0, End::Cancelled)]);
    let mut parts = Parts::new(
        vec![waiting, failing],
        &[1, 1],
        false,
        later(),
        account(&Arc::default()),
    );
    assert!(parts.next().await.unwrap().is_err());
    assert_eq!(cancelled.load(Ordering::SeqCst), 1);
    assert!(parts.next().await.is_none());
    drop(sender);
}

#[tokio::test]
async fn what_came_before_a_cancel_is_counted_read_or_not() {
    let ledger = Arc::new(Ledger::default());
    let events = vec![
        delta(0, "a"),
        delta(1, "b"),
        delta(0, "c"),
        end(0, 2, End::Stop),
        delta(1, "d"),
    ];
    let mut parts = Parts::new(
        vec![generation(7, events)],
        &[2],
        false,
        later(),
        account(&ledger),
    );
    parts.account.accepted("x".into(), 7);
    parts.next().await.unwrap().unwrap();
    drop(parts);
    let record = ledger.only();
    assert_eq!((record.prompt_tokens, record.output_tokens), (7, 4));
    assert_eq!(
        (record.status, record.served_entity.as_deref()),
        (499, Some("x"))
    );
}
