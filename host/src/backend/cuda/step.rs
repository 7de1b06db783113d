use bytemuck::Pod;
use spinkv_kernels::abi::page_code::{NO_CODE, PageCode};

use super::driver::{DeviceBuffer, DriverError, Event, Graph, Result, Stream, check_length, check_operand};
use super::kernels::{
    Append, Attend, Awaited, Estimate, Gather, IndexOperator, IndexStep, Kernels, PageBiases, ProjectKeys,
    RebuildKeys, Resolve,
};
use super::operators::{LayerIndex, LayerSelect, StepIndex};

/// One layer of a decode step from Index to Attention: all five stages, in this order on one stream. Every decision is taken on the
/// GPU, from entries, tables and queries that lie there, so it can be captured once and replayed for every step of a batch.
///
/// The order is what makes it right, without an event: a partition that leaves the steady zone is summarised before it can be
/// selected; a page is on the host, and said to be, before a later step may evict it; a page leaves the steady zone in `resolve`, after
/// its last reader there, and attention finds it in the cache, if it is selected; no page of the selection is the victim of another row
/// or layer, so what attention reads stays until the layer's next step. Attention may begin while `gather` runs, which counts what it has
/// brought: each row begins with the pages that are here, which `resolve` lists first, and then waits for its own misses.
#[derive(Clone, Copy, Debug)]
pub struct LayerStep<'a> {
    /// Index: summaries of the partitions that leave the steady zone; `None` for methods without.
    pub index: Option<LayerIndex<'a>>,
    /// Offload: the new tokens, and pages that they fill.
    pub append: Append<'a>,
    /// Select: the queries against the summaries, and the best partitions of each row.
    pub select: Option<LayerSelect<'a>>,
    /// Retrieve: tables, and what to copy.
    pub resolve: Resolve<'a>,
    /// Retrieve: the copies.
    pub gather: Gather<'a>,
    /// Attention: over the steady zone's pages and those that `resolve` lists.
    pub attend: Attend<'a>,
    /// What attention has besides where partitions are clusters.
    pub clusters: Option<ClusterStages<'a>>,
    /// What keys in low rank need besides; `None` for keys that are on the host.
    pub low_rank: Option<LowRankStages<'a>>,
}

/// Where the copies of several batches go one after another, each beside the others' compute.
#[derive(Clone, Copy, Debug)]
pub struct Bus<'a> {
    /// Of high priority: copies take few blocks, and all else waits for them.
    pub stream: &'a Stream,
    /// Recorded when it is known what to copy.
    pub ready: &'a Event,
    /// Recorded when the copies are made.
    pub fetched: &'a Event,
}

/// The launches about Attention of a step over clusters.
#[derive(Clone, Copy, Debug)]
pub struct ClusterStages<'a> {
    /// Before it: pages that are not full.
    pub biases: PageBiases<'a>,
    /// After it: partitions that are estimated, if any are.
    pub estimate: Option<Estimate<'a>>,
}

/// The launches of a step over keys in low rank. The first two come behind Index, which reads keys as they came: pages that leave the steady zone
/// get the keys that they are fetched with from then on. The third comes before `gather`, which brings the values alone.
#[derive(Clone, Copy, Debug)]
pub struct LowRankStages<'a> {
    /// Index: coefficients of the tokens that leave the steady zone.
    pub project: ProjectKeys<'a>,
    /// Index: their keys, rebuilt in place.
    pub replace: RebuildKeys<'a>,
    /// Retrieve: keys of the pages that are missed.
    pub rebuild: RebuildKeys<'a>,
}

