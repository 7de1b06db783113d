//! Which kernel multiplies how many tokens, and how many blocks read the weights.

use spinkv_kernels::abi::linear::{MAX_TOKENS, chunks, tiles};

use super::linear::LinearVariant;

/// The fewest units that are worth a block: fewer are read sooner by one block than by two that put their sums together.
const LEAST_UNITS: u64 = 4;

/// The kernel for `tokens` tokens; `wgmma` where products of a warpgroup are to be had.
pub fn variant(tokens: u32, wgmma: bool) -> LinearVariant {
    match tokens {
        0..=MAX_TOKENS => LinearVariant::Stream,
        _ if wgmma => LinearVariant::Wgmma,
        _ => LinearVariant::Mma,
    }
}

/// Blocks that stream `n` rows of `k_words` words through so many multiprocessors: one each, since that keeps memory busy and leaves room
/// for the next launch to begin.
pub fn blocks(n: u32, k_words: u32, multiprocessors: u32) -> u32 {
    let units = u64::from(tiles(n)) * u64::from(chunks(k_words));
    (units / LEAST_UNITS).clamp(1, multiprocessors.max(1).into()) as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn few_tokens_are_streamed_past() {
        assert_eq!(variant(1, true), LinearVariant::Stream);
        assert_eq!(variant(64, true), LinearVariant::Stream);
        assert_eq!(variant(65, true), LinearVariant::Wgmma);
        assert_eq!(variant(65, false), LinearVariant::Mma);
    }

    #[test]
    fn every_multiprocessor_reads_as_much() {
        // Layers of Qwen3-14B, Qwen3-8B and Llama-3.1-8B: no share is 4 % above the mean.
        for (n, k) in [(7168, 5120), (5120, 5120), (34_816, 5120), (5120, 17_408), (151_936, 5120)]
            .into_iter()
            .chain([(6144, 4096), (24_576, 4096), (4096, 12_288), (28_672, 4096), (4096, 14_336)])
        {
            let units = tiles(n) * chunks(k / 8);
            let blocks = blocks(n, k / 8, 132);
            assert_eq!(blocks, 132);
            let mean = f64::from(units) / f64::from(blocks);
            assert!(f64::from(units.div_ceil(blocks)) < 1.04 * mean, "{n} x {k}: {units} units");
        }
    }

    #[test]
    fn small_weights_have_few_blocks() {
        assert_eq!(blocks(128, 16, 132), 1);
        assert_eq!(blocks(1024, 128, 132), 32);
        assert_eq!(blocks(8, 1, 0), 1);
    }
}
