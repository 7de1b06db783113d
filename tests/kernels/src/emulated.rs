//! Runs a kernel's case under the emulator.

use cuda_std::U32x4;
use cuda_std::emulator::{Buffer, Fault, Launch};
use spinkv_kernels::abi;
use spinkv_kernels::index::chunk_mean;
use spinkv_kernels::retrieve::gather;

use super::chunk_mean::ChunkMeanCase;
use super::gather::GatherCase;

/// A global buffer of 16-byte words.
pub fn words(words: &[u128]) -> Buffer<U32x4> {
    let words: Vec<U32x4> = words
        .iter()
        .map(|word| {
            let [x, y, z, w] = bytemuck::cast(*word);
            U32x4 { x, y, z, w }
        })
        .collect();
    Buffer::from_slice(&words)
}

/// Its contents.
pub fn to_words(buffer: &Buffer<U32x4>) -> Vec<u128> {
    buffer.to_vec().into_iter().map(|word| bytemuck::cast(word.to_array())).collect()
}

impl GatherCase {
    /// The pool after the kernel ran in the order of `schedule`.
    ///
    /// # Errors
    /// What the emulator found wrong.
    pub fn emulate(&self, schedule: u64) -> Result<Vec<u128>, Fault> {
        let copies = Buffer::from_slice(&self.copies);
        let count = Buffer::from_slice(&[self.count]);
        let (host_pages, pool) = (words(&self.host_pages), words(&self.pool()));
        let (capacity, page_words) = (self.copies.len() as u32, self.page_words as u32);
        Launch::new(self.grid, abi::gather::BLOCK).seed(schedule).run(|| {
            // SAFETY: the emulator checks every access.
            unsafe {
                gather(copies.view(), count.view(), capacity, host_pages.view(), pool.view_mut(), page_words);
            }
        })?;
        Ok(to_words(&pool))
    }
}

impl ChunkMeanCase {
    /// The summaries after the kernel ran in the order of `schedule`.
    ///
    /// # Errors
    /// What the emulator found wrong.
    pub fn emulate(&self, schedule: u64) -> Result<Vec<u128>, Fault> {
        let (keys, summaries) = (words(&self.keys), words(&self.summaries()));
        let first_token = Buffer::from_slice(&self.first_token);
        let first_chunk = Buffer::from_slice(&self.first_chunk);
        let sizes = [self.requests(), self.kv_heads, self.head_words, self.chunk_tokens];
        let [requests, kv_heads, head_words, chunk_tokens] = sizes.map(|size| size as u32);
        // At least a block, also for a batch without a chunk: its warps must find that there is nothing to do.
        let blocks = abi::chunk_mean::grid(self.chunks() as u32 * kv_heads).max(1);
        Launch::new(blocks, abi::chunk_mean::BLOCK).seed(schedule).run(|| {
            // SAFETY: the emulator checks every access.
            unsafe {
                chunk_mean(
                    keys.view(),
                    first_token.view(),
                    first_chunk.view(),
                    requests,
                    kv_heads,
                    head_words,
                    chunk_tokens,
                    summaries.view_mut(),
                );
            }
        })?;
        Ok(to_words(&summaries))
    }
}
