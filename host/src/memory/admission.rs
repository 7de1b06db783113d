use std::collections::BTreeMap;

use super::elastic::{Share, share_out};
use super::{GpuBytes, MemoryLimits, RequestPlan, SUMMARY_ELEMENT_BYTES, footprint};
use crate::pipeline::RequestId;
use crate::{Error, KvConfig, Result};

/// Who is admitted, and how many buffering pages each request has. Numbers only: the backend moves the pages.
///
/// A request is charged at its longest, before it begins: its steady and mandatory pages, tables and summaries of
/// all layers on the GPU, its slabs on the host. As long as a prompt may still come, the largest one's K and V of
/// two layers are kept free as well, since a layer's write-back runs under the next layer. What is left becomes
/// buffering, shared out by [`share_out`].
#[derive(Debug)]
pub struct Admission {
    limits: MemoryLimits,
    requests: BTreeMap<RequestId, Charge>,
}

/// What one request is charged.
#[derive(Clone, Debug)]
struct Charge {
    share: Share,
    /// GPU pages without buffering.
    least_pages: usize,
    /// Those of them that are its cache's, of all rows.
    mandatory_pages: usize,
    /// GPU bytes without buffering pages.
    gpu: GpuBytes,
    prompt_bytes: u64,
    host_bytes: u64,
    /// Whether its prompt may still come.
    awaits_prompt: bool,
    /// What a parked request had before.
    parked: Option<Parked>,
}

/// What a parked request takes again to go on.
#[derive(Clone, Copy, Debug)]
struct Parked {
    share: Share,
    pages: usize,
    gpu: GpuBytes,
}

impl Admission {
    /// Nobody is admitted yet.
    pub fn new(mut limits: MemoryLimits) -> Self {
        // What 32-bit ids can name; the highest means "no page".
        let pages = limits.gpu_pages.unwrap_or(usize::MAX);
        limits.gpu_pages = Some(pages.min(u32::MAX as usize));
        Self { limits, requests: BTreeMap::new() }
    }

    /// How much of each tier may be used.
    pub fn limits(&self) -> &MemoryLimits {
        &self.limits
    }

    /// Admits `request` and returns the buffering pages of a row that each request has from now on, by id.
    ///
    /// # Errors
    /// [`Error::OutOfGpuPages`], [`Error::OutOfGpuMemory`] and [`Error::OutOfHostMemory`] if not even its mandatory
    /// pages fit beside those of all others; nothing is then changed.
    pub fn admit(
        &mut self,
        config: &KvConfig,
        request: RequestId,
        plan: &RequestPlan,
    ) -> Result<BTreeMap<RequestId, usize>> {
        let charge = Charge::new(config, plan);
        self.check(config, plan, &charge)?;
        self.requests.insert(request, charge);
        Ok(self.buffering(config))
    }

    /// Forgets a request.
    pub fn remove(&mut self, request: RequestId) {
        self.requests.remove(&request);
    }

    /// A request gives up its cache: it is charged steady pages, tables, summaries and slabs alone, and has no buffering. If it goes to the host as a `whole`,
    /// it has no steady pages either.
    pub fn park(&mut self, config: &KvConfig, request: RequestId, whole: bool) {
        let Some(charge) = self.requests.get_mut(&request).filter(|charge| charge.parked.is_none()) else {
            return;
        };
        let share = std::mem::replace(&mut charge.share, Share { mandatory: 0, wanted: 0 });
        let pages = if whole { charge.least_pages } else { charge.mandatory_pages };
        charge.parked = Some(Parked { share, pages, gpu: charge.gpu });
        charge.least_pages -= pages;
        charge.gpu.cache_pages -= (charge.mandatory_pages * config.layout().page_bytes()) as u64;
        if whole {
            charge.gpu.steady_pages = 0;
        }
    }

    /// A parked request wants its cache again, or all its pages. Returns the buffering pages of a row that each request has from now on, by id.
    ///
    /// # Errors
    /// [`Error::OutOfGpuPages`] and [`Error::OutOfGpuMemory`] if its mandatory pages do not fit beside what all others have; nothing is then
    /// changed.
    pub fn resume(
        &mut self,
        config: &KvConfig,
        request: RequestId,
        plan: &RequestPlan,
    ) -> Result<BTreeMap<RequestId, usize>> {
        let charge = self.requests.get(&request).ok_or(Error::UnknownRequest(request))?;
        let Parked { share, pages, gpu } = charge.parked.ok_or(Error::RequestNotParked(request))?;
        let bytes = gpu.total() - charge.gpu.total();
        let max_tokens = plan.max_tokens;
        if let Some(limit) = self.limits.gpu_pages {
            let (free, rows) = (limit - self.least_pages(), plan.rows);
            if pages > free {
                let (needed, mandatory, total) = (pages, share.mandatory, limit);
                return Err(Error::OutOfGpuPages {
                    max_tokens,
                    needed,
                    rows,
                    steady: 0,
                    mandatory,
                    free,
                    total,
                });
            }
        }
        if let Some(limit) = self.limits.gpu_bytes {
            let (needed, free) = (bytes, limit - self.least_bytes());
            if needed > free {
                let (pages, tables, summaries, prompt) = (bytes, 0, 0, 0);
                return Err(Error::OutOfGpuMemory {
                    max_tokens,
                    needed,
                    pages,
                    tables,
                    summaries,
                    prompt,
                    free,
                    limit,
                });
            }
        }
        let charge = self.requests.get_mut(&request).expect("looked up above");
        (charge.share, charge.gpu, charge.parked) = (share, gpu, None);
        charge.least_pages += pages;
        Ok(self.buffering(config))
    }

