//! Into how many blocks the tokens of a row are split, so that a GPU is filled and few blocks are late.

use spinkv_kernels::abi::attend::{MAX_SPLITS, TILE, WARPS};

/// Tiles that a warp could have done in the time that a block takes besides its tiles: to begin, and to put its warps together.
const FIXED_TILES: u64 = 3;

/// Splits for `units` of up to `tokens` tokens each, on a GPU of so many multiprocessors.
///
/// A block a multiprocessor keeps memory busy: more at once are no faster together than one after another. So a multiprocessor's
/// time is that of its blocks, each as long as its tiles and what it does besides; the number of splits with the shortest time is taken,
/// of equal ones the smallest. A split has at least a tile for each of its warps.
pub fn splits(units: u32, tokens: u32, multiprocessors: u32) -> u32 {
    let tiles = tokens.div_ceil(TILE);
    let most = (tiles / WARPS).clamp(1, MAX_SPLITS);
    let cost = |splits: u32| {
        let blocks = (u64::from(units) * u64::from(splits)).div_ceil(multiprocessors.max(1).into());
        blocks * (u64::from(tiles.div_ceil(splits).div_ceil(WARPS)) + FIXED_TILES)
    };
    (1..=most).min_by_key(|splits| cost(*splits)).unwrap_or(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_short_row_is_not_split() {
        assert_eq!(splits(1, 0, 132), 1);
        assert_eq!(splits(8, 64, 132), 1);
        assert_eq!(splits(8, 79, 132), 1);
    }

    #[test]
    fn few_rows_are_split_until_the_gpu_is_full() {
        // 8 rows of 2,048 tokens: 16 splits of two tiles a warp, 128 blocks on 132 multiprocessors.
        assert_eq!(splits(8, 2048, 132), 16);
        assert_eq!(splits(8, 2048, 0), 1);
    }

    #[test]
    fn many_rows_are_split_only_so_that_no_multiprocessor_is_late() {
        // 128 rows on 132, 512 on 4 x 132: nothing to gain.
        assert_eq!(splits(128, 2048, 132), 1);
        assert_eq!(splits(512, 2048, 132), 1);
        // 136 rows would keep four multiprocessors busy twice as long as the others.
        let idle = |splits: u32| {
            let blocks = 136 * splits;
            f64::from(blocks.div_ceil(132) * 132) / f64::from(blocks)
        };
        let splits = splits(136, 32_768, 132);
        assert!(idle(splits) < 1.1, "{splits} splits, {}", idle(splits));
    }
}
