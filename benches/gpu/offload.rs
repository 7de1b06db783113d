//! `write_back`, `append` and `store_prompt`; ceiling: the copy engine, device to host.

use std::error::Error;

use rand::seq::index;
use rand::{Rng, RngCore, SeedableRng};
use rand_chacha::ChaCha8Rng;
use spinkv::backend::cpu::{self, OffloadTables};
use spinkv::backend::cuda::driver::{DeviceBuffer, PinnedArena};
use spinkv::backend::cuda::kernels::{Append, OffloadPages, StorePrompt, ValidBits, WriteBack};
use spinkv::memory::{KvDtype, PageLayout, Word};
use spinkv_kernels::abi::{Entry, PageCopy, SLAB_PAGES, WORD_BYTES};

use crate::measure::{Bench, Shape};

/// Bytes of a launch of `write_back`: several times the L2.
const LAUNCH_BYTES: usize = 256 << 20;
/// Lists to rotate among.
const LISTS: usize = 4;

pub fn write_back(bench: &mut Bench) -> Result<(), Box<dyn Error>> {
    if bench.arena_bytes < LAUNCH_BYTES {
        let (asked, least) = (bench.arena_bytes >> 20, LAUNCH_BYTES >> 20);
        return Err(format!(
            "--arena-mib is {asked}; a launch writes {least} MiB of distinct pages, so at least that"
        )
        .into());
    }
    let stream = bench.stream.clone();
    let arena = PinnedArena::reserve(&bench.context, bench.arena_bytes, |_| {})?;
    let mut content: Vec<Word> = vec![0; LAUNCH_BYTES / WORD_BYTES];
    ChaCha8Rng::seed_from_u64(0).fill_bytes(bytemuck::cast_slice_mut(&mut content));
    let pool = DeviceBuffer::from_slice(&stream, &content)?;

    bench.group("write_back: 256 MiB to random pages of the arena, ascending; ceiling: the copy engine");
    let copy = |round: usize| {
        let offset = round * LAUNCH_BYTES % (arena.len() - LAUNCH_BYTES + 1);
        pool.copy_to_arena(&stream, 0, &arena, offset, pool.len())
    };
    let ceiling = bench.row("copy engine", "256 MiB in one run", LAUNCH_BYTES as u64, None, copy)?;
    let of_4_kib = [4, 8, 16, 32, 64, 132].map(|blocks| (4096, blocks, false));
    let others = [(2048, 16, false), (16384, 16, false), (4096, 16, true), (16384, 16, true)];
    for (page_bytes, blocks, marked) in of_4_kib.into_iter().chain(others) {
        write_back_row(bench, &arena, &content, &pool, (page_bytes, blocks, marked), ceiling)?;
    }
    bench.row("copy engine", "256 MiB in one run, again", LAUNCH_BYTES as u64, Some(ceiling), copy)?;
    Ok(())
}

