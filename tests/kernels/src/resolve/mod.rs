//! Cases of `resolve`: several steps of a batch, and after each what the CPU's `RowCache` makes of them.

mod emulate;
mod reference;

use std::fmt::Debug;

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use spinkv_kernels::abi::{Entry, PageCopy, SEGMENT_KEYS, SLOT_HELD, SLOT_STAMP};

use super::WILD;
use reference::Batch;

/// What lies in device memory from step to step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tables {
    /// Segment numbers.
    pub directories: Vec<u32>,
    /// `[segments, request rows, 512]`: slots.
    pub segments: Vec<u16>,
    /// Page key of each slot.
    pub owners: Vec<u32>,
    /// Physical page of each slot.
    pub physical: Vec<u32>,
    /// Bytes of the slots, four a word.
    pub states: Vec<u32>,
    /// Physical pages of the steady zones.
    pub steady: Vec<u32>,
    /// Slabs of the host pages.
    pub host_slabs: Vec<u32>,
    /// Bits of complete host pages.
    pub host_valid: Vec<u32>,
}

/// What a step gives.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lists {
    /// `[rows, list capacity]`: physical pages.
    pub pages: Vec<u32>,
    /// `[rows]`: how many.
    pub page_counts: Vec<u32>,
    /// `[rows, list capacity]`: misses.
    pub copies: Vec<PageCopy>,
    /// `[rows, list capacity]`: their page keys.
    pub copy_keys: Vec<u32>,
    /// `[rows]`: how many.
    pub copy_counts: Vec<u32>,
    /// `[rows]`: words of the misses that are there, none yet.
    pub arrived: Vec<u32>,
    /// `[rows]`: why a row has none.
    pub faults: Vec<u32>,
}

/// One launch.
#[derive(Debug)]
pub struct ResolveStep {
    /// What the host did to the tables before it (pins, growth, shrinking), if anything.
    pub tables: Option<Tables>,
    /// The layer that it resolves.
    pub layer: u32,
    /// `[batch]`.
    pub entries: Vec<Entry>,
    /// `[rows, id stride]`; wild from the count on.
    pub ids: Vec<u32>,
    /// `[rows]`.
    pub id_counts: Vec<u32>,
    expected: Tables,
    lists: Lists,
}

/// Some steps of a random batch of requests.
#[derive(Debug)]
pub struct ResolveCase {
    /// KV heads of a layer.
    pub kv_heads: u32,
    /// Rows of all layers.
    pub request_rows: u32,
    /// Partitions on a page.
    pub page_partitions: u32,
    /// Pages of a partition.
    pub partition_pages: u32,
    /// Ids between rows.
    pub id_stride: u32,
    /// The most slots of a row.
    pub slot_capacity: u32,
    /// The most segments of a request.
    pub segment_capacity: u32,
    /// The most pages of a selection.
    pub list_capacity: u32,
    /// Before the first step.
    pub tables: Tables,
    /// One launch after another.
    pub steps: Vec<ResolveStep>,
}

/// How large a case is.
#[derive(Clone, Copy)]
struct Size {
    requests: usize,
    layers: usize,
    kv_heads: usize,
    slots: usize,
    steps: usize,
    longest: usize,
}

