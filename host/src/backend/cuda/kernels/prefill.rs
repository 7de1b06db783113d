use spinkv_kernels::abi::{prefill, prefill_wgmma};

use super::super::driver::{
    Argument, DeviceBuffer, DriverError, LaunchShape, Result, Stream, check_choice, check_length,
    check_operand, check_positive, check_range, launch_with,
};
use super::Kernels;
use crate::memory::Word;

/// Which tensor core instructions multiply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PrefillVariant {
    /// `prefill_64` and `prefill_128`: a warp's (`mma.sync`), which all GPUs have.
    Mma,
    /// `prefill_wgmma_64` and `prefill_wgmma_128`: a warpgroup's (`wgmma`), which Hopper alone has.
    Wgmma,
}

/// A launch of `prefill_64`, `prefill_128`, `prefill_wgmma_64` or `prefill_wgmma_128`: causal attention of a ragged batch of prompts, or
/// of chunks of them with the past before them, one layer.
#[derive(Clone, Copy, Debug)]
pub struct Prefill<'a> {
    /// `[query tokens, kv_heads * group, head_words]` bf16, of all requests, end to end.
    pub queries: &'a DeviceBuffer<Word>,
    /// `[key tokens, kv_heads, head_words]` bf16, of all requests, end to end: a request's past, then its chunk.
    pub keys: &'a DeviceBuffer<Word>,
    /// As `keys`.
    pub values: &'a DeviceBuffer<Word>,
    /// `[requests + 1]`: query tokens of the requests before.
    pub first_query: &'a DeviceBuffer<u32>,
    /// `[requests + 1]`: key tokens of the requests before.
    pub first_key: &'a DeviceBuffer<u32>,
    /// `[requests + 1]`: query tiles of the requests before: of each, [`query_tiles`](prefill::query_tiles).
    pub first_tile: &'a DeviceBuffer<u32>,
    /// Query tokens of all requests: the last of `first_query`.
    pub query_tokens: u32,
    /// Key tokens of all requests: the last of `first_key`.
    pub key_tokens: u32,
    /// Query tiles of all requests: the last of `first_tile`, or more.
    pub tiles: u32,
    /// KV heads.
    pub kv_heads: u32,
    /// Query heads of a KV head.
    pub group: u32,
    /// Words of a head: 8 or 16, for 64 or 128 elements.
    pub head_words: u32,
    /// Factor of the logits.
    pub scale: f32,
    /// As `queries`.
    pub outputs: &'a DeviceBuffer<Word>,
    /// `[query tokens, kv_heads * group]`: logarithms of the sums of e^logit.
    pub lse: &'a DeviceBuffer<f32>,
}