fn write_back_row(
    bench: &mut Bench,
    arena: &PinnedArena,
    content: &[Word],
    pool: &DeviceBuffer<Word>,
    (page_bytes, blocks, marked): (usize, u32, bool),
    ceiling: f64,
) -> Result<(), Box<dyn Error>> {
    let (kernels, stream) = (bench.kernels.clone(), bench.stream.clone());
    let pages = LAUNCH_BYTES / page_bytes;
    let host_pages = arena.len() / page_bytes;
    let mut lists = Vec::new();
    for seed in 0..LISTS as u64 {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let mut targets = index::sample(&mut rng, host_pages, pages).into_vec();
        targets.sort_unstable();
        let sources = index::sample(&mut rng, pages, pages);
        let copies: Vec<PageCopy> = targets
            .iter()
            .zip(sources)
            .map(|(&target, source)| PageCopy { host_page: target as u32, device_page: source as u32 })
            .collect();
        // The host tables are as if slab i were at place i.
        let places: Vec<u32> = targets.iter().map(|target| *target as u32).collect();
        let on_device = DeviceBuffer::from_slice(&stream, &copies)?;
        lists.push((copies, on_device, DeviceBuffer::from_slice(&stream, &places)?));
    }
    let count = DeviceBuffer::from_slice(&stream, &[pages as u32])?;
    let host_valid = DeviceBuffer::<u32>::zeroed(&stream, host_pages.div_ceil(SLAB_PAGES as usize))?;
    let launch = |list: usize| {
        let (_, copies, places) = &lists[list % LISTS];
        WriteBack {
            copies,
            count: &count,
            device_pages: pool,
            host_pages: arena,
            page_words: (page_bytes / WORD_BYTES) as u32,
            valid: marked.then_some(ValidBits { places, host_valid: &host_valid }),
            blocks,
        }
    };

    // Refuses to time a copy that is wrong: every word of one launch, and its bits. The arena may hold these very pages
    // from an earlier row, so all of it is told apart first.
    let zeroes = DeviceBuffer::<Word>::zeroed(&stream, LAUNCH_BYTES / WORD_BYTES)?;
    for offset in (0..arena.len()).step_by(LAUNCH_BYTES) {
        let len = LAUNCH_BYTES.min(arena.len() - offset) / WORD_BYTES;
        zeroes.copy_to_arena(&stream, 0, arena, offset, len)?;
    }
    // SAFETY: pages of the pool, distinct pages of the arena; nothing else uses them.
    unsafe { launch(0).launch(&kernels, &stream)? };
    let bits = host_valid.to_vec(&stream)?;
    let content: &[u8] = bytemuck::cast_slice(content);
    let mut found = vec![0; page_bytes];
    for copy in &lists[0].0 {
        arena.read(copy.host_page as usize * page_bytes, &mut found)?;
        if content[copy.device_page as usize * page_bytes..][..page_bytes] != found {
            return Err(format!("{copy:?} of {page_bytes} bytes went wrong").into());
        }
        let bit = bits[(copy.host_page / SLAB_PAGES) as usize] >> (copy.host_page % SLAB_PAGES) & 1;
        if (bit == 1) != marked {
            return Err(format!("the valid bit of {copy:?} is {bit}").into());
        }
    }

    let bits = if marked { ", bits" } else { "" };
    let shape = format!("{pages} pages of {page_bytes} B, {blocks} blocks{bits}");
    bench.row("write_back", shape, LAUNCH_BYTES as u64, Some(ceiling), |round| {
        // SAFETY: as above.
        unsafe { launch(round).launch(&kernels, &stream) }
    })?;
    Ok(())
}

/// Qwen3-14B: 8 KV heads of 128; pages of 8 tokens, 4 KiB.
const KV_HEADS: u32 = 8;
const HEAD_WORDS: u32 = 16;
const PAGE_TOKENS: u32 = 8;
const PAGE_WORDS: usize = (2 * PAGE_TOKENS * HEAD_WORDS) as usize;
const PAGE_BYTES: usize = PAGE_WORDS * WORD_BYTES;
/// The steady zone's pages: one of sinks, and a tail of 64 tokens and one page.
const SINK_PAGES: u32 = 1;
const RING_PAGES: u32 = 9;

/// One layer of some requests, each with a slab table of its own, and random keys and values.
struct Layer {
    entries: Vec<Entry>,
    steady: Vec<u32>,
    host_slabs: Vec<u32>,
    keys: Vec<Word>,
    values: Vec<Word>,
}

impl Layer {
    /// Requests of `tokens` tokens each, and keys and values of `stored` tokens in all.
    fn new(tokens: &[u32], stored: usize) -> Self {
        let list = SINK_PAGES + RING_PAGES;
        let slab_stride = tokens.iter().max().map_or(0, |tokens| tokens / PAGE_TOKENS).div_ceil(SLAB_PAGES);
        let requests = tokens.len() as u32;
        let entries = tokens.iter().zip(0..).map(|(&tokens, request)| Entry {
            tokens,
            first_steady: request * KV_HEADS * list,
            sink_pages: SINK_PAGES,
            ring_pages: RING_PAGES,
            first_slab: request * KV_HEADS * slab_stride,
            slab_stride,
            ..Entry::default()
        });
        let mut rng = ChaCha8Rng::seed_from_u64(0);
        let words = stored * (KV_HEADS * HEAD_WORDS) as usize;
        let mut random = || (0..words).map(|_| rng.random()).collect();
        Self {
            entries: entries.collect(),
            steady: (0..requests * KV_HEADS * list).collect(),
            host_slabs: (0..requests * KV_HEADS * slab_stride).collect(),
            keys: random(),
            values: random(),
        }
    }

