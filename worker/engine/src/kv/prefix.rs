//! Names of full KV blocks: a keyed hash chained over all tokens up to the block's end.
//!
//! Two blocks with one name hold the K and V of the same prefix. The key keeps outsiders from forging a name; it is
//! equal on all workers that shall recognise each other's names. Owns no blocks: see [`super::blocks`].

use crate::plan::BLOCK_TOKENS;
use sha2::{Digest, Sha256};

/// Name of a full block: 128 bits of SHA-256 over key, parent's name and the block's tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct BlockHash([u8; 16]);

/// Names blocks under one key.
#[derive(Clone)]
pub struct PrefixHasher {
    keyed: Sha256,
}

impl PrefixHasher {
    /// A hasher under the key `salt`: whatever makes K and V differ or must not be shared (cluster secret, model,
    /// version, adapter).
    pub fn new(salt: &[u8]) -> Self {
        // The salt is digested first, so that salts of any length give inputs of one length: no two can collide by
        // moving a border.
        let key = Sha256::digest(salt);
        PrefixHasher {
            keyed: Sha256::new_with_prefix(key),
        }
    }

    /// The name of the block that holds `tokens` after the block named `parent` (`None`: the sequence's first block).
    pub fn name(&self, parent: Option<BlockHash>, tokens: &[u32; BLOCK_TOKENS]) -> BlockHash {
        let mut hasher = self.keyed.clone();
        hasher.update(parent.map_or([0; 16], |parent| parent.0));
        hasher.update(bytemuck::bytes_of(&tokens.map(u32::to_le)));
        let digest: [u8; 32] = hasher.finalize().into();
        let mut name = [0; 16];
        name.copy_from_slice(&digest[..16]);
        BlockHash(name)
    }

    /// Extends `names` to all full blocks of `tokens`. Names already there are taken as those of the same tokens.
    pub fn extend(&self, names: &mut Vec<BlockHash>, tokens: &[u32]) {
        let (full, _) = tokens.as_chunks::<BLOCK_TOKENS>();
        for block in full.iter().skip(names.len()) {
            names.push(self.name(names.last().copied(), block));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(salt: &str, tokens: &[u32]) -> Vec<BlockHash> {
        let mut names = Vec::new();
        PrefixHasher::new(salt.as_bytes()).extend(&mut names, tokens);
        names
    }

    #[test]
    fn only_full_blocks_have_names() {
        assert_eq!(names("k", &[7; 15]).len(), 0);
        assert_eq!(names("k", &[7; 33]).len(), 2);
    }

    #[test]
    fn a_name_depends_on_key_parent_and_tokens() {
        let base = names("k", &[7; 32]);
        assert_eq!(base, names("k", &[7; 32]));
        assert_ne!(base[0], base[1], "the same tokens after another parent");
        assert_ne!(base[0], names("other", &[7; 32])[0]);
        let mut tokens = [7; 32];
        tokens[0] = 8;
        let changed = names("k", &tokens);
        assert_ne!(base[0], changed[0]);
        assert_ne!(base[1], changed[1], "the parent's change reaches the child");
    }

    #[test]
    fn names_grow_with_the_sequence() {
        let hasher = PrefixHasher::new(b"k");
        let tokens: Vec<u32> = (0..64).collect();
        let mut grown = Vec::new();
        for len in 0..=64 {
            hasher.extend(&mut grown, &tokens[..len]);
        }
        assert_eq!(grown, names("k", &tokens));
    }
}
