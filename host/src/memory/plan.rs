use super::{Admission, MemoryLimits};
use crate::paging::MAX_SLOTS;
use crate::pipeline::{MAX_TOKENS, Reach, RequestId};
use crate::{Error, KvConfig, Result, RowsByReach};

/// What each row of a request holds, at its longest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RowPlan {
    /// GPU pages of the steady zone.
    pub steady_pages: usize,
    /// GPU pages that one step's selection can need at once: those of the budget's partitions and of those that every step reads.
    /// Single tokens may each lie on a page of their own, so a budget of tokens is as many pages.
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
}

/// What a request may hold on each tier; decided at admission, so that no step can run out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RequestPlan {
    /// The longest context, prompt and generated tokens together.
    pub max_tokens: usize,
    /// Rows of the request; all hold the same number of tokens.
    pub rows: usize,
    /// The plan of each row that [selects](Reach::Selected).
    pub row: RowPlan,
    /// How many rows do.
    pub by_reach: RowsByReach,
    /// GPU pages that can be selected at all: what a row that reads [everything](Reach::Everything) has slots for, all of them mandatory. One that
    /// reads its [steady zone](Reach::Steady) alone has none.
    pub selectable_pages: usize,
}

impl RequestPlan {
    /// Plans a request of up to `max_tokens` tokens whose cache buffers `buffering` times its mandatory
    /// pages. The cache never exceeds the pages that can be selected at all.
    ///
    /// # Errors
    /// [`Error::EmptyRequest`] if `max_tokens` is 0, [`Error::ContextTooLong`] beyond [`MAX_TOKENS`],
    /// [`Error::InvalidBuffering`] for a `buffering` that is negative or not a number, [`Error::TooManySlots`] for a
    /// row whose mandatory pages have no 16-bit slot ids.
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
        let mandatory_pages =
            config.partition_map().max_pages(config.max_selected(max_tokens)).min(selectable_pages);
        let by_reach = config.rows_by_reach();
        let mandatory = if by_reach.everything > 0 { selectable_pages } else { mandatory_pages };
        if mandatory > MAX_SLOTS {
            let page_tokens = layout.page_tokens();
            return Err(Error::TooManySlots { max_tokens, mandatory, page_tokens, limit: MAX_SLOTS });
        }
        let buffering_pages = (mandatory_pages as f64 * buffering) as usize;
        let most = selectable_pages.min(MAX_SLOTS) - mandatory_pages;
        let row = RowPlan {
            steady_pages: config.max_steady_pages().min(layout.pages(max_tokens)),
            mandatory_pages,
            buffering_pages: buffering_pages.min(most),
            host_slabs: config.host_slabs(max_tokens),
        };
        Ok(Self { max_tokens, rows: config.shape().rows(), row, by_reach, selectable_pages })
    }

    /// Slots of a row's cache.
    pub fn slots(&self, reach: Reach) -> usize {
        match reach {
            Reach::Selected => self.row.slots(),
            Reach::Everything => self.selectable_pages,
            Reach::Steady => 0,
        }
    }

    /// GPU pages of a row.
    pub fn row_pages(&self, reach: Reach) -> usize {
        self.row.steady_pages + self.slots(reach)
    }

    /// Pages of all rows' caches.
    pub fn cache_pages(&self) -> usize {
        self.by_reach.selected * self.row.slots() + self.by_reach.everything * self.selectable_pages
    }

    /// Buffering pages of all rows.
    pub fn buffering_pages(&self) -> usize {
        self.by_reach.selected * self.row.buffering_pages
    }

    /// Pages of all rows' caches without buffering.
    pub fn mandatory_pages(&self) -> usize {
        self.cache_pages() - self.buffering_pages()
    }

    /// Checks that the steady and mandatory pages fit into `free` of a pool's `total` pages.
    ///
    /// # Errors
    /// [`Error::OutOfGpuPages`].
    pub fn check_gpu_pages(&self, free: usize, total: usize) -> Result<()> {
        let needed = self.least_gpu_pages();
        let steady = self.row.steady_pages;
        let mandatory = needed - self.rows * steady;
        if needed > free {
            let (max_tokens, rows) = (self.max_tokens, self.rows);
            return Err(Error::OutOfGpuPages { max_tokens, needed, rows, steady, mandatory, free, total });
        }
        Ok(())
    }

    /// Checks that an empty machine with these limits could admit the request.
    ///
    /// # Errors
    /// [`Error::OutOfGpuPages`], [`Error::OutOfGpuMemory`] and [`Error::OutOfHostMemory`].
    pub fn check_limits(&self, config: &KvConfig, limits: &MemoryLimits) -> Result<()> {
        Admission::new(*limits).admit(config, RequestId(0), self).map(|_| ())
    }

    /// GPU pages of the request without buffering.
    pub fn least_gpu_pages(&self) -> usize {
        self.gpu_pages() - self.buffering_pages()
    }

    /// GPU bytes of its prompt's K and V, of two layers: one runs while the other's are written back.
    pub fn prompt_bytes(&self, config: &KvConfig) -> u64 {
        let (shape, dtype) = (config.shape(), config.layout().dtype());
        let token = 2 * shape.kv_heads * shape.head_dim * dtype.bytes();
        (shape.layers.min(2) * self.max_tokens * token) as u64
    }

    /// GPU pages of the request.
    pub fn gpu_pages(&self) -> usize {
        self.rows * self.row.steady_pages + self.cache_pages()
    }

    /// Host slabs of the request.
    pub fn host_slabs(&self) -> usize {
        self.rows * self.row.host_slabs
    }

    /// The limits under which exactly this request fits.
    pub fn limits(&self, config: &KvConfig) -> MemoryLimits {
        MemoryLimits {
            gpu_pages: Some(self.gpu_pages()),
            gpu_bytes: None,
            host_bytes: Some(self.host_slabs() as u64 * config.host_layout().slab_bytes()),
        }
    }
}
