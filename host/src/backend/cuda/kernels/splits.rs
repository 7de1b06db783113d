//! Into how many blocks the tokens of a row are split, so that a GPU is filled and few blocks are late.

use spinkv_kernels::abi::attend::{MAX_SPLITS, TILE, WARPS};

/// Tiles that a warp could have done in the time that a block takes besides its tiles: to begin, and to put its warps together.
const FIXED_TILES: u64 = 3;

/// Splits for `units` of up to `tokens` tokens each, where the GPU runs `resident` blocks at once.
///
/// Blocks come in waves of `resident`, each as long as a block's tiles and what it does besides; the number with the shortest sum
/// of waves is taken, of equal ones the smallest. A split has at least a tile for each of its warps.
pub fn splits(units: u32, tokens: u32, resident: u32) -> u32 {
    let tiles = tokens.div_ceil(TILE);
    let most = (tiles / WARPS).clamp(1, MAX_SPLITS);
    let cost = |splits: u32| {
        let waves = (u64::from(units) * u64::from(splits)).div_ceil(resident.max(1).into());
        waves * (u64::from(tiles.div_ceil(splits).div_ceil(WARPS)) + FIXED_TILES)
    };
    (1..=most).min_by_key(|splits| cost(*splits)).unwrap_or(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_short_row_is_not_split() {
        assert_eq!(splits(1, 0, 396), 1);
        assert_eq!(splits(8, 64, 396), 1);
        assert_eq!(splits(8, 79, 396), 1);
    }

    #[test]
    fn few_rows_are_split_until_the_gpu_is_full() {
        // 8 rows of 2,048 tokens: 32 splits of a tile a warp.
        assert_eq!(splits(8, 2048, 396), 32);
        assert_eq!(splits(8, 2048, 0), 1);
    }

    #[test]
    fn many_rows_are_split_so_that_waves_come_out() {
        let (units, resident) = (512, 396);
        let splits = splits(units, 2048, resident);
        let idle = |splits: u32| {
            let blocks = units * splits;
            f64::from(blocks.div_ceil(resident) * resident) / f64::from(blocks)
        };
        assert!(idle(splits) < 1.2, "{splits} splits, {}", idle(splits));
    }
}
