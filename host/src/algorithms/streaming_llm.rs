use crate::partition::PartitionKind;
use crate::pipeline::{Index, Method, Select, SteadyZone};

/// StreamingLLM (arXiv 2309.17453): the attention sinks and the local window, nothing between them.
///
/// Keys keep the rotary positions that they had in the full sequence; the paper renumbers them within the
/// window. The floor of the other methods: what they find, this one misses.
#[derive(Clone, Copy, Debug, Default)]
pub struct StreamingLlm {
    /// The tokens that are read.
    pub steady: SteadyZone,
}

impl Method for StreamingLlm {
    fn name(&self) -> &str {
        "streaming-llm"
    }

    /// Tokens, so that any page size will do.
    fn partition(&self) -> PartitionKind {
        PartitionKind::Token
    }

    fn index(&self) -> Index<'_> {
        Index::Nothing
    }

    fn select(&self) -> Select<'_> {
        Select::Nothing
    }

    fn steady(&self) -> SteadyZone {
        self.steady
    }
}
