//! Linear layers: products of tokens and weights.

mod gemm;
#[cfg(any(not(target_arch = "nvptx64"), sm_90a))]
mod gemm_wgmma;
mod output;
mod parts;
mod shares;
mod stream;
mod tile;

pub use gemm::gemm;
#[cfg(any(not(target_arch = "nvptx64"), sm_90a))]
pub use gemm_wgmma::gemm_wgmma;
pub use stream::{linear_8, linear_16, linear_32, linear_64};
