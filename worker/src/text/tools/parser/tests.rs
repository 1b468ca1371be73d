use proptest::prelude::*;

use super::*;

/// A call's name and arguments.
type Call = (String, String);

fn parser(family: Family) -> CallParser {
    CallParser::new(family, ["f".to_owned(), "get_weather".to_owned()], false)
}

/// The text that is no call, and the calls.
fn gathered(parsed: &Parsed) -> (String, Vec<Call>) {
    let mut calls: Vec<Call> = Vec::new();
    for delta in &parsed.calls {
        match &delta.name {
            Some(name) => {
                assert_eq!(delta.index as usize, calls.len());
                assert!(delta.id.is_some() && delta.arguments.is_empty());
                calls.push((name.clone(), String::new()));
            }
            None => {
                assert_eq!((delta.index as usize + 1, &delta.id), (calls.len(), &None));
                calls.last_mut().unwrap().1.push_str(&delta.arguments);
            }
        }
    }
    (parsed.text.clone(), calls)
}

fn in_pieces(mut parser: CallParser, text: &str, cut: usize) -> (String, Vec<Call>) {
    let mut parsed = Parsed::default();
    let characters: Vec<char> = text.chars().collect();
    for piece in characters.chunks(cut) {
        parser.push(&piece.iter().collect::<String>(), &mut parsed);
    }
    parser.finish(&mut parsed);
    gathered(&parsed)
}

fn whole(family: Family, text: &str) -> (String, Vec<Call>) {
    in_pieces(parser(family), text, usize::MAX)
}

fn call(name: &str, arguments: &str) -> Call {
    (name.to_owned(), arguments.to_owned())
}

const F: &str = r#"{"name": "f", "arguments": {"a": 1}}"#;
const G: &str = r#"{"name": "get_weather", "arguments": {"city": "Paris, {FR}"}}"#;

