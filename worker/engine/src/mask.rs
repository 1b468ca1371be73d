//! What outputs are bound to: which tokens may come next, as the engine sees it.
//!
//! Owns the sets, when they are computed and what they do to a row of logits. Knows no grammar: what a set is made of is
//! told by a [`TokenMask`]. A set depends on the outputs alone, so it does not matter who computes it, or when: a thread
//! beside the forward pass (`MaskAhead`) comes first where it can, and the sampler does what is left.

use crate::request::SequenceError;
use std::fmt;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Masks that wait for the thread beside the forward pass; the sampler computes the others.
const QUEUE_MAX: usize = 1024;

/// Token ids per word of a set.
const WORD_BITS: usize = u32::BITS as usize;

/// A set of token ids.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TokenSet {
    words: Vec<u32>,
}

impl TokenSet {
    /// Makes this the set of these bits: id 0 is the lowest bit of the first word.
    pub fn copy_from(&mut self, words: &[u32]) {
        self.words.clear();
        self.words.extend_from_slice(words);
    }

    /// Adds an id.
    pub fn insert(&mut self, id: u32) {
        let word = id as usize / WORD_BITS;
        if word >= self.words.len() {
            self.words.resize(word + 1, 0);
        }
        self.words[word] |= 1 << (id as usize % WORD_BITS);
    }

    /// Whether the id is in it.
    pub fn contains(&self, id: u32) -> bool {
        let word = self.words.get(id as usize / WORD_BITS).unwrap_or(&0);
        word >> (id as usize % WORD_BITS) & 1 == 1
    }

    /// Sets the logits of all other ids to minus infinity. False when none is left.
    fn restrict(&self, logits: &mut [f32]) -> bool {
        let known = self.words.len() * WORD_BITS;
        let mut any = false;
        for (&word, logits) in self.words.iter().zip(logits.chunks_mut(WORD_BITS)) {
            if word == u32::MAX {
                any = true;
                continue;
            }
            for (bit, x) in logits.iter_mut().enumerate() {
                if word >> bit & 1 == 0 {
                    *x = f32::NEG_INFINITY;
                } else {
                    any = true;
                }
            }
        }
        if let Some(rest) = logits.get_mut(known..) {
            rest.fill(f32::NEG_INFINITY);
        }
        any
    }
}

/// Whether an output may go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
    /// It may, or must.
    Open,
    /// It is complete, and nothing may follow.
    Complete,
}

/// Why a mask is of no more use; its sequence ends with it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct MaskError(pub String);

/// What one output is bound to. Must be a function of the tokens accepted so far: never of the time, of chance, or of
/// other outputs.
pub trait TokenMask: Send + Sync {
    /// Makes `allowed` the set of tokens that may come next; end tokens are among them where the output may end.
    ///
    /// # Errors
    /// [`MaskError`] when the set cannot be told within the mask's own limits.
    fn allowed(&mut self, allowed: &mut TokenSet) -> Result<(), MaskError>;

    /// The output goes on with a token, one of those last allowed.
    ///
    /// # Errors
    /// [`MaskError`] when it cannot.
    fn accept(&mut self, token: u32) -> Result<Next, MaskError>;

    /// Another one in the same place.
    fn another(&self) -> Box<dyn TokenMask>;
}

impl Clone for Box<dyn TokenMask> {
    fn clone(&self) -> Self {
        self.another()
    }
}

impl fmt::Debug for dyn TokenMask {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("TokenMask")
    }
}

/// A sequence's mask with its next set, which is computed once.
#[derive(Debug)]
pub struct MaskSlot {
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    mask: Box<dyn TokenMask>,
    allowed: TokenSet,
    /// Whether `allowed` is that of the next token, or cannot be told; `None` before it is computed.
    known: Option<Result<(), MaskError>>,
}

impl MaskSlot {
    /// A slot whose set is not computed yet.
    #[must_use]
    pub fn new(mask: Box<dyn TokenMask>) -> Arc<MaskSlot> {
        let state = State {
            mask,
            allowed: TokenSet::default(),
            known: None,
        };
        Arc::new(MaskSlot {
            state: Mutex::new(state),
        })
    }

    /// Computes the set of the next token, unless that is done. Waits for whoever is at it.
    pub fn compute(&self) {
        // The sampler, who will ask again, is told of an error.
        let _ = self.lock().compute();
    }

    /// Takes from a row the tokens that may not come next.
    ///
    /// # Errors
    /// [`SequenceError::Mask`] when the mask fails, or no token of the row is left.
    pub fn restrict(&self, logits: &mut [f32]) -> Result<(), SequenceError> {
        let mut state = self.lock();
        state.compute().map_err(SequenceError::Mask)?;
        if state.allowed.restrict(logits) {
            return Ok(());
        }
        let none = "no token of this model's vocabulary can follow";
        Err(SequenceError::Mask(MaskError(none.to_owned())))
    }

    /// The output goes on with a token.
    ///
    /// # Errors
    /// [`SequenceError::Mask`] when the mask fails.
    pub fn accept(&self, token: u32) -> Result<Next, SequenceError> {
        let mut state = self.lock();
        state.known = None;
        state.mask.accept(token).map_err(SequenceError::Mask)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn compute(&mut self) -> Result<(), MaskError> {
        let State {
            mask,
            allowed,
            known,
        } = self;
        known.get_or_insert_with(|| mask.allowed(allowed)).clone()
    }
}

/// A thread that computes masks while the device is at the forward pass. It starts with the first mask, and ends when
/// this is dropped.
pub(crate) struct MaskAhead {
    name: String,
    thread: Option<SyncSender<Arc<MaskSlot>>>,
}

impl MaskAhead {
    pub fn new(engine: &str) -> MaskAhead {
        MaskAhead {
            name: format!("{engine}-masks"),
            thread: None,
        }
    }

