//! What an answer must be, compiled for a model's vocabulary: JSON by a schema, a regular expression, a grammar.
//!
//! Owns the limits on what may be asked for, the vocabulary as a tree of bytes, and the grammars compiled last. The
//! compiling and the sets of tokens are llguidance's. Knows no engine: [`crate::masks`] makes a [`Grammar`] into a mask.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::{io, thread};

use common::request::Constraint;
use llguidance::api::{ParserLimits, TopLevelGrammar};
use llguidance::earley::SlicedBiasComputer;
use llguidance::toktrie::{
    ApproximateTokEnv, INVALID_TOKEN, InferenceCapabilities, TokEnv, TokRxInfo, TokTrie,
};
use llguidance::{Matcher, ParserFactory};
use serde_json::{Value, json};

use super::tokenizer::Vocabulary;
use super::trial::{Doubt, Trial};

/// Longest schema, expression or grammar that a request may bring, in bytes.
pub const SOURCE_BYTES_MAX: usize = 64 << 10;
/// Deepest nesting of brackets in an expression or grammar. (A schema's is bounded where bodies are read.)
const NESTING_MAX: usize = 100;
/// Longest reason that is told of a source that does not compile, in characters.
const REASON_CHARS_MAX: usize = 400;
/// Stack of a compilation.
const STACK_BYTES: usize = 16 << 20;
/// Compiled grammars that are kept: chats come again with the same schema.
const COMPILED_MAX: usize = 32;

/// What compiling and one token's set may take; an answer that goes beyond ends with an error. The numbers are
/// llguidance's defaults but for the size of a grammar and of its lexer, which take memory: some 2 KiB per state.
fn limits() -> ParserLimits {
    ParserLimits {
        max_lexer_states: 10_000,
        max_grammar_size: 100_000,
        precompute_large_lexemes: false,
        verbose_errors: false,
        ..ParserLimits::default()
    }
}

/// Why an answer cannot be bound to what was asked for.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConstraintError {
    /// It is longer than allowed.
    #[error("the {what} has {bytes} bytes; at most {SOURCE_BYTES_MAX} are taken; make it smaller")]
    TooLong {
        /// What was given.
        what: &'static str,
        /// Its length.
        bytes: usize,
    },
    /// It is nested deeper than allowed.
    #[error("the {what} is nested more than {NESTING_MAX} deep; make it flatter")]
    TooDeep {
        /// What was given.
        what: &'static str,
    },
    /// It is not valid, or asks for what cannot be enforced.
    #[error("the {what} cannot be enforced: {why}")]
    Refused {
        /// What was given.
        what: &'static str,
        /// The reason.
        why: String,
    },
    /// It could not be compiled for a fault of ours.
    #[error("the {what} could not be compiled: {why}")]
    Failed {
        /// What was given.
        what: &'static str,
        /// The reason.
        why: String,
    },
    /// This model's vocabulary cannot be bound to anything.
    #[error("answers of this model cannot be constrained: {0}")]
    Vocabulary(String),
}

impl ConstraintError {
    /// The same about something else: the client does not know what it was made into.
    #[must_use]
    pub fn about(self, what: &'static str) -> ConstraintError {
        match self {
            ConstraintError::Refused { why, .. } => ConstraintError::Refused { what, why },
            other => other,
        }
    }
}

/// What an answer is bound to, and how far the answer is.
#[derive(Clone)]
pub struct Grammar(Matcher);

impl Grammar {
    /// Shows the set of tokens that may come next, as bits: id 0 is the lowest bit of the first word.
    ///
    /// # Errors
    /// The reason why it cannot be told.
    pub fn allowed(&mut self, take: impl FnOnce(&[u32])) -> Result<(), String> {
        let set = self.0.compute_mask().map_err(|e| reason(&e))?;
        take(set.as_slice());
        Ok(())
    }

    /// Goes on by a token; true when nothing may follow it.
    ///
    /// # Errors
    /// The reason why it cannot.
    pub fn accept(&mut self, token: u32) -> Result<bool, String> {
        self.0.consume_token(token).map_err(|e| reason(&e))?;
        Ok(self.0.is_stopped())
    }
}

/// A model's vocabulary and the grammars compiled for it last.
#[derive(Default)]
pub struct Grammars {
    /// Made for the first request that needs it.
    factory: OnceLock<Result<ParserFactory, ConstraintError>>,
    /// Tries each source before it is compiled here.
    trial: Option<Trial>,
    /// The last used one first.
    compiled: Mutex<VecDeque<(Constraint, Arc<Matcher>)>>,
}

