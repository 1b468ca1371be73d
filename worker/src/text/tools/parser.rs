//! Calls in a text that streams.
//!
//! Pure but for the calls' ids, which are drawn. Goes character by character, so that the result does not depend on how
//! the text is cut. A call is told when its object is complete; text that looked like one and is none comes out as text.
//! Where a grammar sees to it that calls are right ([`CallParser::trusting`]), arguments are told while they come.

use std::sync::Arc;

use common::request::ToolCallDelta;
use rand::Rng;
use rand::distr::Alphanumeric;

use super::Family;
use super::json::CallScan;

/// Most blanks that are held back in case that a call follows them.
const BLANKS_MAX: usize = 64;
/// What may stand in front of a call in [`Family::Llama`].
const PYTHON_TAG: &str = "<|python_tag|>";
/// What stands behind a call in [`Family::Hermes`].
const CLOSING: &str = "</tool_call>";

/// What came out of a piece of text.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Parsed {
    /// Text that is no call.
    pub text: String,
    /// Parts of calls, in order.
    pub calls: Vec<ToolCallDelta>,
}

/// Finds the calls of one answer.
#[derive(Debug, Clone)]
pub struct CallParser {
    family: Family,
    /// Tools that may be called. A call of another one is text.
    names: Arc<[String]>,
    /// Nothing counts after the first call.
    single: bool,
    trusting: bool,
    state: State,
    /// What is not decided yet, but for a call's object.
    held: String,
    /// Complete calls.
    calls: u32,
    /// Bytes of the call at hand's arguments that are told; `None` when it is not begun.
    told: Option<usize>,
}

#[derive(Debug, Clone)]
enum State {
    /// The beginning of an answer that may be a call as a whole.
    Start,
    /// Text in which a call may begin.
    Text,
    /// Behind the mark of a list.
    List,
    /// In front of a call's object. `again`: it is not the first one here.
    Before { again: bool },
    /// In a call's object.
    Call(CallScan),
    /// Behind a call.
    After,
    /// Text in which no call begins any more.
    Plain,
}

impl CallParser {
    /// A parser at the beginning of an answer.
    pub fn new(
        family: Family,
        names: impl IntoIterator<Item = String>,
        single: bool,
    ) -> CallParser {
        CallParser {
            family,
            names: names.into_iter().collect(),
            single,
            trusting: false,
            state: match family {
                Family::Llama => State::Start,
                Family::Hermes | Family::Mistral => State::Text,
            },
            held: String::new(),
            calls: 0,
            told: None,
        }
    }

    /// The same for text that a grammar binds: what begins as a call is one.
    #[must_use]
    pub fn trusting(self) -> CallParser {
        CallParser {
            trusting: true,
            ..self
        }
    }

    /// How calls are spelt.
    pub fn family(&self) -> Family {
        self.family
    }

    /// Whether the one call that is wanted is complete: the answer is over.
    pub fn is_over(&self) -> bool {
        self.single && self.calls > 0
    }

    /// Takes more text.
    pub fn push(&mut self, text: &str, out: &mut Parsed) {
        // What turns out to be no call is looked at again: the next character is the last one here.
        let mut pending: Vec<char> = text.chars().rev().collect();
        while let Some(c) = pending.pop() {
            if self.is_over() {
                return;
            }
            self.take(c, &mut pending, out);
        }
        self.tell_arguments(out);
    }

    /// The text is over: what is held back is no call.
    pub fn finish(&mut self, out: &mut Parsed) {
        let held = std::mem::take(&mut self.held);
        match std::mem::replace(&mut self.state, State::Plain) {
            _ if self.is_over() => {}
            // A mark that is cut off behind a call is part of that call's spelling.
            State::After | State::Before { again: true } => {}
            State::Text if self.calls > 0 && held.trim().is_empty() => {}
            State::Call(_) if self.told.is_some() => {}
            State::Call(scan) => {
                out.text.push_str(&held);
                out.text.push_str(&scan.text);
            }
            _ => out.text.push_str(&held),
        }
    }

    fn take(&mut self, c: char, pending: &mut Vec<char>, out: &mut Parsed) {
        match &mut self.state {
            State::Plain => out.text.push(c),
            State::Start => self.at_start(c, out),
            State::Text => self.in_text(c, out),
            State::List if c == '[' => {
                self.held.push(c);
                self.state = State::Before { again: false };
            }
            State::Before { .. } if c == '{' => self.state = State::Call(CallScan::begun()),
            State::List | State::Before { .. }
                if is_blank(c) && self.held.len() < 2 * BLANKS_MAX =>
            {
                self.held.push(c);
            }
            State::List | State::Before { .. } => {
                pending.push(c);
                self.give_up(out);
            }
            State::After => self.after(c, pending),
            State::Call(scan) => match scan.take(c) {
                Ok(false) => {}
                Ok(true) => self.end_call(pending, out),
                Err(_) => self.no_call(pending, out),
            },
        }
    }

    /// What is held becomes text.
    fn give_up(&mut self, out: &mut Parsed) {
        out.text.push_str(&self.held);
        self.held.clear();
        self.state = self.text_state();
    }

    fn text_state(&self) -> State {
        match self.family {
            Family::Llama => State::Plain,
            Family::Hermes | Family::Mistral => State::Text,
        }
    }