    /// Begins to compute these. What does not get a place in the queue is left to the sampler, and so is everything
    /// when there is no thread.
    pub fn compute<'a>(&mut self, slots: impl Iterator<Item = &'a Arc<MaskSlot>>) {
        for slot in slots {
            if self.thread.is_none() {
                self.thread = start(&self.name);
            }
            let sent = self
                .thread
                .as_ref()
                .map(|thread| thread.try_send(slot.clone()));
            if !matches!(sent, Some(Ok(()))) {
                return;
            }
        }
    }
}

fn start(name: &str) -> Option<SyncSender<Arc<MaskSlot>>> {
    let (slots, queue): (_, Receiver<Arc<MaskSlot>>) = sync_channel(QUEUE_MAX);
    let thread = std::thread::Builder::new().name(name.to_owned());
    let started = thread.spawn(move || queue.into_iter().for_each(|slot| slot.compute()));
    if let Err(error) = &started {
        tracing::warn!(%error, "no thread for masks: the sampler computes them");
    }
    started.ok().map(|_| slots)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// Allows the last token plus 1 or 2, modulo the vocabulary (each third time only plus 1), and ends after `left`
    /// tokens.
    #[derive(Clone)]
    pub(crate) struct Steps {
        pub vocab: u32,
        pub last: u32,
        pub left: u32,
    }

    impl TokenMask for Steps {
        fn allowed(&mut self, allowed: &mut TokenSet) -> Result<(), MaskError> {
            if self.vocab == 0 {
                return Err(MaskError("it has no vocabulary".into()));
            }
            allowed.copy_from(&[]);
            allowed.insert((self.last + 1) % self.vocab);
            if !self.left.is_multiple_of(3) {
                allowed.insert((self.last + 2) % self.vocab);
            }
            Ok(())
        }

        fn accept(&mut self, token: u32) -> Result<Next, MaskError> {
            self.last = token;
            self.left = self.left.saturating_sub(1);
            Ok(if self.left == 0 {
                Next::Complete
            } else {
                Next::Open
            })
        }

        fn another(&self) -> Box<dyn TokenMask> {
            Box::new(self.clone())
        }
    }

    fn slot(vocab: u32, last: u32) -> Arc<MaskSlot> {
        MaskSlot::new(Box::new(Steps {
            vocab,
            last,
            left: 2,
        }))
    }

    fn left(logits: &[f32]) -> Vec<usize> {
        let kept = logits.iter().enumerate().filter(|(_, x)| x.is_finite());
        kept.map(|(id, _)| id).collect()
    }

    #[test]
    fn a_row_keeps_the_tokens_of_the_set_alone_whatever_the_lengths_are() {
        for vocab in [5, 31, 32, 33, 100] {
            for len in [5, 32, 40, 100] {
                let mut logits = vec![1.0; len];
                let wanted: Vec<usize> = [vocab - 1, 0]
                    .into_iter()
                    .map(|id| id as usize)
                    .filter(|&id| id < len)
                    .collect();
                let mut expected = wanted.clone();
                expected.sort_unstable();
                assert_eq!(slot(vocab, vocab - 2).restrict(&mut logits), Ok(()));
                assert_eq!(left(&logits), expected, "vocab {vocab}, row {len}");
            }
        }
    }

    #[test]
    fn a_full_word_changes_nothing() {
        let mut set = TokenSet::default();
        set.copy_from(&[u32::MAX, 0b10]);
        let mut logits = vec![1.0; 64];
        assert!(set.restrict(&mut logits));
        let expected: Vec<usize> = (0..32).chain([33]).collect();
        assert_eq!(left(&logits), expected);
        assert!(set.contains(31) && !set.contains(32) && set.contains(33) && !set.contains(64));
    }

    #[test]
    fn a_mask_that_fails_or_allows_nothing_is_an_error_of_its_sequence() {
        let failed = slot(0, 0).restrict(&mut [1.0; 8]).unwrap_err();
        assert!(
            failed.to_string().contains("it has no vocabulary"),
            "{failed}"
        );
        let outside = slot(100, 50).restrict(&mut [1.0; 8]).unwrap_err();
        assert!(outside.to_string().contains("no token"), "{outside}");
    }

    #[test]
    fn it_does_not_matter_who_computes_a_set() {
        let mut ahead = MaskAhead::new("test");
        let slots: Vec<_> = (0..2000).map(|last| slot(4096, last)).collect();
        ahead.compute(slots.iter());
        for (last, slot) in (0..).zip(&slots) {
            let mut logits = vec![0.0; 4096];
            slot.restrict(&mut logits).unwrap();
            assert_eq!(left(&logits), [last + 1, last + 2]);
            assert_eq!(slot.accept(last as u32 + 2), Ok(Next::Open));
            let mut logits = vec![0.0; 4096];
            slot.restrict(&mut logits).unwrap();
            assert_eq!(
                left(&logits),
                [last + 3, last + 4],
                "the set after the next token"
            );
            assert_eq!(slot.accept(0), Ok(Next::Complete));
        }
    }
}
