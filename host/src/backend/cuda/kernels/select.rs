use spinkv_kernels::abi::{Entry, select};

use super::super::driver::{
    Argument, DeviceBuffer, DriverError, LaunchShape, Result, Stream, check_length, check_operand,
    check_range, launch_with,
};
use super::Kernels;
use super::top_k::check_row;
use crate::memory::Word;
use crate::pipeline::GroupMerge;

/// A launch of `select`: the partitions of each row that a step reads, by the logits of [`Score`](super::Score).
#[derive(Clone, Copy, Debug)]
pub struct SelectPartitions<'a> {
    /// `[batch]`.
    pub entries: &'a DeviceBuffer<Entry>,
    /// `[batch * kv_heads, group, stride]`.
    pub logits: &'a DeviceBuffer<f32>,
    /// Those of one [`Score`](super::Score) of as many entries and KV heads and the same stride, for a softmax of each head over the row's partitions; `None` to merge logits as they
    /// are.
    pub statistics: Option<&'a DeviceBuffer<f32>>,
    /// KV heads.
    pub kv_heads: u32,
    /// Query heads of a KV head.
    pub group: u32,
    /// Room for a row's logits, a multiple of 4.
    pub stride: u32,
    /// How the heads' scores become one.
    pub merge: GroupMerge,
    /// Only partitions with at least this score, if any is given.
    pub least: Option<f32>,
    /// Below 1, only the fewest partitions whose scores reach this part of the sum of all.
    pub top_p: f32,
    /// Partitions that are always or never selected.
    pub marks: Option<Marks<'a>>,
    /// Row of KV head 0: layer * `kv_heads`.
    pub first_row: u32,
    /// As for [`Score`](super::Score).
    pub row_pages: Option<&'a DeviceBuffer<u32>>,
    /// How many of the best that are not selected to list besides.
    pub estimates: Option<Estimates<'a>>,
    /// Scores to have room for in shared memory, a multiple of 4; of longer rows the keys are kept in `keys`. Usually
    /// [`Kernels::resident`] of the stride.
    pub resident: u32,
    /// `[batch * kv_heads, stride]` u32 if `resident` is below `stride`, else of any length.
    pub keys: &'a DeviceBuffer<Word>,
    /// Ids that a row has room for.
    pub capacity: u32,
    /// `[batch * kv_heads, capacity]`: ascending.
    pub ids: &'a DeviceBuffer<u32>,
    /// `[batch * kv_heads]`: how many ids of a row were written.
    pub selected: &'a DeviceBuffer<u32>,
}

/// Bits of partitions, each `[rows of all requests, words]` as the entries say: bit `i % 32` of word `i / 32` for the `i`-th that may be
/// selected.
#[derive(Clone, Copy, Debug)]
pub struct Marks<'a> {
    /// Selected first, as far as the limit goes.
    pub forced: Option<&'a DeviceBuffer<u32>>,
    /// Never selected.
    pub masked: Option<&'a DeviceBuffer<u32>>,
    /// Words of a row.
    pub words: u32,
}

/// The second list: what is estimated and not read.
#[derive(Clone, Copy, Debug)]
pub struct Estimates<'a> {
    /// The most of a row.
    pub count: u32,
    /// Which share of a row's partitions.
    pub share: f32,
    /// `[batch * kv_heads, count]`: ascending.
    pub ids: &'a DeviceBuffer<u32>,
    /// `[batch * kv_heads]`: how many ids of a row were written.
    pub estimated: &'a DeviceBuffer<u32>,
}

