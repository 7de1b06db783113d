//! Keys in low rank: what `host::backend::cpu::low_rank` does, in products that suit a GPU.
//!
//! Of a layer's prompt, in this order: [`unrotate()`] turns keys back, [`gram()`] and [`gram_sum`] make their Gram matrix; each iteration is
//! [`row_dots`] with it, [`row_dots`] of the vectors with each other, [`inverse_factor()`] and [`row_sums`]; [`complete_basis()`] fills up what they have not got; [`store_basis()`] rounds what comes
//! out; and a linear layer ([`gemm`](crate::linear::gemm())) with the basis as weights makes the coefficients. Of the tokens that leave the steady zone later [`project_keys()`] does. All between the Gram matrix
//! and the basis is f32: bf16 would not keep vectors orthogonal.

mod complete_basis;
mod gram;
mod inverse_factor;
mod product;
mod project_keys;
mod store_basis;
mod unrotate;

pub use complete_basis::complete_basis;
pub use gram::{gram, gram_sum};
pub use inverse_factor::inverse_factor;
pub use product::{row_dots, row_sums};
pub use project_keys::project_keys;
pub use store_basis::store_basis;
pub use unrotate::unrotate;
