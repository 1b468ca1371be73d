//! Grammars as the engine's masks: the two know nothing of each other.

use engine::mask::{MaskError, Next, TokenMask, TokenSet};

use crate::text::constraint::Grammar;

/// A grammar that binds one candidate.
pub struct GrammarMask(pub Grammar);

impl TokenMask for GrammarMask {
    fn allowed(&mut self, allowed: &mut TokenSet) -> Result<(), MaskError> {
        let take = |words: &[u32]| allowed.copy_from(words);
        self.0.allowed(take).map_err(MaskError)
    }

    fn accept(&mut self, token: u32) -> Result<Next, MaskError> {
        let complete = self.0.accept(token).map_err(MaskError)?;
        Ok(if complete { Next::Complete } else { Next::Open })
    }

    fn another(&self) -> Box<dyn TokenMask> {
        Box::new(GrammarMask(self.0.clone()))
    }
}
