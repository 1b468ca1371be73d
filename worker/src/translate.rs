//! A prompt from the wire made ready for the engine: tokenized, checked, with its answer prepared.
//!
//! Runs off the session's thread, since tokenizing a long prompt takes a while. What comes back from the engine is
//! [`crate::answer`]'s part.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::request::{Failure, FailureKind, Generate, Resume};
use common::wire::message::Start;
use engine::mask::TokenMask;
use engine::request::{Candidate, Request, RequestKey, Sampling};

use crate::answer::{Answer, PromptPart};
use crate::masks::GrammarMask;
use crate::text::chat::ChatError;
use crate::text::constraint::{ConstraintError, Grammar};
use crate::text::{Binding, PromptError, TextModel};

/// What a replica can take.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Longest sequence, prompt and output.
    pub context_max: u32,
    /// Rows of the vocabulary.
    pub vocab: u32,
    /// The model's task is embeddings: it gives those, and no text.
    pub embeds: bool,
}

/// A request ready for the engine.
pub struct Prepared {
    /// The engine's key for it.
    pub key: RequestKey,
    /// For the engine; `None` when all candidates are over already.
    pub request: Option<Request>,
    /// Takes the engine's events.
    pub answer: Answer,
    /// Tokens of the prompt.
    pub prompt_tokens: u32,
}

/// Tokenizes and checks a prompt that arrived at `arrival`. A panic over it is its own failure.
///
/// # Errors
/// [`Failure`] for the client: what was asked, and what would do.
pub fn prepare(
    start: Start,
    text: &Arc<TextModel>,
    limits: Limits,
    key: RequestKey,
    arrival: Instant,
) -> Result<Prepared, Failure> {
    catch_unwind(AssertUnwindSafe(|| {
        translate(start, text, limits, key, arrival)
    }))
    .unwrap_or_else(|_| {
        Err(Failure::new(
            FailureKind::Internal,
            "a defect in the worker ended this request",
        ))
    })
}

fn translate(
    start: Start,
    text: &Arc<TextModel>,
    limits: Limits,
    key: RequestKey,
    arrival: Instant,
) -> Result<Prepared, Failure> {
    let Start {
        request,
        generate,
        resume,
        deadline_ms,
        ..
    } = start;
    check_task(&generate, limits)?;
    let mut prompt = text
        .prompt_ids(
            &generate.prompt,
            limits.context_max,
            generate.truncate_prompt,
        )
        .map_err(|e| {
            let kind = match &e {
                PromptError::Chat(ChatError::Sandbox(_)) => FailureKind::Internal,
                _ => FailureKind::BadRequest,
            };
            Failure::new(kind, e.to_string())
        })?;
    if generate.truncate_prompt {
        let keep = kept_tokens(&generate, limits.context_max);
        let begins = |id| text.tokenizer.vocabulary().is_special(id);
        truncate(&mut prompt, keep, begins);
    }
    let tokens_max = check(&prompt, &generate, &resume, limits)?;
    let Binding { grammar, calls } = text.binding(&generate).map_err(|e| {
        let kind = match e {
            ConstraintError::Failed { .. } => FailureKind::Internal,
            _ => FailureKind::BadRequest,
        };
        Failure::new(kind, e.to_string())
    })?;
    let (prompt_text, stream) = text.tokenizer.vocabulary().prompt_text(&prompt);
    // An earlier attempt that delivered something has delivered the prompt's part before.
    let first_attempt = resume
        .iter()
        .all(|known| known.emitted.is_empty() && known.delivered_bytes == 0);
    let part = PromptPart {
        echo: (generate.echo && first_attempt).then_some(prompt_text),
        logprobs: generate.prompt_logprobs.is_some() && first_attempt,
        first: prompt[0],
    };
    let prompt_logprobs = generate.prompt_logprobs.filter(|_| part.logprobs);
    let mut answer = Answer::new(request, text.clone(), part);
    if let Some(calls) = calls {
        answer.find_calls(calls);
    }
    let mut candidates = Vec::new();
    for index in 0..generate.candidates {
        let known = resume.iter().find(|known| known.candidate == index);
        let (emitted, delivered) = known.map_or((&[][..], 0), |known| {
            (&known.emitted[..], known.delivered_bytes)
        });
        let runs = answer.add_candidate(stream.clone(), &generate.stop.strings, emitted, delivered);
        if runs {
            candidates.push(Candidate {
                index,
                emitted: emitted.to_vec(),
                mask: mask_after(grammar.as_ref(), emitted)?,
            });
        }
    }
    let prompt_tokens = prompt.len() as u32;
    let mut stop_ids = generate.stop.token_ids;
    if !generate.stop.ignore_eos {
        stop_ids.extend(&text.end_ids);
    }
    let request = (!candidates.is_empty()).then(|| Request {
        key,
        prompt,
        candidates,
        sampling: sampling(generate.sampling, generate.logprobs),
        tokens_max,
        stop_ids,
        prompt_logprobs,
        embedding: generate.embedding,
        deadline: deadline_ms.map(|ms| arrival + Duration::from_millis(ms)),
    });
    Ok(Prepared {
        key,
        request,
        answer,
        prompt_tokens,
    })
}

