/// Why a bench is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BenchError {
    /// Nothing to measure.
    #[error("no {what}: at least 1 is needed")]
    Nothing {
        /// What there is none of.
        what: &'static str,
    },

    /// A context that leaves nothing to select, or that is beyond the model's.
    #[error("context of {context} tokens: from {least} to {limit} can be measured")]
    Context {
        /// Tokens asked for.
        context: usize,
        /// The least that do.
        least: usize,
        /// The most, with the steps behind them.
        limit: usize,
    },

    /// Partitions whose ids nobody knows before a model has made them.
    #[error("selections of {method} cannot be drawn: its partitions are clusters; leave them to the model")]
    DrawnClusters {
        /// The method.
        method: String,
    },

    /// A method that selects nothing, or everything.
    #[error("selections of {method} cannot be drawn: it does not choose")]
    DrawnWithoutChoice {
        /// The method.
        method: String,
    },

    /// A replay without anything to replay.
    #[error("what a model selects on a GPU is not recorded: draw the selections, or replay on the cpu")]
    NotRecorded,

    /// Not even one request fits.
    #[error("{requests} requests of {request_bytes} bytes are beyond {kv_bytes} bytes of KV memory")]
    BeyondBudget {
        /// Requests of the step.
        requests: usize,
        /// Bytes of one of them.
        request_bytes: u64,
        /// The budget.
        kv_bytes: u64,
    },
}
