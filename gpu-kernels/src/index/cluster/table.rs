//! Where numbers of partitions lie.

use cuda_std::prelude::*;

/// The tables that have a place for each partition of a row, `[segments, request_rows, segment_partitions]`, as a decode step reads them.
#[derive(Clone, Copy)]
pub struct Table {
    pub directories: Global<u32>,
    pub directory: u32,
    pub first_row: u32,
    pub request_rows: u32,
    pub segment_partitions: u32,
}

impl Table {
    /// The place of partition `partition` of KV head `head`.
    ///
    /// # Safety
    /// The directory has its segment.
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    #[inline(always)]
    pub unsafe fn place(self, head: u32, partition: u32) -> usize {
        let segment = self.directories.load((self.directory + partition / self.segment_partitions) as usize);
        let row = segment as usize * self.request_rows as usize + (self.first_row + head) as usize;
        row * self.segment_partitions as usize + (partition % self.segment_partitions) as usize
    }
}
