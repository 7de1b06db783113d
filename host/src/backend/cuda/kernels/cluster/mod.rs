mod check;
mod gather_run;

pub use gather_run::GatherRun;

use spinkv_kernels::abi::cluster::{self, MAX_TOKENS, max_clusters, max_pages};

use super::super::driver::{
    Argument, DeviceBuffer, Function, LaunchShape, Module, PinnedArena, Result, Stream, check_operand,
    launch_with,
};
use super::Kernels;
use crate::memory::Word;

const ANY: u64 = u32::MAX as u64;

/// The kernels that cluster.
#[derive(Clone, Debug)]
pub(super) struct ClusterFunctions {
    sums: Function,
    start: Function,
    assign_64: Function,
    assign_128: Function,
    update: Function,
    pages: Function,
    list: Function,
    means: Function,
    store: Function,
    gather_run: Function,
}

impl ClusterFunctions {
    /// `shared` gives a function that may have all the shared memory of a block.
    pub fn load(module: &Module, shared: impl Fn(&'static str) -> Result<Function>) -> Result<Self> {
        Ok(Self {
            sums: module.function("cluster_sums")?,
            start: module.function("cluster_start")?,
            assign_64: shared("cluster_assign_64")?,
            assign_128: shared("cluster_assign_128")?,
            update: module.function("cluster_update")?,
            pages: module.function("cluster_pages")?,
            list: module.function("cluster_list")?,
            means: module.function("cluster_means")?,
            store: module.function("cluster_store")?,
            gather_run: module.function("gather_run")?,
        })
    }

    pub fn all(&self) -> [&Function; 10] {
        let Self { sums, start, assign_64, assign_128, update, pages, list, means, store, gather_run } = self;
        [sums, start, assign_64, assign_128, update, pages, list, means, store, gather_run]
    }
}

/// How many tokens of which shape become how many clusters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClusterShape {
    /// Tokens of the run.
    pub tokens: u32,
    /// KV heads.
    pub kv_heads: u32,
    /// Words of a key: head dim / 8; 8 or 16.
    pub head_words: u32,
    /// Equal parts of the run, each of which iterates by itself.
    pub spans: u32,
    /// Centroids of a span: a multiple of 8, at most its tokens.
    pub span_centroids: u32,
}

impl ClusterShape {
    /// As RetroInfer has it (arXiv 2505.02922): spans of about 8,192 tokens, a centroid for each 16 tokens. A run has 8 tokens at least.
    pub fn new(tokens: u32, kv_heads: u32, head_words: u32) -> Self {
        let tokens_here = tokens.min(MAX_TOKENS);
        let spans = cluster::spans(tokens_here);
        let span_centroids = cluster::span_centroids(tokens_here, spans);
        Self { tokens, kv_heads, head_words, spans, span_centroids }
    }

    /// Clusters of a row.
    pub fn clusters(&self) -> u32 {
        self.spans * self.span_centroids
    }
}

/// What the launches of a run hand to each other. Runs that follow each other in a stream can share it.
#[derive(Debug)]
#[allow(missing_docs, reason = "named and shaped as the kernels' parameters")]
pub struct ClusterScratch {
    pub sums: DeviceBuffer<Word>,
    pub means: DeviceBuffer<Word>,
    pub centroids: DeviceBuffer<Word>,
    pub biases: DeviceBuffer<f32>,
    pub assigned: DeviceBuffer<u32>,
    pub sizes: DeviceBuffer<u32>,
    pub firsts: DeviceBuffer<u32>,
    pub members: DeviceBuffer<u32>,
}

