use common::request::Delta;
use engine::request::TokenLogprob as EngineLogprob;
use proptest::prelude::*;

use super::*;
use crate::text::tests::text_model;
use crate::text::tools::Family;

const REQUEST: RequestId = RequestId(7);
const KEY: RequestKey = 1;

/// An answer over tiny-llama with one candidate, begun.
fn answers(
    stops: &[&str],
    prompt: PromptPart,
    emitted: &[u32],
    delivered: u64,
) -> (Answers, Vec<Output>) {
    let stops: Vec<String> = stops.iter().map(|s| (*s).to_owned()).collect();
    let mut answer = Answer::new(REQUEST, text_model("tiny-llama"), prompt);
    answer.add_candidate(Utf8Stream::default(), &stops, emitted, delivered);
    let mut answers = Answers::default();
    let opening = answers.begin(KEY, answer);
    (answers, opening)
}

fn ids(text: &str) -> Vec<u32> {
    text_model("tiny-llama")
        .tokenizer
        .encode(text, false)
        .unwrap()
}

fn token(index: u32, id: u32, logprob: bool) -> Event {
    let logprob = logprob.then(|| EngineLogprob {
        id,
        logprob: -0.5,
        top: vec![(id, -0.5), (2, -3.0)],
    });
    Event::Token {
        key: KEY,
        candidate: 0,
        index,
        id,
        logprob,
    }
}

fn ended(reason: EndReason) -> Event {
    Event::Ended {
        key: KEY,
        candidate: 0,
        reason,
        cached_tokens: 3,
    }
}

fn stop_token(logprob: Option<engine::request::TokenLogprob>) -> EndReason {
    EndReason::StopToken { id: 2, logprob }
}

/// Feeds tokens one step each and gives text, ids, log-probabilities' bytes, end and cancels.
fn run(
    answers: &mut Answers,
    tokens: &[u32],
    end: Option<EndReason>,
) -> (String, usize, Vec<u8>, Option<End>, usize) {
    let (mut text, mut id_count, mut bytes, mut last, mut cancels) =
        (String::new(), 0, Vec::new(), None, 0);
    let events = (0..)
        .zip(tokens)
        .map(|(index, &id)| token(index, id, true))
        .chain(end.map(ended));
    for event in events {
        let step = answers.step(vec![event]);
        cancels += step.cancel.len();
        for output in step.outputs {
            assert_eq!(output.request(), REQUEST);
            assert!(last.is_none(), "nothing follows an end");
            match output {
                Output::Delta {
                    delta:
                        Delta {
                            ids,
                            text: more,
                            logprobs,
                            ..
                        },
                    ..
                } => {
                    text.push_str(&more);
                    id_count += ids.len();
                    bytes.extend(logprobs.into_iter().flat_map(|logprob| logprob.bytes));
                }
                Output::End { end, .. } => last = Some(end),
                Output::Prompt { .. } | Output::Embedding { .. } => panic!("only text is expected"),
            }
        }
    }
    (text, id_count, bytes, last, cancels)
}

#[test]
fn text_ids_and_logprobs_come_in_step_and_end_once() {
    let (mut answers, opening) = answers(&[], PromptPart::default(), &[], 0);
    assert_eq!(opening, []);
    let tokens = ids("naïve 한국");
    let (text, id_count, bytes, end, cancels) = run(&mut answers, &tokens, Some(stop_token(None)));
    assert_eq!(
        (text.as_str(), id_count, end, cancels),
        (" naïve 한국", tokens.len(), Some(End::Stop), 0)
    );
    assert_eq!(bytes, text.as_bytes());
    assert_eq!(
        answers.step(vec![ended(EndReason::Length)]),
        Step::default(),
        "the request is forgotten"
    );
}

#[test]
fn the_token_that_ends_an_answer_has_a_log_probability_and_no_text() {
    let (mut answers, _) = answers(&["never"], PromptPart::default(), &[], 0);
    let tokens = ids("hello");
    let Event::Token { logprob, .. } = token(0, 2, true) else {
        unreachable!("a token is a token");
    };
    let (text, id_count, bytes, ..) = run(&mut answers, &tokens, Some(stop_token(logprob)));
    assert_eq!((text.as_str(), id_count), (" hello", tokens.len()));
    assert_eq!(bytes, b" hello</s>");
}

