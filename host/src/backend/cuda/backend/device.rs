//! What a backend has on the GPU, allocated once.

use std::ops::Range;

use spinkv_kernels::abi::attend::{blocks_of_group, partial_words};
use spinkv_kernels::abi::{Entry, PageCopy, SEGMENT_KEYS, WORD_BYTES, resolve::NO_FAULT, score};

use super::super::driver::{DeviceBuffer, Result, Stream};
use super::super::kernels::{Kernels, KvTables};
use super::Sizes;
use super::low_rank::LowRankLists;
use crate::memory::Word;

/// The tables of all requests, the summaries and the pages.
#[derive(Debug)]
pub(super) struct Tables {
    pub directories: DeviceBuffer<u32>,
    pub segments: DeviceBuffer<u16>,
    pub owners: DeviceBuffer<u32>,
    pub physical: DeviceBuffer<u32>,
    pub states: DeviceBuffer<u32>,
    pub steady: DeviceBuffer<u32>,
    pub host_slabs: DeviceBuffer<u32>,
    pub host_valid: DeviceBuffer<u32>,
    /// Bits of the partitions that every step reads: `[requests, rows, words]`.
    pub marks: DeviceBuffer<u32>,
    /// Bits of the partitions that no step reads: `[requests, rows, words]`.
    pub masks: DeviceBuffer<u32>,
    pub summaries: DeviceBuffer<Word>,
    pub pool: DeviceBuffer<Word>,
    request_rows: u32,
}

impl Tables {
    pub fn new(sizes: &Sizes, stream: &Stream) -> Result<Self> {
        let (requests, rows) = (sizes.requests, sizes.rows());
        let segments = requests * sizes.segments;
        let context = stream.context();
        Ok(Self {
            directories: DeviceBuffer::zeroed(stream, segments)?,
            segments: DeviceBuffer::uninit(context, segments * rows * SEGMENT_KEYS as usize)?,
            owners: DeviceBuffer::uninit(context, requests * rows * sizes.slot_stride)?,
            physical: DeviceBuffer::uninit(context, requests * rows * sizes.slot_stride)?,
            states: DeviceBuffer::uninit(context, requests * rows * sizes.slot_stride / 4)?,
            steady: DeviceBuffer::uninit(context, requests * rows * sizes.steady_stride)?,
            host_slabs: DeviceBuffer::uninit(context, requests * rows * sizes.slab_stride)?,
            host_valid: DeviceBuffer::uninit(context, requests * rows * sizes.slab_stride)?,
            marks: DeviceBuffer::uninit(context, requests * rows * sizes.mark_words)?,
            masks: DeviceBuffer::uninit(context, requests * rows * sizes.mask_words)?,
            summaries: DeviceBuffer::uninit(context, segments * sizes.summary_words())?,
            pool: DeviceBuffer::uninit(context, sizes.pool_pages * sizes.page_words)?,
            request_rows: rows as u32,
        })
    }

    /// Bytes of everything but summaries and pages.
    pub fn bytes(&self) -> u64 {
        let numbers = [&self.directories, &self.owners, &self.physical, &self.states, &self.steady];
        let numbers =
            numbers.into_iter().chain([&self.host_slabs, &self.host_valid, &self.marks, &self.masks]);
        self.segments.bytes() + numbers.map(DeviceBuffer::bytes).sum::<u64>()
    }

    pub fn views(&self) -> KvTables<'_> {
        KvTables {
            directories: &self.directories,
            segments: &self.segments,
            owners: &self.owners,
            physical: &self.physical,
            states: &self.states,
            steady: &self.steady,
            host_slabs: &self.host_slabs,
            host_valid: &self.host_valid,
            request_rows: self.request_rows,
        }
    }
}

/// What the stages of a step hand on. One layer follows the other, so all share it, but for the counts, which are looked at after
/// the step.
#[derive(Debug)]
pub(super) struct Lists {
    pub entries: DeviceBuffer<Entry>,
    /// The same for layers that read everything: with room for all partitions in the selection. None without such layers.
    pub everything: DeviceBuffer<Entry>,
    pub logits: DeviceBuffer<f32>,
    pub statistics: DeviceBuffer<f32>,
    /// What Select keeps of rows that shared memory cannot hold.
    pub keys: DeviceBuffer<Word>,
    /// `[rows]` of what a method's own Select needs.
    pub scratch: DeviceBuffer<Word>,
    pub ids: DeviceBuffer<u32>,
    pub id_counts: DeviceBuffer<u32>,
    /// Partitions that are estimated, and how many; none of methods without.
    pub estimated_ids: DeviceBuffer<u32>,
    pub estimated: DeviceBuffer<u32>,
    pub pages: DeviceBuffer<u32>,
    pub copies: DeviceBuffer<PageCopy>,
    pub arrived: DeviceBuffer<u32>,
    /// `[layers]`, each `[rows]`.
    pub counts: Vec<Counts>,
    /// `[rows]`, zeroes.
    pub no_pages: DeviceBuffer<u32>,
    pub partials: DeviceBuffer<Word>,
    pub arrivals: DeviceBuffer<u32>,
    pub lse: DeviceBuffer<f32>,
    /// Of keys in low rank.
    pub low_rank: Option<LowRankLists>,
}

