use spinkv::backend::cpu::CpuBackend;
use spinkv::pipeline::{Pipeline, RequestId};

use super::{Trace, TraceRow};

/// Writes down what the steps of a request select.
#[derive(Debug)]
pub struct Recorder {
    trace: Trace,
    pages: Vec<spinkv::partition::SelectedPage>,
}

impl Recorder {
    /// A recorder of a request that will hold at most `max_tokens` tokens, `context` of them at its first step.
    pub fn new(pipeline: &Pipeline<CpuBackend>, name: &str, context: usize, max_tokens: usize) -> Self {
        let config = pipeline.config();
        let keys = config.retrievable_pages(max_tokens).end;
        let shape = config.shape();
        let places = (0..shape.layers as u32)
            .flat_map(|layer| (0..shape.kv_heads as u32).map(move |head| (layer, head)));
        let trace = Trace {
            name: name.to_owned(),
            page_tokens: config.layout().page_tokens() as u32,
            context: context as u32,
            rows: places.map(|(layer, head)| TraceRow::new(layer, head, keys)).collect(),
        };
        Self { trace, pages: Vec::new() }
    }

    /// Adds the step that `request` has just taken in all layers.
    pub fn step(&mut self, pipeline: &Pipeline<CpuBackend>, request: RequestId) {
        let map = pipeline.config().partition_map();
        for row in &mut self.trace.rows {
            let (layer, head) = (row.layer as usize, row.head as usize);
            let selected = pipeline.backend().selected(request, layer, head).unwrap_or(&[]);
            self.pages.clear();
            map.expand(selected, &mut self.pages);
            row.push(&self.pages.iter().map(|page| page.key).collect::<Vec<_>>());
        }
    }

    /// What was recorded.
    pub fn finish(self) -> Trace {
        self.trace
    }
}
