use spinkv_kernels::abi::WORD_ELEMENTS;
use spinkv_kernels::abi::model::{embed, rms_norm, swiglu};

use super::super::super::driver::{
    Argument, DeviceBuffer, LaunchShape, Result, Stream, check_length, check_positive, check_range,
    launch_with,
};
use super::super::Kernels;
use super::{check_blocks, check_width};
use crate::memory::Word;

/// A launch of `embed`: the rows of an embedding for some tokens, as the residual stream begins.
#[derive(Clone, Copy, Debug)]
pub struct Embed<'a> {
    /// `[tokens]` or more: one beyond the vocabulary gets zeroes.
    pub ids: &'a DeviceBuffer<u32>,
    /// Tokens.
    pub tokens: u32,
    /// `[vocab, hidden]` bf16.
    pub embedding: &'a DeviceBuffer<Word>,
    /// Elements of a row, a multiple of 8.
    pub hidden: u32,
    /// `[tokens, hidden]` or more.
    pub residual: &'a DeviceBuffer<f32>,
}

impl Embed<'_> {
    /// Async: the residual is there when `stream` has come this far. No token launches nothing.
    ///
    /// # Errors
    /// [`Operand`](super::super::super::driver::DriverError::Operand) or
    /// [`Multiple`](super::super::super::driver::DriverError::Multiple) for a width that the kernel does not take, too many tokens or an embedding
    /// that is no whole rows, [`OutOfRange`](super::super::super::driver::DriverError::OutOfRange) for a buffer that is too short, or a failed
    /// launch.
    ///
    /// # Safety
    /// Until the launch has run nothing writes what it reads, and nothing uses what it writes.
    pub unsafe fn launch(&self, kernels: &Kernels, stream: &Stream) -> Result<()> {
        let Self { tokens, hidden, .. } = *self;
        check_width("embed hidden", hidden)?;
        let row_words = hidden as usize / WORD_ELEMENTS;
        let vocab = self.embedding.len() / row_words;
        check_length("embed embedding", vocab * row_words, self.embedding.len())?;
        check_range("embed ids", 0, tokens as usize, self.ids.len())?;
        check_range("embed residual", 0, tokens as usize * hidden as usize, self.residual.len())?;
        let blocks = check_blocks("embed blocks", tokens, embed::parts(hidden))?;
        if blocks == 0 {
            return Ok(());
        }
        let arguments: [Argument; 5] = [
            self.ids.into(),
            self.embedding.into(),
            // An id has 32 bits: all of them lie below more rows than that.
            u32::try_from(vocab).unwrap_or(u32::MAX).into(),
            hidden.into(),
            self.residual.into(),
        ];
        let shape = LaunchShape::linear(blocks, embed::BLOCK);
        // SAFETY: order and types are the kernel's; the caller answers for who else uses the buffers.
        unsafe { launch_with(&kernels.model.embed, &shape, stream, arguments) }
    }
}

/// A launch of `rms_norm`: rows of the residual stream, divided by their root mean square.
#[derive(Clone, Copy, Debug)]
pub struct RmsNorm<'a> {
    /// `[first_token + tokens, hidden]` or more.
    pub residual: &'a DeviceBuffer<f32>,
    /// `[hidden]`.
    pub weight: &'a DeviceBuffer<f32>,
    /// The first row to take.
    pub first_token: u32,
    /// Rows to take.
    pub tokens: u32,
    /// Added to the mean square; above 0, so that a row of zeroes has a norm.
    pub eps: f32,
    /// `[tokens, hidden]` bf16 or more.
    pub normed: &'a DeviceBuffer<Word>,
}

impl RmsNorm<'_> {
    /// Async: the rows are there when `stream` has come this far. No token launches nothing.
    ///
    /// # Errors
    /// [`Operand`](super::super::super::driver::DriverError::Operand) or
    /// [`Multiple`](super::super::super::driver::DriverError::Multiple) for a width that the kernel does not take or too many tokens,
    /// [`Positive`](super::super::super::driver::DriverError::Positive) for an `eps` that is no number above 0,
    /// [`OutOfRange`](super::super::super::driver::DriverError::OutOfRange) for a buffer that is too short, or a failed launch.
    ///
    /// # Safety
    /// As for [`Embed::launch`].
    pub unsafe fn launch(&self, kernels: &Kernels, stream: &Stream) -> Result<()> {
        let Self { first_token, tokens, eps, .. } = *self;
        // What is beyond 32 bits is beyond the widest row, too.
        let hidden = u32::try_from(self.weight.len()).unwrap_or(u32::MAX);
        check_width("rms_norm weight", hidden)?;
        check_positive("rms_norm eps", eps)?;
        let (width, row_words) = (hidden as usize, hidden as usize / WORD_ELEMENTS);
        let (first, rows) = (first_token as usize * width, tokens as usize * width);
        check_range("rms_norm residual", first, rows, self.residual.len())?;
        check_range("rms_norm normed", 0, tokens as usize * row_words, self.normed.len())?;
        let blocks = check_blocks("rms_norm tokens", tokens, 1)?;
        if blocks == 0 {
            return Ok(());
        }
        let arguments: [Argument; 6] = [
            self.residual.into(),
            self.weight.into(),
            first_token.into(),
            hidden.into(),
            eps.into(),
            self.normed.into(),
        ];
        let shape = LaunchShape::linear(blocks, rms_norm::BLOCK).with_shared_bytes(rms_norm::SHARED_BYTES);
        // SAFETY: order and types are the kernel's; the caller answers for who else uses the buffers.
        unsafe { launch_with(&kernels.model.rms_norm, &shape, stream, arguments) }
    }
}

/// A launch of `swiglu`: the gated activation of an MLP.
#[derive(Clone, Copy, Debug)]
pub struct Swiglu<'a> {
    /// `[tokens, 2, width]` bf16 or more: a token's gate, then its up.
    pub gate_up: &'a DeviceBuffer<Word>,
    /// Rows.
    pub tokens: u32,
    /// Elements of a row, a multiple of 8.
    pub width: u32,
    /// `[tokens, width]` bf16 or more.
    pub activated: &'a DeviceBuffer<Word>,
}

impl Swiglu<'_> {
    /// Async: the rows are there when `stream` has come this far. No token launches nothing.
    ///
    /// # Errors
    /// [`Operand`](super::super::super::driver::DriverError::Operand) or
    /// [`Multiple`](super::super::super::driver::DriverError::Multiple) for a width that the kernel does not take or too many tokens,
    /// [`OutOfRange`](super::super::super::driver::DriverError::OutOfRange) for a buffer that is too short, or a failed launch.
    ///
    /// # Safety
    /// As for [`Embed::launch`].
    pub unsafe fn launch(&self, kernels: &Kernels, stream: &Stream) -> Result<()> {
        let Self { tokens, width, .. } = *self;
        check_width("swiglu width", width)?;
        let row_words = width / WORD_ELEMENTS as u32;
        let words = tokens as usize * row_words as usize;
        check_range("swiglu gate_up", 0, 2 * words, self.gate_up.len())?;
        check_range("swiglu activated", 0, words, self.activated.len())?;
        let blocks = check_blocks("swiglu blocks", tokens, swiglu::parts(row_words))?;
        if blocks == 0 {
            return Ok(());
        }
        let arguments: [Argument; 3] = [self.gate_up.into(), row_words.into(), self.activated.into()];
        let shape = LaunchShape::linear(blocks, swiglu::BLOCK);
        // SAFETY: order and types are the kernel's; the caller answers for who else uses the buffers.
        unsafe { launch_with(&kernels.model.swiglu, &shape, stream, arguments) }
    }
}
