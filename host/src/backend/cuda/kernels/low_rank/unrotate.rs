use spinkv_kernels::abi::WORD_ELEMENTS;
use spinkv_kernels::abi::low_rank::unrotate;
use spinkv_kernels::abi::model::rotate::HEAD_WORDS;

use super::super::super::driver::{
    Argument, DeviceBuffer, LaunchShape, Result, Stream, check_choice, check_length, check_operand,
    check_positive, check_range, launch_with,
};
use super::super::Kernels;
use crate::memory::Word;

/// A launch of `unrotate`: keys as they were before their rotary embedding.
#[derive(Clone, Copy, Debug)]
pub struct Unrotate<'a> {
    /// `[tokens, kv_heads, head_words]` bf16 or more.
    pub keys: &'a DeviceBuffer<Word>,
    /// Tokens.
    pub tokens: u32,
    /// KV heads.
    pub kv_heads: u32,
    /// Words of a head: 8 or 16, for 64 or 128 elements.
    pub head_words: u32,
    /// The first token's position.
    pub first_position: u32,
    /// `[head_dim / 2]`, in radians a position. Angles are accurate up to 2^20.
    pub frequencies: &'a DeviceBuffer<f32>,
    /// Factor of the sines and cosines that keys were turned with; 1 but for YaRN.
    pub magnitude: f32,
    /// `[tokens, kv_heads, head_words]` bf16 or more; another buffer than `keys`.
    pub plain: &'a DeviceBuffer<Word>,
}

impl Unrotate<'_> {
    /// Async: the keys are there when `stream` has come this far. No token launches nothing.
    ///
    /// # Errors
    /// [`Choice`](super::super::super::driver::DriverError::Choice) for heads of neither 64 nor 128,
    /// [`Operand`](super::super::super::driver::DriverError::Operand) for no head, or positions or words beyond 32 bits,
    /// [`Positive`](super::super::super::driver::DriverError::Positive) for a magnitude that is no number above 0,
    /// [`Length`](super::super::super::driver::DriverError::Length) and
    /// [`OutOfRange`](super::super::super::driver::DriverError::OutOfRange) for a buffer that does not fit, or a failed launch.
    ///
    /// # Safety
    /// Until the launch has run nothing writes what it reads, and nothing uses what it writes.
    pub unsafe fn launch(&self, kernels: &Kernels, stream: &Stream) -> Result<()> {
        let Self { tokens, kv_heads, head_words, first_position, .. } = *self;
        let most = u64::from(u32::MAX);
        check_choice("unrotate head_words", head_words, &HEAD_WORDS)?;
        check_operand("unrotate kv_heads", kv_heads.into(), 1..=most / u64::from(2 * head_words))?;
        check_positive("unrotate magnitude", self.magnitude)?;
        check_operand("unrotate positions", u64::from(first_position) + u64::from(tokens), 0..=most)?;
        let words = u64::from(tokens) * u64::from(kv_heads * head_words);
        check_range("unrotate keys", 0, words as usize, self.keys.len())?;
        check_range("unrotate plain", 0, words as usize, self.plain.len())?;
        check_length(
            "unrotate frequencies",
            head_words as usize * WORD_ELEMENTS / 2,
            self.frequencies.len(),
        )?;
        if tokens == 0 {
            return Ok(());
        }
        let arguments: [Argument; 8] = [
            self.keys.into(),
            tokens.into(),
            kv_heads.into(),
            head_words.into(),
            first_position.into(),
            self.frequencies.into(),
            (1.0 / self.magnitude).into(),
            self.plain.into(),
        ];
        let shape = LaunchShape::linear(unrotate::grid(tokens), unrotate::BLOCK);
        // SAFETY: order and types are the kernel's; the caller answers for who else uses the buffers.
        unsafe { launch_with(&kernels.low_rank.unrotate, &shape, stream, arguments) }
    }
}
