//! Who uses which KV block: reference counts, the list of free blocks, and the names of blocks that hold a prefix.
//!
//! A freed block keeps its name until it is given out again, so "free" and "cached" are the same state. Owns ids
//! only, no memory. Pure.

use super::prefix::BlockHash;
use crate::plan::NULL_BLOCK;
use std::collections::HashMap;

/// Gives out blocks `1..N`; block 0 is the null block.
///
/// Free blocks form a doubly linked ring through the array, with the null block as its ends: its `next` is the block
/// to be given out first, its `prev` the one to be given out last.
pub struct BlockManager {
    blocks: Vec<Block>,
    free: usize,
    /// Blocks by name. Twins (computed by two sequences at the same time) are kept apart: tables never change.
    named: HashMap<BlockHash, Vec<u32>>,
}

#[derive(Clone, Default)]
struct Block {
    refs: u32,
    name: Option<BlockHash>,
    prev: u32,
    next: u32,
}

impl BlockManager {
    /// A manager of `count` blocks, the null block included. All are free and nameless.
    pub fn new(count: u32) -> Self {
        let mut manager = BlockManager {
            blocks: vec![Block::default(); count.max(1) as usize],
            free: 0,
            named: HashMap::new(),
        };
        for id in 1..count {
            manager.link_last(id);
        }
        manager
    }

    /// Blocks that can be given out.
    pub fn free_count(&self) -> usize {
        self.free
    }

    /// Blocks in the pool, the null block left out.
    pub fn total(&self) -> usize {
        self.blocks.len() - 1
    }

    /// Blocks that some sequence holds.
    pub fn used_count(&self) -> usize {
        self.total() - self.free
    }

    /// How many tables hold the block.
    pub fn refs(&self, id: u32) -> u32 {
        self.blocks[id as usize].refs
    }

    /// A block with this name; one in use before a free one, which would cost capacity.
    pub fn find(&self, name: &BlockHash) -> Option<u32> {
        let ids = self.named.get(name)?;
        ids.iter()
            .copied()
            .find(|&id| self.refs(id) > 0)
            .or(ids.first().copied())
    }

    /// Takes one more reference to each block (null blocks are skipped). Do this to a prefix hit before
    /// [`BlockManager::allocate`], which could give the hit itself away otherwise.
    pub fn touch(&mut self, ids: &[u32]) {
        for &id in ids.iter().filter(|&&id| id != NULL_BLOCK) {
            if self.refs(id) == 0 {
                self.unlink(id);
            }
            self.blocks[id as usize].refs += 1;
        }
    }

    /// Gives out `count` blocks with one reference each, least recently used first; their names are forgotten.
    /// `None`, and nothing changed, when fewer are free.
    pub fn allocate(&mut self, count: usize) -> Option<Vec<u32>> {
        if count > self.free {
            return None;
        }
        let mut ids = Vec::with_capacity(count);
        for _ in 0..count {
            let id = self.blocks[NULL_BLOCK as usize].next;
            self.unlink(id);
            self.forget(id);
            self.blocks[id as usize].refs = 1;
            ids.push(id);
        }
        Some(ids)
    }

    /// Names a full block that the caller holds.
    pub fn commit(&mut self, id: u32, name: BlockHash) {
        let block = &mut self.blocks[id as usize];
        debug_assert!(block.refs > 0, "a block is named by its holder");
        if block.name.is_none() {
            block.name = Some(name);
            self.named.entry(name).or_default().push(id);
        }
    }

    /// Gives back one reference to each block of a table, the last block first: the deepest prefix, least likely to be
    /// shared, is given out before its parents. Blocks without a name are worth nothing and go first of all. Null
    /// blocks are skipped.
    pub fn release(&mut self, ids: &[u32]) {
        for &id in ids.iter().rev().filter(|&&id| id != NULL_BLOCK) {
            let block = &mut self.blocks[id as usize];
            debug_assert!(
                block.refs > 0,
                "block {id} is released by someone who holds it"
            );
            block.refs -= 1;
            match (block.refs, block.name) {
                (0, Some(_)) => self.link_last(id),
                (0, None) => self.link_first(id),
                _ => {}
            }
        }
    }

