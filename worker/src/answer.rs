//! Answers in the making: the engine's tokens become text, log-probabilities and ends.
//!
//! Owns, per request, the text held back (unfinished characters, beginnings of stop strings) and how much the client
//! has already. Knows neither link nor engine: events in, outputs out. A panic over one request ends that request.

use std::collections::{HashMap, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use common::ids::RequestId;
use common::request::{Delta, End, Failure, FailureKind, TokenLogprob, TopToken};
use common::wire::message::Output;
use engine::request::{EndReason, Event, RequestKey, SequenceError};

use crate::text::TextModel;
use crate::text::detokenize::Utf8Stream;
use crate::text::stop::StopMatcher;
use crate::text::tokenizer::Vocabulary;
use crate::text::tools::parser::{CallParser, Parsed};

/// Longest prompt part (text and log-probabilities): it travels in one frame.
const PROMPT_PART_BYTES_MAX: usize = 6 << 20;
/// Bytes of an id, a log-probability and two lengths on the wire, at most.
const TOKEN_BYTES: usize = 20;

/// All answers that one engine works on.
#[derive(Default)]
pub struct Answers {
    by_key: HashMap<RequestKey, Answer>,
}

/// What a batch of events gave.
#[derive(Debug, Default, PartialEq)]
pub struct Step {
    /// For the coordinator.
    pub outputs: Vec<Output>,
    /// Candidates that are over here and not in the engine: to be cancelled there.
    pub cancel: Vec<(RequestKey, u32)>,
}

impl Answers {
    /// Adds a request that the engine has taken; gives what is known before its first event.
    pub fn begin(&mut self, key: RequestKey, mut answer: Answer) -> Vec<Output> {
        let mut outputs = Vec::new();
        answer.open(&mut outputs);
        if !answer.is_over() {
            self.by_key.insert(key, answer);
        }
        outputs
    }

    /// The engine's key of a request.
    pub fn key(&self, request: RequestId) -> Option<RequestKey> {
        self.by_key
            .iter()
            .find(|(_, answer)| answer.request == request)
            .map(|(key, _)| *key)
    }

    /// Forgets all requests: nobody waits for them any more. Gives their keys.
    pub fn forget(&mut self) -> Vec<RequestKey> {
        self.by_key.drain().map(|(key, _)| key).collect()
    }

    /// Takes the events of a step, in order. Events of unknown requests are dropped.
    pub fn step(&mut self, events: Vec<Event>) -> Step {
        let mut step = Step::default();
        for event in events {
            let (Event::PromptLogprobs { key, .. }
            | Event::Embedding { key, .. }
            | Event::Token { key, .. }
            | Event::Ended { key, .. }) = event;
            let Some(answer) = self.by_key.get_mut(&key) else {
                continue;
            };
            if catch_unwind(AssertUnwindSafe(|| answer.take(event, &mut step.outputs))).is_err() {
                let failure = Failure::new(
                    FailureKind::Internal,
                    "a defect in the worker ended this request",
                );
                answer.fail(failure, &mut step.outputs);
            }
            step.cancel
                .extend(answer.unknown_ends().map(|candidate| (key, candidate)));
            if answer.is_over() {
                self.by_key.remove(&key);
            }
        }
        step
    }
}

/// One request's answer.
pub struct Answer {
    /// The request.
    pub request: RequestId,
    text: Arc<TextModel>,
    prompt: PromptPart,
    /// Finds calls of tools in a candidate's text, from its beginning.
    calls: Option<CallParser>,
    /// Tokens without text that calls are spelt with.
    mark_ids: Vec<u32>,
    candidates: Vec<Candidate>,
}

/// What the answer says about the prompt.
#[derive(Debug, Clone, Default)]
pub struct PromptPart {
    /// The prompt's text, if it is to be repeated in front of the answer.
    pub echo: Option<String>,
    /// Whether log-probabilities of its tokens will come; the text then goes with them.
    pub logprobs: bool,
    /// Its first token, which has no log-probability.
    pub first: u32,
}

/// One candidate's text.
struct Candidate {
    stream: Utf8Stream,
    stops: StopMatcher,
    /// Output tokens so far.
    tokens: u32,
    /// Bytes of text so far, held back or not.
    decoded: u64,
    /// Bytes let through by the stop matcher.
    released: u64,
    /// Takes calls of tools out of what was let through.
    calls: Option<CallParser>,
    /// Bytes of text that is no call.
    shown: u64,
    /// Bytes that an earlier attempt has delivered: they are not sent again.
    delivered: u64,
    /// Tokens whose text is not released yet, each with the text's length after it.
    waiting: VecDeque<(u64, TokenLogprob)>,
    /// Text of an earlier attempt that was not delivered.
    unsent: String,
    /// A stop string is complete.
    stopped: bool,
    /// Its end is told.
    ended: bool,
    /// The engine works on it, and was not told to stop.
    in_engine: bool,
}

impl Answer {
    /// An answer without candidates.
    pub fn new(request: RequestId, text: Arc<TextModel>, prompt: PromptPart) -> Answer {
        Answer {
            request,
            text,
            prompt,
            calls: None,
            mark_ids: Vec::new(),
            candidates: Vec::new(),
        }
    }

    /// Lets the candidates that are added from now on call tools.
    pub fn find_calls(&mut self, calls: CallParser) {
        let marks = calls.family().marks().iter();
        self.mark_ids = marks
            .filter_map(|mark| self.text.special_id(mark))
            .collect();
        self.calls = Some(calls);
    }

    /// Adds the next candidate, whose text goes on in `stream`, with what earlier attempts emitted and delivered of
    /// it. False when it is over already, by a stop string.
    pub fn add_candidate(
        &mut self,
        stream: Utf8Stream,
        stops: &[String],
        emitted: &[u32],
        delivered: u64,
    ) -> bool {
        let mut candidate = Candidate {
            stream,
            stops: StopMatcher::new(stops),
            tokens: 0,
            decoded: 0,
            released: 0,
            calls: self.calls.clone(),
            shown: 0,
            delivered,
            waiting: VecDeque::new(),
            unsent: String::new(),
            stopped: false,
            ended: false,
            in_engine: true,
        };
        for &id in emitted {
            // Parts of calls are told together with their ids: whoever knows these has those.
            let Parsed { text, .. } = candidate.take(bytes_of(&self.text, &self.mark_ids, id));
            candidate.unsent.push_str(&text);
        }
        candidate.in_engine = !candidate.stopped;
        let runs = candidate.in_engine;
        self.candidates.push(candidate);
        runs
    }

    fn is_over(&self) -> bool {
        self.candidates.iter().all(|candidate| candidate.ended)
    }

    /// Candidates that have ended here while the engine works on them, each told once.
    fn unknown_ends(&mut self) -> impl Iterator<Item = u32> {
        let candidates = (0..).zip(&mut self.candidates);
        candidates.filter_map(|(index, candidate)| {
            let unknown = candidate.ended && candidate.in_engine;
            candidate.in_engine &= !unknown;
            unknown.then_some(index)
        })
    }

    /// What is known before the engine says anything.
    fn open(&mut self, outputs: &mut Vec<Output>) {
        let request = self.request;
        if let Some(text) = self.prompt.echo.take_if(|_| !self.prompt.logprobs) {
            outputs.push(Output::Prompt {
                request,
                text,
                tokens: Vec::new(),
            });
        }
        for (index, candidate) in (0..).zip(&mut self.candidates) {
            let text = std::mem::take(&mut candidate.unsent);
            if !text.is_empty() {
                let delta = Delta {
                    candidate: index,
                    text,
                    ..Delta::default()
                };
                outputs.push(Output::Delta { request, delta });
            }
            if candidate.stopped {
                outputs.push(candidate.end(request, index, End::Stop, 0));
            }
        }
    }

    fn take(&mut self, event: Event, outputs: &mut Vec<Output>) {
        match event {
            Event::PromptLogprobs { tokens, .. } => self.take_prompt(tokens, outputs),
            Event::Embedding { values, .. } => outputs.push(Output::Embedding {
                request: self.request,
                values,
            }),
            Event::Token {
                candidate,
                id,
                logprob,
                ..
            } => self.take_token(candidate, id, logprob, outputs),
            Event::Ended {
                candidate,
                reason,
                cached_tokens,
                ..
            } => {
                self.take_end(candidate, reason, cached_tokens, outputs);
            }
        }
    }

    fn take_prompt(
        &mut self,
        tokens: Vec<Option<engine::request::TokenLogprob>>,
        outputs: &mut Vec<Output>,
    ) {
        let vocabulary = self.text.tokenizer.vocabulary();
        let first = self.prompt.first;
        let none = || TokenLogprob {
            id: first,
            bytes: vocabulary.name(first).to_vec(),
            logprob: None,
            top: Vec::new(),
        };
        let known = |token| logprob_of(vocabulary, token);
        let tokens: Vec<TokenLogprob> = tokens
            .into_iter()
            .map(|token| token.map_or_else(none, known))
            .collect();
        let text = self.prompt.echo.take().unwrap_or_default();
        let bytes = text.len() + logprobs_bytes(&tokens);
        if bytes > PROMPT_PART_BYTES_MAX {
            let message = format!(
                "the log-probabilities of a prompt of {} tokens take {bytes} bytes, at most {PROMPT_PART_BYTES_MAX} can \
                 be sent; ask for fewer alternatives or a shorter prompt",
                tokens.len()
            );
            return self.fail(Failure::new(FailureKind::BadRequest, message), outputs);
        }
        outputs.push(Output::Prompt {
            request: self.request,
            text,
            tokens,
        });
    }

    fn take_token(
        &mut self,
        index: u32,
        id: u32,
        logprob: Option<engine::request::TokenLogprob>,
        outputs: &mut Vec<Output>,
    ) {
        let request = self.request;
        let vocabulary = self.text.tokenizer.vocabulary();
        let Some(candidate) = self
            .candidates
            .get_mut(index as usize)
            .filter(|candidate| !candidate.ended)
        else {
            return;
        };
        let Parsed { text, calls } = candidate.take(bytes_of(&self.text, &self.mark_ids, id));
        if let Some(logprob) = logprob {
            // A token that ends inside a character is shown with that character: one byte more than there is now.
            let end = candidate.decoded + u64::from(candidate.stream.unfinished());
            candidate
                .waiting
                .push_back((end, logprob_of(vocabulary, logprob)));
        }
        let delta = Delta {
            candidate: index,
            ids: vec![id],
            text,
            logprobs: candidate.shown_logprobs(),
            tool_calls: calls,
        };
        outputs.push(Output::Delta { request, delta });
        if candidate.stopped {
            outputs.push(candidate.end(request, index, End::Stop, 0));
        }
    }

    fn take_end(
        &mut self,
        index: u32,
        reason: EndReason,
        cached_tokens: u32,
        outputs: &mut Vec<Output>,
    ) {
        let request = self.request;
        let vocabulary = self.text.tokenizer.vocabulary();
        let Some(candidate) = self.candidates.get_mut(index as usize) else {
            return;
        };
        candidate.in_engine = false;
        if candidate.ended {
            return;
        }
        let mut stop_token = None;
        let end = match reason {
            EndReason::StopToken { logprob, .. } => {
                stop_token = logprob;
                End::Stop
            }
            EndReason::Complete => End::Stop,
            EndReason::Length => End::Length,
            EndReason::Deadline => End::Deadline,
            EndReason::Cancelled => End::Cancelled,
            EndReason::Error(error) => End::Error(failure_of(&error)),
        };
        // What is held back belongs to the answer, unless it goes on elsewhere and will be made there again.
        if matches!(end, End::Stop | End::Length | End::Deadline) {
            let (Parsed { text, calls }, mut logprobs) = candidate.flush();
            // The token that ended the answer has no text and is no output, but its log-probability is a part of the
            // answer's: clients that score texts count on one more entry than the text has tokens.
            if !candidate.stopped {
                logprobs.extend(stop_token.map(|token| logprob_of(vocabulary, token)));
            }
            if !text.is_empty() || !logprobs.is_empty() || !calls.is_empty() {
                let delta = Delta {
                    candidate: index,
                    ids: Vec::new(),
                    text,
                    logprobs,
                    tool_calls: calls,
                };
                outputs.push(Output::Delta { request, delta });
            }
        }
        outputs.push(candidate.end(request, index, end, cached_tokens));
    }

    /// Ends all candidates that have not ended.
    fn fail(&mut self, failure: Failure, outputs: &mut Vec<Output>) {
        for (index, candidate) in (0..)
            .zip(&mut self.candidates)
            .filter(|(_, candidate)| !candidate.ended)
        {
            outputs.push(candidate.end(self.request, index, End::Error(failure.clone()), 0));
        }
    }
}

impl Candidate {
    /// Takes a token's bytes; gives what is safe to show, text only as far as it was not delivered before.
    fn take(&mut self, bytes: &[u8]) -> Parsed {
        self.tokens += 1;
        let mut text = String::new();
        self.stream.push(bytes, &mut text);
        self.pass(&text)
    }

    /// Ends the text: what was held back and the tokens that go with it.
    fn flush(&mut self) -> (Parsed, Vec<TokenLogprob>) {
        let mut text = String::new();
        self.stream.finish(&mut text);
        let mut shown = self.pass(&text);
        if !self.stopped {
            let mut rest = String::new();
            self.stops.finish(&mut rest);
            self.release(rest, true, &mut shown);
        }
        (shown, self.shown_logprobs())
    }

    fn pass(&mut self, text: &str) -> Parsed {
        self.decoded += text.len() as u64;
        let (mut released, mut shown) = (String::new(), Parsed::default());
        self.stopped |= self.stops.push(text, &mut released);
        self.release(released, self.stopped, &mut shown);
        shown
    }

    /// Takes the calls out of text that was let through; `last` says that none will follow.
    fn release(&mut self, text: String, last: bool, shown: &mut Parsed) {
        self.released += text.len() as u64;
        let mut parsed = Parsed::default();
        match &mut self.calls {
            None => parsed.text = text,
            Some(calls) => {
                calls.push(&text, &mut parsed);
                if last {
                    calls.finish(&mut parsed);
                }
                self.stopped |= calls.is_over();
            }
        }
        shown.text.push_str(&self.fresh(parsed.text));
        shown.calls.extend(parsed.calls);
    }

    /// Counts text and cuts off what was delivered before.
    fn fresh(&mut self, text: String) -> String {
        let before = self.shown;
        self.shown += text.len() as u64;
        let known = self.delivered.saturating_sub(before);
        match usize::try_from(known) {
            Ok(0) => text,
            Ok(known) => text.get(known..).unwrap_or_default().to_owned(),
            Err(_) => String::new(),
        }
    }

    fn shown_logprobs(&mut self) -> Vec<TokenLogprob> {
        let shown = self
            .waiting
            .iter()
            .take_while(|(end, _)| *end <= self.released)
            .count();
        self.waiting
            .drain(..shown)
            .map(|(_, logprob)| logprob)
            .collect()
    }

    fn end(&mut self, request: RequestId, candidate: u32, end: End, cached_tokens: u32) -> Output {
        self.ended = true;
        Output::End {
            request,
            candidate,
            output_tokens: self.tokens,
            cached_tokens,
            end,
        }
    }
}

/// What a token adds to an answer's text; marks of calls are part of it, although they may be special tokens.
fn bytes_of<'a>(text: &'a TextModel, mark_ids: &[u32], id: u32) -> &'a [u8] {
    let vocabulary = text.tokenizer.vocabulary();
    if mark_ids.contains(&id) {
        vocabulary.name(id)
    } else {
        vocabulary.text(id)
    }
}

