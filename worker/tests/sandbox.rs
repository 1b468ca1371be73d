//! Chat templates in the process that renders them: the worker's own program.

use std::path::Path;
use std::time::{Duration, Instant};

use common::request::{Chat, ChatMessage};
use worker::text::Render;
use worker::text::chat::{ChatError, TemplateSource};
use worker::text::sandbox::Sandbox;

fn sandbox(template: &str) -> Sandbox {
    let template = TemplateSource {
        text: Some(template.into()),
        bos: Some("<s>".into()),
        eos: None,
        tool_use: None,
    };
    Sandbox::new(Path::new(env!("CARGO_BIN_EXE_worker")), template)
}

fn said(content: &str) -> Chat {
    vec![ChatMessage::said("user", content)].into()
}

/// Does `bad` when told to, and greets otherwise.
fn sandbox_that_may(bad: &str) -> Sandbox {
    sandbox(&format!(
        "{{% if messages[0].content == 'bad' %}}{bad}{{% else %}}{{{{ bos_token }}}}hello{{% endif %}}"
    ))
}

#[test]
fn conversations_are_rendered_one_after_the_other() {
    let sandbox = sandbox("{{ bos_token }}[{{ messages[0].content }}]");
    for content in ["a", "\u{1f600} \"quoted\"\n", &"long ".repeat(400_000)] {
        assert_eq!(
            sandbox.render(&said(content)).unwrap(),
            format!("<s>[{content}]")
        );
    }
}

#[test]
fn a_template_that_takes_all_memory_fails_its_request_and_the_next_one_is_served() {
    let doubled = |what: &str| {
        format!(
            "{{% set ns = namespace(s={what}) %}}{{% for i in range(60) %}}{{% set ns.s = ns.s + ns.s %}}{{% endfor %}}{{{{ ns.s }}}}"
        )
    };
    let greedy = [
        "{{ '%10000000000d' | format(1) }}".to_owned(),
        "{{ ('x' * 1000000)|replace('x', 'y' * 1000000) }}".to_owned(),
        r"{{ 'a\nb'|indent(4000000000) }}".to_owned(),
        doubled("'x'"),
    ];
    for bad in greedy {
        let sandbox = sandbox_that_may(&bad);
        let error = sandbox.render(&said("bad")).unwrap_err();
        assert_eq!(error, ChatError::Memory(256), "{bad}");
        assert_eq!(sandbox.render(&said("good")).unwrap(), "<s>hello", "{bad}");
    }
}

#[test]
fn a_template_that_never_ends_is_ended_and_the_next_one_is_served() {
    let bad = "{% set ns = namespace(s=['x']) %}{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}{{ ns.s }}";
    let sandbox = sandbox_that_may(bad);
    let started = Instant::now();
    let error = sandbox.render(&said("bad")).unwrap_err();
    assert!(matches!(error, ChatError::Slow(_)), "{error}");
    assert!(started.elapsed() < Duration::from_secs(20));
    assert_eq!(sandbox.render(&said("good")).unwrap(), "<s>hello");
}

#[test]
fn the_templates_own_mistakes_are_told_as_they_are() {
    let refused = sandbox("{{ raise_exception('no wizards') }}").render(&said("a"));
    assert!(
        matches!(&refused, Err(ChatError::Refused(why)) if why.contains("no wizards")),
        "{refused:?}"
    );
    let invalid = sandbox("{% for %}").render(&said("a"));
    assert!(matches!(invalid, Err(ChatError::Invalid(_))), "{invalid:?}");
    let flood = sandbox("{% for a in range(1000) %}{{ 'x' * 100000 }}{% endfor %}");
    assert_eq!(flood.render(&said("a")), Err(ChatError::TooLong));
}
