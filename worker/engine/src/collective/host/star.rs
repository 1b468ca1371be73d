//! Sums and gathers over the star of TCP connections, where the ranks share no memory.
//!
//! Owns who sends when. Rank 0 reads all parts before it writes a sum, so that no two ends ever wait for each other to
//! read.

use super::CollectiveError;
use super::frame::{Header, Kind, read_bytes, read_header, write_frame};
use super::group::HostGroup;

/// Numbers read and added at a time.
const STRIP: usize = 16 << 10;

// Numbers cross in memory order; every supported processor is little-endian.
const _: () = assert!(cfg!(target_endian = "little"));

impl HostGroup {
    pub(super) fn star_sum(&mut self, values: &mut [f32]) -> Result<(), CollectiveError> {
        self.op = self.op.wrapping_add(1);
        let (op, deadline) = (self.op, self.deadline());
        if self.rank != 0 {
            let link = self.link(0);
            write_frame(link, Kind::Part, op, bytemuck::cast_slice(values), deadline)
                .map_err(|error| self.lost(0, error))?;
            self.expect(0, Kind::Sum, values.len())?;
            return read_bytes(link, bytemuck::cast_slice_mut(values), deadline)
                .map_err(|error| self.lost(0, error));
        }
        let mut strip = [0.0f32; STRIP];
        for rank in 1..self.ranks {
            self.expect(rank, Kind::Part, values.len())?;
            for sums in values.chunks_mut(STRIP) {
                let part = &mut strip[..sums.len()];
                read_bytes(self.link(rank), bytemuck::cast_slice_mut(part), deadline)
                    .map_err(|error| self.lost(rank, error))?;
                sums.iter_mut().zip(part).for_each(|(sum, x)| *sum += *x);
            }
        }
        for rank in 1..self.ranks {
            write_frame(
                self.link(rank),
                Kind::Sum,
                op,
                bytemuck::cast_slice(values),
                deadline,
            )
            .map_err(|error| self.lost(rank, error))?;
        }
        Ok(())
    }

    pub(super) fn star_gather(
        &mut self,
        part: &[f32],
        rows: usize,
        widths: &[usize],
        out: &mut [f32],
    ) -> Result<(), CollectiveError> {
        self.op = self.op.wrapping_add(1);
        let (op, deadline) = (self.op, self.deadline());
        if self.rank != 0 {
            return write_frame(
                self.link(0),
                Kind::Columns,
                op,
                bytemuck::cast_slice(part),
                deadline,
            )
            .map_err(|error| self.lost(0, error));
        }
        let whole = widths.iter().sum::<usize>();
        let mut column = widths[0];
        for (rank, width) in (1..).zip(&widths[1..]) {
            self.expect(rank, Kind::Columns, rows * width)?;
            for row in 0..rows {
                let to = &mut out[row * whole + column..][..*width];
                read_bytes(self.link(rank), bytemuck::cast_slice_mut(to), deadline)
                    .map_err(|error| self.lost(rank, error))?;
            }
            column += width;
        }
        Ok(())
    }

    /// Reads the header of the frame that this op expects, of `len` numbers.
    fn expect(&self, rank: u32, kind: Kind, len: usize) -> Result<(), CollectiveError> {
        let header = read_header(self.link(rank), kind, self.deadline())
            .map_err(|error| self.lost(rank, error))?;
        let bytes = len * size_of::<f32>();
        if header.op != self.op || header.len as usize != bytes {
            let Header { op, len, .. } = header;
            return Err(CollectiveError::OutOfStep(format!(
                "rank {rank} sent {len} bytes for op {op}; this is op {} of {bytes} bytes",
                self.op
            )));
        }
        Ok(())
    }
}
