//! Builds the kernels' PTX into `kernels/ptx`; run in the folder of the example, with the device toolchain that `cargo xtask doctor` looks for:
//!
//! ```sh
//! cargo run --package build-kernels
//! ```

use cuda_builder::{Arch, CudaBuilder, CudaBuilderError};

fn main() -> Result<(), CudaBuilderError> {
    let builder = CudaBuilder::new("kernels").support_ir("../../cuda_std/src/device.ll");
    for built in builder.generate_line_info(false).build_archs(&Arch::ALL, "kernels/ptx")? {
        println!("{}", built.ptx.display());
    }
    Ok(())
}