impl ClusterScratch {
    /// Room for runs of up to `tokens` tokens, of the clusters that [`ClusterShape::new`] makes, in pages of `page_tokens` tokens.
    ///
    /// # Errors
    /// [`Operand`](super::super::driver::DriverError::Operand) for tokens beyond [`MAX_TOKENS`] or a page of none; memory that there is not.
    pub fn new(
        stream: &Stream,
        tokens: u32,
        kv_heads: u32,
        head_words: u32,
        page_tokens: u32,
    ) -> Result<Self> {
        check_operand("cluster tokens", tokens.into(), 1..=MAX_TOKENS.into())?;
        check_operand("cluster page_tokens", page_tokens.into(), 1..=ANY)?;
        let (heads, head, most) = (kv_heads as usize, head_words as usize, max_clusters(tokens) as usize);
        let pages = max_pages(tokens, max_clusters(tokens), page_tokens) as usize;
        let parts = cluster::sums::parts(tokens) as usize;
        Ok(Self {
            sums: DeviceBuffer::zeroed(stream, parts * heads * 2 * head)?,
            means: DeviceBuffer::zeroed(stream, heads * 2 * head)?,
            centroids: DeviceBuffer::zeroed(stream, heads * most * head)?,
            biases: DeviceBuffer::zeroed(stream, heads * most)?,
            assigned: DeviceBuffer::zeroed(stream, heads * tokens.next_multiple_of(4) as usize)?,
            sizes: DeviceBuffer::zeroed(stream, heads * most)?,
            firsts: DeviceBuffer::zeroed(stream, heads * most)?,
            members: DeviceBuffer::zeroed(stream, heads * pages * page_tokens as usize)?,
        })
    }
}

/// Where a request's partitions are kept, one layer. Each page of a cluster is a partition.
#[derive(Clone, Copy, Debug)]
pub struct ClusterTables<'a> {
    /// Tokens of a page.
    pub page_tokens: u32,
    /// Segments of partitions, of all requests.
    pub directories: &'a DeviceBuffer<u32>,
    /// Where the request's begin.
    pub directory: u32,
    /// Row of KV head 0: layer * `kv_heads`.
    pub first_row: u32,
    /// Rows of a request: layers * `kv_heads`.
    pub request_rows: u32,
    /// Partitions of a segment.
    pub segment_partitions: u32,
    /// Partitions that the request has room for in each row: those of earlier runs, and [`max_pages`] of this one.
    pub capacity: u32,
    /// `[rows of all requests, 2]`: pages of each row's clusters, before the last run and after it. 0 before the first.
    pub row_pages: &'a DeviceBuffer<u32>,
    /// The place of the request's row 0 among the rows of all requests.
    pub first_place: u32,
    /// `[segments, request_rows, segment_partitions]`: tokens of partitions.
    pub partition_tokens: &'a DeviceBuffer<u32>,
    /// `[segments, request_rows, segment_partitions, head_words]`: mean keys, bf16.
    pub summaries: &'a DeviceBuffer<Word>,
    /// As above: mean values.
    pub value_means: &'a DeviceBuffer<Word>,
}

/// Where a request's pages of clusters lie on the host.
#[derive(Clone, Copy, Debug)]
pub struct ClusterPages<'a> {
    /// Host tables of all requests: slabs.
    pub host_slabs: &'a DeviceBuffer<u32>,
    /// Where row 0 of the request begins in them.
    pub first_slab: u32,
    /// Slabs between rows.
    pub slab_stride: u32,
    /// A u32 for each of `host_slabs`: its [valid bits](spinkv_kernels::abi::valid_place).
    pub host_valid: &'a DeviceBuffer<u32>,
    /// `[slabs, 16, 2, page_tokens, head_words]`: host pages.
    pub host_pages: &'a PinnedArena,
    /// Blocks to spend on it. The bus to the host bounds it; a few saturate that.
    pub blocks: u32,
}

impl ClusterScratch {
    /// Bytes.
    pub fn bytes(&self) -> u64 {
        let Self { sums, means, centroids, biases, assigned, sizes, firsts, members } = self;
        let words = [sums, means, centroids].map(DeviceBuffer::bytes);
        let numbers = [assigned, sizes, firsts, members].map(DeviceBuffer::bytes);
        biases.bytes() + words.iter().chain(&numbers).sum::<u64>()
    }
}