#[test]
fn each_familys_calls_come_out_and_the_text_around_them_stays() {
    let both = [
        call("f", r#"{"a": 1}"#),
        call("get_weather", r#"{"city": "Paris, {FR}"}"#),
    ];
    let p = F.replace("arguments", "parameters");
    let table = [
        (
            Family::Hermes,
            format!("<tool_call>\n{F}\n</tool_call>"),
            "",
            1,
        ),
        (
            Family::Hermes,
            format!("I look.\n\n<tool_call>{F}</tool_call>\n<tool_call>\n{G}\n</tool_call>\n"),
            "I look.",
            2,
        ),
        (
            Family::Hermes,
            format!("a <tool_call>{F}</tool_call> b"),
            "a b",
            1,
        ),
        (Family::Hermes, format!("<tool_call>{F}"), "", 1),
        (Family::Hermes, format!("<tool_call>{F}</tool"), "", 1),
        (Family::Mistral, format!("[TOOL_CALLS][{F}, {G}]"), "", 2),
        (
            Family::Mistral,
            format!("Well: [TOOL_CALLS] [{F}]"),
            "Well:",
            1,
        ),
        (Family::Mistral, format!("[TOOL_CALLS][{F}, "), "", 1),
        (Family::Llama, p.clone(), "", 1),
        (
            Family::Llama,
            format!(
                "\n<|python_tag|>{p}; {}",
                G.replace("arguments", "parameters")
            ),
            "",
            2,
        ),
        (Family::Llama, format!("{p}\n{G}"), "", 2),
    ];
    for (family, text, expected, calls) in table {
        for cut in [1, 3, usize::MAX] {
            let found = in_pieces(parser(family), &text, cut);
            assert_eq!(
                found,
                (expected.to_owned(), both[..calls].to_vec()),
                "{text}"
            );
        }
    }
}

#[test]
fn what_is_no_call_comes_out_as_it_was() {
    for (family, text) in [
        (
            Family::Hermes,
            "<tool_call>\nnot json\n</tool_call>".to_owned(),
        ),
        (
            Family::Hermes,
            r#"<tool_call>{"name": "unknown", "arguments": {}}</tool_call>"#.to_owned(),
        ),
        (Family::Hermes, format!("<tool_call>\n{}", &F[..20])),
        (Family::Hermes, "a < b and <tool_ca".to_owned()),
        (Family::Hermes, F.to_owned()),
        (Family::Hermes, "  \n ".to_owned()),
        (Family::Mistral, format!("[TOOL_CALLS]{F}")),
        (
            Family::Mistral,
            r#"[TOOL_CALLS][{"name": "f", "arguments": {]}]"#.to_owned(),
        ),
        (Family::Llama, format!("Sure: {F}")),
        (Family::Llama, r#"{"answer": 42}"#.to_owned()),
        (Family::Llama, "<|python_tag|>print(1)".to_owned()),
    ] {
        for cut in [1, 2, usize::MAX] {
            assert_eq!(
                in_pieces(parser(family), &text, cut),
                (text.clone(), vec![]),
                "{family:?}"
            );
        }
    }
}

#[test]
fn a_call_behind_a_broken_one_is_found() {
    let text = format!(r#"<tool_call>{{"name": <tool_call>{F}</tool_call>"#);
    assert_eq!(
        whole(Family::Hermes, &text),
        (
            r#"<tool_call>{"name":"#.into(),
            vec![call("f", r#"{"a": 1}"#)]
        )
    );
    let text = format!("[TOOL_CALLS][{F}, no]");
    assert_eq!(
        whole(Family::Mistral, &text),
        (", no]".into(), vec![call("f", r#"{"a": 1}"#)])
    );
}

#[test]
fn a_call_without_arguments_has_an_empty_object() {
    let text = r#"<tool_call>{"name": "f"}</tool_call>"#;
    assert_eq!(
        whole(Family::Hermes, text),
        (String::new(), vec![call("f", "{}")])
    );
}

#[test]
fn one_that_trusts_tells_arguments_while_they_come() {
    let mut parser = parser(Family::Hermes).trusting();
    let mut told = Vec::new();
    for piece in [
        "<tool_call>\n{\"name\": \"f\", \"argu",
        "ments\": {\"a\"",
        ": 1",
        "}}",
        "\n</tool_call>",
    ] {
        let mut parsed = Parsed::default();
        parser.push(piece, &mut parsed);
        assert_eq!(parsed.text, "");
        told.push(
            parsed
                .calls
                .into_iter()
                .map(|delta| (delta.name, delta.arguments))
                .collect::<Vec<_>>(),
        );
    }
    let more = |text: &str| vec![(None, text.to_owned())];
    let begun = vec![
        (Some("f".to_owned()), String::new()),
        (None, "{\"a\"".to_owned()),
    ];
    assert_eq!(told, [vec![], begun, more(": 1"), more("}"), vec![]]);
    let mut cut = self::parser(Family::Hermes).trusting();
    let mut parsed = Parsed::default();
    cut.push(&format!("<tool_call>{}", &F[..F.len() - 3]), &mut parsed);
    cut.finish(&mut parsed);
    assert_eq!(
        gathered(&parsed),
        (String::new(), vec![call("f", "{\"a\": ")])
    );
}

#[test]
fn a_single_call_ends_the_answer() {
    let mut parser = CallParser::new(Family::Hermes, ["f".to_owned()], true);
    let mut parsed = Parsed::default();
    parser.push(&format!("<tool_call>{F}"), &mut parsed);
    assert!(parser.is_over());
    parser.push("</tool_call> and more", &mut parsed);
    parser.finish(&mut parsed);
    assert_eq!(
        gathered(&parsed),
        (String::new(), vec![call("f", r#"{"a": 1}"#)])
    );
}

#[test]
fn ids_are_what_templates_take() {
    let id = |family| call_id(family);
    assert!(
        id(Family::Mistral).len() == 9 && id(Family::Mistral).chars().all(char::is_alphanumeric)
    );
    assert!(id(Family::Hermes).starts_with("call_") && id(Family::Llama).len() <= 64);
    assert_ne!(id(Family::Hermes), id(Family::Hermes));
}

#[test]
fn long_runs_of_blanks_and_marks_cost_no_more_than_their_length() {
    for text in [
        " ".repeat(200_000),
        "<tool_call>".repeat(20_000),
        r#"<tool_call>{"name": ""#.repeat(10_000),
        "<tool_call>{".repeat(10_000),
    ] {
        let began = std::time::Instant::now();
        assert_eq!(whole(Family::Hermes, &text), (text, vec![]));
        assert!(
            began.elapsed() < std::time::Duration::from_secs(5),
            "{:?}",
            began.elapsed()
        );
    }
}

/// Pieces of which calls are made, whole and broken.
fn piece() -> impl Strategy<Value = &'static str> {
    prop::sample::select(vec![
        "<tool_call>",
        "</tool_call>",
        "[TOOL_CALLS]",
        "<|python_tag|>",
        "<tool",
        "[",
        "]",
        ", ",
        "; ",
        "\n",
        " ",
        "x",
        "é",
        "{",
        "}",
        F,
        G,
        r#"{"name": "f", "parameters": {}}"#,
        r#"{"name": "f"}"#,
        r#"{"name": "f", "arguments": {"#,
        r#"{"name": "no", "arguments": {}}"#,
        "\"",
    ])
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(3000))]
    #[test]
    fn any_cut_gives_the_same_calls_and_text(pieces in prop::collection::vec(piece(), 0..12), cut in 1usize..9, family in 0usize..3, trusting: bool) {
        let family = [Family::Hermes, Family::Mistral, Family::Llama][family];
        let text = pieces.concat();
        let new = || if trusting { parser(family).trusting() } else { parser(family) };
        let at_once = in_pieces(new(), &text, usize::MAX);
        if !trusting {
            prop_assert_eq!(in_pieces(new(), &text, cut), at_once.clone());
            for (name, arguments) in &at_once.1 {
                prop_assert!(name == "f" || name == "get_weather");
                prop_assert!(serde_json::from_str::<serde_json::Map<String, serde_json::Value>>(arguments).is_ok());
            }
        }
        if at_once.1.is_empty() {
            prop_assert_eq!(at_once.0, text);
        }
    }
}