    fn tables(&self) -> OffloadTables<'_> {
        OffloadTables {
            entries: &self.entries,
            steady: &self.steady,
            host_slabs: &self.host_slabs,
            first_row: 0,
            kv_heads: KV_HEADS as usize,
            head_words: HEAD_WORDS as usize,
            page_tokens: PAGE_TOKENS as usize,
            on_host: true,
            host: PageLayout::new(PAGE_TOKENS as usize, 8 * HEAD_WORDS as usize, KvDtype::Bf16)
                .expect("a page")
                .into(),
        }
    }
}

/// The layer on the device, with pages on both tiers.
struct OnDevice {
    entries: DeviceBuffer<Entry>,
    steady: DeviceBuffer<u32>,
    host_slabs: DeviceBuffer<u32>,
    host_valid: DeviceBuffer<u32>,
    pool: DeviceBuffer<Word>,
    host_pages: PinnedArena,
    keys: DeviceBuffer<Word>,
    values: DeviceBuffer<Word>,
}

impl OnDevice {
    fn new(bench: &Bench, layer: &Layer) -> Result<Self, Box<dyn Error>> {
        let stream = &bench.stream;
        let slabs = layer.host_slabs.len();
        Ok(Self {
            entries: DeviceBuffer::from_slice(stream, &layer.entries)?,
            steady: DeviceBuffer::from_slice(stream, &layer.steady)?,
            host_slabs: DeviceBuffer::from_slice(stream, &layer.host_slabs)?,
            host_valid: DeviceBuffer::zeroed(stream, slabs)?,
            pool: DeviceBuffer::zeroed(stream, layer.steady.len() * PAGE_WORDS)?,
            // Fresh from the system, so it is zero.
            host_pages: PinnedArena::reserve(
                &bench.context,
                slabs * SLAB_PAGES as usize * PAGE_BYTES,
                |_| {},
            )?,
            keys: DeviceBuffer::from_slice(stream, &layer.keys)?,
            values: DeviceBuffer::from_slice(stream, &layer.values)?,
        })
    }

    fn pages(&self) -> OffloadPages<'_> {
        OffloadPages {
            entries: &self.entries,
            steady: &self.steady,
            pool: &self.pool,
            host_slabs: &self.host_slabs,
            host_valid: &self.host_valid,
            host_pages: &self.host_pages,
            first_row: 0,
            kv_heads: KV_HEADS,
            head_words: HEAD_WORDS,
            page_tokens: PAGE_TOKENS,
            on_host: true,
            host_words: 2 * PAGE_TOKENS * HEAD_WORDS,
            code: None,
        }
    }

    /// Refuses to time what is wrong: all pages and bits after one launch against the CPU reference.
    fn check(
        &self,
        bench: &Bench,
        reference: impl FnOnce(&mut cpu::OffloadPages<'_>),
    ) -> Result<(), Box<dyn Error>> {
        let found = self.pool.to_vec(&bench.stream)?;
        let mut pool: Vec<Word> = vec![0; found.len()];
        let mut host_pages: Vec<Word> = vec![0; self.host_pages.len() / WORD_BYTES];
        let mut on_host = host_pages.clone();
        self.host_pages.read(0, bytemuck::cast_slice_mut(&mut on_host))?;
        let mut host_valid = vec![0; self.host_valid.len()];
        reference(&mut cpu::OffloadPages {
            pool: &mut pool,
            host_pages: &mut host_pages,
            host_valid: &mut host_valid,
        });
        for (what, right) in [
            ("GPU pages", pool == found),
            ("host pages", host_pages == on_host),
            ("valid bits", host_valid == self.host_valid.to_vec(&bench.stream)?),
        ] {
            if !right {
                return Err(format!("{what} differ from the reference's").into());
            }
        }
        Ok(())
    }
}

