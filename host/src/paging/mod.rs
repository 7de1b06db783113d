//! Tables: which pages of a row are on the GPU, which leave, and where the rest are.
//!
//! These are the reference semantics. They know ids, never bytes, so that a GPU kernel can be held against
//! them and a simulator can run on them.

mod bits;
mod cache;
mod dedup;
mod directory;
mod host_table;
mod policy;
mod segment;
mod slot_map;
mod steady;

pub use cache::{Adoption, PageCopy, Resolution, RowCache, Shrunk};
pub use dedup::Deduplicator;
pub use directory::{Directory, RowSlots};
pub use host_table::HostTable;
pub use policy::{
    Belady, BucketedLru, EvictionPolicy, Fifo, Future, Lru, PreviousStep, Random, SaturatingLru, SlotStates,
    StepClock,
};
pub use segment::{MAX_SLOTS, SEGMENT_KEYS, SegmentId, SegmentPool};
pub use slot_map::{FlatMap, SlotId, SlotMap};
pub use steady::SteadyPages;
