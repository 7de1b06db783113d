//! Runs a kernel's case under the emulator.

use cuda_std::U32x4;
use cuda_std::emulator::{Buffer, Fault, Launch};
use spinkv_kernels::abi;
use spinkv_kernels::attention::{
    attend_64, attend_128, prefill_64, prefill_128, prefill_wgmma_64, prefill_wgmma_128,
};
use spinkv_kernels::retrieve::{gather, gather_bulk, gather_coded};
use spinkv_kernels::select::{score, select, top_k};

use super::attend::AttendCase;
use super::gather::GatherCase;
use super::prefill::PrefillCase;
use super::score::ScoreCase;
use super::select::{SelectCase, Selection};
use super::top_k::TopKCase;

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
    /// The pool, and the words of each list counted as arrived, after `gather`, or `gather_coded` for coded pages, ran in the order of `schedule`.
    ///
    /// # Errors
    /// What the emulator found wrong.
    pub fn emulate(&self, schedule: u64) -> Result<(Vec<u128>, Vec<u32>), Fault> {
        self.emulate_as(false, schedule)
    }

    /// The same after `gather_bulk` ran.
    ///
    /// # Errors
    /// What the emulator found wrong.
    pub fn emulate_bulk(&self, schedule: u64) -> Result<(Vec<u128>, Vec<u32>), Fault> {
        self.emulate_as(true, schedule)
    }

    fn emulate_as(&self, bulk: bool, schedule: u64) -> Result<(Vec<u128>, Vec<u32>), Fault> {
        let copies = Buffer::from_slice(&self.copies);
        let counts = Buffer::from_slice(&self.counts);
        let (host_pages, pool) = (words(&self.host_pages), words(&self.pool()));
        let arrived = Buffer::from_slice(&vec![0; self.counts.len()]);
        let sizes = [self.counts.len(), self.capacity(), self.page_words, self.device_words];
        let [lists, capacity, page_words, device_words] = sizes.map(|size| size as u32);
        let (block, shared_bytes) = if bulk {
            (abi::gather_bulk::BLOCK, abi::gather_bulk::shared_bytes(lists))
        } else {
            (abi::gather::BLOCK, abi::gather::shared_bytes(lists))
        };
        let launch = Launch::new(self.grid, block).shared(shared_bytes as usize);
        launch.seed(schedule).run(|| {
            let (copies, counts, pages) = (copies.view(), counts.view(), host_pages.view());
            let (pool, arrived) = (pool.view_mut(), arrived.view_mut());
            let kernel = if bulk { gather_bulk } else { gather };
            // SAFETY: the emulator checks every access.
            unsafe {
                match self.code {
                    Some(code) => {
                        let code = code as u32;
                        gather_coded(
                            copies,
                            counts,
                            lists,
                            capacity,
                            pages,
                            pool,
                            page_words,
                            device_words,
                            arrived,
                            1,
                            code,
                        );
                    }
                    None => {
                        kernel(
                            copies,
                            counts,
                            lists,
                            capacity,
                            pages,
                            pool,
                            page_words,
                            device_words,
                            arrived,
                            1,
                        );
                    }
                }
            }
        })?;
        Ok((to_words(&pool), arrived.to_vec()))
    }
}

/// A global buffer of f32 as 16-byte words.
pub(crate) fn quads(numbers: &[f32]) -> Buffer<U32x4> {
    let words: Vec<U32x4> = numbers
        .chunks_exact(4)
        .map(|four| {
            let [x, y, z, w] = std::array::from_fn(|at| four[at].to_bits());
            U32x4 { x, y, z, w }
        })
        .collect();
    Buffer::from_slice(&words)
}

/// Entries as kernels read them.
pub(crate) fn entries(entries: &[abi::Entry]) -> Buffer<U32x4> {
    words(
        &entries
            .iter()
            .flat_map(|entry| bytemuck::cast::<_, [u128; abi::ENTRY_WORDS]>(*entry))
            .collect::<Vec<_>>(),
    )
}

