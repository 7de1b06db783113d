//! `gather` and `gather_bulk` against the copy engine, and what the copy engine makes of runs of pages.

use std::error::Error;
use std::time::Instant;

use indicatif::{ProgressBar, ProgressStyle};
use rand::seq::index;
use rand::{RngCore, SeedableRng};
use rand_chacha::ChaCha8Rng;
use spinkv::backend::cuda::Restore;
use spinkv::backend::cuda::driver::{DeviceBuffer, PinnedArena, PtxArch, Stream};
use spinkv::backend::cuda::kernels::{Gather, GatherVariant};
use spinkv::memory::Word;
use spinkv_benches::report::Counts;
use spinkv_kernels::abi::{PageCopy, WORD_BYTES};

use crate::measure::{Bench, Shape};

/// Bytes of a launch: several times the L2.
const LAUNCH_BYTES: usize = 256 << 20;
/// Lists to rotate among.
const LISTS: usize = 4;
/// Blocks of a launch unless they are what varies.
const BLOCKS: u32 = 16;

pub fn run(bench: &mut Bench) -> Result<(), Box<dyn Error>> {
    if bench.arena_bytes < LAUNCH_BYTES {
        let (asked, least) = (bench.arena_bytes >> 20, LAUNCH_BYTES >> 20);
        return Err(format!(
            "--arena-mib is {asked}; a launch gathers {least} MiB of distinct pages, so at least that"
        )
        .into());
    }
    let arena = random_arena(bench)?;
    let pool = DeviceBuffer::<Word>::zeroed(&bench.stream, LAUNCH_BYTES / WORD_BYTES)?;
    let stream = bench.stream.clone();

    bench.group("gather: random pages of the arena, ascending, 256 MiB a launch unless fewer pages are named; ceiling: the copy engine");
    let copy = |round: usize| {
        let offset = round * LAUNCH_BYTES % (arena.len() - LAUNCH_BYTES + 1);
        pool.copy_from_arena(&stream, 0, &arena, offset, pool.len())
    };
    let ceiling = bench.row("copy engine", "256 MiB in one run", LAUNCH_BYTES as u64, None, copy)?;

    let variants: &[GatherVariant] = match bench.context.device().ptx_arch()? {
        PtxArch::Sm80 => &[GatherVariant::ZeroCopy],
        _ => &[GatherVariant::ZeroCopy, GatherVariant::Bulk],
    };
    // What sets the choice between the two. 4 KiB come first, which is what `profile` looks at.
    for page_bytes in [4096, 512, 1024, 2048, 8192, 16384, 32768, 65536] {
        let lists = Lists::new(bench, &arena, page_bytes, LAUNCH_BYTES / page_bytes, Order::Ascending)?;
        for &variant in variants {
            lists.check(bench, &arena, &pool, variant, BLOCKS)?;
            for blocks in [1, 2, 4, 8, BLOCKS] {
                lists.row(bench, &arena, &pool, variant, blocks, ceiling)?;
            }
        }
    }
    let lists = Lists::new(bench, &arena, 256, LAUNCH_BYTES / 256, Order::Ascending)?;
    for blocks in [8, BLOCKS] {
        lists.row(bench, &arena, &pool, GatherVariant::ZeroCopy, blocks, ceiling)?;
    }
    let lists = Lists::new(bench, &arena, 4096, LAUNCH_BYTES / 4096, Order::Ascending)?;
    for blocks in [32, 64, 132] {
        lists.row(bench, &arena, &pool, GatherVariant::ZeroCopy, blocks, ceiling)?;
    }
    for pages in [16, 64, 256, 1024, 4096] {
        let lists = Lists::new(bench, &arena, 4096, pages, Order::Ascending)?;
        for &variant in variants {
            lists.check(bench, &arena, &pool, variant, BLOCKS)?;
            lists.row(bench, &arena, &pool, variant, BLOCKS, ceiling)?;
        }
    }
    for page_bytes in [256, 512, 1024, 2048, 4096] {
        let lists = Lists::new(bench, &arena, page_bytes, LAUNCH_BYTES / page_bytes, Order::Random)?;
        for &variant in variants {
            lists.row(bench, &arena, &pool, variant, BLOCKS, ceiling)?;
        }
    }
    for run_pages in [1, 4, 16, 64, 256] {
        restore(bench, &arena, &pool, run_pages, ceiling)?;
    }
    bench.row("copy engine", "256 MiB in one run, again", LAUNCH_BYTES as u64, Some(ceiling), copy)?;
    Ok(())
}

/// 64 MiB in pages of 4 KiB, in runs of `run_pages` at random places of the arena, all given to the copy engine at once.
fn restore(
    bench: &mut Bench,
    arena: &PinnedArena,
    pool: &DeviceBuffer<Word>,
    run_pages: usize,
    ceiling: f64,
) -> Result<(), Box<dyn Error>> {
    const PAGE_BYTES: usize = 4096;
    const PAGES: usize = (64 << 20) / PAGE_BYTES;
    let places = arena.len() / PAGE_BYTES / run_pages;
    let starts = index::sample(&mut ChaCha8Rng::seed_from_u64(0), places, PAGES / run_pages);
    let copies: Vec<PageCopy> = starts
        .iter()
        .flat_map(|start| start * run_pages..(start + 1) * run_pages)
        .zip(0..)
        .map(|(host_page, device_page)| PageCopy { host_page: host_page as u32, device_page })
        .collect();
    let restore = Restore { host_pages: arena, device_pages: pool, page_words: PAGE_BYTES / WORD_BYTES };
    let stream = bench.stream.clone();
    let shape = format!("{PAGES} pages of {PAGE_BYTES} B, runs of {run_pages}");
    bench.row("restore", shape, (PAGES * PAGE_BYTES) as u64, Some(ceiling), |_| {
        restore.enqueue(&copies, &stream).map(drop)
    })?;
    Ok(())
}