impl LayerStep<'_> {
    /// Refuses stages that are not of one batch, layer and kind of page, or that do not hand on to each other: another shape of logits or
    /// lists on either side would be read as what it is not.
    fn check(&self) -> Result<()> {
        let Self { index, append: Append { pages, .. }, select, resolve, gather, attend, clusters, low_rank } =
            self;
        let code = |of: Option<PageCode>| of.map_or(NO_CODE, |code| code as u32) as usize;
        let all = |shapes: &[(&'static str, usize, usize)]| {
            shapes.iter().try_for_each(|(what, expected, found)| check_length(what, *expected, *found))
        };
        let (requests, kv_heads) = (resolve.entries.len(), resolve.kv_heads as usize);
        let (layer, request_rows) = (resolve.layer as usize, resolve.tables.request_rows as usize);
        let first_row = layer * kv_heads;
        let (page_tokens, head_words) = (pages.page_tokens as usize, pages.head_words as usize);
        let page_words = page_tokens.saturating_mul(head_words).saturating_mul(2);
        if let Some(StepIndex { rows, page_tokens: of_index, .. }) = index.map(|index| index.stage()) {
            all(&[
                ("index requests", requests, rows.entries.len()),
                ("index kv_heads", kv_heads, rows.kv_heads as usize),
                ("index first_row", first_row, rows.first_row as usize),
                ("index request_rows", request_rows, rows.request_rows as usize),
                ("index head_words", head_words, rows.head_words as usize),
                ("index page_tokens", page_tokens, of_index as usize),
            ])?;
        }
        all(&[
            ("append requests", requests, pages.entries.len()),
            ("append kv_heads", kv_heads, pages.kv_heads as usize),
            ("append first_row", first_row, pages.first_row as usize),
        ])?;
        if let Some((score, select)) = select.as_ref().map(LayerSelect::launches) {
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
            if select.marks.is_some() || select.row_pages.is_some() {
                check_length("select first_row", first_row, select.first_row as usize)?;
            }
            if let Some(statistics) = select.statistics {
                check_length("select statistics", score.statistics.len(), statistics.len())?;
            }
        }
        all(&[
            ("gather copies", resolve.copies.len(), gather.copies.len()),
            ("gather counts", resolve.copy_counts.len(), gather.counts.len()),
            ("gather page_words", pages.host_words as usize, gather.page_words as usize),
            ("gather device_words", page_words, gather.device_words as usize),
            ("gather code", code(pages.code), code(gather.code)),
        ])?;
        if let Some(LowRankStages { project, replace, rebuild }) = low_rank {
            all(&[
                ("project entries", requests, project.entries.len()),
                ("project kv_heads", kv_heads, project.kv_heads as usize),
                ("project layer", layer, project.layer as usize),
                ("project head_words", head_words, project.head_words as usize),
                ("project page_tokens", page_tokens, project.page_tokens as usize),
                ("replace copies", project.copies.len(), replace.copies.len()),
                ("rebuild copies", resolve.copies.len(), rebuild.copies.len()),
            ])?;
            for rebuild in [replace, rebuild] {
                all(&[
                    ("rebuild entries", requests, rebuild.entries.len()),
                    ("rebuild kv_heads", kv_heads, rebuild.kv_heads as usize),
                    ("rebuild layer", layer, rebuild.layer as usize),
                    ("rebuild layers", project.layers as usize, rebuild.layers as usize),
                    ("rebuild head_words", head_words, rebuild.head_words as usize),
                    ("rebuild page_tokens", page_tokens, rebuild.page_tokens as usize),
                    ("rebuild rank", project.rank as usize, rebuild.rank as usize),
                ])?;
            }
        }
        // Not the group: a gate may score with other heads than attention's.
        all(&[
            ("attend requests", requests, attend.entries.len()),
            ("attend kv_heads", kv_heads, attend.kv_heads as usize),
            ("attend layer", layer, attend.layer as usize),
            ("attend head_words", head_words, attend.head_words as usize),
            ("attend page_tokens", page_tokens, attend.page_tokens as usize),
            ("attend pages", resolve.pages.len(), attend.pages.len()),
            ("attend page_counts", resolve.page_counts.len(), attend.page_counts.len()),
            ("attend steady", resolve.tables.steady.len(), attend.steady.len()),
            ("attend pool", gather.device_pages.len(), attend.pool.len()),
        ])?;
        // Biases are of pages in the selection's order; else who awaits the misses looks for them at the end.
        if attend.awaited.is_some() || attend.biases.is_some() {
            let misses_last = u64::from(attend.biases.is_none());
            check_operand("attend misses_last", resolve.misses_last.into(), misses_last..=misses_last)?;
        }
        if attend.awaited.is_some() && gather.code.is_none() {
            // Whole pages are awaited, and `gather` counts what it brings; of codes, what they become.
            check_length("gather awaited words", page_words, gather.page_words as usize)?;
        }
        if let Some(ClusterStages { biases, .. }) = clusters {
            // Of each page of a row's list there are biases, at its place.
            let rows = requests * kv_heads;
            all(&[("biases of a row's pages", attend.pages.len(), rows * biases.capacity as usize)])?;
        }
        self.check_hand_overs()
    }

    /// Refuses a stage that reads another buffer than the one before it has filled, which sizes alone do not show.
    fn check_hand_overs(&self) -> Result<()> {
        let Self { index, append: Append { pages, .. }, select, resolve, gather, attend, clusters, low_rank } =
            self;
        let tables = &resolve.tables;
        let mut same = vec![
            ("append entries", at(resolve.entries), at(pages.entries)),
            ("append steady", at(tables.steady), at(pages.steady)),
            ("append host_slabs", at(tables.host_slabs), at(pages.host_slabs)),
            ("append host_valid", at(tables.host_valid), at(pages.host_valid)),
            ("append pool", at(gather.device_pages), at(pages.pool)),
            ("append host_pages", gather.host_pages.device_address(), pages.host_pages.device_address()),
            ("gather copies", at(resolve.copies), at(gather.copies)),
            ("gather counts", at(resolve.copy_counts), at(gather.counts)),
            ("attend entries", at(resolve.entries), at(attend.entries)),
            ("attend pages", at(resolve.pages), at(attend.pages)),
            ("attend page_counts", at(resolve.page_counts), at(attend.page_counts)),
            ("attend steady", at(tables.steady), at(attend.steady)),
            ("attend pool", at(gather.device_pages), at(attend.pool)),
        ];
        if let Some(StepIndex { rows, steady, pool, .. }) = index.map(|index| index.stage()) {
            same.extend([
                ("index entries", at(resolve.entries), at(rows.entries)),
                ("index directories", at(tables.directories), at(rows.directories)),
                ("index steady", at(tables.steady), at(steady)),
                ("index pool", at(gather.device_pages), at(pool)),
            ]);
        }
        if let Some((score, select)) = select.as_ref().map(LayerSelect::launches) {
            same.extend([
                ("score entries", at(resolve.entries), at(score.entries)),
                ("score directories", at(tables.directories), at(score.directories)),
                ("select logits", at(score.logits), at(select.logits)),
                ("resolve ids", at(select.ids), at(resolve.ids)),
                ("resolve id_counts", at(select.selected), at(resolve.id_counts)),
            ]);
            same.extend(
                select.statistics.map(|found| ("select statistics", at(score.statistics), at(found))),
            );
        }
        // Not Select's entries: a layer may select by limits of its own.
        if let (Some(select), Some(index)) = (select, index) {
            let (score, _) = select.launches();
            same.push(("score summaries", at(index.stage().rows.summaries), at(score.summaries)));
            // What a method's own operators make of summaries is theirs to know.
            if let (LayerSelect::InTree(..), LayerIndex::InTree(IndexStep { table, .. })) = (select, index) {
                let bounds = u64::from(table.operator == IndexOperator::Bounds);
                check_operand("score bounds", score.bounds.into(), bounds..=bounds)?;
            }
        }
        if let (Some(ClusterStages { biases, estimate }), Some((score, select))) =
            (clusters, select.as_ref().map(LayerSelect::launches))
        {
            same.extend([
                ("biases ids", at(select.ids), at(biases.ids)),
                ("biases id_counts", at(select.selected), at(biases.id_counts)),
                ("attend biases", at(biases.biases), attend.biases.map_or(0, at)),
            ]);
            if let Some((estimate, listed)) = estimate.as_ref().zip(select.estimates) {
                same.extend([
                    ("estimate ids", at(listed.ids), at(estimate.ids)),
                    ("estimate counts", at(listed.estimated), at(estimate.counts)),
                    ("estimate logits", at(score.logits), at(estimate.logits)),
                    ("estimate outputs", at(attend.outputs), at(estimate.outputs)),
                    ("estimate lse", at(attend.lse), at(estimate.lse)),
                ]);
            }
        }
        if let Some(LowRankStages { project, replace, rebuild }) = low_rank {
            same.extend([
                ("project entries", at(resolve.entries), at(project.entries)),
                ("project directories", at(tables.directories), at(project.directories)),
                ("project steady", at(tables.steady), at(project.steady)),
                ("project pool", at(gather.device_pages), at(project.pool)),
                ("replace copies", at(project.copies), at(replace.copies)),
                ("replace copy_keys", at(project.copy_keys), at(replace.copy_keys)),
                ("replace counts", at(project.counts), at(replace.counts)),
                ("rebuild copies", at(resolve.copies), at(rebuild.copies)),
                ("rebuild copy_keys", resolve.copy_keys.map_or(0, at), at(rebuild.copy_keys)),
                ("rebuild counts", at(resolve.copy_counts), at(rebuild.counts)),
            ]);
            for rebuild in [replace, rebuild] {
                same.extend([
                    ("rebuild entries", at(resolve.entries), at(rebuild.entries)),
                    ("rebuild directories", at(tables.directories), at(rebuild.directories)),
                    ("rebuild coefficients", at(project.coefficients), at(rebuild.coefficients)),
                    ("rebuild bases", at(project.bases), at(rebuild.bases)),
                    ("rebuild pool", at(gather.device_pages), at(rebuild.pool)),
                ]);
            }
        }
        if let Some(Awaited { copy_counts, arrived }) = attend.awaited {
            // What nobody counts would be awaited for ever.
            same.extend([
                ("gather arrived", at(resolve.arrived), gather.arrived.map_or(0, at)),
                ("attend arrived", at(resolve.arrived), at(arrived)),
                ("attend copy_counts", at(resolve.copy_counts), at(copy_counts)),
            ]);
        }
        match same.into_iter().find(|(_, expected, found)| expected != found) {
            Some((what, ..)) => Err(DriverError::OtherBuffer { what }),
            None => Ok(()),
        }
    }

    /// Async: attention's outputs are there when `stream` has come this far, and the selected pages where `resolve` says. A row that
    /// `resolve` left out, for a fault, has attended to its steady zone alone.
    ///
    /// # Errors
    /// [`Length`](DriverError::Length) for stages of different shapes and [`OtherBuffer`](DriverError::OtherBuffer) for those that do not
    /// read what the others fill, of which none runs; the first launch that is
    /// refused, where those before it run.
    ///
    /// # Safety
    /// What each launch asks of its caller. The entries agree with each other and with the tables: one has a place in its ring for the new
    /// token's page beside those of the pages that leave with this step.
    pub unsafe fn launch(&self, kernels: &Kernels, stream: &Stream) -> Result<()> {
        // SAFETY: the caller's part.
        unsafe { self.launch_with(kernels, stream, |_| Ok(())) }
    }

    /// The same with `behind` enqueued behind each launch: an event, or a delay, which must change nothing.
    ///
    /// # Errors
    /// Those of [`launch`](Self::launch), and `behind`'s.
    ///
    /// # Safety
    /// As for [`launch`](Self::launch); `behind` touches nothing of the step's.
    pub unsafe fn launch_with(
        &self,
        kernels: &Kernels,
        stream: &Stream,
        behind: impl Fn(&Stream) -> Result<()>,
    ) -> Result<()> {
        // SAFETY: the caller's part.
        unsafe { self.launch_over(None, kernels, stream, behind) }
    }

    /// The same with the copies on a stream that others' are on too, if there is one.
    ///
    /// # Errors
    /// Those of [`launch_with`](Self::launch_with).
    ///
    /// # Safety
    /// As for [`launch`](Self::launch).
    pub(super) unsafe fn launch_over(
        &self,
        bus: Option<&Bus<'_>>,
        kernels: &Kernels,
        stream: &Stream,
        behind: impl Fn(&Stream) -> Result<()>,
    ) -> Result<()> {
        self.check()?;
        // SAFETY: the caller's part; each launch follows those that write what it reads.
        unsafe {
            if let Some(index) = &self.index {
                index.launch(kernels, stream)?;
                behind(stream)?;
            }
            if let Some(LowRankStages { project, replace, .. }) = &self.low_rank {
                project.launch(kernels, stream)?;
                behind(stream)?;
                replace.launch(kernels, stream)?;
                behind(stream)?;
            }
            self.append.launch(kernels, stream)?;
            behind(stream)?;
            if let Some(select) = &self.select {
                select.launch(kernels, stream, &behind)?;
            }
            if let Some(clusters) = &self.clusters {
                clusters.biases.launch(kernels, stream)?;
                behind(stream)?;
            }
            self.resolve.launch(kernels, stream)?;
            behind(stream)?;
            if let Some(LowRankStages { rebuild, .. }) = &self.low_rank {
                rebuild.launch(kernels, stream)?;
                behind(stream)?;
            }
            match bus {
                None => self.gather.launch(kernels, stream)?,
                Some(bus) => {
                    bus.ready.record(stream)?;
                    bus.stream.wait(bus.ready)?;
                    self.gather.launch_behind(kernels, bus.stream)?;
                    bus.fetched.record(bus.stream)?;
                    stream.wait(bus.fetched)?;
                }
            }
            behind(stream)?;
            self.attend.launch(kernels, stream)?;
            behind(stream)?;
            if let Some(estimate) = self.clusters.as_ref().and_then(|clusters| clusters.estimate.as_ref()) {
                estimate.launch(kernels, stream)?;
                behind(stream)?;
            }
            Ok(())
        }
    }
}

fn at<T: Pod>(buffer: &DeviceBuffer<T>) -> u64 {
    buffer.address()
}

/// Captures the layers of a step, one after another. What a model computes between them is not here: who captures that too calls
/// [`LayerStep::launch`] among its own launches.
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
