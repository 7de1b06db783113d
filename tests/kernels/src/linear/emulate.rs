//! Runs the kernels of linear layers under the emulator.

use cuda_std::emulator::{Buffer, Fault, Launch};
use cuda_std::{Global, GlobalMut, U32x4};
use spinkv_kernels::abi;
use spinkv_kernels::linear::{gemm, gemm_wgmma, linear_8, linear_16, linear_32, linear_64};

use super::{LinearCase, Products};
use crate::POISON;
use crate::emulated::words;

impl LinearCase {
    /// The products after the kernel for so many tokens ran in the order of `schedule`.
    ///
    /// # Errors
    /// What the emulator found wrong.
    pub fn emulate(&self, schedule: u64) -> Result<Products, Fault> {
        let sizes = [self.tokens, self.n, self.k_words].map(|size| size as u32);
        let [tokens, n, k_words] = sizes;
        let (weights, x) = (words(&self.weights), words(&self.x));
        let tile = abi::linear::token_tile(tokens);
        let partials = words(&vec![POISON; abi::linear::partial_words(tile, self.blocks) as usize]);
        let arrivals = Buffer::from_slice(&vec![0; abi::linear::tiles(n) as usize]);
        let (bf16, f32) = self.products().buffers();
        let kernel = match tile {
            8 => linear_8,
            16 => linear_16,
            32 => linear_32,
            _ => linear_64,
        };
        let launch =
            Launch::new(self.blocks, abi::linear::BLOCK).shared(abi::linear::shared_bytes(tile) as usize);
        launch.seed(schedule).run(|| {
            // SAFETY: the emulator checks every access.
            unsafe {
                kernel(
                    weights.view(),
                    x.view(),
                    tokens,
                    n,
                    k_words,
                    self.epilogue,
                    partials.view_mut(),
                    arrivals.view_mut(),
                    bf16.view_mut(),
                    f32.view_mut(),
                );
            }
        })?;
        assert!(arrivals.to_vec().iter().all(|arrived| *arrived == 0), "arrivals are 0 for the next launch");
        Ok(Products::of(&bf16, &f32))
    }

    /// The products after `gemm` ran in the order of `schedule`.
    ///
    /// # Errors
    /// What the emulator found wrong.
    pub fn emulate_gemm(&self, schedule: u64) -> Result<Products, Fault> {
        use abi::gemm::mma::{BLOCK, ROWS, STAGES};
        self.emulate_tiles([BLOCK, ROWS, STAGES], schedule, |weights, x, [tokens, n, k_words], bf16, f32| {
            // SAFETY: the emulator checks every access.
            unsafe { gemm(weights, x, tokens, n, k_words, self.epilogue, bf16, f32) };
        })
    }

    /// The products after `gemm_wgmma` ran in the order of `schedule`.
    ///
    /// # Errors
    /// What the emulator found wrong.
    pub fn emulate_gemm_wgmma(&self, schedule: u64) -> Result<Products, Fault> {
        use abi::gemm::wgmma::{BLOCK, ROWS, STAGES};
        self.emulate_tiles([BLOCK, ROWS, STAGES], schedule, |weights, x, [tokens, n, k_words], bf16, f32| {
            // SAFETY: the emulator checks every access.
            unsafe { gemm_wgmma(weights, x, tokens, n, k_words, self.epilogue, bf16, f32) };
        })
    }

    fn emulate_tiles(
        &self,
        [block, rows, stages]: [u32; 3],
        schedule: u64,
        kernel: impl Fn(Global<U32x4>, Global<U32x4>, [u32; 3], GlobalMut<u32>, GlobalMut<u64>),
    ) -> Result<Products, Fault> {
        let sizes @ [tokens, n, _] = [self.tokens, self.n, self.k_words].map(|size| size as u32);
        let (weights, x) = (words(&self.weights), words(&self.x));
        let (bf16, f32) = self.products().buffers();
        let launch = Launch::new(abi::gemm::blocks(tokens, n, rows) as u32, block)
            .shared(abi::gemm::shared_bytes(rows, stages) as usize);
        launch.seed(schedule).run(|| {
            kernel(weights.view(), x.view(), sizes, bf16.view_mut(), f32.view_mut());
        })?;
        Ok(Products::of(&bf16, &f32))
    }
}

impl Products {
    /// As kernels see them.
    fn buffers(&self) -> (Buffer<u32>, Buffer<u64>) {
        let pairs: Vec<u64> = bytemuck::pod_collect_to_vec(&self.f32);
        (Buffer::from_slice(bytemuck::cast_slice(&self.bf16)), Buffer::from_slice(&pairs))
    }

    fn of(bf16: &Buffer<u32>, f32: &Buffer<u64>) -> Self {
        Self {
            bf16: bytemuck::pod_collect_to_vec(&bf16.to_vec()),
            f32: bytemuck::pod_collect_to_vec(&f32.to_vec()),
        }
    }
}