/// A run of tokens of one request in one layer that becomes clusters: the launches of `cluster_sums`, `cluster_start`, `cluster_assign_64` or
/// `cluster_assign_128`, `cluster_update`, `cluster_pages`, `cluster_list`, `cluster_means` and `cluster_store`.
///
/// # Safety
/// Of all launches: when one runs, those before it in [`launch`](Self::launch)'s order have run for the same run in the same scratch, and until it has
/// run nothing writes what it reads or uses what it writes. [`pages`](Self::pages) and what follows: the directories name the segments of `capacity`
/// partitions, no two of one place, and the pages of earlier runs leave room for this one's. [`store`](Self::store): the pages
/// that `row_pages` counts have slabs of their own, within the arena.
#[derive(Clone, Copy, Debug)]
pub struct ClusterRun<'a> {
    /// Its size.
    pub shape: ClusterShape,
    /// `[first + tokens or more, kv_heads, head_words]` bf16.
    pub keys: &'a DeviceBuffer<Word>,
    /// As the keys.
    pub values: &'a DeviceBuffer<Word>,
    /// The run's first token in them.
    pub first: u32,
    /// What the launches hand to each other.
    pub scratch: &'a ClusterScratch,
    /// Where partitions are kept.
    pub tables: ClusterTables<'a>,
    /// Where pages lie.
    pub pages: ClusterPages<'a>,
}

