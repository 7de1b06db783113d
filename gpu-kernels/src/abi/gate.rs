//! The launches of `gate_key`, `gate_key_step` and `gate_query`.

/// Threads of a block.
pub const BLOCK: u32 = 256;

/// The widest gate key: an output a thread.
pub const MAX_RANK: u32 = BLOCK;

/// Ranks are multiples of this: a word of each half.
pub const RANK_STEP: u32 = 16;

/// Words of a head that the kernels take: 64 or 128 elements.
pub const HEAD_WORDS: [u32; 2] = [8, 16];

/// The most query heads that share a KV head.
pub const MAX_GROUP: u32 = 16;

/// The most inputs of a projection: a group's queries.
pub const MAX_INPUTS: u32 = MAX_GROUP * 128;

/// Numbers that a block keeps of the parts of a chunk: as many parts as a head of 64 has, or half as many of twice the width.
pub const POOLED: u32 = 16 * 3 * 64;

/// Shared memory of a block: parts of a chunk, inputs, shares of outputs, outputs, and a sum a warp, each from a multiple of 128 bytes on.
pub const SHARED_BYTES: u32 = 4 * (POOLED + MAX_INPUTS + 2 * BLOCK) + 128;
