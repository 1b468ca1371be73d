//! One sequence's block table: grows with the sequence, slides with the window, shares what is cached.
//!
//! Owns the table's entries and the names of its blocks; the counts behind them are the [`BlockManager`]'s. Pure.

use super::blocks::BlockManager;
use super::prefix::{BlockHash, PrefixHasher};
use crate::plan::{BLOCK_TOKENS, NULL_BLOCK, first_visible_block};

/// Block `i` of the table holds positions `16*i .. 16*i+16`.
#[derive(Default)]
pub struct BlockTable {
    blocks: Vec<u32>,
    /// Names of the sequence's full blocks, memorised: tokens only ever get appended.
    names: Vec<BlockHash>,
    /// Leading blocks of the table that bear their name.
    committed: usize,
    /// Leading blocks of the table that slid out of the window.
    slid: usize,
}

/// The longest cached prefix of a sequence. Holds no references yet.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Hit {
    /// The table's first entries, null behind the window.
    pub blocks: Vec<u32>,
    /// How many of them are free now and will be no more.
    pub free: usize,
}

impl Hit {
    /// Tokens that need not be computed.
    pub fn tokens(&self) -> usize {
        self.blocks.len() * BLOCK_TOKENS
    }

    /// Blocks that the sequence will hold.
    pub fn held(&self) -> usize {
        self.blocks.iter().filter(|&&id| id != NULL_BLOCK).count()
    }
}

impl BlockTable {
    /// The entries.
    pub fn blocks(&self) -> &[u32] {
        &self.blocks
    }

    /// Blocks that the table holds, those behind the window left out.
    pub fn held(&self) -> usize {
        self.blocks.len() - self.slid
    }

    /// Finds the longest prefix of `tokens` whose visible blocks are all cached. At least the last token is left to
    /// compute: its logits are wanted. With a sliding window, blocks that the next token does not see may be gone.
    pub fn lookup(
        &mut self,
        manager: &BlockManager,
        hasher: &PrefixHasher,
        tokens: &[u32],
        window: Option<u32>,
    ) -> Hit {
        hasher.extend(&mut self.names, tokens);
        let most = tokens.len().saturating_sub(1) / BLOCK_TOKENS;
        let mut found: Vec<u32> = Vec::with_capacity(most);
        let (mut run_start, mut hit_len) = (0, 0);
        for name in &self.names[..most] {
            found.push(manager.find(name).unwrap_or(NULL_BLOCK));
            if found.last() == Some(&NULL_BLOCK) {
                if window.is_none() {
                    break;
                }
                run_start = found.len();
            } else if run_start <= first_visible_block(found.len() * BLOCK_TOKENS, window) {
                hit_len = found.len();
            }
        }
        found.truncate(hit_len);
        let visible = first_visible_block(hit_len * BLOCK_TOKENS, window).min(hit_len);
        found[..visible].fill(NULL_BLOCK);
        let free = found[visible..]
            .iter()
            .filter(|&&id| manager.refs(id) == 0)
            .count();
        Hit {
            blocks: found,
            free,
        }
    }

    /// Starts an empty table with a hit, taking its references.
    pub fn adopt(&mut self, manager: &mut BlockManager, hit: Hit) {
        debug_assert!(self.blocks.is_empty(), "a hit starts a table");
        manager.touch(&hit.blocks);
        self.slid = hit
            .blocks
            .iter()
            .take_while(|&&id| id == NULL_BLOCK)
            .count();
        self.committed = hit.blocks.len();
        self.blocks = hit.blocks;
    }

    /// Makes room for `tokens` tokens in all. False, and nothing changed, when too few blocks are free.
    #[must_use]
    pub fn grow(&mut self, manager: &mut BlockManager, tokens: usize) -> bool {
        let missing = tokens
            .div_ceil(BLOCK_TOKENS)
            .saturating_sub(self.blocks.len());
        match manager.allocate(missing) {
            Some(ids) => {
                self.blocks.extend(ids);
                true
            }
            None => false,
        }
    }

    /// Names the blocks that are full once `computed`, the sequence's tokens with K and V, are in place.
    pub fn commit(&mut self, manager: &mut BlockManager, hasher: &PrefixHasher, computed: &[u32]) {
        hasher.extend(&mut self.names, computed);
        let full = computed.len() / BLOCK_TOKENS;
        for at in self.committed..full {
            manager.commit(self.blocks[at], self.names[at]);
        }
        self.committed = self.committed.max(full);
    }

