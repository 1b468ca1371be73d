//! A step's arrays on the device: tokens, slots, spans and block tables, in one region at fixed places.
//!
//! Owns which kernel attends for which span. The places depend on the region's capacity alone, not on the batch: a recorded
//! step finds the next batch where it found its own. One copy brings all of it.

use super::bytes;
use crate::backend::{Batch, Heads, StepShape};
use crate::plan::BLOCK_TOKENS;

/// Queries of one block of the kernel for many queries.
const TILE_QUERIES: usize = 64;

/// What the region has room for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Capacity {
    rows: usize,
    spans: usize,
    /// Entries of all block tables.
    tables: usize,
}

/// The arrays, in the order of their places. All are of 4-byte numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Array {
    /// Input ids, by row.
    Tokens,
    /// Where a row's K and V go: block * 16 + place, or -1.
    Slots,
    /// Spans of one row: their rows.
    OneRows,
    /// Their numbers of tokens in the cache, 0 for a filling.
    OneLens,
    /// Their tables' places.
    OneTables,
    /// Spans of many rows: their first rows.
    ManyRows,
    /// Their first positions.
    ManyPositions,
    /// Their numbers of rows, 0 for a filling.
    ManyLens,
    /// Their tables' places.
    ManyTables,
    /// Pairs: a span of many rows, and one of its rows in steps of [`TILE_QUERIES`].
    Tiles,
    /// All block tables.
    Tables,
}

impl Capacity {
    /// For steps up to this one.
    pub fn of(step: &StepShape) -> Capacity {
        Capacity {
            rows: step.rows,
            spans: step.spans,
            tables: step.spans * step.context_max.div_ceil(BLOCK_TOKENS),
        }
    }

    /// This, or where the batch does not fit, twice as much as needed.
    pub fn fitting(self, batch: &Batch) -> Capacity {
        let fit = |has: usize, needs: usize| if needs <= has { has } else { 2 * needs };
        Capacity {
            rows: fit(self.rows, batch.len()),
            spans: fit(self.spans, batch.spans.len()),
            tables: fit(self.tables, batch.blocks.len()),
        }
    }

    fn tiles(self) -> usize {
        self.rows / TILE_QUERIES + self.spans
    }

    /// Where an array begins, in numbers.
    fn place(self, array: Array) -> usize {
        let spans = |before: usize| 2 * self.rows + before * self.spans;
        match array {
            Array::Tokens => 0,
            Array::Slots => self.rows,
            Array::OneRows => spans(0),
            Array::OneLens => spans(1),
            Array::OneTables => spans(2),
            Array::ManyRows => spans(3),
            Array::ManyPositions => spans(4),
            Array::ManyLens => spans(5),
            Array::ManyTables => spans(6),
            Array::Tiles => spans(7),
            Array::Tables => spans(7) + 2 * self.tiles(),
        }
    }

    /// Bytes of the region.
    pub fn bytes(self) -> u64 {
        4 * (self.place(Array::Tables) + self.tables) as u64
    }
}

/// The arrays of the running step.
#[derive(Debug, Default)]
pub(super) struct StepArrays {
    pub capacity: Capacity,
    /// The region as it is on the device.
    numbers: Vec<i32>,
    /// Spans of one row, for the kernel that splits their keys.
    pub ones: usize,
    /// Blocks of the kernel for many queries.
    pub tiles: usize,
}

impl StepArrays {
    /// Fills the arrays from a batch that the capacity fits. `alike`: all spans go one way, whatever their length, so that
    /// a row's sums do not depend on the others.
    pub fn fill(&mut self, batch: &Batch, alike: bool) {
        let capacity = self.capacity;
        self.numbers.clear();
        self.numbers
            .resize(capacity.place(Array::Tables) + batch.blocks.len(), 0);
        self.put(
            Array::Tables,
            0,
            batch.blocks.iter().map(|block| *block as i32),
        );
        self.put(
            Array::Tokens,
            0,
            batch.tokens.iter().map(|token| *token as i32),
        );
        let (mut ones, mut manys) = (0, 0);
        // Block of the kernel, with the number of keys it has to see: the longest go first.
        let mut tiles: Vec<(usize, [i32; 2])> = Vec::new();
        for span in &batch.spans {
            let blocks = batch.blocks_of(span);
            let slots = (span.position..).take(span.rows.len()).map(|position| {
                let block = blocks.get(position / BLOCK_TOKENS);
                block.map_or(-1, |block| {
                    *block as i32 * BLOCK_TOKENS as i32 + (position % BLOCK_TOKENS) as i32
                })
            });
            self.put(Array::Slots, span.rows.start, slots);
            let row = span.rows.start as i32;
            // Fillings have no blocks.
            let len = if blocks.is_empty() {
                0
            } else {
                span.rows.len()
            };
            let table = span.blocks.start as i32;
            if span.rows.len() == 1 && !alike {
                let tokens = if len == 0 {
                    0
                } else {
                    span.position as i32 + 1
                };
                for (array, value) in [
                    (Array::OneRows, row),
                    (Array::OneLens, tokens),
                    (Array::OneTables, table),
                ] {
                    self.put(array, ones, [value]);
                }
                ones += 1;
                continue;
            }
            for (array, value) in [
                (Array::ManyRows, row),
                (Array::ManyPositions, span.position as i32),
                (Array::ManyLens, len as i32),
                (Array::ManyTables, table),
            ] {
                self.put(array, manys, [value]);
            }
            let firsts = (0..span.rows.len()).step_by(TILE_QUERIES);
            tiles.extend(firsts.map(|first| (span.position + first, [manys as i32, first as i32])));
            manys += 1;
        }
        tiles.sort_by_key(|(keys, _)| std::cmp::Reverse(*keys));
        self.put(Array::Tiles, 0, tiles.iter().flat_map(|(_, tile)| *tile));
        (self.ones, self.tiles) = (ones, tiles.len());
    }

