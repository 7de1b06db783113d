//! A model's forward pass between its matrix products and the stages: what goes through it element by element; and weights of models
//! without a checkpoint.

mod argmax;
pub(crate) mod elements;
mod embed;
mod fill_random;
mod rms_norm;
mod rotate;
mod sample;
mod shares;
mod sin_cos;
mod swiglu;
pub(crate) mod turn;

pub use argmax::argmax;
pub use embed::embed;
pub use fill_random::fill_random;
pub use rms_norm::rms_norm;
pub use rotate::rotate;
pub use sample::sample;
pub use sin_cos::sin_cos;
pub use swiglu::swiglu;