/// Documents a launch alike.
macro_rules! launches {
    ($($(#[$doc:meta])* $name:ident: |$run:ident, $kernels:ident, $stream:ident| $body:block)*) => { $(
        $(#[$doc])*
        ///
        /// # Errors
        /// Those of [`launch`](Self::launch).
        ///
        /// # Safety
        /// See the [type](Self#safety).
        pub unsafe fn $name(&self, $kernels: &Kernels, $stream: &Stream) -> Result<()> {
            self.check()?;
            let $run = self;
            $body
        }
    )* };
}

impl ClusterRun<'_> {
    /// Async, all launches of [`ITERATIONS`](cluster::ITERATIONS) iterations: partitions, summaries and pages are there when `stream` has come this far.
    ///
    /// # Errors
    /// [`Choice`](super::super::driver::DriverError::Choice) for a head that is neither of 64 nor of 128,
    /// [`Multiple`](super::super::driver::DriverError::Multiple) for centroids that are no multiple of 8,
    /// [`Operand`](super::super::driver::DriverError::Operand) for a size of 0 or beyond its limit, more centroids than tokens or a capacity below the
    /// run's own partitions, [`Length`](super::super::driver::DriverError::Length) for valid bits that are not as many as slabs,
    /// [`OutOfRange`](super::super::driver::DriverError::OutOfRange) for a buffer that does not fit, or a failed launch.
    ///
    /// # Safety
    /// See the [type](Self#safety).
    pub unsafe fn launch(&self, kernels: &Kernels, stream: &Stream) -> Result<()> {
        // SAFETY: the store comes behind the launches that it needs; the caller answers for the rest.
        unsafe {
            self.index(kernels, stream)?;
            self.store(kernels, stream)
        }
    }

    /// Async, all of [`launch`](Self::launch) but the store.
    ///
    /// # Errors
    /// Those of [`launch`](Self::launch).
    ///
    /// # Safety
    /// See the [type](Self#safety).
    pub unsafe fn index(&self, kernels: &Kernels, stream: &Stream) -> Result<()> {
        // SAFETY: each comes behind those that it needs; the caller answers for the rest.
        unsafe {
            self.sums(kernels, stream)?;
            self.start(kernels, stream)?;
            for _ in 0..cluster::ITERATIONS {
                self.assign(kernels, stream)?;
                self.update(kernels, stream)?;
            }
            self.assign_all(kernels, stream)?;
            self.pages(kernels, stream)?;
            self.list(kernels, stream)?;
            self.means(kernels, stream)
        }
    }

    launches! {
        /// Sums of keys, of parts of the run.
        sums: |run, kernels, stream| {
            let ClusterShape { tokens, kv_heads, head_words, .. } = run.shape;
            let width = kv_heads * head_words;
            let arguments: [Argument; 5] = [
                run.keys.into(),
                run.first.into(),
                tokens.into(),
                width.into(),
                (&run.scratch.sums).into(),
            ];
            let shape = [cluster::sums::grid(tokens, width), cluster::sums::BLOCK.into(), 0];
            // SAFETY: order and types are the kernel's; sizes are those of the buffers; the caller answers for what is in them.
            unsafe { launch(&kernels.cluster.sums, shape, stream, arguments) }
        }

        /// The mean, and the centroids that k-means starts with.
        start: |run, kernels, stream| {
            let ClusterShape { tokens, kv_heads, head_words, spans, span_centroids } = run.shape;
            let ClusterScratch { sums, means, centroids, biases, .. } = run.scratch;
            let arguments: [Argument; 11] = [
                run.keys.into(),
                run.first.into(),
                tokens.into(),
                kv_heads.into(),
                head_words.into(),
                spans.into(),
                span_centroids.into(),
                sums.into(),
                means.into(),
                centroids.into(),
                biases.into(),
            ];
            let blocks = cluster::start::grid(kv_heads, run.shape.clusters());
            let shape = [blocks, cluster::start::BLOCK.into(), cluster::start::SHARED_BYTES.into()];
            // SAFETY: as above.
            unsafe { launch(&kernels.cluster.start, shape, stream, arguments) }
        }

        /// The best centroid of each token among those of its span.
        assign: |run, kernels, stream| {
            // SAFETY: the caller's part.
            unsafe { run.assign_of(run.shape.spans, false, kernels, stream) }
        }

        /// New centroids.
        update: |run, kernels, stream| {
            let ClusterShape { tokens, kv_heads, head_words, spans, span_centroids } = run.shape;
            let ClusterScratch { means, assigned, centroids, biases, .. } = run.scratch;
            let arguments: [Argument; 11] = [
                run.keys.into(),
                run.first.into(),
                tokens.into(),
                kv_heads.into(),
                head_words.into(),
                spans.into(),
                span_centroids.into(),
                means.into(),
                assigned.into(),
                centroids.into(),
                biases.into(),
            ];
            // SAFETY: as above.
            unsafe { launch(&kernels.cluster.update, run.of_clusters(), stream, arguments) }
        }

        /// The best centroid of each token among all, and the sizes of clusters.
        assign_all: |run, kernels, stream| {
            let sizes = &run.scratch.sizes;
            sizes.fill_bytes(stream, 0..run.rows_of(run.shape.clusters()), 0)?;
            // SAFETY: the caller's part.
            unsafe { run.assign_of(1, true, kernels, stream) }
        }

        /// Where pages begin.
        pages: |run, kernels, stream| {
            let tables = &run.tables;
            let arguments: [Argument; 6] = [
                (&run.scratch.sizes).into(),
                run.shape.clusters().into(),
                tables.page_tokens.into(),
                run.first_place().into(),
                tables.row_pages.into(),
                (&run.scratch.firsts).into(),
            ];
            let shape = [
                run.shape.kv_heads.into(),
                cluster::pages::BLOCK.into(),
                cluster::pages::SHARED_BYTES.into(),
            ];
            // SAFETY: as above.
            unsafe { launch(&kernels.cluster.pages, shape, stream, arguments) }
        }

        /// The tokens of pages.
        list: |run, kernels, stream| {
            let ClusterShape { tokens, head_words, .. } = run.shape;
            let arguments: [Argument; 8] = [
                (&run.scratch.assigned).into(),
                tokens.into(),
                head_words.into(),
                run.shape.clusters().into(),
                run.tables.page_tokens.into(),
                (&run.scratch.firsts).into(),
                (&run.scratch.members).into(),
                run.member_pages().into(),
            ];
            // SAFETY: as above.
            unsafe { launch(&kernels.cluster.list, run.of_clusters(), stream, arguments) }
        }

        /// Summaries, mean values and tokens of partitions.
        means: |run, kernels, stream| {
            let ClusterShape { kv_heads, head_words, .. } = run.shape;
            let tables = &run.tables;
            let arguments: [Argument; 18] = [
                run.keys.into(),
                run.values.into(),
                run.first.into(),
                kv_heads.into(),
                head_words.into(),
                tables.page_tokens.into(),
                run.first_place().into(),
                tables.row_pages.into(),
                (&run.scratch.members).into(),
                run.member_pages().into(),
                tables.directories.into(),
                tables.directory.into(),
                tables.first_row.into(),
                tables.request_rows.into(),
                tables.segment_partitions.into(),
                tables.summaries.into(),
                tables.value_means.into(),
                tables.partition_tokens.into(),
            ];
            let blocks = cluster::means::grid(run.member_pages() * kv_heads);
            // SAFETY: as above.
            unsafe { launch(&kernels.cluster.means, [blocks.into(), cluster::means::BLOCK.into(), 0], stream, arguments) }
        }

        /// Pages of clusters to the host, and their valid bits.
        store: |run, kernels, stream| {
            let ClusterShape { kv_heads, head_words, .. } = run.shape;
            let (tables, pages) = (&run.tables, &run.pages);
            let arguments: [Argument; 16] = [
                run.keys.into(),
                run.values.into(),
                run.first.into(),
                kv_heads.into(),
                head_words.into(),
                tables.page_tokens.into(),
                run.first_place().into(),
                tables.row_pages.into(),
                (&run.scratch.members).into(),
                run.member_pages().into(),
                pages.host_slabs.into(),
                pages.first_slab.into(),
                pages.slab_stride.into(),
                tables.first_row.into(),
                pages.host_valid.into(),
                pages.host_pages.into(),
            ];
            let shape = [pages.blocks.into(), cluster::store::BLOCK.into(), 0];
            // SAFETY: as above.
            unsafe { launch(&kernels.cluster.store, shape, stream, arguments) }
        }
    }

    /// The place of KV head 0's row among the rows of all requests.
    fn first_place(&self) -> u32 {
        self.tables.first_place + self.tables.first_row
    }

    /// Pages of a row that the list of members has room for.
    fn member_pages(&self) -> u32 {
        max_pages(self.shape.tokens, self.shape.clusters(), self.tables.page_tokens)
    }

    /// `of` for each row.
    fn rows_of(&self, of: u32) -> usize {
        self.shape.kv_heads as usize * of as usize
    }

    /// The launch of kernels that have a warp a cluster.
    fn of_clusters(&self) -> [u64; 3] {
        use cluster::update::{BLOCK, SHARED_BYTES, grid};
        [grid(self.shape.kv_heads, self.shape.clusters()), BLOCK.into(), SHARED_BYTES.into()]
    }

    unsafe fn assign_of(&self, spans: u32, counted: bool, kernels: &Kernels, stream: &Stream) -> Result<()> {
        let ClusterShape { tokens, kv_heads, head_words, .. } = self.shape;
        let ClusterScratch { centroids, biases, assigned, sizes, .. } = self.scratch;
        let arguments: [Argument; 11] = [
            self.keys.into(),
            self.first.into(),
            tokens.into(),
            kv_heads.into(),
            spans.into(),
            (self.shape.clusters() / spans).into(),
            centroids.into(),
            biases.into(),
            assigned.into(),
            u32::from(counted).into(),
            sizes.into(),
        ];
        let functions = &kernels.cluster;
        let function = if head_words == 8 { &functions.assign_64 } else { &functions.assign_128 };
        let blocks = cluster::assign::grid(kv_heads, tokens, spans);
        let shape = [blocks, cluster::assign::BLOCK.into(), cluster::assign::shared_bytes(head_words).into()];
        // SAFETY: as above.
        unsafe { launch(function, shape, stream, arguments) }
    }
}

/// Launches `blocks` blocks of `threads` threads and so many bytes of shared memory.
///
/// # Safety
/// Arguments are the kernel's.
unsafe fn launch<const N: usize>(
    function: &Function,
    [blocks, threads, shared_bytes]: [u64; 3],
    stream: &Stream,
    arguments: [Argument; N],
) -> Result<()> {
    check_operand("cluster blocks", blocks, 1..=i32::MAX as u64)?;
    let shape = LaunchShape::linear(blocks as u32, threads as u32).with_shared_bytes(shared_bytes as u32);
    // SAFETY: the caller's word.
    unsafe { launch_with(function, &shape, stream, arguments) }
}
