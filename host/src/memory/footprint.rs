use std::iter::Sum;
use std::ops::{Add, AddAssign};

use super::RequestPlan;
use crate::KvConfig;
use crate::paging::{HostTable, SEGMENT_KEYS, SegmentId, SteadyPages, StepClock};
use crate::pipeline::Reach;

/// Bytes on the GPU, by kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GpuBytes {
    /// Directories: one a request, from segment number to segment.
    pub directories: u64,
    /// Segments: page key to slot, for all rows of a request.
    pub segments: u64,
    /// Slot arrays: page key, physical page, pins and state of each slot.
    pub slot_arrays: u64,
    /// Where the steady zone's pages are.
    pub steady_lists: u64,
    /// Page tables of the host's pages, by a backend that keeps them on the GPU.
    pub host_tables: u64,
    /// Bits of the partitions that every step reads.
    pub marks: u64,
    /// What Select reads; not a table, and counted beside them.
    pub summaries: u64,
    /// What [keys in low rank](crate::pipeline::KeyStore::LowRank) are rebuilt from, of each token; counted as summaries are.
    pub key_coefficients: u64,
    /// What they are rebuilt with.
    pub key_bases: u64,
    /// Pages of the steady zone.
    pub steady_pages: u64,
    /// Pages of the caches, mandatory and buffering.
    pub cache_pages: u64,
    /// Pages of ended requests that a transfer still touches.
    pub in_flight_pages: u64,
}

impl GpuBytes {
    /// All tables.
    pub fn tables(&self) -> u64 {
        self.directories
            + self.segments
            + self.slot_arrays
            + self.steady_lists
            + self.host_tables
            + self.marks
    }

    /// All pages.
    pub fn pages(&self) -> u64 {
        self.steady_pages + self.cache_pages + self.in_flight_pages
    }

    /// Coefficients and bases of keys in low rank.
    pub fn key_factors(&self) -> u64 {
        self.key_coefficients + self.key_bases
    }

    /// Everything.
    pub fn total(&self) -> u64 {
        self.tables() + self.summaries + self.key_factors() + self.pages()
    }
}

/// Bytes on the host, by kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HostBytes {
    /// Page tables: the slabs of each row, and which of their pages are complete.
    pub page_tables: u64,
    /// Where partitions begin and end: none, since a partition is whole pages, whose keys follow from its id.
    pub offset_tables: u64,
    /// Slabs that anybody holds.
    pub pages: u64,
}

impl HostBytes {
    /// All tables.
    pub fn tables(&self) -> u64 {
        self.page_tables + self.offset_tables
    }
}

/// Bytes by tier and by kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MemoryUsage {
    /// On the GPU.
    pub gpu: GpuBytes,
    /// On the host.
    pub host: HostBytes,
}

impl Add for MemoryUsage {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        let (a, b) = (self.gpu, other.gpu);
        let gpu = GpuBytes {
            directories: a.directories + b.directories,
            segments: a.segments + b.segments,
            slot_arrays: a.slot_arrays + b.slot_arrays,
            steady_lists: a.steady_lists + b.steady_lists,
            host_tables: a.host_tables + b.host_tables,
            marks: a.marks + b.marks,
            summaries: a.summaries + b.summaries,
            key_coefficients: a.key_coefficients + b.key_coefficients,
            key_bases: a.key_bases + b.key_bases,
            steady_pages: a.steady_pages + b.steady_pages,
            cache_pages: a.cache_pages + b.cache_pages,
            in_flight_pages: a.in_flight_pages + b.in_flight_pages,
        };
        let (a, b) = (self.host, other.host);
        let host = HostBytes {
            page_tables: a.page_tables + b.page_tables,
            offset_tables: a.offset_tables + b.offset_tables,
            pages: a.pages + b.pages,
        };
        Self { gpu, host }
    }
}

impl AddAssign for MemoryUsage {
    fn add_assign(&mut self, other: Self) {
        *self = *self + other;
    }
}

impl Sum for MemoryUsage {
    fn sum<I: Iterator<Item = Self>>(all: I) -> Self {
        all.fold(Self::default(), Add::add)
    }
}

/// Bytes of an element of a summary, and of the factors of keys, on the CPU backend, which keeps `f32`; a GPU keeps bf16.
pub const SUMMARY_ELEMENT_BYTES: usize = size_of::<f32>();

