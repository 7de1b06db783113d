use spinkv_kernels::abi::gemm;
use spinkv_kernels::abi::linear::{self, epilogue};

use super::super::driver::{
    Argument, DeviceBuffer, DriverError, Function, LaunchShape, Result, Stream, check_multiple,
    check_operand, check_range, launch_with,
};
use super::{Kernels, linear_plan};
use crate::memory::Word;

/// Which kernel multiplies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LinearVariant {
    /// `linear_8` to `linear_64`: for up to 64 tokens, where reading the weights takes all the time.
    Stream,
    /// `gemm`: any number of tokens, products of a warp (`mma.sync`), which all GPUs have.
    Mma,
    /// `gemm_wgmma`: any number of tokens, products of a warpgroup (`wgmma`), which Hopper alone has.
    Wgmma,
}

/// Where products go, and as what.
#[derive(Clone, Copy, Debug)]
pub enum LinearOutput<'a> {
    /// `[tokens, n]` bf16.
    Bf16(&'a DeviceBuffer<Word>),
    /// `[tokens, n]`.
    F32(&'a DeviceBuffer<f32>),
    /// `[tokens, n]`: added to what is there.
    AddF32(&'a DeviceBuffer<f32>),
    /// `[tokens, n / 2]` bf16: `silu(gate) * up`, where the first half of the rows of the weights gives `gate` and the second `up`.
    GatedBf16(&'a DeviceBuffer<Word>),
}

/// A launch of `linear_8`, `linear_16`, `linear_32`, `linear_64`, `gemm` or `gemm_wgmma`: `x` times the transpose of `weights`.
#[derive(Clone, Copy, Debug)]
pub struct Linear<'a> {
    /// `[n, k_words]` bf16, as a checkpoint has them.
    pub weights: &'a DeviceBuffer<Word>,
    /// `[tokens, k_words]` bf16.
    pub x: &'a DeviceBuffer<Word>,
    /// Rows of `x`.
    pub tokens: u32,
    /// Rows of the weights: a multiple of 8, of 16 if gated.
    pub n: u32,
    /// Words of a row: an eighth of its elements.
    pub k_words: u32,
    /// Where the products go.
    pub output: LinearOutput<'a>,
    /// [`partials`](Self::partials) words: scratch. Launches that follow each other share it.
    pub partials: &'a DeviceBuffer<Word>,
    /// [`arrivals`](Self::arrivals), 0 before and after: scratch.
    pub arrivals: &'a DeviceBuffer<u32>,
    /// Whether it may begin before the launch ahead of it in the stream has ended: weights are then on their way when it does. For few
    /// tokens; with many it has no effect.
    pub overlaps: bool,
}

impl Linear<'_> {
    /// Words that [`partials`](Self::partials) has room for, whatever the weights and the number of tokens.
    pub fn partials(kernels: &Kernels) -> usize {
        linear::partial_words(linear::MAX_TOKENS, kernels.multiprocessors.max(1)) as usize
    }

    /// Length of [`arrivals`](Self::arrivals) for `n` rows of weights, or fewer.
    pub fn arrivals(n: u32) -> usize {
        linear::tiles(n) as usize
    }

    /// The variant that [`launch`](Self::launch) takes for `tokens` tokens.
    pub fn variant(kernels: &Kernels, tokens: u32) -> LinearVariant {
        linear_plan::variant(tokens, kernels.gemm_wgmma.is_some())
    }

    /// Async: products are there when `stream` has come this far. Without tokens it launches nothing.
    ///
    /// # Errors
    /// [`Operand`](DriverError::Operand) for a size of 0, and more tiles or words than the kernels count,
    /// [`Multiple`](DriverError::Multiple) for rows that are not a multiple of 8, or of 16 if gated,
    /// [`OutOfRange`](DriverError::OutOfRange) for a buffer that does not fit, or a failed launch.
    ///
    /// # Safety
    /// When the launch runs, `arrivals` are 0; until it has run nothing writes what it reads, and nothing uses what it writes. If it
    /// overlaps, the launch ahead of it does not write the weights.
    pub unsafe fn launch(&self, kernels: &Kernels, stream: &Stream) -> Result<()> {
        // SAFETY: the caller's part.
        unsafe { self.launch_as(Self::variant(kernels, self.tokens), kernels, stream) }
    }

    /// The same with a variant of the caller's choice, for benches and tests.
    ///
    /// # Errors
    /// Those of [`launch`](Self::launch), [`UnknownFunction`](DriverError::UnknownFunction) for a variant that the device does not have, and
    /// [`Operand`](DriverError::Operand) for more tokens than it takes.
    ///
    /// # Safety
    /// As for [`launch`](Self::launch).
    pub unsafe fn launch_as(&self, variant: LinearVariant, kernels: &Kernels, stream: &Stream) -> Result<()> {
        let Self { weights, x, tokens, n, k_words, output, .. } = *self;
        let most = u64::from(u32::MAX);
        check_operand("linear n", n.into(), 1..=most)?;
        check_operand("linear k_words", k_words.into(), 1..=most)?;
        let gated = matches!(output, LinearOutput::GatedBf16(_));
        check_multiple("linear n", n.into(), if gated { 16 } else { 8 })?;
        let of = |rows: u32, columns: u32| u64::from(rows) * u64::from(columns);
        // Kernels count words and products in 32 bits.
        check_operand("linear words of weights", of(n, k_words), 0..=most)?;
        check_operand("linear words of x", of(tokens, k_words), 0..=most)?;
        check_operand("linear products", of(tokens, n), 0..=most)?;
        check_operand("linear units", of(linear::tiles(n), linear::chunks(k_words)), 1..=i32::MAX as u64)?;
        check_range("linear weights", 0, of(n, k_words) as usize, weights.len())?;
        check_range("linear x", 0, of(tokens, k_words) as usize, x.len())?;
        let products = of(tokens, n) as usize;
        // The view that is not touched is the other one's.
        let (code, address): (u32, Argument) = match output {
            LinearOutput::Bf16(words) => {
                check_range("linear output", 0, products / 8, words.len())?;
                (epilogue::STORE_BF16, words.into())
            }
            LinearOutput::GatedBf16(words) => {
                check_range("linear output", 0, products / 16, words.len())?;
                (epilogue::GATED_BF16, words.into())
            }
            LinearOutput::F32(floats) => {
                check_range("linear output", 0, products, floats.len())?;
                (epilogue::STORE_F32, floats.into())
            }
            LinearOutput::AddF32(floats) => {
                check_range("linear output", 0, products, floats.len())?;
                (epilogue::ADD_F32, floats.into())
            }
        };
        if tokens == 0 {
            return Ok(());
        }
        let operands: [Argument; 6] =
            [weights.into(), x.into(), tokens.into(), n.into(), k_words.into(), code.into()];
        match variant {
            LinearVariant::Stream => self.stream(kernels, stream, operands, address),
            LinearVariant::Mma => {
                use gemm::mma::{BLOCK, ROWS, STAGES};
                self.tiles(&kernels.gemm, [BLOCK, ROWS, STAGES], stream, operands, address)
            }
            LinearVariant::Wgmma => {
                use gemm::wgmma::{BLOCK, ROWS, STAGES};
                let missing = || DriverError::UnknownFunction { name: "gemm_wgmma".to_owned() };
                let function = kernels.gemm_wgmma.as_ref().ok_or_else(missing)?;
                self.tiles(function, [BLOCK, ROWS, STAGES], stream, operands, address)
            }
        }
    }

    /// Launches the kernel for so few tokens.
    fn stream(
        &self,
        kernels: &Kernels,
        stream: &Stream,
        [weights, x, tokens, n, k_words, code]: [Argument; 6],
        output: Argument,
    ) -> Result<()> {
        check_operand("linear tokens to stream", self.tokens.into(), 1..=linear::MAX_TOKENS.into())?;
        let tile = linear::token_tile(self.tokens);
        let place = linear::TOKEN_TILES.iter().position(|tokens| *tokens == tile);
        let function = &kernels.linear[place.expect("it is one of them")];
        let blocks = linear_plan::blocks(self.n, self.k_words, kernels.multiprocessors);
        if blocks > 1 {
            let partials = linear::partial_words(tile, blocks) as usize;
            check_range("linear partials", 0, partials, self.partials.len())?;
            check_range("linear arrivals", 0, Self::arrivals(self.n), self.arrivals.len())?;
        }
        let shape = LaunchShape::linear(blocks, linear::BLOCK).with_shared_bytes(linear::shared_bytes(tile));
        let shape = if self.overlaps { shape.overlapping() } else { shape };
        let (partials, arrivals) = (self.partials.into(), self.arrivals.into());
        let arguments = [weights, x, tokens, n, k_words, code, partials, arrivals, output, output];
        // SAFETY: order and types are the kernels'; sizes are those of the buffers; the caller answers for what is in them.
        unsafe { launch_with(function, &shape, stream, arguments) }
    }

    /// Launches a kernel whose blocks have tiles of so many rows.
    fn tiles(
        &self,
        function: &Function,
        [block, rows, stages]: [u32; 3],
        stream: &Stream,
        [weights, x, tokens, n, k_words, code]: [Argument; 6],
        output: Argument,
    ) -> Result<()> {
        let blocks = gemm::blocks(self.tokens, self.n, rows);
        check_operand("linear tiles", blocks, 1..=i32::MAX as u64)?;
        let shape =
            LaunchShape::linear(blocks as u32, block).with_shared_bytes(gemm::shared_bytes(rows, stages));
        let arguments = [weights, x, tokens, n, k_words, code, output, output];
        // SAFETY: as for few tokens.
        unsafe { launch_with(function, &shape, stream, arguments) }
    }
}
