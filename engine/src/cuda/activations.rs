use spinkv::backend::cuda::driver::{DeviceBuffer, Result, Stream};
use spinkv::memory::Word;
use spinkv_kernels::abi::WORD_ELEMENTS;

use super::WeightSizes;

/// What passes through the layers, for up to so many tokens at a time.
#[derive(Debug)]
pub(super) struct Activations {
    /// `[tokens, hidden]` bf16.
    pub normed: DeviceBuffer<Word>,
    /// `[tokens, queries + 2 * keys]` bf16.
    pub projected: DeviceBuffer<Word>,
    /// `[tokens, queries]` bf16.
    pub queries: DeviceBuffer<Word>,
    /// As the queries: what attention gives.
    pub attended: DeviceBuffer<Word>,
    /// `[tokens, 2 * mlp]` bf16, where products of the gate and of up stand before they are put together.
    pub gate_up: DeviceBuffer<Word>,
    /// `[tokens, mlp]` bf16.
    pub activated: DeviceBuffer<Word>,
}

/// Keys and values of a layer's new tokens.
#[derive(Debug)]
pub(super) struct KeysValues {
    /// `[tokens, keys]` bf16.
    pub keys: DeviceBuffer<Word>,
    /// As the keys.
    pub values: DeviceBuffer<Word>,
}

impl Activations {
    /// All zero, since a rehearsal reads them; `gate_up` only if products of the gate pass through it.
    pub fn new(sizes: &WeightSizes, tokens: usize, gate_up: bool, stream: &Stream) -> Result<Self> {
        let words = |width: usize| DeviceBuffer::zeroed(stream, tokens * width / WORD_ELEMENTS);
        Ok(Self {
            normed: words(sizes.hidden)?,
            projected: words(sizes.qkv()[0])?,
            queries: words(sizes.queries)?,
            attended: words(sizes.queries)?,
            gate_up: words(if gate_up { 2 * sizes.mlp } else { 0 })?,
            activated: words(sizes.mlp)?,
        })
    }

    /// Bytes.
    pub fn bytes(&self) -> u64 {
        let Self { normed, projected, queries, attended, gate_up, activated } = self;
        [normed, projected, queries, attended, gate_up, activated].map(DeviceBuffer::bytes).iter().sum()
    }
}

impl KeysValues {
    /// Those of `tokens` tokens, all zero.
    pub fn new(sizes: &WeightSizes, tokens: usize, stream: &Stream) -> Result<Self> {
        let words = || DeviceBuffer::zeroed(stream, tokens * sizes.keys / WORD_ELEMENTS);
        Ok(Self { keys: words()?, values: words()? })
    }

    /// Those of the first `tokens` tokens; the same memory.
    pub fn part(&self, sizes: &WeightSizes, tokens: usize) -> Result<Self> {
        let words = 0..tokens * sizes.keys / WORD_ELEMENTS;
        Ok(Self { keys: self.keys.part(words.clone())?, values: self.values.part(words)? })
    }

    /// Bytes.
    pub fn bytes(&self) -> u64 {
        self.keys.bytes() + self.values.bytes()
    }
}