impl ResolveCase {
    /// The case of a seed: batches with padding, tokens and chunks of one or more pages as partitions, few slots and many, holes among
    /// them, selections longer than a block, growth, shrinking, pins, rows that fail.
    pub fn random(seed: u64) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let slots = match rng.random_range(0..8) {
            0 => rng.random_range(1..8),
            1 => rng.random_range(1000..1400),
            2 => rng.random_range(300..600),
            _ => rng.random_range(8..200),
        };
        let small = slots < 300;
        let size = Size {
            requests: if small { rng.random_range(1..=3) } else { 1 },
            layers: rng.random_range(1..=2),
            kv_heads: rng.random_range(1..=if small { 3 } else { 1 }),
            slots,
            steps: rng.random_range(2..=5),
            longest: if rng.random_bool(0.3) { slots } else { rng.random_range(1..=slots) },
        };
        Self::sized(&mut rng, size)
    }

    /// One row with room for pages that nobody uses while the clock goes round twice.
    pub fn long(seed: u64) -> Self {
        let size = Size { requests: 1, layers: 1, kv_heads: 1, slots: 500, steps: 150, longest: 4 };
        Self::sized(&mut ChaCha8Rng::seed_from_u64(seed), size)
    }

    /// 16 requests of 8 KV heads, 256 pages selected of 1,536 slots, as a decode step has.
    pub fn large(seed: u64) -> Self {
        let size = Size { requests: 16, layers: 2, kv_heads: 8, slots: 1536, steps: 12, longest: 256 };
        Self::sized(&mut ChaCha8Rng::seed_from_u64(seed), size)
    }

    fn sized(rng: &mut ChaCha8Rng, size: Size) -> Self {
        let (page_partitions, partition_pages) = match rng.random_range(0..4) {
            0 => (rng.random_range(2..=8), 1),
            1 => (1, rng.random_range(2..=4)),
            _ => (1, 1),
        };
        let list_capacity = (size.longest as u32).next_multiple_of(partition_pages) + rng.random_range(0..4);
        let mut batch = Batch::new(rng, size, page_partitions, partition_pages);
        let tables = batch.tables();
        let id_stride = list_capacity * page_partitions + 3;
        let mut steps = Vec::new();
        for _ in 0..size.steps {
            steps.push(batch.step(rng, list_capacity, id_stride));
        }
        Self {
            kv_heads: size.kv_heads as u32,
            request_rows: (size.layers * size.kv_heads) as u32,
            page_partitions,
            partition_pages,
            id_stride,
            slot_capacity: batch.slot_capacity(),
            segment_capacity: batch.keys() / SEGMENT_KEYS,
            list_capacity,
            tables,
            steps,
        }
    }

    /// Lists before a launch: poison.
    pub fn poisoned(&self, step: usize) -> Lists {
        let rows = self.rows(step);
        let entries = rows * self.list_capacity as usize;
        Lists {
            pages: vec![WILD; entries],
            page_counts: vec![WILD; rows],
            copies: vec![PageCopy { host_page: WILD, device_page: WILD }; entries],
            copy_keys: vec![WILD; entries],
            copy_counts: vec![WILD; rows],
            arrived: vec![WILD; rows],
            faults: vec![WILD; rows],
        }
    }

    /// Whether a step lists its misses' page keys.
    pub fn keyed(step: usize) -> bool {
        step.is_multiple_of(2)
    }

    /// Whether a step lists its misses behind the pages that are here.
    pub fn misses_last(step: usize) -> bool {
        step % 4 < 2
    }

    /// Rows of a step's batch.
    pub fn rows(&self, step: usize) -> usize {
        self.steps[step].entries.len() * self.kv_heads as usize
    }

    /// Whether tables and lists after step `step` are the reference's.
    ///
    /// # Errors
    /// The first difference.
    pub fn check(&self, step: usize, tables: &Tables, lists: &Lists) -> Result<(), String> {
        let ResolveStep { expected: expected_tables, lists: of, .. } = &self.steps[step];
        let at = |what: &str| format!("step {step}, {what}");
        same(&at("faults"), &lists.faults, &of.faults)?;
        same(&at("arrived"), &lists.arrived, &of.arrived)?;
        same(&at("page counts"), &lists.page_counts, &of.page_counts)?;
        same(&at("copy counts"), &lists.copy_counts, &of.copy_counts)?;
        let capacity = self.list_capacity as usize;
        for row in 0..self.rows(step) {
            let listed = |count: u32| row * capacity..row * capacity + count as usize;
            let (pages, copies) = (listed(of.page_counts[row]), listed(of.copy_counts[row]));
            let mut expected = of.pages[pages.clone()].to_vec();
            if Self::misses_last(step) {
                let fetched =
                    |page: &u32| of.copies[copies.clone()].iter().any(|copy| copy.device_page == *page);
                // Stable: each of both in its order.
                expected.sort_by_key(fetched);
            }
            same(&at(&format!("pages of row {row}")), &lists.pages[pages], &expected)?;
            let keys = if Self::keyed(step) { of } else { &self.poisoned(step) };
            let what = at(&format!("keys of the copies of row {row}"));
            same(&what, &lists.copy_keys[copies.clone()], &keys.copy_keys[copies.clone()])?;
            same(&at(&format!("copies of row {row}")), &lists.copies[copies.clone()], &of.copies[copies])?;
        }
        same(&at("segments"), &tables.segments, &expected_tables.segments)?;
        same(&at("owners"), &tables.owners, &expected_tables.owners)?;
        same(&at("physical pages"), &tables.physical, &expected_tables.physical)?;
        same(&at("steady pages"), &tables.steady, &expected_tables.steady)?;
        same(&at("states"), &shown(&tables.states), &shown(&expected_tables.states))
    }

    /// Steps with a fault of the kind.
    pub fn faults(&self, fault: u32) -> usize {
        self.steps.iter().filter(|step| step.lists.faults.contains(&fault)).count()
    }
}

/// The bytes of the slots; stamps of slots without a page mean nothing.
fn shown(states: &[u32]) -> Vec<u8> {
    let bytes: &[u8] = bytemuck::cast_slice(states);
    bytes.iter().map(|byte| if byte & SLOT_HELD == 0 { byte & !SLOT_STAMP } else { *byte }).collect()
}

fn same<T: PartialEq + Debug>(what: &str, found: &[T], expected: &[T]) -> Result<(), String> {
    if found.len() != expected.len() {
        return Err(format!("{what}: {} where {} were expected", found.len(), expected.len()));
    }
    match found.iter().zip(expected).position(|(found, expected)| found != expected) {
        None => Ok(()),
        Some(at) => Err(format!("{what}, {at}: {:?} where {:?} was expected", found[at], expected[at])),
    }
}

impl Lists {
    /// Adds a row.
    fn add(&mut self, pages: &[u32], copies: &[(u32, PageCopy)], fault: u32, capacity: u32) {
        let end = self.pages.len() + capacity as usize;
        self.pages.extend(pages);
        self.pages.resize(end, WILD);
        self.copies.extend(copies.iter().map(|(_, copy)| copy));
        self.copy_keys.extend(copies.iter().map(|(key, _)| key));
        self.copy_keys.resize(end, WILD);
        self.copies.resize(end, PageCopy { host_page: WILD, device_page: WILD });
        self.page_counts.push(pages.len() as u32);
        self.copy_counts.push(copies.len() as u32);
        self.arrived.push(0);
        self.faults.push(fault);
    }
}
