//! Linear layers: products of tokens and weights.

mod output;
mod parts;
mod shares;
mod stream;

pub use stream::{linear_8, linear_16, linear_32, linear_64};
