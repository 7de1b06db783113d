use super::arena::{check_limit, slab_bytes};
use super::{MemoryLimits, PageLayout, SLAB_PAGES};
use crate::pipeline::{MAX_TOKENS, Select};
use crate::{Error, KvConfig, Result};

/// What each row of a request holds, at its longest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RowPlan {
    /// GPU pages of the steady zone.
    pub steady_pages: usize,
    /// GPU pages that one step's selection can need at once.
    pub mandatory_pages: usize,
    /// GPU pages that the cache keeps beyond those, for reuse by later steps.
    pub buffering_pages: usize,
    /// Host slabs of the full KV.
    pub host_slabs: usize,
}

impl RowPlan {
    /// Slots of the row's cache.
    pub fn slots(&self) -> usize {
        self.mandatory_pages + self.buffering_pages
    }

    /// GPU pages of the row.
    pub fn gpu_pages(&self) -> usize {
        self.steady_pages + self.slots()
    }
}

/// What a request may hold on each tier; decided at admission, so that no step can run out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RequestPlan {
    /// The longest context, prompt and generated tokens together.
    pub max_tokens: usize,
    /// Rows of the request.
    pub rows: usize,
    /// The plan of each row; all rows hold the same number of tokens.
    pub row: RowPlan,
}

impl RequestPlan {
    /// Plans a request of up to `max_tokens` tokens whose cache buffers `buffering` times its mandatory
    /// pages. The cache never exceeds the pages that can be selected at all.
    ///
    /// # Errors
    /// [`Error::EmptyRequest`] if `max_tokens` is 0, [`Error::ContextTooLong`] beyond [`MAX_TOKENS`],
    /// [`Error::InvalidBuffering`] for a `buffering` that is negative or not a number.
    pub fn new(config: &KvConfig, max_tokens: usize, buffering: f64) -> Result<Self> {
        if max_tokens == 0 {
            return Err(Error::EmptyRequest);
        }
        if max_tokens > MAX_TOKENS {
            return Err(Error::ContextTooLong { max_tokens, limit: MAX_TOKENS });
        }
        if buffering.is_nan() || buffering < 0.0 {
            return Err(Error::InvalidBuffering { value: buffering });
        }
        let layout = config.layout();
        let selectable_pages = config.retrievable_pages(max_tokens).len();
        let mandatory_pages = match config.method().select() {
            Select::Nothing => 0,
            Select::Everything => selectable_pages,
            Select::TopK { budget, .. } | Select::Custom { budget, .. } => {
                let partitions = budget.partitions(max_tokens, config.partition_tokens());
                config
                    .partition_map()
                    .max_pages(partitions)
                    .map_or(selectable_pages, |pages| pages.min(selectable_pages))
            }
        };
        let buffering_pages = (mandatory_pages as f64 * buffering) as usize;
        let row = RowPlan {
            steady_pages: config.max_steady_pages().min(layout.pages(max_tokens)),
            mandatory_pages,
            buffering_pages: buffering_pages.min(selectable_pages - mandatory_pages),
            host_slabs: (max_tokens / layout.page_tokens()).div_ceil(SLAB_PAGES),
        };
        Ok(Self { max_tokens, rows: config.shape().rows(), row })
    }

    /// The plan with as much buffering as `free` of a pool's `total` pages allow. Mandatory pages are never
    /// cut.
    ///
    /// # Errors
    /// [`Error::OutOfGpuPages`] if not even the mandatory pages fit.
    pub fn fit(mut self, free: usize, total: usize) -> Result<Self> {
        let RowPlan { steady_pages: steady, mandatory_pages: mandatory, .. } = self.row;
        let needed = self.rows * (steady + mandatory);
        if needed > free {
            let (max_tokens, rows) = (self.max_tokens, self.rows);
            return Err(Error::OutOfGpuPages { max_tokens, needed, rows, steady, mandatory, free, total });
        }
        self.row.buffering_pages = self.row.buffering_pages.min((free - needed) / self.rows);
        Ok(self)
    }

    /// Checks that an empty machine with these limits could admit the request.
    ///
    /// # Errors
    /// [`Error::OutOfGpuPages`] and [`Error::OutOfHostMemory`].
    pub fn check_limits(&self, layout: &PageLayout, limits: &MemoryLimits) -> Result<()> {
        if let Some(pages) = limits.gpu_pages {
            self.fit(pages, pages)?;
        }
        check_limit(layout, self.host_slabs(), 0, limits.host_bytes)
    }

    /// GPU pages of the request.
    pub fn gpu_pages(&self) -> usize {
        self.rows * self.row.gpu_pages()
    }

    /// Host slabs of the request.
    pub fn host_slabs(&self) -> usize {
        self.rows * self.row.host_slabs
    }

    /// The limits under which exactly this request fits.
    pub fn limits(&self, layout: &PageLayout) -> MemoryLimits {
        MemoryLimits {
            gpu_pages: Some(self.gpu_pages()),
            host_bytes: Some(self.host_slabs() as u64 * slab_bytes(layout)),
        }
    }
}