/// A model gives what it was logged for: text or embeddings.
fn check_task(generate: &Generate, limits: Limits) -> Result<(), Failure> {
    match (generate.embedding, limits.embeds) {
        (true, false) => Err(bad(
            "this model gives text, not embeddings: for embeddings log it with the task llm/v1/embeddings \
             (metadata={\"task\": \"llm/v1/embeddings\"})",
        )),
        (false, true) => Err(bad(
            "this model's task is llm/v1/embeddings: give it 'input' to embed; to let it write text log it with the \
             task llm/v1/completions (metadata={\"task\": \"llm/v1/completions\"})",
        )),
        _ => Ok(()),
    }
}

/// Tokens of a prompt that is cut to fit: what the answer asked for leaves of the context, at least half of it.
fn kept_tokens(generate: &Generate, context_max: u32) -> usize {
    let answer = match generate.stop.tokens_max {
        Some(0) => 0,
        Some(asked) => asked.min(context_max / 2),
        None => 1,
    };
    context_max.saturating_sub(answer) as usize
}

/// Drops the beginning of a prompt that leaves no room for an answer; a special token in front stays there.
fn truncate(prompt: &mut Vec<u32>, keep: usize, is_special: impl Fn(u32) -> bool) {
    if prompt.len() <= keep || keep == 0 {
        return;
    }
    let first = usize::from(is_special(prompt[0]) && keep > 1);
    prompt.drain(first..first + prompt.len() - keep);
}

/// The mask of a candidate that has emitted these ids.
fn mask_after(
    grammar: Option<&Grammar>,
    emitted: &[u32],
) -> Result<Option<Box<dyn TokenMask>>, Failure> {
    let Some(mut grammar) = grammar.cloned() else {
        return Ok(None);
    };
    for &id in emitted {
        // One that was complete has ended, and is not resumed.
        grammar.accept(id).map_err(|why| {
            bad(format!(
                "the ids to resume from do not keep to the constraint: {why}"
            ))
        })?;
    }
    Ok(Some(Box::new(GrammarMask(grammar))))
}

/// Checks what only the replica can know; gives the most output tokens of a candidate.
fn check(
    prompt: &[u32],
    generate: &Generate,
    resume: &[Resume],
    limits: Limits,
) -> Result<u32, Failure> {
    let Limits {
        context_max, vocab, ..
    } = limits;
    if prompt.is_empty() {
        return Err(bad("the prompt is empty; give at least one token"));
    }
    let room = (context_max as usize).checked_sub(prompt.len());
    let scores_only = generate.embedding || generate.stop.tokens_max == Some(0);
    let Some(room) = room.filter(|&room| room > 0 || scores_only) else {
        return Err(bad(format!(
            "the prompt has {} tokens and this model's context is {context_max}, prompt and answer together; shorten \
             the prompt",
            prompt.len()
        )));
    };
    let outside = |ids: &[u32]| ids.iter().copied().find(|&id| id >= vocab);
    let named = [
        ("the prompt", outside(prompt)),
        (
            "logit_bias",
            generate
                .sampling
                .logit_bias
                .iter()
                .map(|(id, _)| *id)
                .find(|&id| id >= vocab),
        ),
        (
            "the ids to resume from",
            resume.iter().find_map(|known| outside(&known.emitted)),
        ),
    ];
    if let Some((what, Some(id))) = named.into_iter().find(|(_, id)| id.is_some()) {
        return Err(bad(format!(
            "{what} has the token id {id}, but this model's ids go from 0 to {}",
            vocab - 1
        )));
    }
    if !(1..=Generate::CANDIDATES_MAX).contains(&generate.candidates) {
        let most = Generate::CANDIDATES_MAX;
        return Err(bad(format!(
            "{} candidates are asked for; ask for 1 to {most}",
            generate.candidates
        )));
    }
    if generate.embedding {
        if generate.candidates != 1 {
            return Err(bad("an embedding has one candidate"));
        }
        return Ok(0);
    }
    let room = room as u32;
    Ok(generate
        .stop
        .tokens_max
        .map_or(room, |asked| asked.min(room)))
}