impl Prefill<'_> {
    /// The variant that [`launch`](Self::launch) takes: a warpgroup's products where there are some.
    pub fn variant(kernels: &Kernels) -> PrefillVariant {
        if kernels.prefill_wgmma_64.is_some() { PrefillVariant::Wgmma } else { PrefillVariant::Mma }
    }

    /// Async: outputs are there when `stream` has come this far. A batch without tiles launches nothing.
    ///
    /// # Errors
    /// [`Choice`](DriverError::Choice) for heads of neither 64 nor 128, [`Operand`](DriverError::Operand) for a size of 0, a group beyond
    /// [`MAX_GROUP`](prefill::MAX_GROUP), and more blocks or words than the kernel counts, [`Positive`](DriverError::Positive) for a
    /// `scale` that is no number above 0, [`Length`](DriverError::Length) and [`OutOfRange`](DriverError::OutOfRange) for a buffer that
    /// does not fit, or a failed launch.
    ///
    /// # Safety
    /// When the launch runs, the prefix sums ascend from 0 to the totals, tiles are those of the query tokens, and no request has more
    /// queries than keys; queries, keys and values are numbers; until it has run nothing writes what it reads, and nothing uses what it
    /// writes.
    pub unsafe fn launch(&self, kernels: &Kernels, stream: &Stream) -> Result<()> {
        // SAFETY: the caller's part.
        unsafe { self.launch_as(Self::variant(kernels), kernels, stream) }
    }

    /// The same with a variant of the caller's choice, for benches and tests.
    ///
    /// # Errors
    /// Those of [`launch`](Self::launch), and [`UnknownFunction`](DriverError::UnknownFunction) for a variant that the device does not
    /// have.
    ///
    /// # Safety
    /// As for [`launch`](Self::launch).
    pub unsafe fn launch_as(
        &self,
        variant: PrefillVariant,
        kernels: &Kernels,
        stream: &Stream,
    ) -> Result<()> {
        let Self { query_tokens, key_tokens, tiles, kv_heads, group, head_words, scale, .. } = *self;
        let most = u64::from(u32::MAX);
        // With so few heads no product below overflows.
        check_operand("prefill kv_heads", kv_heads.into(), 1..=u16::MAX.into())?;
        check_operand("prefill group", group.into(), 1..=prefill::MAX_GROUP.into())?;
        check_choice("prefill head_words", head_words, &[8, 16])?;
        check_positive("prefill scale", scale)?;
        let prefix_sums = self.first_tile.len();
        check_operand("prefill requests + 1", prefix_sums as u64, 2..=most)?;
        check_length("prefill first_query", prefix_sums, self.first_query.len())?;
        check_length("prefill first_key", prefix_sums, self.first_key.len())?;
        let heads = u64::from(kv_heads) * u64::from(group);
        let blocks = u64::from(tiles) * heads;
        check_operand("prefill tiles * heads", blocks, 0..=i32::MAX as u64)?;
        let of_queries = u64::from(query_tokens) * heads * u64::from(head_words);
        let of_keys = u64::from(key_tokens) * u64::from(kv_heads) * u64::from(head_words);
        check_operand("prefill words of queries", of_queries, 0..=most)?;
        check_operand("prefill words of keys", of_keys, 0..=most)?;
        check_range("prefill queries", 0, of_queries as usize, self.queries.len())?;
        check_range("prefill keys", 0, of_keys as usize, self.keys.len())?;
        check_range("prefill values", 0, of_keys as usize, self.values.len())?;
        check_range("prefill outputs", 0, of_queries as usize, self.outputs.len())?;
        check_range("prefill lse", 0, (of_queries / u64::from(head_words)) as usize, self.lse.len())?;
        if blocks == 0 {
            return Ok(());
        }
        let arguments: [Argument; 12] = [
            self.queries.into(),
            self.keys.into(),
            self.values.into(),
            self.first_query.into(),
            self.first_key.into(),
            self.first_tile.into(),
            (prefix_sums as u32 - 1).into(),
            kv_heads.into(),
            group.into(),
            scale.into(),
            self.outputs.into(),
            self.lse.into(),
        ];
        let (function, block, shared_bytes) = match variant {
            PrefillVariant::Mma => {
                let function = if head_words == 8 { &kernels.prefill_64 } else { &kernels.prefill_128 };
                (function, prefill::BLOCK, prefill::shared_bytes(head_words))
            }
            PrefillVariant::Wgmma => {
                let (function, name) = if head_words == 8 {
                    (&kernels.prefill_wgmma_64, "prefill_wgmma_64")
                } else {
                    (&kernels.prefill_wgmma_128, "prefill_wgmma_128")
                };
                let missing = || DriverError::UnknownFunction { name: name.to_owned() };
                let function = function.as_ref().ok_or_else(missing)?;
                (function, prefill_wgmma::BLOCK, prefill_wgmma::shared_bytes(head_words))
            }
        };
        let shape = LaunchShape::linear(blocks as u32, block).with_shared_bytes(shared_bytes);
        // SAFETY: order and types are those of all four; the caller answers for the prefix sums.
        unsafe { launch_with(function, &shape, stream, arguments) }
    }
}