/// Pinned memory of random bytes.
pub fn random_arena(bench: &Bench) -> Result<PinnedArena, Box<dyn Error>> {
    let bar = ProgressBar::new(bench.arena_bytes as u64);
    bar.set_style(ProgressStyle::with_template("{msg} {bar:40} {bytes} of {total_bytes}")?);
    bar.set_message("pinning host memory");
    let start = Instant::now();
    let mut arena = PinnedArena::reserve(&bench.context, bench.arena_bytes, |progress| {
        bar.set_position(progress.pinned_bytes)
    })?;
    let seconds = start.elapsed().as_secs_f64();
    println!("{} MiB of host memory touched and pinned in {seconds:.2} s", bench.arena_bytes >> 20);
    bar.set_message("filling it");
    bar.reset();
    // One random block, told apart by its first words at each repetition.
    let mut block = vec![0; 64 << 20];
    ChaCha8Rng::seed_from_u64(0).fill_bytes(&mut block);
    for start in (0..arena.len()).step_by(block.len()) {
        block[..8].copy_from_slice(&start.to_le_bytes());
        let end = (start + block.len()).min(arena.len());
        arena.write(start, &block[..end - start])?;
        bar.set_position(end as u64);
    }
    bar.finish_and_clear();
    Ok(arena)
}

/// The order of a list's host pages.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Order {
    /// As the kernel wants it.
    Ascending,
    /// What it costs not to sort.
    Random,
}

/// Lists of random distinct pages, all of one size.
struct Lists {
    page_bytes: usize,
    order: Order,
    pages: usize,
    copies: Vec<(Vec<PageCopy>, DeviceBuffer<PageCopy>)>,
    count: DeviceBuffer<u32>,
}

impl Lists {
    fn new(
        bench: &Bench,
        arena: &PinnedArena,
        page_bytes: usize,
        pages: usize,
        order: Order,
    ) -> Result<Self, Box<dyn Error>> {
        let mut copies = Vec::new();
        for seed in 0..LISTS as u64 {
            let mut rng = ChaCha8Rng::seed_from_u64(seed);
            let mut sources = index::sample(&mut rng, arena.len() / page_bytes, pages).into_vec();
            if order == Order::Ascending {
                sources.sort_unstable();
            }
            let targets = index::sample(&mut rng, pages, pages);
            let list: Vec<_> = sources
                .iter()
                .zip(targets)
                .map(|(&source, target)| PageCopy { host_page: source as u32, device_page: target as u32 })
                .collect();
            let on_device = DeviceBuffer::from_slice(&bench.stream, &list)?;
            copies.push((list, on_device));
        }
        let count = DeviceBuffer::from_slice(&bench.stream, &[pages as u32])?;
        Ok(Self { page_bytes, order, pages, copies, count })
    }

    fn launch<'a>(
        &'a self,
        list: usize,
        arena: &'a PinnedArena,
        pool: &'a DeviceBuffer<Word>,
        blocks: u32,
    ) -> Gather<'a> {
        Gather {
            copies: &self.copies[list % LISTS].1,
            counts: &self.count,
            host_pages: arena,
            device_pages: pool,
            page_words: (self.page_bytes / WORD_BYTES) as u32,
            device_words: (self.page_bytes / WORD_BYTES) as u32,
            code: None,
            blocks,
            arrived: None,
        }
    }

    /// Refuses to time a gather that is wrong: every word of one launch against the arena.
    fn check(
        &self,
        bench: &Bench,
        arena: &PinnedArena,
        pool: &DeviceBuffer<Word>,
        variant: GatherVariant,
        blocks: u32,
    ) -> Result<(), Box<dyn Error>> {
        pool.fill_bytes(&bench.stream, 0..pool.len(), 0xa5)?;
        // SAFETY: pages of the arena, distinct pages of the pool; nothing else uses them.
        unsafe { self.launch(0, arena, pool, blocks).launch_as(variant, &bench.kernels, &bench.stream)? };
        let found = pool.to_vec(&bench.stream)?;
        let found: &[u8] = bytemuck::cast_slice(&found);
        let mut expected = vec![0; self.page_bytes];
        for copy in &self.copies[0].0 {
            arena.read(copy.host_page as usize * self.page_bytes, &mut expected)?;
            if found[copy.device_page as usize * self.page_bytes..][..self.page_bytes] != expected {
                return Err(format!("{copy:?} of {} bytes went wrong", self.page_bytes).into());
            }
        }
        Ok(())
    }

    fn row(
        &self,
        bench: &mut Bench,
        arena: &PinnedArena,
        pool: &DeviceBuffer<Word>,
        variant: GatherVariant,
        blocks: u32,
        ceiling: f64,
    ) -> Result<(), Box<dyn Error>> {
        let order = if self.order == Order::Random { ", random" } else { "" };
        let shape = format!("{} pages of {} B, {blocks} blocks{order}", self.pages, self.page_bytes);
        let (kernels, stream) = (bench.kernels.clone(), bench.stream.clone());
        let bytes = (self.pages * self.page_bytes) as u64;
        let counted = |stream: &Stream| {
            let misses = self.count.to_vec(stream)?.into_iter().map(u64::from).sum();
            Ok(Counts { hits: None, misses })
        };
        let what = if variant == GatherVariant::Bulk { "gather_bulk" } else { "gather" };
        bench.row(what, Shape::new(shape).counted(&counted), bytes, Some(ceiling), |round| {
            // SAFETY: as in check.
            unsafe { self.launch(round, arena, pool, blocks).launch_as(variant, &kernels, &stream) }
        })?;
        Ok(())
    }
}
