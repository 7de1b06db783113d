//! Drawn selections on a GPU: all of them lie there, those of the next step are staged before it, and the captured step copies them over what Select wrote.

use std::sync::Arc;

use spinkv::backend::cuda::driver::{DeviceBuffer, Result as DriverResult, Stream};
use spinkv::backend::cuda::kernels::Kernels;
use spinkv::backend::cuda::operators::{GpuSelect, LoadSelect, OperatorSizes, SelectStage};

use super::Traced;
use crate::bench::scored::{ScoredSelect, scored};

/// The drawn ids on the GPU.
#[derive(Debug)]
pub(super) struct Staged {
    /// `[steps, layers, rows, capacity]`, rows being those of the largest batch.
    all_ids: DeviceBuffer<u32>,
    /// `[steps, layers, rows]`.
    all_counts: DeviceBuffer<u32>,
    /// Of the next step, `[layers, rows, capacity]`: at the same address in every step, as a captured copy wants it.
    ids: DeviceBuffer<u32>,
    /// `[layers, rows]`.
    counts: DeviceBuffer<u32>,
    rows: usize,
    capacity: usize,
}

impl Staged {
    fn new(traced: &Traced, sizes: &OperatorSizes, stream: &Stream) -> DriverResult<Self> {
        let (layers, heads) = (sizes.shape.layers, sizes.shape.kv_heads);
        let (rows, capacity, steps) = (sizes.requests * heads, sizes.capacity, traced.drawn.steps());
        let all_ids = DeviceBuffer::uninit(stream.context(), steps * layers * rows * capacity)?;
        let all_counts = DeviceBuffer::uninit(stream.context(), steps * layers * rows)?;
        let (mut ids, mut counts) = (vec![0; layers * rows * capacity], vec![0; layers * rows]);
        for step in 0..steps {
            for (at, count) in counts.iter_mut().enumerate() {
                let (layer, row) = (at / rows, at % rows);
                let drawn = traced.drawn.ids(row / heads, layer, row % heads, step).take(capacity);
                *count = drawn.len() as u32;
                ids[at * capacity..].iter_mut().zip(drawn).for_each(|(place, id)| *place = id);
            }
            all_ids.write(stream, step * ids.len(), &ids)?;
            all_counts.write(stream, step * counts.len(), &counts)?;
        }
        let staged = Self {
            ids: DeviceBuffer::uninit(stream.context(), ids.len())?,
            counts: DeviceBuffer::uninit(stream.context(), counts.len())?,
            all_ids,
            all_counts,
            rows,
            capacity,
        };
        staged.stage(stream, 0)?;
        Ok(staged)
    }

    /// Async: what the steps behind this on `stream` select.
    fn stage(&self, stream: &Stream, step: usize) -> DriverResult<()> {
        let (ids, counts) = (self.ids.len(), self.counts.len());
        self.ids.copy_from(stream, 0, &self.all_ids, step * ids, ids)?;
        self.counts.copy_from(stream, 0, &self.all_counts, step * counts, counts)
    }
}

impl Traced {
    /// Async: steps behind this on `stream` select what was drawn for step `step`; of the backend that has loaded the method.
    ///
    /// # Errors
    /// A refused copy.
    ///
    /// # Panics
    /// Beyond the steps that were drawn.
    pub fn begin_on_gpu(&self, stream: &Stream, step: usize) -> DriverResult<()> {
        self.begin(step);
        self.staged.get().map_or(Ok(()), |staged| staged.stage(stream, step))
    }
}

/// Loads the Select of a traced method.
pub(super) fn load<'a>(traced: &'a Traced, sizes: OperatorSizes) -> spinkv::Result<Option<LoadSelect<'a>>> {
    Ok(scored(&*traced.inner, &sizes)?.map(|load| -> LoadSelect<'a> {
        Box::new(move |stream: &Stream| {
            let inner = load(stream)?;
            let staged = Arc::new(Staged::new(traced, &sizes, stream)?);
            // A method is loaded by one backend; another would have other sizes.
            let staged = traced.staged.get_or_init(|| staged).clone();
            let select: Box<dyn GpuSelect> = Box::new(DrawnSelect { inner, staged });
            Ok(select)
        })
    }))
}

/// A method's Select, and the drawn ids over its.
#[derive(Debug)]
struct DrawnSelect {
    inner: ScoredSelect,
    staged: Arc<Staged>,
}

impl GpuSelect for DrawnSelect {
    fn scratch_words(&self) -> usize {
        self.inner.scratch_words()
    }

    unsafe fn select(&self, kernels: &Kernels, stream: &Stream, stage: &SelectStage<'_>) -> DriverResult<()> {
        // SAFETY: the caller's part.
        unsafe { self.inner.launch(kernels, stream, stage) }?;
        let SelectStage { score, select, first_request, .. } = *stage;
        let Staged { ids, counts, rows, capacity, .. } = &*self.staged;
        // A prompt's last query has the rows of one request, and selects what the first request does.
        let (first, of_batch) = (score.layer as usize * rows, select.selected.len());
        let first = first + first_request * select.kv_heads as usize;
        select.ids.copy_from(stream, 0, ids, first * capacity, of_batch * capacity)?;
        select.selected.copy_from(stream, 0, counts, first, of_batch)
    }

    fn bytes(&self) -> u64 {
        self.inner.bytes()
    }
}
