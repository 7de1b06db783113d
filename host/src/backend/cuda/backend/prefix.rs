//! Prompts that begin with host pages of others.

use spinkv_kernels::abi::{PageCopy, SLAB_PAGES};

use super::super::driver::{DeviceBuffer, Result as DriverResult, Stream};
use super::stages::gather_listed;
use super::{CudaBackend, Request};
use crate::memory::{PrefixCache, SlabId, Word};
use crate::pipeline::RequestId;
use crate::{Error, Result};

/// What is kept of prompts for others, and the lists by which a layer reads of it.
#[derive(Debug)]
pub(super) struct Prefixes {
    pub cache: PrefixCache,
    /// Keys of single tokens, and values: as long as the longest prefix so far has wanted.
    copies: [DeviceBuffer<PageCopy>; 2],
    /// How many they are.
    counts: DeviceBuffer<u32>,
}

impl Prefixes {
    fn new(cache: PrefixCache, stream: &Stream) -> DriverResult<Self> {
        let copies = || DeviceBuffer::uninit(stream.context(), 0);
        Ok(Self { cache, copies: [copies()?, copies()?], counts: DeviceBuffer::zeroed(stream, 1)? })
    }
}

impl CudaBackend {
    /// Keeps host pages of prompts for others that begin alike: at most `limit_bytes` bytes of them, or what requests leave of the host
    /// memory. Requests take them back when they need the room. What was kept before is forgotten.
    ///
    /// # Errors
    /// Those of [`PrefixCache::new`], [`Error::UnsupportedOnGpu`] for more host memory than lists of single keys can name, and those of the driver.
    pub fn share_prefixes(&mut self, limit_bytes: Option<u64>) -> Result<()> {
        let cache = PrefixCache::new(&self.config, limit_bytes)?;
        let key_bytes = (self.sizes.head_words * size_of::<Word>()) as u64;
        let limit = u64::from(u32::MAX) * key_bytes;
        if self.sizes.host_bytes > limit {
            let what = format!("prefixes in {} bytes of host memory: at most {limit}", self.sizes.host_bytes);
            return Err(Error::UnsupportedOnGpu { what });
        }
        self.clear_prefixes();
        self.prefixes = Some(Prefixes::new(cache, &self.stream)?);
        Ok(())
    }

    /// Forgets all that is kept of prompts. What requests share stays theirs.
    pub fn clear_prefixes(&mut self) {
        let Self { prefixes, arena, .. } = self;
        while prefixes.as_mut().is_some_and(|prefixes| prefixes.cache.evict(arena)) {}
    }

    /// Host slabs that requests and cached prefixes hold.
    pub fn used_slabs(&self) -> usize {
        self.arena.used_slabs()
    }

    /// The slabs of a request that has just come: those that it shares instead of its first ones.
    pub(super) fn share_blocks(&mut self, id: RequestId, prompt: &[u32], unit: usize) -> Result<usize> {
        let Self { prefixes: Some(prefixes), requests, arena, .. } = self else { return Ok(0) };
        let request = requests.get_mut(&id).ok_or(Error::UnknownRequest(id))?;
        let shared = prefixes.cache.share(prompt, unit, arena);
        if shared.tokens == 0 {
            return Ok(0);
        }
        let of_row = request.slabs.len() / self.sizes.rows();
        for (block, slabs) in shared.slabs.iter().enumerate() {
            for (row, slab) in slabs.iter().enumerate() {
                let own = std::mem::replace(&mut request.slabs[row * of_row + block], *slab);
                arena.release(own);
            }
        }
        request.prefix = shared.tokens;
        // Whose pages they were may have enqueued them alone.
        self.prompt.join(&self.stream)?;
        self.write_slabs(&self.requests[&id])?;
        Ok(shared.tokens)
    }

    /// Writes a request's slabs, of which those that it shares are complete.
    pub(super) fn write_slabs(&self, request: &Request) -> Result<()> {
        let (rows, stride) = (self.sizes.rows(), self.sizes.slab_stride);
        let (of_row, at) = (request.slabs.len() / rows, request.place * rows * stride);
        let (mut slabs, mut valid) = (vec![0; rows * stride], vec![0; rows * stride]);
        let shared = request.prefix / (SLAB_PAGES as usize * self.sizes.page_tokens);
        for row in 0..rows {
            let of_request = &request.slabs[row * of_row..][..of_row];
            let places = slabs[row * stride..].iter_mut().zip(of_request);
            places.for_each(|(place, slab): (_, &SlabId)| *place = slab.number());
            valid[row * stride..][..shared].fill(u32::from(u16::MAX));
        }
        self.tables.host_slabs.write(&self.stream, at, &slabs)?;
        Ok(self.tables.host_valid.write(&self.stream, at, &valid)?)
    }