pub fn append(bench: &mut Bench) -> Result<(), Box<dyn Error>> {
    let (kernels, stream) = (bench.kernels.clone(), bench.stream.clone());
    bench.group(
        "append: a token of each of 8 heads of 128, pages of 4 KiB; bytes: tokens read and written, full pages to the host",
    );
    for batch in [16, 128_u32] {
        for (what, full_of_8) in [("none", 0), ("one eighth", 1), ("all", 8)] {
            // Page 15 of the first slab, just full or with one token.
            let tokens = |request| 15 * PAGE_TOKENS + if request % 8 < full_of_8 { PAGE_TOKENS } else { 1 };
            let tokens: Vec<u32> = (0..batch).map(tokens).collect();
            let layer = Layer::new(&tokens, batch as usize);
            let device = OnDevice::new(bench, &layer)?;
            let launch = Append { pages: device.pages(), keys: &device.keys, values: &device.values };
            // SAFETY: the tables name pages that exist, each once; nothing else uses them.
            unsafe { launch.launch(&kernels, &stream)? };
            device.check(bench, |pages| layer.tables().append(&layer.keys, &layer.values, pages))?;
            let full = tokens.iter().filter(|tokens| tokens.is_multiple_of(PAGE_TOKENS)).count();
            let new = 2 * WORD_BYTES * (layer.keys.len() + layer.values.len());
            let bytes = new + full * KV_HEADS as usize * PAGE_BYTES;
            bench.row("append", format!("batch {batch}, {what} full"), bytes as u64, None, |_| {
                // SAFETY: as above; the same token again.
                unsafe { launch.launch(&kernels, &stream) }
            })?;
        }
    }
    Ok(())
}

pub fn store_prompt(bench: &mut Bench) -> Result<(), Box<dyn Error>> {
    const TOKENS: u32 = 16_384;
    let (kernels, stream) = (bench.kernels.clone(), bench.stream.clone());
    let mut layer = Layer::new(&[TOKENS], TOKENS as usize);
    let pages = TOKENS / PAGE_TOKENS;
    layer.entries[0].leaving_key = SINK_PAGES;
    layer.entries[0].leaving = pages - SINK_PAGES - RING_PAGES;
    let device = OnDevice::new(bench, &layer)?;

    bench.group("store_prompt: 16K tokens of 8 heads of 128, pages of 4 KiB; ceiling: the copy engine");
    let bytes = (pages * KV_HEADS) as usize * PAGE_BYTES;
    let source = DeviceBuffer::<Word>::zeroed(&stream, bytes / WORD_BYTES)?;
    let target = PinnedArena::reserve(&bench.context, bytes, |_| {})?;
    let ceiling = bench.row("copy engine", "64 MiB in one run", bytes as u64, None, |_| {
        source.copy_to_arena(&stream, 0, &target, 0, source.len())
    })?;
    let first_token = DeviceBuffer::from_slice(&stream, &[0])?;
    let first_page = DeviceBuffer::from_slice(&stream, &[0, pages])?;
    for blocks in [4, 8, 16, 32, 64, 132] {
        let launch = StorePrompt {
            pages: device.pages(),
            keys: &device.keys,
            values: &device.values,
            first_token: &first_token,
            first_page: &first_page,
            batch_pages: pages,
            blocks,
        };
        // SAFETY: the tables name pages that exist, each once; nothing else uses them.
        unsafe { launch.launch(&kernels, &stream)? };
        device.check(bench, |pages| layer.tables().store_prompt(&layer.keys, &layer.values, &[0], pages))?;
        let shape = Shape::new(format!("{blocks} blocks")).context(TOKENS);
        bench.row("store_prompt", shape, bytes as u64, Some(ceiling), |_| {
            // SAFETY: as above.
            unsafe { launch.launch(&kernels, &stream) }
        })?;
    }
    Ok(())
}