impl ScoreCase {
    /// Logits and statistics after the kernel ran in the order of `schedule`.
    ///
    /// # Errors
    /// What the emulator found wrong.
    pub fn emulate(&self, schedule: u64) -> Result<(Vec<f32>, Vec<f32>), Fault> {
        let entries = entries(&self.entries);
        let directories = Buffer::from_slice(&self.directories);
        let (summaries, queries) = (words(&self.summaries), words(&self.queries));
        let (row_pages, always) = (Buffer::from_slice(&self.row_pages), Buffer::from_slice(&self.always));
        let logits = Buffer::from_slice(&self.logits());
        let statistics = Buffer::from_slice(&self.statistics());
        let sizes =
            [self.kv_heads, self.group, self.head_words, self.segment_partitions, self.layer, self.stride];
        let [kv_heads, group, head_words, segment_partitions, layer, stride] = sizes.map(|size| size as u32);
        let request_rows = self.layers as u32 * kv_heads;
        let blocks = self.rows() as u32 * self.tiles;
        let shared = abi::score::shared_bytes(head_words << u32::from(self.bounds));
        let launch = Launch::new(blocks, abi::score::BLOCK).shared(shared as usize);
        launch.seed(schedule).run(|| {
            // SAFETY: the emulator checks every access.
            unsafe {
                score(
                    entries.view(),
                    directories.view(),
                    summaries.view(),
                    queries.view(),
                    kv_heads,
                    group,
                    head_words,
                    self.bounds.into(),
                    segment_partitions,
                    request_rows,
                    layer,
                    self.scale,
                    stride,
                    self.tiles,
                    row_pages.view(),
                    u32::from(!self.row_pages.is_empty()),
                    always.view(),
                    self.mark_words as u32,
                    logits.view_mut(),
                    statistics.view_mut(),
                );
            }
        })?;
        Ok((logits.to_vec(), statistics.to_vec()))
    }
}

/// Outputs, logarithms of sums and arrivals of a launch.
type Attended = (Vec<u128>, Vec<f32>, Vec<u32>);

impl AttendCase {
    /// Outputs and logarithms of sums after the kernel ran in the order of `schedule`.
    ///
    /// # Errors
    /// What the emulator found wrong.
    pub fn emulate(&self, schedule: u64) -> Result<(Vec<u128>, Vec<f32>), Fault> {
        let blocks = self.units() * self.splits;
        // In every other schedule two pages of each row are awaited, and have arrived.
        let awaited = (schedule % 2 == 1).then_some((2, 2));
        let (outputs, lse, arrivals) = self.emulate_blocks(blocks, awaited, schedule)?;
        assert!(arrivals.iter().all(|count| *count == 0), "counted down for the next launch");
        Ok((outputs, lse))
    }

    /// The first `blocks` blocks alone, of which the last `pages` of each row's pages have not arrived: they wait for ever, or need none of those.
    ///
    /// # Errors
    /// What the emulator found wrong, which is a livelock where one waits.
    pub fn emulate_missing(&self, blocks: usize, pages: u32) -> Result<(), Fault> {
        self.emulate_blocks(blocks, Some((pages, 0)), 0).map(|_| ())
    }