impl Grammars {
    /// The same, with sources tried in another process first.
    pub fn with_trial(self, trial: Trial) -> Grammars {
        Grammars {
            trial: Some(trial),
            ..self
        }
    }

    /// The grammar of what a request asks for, at its beginning.
    ///
    /// # Errors
    /// [`ConstraintError`].
    pub fn of_request(
        &self,
        constraint: &Constraint,
        vocabulary: &Vocabulary,
        end_ids: &[u32],
    ) -> Result<Grammar, ConstraintError> {
        check(constraint)?;
        self.compile(constraint, constraint, vocabulary, end_ids)
    }

    /// The grammar of a constraint that this program wrote, or that is checked. `tried` is what takes as much to compile
    /// and needs no vocabulary.
    ///
    /// # Errors
    /// [`ConstraintError`].
    pub fn compile(
        &self,
        constraint: &Constraint,
        tried: &Constraint,
        vocabulary: &Vocabulary,
        end_ids: &[u32],
    ) -> Result<Grammar, ConstraintError> {
        let (what, _) = source(constraint);
        let failed = |why: String| ConstraintError::Failed { what, why };
        let refused = |why: String| ConstraintError::Refused { what, why };
        let matcher = match self.known(constraint) {
            Some(matcher) => matcher,
            None => {
                let tried = self.trial.as_ref().map(|trial| trial.compile(tried));
                match tried.transpose() {
                    Ok(_) => {}
                    Err(Doubt::Refused(why)) => return Err(refused(why)),
                    Err(Doubt::Untried(why)) => return Err(failed(why)),
                }
                let factory = self.factory.get_or_init(|| factory(vocabulary, end_ids));
                let factory = factory.as_ref().map_err(Clone::clone)?;
                let compiled = with_stack(STACK_BYTES, || compile(factory, constraint));
                let compiled = compiled.map_err(|e| failed(e.to_string()))?;
                let matcher = Arc::new(compiled.map_err(refused)?);
                self.keep(constraint, &matcher);
                matcher
            }
        };
        // What a lexer has seen is kept with it, within bounds: requests do not share them.
        Ok(Grammar(matcher.deep_clone()))
    }

    fn known(&self, constraint: &Constraint) -> Option<Arc<Matcher>> {
        let mut compiled = self.compiled.lock().unwrap_or_else(PoisonError::into_inner);
        let at = compiled.iter().position(|(known, _)| known == constraint)?;
        let found = compiled.remove(at)?;
        compiled.push_front(found);
        compiled.front().map(|(_, matcher)| matcher.clone())
    }

    fn keep(&self, constraint: &Constraint, matcher: &Arc<Matcher>) {
        let mut compiled = self.compiled.lock().unwrap_or_else(PoisonError::into_inner);
        compiled.push_front((constraint.clone(), matcher.clone()));
        compiled.truncate(COMPILED_MAX);
    }
}

/// What a constraint is called, and its text.
fn source(constraint: &Constraint) -> (&'static str, &str) {
    match constraint {
        Constraint::JsonObject => ("JSON object", ""),
        Constraint::JsonSchema(text) => ("JSON schema", text),
        Constraint::Regex(text) => ("regular expression", text),
        Constraint::Grammar(text) => ("grammar", text),
    }
}

/// Refuses what would take too much before it is even parsed.
///
/// # Errors
/// [`ConstraintError`].
pub fn check(constraint: &Constraint) -> Result<(), ConstraintError> {
    let (what, text) = source(constraint);
    let bytes = text.len();
    if bytes > SOURCE_BYTES_MAX {
        return Err(ConstraintError::TooLong { what, bytes });
    }
    let mut depth = 0usize;
    for byte in text.bytes() {
        match byte {
            b'(' | b'[' | b'{' => depth += 1,
            b')' | b']' | b'}' => depth = depth.saturating_sub(1),
            _ => {}
        }
        if depth > NESTING_MAX {
            return Err(ConstraintError::TooDeep { what });
        }
    }
    Ok(())
}

/// Compiles a constraint, and computes its first set: a grammar that no answer can satisfy is told now and not in the
/// middle of one.
///
/// # Errors
/// The reason why it cannot be.
pub fn compile(factory: &ParserFactory, constraint: &Constraint) -> Result<Matcher, String> {
    let (_, text) = source(constraint);
    let grammar = match constraint {
        Constraint::JsonObject => {
            TopLevelGrammar::from_json_schema(plain_json(json!({"type": "object"})))
        }
        Constraint::JsonSchema(_) => {
            let schema: Value = serde_json::from_str(text).map_err(|e| e.to_string())?;
            TopLevelGrammar::from_json_schema(plain_json(schema))
        }
        Constraint::Regex(_) => TopLevelGrammar::from_regex(whole(text)),
        Constraint::Grammar(_) => TopLevelGrammar::from_lark(text.to_owned()),
    };
    let parser = factory.create_parser(grammar).map_err(|e| reason(&e))?;
    let mut matcher = Matcher::new(Ok(parser));
    matcher.compute_mask().map_err(|e| reason(&e))?;
    Ok(matcher)
}

