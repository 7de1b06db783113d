//! The kernels of `spinkv-kernels`, each launched through a type that names its operands.
//!
//! A launch checks everything that the host knows: lengths, limits, contexts. What lies in device memory (lists, counts) it cannot
//! see, so launching is `unsafe` where a kernel follows such a list.

mod chunk_mean;
mod gather;

pub use chunk_mean::ChunkMean;
pub use gather::Gather;

use spinkv_kernels::ptx;

use super::driver::{Context, Function, Module, Result};

/// All kernels, loaded for one device.
#[derive(Clone, Debug)]
pub struct Kernels {
    chunk_mean: Function,
    gather: Function,
}

impl Kernels {
    /// Loads the kernels that suit the device.
    ///
    /// # Errors
    /// [`DriverError::InvalidModule`](super::driver::DriverError::InvalidModule) if the driver refuses them, for instance since it is older than their PTX version.
    pub fn load(context: &Context) -> Result<Self> {
        let text = ptx(context.device().ptx_arch()?.name()).expect("PTX is built for every PtxArch");
        let module = Module::from_ptx(context, text)?;
        Ok(Self { chunk_mean: module.function("chunk_mean")?, gather: module.function("gather")? })
    }

    /// All of them, with what the driver's compiler made of them.
    pub fn functions(&self) -> [&Function; 2] {
        [&self.chunk_mean, &self.gather]
    }
}