    /// What is to be copied to the region's start.
    pub fn bytes(&self) -> &[u8] {
        bytemuck::cast_slice(&self.numbers)
    }

    /// Where an array is, in bytes from the region's start.
    pub fn offset(&self, array: Array) -> u64 {
        4 * self.capacity.place(array) as u64
    }

    /// Into how many parts each span of one row is split.
    pub fn splits(&self, heads: Heads) -> usize {
        bytes::splits(self.ones, heads)
    }

    fn put(&mut self, array: Array, at: usize, values: impl IntoIterator<Item = i32>) {
        let numbers = &mut self.numbers[self.capacity.place(array) + at..];
        numbers
            .iter_mut()
            .zip(values)
            .for_each(|(number, value)| *number = value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::BatchSpan;

    /// Spans of (first position, tokens); a filling where there are no blocks.
    fn batch(spans: &[(usize, usize, &[u32])]) -> Batch {
        let mut batch = Batch::default();
        for (position, len, blocks) in spans {
            let (row, block) = (batch.len(), batch.blocks.len());
            batch
                .tokens
                .extend((0..*len as u32).map(|token| 1000 + row as u32 + token));
            batch.positions.extend((*position as u32..).take(*len));
            batch.blocks.extend_from_slice(blocks);
            batch.spans.push(BatchSpan {
                rows: row..row + len,
                position: *position,
                blocks: block..batch.blocks.len(),
            });
        }
        batch
    }

    fn filled(batch: &Batch, alike: bool) -> StepArrays {
        let mut arrays = StepArrays {
            capacity: Capacity::default().fitting(batch),
            ..StepArrays::default()
        };
        arrays.fill(batch, alike);
        arrays
    }

    fn read(arrays: &StepArrays, array: Array, len: usize) -> &[i32] {
        &arrays.numbers[arrays.capacity.place(array)..][..len]
    }

    #[test]
    fn single_tokens_are_split_and_prompts_are_tiled_longest_first() {
        let batch = batch(&[
            (16, 1, &[7, 9]),
            (0, 130, &[1, 2, 3, 4, 5, 6, 8, 10, 11]),
            (0, 1, &[]),
            (5, 2, &[12]),
        ]);
        let arrays = filled(&batch, false);
        assert_eq!((arrays.ones, arrays.tiles), (2, 4));
        assert_eq!(read(&arrays, Array::OneRows, 2), [0, 131]);
        assert_eq!(read(&arrays, Array::OneLens, 2), [17, 0]);
        assert_eq!(read(&arrays, Array::OneTables, 2), [0, 11]);
        assert_eq!(read(&arrays, Array::ManyRows, 2), [1, 132]);
        assert_eq!(read(&arrays, Array::ManyPositions, 2), [0, 5]);
        assert_eq!(read(&arrays, Array::ManyLens, 2), [130, 2]);
        assert_eq!(read(&arrays, Array::ManyTables, 2), [2, 11]);
        assert_eq!(read(&arrays, Array::Tiles, 8), [0, 128, 0, 64, 1, 0, 0, 0]);
        let slots = read(&arrays, Array::Slots, 134);
        assert_eq!(
            (slots[0], slots[1], slots[17], slots[130]),
            (9 * 16, 16, 2 * 16, 11 * 16 + 1)
        );
        assert_eq!(&slots[131..], [-1, 12 * 16 + 5, 12 * 16 + 6]);
        assert_eq!(read(&arrays, Array::Tokens, 134)[133], 1133);
        assert_eq!(read(&arrays, Array::Tables, 12)[..3], [7, 9, 1]);
    }

    #[test]
    fn alike_spans_all_go_to_the_kernel_for_many_queries() {
        let arrays = filled(&batch(&[(16, 1, &[7, 9]), (0, 1, &[])]), true);
        assert_eq!((arrays.ones, arrays.tiles), (0, 2));
        assert_eq!(read(&arrays, Array::ManyLens, 2), [1, 0]);
        assert_eq!(read(&arrays, Array::ManyPositions, 2), [16, 0]);
    }

    #[test]
    fn places_depend_on_the_capacity_alone() {
        let capacity = Capacity {
            rows: 100,
            spans: 10,
            tables: 1000,
        };
        assert_eq!(capacity.fitting(&batch(&[(0, 100, &[1; 7])])), capacity);
        assert_eq!(
            capacity.fitting(&batch(&[(0, 101, &[1; 7])])),
            Capacity {
                rows: 202,
                ..capacity
            }
        );
        let order = [
            Array::Tokens,
            Array::Slots,
            Array::OneRows,
            Array::OneLens,
            Array::OneTables,
            Array::ManyRows,
            Array::ManyPositions,
            Array::ManyLens,
            Array::ManyTables,
            Array::Tiles,
            Array::Tables,
        ];
        let places: Vec<usize> = order
            .into_iter()
            .map(|array| capacity.place(array))
            .collect();
        assert_eq!(
            places,
            [0, 100, 200, 210, 220, 230, 240, 250, 260, 270, 292]
        );
        assert_eq!(capacity.bytes(), 4 * 1292);
    }
}