impl SelectPartitions<'_> {
    /// Async: the ids are there when `stream` has come this far. An empty batch launches nothing.
    ///
    /// # Errors
    /// [`Length`](super::super::driver::DriverError::Length) if a list of counts has another number of rows,
    /// [`Operand`](super::super::driver::DriverError::Operand) for a size of 0, a group beyond its limit, a stride or a resident part
    /// beyond its limit, or marks for fewer partitions than the stride, [`Multiple`](DriverError::Multiple) for one that is no multiple
    /// of 4, [`Share`](DriverError::Share) and [`NotANumber`](DriverError::NotANumber) for a `top_p` or a share of estimates outside of (0, 1] and a `least`
    /// that is none, [`OutOfRange`](super::super::driver::DriverError::OutOfRange) for a buffer that is too short, or a failed launch.
    ///
    /// # Safety
    /// When the launch runs, no entry has more than `stride` partitions, their marks are in the tables, and with `top_p` below 1 the positive scores of a row add up
    /// to at most 32; until it has run nothing writes what it reads, and nothing uses what it writes. A launch directly ahead of it that lets it go before its own end
    /// may write logits, statistics and marks, and nothing else of what it reads.
    pub unsafe fn launch(&self, kernels: &Kernels, stream: &Stream) -> Result<()> {
        use spinkv_kernels::abi::score::{MAX_GROUP, tiles};

        let Self { kv_heads, group, stride, resident, capacity, .. } = *self;
        let most = u64::from(u32::MAX);
        check_operand("select kv_heads", kv_heads.into(), 1..=most)?;
        check_operand("select group", group.into(), 1..=MAX_GROUP.into())?;
        check_row([("select stride", stride), ("select resident", resident)])?;
        // A NaN is in no range either.
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            return Err(DriverError::Share { what: "select top_p", value: self.top_p.to_string() });
        }
        if self.least.is_some_and(f32::is_nan) {
            return Err(DriverError::NotANumber { what: "select least" });
        }
        let rows = self.entries.len() as u64 * u64::from(kv_heads);
        check_operand("select batch * kv_heads", rows, 0..=u64::from(i32::MAX as u32 / MAX_GROUP))?;
        let tiles = tiles(rows, stride);
        let rows = rows as usize;
        check_length("select selected", rows, self.selected.len())?;
        let heads = rows * group as usize;
        check_range("select logits", 0, heads * stride as usize, self.logits.len())?;
        if let Some(statistics) = self.statistics {
            check_range("select statistics", 0, heads * tiles as usize * 2, statistics.len())?;
        }
        let first_row = self.first_row;
        if let Some(Marks { forced, masked, words }) = self.marks {
            check_operand("select mark words", words.into(), stride.div_ceil(32).into()..=most)?;
            // Of one request at least: where others' are is the entries' to say. Words are counted in 32 bits.
            let marked_rows = u64::from(first_row) + u64::from(kv_heads);
            check_operand("select marks", marked_rows * u64::from(words), 0..=most)?;
            for (what, marks) in [("select forced", forced), ("select masked", masked)] {
                if let Some(marks) = marks {
                    check_operand(what, marks.len() as u64, 0..=most)?;
                    check_range(what, 0, marked_rows as usize * words as usize, marks.len())?;
                }
            }
        }
        if let Some(Estimates { count, share, ids, estimated }) = self.estimates {
            if !(share > 0.0 && share <= 1.0) {
                return Err(DriverError::Share { what: "select estimates", value: share.to_string() });
            }
            check_length("select estimated", rows, estimated.len())?;
            check_range("select estimated ids", 0, rows * count as usize, ids.len())?;
        }
        if let Some(row_pages) = self.row_pages {
            check_range(
                "select row_pages",
                0,
                2 * (first_row as usize + kv_heads as usize),
                row_pages.len(),
            )?;
        }
        check_length("select ids", rows * capacity as usize, self.ids.len())?;
        let keys = if resident < stride { rows * stride as usize / 4 } else { 0 };
        check_range("select keys", 0, keys, self.keys.len())?;
        if rows == 0 {
            return Ok(());
        }
        let (merge, logarithmic) = match self.merge {
            GroupMerge::Max => (select::MERGE_MAX, self.statistics.is_some()),
            GroupMerge::Sum => (select::MERGE_SUM, false),
            GroupMerge::Mean => (select::MERGE_MEAN, false),
        };
        let least =
            // Of a negative number there is no logarithm; all probabilities are above it.
            self.least.map_or(f32::NEG_INFINITY, |least| if logarithmic { least.max(0.0).ln() } else { least });
        // What a launch does not use it does not read or write.
        let words = |marks: Option<_>| marks.map_or(0, |_| self.marks.map_or(0, |marks| marks.words));
        let (forced, masked) =
            self.marks.map_or((None, None), |Marks { forced, masked, .. }| (forced, masked));
        let arguments: [Argument; 26] = [
            self.entries.into(),
            self.logits.into(),
            self.statistics.unwrap_or(self.logits).into(),
            kv_heads.into(),
            group.into(),
            stride.into(),
            self.statistics.map_or(0, |_| tiles).into(),
            merge.into(),
            least.into(),
            self.top_p.into(),
            forced.unwrap_or(self.ids).into(),
            masked.unwrap_or(self.ids).into(),
            words(forced).into(),
            words(masked).into(),
            self.first_row.into(),
            self.row_pages.unwrap_or(self.selected).into(),
            u32::from(self.row_pages.is_some()).into(),
            self.estimates.map_or(0, |estimates| estimates.count).into(),
            self.estimates.map_or(0.0, |estimates| estimates.share).into(),
            resident.into(),
            self.keys.into(),
            capacity.into(),
            self.ids.into(),
            self.selected.into(),
            self.estimates.map_or(self.ids, |estimates| estimates.ids).into(),
            self.estimates.map_or(self.selected, |estimates| estimates.estimated).into(),
        ];
        let shape = LaunchShape::linear(rows as u32, kernels.select_block(rows, stride, resident))
            .with_shared_bytes(select::shared_bytes(resident))
            .overlapping();
        // SAFETY: order and types are the kernel's; the caller answers for the entries and the scores.
        unsafe { launch_with(&kernels.select, &shape, stream, arguments) }
    }
}