/// Log-probabilities with the tokens' bytes; special tokens by their names, so that alternatives can be told apart.
fn logprob_of(vocabulary: &Vocabulary, logprob: engine::request::TokenLogprob) -> TokenLogprob {
    let bytes = |id| vocabulary.name(id).to_vec();
    let top = logprob
        .top
        .into_iter()
        .map(|(id, logprob)| TopToken {
            id,
            bytes: bytes(id),
            logprob,
        })
        .collect();
    TokenLogprob {
        id: logprob.id,
        bytes: bytes(logprob.id),
        logprob: Some(logprob.logprob),
        top,
    }
}

fn logprobs_bytes(tokens: &[TokenLogprob]) -> usize {
    let top = |token: &TokenLogprob| {
        token
            .top
            .iter()
            .map(|top| TOKEN_BYTES + top.bytes.len())
            .sum::<usize>()
    };
    tokens
        .iter()
        .map(|token| TOKEN_BYTES + token.bytes.len() + top(token))
        .sum()
}

/// About how many bytes an output takes on the wire; never fewer than it does.
pub fn output_bytes(output: &Output) -> usize {
    let Delta {
        ids,
        text,
        logprobs,
        tool_calls,
        ..
    } = match output {
        Output::Prompt { text, tokens, .. } => {
            return 2 * TOKEN_BYTES + text.len() + logprobs_bytes(tokens);
        }
        Output::End {
            end: End::Error(failure),
            ..
        } => return 3 * TOKEN_BYTES + failure.message.len(),
        Output::End { .. } => return 3 * TOKEN_BYTES,
        Output::Embedding { values, .. } => return 2 * TOKEN_BYTES + 4 * values.len(),
        Output::Delta { delta, .. } => delta,
    };
    let calls = tool_calls.iter().map(|call| {
        let text = |text: &Option<String>| text.as_ref().map_or(0, String::len);
        TOKEN_BYTES + text(&call.id) + text(&call.name) + call.arguments.len()
    });
    2 * TOKEN_BYTES + 5 * ids.len() + text.len() + logprobs_bytes(logprobs) + calls.sum::<usize>()
}

/// What a client is told of a sequence's failure.
pub fn failure_of(error: &SequenceError) -> Failure {
    let kind = match error {
        SequenceError::Invalid(_) | SequenceError::Mask(_) => FailureKind::BadRequest,
        SequenceError::NeverFits { .. } => FailureKind::TooLarge,
        SequenceError::Engine(_) => FailureKind::Unavailable,
        SequenceError::NotFinite => FailureKind::Internal,
    };
    Failure::new(kind, error.to_string())
}

#[cfg(test)]
mod tests;
