//! Keys in low rank: what finds a layer's basis, and what rebuilds keys from it.

mod basis;
mod gram;
mod project_keys;
mod rebuild_keys;
mod steps;
mod unrotate;

pub use basis::{BasisScratch, LowRankBasis};
pub use gram::Gram;
pub use project_keys::ProjectKeys;
pub use rebuild_keys::RebuildKeys;
pub use steps::{CompleteBasis, InverseFactor, RowProduct, SmallPivots, StoreBasis, Weights};
pub use unrotate::Unrotate;

use spinkv_kernels::abi::low_rank::{MAX_RANK, RANK_STEP};

use super::super::driver::{Function, Module, Result, check_multiple, check_operand};

/// The kernels, loaded.
#[derive(Clone, Debug)]
pub(super) struct LowRankFunctions {
    unrotate: Function,
    gram: Function,
    gram_sum: Function,
    row_dots: Function,
    row_sums: Function,
    inverse_factor: Function,
    complete_basis: Function,
    store_basis: Function,
    project_keys: Function,
    rebuild_keys_64: Function,
    rebuild_keys_128: Function,
}

impl LowRankFunctions {
    pub fn load(module: &Module, shared: impl Fn(&str) -> Result<Function>) -> Result<Self> {
        Ok(Self {
            unrotate: module.function("unrotate")?,
            gram: shared("gram")?,
            gram_sum: module.function("gram_sum")?,
            row_dots: module.function("row_dots")?,
            row_sums: module.function("row_sums")?,
            inverse_factor: shared("inverse_factor")?,
            complete_basis: shared("complete_basis")?,
            store_basis: module.function("store_basis")?,
            project_keys: shared("project_keys")?,
            rebuild_keys_64: shared("rebuild_keys_64")?,
            rebuild_keys_128: shared("rebuild_keys_128")?,
        })
    }

    pub fn all(&self) -> impl Iterator<Item = &Function> {
        [
            &self.unrotate,
            &self.gram,
            &self.gram_sum,
            &self.row_dots,
            &self.row_sums,
            &self.inverse_factor,
            &self.complete_basis,
            &self.store_basis,
            &self.project_keys,
            &self.rebuild_keys_64,
            &self.rebuild_keys_128,
        ]
        .into_iter()
    }
}

/// Refuses ranks that kernels do not take.
fn check_rank(what: &'static str, rank: u32) -> Result<()> {
    check_operand(what, rank.into(), 1..=MAX_RANK.into())?;
    check_multiple(what, rank.into(), RANK_STEP.into())
}