#[test]
fn a_stop_string_ends_the_answer_here_and_in_the_engine() {
    let (mut answers, _) = answers(&["lo wo"], PromptPart::default(), &[], 0);
    let (text, _, bytes, end, cancels) = run(&mut answers, &ids("hello world and more"), None);
    assert_eq!((text.as_str(), end, cancels), (" hel", Some(End::Stop), 1));
    assert!(
        " hel".as_bytes().starts_with(&bytes),
        "only whole tokens of the shown text: {bytes:?}"
    );
}

#[test]
fn text_held_back_is_part_of_an_answer_that_ends_and_not_of_one_that_goes_on_elsewhere() {
    for (reason, expected) in [
        (EndReason::Length, " hello"),
        (EndReason::Deadline, " hello"),
        (EndReason::Error(SequenceError::Engine("lost".into())), " h"),
    ] {
        let (mut answers, _) = answers(&["ello!"], PromptPart::default(), &[], 0);
        assert_eq!(
            run(&mut answers, &ids("hello"), Some(reason.clone())).0,
            expected,
            "{reason:?}"
        );
    }
}

#[test]
fn an_unfinished_character_at_the_end_is_one_replacement() {
    let (mut answers, _) = answers(&[], PromptPart::default(), &[], 0);
    let tokens = ids("한");
    let (text, ..) = run(
        &mut answers,
        &tokens[..tokens.len() - 1],
        Some(EndReason::Length),
    );
    assert_eq!(text, " \u{fffd}");
}

#[test]
fn a_resumed_answer_sends_what_was_not_delivered_and_nothing_twice() {
    let whole = ids("hello brave new world, 한국어!");
    let text = " hello brave new world, 한국어!";
    for split in 0..=whole.len() {
        let before = {
            let (mut answers, _) = answers(&["!!"], PromptPart::default(), &[], 0);
            run(&mut answers, &whole[..split], None).0
        };
        // The client may have read less than was sent.
        for delivered in before
            .char_indices()
            .map(|(at, _)| at)
            .chain([before.len()])
        {
            let (mut answers, opening) = answers(
                &["!!"],
                PromptPart::default(),
                &whole[..split],
                delivered as u64,
            );
            let mut resumed = String::new();
            for output in opening {
                let Output::Delta { delta, .. } = output else {
                    panic!("{output:?}")
                };
                resumed.push_str(&delta.text);
            }
            resumed.push_str(&run(&mut answers, &whole[split..], Some(EndReason::Length)).0);
            assert_eq!(resumed, text[delivered..], "{split} {delivered}");
        }
    }
}

#[test]
fn a_resumed_answer_whose_stop_string_is_complete_ends_at_once() {
    let (mut answers, opening) = answers(&["lo"], PromptPart::default(), &ids("hello"), 0);
    let tokens = ids("hello").len() as u32;
    let end = Output::End {
        request: REQUEST,
        candidate: 0,
        output_tokens: tokens,
        cached_tokens: 0,
        end: End::Stop,
    };
    let text = Delta {
        candidate: 0,
        text: " hel".into(),
        ..Delta::default()
    };
    assert_eq!(
        opening,
        [
            Output::Delta {
                request: REQUEST,
                delta: text
            },
            end
        ]
    );
    assert!(answers.forget().is_empty(), "nothing is left to do");
}