    /// Gives back the blocks that a token at `position` and all later ones do not see.
    pub fn slide(&mut self, manager: &mut BlockManager, position: usize, window: Option<u32>) {
        let visible = first_visible_block(position, window).min(self.blocks.len());
        if visible > self.slid {
            manager.release(&self.blocks[self.slid..visible]);
            self.blocks[self.slid..visible].fill(NULL_BLOCK);
            self.slid = visible;
        }
    }

    /// Gives everything back. The names are kept: a recomputed sequence finds its own blocks by them.
    pub fn clear(&mut self, manager: &mut BlockManager) {
        manager.release(&self.blocks);
        self.blocks.clear();
        (self.committed, self.slid) = (0, 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filled(manager: &mut BlockManager, tokens: &[u32]) -> BlockTable {
        let mut table = BlockTable::default();
        assert!(table.grow(manager, tokens.len()));
        table.commit(manager, &hasher(), tokens);
        table
    }

    fn hasher() -> PrefixHasher {
        PrefixHasher::new(b"test")
    }

    fn lookup(manager: &BlockManager, tokens: &[u32], window: Option<u32>) -> Hit {
        BlockTable::default().lookup(manager, &hasher(), tokens, window)
    }

    #[test]
    fn a_hit_leaves_the_last_token_to_compute() {
        let mut manager = BlockManager::new(10);
        let tokens: Vec<u32> = (0..48).collect();
        let mut table = filled(&mut manager, &tokens);
        assert_eq!(lookup(&manager, &tokens, None).tokens(), 32);
        assert_eq!(lookup(&manager, &tokens[..33], None).tokens(), 32);
        assert_eq!(lookup(&manager, &tokens[..32], None).tokens(), 16);
        assert_eq!(lookup(&manager, &tokens[..5], None), Hit::default());
        assert_eq!(lookup(&manager, &tokens, None).free, 0);
        table.clear(&mut manager);
        assert_eq!(
            lookup(&manager, &tokens, None),
            Hit {
                blocks: vec![1, 2],
                free: 2
            }
        );
    }

    #[test]
    fn an_adopted_hit_is_shared_and_only_new_blocks_are_private() {
        let mut manager = BlockManager::new(10);
        let tokens: Vec<u32> = (0..40).collect();
        let first = filled(&mut manager, &tokens);
        let mut second = BlockTable::default();
        let hit = second.lookup(&manager, &hasher(), &tokens, None);
        second.adopt(&mut manager, hit);
        assert!(second.grow(&mut manager, tokens.len()));
        assert_eq!(second.blocks()[..2], first.blocks()[..2]);
        assert_ne!(second.blocks()[2], first.blocks()[2]);
        manager.check_invariants([first.blocks(), second.blocks()].into_iter());
    }

    #[test]
    fn blocks_wholly_left_of_the_window_are_given_back_but_stay_findable() {
        let mut manager = BlockManager::new(10);
        let tokens: Vec<u32> = (0..80).collect();
        let mut table = filled(&mut manager, &tokens);
        // The token at position 51 sees 32..=51 through a window of 20: blocks 0 and 1 are behind it.
        table.slide(&mut manager, 50, Some(20));
        assert_eq!(
            table.blocks()[..3],
            [NULL_BLOCK, 2, 3],
            "position 31 is still seen from position 50"
        );
        table.slide(&mut manager, 51, Some(20));
        assert_eq!(table.blocks()[..3], [NULL_BLOCK, NULL_BLOCK, 3]);
        assert_eq!(manager.free_count(), 6);
        manager.check_invariants([table.blocks()].into_iter());

        let all_free = manager.allocate(6).expect("six are free");
        manager.release(&all_free);
        assert_eq!(
            lookup(&manager, &tokens, None),
            Hit::default(),
            "blocks 0 and 1 were given out again"
        );
        let hit = lookup(&manager, &tokens, Some(20));
        assert_eq!(
            hit.blocks,
            [NULL_BLOCK, NULL_BLOCK, 3, 4],
            "the window needs only the last two blocks"
        );
        assert_eq!(hit.held(), 2);
        let hit = lookup(&manager, &tokens[..60], Some(20));
        assert_eq!(
            hit,
            Hit::default(),
            "position 48 sees position 29, which is gone"
        );
    }
}