/// What `resolve` says of each row.
#[derive(Debug)]
pub(super) struct Counts {
    pub pages: DeviceBuffer<u32>,
    pub copies: DeviceBuffer<u32>,
    pub faults: DeviceBuffer<u32>,
}

/// Parts of buffers begin at multiples of so many bytes.
const PART_BYTES: usize = 256;

/// Numbers between the counts of one layer and those of the next: buffers begin at multiples of 256 bytes.
fn count_stride(rows: usize) -> usize {
    rows.next_multiple_of(64)
}

impl Lists {
    /// Writes the entries of a step.
    pub fn write_entries(&self, stream: &Stream, entries: &[Entry]) -> Result<()> {
        self.entries.write(stream, 0, entries)?;
        if self.everything.is_empty() {
            return Ok(());
        }
        let all = |entry: &Entry| Entry { limit: entry.partitions, ..*entry };
        self.everything.write(stream, 0, &entries.iter().map(all).collect::<Vec<_>>())
    }

    pub fn new(sizes: &Sizes, kernels: &Kernels, stream: &Stream) -> Result<(Self, DeviceBuffer<u32>)> {
        let Sizes { requests, kv_heads, group, stride, id_stride, list_capacity, .. } = *sizes;
        let rows = requests * kv_heads;
        let units = rows * blocks_of_group(group as u32) as usize;
        let splits = most_splits(sizes, kernels) as usize;
        let scored = if sizes.summaries.is_some() { rows * group } else { 0 };
        let keys =
            if kernels.resident(stride as u32) < stride as u32 { rows * stride.div_ceil(4) } else { 0 };
        let stride_of_counts = count_stride(rows);
        // In one buffer, so that one copy brings all of them to the host.
        let counts = DeviceBuffer::<u32>::zeroed(stream, sizes.layers * 3 * stride_of_counts)?;
        let of = |place: usize| counts.part(place * stride_of_counts..place * stride_of_counts + rows);
        let layers = (0..sizes.layers)
            .map(|layer| {
                let [pages, copies, faults] = [of(3 * layer)?, of(3 * layer + 1)?, of(3 * layer + 2)?];
                Ok(Counts { pages, copies, faults })
            })
            .collect::<Result<_>>()?;
        let lists = Self {
            entries: DeviceBuffer::from_slice(stream, &vec![Entry::default(); requests])?,
            everything: DeviceBuffer::from_slice(
                stream,
                &vec![Entry::default(); if sizes.everything { requests } else { 0 }],
            )?,
            logits: DeviceBuffer::zeroed(stream, scored * stride)?,
            statistics: DeviceBuffer::zeroed(stream, scored * score::max_tiles(stride as u32) as usize * 2)?,
            keys: DeviceBuffer::zeroed(stream, keys)?,
            scratch: DeviceBuffer::zeroed(stream, rows * sizes.scratch_words)?,
            ids: DeviceBuffer::zeroed(stream, rows * id_stride)?,
            id_counts: DeviceBuffer::zeroed(stream, rows)?,
            estimated_ids: DeviceBuffer::zeroed(stream, rows * sizes.estimates())?,
            estimated: DeviceBuffer::zeroed(stream, rows)?,
            pages: DeviceBuffer::zeroed(stream, rows * list_capacity)?,
            copies: DeviceBuffer::from_slice(stream, &vec![PageCopy::default(); rows * list_capacity])?,
            arrived: DeviceBuffer::zeroed(stream, rows)?,
            counts: layers,
            no_pages: DeviceBuffer::zeroed(stream, rows)?,
            // For each half of a batch.
            partials: DeviceBuffer::zeroed(
                stream,
                2 * (units * splits * partial_words(sizes.head_words as u32) as usize)
                    .next_multiple_of(PART_BYTES / WORD_BYTES),
            )?,
            arrivals: DeviceBuffer::zeroed(stream, units)?,
            lse: DeviceBuffer::zeroed(stream, rows * group)?,
            low_rank: LowRankLists::new(sizes, stream)?,
        };
        Ok((lists, counts))
    }

