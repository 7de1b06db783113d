use super::driver::{Graph, Result, Stream, check_length};
use super::kernels::{Append, Gather, IndexStep, Kernels, Resolve, Score, SelectPartitions};

/// One layer of a decode step up to attention: Index, Offload, Select and Retrieve, in this order on one stream. Every decision is taken
/// on the GPU, from entries, tables and queries that lie there, so it can be captured once and replayed for every step of a batch.
///
/// The order is what makes it right, without an event: a partition that leaves the steady zone is summarised before it can be
/// selected; a page is on the host, and said to be, before a later step may evict it; a page leaves the steady zone in `resolve`, after
/// its last reader there.
#[derive(Clone, Copy, Debug)]
pub struct LayerStep<'a> {
    /// Index: summaries of the partitions that leave the steady zone; `None` for methods without.
    pub index: Option<IndexStep<'a>>,
    /// Offload: the new tokens, and pages that they fill.
    pub append: Append<'a>,
    /// Select: the queries against the summaries, and the best partitions of each row.
    pub select: Option<(Score<'a>, SelectPartitions<'a>)>,
    /// Retrieve: tables, and what to copy.
    pub resolve: Resolve<'a>,
    /// Retrieve: the copies.
    pub gather: Gather<'a>,
}

impl LayerStep<'_> {
    /// Refuses stages that are not of one batch, layer and kind of page, or that do not hand on to each other: another shape of logits or
    /// lists on either side would be read as what it is not.
    fn check(&self) -> Result<()> {
        let Self { index, append: Append { pages, .. }, select, resolve, gather } = self;
        let all = |shapes: &[(&'static str, usize, usize)]| {
            shapes.iter().try_for_each(|(what, expected, found)| check_length(what, *expected, *found))
        };
        let (requests, kv_heads) = (resolve.entries.len(), resolve.kv_heads as usize);
        let (layer, request_rows) = (resolve.layer as usize, resolve.tables.request_rows as usize);
        let first_row = layer * kv_heads;
        let (page_tokens, head_words) = (pages.page_tokens as usize, pages.head_words as usize);
        let page_words = page_tokens.saturating_mul(head_words).saturating_mul(2);
        if let Some(IndexStep { table, page_tokens: of_index, .. }) = index {
            all(&[
                ("index requests", requests, table.entries.len()),
                ("index kv_heads", kv_heads, table.kv_heads as usize),
                ("index first_row", first_row, table.first_row as usize),
                ("index request_rows", request_rows, table.request_rows as usize),
                ("index head_words", head_words, table.head_words as usize),
                ("index page_tokens", page_tokens, *of_index as usize),
            ])?;
        }
        all(&[
            ("append requests", requests, pages.entries.len()),
            ("append kv_heads", kv_heads, pages.kv_heads as usize),
            ("append first_row", first_row, pages.first_row as usize),
        ])?;
        if let Some((score, select)) = select {
            all(&[
                ("score requests", requests, score.entries.len()),
                ("score kv_heads", kv_heads, score.kv_heads as usize),
                ("score layer", layer, score.layer as usize),
                ("score request_rows", request_rows, score.request_rows as usize),
                ("select requests", requests, select.entries.len()),
                ("select kv_heads", kv_heads, select.kv_heads as usize),
                ("select group", score.group as usize, select.group as usize),
                ("select stride", score.stride as usize, select.stride as usize),
                ("select logits", score.logits.len(), select.logits.len()),
                ("resolve ids", select.ids.len(), resolve.ids.len()),
                ("resolve id_counts", select.selected.len(), resolve.id_counts.len()),
            ])?;
            if let Some(statistics) = select.statistics {
                check_length("select statistics", score.statistics.len(), statistics.len())?;
            }
        }
        all(&[
            ("gather copies", resolve.copies.len(), gather.copies.len()),
            ("gather counts", resolve.copy_counts.len(), gather.counts.len()),
            ("gather page_words", page_words, gather.page_words as usize),
        ])
    }

    /// Async: the selected pages are where `resolve` says when `stream` has come this far.
    ///
    /// # Errors
    /// [`Length`](super::driver::DriverError::Length) for stages of different shapes, of which none runs; the first launch that is
    /// refused, where those before it run.
    ///
    /// # Safety
    /// What each launch asks of its caller. The entries agree with each other and with the tables: one has a place in its ring for the new
    /// token's page beside those of the pages that leave with this step.
    pub unsafe fn launch(&self, kernels: &Kernels, stream: &Stream) -> Result<()> {
        self.check()?;
        // SAFETY: the caller's part; each launch follows those that write what it reads.
        unsafe {
            if let Some(index) = &self.index {
                index.launch(kernels, stream)?;
            }
            self.append.launch(kernels, stream)?;
            if let Some((score, select)) = &self.select {
                score.launch(kernels, stream)?;
                select.launch(kernels, stream)?;
            }
            self.resolve.launch(kernels, stream)?;
            self.gather.launch(kernels, stream)
        }
    }
}

/// Captures the layers of a step, one after another.
///
/// # Errors
/// A launch that is refused, or the capture.
///
/// # Safety
/// As for [`Graph::launch`], at each replay: `layers`' buffers and `kernels` are still there, and what [`LayerStep::launch`] asks holds.
pub unsafe fn capture_step(layers: &[LayerStep<'_>], kernels: &Kernels, stream: &Stream) -> Result<Graph> {
    Graph::capture(stream, |stream| {
        // SAFETY: nothing runs now; the caller answers for the replays.
        layers.iter().try_for_each(|layer| unsafe { layer.launch(kernels, stream) })
    })
}