    /// The first `blocks` blocks, where so many pages of each row are awaited, and so many have arrived.
    fn emulate_blocks(
        &self,
        blocks: usize,
        awaited: Option<(u32, u32)>,
        schedule: u64,
    ) -> Result<Attended, Fault> {
        let entries = entries(&self.entries);
        let (pages, page_counts) = (Buffer::from_slice(&self.pages), Buffer::from_slice(&self.page_counts));
        let (steady, biases) = (Buffer::from_slice(&self.steady), Buffer::from_slice(&self.biases));
        let (pool, queries) = (words(&self.pool), words(&self.queries));
        let partials = words(&vec![super::POISON; self.partials()]);
        let arrivals = Buffer::from_slice(&vec![0; self.units()]);
        let (coming, there) = awaited.unwrap_or_default();
        let copy_counts = Buffer::from_slice(&vec![coming; self.rows()]);
        let page_words = (2 * self.page_tokens * self.head_words) as u32;
        let arrived = Buffer::from_slice(&vec![there * page_words; self.rows()]);
        let (outputs, lse) = (words(&self.outputs()), Buffer::from_slice(&self.lse()));
        let sizes = [
            self.kv_heads,
            self.group,
            self.layer,
            self.list_capacity,
            self.page_tokens,
            self.splits,
            self.head_words,
        ];
        let [kv_heads, group, layer, list_capacity, page_tokens, splits, head_words] =
            sizes.map(|size| size as u32);
        let kernel = if head_words == 8 { attend_64 } else { attend_128 };
        let launch = Launch::new(blocks as u32, abi::attend::BLOCK)
            .shared(abi::attend::shared_bytes(head_words) as usize);
        let launch = Launch { poll_limit: 1 << 14, ..launch };
        launch.seed(schedule).run(|| {
            // SAFETY: the emulator checks every access.
            unsafe {
                kernel(
                    entries.view(),
                    kv_heads,
                    group,
                    layer,
                    pages.view(),
                    page_counts.view(),
                    list_capacity,
                    steady.view(),
                    biases.view(),
                    (!self.biases.is_empty()).into(),
                    pool.view(),
                    page_tokens,
                    queries.view(),
                    self.scale,
                    copy_counts.view(),
                    arrived.view(),
                    awaited.is_some().into(),
                    splits,
                    partials.view_mut(),
                    arrivals.view_mut(),
                    outputs.view_mut(),
                    lse.view_mut(),
                );
            }
        })?;
        Ok((to_words(&outputs), lse.to_vec(), arrivals.to_vec()))
    }
}

impl PrefillCase {
    /// Outputs and logarithms of sums after the kernel for all GPUs ran in the order of `schedule`.
    ///
    /// # Errors
    /// What the emulator found wrong.
    pub fn emulate(&self, schedule: u64) -> Result<(Vec<u128>, Vec<f32>), Fault> {
        self.emulate_as(false, schedule)
    }

    /// The same after Hopper's.
    ///
    /// # Errors
    /// What the emulator found wrong.
    pub fn emulate_wgmma(&self, schedule: u64) -> Result<(Vec<u128>, Vec<f32>), Fault> {
        self.emulate_as(true, schedule)
    }

    fn emulate_as(&self, wgmma: bool, schedule: u64) -> Result<(Vec<u128>, Vec<f32>), Fault> {
        let [queries, keys, values] = [&self.queries, &self.keys, &self.values].map(|tensor| words(tensor));
        let [first_query, first_key, first_tile] =
            [&self.first_query, &self.first_key, &self.first_tile].map(|first| Buffer::from_slice(first));
        let (outputs, lse) = (words(&self.outputs()), Buffer::from_slice(&self.lse()));
        let sizes = [self.first_tile.len() - 1, self.kv_heads, self.group, self.head_words];
        let [requests, kv_heads, group, head_words] = sizes.map(|size| size as u32);
        let (block, shared_bytes) = if wgmma {
            (abi::prefill_wgmma::BLOCK, abi::prefill_wgmma::shared_bytes(head_words))
        } else {
            (abi::prefill::BLOCK, abi::prefill::shared_bytes(head_words))
        };
        let kernel = match (wgmma, head_words) {
            (false, 8) => prefill_64,
            (false, _) => prefill_128,
            (true, 8) => prefill_wgmma_64,
            (true, _) => prefill_wgmma_128,
        };
        let launch = Launch::new(self.tiles * kv_heads * group, block).shared(shared_bytes as usize);
        launch.seed(schedule).run(|| {
            // SAFETY: the emulator checks every access.
            unsafe {
                kernel(
                    queries.view(),
                    keys.view(),
                    values.view(),
                    first_query.view(),
                    first_key.view(),
                    first_tile.view(),
                    requests,
                    kv_heads,
                    group,
                    self.scale,
                    outputs.view_mut(),
                    lse.view_mut(),
                );
            }
        })?;
        Ok((to_words(&outputs), lse.to_vec()))
    }
}