    /// Those of the entries in `batch`, the same memory. What does not begin with the first entry begins at a multiple of
    /// [`half_unit`](Sizes::half_unit).
    pub fn part(&self, sizes: &Sizes, batch: Range<usize>) -> Result<Self> {
        let Sizes { kv_heads, group, stride, id_stride, list_capacity, .. } = *sizes;
        let of_rows = |width: usize| batch.start * kv_heads * width..batch.end * kv_heads * width;
        let rows = of_rows(1);
        let units = blocks_of_group(group as u32) as usize;
        let scored = if sizes.summaries.is_some() { group } else { 0 };
        let counts = self.counts.iter().map(|Counts { pages, copies, faults }| {
            let [pages, copies, faults] = [pages, copies, faults].map(|buffer| buffer.part(rows.clone()));
            Ok(Counts { pages: pages?, copies: copies?, faults: faults? })
        });
        let tiles = score::max_tiles(stride as u32) as usize;
        // Splits share these out among the rows of a launch, so that their length says nothing; the second half has its own.
        let scratch = |buffer: &DeviceBuffer<Word>| {
            let half = buffer.len() / 2;
            buffer.part(if batch.start == 0 { 0..half } else { half..buffer.len() })
        };
        let everything = if sizes.everything { batch.clone() } else { 0..0 };
        let keys = if self.keys.is_empty() { 0..0 } else { of_rows(stride.div_ceil(4)) };
        Ok(Self {
            entries: self.entries.part(batch.clone())?,
            everything: self.everything.part(everything)?,
            logits: self.logits.part(of_rows(scored * stride))?,
            statistics: self.statistics.part(of_rows(scored * tiles * 2))?,
            keys: self.keys.part(keys)?,
            scratch: self.scratch.part(of_rows(sizes.scratch_words))?,
            ids: self.ids.part(of_rows(id_stride))?,
            id_counts: self.id_counts.part(rows.clone())?,
            estimated_ids: self.estimated_ids.part(of_rows(sizes.estimates()))?,
            estimated: self.estimated.part(rows.clone())?,
            pages: self.pages.part(of_rows(list_capacity))?,
            copies: self.copies.part(of_rows(list_capacity))?,
            arrived: self.arrived.part(rows.clone())?,
            counts: counts.collect::<Result<_>>()?,
            no_pages: self.no_pages.part(rows)?,
            partials: scratch(&self.partials)?,
            arrivals: self.arrivals.part(of_rows(units))?,
            lse: self.lse.part(of_rows(group))?,
            low_rank: self.low_rank.as_ref().map(|lists| lists.part(sizes, batch)).transpose()?,
        })
    }

    /// Bytes.
    pub fn bytes(&self) -> u64 {
        let numbers =
            [&self.ids, &self.id_counts, &self.pages, &self.arrived, &self.no_pages, &self.arrivals];
        let numbers = numbers.into_iter().chain([&self.estimated_ids, &self.estimated]);
        let numbers = numbers.map(DeviceBuffer::bytes).sum::<u64>();
        let floats = [&self.logits, &self.statistics, &self.lse].map(DeviceBuffer::bytes);
        let words = [&self.keys, &self.partials, &self.scratch].map(DeviceBuffer::bytes);
        let counts = self.counts.iter().map(|counts| 3 * count_stride(counts.pages.len()) as u64 * 4);
        numbers
            + floats.iter().sum::<u64>()
            + words.iter().sum::<u64>()
            + self.copies.bytes()
            + self.entries.bytes()
            + self.everything.bytes()
            + self.low_rank.as_ref().map_or(0, LowRankLists::bytes)
            + counts.sum::<u64>()
    }
}

/// Blocks that share a row's tokens in attention, so many that the scratch of the largest batch is enough for each smaller one, whose
/// rows are split more.
fn most_splits(sizes: &Sizes, kernels: &Kernels) -> u32 {
    let splits = |batch: usize| [false, true].map(|resident| sizes.splits(kernels, batch, resident));
    let most = (1..=sizes.requests).flat_map(|batch| splits(batch).map(|splits| batch as u32 * splits)).max();
    most.unwrap_or(1).div_ceil(sizes.requests as u32)
}

/// What a step's rows were, read from the host's copy of the counts.
pub(super) struct RowCounts<'a> {
    counts: &'a [u32],
    rows: usize,
}

impl<'a> RowCounts<'a> {
    /// Of `counts`, as [`Lists::new`] lays them out for batches of up to `rows` rows.
    pub fn new(counts: &'a [u32], rows: usize) -> Self {
        Self { counts, rows }
    }

    /// Pages, those of them that were fetched, and the fault, of row `row` of the batch in `layer`.
    pub fn of(&self, layer: usize, row: usize) -> (u32, u32, u32) {
        let stride = count_stride(self.rows);
        let at = |kind: usize| self.counts[(3 * layer + kind) * stride + row];
        (at(0), at(1), at(2))
    }

    /// The first fault of these rows of the batch in these layers: layer, number among the rows and what it is.
    pub fn fault(&self, layers: Range<usize>, rows: Range<usize>) -> Option<(usize, usize, u32)> {
        let places = layers.flat_map(|layer| rows.clone().map(move |row| (layer, row)));
        places
            .map(|(layer, row)| (layer, row - rows.start, self.of(layer, row).2))
            .find(|(.., fault)| *fault != NO_FAULT)
    }
}