#[test]
fn echo_comes_at_once_or_with_the_prompts_logprobs() {
    let echo = PromptPart {
        echo: Some("Hello".into()),
        logprobs: false,
        first: 1,
    };
    let (_, opening) = answers(&[], echo, &[], 0);
    assert_eq!(
        opening,
        [Output::Prompt {
            request: REQUEST,
            text: "Hello".into(),
            tokens: vec![]
        }]
    );
    let echo = PromptPart {
        echo: Some("Hello".into()),
        logprobs: true,
        first: 1,
    };
    let (mut answers, opening) = answers(&[], echo, &[], 0);
    assert_eq!(opening, []);
    let scored = EngineLogprob {
        id: 998,
        logprob: -1.0,
        top: vec![],
    };
    let step = answers.step(vec![Event::PromptLogprobs {
        key: KEY,
        tokens: vec![None, Some(scored)],
    }]);
    let Output::Prompt { text, tokens, .. } = &step.outputs[0] else {
        panic!("{step:?}")
    };
    assert_eq!(
        (text.as_str(), tokens[0].bytes.as_slice(), tokens[0].logprob),
        ("Hello", &b"<s>"[..], None)
    );
    assert_eq!(
        (tokens[1].bytes.as_slice(), tokens[1].logprob),
        (&b" Hello"[..], Some(-1.0))
    );
}

#[test]
fn logprobs_of_a_prompt_that_do_not_fit_a_frame_fail_the_request_alone() {
    let part = PromptPart {
        echo: None,
        logprobs: true,
        first: 1,
    };
    let (mut answers, _) = answers(&[], part, &[], 0);
    let scored = EngineLogprob {
        id: 998,
        logprob: -1.0,
        top: vec![(998, -1.0); 20],
    };
    let step = answers.step(vec![Event::PromptLogprobs {
        key: KEY,
        tokens: vec![Some(scored); 20_000],
    }]);
    let [
        Output::End {
            end: End::Error(failure),
            ..
        },
    ] = &step.outputs[..]
    else {
        panic!("{step:?}")
    };
    assert!(failure.message.contains("20000 tokens"), "{failure}");
    assert_eq!(
        (failure.kind, step.cancel),
        (FailureKind::BadRequest, vec![(KEY, 0)])
    );
}

#[test]
fn a_candidate_that_meets_a_stop_string_is_cancelled_alone() {
    let mut answer = Answer::new(REQUEST, text_model("tiny-llama"), PromptPart::default());
    for _ in 0..2 {
        answer.add_candidate(Utf8Stream::default(), &["lo".to_owned()], &[], 0);
    }
    let mut answers = Answers::default();
    answers.begin(KEY, answer);
    assert_eq!(answers.key(REQUEST), Some(KEY));
    let hello = ids("hello");
    let events = (0..)
        .zip(hello)
        .map(|(index, id)| token(index, id, false))
        .collect();
    let step = answers.step(events);
    let ends = |step: &Step| {
        step.outputs
            .iter()
            .filter(|o| matches!(o, Output::End { .. }))
            .count()
    };
    assert_eq!((step.cancel.as_slice(), ends(&step)), (&[(KEY, 0)][..], 1));
    let late = Event::Ended {
        key: KEY,
        candidate: 0,
        reason: EndReason::Cancelled,
        cached_tokens: 0,
    };
    assert_eq!(
        answers.step(vec![late]),
        Step::default(),
        "its end is told already"
    );
    let last = Event::Ended {
        key: KEY,
        candidate: 1,
        reason: EndReason::Length,
        cached_tokens: 0,
    };
    let step = answers.step(vec![last]);
    assert_eq!((step.cancel.len(), ends(&step)), (0, 1));
    assert_eq!(answers.key(REQUEST), None);
}

/// The shown text of a whole: up to the stop string that is complete first, the longest of those.
fn naive(text: &str, stops: &[String]) -> String {
    let ends = text
        .char_indices()
        .map(|(at, c)| &text[..at + c.len_utf8()]);
    let mut matches = ends.filter_map(|before| {
        let longest = stops
            .iter()
            .filter(|s| !s.is_empty() && before.ends_with(s.as_str()))
            .map(String::len)
            .max()?;
        Some(before[..before.len() - longest].to_owned())
    });
    matches.next().unwrap_or_else(|| text.to_owned())
}