    fn forget(&mut self, id: u32) {
        let Some(name) = self.blocks[id as usize].name.take() else {
            return;
        };
        if let Some(ids) = self.named.get_mut(&name) {
            ids.retain(|&other| other != id);
            if ids.is_empty() {
                self.named.remove(&name);
            }
        }
    }

    fn link_last(&mut self, id: u32) {
        let last = self.blocks[NULL_BLOCK as usize].prev;
        self.link_between(last, id, NULL_BLOCK);
    }

    fn link_first(&mut self, id: u32) {
        let first = self.blocks[NULL_BLOCK as usize].next;
        self.link_between(NULL_BLOCK, id, first);
    }

    fn link_between(&mut self, prev: u32, id: u32, next: u32) {
        self.blocks[id as usize].prev = prev;
        self.blocks[id as usize].next = next;
        self.blocks[prev as usize].next = id;
        self.blocks[next as usize].prev = id;
        self.free += 1;
    }

    fn unlink(&mut self, id: u32) {
        let Block { prev, next, .. } = self.blocks[id as usize];
        self.blocks[prev as usize].next = next;
        self.blocks[next as usize].prev = prev;
        self.free -= 1;
    }

    /// Panics unless the free list, reference counts and names agree with each other and with `tables`, the tables of
    /// all sequences.
    #[cfg(test)]
    pub(crate) fn check_invariants<'a>(&self, tables: impl Iterator<Item = &'a [u32]>) {
        let mut expected = vec![0u32; self.blocks.len()];
        for &id in tables.flatten().filter(|&&id| id != NULL_BLOCK) {
            expected[id as usize] += 1;
        }
        let refs: Vec<u32> = self.blocks.iter().map(|block| block.refs).collect();
        assert_eq!(
            refs, expected,
            "references are the tables' entries; the null block has none"
        );

        let mut listed = vec![false; self.blocks.len()];
        let (mut at, mut count) = (NULL_BLOCK, 0);
        loop {
            let next = self.blocks[at as usize].next;
            assert_eq!(
                self.blocks[next as usize].prev, at,
                "links agree in both directions"
            );
            if next == NULL_BLOCK {
                break;
            }
            assert!(
                !std::mem::replace(&mut listed[next as usize], true),
                "block {next} is free once"
            );
            (at, count) = (next, count + 1);
        }
        assert_eq!(count, self.free, "the list holds the free blocks");
        for (id, block) in self.blocks.iter().enumerate().skip(1) {
            assert_eq!(
                listed[id],
                block.refs == 0,
                "block {id} is either free or referenced"
            );
        }

        let mut named = 0;
        for (name, ids) in &self.named {
            assert!(!ids.is_empty());
            named += ids.len();
            ids.iter()
                .for_each(|&id| assert_eq!(self.blocks[id as usize].name, Some(*name)));
        }
        assert_eq!(
            named,
            self.blocks
                .iter()
                .filter(|block| block.name.is_some())
                .count()
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kv::prefix::PrefixHasher;
    use crate::scheduler::fake::Rng;

    fn name(n: u32) -> BlockHash {
        PrefixHasher::new(b"test").name(None, &[n; 16])
    }

    fn named(manager: &mut BlockManager, names: std::ops::Range<u32>) -> Vec<u32> {
        let ids = manager.allocate(names.len()).expect("blocks are free");
        ids.iter()
            .zip(names)
            .for_each(|(&id, n)| manager.commit(id, name(n)));
        ids
    }

    #[test]
    fn too_large_an_allocation_changes_nothing() {
        let mut manager = BlockManager::new(5);
        let held = named(&mut manager, 0..2);
        assert_eq!(manager.allocate(3), None);
        assert_eq!(manager.free_count(), 2);
        manager.check_invariants([&held[..]].into_iter());
        assert_eq!(manager.allocate(2).map(|ids| ids.len()), Some(2));
    }

    #[test]
    fn the_null_block_is_never_given_out() {
        let mut manager = BlockManager::new(4);
        let ids = manager
            .allocate(3)
            .expect("three blocks beside the null block");
        assert!(!ids.contains(&NULL_BLOCK));
        manager.release(&[NULL_BLOCK, ids[0]]);
        manager.touch(&[NULL_BLOCK]);
        manager.check_invariants([&ids[1..]].into_iter());
    }

    #[test]
    fn freed_blocks_stay_cached_and_the_deepest_goes_first() {
        let mut manager = BlockManager::new(4);
        let ids = named(&mut manager, 0..3);
        manager.release(&ids);
        assert_eq!(manager.free_count(), 3);
        assert_eq!(
            (0..3).map(|n| manager.find(&name(n))).collect::<Vec<_>>(),
            ids.iter().map(|&id| Some(id)).collect::<Vec<_>>()
        );
        assert_eq!(manager.allocate(1), Some(vec![ids[2]]));
        assert_eq!(manager.find(&name(2)), None);
        assert_eq!(manager.find(&name(0)), Some(ids[0]));
    }

    #[test]
    fn nameless_blocks_are_given_out_before_cached_ones() {
        let mut manager = BlockManager::new(4);
        let cached = named(&mut manager, 0..2);
        let plain = manager.allocate(1).expect("one is free");
        manager.release(&cached);
        manager.release(&plain);
        assert_eq!(manager.allocate(1), Some(plain));
    }

    #[test]
    fn a_touched_hit_survives_an_allocation_of_everything_else() {
        let mut manager = BlockManager::new(4);
        let ids = named(&mut manager, 0..3);
        manager.release(&ids);
        let hit = manager.find(&name(2)).expect("cached");
        manager.touch(&[hit]);
        assert_eq!(manager.allocate(3), None);
        let others = manager.allocate(2).expect("two are left");
        assert!(!others.contains(&hit));
        assert_eq!(manager.find(&name(2)), Some(hit));
    }

    #[test]
    fn of_twins_the_one_in_use_is_found_and_each_is_forgotten_alone() {
        let mut manager = BlockManager::new(3);
        let first = named(&mut manager, 0..1);
        let twin = named(&mut manager, 0..1);
        manager.release(&first);
        assert_eq!(manager.find(&name(0)), Some(twin[0]));
        assert_eq!(manager.allocate(1), Some(first));
        assert_eq!(manager.find(&name(0)), Some(twin[0]));
    }

    #[test]
    fn random_steps_break_no_invariant() {
        let mut rng = Rng(1);
        for blocks in 8..20 {
            let mut manager = BlockManager::new(blocks);
            let mut tables: Vec<Vec<u32>> = Vec::new();
            for _ in 0..4_000 {
                let pick = rng.next() as u32;
                match pick % 4 {
                    0 => {
                        let count = (pick >> 8) as usize % 5;
                        let free = manager.free_count();
                        let given = manager.allocate(count);
                        assert_eq!(given.is_some(), count <= free);
                        tables.extend(given);
                    }
                    1 if !tables.is_empty() => {
                        let table = tables.swap_remove((pick >> 8) as usize % tables.len());
                        manager.release(&table);
                    }
                    2 => {
                        if let Some(id) = manager.find(&name((pick >> 8) % 6)) {
                            manager.touch(&[id]);
                            tables.push(vec![id]);
                        }
                    }
                    _ => {
                        if let Some(&id) = tables.last().and_then(|table| table.first()) {
                            manager.commit(id, name((pick >> 8) % 6));
                        }
                    }
                }
                manager.check_invariants(tables.iter().map(Vec::as_slice));
            }
            tables.iter().for_each(|table| manager.release(table));
            assert_eq!(manager.free_count(), blocks as usize - 1);
        }
    }
}