    /// The keys and values of the tokens that a request shares, `[tokens, kv_heads, head_words]` each, out of its host pages: a token's key is a
    /// page of `gather`, and its value another.
    pub(super) fn load_prefix(
        &mut self,
        id: RequestId,
        layer: usize,
        tokens: usize,
        keys: &DeviceBuffer<Word>,
        values: &DeviceBuffer<Word>,
    ) -> Result<()> {
        let Self { prefixes: Some(prefixes), sizes, .. } = self else { return Ok(()) };
        if tokens == 0 {
            return Ok(());
        }
        let request = self.requests.get(&id).ok_or(Error::UnknownRequest(id))?;
        let (of_row, count) = (request.slabs.len() / sizes.rows(), tokens * sizes.kv_heads);
        let of_layer = &request.slabs[layer * sizes.kv_heads * of_row..][..sizes.kv_heads * of_row];
        let copies = copies_of(of_layer, sizes.kv_heads, sizes.page_tokens, tokens);
        prefixes.counts.write(&self.stream, 0, &[count as u32])?;
        for ((copies, list), tensor) in copies.iter().zip(&mut prefixes.copies).zip([keys, values]) {
            if list.len() < count {
                *list = DeviceBuffer::uninit(self.stream.context(), count)?;
            }
            list.write(&self.stream, 0, copies)?;
            let (list, host_pages) = (list.part(0..count)?, self.arena.memory());
            let gather = gather_listed(&list, &prefixes.counts, host_pages, tensor, sizes.head_words);
            // SAFETY: the request's slabs are within the arena and were written by launches that this stream has waited for; nothing writes them
            // again while a request has them. Each token's place in the tensor is named once, and its readers are on this stream or were waited for.
            unsafe { gather.launch(&self.kernels, &self.stream)? };
        }
        Ok(())
    }

    /// Keeps a prompt's blocks. Its pages may still be on the way to the host: who reads them waits for that on the GPU.
    pub(super) fn keep_blocks(&mut self, id: RequestId, prompt: &[u32]) {
        let Self { prefixes: Some(prefixes), requests, arena, keeps_prompts: true, .. } = self else {
            return;
        };
        let Some(request) = requests.get(&id) else { return };
        let rows = self.sizes.rows();
        let of_row = request.slabs.len() / rows;
        let slabs = |block: usize| (0..rows).map(|row| request.slabs[row * of_row + block]).collect();
        prefixes.cache.keep(prompt, slabs, arena);
    }
}

/// The copies of the first `tokens` tokens' keys, and of their values, out of `slabs`, `[kv_heads, slabs of a row]`, each as a page of so many words as a
/// key has: into `[tokens, kv_heads]`.
fn copies_of(slabs: &[SlabId], kv_heads: usize, page_tokens: usize, tokens: usize) -> [Vec<PageCopy>; 2] {
    let block_tokens = SLAB_PAGES as usize * page_tokens;
    let [mut keys, mut values] = [(); 2].map(|()| Vec::with_capacity(tokens * kv_heads));
    for (kv_head, slabs) in slabs.chunks_exact(slabs.len() / kv_heads).enumerate() {
        // Ascending in the host's addresses, as far as slabs are.
        for token in 0..tokens {
            let (slab, of_slab) = (slabs[token / block_tokens], token % block_tokens);
            let page = slab.number() as usize * SLAB_PAGES as usize + of_slab / page_tokens;
            // A page has its tokens' keys, then their values.
            let key = 2 * page * page_tokens + of_slab % page_tokens;
            let device_page = (token * kv_heads + kv_head) as u32;
            keys.push(PageCopy { host_page: key as u32, device_page });
            values.push(PageCopy { host_page: (key + page_tokens) as u32, device_page });
        }
    }
    [keys, values]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::cpu::gather;
    use crate::memory::{HostArena, HostPage, KvDtype, PageLayout, PlainMemory};

    /// Keys of two words; each word of a page says whose it is.
    #[test]
    fn each_token_comes_to_its_place() {
        let (kv_heads, page_tokens, words) = (3, 2, 2);
        let layout = PageLayout::new(page_tokens, 8 * words, KvDtype::Bf16).unwrap();
        let mut arena = HostArena::new(layout, 1, None, PlainMemory::default());
        let mut slabs = arena.take(0, 3 * kv_heads).unwrap();
        slabs.reverse();
        let word = |value: usize, token: usize, head: usize, at: usize| {
            (value * 1_000_000 + token * 1000 + head * 10 + at + 1) as Word
        };
        for (index, slab) in slabs.iter().enumerate() {
            for page in 0..16 {
                let (head, first) = (index / 3, (index % 3 * 16 + page) * page_tokens);
                let of_page: Vec<Word> = (0..2 * page_tokens * words)
                    .map(|at| {
                        word(at / (page_tokens * words), first + at / words % page_tokens, head, at % words)
                    })
                    .collect();
                arena.write(HostPage { slab: *slab, index: page }, &of_page);
            }
        }
        let pages = 3 * kv_heads * 16;
        let mut host = vec![0; pages * layout.page_words()];
        for (page, to) in host.chunks_exact_mut(layout.page_words()).enumerate() {
            let slab = *slabs.iter().find(|slab| slab.number() as usize == page / 16).unwrap();
            arena.read(HostPage { slab, index: page % 16 }, to);
        }
        // Two blocks of three.
        let tokens = 2 * 16 * page_tokens;
        for (value, copies) in copies_of(&slabs, kv_heads, page_tokens, tokens).iter().enumerate() {
            let mut tensor = vec![0; tokens * kv_heads * words];
            gather(copies, &host, &mut tensor, words, words);
            let expected = (0..tensor.len()).map(|at| {
                let (vector, at) = (at / words, at % words);
                word(value, vector / kv_heads, vector % kv_heads, at)
            });
            assert_eq!(tensor, expected.collect::<Vec<_>>());
        }
    }
}