/// What one request takes at a length of `tokens` tokens, by formula, with `element_bytes` for an element of a summary, and of the factors of keys.
///
/// Where all rows [select](Reach::Selected); others have more slots, or none ([`RequestPlan::slots`]). With `R` rows, `K` = [page keys that can be selected](KvConfig::retrievable_pages) at this length and `K_max`
/// at the longest, `S = ceil(K / 512)` segments, `C` slots and `Z` steady pages a row, `P` partitions a segment
/// and `W` elements a summary (of clusters with the mean value, and four bytes more for the number of tokens), `H = ceil(full pages / 16)` slabs a row (of clusters as many as they may need), and, for methods with partitions that every step reads,
/// `M = ceil(partitions at the longest / 32)` words of marks, else 0; with `L` layers of `D` KV heads times head width, and pages of `T`
/// tokens, keys in low rank of rank `r` (else 0):
///
/// ```text
/// directories   8 ceil(K_max / 512)
/// segments      S R 512 x 2
/// slot arrays   R (10 C + 16 ceil(C / 64) + 4)
/// steady lists  R (4 Z + 8)
/// marks         R 4 M
/// summaries     S R P W x element bytes
/// coefficients  S L 512 T r x element bytes
/// bases         L D r x element bytes
/// steady zone   R Z page bytes
/// cache         R C page bytes
/// page tables   R (6 H + 4)
/// host pages    R H 16 host page bytes
/// ```
/// [Host pages](KvConfig::host_layout) may hold less than GPU pages.
pub fn footprint(config: &KvConfig, plan: &RequestPlan, tokens: usize, element_bytes: usize) -> MemoryUsage {
    let (rows, page_bytes) = (plan.rows as u64, config.layout().page_bytes() as u64);
    let segments = config.segments(tokens) as u64;
    let slots_of = |reach| plan.slots(reach) as u64;
    let rows_of = plan.by_reach;
    let slot_arrays = rows_of.selected as u64 * slot_array_bytes(slots_of(Reach::Selected))
        + rows_of.everything as u64 * slot_array_bytes(slots_of(Reach::Everything))
        + rows_of.steady as u64 * slot_array_bytes(slots_of(Reach::Steady));
    let steady = plan.row.steady_pages as u64;
    let slabs = config.host_slabs(tokens) as u64;
    let summary = config.summary_bytes(element_bytes) as u64;
    let factors = |elements: usize| (elements * element_bytes) as u64;
    MemoryUsage {
        gpu: GpuBytes {
            directories: config.segments(plan.max_tokens) as u64 * size_of::<SegmentId>() as u64,
            segments: segments * rows * (SEGMENT_KEYS * size_of::<u16>()) as u64,
            slot_arrays,
            host_tables: 0,
            steady_lists: rows * (steady * SteadyPages::ENTRY_BYTES + SteadyPages::RANGE_BYTES),
            marks: rows * 4 * config.mark_words(plan.max_tokens) as u64,
            summaries: segments * rows * summary,
            key_coefficients: segments * factors(config.coefficient_elements()),
            key_bases: factors(config.basis_elements()),
            steady_pages: rows * steady * page_bytes,
            cache_pages: plan.cache_pages() as u64 * page_bytes,
            in_flight_pages: 0,
        },
        host: HostBytes {
            page_tables: rows * (slabs * HostTable::SLAB_BYTES + HostTable::COUNT_BYTES),
            offset_tables: 0,
            pages: rows * slabs * config.host_layout().slab_bytes(),
        },
    }
}

/// Bytes of a row's slot arrays: page key and physical page (`u32`), pins and state (`u8`) of each slot, two bits
/// a slot in whole words (empty, used by this selection), and the row's clock.
pub fn slot_array_bytes(slots: u64) -> u64 {
    10 * slots + 2 * 8 * slots.div_ceil(64) + size_of::<StepClock>() as u64
}

/// Tables without levels, to compare with: one entry for each partition that any row could ever have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FlatLayout {
    /// F1: one page a partition. Slot 4, GPU page 4, host page 4, host offset and length 8: 20 bytes.
    OnePage,
    /// F2: partitions of any size, each with room for its largest list of pages in both page tables:
    /// `4 + 4 M + 4 M + 8` bytes.
    PageLists {
        /// `M`, the most pages of a partition.
        max_pages: u64,
    },
}

impl FlatLayout {
    /// Bytes of one entry.
    pub fn entry_bytes(&self) -> u64 {
        match self {
            Self::OnePage => 20,
            Self::PageLists { max_pages } => 12 + 8 * max_pages,
        }
    }

    /// Bytes of the tables of `requests` requests of `rows` rows with `partitions` partitions each.
    pub fn bytes(&self, requests: u64, rows: u64, partitions: u64) -> u64 {
        requests * rows * partitions * self.entry_bytes()
    }
}