fn sampling(wire: common::request::Sampling, logprobs: Option<u32>) -> Sampling {
    let common::request::Sampling {
        temperature,
        top_k,
        top_p,
        min_p,
        repetition_penalty,
        presence_penalty,
        frequency_penalty,
        logit_bias,
        seed,
    } = wire;
    Sampling {
        temperature,
        top_k,
        top_p,
        min_p,
        repetition_penalty,
        presence_penalty,
        frequency_penalty,
        logit_bias,
        seed,
        logprobs,
    }
}

fn bad(message: impl Into<String>) -> Failure {
    Failure::new(FailureKind::BadRequest, message)
}

#[cfg(test)]
mod tests {
    use common::ids::{Generation, ReplicaId, RequestId};
    use common::request::{ChatMessage, Prompt};

    use super::*;
    use crate::text::tests::text_model;

    const LIMITS: Limits = Limits {
        context_max: 32,
        vocab: 2048,
        embeds: false,
    };

    fn start(generate: Generate) -> Start {
        Start {
            request: RequestId(7),
            replica: ReplicaId(1),
            generation: Generation(1),
            attempt: 0,
            generate,
            resume: Vec::new(),
            deadline_ms: Some(1000),
        }
    }

    fn prepared(start: Start) -> Result<Prepared, Failure> {
        prepare(start, &text_model("tiny-llama"), LIMITS, 9, Instant::now())
    }

    fn refused(generate: Generate) -> String {
        let failure = prepared(start(generate)).err().unwrap();
        assert_eq!(failure.kind, FailureKind::BadRequest);
        failure.message
    }

    #[test]
    fn a_text_becomes_a_request_with_the_models_end_ids_and_what_fits() {
        let arrival = Instant::now();
        let text = text_model("tiny-llama");
        let start = start(Generate::new(Prompt::Text("Hello, world!".into())));
        let Prepared {
            request,
            prompt_tokens,
            ..
        } = prepare(start, &text, LIMITS, 9, arrival).unwrap();
        let request = request.unwrap();
        assert_eq!(
            (request.key, request.prompt, prompt_tokens),
            (9, vec![1, 998, 1990, 564, 2024], 5)
        );
        assert_eq!((request.stop_ids, request.tokens_max), (vec![2], 27));
        assert_eq!(request.deadline, Some(arrival + Duration::from_secs(1)));
    }

    #[test]
    fn the_answer_is_cut_at_the_context_and_end_ids_can_be_ignored() {
        let mut generate = Generate::new(Prompt::Tokens(vec![5; 30]));
        generate.stop.tokens_max = Some(100);
        generate.stop.ignore_eos = true;
        generate.stop.token_ids = vec![13];
        let request = prepared(start(generate)).unwrap().request.unwrap();
        assert_eq!((request.tokens_max, request.stop_ids), (2, vec![13]));
    }

    #[test]
    fn what_cannot_run_is_refused_with_numbers() {
        let message = refused(Generate::new(Prompt::Tokens(vec![5; 40])));
        assert!(
            message.contains("40 tokens") && message.contains("context is 32"),
            "{message}"
        );
        assert!(
            refused(Generate::new(Prompt::Tokens(vec![5; 32]))).contains("32 tokens"),
            "no room for an answer"
        );
        let long = "<s>".repeat(100_000);
        assert!(
            refused(Generate::new(Prompt::Text(long))).contains("300000 bytes"),
            "told without its tokens"
        );
        assert!(refused(Generate::new(Prompt::Tokens(vec![]))).contains("empty"));
        assert!(refused(Generate::new(Prompt::Tokens(vec![2048]))).contains("id 2048"));
        let mut generate = Generate::new(Prompt::Text("hi".into()));
        generate.sampling.logit_bias = vec![(9999, 1.0)];
        assert!(refused(generate).contains("logit_bias has the token id 9999"));
        let wizard = vec![ChatMessage::said("wizard", "hi")];
        assert!(refused(Generate::new(Prompt::Chat(wizard.into()))).contains("Only the roles"));
        let none = Generate {
            candidates: 0,
            ..Generate::new(Prompt::Text("hi".into()))
        };
        assert!(refused(none).contains("0 candidates"));
    }

