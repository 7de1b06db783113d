//! What measurements need of the backend, and nothing else does.

use spinkv_kernels::abi::{ABSENT_SLOT, NO_KEY, SLOT_PINNED};

use super::super::driver::{DeviceBuffer, Event};
use super::CudaBackend;
use crate::backend::Step;
use crate::memory::Word;
use crate::{Error, Result};

impl CudaBackend {
    /// Takes every page out of every cache, as if nothing had been selected yet: the next step fetches all that it selects. Results do not change, but for the order of sums.
    /// Waits for all that is under way.
    ///
    /// # Errors
    /// A failed launch or copy.
    pub fn empty_caches(&mut self) -> Result<()> {
        self.settle()?;
        let (tables, stream) = (&self.tables, &self.stream);
        // Both bytes of ABSENT_SLOT are alike, and all of NO_KEY.
        tables.segments.fill_bytes(stream, 0..tables.segments.len(), ABSENT_SLOT as u8)?;
        tables.owners.fill_bytes(stream, 0..tables.owners.len(), NO_KEY as u8)?;
        let slots = self.sizes.rows() * self.sizes.slot_stride;
        let mut physical = vec![0; slots];
        for request in self.requests.values_mut().filter(|request| !request.resident) {
            let first = request.place * slots;
            tables.physical.read(stream, first, &mut physical)?;
            // A slot keeps its page, whatever it holds; where there is no page, there is no slot.
            let state = |page: &u32| if *page == u32::MAX { SLOT_PINNED } else { 0 };
            let states: Vec<u8> = physical.iter().map(state).collect();
            let states: Vec<u32> = bytemuck::pod_collect_to_vec(&states);
            tables.states.write(stream, first / 4, &states)?;
            request.held.fill(0);
        }
        Ok(())
    }

    /// Runs the Index of a layer of the last prompt `times` times more, alone on the GPU, and returns what each took, in milliseconds. `keys` and `values`
    /// are those that the layer was given, so that its summaries become what they are.
    ///
    /// # Errors
    /// [`Error::EmptyRequest`] before any prompt, [`Error::TensorLength`] for other keys than a prompt of its length has, or a failed launch.
    pub fn time_prompt_index(
        &mut self,
        layer: usize,
        keys: &DeviceBuffer<Word>,
        values: &DeviceBuffer<Word>,
        times: usize,
    ) -> Result<Vec<f64>> {
        self.finish_prompt()?;
        let entries = [self.prompt.uploaded.ok_or(Error::EmptyRequest)?];
        let expected = entries[0].new * self.sizes.kv_heads * self.sizes.head_words;
        if keys.len() != expected {
            return Err(Error::TensorLength { what: "keys", expected, found: keys.len() });
        }
        let context = self.stream.context();
        let (begin, end) = (Event::new(context)?, Event::new(context)?);
        let step = Step { layer, entries: &entries };
        let mut ms = Vec::with_capacity(times);
        for _ in 0..times {
            self.forget_clusters(entries[0].request, layer)?;
            begin.record(self.prompt.side())?;
            self.index_prompt(&step, keys, values)?;
            end.record(self.prompt.side())?;
            end.synchronize()?;
            ms.push(f64::from(begin.elapsed_ms(&end)?));
        }
        Ok(ms)
    }
}
