//! Sums over parts of k, which blocks leave for one of them to add up.

use cuda_std::prelude::*;

use crate::abi::linear::BLOCK;
use crate::unroll::unrolled;

/// Sums of tiles that lie in several shares: of each block two, that of the tile which its share begins within, and of the one which it ends
/// within. Each thread finds its own where it would have stored them.
#[derive(Clone, Copy)]
pub struct Parts(pub GlobalMut<U32x4>);

impl Parts {
    /// Stores a thread's sums of part `part`.
    ///
    /// # Safety
    /// There is such a part.
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    #[inline(always)]
    pub unsafe fn store<const EIGHTS: usize>(&self, part: u32, sums: &[[f32; 4]; EIGHTS]) {
        unrolled!(eight < EIGHTS, {
            let [x, y, z, w] = sums[eight].map(f32::to_bits);
            self.0.store_with(place::<EIGHTS>(part, eight), U32x4 { x, y, z, w }, StoreCache::Global);
        });
    }

    /// A thread's sums of a tile that begins in block `from`'s share and ends in block `to`'s.
    ///
    /// # Safety
    /// Their parts are there.
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    #[inline(always)]
    pub unsafe fn add<const EIGHTS: usize, const AT_ONCE: usize>(
        &self,
        from: u32,
        to: u32,
        sums: &mut [[f32; 4]; EIGHTS],
    ) {
        *sums = [[0.0; 4]; EIGHTS];
        let mut block = from;
        while block <= to {
            let mut parts = [[U32x4::default(); EIGHTS]; AT_ONCE];
            unrolled!(at < AT_ONCE, {
                // Beyond the last there is another of it, which is not added.
                let block = (block + at as u32).min(to);
                let part = 2 * block + u32::from(block == from);
                unrolled!(eight < EIGHTS, {
                    let place = place::<EIGHTS>(part, eight);
                    parts[at][eight] = self.0.as_global().load_with(place, LoadCache::Global);
                });
            });
            unrolled!(at < AT_ONCE, {
                if block + at as u32 <= to {
                    unrolled!(eight < EIGHTS, {
                        let part = parts[at][eight].to_array();
                        let mut sum = 0;
                        while sum < 4 {
                            sums[eight][sum] += f32::from_bits(part[sum]);
                            sum += 1;
                        }
                    });
                }
            });
            block += AT_ONCE as u32;
        }
    }
}

/// Where eight `eight` of a thread's sums of part `part` lies.
#[inline(always)]
fn place<const EIGHTS: usize>(part: u32, eight: usize) -> usize {
    (part as usize * EIGHTS + eight) * BLOCK as usize + thread::thread_idx_x() as usize
}