    #[test]
    fn an_overlong_prompt_can_be_cut_to_its_end() {
        let ids: Vec<u32> = std::iter::once(1).chain(100..160).collect();
        let cut = |tokens_max, ids: &[u32]| {
            let mut generate = Generate::new(Prompt::Tokens(ids.to_vec()));
            generate.truncate_prompt = true;
            generate.stop.tokens_max = tokens_max;
            let request = prepared(start(generate)).unwrap().request.unwrap();
            (request.prompt, request.tokens_max)
        };
        let (prompt, tokens_max) = cut(None, &ids);
        assert_eq!((prompt.len(), tokens_max), (31, 1));
        assert_eq!(
            (prompt[0], prompt[1], prompt[30]),
            (1, 130, 159),
            "<s> stays in front"
        );
        let (prompt, tokens_max) = cut(Some(10), &ids[1..]);
        assert_eq!((prompt.len(), tokens_max), (22, 10));
        assert_eq!((prompt[0], prompt[21]), (138, 159));
        let (prompt, tokens_max) = cut(Some(1000), &ids);
        assert_eq!(
            (prompt.len(), tokens_max),
            (16, 16),
            "half of the context is the prompt's"
        );
        let (prompt, _) = cut(Some(0), &ids);
        assert_eq!(prompt.len(), 32);
        assert_eq!(
            cut(None, &ids[..31]),
            (ids[..31].to_vec(), 1),
            "what fits is whole"
        );

        let mut long = Generate::new(Prompt::Text("word ".repeat(100_000)));
        long.truncate_prompt = true;
        let request = prepared(start(long)).unwrap().request.unwrap();
        assert_eq!((request.prompt.len(), request.prompt[0]), (31, 1));
    }

    #[test]
    fn a_model_gives_what_its_task_says() {
        let embed = || Generate {
            embedding: true,
            ..Generate::new(Prompt::Tokens(vec![5; 32]))
        };
        assert!(refused(embed()).contains("log it with the task llm/v1/embeddings"));
        let embeds = Limits {
            embeds: true,
            ..LIMITS
        };
        let text = text_model("tiny-llama");
        let prepared = prepare(start(embed()), &text, embeds, 9, Instant::now()).unwrap();
        let request = prepared.request.unwrap();
        assert!(request.embedding && request.tokens_max == 0);
        let writes = start(Generate::new(Prompt::Text("hi".into())));
        let failure = prepare(writes, &text, embeds, 9, Instant::now())
            .err()
            .unwrap();
        assert!(
            failure.message.contains("task is llm/v1/embeddings"),
            "{failure}"
        );
    }

    #[test]
    fn a_full_context_can_be_scored() {
        let mut generate = Generate::new(Prompt::Tokens(vec![5; 32]));
        generate.stop.tokens_max = Some(0);
        generate.prompt_logprobs = Some(1);
        let request = prepared(start(generate)).unwrap().request.unwrap();
        assert_eq!((request.tokens_max, request.prompt_logprobs), (0, Some(1)));
    }

    #[test]
    fn a_resumed_request_recomputes_what_was_emitted_and_repeats_no_prompt_part() {
        let mut generate = Generate::new(Prompt::Tokens(vec![5, 6]));
        generate.candidates = 2;
        generate.echo = true;
        generate.prompt_logprobs = Some(1);
        generate.stop.strings = vec!["Spark".into()];
        let spark = text_model("tiny-llama")
            .tokenizer
            .encode("Apache Spark", false)
            .unwrap();
        let resume = vec![
            Resume {
                candidate: 0,
                emitted: spark,
                delivered_bytes: 3,
            },
            Resume {
                candidate: 1,
                emitted: vec![8],
                delivered_bytes: 0,
            },
        ];
        let request = prepared(Start {
            resume,
            attempt: 1,
            ..start(generate)
        })
        .unwrap()
        .request
        .unwrap();
        let running: Vec<(u32, &[u32])> = request
            .candidates
            .iter()
            .map(|c| (c.index, &c.emitted[..]))
            .collect();
        assert_eq!(
            running,
            [(1, &[8][..])],
            "candidate 0 has met its stop string"
        );
        assert_eq!(request.prompt_logprobs, None);
    }
}