/// Does work on a thread with so much stack: compiling recurses as deep as its source is nested.
///
/// # Errors
/// When there is no thread, or the work panics.
pub fn with_stack<T: Send>(bytes: usize, work: impl FnOnce() -> T + Send) -> io::Result<T> {
    thread::scope(|scope| {
        let thread = thread::Builder::new().name("grammar".to_owned());
        let running = thread.stack_size(bytes).spawn_scoped(scope, work)?;
        let panicked = |_| io::Error::other("a defect in the compiler");
        running.join().map_err(panicked)
    })
}

/// A schema, with the blanks between its parts bounded: one, or a new line and its indentation. JSON allows any number
/// of them, and a weak model may never come to an end of them.
pub fn plain_json(mut schema: Value) -> Value {
    if let Some(object) = schema.as_object_mut() {
        let options = json!({"whitespace_pattern": r" |\n {0,16}"});
        object.insert("x-guidance".to_owned(), options);
    }
    schema
}

/// An expression without the anchors around it: it must match the whole answer in any case.
fn whole(expression: &str) -> &str {
    let expression = expression.strip_prefix('^').unwrap_or(expression);
    let Some(rest) = expression.strip_suffix('$') else {
        return expression;
    };
    let escapes = rest.bytes().rev().take_while(|&byte| byte == b'\\').count();
    if escapes.is_multiple_of(2) {
        rest
    } else {
        expression
    }
}

/// The vocabulary as a tree of bytes.
fn factory(vocabulary: &Vocabulary, end_ids: &[u32]) -> Result<ParserFactory, ConstraintError> {
    let failed = |e: anyhow::Error| ConstraintError::Vocabulary(reason(&e));
    let ids = 0..vocabulary.len() as u32;
    let name = |id: u32| {
        let name = vocabulary.name(id);
        if name.is_empty() || !(vocabulary.is_special(id) || end_ids.contains(&id)) {
            return name.to_vec();
        }
        [&[TokTrie::SPECIAL_TOKEN_MARKER], name].concat()
    };
    let names: Vec<Vec<u8>> = ids.clone().map(name).collect();
    let ends: Vec<u32> = end_ids
        .iter()
        .copied()
        .filter(|id| ids.contains(id))
        .collect();
    let info = TokRxInfo::new(
        names.len() as u32,
        ends.first().copied().unwrap_or(INVALID_TOKEN),
    );
    // The tree has a bound on the length of a token, and panics beyond it.
    let trie = llguidance::panic_utils::catch_unwind(std::panic::AssertUnwindSafe(|| {
        Ok(TokTrie::from(&info, &names))
    }))
    .map_err(failed)?;
    let trie = if ends.is_empty() {
        trie
    } else {
        trie.with_eos_tokens(&ends)
    };
    let environment: TokEnv = Arc::new(ApproximateTokEnv::new(trie));
    factory_over(&environment).map_err(ConstraintError::Vocabulary)
}

/// A compiler over a vocabulary.
///
/// # Errors
/// The reason why there is none.
pub fn factory_over(environment: &TokEnv) -> Result<ParserFactory, String> {
    let slices = SlicedBiasComputer::general_slices();
    let capabilities = InferenceCapabilities::default();
    let mut factory =
        ParserFactory::new(environment, capabilities, &slices).map_err(|e| reason(&e))?;
    factory.quiet();
    *factory.limits_mut() = limits();
    Ok(factory)
}

/// llguidance's message in one line, without its dumps.
fn reason(error: &anyhow::Error) -> String {
    let text = format!("{error:#}");
    let dumps = ["\n<backtrace>", "\n<state>", "\n<non-verbose/>"];
    let ends = dumps.iter().filter_map(|dump| text.find(dump));
    let text = &text[..ends.min().unwrap_or(text.len())];
    if text == "NoExtensionBias" {
        return "no text of this model's vocabulary can satisfy it".to_owned();
    }
    let words: Vec<&str> = text.split_whitespace().collect();
    words.join(" ").chars().take(REASON_CHARS_MAX).collect()
}

#[cfg(test)]
mod tests;
