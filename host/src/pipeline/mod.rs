//! The five stages of a step — Index, Offload, Select, Retrieve, Attention — and what a method plugs in.

mod budget;
mod driver;
mod method;
mod stats;
mod zones;

pub use budget::Budget;
pub use driver::{DEFAULT_BUFFERING, Pipeline, PrefillLayer, RequestId};
pub use method::{
    Always, Candidates, GroupMerge, Index, KeyStore, LowRank, Method, Partition, PartitionScore, Pick, Place,
    Reach, Select, Summarize,
};
pub use stats::{Counters, Stage, StageTimes};
pub use zones::{MAX_TOKENS, SteadyZone, ZoneUnit, Zones};