proptest! {
    /// Whatever ids come, and wherever an earlier attempt was cut: the text is that of the whole, each byte once.
    #[test]
    fn streamed_answers_equal_the_whole_however_they_are_cut(
        ids in prop::collection::vec(prop_oneof![3u32..2048, 131u32..260], 1..40),
        stop_at in any::<prop::sample::Index>(),
        stop_len in 0usize..6,
        cut in any::<prop::sample::Index>(),
        delivered in any::<prop::sample::Index>(),
    ) {
        let model = text_model("tiny-llama");
        let bytes: Vec<u8> = ids.iter().flat_map(|&id| model.tokenizer.vocabulary().text(id)).copied().collect();
        let whole = String::from_utf8_lossy(&bytes).into_owned();
        let characters: Vec<char> = whole.chars().collect();
        let from = stop_at.index(characters.len().max(1)).min(characters.len());
        let stop: String = characters[from..].iter().take(stop_len).collect();
        let expected = naive(&whole, std::slice::from_ref(&stop));

        let (mut straight, _) = answers(&[&stop], PromptPart::default(), &[], 0);
        let (text, _, bytes, _, _) = run(&mut straight, &ids, Some(EndReason::Length));
        prop_assert_eq!(&text, &expected);
        let broken = whole.contains(char::REPLACEMENT_CHARACTER);
        prop_assert!(broken || text.as_bytes().starts_with(&bytes), "log-probabilities of text that is not shown");

        let cut = cut.index(ids.len());
        let (mut before, _) = answers(&[&stop], PromptPart::default(), &[], 0);
        let (shown, _, _, end, _) = run(&mut before, &ids[..cut], None);
        prop_assume!(end.is_none());
        let borders: Vec<usize> = shown.char_indices().map(|(at, _)| at).chain([shown.len()]).collect();
        let delivered = borders[delivered.index(borders.len())];
        let (mut after, opening) = answers(&[&stop], PromptPart::default(), &ids[..cut], delivered as u64);
        let mut resumed: String = opening.into_iter().filter_map(|output| match output {
            Output::Delta { delta, .. } => Some(delta.text),
            _ => None,
        }).collect();
        resumed.push_str(&run(&mut after, &ids[cut..], Some(EndReason::Length)).0);
        prop_assert_eq!(&resumed, &expected[delivered..]);
    }
}

#[test]
fn calls_of_tools_come_beside_the_text_and_are_not_part_of_it() {
    let text = text_model("tiny-llama");
    let called =
        ids("I look. <tool_call>\n{\"name\": \"f\", \"arguments\": {\"a\": 1}}\n</tool_call>");
    let half = called.len() / 2;
    for (emitted, delivered) in [(&called[..0], 0), (&called[..half], 8)] {
        let mut answer = Answer::new(REQUEST, text.clone(), PromptPart::default());
        answer.find_calls(CallParser::new(Family::Hermes, ["f".to_owned()], false));
        answer.add_candidate(Utf8Stream::default(), &[], emitted, delivered);
        let mut answers = Answers::default();
        let mut outputs = answers.begin(KEY, answer);
        let rest = &called[emitted.len()..];
        let events = (0..).zip(rest).map(|(index, &id)| token(index, id, false));
        for event in events.chain([ended(stop_token(None))]) {
            outputs.extend(answers.step(vec![event]).outputs);
        }
        let (mut shown, mut calls) = (String::new(), Vec::new());
        for output in outputs {
            if let Output::Delta { delta, .. } = output {
                shown.push_str(&delta.text);
                calls.extend(delta.tool_calls);
            }
        }
        assert_eq!(shown, if emitted.is_empty() { " I look." } else { "" });
        assert_eq!(calls[0].name.as_deref(), Some("f"));
        assert_eq!(calls[1].arguments, "{\"a\": 1}");
        assert_eq!(calls.len(), 2);
    }
}

#[test]
fn what_a_stop_string_cuts_loses_nothing_in_front_of_it() {
    let mut answer = Answer::new(REQUEST, text_model("tiny-llama"), PromptPart::default());
    answer.find_calls(CallParser::new(Family::Hermes, ["f".to_owned()], false));
    answer.add_candidate(Utf8Stream::default(), &["END".to_owned()], &[], 0);
    let mut answers = Answers::default();
    answers.begin(KEY, answer);
    let (text, ..) = run(&mut answers, &ids("a <tool_call>{\"name\" END"), None);
    assert_eq!(text, " a <tool_call>{\"name\" ");
}
