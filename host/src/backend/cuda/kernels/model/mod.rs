//! A model's elementwise kernels.

mod argmax;
mod rotate;
mod rows;
mod sample;

pub use argmax::Argmax;
pub use rotate::{HeadNorms, Positions, Rotate};
pub use rows::{Embed, RmsNorm, Swiglu};
pub use sample::Sample;

use spinkv_kernels::abi::WORD_ELEMENTS;
use spinkv_kernels::abi::model::{MAX_BLOCKS, MAX_WIDTH};

use super::super::driver::{Function, Module, Result, check_multiple, check_operand};

/// The kernels of a model.
#[derive(Clone, Debug)]
pub(super) struct ModelFunctions {
    embed: Function,
    rms_norm: Function,
    rotate: Function,
    swiglu: Function,
    argmax: Function,
    sample: Function,
}

impl ModelFunctions {
    pub(super) fn load(module: &Module) -> Result<Self> {
        Ok(Self {
            embed: module.function("embed")?,
            rms_norm: module.function("rms_norm")?,
            rotate: module.function("rotate")?,
            swiglu: module.function("swiglu")?,
            argmax: module.function("argmax")?,
            sample: module.function("sample")?,
        })
    }

    pub(super) fn all(&self) -> impl Iterator<Item = &Function> {
        [&self.embed, &self.rms_norm, &self.rotate, &self.swiglu, &self.argmax, &self.sample].into_iter()
    }
}

/// Refuses rows that are no whole words of bf16, or too wide.
fn check_width(what: &'static str, width: u32) -> Result<()> {
    check_operand(what, width.into(), 1..=MAX_WIDTH.into())?;
    check_multiple(what, width.into(), WORD_ELEMENTS as u64)
}

/// Blocks of a launch of `rows` rows, `parts` blocks each.
fn check_blocks(what: &'static str, rows: u32, parts: u32) -> Result<u32> {
    let blocks = u64::from(rows) * u64::from(parts);
    check_operand(what, blocks, 0..=MAX_BLOCKS)?;
    Ok(blocks as u32)
}