    /// The prompt of `request` is through, or it had none.
    pub fn prompt_done(&mut self, request: RequestId) {
        if let Some(charge) = self.requests.get_mut(&request) {
            charge.awaits_prompt = false;
        }
    }

    /// The buffering pages of a row that each request is due.
    pub fn buffering(&self, config: &KvConfig) -> BTreeMap<RequestId, usize> {
        let shares: Vec<_> = self.requests.values().map(|charge| charge.share).collect();
        let rows = config.rows_by_reach().selected.max(1);
        let of_pages = self.limits.gpu_pages.map(|limit| limit - self.least_pages());
        let page_bytes = config.layout().page_bytes() as u64;
        let of_bytes =
            self.limits.gpu_bytes.map(|limit| ((limit - self.least_bytes()) / page_bytes) as usize);
        let pages = of_pages.into_iter().chain(of_bytes).min().unwrap_or(usize::MAX);
        let given = share_out(&shares, pages / rows);
        self.requests.keys().copied().zip(given).collect()
    }

    /// GPU pages that no buffering can be made of.
    fn least_pages(&self) -> usize {
        self.requests.values().map(|charge| charge.least_pages).sum()
    }

    /// GPU bytes that no buffering can be made of.
    fn least_bytes(&self) -> u64 {
        let held: u64 = self.requests.values().map(|charge| charge.gpu.total()).sum();
        held + self.prompt_bytes()
    }

    fn prompt_bytes(&self) -> u64 {
        let waiting = self.requests.values().filter(|charge| charge.awaits_prompt);
        waiting.map(|charge| charge.prompt_bytes).max().unwrap_or(0)
    }

    fn check(&self, config: &KvConfig, plan: &RequestPlan, charge: &Charge) -> Result<()> {
        if let Some(limit) = self.limits.gpu_pages {
            plan.check_gpu_pages(limit - self.least_pages(), limit)?;
        }
        if let Some(limit) = self.limits.gpu_bytes {
            let prompt = charge.prompt_bytes.saturating_sub(self.prompt_bytes());
            let (needed, free) = (charge.gpu.total() + prompt, limit - self.least_bytes());
            if needed > free {
                return Err(Error::OutOfGpuMemory {
                    max_tokens: plan.max_tokens,
                    needed,
                    pages: charge.gpu.pages(),
                    tables: charge.gpu.tables(),
                    summaries: charge.gpu.summaries + charge.gpu.key_factors(),
                    prompt,
                    free,
                    limit,
                });
            }
        }
        if let Some(limit) = self.limits.host_bytes {
            let held: u64 = self.requests.values().map(|charge| charge.host_bytes).sum();
            let (needed, free) = (charge.host_bytes, limit.saturating_sub(held));
            let slabs = plan.host_slabs();
            // A layer's slabs lie side by side, so each layer has its part of the whole slabs.
            let layers = config.shape().layers as u64;
            let slab = (needed / slabs.max(1) as u64).max(1);
            if needed > free || (held + needed) / layers > limit / slab / layers * slab {
                let what = format!("{slabs} KV slabs");
                return Err(Error::OutOfHostMemory { what, needed, free, limit });
            }
        }
        Ok(())
    }
}

impl Charge {
    fn new(config: &KvConfig, plan: &RequestPlan) -> Self {
        let usage = footprint(config, plan, plan.max_tokens, SUMMARY_ELEMENT_BYTES);
        let page_bytes = config.layout().page_bytes() as u64;
        let buffering = plan.buffering_pages() as u64 * page_bytes;
        Self {
            share: Share { mandatory: plan.row.mandatory_pages, wanted: plan.row.buffering_pages },
            least_pages: plan.least_gpu_pages(),
            mandatory_pages: plan.mandatory_pages(),
            gpu: GpuBytes { cache_pages: usage.gpu.cache_pages - buffering, ..usage.gpu },
            prompt_bytes: plan.prompt_bytes(config),
            host_bytes: usage.host.pages,
            awaits_prompt: true,
            parked: None,
        }
    }
}