    fn at_start(&mut self, c: char, out: &mut Parsed) {
        self.held.push(c);
        let text = self.held.trim_start_matches(is_blank);
        let behind = text
            .strip_prefix(PYTHON_TAG)
            .map(|rest| rest.trim_start_matches(is_blank));
        if behind.unwrap_or(text) == "{" {
            self.held.pop();
            self.state = State::Call(CallScan::begun());
            return;
        }
        let may_go_on = behind.map_or(PYTHON_TAG.starts_with(text), str::is_empty);
        if !may_go_on || self.held.len() > BLANKS_MAX {
            self.give_up(out);
        }
    }

    fn in_text(&mut self, c: char, out: &mut Parsed) {
        let mark = self.family.mark();
        self.held.push(c);
        // The longest end that may be blanks and the beginning of a mark.
        let may_open = |text: &str| mark.starts_with(text.trim_start_matches(is_blank));
        let starts = self.held.char_indices().map(|(at, _)| at);
        let beyond = self.held.len().saturating_sub(BLANKS_MAX + mark.len());
        let mut starts = starts.filter(|&at| at >= beyond);
        let keep = starts.find(|&at| may_open(&self.held[at..]));
        let keep = keep.unwrap_or(self.held.len());
        out.text.push_str(&self.held[..keep]);
        self.held.drain(..keep);
        if self.held.ends_with(mark) {
            self.state = match self.family {
                Family::Mistral => State::List,
                Family::Hermes | Family::Llama => State::Before { again: false },
            };
        }
    }

    fn after(&mut self, c: char, pending: &mut Vec<char>) {
        self.held.push(c);
        let text = self.held.trim_start_matches(is_blank);
        let next = match (self.family, text) {
            (_, "") => None,
            (Family::Hermes, CLOSING) | (Family::Mistral, "]") => Some(State::Text),
            (Family::Hermes, text) if CLOSING.starts_with(text) => None,
            (Family::Mistral, ",") | (Family::Llama, ";") => Some(State::Before { again: true }),
            (Family::Llama, "{") => Some(State::Call(CallScan::begun())),
            _ => {
                pending.extend(self.held.drain(..).rev());
                self.state = self.text_state();
                return;
            }
        };
        match next {
            None if self.held.len() <= BLANKS_MAX => {}
            None => {
                pending.extend(self.held.drain(..).rev());
                self.state = self.text_state();
            }
            Some(state) => {
                // What stands between calls is told only if no call follows it.
                match state {
                    State::Text => self.held.clear(),
                    State::Call(_) => drop(self.held.pop()),
                    _ => {}
                }
                self.state = state;
            }
        }
    }

    /// The call at hand is complete.
    fn end_call(&mut self, pending: &mut Vec<char>, out: &mut Parsed) {
        let known = match &self.state {
            State::Call(scan) => scan
                .name
                .as_ref()
                .is_some_and(|name| self.names.contains(name)),
            _ => false,
        };
        if !known {
            return self.no_call(pending, out);
        }
        self.begin_call(out);
        self.tell_arguments(out);
        let index = self.calls;
        if let (State::Call(scan), Some(0)) = (&self.state, self.told)
            && scan.arguments().is_none()
        {
            out.calls.push(part(index, "{}"));
        }
        self.calls += 1;
        self.told = None;
        self.held.clear();
        self.state = State::After;
    }

    /// The call at hand is none: it is looked at again, as text.
    fn no_call(&mut self, pending: &mut Vec<char>, out: &mut Parsed) {
        let State::Call(scan) = std::mem::replace(&mut self.state, State::Plain) else {
            return;
        };
        if self.told.take().is_some() {
            // It was told of as a call by somebody who was sure of it, and stays one.
            self.calls += 1;
            return;
        }
        pending.extend(scan.text.chars().rev());
        self.give_up(out);
    }

    /// Tells the arguments' new part of a call that is sure to be one.
    fn tell_arguments(&mut self, out: &mut Parsed) {
        if self.trusting {
            self.begin_sure_call(out);
        }
        let (State::Call(scan), Some(told)) = (&self.state, self.told) else {
            return;
        };
        let arguments = scan.arguments().unwrap_or_default();
        if arguments.len() > told {
            out.calls.push(part(self.calls, &arguments[told..]));
            self.told = Some(arguments.len());
        }
    }

    /// Begins the call at hand as soon as its name and the beginning of its arguments are there.
    fn begin_sure_call(&mut self, out: &mut Parsed) {
        if let State::Call(scan) = &self.state
            && scan.arguments().is_some()
            && scan
                .name
                .as_ref()
                .is_some_and(|name| self.names.contains(name))
        {
            self.begin_call(out);
        }
    }

    fn begin_call(&mut self, out: &mut Parsed) {
        if self.told.is_some() {
            return;
        }
        let State::Call(scan) = &self.state else {
            return;
        };
        out.calls.push(ToolCallDelta {
            index: self.calls,
            id: Some(call_id(self.family)),
            name: scan.name.clone(),
            arguments: String::new(),
        });
        self.told = Some(0);
    }
}

fn part(index: u32, arguments: &str) -> ToolCallDelta {
    ToolCallDelta {
        index,
        arguments: arguments.to_owned(),
        ..ToolCallDelta::default()
    }
}

fn is_blank(c: char) -> bool {
    matches!(c, ' ' | '\n' | '\r' | '\t')
}

/// A new call's id. Mistral's templates refuse any but nine letters and digits.
fn call_id(family: Family) -> String {
    let letters = |count| -> String {
        let letters = rand::rng().sample_iter(Alphanumeric).take(count);
        letters.map(char::from).collect()
    };
    match family {
        Family::Mistral => letters(9),
        Family::Hermes | Family::Llama => format!("call_{}", letters(24)),
    }
}

#[cfg(test)]
mod tests;
