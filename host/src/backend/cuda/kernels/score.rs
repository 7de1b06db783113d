use spinkv_kernels::abi::{ENTRY_WORDS, Entry, score};

use super::super::driver::{
    Argument, DeviceBuffer, LaunchShape, Result, Stream, check_multiple, check_operand, check_range,
    launch_with,
};
use super::Kernels;
use crate::memory::Word;

/// A launch of `score`: the logits of a decode step's queries against the summaries, one layer.
#[derive(Clone, Copy, Debug)]
pub struct Score<'a> {
    /// `[batch]`.
    pub entries: &'a DeviceBuffer<Entry>,
    /// Segments of the requests, as the entries say.
    pub directories: &'a DeviceBuffer<u32>,
    /// `[segments, request_rows, segment_partitions, summary words]` bf16.
    pub summaries: &'a DeviceBuffer<Word>,
    /// `[batch, kv_heads * group, head_words]` bf16.
    pub queries: &'a DeviceBuffer<Word>,
    /// KV heads.
    pub kv_heads: u32,
    /// Query heads of a KV head.
    pub group: u32,
    /// Words of a query: head dim / 8.
    pub head_words: u32,
    /// Summaries are the least and the greatest of the keys' elements, `[2, head_words]`; else `[head_words]`.
    pub bounds: bool,
    /// Partitions that begin in a segment.
    pub segment_partitions: u32,
    /// Rows of a request: layers x KV heads.
    pub request_rows: u32,
    /// Whose summaries.
    pub layer: u32,
    /// Factor of the logits.
    pub scale: f32,
    /// Room for a row's logits, a multiple of 4: a captured launch serves rows up to this length.
    pub stride: u32,
    /// `[rows of all requests, 2]`: how many partitions rows have, where that is their own number; else the entries say it.
    pub row_pages: Option<&'a DeviceBuffer<u32>>,
    /// `[rows of all requests, words]`: bits of the partitions that are read in any case, which have no part in the statistics; and how many words.
    pub always: Option<(&'a DeviceBuffer<u32>, u32)>,
    /// `[batch * kv_heads, group, stride]`.
    pub logits: &'a DeviceBuffer<f32>,
    /// `[batch * kv_heads, group, tiles, 2]`: of each tile the greatest logit, and the sum of e^(logit - greatest), for as many tiles as
    /// [`tiles`](score::tiles) says.
    pub statistics: &'a DeviceBuffer<f32>,
}

impl Score<'_> {
    /// Async: logits and statistics are there when `stream` has come this far. An empty batch launches nothing.
    ///
    /// # Errors
    /// [`Operand`](super::super::driver::DriverError::Operand) for a size of 0, a group beyond [`MAX_GROUP`](score::MAX_GROUP), a
    /// summary beyond [`MAX_SUMMARY_WORDS`](score::MAX_SUMMARY_WORDS), a layer that the request's rows don't have, a stride that is
    /// no multiple of 4, or rows and logits beyond 32 bits,
    /// [`OutOfRange`](super::super::driver::DriverError::OutOfRange) for a buffer that is too short, or a failed launch.
    ///
    /// # Safety
    /// When the launch runs, no entry has more than `stride` partitions, and the directories name segments that exist for all of
    /// them; until it has run nothing writes what it reads, and nothing uses what it writes. A launch directly ahead of it on the stream that lets it go before its
    /// own end (`launch_dependents`, as all of a decode step's stages do) may write the queries, and nothing else of what it reads.
    pub unsafe fn launch(&self, kernels: &Kernels, stream: &Stream) -> Result<()> {
        let Self { kv_heads, group, head_words, segment_partitions, request_rows, layer, stride, .. } = *self;
        let most = u64::from(u32::MAX);
        check_operand("score kv_heads", kv_heads.into(), 1..=most)?;
        check_operand("score group", group.into(), 1..=score::MAX_GROUP.into())?;
        let widest = score::MAX_SUMMARY_WORDS >> u32::from(self.bounds);
        check_operand("score head_words", head_words.into(), 1..=widest.into())?;
        check_operand("score segment_partitions", segment_partitions.into(), 1..=most)?;
        let rows_of_layers = (u64::from(layer) + 1) * u64::from(kv_heads);
        check_operand("score (layer + 1) * kv_heads", rows_of_layers, 1..=request_rows.into())?;
        check_operand("score stride", stride.into(), 1..=most)?;
        check_multiple("score stride", stride.into(), 4)?;
        let summary_words = head_words << u32::from(self.bounds);
        let rows = self.entries.len() as u64 * u64::from(kv_heads);
        let of_row = score::tiles(rows, stride);
        let tiles = u64::from(of_row);
        check_operand("score batch * kv_heads * tiles", rows * tiles, 0..=i32::MAX as u64)?;
        let heads = rows * u64::from(group);
        check_operand("score batch * kv_heads * group", heads, 0..=most)?;
        check_operand("score group * stride", u64::from(group) * u64::from(stride), 0..=most)?;
        check_range("score queries", 0, heads as usize * head_words as usize, self.queries.len())?;
        check_range("score logits", 0, heads as usize * stride as usize, self.logits.len())?;
        check_range("score statistics", 0, heads as usize * tiles as usize * 2, self.statistics.len())?;
        if let Some(row_pages) = self.row_pages {
            check_range("score row_pages", 0, 2 * rows_of_layers as usize, row_pages.len())?;
        }
        if let Some((marks, words)) = self.always {
            check_operand("score mark words", words.into(), stride.div_ceil(32).into()..=most)?;
            let marks_of_request = rows_of_layers as usize * words as usize;
            check_range("score always", 0, marks_of_request, marks.len())?;
        }
        // Summaries are counted in 32 bits.
        check_operand("score summaries", (self.summaries.len() / summary_words as usize) as u64, 0..=most)?;
        if rows == 0 {
            return Ok(());
        }
        const { assert!(ENTRY_WORDS * size_of::<Word>() == size_of::<Entry>(), "entries are read as words") };
        let arguments: [Argument; 20] = [
            self.entries.into(),
            self.directories.into(),
            self.summaries.into(),
            self.queries.into(),
            kv_heads.into(),
            group.into(),
            head_words.into(),
            u32::from(self.bounds).into(),
            segment_partitions.into(),
            request_rows.into(),
            layer.into(),
            self.scale.into(),
            stride.into(),
            of_row.into(),
            self.row_pages.unwrap_or(self.directories).into(),
            u32::from(self.row_pages.is_some()).into(),
            self.always.map_or(self.directories, |(marks, _)| marks).into(),
            self.always.map_or(0, |(_, words)| words).into(),
            self.logits.into(),
            self.statistics.into(),
        ];
        let shared_bytes = score::shared_bytes(summary_words);
        let shape = LaunchShape::linear((rows * tiles) as u32, score::BLOCK)
            .with_shared_bytes(shared_bytes)
            .overlapping();
        // SAFETY: order and types are the kernel's; the caller answers for the entries and the directories.
        unsafe { launch_with(&kernels.score, &shape, stream, arguments) }
    }
}