/// Threads of a block of `select` and `top_k`, whose results don't depend on them.
fn select_block(schedule: u64) -> u32 {
    if schedule.is_multiple_of(2) { abi::select::LEAST_BLOCK } else { abi::select::MAX_BLOCK }
}

impl SelectCase {
    /// The selection after the kernel ran in the order of `schedule`.
    ///
    /// # Errors
    /// What the emulator found wrong.
    pub fn emulate(&self, schedule: u64) -> Result<Selection, Fault> {
        let before = self.outputs();
        let (entries, logits) = (entries(&self.entries), quads(&self.logits));
        let statistics = Buffer::from_slice(&self.statistics);
        let (forced, masked) = (Buffer::from_slice(&self.forced), Buffer::from_slice(&self.masked));
        let keys = words(&vec![super::POISON; self.keys()]);
        let row_pages = Buffer::from_slice(&self.row_pages);
        let (ids, selected) = (Buffer::from_slice(&before.ids), Buffer::from_slice(&before.selected));
        let estimated_ids = Buffer::from_slice(&before.estimated_ids);
        let estimated = Buffer::from_slice(&before.estimated);
        let sizes = [
            self.kv_heads,
            self.group,
            self.stride,
            self.words_of(&self.forced),
            self.words_of(&self.masked),
            self.first_row,
            self.estimates,
            self.resident,
            self.capacity,
        ];
        let [kv_heads, group, stride, forced_words, masked_words, first_row, estimates, resident, capacity] =
            sizes.map(|size| size as u32);
        let launch = Launch::new(self.rows() as u32, select_block(schedule))
            .shared(abi::select::shared_bytes(resident) as usize);
        launch.seed(schedule).run(|| {
            // SAFETY: the emulator checks every access.
            unsafe {
                select(
                    entries.view(),
                    logits.view(),
                    statistics.view(),
                    kv_heads,
                    group,
                    stride,
                    if self.softmax { self.tiles } else { 0 },
                    self.merge_code(),
                    self.least,
                    self.top_p,
                    forced.view(),
                    masked.view(),
                    forced_words,
                    masked_words,
                    first_row,
                    row_pages.view(),
                    u32::from(!self.row_pages.is_empty()),
                    estimates,
                    self.share,
                    resident,
                    keys.view_mut(),
                    capacity,
                    ids.view_mut(),
                    selected.view_mut(),
                    estimated_ids.view_mut(),
                    estimated.view_mut(),
                );
            }
        })?;
        Ok(Selection {
            ids: ids.to_vec(),
            selected: selected.to_vec(),
            estimated_ids: estimated_ids.to_vec(),
            estimated: estimated.to_vec(),
        })
    }
}

impl TopKCase {
    /// Ids and their numbers after the kernel ran in the order of `schedule`.
    ///
    /// # Errors
    /// What the emulator found wrong.
    pub fn emulate(&self, schedule: u64) -> Result<(Vec<u32>, Vec<u32>), Fault> {
        let scores = quads(&self.scores);
        let (counts, k) = (Buffer::from_slice(&self.counts), Buffer::from_slice(&self.k));
        let keys = words(&vec![super::POISON; self.keys()]);
        let (ids, selected) =
            (Buffer::from_slice(&self.ids()), Buffer::from_slice(&vec![super::WILD; self.rows()]));
        let [stride, resident, capacity] =
            [self.stride, self.resident, self.capacity].map(|size| size as u32);
        let launch = Launch::new(self.rows() as u32, select_block(schedule))
            .shared(abi::select::shared_bytes(resident) as usize);
        launch.seed(schedule).run(|| {
            // SAFETY: the emulator checks every access.
            unsafe {
                top_k(
                    scores.view(),
                    counts.view(),
                    k.view(),
                    stride,
                    resident,
                    keys.view_mut(),
                    capacity,
                    ids.view_mut(),
                    selected.view_mut(),
                );
            }
        })?;
        Ok((ids.to_vec(), selected.to_vec()))
    }
}
